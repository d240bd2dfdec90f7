// Products in integers: what is made ready once a call (digits.c) and the rows themselves (digits_avx512.c).

#ifndef POSTTRAIN_DIGITS_H
#define POSTTRAIN_DIGITS_H

#include "avx512.h"

#if X86

enum { LONGEST_SPAN = 512, DIGITS = 3, PAIR = 2 };

typedef struct {
    Codes codes;
    int digits;
    const int8_t *inputs;  // [count, blocks, parts, digits, 64]
    const int32_t *start;  // [count, spans, digits, 16] what sums of a span begin at: it takes the codes' middle away
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

// Rows begin to end of the product, of `tile` (1 or 2) rows of inputs from `first` on.
void digit_rows(const Digits *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room);

#endif
#endif
