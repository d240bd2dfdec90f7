// Products of uniform codes in integers: the inputs of a span of columns are taken as 24-bit integers of the power of
// two above the largest of them, cut into three signed bytes ("digits" of base 256), each of which the processor
// multiplies by 64 codes at once (VNNI). Sums of a span are exact; what is rounded is the input, to 2^-23 of the
// largest of its span at most, and the sum of the spans, in fp32. Inputs that are bytes already have one digit and
// are not rounded at all.
//
// A span is a group; long groups are cut into several; where groups are shorter than a block it is a block, whose
// lanes belong to groups of their own. Digits stand in the order in which a block gives its codes away: with 1, 2, 4
// and 8 bits a block is 64 bytes, and one after the other the lowest codes of all bytes, the next, and so on; with
// others it is 64 codes, which are spread to bytes in their order.

#include "digits.h"

#if X86

// Codes that a block gives away a byte each: part j of 64.
INLINE FOR_AVX512 __m512i part(__m512i block, int j, int bits, __m512i spread, __m512i control) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    if (bits == 8) return block;
    if (bits == 1 || bits == 2 || bits == 4)
        return _mm512_and_si512(j ? _mm512_srli_epi16(block, (unsigned)(j * bits)) : block, mask);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(control, _mm512_permutexvar_epi8(spread, block)), mask);
}

// Adds the products of a block of two rows of codes to the sums of each row of inputs, row of codes and digit: inputs
// that are read once are multiplied twice.
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

INLINE FOR_AVX512 void finish(const Digits *p, int64_t row, int64_t first, const int tile, __m512 total[][PAIR],
                              int r) {
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
INLINE FOR_AVX512 void scales_of_spans(const Digits *p, float near[][PAIR][16], int r, int64_t row,
                                       int64_t first, int64_t span, const int tile) {
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

FOR_AVX512 void digit_rows(const Digits *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room) {
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

#endif
