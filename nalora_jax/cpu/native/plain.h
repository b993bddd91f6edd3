// Everything in plain C++, for any machine: that is what tests compare.

#pragma once

#include "numbers.h"

namespace nalora {

inline void pack_pair(const Bits* even, const Bits* odd, Bits* panel) {
  for (int64_t j = 0; j < kSide; j++) {
    panel[j / 16 * kTile + j % 16 * 2] = even[j];
    panel[j / 16 * kTile + j % 16 * 2 + 1] = odd[j];
  }
}

template <typename Get>
void pack_by(Get get, int64_t depth, int64_t columns, Bits* panel) {
  for (int64_t k = 0; k < up(depth, kStep); k += 2) {
    Bits rows[2][kSide] = {};
    for (int64_t odd = 0; odd < 2 && k + odd < depth; odd++) {
      for (int64_t j = 0; j < std::min(columns, kSide); j++) rows[odd][j] = get(k + odd, j);
    }
    pack_pair(rows[0], rows[1], panel + k / kStep * kPanelStep + k % kStep / 2 * kStep);
  }
}

inline void pack(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
  pack_by([=](int64_t k, int64_t j) { return y[k * stride + j]; }, depth, columns, panel);
}

inline void pack_transposed(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
  pack_by([=](int64_t k, int64_t j) { return y[j * stride + k]; }, depth, columns, panel);
}

inline void round_row(const float* in, int64_t n, Bits* out) {
  for (int64_t i = 0; i < std::min(n, kSide); i++) out[i] = rounded(in[i]);
}

inline float sum_of(const float* lanes) {
  float sum = 0;
  for (int64_t j = 0; j < kSide; j++) sum += lanes[j];
  return sum;
}

inline float most_of(const float* lanes) { return *std::max_element(lanes, lanes + kSide); }

// out[j, i] = in[i, j] of 32 x 32 numbers.
template <typename T>
inline void transposed(const T* in, int64_t stride, T* out, int64_t out_stride) {
  for (int64_t i = 0; i < kSide; i++) {
    for (int64_t j = 0; j < kSide; j++) out[j * out_stride + i] = in[i * stride + j];
  }
}

}  // namespace nalora

#include "whole.h"

namespace nalora {

struct Plain {
  template <bool kAdded>
  static void whole(const Stretch* parts, int64_t count, const Bits* panel, float* out, int64_t stride,
                    const Target&, const Ahead&) {
    for (int64_t i = 0; !kAdded && i < kSide; i++) std::fill_n(out + i * stride, kSide, 0.0f);
    for (const Stretch* part = parts; part != parts + count; part++) {
      for (int64_t s = 0; s < part->steps(); s++, panel += kPanelStep) {
        for (int64_t i = 0; i < kSide; i++) {
          for (int64_t k = 0; k < kStep; k++) {
            const float left = widened(part->x[i * part->stride + s * kStep + k]);
            const Bits* row = panel + k / 2 * kStep + k % 2;
            for (int64_t j = 0; j < kSide; j++) out[i * stride + j] += left * widened(row[j / 16 * kTile + j % 16 * 2]);
          }
        }
      }
    }
  }
};

using Sums = Whole<Plain>;

}  // namespace nalora
