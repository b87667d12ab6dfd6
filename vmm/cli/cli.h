// SPDX-License-Identifier: Apache-2.0
// The ferry program. vmm/cli is the top of the house: it alone may use every room.
#pragma once

#include <jansson.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/exit_status.h"

struct cli_command {
    const char *name;
    int (*run)(int argc, char **argv); // argv[0] is the command; returns the exit status
    const char *help;
};

int cli_run(int argc, char **argv);
int cli_check(int argc, char **argv);
int cli_checkpoint(int argc, char **argv);
int cli_rollback(int argc, char **argv);
int cli_info(int argc, char **argv);
int cli_pause(int argc, char **argv);
int cli_resume(int argc, char **argv);
int cli_stop(int argc, char **argv);
int cli_reset(int argc, char **argv);
int cli_ls(int argc, char **argv);
int cli_rm(int argc, char **argv);
int cli_prune(int argc, char **argv);
int cli_kill(int argc, char **argv);
int cli_top(int argc, char **argv);
int cli_events(int argc, char **argv);
int cli_console(int argc, char **argv);
int cli_set(int argc, char **argv);
int cli_snapshot(int argc, char **argv);
int cli_clone(int argc, char **argv);
int cli_restore(int argc, char **argv);
int cli_migrate(int argc, char **argv);
int cli_receive(int argc, char **argv);
int cli_sched(int argc, char **argv);
int cli_version(int argc, char **argv);

// When main began: the zero of `--mark`.
extern uint64_t cli_start_ns;

// Prints "ferry: <text>" to stderr; the exit status that fits err->code.
int cli_fail(const struct error *err);
// An object's members, a line each.
void cli_print_members(json_t *object);
// "90s", "5m", "3h", "12d".
enum { CLI_DURATION = 24 }; // bytes
void cli_duration(int64_t seconds, char out[CLI_DURATION]);
