// SPDX-License-Identifier: Apache-2.0
// A directory of checkpoints: snapshot files named checkpoint-NNNNNN.snap, the newest with the
// highest number, each a full one or a diff of another one beside it. Files of other names are none
// of our business.
#pragma once

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "migrate/checkpoint_policy.h"
#include "migrate/snapfile.h"
#include "vmm/error.h"

enum {
    CHECKPOINT_NUMBER_MAX = 999999999,
    CHECKPOINT_NAME_MAX = 32,
    CHECKPOINT_FILES_MAX = 65536, // in one directory
    CHECKPOINT_DISKS = 32,        // of a VM, at most
};

struct checkpoint_file {
    uint32_t number;
    char name[CHECKPOINT_NAME_MAX];
    bool readable; // its header is; else `info` is empty
    struct snapfile_info info;
};

struct checkpoint_dir {
    char path[PATH_MAX];
    struct checkpoint_file *files; // by number
    unsigned nr;
};

// Reads names and headers. A damaged file is an entry that is not readable.
int checkpoint_dir_read(struct checkpoint_dir *dir, const char *path, struct error *err);
void checkpoint_dir_free(struct checkpoint_dir *dir);
// PATH_MAX bytes.
int checkpoint_dir_file(const struct checkpoint_dir *dir, const struct checkpoint_file *file,
                        char *path, struct error *err);
// Where the next one goes. PATH_MAX bytes.
int checkpoint_dir_next(const struct checkpoint_dir *dir, char *path, struct error *err);

// Removes what the settings do not keep, newest first, and frozen disks of no checkpoint: not while
// one is being made. What cannot be removed stays. Counts the checkpoints that were removed.
unsigned checkpoint_dir_prune(const struct checkpoint_dir *dir,
                              const struct checkpoint_settings *settings, int64_t now);

// What should be merged (snapshot_settle), so that a later prune can remove the rest of its chain.
struct checkpoint_merge {
    char path[PATH_MAX];
    unsigned files;      // that become one
    uint64_t diff_bytes; // of those that are diffs
    bool current;        // it is part of the newest one's chain
};
bool checkpoint_dir_merge(const struct checkpoint_dir *dir,
                          const struct checkpoint_settings *settings, int64_t now,
                          struct checkpoint_merge *merge);

// "newest", a number, or a file's name -> its path (PATH_MAX bytes). -ENOENT: there is none.
int checkpoint_dir_find(const struct checkpoint_dir *dir, const char *which, char *path,
                        struct error *err);
// The newest one that is whole, with all it needs: every byte is read. Numbers up to `after` are
// left out. `damaged` (may be NULL) is
// told of each that was passed over. -ENOENT: there is none.
int checkpoint_dir_newest(const struct checkpoint_dir *dir, uint32_t after, char *path,
                          void (*damaged)(void *context, const char *name, const struct error *why),
                          void *context, struct error *err);
