// SPDX-License-Identifier: Apache-2.0
// PUT /rollback: the guest becomes the one in a file, in the same VM. A thread of its own reads the
// file: once to check every page while the guest runs, once more to fill its memory while it
// stands.
//
//      request --> verified --> the guest pauses, its machine is cleared --> filled --> goes on
//                   damaged: the guest was never touched                       failed: no guest
#pragma once

#include "vmm/control.h"

struct rollback;
struct session;

// In the loop's thread, which answers `req` later. An error: nothing has begun, and `req` is still
// the caller's. -EBUSY: one is under way.
int rollback_begin(struct session *s, const char *path, struct control_request *req,
                   struct error *err);
// Turns the loop until one that is under way has ended: the VM has stopped, or will.
void rollback_settle(struct session *s);

// A guest that has not run yet becomes the one in the file, before this returns.
int rollback_start_from(struct session *s, const char *path, struct error *err);
