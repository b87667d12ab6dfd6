// SPDX-License-Identifier: Apache-2.0
#include "migrate/checkpoint_trial.h"

#include <errno.h>
#include <math.h>

#include "vmm/util.h"

// --- random numbers

// A counter of odd step, and a mixer that makes each value look like no other's neighbour.
static uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93;
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93;
    return x ^ (x >> 32);
}

// 0 < u <= 1
static double random_unit(uint64_t *state)
{
    return (double)((random_next(state) >> 11) + 1) / 9007199254740992.0;
}

static double random_span(uint64_t *state, double mean)
{
    return -log(random_unit(state)) * mean;
}

// --- one life after the other

struct world {
    const struct trial_params *params;
    struct trial_result *result;
    struct checkpoint_policy policy;
    uint64_t failures, costs; // random streams, so that every trial meets the same failures
    double left;              // until the next failure
    double done, saved;       // work, and what of it would survive
    unsigned failed;
    double intervals;
};

// Time passes, unless the failure comes first: then only so much, and false.
static bool pass(struct world *w, double span, double *spent)
{
    bool lives = span < w->left;
    double step = lives ? span : w->left;
    *spent += step;
    w->result->wall += step;
    w->left -= step;
    return lives;
}

static void fail(struct world *w)
{
    w->failed++;
    w->left = random_span(&w->failures, w->params->model.mtbf);
    w->result->repeated += w->done - w->saved;
    w->done = w->saved;
}

// The guest works for `span`. Work is counted at once, and taken back by a failure.
static bool work(struct world *w, double span)
{
    return pass(w, span, &w->done);
}

static bool checkpoint(struct world *w)
{
    const struct young_model *m = &w->params->model;
    double scatter = (2 * random_unit(&w->costs) - 1) * w->params->scatter;
    double cost = m->cost * (1 + scatter), latency = fmax(m->latency, cost), captured = w->done;
    const struct checkpoint_measure made = {.full = checkpoint_policy_full(&w->policy),
                                            .pause_ns = (uint64_t)(cost * 1e9),
                                            .total_ns = (uint64_t)(latency * 1e9),
                                            .bytes = 1};
    if (!pass(w, cost, &w->result->checkpoints) || !work(w, latency - cost))
        return false;
    w->saved = captured;
    w->result->nr_checkpoints++;
    uint64_t due = checkpoint_policy_done(&w->policy, &made, 0);
    double interval = (double)due / 1e9 - cost;
    w->intervals += interval;
    return work(w, interval - (latency - cost));
}

static bool restart(struct world *w)
{
    return pass(w, w->params->model.restart, &w->result->restarts);
}

static void live(struct world *w)
{
    if (w->failed && !restart(w))
        return;
    if (!work(w, (double)checkpoint_policy_begin(&w->policy, 0) / 1e9))
        return;
    while (checkpoint(w))
        ;
}

int trial_run(const struct trial_params *params, struct trial_result *result, struct error *err)
{
    struct checkpoint_settings settings;
    checkpoint_settings_default(&settings);
    settings.form = params->form;
    settings.interval = params->interval;
    settings.mtbf = params->model.mtbf;
    settings.restart = params->model.restart;
    struct world w = {.params = params,
                      .result = result,
                      .failures = params->seed * 2 + 1,
                      .costs = ~params->seed};
    *result = (struct trial_result) {0};
    double interval = params->interval > 0 ? fmax(params->interval, params->model.latency)
                                           : young_choose(&params->model, params->form);
    if (params->failures * (params->model.mtbf / interval) > TRIAL_STEPS_MAX)
        return error_set(err, -E2BIG,
                         "%u failures, a checkpoint each %g s: more than %d of these; take fewer",
                         params->failures, interval, TRIAL_STEPS_MAX);
    checkpoint_policy_init(&w.policy, &settings);
    w.left = random_span(&w.failures, params->model.mtbf);
    while (w.failed < params->failures) {
        live(&w);
        fail(&w);
    }
    result->useful = w.done;
    result->interval = result->nr_checkpoints ? w.intervals / (double)result->nr_checkpoints : 0;
    result->loss = result->wall > 0 ? 1 - result->useful / result->wall : 0;
    return 0;
}

int trial_sweep(const struct trial_params *params, struct trial_sweep *s, struct error *err)
{
    const struct young_model *m = &params->model;
    s->params = *params;
    s->params.interval = 0;
    s->best = young_best(m);
    s->best_loss = young_loss(m, s->best);
    s->chosen = young_choose(m, params->form);
    s->chosen_loss = young_loss(m, s->chosen);
    int ret = trial_run(&s->params, &s->policy, err);
    s->nr_points = 0;
    for (unsigned i = 0; !ret && i < TRIAL_POINTS; i++) { // 1/8 to 8 times the best, in half powers
        struct trial_params fixed = *params;
        struct trial_point *point = &s->points[s->nr_points];
        fixed.interval = point->interval = fmax(s->best, m->latency) * exp2((double)i / 2 - 3);
        if (fixed.interval < m->latency)
            continue;
        s->nr_points++;
        point->model = young_loss(m, point->interval);
        ret = trial_run(&fixed, &point->result, err);
    }
    return ret;
}
