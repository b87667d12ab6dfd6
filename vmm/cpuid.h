// SPDX-License-Identifier: Apache-2.0
// The CPU a guest sees: KVM's supported CPUID, made right for n vCPUs, with features taken away by
// name. Pure: no system call.
#pragma once

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmm/error.h"

enum { CPU_MODEL_MAX_MASKS = 64, CPUID_MAX_ENTRIES = 256 };

struct cpuid_feature; // one named bit: leaf, subleaf, register, bit

struct cpu_model { // parsed from --cpu
    uint16_t nr_removed;
    const struct cpuid_feature *removed[CPU_MODEL_MAX_MASKS];
};

// "host", "host,-cx16,-pcid". Unknown names, "+flag" and other models are errors that name the
// word and (where there is one) the nearest known name.
int cpu_model_parse(const char *text, struct cpu_model *model, struct error *err);

// Fills `out` (room for CPUID_MAX_ENTRIES) for the vCPU with this APIC id from what
// KVM_GET_SUPPORTED_CPUID gave: topology (leaves 1, 4, 0xb, 0x1f, 0x80000008, 0x8000001e), x2APIC
// id, hypervisor bit, KVM signature and features (0x40000000/1), TSC frequency leaves when
// tsc_khz > 0. One socket, one thread a core. Features that KVM's PVM back end cannot carry
// (`software_backend`: cx16, pcid, the PV features that use hypercalls) are removed too.
struct cpuid_target {
    unsigned cpus;
    unsigned apic_id;
    uint32_t tsc_khz; // 0 = leave out
    bool software_backend;
};
int cpuid_build(const struct kvm_cpuid2 *supported, const struct cpu_model *model,
                const struct cpuid_target *target, struct kvm_cpuid2 *out, struct error *err);

// Iterates over the known feature names, for help and completion; NULL at the end.
const char *cpuid_feature_name(size_t index);

// Compares what a saved guest saw with what this host gives: -ENOTSUP naming the first features
// that are missing here.
int cpuid_compatible(const struct kvm_cpuid2 *guest, const struct kvm_cpuid2 *host,
                     struct error *err);
