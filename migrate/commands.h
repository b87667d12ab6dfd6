// SPDX-License-Identifier: Apache-2.0
// Migration and snapshots as control commands: migrate, migrate-status, migrate-set,
// migrate-cancel, migrate-force-resume, snapshot. One long command at a time works in a thread of
// its own.
#pragma once

#include <stdbool.h>

#include "migrate/migrate.h"
#include "vmm/control.h"

struct migrate_commands;

// Adds the commands to `control`. `hooks` must outlive this.
int migrate_commands_create(struct migrate_commands **mc, struct vm *vm, struct control *control,
                            const struct migrate_hooks *hooks, struct error *err);
// Cancels what is under way and waits for it. Before control_destroy and vm_destroy; NULL is fine.
void migrate_commands_destroy(struct migrate_commands *mc);
// True while nobody else may pause or resume the VM: a migration or snapshot works, or the guest is
// or may be another host's.
bool migrate_commands_busy(struct migrate_commands *mc);
