// The values of uniform codes, and products through them.

#include "uniform.h"

INLINE void tables(const Values *v, int64_t row, float *scale, float *zero) {
    const Codes *c = &v->codes;
    for (int64_t g = 0; g < c->groups; g++) scale[g] = scale_at(c, row, g);
    for (int64_t g = 0; g < c->groups; g++) {
        if (c->kind == ZERO_NONE)
            zero[g] = middle(c->bits);
        else if (c->kind == ZERO_INTEGER)
            zero[g] = (float)code_at((const uint8_t *)c->zero + row * c->zero_bytes, c->zero_bytes, c->bits, g);
        else
            zero[g] = float_of_half(((const uint16_t *)c->zero)[row * c->groups + g]);
    }
}

INLINE void run_of_values(const Codes *c, const uint8_t *code, int64_t n, float scale, float zero, void *out,
                          int type) {
    if (c->table)
        for (int64_t k = 0; k < n; k++) store(out, type, k, c->table[code[k]] * scale);
    else if (c->kind == ZERO_FLOAT)
        for (int64_t k = 0; k < n; k++) store(out, type, k, (float)code[k] * scale + zero);
    else
        for (int64_t k = 0; k < n; k++) store(out, type, k, ((float)code[k] - zero) * scale);
}

// Rounded as float arithmetic in two steps rounds: the compiler is told not to fuse multiplications and additions.
INLINE void values(const Values *v, int64_t row, const float *scale, const float *zero, void *out, int type,
                   const uint8_t *code) {
    const Codes *c = &v->codes;
    const int64_t group = c->columns / c->groups, size = type == BF16 ? 2 : 4;
    if (v->group_index) {
        for (int64_t k = 0; k < c->columns; k++) {
            const int32_t of = v->group_index[k];
            run_of_values(c, code + k, 1, scale[of], zero[of], (char *)out + k * size, type);
        }
    } else {
        for (int64_t g = 0; g < c->groups; g++) {
            const int64_t at = g * group;
            run_of_values(c, code + at, group, scale[g], zero[g], (char *)out + at * size, type);
        }
    }
    (void)row;
}

INLINE float dot(const float *a, const float *b, int64_t n, int fused) {
    float sum[8] = {0};
    int64_t k = 0;
    for (; k + 8 <= n; k += 8)
        for (int i = 0; i < 8; i++)
            sum[i] = fused ? __builtin_fmaf(a[k + i], b[k + i], sum[i]) : a[k + i] * b[k + i] + sum[i];
    for (int i = 0; k < n; k++, i++) sum[i] += a[k] * b[k];
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

INLINE void unpacked_row(const Values *v, int64_t row, uint8_t *to, int level) {
    const Codes *c = &v->codes;
    unpacker(level)(c->codes + row * c->code_bytes, c->code_bytes, c->bits, c->columns, to);
}

static void tables_portable(const Values *v, int64_t row, float *scale, float *zero) { tables(v, row, scale, zero); }
static void values_portable(const Values *v, int64_t row, const float *scale, const float *zero, void *out, int type,
                            uint8_t *room) {
    unpacked_row(v, row, room, PORTABLE);
    values(v, row, scale, zero, out, type, room);
}
static float dot_portable(const float *a, const float *b, int64_t n) { return dot(a, b, n, 0); }

#if X86
FOR_AVX2 static void tables_avx2(const Values *v, int64_t row, float *scale, float *zero) {
    tables(v, row, scale, zero);
}
FOR_AVX2 static void values_avx2(const Values *v, int64_t row, const float *scale, const float *zero, void *out,
                                 int type, uint8_t *room) {
    unpacked_row(v, row, room, AVX2);
    values(v, row, scale, zero, out, type, room);
}
FOR_AVX2 static float dot_avx2(const float *a, const float *b, int64_t n) { return dot(a, b, n, 1); }
#endif

typedef struct {
    Values values;
    TablesOf tables_of;
    ValuesOf values_of;
    DotOf dot_of;
    const float *inputs;  // [count, columns], or nothing: the values themselves are wanted
    int64_t count, first_row;
    void *out;
    int out_type;
    char *scratch;  // of each thread: scales, zeros, values, codes
    int64_t scratch_bytes, padded_groups, padded_columns;
    int32_t *index;
} Task;

// What is left of the task: its constants, scratch, and the functions of the level.
static int prepare(Task *t, const Codes *c, int ordered, int level, int threads) {
    t->values.codes = *c;
    set_sixteen(t->values.sixteen_bytes, t->values.sixteen_shift, c->bits);
    for (int i = 0; i < 32; i++) {
        t->values.words_bytes[2 * i] = (uint8_t)(i * c->bits >> 3);
        t->values.words_bytes[2 * i + 1] = (uint8_t)((i * c->bits >> 3) + 1);
        t->values.words_shift[i] = (uint16_t)(i * c->bits & 7);
    }
    t->padded_groups = rounded_up(c->groups, 16), t->padded_columns = rounded_up(c->columns, 16);
    t->scratch_bytes = rounded_up(t->padded_groups * 8 + t->padded_columns * 5, 64);
    t->scratch = (char *)aligned((size_t)(t->scratch_bytes * threads));
    t->index = ordered ? (int32_t *)aligned((size_t)c->columns * 4) : NULL;
    if (!t->scratch || (ordered && !t->index)) return NO_MEMORY;
    const int64_t group = c->columns / c->groups;
    for (int64_t k = 0; ordered && k < c->columns; k++)
        t->index[k] = c->group_of ? (int32_t)least(c->group_of[k] & 0x7fff, c->groups - 1) : (int32_t)(k / group);
    t->values.group_index = t->index;
    t->tables_of = tables_portable, t->values_of = values_portable, t->dot_of = dot_portable;
#if X86
    if (level == AVX2) t->tables_of = tables_avx2, t->values_of = values_avx2, t->dot_of = dot_avx2;
    if (level >= AVX512)
        t->tables_of = uniform_tables_avx512, t->values_of = uniform_values_avx512, t->dot_of = dot_avx512;
#endif
    (void)level;
    return DONE;
}

static void body(const void *task, int64_t begin, int64_t end, int thread) {
    const Task *t = (const Task *)task;
    const Codes *c = &t->values.codes;
    const int64_t size = t->out_type == BF16 ? 2 : 4;
    float *scale = (float *)(t->scratch + t->scratch_bytes * thread), *zero = scale + t->padded_groups;
    float *weights = zero + t->padded_groups;
    uint8_t *room = (uint8_t *)(weights + t->padded_columns);
    for (int64_t row = begin; row < end; row++) {
        t->tables_of(&t->values, t->first_row + row, scale, zero);
        if (!t->inputs) {
            char *to = (char *)t->out + row * c->columns * size;
            t->values_of(&t->values, t->first_row + row, scale, zero, to, t->out_type, room);
            continue;
        }
        t->values_of(&t->values, row, scale, zero, weights, FP32, room);
        for (int64_t m = 0; m < t->count; m++)
            store(t->out, t->out_type, m * c->rows + row, t->dot_of(weights, t->inputs + m * c->columns, c->columns));
    }
}

int product_by_values(const Codes *c, const void *inputs, int type, int64_t count, int64_t stride, void *out, int level,
                      int threads) {
    Task t = {.count = count, .out = out, .out_type = type};
    float *x = (float *)aligned((size_t)(count * c->columns) * 4);
    int failed = prepare(&t, c, 1, level, threads) || !x ? NO_MEMORY : DONE;
    if (!failed) {
        for (int64_t m = 0; m < count; m++) as_floats(x + m * c->columns, inputs, type, m * stride, c->columns);
        t.inputs = x;
        for_rows(body, &t, c->rows, threads);
    }
    free(x), free(t.scratch), free(t.index);
    return failed;
}

static int values_of(const Codes *c, int64_t first_row, int64_t count, void *out, int out_type, int level,
                     int threads) {
    Task t = {.first_row = first_row, .out = out, .out_type = out_type};
    const int failed = prepare(&t, c, c->group_of || c->columns / c->groups % 16, level, threads);
    if (!failed) for_rows(body, &t, count, threads);
    free(t.scratch), free(t.index);
    return failed;
}

// The values of rows first_row to first_row + count, `[count, columns]` fp32 or bf16 without gaps.
EXPORT int posttrain_uniform_values(const uint8_t *codes, const uint16_t *scale, const void *zero,
                                    const int16_t *group_of, int64_t rows, int64_t columns, int64_t groups, int bits,
                                    int kind, int64_t first_row, int64_t count, void *out, int out_type, int level,
                                    int threads) {
    const Codes c = codes_of(codes, scale, zero, group_of, rows, columns, groups, bits, kind);
    return values_of(&c, first_row, count, out, out_type, level, threads);
}

// The same of `scale * table[code]`.
EXPORT int posttrain_table_values(const uint8_t *codes, const float *table, const void *scale, int scale_type,
                                  const float *scale_table, const float *peaks, float whole, int64_t rows,
                                  int64_t columns, int64_t groups, int bits, int64_t first_row, int64_t count,
                                  void *out, int out_type, int level, int threads) {
    Codes c = codes_of(codes, scale, NULL, NULL, rows, columns, groups, bits, ZERO_NONE);
    c.table = table, c.scale_type = scale_type, c.scale_table = scale_table, c.peaks = peaks, c.whole = whole;
    return values_of(&c, first_row, count, out, out_type, level, threads);
}
