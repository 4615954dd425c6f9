// Weights in int8 with a scale per row.
//
// What they multiply is written in bytes too: a vector x as whole numbers times one scale, each in PLANES bytes with a
// sign, x = s sum_p 256^p b_p. Sums of products of bytes are exact, and taken 64 at a time where the processor has an
// instruction for it. What is lost, 2^-15 of the largest number in bf16 and 2^-23 in fp32, is less than either loses.

#pragma once

#include "experts.h"

namespace {

constexpr Size PLANES = sizeof(Number) == 4 ? 3 : 2;
constexpr Size BYTES = 4 * LANES;  // in a vector of them
constexpr float LARGEST = PLANES == 3 ? 127.0f * 65536 : 127.0f * 256;

typedef int32_t Integers __attribute__((vector_size(BYTES)));
typedef uint8_t Unsigned __attribute__((vector_size(BYTES)));
typedef int8_t Signed __attribute__((vector_size(BYTES)));

// sums + the products of four bytes each, lane by lane.
inline Integers add_bytes(Integers sums, Unsigned a, Signed b) {
#ifdef __AVX512VNNI__
  return reinterpret_cast<Integers>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  for (Size i = 0; i < BYTES; ++i) sums[i / 4] += a[i] * b[i];
  return sums;
#endif
}

inline Unsigned bytes_of(const int8_t* row, Size count) {
  if (count >= BYTES) return load<Unsigned>(row);
  Unsigned result = {};
  std::memcpy(&result, row, count);
  return result;
}

// Vectors [N, width] in bytes.
struct Planes {
  Size padded;                   // width, up to whole vectors; zeros behind the numbers
  std::vector<int8_t> bytes;     // [N, PLANES, padded]
  std::vector<float> scales;     // [N]
  std::vector<Integers> starts;  // [N, PLANES], see `products`

  Planes(Size count, Size width)
      : padded((width + BYTES - 1) / BYTES * BYTES),
        bytes(count * PLANES * padded),
        scales(count),
        starts(count * PLANES) {}

  const int8_t* plane(Size vector, Size p) const { return &bytes[(vector * PLANES + p) * padded]; }

  template <class X>
  void put(Size vector, const X* x, Size width) {
    float top = 0;
    bool finite = true;
    for (Size i = 0; i < width; ++i) {
      const float size = std::fabs(widened(x[i]));
      finite &= size <= std::numeric_limits<float>::max();
      top = std::max(top, size);
    }
    const float scale = scales[vector] = finite ? top / LARGEST : std::numeric_limits<float>::quiet_NaN();
    // The inverse of a scale this small is infinite.
    const float inverse = scale >= std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f;
    int8_t* to = &bytes[vector * PLANES * padded];
    // What is not finite is no whole number: the bytes stay 0, and the scale makes every product NaN.
    for (Size i = 0; i < width && finite; ++i) {
      int32_t rest = static_cast<int32_t>(std::nearbyint(widened(x[i]) * inverse));
      for (Size p = 0; p < PLANES; ++p) {
        const int8_t byte = static_cast<int8_t>(rest);
        to[p * padded + i] = byte;
        rest = (rest - byte) / 256;
      }
    }
    for (Size p = 0; p < PLANES; ++p) {
      Integers sums = {};
      for (Size i = 0; i < padded; i += BYTES)
        sums = add_bytes(sums, Unsigned{} + 128, load<Signed>(to + p * padded + i));
      starts[vector * PLANES + p] = -sums;
    }
  }
};

Planes planes(const Number* x, Size count, Size width) {
  Planes result(count, width);
  for (Size i = 0; i < count; ++i) result.put(i, x + i * width, width);
  return result;
}

// The products of R rows from `row` on with a vector, lane by lane -> sums [R]. The instruction wants one side without
// a sign: rows are raised by 128, and the sums begin with what that adds, subtracted.
template <Size R>
inline void products(const int8_t* matrix, Size row, Size last, const Planes& x, Size vector, Size width,
                     Vector* sums) {
  const int8_t* rows[R];
  for (Size r = 0; r < R; ++r) rows[r] = matrix + std::min(row + r, last - 1) * width;
  Integers totals[R][PLANES];
  for (Size r = 0; r < R; ++r)
    for (Size p = 0; p < PLANES; ++p) totals[r][p] = x.starts[vector * PLANES + p];
  const auto add = [&](Size i, Size count) {
    Signed others[PLANES];
    for (Size p = 0; p < PLANES; ++p) others[p] = load<Signed>(x.plane(vector, p) + i);
    for (Size r = 0; r < R; ++r) {
      const Unsigned raised = bytes_of(rows[r] + i, count) ^ (Unsigned{} + 128);
      for (Size p = 0; p < PLANES; ++p) totals[r][p] = add_bytes(totals[r][p], raised, others[p]);
    }
  };
  Size i = 0;
  for (; i + BYTES <= width; i += BYTES) add(i, BYTES);
  if (i < width) add(i, width - i);
  for (Size r = 0; r < R; ++r) {
    sums[r] = __builtin_convertvector(totals[r][PLANES - 1], Vector);
    for (Size p = PLANES - 1; p-- > 0;) sums[r] = sums[r] * 256.0f + __builtin_convertvector(totals[r][p], Vector);
  }
}

// As `multiply` of vectors.h, for vectors `from` to `to`; products have the scales of vectors and rows.
template <class Take>
inline void multiply(const int8_t* matrix, const float* row_scales, Size first, Size last, const Planes& x, Size from,
                     Size to, Size width, Take take) {
  Vector sums[ROWS];
  for (Size begin = first; begin < last; begin += ROWS) {
    const Size end = std::min(begin + ROWS, last);
    for (Size vector = from; vector < to; ++vector) {
      for (Size row = 0; row < ROWS; row += 4)
        products<4>(matrix, std::min(begin + row, end - 1), end, x, vector, width, sums + row);
      Vector found = sums_of(sums) * x.scales[vector];
      float out[ROWS];
      save(out, found);
      for (Size i = 0; i < end - begin; ++i) out[i] *= row_scales[begin + i];
      take(begin, end - begin, vector, out);
    }
  }
}

// A linear map per group, its weight in int8 with a scale per row: x [N, G, in], weight [G, out, in], scales [G, out]
// -> out [N, G, out].
void project_int8(const Number* x, Size tokens, Size groups, Size width, const int8_t* weight, const float* scales,
                  Size count, Number* out, Size threads) {
  // With several groups those of a token stand beside one another, else all tokens.
  const Planes vectors = planes(x, tokens * groups, width);
  const Size blocks = (count + ROWS - 1) / ROWS, alone = groups > 1 ? tokens : 1, together = tokens / alone;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * groups * width * count > WORTH_A_THREAD)
  for (Size block = 0; block < groups * blocks; ++block) {
    const Size group = block / blocks, first = block % blocks * ROWS, begin = group * count;
    for (Size some = 0; some < alone; ++some) {
      const Size at = some * groups + group;
      multiply(weight + begin * width, scales + begin, first, std::min(first + ROWS, count), vectors, at, at + together,
               width, [=](Size row, Size rows, Size vector, const float* found) {
                 narrow(found, out + vector * count + row, rows);
               });
    }
  }
}

// `mix_channels` of chosen experts in int8, with a scale per row: gate_up [E, 2 I, d], down [E, d, I].
void mix_int8(const Number* x, Size tokens, Size width, const Size* indices, const float* weights, Size top_k,
              Size experts, const int8_t* gate_up, const float* gate_up_scales, const int8_t* down,
              const float* down_scales, Size inner, double limit, Number* out, Size threads) {
  must_be_below(indices, tokens * top_k, experts);
  const std::vector<Size> slots = by_expert(indices, tokens * top_k);
  const Planes vectors = planes(x, tokens, width);
  std::vector<float> inners(slots.size() * inner);
  Planes inner_vectors(slots.size(), inner);
  const Size blocks = (inner + ROWS - 1) / ROWS, tasks = slots.size() * blocks, count = slots.size();
  const float bound = static_cast<float>(limit);
  Failure failure;
#pragma omp parallel num_threads(threads) if (count * inner * width * 3 > WORTH_A_THREAD)
  {
#pragma omp for schedule(static)
    for (Size task = 0; task < tasks; ++task) {
      const Size slot = slots[task / blocks], gate = indices[slot] * 2 * inner, up = gate + inner, token = slot / top_k;
      const Size first = task % blocks * ROWS, last = std::min(first + ROWS, inner);
      float gates[ROWS], ups[ROWS];
      const auto into = [&](float* to) {
        return [=](Size, Size rows, Size, const float* found) { std::copy_n(found, rows, to); };
      };
      multiply(gate_up + gate * width, gate_up_scales + gate, first, last, vectors, token, token + 1, width,
               into(gates));
      multiply(gate_up + up * width, gate_up_scales + up, first, last, vectors, token, token + 1, width, into(ups));
      for (Size i = 0; i < last - first; ++i) {
        inners[slot * inner + first + i] = gated(gates[i], ups[i], bound) * weights[slot];
      }
    }
#pragma omp for schedule(static)
    for (Size slot = 0; slot < count; ++slot) inner_vectors.put(slot, &inners[slot * inner], inner);
    std::vector<float> sums;
    failure.watch([&] { sums.resize(tokens * ROWS); });
#pragma omp for schedule(static)
    for (Size first = 0; first < width; first += ROWS)
      failure.watch([&] {
        const Size last = std::min(first + ROWS, width);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (const Size slot : slots) {
          const Size begin = indices[slot] * width;
          float* sum = &sums[slot / top_k * ROWS];
          multiply(down + begin * inner, down_scales + begin, first, last, inner_vectors, slot, slot + 1, inner,
                   [=](Size, Size rows, Size, const float* found) {
                     for (Size i = 0; i < rows; ++i) sum[i] += found[i];
                   });
        }
        for (Size token = 0; token < tokens; ++token)
          narrow(&sums[token * ROWS], out + token * width + first, last - first);
      });
  }
  failure.raise();
}

}  // namespace
