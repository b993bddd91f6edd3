// Blocks of 32 x 32 sums of bfloat16 products by the CPU's fastest instructions, and the threads that share them.

#pragma once

#include <sched.h>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(NALORA_TILES)
#include "amx.h"
#elif defined(NALORA_DOTS)
#include "dots.h"
#else
#include "avx2.h"
#endif

namespace nalora {

namespace ffi = xla::ffi;

// Arguments from XLA, whose shapes Python has checked.
using Matrix = ffi::Buffer<ffi::U16, 2>;
using Numbers = ffi::Buffer<ffi::U16, 4>;
using Row = ffi::Buffer<ffi::F32, 1>;
using Rows = ffi::Buffer<ffi::F32, 2>;
using Totals = ffi::Buffer<ffi::F32, 3>;
using Floats = ffi::Buffer<ffi::F32, 4>;
using Integer = ffi::Buffer<ffi::S32, 0>;
using Integers = ffi::Buffer<ffi::S32, 2>;
using Counts = ffi::Span<const int64_t>;

struct Pool : ffi::ThreadPool {
  Pool(const ffi::ThreadPool& pool) : ffi::ThreadPool(pool) {}
};

inline ffi::Error result(bool done) {
  return done ? ffi::Error::Success() : ffi::Error::Internal("nalora: out of memory");
}

// Blocks of sums of one thread: products of a held left operand and packed panels.
//
// `Sums` defines kRowUnit and kDepthUnit, the units in which it reads the held operand; prepare(parts, count, rows),
// called when that operand changes; and run<added>(parts, count, panel, target, ahead): target = sum_i x[i] panel[i],
// added to the target's values if `added`. The panels of the parts follow each other.
class Block : Sums {
 public:
  using Sums::kDepthUnit;
  using Sums::kRowUnit;

  // Sets the left operand of later products: at most 32 rows.
  void hold(const std::vector<Stretch>& parts, int64_t rows) { hold(parts.data(), parts.size(), rows); }

  // The same with 32 rows.
  void hold(const Stretch& part) {
    one_ = part;
    hold(&one_, 1, kSide);
  }

  void multiply(const Bits* panel, const Target& to, const Ahead& ahead = {}) {
    run<false>(parts_, count_, panel, to, ahead);
  }

  // out[32, 32] = the held operand times the panel.
  void multiply(const Bits* panel, float* out, int64_t stride) { multiply(panel, {out, stride, kSide, kSide, false}); }

  // out[32, 32] += the same.
  void add(const Bits* panel, float* out, int64_t stride) {
    run<true>(parts_, count_, panel, {out, stride, kSide, kSide, false}, {});
  }

 private:
  Stretch one_;
  const Stretch* parts_ = nullptr;
  int64_t count_ = 0;

  void hold(const Stretch* parts, int64_t count, int64_t rows) {
    parts_ = parts;
    count_ = count;
    prepare(parts, count, rows);
  }
};

// Copies [rows, columns], whose rows are `stride` apart, to [up(rows, 32), width], padded with zeros.
inline void gather(const Bits* from, int64_t stride, int64_t rows, int64_t columns, int64_t width, Bits* to) {
  for (int64_t i = 0; i < up(rows, kSide); i++, to += width) {
    const int64_t n = i < rows ? columns : 0;
    std::memcpy(to, from + i * stride, n * sizeof(Bits));
    std::memset(to + n, 0, (width - n) * sizeof(Bits));
  }
}

// All functions share one, because a thread runs one function at a time.
inline Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

template <typename Condition>
void wait_until(Condition condition) {
  for (int64_t spins = 0; !condition(); spins++) {
    if (spins > 4096) sched_yield();
  }
}

// Calls `unit(i, block, scratch)` for i in [0, count) on this thread and XLA's pool; returns false if memory ran out.
template <typename Unit>
bool share(Pool& pool, int64_t count, Unit unit) {
  struct Job {
    Job(int64_t count, Unit unit) : count(count), unit(std::move(unit)) {}
    const int64_t count;
    Unit unit;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};

    void work() {
      int64_t i = next.fetch_add(1);
      if (i >= count) return;
      Scratch& scratch = scratch_of_thread();
      Block block;
      for (; i < count; i = next.fetch_add(1)) {
        try {
          unit(i, block, scratch);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
        done.fetch_add(1);
      }
    }
  };
  // Shared with the other threads, which may start after everything is done.
  auto job = std::make_shared<Job>(count, std::move(unit));
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), count); i++) {
    pool.Schedule([job] { job->work(); });
  }
  job->work();
  // Waits only for units that another thread has started: this thread has computed all others.
  wait_until([&] { return job->done.load() >= count; });
  return !job->failed;
}

}  // namespace nalora
