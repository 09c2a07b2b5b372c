#if defined(__x86_64__)
#define FUSED_BCE_ISA avx2
#define FUSED_BCE_TARGET "avx2,fma,f16c"
#define FUSED_BCE_VECTOR_BYTES 32
#include "kernel_for_isa.h"
#endif
