// The module sora_kernels._C: facts about this build and this CPU. It links neither torch nor CUDA, so that it loads
// wherever Python does.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__},
          {"cxx_standard", std::to_string(__cplusplus / 100 % 100)},
          {"python", std::to_string(PY_MAJOR_VERSION) + "." + std::to_string(PY_MINOR_VERSION)},
          {"pybind11", std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR)}};
}

std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return {{"avx2", __builtin_cpu_supports("avx2") != 0},
          {"fma", __builtin_cpu_supports("fma") != 0},
          {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
          {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
          {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
          {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0}};
#else
  return {};
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about the compiled part of sora_kernels.";
  module.def("build_info", &build_info, "Compiler, C++ standard, Python and pybind11 this module was built with.");
  module.def("cpu_features", &cpu_features, "Instruction sets of this CPU, by name.");
}
