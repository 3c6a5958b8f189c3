/* scalar.c - the kernels for any processor. */
#include "cpu/cpu.h"

#define LANES 1
#define TABLE qg_cpu_scalar
#define NAME "scalar"
#include "cpu/table.inc"
