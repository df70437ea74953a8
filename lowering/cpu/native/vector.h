// Sixteen numbers at a time: loads and stores that convert, for every dtype a model comes in.
#pragma once

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error this processor has no AVX512-VNNI
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace int8pass {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bits of a half-precision number: kernels convert, they never calculate in it.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr int64_t LANES = 16;

inline __mmask16 lanes(int64_t count) {
  return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load(const BF16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
inline __m512 load(const F16* from, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from)); }

// Rounded to nearest, ties to even; a NaN stays one.
inline __m256i to_bf16(__m512 value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i nan = _mm512_set1_epi32(0x7FC00000);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, is_nan, nan), 16));
#endif
}

inline void store(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
inline void store(BF16* to, __mmask16 mask, __m512 value) { _mm256_mask_storeu_epi16(to, mask, to_bf16(value)); }
inline void store(F16* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 32 numbers, side by side.
template <class T>
inline void store(T* to, __mmask32 mask, __m512 left, __m512 right) {
  store(to, static_cast<__mmask16>(mask), left);
  if (mask >> 16) store(to + LANES, static_cast<__mmask16>(mask >> 16), right);
}
#ifdef __AVX512BF16__
inline void store(BF16* to, __mmask32 mask, __m512 left, __m512 right) {
  _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}
#endif

// Calls `f` with a null pointer of the element type that stands for `dtype`.
template <class F>
void for_float_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BF16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<F16*>(nullptr));
    default:
      throw std::runtime_error("int8pass_cpu: float32, bfloat16 or float16 expected");
  }
}

// `count` numbers of any float dtype, from element `start` on, as fp32.
inline void read_floats(const Tensor& from, int64_t start, int64_t count, float* to) {
  for_float_type(from.scalar_type(), [&](auto* type) {
    const auto* source = static_cast<decltype(type)>(const_cast<void*>(from.data_ptr())) + start;
    for (int64_t i = 0; i < count; i += LANES) {
      store(to + i, lanes(count - i), load(source + i, lanes(count - i)));
    }
  });
}

// Memory on cache lines, not initialized: a kernel's workspace.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : data_(allocate(count), std::free) {}
  operator T*() { return data_.get(); }
  operator const T*() const { return data_.get(); }

 private:
  static T* allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    T* data = static_cast<T*>(bytes ? std::aligned_alloc(64, bytes) : nullptr);
    if (bytes && !data) throw std::bad_alloc();
    return data;
  }
  std::unique_ptr<T, void (*)(void*)> data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Rows of a contiguous `[..., K]` tensor.
inline int64_t row_count(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// Sizes of `x` with another last one.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(last);
  return sizes;
}

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Char:
      return aoti_torch_dtype_int8();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    default:
      throw std::runtime_error("int8pass_cpu: no results of this dtype");
  }
}

// A contiguous tensor, not initialized. Not through the dispatcher, which takes longer than a small row's kernel.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t i = dims - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes[i + 1]);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides.data(), dtype_code(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_like_rows(const Tensor& x, int64_t last, ScalarType dtype) {
  return empty(with_last(x, last), dtype);
}

}  // namespace int8pass
