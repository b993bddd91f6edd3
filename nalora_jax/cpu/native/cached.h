// Attention of one new token a row to the cached keys of that row and to itself:
//
//   s = cap(scale q k), unseen keys left out,   out = softmax(s, sink) v
//
// The sink of a head is one more score, which has no value.
//
// Keys are [dim, slots] and values [slots, dim], of a layer of the cache, read where they lie, up to the last slot that
// holds anything. Which slots a query sees is decided by integers, as in attention.h.

#pragma once

#include "few.h"

namespace nalora {

struct Cached {
  const float *q, *k, *v;  // of the new tokens: [batch, heads, dim], [batch, kv_heads, dim]
  const Bits *keys, *values;  // [batch, kv_heads, dim, slots], [batch, kv_heads, slots, dim]
  const int32_t *positions, *segments, *key_positions, *key_segments;  // [batch], [batch, slots]
  const float* sinks;  // [heads]
  float* out;  // [batch, heads, dim]
  int64_t heads, kv_heads, dim, slots;
  int32_t window;
  float scale, cap;

  // Of products that are in place.
  void score(float* products, int64_t count) const {
    for (int64_t t = 0; t < count; t++) products[t] *= scale;
    if (cap > 0) {
      for (int64_t t = 0; t < count; t++) products[t] = capped(products[t], cap);
    }
  }
};

// As the cache will hold it.
inline float narrowed(float value) { return widened(rounded(value)); }

// kRows queries, from `first` on, that read key head `head` of row `row`.
template <int kRows>
void attend_cached(const Cached& of, int64_t row, int64_t head, int64_t first, int64_t used, Scratch& scratch) {
  const int64_t wide = up(used, kSide), tall = up(of.dim, kSide), at = row * of.kv_heads + head;
  const int64_t numbers = kRows * (2 * tall + wide);
  scratch.reserve(Scratch::room<float>(numbers));
  float* q = scratch.take<float>(numbers);
  float *out = q + kRows * tall, *weights = out + kRows * tall;
  std::fill_n(q, numbers, 0.0f);
  const float *k = of.k + at * of.dim, *v = of.v + at * of.dim;
  const int64_t query = row * of.heads + first;
  for (int64_t r = 0; r < kRows; r++) {
    for (int64_t d = 0; d < of.dim; d++) q[r * tall + d] = narrowed(of.q[(query + r) * of.dim + d]);
  }
  add_few<kRows>(q, tall, of.keys + at * of.dim * of.slots, of.slots, of.dim, used, weights);
  const int32_t *positions = of.key_positions + row * of.slots, *segments = of.key_segments + row * of.slots;
  float own[kRows], total[kRows];
  for (int64_t r = 0; r < kRows; r++) {
    float* scores = weights + r * wide;
    own[r] = 0;
    for (int64_t d = 0; d < of.dim; d++) own[r] += q[r * tall + d] * narrowed(k[d]);
    of.score(own + r, 1);
    of.score(scores, used);
    const int32_t position = of.positions[row], segment = of.segments[row];
    for (int64_t t = 0; t < used; t++) {
      const int32_t ahead = position - positions[t];
      const bool seen = (segments[t] == segment) & (ahead >= 0) & (ahead < of.window);
      scores[t] = seen ? scores[t] : kUnseen;
    }
    std::fill(scores + used, scores + wide, kUnseen);
    float parts[kSide];
    std::fill_n(parts, kSide, own[r]);
    for (int64_t t = 0; t < wide; t += kSide) {
      for (int64_t j = 0; j < kSide; j += kLanes) put(parts + j, larger(lanes(parts + j), lanes(scores + t + j)));
    }
    const float sink = of.sinks[first + r], most = std::max(most_of(parts), sink);
    std::fill_n(parts, kSide, 0.0f);
    for (int64_t t = 0; t < wide; t += kSide) {
      for (int64_t j = 0; j < kSide; j += kLanes) {
        const Lanes weight = exponential(lanes(scores + t + j) - most);  // of what is not seen: 1e-38
        put(scores + t + j, weight);
        put(parts + j, lanes(parts + j) + weight);
      }
    }
    own[r] = exponential(own[r] - most);
    total[r] = own[r] + sum_of(parts) + exponential(sink - most);
  }
  add_few<kRows>(weights, wide, of.values + at * of.slots * of.dim, of.dim, used, of.dim, out);
  for (int64_t r = 0; r < kRows; r++) {
    for (int64_t d = 0; d < of.dim; d++) {
      of.out[(query + r) * of.dim + d] = (out[r * tall + d] + own[r] * narrowed(v[d])) / total[r];
    }
  }
}

inline ffi::Error cached_attention(ffi::ThreadPool pool, Totals q, Totals k, Totals v, Stack keys, Stack values,
                                   Integer layer, Indices positions, Indices segments, Integers key_positions,
                                   Integers key_segments, Integer window, Row sinks, ffi::Result<Totals> out,
                                   float scale, float cap) {
  const auto shape = q.dimensions(), stack = keys.dimensions(), other = values.dimensions();
  const int64_t batch = shape[0], heads = shape[1], dim = shape[2], kv_heads = stack[2], slots = stack[4];
  const auto is = [](auto found, std::initializer_list<int64_t> wanted) {
    return std::equal(found.begin(), found.end(), wanted.begin(), wanted.end());
  };
  if (kv_heads == 0 || heads % kv_heads != 0 || !is(stack, {stack[0], batch, kv_heads, dim, slots}) ||
      !is(other, {stack[0], batch, kv_heads, slots, dim}) || !is(k.dimensions(), {batch, kv_heads, dim}) ||
      !is(v.dimensions(), {batch, kv_heads, dim}) || !is(out->dimensions(), {batch, heads, dim}) ||
      !is(sinks.dimensions(), {heads}) || !is(positions.dimensions(), {batch}) || !is(segments.dimensions(), {batch}) ||
      !is(key_positions.dimensions(), {batch, slots}) || !is(key_segments.dimensions(), {batch, slots})) {
    return ffi::Error::InvalidArgument("nalora_cached_attention: shapes do not fit");
  }
  const int64_t at = *layer.typed_data(), size = batch * kv_heads * dim * slots;
  if (at < 0 || at >= stack[0]) return ffi::Error::InvalidArgument("nalora_cached_attention: no such layer");
  const Cached of{q.typed_data(), k.typed_data(), v.typed_data(), keys.typed_data() + at * size,
                  values.typed_data() + at * size, positions.typed_data(), segments.typed_data(),
                  key_positions.typed_data(), key_segments.typed_data(), sinks.typed_data(), out->typed_data(), heads,
                  kv_heads, dim, slots, *window.typed_data(), scale, cap};
  const bool done = share(pool, batch * kv_heads, [of](int64_t i, Block&, Scratch& scratch) {
    const int64_t row = i / of.kv_heads, head = i % of.kv_heads, groups = of.heads / of.kv_heads;
    int64_t used = of.slots;
    while (used > 0 && of.key_segments[row * of.slots + used - 1] == 0) used--;
    for (int64_t g = 0; g < groups; g += kFewRows) {
      const int64_t count = std::min(kFewRows, groups - g), first = head * groups + g;
      with_rows(count, [&](auto rows) { attend_cached<rows>(of, row, head, first, used, scratch); });
    }
  });
  return done ? ffi::Error::Success() : ffi::Error::Internal("nalora_cached_attention: out of memory");
}

}  // namespace nalora
