// SPDX-License-Identifier: Apache-2.0
// Why a vCPU cannot go on, in words: where it stood, on which bytes, what those bytes most likely
// are, and what can be done about it.
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm/vcpu.h"
#include "vmm/vm.h"

enum { BYTES_MAX = 15 }; // the longest x86 instruction

struct known {
    uint8_t bytes[4];
    uint8_t mask[4];
    const char *name, *remedy;
};

#define RING0 "this host's KVM back end emulates guest ring 0 without it; "

// Opcodes without their prefixes; `mask` picks the bits that matter (ModRM reg field 0x38).
static const struct known known[] = {
    {{0xcc},
     {0xff},
     "int3 (breakpoint)",
     RING0 "use a kernel without int3 self-test (guest/build)"},
    {{0xcd}, {0xff}, "int n", RING0 "run on a VT-x or SVM host"},
    {{0x0f, 0xc7, 0x08},
     {0xff, 0xff, 0x38},
     "cmpxchg8b/16b",
     RING0 "hide it with --cpu host,-cx16"},
    {{0x0f, 0xb8}, {0xff, 0xff}, "popcnt", RING0 "add clearcpuid=popcnt to the command line"},
    {{0x0f, 0xbd}, {0xff, 0xff}, "lzcnt/bsr", RING0 "run on a VT-x or SVM host"},
    {{0x0f, 0x01, 0xca}, {0xff, 0xff, 0xff}, "clac", RING0 "add clearcpuid=smap"},
    {{0x0f, 0x01, 0xcb}, {0xff, 0xff, 0xff}, "stac", RING0 "add clearcpuid=smap"},
    {{0x0f, 0x01, 0xd0}, {0xff, 0xff, 0xff}, "xgetbv", RING0 "add noxsave"},
    {{0x0f, 0x01, 0xd1}, {0xff, 0xff, 0xff}, "xsetbv", RING0 "add noxsave"},
    {{0x0f, 0x01, 0xf9}, {0xff, 0xff, 0xff}, "rdtscp", RING0 "add clearcpuid=rdtscp"},
    {{0x0f, 0xae, 0x20}, {0xff, 0xff, 0x38}, "xsave", RING0 "add noxsave"},
    {{0x0f, 0xae, 0x28}, {0xff, 0xff, 0x38}, "xrstor", RING0 "add noxsave"},
    {{0x0f, 0xae, 0x30}, {0xff, 0xff, 0x38}, "xsaveopt/clwb", RING0 "add noxsave"},
    {{0x0f, 0xc7, 0x20}, {0xff, 0xff, 0x38}, "xsavec", RING0 "add noxsave"},
    {{0x0f, 0xc7, 0x28}, {0xff, 0xff, 0x38}, "xsaves", RING0 "add noxsave"},
    {{0x0f, 0xc7, 0x18}, {0xff, 0xff, 0x38}, "xrstors", RING0 "add noxsave"},
    {{0x9b}, {0xff}, "fwait", RING0 "use the kernel of guest/build"},
    {{0x0f, 0x00, 0x20}, {0xff, 0xff, 0x38}, "verr", RING0 "run on a VT-x or SVM host"},
    {{0x0f, 0x00, 0x28}, {0xff, 0xff, 0x38}, "verw", RING0 "add mitigations=off"},
    {{0x0f, 0x02}, {0xff, 0xff}, "lar", RING0 "run on a VT-x or SVM host"},
    {{0x0f, 0x03}, {0xff, 0xff}, "lsl", RING0 "run on a VT-x or SVM host"},
    {{0x0f, 0x34}, {0xff, 0xff}, "sysenter", RING0 "run on a VT-x or SVM host"},
    {{0x0f, 0x38, 0x82}, {0xff, 0xff, 0xff}, "invpcid", RING0 "hide it with --cpu host,-invpcid"},
    {{0xc5}, {0xff}, "an AVX instruction", RING0 "run on a VT-x or SVM host"},
    {{0xc4}, {0xff}, "an AVX instruction", RING0 "run on a VT-x or SVM host"},
    {{0x62}, {0xff}, "an AVX-512 instruction", RING0 "run on a VT-x or SVM host"},
    {{0xd8}, {0xf8}, "an x87 instruction", RING0 "run on a VT-x or SVM host"},
    {{0x0f, 0x01, 0xc1}, {0xff, 0xff, 0xff}, "vmcall", "a hypercall this host does not take here"},
};

static bool is_prefix(uint8_t byte)
{
    switch (byte) {
    case 0x66:
    case 0x67:
    case 0xf0:
    case 0xf2:
    case 0xf3:
    case 0x26:
    case 0x2e:
    case 0x36:
    case 0x3e:
    case 0x64:
    case 0x65:
        return true;
    default:
        return (byte & 0xf0) == 0x40; // REX, in 64-bit mode
    }
}

static const struct known *recognise(const uint8_t *bytes, unsigned len)
{
    while (len && is_prefix(*bytes)) {
        bytes++;
        len--;
    }
    for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
        unsigned j = 0;
        while (j < 4 && known[i].mask[j] && j < len &&
               (bytes[j] & known[i].mask[j]) == (known[i].bytes[j] & known[i].mask[j]))
            j++;
        if (j == 4 || !known[i].mask[j])
            return &known[i];
    }
    return NULL;
}

// The bytes at RIP: from the exit when KVM gave them, else through the guest's own page tables.
static unsigned fetch_bytes(struct vcpu *vcpu, uint64_t linear, uint8_t *bytes)
{
    struct kvm_run *run = vcpu->run;
    if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR &&
        run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION && run->internal.ndata >= 4 &&
        (run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) &&
        run->emulation_failure.insn_size) {
        unsigned n = run->emulation_failure.insn_size;
        n = n > BYTES_MAX ? BYTES_MAX : n;
        memcpy(bytes, run->emulation_failure.insn_bytes, n);
        return n;
    }
    unsigned n = 0;
    while (n < BYTES_MAX) {
        struct kvm_translation t = {.linear_address = linear + n};
        if (ioctl(vcpu->fd, KVM_TRANSLATE, &t) || !t.valid ||
            ram_read(&vcpu->vm->ram, t.physical_address, bytes + n, 1))
            break;
        n++;
    }
    return n;
}

__attribute__((format(printf, 4, 5))) static void append(char *text, size_t size, size_t *len,
                                                         const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(text + *len, size - *len, fmt, args);
    va_end(args);
    if (n > 0)
        *len = *len + (size_t)n < size ? *len + (size_t)n : size - 1;
}

void vcpu_diagnose(struct vcpu *vcpu, char *text, size_t size)
{
    struct kvm_regs r = {0};
    struct kvm_sregs s = {0};
    size_t len = 0;
    text[0] = 0;
    if (ioctl(vcpu->fd, KVM_GET_REGS, &r) || ioctl(vcpu->fd, KVM_GET_SREGS, &s)) {
        append(text, size, &len, "  (registers cannot be read)");
        return;
    }
#define L(x) (unsigned long long)(x)
    append(text, size, &len,
           "  rip %016llx  cs %04x (ring %u)  rflags %08llx\n"
           "  rax %016llx  rbx %016llx  rcx %016llx  rdx %016llx\n"
           "  rsi %016llx  rdi %016llx  rbp %016llx  rsp %016llx\n"
           "  r8  %016llx  r9  %016llx  r10 %016llx  r11 %016llx\n"
           "  r12 %016llx  r13 %016llx  r14 %016llx  r15 %016llx\n"
           "  cr0 %08llx  cr2 %016llx  cr3 %012llx  cr4 %08llx  efer %llx\n",
           L(r.rip), s.cs.selector, s.cs.dpl, L(r.rflags), L(r.rax), L(r.rbx), L(r.rcx), L(r.rdx),
           L(r.rsi), L(r.rdi), L(r.rbp), L(r.rsp), L(r.r8), L(r.r9), L(r.r10), L(r.r11), L(r.r12),
           L(r.r13), L(r.r14), L(r.r15), L(s.cr0), L(s.cr2), L(s.cr3), L(s.cr4), L(s.efer));
#undef L
    uint8_t bytes[BYTES_MAX];
    unsigned n = fetch_bytes(vcpu, s.cs.base + r.rip, bytes);
    append(text, size, &len, "  bytes at rip:");
    for (unsigned i = 0; i < n; i++)
        append(text, size, &len, " %02x", bytes[i]);
    const struct known *k = n ? recognise(bytes, n) : NULL;
    if (!n)
        append(text, size, &len, " (not mapped)");
    else if (k)
        append(text, size, &len, "\n  likely %s: %s", k->name, k->remedy);
    else
        append(
            text, size, &len,
            "\n  not an instruction we know to be missing; `ferry check` shows what this host is");
}
