// Functions of one number, without branches or calls, so that compilers vectorise the loops around them.

#pragma once

#include "numbers.h"

namespace nalora {

// A score or logit that is not there: far below any, but finite.
constexpr float kUnseen = -1e30f;

// exp to 2 units of the last place, of x cut off at -87 and `most`; NaN stays NaN (Cephes' polynomial).
INLINED float exponential(float x, float most = 88.0f) {
  x = x < -87.0f ? -87.0f : x;
  x = x > most ? most : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // the nearest integer, in the lowest bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
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

}  // namespace nalora
