// Products of uniform codes and of codes with a table: what is exported, and what is made ready once a call.

#include "uniform.h"

Codes codes_of(const uint8_t *codes, const void *scale, const void *zero, const int16_t *group_of, int64_t rows,
               int64_t columns, int64_t groups, int bits, int kind) {
    const Codes made = {.codes = codes, .scale = scale, .zero = zero, .group_of = group_of, .rows = rows,
                        .columns = columns, .groups = groups, .code_bytes = (columns * bits + 7) / 8,
                        .zero_bytes = (groups * bits + 7) / 8, .bits = bits, .kind = kind};
    return made;
}

void set_sixteen(uint8_t bytes[64], uint32_t shift[16], int bits) {
    memset(bytes, 63, 64);  // the highest byte of a register, which holds nothing then
    for (int lane = 0; lane < 16; lane++) {
        const int bit = lane * bits;
        bytes[4 * lane] = (uint8_t)(bit >> 3);
        bytes[4 * lane + 1] = (uint8_t)((bit >> 3) + 1);
        shift[lane] = (uint32_t)(bit & 7);
    }
}

// Inputs in the order of the codes: of a block, code j of all lanes, then code j + 1; zeros beyond the columns.
static int lay_out(const Product *p, float *laid, const void *inputs, int type, int64_t stride, int lanes) {
    const int64_t columns = p->codes.columns, codes = p->block / lanes;
    float *row = (float *)aligned((size_t)p->width * 4);
    if (!row) return NO_MEMORY;
    memset(row + columns, 0, (size_t)(p->width - columns) * 4);
    for (int64_t m = 0; m < p->count; m++) {
        as_floats(row, inputs, type, m * stride, columns);
        for (int64_t at = 0; at < p->width; at += p->block)
            for (int64_t j = 0; j < codes; j++)
                for (int64_t l = 0; l < lanes; l++) laid[m * p->width + at + j * lanes + l] = row[at + l * codes + j];
    }
    free(row);
    return DONE;
}

static void sum_groups(float *sums, int64_t padded, const Product *p, const void *inputs, int type, int64_t stride) {
    const int64_t group = p->codes.columns / p->codes.groups;
    for (int64_t m = 0; m < p->count; m++)
        for (int64_t g = 0; g < p->codes.groups; g++) {
            const int64_t at = m * stride + g * group;
            double part[8] = {0};
            int64_t k = 0;
            for (; k + 8 <= group; k += 8)
                for (int i = 0; i < 8; i++) part[i] += element(inputs, type, at + k + i);
            for (int i = 0; k < group; k++, i++) part[i] += element(inputs, type, at + k);
            for (int i = 1; i < 8; i++) part[0] += part[i];
            sums[m * padded + g] = (float)part[0];
        }
}

static void set_constants(Product *p) {
    const int bits = p->codes.bits, lane_bits = lane_codes(bits) * bits;
    memset(p->spread, 63, 64);  // with blocks shorter than a register its highest byte holds nothing
    for (int l = 0; l < 16; l++) {
        const int bit = l * lane_bits;
        for (int i = 0; i < 4 && (bit >> 3) + i < 64; i++) p->spread[l * 4 + i] = (uint8_t)((bit >> 3) + i);
        p->lane_shift[l] = (uint32_t)(bit & 7);
    }
    set_sixteen(p->sixteen_bytes, p->sixteen_shift, bits);
}

typedef struct {
    const Product *product;
    LaneRows rows;
} RowsTask;

static void product_body(const void *task, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const RowsTask *t = (const RowsTask *)task;
    for (int64_t row = begin; row < end; row += PANEL)
        for (int64_t m = 0; m < t->product->count; m += TILE)
            t->rows(t->product, row, least(row + PANEL, end), m, (int)least(TILE, t->product->count - m));
}

static int product(const Codes *c, const void *inputs, int input_type, int64_t count, int64_t stride, void *out,
                   int level, int threads) {
    Product p = {.codes = *c, .out = out, .out_type = input_type, .count = count};
    const int64_t columns = c->columns, groups = c->groups, group = columns / groups;
    const int bits = c->bits;
    int lanes = LANES_ANY;
    LaneRows kernel = lane_rows_portable;
#if X86
    if (level >= AVX512 && !c->table && !c->group_of) {
        const int done = digits_product(c, inputs, input_type, count, stride, out, threads);
        if (done != NOT_OFFERED) return done;
    }
    if (level == AVX2) kernel = lane_rows_avx2;
    if (level >= AVX512) kernel = lane_rows_avx512, lanes = LANES_512;
#endif
    if (c->group_of || (groups > 1 && group % lane_codes(bits)) || (c->table && bits > 5))
        return product_by_values(c, inputs, input_type, count, stride, out, level, threads);
    p.block = lane_codes(bits) * lanes;
    p.block_bytes = p.block * bits / 8;
    p.blocks = (columns + p.block - 1) / p.block;
    p.last_bytes = c->code_bytes - (p.blocks - 1) * p.block_bytes;
    p.width = p.blocks * p.block;
    p.one_group = groups == 1 || group % p.block == 0;
    p.padded_groups = rounded_up(groups, 16);
    p.bias = -middle(bits);
    set_constants(&p);

    float *laid = (float *)aligned((size_t)(count * p.width) * 4);
    float *sums = (float *)aligned((size_t)(count * p.padded_groups) * 4);
    int32_t *first_group = (int32_t *)aligned((size_t)(p.blocks * (1 + lanes)) * 4);
    if (!laid || !sums || !first_group || lay_out(&p, laid, inputs, input_type, stride, lanes)) {
        free(laid), free(sums), free(first_group);
        return NO_MEMORY;
    }
    int32_t *lane_group = first_group + p.blocks;
    p.inputs = laid, p.first_group = first_group, p.lane_group = lane_group;
    if (!c->table && c->kind != ZERO_NONE) {
        sum_groups(sums, p.padded_groups, &p, inputs, input_type, stride);
        p.sums = sums;
    }
    for (int64_t b = 0; b < p.blocks; b++) {
        first_group[b] = (int32_t)(b * p.block / group);
        for (int l = 0; l < lanes; l++) {
            const int64_t of = least((b * p.block + l * lane_codes(bits)) / group, groups - 1);
            lane_group[b * lanes + l] = (int32_t)of - first_group[b];
        }
    }
    const RowsTask task = {&p, kernel};
    for_rows(product_body, &task, c->rows, threads);
    free(laid), free(sums), free(first_group);
    return DONE;
}


// out[m, row] = sum over columns of inputs[m, column] * value(row, column), `[count, rows]` without gaps.
EXPORT int posttrain_uniform_product(const uint8_t *codes, const uint16_t *scale, const void *zero,
                                     const int16_t *group_of, int64_t rows, int64_t columns, int64_t groups, int bits,
                                     int kind, const void *inputs, int input_type, int64_t count, int64_t stride,
                                     void *out, int level, int threads) {
    const Codes c = codes_of(codes, scale, zero, group_of, rows, columns, groups, bits, kind);
    return product(&c, inputs, input_type, count, stride, out, level, threads);
}

// The same of `scale * table[code]`; see uniform.h for how scales may be stored.
EXPORT int posttrain_table_product(const uint8_t *codes, const float *table, const void *scale, int scale_type,
                                   const float *scale_table, const float *peaks, float whole, int64_t rows,
                                   int64_t columns, int64_t groups, int bits, const void *inputs, int input_type,
                                   int64_t count, int64_t stride, void *out, int level, int threads) {
    Codes c = codes_of(codes, scale, NULL, NULL, rows, columns, groups, bits, ZERO_NONE);
    c.table = table, c.scale_type = scale_type, c.scale_table = scale_table, c.peaks = peaks, c.whole = whole;
    return product(&c, inputs, input_type, count, stride, out, level, threads);
}
