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

// Before 2.13, torch only reports that an allocation failed, and prints why: on a GPU, perhaps because a kernel failed
// earlier. Tools such as accelerate's find_executable_batch_size look for the wording of torch's own out-of-memory
// errors, so we raise it ourselves.
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
                             " MiB on cuda:" + std::to_string(like.get_device_index()) +
                             ". If torch printed another error above, that one is the cause.");
  }
}

// New memory in huge pages, because each page costs a fault on first use.
Tensor fresh(const Tensor& like, int64_t bytes) {
  const Tensor block = make_empty(like, {bytes}, ScalarType::Byte);
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(block.mutable_data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end)  // only a hint; a failure does no harm
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return block;
}

// Blocks from torch's allocator that no tensor uses. Every training step asks for the same few sizes: the sub-vectors
// and the gradient of the logits.
class BlockCache {
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
  static constexpr size_t kMost = 8;  // then the least recently used block is freed
  std::mutex mutex_;
  std::vector<Tensor> blocks_;
};

BlockCache& block_cache() {
  static BlockCache& cache = *new BlockCache;  // never destroyed, because tensors may outlive static destructors
  return cache;
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
  const Tensor block = block_cache().take(like, bytes);
  return torch::stable::from_blob(block.mutable_data_ptr(), {sizes, 2}, {strides, 2}, like.device(), type,
                                  [block](void*) { block_cache().give_back(block); });
}

std::vector<Tensor> in_parts(const Tensor& whole, const std::vector<int64_t>& sizes, int64_t ranks) {
  std::vector<Tensor> parts;
  parts.reserve(sizes.size());
  char* data = static_cast<char*>(whole.mutable_data_ptr());
  for (const int64_t rows : sizes) {
    const int64_t elements = rows * whole.size(1);
    if (elements == 0) {  // without an address: that after the last part may not be the device's, which torch refuses
      parts.push_back(make_empty(whole, {ranks, 0}, whole.scalar_type()));
      continue;
    }
    const int64_t shape[] = {ranks, elements / ranks}, strides[] = {elements / ranks, 1};
    parts.push_back(torch::stable::from_blob(data, {shape, 2}, {strides, 2}, whole.device(), whole.scalar_type(),
                                             [whole](void*) {}));
    data += elements * static_cast<int64_t>(whole.element_size());
  }
  return parts;
}

void empty_cache() { block_cache().clear(); }

}  // namespace vblora
