// VBLORA_CHECKED=1: the values of the arguments, checked on the CPU.
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string_view>

#include "arguments.h"
#include "prepare.h"

namespace vblora {

bool checked() {
  const char* value = std::getenv("VBLORA_CHECKED");
  return value && *value && std::string_view(value) != "0";
}

namespace {

Tensor on_cpu(const Tensor& tensor) {
  return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

template <class T>
void check_range(const Arguments& arguments, const char* name, const Tensor& tensor, int64_t end) {
  const Tensor host = on_cpu(tensor);
  const T* values = static_cast<const T*>(host.const_data_ptr());
  const int64_t columns = host.size(1);
  for (int64_t i = 0; i < host.numel(); ++i) {
    const int64_t value = values[i];
    arguments.check(value >= 0 && value < end, "`", name, "` holds ", value, " at row ", i / columns, ", column ",
                    i % columns, "; allowed are 0 to ", end - 1, ".");
  }
}

void check_indices(const Arguments& arguments, const char* name, const Tensor& tensor, int64_t end) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte: return check_range<uint8_t>(arguments, name, tensor, end);
    case ScalarType::Short: return check_range<int16_t>(arguments, name, tensor, end);
    case ScalarType::Int: return check_range<int32_t>(arguments, name, tensor, end);
    default: return check_range<int64_t>(arguments, name, tensor, end);
  }
}

void check_numbers(const Arguments& arguments, const char* name, const Tensor& tensor, int64_t columns) {
  const Tensor host = torch::stable::to(on_cpu(tensor), ScalarType::Double);
  const double* values = static_cast<const double*>(host.const_data_ptr());
  for (int64_t i = 0; i < host.numel(); ++i)
    arguments.check(values[i] == values[i], "`", name, "` holds NaN at row ", i / columns, ", column ", i % columns,
                    ".");
}

void check_numbers(const Arguments& arguments, const char* name, const Tensor& matrix) {
  check_numbers(arguments, name, matrix, matrix.size(1));
}

}  // namespace

void check_values(const AdmixtureCall& call) {
  const Arguments arguments("admixture", "logits", call.logits);
  check_numbers(arguments, "logits", call.logits);
  check_numbers(arguments, "bank", call.bank);
  if (call.candidates) check_indices(arguments, "candidates", *call.candidates, call.problem.vectors);
}

void check_values(const CompositionCall& call) {
  const Arguments arguments("compose", "bank", call.bank);
  check_numbers(arguments, "bank", call.bank);
  check_numbers(arguments, "weights", call.weights);
  check_indices(arguments, "indices", call.indices, call.problem.vectors);
}

void check_values(const UpdateCall& call) {
  if (!call.adapters) return;
  const Arguments arguments("add_updates_", "adapters", *call.adapters);
  const Tensor host = on_cpu(*call.adapters);
  const int64_t* values = static_cast<const int64_t*>(host.const_data_ptr());
  for (int64_t i = 0; i < host.numel(); ++i)
    arguments.check(values[i] >= -1 && values[i] < call.problem.count, "`adapters` holds ", values[i], " at row ", i,
                    "; allowed are 0 to ", call.problem.count - 1, ", and -1 for a row without an adapter.");
}

void check_values(const AdmixtureBackwardCall& call) {
  const Arguments arguments("admixture_backward", "indices", call.indices);
  if (call.grad_subvectors) check_numbers(arguments, "grad_subvectors", *call.grad_subvectors);
  for (const Tensor& part : call.grad_parts) check_numbers(arguments, "grad_parts", part, call.problem.length);
  check_numbers(arguments, "bank", call.bank);
  check_indices(arguments, "indices", call.indices, call.problem.columns);
  if (call.candidates) check_indices(arguments, "candidates", *call.candidates, call.problem.vectors);
}

}  // namespace vblora
