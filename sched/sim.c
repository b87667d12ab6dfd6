// SPDX-License-Identifier: Apache-2.0
#include "sched/sim.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/util.h"

enum { SUB_BITS = 4 }; // slots of a histogram per power of two: 16

// --- Waits

static unsigned slot_of(uint64_t ns)
{
    if (ns < 1u << SUB_BITS)
        return (unsigned)ns;
    unsigned shift = 63 - SUB_BITS - (unsigned)__builtin_clzll(ns);
    return ((shift + 1) << SUB_BITS) + (unsigned)((ns >> shift) & ((1u << SUB_BITS) - 1));
}

// The largest value of a slot.
static uint64_t slot_end(unsigned slot)
{
    if (slot < 1u << SUB_BITS)
        return slot;
    unsigned shift = (slot >> SUB_BITS) - 1;
    return (((slot & ((1u << SUB_BITS) - 1)) | 1ull << SUB_BITS) + 1) * (1ull << shift) - 1;
}

static void histogram_add(struct sim_histogram *h, uint64_t ns)
{
    h->nr++;
    h->slot[slot_of(ns)]++;
    if (ns > h->most_ns)
        h->most_ns = ns;
}

uint64_t sim_percentile(const struct sim_histogram *h, double percent)
{
    uint64_t seen = 0;
    for (unsigned i = 0; i < SIM_HISTOGRAM; i++) {
        seen += h->slot[i];
        if (seen && (double)seen >= (double)h->nr * percent / 100)
            return slot_end(i) < h->most_ns ? slot_end(i) : h->most_ns;
    }
    return h->most_ns;
}

// --- Behaviour

static uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15; // splitmix64
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static uint64_t vary(struct sim_vcpu *v, uint64_t ns)
{
    return v->vm->config->behaviour == SIM_BURST ? ns / 2 + random_next(&v->random) % (ns + 1) : ns;
}

static uint64_t end_of(const struct sim_vcpu *v)
{
    return v->vm->config->end_ns ? v->vm->config->end_ns : CREDIT_NEVER;
}

// What it does between a wake-up and the next block.
static void begin_work(struct sim_vcpu *v)
{
    v->need_ns =
        v->vm->config->behaviour == SIM_HOG ? CREDIT_NEVER : vary(v, v->vm->config->run_ns);
}

static bool earlier(const struct sim_vcpu *a, const struct sim_vcpu *b)
{
    if (a->due_ns != b->due_ns)
        return a->due_ns < b->due_ns;
    if (a->vm->credit.id != b->vm->credit.id)
        return a->vm->credit.id < b->vm->credit.id;
    return a->credit.id < b->credit.id;
}

static void sleepers_add(struct sim *sim, struct sim_vcpu *v)
{
    unsigned i = sim->nr_sleepers++;
    for (; i && earlier(v, sim->sleepers[(i - 1) / 2]); i = (i - 1) / 2)
        sim->sleepers[i] = sim->sleepers[(i - 1) / 2];
    sim->sleepers[i] = v;
}

static struct sim_vcpu *sleepers_take(struct sim *sim)
{
    struct sim_vcpu *first = sim->sleepers[0], *last = sim->sleepers[--sim->nr_sleepers];
    unsigned i = 0;
    for (unsigned child; (child = 2 * i + 1) < sim->nr_sleepers; i = child) {
        if (child + 1 < sim->nr_sleepers && earlier(sim->sleepers[child + 1], sim->sleepers[child]))
            child++;
        if (!earlier(sim->sleepers[child], last))
            break;
        sim->sleepers[i] = sim->sleepers[child];
    }
    sim->sleepers[i] = last;
    return first;
}

// Sleeps until its next period; for ever after its end. A period that was missed is left out.
static void sleep_on(struct sim *sim, struct sim_vcpu *v)
{
    const struct sim_vm_config *config = v->vm->config;
    if (config->behaviour == SIM_HOG)
        return;
    do
        v->due_ns += vary(v, config->period_ns);
    while (v->due_ns <= sim->now);
    if (v->due_ns < end_of(v))
        sleepers_add(sim, v);
}

// --- Time

static struct sim_vcpu *running_at(struct sim *sim, unsigned p)
{
    struct credit_vcpu *v = sim->credit.pcpus[p].current;
    return v ? container_of(v, struct sim_vcpu, credit) : NULL;
}

static void charge(struct sim *sim, struct sim_vcpu *v)
{
    if (sim->now <= v->charged_ns)
        return;
    uint64_t used = sim->now - v->charged_ns;
    v->charged_ns = sim->now;
    if (v->need_ns != CREDIT_NEVER)
        v->need_ns -= used;
    credit_charge(&sim->credit, &v->credit, used, sim->now);
}

// When the vCPU blocks if nobody takes its pCPU away.
static uint64_t blocks_at(const struct sim_vcpu *v)
{
    uint64_t at = v->need_ns == CREDIT_NEVER ? CREDIT_NEVER : v->charged_ns + v->need_ns;
    return at < end_of(v) ? at : end_of(v);
}

static void pick(struct sim *sim, unsigned p)
{
    struct sim_vcpu *prev = running_at(sim, p);
    if (prev)
        charge(sim, prev);
    struct credit_vcpu *next = credit_pick(&sim->credit, p, sim->now);
    if (!next || (prev && next == &prev->credit))
        return;
    struct sim_vcpu *v = container_of(next, struct sim_vcpu, credit);
    v->charged_ns = sim->now + sim->config.switch_ns;
    if (v->woke_ns != CREDIT_NEVER) {
        histogram_add(&v->vm->waits, sim->now - v->woke_ns);
        v->woke_ns = CREDIT_NEVER;
    }
}

static void wake(struct sim *sim, struct sim_vcpu *v)
{
    v->woke_ns = sim->now;
    begin_work(v);
    credit_wake(&sim->credit, &v->credit, sim->now);
}

static uint64_t next_event(struct sim *sim)
{
    uint64_t at = credit_next(&sim->credit, 0);
    if (sim->nr_sleepers && sim->sleepers[0]->due_ns < at)
        at = sim->sleepers[0]->due_ns;
    for (unsigned p = 0; p < sim->credit.params.nr_pcpus; p++) {
        const struct sim_vcpu *v = running_at(sim, p);
        uint64_t mine = sim->credit.pcpus[p].until_ns;
        if (v && blocks_at(v) < mine)
            mine = blocks_at(v);
        if (mine < at)
            at = mine;
    }
    return at > sim->now ? at : sim->now;
}

static void block_those_done(struct sim *sim)
{
    for (unsigned p = 0; p < sim->credit.params.nr_pcpus; p++) {
        struct sim_vcpu *v = running_at(sim, p);
        if (!v || blocks_at(v) > sim->now)
            continue;
        charge(sim, v);
        credit_block(&sim->credit, &v->credit, sim->now);
        sleep_on(sim, v);
    }
}

static void timer(struct sim *sim)
{
    if (credit_next(&sim->credit, 0) > sim->now)
        return;
    for (unsigned p = 0; p < sim->credit.params.nr_pcpus; p++)
        if (running_at(sim, p))
            charge(sim, running_at(sim, p));
    credit_timer(&sim->credit, sim->now);
}

static void decide(struct sim *sim)
{
    bool again;
    do {
        again = false;
        for (unsigned p = 0; p < sim->credit.params.nr_pcpus; p++)
            if (sim->credit.pcpus[p].until_ns <= sim->now) {
                pick(sim, p);
                again = true;
            }
    } while (again);
}

void sim_run(struct sim *sim, uint64_t until)
{
    for (;;) {
        uint64_t at = next_event(sim);
        if (at > until)
            break;
        sim->now = at;
        block_those_done(sim);
        while (sim->nr_sleepers && sim->sleepers[0]->due_ns <= sim->now)
            wake(sim, sleepers_take(sim));
        timer(sim);
        decide(sim);
        if (sim->check)
            sim->check(sim, sim->check_arg);
    }
    sim->now = until;
    for (unsigned p = 0; p < sim->credit.params.nr_pcpus; p++)
        if (running_at(sim, p))
            charge(sim, running_at(sim, p));
}

// --- The ideal

// How much of a pCPU one vCPU can use.
static double demand(const struct sim_vm_config *config)
{
    if (config->behaviour == SIM_HOG || config->run_ns >= config->period_ns)
        return 1;
    return (double)config->run_ns / (double)config->period_ns;
}

// At a level: every vCPU has level x weight, but no more than it can use.
static double vm_at_level(const struct sim *sim, const struct sim_vm *vm, double level)
{
    const struct credit_vm_config *asked = &vm->config->credit;
    double weight = asked->weight, n = vm->config->nr_vcpus, most = demand(vm->config) * n;
    double part = level * (sim->config.params.weight_per_vm ? weight : weight * n);
    if (asked->cap && asked->cap / 100.0 < most)
        most = asked->cap / 100.0;
    return part < most ? part : most;
}

void sim_ideal(struct sim *sim)
{
    double low = 0, high = CREDIT_PCPUS_MAX; // weights are at least 1
    for (int i = 0; i < 100; i++) {
        double level = (low + high) / 2, sum = 0;
        for (unsigned j = 0; j < sim->config.nr_vms; j++)
            sum += vm_at_level(sim, &sim->vms[j], level);
        *(sum < sim->credit.params.nr_pcpus ? &low : &high) = level;
    }
    for (unsigned j = 0; j < sim->config.nr_vms; j++)
        sim->vms[j].ideal = vm_at_level(sim, &sim->vms[j], high);
}

double sim_share(const struct sim *sim, const struct sim_vm *vm)
{
    return sim->now ? (double)vm->credit.run_ns / (double)sim->now : 0;
}

double sim_jain(const struct sim *sim)
{
    double sum = 0, squares = 0;
    for (unsigned i = 0; i < sim->config.nr_vms; i++) {
        double x = sim_share(sim, &sim->vms[i]) / sim->vms[i].ideal;
        sum += x;
        squares += x * x;
    }
    return squares > 0 ? sum * sum / (sim->config.nr_vms * squares) : 1;
}

// --- Set up

const char *sim_placement_name(enum credit_placement placement)
{
    return placement == CREDIT_BY_WEIGHT ? "weight" : "length";
}

int sim_placement_parse(const char *name, enum credit_placement *placement, struct error *err)
{
    if (strcmp(name, "length") && strcmp(name, "weight"))
        return error_set(err, -EINVAL, "placement '%.20s': must be length or weight", name);
    *placement = strcmp(name, "weight") ? CREDIT_BY_LENGTH : CREDIT_BY_WEIGHT;
    return 0;
}

static const struct {
    const char *name;
    bool equal, no_boost, no_caps;
} schedulers[SIM_SCHEDULERS] = {
    [SIM_FAIR] = {"fair", true, true, true},
    [SIM_PROPORTIONAL] = {"proportional", false, true, true},
    [SIM_CREDIT] = {"credit", false, false, true},
    [SIM_CREDIT_CAP] = {"credit-cap", false, false, false},
};

const char *sim_scheduler_name(enum sim_scheduler scheduler)
{
    return schedulers[scheduler].name;
}

int sim_scheduler_parse(const char *name, enum sim_scheduler *scheduler, struct error *err)
{
    for (int i = 0; i < SIM_SCHEDULERS; i++)
        if (!strcmp(name, schedulers[i].name)) {
            *scheduler = (enum sim_scheduler)i;
            return 0;
        }
    return error_set(err, -EINVAL,
                     "scheduler '%.40s': must be fair, proportional, credit or credit-cap", name);
}

static void vcpu_start(struct sim *sim, struct sim_vm *vm, unsigned id)
{
    struct sim_vcpu *v = &vm->vcpus[id];
    v->vm = vm;
    v->woke_ns = CREDIT_NEVER;
    v->random = sim->config.seed ^ ((uint64_t)vm->credit.id << 32 | id);
    random_next(&v->random);
    credit_vcpu_add(&sim->credit, &vm->credit, &v->credit, id, 0);
    v->due_ns = vm->config->start_ns;
    if (vm->config->behaviour == SIM_BURST)
        v->due_ns += random_next(&v->random) % vm->config->period_ns;
    if (v->due_ns < end_of(v))
        sleepers_add(sim, v);
}

static int vm_start(struct sim *sim, unsigned i, struct error *err)
{
    const struct sim_vm_config *config = &sim->config.vms[i];
    struct sim_vm *vm = &sim->vms[i];
    struct credit_vm_config credit = config->credit;
    if (schedulers[sim->config.scheduler].equal)
        credit.weight = CREDIT_WEIGHT_DEFAULT;
    if (!config->nr_vcpus || config->nr_vcpus > SIM_VCPUS_MAX - sim->nr_vcpus)
        return error_set(err, -EINVAL, "VM %s: %u vCPUs: must be at least 1, at most %d in all",
                         config->name, config->nr_vcpus, SIM_VCPUS_MAX);
    if (config->behaviour != SIM_HOG && (!config->period_ns || !config->run_ns))
        return error_set(err, -EINVAL, "VM %s: period and run must be above 0", config->name);
    vm->config = config;
    vm->vcpus = &sim->vcpus[sim->nr_vcpus];
    sim->nr_vcpus += config->nr_vcpus;
    if (credit_vm_add(&sim->credit, &vm->credit, i + 1, &credit, err))
        return error_prefix(err, "VM %s", config->name);
    for (unsigned j = 0; j < config->nr_vcpus; j++)
        vcpu_start(sim, vm, j);
    return 0;
}

int sim_create(struct sim *sim, const struct sim_config *config, struct error *err)
{
    *sim = (struct sim) {.config = *config};
    if (!config->nr_vms || config->nr_vms > SIM_VMS_MAX)
        return error_set(err, -EINVAL, "%u VMs: must be 1 to %d", config->nr_vms, SIM_VMS_MAX);
    sim->vms = calloc(config->nr_vms, sizeof(*sim->vms));
    sim->vcpus = calloc(SIM_VCPUS_MAX, sizeof(*sim->vcpus));
    sim->sleepers = calloc(SIM_VCPUS_MAX, sizeof(struct sim_vcpu *));
    if (!sim->vms || !sim->vcpus || !sim->sleepers) {
        sim_destroy(sim);
        return error_set(err, -ENOMEM, "no memory for the simulation");
    }
    struct credit_params params = config->params;
    params.weight_per_vm |= schedulers[config->scheduler].equal;
    params.no_boost |= schedulers[config->scheduler].no_boost;
    params.no_caps |= schedulers[config->scheduler].no_caps;
    int ret = credit_init(&sim->credit, &params, 0, err);
    for (unsigned i = 0; !ret && i < config->nr_vms; i++)
        ret = vm_start(sim, config->order ? config->order[i] : i, err);
    if (ret)
        sim_destroy(sim);
    return ret;
}

void sim_destroy(struct sim *sim)
{
    free(sim->vms);
    free(sim->vcpus);
    free(sim->sleepers);
    *sim = (struct sim) {0};
}
