// Sums of matrix products: out[p] = x[0] y[0] + x[1] y[1] + ..., several p in one call, so that threads share them all.
//
// Each x is [rows, depth], each y [depth, columns] or, turned, [columns, depth]; rows and columns are those of out[p],
// depths are free. The work is cut into units of some columns (and, where there are few, of some rows). A unit packs its
// part of every y, into memory of its thread that fits the second-level cache, and multiplies all of its rows with that.
// Nothing else is copied, but edges that do not fill a tile. Sums stay in the tiles over the whole depth, because adding
// to what was stored waits for the store: cutting the depth costs a third.

#pragma once

#include <string>

#include "tiles.h"

namespace nalora {

constexpr int64_t kUnitBytes = 640 * 1024;  // what a unit packs at most, but for a single panel
constexpr int64_t kUnitsPerThread = 3;      // so that threads end together

struct Term {
  const Bits* x;
  const Bits* y;
  int64_t depth;
  bool turned;
};

struct Sum {
  std::vector<Term> terms;
  void* out;
  bool rounded;  // to bfloat16
  int64_t rows, columns;
  int64_t steps = 0;  // of all terms
  int64_t row_chunk = 0, column_chunk = 0, column_units = 0, units = 0;
};

// A stretch of the depth that the rows of a block have in memory, in whole steps.
struct Stretch {
  const Bits* x;
  int64_t stride;
  int64_t steps;
};

// How the rows of a block are read: as they lie where they fill the tiles, else from a copy with zeros.
inline void stretches_of(const Sum& sum, int64_t row, int64_t rows, Bits* edge, std::vector<Stretch>& stretches) {
  stretches.clear();
  for (const Term& term : sum.terms) {
    const Bits* x = term.x + row * term.depth;
    const int64_t whole = rows == kSide ? term.depth / kStep : 0, done = whole * kStep;
    if (whole > 0) stretches.push_back({x, term.depth, whole});
    if (done == term.depth) continue;
    const int64_t steps = ceil_div(term.depth - done, kStep), stride = steps * kStep;
    std::memset(edge, 0, kSide * stride * sizeof(Bits));
    for (int64_t i = 0; i < rows; i++) {
      std::memcpy(edge + i * stride, x + i * term.depth + done, (term.depth - done) * sizeof(Bits));
    }
    stretches.push_back({edge, stride, steps});
    edge += kSide * stride;
  }
}

inline void multiply(Block& block, const std::vector<Stretch>& stretches, const Bits* panel, float* out,
                     int64_t stride) {
  block.clear();
  for (const Stretch& part : stretches) {
    block.add(part.x, part.stride, panel, part.steps);
    panel += part.steps * kPanelStep;
  }
  block.store(out, stride);
}

inline void run_unit(const Sum& sum, int64_t unit, Block& block, Scratch& scratch) {
  static thread_local std::vector<Stretch> stretches;
  const int64_t first_column = unit % sum.column_units * sum.column_chunk;
  const int64_t last_column = std::min(sum.columns, first_column + sum.column_chunk);
  const int64_t first_row = unit / sum.column_units * sum.row_chunk;
  const int64_t last_row = std::min(sum.rows, first_row + sum.row_chunk);
  const int64_t panel = sum.steps * kPanelStep, panels = ceil_div(last_column - first_column, kSide);
  const int64_t edges = kSide * kStep * sum.steps;
  scratch.reserve(Scratch::room<Bits>(panels * panel) + Scratch::room<Bits>(edges));
  Bits* packed = scratch.take<Bits>(panels * panel);
  Bits* edge = scratch.take<Bits>(edges);
  for (int64_t i = 0; i < panels; i++) {
    const int64_t column = first_column + i * kSide, columns = std::min(kSide, last_column - column);
    Bits* target = packed + i * panel;
    for (const Term& term : sum.terms) {
      if (term.turned) {
        pack_turned(term.y + column * term.depth, term.depth, term.depth, columns, target);
      } else {
        pack(term.y + column, sum.columns, term.depth, columns, target);
      }
      target += ceil_div(term.depth, kStep) * kPanelStep;
    }
  }
  alignas(64) float sums[kSide * kSide];
  for (int64_t row = first_row; row < last_row; row += kSide) {
    const int64_t rows = std::min(kSide, last_row - row);
    stretches_of(sum, row, rows, edge, stretches);
    for (int64_t i = 0; i < panels; i++) {
      const int64_t column = first_column + i * kSide, columns = std::min(kSide, last_column - column);
      const int64_t at = row * sum.columns + column;
      if (!sum.rounded && rows == kSide && columns == kSide) {
        multiply(block, stretches, packed + i * panel, static_cast<float*>(sum.out) + at, sum.columns);
        continue;
      }
      multiply(block, stretches, packed + i * panel, sums, kSide);
      for (int64_t r = 0; r < rows; r++) {
        const float* from = sums + r * kSide;
        if (sum.rounded) {
          round_row(from, columns, static_cast<Bits*>(sum.out) + at + r * sum.columns);
        } else {
          std::memcpy(static_cast<float*>(sum.out) + at + r * sum.columns, from, columns * sizeof(float));
        }
      }
    }
  }
}

// Cuts a sum into about `wanted` units.
inline void plan(Sum& sum, int64_t wanted) {
  for (const Term& term : sum.terms) sum.steps += ceil_div(term.depth, kStep);
  const int64_t panels = std::max<int64_t>(1, ceil_div(sum.columns, kSide));
  const int64_t panel_bytes = std::max<int64_t>(1, sum.steps) * kPanelStep * sizeof(Bits);
  const int64_t fitting = std::max<int64_t>(1, kUnitBytes / panel_bytes);
  const int64_t cuts = std::min(panels, std::max(ceil_div(panels, fitting), wanted));
  sum.column_chunk = ceil_div(panels, cuts) * kSide;
  sum.column_units = std::max<int64_t>(1, ceil_div(sum.columns, sum.column_chunk));
  // Every cut of the rows packs the same columns once more: four blocks of rows at least.
  const int64_t row_cuts =
      std::clamp<int64_t>(wanted / sum.column_units, 1, std::max<int64_t>(1, sum.rows / (4 * kSide)));
  sum.row_chunk = std::max(kSide, up(ceil_div(sum.rows, row_cuts), kSide));
  sum.units = sum.column_units * ceil_div(sum.rows, sum.row_chunk);
}

inline ffi::Error products(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           ffi::Span<const int64_t> terms, ffi::Span<const int64_t> turned) {
  const auto refused = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("nalora_products: ") + what);
  };
  if (terms.size() != rets.size() || 2 * turned.size() != args.size()) return refused("operands do not fit the terms");
  std::vector<Sum> sums;
  int64_t units = 0;
  size_t next = 0;
  for (size_t p = 0; p < rets.size(); p++) {
    auto out = rets.get<ffi::AnyBuffer>(p);
    if (out.has_error()) return out.error();
    const auto shape = (*out)->dimensions();
    if (shape.size() != 2) return refused("a result is not a matrix");
    Sum sum;
    sum.rows = shape[0];
    sum.columns = shape[1];
    sum.out = (*out)->untyped_data();
    sum.rounded = (*out)->element_type() != ffi::F32;
    for (int64_t t = 0; t < terms[p]; t++, next++) {
      if (next >= turned.size()) return refused("operands do not fit the terms");
      auto x = args.get<ffi::AnyBuffer>(2 * next), y = args.get<ffi::AnyBuffer>(2 * next + 1);
      if (x.has_error()) return x.error();
      if (y.has_error()) return y.error();
      const bool turn_y = turned[next] != 0;
      const auto left = x->dimensions(), right = y->dimensions();
      if (left.size() != 2 || right.size() != 2 || left[0] != sum.rows || right[turn_y ? 0 : 1] != sum.columns ||
          left[1] != right[turn_y ? 1 : 0]) {
        return refused("shapes do not fit");
      }
      if (x->element_type() != ffi::U16 || y->element_type() != ffi::U16) return refused("operands must be uint16");
      sum.terms.push_back({static_cast<const Bits*>(x->untyped_data()), static_cast<const Bits*>(y->untyped_data()),
                           left[1], turn_y});
    }
    plan(sum, ceil_div(kUnitsPerThread * std::max<int64_t>(1, pool.num_threads()), static_cast<int64_t>(rets.size())));
    units += sum.units;
    sums.push_back(std::move(sum));
  }
  const bool done = share(pool, units, [sums = std::move(sums)](int64_t unit, Block& block, Scratch& scratch) {
    size_t i = 0;
    for (; unit >= sums[i].units; i++) unit -= sums[i].units;
    run_unit(sums[i], unit, block, scratch);
  });
  return done ? ffi::Error::Success() : ffi::Error::Internal("nalora_products: out of memory");
}

}  // namespace nalora
