// SPDX-License-Identifier: Apache-2.0
// A VM's side of the scheduler: registers threads with the daemon and lets each run only in its
// turn. While there is no daemon, all run freely.
//
// The threads it schedules must handle `signal` by looking at sched_client_take again soon: for a
// vCPU, the handler sets kvm_run->immediate_exit, so that a signal that comes just before KVM_RUN
// is not lost.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "sched/proto.h"
#include "vmm/error.h"
#include "vmm/seccomp.h"

struct sched_client;

struct sched_client_config {
    const char *socket; // path of the daemon's
    const char *name;   // the VM's, unique among the daemon's VMs of this user
    struct sched_share share;
    unsigned nr; // threads, 1 to SCHED_VCPUS_MAX
    const pid_t *tids;
    int signal;
    int broker;                // of sched/broker.h: connections come from there; -1: from `socket`
    enum seccomp_mode seccomp; // of the watching thread; SECCOMP_OFF unless set
    // The daemon was found (0) or lost (-errno, `why`). In the client's own thread, or in attach.
    void (*changed)(void *arg, int code, const char *why);
    void *arg;
};

// Copies what it needs of `config`. No daemon is asked yet.
int sched_client_create(struct sched_client **client, const struct sched_client_config *config,
                        struct error *err);
// Registers now: -ECONNREFUSED, -ENOENT: no daemon; -EINVAL and others: what it said.
int sched_client_attach(struct sched_client *client, struct error *err);
// From now on a thread of its own notices the daemon's end, and attaches to the next one.
int sched_client_watch(struct sched_client *client, struct error *err);
// Lets the threads run freely; they may still be in take. Then the memory goes.
void sched_client_detach(struct sched_client *client);
void sched_client_destroy(struct sched_client *client); // the threads are gone; NULL is fine
bool sched_client_attached(const struct sched_client *client);

// In thread `i`: whether it may run now. Waits for its turn while *look is 0, which the signal's
// handler changes; false when it has, or a signal came.
bool sched_client_take(struct sched_client *client, unsigned i, const uint32_t *look);
// In thread `i`: whether take would return true at once.
bool sched_client_may(const struct sched_client *client, unsigned i);
// In thread `i`: it does not want to run until it calls take again.
void sched_client_give(struct sched_client *client, unsigned i);
// In thread `i`: how long it has waited for turns since it last asked, ns.
uint64_t sched_client_waited(struct sched_client *client, unsigned i);

// New weight, cap or affinity; also for daemons to come. Any thread.
int sched_client_set(struct sched_client *client, const struct sched_share *share,
                     struct error *err);
void sched_client_share(struct sched_client *client, struct sched_share *share);

// --- without a VM, for commands

// Sends one message and takes the answer, which is of `type` or an error (err says what the daemon
// said). `fd`: of a DOCUMENT, the caller's then.
int sched_call(const char *socket, const void *msg, size_t size, enum sched_msg_type type, int *fd,
               struct error *err);

// A connection that may register VMs of whoever sends on it, and set their shares. The descriptor,
// or -errno.
int sched_connect_confined(const char *socket, struct error *err);

// --- both sides

size_t sched_msg_size(enum sched_msg_type type); // 0: no such type
// Text of an option: weight "1...65535"; cap in percent; affinity "0-3,8" (hard), "soft:0-3" or
// both with a '/' between them.
int sched_weight_parse(const char *text, struct sched_share *share, struct error *err);
int sched_cap_parse(const char *text, struct sched_share *share, struct error *err);
int sched_affinity_parse(const char *text, struct sched_share *share, struct error *err);
// "weight", "cap" or "affinity".
int sched_share_parse(const char *key, const char *text, struct sched_share *share,
                      struct error *err);
int sched_share_check(const struct sched_share *share, struct error *err);
// `text` takes SCHED_TEXT_MAX bytes. "all" for an empty mask.
const char *sched_mask_text(const struct sched_mask *mask, char *text);
void sched_share_merge(struct sched_share *into, const struct sched_share *from);
