// SPDX-License-Identifier: Apache-2.0
#pragma once

// Between the runtime's own files and start.S.

#include "rt.h"

void boot_main(unsigned kind, uint64_t info);
void cpu_setup_boot(void); // descriptor tables of CPU 0; needs no RAM map
void ap_main(struct cpu *cpu);
void lapic_init_ap(uint32_t apic_id);
void lapic_start_ap(uint32_t apic_id, unsigned page);
extern struct cpu *cpu_by_apic_id[256];
void trap_dispatch(struct trap_frame *frame);
uint64_t ring3_enter(uint64_t (*fn)(void *), void *arg, uint64_t rflags);
_Noreturn void ring3_leave(uint64_t result);

// RDI at ring3_call (start.S).
enum ring3_call {
    RING3_RETURN, // RAX: result
    RING3_PARK,
};
