// Checks of an operator's arguments. vblora/arguments.py makes the same checks for tracing and the oracle, in the same
// order and with the same messages; tests/ops/test_arguments.py compares them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "problems.h"

namespace vblora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As Python prints them: "torch.float32", "cuda:0", "(6, 9)".
std::string dtype_name(ScalarType type);
std::string device_name(const torch::stable::Device& device);
std::string shape_name(const Tensor& tensor);

// The dtype of weights and of sums, given the bank's.
inline ScalarType accumulation_dtype(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

class Arguments {
 public:
  // All tensors must be on the device of the first one.
  Arguments(const char* op, const char* name, const Tensor& first) : op_(op), name_(name), device_(first.device()) {}

  template <class... Parts>
  void check(bool holds, const Parts&... parts) const {
    if (holds) return;
    std::ostringstream message;
    message << "vblora::" << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());  // torch passes the message on unchanged
  }

  void on_device(const char* name, const Tensor& tensor) const;
  // On the same device as, and with the dtype of, another argument.
  void like(const char* name, const Tensor& tensor, const Tensor& other, const char* other_name) const;
  void matrix(const char* name, const Tensor& tensor) const;
  // `source` says where the required shape or dtype comes from.
  void shape(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const char* source) const;
  void dtype(const char* name, ScalarType type, ScalarType wanted, const std::string& source) const;
  // Booleans, one for each of `rows`, that the operator writes.
  void flags(const char* name, const Tensor& tensor, int64_t rows) const;
  void weights(const Tensor& weights, const Tensor& indices, const Tensor& bank) const;
  void between(const char* name, int64_t value, int64_t last) const;
  void nonnegative(const char* name, double value) const;
  // The kernels count vectors and columns in 32 bits.
  void limits(int64_t vectors, int64_t columns) const;

  Type floating(const char* name, ScalarType type) const;
  Type candidate(const Tensor& tensor) const;
  Type index(const Tensor& tensor) const;

 private:
  const char* op_;
  const char* name_;
  torch::stable::Device device_;
};

}  // namespace vblora
