// SPDX-License-Identifier: Apache-2.0
// Checkpoints as a route of the control API: /checkpoint. What was asked for is kept beside the
// checkpoints (policy.json), so that a guest that is started again from them is saved as before.
#pragma once

#include <jansson.h>

#include "migrate/migrate.h"
#include "vmm/control.h"
#include "vmm/life.h"

struct checkpoint_commands;

// Adds the routes to `control`. `hooks` must outlive this. Loop thread, as all here.
int checkpoint_commands_create(struct checkpoint_commands **cc, struct control *control,
                               struct life *life, const struct migrate_hooks *hooks,
                               struct error *err);
// NULL: no VM; ends what is under way.
void checkpoint_commands_vm(struct checkpoint_commands *cc, struct vm *vm);
// As PUT /checkpoint with this body (borrowed).
int checkpoint_commands_start(struct checkpoint_commands *cc, json_t *body, struct error *err);
void checkpoint_commands_stop(struct checkpoint_commands *cc);
// The body that began the checkpoints in `dir`, for checkpoint_commands_start; -ENOENT: none did.
int checkpoint_policy_read(const char *dir, json_t **body, struct error *err);
// What is under way: the body it began with (borrowed), or NULL.
json_t *checkpoint_commands_body(const struct checkpoint_commands *cc);
void checkpoint_commands_destroy(struct checkpoint_commands *cc); // NULL is fine
