#include "outputs.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vblora {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kLarge = 1 << 20;

int64_t element_size(ScalarType type) {
  return static_cast<int64_t>(
      aoti_torch_dtype_element_size(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type))));
}

// Before 2.13, torch only says that an allocation failed. Whoever looks for torch's words (accelerate's
// find_executable_batch_size, people who search for them) shall find them, so we say them in its place.
Tensor allocated(const Tensor& like, double bytes, const std::function<Tensor()>& allocation) {
  try {
    return allocation();
  } catch (const std::runtime_error&) {
    if (torch_message()) throw;
    const auto asked = std::to_string(static_cast<int64_t>(bytes / (1 << 20)));
    if (like.device().type() == DeviceType::CPU)
      throw std::runtime_error("vblora: DefaultCPUAllocator: can't allocate memory: you tried to allocate " + asked +
                               " MiB.");
    throw std::runtime_error("vblora: CUDA out of memory. Tried to allocate " + asked +
                             " MiB on cuda:" + std::to_string(like.get_device_index()) + ".");
  }
}

// Of fresh memory each page is to be cleared and, unless huge, a fault of its own.
Tensor fresh(const Tensor& like, int64_t bytes) {
  const Tensor block = make_empty(like, {bytes}, ScalarType::Byte);
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(block.mutable_data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end)  // advice: where it is refused, all is as before
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return block;
}

// Blocks of torch's allocator that no tensor uses at the moment. A training step asks for the same few sizes as the
// last one did: the sub-vectors and the gradient of the logits.
class Kept {
 public:
  Tensor take(const Tensor& like, int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      const auto fits = [&](const Tensor& block) {
        return block.numel() >= bytes && block.numel() <= bytes + bytes / 4;
      };
      const auto last = std::find_if(blocks_.rbegin(), blocks_.rend(), fits);
      if (last != blocks_.rend()) {
        const Tensor block = *last;
        blocks_.erase(std::next(last).base());
        return block;
      }
    }
    return fresh(like, bytes);
  }

  void give_back(Tensor block) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(std::move(block));
    if (blocks_.size() > kMost) blocks_.erase(blocks_.begin());
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    blocks_.clear();
  }

 private:
  static constexpr size_t kMost = 8;  // the longest unused goes first
  std::mutex mutex_;
  std::vector<Tensor> blocks_;
};

Kept& kept() {
  static Kept& all = *new Kept;  // never destroyed: tensors may outlive what would destroy it
  return all;
}

}  // namespace

Tensor make_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  const double elements = std::accumulate(sizes.begin(), sizes.end(), 1.0, std::multiplies<>());
  return allocated(like, elements * static_cast<double>(element_size(type)),
                   [&] { return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, type); });
}

Tensor make_contiguous(const Tensor& tensor) {
  const auto bytes = static_cast<double>(tensor.numel()) * static_cast<double>(tensor.element_size());
  return allocated(tensor, bytes, [&] { return torch::stable::contiguous(tensor); });
}

Tensor allocate(const Tensor& like, int64_t rows, int64_t columns, ScalarType type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  const int64_t bytes = rows * columns * element_size(type);
  if (like.device().type() != DeviceType::CPU || bytes < kLarge) return make_empty(like, {rows, columns}, type);
  const Tensor block = kept().take(like, bytes);
  return torch::stable::from_blob(block.mutable_data_ptr(), {sizes, 2}, {strides, 2}, like.device(), type,
                                  [block](void*) { kept().give_back(block); });
}

std::vector<Tensor> in_parts(const Tensor& whole, const std::vector<int64_t>& sizes, int64_t ranks) {
  std::vector<Tensor> parts;
  parts.reserve(sizes.size());
  char* data = static_cast<char*>(whole.mutable_data_ptr());
  for (const int64_t rows : sizes) {
    const int64_t elements = rows * whole.size(1);
    const int64_t shape[] = {ranks, elements / ranks}, strides[] = {std::max<int64_t>(elements / ranks, 1), 1};
    parts.push_back(torch::stable::from_blob(data, {shape, 2}, {strides, 2}, whole.device(), whole.scalar_type(),
                                             [whole](void*) {}));
    data += elements * static_cast<int64_t>(whole.element_size());
  }
  return parts;
}

void empty_cache() { kept().clear(); }

}  // namespace vblora
