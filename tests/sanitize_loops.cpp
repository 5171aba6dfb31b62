// torch's parallel loops on threads that ThreadSanitizer sees: torch's own are OpenMP's, whose barriers it does not know.
// Loaded before torch, this definition takes the place of libtorch's in csrc/cpu. See tests/sanitize.py.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

// A thread for each of up to four pieces, whatever the grain: small tests take several threads too. With SORA_OVERLAP set
// each piece but the first begins one too early: two threads then write the same memory, which must be reported.
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* context) {
  static const bool overlap = std::getenv("SORA_OVERLAP");
  if (begin >= end) return 0;
  const int64_t size = (end - begin + 3) / 4;
  std::atomic<bool> failed = false;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += size) {
    threads.emplace_back([=, &failed] {
      try {
        f(first - (overlap && first > begin), std::min(end, first + size), context);
      } catch (...) {
        failed = true;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return failed;
}
