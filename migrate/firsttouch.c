// SPDX-License-Identifier: Apache-2.0
#include "migrate/firsttouch.h"

#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm/vcpu.h"

// Intel SDM 3A 4.5: entries of 8 bytes, 512 in a table.
#define PTE_PRESENT (1ull << 0)
#define PTE_LARGE   (1ull << 7)
#define PTE_ADDRESS 0x000ffffffffff000ull
#define CR0_PG      (1ull << 31)
#define CR4_LA57    (1ull << 12)
#define EFER_LMA    (1ull << 10)

static bool page_add(struct first_touch *f, const struct ram *ram, uint64_t gpa, uint64_t *page)
{
    if (!ram_gpa_page(ram, gpa, page))
        return false;
    for (unsigned i = 0; i < f->nr; i++)
        if (f->page[i] == *page)
            return true;
    if (f->nr == FIRST_TOUCH_MAX)
        return false;
    f->page[f->nr++] = *page;
    return true;
}

// False: it leads nowhere.
static bool translate(struct first_touch *f, const struct ram *ram,
                      const struct first_touch_paging *paging, uint64_t linear, uint64_t *gpa)
{
    uint64_t table = paging->cr3 & PTE_ADDRESS, entry, page;
    for (unsigned level = paging->levels; level; level--) {
        unsigned shift = 12 + 9 * (level - 1);
        if (!page_add(f, ram, table, &page) ||
            ram_read(ram, table + (linear >> shift & 511) * 8, &entry, sizeof(entry)) ||
            !(entry & PTE_PRESENT))
            return false;
        table = entry & PTE_ADDRESS;
        if (level == 1 || (level <= 3 && entry & PTE_LARGE)) {
            uint64_t offset = (1ull << shift) - 1;
            *gpa = (table & ~offset) | (linear & offset);
            return true;
        }
    }
    return false;
}

static bool canonical(const struct first_touch_paging *paging, uint64_t linear)
{
    unsigned unused = 64 - (12 + 9 * paging->levels);
    return (uint64_t)((int64_t)(linear << unused) >> unused) == linear;
}

void first_touch_add(struct first_touch *f, const struct ram *ram,
                     const struct first_touch_paging *paging, uint64_t linear)
{
    uint64_t gpa = linear, page;
    if (paging->on && (!paging->long_mode || !canonical(paging, linear) ||
                       !translate(f, ram, paging, linear, &gpa)))
        return;
    page_add(f, ram, gpa, &page);
}

static void of_vcpu(struct first_touch *f, struct vcpu *vcpu)
{
    struct kvm_regs r;
    struct kvm_sregs s;
    if (ioctl(vcpu->fd, KVM_GET_REGS, &r) || ioctl(vcpu->fd, KVM_GET_SREGS, &s))
        return; // it is only faster with them
    const struct first_touch_paging paging = {.on = s.cr0 & CR0_PG,
                                              .long_mode = s.efer & EFER_LMA,
                                              .cr3 = s.cr3,
                                              .levels = s.cr4 & CR4_LA57 ? 5 : 4};
    const uint64_t places[] = {r.rip,      r.rsp,     r.rbp,     r.rax,    r.rbx, r.rcx,
                               r.rdx,      r.rsi,     r.rdi,     r.r8,     r.r9,  r.r10,
                               r.r11,      r.r12,     r.r13,     r.r14,    r.r15, s.gdt.base,
                               s.idt.base, s.tr.base, s.fs.base, s.gs.base};
    for (size_t i = 0; i < ARRAY_SIZE(places); i++)
        first_touch_add(f, &vcpu->vm->ram, &paging, places[i]);
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

void first_touch_find(struct first_touch *f, struct vm *vm)
{
    f->nr = 0;
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        of_vcpu(f, &vm->vcpus[i]);
    qsort(f->page, f->nr, sizeof(f->page[0]), compare);
}
