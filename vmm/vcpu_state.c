// SPDX-License-Identifier: Apache-2.0
// The saved state of a vCPU: the blocks of KVM's ABI (Documentation/virt/kvm/api.rst), which on x86
// are fixed little-endian structures, each one field of the state table.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm/vcpu.h"
#include "vmm/vm.h"

enum {
    MSRS_MAX = 256,
    XSAVE_MAX = 16384, // AMX tile data included
    MSR_TSC = 0x10,
    MSR_APIC_BASE = 0x1b,
    MSR_ARCH_CAPABILITIES = 0x10a,
    MSR_MTRR_DEF_TYPE = 0x2ff,
    MSR_TSC_DEADLINE = 0x6e0,
};

struct msr {
    uint64_t index, value;
};

struct vcpu_state {
    struct vcpu *vcpu;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
    struct kvm_vcpu_events events;
    struct kvm_debugregs debugregs;
    struct kvm_mp_state mp_state;
    struct kvm_lapic_state lapic;
    uint32_t tsc_khz;
    uint32_t msrs_len; // bytes
    struct msr msrs[MSRS_MAX];
    uint32_t xsave_len; // bytes
    uint8_t xsave[XSAVE_MAX];
    uint32_t cpuid_len; // bytes
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[CPUID_MAX_ENTRIES];
    } cpuid;
};

int vcpu_state_create(struct vcpu *vcpu, const struct kvm_cpuid2 *cpuid, struct error *err)
{
    struct vcpu_state *s = calloc(1, sizeof(*s));
    if (!s)
        return error_set(err, -ENOMEM, "vCPU %u: no memory for its state", vcpu->index);
    s->vcpu = vcpu;
    s->cpuid_len = (uint32_t)(sizeof(*cpuid) + cpuid->nent * sizeof(cpuid->entries[0]));
    memcpy(&s->cpuid, cpuid, s->cpuid_len);
    vcpu->state = s;
    return 0;
}

const struct kvm_cpuid2 *vcpu_cpuid(const struct vcpu *vcpu)
{
    return &vcpu->state->cpuid.head;
}

// --- MSRs

struct msr_list {
    struct kvm_msr_list head;
    uint32_t indices[MSRS_MAX];
};

static bool list_has(const struct msr_list *list, uint32_t index)
{
    for (uint32_t i = 0; i < list->head.nmsrs; i++)
        if (list->indices[i] == index)
            return true;
    return false;
}

static int list_read(const struct vm *vm, struct msr_list *list, struct error *err)
{
    // What KVM lists, and what it keeps but does not list on every back end.
    static const uint32_t more[] = {MSR_APIC_BASE,
                                    MSR_MTRR_DEF_TYPE,
                                    0xc0000100 /* FS_BASE */,
                                    0xc0000101 /* GS_BASE */,
                                    0xc0000102 /* KERNEL_GS_BASE */,
                                    0xc0000103 /* TSC_AUX */};
    list->head.nmsrs = MSRS_MAX - ARRAY_SIZE(more);
    if (ioctl(vm->kvm_fd, KVM_GET_MSR_INDEX_LIST, &list->head))
        return error_errno(err, "KVM_GET_MSR_INDEX_LIST");
    for (size_t i = 0; i < ARRAY_SIZE(more); i++)
        if (!list_has(list, more[i]))
            list->indices[list->head.nmsrs++] = more[i];
    return 0;
}

// KVM_GET_MSRS and KVM_SET_MSRS stop at the first MSR they refuse and return how many they did.
struct msr_batch {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[MSRS_MAX];
};

static int msrs_save(struct vcpu_state *s, struct error *err)
{
    struct msr_list list;
    struct msr_batch batch;
    int ret = list_read(s->vcpu->vm, &list, err);
    if (ret)
        return ret;
    uint32_t nr = 0, next = 0;
    while (next < list.head.nmsrs) {
        uint32_t n = list.head.nmsrs - next;
        memset(&batch, 0, sizeof(batch.head) + n * sizeof(batch.entries[0]));
        batch.head.nmsrs = n;
        for (uint32_t i = 0; i < n; i++)
            batch.entries[i].index = list.indices[next + i];
        int got = ioctl(s->vcpu->fd, KVM_GET_MSRS, &batch);
        if (got < 0)
            return error_errno(err, "KVM_GET_MSRS");
        for (int i = 0; i < got; i++)
            s->msrs[nr++] = (struct msr) {batch.entries[i].index, batch.entries[i].data};
        next += (uint32_t)got + 1; // past the one it does not have
    }
    s->msrs_len = nr * (uint32_t)sizeof(s->msrs[0]);
    return 0;
}

// The deadline is lost unless the local APIC's timer is already in deadline mode and the TSC is
// already set: so the TSC goes first and the deadline last.
static int msr_rank(uint64_t index)
{
    return index == MSR_TSC ? 0 : index == MSR_TSC_DEADLINE ? 2 : 1;
}

static int by_rank(const void *a, const void *b)
{
    const struct msr *x = a, *y = b;
    int rank = msr_rank(x->index) - msr_rank(y->index);
    return rank ? rank : (x->index > y->index) - (x->index < y->index);
}

// A refused MSR matters only if it would have had another value.
static int msr_refused(struct vcpu_state *s, const struct msr *want, struct error *err)
{
    struct msr_batch one = {.head.nmsrs = 1, .entries[0].index = (uint32_t)want->index};
    int got = ioctl(s->vcpu->fd, KVM_GET_MSRS, &one);
    if ((got == 1 && one.entries[0].data == want->value) || (got != 1 && !want->value) ||
        want->index == MSR_ARCH_CAPABILITIES)
        return 0;
    return error_set(err, -ENOTSUP, "this host refuses MSR %#llx = %#llx",
                     (unsigned long long)want->index, (unsigned long long)want->value);
}

static int msrs_load(struct vcpu_state *s, struct error *err)
{
    struct msr_batch batch;
    uint32_t nr = s->msrs_len / (uint32_t)sizeof(s->msrs[0]), next = 0;
    qsort(s->msrs, nr, sizeof(s->msrs[0]), by_rank);
    while (next < nr) {
        batch.head = (struct kvm_msrs) {.nmsrs = nr - next};
        for (uint32_t i = next; i < nr; i++)
            batch.entries[i - next] = (struct kvm_msr_entry) {.index = (uint32_t)s->msrs[i].index,
                                                              .data = s->msrs[i].value};
        int set = ioctl(s->vcpu->fd, KVM_SET_MSRS, &batch);
        if (set < 0)
            return error_errno(err, "KVM_SET_MSRS");
        next += (uint32_t)set;
        if (next == nr)
            break;
        int ret = msr_refused(s, &s->msrs[next], err);
        if (ret)
            return ret;
        next++;
    }
    return 0;
}

// --- FPU, SSE, AVX, AMX

static int xsave_size(const struct vcpu_state *s)
{
    int size = ioctl(s->vcpu->vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    return size > (int)sizeof(struct kvm_xsave) ? size : (int)sizeof(struct kvm_xsave);
}

static int xsave_save(struct vcpu_state *s, struct error *err)
{
    int size = xsave_size(s);
    if (size > XSAVE_MAX)
        return error_set(err, -EOVERFLOW, "FPU state of %d bytes, at most %d", size, XSAVE_MAX);
    unsigned long get = size > (int)sizeof(struct kvm_xsave) ? KVM_GET_XSAVE2 : KVM_GET_XSAVE;
    if (ioctl(s->vcpu->fd, get, s->xsave))
        return error_errno(err, "KVM_GET_XSAVE");
    s->xsave_len = (uint32_t)size;
    return 0;
}

static int xsave_load(struct vcpu_state *s, struct error *err)
{
    int size = xsave_size(s);
    if ((int)s->xsave_len > size)
        return error_set(err, -ENOTSUP, "FPU state of %u bytes, this host has %d", s->xsave_len,
                         size);
    memset(s->xsave + s->xsave_len, 0, (size_t)size - s->xsave_len);
    if (ioctl(s->vcpu->fd, KVM_SET_XSAVE, s->xsave))
        return error_errno(err, "KVM_SET_XSAVE");
    return 0;
}

// --- the whole

// Each block is one ioctl; a table, so that save and load cannot drift apart.
struct block {
    const char *name;
    unsigned long get, set;
    size_t offset;
};

#define BLOCK(NAME, member)                                                        \
    {                                                                              \
#NAME, KVM_GET_##NAME, KVM_SET_##NAME, offsetof(struct vcpu_state, member) \
    }

// In the order they are loaded. The local APIC before the MSRs (deadline timer), the events last
// (they may depend on all others).
//
// A one-shot timer that has expired fires once more when KVM_SET_LAPIC loads it (each move adds
// one; deadlines are exact). KVM_GET_LAPIC shows a count of 0 both for one that was delivered and
// for one that expired while the vCPU stood still and must still come: KVM gives both, and so do
// we, since a guest copes with a tick too many and not with one too few.
static const struct block blocks_before_msrs[] = {BLOCK(SREGS, sregs), BLOCK(REGS, regs),
                                                  BLOCK(DEBUGREGS, debugregs), BLOCK(LAPIC, lapic)};
static const struct block blocks_after_msrs[] = {BLOCK(MP_STATE, mp_state),
                                                 BLOCK(VCPU_EVENTS, events)};

static int blocks_apply(struct vcpu_state *s, const struct block *blocks, size_t nr, bool set,
                        struct error *err)
{
    for (size_t i = 0; i < nr; i++)
        if (ioctl(s->vcpu->fd, set ? blocks[i].set : blocks[i].get, (char *)s + blocks[i].offset))
            return error_errno(err, "KVM_%s_%s", set ? "SET" : "GET", blocks[i].name);
    return 0;
}

static bool has_xcrs(const struct vcpu_state *s)
{
    return ioctl(s->vcpu->vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XCRS) > 0;
}

static int vcpu_save(void *object, struct error *err)
{
    struct vcpu_state *s = object;
    // First: with an in-kernel APIC it also accepts a pending INIT or SIPI.
    int ret = blocks_apply(s, blocks_after_msrs, 1, false, err);
    if (!ret)
        ret = blocks_apply(s, blocks_before_msrs, ARRAY_SIZE(blocks_before_msrs), false, err);
    if (!ret && has_xcrs(s) && ioctl(s->vcpu->fd, KVM_GET_XCRS, &s->xcrs))
        ret = error_errno(err, "KVM_GET_XCRS");
    if (!ret)
        ret = xsave_save(s, err);
    if (!ret)
        ret = msrs_save(s, err);
    if (!ret)
        ret = blocks_apply(s, blocks_after_msrs + 1, ARRAY_SIZE(blocks_after_msrs) - 1, false, err);
    int khz = ioctl(s->vcpu->fd, KVM_GET_TSC_KHZ, 0);
    s->tsc_khz = khz > 0 ? (uint32_t)khz : 0;
    return ret;
}

static int cpuid_check(const struct vcpu_state *s, struct error *err)
{
    const struct kvm_cpuid2 *cpuid = &s->cpuid.head;
    if (s->cpuid_len < sizeof(*cpuid) || cpuid->nent > CPUID_MAX_ENTRIES ||
        s->cpuid_len != sizeof(*cpuid) + cpuid->nent * sizeof(cpuid->entries[0]))
        return error_set(err, -EBADMSG, "CPUID block of %u bytes does not match its entry count",
                         s->cpuid_len);
    return cpuid_compatible(cpuid, s->vcpu->vm->host_cpuid, err);
}

// A rate within 250 ppm needs no scaling: that is what NTP corrects anyway (KVM's own tolerance).
static int tsc_load(struct vcpu_state *s, struct error *err)
{
    int here = ioctl(s->vcpu->fd, KVM_GET_TSC_KHZ, 0);
    if (!s->tsc_khz || here <= 0)
        return 0;
    uint64_t diff = (uint64_t)llabs((long long)s->tsc_khz - here);
    if (diff * 4000 <= (uint64_t)here || !ioctl(s->vcpu->fd, KVM_SET_TSC_KHZ, s->tsc_khz))
        return 0;
    return error_set(err, -ENOTSUP,
                     "the guest's TSC runs at %u kHz, this host's at %d and it cannot be scaled",
                     s->tsc_khz, here);
}

static int vcpu_load(void *object, uint16_t version, struct error *err)
{
    struct vcpu_state *s = object;
    if (s->msrs_len % sizeof(s->msrs[0]))
        return error_set(err, -EBADMSG, "MSR block of %u bytes, expected a multiple of %zu",
                         s->msrs_len, sizeof(s->msrs[0]));
    int ret = cpuid_check(s, err);
    // A vCPU that has run keeps its CPUID: KVM takes no other, nor always the same.
    if (!ret && !s->vcpu->vm->in_reset && ioctl(s->vcpu->fd, KVM_SET_CPUID2, &s->cpuid))
        ret = error_errno(err, "KVM_SET_CPUID2");
    if (!ret)
        ret = tsc_load(s, err);
    if (!ret)
        ret = blocks_apply(s, blocks_before_msrs, ARRAY_SIZE(blocks_before_msrs), true, err);
    if (!ret && has_xcrs(s) && ioctl(s->vcpu->fd, KVM_SET_XCRS, &s->xcrs))
        ret = error_errno(err, "KVM_SET_XCRS");
    if (!ret)
        ret = xsave_load(s, err);
    if (!ret)
        ret = msrs_load(s, err);
    if (!ret)
        ret = blocks_apply(s, blocks_after_msrs, ARRAY_SIZE(blocks_after_msrs), true, err);
    return ret;
}

static const struct state_field vcpu_fields[] = {
    STATE_FIELD_VAR(struct vcpu_state, cpuid, cpuid_len, 1),
    STATE_FIELD_BYTES(struct vcpu_state, regs, 1),
    STATE_FIELD_BYTES(struct vcpu_state, sregs, 1),
    STATE_FIELD_BYTES(struct vcpu_state, xcrs, 1),
    STATE_FIELD_BYTES(struct vcpu_state, events, 1),
    STATE_FIELD_BYTES(struct vcpu_state, debugregs, 1),
    STATE_FIELD_BYTES(struct vcpu_state, mp_state, 1),
    STATE_FIELD_BYTES(struct vcpu_state, lapic, 1),
    STATE_FIELD_INT(struct vcpu_state, tsc_khz, 1),
    STATE_FIELD_VAR(struct vcpu_state, msrs, msrs_len, 1),
    STATE_FIELD_VAR(struct vcpu_state, xsave, xsave_len, 1),
};

const struct state_table vcpu_state_table = {
    .name = "vcpu",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(vcpu_fields),
    .fields = vcpu_fields,
    .save = vcpu_save,
    .load = vcpu_load,
};
