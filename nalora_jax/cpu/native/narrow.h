// Sums of products of at most 32 rows, for text generation. Memory bandwidth is the limit: each thread computes many
// adjacent columns, because contiguous reads are fast.

#pragma once

#include "few.h"

namespace nalora {

constexpr int64_t kWide = 1024;         // columns of a thread at most
constexpr int64_t kChunk = 4 * kStep;   // of the depth that is packed at a time
constexpr int64_t kTransposedChunk = 2048;  // the same for a transposed y

struct Term {
  const Bits* x;
  const Bits* y;
  int64_t depth;
  bool transposed;
};

struct Sum {
  std::vector<Term> terms;
  void* out;
  bool rounded;  // to bfloat16
  int64_t rows, columns;
  int64_t steps = 0;  // of all terms
  int64_t panel() const { return steps * kPanelStep; }
};

// The rows of a sum's columns from `start` on, which are `stride` apart in `sums`.
inline void put_columns(const Sum& sum, int64_t start, int64_t columns, const float* sums, int64_t stride) {
  for (int64_t r = 0; r < sum.rows; r++) {
    for (int64_t c = 0; c < columns; c += kSide) {
      const int64_t n = std::min(kSide, columns - c), to = r * sum.columns + start + c;
      const float* from = sums + r * stride + c;
      if (sum.rounded) {
        round_row(from, n, static_cast<Bits*>(sum.out) + to);
      } else {
        std::copy_n(from, n, static_cast<float*>(sum.out) + to);
      }
    }
  }
}

// Columns of a sum of kRows rows.
template <int kRows>
void few_rows(const Sum& sum, int64_t start, int64_t columns, Scratch& scratch) {
  const int64_t wide = up(columns, kSide);
  int64_t numbers = kRows * wide;
  for (const Term& term : sum.terms) numbers += kRows * up(term.depth, kSide);
  scratch.reserve(Scratch::room<float>(numbers));
  float *sums = scratch.take<float>(numbers), *x = sums + kRows * wide;
  std::fill_n(sums, numbers, 0.0f);
  for (const Term& term : sum.terms) {
    const int64_t width = up(term.depth, kSide);
    for (int64_t r = 0; r < kRows; r++) {
      for (int64_t k = 0; k < term.depth; k++) x[r * width + k] = widened(term.x[r * term.depth + k]);
    }
    if (term.transposed) {
      add_few_transposed<kRows>(x, width, term.y + start * term.depth, term.depth, columns, sums);
    } else {
      add_few<kRows>(x, width, term.y + start, sum.columns, term.depth, columns, sums);
    }
    x += kRows * width;
  }
  put_columns(sum, start, columns, sums, wide);
}

// A part of a term's depth. Packed values are read once, so little is packed at a time and stays in the nearest caches.
struct Stretched {
  const Term& term;
  int64_t k, depth;  // the first index, and the length
  int64_t rows, start, columns, stride;

  void add(Block& block, Bits* packed, float* sums) const {
    const int64_t wide = up(columns, kSide), panel = up(depth, kStep) * kSide;
    for (int64_t step = 0; step < depth; step += kStep) {
      const Bits* from = term.y + (k + step) * stride + start;
      const int64_t coming = std::clamp<int64_t>(term.depth - k - step - kStep, 0, kStep);
      for (int64_t c = 0; c < columns; c += kSide) {
        for (int64_t i = 0; i < coming; i++) __builtin_prefetch(from + c + (kStep + i) * stride, 0, 2);
        Bits* to = packed + c / kSide * panel + step * kSide;
        pack(from + c, stride, std::min(kStep, depth - step), std::min(kSide, columns - c), to);
      }
    }
    for (int64_t c = 0; c < columns; c += kSide) block.add(packed + c / kSide * panel, sums + c, wide, rows);
  }

  void add_transposed(Block& block, Bits* packed, float* sums) const {
    for (int64_t c = 0; c < columns; c += kSide) {
      const Bits* from = term.y + (start + c) * term.depth + k;
      pack_transposed(from, term.depth, depth, std::min(kSide, columns - c), packed);
      block.add(packed, sums + c, up(columns, kSide), rows);
    }
  }
};

// Columns of a sum of at most 32 rows.
inline void packed_rows(const Sum& sum, int64_t start, int64_t columns, Block& block, Scratch& scratch) {
  const int64_t wide = up(columns, kSide), room = std::max(wide * kChunk, kTransposedChunk * kSide);
  scratch.reserve(Scratch::room<float>(kSide * wide) + Scratch::room<Bits>(room) +
                  Scratch::room<Bits>(kSide * kTransposedChunk));
  float* sums = scratch.take<float>(kSide * wide);
  Bits *packed = scratch.take<Bits>(room), *x = scratch.take<Bits>(kSide * kTransposedChunk);
  std::fill_n(sums, kSide * wide, 0.0f);
  for (const Term& term : sum.terms) {
    const int64_t most = term.transposed ? kTransposedChunk : kChunk;
    for (int64_t k = 0; k < term.depth; k += most) {
      const int64_t depth = std::min(most, term.depth - k), padded = up(depth, kStep);
      gather(term.x + k, term.depth, sum.rows, depth, padded, x);
      block.hold({x, padded, padded});
      const Stretched part{term, k, depth, sum.rows, start, columns, sum.columns};
      term.transposed ? part.add_transposed(block, packed, sums) : part.add(block, packed, sums);
    }
  }
  put_columns(sum, start, columns, sums, wide);
}

// Computes all sums, whose owner lives as long as any thread reads them; returns false if memory ran out.
inline bool multiply_narrow(Pool& pool, const std::shared_ptr<const std::vector<Sum>>& sums) {
  struct Part {
    const Sum* of;
    int64_t start, columns;
  };
  const auto parts = std::make_shared<std::vector<Part>>();
  int64_t total = 0;
  for (const Sum& sum : *sums) total += sum.columns;
  const int64_t most = std::min(kWide, up(ceil_div(total, std::max<int64_t>(1, pool.num_threads())), kSide));
  for (const Sum& sum : *sums) {
    if (sum.rows == 0 || sum.columns == 0) continue;
    const int64_t even = up(ceil_div(sum.columns, ceil_div(sum.columns, most)), kSide);
    for (int64_t start = 0; start < sum.columns; start += even) {
      parts->push_back({&sum, start, std::min(even, sum.columns - start)});
    }
  }
  return share(pool, parts->size(), [sums, parts](int64_t i, Block& block, Scratch& scratch) {
    const Part& part = (*parts)[i];
    if (part.of->rows > kFewRows) return packed_rows(*part.of, part.start, part.columns, block, scratch);
    with_rows(part.of->rows, [&](auto rows) { few_rows<rows>(*part.of, part.start, part.columns, scratch); });
  });
}

}  // namespace nalora
