// The CPU kernels, compiled once an instruction set; the best that this machine has is chosen once, when first asked
// for. VBLORA_CPU_ISA=baseline|avx2|avx512 overrides. Results have the same bits on each.
#pragma once

#include "../admixture.h"

namespace vblora::cpu {

constexpr int64_t kScratch = 5;  // doubles that a row's entry needs: value, vector, column, address, weight

constexpr int64_t kDrawn = 256;  // words of a row that are drawn at once
// Candidates of a row that are kept until they are sorted: enough that this is rarely more than once.
[[maybe_unused]] static inline int64_t draw_keys(int64_t columns) { return 2 * columns + kDrawn; }

// What a backward problem's rows were mixed from, put in order: of each bank vector its entries, rows ascending.
// Without those that are out of range.
struct Entry {
  const void* grad;  // of its row
  int64_t place;     // row * k + j, where its weight stands
};
struct SortedEntries {
  const int64_t* begins;  // (vectors + 1), where those of each vector begin
  const Entry* entries;
};
// Of grad_bank: vectors [first, last), of each columns [first, last).
struct BankPart {
  int64_t first_vector, last_vector, first_column, last_column;
};

struct Kernels {
  const char* name;
  // Rows [begin, end) of the problem. scratch: k * kScratch doubles.
  void (*admixture)(const Admixture&, int64_t begin, int64_t end, void* scratch);
  void (*compose)(const Composition&, int64_t begin, int64_t end, void* scratch);
  // grads: of each row the gradient of its sub-vector, or null: zero. Stands for the problem's grad_subvectors.
  void (*backward_logits)(const AdmixtureBackward&, const void* const* grads, int64_t begin, int64_t end);
  void (*backward_bank)(const AdmixtureBackward&, const SortedEntries&, const BankPart&);
  // Rows [begin, end) of the problem. scratch: 2 * draw_keys(columns) integers.
  void (*draw)(const Draw&, int64_t begin, int64_t end, uint64_t* scratch);
  void (*draw_uniform)(const UniformDraw&, int64_t begin, int64_t end);
};

const Kernels& kernels();

// Rows that make a task worth another thread, when a row costs about `work` elementary steps.
[[maybe_unused]] static inline int64_t grain(int64_t work) { return work >= 32768 ? 1 : 32768 / (work + 1) + 1; }

}  // namespace vblora::cpu
