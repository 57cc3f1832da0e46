// The device functions that CUDA has built in, as far as kernels here use them or may come to. Included by
// cuda_emulation.h.
#pragma once

// Everything is inlined into the kernel, so that what the checkers see has the kernel's line; only what they must not
// look into (an atomic's own accesses) is a function of its own.
#define VBLORA_INTRINSIC __attribute__((always_inline)) inline
#ifdef VBLORA_TRACE
#define VBLORA_ATOMIC VBLORA_UNTRACED __attribute__((noinline))
#else
#define VBLORA_ATOMIC inline
#endif

namespace vblora_emulation {

template <class T>
VBLORA_INTRINSIC uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(value));
  return word;
}
template <class T>
VBLORA_INTRINSIC T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof(value));
  return value;
}

template <class T>
VBLORA_INTRINSIC T shuffle(uint32_t mask, T value, int source) {
  return from_word<T>(collective(Collective::shuffle, mask, to_word(value), static_cast<uint32_t>(source)));
}

// One read-modify-write of *address; returns what was there.
template <class T, class F>
VBLORA_ATOMIC T atomic(T* address, F&& change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2);
  trace::atomic(address, sizeof(T), __builtin_return_address(0));
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  Word* words = reinterpret_cast<Word*>(address);
  Word before = __atomic_load_n(words, __ATOMIC_RELAXED), after;
  do after = std::bit_cast<Word>(static_cast<T>(change(std::bit_cast<T>(before))));
  while (!__atomic_compare_exchange_n(words, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return std::bit_cast<T>(before);
}

}  // namespace vblora_emulation

// Barriers, shuffles, votes
VBLORA_INTRINSIC void __syncthreads() { vblora_emulation::barrier(false); }
VBLORA_INTRINSIC int __syncthreads_count(int predicate) { return vblora_emulation::barrier(predicate).predicates; }
VBLORA_INTRINSIC int __syncthreads_or(int predicate) { return vblora_emulation::barrier(predicate).predicates != 0; }
VBLORA_INTRINSIC int __syncthreads_and(int predicate) {
  const auto result = vblora_emulation::barrier(predicate);
  return result.predicates == result.threads;
}
VBLORA_INTRINSIC void __syncwarp(unsigned mask = ~0u) {
  vblora_emulation::collective(vblora_emulation::Collective::sync, mask & vblora_emulation::lanes());
}
VBLORA_INTRINSIC void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
VBLORA_INTRINSIC void __threadfence_block() { __threadfence(); }

template <class T>
VBLORA_INTRINSIC T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(vblora_emulation::lane());
  return vblora_emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
VBLORA_INTRINSIC T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(vblora_emulation::lane()), source = lane - static_cast<int>(delta);
  return vblora_emulation::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <class T>
VBLORA_INTRINSIC T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(vblora_emulation::lane()), source = lane + static_cast<int>(delta);
  return vblora_emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
VBLORA_INTRINSIC T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = static_cast<int>(vblora_emulation::lane()), source = lane ^ lane_mask;
  return vblora_emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}

VBLORA_INTRINSIC unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace vblora_emulation;
  return static_cast<unsigned>(collective(Collective::ballot, mask, predicate != 0));
}
VBLORA_INTRINSIC int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
VBLORA_INTRINSIC int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T>
VBLORA_INTRINSIC unsigned __match_any_sync(unsigned mask, T value) {
  using namespace vblora_emulation;
  return static_cast<unsigned>(collective(Collective::match, mask, to_word(value)));
}
template <class T>
VBLORA_INTRINSIC unsigned __match_all_sync(unsigned mask, T value, int* all) {
  *all = __match_any_sync(mask, value) == (mask & vblora_emulation::lanes());
  return *all ? mask : 0;
}
// A thread may find itself alone at any time, and here it always does.
VBLORA_INTRINSIC unsigned __activemask() { return 1u << vblora_emulation::lane(); }

#define VBLORA_REDUCE(name, type, operation)                                                          \
  VBLORA_INTRINSIC type name(unsigned mask, type value) {                                             \
    using vblora_emulation::Collective;                                                               \
    return static_cast<type>(                                                                         \
        vblora_emulation::collective(Collective::operation, mask, vblora_emulation::to_word(value))); \
  }
VBLORA_REDUCE(__reduce_add_sync, unsigned, add)
VBLORA_REDUCE(__reduce_add_sync, int, add)
VBLORA_REDUCE(__reduce_min_sync, unsigned, min_unsigned)
VBLORA_REDUCE(__reduce_min_sync, int, min_signed)
VBLORA_REDUCE(__reduce_max_sync, unsigned, max_unsigned)
VBLORA_REDUCE(__reduce_max_sync, int, max_signed)
VBLORA_REDUCE(__reduce_and_sync, unsigned, bit_and)
VBLORA_REDUCE(__reduce_or_sync, unsigned, bit_or)
VBLORA_REDUCE(__reduce_xor_sync, unsigned, bit_xor)

// Atomics
#ifdef VBLORA_TRACE  // the checker takes the return address of `atomic` for the place in the kernel
#define VBLORA_ATOMICALLY(body) return vblora_emulation::atomic(address, [&](T old) VBLORA_UNTRACED -> T { body; })
#else
#define VBLORA_ATOMICALLY(body) return vblora_emulation::atomic(address, [&](T old) -> T { body; })
#endif
#define VBLORA_ATOMIC_FUNCTION(name, body)                         \
  template <class T>                                               \
  VBLORA_INTRINSIC T name(T* address, std::type_identity_t<T> x) { \
    VBLORA_ATOMICALLY(body);                                       \
  }
VBLORA_ATOMIC_FUNCTION(atomicAdd, return old + x)
VBLORA_ATOMIC_FUNCTION(atomicSub, return old - x)
VBLORA_ATOMIC_FUNCTION(atomicExch, return (void(old), x))
VBLORA_ATOMIC_FUNCTION(atomicMin, return x < old ? x : old)
VBLORA_ATOMIC_FUNCTION(atomicMax, return x > old ? x : old)
VBLORA_ATOMIC_FUNCTION(atomicAnd, return old & x)
VBLORA_ATOMIC_FUNCTION(atomicOr, return old | x)
VBLORA_ATOMIC_FUNCTION(atomicXor, return old ^ x)
VBLORA_ATOMIC_FUNCTION(atomicInc, return old >= x ? T{0} : old + 1)
VBLORA_ATOMIC_FUNCTION(atomicDec, return old == 0 || old > x ? x : old - 1)
template <class T>
VBLORA_INTRINSIC T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  VBLORA_ATOMICALLY(return old == expected ? x : old);
}

// Loads and stores with a hint for the caches
#define VBLORA_LOAD(name)               \
  template <class T>                    \
  VBLORA_INTRINSIC T name(const T* p) { \
    return *p;                          \
  }
VBLORA_LOAD(__ldg)
VBLORA_LOAD(__ldca)
VBLORA_LOAD(__ldcg)
VBLORA_LOAD(__ldcs)
VBLORA_LOAD(__ldcv)
VBLORA_LOAD(__ldlu)
#define VBLORA_STORE(name)                                          \
  template <class T>                                                \
  VBLORA_INTRINSIC void name(T* p, std::type_identity_t<T> value) { \
    *p = value;                                                     \
  }
VBLORA_STORE(__stcg)
VBLORA_STORE(__stcs)
VBLORA_STORE(__stwb)
VBLORA_STORE(__stwt)

// Arithmetic. The approximations are the exact functions, and those that the C library declares too have to be macros.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
VBLORA_INTRINSIC float __fadd_rn(float a, float b) { return a + b; }
VBLORA_INTRINSIC float __fsub_rn(float a, float b) { return a - b; }
VBLORA_INTRINSIC float __fmul_rn(float a, float b) { return a * b; }
VBLORA_INTRINSIC float __fdiv_rn(float a, float b) { return a / b; }
VBLORA_INTRINSIC float __fdividef(float a, float b) { return a / b; }
VBLORA_INTRINSIC float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
VBLORA_INTRINSIC float __frcp_rn(float a) { return 1.0f / a; }
VBLORA_INTRINSIC float __fsqrt_rn(float a) { return sqrtf(a); }
VBLORA_INTRINSIC float rsqrtf(float a) { return 1.0f / sqrtf(a); }
VBLORA_INTRINSIC float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
VBLORA_INTRINSIC double __dadd_rn(double a, double b) { return a + b; }
VBLORA_INTRINSIC double __dmul_rn(double a, double b) { return a * b; }
VBLORA_INTRINSIC double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
VBLORA_INTRINSIC int __float_as_int(float a) { return std::bit_cast<int>(a); }
VBLORA_INTRINSIC unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
VBLORA_INTRINSIC float __int_as_float(int a) { return std::bit_cast<float>(a); }
VBLORA_INTRINSIC float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }
VBLORA_INTRINSIC long long __double_as_longlong(double a) { return std::bit_cast<long long>(a); }
VBLORA_INTRINSIC double __longlong_as_double(long long a) { return std::bit_cast<double>(a); }

VBLORA_INTRINSIC int __popc(unsigned a) { return std::popcount(a); }
VBLORA_INTRINSIC int __popcll(unsigned long long a) { return std::popcount(a); }
VBLORA_INTRINSIC int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }
VBLORA_INTRINSIC int __clzll(long long a) { return std::countl_zero(static_cast<unsigned long long>(a)); }
VBLORA_INTRINSIC int __ffs(int a) { return a ? std::countr_zero(static_cast<unsigned>(a)) + 1 : 0; }
VBLORA_INTRINSIC int __ffsll(long long a) { return a ? std::countr_zero(static_cast<unsigned long long>(a)) + 1 : 0; }
VBLORA_INTRINSIC unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
VBLORA_INTRINSIC unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}
VBLORA_INTRINSIC unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
VBLORA_INTRINSIC unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
VBLORA_INTRINSIC unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned byte = bytes >> 8 * (selector >> 4 * i & 7) & 0xff;
    if (selector >> 4 * i & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, as often as it takes
    result |= byte << 8 * i;
  }
  return result;
}

template <class A, class B>
VBLORA_INTRINSIC std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
VBLORA_INTRINSIC std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
