// Quantization of rows, without outlier columns, with given ones, or with the largest of this call.
#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "vector.h"

namespace int8pass {
namespace {

constexpr float SMALLEST_ABSMAX = 1e-30f;  // as in lowering/numerics.py
constexpr int64_t GRAIN = 32768;           // elements worth a thread

// The columns that leave the int8 part. `taken[r]` is 0 where the column stays and its outlier reads 0.
struct Columns {
  const int64_t* index = nullptr;
  const uint8_t* taken = nullptr;
  int64_t count = 0;
};

struct Range {
  float low, high;
  bool nan;
};

Range range_of(const float* row, int64_t width) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t i = 0; i < width; i += LANES) {
    const __m512 v = _mm512_load_ps(row + i);
    low = _mm512_min_ps(low, v);
    high = _mm512_max_ps(high, v);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), nan != 0};
}

// Codes, scale and zero point of one fp32 row, zero up to the next multiple of 16.
void quantize_row(const float* row, int64_t width, bool symmetric, int8_t* codes, float* scale, int32_t* zero) {
  const Range range = range_of(row, width);
  const float spread = symmetric ? std::max(-range.low, range.high) : range.high - range.low;
  float step = std::max(spread, SMALLEST_ABSMAX) / (symmetric ? 127.0f : 255.0f);
  if (range.nan) step = std::numeric_limits<float>::quiet_NaN();
  const float inverse = 1.0f / step;
  const __m128 exact = _mm_set_ss(-128.0f - range.low * inverse);
  const int32_t zero_point = symmetric ? 0 : _mm_cvtss_si32(exact);  // half to even
  *scale = step;
  *zero = zero_point;
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i shift = _mm512_set1_epi32(zero_point);
  for (int64_t i = 0; i < width; i += LANES) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(row + i), factor));
    const __m128i narrow = _mm512_cvtsepi32_epi8(_mm512_add_epi32(rounded, shift));
    _mm_mask_storeu_epi8(codes + i, lanes(width - i), narrow);
  }
}

struct Quantized {
  Tensor codes, scale, zero_point, outliers;
};

Quantized quantize_rows(const Tensor& x, const Columns& columns, bool symmetric) {
  const int64_t width = x.size(x.dim() - 1), rows = row_count(x), count = columns.count;
  Quantized out{
      empty_like_rows(x, width, ScalarType::Char), empty_like_rows(x, 1, ScalarType::Float),
      empty_like_rows(x, 1, ScalarType::Int), empty_like_rows(x, count, x.scalar_type())};
  auto* codes = static_cast<int8_t*>(out.codes.data_ptr());
  auto* scale = static_cast<float*>(out.scale.data_ptr());
  auto* zero = static_cast<int32_t*>(out.zero_point.data_ptr());
  for_float_type(x.scalar_type(), [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(x.data_ptr()));
    auto* outliers = static_cast<decltype(type)>(out.outliers.data_ptr());
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
      Buffer<float> row(round_up(width, LANES));
      for (int64_t m = begin; m < end; ++m) {
        const auto* source = from + m * width;
        for (int64_t i = 0; i < width; i += LANES) {
          _mm512_store_ps(row + i, load(source + i, lanes(width - i)));
        }
        for (int64_t r = 0; r < count; ++r) {
          const bool taken = !columns.taken || columns.taken[r];
          outliers[m * count + r] = taken ? source[columns.index[r]] : std::decay_t<decltype(*source)>{};
          if (taken) row[columns.index[r]] = 0.0f;
        }
        quantize_row(row, width, symmetric, codes + m * width, scale + m, zero + m);
      }
    });
  });
  return out;
}

// Magnitudes are compared as the bits of |x|: the order is that of the numbers, and a NaN is the largest.
inline void absmax_into(const float* row, int64_t width, uint32_t* bits) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  for (int64_t i = 0; i < width; i += LANES) {
    const __mmask16 mask = lanes(width - i);
    const __m512i v = _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, row + i), magnitude);
    _mm512_store_si512(bits + i, _mm512_max_epu32(v, _mm512_load_si512(bits + i)));
  }
}

template <class Half>
inline void absmax_into(const Half* row, int64_t width, uint16_t* bits) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  for (int64_t i = 0; i < width; i += 32) {
    const __mmask32 mask = width - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (width - i)) - 1;
    const __m512i v = _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, row + i), magnitude);
    _mm512_store_si512(bits + i, _mm512_max_epu16(v, _mm512_load_si512(bits + i)));
  }
}

inline float magnitude(const float*, uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float magnitude(const BF16*, uint32_t bits) { return magnitude(static_cast<float*>(nullptr), bits << 16); }
inline float magnitude(const F16*, uint32_t bits) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))); }

// |x| at its largest in every column, as bits that compare like the numbers.
template <class T>
std::vector<uint32_t> column_absmax(const T* x, int64_t rows, int64_t width) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const int64_t padded = round_up(width, 32);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(rows * width / GRAIN, 1, threads);
  Buffer<Bits> partial(parts * padded);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Bits* bits = partial + part * padded;
      std::fill_n(bits, padded, Bits{0});
      for (int64_t m = rows * part / parts; m < rows * (part + 1) / parts; ++m) absmax_into(x + m * width, width, bits);
    }
  });
  std::vector<uint32_t> result(width);
  for (int64_t k = 0; k < width; ++k) {
    for (int64_t part = 0; part < parts; ++part) result[k] = std::max<uint32_t>(result[k], partial[part * padded + k]);
  }
  return result;
}

// The `count` largest, the largest first; of equals the one further left.
void largest(const std::vector<uint32_t>& bits, int64_t count, int64_t* index) {
  std::vector<uint64_t> keys(bits.size());
  for (size_t k = 0; k < keys.size(); ++k) keys[k] = (uint64_t{bits[k]} << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(k));
  std::nth_element(keys.begin(), keys.begin() + count - 1, keys.end(), std::greater<>());
  std::sort(keys.begin(), keys.begin() + count, std::greater<>());
  for (int64_t r = 0; r < count; ++r) index[r] = 0xFFFFFFFFu - static_cast<uint32_t>(keys[r]);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x, bool symmetric) {
  Quantized out = quantize_rows(x, {}, symmetric);
  return {out.codes, out.scale, out.zero_point};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> split_quantize(const Tensor& x, const Tensor& columns, bool symmetric) {
  const auto* index = static_cast<const int64_t*>(columns.data_ptr());
  Quantized out = quantize_rows(x, {index, nullptr, columns.numel()}, symmetric);
  return {out.codes, out.scale, out.zero_point, out.outliers};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> split_quantize_dynamic(
    const Tensor& x, int64_t capacity, double threshold, bool symmetric) {
  const int64_t width = x.size(x.dim() - 1), rows = row_count(x), count = std::min(capacity, width);
  Tensor columns = empty({count}, ScalarType::Long);
  Tensor overflow = empty({}, ScalarType::Int);
  auto* index = static_cast<int64_t*>(columns.data_ptr());
  std::vector<uint8_t> taken(count, 1);
  int32_t left_over = 0;
  for_float_type(x.scalar_type(), [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(const_cast<void*>(x.data_ptr()));
    const std::vector<uint32_t> bits = column_absmax(data, rows, width);
    if (count > 0) largest(bits, count, index);
    if (threshold > 0) {
      for (uint32_t b : bits) left_over += magnitude(data, b) > static_cast<float>(threshold);
      for (int64_t r = 0; r < count; ++r) {
        taken[r] = magnitude(data, bits[index[r]]) > static_cast<float>(threshold);
        left_over -= taken[r];
      }
    }
  });
  *static_cast<int32_t*>(overflow.data_ptr()) = left_over;
  Quantized out = quantize_rows(x, {index, taken.data(), count}, symmetric);
  return {out.codes, out.scale, out.zero_point, out.outliers, columns, overflow};
}

STABLE_TORCH_LIBRARY_IMPL(int8pass_cpu, CPU, library) {
  library.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  library.impl("split_quantize", TORCH_BOX(&split_quantize));
  library.impl("split_quantize_dynamic", TORCH_BOX(&split_quantize_dynamic));
}

}  // namespace int8pass
