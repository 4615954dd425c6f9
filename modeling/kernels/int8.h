// Weights in int8 with a scale per row.

#pragma once

#include "vectors.h"

namespace {

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Quarter __attribute__((vector_size(LANES)));

inline float sum(Vector x) {
  Quarter quarters[4];
  std::memcpy(quarters, &x, sizeof quarters);
  const Quarter all = (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
  return (all[0] + all[2]) + (all[1] + all[3]);
}

// Int8 rows are read as 32-bit integers, of which every fourth number of a row is taken by two shifts: faster than
// widening them one after the other. Vectors are given in that order (`spread`).
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of four numbers is taken from the lowest byte");

// A row of a matrix times C vectors: `take(row, vector, product)`. Every product has two sums, which hide each other's
// latency.
template <Size C, class Take>
inline void products(const int8_t* matrix, Size row, const float* vectors, Size vector, Size width, Take take) {
  const int8_t* numbers = matrix + row * width;
  const float* others = vectors + vector * width;
  Vector sums[2][C] = {};
  Size i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    const Integers fours = load<Integers>(numbers + i);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const Vector each = __builtin_convertvector(fours << (24 - 8 * quarter) >> 24, Vector);
      for (Size c = 0; c < C; ++c) sums[quarter % 2][c] += each * load(others + c * width + i + quarter * LANES);
    }
  }
  for (Size c = 0; c < C; ++c) {
    float product = sum(sums[0][c] + sums[1][c]);
    for (Size rest = i; rest < width; ++rest) product += numbers[rest] * others[c * width + rest];
    take(row, vector + c, product);
  }
}

// Where the number i of a vector stands that is multiplied by int8 rows: first those that are lowest bytes, and so on.
inline Size place(Size i, Size width) {
  const Size block = i / (4 * LANES) * 4 * LANES;
  return block + 4 * LANES > width ? i : block + i % 4 * LANES + (i - block) / 4;
}

std::vector<float> spread(const Number* from, Size count, Size width) {
  std::vector<float> result(count * width);
  for (Size row = 0; row < count; ++row, from += width)
    for (Size i = 0; i < width; ++i) result[row * width + place(i, width)] = widened(from[i]);
  return result;
}

// The same for rows `first` to `last` and `count` vectors. Rows are read in the order of memory, and each of them once.
template <class Take>
inline void multiply(const int8_t* matrix, Size first, Size last, const float* vectors, Size count, Size width, Take take) {
  for (Size row = first; row < last; ++row) {
    Size vector = 0;
    for (; vector + 4 <= count; vector += 4) products<4>(matrix, row, vectors, vector, width, take);
    for (; vector + 2 <= count; vector += 2) products<2>(matrix, row, vectors, vector, width, take);
    if (vector < count) products<1>(matrix, row, vectors, vector, width, take);
  }
}

}  // namespace

extern "C" {

// A linear map per group, its weight in int8 with a scale per row: x [N, G, in], weight [G, out, in], scales [G, out]
// -> out [N, G, out].
void project_int8(const Number* x, Size tokens, Size groups, Size width, const int8_t* weight, const float* scales,
                  Size count, Number* out, Size threads) {
  const std::vector<float> wide = spread(x, tokens * groups, width);
  const Size blocks = (count + ROWS - 1) / ROWS, alone = groups > 1 ? tokens : 1, together = tokens / alone;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * groups * width * count > WORTH_A_THREAD)
  for (Size block = 0; block < groups * blocks; ++block) {
    const Size group = block / blocks, first = block % blocks * ROWS, begin = group * count;
    for (Size some = 0; some < alone; ++some) {
      const Size at = some * groups + group;
      multiply(weight + begin * width, first, std::min(first + ROWS, count), &wide[at * width], together, width,
               [=](Size row, Size token, float product) {
                 store(out + (at + token) * count + row, product * scales[begin + row]);
               });
    }
  }
}

// `mix_channels` of chosen experts in int8, with a scale per row: gate_up [E, 2 I, d], down [E, d, I].
void mix_int8(const Number* x, Size tokens, Size width, const Size* indices, const float* weights, Size top_k,
              const int8_t* gate_up, const float* gate_up_scales, const int8_t* down, const float* down_scales,
              Size inner, double limit, Number* out, Size threads) {
  // Tokens of one expert side by side: its weights are then read from memory once.
  std::vector<Size> slots(tokens * top_k);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = i;
  std::stable_sort(slots.begin(), slots.end(), [=](Size a, Size b) { return indices[a] < indices[b]; });
  const std::vector<float> wide = spread(x, tokens, width);
  std::vector<float> inners(slots.size() * inner);
  const Size blocks = (inner + ROWS - 1) / ROWS, tasks = slots.size() * blocks;
  const float bound = static_cast<float>(limit);
#pragma omp parallel num_threads(threads) if (slots.size() * inner * width * 3 > WORTH_A_THREAD)
  {
#pragma omp for schedule(static)
    for (Size task = 0; task < tasks; ++task) {
      const Size slot = slots[task / blocks], gate = indices[slot] * 2 * inner, up = gate + inner;
      const Size first = task % blocks * ROWS, last = std::min(first + ROWS, inner);
      const float* token = &wide[slot / top_k * width];
      float gates[ROWS], ups[ROWS];
      multiply(gate_up + gate * width, first, last, token, 1, width,
               [&](Size i, Size, float product) { gates[i - first] = product * gate_up_scales[gate + i]; });
      multiply(gate_up + up * width, first, last, token, 1, width,
               [&](Size i, Size, float product) { ups[i - first] = product * gate_up_scales[up + i]; });
      for (Size i = 0; i < last - first; ++i) {
        const float g = std::min(gates[i], bound), u = std::clamp(ups[i], -bound, bound);
        inners[slot * inner + place(first + i, inner)] = g * sigmoid(g) * u * weights[slot];
      }
    }
    std::vector<float> sums(tokens * ROWS);
#pragma omp for schedule(static)
    for (Size first = 0; first < width; first += ROWS) {
      const Size last = std::min(first + ROWS, width);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (const Size slot : slots) {
        const Size begin = indices[slot] * width;
        float* sum = &sums[slot / top_k * ROWS];
        multiply(down + begin * inner, first, last, &inners[slot * inner], 1, inner,
                 [=](Size i, Size, float product) { sum[i - first] += product * down_scales[begin + i]; });
      }
      for (Size token = 0; token < tokens; ++token)
        narrow(&sums[token * ROWS], out + token * width + first, last - first);
    }
  }
}

}  // extern "C"
