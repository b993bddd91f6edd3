// bfloat16 numbers, the memory of a thread, and the layout in which blocks of products are read.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

// Functions in loops are inlined: a loop with a call is not vectorised.
#define INLINED __attribute__((always_inline)) inline

namespace nalora {

using Bits = uint16_t;  // the bits of a bfloat16 number

constexpr int64_t kSide = 32;              // rows and columns of a block, two tiles by two tiles
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

// Rounds to nearest even.
inline Bits rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return std::isnan(value) ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Memory of one thread, kept between calls; each piece starts at a cache line.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // Makes room for the pieces of `take`, and invalidates earlier pieces.
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

// An operand of a block of sums: rows of x, `stride` apart, over a stretch of the depth.
struct Stretch {
  const Bits* x;
  int64_t stride;
  int64_t depth;
  int64_t steps() const { return ceil_div(depth, kStep); }
};

// The destination of a block: its first rows and columns, as float32 or rounded to bfloat16.
struct Target {
  void* out;
  int64_t stride;
  int64_t rows, columns;
  bool rounded;
};

// What a product may prefetch: the cache lines that it will write, and the next rows of x, a line of each row at every
// step of the first stretch.
struct Ahead {
  bool target = false;
  const Bits* x = nullptr;
  int64_t stride = 0, rows = 0;
};

}  // namespace nalora
