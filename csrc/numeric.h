// Conversions, exp and the order of a row's entries, with the same bits on every backend and instruction set (except
// float64's exp, which is the library's). Everything is `static`: the CPU kernels compile this file once per
// instruction set, and with external linkage the linker would pick one copy for all of them.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define VBLORA_BOTH __host__ __device__
#else
#define VBLORA_BOTH
#endif

namespace vblora {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
static VBLORA_BOTH inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The type that sums of T use.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename accumulator<T>::type;

template <class To>
static VBLORA_BOTH inline To load(float x) {
  return static_cast<To>(x);
}
template <class To>
static VBLORA_BOTH inline To load(double x) {
  return static_cast<To>(x);
}
template <class To>
static VBLORA_BOTH inline To load(bf16 x) {
  return static_cast<To>(bits_as<float>(static_cast<uint32_t>(x.bits) << 16));
}
template <class To>
static VBLORA_BOTH inline To load(f16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;  // the exponent biases differ by 112
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  // A denormal is a multiple of 2^-24, which float represents as a normal number: exact even if denormals are flushed
  // to zero.
  const uint32_t denormal = bits_as<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? denormal : normal;
  return static_cast<To>(bits_as<float>((magnitude >= 0x7c00u ? special : finite) | sign));
}

static VBLORA_BOTH inline void store(float* to, float x) { *to = x; }
static VBLORA_BOTH inline void store(double* to, float x) { *to = x; }
static VBLORA_BOTH inline void store(double* to, double x) { *to = x; }
static VBLORA_BOTH inline void store(float* to, double x) { *to = static_cast<float>(x); }
static VBLORA_BOTH inline void store(bf16* to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
static VBLORA_BOTH inline void store(f16* to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent and round to nearest even; a carry increments the exponent, up to infinity.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal results: adding 0.5 aligns half's last mantissa bit with float's, so that float's own rounding applies.
  const uint32_t denormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // 65536 and above, infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  to->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}
static VBLORA_BOTH inline void store(bf16* to, double x) { store(to, static_cast<float>(x)); }
static VBLORA_BOTH inline void store(f16* to, double x) { store(to, static_cast<float>(x)); }

static VBLORA_BOTH inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
static VBLORA_BOTH inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// e^x for the softmax: x <= 0 or NaN. Not the library's, because libraries differ in the last bit and checkpoints must
// not. x = n ln2 + r with |r| <= ln2 / 2; a Taylor polynomial for e^r with a remainder below 6e-9; 2^n in two exact
// steps.
static VBLORA_BOTH inline float exponential(float x) {
  if (!(x >= -104.0f)) return x != x ? x : 0.0f;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds x to an integer in the low bits
  const float shifted = fmaf(x, 1.44269504f, shifter);
  const float n = shifted - shifter;
  float r = fmaf(n, -0.693359375f, x);  // ln2 in two parts; the first has few bits, so its product is exact
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.0f / 5040.0f;
  p = fmaf(p, r, 1.0f / 720.0f);
  p = fmaf(p, r, 1.0f / 120.0f);
  p = fmaf(p, r, 1.0f / 24.0f);
  p = fmaf(p, r, 1.0f / 6.0f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  const int32_t exponent = static_cast<int32_t>(n);
  const int32_t half = exponent / 2;  // n can be -150: the result is denormal, and 2^n alone does not fit in a float
  const float first = bits_as<float>(static_cast<uint32_t>(127 + half) << 23);
  const float second = bits_as<float>(static_cast<uint32_t>(127 + exponent - half) << 23);
  return p * first * second;
}
static VBLORA_BOTH inline double exponential(double x) {
  return exp(x);
}  // the library's; float64 is meant for testing

// Whether a row's entry x is ordered before y: larger first, NaN largest as in torch.topk, ties by bank vector and then
// by column, lowest first.
template <class T>
static VBLORA_BOTH inline bool comes_before(T x, int64_t x_vector, int64_t x_column, T y, int64_t y_vector,
                                            int64_t y_column) {
  const bool x_nan = x != x, y_nan = y != y;
  if (x_nan != y_nan) return x_nan;
  if (!x_nan && x != y) return x > y;
  if (x_vector != y_vector) return x_vector < y_vector;
  return x_column < y_column;
}

}  // namespace vblora
