// The keys that an indexer chooses.

#pragma once

#include "attention.h"

namespace {

// Puts LANES words of each of LANES rows into columns `stride` apart: word i of all rows into column i.
void put_into_columns(const Number* const* rows, Words* columns, Size stride) {
  Words from[LANES], to[LANES];
  for (Size i = 0; i < LANES; ++i) from[i] = load<Words>(rows[i]);
  // Rows i and i + 8 in turns, four times over, is the transposed matrix.
  for (Size step = 0; step < 4; ++step) {
    for (Size i = 0; i < LANES / 2; ++i) {
      const Words a = from[i], b = from[i + LANES / 2];
      to[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::copy_n(to, LANES, from);
  }
  for (Size i = 0; i < LANES; ++i) columns[i * stride] = from[i];
}

constexpr Size VECTORS = KEYS / LANES;  // of keys in a column

// scores += sum_j w_j relu(q_j k) for KEYS keys in columns of words and H queries [H, D] with their weights [H]. No sum
// is taken across a vector, of which there would be one for every key and head.
template <Size H>
inline void add_scores(const Words* columns, const Number* queries, const float* weights, Size width, float* scores) {
  Vector products[H][VECTORS] = {};
  for (Size i = 0; i < width; i += A_WORD) {
    Words query[H];
    for (Size head = 0; head < H; ++head) query[head] = spread(queries + head * width + i, width - i);
    for (Size v = 0; v < VECTORS; ++v) {
      const Words column = columns[i / A_WORD * VECTORS + v];
      for (Size head = 0; head < H; ++head) products[head][v] = add_products(products[head][v], column, query[head]);
    }
  }
  for (Size v = 0; v < VECTORS; ++v) {
    Vector total = load(scores + v * LANES);
    for (Size head = 0; head < H; ++head)
      total += weights[head] * (products[head][v] > 0.0f ? products[head][v] : Vector{});
    save(scores + v * LANES, total);
  }
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

// The `count` largest of `size` scores, by index, in the order of indices; of equal ones the last.
//
// Read from the end, so that a later score is there first and an equal one does not replace it. Of those that are
// larger than the `count` best so far, few in a long text, some are gathered before the best are picked out again.
void best_of(const float* scores, Size size, Size count, Size* out) {
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
  for (Size end = size; end > 0;) {
    const Size begin = std::max<Size>(end - KEYS, 0);
    float top = HIDDEN;
#pragma omp simd reduction(max : top)
    for (Size i = begin; i < end; ++i) top = std::max(top, scores[i]);
    for (Size i = end; i > begin && !(full && top <= border);) {
      if (full && scores[--i] <= border) continue;
      if (!full) --i;
      best.push_back({scores[i], i});
      if (static_cast<Size>(best.size()) < 2 * count) continue;
      keep_best();
      border = best[count - 1].score;
      full = true;
    }
    end = begin;
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
  std::vector<float> weights(batch * tokens * heads), scores(batch * tokens * count);
  const float scale = 1.0f / std::sqrt(static_cast<float>(heads * width));
  multiply(weight, 0, heads, x, batch * tokens, model_width,
           [&](Size head, Size some, Size token, const float* found) {
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
          std::copy_n(found, some, &scores[row * count + start]);
        }
      }
    }
#pragma omp for schedule(static)
    for (Size row = 0; row < batch * tokens; ++row) {
      float* score = &scores[row * count];
      const uint8_t* sees = seen ? seen + row / tokens * seen_batch + row % tokens * seen_query : nullptr;
      // What is no number is not chosen as long as there are others.
      for (Size key = 0; key < count; ++key)
        score[key] = (!sees || sees[key]) && score[key] == score[key] ? score[key] : HIDDEN;
      best_of(score, count, top_k, out + row * top_k);
      for (Size i = 0; i < top_k; ++i) out_seen[row * top_k + i] = score[out[row * top_k + i]] != HIDDEN;
    }
  }
}

}  // extern "C"
