#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../prepare.h"
#include "isa/rows.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

// Sized to fit in a cache.
constexpr int64_t kSums = 1 << 19;  // elements of a part of the bank
constexpr int64_t kRows = 1024;     // rows whose gradients are read twice, for the logits and for the bank

// Each entry's bank vector, or -1 if it is out of range or its row has no gradient.
std::unique_ptr<int32_t[]> vectors_of(const AdmixtureBackward& problem, const void* const* grads) {
  std::unique_ptr<int32_t[]> vectors(new int32_t[problem.rows * problem.k]);
  torch::stable::parallel_for(0, problem.rows, grain(32 * problem.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t entry = row * problem.k; entry < (row + 1) * problem.k; ++entry) {
        const int64_t vector = vector_of(problem, row, problem.indices[entry]);
        vectors[entry] = grads[row] && vector >= 0 && vector < problem.vectors ? static_cast<int32_t>(vector) : -1;
      }
  });
  return vectors;
}

// Splits the bank into ranges of vectors with about equal work.
class Parts {
 public:
  Parts(const AdmixtureBackward& problem, const Entries& entries)
      : before_(static_cast<size_t>(problem.vectors) + 1),
        count_(std::max<int64_t>(torch::stable::get_num_threads(), problem.vectors * problem.length / kSums)) {
    if (!problem.grad_bank) return;
    for (int64_t place = 0; place < problem.rows * problem.k; ++place)
      if (entries.vectors[place] >= 0) ++before_[entries.vectors[place] + 1];
    std::partial_sum(before_.begin(), before_.end(), before_.begin());
  }

  int64_t count() const { return count_; }

  // The first vector of part i.
  int64_t begin(int64_t i) const {
    const int64_t vectors = static_cast<int64_t>(before_.size()) - 1;
    const int64_t wanted = (before_.back() + vectors) * i / count_;  // a vector without entries takes time, too
    int64_t low = 0, high = vectors;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before_[middle] + middle < wanted) low = middle + 1;
      else high = middle;
    }
    return low;
  }

 private:
  std::vector<int64_t> before_;  // number of entries of all vectors before each one
  int64_t count_;
};

// Computes both gradients in blocks of rows. Each task has a part of the bank and an equal share of the logits' rows.
void backward(const AdmixtureBackward& problem, const Entries& entries) {
  const Parts parts(problem, entries);
  const int64_t vectors = problem.grad_bank ? problem.vectors : 0;
  const int64_t columns = problem.grad_logits ? problem.columns : 0;
  const int64_t work =
      (problem.rows * (columns + 2 * problem.k * problem.length) + vectors * problem.length) / parts.count();
  torch::stable::parallel_for(0, parts.count(), grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = parts.begin(i), count = parts.begin(i + 1) - first;
      const std::unique_ptr<bool[]> reached(new bool[count]());
      const std::unique_ptr<int64_t[]> places(new int64_t[std::min(kRows, problem.rows) * problem.k + 1]);
      const bool half = problem.type == Type::bf16 || problem.type == Type::f16;
      const std::unique_ptr<float[]> sums(problem.grad_bank && half ? new float[count * problem.length] : nullptr);
      const BankPart part{first, first + count, reached.get(), places.get(), sums.get()};
      for (int64_t row = 0; row < problem.rows; row += kRows) {
        const int64_t rows = std::min(kRows, problem.rows - row);
        if (problem.grad_logits)
          kernels().backward_logits(problem, entries, row + rows * i / parts.count(),
                                    row + rows * (i + 1) / parts.count());
        if (problem.grad_bank) kernels().backward_bank(problem, entries, part, row, row + rows);
      }
      if (problem.grad_bank) kernels().finish_bank(problem, part);
    }
  });
}

// The address of each sub-vector's gradient, or null if it is zero.
std::vector<const void*> rows_of(const AdmixtureBackward& problem) {
  std::vector<const void*> grads(static_cast<size_t>(problem.rows));
  const int64_t bytes = problem.length * size_of(problem.grad_type);
  for (const GradRun* run = problem.grad_runs; run < problem.grad_runs + problem.num_grad_runs; ++run)
    for (int64_t row = 0; row < run->rows; ++row)
      grads[run->begin + row] = static_cast<const char*>(run->grads) + row * bytes;
  return grads;
}

std::tuple<Tensor, Tensor> run(const AdmixtureBackwardCall& call) {
  if (checked()) check_values(call);
  const AdmixtureBackward& problem = call.problem;
  const std::vector<const void*> grads = rows_of(problem);
  const std::unique_ptr<int32_t[]> vectors = vectors_of(problem, grads.data());
  backward(problem, {grads.data(), vectors.get()});
  return {call.grad_logits, call.grad_bank};
}

std::tuple<Tensor, Tensor> admixture_backward(const std::optional<Tensor>& grad_subvectors,
                                              const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                              const Tensor& weights, const Tensor& bank,
                                              const std::optional<Tensor>& candidates, int64_t num_candidates,
                                              bool need_logits, bool need_bank) {
  return run(prepare_admixture_backward(grad_subvectors, grad_weights, indices, weights, bank, candidates,
                                        num_candidates, need_logits, need_bank));
}

std::tuple<Tensor, Tensor> admixture_backward_parts(std::vector<Tensor> grad_parts, std::vector<int64_t> begins,
                                                    const Tensor& indices, const Tensor& weights, const Tensor& bank,
                                                    const std::optional<Tensor>& candidates, int64_t num_candidates,
                                                    bool need_logits, bool need_bank) {
  return run(prepare_admixture_backward_parts(grad_parts, begins, indices, weights, bank, candidates, num_candidates,
                                              need_logits, need_bank));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) {
  m.impl("admixture_backward", TORCH_BOX(&admixture_backward));
  m.impl("admixture_backward_parts", TORCH_BOX(&admixture_backward_parts));
}

}  // namespace vblora::cpu
