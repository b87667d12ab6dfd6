// SPDX-License-Identifier: Apache-2.0
#include "vmm/trace.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/util.h"

enum { SLOTS = 1024 }; // distinct (kind, address) pairs that are counted apart

struct slot {
    enum trace_kind kind;
    uint64_t address, count;
    const char *name;
};

struct trace {
    pthread_mutex_t lock;
    bool each;
    uint64_t start_ns, total, other; // other: exits that found the table full
    struct slot slots[SLOTS];
};

static const char *const kind_names[] = {
    [TRACE_PIO_IN] = "pio in",         [TRACE_PIO_OUT] = "pio out", [TRACE_MMIO_READ] = "mmio read",
    [TRACE_MMIO_WRITE] = "mmio write", [TRACE_OTHER] = "exit",
};

struct trace *trace_create(bool each)
{
    struct trace *trace = calloc(1, sizeof(*trace));
    if (!trace)
        return NULL;
    pthread_mutex_init(&trace->lock, NULL);
    trace->each = each;
    trace->start_ns = time_ns();
    return trace;
}

void trace_destroy(struct trace *trace)
{
    if (!trace)
        return;
    pthread_mutex_destroy(&trace->lock);
    free(trace);
}

static struct slot *slot_find(struct trace *trace, enum trace_kind kind, uint64_t address)
{
    uint64_t hash = (address * 8 + kind) * 0x9e3779b97f4a7c15ull;
    for (unsigned i = 0; i < SLOTS; i++) {
        struct slot *s = &trace->slots[((hash >> 32) + i) % SLOTS];
        if (!s->count || (s->kind == kind && s->address == address))
            return s;
    }
    return NULL;
}

void trace_exit(struct trace *trace, unsigned cpu, uint64_t rip, enum trace_kind kind,
                uint64_t address, unsigned size, uint64_t value, const char *name)
{
    pthread_mutex_lock(&trace->lock);
    trace->total++;
    struct slot *s = slot_find(trace, kind, address);
    if (s) {
        s->kind = kind;
        s->address = address;
        s->name = name;
        s->count++;
    } else {
        trace->other++;
    }
    if (trace->each)
        fprintf(stderr, "trace: %12.6f cpu%u rip %016llx %-10s %#10llx %u %#llx %s\r\n",
                (double)(time_ns() - trace->start_ns) / 1e9, cpu, (unsigned long long)rip,
                kind_names[kind], (unsigned long long)address, size, (unsigned long long)value,
                name);
    pthread_mutex_unlock(&trace->lock);
}

static int by_count(const void *a, const void *b)
{
    const struct slot *x = a, *y = b;
    return (x->count < y->count) - (x->count > y->count);
}

void trace_table(struct trace *trace, FILE *out)
{
    pthread_mutex_lock(&trace->lock);
    double seconds = (double)(time_ns() - trace->start_ns) / 1e9;
    fprintf(out, "%llu exits in %.3f s\n%12s %6s  %-10s %12s  %s\n",
            (unsigned long long)trace->total, seconds, "count", "share", "kind", "address",
            "device or reason");
    autofree struct slot *sorted = malloc(sizeof(trace->slots));
    if (sorted) {
        memcpy(sorted, trace->slots, sizeof(trace->slots));
        qsort(sorted, SLOTS, sizeof(*sorted), by_count);
        for (unsigned i = 0; i < SLOTS && sorted[i].count; i++)
            fprintf(out, "%12llu %5.1f%%  %-10s %#12llx  %s\n", (unsigned long long)sorted[i].count,
                    100.0 * (double)sorted[i].count / (double)trace->total,
                    kind_names[sorted[i].kind], (unsigned long long)sorted[i].address,
                    sorted[i].name);
    }
    if (trace->other)
        fprintf(out, "%12llu         more, at addresses beyond the first %d\n",
                (unsigned long long)trace->other, SLOTS);
    pthread_mutex_unlock(&trace->lock);
}
