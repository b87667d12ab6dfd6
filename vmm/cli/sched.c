// SPDX-License-Identifier: Apache-2.0
// ferry sched: the credit scheduler of this host, and what can be asked of it.
#include "vmm/cli/sched.h"

#include <stdio.h>
#include <string.h>

#include "vmm/cli/cli.h"
#include "vmm/util.h"

static const struct cli_command commands[] = {
    {"daemon", cli_sched_daemon, "schedule the vCPUs of this host's VMs"},
    {"status", cli_sched_status, "who runs where, and what each vCPU has had"},
    {"top", cli_sched_top, "a live view of what each VM gets"},
    {"set", cli_sched_set, "change a VM's weight, cap or affinity"},
    {"trace", cli_sched_trace, "the newest decisions"},
    {"sim", cli_sched_sim, "what the scheduler would do with a workload, on virtual time"},
};

static void help(FILE *out)
{
    fprintf(out,
            "usage: ferry sched COMMAND [OPTIONS]     (ferry sched COMMAND --help for each)\n\n");
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
        fprintf(out, "  %-7s %s\n", commands[i].name, commands[i].help);
    fputs("\nexamples:\n"
          "    ferry sched daemon --pcpus 2-7 &\n"
          "    ferry run -k vmlinux ... --sched auto --weight 512 --cap 150\n"
          "    ferry sched top\n"
          "    ferry sched trace --last 500 --svg run.svg\n",
          out);
}

int cli_sched(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    if (!strcmp(name, "--help") || !strcmp(name, "-h") || !strcmp(name, "help")) {
        help(stdout);
        return EXIT_OK;
    }
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
        if (!strcmp(name, commands[i].name))
            return commands[i].run(argc - 1, argv + 1);
    if (!*name)
        help(stderr);
    else
        fprintf(stderr, "ferry: unknown command 'sched %s' (ferry sched --help lists them)\n",
                name);
    return EXIT_USAGE;
}
