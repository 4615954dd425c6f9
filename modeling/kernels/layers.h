// A decoder layer as a whole: the functions of the other files in the order of `decoder_layer.py`, without a word from
// Python between them. `native_layer.py` fills the structures below, field by field.

#pragma once

#include "attention.h"
#include "experts.h"
#include "indexer.h"
#include "linear.h"
#include "streams.h"

namespace {

// How a sub-layer reads n residual streams [N, n, d] and writes to them; n = 1: it reads the one there is and adds.
struct Connection {
  Size n;
  const Number *fn, *base, *scale;
  double norm_eps, eps;
  Size iterations;
};

// MLA; `q_rank` is 0 without a query latent, whose map is then `q_b`.
struct LatentAttention {
  const Number *norm, *q_a, *q_norm, *q_b, *kv_a, *kv_norm, *kv_b, *out;
  double norm_eps, q_eps, kv_eps, scale;
  Size heads, q_rank, rank, nope, rotary, value_width, interleaved;
};

// What chooses `top_k` keys where there are more; `heads` is 0 where there is none.
struct Indexer {
  const Number *wq, *wk, *norm, *norm_bias, *weights;
  double eps;
  Size heads, width, top_k;
};

// Experts and what all tokens go through: a mixture's shared experts, or with `top_k` = 0 the one dense network.
struct ChannelMixer {
  const Number* norm;
  double norm_eps;
  const Number* router;
  const float* bias;
  const Size* table;
  Size experts, top_k, groups, best_groups, group_top, scoring, normalises;
  double weight_scale;
  const Number *gate_up, *down;
  Size inner;
  const Number *shared_gate, *shared_up, *shared_down;
  Size shared_inner;
  double limit;
};

struct Layer {
  Size width;
  LatentAttention attention;
  Indexer indexer;
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
};

using Numbers = std::vector<Number>;

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

// Puts rows [B, T, W] behind the first `length` of each sequence's.
void append(const Numbers& rows, const Step& step, Size width, Number* cache, Size stride, Size length) {
  const Size some = step.tokens * width;
  for (Size b = 0; b < step.batch; ++b) std::copy_n(&rows[b * some], some, cache + b * stride + length * width);
}

// out = x + y
void add(const Number* x, const Numbers& y, Number* out) {
  for (size_t i = 0; i < y.size(); ++i) store(out + i, widened(x[i]) + widened(y[i]));
}

// The token mixer's output [N, d] for its normed input [N, d].
Numbers token_mixer_output(const Layer& layer, const Step& step, const Cache& cache, const Numbers& x) {
  const LatentAttention& mla = layer.attention;
  const Indexer& indexer = layer.indexer;
  const Size n = step.batch * step.tokens, width = mla.rank + mla.rotary, head = mla.nope + mla.rotary;
  const Size length = cache.length + step.tokens, threads = step.threads, sequence = step.batch;
  const auto rotate = [&](Numbers& rows, Size heads, Size rows_width, const Number* norm, Size norm_width, double eps,
                          Size first, bool interleaved) {
    norm_rotate(rows.data(), rows.data(), n, heads, rows_width, norm, norm_width, eps, step.cos, step.sin,
                step.positions, mla.rotary, first, interleaved, 1.0);
  };

  Numbers compressed(n * mla.q_rank), latents(n * width), index_keys(n * (indexer.heads ? indexer.width : 0));
  project(x.data(), n, layer.width, mla.q_a, compressed.data(), mla.q_rank, mla.kv_a, latents.data(), width,
          indexer.wk, index_keys.data(), indexer.heads ? indexer.width : 0, nullptr, nullptr, 0, threads);
  if (mla.q_rank) compressed = normed(compressed.data(), n, mla.q_rank, mla.q_norm, mla.q_eps);
  rotate(latents, 1, width, mla.kv_norm, mla.rank, mla.kv_eps, mla.rank, mla.interleaved);
  append(latents, step, width, cache.latents, cache.latents_stride, cache.length);
  if (indexer.heads) {
    layer_norm(index_keys.data(), n, indexer.width, indexer.norm, indexer.norm_bias, indexer.eps);
    rotate(index_keys, 1, indexer.width, nullptr, 0, 0.0, 0, false);
    append(index_keys, step, indexer.width, cache.index_keys, cache.index_stride, cache.length);
  }

  const bool selects = indexer.heads && length > indexer.top_k;
  const Number* from = mla.q_rank ? compressed.data() : x.data();
  const Size from_width = mla.q_rank ? mla.q_rank : layer.width, index_width = indexer.heads * indexer.width;
  Numbers queries(n * mla.heads * head), index_queries(selects ? n * index_width : 0);
  Numbers mixed(n * mla.heads * mla.value_width);
  project(from, n, from_width, mla.q_b, queries.data(), mla.heads * head, indexer.wq, index_queries.data(),
          selects ? index_width : 0, nullptr, nullptr, 0, nullptr, nullptr, 0, threads);
  rotate(queries, mla.heads, head, nullptr, 0, 0.0, mla.nope, mla.interleaved);
  const auto attend = [&](Size count, const Size* chosen, const uint8_t* seen, Size seen_batch, Size seen_query) {
    attend_latents(queries.data(), cache.latents, cache.latents_stride, width, mla.rank, count, chosen, seen,
                   seen_batch, seen_query, mla.kv_b, mla.nope, mla.value_width, sequence, step.tokens, mla.heads,
                   mla.scale, mixed.data(), threads);
  };
  if (selects) {
    const Size top_k = indexer.top_k;
    std::vector<Size> chosen(n * top_k);
    std::vector<uint8_t> sees(n * top_k);
    rotate(index_queries, indexer.heads, indexer.width, nullptr, 0, 0.0, 0, false);
    choose_keys(index_queries.data(), cache.index_keys, cache.index_stride, x.data(), indexer.weights, layer.width,
                step.seen, step.seen_batch, step.seen_query, sequence, step.tokens, indexer.heads, indexer.width,
                length, top_k, chosen.data(), sees.data(), threads);
    attend(top_k, chosen.data(), sees.data(), step.tokens * top_k, top_k);
  } else {
    attend(length, nullptr, step.seen, step.seen_batch, step.seen_query);
  }
  Numbers out(n * layer.width);
  project(mixed.data(), n, mla.heads * mla.value_width, mla.out, out.data(), layer.width, nullptr, nullptr, 0, nullptr,
          nullptr, 0, nullptr, nullptr, 0, threads);
  return out;
}

// The channel mixer's output [N, d] for its normed input [N, d]; adds the experts' tokens to `counts` [E].
Numbers channel_mixer_output(const ChannelMixer& mixer, const Step& step, Size width, const Numbers& x, Size* counts) {
  const Size n = step.batch * step.tokens, top_k = mixer.top_k;
  Numbers out(n * width);
  std::vector<float> logits(n * mixer.experts), weights(n * top_k);
  std::vector<Size> chosen(n * top_k);
  if (top_k)
    route(x.data(), n, width, mixer.router, mixer.bias, mixer.table, step.ids, mixer.experts, top_k, mixer.groups,
          mixer.best_groups, mixer.group_top, mixer.scoring, mixer.normalises, mixer.weight_scale, logits.data(),
          weights.data(), chosen.data(), step.threads);
  for (Size slot = 0; slot < n * top_k; ++slot) counts[chosen[slot]] += !step.real || step.real[slot / top_k];
  mix_channels(x.data(), n, width, chosen.data(), weights.data(), top_k, mixer.gate_up, mixer.down, mixer.inner,
               mixer.shared_gate, mixer.shared_up, mixer.shared_down, mixer.shared_inner, mixer.limit, out.data(),
               step.threads);
  return out;
}

}  // namespace

extern "C" {

// The second half of a layer: residual streams [N, n, d] -> out, of the same shape. `counts` [E] begins with zeros.
void decode_channels(const Layer* layer, const Step* step, const Number* streams, Number* out, Size* counts) {
  const ChannelMixer& mixer = layer->channels;
  const Connection& connection = layer->connection;
  const Size n = step->batch * step->tokens, width = layer->width, streams_n = connection.n;
  Numbers x(n * width);
  if (streams_n == 1) {
    x = normed(streams, n, width, mixer.norm, mixer.norm_eps);
    add(streams, channel_mixer_output(mixer, *step, width, x, counts), out);
    return;
  }
  std::vector<float> post(n * streams_n), residual(n * streams_n * streams_n);
  read_streams(streams, n, streams_n, width, connection.fn, connection.base, connection.scale, connection.norm_eps,
               connection.eps, connection.iterations, x.data(), post.data(), residual.data(), step->threads);
  x = channel_mixer_output(mixer, *step, width, normed(x.data(), n, width, mixer.norm, mixer.norm_eps), counts);
  write_streams(streams, x.data(), post.data(), residual.data(), n, streams_n, width, out);
}

// A layer of MLA and one residual stream: [N, d] -> out [N, d]. New keys are written to the cache.
void decode_layer(const Layer* layer, const Step* step, const Cache* cache, const Number* hidden, Number* out,
                  Size* counts) {
  const Size n = step->batch * step->tokens, width = layer->width;
  const LatentAttention& mla = layer->attention;
  Numbers between(n * width);
  add(hidden, token_mixer_output(*layer, *step, *cache, normed(hidden, n, width, mla.norm, mla.norm_eps)), between.data());
  decode_channels(layer, step, between.data(), out, counts);
}

}  // extern "C"
