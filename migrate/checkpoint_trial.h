// SPDX-License-Identifier: Apache-2.0
// Checkpoints against random failures: the policy of migrate/checkpoint_policy.h in a world without
// a clock. Pure; the same seed gives the same figures on every machine.
#pragma once

#include <stdint.h>
#include <stdio.h>

#include "migrate/checkpoint_policy.h"
#include "migrate/young.h"

struct trial_params {
    struct young_model model;
    enum young_form form;
    double interval;   // between checkpoints, seconds; 0: as the policy says, which measures C
    double scatter;    // each checkpoint costs C times 1 - scatter to 1 + scatter
    unsigned failures; // ends after so many
    uint64_t seed;
};

// Seconds. wall = useful + checkpoints + repeated + restarts.
struct trial_result {
    double wall, useful;
    double checkpoints; // guest time they cost
    double repeated;    // work that had been done before
    double restarts;
    double interval; // mean
    uint64_t nr_checkpoints;
    double loss; // 1 - useful / wall
};

enum { TRIAL_STEPS_MAX = 200 * 1000 * 1000, TRIAL_POINTS = 13 };

// -E2BIG: more than TRIAL_STEPS_MAX checkpoints would be made.
int trial_run(const struct trial_params *params, struct trial_result *result, struct error *err);

// A trial by the policy, and one at each of some intervals around it.
struct trial_point {
    double interval, model; // model: the loss that migrate/young.h expects
    struct trial_result result;
};
struct trial_sweep {
    struct trial_params params;
    double best, best_loss;     // optimum of the model
    double chosen, chosen_loss; // what the policy takes if it knows C exactly
    struct trial_result policy;
    struct trial_point points[TRIAL_POINTS]; // those not shorter than the latency
    unsigned nr_points;                      // at least one
};
int trial_sweep(const struct trial_params *params, struct trial_sweep *sweep, struct error *err);

// The curve of the model, the trials on it, and the optimum, as SVG text (caller frees; NULL: no
// memory).
char *trial_plot(const struct trial_sweep *sweep);
