// SPDX-License-Identifier: Apache-2.0
// Between vm.c and vm_state.c.
#pragma once

#include <stdint.h>

#include "vmm/error.h"

struct vm;

int vm_kernel_state_create(struct vm *vm, struct error *err);
int vm_clock_get(const struct vm *vm, uint64_t *ns); // kvmclock, ns; 0 or -errno
int vm_clock_set(const struct vm *vm, uint64_t ns);
