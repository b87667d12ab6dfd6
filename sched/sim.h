// SPDX-License-Identifier: Apache-2.0
// A host on virtual time: vCPUs that compute, sleep and wake, scheduled by credit.c. Deterministic:
// the same workload and seed give the same run, to the nanosecond.
#pragma once

#include "sched/credit.h"

enum { SIM_NAME_MAX = 32, SIM_VMS_MAX = 500, SIM_VCPUS_MAX = 500, SIM_HISTOGRAM = 1024 };

enum sim_behaviour {
    SIM_HOG,      // never blocks
    SIM_PERIODIC, // wakes every period_ns, computes run_ns, blocks
    SIM_BURST,    // as SIM_PERIODIC, both times uniformly random between half and 1.5 times
};

// The schedulers of textbooks, as settings of one.
enum sim_scheduler {
    SIM_FAIR,         // every VM the same share, whatever its weight; no priorities, no caps
    SIM_PROPORTIONAL, // by weight; no priorities, no caps
    SIM_CREDIT,       // by weight, with BOOST for those that wake; no caps: work-conserving
    SIM_CREDIT_CAP,   // ... with caps: not work-conserving for capped VMs
    SIM_SCHEDULERS,
};

struct sim_vm_config {
    char name[SIM_NAME_MAX];
    struct credit_vm_config credit;
    unsigned nr_vcpus;
    enum sim_behaviour behaviour;
    uint64_t period_ns, run_ns;
    uint64_t start_ns, end_ns; // it wants to run in between; end_ns 0: to the end
};

struct sim_config {
    struct credit_params params; // modes are those of the scheduler, set by sim_create
    enum sim_scheduler scheduler;
    uint64_t duration_ns;
    uint64_t switch_ns; // pCPU time that each switch costs; nobody's
    uint64_t seed;
    unsigned nr_vms;
    struct sim_vm_config *vms;
    const unsigned *order; // in which they are added (their ids are their places in vms); or NULL
};

struct sim_histogram {
    uint64_t nr, most_ns;
    uint32_t slot[SIM_HISTOGRAM];
};

struct sim_vcpu {
    struct credit_vcpu credit;
    struct sim_vm *vm;
    uint64_t need_ns;    // CPU time until it blocks
    uint64_t charged_ns; // charged up to this time (of the present run)
    uint64_t woke_ns;    // waits since then for its first run since a wake-up, or CREDIT_NEVER
    uint64_t due_ns;     // of its next wake-up, or the last
    uint64_t random;
};

struct sim_vm {
    const struct sim_vm_config *config;
    struct credit_vm credit;
    struct sim_vcpu *vcpus;
    struct sim_histogram waits; // from wake-up to running
    double ideal;               // pCPUs that are its due, see sim_ideal
};

struct sim {
    struct sim_config config;
    struct credit credit;
    uint64_t now;
    struct sim_vm *vms;
    struct sim_vcpu *vcpus;
    unsigned nr_vcpus;
    struct sim_vcpu **sleepers; // a heap by due_ns
    unsigned nr_sleepers;
    void (*check)(struct sim *sim, void *arg); // called after each event; may be NULL
    void *check_arg;
};

// Takes no ownership of config->vms, which must stay. -EINVAL with the reason, -ENOMEM.
int sim_create(struct sim *sim, const struct sim_config *config, struct error *err);
void sim_destroy(struct sim *sim);

// Goes on to time `until` (ns since the start); wakes, runs and blocks as the workload says.
void sim_run(struct sim *sim, uint64_t until);

// What each VM would get of an ideal scheduler by the weights and caps that were asked for,
// whatever `scheduler` makes of them: sets `ideal` of each. VMs that start or end on the way count
// as if they were there all the time; affinity is not looked at.
void sim_ideal(struct sim *sim);

// Of the time since the start.
double sim_share(const struct sim *sim, const struct sim_vm *vm); // pCPUs used
double sim_jain(const struct sim *sim);                           // of share / ideal: 1 is best
uint64_t sim_percentile(const struct sim_histogram *h, double percent);

const char *sim_scheduler_name(enum sim_scheduler scheduler);
const char *sim_placement_name(enum credit_placement placement);
int sim_placement_parse(const char *name, enum credit_placement *placement, struct error *err);
int sim_scheduler_parse(const char *name, enum sim_scheduler *scheduler, struct error *err);
