// SPDX-License-Identifier: Apache-2.0
// CPUID: topology for both vendors, masks, software back end, comparison of saved guests.
#include <check.h>
#include <errno.h>
#include <string.h>

#include "vmm/cpuid.h"
#include "vmm/util.h"

union table {
    struct kvm_cpuid2 head;
    uint8_t bytes[sizeof(struct kvm_cpuid2) + CPUID_MAX_ENTRIES * sizeof(struct kvm_cpuid_entry2)];
};

static struct kvm_cpuid2 *table_of(union table *t, const struct kvm_cpuid_entry2 *rows, unsigned nr)
{
    memset(t, 0, sizeof(*t));
    t->head.nent = nr;
    memcpy(t->head.entries, rows, nr * sizeof(*rows));
    return &t->head;
}

// From KVM_GET_SUPPORTED_CPUID of an AMD EPYC (9R14) under KVM's PVM back end, Linux 6.18, with
// x87..AVX bits as an SVM host would give them.
static const struct kvm_cpuid_entry2 amd_rows[] = {
    {0x0, 0, 0, 0x1c, 0x68747541, 0x444d4163, 0x69746e65},
    {0x1, 0, 0, 0x00a10f11, 0x01020800, 0xffba3203, 0x078bfbff},
    {0x4, 0, 1, 0, 0, 0, 0},
    {0x7, 0, 1, 0x1, 0xf1bf07ab, 0x00405f5e, 0x00000010},
    {0x7, 1, 1, 0x20, 0, 0, 0},
    {0xb, 0, 1, 0, 0, 0, 0},
    {0xd, 0, 1, 0x2e7, 0x980, 0x988, 0},
    {0xd, 1, 1, 0xf, 0, 0, 0},
    {0xd, 2, 1, 0x100, 0x240, 0, 0},
    {0xd, 5, 1, 0x40, 0x340, 0, 0},
    {0xd, 6, 1, 0x200, 0x380, 0, 0},
    {0xd, 7, 1, 0x400, 0x580, 0, 0},
    {0xd, 9, 1, 0x8, 0x980, 0, 0},
    {0x80000000, 0, 0, 0x80000026, 0x68747541, 0x444d4163, 0x69746e65},
    {0x80000001, 0, 0, 0x00a10f11, 0x40000000, 0x00400393, 0x23d3fbff},
    {0x80000007, 0, 0, 0, 0, 0, 0x100},
    {0x80000008, 0, 0, 0x3030, 0x50020005, 0x7001, 0},
    {0x8000001d, 0, 1, 0x00000121, 0x01c0003f, 0x3f, 0},
    {0x8000001d, 1, 1, 0x00000122, 0x01c0003f, 0x3f, 0},
    {0x8000001d, 2, 1, 0x00000143, 0x01c0003f, 0x7ff, 2},
    {0x8000001d, 3, 1, 0x00004163, 0x03c0003f, 0x7fff, 1},
    {0x8000001d, 4, 1, 0, 0, 0, 0},
    {0x8000001e, 0, 0, 7, 7, 7, 7},
    {0x80000026, 0, 1, 1, 2, 0x100, 0},
    {0x80000026, 1, 1, 4, 8, 0x201, 0},
    {0x40000000, 0, 0, 0x40000001, 0x4b4d564b, 0x564b4d56, 0x4d},
    {0x40000001, 0, 0, 0x01037efb, 0, 0, 0},
};

// The shape of a Sapphire Rapids: leaf 4 with four caches, 0x1f, 0x15.
static const struct kvm_cpuid_entry2 intel_rows[] = {
    {0x0, 0, 0, 0x1f, 0x756e6547, 0x6c65746e, 0x49656e69},
    {0x1, 0, 0, 0x000806f8, 0x05400800, 0xfefa3203, 0x1f8bfbff},
    {0x4, 0, 1, 0x7c004121, 0x02c0003f, 0x3f, 0},
    {0x4, 1, 1, 0x7c004122, 0x01c0003f, 0x3f, 0},
    {0x4, 2, 1, 0x7c004143, 0x03c0003f, 0x7ff, 0},
    {0x4, 3, 1, 0x7c0fc163, 0x0380003f, 0x1bfff, 4},
    {0x4, 4, 1, 0, 0, 0, 0},
    {0x7, 0, 1, 0x1, 0xf1bf2fbb, 0x1b415f6e, 0xffdd4432},
    {0x7, 1, 1, 0x1c30, 0, 0, 0},
    {0xb, 0, 1, 1, 2, 0x100, 9},
    {0xb, 1, 1, 7, 0x70, 0x201, 9},
    {0xd, 0, 1, 0x602e7, 0x240, 0x2b00, 0},
    {0xd, 1, 1, 0x1f, 0, 0, 0},
    {0xd, 2, 1, 0x100, 0x240, 0, 0},
    {0xd, 5, 1, 0x40, 0x440, 0, 0},
    {0xd, 6, 1, 0x200, 0x480, 0, 0},
    {0xd, 7, 1, 0x400, 0x680, 0, 0},
    {0xd, 9, 1, 0x8, 0xa80, 0, 0},
    {0xd, 17, 1, 0x40, 0xac0, 2, 0},
    {0xd, 18, 1, 0x2000, 0xb00, 6, 0},
    {0x15, 0, 0, 2, 0xd0, 25000000, 0},
    {0x1f, 0, 1, 1, 2, 0x100, 9},
    {0x1f, 1, 1, 7, 0x70, 0x201, 9},
    {0x1f, 2, 1, 9, 0x70, 0x302, 9},
    {0x1f, 3, 1, 0, 0, 3, 9},
    {0x80000000, 0, 0, 0x80000008, 0, 0, 0},
    {0x80000001, 0, 0, 0, 0, 0x121, 0x2c100800},
    {0x80000008, 0, 0, 0x3934, 0, 0, 0},
};

static struct kvm_cpuid2 *amd(union table *t)
{
    return table_of(t, amd_rows, ARRAY_SIZE(amd_rows));
}

static struct kvm_cpuid2 *intel(union table *t)
{
    return table_of(t, intel_rows, ARRAY_SIZE(intel_rows));
}

// What a CPU answers for leaf.subleaf.
static struct kvm_cpuid_entry2 answer(const struct kvm_cpuid2 *t, uint32_t leaf, uint32_t subleaf)
{
    for (unsigned i = 0; i < t->nent; i++) {
        const struct kvm_cpuid_entry2 *e = &t->entries[i];
        if (e->function == leaf && (e->index == subleaf || !(e->flags & 1)))
            return *e;
    }
    return (struct kvm_cpuid_entry2) {0};
}

static bool has(const struct kvm_cpuid2 *t, const char *name)
{
    const struct cpuid_feature *f = cpuid_feature_find(name, strlen(name));
    ck_assert_msg(f != NULL, "no feature %s", name);
    struct kvm_cpuid_entry2 e = answer(t, f->leaf, f->subleaf);
    uint32_t regs[] = {e.eax, e.ebx, e.ecx, e.edx};
    return regs[f->reg] >> f->bit & 1;
}

static struct kvm_cpuid2 *build(union table *out, const struct kvm_cpuid2 *supported,
                                const char *model_text, struct cpuid_target target)
{
    struct cpu_model model;
    struct error err = {0};
    ck_assert_msg(cpu_model_parse(model_text, &model, &err) == 0, "%s", err.text);
    ck_assert_msg(cpuid_build(supported, &model, &target, &out->head, &err) == 0, "%s", err.text);
    return &out->head;
}

static unsigned log2_up(unsigned n)
{
    unsigned bits = 0;
    while (1u << bits < n)
        bits++;
    return bits;
}

static void check_levels(const struct kvm_cpuid2 *t, uint32_t leaf, unsigned cpus, unsigned id)
{
    struct kvm_cpuid_entry2 smt = answer(t, leaf, 0), core = answer(t, leaf, 1),
                            end = answer(t, leaf, 2);
    ck_assert_uint_eq(smt.eax, 0);
    ck_assert_uint_eq(smt.ebx, 1);
    ck_assert_uint_eq(smt.ecx, 0x100);
    ck_assert_uint_eq(core.eax, log2_up(cpus));
    ck_assert_uint_eq(core.ebx, cpus);
    ck_assert_uint_eq(core.ecx, 0x201);
    ck_assert_uint_eq(end.ebx, 0);
    ck_assert_uint_eq(end.ecx, 2);
    ck_assert_uint_eq(smt.edx, id);
    ck_assert_uint_eq(core.edx, id);
    ck_assert_uint_eq(end.edx, id);
    // Nothing of the host's further levels is left.
    ck_assert_uint_eq(answer(t, leaf, 3).ecx, 0);
}

START_TEST(topology_amd_any_count)
{
    unsigned cpus = (unsigned)_i;
    union table in, out;
    amd(&in);
    for (unsigned id = 0; id < cpus; id++) {
        struct kvm_cpuid2 *t =
            build(&out, &in.head, "host", (struct cpuid_target) {.cpus = cpus, .apic_id = id});
        struct kvm_cpuid_entry2 e = answer(t, 1, 0);
        ck_assert_uint_eq(e.ebx >> 24, id);
        ck_assert_uint_eq(e.ebx >> 16 & 0xff, cpus);
        ck_assert_uint_eq(e.ebx >> 8 & 0xff, 8);
        ck_assert_uint_eq(has(t, "ht"), cpus > 1);
        ck_assert_uint_eq(has(t, "cmp_legacy"), cpus > 1);
        check_levels(t, 0xb, cpus, id);
        e = answer(t, 0x80000008, 0);
        ck_assert_uint_eq(e.eax, 0x3030);
        ck_assert_uint_eq(e.ecx & 0xff, cpus - 1);
        ck_assert_uint_eq(e.ecx >> 12 & 0xf, log2_up(cpus));
        for (unsigned i = 0; i < 3; i++)
            ck_assert_uint_eq(answer(t, 0x8000001d, i).eax >> 14 & 0xfff, 0);
        e = answer(t, 0x8000001d, 3);
        ck_assert_uint_eq(e.eax & 0x3fff, 0x163);
        ck_assert_uint_eq(e.eax >> 14 & 0xfff, cpus - 1);
        ck_assert_uint_eq(answer(t, 0x8000001d, 4).eax, 0);
        e = answer(t, 0x8000001e, 0);
        ck_assert_uint_eq(e.eax, id);
        ck_assert_uint_eq(e.ebx, id);
        ck_assert_uint_eq(e.ecx, 0);
        ck_assert_uint_eq(answer(t, 0x80000026, 0).ebx, 0);
        ck_assert_uint_eq(answer(t, 0x80000026, 1).ebx, 0);
    }
}
END_TEST

START_TEST(topology_intel_any_count)
{
    unsigned cpus = (unsigned)_i;
    unsigned reserved = 1u << log2_up(cpus);
    union table in, out;
    intel(&in);
    for (unsigned id = 0; id < cpus; id++) {
        struct kvm_cpuid2 *t =
            build(&out, &in.head, "host", (struct cpuid_target) {.cpus = cpus, .apic_id = id});
        struct kvm_cpuid_entry2 e = answer(t, 1, 0);
        ck_assert_uint_eq(e.ebx >> 24, id);
        ck_assert_uint_eq(e.ebx >> 16 & 0xff, reserved);
        ck_assert_uint_eq(has(t, "ht"), cpus > 1);
        check_levels(t, 0xb, cpus, id);
        check_levels(t, 0x1f, cpus, id);
        for (unsigned i = 0; i < 4; i++) {
            e = answer(t, 4, i);
            ck_assert_uint_eq(e.eax & 0x3fff, intel_rows[2 + i].eax & 0x3fff);
            ck_assert_uint_eq(e.eax >> 26, reserved - 1);
            ck_assert_uint_eq(e.eax >> 14 & 0xfff, i < 3 ? 0 : reserved - 1);
        }
        ck_assert_uint_eq(answer(t, 4, 4).eax, 0);
        ck_assert_uint_eq(answer(t, 0x80000008, 0).ecx, 0);
    }
}
END_TEST

START_TEST(hypervisor_leaves)
{
    union table in, out;
    struct kvm_cpuid2 *t = build(&out, intel(&in), "host", (struct cpuid_target) {.cpus = 1});
    struct kvm_cpuid_entry2 e = answer(t, 0x40000000, 0);
    ck_assert_int_eq(memcmp(&e.ebx, "KVMKVMKVM\0\0\0", 12), 0);
    ck_assert_uint_eq(e.eax, 0x40000001);
    ck_assert(has(t, "hypervisor"));
    ck_assert(!has(t, "osxsave"));
    // The Intel fixture has no KVM leaves and no deadline timer: only what is told is added.
    ck_assert(!has(t, "tsc_deadline_timer"));
    ck_assert_uint_eq(answer(t, 0x40000001, 0).eax, 0);

    t = build(&out, intel(&in), "host",
              (struct cpuid_target) {.cpus = 1, .tsc_khz = 2596128, .tsc_deadline = true});
    ck_assert(has(t, "tsc-deadline"));
    ck_assert_uint_eq(answer(t, 0x40000000, 0).eax, 0x40000010);
    ck_assert_uint_eq(answer(t, 0x40000010, 0).eax, 2596128);
    ck_assert_uint_eq(answer(t, 0x40000010, 0).ebx, 1000000);
    e = answer(t, 0x15, 0);
    ck_assert_uint_eq((uint64_t)e.ecx * e.ebx / e.eax, 2596128000ull);

    t = build(&out, amd(&in), "host", (struct cpuid_target) {.cpus = 1, .tsc_khz = 2596128});
    ck_assert_uint_eq(answer(t, 0x15, 0).eax, 0);
    ck_assert_uint_eq(answer(t, 0x40000001, 0).eax, 0x01037efb);
}
END_TEST

START_TEST(software_backend_hides_hypercalls)
{
    union table in, out;
    struct cpuid_target target = {.cpus = 2, .software_backend = true};
    struct kvm_cpuid2 *t = build(&out, amd(&in), "host", target);
    static const char *const gone[] = {"cx16",
                                       "pcid",
                                       "invpcid",
                                       "kvm-pv-unhalt",
                                       "kvm-pv-ipi",
                                       "kvm-pv-tlb-flush",
                                       "kvm-pv-sched-yield",
                                       "kvm-map-gpa-range",
                                       "kvm-migration-control"};
    for (unsigned i = 0; i < ARRAY_SIZE(gone); i++) {
        ck_assert_msg(!has(t, gone[i]), "%s is still there", gone[i]);
    }
    static const char *const kept[] = {"kvm-clock", "kvm-steal-time",     "kvm-pv-eoi",
                                       "x2apic",    "tsc_deadline_timer", "kvm-clock-stable",
                                       "xsave"};
    for (unsigned i = 0; i < ARRAY_SIZE(kept); i++) {
        ck_assert_msg(has(t, kept[i]), "%s is gone", kept[i]);
    }
    target.software_backend = false;
    t = build(&out, &in.head, "host", target);
    ck_assert(has(t, "cx16") && has(t, "pcid") && has(t, "kvm-pv-unhalt"));
}
END_TEST

START_TEST(masks_take_dependents)
{
    union table in, out;
    struct cpuid_target target = {.cpus = 1};
    struct kvm_cpuid2 *t = build(&out, amd(&in), "host,-CX16,-sse4.1,-sse4-2,-fpu", target);
    ck_assert(!has(t, "cx16") && !has(t, "sse4_1") && !has(t, "sse4_2"));
    ck_assert(!has(t, "fpu"));
    ck_assert_uint_eq(answer(t, 0x80000001, 0).edx & 1, 0); // AMD's second copy
    ck_assert(has(t, "avx2"));

    t = build(&out, &in.head, "host,-avx512f", target);
    ck_assert(!has(t, "avx512bw") && !has(t, "avx512_vbmi2") && !has(t, "avx512_bf16"));
    ck_assert(has(t, "avx2") && has(t, "xsave"));
    ck_assert_uint_eq(answer(t, 0xd, 0).eax, 0x207);
    ck_assert_uint_eq(answer(t, 0xd, 0).ecx, 0x988); // PKRU lies where it lay
    ck_assert_uint_eq(answer(t, 0xd, 6).eax, 0);

    t = build(&out, &in.head, "host,-avx,-pku", target);
    ck_assert(!has(t, "avx2") && !has(t, "fma") && !has(t, "vaes") && !has(t, "avx512vl"));
    ck_assert_uint_eq(answer(t, 0xd, 0).eax, 3);
    ck_assert_uint_eq(answer(t, 0xd, 0).ecx, 576);
    ck_assert_uint_eq(answer(t, 0xd, 0).ebx, 576);

    t = build(&out, &in.head, "host,-xsave", target);
    ck_assert(!has(t, "avx") && !has(t, "xsaves") && !has(t, "pku"));
    ck_assert_uint_eq(answer(t, 0xd, 0).eax, 0);

    t = build(&out, intel(&in), "host,-amx-tile", target);
    ck_assert_uint_eq(answer(t, 0xd, 0).eax, 0x2e7);
    ck_assert_uint_eq(answer(t, 0xd, 0).ecx, 0xa88);
    ck_assert(!has(t, "amx_int8"));
}
END_TEST

START_TEST(model_errors)
{
    static const struct {
        const char *text, *words[2];
    } cases[] = {
        {"", {"\"\"", "host"}},
        {"EPYC", {"\"EPYC\"", "host"}},
        {"hosts", {"\"hosts\"", "host"}},
        {"host,", {"empty", NULL}},
        {"host,,-avx", {"empty", NULL}},
        {"host,+vmx", {"\"+vmx\"", "-NAME"}},
        {"host,cx16", {"\"cx16\"", "-NAME"}},
        {"host,-cx61", {"\"cx61\"", "cx16"}},
        {"host,-avx51f", {"\"avx51f\"", "avx512f"}},
        {"host,-tsc_dedline", {"\"tsc_dedline\"", "tsc"}},
        {"host,-kvmcloc", {"\"kvmcloc\"", "\"kvmclock\""}},
        {"host,-", {"\"\"", "not known"}},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        struct cpu_model model;
        struct error err = {0};
        ck_assert_msg(cpu_model_parse(cases[i].text, &model, &err) == -EINVAL, "%s: %s",
                      cases[i].text, err.text);
        for (unsigned w = 0; w < 2 && cases[i].words[w]; w++) {
            ck_assert_msg(strstr(err.text, cases[i].words[w]) != NULL, "%s: %s", cases[i].text,
                          err.text);
        }
    }
    struct cpu_model model;
    struct error err = {0};
    ck_assert_int_eq(cpu_model_parse("host,-zzzzqqqqzzzz", &model, &err), -EINVAL);
    ck_assert_ptr_null(strstr(err.text, "did you mean"));
    char big[4096];
    memset(big, 'x', sizeof(big));
    memcpy(big, "host,-", 6);
    big[sizeof(big) - 1] = 0;
    ck_assert_int_eq(cpu_model_parse(big, &model, &err), -EINVAL);
    // The same name twice is one removal.
    ck_assert_int_eq(cpu_model_parse("host,-cx16,-cmpxchg16b", &model, &err), 0);
    ck_assert_uint_eq(model.nr_removed, 1);
    // Everything at once does not fit and says so; it does not overrun.
    char all[8192] = "host";
    for (size_t i = 0; cpuid_feature_name(i); i++) {
        strcat(all, ",-");
        strcat(all, cpuid_feature_name(i));
    }
    ck_assert_int_eq(cpu_model_parse(all, &model, &err), -E2BIG);
}
END_TEST

START_TEST(names_are_unique)
{
    const struct cpuid_feature *f, *g;
    for (size_t i = 0; (f = cpuid_feature_at(i)); i++) {
        ck_assert_ptr_eq(cpuid_feature_find(f->name, strlen(f->name)), f);
        if (f->alias) {
            ck_assert_msg(cpuid_feature_find(f->alias, strlen(f->alias)) == f, "%s", f->alias);
        }
        for (size_t j = 0; j < i && (g = cpuid_feature_at(j)); j++) {
            ck_assert_msg(f->leaf != g->leaf || f->subleaf != g->subleaf || f->reg != g->reg ||
                              f->bit != g->bit,
                          "%s and %s are one bit", f->name, g->name);
        }
        // Every dependent is a real name (find returns NULL for a misspelt one and ends the list).
        for (size_t n = 0; (g = cpuid_feature_dependent(f, n)); n++)
            ck_assert_ptr_ne(f, g);
    }
    ck_assert_ptr_null(cpuid_feature_name(100000));
}
END_TEST

START_TEST(compatible)
{
    union table in, guest, host;
    struct cpuid_target target = {.cpus = 4, .apic_id = 2};
    struct error err = {0};
    amd(&in);
    build(&guest, &in.head, "host", target);
    ck_assert_msg(cpuid_compatible(&guest.head, &in.head, &err) == 0, "%s", err.text);
    // Topology, APIC id and the guest's own switches are not features.
    build(&host, &in.head, "host", (struct cpuid_target) {.cpus = 1});
    ck_assert_int_eq(cpuid_compatible(&guest.head, &host.head, &err), 0);
    // A smaller guest on a bigger host: yes. The reverse names what is missing.
    build(&host, &in.head, "host,-avx512f,-rdseed", target);
    ck_assert_int_eq(cpuid_compatible(&host.head, &guest.head, &err), 0);
    ck_assert_int_eq(cpuid_compatible(&guest.head, &host.head, &err), -ENOTSUP);
    ck_assert_msg(strstr(err.text, "avx512f") && strstr(err.text, "rdseed"), "%s", err.text);
    ck_assert_msg(strstr(err.text, "...") != NULL, "%s", err.text);

    build(&host, &in.head, "host,-umip", target);
    ck_assert_int_eq(cpuid_compatible(&guest.head, &host.head, &err), -ENOTSUP);
    ck_assert_msg(strstr(err.text, "1 feature ") && strstr(err.text, ": umip"), "%s", err.text);

    union table other;
    intel(&other);
    ck_assert_int_eq(cpuid_compatible(&guest.head, &other.head, &err), -ENOTSUP);
    ck_assert_msg(strstr(err.text, "AuthenticAMD") && strstr(err.text, "GenuineIntel"), "%s",
                  err.text);

    // Fewer physical address bits, a component at another offset, a bit without a name.
    for (unsigned i = 0; i < host.head.nent; i++) {
        host = in;
        struct kvm_cpuid_entry2 *e = &host.head.entries[i];
        if (e->function == 0x80000008 && (e->eax = 0x302e)) {
            ck_assert_int_eq(cpuid_compatible(&guest.head, &host.head, &err), -ENOTSUP);
            ck_assert_msg(strstr(err.text, "physical-bits(48>46)") != NULL, "%s", err.text);
        } else if (e->function == 0xd && e->index == 9) {
            e->ebx = 0xa80;
            ck_assert_int_eq(cpuid_compatible(&guest.head, &host.head, &err), -ENOTSUP);
            ck_assert_msg(strstr(err.text, "xsave-layout[9]") != NULL, "%s", err.text);
        }
    }
}
END_TEST

START_TEST(bad_tables)
{
    union table in, out;
    struct cpu_model model = {0};
    struct error err = {0};
    struct cpuid_target target = {.cpus = 1};
    table_of(&in, amd_rows, 1);
    ck_assert_int_eq(cpuid_build(&in.head, &model, &target, &out.head, &err), -EINVAL);
    amd(&in);
    in.head.nent = CPUID_MAX_ENTRIES + 1;
    ck_assert_int_eq(cpuid_build(&in.head, &model, &target, &out.head, &err), -EINVAL);
    ck_assert_int_eq(cpuid_compatible(&in.head, &out.head, &err), -EINVAL);
    // A table without room for the added leaves.
    for (unsigned i = ARRAY_SIZE(amd_rows); i < CPUID_MAX_ENTRIES; i++)
        in.head.entries[i] = (struct kvm_cpuid_entry2) {.function = 0x20000000 + i};
    in.head.nent = CPUID_MAX_ENTRIES;
    for (unsigned i = 0; i < CPUID_MAX_ENTRIES; i++) {
        if (in.head.entries[i].function == 0x80000026)
            in.head.entries[i].function = 0x20000000 + i;
    }
    ck_assert_int_eq(cpuid_build(&in.head, &model, &target, &out.head, &err), -E2BIG);
    amd(&in);
    target = (struct cpuid_target) {.cpus = 2, .apic_id = 2};
    ck_assert_int_eq(cpuid_build(&in.head, &model, &target, &out.head, &err), -EINVAL);
    target = (struct cpuid_target) {.cpus = 0};
    ck_assert_int_eq(cpuid_build(&in.head, &model, &target, &out.head, &err), -EINVAL);
    // An empty saved table claims nothing but its vendor.
    table_of(&in, amd_rows, 1);
    in.head.nent = 0;
    amd(&out);
    ck_assert_int_eq(cpuid_compatible(&in.head, &out.head, &err), -ENOTSUP);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("cpuid");
    tcase_add_loop_test(tc, topology_amd_any_count, 1, 65);
    tcase_add_loop_test(tc, topology_intel_any_count, 1, 65);
    tcase_add_test(tc, hypervisor_leaves);
    tcase_add_test(tc, software_backend_hides_hypercalls);
    tcase_add_test(tc, masks_take_dependents);
    tcase_add_test(tc, model_errors);
    tcase_add_test(tc, names_are_unique);
    tcase_add_test(tc, compatible);
    tcase_add_test(tc, bad_tables);
    Suite *suite = suite_create("cpuid");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
