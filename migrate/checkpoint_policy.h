// SPDX-License-Identifier: Apache-2.0
// When the next checkpoint is due, whether it is a full or a diff, and which old ones may go. Pure:
// the caller has the clock (nanoseconds since any moment) and the files. The same code runs in
// a VM (migrate/checkpoint.c) and against simulated failures (migrate/checkpoint_trial.c).
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "migrate/failures.h"
#include "migrate/young.h"

enum {
    CHECKPOINT_CHAIN = 16,     // files from a full one to its last diff
    CHECKPOINT_CHAIN_MAX = 64, // what can be read: SNAPFILE_DEPTH_MAX
    CHECKPOINT_KEEP = 5,
    CHECKPOINT_KEEP_MAX = 1000,
    CHECKPOINT_MERGE = 4,  // files at least that are merged: each time all pages are written anew
    CHECKPOINT_MAX = 4096, // files in one directory that a policy looks at
};

struct checkpoint_settings {
    enum young_form form;
    double interval; // seconds between checkpoints; 0: by the model
    double mtbf;     // seconds
    double restart;  // seconds, R
    unsigned chain;  // files of a chain, at least 1; 1: only full ones
    unsigned keep;   // how many of the newest can be gone back to, at least 1
    unsigned hourly; // beside them, the newest one of each of the last N hours
};
void checkpoint_settings_default(struct checkpoint_settings *settings);
int checkpoint_settings_check(const struct checkpoint_settings *settings, struct error *err);

// What one checkpoint cost, as its snapshot report says.
struct checkpoint_measure {
    bool full;
    uint64_t pause_ns; // the guest stood still
    uint64_t fault_ns; // and was slowed by copy-on-write
    uint64_t total_ns; // from its begin until it was safe
    uint64_t bytes;    // of pages in the file
};

struct checkpoint_policy {
    struct checkpoint_settings settings;
    struct young_average cost[2], latency[2]; // seconds; of fulls, of diffs
    unsigned chain;                           // files in the chain so far, 0: a full one is next
    uint64_t full_bytes, diff_bytes;          // of that chain
    unsigned failed;                          // saves in a row that failed
};

void checkpoint_policy_init(struct checkpoint_policy *p,
                            const struct checkpoint_settings *settings);
// Measured means with a chain's share of fulls; before anything was measured, a guess.
void checkpoint_policy_model(const struct checkpoint_policy *p, struct young_model *model);
double checkpoint_policy_interval(const struct checkpoint_policy *p); // seconds

// A full one begins a chain: at first, when the chain is long, when its diffs together are as large
// as the full one (then going back reads more than it need), and after an error.
bool checkpoint_policy_full(const struct checkpoint_policy *p);

// One was made (`start`: when it began), or could not be made. Both give when the next is due.
uint64_t checkpoint_policy_done(struct checkpoint_policy *p, const struct checkpoint_measure *made,
                                uint64_t start);
uint64_t checkpoint_policy_failed(struct checkpoint_policy *p, uint64_t now);
// The guest began or goes on at `now`: when the first is due.
uint64_t checkpoint_policy_begin(struct checkpoint_policy *p, uint64_t now);

struct checkpoint_item {
    uint32_t number; // ascending with age: the newest has the highest
    int64_t created; // seconds since 1970
    int32_t parent;  // index of the item it continues, below its own; -1: a full one
    bool keep;       // out
    bool wanted;     // out: for itself, not as something that another one continues
};

// Marks what is kept of `items`, sorted by number: the newest `keep`, the newest of each hour, and
// everything that these continue.
void checkpoint_policy_keep(const struct checkpoint_settings *settings,
                            struct checkpoint_item *items, unsigned nr, int64_t now);
// Of items so marked: the diff that should become a full one, since nobody wants it or what it
// continues, down to the full one (`*files` in all), for themselves. -1: none; few are left alone.
int32_t checkpoint_policy_merge(const struct checkpoint_settings *settings,
                                const struct checkpoint_item *items, unsigned nr, unsigned *files);
// The chain that goes on has become `files` - 1 files shorter, by `diff_bytes` of diffs; it begins
// with `full_bytes`.
void checkpoint_policy_merged(struct checkpoint_policy *p, unsigned files, uint64_t diff_bytes,
                              uint64_t full_bytes);
