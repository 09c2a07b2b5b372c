// The kernel for one instruction set. The including file defines
//   FUSED_BCE_ISA           the namespace
//   FUSED_BCE_TARGET        what the compiler may use beyond its baseline, if anything
//   FUSED_BCE_VECTOR_BYTES  width of a register; beyond 16 an x86 processor with F16C
//
// The standard headers come before the target, so that nothing of the standard library is compiled
// for more than the baseline: the linker might keep that copy for everyone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../problem.h"
#include "isa.h"

#define FUSED_BCE_PRAGMA(...) FUSED_BCE_PRAGMA_TEXT(__VA_ARGS__)
#define FUSED_BCE_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)

#if defined(FUSED_BCE_TARGET) && defined(__clang__)
FUSED_BCE_PRAGMA(clang attribute push(__attribute__((target(FUSED_BCE_TARGET))),
                                      apply_to = function))
#elif defined(FUSED_BCE_TARGET)
#pragma GCC push_options
FUSED_BCE_PRAGMA(GCC target(FUSED_BCE_TARGET))
#endif

#include "../formulas/formulas.h"

namespace fused_bce {
namespace FUSED_BCE_ISA {

constexpr int kVectorBytes = FUSED_BCE_VECTOR_BYTES;
#include "kernels.h"

}  // namespace FUSED_BCE_ISA
}  // namespace fused_bce

#if defined(FUSED_BCE_TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(FUSED_BCE_TARGET)
#pragma GCC pop_options
#endif
