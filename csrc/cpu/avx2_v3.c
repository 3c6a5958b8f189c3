/* avx2_v3.c - the kernels for x86-64-v3; the file is compiled with -march=x86-64-v3. */
#include "cpu/cpu.h"

#if QG_HAVE_X86_LEVELS
#define LANES 8
#define TABLE qg_cpu_avx2
#define NAME "avx2"
#include "cpu/table.inc"
#endif
