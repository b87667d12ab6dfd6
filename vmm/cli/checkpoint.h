// SPDX-License-Identifier: Apache-2.0
// The arguments of `ferry checkpoint` in all its forms.
#pragma once

#include <jansson.h>
#include <stdbool.h>

#include "migrate/checkpoint_policy.h"
#include "vmm/error.h"

struct checkpoint_args {
    struct checkpoint_settings settings;
    double cost, write_time;                    // seconds, of a model that is given; 0: not given
    const char *interval, *mtbf, *restore_time; // as given, or NULL
    const char *failure_log, *svg, *dir, *vm;
    unsigned failures;
    uint64_t seed;
    bool json;
};

json_t *checkpoint_model_json(const struct young_model *m, enum young_form form, double interval);
// `fixed`: the interval was asked for. `measured`: C was.
void checkpoint_model_print(const struct young_model *m, enum young_form form, double interval,
                            bool fixed, bool measured);
// Prints what the model makes of the given figures.
int checkpoint_explain(const struct checkpoint_args *args, struct error *err);
// Runs the policy against random failures.
int checkpoint_simulate(const struct checkpoint_args *args, struct error *err);

// Of a running VM.
int checkpoint_begin(const struct checkpoint_args *args, struct error *err);
int checkpoint_end(const struct checkpoint_args *args, struct error *err);
int checkpoint_explain_vm(const struct checkpoint_args *args, struct error *err);
// `what`: a directory, or the name of a VM.
int checkpoint_list(const char *what, bool json, struct error *err);
