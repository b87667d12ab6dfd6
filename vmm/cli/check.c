// SPDX-License-Identifier: Apache-2.0
// `ferry check`: what this host can do, what it lacks, and the remedy for each lack.
#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "vmm/cli/cli.h"
#include "vmm/host.h"
#include "vmm/util.h"

static void help(void)
{
    printf("Says what this host can do for Ferry, and a remedy for each lack.\n\n"
           "usage: ferry check [--json] [--quiet]\n\n"
           "  -j, --json       one JSON object instead of the table\n"
           "  -q, --quiet      only what keeps guests from running; nothing if they can\n"
           "      --kvm PATH   the KVM device (default /dev/kvm)\n"
           "  -h, --help       this text\n\n"
           "exit status: 0 guests can run, 3 they cannot, 2 wrong usage\n\n"
           "examples:\n"
           "  ferry check\n"
           "  ferry check --quiet && ferry run --kernel vmlinux --memory 128M\n"
           "  ferry check --json | jq '.findings[] | select(.status != \"ok\")'\n");
}

static const char *status_name(enum host_status status)
{
    static const char *const names[] = {
        [HOST_OK] = "ok", [HOST_WARN] = "warn", [HOST_LACK] = "lack"};
    return names[status];
}

static void print_finding(const struct host_finding *f, bool color)
{
    static const char *const colors[] = {
        [HOST_OK] = "\033[32m", [HOST_WARN] = "\033[33m", [HOST_LACK] = "\033[31m"};
    printf("%s%-4s%s  %-9s  %-34s  %s\n", color ? colors[f->status] : "", status_name(f->status),
           color ? "\033[0m" : "", f->group, f->name, f->value);
    if (f->status != HOST_OK)
        printf("      %-9s  for %s: %s\n", "", f->needed_by, f->remedy);
}

static void print_table(const struct host_finding *findings, size_t nr)
{
    const char *no_color = getenv("NO_COLOR");
    bool color = isatty(STDOUT_FILENO) && !(no_color && no_color[0]);
    for (size_t i = 0; i < nr; i++)
        print_finding(&findings[i], color);
    printf("\n%s\n", host_can_run(findings, nr)
                         ? "Ferry can run guests on this host."
                         : "Ferry cannot run guests on this host: see the lines marked lack.");
}

static void print_quiet(const struct host_finding *findings, size_t nr)
{
    for (size_t i = 0; i < nr; i++) {
        const struct host_finding *f = &findings[i];
        if (f->required && f->status == HOST_LACK)
            fprintf(stderr, "ferry: %s: %s; %s\n", f->name, f->value, f->remedy);
    }
}

static int print_json(const struct host_facts *facts, const struct host_finding *findings,
                      size_t nr)
{
    json_t *list = json_array();
    for (size_t i = 0; i < nr; i++) {
        const struct host_finding *f = &findings[i];
        json_array_append_new(
            list, json_pack("{s:s, s:s, s:s, s:b, s:s, s:s, s:s}", "group", f->group, "name",
                            f->name, "status", status_name(f->status), "required", f->required,
                            "value", f->value, "needed_by", f->needed_by, "remedy", f->remedy));
    }
    json_t *all =
        json_pack("{s:b, s:b, s:s, s:o}", "can_run", host_can_run(findings, nr), "software_backend",
                  facts->software_backend, "kernel", facts->kernel, "findings", list);
    // The pack fails as a whole when memory ran out or the host gave a string that is not UTF-8.
    int ret = all ? json_dumpf(all, stdout, JSON_INDENT(2)) : -1;
    json_decref(all);
    putchar('\n');
    return ret;
}

int cli_check(int argc, char **argv)
{
    enum { OPT_KVM = 256 };
    static const struct option options[] = {{"json", no_argument, NULL, 'j'},
                                            {"quiet", no_argument, NULL, 'q'},
                                            {"kvm", required_argument, NULL, OPT_KVM},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    bool json = false, quiet = false;
    const char *kvm_path = "/dev/kvm";
    int opt;
    opterr = 0;
    optind = 0; // glibc: start afresh, whoever parsed before
    while ((opt = getopt_long(argc, argv, "jqh", options, NULL)) != -1) {
        switch (opt) {
        case 'j':
            json = true;
            break;
        case 'q':
            quiet = true;
            break;
        case OPT_KVM:
            kvm_path = optarg;
            break;
        case 'h':
            help();
            return EXIT_OK;
        default:
            fprintf(stderr, "ferry: check: bad option '%s' (ferry check --help)\n",
                    argv[optind - 1]);
            return EXIT_USAGE;
        }
    }
    if (optind < argc) {
        fprintf(stderr, "ferry: check: unexpected argument '%s'\n", argv[optind]);
        return EXIT_USAGE;
    }

    struct host_facts facts;
    struct host_finding findings[HOST_FINDINGS_MAX];
    host_probe(&facts, kvm_path);
    size_t nr = host_judge(&facts, findings);
    int failed = 0;
    if (json)
        failed = print_json(&facts, findings, nr);
    else if (quiet)
        print_quiet(findings, nr);
    else
        print_table(findings, nr);
    if (failed || fflush(stdout)) {
        fprintf(stderr, "ferry: check: cannot write the result\n");
        return EXIT_FAILED;
    }
    return host_can_run(findings, nr) ? EXIT_OK : EXIT_HOST;
}
