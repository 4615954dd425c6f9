// Keys in columns, for many queries to be multiplied by: no sum is taken across a vector.

#pragma once

#include "attention.h"

namespace {

// Puts LANES words of each of LANES rows, `apart` numbers, into columns `stride` apart: word i of all into column i.
inline void put_into_columns(const Number* rows, Size apart, Words* columns, Size stride) {
  Words quarters[4][4];  // [i][c]: of rows 4 i to 4 i + 3 word c of every four
  for (Size i = 0; i < 4; ++i, rows += 4 * apart) {
    const Words a = load<Words>(rows), b = load<Words>(rows + apart);
    const Words c = load<Words>(rows + 2 * apart), d = load<Words>(rows + 3 * apart);
    for (Size half = 0; half < 2; ++half) {
      const Words ab = words_in_turns(a, b, half), cd = words_in_turns(c, d, half);
      quarters[i][2 * half] = pairs_in_turns(ab, cd, false);
      quarters[i][2 * half + 1] = pairs_in_turns(ab, cd, true);
    }
  }
  for (Size c = 0; c < 4; ++c)
    for (Size half = 0; half < 2; ++half) {
      const Words upper = halves_of(quarters[0][c], quarters[1][c], half);
      const Words lower = halves_of(quarters[2][c], quarters[3][c], half);
      columns[(8 * half + c) * stride] = quarters_of(upper, lower, false);
      columns[(8 * half + 4 + c) * stride] = quarters_of(upper, lower, true);
    }
}

constexpr Size VECTORS = KEYS / LANES;  // of keys in a column

// KEYS rows [KEYS, D], `stride` apart, in columns of words; rows behind `count` are as the last.
void put_into_columns(const Number* keys, Size count, Size stride, Size width, Words* columns) {
  Number padded[LANES][A_VECTOR];
  Words rest[LANES];
  for (Size v = 0; v < VECTORS; ++v) {
    const Size there = std::min(LANES, count - v * LANES);
    for (Size first = 0; first < width; first += A_VECTOR) {
      const Size some = std::min(A_VECTOR, width - first);
      const Number* rows = keys + v * LANES * stride + first;
      Words* to = columns + first / A_WORD * VECTORS + v;
      if (there == LANES && some == A_VECTOR) {
        put_into_columns(rows, stride, to, VECTORS);
        continue;
      }
      for (Size i = 0; i < LANES; ++i) {
        const Number* row = keys + std::min(v * LANES + i, count - 1) * stride + first;
        save(padded[i], some == A_VECTOR ? load<Words>(row) : load_some(row, some));
      }
      put_into_columns(padded[0], A_VECTOR, rest, 1);
      for (Size i = 0; i * A_WORD < some; ++i) to[i * VECTORS] = rest[i];
    }
  }
}

// The products of KEYS keys in columns and H queries, `stride` apart.
template <Size H>
inline void column_products(const Words* columns, const Number* queries, Size stride, Size width,
                            Vector (&products)[H][VECTORS]) {
  for (Size head = 0; head < H; ++head)
    for (Size v = 0; v < VECTORS; ++v) products[head][v] = Vector{};
  const auto add = [&](Size i, Size count) {
    Words query[H];
    for (Size head = 0; head < H; ++head) query[head] = spread(queries + head * stride + i, count);
    for (Size v = 0; v < VECTORS; ++v) {
      const Words column = columns[i / A_WORD * VECTORS + v];
      for (Size head = 0; head < H; ++head) products[head][v] = add_products(products[head][v], column, query[head]);
    }
  };
  Size i = 0;
  for (; i + A_WORD <= width; i += A_WORD) add(i, A_WORD);
  if (i < width) add(i, width - i);
}

}  // namespace
