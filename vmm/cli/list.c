// SPDX-License-Identifier: Apache-2.0
// The VMs of this host: ls, ps, rm, prune, kill.
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/cli/cli.h"
#include "vmm/cli/registry.h"
#include "vmm/control.h"
#include "vmm/util.h"

enum {
    ASK_MS = 2000,    // how long a VM may take to say how it is
    GHOST_S = 3600,   // idle for longer: nobody needs it
    OVER_MEMORY = 4,  // more than so many times the memory it uses,
    OVER_MIN_S = 600, // for a VM that had this long to use it
};

struct list_args {
    bool json, sprawl, dry_run, quiet;
    char *name;
};

static int parse(int argc, char **argv, const char *usage, const char *options, bool name,
                 struct list_args *args, struct error *err)
{
    static const struct option longs[] = {
        {"json", no_argument, NULL, 'j'},   {"quiet", no_argument, NULL, 'q'},
        {"sprawl", no_argument, NULL, 's'}, {"dry-run", no_argument, NULL, 'n'},
        {"help", no_argument, NULL, 'h'},   {0}};
    *args = (struct list_args) {0};
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, ":jqh", longs, NULL)) != -1) {
        if (c == 'h') {
            printf("usage: %s\n", usage);
            return 1;
        }
        if (c == ':' || c == '?' || !strchr(options, c))
            return error_set(err, -EINVAL, "unknown option '%s'; usage: %.*s", argv[optind - 1],
                             (int)strcspn(usage, "\n"), usage);
        args->json |= c == 'j';
        args->quiet |= c == 'q';
        args->sprawl |= c == 's';
        args->dry_run |= c == 'n';
    }
    if (argc - optind != name)
        return error_set(err, -EINVAL, "%d arguments, expected %d; usage: %.*s", argc - optind,
                         name, (int)strcspn(usage, "\n"), usage);
    args->name = name ? argv[optind] : NULL;
    return 0;
}

// --- what a VM says of itself

static json_t *entry_info(const struct registry_entry *e)
{
    char path[108];
    json_t *info = NULL;
    struct error err;
    if (e->fate == REGISTRY_ALIVE && !control_path(e->name, path, sizeof(path), NULL) &&
        control_ask(path, "/info", ASK_MS, &info, &err))
        info = json_pack("{s:s}", "state", "silent"); // alive, but it does not answer
    if (!info)
        info = json_pack("{s:s}", "state", "dead");
    json_object_set_new(info, "name", json_string(e->name));
    if (!json_object_get(info, "pid"))
        json_object_set_new(info, "pid", json_integer(e->pid));
    if (!json_object_get(info, "memory_bytes") && json_object_get(e->record, "memory_bytes"))
        json_object_set(info, "memory_bytes", json_object_get(e->record, "memory_bytes"));
    return info;
}

static json_int_t number(json_t *object, const char *key)
{
    return json_integer_value(json_object_get(object, key));
}

static const char *text(json_t *object, const char *key)
{
    return json_string_value(json_object_get(object, key)) ?: "?";
}

void cli_duration(int64_t s, char out[CLI_DURATION])
{
    if (s < 120)
        snprintf(out, CLI_DURATION, "%llds", (long long)s);
    else if (s < 7200)
        snprintf(out, CLI_DURATION, "%lldm", (long long)s / 60);
    else if (s < 48 * 3600)
        snprintf(out, CLI_DURATION, "%lldh", (long long)s / 3600);
    else
        snprintf(out, CLI_DURATION, "%lldd", (long long)s / 86400);
}

static void row_print(json_t *info)
{
    char up[CLI_DURATION], idle[CLI_DURATION];
    cli_duration(number(info, "uptime_s"), up);
    cli_duration(number(info, "idle_s"), idle);
    printf("%-20s %-12s %8lld %5zu %7lld %9lld %5lld.%lld %6s %6s\n", text(info, "name"),
           text(info, "state"), (long long)number(info, "pid"),
           json_array_size(json_object_get(info, "vcpus")),
           (long long)(number(info, "memory_bytes") >> 20),
           (long long)(number(info, "resident_bytes") >> 20),
           (long long)number(info, "cpu_permille") / 10,
           (long long)number(info, "cpu_permille") % 10, up, idle);
}

static void json_print(json_t *json)
{
    json_dumpf(json, stdout, JSON_INDENT(2));
    printf("\n");
}

// --- sprawl

static json_t *finding(const char *kind, json_t *info, json_int_t bytes, const char *why_fmt,
                       const char *why, const char *command)
{
    char reason[200], advice[200];
    snprintf(reason, sizeof(reason), why_fmt, why);
    snprintf(advice, sizeof(advice), command, text(info, "name"));
    return json_pack("{s:s, s:s, s:s, s:I, s:s}", "name", text(info, "name"), "kind", kind, "why",
                     reason, "bytes", bytes, "command", advice);
}

static void sprawl_of(const struct registry_entry *e, json_t *info, json_t *findings)
{
    char span[CLI_DURATION], command[96];
    json_int_t memory = number(info, "memory_bytes"), used = number(info, "resident_bytes");
    bool lives = !strcmp(text(info, "state"), "running") || !strcmp(text(info, "state"), "paused");
    if (e->fate == REGISTRY_DEAD) {
        json_t *files = registry_leftovers(e), *file;
        json_int_t bytes = 0;
        char count[16];
        size_t i;
        json_array_foreach(files, i, file) bytes += number(file, "bytes");
        snprintf(count, sizeof(count), "%zu", json_array_size(files));
        json_array_append_new(findings, finding("zombie", info, bytes,
                                                "its process is gone, %s files are left", count,
                                                "ferry rm %s"));
        json_decref(files);
    } else if (lives && number(info, "idle_s") >= GHOST_S) {
        cli_duration(number(info, "idle_s"), span);
        json_array_append_new(findings, finding("ghost", info, used, "idle for %s", span,
                                                "ferry stop %s --powerbutton"));
    } else if (lives && number(info, "uptime_s") >= OVER_MIN_S && used * OVER_MEMORY < memory) {
        bool balloon = json_object_get(json_object_get(info, "devices"), "balloon0");
        snprintf(span, sizeof(span), "%lld", (long long)(used >> 20));
        snprintf(command, sizeof(command),
                 balloon ? "ferry set %%s balloon0.target=%lldM"
                         : "ferry stop %%s; run it with -m %lldM",
                 (long long)((balloon ? memory - 2 * used : 2 * used) >> 20));
        json_array_append_new(findings, finding("over-provisioned", info, memory - used,
                                                "uses %s MiB of its memory", span, command));
    }
}

static void findings_print(json_t *findings)
{
    size_t i;
    json_t *f;
    if (!json_array_size(findings))
        printf("no sprawl: nothing is idle, oversized or left behind\n");
    else
        printf("%-20s %-17s %9s  %-40s %s\n", "NAME", "KIND", "MIB", "WHY", "SUGGESTION");
    json_array_foreach(findings, i, f)
        printf("%-20s %-17s %9.1f  %-40s %s\n", text(f, "name"), text(f, "kind"),
               (double)number(f, "bytes") / (1 << 20), text(f, "why"), text(f, "command"));
}

// --- commands

static void list_print(const struct registry *r, const struct list_args *args)
{
    json_t *all = json_array(), *findings = json_array();
    if (!args->json && !args->sprawl && !args->quiet)
        printf("%-20s %-12s %8s %5s %7s %9s %7s %6s %6s\n", "NAME", "STATE", "PID", "VCPUS",
               "MEM/MIB", "USED/MIB", "CPU/%", "UP", "IDLE");
    for (size_t i = 0; i < r->nr; i++) {
        json_t *info = entry_info(&r->entries[i]);
        sprawl_of(&r->entries[i], info, findings);
        if (args->quiet && !args->json)
            printf("%s\n", r->entries[i].name);
        else if (!args->json && !args->sprawl)
            row_print(info);
        json_array_append_new(all, info);
    }
    if (args->json)
        json_print(args->sprawl ? findings : all);
    else if (args->sprawl)
        findings_print(findings);
    json_decref(all);
    json_decref(findings);
}

int cli_ls(int argc, char **argv)
{
    static const char usage[] =
        "ferry ls [--json] [--quiet] [--sprawl]   (or: ferry ps)\n\n"
        "The VMs of this host. One whose process is gone is shown as dead, one that does not "
        "answer\n"
        "as silent.\n"
        "  -q, --quiet    names only\n"
        "      --sprawl   what is over-provisioned (assigned much, used little), ghost (running, "
        "idle\n"
        "                 for an hour) or zombie (dead, files left), with a suggestion each\n"
        "  -j, --json\n"
        "example: ferry ls --sprawl";
    struct list_args args;
    struct registry registry;
    struct error err;
    int ret = parse(argc, argv, usage, "jqs", false, &args, &err);
    if (!ret)
        ret = registry_scan(&registry, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    list_print(&registry, &args);
    registry_free(&registry);
    return EXIT_OK;
}

// Adds the files to `removed`, or says their names.
static void entry_clean(const struct registry_entry *e, const struct list_args *args,
                        json_t *removed)
{
    json_t *files = registry_leftovers(e), *file;
    size_t i;
    json_array_foreach(files, i, file) if (!args->quiet && !args->json)
        printf("%s %s\n", args->dry_run ? "would remove" : "removed", text(file, "path"));
    json_array_extend(removed, files);
    json_decref(files);
    if (!args->dry_run)
        registry_clean(e);
}

static void removed_print(json_t *removed, const struct list_args *args)
{
    json_t *all = json_pack("{s:O}", args->dry_run ? "would_remove" : "removed", removed);
    if (args->json)
        json_print(all);
    json_decref(all);
    json_decref(removed);
}

int cli_prune(int argc, char **argv)
{
    static const char usage[] = "ferry prune [--dry-run] [--quiet] [--json]\n\n"
                                "Removes what dead VMs left: their sockets and records. Never a "
                                "disk, overlay or snapshot.\n"
                                "example: ferry prune --dry-run";
    struct list_args args;
    struct registry registry;
    struct error err;
    int ret = parse(argc, argv, usage, "jnq", false, &args, &err);
    if (!ret)
        ret = registry_scan(&registry, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    json_t *removed = json_array();
    for (size_t i = 0; i < registry.nr; i++)
        entry_clean(&registry.entries[i], &args, removed);
    removed_print(removed, &args);
    registry_free(&registry);
    return EXIT_OK;
}

// Scans, finds the one that is named, and lets `fn` work on it.
static int with_entry(int argc, char **argv, const char *usage, const char *options,
                      int (*fn)(const struct registry_entry *e, const struct list_args *args,
                                struct error *err))
{
    struct list_args args;
    struct registry registry;
    struct error err;
    int ret = parse(argc, argv, usage, options, true, &args, &err);
    if (!ret)
        ret = registry_scan(&registry, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    const struct registry_entry *e = registry_find(&registry, args.name);
    ret = e ? fn(e, &args, &err)
            : error_set(&err, -ENOENT, "no VM is called %s (ferry ls lists them)", args.name);
    registry_free(&registry);
    return ret ? cli_fail(&err) : EXIT_OK;
}

static int remove_one(const struct registry_entry *e, const struct list_args *args,
                      struct error *err)
{
    if (e->fate == REGISTRY_ALIVE)
        return error_set(err, -EBUSY, "VM %s runs (pid %d): ferry stop %s first", e->name,
                         (int)e->pid, e->name);
    json_t *removed = json_array();
    entry_clean(e, args, removed);
    removed_print(removed, args);
    return 0;
}

int cli_rm(int argc, char **argv)
{
    return with_entry(argc, argv,
                      "ferry rm NAME [--dry-run] [--quiet] [--json]\n\n"
                      "Removes what a dead VM left: its sockets and record.\n"
                      "example: ferry rm web",
                      "jnq", remove_one);
}

static int kill_one(const struct registry_entry *e, const struct list_args *args, struct error *err)
{
    if (e->fate != REGISTRY_ALIVE)
        return error_set(err, -ESRCH, "VM %s is dead already (ferry rm %s removes what it left)",
                         e->name, e->name);
    if (kill(e->pid, SIGKILL))
        return error_errno(err, "VM %s, pid %d", e->name, (int)e->pid);
    if (args->json) {
        json_t *killed = json_pack("{s:s, s:i}", "name", e->name, "pid", (int)e->pid);
        json_print(killed);
        json_decref(killed);
    }
    return 0;
}

int cli_kill(int argc, char **argv)
{
    return with_entry(
        argc, argv,
        "ferry kill NAME [--json]\n\n"
        "Ends a VM's process at once, whatever it does; for one that `ferry stop` cannot\n"
        "reach. Its guest loses what it has not flushed.\n"
        "example: ferry kill web",
        "j", kill_one);
}
