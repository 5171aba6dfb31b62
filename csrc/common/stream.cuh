// The device and the stream that torch is working on. torch's CUDA half is looked up in the running process instead of
// linked, so that this library builds against a CPU-only torch and loads under one.

#pragma once

#include "common/check.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

namespace sora {

#define SORA_CUDA_CHECK(call)                                                                              \
  do {                                                                                                     \
    const cudaError_t status = (call);                                                                     \
    SORA_CHECK(status == cudaSuccess, #call ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status)); \
  } while (0)

inline cudaStream_t current_stream(int32_t device) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Lookup>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  SORA_CHECK(lookup, "this torch has no CUDA support: install a CUDA build of torch");
  void* stream = nullptr;
  SORA_CHECK(lookup(device, &stream) == 0, "torch has no current stream for CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    SORA_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) SORA_CUDA_CHECK(cudaSetDevice(device));
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace sora
