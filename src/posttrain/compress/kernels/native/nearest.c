// The row of a table that lies nearest to each of many short vectors, without a matrix of distances.

#include "native.h"

enum { LANES = 8, AT_ONCE = 4 };

typedef int32_t Lanes __attribute__((vector_size(32)));

typedef struct {
    const float *vectors;     // [count, width]
    const float *table;       // [width, padded]: entry k of the table is a column
    const float *half;        // [padded] half of each entry's squared length; of entries that are none, infinite
    int64_t width, padded;
    int64_t *index;           // [count]
} Nearest;

typedef void (*VectorsBody)(const Nearest *p, int64_t begin, int64_t end);

// |x - t|^2 / 2 but for |x|^2 / 2, of 8 entries at a time; each lane keeps the first of its smallest.
INLINE void search(const Nearest *p, int64_t first, const int together) {
    Floats best[AT_ONCE];
    Lanes block[AT_ONCE];
    for (int m = 0; m < together; m++) best[m] = (Floats){0} + __builtin_inff(), block[m] = (Lanes){0};
    const float *x = p->vectors + first * p->width;
    for (int64_t k = 0; k < p->padded; k += LANES) {
        Floats start, away[AT_ONCE];
        memcpy(&start, p->half + k, sizeof start);
        for (int m = 0; m < together; m++) away[m] = start;
        for (int64_t j = 0; j < p->width; j++) {
            Floats entries;
            memcpy(&entries, p->table + j * p->padded + k, sizeof entries);
            for (int m = 0; m < together; m++) away[m] -= entries * x[m * p->width + j];
        }
        const Lanes now = (Lanes){0} + (int32_t)(k / LANES);
        for (int m = 0; m < together; m++) {
            const Lanes nearer = away[m] < best[m];
            block[m] = (now & nearer) | (block[m] & ~nearer);
            best[m] = (Floats)(((Lanes)away[m] & nearer) | ((Lanes)best[m] & ~nearer));
        }
    }
    for (int m = 0; m < together; m++) {
        int64_t found = 0;
        float least_away = __builtin_inff();
        for (int i = 0; i < LANES; i++) {
            const int64_t k = (int64_t)block[m][i] * LANES + i;
            if (best[m][i] < least_away || (best[m][i] == least_away && k < found)) found = k, least_away = best[m][i];
        }
        p->index[first + m] = found;
    }
}

INLINE void search_all(const Nearest *p, int64_t begin, int64_t end) {
    for (; begin + AT_ONCE <= end; begin += AT_ONCE) search(p, begin, AT_ONCE);
    for (; begin < end; begin++) search(p, begin, 1);
}

static void portable(const Nearest *p, int64_t begin, int64_t end) { search_all(p, begin, end); }

#if X86
FOR_AVX2 static void avx2(const Nearest *p, int64_t begin, int64_t end) { search_all(p, begin, end); }
FOR_AVX512 static void avx512(const Nearest *p, int64_t begin, int64_t end) { search_all(p, begin, end); }
#endif

typedef struct {
    const Nearest *search;
    VectorsBody vectors;
} Task;

static void body(const void *task, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const Task *t = (const Task *)task;
    t->vectors(t->search, begin, end);
}

// index[i] = the first k that makes |vectors[i] - table[k]| least; vectors `[count, width]`, table `[entries, width]`
// fp32 without gaps. A vector that holds no number gets 0.
EXPORT int posttrain_nearest(const float *vectors, const float *table, int64_t count, int64_t entries, int64_t width,
                             int64_t *index, int level, int threads) {
    const int64_t padded = rounded_up(entries, LANES);
    if (entries < 1 || entries > INT32_MAX || width < 1) return NOT_OFFERED;
    float *turned = (float *)aligned((size_t)((width + 1) * padded) * 4), *half = turned + width * padded;
    if (!turned) return NO_MEMORY;
    for (int64_t k = 0; k < padded; k++) {
        float length = 0.0f;
        for (int64_t j = 0; j < width; j++) {
            const float value = k < entries ? table[k * width + j] : 0.0f;
            turned[j * padded + k] = value, length += value * value;
        }
        half[k] = k < entries ? 0.5f * length : __builtin_inff();
    }
    const Nearest p = {vectors, turned, half, width, padded, index};
    VectorsBody chosen = portable;
#if X86
    if (level >= AVX2) chosen = avx2;
    if (level >= AVX512) chosen = avx512;
#endif
    (void)level;
    const Task task = {&p, chosen};
    for_rows(body, &task, count, threads);
    free(turned);
    return DONE;
}
