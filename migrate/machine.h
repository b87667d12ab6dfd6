// SPDX-License-Identifier: Apache-2.0
// From a VM to its description in a stream, and the check that a VM built from one fits.
#pragma once

#include "migrate/migrate.h"
#include "migrate/wire.h"

// Fills what MACHINE says: memory, CPUs, the CPUID the guest sees, the hook's JSON.
int machine_describe(struct vm *vm, const struct migrate_hooks *hooks, struct machine *machine,
                     struct error *err);

// Builds a VM through the hook and checks that it has this memory and these CPUs, and that the host
// has every feature the guest saw. On error nothing is left behind.
int machine_build(const struct machine *machine, const struct migrate_hooks *hooks, struct vm **vm,
                  struct error *err);

// Whether that is this very machine: its memory, CPUs, CPUID and hardware. -EINVAL says what
// differs.
int machine_same(const struct machine *machine, struct vm *vm, const struct migrate_hooks *hooks,
                 struct error *err);
