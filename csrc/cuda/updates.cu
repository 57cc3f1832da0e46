#include <torch/csrc/stable/library.h>

#include "../prepare.h"
#include "stream.h"
#include "updates.cuh"

namespace vblora::cuda {
namespace {

void add_updates(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                 const std::optional<Tensor>& adapters) {
  const CurrentStream stream(y);
  UpdateCall call = prepare_update(y, x, A, B, adapters);
  if (checked()) check_values(call);
  launch_updates(call.problem, stream);
  call.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CUDA, m) { m.impl("add_updates_", TORCH_BOX(&add_updates)); }

}  // namespace vblora::cuda
