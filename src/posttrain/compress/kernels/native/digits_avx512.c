// Products of uniform codes in integers: the inputs of a span of columns are taken as 24-bit integers of the power of two
// above the largest of them, cut into three signed bytes ("digits" of base 256), each of which the processor multiplies
// by 64 codes at once (VNNI). Sums of a span are exact; what is rounded is the input, to 2^-23 of the largest of its span
// at most, and the sum of the spans, in fp32. Inputs that are bytes already have one digit and are not rounded at all.
//
// A span is a group; long groups are cut into several; where groups are shorter than a block it is a block, whose lanes
// belong to groups of their own. Digits stand in the order in which a block gives its codes away: with 1, 2, 4 and 8 bits
// a block is 64 bytes, and one after the other the lowest codes of all bytes, the next, and so on; with others it is 64
// codes, which are spread to bytes in their order.

#include "avx512.h"

#if X86

enum { LONGEST_SPAN = 512, DIGITS = 3, PAIR = 2 };

typedef struct {
    Codes codes;
    int digits;
    const int8_t *inputs;  // [count, blocks, parts, digits, 64]
    const int32_t *start;  // [count, spans, digits, 16] what the sums of a span begin at: it takes the codes' middle away
    const float *input_scale;  // [count, padded_spans]; of short groups [count, padded_groups]
    const float *sums;  // [count, padded_groups] sums of a group's inputs
    int64_t count, padded_groups, padded_spans;
    int64_t blocks, block, block_bytes, stride;  // stride: of inputs, from a row to the next
    int64_t spans, spans_a_group, blocks_a_span, groups_a_block;
    void *out;
    int out_type;
    uint8_t *room;  // of each thread: two rows of codes with zeros behind them
    int64_t room_bytes;
    uint8_t spread[64], control[64], sixteen_bytes[64];
    uint32_t sixteen_shift[16];
} Digits;

// Codes that a block gives away a byte each: part j of 64.
INLINE FOR_AVX512 __m512i part(__m512i block, int j, int bits, __m512i spread, __m512i control) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    if (bits == 8) return block;
    if (bits == 1 || bits == 2 || bits == 4) return _mm512_and_si512(j ? _mm512_srli_epi16(block, (unsigned)(j * bits)) : block, mask);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(control, _mm512_permutexvar_epi8(spread, block)), mask);
}

// Adds the products of a block of two rows of codes to the sums of each row of inputs, row of codes and digit: inputs that
// are read once are multiplied twice.
INLINE FOR_AVX512 void add_block(__m512i sum[][PAIR][DIGITS], const __m512i *block, const int8_t *x, int64_t stride,
                                 const int bits, const int digits, const int tile, __m512i spread, __m512i control) {
    const int parts = bits == 1 || bits == 2 || bits == 4 ? 8 / bits : 1;
#pragma GCC unroll 8
    for (int j = 0; j < parts; j++) {
        const __m512i one = part(block[0], j, bits, spread, control), two = part(block[1], j, bits, spread, control);
#pragma GCC unroll 4
        for (int m = 0; m < tile; m++)
#pragma GCC unroll 3
            for (int d = 0; d < digits; d++) {
                const __m512i with = _mm512_load_si512(x + m * stride + (j * digits + d) * 64);
                sum[m][0][d] = _mm512_dpbusd_epi32(sum[m][0][d], one, with);
                sum[m][1][d] = _mm512_dpbusd_epi32(sum[m][1][d], two, with);
            }
    }
}

INLINE FOR_AVX512 void begin_span(__m512i sum[][PAIR][DIGITS], const int32_t *start, int64_t stride, const int digits,
                                  const int tile) {
#pragma GCC unroll 4
    for (int m = 0; m < tile; m++)
#pragma GCC unroll 3
        for (int d = 0; d < digits; d++) sum[m][0][d] = sum[m][1][d] = _mm512_load_si512(start + m * stride + d * 16);
}

// scale * (256^2 * highest + 256 * middle + lowest)
INLINE FOR_AVX512 __m512 end_span(__m512 total, const __m512i *sum, __m512 scale, const int digits) {
    if (digits == 1) return _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[0]), total);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[1], 8), sum[0]));
    const __m512 both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(65536.0f), low);
    return _mm512_fmadd_ps(scale, both, total);
}

INLINE FOR_AVX512 void finish(const Digits *p, int64_t row, int64_t first, const int tile, __m512 total[][PAIR], int r) {
    const __m512i where = _mm512_loadu_si512(p->sixteen_bytes), shift = _mm512_loadu_si512(p->sixteen_shift);
    for (int64_t g = 0; g < p->codes.groups && p->codes.kind != ZERO_NONE; g += 16) {
        const __m512 offset = offsets(&p->codes, row, g, -middle(p->codes.bits), where, shift);
        for (int m = 0; m < tile; m++) {
            const __m512 sums = _mm512_load_ps(p->sums + (first + m) * p->padded_groups + g);
            total[m][r] = _mm512_fmadd_ps(offset, sums, total[m][r]);
        }
    }
    for (int m = 0; m < tile; m++)
        store(p->out, p->out_type, (first + m) * p->codes.rows + row, _mm512_reduce_add_ps(total[m][r]));
}

// The scales of 16 spans of a row, times those of the inputs.
INLINE FOR_AVX512 void scales_of_spans(const Digits *p, float near[][PAIR][16], int r, int64_t row, int64_t first, int64_t span,
                                       const int tile) {
    __m512 scale;
    if (p->spans_a_group == 1) {
        scale = scales_from(&p->codes, row, span);
    } else {
        float each[16];
        for (int64_t i = 0; i < 16; i++)
            each[i] = span + i < p->spans ? scale_at(&p->codes, row, (span + i) / p->spans_a_group) : 0.0f;
        scale = _mm512_loadu_ps(each);
    }
    for (int m = 0; m < tile; m++) {
        const __m512 inputs = _mm512_load_ps(p->input_scale + (first + m) * p->padded_spans + span);
        _mm512_storeu_ps(near[m][r], _mm512_mul_ps(scale, inputs));
    }
}

// A row of codes of which whole registers may be read: where they would reach beyond the matrix, a copy.
INLINE const uint8_t *codes_of_row(const Digits *p, int64_t row, uint8_t *room) {
    const Codes *c = &p->codes;
    const uint8_t *at = c->codes + row * c->code_bytes;
    if (row * c->code_bytes + p->room_bytes <= c->rows * c->code_bytes) return at;
    memcpy(room, at, (size_t)c->code_bytes);
    return room;
}

// Two rows of codes; of an odd number the last is taken twice.
typedef struct {
    int64_t row[PAIR];
    const uint8_t *at[PAIR];
} Rows;

INLINE Rows two_rows(const Digits *p, int64_t row, int64_t end, uint8_t *room) {
    const int64_t other = row + 1 < end ? row + 1 : row;
    const Rows made = {{row, other}, {codes_of_row(p, row, room), codes_of_row(p, other, room + p->room_bytes)}};
    return made;
}

INLINE FOR_AVX512 void load_blocks(__m512i *block, Rows *rows, int64_t block_bytes) {
    for (int r = 0; r < PAIR; r++) {
        _mm_prefetch((const char *)rows->at[r] + AHEAD, _MM_HINT_T0);
        block[r] = _mm512_loadu_si512(rows->at[r]);
        rows->at[r] += block_bytes;
    }
}

// Rows whose spans are of whole blocks.
INLINE FOR_AVX512 void span_rows(const Digits *p, int64_t begin, int64_t end, int64_t first, uint8_t *room,
                                 const int bits, const int digits, const int tile) {
    const __m512i spread = _mm512_loadu_si512(p->spread), control = _mm512_loadu_si512(p->control);
    const int64_t block_bytes = p->block_bytes, a_block = p->block * digits, spans = p->spans;
    const int64_t a_span = p->blocks_a_span * a_block, stride = p->stride, starts = spans * digits * 16;
    for (int64_t row = begin; row < end; row += PAIR) {
        Rows rows = two_rows(p, row, end, room);
        const int8_t *x = p->inputs + first * stride;
        const int32_t *start = p->start + first * starts;
        __m512 total[TILE][PAIR];
        for (int m = 0; m < tile; m++) total[m][0] = total[m][1] = _mm512_setzero_ps();
        for (int64_t from = 0; from < spans; from += 16) {
            float near[TILE][PAIR][16];
            for (int r = 0; r < PAIR; r++) scales_of_spans(p, near, r, rows.row[r], first, from, tile);
            const int64_t n = least(16, spans - from);
            for (int64_t i = 0; i < n; i++, start += digits * 16) {
                __m512i sum[TILE][PAIR][DIGITS], block[PAIR];
                begin_span(sum, start, starts, digits, tile);
                const int8_t *to = x + a_span;
                do {
                    load_blocks(block, &rows, block_bytes);
                    add_block(sum, block, x, stride, bits, digits, tile, spread, control);
                    x += a_block;
                } while (x < to);
#pragma GCC unroll 4
                for (int m = 0; m < tile; m++)
#pragma GCC unroll 2
                    for (int r = 0; r < PAIR; r++)
                        total[m][r] = end_span(total[m][r], sum[m][r], _mm512_set1_ps(near[m][r][i]), digits);
            }
        }
        for (int r = 0; r < PAIR; r++) finish(p, rows.row[r], first, tile, total, r);
    }
}

// Rows whose blocks are of several groups.
INLINE FOR_AVX512 void short_rows(const Digits *p, int64_t begin, int64_t end, int64_t first, uint8_t *room,
                                  const int bits, const int digits, const int tile) {
    const __m512i spread = _mm512_loadu_si512(p->spread), control = _mm512_loadu_si512(p->control);
    const int64_t block_bytes = p->block_bytes, a_block = p->block * digits, groups = p->groups_a_block;
    const int64_t stride = p->stride, starts = p->spans * digits * 16, blocks = p->blocks;
    int32_t lanes[16];
    for (int l = 0; l < 16; l++) lanes[l] = (int32_t)(l * groups / 16);
    const __m512i group_of_lane = _mm512_loadu_si512(lanes);
    for (int64_t row = begin; row < end; row += PAIR) {
        Rows rows = two_rows(p, row, end, room);
        const int8_t *x = p->inputs + first * stride;
        const int32_t *start = p->start + first * starts;
        __m512 total[TILE][PAIR];
        for (int m = 0; m < tile; m++) total[m][0] = total[m][1] = _mm512_setzero_ps();
        for (int64_t from = 0; from < blocks; from += 16 / groups) {
            __m512 near[TILE][PAIR];
            for (int r = 0; r < PAIR; r++) {
                const __m512 scale = scales_from(&p->codes, rows.row[r], from * groups);
                for (int m = 0; m < tile; m++) {
                    const float *inputs = p->input_scale + (first + m) * p->padded_groups + from * groups;
                    near[m][r] = _mm512_mul_ps(scale, _mm512_load_ps(inputs));
                }
            }
            const int64_t to = least(blocks, from + 16 / groups);
            __m512i which = group_of_lane;
            for (int64_t b = from; b < to; b++, x += a_block, start += digits * 16) {
                __m512i sum[TILE][PAIR][DIGITS], block[PAIR];
                begin_span(sum, start, starts, digits, tile);
                load_blocks(block, &rows, block_bytes);
                add_block(sum, block, x, stride, bits, digits, tile, spread, control);
#pragma GCC unroll 4
                for (int m = 0; m < tile; m++)
#pragma GCC unroll 2
                    for (int r = 0; r < PAIR; r++) {
                        const __m512 scale = _mm512_permutexvar_ps(which, near[m][r]);
                        total[m][r] = end_span(total[m][r], sum[m][r], scale, digits);
                    }
                which = _mm512_add_epi32(which, _mm512_set1_epi32((int)groups));
            }
        }
        for (int r = 0; r < PAIR; r++) finish(p, rows.row[r], first, tile, total, r);
    }
}

INLINE FOR_AVX512 void any_rows(const Digits *p, int64_t begin, int64_t end, int64_t first, uint8_t *room,
                                int bits, const int digits, const int tile) {
    if (p->groups_a_block > 1)
        short_rows(p, begin, end, first, room, bits, digits, tile);
    else
        span_rows(p, begin, end, first, room, bits, digits, tile);
}

#define CASE(bits, digits, tile)                                                                                       \
    case (bits * 4 + digits) * 8 + tile: any_rows(p, begin, end, first, room, bits, digits, tile); break;
#define CASES(bits) CASE(bits, 1, 1) CASE(bits, 1, 2) CASE(bits, 3, 1) CASE(bits, 3, 2)

FOR_AVX512 static void digit_rows(const Digits *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room) {
    const int bits = p->codes.bits;
    switch (((8 % bits ? 0 : bits) * 4 + p->digits) * 8 + tile) {
        CASES(1)
        CASES(2)
        CASES(4)
        CASES(8)
        // the others differ in nothing but constants
        case 1 * 8 + 1: any_rows(p, begin, end, first, room, bits, 1, 1); break;
        case 1 * 8 + 2: any_rows(p, begin, end, first, room, bits, 1, 2); break;
        case 3 * 8 + 1: any_rows(p, begin, end, first, room, bits, 3, 1); break;
        case 3 * 8 + 2: any_rows(p, begin, end, first, room, bits, 3, 2); break;
    }
}

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

// A block of integers, `[block]` in the order of the columns, as digits in the order of the codes; sums: `[digits, 16]`
// of the four digits of each lane, added to.
FOR_AVX512 static void write_digits(const Digits *p, const int32_t *integers, int8_t *to, __m512i *sums) {
    const int64_t parts = p->block / 64;
    const __m512i step = _mm512_mullo_epi32(_mm512_set1_epi32((int)parts),
                                            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i half = _mm512_set1_epi32(128), ones = _mm512_set1_epi8(1);
    for (int64_t j = 0; j < parts; j++, to += p->digits * 64) {
        for (int i = 0; i < 64; i += 16) {
            __m512i left = _mm512_i32gather_epi32(step, integers + i * parts + j, 4);
            for (int d = 0; d < p->digits; d++) {  // the lowest byte is the digit, with sign; the rest goes on without it
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
    if (!r->codes || !r->inputs || !r->start || !r->integers || !r->floats || !r->input_scale || !r->sums) return NO_MEMORY;
    memset(r->codes, 0, (size_t)(p->room_bytes * PAIR * threads));
    memset(r->integers, 0, (size_t)width * 4);
    memset(r->input_scale, 0, (size_t)(p->count * scales) * 4);
    memset(r->sums, 0, (size_t)(p->count * p->padded_groups) * 4);
    return DONE;
}

static void give_back(Room *r) {
    free(r->codes), free(r->inputs), free(r->start), free(r->integers), free(r->floats), free(r->input_scale), free(r->sums);
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

int digits_product(const Codes *c, const void *inputs, int type, int64_t count, int64_t stride, void *out, int threads) {
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
