// SPDX-License-Identifier: Apache-2.0
// Between daemon.c (the loop), daemon_conns.c (what is said), daemon_vms.c (whose shares), turns.c
// (who runs) and report.c (what is told).
#pragma once

#include <jansson.h>

#include "sched/daemon.h"
#include "sched/policy.h"
#include "sched/record.h"
#include "sched/watch.h"
#include "vmm/util.h"

enum {
    VMS_MAX = 1024,
    TRACE_EVENTS = 65536,
    TRACE_NAMES = 512,
    EVENTS_PER_VCPU = 256,    // in one tick; more are seen by looking every POLL_NS
    POLL_NS = 1000000,        // also where the kernel's records cannot be had
    BRIEF_NS = 500000,        // that a vCPU with credit runs after it woke before it needs a turn
    TRANSIT_NS = 1000000,     // from a turn's beginning until the thread must have begun
    HEARTBEAT_NS = 100000000, // everybody is looked at so often, whatever events say
    EARLY_NS = 500000,        // what is due by then is done with what is due now ...
    EARLY_PART = 20,          // ... if it is no more than that part of a slice
    LOOSE_NS = 2000000,       // CPU time without a turn, per tick, that is taken for disobedience
};

// What an epoll event is about.
enum source_kind { SOURCE_LISTEN, SOURCE_STOP, SOURCE_CONN, SOURCE_BELL, SOURCE_VCPU };
struct source {
    enum source_kind kind;
    void *owner;
};

struct sched_vm;

struct sched_vcpu {
    struct credit_vcpu credit;
    struct sched_vm *vm;
    unsigned index;
    bool present; // its thread lives
    struct sched_watch watch;
    struct source source;
    struct sched_slot *slot;
    enum sched_grant grant; // slot->grant; that one the VM may write to, too
    int pidfd;              // of the thread, -1 where the kernel has none
    int cpu;                // host CPU it is bound to, -1: none yet
    bool woken;             // since the last settling: must run or be told to wait
    bool stuck;             // got a turn and did not come: until it has had CPU time
    bool revoked, offender;
    enum sched_policy policy;
    uint64_t stuck_cpu_ns;
    uint64_t charged_ns;                   // CPU time charged so far
    uint64_t brief_until_ns;               // 0: does not run without a turn for a moment
    uint64_t briefs;                       // how often it did
    uint64_t granted_ns;                   // beginning of its turn
    uint64_t loose_cpu_ns, loose_since_ns; // when it last lost its turn, and CPU time by then
};

struct sched_vm {
    struct credit_vm credit;
    struct sched_vm *next;
    struct sched_daemon *daemon;
    struct conn *conn;
    char name[SCHED_NAME_MAX];
    pid_t pid;
    uid_t uid;
    int signal;
    uint32_t id;
    struct sched_share share;
    struct sched_page *page;
    int bell;
    struct source source;
    unsigned nr;
    bool begun;      // its threads take turns
    unsigned events; // in this tick
    bool quiet;      // too many: looked at, not listened to
    uint64_t offences;
    struct sched_vcpu vcpus[SCHED_VCPUS_MAX];
};

struct conn {
    struct conn *next;
    struct source source;
    int fd;
    pid_t peer_pid; // who connected
    uid_t peer_uid;
    pid_t pid; // whose message is looked at, and with whose rights
    uid_t uid;
    struct sched_vm *vm;
    bool confined; // SCHED_CONFINE
    bool dead;
};

struct sched_daemon {
    struct sched_daemon_config config;
    struct credit credit;
    struct log log;
    struct log_limit limit;
    char socket[108];
    int cpus[CREDIT_PCPUS_MAX]; // host's number of each pCPU
    struct sched_vcpu *holder[CREDIT_PCPUS_MAX];
    struct sched_vm *vms;
    struct conn *conns;
    unsigned nr_vms, nr_conns;
    uint32_t next_id;
    int epoll_fd, listen_fd, stop_fd;
    int anchor_fd; // sched_watch_anchor
    struct source listen_source, stop_source;
    uint64_t ticked_ns, poll_at_ns, brief_at_ns;
    uint64_t next_ns;  // the next deadline; CREDIT_NEVER: none
    bool swept;        // dead connections are to be freed
    unsigned requests; // in this window
    uint64_t window_ns;
    // Counters, for people.
    uint64_t loops, turns, kicks, offences, start_ns, busy_ns;
    struct record_log trace;                    // the newest TRACE_EVENTS
    struct sched_trace_name names[TRACE_NAMES]; // by id % TRACE_NAMES
};

static inline uint64_t now_of(const struct sched_daemon *d)
{
    return d->config.clock ? d->config.clock() : time_ns();
}

// daemon.c
// Waits for an event or the next deadline, and does what is due: 0; 1 when it was told to stop.
int daemon_turn(struct sched_daemon *d, struct error *err);

// daemon_conns.c
void conns_accept(struct sched_daemon *d);
void conn_ready(struct sched_daemon *d, struct conn *conn);
void conns_sweep(struct sched_daemon *d); // frees the dead ones, when no event refers to them
void conn_send(struct sched_daemon *d, struct conn *conn, const void *msg, size_t size,
               const int *fds, unsigned nr);

// daemon_vms.c
// Answers by itself; an error is the caller's to answer.
int vm_register(struct sched_daemon *d, struct conn *conn, struct sched_register *reg,
                struct error *err);
int vm_set(struct sched_daemon *d, struct conn *conn, const struct sched_set *msg,
           struct error *err);
void vm_remove(struct sched_daemon *d, struct sched_vm *vm);

// turns.c
void vm_unlisten(struct sched_daemon *d, struct sched_vm *vm); // until the next tick
int vcpu_join(struct sched_daemon *d, struct sched_vcpu *v, pid_t tid, struct error *err);
void vcpu_begin(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now);
void vcpu_leave(struct sched_daemon *d, struct sched_vcpu *v);
void vcpu_look(struct sched_daemon *d, struct sched_vcpu *v, uint64_t now);
void turns_settle(struct sched_daemon *d); // decides, grants, revokes; next_ns
void turns_tick(struct sched_daemon *d, uint64_t now);

// report.c
void trace_hear(void *arg, const struct credit_event *event);
void trace_name_set(struct sched_daemon *d, const struct sched_vm *vm);
json_t *report_status(struct sched_daemon *d, uid_t uid);
int report_trace(struct sched_daemon *d, uid_t uid, uint32_t last_ms, int fd); // 0 or -errno
struct sched_mask report_mask(const struct sched_daemon *d, uint64_t pcpus);
