// SPDX-License-Identifier: Apache-2.0
// The vCPU thread: enter the guest, hand each exit to its device, park when asked.
//
// A kick must not be lost between the check and KVM_RUN: who kicks first sets vm->pause (or quit),
// then kvm_run->immediate_exit, then signals. The thread clears immediate_exit *before* it looks at
// the flags: either it sees the flag, or KVM sees immediate_exit, or the signal interrupts KVM_RUN.
#include "vmm/vcpu.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vmm/layout.h"
#include "vmm/probe.h"
#include "vmm/vm.h"

#define VCPU_SIGNAL     SIGRTMIN
#define VCPU_STACK_SIZE (256 * KiB)

// Of the thread that is a vCPU's. Somebody else's signal (the scheduler's) is not preceded by
// immediate_exit; one that comes just before KVM_RUN would be lost.
static _Thread_local struct kvm_run *own_run;

static void kick_received(int sig)
{
    struct kvm_run *run = own_run;
    if (run)
        __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
}

int vcpu_signal(void)
{
    return VCPU_SIGNAL;
}

int vcpu_create(struct vcpu *vcpu, struct vm *vm, unsigned index, const struct kvm_cpuid2 *cpuid,
                struct error *err)
{
    *vcpu = (struct vcpu) {.vm = vm, .index = index, .fd = -1};
    vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, (unsigned long)index);
    if (vcpu->fd < 0)
        return error_errno(err, "vCPU %u: KVM_CREATE_VCPU", index);
    void *run = mmap(NULL, vm->vcpu_mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (run == MAP_FAILED)
        return error_errno(err, "vCPU %u: mapping kvm_run", index);
    vcpu->run = run;
    int log = ram_dirty_vcpu(&vm->ram, vcpu->fd, err);
    if (log)
        return error_prefix(err, "vCPU %u", index);
    if (ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid))
        return error_errno(err, "vCPU %u: KVM_SET_CPUID2 with %u entries", index, cpuid->nent);
    int ret = vcpu_state_create(vcpu, cpuid, err);
    return ret ? ret : state_register(&vm->state, &vcpu_state_table, index, vcpu->state, err);
}

void vcpu_destroy(struct vcpu *vcpu)
{
    if (vcpu->run)
        munmap(vcpu->run, vcpu->vm->vcpu_mmap_size);
    if (vcpu->fd >= 0)
        close(vcpu->fd);
    free(vcpu->state);
    *vcpu = (struct vcpu) {.fd = -1};
}

// --- the boot state of vCPU 0

static struct kvm_segment segment(uint16_t selector, bool code, bool bits64)
{
    return (struct kvm_segment) {.limit = 0xffffffff,
                                 .selector = selector,
                                 .type = code ? 11 : 3, // accessed, readable / writable
                                 .present = 1,
                                 .s = 1,
                                 .g = 1,
                                 .l = bits64 && code,
                                 .db = !(bits64 && code)};
}

static void sregs_protected(struct kvm_sregs *s, const struct boot_entry *entry)
{
    bool bits64 = entry->mode == BOOT_MODE_LONG64;
    s->cs = segment(0x10, true, bits64);
    s->ds = s->es = s->fs = s->gs = s->ss = segment(0x18, false, bits64);
    s->tr = (struct kvm_segment) {.limit = 0x67, .type = 11, .present = 1};
    s->ldt = (struct kvm_segment) {.type = 2, .unusable = 1};
    s->gdt = (struct kvm_dtable) {.base = LAYOUT_GDT, .limit = 4 * 8 - 1};
    s->idt = (struct kvm_dtable) {0};
    s->cr0 = 0x31; // PE, ET, NE
    if (bits64) {
        s->cr0 |= 1u << 31; // PG
        s->cr3 = entry->cr3;
        s->cr4 = 1u << 5; // PAE
        s->efer = 0x500;  // LME, LMA
    }
}

static void sregs_real(struct kvm_sregs *s)
{
    s->cs.base = 0;
    s->cs.selector = 0;
}

// Memory type write-back everywhere, as firmware leaves it (SDM 3A 12.11.2.1).
static void mtrr_enable(struct vcpu *vcpu)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msr = {.head.nmsrs = 1, .entry = {.index = 0x2ff, .data = (1u << 11) | 6}};
    // A KVM without MTRRs treats all memory as write-back anyway.
    if (ioctl(vcpu->fd, KVM_SET_MSRS, &msr) != 1)
        log_write(&vcpu->vm->log, LOG_DEBUG, "MTRR default type not accepted");
}

int vcpu_set_entry(struct vcpu *vcpu, const struct boot_entry *entry, struct error *err)
{
    struct kvm_sregs sregs;
    if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
        return error_errno(err, "vCPU %u: KVM_GET_SREGS", vcpu->index);
    if (entry->mode == BOOT_MODE_REAL)
        sregs_real(&sregs);
    else
        sregs_protected(&sregs, entry);
    if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs))
        return error_errno(err, "vCPU %u: KVM_SET_SREGS for the boot entry", vcpu->index);
    struct kvm_regs regs = {.rip = entry->rip,
                            .rax = entry->rax,
                            .rbx = entry->rbx,
                            .rsi = entry->rsi,
                            .rsp = entry->rsp,
                            .rflags = 2};
    if (ioctl(vcpu->fd, KVM_SET_REGS, &regs))
        return error_errno(err, "vCPU %u: KVM_SET_REGS for the boot entry", vcpu->index);
    mtrr_enable(vcpu);
    return 0;
}

// --- exits

// With --trace each exit carries the registers in kvm_run (KVM_CAP_SYNC_REGS): the trace names the
// instruction without an ioctl.
static void trace_access(struct vcpu *vcpu, enum trace_kind kind, uint64_t address, unsigned size,
                         uint64_t value, const char *name)
{
    struct kvm_run *run = vcpu->run;
    uint64_t rip = run->kvm_valid_regs & KVM_SYNC_X86_REGS ? run->s.regs.regs.rip : 0;
    trace_exit(vcpu->vm->trace, vcpu->index, rip, kind, address, size, value, name);
}

static void exit_io(struct vcpu *vcpu)
{
    struct vm *vm = vcpu->vm;
    struct kvm_run *run = vcpu->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    unsigned size = run->io.size;
    bool in = run->io.direction == KVM_EXIT_IO_IN;
    for (uint32_t i = 0; i < run->io.count; i++, data += size) {
        uint64_t value = 0;
        if (in) {
            bus_read(&vm->pio, run->io.port, size, &value);
            memcpy(data, &value, size);
        } else {
            memcpy(&value, data, size);
            bus_write(&vm->pio, run->io.port, size, value);
        }
        if (vm->trace) {
            const struct bus_range *r = bus_find(&vm->pio, run->io.port);
            trace_access(vcpu, in ? TRACE_PIO_IN : TRACE_PIO_OUT, run->io.port, size, value,
                         r ? r->name : "(nothing)");
        }
    }
}

static void exit_mmio(struct vcpu *vcpu)
{
    struct vm *vm = vcpu->vm;
    struct kvm_run *run = vcpu->run;
    uint64_t addr = run->mmio.phys_addr, value = 0;
    unsigned size = run->mmio.len > 8 ? 8 : run->mmio.len;
    if (run->mmio.is_write) {
        memcpy(&value, run->mmio.data, size);
        bus_write(&vm->mmio, addr, size, value);
    } else {
        bus_read(&vm->mmio, addr, size, &value);
        memcpy(run->mmio.data, &value, size);
    }
    if (vm->trace) {
        const struct bus_range *r = bus_find(&vm->mmio, addr);
        trace_access(vcpu, run->mmio.is_write ? TRACE_MMIO_WRITE : TRACE_MMIO_READ, addr, size,
                     value, r ? r->name : "(nothing)");
    }
}

static void stop_diagnosed(struct vcpu *vcpu, enum vm_stop_kind kind, const char *what)
{
    char text[1536];
    vcpu_diagnose(vcpu, text, sizeof(text));
    vm_request_stop(vcpu->vm, kind, 0, "vCPU %u: %s\n%s", vcpu->index, what, text);
}

static void exit_ring_full(struct vcpu *vcpu)
{
    struct error err;
    if (ram_dirty_ring_full(&vcpu->vm->ram, &err))
        vm_request_stop(vcpu->vm, VM_STOP_ERROR, 0, "vCPU %u: %s", vcpu->index, err.text);
}

static void exit_other(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    char what[160];
    if (vcpu->vm->trace)
        trace_access(vcpu, TRACE_OTHER, run->exit_reason, 0, 0, "KVM exit reason");
    switch (run->exit_reason) {
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
        return;
    case KVM_EXIT_DIRTY_RING_FULL:
        exit_ring_full(vcpu);
        return;
    case KVM_EXIT_SHUTDOWN:
        vm_request_stop(vcpu->vm, VM_STOP_TRIPLE_FAULT, 0, "vCPU %u: triple fault", vcpu->index);
        return;
    case KVM_EXIT_SYSTEM_EVENT:
        vm_request_stop(vcpu->vm,
                        run->system_event.type == KVM_SYSTEM_EVENT_SHUTDOWN ? VM_STOP_POWEROFF
                                                                            : VM_STOP_RESET,
                        0, "system event %u", run->system_event.type);
        return;
    case KVM_EXIT_INTERNAL_ERROR:
        snprintf(what, sizeof(what), "KVM cannot go on (internal error, suberror %u%s)",
                 run->internal.suberror,
                 run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION
                     ? ": an instruction it does not emulate"
                     : "");
        stop_diagnosed(vcpu, VM_STOP_EMULATION, what);
        return;
    case KVM_EXIT_FAIL_ENTRY:
        snprintf(what, sizeof(what), "the processor refused to enter the guest (reason %#llx)",
                 (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
        stop_diagnosed(vcpu, VM_STOP_ERROR, what);
        return;
    default:
        snprintf(what, sizeof(what), "unexpected KVM exit reason %u", run->exit_reason);
        stop_diagnosed(vcpu, VM_STOP_ERROR, what);
    }
}

static void exit_handle(struct vcpu *vcpu)
{
    uint64_t before = atomic_fetch_add_explicit(&vcpu->exits, 1, memory_order_relaxed);
    uint64_t start = before % VCPU_SAMPLE ? 0 : time_ns();
    FERRY_PROBE2(exit, vcpu->index, vcpu->run->exit_reason);
    if (vcpu->run->exit_reason == KVM_EXIT_IO)
        exit_io(vcpu);
    else if (vcpu->run->exit_reason == KVM_EXIT_MMIO)
        exit_mmio(vcpu);
    else
        exit_other(vcpu);
    if (start)
        histogram_add(&vcpu->handling, time_ns() - start);
}

// --- the thread

static void set_immediate_exit(struct vcpu *vcpu, uint8_t value)
{
    __atomic_store_n(&vcpu->run->immediate_exit, value, __ATOMIC_SEQ_CST);
}

static bool should_leave(const struct vm *vm)
{
    return atomic_load(&vm->pause) || atomic_load(&vm->quit) || atomic_load(&vm->resetting);
}

// KVM finishes the access of the last exit (the value read, the next piece of a string or split
// access) only inside the next KVM_RUN: without this, saved registers would be half-way through an
// instruction.
static void complete_exit(struct vcpu *vcpu)
{
    for (;;) {
        set_immediate_exit(vcpu, 1);
        if (ioctl(vcpu->fd, KVM_RUN, 0))
            return;
        exit_handle(vcpu);
    }
}

static void park(struct vcpu *vcpu)
{
    struct vm *vm = vcpu->vm;
    pthread_mutex_lock(&vm->lock);
    vm->parked++;
    pthread_cond_broadcast(&vm->changed);
    while ((atomic_load(&vm->pause) || atomic_load(&vm->resetting)) && !atomic_load(&vm->quit))
        pthread_cond_wait(&vm->changed, &vm->lock);
    vm->parked--;
    pthread_mutex_unlock(&vm->lock);
}

// Until nobody holds the guest any more; the signal of a kick ends the sleep early.
static void held(const struct vm *vm)
{
    while (atomic_load(&vm->hold) && !should_leave(vm))
        usleep(200);
}

// True when the guest may run, false when the thread must end.
static bool may_run(struct vcpu *vcpu)
{
    for (;;) {
        set_immediate_exit(vcpu, 0);
        struct vcpu_turns *turns = atomic_load_explicit(&vcpu->vm->turns, memory_order_acquire);
        if (__builtin_expect(atomic_load(&vcpu->vm->hold), 0) && !should_leave(vcpu->vm)) {
            if (turns)
                turns->give(turns, vcpu);
            held(vcpu->vm);
            continue; // the scheduler may have changed meanwhile
        }
        if (__builtin_expect(!should_leave(vcpu->vm), 1)) {
            if (!turns || turns->take(turns, vcpu))
                return true;
            continue;
        }
        if (turns)
            turns->give(turns, vcpu);
        if (atomic_load(&vcpu->vm->quit))
            return false;
        complete_exit(vcpu);
        park(vcpu);
    }
}

static void *vcpu_main(void *arg)
{
    struct vcpu *vcpu = arg;
    char name[16];
    snprintf(name, sizeof(name), "vcpu%u", vcpu->index);
    pthread_setname_np(pthread_self(), name);
    thread_ordinary();
    own_run = vcpu->run;
    atomic_store(&vcpu->tid, gettid());
    sigset_t kick;
    sigemptyset(&kick);
    sigaddset(&kick, VCPU_SIGNAL);
    pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
    seccomp_enter_or_abort(SECCOMP_VCPU, vcpu->vm->config.seccomp);
    if (vcpu->vm->trace && vcpu->vm->sync_regs & KVM_SYNC_X86_REGS)
        vcpu->run->kvm_valid_regs = KVM_SYNC_X86_REGS;

    while (may_run(vcpu)) {
        if (!ioctl(vcpu->fd, KVM_RUN, 0)) {
            exit_handle(vcpu);
        } else if (errno != EINTR && errno != EAGAIN) {
            vm_request_stop(vcpu->vm, VM_STOP_ERROR, 0, "vCPU %u: KVM_RUN: %s", vcpu->index,
                            strerror(errno));
        }
    }
    return NULL;
}

int vcpu_start(struct vcpu *vcpu, struct error *err)
{
    // The same handler for every VM of the process.
    struct sigaction action = {.sa_handler = kick_received};
    if (sigaction(VCPU_SIGNAL, &action, NULL))
        return error_errno(err, "vCPU %u: sigaction", vcpu->index);
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, VCPU_STACK_SIZE);
    // Signals meant for the process (SIGTERM, SIGINT ...) go to the main thread.
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int ret = pthread_create(&vcpu->thread, &attr, vcpu_main, vcpu);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    if (ret)
        return error_set(err, -ret, "vCPU %u: cannot start its thread: %s", vcpu->index,
                         strerror(ret));
    vcpu->started = true;
    return 0;
}

void vcpu_kick(struct vcpu *vcpu)
{
    if (!vcpu->started)
        return;
    set_immediate_exit(vcpu, 1);
    pthread_kill(vcpu->thread, VCPU_SIGNAL);
}
