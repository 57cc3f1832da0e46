// The update of a frozen layer's output, and its gradients, for few rows: torch's products of such sizes take most of
// their time to begin. Sums are float32, in one order for any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "../arguments.h"
#include "../outputs.h"
#include "../prepare.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

// (rank, width), in float32.
class Factors {
 public:
  explicit Factors(const Tensor& factors) : floats_(make_contiguous(torch::stable::to(factors, ScalarType::Float))) {}

  LowRank with(const Tensor& rows, const Tensor& products) const {
    return {.type = rows.scalar_type() == ScalarType::Float ? Type::f32 : Type::bf16,
            .count = rows.size(0),
            .width = rows.size(1),
            .rank = floats_.size(0),
            .rows = rows.mutable_data_ptr(),
            .factors = static_cast<const float*>(floats_.const_data_ptr()),
            .products = static_cast<float*>(products.mutable_data_ptr()),
            .grads = nullptr};
  }

 private:
  Tensor floats_;
};

void check(const Arguments& arguments, const char* name, const Tensor& y, const Tensor& x, const Tensor& A,
           const Tensor& B) {
  arguments.matrix(name, y);
  arguments.check(y.scalar_type() == ScalarType::Float || y.scalar_type() == ScalarType::BFloat16, "`", name, "` is ",
                  dtype_name(y.scalar_type()), "; allowed are torch.float32 and torch.bfloat16.");
  arguments.matrix("A", A);
  const std::string rows = std::string("the rows of `") + name + "`, the columns of `A`";
  arguments.shape("x", x, y.size(0), A.size(1), rows.c_str());
  const std::string columns = std::string("the rows of `A`, the columns of `") + name + "`";
  arguments.shape("B", B, A.size(0), y.size(1), columns.c_str());
  for (const auto& [other, tensor] : {std::pair("x", &x), std::pair("A", &A), std::pair("B", &B)})
    arguments.dtype(other, tensor->scalar_type(), y.scalar_type(), std::string("the dtype of `") + name + "`");
}

void check_written(const Arguments& arguments, const char* name, const Tensor& tensor) {
  arguments.check(tensor.is_contiguous(), "`", name, "` is not contiguous, but must be, since it is written.");
}

int64_t grain_of(const LowRank& problem) { return grain(problem.rank * problem.width / 4); }

// y += x A^T B. Returns x A^T.
Tensor low_rank_add(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B) {
  const Arguments arguments("low_rank_add_", "y", y);
  check(arguments, "y", y, x, A, B);
  check_written(arguments, "y", y);
  const Tensor rows = make_contiguous(x), hidden = make_empty(x, {x.size(0), A.size(0)}, ScalarType::Float);
  const Factors of_x(A), of_y(B);
  const LowRank down = of_x.with(rows, hidden), up = of_y.with(y, hidden);
  torch::stable::parallel_for(0, down.count, grain_of(down), [&](int64_t begin, int64_t end) {
    kernels().low_rank_products(down, begin, end);
    kernels().low_rank_add(up, begin, end);
  });
  return hidden;
}

Tensor gradient(LowRank problem, const Tensor& rows) {
  constexpr int64_t a_task = 64;  // columns
  const Tensor grads = make_empty(rows, {problem.rank, problem.width}, rows.scalar_type());
  problem.grads = grads.mutable_data_ptr();
  torch::stable::parallel_for(0, (problem.width + a_task - 1) / a_task, grain(16 * problem.rank * problem.count),
                              [&](int64_t begin, int64_t end) {
                                kernels().low_rank_gradients(problem, a_task * begin,
                                                             std::min(a_task * end, problem.width));
                              });
  return grads;
}

// The gradients of A and of B; adds that of x to grad_x.
std::tuple<Tensor, Tensor> low_rank_backward(const Tensor& grad_y, const Tensor& x, const Tensor& hidden,
                                             const Tensor& A, const Tensor& B, const std::optional<Tensor>& grad_x) {
  const Arguments arguments("low_rank_backward", "grad_y", grad_y);
  check(arguments, "grad_y", grad_y, x, A, B);
  arguments.shape("hidden", hidden, x.size(0), A.size(0), "the rows of `x` and of `A`");
  arguments.dtype("hidden", hidden.scalar_type(), ScalarType::Float, "the dtype that low_rank_add_ returns");
  if (grad_x) {
    arguments.shape("grad_x", *grad_x, x.size(0), x.size(1), "the shape of `x`");
    arguments.dtype("grad_x", grad_x->scalar_type(), x.scalar_type(), "the dtype of `x`");
    check_written(arguments, "grad_x", *grad_x);
  }
  const Tensor grads = make_contiguous(grad_y), rows = make_contiguous(x), products = make_contiguous(hidden),
               grad_products = make_empty(hidden, {hidden.size(0), hidden.size(1)}, ScalarType::Float);
  const Factors of_x(A), of_y(B);
  const LowRank up = of_y.with(grads, grad_products), down = of_x.with(grad_x.value_or(rows), grad_products);
  torch::stable::parallel_for(0, up.count, grain_of(up), [&](int64_t begin, int64_t end) {
    kernels().low_rank_products(up, begin, end);
    if (grad_x) kernels().low_rank_add(down, begin, end);
  });
  return {gradient(of_x.with(rows, grad_products), rows), gradient(of_y.with(grads, products), grads)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) {
  m.impl("low_rank_add_", TORCH_BOX(&low_rank_add));
  m.impl("low_rank_backward", TORCH_BOX(&low_rank_backward));
}

}  // namespace vblora::cpu
