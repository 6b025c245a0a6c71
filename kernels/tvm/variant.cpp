// Which build of the kernels a library holds, for its session to report.
#include "../cpu/simd.h"
#include "views.h"

namespace edge {
namespace {

String Variant() {
#if defined(__AVX512VNNI__)
  return "AVX-512 VNNI";
#elif defined(__AVXVNNI__)
  return "AVX-VNNI";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return "NEON i8mm";
#elif defined(__ARM_FEATURE_DOTPROD)
  return "NEON dotprod";
#else
  return "NEON";
#endif
}

}  // namespace
}  // namespace edge

TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_variant, edge::Variant);
