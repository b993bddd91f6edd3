// Softmax attention of every token over the tokens that it sees, and its gradient; integers decide what is seen.
//
// A query sees the keys of its segment whose positions are at most its own and less than `window` before it. If the
// tokens of a segment are in order (`ordered`), keys after a query's block are skipped. If all have one position, every
// token sees its whole segment. Queries are scaled by the caller. Operands of products are bfloat16, everything else is
// float32. No array is transposed or copied as a whole: heads are read in place, [batch, seq, heads, head_dim].
//
// The gradient recomputes the probabilities from the log-sum-exps (flash attention, arXiv 2205.14135). It computes
// transposed scores, [keys, queries]: they are the left operand for the gradients of keys and values without a copy, and
// interleaving two rows packs them for the gradient of queries. The term <g, out> of a query's slopes equals the sum of
// its weights times their slopes. If all queries are processed at once, all weights are computed first, and the caller
// need not save the result.

#pragma once

#include <climits>

#include "block.h"
#include "elementwise.h"

namespace nalora {

constexpr int64_t kQueries = 256;  // that the gradient processes at a time

struct Shape {
  int64_t batch, seq, heads, kv_heads, dim;
  int64_t groups() const { return heads / kv_heads; }
  int64_t rows() const { return up(seq, kSide); }      // with the padding of the last block
  int64_t width() const { return up(dim, kStep); }
  int64_t depth_steps() const { return width() / kStep; }
};

// Positions and segments of one row of the batch, padded with tokens that are never seen, and the ranges of blocks.
struct Places {
  int32_t *positions, *segments;      // [rows]
  int32_t *least, *most;              // [2, blocks]: of positions, of segments
  int64_t blocks;
  int32_t window;

  static int64_t room(const Shape& shape) {
    return 2 * Scratch::room<int32_t>(shape.rows()) + 2 * Scratch::room<int32_t>(2 * shape.rows() / kSide);
  }

  Places(const Shape& shape, const int32_t* of_positions, const int32_t* of_segments, int32_t window, Scratch& scratch)
      : blocks(shape.rows() / kSide), window(window) {
    positions = scratch.take<int32_t>(shape.rows());
    segments = scratch.take<int32_t>(shape.rows());
    least = scratch.take<int32_t>(2 * blocks);
    most = scratch.take<int32_t>(2 * blocks);
    for (int64_t i = 0; i < shape.rows(); i++) {
      positions[i] = i < shape.seq ? of_positions[i] : 0;
      segments[i] = i < shape.seq ? of_segments[i] : INT_MIN;
    }
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t end = std::min(shape.seq, (b + 1) * kSide);
      for (int64_t what = 0; what < 2; what++) {
        const int32_t* from = what == 0 ? positions : segments;
        least[what * blocks + b] = *std::min_element(from + b * kSide, from + end);
        most[what * blocks + b] = *std::max_element(from + b * kSide, from + end);
      }
    }
  }

  // Returns true if a query of one block may see a key of another.
  bool meet(int64_t queries, int64_t keys) const {
    return most[blocks + keys] >= least[blocks + queries] && least[blocks + keys] <= most[blocks + queries] &&
           least[keys] <= most[queries] &&
           static_cast<int64_t>(least[queries]) - most[keys] < window;
  }

  int64_t first_met(int64_t queries, int64_t last) const {
    int64_t keys = 0;
    while (keys < last && !meet(queries, keys)) keys++;
    return keys;
  }
};

INLINED bool sees(int32_t position, int32_t segment, int32_t key_position, int32_t key_segment, int32_t window) {
  // Bitwise operators avoid branches; an unsigned difference compares both ends of the window at once.
  return (segment == key_segment) & (segment != INT_MIN) &
         (static_cast<uint32_t>(position) - static_cast<uint32_t>(key_position) < static_cast<uint32_t>(window));
}

struct Seen {
  float cap;
  bool ordered;
};

struct Heads {
  Shape shape;
  const Bits *q, *k, *v;                // [batch, seq, heads or kv_heads, dim]
  const int32_t *positions, *segments;  // [batch or 1, seq]
  int64_t place_rows;                   // batch or 1
  int32_t window;
  float cap;
  bool ordered;

  // The end of the blocks of keys that a block of queries may meet.
  int64_t end_met(int64_t queries) const { return ordered ? queries + 1 : shape.rows() / kSide; }

  Places places(int64_t b, Scratch& scratch) const {
    const int64_t at = place_rows == 1 ? 0 : b * shape.seq;
    return Places(shape, positions + at, segments + at, window, scratch);
  }
};

// One head of one row of the batch.
template <bool kCapped>
void attend(const Heads& in, Bits* out, float* logsumexp, int64_t unit, Block& block, Scratch& scratch) {
  const Shape& shape = in.shape;
  const int64_t b = unit / shape.heads, head = unit % shape.heads, seq = shape.seq, dim = shape.dim;
  const int64_t rows = shape.rows(), width = shape.width(), steps = shape.depth_steps(), blocks = rows / kSide;
  const int64_t stride = shape.heads * dim, key_stride = shape.kv_heads * dim;
  const Bits* q = in.q + (b * seq * shape.heads + head) * dim;
  const int64_t key_at = (b * seq * shape.kv_heads + head / shape.groups()) * dim;
  const int64_t key_panel = steps * kPanelStep, value_panel = blocks * kPanelStep;
  scratch.reserve(Places::room(shape) + Scratch::room<Bits>(blocks * key_panel) +
                  Scratch::room<Bits>(steps * value_panel) + Scratch::room<float>(kSide * rows) +
                  Scratch::room<Bits>(kSide * rows) + Scratch::room<Bits>(kSide * width) +
                  Scratch::room<float>(kSide * width));
  const Places at = in.places(b, scratch);
  Bits* keys = scratch.take<Bits>(blocks * key_panel);
  Bits* values = scratch.take<Bits>(steps * value_panel);
  float* scores = scratch.take<float>(kSide * rows);
  Bits* weights = scratch.take<Bits>(kSide * rows);
  Bits* queries = scratch.take<Bits>(kSide * width);
  float* sums = scratch.take<float>(kSide * width);
  for (int64_t p = 0; p < blocks; p++) {
    const int64_t n = std::min(kSide, seq - p * kSide);
    pack_transposed(in.k + key_at + p * kSide * key_stride, key_stride, dim, n, keys + p * key_panel);
  }
  for (int64_t c = 0; c < steps; c++) {
    pack(in.v + key_at + c * kStep, key_stride, seq, std::min(kStep, dim - c * kStep), values + c * value_panel);
  }
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t row = i * kSide, n = std::min(kSide, seq - row), end_block = in.end_met(i);
    const int64_t first = at.first_met(i, end_block - 1), end = end_block * kSide;
    gather(q + row * stride, stride, n, dim, width, queries);
    block.hold({queries, width, width});
    for (int64_t p = first; p < end_block; p++) {
      block.multiply(keys + p * key_panel, scores + p * kSide, rows);
    }
    float scale[kSide];
    for (int64_t r = 0; r < kSide; r++) {
      float* s = scores + r * rows;
      Bits* w = weights + r * rows;
      if (r >= n) {
        std::memset(w + first * kSide, 0, (end - first * kSide) * sizeof(Bits));
        continue;
      }
      const int32_t position = at.positions[row + r], segment = at.segments[row + r];
      float lanes[kSide];
      std::fill_n(lanes, kSide, kUnseen);
      for (int64_t key = first * kSide; key < end; key += kSide) {
        for (int64_t j = 0; j < kSide; j++) {
          float score = s[key + j];
          if constexpr (kCapped) score = capped(score, in.cap);
          score = sees(position, segment, at.positions[key + j], at.segments[key + j], at.window) ? score : kUnseen;
          s[key + j] = score;
          lanes[j] = score > lanes[j] ? score : lanes[j];
        }
      }
      const float top = most_of(lanes);
      std::fill_n(lanes, kSide, 0.0f);
      for (int64_t key = first * kSide; key < end; key += kSide) {
        float e[kSide];
        for (int64_t j = 0; j < kSide; j++) {
          const float score = s[key + j];
          e[j] = score == kUnseen ? 0.0f : exponential(score - top);
          lanes[j] += e[j];
        }
        round_row(e, kSide, w + key);
      }
      const float total = sum_of(lanes);
      scale[r] = total == 0 ? 0.0f : 1.0f / total;
      logsumexp[(b * shape.heads + head) * seq + row + r] = top + std::log(total);
    }
    block.hold({weights + first * kSide, rows, end - first * kSide});
    for (int64_t c = 0; c < steps; c++) {
      block.multiply(values + c * value_panel + first * kPanelStep, sums + c * kStep, width);
    }
    for (int64_t r = 0; r < n; r++) {
      Bits* to = out + ((b * seq + row + r) * shape.heads + head) * dim;
      for (int64_t c = 0; c < dim; c += kStep) {
        float part[kSide];
        for (int64_t j = 0; j < kSide; j++) part[j] = sums[r * width + c + j] * scale[r];
        round_row(part, dim - c, to + c);
      }
    }
  }
}

struct Gradient {
  Heads in;
  const Bits *out, *g;     // [batch, seq, heads, dim]: the result (null if it was not saved) and its cotangent
  const float* logsumexp;  // [batch, heads, seq]
  float *dq, *dk, *dv;     // as q, k, v
};

// One key head of one row of the batch, and the query heads that read it. kWhole: without the result and without a cap.
template <bool kCapped, bool kWhole>
void attend_gradient(const Gradient& of, int64_t unit, Block& block, Scratch& scratch) {
  const Heads& in = of.in;
  const Shape& shape = in.shape;
  const int64_t b = unit / shape.kv_heads, kv = unit % shape.kv_heads, seq = shape.seq, dim = shape.dim;
  const int64_t rows = shape.rows(), width = shape.width(), steps = shape.depth_steps(), blocks = rows / kSide;
  const int64_t stride = shape.heads * dim, key_stride = shape.kv_heads * dim;
  const int64_t key_at = (b * seq * shape.kv_heads + kv) * dim, size = std::min(kQueries, rows);
  const int64_t panel = steps * kPanelStep, tall = size / kSide * kPanelStep, deep = blocks * kPanelStep;
  scratch.reserve(Places::room(shape) + 3 * Scratch::room<Bits>(rows * width) +
                  2 * Scratch::room<float>(rows * width) + 2 * Scratch::room<Bits>(size / kSide * panel) +
                  2 * Scratch::room<Bits>(steps * tall) + Scratch::room<Bits>(size / kSide * deep) +
                  2 * Scratch::room<Bits>(kSide * size) + 2 * Scratch::room<float>(size) +
                  (kWhole ? 2 * Scratch::room<float>(rows * size) : 0));
  const Places at = in.places(b, scratch);
  Bits* keys = scratch.take<Bits>(rows * width);
  Bits* values = scratch.take<Bits>(rows * width);
  Bits* keys_transposed = scratch.take<Bits>(width * rows);
  float* dk = scratch.take<float>(rows * width);
  float* dv = scratch.take<float>(rows * width);
  Bits* q_panels = scratch.take<Bits>(size / kSide * panel);  // for the scores
  Bits* g_panels = scratch.take<Bits>(size / kSide * panel);
  Bits* q_tall = scratch.take<Bits>(steps * tall);  // for the sums over queries
  Bits* g_tall = scratch.take<Bits>(steps * tall);
  Bits* slopes_packed = scratch.take<Bits>(size / kSide * deep);  // for the sums over keys
  Bits* weights = scratch.take<Bits>(kSide * size);
  Bits* slopes = scratch.take<Bits>(kSide * size);
  float* total = scratch.take<float>(size);
  float* inner = scratch.take<float>(size);
  float* all_weights = kWhole ? scratch.take<float>(rows * size) : nullptr;  // blocks of [32 keys, 32 queries]
  float* all_back = kWhole ? scratch.take<float>(rows * size) : nullptr;
  gather(in.k + key_at, key_stride, seq, dim, width, keys);
  gather(in.v + key_at, key_stride, seq, dim, width, values);
  for (int64_t i = 0; i < rows; i += kSide) {
    for (int64_t c = 0; c < width; c += kSide) transposed(keys + i * width + c, width, keys_transposed + c * rows + i, rows);
  }
  std::fill_n(dk, rows * width, 0.0f);
  std::fill_n(dv, rows * width, 0.0f);
  alignas(64) float scores[kSide * kSide], back[kSide * kSide], bends[kSide * kSide];  // of a cap

  for (int64_t head = kv * shape.groups(); head < (kv + 1) * shape.groups(); head++) {
    for (int64_t start = 0; start < seq; start += size) {
      const int64_t n = std::min(size, seq - start), panels = ceil_div(n, kSide), first_block = start / kSide;
      const int64_t row_at = ((b * seq + start) * shape.heads + head) * dim;
      const Bits *q = in.q + row_at, *g = of.g + row_at, *out = of.out + row_at;
      const int64_t end_block = in.end_met(first_block + panels - 1);
      int64_t first = end_block;  // first key block that any of these queries may see
      for (int64_t p = 0; p < panels; p++) {
        const int64_t columns = std::min(kSide, n - p * kSide), from = p * kSide * stride;
        pack_transposed(q + from, stride, dim, columns, q_panels + p * panel);
        pack_transposed(g + from, stride, dim, columns, g_panels + p * panel);
        first = std::min(first, at.first_met(first_block + p, in.end_met(first_block + p) - 1));
      }
      for (int64_t c = 0; c < steps; c++) {
        const int64_t columns = std::min(kStep, dim - c * kStep);
        pack(q + c * kStep, stride, n, columns, q_tall + c * tall);
        pack(g + c * kStep, stride, n, columns, g_tall + c * tall);
      }
      for (int64_t i = 0; i < up(n, kSide); i++) {
        float lanes[kSide] = {};
        if (!kWhole && i < n) {
          for (int64_t c = 0; c < dim; c += kStep) {
            for (int64_t j = 0; j < std::min(kStep, dim - c); j++) {
              lanes[j] += widened(g[i * stride + c + j]) * widened(out[i * stride + c + j]);
            }
          }
        }
        total[i] = i < n ? of.logsumexp[(b * shape.heads + head) * seq + start + i] : 0.0f;
        inner[i] = sum_of(lanes);
      }
      // The weights of a block of keys and one of queries, [32, 32], and the products of values and cotangents.
      const auto weigh = [&](int64_t kb, int64_t p, float* weight, float* back) {
        block.hold({keys + kb * kSide * width, width, width});
        block.multiply(q_panels + p * panel, weight, kSide);
        block.hold({values + kb * kSide * width, width, width});
        block.multiply(g_panels + p * panel, back, kSide);
        const int32_t *positions = at.positions + start + p * kSide, *segments = at.segments + start + p * kSide;
        for (int64_t i = 0; i < kSide; i++) {
          const int32_t position = at.positions[kb * kSide + i], segment = at.segments[kb * kSide + i];
          for (int64_t j = 0; j < kSide; j++) {
            float score = weight[i * kSide + j];
            if constexpr (kCapped) {
              score = capped(score, in.cap);
              bends[i * kSide + j] = 1.0f - (score / in.cap) * (score / in.cap);
            }
            const float e = exponential(score - total[p * kSide + j]);
            weight[i * kSide + j] = sees(positions[j], segments[j], position, segment, at.window) ? e : 0.0f;
          }
        }
      };
      const auto block_at = [=](float* all, int64_t kb, int64_t p) { return all + (kb * panels + p) * kSide * kSide; };
      for (int64_t kb = first; kWhole && kb < end_block; kb++) {
        for (int64_t p = in.ordered ? kb : 0; p < panels; p++) {
          if (!at.meet(p, kb)) continue;
          float *weight = block_at(all_weights, kb, p), *back_of = block_at(all_back, kb, p);
          weigh(kb, p, weight, back_of);
          for (int64_t i = 0; i < kSide; i++) {
            for (int64_t j = 0; j < kSide; j++) inner[p * kSide + j] += weight[i * kSide + j] * back_of[i * kSide + j];
          }
        }
      }
      for (int64_t kb = first; kb < end_block; kb++) {
        const int64_t skipped = in.ordered ? std::max<int64_t>(0, kb - first_block) : 0;  // queries before these keys
        for (int64_t p = skipped; p < panels; p++) {
          Bits* packed = slopes_packed + p * deep + kb * kPanelStep;
          const bool met = at.meet(first_block + p, kb);
          if (met && !kWhole) weigh(kb, p, scores, back);
          const float* made = kWhole ? block_at(all_weights, kb, p) : scores;
          const float* back_of = kWhole ? block_at(all_back, kb, p) : back;
          for (int64_t i = 0; i < kSide; i++) {
            Bits *w = weights + i * size + p * kSide, *d = slopes + i * size + p * kSide;
            float slope[kSide];
            for (int64_t j = 0; met && j < kSide; j++) {
              slope[j] = made[i * kSide + j] * (back_of[i * kSide + j] - inner[p * kSide + j]);
              if constexpr (kCapped) slope[j] *= bends[i * kSide + j];
            }
            if (met) {
              round_row(made + i * kSide, kSide, w);
              round_row(slope, kSide, d);
            } else {
              std::memset(w, 0, kSide * sizeof(Bits));
              std::memset(d, 0, kSide * sizeof(Bits));
            }
          }
          for (int64_t i = 0; i < kSide; i += 2) {
            const Bits* even = slopes + i * size + p * kSide;
            pack_pair(even, even + size, packed + i / 2 * kStep);
          }
        }
        const int64_t from = skipped * kSide, depth = (panels - skipped) * kSide;
        const int64_t sum_at = kb * kSide * width, tall_at = skipped * kPanelStep;
        block.hold({weights + from, size, depth});
        for (int64_t c = 0; c < steps; c++) block.add(g_tall + c * tall + tall_at, dv + sum_at + c * kStep, width);
        block.hold({slopes + from, size, depth});
        for (int64_t c = 0; c < steps; c++) block.add(q_tall + c * tall + tall_at, dk + sum_at + c * kStep, width);
      }
      for (int64_t p = 0; p < panels; p++) {
        for (int64_t c = 0; c < steps; c++) {
          // [32 of dim, 32 queries]
          const int64_t depth = (in.end_met(first_block + p) - first) * kSide;
          block.hold({keys_transposed + c * kStep * rows + first * kSide, rows, depth});
          block.multiply(slopes_packed + p * deep + first * kPanelStep, scores, kSide);
          transposed(scores, kSide, back, kSide);
          for (int64_t i = 0; i < std::min(kSide, n - p * kSide); i++) {
            float* to = of.dq + row_at + (p * kSide + i) * stride + c * kStep;
            std::memcpy(to, back + i * kSide, std::min(kStep, dim - c * kStep) * sizeof(float));
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < seq; i++) {
    std::memcpy(of.dk + key_at + i * key_stride, dk + i * width, dim * sizeof(float));
    std::memcpy(of.dv + key_at + i * key_stride, dv + i * width, dim * sizeof(float));
  }
}

inline Heads heads_of(const Numbers& q, const Numbers& k, const Numbers& v, const Integers& positions,
                      const Integers& segments, const Integer& window, Seen seen) {
  const auto of_q = q.dimensions();
  return {{of_q[0], of_q[1], of_q[2], k.dimensions()[2], of_q[3]}, q.typed_data(), k.typed_data(), v.typed_data(),
          positions.typed_data(), segments.typed_data(), positions.dimensions()[0], *window.typed_data(), seen.cap,
          seen.ordered};
}

inline ffi::Error attention(Pool pool, Numbers q, Numbers k, Numbers v, Integers positions, Integers segments,
                            Integer window, ffi::Result<Numbers> out, ffi::Result<Totals> logsumexp, Seen seen) {
  const Heads heads = heads_of(q, k, v, positions, segments, window, seen);
  Bits* to = out->typed_data();
  float* totals = logsumexp->typed_data();
  const auto unit = seen.cap > 0 ? attend<true> : attend<false>;
  return result(share(pool, heads.shape.batch * heads.shape.heads, [=](int64_t i, Block& block, Scratch& scratch) {
    unit(heads, to, totals, i, block, scratch);
  }));
}

inline ffi::Error attention_gradient(Pool pool, Numbers q, Numbers k, Numbers v, Integers positions, Integers segments,
                                     Integer window, Numbers out, Totals logsumexp, Numbers g, ffi::Result<Floats> dq,
                                     ffi::Result<Floats> dk, ffi::Result<Floats> dv, Seen seen) {
  const Gradient of{heads_of(q, k, v, positions, segments, window, seen),
                    out.dimensions()[3] > 0 ? out.typed_data() : nullptr, g.typed_data(), logsumexp.typed_data(),
                    dq->typed_data(), dk->typed_data(), dv->typed_data()};
  const Shape shape = of.in.shape;
  const auto unit = seen.cap > 0 ? attend_gradient<true, false>
                                 : of.out != nullptr ? attend_gradient<false, false> : attend_gradient<false, true>;
  return result(share(pool, shape.batch * shape.kv_heads, [=](int64_t i, Block& block, Scratch& scratch) {
    unit(of, i, block, scratch);
  }));
}

}  // namespace nalora
