// SPDX-License-Identifier: Apache-2.0
// Turns: what sched/credit.h decides is made true of threads, and what threads do is told to it.
//
// A turn changes hands without a gap: in the same breath the last thread is told to leave and the
// next one is woken. The last one goes first, and needs some tens of microseconds; each is charged
// what it really had.
//
// A vCPU that halts sleeps inside KVM_RUN (with GRANT_WAIT, so that an exit makes it ask). When it
// gets on a CPU again without a turn, the record of that tells us: it gets a turn, or a signal.
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sched/daemon_internal.h"
#include "vmm/probe.h"
#include "vmm/util.h"

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static void kick(struct sched_daemon *d, struct sched_vcpu *v)
{
    d->kicks++;
    FERRY_PROBE3(sched_kick, v->vm->id, v->index, v->watch.tid);
    if (v->pidfd < 0 || syscall(SYS_pidfd_send_signal, v->pidfd, v->vm->signal, NULL, 0))
        syscall(SYS_tgkill, v->watch.pid, v->watch.tid, v->vm->signal);
}

static void grant(struct sched_vcpu *v, enum sched_grant word)
{
    v->grant = word;
    atomic_store(&v->slot->grant, word);
}

// ... and wakes it.
static void grant_now(struct sched_vcpu *v, enum sched_grant word)
{
    grant(v, word);
    syscall(SYS_futex, &v->slot->grant, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void policy(struct sched_vcpu *v, enum sched_policy wanted)
{
    if (v->policy != wanted && !sched_policy_set(v->watch.tid, wanted))
        v->policy = wanted;
}

static void charge(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    uint64_t cpu = sched_watch_cpu(&v->watch, now);
    if (cpu <= v->charged_ns)
        return;
    credit_charge(&d->credit, &v->credit, cpu - v->charged_ns, now);
    v->charged_ns = cpu;
}

// --- what threads do

// A thread with a fresh turn still sleeps in its futex, or waits for Linux to run it.
static bool in_transit(struct sched_vcpu *v, uint64_t now)
{
    if (atomic_load(&v->slot->want) != WANT_TURN)
        return false;
    if (now < v->granted_ns + TRANSIT_NS)
        return true;
    v->stuck = sched_watch_sleeps(&v->watch);
    v->stuck_cpu_ns = sched_watch_cpu(&v->watch, now);
    return !v->stuck;
}

// How Linux is to wake it. A real-time priority is bounded as a BOOST is: by credit, by one tick of
// CPU time per slice, and each time by TRANSIT_NS.
static enum sched_policy sleeper_policy(const struct sched_daemon *d, const struct sched_vcpu *v)
{
    bool boosted = !d->config.no_boost && v->credit.credit_ns >= 0 &&
                   v->credit.boost_ns < d->credit.params.tick_ns;
    return boosted ? SCHED_POLICY_BOOST : SCHED_POLICY_PROMPT;
}

// It is until it has had CPU time.
static void stuck_still(struct sched_vcpu *v, uint64_t now)
{
    v->stuck &= sched_watch_cpu(&v->watch, now) == v->stuck_cpu_ns;
}

static void woke(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now);

static void sleeps(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    v->brief_until_ns = 0;
    policy(v, sleeper_policy(d, v));
    sched_watch_listen(&v->watch, WAKES_OUT_IN);
    sched_watch_read(&v->watch, now); // it may have woken before we listened, or rung
    charge(d, v, now);
    stuck_still(v, now); // or have come for its turn a moment late, and gone to sleep again
    if ((!v->watch.asleep && !sched_watch_polls(&v->watch)) ||
        (atomic_load(&v->slot->want) == WANT_TURN && !v->stuck))
        woke(d, v, now);
}

static void block(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    grant(v, GRANT_WAIT);
    credit_block(&d->credit, &v->credit, now);
}

static void fell_asleep(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    block(d, v, now);
    sleeps(d, v, now);
}

// Most wake-ups are over soon. One with credit, which Linux let run at once, has BRIEF_NS for it:
// the pCPU's turn goes on behind it, and nobody is told to leave. It is charged all the same.
static bool runs_briefly(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    if (v->policy != SCHED_POLICY_BOOST || atomic_load(&v->slot->want) == WANT_TURN)
        return false;
    if (v->brief_until_ns)
        return now < v->brief_until_ns;
    v->briefs++;
    v->brief_until_ns = now + BRIEF_NS;
    d->brief_at_ns = least(d->brief_at_ns, v->brief_until_ns);
    sched_watch_listen(&v->watch, WAKES_OUT);
    return true;
}

static void woke(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    if (runs_briefly(d, v, now))
        return;
    v->brief_until_ns = 0;
    v->stuck = false;
    v->woken = true;
    sched_watch_listen(&v->watch, WAKES_OUT);
    credit_wake(&d->credit, &v->credit, now);
}

void vcpu_look(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    if (!v->present)
        return;
    sched_watch_read(&v->watch, now);
    charge(d, v, now);
    uint32_t want = atomic_load(&v->slot->want);
    bool asleep = v->watch.asleep, turn = v->credit.state == CREDIT_RUNNING;
    if (v->revoked && (asleep || want == WANT_TURN)) {
        v->revoked = v->offender = false;
        v->loose_cpu_ns = v->charged_ns;
    }
    if (want == WANT_NOTHING) {
        if (v->credit.state != CREDIT_BLOCKED)
            block(d, v, now);
    } else if (v->credit.state == CREDIT_BLOCKED) {
        stuck_still(v, now);
        if (!asleep || (want == WANT_TURN && !v->stuck))
            woke(d, v, now);
        else if (v->brief_until_ns)
            sleeps(d, v, now);
    } else if (asleep && (turn ? !in_transit(v, now) : want != WANT_TURN)) {
        fell_asleep(d, v, now);
    }
}

// --- turns

static void turn_begin(struct sched_daemon *d, struct sched_vcpu *v, unsigned pcpu)
{
    int cpu = d->cpus[pcpu];
    if (v->cpu != cpu) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        if (!sched_setaffinity(v->watch.tid, sizeof(set), &set))
            v->cpu = cpu;
        atomic_store(&v->slot->pcpu, (uint32_t)cpu);
    }
    // In its turn even an offender runs; else it never obeys.
    if (v->policy == SCHED_POLICY_LAST || v->policy == SCHED_POLICY_LEAVING)
        policy(v, SCHED_POLICY_PLAIN);
    sched_watch_listen(&v->watch, WAKES_OUT);
    atomic_store(&v->slot->wait_ns, v->credit.wait_ns);
    grant_now(v, GRANT_RUN);
    v->granted_ns = now_of(d);
    v->revoked = v->woken = false;
    v->brief_until_ns = 0;
    d->turns++;
}

// The next thread is awake already. If Linux ran that one first, it would go back to the last one
// a moment later, only for that to go to sleep: two switches more. Who did not obey once has no
// such trust again.
static enum sched_policy leaver_policy(const struct sched_daemon *d, const struct sched_vcpu *v)
{
    return d->config.no_boost || v->vm->offences ? SCHED_POLICY_PLAIN : SCHED_POLICY_LEAVING;
}

static void turn_end(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    bool blocked = v->credit.state == CREDIT_BLOCKED;
    grant(v, blocked ? GRANT_WAIT : GRANT_QUEUED);
    v->loose_cpu_ns = v->charged_ns;
    v->loose_since_ns = now;
    v->woken = false;
    if (blocked && v->watch.asleep)
        return;
    if (!blocked) {
        policy(v, leaver_policy(d, v)); // it used up its turn: not one that sleeps mostly
        sched_watch_listen(&v->watch, WAKES_NEVER); // from now on it sleeps because it obeys
    }
    v->revoked = true;
    kick(d, v);
}

static struct sched_vcpu *vcpu_of(struct credit_vcpu *credit)
{
    return credit ? container_of(credit, struct sched_vcpu, credit) : NULL;
}

static void apply(struct sched_daemon *d, uint64_t now)
{
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        struct sched_vcpu *old = d->holder[p], *new = vcpu_of(d->credit.pcpus[p].current);
        if (old == new)
            continue;
        d->holder[p] = NULL;
        if (old && old->credit.state != CREDIT_RUNNING)
            turn_end(d, old, now);
    }
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        struct sched_vcpu *new = vcpu_of(d->credit.pcpus[p].current);
        // Also one that lost its turn and has it again: it fell asleep, and was awake before we had
        // done with that.
        if (new && (d->holder[p] != new || new->grant != GRANT_RUN))
            turn_begin(d, new, p);
        d->holder[p] = new;
    }
}

// Those that woke and got no turn go to sleep in their futex.
static void restrain(struct sched_daemon *d, uint64_t now)
{
    for (struct sched_vm *vm = d->vms; vm; vm = vm->next) {
        for (unsigned i = 0; i < vm->nr; i++) {
            struct sched_vcpu *v = &vm->vcpus[i];
            if (!v->woken)
                continue;
            v->woken = false;
            if (v->credit.state == CREDIT_RUNNING)
                continue;
            if (v->credit.state != CREDIT_BLOCKED)
                grant(v, GRANT_QUEUED);
            if (v->watch.asleep || atomic_load(&v->slot->want) == WANT_TURN)
                continue;
            v->revoked = true;
            v->loose_cpu_ns = v->charged_ns;
            v->loose_since_ns = now;
            kick(d, v);
        }
    }
}

static void charge_running(struct sched_daemon *d, uint64_t now)
{
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        struct sched_vcpu *v = vcpu_of(d->credit.pcpus[p].current);
        if (!v)
            continue;
        sched_watch_read(&v->watch, now);
        charge(d, v, now);
    }
}

// True when a pCPU was due. Those that soon will be are looked at as well: each time that the
// daemon wakes it takes a pCPU from a vCPU.
static bool decide(struct sched_daemon *d, uint64_t now)
{
    bool due = false;
    if (credit_next(&d->credit, 0) <= now) {
        charge_running(d, now);
        credit_timer(&d->credit, now);
    }
    credit_kicks(&d->credit); // each pCPU is looked at anyway
    const uint64_t early = least(EARLY_NS, d->credit.params.slice_ns / EARLY_PART);
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        if (d->credit.pcpus[p].until_ns > now + early)
            continue;
        due |= d->credit.pcpus[p].until_ns <= now;
        struct sched_vcpu *v = vcpu_of(d->credit.pcpus[p].current);
        if (v)
            vcpu_look(d, v, now);
        credit_pick(&d->credit, p, now);
    }
    return due;
}

// Somebody runs, or could: then time matters.
static bool anybody_awake(const struct sched_daemon *d)
{
    for (const struct sched_vm *vm = d->vms; vm; vm = vm->next)
        for (unsigned i = 0; i < vm->nr; i++)
            if (vm->vcpus[i].present && vm->vcpus[i].credit.state != CREDIT_BLOCKED)
                return true;
    return false;
}

static bool anybody_polled(const struct sched_daemon *d)
{
    for (const struct sched_vm *vm = d->vms; vm; vm = vm->next)
        for (unsigned i = 0; i < vm->nr; i++)
            if (vm->quiet || (vm->vcpus[i].present && sched_watch_polls(&vm->vcpus[i].watch)))
                return true;
    return false;
}

// When something is due although nothing happens.
static uint64_t next_due(struct sched_daemon *d, uint64_t now)
{
    uint64_t at = d->brief_at_ns;
    bool awake = anybody_awake(d), polled = anybody_polled(d);
    d->poll_at_ns = polled ? least(d->poll_at_ns, now + POLL_NS) : CREDIT_NEVER;
    if (awake || polled) {
        // Turns end as often as credits are given out: once it was waited for one, the two
        // coincide.
        at = least(at, credit_next(&d->credit, d->credit.params.slice_ns));
        at = least(at, d->poll_at_ns);
    }
    if (d->vms) // an event that was missed costs so long, and not for ever
        at = least(at, d->ticked_ns + HEARTBEAT_NS);
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        const struct sched_vcpu *v = d->holder[p];
        at = least(at, d->credit.pcpus[p].until_ns);
        // One that does not come for its turn has its end: nobody wakes for that before.
        if (v && v->policy == SCHED_POLICY_BOOST && v->granted_ns + TRANSIT_NS > now)
            at = least(at, v->granted_ns + TRANSIT_NS);
    }
    return at;
}

// Those that woke for a moment and still run want a turn.
static void briefs_check(struct sched_daemon *d, uint64_t now)
{
    if (now < d->brief_at_ns)
        return;
    d->brief_at_ns = CREDIT_NEVER;
    for (struct sched_vm *vm = d->vms; vm; vm = vm->next) {
        for (unsigned i = 0; i < vm->nr; i++) {
            if (!vm->vcpus[i].brief_until_ns)
                continue;
            vcpu_look(d, &vm->vcpus[i], now);
            if (vm->vcpus[i].brief_until_ns)
                d->brief_at_ns = least(d->brief_at_ns, vm->vcpus[i].brief_until_ns);
        }
    }
}

static void transits_check(struct sched_daemon *d, uint64_t now)
{
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        struct sched_vcpu *v = d->holder[p];
        if (!v || now < v->granted_ns + TRANSIT_NS)
            continue;
        if (v->watch.asleep)
            vcpu_look(d, v, now);
        if (v->policy == SCHED_POLICY_BOOST)
            policy(v, SCHED_POLICY_PROMPT);
    }
}

void turns_settle(struct sched_daemon *d)
{
    enum { ROUNDS = 4 };
    uint64_t now = now_of(d);
    if (now >= d->poll_at_ns || now >= d->ticked_ns + d->credit.params.tick_ns)
        turns_tick(d, now);
    transits_check(d, now);
    briefs_check(d, now);
    // What is decided takes a moment, in which the next thing may be due.
    for (unsigned i = 0; i < ROUNDS && decide(d, now); i++) {
        apply(d, now);
        now = now_of(d);
    }
    apply(d, now);
    restrain(d, now);
    d->next_ns = next_due(d, now);
}

// --- the tick: whenever something is done anyway; credits are given out once a slice at least

// It has had CPU time for most of a tick although its turn was over before.
static void discipline(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    if (v->credit.state == CREDIT_RUNNING || now < v->loose_since_ns + d->credit.params.tick_ns)
        return;
    if (v->charged_ns > v->loose_cpu_ns + LOOSE_NS) {
        d->offences += !v->offender;
        v->vm->offences += !v->offender;
        if (!v->offender)
            log_limited(&d->log, &d->limit, LOG_WARN,
                        "VM %s, vCPU %u ran %llu us after its turn: from now on it has what others "
                        "leave",
                        v->vm->name, v->index,
                        (unsigned long long)(v->charged_ns - v->loose_cpu_ns) / 1000);
        v->offender = v->revoked = true;
        policy(v, SCHED_POLICY_LAST);
        if (v->credit.state != CREDIT_BLOCKED)
            kick(d, v);
    }
    v->loose_cpu_ns = v->charged_ns;
    v->loose_since_ns = now;
}

// `op` of epoll_ctl(2), for what tells of the thread; no more than looks, where nothing does.
static void vcpu_events(struct sched_daemon *d, struct sched_vcpu *v, int op)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = &v->source};
    if (sched_watch_polls(&v->watch))
        return;
    epoll_ctl(d->epoll_fd, op, v->watch.out.fd, &ev);
    epoll_ctl(d->epoll_fd, op, v->watch.in.fd, &ev);
}

void vm_unlisten(struct sched_daemon *d, struct sched_vm *vm)
{
    vm->quiet = true;
    epoll_ctl(d->epoll_fd, EPOLL_CTL_DEL, vm->bell, NULL);
    for (unsigned i = 0; i < vm->nr; i++)
        vcpu_events(d, &vm->vcpus[i], EPOLL_CTL_DEL);
}

static void vm_listen(struct sched_daemon *d, struct sched_vm *vm)
{
    vm->quiet = false;
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = &vm->source};
    epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, vm->bell, &ev);
    for (unsigned i = 0; i < vm->nr; i++)
        if (vm->vcpus[i].present)
            vcpu_events(d, &vm->vcpus[i], EPOLL_CTL_ADD);
}

void turns_tick(struct sched_daemon *d, uint64_t now)
{
    bool tick = now >= d->ticked_ns + d->credit.params.tick_ns;
    d->poll_at_ns = CREDIT_NEVER;
    if (tick)
        d->ticked_ns = now;
    for (struct sched_vm *vm = d->vms; vm; vm = vm->next) {
        if (tick) {
            vm->events = 0;
            if (vm->quiet)
                vm_listen(d, vm);
        }
        for (unsigned i = 0; i < vm->nr; i++) {
            if (tick || vm->quiet || sched_watch_polls(&vm->vcpus[i].watch))
                vcpu_look(d, &vm->vcpus[i], now);
            if (tick && vm->vcpus[i].present)
                discipline(d, &vm->vcpus[i], now);
        }
    }
}

// --- coming and going

int vcpu_join(struct sched_daemon *d, struct sched_vcpu *v, pid_t tid, struct error *err)
{
    enum { PIDFD_OF_THREAD = 0200 }; // PIDFD_THREAD, Linux 6.9
    v->pidfd = -1;
    int ret = sched_watch_open(&v->watch, v->vm->pid, tid, !d->config.no_records, err);
    if (ret)
        return ret;
    v->cpu = -1;
    v->source = (struct source) {SOURCE_VCPU, v};
    v->slot = &v->vm->page->slots[v->index];
    v->pidfd = (int)syscall(SYS_pidfd_open, tid, PIDFD_OF_THREAD);
    if (syscall(SYS_tgkill, v->vm->pid, tid, 0))
        return error_errno(err, "thread %d of process %d: this scheduler may not signal it",
                           (int)tid, (int)v->vm->pid);
    v->policy = SCHED_POLICY_PLAIN;
    return 0;
}

void vcpu_begin(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now)
{
    v->present = true;
    sched_watch_read(&v->watch, now); // what it had before it was told is not charged
    v->charged_ns = v->loose_cpu_ns = sched_watch_cpu(&v->watch, now);
    v->loose_since_ns = now;
    grant(v, GRANT_WAIT);
    credit_vcpu_add(&d->credit, &v->vm->credit, &v->credit, v->index, now);
    vcpu_events(d, v, EPOLL_CTL_ADD);
    if (v->watch.asleep)
        sched_watch_listen(&v->watch, WAKES_OUT_IN);
    vcpu_look(d, v, now);
}

// The thread may live on: then freely.
void vcpu_leave(struct sched_daemon *d, struct sched_vcpu *v)
{
    if (v->present) {
        for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++)
            if (d->holder[p] == v)
                d->holder[p] = NULL;
        credit_vcpu_remove(&d->credit, &v->credit, now_of(d));
        grant_now(v, GRANT_FREE);
    }
    v->present = v->woken = false;
    sched_watch_close(&v->watch);
    if (v->pidfd >= 0)
        close(v->pidfd);
    v->pidfd = -1;
}
