#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "isa/rows.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kColumns = 64;  // no narrower part of a bank vector is a task of its own

// Entries by bank vector, by counting: those of a vector stay in their order.
class Sorter {
 public:
  Sorter(const AdmixtureBackward& problem, const void* const* grads)
      : begins_(static_cast<size_t>(problem.vectors) + 1) {
    const int64_t count = problem.rows * problem.k;
    vectors_.reset(new int32_t[count]);
    torch::stable::parallel_for(0, problem.rows, grain(32 * problem.k), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t place = row * problem.k; place < (row + 1) * problem.k; ++place) {
          const int64_t vector = vector_of(problem, row, problem.indices[place]);
          const bool counts = grads[row] && vector >= 0 && vector < problem.vectors;
          vectors_[place] = counts ? static_cast<int32_t>(vector) : -1;
        }
    });
    for (int64_t place = 0; place < count; ++place)
      if (vectors_[place] >= 0) ++begins_[vectors_[place] + 1];
    std::partial_sum(begins_.begin(), begins_.end(), begins_.begin());
    entries_.reset(new Entry[begins_.back()]);
    std::vector<int64_t> next(begins_.begin(), begins_.end() - 1);
    for (int64_t row = 0, place = 0; row < problem.rows; ++row)
      for (int64_t j = 0; j < problem.k; ++j, ++place)
        if (vectors_[place] >= 0) entries_[next[vectors_[place]]++] = {grads[row], place};
  }

  SortedEntries sorted() const { return {begins_.data(), entries_.get()}; }

  // The first vector of part `i` of `parts`, which have about as much to do each.
  int64_t first_vector(int64_t i, int64_t parts) const {
    const int64_t vectors = static_cast<int64_t>(begins_.size()) - 1;
    const int64_t wanted = (begins_.back() + vectors) * i / parts;  // a vector without entries is work, too
    int64_t low = 0, high = vectors;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (begins_[middle] + middle < wanted) low = middle + 1;
      else high = middle;
    }
    return low;
  }

 private:
  std::vector<int64_t> begins_;
  std::unique_ptr<int32_t[]> vectors_;
  std::unique_ptr<Entry[]> entries_;
};

void backward_bank(const AdmixtureBackward& problem, const void* const* grads) {
  if (problem.length == 0) return;
  const Sorter sorter(problem, grads);
  const SortedEntries sorted = sorter.sorted();
  // By columns first: threads have the same to do then, however popular some vector is.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t columns = std::max((problem.length / threads + kColumns - 1) / kColumns, int64_t{1}) * kColumns;
  const int64_t slices = (problem.length + columns - 1) / columns, groups = (threads + slices - 1) / slices;
  const int64_t work = (problem.rows * problem.k + problem.vectors) * problem.length / (slices * groups);
  torch::stable::parallel_for(0, slices * groups, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / groups, group = task % groups;
      kernels().backward_bank(problem, sorted,
                              {sorter.first_vector(group, groups), sorter.first_vector(group + 1, groups),
                               slice * columns, std::min((slice + 1) * columns, problem.length)});
    }
  });
}

// Where the gradient of each row's sub-vector stands, or null: it is zero.
std::vector<const void*> rows_of(const AdmixtureBackwardCall& call, const std::vector<int64_t>& begins) {
  const AdmixtureBackward& problem = call.problem;
  std::vector<const void*> grads(static_cast<size_t>(problem.rows));
  const auto point_into = [&](const Tensor& tensor, int64_t begin) {
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t bytes = problem.length * static_cast<int64_t>(tensor.element_size());
    for (int64_t row = 0; row < tensor.size(0); ++row) grads[begin + row] = data + row * bytes;
  };
  if (call.grad_subvectors) point_into(*call.grad_subvectors, 0);
  for (size_t i = 0; i < call.grad_parts.size(); ++i) point_into(call.grad_parts[i], begins[i]);
  return grads;
}

std::tuple<Tensor, Tensor> run(const AdmixtureBackwardCall& call, const std::vector<int64_t>& begins, bool need_logits,
                               bool need_bank) {
  if (checked()) check_values(call);
  const AdmixtureBackward& problem = call.problem;
  const std::vector<const void*> grads = rows_of(call, begins);
  if (need_logits)
    torch::stable::parallel_for(
        0, problem.rows, grain(problem.columns + problem.k * problem.length),
        [&](int64_t begin, int64_t end) { kernels().backward_logits(problem, grads.data(), begin, end); });
  if (need_bank) backward_bank(problem, grads.data());
  return {call.grad_logits, call.grad_bank};
}

std::tuple<Tensor, Tensor> admixture_backward(const std::optional<Tensor>& grad_subvectors,
                                              const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                              const Tensor& weights, const Tensor& bank,
                                              const std::optional<Tensor>& candidates, int64_t num_candidates,
                                              bool need_logits, bool need_bank) {
  return run(prepare_admixture_backward(grad_subvectors, grad_weights, indices, weights, bank, candidates,
                                        num_candidates, need_logits, need_bank),
             {}, need_logits, need_bank);
}

std::tuple<Tensor, Tensor> admixture_backward_parts(std::vector<Tensor> grad_parts, std::vector<int64_t> begins,
                                                    const Tensor& indices, const Tensor& weights, const Tensor& bank,
                                                    const std::optional<Tensor>& candidates, int64_t num_candidates,
                                                    bool need_logits, bool need_bank) {
  return run(prepare_admixture_backward_parts(grad_parts, begins, indices, weights, bank, candidates, num_candidates,
                                              need_logits, need_bank),
             begins, need_logits, need_bank);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) {
  m.impl("admixture_backward", TORCH_BOX(&admixture_backward));
  m.impl("admixture_backward_parts", TORCH_BOX(&admixture_backward_parts));
}

}  // namespace vblora::cpu
