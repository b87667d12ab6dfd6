// SPDX-License-Identifier: Apache-2.0
// Workloads of the simulator as JSON files, and its results. docs/scheduler.md lists the keys.
#pragma once

#include <jansson.h>

#include "sched/sim.h"

enum { SIM_TITLE_MAX = 128 };

struct sim_workload {
    char title[SIM_TITLE_MAX];
    struct sim_config config; // .vms is this struct's
    uint64_t draw_from_ns, draw_to_ns;
};

// -EINVAL with the key, its value and what was expected; -errno of the file. On success the
// workload must be freed.
int sim_load(struct sim_workload *w, const char *path, struct error *err);
int sim_load_json(struct sim_workload *w, json_t *json, struct error *err);
void sim_workload_free(struct sim_workload *w);

// Shares, waits and counts of a run that has come to its end; sim_ideal must have been called.
json_t *sim_result(const struct sim *sim);
