// SPDX-License-Identifier: Apache-2.0
// --checkpoints: a VM in a child process, which is started again from its newest whole checkpoint
// when it dies of a signal, an error of the host, a panic or a triple fault.
#pragma once

#include <jansson.h>

#include "vmm/error.h"

enum { SUPERVISE_RESTARTS = 5, SUPERVISE_RESTARTS_MAX = 1000 };

// "DIR[,mtbf=SPAN|,interval=SPAN][,daly][,keep=N][,hourly=N][,chain=N][,restarts=N]" as the body of
// PUT /checkpoint (caller's reference), and how often to start again without a new checkpoint.
int supervise_parse(const char *text, json_t **body, unsigned *restarts, struct error *err);

// The two together: `run` in a child, under the option's text. See struct supervise.
int supervise_vm(const char *option, const char *name,
                 int (*run)(void *context, const char *checkpoint), void *context, int *status,
                 struct error *err);

struct supervise {
    const char *name; // of the VM
    const char *dir;
    unsigned restarts;
    // In the child: runs the VM, from that checkpoint or, NULL, as at first. The exit status.
    int (*run)(void *context, const char *checkpoint);
    void *context;
};
// Returns in the parent only, with the last child's exit status. Before any thread is started.
int supervise(const struct supervise *s, int *status, struct error *err);
