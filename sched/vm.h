// SPDX-License-Identifier: Apache-2.0
// Makes the vCPUs of a VM take turns: ties sched/client.h to vmm/vcpu.h, and tells the guest what
// it has waited (steal time).
#pragma once

#include <jansson.h>

#include "sched/client.h"
#include "vmm/error.h"

struct vm;
struct sched_tie;

// After vm_start, running or not. `must`: no daemon yet is fine, but a refusal is an error;
// otherwise the VM goes on without and says so. The name is the VM's. `broker`: of a VM in a jail,
// its way to the socket (sched/broker.h), or -1.
int sched_tie(struct sched_tie **tie, struct vm *vm, const char *socket, int broker,
              const struct sched_share *share, bool must, struct error *err);
// After vm_join: no vCPU takes a turn any more. NULL is fine.
void sched_untie(struct sched_tie *tie);

int sched_tie_set(struct sched_tie *tie, const struct sched_share *share, struct error *err);
// {"socket", "attached", "weight", "cap", "affinity", "soft_affinity"}
json_t *sched_tie_show(const struct sched_tie *tie);
