// Reading and writing the arrays of a problem: up to 16 bytes at a time where they are aligned, types that are known at
// run time only, and which bank vector a column stands for. The counterpart of cpu/isa/rows.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../numeric.h"
#include "../problems.h"
#include "launch.cuh"

namespace vblora::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T element[N];
};

// What load() gives for element e, in the fewest instructions.
template <class To, class T, int N>
__device__ __forceinline__ To element_of(const Pack<T, N>& pack, int e) {
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    const uint32_t word = bits_as<Pack<uint32_t, N / 2>>(pack).element[e / 2];
    return static_cast<To>(bits_as<float>(e % 2 ? word & 0xffff0000u : word << 16));
  } else if constexpr (std::is_same_v<T, f16>) {
    return static_cast<To>(__half2float(bits_as<__half>(pack.element[e])));
  } else {
    return load<To>(pack.element[e]);
  }
}

// The machine's word of so many bytes.
template <int Bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

// N elements from an address that is aligned to their size, or to 16 bytes if they are more. For what no kernel of the
// same launch writes.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  if constexpr (bytes > 16) {
    Pack<T, N> pack;
#pragma unroll
    for (int part = 0; part < bytes / 16; ++part) {
      constexpr int count = 16 / sizeof(T);
      const Pack<T, count> loaded = load_pack<count>(from + part * count);
#pragma unroll
      for (int e = 0; e < count; ++e) pack.element[part * count + e] = loaded.element[e];
    }
    return pack;
  } else {
    return bits_as<Pack<T, N>>(__ldg(reinterpret_cast<const typename Word<bytes>::type*>(from)));
  }
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  using Bits = typename Word<N* static_cast<int>(sizeof(T))>::type;
  __stwb(reinterpret_cast<Bits*>(to), bits_as<Bits>(pack));  // an assignment may be split into smaller ones
}

__device__ __forceinline__ bool is_aligned(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes < 16 ? bytes : 16) == 0;
}

// Whether rows of this many elements may be read, or written, N at a time.
template <int N, class T>
__device__ __forceinline__ bool in_packs(const T* rows, int64_t length) {
  return length % N == 0 && is_aligned(rows, N * static_cast<int>(sizeof(T)));
}

// Calls body with a value of the element type that `type` names: in a kernel, and in a launcher.
#pragma nv_exec_check_disable  // of a body that is one of the two, as all are
template <class Body>
__host__ __device__ __forceinline__ void with_type(Type type, const Body& body) {
  switch (type) {
    case Type::f32: return body(float());
    case Type::f64: return body(double());
    case Type::bf16: return body(bf16());
    default: return body(f16());
  }
}

template <class Acc>
__device__ __forceinline__ Acc element_at(const void* elements, Type type, int64_t i) {
  Acc result = 0;
  with_type(type, [&](auto element) {
    result = load<Acc>(load_pack<1>(static_cast<const decltype(element)*>(elements) + i).element[0]);
  });
  return result;
}

__device__ __forceinline__ int64_t index_at(const void* indices, Type type, int64_t i) {
  switch (type) {
    case Type::u8: return __ldg(static_cast<const unsigned char*>(indices) + i);
    case Type::i16: return __ldg(static_cast<const short*>(indices) + i);
    case Type::i32: return __ldg(static_cast<const int*>(indices) + i);
    default: return __ldg(static_cast<const long long*>(indices) + i);
  }
}

// The bank vector that a column of a row stands for, or -1 if there is no such column or no such vector.
template <class Problem>
__device__ __forceinline__ int32_t vector_of(const Problem& problem, int64_t row, int32_t column) {
  if (column < 0 || column >= problem.columns) return -1;
  if (!problem.candidates) return column;
  const int64_t vector = index_at(problem.candidates, problem.candidate_type, row * problem.columns + column);
  return vector >= 0 && vector < problem.vectors ? static_cast<int32_t>(vector) : -1;
}

}  // namespace vblora::cuda
