/* internal.h - what the parts of the emulator share: threads.cpp runs kernels, memory.cpp holds device memory,
 * runtime.cpp the calls of the runtime. */
#ifndef QG_TESTS_EMULATOR_INTERNAL_H
#define QG_TESTS_EMULATOR_INTERNAL_H

#include "emulator.h"

#if defined __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

#if defined __x86_64__
enum { PAGE = 4096 };
#else
enum { PAGE = 65536 }; /* the largest in use */
#endif

/* ---------------------------------------------------------------- threads.cpp */

/* Record a fault; inside a kernel the sentence begins with the kernel, block and thread. */
void emulator_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Run a kernel now. Returns cudaErrorLaunchFailure after a fault. */
cudaError_t emulator_execute(const emulator_launch *launch);

/* Forget what kernels have done. */
void emulator_reset_kernels(void);

/* ---------------------------------------------------------------- memory.cpp */

/* A sentence's end on an address: "4 bytes behind the end of the allocation of 20 bytes at 0x...". Returns `text`. */
const char *emulator_describe(const void *address, char *text, size_t size);

/* Whether all `size` bytes lie in one allocation. Memory that the emulator did not give out counts as one too, but with
 * emulator_only_device when it is registered. */
int emulator_inside(const void *address, size_t size);

/* Whether the address is one of device memory, allocated or not. */
int emulator_is_device(const void *address);

/* Names a guard byte that was overwritten, as a fault. */
void emulator_check_guards(void);

/* All device memory as one row of bytes: its size, out of it, back into it. */
size_t emulator_memory_size(void);
void emulator_memory_save(unsigned char *copy);
void emulator_memory_restore(const unsigned char *copy);

/* The first byte in which device memory differs from `copy`, or NULL. */
const void *emulator_memory_differs(const unsigned char *copy);

#endif
