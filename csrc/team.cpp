#include "team.h"

#include "kernels.h"

#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace agro {

void run_team(int32_t threads, const std::function<void(int32_t, int32_t)>& work) {
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  int32_t started = 1;
  try {
    for (; started < threads; ++started) others.emplace_back(work, started, threads);
  } catch (const std::system_error&) {  // no thread to be had: the loop below serves
  } catch (const std::bad_alloc&) {     // nor memory for one
  }
  work(0, threads);
  for (int32_t thread = started; thread < threads; ++thread) work(thread, threads);
  for (std::thread& other : others) other.join();
}

void wait_for(const int32_t* count, int32_t at_least) {
  constexpr int kSpins = 1000;  // a turn is some microseconds; after that somebody else may need the CPU
  for (int spins = 0; __atomic_load_n(count, __ATOMIC_ACQUIRE) < at_least; ++spins) {
    if (spins >= kSpins) std::this_thread::yield();
  }
}

Share share_of(int64_t items, int32_t thread, int32_t threads) {
  return {items * thread / threads, items * (thread + 1) / threads};
}

}  // namespace agro
