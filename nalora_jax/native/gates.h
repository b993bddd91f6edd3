// Gates whose selection weight is a logistic function, rho(z) = 1 / (1 + exp(-(a z + b z^3))), in one pass each: SiLU
// (a = 1, b = 0), GELU by its sigmoid or tanh. The product phi(z) u = z rho(z) u, its gradient, and the sums over tokens
// that selection.py defines. z, u and what comes of them are bfloat16; everything between is float32.

#pragma once

#include "block.h"
#include "elementwise.h"

namespace nalora {

constexpr int64_t kElements = 1 << 15;  // of a product that a thread takes at a time
constexpr int64_t kChannels = 384;      // whose sums a thread takes at a time
constexpr int64_t kRowsTogether = 16;   // that are added while sums are in registers

struct Gate {
  float a, b;

  INLINED Lanes rho(Lanes z) const { return reciprocal(1.0f + exponential(-z * (a + b * z * z), 80.0f)); }
  INLINED Lanes derivative(Lanes z, Lanes rho) const { return rho * (1.0f - rho) * (a + 3.0f * b * z * z); }
};

// `unit(first, n)` of all elements, 32 at a time; n is 32 but at the end.
template <typename Unit>
bool by_elements(ffi::ThreadPool& pool, int64_t count, Unit unit) {
  return share(pool, ceil_div(count, kElements), [=](int64_t i, Block&, Scratch&) {
    const int64_t end = std::min(count, (i + 1) * kElements);
    for (int64_t at = i * kElements; at < end; at += kSide) unit(at, std::min(kSide, end - at));
  });
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
    for (int64_t j = 0; j < kSide; j += kLanes) {
      const Lanes of_z = lanes(x + j);
      put(h + j, of_z * gate.rho(of_z) * lanes(y + j));
    }
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
    for (int64_t j = 0; j < kSide; j += kLanes) {
      const Lanes of_z = lanes(x + j), of_g = lanes(back + j), rho = gate.rho(of_z);
      put(one + j, of_g * lanes(y + j) * (rho + of_z * gate.derivative(of_z, rho)));
      put(other + j, of_g * (of_z * rho));
    }
    round_row(one, n, to_z + at);
    round_row(other, n, to_u + at);
  });
  return ffi::Error::Success();
}

// Sums over tokens of 32 channels, which stay in registers while some rows are added.
template <int kCount>
struct ChannelSums {
  static constexpr int64_t kRegisters = kSide / kLanes;
  Lanes of[kCount][kRegisters];

  // Adds `values(j)`, the kCount numbers of the lanes from channel j on.
  template <typename Values>
  INLINED void add(Values values) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < kRegisters; k++) {
      Lanes more[kCount];
      values(k * kLanes, more);
#pragma GCC unroll 4
      for (int64_t s = 0; s < kCount; s++) of[s][k] += more[s];
    }
  }

  void write(float* to, int64_t stride, int64_t n) const {
    for (int64_t s = 0; s < kCount; s++) {
      float values[kSide];
      for (int64_t k = 0; k < kRegisters; k++) put(values + k * kLanes, of[s][k]);
      std::copy_n(values, n, to + s * stride);
    }
  }
};

// `unit(row, column, sums)` of some rows and some columns, 32 at a time; what is summed up goes to `to`.
template <int kCount, typename Unit>
void sum_channels(int64_t rows, int64_t start, int64_t end, float* to, int64_t stride, Unit unit) {
  ChannelSums<kCount> all[kChannels / kSide] = {};
  for (int64_t first = 0; first < rows; first += kRowsTogether) {
    for (int64_t at = start; at < end; at += kSide) {
      ChannelSums<kCount> sums = all[(at - start) / kSide];
      for (int64_t r = first; r < std::min(rows, first + kRowsTogether); r++) unit(r, at, sums);
      all[(at - start) / kSide] = sums;
    }
  }
  for (int64_t at = start; at < end; at += kSide) {
    all[(at - start) / kSide].write(to + at, stride, std::min(kSide, end - at));
  }
}

// Sums over tokens, per channel: of |phi'(z)| and of z below three cuts, over some rows of z; of |F|, |S| and
// |z rho'(z) dz| over the rows that dz = delta + hidden b is of, z there being what is left of it without dz. Either part
// of dz may be absent. Every thread has channels of its own, so that no sums are joined.
inline ffi::Error gate_statistics(ffi::ThreadPool pool, Matrix z, Indices rows, Row weights, Indices probed_rows,
                                  Rows delta, Rows hidden, Rows factor, Row probe_weights, ffi::Result<Rows> out,
                                  float a, float b, float low, float high) {
  const Gate gate{a, b};
  const int64_t tokens = z.dimensions()[0], channels = z.dimensions()[1];
  const int64_t taken = rows.dimensions()[0], probed = probed_rows.dimensions()[0], rank = hidden.dimensions()[1];
  const bool given = delta.dimensions()[0] > 0;
  if (weights.dimensions()[0] != taken || probe_weights.dimensions()[0] != probed ||
      (given && (delta.dimensions()[1] != channels || delta.dimensions()[0] != probed)) ||
      hidden.dimensions()[0] != probed || factor.dimensions()[0] != rank || factor.dimensions()[1] != channels ||
      out->dimensions()[0] != 7 || out->dimensions()[1] != channels) {
    return ffi::Error::InvalidArgument("nalora_gate_statistics: shapes do not fit");
  }
  const Bits* of_z = z.typed_data();
  const int32_t *of_rows = rows.typed_data(), *of_probed = probed_rows.typed_data();
  const auto outside = [=](int32_t row) { return row < 0 || row >= tokens; };
  if (std::any_of(of_rows, of_rows + taken, outside) || std::any_of(of_probed, of_probed + probed, outside)) {
    return ffi::Error::InvalidArgument("nalora_gate_statistics: a row that z does not have");
  }
  const float *w = weights.typed_data(), *pw = probe_weights.typed_data();
  const float *of_delta = delta.typed_data(), *of_hidden = hidden.typed_data(), *of_factor = factor.typed_data();
  float* to = out->typed_data();
  share(pool, ceil_div(channels, kChannels), [=](int64_t i, Block&, Scratch&) {
    const int64_t start = i * kChannels, end = std::min(channels, start + kChannels);
    sum_channels<4>(taken, start, end, to, channels, [=](int64_t r, int64_t at, ChannelSums<4>& sums) {
      float x[kSide];
      widen_row(of_z + of_rows[r] * channels + at, std::min(kSide, end - at), x);
      const float weight = w[r];
      sums.add([&](int64_t j, Lanes* more) {
        const Lanes one = lanes(x + j), rho = gate.rho(one);
        more[0] = weight * magnitude(rho + one * gate.derivative(one, rho));
        more[1] = one < low ? weight : 0.0f;
        more[2] = one < 0.0f ? weight : 0.0f;
        more[3] = one < high ? weight : 0.0f;
      });
    });
    sum_channels<3>(probed, start, end, to + 4 * channels, channels, [=](int64_t r, int64_t at, ChannelSums<3>& sums) {
      const int64_t n = std::min(kSide, end - at);
      float x[kSide], dx[kSide] = {};
      widen_row(of_z + of_probed[r] * channels + at, n, x);
      if (given) std::copy_n(of_delta + r * channels + at, n, dx);
      for (int64_t k = 0; k < rank; k++) {
        const float share = of_hidden[r * rank + k];
        for (int64_t j = 0; j < n; j++) dx[j] += share * of_factor[k * channels + at + j];
      }
      const float weight = pw[r];
      sums.add([&](int64_t j, Lanes* more) {
        const Lanes one = lanes(x + j), part = lanes(dx + j), base = one - part, rho = gate.rho(base);
        more[0] = weight * magnitude(rho * part);
        more[1] = weight * magnitude((gate.rho(one) - rho) * one);
        more[2] = weight * magnitude(base * gate.derivative(base, rho) * part);
      });
    });
  });
  return ffi::Error::Success();
}

}  // namespace nalora
