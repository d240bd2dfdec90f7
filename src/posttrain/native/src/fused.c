#include "fused.h"

#define LEVEL portable
#define LANES 4
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#include "types.inc"
#undef MULTIPLY_ADD
#undef LANES
#undef LEVEL

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LEVELS 3
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LEVEL avx2
#define LANES 8
#define MULTIPLY_ADD(a, b, c) ((floats8)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "types.inc"
#undef MULTIPLY_ADD
#undef LANES
#undef LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define LEVEL avx512
#define LANES 16
#define MULTIPLY_ADD(a, b, c) ((floats16)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "types.inc"
#undef MULTIPLY_ADD
#undef LANES
#undef LEVEL
#pragma GCC pop_options

#else
#define LEVELS 1
#endif

/* the best level of this processor: 0 portable, 1 avx2, 2 avx512; the functions of lower ones are there, too */
EXPORT int posttrain_fused_level(void) {
#if LEVELS == 3
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? 2 : 1;
#else
  return 0;
#endif
}
