// The CPU kernels, compiled once an instruction set; the best that this machine has is chosen once, when first asked
// for. VBLORA_CPU_ISA=baseline|avx2|avx512 overrides. Results have the same bits on each.
#pragma once

#include "../problems.h"

namespace vblora::cpu {

constexpr int64_t kScratch = 5;  // doubles that a row's entry needs: value, vector, column, address, weight

constexpr int64_t kDrawn = 256;  // words of a row that are drawn at once
// Candidates of a row that are kept until they are sorted: enough that this is rarely more than once.
[[maybe_unused]] static inline int64_t draw_keys(int64_t columns) { return 2 * columns + kDrawn; }

// Of a backward problem: grads, of each row where the gradient of its sub-vector stands, or null: it is zero. That
// stands for the problem's grad_subvectors. vectors: of each entry (row * k + j) the bank vector, or -1: out of range,
// or its row has no gradient.
struct Entries {
  const void* const* grads;
  const int32_t* vectors;
};
// Some of the bank's vectors, and what their gradients take.
struct BankPart {
  int64_t first, last;  // vectors
  bool* reached;        // (last - first): which have been added to; all false in the beginning
  int64_t* places;      // room for the entries of as many rows as are added at once, and one
  void* sums;           // (last - first, length) in float32; null: grad_bank itself is of the accumulator's type
};

struct Kernels {
  const char* name;
  // Rows [begin, end) of the problem. scratch: k * kScratch doubles.
  void (*admixture)(const Admixture&, int64_t begin, int64_t end, void* scratch);
  void (*compose)(const Composition&, int64_t begin, int64_t end, void* scratch);
  void (*backward_logits)(const AdmixtureBackward&, const Entries&, int64_t begin, int64_t end);
  // To a part's gradient what rows [begin, end) contribute; rows are to come in order.
  void (*backward_bank)(const AdmixtureBackward&, const Entries&, const BankPart&, int64_t begin, int64_t end);
  void (*finish_bank)(const AdmixtureBackward&, const BankPart&);
  // Rows [begin, end) of the problem. scratch: 2 * draw_keys(columns) integers.
  void (*draw)(const Draw&, int64_t begin, int64_t end, uint64_t* scratch);
  void (*draw_uniform)(const UniformDraw&, int64_t begin, int64_t end);
};

const Kernels& kernels();

// Rows that make a task worth another thread, when a row costs about `work` elementary steps.
[[maybe_unused]] static inline int64_t grain(int64_t work) { return work >= 32768 ? 1 : 32768 / (work + 1) + 1; }

}  // namespace vblora::cpu
