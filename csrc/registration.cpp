// The operators' schemas, and the Python module with its build information.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "outputs.h"

STABLE_TORCH_LIBRARY(vblora, m) {
  m.def(
      "admixture(Tensor logits, Tensor bank, Tensor? candidates, int k, ScalarType? out_dtype=None)"
      " -> (Tensor subvectors, Tensor indices, Tensor weights)");
  m.def(
      "admixture_parts(Tensor logits, Tensor bank, Tensor? candidates, int k, ScalarType? out_dtype, int[] sizes,"
      " int ranks) -> (Tensor[] parts, Tensor indices, Tensor weights, Tensor exhausted)");
  m.def(
      "admixture_backward(Tensor? grad_subvectors, Tensor? grad_weights, Tensor indices, Tensor weights, Tensor bank,"
      " Tensor? candidates, SymInt num_candidates, bool need_logits, bool need_bank)"
      " -> (Tensor grad_logits, Tensor grad_bank)");
  m.def(
      "admixture_backward_parts(Tensor[] grad_parts, int[] begins, Tensor indices, Tensor weights, Tensor bank,"
      " Tensor? candidates, SymInt num_candidates, bool need_logits, bool need_bank)"
      " -> (Tensor grad_logits, Tensor grad_bank)");
  m.def("compose(Tensor bank, Tensor indices, Tensor weights, ScalarType? out_dtype=None) -> Tensor");
  m.def("draw_logits_(Tensor(a!) logits, Tensor(b!)? candidates, SymInt num_vectors, int seed, float std) -> ()");
  m.def("draw_uniform_(Tensor(a!) values, int seed, int stream, float bound) -> ()");
}

PYBIND11_MODULE(_C, m) {
  m.def("empty_cache", &vblora::empty_cache);
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = VBLORA_VERSION;
    info["compiler"] = VBLORA_COMPILER;
    info["torch_target"] = VBLORA_TORCH_TARGET;
    info["built_with_torch"] = VBLORA_BUILD_TORCH;
    info["cuda"] = VBLORA_CUDA_VERSION;
    info["cuda_architectures"] = VBLORA_CUDA_ARCHS;
    info["cpu_instruction_set"] = vblora::cpu::kernels().name;
    info["debug"] = VBLORA_DEBUG != 0;
    return info;
  });
}
