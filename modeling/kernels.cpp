// Decoding on a CPU, a few tokens at a time. Each function does in one pass over its weights or keys what PyTorch does
// in tens of small operations, whose dispatch takes longer than their arithmetic. `fused.py` calls them and says what
// each is equal to; `native.py` builds this file, once for every type that models are stored in:
//
//     -DNUMBER=float     fp32
//     -DNUMBER=bf16      bfloat16; read as it is, computed in fp32
//
// A token's result does not depend on the tokens beside it, nor on the number of threads: a text read one by one and a
// few at a time comes out the same to the last bit.
//
// Shapes: N tokens, B sequences of T tokens each, H heads, D and W widths of heads and keys, S keys, n residual
// streams, d the model's width. Matrices are stored as PyTorch stores those of linear maps: [out, in], row after row.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace {

struct bf16 {
  uint16_t bits;
};
using Number = NUMBER;
using Size = int64_t;

// Multiplications below which a second thread takes longer to wake than it saves.
constexpr Size WORTH_A_THREAD = 1 << 18;
constexpr Size ROWS = 16;             // of a matrix, that a thread takes at a time
constexpr Size KEYS = 64;             // that are widened and scored at a time
constexpr Size KEYS_A_TASK = 512;     // that a thread takes at a time
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

// Vectors of the compiler, which makes of them what the processor has.
constexpr Size LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Quarter __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

inline float widened(float x) { return x; }

inline float widened(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline Vector load(const float* from) {
  Vector result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline Vector load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Bits) << 16);
}

inline float widened(int8_t x) { return x; }

inline Vector load(const int8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  // By way of 16 bits: from 8 to 32 at once, GCC 12 takes the numbers one by one.
  const Shorts shorts = __builtin_convertvector(bytes, Shorts);
  return __builtin_convertvector(__builtin_convertvector(shorts, Integers), Vector);
}

inline void store(float* to, float x) { *to = x; }

// Rounds to the nearest, ties to even; what is no number stays none.
inline void store(bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

inline float sum(Vector x) {
  Quarter quarters[4];
  std::memcpy(quarters, &x, sizeof quarters);
  const Quarter all = (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
  return (all[0] + all[2]) + (all[1] + all[3]);
}

template <class X>
void widen(const X* from, float* to, Size count) {
#pragma omp simd
  for (Size i = 0; i < count; ++i) to[i] = widened(from[i]);
}

void narrow(const float* from, Number* to, Size count) {
  for (Size i = 0; i < count; ++i) store(to + i, from[i]);
}

std::vector<float> widened(const Number* from, Size count) {
  std::vector<float> result(count);
  widen(from, result.data(), count);
  return result;
}

// e^x for x <= 0, to about 2 ulp, in operations that are vectorised: 2^round(x / ln 2) times a polynomial, that of
// Cephes' expf.
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  const float whole = std::nearbyint(x * 1.44269504088896341f);
  const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  for (const float each : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    series = series * rest + each;
  series = series * rest * rest + rest + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return series * power;
}

inline float sigmoid(float x) {
  const float small = exponential(-std::fabs(x));
  return (x >= 0 ? 1.0f : small) / (1.0f + small);
}

// What is left of products from number i on, and of each two sums one.
template <Size C, class X, class Take>
inline void take_products(Vector (&sums)[2][C], const X* numbers, const float* others, Size i, Size width, Take take) {
  for (; i + LANES <= width; i += LANES) {
    const Vector each = load(numbers + i);
    for (Size c = 0; c < C; ++c) sums[0][c] += each * load(others + c * width + i);
  }
  for (Size c = 0; c < C; ++c) {
    float product = sum(sums[0][c] + sums[1][c]);
    for (Size rest = i; rest < width; ++rest) product += widened(numbers[rest]) * others[c * width + rest];
    take(c, product);
  }
}

// Calls `take(row, vector, product)` for a row of a matrix and C vectors. Every product has two sums, which hide each
// other's latency.
template <Size C, class X, class Take>
inline void products(const X* matrix, Size row, const float* vectors, Size vector, Size width, Take take) {
  const X* numbers = matrix + row * width;
  const float* others = vectors + vector * width;
  Vector sums[2][C] = {};
  Size i = 0;
  for (; i + 2 * LANES <= width; i += 2 * LANES)
    for (Size half = 0; half < 2; ++half) {
      const Size at = i + half * LANES;
      const Vector each = load(numbers + at);
      for (Size c = 0; c < C; ++c) sums[half][c] += each * load(others + c * width + at);
    }
  take_products(sums, numbers, others, i, width, [&](Size c, float product) { take(row, vector + c, product); });
}

// Int8 rows are read as 32-bit integers, of which every fourth number of a row is taken by two shifts: faster than
// widening them one after the other. Vectors are given in that order (`spread`).
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of four numbers is taken from the lowest byte");

template <Size C, class Take>
inline void products(const int8_t* matrix, Size row, const float* vectors, Size vector, Size width, Take take) {
  const int8_t* numbers = matrix + row * width;
  const float* others = vectors + vector * width;
  Vector sums[2][C] = {};
  Size i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    Integers fours;
    std::memcpy(&fours, numbers + i, sizeof fours);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const Vector each = __builtin_convertvector(fours << (24 - 8 * quarter) >> 24, Vector);
      for (Size c = 0; c < C; ++c) sums[quarter % 2][c] += each * load(others + c * width + i + quarter * LANES);
    }
  }
  take_products(sums, numbers, others, i, width, [&](Size c, float product) { take(row, vector + c, product); });
}

// Where the number i of a vector stands that is multiplied by int8 rows: first those that are lowest bytes, and so on.
inline Size place(Size i, Size width) {
  const Size block = i / (4 * LANES) * 4 * LANES;
  return block + 4 * LANES > width ? i : block + i % 4 * LANES + (i - block) / 4;
}

std::vector<float> spread(const Number* from, Size count, Size width) {
  std::vector<float> result(count * width);
  for (Size row = 0; row < count; ++row, from += width)
    for (Size i = 0; i < width; ++i) result[row * width + place(i, width)] = widened(from[i]);
  return result;
}

// The same for rows `first` to `last` and `count` vectors. Rows are read in the order of memory, and each of them once.
template <class X, class Take>
inline void multiply(const X* matrix, Size first, Size last, const float* vectors, Size count, Size width, Take take) {
  for (Size row = first; row < last; ++row) {
    Size vector = 0;
    for (; vector + 4 <= count; vector += 4) products<4>(matrix, row, vectors, vector, width, take);
    for (; vector + 2 <= count; vector += 2) products<2>(matrix, row, vectors, vector, width, take);
    if (vector < count) products<1>(matrix, row, vectors, vector, width, take);
  }
}

// values += sum over `count` rows of weight * row.
template <class X>
inline void add_weighted(const X* rows, const float* weights, Size count, Size stride, Size width, float* values) {
  Size i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    Vector sums[4];
    for (Size v = 0; v < 4; ++v) sums[v] = load(values + i + v * LANES);
    for (Size row = 0; row < count; ++row)
      for (Size v = 0; v < 4; ++v) sums[v] += weights[row] * load(rows + row * stride + i + v * LANES);
    std::memcpy(values + i, sums, sizeof sums);
  }
  for (; i + LANES <= width; i += LANES) {
    Vector each = load(values + i);
    for (Size row = 0; row < count; ++row) each += weights[row] * load(rows + row * stride + i);
    std::memcpy(values + i, &each, sizeof each);
  }
  for (; i < width; ++i)
    for (Size row = 0; row < count; ++row) values[i] += weights[row] * widened(rows[row * stride + i]);
}

inline Quarter load_quarter(const float* from) {
  Quarter result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

// Puts KEYS rows [KEYS, D] into columns [D, KEYS], four by four.
void put_into_columns(const float* rows, Size width, float* columns) {
  Size first = 0;
  for (; first + 4 <= width; first += 4)
    for (Size key = 0; key < KEYS; key += 4) {
      const float* from = rows + key * width + first;
      const Quarter a = load_quarter(from), b = load_quarter(from + width);
      const Quarter c = load_quarter(from + 2 * width), d = load_quarter(from + 3 * width);
      const Quarter ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Quarter ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const Quarter turned[] = {
          __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
          __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5), __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7)};
      for (Size i = 0; i < 4; ++i) std::memcpy(columns + (first + i) * KEYS + key, &turned[i], sizeof turned[i]);
    }
  for (; first < width; ++first)
    for (Size key = 0; key < KEYS; ++key) columns[first * KEYS + key] = rows[key * width + first];
}

// scores += sum_j w_j relu(q_j k) for KEYS keys in columns and H queries [H, D] with their weights [H]. No sum is taken
// across a vector, of which there would be one for every key and head.
template <Size H>
inline void add_scores(const float* columns, const float* queries, const float* weights, Size width, float* scores) {
  constexpr Size VECTORS = KEYS / LANES;
  Vector products[H][VECTORS] = {};
  for (Size i = 0; i < width; ++i)
    for (Size v = 0; v < VECTORS; ++v) {
      const Vector column = load(columns + i * KEYS + v * LANES);
      for (Size head = 0; head < H; ++head) products[head][v] += queries[head * width + i] * column;
    }
  for (Size v = 0; v < VECTORS; ++v) {
    Vector total = load(scores + v * LANES);
    for (Size head = 0; head < H; ++head)
      total += weights[head] * (products[head][v] > 0.0f ? products[head][v] : Vector{});
    std::memcpy(scores + v * LANES, &total, sizeof total);
  }
}

float inverse_rms(const float* x, Size width, float eps) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (Size i = 0; i < width; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / width + eps);
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

// The `count` largest of the candidates' values, by index, the largest first; of equal ones the first.
template <class Value>
void largest(Size candidates, Size count, Size* out, Value value) {
  std::vector<Size> order(candidates);
  for (Size i = 0; i < candidates; ++i) order[i] = i;
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [&](Size a, Size b) { return value(a) != value(b) ? value(a) > value(b) : a < b; });
  std::copy(order.begin(), order.begin() + count, out);
}

// Which rows of a cache [B, C, W] are read.
struct Keys {
  const Number* cache;
  Size batch_stride, width, value_width;
  Size count;            // S
  const Size* chosen;    // [B, T, S] rows of a sequence, or null: the first S
  const uint8_t* seen;   // bytes [B, T, S], 0 where a query does not see a key, or null: it sees all
  Size seen_batch, seen_query;  // strides of `seen`
};

// What a query of a head has seen so far: the largest score, the sum of weights, the weighted values.
struct Partial {
  float largest = HIDDEN, weights = 0;
  float* values = nullptr;
};

// Lets queries `from` to `to` of the T H of sequence `b` see keys `first` to `last`. `wide` has room for KEYS keys.
void see_keys(const Keys& keys, Size b, Size first, Size last, const float* queries, Size from, Size to, Size tokens,
              Size heads, float scale, Partial* partials, float* wide) {
  std::vector<float> room((to - from) * KEYS);
  float* scores = room.data();
  const Number* rows = keys.cache + b * keys.batch_stride;
  for (Size start = first; start < last; start += KEYS) {
    const Size count = std::min(KEYS, last - start);
    if (keys.chosen) {
      const Size *chosen = keys.chosen + (b * tokens + from / heads) * keys.count + start, width = keys.width;
      for (Size key = 0; key < count; ++key) widen(rows + chosen[key] * width, wide + key * width, width);
    } else {
      widen(rows + start * keys.width, wide, count * keys.width);
    }
    multiply(wide, 0, count, queries + from * keys.width, to - from, keys.width,
             [=](Size key, Size query, float score) { scores[query * KEYS + key] = score * scale; });
    for (Size query = from; query < to; ++query) {
      Partial& partial = partials[query];
      float *score = scores + (query - from) * KEYS, top = partial.largest;
      if (keys.seen) {
        const uint8_t* seen = keys.seen + b * keys.seen_batch + query / heads * keys.seen_query + start;
        for (Size key = 0; key < count; ++key) score[key] = seen[key] ? score[key] : HIDDEN;
      }
#pragma omp simd reduction(max : top)
      for (Size key = 0; key < count; ++key) top = std::max(top, score[key]);
      if (top == HIDDEN) continue;
      if (top > partial.largest) {
        const float shrunk = exponential(partial.largest - top);  // about 0 where there was none: so are the sums
        partial.weights *= shrunk;
        for (Size i = 0; i < keys.value_width; ++i) partial.values[i] *= shrunk;
        partial.largest = top;
      }
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (Size key = 0; key < count; ++key) {
        score[key] = score[key] == HIDDEN ? 0.0f : exponential(score[key] - top);
        total += score[key];
      }
      partial.weights += total;
      add_weighted(wide, score, count, keys.width, keys.value_width, partial.values);
    }
  }
}

// softmax(scale q k, sink) v for queries [B, T, H, W] -> out [B, T, H, value_width], both fp32; sinks: [H] or null.
void attend(const float* queries, const Keys& keys, Size batch, Size tokens, Size heads, float scale,
            const Number* sinks, float* out, Size threads) {
  const Size group = tokens * heads, values = keys.value_width;
  // Queries with keys of their own see them alone, others together.
  const Size alone = keys.chosen ? tokens : 1, each = group / alone;
  const Size parts = (keys.count + KEYS_A_TASK - 1) / KEYS_A_TASK;
  std::vector<float> sums(parts * batch * group * values);
  std::vector<Partial> partials(parts * batch * group);
  for (size_t i = 0; i < partials.size(); ++i) partials[i].values = &sums[i * values];
  const Size tasks = batch * parts * alone;
#pragma omp parallel num_threads(threads) if (tasks > 1 && batch * group * keys.count * keys.width > WORTH_A_THREAD)
  {
    std::vector<float> wide(KEYS * keys.width);
#pragma omp for schedule(dynamic)
    for (Size task = 0; task < tasks; ++task) {
      const Size b = task / (parts * alone), part = task / alone % parts, from = task % alone * each;
      const Size first = part * KEYS_A_TASK, last = std::min(first + KEYS_A_TASK, keys.count);
      see_keys(keys, b, first, last, queries + b * group * keys.width, from, from + each, tokens, heads, scale,
               &partials[(part * batch + b) * group], wide.data());
    }
  }
  for (Size row = 0; row < batch * group; ++row) {
    const float sink = sinks ? widened(sinks[row % heads]) : HIDDEN;
    float top = sink, weights = 0;
    for (Size part = 0; part < parts; ++part) top = std::max(top, partials[part * batch * group + row].largest);
    if (sinks) weights = exponential(sink - top);
    float* to = out + row * values;
    std::fill(to, to + values, 0.0f);
    for (Size part = 0; part < parts; ++part) {
      const Partial& partial = partials[part * batch * group + row];
      if (partial.largest == HIDDEN) continue;
      const float share = exponential(partial.largest - top);
      weights += share * partial.weights;
      for (Size i = 0; i < values; ++i) to[i] += share * partial.values[i];
    }
    // A query that sees nothing, in padding, gets 0.
    for (Size i = 0; i < values && weights > 0; ++i) to[i] /= weights;
  }
}

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

// A gated network that a token goes through, and the weight of what comes out.
struct Network {
  const Number *gate, *up, *down;
  Size token, inner;
  Size first;  // where its inner activations stand
  float weight;
};

// n x n logits -> what Sinkhorn's steps make of their softmax, followed by their divisors alone (`sinkhorn` in
// hyper_connections.py).
void sinkhorn(float* matrix, Size n, Size iterations, float eps, float* out) {
  for (Size i = 0; i < n; ++i) {
    float *row = matrix + i * n, total = 0;
    const float top = *std::max_element(row, row + n);
    for (Size j = 0; j < n; ++j) total += row[j] = exponential(row[j] - top);
    for (Size j = 0; j < n; ++j) row[j] = row[j] / total + eps;
  }
  std::vector<float> rows(n, 1.0f), columns(n, 1.0f);
  for (Size step = 0; step < iterations; ++step) {
    for (Size i = 0; i < n && step > 0; ++i) {
      float divisor = eps * rows[i];
      for (Size j = 0; j < n; ++j) divisor += matrix[i * n + j] / columns[j];
      rows[i] = divisor;
    }
    for (Size j = 0; j < n; ++j) {
      float divisor = eps * columns[j];
      for (Size i = 0; i < n; ++i) divisor += matrix[i * n + j] / rows[i];
      columns[j] = divisor;
    }
  }
  for (Size i = 0; i < n; ++i)
    for (Size j = 0; j < n; ++j) out[i * n + j] = matrix[i * n + j] / (rows[i] * columns[j]);
}

}  // namespace

extern "C" {

// Up to four linear maps of the same tokens x [N, d]: weights [n_i, d] -> outputs [N, n_i]; n_i is 0 where there is no
// map.
void project(const Number* x, Size tokens, Size width, const Number* w0, Number* out0, Size n0, const Number* w1,
             Number* out1, Size n1, const Number* w2, Number* out2, Size n2, const Number* w3, Number* out3, Size n3,
             Size threads) {
  const Number* weights[] = {w0, w1, w2, w3};
  Number* outputs[] = {out0, out1, out2, out3};
  const Size counts[] = {n0, n1, n2, n3};
  const std::vector<float> wide = widened(x, tokens * width);
  Size blocks = 0, rows = n0 + n1 + n2 + n3;
  for (const Size count : counts) blocks += (count + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * width * rows > WORTH_A_THREAD)
  for (Size block = 0; block < blocks; ++block) {
    Size map = 0, first = block * ROWS;
    for (; first >= counts[map]; ++map) first -= (counts[map] + ROWS - 1) / ROWS * ROWS;
    const Size count = counts[map];
    Number* out = outputs[map];
    multiply(weights[map], first, std::min(first + ROWS, count), wide.data(), tokens, width,
             [=](Size row, Size token, float product) { store(out + token * count + row, product); });
  }
}

// A linear map per group: x [N, G, in] and weight [G, out, in] -> out [N, G, out].
void project_groups(const Number* x, Size tokens, Size groups, Size width, const Number* weight, Size count,
                    Number* out, Size threads) {
  const std::vector<float> wide = widened(x, tokens * groups * width);
  const Size blocks = (count + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * groups * width * count > WORTH_A_THREAD)
  for (Size block = 0; block < groups * blocks; ++block) {
    const Size group = block / blocks, first = block % blocks * ROWS;
    for (Size token = 0; token < tokens; ++token) {
      const Size at = token * groups + group;
      multiply(weight + group * count * width, first, std::min(first + ROWS, count), &wide[at * width], 1, width,
               [=](Size row, Size, float product) { store(out + at * count + row, product); });
    }
  }
}

// RMSNorm of the first `norm_width` numbers of every head (0: of none; `norm`: its weight or null), then a rotation of
// `rotary` numbers from `first` on: x [N, H, D] -> out. Angles: cos, sin [P, rotary / 2], token i at row i mod P.
void norm_rotate(const Number* x, Number* out, Size tokens, Size heads, Size width, const Number* norm, Size norm_width,
                 double eps, const Number* cos, const Number* sin, Size positions, Size rotary, Size first,
                 Size interleaved, double sign) {
  std::vector<float> wide(width);
  const Size pairs = rotary / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
  for (Size row = 0; row < tokens * heads; ++row, x += width, out += width) {
    widen(x, wide.data(), width);
    if (norm_width) {
      const float scale = inverse_rms(wide.data(), norm_width, static_cast<float>(eps));
      for (Size i = 0; i < norm_width; ++i) wide[i] *= norm ? scale * widened(norm[i]) : scale;
    }
    for (Size pair = 0; pair < pairs; ++pair) {
      const Size angle = row / heads % positions * pairs + pair, one = first + pair * step, other = one + apart;
      const float c = widened(cos[angle]), s = widened(sin[angle]) * static_cast<float>(sign);
      const float turned = wide[one] * c - wide[other] * s;
      wide[other] = wide[other] * c + wide[one] * s;
      wide[one] = turned;
    }
    narrow(wide.data(), out, width);
  }
}

// MLA on its latents: queries [B, T, H, D + P] and kv_b [H, D + D_v, R] -> out [B, T, H, D_v]. W_UK goes into the
// queries, W_UV comes behind the attention. Keys: see `Keys`; their width is R + P, that of values R.
void attend_latents(const Number* queries, const Number* cache, Size batch_stride, Size width, Size rank, Size count,
                    const Size* chosen, const uint8_t* seen, Size seen_batch, Size seen_query, const Number* kv_b,
                    Size nope, Size value_width, Size batch, Size tokens, Size heads, double scale, Number* out,
                    Size threads) {
  const Keys keys = {cache, batch_stride, width, rank, count, chosen, seen, seen_batch, seen_query};
  const Size rotary = width - rank, rows = batch * tokens * heads;
  const std::vector<float> wide = widened(queries, rows * (nope + rotary));
  std::vector<float> absorbed(rows * width), mixed(rows * rank);
  const bool many = rows * rank * nope > WORTH_A_THREAD;
#pragma omp parallel for schedule(static) num_threads(threads) if (many)
  for (Size row = 0; row < rows; ++row) {
    const float* query = &wide[row * (nope + rotary)];
    float* to = &absorbed[row * width];
    add_weighted(kv_b + row % heads * (nope + value_width) * rank, query, nope, rank, rank, to);
    std::copy(query + nope, query + nope + rotary, to + rank);
  }
  attend(absorbed.data(), keys, batch, tokens, heads, static_cast<float>(scale), nullptr, mixed.data(), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (many)
  for (Size row = 0; row < rows; ++row) {
    const Number* w_uv = kv_b + (row % heads * (nope + value_width) + nope) * rank;
    multiply(w_uv, 0, value_width, &mixed[row * rank], 1, rank,
             [=](Size i, Size, float product) { store(out + row * value_width + i, product); });
  }
}

// Attention of all heads to one key per token, which is its value too: queries [B, T, H, W] -> out [B, T, H, W].
void attend_shared(const Number* queries, const Number* cache, Size batch_stride, Size width, Size count,
                   const uint8_t* seen, Size seen_batch, Size seen_query, Size batch, Size tokens, Size heads,
                   double scale, const Number* sinks, Number* out, Size threads) {
  const Keys keys = {cache, batch_stride, width, width, count, nullptr, seen, seen_batch, seen_query};
  const std::vector<float> wide = widened(queries, batch * tokens * heads * width);
  std::vector<float> mixed(wide.size());
  attend(wide.data(), keys, batch, tokens, heads, static_cast<float>(scale), sinks, mixed.data(), threads);
  narrow(mixed.data(), out, mixed.size());
}

// The keys that an indexer chooses, those that a query does not see last, by sum_j w_j relu(q_j k): queries
// [B, T, J, D], keys [B, S, D], seen as in `Keys`; w = weight x / sqrt(J D) of tokens x [B, T, d] and weight [J, d] ->
// the K best of S, out [B, T, K], and which of them the query sees, bytes [B, T, K].
void choose_keys(const Number* queries, const Number* cache, Size batch_stride, const Number* x, const Number* weight,
                 Size model_width, const uint8_t* seen, Size seen_batch, Size seen_query, Size batch, Size tokens,
                 Size heads, Size width, Size count, Size top_k, Size* out, uint8_t* out_seen, Size threads) {
  const std::vector<float> wide = widened(queries, batch * tokens * heads * width);
  std::vector<float> weights(batch * tokens * heads), scores(batch * tokens * count);
  const float scale = 1.0f / std::sqrt(static_cast<float>(heads * width));
  multiply(weight, 0, heads, widened(x, batch * tokens * model_width).data(), batch * tokens, model_width,
           [&](Size head, Size token, float product) { weights[token * heads + head] = product * scale; });
  const Size parts = (count + KEYS_A_TASK - 1) / KEYS_A_TASK;
#pragma omp parallel num_threads(threads) if (batch * tokens * heads * width * count > WORTH_A_THREAD)
  {
    std::vector<float> keys(KEYS * width), columns(width * KEYS);
#pragma omp for schedule(dynamic)
    for (Size task = 0; task < batch * parts; ++task) {
      const Size b = task / parts, begin = task % parts * KEYS_A_TASK, end = std::min(begin + KEYS_A_TASK, count);
      for (Size start = begin; start < end; start += KEYS) {
        const Size some = std::min(KEYS, end - start);
        widen(cache + b * batch_stride + start * width, keys.data(), some * width);
        put_into_columns(keys.data(), width, columns.data());
        for (Size row = b * tokens; row < (b + 1) * tokens; ++row) {
          float found[KEYS] = {};
          const float *query = &wide[row * heads * width], *weight_of = &weights[row * heads];
          Size head = 0;
          for (; head + 2 <= heads; head += 2)
            add_scores<2>(columns.data(), query + head * width, weight_of + head, width, found);
          if (head < heads) add_scores<1>(columns.data(), query + head * width, weight_of + head, width, found);
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

// Chooses experts for tokens x [N, d] by router weights [E, d] -> logits fp32 [N, E], weights fp32 [N, K] and indices
// [N, K] of the chosen. `bias`: fp32 [E] or null. `table`: [V, K], which chooses by token id alone, or null.
void route(const Number* x, Size tokens, Size width, const Number* weight, const float* bias, const Size* table,
           const Size* ids, Size experts, Size top_k, Size groups, Size best_groups, Size group_top, Size scoring,
           Size normalises, double scale, float* logits, float* weights, Size* indices, Size threads) {
  const std::vector<float> wide = widened(x, tokens * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * width * experts > WORTH_A_THREAD)
  for (Size first = 0; first < experts; first += ROWS)
    multiply(weight, first, std::min(first + ROWS, experts), wide.data(), tokens, width,
             [=](Size expert, Size token, float product) { logits[token * experts + expert] = product; });
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
  std::vector<Network> networks;
  Size activations = 0;
  for (Size token = 0; token < tokens; ++token) {
    for (Size slot = token * top_k; slot < (token + 1) * top_k; ++slot, activations += inner) {
      const Number* gate = gate_up + indices[slot] * 2 * inner * width;
      const Number* own_down = down + indices[slot] * width * inner;
      networks.push_back({gate, gate + inner * width, own_down, token, inner, activations, weights[slot]});
    }
    if (shared_inner)
      networks.push_back({shared_gate, shared_up, shared_down, token, shared_inner, activations, 1.0f});
    activations += shared_inner;
  }
  // Tokens of one network side by side: its weights are then read from memory once.
  std::stable_sort(networks.begin(), networks.end(),
                   [](const Network& a, const Network& b) { return a.gate < b.gate; });
  std::vector<std::pair<const Network*, Size>> blocks;  // of inner activations
  for (const Network& network : networks)
    for (Size row = 0; row < network.inner; row += ROWS) blocks.emplace_back(&network, row);

  const std::vector<float> wide = widened(x, tokens * width);
  std::vector<float> inners(activations);
  const float bound = static_cast<float>(limit);
#pragma omp parallel num_threads(threads) if (activations * width * 3 > WORTH_A_THREAD)
  {
#pragma omp for schedule(static)
    for (size_t block = 0; block < blocks.size(); ++block) {
      const auto [network, first] = blocks[block];
      const Size last = std::min(first + ROWS, network->inner), begin = first;
      const float* token = &wide[network->token * width];
      float gates[ROWS], ups[ROWS];
      multiply(network->gate, first, last, token, 1, width, [&](Size i, Size, float x) { gates[i - begin] = x; });
      multiply(network->up, first, last, token, 1, width, [&](Size i, Size, float x) { ups[i - begin] = x; });
      for (Size i = 0; i < last - first; ++i) {
        const float gate = std::min(gates[i], bound), up = std::clamp(ups[i], -bound, bound);
        inners[network->first + first + i] = gate * sigmoid(gate) * up * network->weight;
      }
    }
    std::vector<float> sums(tokens * ROWS);
#pragma omp for schedule(static)
    for (Size first = 0; first < width; first += ROWS) {
      const Size last = std::min(first + ROWS, width);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (const Network& network : networks)
        multiply(network.down, first, last, &inners[network.first], 1, network.inner,
                 [&](Size i, Size, float product) { sums[network.token * ROWS + i - first] += product; });
      for (Size token = 0; token < tokens; ++token)
        narrow(&sums[token * ROWS], out + token * width + first, last - first);
    }
  }
}

// What a sub-layer reads from n residual streams [N, n, d], and by which weights it will write to them
// (`HyperConnection`): fn [(2 + n) n, n d], base [(2 + n) n], scale [3] -> out [N, d], post fp32 [N, n], residual fp32
// [N, n, n].
void read_streams(const Number* streams, Size tokens, Size n, Size width, const Number* fn, const Number* base,
                  const Number* scale, double norm_eps, double eps, Size iterations, Number* out, float* post,
                  float* residual, Size threads) {
  const Size maps = (2 + n) * n, whole = n * width;
  const std::vector<float> wide = widened(streams, tokens * whole);
  std::vector<float> logits(tokens * maps), pre(n), own(width);
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * maps * whole > WORTH_A_THREAD)
  for (Size first = 0; first < maps; first += n)
    multiply(fn, first, first + n, wide.data(), tokens, whole,
             [&](Size i, Size token, float product) { logits[token * maps + i] = product; });
  for (Size token = 0; token < tokens; ++token) {
    const float *x = &wide[token * whole], shrink = inverse_rms(x, whole, static_cast<float>(norm_eps));
    float* mixing = &logits[token * maps];
    for (Size i = 0; i < maps; ++i)
      mixing[i] = widened(base[i]) + mixing[i] * shrink * widened(scale[i < n ? 0 : i < 2 * n ? 1 : 2]);
    for (Size i = 0; i < n; ++i) {
      pre[i] = sigmoid(mixing[i]) + static_cast<float>(eps);
      post[token * n + i] = 2 * sigmoid(mixing[n + i]);
    }
    sinkhorn(mixing + 2 * n, n, iterations, static_cast<float>(eps), residual + token * n * n);
    std::fill(own.begin(), own.end(), 0.0f);
    add_weighted(x, pre.data(), n, width, width, own.data());
    narrow(own.data(), out + token * width, width);
  }
}

// X'_k = post_k y + sum_j M_jk X_j: streams [N, n, d], output [N, d] and what `read_streams` kept -> out [N, n, d].
void write_streams(const Number* streams, const Number* output, const float* post, const float* residual, Size tokens,
                   Size n, Size width, Number* out) {
  std::vector<float> weights(n), mixed(width);
  for (Size token = 0; token < tokens; ++token, streams += n * width, output += width, residual += n * n, post += n)
    for (Size k = 0; k < n; ++k, out += width) {
      for (Size j = 0; j < n; ++j) weights[j] = residual[j * n + k];
      for (Size i = 0; i < width; ++i) mixed[i] = post[k] * widened(output[i]);
      add_weighted(streams, weights.data(), n, width, width, mixed.data());
      narrow(mixed.data(), out, width);
    }
}

// A linear map per group, its weight in int8 with a scale per row: x [N, G, in], weight [G, out, in], scales [G, out]
// -> out [N, G, out].
void project_int8(const Number* x, Size tokens, Size groups, Size width, const int8_t* weight, const float* scales,
                  Size count, Number* out, Size threads) {
  const std::vector<float> wide = spread(x, tokens * groups, width);
  const Size blocks = (count + ROWS - 1) / ROWS, alone = groups > 1 ? tokens : 1, together = tokens / alone;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * groups * width * count > WORTH_A_THREAD)
  for (Size block = 0; block < groups * blocks; ++block) {
    const Size group = block / blocks, first = block % blocks * ROWS, begin = group * count;
    for (Size some = 0; some < alone; ++some) {
      const Size at = some * groups + group;
      multiply(weight + begin * width, first, std::min(first + ROWS, count), &wide[at * width], together, width,
               [=](Size row, Size token, float product) {
                 store(out + (at + token) * count + row, product * scales[begin + row]);
               });
    }
  }
}

// `mix_channels` of chosen experts in int8, with a scale per row: gate_up [E, 2 I, d], down [E, d, I].
void mix_int8(const Number* x, Size tokens, Size width, const Size* indices, const float* weights, Size top_k,
              const int8_t* gate_up, const float* gate_up_scales, const int8_t* down, const float* down_scales,
              Size inner, double limit, Number* out, Size threads) {
  // Tokens of one expert side by side: its weights are then read from memory once.
  std::vector<Size> slots(tokens * top_k);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = i;
  std::stable_sort(slots.begin(), slots.end(), [=](Size a, Size b) { return indices[a] < indices[b]; });
  const std::vector<float> wide = spread(x, tokens, width);
  std::vector<float> inners(slots.size() * inner);
  const Size blocks = (inner + ROWS - 1) / ROWS, tasks = slots.size() * blocks;
  const float bound = static_cast<float>(limit);
#pragma omp parallel num_threads(threads) if (slots.size() * inner * width * 3 > WORTH_A_THREAD)
  {
#pragma omp for schedule(static)
    for (Size task = 0; task < tasks; ++task) {
      const Size slot = slots[task / blocks], gate = indices[slot] * 2 * inner, up = gate + inner;
      const Size first = task % blocks * ROWS, last = std::min(first + ROWS, inner);
      const float* token = &wide[slot / top_k * width];
      float gates[ROWS], ups[ROWS];
      multiply(gate_up + gate * width, first, last, token, 1, width,
               [&](Size i, Size, float product) { gates[i - first] = product * gate_up_scales[gate + i]; });
      multiply(gate_up + up * width, first, last, token, 1, width,
               [&](Size i, Size, float product) { ups[i - first] = product * gate_up_scales[up + i]; });
      for (Size i = 0; i < last - first; ++i) {
        const float g = std::min(gates[i], bound), u = std::clamp(ups[i], -bound, bound);
        inners[slot * inner + place(first + i, inner)] = g * sigmoid(g) * u * weights[slot];
      }
    }
    std::vector<float> sums(tokens * ROWS);
#pragma omp for schedule(static)
    for (Size first = 0; first < width; first += ROWS) {
      const Size last = std::min(first + ROWS, width);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (const Size slot : slots) {
        const Size begin = indices[slot] * width;
        float* sum = &sums[slot / top_k * ROWS];
        multiply(down + begin * inner, first, last, &inners[slot * inner], 1, inner,
                 [=](Size i, Size, float product) { sum[i - first] += product * down_scales[begin + i]; });
      }
      for (Size token = 0; token < tokens; ++token)
        narrow(&sums[token * ROWS], out + token * width + first, last - first);
    }
  }
}

}  // extern "C"
