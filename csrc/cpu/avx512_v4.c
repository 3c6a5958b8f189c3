/* avx512_v4.c - the kernels for x86-64-v4; the file is compiled with -march=x86-64-v4. */
#include "cpu/cpu.h"

#if QG_HAVE_X86_LEVELS
#define LANES 16
#define TABLE qg_cpu_avx512
#define NAME "avx512"
#include "cpu/table.inc"
#endif
