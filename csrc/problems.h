// The problems that a backend solves, as raw pointers and sizes: what the CPU and the CUDA kernels share. No torch
// here, so that kernels compile without it. All arrays are dense and row-major.
#pragma once

#include <cstdint>

namespace vblora {

enum class Type : int8_t { f32, f64, bf16, f16, u8, i16, i32, i64 };

// logits, candidates -> the k best of each row, their softmax weights, and the mixture of the bank vectors they stand
// for. Weights, and all accumulation, are float32, or float64 when the inputs are.
struct Admixture {
  Type type;            // of logits and bank
  Type candidate_type;  // i16 or i32
  Type out_type;
  const void* logits;      // (rows, columns)
  const void* bank;        // (vectors, length)
  const void* candidates;  // (rows, columns), or null: column j stands for bank vector j
  void* subvectors;        // (rows, length)
  int32_t* indices;        // (rows, k): columns of logits, best first
  void* weights;           // (rows, k)
  bool* exhausted;         // (rows), or null: whether the k-th best logit is not above the last column's.
                           // The CPU's alone; elsewhere a few operators of torch's do that.
  int64_t rows, columns, vectors, length, k;
};

// A deployed adapter: bank indices and weights -> mixtures.
struct Composition {
  Type type;  // of bank
  Type index_type;
  Type out_type;
  const void* bank;     // (vectors, length)
  const void* indices;  // (rows, k): bank vectors
  const void* weights;  // (rows, k)
  void* subvectors;     // (rows, length)
  int64_t rows, vectors, length, k;
};

// The gradients of an Admixture. Either incoming gradient may be null (zero), either outgoing one too (not wanted).
struct AdmixtureBackward {
  Type type;                    // of bank, and of both outgoing gradients
  Type candidate_type;          // i16 or i32
  Type grad_type;               // of grad_subvectors
  const void* grad_subvectors;  // (rows, length)
  const void* grad_weights;     // (rows, k), of the weights' type
  const int32_t* indices;       // (rows, k): of each row distinct, as an Admixture's are
  const void* weights;          // (rows, k)
  const void* bank;             // (vectors, length)
  const void* candidates;       // (rows, columns), or null
  void* grad_logits;            // (rows, columns)
  void* grad_bank;              // (vectors, length)
  int64_t rows, columns, vectors, length, k;
};

// The random numbers that logits begin with (random.h): all of a row's, or the largest of them and where they stood.
struct Draw {
  Type type;            // of logits
  Type candidate_type;  // i16 or i32
  void* logits;         // (rows, columns)
  void* candidates;     // (rows, columns), or null: columns is vectors
  int64_t rows, columns, vectors;
  uint64_t seed;
  double std;
};

// Uniform random numbers by place (random.h).
struct UniformDraw {
  Type type;
  void* values;  // (rows, columns)
  int64_t rows, columns;
  uint64_t seed;
  uint32_t stream;
  double bound;
};

}  // namespace vblora
