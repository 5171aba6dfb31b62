// What a library says and does as a whole, by C functions that Python calls through ctypes.

#include "common/library.h"

#include <torch/headeronly/version.h>

#include <exception>
#include <string>

#define SORA_QUOTE_(text) #text
#define SORA_QUOTE(text) SORA_QUOTE_(text)
#define SORA_EXPORT extern "C" __attribute__((visibility("default")))

// How the library was built, as JSON.
SORA_EXPORT const char* sora_kernels_build_info() {
  return "{\"library\": \"" SORA_QUOTE(SORA_LIBRARY) "\", "
         "\"compiler\": \"" __VERSION__ "\", "
         "\"headers\": \"torch " SORA_QUOTE(TORCH_VERSION_MAJOR) "." SORA_QUOTE(TORCH_VERSION_MINOR) "."
         SORA_QUOTE(TORCH_VERSION_PATCH) "\", "
         "\"stable_abi\": \"torch >= 2.11\"}";
}

// Registers the kernels for the operators of a namespace, for as long as the process lives. Empty, or why it failed.
SORA_EXPORT const char* sora_kernels_register(const char* name) {
  using torch::stable::detail::StableLibrary;
  static std::string error;
  error.clear();
  try {
    for (const auto* block = sora::Registration::first; block; block = block->next)
      block->init(*new StableLibrary(StableLibrary::Kind::IMPL, name, block->key, block->file, block->line));
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}
