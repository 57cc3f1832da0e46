// Gradients of an update that add_updates_ added. Few rows take less time here than torch's products take to begin.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "../arguments.h"
#include "../outputs.h"
#include "../prepare.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

Type check(const Arguments& arguments, const Tensor& grad_y, const Tensor& x, const Tensor& A, const Tensor& B) {
  const Type type = arguments.floating("grad_y", grad_y.scalar_type());
  arguments.check(grad_y.dim() >= 1, "`grad_y` has no dimensions, but must have at least 1.");
  const int64_t last = grad_y.dim() - 1;
  bool alike = x.dim() == grad_y.dim();
  for (int64_t d = 0; alike && d < last; ++d) alike = x.size(d) == grad_y.size(d);
  if (!alike)
    arguments.check(false, "`x` has shape ", shape_name(x), ", but must have the shape of `grad_y`, ",
                    shape_name(grad_y), ", except in the last dimension.");
  arguments.matrix("A", A);
  arguments.shape("A", A, A.size(0), x.size(last), "its own rows, the last dimension of `x`");
  arguments.shape("B", B, A.size(0), grad_y.size(last), "the rows of `A`, the last dimension of `grad_y`");
  arguments.like("x", x, grad_y, "grad_y");
  arguments.like("A", A, grad_y, "grad_y");
  arguments.like("B", B, grad_y, "grad_y");
  return type;
}

void check_written(const Arguments& arguments, const Tensor& grad_x, const Tensor& x) {
  arguments.like("grad_x", grad_x, x, "x");
  bool alike = x.dim() == grad_x.dim();
  for (int64_t d = 0; alike && d < x.dim(); ++d) alike = x.size(d) == grad_x.size(d);
  if (!alike)
    arguments.check(false, "`grad_x` has shape ", shape_name(grad_x), ", but must have the shape of `x`, ",
                    shape_name(x), ".");
  arguments.check(grad_x.is_contiguous(), "`grad_x` is not contiguous, but must be, since it is written.");
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : make_contiguous(tensor); }

// The gradients of A and of B; adds that of x to grad_x.
std::tuple<Tensor, Tensor> low_rank_backward(const Tensor& grad_y, const Tensor& x, const Tensor& A, const Tensor& B,
                                             const std::optional<Tensor>& grad_x) {
  const Arguments arguments("low_rank_backward", "grad_y", grad_y);
  const Type type = check(arguments, grad_y, x, A, B);
  if (grad_x) check_written(arguments, *grad_x, x);
  const int64_t rank = A.size(0), in = A.size(1), out = B.size(1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  const Tensor grads = dense(grad_y), inputs = dense(x), down = dense(A), up = dense(B),
               grad_A = make_empty(A, {rank, in}, A.scalar_type()),
               grad_B = make_empty(B, {rank, out}, B.scalar_type());
  const std::unique_ptr<double[]> scratch(new double[2 * rows * rank]);
  const UpdateBackward problem{.type = type,
                               .grad_y = grads.const_data_ptr(),
                               .x = inputs.const_data_ptr(),
                               .A = down.const_data_ptr(),
                               .B = up.const_data_ptr(),
                               .grad_x = grad_x ? grad_x->mutable_data_ptr() : nullptr,
                               .grad_A = grad_A.mutable_data_ptr(),
                               .grad_B = grad_B.mutable_data_ptr(),
                               .hidden = scratch.get(),
                               .grad_hidden = scratch.get() + rows * rank,
                               .rows = rows,
                               .in = in,
                               .out = out,
                               .rank = rank};
  torch::stable::parallel_for(0, rows, product_grain(rank * (2 * in + out)),
                              [&](int64_t begin, int64_t end) { kernels().update_rows(problem, begin, end); });
  constexpr int64_t task = 64;  // columns
  torch::stable::parallel_for(0, (in + out + task - 1) / task, product_grain(task * rank * rows),
                              [&](int64_t begin, int64_t end) {
                                kernels().update_columns(problem, task * begin, std::min(task * end, in + out));
                              });
  return {grad_A, grad_B};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) { m.impl("low_rank_backward", TORCH_BOX(&low_rank_backward)); }

}  // namespace vblora::cpu
