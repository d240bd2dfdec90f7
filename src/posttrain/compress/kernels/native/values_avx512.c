// The values of codes with 512-bit vectors.

#include "avx512.h"

#if X86

FOR_AVX512 void uniform_tables_avx512(const Values *v, int64_t row, float *scale, float *zero) {
    const Codes *c = &v->codes;
    const __m512i where = _mm512_loadu_si512(v->sixteen_bytes), shift = _mm512_loadu_si512(v->sixteen_shift);
    for (int64_t g = 0; g < c->groups; g += 16) {
        const __mmask16 there = first_of(c->groups - g);
        __m512 zeros = _mm512_set1_ps(middle(c->bits));
        if (c->kind == ZERO_INTEGER) {
            const uint8_t *packed = (const uint8_t *)c->zero + row * c->zero_bytes;
            zeros = _mm512_cvtepi32_ps(sixteen(packed, c->zero_bytes, c->bits, g, where, shift));
        } else if (c->kind == ZERO_FLOAT) {
            zeros = halves((const uint16_t *)c->zero + row * c->groups + g, there);
        }
        _mm512_mask_storeu_ps(scale + g, there, scales_from(c, row, g));
        _mm512_mask_storeu_ps(zero + g, there, zeros);
    }
}

// Rounded as float arithmetic in two steps rounds: no fused multiplication and addition.
INLINE FOR_AVX512 __m512 scaled(__m512 code, __m512 scale, __m512 zero, const Codes *c) {
    if (c->table) return _mm512_mul_ps(code, scale);
    if (c->kind != ZERO_FLOAT) return _mm512_mul_ps(_mm512_sub_ps(code, zero), scale);
    __m512 w = _mm512_mul_ps(code, scale);
    __asm__("" : "+v"(w));  // a compiler that fuses would round once
    return _mm512_add_ps(w, zero);
}

INLINE FOR_AVX512 __m256i rounded_to_bf16(__m512 w) {
    const __m512i bits = _mm512_castps_si512(w);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    const __mmask16 no_number = _mm512_cmp_ps_mask(w, w, _CMP_UNORD_Q);
    const __m512i word = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), no_number, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(word);
}

// What codes i and 16 + i stand for before they are scaled, i from 0 to 15; bits beyond a code's are not looked at.
INLINE FOR_AVX512 __m512 plain(const Codes *c, int from) {
    float each[16];
    for (int i = 0; i < 16; i++) {
        const int code = (from + i) & ((1 << c->bits) - 1);
        each[i] = c->table ? c->table[code] : (float)code;
    }
    return _mm512_loadu_ps(each);
}

// A group of up to 5 bits: all its values are made first, and looked up in registers.
FOR_AVX512 static void few_values(const Values *v, int64_t row, const float *scale, const float *zero, void *out,
                                  int type) {
    const Codes *c = &v->codes;
    const uint8_t *packed = c->codes + row * c->code_bytes;
    const __m512i where = _mm512_loadu_si512(v->sixteen_bytes), shift = _mm512_loadu_si512(v->sixteen_shift);
    const __m512i words_where = _mm512_loadu_si512(v->words_bytes), words_shift = _mm512_loadu_si512(v->words_shift);
    const __m512 low = plain(c, 0), high = plain(c, 16);
    const int64_t group = c->columns / c->groups;
    for (int64_t g = 0, k = 0; g < c->groups; g++) {
        const __m512 s = _mm512_set1_ps(scale[g]), z = _mm512_set1_ps(zero[g]);
        const __m512 first = scaled(low, s, z, c), second = scaled(high, s, z, c);
        const int64_t end = (g + 1) * group;
        if (type == BF16) {
            const __m512i halves = _mm512_castsi256_si512(rounded_to_bf16(first));
            const __m512i table = _mm512_inserti64x4(halves, rounded_to_bf16(second), 1);
            for (; k < end; k += 32) {
                const int64_t at = k * c->bits / 8, left = least(c->code_bytes - at, 4 * c->bits);
                const __m512i read = _mm512_maskz_loadu_epi8(first_bytes(left), packed + at);
                const __m512i spread = _mm512_permutexvar_epi8(words_where, read);
                const __m512i w = _mm512_permutexvar_epi16(_mm512_srlv_epi16(spread, words_shift), table);
                _mm512_mask_storeu_epi16((uint16_t *)out + k, (__mmask32)first_bytes(least(32, end - k)), w);
            }
        } else {
            for (; k < end; k += 16) {
                const int64_t at = k * c->bits / 8, left = least(c->code_bytes - at, 2 * c->bits);
                const __m128i read = _mm_maskz_loadu_epi8((__mmask16)first_bytes(left), packed + at);
                const __m512i spread = _mm512_permutexvar_epi8(where, _mm512_zextsi128_si512(read));
                const __m512 w = _mm512_permutex2var_ps(first, _mm512_srlv_epi32(spread, shift), second);
                _mm512_mask_storeu_ps((float *)out + k, first_of(end - k), w);
            }
        }
    }
}

FOR_AVX512 void uniform_values_avx512(const Values *v, int64_t row, const float *scale, const float *zero, void *out,
                                      int type, uint8_t *room) {
    const Codes *c = &v->codes;
    const uint8_t *packed = c->codes + row * c->code_bytes;
    const __m512i where = _mm512_loadu_si512(v->sixteen_bytes), shift = _mm512_loadu_si512(v->sixteen_shift);
    const int64_t group = c->columns / c->groups;
    (void)room;
    if (!v->group_index && c->bits <= 5 && (c->groups == 1 || group % 32 == 0)) {
        few_values(v, row, scale, zero, out, type);
        return;
    }
    int64_t g = 0, next = group;
    for (int64_t k = 0; k < c->columns; k += 16) {
        const __mmask16 there = first_of(c->columns - k);
        const __m512i number = sixteen(packed, c->code_bytes, c->bits, k, where, shift);
        const __m512 code = c->table ? _mm512_i32gather_ps(number, c->table, 4) : _mm512_cvtepi32_ps(number);
        __m512 s, z;
        if (v->group_index) {
            const __m512i index = _mm512_maskz_loadu_epi32(there, v->group_index + k);
            s = _mm512_i32gather_ps(index, scale, 4), z = _mm512_i32gather_ps(index, zero, 4);
        } else {
            if (k >= next) g++, next += group;
            s = _mm512_set1_ps(scale[g]), z = _mm512_set1_ps(zero[g]);
        }
        const __m512 w = scaled(code, s, z, c);
        if (type == BF16)
            _mm256_mask_storeu_epi16((uint16_t *)out + k, there, rounded_to_bf16(w));
        else
            _mm512_mask_storeu_ps((float *)out + k, there, w);
    }
}

FOR_AVX512 float dot_avx512(const float *a, const float *b, int64_t n) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t k = 0; k < n; k += 64)
        for (int s = 0; s < 4; s++) {
            const int64_t at = k + 16 * s, left = n - at;
            const __mmask16 there = left <= 0 ? 0 : first_of(left);
            const __m512 one = _mm512_maskz_loadu_ps(there, a + at), other = _mm512_maskz_loadu_ps(there, b + at);
            sum[s] = _mm512_fmadd_ps(one, other, sum[s]);
        }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

#endif
