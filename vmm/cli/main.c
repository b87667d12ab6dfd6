// SPDX-License-Identifier: Apache-2.0
#include <stdio.h>
#include <string.h>

#include "vmm/cli/cli.h"
#include "vmm/util.h"

static const struct cli_command commands[] = {
    {"run", cli_run, "start a guest"},
    {"check", cli_check, "what this host can do, with a remedy for each lack"},
    {"ls", cli_ls, "the VMs of this host, and what is idle, oversized or left behind"},
    {"ps", cli_ls, "the same"},
    {"info", cli_info, "describe a running VM"},
    {"console", cli_console, "attach this terminal to a VM's console"},
    {"pause", cli_pause, "stop a VM's vCPUs"},
    {"resume", cli_resume, "let a paused VM go on"},
    {"stop", cli_stop, "end a VM (--powerbutton asks the guest)"},
    {"reset", cli_reset, "start a VM's guest again, at once"},
    {"kill", cli_kill, "end a VM's process at once"},
    {"rm", cli_rm, "remove what a dead VM left"},
    {"prune", cli_prune, "remove what all dead VMs left"},
    {"top", cli_top, "a live view of what the VMs of this host use"},
    {"events", cli_events, "what happens to a VM, a line each"},
    {"set", cli_set, "change a device of a running VM"},
    {"snapshot", cli_snapshot, "save a running VM to a file; list, check, merge such files"},
    {"clone", cli_clone, "make copies of a running VM that share its memory"},
    {"checkpoint", cli_checkpoint, "save a guest now and then, as often as pays"},
    {"rollback", cli_rollback, "take a guest back to a checkpoint"},
    {"restore", cli_restore, "start a VM from a snapshot file"},
    {"migrate", cli_migrate, "move a running VM to another host"},
    {"receive", cli_receive, "wait for a VM that migrates here"},
    {"sched", cli_sched, "the credit scheduler of this host's vCPUs"},
    {"version", cli_version, "version and build"},
};

static void help(FILE *out)
{
    fprintf(out, "Ferry: small Linux guests on KVM that move while they run.\n\n"
                 "usage: ferry COMMAND [OPTIONS]     (ferry COMMAND --help for each)\n\n");
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
        fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].help);
    fprintf(out, "\nexample: ferry run --kernel vmlinux --initrd initramfs.cpio --memory 128M\n");
}

int main(int argc, char **argv)
{
    cli_start_ns = time_ns();
    if (argc < 2) {
        help(stderr);
        return EXIT_USAGE;
    }
    if (!strcmp(argv[1], "help") || !strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")) {
        help(stdout);
        return EXIT_OK;
    }
    if (!strcmp(argv[1], "--version"))
        argv[1] = "version";
    if (!strncmp(argv[1], "--", 2)) { // as microVM tools are started: ferry --api-sock PATH --id ID
        argv[0] = "run";
        return cli_run(argc, argv);
    }
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
        if (!strcmp(argv[1], commands[i].name))
            return commands[i].run(argc - 1, argv + 1);
    fprintf(stderr, "ferry: unknown command '%s' (ferry help lists them)\n", argv[1]);
    return EXIT_USAGE;
}
