// Sums on the matrix tiles of a CPU (AMX).

#pragma once

#include "rows.h"

namespace nalora {

class Sums {
 public:
  static constexpr int64_t kRowUnit = kSide, kDepthUnit = kStep;

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

  void prepare(const Stretch*, int64_t, int64_t) {}

  // Tiles compute whole blocks of floats; other results are copied from memory.
  template <bool kAdded>
  void run(const Stretch* parts, int64_t count, const Bits* panel, const Target& to, const Ahead& ahead) {
    if (kAdded || (!to.rounded && to.rows == kSide && to.columns == kSide)) {
      whole<kAdded>(parts, count, panel, static_cast<float*>(to.out), to.stride, to, ahead);
      return;
    }
    whole<false>(parts, count, panel, sums_, kSide, to, ahead);
    for (int64_t r = 0; r < to.rows; r++) {
      const float* from = sums_ + r * kSide;
      if (to.rounded) {
        round_row(from, to.columns, static_cast<Bits*>(to.out) + r * to.stride);
      } else {
        std::memcpy(static_cast<float*>(to.out) + r * to.stride, from, to.columns * sizeof(float));
      }
    }
  }

 private:
  alignas(64) float sums_[kSide * kSide];

  // A panel bypasses the first-level cache, which keeps the rows for the next panel: a third faster. Prefetches are
  // spread over the steps, because a core has few outstanding requests for cache lines.
  template <bool kAdded>
  static void whole(const Stretch* parts, int64_t count, const Bits* panel, float* out, int64_t stride,
                    const Target& target, const Ahead& ahead) {
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
    const int64_t row_bytes = target.stride * (target.rounded ? sizeof(Bits) : sizeof(float));
    const char* line = static_cast<const char*>(target.out);
    const char* const end = ahead.target ? line + target.rows * row_bytes : line;
    const int64_t lines = count > 0 ? ceil_div(target.rows, std::max<int64_t>(1, parts->steps())) : 0;
    for (const Stretch* part = parts; part != parts + count; part++) {
      const Bits *x = part->x, *lower = x + 16 * part->stride;
      for (int64_t s = 0; s < part->steps(); s++, panel += kPanelStep) {
        _tile_stream_loadd(6, panel, 64);
        _tile_loadd(4, x + s * kStep, part->stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, panel + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + s * kStep, part->stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (part != parts) continue;
        for (int64_t r = 0; r < ahead.rows; r++) _mm_prefetch(ahead.x + r * ahead.stride + s * kStep, _MM_HINT_T1);
        for (int64_t i = 0; i < lines && line < end; i++, line += row_bytes) {
          __builtin_prefetch(line, 1);
          if (!target.rounded) __builtin_prefetch(line + 64, 1);
        }
      }
    }
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + 16, stride * 4);
    _tile_stored(2, out + 16 * stride, stride * 4);
    _tile_stored(3, out + 16 * stride + 16, stride * 4);
  }
};

}  // namespace nalora
