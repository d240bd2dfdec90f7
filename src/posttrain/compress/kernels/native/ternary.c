// Products of ternary planes, five trits a byte: trit i of a byte is its digit of weight 3^i, less one.
//
// 32 trits in a row are spread to 16 bits each, every one with its byte, whose digits are those of a fraction: byte *
// 270 is byte * 65536 / 243 and a little more, too little to reach the next digit. Multiplied by a power of three it
// loses the digits above the wanted one (they overflow), and multiplied by three once more it gives that digit away.

#include "avx512.h"

enum { TRITS = 5, STEP = 32, PHASES = 5 };  // 5 steps are 160 trits, 32 bytes

typedef struct {
    const uint8_t *trits;  // [planes, rows, bytes]
    const uint16_t *scale;  // [planes, rows, groups] fp16
    int64_t rows, columns, groups, group, bytes, count, width, padded_groups;
    int planes;
    const float *ordered;  // [count, columns] fp32, for the kernel in plain C
    // otherwise integers of 31 bits in two words, [count, steps, 2, 32]; what sums begin at, [count, groups, 2, 16],
    // which takes 1 from each digit; and what the integers are to be multiplied by, [count, padded_groups]
    const int16_t *words;
    const int32_t *start;
    const float *input_scale;
    void *out;
    int out_type;
    _Alignas(64) uint8_t places[PHASES][64];
    _Alignas(64) uint16_t powers[PHASES][32];
    uint8_t *room;  // of each thread: a row of digits
    const uint64_t *table;  // the digits of each byte, a byte each
} Ternary;

typedef void (*TernaryRows)(const Ternary *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room);

INLINE void any_rows(const Ternary *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room) {
    for (int64_t row = begin; row < end; row++) {
        float y[TILE] = {0};
        for (int plane = 0; plane < p->planes; plane++) {
            const int64_t at = plane * p->rows + row;
            const uint8_t *from = p->trits + at * p->bytes;
            for (int64_t i = 0; i < p->bytes; i++) memcpy(room + i * TRITS, &p->table[from[i]], 8);
            for (int64_t g = 0; g < p->groups; g++) {
                const int8_t *trit = (const int8_t *)room + g * p->group;
                const float scale = float_of_half(p->scale[at * p->groups + g]);
                for (int m = 0; m < tile; m++) {
                    const float *x = p->ordered + (first + m) * p->columns + g * p->group;
                    Floats sum = {0};
                    int64_t k = 0;
                    for (; k + 8 <= p->group; k += 8) {
                        Bytes eight;
                        Floats with;
                        memcpy(&eight, trit + k, 8), memcpy(&with, x + k, 32);
                        sum += __builtin_convertvector(__builtin_convertvector(eight, Words), Floats) * with;
                    }
                    float all = total_of(sum);
                    for (; k < p->group; k++) all += (float)trit[k] * x[k];
                    y[m] += scale * all;
                }
            }
        }
        for (int m = 0; m < tile; m++) store(p->out, p->out_type, (first + m) * p->rows + row, y[m]);
    }
}

static void rows_portable(const Ternary *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room) {
    any_rows(p, begin, end, first, tile, room);
}

#if X86
FOR_AVX2 static void rows_avx2(const Ternary *p, int64_t begin, int64_t end, int64_t first, int tile, uint8_t *room) {
    any_rows(p, begin, end, first, tile, room);
}

// What sums of a group begin at, and their addition to the total.
INLINE FOR_AVX512 void begin_group(__m512i sum[][2], const int32_t *start, int64_t stride, const int tile) {
#pragma GCC unroll 4
    for (int m = 0; m < tile; m++) {
        sum[m][0] = _mm512_load_si512(start + m * stride);
        sum[m][1] = _mm512_load_si512(start + m * stride + 16);
    }
}

INLINE FOR_AVX512 void end_group(__m512 *total, __m512i sum[][2], float near[][16], int64_t g, const int tile) {
#pragma GCC unroll 4
    for (int m = 0; m < tile; m++) {
        const __m512 low = _mm512_cvtepi32_ps(sum[m][0]), high = _mm512_cvtepi32_ps(sum[m][1]);
        const __m512 both = _mm512_fmadd_ps(high, _mm512_set1_ps(65536.0f), low);
        total[m] = _mm512_fmadd_ps(_mm512_set1_ps(near[m][g % 16]), both, total[m]);
    }
}

INLINE FOR_AVX512 void scales_of_groups(const Ternary *p, float near[][16], int64_t place, int64_t first, int64_t g,
                                        const int tile) {
    const __m512 scale = halves(p->scale + place * p->groups + g, first_of(p->groups - g));
    for (int m = 0; m < tile; m++) {
        const float *inputs = p->input_scale + (first + m) * p->padded_groups + g;
        _mm512_storeu_ps(near[m], _mm512_mul_ps(scale, _mm512_load_ps(inputs)));
    }
}

INLINE FOR_AVX512 void step_rows(const Ternary *p, int64_t begin, int64_t end, int64_t first, const int tile) {
    const int64_t steps = p->groups == 1 ? p->width / STEP : p->columns / STEP;
    const int64_t a_group = steps / p->groups, stride = p->width * 2, starts = p->groups * 32;
    const __m512i three = _mm512_set1_epi16(3);
    __m512i places[PHASES], powers[PHASES];
    for (int phase = 0; phase < PHASES; phase++) {
        places[phase] = _mm512_load_si512(p->places[phase]);
        powers[phase] = _mm512_load_si512(p->powers[phase]);
    }
    for (int64_t row = begin; row < end; row++) {
        __m512 total[TILE];
        for (int m = 0; m < tile; m++) total[m] = _mm512_setzero_ps();
        for (int plane = 0; plane < p->planes; plane++) {
            const int64_t place = plane * p->rows + row;
            const uint8_t *at = p->trits + place * p->bytes;
            const int16_t *x = p->words + first * stride;
            const int32_t *start = p->start + first * starts;
            __m512i sum[TILE][2];
            float near[TILE][16];
            int64_t g = 0, left = a_group, bytes_left = p->bytes;
            scales_of_groups(p, near, place, first, 0, tile);
            begin_group(sum, start, starts, tile);
            for (int64_t step = 0; step < steps; at += STEP, bytes_left -= STEP) {
                _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
                const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(least(bytes_left, STEP)), at);
#pragma GCC unroll 5
                for (int phase = 0; phase < PHASES; phase++, x += 2 * STEP) {
                    const __m512i one_each = _mm512_permutexvar_epi8(places[phase], bytes);
                    const __m512i fraction = _mm512_mullo_epi16(one_each, powers[phase]);
                    const __m512i digit = _mm512_mulhi_epu16(fraction, three);
#pragma GCC unroll 4
                    for (int m = 0; m < tile; m++) {
                        sum[m][0] = _mm512_dpwssd_epi32(sum[m][0], digit, _mm512_load_si512(x + m * stride));
                        sum[m][1] = _mm512_dpwssd_epi32(sum[m][1], digit, _mm512_load_si512(x + m * stride + STEP));
                    }
                    if (--left == 0) {
                        end_group(total, sum, near, g, tile);
                        left = a_group, g++, start += 32;
                        if (g == p->groups) break;
                        if (g % 16 == 0) scales_of_groups(p, near, place, first, g, tile);
                        begin_group(sum, start, starts, tile);
                    }
                }
                step += PHASES;
            }
        }
        for (int m = 0; m < tile; m++)
            store(p->out, p->out_type, (first + m) * p->rows + row, _mm512_reduce_add_ps(total[m]));
    }
}

FOR_AVX512 static void rows_avx512(const Ternary *p, int64_t begin, int64_t end, int64_t first, int tile,
                                   uint8_t *room) {
    (void)room;
    if (tile == TILE)
        step_rows(p, begin, end, first, TILE);
    else
        for (int m = 0; m < tile; m++) step_rows(p, begin, end, first + m, 1);
}

// A group of inputs, n of them, as integers below 2^30 in two words each; sums: of each lane, by word. What they are
// to be multiplied by, or -1 where one is no finite number.
FOR_AVX512 static float write_words(const float *x, int64_t n, int16_t *to, int32_t *sums) {
    const float power = power_below(x, n, 30);
    const __m512i ones = _mm512_set1_epi16(1), half = _mm512_set1_epi32(1 << 15);
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    if (power < 0) return -1.0f;
    for (int64_t k = 0; k < n; k += STEP, to += 2 * STEP) {
        for (int i = 0; i < STEP; i += 16) {
            const int64_t at = k + i;
            const __m512 some = _mm512_maskz_loadu_ps(at < n ? first_of(n - at) : 0, x + at);
            const __m512i integer = _mm512_cvtps_epi32(_mm512_mul_ps(some, _mm512_set1_ps(power)));
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(integer, half), 16);
            _mm256_store_si256((__m256i *)(to + i), _mm512_cvtepi32_epi16(integer));
            _mm256_store_si256((__m256i *)(to + STEP + i), _mm512_cvtepi32_epi16(high));
        }
        for (int i = 0; i < 2; i++)
            sum[i] = _mm512_dpwssd_epi32(sum[i], ones, _mm512_load_si512(to + i * STEP));
    }
    for (int i = 0; i < 2; i++)
        _mm512_store_si512(sums + i * 16, _mm512_sub_epi32(_mm512_setzero_si512(), sum[i]));
    return 1.0f / power;
}
#endif

typedef struct {
    const Ternary *product;
    TernaryRows rows;
    int64_t room_bytes;
} Task;

static void body(const void *task, int64_t begin, int64_t end, int thread) {
    const Task *t = (const Task *)task;
    for (int64_t row = begin; row < end; row += PANEL)
        for (int64_t m = 0; m < t->product->count; m += TILE)
            t->rows(t->product, row, least(row + PANEL, end), m, (int)least(TILE, t->product->count - m),
                    t->product->room + t->room_bytes * thread);
}

static void set_places(Ternary *p) {
    static const uint16_t power[TRITS] = {81, 27, 9, 3, 1};  // digit 4 is at the top of the fraction already
    memset(p->places, 63, sizeof p->places);  // the highest byte of a register, which holds nothing
    for (int phase = 0; phase < PHASES; phase++)
        for (int i = 0; i < STEP; i++) {
            const int column = phase * STEP + i;
            p->places[phase][2 * i] = (uint8_t)(column / TRITS);
            p->powers[phase][i] = (uint16_t)(270 * power[column % TRITS]);
        }
}

// out[m, row] = sum over planes of the sum over groups of scale * (sum of trit * input), `[count, rows]`.
EXPORT int posttrain_ternary_product(const uint8_t *trits, const uint16_t *scale, int planes, int64_t rows,
                                     int64_t columns, int64_t groups, const void *inputs, int input_type, int64_t count,
                                     int64_t stride, void *out, int level, int threads) {
    Ternary p = {.trits = trits, .scale = scale, .planes = planes, .rows = rows, .columns = columns, .groups = groups};
    p.group = columns / groups, p.bytes = (columns + TRITS - 1) / TRITS, p.count = count;
    p.width = rounded_up(columns, STEP * PHASES), p.padded_groups = rounded_up(groups, 16);
    p.out = out, p.out_type = input_type;
    TernaryRows kernel = rows_portable;
    int in_words = 0;
#if X86
    if (level >= AVX2) kernel = rows_avx2;
    in_words = level >= AVX512 && (groups == 1 || p.group % STEP == 0);
#endif
    (void)level;
    const int64_t room_bytes = rounded_up(p.bytes * TRITS + 8, 64);
    uint64_t table[256];
    for (int byte = 0; byte < 256; byte++) {
        uint8_t trit[8] = {0};
        for (int i = 0, left = byte; i < TRITS; i++, left /= 3) trit[i] = (uint8_t)(left % 3 - 1);
        memcpy(&table[byte], trit, 8);
    }
    p.table = table;
    set_places(&p);
    float *floats = (float *)aligned((size_t)(count * columns) * 4);
    p.room = (uint8_t *)aligned((size_t)(room_bytes * threads));
    int16_t *words = (int16_t *)aligned((size_t)(in_words ? count * p.width * 4 : 0));
    int32_t *start = (int32_t *)aligned((size_t)(in_words ? count * groups * 128 : 0));
    float *input_scale = (float *)aligned((size_t)(count * p.padded_groups) * 4);
    const int failed = floats && p.room && words && start && input_scale ? DONE : NO_MEMORY;
    if (!failed) {
        for (int64_t m = 0; m < count; m++) as_floats(floats + m * columns, inputs, input_type, m * stride, columns);
        p.ordered = floats, p.words = words, p.start = start, p.input_scale = input_scale;
#if X86
        memset(input_scale, 0, (size_t)(count * p.padded_groups) * 4);
        memset(words, 0, (size_t)(in_words ? count * p.width * 4 : 0));
        for (int64_t piece = 0; piece < count * groups && in_words; piece++) {
            const int64_t m = piece / groups, g = piece % groups;
            int16_t *to = words + (m * p.width + g * p.group) * 2;
            const float scale = write_words(floats + m * columns + g * p.group, p.group, to, start + piece * 32);
            input_scale[m * p.padded_groups + g] = scale;
            if (scale < 0) in_words = 0;  // infinities go the way of floats
        }
        if (in_words) kernel = rows_avx512;
#endif
        const Task task = {&p, kernel, room_bytes};
        for_rows(body, &task, rows, threads);
    }
    free(floats), free(p.room), free(words), free(start), free(input_scale);
    return failed;
}
