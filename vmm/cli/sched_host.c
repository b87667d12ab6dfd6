// SPDX-License-Identifier: Apache-2.0
// ferry sched daemon, status, top, set, trace: the scheduler of this host, and questions to it.
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sched/client.h"
#include "sched/daemon.h"
#include "sched/gantt.h"
#include "sched/record.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/sched.h"
#include "vmm/util.h"

// --- options; one parser for all of these commands

enum { FOR_DAEMON = 1, FOR_STATUS = 2, FOR_TOP = 4, FOR_SET = 8, FOR_TRACE = 16, FOR_EACH = 31 };

struct args {
    const char *socket, *svg;
    bool json;
    double delay;
    long count, last_ms;
    struct sched_daemon_config daemon;
    const char *rest[8];
    int nr_rest;
};

struct row {
    const char *name;
    char brief;
    unsigned commands;
    bool value;
    int (*set)(struct args *a, const char *text, struct error *err);
};

static int set_socket(struct args *a, const char *text, struct error *err)
{
    a->socket = text;
    return 0;
}

static int set_svg(struct args *a, const char *text, struct error *err)
{
    a->svg = text;
    return 0;
}

static int set_json(struct args *a, const char *text, struct error *err)
{
    a->json = true;
    return 0;
}

static int number(const char *text, double min, double max, double *out, struct error *err)
{
    char *end;
    errno = 0;
    *out = strtod(text, &end);
    if (end == text || *end || errno || !(*out >= min && *out <= max))
        return error_set(err, -EINVAL, "'%.40s': expected %g to %g", text, min, max);
    return 0;
}

static int set_delay(struct args *a, const char *text, struct error *err)
{
    return number(text, 0.1, 3600, &a->delay, err);
}

static int set_count(struct args *a, const char *text, struct error *err)
{
    double n;
    int ret = number(text, 1, 1e9, &n, err);
    a->count = ret ? 0 : (long)n;
    return ret;
}

static int set_last(struct args *a, const char *text, struct error *err)
{
    double n;
    int ret = number(text, 1, 1e9, &n, err);
    a->last_ms = ret ? 0 : (long)n;
    return ret;
}

// "30ms", "500us"; a plain number counts milliseconds.
static int time_set(const char *text, double min_ms, double max_ms, uint64_t *ns, struct error *err)
{
    char *end;
    errno = 0;
    double n = strtod(text, &end);
    if (!strcmp(end, "us"))
        n /= 1000;
    else if (*end && strcmp(end, "ms"))
        n = -1;
    if (end == text || errno || !(n >= min_ms && n <= max_ms))
        return error_set(err, -EINVAL, "'%.40s': expected %g to %g ms, e.g. 30ms or 500us", text,
                         min_ms, max_ms);
    *ns = (uint64_t)(n * 1e6);
    return 0;
}

static int set_slice(struct args *a, const char *text, struct error *err)
{
    return time_set(text, CREDIT_SLICE_MIN_MS, CREDIT_SLICE_MAX_MS, &a->daemon.slice_ns, err);
}

static int set_tick(struct args *a, const char *text, struct error *err)
{
    return time_set(text, CREDIT_SLICE_MIN_MS, CREDIT_SLICE_MAX_MS, &a->daemon.tick_ns, err);
}

static int set_ratelimit(struct args *a, const char *text, struct error *err)
{
    return time_set(text, 0.01, CREDIT_SLICE_MAX_MS, &a->daemon.ratelimit_ns, err);
}

static int set_pcpus(struct args *a, const char *text, struct error *err)
{
    struct sched_share share = {0};
    int ret = strchr(text, '/') || strstr(text, "soft") ? -EINVAL
                                                        : sched_affinity_parse(text, &share, err);
    a->daemon.pcpus = share.hard;
    return ret ? error_set(err, ret, "'%.80s': expected pCPUs like 0-3,8", text) : 0;
}

static int set_placement(struct args *a, const char *text, struct error *err)
{
    if (strcmp(text, "length") && strcmp(text, "weight"))
        return error_set(err, -EINVAL, "'%.40s': expected length or weight", text);
    a->daemon.placement = strcmp(text, "weight") ? CREDIT_BY_LENGTH : CREDIT_BY_WEIGHT;
    return 0;
}

static int set_weights(struct args *a, const char *text, struct error *err)
{
    if (strcmp(text, "vcpu") && strcmp(text, "vm"))
        return error_set(err, -EINVAL, "'%.40s': expected vcpu or vm", text);
    a->daemon.weight_per_vm = !strcmp(text, "vm");
    return 0;
}

static int set_mode(struct args *a, const char *text, struct error *err)
{
    char *end;
    long mode = strtol(text, &end, 8);
    if (end == text || *end || mode < 0600 || mode > 0777)
        return error_set(err, -EINVAL, "'%.40s': expected the socket's mode, e.g. 0660", text);
    a->daemon.mode = (mode_t)mode;
    return 0;
}

static int set_user_weight(struct args *a, const char *text, struct error *err)
{
    char *end;
    errno = 0;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || !n || n > UINT32_MAX)
        return error_set(err, -EINVAL, "'%.40s': expected a sum of weights, 1 to %u", text,
                         UINT32_MAX);
    a->daemon.user_weight = (uint32_t)n;
    return 0;
}

static int set_notice(struct args *a, const char *text, struct error *err)
{
    if (strcmp(text, "auto") && strcmp(text, "poll"))
        return error_set(err, -EINVAL, "'%.40s': expected auto or poll", text);
    a->daemon.no_records = !strcmp(text, "poll");
    return 0;
}

static int set_boost(struct args *a, const char *text, struct error *err)
{
    if (strcmp(text, "realtime") && strcmp(text, "none"))
        return error_set(err, -EINVAL, "'%.40s': expected realtime or none", text);
    a->daemon.no_boost = !strcmp(text, "none");
    return 0;
}

static const struct row rows[] = {
    {"socket", 's', FOR_EACH, true, set_socket},
    {"json", 'j', FOR_STATUS | FOR_TOP | FOR_TRACE, false, set_json},
    {"delay", 'd', FOR_TOP, true, set_delay},
    {"count", 'n', FOR_TOP, true, set_count},
    {"last", 'l', FOR_TRACE, true, set_last},
    {"svg", 0, FOR_TRACE, true, set_svg},
    {"pcpus", 'p', FOR_DAEMON, true, set_pcpus},
    {"slice", 0, FOR_DAEMON, true, set_slice},
    {"tick", 0, FOR_DAEMON, true, set_tick},
    {"ratelimit", 0, FOR_DAEMON, true, set_ratelimit},
    {"placement", 0, FOR_DAEMON, true, set_placement},
    {"weights", 0, FOR_DAEMON, true, set_weights},
    {"mode", 0, FOR_DAEMON, true, set_mode},
    {"user-weight", 0, FOR_DAEMON, true, set_user_weight},
    {"boost", 0, FOR_DAEMON, true, set_boost},
    {"notice", 0, FOR_DAEMON, true, set_notice},
};

static const struct row *row_of(int c, unsigned command)
{
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++)
        if (rows[i].commands & command && (c == 256 + (int)i || (c && rows[i].brief == c)))
            return &rows[i];
    return NULL;
}

static void getopt_tables(unsigned command, struct option *longs, char *shorts)
{
    *shorts++ = ':';
    *shorts++ = 'h';
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        if (!(rows[i].commands & command))
            continue;
        *longs++ = (struct option) {rows[i].name, rows[i].value ? required_argument : no_argument,
                                    NULL, 256 + (int)i};
        if (!rows[i].brief)
            continue;
        *shorts++ = rows[i].brief;
        if (rows[i].value)
            *shorts++ = ':';
    }
    *longs++ = (struct option) {"help", no_argument, NULL, 'h'};
    *longs = (struct option) {0};
    *shorts = 0;
}

// 0, 1 when help was printed, or an error.
static int parse(int argc, char **argv, unsigned command, int min, int max, const char *usage,
                 struct args *a, struct error *err)
{
    struct option longs[ARRAY_SIZE(rows) + 2];
    char shorts[2 * ARRAY_SIZE(rows) + 3];
    *a = (struct args) {.socket = SCHED_SOCKET, .delay = 1};
    getopt_tables(command, longs, shorts);
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
        const struct row *row = row_of(c, command);
        if (c == 'h') {
            printf("usage: %s\n", usage);
            return 1;
        }
        if (!row)
            return error_set(err, -EINVAL, "%s '%s' (ferry sched %s --help)",
                             c == ':' ? "a value is missing behind" : "unknown option",
                             argv[optind - 1], argv[0]);
        int ret = row->set(a, optarg, err);
        if (ret)
            return error_prefix(err, "--%s", row->name);
    }
    a->nr_rest = argc - optind;
    if (a->nr_rest < min || a->nr_rest > max)
        return error_set(err, -EINVAL, "%d arguments; usage: %.*s", a->nr_rest,
                         (int)strcspn(usage, "\n"), usage);
    for (int i = 0; i < a->nr_rest; i++)
        a->rest[i] = argv[optind + i];
    return 0;
}

// --- daemon

static struct sched_daemon *to_stop; // of the signal handler

static void on_end(int sig)
{
    sched_daemon_stop(to_stop);
}

static int daemon_run(const struct args *a, struct error *err)
{
    const struct log log = {.name = "sched",
                            .level = LOG_INFO,
                            .fd = STDERR_FILENO,
                            .journal = log_is_journal(STDERR_FILENO)};
    struct sched_daemon_config config = a->daemon;
    struct sigaction action = {.sa_handler = on_end};
    config.socket = a->socket;
    config.log = &log;
    if (!strcmp(a->socket, SCHED_SOCKET) && mkdir("/run/ferry", 0755) && errno != EEXIST)
        return error_errno(err, "/run/ferry");
    int ret = sched_daemon_create(&to_stop, &config, err);
    if (ret)
        return ret;
    signal(SIGPIPE, SIG_IGN);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    log_write(&log, LOG_INFO, "scheduling at %s", a->socket);
    ret = sched_daemon_run(to_stop, err);
    sched_daemon_destroy(to_stop);
    return ret;
}

int cli_sched_daemon(int argc, char **argv)
{
    static const char usage[] =
        "ferry sched daemon [OPTIONS]\n\n"
        "Schedules the vCPUs of all VMs that were started with --sched, until it is told to end;\n"
        "then, and if it dies, they run on under Linux's scheduler.\n"
        "  -s, --socket PATH      where VMs find it (default " SCHED_SOCKET ")\n"
        "      --mode OCTAL       of the socket (default 0600: VMs of its own user)\n"
        "  -p, --pcpus LIST       the pCPUs to schedule, e.g. 2-7 (default: all it may use)\n"
        "      --slice TIME       a vCPU's turn, 1 to 1000 ms (default 5ms)\n"
        "      --tick TIME        a BOOST lasts that long in a slice (default 10ms, or half a "
        "slice)\n"
        "      --ratelimit TIME   nobody is preempted sooner; = slice: not preemptive (default "
        "1ms)\n"
        "      --placement KIND   a vCPU that wakes goes to the shortest queue: by length "
        "(default)\n"
        "                         or by weight\n"
        "      --weights OF       a weight is each vCPU's (vcpu, default) or the VM's (vm)\n"
        "      --user-weight N    what the weights of a user's vCPUs may add up to, of users other "
        "than\n"
        "                         root and its own (default: anything)\n"
        "      --boost HOW        of a vCPU that wakes with credit: realtime (default, if it may "
        "be\n"
        "                         given: it is before all other processes for 1 ms) or none\n"
        "      --notice HOW       of sleeping vCPUs: auto (default: the kernel's records where "
        "they\n"
        "                         can be had) or poll\n"
        "examples:\n"
        "  ferry sched daemon --pcpus 2-7\n"
        "  ferry sched daemon --mode 0666 --user-weight 1024   # VMs of all users, none with more\n"
        "  ferry sched daemon --slice 30ms                     # fewer switches, coarser shares";
    struct args a;
    struct error err;
    int ret = parse(argc, argv, FOR_DAEMON, 0, 0, usage, &a, &err);
    if (!ret)
        ret = daemon_run(&a, &err);
    return ret < 0 ? cli_fail(&err) : EXIT_OK;
}

// --- status, top

static int status_get(const struct args *a, json_t **out, struct error *err)
{
    const struct sched_ask ask = {.head = sched_head(SCHED_STATUS)};
    autoclose int fd = -1;
    int ret = sched_call(a->socket, &ask, sizeof(ask), SCHED_DOCUMENT, &fd, err);
    if (ret)
        return ret;
    json_error_t bad;
    *out = json_loadfd(fd, 0, &bad);
    return *out ? 0 : error_set(err, -EPROTO, "the scheduler's status: %s", bad.text);
}

static double of(json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

static const char *text_of(json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

static void pcpus_print(json_t *status)
{
    size_t i;
    json_t *p;
    json_array_foreach(json_object_get(status, "pcpus"), i, p)
    {
        json_t *runs = json_object_get(p, "runs");
        printf("pCPU %-3.0f ", of(p, "pcpu"));
        if (runs)
            printf("runs %s/%.0f", text_of(runs, "vm"), of(runs, "vcpu"));
        else
            printf("idle");
        printf(", %.0f wait\n", of(p, "queued"));
    }
}

static void vcpu_print(json_t *vm, json_t *v)
{
    printf("%-16s %4.0f %7s %7.0f %5.0f %-8s %-5s %4.0f %8.0f %12.3f %12.3f%s\n",
           text_of(vm, "name"), of(v, "index"), "", of(vm, "weight"), of(vm, "cap"),
           text_of(v, "state"), text_of(v, "class"), of(v, "pcpu"), of(v, "credit"),
           of(v, "run_ns") / 1e9, of(v, "wait_ns") / 1e9,
           json_is_false(json_object_get(v, "obeys")) ? "  does not obey" : "");
}

static void status_print(json_t *status)
{
    size_t i, k;
    json_t *vm, *v;
    printf("slice %.1f ms, rate limit %.1f ms, placement by %s; %.0f turns\n",
           of(status, "slice_ns") / 1e6, of(status, "ratelimit_ns") / 1e6,
           text_of(status, "placement"), of(status, "turns"));
    pcpus_print(status);
    printf("%-16s %4s %7s %7s %5s %-8s %-5s %4s %8s %12s %12s\n", "VM", "VCPU", "", "WEIGHT", "CAP",
           "STATE", "CLASS", "PCPU", "CREDIT", "RUN s", "WAIT s");
    json_array_foreach(json_object_get(status, "vms"), i, vm)
    {
        json_array_foreach(json_object_get(vm, "vcpus"), k, v)
        {
            vcpu_print(vm, v);
        }
    }
}

static void json_print(json_t *json)
{
    json_dumpf(json, stdout, JSON_INDENT(2));
    printf("\n");
    fflush(stdout);
}

int cli_sched_status(int argc, char **argv)
{
    struct args a;
    struct error err;
    json_t *status = NULL;
    int ret = parse(argc, argv, FOR_STATUS, 0, 0,
                    "ferry sched status [--socket PATH] [--json]\n\n"
                    "Who runs where, and what each vCPU has had. Credits are 100 us of CPU time.\n"
                    "examples:\n"
                    "  ferry sched status\n"
                    "  ferry sched status --json | jq '.vms[] | {name, run_ns}'",
                    &a, &err);
    if (ret > 0)
        return EXIT_OK;
    if (!ret)
        ret = status_get(&a, &status, &err);
    if (ret)
        return cli_fail(&err);
    if (a.json)
        json_print(status);
    else
        status_print(status);
    json_decref(status);
    return EXIT_OK;
}

static json_t *vm_before(json_t *before, json_t *vm)
{
    size_t i;
    json_t *other;
    json_array_foreach(json_object_get(before, "vms"), i, other)
    {
        if (of(other, "id") == of(vm, "id"))
            return other;
    }
    return NULL;
}

static double sum_of(json_t *vm, const char *key)
{
    size_t i;
    json_t *v;
    double sum = 0;
    json_array_foreach(json_object_get(vm, "vcpus"), i, v)
    {
        sum += of(v, key);
    }
    return sum;
}

// What each VM had between two answers, percent of one pCPU.
static json_t *top_rows(json_t *before, json_t *now)
{
    size_t i;
    json_t *vm, *rows_out = json_array();
    double passed = of(now, "time_ns") - of(before, "time_ns");
    json_array_foreach(json_object_get(now, "vms"), i, vm)
    {
        json_t *was = vm_before(before, vm);
        if (!was || passed <= 0)
            continue;
        json_array_append_new(
            rows_out,
            json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f}", "vm", text_of(vm, "name"), "weight",
                      of(vm, "weight"), "cap", of(vm, "cap"), "cpu",
                      (of(vm, "run_ns") - of(was, "run_ns")) * 100 / passed, "wait",
                      (sum_of(vm, "wait_ns") - sum_of(was, "wait_ns")) * 100 / passed, "switches",
                      (sum_of(vm, "switches") - sum_of(was, "switches")) * 1e9 / passed, "wakes",
                      (sum_of(vm, "wakes") - sum_of(was, "wakes")) * 1e9 / passed));
    }
    return rows_out;
}

static void top_print(json_t *rows_in)
{
    size_t i;
    json_t *r;
    if (isatty(STDOUT_FILENO))
        printf("\033[H\033[2J");
    printf("%-16s %7s %5s %7s %7s %10s %10s\n", "VM", "WEIGHT", "CAP", "CPU %", "WAIT %",
           "SWITCHES/s", "WAKES/s");
    json_array_foreach(rows_in, i, r)
    {
        printf("%-16s %7.0f %5.0f %7.1f %7.1f %10.0f %10.0f\n", text_of(r, "vm"), of(r, "weight"),
               of(r, "cap"), of(r, "cpu"), of(r, "wait"), of(r, "switches"), of(r, "wakes"));
    }
    fflush(stdout);
}

static int top_run(const struct args *a, struct error *err)
{
    json_t *before = NULL, *now = NULL;
    int ret = status_get(a, &before, err);
    for (long i = 0; !ret && (!a->count || i < a->count); i++) {
        usleep((useconds_t)(a->delay * 1e6));
        ret = status_get(a, &now, err);
        if (ret)
            break;
        json_t *rows_out = top_rows(before, now);
        if (a->json)
            json_print(rows_out);
        else
            top_print(rows_out);
        json_decref(rows_out);
        json_decref(before);
        before = now;
    }
    json_decref(before);
    return ret;
}

int cli_sched_top(int argc, char **argv)
{
    struct args a;
    struct error err;
    int ret = parse(argc, argv, FOR_TOP, 0, 0,
                    "ferry sched top [--socket PATH] [--delay SECONDS] [--count N] [--json]\n\n"
                    "What each VM has of the pCPUs, and waits for, in percent of one pCPU.\n"
                    "examples:\n"
                    "  ferry sched top\n"
                    "  ferry sched top --delay 10 --count 6 --json     # a minute, for a program",
                    &a, &err);
    if (!ret)
        ret = top_run(&a, &err);
    return ret < 0 ? cli_fail(&err) : EXIT_OK;
}

// --- set

int cli_sched_set(int argc, char **argv)
{
    struct args a;
    struct error err;
    struct sched_set set = {.head = sched_head(SCHED_SET)};
    int ret = parse(argc, argv, FOR_SET, 2, 4,
                    "ferry sched set VM weight=N cap=PERCENT affinity=PCPUS [--socket PATH]\n\n"
                    "Changes what is named, within a slice; the VM keeps it for the next daemon.\n"
                    "example: ferry sched set web weight=512 cap=150",
                    &a, &err);
    if (ret > 0)
        return EXIT_OK;
    if (!ret && strlen(a.rest[0]) >= sizeof(set.name))
        ret = error_set(&err, -EINVAL, "VM name '%.80s': too long", a.rest[0]);
    if (!ret)
        strcpy(set.name, a.rest[0]);
    for (int i = 1; i < a.nr_rest && !ret; i++) {
        char key[16] = "";
        const char *equals = strchr(a.rest[i], '=');
        size_t len = equals ? (size_t)(equals - a.rest[i]) : sizeof(key);
        if (len < sizeof(key))
            memcpy(key, a.rest[i], len);
        ret = equals ? sched_share_parse(key, equals + 1, &set.share, &err)
                     : error_set(&err, -EINVAL,
                                 "'%.80s': expected weight=, cap= or affinity=", a.rest[i]);
    }
    if (!ret)
        ret = sched_call(a.socket, &set, sizeof(set), SCHED_OK, NULL, &err);
    return ret ? cli_fail(&err) : EXIT_OK;
}

// --- trace

struct trace {
    struct sched_trace_head head;
    struct sched_trace_name *names;
    struct record_log log;
};

static void trace_free(struct trace *t)
{
    free(t->names);
    record_free(&t->log);
}

static int trace_read(int fd, struct trace *t, struct error *err)
{
    enum { NAMES_MAX = 65536, RECORDS_MAX = 1 << 22 };
    *t = (struct trace) {0};
    if (read_all(fd, &t->head, sizeof(t->head)) || t->head.magic != SCHED_MAGIC ||
        t->head.version != SCHED_VERSION || t->head.nr_names > NAMES_MAX ||
        t->head.nr_records > RECORDS_MAX || t->head.nr_pcpus > CREDIT_PCPUS_MAX)
        return error_set(err, -EPROTO, "the scheduler's trace is damaged");
    t->names = calloc(t->head.nr_names + 1u, sizeof(t->names[0]));
    if (!t->names || record_init(&t->log, t->head.nr_records + 1u))
        return error_set(err, -ENOMEM, "no memory for the trace");
    t->log.nr = t->head.nr_records;
    if (read_all(fd, t->names, t->head.nr_names * sizeof(t->names[0])) ||
        read_all(fd, t->log.ring, t->head.nr_records * sizeof(t->log.ring[0])))
        return error_set(err, -EPROTO, "the scheduler's trace is cut short");
    return 0;
}

static int trace_get(const struct args *a, struct trace *t, struct error *err)
{
    const struct sched_ask ask = {.head = sched_head(SCHED_TRACE), .last_ms = (uint32_t)a->last_ms};
    autoclose int fd = -1;
    *t = (struct trace) {0};
    int ret = sched_call(a->socket, &ask, sizeof(ask), SCHED_DOCUMENT, &fd, err);
    return ret ? ret : trace_read(fd, t, err);
}

static const char *name_of(const struct trace *t, uint32_t vm)
{
    for (uint32_t i = 0; i < t->head.nr_names; i++)
        if (t->names[i].vm == vm)
            return t->names[i].name;
    return "?";
}

static int cpu_of(const struct trace *t, unsigned pcpu)
{
    return pcpu < t->head.nr_pcpus ? t->head.cpus[pcpu] : -1;
}

static void trace_print(const struct trace *t)
{
    for (size_t i = 0; i < record_count(&t->log); i++) {
        const struct record *r = record_at(&t->log, i);
        printf("%12.3f ms  %-8s %s/%u pCPU %d, %s, credit %.1f\n",
               (double)(int64_t)(r->at_ns - t->head.now_ns) / 1e6, credit_event_name(r->kind),
               name_of(t, r->vm), r->vcpu, cpu_of(t, r->pcpu), credit_class_name(r->class),
               (double)r->credit_ns / CREDIT_NS);
    }
}

static void trace_json(const struct trace *t)
{
    size_t i;
    json_t *event, *names = json_object(), *cpus = json_array();
    json_t *events = record_json(&t->log, 0, UINT64_MAX);
    char id[16];
    for (uint32_t k = 0; k < t->head.nr_names; k++) {
        snprintf(id, sizeof(id), "%u", t->names[k].vm);
        json_object_set_new(names, id, json_string(t->names[k].name));
    }
    for (unsigned p = 0; p < t->head.nr_pcpus; p++)
        json_array_append_new(cpus, json_integer(t->head.cpus[p]));
    json_array_foreach(events, i, event)
    {
        json_object_set_new(event, "name", json_string(name_of(t, record_at(&t->log, i)->vm)));
    }
    json_t *all =
        json_pack("{s:I, s:I, s:o, s:o, s:o}", "now_ns", (json_int_t)t->head.now_ns, "slice_ns",
                  (json_int_t)t->head.slice_ns, "pcpus", cpus, "vms", names, "events", events);
    json_print(all);
    json_decref(all);
}

static const char *gantt_name(const void *trace, uint32_t vm)
{
    return name_of(trace, vm);
}

// From the oldest decision to now, or what --last asked for.
static int trace_draw(const struct args *a, const struct trace *t, struct error *err)
{
    char title[64];
    const size_t nr = record_count(&t->log);
    const uint64_t last_ns = (uint64_t)a->last_ms * 1000000;
    uint64_t from = nr ? record_at(&t->log, 0)->at_ns : t->head.now_ns;
    if (last_ns && t->head.now_ns - from > last_ns)
        from = t->head.now_ns - last_ns;
    snprintf(title, sizeof(title), "ferry sched: the last %.0f ms, slice %g ms",
             (double)(t->head.now_ns - from) / 1e6, (double)t->head.slice_ns / 1e6);
    const struct gantt gantt = {.log = &t->log,
                                .title = title,
                                .from_ns = from,
                                .to_ns = t->head.now_ns,
                                .zero_ns = t->head.now_ns,
                                .nr_pcpus = t->head.nr_pcpus,
                                .cpus = t->head.cpus,
                                .name = gantt_name,
                                .arg = t};
    FILE *out = fopen(a->svg, "we");
    if (!out)
        return error_errno(err, "%s", a->svg);
    int ret = gantt_write(&gantt, out, err);
    if (fclose(out) && !ret)
        ret = error_errno(err, "%s", a->svg);
    return ret;
}

int cli_sched_trace(int argc, char **argv)
{
    struct args a;
    struct error err;
    struct trace trace = {0};
    int ret =
        parse(argc, argv, FOR_TRACE, 0, 0,
              "ferry sched trace [--socket PATH] [--last MS] [--json] [--svg FILE]\n\n"
              "The newest decisions (65,536 at most), a line each; times count back from "
              "now.\n"
              "examples:\n"
              "  ferry sched trace --last 100\n"
              "  ferry sched trace --last 500 --svg run.svg      # who ran where, and credits",
              &a, &err);
    if (ret > 0)
        return EXIT_OK;
    if (!ret)
        ret = trace_get(&a, &trace, &err);
    if (!ret && a.svg)
        ret = trace_draw(&a, &trace, &err);
    else if (!ret && a.json)
        trace_json(&trace);
    else if (!ret)
        trace_print(&trace);
    trace_free(&trace);
    return ret ? cli_fail(&err) : EXIT_OK;
}
