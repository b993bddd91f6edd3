// Gates whose selection weight is a logistic function, rho(z) = 1 / (1 + exp(-(a z + b z^3))), in one pass each: SiLU
// (a = 1, b = 0), GELU by its sigmoid or tanh. z, u, the product phi(z) u = z rho(z) u and its gradients are bfloat16;
// intermediate values are float32.

#pragma once

#include "block.h"
#include "elementwise.h"

namespace nalora {

constexpr int64_t kElements = 1 << 15;  // that a thread processes at a time

struct Logistic {
  float a, b;
};

template <bool kCubic>  // true if b is not 0
struct Gate {
  float a, b;

  INLINED Lanes rho(Lanes z) const {
    const float square = -kLog2E * b, constant = -kLog2E * a;
    if constexpr (kCubic) return reciprocal(1.0f + power_of_two(z * (z * z * square + constant), 115.0f));
    return reciprocal(1.0f + power_of_two(z * constant, 115.0f));
  }

  INLINED Lanes derivative(Lanes z, Lanes rho) const {
    const Lanes weight = rho * (1.0f - rho);
    if constexpr (kCubic) return weight * (z * z * (3.0f * b) + a);
    return weight * a;
  }
};

// Calls `unit(gate, first, n)` for all elements, 32 at a time; n is smaller only at the end.
template <typename Unit>
ffi::Error by_elements(Pool& pool, const Bits1& z, Logistic logistic, Unit unit) {
  const auto [a, b] = logistic;
  const int64_t count = z.element_count();
  const auto run = [&](auto gate) {
    return result(share(pool, ceil_div(count, kElements), [=](int64_t i, Block&, Scratch&) {
      const int64_t end = std::min(count, (i + 1) * kElements);
      for (int64_t at = i * kElements; at < end; at += kSide) unit(gate, at, std::min(kSide, end - at));
    }));
  };
  return b == 0 ? run(Gate<false>{a, b}) : run(Gate<true>{a, b});
}

// The factor of the gate; null means ones.
inline const Bits* factor(const Bits1& u) { return u.element_count() > 0 ? u.typed_data() : nullptr; }

INLINED void widen_or_ones(const Bits* u, int64_t at, int64_t n, float* to) {
  if (u == nullptr) {
    std::fill_n(to, kSide, 1.0f);
  } else {
    widen_row(u + at, n, to);
  }
}

inline ffi::Error gate(Pool pool, Bits1 z, Bits1 u, ffi::Result<Bits1> out, Logistic logistic) {
  const Bits *of_z = z.typed_data(), *of_u = factor(u);
  Bits* to = out->typed_data();
  return by_elements(pool, z, logistic, [=](auto gate, int64_t at, int64_t n) {
    float x[kSide], y[kSide], h[kSide];
    widen_row(of_z + at, n, x);
    widen_or_ones(of_u, at, n, y);
    for (int64_t j = 0; j < kSide; j += kLanes) put(h + j, lanes(x + j) * gate.rho(lanes(x + j)) * lanes(y + j));
    round_row(h, n, to + at);
  });
}

// Computes the gradient of u only if u is given.
inline ffi::Error gate_gradient(Pool pool, Bits1 z, Bits1 u, Bits1 g, ffi::Result<Bits1> dz, ffi::Result<Bits1> du,
                                Logistic logistic) {
  const Bits *of_z = z.typed_data(), *of_u = factor(u), *of_g = g.typed_data();
  Bits *to_z = dz->typed_data(), *to_u = du->typed_data();
  return by_elements(pool, z, logistic, [=](auto gate, int64_t at, int64_t n) {
    float x[kSide], y[kSide], back[kSide], one[kSide], other[kSide];
    widen_row(of_z + at, n, x);
    widen_or_ones(of_u, at, n, y);
    widen_row(of_g + at, n, back);
    for (int64_t j = 0; j < kSide; j += kLanes) {
      const Lanes z = lanes(x + j), g = lanes(back + j), rho = gate.rho(z);
      put(one + j, g * lanes(y + j) * (rho + z * gate.derivative(z, rho)));
      put(other + j, g * (z * rho));
    }
    round_row(one, n, to_z + at);
    if (of_u != nullptr) round_row(other, n, to_u + at);
  });
}

}  // namespace nalora
