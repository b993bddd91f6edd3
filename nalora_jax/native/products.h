// Sums of matrix products: out[p] = x[0] y[0] + x[1] y[1] + ..., several p in one call, so that threads share them all.
//
// Each x is [rows, depth], each y [depth, columns] or, turned, [columns, depth]; rows and columns are those of out[p],
// depths are free. The work is cut into units of some columns (at the end, also of some rows). A unit packs its
// part of every y, into memory of its thread that fits the second-level cache, and multiplies all of its rows with that.
// Nothing else is copied, but edges that do not fill a tile. Sums stay in the tiles over the whole depth, because adding
// to what was stored waits for the store: cutting the depth costs a third.

#pragma once

#include <string>

#include "block.h"

namespace nalora {

constexpr int64_t kUnitBytes = 640 * 1024;  // what a unit packs at most, but for a single panel
constexpr int64_t kCutRows = 4 * kSide;     // of a unit where rows are cut, each of which packs the columns once more
constexpr int64_t kPacking = 32;            // rows that are multiplied with a panel while one is packed

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
};

// What a thread does at a time.
struct Unit {
  int64_t sum, row, rows, column, columns;
};

// How the rows of a block are read: as they lie where they are whole units, else from a copy with zeros.
inline void stretches_of(const Sum& sum, int64_t row, int64_t rows, Bits* edge, std::vector<Stretch>& stretches) {
  stretches.clear();
  for (const Term& term : sum.terms) {
    const Bits* x = term.x + row * term.depth;
    const int64_t steps = term.depth / kStep * kStep;
    const int64_t done = rows % Block::kRowUnit != 0 ? 0 : term.depth % Block::kDepthUnit == 0 ? term.depth : steps;
    if (done > 0) stretches.push_back({x, term.depth, done});
    if (done == term.depth) continue;
    const int64_t left = term.depth - done, stride = up(left, kStep);
    std::memset(edge, 0, kSide * stride * sizeof(Bits));
    for (int64_t i = 0; i < rows; i++) std::memcpy(edge + i * stride, x + i * term.depth + done, left * sizeof(Bits));
    stretches.push_back({edge, stride, left});
    edge += kSide * stride;
  }
}

inline void run_unit(const Sum& sum, const Unit& unit, Block& block, Scratch& scratch) {
  static thread_local std::vector<Stretch> stretches;
  const int64_t first_column = unit.column, last_column = unit.column + unit.columns;
  const int64_t first_row = unit.row, last_row = unit.row + unit.rows;
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
  const int64_t bytes = sum.rounded ? sizeof(Bits) : sizeof(float);
  for (int64_t row = first_row; row < last_row; row += kSide) {
    const int64_t rows = std::min(kSide, last_row - row);
    stretches_of(sum, row, rows, edge, stretches);
    block.hold(stretches, rows);
    for (int64_t i = 0; i < panels; i++) {
      const int64_t column = first_column + i * kSide, columns = std::min(kSide, last_column - column);
      char* out = static_cast<char*>(sum.out) + (row * sum.columns + column) * bytes;
      block.multiply(packed + i * panel, {out, sum.columns, rows, columns, sum.rounded});
    }
  }
}

// Cuts sums into units, large ones first and ever smaller ones: a thread that began late, or that another program
// held up, leaves the others little to wait for.
inline std::vector<Unit> units_of(const std::vector<Sum>& sums, int64_t threads) {
  std::vector<Unit> units;
  const auto panels_of = [](const Sum& sum) { return ceil_div(sum.columns, kSide); };
  const auto cost_of_panel = [](const Sum& sum) { return sum.steps * (sum.rows + kPacking); };
  int64_t left = 0;
  for (const Sum& sum : sums) left += panels_of(sum) * cost_of_panel(sum);
  for (size_t i = 0; i < sums.size(); i++) {
    const Sum& sum = sums[i];
    const int64_t panels = panels_of(sum), cost = std::max<int64_t>(1, cost_of_panel(sum));
    const int64_t panel_bytes = std::max<int64_t>(1, sum.steps) * kPanelStep * sizeof(Bits);
    const int64_t fitting = std::max<int64_t>(1, kUnitBytes / panel_bytes);
    for (int64_t panel = 0, n; panel < panels; panel += n, left -= n * cost) {
      const int64_t share = left / (2 * threads);
      n = std::min(std::clamp<int64_t>(share / cost, 1, fitting), panels - panel);
      const int64_t cuts = std::clamp<int64_t>(ceil_div(cost, share + 1), 1, std::max<int64_t>(1, sum.rows / kCutRows));
      const int64_t column = panel * kSide, columns = std::min(n * kSide, sum.columns - column);
      const int64_t rows = std::max(kSide, up(ceil_div(sum.rows, cuts), kSide));
      for (int64_t row = 0; row < sum.rows; row += rows) {
        units.push_back({static_cast<int64_t>(i), row, std::min(rows, sum.rows - row), column, columns});
      }
    }
  }
  return units;
}

inline ffi::Error products(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           ffi::Span<const int64_t> terms, ffi::Span<const int64_t> turned) {
  const auto refused = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("nalora_products: ") + what);
  };
  if (terms.size() != rets.size() || 2 * turned.size() != args.size()) return refused("operands do not fit the terms");
  std::vector<Sum> sums;
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
      sum.steps += ceil_div(left[1], kStep);
    }
    sums.push_back(std::move(sum));
  }
  std::vector<Unit> units = units_of(sums, std::max<int64_t>(1, pool.num_threads()));
  const int64_t count = units.size();
  const auto work = [sums = std::move(sums), units = std::move(units)](int64_t i, Block& block, Scratch& scratch) {
    run_unit(sums[units[i].sum], units[i], block, scratch);
  };
  const bool done = share(pool, count, work);
  return done ? ffi::Error::Success() : ffi::Error::Internal("nalora_products: out of memory");
}

}  // namespace nalora
