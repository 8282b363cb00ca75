// The ops of agro_cpu.h on a given instruction set. Arguments are as described there and
// already checked. Memory that cannot be allocated is a std::bad_alloc.
#ifndef AGRO_LINEAR_LOGPROBS_H
#define AGRO_LINEAR_LOGPROBS_H

#include "kernels.h"

namespace agro {

void linear_logprobs_fwd(const Kernels& kernels, const agro_head& head, float* logprobs, float* lse,
                         float* entropy, const agro_kept& kept);

void linear_logprobs_bwd(const Kernels& kernels, const float* dlogprobs, const float* dlse,
                         const float* dentropy, const float* dsum, const agro_head& head,
                         const float* lse, const float* entropy, void* dhidden, void* dweight, void* dbias,
                         float* weight_grad, const agro_kept& kept, const agro_entries& entries);

}  // namespace agro

#endif
