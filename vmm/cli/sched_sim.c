// SPDX-License-Identifier: Apache-2.0
// `ferry sched sim`: the scheduler on virtual time, to see what it would do with a workload.
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "sched/gantt.h"
#include "sched/sim_load.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/sched.h"
#include "vmm/util.h"

enum { LOG_EVENTS = 1 << 18 };

struct options {
    const char *path, *svg, *scheduler, *placement;
    const char *slice_ms, *window_ms;
    bool json;
};

struct outcome {
    struct sim_workload work;
    struct record_log log;
};

static void help(void)
{
    printf("Runs a workload on virtual time, under one scheduler or each of four, and says what\n"
           "every VM got of the pCPUs and how long it waited.\n\n"
           "usage: ferry sched sim WORKLOAD.json [OPTIONS]\n\n"
           "  -s, --scheduler NAME   fair (all VMs the same), proportional (by weight), credit\n"
           "                         (those that wake go first), credit-cap (and caps hold, as\n"
           "                         ferry sched daemon does it); default: each in turn\n"
           "  -p, --placement NAME   where a vCPU goes that wakes: to the pCPU with the shortest\n"
           "                         queue (length) or the least weight (weight)\n"
           "      --slice MS         time slice, 1 to 1000\n"
           "      --svg FILE         draw who ran where, and the credits (of credit-cap if no\n"
           "                         --scheduler is given)\n"
           "      --window FROM-TO   the ms that are drawn, e.g. 0-500\n"
           "  -j, --json             the results as JSON\n"
           "  -h, --help             this text\n\n"
           "examples:\n"
           "  ferry sched sim sched/workloads/two-to-one.json\n"
           "  ferry sched sim sched/workloads/latency.json --slice 5 -s credit --svg run.svg\n");
}

static int parse(int argc, char **argv, struct options *o, struct error *err)
{
    static const struct option options[] = {{"scheduler", required_argument, NULL, 's'},
                                            {"placement", required_argument, NULL, 'p'},
                                            {"slice", required_argument, NULL, 'l'},
                                            {"svg", required_argument, NULL, 'v'},
                                            {"window", required_argument, NULL, 'w'},
                                            {"json", no_argument, NULL, 'j'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    int opt;
    *o = (struct options) {0};
    opterr = 0;
    optind = 0;
    while ((opt = getopt_long(argc, argv, "s:p:jh", options, NULL)) != -1) {
        switch (opt) {
        case 's':
            o->scheduler = optarg;
            break;
        case 'p':
            o->placement = optarg;
            break;
        case 'l':
            o->slice_ms = optarg;
            break;
        case 'v':
            o->svg = optarg;
            break;
        case 'w':
            o->window_ms = optarg;
            break;
        case 'j':
            o->json = true;
            break;
        case 'h':
            help();
            return 1;
        default:
            return error_set(err, -EINVAL, "sched sim: bad option '%.40s' (ferry sched sim --help)",
                             argv[optind - 1]);
        }
    }
    if (argc - optind != 1)
        return error_set(err, -EINVAL, "sched sim: name one workload (ferry sched sim --help)");
    o->path = argv[optind];
    return 0;
}

static int apply_slice(struct sim_workload *w, const char *text, struct error *err)
{
    char *end;
    double ms = strtod(text, &end);
    struct credit_params *params = &w->config.params;
    if ((*end && strcmp(end, "ms")) || !(ms >= CREDIT_SLICE_MIN_MS && ms <= CREDIT_SLICE_MAX_MS))
        return error_set(err, -EINVAL, "--slice '%.20s': must be %d to %d ms", text,
                         CREDIT_SLICE_MIN_MS, CREDIT_SLICE_MAX_MS);
    params->slice_ns = (uint64_t)(ms * 1e6);
    if (params->tick_ns > params->slice_ns)
        params->tick_ns = params->slice_ns;
    if (params->ratelimit_ns > params->slice_ns)
        params->ratelimit_ns = params->slice_ns;
    return 0;
}

static int apply_window(struct sim_workload *w, const char *text, struct error *err)
{
    double from, to;
    char more;
    if (sscanf(text, "%lf-%lf%c", &from, &to, &more) != 2 || !(from >= 0 && to > from && to < 1e9))
        return error_set(err, -EINVAL, "--window '%.20s': must be FROM-TO in ms, e.g. 0-500", text);
    w->draw_from_ns = (uint64_t)(from * 1e6);
    w->draw_to_ns = (uint64_t)(to * 1e6);
    return 0;
}

static int load(struct sim_workload *w, const struct options *o, struct error *err)
{
    int ret = sim_load(w, o->path, err);
    if (!ret && o->scheduler)
        ret = sim_scheduler_parse(o->scheduler, &w->config.scheduler, err);
    if (!ret && o->placement)
        ret = sim_placement_parse(o->placement, &w->config.params.placement, err);
    if (!ret && o->slice_ms)
        ret = apply_slice(w, o->slice_ms, err);
    if (!w->draw_to_ns)
        w->draw_to_ns = w->draw_from_ns + 500000000;
    if (!ret && o->window_ms)
        ret = apply_window(w, o->window_ms, err);
    if (w->draw_to_ns > w->config.duration_ns)
        w->draw_to_ns = w->config.duration_ns;
    return ret;
}

static void print_result(json_t *result)
{
    size_t i;
    json_t *vm;
    printf("%s, placement by %s, slice %g ms: Jain index %.4f, idle %.0f ms\n",
           json_string_value(json_object_get(result, "scheduler")),
           json_string_value(json_object_get(result, "placement")),
           json_real_value(json_object_get(result, "slice_ms")),
           json_real_value(json_object_get(result, "jain")),
           json_real_value(json_object_get(result, "idle_ms")));
    printf("  %-12s %6s %4s %5s %8s %8s %9s %9s %9s %9s %7s\n", "VM", "weight", "cap", "vCPUs",
           "pCPUs", "due", "switches", "moves", "wake p50", "wake p99", "max ms");
    json_array_foreach(json_object_get(result, "vms"), i, vm)
    {
        printf("  %-12.12s %6lld %4lld %5lld %8.4f %8.4f %9lld %9lld %9.3f %9.3f %7.2f\n",
               json_string_value(json_object_get(vm, "name")),
               json_integer_value(json_object_get(vm, "weight")),
               json_integer_value(json_object_get(vm, "cap")),
               json_integer_value(json_object_get(vm, "vcpus")),
               json_real_value(json_object_get(vm, "share")),
               json_real_value(json_object_get(vm, "ideal")),
               json_integer_value(json_object_get(vm, "switches")),
               json_integer_value(json_object_get(vm, "migrations")),
               json_real_value(json_object_get(vm, "wake_p50_us")) / 1000,
               json_real_value(json_object_get(vm, "wake_p99_us")) / 1000,
               json_real_value(json_object_get(vm, "wake_max_us")) / 1000);
    }
    printf("\n");
}

static const char *vm_name(const void *arg, uint32_t id)
{
    const struct sim_config *config = arg;
    return id && id <= config->nr_vms ? config->vms[id - 1].name : NULL;
}

static int draw(const struct outcome *out, const char *path, struct error *err)
{
    const struct sim_workload *w = &out->work;
    char title[SIM_TITLE_MAX + 64];
    snprintf(title, sizeof(title), "%s - %s, slice %g ms", *w->title ? w->title : "workload",
             sim_scheduler_name(w->config.scheduler), (double)w->config.params.slice_ns / 1e6);
    const struct gantt gantt = {.log = &out->log,
                                .title = title,
                                .from_ns = w->draw_from_ns,
                                .to_ns = w->draw_to_ns,
                                .nr_pcpus = w->config.params.nr_pcpus,
                                .name = vm_name,
                                .arg = &w->config};
    FILE *file = fopen(path, "we");
    if (!file)
        return error_errno(err, "%s", path);
    int ret = gantt_write(&gantt, file, err);
    if (fclose(file) && !ret)
        ret = error_errno(err, "%s", path);
    return ret;
}

// Runs under one scheduler. What is drawn is recorded up to its end only, so that the ring has it.
static int run(struct outcome *out, bool record, json_t **result, struct error *err)
{
    struct sim sim;
    struct sim_config config = out->work.config;
    if (record) {
        config.params.trace = record_event;
        config.params.trace_arg = &out->log;
    }
    int ret = sim_create(&sim, &config, err);
    if (ret)
        return ret;
    if (record)
        sim_run(&sim, out->work.draw_to_ns);
    sim.credit.params.trace = NULL;
    sim_run(&sim, config.duration_ns);
    sim_ideal(&sim);
    *result = sim_result(&sim);
    sim_destroy(&sim);
    return 0;
}

static int run_all(struct outcome *out, const struct options *o, struct error *err)
{
    const enum sim_scheduler only = out->work.config.scheduler;
    json_t *results = json_array(), *result;
    int ret = o->svg && record_init(&out->log, LOG_EVENTS)
                  ? error_set(err, -ENOMEM, "no memory for the record")
                  : 0;
    for (int i = 0; !ret && i < SIM_SCHEDULERS; i++) {
        if (o->scheduler && i != (int)only)
            continue;
        out->work.config.scheduler = (enum sim_scheduler)i;
        ret = run(out, o->svg && i == (int)only, &result, err);
        if (!ret)
            json_array_append_new(results, result);
    }
    out->work.config.scheduler = only;
    for (size_t i = 0; !ret && !o->json && i < json_array_size(results); i++)
        print_result(json_array_get(results, i));
    if (!ret && o->json && (json_dumpf(results, stdout, JSON_INDENT(2)) || putchar('\n') == EOF))
        ret = error_set(err, -EIO, "the results could not be written");
    json_decref(results);
    return ret;
}

int cli_sched_sim(int argc, char **argv)
{
    struct options o;
    struct error err = {0};
    struct outcome out = {0};
    int ret = parse(argc, argv, &o, &err);
    if (ret > 0)
        return EXIT_OK;
    if (!ret)
        ret = load(&out.work, &o, &err);
    if (!ret)
        ret = run_all(&out, &o, &err);
    if (!ret && o.svg)
        ret = draw(&out, o.svg, &err);
    record_free(&out.log);
    sim_workload_free(&out.work);
    return ret ? cli_fail(&err) : EXIT_OK;
}
