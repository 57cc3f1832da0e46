#include "arguments.h"

#include <torch/csrc/stable/device.h>

#include <algorithm>
#include <cctype>
#include <limits>

namespace vblora {

using torch::headeronly::DeviceType;

std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::ComplexHalf: return "torch.complex32";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    default: {  // the other names differ from Python's only in upper case
      std::string name = torch::headeronly::toString(type);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      return "torch." + name;
    }
  }
}

std::string device_name(const torch::stable::Device& device) {
  switch (device.type()) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::Meta: return "meta";
    case DeviceType::CUDA: return "cuda:" + std::to_string(device.index());
    default: return "device type " + std::to_string(static_cast<int>(device.type()));
  }
}

std::string shape_name(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

void Arguments::on_device(const char* name, const Tensor& tensor) const {
  if (tensor.device() == device_) return;  // the message takes longer than the check
  check(false, "`", name, "` is on ", device_name(tensor.device()), ", but must be on ", device_name(device_),
        ", the device of `", name_, "`.");
}

void Arguments::like(const char* name, const Tensor& tensor, const Tensor& other, const char* other_name) const {
  on_device(name, tensor);
  if (tensor.scalar_type() == other.scalar_type()) return;
  dtype(name, tensor.scalar_type(), other.scalar_type(), std::string("the dtype of `") + other_name + "`");
}

void Arguments::matrix(const char* name, const Tensor& tensor) const {
  on_device(name, tensor);
  check(tensor.dim() == 2, "`", name, "` has shape ", shape_name(tensor), ", but must have 2 dimensions.");
}

void Arguments::shape(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const char* source) const {
  matrix(name, tensor);
  check(tensor.size(0) == rows && tensor.size(1) == columns, "`", name, "` has shape ", shape_name(tensor),
        ", but must have (", rows, ", ", columns, "), ", source, ".");
}

void Arguments::dtype(const char* name, ScalarType type, ScalarType wanted, const std::string& source) const {
  check(type == wanted, "`", name, "` is ", dtype_name(type), ", but must be ", dtype_name(wanted), ", ", source, ".");
}

void Arguments::flags(const char* name, const Tensor& tensor, int64_t rows) const {
  on_device(name, tensor);
  check(tensor.dim() == 1 && tensor.size(0) == rows, "`", name, "` has shape ", shape_name(tensor), ", but must have (",
        rows, ",), the rows of `", name_, "`.");
  dtype(name, tensor.scalar_type(), ScalarType::Bool, "since it is written");
  check(tensor.is_contiguous(), "`", name, "` is not contiguous, but must be, since it is written.");
}

void Arguments::weights(const Tensor& weights, const Tensor& indices, const Tensor& bank) const {
  shape("weights", weights, indices.size(0), indices.size(1), "the shape of `indices`");
  dtype("weights", weights.scalar_type(), accumulation_dtype(bank.scalar_type()),
        "since `bank` is " + dtype_name(bank.scalar_type()));
}

void Arguments::between(const char* name, int64_t value, int64_t last) const {
  check(value >= 0 && value <= last, "`", name, "` is ", value, ", but must be between 0 and ", last, ".");
}

void Arguments::nonnegative(const char* name, double value) const {
  check(value >= 0 && value <= std::numeric_limits<double>::max(), "`", name, "` is ", value,
        ", but must be finite and not negative.");
}

void Arguments::limits(int64_t vectors, int64_t columns) const {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(vectors <= most, "`bank` has ", vectors, " vectors, but must have at most ", most, ".");
  check(columns <= most, "`logits` has ", columns, " columns, but must have at most ", most, ".");
}

Type Arguments::floating(const char* name, ScalarType type) const {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default:
      check(false, "`", name, "` is ", dtype_name(type),
            "; allowed are torch.float32, torch.float64, torch.bfloat16 and torch.float16.");
      return Type::f32;
  }
}

Type Arguments::candidate(const Tensor& tensor) const {
  switch (tensor.scalar_type()) {
    case ScalarType::Short: return Type::i16;
    case ScalarType::Int: return Type::i32;
    default:
      check(false, "`candidates` is ", dtype_name(tensor.scalar_type()), "; allowed are torch.int16 and torch.int32.");
      return Type::i32;
  }
}

Type Arguments::index(const Tensor& tensor) const {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte: return Type::u8;
    case ScalarType::Short: return Type::i16;
    case ScalarType::Int: return Type::i32;
    case ScalarType::Long: return Type::i64;
    default:
      check(false, "`indices` is ", dtype_name(tensor.scalar_type()),
            "; allowed are torch.uint8, torch.int16, torch.int32 and torch.int64.");
      return Type::i32;
  }
}

}  // namespace vblora
