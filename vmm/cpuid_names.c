// SPDX-License-Identifier: Apache-2.0
// Names of CPUID bits: Linux's spelling first, then the other one people type.
// Sources: Intel SDM vol. 2A "CPUID", AMD APM vol. 3 appendix E, Linux Documentation/virt/kvm/x86/
// cpuid.rst for the KVM leaf.
#include <ctype.h>
#include <string.h>

#include "vmm/cpuid.h"
#include "vmm/util.h"

#define L1_ECX(b, n, a)            \
    {                              \
        0x1, 0, CPUID_ECX, b, n, a \
    }
#define L1_EDX(b, n, a)            \
    {                              \
        0x1, 0, CPUID_EDX, b, n, a \
    }
#define L6_EAX(b, n, a)            \
    {                              \
        0x6, 0, CPUID_EAX, b, n, a \
    }
#define L7_EBX(b, n, a)            \
    {                              \
        0x7, 0, CPUID_EBX, b, n, a \
    }
#define L7_ECX(b, n, a)            \
    {                              \
        0x7, 0, CPUID_ECX, b, n, a \
    }
#define L7_EDX(b, n, a)            \
    {                              \
        0x7, 0, CPUID_EDX, b, n, a \
    }
#define L71_EAX(b, n, a)           \
    {                              \
        0x7, 1, CPUID_EAX, b, n, a \
    }
#define L71_EDX(b, n, a)           \
    {                              \
        0x7, 1, CPUID_EDX, b, n, a \
    }
#define LD1_EAX(b, n, a)           \
    {                              \
        0xd, 1, CPUID_EAX, b, n, a \
    }
#define X1_ECX(b, n, a)                   \
    {                                     \
        0x80000001, 0, CPUID_ECX, b, n, a \
    }
#define X1_EDX(b, n, a)                   \
    {                                     \
        0x80000001, 0, CPUID_EDX, b, n, a \
    }
#define X7_EDX(b, n, a)                   \
    {                                     \
        0x80000007, 0, CPUID_EDX, b, n, a \
    }
#define X8_EBX(b, n, a)                   \
    {                                     \
        0x80000008, 0, CPUID_EBX, b, n, a \
    }
#define X21_EAX(b, n, a)                  \
    {                                     \
        0x80000021, 0, CPUID_EAX, b, n, a \
    }
#define KVM_EAX(b, n, a)                  \
    {                                     \
        0x40000001, 0, CPUID_EAX, b, n, a \
    }

static const struct cpuid_feature features[] = {
    L1_ECX(0, "pni", "sse3"),
    L1_ECX(1, "pclmulqdq", NULL),
    L1_ECX(2, "dtes64", NULL),
    L1_ECX(3, "monitor", NULL),
    L1_ECX(4, "ds_cpl", NULL),
    L1_ECX(5, "vmx", NULL),
    L1_ECX(6, "smx", NULL),
    L1_ECX(7, "est", NULL),
    L1_ECX(8, "tm2", NULL),
    L1_ECX(9, "ssse3", NULL),
    L1_ECX(10, "cid", NULL),
    L1_ECX(11, "sdbg", NULL),
    L1_ECX(12, "fma", NULL),
    L1_ECX(13, "cx16", "cmpxchg16b"),
    L1_ECX(14, "xtpr", NULL),
    L1_ECX(15, "pdcm", NULL),
    L1_ECX(17, "pcid", NULL),
    L1_ECX(18, "dca", NULL),
    L1_ECX(19, "sse4_1", NULL),
    L1_ECX(20, "sse4_2", NULL),
    L1_ECX(21, "x2apic", NULL),
    L1_ECX(22, "movbe", NULL),
    L1_ECX(23, "popcnt", NULL),
    L1_ECX(24, "tsc_deadline_timer", "tsc-deadline"),
    L1_ECX(25, "aes", "aes-ni"),
    L1_ECX(26, "xsave", NULL),
    L1_ECX(27, "osxsave", NULL),
    L1_ECX(28, "avx", NULL),
    L1_ECX(29, "f16c", NULL),
    L1_ECX(30, "rdrand", NULL),
    L1_ECX(31, "hypervisor", NULL),

    L1_EDX(0, "fpu", NULL),
    L1_EDX(1, "vme", NULL),
    L1_EDX(2, "de", NULL),
    L1_EDX(3, "pse", NULL),
    L1_EDX(4, "tsc", NULL),
    L1_EDX(5, "msr", NULL),
    L1_EDX(6, "pae", NULL),
    L1_EDX(7, "mce", NULL),
    L1_EDX(8, "cx8", "cmpxchg8b"),
    L1_EDX(9, "apic", NULL),
    L1_EDX(11, "sep", "sysenter"),
    L1_EDX(12, "mtrr", NULL),
    L1_EDX(13, "pge", NULL),
    L1_EDX(14, "mca", NULL),
    L1_EDX(15, "cmov", NULL),
    L1_EDX(16, "pat", NULL),
    L1_EDX(17, "pse36", NULL),
    L1_EDX(18, "pn", "psn"),
    L1_EDX(19, "clflush", "clfsh"),
    L1_EDX(21, "dts", "ds"),
    L1_EDX(22, "acpi", NULL),
    L1_EDX(23, "mmx", NULL),
    L1_EDX(24, "fxsr", NULL),
    L1_EDX(25, "sse", NULL),
    L1_EDX(26, "sse2", NULL),
    L1_EDX(27, "ss", NULL),
    L1_EDX(28, "ht", "htt"),
    L1_EDX(29, "tm", NULL),
    L1_EDX(30, "ia64", NULL),
    L1_EDX(31, "pbe", NULL),

    L6_EAX(2, "arat", NULL),

    L7_EBX(0, "fsgsbase", NULL),
    L7_EBX(1, "tsc_adjust", NULL),
    L7_EBX(2, "sgx", NULL),
    L7_EBX(3, "bmi1", NULL),
    L7_EBX(4, "hle", NULL),
    L7_EBX(5, "avx2", NULL),
    L7_EBX(6, "fdp_excptn_only", "fdp-excptn-only"),
    L7_EBX(7, "smep", NULL),
    L7_EBX(8, "bmi2", NULL),
    L7_EBX(9, "erms", NULL),
    L7_EBX(10, "invpcid", NULL),
    L7_EBX(11, "rtm", NULL),
    L7_EBX(12, "cqm", NULL),
    L7_EBX(13, "zero_fcs_fds", "zero-fcs-fds"),
    L7_EBX(14, "mpx", NULL),
    L7_EBX(15, "rdt_a", NULL),
    L7_EBX(16, "avx512f", NULL),
    L7_EBX(17, "avx512dq", NULL),
    L7_EBX(18, "rdseed", NULL),
    L7_EBX(19, "adx", NULL),
    L7_EBX(20, "smap", NULL),
    L7_EBX(21, "avx512ifma", NULL),
    L7_EBX(23, "clflushopt", NULL),
    L7_EBX(24, "clwb", NULL),
    L7_EBX(25, "intel_pt", NULL),
    L7_EBX(26, "avx512pf", NULL),
    L7_EBX(27, "avx512er", NULL),
    L7_EBX(28, "avx512cd", NULL),
    L7_EBX(29, "sha_ni", "sha-ni"),
    L7_EBX(30, "avx512bw", NULL),
    L7_EBX(31, "avx512vl", NULL),

    L7_ECX(0, "prefetchwt1", NULL),
    L7_ECX(1, "avx512vbmi", NULL),
    L7_ECX(2, "umip", NULL),
    L7_ECX(3, "pku", NULL),
    L7_ECX(4, "ospke", NULL),
    L7_ECX(5, "waitpkg", NULL),
    L7_ECX(6, "avx512_vbmi2", NULL),
    L7_ECX(7, "shstk", "cet-ss"),
    L7_ECX(8, "gfni", NULL),
    L7_ECX(9, "vaes", NULL),
    L7_ECX(10, "vpclmulqdq", NULL),
    L7_ECX(11, "avx512_vnni", NULL),
    L7_ECX(12, "avx512_bitalg", NULL),
    L7_ECX(13, "tme", NULL),
    L7_ECX(14, "avx512_vpopcntdq", NULL),
    L7_ECX(16, "la57", NULL),
    L7_ECX(22, "rdpid", NULL),
    L7_ECX(24, "bus_lock_detect", NULL),
    L7_ECX(25, "cldemote", NULL),
    L7_ECX(27, "movdiri", NULL),
    L7_ECX(28, "movdir64b", NULL),
    L7_ECX(29, "enqcmd", NULL),
    L7_ECX(30, "sgx_lc", "sgxlc"),
    L7_ECX(31, "pks", NULL),

    L7_EDX(2, "avx512_4vnniw", NULL),
    L7_EDX(3, "avx512_4fmaps", NULL),
    L7_EDX(4, "fsrm", NULL),
    L7_EDX(8, "avx512_vp2intersect", NULL),
    L7_EDX(10, "md_clear", NULL),
    L7_EDX(14, "serialize", NULL),
    L7_EDX(16, "tsxldtrk", NULL),
    L7_EDX(18, "pconfig", NULL),
    L7_EDX(19, "arch_lbr", NULL),
    L7_EDX(20, "ibt", "cet-ibt"),
    L7_EDX(22, "amx_bf16", NULL),
    L7_EDX(23, "avx512_fp16", NULL),
    L7_EDX(24, "amx_tile", NULL),
    L7_EDX(25, "amx_int8", NULL),
    L7_EDX(26, "spec_ctrl", "ibrs"),
    L7_EDX(27, "intel_stibp", "stibp"),
    L7_EDX(28, "flush_l1d", NULL),
    L7_EDX(29, "arch_capabilities", NULL),
    L7_EDX(30, "core_capabilities", "core-capability"),
    L7_EDX(31, "spec_ctrl_ssbd", "ssbd"),

    L71_EAX(0, "sha512", NULL),
    L71_EAX(1, "sm3", NULL),
    L71_EAX(2, "sm4", NULL),
    L71_EAX(4, "avx_vnni", NULL),
    L71_EAX(5, "avx512_bf16", NULL),
    L71_EAX(6, "lass", NULL),
    L71_EAX(7, "cmpccxadd", NULL),
    L71_EAX(10, "fzrm", NULL),
    L71_EAX(11, "fsrs", NULL),
    L71_EAX(12, "fsrc", NULL),
    L71_EAX(17, "fred", NULL),
    L71_EAX(18, "lkgs", NULL),
    L71_EAX(19, "wrmsrns", NULL),
    L71_EAX(21, "amx_fp16", NULL),
    L71_EAX(23, "avx_ifma", NULL),
    L71_EAX(26, "lam", NULL),
    L71_EDX(4, "avx_vnni_int8", NULL),
    L71_EDX(5, "avx_ne_convert", NULL),
    L71_EDX(8, "amx_complex", NULL),
    L71_EDX(10, "avx_vnni_int16", NULL),
    L71_EDX(14, "prefetchiti", NULL),

    LD1_EAX(0, "xsaveopt", NULL),
    LD1_EAX(1, "xsavec", NULL),
    LD1_EAX(2, "xgetbv1", NULL),
    LD1_EAX(3, "xsaves", NULL),
    LD1_EAX(4, "xfd", NULL),

    X1_ECX(0, "lahf_lm", NULL),
    X1_ECX(1, "cmp_legacy", NULL),
    X1_ECX(2, "svm", NULL),
    X1_ECX(3, "extapic", NULL),
    X1_ECX(4, "cr8_legacy", "cr8legacy"),
    X1_ECX(5, "abm", "lzcnt"),
    X1_ECX(6, "sse4a", NULL),
    X1_ECX(7, "misalignsse", NULL),
    X1_ECX(8, "3dnowprefetch", NULL),
    X1_ECX(9, "osvw", NULL),
    X1_ECX(10, "ibs", NULL),
    X1_ECX(11, "xop", NULL),
    X1_ECX(12, "skinit", NULL),
    X1_ECX(13, "wdt", NULL),
    X1_ECX(15, "lwp", NULL),
    X1_ECX(16, "fma4", NULL),
    X1_ECX(17, "tce", NULL),
    X1_ECX(19, "nodeid_msr", NULL),
    X1_ECX(21, "tbm", NULL),
    X1_ECX(22, "topoext", NULL),
    X1_ECX(23, "perfctr_core", NULL),
    X1_ECX(24, "perfctr_nb", NULL),
    X1_ECX(26, "bpext", NULL),
    X1_ECX(27, "ptsc", NULL),
    X1_ECX(28, "perfctr_llc", NULL),
    X1_ECX(29, "mwaitx", NULL),

    X1_EDX(11, "syscall", NULL),
    X1_EDX(19, "mp", NULL),
    X1_EDX(20, "nx", "xd"),
    X1_EDX(22, "mmxext", NULL),
    X1_EDX(25, "fxsr_opt", "ffxsr"),
    X1_EDX(26, "pdpe1gb", NULL),
    X1_EDX(27, "rdtscp", NULL),
    X1_EDX(29, "lm", "i64"),
    X1_EDX(30, "3dnowext", NULL),
    X1_EDX(31, "3dnow", NULL),

    X7_EDX(8, "constant_tsc", "invtsc"),

    X8_EBX(0, "clzero", NULL),
    X8_EBX(1, "irperf", NULL),
    X8_EBX(2, "xsaveerptr", NULL),
    X8_EBX(4, "rdpru", NULL),
    X8_EBX(9, "wbnoinvd", NULL),
    X8_EBX(12, "amd_ibpb", "ibpb"),
    X8_EBX(14, "amd_ibrs", NULL),
    X8_EBX(15, "amd_stibp", NULL),
    X8_EBX(17, "stibp_always_on", "stibp-always-on"),
    X8_EBX(23, "amd_ppin", NULL),
    X8_EBX(24, "amd_ssbd", NULL),
    X8_EBX(25, "virt_ssbd", NULL),
    X8_EBX(26, "amd_ssb_no", NULL),
    X8_EBX(28, "amd_psfd", NULL),
    X8_EBX(29, "btc_no", NULL),

    X21_EAX(0, "no_nested_data_bp", NULL),
    X21_EAX(2, "lfence_rdtsc", "lfence-always-serializing"),
    X21_EAX(6, "null_sel_clr_base", "null-sel-clr-base"),
    X21_EAX(8, "autoibrs", "auto-ibrs"),

    KVM_EAX(0, "kvm-clock-old", "kvmclock-old"),
    KVM_EAX(1, "kvm-nopiodelay", NULL),
    KVM_EAX(3, "kvm-clock", "kvmclock"),
    KVM_EAX(4, "kvm-asyncpf", NULL),
    KVM_EAX(5, "kvm-steal-time", NULL),
    KVM_EAX(6, "kvm-pv-eoi", NULL),
    KVM_EAX(7, "kvm-pv-unhalt", NULL),
    KVM_EAX(9, "kvm-pv-tlb-flush", NULL),
    KVM_EAX(10, "kvm-asyncpf-vmexit", NULL),
    KVM_EAX(11, "kvm-pv-ipi", "kvm-pv-send-ipi"),
    KVM_EAX(12, "kvm-poll-control", NULL),
    KVM_EAX(13, "kvm-pv-sched-yield", NULL),
    KVM_EAX(14, "kvm-asyncpf-int", NULL),
    KVM_EAX(15, "kvm-msi-ext-dest-id", NULL),
    KVM_EAX(16, "kvm-map-gpa-range", NULL),
    KVM_EAX(17, "kvm-migration-control", NULL),
    KVM_EAX(24, "kvm-clock-stable", "kvmclock-stable-bit"),
};

// What is meaningless, or wrong, without another feature.
static const struct {
    const char *name, *needs;
} needs[] = {
    {"xsaveopt", "xsave"},
    {"xsavec", "xsave"},
    {"xgetbv1", "xsave"},
    {"xsaves", "xsave"},
    {"xfd", "xsave"},
    {"avx", "xsave"},
    {"pku", "xsave"},
    {"mpx", "xsave"},
    {"amx_tile", "xsave"},
    {"amx_bf16", "amx_tile"},
    {"amx_int8", "amx_tile"},
    {"amx_fp16", "amx_tile"},
    {"amx_complex", "amx_tile"},
    {"fma", "avx"},
    {"f16c", "avx"},
    {"avx2", "avx"},
    {"vaes", "avx"},
    {"vpclmulqdq", "avx"},
    {"xop", "avx"},
    {"fma4", "avx"},
    {"avx_vnni", "avx2"},
    {"avx_ifma", "avx2"},
    {"avx_vnni_int8", "avx2"},
    {"avx_vnni_int16", "avx2"},
    {"avx_ne_convert", "avx2"},
    {"sha512", "avx2"},
    {"sm3", "avx"},
    {"sm4", "avx2"},
    {"avx512f", "avx2"},
    {"avx512dq", "avx512f"},
    {"avx512ifma", "avx512f"},
    {"avx512pf", "avx512f"},
    {"avx512er", "avx512f"},
    {"avx512cd", "avx512f"},
    {"avx512bw", "avx512f"},
    {"avx512vl", "avx512f"},
    {"avx512vbmi", "avx512bw"},
    {"avx512_vbmi2", "avx512bw"},
    {"avx512_vnni", "avx512f"},
    {"avx512_bitalg", "avx512bw"},
    {"avx512_vpopcntdq", "avx512f"},
    {"avx512_4vnniw", "avx512f"},
    {"avx512_4fmaps", "avx512f"},
    {"avx512_vp2intersect", "avx512f"},
    {"avx512_bf16", "avx512bw"},
    {"avx512_fp16", "avx512bw"},
    {"invpcid", "pcid"},
    {"kvm-asyncpf-vmexit", "kvm-asyncpf"},
    {"kvm-asyncpf-int", "kvm-asyncpf"},
    {"kvm-clock-stable", "kvm-clock"},
    {"kvm-pv-tlb-flush", "kvm-steal-time"},
};

const char *cpuid_feature_name(size_t index)
{
    return index < ARRAY_SIZE(features) ? features[index].name : NULL;
}

const struct cpuid_feature *cpuid_feature_at(size_t index)
{
    return index < ARRAY_SIZE(features) ? &features[index] : NULL;
}

static char name_fold(char c)
{
    return c == '_' || c == '.' ? '-' : (char)tolower((unsigned char)c);
}

static bool name_equal(const char *known, const char *name, size_t len)
{
    if (!known || strlen(known) != len)
        return false;
    for (size_t i = 0; i < len; i++) {
        if (name_fold(known[i]) != name_fold(name[i]))
            return false;
    }
    return true;
}

const struct cpuid_feature *cpuid_feature_find(const char *name, size_t len)
{
    for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
        if (name_equal(features[i].name, name, len) || name_equal(features[i].alias, name, len))
            return &features[i];
    }
    return NULL;
}

const struct cpuid_feature *cpuid_feature_dependent(const struct cpuid_feature *feature, size_t nth)
{
    for (size_t i = 0; i < ARRAY_SIZE(needs); i++) {
        if (!strcmp(needs[i].needs, feature->name) && nth-- == 0)
            return cpuid_feature_find(needs[i].name, strlen(needs[i].name));
    }
    return NULL;
}
