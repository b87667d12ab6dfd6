// SPDX-License-Identifier: Apache-2.0
// Checkpoints of a guest that runs: a thread saves it whenever migrate/checkpoint_policy.h says so,
// measures what that cost the guest, and removes what is not kept.
#pragma once

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "migrate/checkpoint_policy.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/seccomp.h"

struct checkpoint_saver {
    // Saves the guest to `path`: a diff of `parent`, a file beside it, or a full one (NULL); sets
    // `made->full` to what it became. -EAGAIN: nothing to save now (paused, busy), ask again soon.
    int (*save)(void *context, const char *path, const char *parent,
                struct checkpoint_measure *made, struct error *err);
    void (*cancel)(void *context); // any thread: a save under way shall end, as shall later ones
    void *context;
    const struct log *log;
    enum seccomp_mode seccomp; // of the thread; SECCOMP_OFF unless set
};

struct checkpoint_params {
    const char *dir;         // made if it is missing
    const char *failure_log; // NULL: `failures` in dir, if mtbf_given is not set
    bool mtbf_given;
    struct checkpoint_settings settings;
};

struct checkpointer;

// -EBUSY: another process takes checkpoints there. `saver` and its context must outlive it; strings
// are copied.
int checkpointer_start(struct checkpointer **c, const struct checkpoint_params *params,
                       const struct checkpoint_saver *saver, struct error *err);
// Waits for a save under way, which is cancelled. NULL is fine. Not in the saver's `save`.
void checkpointer_stop(struct checkpointer *c);

struct checkpoint_status {
    char dir[PATH_MAX], newest[64]; // "" before the first
    struct young_model model;       // measured, once measured
    struct checkpoint_settings settings;
    bool measured;
    double interval, next;                         // seconds; next: until the next is due
    uint64_t made, failed, removed, merged, bytes; // merged: those that became part of another one
    struct checkpoint_measure last;
    struct error error; // of the last that failed, until one is made
};
void checkpointer_status(struct checkpointer *c, struct checkpoint_status *status);

// The MTBF that a log of failures gives.
int checkpoint_failure_read(const char *path, double *mtbf, struct error *err);
// The log of failures in a directory of checkpoints: `what` is "start", "stop" or "" for a failure,
// `at` seconds since 1970. -ENOENT: there is no such directory.
int checkpoint_failure_note(const char *dir, int64_t at, const char *what, struct error *err);
