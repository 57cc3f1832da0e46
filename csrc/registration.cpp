// The operators' schemas, and the two functions that Python calls by name.
#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

#include "cpu/kernels.h"
#include "outputs.h"

STABLE_TORCH_LIBRARY(vblora, m) {
  m.def(
      "admixture(Tensor logits, Tensor bank, Tensor? candidates, int k, ScalarType? out_dtype=None)"
      " -> (Tensor subvectors, Tensor indices, Tensor weights)");
  m.def(
      "admixture_parts(Tensor logits, Tensor bank, Tensor? candidates, Tensor(a!)? exhausted, int k,"
      " ScalarType? out_dtype, int[] sizes, int ranks) -> (Tensor[] parts, Tensor indices, Tensor weights)");
  m.def(
      "admixture_backward(Tensor? grad_subvectors, Tensor? grad_weights, Tensor indices, Tensor weights, Tensor bank,"
      " Tensor? candidates, SymInt num_candidates, bool need_logits, bool need_bank)"
      " -> (Tensor grad_logits, Tensor grad_bank)");
  m.def(
      "admixture_backward_parts(Tensor[] grad_parts, int[] begins, Tensor indices, Tensor weights, Tensor bank,"
      " Tensor? candidates, SymInt num_candidates, bool need_logits, bool need_bank)"
      " -> (Tensor grad_logits, Tensor grad_bank)");
  m.def("compose(Tensor bank, Tensor indices, Tensor weights, ScalarType? out_dtype=None) -> Tensor");
  m.def("add_updates_(Tensor(a!) y, Tensor x, Tensor A, Tensor B, Tensor? adapters=None) -> ()");
  m.def(
      "low_rank_backward(Tensor grad_y, Tensor x, Tensor A, Tensor B, Tensor(a!)? grad_x=None)"
      " -> (Tensor grad_A, Tensor grad_B)");
  m.def("draw_logits_(Tensor(a!) logits, Tensor(b!)? candidates, SymInt num_vectors, int seed, float std) -> ()");
  m.def("draw_uniform_(Tensor(a!) values, int seed, int stream, float bound) -> ()");
}

#define VBLORA_EXPORT extern "C" __attribute__((visibility("default")))

VBLORA_EXPORT void vblora_empty_cache() noexcept { vblora::empty_cache(); }

// Lines of name=value, or one line with an error.
VBLORA_EXPORT const char* vblora_build_info() noexcept {
  static const std::string info = []() -> std::string {
    try {
      return std::string("version=" VBLORA_VERSION "\ncompiler=" VBLORA_COMPILER "\ntorch_target=" VBLORA_TORCH_TARGET
                         "\nbuilt_with_torch=" VBLORA_BUILD_TORCH "\ncuda=" VBLORA_CUDA_VERSION
                         "\ncuda_architectures=" VBLORA_CUDA_ARCHS "\ncpu_instruction_set=") +
             vblora::cpu::kernels().name + "\ndebug=" + (VBLORA_DEBUG ? "1" : "0");
    } catch (const std::exception& error) {
      return std::string("error=") + error.what();
    }
  }();
  return info.c_str();
}
