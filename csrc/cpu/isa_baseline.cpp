// The architecture's baseline, SSE2 on x86-64 and NEON on arm64: it runs anywhere.
#define FUSED_BCE_ISA baseline
#define FUSED_BCE_VECTOR_BYTES 16
#include "kernel_for_isa.h"
