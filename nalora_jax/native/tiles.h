// Blocks of 32 x 32 sums of bfloat16 products, and the order in which they are read: on the matrix tiles of a CPU (AMX,
// with NALORA_TILES), with the dot products of its vectors (AVX512-BF16, with NALORA_VECTORS; tiles come with vectors), or
// in plain C++, for any machine: that is what tests compare.

#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#ifdef NALORA_TILES
#define NALORA_VECTORS
#endif
#ifdef NALORA_VECTORS
#include <immintrin.h>
#endif

// What loops must not call, lest they are not vectorised.
#define INLINED __attribute__((always_inline)) inline

namespace nalora {

namespace ffi = xla::ffi;

using Bits = uint16_t;  // of a bfloat16 number

// What XLA hands over.
using Bits1 = ffi::Buffer<ffi::U16, 1>;
using Matrix = ffi::Buffer<ffi::U16, 2>;
using Numbers = ffi::Buffer<ffi::U16, 4>;
using Row = ffi::Buffer<ffi::F32, 1>;
using Rows = ffi::Buffer<ffi::F32, 2>;
using Totals = ffi::Buffer<ffi::F32, 3>;
using Floats = ffi::Buffer<ffi::F32, 4>;
using Integer = ffi::Buffer<ffi::S32, 0>;
using Indices = ffi::Buffer<ffi::S32, 1>;
using Integers = ffi::Buffer<ffi::S32, 2>;

constexpr int64_t kSide = 32;              // rows and columns of a block: two tiles each way
constexpr int64_t kStep = 32;              // depth of one tile
constexpr int64_t kTile = 16 * kStep;      // numbers of one packed tile: 16 pairs of the depth x 16 columns
constexpr int64_t kPanelStep = 2 * kTile;  // numbers of one step of a packed panel, 32 columns wide

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

INLINED float widened(Bits bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// To nearest even.
inline Bits rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return std::isnan(value) ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Memory of one thread, kept between calls, in pieces that start at cache lines.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // Room for what `take` will hand out; what was handed out before is lost.
  void reserve(int64_t bytes) {
    used_ = 0;
    if (static_cast<size_t>(bytes) <= size_) return;
    std::free(data_);
    size_ = up(bytes, kHugePage);
    data_ = static_cast<char*>(std::aligned_alloc(kHugePage, size_));
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }

  template <typename T>
  T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(data_ + used_);
    used_ += room<T>(n);
    return piece;
  }

  template <typename T>
  static int64_t room(int64_t n) {
    return up(n * sizeof(T), 64);
  }

 private:
  static constexpr int64_t kHugePage = 1 << 21;
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

#ifdef NALORA_VECTORS

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
inline void pack_turned(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
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

#else  // plain C++

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

inline void pack_turned(const Bits* y, int64_t stride, int64_t depth, int64_t columns, Bits* panel) {
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

#endif

// What a block of sums is made of: rows of x, `stride` apart, over a stretch of the depth.
struct Stretch {
  const Bits* x;
  int64_t stride;
  int64_t depth;
  int64_t steps() const { return ceil_div(depth, kStep); }
};

// Where it goes: the first rows and columns of it, as float32 or rounded to bfloat16.
struct Target {
  void* out;
  int64_t stride;
  int64_t rows, columns;
  bool rounded;
};

// What `Sums` are computed with: out = sum_i x[i] panel[i], added to what out holds if kAdded. The panels of the
// stretches lie one behind the other. x is read in whole kRowUnits and kDepthUnits.
#if defined(NALORA_VECTORS) && !defined(NALORA_TILES)

class Sums {
 public:
  static constexpr int64_t kRowUnit = 8, kDepthUnit = 2;

  template <bool kAdded>
  void run(const Stretch* parts, int64_t count, const Bits* panel, const Target& to) {
    int64_t row = 0;
    if (to.columns > 16) {
      for (; row < to.rows; row += 8) rows<8, 2, kAdded>(parts, count, row, panel, to);
      return;
    }
    for (; row + 8 < to.rows; row += 16) rows<16, 1, kAdded>(parts, count, row, panel, to);
    for (; row < to.rows; row += 8) rows<8, 1, kAdded>(parts, count, row, panel, to);
  }

 private:
  // 16 registers of sums: as many dot products under way as hide how long one takes.
  template <int kRows, int kWide, bool kAdded>
  static void rows(const Stretch* parts, int64_t count, int64_t row, const Bits* panel, const Target& to) {
    __m512 sums[kRows][kWide];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 2
      for (int64_t w = 0; w < kWide; w++) {
        // Only whole blocks are added to.
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
    const __mmask32 mask = first(to.columns);
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

#else

// Whole blocks of floats at a time; what is wanted of them otherwise goes through memory.
class Sums {
 public:
  static constexpr int64_t kRowUnit = kSide, kDepthUnit = kStep;

  template <bool kAdded>
  void run(const Stretch* parts, int64_t count, const Bits* panel, const Target& to) {
    if (!to.rounded && to.rows == kSide && to.columns == kSide) {
      whole<kAdded>(parts, count, panel, static_cast<float*>(to.out), to.stride);
      return;
    }
    whole<false>(parts, count, panel, sums_, kSide);
    for (int64_t r = 0; r < to.rows; r++) {
      const float* from = sums_ + r * kSide;
      if (to.rounded) {
        round_row(from, to.columns, static_cast<Bits*>(to.out) + r * to.stride);
      } else {
        std::memcpy(static_cast<float*>(to.out) + r * to.stride, from, to.columns * sizeof(float));
      }
    }
  }

#ifdef NALORA_TILES
  // The tiles of this thread: 0 to 3 hold a block's sums, 4 and 5 rows of x, 6 and 7 a step of the panel.
  Sums() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~Sums() { _tile_release(); }
#endif

 private:
  alignas(64) float sums_[kSide * kSide];

  template <bool kAdded>
  static void whole(const Stretch* parts, int64_t count, const Bits* panel, float* out, int64_t stride) {
#ifdef NALORA_TILES
    if constexpr (kAdded) {
      _tile_loadd(0, out, stride * 4);
      _tile_loadd(1, out + 16, stride * 4);
      _tile_loadd(2, out + 16 * stride, stride * 4);
      _tile_loadd(3, out + 16 * stride + 16, stride * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (const Stretch* part = parts; part != parts + count; part++) {
      const Bits *x = part->x, *lower = x + 16 * part->stride;
      for (int64_t s = 0; s < part->steps(); s++, panel += kPanelStep) {
        _tile_loadd(6, panel, 64);
        _tile_loadd(4, x + s * kStep, part->stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + s * kStep, part->stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + 16, stride * 4);
    _tile_stored(2, out + 16 * stride, stride * 4);
    _tile_stored(3, out + 16 * stride + 16, stride * 4);
#else
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
#endif
  }
};

#endif

// Blocks of sums of one thread.
class Block : Sums {
 public:
  using Sums::kDepthUnit;
  using Sums::kRowUnit;

  // sum_i x[i] panel[i].
  void multiply(const std::vector<Stretch>& parts, const Bits* panel, const Target& to) {
    run<false>(parts.data(), parts.size(), panel, to);
  }

  // out[32, 32] = x panel.
  void multiply(const Stretch& part, const Bits* panel, float* out, int64_t stride) {
    run<false>(&part, 1, panel, {out, stride, kSide, kSide, false});
  }

  // out[32, 32] += x panel.
  void add(const Stretch& part, const Bits* panel, float* out, int64_t stride) {
    run<true>(&part, 1, panel, {out, stride, kSide, kSide, false});
  }
};

// [rows, columns] of bits, rows `stride` apart, into [up(rows, 32), width], zeros around.
inline void gather(const Bits* from, int64_t stride, int64_t rows, int64_t columns, int64_t width, Bits* to) {
  for (int64_t i = 0; i < up(rows, kSide); i++, to += width) {
    const int64_t n = i < rows ? columns : 0;
    std::memcpy(to, from + i * stride, n * sizeof(Bits));
    std::memset(to + n, 0, (width - n) * sizeof(Bits));
  }
}

// One for all functions: a thread runs one at a time.
inline Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

// Runs `unit(i, block, scratch)` for i in [0, count) on the threads of XLA's pool and this one; false if memory ran out.
template <typename Unit>
bool share(ffi::ThreadPool& pool, int64_t count, Unit unit) {
  struct Job {
    Job(int64_t count, Unit unit) : count(count), unit(std::move(unit)) {}
    const int64_t count;
    Unit unit;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};

    void work() {
      int64_t i = next.fetch_add(1);
      if (i >= count) return;
      Scratch& scratch = scratch_of_thread();
      Block block;
      for (; i < count; i = next.fetch_add(1)) {
        try {
          unit(i, block, scratch);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
        done.fetch_add(1);
      }
    }
  };
  // Shared with the helpers, which may only start when all is done.
  auto job = std::make_shared<Job>(count, std::move(unit));
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), count); i++) {
    pool.Schedule([job] { job->work(); });
  }
  job->work();
  // Only for units that a helper has begun: what no helper took, this thread did.
  for (int64_t spins = 0; job->done.load() < count; spins++) {
    if (spins > 4096) sched_yield();
  }
  return !job->failed;
}

}  // namespace nalora
