// SPDX-License-Identifier: Apache-2.0
// usage: bench_credit [VCPUS] [PCPUS] [DECISIONS]      (500 64 200000)
//
// What one decision of the credit scheduler costs: each call is timed alone, on virtual time, with
// vCPUs that run, block and wake at random. Prints the median, the 99th percentile and the mean, in
// nanoseconds, less what reading the clock costs.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "sched/credit.h"
#include "vmm/util.h"

#define MS 1000000ull

enum { VCPUS_MAX = 4096 };

enum call { PICK, CHARGE, WAKE, BLOCK, TIMER, CALLS };

struct samples {
    uint32_t *ns;
    size_t nr, size;
};

struct bench {
    struct credit credit;
    struct credit_vm *vms;
    struct credit_vcpu *vcpus;
    unsigned nr_vcpus, nr_pcpus;
    struct samples calls[CALLS];
    uint64_t began_ns, clock_ns, random;
};

static uint64_t rnd(struct bench *b, uint64_t below)
{
    b->random = b->random * 6364136223846793005u + 1442695040888963407u;
    return (b->random >> 33) % below;
}

static void begin(struct bench *b)
{
    b->began_ns = time_ns();
}

static void end(struct bench *b, enum call call)
{
    uint64_t ns = time_ns() - b->began_ns;
    struct samples *s = &b->calls[call];
    if (s->nr < s->size)
        s->ns[s->nr++] = (uint32_t)(ns > b->clock_ns ? ns - b->clock_ns : 0);
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void print(const char *name, struct samples *s)
{
    uint64_t sum = 0;
    if (!s->nr)
        return;
    qsort(s->ns, s->nr, sizeof(s->ns[0]), ascending);
    for (size_t i = 0; i < s->nr; i++)
        sum += s->ns[i];
    printf("%-7s %8zu calls  p50 %6u  p99 %6u  mean %6.0f ns\n", name, s->nr, s->ns[s->nr / 2],
           s->ns[s->nr * 99 / 100], (double)sum / (double)s->nr);
}

static uint64_t clock_cost(void)
{
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < 1000; i++) {
        uint64_t a = time_ns(), b = time_ns();
        least = b - a < least ? b - a : least;
    }
    return least;
}

static int set_up(struct bench *b)
{
    struct error err;
    struct credit_params params = credit_params_default(b->nr_pcpus);
    for (unsigned p = 0; p < b->nr_pcpus; p++)
        params.node[p] = (uint8_t)(p * 4 / b->nr_pcpus);
    if (credit_init(&b->credit, &params, 0, &err))
        return fprintf(stderr, "bench_credit: %s\n", err.text), -1;
    for (unsigned i = 0; i < b->nr_vcpus; i++) {
        struct credit_vm *vm = &b->vms[i / 4];
        const struct credit_vm_config config = {
            .weight = 64u << rnd(b, 5), .cap = i / 4 % 5 ? 0 : 150, .hard = CREDIT_ANY_PCPU};
        if (i % 4 == 0 && credit_vm_add(&b->credit, vm, i / 4, &config, &err))
            return fprintf(stderr, "bench_credit: %s\n", err.text), -1;
        credit_vcpu_add(&b->credit, vm, &b->vcpus[i], i % 4, 0);
        credit_wake(&b->credit, &b->vcpus[i], 0);
    }
    return 0;
}

// One pCPU comes to its next decision; one vCPU in eight blocks there, and a blocked one wakes.
static void step(struct bench *b, unsigned p, uint64_t now)
{
    struct credit_vcpu *v = b->credit.pcpus[p].current;
    if (v) {
        begin(b);
        credit_charge(&b->credit, v, 1 * MS, now);
        end(b, CHARGE);
        if (!rnd(b, 8)) {
            begin(b);
            credit_block(&b->credit, v, now);
            end(b, BLOCK);
        }
    }
    struct credit_vcpu *w = &b->vcpus[rnd(b, b->nr_vcpus)];
    if (w->state == CREDIT_BLOCKED) {
        begin(b);
        credit_wake(&b->credit, w, now);
        end(b, WAKE);
    }
    begin(b);
    credit_pick(&b->credit, p, now);
    end(b, PICK);
    if (now >= credit_next(&b->credit, 0)) {
        begin(b);
        credit_timer(&b->credit, now);
        end(b, TIMER);
    }
    credit_kicks(&b->credit);
}

int main(int argc, char **argv)
{
    static const char *const names[CALLS] = {"pick", "charge", "wake", "block", "timer"};
    static struct bench b;
    b.nr_vcpus = argc > 1 ? (unsigned)atoi(argv[1]) : 500;
    b.nr_pcpus = argc > 2 ? (unsigned)atoi(argv[2]) : 64;
    const size_t decisions = argc > 3 ? (size_t)atol(argv[3]) : 200000;
    if (!b.nr_vcpus || b.nr_vcpus > VCPUS_MAX || !b.nr_pcpus || b.nr_pcpus > CREDIT_PCPUS_MAX) {
        fprintf(stderr, "usage: bench_credit [VCPUS, to %d] [PCPUS, to %d] [DECISIONS]\n",
                VCPUS_MAX, CREDIT_PCPUS_MAX);
        return 2;
    }
    b.vms = calloc(b.nr_vcpus, sizeof(*b.vms));
    b.vcpus = calloc(b.nr_vcpus, sizeof(*b.vcpus));
    bool ready = b.vms && b.vcpus;
    for (int i = 0; i < CALLS; i++) {
        b.calls[i] = (struct samples) {calloc(decisions, sizeof(uint32_t)), 0, decisions};
        ready = ready && b.calls[i].ns;
    }
    b.clock_ns = clock_cost();
    if (!ready || set_up(&b))
        return EXIT_FAILURE;
    for (size_t i = 0; i < decisions; i++)
        step(&b, (unsigned)(i % b.nr_pcpus), i * MS / b.nr_pcpus);
    for (int i = 0; i < CALLS; i++)
        print(names[i], &b.calls[i]);
    return EXIT_SUCCESS;
}
