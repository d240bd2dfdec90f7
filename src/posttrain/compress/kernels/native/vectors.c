// Products of vector codes: vectors of weights that lie below one another in a column, looked up in tables.
//
// w[row * length + i, column] = table[index & mask][i] + second[index >> first][i], with the index of (row, column) of up
// to 24 bits: the low bytes of a row's indices, then the next, the last ones in as many bits as are left.

#include "avx512.h"

enum { LONGEST = 16, WIDEST = 24 };

typedef struct {
    const uint8_t *codes;  // [vectors, code_bytes]
    const uint16_t *table, *second;  // [2^first, length], [2^rest, length] fp16; nothing as second where rest is 0
    int64_t vectors, rows, columns, code_bytes, count;
    int length, first_bits, rest_bits;
    const float *inputs;  // [count, columns]
    float *out;  // [count, rows], added to
    char *room;  // of each thread: a row of indices, and bytes of unpacked codes
    int64_t room_bytes;
    Unpack unpack;
} Vectors;

typedef void (*VectorRows)(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room);

INLINE void indices(const Vectors *p, int64_t row, int32_t *index, uint8_t *bytes) {
    const uint8_t *from = p->codes + row * p->code_bytes;
    for (int low = 0; low < p->first_bits + p->rest_bits; low += 8) {
        const int bits = (int)least(8, p->first_bits + p->rest_bits - low);
        const int64_t width = (p->columns * bits + 7) / 8;
        const uint8_t *part = from;
        if (bits < 8) p->unpack(from, width, bits, p->columns, bytes), part = bytes;
        if (low == 0)
            for (int64_t k = 0; k < p->columns; k++) index[k] = part[k];
        else
            for (int64_t k = 0; k < p->columns; k++) index[k] |= (int32_t)part[k] << low;
        from += width;
    }
}

INLINE void add_vector(const Vectors *p, int64_t row, int64_t m, const float *y) {
    const int64_t n = least(p->length, p->rows - row * p->length);
    for (int64_t i = 0; i < n; i++) p->out[m * p->rows + row * p->length + i] += y[i];
}

INLINE void any_rows(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room) {
    int32_t *index = (int32_t *)room;
    const int32_t mask = (1 << p->first_bits) - 1;
    for (int64_t row = begin; row < end; row++) {
        indices(p, row, index, (uint8_t *)(index + p->columns));
        float y[TILE][LONGEST] = {{0}};
        for (int64_t k = 0; k < p->columns; k++) {
            const uint16_t *one = p->table + (int64_t)(index[k] & mask) * p->length;
            float w[LONGEST];
            for (int i = 0; i < p->length; i++) w[i] = float_of_half(one[i]);
            if (p->second) {
                const uint16_t *two = p->second + (int64_t)(index[k] >> p->first_bits) * p->length;
                for (int i = 0; i < p->length; i++) w[i] += float_of_half(two[i]);
            }
            for (int m = 0; m < tile; m++) {
                const float x = p->inputs[(first + m) * p->columns + k];
                for (int i = 0; i < p->length; i++) y[m][i] += w[i] * x;
            }
        }
        for (int m = 0; m < tile; m++) add_vector(p, row, first + m, y[m]);
    }
}

static void rows_portable(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room) {
    any_rows(p, begin, end, first, tile, room);
}

#if X86
FOR_AVX2 static void rows_avx2(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room) {
    any_rows(p, begin, end, first, tile, room);
}

// Vectors of up to 8 weights in half a register.
INLINE FOR_AVX512 __m256 eight(const uint16_t *table, int64_t index, int length, __mmask8 there) {
    return _mm256_cvtph_ps(_mm_maskz_loadu_epi16(there, table + index * length));
}

INLINE FOR_AVX512 void short_rows(const Vectors *p, int64_t begin, int64_t end, int64_t first, const int tile,
                                  const int both, char *room) {
    enum { SUMS = 4 };
    int32_t *index = (int32_t *)room;
    const int32_t mask = (1 << p->first_bits) - 1;
    const __mmask8 there = (__mmask8)((1u << p->length) - 1);
    const float *inputs = p->inputs + first * p->columns;
    for (int64_t row = begin; row < end; row++) {
        indices(p, row, index, (uint8_t *)(index + p->columns));
        __m256 sum[TILE][SUMS];
        for (int m = 0; m < tile; m++)
            for (int s = 0; s < SUMS; s++) sum[m][s] = _mm256_setzero_ps();
        for (int64_t k = 0; k < p->columns; k += SUMS) {
#pragma GCC unroll 4
            for (int s = 0; s < SUMS; s++) {
                if (k + s >= p->columns) break;
                __m256 w = eight(p->table, index[k + s] & mask, p->length, there);
                if (both) w = _mm256_add_ps(w, eight(p->second, index[k + s] >> p->first_bits, p->length, there));
#pragma GCC unroll 4
                for (int m = 0; m < tile; m++)
                    sum[m][s] = _mm256_fmadd_ps(w, _mm256_set1_ps(inputs[m * p->columns + k + s]), sum[m][s]);
            }
        }
        for (int m = 0; m < tile; m++) {
            float y[LONGEST];
            const __m256 low = _mm256_add_ps(sum[m][0], sum[m][1]), high = _mm256_add_ps(sum[m][2], sum[m][3]);
            _mm256_storeu_ps(y, _mm256_add_ps(low, high));
            add_vector(p, row, first + m, y);
        }
    }
}

INLINE FOR_AVX512 void long_rows(const Vectors *p, int64_t begin, int64_t end, int64_t first, const int tile,
                                 const int both, char *room) {
    enum { SUMS = 4 };
    int32_t *index = (int32_t *)room;
    const int32_t mask = (1 << p->first_bits) - 1;
    const __mmask16 there = first_of(p->length);
    const float *inputs = p->inputs + first * p->columns;
    for (int64_t row = begin; row < end; row++) {
        indices(p, row, index, (uint8_t *)(index + p->columns));
        __m512 sum[TILE][SUMS];
        for (int m = 0; m < tile; m++)
            for (int s = 0; s < SUMS; s++) sum[m][s] = _mm512_setzero_ps();
        for (int64_t k = 0; k < p->columns; k += SUMS) {
#pragma GCC unroll 4
            for (int s = 0; s < SUMS; s++) {
                if (k + s >= p->columns) break;
                __m512 w = halves(p->table + (int64_t)(index[k + s] & mask) * p->length, there);
                if (both)
                    w = _mm512_add_ps(w, halves(p->second + (int64_t)(index[k + s] >> p->first_bits) * p->length, there));
#pragma GCC unroll 4
                for (int m = 0; m < tile; m++)
                    sum[m][s] = _mm512_fmadd_ps(w, _mm512_set1_ps(inputs[m * p->columns + k + s]), sum[m][s]);
            }
        }
        for (int m = 0; m < tile; m++) {
            float y[LONGEST];
            const __m512 low = _mm512_add_ps(sum[m][0], sum[m][1]), high = _mm512_add_ps(sum[m][2], sum[m][3]);
            _mm512_storeu_ps(y, _mm512_add_ps(low, high));
            add_vector(p, row, first + m, y);
        }
    }
}

#define CASE(tile)                                                                                                     \
    case tile * 4: short_rows(p, begin, end, first, tile, 0, room); break;                                             \
    case tile * 4 + 1: short_rows(p, begin, end, first, tile, 1, room); break;                                         \
    case tile * 4 + 2: long_rows(p, begin, end, first, tile, 0, room); break;                                          \
    case tile * 4 + 3: long_rows(p, begin, end, first, tile, 1, room); break;

FOR_AVX512 static void rows_avx512(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room) {
    switch (tile * 4 + (p->length > 8) * 2 + (p->second != NULL)) { CASE(1) CASE(2) CASE(3) CASE(4) }
}
#endif

typedef struct {
    const Vectors *product;
    VectorRows rows;
} Task;

static void body(const void *task, int64_t begin, int64_t end, int thread) {
    const Task *t = (const Task *)task;
    for (int64_t m = 0; m < t->product->count; m += TILE)
        t->rows(t->product, begin, end, m, (int)least(TILE, t->product->count - m),
                t->product->room + t->product->room_bytes * thread);
}

// out[m, row * length + i] += sum over columns of input[m, column] * weight; inputs `[count, columns]`, out
// `[count, rows]` fp32 without gaps.
EXPORT int posttrain_vector_product(const uint8_t *codes, const uint16_t *table, const uint16_t *second, int64_t rows,
                                    int64_t columns, int length, int first_bits, int rest_bits, const float *inputs,
                                    int64_t count, float *out, int level, int threads) {
    if (length < 1 || length > LONGEST || first_bits + rest_bits > WIDEST) return NOT_OFFERED;
    Vectors p = {.codes = codes, .table = table, .second = rest_bits ? second : NULL, .rows = rows, .columns = columns};
    p.vectors = (rows + length - 1) / length, p.length = length, p.first_bits = first_bits, p.rest_bits = rest_bits;
    p.inputs = inputs, p.count = count, p.out = out, p.unpack = unpacker(level);
    for (int low = 0; low < first_bits + rest_bits; low += 8)
        p.code_bytes += (columns * least(8, first_bits + rest_bits - low) + 7) / 8;
    p.room_bytes = rounded_up(columns * 5 + 8, 64);
    p.room = (char *)aligned((size_t)(p.room_bytes * threads));
    if (!p.room) return NO_MEMORY;
    VectorRows kernel = rows_portable;
#if X86
    if (level >= AVX2) kernel = rows_avx2;
    if (level >= AVX512) kernel = rows_avx512;
#endif
    const Task task = {&p, kernel};
    for_rows(body, &task, p.vectors, threads);
    free(p.room);
    return DONE;
}
