// SPDX-License-Identifier: Apache-2.0
// Self-ballooning of a guest that is moving: drives the rule of selfballoon.h by the guest's
// balloon (struct ram_balloon). Used in the migrating thread.
//
//   squeeze_begin   asks, takes, and waits while the balloon grows: what it holds when the first
//                   round starts is never sent
//   squeeze_look    between records: takes more, or gives back under pressure
//   squeeze_end     before the state is saved, or when the migration failed: the balloon's target
//                   is its user's again, so the guest takes its memory back where it runs next
#pragma once

#include "migrate/selfballoon.h"

struct outgoing;

struct squeeze {
    struct selfballoon rule;
    bool on;             // the balloon's target is not its user's own
    uint64_t serial;     // of the last statement looked at
    uint64_t statements; // looked at
    uint64_t asked_ns;   // when the guest was last asked, 0: not yet
    uint64_t held, most; // by the balloon beyond its user's target: now, and the most so far
};

void squeeze_begin(struct outgoing *out);
void squeeze_look(struct outgoing *out);
void squeeze_end(struct outgoing *out); // harmless when nothing was begun
