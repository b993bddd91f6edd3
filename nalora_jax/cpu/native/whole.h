// Sums of what computes whole blocks of floats only; what is wanted of them otherwise goes through memory.

#pragma once

#include "numbers.h"

namespace nalora {

template <typename Kernel>
class Whole : Kernel {
 public:
  static constexpr int64_t kRowUnit = kSide, kDepthUnit = kStep;

  void prepare(const Stretch*, int64_t, int64_t) {}

  template <bool kAdded>
  void run(const Stretch* parts, int64_t count, const Bits* panel, const Target& to, const Ahead& ahead) {
    if (kAdded || (!to.rounded && to.rows == kSide && to.columns == kSide)) {
      Kernel::template whole<kAdded>(parts, count, panel, static_cast<float*>(to.out), to.stride, to, ahead);
      return;
    }
    Kernel::template whole<false>(parts, count, panel, sums_, kSide, to, ahead);
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
};

}  // namespace nalora
