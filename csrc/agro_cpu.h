/* The plain C interface of the native CPU kernels of the head ops.
 *
 * Letters: N tokens, D hidden size, V vocabulary. With x = hidden @ weight.T + bias,
 *
 *     z = softcap * tanh(x / softcap) / temperature      (x / temperature without a softcap)
 *     lse = log sum_v exp(z_v),  logprob = z_target - lse,  p_v = exp(z_v - lse)
 *     entropy = lse - sum_v p_v z_v
 *
 * Layouts: every matrix is row-major with a contiguous last dimension; outputs are contiguous.
 * Numbers: logprob, lse and entropy are fp32, in nats. Sums are fp32 and logits are never rounded
 * to a narrower type; every element of a result is rounded once to the type it is stored in.
 * A row counts if its target is not ignore_index. The rows of hidden and token_temperature that do
 * not count are never read, and their results are exactly 0.
 * A token with logit -inf (bias -inf) has probability 0. A row whose every logit is -inf has
 * lse -inf, logprob NaN and entropy NaN.
 *
 * Threads: any function may be called from any thread, several at a time. A call starts
 * num_threads - 1 threads and joins them before it returns; nothing outlives a call, so a fork
 * between calls is safe. Forward results are bitwise the same for every num_threads and for every
 * set of other rows. Gradients repeat bitwise for a given num_threads, and are the same for any
 * num_threads from 4 on.
 * No call reads or writes memory beyond what its arguments describe; buffers must not overlap.
 */
#ifndef AGRO_CPU_H
#define AGRO_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define AGRO_API __declspec(dllexport)
#else
#define AGRO_API __attribute__((visibility("default")))
#endif

/* Raised with every change of a signature, a struct or a meaning in this file. */
#define AGRO_INTERFACE_VERSION 4

/* Values of agro_head.dtype. */
#define AGRO_FLOAT32 0
#define AGRO_BFLOAT16 1
#define AGRO_FLOAT16 2

/* Columns of the vocabulary that are kept together; see agro_kept. */
#define AGRO_KEPT_TILE 192

/* Values that functions return. */
#define AGRO_OK 0
#define AGRO_BAD_ARGUMENT 1  /* a size below 0, an unknown dtype, a required pointer is NULL */
#define AGRO_OUT_OF_MEMORY 2 /* the call's buffers could not be allocated; outputs undefined */
#define AGRO_UNKNOWN_ISA 3   /* agro_set_isa: not built in, or not of this CPU */

/* The inputs that every op shares. */
typedef struct agro_head {
  const void* hidden;             /* (N, D) dtype; row i starts at i * hidden_stride */
  const void* weight;             /* (V, D) dtype; row v starts at v * weight_stride */
  const int64_t* targets;         /* (N,), in [0, V) or ignore_index; checked by the caller */
  const void* bias;               /* (V,) dtype, or NULL */
  const float* token_temperature; /* (N,), > 0 where the row counts; NULL: temperature serves */
  int64_t n, d, v;                /* N, D >= 0, V >= 1 */
  int64_t hidden_stride;          /* elements; any sign, 0 (an expanded row) included */
  int64_t weight_stride;          /* elements */
  int64_t ignore_index;           /* the target value of rows that do not count */
  float temperature;              /* > 0; unused with token_temperature */
  float softcap;                  /* > 0, or 0.0 for none */
  int32_t dtype;                  /* AGRO_FLOAT32, AGRO_BFLOAT16 or AGRO_FLOAT16 */
  int32_t num_threads;            /* >= 1 */
} agro_head;

/* Logits that the forward pass keeps, so that the backward pass need not compute them again: those
 * of the first `columns` entries of the vocabulary, of every row that counts. Kept is
 * max(z - m, -65504), m the largest z of the row in the tile. README.md says where each number
 * lies; a backward pass finds it if N, V, dtype and columns are those of the forward pass, whichever
 * instruction set either uses, and whichever rows it leaves out.
 */
typedef struct agro_kept {
  void* logits;    /* room for N * columns fp16 numbers, fp32 ones if dtype is AGRO_FLOAT32 */
  float* maxima;   /* room for N * ceil(columns / AGRO_KEPT_TILE) numbers */
  int64_t columns; /* a multiple of AGRO_KEPT_TILE, or V; 0: nothing is kept */
} agro_kept;

/* Entries of the logits' gradient that the caller has computed: those of many targets a token. */
typedef struct agro_entries {
  const int64_t* ids;  /* (N, count), in [0, V) and at most once a row; any other number is none */
  const float* values; /* (N, count): d loss / d x, x the product of the row's id */
  int64_t count;       /* of each row, >= 0 */
} agro_entries;

/* Log-probabilities of the targets.
 *
 * logprobs: (N,); lse: (N,); entropy: (N,), or NULL if not wanted.
 * kept: where logits are kept, written; NULL: nowhere. The results are bitwise the same.
 */
AGRO_API int32_t agro_linear_logprobs_fwd(const agro_head* head, float* logprobs, float* lse,
                                          float* entropy, const agro_kept* kept);

/* Gradients, from logits that were kept or are computed again:
 *
 *     dz_v = dlogprob (1[v = target] - p_v) - dentropy p_v (log p_v + entropy) + dlse p_v + dsum
 *
 * dlogprobs, dlse, dentropy, dsum: (N,) upstream gradients, the last that of the sum of all z_v;
 * each may be NULL (zero).
 * lse: (N,) from the forward; entropy: (N,) from the forward, may be NULL if dentropy is.
 *
 * dhidden: (N, D) dtype; dbias: (V,) dtype; each NULL if not wanted, and then costs nothing.
 * dweight: (V, D) dtype, written; weight_grad: (V, D) fp32, added to. At most one of the two is
 * not NULL; with both NULL the gradient of weight is not computed.
 *
 * kept: what the forward pass wrote, left as it is; NULL: nothing.
 * entries: written over the gradients of their products; NULL: none.
 */
AGRO_API int32_t agro_linear_logprobs_bwd(const float* dlogprobs, const float* dlse,
                                          const float* dentropy, const float* dsum,
                                          const agro_head* head, const float* lse,
                                          const float* entropy, void* dhidden, void* dweight,
                                          void* dbias, float* weight_grad, const agro_kept* kept,
                                          const agro_entries* entries);

/* AGRO_INTERFACE_VERSION of the built library. */
AGRO_API int32_t agro_interface_version(void);

/* The instruction sets that are built in and that this CPU has, best first, separated by commas,
 * such as "avx512bf16,avx512,avx2,scalar". "scalar" is always there, last. */
AGRO_API const char* agro_available_isas(void);

/* The instruction set in use; the best one until agro_set_isa is called. */
AGRO_API const char* agro_isa(void);

/* Use the named instruction set from now on. Calls that have begun keep theirs. */
AGRO_API int32_t agro_set_isa(const char* name);

/* The exp and tanh of the instruction set in use, y[i] = f(x[i]) for i < n: open to tests.
 * exp errs by at most 1 ulp wherever its result is a normal number; smaller results are 0.
 * tanh errs by at most 2 ulp. Both give NaN for NaN. */
AGRO_API void agro_exp(const float* x, float* y, int64_t n);
AGRO_API void agro_tanh(const float* x, float* y, int64_t n);

#ifdef __cplusplus
}
#endif

#endif
