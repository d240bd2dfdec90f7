// Products of bit planes: sum over i, j of 2^(i + j) * popcount(w_i & x_j), for any two numbers of bits.
//
// A row is cut into blocks of 512 columns; a block holds a plane after the other, lowest bit first, each 8 words of
// 64 bits: bit k % 64 of word k / 64 is that of column k. Columns beyond the last are zeros. Both sides are unsigned
// codes.

#include "planes.h"

// offset of a group of a row: what is multiplied by the sum of its inputs
INLINE float offset_of(const Codes *c, int64_t row, int64_t g, float scale) {
    if (c->kind == ZERO_NONE) return -scale * middle(c->bits);
    if (c->kind == ZERO_FLOAT) return float_of_half(((const uint16_t *)c->zero)[row * c->groups + g]);
    const uint8_t *zeros = (const uint8_t *)c->zero + row * c->zero_bytes;
    return -scale * (float)code_at(zeros, c->zero_bytes, c->bits, g);
}

// A group of a row and a row of inputs: words from `first` to `last`, counted over the blocks.
INLINE int64_t sum_of_words(const Planes *p, int64_t row, int64_t m, int64_t first, int64_t last) {
    int64_t sum = 0;
    for (int64_t at = first; at < last; at++) {
        const int64_t block = at / WORDS, word = at % WORDS;
        const uint64_t *w = p->weights + ((row * p->blocks + block) * p->bits) * WORDS + word;
        const uint64_t *x = p->inputs + ((m * p->blocks + block) * p->input_bits) * WORDS + word;
        for (int i = 0; i < p->bits; i++)
            for (int j = 0; j < p->input_bits; j++)
                sum += (int64_t)__builtin_popcountll(w[i * WORDS] & x[j * WORDS]) << (i + j);
    }
    return sum;
}

INLINE void any_rows(const Planes *p, int64_t begin, int64_t end) {
    const int64_t words = p->groups == 1 ? p->blocks * WORDS : p->group / 64;
    for (int64_t row = begin; row < end; row++)
        for (int64_t m = 0; m < p->count; m++) {
            double y = 0.0;
            for (int64_t g = 0; g < p->groups; g++) {
                const int64_t sum = sum_of_words(p, row, m, g * words, (g + 1) * words);
                if (p->sums) {
                    p->sums[m * p->rows + row] = sum;
                } else {
                    const float scale = scale_at(&p->codes, row, g);
                    const double inputs = p->input_sums[m * p->padded_groups + g];
                    y += (double)scale * (double)sum + (double)offset_of(&p->codes, row, g, scale) * inputs;
                }
            }
            if (!p->sums) p->out[m * p->rows + row] = (float)y * p->input_scale[m];
        }
}

static void rows_portable(const Planes *p, int64_t begin, int64_t end) { any_rows(p, begin, end); }

#if X86
FOR_AVX2 static void rows_avx2(const Planes *p, int64_t begin, int64_t end) { any_rows(p, begin, end); }

// Adds the products of a block, an accumulator for each i + j.
INLINE FOR_AVX512 void add_block(__m512i *sum, const uint64_t *w, const uint64_t *x, const int bits, const int others) {
    __m512i plane[8];
    for (int j = 0; j < 8; j++) plane[j] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int j = 0; j < others; j++) plane[j] = _mm512_loadu_si512(x + j * WORDS);
#pragma GCC unroll 8
    for (int i = 0; i < bits; i++) {
        const __m512i weight = _mm512_loadu_si512(w + i * WORDS);
#pragma GCC unroll 8
        for (int j = 0; j < others; j++)
            sum[i + j] = _mm512_add_epi64(sum[i + j], _mm512_popcnt_epi64(_mm512_and_si512(weight, plane[j])));
    }
}

INLINE FOR_AVX512 __m512i weighted(const __m512i *sum, const int bits, const int others) {
    __m512i all = sum[bits + others - 2];
#pragma GCC unroll 16
    for (int s = bits + others - 3; s >= 0; s--) all = _mm512_add_epi64(_mm512_add_epi64(all, all), sum[s]);
    return all;
}

// The scales of the 8 words of a block.
INLINE FOR_AVX512 __m512d word_scales(const Planes *p, int64_t row, int64_t block) {
    const int64_t from = p->first_group[block];
    const __m256 near = _mm512_castps512_ps256(scales_from(&p->codes, row, from));
    return wide(_mm256_permutexvar_ps(_mm256_loadu_si256((const __m256i *)(p->lane_group + block * WORDS)), near));
}

INLINE FOR_AVX512 void plane_rows(const Planes *p, int64_t begin, int64_t end, const int bits, const int others) {
    const int one_group = p->groups == 1 || p->group % COLUMNS == 0;  // a block has one
    const int64_t a_group = p->groups == 1 ? p->blocks : one_group ? p->group / COLUMNS : 1;
    for (int64_t row = begin; row < end; row++)
        for (int64_t m = 0; m < p->count; m++) {
            const uint64_t *w = p->weights + row * p->blocks * bits * WORDS;
            const uint64_t *x = p->inputs + m * p->blocks * others * WORDS;
            __m512d total = _mm512_setzero_pd();
            for (int64_t block = 0; block < p->blocks;) {
                const int64_t from = block, to = block + a_group;
                __m512i sum[15];
#pragma GCC unroll 16
                for (int s = 0; s < bits + others - 1; s++) sum[s] = _mm512_setzero_si512();
                for (; block < to; block++, w += bits * WORDS, x += others * WORDS) {
#pragma GCC unroll 8
                    for (int i = 0; i < bits; i++) _mm_prefetch((const char *)(w + i * WORDS) + AHEAD, _MM_HINT_T0);
                    add_block(sum, w, x, bits, others);
                }
                const __m512i all = weighted(sum, bits, others);
                if (p->sums) {
                    p->sums[m * p->rows + row] = _mm512_reduce_add_epi64(all);
                    continue;
                }
                const double scale = scale_at(&p->codes, row, from / a_group);
                const __m512d scales = one_group ? _mm512_set1_pd(scale) : word_scales(p, row, from);
                total = _mm512_fmadd_pd(scales, _mm512_cvtepi64_pd(all), total);
            }
            if (p->sums) continue;
            const double y = _mm512_reduce_add_pd(total) + sum_of_offsets(p, row, m);
            p->out[m * p->rows + row] = (float)y * p->input_scale[m];
        }
}

#define CASE(bits, others)                                                                                             \
    case bits * 16 + others: plane_rows(p, begin, end, bits, others); break;
#define CASES(bits)                                                                                                    \
    CASE(bits, 1) CASE(bits, 2) CASE(bits, 3) CASE(bits, 4) CASE(bits, 5) CASE(bits, 6) CASE(bits, 7) CASE(bits, 8)

FOR_AVX512 static void rows_avx512(const Planes *p, int64_t begin, int64_t end) {
    switch (p->bits * 16 + p->input_bits) {
        CASES(1)
        CASES(2)
        CASE(3, 1) CASE(3, 2) CASE(4, 1) CASE(4, 2)
        default: plane_rows(p, begin, end, p->bits, p->input_bits);  // too many planes to be worth code of their own
    }
}

// 64 codes, a byte each, as a word a plane
FOR_AVX512 static void planes_avx512(const uint8_t *codes, int64_t n, int bits, uint64_t *to) {
    const __m512i read = _mm512_maskz_loadu_epi8(first_bytes(n), codes);
    for (int i = 0; i < bits; i++) to[i * WORDS] = _mm512_test_epi8_mask(read, _mm512_set1_epi8((char)(1 << i)));
}
#endif

static void planes_portable(const uint8_t *codes, int64_t n, int bits, uint64_t *to) {
    for (int i = 0; i < bits; i++) {
        uint64_t word = 0;
        for (int64_t k = 0; k < n; k++) word |= (uint64_t)(codes[k] >> i & 1) << k;
        to[i * WORDS] = word;
    }
}

// `[rows, columns]` codes, a byte each -> `[rows, blocks, bits, 8]` words.
EXPORT int posttrain_planes(const uint8_t *codes, int64_t rows, int64_t columns, int bits, uint64_t *out, int level) {
    void (*pack)(const uint8_t *, int64_t, int, uint64_t *) = planes_portable;
#if X86
    if (level >= AVX512) pack = planes_avx512;
#endif
    (void)level;
    const int64_t words = (columns + COLUMNS - 1) / COLUMNS * WORDS;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t word = 0; word < words; word++) {
            uint64_t *to = out + ((row * words + word / WORDS * WORDS) * bits) + word % WORDS;
            const int64_t n = least(64, columns - word * 64);
            pack(codes + row * columns + word * 64, n > 0 ? n : 0, bits, to);
        }
    return DONE;
}

typedef struct {
    const Planes *product;
    PlaneRows rows;
} Task;

static void body(const void *task, int64_t begin, int64_t end, int thread) {
    (void)thread;
    ((const Task *)task)->rows(((const Task *)task)->product, begin, end);
}

// Planes of weights by planes of inputs. Without scales the sums themselves, `[count, rows]` int64; with scales
// input_scale[m] * sum over groups of scale * (sum of code * input - zero * sum of input), `[count, rows]` fp32,
// where groups are of multiples of 64 columns and input_sums is `[count, groups]`.
EXPORT int posttrain_plane_product(const uint64_t *weights, const uint16_t *scale, const void *zero, int64_t rows,
                                   int64_t columns, int64_t groups, int bits, int kind, const uint64_t *inputs,
                                   int input_bits, const float *input_sums, const float *input_scale, int64_t count,
                                   void *out, int level, int threads) {
    Planes p = {.weights = weights, .inputs = inputs, .rows = rows, .count = count, .groups = groups, .bits = bits};
    p.input_bits = input_bits, p.group = columns / groups, p.blocks = (columns + COLUMNS - 1) / COLUMNS;
    if (groups > 1 && p.group % 64) return NOT_OFFERED;
    PlaneRows kernel = rows_portable;
#if X86
    if (level >= AVX2) kernel = rows_avx2;
    if (level >= AVX512) kernel = rows_avx512;
    // counting takes bits * input_bits steps a block, and multiplying bytes about eight; it takes up to four planes
    uint8_t *bytes = NULL;
    if (level >= AVX512 && bits <= 4 && bits * input_bits > 8) {
        bytes = bytes_of_planes(&p);
        if (!bytes) return NO_MEMORY;
        p.input_bytes = bytes, kernel = plane_rows_by_bytes;
    }
#endif
    (void)level;
    if (scale) {
        p.codes = codes_of(NULL, scale, zero, NULL, rows, columns, groups, bits, kind);
        p.input_scale = input_scale, p.out = (float *)out, p.padded_groups = rounded_up(groups, 16);
        set_sixteen(p.sixteen_bytes, p.sixteen_shift, bits);
    } else {
        p.sums = (int64_t *)out;
    }
    float *padded = (float *)aligned((size_t)(count * p.padded_groups) * 4);
    int32_t *lane_group = (int32_t *)aligned((size_t)(p.blocks * (1 + WORDS)) * 4);
    int32_t *first_group = lane_group + p.blocks * WORDS;
    if (!padded || !lane_group) {
        free(padded), free(lane_group), free((void *)p.input_bytes);
        return NO_MEMORY;
    }
    for (int64_t m = 0; m < count && scale; m++) {
        memset(padded + m * p.padded_groups, 0, (size_t)p.padded_groups * 4);
        memcpy(padded + m * p.padded_groups, input_sums + m * groups, (size_t)groups * 4);
    }
    for (int64_t word = 0; word < p.blocks * WORDS; word++) {
        const int64_t block = word / WORDS, group = least(word * 64 / p.group, groups - 1);
        if (word % WORDS == 0) first_group[block] = (int32_t)group;
        lane_group[word] = (int32_t)group - first_group[block];
    }
    p.input_sums = padded, p.first_group = first_group, p.lane_group = lane_group;
    const Task task = {&p, kernel};
    for_rows(body, &task, rows, threads);
    free(padded), free(lane_group), free((void *)p.input_bytes);
    return DONE;
}
