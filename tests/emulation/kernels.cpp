#include "kernels.h"

#include "cuda/admixture.cuh"
#include "cuda/admixture_backward.cuh"
#include "cuda/compose.cuh"
#include "cuda/draw.cuh"
#include "cuda/updates.cuh"
#include "scatter.cuh"

namespace vblora_emulation {

void admixture(const vblora::Admixture& problem) { vblora::cuda::launch_admixture(problem, nullptr); }

void compose(const vblora::Composition& problem) { vblora::cuda::launch_compose(problem, nullptr); }

void draw(const vblora::Draw& problem) { vblora::cuda::launch_draw(problem, nullptr); }

void draw_uniform(const vblora::UniformDraw& problem) { vblora::cuda::launch_uniform_draw(problem, nullptr); }

void add_updates(const vblora::Update& problem) { vblora::cuda::launch_updates(problem, nullptr); }

void admixture_backward(const vblora::AdmixtureBackward& problem, void* workspace) {
  vblora::cuda::launch_admixture_backward(problem, workspace, nullptr);
}

void scatter(const vblora::AdmixtureBackward& problem) {
  using vblora::cuda::grid_size, vblora::cuda::kThreads, vblora::cuda::kWarps;
  const int64_t count = problem.vectors * problem.length;
  VBLORA_LAUNCH_OR_THROW(zero_kernel, grid_size(count, kThreads, "elements"), kThreads, 0, nullptr,
                         static_cast<float*>(problem.grad_bank), count);
  VBLORA_LAUNCH_OR_THROW(scatter_kernel, grid_size(problem.rows, kWarps, "rows"), kThreads, 0, nullptr, problem,
                         problem.grad_runs->grads);
}

size_t backward_workspace_bytes(const vblora::AdmixtureBackward& problem) {
  return vblora::cuda::backward_workspace_bytes(problem);
}

}  // namespace vblora_emulation
