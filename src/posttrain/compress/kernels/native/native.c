// The level of the processor, and threads.

#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#endif

EXPORT int posttrain_level(void) { return supported_level(); }

EXPORT int posttrain_threaded(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int supported_level(void) {
#if X86
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (!avx2) return PORTABLE;
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                       __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("gfni");
    return avx512 ? AVX512 : AVX2;
#else
    return PORTABLE;
#endif
}

// Several pieces a thread, taken as threads come free, so that a thread that is held up does not hold up all.
void for_rows(RowsBody body, const void *task, int64_t rows, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
        const int64_t piece = rounded_up((rows + threads * 4 - 1) / (threads * 4), 8);
        const int64_t pieces = (rows + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t i = 0; i < pieces; i++)
            body(task, i * piece, least((i + 1) * piece, rows), omp_get_thread_num());
        return;
    }
#endif
    (void)threads;
    body(task, 0, rows, 0);
}

static void unpack_portable(const uint8_t *row, int64_t bytes, int bits, int64_t columns, uint8_t *to) {
    for (int64_t k = 0, at = 0; k < columns; k += 8, at += bits) {
        uint64_t eight = 0;
        for (int i = 0; i < bits && at + i < bytes; i++) eight |= (uint64_t)row[at + i] << (8 * i);
        for (int i = 0; i < 8; i++) to[k + i] = (uint8_t)(eight >> (i * bits) & ((1u << bits) - 1));
    }
}

#if X86
FOR_AVX2 static void unpack_avx2(const uint8_t *row, int64_t bytes, int bits, int64_t columns, uint8_t *to) {
    const uint64_t where = 0x0101010101010101ull * ((1u << bits) - 1);
    for (int64_t k = 0, at = 0; k < columns; k += 8, at += bits) {
        uint64_t eight = 0;
        memcpy(&eight, row + at, (size_t)least(8, bytes - at));
        eight = _pdep_u64(eight, where);
        memcpy(to + k, &eight, 8);
    }
}
#endif

Unpack unpacker(int level) {
#if X86
    if (level >= AVX2) return unpack_avx2;
#endif
    (void)level;
    return unpack_portable;
}
