#if defined(__x86_64__)
#define FUSED_BCE_ISA avx512
#define FUSED_BCE_TARGET "avx512f,avx2,fma,f16c"
#define FUSED_BCE_VECTOR_BYTES 64
#include "kernel_for_isa.h"
#endif
