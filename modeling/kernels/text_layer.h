// Decoder layers with MLA of a text: what treats each token by itself is done for some tokens at a time, all of it
// while they are in a core's cache.

#pragma once

#include "layers.h"
#include "text.h"

namespace {

// What such a layer caches of a text, and nothing more.
void remember_text(const Layer* layer, const Step* step, const Cache* cache, const Number* hidden) {
  if (step->batch < 1 || step->tokens < 1) throw Unfit();
  const LatentAttention& mla = layer->attention;
  const Size width = layer->width;
  in_chunks(*step, TOKENS, [&](const Step& some) {
    const Numbers x = normed(hidden + some.first * width, some.tokens, width, mla.norm, mla.norm_eps);
    remember(*layer, some, *cache, x, step->tokens);
  });
}

// The same as `decode_layer` of a text, whose keys and values are made from the latents for all heads. `seen` is null
// where no token was read before it: it is causal then.
void read_layer(const Layer* layer, const Step* step, const Cache* cache, const Number* hidden, Number* out,
                Size* counts) {
  must_be_readable(*layer, *step);
  const LatentAttention& mla = layer->attention;
  const Size tokens = step->tokens, n = step->batch * tokens, width = layer->width, length = cache->length + tokens;
  const Size head = mla.nope + mla.rotary, head_values = mla.value_width, row = mla.heads * head;
  const Size value_row = mla.heads * head_values;
  Numbers queries(n * row), keys(step->batch * length * row), values(step->batch * length * value_row);
  Numbers mixed(n * value_row);

  in_chunks(*step, TOKENS, [&](const Step& some) {
    const Numbers x = normed(hidden + some.first * width, some.tokens, width, mla.norm, mla.norm_eps);
    Numbers from;
    remember(*layer, some, *cache, x, tokens, &from);
    map_tokens(some, from.data(), from.size() / some.tokens, {{mla.q_b, &queries[some.first * row], row}});
    rotate(some, &queries[some.first * row], mla.heads, head, mla.rotary, mla.nope, mla.interleaved);
  });

  Step all = *step;
  all.tokens = length, all.real = nullptr, all.ids = nullptr;
  in_chunks(all, TOKENS, [&](const Step& some) {
    Numbers latents(some.tokens * mla.rank), expanded(some.tokens * mla.heads * (mla.nope + head_values));
    const auto cached = [&](Size i) {
      return cache->latents + i / length * cache->latents_stride + i % length * (mla.rank + mla.rotary);
    };
    for (Size i = 0; i < some.tokens; ++i) std::copy_n(cached(some.first + i), mla.rank, &latents[i * mla.rank]);
    const Matrix expansion = {mla.kv_b, nullptr};
    map_tokens(some, latents.data(), mla.rank, {{expansion, expanded.data(), mla.heads * (mla.nope + head_values)}});
    const Number* from = expanded.data();
    for (Size i = some.first; i < some.first + some.tokens; ++i)
      for (Size h = 0; h < mla.heads; ++h, from += mla.nope + head_values) {
        Number* key = std::copy_n(from, mla.nope, &keys[i * row + h * head]);
        std::copy_n(cached(i) + mla.rank, mla.rotary, key);
        std::copy_n(from + mla.nope, head_values, &values[i * value_row + h * head_values]);
      }
  });

  attend_text(queries.data(), tokens * row, head, row, keys.data(), length * row, head, row, values.data(),
              length * value_row, head_values, value_row, step->seen, step->seen_batch, step->seen_query, step->batch,
              mla.heads, 1, tokens, length, head, head_values, mla.scale, mixed.data(), step->threads);

  in_chunks(*step, TOKENS_TOGETHER, [&](const Step& some) {
    Numbers projected(some.tokens * width), between(some.tokens * width);
    map_tokens(some, &mixed[some.first * value_row], value_row, {{mla.out, projected.data(), width}});
    add(hidden + some.first * width, projected, between.data());
    mix_tokens(*layer, some, between.data(), out + some.first * width, counts);
  });
}

}  // namespace
