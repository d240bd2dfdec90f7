// Products of up to four bit planes by bytes of inputs: the planes' bits are brought together as bytes, eight columns
// at a time by a product of 8 x 8 matrices of bits (GFNI), and multiplied as bytes (VNNI). It takes less than
// counting bits where there are many pairs of planes.

#include "planes.h"

#if X86

enum { CHUNKS = 8 };  // of 64 columns, a block

typedef struct {
    __m512i index[8];  // of the permutes that bring the planes' bytes of 8 columns into one quadword
    __m512i columns;   // the unit vectors
} Constants;

INLINE FOR_AVX512 Constants constants(const int bits) {
    Constants made;
    uint8_t bytes[64];
    uint32_t words[16];
    made.columns = _mm512_set1_epi64((long long)0x8040201008040201ull);
    for (int c = 0; c < (bits == 1 ? 8 : 4); c++) {
        for (int s = 0; s < 8; s++) {
            memset(bytes + 8 * s, 0, 8);
            if (bits == 1) bytes[8 * s + 7] = (uint8_t)(8 * c + s);
            if (bits == 2) bytes[8 * s + 6] = (uint8_t)(16 * c + 2 * s);
            if (bits == 2) bytes[8 * s + 7] = (uint8_t)(16 * c + 2 * s + 1);
            words[2 * s] = 0, words[2 * s + 1] = (uint32_t)(s < 4 ? 4 * c + s : 16 + 4 * c + s - 4);
        }
        made.index[c] = bits <= 2 ? _mm512_loadu_si512(bytes) : _mm512_loadu_si512(words);
    }
    return made;
}

// The codes of a block, 64 columns in order a register. Plane i goes to byte 7 - i of a quadword: the product gives
// it bit i.
INLINE FOR_AVX512 void codes_of_block(const uint64_t *w, __m512i *codes, const Constants *c, const int bits) {
    const __m512i none = _mm512_setzero_si512(), zero = _mm512_loadu_si512(w);
    if (bits == 1) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) codes[i] = _mm512_maskz_permutexvar_epi8(0x8080808080808080ull, c->index[i], zero);
    } else {
        const __m512i one = _mm512_loadu_si512(w + WORDS);
        const __m512i low = _mm512_unpacklo_epi8(one, zero), high = _mm512_unpackhi_epi8(one, zero);
        if (bits == 2) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                codes[2 * i] = _mm512_maskz_permutexvar_epi8(0xc0c0c0c0c0c0c0c0ull, c->index[i], low);
                codes[2 * i + 1] = _mm512_maskz_permutexvar_epi8(0xc0c0c0c0c0c0c0c0ull, c->index[i], high);
            }
        } else {
            const __m512i two = _mm512_loadu_si512(w + 2 * WORDS);
            const __m512i three = bits == 4 ? _mm512_loadu_si512(w + 3 * WORDS) : none;
            const __m512i upper_low = _mm512_unpacklo_epi8(three, two), upper_high = _mm512_unpackhi_epi8(three, two);
            const __m512i a = _mm512_unpacklo_epi16(upper_low, low), b = _mm512_unpackhi_epi16(upper_low, low);
            const __m512i d = _mm512_unpacklo_epi16(upper_high, high), e = _mm512_unpackhi_epi16(upper_high, high);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                codes[2 * i] = _mm512_maskz_permutex2var_epi32(0xaaaa, a, c->index[i], b);
                codes[2 * i + 1] = _mm512_maskz_permutex2var_epi32(0xaaaa, d, c->index[i], e);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < CHUNKS; i++) codes[i] = _mm512_gf2p8affine_epi64_epi8(c->columns, codes[i], 0);
}

INLINE FOR_AVX512 void byte_rows(const Planes *p, int64_t begin, int64_t end, int64_t first, const int bits,
                                 const int tile) {
    const Constants c = constants(bits);
    const int64_t stride = p->blocks * COLUMNS, chunks = p->groups == 1 ? p->blocks * CHUNKS : p->group / 64;
    for (int64_t row = begin; row < end; row++) {
        const uint64_t *w = p->weights + row * p->blocks * bits * WORDS;
        const uint8_t *x = p->input_bytes + first * stride;
        __m512i sum[TILE][2];
        __m512d total[TILE];  // as inputs and codes have no sign, much of a sum is taken away again: not in fp32
        float near[16];
        for (int m = 0; m < tile; m++) {
            sum[m][0] = sum[m][1] = _mm512_setzero_si512();
            total[m] = _mm512_setzero_pd();
        }
        int64_t g = 0, left = chunks;  // of the group
        for (int64_t block = 0; block < p->blocks; block++, w += bits * WORDS, x += COLUMNS) {
#pragma GCC unroll 4
            for (int i = 0; i < bits; i++) _mm_prefetch((const char *)(w + i * WORDS) + AHEAD, _MM_HINT_T0);
            __m512i codes[CHUNKS];
            codes_of_block(w, codes, &c, bits);
            if (p->groups == 1) {
#pragma GCC unroll 8
                for (int i = 0; i < CHUNKS; i++)
#pragma GCC unroll 4
                    for (int m = 0; m < tile; m++) {
                        const __m512i with = _mm512_load_si512(x + m * stride + i * 64);
                        sum[m][i % 2] = _mm512_dpbusd_epi32(sum[m][i % 2], with, codes[i]);
                    }
                continue;
            }
#pragma GCC unroll 8
            for (int i = 0; i < CHUNKS; i++) {
#pragma GCC unroll 4
                for (int m = 0; m < tile; m++)
                    sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], _mm512_load_si512(x + m * stride + i * 64), codes[i]);
                if (--left || g >= p->groups) continue;
                const __m512d scale = wide(_mm512_castps512_ps256(group_scale(&p->codes, row, g, near)));
                for (int m = 0; m < tile; m++) {
                    const __m256i high = _mm512_extracti64x4_epi64(sum[m][0], 1);
                    const __m256i both = _mm256_add_epi32(_mm512_castsi512_si256(sum[m][0]), high);
                    total[m] = _mm512_fmadd_pd(scale, _mm512_cvtepi32_pd(both), total[m]);
                    sum[m][0] = _mm512_setzero_si512();
                }
                g++, left = chunks;
            }
        }
        for (int m = 0; m < tile; m++) {
            const int64_t place = (first + m) * p->rows + row;
            const int32_t all = _mm512_reduce_add_epi32(_mm512_add_epi32(sum[m][0], sum[m][1]));
            if (p->sums) {
                p->sums[place] = all;
                continue;
            }
            const double found = p->groups == 1 ? (double)scale_at(&p->codes, row, 0) * (double)all
                                                : _mm512_reduce_add_pd(total[m]);
            p->out[place] = (float)(found + sum_of_offsets(p, row, first + m)) * p->input_scale[first + m];
        }
    }
}

#define CASE(bits)                                                                                                     \
    case bits:                                                                                                         \
        for (int64_t m = 0; m < p->count; m += p->count - m >= TILE ? TILE : 1)                                        \
            if (p->count - m >= TILE)                                                                                  \
                byte_rows(p, row, to, m, bits, TILE);                                                                  \
            else                                                                                                       \
                byte_rows(p, row, to, m, bits, 1);                                                                     \
        break;

FOR_AVX512 void plane_rows_by_bytes(const Planes *p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += PANEL) {
        const int64_t to = least(row + PANEL, end);
        switch (p->bits) {
            CASE(1)
            CASE(2)
            CASE(3)
            CASE(4)
        }
    }
}

// The codes of the inputs, a byte each, in the order of the columns.
FOR_AVX512 uint8_t *bytes_of_planes(const Planes *p) {
    uint8_t *bytes = (uint8_t *)aligned((size_t)(p->count * p->blocks * COLUMNS));
    for (int64_t block = 0; bytes && block < p->count * p->blocks; block++)
        for (int word = 0; word < WORDS; word++) {
            __m512i codes = _mm512_setzero_si512();
            for (int j = 0; j < p->input_bits; j++) {
                const __mmask64 bits = p->inputs[(block * p->input_bits + j) * WORDS + word];
                codes = _mm512_or_si512(codes, _mm512_maskz_set1_epi8(bits, (char)(1 << j)));
            }
            _mm512_store_si512(bytes + block * COLUMNS + word * 64, codes);
        }
    return bytes;
}

#endif
