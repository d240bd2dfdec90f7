/* Row-wise functions of training and sampling, each one pass over memory where PyTorch needs several.
 *
 * Numbers are fp32 or bf16 in memory and fp32 in arithmetic; where the plain path rounds to bf16 between two operations,
 * so do these. Rows are shared among threads; a row is always computed by one, so results do not depend on their number
 * (the weight gradient of a norm is summed thread by thread: it does, in its last bits). */
#ifndef POSTTRAIN_FUSED_H
#define POSTTRAIN_FUSED_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define EXPORT __attribute__((visibility("default")))

typedef uint16_t bf16;

/* sixteen numbers of 16 bits, and two of them dealt out in turn: the first halves of both, the second halves of both */
typedef uint16_t lanes __attribute__((vector_size(32)));
#if defined(__clang__)
#define FIRST_HALVES(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define SECOND_HALVES(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define FIRST_HALVES(a, b) __builtin_shuffle(a, b, (lanes){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define SECOND_HALVES(a, b) \
  __builtin_shuffle(a, b, (lanes){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif
#define LINE 64           /* bytes that memory is read by */
#define AHEAD 8           /* rows that are asked for before they are wanted, where they do not follow each other */
#define HEADS 4           /* query heads that share a reading of the keys */
#define TRANSPOSE_BAND 64 /* columns that a thread transposes at a time: what it writes stays in its cache */

/* numbers in vectors of 4, 8 or 16, and two vectors dealt out in turn as above */
#define VECTORS_OF(count) \
  typedef float floats##count __attribute__((vector_size(4 * count))); \
  typedef uint32_t words##count __attribute__((vector_size(4 * count)));
VECTORS_OF(4)
VECTORS_OF(8)
VECTORS_OF(16)
#define FIRST_4 0, 4, 1, 5
#define SECOND_4 2, 6, 3, 7
#define FIRST_8 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND_8 4, 12, 5, 13, 6, 14, 7, 15
#define FIRST_16 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND_16 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define PASTED(a, b) a##b
#define PASTE(a, b) PASTED(a, b)
#define OF_LANES(name) PASTE(name, LANES)
#define FIRST_LANES OF_LANES(FIRST_)
#define SECOND_LANES OF_LANES(SECOND_)
#if defined(__clang__)
#define DEAL(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DEAL(a, b, ...) __builtin_shuffle(a, b, (OF_LANES(words)){__VA_ARGS__})
#endif

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float widen(bf16 value) { return bits_to_float((uint32_t)value << 16); }

/* to the nearest, ties to even; a NaN stays one */
static inline bf16 narrow(float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t nan = (bits >> 16) | 0x40;
  return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? nan : nearest);
}

/* e^x to about one unit in the last place; 0 below -87.3, where a float would lose digits; x is at most 88 */
static inline float exponential(float x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
  float clamped = x < -87.3f ? -87.3f : x;
  float n = (clamped * 1.44269504088896341f + magic) - magic;
  float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  float scaled = p * bits_to_float((uint32_t)((int32_t)n + 127) << 23);
  return x < -87.3f ? 0.0f : scaled;
}

static inline float sigmoid(float x) {
  float e = exponential(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

#endif
