// SPDX-License-Identifier: Apache-2.0
// ferry checkpoint --explain and --simulate: the arithmetic, without a VM.
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "migrate/checkpoint_trial.h"
#include "vmm/cli/checkpoint.h"
#include "vmm/cli/cli.h"
#include "vmm/util.h"

static void model_of(const struct checkpoint_args *args, struct young_model *m)
{
    struct checkpoint_policy policy;
    checkpoint_policy_init(&policy, &args->settings);
    checkpoint_policy_model(&policy, m);
    if (args->cost > 0)
        m->cost = args->cost;
    if (args->write_time > 0)
        m->latency = args->write_time;
    m->latency = fmax(m->latency, m->cost);
}

static const char *span(double seconds, char text[FAILURES_TEXT_MAX])
{
    duration_format(seconds, text);
    return text;
}

json_t *checkpoint_model_json(const struct young_model *m, enum young_form form, double interval)
{
    return json_pack("{s:f, s:f, s:f, s:f, s:s, s:f, s:f, s:f, s:f}", "cost_s", m->cost,
                     "write_time_s", m->latency, "restore_time_s", m->restart, "mtbf_s", m->mtbf,
                     "form", form == YOUNG_DALY ? "daly" : "young", "interval_s", interval,
                     "expected_loss", young_loss(m, interval), "best_interval_s", young_best(m),
                     "best_loss", young_loss(m, young_best(m)));
}

static void row(const char *name, double seconds, const char *what)
{
    char text[FAILURES_TEXT_MAX];
    printf("  %-14s %10s   %s\n", name, span(seconds, text), what);
}

void checkpoint_model_print(const struct young_model *m, enum young_form form, double interval,
                            bool fixed, bool measured)
{
    double best = fmax(young_best(m), m->latency);
    bool small = m->cost <= m->mtbf * YOUNG_COST_MAX;
    row("C", m->cost,
        measured ? "guest time a checkpoint costs, measured" : "guest time a checkpoint costs");
    row("write time", m->latency, "until it is safe");
    row("R", m->restart, "from a failure until the guest runs again");
    row("MTBF", m->mtbf, "time between failures");
    row("T", interval,
        fixed                    ? "as it was asked for"
        : interval <= m->latency ? "no shorter than it takes to write one out"
        : !small                 ? "least loss: C is not small beside the MTBF"
        : form == YOUNG_DALY     ? "sqrt(2C(MTBF + R)) - C, Daly's form"
                                 : "sqrt(2C * MTBF), Young's form");
    printf("  %-14s %8.3g %%   of the time: checkpoints %.3g %%, work done again and restarts %.3g "
           "%%\n",
           "expected loss", young_loss(m, interval) * 100, m->cost / (interval + m->cost) * 100,
           (young_loss(m, interval) - m->cost / (interval + m->cost)) * 100);
    char text[FAILURES_TEXT_MAX];
    printf("  %-14s %8.3g %%   at T = %s\n", "least possible", young_loss(m, best) * 100,
           span(best, text));
}

int checkpoint_explain(const struct checkpoint_args *args, struct error *err)
{
    struct young_model m;
    model_of(args, &m);
    double asked = args->settings.interval;
    double interval = asked > 0 ? fmax(asked, m.latency) : young_choose(&m, args->settings.form);
    if (!args->json) {
        checkpoint_model_print(&m, args->settings.form, interval, asked > 0, false);
        return 0;
    }
    json_t *json = checkpoint_model_json(&m, args->settings.form, interval);
    json_dumpf(json, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(json);
    return 0;
}

// --- simulation

static json_t *result_json(double interval, double model, const struct trial_result *r)
{
    return json_pack("{s:f, s:f, s:f, s:I, s:f, s:f, s:f, s:f, s:f}", "interval_s", interval,
                     "expected_loss", model, "loss", r->loss, "checkpoints",
                     (json_int_t)r->nr_checkpoints, "wall_s", r->wall, "useful_s", r->useful,
                     "checkpoint_s", r->checkpoints, "repeated_s", r->repeated, "restart_s",
                     r->restarts);
}

static void print_json(const struct trial_sweep *s)
{
    json_t *points = json_array();
    for (unsigned i = 0; i < s->nr_points; i++)
        json_array_append_new(
            points, result_json(s->points[i].interval, s->points[i].model, &s->points[i].result));
    json_t *json =
        json_pack("{s:o, s:I, s:I, s:o, s:o}", "model",
                  checkpoint_model_json(&s->params.model, s->params.form, s->chosen), "failures",
                  (json_int_t)s->params.failures, "seed", (json_int_t)s->params.seed, "policy",
                  result_json(s->policy.interval, s->chosen_loss, &s->policy), "points", points);
    json_dumpf(json, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(json);
}

static void print_result(const char *name, double interval, double model,
                         const struct trial_result *r)
{
    char text[FAILURES_TEXT_MAX];
    printf("%-8s %10s %11llu %9.4f %% %9.4f %% %11.4f %% %9.4f %% %9.4f %%\n", name,
           span(interval, text), (unsigned long long)r->nr_checkpoints, model * 100, r->loss * 100,
           r->checkpoints / r->wall * 100, r->repeated / r->wall * 100,
           r->restarts / r->wall * 100);
}

static void print_table(const struct trial_sweep *s)
{
    const struct young_model *m = &s->params.model;
    checkpoint_model_print(m, s->params.form, s->chosen, false, false);
    printf("\n%u failures at each interval, seed %llu:\n\n%-8s %10s %11s %11s %11s %13s %11s "
           "%11s\n",
           s->params.failures, (unsigned long long)s->params.seed, "", "T", "checkpoints",
           "expected", "loss", "checkpoints", "repeated", "restarts");
    for (unsigned i = 0; i < s->nr_points; i++)
        print_result("", s->points[i].interval, s->points[i].model, &s->points[i].result);
    print_result("policy", s->policy.interval, s->chosen_loss, &s->policy);
}

static int plot_write(const struct trial_sweep *s, const char *path, struct error *err)
{
    autofree char *text = trial_plot(s);
    if (!text)
        return error_set(err, -ENOMEM, "no memory for the drawing");
    FILE *out = fopen(path, "we");
    if (!out)
        return error_errno(err, "%s", path);
    int ret = fputs(text, out) < 0 ? error_errno(err, "%s: writing", path) : 0;
    if (fclose(out) && !ret)
        ret = error_errno(err, "%s: writing", path);
    return ret;
}

int checkpoint_simulate(const struct checkpoint_args *args, struct error *err)
{
    struct trial_params params = {.form = args->settings.form,
                                  .scatter = 0.5,
                                  .failures = args->failures,
                                  .seed = args->seed};
    struct trial_sweep sweep;
    model_of(args, &params.model);
    int ret = trial_sweep(&params, &sweep, err);
    if (ret)
        return ret;
    if (args->json)
        print_json(&sweep);
    else
        print_table(&sweep);
    return args->svg ? plot_write(&sweep, args->svg, err) : 0;
}
