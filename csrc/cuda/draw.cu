#include <torch/csrc/stable/library.h>

#include "../prepare.h"
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

void draw_uniform(const Tensor& values, int64_t seed, int64_t stream, double bound) {
  const CurrentStream current(values);
  UniformDrawCall call = prepare_uniform_draw(values, seed, stream, bound);
  launch_uniform_draw(call.problem, current);
  call.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CUDA, m) {
  m.impl("draw_logits_", TORCH_BOX(&draw_logits));
  m.impl("draw_uniform_", TORCH_BOX(&draw_uniform));
}

}  // namespace vblora::cuda
