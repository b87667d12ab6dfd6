// SPDX-License-Identifier: Apache-2.0
// usage: bench_kvm_run --tsc-khz
//        bench_kvm_run GUEST.elf COMMAND-LINE
//
// The floor under any VMM: one vCPU, memory, an irqchip, and KVM_RUN in a loop. Runs a bare-metal
// guest of guest/bare by the 64-bit boot protocol; knows the serial port (output only, to stdout)
// and the debug-exit port; every other port is ignored. scripts/bench compares Ferry's exits to it.
#include <asm/bootparam.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vmm/layout.h"

#define RAM_BYTES  (64ul << 20)
#define PAGE_TABLE 0x9000ul // PML4, then PDPT, then one page directory: 1 GiB, one to one

#define LSR_READY 0x60 // transmitter empty

struct machine {
    int kvm, vm, vcpu;
    uint8_t *ram;
    struct kvm_run *run;
};

static int fail(const char *what)
{
    fprintf(stderr, "bench_kvm_run: %s: %s\n", what, strerror(errno));
    return -1;
}

static int machine_create(struct machine *m)
{
    m->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (m->kvm < 0)
        return fail("/dev/kvm");
    m->vm = ioctl(m->kvm, KVM_CREATE_VM, 0);
    if (m->vm < 0 || ioctl(m->vm, KVM_SET_TSS_ADDR, LAYOUT_TSS) ||
        ioctl(m->vm, KVM_CREATE_IRQCHIP, 0))
        return fail("creating the VM");
    m->ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m->ram == MAP_FAILED)
        return fail("guest memory");
    struct kvm_userspace_memory_region slot = {
        .memory_size = RAM_BYTES,
        .userspace_addr = (uintptr_t)m->ram,
    };
    if (ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &slot))
        return fail("KVM_SET_USER_MEMORY_REGION");
    m->vcpu = ioctl(m->vm, KVM_CREATE_VCPU, 0);
    int size = ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (m->vcpu < 0 || size < (int)sizeof(*m->run))
        return fail("creating the vCPU");
    m->run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0);
    return m->run == MAP_FAILED ? fail("vCPU mapping") : 0;
}

static int elf_load(struct machine *m, const char *path, uint64_t *entry)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return fail(path);
    Elf64_Ehdr header;
    int ret = -1;
    if (fread(&header, sizeof(header), 1, file) != 1 || memcmp(header.e_ident, ELFMAG, SELFMAG) ||
        header.e_ident[EI_CLASS] != ELFCLASS64) {
        fprintf(stderr, "bench_kvm_run: %s is no 64-bit ELF file\n", path);
        goto out;
    }
    for (unsigned i = 0; i < header.e_phnum; i++) {
        Elf64_Phdr segment;
        if (fseek(file, (long)(header.e_phoff + i * sizeof(segment)), SEEK_SET) ||
            fread(&segment, sizeof(segment), 1, file) != 1)
            goto truncated;
        if (segment.p_type != PT_LOAD || !segment.p_filesz)
            continue;
        if (segment.p_paddr > RAM_BYTES || segment.p_memsz > RAM_BYTES - segment.p_paddr ||
            segment.p_filesz > segment.p_memsz || fseek(file, (long)segment.p_offset, SEEK_SET) ||
            fread(m->ram + segment.p_paddr, segment.p_filesz, 1, file) != 1)
            goto truncated;
    }
    *entry = header.e_entry;
    ret = 0;
    goto out;
truncated:
    fprintf(stderr, "bench_kvm_run: %s: a segment does not fit or is cut short\n", path);
out:
    fclose(file);
    return ret;
}

static void boot_params_write(struct machine *m, const char *cmdline)
{
    struct boot_params *params = (void *)(m->ram + LAYOUT_ZERO_PAGE);
    params->hdr.cmd_line_ptr = LAYOUT_CMDLINE;
    snprintf((char *)m->ram + LAYOUT_CMDLINE, LAYOUT_CMDLINE_MAX, "%s", cmdline);
    params->e820_entries = 2;
    params->e820_table[0] = (struct boot_e820_entry) {.size = LAYOUT_EBDA, .type = 1};
    params->e820_table[1] = (struct boot_e820_entry) {
        .addr = LAYOUT_KERNEL, .size = RAM_BYTES - LAYOUT_KERNEL, .type = 1};
}

static void page_tables_write(struct machine *m)
{
    uint64_t *table = (void *)(m->ram + PAGE_TABLE);
    table[0] = (PAGE_TABLE + 0x1000) | 3; // present, writable
    table[512] = (PAGE_TABLE + 0x2000) | 3;
    for (uint64_t i = 0; i < 512; i++)
        table[1024 + i] = (i << 21) | 0x83; // and a 2 MiB page
}

static int vcpu_setup(struct machine *m, uint64_t entry)
{
    union {
        struct kvm_cpuid2 head;
        uint8_t space[sizeof(struct kvm_cpuid2) + 256 * sizeof(struct kvm_cpuid_entry2)];
    } cpuid = {.head = {.nent = 256}};
    struct kvm_sregs sregs;
    if (ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) || ioctl(m->vcpu, KVM_SET_CPUID2, &cpuid) ||
        ioctl(m->vcpu, KVM_GET_SREGS, &sregs))
        return fail("vCPU set-up");
    struct kvm_segment code = {
        .limit = ~0u, .selector = 0x10, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {
        .limit = ~0u, .selector = 0x18, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 = 0x80050033; // PG AM WP NE ET MP PE
    sregs.cr3 = PAGE_TABLE;
    sregs.cr4 = 0x20;   // PAE
    sregs.efer = 0x500; // LME LMA
    struct kvm_regs regs = {.rip = entry, .rsi = LAYOUT_ZERO_PAGE, .rflags = 2};
    if (ioctl(m->vcpu, KVM_SET_SREGS, &sregs) || ioctl(m->vcpu, KVM_SET_REGS, &regs))
        return fail("vCPU registers");
    return 0;
}

// Exit status of the guest, -1 on failure.
static int machine_run(struct machine *m)
{
    for (;;) {
        if (ioctl(m->vcpu, KVM_RUN, 0))
            return fail("KVM_RUN");
        if (m->run->exit_reason != KVM_EXIT_IO) {
            fprintf(stderr, "bench_kvm_run: exit reason %u, expected port I/O\n",
                    m->run->exit_reason);
            return -1;
        }
        uint8_t *data = (uint8_t *)m->run + m->run->io.data_offset;
        uint16_t port = m->run->io.port;
        if (m->run->io.direction == KVM_EXIT_IO_IN) {
            memset(data, port == PORT_COM1 + 5 ? LSR_READY : 0xff, m->run->io.size);
        } else if (port == PORT_COM1) {
            putchar(*data);
        } else if (port == PORT_DEBUG_EXIT) {
            return *data;
        }
    }
}

int main(int argc, char **argv)
{
    struct machine m = {0};
    uint64_t entry = 0;
    if (argc == 2 && !strcmp(argv[1], "--tsc-khz")) {
        if (machine_create(&m))
            return 1;
        printf("%d\n", ioctl(m.vcpu, KVM_GET_TSC_KHZ, 0));
        return 0;
    }
    if (argc != 3) {
        fprintf(stderr, "usage: bench_kvm_run --tsc-khz | GUEST.elf COMMAND-LINE\n");
        return 2;
    }
    if (machine_create(&m) || elf_load(&m, argv[1], &entry))
        return 1;
    boot_params_write(&m, argv[2]);
    page_tables_write(&m);
    if (vcpu_setup(&m, entry))
        return 1;
    int status = machine_run(&m);
    return status < 0 ? 1 : status;
}
