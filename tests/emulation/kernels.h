// The launchers of csrc/cuda, callable from code that is not compiled like CUDA.
#pragma once

#include <stddef.h>

#include "problems.h"

namespace vblora_emulation {

void draw(const vblora::Draw& problem);
void draw_uniform(const vblora::UniformDraw& problem);
void admixture(const vblora::Admixture& problem);
void compose(const vblora::Composition& problem);
void add_updates(const vblora::Update& problem);
void admixture_backward(const vblora::AdmixtureBackward& problem, void* workspace);
// grad_bank alone, of candidates in int16 and gradients in bfloat16 (scatter.cuh).
void scatter(const vblora::AdmixtureBackward& problem);
size_t backward_workspace_bytes(const vblora::AdmixtureBackward& problem);

}  // namespace vblora_emulation
