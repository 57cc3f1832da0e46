// How many blocks of a kernel fit on a multiprocessor, by NVIDIA's own reckoning. Reads lines of
//   <compute capability x 10> <threads a block> <registers> <static shared bytes> <dynamic shared bytes>
// and prints, for each, the blocks and the threads that a multiprocessor can hold.
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int arch, threads, registers;
  size_t static_shared, dynamic_shared;
  while (std::scanf("%d %d %d %zu %zu", &arch, &threads, &registers, &static_shared, &dynamic_shared) == 5) {
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.numSms = 1;
    // What the programming guide lists: threads and KiB of shared memory a multiprocessor.
    const bool small = device.computeMinor != 0 || device.computeMajor == 12;  // 7.5; 8.6, 8.9; 12.0: GPUs for graphics
    device.maxThreadsPerMultiprocessor = arch == 75 ? 1024 : small ? 1536 : 2048;
    const size_t kib = arch == 75 ? 64 : small ? 100 : arch == 80 ? 164 : 228;
    device.sharedMemPerMultiprocessor = kib * 1024;
    device.reservedSharedMemPerBlock = arch == 75 ? 0 : 1024;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - device.reservedSharedMemPerBlock;

    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = static_shared;
    kernel.maxDynamicSharedSizeBytes = dynamic_shared;
    kernel.numBlockBarriers = 1;

    cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic_shared);
    if (error != CUDA_OCC_SUCCESS) {
      std::fprintf(stderr, "compute capability %d: error %d\n", arch, static_cast<int>(error));
      return 1;
    }
    std::printf("%d %d\n", result.activeBlocksPerMultiprocessor, device.maxThreadsPerMultiprocessor);
  }
}
