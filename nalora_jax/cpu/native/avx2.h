// Packing, rows of numbers and sums with AVX2: products of bfloat16 numbers that were widened to float32.

#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace nalora {

INLINED __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINED void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

// Two rows of 32 numbers, interleaved as a panel wants them.
inline void pack_pair(const Bits* even, const Bits* odd, Bits* panel) {
  for (int64_t tile = 0; tile < 2; tile++) {
    const __m256i e = load(even + 16 * tile), o = load(odd + 16 * tile);
    const __m256i low = _mm256_unpacklo_epi16(e, o), high = _mm256_unpackhi_epi16(e, o);
    store(panel + tile * kTile, _mm256_permute2x128_si256(low, high, 0x20));
    store(panel + tile * kTile + 16, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

// 32 columns (or fewer: zeros) of y [depth, ...], whose rows are `stride` apart; the depth filled up with zeros.
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

// Turns 8 x 8 numbers of 32 bits.
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

// As `pack`, of y [columns, depth].
inline void pack_transposed(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
  for (int64_t k = 0; k < depth; k += kStep) {
    const int64_t n = std::min(kStep, depth - k);
    for (int64_t c = 0; c < kSide; c += 16, panel += kTile) {
      for (int64_t part = 0; part < 4; part++) {
        const int64_t column = c + part % 2 * 8, pair = part / 2 * 8;  // 8 of the columns, 8 pairs of the depth
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

// out[j, i] = in[i, j] of 32 x 32 numbers.
template <typename T>
inline void transposed(const T* in, int64_t stride, T* out, int64_t out_stride) {
  for (int64_t i = 0; i < kSide; i += 8) {
    for (int64_t j = 0; j < kSide; j += 8) {
      __m256i r[8];
      for (int64_t k = 0; k < 8; k++) {
        const T* from = in + (i + k) * stride + j;
        if constexpr (sizeof(T) == 4) {
          r[k] = load(from);
        } else {
          r[k] = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        }
      }
      turn(r);
      for (int64_t k = 0; k < 8; k++) {
        T* to = out + (j + k) * out_stride + i;
        if constexpr (sizeof(T) == 4) {
          store(to, r[k]);
        } else {
          const __m256i low = _mm256_permute4x64_epi64(_mm256_packus_epi32(r[k], r[k]), 0x08);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(low));
        }
      }
    }
  }
}

// Eight floats to nearest even, in the lower half of every lane.
INLINED __m256i rounded_eight(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
  const __m256i up = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(nearest, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), is_nan);
}

// The first n (at most 32) of 32 floats, to nearest even.
inline void round_row(const float* in, int64_t n, Bits* out) {
  Bits edge[kSide];
  Bits* to = n < kSide ? edge : out;
  for (int64_t i = 0; i < kSide; i += 16) {
    const __m256i left = rounded_eight(_mm256_loadu_ps(in + i)), right = rounded_eight(_mm256_loadu_ps(in + i + 8));
    store(to + i, _mm256_permute4x64_epi64(_mm256_packus_epi32(left, right), 0xd8));
  }
  if (n < kSide) std::copy_n(edge, n, out);
}

inline float sum_of(const float* lanes) {
  float sums[8];
  for (int64_t j = 0; j < 8; j++) sums[j] = (lanes[j] + lanes[8 + j]) + (lanes[16 + j] + lanes[24 + j]);
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

inline float most_of(const float* lanes) {
  float most[8];
  for (int64_t j = 0; j < 8; j++) {
    most[j] = std::max(std::max(lanes[j], lanes[8 + j]), std::max(lanes[16 + j], lanes[24 + j]));
  }
  return *std::max_element(most, most + 8);
}

// sum += x y, where it is: with the intrinsic, compilers move sums from register to register until one is in memory.
INLINED void add_product(__m256& sum, __m256 x, __m256 y) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y));
}

// The upper one of each of 8 pairs. The mask stays in memory, as sums want every register.
INLINED __m256 upper_of(const Bits* pairs) {
  alignas(32) static const uint32_t kMask[8] = {~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu,
                                                ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu};
  __m256i value = load(pairs);
  asm volatile("vpand %1, %0, %0" : "+x"(value) : "m"(kMask));
  return _mm256_castsi256_ps(value);
}

// What is held is widened once for all panels; a panel is widened in registers.
class Sums {
 public:
  static constexpr int64_t kRowUnit = 1, kDepthUnit = 1;

  void prepare(const Stretch* parts, int64_t count, int64_t rows) {
    stride_ = 0;
    for (int64_t p = 0; p < count; p++) stride_ += up(parts[p].depth, 2);
    // Rows of one set of the first-level cache would drive each other out.
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

  // 12 of the 16 registers hold sums, which hides how long a multiplication takes. Not inlined: it needs the others, too.
  template <int kRows, int kWide, bool kAdded>
  __attribute__((noinline)) void rows(const Stretch* parts, int64_t count, int64_t row, const Bits* panel,
                                      int64_t column, const Target& to) {
    __m256 sums[kRows][kWide];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int64_t w = 0; w < kWide; w++) {
        // Only whole blocks are added to.
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
