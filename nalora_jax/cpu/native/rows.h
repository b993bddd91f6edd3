// Packing, and rows of numbers. AVX2 suffices where memory is the limit; only the rounding uses AVX-512.

#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace nalora {

INLINED __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINED void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

// Interleaves two rows of 32 numbers for a panel.
inline void pack_pair(const Bits* even, const Bits* odd, Bits* panel) {
  for (int64_t tile = 0; tile < 2; tile++) {
    const __m256i e = load(even + 16 * tile), o = load(odd + 16 * tile);
    const __m256i low = _mm256_unpacklo_epi16(e, o), high = _mm256_unpackhi_epi16(e, o);
    store(panel + tile * kTile, _mm256_permute2x128_si256(low, high, 0x20));
    store(panel + tile * kTile + 16, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

// Packs up to 32 columns of y [depth, ...], whose rows are `stride` apart; columns and depth are padded with zeros.
inline void pack(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
  Bits edges[2][kSide] = {};
  const auto row = [=](int64_t k, Bits* edge) -> const Bits* {
    if (k < depth && columns >= kSide) return y + k * stride;
    const int64_t n = k < depth ? columns : 0;
    for (int64_t j = 0; j < kSide; j++) edge[j] = j < n ? y[k * stride + j] : 0;
    return edge;
  };
  for (int64_t k = 0; k < up(depth, kStep); k += 2) {
    pack_pair(row(k, edges[0]), row(k + 1, edges[1]), panel + k / kStep * kPanelStep + k % kStep / 2 * kStep);
  }
}

// Transposes 8 x 8 numbers of 32 bits.
inline void turn(__m256i* r) {
  __m256i t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
  std::copy_n(t, 8, r);
}

// The same as `pack` for y [columns, depth].
inline void pack_transposed(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
  for (int64_t k = 0; k < depth; k += kStep) {
    const int64_t n = std::min(kStep, depth - k);
    for (int64_t c = 0; c < kSide; c += 16, panel += kTile) {
      for (int64_t part = 0; part < 4; part++) {
        const int64_t column = c + part % 2 * 8, pair = part / 2 * 8;  // 8 columns and 8 pairs of the depth
        __m256i r[8];
        for (int64_t i = 0; i < 8; i++) {
          const Bits* from = y + (column + i) * stride + k + 2 * pair;
          if (column + i < columns && 2 * pair + 16 <= n) {
            r[i] = load(from);
            continue;
          }
          Bits edge[16];
          for (int64_t j = 0; j < 16; j++) edge[j] = column + i < columns && 2 * pair + j < n ? from[j] : 0;
          r[i] = load(edge);
        }
        turn(r);
        for (int64_t i = 0; i < 8; i++) store(panel + (pair + i) * kStep + part % 2 * 16, r[i]);
      }
    }
  }
}

// out[j, i] = in[i, j] for 32 x 32 bfloat16 numbers.
inline void transposed(const Bits* in, int64_t stride, Bits* out, int64_t out_stride) {
  for (int64_t i = 0; i < kSide; i += 8) {
    for (int64_t j = 0; j < kSide; j += 8) {
      __m256i r[8];
      for (int64_t k = 0; k < 8; k++) {
        const auto* from = reinterpret_cast<const __m128i*>(in + (i + k) * stride + j);
        r[k] = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
      }
      turn(r);
      for (int64_t k = 0; k < 8; k++) {
        const __m256i low = _mm256_permute4x64_epi64(_mm256_packus_epi32(r[k], r[k]), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (j + k) * out_stride + i), _mm256_castsi256_si128(low));
      }
    }
  }
}

// The same for floats.
inline void transposed(const float* in, int64_t stride, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < kSide; i += 8) {
    for (int64_t j = 0; j < kSide; j += 8) {
      __m256i r[8];
      for (int64_t k = 0; k < 8; k++) r[k] = load(in + (i + k) * stride + j);
      turn(r);
      for (int64_t k = 0; k < 8; k++) store(out + (j + k) * out_stride + i, r[k]);
    }
  }
}

// Rounds the first n (at most 32) of 32 floats to nearest even.
inline void round_row(const float* in, int64_t n, Bits* out) {
#ifdef __AVX512BF16__
  const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + 16), _mm512_loadu_ps(in));
  _mm512_mask_storeu_epi16(out, n >= 32 ? ~0u : (1u << n) - 1, (__m512i)both);
#else
  Bits all[kSide];
  Bits* to = n < kSide ? all : out;
  for (int64_t j = 0; j < kSide; j++) to[j] = rounded(in[j]);
  if (n < kSide) std::copy_n(all, n, out);
#endif
}

// The sum of 32 floats by halves: all CPUs use this order.
inline float sum_of(const float* lanes) {
  float sums[kSide];
  std::copy_n(lanes, kSide, sums);
  for (int64_t half = kSide / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; j++) sums[j] += sums[j + half];
  }
  return sums[0];
}

inline float most_of(const float* lanes) {
  float most = lanes[0];
  for (int64_t j = 1; j < kSide; j++) most = lanes[j] > most ? lanes[j] : most;
  return most;
}

}  // namespace nalora
