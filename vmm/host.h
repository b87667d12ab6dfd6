// SPDX-License-Identifier: Apache-2.0
// What this host can do for Ferry. Two steps: host_probe asks the kernel and fills plain facts;
// host_judge (pure) turns facts into findings: what is there, what lacks, who needs it, what to do.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// True when KVM is the PVM software back end (module kvm_pvm), which emulates ring 0
// (design/kvm-hosts.md). One access() call; callers keep the answer.
bool host_is_software_backend(void);

enum host_kvm {
    HOST_KVM_OK,
    HOST_KVM_ABSENT,     // no device: module not loaded, or no virtualization in this machine
    HOST_KVM_NO_ACCESS,  // there, but not for this user
    HOST_KVM_NOT_DEVICE, // opens, but does not answer as KVM
    HOST_KVM_BUSY,       // opens and answers, but creates no VM
};

enum { HOST_CAPS_MAX = 32 };

// Plain numbers; -1 or "" = unknown (file absent).
struct host_facts {
    char kernel[65], machine[65];
    char cpu_model[64];
    bool cpu_virtualization; // vmx or svm in CPUID
    bool is_guest;           // this host is a VM itself

    enum host_kvm kvm;
    int kvm_errno;
    const char *kvm_path; // borrowed from the caller
    int kvm_api;
    const char *backend; // "kvm_intel", "kvm_amd", "kvm_pvm", "" = unknown
    bool software_backend;
    int nested;              // of the vendor module; -1 = unknown
    int caps[HOST_CAPS_MAX]; // by row of the table in host_judge's file; KVM_CHECK_EXTENSION

    int uffd_errno;         // 0 = a descriptor was made
    uint64_t uffd_features; // by UFFDIO_API
    bool uffd_user_only;    // only with UFFD_USER_MODE_ONLY: no good for KVM's faults

    int uring_errno; // 0 = a ring was made
    int tun_errno;   // 0 = /dev/net/tun opens

    char thp[16];                        // "always", "madvise", "never"
    int64_t hugetlb_total, hugetlb_free; // pages of 2 MiB
    uint64_t memlock, nofile;            // soft limits; UINT64_MAX = none
    uint64_t nofile_max;
    uint64_t memory_total, memory_available; // bytes
    int overcommit;                          // vm.overcommit_memory
    int cpus;                                // online, usable by us
    char clocksource[32];
    bool tsc_constant;
};

// `kvm_path` is normally "/dev/kvm". Cannot fail: what cannot be found out is a fact too.
void host_probe(struct host_facts *facts, const char *kvm_path);

enum host_status {
    HOST_OK,
    HOST_WARN, // something is slower, smaller or missing that not everybody needs
    HOST_LACK, // a feature of Ferry does not work
};

struct host_finding {
    const char *group; // "kvm", "memory", "migration", "devices", "host"
    const char *name;
    enum host_status status;
    bool required; // guests cannot run without
    char value[96];
    const char *needed_by;
    char remedy[160]; // "" when all is well
};

enum { HOST_FINDINGS_MAX = 64 };

// Returns the number of findings.
size_t host_judge(const struct host_facts *facts, struct host_finding findings[HOST_FINDINGS_MAX]);
// True when nothing required is lacking.
bool host_can_run(const struct host_finding *findings, size_t nr);
// KVM_CHECK_EXTENSION numbers to ask for, in the order of facts->caps; -1 at the end.
int host_cap_number(size_t index);
