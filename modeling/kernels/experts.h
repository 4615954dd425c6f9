// Routing, and the networks that tokens are sent through.

#pragma once

#include "vectors.h"

namespace {

enum Scoring { SIGMOID, SOFTMAX, SQRT_SOFTPLUS };

void score_experts(const float* logits, Size experts, Size scoring, float* scores) {
  const float top = *std::max_element(logits, logits + experts);
  float total = 0;
  for (Size i = 0; i < experts; ++i) {
    const float x = logits[i];
    if (scoring == SIGMOID) scores[i] = 1.0f / (1.0f + std::exp(-x));
    if (scoring == SOFTMAX) total += scores[i] = std::exp(x - top);
    if (scoring == SQRT_SOFTPLUS) scores[i] = std::sqrt(x > 20.0f ? x : std::log1p(std::exp(x)));
  }
  for (Size i = 0; i < experts && scoring == SOFTMAX; ++i) scores[i] /= total;
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

// A gated network, and which of the slots, where tokens wait for networks, go through it.
struct Network {
  const Number *gate, *up, *down;
  Size inner;
  Size first, count;  // slots
  Size activations;   // where its inner activations [count, inner] stand
};

}  // namespace

extern "C" {

// Chooses experts for tokens x [N, d] by router weights [E, d] -> logits fp32 [N, E], weights fp32 [N, K] and indices
// [N, K] of the chosen. `bias`: fp32 [E] or null. `table`: [V, K], which chooses by token id alone, or null.
void route(const Number* x, Size tokens, Size width, const Number* weight, const float* bias, const Size* table,
           const Size* ids, Size experts, Size top_k, Size groups, Size best_groups, Size group_top, Size scoring,
           Size normalises, double scale, float* logits, float* weights, Size* indices, Size threads) {
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
      std::copy_n(table + ids[token] * top_k, top_k, chosen);
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
                  const Number* gate_up, const Number* down, Size inner, const Number* shared_gate,
                  const Number* shared_up, const Number* shared_down, Size shared_inner, double limit, Number* out,
                  Size threads) {
  // Tokens of one network side by side: its weights are then read once for all of them.
  std::vector<Size> slots(tokens * top_k);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = i;
  std::stable_sort(slots.begin(), slots.end(), [=](Size a, Size b) { return indices[a] < indices[b]; });
  std::vector<Number> inputs(slots.size() * width);
  for (size_t i = 0; i < slots.size(); ++i) std::copy_n(x + slots[i] / top_k * width, width, &inputs[i * width]);

  std::vector<Network> networks;
  const Size chosen = slots.size();
  for (Size begin = 0, end; begin < chosen; begin = end) {
    const Size expert = indices[slots[begin]];
    for (end = begin + 1; end < chosen && indices[slots[end]] == expert;) ++end;
    const Number* gate = gate_up + expert * 2 * inner * width;
    const Number* own_down = down + expert * width * inner;
    networks.push_back({gate, gate + inner * width, own_down, inner, begin, end - begin, begin * inner});
  }
  const Size activations = chosen * inner + tokens * shared_inner;
  if (shared_inner)
    networks.push_back({shared_gate, shared_up, shared_down, shared_inner, chosen, tokens, chosen * inner});
  std::vector<std::pair<const Network*, Size>> blocks;  // of rows of gate and up
  for (const Network& network : networks)
    for (Size row = 0; row < network.inner; row += ROWS) blocks.emplace_back(&network, row);

  std::vector<Number> inners(activations);
  const float bound = static_cast<float>(limit);
#pragma omp parallel num_threads(threads) if (activations * width * 3 > WORTH_A_THREAD)
  {
    std::vector<float> gates(std::max(tokens * top_k, tokens) * ROWS), ups(gates.size());
#pragma omp for schedule(static)
    for (size_t block = 0; block < blocks.size(); ++block) {
      const auto [network, first] = blocks[block];
      const Size last = std::min(first + ROWS, network->inner), count = network->count;
      const bool routed = network->first < chosen;
      const Number* vectors = routed ? &inputs[network->first * width] : x;
      multiply(network->gate, first, last, vectors, count, width,
               [&](Size, Size rows, Size slot, const float* found) { std::copy_n(found, rows, &gates[slot * ROWS]); });
      multiply(network->up, first, last, vectors, count, width,
               [&](Size, Size rows, Size slot, const float* found) { std::copy_n(found, rows, &ups[slot * ROWS]); });
      for (Size slot = 0; slot < count; ++slot) {
        const float weight = routed ? weights[slots[network->first + slot]] : 1.0f;
        float* mixed = &gates[slot * ROWS];
        for (Size i = 0; i < last - first; ++i) {
          mixed[i] = gated(mixed[i], ups[slot * ROWS + i], bound) * weight;
        }
        narrow(mixed, &inners[network->activations + slot * network->inner + first], last - first);
      }
    }
    std::vector<float> sums(tokens * ROWS);
#pragma omp for schedule(static)
    for (Size first = 0; first < width; first += ROWS) {
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
    }
  }
}

}  // extern "C"
