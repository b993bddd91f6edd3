// Sums with AVX2: products of bfloat16 numbers widened to float32.

#pragma once

#include "rows.h"

namespace nalora {

// sum += x y in place: with the intrinsic, compilers move sums between registers until one spills to memory.
INLINED void add_product(__m256& sum, __m256 x, __m256 y) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y));
}

// The upper number of each of 8 pairs. The mask stays in memory, because sums need every register.
INLINED __m256 upper_of(const Bits* pairs) {
  alignas(32) static const uint32_t kMask[8] = {~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu,
                                                ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu};
  __m256i value = load(pairs);
  asm volatile("vpand %1, %0, %0" : "+x"(value) : "m"(kMask));
  return _mm256_castsi256_ps(value);
}

// The held operand is widened once for all panels; a panel is widened in registers.
class Sums {
 public:
  static constexpr int64_t kRowUnit = 1, kDepthUnit = 1;

  void prepare(const Stretch* parts, int64_t count, int64_t rows) {
    stride_ = 0;
    for (int64_t p = 0; p < count; p++) stride_ += up(parts[p].depth, 2);
    // Rows in the same set of the first-level cache would evict each other.
    if (stride_ % 256 == 0) stride_ += 16;
    Scratch& scratch = widened_of_thread();
    scratch.reserve(Scratch::room<float>(kSide * stride_));
    widened_ = scratch.take<float>(kSide * stride_);
    for (int64_t r = 0; r < up(rows, 2); r++) {
      float* to = widened_ + r * stride_;
      for (const Stretch* part = parts; part != parts + count; part++) {
        const int64_t n = r < rows ? part->depth : 0;
        const Bits* from = part->x + r * part->stride;
        for (int64_t k = 0; k < n; k++) to[k] = widened(from[k]);
        std::fill(to + n, to + up(part->depth, 2), 0.0f);
        to += up(part->depth, 2);
      }
    }
  }

  template <bool kAdded>
  void run(const Stretch* parts, int64_t count, const Bits* panel, const Target& to, const Ahead&) {
    const int64_t sixes = to.rows / 6 * 6;
    for (int64_t column = 0; column < to.columns; column += 16) {
      const Bits* half = panel + column / 16 * kTile;
      const bool wide = to.columns - column > 8;
      for (int64_t row = 0; row < sixes; row += 6) {
        if (wide) {
          rows<6, 2, kAdded>(parts, count, row, half, column, to);
        } else {
          rows<6, 1, kAdded>(parts, count, row, half, column, to);
        }
      }
    }
    for (int64_t row = sixes; row < to.rows; row += 2) {
      if (to.columns > 16) {
        rows<2, 4, kAdded>(parts, count, row, panel, 0, to);
      } else {
        rows<2, 2, kAdded>(parts, count, row, panel, 0, to);
      }
    }
  }

 private:
  float* widened_ = nullptr;
  int64_t stride_ = 0;

  static Scratch& widened_of_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

  // 12 of the 16 registers hold sums, which hides the latency of multiplications. Not inlined: it needs the other four.
  template <int kRows, int kWide, bool kAdded>
  __attribute__((noinline)) void rows(const Stretch* parts, int64_t count, int64_t row, const Bits* panel,
                                      int64_t column, const Target& to) {
    __m256 sums[kRows][kWide];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int64_t w = 0; w < kWide; w++) {
        // Additions are to whole blocks only.
        const float* from = static_cast<const float*>(to.out) + (row + r) * to.stride + column + 8 * w;
        sums[r][w] = kAdded ? _mm256_loadu_ps(from) : _mm256_setzero_ps();
      }
    }
    const int64_t stride = stride_;
    const float* x = widened_ + row * stride;
    for (const Stretch* part = parts; part != parts + count; part++) {
      for (int64_t left = part->depth; left > 0; left -= kStep, panel += kPanelStep) {
        const Bits* y = panel;
#pragma GCC unroll 1
        for (const Bits* end = panel + std::min(left + 1, kStep) / 2 * kStep; y != end; y += kStep, x += 2) {
          __m256 columns[kWide];
#pragma GCC unroll 4
          for (int64_t w = 0; w < kWide; w++) {
            columns[w] = _mm256_castsi256_ps(_mm256_slli_epi32(load(y + w / 2 * kTile + w % 2 * 16), 16));
          }
          multiply<kRows, kWide>(x, stride, columns, sums);
#pragma GCC unroll 4
          for (int64_t w = 0; w < kWide; w++) columns[w] = upper_of(y + w / 2 * kTile + w % 2 * 16);
          multiply<kRows, kWide>(x + 1, stride, columns, sums);
        }
      }
    }
    const int64_t n = std::min<int64_t>(kRows, to.rows - row);
    const int64_t wanted = std::min<int64_t>(8 * kWide, to.columns - column);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; r++) {
      if (r == n) break;
      const int64_t at = (row + r) * to.stride + column;
      float values[kSide];
      float* out = to.rounded || wanted < 8 * kWide ? values : static_cast<float*>(to.out) + at;
#pragma GCC unroll 4
      for (int64_t w = 0; w < kWide; w++) _mm256_storeu_ps(out + 8 * w, sums[r][w]);
      if (to.rounded) {
        round_row(values, wanted, static_cast<Bits*>(to.out) + at);
      } else if (wanted < 8 * kWide) {
        std::copy_n(values, wanted, static_cast<float*>(to.out) + at);
      }
    }
  }

  template <int kRows, int kWide>
  INLINED static void multiply(const float* x, int64_t stride, const __m256* columns, __m256 (*sums)[kWide]) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; r++) {
      __m256 one;
      asm volatile("vbroadcastss %1, %0" : "=x"(one) : "m"(x[r * stride]));
#pragma GCC unroll 4
      for (int64_t w = 0; w < kWide; w++) add_product(sums[r][w], one, columns[w]);
    }
  }
};

}  // namespace nalora
