#include "prepare.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "numeric.h"
#include "outputs.h"

namespace vblora {
namespace {

using torch::headeronly::DeviceType;

// The name by which a user of Python knows a dtype.
const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(type);
  }
}

std::string device_name(const torch::stable::Device& device) {
  if (device.type() == DeviceType::CPU) return "the CPU";
  const std::string kind = device.type() == DeviceType::CUDA ? "cuda:" : "device ";
  return kind + std::to_string(device.index());
}

std::string shape(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

// Checks of one operator's arguments, each named in what it says.
struct Arguments {
  const char* op;
  torch::stable::Device device;  // of the first argument; all others must be there too

  template <class... Parts>
  void check(bool holds, const char* name, const Parts&... parts) const {
    if (holds) return;
    std::ostringstream message;
    message << "vblora::" << op << ": `" << name << "` ";
    (message << ... << parts);
    throw std::runtime_error(message.str());  // torch hands it on as it is
  }

  void matrix(const char* name, const Tensor& tensor) const {
    check(tensor.device() == device, name, "is on ", device_name(tensor.device()), ", but must be on ",
          device_name(device), " as the first argument is.");
    check(tensor.dim() == 2, name, "must have 2 dimensions, but has shape ", shape(tensor), ".");
  }
  void sizes(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const char* why) const {
    matrix(name, tensor);
    check(tensor.size(0) == rows && tensor.size(1) == columns, name, "has shape ", shape(tensor), ", but must be (",
          rows, ", ", columns, "): ", why, ".");
  }
  void dtype(const char* name, const Tensor& tensor, ScalarType wanted, const char* why) const {
    check(tensor.scalar_type() == wanted, name, "is ", dtype_name(tensor.scalar_type()), ", but must be ",
          dtype_name(wanted), ": ", why, ".");
  }
  Type floating(const char* name, ScalarType type) const {
    switch (type) {
      case ScalarType::Float: return Type::f32;
      case ScalarType::Double: return Type::f64;
      case ScalarType::BFloat16: return Type::bf16;
      case ScalarType::Half: return Type::f16;
      default:
        check(false, name, "is ", dtype_name(type), "; allowed are float32, float64, bfloat16 and float16.");
        return Type::f32;
    }
  }
  Type candidate(const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Short: return Type::i16;
      case ScalarType::Int: return Type::i32;
      default:
        check(false, "candidates", "is ", dtype_name(tensor.scalar_type()), "; allowed are int16 and int32.");
        return Type::i32;
    }
  }
  Type index(const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Byte: return Type::u8;
      case ScalarType::Short: return Type::i16;
      case ScalarType::Int: return Type::i32;
      case ScalarType::Long: return Type::i64;
      default:
        check(false, "indices", "is ", dtype_name(tensor.scalar_type()),
              "; allowed are uint8, int16, int32 and int64.");
        return Type::i32;
    }
  }
  void limits(int64_t vectors, int64_t columns) const {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    check(vectors <= most, "bank", "has ", vectors, " vectors; at most ", most, " are supported.");
    check(columns <= most, "logits", "has ", columns, " columns; at most ", most, " are supported.");
  }
};

Tensor nothing(const Tensor& like, ScalarType type) { return make_empty(like, {0}, type); }

ScalarType weight_type(Type type) { return type == Type::f64 ? ScalarType::Double : ScalarType::Float; }

const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

}  // namespace

AdmixtureCall prepare_admixture(const Tensor& logits, const Tensor& bank, const std::optional<Tensor>& candidates,
                                int64_t k, std::optional<ScalarType> out_dtype) {
  const Arguments arguments{"admixture", logits.device()};
  arguments.matrix("logits", logits);
  arguments.matrix("bank", bank);
  const Type type = arguments.floating("logits", logits.scalar_type());
  arguments.dtype("bank", bank, logits.scalar_type(), "the dtype of logits");
  const ScalarType out = out_dtype.value_or(bank.scalar_type());
  const Type out_type = arguments.floating("out_dtype", out);
  const int64_t rows = logits.size(0), columns = logits.size(1), vectors = bank.size(0), length = bank.size(1);
  arguments.limits(vectors, columns);
  Type candidate_type = Type::i32;
  if (candidates) {
    arguments.sizes("candidates", *candidates, rows, columns, "the shape of logits");
    candidate_type = arguments.candidate(*candidates);
  } else {
    arguments.check(columns == vectors, "logits", "has ", columns, " columns, but the bank has ", vectors,
                    " vectors: without candidates there must be one column a vector.");
  }
  arguments.check(k >= 1 && k <= columns, "k", "is ", k, ", but must be between 1 and the ", columns,
                  " columns of logits.");

  AdmixtureCall call{{},
                     make_contiguous(logits),
                     make_contiguous(bank),
                     candidates ? std::optional(make_contiguous(*candidates)) : std::nullopt,
                     allocate(logits, rows, length, out),
                     allocate(logits, rows, k, ScalarType::Int),
                     allocate(logits, rows, k, weight_type(type)),
                     std::nullopt};
  call.problem = {.type = type,
                  .candidate_type = candidate_type,
                  .out_type = out_type,
                  .logits = call.logits.const_data_ptr(),
                  .bank = call.bank.const_data_ptr(),
                  .candidates = data(call.candidates),
                  .subvectors = call.subvectors.mutable_data_ptr(),
                  .indices = static_cast<int32_t*>(call.indices.mutable_data_ptr()),
                  .weights = call.weights.mutable_data_ptr(),
                  .exhausted = nullptr,
                  .rows = rows,
                  .columns = columns,
                  .vectors = vectors,
                  .length = length,
                  .k = k};
  return call;
}

AdmixtureCall prepare_admixture_parts(const Tensor& logits, const Tensor& bank, const std::optional<Tensor>& candidates,
                                      int64_t k, std::optional<ScalarType> out_dtype, const std::vector<int64_t>& sizes,
                                      int64_t ranks) {
  const Arguments arguments{"admixture_parts", logits.device()};
  AdmixtureCall call = prepare_admixture(logits, bank, candidates, k, out_dtype);
  const int64_t rows = call.problem.rows;
  call.exhausted = make_empty(logits, {rows}, ScalarType::Bool);
  call.problem.exhausted = static_cast<bool*>(call.exhausted->mutable_data_ptr());
  arguments.check(ranks >= 1, "ranks", "is ", ranks, ", but must be at least 1.");
  int64_t left = rows;
  for (const int64_t size : sizes) {
    arguments.check(size >= 0 && size <= left && size % ranks == 0, "sizes", "holds ", size,
                    ", but must hold multiples of `ranks`, ", ranks, ", that add up to the ", rows, " rows of logits.");
    left -= size;
  }
  arguments.check(left == 0, "sizes", "leaves out ", left, " of the ", rows, " rows of logits.");
  return call;
}

CompositionCall prepare_composition(const Tensor& bank, const Tensor& indices, const Tensor& weights,
                                    std::optional<ScalarType> out_dtype) {
  const Arguments arguments{"compose", bank.device()};
  arguments.matrix("bank", bank);
  const Type type = arguments.floating("bank", bank.scalar_type());
  arguments.matrix("indices", indices);
  const Type index_type = arguments.index(indices);
  const int64_t rows = indices.size(0), k = indices.size(1), vectors = bank.size(0), length = bank.size(1);
  arguments.sizes("weights", weights, rows, k, "the shape of indices");
  arguments.dtype("weights", weights, weight_type(type), "float64 beside a float64 bank, float32 beside any other");
  arguments.limits(vectors, 0);
  const ScalarType out = out_dtype.value_or(bank.scalar_type());
  const Type out_type = arguments.floating("out_dtype", out);

  CompositionCall call{
      {}, make_contiguous(bank), make_contiguous(indices), make_contiguous(weights), allocate(bank, rows, length, out)};
  call.problem = {.type = type,
                  .index_type = index_type,
                  .out_type = out_type,
                  .bank = call.bank.const_data_ptr(),
                  .indices = call.indices.const_data_ptr(),
                  .weights = call.weights.const_data_ptr(),
                  .subvectors = call.subvectors.mutable_data_ptr(),
                  .rows = rows,
                  .vectors = vectors,
                  .length = length,
                  .k = k};
  return call;
}

namespace {

AdmixtureBackwardCall prepare_backward(const Arguments& arguments, std::optional<Type> parts_type,
                                       const std::optional<Tensor>& grad_subvectors,
                                       const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                       const Tensor& weights, const Tensor& bank,
                                       const std::optional<Tensor>& candidates, int64_t num_candidates,
                                       bool need_logits, bool need_bank) {
  arguments.matrix("indices", indices);
  arguments.dtype("indices", indices, ScalarType::Int, "as admixture returns them");
  const int64_t rows = indices.size(0), k = indices.size(1);
  arguments.matrix("bank", bank);
  const Type type = arguments.floating("bank", bank.scalar_type());
  const int64_t vectors = bank.size(0), length = bank.size(1);
  arguments.sizes("weights", weights, rows, k, "the shape of indices");
  arguments.dtype("weights", weights, weight_type(type), "as admixture returns them");
  Type grad_type = parts_type.value_or(type);
  if (grad_subvectors) {
    arguments.sizes("grad_subvectors", *grad_subvectors, rows, length, "the shape of the sub-vectors");
    grad_type = arguments.floating("grad_subvectors", grad_subvectors->scalar_type());
  }
  if (grad_weights) {
    arguments.sizes("grad_weights", *grad_weights, rows, k, "the shape of the weights");
    arguments.dtype("grad_weights", *grad_weights, weights.scalar_type(), "the dtype of weights");
  }
  arguments.limits(vectors, num_candidates);
  Type candidate_type = Type::i32;
  if (candidates) {
    arguments.sizes("candidates", *candidates, rows, num_candidates, "one row a row of indices, num_candidates wide");
    candidate_type = arguments.candidate(*candidates);
  } else {
    arguments.check(num_candidates == vectors, "num_candidates", "is ", num_candidates, ", but the bank has ", vectors,
                    " vectors: without candidates there must be one column a vector.");
  }
  arguments.check(k <= num_candidates, "num_candidates", "is ", num_candidates, ", but must be at least the ", k,
                  " columns of indices.");

  const auto dense = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(make_contiguous(*tensor)) : std::nullopt;
  };
  const ScalarType grad = bank.scalar_type();
  AdmixtureBackwardCall call{{},
                             dense(grad_subvectors),
                             {},
                             dense(grad_weights),
                             make_contiguous(indices),
                             make_contiguous(weights),
                             make_contiguous(bank),
                             dense(candidates),
                             need_logits ? allocate(bank, rows, num_candidates, grad) : nothing(bank, grad),
                             need_bank ? allocate(bank, vectors, length, grad) : nothing(bank, grad)};
  call.problem = {.type = type,
                  .candidate_type = candidate_type,
                  .grad_type = grad_type,
                  .grad_subvectors = data(call.grad_subvectors),
                  .grad_weights = data(call.grad_weights),
                  .indices = static_cast<const int32_t*>(call.indices.const_data_ptr()),
                  .weights = call.weights.const_data_ptr(),
                  .bank = call.bank.const_data_ptr(),
                  .candidates = data(call.candidates),
                  .grad_logits = need_logits ? call.grad_logits.mutable_data_ptr() : nullptr,
                  .grad_bank = need_bank ? call.grad_bank.mutable_data_ptr() : nullptr,
                  .rows = rows,
                  .columns = num_candidates,
                  .vectors = vectors,
                  .length = length,
                  .k = k};
  return call;
}

}  // namespace

AdmixtureBackwardCall prepare_admixture_backward(const std::optional<Tensor>& grad_subvectors,
                                                 const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                                 const Tensor& weights, const Tensor& bank,
                                                 const std::optional<Tensor>& candidates, int64_t num_candidates,
                                                 bool need_logits, bool need_bank) {
  const Arguments arguments{"admixture_backward", indices.device()};
  arguments.check(grad_subvectors || grad_weights, "grad_subvectors", "and `grad_weights` are both None; give one.");
  return prepare_backward(arguments, std::nullopt, grad_subvectors, grad_weights, indices, weights, bank, candidates,
                          num_candidates, need_logits, need_bank);
}

AdmixtureBackwardCall prepare_admixture_backward_parts(const std::vector<Tensor>& parts,
                                                       const std::vector<int64_t>& begins, const Tensor& indices,
                                                       const Tensor& weights, const Tensor& bank,
                                                       const std::optional<Tensor>& candidates, int64_t num_candidates,
                                                       bool need_logits, bool need_bank) {
  const Arguments arguments{"admixture_backward_parts", indices.device()};
  arguments.matrix("indices", indices);
  arguments.matrix("bank", bank);
  arguments.check(!parts.empty(), "grad_parts", "is empty; give one part at least.");
  arguments.check(parts.size() == begins.size(), "begins", "has ", begins.size(),
                  " elements, but must have one for each of ", parts.size(), " grad_parts.");
  const Type type = arguments.floating("grad_parts", parts[0].scalar_type());
  std::vector<Tensor> dense;
  dense.reserve(parts.size());
  const int64_t length = std::max<int64_t>(bank.size(1), 1);  // of none, parts have no elements
  int64_t end = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t elements = parts[i].numel(), rows = elements / length;
    arguments.check(elements % length == 0, "grad_parts", "has a part of ", elements,
                    " elements, but parts must be whole sub-vectors of ", length, " elements.");
    arguments.dtype("grad_parts", parts[i], parts[0].scalar_type(), "the dtype of the others");
    arguments.check(begins[i] >= end && begins[i] <= indices.size(0) - rows, "begins", "holds ", begins[i],
                    " for a part of ", rows, " rows; parts must be within ", indices.size(0),
                    " rows, one after the other.");
    end = begins[i] + rows;
    dense.push_back(make_contiguous(parts[i]));
  }
  AdmixtureBackwardCall call = prepare_backward(arguments, type, std::nullopt, std::nullopt, indices, weights, bank,
                                                candidates, num_candidates, need_logits, need_bank);
  call.grad_parts = std::move(dense);
  return call;
}

namespace {

// To be done before an operator overwrites an argument, for what torch knows of changes in place: leaves that require
// gradients and elements that share memory are refused, gradients end here, and versions are counted.
void overwrite(Tensor tensor) { torch::stable::zero_(tensor); }

Tensor dense_to_write(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : allocate(tensor, tensor.size(0), tensor.size(1), tensor.scalar_type());
}

void copy_back(Tensor to, const Tensor& from) {
  if (!to.is_contiguous()) torch::stable::copy_(to, from);
}

}  // namespace

DrawCall prepare_draw(const Tensor& logits, const std::optional<Tensor>& candidates, int64_t num_vectors, int64_t seed,
                      double std) {
  const Arguments arguments{"draw_logits_", logits.device()};
  arguments.matrix("logits", logits);
  const Type type = arguments.floating("logits", logits.scalar_type());
  const int64_t rows = logits.size(0), columns = logits.size(1);
  constexpr int64_t most = std::numeric_limits<int32_t>::max(), most_of_int16 = 1 << 15;
  arguments.check(num_vectors >= 0 && num_vectors <= most, "num_vectors", "is ", num_vectors,
                  ", but must be between 0 and ", most, ".");
  Type candidate_type = Type::i32;
  if (candidates) {
    arguments.sizes("candidates", *candidates, rows, columns, "the shape of logits");
    candidate_type = arguments.candidate(*candidates);
    arguments.check(candidate_type == Type::i32 || num_vectors <= most_of_int16, "candidates",
                    "is int16, which counts up to ", most_of_int16, " vectors, but num_vectors is ", num_vectors,
                    "; make it int32.");
    arguments.check(columns <= num_vectors, "logits", "has ", columns, " columns, but there are only ", num_vectors,
                    " vectors to be candidates.");
  } else {
    arguments.check(columns == num_vectors, "logits", "has ", columns, " columns, but num_vectors is ", num_vectors,
                    ": without candidates there must be one column a vector.");
  }
  arguments.check(std >= 0 && std <= std::numeric_limits<double>::max(), "std", "is ", std,
                  ", but must be finite and not negative.");

  overwrite(logits);
  if (candidates) overwrite(*candidates);
  DrawCall call{{},
                dense_to_write(logits),
                candidates ? std::optional(dense_to_write(*candidates)) : std::nullopt,
                logits,
                candidates};
  call.problem = {.type = type,
                  .candidate_type = candidate_type,
                  .logits = call.logits.mutable_data_ptr(),
                  .candidates = call.candidates ? call.candidates->mutable_data_ptr() : nullptr,
                  .rows = rows,
                  .columns = columns,
                  .vectors = num_vectors,
                  .seed = static_cast<uint64_t>(seed),
                  .std = std};
  return call;
}

void DrawCall::write_back() {
  copy_back(given_logits, logits);
  if (candidates) copy_back(*given_candidates, *candidates);
}

UniformDrawCall prepare_uniform_draw(const Tensor& values, int64_t seed, int64_t stream, double bound) {
  const Arguments arguments{"draw_uniform_", values.device()};
  arguments.matrix("values", values);
  const Type type = arguments.floating("values", values.scalar_type());
  constexpr int64_t most = std::numeric_limits<int32_t>::max(), last_stream = std::numeric_limits<uint32_t>::max();
  arguments.check(values.size(1) <= most, "values", "has ", values.size(1), " columns; allowed are ", most, ".");
  arguments.check(stream >= 0 && stream <= last_stream, "stream", "is ", stream, ", but must be between 0 and ",
                  last_stream, ".");
  arguments.check(bound >= 0 && bound <= std::numeric_limits<double>::max(), "bound", "is ", bound,
                  ", but must be finite and not negative.");

  overwrite(values);
  UniformDrawCall call{{}, dense_to_write(values), values};
  call.problem = {.type = type,
                  .values = call.values.mutable_data_ptr(),
                  .rows = values.size(0),
                  .columns = values.size(1),
                  .seed = static_cast<uint64_t>(seed),
                  .stream = static_cast<uint32_t>(stream),
                  .bound = bound};
  return call;
}

void UniformDrawCall::write_back() { copy_back(given_values, values); }

bool checked() {
  const char* value = std::getenv("VBLORA_CHECKED");
  return value && *value && std::string_view(value) != "0";
}

namespace {

Tensor on_cpu(const Tensor& tensor) { return torch::stable::to(tensor, torch::stable::Device(DeviceType::CPU)); }

template <class T>
void check_range(const Arguments& arguments, const char* name, const Tensor& tensor, int64_t end) {
  const Tensor host = on_cpu(tensor);
  const T* values = static_cast<const T*>(host.const_data_ptr());
  const int64_t columns = host.size(1);
  for (int64_t i = 0; i < host.numel(); ++i) {
    const int64_t value = values[i];
    arguments.check(value >= 0 && value < end, name, "holds ", value, " at row ", i / columns, ", column ", i % columns,
                    "; allowed are 0 to ", end - 1, ".");
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
    arguments.check(values[i] == values[i], name, "holds NaN at row ", i / columns, ", column ", i % columns, ".");
}

void check_numbers(const Arguments& arguments, const char* name, const Tensor& matrix) {
  check_numbers(arguments, name, matrix, matrix.size(1));
}

}  // namespace

void check_values(const AdmixtureCall& call) {
  const Arguments arguments{"admixture", call.logits.device()};
  check_numbers(arguments, "logits", call.logits);
  check_numbers(arguments, "bank", call.bank);
  if (call.candidates) check_indices(arguments, "candidates", *call.candidates, call.problem.vectors);
}

void check_values(const CompositionCall& call) {
  const Arguments arguments{"compose", call.bank.device()};
  check_numbers(arguments, "bank", call.bank);
  check_numbers(arguments, "weights", call.weights);
  check_indices(arguments, "indices", call.indices, call.problem.vectors);
}

void check_values(const AdmixtureBackwardCall& call) {
  const Arguments arguments{"admixture_backward", call.bank.device()};
  if (call.grad_subvectors) check_numbers(arguments, "grad_subvectors", *call.grad_subvectors);
  for (const Tensor& part : call.grad_parts) check_numbers(arguments, "grad_parts", part, call.problem.length);
  check_numbers(arguments, "bank", call.bank);
  check_indices(arguments, "indices", call.indices, call.problem.columns);
  if (call.candidates) check_indices(arguments, "candidates", *call.candidates, call.problem.vectors);
}

}  // namespace vblora
