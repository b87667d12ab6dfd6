// SPDX-License-Identifier: Apache-2.0
// Descriptor tables, traps, ring 3, and the other processors.
#include "internal.h"

#define IO_BITMAP_BYTES (0x1000 / 8)

// Intel SDM 3A 8.7: 64-bit task state segment, followed by the I/O permission bitmap and its end
// byte.
struct tss {
    uint32_t reserved0;
    uint64_t rsp[3];
    uint64_t reserved1;
    uint64_t ist[7];
    uint64_t reserved2;
    uint16_t reserved3;
    uint16_t io_bitmap;
    uint8_t ports[IO_BITMAP_BYTES]; // 0 = allowed
    uint8_t end;
} __attribute__((packed));

struct gate {
    uint16_t offset_low;
    uint16_t selector;
    uint8_t ist;
    uint8_t type;
    uint16_t offset_middle;
    uint32_t offset_high;
    uint32_t reserved;
};

struct table_pointer {
    uint16_t limit;
    uint64_t base;
} __attribute__((packed));

struct cpu cpus[CPU_MAX];
unsigned cpu_count;
struct cpu *cpu_by_apic_id[256]; // read by the trampoline

extern char boot_stack_top[], trampoline[], trampoline_end[];
extern char trap_stubs[256][16];
extern uint64_t gdt[];
extern char ring3_call[];

_Static_assert(offsetof(struct cpu, self) == CPU_SELF, "layout.h");
_Static_assert(offsetof(struct cpu, ring0_rsp) == CPU_RING0_RSP, "layout.h");
_Static_assert(offsetof(struct cpu, rsp0) == CPU_RSP0, "layout.h");
_Static_assert(offsetof(struct cpu, user_rsp) == CPU_USER_RSP, "layout.h");

static struct gate idt[256];
static trap_fn handlers[256];
static struct tss boot_tss;
static _Alignas(16) char boot_user_stack[STACK_BYTES];
static _Alignas(16) char boot_fault_stack[STACK_BYTES];

void trap_handler_set(unsigned vector, trap_fn fn)
{
    handlers[vector] = fn;
}

static void idt_fill(void)
{
    for (unsigned i = 0; i < 256; i++) {
        uint64_t stub = (uintptr_t)trap_stubs[i];
        idt[i] = (struct gate) {
            .offset_low = (uint16_t)stub,
            .selector = SEL_CODE64,
            .type = 0x8e, // present, DPL 0, interrupt gate
            .offset_middle = (uint16_t)(stub >> 16),
        };
    }
    // NMI, double fault, machine check: the interrupted stack may be unusable.
    idt[2].ist = idt[8].ist = idt[18].ist = 1;
}

static void cpu_tables_load(struct cpu *cpu, struct tss *tss, uint64_t fault_stack_top)
{
    tss->rsp[0] = cpu->rsp0;
    tss->ist[0] = fault_stack_top;
    tss->io_bitmap = offsetof(struct tss, ports);
    tss->end = 0xff;
    cpu->tss = tss;

    uint64_t base = (uintptr_t)tss, limit = sizeof(*tss) - 1;
    uint64_t *descriptor = &gdt[(SEL_TSS + 16 * cpu->index) / 8];
    descriptor[0] = limit | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
    descriptor[1] = base >> 32;

    struct table_pointer pointer = {sizeof(idt) - 1, (uintptr_t)idt};
    __asm__ volatile("lidt %0" : : "m"(pointer));
    __asm__ volatile("ltr %w0" : : "r"(SEL_TSS + 16 * cpu->index));
    wrmsr(MSR_GS_BASE, (uintptr_t)cpu);
}

void cpu_setup_boot(void)
{
    struct cpu *cpu = &cpus[0];
    cpu->self = cpu;
    cpu->rsp0 = (uintptr_t)boot_stack_top;
    cpu->user_rsp = (uintptr_t)boot_user_stack + sizeof(boot_user_stack);
    cpu->online = 1;
    idt_fill();
    cpu_tables_load(cpu, &boot_tss, (uintptr_t)boot_fault_stack + sizeof(boot_fault_stack));
}

static bool in_ring3(void)
{
    uint32_t cs;
    __asm__ volatile("mov %%cs, %0" : "=r"(cs));
    return (cs & 3) == 3;
}

void cpu_park(void)
{
    if (in_ring3())
        __asm__ volatile("call ring3_call" : : "D"(RING3_PARK) : "memory");
    for (;;)
        __asm__ volatile("cli; hlt" ::: "memory");
}

static _Noreturn void trap_abort(const struct trap_frame *frame)
{
    uint64_t cr2;
    __asm__ volatile("mov %%cr2, %0" : "=r"(cr2));
    if (ucall_present) {
        _Alignas(64) struct ucall call = {
            .nr = UCALL_ABORT,
            .args = {frame->vector, frame->error, frame->rip, cr2, cpu_self()->index, frame->cs},
        };
        outl(UCALL_PORT, (uint32_t)(uintptr_t)&call);
    } else {
        print("exception %lu error 0x%lx rip 0x%lx cs 0x%lx cr2 0x%lx cpu %u\n", frame->vector,
              frame->error, frame->rip, frame->cs, cr2, cpu_self()->index);
        outl(UCALL_EXIT_PORT, 2);
    }
    cpu_park();
}

void trap_dispatch(struct trap_frame *frame)
{
    unsigned vector = (unsigned)frame->vector;
    if (vector == VECTOR_UD && frame->rip == (uintptr_t)ring3_call) {
        if (frame->rdi == RING3_RETURN)
            ring3_leave(frame->rax);
        cpu_park();
    }
    if (vector == VECTOR_SPURIOUS)
        return;
    if (!handlers[vector])
        trap_abort(frame);
    handlers[vector](frame);
    if (vector >= 32) {
        cpu_self()->irqs++;
        lapic_eoi();
    }
}

uint64_t ring3_run(uint64_t (*fn)(void *arg), void *arg)
{
    struct cpu *cpu = cpu_self();
    struct tss *tss = cpu->tss;
    uint64_t rflags, rsp;
    __asm__ volatile("pushf; pop %0" : "=r"(rflags));
    __asm__ volatile("mov %%rsp, %0" : "=r"(rsp));
    // Traps from ring 3 start well below this frame and that of ring3_enter (11 words).
    tss->rsp[0] = (rsp - 512) & -64ul;
    uint64_t result = ring3_enter(fn, arg, rflags & 0x202);
    if (rflags & 0x200)
        irq_on(); // the trap gate switched them off
    return result;
}

void ap_main(struct cpu *cpu)
{
    char *fault_stack = (char *)cpu->tss + PAGE_SIZE;
    cpu_tables_load(cpu, cpu->tss, (uintptr_t)fault_stack + PAGE_SIZE);
    lapic_enable();
    __atomic_store_n(&cpu->online, 1, __ATOMIC_RELEASE);
    cpu->fn(cpu->arg);
    __atomic_store_n(&cpu->online, 2, __ATOMIC_RELEASE);
    cpu_park();
}

static void ap_prepare(struct cpu *cpu, void (*fn)(void *arg), void *arg)
{
    // One block: TSS page, fault stack page, ring 0 stack, ring 3 stack. TSS and bitmap must start
    // zeroed.
    char *block = ram_alloc(2 * PAGE_SIZE + 2 * STACK_BYTES, PAGE_SIZE, 0, 4 * GIB);
    memset(block, 0, sizeof(struct tss));
    cpu->self = cpu;
    cpu->tss = block;
    cpu->rsp0 = (uintptr_t)block + 2 * PAGE_SIZE + STACK_BYTES;
    cpu->user_rsp = cpu->rsp0 + STACK_BYTES;
    cpu->fn = fn;
    cpu->arg = arg;
    cpu_by_apic_id[cpu->apic_id] = cpu;
}

void cpus_start(void (*fn)(void *arg), void *arg)
{
    irq_init();
    memcpy((void *)TRAMPOLINE_GPA, trampoline, (size_t)(trampoline_end - trampoline));
    for (unsigned i = 1; i < cpu_count; i++)
        ap_prepare(&cpus[i], fn, arg);
    // Intel SDM 3A 9.4.4 INIT-SIPI-SIPI; the delays it asks for are bus settling times, which a VMM
    // does not have.
    for (unsigned i = 1; i < cpu_count; i++)
        lapic_init_ap(cpus[i].apic_id);
    for (unsigned sipi = 0; sipi < 2; sipi++)
        for (unsigned i = 1; i < cpu_count; i++)
            lapic_start_ap(cpus[i].apic_id, TRAMPOLINE_GPA / PAGE_SIZE);
    for (unsigned i = 1; i < cpu_count; i++)
        while (!__atomic_load_n(&cpus[i].online, __ATOMIC_ACQUIRE))
            pause();
}

void cpus_join(void)
{
    for (unsigned i = 1; i < cpu_count; i++)
        while (__atomic_load_n(&cpus[i].online, __ATOMIC_ACQUIRE) != 2)
            pause();
}
