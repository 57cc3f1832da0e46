#include "kernels.h"

#include "cuda/admixture.cuh"
#include "cuda/admixture_backward.cuh"
#include "cuda/compose.cuh"
#include "cuda/draw.cuh"

namespace vblora_emulation {

void admixture(const vblora::Admixture& problem) { vblora::cuda::launch_admixture(problem, nullptr); }

void compose(const vblora::Composition& problem) { vblora::cuda::launch_compose(problem, nullptr); }

void draw(const vblora::Draw& problem) { vblora::cuda::launch_draw(problem, nullptr); }

void draw_uniform(const vblora::UniformDraw& problem) { vblora::cuda::launch_uniform_draw(problem, nullptr); }

void admixture_backward(const vblora::AdmixtureBackward& problem, void* workspace) {
  vblora::cuda::launch_admixture_backward(problem, workspace, nullptr);
}

size_t backward_workspace_bytes(const vblora::AdmixtureBackward& problem) {
  return vblora::cuda::backward_workspace_bytes(problem);
}

}  // namespace vblora_emulation
