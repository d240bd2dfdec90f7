// Products of vector codes: vectors of weights that lie below one another in a column, looked up in tables.
//
// w[row * length + i, column] = table[index & mask][i] + second[index >> first][i], with the index of (row, column)
// of up to 24 bits: the low bytes of a row's indices, then the next, the last ones in as many bits as are left.

#include "avx512.h"

enum { LONGEST = 16, WIDEST = 24 };

typedef struct {
    const uint8_t *codes;  // [vectors, code_bytes]
    const uint16_t *table, *second;  // [2^first, length], [2^rest, length] fp16; nothing as second where rest is 0
    int64_t vectors, rows, columns, code_bytes, count;
    int length, first_bits, rest_bits;
    int stride;  // of a vector in its table: its length, or what a register holds, of copies with room behind them
    const float *floats[2];  // the tables in fp32, for plain C
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

// In plain C the tables are fp32, 8 or 16 numbers a vector, the last of them zeros.
INLINE void float_rows(const Vectors *p, int64_t begin, int64_t end, int64_t first, const int tile, const int halves,
                       char *room) {
    int32_t *index = (int32_t *)room;
    const int32_t mask = (1 << p->first_bits) - 1;
    for (int64_t row = begin; row < end; row++) {
        indices(p, row, index, (uint8_t *)(index + p->columns));
        Floats sum[TILE][2];
        for (int m = 0; m < tile; m++) sum[m][0] = sum[m][1] = (Floats){0};
        for (int64_t k = 0; k < p->columns; k++)
            for (int h = 0; h < halves; h++) {
                Floats w, more;
                memcpy(&w, p->floats[0] + ((int64_t)(index[k] & mask) * halves + h) * 8, 32);
                if (p->second) {
                    memcpy(&more, p->floats[1] + ((int64_t)(index[k] >> p->first_bits) * halves + h) * 8, 32);
                    w += more;
                }
                for (int m = 0; m < tile; m++) sum[m][h] += w * p->inputs[(first + m) * p->columns + k];
            }
        for (int m = 0; m < tile; m++) {
            float y[LONGEST];
            memcpy(y, sum[m], sizeof y);
            add_vector(p, row, first + m, y);
        }
    }
}

INLINE void any_rows(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room) {
    for (int m = 0; m < tile; m++)
        if (p->length > 8)
            float_rows(p, begin, end, first + m, 1, 2, room);
        else
            float_rows(p, begin, end, first + m, 1, 1, room);
}

static float *as_padded_floats(const uint16_t *table, int64_t entries, int length) {
    const int64_t stride = length > 8 ? 16 : 8;
    float *made = (float *)aligned((size_t)(entries * stride) * 4);
    for (int64_t i = 0; made && i < entries; i++)
        for (int64_t j = 0; j < stride; j++)
            made[i * stride + j] = j < length ? float_of_half(table[i * length + j]) : 0.0f;
    return made;
}

static void rows_portable(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room) {
    any_rows(p, begin, end, first, tile, room);
}

#if X86
FOR_AVX2 static void rows_avx2(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room) {
    any_rows(p, begin, end, first, tile, room);
}

// Vectors of up to 8 weights in half a register, of up to 16 in a whole one. Tables have room behind the last vector.
INLINE FOR_AVX512 __m256 eight(const uint16_t *table, int64_t index, int stride) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(table + index * stride)));
}

INLINE FOR_AVX512 __m512 all(const uint16_t *table, int64_t index, int stride) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(table + index * stride)));
}

#define ROWS(name, Vector, look, set, fma, add, zero, put)                                                             \
    INLINE FOR_AVX512 void name(const Vectors *p, int64_t begin, int64_t end, int64_t first, const int tile,           \
                                const int both, char *room) {                                                          \
        int32_t *index = (int32_t *)room;                                                                              \
        const uint32_t mask = (1u << p->first_bits) - 1;                                                               \
        const int bits = p->first_bits, stride = p->stride;                                                            \
        const int64_t columns = p->columns;                                                                            \
        const uint16_t *table = p->table, *second = p->second;                                                         \
        for (int64_t row = begin; row < end; row++) {                                                                  \
            const float *x = p->inputs + first * columns;                                                              \
            indices(p, row, index, (uint8_t *)(index + columns));                                                      \
            Vector sum[TILE][4];                                                                                       \
            for (int m = 0; m < tile; m++)                                                                             \
                for (int s = 0; s < 4; s++) sum[m][s] = zero();                                                        \
            int64_t k = 0;                                                                                             \
            for (; k + 4 <= columns; k += 4, x += 4) {                                                                 \
                _Pragma("GCC unroll 4") for (int s = 0; s < 4; s++) {                                                  \
                    const uint32_t i = (uint32_t)index[k + s];                                                         \
                    Vector w = look(table, both ? i & mask : i, stride);                                               \
                    if (both) w = add(w, look(second, i >> bits, stride));                                             \
                    _Pragma("GCC unroll 4") for (int m = 0; m < tile; m++)                                             \
                        sum[m][s] = fma(w, set(x[m * columns + s]), sum[m][s]);                                        \
                }                                                                                                      \
            }                                                                                                          \
            for (; k < columns; k++, x++) {                                                                            \
                const uint32_t i = (uint32_t)index[k];                                                                 \
                Vector w = look(table, both ? i & mask : i, stride);                                                   \
                if (both) w = add(w, look(second, i >> bits, stride));                                                 \
                for (int m = 0; m < tile; m++) sum[m][0] = fma(w, set(x[m * columns]), sum[m][0]);                     \
            }                                                                                                          \
            for (int m = 0; m < tile; m++) {                                                                           \
                float y[LONGEST];                                                                                      \
                put(y, add(add(sum[m][0], sum[m][1]), add(sum[m][2], sum[m][3])));                                     \
                add_vector(p, row, first + m, y);                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

ROWS(short_rows, __m256, eight, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps, _mm256_setzero_ps, _mm256_storeu_ps)
ROWS(long_rows, __m512, all, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps, _mm512_setzero_ps, _mm512_storeu_ps)

#define CASE(rows, both)                                                                                               \
    for (int m = 0; m < tile; m += tile == TILE ? TILE : 1)                                                            \
        if (tile == TILE)                                                                                              \
            rows(p, begin, end, first, TILE, both, room);                                                              \
        else                                                                                                           \
            rows(p, begin, end, first + m, 1, both, room);                                                             \
    break;

FOR_AVX512 static void rows_avx512(const Vectors *p, int64_t begin, int64_t end, int64_t first, int tile, char *room) {
    switch ((p->length > 8) * 2 + (p->second != NULL)) {
        case 0: CASE(short_rows, 0)
        case 1: CASE(short_rows, 1)
        case 2: CASE(long_rows, 0)
        case 3: CASE(long_rows, 1)
    }
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

// A copy of a table of which a whole register may be read at the last vector.
static uint16_t *with_room(const uint16_t *table, int64_t entries, int length) {
    uint16_t *copy = (uint16_t *)aligned((size_t)(entries * length + LONGEST) * 2);
    if (!copy) return NULL;
    memcpy(copy, table, (size_t)(entries * length) * 2);
    memset(copy + entries * length, 0, LONGEST * 2);
    return copy;
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
    p.stride = length;
    VectorRows kernel = rows_portable;
    const int64_t entries[2] = {(int64_t)1 << first_bits, rest_bits ? (int64_t)1 << rest_bits : 0};
    void *copies[2] = {NULL, NULL};
    int failed = DONE;
#if X86
    if (level >= AVX2) kernel = rows_avx2;
    if (level >= AVX512) {
        kernel = rows_avx512;
        if (length != 8 && length != 16) {
            copies[0] = with_room(table, entries[0], length), p.table = (const uint16_t *)copies[0];
            if (rest_bits) copies[1] = with_room(second, entries[1], length), p.second = (const uint16_t *)copies[1];
            failed = copies[0] && (!rest_bits || copies[1]) ? DONE : NO_MEMORY;
        }
    }
#endif
    if (level < AVX512) {
        for (int i = 0; i < (rest_bits ? 2 : 1); i++) {
            copies[i] = as_padded_floats(i ? second : table, entries[i], length);
            p.floats[i] = (const float *)copies[i];
            if (!copies[i]) failed = NO_MEMORY;
        }
    }
    const Task task = {&p, kernel};
    if (!failed) for_rows(body, &task, p.vectors, threads);
    free(p.room), free(copies[0]), free(copies[1]);
    return failed;
}
