// SPDX-License-Identifier: Apache-2.0
// The credit scheduler's accounting and queues, and nothing else: no clock, no thread, no system
// call, no allocation. Time comes in as an argument (nanoseconds of any clock that never goes
// back), memory is the caller's. The daemon (`ferry sched daemon`) drives it with real vCPU
// threads, the simulator (`ferry sched sim`) with virtual time. docs/scheduler.md explains it.
//
// A credit is 100 us of CPU time. Inside, credits are kept as nanoseconds (CREDIT_NS each), so that
// nothing is rounded when they are burned. With the default slice of 30 ms, one pCPU earns
// 300 credits per slice.
//
// A driver's loop, for one host:
//   - a vCPU becomes runnable: credit_wake; it blocks: credit_block; it gives way: credit_yield;
//   - at pcpu->until_ns of a pCPU, or when it has just lost its vCPU: charge the vCPU that runs
//     there (credit_charge), then credit_pick. The answer may be the same vCPU, for longer;
//   - at credit_next: charge all vCPUs that run, then credit_timer;
//   - after any call: credit_kicks; each pCPU named there has a new until_ns (maybe already past).
//
// Threads: none of this locks. Everything of one `struct credit` belongs to one thread at a time.
// Order: decisions follow from the calls and their times; the order in which VMs and vCPUs were
// added changes nothing.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"

enum {
    CREDIT_PCPUS_MAX = 64, // a set of pCPUs is a uint64_t: bit p is pCPU p
    CREDIT_NS = 100000,    // one credit: 10 per ms
    CREDIT_WEIGHT_MIN = 1,
    CREDIT_WEIGHT_MAX = 65535,
    CREDIT_WEIGHT_DEFAULT = 256,
    CREDIT_CAP_MAX = 100 * CREDIT_PCPUS_MAX, // percent of one pCPU
    CREDIT_SLICE_MIN_MS = 1,
    CREDIT_SLICE_MAX_MS = 1000,
    CREDIT_CAP_WINDOW = 100,  // periods in which a VM may make up for budget it could not use
    CREDIT_REFILL_SLOTS = 10, // VMs' budgets are refilled at different times of the period
};

#define CREDIT_NEVER    UINT64_MAX // a time that does not come
#define CREDIT_ANY_PCPU UINT64_MAX // an affinity that allows all

// Smaller is better. A vCPU waits in the list of its class, first come first served.
enum credit_class {
    CREDIT_BOOST, // woke with credit left: runs next, for one tick of CPU time per slice at most
    CREDIT_UNDER, // has credit
    CREDIT_OVER,  // has used more than its share
    CREDIT_CLASSES,
};

enum credit_state {
    CREDIT_BLOCKED,
    CREDIT_QUEUED,  // runnable, waits at `pcpu`
    CREDIT_RUNNING, // holds pCPU `pcpu`
    CREDIT_PARKED,  // runnable, but its VM's cap is used up: back when the budget is
};

enum credit_placement {
    CREDIT_BY_LENGTH, // a vCPU that wakes goes where the fewest vCPUs are
    CREDIT_BY_WEIGHT, // ... where the vCPUs' weights add up to the least
};

struct credit_list {
    struct credit_list *next, *prev;
};

struct credit_event;

struct credit_params {
    unsigned nr_pcpus;               // 1...64
    uint8_t node[CREDIT_PCPUS_MAX];  // NUMA node of each pCPU, below 64
    uint64_t slice_ns;               // a vCPU runs that long; credits are given out as often. 30 ms
    uint64_t tick_ns;                // credit used up is noticed by then; a BOOST lasts it. 10 ms
    uint64_t ratelimit_ns;           // nobody is preempted sooner (= slice: not preemptive). 1 ms
    uint64_t cap_period_ns;          // budgets of caps are refilled that often. 10 ms
    enum credit_placement placement; // by length
    bool no_boost;                   // a wake-up gives no priority
    bool no_caps;                    // caps are ignored: always work-conserving
    bool weight_per_vm;              // a weight is a VM's, not each of its vCPUs'
    bool no_balance;                 // siblings may queue at one pCPU although another has none

    // Hears everything that happens; NULL: nobody. Must not call back into the scheduler.
    void (*trace)(void *arg, const struct credit_event *event);
    void *trace_arg;
};

struct credit_vm_config {
    unsigned weight; // 1...65535
    unsigned cap;    // percent of one pCPU, all vCPUs together; 0: none
    uint64_t hard;   // pCPUs its vCPUs may run on; never empty within the host
    uint64_t soft;   // pCPUs they should run on if they can; 0 is the same as all
};

struct credit_vm {
    struct credit_vm_config config;
    uint32_t id;               // the caller's name for it in events; unique
    struct credit_list link;   // all VMs
    struct credit_list vcpus;  // credit_vcpu.sibling
    struct credit_list refill; // those whose budget is refilled at the same time
    unsigned nr_vcpus, nr_active;
    uint16_t here[CREDIT_PCPUS_MAX];     // how many of its vCPUs run or wait at each pCPU
    uint64_t at;                         // the pCPUs where that is not 0
    int64_t budget_ns;                   // of the cap: left in this period and not handed out
    int64_t handed_ns;                   // ... handed to its vCPUs: the sum of their quota_ns
    uint64_t used_ns;                    // since the last refill
    uint32_t used_us[CREDIT_CAP_WINDOW]; // in each of the last periods, rounded up
    uint64_t window_us;                  // their sum
    unsigned window_at;                  // the oldest
    unsigned nr_runnable;                // vCPUs that are not blocked
    struct credit_list parked;           // credit_vcpu.link
    uint64_t run_ns;                     // CPU time charged, in all

    // Of one accounting: what it may be given at most, what it is given; whether it has come to the
    // first, and whether the second is final.
    int64_t room_ns, given_ns;
    bool full, settled;
};

struct credit_vcpu {
    struct credit_vm *vm;
    uint32_t id; // within the VM; unique there
    enum credit_state state;
    enum credit_class class;
    uint8_t pcpu;      // where it runs, waits, or ran last
    bool active;       // gets credit
    bool slept;        // was blocked at some time since the last accounting
    bool pressing;     // waits for its turn of a refilled budget
    bool yielded;      // the next pick passes over it once
    int64_t credit_ns; // may be negative
    int64_t was_ns;    // its credit just before the last accounting
    uint64_t boost_ns; // CPU time used as BOOST since the last accounting
    uint64_t quota_ns; // of its VM's budget: handed to it and not yet used
    uint64_t since_ns; // when `state` began
    uint64_t start_ns; // since when it runs without a break
    uint64_t left_ns;  // of its slice, at start_ns
    int64_t room_ns;   // of one accounting: what it may be given at most
    bool full;         // ... and is
    uint64_t ran_ns;   // when it last ran (to tell a warm cache)
    struct credit_list link, sibling;

    // Counters, never reset.
    uint64_t run_ns;  // CPU time charged
    uint64_t wait_ns; // runnable but not running (queued or parked), up to the last change
    uint64_t park_ns; // ... of it parked
    uint64_t wakes, switches, migrations, boosts;
};

struct credit_pcpu {
    struct credit_vcpu *current; // NULL: idle
    uint64_t until_ns;           // credit_pick is due then; CREDIT_NEVER when idle
    struct credit_list queue[CREDIT_CLASSES];
    unsigned nr_queued[CREDIT_CLASSES];
    uint64_t weight;  // of all vCPUs that run or wait here
    uint64_t idle_ns; // up to the last change
    uint64_t idle_since_ns;
};

// Where credits came from and went, in ns: the sum of all vCPUs' credits is
// given - burned - returned.
struct credit_ledger {
    int64_t given, burned, returned;
};

struct credit {
    struct credit_params params;
    struct credit_pcpu pcpus[CREDIT_PCPUS_MAX];
    uint64_t online;                  // all pCPUs
    uint64_t idle;                    // pCPUs that run nothing
    uint64_t running[CREDIT_CLASSES]; // pCPUs that run one of that class
    uint64_t waiting[CREDIT_CLASSES]; // pCPUs where one of that class waits
    uint64_t nodes[CREDIT_PCPUS_MAX]; // pCPUs of each NUMA node
    uint64_t called;                  // idle pCPUs that will look for work already
    uint64_t kicks;
    struct credit_list vms;
    unsigned nr_vms, nr_vcpus, nr_capped;
    uint64_t accounted_ns, account_at_ns; // last and next accounting
    uint64_t refill_at_ns;                // next refill of some caps' budgets ...
    unsigned refill_slot;                 // ... of these
    struct credit_list refills[CREDIT_REFILL_SLOTS];
    uint64_t idle_ns;          // of all pCPUs, up to the last accounting
    int64_t accounted_burn_ns; // ledger.burned then
    struct credit_ledger ledger;
    uint64_t accountings;
};

enum credit_event_kind {
    CREDIT_EV_RUN,     // begins to run at `pcpu`
    CREDIT_EV_STOP,    // no longer runs at `pcpu`: `state` says what it does now
    CREDIT_EV_WAKE,    // became runnable
    CREDIT_EV_BLOCK,   // blocked
    CREDIT_EV_YIELD,   // gave way
    CREDIT_EV_PARK,    // its VM's cap is used up
    CREDIT_EV_UNPARK,  // ... is filled again
    CREDIT_EV_MIGRATE, // is to run or wait at `pcpu`, having been at `from`
    CREDIT_EV_CREDIT,  // `credit_ns` was changed by an accounting
};

struct credit_event {
    enum credit_event_kind kind;
    uint64_t at_ns;
    const struct credit_vm *vm;
    const struct credit_vcpu *vcpu; // as it is now
    uint8_t pcpu, from;
};

// 30 ms, 10 ms, 1 ms, 10 ms, by length; one NUMA node.
struct credit_params credit_params_default(unsigned nr_pcpus);

// -EINVAL (with what was wrong) for a host that cannot be. `c` needs no clean-up.
int credit_init(struct credit *c, const struct credit_params *params, uint64_t now,
                struct error *err);
// Other times, placement or modes for a running host; nr_pcpus and node must not change.
int credit_params_set(struct credit *c, const struct credit_params *params, uint64_t now,
                      struct error *err);

// -EINVAL: weight or cap out of range, or an affinity without a pCPU of this host.
int credit_vm_check(const struct credit *c, const struct credit_vm_config *config,
                    struct error *err);
int credit_vm_add(struct credit *c, struct credit_vm *vm, uint32_t id,
                  const struct credit_vm_config *config, struct error *err);
// In effect at once; vCPUs that are where they may no longer be move at the next kick.
int credit_vm_set(struct credit *c, struct credit_vm *vm, const struct credit_vm_config *config,
                  uint64_t now, struct error *err);
// Removes its vCPUs too; the pCPUs they ran on are idle and kicked.
void credit_vm_remove(struct credit *c, struct credit_vm *vm, uint64_t now);

// A vCPU begins blocked, without credit.
void credit_vcpu_add(struct credit *c, struct credit_vm *vm, struct credit_vcpu *vcpu, uint32_t id,
                     uint64_t now);
void credit_vcpu_remove(struct credit *c, struct credit_vcpu *vcpu, uint64_t now);

// Became runnable. A vCPU that was not blocked is left alone.
void credit_wake(struct credit *c, struct credit_vcpu *vcpu, uint64_t now);
// Blocked, whatever it was before. If it ran, its pCPU is kicked (until_ns = now).
void credit_block(struct credit *c, struct credit_vcpu *vcpu, uint64_t now);
// Lets one other vCPU of its pCPU go first, even one of a worse class. Only if it runs.
void credit_yield(struct credit *c, struct credit_vcpu *vcpu, uint64_t now);
// It used `used_ns` of CPU time since the last charge: burns its credit and its VM's budget. Also
// right for a vCPU that ran without holding a pCPU.
void credit_charge(struct credit *c, struct credit_vcpu *vcpu, uint64_t used_ns, uint64_t now);

// Decides who runs on `pcpu` from now on: the vCPU, or NULL for none. It holds the pCPU until
// until_ns of it, at which the driver asks again. Constant time but for vCPUs it must pass over
// (because of affinity) and one bit operation per pCPU.
struct credit_vcpu *credit_pick(struct credit *c, unsigned pcpu, uint64_t now);

// pCPUs whose until_ns came nearer, or which should look for work; reading clears the set.
uint64_t credit_kicks(struct credit *c);

// When credit_timer is due: the next accounting, or refill of budgets. An accounting gives what is
// due for the time that passed, whenever it comes; a driver with another reason to wake soon may
// have the patience to wait for that, a slice at most.
uint64_t credit_next(const struct credit *c, uint64_t patience_ns);
void credit_timer(struct credit *c, uint64_t now);

// In credits (rounded towards minus infinity), for people.
int64_t credit_of(const struct credit_vcpu *vcpu);
const char *credit_class_name(enum credit_class class);
const char *credit_state_name(enum credit_state state);
const char *credit_event_name(enum credit_event_kind kind);
