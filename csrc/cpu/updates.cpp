#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../prepare.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

void add_updates(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                 const std::optional<Tensor>& adapters) {
  UpdateCall call = prepare_update(y, x, A, B, adapters);
  if (checked()) check_values(call);
  const Update& problem = call.problem;
  const int64_t work = problem.rank * (problem.in + problem.out);
  torch::stable::parallel_for(0, problem.rows * problem.positions, product_grain(work),
                              [&](int64_t begin, int64_t end) {
                                std::vector<double> scratch(static_cast<size_t>(kTogether * problem.rank));
                                kernels().add_updates(problem, begin, end, scratch.data());
                              });
  call.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) { m.impl("add_updates_", TORCH_BOX(&add_updates)); }

}  // namespace vblora::cpu
