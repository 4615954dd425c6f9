// Attention of a text's many queries, by blocks of keys: nothing of the size of T x S is ever there.

#pragma once

#include "attention.h"

namespace {

constexpr Size QUERIES = 256;  // of a task, for which keys are put into columns once
constexpr Size TOGETHER = 16;  // of these take each step together: their scores stay in a core's nearest cache

// [B, H, T, D], rows anywhere: numbers between sequences, heads and tokens.
struct Rows {
  const Number* first;
  Size batch, head, token;
  const Number* at(Size b, Size h, Size t) const { return first + b * batch + h * head + t * token; }
};

// KEYS keys in columns; their values in words of the same place in A_WORD rows, padded to whole vectors.
struct KeyBlock {
  std::vector<Words> columns, values;
  Size count, width, value_vectors;

  KeyBlock(Size width, Size value_width)
      : width(width), value_vectors((value_width + A_VECTOR - 1) / A_VECTOR * A_WORD) {}

  void make_room() {
    columns.resize((width + A_WORD - 1) / A_WORD * VECTORS);
    values.resize(KEYS / A_WORD * value_vectors);
  }

  void take(const Number* keys, Size key_stride, const Number* rows, Size stride, Size value_width, Size there) {
    count = there;
    put_into_columns(keys, count, key_stride, width, columns.data());
    for (Size row = 0; row < count; row += A_WORD) {
      Words* to = &values[row / A_WORD * value_vectors];
      const Number *one = rows + row * stride, *next = row + A_WORD <= count ? one + (A_WORD - 1) * stride : nullptr;
      for (Size first = 0; first < value_width; first += A_VECTOR, to += A_WORD) {
        const Size some = std::min(A_VECTOR, value_width - first);
        const auto part = [=](const Number* from) {
          return !from ? Words{} : some == A_VECTOR ? load<Words>(from + first) : load_some(from + first, some);
        };
        paired(part(one), part(next), to);
      }
    }
  }
};

// What a task's queries have seen of their keys so far, and what TOGETHER of them make of a block.
struct Queries {
  std::vector<Vector> values;  // [QUERIES, value_vectors]
  Partial partials[QUERIES];
  float scores[TOGETHER][KEYS];
  Number shares[TOGETHER][KEYS];
};

// scores = scale q k for N queries, number `query` of those together and the next.
template <Size N>
inline void score(const KeyBlock& keys, const Number* rows, Size stride, float scale, Size query, Queries& queries) {
  Vector products[N][VECTORS];
  column_products<N>(keys.columns.data(), rows, stride, keys.width, products);
  for (Size i = 0; i < N; ++i)
    for (Size v = 0; v < VECTORS; ++v) save(&queries.scores[query + i][v * LANES], products[i][v] * scale);
}

// values += shares times V vectors of values, from number `vector` on; `values` are those of the first of N queries.
template <Size N, Size V>
inline void add_values(const KeyBlock& keys, Size vector, Size query, const Queries& queries, float* values) {
  Vector sums[N][V];
  const auto at = [&](Size i, Size v) { return values + (i * keys.value_vectors + vector + v) * LANES; };
  for (Size i = 0; i < N; ++i)
    for (Size v = 0; v < V; ++v) sums[i][v] = load(at(i, v));
  add_column_products(&keys.values[vector], keys.value_vectors, SideBySide{queries.shares[query], KEYS}, keys.count,
                      sums);
  for (Size i = 0; i < N; ++i)
    for (Size v = 0; v < V; ++v) save(at(i, v), sums[i][v]);
}

template <Size N>
inline void add_values(const KeyBlock& keys, Size query, const Queries& queries, float* values) {
  Size vector = 0;
  for (; vector + 2 <= keys.value_vectors; vector += 2) add_values<N, 2>(keys, vector, query, queries, values);
  for (; vector < keys.value_vectors; ++vector) add_values<N, 1>(keys, vector, query, queries, values);
}

// softmax(scale q k) v: queries [B, H, T, D], keys [B, H / G, S, D] and values [B, H / G, S, D_v] of G heads each, all
// by their strides -> out [B, T, H, D_v]. `seen`: as in `Keys`; without it the text is causal, and ends with its keys.
void attend_text(const Number* queries, Size query_batch, Size query_head, Size query_token, const Number* keys,
                 Size key_batch, Size key_head, Size key_token, const Number* values, Size value_batch, Size value_head,
                 Size value_token, const uint8_t* seen, Size seen_batch, Size seen_query, Size batch, Size heads,
                 Size groups, Size tokens, Size count, Size width, Size value_width, double scale, Number* out,
                 Size threads) {
  const Rows q = {queries, query_batch, query_head, query_token}, k = {keys, key_batch, key_head, key_token};
  const Rows v = {values, value_batch, value_head, value_token};
  const float to_base_2 = static_cast<float>(scale) * LOG2_E;
  // Enough tasks for all threads.
  Size most = QUERIES;
  while (most > KEYS && batch * heads * tokens < 8 * threads * most) most /= 2;
  const Size blocks = (tokens + most - 1) / most, before = count - tokens;
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    KeyBlock block(width, value_width);
    Queries seeing;
    const Size row_width = block.value_vectors * LANES;
    failure.watch([&] {
      block.make_room();
      seeing.values.resize(most * block.value_vectors);
    });
#pragma omp for schedule(dynamic)
    for (Size task = 0; task < batch * heads * blocks; ++task)
      failure.watch([&] {
        // The last queries have the most keys, and come first.
        const Size b = task % batch, h = task / batch % heads, first = (blocks - 1 - task / (batch * heads)) * most;
        const Size some = std::min(most, tokens - first), end = seen ? count : before + first + some;
        std::fill(seeing.values.begin(), seeing.values.end(), Vector{});
        for (Size query = 0; query < some; ++query)
          seeing.partials[query] =
              Partial{HIDDEN, Vector{}, reinterpret_cast<float*>(&seeing.values[query * block.value_vectors])};
        for (Size start = 0; start < end; start += KEYS) {
          const Size there = std::min(KEYS, end - start);
          const auto sees = [&](Size query) { return seen + b * seen_batch + (first + query) * seen_query + start; };
          bool any = !seen;
          for (Size query = 0; query < some && !any; ++query) any = std::memchr(sees(query), 1, there) != nullptr;
          if (!any) continue;
          block.take(k.at(b, h / groups, start), k.token, v.at(b, h / groups, start), v.token, value_width, there);
          for (Size group = 0; group < some; group += TOGETHER) {
            const Size several = std::min(TOGETHER, some - group);
            const auto visible = [&](Size query) { return before + first + group + query + 1 - start; };
            if (!seen && visible(several - 1) <= 0) continue;
            in_groups<4>(several, [&](auto n, Size query) {
              score<n.value>(block, q.at(b, h, first + group + query), q.token, to_base_2, query, seeing);
            });
            for (Size query = 0; query < several; ++query) {
              float* scores = seeing.scores[query];
              std::fill(scores + (seen ? there : std::clamp<Size>(visible(query), 0, there)), scores + KEYS, HIDDEN);
              for (Size key = 0; key < there && seen; ++key)
                scores[key] = sees(group + query)[key] ? scores[key] : HIDDEN;
              share(scores, KEYS, seeing.partials[group + query], row_width, seeing.shares[query]);
            }
            in_groups<8>(several, [&](auto n, Size query) {
              add_values<n.value>(block, query, seeing, seeing.partials[group + query].values);
            });
          }
        }
        for (Size query = 0; query < some; ++query) {
          const Partial& partial = seeing.partials[query];
          float* row = partial.values;
          // A query that sees nothing, in padding, gets 0.
          const float weights = sum_of(partial.weights), factor = weights > 0 ? 1.0f / weights : 0.0f;
          for (Size i = 0; i < value_width; ++i) row[i] *= factor;
          narrow(row, out + ((b * tokens + first + query) * heads + h) * value_width, value_width);
        }
      });
  }
  failure.raise();
}

}  // namespace
