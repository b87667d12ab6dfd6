// SPDX-License-Identifier: Apache-2.0
// ferry top: a live view. Every figure is the difference of two answers to GET /info.
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>

#include "vmm/cli/cli.h"
#include "vmm/cli/metrics.h"
#include "vmm/cli/registry.h"
#include "vmm/control.h"
#include "vmm/util.h"

enum { ASK_MS = 1000, DELAY_MAX_S = 3600 };

struct top_args {
    double delay;         // seconds
    unsigned long rounds; // 0: until q
    bool json;
};

// All answers of one round, by name.
struct sample {
    json_t *vms;
    uint64_t at_ns;
};

static const char usage[] = "ferry top [--delay SECONDS] [--count N] [--json]\n\n"
                            "What the VMs of this host use, refreshed every 2 seconds; q ends it. "
                            "Without a terminal it prints\n"
                            "one table a round.\n"
                            "  -d, --delay SECONDS\n"
                            "  -n, --count N   end after N rounds\n"
                            "  -j, --json      one JSON object a round\n"
                            "example: ferry top --delay 1";

static int number_parse(const char *text, double min, double max, double *out)
{
    char *end;
    errno = 0;
    *out = strtod(text, &end);
    return *text && !*end && !errno && *out >= min && *out <= max ? 0 : -EINVAL;
}

static int parse(int argc, char **argv, struct top_args *a, struct error *err)
{
    static const struct option longs[] = {{"delay", required_argument, NULL, 'd'},
                                          {"count", required_argument, NULL, 'n'},
                                          {"json", no_argument, NULL, 'j'},
                                          {"help", no_argument, NULL, 'h'},
                                          {0}};
    *a = (struct top_args) {.delay = 2};
    opterr = 0;
    optind = 0;
    int c;
    double n;
    while ((c = getopt_long(argc, argv, ":d:n:jh", longs, NULL)) != -1) {
        if (c == 'h') {
            printf("usage: %s\n", usage);
            return 1;
        } else if (c == 'd') {
            if (number_parse(optarg, 0.1, DELAY_MAX_S, &a->delay))
                return error_set(err, -EINVAL, "--delay '%s': expected 0.1 to %d seconds", optarg,
                                 DELAY_MAX_S);
        } else if (c == 'n') {
            if (number_parse(optarg, 1, 1e9, &n))
                return error_set(err, -EINVAL, "--count '%s': expected a number of rounds", optarg);
            a->rounds = (unsigned long)n;
        } else if (c == 'j') {
            a->json = true;
        } else {
            return error_set(err, -EINVAL, "%s '%s' (ferry top --help)",
                             c == ':' ? "no value for" : "unknown option", argv[optind - 1]);
        }
    }
    return argc == optind ? 0
                          : error_set(err, -EINVAL, "unexpected argument '%s' (ferry top --help)",
                                      argv[optind]);
}

static int sample_take(struct sample *s, struct error *err)
{
    struct registry registry;
    int ret = registry_scan(&registry, err);
    if (ret)
        return ret;
    s->vms = json_object();
    s->at_ns = time_ns();
    for (size_t i = 0; i < registry.nr; i++) {
        char path[108];
        json_t *info = NULL;
        const struct registry_entry *e = &registry.entries[i];
        if (e->fate != REGISTRY_ALIVE || control_path(e->name, path, sizeof(path), NULL))
            continue;
        if (control_ask(path, "/info", ASK_MS, &info, NULL) || !info)
            info = json_pack("{s:s}", "state", "silent");
        json_object_set_new(s->vms, e->name, info);
    }
    registry_free(&registry);
    return 0;
}

// --- figures

static double sum_vcpus(json_t *info, const char *key)
{
    double sum = 0;
    size_t i;
    json_t *vcpu;
    json_array_foreach(json_object_get(info, "vcpus"), i, vcpu) sum +=
        (double)json_integer_value(json_object_get(vcpu, key));
    return sum;
}

static double sum_devices(json_t *info, const char *kind, const char *const *keys)
{
    double sum = 0;
    const char *name;
    json_t *figures;
    json_object_foreach(json_object_get(info, "devices"), name, figures)
    {
        if (strncmp(name, kind, strlen(kind)))
            continue;
        json_t *flat = metrics_flat(figures);
        for (const char *const *key = keys; *key; key++)
            sum += (double)json_integer_value(json_object_get(flat, *key));
        json_decref(flat);
    }
    return sum;
}

static double rate(double now, double before, double seconds)
{
    return now > before ? (now - before) / seconds : 0;
}

static json_t *figures(json_t *now, json_t *before, double seconds)
{
    static const char *const blocks[] = {"read-bytes", "written-bytes", NULL};
    static const char *const packets[] = {"received_bytes", "sent_bytes", NULL};
    static const char *const inflated[] = {"actual_bytes", NULL};
    const double mib = 1 << 20;
    if (!before)
        before = now;
    return json_pack(
        "{s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "state",
        json_string_value(json_object_get(now, "state")) ?: "?", "cpu_percent",
        rate(sum_vcpus(now, "cpu_ns"), sum_vcpus(before, "cpu_ns"), seconds) / 1e7, "exits_s",
        rate(sum_vcpus(now, "exits"), sum_vcpus(before, "exits"), seconds), "memory_mib",
        (double)json_integer_value(json_object_get(now, "memory_bytes")) / mib, "used_mib",
        (double)json_integer_value(json_object_get(now, "resident_bytes")) / mib, "disk_mib_s",
        rate(sum_devices(now, "disk", blocks), sum_devices(before, "disk", blocks), seconds) / mib,
        "net_mib_s",
        rate(sum_devices(now, "net", packets), sum_devices(before, "net", packets), seconds) / mib,
        "balloon_mib", sum_devices(now, "balloon", inflated) / mib);
}

static json_t *round_figures(const struct sample *now, const struct sample *before)
{
    json_t *all = json_object(), *info;
    const char *name;
    double seconds = before->vms ? (double)(now->at_ns - before->at_ns) / 1e9 : 1;
    json_object_foreach(now->vms, name, info)
        json_object_set_new(all, name, figures(info, json_object_get(before->vms, name), seconds));
    return all;
}

// --- the screen

static double real(json_t *f, const char *key)
{
    return json_real_value(json_object_get(f, key));
}

static void bar_print(double percent, int width)
{
    int full = (int)(percent / 100 * width + 0.5);
    for (int i = 0; i < width; i++)
        putchar(i < full ? '#' : '.');
}

static void table_print(json_t *all, bool terminal)
{
    struct winsize size = {.ws_row = 24};
    const char *name;
    json_t *f;
    if (terminal)
        ioctl(STDOUT_FILENO, TIOCGWINSZ, &size);
    unsigned rows = terminal && size.ws_row > 3 ? size.ws_row - 3u : UINT32_MAX;
    if (terminal)
        printf("\033[H\033[2J");
    printf("%-18s %-10s %6s %-10s %8s %12s %9s %9s %8s\n", "NAME", "STATE", "CPU/%", "", "EXITS/S",
           "USED/MEM MIB", "DISK MB/S", "NET MB/S", "BALLOON");
    json_object_foreach(all, name, f)
    {
        if (!rows--)
            break;
        double cpu = real(f, "cpu_percent");
        printf("%-18.18s %-10s %6.1f ", name, json_string_value(json_object_get(f, "state")), cpu);
        bar_print(cpu > 100 ? 100 : cpu, 10);
        printf(" %8.0f %5.0f/%-6.0f %9.2f %9.2f %8.0f\n", real(f, "exits_s"), real(f, "used_mib"),
               real(f, "memory_mib"), real(f, "disk_mib_s"), real(f, "net_mib_s"),
               real(f, "balloon_mib"));
    }
    if (!json_object_size(all))
        printf("no VM runs on this host\n");
    if (terminal)
        printf("\nq ends\n");
    fflush(stdout);
}

// True: somebody pressed q.
static bool wait_key(double seconds, bool terminal)
{
    struct pollfd p = {.fd = terminal ? STDIN_FILENO : -1, .events = POLLIN};
    char key = 0;
    if (poll(&p, 1, (int)(seconds * 1000)) > 0 && read(STDIN_FILENO, &key, 1) <= 0)
        return true;
    return key == 'q' || key == 'Q' || key == 3;
}

static int rounds_run(const struct top_args *a, bool terminal, struct error *err)
{
    struct sample before = {0}, now;
    int ret = sample_take(&before, err);
    bool ended = false;
    for (unsigned long n = 0; !ret && !ended && (!a->rounds || n < a->rounds); n++) {
        if (n || !terminal)
            ended = wait_key(a->delay, terminal);
        if (ended)
            break;
        ret = sample_take(&now, err);
        if (ret)
            break;
        json_t *all = round_figures(&now, &before);
        if (a->json) {
            json_dumpf(all, stdout, JSON_COMPACT | JSON_REAL_PRECISION(6));
            printf("\n");
            fflush(stdout);
        } else {
            table_print(all, terminal);
        }
        json_decref(all);
        json_decref(before.vms);
        before = now;
    }
    json_decref(before.vms);
    return ret;
}

int cli_top(int argc, char **argv)
{
    struct top_args args;
    struct error err;
    struct termios saved;
    int ret = parse(argc, argv, &args, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    bool terminal = !args.json && isatty(STDOUT_FILENO) && !tcgetattr(STDIN_FILENO, &saved);
    if (terminal) { // keys come one by one, unseen; ^C is a key, so that the terminal is restored
        struct termios raw = saved;
        raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO | ISIG);
        tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    }
    ret = rounds_run(&args, terminal, &err);
    if (terminal)
        tcsetattr(STDIN_FILENO, TCSANOW, &saved);
    return ret ? cli_fail(&err) : EXIT_OK;
}
