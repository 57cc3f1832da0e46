// What a backend gets: problems as raw pointers and sizes, without torch, so that kernels compile without it. All
// arrays are contiguous and row-major.
#pragma once

#include <cstdint>

namespace vblora {

enum class Type : int8_t { f32, f64, bf16, f16, u8, i16, i32, i64 };

[[maybe_unused]] static inline int64_t size_of(Type type) {
  constexpr int64_t sizes[] = {4, 8, 2, 2, 1, 2, 4, 8};
  return sizes[static_cast<int8_t>(type)];
}

// Selects the k largest logits of each row and mixes their bank vectors with softmax weights. Weights and sums are
// float64 for float64 inputs, otherwise float32.
struct Admixture {
  Type type;            // of logits and bank
  Type candidate_type;  // i16 or i32
  Type out_type;
  const void* logits;      // (rows, columns)
  const void* bank;        // (vectors, length)
  const void* candidates;  // (rows, columns), or null: column j has bank vector j
  void* subvectors;        // (rows, length)
  int32_t* indices;        // (rows, k): columns of logits, best first
  void* weights;           // (rows, k)
  bool* exhausted;         // (rows), or null: set to true where the k-th largest logit is not above the last column's
  int64_t rows, columns, vectors, length, k;
};

// Mixes bank vectors by given indices and weights: the operator of a deployed adapter.
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

// Gradients of consecutive sub-vectors, (rows, length).
struct GradRun {
  const void* grads;
  int64_t begin, rows;
};

// The gradients of an Admixture. A null incoming gradient is zero; a null outgoing one is not computed.
struct AdmixtureBackward {
  Type type;                 // of bank, and of both outgoing gradients
  Type candidate_type;       // i16 or i32
  Type grad_type;            // of the sub-vectors' gradients
  const GradRun* grad_runs;  // (num_grad_runs), in host memory, in ascending order; zeros outside them
  int64_t num_grad_runs;
  const void* grad_weights;  // (rows, k), of the weights' type
  const int32_t* indices;    // (rows, k), distinct within a row, as an Admixture returns them
  const void* weights;       // (rows, k)
  const void* bank;          // (vectors, length)
  const void* candidates;    // (rows, columns), or null
  void* grad_logits;         // (rows, columns)
  void* grad_bank;           // (vectors, length)
  int64_t rows, columns, vectors, length, k;
};

// Adds low-rank updates to a layer's output, in place: y += (x A^T) B, with the factors of each row's adapter.
struct Update {
  Type type;                // of y, x, A and B
  void* y;                  // (rows, positions, out)
  const void* x;            // (rows, positions, in)
  const void* A;            // (adapters, rank, in); A_stride elements from one adapter to the next
  const void* B;            // (adapters, rank, out); B_stride likewise
  const int64_t* adapters;  // (rows), or null: all rows have adapter 0. A row of none in range keeps its bits.
  int64_t rows, positions, in, out, rank, count, A_stride, B_stride;  // count: of adapters
};

// The gradients of an Update without `adapters`, of the CPU alone. Those of the factors, and what is added to the
// gradient of x.
struct UpdateBackward {
  Type type;           // of all but the last two
  const void* grad_y;  // (rows, out)
  const void* x;       // (rows, in)
  const void* A;       // (rank, in)
  const void* B;       // (rank, out)
  void* grad_x;        // (rows, in), or null
  void* grad_A;        // (rank, in)
  void* grad_B;        // (rank, out)
  void* hidden;        // (rows, rank): x A^T, in the type of sums
  void* grad_hidden;   // (rows, rank)
  int64_t rows, in, out, rank;
};

// Initial logits (random.h): all numbers of a row, or the largest ones and their columns.
struct Draw {
  Type type;            // of logits
  Type candidate_type;  // i16 or i32
  void* logits;         // (rows, columns)
  void* candidates;     // (rows, columns), or null if columns equals vectors
  int64_t rows, columns, vectors;
  uint64_t seed;
  double std;
};

// Uniform random numbers (random.h).
struct UniformDraw {
  Type type;
  void* values;  // (rows, columns)
  int64_t rows, columns;
  uint64_t seed;
  uint32_t stream;
  double bound;
};

}  // namespace vblora
