// SORA_LIBRARY_IMPL(CPU, m) { m.impl("_op_cpu", TORCH_BOX(&op)); }, once in a file: what STABLE_TORCH_LIBRARY_IMPL does
// when a library is loaded is done when sora_kernels_register (library.cpp) says for which namespace. One build thus
// serves every copy of the Python package, each of which has a namespace of its own.
#pragma once

#include <torch/csrc/stable/library.h>

namespace sora {

struct Registration {
  using Init = void(torch::stable::detail::StableLibrary&);
  static inline const Registration* first = nullptr;  // before any constructor runs

  const char* key;
  Init* init;
  const char* file;
  uint32_t line;
  const Registration* next = first;

  Registration(const char* key, Init* init, const char* file, uint32_t line)
      : key(key), init(init), file(file), line(line) {
    first = this;
  }
};

}  // namespace sora

#define SORA_LIBRARY_IMPL(KEY, m)                                                                          \
  static void sora_library_impl(torch::stable::detail::StableLibrary& m);                                  \
  static const sora::Registration sora_registration{#KEY, &sora_library_impl, __FILE__, __LINE__};         \
  static void sora_library_impl(torch::stable::detail::StableLibrary& m)
