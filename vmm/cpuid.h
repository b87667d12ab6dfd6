// SPDX-License-Identifier: Apache-2.0
// The CPU a guest sees: KVM's supported CPUID, made right for n vCPUs, with features taken away by
// name. Pure: no system call.
#pragma once

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmm/error.h"

enum { CPU_MODEL_MAX_MASKS = 128, CPUID_MAX_ENTRIES = 256 };

enum cpuid_reg { CPUID_EAX, CPUID_EBX, CPUID_ECX, CPUID_EDX };

struct cpuid_feature { // one named bit
    uint32_t leaf;
    uint8_t subleaf;
    uint8_t reg; // enum cpuid_reg
    uint8_t bit;
    const char *name;  // as in Linux's /proc/cpuinfo
    const char *alias; // QEMU's or the vendor's other name, or NULL
};

struct cpu_model { // parsed from --cpu
    uint16_t nr_removed;
    const struct cpuid_feature *removed[CPU_MODEL_MAX_MASKS];
};

// "host", "host,-cx16,-pcid". What depends on a removed feature goes with it (-avx takes avx2,
// fma ...). Case, '-', '_' and '.' do not matter within names. Unknown names, "+flag" and other
// models are errors (-EINVAL) that name the word and (where there is one) the nearest known name.
int cpu_model_parse(const char *text, struct cpu_model *model, struct error *err);

// Fills `out` (room for CPUID_MAX_ENTRIES) for the vCPU with this APIC id from what
// KVM_GET_SUPPORTED_CPUID gave: topology (leaves 1, 4, 0xb, 0x1f, 0x80000008, 0x8000001d/1e),
// x2APIC id, hypervisor bit, KVM signature and features (0x40000000/1), TSC frequency leaves when
// tsc_khz > 0. One socket, one thread a core, APIC ids 0 .. cpus-1. Features that KVM's PVM back
// end cannot carry (`software_backend`: cx16, pcid, the PV features that use hypercalls) are
// removed too. -EINVAL for a target or table that makes no sense, -E2BIG when `out` is too small.
struct cpuid_target {
    unsigned cpus;
    unsigned apic_id;
    uint32_t tsc_khz; // 0 = leave out
    bool software_backend;
    // KVM_CAP_TSC_DEADLINE_TIMER: older kernels report the timer there and not in their CPUID.
    bool tsc_deadline;
};
int cpuid_build(const struct kvm_cpuid2 *supported, const struct cpu_model *model,
                const struct cpuid_target *target, struct kvm_cpuid2 *out, struct error *err);

// Iterates over the known feature names, for help and completion; NULL at the end.
const char *cpuid_feature_name(size_t index);
// The same as whole rows; NULL at the end.
const struct cpuid_feature *cpuid_feature_at(size_t index);
// By name or alias; NULL when unknown.
const struct cpuid_feature *cpuid_feature_find(const char *name, size_t len);
// The nth feature that is useless without this one; NULL at the end.
const struct cpuid_feature *cpuid_feature_dependent(const struct cpuid_feature *feature,
                                                    size_t nth);

// Compares what a saved guest saw with what this host gives (built or as KVM_GET_SUPPORTED_CPUID
// gave it): -ENOTSUP naming the first features that are missing here. Bits that Ferry or the guest
// set themselves (htt, hypervisor, osxsave ...) do not count. `guest` is hostile input: any
// contents are safe as long as nent entries are there.
int cpuid_compatible(const struct kvm_cpuid2 *guest, const struct kvm_cpuid2 *host,
                     struct error *err);
