// Products and values of uniform codes: `w = scale * (code - zero)`, or `scale * code + zero` with a float zero.
//
// A row of codes is cut into blocks of 16 (8) lanes of 32 bits with as many whole codes each as is convenient. The
// inputs are laid out once a call in the order in which a block gives its codes away: code j of all lanes, then code
// j + 1. A product is summed up a group at a time over `code + bias`, small integers that are exact; what is missing
// to the value, `offset = scale * -(bias + zero)` or `zero - scale * bias`, is multiplied by the sum of the group's
// inputs.

#ifndef POSTTRAIN_UNIFORM_H
#define POSTTRAIN_UNIFORM_H

#include "native.h"

enum { TILE = 4 };        // rows of inputs that are multiplied at once
enum { PANEL = 16 };      // rows of weights that stay in the first cache while the tiles pass
enum { LANES_512 = 16, LANES_ANY = 8 };

enum { SCALE_HALF = 0, SCALE_FLOAT = 1, SCALE_BYTE = 2 };  // how scales are stored
enum { PEAK_ROWS = 256 };
#define SMALLEST 1e-12f  // scale

typedef struct {
    const uint8_t *codes;  // [rows, code_bytes]
    const void *scale;  // [rows, groups] fp16, fp32, or bytes that stand for scale_table[byte] * peak + whole
    const void *zero;  // packed like the codes, [rows, zero_bytes]; or [rows, groups] fp16; or nothing
    const int16_t *group_of;  // [columns], or nothing: groups are runs of columns
    int64_t rows, columns, groups, code_bytes, zero_bytes;
    int bits, kind;
    const float *table;  // [2^bits] the codes' values in the place of `code - zero`, or nothing
    int scale_type;
    const float *scale_table;  // [256]
    const float *peaks;  // [rows / 256, groups], or nothing: 1
    float whole;
} Codes;

INLINE float scale_at(const Codes *c, int64_t row, int64_t g) {
    const int64_t i = row * c->groups + g;
    if (c->scale_type == SCALE_HALF) return float_of_half(((const uint16_t *)c->scale)[i]);
    if (c->scale_type == SCALE_FLOAT) return ((const float *)c->scale)[i];
    const float found = c->scale_table[((const uint8_t *)c->scale)[i]];
    if (!c->peaks) return found;
    const float scale = found * c->peaks[row / PEAK_ROWS * c->groups + g] + c->whole;
    return scale > SMALLEST ? scale : SMALLEST;
}

typedef struct {
    Codes codes;
    const float *inputs;  // [count, width] in the order of the blocks
    const float *sums;  // [count, padded_groups] of a group's inputs, or nothing: there are no offsets
    int64_t count, width, padded_groups;
    void *out;  // [count, rows]
    int out_type;
    int64_t blocks, block, block_bytes, last_bytes;  // how many a row has, of so many columns and bytes
    float bias;
    int one_group;  // whether a block lies in one group
    const int32_t *first_group;  // [blocks] the group of its first lane
    const int32_t *lane_group;  // [blocks, lanes] the lanes' groups, counted from that
    uint8_t spread[64];  // the byte of a block that goes to each byte of a register
    uint32_t lane_shift[16];  // what is to be shifted out of each lane then
    uint8_t sixteen_bytes[64];
    uint32_t sixteen_shift[16];
} Product;

INLINE int lane_codes(int bits) { return bits == 1 ? 32 : bits == 2 ? 16 : bits <= 4 ? 8 : 4; }
INLINE float middle(int bits) { return (float)(1 << (bits - 1)); }

Codes codes_of(const uint8_t *codes, const void *scale, const void *zero, const int16_t *group_of, int64_t rows,
               int64_t columns, int64_t groups, int bits, int kind);

// Constants that spread 16 codes in a row over 32-bit lanes.
void set_sixteen(uint8_t bytes[64], uint32_t shift[16], int bits);

// Rows begin to end of the product, of `tile` rows of inputs from `first` on.
typedef void (*LaneRows)(const Product *p, int64_t begin, int64_t end, int64_t first, int tile);
void lane_rows_portable(const Product *p, int64_t begin, int64_t end, int64_t first, int tile);
void lane_rows_avx2(const Product *p, int64_t begin, int64_t end, int64_t first, int tile);
void lane_rows_avx512(const Product *p, int64_t begin, int64_t end, int64_t first, int tile);

// The product in integers, see digits_avx512.c. NOT_OFFERED where groups or inputs do not suit.
int digits_product(const Codes *c, const void *inputs, int type, int64_t count, int64_t stride, void *out, int threads);
// The same of inputs that are signed bytes times a scale each row; out fp32.
int bytes_product(const Codes *c, const int8_t *inputs, const float *scale, int64_t count, float *out, int threads);

// The values themselves, in the order of the columns.
typedef struct {
    Codes codes;
    const int32_t *group_index;  // [columns], or nothing: groups are runs of columns
    uint8_t sixteen_bytes[64];
    uint32_t sixteen_shift[16];
    uint8_t words_bytes[64];  // the same for 32 codes in a row, 16 bits each
    uint16_t words_shift[32];
} Values;

// A row's scales and zeros (as codes or values) as fp32; its values; a dot product of fp32 vectors.
typedef void (*TablesOf)(const Values *v, int64_t row, float *scale, float *zero);
typedef void (*ValuesOf)(const Values *v, int64_t row, const float *scale, const float *zero, void *out, int type,
                         uint8_t *room);
typedef float (*DotOf)(const float *a, const float *b, int64_t n);

void uniform_tables_avx512(const Values *v, int64_t row, float *scale, float *zero);
void uniform_values_avx512(const Values *v, int64_t row, const float *scale, const float *zero, void *out, int type,
                           uint8_t *room);
float dot_avx512(const float *a, const float *b, int64_t n);

// The product through the values of each row, for groups that do not lie well in blocks.
int product_by_values(const Codes *c, const void *inputs, int type, int64_t count, int64_t stride, void *out, int level,
                      int threads);

#endif
