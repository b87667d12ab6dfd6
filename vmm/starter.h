// SPDX-License-Identifier: Apache-2.0
// Starts a program for a process that may not start any: its filters (vmm/seccomp.h) hold for what
// it starts as well. A small process is forked before the filters, and waits to be asked. All that
// can be asked of it is to start what it was made for, and to end it.
#pragma once

#include <sys/types.h>

#include "vmm/error.h"

struct starter;

// Starts the program, in the starter's process, with these two descriptors.
typedef int (*starter_fn)(void *arg, const int fds[2], pid_t *pid, struct error *err);

// Forks: `fn` and `arg` are what they were at this moment. The process keeps no descriptor that was
// open then, has no terminal, and ends with this one, and what it started before it.
int starter_create(struct starter **starter, starter_fn fn, void *arg, struct error *err);
// Any thread, one at a time; returns what `fn` did. What was started before is ended first.
int starter_start(struct starter *starter, const int fds[2], struct error *err);
void starter_end(struct starter *starter); // what was started; waits for its end
void starter_destroy(struct starter *starter);
