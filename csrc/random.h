// Counter-based random numbers: each depends only on the seed, the stream, the row and the column, so the bits are the
// same on every backend, instruction set and compiler, and for any number of threads. vblora/reference.py implements
// the same in plain PyTorch. `static` for the reason given in numeric.h.
#pragma once

#include "numeric.h"

namespace vblora {

// Draws with the same seed in different streams are independent.
enum class Stream : uint32_t { logits = 0, vera_A = 1, vera_B = 2 };

struct Words {
  uint32_t word[4];
};

// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
static VBLORA_BOTH inline Words philox(uint64_t key, const Words& counter) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xd2511f53u} * c0, product1 = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of columns [4 * quarter, 4 * quarter + 4) of a row. They do not depend on the matrix's shape, so a matrix
// can be drawn in parts or extended.
static VBLORA_BOTH inline Words draw_words(uint64_t seed, Stream stream, int64_t row, int64_t quarter) {
  return philox(seed, {{static_cast<uint32_t>(quarter), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                        static_cast<uint32_t>(stream)}});
}

// ln x of a normal x > 0, with a relative error of 3e-16 for x < 0.1: x = 2^e m with m from sqrt(1/2) to sqrt(2), and
// ln m = 2 artanh(s) with s = (m - 1) / (m + 1), |s| < 0.172; the first omitted term of the series is below 1e-17.
static VBLORA_BOTH inline double logarithm(double x) {
  constexpr uint64_t sqrt_half = 0x3fe6a09e667f3bcdu, mantissa = 0x000fffffffffffffu;
  const uint64_t bits = bits_as<uint64_t>(x) + (0x3ff0000000000000u - sqrt_half);
  // OR-ing the exponent, an integer below 2^52, into 2^52 makes it a double without a conversion.
  const double exponent = bits_as<double>(0x4330000000000000u | bits >> 52) - (0x1p52 + 1023.0);
  const double m = bits_as<double>((bits & mantissa) + sqrt_half);
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double series = 2.0 / 19.0;
  series = series * s2 + 2.0 / 17.0;
  series = series * s2 + 2.0 / 15.0;
  series = series * s2 + 2.0 / 13.0;
  series = series * s2 + 2.0 / 11.0;
  series = series * s2 + 2.0 / 9.0;
  series = series * s2 + 2.0 / 7.0;
  series = series * s2 + 2.0 / 5.0;
  series = series * s2 + 2.0 / 3.0;
  series = series * s2 + 2.0;
  return exponent * 0x1.62e42fefa39efp-1 + s * series;  // ln 2
}

// The quantile of the standard normal distribution at (word + 0.5) / 2^32, from -6.34 to 6.34, by PPND16 of Wichura's
// AS 241 (Applied Statistics 37, 1988). It uses only operations whose rounding IEEE 754 defines, in a fixed order and
// never fused, so compile it without contraction (CMakeLists.txt).
//
// It is strictly increasing: neighbouring quantiles are at least 2^-32 sqrt(2 pi) = 5.8e-10 apart, and the error is
// below 3e-15. So comparing words is comparing normals.
static VBLORA_BOTH inline double standard_normal(uint32_t word) {
  // The probability minus one half, exact; via int32, which every instruction set converts.
  const double q = (static_cast<double>(static_cast<int32_t>(word ^ 0x80000000u)) + 0.5) * 0x1p-32;
  const double distance = q < 0.0 ? -q : q;

  // Computing both formulas and selecting one lets the compiler vectorise the loops around this.
  const double r = 0.180625 - q * q;
  double above = 2.5090809287301226727e+3, below = 5.2264952788528545610e+3;
  above = above * r + 3.3430575583588128105e+4, below = below * r + 2.8729085735721942674e+4;
  above = above * r + 6.7265770927008700853e+4, below = below * r + 3.9307895800092710610e+4;
  above = above * r + 4.5921953931549871457e+4, below = below * r + 2.1213794301586595867e+4;
  above = above * r + 1.3731693765509461125e+4, below = below * r + 5.3941960214247511077e+3;
  above = above * r + 1.9715909503065514427e+3, below = below * r + 6.8718700749205790830e+2;
  above = above * r + 1.3314166789178437745e+2, below = below * r + 4.2313330701600911252e+1;
  above = above * r + 3.3871328727963666080e+0, below = below * r + 1.0;
  const double central = q * above / below;

  // AS 241's third formula is for probabilities below e^-25; the smallest here is 2^-33.
  const double t = sqrt(-logarithm(0.5 - distance)) - 1.6;
  above = 7.74545014278341407640e-4, below = 1.05075007164441684324e-9;
  above = above * t + 2.27238449892691845833e-2, below = below * t + 5.47593808499534494600e-4;
  above = above * t + 2.41780725177450611770e-1, below = below * t + 1.51986665636164571966e-2;
  above = above * t + 1.27045825245236838258e+0, below = below * t + 1.48103976427480074590e-1;
  above = above * t + 3.64784832476320460504e+0, below = below * t + 6.89767334985100004550e-1;
  above = above * t + 5.76949722146069140550e+0, below = below * t + 1.67638483018380384940e+0;
  above = above * t + 4.63033784615654529590e+0, below = below * t + 2.05319162663775882187e+0;
  above = above * t + 1.42343711074968357734e+0, below = below * t + 1.0;
  const double tail = above / below;

  return distance <= 0.425 ? central : q < 0.0 ? -tail : tail;
}

// Rounds to the 24 bits of float32, to nearest even, so that a seed gives the same numbers in every dtype. Written out
// because gcc 12 drops a conversion to float and back when it vectorises.
static VBLORA_BOTH inline double to_24_bits(double x) {
  const uint64_t bits = bits_as<uint64_t>(x);
  return bits_as<double>((bits + 0x0fffffffu + (bits >> 29 & 1u)) & ~uint64_t{0x1fffffff});
}

// Maps a word to a number.
struct Normal {
  double std;
  VBLORA_BOTH double operator()(uint32_t word) const { return to_24_bits(std * standard_normal(word)); }
};

// From -bound to just below bound, in 2^24 equal steps.
struct Uniform {
  double bound;
  VBLORA_BOTH double operator()(uint32_t word) const {
    const double step = static_cast<double>(static_cast<int32_t>(word ^ 0x80000000u) >> 8);  // via int32, as above
    return to_24_bits(bound * (step * 0x1p-23));
  }
};

}  // namespace vblora
