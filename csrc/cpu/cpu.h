/* cpu.h - the CPU's tables of kernels, one for each SIMD level: table.inc compiled for that level. */
#ifndef QG_CPU_CPU_H
#define QG_CPU_CPU_H

#include "core/backend.h"

extern const qg_backend qg_cpu_scalar;

/* Defined only where the compiler can make them. */
#if defined(__x86_64__) && defined(__GNUC__)
#define QG_HAVE_X86_LEVELS 1
extern const qg_backend qg_cpu_avx2;
extern const qg_backend qg_cpu_avx512;
#else
#define QG_HAVE_X86_LEVELS 0
#endif

#endif
