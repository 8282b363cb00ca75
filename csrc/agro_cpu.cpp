// The functions of agro_cpu.h: checks, the choice of the instruction set, and nothing else.
// The build defines AGRO_HAVE_<ISA> for every isa_*.cpp that it links in.
#include "agro_cpu.h"

#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "kernels.h"
#include "linear_logprobs.h"

namespace agro {

namespace {

bool always() { return true; }

#if defined(__x86_64__) || defined(__i386__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

struct Choice {
  const Kernels* kernels;
  bool (*runs_here)();
};

// Best first.
const Choice choices[] = {
#ifdef AGRO_HAVE_AVX512BF16
    {&avx512bf16_kernels, has_avx512bf16},
#endif
#ifdef AGRO_HAVE_AVX512
    {&avx512_kernels, has_avx512},
#endif
#ifdef AGRO_HAVE_AVX2
    {&avx2_kernels, has_avx2},
#endif
#ifdef AGRO_HAVE_NEON
    {&neon_kernels, always},
#endif
    {&scalar_kernels, always},
};

const Kernels* find(const char* isa) {
  for (const Choice& choice : choices) {
    if (choice.runs_here() && (isa == nullptr || std::strcmp(isa, choice.kernels->isa) == 0)) {
      return choice.kernels;
    }
  }
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& in_use() {
  const Kernels* kernels = chosen.load();
  return kernels == nullptr ? *find(nullptr) : *kernels;
}

bool is_valid(const agro_head* head) {
  return head != nullptr && head->n >= 0 && head->d >= 0 && head->v >= 1 &&
         head->num_threads >= 1 && head->dtype >= AGRO_FLOAT32 && head->dtype <= AGRO_FLOAT16 &&
         (head->n == 0 || head->targets != nullptr) &&
         (head->n == 0 || head->d == 0 || (head->hidden != nullptr && head->weight != nullptr));
}

bool is_valid(const agro_kept& kept, const agro_head& head) {
  return kept.columns >= 0 && kept.columns <= head.v &&
         (kept.columns % AGRO_KEPT_TILE == 0 || kept.columns == head.v) &&
         (head.n == 0 || kept.columns == 0 || (kept.logits != nullptr && kept.maxima != nullptr));
}

bool is_valid(const agro_entries& entries, const agro_head& head) {
  return entries.count >= 0 && (head.n == 0 || entries.count == 0 ||
                                (entries.ids != nullptr && entries.values != nullptr));
}

constexpr agro_kept nothing_kept = {nullptr, nullptr, 0};
constexpr agro_entries no_entries = {nullptr, nullptr, 0};

}  // namespace

}  // namespace agro

int32_t agro_linear_logprobs_fwd(const agro_head* head, float* logprobs, float* lse,
                                 float* entropy, const agro_kept* kept) {
  if (kept == nullptr) kept = &agro::nothing_kept;
  if (!agro::is_valid(head) || !agro::is_valid(*kept, *head)) return AGRO_BAD_ARGUMENT;
  if (head->n > 0 && (logprobs == nullptr || lse == nullptr)) return AGRO_BAD_ARGUMENT;
  try {
    agro::linear_logprobs_fwd(agro::in_use(), *head, logprobs, lse, entropy, *kept);
  } catch (const std::bad_alloc&) {
    return AGRO_OUT_OF_MEMORY;
  }
  return AGRO_OK;
}

int32_t agro_linear_logprobs_bwd(const float* dlogprobs, const float* dlse, const float* dentropy,
                                 const float* dsum, const agro_head* head, const float* lse,
                                 const float* entropy, void* dhidden, void* dweight, void* dbias,
                                 float* weight_grad, const agro_kept* kept,
                                 const agro_entries* entries) {
  if (kept == nullptr) kept = &agro::nothing_kept;
  if (entries == nullptr) entries = &agro::no_entries;
  if (!agro::is_valid(head) || !agro::is_valid(*kept, *head) ||
      !agro::is_valid(*entries, *head)) {
    return AGRO_BAD_ARGUMENT;
  }
  if (head->n > 0 && (lse == nullptr || (dentropy != nullptr && entropy == nullptr))) {
    return AGRO_BAD_ARGUMENT;
  }
  if (dweight != nullptr && weight_grad != nullptr) return AGRO_BAD_ARGUMENT;
  try {
    agro::linear_logprobs_bwd(agro::in_use(), dlogprobs, dlse, dentropy, dsum, *head, lse, entropy,
                              dhidden, dweight, dbias, weight_grad, *kept, *entries);
  } catch (const std::bad_alloc&) {
    return AGRO_OUT_OF_MEMORY;
  }
  return AGRO_OK;
}

int32_t agro_interface_version(void) { return AGRO_INTERFACE_VERSION; }

const char* agro_available_isas(void) {
  static const std::string names = [] {
    std::string list;
    for (const agro::Choice& choice : agro::choices) {
      if (!choice.runs_here()) continue;
      if (!list.empty()) list += ',';
      list += choice.kernels->isa;
    }
    return list;
  }();
  return names.c_str();
}

const char* agro_isa(void) { return agro::in_use().isa; }

int32_t agro_set_isa(const char* name) {
  const agro::Kernels* kernels = name == nullptr ? nullptr : agro::find(name);
  if (kernels == nullptr) return AGRO_UNKNOWN_ISA;
  agro::chosen.store(kernels);
  return AGRO_OK;
}

void agro_exp(const float* x, float* y, int64_t n) { agro::in_use().exp(x, y, n); }

void agro_tanh(const float* x, float* y, int64_t n) { agro::in_use().tanh(x, y, n); }
