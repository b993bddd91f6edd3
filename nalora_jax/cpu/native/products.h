// Sums of matrix products: out[p] = x[0] y[0] + x[1] y[1] + ..., several p in one call, so that threads share them all.
//
// Each x is [rows, depth], each y [depth, columns] or, transposed, [columns, depth]; rows and columns are those of out[p],
// depths are free. A y may lie in a stack of matrices, of which an index names one. The work is cut into groups of
// columns, no more than there are threads where they fit the second-level cache, because every group reads all of x. The
// thread that opens a group packs its part of every y and multiplies some rows at a time; one that finds no group to open
// takes rows of those that others have opened. Nothing else is copied, but edges that do not fill a tile. Sums stay in the
// tiles over the whole depth, because adding to what was stored waits for the store: cutting the depth costs a third.

#pragma once

#include <deque>
#include <string>

#include "narrow.h"

namespace nalora {

constexpr int64_t kGroupBytes = 832 << 10;  // what a group packs at most, but for a single panel
constexpr int64_t kRowsAtOnce = 4 * kSide;  // that a thread takes of a group
constexpr int64_t kPacking = 4 * kSide;     // rows that are multiplied with a panel while one is packed

struct Group {
  Group(const Sum& sum, int64_t column, int64_t columns) : sum(sum), column(column), columns(columns) {}
  const Sum& sum;
  const int64_t column, columns;
  std::atomic<const Bits*> packed{nullptr};  // its panels, in the memory of the thread that opened it
  std::atomic<int64_t> taken{0}, done{0};    // rows
  int64_t panels() const { return ceil_div(columns, kSide); }
  // Numbers of the edges that a thread copies at a time.
  int64_t edges() const {
    return std::max<int64_t>(kRowsAtOnce * kStep * sum.terms.size(), kSide * kStep * sum.steps);
  }
};

// Sums, and how far they are.
struct Work {
  std::vector<Sum> sums;
  std::deque<Group> groups;
  std::atomic<size_t> opened{0};
};

inline void cut(Work& work, int64_t threads) {
  const auto panels_of = [](const Sum& sum) { return ceil_div(sum.columns, kSide); };
  const auto cost_of_panel = [](const Sum& sum) { return std::max<int64_t>(1, sum.steps * (sum.rows + kPacking)); };
  int64_t cost = 0;
  for (const Sum& sum : work.sums) cost += panels_of(sum) * cost_of_panel(sum);
  for (const Sum& sum : work.sums) {
    const int64_t fitting = kGroupBytes / std::max<int64_t>(1, sum.panel() * sizeof(Bits));
    const int64_t most = std::max<int64_t>(1, std::min(fitting, ceil_div(cost, threads * cost_of_panel(sum))));
    const int64_t panels = panels_of(sum), groups = ceil_div(panels, most);
    for (int64_t i = 0; i < groups; i++) {
      const int64_t column = panels * i / groups * kSide, end = std::min(panels * (i + 1) / groups * kSide, sum.columns);
      work.groups.emplace_back(sum, column, end - column);
    }
  }
}

inline void pack(const Group& group, Bits* packed) {
  const Sum& sum = group.sum;
  for (const Term& term : sum.terms) {
    // A few rows of all panels, then the next: memory is fast where what is read lies side by side.
    const int64_t depth = term.transposed ? term.depth : kStep;
    for (int64_t k = 0; k < term.depth; k += depth, packed += ceil_div(depth, kStep) * kPanelStep) {
      for (int64_t c = 0; c < group.columns; c += kSide) {
        const int64_t column = group.column + c, columns = std::min(kSide, group.columns - c);
        Bits* panel = packed + c / kSide * sum.panel();
        if (term.transposed) {
          pack_transposed(term.y + column * term.depth, term.depth, term.depth, columns, panel);
        } else {
          const Bits* from = term.y + k * sum.columns + column;
          const int64_t coming = std::min(kStep, term.depth - k - kStep);
          for (int64_t i = 0; i < coming; i++) __builtin_prefetch(from + (kStep + i) * sum.columns, 0, 2);
          pack(from, sum.columns, std::min(kStep, term.depth - k), columns, panel);
        }
      }
    }
  }
}

// Some rows of a group: a multiple of 32, or fewer.
inline void multiply_rows(const Group& group, int64_t first, int64_t count, Block& block, Bits* edge) {
  static thread_local std::vector<Stretch> stretches;
  const Sum& sum = group.sum;
  // Rows are read as they lie where they are whole units, else from a copy with zeros. All copies come before the first
  // product: a tile that reads what was just stored waits for it.
  stretches.clear();
  for (const Term& term : sum.terms) {
    const Bits* x = term.x + first * term.depth;
    const int64_t whole = term.depth % Block::kDepthUnit == 0 ? term.depth : term.depth / kStep * kStep;
    const int64_t done = count % Block::kRowUnit != 0 ? 0 : whole, left = term.depth - done, width = up(left, kStep);
    if (done > 0) stretches.push_back({x, term.depth, done});
    if (left == 0) continue;
    gather(x + done, term.depth, count, left, width, edge);
    stretches.push_back({edge, width, left});
    edge += up(count, kSide) * width;
  }
  const Term& main = sum.terms.front();
  const int64_t bytes = sum.rounded ? sizeof(Bits) : sizeof(float), panels = group.panels();
  for (int64_t row = first; row < first + count; row += kSide) {
    const int64_t rows = std::min(kSide, first + count - row), next = row + kSide;
    const int64_t coming = std::clamp<int64_t>(sum.rows - next, 0, kSide);
    block.hold(stretches, rows);
    for (int64_t i = 0; i < panels; i++) {
      const int64_t column = group.column + i * kSide, columns = std::min(kSide, group.columns - i * kSide);
      char* out = static_cast<char*>(sum.out) + (row * sum.columns + column) * bytes;
      const int64_t from = coming * i / panels, to = coming * (i + 1) / panels;
      const Ahead ahead{true, main.x + (next + from) * main.depth, main.depth, to - from};
      block.multiply(group.packed + i * sum.panel(), {out, sum.columns, rows, columns, sum.rounded}, ahead);
    }
    for (Stretch& stretch : stretches) stretch.x += kSide * stretch.stride;
  }
}

inline void take_rows(Group& group, Block& block, Bits* edge) {
  const int64_t rows = group.sum.rows;
  for (int64_t row; (row = group.taken.fetch_add(kRowsAtOnce)) < rows;) {
    const int64_t count = std::min(kRowsAtOnce, rows - row), whole = count / kSide * kSide;
    if (whole > 0) multiply_rows(group, row, whole, block, edge);
    if (whole < count) multiply_rows(group, row + whole, count - whole, block, edge);
    group.done += count;
  }
}

// What one thread does of the work, until nothing is left that it could begin.
inline void take(Work& work, Block& block, Scratch& scratch) {
  for (size_t i; (i = work.opened++) < work.groups.size();) {
    Group& group = work.groups[i];
    const int64_t room = group.panels() * group.sum.panel();
    try {
      scratch.reserve(Scratch::room<Bits>(room) + Scratch::room<Bits>(group.edges()));
    } catch (const std::bad_alloc&) {
      group.taken = group.sum.rows;  // lest others wait for it
      throw;
    }
    Bits* packed = scratch.take<Bits>(room);
    pack(group, packed);
    group.packed = packed;
    take_rows(group, block, scratch.take<Bits>(group.edges()));
    wait_until([&] { return group.done == group.sum.rows; });  // others read what is packed
  }
  for (Group& group : work.groups) {
    if (group.taken >= group.sum.rows) continue;
    scratch.reserve(Scratch::room<Bits>(group.edges()));
    wait_until([&] { return group.packed != nullptr || group.taken >= group.sum.rows; });
    if (group.packed != nullptr) take_rows(group, block, scratch.take<Bits>(group.edges()));
  }
}

inline ffi::Error products(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           ffi::Span<const int64_t> terms, ffi::Span<const int64_t> transposed,
                           ffi::Span<const int64_t> stacked) {
  const auto refused = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("nalora_products: ") + what);
  };
  const size_t factors = 2 * transposed.size(), slices = std::count(stacked.begin(), stacked.end(), 1);
  if (terms.size() != rets.size() || stacked.size() != transposed.size() || factors + slices != args.size()) {
    return refused("operands do not fit the terms");
  }
  const auto work = std::make_shared<Work>();
  size_t next = 0, next_index = factors;
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
      if (next >= transposed.size()) return refused("operands do not fit the terms");
      auto x = args.get<ffi::AnyBuffer>(2 * next), y = args.get<ffi::AnyBuffer>(2 * next + 1);
      if (x.has_error()) return x.error();
      if (y.has_error()) return y.error();
      const bool turn_y = transposed[next] != 0, in_stack = stacked[next] != 0;
      const auto left = x->dimensions();
      auto right = y->dimensions();
      if (left.size() != 2 || right.size() != (in_stack ? 3 : 2)) return refused("an operand is not a matrix");
      if (x->element_type() != ffi::U16 || y->element_type() != ffi::U16) return refused("operands must be uint16");
      const Bits* of_y = static_cast<const Bits*>(y->untyped_data());
      if (in_stack) {
        auto index = args.get<Integer>(next_index++);
        if (index.has_error()) return index.error();
        const int64_t which = *index->typed_data();
        if (which < 0 || which >= right[0]) return refused("an index is outside of its stack");
        right = {right.begin() + 1, 2};
        of_y += which * right[0] * right[1];
      }
      if (left[0] != sum.rows || right[turn_y ? 0 : 1] != sum.columns || left[1] != right[turn_y ? 1 : 0]) {
        return refused("shapes do not fit");
      }
      sum.terms.push_back({static_cast<const Bits*>(x->untyped_data()), of_y, left[1], turn_y});
      sum.steps += ceil_div(left[1], kStep);
    }
    work->sums.push_back(std::move(sum));
  }
  bool done;
  if (std::all_of(work->sums.begin(), work->sums.end(), [](const Sum& sum) { return sum.rows <= kSide; })) {
    done = multiply_narrow(pool, std::shared_ptr<const std::vector<Sum>>(work, &work->sums));
  } else {
    const int64_t threads = std::max<int64_t>(1, pool.num_threads());
    cut(*work, threads);
    done = share(pool, threads, [work](int64_t, Block& block, Scratch& scratch) { take(*work, block, scratch); });
  }
  return done ? ffi::Error::Success() : ffi::Error::Internal("nalora_products: out of memory");
}

}  // namespace nalora
