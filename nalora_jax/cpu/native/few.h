// Products of a few rows, for text generation: memory bandwidth is the limit, so nothing is packed.

#pragma once

#include "block.h"
#include "elementwise.h"

namespace nalora {

constexpr int64_t kFewRows = 4;
constexpr int64_t kDeep = 16;  // rows of y for which sums stay in registers

// Calls `run(n)` with n, from 1 to kFewRows, as a compile-time constant.
template <typename Run>
void with_rows(int64_t n, Run run) {
  switch (n) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 3: return run(std::integral_constant<int, 3>{});
    default: return run(std::integral_constant<int, kFewRows>{});
  }
}

// to[r, c] += sum_k x[r, k] y[k, c] for some columns of y. Rows of x are `width` apart, those of y `stride`, and those
// of `to` the number of columns, rounded up to a multiple of 32.
template <int kRows>
void add_few(const float* x, int64_t width, const Bits* y, int64_t stride, int64_t depth, int64_t columns, float* to) {
  const int64_t wide = up(columns, kSide);
  for (int64_t first = 0; first < depth; first += kDeep) {
    const int64_t last = std::min(depth, first + kDeep);
    for (int64_t c = 0; c < columns; c += kSide) {
      const int64_t n = std::min(kSide, columns - c);
      constexpr int64_t kRegisters = kSide / kLanes;
      Lanes sums[kRows][kRegisters];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < kRegisters; j++) sums[r][j] = lanes(to + r * wide + c + j * kLanes);
      }
      for (int64_t k = first; k < last; k++) {
        float of_y[kSide];
        widen_row(y + k * stride + c, n, of_y);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; r++) {
          const float share = x[r * width + k];
#pragma GCC unroll 2
          for (int64_t j = 0; j < kRegisters; j++) sums[r][j] += share * lanes(of_y + j * kLanes);
        }
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < kRegisters; j++) put(to + r * wide + c + j * kLanes, sums[r][j]);
      }
    }
  }
}

// The same for a transposed y, [columns, depth].
template <int kRows>
void add_few_transposed(const float* x, int64_t width, const Bits* y, int64_t depth, int64_t columns, float* to) {
  const int64_t wide = up(columns, kSide);
  for (int64_t c = 0; c < columns; c++, y += depth) {
    constexpr int64_t kRegisters = kSide / kLanes;
    Lanes sums[kRows][kRegisters] = {};
    for (int64_t k = 0; k < depth; k += kSide) {
      float of_y[kSide];
      widen_row(y + k, std::min(kSide, depth - k), of_y);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < kRegisters; j++) {
          sums[r][j] += lanes(x + r * width + k + j * kLanes) * lanes(of_y + j * kLanes);
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; r++) {
      float parts[kSide];
#pragma GCC unroll 2
      for (int64_t j = 0; j < kRegisters; j++) put(parts + j * kLanes, sums[r][j]);
      to[r * wide + c] += sum_of(parts);
    }
  }
}

}  // namespace nalora
