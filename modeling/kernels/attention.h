// Attention of a step's queries to what is cached: the latents of MLA, or keys that are values too.

#pragma once

#include "columns.h"

namespace {

constexpr Size KEYS = BLOCK;       // that are scored at a time
constexpr Size KEYS_A_TASK = 512;  // that a thread takes at a time

// Which rows of a cache [B, C, W] are read; before them, all of a window [B, S', W], where there is one.
struct Keys {
  const Number* cache;
  Size batch_stride, width, value_width;
  Size count;                   // S, the window's included
  const Size* chosen;           // [B, T, S - S'] rows of a sequence, or null: the first S - S'
  const uint8_t* seen;          // bytes [B, T, S], 0 where a query does not see a key, or null: it sees all
  Size seen_batch, seen_query;  // strides of `seen`
  const Number* window = nullptr;
  Size window_stride = 0, window_count = 0;  // S'
};

constexpr float SLACK = 8;  // by which scores may pass what shares are measured by, before that is moved

// What a query of a head has seen so far. A score, to base 2, has the share 2^(score - base): sums of them lane by
// lane, and the values weighted by them.
struct Partial {
  float base = HIDDEN;
  Vector weights = {};
  float* values = nullptr;
};

// Turns scores into shares, and moves the base if a much larger score has come. There is room for whole pairs of
// vectors in both.
inline void share(float* scores, Size count, Partial& partial, Size value_width, Number* shares) {
  constexpr bool ROUGH = A_WORD == 2;
  const Size whole = (count + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
  std::fill(scores + count, scores + whole, HIDDEN);
  Vector tops = load(scores);
  for (Size key = LANES; key < whole; key += LANES) tops = larger(load(scores + key), tops);
  if (any_above(tops, partial.base + SLACK)) {
    const float top = largest_of(tops);
    const float shrunk = two_to(partial.base - top);  // 0 where there was none
    partial.weights *= shrunk;
    for (Size i = 0; i < value_width; ++i) partial.values[i] *= shrunk;
    partial.base = top;
  }
  const float base = partial.base == HIDDEN ? 0.0f : partial.base;  // of nothing but hidden keys each has none
  for (Size key = 0; key < whole; key += 2 * LANES) {
    const Vector one = two_to<ROUGH>(load(scores + key) - base);
    const Vector next = two_to<ROUGH>(load(scores + key + LANES) - base);
    partial.weights += one + next;
    narrow(one, next, shares + key);
  }
}

// Lets queries `from` to `to` of the T H of sequence `b` see keys `first` to `last`; `scale` makes scores to base 2.
void see_keys(const Keys& keys, Size b, Size first, Size last, const Number* queries, Size from, Size to, Size tokens,
              Size heads, float scale, Partial* partials) {
  const Size several = to - from;
  std::vector<float> scores(several * KEYS);
  std::vector<Number> weights(several * KEYS);
  const Number *cache = keys.cache + b * keys.batch_stride, *window = keys.window + b * keys.window_stride;
  const Number* rows[KEYS];
  // The cache's row for key number i.
  const Size behind = keys.count - keys.window_count;
  const Size* chosen = keys.chosen ? keys.chosen + (b * tokens + from / heads) * behind : nullptr;
  const auto row = [&](Size i) { return cache + (chosen ? chosen[i] : i) * keys.width; };
  for (Size start = first; start < last; start += KEYS) {
    const Size count = std::min(KEYS, last - start);
    for (Size key = 0; key < count; ++key) {
      const Size i = start + key - keys.window_count;
      rows[key] = i < 0 ? window + (start + key) * keys.width : row(i);
    }
    multiply(rows, 0, count, queries + from * keys.width, several, keys.width,
             [&](Size key, Size some, Size query, const float* found) {
               for (Size i = 0; i < some; ++i) scores[query * KEYS + key + i] = found[i] * scale;
             });
    for (Size query = from; query < to; ++query) {
      Partial& partial = partials[query];
      float* score = &scores[(query - from) * KEYS];
      if (keys.seen) {
        const uint8_t* seen = keys.seen + b * keys.seen_batch + query / heads * keys.seen_query + start;
        for (Size key = 0; key < count; ++key) score[key] = seen[key] ? score[key] : HIDDEN;
      }
      share(score, count, partial, keys.value_width, &weights[(query - from) * KEYS]);
    }
    add_weighted(rows, count, weights.data(), KEYS, several, keys.value_width, partials[from].values);
  }
}

// softmax(scale q k, sink) v for queries [B, T, H, W] -> out [B, T, H, value_width], the latter in fp32; sinks: [H] or
// null.
void attend(const Number* queries, const Keys& keys, Size batch, Size tokens, Size heads, float scale,
            const Number* sinks, float* out, Size threads) {
  const Size group = tokens * heads, values = keys.value_width;
  // Queries with keys of their own see them alone, others together.
  const Size alone = keys.chosen ? tokens : 1, each = group / alone;
  const Size parts = (keys.count + KEYS_A_TASK - 1) / KEYS_A_TASK;
  std::vector<Partial> partials(parts * batch * group);
  float* sums = kept<1>(partials.size() * values);
  std::fill_n(sums, partials.size() * values, 0.0f);
  for (size_t i = 0; i < partials.size(); ++i) partials[i].values = sums + i * values;
  const Size tasks = batch * parts * alone;
  Failure failure;
#pragma omp parallel num_threads(threads) if (tasks > 1 && batch * group * keys.count * keys.width > WORTH_A_THREAD)
  {
#pragma omp for schedule(dynamic)
    for (Size task = 0; task < tasks; ++task)
      failure.watch([&] {
        const Size b = task / (parts * alone), part = task / alone % parts, from = task % alone * each;
        const Size first = part * KEYS_A_TASK, last = std::min(first + KEYS_A_TASK, keys.count);
        see_keys(keys, b, first, last, queries + b * group * keys.width, from, from + each, tokens, heads,
                 scale * LOG2_E, &partials[(part * batch + b) * group]);
      });
  }
  failure.raise();
  for (Size row = 0; row < batch * group; ++row) {
    const float sink = sinks ? widened(sinks[row % heads]) * LOG2_E : HIDDEN;
    float top = sink, weights = 0;
    for (Size part = 0; part < parts; ++part) top = std::max(top, partials[part * batch * group + row].base);
    if (sinks) weights = two_to(sink - top);
    float* to = out + row * values;
    std::fill(to, to + values, 0.0f);
    for (Size part = 0; part < parts; ++part) {
      const Partial& partial = partials[part * batch * group + row];
      if (partial.base == HIDDEN) continue;
      const float share = two_to(partial.base - top);
      weights += share * sum_of(partial.weights);
      for (Size i = 0; i < values; ++i) to[i] += share * partial.values[i];
    }
    // A query that sees nothing, in padding, gets 0.
    for (Size i = 0; i < values && weights > 0; ++i) to[i] /= weights;
  }
}

// MLA on its latents: queries [B, T, H, D + P] and kv_b [H, D + D_v, R] -> out [B, T, H, D_v]. W_UK goes into the
// queries, W_UV comes behind the attention. Keys: see `Keys`; their width is R + P, that of values R. `keys_there`: how
// many rows a sequence of the cache has, which chosen ones are among.
void attend_latents(const Number* queries, const Number* cache, Size batch_stride, Size width, Size rank, Size count,
                    Size keys_there, const Size* chosen, const uint8_t* seen, Size seen_batch, Size seen_query,
                    const Number* kv_b, Size nope, Size value_width, Size batch, Size tokens, Size heads, double scale,
                    Number* out, Size threads) {
  const Keys keys = {cache, batch_stride, width, rank, count, chosen, seen, seen_batch, seen_query};
  const Size rotary = width - rank, rows = batch * tokens * heads;
  if (chosen) must_be_below(chosen, batch * tokens * count, keys_there);
  std::vector<Number> absorbed(rows * width);
  std::vector<float> mixed(rows * rank);
  const bool many = rows * rank * nope > WORTH_A_THREAD;
  Failure failure;
#pragma omp parallel for schedule(static) num_threads(threads) if (many)
  for (Size row = 0; row < rows; ++row)
    failure.watch([&] {
      const Number* query = queries + row * (nope + rotary);
      const SideBySide w_uk = {kv_b + row % heads * (nope + value_width) * rank, rank};
      std::vector<float> sums(rank);
      add_weighted(w_uk, nope, query, 0, 1, rank, sums.data());
      narrow(sums.data(), &absorbed[row * width], rank);
      std::copy(query + nope, query + nope + rotary, &absorbed[row * width] + rank);
    });
  failure.raise();
  attend(absorbed.data(), keys, batch, tokens, heads, static_cast<float>(scale), nullptr, mixed.data(), threads);
  const Numbers values = narrowed(mixed);
#pragma omp parallel for schedule(static) num_threads(threads) if (many)
  for (Size row = 0; row < rows; ++row) {
    const Number* w_uv = kv_b + (row % heads * (nope + value_width) + nope) * rank;
    multiply(w_uv, 0, value_width, &values[row * rank], 1, rank,
             [=](Size i, Size some, Size, const float* found) { narrow(found, out + row * value_width + i, some); });
  }
}

// Attention of all heads to one key per token, which is its value too: queries [B, T, H, W] -> out [B, T, H, W].
void attend_shared(const Number* queries, const Number* cache, Size batch_stride, Size width, Size count,
                   const uint8_t* seen, Size seen_batch, Size seen_query, Size batch, Size tokens, Size heads,
                   double scale, const Number* sinks, Number* out, Size threads) {
  const Keys keys = {cache, batch_stride, width, width, count, nullptr, seen, seen_batch, seen_query};
  std::vector<float> mixed(batch * tokens * heads * width);
  attend(queries, keys, batch, tokens, heads, static_cast<float>(scale), sinks, mixed.data(), threads);
  narrow(mixed.data(), out, mixed.size());
}

}  // namespace
