// What the checker is told of a kernel's run. In builds other than the trace build these do nothing.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace vblora_emulation {

class Block;

namespace trace {

enum class Contents { input, output };  // input: written by the host, and only read by kernels

#ifdef VBLORA_TRACE

void launch(const char* kernel);
void begin(const Block& block);
void end(const Block& block);
void warp_done(const Block& block, int warp);
void block_barrier(const Block& block);
// Lanes that have met; only __syncwarp orders their accesses, shuffles and votes do not.
void warp_synchronised(const Block& block, int warp, uint32_t lanes, bool orders_memory);
void atomic(void* address, size_t bytes, const void* site);
void host_write(void* address, size_t bytes);

// A buffer that kernels may access; all other memory, their stacks and shared memory apart, is out of bounds.
void add_buffer(const char* name, void* address, size_t bytes, Contents contents);
// Something that is wrong whatever came of it. Returns whether anyone wants to know.
bool report(const char* kind, const void* site, const std::string& message, const void* other_site = nullptr);
// The same, unless both are compiled from one line: compilers copy code.
void same_line(const char* kind, const void* site, const void* other_site, const std::string& message);
// All that was found, as JSON; places are return addresses.
std::string findings();

#else

inline void launch(const char*) {}
inline void begin(const Block&) {}
inline void end(const Block&) {}
inline void warp_done(const Block&, int) {}
inline void block_barrier(const Block&) {}
inline void warp_synchronised(const Block&, int, uint32_t, bool) {}
inline void atomic(void*, size_t, const void*) {}
inline void host_write(void*, size_t) {}
inline void add_buffer(const char*, void*, size_t, Contents) {}
inline bool report(const char*, const void*, const std::string&, const void* = nullptr) { return false; }
inline void same_line(const char*, const void*, const void*, const std::string&) {}
inline std::string findings() { return "{}"; }

#endif

}  // namespace trace
}  // namespace vblora_emulation
