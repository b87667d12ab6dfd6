// SPDX-License-Identifier: Apache-2.0
// sched/credit: properties that hold for any load, tried with many random ones on virtual time, and
// what single calls do. FERRY_LONG=1: a hundred times as many loads.
#include <check.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "sched/sim.h"
#include "vmm/util.h"

#define MS 1000000ull
#define S  (1000 * MS)

enum { LOADS = 12, LOADS_LONG = 1200 };

static unsigned loads(void)
{
    return getenv("FERRY_LONG") ? LOADS_LONG : LOADS;
}

static uint64_t rnd(uint64_t *state, uint64_t below)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (*state >> 33) % below;
}

static unsigned rnd_log(uint64_t *state, unsigned most)
{
    unsigned top = (unsigned)rnd(state, (unsigned)log2(most) + 1), r = 1u << top;
    r += (unsigned)rnd(state, r);
    return r > most ? most : r;
}

// --- Random hosts

struct load {
    struct sim_config config;
    struct sim_vm_config vms[SIM_VMS_MAX];
};

enum { WITH_CAPS = 1, WITH_SLEEP = 2, WITH_AFFINITY = 4, MODEST_WEIGHTS = 8 };

static uint64_t rnd_mask(uint64_t *r, unsigned nr_pcpus)
{
    uint64_t mask = (rnd(r, 1u << 31) << 31 | rnd(r, 1u << 31)) ^ rnd(r, 1u << 31) << 40;
    mask &= nr_pcpus == 64 ? UINT64_MAX : (1ull << nr_pcpus) - 1;
    return mask ? mask : 1;
}

static struct load *load_make(uint64_t seed, int what)
{
    struct load *l = calloc(1, sizeof(*l));
    uint64_t r = seed;
    rnd(&r, 2);
    unsigned nr_pcpus = rnd_log(&r, 64), nr_vcpus = rnd_log(&r, 500);
    l->config.params = credit_params_default(nr_pcpus);
    l->config.params.weight_per_vm = rnd(&r, 4) == 0;
    for (unsigned p = 0; p < nr_pcpus; p++)
        l->config.params.node[p] = (uint8_t)(p * 4 / nr_pcpus % (1 + seed % 4));
    l->config.params.placement = rnd(&r, 2) ? CREDIT_BY_LENGTH : CREDIT_BY_WEIGHT;
    l->config.scheduler = SIM_CREDIT_CAP;
    l->config.seed = seed;
    l->config.vms = l->vms;
    for (unsigned n = 0; n < nr_vcpus; l->config.nr_vms++) {
        struct sim_vm_config *vm = &l->vms[l->config.nr_vms];
        vm->nr_vcpus = rnd(&r, 2) ? 1 : 1 + (unsigned)rnd(&r, nr_vcpus - n < 8 ? nr_vcpus - n : 8);
        n += vm->nr_vcpus;
        vm->credit.weight = what & MODEST_WEIGHTS ? 64u << rnd(&r, 5) : rnd_log(&r, 65535);
        vm->credit.hard = CREDIT_ANY_PCPU;
        if (what & WITH_AFFINITY && rnd(&r, 2))
            vm->credit.hard = rnd_mask(&r, nr_pcpus);
        if (what & WITH_AFFINITY && rnd(&r, 2))
            vm->credit.soft = rnd_mask(&r, nr_pcpus);
        if (what & WITH_CAPS && rnd(&r, 2))
            vm->credit.cap = 5 + (unsigned)rnd(&r, 100 * vm->nr_vcpus);
        if (what & WITH_SLEEP && rnd(&r, 2)) {
            vm->behaviour = rnd(&r, 2) ? SIM_PERIODIC : SIM_BURST;
            vm->period_ns = (1 + rnd(&r, 100)) * MS;
            vm->run_ns = 1000 + rnd(&r, vm->period_ns);
        }
        if (what & WITH_SLEEP && !rnd(&r, 8)) {
            vm->start_ns = rnd(&r, 2 * S);
            vm->end_ns = rnd(&r, 2) ? vm->start_ns + rnd(&r, 3 * S) + 1 : 0;
        }
        snprintf(vm->name, sizeof(vm->name), "vm%u", l->config.nr_vms);
    }
    return l;
}

static void sim_start(struct sim *sim, const struct sim_config *config)
{
    struct error err = {0};
    ck_assert_msg(sim_create(sim, config, &err) == 0, "%s", err.text);
}

// --- What must hold after every event (ck_assert is too slow for what is checked so often)

#define MUST(condition, ...)                           \
    do {                                               \
        if (!(condition))                              \
            ck_abort_msg(#condition ": " __VA_ARGS__); \
    } while (0)

static void check_ledger(const struct sim *sim)
{
    const struct credit_ledger *l = &sim->credit.ledger;
    int64_t sum = 0;
    for (unsigned i = 0; i < sim->nr_vcpus; i++)
        sum += sim->vcpus[i].credit.credit_ns;
    MUST(sum == l->given - l->burned - l->returned, "%ld in all", sum);
}

static void check_queue(const struct credit *c, unsigned p, unsigned class, unsigned *queued)
{
    const struct credit_list *q = &c->pcpus[p].queue[class];
    unsigned nr = 0;
    for (const struct credit_list *l = q->next; l != q; l = l->next, nr++) {
        const struct credit_vcpu *v = container_of(l, struct credit_vcpu, link);
        MUST(v->state == CREDIT_QUEUED && v->class == class && v->pcpu == p, "VM %u", v->vm->id);
        MUST(v->vm->config.hard >> p & 1, "VM %u waits at pCPU %u", v->vm->id, p);
    }
    MUST(nr == c->pcpus[p].nr_queued[class], "pCPU %u", p);
    MUST((c->waiting[class] >> p & 1) == (nr > 0), "pCPU %u", p);
    *queued += nr;
}

static void check_queues(const struct sim *sim)
{
    unsigned queued = 0, expected = 0;
    for (unsigned p = 0; p < sim->credit.params.nr_pcpus; p++)
        for (unsigned class = 0; class < CREDIT_CLASSES; class ++)
            check_queue(&sim->credit, p, class, &queued);
    for (unsigned i = 0; i < sim->nr_vcpus; i++)
        expected += sim->vcpus[i].credit.state == CREDIT_QUEUED;
    MUST(queued == expected, "%u, not %u", queued, expected);
    for (unsigned i = 0; i < sim->config.nr_vms; i++) {
        const struct credit_vm *vm = &sim->vms[i].credit;
        unsigned here = 0, runnable = 0, at = 0;
        for (unsigned p = 0; p < CREDIT_PCPUS_MAX; p++)
            here += vm->here[p];
        for (unsigned j = 0; j < vm->nr_vcpus; j++) {
            enum credit_state state = sim->vms[i].vcpus[j].credit.state;
            runnable += state != CREDIT_BLOCKED;
            at += state == CREDIT_QUEUED || state == CREDIT_RUNNING;
        }
        MUST(here == at && runnable == vm->nr_runnable, "VM %u", vm->id);
    }
}

// No pCPU is idle while a vCPU that may run there waits (parked ones are over their VM's cap).
static void check_work(const struct sim *sim)
{
    const struct credit *c = &sim->credit;
    uint64_t waiting = c->waiting[0] | c->waiting[1] | c->waiting[2];
    for (unsigned i = 0; c->idle && waiting && i < sim->nr_vcpus; i++) {
        const struct credit_vcpu *v = &sim->vcpus[i].credit;
        MUST(v->state != CREDIT_QUEUED || !(v->vm->config.hard & c->idle),
             "at %lu pCPUs %#lx are idle, and VM %u waits", sim->now, c->idle, v->vm->id);
    }
    for (unsigned p = 0; p < c->params.nr_pcpus; p++) {
        const struct credit_vcpu *v = c->pcpus[p].current;
        MUST((c->idle >> p & 1) == !v, "pCPU %u", p);
        if (!v)
            continue;
        MUST(v->state == CREDIT_RUNNING && v->pcpu == p, "pCPU %u", p);
        MUST(v->vm->config.hard >> p & 1, "VM %u runs at pCPU %u", v->vm->id, p);
        MUST(c->running[v->class] >> p & 1, "pCPU %u", p);
        MUST(c->pcpus[p].until_ns > sim->now, "pCPU %u", p);
    }
}

static void check_all(struct sim *sim, void *arg)
{
    uint64_t *events = arg;
    check_work(sim);
    if ((*events)++ % 64)
        return;
    check_ledger(sim);
    check_queues(sim);
}

START_TEST(invariants_hold)
{
    for (unsigned i = 0; i < loads(); i++) {
        struct load *l = load_make(1000 + i, WITH_CAPS | WITH_SLEEP | WITH_AFFINITY);
        uint64_t events = 0;
        struct sim sim;
        sim_start(&sim, &l->config);
        sim.check = check_all;
        sim.check_arg = &events;
        sim_run(&sim, 5 * S);
        check_ledger(&sim);
        ck_assert_uint_gt(events, 100);
        sim_destroy(&sim);
        free(l);
    }
}
END_TEST

// Always-runnable VMs over 10 s: within 1 % of their share, or of one pCPU (a vCPU whose share is
// less than a slice in 10 s cannot be given more exactly) and, for VMs of many vCPUs, a slice more
// for each. Twice that where more than eight compete for a pCPU (they still pay for their first
// turns) and for weights of any size (beside 65535, a weight of 1 is less than the grain); three
// times beside caps, whose VMs come and go a hundred times a second.
static void check_shares(uint64_t seed, int what)
{
    struct load *l = load_make(seed, what);
    struct sim sim;
    uint64_t before[SIM_VMS_MAX];
    sim_start(&sim, &l->config);
    sim_run(&sim, 5 * S);
    for (unsigned j = 0; j < l->config.nr_vms; j++)
        before[j] = sim.vms[j].credit.run_ns;
    sim_run(&sim, 15 * S);
    sim_ideal(&sim);
    const double coarse = (sim.nr_vcpus > 8 * l->config.params.nr_pcpus ? 2 : 1) *
                          (what & MODEST_WEIGHTS ? 1 : 2) * (what & WITH_CAPS ? 3 : 1);
    for (unsigned j = 0; j < l->config.nr_vms; j++) {
        double share = (double)(sim.vms[j].credit.run_ns - before[j]) / (10 * S);
        double ideal = sim.vms[j].ideal;
        double grain = (0.01 + 0.003 * (l->vms[j].nr_vcpus - 1)) * coarse;
        if (fabs(share - ideal) > fmax(grain, 0.01 * ideal))
            ck_abort_msg(
                "load %lu (%u pCPUs, %u VMs, %u vCPUs): vm%u (weight %u, cap %u, %u vCPUs) "
                "has %.4f pCPUs instead of %.4f",
                seed, l->config.params.nr_pcpus, l->config.nr_vms, sim.nr_vcpus, j,
                l->vms[j].credit.weight, l->vms[j].credit.cap, l->vms[j].nr_vcpus, share, ideal);
    }
    sim_destroy(&sim);
    free(l);
}

START_TEST(shares_are_right)
{
    for (unsigned i = 0; i < 2 * loads(); i++)
        check_shares(i, i % 2 ? MODEST_WEIGHTS : 0);
}
END_TEST

START_TEST(shares_with_caps_are_right)
{
    for (unsigned i = 0; i < 2 * loads(); i++)
        check_shares(i, WITH_CAPS | (i % 2 ? MODEST_WEIGHTS : 0));
}
END_TEST

// VMs that are confined to some pCPUs share these by their weights, and the others the rest.
START_TEST(shares_of_confined_vms)
{
    static const struct {
        unsigned nr_pcpus;
        struct {
            unsigned weight, cap;
            uint64_t hard;
            double expected;
        } vms[5];
    } cases[] = {
        // Two pinned to one pCPU, one free.
        {2, {{512, 0, 1, 2 / 3.0}, {256, 0, 1, 1 / 3.0}, {256, 0, 3, 1}}},
        // Two halves of a host that have nothing to do with each other.
        {4,
         {{256, 0, 1, 0.25}, {768, 0, 1, 0.75}, {1024, 0, 14, 1}, {64, 0, 14, 1}, {64, 0, 14, 1}}},
        // One within the other: what the inner ones cannot have is not lost.
        {3, {{100, 0, 1, 0.5}, {100, 0, 1, 0.5}, {100, 0, 3, 1}, {50, 0, 7, 0.5}, {50, 0, 7, 0.5}}},
        // A cap leaves something to the pinned one beside it.
        {2, {{1000, 25, 1, 0.25}, {10, 0, 1, 0.75}, {10, 0, 2, 1}}},
    };
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct load *l = calloc(1, sizeof(*l));
        struct sim sim;
        l->config.params = credit_params_default(cases[i].nr_pcpus);
        l->config.scheduler = SIM_CREDIT_CAP;
        l->config.vms = l->vms;
        for (; l->config.nr_vms < 5 && cases[i].vms[l->config.nr_vms].weight; l->config.nr_vms++) {
            struct sim_vm_config *vm = &l->vms[l->config.nr_vms];
            vm->nr_vcpus = 1;
            vm->credit.weight = cases[i].vms[l->config.nr_vms].weight;
            vm->credit.cap = cases[i].vms[l->config.nr_vms].cap;
            vm->credit.hard = cases[i].vms[l->config.nr_vms].hard;
        }
        sim_start(&sim, &l->config);
        sim_run(&sim, 10 * S);
        for (unsigned j = 0; j < l->config.nr_vms; j++) {
            double share = sim_share(&sim, &sim.vms[j]), expected = cases[i].vms[j].expected;
            ck_assert_msg(fabs(share - expected) <= 0.01, "case %zu: VM %u has %.4f, not %.4f", i,
                          j, share, expected);
        }
        sim_destroy(&sim);
        free(l);
    }
}
END_TEST

// Sleepers save credit that hogs would have burned, and lose half of it when they are retired. The
// hogs must not sink below the limit for it, all of them: their weights would not tell any more.
START_TEST(savings_of_sleepers_do_not_level_the_others)
{
    struct load *l = calloc(1, sizeof(*l));
    struct sim sim;
    l->config.params = credit_params_default(1);
    l->config.scheduler = SIM_CREDIT_CAP;
    l->config.vms = l->vms;
    for (l->config.nr_vms = 0; l->config.nr_vms < 22; l->config.nr_vms++) {
        struct sim_vm_config *vm = &l->vms[l->config.nr_vms];
        vm->nr_vcpus = 1;
        vm->credit.weight = l->config.nr_vms ? 256 : 512;
        vm->credit.hard = CREDIT_ANY_PCPU;
        if (l->config.nr_vms < 2)
            continue;
        vm->behaviour = SIM_BURST;
        vm->period_ns = S;
        vm->run_ns = 5 * MS;
    }
    sim_start(&sim, &l->config);
    sim_run(&sim, 30 * S);
    double a = (double)sim.vms[0].credit.run_ns, b = (double)sim.vms[1].credit.run_ns;
    ck_assert_msg(fabs(a / b - 2) < 0.05, "%.3f, not 2", a / b);
    sim_destroy(&sim);
    free(l);
}
END_TEST

// A window of 1 s, wherever it begins, has at most 1 % more than the cap.
START_TEST(caps_are_not_exceeded)
{
    enum { STEPS = 137 }; // windows begin at all phases of the 10 ms
    static uint64_t used[SIM_VMS_MAX][STEPS];
    unsigned capped = 0;
    for (unsigned i = 0; i < loads(); i++) {
        struct load *l = load_make(2000 + i, WITH_CAPS | (i % 2 ? WITH_SLEEP : 0));
        struct sim sim;
        sim_start(&sim, &l->config);
        for (unsigned k = 0; k < 5 * STEPS; k++) {
            sim_run(&sim, S * k / STEPS);
            for (unsigned j = 0; j < l->config.nr_vms; j++) {
                const uint64_t run = sim.vms[j].credit.run_ns, cap = l->vms[j].credit.cap;
                const uint64_t window = run - used[j][k % STEPS];
                MUST(k < STEPS || !cap || window <= cap * (S / 100) * 101 / 100,
                     "load %u: VM %u ran %lu us in 1 s, cap %lu %%", i, j, window / 1000, cap);
                used[j][k % STEPS] = run;
                capped += cap != 0;
            }
        }
        sim_destroy(&sim);
        free(l);
    }
    ck_assert_uint_gt(capped, 0);
}
END_TEST

// Nobody who wants to run is kept from it: over any 10 s a hog has nearly its due, and the longest
// wait between two runs is what the others' turns before it may take.
struct longest {
    uint64_t since[SIM_VCPUS_MAX], runs[SIM_VCPUS_MAX], most[SIM_VCPUS_MAX];
};

static void measure_waits(struct sim *sim, void *arg)
{
    struct longest *l = arg;
    for (unsigned i = 0; i < sim->nr_vcpus; i++) {
        const struct credit_vcpu *v = &sim->vcpus[i].credit;
        uint64_t wait = sim->now - l->since[i];
        if (v->state == CREDIT_QUEUED && wait > l->most[i])
            l->most[i] = wait;
        if (v->state != CREDIT_QUEUED || v->switches != l->runs[i])
            l->since[i] = sim->now;
        l->runs[i] = v->switches;
    }
}

START_TEST(nobody_starves)
{
    for (unsigned i = 0; i < loads(); i++) {
        struct load *l = load_make(3000 + i, MODEST_WEIGHTS | WITH_SLEEP);
        struct longest *longest = calloc(1, sizeof(*longest));
        struct sim sim;
        sim_start(&sim, &l->config);
        sim.check = measure_waits;
        sim.check_arg = longest;
        sim_run(&sim, 20 * S);
        sim_ideal(&sim);
        for (unsigned j = 0; j < sim.nr_vcpus; j++) {
            const struct sim_vm *vm = sim.vcpus[j].vm;
            // It may have used a slice or two more than it had, and that of each who woke with one
            // saved; it pays that back at its rate. Then each at its pCPU may have a turn or two.
            double rate = vm->ideal / vm->config->nr_vcpus;
            double others = sim.nr_vcpus / (double)l->config.params.nr_pcpus;
            double bound = 60e6 * (1 + others) / rate + 60e6 * (1 + others);
            MUST((double)longest->most[j] <= bound,
                 "load %u: vCPU %u of VM %u waited %.0f ms, rate %.4f, %.1f vCPUs per pCPU", i,
                 sim.vcpus[j].credit.id, vm->credit.id, (double)longest->most[j] / 1e6, rate,
                 others);
        }
        sim_destroy(&sim);
        free(longest);
        free(l);
    }
}
END_TEST

// The order in which VMs are added changes nothing, to the nanosecond.
START_TEST(order_of_registration_does_not_matter)
{
    for (unsigned i = 0; i < loads(); i++) {
        struct load *l = load_make(4000 + i, WITH_CAPS | WITH_SLEEP | WITH_AFFINITY);
        unsigned order[SIM_VMS_MAX];
        uint64_t run[SIM_VCPUS_MAX], r = i, switches[SIM_VCPUS_MAX];
        for (unsigned j = 0; j < l->config.nr_vms; j++)
            order[j] = j;
        for (unsigned j = l->config.nr_vms; j > 1; j--) {
            unsigned k = (unsigned)rnd(&r, j), swap = order[k];
            order[k] = order[j - 1];
            order[j - 1] = swap;
        }
        for (int round = 0; round < 2; round++) {
            struct sim sim;
            unsigned n = 0;
            l->config.order = round ? order : NULL;
            sim_start(&sim, &l->config);
            sim_run(&sim, 3 * S);
            for (unsigned j = 0; j < l->config.nr_vms; j++)
                for (unsigned k = 0; k < l->vms[j].nr_vcpus; k++, n++) {
                    const struct credit_vcpu *v = &sim.vms[j].vcpus[k].credit;
                    MUST(!round || (v->run_ns == run[n] && v->switches == switches[n]),
                         "load %u: vCPU %u of VM %u ran %lu, not %lu", i, k, j, v->run_ns, run[n]);
                    run[n] = v->run_ns;
                    switches[n] = v->switches;
                }
            sim_destroy(&sim);
        }
        free(l);
    }
}
END_TEST

// --- Single rules

struct host {
    struct credit c;
    struct credit_vm vms[8];
    struct credit_vcpu vcpus[8]; // one of each VM
};

static void host_init(struct host *h, const struct credit_params *params, unsigned nr)
{
    struct error err = {0};
    const struct credit_vm_config config = {.weight = 256, .hard = CREDIT_ANY_PCPU};
    ck_assert_msg(credit_init(&h->c, params, 0, &err) == 0, "%s", err.text);
    for (unsigned i = 0; i < nr; i++) {
        ck_assert_int_eq(credit_vm_add(&h->c, &h->vms[i], i, &config, &err), 0);
        credit_vcpu_add(&h->c, &h->vms[i], &h->vcpus[i], 0, 0);
    }
}

static struct credit_vcpu *pick_at(struct host *h, unsigned pcpu, uint64_t now)
{
    ck_assert_uint_le(h->c.pcpus[pcpu].until_ns, now);
    return credit_pick(&h->c, pcpu, now);
}

// A vCPU that wakes with credit goes before one that runs, once that has had the rate limit's time.
START_TEST(boost_preempts_after_the_rate_limit)
{
    struct host h;
    const struct credit_params params = credit_params_default(1);
    host_init(&h, &params, 3);
    credit_wake(&h.c, &h.vcpus[0], 0);
    ck_assert_ptr_eq(pick_at(&h, 0, 0), &h.vcpus[0]);
    credit_charge(&h.c, &h.vcpus[0], 400000, 400000); // in debt: OVER
    ck_assert_int_eq(h.vcpus[0].class, CREDIT_OVER);
    credit_kicks(&h.c);
    credit_wake(&h.c, &h.vcpus[1], 400000);
    ck_assert_int_eq(h.vcpus[1].class, CREDIT_BOOST);
    ck_assert_uint_eq(credit_kicks(&h.c), 1);
    ck_assert_uint_eq(credit_kicks(&h.c), 0);
    ck_assert_uint_eq(h.c.pcpus[0].until_ns, 1 * MS);
    ck_assert_ptr_eq(credit_pick(&h.c, 0, 500000), &h.vcpus[0]); // asked too early
    ck_assert_ptr_eq(pick_at(&h, 0, 1 * MS), &h.vcpus[1]);
    ck_assert_int_eq(h.vcpus[0].state, CREDIT_QUEUED);
    ck_assert_uint_eq(h.vcpus[1].wait_ns, 600000);
}
END_TEST

// With a rate limit of a slice, nobody is preempted.
START_TEST(not_preemptive)
{
    struct host h;
    struct credit_params params = credit_params_default(1);
    params.ratelimit_ns = params.slice_ns;
    host_init(&h, &params, 2);
    credit_wake(&h.c, &h.vcpus[0], 0);
    ck_assert_ptr_eq(pick_at(&h, 0, 0), &h.vcpus[0]);
    credit_wake(&h.c, &h.vcpus[1], 1 * MS);
    ck_assert_uint_eq(h.c.pcpus[0].until_ns, 30 * MS);
}
END_TEST

// A guest that always sleeps before a tick would see it run stays boosted for one tick of CPU time
// per slice all the same.
START_TEST(boost_ends_by_run_time)
{
    struct host h;
    const struct credit_params params = credit_params_default(1);
    host_init(&h, &params, 1);
    struct credit_vcpu *v = &h.vcpus[0];
    uint64_t now = 0;
    v->credit_ns = 30 * MS; // as after a while of sleep
    h.c.ledger.given = 30 * MS;
    for (int i = 0; i < 11; i++) {
        credit_wake(&h.c, v, now);
        ck_assert_int_eq(v->class, i < 10 ? CREDIT_BOOST : CREDIT_UNDER);
        ck_assert_ptr_eq(pick_at(&h, 0, now), v);
        if (i < 10)
            ck_assert_uint_le(h.c.pcpus[0].until_ns, now + (10 - i) * MS);
        now += MS;
        credit_charge(&h.c, v, MS, now);
        credit_block(&h.c, v, now);
        ck_assert_ptr_null(pick_at(&h, 0, now));
    }
    now = credit_next(&h.c, 0);
    credit_timer(&h.c, now);
    credit_wake(&h.c, v, now);
    ck_assert_int_eq(v->class, CREDIT_BOOST);
}
END_TEST

START_TEST(yield_lets_a_worse_one_go_first)
{
    struct host h;
    const struct credit_params params = credit_params_default(1);
    host_init(&h, &params, 2);
    h.vcpus[1].credit_ns = -MS;
    credit_wake(&h.c, &h.vcpus[0], 0);
    credit_wake(&h.c, &h.vcpus[1], 0);
    ck_assert_ptr_eq(pick_at(&h, 0, 0), &h.vcpus[0]);
    credit_yield(&h.c, &h.vcpus[0], 2 * MS);
    ck_assert_ptr_eq(pick_at(&h, 0, 2 * MS), &h.vcpus[1]);
    ck_assert_int_eq(h.vcpus[1].class, CREDIT_OVER);
    // Once only: the better one is back as soon as the rate limit allows.
    ck_assert_ptr_eq(pick_at(&h, 0, 3 * MS), &h.vcpus[0]);
    // Alone, it goes on.
    credit_block(&h.c, &h.vcpus[1], 4 * MS);
    credit_yield(&h.c, &h.vcpus[0], 5 * MS);
    ck_assert_ptr_eq(pick_at(&h, 0, 5 * MS), &h.vcpus[0]);
}
END_TEST

// An idle pCPU takes from its own NUMA node first, and only what may run there.
START_TEST(steals_from_its_own_node_first)
{
    struct host h;
    struct credit_params params = credit_params_default(4);
    const uint64_t only[] = {1, 1, 4, 4, 8};
    struct error err;
    params.node[2] = params.node[3] = 1;
    host_init(&h, &params, 5);
    for (unsigned i = 0; i < 5; i++) {
        struct credit_vm_config config = {.weight = 256, .hard = only[i]};
        ck_assert_int_eq(credit_vm_set(&h.c, &h.vms[i], &config, 0, &err), 0);
        credit_wake(&h.c, &h.vcpus[i], 0);
    }
    for (unsigned p = 0; p < 4; p++)
        credit_pick(&h.c, p, 0);
    ck_assert_int_eq(h.vcpus[1].state, CREDIT_QUEUED);
    ck_assert_int_eq(h.vcpus[3].state, CREDIT_QUEUED);
    ck_assert_ptr_null(h.c.pcpus[1].current);
    for (unsigned i = 1; i < 4; i += 2) { // now both may run anywhere; they wait on, at 0 and 2
        struct credit_vm_config config = {.weight = 256, .hard = CREDIT_ANY_PCPU};
        h.vms[i].config = config;
    }
    credit_block(&h.c, &h.vcpus[4], 5 * MS);
    ck_assert_ptr_eq(pick_at(&h, 3, 5 * MS), &h.vcpus[3]);
    ck_assert_int_eq(h.vcpus[1].state, CREDIT_QUEUED);
}
END_TEST

// Another affinity, while it runs and while it waits.
START_TEST(affinity_can_be_changed)
{
    struct host h;
    struct error err;
    const struct credit_params params = credit_params_default(2);
    struct credit_vm_config config = {.weight = 256, .hard = 2};
    host_init(&h, &params, 2);
    credit_wake(&h.c, &h.vcpus[0], 0);
    ck_assert_ptr_eq(pick_at(&h, 0, 0), &h.vcpus[0]);
    credit_kicks(&h.c);
    ck_assert_int_eq(credit_vm_set(&h.c, &h.vms[0], &config, MS, &err), 0);
    ck_assert_uint_eq(credit_kicks(&h.c), 1);
    ck_assert_ptr_null(pick_at(&h, 0, MS));
    ck_assert_ptr_eq(pick_at(&h, 1, MS), &h.vcpus[0]);
    config.hard = 1;
    credit_vm_set(&h.c, &h.vms[1], &config, MS, &err);
    credit_wake(&h.c, &h.vcpus[1], MS);
    config.hard = 2;
    credit_vm_set(&h.c, &h.vms[1], &config, MS, &err);
    ck_assert_uint_eq(h.vcpus[1].pcpu, 1);
    ck_assert_int_eq(h.vcpus[1].state, CREDIT_QUEUED);
}
END_TEST

// A cap's debt is no older than its window: who is charged with far too much waits for that long.
START_TEST(debt_of_a_cap_is_bounded)
{
    struct host h;
    struct error err;
    const struct credit_params params = credit_params_default(1);
    struct credit_vm_config config = {.weight = 256, .cap = 10, .hard = 1};
    host_init(&h, &params, 1);
    ck_assert_int_eq(credit_vm_set(&h.c, &h.vms[0], &config, 0, &err), 0);
    credit_wake(&h.c, &h.vcpus[0], 0);
    ck_assert_ptr_eq(pick_at(&h, 0, 0), &h.vcpus[0]);
    credit_charge(&h.c, &h.vcpus[0], 1000 * S, MS);
    ck_assert_ptr_null(pick_at(&h, 0, MS));
    uint64_t now = MS;
    for (; h.vcpus[0].state == CREDIT_PARKED && now < 60 * S; now = credit_next(&h.c, 0))
        credit_timer(&h.c, now);
    ck_assert_uint_gt(now, S - 10 * MS);
    ck_assert_uint_lt(now, S + 30 * MS);
    ck_assert_ptr_eq(pick_at(&h, 0, now), &h.vcpus[0]);
}
END_TEST

// All there is goes away, in whatever state it is.
START_TEST(vms_can_be_removed)
{
    for (unsigned seed = 0; seed < 20; seed++) {
        struct load *l = load_make(seed, WITH_CAPS | WITH_SLEEP | WITH_AFFINITY);
        struct sim sim;
        sim_start(&sim, &l->config);
        sim_run(&sim, (50 + 7 * seed) * MS);
        for (unsigned i = 0; i < l->config.nr_vms; i++)
            credit_vm_remove(&sim.credit, &sim.vms[i].credit, sim.now);
        const struct credit *c = &sim.credit;
        ck_assert_uint_eq(c->nr_vms + c->nr_vcpus + c->nr_capped, 0);
        ck_assert_uint_eq(c->idle, c->online);
        for (int class = 0; class < CREDIT_CLASSES; class ++)
            ck_assert_uint_eq(c->waiting[class] | c->running[class], 0);
        for (unsigned p = 0; p < c->params.nr_pcpus; p++) {
            ck_assert_uint_eq(c->pcpus[p].weight, 0);
            ck_assert_ptr_null(credit_pick(&sim.credit, p, sim.now));
        }
        ck_assert_int_eq(c->ledger.given - c->ledger.burned - c->ledger.returned, 0);
        ck_assert_uint_eq(credit_next(c, 0), CREDIT_NEVER);
        sim_destroy(&sim);
        free(l);
    }
}
END_TEST

START_TEST(bad_values_are_refused)
{
    struct host h;
    struct error err;
    struct credit_params params = credit_params_default(2);
    host_init(&h, &params, 1);
    const struct credit_vm_config bad[] = {
        {.weight = 0, .hard = 1},
        {.weight = 65536, .hard = 1},
        {.weight = 1, .cap = 6401, .hard = 1},
        {.weight = 1, .hard = 0},
        {.weight = 1, .hard = 4}, // a pCPU that is not there
    };
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        ck_assert_int_eq(credit_vm_set(&h.c, &h.vms[0], &bad[i], 0, &err), -EINVAL);
        ck_assert_uint_eq(h.vms[0].config.weight, 256);
    }
    const struct credit_params good = params;
#define REFUSED(change)                                               \
    do {                                                              \
        struct credit c;                                              \
        params = good;                                                \
        params.change;                                                \
        ck_assert_int_eq(credit_init(&c, &params, 0, &err), -EINVAL); \
    } while (0)
    REFUSED(nr_pcpus = 0);
    REFUSED(nr_pcpus = 65);
    REFUSED(node[1] = 64);
    REFUSED(slice_ns = MS - 1);
    REFUSED(slice_ns = S + 1);
    REFUSED(tick_ns = 0);
    REFUSED(tick_ns = 31 * MS);
    REFUSED(ratelimit_ns = 31 * MS);
    REFUSED(cap_period_ns = 0);
    params = good;
    params.nr_pcpus = 3;
    ck_assert_int_eq(credit_params_set(&h.c, &params, 0, &err), -EINVAL);
    params = good;
    params.slice_ns = 5 * MS;
    params.tick_ns = 5 * MS;
    ck_assert_int_eq(credit_params_set(&h.c, &params, 0, &err), 0);
    ck_assert_uint_le(credit_next(&h.c, 0), 5 * MS);
}
END_TEST

// Siblings queue at different pCPUs as long as there are any.
START_TEST(siblings_are_spread)
{
    struct host h;
    const struct credit_params params = credit_params_default(4);
    struct credit_vcpu more[3];
    host_init(&h, &params, 5);
    for (unsigned i = 1; i < 5; i++) // all pCPUs are busy
        credit_wake(&h.c, &h.vcpus[i], 0);
    for (unsigned p = 0; p < 4; p++)
        ck_assert_ptr_nonnull(pick_at(&h, p, 0));
    credit_wake(&h.c, &h.vcpus[0], MS);
    for (unsigned i = 0; i < 3; i++) {
        credit_vcpu_add(&h.c, &h.vms[0], &more[i], i + 1, MS);
        credit_wake(&h.c, &more[i], MS);
    }
    ck_assert_uint_eq(h.vms[0].at, 15);
}
END_TEST

static void add(Suite *s, const char *name, const TTest *test)
{
    TCase *t = tcase_create(name);
    tcase_set_timeout(t, 0); // the test program's own limit is enough
    tcase_add_test(t, test);
    suite_add_tcase(s, t);
}

int main(void)
{
    Suite *s = suite_create("credit");
    add(s, "invariants", invariants_hold);
    add(s, "shares", shares_are_right);
    add(s, "cap_shares", shares_with_caps_are_right);
    add(s, "confined", shares_of_confined_vms);
    add(s, "savings", savings_of_sleepers_do_not_level_the_others);
    add(s, "caps", caps_are_not_exceeded);
    add(s, "starvation", nobody_starves);
    add(s, "order", order_of_registration_does_not_matter);
    add(s, "rules", boost_preempts_after_the_rate_limit);
    add(s, "rules", not_preemptive);
    add(s, "rules", boost_ends_by_run_time);
    add(s, "rules", yield_lets_a_worse_one_go_first);
    add(s, "rules", steals_from_its_own_node_first);
    add(s, "rules", affinity_can_be_changed);
    add(s, "rules", siblings_are_spread);
    add(s, "rules", debt_of_a_cap_is_bounded);
    add(s, "rules", vms_can_be_removed);
    add(s, "rules", bad_values_are_refused);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
