// Products of codes in blocks of 8 lanes, in plain C: for processors without 512-bit vectors, and those that are no
// x86.
//
// Multiplications and additions stay apart.

#include "uniform.h"

INLINE uint32_t word_at(const uint8_t *from) {
    return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

// A block, a lane holding its codes from its lowest bit on. The last of a row is not read beyond its end.
INLINE Words load_block(const uint8_t *from, int64_t last, int bits, int codes) {
    uint8_t copy[40];
    uint32_t lane[8];
    if (last) {
        memset(copy, 0, sizeof copy);
        memcpy(copy, from, (size_t)last);
        from = copy;
    }
    Words block;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (8 % bits == 0) {
        memcpy(&block, from, 32);
        return block;
    }
#endif
    for (int l = 0; l < 8; l++) lane[l] = word_at(from + (l * codes * bits >> 3)) >> (l * codes * bits & 7);
    memcpy(&block, lane, 32);
    return block;
}

// Code j of every lane less the middle, which is what a shift with the sign makes of it once its highest bit is
// turned over; or the table's value.
INLINE Floats value(Words block, int j, int bits, const float *table) {
    if (table) {
        Floats w;
        for (int l = 0; l < 8; l++) w[l] = table[(uint32_t)block[l] >> (j * bits) & ((1u << bits) - 1)];
        return w;
    }
    return __builtin_convertvector((block << (32 - bits - j * bits)) >> (32 - bits), Floats);
}

// offset of a group of a row, see uniform.h
INLINE float offset_of(const Codes *c, int64_t row, int64_t g, float bias) {
    const float scale = scale_at(c, row, g);
    if (c->kind == ZERO_FLOAT) return float_of_half(((const uint16_t *)c->zero)[row * c->groups + g]) - scale * bias;
    const uint8_t *zeros = (const uint8_t *)c->zero + row * c->zero_bytes;
    return -scale * ((float)code_at(zeros, c->zero_bytes, c->bits, g) + bias);
}

INLINE void lane_rows(const Product *p, int64_t begin, int64_t end, int64_t first, const int tile) {
    const Codes *c = &p->codes;
    const int bits = c->bits, codes = lane_codes(bits);
    const int64_t a_group = p->one_group ? p->blocks / c->groups : 1;
    const float *inputs = p->inputs + first * p->width;
    Words turn = {0};
    for (int j = 0; j < codes && !c->table; j++) turn |= (int32_t)(1u << (j * bits + bits - 1)) - (Words){0};
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *at = c->codes + row * c->code_bytes;
        Floats total[TILE];
        for (int m = 0; m < tile; m++) total[m] = (Floats){0};
        for (int64_t b = 0; b < p->blocks;) {
            Floats sum[TILE][2];  // a single one would have to wait for itself
            for (int m = 0; m < tile; m++) sum[m][0] = sum[m][1] = (Floats){0};
            const int64_t from = b, to = b + a_group;
            for (; b < to; b++, at += p->block_bytes) {
                const Words block = load_block(at, b == p->blocks - 1 ? p->last_bytes : 0, bits, codes) ^ turn;
                const float *x = inputs + b * p->block;
                for (int j = 0; j < codes; j += 2)
                    for (int i = 0; i < 2; i++) {
                        const Floats w = value(block, j + i, bits, c->table);
                        for (int m = 0; m < tile; m++) {
                            Floats with;
                            memcpy(&with, x + m * p->width + (j + i) * 8, 32);
                            sum[m][i] += w * with;
                        }
                    }
            }
            Floats scale = scale_at(c, row, p->one_group ? from / a_group : 0) - (Floats){0};
            for (int l = 0; l < 8 && !p->one_group; l++)
                scale[l] = scale_at(c, row, p->first_group[from] + p->lane_group[from * LANES_ANY + l]);
            for (int m = 0; m < tile; m++) total[m] += scale * (sum[m][0] + sum[m][1]);
        }
        for (int m = 0; m < tile; m++) {
            float y = total_of(total[m]);
            const float *sums = p->sums ? p->sums + (first + m) * p->padded_groups : NULL;
            for (int64_t g = 0; sums && g < c->groups; g++) y += offset_of(c, row, g, p->bias) * sums[g];
            store(p->out, p->out_type, (first + m) * c->rows + row, y);
        }
    }
}

INLINE void any_rows(const Product *p, int64_t begin, int64_t end, int64_t first, int tile) {
    if (tile == 1)
        lane_rows(p, begin, end, first, 1);
    else
        for (int m = 0; m < tile; m += 2)
            if (m + 1 < tile)
                lane_rows(p, begin, end, first + m, 2);
            else
                lane_rows(p, begin, end, first + m, 1);
}

void lane_rows_portable(const Product *p, int64_t begin, int64_t end, int64_t first, int tile) {
    any_rows(p, begin, end, first, tile);
}

#if X86
FOR_AVX2 void lane_rows_avx2(const Product *p, int64_t begin, int64_t end, int64_t first, int tile) {
    any_rows(p, begin, end, first, tile);
}
#endif
