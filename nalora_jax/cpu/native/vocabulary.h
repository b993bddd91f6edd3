// Softmax over a large vocabulary and its expectation of the vocabulary's vectors, with logits that stay in a cache:
//
//   l = logits(hidden E^T),   top = max l,   total = sum exp(l - top),   attended = sum exp(l - top) l' E
//
// with l' the logits' derivative by the products: all that a cross-entropy and its gradient need of a frozen head
// (cpu/cross_entropy.py). Threads divide the vocabulary into blocks, pack each block once for both products, and process
// all rows with a running maximum per thread, as flash attention does. The sums of the threads are joined at the end.

#pragma once

#include "block.h"
#include "elementwise.h"

namespace nalora {

constexpr int64_t kEntries = 256;     // of a block: 32 rows of their logits fit in the first-level cache
constexpr int64_t kSumBytes = 4 << 20;  // of one thread's sums, unless 512 rows need more
constexpr int64_t kLeastRows = 512;

struct Logits {
  bool transposed;  // true if the table is [vocab, d_model]
  float scale, cap;
};

struct Vocabulary : Logits {
  const Bits* hidden;  // [rows, d_model]
  const Bits* table;   // [vocab, d_model], or [d_model, vocab]
  int64_t rows, d_model, vocab;
  bool gradient;       // true if `attended` is computed
  int64_t row_blocks() const { return ceil_div(rows, kSide); }
  int64_t width() const { return up(d_model, kStep); }
  int64_t steps() const { return width() / kStep; }
};

// The sums of one thread for some rows.
struct Partial {
  std::unique_ptr<float[]> top, total, attended;  // [rows], [rows], [rows, width]

  void start(const Vocabulary& of) {
    const int64_t rows = of.row_blocks() * kSide;
    top.reset(new float[rows]);
    total.reset(new float[rows]);
    std::fill_n(top.get(), rows, kUnseen);
    std::fill_n(total.get(), rows, 0.0f);
    if (of.gradient) {
      attended.reset(new float[rows * of.width()]);
      std::fill_n(attended.get(), rows * of.width(), 0.0f);
    }
  }
};

template <bool kCapped>
void add_entries(const Vocabulary& of, int64_t start, Partial& sums, Block& block, Scratch& scratch) {
  const int64_t n = std::min(kEntries, of.vocab - start), panels = ceil_div(n, kSide), steps = of.steps();
  const int64_t panel = steps * kPanelStep, tall = panels * kPanelStep, width = of.width();
  scratch.reserve(Scratch::room<Bits>(panels * panel) + Scratch::room<Bits>(steps * tall) +
                  Scratch::room<Bits>(kSide * width) + Scratch::room<float>(kSide * kEntries) +
                  Scratch::room<Bits>(kSide * kEntries));
  Bits* entries = scratch.take<Bits>(panels * panel);
  Bits* entries_tall = scratch.take<Bits>(steps * tall);
  Bits* rows = scratch.take<Bits>(kSide * width);
  float* logits = scratch.take<float>(kSide * kEntries);
  Bits* weights = scratch.take<Bits>(kSide * kEntries);
  const Bits* table = of.table + (of.transposed ? start * of.d_model : start);
  for (int64_t p = 0; p < panels; p++) {
    const int64_t columns = std::min(kSide, n - p * kSide);
    if (of.transposed) {
      pack_transposed(table + p * kSide * of.d_model, of.d_model, of.d_model, columns, entries + p * panel);
    } else {
      pack(table + p * kSide, of.vocab, of.d_model, columns, entries + p * panel);
    }
  }
  for (int64_t c = 0; of.gradient && c < steps; c++) {
    const int64_t columns = std::min(kStep, of.d_model - c * kStep);
    if (of.transposed) {
      pack(table + c * kStep, of.d_model, n, columns, entries_tall + c * tall);
    } else {
      pack_transposed(table + c * kStep * of.vocab, of.vocab, n, columns, entries_tall + c * tall);
    }
  }
  for (int64_t b = 0; b < of.row_blocks(); b++) {
    const int64_t count = std::min(kSide, of.rows - b * kSide);
    const Bits* x = of.hidden + b * kSide * of.d_model;
    int64_t stride = of.d_model;
    if (count < kSide || width > of.d_model) {
      gather(x, of.d_model, count, of.d_model, width, rows);
      x = rows;
      stride = width;
    }
    block.hold({x, stride, width});
    for (int64_t p = 0; p < panels; p++) block.multiply(entries + p * panel, logits + p * kSide, kEntries);
    float* attended = of.gradient ? sums.attended.get() + b * kSide * width : nullptr;
    for (int64_t r = 0; r < kSide; r++) {
      float* l = logits + r * kEntries;
      for (int64_t e = 0; e < panels * kSide; e++) {
        l[e] *= of.scale;
        if constexpr (kCapped) l[e] = capped(l[e], of.cap);
      }
      std::fill(l + n, l + panels * kSide, kUnseen);
      float most[kSide], parts[kSide] = {};
      std::fill_n(most, kSide, kUnseen);
      for (int64_t p = 0; p < panels * kSide; p += kSide) {
        for (int64_t j = 0; j < kSide; j += kLanes) put(most + j, larger(lanes(most + j), lanes(l + p + j)));
      }
      float &top = sums.top[b * kSide + r], &total = sums.total[b * kSide + r];
      const float higher = std::max(top, most_of(most));
      if (higher > top) {
        const float fade = exponential(top - higher);
        total *= fade;
        for (int64_t c = 0; of.gradient && c < width; c++) attended[r * width + c] *= fade;
        top = higher;
      }
      for (int64_t p = 0; p < panels * kSide; p += kSide) {
        float weight[kSide];
        for (int64_t j = 0; j < kSide; j += kLanes) {
          // The exponential of a missing entry is 1e-38.
          const Lanes value = lanes(l + p + j), e = exponential(value - higher);
          put(parts + j, lanes(parts + j) + e);
          Lanes slope = e * of.scale;
          if constexpr (kCapped) {
            const Lanes share = value == kUnseen ? Lanes{} : value / of.cap;
            slope *= 1.0f - share * share;
          }
          put(weight + j, slope);
        }
        round_row(weight, kSide, weights + r * kEntries + p);
      }
      total += sum_of(parts);
    }
    if (!of.gradient) continue;
    block.hold({weights, kEntries, panels * kSide});
    for (int64_t c = 0; c < steps; c++) block.add(entries_tall + c * tall, attended + c * kStep, width);
  }
}

inline ffi::Error over_vocabulary(Pool pool, Matrix hidden, Matrix table, Integer count, ffi::Result<Row> top,
                                  ffi::Result<Row> total, ffi::Result<Rows> attended, Logits logits) {
  const int64_t rows = hidden.dimensions()[0], d_model = hidden.dimensions()[1];
  const bool gradient = attended->dimensions()[1] > 0;
  const int64_t wanted = std::clamp<int64_t>(*count.typed_data(), 0, rows);
  std::fill_n(top->typed_data() + wanted, rows - wanted, 0.0f);
  std::fill_n(total->typed_data() + wanted, rows - wanted, 1.0f);
  if (gradient) std::fill_n(attended->typed_data() + wanted * d_model, (rows - wanted) * d_model, 0.0f);
  const int64_t row_bytes = up(d_model, kStep) * sizeof(float);
  const int64_t group = gradient ? up(std::max(kLeastRows, kSumBytes / row_bytes), kSide) : std::max(rows, kSide);
  bool done = true;
  for (int64_t start = 0; start < wanted && done; start += group) {
    const Vocabulary of{logits, hidden.typed_data() + start * d_model, table.typed_data(),
                        std::min(group, wanted - start), d_model, table.dimensions()[logits.transposed ? 0 : 1], gradient};
    // The entries of each part do not depend on the thread that computes it, so results are equal in every run.
    const int64_t parts = std::clamp<int64_t>(pool.num_threads(), 1, ceil_div(of.vocab, kEntries));
    auto partials = std::make_shared<std::vector<Partial>>(parts);
    const auto add = logits.cap > 0 ? add_entries<true> : add_entries<false>;
    done = share(pool, parts, [=](int64_t i, Block& block, Scratch& scratch) {
      Partial& sums = (*partials)[i];
      sums.start(of);
      for (int64_t e = i * kEntries; e < of.vocab; e += parts * kEntries) add(of, e, sums, block, scratch);
    });
    if (!done) break;
    float *tops = top->typed_data() + start, *totals = total->typed_data() + start;
    float* out = gradient ? attended->typed_data() + start * d_model : nullptr;
    done = share(pool, of.row_blocks(), [=](int64_t b, Block&, Scratch&) {
      for (int64_t r = b * kSide; r < std::min(of.rows, (b + 1) * kSide); r++) {
        float highest = kUnseen, sum = 0;
        for (const Partial& p : *partials) highest = std::max(highest, p.top[r]);
        if (gradient) std::fill_n(out + r * d_model, d_model, 0.0f);
        for (const Partial& p : *partials) {
          const float fade = exponential(p.top[r] - highest);
          sum += fade * p.total[r];
          for (int64_t c = 0; gradient && c < d_model; c++) out[r * d_model + c] += fade * p.attended[r * of.width() + c];
        }
        tops[r] = highest;
        totals[r] = sum;
      }
    });
  }
  return result(done);
}

}  // namespace nalora
