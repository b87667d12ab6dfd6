// SPDX-License-Identifier: Apache-2.0
// Queues and decisions. Every runnable vCPU is in one list: of its pCPU and class, or of its VM's
// parked ones. Sets of pCPUs (idle, running a class, with a class waiting) are kept up to date, so
// that a decision looks at bits, not at queues.
#include "sched/credit.h"

#include <errno.h>
#include <string.h>

#include "sched/credit_internal.h"

#define MS 1000000ull

enum {
    STEAL_LOOKS = 16, // vCPUs looked at for a comfortable steal, before any that may run is taken
    LATE_PERIODS = 4, // of caps' budgets: refills that are missed by more are left out
    LEAST_TURNS = 4,  // in a slice, of those whose credit is used up sooner
    CROWD = 8,        // with more waiting at a pCPU, in less time
    LEFTOVER = 4,     // of a least turn: so little, of credit or of a slice, is not looked at again
    QUOTA_MIN_NS = 500000,      // a VM's budget is not handed to its vCPUs in smaller pieces
    QUOTA_TIMER_MIN_NS = 20000, // nor looked at more often: what is used too much is owed
};

static void trace(struct credit *c, enum credit_event_kind kind, const struct credit_vcpu *v,
                  unsigned pcpu, unsigned from, uint64_t now)
{
    if (!c->params.trace)
        return;
    const struct credit_event event = {.kind = kind,
                                       .at_ns = now,
                                       .vm = v->vm,
                                       .vcpu = v,
                                       .pcpu = (uint8_t)pcpu,
                                       .from = (uint8_t)from};
    c->params.trace(c->params.trace_arg, &event);
}

static void kick(struct credit *c, unsigned p, uint64_t at)
{
    if (at < c->pcpus[p].until_ns) {
        c->pcpus[p].until_ns = at;
        c->kicks |= pcpu_bit(p);
    }
}

static uint64_t narrow(uint64_t set, uint64_t wanted)
{
    return set & wanted ? set & wanted : set;
}

static uint64_t later(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

// --- States

static void state_set(struct credit_vcpu *v, enum credit_state state, uint64_t now)
{
    if (v->state == CREDIT_QUEUED || v->state == CREDIT_PARKED)
        v->wait_ns += now - v->since_ns;
    if (v->state == CREDIT_PARKED)
        v->park_ns += now - v->since_ns;
    v->vm->nr_runnable += (v->state == CREDIT_BLOCKED) - (state == CREDIT_BLOCKED);
    v->state = state;
    v->since_ns = now;
}

// The vCPU counts as being at the pCPU (runs or waits there).
static void pcpu_join(struct credit *c, struct credit_vcpu *v, unsigned p)
{
    v->pcpu = (uint8_t)p;
    c->pcpus[p].weight += v->vm->config.weight;
    if (!v->vm->here[p]++)
        v->vm->at |= pcpu_bit(p);
}

static void pcpu_leave(struct credit *c, struct credit_vcpu *v)
{
    c->pcpus[v->pcpu].weight -= v->vm->config.weight;
    if (!--v->vm->here[v->pcpu])
        v->vm->at &= ~pcpu_bit(v->pcpu);
}

// Within a class, a capped VM's vCPU goes before one with less credit when its budget is refilled:
// else it would wait for a slice to end, and the budget of that time would be lost.
static bool presses(const struct credit_vcpu *v, const struct credit_vcpu *other)
{
    return v->pressing && v->class == other->class && v->credit_ns > other->credit_ns;
}

static void queue_put(struct credit *c, struct credit_vcpu *v, bool first)
{
    struct credit_pcpu *p = &c->pcpus[v->pcpu];
    struct credit_list *queue = &p->queue[v->class];
    struct credit_list *before = first ? queue->next : queue;
    if (first && before != queue && presses(list_entry(before, struct credit_vcpu, link), v))
        before = before->next;
    list_add_tail(before, &v->link);
    p->nr_queued[v->class]++;
    c->waiting[v->class] |= pcpu_bit(v->pcpu);
}

static void queue_take(struct credit *c, struct credit_vcpu *v)
{
    struct credit_pcpu *p = &c->pcpus[v->pcpu];
    list_remove(&v->link);
    if (!--p->nr_queued[v->class])
        c->waiting[v->class] &= ~pcpu_bit(v->pcpu);
}

static struct credit_vcpu *queue_first(struct credit_pcpu *p, enum credit_class class)
{
    return list_entry(p->queue[class].next, struct credit_vcpu, link);
}

static bool boost_left(const struct credit *c, const struct credit_vcpu *v)
{
    return v->boost_ns < c->params.tick_ns;
}

static enum credit_class class_now(const struct credit *c, const struct credit_vcpu *v)
{
    if (v->credit_ns < 0)
        return CREDIT_OVER;
    return v->class == CREDIT_BOOST && boost_left(c, v) ? CREDIT_BOOST : CREDIT_UNDER;
}

static enum credit_class class_at_wake(const struct credit *c, const struct credit_vcpu *v)
{
    if (v->credit_ns < 0)
        return CREDIT_OVER;
    return !c->params.no_boost && boost_left(c, v) ? CREDIT_BOOST : CREDIT_UNDER;
}

static void class_set(struct credit *c, struct credit_vcpu *v, enum credit_class class)
{
    if (v->state == CREDIT_RUNNING) {
        c->running[v->class] &= ~pcpu_bit(v->pcpu);
        c->running[class] |= pcpu_bit(v->pcpu);
    }
    v->class = class;
}

// --- Caps: a VM's budget is handed to its running vCPUs in quotas, so that together they never use
// more, wherever they run.

static void budget_return(struct credit_vcpu *v)
{
    v->vm->budget_ns += (int64_t)v->quota_ns;
    v->vm->handed_ns -= (int64_t)v->quota_ns;
    v->quota_ns = 0;
}

// True if the vCPU may run.
static bool budget_take(const struct credit *c, struct credit_vcpu *v)
{
    struct credit_vm *vm = v->vm;
    if (!vm_capped(c, vm) || v->quota_ns)
        return true;
    if (vm->budget_ns <= 0)
        return false;
    int64_t part = vm->budget_ns / vm->nr_runnable;
    if (part < QUOTA_MIN_NS)
        part = vm->budget_ns < QUOTA_MIN_NS ? vm->budget_ns : QUOTA_MIN_NS;
    v->quota_ns = (uint64_t)part;
    vm->budget_ns -= part;
    vm->handed_ns += part;
    return true;
}

// --- Where

static uint64_t load(const struct credit *c, unsigned p)
{
    const struct credit_pcpu *pcpu = &c->pcpus[p];
    if (c->params.placement == CREDIT_BY_WEIGHT)
        return pcpu->weight;
    uint64_t nr = pcpu->current != NULL;
    for (int i = 0; i < CREDIT_CLASSES; i++)
        nr += pcpu->nr_queued[i];
    return nr;
}

static uint64_t waiting_any(const struct credit *c)
{
    return c->waiting[CREDIT_BOOST] | c->waiting[CREDIT_UNDER] | c->waiting[CREDIT_OVER];
}

static uint64_t siblings_at(const struct credit *c, const struct credit_vcpu *v)
{
    return c->params.no_balance ? 0 : v->vm->at;
}

// Of who runs there, in an order that fits an unsigned number.
static uint64_t credit_at(const struct credit *c, unsigned p)
{
    const struct credit_vcpu *v = c->pcpus[p].current;
    return v ? (uint64_t)v->credit_ns + (1ull << 63) : 0;
}

// The pCPU for a vCPU that is not anywhere yet: an idle one, else one where it may run at once
// because it is better than who runs there (the one with the least credit), else one that is short
// of work.
static unsigned place(const struct credit *c, const struct credit_vcpu *v)
{
    const uint64_t hard = v->vm->config.hard & c->online;
    const uint64_t vacant = hard & c->idle & ~c->called & ~waiting_any(c);
    uint64_t set = vacant ? vacant : hard;
    if (!vacant && v->class != CREDIT_OVER) { // where it need not wait
        uint64_t as_good = c->running[CREDIT_BOOST] | c->waiting[CREDIT_BOOST];
        set = narrow(set, ~as_good);
        set = narrow(set, ~(as_good | c->running[CREDIT_UNDER] | c->waiting[CREDIT_UNDER]));
    }
    set = narrow(set, v->vm->config.soft);
    set = narrow(set, ~siblings_at(c, v));
    if (vacant) {
        set = narrow(set, c->nodes[c->params.node[v->pcpu]]);
        return set & pcpu_bit(v->pcpu) ? v->pcpu : (unsigned)__builtin_ctzll(set);
    }
    unsigned best = (unsigned)__builtin_ctzll(set);
    uint64_t least = UINT64_MAX;
    for (uint64_t rest = set; rest; rest &= rest - 1) {
        unsigned p = (unsigned)__builtin_ctzll(rest);
        uint64_t l = v->class == CREDIT_BOOST || v->pressing ? credit_at(c, p) : load(c, p);
        if (l < least || (l == least && p == v->pcpu)) {
            best = p;
            least = l;
        }
    }
    return best;
}

static uint64_t preemptible_at(const struct credit *c, unsigned p, uint64_t now)
{
    return later(now, c->pcpus[p].current->start_ns + c->params.ratelimit_ns);
}

// Somebody waits at `v->pcpu`: that pCPU goes to it if it is better than who runs, else one that is
// idle, or does worse work, may come and steal it.
static void offer(struct credit *c, const struct credit_vcpu *v, uint64_t now)
{
    const struct credit_vcpu *current = c->pcpus[v->pcpu].current;
    const uint64_t hard = v->vm->config.hard & c->online;
    if (!current) {
        kick(c, v->pcpu, now);
        return;
    }
    uint64_t set = hard & c->idle & ~c->called & ~waiting_any(c);
    if (!set && (v->class < current->class || presses(v, current))) {
        kick(c, v->pcpu, preemptible_at(c, v->pcpu, now));
        return;
    }
    for (int class = CREDIT_OVER; !set && class > (int)v->class; class --)
        set = hard & c->running[class];
    if (!set)
        return;
    set = narrow(set, v->vm->config.soft);
    set = narrow(set, c->nodes[c->params.node[v->pcpu]]);
    unsigned p = (unsigned)__builtin_ctzll(set);
    if (!c->pcpus[p].current)
        c->called |= pcpu_bit(p);
    kick(c, p, c->pcpus[p].current ? preemptible_at(c, p, now) : now);
}

static void migrated(struct credit *c, struct credit_vcpu *v, unsigned from, uint64_t now)
{
    if (from == v->pcpu)
        return;
    v->migrations++;
    trace(c, CREDIT_EV_MIGRATE, v, v->pcpu, from, now);
}

// Becomes QUEUED at a pCPU of the scheduler's choice, with a new slice.
static void enqueue(struct credit *c, struct credit_vcpu *v, bool first, uint64_t now)
{
    unsigned from = v->pcpu;
    v->left_ns = c->params.slice_ns;
    pcpu_join(c, v, place(c, v));
    state_set(v, CREDIT_QUEUED, now);
    queue_put(c, v, first);
    migrated(c, v, from, now);
    offer(c, v, now);
}

static void park(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    state_set(v, CREDIT_PARKED, now);
    list_add_tail(&v->vm->parked, &v->link);
    trace(c, CREDIT_EV_PARK, v, v->pcpu, v->pcpu, now);
}

static void unpark(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    list_remove(&v->link);
    v->class = class_now(c, v);
    v->pressing = v->class == CREDIT_UNDER;
    trace(c, CREDIT_EV_UNPARK, v, v->pcpu, v->pcpu, now);
    enqueue(c, v, v->pressing, now);
}

// Leaves its pCPU idle. The state is set by the caller.
static void vacate(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    struct credit_pcpu *p = &c->pcpus[v->pcpu];
    p->current = NULL;
    p->idle_since_ns = now;
    c->running[v->class] &= ~pcpu_bit(v->pcpu);
    c->idle |= pcpu_bit(v->pcpu);
    pcpu_leave(c, v);
    budget_return(v);
    v->ran_ns = now;
    p->until_ns = CREDIT_NEVER;
    kick(c, v->pcpu, now);
}

// Out of whatever it is in; it is nowhere then, and its state is the caller's to set.
static void withdraw(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    if (v->state == CREDIT_RUNNING) {
        vacate(c, v, now);
    } else if (v->state == CREDIT_QUEUED) {
        queue_take(c, v);
        pcpu_leave(c, v);
    } else if (v->state == CREDIT_PARKED) {
        list_remove(&v->link);
    }
}

// A vCPU that ran gave back what it had: others of its VM may have it.
static void budget_offer(struct credit *c, struct credit_vm *vm, uint64_t now)
{
    if (vm->budget_ns >= QUOTA_MIN_NS && !list_empty(&vm->parked))
        unpark(c, list_entry(vm->parked.next, struct credit_vcpu, link), now);
}

// --- What happens to vCPUs

void credit_wake(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    if (v->state != CREDIT_BLOCKED)
        return;
    v->wakes++;
    if (!v->active) {
        v->active = true;
        v->vm->nr_active++;
    }
    v->class = class_at_wake(c, v);
    v->boosts += v->class == CREDIT_BOOST;
    trace(c, CREDIT_EV_WAKE, v, v->pcpu, v->pcpu, now);
    if (vm_capped(c, v->vm) && v->vm->budget_ns <= 0)
        park(c, v, now);
    else
        enqueue(c, v, false, now);
}

void credit_block(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    if (v->state == CREDIT_BLOCKED)
        return;
    bool ran = v->state == CREDIT_RUNNING;
    withdraw(c, v, now);
    state_set(v, CREDIT_BLOCKED, now);
    v->slept = true;
    v->yielded = v->pressing = false;
    if (ran)
        trace(c, CREDIT_EV_STOP, v, v->pcpu, v->pcpu, now);
    trace(c, CREDIT_EV_BLOCK, v, v->pcpu, v->pcpu, now);
    if (ran)
        budget_offer(c, v->vm, now);
}

void credit_yield(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    if (v->state != CREDIT_RUNNING)
        return;
    v->yielded = true;
    trace(c, CREDIT_EV_YIELD, v, v->pcpu, v->pcpu, now);
    kick(c, v->pcpu, now);
}

void credit_charge(struct credit *c, struct credit_vcpu *v, uint64_t used_ns, uint64_t now)
{
    v->run_ns += used_ns;
    v->vm->run_ns += used_ns;
    v->credit_ns -= (int64_t)used_ns;
    c->ledger.burned += (int64_t)used_ns;
    v->ran_ns = now;
    if (vm_capped(c, v->vm)) {
        v->vm->used_ns += used_ns;
        uint64_t part = used_ns < v->quota_ns ? used_ns : v->quota_ns;
        v->quota_ns -= part;
        v->vm->handed_ns -= (int64_t)part;
        v->vm->budget_ns -= (int64_t)(used_ns - part);
    }
    if (v->class == CREDIT_BOOST)
        v->boost_ns += used_ns;
    if (!v->active) { // ran for a moment without having been woken: it is not one that only sleeps
        v->active = v->slept = true;
        v->vm->nr_active++;
    }
    if (v->state == CREDIT_RUNNING)
        class_set(c, v, class_now(c, v));
}

// --- Decisions

// The first of the pCPU's best class; one that yielded lets the next go first, of whatever class.
static struct credit_vcpu *local_best(struct credit_pcpu *p)
{
    struct credit_vcpu *polite = NULL;
    for (int class = 0; class < CREDIT_CLASSES; class ++) {
        if (!p->nr_queued[class])
            continue;
        struct credit_vcpu *v = queue_first(p, class);
        if (!v->yielded)
            return v;
        polite = v;
        if (v->link.next != &p->queue[class])
            return list_entry(v->link.next, struct credit_vcpu, link);
    }
    return polite;
}

struct steal {
    struct credit *c;
    unsigned to;
    uint64_t now;
    unsigned looks;
};

// A steal that costs little: where the vCPU should run, its cache cold, no sibling here.
static bool comfortable(const struct steal *s, const struct credit_vcpu *v)
{
    const uint64_t here = pcpu_bit(s->to);
    return v->vm->config.soft & here && !(siblings_at(s->c, v) & here) &&
           s->now - v->ran_ns >= s->c->params.ratelimit_ns;
}

static struct credit_vcpu *steal_at(struct steal *s, unsigned from, enum credit_class class,
                                    bool picky)
{
    struct credit_list *queue = &s->c->pcpus[from].queue[class];
    for (struct credit_list *l = queue->next; l != queue; l = l->next) {
        struct credit_vcpu *v = list_entry(l, struct credit_vcpu, link);
        if (picky && !s->looks)
            return NULL;
        s->looks -= picky;
        if (v->vm->config.hard & pcpu_bit(s->to) && (!picky || comfortable(s, v)))
            return v;
    }
    return NULL;
}

// A vCPU of that class that waits at one of `set`, the next pCPUs first.
static struct credit_vcpu *steal_among(struct steal *s, uint64_t set, enum credit_class class)
{
    const uint64_t upper = set & ~(pcpu_bit(s->to) - 1), parts[] = {upper, set & ~upper};
    for (int picky = 1; picky >= 0; picky--)
        for (int i = 0; i < 2; i++)
            for (uint64_t rest = parts[i]; rest; rest &= rest - 1) {
                struct credit_vcpu *v = steal_at(s, (unsigned)__builtin_ctzll(rest), class, picky);
                if (v)
                    return v;
            }
    return NULL;
}

// Better work than `limit` that waits elsewhere and may run here: same NUMA node first. An idle
// pCPU is about to run what waits there.
static struct credit_vcpu *steal(struct credit *c, unsigned to, int limit, uint64_t now)
{
    struct steal s = {c, to, now, STEAL_LOOKS};
    const uint64_t near = c->nodes[c->params.node[to]];
    for (int class = 0; class < limit; class ++) {
        const uint64_t set = c->waiting[class] & ~(c->idle | pcpu_bit(to));
        struct credit_vcpu *v = set & near ? steal_among(&s, set & near, class) : NULL;
        if (!v && set & ~near)
            v = steal_among(&s, set & ~near, class);
        if (v)
            return v;
    }
    return NULL;
}

// Takes the next vCPU out of its queue. Those whose VM's budget is used up are parked instead.
static struct credit_vcpu *take_next(struct credit *c, unsigned p, uint64_t now)
{
    for (;;) {
        struct credit_vcpu *v = local_best(&c->pcpus[p]);
        struct credit_vcpu *better = steal(c, p, v ? (int)v->class : CREDIT_CLASSES, now);
        v = better ? better : v;
        if (!v)
            return NULL;
        queue_take(c, v);
        if (budget_take(c, v))
            return v;
        pcpu_leave(c, v);
        park(c, v, now);
    }
}

// A vCPU whose credit is used up goes on for that long from its turn's beginning, so that switches
// stay seldom; for less if many wait. It owes what it had too much.
static uint64_t least_turn(const struct credit *c, const struct credit_pcpu *p)
{
    unsigned nr = p->nr_queued[CREDIT_BOOST] + p->nr_queued[CREDIT_UNDER];
    uint64_t ns = c->params.slice_ns / LEAST_TURNS;
    return nr > CROWD ? ns * CROWD / nr : ns;
}

// When the vCPU that runs must be looked at again.
static uint64_t until(const struct credit *c, const struct credit_vcpu *v, uint64_t now)
{
    const uint64_t tick = c->params.tick_ns;
    uint64_t at = v->start_ns + v->left_ns;
    if (v->class != CREDIT_OVER) {
        const uint64_t turn = least_turn(c, &c->pcpus[v->pcpu]);
        uint64_t used_up = later(now + (uint64_t)v->credit_ns + 1, v->start_ns + turn);
        if (used_up + turn / LEFTOVER < at) // so little before its slice's end nobody looks
            at = used_up;
    }
    if (v->class == CREDIT_BOOST && now + tick - v->boost_ns < at)
        at = now + tick - v->boost_ns;
    at = later(at, later(now + 1, v->start_ns + c->params.ratelimit_ns));
    if (vm_capped(c, v->vm) && now + later(v->quota_ns, QUOTA_TIMER_MIN_NS) < at)
        at = now + later(v->quota_ns, QUOTA_TIMER_MIN_NS);
    return at;
}

static void run(struct credit *c, struct credit_vcpu *v, unsigned p, uint64_t now)
{
    struct credit_pcpu *pcpu = &c->pcpus[p];
    if (v->pcpu != p) {
        unsigned from = v->pcpu;
        pcpu_leave(c, v);
        pcpu_join(c, v, p);
        migrated(c, v, from, now);
    }
    if (c->idle & pcpu_bit(p))
        pcpu->idle_ns += now - pcpu->idle_since_ns;
    c->idle &= ~pcpu_bit(p);
    state_set(v, CREDIT_RUNNING, now);
    class_set(c, v, v->class);
    pcpu->current = v;
    v->start_ns = now;
    v->yielded = v->pressing = false;
    v->switches++;
    trace(c, CREDIT_EV_RUN, v, p, p, now);
}

// The vCPU that ran stays at its pCPU, in the queue.
static void stop(struct credit *c, struct credit_vcpu *v, bool over, uint64_t now)
{
    const uint64_t ran = now - v->start_ns;
    c->running[v->class] &= ~pcpu_bit(v->pcpu);
    v->left_ns = over ? c->params.slice_ns : v->left_ns - ran;
    v->yielded = false;
    v->ran_ns = now;
    budget_return(v);
    state_set(v, CREDIT_QUEUED, now);
    trace(c, CREDIT_EV_STOP, v, v->pcpu, v->pcpu, now);
}

// One that may not run here any longer.
static void evict(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    const bool allowed = v->vm->config.hard & pcpu_bit(v->pcpu);
    vacate(c, v, now);
    if (allowed) {
        park(c, v, now);
        trace(c, CREDIT_EV_STOP, v, v->pcpu, v->pcpu, now);
    } else {
        state_set(v, CREDIT_QUEUED, now);
        trace(c, CREDIT_EV_STOP, v, v->pcpu, v->pcpu, now);
        v->class = class_now(c, v);
        enqueue(c, v, false, now);
    }
}

// It was kept from running for so long that it has a slice's credit more than the next in line.
// Such a one goes on: with a share of nearly a pCPU, it could never make up for its turns in the
// line.
static bool starved(struct credit *c, const struct credit_vcpu *v)
{
    struct credit_pcpu *p = &c->pcpus[v->pcpu];
    return v->class == CREDIT_UNDER && p->nr_queued[CREDIT_UNDER] &&
           v->credit_ns > queue_first(p, CREDIT_UNDER)->credit_ns + (int64_t)c->params.slice_ns;
}

// Its credit is used up, or nearly: for a little rest nobody looks again.
static bool spent(const struct credit *c, const struct credit_vcpu *v, uint64_t now)
{
    const uint64_t turn = least_turn(c, &c->pcpus[v->pcpu]);
    return v->class != CREDIT_OVER && now - v->start_ns >= turn &&
           v->credit_ns < (int64_t)turn / LEFTOVER;
}

// Where better work waits than what runs, it is looked at.
static void reconsider(struct credit *c, unsigned p, uint64_t now)
{
    const struct credit_vcpu *v = c->pcpus[p].current;
    const int limit = v ? (int)v->class : CREDIT_CLASSES;
    for (int class = 0; class < limit; class ++)
        if (c->waiting[class]) {
            kick(c, p, v ? preemptible_at(c, p, now) : now);
            return;
        }
}

// Whoever waits at one of `set` and may run where nobody does. More than the first of each:
// affinity may keep that one away, and not the next.
static void offer_waiting(struct credit *c, uint64_t set, uint64_t now)
{
    for (; set; set &= set - 1)
        for (int class = 0; class < CREDIT_CLASSES; class ++) {
            const struct credit_list *queue = &c->pcpus[__builtin_ctzll(set)].queue[class];
            for (const struct credit_list *l = queue->next; l != queue; l = l->next) {
                const uint64_t free = c->idle & ~c->called & ~waiting_any(c);
                const struct credit_vcpu *v = list_entry(l, struct credit_vcpu, link);
                if (!free)
                    return;
                if (v->vm->config.hard & free)
                    offer(c, v, now);
            }
        }
}

struct credit_vcpu *credit_pick(struct credit *c, unsigned p, uint64_t now)
{
    struct credit_pcpu *pcpu = &c->pcpus[p];
    struct credit_vcpu *prev = pcpu->current;
    bool over = false, expired = false; // its slice is; and it goes to the end of the line
    c->called &= ~pcpu_bit(p);
    if (prev && (!(prev->vm->config.hard & pcpu_bit(p)) || !budget_take(c, prev))) {
        evict(c, prev, now);
        prev = NULL;
    }
    if (prev && !prev->yielded && now < prev->start_ns + c->params.ratelimit_ns) {
        pcpu->until_ns = until(c, prev, now);
        reconsider(c, p, now);
        return prev;
    }
    if (prev) {
        over = prev->yielded || now - prev->start_ns >= prev->left_ns || spent(c, prev, now);
        expired = prev->yielded || (over && !starved(c, prev));
        queue_put(c, prev, !expired);
    }
    struct credit_vcpu *next = take_next(c, p, now);
    const bool fetched = next && next->pcpu != p;
    if (next == prev) {
        if (prev && over) {
            prev->start_ns = now;
            prev->left_ns = c->params.slice_ns;
            prev->yielded = false;
        }
    } else {
        if (prev)
            stop(c, prev, over, now);
        run(c, next, p, now);
    }
    pcpu->until_ns = next ? until(c, next, now) : CREDIT_NEVER;
    c->kicks &= ~pcpu_bit(p);
    if (prev && prev != next) {
        offer(c, prev, now);
        budget_offer(c, prev->vm, now);
    }
    // An idle pCPU is left to run what waits at it; and one that was called may have found better.
    offer_waiting(c, waiting_any(c) & (fetched && !prev ? UINT64_MAX : pcpu_bit(p)), now);
    return next;
}

uint64_t credit_kicks(struct credit *c)
{
    uint64_t kicks = c->kicks;
    c->kicks = 0;
    return kicks;
}

// --- Time

// Moves the vCPUs of a queue whose class is no longer that queue's.
static void requeue(struct credit *c, unsigned p, enum credit_class class)
{
    struct credit_list *queue = &c->pcpus[p].queue[class], *next;
    for (struct credit_list *l = queue->next; l != queue; l = next) {
        struct credit_vcpu *v = list_entry(l, struct credit_vcpu, link);
        next = l->next;
        if (class_now(c, v) == class)
            continue;
        queue_take(c, v);
        v->class = class_now(c, v);
        queue_put(c, v, false);
    }
}

static void account(struct credit *c, uint64_t now)
{
    account_give(c, now);
    for (unsigned p = 0; p < c->params.nr_pcpus; p++) {
        struct credit_vcpu *v = c->pcpus[p].current;
        if (v)
            class_set(c, v, class_now(c, v));
        for (int class = 0; class < CREDIT_CLASSES; class ++)
            requeue(c, p, class);
    }
    for (unsigned p = 0; p < c->params.nr_pcpus; p++)
        reconsider(c, p, now);
    if (!c->params.trace)
        return;
    for (struct credit_list *l = c->vms.next; l != &c->vms; l = l->next) {
        struct credit_vm *vm = list_entry(l, struct credit_vm, link);
        for (struct credit_list *m = vm->vcpus.next; m != &vm->vcpus; m = m->next) {
            struct credit_vcpu *v = list_entry(m, struct credit_vcpu, sibling);
            if (v->active)
                trace(c, CREDIT_EV_CREDIT, v, v->pcpu, v->pcpu, now);
        }
    }
}

static int64_t vm_budget(const struct credit *c, const struct credit_vm *vm)
{
    return (int64_t)(c->params.cap_period_ns / 100 * vm->config.cap);
}

static void unpark_all(struct credit *c, struct credit_vm *vm, uint64_t now)
{
    while (!list_empty(&vm->parked))
        unpark(c, list_entry(vm->parked.next, struct credit_vcpu, link), now);
}

// How much budget it may have now. What it could not use (because better ones ran) is kept, up to
// one period's, as long as it uses no more in any 101 periods, one after the other, than 101 of
// them allow: then no window of 100 periods, wherever it begins, has more than 1 % too much.
static int64_t window_left(struct credit_vm *vm, int64_t full)
{
    const uint64_t used = (vm->used_ns + 999) / 1000;
    vm->used_ns = 0;
    vm->window_us += used - vm->used_us[vm->window_at];
    vm->used_us[vm->window_at] = (uint32_t)used;
    vm->window_at = (vm->window_at + 1) % CREDIT_CAP_WINDOW;
    // Less a little: what is used beyond a quota is noticed after QUOTA_TIMER_MIN_NS.
    int64_t left = (CREDIT_CAP_WINDOW + 1) * full - full / 16 - (int64_t)vm->window_us * 1000;
    return left < 0 ? 0 : left < 2 * full ? left : 2 * full;
}

static void refill(struct credit *c, uint64_t now)
{
    const struct credit_list *slot = &c->refills[c->refill_slot];
    for (struct credit_list *l = slot->next; l != slot; l = l->next) {
        struct credit_vm *vm = list_entry(l, struct credit_vm, refill);
        const int64_t full = vm_budget(c, vm), most = window_left(vm, full) - vm->handed_ns;
        // What it had too much before the window is forgotten, as what it did not have then is.
        const int64_t debt_most = (CREDIT_CAP_WINDOW + 1) * full;
        if (vm->budget_ns < -debt_most)
            vm->budget_ns = -debt_most;
        vm->budget_ns = vm->budget_ns + full < most ? vm->budget_ns + full : most;
        if (vm->budget_ns > 0)
            unpark_all(c, vm, now);
    }
}

uint64_t credit_next(const struct credit *c, uint64_t patience_ns)
{
    if (!c->nr_vms)
        return CREDIT_NEVER;
    const uint64_t at = c->account_at_ns + patience_ns;
    return c->nr_capped && c->refill_at_ns < at ? c->refill_at_ns : at;
}

// The next slot with VMs in it.
static void refill_plan(struct credit *c)
{
    const uint64_t step = c->params.cap_period_ns / CREDIT_REFILL_SLOTS;
    for (int i = 0; i < CREDIT_REFILL_SLOTS; i++) {
        c->refill_at_ns += step;
        c->refill_slot = (c->refill_slot + 1) % CREDIT_REFILL_SLOTS;
        if (!list_empty(&c->refills[c->refill_slot]))
            return;
    }
}

void credit_timer(struct credit *c, uint64_t now)
{
    if (now >= c->account_at_ns) {
        account(c, now);
        c->account_at_ns = now + c->params.slice_ns;
    }
    if (now >= c->refill_at_ns + LATE_PERIODS * c->params.cap_period_ns)
        c->refill_at_ns = now; // nobody was capped, or the driver slept
    while (now >= c->refill_at_ns) {
        refill(c, now);
        refill_plan(c);
    }
}

// --- VMs and vCPUs

int credit_vm_check(const struct credit *c, const struct credit_vm_config *config,
                    struct error *err)
{
    if (config->weight < CREDIT_WEIGHT_MIN || config->weight > CREDIT_WEIGHT_MAX)
        return error_set(err, -EINVAL, "weight %u: must be %d to %d", config->weight,
                         CREDIT_WEIGHT_MIN, CREDIT_WEIGHT_MAX);
    if (config->cap > CREDIT_CAP_MAX)
        return error_set(err, -EINVAL, "cap %u%%: must be 0 (none) to %d", config->cap,
                         CREDIT_CAP_MAX);
    if (!(config->hard & c->online))
        return error_set(err, -EINVAL, "affinity %#llx: names none of this host's %u pCPUs",
                         (unsigned long long)config->hard, c->params.nr_pcpus);
    return 0;
}

static void vm_config_set(struct credit *c, struct credit_vm *vm,
                          const struct credit_vm_config *config)
{
    vm->config = *config;
    if (!(vm->config.soft & config->hard & c->online))
        vm->config.soft = CREDIT_ANY_PCPU;
}

// By id: those that are refilled together are so in an order that does not depend on who came
// first.
static void refill_add(struct credit_list *slot, struct credit_vm *vm)
{
    struct credit_list *before = slot->next;
    while (before != slot && list_entry(before, struct credit_vm, refill)->id < vm->id)
        before = before->next;
    list_add_tail(before, &vm->refill);
}

static void vm_cap_set(struct credit *c, struct credit_vm *vm, bool capped)
{
    if (capped == !list_empty(&vm->refill))
        return;
    if (capped)
        refill_add(&c->refills[vm->id % CREDIT_REFILL_SLOTS], vm);
    else
        list_remove(&vm->refill);
    c->nr_capped += capped ? 1 : -1;
}

int credit_vm_add(struct credit *c, struct credit_vm *vm, uint32_t id,
                  const struct credit_vm_config *config, struct error *err)
{
    int ret = credit_vm_check(c, config, err);
    if (ret)
        return ret;
    memset(vm, 0, sizeof(*vm));
    vm->id = id;
    list_init(&vm->vcpus);
    list_init(&vm->parked);
    vm_config_set(c, vm, config);
    vm->budget_ns = vm_budget(c, vm);
    list_add_tail(&c->vms, &vm->link);
    c->nr_vms++;
    list_init(&vm->refill);
    vm_cap_set(c, vm, vm_capped(c, vm));
    return 0;
}

int credit_vm_set(struct credit *c, struct credit_vm *vm, const struct credit_vm_config *config,
                  uint64_t now, struct error *err)
{
    int ret = credit_vm_check(c, config, err);
    if (ret)
        return ret;
    for (uint64_t rest = vm->at; rest; rest &= rest - 1) {
        unsigned p = (unsigned)__builtin_ctzll(rest);
        c->pcpus[p].weight -= (uint64_t)vm->here[p] * vm->config.weight;
        c->pcpus[p].weight += (uint64_t)vm->here[p] * config->weight;
    }
    const bool recap = config->cap != vm->config.cap;
    vm_config_set(c, vm, config);
    vm_cap_set(c, vm, vm_capped(c, vm));
    for (struct credit_list *l = vm->vcpus.next; l != &vm->vcpus; l = l->next) {
        struct credit_vcpu *v = list_entry(l, struct credit_vcpu, sibling);
        if (recap)
            v->quota_ns = 0;
        if (v->state == CREDIT_RUNNING)
            kick(c, v->pcpu, now);
        if (v->state != CREDIT_QUEUED)
            continue;
        withdraw(c, v, now);
        enqueue(c, v, false, now);
    }
    if (recap) {
        memset(vm->used_us, 0, sizeof(vm->used_us));
        vm->window_us = vm->used_ns = 0;
        vm->handed_ns = 0;
        vm->budget_ns = vm_budget(c, vm);
        unpark_all(c, vm, now);
    }
    return 0;
}

void credit_vm_remove(struct credit *c, struct credit_vm *vm, uint64_t now)
{
    while (!list_empty(&vm->vcpus))
        credit_vcpu_remove(c, list_entry(vm->vcpus.next, struct credit_vcpu, sibling), now);
    vm_cap_set(c, vm, false);
    c->nr_vms--;
    list_remove(&vm->link);
}

void credit_vcpu_add(struct credit *c, struct credit_vm *vm, struct credit_vcpu *v, uint32_t id,
                     uint64_t now)
{
    *v = (struct credit_vcpu) {.vm = vm, .id = id, .state = CREDIT_BLOCKED, .since_ns = now};
    v->pcpu = (uint8_t)__builtin_ctzll(vm->config.hard & c->online);
    v->class = CREDIT_UNDER;
    list_init(&v->link);
    list_add_tail(&vm->vcpus, &v->sibling);
    vm->nr_vcpus++;
    c->nr_vcpus++;
}

void credit_vcpu_remove(struct credit *c, struct credit_vcpu *v, uint64_t now)
{
    credit_block(c, v, now);
    c->ledger.returned += v->credit_ns;
    v->credit_ns = 0;
    v->vm->nr_active -= v->active;
    v->vm->nr_vcpus--;
    c->nr_vcpus--;
    list_remove(&v->sibling);
}

// --- The host

struct credit_params credit_params_default(unsigned nr_pcpus)
{
    return (struct credit_params) {.nr_pcpus = nr_pcpus,
                                   .slice_ns = 30 * MS,
                                   .tick_ns = 10 * MS,
                                   .ratelimit_ns = 1 * MS,
                                   .cap_period_ns = 10 * MS};
}

static int params_check(const struct credit_params *p, struct error *err)
{
    if (!p->nr_pcpus || p->nr_pcpus > CREDIT_PCPUS_MAX)
        return error_set(err, -EINVAL, "%u pCPUs: must be 1 to %d", p->nr_pcpus, CREDIT_PCPUS_MAX);
    for (unsigned i = 0; i < p->nr_pcpus; i++)
        if (p->node[i] >= CREDIT_PCPUS_MAX)
            return error_set(err, -EINVAL, "NUMA node %u of pCPU %u: must be below %d", p->node[i],
                             i, CREDIT_PCPUS_MAX);
    if (p->slice_ns < CREDIT_SLICE_MIN_MS * MS || p->slice_ns > CREDIT_SLICE_MAX_MS * MS)
        return error_set(err, -EINVAL, "slice of %llu us: must be %d to %d ms",
                         (unsigned long long)p->slice_ns / 1000, CREDIT_SLICE_MIN_MS,
                         CREDIT_SLICE_MAX_MS);
    if (!p->tick_ns || p->tick_ns > p->slice_ns)
        return error_set(err, -EINVAL, "tick of %llu us: must be above 0 and at most the slice",
                         (unsigned long long)p->tick_ns / 1000);
    if (p->ratelimit_ns > p->slice_ns)
        return error_set(err, -EINVAL, "rate limit of %llu us: must be at most the slice",
                         (unsigned long long)p->ratelimit_ns / 1000);
    if (p->cap_period_ns < MS || p->cap_period_ns > CREDIT_SLICE_MAX_MS * MS)
        return error_set(err, -EINVAL, "cap period of %llu us: must be 1 to %d ms",
                         (unsigned long long)p->cap_period_ns / 1000, CREDIT_SLICE_MAX_MS);
    return 0;
}

int credit_init(struct credit *c, const struct credit_params *params, uint64_t now,
                struct error *err)
{
    int ret = params_check(params, err);
    if (ret)
        return ret;
    memset(c, 0, sizeof(*c));
    c->params = *params;
    c->online = params->nr_pcpus == 64 ? UINT64_MAX : pcpu_bit(params->nr_pcpus) - 1;
    c->idle = c->online;
    list_init(&c->vms);
    for (unsigned p = 0; p < CREDIT_PCPUS_MAX; p++) {
        struct credit_pcpu *pcpu = &c->pcpus[p];
        for (int class = 0; class < CREDIT_CLASSES; class ++)
            list_init(&pcpu->queue[class]);
        pcpu->until_ns = CREDIT_NEVER;
        pcpu->idle_since_ns = now;
        if (p < params->nr_pcpus)
            c->nodes[params->node[p]] |= pcpu_bit(p);
    }
    c->accounted_ns = now;
    c->account_at_ns = now + params->slice_ns;
    for (int i = 0; i < CREDIT_REFILL_SLOTS; i++)
        list_init(&c->refills[i]);
    c->refill_at_ns = now + params->cap_period_ns / CREDIT_REFILL_SLOTS;
    return 0;
}

int credit_params_set(struct credit *c, const struct credit_params *params, uint64_t now,
                      struct error *err)
{
    int ret = params_check(params, err);
    if (ret)
        return ret;
    if (params->nr_pcpus != c->params.nr_pcpus ||
        memcmp(params->node, c->params.node, params->nr_pcpus))
        return error_set(err, -EINVAL, "the pCPUs of a running host cannot be changed");
    const bool caps = params->no_caps != c->params.no_caps;
    c->params = *params;
    if (c->account_at_ns > now + params->slice_ns)
        c->account_at_ns = now + params->slice_ns;
    if (c->refill_at_ns > now + params->cap_period_ns)
        c->refill_at_ns = now + params->cap_period_ns;
    for (struct credit_list *l = c->vms.next; caps && l != &c->vms; l = l->next) {
        struct credit_vm *vm = list_entry(l, struct credit_vm, link);
        vm_cap_set(c, vm, vm_capped(c, vm));
        unpark_all(c, vm, now);
    }
    for (unsigned p = 0; p < params->nr_pcpus; p++)
        if (c->pcpus[p].current) {
            c->pcpus[p].current->left_ns = params->slice_ns;
            kick(c, p, now);
        }
    return 0;
}

// --- Names

int64_t credit_of(const struct credit_vcpu *v)
{
    int64_t n = v->credit_ns / CREDIT_NS;
    return n - (v->credit_ns < n * CREDIT_NS);
}

const char *credit_class_name(enum credit_class class)
{
    static const char *const names[] = {"boost", "under", "over"};
    return names[class];
}

const char *credit_state_name(enum credit_state state)
{
    static const char *const names[] = {"blocked", "queued", "running", "parked"};
    return names[state];
}

const char *credit_event_name(enum credit_event_kind kind)
{
    static const char *const names[] = {"run",  "stop",   "wake",    "block", "yield",
                                        "park", "unpark", "migrate", "credit"};
    return names[kind];
}
