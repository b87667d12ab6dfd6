// SPDX-License-Identifier: Apache-2.0
// A guest on its way into this process: `ferry receive`. It is taken in by a thread of its own,
// while the main thread runs the event loop, so that its console and control socket live from the
// moment it runs here, which in post-copy is long before the last page has come.
#pragma once

#include <stdbool.h>

#include "vmm/error.h"

struct arrival;
struct session;

// Loop thread. Gives up, unless the guest is already ours.
void arrival_cancel(struct arrival *a);
// Loop thread, the loop has ended: waits for the thread, serving what it still asks for.
void arrival_settle(struct arrival *a);

// ferry restore, and a guest that starts again after a crash: runs what is in the file until it
// ends. The exit status, or -errno. `continues`: the directory of the file gets its checkpoints as
// before.
int arrival_restore(struct session *s, const char *path, bool continues, struct error *err);
