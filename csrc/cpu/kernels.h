// The CPU kernels, compiled once per instruction set. The first call picks the best one that the machine supports;
// VBLORA_CPU_ISA=baseline|avx2|avx512 overrides it. All give the same bits.
#pragma once

#include "../problems.h"

namespace vblora::cpu {

constexpr int64_t kScratch = 5;  // doubles per entry of a row: value, vector, column, address, weight

constexpr int64_t kTogether = 2;  // rows that an update may take at a time

constexpr int64_t kDrawn = 256;  // words drawn at a time
// Capacity for a row's candidates before they are sorted, large enough that one sort usually suffices.
[[maybe_unused]] static inline int64_t draw_keys(int64_t columns) { return 2 * columns + kDrawn; }

// Lookup tables of a backward problem.
struct Entries {
  const void* const* grads;  // (rows): the gradient of each sub-vector, or null if it is zero; replaces grad_subvectors
  const int32_t* vectors;    // (rows, k): bank vectors; -1 if out of range or if the row has no gradient
};
// A range of bank vectors, with the workspace for their gradients.
struct BankPart {
  int64_t first, last;  // vectors [first, last)
  bool* reached;        // (last - first): whether a vector's sum has started; initially false
  int64_t* places;      // (rows per call * k + 1)
  void* sums;           // (last - first, length), float32; null if grad_bank has the accumulation type
};

struct Kernels {
  const char* name;
  // Rows [begin, end) of the problem. scratch: k * kScratch doubles.
  void (*admixture)(const Admixture&, int64_t begin, int64_t end, void* scratch);
  void (*compose)(const Composition&, int64_t begin, int64_t end, void* scratch);
  void (*backward_logits)(const AdmixtureBackward&, const Entries&, int64_t begin, int64_t end);
  // Adds the contribution of rows [begin, end) to a part's gradient; call it in ascending order of rows.
  void (*backward_bank)(const AdmixtureBackward&, const Entries&, const BankPart&, int64_t begin, int64_t end);
  void (*finish_bank)(const AdmixtureBackward&, const BankPart&);
  // Positions [begin, end) of all rows. scratch: kTogether * rank doubles.
  void (*add_updates)(const Update&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end) of the problem. scratch: 2 * draw_keys(columns) integers.
  void (*draw)(const Draw&, int64_t begin, int64_t end, uint64_t* scratch);
  // Rows [begin, end) of hidden, grad_hidden and grad_x; then columns [begin, end) of grad_A and grad_B side by side.
  void (*update_rows)(const UpdateBackward&, int64_t begin, int64_t end);
  void (*update_columns)(const UpdateBackward&, int64_t begin, int64_t end);
  void (*draw_uniform)(const UniformDraw&, int64_t begin, int64_t end);
};

const Kernels& kernels();

// The number of rows worth another thread, if a row takes about `work` elementary steps.
[[maybe_unused]] static inline int64_t grain(int64_t work) { return work >= 32768 ? 1 : 32768 / (work + 1) + 1; }

// The same for rows of which each takes `products` fused multiply-adds: a million of them take 20 to 50 us, and waking
// a thread takes that long, too.
[[maybe_unused]] static inline int64_t product_grain(int64_t products) { return (1 << 20) / (products + 1) + 1; }

}  // namespace vblora::cpu
