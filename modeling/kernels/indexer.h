// The keys that an indexer chooses.

#pragma once

#include "attention.h"

namespace {

constexpr Size SCORES = 1 << 22;  // that are kept at a time

// scores += sum_j w_j relu(q_j k) for KEYS keys in columns of words and H queries [H, D] with their weights [H]. No sum
// is taken across a vector, of which there would be one for every key and head.
template <Size H>
inline void add_scores(const Words* columns, const Number* queries, const float* weights, Size width, float* scores) {
  Vector products[H][VECTORS];
  column_products<H>(columns, queries, width, width, products);
  for (Size v = 0; v < VECTORS; ++v) {
    Vector total = load(scores + v * LANES);
    for (Size head = 0; head < H; ++head) total += weights[head] * larger(products[head][v], Vector{});
    save(scores + v * LANES, total);
  }
}

// Writes the scores of `count` keys in columns, and hidden ones up to KEYS, for a query [J, D] with weights [J];
// `seen`: as in `Keys`. What is no number is not chosen as long as there are others.
inline void score_keys(const Words* columns, const Number* query, const float* weights, Size heads, Size width,
                       const uint8_t* seen, Size count, float* out) {
  float scores[KEYS] = {};
  in_groups<4>(heads, [&](auto n, Size head) {
    add_scores<n.value>(columns, query + head * width, weights + head, width, scores);
  });
  for (Size key = 0; key < count && seen; ++key) scores[key] = seen[key] ? scores[key] : HIDDEN;
  std::fill(scores + count, scores + KEYS, HIDDEN);
  for (Size v = 0; v < VECTORS; ++v) {
    const Vector each = load(scores + v * LANES);
    save(out + v * LANES, each == each ? each : Vector{} + HIDDEN);
  }
}

// What the heads' products are weighted by: weight x / sqrt(J D) of tokens x [N, d] and weight [J, d] -> [N, J].
std::vector<float> index_weights(const Number* x, const Number* weight, Size tokens, Size model_width, Size heads,
                                 Size width) {
  std::vector<float> weights(tokens * heads);
  const float scale = 1.0f / std::sqrt(static_cast<float>(heads * width));
  multiply(weight, 0, heads, x, tokens, model_width, [&](Size head, Size some, Size token, const float* found) {
    for (Size i = 0; i < some; ++i) weights[token * heads + head + i] = found[i] * scale;
  });
  return weights;
}

// The `count` largest of `size` scores, by index, in the order of indices; of equal ones the last. Behind them are
// hidden ones, up to a whole block.
//
// Of some four times as many groups of scores the largest are compared first: the `count` largest scores are not below
// the `count` largest of those, and most others are.
void best_of(const float* scores, Size size, Size count, Size* out) {
  const Size vectors = (size + LANES - 1) / LANES, several = std::max<Size>(1, size / (4 * count));
  std::vector<float> tops((vectors + several - 1) / several * LANES);
  for (Size v = 0; v < vectors; v += several) {
    Vector top = load(scores + v * LANES);
    for (Size i = v + 1; i < std::min(v + several, vectors); ++i) top = larger(load(scores + i * LANES), top);
    save(&tops[v / several * LANES], top);
  }
  const auto keep_best = [=](std::vector<float>& some) {
    std::nth_element(some.begin(), some.begin() + count - 1, some.end(), std::greater<float>());
    return some[count - 1];
  };
  const float least = keep_best(tops);
  std::vector<Size> places;
  for (Size v = 0; v < vectors; ++v)
    for (uint32_t lanes = lanes_from(load(scores + v * LANES), least); lanes; lanes &= lanes - 1)
      places.push_back(v * LANES + __builtin_ctz(lanes));
  while (places.back() >= size) places.pop_back();
  std::vector<float> values(places.size());
  std::transform(places.begin(), places.end(), values.begin(), [=](Size i) { return scores[i]; });
  const float border = keep_best(values);
  Size equal = count - std::count_if(values.begin(), values.begin() + count, [=](float each) { return each > border; });
  for (Size i = places.size(), place = count; place;) {
    const float score = scores[places[--i]];
    if (score > border || (score == border && equal-- > 0)) out[--place] = places[i];
  }
}

// The keys that an indexer chooses, those that a query does not see last, by sum_j w_j relu(q_j k): queries
// [B, T, J, D], keys [B, S, D], seen as in `Keys`; w = weight x / sqrt(J D) of tokens x [B, T, d] and weight [J, d] ->
// the K best of S, out [B, T, K], and which of them the query sees, bytes [B, T, K].
void choose_keys(const Number* queries, const Number* cache, Size batch_stride, const Number* x, const Number* weight,
                 Size model_width, const uint8_t* seen, Size seen_batch, Size seen_query, Size batch, Size tokens,
                 Size heads, Size width, Size count, Size top_k, Size* out, uint8_t* out_seen, Size threads) {
  const Size blocks = (count + KEYS - 1) / KEYS;
  // Of a text some queries at a time, for whose scores there is room.
  const Size most = std::max<Size>(1, SCORES / (blocks * KEYS));
  if (batch * tokens > most && tokens > 1) {
    for (Size row = 0, some; row < batch * tokens; row += some) {
      const Size b = row / tokens, token = row % tokens;
      some = std::min(most, tokens - token);
      choose_keys(queries + row * heads * width, cache + b * batch_stride, batch_stride, x + row * model_width, weight,
                  model_width, seen ? seen + b * seen_batch + token * seen_query : nullptr, seen_batch, seen_query, 1,
                  some, heads, width, count, top_k, out + row * top_k, out_seen + row * top_k, threads);
    }
    return;
  }
  float* scores = kept<0>(batch * tokens * blocks * KEYS);
  const std::vector<float> weights = index_weights(x, weight, batch * tokens, model_width, heads, width);
  const Size parts = (count + KEYS_A_TASK - 1) / KEYS_A_TASK;
  Failure failure;
#pragma omp parallel num_threads(threads) if (batch * tokens * heads * width * count > WORTH_A_THREAD)
  {
    std::vector<Words> columns;
    failure.watch([&] { columns.resize((width + A_WORD - 1) / A_WORD * VECTORS); });
#pragma omp for schedule(dynamic)
    for (Size task = 0; task < batch * parts; ++task)
      failure.watch([&] {
        const Size b = task / parts, begin = task % parts * KEYS_A_TASK, end = std::min(begin + KEYS_A_TASK, count);
        for (Size start = begin; start < end; start += KEYS) {
          const Size some = std::min(KEYS, end - start);
          put_into_columns(cache + b * batch_stride + start * width, some, width, width, columns.data());
          for (Size row = b * tokens; row < (b + 1) * tokens; ++row) {
            const uint8_t* sees = seen ? seen + b * seen_batch + row % tokens * seen_query + start : nullptr;
            const Size block = row * blocks + start / KEYS;
            score_keys(columns.data(), queries + row * heads * width, &weights[row * heads], heads, width, sees, some,
                       scores + block * KEYS);
          }
        }
      });
#pragma omp for schedule(static)
    for (Size row = 0; row < batch * tokens; ++row)
      failure.watch([&] {
        const float* score = scores + row * blocks * KEYS;
        best_of(score, count, top_k, out + row * top_k);
        for (Size i = 0; i < top_k; ++i) out_seen[row * top_k + i] = score[out[row * top_k + i]] != HIDDEN;
      });
  }
  failure.raise();
}

}  // namespace
