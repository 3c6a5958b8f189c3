/* memory.cpp - device memory: each allocation between unreadable pages, with guard bytes where a page is larger.
 *
 * Addresses are never given out twice, so that memory that was freed stays unreadable.
 */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { GUARD_BYTE = 0xA5, POISON = 0xFF };
static const size_t ARENA = (size_t)1 << 38;

/* Data in the middle of readable pages. Memory of the caller has no pages of its own. */
typedef struct allocation {
    unsigned char *pages;
    size_t page_bytes;
    unsigned char *data;
    size_t size;
} allocation;

typedef struct list {
    allocation *items;
    size_t count, room;
} list;

static list allocations; /* in the order of their addresses */
static list registered;
static unsigned char *arena;
static size_t arena_used;
static int at_start, only_device;

static void list_add(list *l, allocation a) {
    if (l->count == l->room) {
        l->room = l->room * 2 + 64;
        l->items = (allocation *)realloc(l->items, l->room * sizeof *l->items);
    }
    l->items[l->count++] = a;
}

static void list_remove(list *l, size_t i) {
    memmove(l->items + i, l->items + i + 1, (l->count - i - 1) * sizeof *l->items);
    l->count--;
}

void emulator_place_at_start(int on) {
    at_start = on;
}

static void set_guards(const allocation *a) {
    memset(a->pages, GUARD_BYTE, a->page_bytes);
    memset(a->data, POISON, a->size);
#if EMULATOR_ASAN
    ASAN_POISON_MEMORY_REGION(a->pages, a->page_bytes);
    ASAN_UNPOISON_MEMORY_REGION(a->data, a->size);
#endif
}

void *emulator_malloc(size_t size, size_t alignment, size_t offset) {
    if (arena == NULL) {
        void *memory = mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED)
            return NULL;
        arena = (unsigned char *)memory;
    }
    offset %= alignment;
    if (size > ARENA)
        return NULL;
    allocation a = {};
    a.size = size;
    a.page_bytes = (size + alignment + PAGE - 1) / PAGE * PAGE;
    a.pages = arena + arena_used + PAGE;
    if (a.page_bytes + 2 * PAGE > ARENA - arena_used || mprotect(a.pages, a.page_bytes, PROT_READ | PROT_WRITE) != 0)
        return NULL;
    arena_used += a.page_bytes + PAGE;
    unsigned char *const last = a.pages + a.page_bytes - size;
    a.data = at_start ? a.pages + offset : last - (((uintptr_t)last - offset) & (alignment - 1));
    set_guards(&a);
    list_add(&allocations, a);
    return a.data;
}

/* The number of allocations that begin at or before the address. */
static size_t count_before(const void *address) {
    size_t low = 0, high = allocations.count;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (allocations.items[middle].data <= (const unsigned char *)address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

int emulator_is_device(const void *address) {
    const unsigned char *a = (const unsigned char *)address;
    return arena != NULL && a >= arena && a < arena + ARENA;
}

void emulator_only_device(int on) {
    only_device = on;
}

static int inside_registered(const unsigned char *first, size_t size) {
    for (size_t i = 0; i < registered.count; i++) {
        const allocation *a = &registered.items[i];
        if (first >= a->data && first + size <= a->data + a->size)
            return 1;
    }
    return 0;
}

int emulator_inside(const void *address, size_t size) {
    static size_t hint;
    const unsigned char *first = (const unsigned char *)address;
    if (!emulator_is_device(address))
        return !only_device || inside_registered(first, size);
    if (hint >= allocations.count || first < allocations.items[hint].data ||
        first >= allocations.items[hint].data + allocations.items[hint].size) {
        const size_t before = count_before(address);
        if (before == 0)
            return 0;
        hint = before - 1;
    }
    const allocation *a = &allocations.items[hint];
    return first + size <= a->data + a->size;
}

const char *emulator_describe(const void *address, char *text, size_t size) {
    if (!emulator_is_device(address)) {
        snprintf(text, size, "address %p, which is not device memory", address);
        return text;
    }
    const unsigned char *at = (const unsigned char *)address;
    const size_t before = count_before(address);
    const allocation *a = before > 0 ? &allocations.items[before - 1] : NULL;
    const allocation *next = before < allocations.count ? &allocations.items[before] : NULL;
    if (a != NULL && at < a->data + a->size)
        snprintf(
            text, size, "byte %zu of the allocation of %zu bytes at %p", (size_t)(at - a->data), a->size,
            (void *)a->data);
    else if (a != NULL && at < a->pages + a->page_bytes + PAGE)
        snprintf(
            text, size, "address %p, %zu bytes behind the end of the allocation of %zu bytes at %p", address,
            (size_t)(at - a->data - a->size), a->size, (void *)a->data);
    else if (next != NULL && at >= next->pages - PAGE)
        snprintf(
            text, size, "address %p, %zu bytes before the allocation of %zu bytes at %p", address,
            (size_t)(next->data - at), next->size, (void *)next->data);
    else
        snprintf(text, size, "address %p, in device memory that was freed or never allocated", address);
    return text;
}

static const unsigned char *find_changed(const unsigned char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (bytes[i] != GUARD_BYTE)
            return bytes + i;
    return NULL;
}

/* AddressSanitizer sees the access itself. */
static void check_guards_of(allocation *a) {
    const unsigned char *const end = a->data + a->size;
    const unsigned char *changed = EMULATOR_ASAN ? NULL : find_changed(a->pages, (size_t)(a->data - a->pages));
    if (changed == NULL && !EMULATOR_ASAN)
        changed = find_changed(end, (size_t)(a->pages + a->page_bytes - end));
    if (changed == NULL)
        return;
    char text[256];
    emulator_fault("a guard byte was overwritten at %s", emulator_describe(changed, text, sizeof text));
    memset(a->pages, GUARD_BYTE, (size_t)(a->data - a->pages));
    memset(a->data + a->size, GUARD_BYTE, (size_t)(a->pages + a->page_bytes - end));
}

void emulator_check_guards(void) {
    for (size_t i = 0; i < allocations.count; i++)
        check_guards_of(&allocations.items[i]);
}

void emulator_free(void *memory) {
    if (memory == NULL)
        return;
    const size_t before = count_before(memory);
    allocation *a = before > 0 ? &allocations.items[before - 1] : NULL;
    if (a == NULL || a->data != memory) {
        emulator_fault("memory is freed that was not allocated, or was freed before: %p", memory);
        return;
    }
    check_guards_of(a);
#if EMULATOR_ASAN
    ASAN_UNPOISON_MEMORY_REGION(a->pages, a->page_bytes);
#endif
    mmap(a->pages, a->page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    list_remove(&allocations, before - 1);
}

void emulator_register(void *memory, size_t size) {
    allocation a = {};
    a.data = (unsigned char *)memory;
    a.size = size;
    list_add(&registered, a);
}

void emulator_unregister(void *memory) {
    for (size_t i = registered.count; i-- > 0;) {
        if (registered.items[i].data != memory)
            continue;
        list_remove(&registered, i);
        return;
    }
    emulator_fault("memory is unregistered that was not registered: %p", memory);
}

/* ---------------------------------------------------------------- copies */

/* The i-th of all memory, allocated or registered; NULL behind the last. */
static const allocation *item(size_t i) {
    if (i < allocations.count)
        return &allocations.items[i];
    i -= allocations.count;
    return i < registered.count ? &registered.items[i] : NULL;
}

size_t emulator_memory_size(void) {
    size_t size = 0;
    for (size_t i = 0; item(i) != NULL; i++)
        size += item(i)->size;
    return size;
}

void emulator_memory_save(unsigned char *copy) {
    for (size_t i = 0; item(i) != NULL; copy += item(i)->size, i++)
        memcpy(copy, item(i)->data, item(i)->size);
}

void emulator_memory_restore(const unsigned char *copy) {
    for (size_t i = 0; item(i) != NULL; copy += item(i)->size, i++)
        memcpy(item(i)->data, copy, item(i)->size);
}

const void *emulator_memory_differs(const unsigned char *copy) {
    for (size_t i = 0; item(i) != NULL; copy += item(i)->size, i++) {
        const allocation *a = item(i);
        if (memcmp(copy, a->data, a->size) == 0)
            continue;
        size_t k = 0;
        while (copy[k] == a->data[k])
            k++;
        return a->data + k;
    }
    return NULL;
}
