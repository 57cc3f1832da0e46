#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "draw.cuh"
#include "stream.h"

namespace vblora::cuda {
namespace {

void draw_logits(const Tensor& logits, const std::optional<Tensor>& candidates, int64_t num_vectors, int64_t seed,
                 double std) {
  const CurrentStream stream(logits);
  DrawCall call = prepare_draw(logits, candidates, num_vectors, seed, std);
  launch_draw(call.problem, stream);
  call.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CUDA, m) { m.impl("draw_logits_", TORCH_BOX(&draw_logits)); }

}  // namespace vblora::cuda
