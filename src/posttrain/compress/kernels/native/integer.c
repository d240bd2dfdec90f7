// Integer products: codes of b bits, or signed bytes, by activations of signed bytes, summed up exactly in 32 bits.

#include "avx512.h"

enum { BYTES = 64 };  // columns of a block: a byte each

typedef struct {
    Codes codes;
    int turned;  // the weights are signed bytes: their highest bit is turned over to make codes of them
    const int8_t *inputs;  // [count, width], zeros beyond the columns
    const int32_t *start;  // [count, groups] what a group's sum begins at: it takes the codes' middle away
    const float *sums;  // [count, padded_groups] sums of the inputs of a group
    const float *input_scale;  // [count]
    int64_t count, width, padded_groups;
    void *out;  // [count, rows] int32, or fp32 where there are scales
    uint8_t spread[64], control[64];
    uint8_t *room;  // of each thread: an unpacked row
    Unpack unpack;
} Integers;

typedef void (*IntegerRows)(const Integers *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room);

// offset of a group of a row, see uniform.h; the bias is the middle, taken away
INLINE float offset_of(const Codes *c, int64_t row, int64_t g, float scale) {
    if (c->kind == ZERO_NONE) return 0.0f;
    if (c->kind == ZERO_FLOAT)
        return float_of_half(((const uint16_t *)c->zero)[row * c->groups + g]) + scale * middle(c->bits);
    const uint8_t *zeros = (const uint8_t *)c->zero + row * c->zero_bytes;
    return scale * (middle(c->bits) - (float)code_at(zeros, c->zero_bytes, c->bits, g));
}

// sum of code * input, of codes that are signed bytes or not
typedef int32_t (*Dot)(const uint8_t *codes, const int8_t *inputs, int64_t n, int with_sign);

static int32_t dot_portable(const uint8_t *codes, const int8_t *inputs, int64_t n, int with_sign) {
    int32_t sum = 0;
    for (int64_t k = 0; k < n; k++) sum += (with_sign ? (int32_t)(int8_t)codes[k] : (int32_t)codes[k]) * inputs[k];
    return sum;
}

static void any_rows(const Integers *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room, Dot dot) {
    const Codes *c = &p->codes;
    const int64_t group = c->columns / c->groups;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *code = c->codes + row * c->code_bytes;
        if (c->bits < 8) {
            p->unpack(code, c->code_bytes, c->bits, c->columns, room);
            code = room;
        }
        for (int64_t m = first; m < first + tile; m++) {
            const int8_t *x = p->inputs + m * p->width;
            float y = 0.0f;
            for (int64_t g = 0; g < c->groups; g++) {
                const int32_t start = p->turned ? 0 : p->start[m * c->groups + g];
                const int32_t sum = start + dot(code + g * group, x + g * group, group, p->turned);
                if (c->scale) {
                    const float scale = scale_at(c, row, g);
                    y += scale * (float)sum + offset_of(c, row, g, scale) * p->sums[m * p->padded_groups + g];
                } else {
                    ((int32_t *)p->out)[m * c->rows + row] = sum;
                }
            }
            if (c->scale) ((float *)p->out)[m * c->rows + row] = y * p->input_scale[m];
        }
    }
}

static void rows_portable(const Integers *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room) {
    any_rows(p, begin, end, first, tile, room, dot_portable);
}

#if X86
FOR_AVX2 static int32_t dot_avx2(const uint8_t *codes, const int8_t *inputs, int64_t n, int with_sign) {
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t k = 0;
    for (; k + 32 <= n; k += 32)
        for (int i = 0; i < 2; i++) {
            const __m128i read = _mm_loadu_si128((const __m128i *)(codes + k + 16 * i));
            const __m256i code = with_sign ? _mm256_cvtepi8_epi16(read) : _mm256_cvtepu8_epi16(read);
            const __m256i with = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(inputs + k + 16 * i)));
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(code, with));
        }
    const __m256i both = _mm256_add_epi32(sum[0], sum[1]);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four) + dot_portable(codes + k, inputs + k, n - k, with_sign);
}

static void rows_avx2(const Integers *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room) {
    any_rows(p, begin, end, first, tile, room, dot_avx2);
}

// 64 codes from one address on, a byte each, in order.
INLINE FOR_AVX512 __m512i sixty_four(const uint8_t *from, __mmask64 there, int bits, __m512i spread, __m512i control) {
    const __m512i read = _mm512_maskz_loadu_epi8(there, from);
    if (bits == 8) return read;
    const __m512i moved = _mm512_multishift_epi64_epi8(control, _mm512_permutexvar_epi8(spread, read));
    return _mm512_and_si512(moved, _mm512_set1_epi8((char)((1 << bits) - 1)));
}

// The sums themselves, of a whole row.
INLINE FOR_AVX512 void vnni_rows(const Integers *p, int64_t begin, int64_t end, int64_t first, const int bits,
                                 const int tile) {
    enum { SUMS = 4 };
    const Codes *c = &p->codes;
    const int64_t bytes = BYTES * bits / 8;
    const __m512i spread = _mm512_loadu_si512(p->spread), control = _mm512_loadu_si512(p->control);
    const __m512i turn = _mm512_set1_epi8((char)(p->turned ? 0x80 : 0));
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *at = c->codes + row * c->code_bytes;
        int64_t left = c->code_bytes;
        __m512i sum[TILE][SUMS];
        for (int m = 0; m < tile; m++)
            for (int s = 0; s < SUMS; s++) sum[m][s] = _mm512_setzero_si512();
        const int8_t *x = p->inputs + first * p->width;
        for (; left > 0; left -= SUMS * bytes, at += SUMS * bytes, x += SUMS * BYTES) {
#pragma GCC unroll 4
            for (int s = 0; s < SUMS; s++) {
                if (bits == 8 || s % 2 == 0) _mm_prefetch((const char *)at + AHEAD + s * bytes, _MM_HINT_T0);
                const int64_t there = least(bytes, left - s * bytes);
                if (there <= 0) break;
                __m512i code = sixty_four(at + s * bytes, first_bytes(there), bits, spread, control);
                if (bits == 8) code = _mm512_xor_si512(code, turn);
#pragma GCC unroll 4
                for (int m = 0; m < tile; m++) {
                    const __m512i with = _mm512_load_si512(x + m * p->width + s * BYTES);
                    sum[m][s] = _mm512_dpbusd_epi32(sum[m][s], code, with);
                }
            }
        }
        for (int m = 0; m < tile; m++) {
            const __m512i low = _mm512_add_epi32(sum[m][0], sum[m][1]), high = _mm512_add_epi32(sum[m][2], sum[m][3]);
            const int32_t all = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
            ((int32_t *)p->out)[(first + m) * c->rows + row] = p->start[first + m] + all;
        }
    }
}

FOR_AVX512 static void rows_vnni(const Integers *p, int64_t begin, int64_t end, int64_t first, int tile,
                                 uint8_t *room) {
    const int bits = p->codes.bits;
    (void)room;
    for (int m = 0; m < tile; m += tile == TILE ? TILE : 1) {
        if (tile == TILE && bits == 8)
            vnni_rows(p, begin, end, first, 8, TILE);
        else if (tile == TILE)
            vnni_rows(p, begin, end, first, bits, TILE);
        else if (bits == 8)
            vnni_rows(p, begin, end, first + m, 8, 1);
        else
            vnni_rows(p, begin, end, first + m, bits, 1);
    }
}
#endif

typedef struct {
    const Integers *product;
    IntegerRows rows;
} Task;

static void body(const void *task, int64_t begin, int64_t end, int thread) {
    const Task *t = (const Task *)task;
    for (int64_t row = begin; row < end; row += PANEL)
        for (int64_t m = 0; m < t->product->count; m += TILE)
            t->rows(t->product, row, least(row + PANEL, end), m, (int)least(TILE, t->product->count - m),
                    t->product->room + t->product->width * thread);
}

// Codes by int8 inputs, `[count, columns]` without gaps. Without scales the sums themselves, `[count, rows]` int32
// (of signed bytes as weights where `turned`, 8 bits and one group); with scales input_scale[m] * sum over groups of
// scale * (sum of code * input - zero * sum of input), fp32.
EXPORT int posttrain_integer_product(const uint8_t *codes, const uint16_t *scale, const void *zero, int64_t rows,
                                     int64_t columns, int64_t groups, int bits, int kind, int turned,
                                     const int8_t *inputs, const float *input_scale, int64_t count, void *out,
                                     int level, int threads) {
    const int64_t group = columns / groups;
    Integers p = {.codes = codes_of(codes, scale, zero, NULL, rows, columns, groups, bits, kind)};
    p.turned = turned, p.input_scale = input_scale, p.count = count, p.out = out;
    p.width = rounded_up(columns, 256);
    p.unpack = unpacker(level);
    IntegerRows kernel = rows_portable;
#if X86
    if (level >= AVX512 && scale) {
        const int done = bytes_product(&p.codes, inputs, input_scale, count, (float *)out, threads);
        if (done != NOT_OFFERED) return done;
    }
    if (level >= AVX2) kernel = rows_avx2;
    if (level >= AVX512 && !scale) kernel = rows_vnni;
#endif
    memset(p.spread, 63, 64);
    for (int i = 0; i < 64; i++) {
        if (i % 8 < bits && bits < 8) p.spread[i] = (uint8_t)(i / 8 * bits + i % 8);
        p.control[i] = (uint8_t)(i % 8 * bits);
    }
    p.padded_groups = rounded_up(groups, 16);
    int8_t *x = (int8_t *)aligned((size_t)(count * p.width));
    int32_t *start = (int32_t *)aligned((size_t)(count * groups) * 4);
    float *sums = (float *)aligned((size_t)(count * p.padded_groups) * 4);
    p.room = (uint8_t *)aligned((size_t)(p.width * threads));
    if (!x || !start || !sums || !p.room) {
        free(x), free(start), free(sums), free(p.room);
        return NO_MEMORY;
    }
    const int32_t away = turned ? 128 : scale ? 1 << (bits - 1) : 0;
    memset(sums, 0, (size_t)(count * p.padded_groups) * 4);
    for (int64_t m = 0; m < count; m++) {
        memcpy(x + m * p.width, inputs + m * columns, (size_t)columns);
        memset(x + m * p.width + columns, 0, (size_t)(p.width - columns));
        for (int64_t g = 0; g < groups; g++) {
            int32_t sum = 0;
            for (int64_t k = g * group; k < (g + 1) * group; k++) sum += inputs[m * columns + k];
            start[m * groups + g] = -away * sum;
            sums[m * p.padded_groups + g] = (float)sum;
        }
    }
    p.inputs = x, p.start = start, p.sums = sums;
    const Task task = {&p, kernel};
    for_rows(body, &task, rows, threads);
    free(x), free(start), free(sums), free(p.room);
    return DONE;
}
