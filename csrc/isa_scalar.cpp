#include "kernels.h"
// The order matters: each file uses the ones before it.
#include "simd_generic.h"
#include "vector_math.h"
#include "gemm.h"
#include "pack.h"
#include "epilogue.h"
#include "products.h"
#include "block.h"

namespace agro {
const Kernels scalar_kernels = kernels_named("scalar");
}
