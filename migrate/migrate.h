// SPDX-License-Identifier: Apache-2.0
// Live migration as callers see it: move a guest out, take one in, watch and steer it.
// docs/migration.md tells the story; migrate/owner.h has the rule who may run the guest.
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "migrate/channel.h"
#include "migrate/history.h"
#include "migrate/owner.h"
#include "migrate/pack.h"
#include "migrate/prepage.h"
#include "migrate/wire.h"
#include "vmm/error.h"

struct vm;

// What migration and snapshots need from whoever builds VMs.
struct migrate_hooks {
    void *context;
    // A JSON text (malloc'd) from which create_vm builds the same VM on another host.
    int (*describe)(void *context, struct vm *vm, char **json, struct error *err);
    // Builds the VM with all its devices, not started, nothing loaded. The text is hostile.
    int (*create_vm)(void *context, const char *json, struct vm **vm, struct error *err);
    // Takes back what create_vm made, after an arrival that failed.
    void (*destroy_vm)(void *context, struct vm *vm);
    // The texts of the VM's disks, a JSON array (malloc'd); what create_vm is to use instead of its
    // own if it has none (hostile). For snapshots with disks; may be NULL.
    int (*disks)(void *context, struct vm *vm, char **texts, struct error *err);
    int (*use_disks)(void *context, const char *texts, struct error *err);
    // Destination, may be NULL: the guest is this host's now and runs (or stays paused, if it was).
    void (*arrived)(void *context, struct vm *vm);
    // Destination, may be NULL: post-copy broke off, the guest is paused (why), or goes on (NULL).
    void (*severed)(void *context, struct vm *vm, const struct error *why);
};

enum migrate_mode {
    MIGRATE_PRECOPY,
    MIGRATE_POSTCOPY, // at once
    MIGRATE_HYBRID,   // post-copy after one round of pre-copy
    MIGRATE_LOCAL,    // on the same host: memory is handed over, not copied
};

// What to do when pre-copy has done max_rounds and still does not fit the downtime limit.
enum migrate_stall {
    STALL_CONTINUE, // more rounds, until it fits or is cancelled
    STALL_CANCEL,
    STALL_SWITCH, // stop the guest for longer than the limit
    STALL_POSTCOPY,
    STALL_THROTTLE, // the guest stands still for a share of its time, more and more, until it fits
};

struct migrate_params {
    const char *to; // channel.h's addresses
    struct channel_security security;
    enum migrate_mode mode;
    uint64_t downtime_ns; // limit
    uint64_t bandwidth;   // bytes/s, 0 = as fast as it goes
    uint32_t max_rounds;
    enum migrate_stall on_stall;
    enum prepage_kind prepaging;       // post-copy: what is sent before it is asked for
    enum pack_when compress;           // pre-copy
    unsigned connections;              // pre-copy: over so many, 1 to WIRE_STREAMS_MAX
    uint64_t delta_cache;              // bytes of copies for what changes only a little; 0 = none
    bool disks;                        // images of this host go with the guest
    uint64_t balloon;                  // bytes the guest may be made to give up; 0 = none
    bool keep_history;                 // in struct migration, for the reply
    unsigned handshake_ms, idle_ms;    // time-outs
    unsigned ask_ms;                   // how long to ask a destination that did not answer COMMIT
    const struct migrate_hooks *hooks; // only `describe` is used
};
void migrate_params_default(struct migrate_params *params);

enum migrate_phase {
    MIGRATE_IDLE,
    MIGRATE_CONNECTING,
    MIGRATE_DISKS, // that go with the guest, before its memory
    MIGRATE_ROUNDS,
    MIGRATE_SWITCHING, // guest paused
    MIGRATE_PUSHING,   // post-copy: guest runs on the destination
    MIGRATE_ASKING,    // COMMIT was not answered
    MIGRATE_DONE,
    MIGRATE_FAILED,
};
const char *migrate_phase_name(enum migrate_phase phase);
const char *migrate_mode_name(enum migrate_mode mode);
int migrate_mode_parse(const char *text, enum migrate_mode *mode, struct error *err);
// "auto" (as much as it has to spare), "off" or a size.
int migrate_balloon_parse(const char *text, uint64_t *most, struct error *err);
int migrate_stall_parse(const char *text, enum migrate_stall *stall, struct error *err);

// The parts of the downtime as the source's clock sees them, ns; load is the destination's figure.
struct migrate_downtime {
    uint64_t stop, save, last_pages, transfer, load, resume;
    // From the moment before pausing to RUNNING received: half a round trip too much.
    uint64_t total;
};

struct migrate_report {
    uint8_t id[WIRE_ID_LEN];
    enum migrate_mode mode; // what it became: a stalled pre-copy may end as MIGRATE_HYBRID
    uint32_t rounds;
    uint64_t data_pages, zero_pages;     // sent
    uint64_t free_pages;                 // part of zero_pages: the guest said it does not need them
    uint64_t balloon_bytes, balloon_ns;  // most taken from the guest; wait before the first round
    uint64_t lz4_pages, lz4_bytes;       // part of data_pages, and what became of them
    uint64_t delta_pages, delta_bytes;   // the same for pages sent as changes
    uint64_t pushed_pages, demand_pages; // post-copy, part of data_pages
    uint64_t discarded_pages;            // post-copy: stale at the destination when it started
    uint64_t faults, requests;           // post-copy, the destination's figures
    struct wire_faults latency;          // of the requests, the destination's figures
    unsigned throttle;                   // percent, at the end
    uint32_t connections;                // that carried pre-copy's pages
    uint32_t recoveries;                 // of a post-copy whose link broke
    uint64_t state_bytes, wire_bytes;
    uint64_t disk_bytes, disk_zero_bytes; // of disks that went with it
    uint32_t disk_passes;
    uint64_t pushed_blocks, demand_blocks; // of 64 KiB, after the guest
    uint32_t disks_kept; // that the destination had, and of which only changes were sent
    uint64_t total_ns;
    uint64_t postcopy_ns; // from RUNNING to COMPLETE
    struct migrate_downtime downtime;
    enum owner_source owner; // who owns the guest now, seen from the source
};

struct migrate_progress {
    enum migrate_phase phase;
    uint32_t round;
    uint64_t total_bytes;          // guest memory
    uint64_t sent_bytes;           // page data
    uint64_t round_bytes;          // what this round, or post-copy, began with
    uint64_t remaining_bytes;      // of it
    uint64_t dirty_bytes;          // written by the guest during the last round
    uint64_t dirty_rate;           // the same, bytes/s
    uint64_t bandwidth;            // bytes/s, now
    uint64_t expected_downtime_ns; // UINT64_MAX = not known
    uint64_t disk_bytes;           // of disks that go with it
    uint64_t disk_sent_bytes;      // of their data
    uint64_t balloon_bytes;        // taken from the guest, not to be sent
    unsigned throttle;             // percent of its time the guest stands still
    uint64_t time_left_ns;         // until everything is sent if the guest goes on like this, same
};

// A migration under way, for whoever watches and steers it from another thread.
struct migration {
    pthread_mutex_t lock; // guards progress
    struct migrate_progress progress;
    atomic_bool cancelled, severed;
    int cancel_fd;              // eventfd, readable once cancelled
    int sever_fd;               // eventfd, readable once severed
    _Atomic uint64_t bandwidth; // live values of the parameters
    _Atomic uint64_t downtime_ns;
    // Called (if not NULL) in the migrating thread at each change of phase and each round.
    void (*on_progress)(const struct migrate_progress *progress, void *arg);
    void *on_progress_arg;
    struct history history; // kept when the caller starts it
};
int migration_init(struct migration *m, struct error *err);
void migration_free(struct migration *m);
// Any thread. Before COMMIT the guest goes on here; later it has no effect.
void migration_cancel(struct migration *m);
// Any thread. Breaks the links of a post-copy: both sides stop and keep what they have, until
// migrate_recover. -EBUSY in other phases.
int migration_sever(struct migration *m, struct error *err);
void migration_get(struct migration *m, struct migrate_progress *progress);

// Moves the guest away; blocks until it is decided, so call it in a thread of its own.
//   0: the guest is the destination's; this VM is paused and must never be resumed: the caller
//     ends it with vm_request_stop(vm, VM_STOP_MIGRATED, ...).
//   error, report->owner RUNNING: the guest goes on here (in the state it was in before).
//   error, report->owner DOUBT: COMMIT was sent and nobody could be asked what became of it; the
//     guest stays paused until migrate_force_resume.
//   error, report->owner SEVERED: the link broke during post-copy; the guest is the destination's
//     and waits there for pages; this VM stays paused with them until migrate_recover.
int migrate_out(struct vm *vm, const struct migrate_params *params, struct migration *m,
                struct migrate_report *report, struct error *err);

// Continues a post-copy that broke off (report->owner SEVERED): connects to params->to, hears what
// is missing there and sends it. Results as from migrate_out; any number of times.
int migrate_recover(struct vm *vm, const struct migrate_params *params, struct migration *m,
                    struct migrate_report *report, struct error *err);

// A human vouches that the guest does not run at the destination. -EPROTO unless owner is DOUBT.
int migrate_force_resume(struct vm *vm, struct migrate_report *report, struct error *err);
