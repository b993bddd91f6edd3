// Packing and rows of numbers with AVX-512, and BF16's roundings.

#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace nalora {

inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// Two rows of 32 numbers, interleaved as a panel wants them.
inline void pack_pair(__m512i even, __m512i odd, Bits* panel) {
  alignas(64) static const uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_load_si512(kOrder);
  _mm512_store_si512(panel, _mm512_permutex2var_epi16(even, order, odd));
  _mm512_store_si512(panel + kTile,
                     _mm512_permutex2var_epi16(even, _mm512_add_epi16(order, _mm512_set1_epi16(16)), odd));
}

inline void pack_pair(const Bits* even, const Bits* odd, Bits* panel) {
  pack_pair(_mm512_loadu_si512(even), _mm512_loadu_si512(odd), panel);
}

// 32 columns (or fewer: zeros) of y [depth, ...], whose rows are `stride` apart; the depth filled up with zeros.
inline void pack(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
  const __mmask32 mask = first(columns);
  for (int64_t k = 0; k < up(depth, kStep); k += 2) {
    const __m512i even = k < depth ? _mm512_maskz_loadu_epi16(mask, y + k * stride) : _mm512_setzero_si512();
    const __m512i odd = k + 1 < depth ? _mm512_maskz_loadu_epi16(mask, y + (k + 1) * stride) : _mm512_setzero_si512();
    pack_pair(even, odd, panel + k / kStep * kPanelStep + k % kStep / 2 * kStep);
  }
}

// Turns 16 x 16 numbers of 32 bits.
inline void turn(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// As `pack`, of y [columns, depth].
inline void pack_transposed(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
  for (int64_t k = 0; k < depth; k += kStep) {
    const __mmask32 mask = first(depth - k);
    for (int64_t c = 0; c < kSide; c += 16, panel += kTile) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; i++) {
        r[i] = c + i < columns ? _mm512_maskz_loadu_epi16(mask, y + (c + i) * stride + k) : _mm512_setzero_si512();
      }
      turn(r);
      for (int64_t i = 0; i < 16; i++) _mm512_store_si512(panel + i * kStep, r[i]);
    }
  }
}

// The first n (at most 32) of 32 floats, to nearest even.
inline void round_row(const float* in, int64_t n, Bits* out) {
  const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + 16), _mm512_loadu_ps(in));
  _mm512_mask_storeu_epi16(out, first(n), (__m512i)both);
}

inline float sum_of(const float* lanes) {
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_loadu_ps(lanes), _mm512_loadu_ps(lanes + 16)));
}

inline float most_of(const float* lanes) {
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_loadu_ps(lanes), _mm512_loadu_ps(lanes + 16)));
}

// out[j, i] = in[i, j] of 32 x 32 numbers.
template <typename T>
inline void transposed(const T* in, int64_t stride, T* out, int64_t out_stride) {
  for (int64_t i = 0; i < kSide; i += 16) {
    for (int64_t j = 0; j < kSide; j += 16) {
      __m512i r[16];
      for (int64_t k = 0; k < 16; k++) {
        const T* from = in + (i + k) * stride + j;
        if constexpr (sizeof(T) == 4) {
          r[k] = _mm512_loadu_si512(from);
        } else {
          r[k] = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        }
      }
      turn(r);
      for (int64_t k = 0; k < 16; k++) {
        T* to = out + (j + k) * out_stride + i;
        if constexpr (sizeof(T) == 4) {
          _mm512_storeu_si512(to, r[k]);
        } else {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(r[k]));
        }
      }
    }
  }
}

}  // namespace nalora
