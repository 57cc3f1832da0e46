// The CPU kernels, compiled once an instruction set; the best that this machine has is chosen once, when first asked
// for. VBLORA_CPU_ISA=baseline|avx2|avx512 overrides. Results have the same bits on each.
#pragma once

#include "../admixture.h"

namespace vblora::cpu {

constexpr int64_t kScratch = 5;  // doubles that a row's entry needs: value, vector, column, address, weight

constexpr int64_t kDrawn = 256;  // words of a row that are drawn at once
// Candidates of a row that are kept until they are sorted: enough that this is rarely more than once.
[[maybe_unused]] static inline int64_t draw_keys(int64_t columns) { return 2 * columns + kDrawn; }

struct Kernels {
  const char* name;
  // Rows [begin, end) of the problem. scratch: k * kScratch doubles.
  void (*admixture)(const Admixture&, int64_t begin, int64_t end, void* scratch);
  void (*compose)(const Composition&, int64_t begin, int64_t end, void* scratch);
  void (*backward_logits)(const AdmixtureBackward&, int64_t begin, int64_t end);
  // Columns [begin, end) of grad_bank. scratch: (vectors, end - begin) accumulators.
  void (*backward_bank)(const AdmixtureBackward&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end) of the problem. scratch: 2 * draw_keys(columns) integers.
  void (*draw)(const Draw&, int64_t begin, int64_t end, uint64_t* scratch);
  void (*draw_uniform)(const UniformDraw&, int64_t begin, int64_t end);
};

const Kernels& kernels();

// Rows that make a task worth another thread, when a row costs about `work` elementary steps.
[[maybe_unused]] static inline int64_t grain(int64_t work) { return work >= 32768 ? 1 : 32768 / (work + 1) + 1; }

}  // namespace vblora::cpu
