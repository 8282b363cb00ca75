#include "team.h"

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

Share share_of(int64_t items, int32_t thread, int32_t threads) {
  return {items * thread / threads, items * (thread + 1) / threads};
}

}  // namespace agro
