// SPDX-License-Identifier: Apache-2.0
// Migration and snapshots as routes of the control API: /migration, /migration/force-resume,
// /snapshot/file. One at a time works in a thread of its own; the VM's life says so meanwhile.
#pragma once

#include "migrate/migrate.h"
#include "migrate/snapshot.h"
#include "vmm/control.h"
#include "vmm/life.h"

struct migrate_commands;

// Adds the routes to `control`. `hooks` must outlive this. Routes work once there is a VM.
int migrate_commands_create(struct migrate_commands **mc, struct control *control,
                            struct life *life, const struct migrate_hooks *hooks,
                            struct error *err);
void migrate_commands_vm(struct migrate_commands *mc, struct vm *vm);
// Takes the routes back, cancels what is under way and waits for it. Before control_destroy and
// vm_destroy; NULL is fine.
void migrate_commands_destroy(struct migrate_commands *mc);
// Writes a snapshot as the route does, for routes that say it otherwise; answers `req`. Paths are
// copied; what was written since the last snapshot is kept here.
void migrate_commands_snapshot(struct migrate_commands *mc, const struct snapshot_params *params,
                               struct control_request *req);
// The VM's memory is that of this snapshot: what the next diff is of (snapshot_track_base).
int migrate_commands_base(struct migrate_commands *mc, const char *path,
                          const uint8_t id[SNAPFILE_ID_LEN], bool log, struct error *err);
// Whether there is a last snapshot, taken or restored, for a diff to be of, and in another file
// than `path`.
bool migrate_commands_based(struct migrate_commands *mc, const char *path);
