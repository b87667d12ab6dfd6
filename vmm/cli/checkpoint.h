// SPDX-License-Identifier: Apache-2.0
// The arguments of `ferry checkpoint` in all its forms.
#pragma once

#include <jansson.h>
#include <stdbool.h>

#include "migrate/checkpoint_policy.h"
#include "vmm/error.h"

struct checkpoint_args {
    struct checkpoint_settings settings;
    double cost, write_time; // seconds, of a model that is given; 0: not given
    bool mtbf_given;
    const char *failure_log, *svg, *vm;
    unsigned failures;
    uint64_t seed;
    bool json;
};

json_t *checkpoint_model_json(const struct young_model *m, enum young_form form, double interval);
// Prints what the model makes of the given figures.
int checkpoint_explain(const struct checkpoint_args *args, struct error *err);
// Runs the policy against random failures.
int checkpoint_simulate(const struct checkpoint_args *args, struct error *err);
