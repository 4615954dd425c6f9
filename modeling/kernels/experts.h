// Routing, and the networks that tokens are sent through.

#pragma once

#include "columns.h"

namespace {

enum Scoring { SIGMOID, SOFTMAX, SQRT_SOFTPLUS };

void score_experts(const float* logits, Size experts, Size scoring, float* scores) {
  const float top = *std::max_element(logits, logits + experts);
  if (scoring == SIGMOID) {
#pragma omp simd
    for (Size i = 0; i < experts; ++i) scores[i] = sigmoid(logits[i]);
  } else if (scoring == SOFTMAX) {
    float total = 0;
    for (Size i = 0; i < experts; ++i) total += scores[i] = exponential(logits[i] - top);
    for (Size i = 0; i < experts; ++i) scores[i] /= total;
  } else {
    for (Size i = 0; i < experts; ++i)
      scores[i] = std::sqrt(logits[i] > 20.0f ? logits[i] : std::log1p(std::exp(logits[i])));
  }
}

// Hides the scores of all but the best groups; a group counts by the sum of its `group_top` best.
void keep_best_groups(float* scores, Size experts, Size groups, Size best_groups, Size group_top) {
  const Size size = experts / groups;
  std::vector<float> group_scores(groups);
  std::vector<Size> best(std::max(best_groups, group_top));
  for (Size group = 0; group < groups; ++group) {
    largest(size, group_top, best.data(), [&](Size i) { return scores[group * size + i]; });
    for (Size i = 0; i < group_top; ++i) group_scores[group] += scores[group * size + best[i]];
  }
  largest(groups, best_groups, best.data(), [&](Size i) { return group_scores[i]; });
  for (Size i = 0; i < experts; ++i)
    if (std::find(best.begin(), best.begin() + best_groups, i / size) == best.begin() + best_groups) scores[i] = HIDDEN;
}

// Row `id` of a table [rows, K]. A negative id counts from the end, as in PyTorch.
const Size* row_of(const Size* table, Size rows, Size top_k, Size id) {
  if (id < -rows || id >= rows) throw Unfit();
  return table + (id < 0 ? id + rows : id) * top_k;
}

// Experts and a network that all tokens go through, as in `mix_channels`.
struct Experts {
  const Number *gate_up, *down;
  Size inner;
  const Number *shared_gate, *shared_up, *shared_down;
  Size shared_inner;
};

// A gated network, and which of the slots, where tokens wait for networks, go through it.
struct Network {
  const Number *gate, *up, *down;
  Size inner;
  Size first, count;  // slots
  Size activations;   // where its inner activations [count, inner] stand
};

// The choices [N K] in the order of their experts: tokens of one stand side by side, and its weights are read once for
// all of them.
std::vector<Size> by_expert(const Size* indices, Size count) {
  std::vector<Size> slots(count), places(count ? *std::max_element(indices, indices + count) + 2 : 1);
  for (Size i = 0; i < count; ++i) ++places[indices[i] + 1];
  for (size_t expert = 1; expert < places.size(); ++expert) places[expert] += places[expert - 1];
  for (Size i = 0; i < count; ++i) slots[places[indices[i]]++] = i;
  return slots;
}

// The networks that are chosen, and behind them that of all tokens, whose slots are the last.
std::vector<Network> networks_of(const Experts& experts, const Size* indices, const std::vector<Size>& slots,
                                 Size tokens, Size width) {
  std::vector<Network> networks;
  const Size chosen = slots.size(), inner = experts.inner;
  for (Size begin = 0, end; begin < chosen; begin = end) {
    const Size expert = indices[slots[begin]];
    for (end = begin + 1; end < chosen && indices[slots[end]] == expert;) ++end;
    const Number* gate = experts.gate_up + expert * 2 * inner * width;
    networks.push_back(
        {gate, gate + inner * width, experts.down + expert * width * inner, inner, begin, end - begin, begin * inner});
  }
  if (experts.shared_inner)
    networks.push_back({experts.shared_gate, experts.shared_up, experts.shared_down, experts.shared_inner, chosen,
                        tokens, chosen * inner});
  return networks;
}

// Tokens of a text that go through all their networks together: many of each network, in little memory.
constexpr Size TOKENS_TOGETHER = 1024;

// out [count, inner] = silu(gates) ups of `count` vectors, times their weights. There is room for gates [count, BLOCK].
template <class Rows>
void activations(const Number* gate, const Number* up, Size inner, Rows vectors, Size count, Size width,
                 const float* weights, float bound, float* gates, Number* out) {
  for (Size row = 0; row < inner; row += BLOCK) {
    const Size some = std::min(BLOCK, inner - row);
    multiply_many(gate + row * width, some, vectors, count, width,
                  [=](Size i, const float* products) { std::copy_n(products, some, gates + i * BLOCK); });
    multiply_many(up + row * width, some, vectors, count, width, [=](Size i, const float* ups) {
      float* mixed = gates + i * BLOCK;
      for (Size v = 0; v < some; v += LANES) {
        const Vector each = gated(load(mixed + v), load(ups + v), bound);
        save(mixed + v, each * weights[i]);
      }
      narrow(mixed, out + i * inner + row, some);
    });
  }
}

// The same as `mix_channels`, of some tokens of a text.
void mix_some(const Number* x, Size tokens, Size width, const Size* indices, const float* weights, Size top_k,
              const Experts& experts, float bound, Number* out) {
  const std::vector<Size> slots = by_expert(indices, tokens * top_k);
  // By slot, those of all tokens behind the chosen ones.
  std::vector<Size> token_of;
  std::vector<float> shares;
  for (const Size slot : slots) token_of.push_back(slot / top_k), shares.push_back(weights[slot]);
  for (Size token = 0; token < tokens; ++token) token_of.push_back(token), shares.push_back(1.0f);
  std::vector<const Number*> rows;
  for (const Size token : token_of) rows.push_back(x + token * width);

  const Size row_width = (width + LANES - 1) / LANES * LANES;
  const std::vector<Network> networks = networks_of(experts, indices, slots, tokens, width);
  // A token may have chosen one expert several times: then more rows than tokens go through it.
  Size most = 0, largest_inner = 0;
  for (const Network& network : networks) {
    most = std::max(most, network.count);
    largest_inner = std::max(largest_inner, network.count * network.inner);
  }
  std::vector<float> sums(tokens * row_width), gates(most * BLOCK);
  std::vector<Number> inners(largest_inner);
  for (const Network& network : networks) {
    const Size first = network.first, count = network.count, inner = network.inner;
    activations(network.gate, network.up, inner, &rows[first], count, width, &shares[first], bound, gates.data(),
                inners.data());
    for (Size row = 0; row < width; row += BLOCK) {
      const Size some = std::min(BLOCK, width - row);
      multiply_many(network.down + row * inner, some, SideBySide{inners.data(), inner}, count, inner,
                    [&](Size i, const float* products) {
                      float* to = &sums[token_of[first + i] * row_width + row];
                      for (Size v = 0; v < some; v += LANES) save(to + v, load(to + v) + load(products + v));
                    });
    }
  }
  for (Size token = 0; token < tokens; ++token) narrow(&sums[token * row_width], out + token * width, width);
}

// Chooses experts for tokens x [N, d] by router weights [E, d] -> logits fp32 [N, E], weights fp32 [N, K] and indices
// [N, K] of the chosen. `bias`: fp32 [E] or null. `table`: [V, K], which chooses by token id alone, or null.
void route(const Number* x, Size tokens, Size width, const Number* weight, const float* bias, const Size* table,
           Size vocabulary, const Size* ids, Size experts, Size top_k, Size groups, Size best_groups, Size group_top,
           Size scoring, Size normalises, double scale, float* logits, float* weights, Size* indices, Size threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * width * experts > WORTH_A_THREAD)
  for (Size first = 0; first < experts; first += ROWS)
    multiply(weight, first, std::min(first + ROWS, experts), x, tokens, width,
             [=](Size expert, Size some, Size token, const float* found) {
               std::copy_n(found, some, logits + token * experts + expert);
             });
  std::vector<float> scores(experts), biased(experts);
  for (Size token = 0; token < tokens; ++token) {
    Size* chosen = indices + token * top_k;
    score_experts(logits + token * experts, experts, scoring, scores.data());
    if (table) {
      std::copy_n(row_of(table, vocabulary, top_k, ids[token]), top_k, chosen);
      must_be_below(chosen, top_k, experts);
    } else {
      for (Size i = 0; i < experts; ++i) biased[i] = scores[i] + (bias ? bias[i] : 0.0f);
      if (groups > 1) keep_best_groups(biased.data(), experts, groups, best_groups, group_top);
      largest(experts, top_k, chosen, [&](Size i) { return biased[i]; });
    }
    float total = 0;
    for (Size i = 0; i < top_k; ++i) total += scores[chosen[i]];
    const float factor = static_cast<float>(scale) / (normalises ? total + 1e-20f : 1.0f);
    for (Size i = 0; i < top_k; ++i) weights[token * top_k + i] = scores[chosen[i]] * factor;
  }
}

// Chosen experts and one that all tokens go through, each down(silu(gate x) * up x), gate and up clamped to `limit`:
// x [N, d] -> out [N, d]. gate_up: [E, 2 I, d], down: [E, d, I]; indices and weights [N, K], K = 0 without experts;
// shared_*: as of linear maps, shared_inner = 0 without.
void mix_channels(const Number* x, Size tokens, Size width, const Size* indices, const float* weights, Size top_k,
                  Size expert_count, const Number* gate_up, const Number* down, Size inner, const Number* shared_gate,
                  const Number* shared_up, const Number* shared_down, Size shared_inner, double limit, Number* out,
                  Size threads) {
  const Experts experts = {gate_up, down, inner, shared_gate, shared_up, shared_down, shared_inner};
  const float bound = static_cast<float>(limit);
  must_be_below(indices, tokens * top_k, expert_count);
  if (tokens > MANY) {
    const Size each = std::min(TOKENS_TOGETHER, (tokens + threads - 1) / threads);
    Failure failure;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Size first = 0; first < tokens; first += each)
      failure.watch([&] {
        mix_some(x + first * width, std::min(each, tokens - first), width, indices + first * top_k,
                 weights + first * top_k, top_k, experts, bound, out + first * width);
      });
    failure.raise();
    return;
  }
  const std::vector<Size> slots = by_expert(indices, tokens * top_k);
  const std::vector<Network> networks = networks_of(experts, indices, slots, tokens, width);
  const Size chosen = slots.size(), activations = chosen * inner + tokens * shared_inner;
  std::vector<Number> inputs(chosen * width);
  for (Size i = 0; i < chosen; ++i) std::copy_n(x + slots[i] / top_k * width, width, &inputs[i * width]);
  std::vector<std::pair<const Network*, Size>> blocks;  // of rows of gate and up
  for (const Network& network : networks)
    for (Size row = 0; row < network.inner; row += ROWS) blocks.emplace_back(&network, row);

  std::vector<Number> inners(activations);
  Failure failure;
#pragma omp parallel num_threads(threads) if (activations * width * 3 > WORTH_A_THREAD)
  {
    std::vector<float> gates, ups, sums;
    failure.watch([&] {
      gates.resize(std::max(tokens * top_k, tokens) * ROWS), ups.resize(gates.size()), sums.resize(tokens * ROWS);
    });
#pragma omp for schedule(static)
    for (size_t block = 0; block < blocks.size(); ++block)
      failure.watch([&] {
        const Network& network = *blocks[block].first;
        const Size first = blocks[block].second, last = std::min(first + ROWS, network.inner), count = network.count;
        const bool routed = network.first < chosen;
        const Number* vectors = routed ? &inputs[network.first * width] : x;
        multiply(network.gate, first, last, vectors, count, width, [&](Size, Size rows, Size slot, const float* found) {
          std::copy_n(found, rows, &gates[slot * ROWS]);
        });
        multiply(network.up, first, last, vectors, count, width,
                 [&](Size, Size rows, Size slot, const float* found) { std::copy_n(found, rows, &ups[slot * ROWS]); });
        for (Size slot = 0; slot < count; ++slot) {
          const float weight = routed ? weights[slots[network.first + slot]] : 1.0f;
          float* mixed = &gates[slot * ROWS];
          for (Size i = 0; i < last - first; ++i) {
            mixed[i] = gated(mixed[i], ups[slot * ROWS + i], bound) * weight;
          }
          narrow(mixed, &inners[network.activations + slot * network.inner + first], last - first);
        }
      });
#pragma omp for schedule(static)
    for (Size first = 0; first < width; first += ROWS)
      failure.watch([&] {
        const Size last = std::min(first + ROWS, width);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (const Network& network : networks)
          multiply(network.down, first, last, &inners[network.activations], network.count, network.inner,
                   [&](Size, Size rows, Size slot, const float* found) {
                     const Size token = network.first < chosen ? slots[network.first + slot] / top_k : slot;
                     for (Size i = 0; i < rows; ++i) sums[token * ROWS + i] += found[i];
                   });
        for (Size token = 0; token < tokens; ++token)
          narrow(&sums[token * ROWS], out + token * width + first, last - first);
      });
  }
  failure.raise();
}

}  // namespace
