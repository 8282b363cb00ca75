// One forward and one backward call of the native CPU kernels in a process of its own, for a CPU
// that Python does not run on: test_cpu_emulated.py writes the call and reads the results.
//
//     call_native ISA < call > results
//
// A call is the sizes below, then the arrays of agro_head and the upstream gradients; the results
// are logprobs, lse, entropy, dhidden, dweight and dbias, one after the other.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "agro_cpu.h"

namespace {

struct Sizes {
  int64_t n, d, v, ignore_index, dtype, num_threads, has_bias, kept_columns;
  float temperature, softcap;
};

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (fread(values.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) exit(3);
  return values;
}

template <class T>
void write(const std::vector<T>& values) {
  if (fwrite(values.data(), sizeof(T), values.size(), stdout) != values.size()) exit(4);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2 || agro_set_isa(arguments[1]) != AGRO_OK) {
    fprintf(stderr, "expected one of %s\n", agro_available_isas());
    return 2;
  }
  const Sizes sizes = read<Sizes>(1)[0];
  const int64_t n = sizes.n, d = sizes.d, v = sizes.v;
  const int64_t bytes = sizes.dtype == AGRO_FLOAT32 ? 4 : 2;
  const std::vector<char> hidden = read<char>(n * d * bytes), weight = read<char>(v * d * bytes);
  const std::vector<char> bias = read<char>(sizes.has_bias * v * bytes);
  const std::vector<int64_t> targets = read<int64_t>(n);
  const std::vector<float> token_temperature = read<float>(n);
  const std::vector<float> dlogprobs = read<float>(n), dlse = read<float>(n);
  const std::vector<float> dentropy = read<float>(n);
  const agro_head head = {hidden.data(),
                          weight.data(),
                          targets.data(),
                          sizes.has_bias ? bias.data() : nullptr,
                          sizes.temperature > 0.0f ? nullptr : token_temperature.data(),
                          n,
                          d,
                          v,
                          d,
                          d,
                          sizes.ignore_index,
                          sizes.temperature,
                          sizes.softcap,
                          static_cast<int32_t>(sizes.dtype),
                          static_cast<int32_t>(sizes.num_threads)};
  std::vector<float> logprobs(n), lse(n), entropy(n);
  std::vector<char> dhidden(n * d * bytes), dweight(v * d * bytes), dbias(v * bytes);
  std::vector<char> kept_logits(n * sizes.kept_columns * bytes);
  std::vector<float> kept_maxima(n * ((sizes.kept_columns + AGRO_KEPT_TILE - 1) / AGRO_KEPT_TILE));
  const agro_kept kept = {kept_logits.data(), kept_maxima.data(), sizes.kept_columns};
  if (agro_linear_logprobs_fwd(&head, logprobs.data(), lse.data(), entropy.data(), &kept) !=
          AGRO_OK ||
      agro_linear_logprobs_bwd(dlogprobs.data(), dlse.data(), dentropy.data(), nullptr, &head,
                               lse.data(), entropy.data(), dhidden.data(), dweight.data(),
                               sizes.has_bias ? dbias.data() : nullptr, nullptr, &kept,
                               nullptr) != AGRO_OK) {
    return 5;
  }
  write(logprobs);
  write(lse);
  write(entropy);
  write(dhidden);
  write(dweight);
  if (sizes.has_bias) write(dbias);
  return 0;
}
