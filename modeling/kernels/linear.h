// Linear maps, RMSNorm, rotary positions and their angles.

#pragma once

#include "columns.h"

namespace {

constexpr Size TOKENS = 256;  // of a text, that a thread takes at a time

struct LinearMap {
  const Number* weight;
  Number* out;
  Size count;  // numbers of an output
};

// The same as `project`, of many tokens.
void project_text(const Number* x, Size tokens, Size width, const LinearMap (&maps)[4], Size threads) {
  Failure failure;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (Size first = 0; first < tokens; first += TOKENS)
    failure.watch([&] {
      for (const LinearMap& map : maps)
        for (Size row = 0; row < map.count; row += BLOCK) {
          const Size some = std::min(BLOCK, map.count - row);
          multiply_many(map.weight + row * width, some, SideBySide{x + first * width, width},
                        std::min(TOKENS, tokens - first), width, [&](Size i, const float* products) {
                          narrow(products, map.out + (first + i) * map.count + row, some);
                        });
        }
    });
  failure.raise();
}

// Up to four linear maps of the same tokens x [N, d]: weights [n_i, d] -> outputs [N, n_i]; n_i is 0 where there is no
// map.
void project(const Number* x, Size tokens, Size width, const Number* w0, Number* out0, Size n0, const Number* w1,
             Number* out1, Size n1, const Number* w2, Number* out2, Size n2, const Number* w3, Number* out3, Size n3,
             Size threads) {
  if (tokens > MANY) {
    project_text(x, tokens, width, {{w0, out0, n0}, {w1, out1, n1}, {w2, out2, n2}, {w3, out3, n3}}, threads);
    return;
  }
  const Number* weights[] = {w0, w1, w2, w3};
  Number* outputs[] = {out0, out1, out2, out3};
  const Size counts[] = {n0, n1, n2, n3};
  Size blocks = 0, rows = n0 + n1 + n2 + n3;
  for (const Size count : counts) blocks += (count + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * width * rows > WORTH_A_THREAD)
  for (Size block = 0; block < blocks; ++block) {
    Size map = 0, first = block * ROWS;
    for (; first >= counts[map]; ++map) first -= (counts[map] + ROWS - 1) / ROWS * ROWS;
    const Size count = counts[map];
    Number* out = outputs[map];
    multiply(
        weights[map], first, std::min(first + ROWS, count), x, tokens, width,
        [=](Size row, Size rows, Size token, const float* found) { narrow(found, out + token * count + row, rows); });
  }
}

// A linear map per group: x [N, G, in] and weight [G, out, in] -> out [N, G, out].
void project_groups(const Number* x, Size tokens, Size groups, Size width, const Number* weight, Size count,
                    Number* out, Size threads) {
  const Size blocks = (count + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * groups * width * count > WORTH_A_THREAD)
  for (Size block = 0; block < groups * blocks; ++block) {
    const Size group = block / blocks, first = block % blocks * ROWS;
    for (Size token = 0; token < tokens; ++token) {
      const Size at = token * groups + group;
      multiply(weight + group * count * width, first, std::min(first + ROWS, count), x + at * width, 1, width,
               [=](Size row, Size rows, Size, const float* found) { narrow(found, out + at * count + row, rows); });
    }
  }
}

// RMSNorm of the first `norm_width` numbers of every head (0: of none; `norm`: its weight or null), then a rotation of
// `rotary` numbers from `first` on: x [N, H, D] -> out. Angles: cos, sin [P, rotary / 2], token i at row i mod P.
void norm_rotate(const Number* x, Number* out, Size tokens, Size heads, Size width, const Number* norm, Size norm_width,
                 double eps, const Number* cos, const Number* sin, Size positions, Size rotary, Size first,
                 Size interleaved, double sign, Size threads = 1) {
  const Size pairs = rotary / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
  Failure failure;
#pragma omp parallel num_threads(threads) if (tokens * heads * width > WORTH_A_THREAD)
  {
    std::vector<float> wide, weight;
    failure.watch([&] {
      wide.resize(width), weight.resize(norm_width, 1.0f);
      if (norm) widen(norm, weight.data(), norm_width);
    });
#pragma omp for schedule(static)
    for (Size row = 0; row < tokens * heads; ++row)
      failure.watch([&] {
        widen(x + row * width, wide.data(), width);
        if (norm_width) {
          const float scale = inverse_rms(wide.data(), norm_width, static_cast<float>(eps));
#pragma omp simd
          for (Size i = 0; i < norm_width; ++i) wide[i] *= scale * weight[i];
        }
        for (Size pair = 0; pair < pairs; ++pair) {
          const Size angle = row / heads % positions * pairs + pair, one = first + pair * step, other = one + apart;
          const float c = widened(cos[angle]), s = widened(sin[angle]) * static_cast<float>(sign);
          const float turned = wide[one] * c - wide[other] * s;
          wide[other] = wide[other] * c + wide[one] * s;
          wide[one] = turned;
        }
        narrow(wide.data(), out + row * width, width);
      });
  }
  failure.raise();
}

// Cosines and sines, times `scale`, of `count` positions times the frequencies [rotary / 2] -> cos, sin [count, rotary
// / 2].
void angles(const Size* positions, Size count, const float* frequencies, Size pairs, double scale, Number* cos,
            Number* sin) {
  const float factor = static_cast<float>(scale);
  for (Size i = 0; i < count * pairs; ++i) {
    const float angle = static_cast<float>(positions[i / pairs]) * frequencies[i % pairs];
    store(cos + i, std::cos(angle) * factor);
    store(sin + i, std::sin(angle) * factor);
  }
}

}  // namespace
