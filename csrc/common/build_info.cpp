// One C function per library, read by `python -m sora_kernels.info` through ctypes: how the library was built, as JSON.

#include <torch/headeronly/version.h>

#define SORA_QUOTE_(text) #text
#define SORA_QUOTE(text) SORA_QUOTE_(text)

extern "C" __attribute__((visibility("default"))) const char* sora_kernels_build_info() {
  return "{\"library\": \"" SORA_QUOTE(SORA_LIBRARY) "\", "
         "\"compiler\": \"" __VERSION__ "\", "
         "\"headers\": \"torch " SORA_QUOTE(TORCH_VERSION_MAJOR) "." SORA_QUOTE(TORCH_VERSION_MINOR) "."
         SORA_QUOTE(TORCH_VERSION_PATCH) "\", "
         "\"stable_abi\": \"torch >= 2.11\"}";
}
