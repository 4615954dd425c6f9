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
    for (Size head = 0; head < H; ++head)
      total += weights[head] * (products[head][v] > 0.0f ? products[head][v] : Vector{});
    save(scores + v * LANES, total);
  }
}

// Writes KEYS scores and returns the largest. What is no number is not chosen as long as there are others.
inline float take_scores(const float* scores, float* out) {
  Vector top = Vector{} + HIDDEN;
  for (Size v = 0; v < VECTORS; ++v) {
    Vector each = load(scores + v * LANES);
    each = each == each ? each : Vector{} + HIDDEN;
    save(out + v * LANES, each);
    top = larger(each, top);
  }
  return largest_of(top);
}

// The `count` largest of `size` scores, by index, in the order of indices; of equal ones the last. `tops`: the largest
// of every KEYS of them.
//
// Read from the end, so that a later score is there first and an equal one does not replace it. Of those that are
// larger than the `count` best so far, few in a long text, some are gathered before the best are picked out again. If
// there are as many blocks, the `count` best are not below the largest scores of so many blocks, and most others are.
void best_of(const float* scores, const float* tops, Size size, Size count, Size* out) {
  struct Candidate {
    float score;
    Size index;
  };
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.score != b.score ? a.score > b.score : a.index > b.index;
  };
  std::vector<Candidate> best;
  best.reserve(2 * count);
  const auto keep_best = [&] {
    std::nth_element(best.begin(), best.begin() + count - 1, best.end(), better);
    best.resize(count);
  };
  const Size blocks = (size + KEYS - 1) / KEYS;
  float least = HIDDEN;  // less is not among the best
  if (blocks >= count) {
    std::vector<float> largest(tops, tops + blocks);
    std::nth_element(largest.begin(), largest.begin() + count - 1, largest.end(), std::greater<float>());
    least = largest[count - 1];
  }
  bool full = false;
  float border = HIDDEN;  // the smallest score that is among the best, once there are enough
  for (Size block = blocks - 1; block >= 0; --block) {
    if (tops[block] < least || (full && tops[block] <= border)) continue;
    for (Size i = std::min((block + 1) * KEYS, size) - 1; i >= block * KEYS; --i) {
      if (scores[i] < least || (full && scores[i] <= border)) continue;
      best.push_back({scores[i], i});
      if (static_cast<Size>(best.size()) < 2 * count) continue;
      keep_best();
      border = best[count - 1].score;
      full = true;
    }
  }
  if (static_cast<Size>(best.size()) > count) keep_best();
  std::transform(best.begin(), best.end(), out, [](const Candidate& each) { return each.index; });
  std::sort(out, out + count);
}

}  // namespace

extern "C" {

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
  std::vector<float> weights(batch * tokens * heads), tops(batch * tokens * blocks);
  const float scale = 1.0f / std::sqrt(static_cast<float>(heads * width));
  multiply(weight, 0, heads, x, batch * tokens, model_width, [&](Size head, Size some, Size token, const float* found) {
    for (Size i = 0; i < some; ++i) weights[token * heads + head + i] = found[i] * scale;
  });
  const Size parts = (count + KEYS_A_TASK - 1) / KEYS_A_TASK;
#pragma omp parallel num_threads(threads) if (batch * tokens * heads * width * count > WORTH_A_THREAD)
  {
    std::vector<Words> columns((width + A_WORD - 1) / A_WORD * VECTORS);
#pragma omp for schedule(dynamic)
    for (Size task = 0; task < batch * parts; ++task) {
      const Size b = task / parts, begin = task % parts * KEYS_A_TASK, end = std::min(begin + KEYS_A_TASK, count);
      for (Size start = begin; start < end; start += KEYS) {
        const Size some = std::min(KEYS, end - start);
        put_into_columns(cache + b * batch_stride + start * width, some, width, width, columns.data());
        for (Size row = b * tokens; row < (b + 1) * tokens; ++row) {
          float found[KEYS] = {};
          const Number* query = queries + row * heads * width;
          const float* weight_of = &weights[row * heads];
          Size head = 0;
          for (; head + 4 <= heads; head += 4)
            add_scores<4>(columns.data(), query + head * width, weight_of + head, width, found);
          for (; head < heads; ++head)
            add_scores<1>(columns.data(), query + head * width, weight_of + head, width, found);
          const uint8_t* sees = seen ? seen + b * seen_batch + row % tokens * seen_query + start : nullptr;
          for (Size key = 0; key < some && sees; ++key) found[key] = sees[key] ? found[key] : HIDDEN;
          tops[row * blocks + start / KEYS] = take_scores(found, scores + (row * blocks + start / KEYS) * KEYS);
        }
      }
    }
#pragma omp for schedule(static)
    for (Size row = 0; row < batch * tokens; ++row) {
      const float* score = scores + row * blocks * KEYS;
      best_of(score, &tops[row * blocks], count, top_k, out + row * top_k);
      for (Size i = 0; i < top_k; ++i) out_seen[row * top_k + i] = score[out[row * top_k + i]] != HIDDEN;
    }
  }
}

}  // extern "C"
