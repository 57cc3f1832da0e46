// The layer itself: what its stand-ins for CUDA's built-in functions return, and in which order threads run. Prints
// each expectation that does not hold.
#include <stdio.h>

#include <array>

#include "cuda_emulation.h"

extern "C" void vblora_emulation_set(int order, uint64_t seed, int workers);

namespace {

using vblora_emulation::Order;

int failures = 0;

template <class T>
void expect(const char* what, const std::vector<T>& found, auto&& wanted) {
  for (size_t i = 0; i < found.size(); ++i)
    if (found[i] != static_cast<T>(wanted(static_cast<int>(i)))) {
      printf("%s: %g in thread %zu, not %g\n", what, double(found[i]), i,
             double(static_cast<T>(wanted(static_cast<int>(i)))));
      ++failures;
      return;
    }
}

template <class T, class F>
__global__ void each_thread(T* out, const F f) {
  out[threadIdx.x] = f(static_cast<int>(threadIdx.x));
}
// f(thread) for each of 64 threads.
template <class T = int, class F>
std::vector<T> run(const F& f) {
  std::vector<T> out(64);
  VBLORA_LAUNCH((each_thread<T, F>), 1, 64, 0, nullptr, out.data(), f);
  return out;
}

__global__ void positions(int* out, dim3 size) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++out[block * size.x * size.y * size.z + thread];
}

__global__ void arrivals(int* out, int* arrived) { out[atomicAdd(arrived, 1)] = static_cast<int>(threadIdx.x); }

void shuffles() {
  constexpr unsigned all = ~0u;
  expect("__shfl_sync", run([](int t) { return __shfl_sync(all, t, 5); }), [](int t) { return t / 32 * 32 + 5; });
  expect("__shfl_sync, 8 wide", run([](int t) { return __shfl_sync(all, t, 11, 8); }),
         [](int t) { return t / 8 * 8 + 3; });
  expect("__shfl_up_sync, 16 wide", run([](int t) { return __shfl_up_sync(all, t, 3, 16); }),
         [](int t) { return t % 16 < 3 ? t : t - 3; });
  expect("__shfl_down_sync, 16 wide", run([](int t) { return __shfl_down_sync(all, t, 3, 16); }),
         [](int t) { return t % 16 > 12 ? t : t + 3; });
  expect("__shfl_xor_sync, 8 wide", run([](int t) { return __shfl_xor_sync(all, t, 9, 8); }),
         [](int t) { return (t ^ 9) > (t | 7) ? t : t ^ 9; });
  expect("__shfl_sync of a double", run<double>([](int t) { return __shfl_xor_sync(all, t + 0.1, 31); }),
         [](int t) { return (t ^ 31) + 0.1; });
  expect("__shfl_sync of halves of a warp, in turn",
         run([](int t) { return t % 32 < 16 ? __shfl_sync(0x0000ffffu, t, 1) : __shfl_sync(0xffff0000u, t, 30); }),
         [](int t) { return t / 32 * 32 + (t % 32 < 16 ? 1 : 30); });
}

void votes() {
  constexpr unsigned all = ~0u;
  expect("__ballot_sync", run<unsigned>([](int t) { return __ballot_sync(all, t % 3 == 0); }), [](int t) {
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= ((t / 32 * 32 + lane) % 3 == 0 ? 1u : 0u) << lane;
    return ballot;
  });
  expect("__any_sync", run([](int t) { return __any_sync(all, t == 40); }), [](int t) { return t >= 32; });
  expect("__all_sync", run([](int t) { return __all_sync(all, t != 40); }), [](int t) { return t < 32; });
  expect("__match_any_sync", run<unsigned>([](int t) { return __match_any_sync(all, t % 2 ? 7LL : 8LL); }),
         [](int t) { return t % 2 ? 0xaaaaaaaau : 0x55555555u; });
  expect("__reduce_add_sync", run([](int t) { return __reduce_add_sync(all, t); }),
         [](int t) { return t < 32 ? 496 : 1520; });
  expect("__reduce_min_sync", run([](int t) { return __reduce_min_sync(all, t - 40); }),
         [](int t) { return t < 32 ? -40 : -8; });
  expect("__reduce_max_sync", run<unsigned>([](int t) { return __reduce_max_sync(all, unsigned(t - 1)); }),
         [](int t) { return t < 32 ? ~0u : 62u; });
  expect("__syncthreads_count", run([](int t) { return __syncthreads_count(t % 4 == 0); }), [](int) { return 16; });
  expect("__syncthreads_or", run([](int t) { return __syncthreads_or(t == 1); }), [](int) { return 1; });
  expect("__syncthreads_and", run([](int t) { return __syncthreads_and(t != 1); }), [](int) { return 0; });
}

void atomics() {
  float sum = 0.0f;
  unsigned most = 0, wrapped = 0;
  run([&, sum = &sum, most = &most, wrapped = &wrapped](int t) {
    atomicAdd(sum, 0.5f);
    atomicMax(most, unsigned(t ^ 21));
    atomicInc(wrapped, 9u);
    return 0;
  });
  expect("atomics", std::vector<double>{sum, double(most), double(wrapped)}, [](int i) {
    return i == 0 ? 32 : i == 1 ? 63 : 4;
  });
  int word = 3;
  expect("atomicCAS", std::vector<int>{atomicCAS(&word, 3, 4), atomicCAS(&word, 3, 5), atomicExch(&word, 6), word},
         [](int i) { return i == 0   ? 3
                            : i == 3 ? 6
                                     : 4; });
}

void bits() {
  expect("bits",
         std::vector<unsigned>{__byte_perm(0x03020100, 0x07060504, 0x7250), __funnelshift_l(0x80000000, 1, 1),
                               __funnelshift_r(0, 1, 4), unsigned(__ffs(8)), unsigned(__clz(1)), __umulhi(~0u, ~0u)},
         [](int i) { return std::array{0x07020500u, 3u, 0x10000000u, 4u, 31u, ~1u}[i]; });
  expect("half types", run<float>([](int t) {
           return __half2float(__shfl_xor_sync(~0u, __float2half(t + 0.5f), 1)) +
                  __bfloat162float(__shfl_xor_sync(~0u, __float2bfloat16(t), 1));
         }),
         [](int t) { return 2 * (t ^ 1) + 0.5f; });
}

void indices() {
  std::vector<int> visits(2 * 3 * 2 * 4 * 5 * 3);
  VBLORA_LAUNCH(positions, dim3(2, 3, 2), dim3(4, 5, 3), 0, nullptr, visits.data(), dim3(4, 5, 3));
  expect("every thread of every block, once", visits, [](int) { return 1; });
}

void orders() {
  std::vector<int> random;
  for (const auto order : {Order::ascending, Order::descending, Order::random}) {
    std::vector<int> out(96);
    int arrived = 0;
    vblora_emulation_set(static_cast<int>(order), 11, 1);
    VBLORA_LAUNCH(arrivals, 1, 96, 0, nullptr, out.data(), &arrived);
    if (order == Order::random) random = out;
    else expect("order", out, [&](int i) { return order == Order::ascending ? i : 95 - i; });
  }
  vblora_emulation_set(0, 0, 0);
  if (std::is_sorted(random.begin(), random.end())) printf("random order is ascending\n"), ++failures;
  std::sort(random.begin(), random.end());
  expect("random order", random, [](int i) { return i; });
}

void refusals() {
  const auto refused = [](auto&& launch) { return launch() != cudaSuccess && cudaGetLastError() != cudaSuccess; };
  int out[1];
  expect(
      "launches that no GPU takes",
      std::vector<bool>{refused([&] { return VBLORA_LAUNCH(positions, 0, 32, 0, nullptr, out, dim3(1)); }),
                        refused([&] { return VBLORA_LAUNCH(positions, 1, 1025, 0, nullptr, out, dim3(1)); }),
                        refused([&] { return VBLORA_LAUNCH(positions, 1, 32, 48 * 1024 + 1, nullptr, out, dim3(1)); })},
      [](int) { return true; });
}

}  // namespace

int main() {
  shuffles();
  votes();
  atomics();
  bits();
  indices();
  orders();
  refusals();
  return failures != 0;
}
