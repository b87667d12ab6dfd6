// SPDX-License-Identifier: Apache-2.0
// A picture of what the scheduler did: a row for each pCPU with who ran there, a row with the vCPUs
// that waited, and the credits of each vCPU over the same time.
#pragma once

#include <stdio.h>

#include "sched/record.h"

struct gantt {
    const struct record_log *log;
    const char *title;
    uint64_t from_ns, to_ns; // the part of the log that is drawn
    uint64_t zero_ns;        // the time that the axis calls 0
    unsigned nr_pcpus;
    const int32_t *cpus;                               // Linux's numbers of the pCPUs, or NULL
    const char *(*name)(const void *arg, uint32_t vm); // of a VM; NULL: unknown
    const void *arg;
};

// -EINVAL for an empty span of time, -ENOMEM, -EIO if `out` could not be written.
int gantt_write(const struct gantt *g, FILE *out, struct error *err);
