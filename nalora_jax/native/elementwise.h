// Functions of one number, without branches or calls, so that compilers vectorise the loops around them; and the same of as
// many numbers as a register of AVX-512 holds, half of whose instructions compilers do not find.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "numbers.h"

namespace nalora {

// A score or logit that is not there: far below any, but finite.
constexpr float kUnseen = -1e30f;

// exp(x) = 2^n p, to 2 units of the last place (Cephes' polynomial): returns p, and n in the lowest bits of `shifted`.
template <typename Value>
INLINED Value exp_parts(Value x, Value& shifted) {
  shifted = x * 1.44269504f + 12582912.0f;
  const Value n = shifted - 12582912.0f;
  const Value r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Value p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + (r + 1.0f);
}

// exp of x cut off at -87 and `most`; NaN stays NaN.
INLINED float exponential(float x, float most = 88.0f) {
  x = x < -87.0f ? -87.0f : x;
  x = x > most ? most : x;
  float shifted, p = exp_parts(x, shifted);
  int32_t bits, power;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&power, &shifted, sizeof(power));
  bits += power << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

// The first n of 32 bfloat16 numbers as floats, zeros behind.
INLINED void widen_row(const Bits* from, int64_t n, float* to) {
  alignas(64) Bits bits[kSide] = {};
  const Bits* source = from;
  if (n < kSide) {
    std::copy_n(from, n, bits);
    source = bits;
  }
  for (int64_t j = 0; j < kSide; j++) to[j] = widened(source[j]);
}

INLINED float capped(float score, float cap) {
  return cap * (1.0f - 2.0f / (exponential(2.0f * (score / cap)) + 1.0f));
}

// 1 / x of x between 1 and 2^120: a first guess from the exponent, three of Newton's steps. A fifth of what a division
// takes, which would be most of a pass.
INLINED float reciprocal(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = 0x7ef311c7 - bits;
  float r;
  std::memcpy(&r, &bits, sizeof(r));
  r = r * (2.0f - x * r);
  r = r * (2.0f - x * r);
  return r * (2.0f - x * r);
}

INLINED float magnitude(float x) { return std::fabs(x); }

// As many floats as are taken at a time.
#ifdef __AVX512F__
using Lanes = __m512;

INLINED Lanes lanes(const float* from) { return _mm512_loadu_ps(from); }
INLINED void put(float* to, Lanes values) { _mm512_storeu_ps(to, values); }
INLINED Lanes magnitude(Lanes x) { return _mm512_abs_ps(x); }
INLINED Lanes larger(Lanes x, Lanes y) { return _mm512_max_ps(x, y); }

INLINED Lanes exponential(Lanes x, float most = 88.0f) {
  // Of a NaN and a number both instructions return what comes second.
  x = _mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
  Lanes shifted;
  const Lanes p = exp_parts(x, shifted);
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}

INLINED Lanes reciprocal(Lanes x) {
  const Lanes r = _mm512_rcp14_ps(x);
  return r * (2.0f - x * r);
}
#else
using Lanes = float;

INLINED Lanes lanes(const float* from) { return *from; }
INLINED void put(float* to, Lanes value) { *to = value; }
INLINED Lanes larger(Lanes x, Lanes y) { return x > y ? x : y; }
#endif
constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);

}  // namespace nalora
