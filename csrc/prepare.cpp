#include "prepare.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "arguments.h"
#include "outputs.h"

namespace vblora {
namespace {

const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

}  // namespace

AdmixtureCall prepare_admixture(const Tensor& logits, const Tensor& bank, const std::optional<Tensor>& candidates,
                                int64_t k, std::optional<ScalarType> out_dtype) {
  const Arguments arguments("admixture", "logits", logits);
  arguments.matrix("logits", logits);
  arguments.matrix("bank", bank);
  const Type type = arguments.floating("logits", logits.scalar_type());
  arguments.dtype("bank", bank.scalar_type(), logits.scalar_type(), "the dtype of `logits`");
  const ScalarType out = out_dtype.value_or(bank.scalar_type());
  const Type out_type = arguments.floating("out_dtype", out);
  const int64_t rows = logits.size(0), columns = logits.size(1), vectors = bank.size(0), length = bank.size(1);
  arguments.limits(vectors, columns);
  Type candidate_type = Type::i32;
  if (candidates) {
    arguments.shape("candidates", *candidates, rows, columns, "the shape of `logits`");
    candidate_type = arguments.candidate(*candidates);
  } else {
    arguments.check(columns == vectors, "`logits` has ", columns, " columns, but `bank` has ", vectors,
                    " vectors; without `candidates` both must be equal.");
  }
  arguments.check(k >= 1 && k <= columns, "`k` is ", k, ", but must be between 1 and ", columns,
                  ", the number of columns of `logits`.");

  AdmixtureCall call{{},
                     make_contiguous(logits),
                     make_contiguous(bank),
                     candidates ? std::optional(make_contiguous(*candidates)) : std::nullopt,
                     allocate(logits, rows, length, out),
                     allocate(logits, rows, k, ScalarType::Int),
                     allocate(logits, rows, k, accumulation_dtype(logits.scalar_type()))};
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
                                      const std::optional<Tensor>& exhausted, int64_t k,
                                      std::optional<ScalarType> out_dtype, const std::vector<int64_t>& sizes,
                                      int64_t ranks) {
  AdmixtureCall call = prepare_admixture(logits, bank, candidates, k, out_dtype);
  const Arguments arguments("admixture_parts", "logits", logits);
  arguments.check(ranks >= 1, "`ranks` is ", ranks, ", but must be at least 1.");
  const int64_t rows = call.problem.rows;
  int64_t total = 0;
  for (const int64_t size : sizes) {
    arguments.check(size >= 0 && size % ranks == 0, "`sizes` holds ", size,
                    ", but each size must be a multiple of `ranks`, ", ranks, ".");
    if (__builtin_add_overflow(total, size, &total)) total = std::numeric_limits<int64_t>::max();
  }
  arguments.check(total == rows, "`sizes` adds up to ", total, ", but must add up to ", rows,
                  ", the number of rows of `logits`.");
  if (exhausted) {
    arguments.flags("exhausted", *exhausted, rows);
    call.problem.exhausted = static_cast<bool*>(exhausted->mutable_data_ptr());
  }
  return call;
}

CompositionCall prepare_composition(const Tensor& bank, const Tensor& indices, const Tensor& weights,
                                    std::optional<ScalarType> out_dtype) {
  const Arguments arguments("compose", "bank", bank);
  arguments.matrix("bank", bank);
  const Type type = arguments.floating("bank", bank.scalar_type());
  arguments.matrix("indices", indices);
  const Type index_type = arguments.index(indices);
  const int64_t rows = indices.size(0), k = indices.size(1), vectors = bank.size(0), length = bank.size(1);
  arguments.weights(weights, indices, bank);
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

// Call this last, when the call owns its gradients. The pointer stays valid when the call is moved.
AdmixtureBackwardCall with_runs(AdmixtureBackwardCall call, const std::vector<int64_t>& begins) {
  const int64_t length = std::max<int64_t>(call.problem.length, 1);  // if it is 0, gradients have no elements
  const auto add = [&](const Tensor& grads, int64_t begin) {
    if (grads.numel()) call.grad_runs.push_back({grads.const_data_ptr(), begin, grads.numel() / length});
  };
  if (call.grad_subvectors) add(*call.grad_subvectors, 0);
  for (size_t i = 0; i < call.grad_parts.size(); ++i) add(call.grad_parts[i], begins[i]);
  call.problem.grad_runs = call.grad_runs.data();
  call.problem.num_grad_runs = static_cast<int64_t>(call.grad_runs.size());
  return call;
}

AdmixtureBackwardCall prepare_backward(const Arguments& arguments, std::optional<Type> parts_type,
                                       const std::optional<Tensor>& grad_subvectors,
                                       const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                       const Tensor& weights, const Tensor& bank,
                                       const std::optional<Tensor>& candidates, int64_t num_candidates,
                                       bool need_logits, bool need_bank) {
  arguments.matrix("indices", indices);
  arguments.dtype("indices", indices.scalar_type(), ScalarType::Int, "the dtype that admixture returns");
  const int64_t rows = indices.size(0), k = indices.size(1);
  arguments.matrix("bank", bank);
  const Type type = arguments.floating("bank", bank.scalar_type());
  const int64_t vectors = bank.size(0), length = bank.size(1);
  arguments.weights(weights, indices, bank);
  Type grad_type = parts_type.value_or(type);
  if (grad_subvectors) {
    arguments.shape("grad_subvectors", *grad_subvectors, rows, length, "the rows of `indices`, the columns of `bank`");
    grad_type = arguments.floating("grad_subvectors", grad_subvectors->scalar_type());
  }
  if (grad_weights) {
    arguments.shape("grad_weights", *grad_weights, rows, k, "the shape of `weights`");
    arguments.dtype("grad_weights", grad_weights->scalar_type(), weights.scalar_type(), "the dtype of `weights`");
  }
  arguments.limits(vectors, num_candidates);
  Type candidate_type = Type::i32;
  if (candidates) {
    arguments.shape("candidates", *candidates, rows, num_candidates, "the rows of `indices`, `num_candidates`");
    candidate_type = arguments.candidate(*candidates);
  } else {
    arguments.check(num_candidates == vectors, "`num_candidates` is ", num_candidates, ", but `bank` has ", vectors,
                    " vectors; without `candidates` both must be equal.");
  }
  arguments.check(k <= num_candidates, "`num_candidates` is ", num_candidates, ", but must be at least ", k,
                  ", the number of columns of `indices`.");

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
                             need_logits ? allocate(bank, rows, num_candidates, grad) : make_empty(bank, {0}, grad),
                             need_bank ? allocate(bank, vectors, length, grad) : make_empty(bank, {0}, grad),
                             {}};
  call.problem = {.type = type,
                  .candidate_type = candidate_type,
                  .grad_type = grad_type,
                  .grad_runs = nullptr,
                  .num_grad_runs = 0,
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
  const Arguments arguments("admixture_backward", "indices", indices);
  arguments.check(grad_subvectors || grad_weights,
                  "`grad_subvectors` and `grad_weights` are both None; pass at least one.");
  return with_runs(prepare_backward(arguments, std::nullopt, grad_subvectors, grad_weights, indices, weights, bank,
                                    candidates, num_candidates, need_logits, need_bank),
                   {});
}

AdmixtureBackwardCall prepare_admixture_backward_parts(const std::vector<Tensor>& parts,
                                                       const std::vector<int64_t>& begins, const Tensor& indices,
                                                       const Tensor& weights, const Tensor& bank,
                                                       const std::optional<Tensor>& candidates, int64_t num_candidates,
                                                       bool need_logits, bool need_bank) {
  const Arguments arguments("admixture_backward_parts", "indices", indices);
  arguments.matrix("indices", indices);
  arguments.matrix("bank", bank);
  arguments.check(!parts.empty(), "`grad_parts` is empty; pass at least one part.");
  arguments.check(parts.size() == begins.size(), "`begins` has ", begins.size(), " elements, but must have ",
                  parts.size(), ", one for each of `grad_parts`.");
  const Type type = arguments.floating("grad_parts", parts[0].scalar_type());
  std::vector<Tensor> dense;
  dense.reserve(parts.size());
  const int64_t length = std::max<int64_t>(bank.size(1), 1);  // if it is 0, parts have no elements
  int64_t end = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t elements = parts[i].numel(), rows = elements / length;
    arguments.check(elements % length == 0, "`grad_parts` holds a part of ", elements,
                    " elements, but each part must have a multiple of ", length, ", the columns of `bank`.");
    arguments.dtype("grad_parts", parts[i].scalar_type(), parts[0].scalar_type(), "the dtype of the first part");
    arguments.check(begins[i] >= end && begins[i] <= indices.size(0) - rows, "`begins` holds ", begins[i],
                    " for a part of ", rows, " rows, but parts must be in order, must not overlap and must end within ",
                    indices.size(0), " rows.");
    end = begins[i] + rows;
    dense.push_back(make_contiguous(parts[i]));
  }
  AdmixtureBackwardCall call = prepare_backward(arguments, type, std::nullopt, std::nullopt, indices, weights, bank,
                                                candidates, num_candidates, need_logits, need_bank);
  call.grad_parts = std::move(dense);
  return with_runs(std::move(call), begins);
}

namespace {

// Call this before an operator overwrites an argument, so that torch treats it like its own in-place operators: it
// refuses leaves that require gradients and elements that share memory, cuts the autograd history and bumps the
// version.
void overwrite(Tensor tensor) { torch::stable::zero_(tensor); }

Tensor contiguous_output(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : allocate(tensor, tensor.size(0), tensor.size(1), tensor.scalar_type());
}

void copy_back(Tensor to, const Tensor& from) {
  if (!to.is_contiguous()) torch::stable::copy_(to, from);
}

}  // namespace

namespace {

// Whether each of the matrices in the last two dimensions is contiguous.
bool has_dense_matrices(const Tensor& tensor) {
  const int64_t columns = tensor.size(tensor.dim() - 1);
  return tensor.stride(tensor.dim() - 1) == 1 && tensor.stride(tensor.dim() - 2) == columns;
}

}  // namespace

UpdateCall prepare_update(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                          const std::optional<Tensor>& adapters) {
  const Arguments arguments("add_updates_", "y", y);
  const Type type = arguments.floating("y", y.scalar_type());
  const int64_t dim = y.dim(), factor_dim = adapters ? 3 : 2;
  arguments.check(dim >= 1, "`y` has no dimensions, but must have at least 1.");
  arguments.like("x", x, y, "y");
  int64_t all = 1;
  bool fits = x.dim() == dim;
  for (int64_t d = 0; d + 1 < dim; ++d) {
    all *= y.size(d);
    fits = fits && x.size(d) == y.size(d);
  }
  if (!fits)  // without this, each call would write the shapes of its message
    arguments.check(false, "`x` has shape ", shape_name(x), ", but must have the shape of `y`, ", shape_name(y),
                    ", except in the last dimension.");
  arguments.like("A", A, y, "y");
  arguments.like("B", B, y, "y");
  const int64_t in = x.size(dim - 1), out = y.size(dim - 1);
  if (A.dim() != factor_dim || A.size(factor_dim - 1) != in)
    arguments.check(false, "`A` has shape ", shape_name(A), ", but must have ", adapters ? "(adapters, " : "(",
                    "rank, ", in, "), ", adapters ? "with" : "without", " `adapters`.");
  const int64_t rank = A.size(factor_dim - 2), count = adapters ? A.size(0) : 1;
  if (B.dim() != factor_dim || B.size(factor_dim - 1) != out || B.size(factor_dim - 2) != rank ||
      (adapters && B.size(0) != count))
    arguments.check(false, "`B` has shape ", shape_name(B), ", but must have the shape of `A`, ", shape_name(A),
                    ", with a last dimension of ", out, ".");
  constexpr int64_t most = 4096;  // they fit in a GPU's shared memory
  arguments.check(rank <= most, "`A` has rank ", rank, ", but must have at most ", most, ".");
  int64_t rows = 1;
  if (adapters) {
    arguments.on_device("adapters", *adapters);
    arguments.dtype("adapters", adapters->scalar_type(), ScalarType::Long, "an index for each row");
    if (adapters->dim() != 1)
      arguments.check(false, "`adapters` has shape ", shape_name(*adapters), ", but must have 1 dimension.");
    rows = adapters->size(0);
    arguments.check(rows == 0 ? all == 0 : all % rows == 0, "`adapters` has ", rows, " rows, which must divide the ",
                    all, " positions of `y`.");
  }

  const auto dense = [](const Tensor& tensor) { return tensor.is_contiguous() ? tensor : make_contiguous(tensor); };
  const auto matrices = [](const Tensor& tensor) {
    return has_dense_matrices(tensor) ? tensor : make_contiguous(tensor);
  };
  UpdateCall call{{}, dense(y), dense(x), matrices(A), matrices(B), std::nullopt, y};
  if (adapters) call.adapters = dense(*adapters);
  call.problem = {.type = type,
                  .y = call.y.mutable_data_ptr(),
                  .x = call.x.const_data_ptr(),
                  .A = call.A.const_data_ptr(),
                  .B = call.B.const_data_ptr(),
                  .adapters = static_cast<const int64_t*>(data(call.adapters)),
                  .rows = rows,
                  .positions = rows == 0 ? 0 : all / rows,
                  .in = in,
                  .out = out,
                  .rank = rank,
                  .count = count,
                  .A_stride = adapters ? call.A.stride(0) : 0,
                  .B_stride = adapters ? call.B.stride(0) : 0};
  return call;
}

void UpdateCall::write_back() { copy_back(given_y, y); }

DrawCall prepare_draw(const Tensor& logits, const std::optional<Tensor>& candidates, int64_t num_vectors, int64_t seed,
                      double std) {
  const Arguments arguments("draw_logits_", "logits", logits);
  arguments.matrix("logits", logits);
  const Type type = arguments.floating("logits", logits.scalar_type());
  const int64_t rows = logits.size(0), columns = logits.size(1);
  constexpr int64_t most_of_int16 = 1 << 15;
  arguments.between("num_vectors", num_vectors, std::numeric_limits<int32_t>::max());
  Type candidate_type = Type::i32;
  if (candidates) {
    arguments.shape("candidates", *candidates, rows, columns, "the shape of `logits`");
    candidate_type = arguments.candidate(*candidates);
    arguments.check(candidate_type == Type::i32 || num_vectors <= most_of_int16,
                    "`candidates` is torch.int16, which can hold ", most_of_int16, " vectors, but `num_vectors` is ",
                    num_vectors, "; use torch.int32.");
    arguments.check(columns <= num_vectors, "`logits` has ", columns, " columns, but must have at most ", num_vectors,
                    ", `num_vectors`.");
  } else {
    arguments.check(columns == num_vectors, "`logits` has ", columns, " columns, but must have ", num_vectors,
                    ", `num_vectors`, without `candidates`.");
  }
  arguments.nonnegative("std", std);

  overwrite(logits);
  if (candidates) overwrite(*candidates);
  DrawCall call{{},
                contiguous_output(logits),
                candidates ? std::optional(contiguous_output(*candidates)) : std::nullopt,
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
  const Arguments arguments("draw_uniform_", "values", values);
  arguments.matrix("values", values);
  const Type type = arguments.floating("values", values.scalar_type());
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  arguments.check(values.size(1) <= most, "`values` has ", values.size(1), " columns, but must have at most ", most,
                  ".");
  arguments.between("stream", stream, std::numeric_limits<uint32_t>::max());
  arguments.nonnegative("bound", bound);

  overwrite(values);
  UniformDrawCall call{{}, contiguous_output(values), values};
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

}  // namespace vblora
