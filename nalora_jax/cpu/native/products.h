// Sums of matrix products: out[p] = x[0] y[0] + x[1] y[1] + ..., for several p in one call, whose work threads share.
//
// Each x is [rows, depth], each y [depth, columns] or, transposed, [columns, depth]; rows and columns are those of
// out[p], depths are free. A y may be one matrix of a stack, selected by an index. The work is divided into groups of
// columns that fit in the second-level cache; every group reads all of x, so there are no more groups than needed. The
// thread that opens a group packs its part of every y and multiplies some rows at a time. A thread without a group to
// open processes rows of open groups. Apart from edges that do not fill a tile, nothing else is copied. Sums stay in
// the tiles over the whole depth, because adding to stored values waits for the store: dividing the depth costs a
// third.

#pragma once

#include <deque>

#include "block.h"

namespace nalora {

constexpr int64_t kGroupBytes = 832 << 10;  // most bytes that a group packs, unless it is a single panel
constexpr int64_t kRowsAtOnce = 4 * kSide;  // that a thread processes of a group at a time
constexpr int64_t kPacking = 4 * kSide;     // rows that are multiplied with a panel while one is packed

struct Term {
  const Bits* x;
  const Bits* y;
  int64_t depth;
  bool transposed;
};

struct Sum {
  std::vector<Term> terms;
  char* out;
  bool rounded;  // to bfloat16
  int64_t rows, columns;
  int64_t steps = 0;  // of all terms
  int64_t panel() const { return steps * kPanelStep; }
  int64_t bytes() const { return rounded ? sizeof(Bits) : sizeof(float); }
};

struct Group {
  Group(const Sum& sum, int64_t column, int64_t columns) : sum(sum), column(column), columns(columns) {}
  const Sum& sum;
  const int64_t column, columns;
  std::atomic<const Bits*> packed{nullptr};  // the panels, in the memory of the thread that opened it
  std::atomic<int64_t> taken{0}, done{0};    // rows
  int64_t panels() const { return ceil_div(columns, kSide); }
  // Numbers of the edges that a thread copies at a time.
  int64_t edges() const {
    return std::max<int64_t>(kRowsAtOnce * kStep * sum.terms.size(), kSide * kStep * sum.steps);
  }
};

// Sums and their progress.
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
    // A few rows of all panels, then the next rows, because contiguous reads are fast.
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

// Multiplies some rows of a group: a multiple of 32, or fewer than 32.
inline void multiply_rows(const Group& group, int64_t first, int64_t count, Block& block, Bits* edge) {
  static thread_local std::vector<Stretch> stretches;
  const Sum& sum = group.sum;
  // Whole units of rows are read in place, the others from a copy with zeros. All copies precede the first product,
  // because a tile that reads a value that was just stored waits for the store.
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
  const int64_t panels = group.panels();
  for (int64_t row = first; row < first + count; row += kSide) {
    const int64_t rows = std::min(kSide, first + count - row), next = row + kSide;
    const int64_t coming = std::clamp<int64_t>(sum.rows - next, 0, kSide);
    block.hold(stretches, rows);
    for (int64_t i = 0; i < panels; i++) {
      const int64_t column = group.column + i * kSide, columns = std::min(kSide, group.columns - i * kSide);
      char* out = sum.out + (row * sum.columns + column) * sum.bytes();
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

// Processes work on one thread until none is left to start.
inline void take(Work& work, Block& block, Scratch& scratch) {
  for (size_t i; (i = work.opened++) < work.groups.size();) {
    Group& group = work.groups[i];
    const int64_t room = group.panels() * group.sum.panel();
    try {
      scratch.reserve(Scratch::room<Bits>(room) + Scratch::room<Bits>(group.edges()));
    } catch (const std::bad_alloc&) {
      group.taken = group.sum.rows;  // so that other threads do not wait for it
      throw;
    }
    Bits* packed = scratch.take<Bits>(room);
    pack(group, packed);
    group.packed = packed;
    take_rows(group, block, scratch.take<Bits>(group.edges()));
    wait_until([&] { return group.done == group.sum.rows; });  // other threads read the packed panels
  }
  for (Group& group : work.groups) {
    if (group.taken >= group.sum.rows) continue;
    scratch.reserve(Scratch::room<Bits>(group.edges()));
    wait_until([&] { return group.packed != nullptr || group.taken >= group.sum.rows; });
    if (group.packed != nullptr) take_rows(group, block, scratch.take<Bits>(group.edges()));
  }
}

// With runs, all x and results have their axis first, and a y has it if it differs between them.
inline ffi::Error products(Pool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, Counts terms,
                           Counts transposed, Counts stacked) {
  const auto work = std::make_shared<Work>();
  size_t next = 0, next_index = 2 * transposed.size();
  for (size_t p = 0; p < rets.size(); p++) {
    auto out = *rets.get<ffi::AnyBuffer>(p);
    const auto shape = out->dimensions();
    const auto own = [&](size_t t) { return !stacked[t] && args.get<ffi::AnyBuffer>(2 * t + 1)->dimensions().size() == 3; };
    bool shared = true;  // runs that share every y are rows of one product
    for (size_t t = next; t < next + terms[p]; t++) shared &= !own(t);
    int64_t runs = shape.size() == 3 ? shape.front() : 1, rows = shape[shape.size() - 2];
    if (shared) rows *= std::exchange(runs, 1);
    std::vector<Sum> sums(runs);
    for (int64_t run = 0; run < runs; run++) {
      Sum& sum = sums[run];
      sum.rows = rows;
      sum.columns = shape.back();
      sum.rounded = out->element_type() != ffi::F32;
      sum.out = static_cast<char*>(out->untyped_data()) + run * rows * sum.columns * sum.bytes();
    }
    for (int64_t t = 0; t < terms[p]; t++, next++) {
      const auto x = *args.get<ffi::AnyBuffer>(2 * next), y = *args.get<ffi::AnyBuffer>(2 * next + 1);
      const int64_t depth = x.dimensions().back(), size = depth * shape.back();
      int64_t which = 0;
      if (stacked[next]) {
        which = *args.get<Integer>(next_index++)->typed_data();
        if (which < 0 || which >= y.dimensions().front()) {
          return ffi::Error::InvalidArgument("nalora_products: an index is outside of its stack");
        }
      }
      for (int64_t run = 0; run < runs; run++) {
        const Bits* of_x = static_cast<const Bits*>(x.untyped_data()) + run * rows * depth;
        const Bits* of_y = static_cast<const Bits*>(y.untyped_data()) + (own(next) ? run : which) * size;
        sums[run].terms.push_back({of_x, of_y, depth, transposed[next] != 0});
        sums[run].steps += ceil_div(depth, kStep);
      }
    }
    std::move(sums.begin(), sums.end(), std::back_inserter(work->sums));
  }
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  cut(*work, threads);
  return result(share(pool, threads, [work](int64_t, Block& block, Scratch& scratch) { take(*work, block, scratch); }));
}

}  // namespace nalora
