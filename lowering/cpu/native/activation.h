// Activations of gated linears, sixteen numbers at a time.
#pragma once

#include "vector.h"

namespace int8pass {

// By their names in lowering/ops/act.py.
enum class Activation { SILU, GELU, GELU_TANH, RELU, SIGMOID };

inline Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::SILU;
  if (name == "gelu") return Activation::GELU;
  if (name == "gelu_tanh") return Activation::GELU_TANH;
  if (name == "relu") return Activation::RELU;
  if (name == "sigmoid") return Activation::SIGMOID;
  throw std::runtime_error("int8pass_cpu: no activation " + name);
}

// What is calculated for a result of 16 bits needs no more than 14.
template <class T>
constexpr bool EXACT = sizeof(T) == 4;

// 2^x: 2^n · 2^r with |r| ≤ 1/2, and 2^r by a polynomial with a relative error below 2e-7, or 5e-6. Saturates at 2^126,
// so that a quotient with it stays a number; NaN stays NaN.
template <class T>
inline __m512 power_of_two(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(126.0f), x);  // the second operand where one is NaN
  const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
  // Taylor to degree 6, and the degree 4 polynomial that is best at the Chebyshev points of [-1/2, 1/2].
  constexpr float LONG[] = {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
  constexpr float SHORT[] = {9.66636837e-03f, 5.59219755e-02f, 2.40223497e-01f, 6.93121016e-01f, 1.00000000e+00f};
  __m512 y = _mm512_set1_ps(EXACT<T> ? LONG[0] : SHORT[0]);
  for (int i = 1; i < (EXACT<T> ? 7 : 5); ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(EXACT<T> ? LONG[i] : SHORT[i]));
  return _mm512_scalef_ps(y, n);
}

constexpr float LOG2_E = 1.44269504f;

// 1 / x for x ≥ 1: 14 bits, or one Newton step from there.
template <class T>
inline __m512 reciprocal(__m512 x) {
  const __m512 guess = _mm512_rcp14_ps(x);
  return EXACT<T> ? _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2.0f))) : guess;
}

template <class T>
inline __m512 sigmoid(__m512 x) {
  const __m512 power = power_of_two<T>(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
  return reciprocal<T>(_mm512_add_ps(_mm512_set1_ps(1.0f), power));
}

// erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7. Exact for every
// result: near -1 all but the last digits of it are lost to the 1 that GELU adds.
inline __m512 error_function(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), magnitude = _mm512_abs_ps(x);
  const __m512 t = reciprocal<float>(_mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), magnitude, one));
  __m512 y = _mm512_set1_ps(1.061405429f);
  for (const float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(term));
  }
  const __m512 bell = power_of_two<float>(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-LOG2_E)));
  const __m512 value = _mm512_fnmadd_ps(_mm512_mul_ps(y, t), bell, one);
  return _mm512_or_ps(value, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

// An activation of 16 numbers, as exact as a result of type T can show.
template <class T>
inline __m512 activate(Activation activation, __m512 x) {
  switch (activation) {
    case Activation::SILU:
      return _mm512_mul_ps(x, sigmoid<T>(x));
    case Activation::GELU: {
      const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
      return _mm512_fmadd_ps(half, error_function(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f))), half);
    }
    case Activation::GELU_TANH: {  // x (1 + tanh u) / 2 = x σ(2u)
      const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
      const __m512 u = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(2 * 0.79788456f));
      return _mm512_mul_ps(x, sigmoid<T>(u));
    }
    case Activation::RELU:
      return _mm512_max_ps(_mm512_setzero_ps(), x);
    case Activation::SIGMOID:
      return sigmoid<T>(x);
  }
  return x;
}

}  // namespace int8pass
