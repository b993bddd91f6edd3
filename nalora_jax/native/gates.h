// Gates whose selection weight is a logistic function, rho(z) = 1 / (1 + exp(-(a z + b z^3))), in one pass each: SiLU
// (a = 1, b = 0), GELU by its sigmoid or tanh. The product phi(z) u = z rho(z) u, its gradient, and the sums over tokens
// that selection.py defines. z, u and what comes of them are bfloat16; everything between is float32.

#pragma once

#include "block.h"
#include "elementwise.h"

namespace nalora {

constexpr int64_t kElements = 1 << 15;  // of a product that a thread takes at a time
constexpr int64_t kChannels = 128;      // whose sums a thread takes at a time

struct Gate {
  float a, b;

  INLINED float rho(float z) const {
    return reciprocal(1.0f + exponential(-z * (a + b * z * z), 80.0f));
  }
  INLINED float derivative(float z, float rho) const { return rho * (1.0f - rho) * (a + 3.0f * b * z * z); }
};

// `unit(first, n)` of all elements, 32 at a time; n is 32 but at the end.
template <typename Unit>
bool by_elements(ffi::ThreadPool& pool, int64_t count, Unit unit) {
  return share(pool, ceil_div(count, kElements), [=](int64_t i, Block&, Scratch&) {
    const int64_t end = std::min(count, (i + 1) * kElements);
    for (int64_t at = i * kElements; at < end; at += kSide) unit(at, std::min(kSide, end - at));
  });
}

// The first n of 32 bfloat16 numbers as floats, zeros behind.
inline void widen_row(const Bits* from, int64_t n, float* to) {
  alignas(64) Bits bits[kSide] = {};
  const Bits* source = from;
  if (n < kSide) {
    std::copy_n(from, n, bits);
    source = bits;
  }
  for (int64_t j = 0; j < kSide; j++) to[j] = widened(source[j]);
}

inline ffi::Error gate(ffi::ThreadPool pool, Bits1 z, Bits1 u, ffi::Result<Bits1> out, float a, float b) {
  const Gate gate{a, b};
  if (z.element_count() != u.element_count()) return ffi::Error::InvalidArgument("nalora_gate: shapes do not fit");
  const Bits *of_z = z.typed_data(), *of_u = u.typed_data();
  Bits* to = out->typed_data();
  by_elements(pool, z.element_count(), [=](int64_t at, int64_t n) {
    float x[kSide], y[kSide], h[kSide];
    widen_row(of_z + at, n, x);
    widen_row(of_u + at, n, y);
    for (int64_t j = 0; j < kSide; j++) h[j] = x[j] * gate.rho(x[j]) * y[j];
    round_row(h, n, to + at);
  });
  return ffi::Error::Success();
}

inline ffi::Error gate_gradient(ffi::ThreadPool pool, Bits1 z, Bits1 u, Bits1 g, ffi::Result<Bits1> dz,
                                ffi::Result<Bits1> du, float a, float b) {
  const Gate gate{a, b};
  const size_t count = z.element_count();
  if (u.element_count() != count || g.element_count() != count) {
    return ffi::Error::InvalidArgument("nalora_gate_gradient: shapes do not fit");
  }
  const Bits *of_z = z.typed_data(), *of_u = u.typed_data(), *of_g = g.typed_data();
  Bits *to_z = dz->typed_data(), *to_u = du->typed_data();
  by_elements(pool, count, [=](int64_t at, int64_t n) {
    float x[kSide], y[kSide], back[kSide], one[kSide], other[kSide];
    widen_row(of_z + at, n, x);
    widen_row(of_u + at, n, y);
    widen_row(of_g + at, n, back);
    for (int64_t j = 0; j < kSide; j++) {
      const float rho = gate.rho(x[j]);
      one[j] = back[j] * y[j] * (rho + x[j] * gate.derivative(x[j], rho));
      other[j] = back[j] * (x[j] * rho);
    }
    round_row(one, n, to_z + at);
    round_row(other, n, to_u + at);
  });
  return ffi::Error::Success();
}

// Sums over tokens, per channel: of |phi'(z)| and of z below three cuts, over some rows of z; of |F|, |S| and
// |z rho'(z) dz| over the rows that `delta` is of, z there being what is left of it without delta. Every thread has
// channels of its own, so that no sums are joined.
inline ffi::Error gate_statistics(ffi::ThreadPool pool, Matrix z, Indices rows, Row weights, Indices probed_rows,
                                  Rows delta, Row probe_weights, ffi::Result<Rows> out, float a, float b, float low,
                                  float high) {
  const Gate gate{a, b};
  const int64_t tokens = z.dimensions()[0], channels = z.dimensions()[1];
  const int64_t taken = rows.dimensions()[0], probed = probed_rows.dimensions()[0];
  if (weights.dimensions()[0] != taken || probe_weights.dimensions()[0] != probed ||
      delta.dimensions()[1] != channels || delta.dimensions()[0] != probed || out->dimensions()[0] != 7 ||
      out->dimensions()[1] != channels) {
    return ffi::Error::InvalidArgument("nalora_gate_statistics: shapes do not fit");
  }
  const Bits* of_z = z.typed_data();
  const int32_t *of_rows = rows.typed_data(), *of_probed = probed_rows.typed_data();
  const auto outside = [=](int32_t row) { return row < 0 || row >= tokens; };
  if (std::any_of(of_rows, of_rows + taken, outside) || std::any_of(of_probed, of_probed + probed, outside)) {
    return ffi::Error::InvalidArgument("nalora_gate_statistics: a row that z does not have");
  }
  const float *w = weights.typed_data(), *pw = probe_weights.typed_data();
  const float* of_delta = delta.typed_data();
  float* to = out->typed_data();
  share(pool, ceil_div(channels, kChannels), [=](int64_t i, Block&, Scratch&) {
    float sums[7][kChannels] = {};
    const int64_t start = i * kChannels, end = std::min(channels, start + kChannels);
    for (int64_t r = 0; r < taken; r++) {
      const float weight = w[r];
      for (int64_t at = start; at < end; at += kSide) {
        float x[kSide];
        widen_row(of_z + of_rows[r] * channels + at, std::min(kSide, end - at), x);
        const auto sum = [&](int64_t which) { return sums[which] + at - start; };
        float *slope = sum(0), *below_low = sum(1), *below_0 = sum(2), *below_high = sum(3);
        for (int64_t j = 0; j < kSide; j++) {
          const float rho = gate.rho(x[j]);
          slope[j] += weight * std::fabs(rho + x[j] * gate.derivative(x[j], rho));
          below_low[j] += x[j] < low ? weight : 0.0f;
          below_0[j] += x[j] < 0.0f ? weight : 0.0f;
          below_high[j] += x[j] < high ? weight : 0.0f;
        }
      }
    }
    for (int64_t r = 0; r < probed; r++) {
      const float weight = pw[r];
      for (int64_t at = start; at < end; at += kSide) {
        float x[kSide], dx[kSide] = {};
        widen_row(of_z + of_probed[r] * channels + at, std::min(kSide, end - at), x);
        std::copy_n(of_delta + r * channels + at, std::min(kSide, end - at), dx);
        const auto sum = [&](int64_t which) { return sums[which] + at - start; };
        float *feature = sum(4), *selection = sum(5), *linear = sum(6);
        for (int64_t j = 0; j < kSide; j++) {
          const float base = x[j] - dx[j], rho = gate.rho(base), moved = gate.rho(x[j]) - rho;
          feature[j] += weight * std::fabs(rho * dx[j]);
          selection[j] += weight * std::fabs(moved * x[j]);
          linear[j] += weight * std::fabs(base * gate.derivative(base, rho) * dx[j]);
        }
      }
    }
    for (int64_t s = 0; s < 7; s++) std::copy_n(sums[s], end - start, to + s * channels + start);
  });
  return ffi::Error::Success();
}

}  // namespace nalora
