// A decoder layer as a whole: the functions of the other files in the order of `decoder_layer.py`, without a word from
// Python between them. `native_layer.py` fills the structures below, field by field.

#pragma once

#include "attention.h"
#include "experts.h"
#include "indexer.h"
#include "int8.h"
#include "linear.h"
#include "streams.h"

namespace {

// A linear map's weight [out, in], or those of experts [E, out, in]: Numbers, or int8 where rows have scales.
struct Matrix {
  const void* numbers;
  const float* scales;
};

// How a sub-layer reads n residual streams [N, n, d] and writes to them; n = 1: it reads the one there is and adds.
struct Connection {
  Size n;
  const Number *fn, *base, *scale;
  double norm_eps, eps;
  Size iterations;
};

// MLA; `q_rank` is 0 without a query latent, whose map is then `q_b`.
struct LatentAttention {
  const Number *norm, *q_norm, *kv_norm, *kv_b;
  Matrix q_a, q_b, kv_a, out;
  double norm_eps, q_eps, kv_eps, scale;
  Size heads, q_rank, rank, nope, rotary, value_width, interleaved;
};

// What chooses `top_k` keys where there are more; `heads` is 0 where there is none.
struct Indexer {
  Matrix wq, wk;
  const Number *norm, *norm_bias, *weights;
  double eps;
  Size heads, width, top_k;
};

// Experts and what all tokens go through: a mixture's shared experts, or with `top_k` = 0 the one dense network.
struct ChannelMixer {
  const Number* norm;
  double norm_eps;
  const Number* router;
  const float* bias;
  const Size* table;  // [vocabulary, top_k]
  Size vocabulary, experts, top_k, groups, best_groups, group_top, scoring, normalises;
  double weight_scale;
  Matrix gate_up, down;
  Size inner;
  Matrix shared_gate, shared_up, shared_down;
  Size shared_inner;
  double limit;
};

// Attention with one key per token, to a window and to the entries of a compressor; `contribution` is 0 without one,
// and so is `index_contribution` of an indexer's own compressor.
struct CompressedAttention {
  const Number *norm, *q_norm, *kv_norm, *sinks;
  Matrix q_a, q_b, kv, o_a, o_b;
  double norm_eps, q_eps, kv_eps, head_eps, scale;
  Size heads, q_rank, head, rotary, window, groups, out_rank;
  Matrix values, gates;
  Size contribution;  // numbers of a token's values
  Matrix index_values, index_gates;
  Size index_contribution;
};

struct Layer {
  Size width;
  LatentAttention attention;
  CompressedAttention compressed;
  Indexer indexer;  // of either
  Connection token_connection;
  ChannelMixer channels;
  Connection connection;  // of the channel mixer
};

// Where the keys of a layer stand, [B, room, R + P] and [B, room, D], and how many there are before this step.
struct Cache {
  Number* latents;
  Size latents_stride;
  Number* index_keys;
  Size index_stride, length;
};

// What a compressed layer remembers: keys of the window and entries (`compressed_cache`), and their places.
struct Memory {
  const Number* window;
  Size window_stride, window_count;
  const Size* window_places;
  Size window_places_stride;
  const Number *entries, *index_entries;
  Size entries_stride, index_stride, count;
  const Size* entry_places;
  Size entry_places_stride;
};

// What the two halves of a compressed token mixer hand on: the normed input [N, d], weights of the streams, queries
// [N, H, D] and the latent [N, q_rank] that they are made of.
struct Between {
  Number* x;
  float *post, *residual;
  Number *queries, *latent;
};

// What is the same for all layers of a step: T tokens of B sequences, their angles (as in `norm_rotate`), which keys
// they see (as in `Keys`), which tokens are no padding, bytes [B, T] or null for all, and their ids.
struct Step {
  Size batch, tokens;
  const Number *cos, *sin;
  Size positions;
  const uint8_t* seen;
  Size seen_batch, seen_query;
  const uint8_t* real;
  const Size* ids;
  Size threads;
  Size first;  // number of the token that it begins with, where it is a part of a step (`in_chunks`)
};

const Number* plain(const Matrix& matrix) { return static_cast<const Number*>(matrix.numbers); }
const int8_t* bytes(const Matrix& matrix) { return static_cast<const int8_t*>(matrix.numbers); }

// A linear map of tokens -> out [N, rows]; with rows = 0 there is none.
struct Map {
  const Matrix& matrix;
  Number* out;
  Size rows;
};

// Up to four maps of the same tokens x [N, d].
void map_tokens(const Step& step, const Number* x, Size width, std::initializer_list<Map> maps) {
  const Size n = step.batch * step.tokens;
  const Number* weights[4] = {};
  Number* outs[4] = {};
  Size rows[4] = {}, some = 0;
  for (const Map& map : maps) {
    if (map.rows && map.matrix.scales)
      project_int8(x, n, 1, width, bytes(map.matrix), map.matrix.scales, map.rows, map.out, step.threads);
    if (!map.rows || map.matrix.scales) continue;
    weights[some] = plain(map.matrix), outs[some] = map.out, rows[some++] = map.rows;
  }
  if (some)
    project(x, n, width, weights[0], outs[0], rows[0], weights[1], outs[1], rows[1], weights[2], outs[2], rows[2],
            weights[3], outs[3], rows[3], step.threads);
}

Numbers normed(const Number* x, Size tokens, Size width, const Number* weight, double eps) {
  Numbers out(tokens * width);
  norm_rotate(x, out.data(), tokens, 1, width, weight, width, eps, nullptr, nullptr, 1, 0, 0, 0, 1.0);
  return out;
}

void layer_norm(Number* x, Size tokens, Size width, const Number* weight, const Number* bias, double eps) {
  std::vector<float> wide(width);
  for (Size token = 0; token < tokens; ++token, x += width) {
    widen(x, wide.data(), width);
    float mean = 0, variance = 0;
    for (const float each : wide) mean += each / width;
    for (float& each : wide) variance += (each - mean) * (each - mean) / width;
    const float scale = 1.0f / std::sqrt(variance + static_cast<float>(eps));
    for (Size i = 0; i < width; ++i) wide[i] = (wide[i] - mean) * scale * widened(weight[i]) + widened(bias[i]);
    narrow(wide.data(), x, width);
  }
}

// Puts rows [N, W], those of token number `first` and the next of sequences of T `tokens`, behind the first `length` of
// each sequence's.
void append(const Numbers& rows, Size width, Size first, Size tokens, Number* cache, Size stride, Size length) {
  const Size count = rows.size() / width;
  for (Size i = 0; i < count; ++i)
    std::copy_n(&rows[i * width], width,
                cache + (first + i) / tokens * stride + (length + (first + i) % tokens) * width);
}

// out = x + y
void add(const Number* x, const Numbers& y, Number* out) {
  for (size_t i = 0; i < y.size(); ++i) store(out + i, widened(x[i]) + widened(y[i]));
}

// gates = silu(gates) ups, as in `mix_channels`
void activate(Number* gates, const Number* ups, Size count, double limit) {
  const float bound = static_cast<float>(limit);
  for (Size i = 0; i < count; ++i) {
    store(gates + i, gated(widened(gates[i]), widened(ups[i]), bound));
  }
}

// Rotates rows [N, H, D] from number `from` on, after RMSNorm of the first `norm_width` numbers.
void rotate(const Step& step, Number* rows, Size heads, Size width, Size rotary, Size from, bool interleaved,
            const Number* norm = nullptr, Size norm_width = 0, double eps = 0) {
  const Size n = step.batch * step.tokens;
  for (Size token = 0, some; token < n; token += some) {
    // Angles of one sequence may be those of all.
    const Size place = (step.first + token) % step.positions, angle = place * rotary / 2;
    some = std::min(n - token, step.positions - place);
    Number* these = rows + token * heads * width;
    norm_rotate(these, these, some, heads, width, norm, norm_width, eps, step.cos + angle, step.sin + angle, some,
                rotary, from, interleaved, 1.0);
  }
}

// Caches latents and keys of the indexer for MLA's normed input [N, d], a step's or a part of one with sequences of T
// `tokens`. `from`: for what queries are made of, [N, q_rank] or x itself; null where none are.
void remember(const Layer& layer, const Step& step, const Cache& cache, const Numbers& x, Size tokens,
              Numbers* from = nullptr) {
  const LatentAttention& mla = layer.attention;
  const Indexer& indexer = layer.indexer;
  const Size n = step.batch * step.tokens, width = mla.rank + mla.rotary;
  const Size index_width = indexer.heads ? indexer.width : 0, q_rank = from ? mla.q_rank : 0;
  Numbers latent(n * q_rank), latents(n * width), index_keys(n * index_width);
  map_tokens(step, x.data(), layer.width,
             {{mla.q_a, latent.data(), q_rank},
              {mla.kv_a, latents.data(), width},
              {indexer.wk, index_keys.data(), index_width}});
  rotate(step, latents.data(), 1, width, mla.rotary, mla.rank, mla.interleaved, mla.kv_norm, mla.rank, mla.kv_eps);
  append(latents, width, step.first, tokens, cache.latents, cache.latents_stride, cache.length);
  if (index_width) {
    layer_norm(index_keys.data(), n, index_width, indexer.norm, indexer.norm_bias, indexer.eps);
    rotate(step, index_keys.data(), 1, index_width, mla.rotary, 0, false);
    append(index_keys, index_width, step.first, tokens, cache.index_keys, cache.index_stride, cache.length);
  }
  if (from) *from = q_rank ? normed(latent.data(), n, q_rank, mla.q_norm, mla.q_eps) : x;
}

// The token mixer's output [N, d] for its normed input [N, d], few tokens which attend to the latents themselves.
Numbers token_mixer_output(const Layer& layer, const Step& step, const Cache& cache, const Numbers& x) {
  const LatentAttention& mla = layer.attention;
  const Indexer& indexer = layer.indexer;
  const Size n = step.batch * step.tokens, width = mla.rank + mla.rotary, head = mla.nope + mla.rotary;
  const Size length = cache.length + step.tokens, threads = step.threads, sequence = step.batch;
  Numbers from;
  remember(layer, step, cache, x, step.tokens, &from);
  const bool selects = indexer.heads && length > indexer.top_k;
  const Size index_width = indexer.heads * indexer.width;
  Numbers queries(n * mla.heads * head), index_queries(selects ? n * index_width : 0);
  Numbers mixed(n * mla.heads * mla.value_width);
  map_tokens(
      step, from.data(), from.size() / n,
      {{mla.q_b, queries.data(), mla.heads * head}, {indexer.wq, index_queries.data(), selects ? index_width : 0}});
  rotate(step, queries.data(), mla.heads, head, mla.rotary, mla.nope, mla.interleaved);
  const auto attend = [&](Size count, const Size* chosen, const uint8_t* seen, Size seen_batch, Size seen_query) {
    attend_latents(queries.data(), cache.latents, cache.latents_stride, width, mla.rank, count, length, chosen, seen,
                   seen_batch, seen_query, mla.kv_b, mla.nope, mla.value_width, sequence, step.tokens, mla.heads,
                   mla.scale, mixed.data(), threads);
  };
  if (selects) {
    const Size top_k = indexer.top_k;
    std::vector<Size> chosen(n * top_k);
    std::vector<uint8_t> sees(n * top_k);
    rotate(step, index_queries.data(), indexer.heads, indexer.width, mla.rotary, 0, false);
    choose_keys(index_queries.data(), cache.index_keys, cache.index_stride, x.data(), indexer.weights, layer.width,
                step.seen, step.seen_batch, step.seen_query, sequence, step.tokens, indexer.heads, indexer.width,
                length, top_k, chosen.data(), sees.data(), threads);
    attend(top_k, chosen.data(), sees.data(), step.tokens * top_k, top_k);
  } else {
    attend(length, nullptr, step.seen, step.seen_batch, step.seen_query);
  }
  Numbers out(n * layer.width);
  map_tokens(step, mixed.data(), mla.heads * mla.value_width, {{mla.out, out.data(), layer.width}});
  return out;
}

constexpr Size DOCUMENT = Size{1} << 32, NOWHERE = -(Size{1} << 62);  // as in compressed_cache.py

// Reads a sub-layer's input [N, d] from the streams; post and residual are written to where there are several.
void read(const Connection& connection, const Step& step, Size width, const Number* streams, Number* x, float* post,
          float* residual) {
  const Size n = step.batch * step.tokens;
  if (connection.n == 1)
    std::copy_n(streams, n * width, x);
  else
    read_streams(streams, n, connection.n, width, connection.fn, connection.base, connection.scale, connection.norm_eps,
                 connection.eps, connection.iterations, x, post, residual, step.threads);
}

void write(const Connection& connection, Size n, Size width, const Number* streams, const Numbers& output,
           const float* post, const float* residual, Number* out) {
  if (connection.n == 1)
    add(streams, output, out);
  else
    write_streams(streams, output.data(), post, residual, n, connection.n, width, out);
}

// Which keys of the window and which entries the queries at `places` [B, T] see: bytes [B, T, S + N].
std::vector<uint8_t> seen_keys(const Step& step, const Memory& memory, const Size* places, Size window) {
  const Size all = memory.window_count + memory.count;
  std::vector<uint8_t> seen(step.batch * step.tokens * all);
  // Places may be any numbers: unsigned ones wrap around where others are undefined.
  const auto minus = [](Size a, Size b) {
    return static_cast<Size>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
  };
  for (Size row = 0; row < step.batch * step.tokens; ++row) {
    const Size b = row / step.tokens, place = places[row];
    const Size begin = minus(place, (place % DOCUMENT + DOCUMENT) % DOCUMENT);
    const Size* near = memory.window_places + b * memory.window_places_stride;
    const Size* far = memory.entry_places + b * memory.entry_places_stride;
    uint8_t* to = &seen[row * all];
    for (Size i = 0; i < memory.window_count; ++i) to[i] = minus(place, near[i]) >= 0 && minus(place, near[i]) < window;
    for (Size i = 0; i < memory.count; ++i)
      to[memory.window_count + i] = far[i] <= place && far[i] >= begin && far[i] != NOWHERE;
  }
  return seen;
}

// The token mixer's output [N, d], from what it made of its input and what it remembers.
Numbers compressed_output(const Layer& layer, const Step& step, const Memory& memory, const Size* places,
                          const Between& between) {
  const CompressedAttention& mixer = layer.compressed;
  const Indexer& indexer = layer.indexer;
  const Size n = step.batch * step.tokens, all = memory.window_count + memory.count, threads = step.threads;
  std::vector<uint8_t> seen = seen_keys(step, memory, places, mixer.window);
  std::vector<Size> chosen;
  Keys keys = {memory.entries,
               memory.entries_stride,
               mixer.head,
               mixer.head,
               all,
               nullptr,
               seen.data(),
               step.tokens * all,
               all,
               memory.window,
               memory.window_stride,
               memory.window_count};
  if (indexer.heads && memory.count > indexer.top_k) {
    const Size top_k = indexer.top_k, index_width = indexer.heads * indexer.width;
    Numbers queries(n * index_width);
    map_tokens(step, between.latent, mixer.q_rank, {{indexer.wq, queries.data(), index_width}});
    norm_rotate(queries.data(), queries.data(), n, indexer.heads, indexer.width, nullptr, 0, 0.0, step.cos, step.sin,
                step.positions, mixer.rotary, indexer.width - mixer.rotary, true, 1.0);
    chosen.resize(n * top_k);
    std::vector<uint8_t> sees(n * top_k);
    choose_keys(queries.data(), memory.index_entries, memory.index_stride, between.x, indexer.weights, layer.width,
                seen.data() + memory.window_count, step.tokens * all, all, step.batch, step.tokens, indexer.heads,
                indexer.width, memory.count, top_k, chosen.data(), sees.data(), threads);
    // What is seen of the window stays, and of the chosen entries those that are visible.
    const Size few = memory.window_count + top_k;
    for (Size row = 0; row < n; ++row) {
      std::memmove(&seen[row * few], &seen[row * all], memory.window_count);
      std::copy_n(&sees[row * top_k], top_k, &seen[row * few + memory.window_count]);
    }
    keys.count = few, keys.chosen = chosen.data(), keys.seen_batch = step.tokens * few, keys.seen_query = few;
  }
  const Size width = mixer.heads * mixer.head;
  std::vector<float> mixed(n * width);
  attend(between.queries, keys, step.batch, step.tokens, mixer.heads, static_cast<float>(mixer.scale), mixer.sinks,
         mixed.data(), threads);
  Numbers values = narrowed(mixed), inner(n * mixer.groups * mixer.out_rank), out(n * layer.width);
  norm_rotate(values.data(), values.data(), n, mixer.heads, mixer.head, nullptr, 0, 0.0, step.cos, step.sin,
              step.positions, mixer.rotary, mixer.head - mixer.rotary, true, -1.0);
  if (mixer.o_a.scales)
    project_int8(values.data(), n, mixer.groups, width / mixer.groups, bytes(mixer.o_a), mixer.o_a.scales,
                 mixer.out_rank, inner.data(), threads);
  else
    project_groups(values.data(), n, mixer.groups, width / mixer.groups, plain(mixer.o_a), mixer.out_rank, inner.data(),
                   threads);
  map_tokens(step, inner.data(), mixer.groups * mixer.out_rank, {{mixer.o_b, out.data(), layer.width}});
  return out;
}

// The channel mixer's output [N, d] for its normed input [N, d]; adds the experts' tokens to `counts` [E].
Numbers channel_mixer_output(const ChannelMixer& mixer, const Step& step, Size width, const Numbers& x, Size* counts) {
  const Size n = step.batch * step.tokens, top_k = mixer.top_k;
  Numbers out(n * width);
  std::vector<float> logits(n * mixer.experts), weights(n * top_k);
  std::vector<Size> chosen(n * top_k);
  if (top_k)
    route(x.data(), n, width, mixer.router, mixer.bias, mixer.table, mixer.vocabulary, step.ids, mixer.experts, top_k,
          mixer.groups, mixer.best_groups, mixer.group_top, mixer.scoring, mixer.normalises, mixer.weight_scale,
          logits.data(), weights.data(), chosen.data(), step.threads);
  for (Size slot = 0; slot < n * top_k; ++slot) counts[chosen[slot]] += !step.real || step.real[slot / top_k];
  // Experts and what all tokens go through are one function, unless any of it is in int8.
  const bool apart =
      mixer.gate_up.scales || mixer.shared_gate.scales || mixer.shared_up.scales || mixer.shared_down.scales;
  if (mixer.gate_up.scales)
    mix_int8(x.data(), n, width, chosen.data(), weights.data(), top_k, mixer.experts, bytes(mixer.gate_up),
             mixer.gate_up.scales, bytes(mixer.down), mixer.down.scales, mixer.inner, mixer.limit, out.data(),
             step.threads);
  else
    mix_channels(x.data(), n, width, chosen.data(), weights.data(), top_k, mixer.experts, plain(mixer.gate_up),
                 plain(mixer.down), mixer.inner, plain(mixer.shared_gate), plain(mixer.shared_up),
                 plain(mixer.shared_down), apart ? 0 : mixer.shared_inner, mixer.limit, out.data(), step.threads);
  if (apart && mixer.shared_inner) {
    Numbers gates(n * mixer.shared_inner), ups(gates.size()), shared(n * width);
    map_tokens(
        step, x.data(), width,
        {{mixer.shared_gate, gates.data(), mixer.shared_inner}, {mixer.shared_up, ups.data(), mixer.shared_inner}});
    activate(gates.data(), ups.data(), gates.size(), mixer.limit);
    map_tokens(step, gates.data(), mixer.shared_inner, {{mixer.shared_down, shared.data(), width}});
    add(out.data(), shared, out.data());
  }
  return out;
}

// The second half of a layer, see `decode_channels`; adds to `counts`, as several threads may.
void mix_tokens(const Layer& layer, const Step& step, const Number* streams, Number* out, Size* counts) {
  const ChannelMixer& mixer = layer.channels;
  const Connection& connection = layer.connection;
  const Size n = step.batch * step.tokens, width = layer.width;
  Numbers x(n * width);
  std::vector<float> post(n * connection.n), residual(n * connection.n * connection.n);
  std::vector<Size> found(mixer.experts);
  read(connection, step, width, streams, x.data(), post.data(), residual.data());
  x = channel_mixer_output(mixer, step, width, normed(x.data(), n, width, mixer.norm, mixer.norm_eps), found.data());
  write(connection, n, width, streams, x, post.data(), residual.data(), out);
  for (size_t expert = 0; expert < found.size(); ++expert) {
#pragma omp atomic
    counts[expert] += found[expert];
  }
}

// Throws where a step cannot be read: nothing is written before. What else is wrong with a step, Python has seen.
void must_be_readable(const Layer& layer, const Step& step) {
  const ChannelMixer& mixer = layer.channels;
  if (step.batch < 1 || step.tokens < 1 || (mixer.table && !step.ids)) throw Unfit();
  for (Size token = 0; mixer.table && token < step.batch * step.tokens; ++token)
    must_be_below(row_of(mixer.table, mixer.vocabulary, mixer.top_k, step.ids[token]), mixer.top_k, mixer.experts);
}

// Calls `act(step)` for all tokens of a step as B = 1 sequence, or, where there are many for every thread, for at most
// `most` of them at a time: a thread then takes them through all of it.
template <class Act>
void in_chunks(const Step& step, Size most, Act act) {
  const Size n = step.batch * step.tokens;
  const auto some_of = [&](Size first, Size count, Size threads) {
    Step some = step;
    some.batch = 1, some.tokens = count, some.first = first, some.threads = threads;
    if (step.real) some.real += first;
    if (step.ids) some.ids += first;
    act(some);
  };
  // Not by a condition of the loop: what is parallel in `act` would be nested, and have its threads made anew.
  if (n <= MANY * step.threads) return some_of(0, n, step.threads);
  const Size each = std::min(most, (n + step.threads - 1) / step.threads);
  Failure failure;
#pragma omp parallel for schedule(dynamic) num_threads(step.threads)
  for (Size first = 0; first < n; first += each) failure.watch([&] { some_of(first, std::min(each, n - first), 1); });
  failure.raise();
}

// The second half of a layer: residual streams [N, n, d] -> out, of the same shape. `counts` [E] begins with zeros.
void decode_channels(const Layer* layer, const Step* step, const Number* streams, Number* out, Size* counts) {
  must_be_readable(*layer, *step);
  const Size token = layer->connection.n * layer->width;
  in_chunks(*step, TOKENS_TOGETHER, [=](const Step& some) {
    mix_tokens(*layer, some, streams + some.first * token, out + some.first * token, counts);
  });
}

// The first part of a compressed layer: streams [N, n, d] -> `between`; keys [N, D] for the window; and what the tokens
// contribute to entries, values and gates side by side, [N, 2 W] each.
void begin_compressed(const Layer* layer, const Step* step, const Number* streams, const Between* between, Number* keys,
                      Number* contributions, Number* index_contributions) {
  must_be_readable(*layer, *step);
  const CompressedAttention& mixer = layer->compressed;
  const Size n = step->batch * step->tokens, width = layer->width;
  const auto rotate = [&](Number* rows, Size heads, const Number* norm, double eps) {
    norm_rotate(rows, rows, n, heads, mixer.head, norm, mixer.head, eps, step->cos, step->sin, step->positions,
                mixer.rotary, mixer.head - mixer.rotary, true, 1.0);
  };
  const auto contribute = [&](const Matrix& values, const Matrix& gates, Size numbers, Number* to) {
    Numbers both(2 * n * numbers);
    Number *value = both.data(), *gate = value + n * numbers;
    map_tokens(*step, between->x, width, {{values, value, numbers}, {gates, gate, numbers}});
    for (Size token = 0; token < n; ++token) {
      std::copy_n(value + token * numbers, numbers, to + 2 * token * numbers);
      std::copy_n(gate + token * numbers, numbers, to + (2 * token + 1) * numbers);
    }
  };
  Numbers input(n * width), latent(n * mixer.q_rank);
  read(layer->token_connection, *step, width, streams, input.data(), between->post, between->residual);
  norm_rotate(input.data(), between->x, n, 1, width, mixer.norm, width, mixer.norm_eps, nullptr, nullptr, 1, 0, 0, 0,
              1);
  map_tokens(*step, between->x, width, {{mixer.q_a, latent.data(), mixer.q_rank}, {mixer.kv, keys, mixer.head}});
  norm_rotate(latent.data(), between->latent, n, 1, mixer.q_rank, mixer.q_norm, mixer.q_rank, mixer.q_eps, nullptr,
              nullptr, 1, 0, 0, 0, 1);
  map_tokens(*step, between->latent, mixer.q_rank, {{mixer.q_b, between->queries, mixer.heads * mixer.head}});
  rotate(between->queries, mixer.heads, nullptr, mixer.head_eps);
  rotate(keys, 1, mixer.kv_norm, mixer.kv_eps);
  if (mixer.contribution) contribute(mixer.values, mixer.gates, mixer.contribution, contributions);
  if (mixer.index_contribution)
    contribute(mixer.index_values, mixer.index_gates, mixer.index_contribution, index_contributions);
}

// The rest of the layer: streams [N, n, d] -> out, for tokens at `places` [B, T].
void end_compressed(const Layer* layer, const Step* step, const Memory* memory, const Size* places,
                    const Number* streams, const Between* between, Number* out, Size* counts) {
  const Size n = step->batch * step->tokens, width = layer->width;
  Numbers written(n * layer->token_connection.n * width);
  write(layer->token_connection, n, width, streams, compressed_output(*layer, *step, *memory, places, *between),
        between->post, between->residual, written.data());
  decode_channels(layer, step, written.data(), out, counts);
}

// A layer of MLA and one residual stream: [N, d] -> out [N, d]. New keys are written to the cache.
void decode_layer(const Layer* layer, const Step* step, const Cache* cache, const Number* hidden, Number* out,
                  Size* counts) {
  must_be_readable(*layer, *step);
  const Size n = step->batch * step->tokens, width = layer->width;
  const LatentAttention& mla = layer->attention;
  Numbers between(n * width);
  add(hidden, token_mixer_output(*layer, *step, *cache, normed(hidden, n, width, mla.norm, mla.norm_eps)),
      between.data());
  decode_channels(layer, step, between.data(), out, counts);
}

}  // namespace
