// Included before all else. What torch's own functions throw: its message, where it hands that out (from 2.13 on); the
// headers of the stable ABI that this is built for would only say which call failed.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// Weak: null where torch is older.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace vblora {

[[noreturn]] inline void torch_failed(const char* call, const char* file, int line) {
  std::string where = std::string(call) + " API call failed at " + file + ", line " + std::to_string(line);
  if (torch_exception_get_what_without_backtrace)
    where = std::string(torch_exception_get_what_without_backtrace()) + " (originally from " + where + ")";
  throw std::runtime_error(where);
}

}  // namespace vblora

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) ::vblora::torch_failed(#call, __FILE__, __LINE__);
