// Included before everything else. Errors from torch's own functions get torch's message; with the stable ABI of 2.11,
// torch's headers would only name the failed call.
#pragma once

#include <dlfcn.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

namespace vblora {

// Looks up a function of torch's C shim in a library that torch has loaded; null if it is missing. For functions that
// some supported versions or builds of torch lack: linking them would keep the module from loading there.
template <class Function>
Function* find_in_torch(const char* library, const char* name) {
  void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<Function*>(loaded ? dlsym(loaded, name) : nullptr);
}

// torch's message for the last error; null before 2.13, where torch prints it instead.
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
