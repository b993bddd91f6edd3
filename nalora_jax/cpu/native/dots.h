// Sums with vector dot products (AVX512-BF16).

#pragma once

#include "rows.h"

namespace nalora {

class Sums {
 public:
  static constexpr int64_t kRowUnit = 8, kDepthUnit = 2;

  void prepare(const Stretch*, int64_t, int64_t) {}

  template <bool kAdded>
  void run(const Stretch* parts, int64_t count, const Bits* panel, const Target& to, const Ahead&) {
    int64_t row = 0;
    if (to.columns > 16) {
      for (; row < to.rows; row += 8) rows<8, 2, kAdded>(parts, count, row, panel, to);
      return;
    }
    for (; row + 8 < to.rows; row += 16) rows<16, 1, kAdded>(parts, count, row, panel, to);
    for (; row < to.rows; row += 8) rows<8, 1, kAdded>(parts, count, row, panel, to);
  }

 private:
  // 16 registers of sums: enough dot products in flight to hide the latency of one.
  template <int kRows, int kWide, bool kAdded>
  static void rows(const Stretch* parts, int64_t count, int64_t row, const Bits* panel, const Target& to) {
    __m512 sums[kRows][kWide];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 2
      for (int64_t w = 0; w < kWide; w++) {
        // Additions are to whole blocks only.
        const float* from = static_cast<const float*>(to.out) + (row + r) * to.stride + 16 * w;
        sums[r][w] = kAdded ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
      }
    }
    for (const Stretch* part = parts; part != parts + count; part++) {
      const Bits* x = part->x + row * part->stride;
      for (int64_t left = part->depth; left > 0; left -= kStep, panel += kPanelStep) {
        const Bits* y = panel;
#pragma GCC unroll 1
        for (const Bits* end = panel + std::min(left + 1, kStep) / 2 * kStep; y != end; y += kStep, x += 2) {
          __m512bh columns[kWide];
#pragma GCC unroll 2
          for (int64_t w = 0; w < kWide; w++) columns[w] = (__m512bh)_mm512_load_si512(y + w * kTile);
#pragma GCC unroll 16
          for (int64_t r = 0; r < kRows; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * part->stride, sizeof(pair));
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
            for (int64_t w = 0; w < kWide; w++) sums[r][w] = _mm512_dpbf16_ps(sums[r][w], both, columns[w]);
          }
        }
      }
    }
    const int64_t n = std::min<int64_t>(kRows, to.rows - row);
    const __mmask32 mask = to.columns >= 32 ? ~0u : (1u << to.columns) - 1;
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; r++) {
      if (r == n) break;
      const int64_t at = (row + r) * to.stride;
      if (to.rounded) {
        const __m512 right = kWide == 2 ? sums[r][kWide - 1] : _mm512_setzero_ps();
        _mm512_mask_storeu_epi16(static_cast<Bits*>(to.out) + at, mask, (__m512i)_mm512_cvtne2ps_pbh(right, sums[r][0]));
        continue;
      }
#pragma GCC unroll 2
      for (int64_t w = 0; w < kWide; w++) {
        _mm512_mask_storeu_ps(static_cast<float*>(to.out) + at + 16 * w, mask >> 16 * w, sums[r][w]);
      }
    }
  }
};

}  // namespace nalora
