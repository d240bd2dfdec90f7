// Products of uniform codes in integers: sizes, inputs as digits, and the calls. See digits_avx512.c.

#include "digits.h"

#if X86

static void body(const void *task, int64_t begin, int64_t end, int thread) {
    const Digits *p = (const Digits *)task;
    uint8_t *room = p->room + thread * PAIR * p->room_bytes;
    for (int64_t row = begin; row < end; row += PANEL)
        for (int64_t m = 0, tile; m < p->count; m += tile) {
            tile = p->count - m >= 2 ? 2 : 1;  // more digits of inputs would not stay in the first cache
            digit_rows(p, row, least(row + PANEL, end), m, (int)tile, room);
        }
}

// Sizes of blocks and spans; NOT_OFFERED where groups lie across blocks.
static int shape(Digits *p) {
    const Codes *c = &p->codes;
    const int whole = 8 % c->bits == 0;
    const int64_t group = c->columns / c->groups;
    p->block = whole ? 64 * 8 / c->bits : 64, p->block_bytes = p->block * c->bits / 8;
    p->blocks = (c->columns + p->block - 1) / p->block;
    p->stride = p->blocks * p->block * p->digits;
    p->padded_groups = rounded_up(c->groups, 16) + 16;
    p->groups_a_block = 1, p->spans_a_group = 1, p->blocks_a_span = 1;
    if (c->groups > 1 && group % p->block) {
        if (p->block % group || group % (p->block / 16)) return NOT_OFFERED;
        p->groups_a_block = p->block / group, p->spans = p->blocks;
    } else {
        const int64_t blocks = c->groups > 1 ? group / p->block : p->blocks;  // of a group
        p->blocks_a_span = blocks;
        if (blocks * p->block > 2 * LONGEST_SPAN)
            for (p->blocks_a_span = LONGEST_SPAN / p->block; blocks % p->blocks_a_span;) p->blocks_a_span--;
        p->spans_a_group = blocks / p->blocks_a_span;
        p->spans = c->groups * p->spans_a_group;
    }
    p->room_bytes = rounded_up(p->blocks * p->block_bytes + 64, 64);
    p->padded_spans = rounded_up(p->spans, 16);
    memset(p->spread, 63, 64);
    for (int i = 0; i < 64; i++) {
        if (i % 8 < c->bits && c->bits < 8) p->spread[i] = (uint8_t)(i / 8 * c->bits + i % 8);
        p->control[i] = (uint8_t)(i % 8 * c->bits);
    }
    set_sixteen(p->sixteen_bytes, p->sixteen_shift, c->bits);
    return DONE;
}

// A block of integers, `[block]` in the order of the columns, as digits in the order of the codes; sums: `[digits,
// 16]` of the four digits of each lane, added to.
FOR_AVX512 static void write_digits(const Digits *p, const int32_t *integers, int8_t *to, __m512i *sums) {
    const int64_t parts = p->block / 64;
    const __m512i step = _mm512_mullo_epi32(_mm512_set1_epi32((int)parts),
                                            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i half = _mm512_set1_epi32(128), ones = _mm512_set1_epi8(1);
    for (int64_t j = 0; j < parts; j++, to += p->digits * 64) {
        for (int i = 0; i < 64; i += 16) {
            __m512i left = _mm512_i32gather_epi32(step, integers + i * parts + j, 4);
            for (int d = 0; d < p->digits; d++) {  // the lowest byte is a digit, with sign; the rest goes on without
                _mm_storeu_si128((__m128i *)(to + d * 64 + i), _mm512_cvtepi32_epi8(left));
                left = _mm512_srai_epi32(_mm512_add_epi32(left, half), 8);
            }
        }
        for (int d = 0; d < p->digits; d++)
            sums[d] = _mm512_dpbusd_epi32(sums[d], ones, _mm512_loadu_si512(to + d * 64));
    }
}

typedef struct {
    int8_t *inputs;
    uint8_t *codes;
    int32_t *start, *integers;  // integers: [blocks * block] of one row of inputs
    float *input_scale, *sums, *floats;
} Room;

static int make_room(const Digits *p, Room *r, int threads) {
    const int64_t width = p->blocks * p->block;
    r->inputs = (int8_t *)aligned((size_t)(p->count * p->stride));
    r->start = (int32_t *)aligned((size_t)(p->count * p->spans * p->digits * 64));
    r->integers = (int32_t *)aligned((size_t)width * 4), r->floats = (float *)aligned((size_t)width * 4);
    const int64_t scales = p->padded_spans > p->padded_groups ? p->padded_spans : p->padded_groups;
    r->input_scale = (float *)aligned((size_t)(p->count * scales) * 4);
    r->sums = (float *)aligned((size_t)(p->count * p->padded_groups) * 4);
    r->codes = (uint8_t *)aligned((size_t)(p->room_bytes * PAIR * threads));
    if (!r->codes || !r->inputs || !r->start || !r->integers || !r->floats || !r->input_scale || !r->sums)
        return NO_MEMORY;
    memset(r->codes, 0, (size_t)(p->room_bytes * PAIR * threads));
    memset(r->integers, 0, (size_t)width * 4);
    memset(r->input_scale, 0, (size_t)(p->count * scales) * 4);
    memset(r->sums, 0, (size_t)(p->count * p->padded_groups) * 4);
    return DONE;
}

static void give_back(Room *r) {
    free(r->codes), free(r->inputs), free(r->start), free(r->integers), free(r->floats);
    free(r->input_scale), free(r->sums);
}

// A row of inputs, integers by now, as digits; what their sums begin at.
FOR_AVX512 static void write_row(const Digits *p, Room *r, int64_t m) {
    const int64_t a_block = p->block * p->digits;
    const __m512i middle_code = _mm512_set1_epi32(-(1 << (p->codes.bits - 1)));
    for (int64_t span = 0, block = 0; span < p->spans; span++) {
        __m512i sums[DIGITS] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int64_t i = 0; i < p->blocks_a_span; i++, block++)
            write_digits(p, r->integers + block * p->block, r->inputs + m * p->stride + block * a_block, sums);
        for (int d = 0; d < p->digits; d++)
            _mm512_store_si512(r->start + ((m * p->spans + span) * p->digits + d) * 16,
                               _mm512_mullo_epi32(sums[d], middle_code));
    }
}

FOR_AVX512 static int64_t to_integers(const float *x, float power, int32_t *to, int64_t n) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < n; k += 16) {
        const __mmask16 there = first_of(n - k);
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, x + k), _mm512_set1_ps(power));
        const __m512i rounded = _mm512_cvtps_epi32(scaled);
        _mm512_mask_storeu_epi32(to + k, there, rounded);
        sum = _mm512_add_epi64(sum, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(rounded)));
        sum = _mm512_add_epi64(sum, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(rounded, 1)));
    }
    return _mm512_reduce_add_epi64(sum);
}

// The first column of a span (of short groups: of a group), and how many it has.
static int64_t columns_of(const Digits *p, int64_t span, int64_t *from) {
    const Codes *c = &p->codes;
    const int64_t a_span = p->spans_a_group == 1 ? c->columns / c->groups : p->blocks_a_span * p->block;
    *from = span * a_span;
    return least(a_span, c->columns - *from);
}

static void finish_product(Digits *p, Room *r, int threads) {
    p->room = r->codes, p->inputs = r->inputs, p->start = r->start, p->input_scale = r->input_scale, p->sums = r->sums;
    for_rows(body, p, p->codes.rows, threads);
}

int digits_product(const Codes *c, const void *inputs, int type, int64_t count, int64_t stride, void *out,
                   int threads) {
    Digits p = {.codes = *c, .digits = DIGITS, .count = count, .out = out, .out_type = type};
    if (shape(&p)) return NOT_OFFERED;
    const int64_t pieces = p.groups_a_block > 1 ? c->groups : p.spans;
    const int64_t padded = p.groups_a_block > 1 ? p.padded_groups : p.padded_spans;
    Room r;
    int failed = make_room(&p, &r, threads);
    for (int64_t m = 0; m < count && !failed; m++) {
        as_floats(r.floats, inputs, type, m * stride, c->columns);
        for (int64_t piece = 0; piece < pieces && !failed; piece++) {
            int64_t from;
            const int64_t n = columns_of(&p, piece, &from);
            const float power = power_below(r.floats + from, n, 23);
            if (power < 0) failed = NOT_OFFERED;  // infinities go the way of floats
            const int64_t sum = to_integers(r.floats + from, power, r.integers + from, n);
            r.input_scale[m * padded + piece] = 1.0f / power;
            r.sums[m * p.padded_groups + piece / p.spans_a_group] += (float)sum / power;
        }
        if (!failed) write_row(&p, &r, m);
    }
    if (!failed) finish_product(&p, &r, threads);
    give_back(&r);
    return failed;
}

int bytes_product(const Codes *c, const int8_t *inputs, const float *scale, int64_t count, float *out, int threads) {
    Digits p = {.codes = *c, .digits = 1, .count = count, .out = out, .out_type = FP32};
    if (shape(&p)) return NOT_OFFERED;
    const int64_t group = c->columns / c->groups;
    const int64_t pieces = p.groups_a_block > 1 ? c->groups : p.spans;
    const int64_t padded = p.groups_a_block > 1 ? p.padded_groups : p.padded_spans;
    Room r;
    const int failed = make_room(&p, &r, threads);
    for (int64_t m = 0; m < count && !failed; m++) {
        for (int64_t g = 0; g < c->groups; g++) {
            int32_t sum = 0;
            for (int64_t k = g * group; k < (g + 1) * group; k++) {
                r.integers[k] = inputs[m * c->columns + k];
                sum += r.integers[k];
            }
            r.sums[m * p.padded_groups + g] = (float)sum * scale[m];
        }
        for (int64_t piece = 0; piece < pieces; piece++) r.input_scale[m * padded + piece] = scale[m];
        write_row(&p, &r, m);
    }
    if (!failed) finish_product(&p, &r, threads);
    give_back(&r);
    return failed;
}

#endif
