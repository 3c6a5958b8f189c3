/* threads.cpp - runs a kernel on the CPU: one fiber for each thread of a block, one block after another.
 *
 * A fiber gives up the CPU only where it meets others (barrier, shuffle, vote) and when its thread is done, so the order
 * in which fibers are resumed decides every race, and can be chosen.
 */
#include "internal.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if !defined __x86_64__
#include <ucontext.h>
#endif

enum { WARP = 32, MOST_THREADS = 1024, MOST_KERNELS = 256, COLOURS = 12 };
enum { STACK = (EMULATOR_ASAN ? 512 : 128) * 1024 };

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

/* ---------------------------------------------------------------- fibers */

#if defined __x86_64__
typedef void *context;

/* Save what a call keeps on the stack of the old context, continue on that of the new one. */
extern "C" void emulator_switch(context *from, context *to) __attribute__((visibility("hidden")));
__asm__(".text\n"
        ".globl emulator_switch\n"
        ".hidden emulator_switch\n"
        ".type emulator_switch, @function\n"
        "emulator_switch:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq (%rsi), %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    ret\n"
        ".size emulator_switch, . - emulator_switch\n");

static void context_make(context *made, char *stack, size_t size, void (*entry)(void)) {
    /* At entry the stack pointer is 8 bytes below a multiple of 16, as after a call; there is nothing to return to. */
    void **top = (void **)(((uintptr_t)stack + size) & ~(uintptr_t)15);
    *--top = NULL;
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++)
        *--top = NULL;
    *made = top;
}
#else
typedef ucontext_t context;

static void emulator_switch(context *from, context *to) {
    swapcontext(from, to);
}

static void context_make(context *made, char *stack, size_t size, void (*entry)(void)) {
    getcontext(made);
    made->uc_stack.ss_sp = stack;
    made->uc_stack.ss_size = size;
    made->uc_link = NULL;
    makecontext(made, entry, 0);
}
#endif

/* A stack that runs one thread after another. */
typedef struct worker {
    context state;
    char *stack;
    size_t size;
    void *fake_stack; /* AddressSanitizer's */
} worker;

enum thread_state { READY, AT_BARRIER, AT_WARP, DONE };

typedef struct thread {
    enum thread_state state;
    uint3 index;
    worker *runs_on;  /* NULL before it starts and after its end */
    const char *file; /* where it waits */
    int line;
    unsigned mask;
    int source;
    uint64_t value, result;
} thread;

static worker workers[MOST_THREADS];
static worker *idle[MOST_THREADS];
static int idle_count, worker_count;
static thread threads[MOST_THREADS];
static int thread_count;
static unsigned meeting[MOST_THREADS / WARP]; /* lanes of a warp that wait in a shuffle or vote */
static unsigned alive[MOST_THREADS / WARP];   /* lanes that exist and have not ended */
static thread *current;
static const emulator_launch *launch;
static int failed; /* a fault ends the kernel */

static context scheduler;
#if EMULATOR_ASAN
static const void *scheduler_stack;
static size_t scheduler_size;
#endif

static void worker_main(void);

static void worker_reset(worker *w) {
#if EMULATOR_ASAN
    ASAN_UNPOISON_MEMORY_REGION(w->stack, w->size);
#endif
    w->fake_stack = NULL;
    context_make(&w->state, w->stack, w->size, worker_main);
}

static worker *worker_take(void) {
    if (idle_count > 0)
        return idle[--idle_count];
    worker *w = &workers[worker_count];
    char *memory = (char *)mmap(NULL, PAGE + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE) != 0) {
        fprintf(stderr, "emulator: no memory for stacks\n");
        abort();
    }
    w->stack = memory + PAGE;
    w->size = STACK - 320 * (size_t)(worker_count % COLOURS); /* else all of them fall on the same lines of the cache */
    worker_count++;
    worker_reset(w);
    return w;
}

/* Into the fiber of a thread, until it waits or is done. */
static void resume(thread *t) {
    if (t->runs_on == NULL)
        t->runs_on = worker_take();
    current = t;
    threadIdx = t->index;
    worker *w = t->runs_on;
#if EMULATOR_ASAN
    void *fake = NULL;
    __sanitizer_start_switch_fiber(&fake, w->stack, w->size);
#endif
    emulator_switch(&scheduler, &w->state);
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake, NULL, NULL);
#endif
    current = NULL;
    if (t->state == DONE && !failed) {
        idle[idle_count++] = w;
        t->runs_on = NULL;
    }
}

/* Out of the fiber of the running thread, back into resume(). */
static void leave(void) {
    worker *w = current->runs_on;
#if EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&w->fake_stack, scheduler_stack, scheduler_size);
#endif
    emulator_switch(&w->state, &scheduler);
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(w->fake_stack, &scheduler_stack, &scheduler_size);
#endif
}

static void worker_main(void) {
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(NULL, &scheduler_stack, &scheduler_size);
#endif
    for (;;) {
        launch->call(launch->function, launch->argument);
        current->state = DONE;
        alive[(current - threads) / WARP] &= ~(1u << emulator_lane());
        leave();
    }
}

/* ---------------------------------------------------------------- faults */

static char first_fault[1024];
static int fault_pending, faults_are_caught;

void emulator_fault(const char *format, ...) {
    char sentence[sizeof first_fault];
    size_t used = 0;
    if (launch != NULL)
        used += (size_t)snprintf(
            sentence, sizeof sentence / 2, "%s, block (%u, %u, %u)", launch->kernel, blockIdx.x, blockIdx.y,
            blockIdx.z);
    if (launch != NULL && current != NULL)
        used += (size_t)snprintf(
            sentence + used, sizeof sentence / 4, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
    if (used > 0)
        used += (size_t)snprintf(sentence + used, 3, ": ");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence + used, sizeof sentence - used, format, arguments);
    va_end(arguments);
    failed = 1;
    if (!faults_are_caught) {
        fprintf(stderr, "emulator: %s\n", sentence);
        abort();
    }
    if (!fault_pending)
        memcpy(first_fault, sentence, sizeof first_fault);
    fault_pending = 1;
}

void emulator_catch_faults(int on) {
    faults_are_caught = on;
}

const char *emulator_take_fault(void) {
    static char taken[sizeof first_fault];
    if (!fault_pending)
        return NULL;
    fault_pending = 0;
    memcpy(taken, first_fault, sizeof taken);
    return taken;
}

/* Memory that is unreadable; and the trap of an index, which is one or the other by the machine. */
static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
enum { SIGNALS = sizeof signals / sizeof signals[0] };
static struct sigaction actions_before[SIGNALS];

static void give_signals_back(void) {
    for (int i = 0; i < SIGNALS; i++)
        sigaction(signals[i], &actions_before[i], NULL);
}

/* The fiber is left where it stands. Outside of fibers the signal comes again, to whom it would have come. */
static void on_signal(int number, siginfo_t *info, void *machine) {
    if (current == NULL) {
        give_signals_back();
        return;
    }
    const char *address = (const char *)info->si_addr, *verb = "touches";
#if defined __x86_64__
    const long writes = ((ucontext_t *)machine)->uc_mcontext.gregs[REG_ERR] & 2;
    verb = writes ? "writes to" : "reads from";
#else
    (void)machine;
#endif
    char text[256];
    const char *bottom = current->runs_on->stack;
    if (number == SIGILL || number == SIGTRAP)
        emulator_fault("an index is outside of its array");
    else if (address < bottom && address >= bottom - PAGE)
        emulator_fault("the stack of the thread is full");
    else
        emulator_fault("%s %s", verb, emulator_describe(address, text, sizeof text));
    leave();
}

/* Take the signals for one launch, on a stack of their own. Returns the one before. */
static stack_t take_signals(void) {
    static char *memory;
    const size_t size = 256 * 1024;
    if (memory == NULL)
        memory = (char *)malloc(size);
    stack_t own = {}, before = {};
    own.ss_sp = memory;
    own.ss_size = size;
    sigaltstack(&own, &before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < SIGNALS; i++)
        sigaction(signals[i], &action, &actions_before[i]);
    return before;
}

/* ---------------------------------------------------------------- order */

static int order = EMULATOR_ASCENDING;
static uint64_t order_seed, order_state;

static uint64_t random_bits(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

void emulator_set_order(int wanted, uint64_t seed) {
    order = wanted;
    order_seed = seed;
}

static void arrange(uint32_t *sequence, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        sequence[i] = order == EMULATOR_DESCENDING ? count - 1 - i : i;
    for (uint32_t i = count; order == EMULATOR_SHUFFLED && i > 1; i--) {
        const uint32_t k = (uint32_t)(random_bits(&order_state) % i), other = sequence[k];
        sequence[k] = sequence[i - 1];
        sequence[i - 1] = other;
    }
}

/* ---------------------------------------------------------------- meeting places */

static void wait_at(enum thread_state state, const char *file, int line) {
    current->state = state;
    current->file = file;
    current->line = line;
    leave();
}

void emulator_barrier(const char *file, int line) {
    wait_at(AT_BARRIER, file, line);
}

int emulator_lane(void) {
    return (int)((current - threads) % WARP);
}

static const char *whereabouts(const thread *t, char *text, size_t size) {
    static const char *const names[] = {"runs", "waits at the barrier", "waits in the shuffle or vote", "has ended"};
    int used = snprintf(text, size, "thread (%u, %u, %u) %s", t->index.x, t->index.y, t->index.z, names[t->state]);
    if (t->state == AT_BARRIER || t->state == AT_WARP)
        snprintf(text + used, size - (size_t)used, " of %s:%d", t->file, t->line);
    return text;
}

/* A fault of the running thread: it does not go on. */
static void stop(void) {
    if (failed)
        leave();
}

/* The mask holds its caller, and only lanes that can still come; the source is in it. */
static void check_mask(unsigned mask, int source, const char *file, int line) {
    const int number = (int)(current - threads), lane = number % WARP;
    if ((mask >> lane & 1) == 0)
        emulator_fault("lane %d is not in its own mask 0x%08x, at %s:%d", lane, mask, file, line);
    else if (source >= 0 && (mask >> source & 1) == 0)
        emulator_fault(
            "lane %d reads lane %d, which is not in the mask 0x%08x, at %s:%d", lane, source, mask, file, line);
    const unsigned missing = mask & ~alive[number / WARP];
    const int i = __builtin_ffs((int)missing) - 1;
    if (missing != 0)
        emulator_fault(
            "the mask 0x%08x names lane %d, which %s, at %s:%d", mask, i,
            number - lane + i < thread_count ? "has ended" : "the block does not have", file, line);
    stop();
}

/* All lanes of the mask wait: hand over the values, unless they are not all in the same place with the same mask. */
static void finish_meeting(thread *warp, unsigned mask, unsigned *waiting) {
    unsigned ballot = 0;
    for (int i = 0; i < WARP; i++) {
        const thread *t = &warp[i];
        if ((mask >> i & 1) == 0)
            continue;
        if (t->file != current->file || t->line != current->line)
            return;
        if (t->mask != mask) {
            emulator_fault(
                "lane %d has the mask 0x%08x and lane %d 0x%08x, at %s:%d", emulator_lane(), mask, i, t->mask, t->file,
                t->line);
            stop();
        }
        ballot |= (unsigned)(t->value != 0) << i;
    }
    for (int i = 0; i < WARP; i++) {
        if ((mask >> i & 1) == 0)
            continue;
        warp[i].result = warp[i].source < 0 ? ballot : warp[warp[i].source].value;
        warp[i].state = READY;
    }
    *waiting &= ~mask;
}

uint64_t emulator_exchange(unsigned mask, uint64_t value, int source, const char *file, int line) {
    thread *self = current;
    const int number = (int)(self - threads), lane = number % WARP;
    unsigned *waiting = &meeting[number / WARP];
    check_mask(mask, source, file, line);
    self->mask = mask;
    self->value = value;
    self->source = source;
    self->state = AT_WARP;
    self->file = file;
    self->line = line;
    *waiting |= 1u << lane;
    if ((*waiting & mask) == mask)
        finish_meeting(self - lane, mask, waiting);
    leave();
    return self->result;
}

/* ---------------------------------------------------------------- blocks */

extern "C" {
extern unsigned char __start_qg_shared[] __attribute__((visibility("hidden")));
extern unsigned char __stop_qg_shared[] __attribute__((visibility("hidden")));
}
/* The section exists even without a kernel that uses it. */
static unsigned char shared_anchor[16] __attribute__((section("qg_shared"), used));

/* Shared memory holds another pattern in each order, so that reading what nobody wrote is a race. Written byte by byte
 * and without the sanitizer, which keeps guards of its own between the variables. */
__attribute__((no_sanitize_address, no_sanitize_undefined)) static void poison_shared(void) {
    uint64_t pattern = order == EMULATOR_ASCENDING    ? ~UINT64_C(0)
                       : order == EMULATOR_DESCENDING ? UINT64_C(0xCBCBCBCBCBCBCBCB)
                                                      : random_bits(&order_state);
    volatile uint64_t *const end = (volatile uint64_t *)((uintptr_t)__stop_qg_shared & ~(uintptr_t)7);
    for (volatile uint64_t *word = (volatile uint64_t *)(((uintptr_t)__start_qg_shared + 7) & ~(uintptr_t)7);
        word < end; word++)
        *word = pattern;
}

/* Resume the ready ones of sequence[0 .. count) in turn, until none is. Returns whether any was. */
static int run_ready(const uint32_t *sequence, uint32_t count) {
    int any = 0, again = 1;
    while (again && !failed) {
        again = 0;
        for (uint32_t i = 0; i < count && !failed; i++) {
            thread *t = &threads[sequence[i]];
            if (t->state != READY)
                continue;
            resume(t);
            again = 1;
        }
        any |= again;
    }
    return any;
}

/* Run until every thread waits or has ended: warp by warp, or all mixed where the order is shuffled. */
static void run_until_blocked(void) {
    static uint32_t sequence[MOST_THREADS];
    const uint32_t count = (uint32_t)thread_count, group = order == EMULATOR_SHUFFLED ? MOST_THREADS : WARP;
    int any = 1;
    while (any && !failed) {
        any = 0;
        arrange(sequence, count);
        for (uint32_t i = 0; i < count; i += group)
            any |= run_ready(sequence + i, count - i < group ? count - i : group);
    }
}

/* Nobody can run: all have ended (returns 0), all wait at one barrier (they go on, returns 1), or it is a fault. */
static int settle(void) {
    const thread *at_barrier = NULL, *elsewhere = NULL;
    char here[300], there[300];
    for (int i = 0; i < thread_count; i++) {
        const thread *t = &threads[i];
        if (t->state == AT_WARP) {
            for (int k = i / WARP * WARP; k < thread_count && k < i / WARP * WARP + WARP; k++)
                if ((t->mask >> (k % WARP) & 1) != 0 &&
                    (threads[k].state != AT_WARP || threads[k].file != t->file || threads[k].line != t->line))
                    elsewhere = &threads[k];
            emulator_fault(
                "%s with the mask 0x%08x, but %s", whereabouts(t, here, sizeof here), t->mask,
                elsewhere != NULL ? whereabouts(elsewhere, there, sizeof there) : "its lanes never meet");
            return 0;
        }
        if (t->state == AT_BARRIER && at_barrier == NULL)
            at_barrier = t;
    }
    if (at_barrier == NULL)
        return 0;
    for (int i = 0; i < thread_count; i++) {
        const thread *t = &threads[i];
        if (t->state == DONE || t->file != at_barrier->file || t->line != at_barrier->line) {
            emulator_fault(
                "%s, but %s", whereabouts(at_barrier, here, sizeof here), whereabouts(t, there, sizeof there));
            return 0;
        }
    }
    for (int i = 0; i < thread_count; i++)
        threads[i].state = READY;
    return 1;
}

static void run_block(void) {
    poison_shared();
    memset(meeting, 0, sizeof meeting);
    memset(alive, 0, sizeof alive);
    for (int i = 0; i < thread_count; i++) {
        const unsigned k = (unsigned)i, x = blockDim.x, y = blockDim.y;
        threads[i] = thread{};
        threads[i].index = uint3{k % x, k / x % y, k / x / y};
        alive[i / WARP] |= 1u << (i % WARP);
    }
    do
        run_until_blocked();
    while (!failed && settle());
}

/* One run of the kernel in the order that is set. */
static void run_grid(void) {
    const uint32_t count = gridDim.x * gridDim.y * gridDim.z;
    uint32_t *sequence = (uint32_t *)malloc(count * sizeof *sequence);
    order_state = order_seed;
    arrange(sequence, count);
    for (uint32_t i = 0; i < count && !failed; i++) {
        const uint32_t k = sequence[i];
        blockIdx = uint3{k % gridDim.x, k / gridDim.x % gridDim.y, k / gridDim.x / gridDim.y};
        run_block();
    }
    free(sequence);
    if (!failed)
        emulator_check_guards();
    for (int i = 0; failed && i < worker_count; i++) { /* some stand in the middle of a kernel */
        worker_reset(&workers[i]);
        idle[i] = &workers[i];
        idle_count = worker_count;
    }
}

/* ---------------------------------------------------------------- races */

static int races_are_checked;

void emulator_check_races(int on) {
    races_are_checked = on;
}

/* Run again in `another` order from the same start, and compare with what the first run left. */
static void run_again(const unsigned char *start, const unsigned char *first, int another) {
    static const char *const names[] = {"ascending", "descending", "shuffled"};
    const int before = order;
    char text[256];
    emulator_memory_restore(start);
    order = another;
    run_grid();
    order = before;
    const void *differs = failed ? NULL : emulator_memory_differs(first);
    if (differs != NULL)
        emulator_fault(
            "a race: ascending and %s threads leave different bits at %s", names[another],
            emulator_describe(differs, text, sizeof text));
}

static void run_in_all_orders(void) {
    const size_t size = emulator_memory_size();
    const int before = order;
    unsigned char *start = (unsigned char *)malloc(size + 1), *first = (unsigned char *)malloc(size + 1);
    emulator_memory_save(start);
    order = EMULATOR_ASCENDING;
    run_grid();
    order = before;
    emulator_memory_save(first);
    if (!failed)
        run_again(start, first, EMULATOR_DESCENDING);
    if (!failed)
        run_again(start, first, EMULATOR_SHUFFLED);
    free(start);
    free(first);
}

/* ---------------------------------------------------------------- counts */

typedef struct kernel_counts {
    char name[96];
    emulator_counts counts;
} kernel_counts;

static kernel_counts kernels[MOST_KERNELS];
static int kernel_count;
static kernel_counts *counted; /* the running kernel */

static kernel_counts *counts_of(const char *name) {
    for (int i = 0; i < kernel_count; i++)
        if (strcmp(kernels[i].name, name) == 0)
            return &kernels[i];
    kernel_counts *k = &kernels[kernel_count < MOST_KERNELS - 1 ? kernel_count++ : MOST_KERNELS - 1];
    snprintf(k->name, sizeof k->name, "%s", name);
    return k;
}

static void largest(int64_t *most, int64_t value) {
    *most = *most > value ? *most : value;
}

emulator_counts emulator_count(const char *kernel) {
    emulator_counts sum = {};
    for (int i = 0; i < kernel_count; i++) {
        const emulator_counts *c = &kernels[i].counts;
        if (kernel != NULL && strcmp(kernels[i].name, kernel) != 0)
            continue;
        sum.launches += c->launches;
        sum.loaded += c->loaded;
        sum.stored += c->stored;
        largest(&sum.threads, c->threads);
        largest(&sum.blocks, c->blocks);
    }
    return sum;
}

int64_t emulator_bytes(const char *kernel) {
    const emulator_counts counts = emulator_count(kernel);
    return counts.loaded + counts.stored;
}

void emulator_reset_kernels(void) {
    kernel_count = 0;
    memset(kernels, 0, sizeof kernels);
}

static void check_access(const void *address, size_t size, const char *verb) {
    char text[256];
    if (((uintptr_t)address & (size - 1)) != 0)
        emulator_fault("misaligned: %s %zu bytes at once at %p", verb, size, address);
    else if (!emulator_inside(address, size))
        emulator_fault("%s %zu bytes at %s", verb, size, emulator_describe(address, text, sizeof text));
    stop();
}

void emulator_note_load(const void *address, size_t size) {
    if (current == NULL)
        return;
    counted->counts.loaded += (int64_t)size;
    check_access(address, size, "reads");
}

void emulator_note_store(void *address, size_t size) {
    if (current == NULL)
        return;
    counted->counts.stored += (int64_t)size;
    check_access(address, size, "writes");
}

/* ---------------------------------------------------------------- launches */

cudaError_t emulator_execute(const emulator_launch *wanted) {
    char name[sizeof counted->name];
    snprintf(name, sizeof name, "%s", wanted->kernel + (wanted->kernel[0] == '('));
    if (wanted->kernel[0] == '(')
        name[strcspn(name, ")")] = 0;
    emulator_launch named = *wanted;
    named.kernel = name;
    launch = &named;
    gridDim = wanted->grid;
    blockDim = wanted->block;
    blockIdx = uint3{};
    thread_count = (int)(blockDim.x * blockDim.y * blockDim.z);
    counted = counts_of(name);
    counted->counts.launches++;
    largest(&counted->counts.threads, thread_count);
    largest(&counted->counts.blocks, (int64_t)gridDim.x * gridDim.y * gridDim.z);
    failed = 0;
    const stack_t signal_stack = take_signals();
    if (races_are_checked) {
        const emulator_counts before = counted->counts;
        run_in_all_orders();
        counted->counts.loaded = before.loaded + (counted->counts.loaded - before.loaded) / 3;
        counted->counts.stored = before.stored + (counted->counts.stored - before.stored) / 3;
    } else {
        run_grid();
    }
    give_signals_back();
    sigaltstack(&signal_stack, NULL);
    launch = NULL;
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}
