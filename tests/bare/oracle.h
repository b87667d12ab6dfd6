// SPDX-License-Identifier: Apache-2.0
// The byte-increment guest `incr`, which proves that no write to memory was lost or doubled: it
// adds one to the first byte of each of its pages, page after page. Stopped at any moment, the
// bytes are equal or drop by one exactly once. With the hooks that move it between VMs of this
// process.
#pragma once

#include <errno.h>
#include <string.h>

#include "migrate/migrate.h"
#include "tests/bare/bare.h"
#include "tests/bare/moves.h"
#include "tests/check_ok.h"

// --- the guest and its oracle

struct oracle_range {
    uint64_t base, pages, cpu;
};

struct guest {
    struct bare *bare; // where it lives now
    unsigned cpus, ranges;
    uint64_t memory;
    enum ram_backing backing;
    enum ram_log log;
    enum prepage_kind prepaging;
    const char *listen;   // NULL: TCP over loopback
    unsigned timeout_ms;  // 0: the usual ones
    unsigned connections; // 0: one
    struct channel_security security;
    struct oracle_range range[64];
    uint64_t heartbeat[VM_MAX_VCPUS];
};

static inline void guest_boot(struct guest *g, unsigned cpus, uint64_t memory, uint64_t pages,
                              uint64_t base, uint64_t period_us)
{
    struct bare_config config = {
        .guest = "incr",
        .cpus = cpus,
        .memory = memory,
        .backing = g->backing,
        .log = g->log,
        .params = {{UCALL_P_PAGES, pages}, {UCALL_P_BASE, base}, {UCALL_P_PERIOD_US, period_us}},
        .nr_params = 3};
    g->bare = calloc(1, sizeof(*g->bare));
    g->cpus = cpus;
    g->memory = memory;
    g->prepaging = PREPAGE_MULTI;
    bare_create(g->bare, &config);
    bare_run(g->bare);
    bare_wait_syncs(g->bare, 1);
    g->ranges = (unsigned)bare_value(g->bare, UCALL_V_RANGES, 0);
    ck_assert_uint_le(g->ranges, 64);
    for (unsigned i = 0; i < g->ranges; i++)
        g->range[i] = (struct oracle_range) {bare_value(g->bare, UCALL_V_RANGE_BASE, i),
                                             bare_value(g->bare, UCALL_V_RANGE_PAGES, i),
                                             bare_value(g->bare, UCALL_V_RANGE_CPU, i)};
    for (unsigned i = 0; i < cpus; i++)
        g->heartbeat[i] = bare_value(g->bare, UCALL_V_HEARTBEAT, i);
}

// Every vCPU completes two more loops: it runs, and has met every one of its pages.
static inline void guest_moves(struct guest *g)
{
    for (unsigned i = 0; i < g->cpus; i++) {
        uint64_t beat = bare_u64(g->bare, g->heartbeat[i]);
        beat = bare_wait_change(g->bare, g->heartbeat[i], beat);
        bare_wait_change(g->bare, g->heartbeat[i], beat);
    }
}

// The first bytes along a CPU's pages are equal, or drop by one exactly once.
static inline void oracle_check(struct guest *g, struct vm *vm)
{
    ck_assert(vm_paused(vm));
    for (unsigned cpu = 0; cpu < g->cpus; cpu++) {
        int first = -1, now = -1;
        unsigned drops = 0;
        for (unsigned i = 0; i < g->ranges; i++) {
            if (g->range[i].cpu != cpu)
                continue;
            for (uint64_t p = 0; p < g->range[i].pages; p++) {
                uint64_t gpa = g->range[i].base + p * PAGE_SIZE;
                const uint8_t *byte = ram_at(&vm->ram, gpa, 1);
                ck_assert_ptr_nonnull(byte);
                if (first < 0)
                    first = now = *byte;
                if (*byte == now)
                    continue;
                drops++;
                if (*byte != (uint8_t)(now - 1) || drops > 1)
                    ck_abort_msg("cpu %u: page at 0x%llx has %u after %d (first %d, drops %u)", cpu,
                                 (unsigned long long)gpa, *byte, now, first, drops);
                now = *byte;
            }
        }
        ck_assert_int_ge(first, 0);
    }
}

static inline void guest_check(struct guest *g)
{
    guest_moves(g);
    bare_pause(g->bare);
    oracle_check(g, g->bare->vm);
    uint64_t beat = bare_u64(g->bare, g->heartbeat[0]);
    ck_assert_uint_eq(bare_u64(g->bare, g->heartbeat[0]), beat);
    bare_resume(g->bare);
}

// Waits until every page holds data: the guest writes them in order, so the last one tells.
static inline void guest_touches_all(struct guest *g)
{
    const struct oracle_range *r = &g->range[g->ranges - 1];
    const volatile uint8_t *last =
        ram_at(&g->bare->vm->ram, r->base + (r->pages - 1) * PAGE_SIZE, 1);
    const uint64_t limit = time_ns() + BARE_WAIT_SECONDS * 1000000000ull;
    while (!*last && time_ns() < limit)
        usleep(1000);
    ck_assert_uint_lt(time_ns(), limit);
}

static inline void guest_end(struct guest *g)
{
    bare_end(g->bare);
    free(g->bare);
    g->bare = NULL;
}

// --- hooks: the JSON is a word, the machine is the guest's

static inline int describe(void *context, struct vm *vm, char **json, struct error *err)
{
    *json = strdup("{\"machine\":\"bare\"}");
    return *json ? 0 : -ENOMEM;
}

static inline int create_vm(void *context, const char *json, struct vm **vm, struct error *err)
{
    struct host *host = context;
    if (strcmp(json, "{\"machine\":\"bare\"}"))
        return error_set(err, -EINVAL, "description '%s'", json);
    const struct bare_config config = {.cpus = host->guest->cpus,
                                       .memory = host->guest->memory,
                                       .backing = host->guest->backing,
                                       .log = host->guest->log};
    host->bare = calloc(1, sizeof(*host->bare));
    bare_create(host->bare, &config);
    *vm = host->bare->vm;
    return 0;
}

static inline void destroy_vm(void *context, struct vm *vm)
{
    struct host *host = context;
    ck_assert_ptr_eq(vm, host->bare->vm);
    bare_end(host->bare);
    free(host->bare);
    host->bare = NULL;
    host->destroyed++;
}

static inline void arrived(void *context, struct vm *vm)
{
    ((struct host *)context)->arrived++;
}

static inline struct migrate_hooks hooks_of(struct host *host)
{
    return (struct migrate_hooks) {.context = host,
                                   .describe = describe,
                                   .create_vm = create_vm,
                                   .destroy_vm = destroy_vm,
                                   .arrived = arrived};
}
