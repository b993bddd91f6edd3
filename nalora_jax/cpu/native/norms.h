// The root-mean-square norm of a residual stream and its gradient, each in one pass, with the sums around them:
//
//   s = x + y,   r = 1 / sqrt(mean(s^2) + eps),   n = s r scale,   dx = ds + r (g - s r^2 mean(g s)), g = dn scale
//
// The norm reads s as it is kept for the gradient, in bfloat16; the stream itself stays float32.

#pragma once

#include "block.h"
#include "elementwise.h"

namespace nalora {

// `unit(row)` of all rows.
template <typename Unit>
bool by_rows(ffi::ThreadPool& pool, int64_t rows, Unit unit) {
  return share(pool, ceil_div(rows, kSide), [=](int64_t i, Block&, Scratch&) {
    for (int64_t row = i * kSide; row < std::min(rows, (i + 1) * kSide); row++) unit(row);
  });
}

// `unit(first, n)` of the columns of a row, 32 at a time; n is 32 but at the end.
template <typename Unit>
INLINED void by_columns(int64_t columns, Unit unit) {
  int64_t first = 0;
  for (; first + kSide <= columns; first += kSide) unit(first, kSide);
  if (first < columns) unit(first, columns - first);
}

// s is wanted where there is a y.
inline ffi::Error add_rms(ffi::ThreadPool pool, Rows x, Rows y, ffi::Result<Rows> s, ffi::Result<Matrix> held,
                          ffi::Result<Row> inverse, float eps) {
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1];
  const bool added = y.dimensions()[0] > 0;
  if ((added && !(is_of(y, rows, columns) && is_of(*s, rows, columns))) || !is_of(*held, rows, columns)) {
    return ffi::Error::InvalidArgument("nalora_add_rms: shapes do not fit");
  }
  const float *of_x = x.typed_data(), *of_y = y.typed_data();
  float *to_s = s->typed_data(), *to_inverse = inverse->typed_data();
  Bits* to_held = held->typed_data();
  by_rows(pool, rows, [=](int64_t row) {
    const int64_t at = row * columns;
    float squares[kSide] = {};
    by_columns(columns, [&](int64_t first, int64_t n) {
      float values[kSide] = {};
      std::copy_n(of_x + at + first, n, values);
      if (added) {
        for (int64_t j = 0; j < n; j++) values[j] += of_y[at + first + j];
        std::copy_n(values, n, to_s + at + first);
      }
      round_row(values, n, to_held + at + first);
      widen_row(to_held + at + first, n, values);
      for (int64_t j = 0; j < kSide; j++) squares[j] += values[j] * values[j];
    });
    to_inverse[row] = 1.0f / std::sqrt(sum_of(squares) / columns + eps);
  });
  return ffi::Error::Success();
}

inline ffi::Error normalise(ffi::ThreadPool pool, Matrix held, Row inverse, Row scale, ffi::Result<Matrix> out) {
  const int64_t rows = held.dimensions()[0], columns = held.dimensions()[1];
  if (inverse.dimensions()[0] != rows || scale.dimensions()[0] != columns || !is_of(*out, rows, columns)) {
    return ffi::Error::InvalidArgument("nalora_normalise: shapes do not fit");
  }
  const Bits* of_held = held.typed_data();
  const float *of_inverse = inverse.typed_data(), *of_scale = scale.typed_data();
  Bits* to = out->typed_data();
  by_rows(pool, rows, [=](int64_t row) {
    const int64_t at = row * columns;
    by_columns(columns, [&](int64_t first, int64_t n) {
      float values[kSide];
      widen_row(of_held + at + first, n, values);
      for (int64_t j = 0; j < n; j++) values[j] *= of_inverse[row] * of_scale[first + j];
      round_row(values, n, to + at + first);
    });
  });
  return ffi::Error::Success();
}

inline ffi::Error norm_gradient(ffi::ThreadPool pool, Matrix held, Row inverse, Row scale, Matrix dn, Rows ds,
                                ffi::Result<Rows> dx) {
  const int64_t rows = held.dimensions()[0], columns = held.dimensions()[1];
  if (inverse.dimensions()[0] != rows || scale.dimensions()[0] != columns || !is_of(dn, rows, columns) ||
      !is_of(ds, rows, columns) || !is_of(*dx, rows, columns)) {
    return ffi::Error::InvalidArgument("nalora_norm_gradient: shapes do not fit");
  }
  const Bits *of_held = held.typed_data(), *of_dn = dn.typed_data();
  const float *of_inverse = inverse.typed_data(), *of_scale = scale.typed_data(), *of_ds = ds.typed_data();
  float* to = dx->typed_data();
  by_rows(pool, rows, [=](int64_t row) {
    const int64_t at = row * columns;
    float products[kSide] = {};
    by_columns(columns, [&](int64_t first, int64_t n) {
      float s[kSide], g[kSide];
      widen_row(of_held + at + first, n, s);
      widen_row(of_dn + at + first, n, g);
      for (int64_t j = 0; j < n; j++) products[j] += s[j] * g[j] * of_scale[first + j];
    });
    const float r = of_inverse[row], shared = r * r * r * (sum_of(products) / columns);
    by_columns(columns, [&](int64_t first, int64_t n) {
      float s[kSide], g[kSide];
      widen_row(of_held + at + first, n, s);
      widen_row(of_dn + at + first, n, g);
      for (int64_t j = 0; j < n; j++) {
        to[at + first + j] = of_ds[at + first + j] + (r * g[j] * of_scale[first + j] - shared * s[j]);
      }
    });
  });
  return ffi::Error::Success();
}

}  // namespace nalora
