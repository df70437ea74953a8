// A few float rows times int8 weights `[N, K]`: weights are read once, which is what this takes its time for.
#include <algorithm>

#include "vector.h"

namespace int8pass {
namespace {

constexpr int64_t CHANNELS = 4;  // whose sums run side by side

constexpr int64_t AHEAD = 4096;  // bytes between what is multiplied and what is fetched from memory

inline __m512 widen(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }

// Dot products of fp32 `x[k]`, zero up to the next multiple of 16, with four rows of int8 weights.
inline __m128 dot(const float* x, const int8_t* const (&rows)[CHANNELS], int64_t k) {
  __m512 sums[CHANNELS] = {};
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    for (int64_t c = 0; c < CHANNELS; ++c) {
      _mm_prefetch(rows[c] + i + AHEAD, _MM_HINT_T1);
      for (int64_t j = i; j < i + 64; j += LANES) {
        const __m512 w = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[c] + j)));
        sums[c] = _mm512_fmadd_ps(_mm512_load_ps(x + j), w, sums[c]);
      }
    }
  }
  for (; i < k; i += LANES) {
    for (int64_t c = 0; c < CHANNELS; ++c) {
      const __m512 w = widen(_mm_maskz_loadu_epi8(lanes(k - i), rows[c] + i));
      sums[c] = _mm512_fmadd_ps(_mm512_load_ps(x + i), w, sums[c]);
    }
  }
  return _mm_setr_ps(_mm512_reduce_add_ps(sums[0]), _mm512_reduce_add_ps(sums[1]), _mm512_reduce_add_ps(sums[2]),
                     _mm512_reduce_add_ps(sums[3]));
}

}  // namespace

Tensor linear_w8a16(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias) {
  const int64_t m = row_count(x), n = weight.size(0), k = weight.size(1), stride = round_up(k, LANES);
  Tensor out = empty_like_rows(x, n, x.scalar_type());
  Buffer<float> rows(m * stride);
  for (int64_t i = 0; i < m; ++i) {
    std::fill_n(rows + (i + 1) * stride - std::min(LANES, stride), std::min(LANES, stride), 0.0f);
    read_floats(x, i * k, k, rows + i * stride);
  }
  const auto* codes = static_cast<const int8_t*>(weight.data_ptr());
  const auto* scale = static_cast<const float*>(weight_scale.data_ptr());
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k * LANES));
  for_float_type(x.scalar_type(), [&](auto* type) {
    auto* to = static_cast<decltype(type)>(out.data_ptr());
    torch::stable::parallel_for(0, ceil_div(n, LANES), grain, [&](int64_t begin, int64_t end) {
      alignas(64) float sums[LANES] = {}, offset[LANES] = {};
      for (int64_t first = begin * LANES; first < std::min(end * LANES, n); first += LANES) {
        const int64_t width = std::min(LANES, n - first);
        if (bias) read_floats(*bias, first, width, offset);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t c = 0; c < width; c += CHANNELS) {
            const int8_t* four[CHANNELS];  // behind the last channel: that one again
            for (int64_t j = 0; j < CHANNELS; ++j) four[j] = codes + std::min(first + c + j, n - 1) * k;
            _mm_store_ps(sums + c, dot(rows + i * stride, four, k));
          }
          const __m512 scales = _mm512_maskz_loadu_ps(lanes(width), scale + first);
          const __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(sums), scales), _mm512_load_ps(offset));
          store(to + i * n + first, lanes(width), y);
        }
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(int8pass_cpu, CPU, library) {
  library.impl("linear_w8a16", TORCH_BOX(&linear_w8a16));
}

}  // namespace int8pass
