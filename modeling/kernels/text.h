// Attention of a text's many queries, by blocks of keys: nothing of the size of T x S is ever there.

#pragma once

#include "columns.h"

namespace {

constexpr Size QUERIES = 64;  // of a task

// [B, H, T, D], rows anywhere: numbers between sequences, heads and tokens.
struct Rows {
  const Number* first;
  Size batch, head, token;
  const Number* at(Size b, Size h, Size t) const { return first + b * batch + h * head + t * token; }
};

// What a block of queries has seen of its keys so far.
struct Block {
  float scores[QUERIES][KEYS];
  Number shares[QUERIES][KEYS];
  std::vector<float> values;  // [QUERIES, D_v]
  Partial partials[QUERIES];
};

// scores = scale q k for `some` queries and KEYS keys in columns.
inline void score(const Words* columns, const Number* queries, Size stride, Size some, Size width, float scale,
                  Block& block) {
  Size query = 0;
  const auto take = [&](auto& products, Size count) {
    for (Size i = 0; i < count; ++i)
      for (Size v = 0; v < VECTORS; ++v) save(&block.scores[query + i][v * LANES], products[i][v] * scale);
  };
  for (; query + 4 <= some; query += 4) {
    Vector products[4][VECTORS];
    column_products<4>(columns, queries + query * stride, stride, width, products);
    take(products, 4);
  }
  for (; query < some; ++query) {
    Vector products[1][VECTORS];
    column_products<1>(columns, queries + query * stride, stride, width, products);
    take(products, 1);
  }
}

}  // namespace

extern "C" {

// softmax(scale q k) v: queries [B, H, T, D], keys [B, H / G, S, D] and values [B, H / G, S, D_v] of G heads each, all
// by their strides -> out [B, T, H, D_v]. `seen`: as in `Keys`; without it the text is causal, and ends with its keys.
void attend_text(const Number* queries, Size query_batch, Size query_head, Size query_token, const Number* keys,
                 Size key_batch, Size key_head, Size key_token, const Number* values, Size value_batch, Size value_head,
                 Size value_token, const uint8_t* seen, Size seen_batch, Size seen_query, Size batch, Size heads,
                 Size groups, Size tokens, Size count, Size width, Size value_width, double scale, Number* out,
                 Size threads) {
  const Rows q = {queries, query_batch, query_head, query_token}, k = {keys, key_batch, key_head, key_token};
  const Rows v = {values, value_batch, value_head, value_token};
  const Size blocks = (tokens + QUERIES - 1) / QUERIES, before = count - tokens;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Words> columns((width + A_WORD - 1) / A_WORD * VECTORS);
    Block block;
    block.values.resize(QUERIES * value_width);
#pragma omp for schedule(dynamic)
    for (Size task = 0; task < batch * heads * blocks; ++task) {
      // The last queries have the most keys, and come first.
      const Size b = task % batch, h = task / batch % heads, first = (blocks - 1 - task / (batch * heads)) * QUERIES;
      const Size some = std::min(QUERIES, tokens - first), end = seen ? count : before + first + some;
      std::fill(block.values.begin(), block.values.end(), 0.0f);
      for (Size query = 0; query < QUERIES; ++query)
        block.partials[query] = {HIDDEN, 0.0f, &block.values[query * value_width]};
      for (Size start = 0; start < end; start += KEYS) {
        const Size there = std::min(KEYS, end - start);
        const auto sees = [&](Size query) { return seen + b * seen_batch + (first + query) * seen_query + start; };
        bool any = !seen;
        for (Size query = 0; query < some && !any; ++query) any = std::memchr(sees(query), 1, there) != nullptr;
        if (!any) continue;
        put_into_columns(k.at(b, h / groups, start), there, k.token, width, columns.data());
        score(columns.data(), q.at(b, h, first), q.token, some, width, static_cast<float>(scale), block);
        for (Size query = 0; query < some; ++query) {
          float* scores = block.scores[query];
          const Size visible = seen ? there : std::clamp<Size>(before + first + query + 1 - start, 0, there);
          std::fill(scores + visible, scores + KEYS, HIDDEN);
          for (Size key = 0; key < there && seen; ++key) scores[key] = sees(query)[key] ? scores[key] : HIDDEN;
          share(scores, KEYS, block.partials[query], value_width, block.shares[query]);
        }
        add_weighted(SideBySide{v.at(b, h / groups, start), v.token}, there, block.shares[0], KEYS, some, value_width,
                     block.values.data());
      }
      for (Size query = 0; query < some; ++query) {
        const Partial& partial = block.partials[query];
        float* row = partial.values;
        // A query that sees nothing, in padding, gets 0.
        const float factor = partial.weights > 0 ? 1.0f / partial.weights : 0.0f;
        for (Size i = 0; i < value_width; ++i) row[i] *= factor;
        narrow(row, out + ((b * tokens + first + query) * heads + h) * value_width, value_width);
      }
    }
  }
}

}  // extern "C"
