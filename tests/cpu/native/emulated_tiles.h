// The matrix tiles of a CPU (AMX) in plain C++, included ahead of the kernels: so that what is written for tiles is
// tested on machines without them. Roundings are not those of the hardware, which sums pairs in its own order.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace emulated {

struct Tile {
  alignas(64) char rows[16][64];
};

inline Tile& tile(int which) {
  static thread_local Tile tiles[8];
  return tiles[which];
}

inline void load(int which, const void* from, int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(tile(which).rows[row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int which, void* to, int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(static_cast<char*>(to) + row * stride, tile(which).rows[row], 64);
}

inline float number(const Tile& of, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, of.rows[row] + column * sizeof(bits), sizeof(bits));
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline void multiply(int to, int left, int right) {
  for (int i = 0; i < 16; i++) {
    float sums[16];
    std::memcpy(sums, tile(to).rows[i], sizeof(sums));
    for (int k = 0; k < 32; k++) {
      for (int j = 0; j < 16; j++) sums[j] += number(tile(left), i, k) * number(tile(right), k / 2, 2 * j + k % 2);
    }
    std::memcpy(tile(to).rows[i], sums, sizeof(sums));
  }
}

}  // namespace emulated

#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(which) std::memset(&emulated::tile(which), 0, sizeof(emulated::Tile))
#define _tile_loadd(which, from, stride) emulated::load(which, from, stride)
#define _tile_stream_loadd(which, from, stride) emulated::load(which, from, stride)
#define _tile_stored(which, to, stride) emulated::store(which, to, stride)
#define _tile_dpbf16ps(to, left, right) emulated::multiply(to, left, right)
#define syscall(...) 0  // the kernel's permission for tiles
