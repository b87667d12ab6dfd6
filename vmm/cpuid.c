// SPDX-License-Identifier: Apache-2.0
#include "vmm/cpuid.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "vmm/util.h"

#define LEAF_EXT        0x80000000u
#define LEAF_KVM        0x40000000u
#define LEAF_KVM_TIMING 0x40000010u // TSC and APIC timer rate, in kHz (VMware's convention)

#define BIT(n) (1u << (n))

// KVM's local APIC timer counts at 1 GHz.
#define APIC_BUS_KHZ 1000000u

// --- names

static unsigned edit_distance(const char *a, size_t a_len, const char *b)
{
    enum { MAX = 32 };
    size_t b_len = strlen(b);
    if (a_len >= MAX || b_len >= MAX)
        return UINT32_MAX;
    unsigned row[MAX];
    for (size_t j = 0; j <= b_len; j++)
        row[j] = (unsigned)j;
    for (size_t i = 1; i <= a_len; i++) {
        unsigned diagonal = row[0];
        row[0] = (unsigned)i;
        for (size_t j = 1; j <= b_len; j++) {
            unsigned above = row[j];
            unsigned best = diagonal + (tolower((unsigned char)a[i - 1]) != b[j - 1]);
            if (above + 1 < best)
                best = above + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            row[j] = best;
            diagonal = above;
        }
    }
    return row[b_len];
}

// NULL when nothing is near enough to be what was meant.
static const char *name_nearest(const char *word, size_t len)
{
    const char *nearest = NULL;
    unsigned limit = len <= 3 ? 1 : len <= 6 ? 2 : 3;
    const struct cpuid_feature *f;
    for (size_t i = 0; (f = cpuid_feature_at(i)); i++) {
        const char *names[] = {f->name, f->alias};
        for (unsigned n = 0; n < 2 && names[n]; n++) {
            unsigned d = edit_distance(word, len, names[n]);
            if (d < limit || (d == limit && !nearest)) {
                limit = d;
                nearest = names[n];
            }
        }
    }
    return nearest;
}

static int model_remove(struct cpu_model *model, const struct cpuid_feature *feature,
                        struct error *err)
{
    for (unsigned i = 0; i < model->nr_removed; i++) {
        if (model->removed[i] == feature)
            return 0;
    }
    if (model->nr_removed == CPU_MODEL_MAX_MASKS)
        return error_set(err, -E2BIG, "CPU features: more than %d removed", CPU_MODEL_MAX_MASKS);
    model->removed[model->nr_removed++] = feature;
    return 0;
}

static int model_word(struct cpu_model *model, const char *word, size_t len, struct error *err)
{
    int shown = len > 64 ? 64 : (int)len;
    if (len == 0)
        return error_set(err, -EINVAL, "CPU features: an empty word; expected host,-NAME,...");
    if (word[0] == '+')
        return error_set(err, -EINVAL,
                         "CPU feature \"%.*s\": host already gives all that KVM can; only -NAME "
                         "is possible",
                         shown, word);
    if (word[0] != '-')
        return error_set(err, -EINVAL, "CPU feature \"%.*s\": write -NAME to take it away", shown,
                         word);
    const struct cpuid_feature *feature = cpuid_feature_find(word + 1, len - 1);
    if (feature)
        return model_remove(model, feature, err);
    const char *nearest = name_nearest(word + 1, len - 1);
    return error_set(err, -EINVAL, "CPU feature \"%.*s\" is not known%s%s%s", shown - 1, word + 1,
                     nearest ? "; did you mean \"" : "", nearest ? nearest : "",
                     nearest ? "\"?" : "");
}

int cpu_model_parse(const char *text, struct cpu_model *model, struct error *err)
{
    *model = (struct cpu_model) {0};
    size_t len = strcspn(text, ",");
    if (len != 4 || strncmp(text, "host", 4))
        return error_set(err, -EINVAL, "CPU model \"%.*s\": only \"host\" is known",
                         len > 64 ? 64 : (int)len, text);
    while (text[len]) {
        text += len + 1;
        len = strcspn(text, ",");
        int ret = model_word(model, text, len, err);
        if (ret)
            return ret;
    }
    // The list grows while it is walked, so that dependents of dependents go too.
    for (unsigned i = 0; i < model->nr_removed; i++) {
        const struct cpuid_feature *dependent;
        for (size_t n = 0; (dependent = cpuid_feature_dependent(model->removed[i], n)); n++) {
            int ret = model_remove(model, dependent, err);
            if (ret)
                return ret;
        }
    }
    return 0;
}

// --- tables

static struct kvm_cpuid_entry2 *entry_find(const struct kvm_cpuid2 *table, uint32_t leaf,
                                           uint32_t subleaf)
{
    for (uint32_t i = 0; i < table->nent; i++) {
        const struct kvm_cpuid_entry2 *e = &table->entries[i];
        if (e->function != leaf)
            continue;
        if (e->index == subleaf || !(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX))
            return (struct kvm_cpuid_entry2 *)e;
    }
    return NULL;
}

static uint32_t *entry_reg(struct kvm_cpuid_entry2 *e, unsigned reg)
{
    uint32_t *regs[] = {&e->eax, &e->ebx, &e->ecx, &e->edx};
    return regs[reg];
}

static uint32_t table_reg(const struct kvm_cpuid2 *table, uint32_t leaf, uint32_t subleaf,
                          unsigned reg)
{
    struct kvm_cpuid_entry2 *e = entry_find(table, leaf, subleaf);
    // An entry without the index flag answers for every subleaf of a leaf that has none.
    if (!e || (subleaf && e->index != subleaf))
        return 0;
    return *entry_reg(e, reg);
}

static void table_remove(struct kvm_cpuid2 *table, uint32_t leaf)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < table->nent; i++) {
        if (table->entries[i].function != leaf)
            table->entries[kept++] = table->entries[i];
    }
    table->nent = kept;
}

// Sets the entry, adding it where it is not there yet.
static int table_set(struct kvm_cpuid2 *table, const struct kvm_cpuid_entry2 *entry,
                     struct error *err)
{
    struct kvm_cpuid_entry2 *e = NULL;
    for (uint32_t i = 0; i < table->nent && !e; i++) {
        if (table->entries[i].function == entry->function &&
            table->entries[i].index == entry->index)
            e = &table->entries[i];
    }
    if (!e) {
        if (table->nent >= CPUID_MAX_ENTRIES)
            return error_set(err, -E2BIG, "CPUID: more than %d entries", CPUID_MAX_ENTRIES);
        e = &table->entries[table->nent++];
    }
    *e = *entry;
    return 0;
}

enum vendor { VENDOR_OTHER, VENDOR_INTEL, VENDOR_AMD };

static enum vendor table_vendor(const struct kvm_cpuid2 *table)
{
    struct kvm_cpuid_entry2 *e = entry_find(table, 0, 0);
    char name[12];
    memcpy(name, &e->ebx, 4);
    memcpy(name + 4, &e->edx, 4);
    memcpy(name + 8, &e->ecx, 4);
    if (!memcmp(name, "GenuineIntel", 12))
        return VENDOR_INTEL;
    // Hygon's are AMD's family 17h under another name.
    if (!memcmp(name, "AuthenticAMD", 12) || !memcmp(name, "HygonGenuine", 12))
        return VENDOR_AMD;
    return VENDOR_OTHER;
}

// --- topology: one socket, one thread a core

// Bits an APIC id needs for the cores of the package.
static unsigned core_bits(unsigned cpus)
{
    unsigned bits = 0;
    while ((1u << bits) < cpus)
        bits++;
    return bits;
}

static unsigned min_u(unsigned a, unsigned b)
{
    return a < b ? a : b;
}

static void topology_leaf1(struct kvm_cpuid_entry2 *e, const struct cpuid_target *t,
                           enum vendor vendor)
{
    // Intel counts the ids reserved in the package, AMD the processors that are there.
    unsigned count = vendor == VENDOR_AMD ? t->cpus : 1u << core_bits(t->cpus);
    unsigned clflush = (e->ebx >> 8) & 0xff; // in units of 8 bytes
    e->ebx = (t->apic_id & 0xff) << 24 | min_u(count, 255) << 16 | (clflush ? clflush : 8) << 8;
    if (t->cpus > 1)
        e->edx |= BIT(28);
    else
        e->edx &= ~BIT(28);
}

// Leaf 4 and, with the same layout in EAX, AMD's 0x8000001d: L1 and L2 belong to a core, L3 to all.
static void topology_caches(struct kvm_cpuid2 *out, const struct cpuid_target *t,
                            enum vendor vendor)
{
    unsigned reserved = 1u << core_bits(t->cpus);
    for (uint32_t i = 0; i < out->nent; i++) {
        struct kvm_cpuid_entry2 *e = &out->entries[i];
        bool amd = e->function == 0x8000001d;
        if ((e->function != 4 && !amd) || !(e->eax & 0x1f))
            continue;
        unsigned level = (e->eax >> 5) & 7;
        unsigned sharing = level < 3 ? 1 : amd ? t->cpus : reserved;
        e->eax = (e->eax & 0x3fff) | min_u(sharing - 1, 0xfff) << 14;
        if (!amd)
            e->eax |= min_u(reserved - 1, 0x3f) << 26;
    }
}

// Leaves 0xb and 0x1f: a thread level of one, then the cores.
static int topology_levels(struct kvm_cpuid2 *out, uint32_t leaf, const struct cpuid_target *t,
                           struct error *err)
{
    enum { LEVEL_NONE, LEVEL_SMT, LEVEL_CORE };
    struct kvm_cpuid_entry2 levels[] = {
        {.eax = 0, .ebx = 1, .ecx = LEVEL_SMT << 8},
        {.eax = core_bits(t->cpus), .ebx = t->cpus, .ecx = LEVEL_CORE << 8},
        {.ecx = LEVEL_NONE << 8},
    };
    table_remove(out, leaf);
    for (unsigned i = 0; i < ARRAY_SIZE(levels); i++) {
        levels[i].function = leaf;
        levels[i].index = i;
        levels[i].flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        levels[i].ecx |= i;
        levels[i].edx = t->apic_id;
        int ret = table_set(out, &levels[i], err);
        if (ret)
            return ret;
    }
    return 0;
}

static int topology_amd(struct kvm_cpuid2 *out, const struct cpuid_target *t, struct error *err)
{
    struct kvm_cpuid_entry2 *e = entry_find(out, 0x80000001, 0);
    bool topoext = false;
    if (e) {
        // "Cores, not threads": what leaf 1's count of several means.
        if (t->cpus > 1)
            e->ecx |= BIT(1);
        else
            e->ecx &= ~BIT(1);
        topoext = e->ecx & BIT(22);
    }
    e = entry_find(out, 0x80000008, 0);
    if (e)
        e->ecx = core_bits(t->cpus) << 12 | min_u(t->cpus - 1, 0xff);
    // Levels beyond what we describe: absent is right, the host's would be wrong.
    table_remove(out, 0x80000026);
    if (!topoext)
        return 0;
    // EBX: one thread a core, core id. ECX: one node, number 0.
    return table_set(out,
                     &(struct kvm_cpuid_entry2) {
                         .function = 0x8000001e, .eax = t->apic_id, .ebx = t->apic_id & 0xff},
                     err);
}

static int topology_set(struct kvm_cpuid2 *out, const struct cpuid_target *t, struct error *err)
{
    enum vendor vendor = table_vendor(out);
    struct kvm_cpuid_entry2 *zero = entry_find(out, 0, 0);
    if (zero->eax < 0xb)
        zero->eax = 0xb;
    uint32_t max = zero->eax;
    topology_leaf1(entry_find(out, 1, 0), t, vendor);
    topology_caches(out, t, vendor);
    int ret = topology_levels(out, 0xb, t, err);
    if (!ret && max >= 0x1f)
        ret = topology_levels(out, 0x1f, t, err);
    if (!ret && vendor == VENDOR_AMD)
        ret = topology_amd(out, t, err);
    return ret;
}

// --- features

static void feature_clear(struct kvm_cpuid2 *out, uint32_t leaf, uint32_t subleaf, unsigned reg,
                          unsigned bit)
{
    struct kvm_cpuid_entry2 *e = entry_find(out, leaf, subleaf);
    if (e && e->index == subleaf)
        *entry_reg(e, reg) &= ~BIT(bit);
}

// State components (XCR0 bits) that a removed feature takes along. SDM vol. 1, 13.1.
static uint64_t feature_xcr0(const struct cpuid_feature *f)
{
    static const struct {
        uint32_t leaf;
        uint8_t reg, bit;
        uint64_t components;
    } owners[] = {
        {1, CPUID_ECX, 26, UINT64_MAX}, // xsave
        {1, CPUID_ECX, 28, 0xe4},       // avx: YMM, and AVX-512's upon it
        {7, CPUID_EBX, 14, 0x18},       // mpx
        {7, CPUID_EBX, 16, 0xe0},       // avx512f: opmask, ZMM_Hi256, Hi16_ZMM
        {7, CPUID_ECX, 3, 0x200},       // pku
        {7, CPUID_EDX, 24, 0x60000},    // amx_tile: TILECFG, TILEDATA
    };
    for (unsigned i = 0; i < ARRAY_SIZE(owners); i++) {
        if (f->leaf == owners[i].leaf && f->reg == owners[i].reg && f->bit == owners[i].bit &&
            f->subleaf == 0)
            return owners[i].components;
    }
    return 0;
}

// Makes leaf 0xd describe only the components left in `allowed`.
static void xsave_limit(struct kvm_cpuid2 *out, uint64_t allowed)
{
    struct kvm_cpuid_entry2 *d = entry_find(out, 0xd, 0);
    if (!d || allowed == UINT64_MAX)
        return;
    if (!allowed) {
        table_remove(out, 0xd);
        return;
    }
    d->eax &= (uint32_t)allowed;
    d->edx &= (uint32_t)(allowed >> 32);
    // Legacy area and header, then as far as the last component of the standard format reaches.
    uint32_t size = 512 + 64;
    for (uint32_t i = 0; i < out->nent; i++) {
        struct kvm_cpuid_entry2 *e = &out->entries[i];
        if (e->function != 0xd || e->index < 2)
            continue;
        if (e->index > 63 || !(allowed >> e->index & 1))
            e->eax = e->ebx = e->ecx = e->edx = 0;
        else if (!(e->ecx & 1) && e->ebx + e->eax > size)
            size = e->ebx + e->eax;
    }
    d->ecx = size; // EBX is for the current XCR0: KVM keeps it
    if (d->ebx > size)
        d->ebx = size;
}

static void features_remove(struct kvm_cpuid2 *out, const struct cpu_model *model)
{
    uint64_t allowed = UINT64_MAX;
    for (unsigned i = 0; i < model->nr_removed; i++) {
        const struct cpuid_feature *f = model->removed[i];
        feature_clear(out, f->leaf, f->subleaf, f->reg, f->bit);
        allowed &= ~feature_xcr0(f);
        // AMD repeats most of leaf 1's EDX in 0x80000001.
        if (f->leaf == 1 && f->reg == CPUID_EDX && table_vendor(out) == VENDOR_AMD &&
            (0x0183f3ffu & BIT(f->bit)))
            feature_clear(out, 0x80000001, 0, CPUID_EDX, f->bit);
    }
    xsave_limit(out, allowed);
}

// design/kvm-hosts.md: ring 0 is emulated there, without cmpxchg16b and invpcid, and a vmcall
// spins.
static void features_software_backend(struct kvm_cpuid2 *out)
{
    static const struct {
        uint32_t leaf;
        uint8_t reg, bit;
    } lacking[] = {
        {1, CPUID_ECX, 13},          // cx16
        {1, CPUID_ECX, 17},          // pcid
        {7, CPUID_EBX, 10},          // invpcid
        {0x40000001, CPUID_EAX, 7},  // pv-unhalt: KVM_HC_KICK_CPU
        {0x40000001, CPUID_EAX, 9},  // pv-tlb-flush
        {0x40000001, CPUID_EAX, 11}, // pv-ipi: KVM_HC_SEND_IPI
        {0x40000001, CPUID_EAX, 13}, // pv-sched-yield: KVM_HC_SCHED_YIELD
        {0x40000001, CPUID_EAX, 16}, // map-gpa-range: KVM_HC_MAP_GPA_RANGE
        {0x40000001, CPUID_EAX, 17}, // migration-control, which reports by that hypercall
    };
    for (unsigned i = 0; i < ARRAY_SIZE(lacking); i++)
        feature_clear(out, lacking[i].leaf, 0, lacking[i].reg, lacking[i].bit);
}

static int leaves_kvm(struct kvm_cpuid2 *out, const struct cpuid_target *t, struct error *err)
{
    static const char signature[12] = "KVMKVMKVM";
    struct kvm_cpuid_entry2 base = {.function = LEAF_KVM,
                                    .eax = t->tsc_khz ? LEAF_KVM_TIMING : LEAF_KVM + 1};
    memcpy(&base.ebx, signature, 4);
    memcpy(&base.ecx, signature + 4, 4);
    memcpy(&base.edx, signature + 8, 4);
    int ret = table_set(out, &base, err);
    if (!ret && !entry_find(out, LEAF_KVM + 1, 0))
        ret = table_set(out, &(struct kvm_cpuid_entry2) {.function = LEAF_KVM + 1}, err);
    return ret;
}

static int leaves_tsc(struct kvm_cpuid2 *out, const struct cpuid_target *t, struct error *err)
{
    if (!t->tsc_khz)
        return 0;
    int ret = table_set(out,
                        &(struct kvm_cpuid_entry2) {
                            .function = LEAF_KVM_TIMING, .eax = t->tsc_khz, .ebx = APIC_BUS_KHZ},
                        err);
    // Intel only. The "crystal" also drives the APIC timer, hence KVM's 1 GHz and not 24 MHz.
    if (ret || table_vendor(out) != VENDOR_INTEL || entry_find(out, 0, 0)->eax < 0x15)
        return ret;
    return table_set(
        out,
        &(struct kvm_cpuid_entry2) {
            .function = 0x15, .eax = APIC_BUS_KHZ, .ebx = t->tsc_khz, .ecx = APIC_BUS_KHZ * 1000u},
        err);
}

static int build_check(const struct kvm_cpuid2 *supported, const struct cpuid_target *t,
                       struct error *err)
{
    if (supported->nent > CPUID_MAX_ENTRIES)
        return error_set(err, -EINVAL, "CPUID: KVM gives %u entries, at most %d expected",
                         supported->nent, CPUID_MAX_ENTRIES);
    if (!entry_find(supported, 0, 0) || !entry_find(supported, 1, 0))
        return error_set(err, -EINVAL, "CPUID: KVM gives no leaf 0 or 1");
    if (t->cpus == 0 || t->cpus > 1u << 16 || t->apic_id >= t->cpus)
        return error_set(err, -EINVAL, "CPUID: APIC id %u of %u CPUs", t->apic_id, t->cpus);
    return 0;
}

int cpuid_build(const struct kvm_cpuid2 *supported, const struct cpu_model *model,
                const struct cpuid_target *target, struct kvm_cpuid2 *out, struct error *err)
{
    int ret = build_check(supported, target, err);
    if (ret)
        return ret;
    out->nent = supported->nent;
    out->padding = 0;
    memcpy(out->entries, supported->entries, supported->nent * sizeof(out->entries[0]));

    struct kvm_cpuid_entry2 *one = entry_find(out, 1, 0);
    one->ecx |= BIT(31);  // hypervisor
    one->ecx &= ~BIT(27); // osxsave follows CR4: KVM keeps it
    if (target->tsc_deadline)
        one->ecx |= BIT(24);
    feature_clear(out, 7, 0, CPUID_ECX, 4); // ospke, likewise

    ret = topology_set(out, target, err);
    if (!ret)
        ret = leaves_kvm(out, target, err);
    if (!ret)
        ret = leaves_tsc(out, target, err);
    if (ret)
        return ret;
    if (target->software_backend)
        features_software_backend(out);
    features_remove(out, model);
    return 0;
}

// --- compatibility

// Bits that say how the machine is built or what the guest switched on, not what the CPU can do.
static uint32_t register_ignored(uint32_t leaf, uint32_t subleaf, unsigned reg)
{
    if (leaf == 1 && reg == CPUID_ECX)
        // x2apic, tsc-deadline, osxsave, hypervisor. KVM emulates the first two everywhere; older
        // kernels only do not list the deadline timer here.
        return BIT(21) | BIT(24) | BIT(27) | BIT(31);
    if (leaf == 1 && reg == CPUID_EDX)
        return BIT(28); // ht
    if (leaf == 7 && subleaf == 0 && reg == CPUID_ECX)
        return BIT(4); // ospke
    if (leaf == 0x80000001 && reg == CPUID_ECX)
        return BIT(1); // cmp_legacy
    return 0;
}

struct lack {
    char text[256];
    unsigned nr;
};

__attribute__((format(printf, 2, 3))) static void lack_add(struct lack *lack, const char *fmt, ...)
{
    enum { SHOWN = 8 };
    size_t used = strlen(lack->text);
    size_t room = sizeof(lack->text) - used;
    lack->nr++;
    if (lack->nr > SHOWN || room < 32) {
        if (room > 4 && (used < 3 || strcmp(lack->text + used - 3, "...")))
            strcat(lack->text, " ...");
        return;
    }
    va_list args;
    va_start(args, fmt);
    int n = used ? snprintf(lack->text + used, room, " ") : 0;
    vsnprintf(lack->text + used + n, room - (size_t)n - 8, fmt, args);
    va_end(args);
}

static const char *bit_name(uint32_t leaf, uint32_t subleaf, unsigned reg, unsigned bit)
{
    const struct cpuid_feature *f;
    for (size_t i = 0; (f = cpuid_feature_at(i)); i++) {
        if (f->leaf == leaf && f->subleaf == subleaf && f->reg == reg && f->bit == bit)
            return f->name;
    }
    return NULL;
}

static void compare_register(const struct kvm_cpuid2 *guest, const struct kvm_cpuid2 *host,
                             uint32_t leaf, uint32_t subleaf, unsigned reg, struct lack *lack)
{
    uint32_t missing = table_reg(guest, leaf, subleaf, reg) & ~table_reg(host, leaf, subleaf, reg) &
                       ~register_ignored(leaf, subleaf, reg);
    static const char *const regs[] = {"eax", "ebx", "ecx", "edx"};
    for (unsigned bit = 0; bit < 32; bit++) {
        if (!(missing & BIT(bit)))
            continue;
        const char *name = bit_name(leaf, subleaf, reg, bit);
        if (name)
            lack_add(lack, "%s", name);
        else
            lack_add(lack, "0x%x.%u:%s[%u]", leaf, subleaf, regs[reg], bit);
    }
}

// XSAVE areas move as they are, so each component must lie where the guest thinks it does.
static void compare_xsave(const struct kvm_cpuid2 *guest, const struct kvm_cpuid2 *host,
                          struct lack *lack)
{
    uint64_t used =
        table_reg(guest, 0xd, 0, CPUID_EAX) | (uint64_t)table_reg(guest, 0xd, 0, CPUID_EDX) << 32;
    uint64_t here =
        table_reg(host, 0xd, 0, CPUID_EAX) | (uint64_t)table_reg(host, 0xd, 0, CPUID_EDX) << 32;
    for (unsigned i = 0; i < 64; i++) {
        if (!(used >> i & 1))
            continue;
        if (!(here >> i & 1))
            lack_add(lack, "xcr0[%u]", i);
        else if (i >= 2 &&
                 (table_reg(guest, 0xd, i, CPUID_EAX) != table_reg(host, 0xd, i, CPUID_EAX) ||
                  table_reg(guest, 0xd, i, CPUID_EBX) != table_reg(host, 0xd, i, CPUID_EBX)))
            lack_add(lack, "xsave-layout[%u]", i);
    }
}

static int compare_vendor(const struct kvm_cpuid2 *guest, const struct kvm_cpuid2 *host,
                          struct error *err)
{
    char names[2][13] = {{0}};
    const struct kvm_cpuid2 *tables[] = {guest, host};
    for (unsigned i = 0; i < 2; i++) {
        uint32_t words[] = {table_reg(tables[i], 0, 0, CPUID_EBX),
                            table_reg(tables[i], 0, 0, CPUID_EDX),
                            table_reg(tables[i], 0, 0, CPUID_ECX)};
        memcpy(names[i], words, sizeof(words));
    }
    if (!memcmp(names[0], names[1], 12))
        return 0;
    for (unsigned i = 0; i < 2; i++) {
        for (char *c = names[i]; c < names[i] + 12; c++)
            *c = isprint((unsigned char)*c) ? *c : '?';
    }
    return error_set(err, -ENOTSUP, "the guest's CPU is of vendor \"%s\", this host's of \"%s\"",
                     names[0], names[1]);
}

int cpuid_compatible(const struct kvm_cpuid2 *guest, const struct kvm_cpuid2 *host,
                     struct error *err)
{
    if (guest->nent > CPUID_MAX_ENTRIES)
        return error_set(err, -EINVAL, "saved CPUID: %u entries, at most %d", guest->nent,
                         CPUID_MAX_ENTRIES);
    int ret = compare_vendor(guest, host, err);
    if (ret)
        return ret;
    struct lack lack = {0};
    uint32_t guest_bits = table_reg(guest, 0x80000008, 0, CPUID_EAX) & 0xff;
    uint32_t host_bits = table_reg(host, 0x80000008, 0, CPUID_EAX) & 0xff;
    if (guest_bits > host_bits)
        lack_add(&lack, "physical-bits(%u>%u)", guest_bits, host_bits);

    // The registers that hold features are those with a named bit; names of one register are
    // neighbours in the table.
    const struct cpuid_feature *f, *last = NULL;
    for (size_t i = 0; (f = cpuid_feature_at(i)); last = f, i++) {
        if (!last || f->leaf != last->leaf || f->subleaf != last->subleaf || f->reg != last->reg)
            compare_register(guest, host, f->leaf, f->subleaf, f->reg, &lack);
    }
    compare_xsave(guest, host, &lack);
    if (lack.nr)
        return error_set(err, -ENOTSUP, "this host's CPU lacks %u feature%s the guest has seen: %s",
                         lack.nr, lack.nr == 1 ? "" : "s", lack.text);
    return 0;
}
