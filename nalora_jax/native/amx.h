// Sums on the matrix tiles of a CPU (AMX).

#pragma once

#include "avx512.h"
#include "whole.h"

namespace nalora {

struct Tiles {
  // The tiles of this thread: 0 to 3 hold a block's sums, 4 and 5 rows of x, 6 and 7 a step of the panel.
  Tiles() {
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
  ~Tiles() { _tile_release(); }

  template <bool kAdded>
  static void whole(const Stretch* parts, int64_t count, const Bits* panel, float* out, int64_t stride) {
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
  }
};

using Sums = Whole<Tiles>;

}  // namespace nalora
