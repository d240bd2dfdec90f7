// What the kernels share: processor levels, splitting of rows over threads, half precision, packed codes.
//
// Plain C over pointers, without Python's or torch's headers. Every kernel is compiled for several levels of the
// processor in the same file (target attributes) and picks one at run time, so that one library serves all machines.

#ifndef POSTTRAIN_NATIVE_H
#define POSTTRAIN_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Levels, each containing those below it. AVX512 is that of Ice Lake and Zen 4: byte permutes, VNNI, vector
// popcounts, GFNI.
enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

enum { DONE = 0, NO_MEMORY = 1, NOT_OFFERED = 2 };  // what an exported function returns

enum { FP32 = 0, BF16 = 1 };                         // element types of inputs and outputs
enum { ZERO_NONE = 0, ZERO_INTEGER = 1, ZERO_FLOAT = 2 };

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#define FOR_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#define FOR_AVX512                                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512vpopcntdq,gfni,fma,f16c,"    \
                          "bmi,bmi2,popcnt")))
#else
#define X86 0
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#else
#define INLINE static inline
#define EXPORT
#endif

// Vectors of GCC, for plain C: it finds the instructions of any processor for them.
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Words __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(8)));

INLINE float total_of(Floats v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

int supported_level(void);

// Calls body(task, begin, end, thread) for ranges that cover the rows, on so many threads (thread < threads).
typedef void (*RowsBody)(const void *task, int64_t begin, int64_t end, int thread);
void for_rows(RowsBody body, const void *task, int64_t rows, int threads);

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory for vectors: aligned to a cache line, and a whole number of them long.
INLINE void *aligned(size_t bytes) { return aligned_alloc(64, (size_t)rounded_up((int64_t)(bytes ? bytes : 1), 64)); }

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of_half(uint16_t half) {
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    const float scaled = float_of_bits(magnitude) * 5.192296858534828e33f;  // 2^112: right for subnormals too
    const uint32_t finite = bits_of_float(scaled), special = magnitude | 0x7f800000u;
    return float_of_bits(((half & 0x7c00) == 0x7c00 ? special : finite) | (uint32_t)(half & 0x8000) << 16);
}

INLINE float float_of_bf16(uint16_t value) { return float_of_bits((uint32_t)value << 16); }

INLINE uint16_t bf16_of_float(float value) {  // to nearest, ties to even; what is no number stays none
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

INLINE float element(const void *from, int type, int64_t i) {
    return type == BF16 ? float_of_bf16(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

// Elements `at` to `at + n` as fp32.
INLINE void as_floats(float *to, const void *from, int type, int64_t at, int64_t n) {
    if (type == BF16)
        for (int64_t i = 0; i < n; i++) to[i] = float_of_bf16(((const uint16_t *)from)[at + i]);
    else
        memcpy(to, (const float *)from + at, (size_t)n * 4);
}

INLINE void store(void *to, int type, int64_t i, float value) {
    if (type == BF16)
        ((uint16_t *)to)[i] = bf16_of_float(value);
    else
        ((float *)to)[i] = value;
}

// Code i of a row of packed codes of `bits` bits, lowest bits first; `bytes` is the length of the row.
INLINE unsigned code_at(const uint8_t *row, int64_t bytes, int bits, int64_t i) {
    const int64_t bit = i * bits, byte = bit >> 3;
    unsigned window = row[byte];
    if (byte + 1 < bytes) window |= (unsigned)row[byte + 1] << 8;
    return window >> (bit & 7) & ((1u << bits) - 1);
}

// A row of packed codes, a byte each; there is room for a multiple of 8 of them.
typedef void (*Unpack)(const uint8_t *row, int64_t bytes, int bits, int64_t columns, uint8_t *to);
Unpack unpacker(int level);

#endif
