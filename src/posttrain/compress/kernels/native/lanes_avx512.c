// Products of codes in blocks of 16 lanes with 512-bit vectors, in fp32.

#include "avx512.h"

#if X86

// A block of codes, a 32-bit lane holding its codes from its lowest bit on.
INLINE FOR_AVX512 __m512i load_block(const uint8_t *from, __mmask64 there, int bits, __m512i spread, __m512i shift) {
    __m512i block = _mm512_maskz_loadu_epi8(there, from);
    if (bits == 3 || (bits >= 5 && bits <= 7)) block = _mm512_permutexvar_epi8(spread, block);
    if (bits == 5 || bits == 7) block = _mm512_srlv_epi32(block, shift);
    return block;
}

// code j of every lane, less the middle, as fp32: from a table of up to 32 values, or by an exponent in front of it
INLINE FOR_AVX512 __m512 value(__m512i block, int j, int bits, __m512 low, __m512 high) {
    const __m512i code = j ? _mm512_srli_epi32(block, (unsigned)(j * bits)) : block;
    if (bits <= 4) return _mm512_permutexvar_ps(code, low);
    if (bits == 5) return _mm512_permutex2var_ps(low, code, high);
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1), exponent = _mm512_set1_epi32(0x4b000000);  // 2^23
    const __m512 shifted = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(code, mask, exponent, 0xea));  // (c & m) | e
    return _mm512_sub_ps(shifted, _mm512_set1_ps(8388608.0f + (float)(1 << (bits - 1))));
}

// Adds offset * sum of inputs over the groups of a row to each row of inputs.
INLINE FOR_AVX512 void add_offsets(const Product *p, int64_t row, int64_t first, int tile, __m512 *total) {
    const __m512i where = _mm512_loadu_si512(p->sixteen_bytes), shift = _mm512_loadu_si512(p->sixteen_shift);
    for (int64_t g = 0; g < p->codes.groups; g += 16) {
        const __m512 offset = offsets(&p->codes, row, g, p->bias, where, shift);
        for (int m = 0; m < tile; m++) {
            const float *sums = p->sums + (first + m) * p->padded_groups + g;
            total[m] = _mm512_fmadd_ps(offset, _mm512_maskz_loadu_ps(first_of(p->codes.groups - g), sums), total[m]);
        }
    }
}

INLINE FOR_AVX512 __m512 lane_scales(const Product *p, int64_t row, int64_t block) {
    const __m512 near = scales_from(&p->codes, row, p->first_group[block]);
    return _mm512_permutexvar_ps(_mm512_loadu_si512(p->lane_group + block * LANES_512), near);
}

INLINE FOR_AVX512 void finish(const Product *p, int64_t row, int64_t first, int tile, __m512 *total) {
    if (p->sums) add_offsets(p, row, first, tile, total);
    for (int m = 0; m < tile; m++)
        store(p->out, p->out_type, (first + m) * p->codes.rows + row, _mm512_reduce_add_ps(total[m]));
}

INLINE FOR_AVX512 void fp32_rows(const Product *p, int64_t begin, int64_t end, int64_t first, const int bits,
                                 const int tile) {
    enum { SUMS = 4 };
    const int codes = lane_codes(bits), sums = tile == 1 ? SUMS : 1;
    const __mmask64 whole = first_bytes(p->block_bytes), last = first_bytes(p->last_bytes);
    const __m512i spread = _mm512_loadu_si512(p->spread), shift = _mm512_loadu_si512(p->lane_shift);
    float table[32];
    for (int i = 0, code; i < 32; i++) {
        code = i & ((1 << bits) - 1);
        table[i] = p->codes.table ? p->codes.table[code] : (float)code - middle(bits);
    }
    const __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
    const int64_t a_group = p->one_group ? p->blocks / p->codes.groups : 1;
    const float *inputs = p->inputs + first * p->width;

    for (int64_t row = begin; row < end; row++) {
        const uint8_t *at = p->codes.codes + row * p->codes.code_bytes;
        float near[16];
        __m512 total[TILE];
        for (int m = 0; m < tile; m++) total[m] = _mm512_setzero_ps();
        for (int64_t b = 0; b < p->blocks;) {
            __m512 sum[TILE][SUMS];
            for (int m = 0; m < tile; m++)
                for (int s = 0; s < sums; s++) sum[m][s] = _mm512_setzero_ps();
            const int64_t from = b, to = b + a_group;
            for (; b < to; b++, at += p->block_bytes) {
                _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
                const __m512i block = load_block(at, b == p->blocks - 1 ? last : whole, bits, spread, shift);
                const float *x = inputs + b * p->block;
#pragma GCC unroll 32
                for (int j = 0; j < codes; j++) {
                    const __m512 w = value(block, j, bits, low, high);
#pragma GCC unroll 4
                    for (int m = 0; m < tile; m++) {
                        const __m512 with = _mm512_loadu_ps(x + m * p->width + j * 16);
                        sum[m][j % sums] = _mm512_fmadd_ps(w, with, sum[m][j % sums]);
                    }
                }
            }
            const __m512 scale = p->one_group ? group_scale(&p->codes, row, from / a_group, near)
                                              : lane_scales(p, row, from);
#pragma GCC unroll 4
            for (int m = 0; m < tile; m++) {
                for (int s = 1; s < sums; s++) sum[m][0] = _mm512_add_ps(sum[m][0], sum[m][s]);
                total[m] = _mm512_fmadd_ps(scale, sum[m][0], total[m]);
            }
        }
        finish(p, row, first, tile, total);
    }
}

#define CASE(bits)                                                                                                     \
    case bits:                                                                                                         \
        if (tile == TILE)                                                                                              \
            fp32_rows(p, begin, end, first, bits, TILE);                                                               \
        else                                                                                                           \
            for (int m = 0; m < tile; m++) fp32_rows(p, begin, end, first + m, bits, 1);                               \
        break;

FOR_AVX512 void lane_rows_avx512(const Product *p, int64_t begin, int64_t end, int64_t first, int tile) {
    switch (p->codes.bits) {
        CASE(1)
        CASE(2)
        CASE(3)
        CASE(4)
        CASE(5)
        CASE(6)
        CASE(7)
        CASE(8)
    }
}

#endif
