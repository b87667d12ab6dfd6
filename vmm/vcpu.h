// SPDX-License-Identifier: Apache-2.0
// One vCPU: its KVM fd, its thread, and its saved state.
#pragma once

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmm/error.h"
#include "vmm/histogram.h"
#include "vmm/state.h"

enum { VCPU_SAMPLE = 16 };

struct vm;
struct boot_entry;
struct vcpu_state;

struct vcpu;

// Who says when each vCPU may run, beside Linux; see sched/vm.h. Both are called in the vCPU's
// thread.
struct vcpu_turns {
    // Returns true when the guest may run, having waited for it; false when a signal came
    // meanwhile, or kvm_run->immediate_exit is set: somebody wants something of the thread.
    bool (*take)(struct vcpu_turns *turns, struct vcpu *vcpu);
    // It does not want to run until it calls take again.
    void (*give)(struct vcpu_turns *turns, struct vcpu *vcpu);
};

struct vcpu {
    struct vm *vm;
    unsigned index; // = APIC id
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    bool started;
    _Atomic pid_t tid;         // 0 until the thread runs
    struct vcpu_state *state;  // what the state registry saves and loads (vmm/vcpu_state.c)
    _Atomic uint64_t exits;    // to user space
    struct histogram handling; // of every VCPU_SAMPLE-th of them
};

// `cpuid`: what the guest sees on this vCPU.
int vcpu_create(struct vcpu *vcpu, struct vm *vm, unsigned index, const struct kvm_cpuid2 *cpuid,
                struct error *err);
void vcpu_destroy(struct vcpu *vcpu); // its thread has ended
int vcpu_set_entry(struct vcpu *vcpu, const struct boot_entry *entry, struct error *err);
int vcpu_start(struct vcpu *vcpu, struct error *err); // the thread starts parked

// Makes KVM_RUN return, now or at the next entry; cannot be lost. Any thread.
void vcpu_kick(struct vcpu *vcpu);
// The signal that does the same when another process sends it to the thread.
int vcpu_signal(void);

// vmm/vcpu_state.c
extern const struct state_table vcpu_state_table;
int vcpu_state_create(struct vcpu *vcpu, const struct kvm_cpuid2 *cpuid, struct error *err);
// The CPUID this vCPU shows its guest.
const struct kvm_cpuid2 *vcpu_cpuid(const struct vcpu *vcpu);

// vmm/diagnose.c: registers, instruction bytes, the likely cause and a remedy, as text.
void vcpu_diagnose(struct vcpu *vcpu, char *text, size_t size);
