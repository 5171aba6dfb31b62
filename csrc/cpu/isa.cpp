#include "common/simd.h"

#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <string>

namespace sora {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512"};

Isa best_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;  // older Clangs do not know the name "f16c"
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

struct Choice {
  Isa isa;
  std::string error;  // why SORA_KERNELS_CPU_ISA cannot be followed; empty where it can
};

const Choice& choice() {
  static const Choice chosen = [] {
    const Isa best = best_supported();
    const char* requested = std::getenv("SORA_KERNELS_CPU_ISA");
    if (!requested || !*requested) return Choice{best, ""};
    const std::string setting = "SORA_KERNELS_CPU_ISA=" + std::string(requested) + ": ";
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::string(requested) != names[static_cast<int>(isa)]) continue;
      if (isa <= best) return Choice{isa, ""};
      return Choice{best, setting + "this CPU supports no more than " + names[static_cast<int>(best)]};
    }
    return Choice{best, setting + "expected baseline, avx2 or avx512"};
  }();
  return chosen;
}

}  // namespace

Isa isa() {
  STD_TORCH_CHECK(choice().error.empty(), choice().error);
  return choice().isa;
}

bool has_bf16_products() {
#if SORA_ASSEMBLY
  const char* requested = std::getenv("SORA_KERNELS_CPU_ISA");
  static const bool supported = !(requested && *requested) && isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return supported;
#else
  return false;
#endif
}

}  // namespace sora

extern "C" __attribute__((visibility("default"))) const char* sora_kernels_cpu_isa() {
  return sora::names[static_cast<int>(sora::choice().isa)];
}

// Empty, or why no kernel of this library can run.
extern "C" __attribute__((visibility("default"))) const char* sora_kernels_cpu_error() {
  return sora::choice().error.c_str();
}
