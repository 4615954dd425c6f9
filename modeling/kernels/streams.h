// Residual streams of hyper-connections.

#pragma once

#include "vectors.h"

namespace {

// to += weight * row.
inline void add_scaled(const Number* row, float weight, Size width, float* to) {
#pragma omp simd
  for (Size i = 0; i < width; ++i) to[i] += weight * widened(row[i]);
}

// n x n logits -> what Sinkhorn's steps make of their softmax, followed by their divisors alone (`sinkhorn` in
// hyper_connections.py).
void sinkhorn(float* matrix, Size n, Size iterations, float eps, float* out) {
  for (Size i = 0; i < n; ++i) {
    float *row = matrix + i * n, total = 0;
    const float top = *std::max_element(row, row + n);
    for (Size j = 0; j < n; ++j) total += row[j] = exponential(row[j] - top);
    for (Size j = 0; j < n; ++j) row[j] = row[j] / total + eps;
  }
  std::vector<float> rows(n, 1.0f), columns(n, 1.0f);
  for (Size step = 0; step < iterations; ++step) {
    for (Size i = 0; i < n && step > 0; ++i) {
      float divisor = eps * rows[i];
      for (Size j = 0; j < n; ++j) divisor += matrix[i * n + j] / columns[j];
      rows[i] = divisor;
    }
    for (Size j = 0; j < n; ++j) {
      float divisor = eps * columns[j];
      for (Size i = 0; i < n; ++i) divisor += matrix[i * n + j] / rows[i];
      columns[j] = divisor;
    }
  }
  for (Size i = 0; i < n; ++i)
    for (Size j = 0; j < n; ++j) out[i * n + j] = matrix[i * n + j] / (rows[i] * columns[j]);
}

// What a sub-layer reads from n residual streams [N, n, d], and by which weights it will write to them
// (`HyperConnection`): fn [(2 + n) n, n d], base [(2 + n) n], scale [3] -> out [N, d], post fp32 [N, n], residual fp32
// [N, n, n]. Where nothing will be written (`StreamCollapse`) these are null, fn is [n, n d], base [n] and scale [1].
void read_streams(const Number* streams, Size tokens, Size n, Size width, const Number* fn, const Number* base,
                  const Number* scale, double norm_eps, double eps, Size iterations, Number* out, float* post,
                  float* residual, Size threads) {
  const Size maps = post ? (2 + n) * n : n, whole = n * width;
  std::vector<float> logits(tokens * maps), own(width), wide(whole);
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * maps * whole > WORTH_A_THREAD)
  for (Size first = 0; first < maps; first += n)
    multiply(fn, first, first + n, streams, tokens, whole, [&](Size i, Size some, Size token, const float* found) {
      std::copy_n(found, some, &logits[token * maps + i]);
    });
  for (Size token = 0; token < tokens; ++token) {
    const Number* x = streams + token * whole;
    widen(x, wide.data(), whole);
    const float shrink = inverse_rms(wide.data(), whole, static_cast<float>(norm_eps));
    float* mixing = &logits[token * maps];
    for (Size i = 0; i < maps; ++i)
      mixing[i] = widened(base[i]) + mixing[i] * shrink * widened(scale[i < n ? 0 : i < 2 * n ? 1 : 2]);
    std::fill(own.begin(), own.end(), 0.0f);
    for (Size i = 0; i < n; ++i)
      add_scaled(x + i * width, sigmoid(mixing[i]) + static_cast<float>(eps), width, own.data());
    narrow(own.data(), out + token * width, width);
    if (!post) continue;
    for (Size i = 0; i < n; ++i) post[token * n + i] = 2 * sigmoid(mixing[n + i]);
    sinkhorn(mixing + 2 * n, n, iterations, static_cast<float>(eps), residual + token * n * n);
  }
}

// X'_k = post_k y + sum_j M_jk X_j: streams [N, n, d], output [N, d] and what `read_streams` kept -> out [N, n, d].
void write_streams(const Number* streams, const Number* output, const float* post, const float* residual, Size tokens,
                   Size n, Size width, Number* out) {
  std::vector<float> mixed(width);
  for (Size token = 0; token < tokens; ++token, streams += n * width, output += width, residual += n * n, post += n)
    for (Size k = 0; k < n; ++k, out += width) {
      std::fill(mixed.begin(), mixed.end(), 0.0f);
      add_scaled(output, post[k], width, mixed.data());
      for (Size j = 0; j < n; ++j) add_scaled(streams + j * width, residual[j * n + k], width, mixed.data());
      narrow(mixed.data(), out, width);
    }
}

}  // namespace
