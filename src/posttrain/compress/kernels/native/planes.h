// Bit planes in blocks of 512 columns, and the two ways of multiplying them.

#ifndef POSTTRAIN_PLANES_H
#define POSTTRAIN_PLANES_H

#include "avx512.h"

enum { WORDS = 8, COLUMNS = 512 };

typedef struct {
    const uint64_t *weights, *inputs;  // [rows, blocks, bits, 8], [count, blocks, input_bits, 8]
    const uint8_t *input_bytes;  // [count, blocks, 512] the inputs' codes, for the products by bytes
    int64_t rows, count, blocks, groups, group;
    int bits, input_bits;
    int64_t *sums;  // [count, rows], where the sums themselves are wanted
    // or values: scales and zeros of groups, sums of the groups' inputs, scales of the inputs
    Codes codes;
    const float *input_sums, *input_scale;  // [count, padded_groups], [count]
    int64_t padded_groups;
    float *out;
    const int32_t *first_group, *lane_group;  // [blocks] the group of the first word, [blocks, 8] the words' from there
    uint8_t sixteen_bytes[64];
    uint32_t sixteen_shift[16];
} Planes;

typedef void (*PlaneRows)(const Planes *p, int64_t begin, int64_t end);

#if X86
uint8_t *bytes_of_planes(const Planes *p);
void plane_rows_by_bytes(const Planes *p, int64_t begin, int64_t end);

INLINE FOR_AVX512 __m512d wide(__m256 eight) { return _mm512_cvtps_pd(eight); }

INLINE FOR_AVX512 double sum_of_offsets(const Planes *p, int64_t row, int64_t m) {
    const __m512i where = _mm512_loadu_si512(p->sixteen_bytes), shift = _mm512_loadu_si512(p->sixteen_shift);
    __m512d total = _mm512_setzero_pd();
    for (int64_t g = 0; g < p->groups; g += 16) {
        const __m512 offset = offsets(&p->codes, row, g, 0.0f, where, shift);
        const float *inputs = p->input_sums + m * p->padded_groups + g;
        const __m256 low = _mm512_castps512_ps256(offset), high = _mm512_extractf32x8_ps(offset, 1);
        total = _mm512_fmadd_pd(wide(low), wide(_mm256_loadu_ps(inputs)), total);
        total = _mm512_fmadd_pd(wide(high), wide(_mm256_loadu_ps(inputs + 8)), total);
    }
    return _mm512_reduce_add_pd(total);
}
#endif
#endif
