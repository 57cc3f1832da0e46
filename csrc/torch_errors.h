// Included before all else. Makes errors that come from torch's own functions say what torch says. Built for the stable
// ABI of 2.11, torch's headers would only name the call that failed.
#pragma once

#include <dlfcn.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

namespace vblora {

// A function of torch's C shim that not every supported torch has, or not in a library that every build of it has.
// Linking it would keep the module from loading there, so it is looked up in the library that torch has loaded. Null if
// missing.
template <class Function>
Function* find_in_torch(const char* library, const char* name) {
  void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<Function*>(loaded ? dlsym(loaded, name) : nullptr);
}

// torch's message for the error that it has just returned; null before 2.13, which prints it instead.
inline const char* torch_message() {
  using Function = const char*();
  static Function* const function =
      find_in_torch<Function>("libtorch_cpu.so", "torch_exception_get_what_without_backtrace");
  return function ? function() : nullptr;
}

[[noreturn]] inline void torch_failed(const char* call, const char* file, int line) {
  const std::string where = std::string(call) + " API call failed at " + file + ", line " + std::to_string(line);
  const char* message = torch_message();
  throw std::runtime_error(message ? std::string(message) + " (originally from " + where + ")" : where);
}

}  // namespace vblora

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) ::vblora::torch_failed(#call, __FILE__, __LINE__);
