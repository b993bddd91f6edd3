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
constexpr int64_t kRunOfRows = 8;       // that have weights together (selection.py)
constexpr int64_t kStatistics = 7;      // numbers of a channel

template <bool kCubic>  // whether b is not 0
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

// `run(gate)` of the gate with these coefficients.
template <typename Run>
ffi::Error with_gate(float a, float b, Run run) {
  return b == 0 ? run(Gate<false>{a, b}) : run(Gate<true>{a, b});
}

// What the statistics of some lanes of z, whose selection weight is `rho`, get from one row: |phi'(z)|, and 1 where z is
// below each of three cuts.
struct Response {
  float low, high;

  template <typename Gate>
  INLINED void of(const Gate& gate, Lanes z, Lanes rho, float weight, Lanes* more) const {
    more[0] = weight * magnitude(rho + z * gate.derivative(z, rho));
    more[1] = z < low ? weight : 0.0f;
    more[2] = z < 0.0f ? weight : 0.0f;
    more[3] = z < high ? weight : 0.0f;
  }
};

// The same of a movement dz that z has behind it: |F|, |S| and |z rho'(z) dz|, with z there what is left without dz.
template <typename Gate>
INLINED void movement(const Gate& gate, Lanes z, Lanes rho, Lanes dz, float weight, Lanes* more) {
  const Lanes base = z - dz, frozen = gate.rho(base);
  more[0] = weight * magnitude(frozen * dz);
  more[1] = weight * magnitude((rho - frozen) * z);
  more[2] = weight * magnitude(base * gate.derivative(base, frozen) * dz);
}

// `unit(first, n)` of all elements, 32 at a time; n is 32 but at the end.
template <typename Unit>
bool by_elements(ffi::ThreadPool& pool, int64_t count, Unit unit) {
  return share(pool, ceil_div(count, kElements), [=](int64_t i, Block&, Scratch&) {
    const int64_t end = std::min(count, (i + 1) * kElements);
    for (int64_t at = i * kElements; at < end; at += kSide) unit(at, std::min(kSide, end - at));
  });
}

// Whether `u` is what z is multiplied by; nothing stands for ones.
inline bool fits(const Bits1& z, const Bits1& u) {
  return u.element_count() == z.element_count() || u.element_count() == 0;
}

// At most 32 numbers from one of `u` on, which is null for ones.
INLINED void widen_or_ones(const Bits* u, int64_t at, int64_t n, float* to) {
  if (u == nullptr) {
    std::fill_n(to, kSide, 1.0f);
  } else {
    widen_row(u + at, n, to);
  }
}

// phi(z) u of at most 32 numbers; `x` and `rho`, if given, get z and its selection weights.
template <typename Gate>
INLINED void multiply(const Gate& gate, const Bits* z, const Bits* u, int64_t n, Bits* to, float* x = nullptr,
                      float* rho = nullptr) {
  float of_z[kSide], of_u[kSide], h[kSide];
  widen_row(z, n, of_z);
  widen_or_ones(u, 0, n, of_u);
  for (int64_t j = 0; j < kSide; j += kLanes) {
    const Lanes one = lanes(of_z + j), selected = gate.rho(one);
    put(h + j, one * selected * lanes(of_u + j));
    if (rho != nullptr) {
      put(x + j, one);
      put(rho + j, selected);
    }
  }
  round_row(h, n, to);
}

inline ffi::Error gate(ffi::ThreadPool pool, Bits1 z, Bits1 u, ffi::Result<Bits1> out, float a, float b) {
  if (!fits(z, u)) return ffi::Error::InvalidArgument("nalora_gate: shapes do not fit");
  const Bits *of_z = z.typed_data(), *of_u = u.element_count() > 0 ? u.typed_data() : nullptr;
  Bits* to = out->typed_data();
  return with_gate(a, b, [&](auto gate) {
    by_elements(pool, z.element_count(), [=](int64_t at, int64_t n) {
      multiply(gate, of_z + at, of_u == nullptr ? nullptr : of_u + at, n, to + at);
    });
    return ffi::Error::Success();
  });
}

// `out`, the product once more, is wanted where there is room for it; the gradient of u where there is a u.
inline ffi::Error gate_gradient(ffi::ThreadPool pool, Bits1 z, Bits1 u, Bits1 g, ffi::Result<Bits1> dz,
                                ffi::Result<Bits1> du, ffi::Result<Bits1> out, float a, float b) {
  const size_t count = z.element_count(), wanted = out->element_count();
  if (!fits(z, u) || g.element_count() != count || du->element_count() != u.element_count() ||
      (wanted > 0 && wanted != count)) {
    return ffi::Error::InvalidArgument("nalora_gate_gradient: shapes do not fit");
  }
  const Bits *of_z = z.typed_data(), *of_u = u.element_count() > 0 ? u.typed_data() : nullptr, *of_g = g.typed_data();
  Bits *to_z = dz->typed_data(), *to_u = du->typed_data(), *to = out->typed_data();
  return with_gate(a, b, [&](auto gate) {
    by_elements(pool, count, [=](int64_t at, int64_t n) {
      float x[kSide], y[kSide], back[kSide], one[kSide], other[kSide], h[kSide];
      widen_row(of_z + at, n, x);
      widen_or_ones(of_u, at, n, y);
      widen_row(of_g + at, n, back);
      for (int64_t j = 0; j < kSide; j += kLanes) {
        const Lanes of_z = lanes(x + j), of_u = lanes(y + j), of_g = lanes(back + j), rho = gate.rho(of_z);
        const Lanes selected = of_z * rho;
        put(one + j, of_g * of_u * (rho + of_z * gate.derivative(of_z, rho)));
        put(other + j, of_g * selected);
        put(h + j, selected * of_u);
      }
      round_row(one, n, to_z + at);
      if (of_u != nullptr) round_row(other, n, to_u + at);
      if (wanted > 0) round_row(h, n, to + at);
    });
    return ffi::Error::Success();
  });
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
  const Response response{low, high};
  const int64_t tokens = z.dimensions()[0], channels = z.dimensions()[1];
  const int64_t taken = rows.dimensions()[0], probed = probed_rows.dimensions()[0], rank = hidden.dimensions()[1];
  const bool given = delta.dimensions()[0] > 0;
  if (weights.dimensions()[0] != taken || probe_weights.dimensions()[0] != probed ||
      (given && (delta.dimensions()[1] != channels || delta.dimensions()[0] != probed)) ||
      hidden.dimensions()[0] != probed || factor.dimensions()[0] != rank || factor.dimensions()[1] != channels ||
      out->dimensions()[0] != kStatistics || out->dimensions()[1] != channels) {
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
  return with_gate(a, b, [&](auto gate) {
    share(pool, ceil_div(channels, kChannels), [=](int64_t i, Block&, Scratch&) {
      const int64_t start = i * kChannels, end = std::min(channels, start + kChannels);
      sum_channels<4>(taken, start, end, to, channels, [=](int64_t r, int64_t at, ChannelSums<4>& sums) {
        float x[kSide];
        widen_row(of_z + of_rows[r] * channels + at, std::min(kSide, end - at), x);
        const float weight = w[r];
        sums.add([&](int64_t j, Lanes* more) { response.of(gate, lanes(x + j), gate.rho(lanes(x + j)), weight, more); });
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
          movement(gate, lanes(x + j), gate.rho(lanes(x + j)), lanes(dx + j), weight, more);
        });
      });
    });
    return ffi::Error::Success();
  });
}

// The product of a gate, and the sums of `gate_statistics` over rows whose weights are not 0: the selection weights of
// the one serve the other. dz = hidden b of every row. Each part of the rows has sums of its own, joined in their order.
inline ffi::Error gate_measured(ffi::ThreadPool pool, Matrix z, Matrix u, Row weights, Row probe_weights, Rows hidden,
                                Rows factor, ffi::Result<Matrix> out, ffi::Result<Rows> statistics,
                                ffi::Result<Totals> by_part, float a, float b, float low, float high) {
  const Response response{low, high};
  const int64_t rows = z.dimensions()[0], channels = z.dimensions()[1], rank = hidden.dimensions()[1];
  if (!is_of(u, rows, channels) || !is_of(*out, rows, channels) || !is_of(hidden, rows, rank) ||
      !is_of(factor, rank, channels) || !is_of(*statistics, kStatistics, channels) ||
      weights.dimensions()[0] != rows || probe_weights.dimensions()[0] != rows ||
      by_part->dimensions()[1] != kStatistics || by_part->dimensions()[2] != channels) {
    return ffi::Error::InvalidArgument("nalora_gate_measured: shapes do not fit");
  }
  const Bits *of_z = z.typed_data(), *of_u = u.typed_data();
  const float *w = weights.typed_data(), *pw = probe_weights.typed_data();
  const float *of_hidden = hidden.typed_data(), *of_factor = factor.typed_data();
  Bits* to = out->typed_data();
  float* to_parts = by_part->typed_data();
  const int64_t parts = by_part->dimensions()[0], size = kStatistics * channels;
  const int64_t most = up(ceil_div(rows, parts), kRunOfRows);  // whole runs, which have weights together
  return with_gate(a, b, [&](auto gate) {
    const bool done = share(pool, parts, [=](int64_t part, Block&, Scratch& scratch) {
      const int64_t blocks = ceil_div(channels, kSide), start = std::min(rows, part * most);
      const int64_t end = std::min(rows, start + most);
      scratch.reserve(Scratch::room<ChannelSums<4>>(blocks) + Scratch::room<ChannelSums<3>>(blocks) +
                      Scratch::room<float>(rank * kSide));
      auto* responses = scratch.take<ChannelSums<4>>(blocks);
      auto* movements = scratch.take<ChannelSums<3>>(blocks);
      std::fill_n(responses, blocks, ChannelSums<4>{});
      std::fill_n(movements, blocks, ChannelSums<3>{});
      // The factor of the last channels, where they are fewer than 32.
      const int64_t edge = channels / kSide * kSide;
      float* of_edge = scratch.take<float>(rank * kSide);
      std::fill_n(of_edge, rank * kSide, 0.0f);
      for (int64_t k = 0; k < rank; k++) std::copy_n(of_factor + k * channels + edge, channels - edge, of_edge + k * kSide);
      for (int64_t first = start; first < end; first += kRunOfRows) {
        const int64_t last = std::min(end, first + kRunOfRows);
        const auto weighs = [=](const float* weights) {
          return std::any_of(weights + first, weights + last, [](float weight) { return weight != 0; });
        };
        const bool respond = weighs(w), move = weighs(pw);
        if (!respond && !move) {
          const int64_t stop = last * channels;
          for (int64_t at = first * channels; at < stop; at += kSide) {
            multiply(gate, of_z + at, of_u + at, std::min(kSide, stop - at), to + at);
          }
          continue;
        }
        for (int64_t at = 0; at < channels; at += kSide) {
          const int64_t n = std::min(kSide, channels - at), place = first * channels + at;
          float x[kRunOfRows * kSide], rho[kRunOfRows * kSide];
          for (int64_t i = 0; i < last - first; i++) {
            const int64_t one = place + i * channels;
            multiply(gate, of_z + one, of_u + one, n, to + one, x + i * kSide, rho + i * kSide);
          }
          if (respond) {
            ChannelSums<4> sums = responses[at / kSide];
            for (int64_t i = 0; i < last - first; i++) {
              const float weight = w[first + i], *z = x + i * kSide, *selected = rho + i * kSide;
              sums.add([&](int64_t j, Lanes* more) { response.of(gate, lanes(z + j), lanes(selected + j), weight, more); });
            }
            responses[at / kSide] = sums;
          }
          if (move) {
            const float* from = at < edge ? of_factor + at : of_edge;
            const int64_t stride = at < edge ? channels : kSide;
            ChannelSums<3> sums = movements[at / kSide];
            for (int64_t i = 0; i < last - first; i++) {
              const float weight = pw[first + i], *z = x + i * kSide, *selected = rho + i * kSide;
              const float* share = of_hidden + (first + i) * rank;
              sums.add([&](int64_t j, Lanes* more) {
                Lanes dz{};
                for (int64_t k = 0; k < rank; k++) dz += share[k] * lanes(from + k * stride + j);
                movement(gate, lanes(z + j), lanes(selected + j), dz, weight, more);
              });
            }
            movements[at / kSide] = sums;
          }
        }
      }
      float* own = to_parts + part * size;
      for (int64_t at = 0; at < channels; at += kSide) {
        const int64_t n = std::min(kSide, channels - at);
        responses[at / kSide].write(own + at, channels, n);
        movements[at / kSide].write(own + 4 * channels + at, channels, n);
      }
    });
    if (!done) return ffi::Error::Internal("nalora_gate_measured: out of memory");
    float* total = statistics->typed_data();
    std::copy_n(to_parts, size, total);
    for (int64_t part = 1; part < parts; part++) {
      for (int64_t i = 0; i < size; i++) total[i] += to_parts[part * size + i];
    }
    return ffi::Error::Success();
  });
}

}  // namespace nalora
