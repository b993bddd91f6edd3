// Functions of one number, without branches or calls, so that compilers vectorise loops that contain them; and the same
// for a register of AVX-512, because compilers do not find half of its instructions.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "numbers.h"

namespace nalora {

// A missing score or logit: far below any other, but finite.
constexpr float kUnseen = -1e30f;

constexpr float kLog2E = 1.44269504f;

// 2^t = 2^n p with n the integer next to t: returns p, to 1.5 units of the last place (the polynomial of degree 5 through
// 1 at 0 whose largest relative error, 8e-8, is the least), and n in the lowest bits of `shifted`.
template <typename Value>
INLINED Value power_parts(Value t, Value& shifted) {
  shifted = t + 12582912.0f;
  const Value f = t - (shifted - 12582912.0f);
  Value p = f * 1.327463309e-3f + 9.671961889e-3f;
  p = p * f + 5.550678447e-2f;
  p = p * f + 2.402223498e-1f;
  p = p * f + 6.931470633e-1f;
  return p * f + 1.0f;
}

// exp(x) = 2^t, with t clipped to -125 and 127; NaN stays NaN. Rounding x log2 e adds 6e-8 |x| to the relative error.
INLINED float exponential(float x) {
  float t = x * kLog2E;
  t = t < -125.0f ? -125.0f : t;
  t = t > 127.0f ? 127.0f : t;
  float shifted, p = power_parts(t, shifted);
  int32_t bits, power;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&power, &shifted, sizeof(power));
  bits += power << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

INLINED float capped(float score, float cap) {
  return cap * (1.0f - 2.0f / (exponential(2.0f * (score / cap)) + 1.0f));
}

// The floats that are processed at a time.
#ifdef __AVX512F__
using Lanes = __m512;

INLINED Lanes lanes(const float* from) { return _mm512_loadu_ps(from); }
INLINED void put(float* to, Lanes values) { _mm512_storeu_ps(to, values); }
INLINED Lanes larger(Lanes x, Lanes y) { return _mm512_max_ps(x, y); }

INLINED Lanes exponential(Lanes x) {
  // Of a NaN and a number both instructions return the second operand.
  const Lanes t = _mm512_min_ps(_mm512_set1_ps(127.0f), _mm512_max_ps(_mm512_set1_ps(-125.0f), x * kLog2E));
  Lanes shifted;
  const Lanes p = power_parts(t, shifted);
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}
#else
using Lanes = float;

INLINED Lanes lanes(const float* from) { return *from; }
INLINED void put(float* to, Lanes value) { *to = value; }
INLINED Lanes larger(Lanes x, Lanes y) { return x > y ? x : y; }
#endif
constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);

}  // namespace nalora
