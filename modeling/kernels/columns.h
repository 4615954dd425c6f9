// Rows of a matrix in columns, for many vectors to be multiplied by: no sum is taken across a vector. Weights of many
// tokens, and keys of many queries.

#pragma once

#include "vectors.h"

namespace {

constexpr Size BLOCK = 64;               // rows that are put into columns at a time
constexpr Size VECTORS = BLOCK / LANES;  // of a column

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

// BLOCK rows [BLOCK, D], `stride` apart, in columns of words; rows behind `count` are as the last.
void put_into_columns(const Number* matrix, Size count, Size stride, Size width, Words* columns) {
  Number padded[LANES][A_VECTOR];
  Words rest[LANES];
  for (Size v = 0; v < VECTORS; ++v) {
    const Size there = std::min(LANES, count - v * LANES);
    for (Size first = 0; first < width; first += A_VECTOR) {
      const Size some = std::min(A_VECTOR, width - first);
      const Number* rows = matrix + v * LANES * stride + first;
      Words* to = columns + first / A_WORD * VECTORS + v;
      if (there == LANES && some == A_VECTOR) {
        put_into_columns(rows, stride, to, VECTORS);
        continue;
      }
      for (Size i = 0; i < LANES; ++i) {
        const Number* row = matrix + std::min(v * LANES + i, count - 1) * stride + first;
        save(padded[i], some == A_VECTOR ? load<Words>(row) : load_some(row, some));
      }
      put_into_columns(padded[0], A_VECTOR, rest, 1);
      for (Size i = 0; i * A_WORD < some; ++i) to[i * VECTORS] = rest[i];
    }
  }
}

// sums [H, V vectors] += the products of H rows of `width` numbers and words in columns, those of a place `apart`
// vectors behind those of the place before.
template <Size H, Size V, class Rows>
inline void add_column_products(const Words* columns, Size apart, Rows rows, Size width, Vector (&sums)[H][V]) {
  const Number* from[H];
  for (Size r = 0; r < H; ++r) from[r] = rows[r];
  const auto add = [&](Size i, Size count) {
    Words row[H];
    for (Size r = 0; r < H; ++r) row[r] = spread(from[r] + i, count);
    for (Size v = 0; v < V; ++v)
      for (Size r = 0; r < H; ++r) sums[r][v] = add_products(sums[r][v], columns[v], row[r]);
  };
  Size i = 0;
  for (; i + A_WORD <= width; i += A_WORD, columns += apart) add(i, A_WORD);
  if (i < width) add(i, width - i);
}

// The products of BLOCK rows in columns and H vectors, `stride` apart.
template <Size H>
inline void column_products(const Words* columns, const Number* vectors, Size stride, Size width,
                            Vector (&products)[H][VECTORS]) {
  for (Size i = 0; i < H; ++i)
    for (Size v = 0; v < VECTORS; ++v) products[i][v] = Vector{};
  add_column_products(columns, VECTORS, SideBySide{vectors, stride}, width, products);
}

// Vectors behind a number of others.
template <class Rows>
struct From {
  Rows rows;
  Size first, place;
  const Number* operator[](Size i) const { return rows[first + i] + place; }
};

constexpr Size MANY = 128;    // vectors beyond which rows are put into columns to be multiplied by them
constexpr Size DEPTH = 2048;  // numbers of a row that are in columns at a time: they stay in a core's cache

// Calls `act(n, first)` for N of `count` at a time, and for those that are left one by one; n is that number as a type.
template <Size N, class Act>
inline void in_groups(Size count, Act act) {
  Size first = 0;
  for (; first + N <= count; first += N) act(std::integral_constant<Size, N>{}, first);
  for (; first < count; ++first) act(std::integral_constant<Size, 1>{}, first);
}

// Products of `count` vectors and V vectors of rows in columns. They are added to what is in `tile` [count, BLOCK] from
// the second part of their numbers on, and saved there, but of the last part taken.
template <Size H, Size V, class Rows, class Take>
inline void multiply_part(const Words* columns, Rows vectors, Size count, Size place, Size width, bool last,
                          float* tile, Take take) {
  in_groups<H>(count, [&](auto several, Size first) {
    constexpr Size N = several.value;
    Vector sums[N][V];
    const auto at = [&](Size i, Size v) { return tile + (first + i) * BLOCK + v * LANES; };
    for (Size i = 0; i < N; ++i)
      for (Size v = 0; v < V; ++v) sums[i][v] = place ? load(at(i, v)) : Vector{};
    add_column_products(columns, VECTORS, From<Rows>{vectors, first, place}, width, sums);
    float found[N][V * LANES];
    for (Size i = 0; i < N; ++i)
      for (Size v = 0; v < V; ++v) save(last ? &found[i][v * LANES] : at(i, v), sums[i][v]);
    for (Size i = 0; i < N && last; ++i) take(first + i, found[i]);
  });
}

// Calls `take(vector, products)` for every one of `count` vectors with its products with `some` rows, at most BLOCK, of
// a matrix [., width]; there is room for whole vectors of products.
template <class Rows, class Take>
void multiply_many(const Number* matrix, Size some, Rows vectors, Size count, Size width, Take take) {
  thread_local std::vector<Words> columns(DEPTH / A_WORD * VECTORS);
  std::vector<float> tile(width > DEPTH ? count * BLOCK : 0);
  for (Size place = 0; place < width; place += DEPTH) {
    const Size deep = std::min(DEPTH, width - place);
    const bool last = place + deep == width;
    put_into_columns(matrix + place, some, width, deep, columns.data());
    const auto part = [&](auto at_once, auto columns_there) {
      multiply_part<at_once.value, columns_there.value>(columns.data(), vectors, count, place, deep, last, tile.data(),
                                                        take);
    };
    // As many products at a time as there are registers for.
    switch ((some + LANES - 1) / LANES) {
      case 1:
        part(std::integral_constant<Size, 12>{}, std::integral_constant<Size, 1>{});
        break;
      case 2:
        part(std::integral_constant<Size, 8>{}, std::integral_constant<Size, 2>{});
        break;
      case 3:
        part(std::integral_constant<Size, 5>{}, std::integral_constant<Size, 3>{});
        break;
      default:
        part(std::integral_constant<Size, 4>{}, std::integral_constant<Size, 4>{});
    }
  }
}

}  // namespace
