// SPDX-License-Identifier: Apache-2.0
// What a VM in a jail keeps of files whose names are out of its reach: its overlays, which go with
// snapshots, and the images that a guest which comes from a file may read.
#pragma once

#include <jansson.h>

#include "vmm/cli/options.h"

enum { OUTSIDE_MAX = 2 * VIRTIO_DEVICES_MAX };

struct outside {
    struct outside_file {
        char *path; // from the root
        int fd;
    } files[OUTSIDE_MAX];
    unsigned nr;
    char *cwd; // where relative names began; NULL: there is no jail
};

// Before jail_enter. Overlays for reading and writing, --base for reading.
int outside_open(struct outside *outside, const struct vm_options *options, struct error *err);
int outside_fd(const struct outside *outside, const char *path); // stays ours; 0: it has none
// The disks' texts, as migrate/disks.h takes them: whole names, and the descriptors.
json_t *outside_disks(const struct outside *outside, json_t *texts);
// --checkpoints outside the jail: they are shared with it (JAIL_SHARED).
int outside_checkpoints(struct vm_options *options, struct error *err);
void outside_close(struct outside *outside);

// The images that disks read but never write, by their whole names: a clone needs them again.
json_t *outside_bases(const struct vm_options *options);
