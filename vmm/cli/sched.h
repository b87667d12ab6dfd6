// SPDX-License-Identifier: Apache-2.0
// Subcommands of `ferry sched` that concern a running scheduler (vmm/cli/sched_host.c). The table
// of all is in vmm/cli/sched.c. argv[0] is the subcommand; the result is the exit status.
#pragma once

int cli_sched_daemon(int argc, char **argv);
int cli_sched_status(int argc, char **argv);
int cli_sched_top(int argc, char **argv);
int cli_sched_set(int argc, char **argv);
int cli_sched_trace(int argc, char **argv);
int cli_sched_sim(int argc, char **argv); // vmm/cli/sched_sim.c
