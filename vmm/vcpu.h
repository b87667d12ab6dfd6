// SPDX-License-Identifier: Apache-2.0
// One vCPU: its KVM fd, its thread, and its saved state.
#pragma once

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"

struct vm;
struct boot_entry;
struct vcpu_state;

struct vcpu {
    struct vm *vm;
    unsigned index; // = APIC id
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    bool started;
    atomic_int tid;       // kernel thread id once it runs
    bool parked;          // guarded by vm->lock
    struct vcpu_state *state; // what the state registry saves and loads
};

int vcpu_create(struct vcpu *vcpu, struct vm *vm, unsigned index, struct error *err);
void vcpu_destroy(struct vcpu *vcpu);
int vcpu_set_entry(struct vcpu *vcpu, const struct boot_entry *entry, struct error *err);
int vcpu_start(struct vcpu *vcpu, struct error *err);

// Makes KVM_RUN return, now or at the next entry; cannot be lost. Any thread.
void vcpu_kick(struct vcpu *vcpu);
