// The keys that an indexer chooses.

#pragma once

#include "attention.h"

namespace {

// Numbers 2 i and 2 i + 1 of every four lanes of a and b that belong together, in turns.
inline Words words_in_turns(Words a, Words b, bool last) {
  return last ? __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
              : __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}

inline Words pairs_in_turns(Words a, Words b, bool last) {
  return last ? __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
              : __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}

// Two quarters of a and the same two of b: the first or the last, the even or the odd.
inline Words halves_of(Words a, Words b, bool last) {
  return last ? __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
              : __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
}

inline Words quarters_of(Words a, Words b, bool odd) {
  return odd ? __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
             : __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}

// Puts LANES words of each of LANES rows into columns `stride` apart: word i of all rows into column i.
inline void put_into_columns(const Number* const* rows, Words* columns, Size stride) {
  Words quarters[4][4];  // [i][c]: of rows 4 i to 4 i + 3 word c of every four
  for (Size i = 0; i < 4; ++i) {
    const Words a = load<Words>(rows[4 * i]), b = load<Words>(rows[4 * i + 1]);
    const Words c = load<Words>(rows[4 * i + 2]), d = load<Words>(rows[4 * i + 3]);
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

// scores += sum_j w_j relu(q_j k) for KEYS keys in columns of words and H queries [H, D] with their weights [H]. No sum
// is taken across a vector, of which there would be one for every key and head.
template <Size H>
inline void add_scores(const Words* columns, const Number* queries, const float* weights, Size width, float* scores) {
  Vector products[H][VECTORS] = {};
  const auto add = [&](Size i, Size count) {
    Words query[H];
    for (Size head = 0; head < H; ++head) query[head] = spread(queries + head * width + i, count);
    for (Size v = 0; v < VECTORS; ++v) {
      const Words column = columns[i / A_WORD * VECTORS + v];
      for (Size head = 0; head < H; ++head) products[head][v] = add_products(products[head][v], column, query[head]);
    }
  };
  Size i = 0;
  for (; i + A_WORD <= width; i += A_WORD) add(i, A_WORD);
  if (i < width) add(i, width - i);
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
    top = each > top ? each : top;
  }
  float largest = top[0];
  for (Size i = 1; i < LANES; ++i) largest = std::max(largest, top[i]);
  return largest;
}

// KEYS rows [KEYS, D] in columns of words; rows behind `count` are as the last.
void put_into_columns(const Number* keys, Size count, Size width, Words* columns) {
  Number padded[LANES][A_VECTOR];
  const Number* rows[LANES];
  Words rest[LANES];
  for (Size v = 0; v < VECTORS; ++v)
    for (Size first = 0; first < width; first += A_VECTOR) {
      const Size some = std::min(A_VECTOR, width - first);
      for (Size i = 0; i < LANES; ++i) {
        rows[i] = keys + std::min(v * LANES + i, count - 1) * width + first;
        if (some == A_VECTOR) continue;
        save(padded[i], load_some(rows[i], some));
        rows[i] = padded[i];
      }
      Words* to = columns + first / A_WORD * VECTORS + v;
      if (some == A_VECTOR) {
        put_into_columns(rows, to, VECTORS);
        continue;
      }
      put_into_columns(rows, rest, 1);
      for (Size i = 0; i * A_WORD < some; ++i) to[i * VECTORS] = rest[i];
    }
}

// The `count` largest of `size` scores, by index, in the order of indices; of equal ones the last. `tops`: the largest
// of every KEYS of them.
//
// Read from the end, so that a later score is there first and an equal one does not replace it. Of those that are
// larger than the `count` best so far, few in a long text, some are gathered before the best are picked out again.
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
  bool full = false;
  float border = HIDDEN;  // the smallest score that is among the best, once there are enough
  for (Size block = (size - 1) / KEYS; block >= 0; --block) {
    if (full && tops[block] <= border) continue;
    for (Size i = std::min((block + 1) * KEYS, size) - 1; i >= block * KEYS; --i) {
      if (full && scores[i] <= border) continue;
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
        put_into_columns(cache + b * batch_stride + start * width, some, width, columns.data());
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
