// Pieces of several kernels with 512-bit vectors.

#ifndef POSTTRAIN_AVX512_H
#define POSTTRAIN_AVX512_H

#include "uniform.h"

#if X86

enum { AHEAD = 4096 };  // bytes that weights are fetched ahead: what memory needs to keep up with one core

INLINE __mmask16 first_of(int64_t n) { return (__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1); }
INLINE __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

INLINE FOR_AVX512 __m512 halves(const uint16_t *from, __mmask16 there) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from));
}

// The scales of 16 groups of a row from g on.
INLINE FOR_AVX512 __m512 scales_from(const Codes *c, int64_t row, int64_t g) {
    const int64_t at = row * c->groups + g;
    const __mmask16 there = first_of(c->groups - g);
    if (c->scale_type == SCALE_HALF) return halves((const uint16_t *)c->scale + at, there);
    if (c->scale_type == SCALE_FLOAT) return _mm512_maskz_loadu_ps(there, (const float *)c->scale + at);
    const __m128i bytes = _mm_maskz_loadu_epi8(there, (const uint8_t *)c->scale + at);
    const __m512 found = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), c->scale_table, 4);
    if (!c->peaks) return found;
    const __m512 peak = _mm512_maskz_loadu_ps(there, c->peaks + row / PEAK_ROWS * c->groups + g);
    const __m512 scale = _mm512_add_ps(_mm512_mul_ps(found, peak), _mm512_set1_ps(c->whole));
    return _mm512_max_ps(scale, _mm512_set1_ps(SMALLEST));
}

// The scale of a group in all lanes; `near` holds those of 16 groups, made when the first of them is asked for.
INLINE FOR_AVX512 __m512 group_scale(const Codes *c, int64_t row, int64_t g, float *near) {
    if (g % 16 == 0) _mm512_storeu_ps(near, scales_from(c, row, g));
    return _mm512_set1_ps(near[g % 16]);
}

// 16 codes from code i on (a multiple of 8) of a row that has `bytes` bytes, a 32-bit lane each
INLINE FOR_AVX512 __m512i sixteen(const uint8_t *row, int64_t bytes, int bits, int64_t i, __m512i where,
                                  __m512i shift) {
    const int64_t at = i * bits / 8, left = least(bytes - at, 2 * bits);
    const __m128i read = _mm_maskz_loadu_epi8((__mmask16)((1u << left) - 1), row + at);
    const __m512i spread = _mm512_permutexvar_epi8(where, _mm512_zextsi128_si512(read));
    return _mm512_and_si512(_mm512_srlv_epi32(spread, shift), _mm512_set1_epi32((1 << bits) - 1));
}

// What is to be multiplied by the sum of a group's inputs, of 16 groups of a row from g on: the codes were taken with
// `bias` added.
INLINE FOR_AVX512 __m512 offsets(const Codes *c, int64_t row, int64_t g, float bias, __m512i where, __m512i shift) {
    const __mmask16 there = first_of(c->groups - g);
    const __m512 scale = scales_from(c, row, g), biases = _mm512_set1_ps(bias);
    if (c->kind == ZERO_NONE) return _mm512_mul_ps(scale, _mm512_set1_ps(-(bias + middle(c->bits))));
    if (c->kind == ZERO_FLOAT)
        return _mm512_fnmadd_ps(scale, biases, halves((const uint16_t *)c->zero + row * c->groups + g, there));
    const uint8_t *zeros = (const uint8_t *)c->zero + row * c->zero_bytes;
    const __m512 zero = _mm512_cvtepi32_ps(sixteen(zeros, c->zero_bytes, c->bits, g, where, shift));
    return _mm512_fnmadd_ps(scale, _mm512_add_ps(zero, biases), _mm512_setzero_ps());
}

// The power of two that brings the largest of some numbers below 2^bits (bits to 30), and below what signed digits of
// base 256 reach; -1 where one is no finite number.
FOR_AVX512 static inline float power_below(const float *x, int64_t n, int bits) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (int64_t k = 0; k < n; k += 16) {
        const __m512 some = _mm512_maskz_loadu_ps(first_of(n - k), x + k);
        most = _mm512_max_ps(_mm512_abs_ps(some), most);
        odd |= _mm512_fpclass_ps_mask(some, 0x99);  // infinite or no number
    }
    if (odd) return -1.0f;
    const float peak = _mm512_reduce_max_ps(most);
    if (peak == 0.0f) return 1.0f;
    int exponent = (int)(bits_of_float(peak) >> 23) - 126;  // peak < 2^exponent
    if (exponent < bits - 126) exponent = bits - 126;       // of the smallest numbers the power would be infinite
    const float power = float_of_bits((uint32_t)(127 + bits - exponent) << 23);
    return peak * power <= (float)(1 << bits) * 0.996f ? power : 0.5f * power;
}

#endif
#endif
