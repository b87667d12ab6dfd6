// SPDX-License-Identifier: Apache-2.0
// Who is given how many credits: once per slice, the CPU time that the host had since the last time
// is divided like water between vessels. All vCPUs rise in proportion to their weights; one that is
// full (it cannot use more) stays behind, and what it leaves rises between the others.
#include <string.h>

#include "sched/credit_internal.h"

enum {
    SETS_MAX = 8,          // different hard affinities that are looked at, beside "all"
    WEIGHT_SHIFT = 16,     // of a VM's weight that is split over its vCPUs
    LATE_MAX_SLICES = 4,   // time beyond that, without an accounting, is not given out
    HOARD_MAX_SLICES = 64, // the most that a vCPU which always wants to run can save
};

// pCPUs that some VMs are confined to; these VMs together cannot be given more than they have.
struct account_set {
    uint64_t mask;
    int64_t total_ns;         // to be given to them
    int64_t rest_ns;          // not yet taken ...
    unsigned __int128 weight; // ... by vCPUs of that weight
};

static uint64_t vcpu_weight(const struct credit *c, const struct credit_vm *vm)
{
    uint64_t weight = (uint64_t)vm->config.weight << WEIGHT_SHIFT;
    return c->params.weight_per_vm ? weight / vm->nr_active : weight;
}

static int64_t scale(int64_t value, uint64_t part, unsigned __int128 whole)
{
    return (int64_t)((unsigned __int128)value * part / whole);
}

#define for_each_vm(c, vm)                                                         \
    for (struct credit_vm *vm = list_entry((c)->vms.next, struct credit_vm, link); \
         &vm->link != &(c)->vms; vm = list_entry(vm->link.next, struct credit_vm, link))

#define for_each_active(vm, v)                                                              \
    for (struct credit_vcpu *v = list_entry((vm)->vcpus.next, struct credit_vcpu, sibling); \
         &v->sibling != &(vm)->vcpus;                                                       \
         v = list_entry(v->sibling.next, struct credit_vcpu, sibling))                      \
        if (v->active)

static bool wants(const struct credit_vcpu *v)
{
    return v->state != CREDIT_BLOCKED && !v->slept;
}

// What each vCPU and VM can use: one that never slept, the whole time (and its debts); one that
// sleeps saves one slice at most.
static void rooms(struct credit *c, int64_t passed)
{
    const int64_t slice = (int64_t)c->params.slice_ns;
    for_each_vm (c, vm) {
        vm->settled = !vm->nr_active;
        vm->given_ns = 0;
        vm->room_ns = passed * __builtin_popcountll(vm->config.hard & c->online);
        if (vm_capped(c, vm) && vm->room_ns > passed * vm->config.cap / 100)
            vm->room_ns = passed * vm->config.cap / 100;
        for_each_active (vm, v) {
            v->was_ns = v->credit_ns;
            int64_t debt = v->credit_ns < 0 ? -v->credit_ns : 0;
            int64_t most = wants(v) ? HOARD_MAX_SLICES * slice : slice;
            v->room_ns = most > v->credit_ns ? most - v->credit_ns : 0;
            if (wants(v) && v->room_ns > passed + debt)
                v->room_ns = passed + debt;
            if (debt && !vm_capped(c, vm))
                vm->room_ns += debt;
        }
    }
}

static bool within(const struct credit *c, const struct credit_vm *vm, const struct account_set *s)
{
    return !(vm->config.hard & c->online & ~s->mask);
}

// What the set has in all: its part of the host's time. Should the vCPUs that always want to run
// have lost credit together (to others that slept and saved it), they get it back: with all of them
// OVER, their weights would no longer tell.
static void set_total(struct credit *c, struct account_set *s, int64_t total)
{
    int64_t held = 0;
    for_each_vm (c, vm)
        if (within(c, vm, s))
            for_each_active (vm, v)
                held += wants(v) ? v->credit_ns : 0;
    s->total_ns = scale(total, (uint64_t)__builtin_popcountll(s->mask), c->params.nr_pcpus);
    if (held < 0)
        s->total_ns -= held;
}

// One round over a set: how much is left for those that are not full yet.
static void set_measure(struct credit *c, struct account_set *s)
{
    s->rest_ns = s->total_ns;
    s->weight = 0;
    for_each_vm (c, vm) {
        if (!within(c, vm, s))
            continue;
        if (vm->settled || vm->full) {
            s->rest_ns -= vm->settled ? vm->given_ns : vm->room_ns;
            continue;
        }
        const uint64_t weight = vcpu_weight(c, vm);
        for_each_active (vm, v) {
            if (v->full)
                s->rest_ns -= v->room_ns;
            else
                s->weight += weight;
        }
    }
    if (s->rest_ns < 0)
        s->rest_ns = 0;
}

static int64_t vcpu_part(const struct credit_vcpu *v, const struct account_set *s, uint64_t weight)
{
    return v->full || !s->weight ? v->room_ns : scale(s->rest_ns, weight, s->weight);
}

// Marks what is full at the present level; true if anything was.
static bool set_saturate(struct credit *c, const struct account_set *s)
{
    bool changed = false;
    for_each_vm (c, vm) {
        if (vm->settled || vm->full || !within(c, vm, s))
            continue;
        const uint64_t weight = vcpu_weight(c, vm);
        int64_t sum = 0;
        for_each_active (vm, v) {
            int64_t part = vcpu_part(v, s, weight);
            if (!v->full && part >= v->room_ns) {
                v->full = changed = true;
            }
            sum += v->full ? v->room_ns : part;
        }
        if (sum > vm->room_ns) {
            vm->full = changed = true;
        }
    }
    return changed;
}

// The level that a set's VMs reach if nothing but the set limits them.
static void set_level(struct credit *c, struct account_set *s)
{
    for_each_vm (c, vm) {
        if (vm->settled || !within(c, vm, s))
            continue;
        vm->full = false;
        for_each_active (vm, v)
            v->full = false;
    }
    do
        set_measure(c, s);
    while (s->weight && set_saturate(c, s));
}

// At which of the two the water stands lower.
static bool set_lower(const struct account_set *a, const struct account_set *b)
{
    if (!a->weight || !b->weight)
        return a->weight && !b->weight;
    return (unsigned __int128)a->rest_ns * b->weight < (unsigned __int128)b->rest_ns * a->weight;
}

static void vcpu_give(struct credit *c, struct credit_vcpu *v, int64_t ns)
{
    v->credit_ns += ns;
    c->ledger.given += ns;
}

// A VM whose own limit was reached: equal parts for its vCPUs, as far as each has room.
static void vm_split(struct credit *c, struct credit_vm *vm)
{
    int64_t rest = vm->given_ns;
    unsigned nr = vm->nr_active;
    for_each_active (vm, v)
        v->full = false;
    for (bool changed = true; changed && nr;) {
        const int64_t part = rest / nr;
        changed = false;
        for_each_active (vm, v) {
            if (v->full || v->room_ns > part)
                continue;
            v->full = changed = true;
            vcpu_give(c, v, v->room_ns);
            rest -= v->room_ns;
            nr--;
        }
    }
    const int64_t part = nr ? rest / nr : 0;
    for_each_active (vm, v)
        if (!v->full)
            vcpu_give(c, v, part);
}

// Gives the VMs of a set what its level says.
static void set_give(struct credit *c, const struct account_set *s)
{
    for_each_vm (c, vm) {
        if (vm->settled || !within(c, vm, s))
            continue;
        vm->settled = true;
        if (vm->full) {
            vm->given_ns = vm->room_ns;
            vm_split(c, vm);
            continue;
        }
        const uint64_t weight = vcpu_weight(c, vm);
        for_each_active (vm, v) {
            int64_t part = vcpu_part(v, s, weight);
            vm->given_ns += part;
            vcpu_give(c, v, part);
        }
    }
}

static bool mask_before(uint64_t a, uint64_t b)
{
    int na = __builtin_popcountll(a), nb = __builtin_popcountll(b);
    return na != nb ? na < nb : a < b;
}

// The different affinities, the smallest sets first, "all" last.
static unsigned sets_find(const struct credit *c, struct account_set *sets)
{
    unsigned nr = 0;
    for_each_vm (c, vm) {
        uint64_t mask = vm->config.hard & c->online;
        if (!vm->nr_active || mask == c->online)
            continue;
        unsigned i = 0;
        while (i < nr && mask_before(sets[i].mask, mask))
            i++;
        if (i == SETS_MAX || (i < nr && sets[i].mask == mask))
            continue;
        nr += nr < SETS_MAX;
        memmove(&sets[i + 1], &sets[i], (nr - i - 1) * sizeof(sets[0]));
        sets[i].mask = mask;
    }
    sets[nr++].mask = c->online;
    return nr;
}

// The set whose water stands lowest is the one that limits its VMs; then the others again.
static void fill(struct credit *c, int64_t total)
{
    struct account_set sets[SETS_MAX + 1] = {0};
    unsigned nr = sets_find(c, sets);
    for (unsigned i = 0; i < nr; i++)
        set_total(c, &sets[i], total);
    for (unsigned round = 0; round < nr; round++) {
        unsigned lowest = nr - 1;
        for (unsigned i = 0; i < nr; i++) {
            set_level(c, &sets[i]);
            if (set_lower(&sets[i], &sets[lowest]))
                lowest = i;
        }
        if (lowest != nr - 1)
            set_level(c, &sets[lowest]);
        set_give(c, &sets[lowest]);
        if (lowest == nr - 1)
            return;
    }
}

static void vcpu_return(struct credit *c, struct credit_vcpu *v, int64_t keep)
{
    c->ledger.returned += v->credit_ns - keep;
    v->credit_ns = keep;
}

// A vCPU that slept keeps one slice at most; one that slept all the time and has that much is no
// longer counted, and keeps half for the time when it wakes.
static void retire(struct credit *c)
{
    const int64_t slice = (int64_t)c->params.slice_ns;
    for_each_vm (c, vm)
        for_each_active (vm, v) {
            if (!wants(v) && v->credit_ns > slice)
                vcpu_return(c, v, slice);
            if (v->state == CREDIT_BLOCKED && v->credit_ns >= slice &&
                v->since_ns <= c->accounted_ns) {
                vcpu_return(c, v, v->credit_ns / 2);
                v->active = false;
                vm->nr_active--;
            }
            v->slept = v->state == CREDIT_BLOCKED;
            v->boost_ns = 0;
        }
}

// The CPU time there was for vCPUs: what they used and what nobody wanted. Not what other processes
// of the host took.
static int64_t host_time(struct credit *c, uint64_t passed, uint64_t now)
{
    const uint64_t most = passed * c->params.nr_pcpus;
    uint64_t idle = 0;
    for (unsigned p = 0; p < c->params.nr_pcpus; p++) {
        const struct credit_pcpu *pcpu = &c->pcpus[p];
        idle += pcpu->idle_ns + (pcpu->current ? 0 : now - pcpu->idle_since_ns);
    }
    uint64_t total = idle - c->idle_ns + (uint64_t)(c->ledger.burned - c->accounted_burn_ns);
    c->idle_ns = idle;
    c->accounted_burn_ns = c->ledger.burned;
    return (int64_t)(total < most ? total : most);
}

void account_give(struct credit *c, uint64_t now)
{
    uint64_t passed = now - c->accounted_ns;
    if (passed > LATE_MAX_SLICES * c->params.slice_ns)
        passed = LATE_MAX_SLICES * c->params.slice_ns;
    rooms(c, (int64_t)passed);
    fill(c, host_time(c, passed, now));
    retire(c);
    c->accounted_ns = now;
    c->accountings++;
}
