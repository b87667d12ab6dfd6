// SPDX-License-Identifier: Apache-2.0
// The VMs of this host, as files beside their control sockets: NAME.json says who NAME is. A record
// outlives a VM that was killed, so that what it left can be found and removed.
#pragma once

#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <sys/types.h>

#include "vmm/error.h"

struct jail_config;
struct session;

enum registry_fate {
    REGISTRY_ALIVE,
    REGISTRY_DEAD, // its process is gone
};

struct registry_entry {
    char name[64];
    enum registry_fate fate;
    pid_t pid;
    pid_t supervisor; // starts it again when it dies (vmm/cli/supervise.h); 0: nobody does
    json_t *record;   // as the VM wrote it, or {} if it is damaged or missing
};

struct registry {
    struct registry_entry *entries; // by name
    size_t nr;
};

int registry_write(const struct session *s, struct error *err);
void registry_remove(const char *name); // of this process, when its VM ends

// Never fails for what others wrote: a damaged record is an entry without details.
int registry_scan(struct registry *registry, struct error *err);
void registry_free(struct registry *registry);
const struct registry_entry *registry_find(const struct registry *registry, const char *name);

// Whether VM `name` is in a jail, and in which. May be NULL: `text`, as --jail takes it; `bases`,
// the images it reads, an array of names outside. To be freed.
bool registry_jail(const char *name, struct jail_config *config, char **text, json_t **bases);

// `path`, named here, as VM `name` knows it: from the root, or from its jail's.
void registry_path(const char *name, const char *path, char whole[PATH_MAX]);

// What a dead VM left behind: files that belong to nobody any more, with their sizes:
// [{"path", "bytes"}]. Never a disk or overlay.
json_t *registry_leftovers(const struct registry_entry *entry);
// Removes them. Counts what was removed.
unsigned registry_clean(const struct registry_entry *entry);
