// SPDX-License-Identifier: Apache-2.0
// Raw mode of the user's terminal, given back however the process ends or stops.
//
// terminal_raw makes input raw (no echo, no line editing, no signal keys) and leaves output
// processing alone, so that log lines keep their shape. While a terminal is raw:
//   - signals that would kill the process (those still at their default action) first restore it;
//   - SIGTSTP restores it, stops, and makes it raw again when the job continues in the foreground;
//   - SIGWINCH, if nobody else takes it, rings the eventfds of terminal_on_resize;
//   - exit() restores it.
// SIGKILL cannot be seen by a process: `reset` or `stty sane` repairs the terminal then.
#pragma once

#include "vmm/error.h"

struct terminal;

// `fd` must stay open until terminal_restore. -ENOTTY when it is no terminal, -EBUSY when too many
// terminals of this process are raw.
int terminal_raw(int fd, struct terminal **terminal, struct error *err);
// Rings the eventfd (non-blocking) whenever a window changed its size (SIGWINCH).
void terminal_on_resize(struct terminal *terminal, int event_fd);
void terminal_restore(struct terminal *terminal); // NULL is fine
