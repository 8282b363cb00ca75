// The threads of one call.
#ifndef AGRO_TEAM_H
#define AGRO_TEAM_H

#include <cstdint>
#include <functional>

namespace agro {

// Runs work(thread, threads) for thread = 0 .. threads - 1 at the same time and waits for all.
// Thread 0 is the caller. Where the system refuses a thread, the caller does its work afterwards:
// the result depends on `threads`, never on who computed it.
void run_team(int32_t threads, const std::function<void(int32_t thread, int32_t threads)>& work);

// The share [begin, end) of `items` that belongs to one thread.
struct Share {
  int64_t begin, end;
};
Share share_of(int64_t items, int32_t thread, int32_t threads);

}  // namespace agro

#endif
