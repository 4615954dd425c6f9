// Numbers, vectors of them, and the products that everything else is made of.
//
// Weights, keys and activations are read in words of 32 bits: one number of fp32, or two of bf16 side by side, whose
// products are taken and summed in fp32 by one instruction where the processor has it. A row of fp32 and a row of bf16
// are then read by the same code.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "failures.h"

namespace {

struct bf16 {
  uint16_t bits;
};
using Number = NUMBER;
using Size = int64_t;

// Multiplications below which a second thread takes longer to wake than it saves.
constexpr Size WORTH_A_THREAD = 1 << 18;
constexpr Size ROWS = 16;  // of a matrix, that are multiplied at a time
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

// Vectors of the compiler, which makes of them what the processor has.
constexpr Size LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(4 * LANES)));

constexpr Size A_WORD = sizeof(float) / sizeof(Number);  // numbers in one
constexpr Size A_VECTOR = LANES * A_WORD;                // numbers in LANES words

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline Words bits_of(Vector x) { return reinterpret_cast<Words>(x); }
inline Vector from_bits(Words bits) { return reinterpret_cast<Vector>(bits); }

inline float widened(float x) { return x; }
inline float widened(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline void store(float* to, float x) { *to = x; }

// Rounds to the nearest, ties to even; what is no number stays none.
inline void store(bf16* to, float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

template <class To = Vector, class X>
inline To load(const X* from) {
  To result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

template <class X, class Y>
inline void save(X* to, Y from) {
  std::memcpy(static_cast<void*>(to), &from, sizeof from);
}

template <class X>
void widen(const X* from, float* to, Size count) {
#pragma omp simd
  for (Size i = 0; i < count; ++i) to[i] = widened(from[i]);
}

void narrow(const float* from, Number* to, Size count) {
  Size i = 0;
#ifdef __AVX512BF16__
  for (; A_WORD == 2 && i + A_VECTOR <= count; i += A_VECTOR) {
    const auto both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + LANES), _mm512_loadu_ps(from + i));
    std::memcpy(static_cast<void*>(to + i), &both, sizeof both);
  }
#endif
#pragma omp simd
  for (Size rest = i; rest < count; ++rest) store(to + rest, from[rest]);
}

// Two vectors side by side.
inline void narrow(Vector one, Vector next, float* to) {
  save(to, one);
  save(to + LANES, next);
}

inline void narrow(Vector one, Vector next, bf16* to) {
#ifdef __AVX512BF16__
  save(to, _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(next), reinterpret_cast<__m512>(one)));
#else
  for (Size i = 0; i < LANES; ++i) store(to + i, one[i]), store(to + LANES + i, next[i]);
#endif
}

// Memory for numbers that are written before they are read: a vector would first fill it with zeros.
struct Unwritten : std::allocator<Number> {
  template <class>
  struct rebind {
    using other = Unwritten;
  };
  void construct(Number*) {}
};
using Numbers = std::vector<Number, Unwritten>;

Numbers narrowed(const std::vector<float>& from) {
  Numbers result(from.size());
  narrow(from.data(), result.data(), from.size());
  return result;
}

// Words of the last numbers of a row, zeros behind them.
inline Words load_some(const Number* from, Size count) {
#ifdef __AVX512BW__
  return reinterpret_cast<Words>(_mm512_maskz_loadu_epi8((uint64_t{1} << count * sizeof(Number)) - 1, from));
#else
  Words result = {};
  std::memcpy(&result, from, count * sizeof(Number));
  return result;
#endif
}

// The same word in all lanes; of its numbers those that there are, zeros behind them.
inline Words spread(const Number* from, Size count = A_WORD) {
  uint32_t word = 0;
  if (count >= A_WORD)
    std::memcpy(&word, from, sizeof word);
  else
    std::memcpy(&word, from, sizeof(Number));
  return Words{} + word;
}

// sums + the products of two words' numbers, lane by lane.
inline Vector add_products(Vector sums, Words a, Words b, float) {
  return sums + reinterpret_cast<Vector>(a) * reinterpret_cast<Vector>(b);
}

inline Vector add_products(Vector sums, Words a, Words b, bf16) {
#ifdef __AVX512BF16__
  return reinterpret_cast<Vector>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  sums += reinterpret_cast<Vector>(a << 16) * reinterpret_cast<Vector>(b << 16);
  return sums + reinterpret_cast<Vector>(a >> 16 << 16) * reinterpret_cast<Vector>(b >> 16 << 16);
#endif
}

inline Vector add_products(Vector sums, Words a, Words b) { return add_products(sums, a, b, Number{}); }

// Numbers 2 i and 2 i + 1 of every four lanes of a and b that belong together, in turns.
template <class V>
inline V words_in_turns(V a, V b, bool last) {
  return last ? __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
              : __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}

template <class V>
inline V pairs_in_turns(V a, V b, bool last) {
  return last ? __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
              : __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}

// Two quarters of a and the same two of b: the first or the last, the even or the odd.
template <class V>
inline V halves_of(V a, V b, bool last) {
  return last ? __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
              : __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
}

template <class V>
inline V quarters_of(V a, V b, bool odd) {
  return odd ? __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
             : __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}

// Steps of `sums_of`: a and b, what is to be added of each halved.
inline Vector halved(Vector a, Vector b) { return words_in_turns(a, b, false) + words_in_turns(a, b, true); }
inline Vector quartered(Vector a, Vector b) { return pairs_in_turns(a, b, false) + pairs_in_turns(a, b, true); }
inline Vector lanes_joined(Vector a, Vector b) { return quarters_of(a, b, false) + quarters_of(a, b, true); }

// One number of all lanes, by a function of two.
template <class Both>
inline float folded(Vector x, Both both) {
  x = both(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = both(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = both(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = both(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return x[0];
}

// a > b ? a : b and a < b ? a : b, of what is no number b: one instruction, of which compilers make two.
inline Vector larger(Vector a, Vector b) {
#ifdef __AVX512BW__
  return reinterpret_cast<Vector>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}

inline Vector smaller(Vector a, Vector b) {
#ifdef __AVX512BW__
  return reinterpret_cast<Vector>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return a < b ? a : b;
#endif
}

inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }

inline float largest_of(Vector x) {
  return folded(x, [](Vector a, Vector b) { return larger(a, b); });
}
inline float sum_of(Vector x) {
  return folded(x, [](Vector a, Vector b) { return a + b; });
}

// Whether any lane is larger than a number.
inline bool any_above(Vector x, float bound) {
#ifdef __AVX512BW__
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#else
  return largest_of(x) > bound;
#endif
}

// A bit for every lane that is not below a number.
inline uint32_t lanes_from(Vector x, float bound) {
#ifdef __AVX512BW__
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(bound), _CMP_GE_OQ);
#else
  uint32_t lanes = 0;
  for (Size i = 0; i < LANES; ++i) lanes |= static_cast<uint32_t>(x[i] >= bound) << i;
  return lanes;
#endif
}

// The sums of 16 vectors, each over its lanes, in one vector: four steps, each of which halves what is to be added.
inline Vector sums_of(const Vector (&each)[LANES]) {
  Vector quarters[4];
  for (Size i = 0; i < 4; ++i)
    quarters[i] = quartered(halved(each[4 * i], each[4 * i + 1]), halved(each[4 * i + 2], each[4 * i + 3]));
  return lanes_joined(lanes_joined(quarters[0], quarters[1]), lanes_joined(quarters[2], quarters[3]));
}

// Where the rows of a matrix stand: side by side, or anywhere.
struct SideBySide {
  const Number* first;
  Size width;
  const Number* operator[](Size row) const { return first + row * width; }
};
using Anywhere = const Number* const*;

// LANES products, of R rows from `row` on and C = LANES / R vectors [C, width] -> out [C, ROWS]. Rows behind `last` are
// as the last.
template <Size R, class Rows>
inline void products(Rows rows, Size row, Size last, const Number* vectors, Size width, float* out) {
  constexpr Size C = LANES / R;
  const Number* numbers[R];
  for (Size r = 0; r < R; ++r) numbers[r] = rows[std::min(row + r, last - 1)];
  Vector sums[LANES] = {};
  const auto add = [&](auto words_at) {
    Words other[C];
    for (Size c = 0; c < C; ++c) other[c] = words_at(vectors + c * width);
    for (Size r = 0; r < R; ++r) {
      const Words each = words_at(numbers[r]);
      for (Size c = 0; c < C; ++c) sums[c * R + r] = add_products(sums[c * R + r], each, other[c]);
    }
  };
  Size i = 0;
  for (; i + A_VECTOR <= width; i += A_VECTOR) add([=](const Number* from) { return load<Words>(from + i); });
  if (i < width) add([=](const Number* from) { return load_some(from + i, width - i); });
  const Vector all = sums_of(sums);
  for (Size c = 0; c < C; ++c) std::memcpy(out + c * ROWS, reinterpret_cast<const float*>(&all) + c * R, 4 * R);
}

// Calls `take(row, rows, vector, products)` for up to ROWS rows at a time, between `first` and `last`, of a matrix, and
// each of `count` vectors [count, width]. Every product is summed in one order, whatever others are computed beside it.
template <class Rows, class Take>
inline void multiply(Rows rows, Size first, Size last, const Number* vectors, Size count, Size width, Take take) {
  float out[4 * ROWS];
  for (Size begin = first; begin < last; begin += ROWS) {
    const Size end = std::min(begin + ROWS, last);
    for (Size vector = 0, some; vector < count; vector += some) {
      const Number* others = vectors + vector * width;
      some = count - vector >= 4 ? 4 : count - vector >= 2 ? 2 : 1;
      if (some == 4)
        for (Size row = begin; row < end; row += 4) products<4>(rows, row, end, others, width, out + row - begin);
      else if (some == 2)
        for (Size row = begin; row < end; row += 8) products<8>(rows, row, end, others, width, out + row - begin);
      else
        products<16>(rows, begin, end, others, width, out);
      for (Size c = 0; c < some; ++c) take(begin, end - begin, vector + c, out + c * ROWS);
    }
  }
}

template <class Take>
inline void multiply(const Number* matrix, Size first, Size last, const Number* vectors, Size count, Size width,
                     Take take) {
  multiply(SideBySide{matrix, width}, first, last, vectors, count, width, take);
}

// Numbers of the same place in A_WORD rows, as words: [0] of the first LANES places, [1] of the next.
inline void paired(Words row, Words, Words* words, float) { words[0] = row; }

inline void paired(Words row, Words next, Words* words, bf16) {
  const Halves a = reinterpret_cast<Halves>(row), b = reinterpret_cast<Halves>(next);
  words[0] =
      reinterpret_cast<Words>(__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8,
                                                      40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
  words[1] = reinterpret_cast<Words>(__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22,
                                                             54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61,
                                                             30, 62, 31, 63));
}

inline void paired(Words row, Words next, Words* words) { paired(row, next, words, Number{}); }

// values [C, width] += weights [C, stride] times rows, for V vectors of columns from `column` on.
template <Size C, Size V, class Rows>
inline void add_columns(Rows rows, Size count, const Number* weights, Size stride, Size column, Size width,
                        float* values) {
  Vector sums[C][V * A_WORD];
  for (Size c = 0; c < C; ++c)
    for (Size v = 0; v < V * A_WORD; ++v) sums[c][v] = load(values + c * width + column + v * LANES);
  const auto add = [&](Size row, Size next_row, Size some) {
    const Number *one = rows[row] + column, *next = rows[next_row] + column;
    Words weight[C];
    for (Size c = 0; c < C; ++c) weight[c] = spread(weights + c * stride + row, some);
    for (Size v = 0; v < V; ++v) {
      Words words[A_WORD];
      paired(load<Words>(one + v * A_VECTOR), load<Words>(next + v * A_VECTOR), words);
      for (Size c = 0; c < C; ++c)
        for (Size part = 0; part < A_WORD; ++part)
          sums[c][v * A_WORD + part] = add_products(sums[c][v * A_WORD + part], words[part], weight[c]);
    }
  };
  Size row = 0;
  for (; row + A_WORD <= count; row += A_WORD) add(row, row + A_WORD - 1, A_WORD);
  if (row < count) add(row, row, count - row);
  for (Size c = 0; c < C; ++c)
    for (Size v = 0; v < V * A_WORD; ++v) save(values + c * width + column + v * LANES, sums[c][v]);
}

template <Size C, class Rows>
inline void add_rows(Rows rows, Size count, const Number* weights, Size stride, Size width, float* values) {
  // As many sums at a time as hide each other's latency.
  constexpr Size V = (C == 8 ? 2 : 4) / A_WORD, WIDE = C == 1 ? 2 * V : V;
  Size column = 0;
  for (; column + WIDE * A_VECTOR <= width; column += WIDE * A_VECTOR)
    add_columns<C, WIDE>(rows, count, weights, stride, column, width, values);
  for (; column + V * A_VECTOR <= width; column += V * A_VECTOR)
    add_columns<C, V>(rows, count, weights, stride, column, width, values);
  for (; column + A_VECTOR <= width; column += A_VECTOR)
    add_columns<C, 1>(rows, count, weights, stride, column, width, values);
  for (Size c = 0; c < C && column < width; ++c)
    for (Size row = 0; row < count; ++row) {
      const float weight = widened(weights[c * stride + row]);
      for (Size i = column; i < width; ++i) values[c * width + i] += weight * widened(rows[row][i]);
    }
}

// values [N, width] += weights times `count` rows [count, width]; the weights of each of N stand `stride` apart.
template <class Rows>
inline void add_weighted(Rows rows, Size count, const Number* weights, Size stride, Size n, Size width, float* values) {
  Size i = 0;
  for (; i + 8 <= n; i += 8) add_rows<8>(rows, count, weights + i * stride, stride, width, values + i * width);
  for (; i + 4 <= n; i += 4) add_rows<4>(rows, count, weights + i * stride, stride, width, values + i * width);
  for (; i < n; ++i) add_rows<1>(rows, count, weights + i * stride, stride, width, values + i * width);
}

// Memory that a thread keeps for its next call, one for every use: new memory of this size would come from the system,
// page by page. What stands in it is left from before.
template <int USE>
float* kept(Size count) {
  thread_local std::vector<float> memory;
  if (static_cast<Size>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

constexpr float LOG2_E = 1.44269504088896341f;

// 2^x for x <= 126, of a number or of LANES, and below 2^-126 as 0: 2^round(x), added to the exponent of a polynomial
// of the rest. Its terms are those of the least relative error, 2e-9 and with rounding 1e-7; of a ROUGH one, for
// numbers that bf16 will round a thousand times as much, 3e-6.
template <bool ROUGH = false, class X>
inline X two_to(X x) {
  constexpr float WHOLE = 12582912.0f;  // 1.5 2^23: added to it, a number is rounded, and stands in the last bits
  const X shifted = x + WHOLE, rest = x - (shifted - WHOLE);
  X series = {};
  if (ROUGH)
    for (const float term : {9.57010191e-3f, 5.59178603e-2f, 2.40247448e-1f, 6.93121815e-1f, 9.99999261e-1f})
      series = series * rest + term;
  else
    for (const float term :
         {1.5345812e-4f, 1.33999312e-3f, 9.61848896e-3f, 5.55032878e-2f, 2.40226469e-1f, 6.93147206e-1f, 1.0f})
      series = series * rest + term;
  return x < -126.0f ? X{} : from_bits(bits_of(series) + (bits_of(shifted) << 23));
}

template <class X>
inline X exponential(X x) {
  return two_to(x * LOG2_E);
}

template <class X>
inline X sigmoid(X x) {
  return 1.0f / (1.0f + exponential(-larger(X{} - 87.0f, x)));
}

// silu(gate) up, both clamped to `bound`, of a number or of LANES.
template <class X>
inline X gated(X gate, X up, float bound) {
  const X most = X{} + bound;
  gate = smaller(gate, most);
  return gate * sigmoid(gate) * smaller(larger(up, -most), most);
}

float inverse_rms(const float* x, Size width, float eps) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (Size i = 0; i < width; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / width + eps);
}

// The `count` largest of the candidates' values, by index, the largest first; of equal ones the first.
template <class Value>
inline void largest(Size candidates, Size count, Size* out, Value value) {
  for (Size candidate = 0; candidate < candidates; ++candidate) {
    const auto each = value(candidate);
    Size place = std::min(candidate, count);
    for (; place && each > value(out[place - 1]); --place)
      if (place < count) out[place] = out[place - 1];
    if (place < count) out[place] = candidate;
  }
}

}  // namespace
