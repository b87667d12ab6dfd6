// SPDX-License-Identifier: Apache-2.0
// A virtual machine: its KVM fds, memory, vCPUs, buses, devices and saved state. Nothing here is
// file-scope: several VMs live in one process.
#pragma once

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/boot/boot.h"
#include "vmm/bus.h"
#include "vmm/cpuid.h"
#include "vmm/device.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/loop.h"
#include "vmm/ram.h"
#include "vmm/seccomp.h"
#include "vmm/state.h"
#include "vmm/trace.h"

#define VM_MAX_VCPUS 64

struct vm_config {
    const char *name;
    unsigned cpus;
    struct ram_config ram;
    struct cpu_model cpu; // vmm/cpuid.h
    enum log_level log_level;
    enum log_format log_format;
    bool trace;
    enum seccomp_mode seccomp; // of the threads; SECCOMP_OFF unless set
    const char *kvm_path;      // NULL = /dev/kvm
};

// Why a VM stopped. The first cause wins.
enum vm_stop_kind {
    VM_RUNNING, // has not stopped
    VM_STOP_POWEROFF,
    VM_STOP_RESET,        // the guest asked for a reboot
    VM_STOP_PANIC,        // pvpanic
    VM_STOP_TRIPLE_FAULT, // KVM_EXIT_SHUTDOWN
    VM_STOP_DEBUG_EXIT,   // value = what the guest wrote
    VM_STOP_EMULATION,    // KVM could not run an instruction
    VM_STOP_ERROR,        // a failure of ours or of KVM
    VM_STOP_HOST,         // `ferry stop`, escape key, signal
    VM_STOP_MIGRATED,     // another host owns the guest now
};

struct vm_stop {
    enum vm_stop_kind kind;
    uint32_t value;
    char text[2048]; // one line, or a diagnosis of several
};

// Who may run the vCPUs. The rule of ownership (migrate/owner.h) drives the last two.
enum vm_phase { VM_CREATED, VM_PAUSED, VM_ACTIVE, VM_STOPPED };

struct vcpu;
struct vcpu_turns;

struct vm {
    char name[64];
    int kvm_fd, fd;
    struct loop *loop; // the caller's
    struct log log;
    struct vm_config config;

    struct ram ram;
    struct bus pio, mmio;
    struct device *devices;
    struct state_registry state;
    struct trace *trace;    // NULL unless asked for
    struct msi_routes *msi; // vmm/msi.h; NULL until a device sends messages

    struct vcpu *vcpus; // config.cpus of them
    unsigned nr_vcpus;
    size_t vcpu_mmap_size;
    uint64_t sync_regs; // KVM_SYNC_X86_*: what each exit can carry in kvm_run without an ioctl
    struct kvm_cpuid2 *host_cpuid; // what KVM supports here

    pthread_mutex_t lock; // guards phase, parked, stop
    pthread_cond_t changed;
    enum vm_phase phase;
    bool quiesced;     // the devices are
    bool moved;        // a migration brought the guest: others look for it where it was
    unsigned parked;   // vCPU threads that wait in may_run
    atomic_bool pause; // what vCPU threads look at
    atomic_bool hold;  // for a moment no vCPU enters the guest; who sets it kicks them (vm_hold)
    atomic_bool quit;
    struct vcpu_turns *_Atomic turns; // vmm/vcpu.h; NULL: vCPUs run as Linux has it
    struct vm_stop stop;
    // Called once, in the thread that caused the stop, without the lock; e.g. loop_stop.
    void (*on_stop)(struct vm *vm, void *arg);
    void *on_stop_arg;
    // With this set a reboot or a triple fault is not the end: the vCPUs wait for vm_reset. Called
    // in the vCPU's thread, without the lock; may be called again before vm_reset.
    void (*on_reset)(struct vm *vm, void *arg);
    atomic_bool resetting;      // the guest wants that; vCPU threads look at it
    struct stream_mem power_on; // vm_power_on_keep's
    bool in_reset;              // vm_reset or vm_load_again loads

    struct vm_kernel_state *kernel_state; // irqchip, PIT, clock (vmm/vm_state.c)
    uint64_t paused_clock_ns; // kvmclock when the guest was last paused; it goes on from there
};

// Opens KVM, creates the VM with irqchip, PIT, RAM and vCPUs (no threads yet).
int vm_create(struct vm **vm, const struct vm_config *config, struct loop *loop, struct error *err);
void vm_destroy(struct vm *vm); // ends the threads; waits for them

void vm_join(struct vm *vm); // the first half of that: no vCPU runs any more

// Puts vCPU 0 at the boot entry (the other vCPUs wait for INIT/SIPI).
int vm_set_entry(struct vm *vm, const struct boot_entry *entry, struct error *err);

// Creates the vCPU threads, parked; vm_resume lets them run.
int vm_start(struct vm *vm, struct error *err);
void vm_resume(struct vm *vm);
// Returns when every vCPU is out of KVM_RUN with its pending I/O completed and every device is
// quiescent. Idempotent. Not from a vCPU thread.
int vm_pause(struct vm *vm, struct error *err);
bool vm_paused(struct vm *vm);
// Slows the guest: while held its vCPUs stand still, though the VM is not paused, its devices work
// and its clock goes on. Any thread.
void vm_hold(struct vm *vm, bool held);

// First caller wins; any thread, also a vCPU's. Then every vCPU thread leaves.
void vm_request_stop(struct vm *vm, enum vm_stop_kind kind, uint32_t value, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
bool vm_stopped(struct vm *vm);

// A reset starts the guest again in the same VM: nothing is opened anew, so it works behind any
// filter and in any jail. What vCPUs and interrupt controllers are at power-on is kept when the
// boot entry has been set (vm_power_on_keep, before vm_start); vm_reset brings it back, resets the
// devices and empties RAM. The VM must be paused, and stays so; firmware tables and kernel are the
// caller's to load again.
int vm_power_on_keep(struct vm *vm, struct error *err);
bool vm_power_on_kept(const struct vm *vm);
int vm_reset(struct vm *vm, struct error *err);
// In two halves, for a guest that becomes one that was saved: devices reset and memory empty, then
// (the caller has filled memory) a state of this very machine. The VM must be paused, and stays so.
int vm_clear(struct vm *vm, struct error *err);
int vm_load_again(struct vm *vm, struct stream *in, struct error *err);
const char *vm_stop_name(enum vm_stop_kind kind);
// Process exit status for a stop; see docs/exit-status in the man page.
int vm_stop_status(const struct vm_stop *stop);

// vCPUs, irqchip, PIT, clock and all devices. The VM must be paused (save) or never have been
// resumed (load).
int vm_save(struct vm *vm, struct stream *out, struct error *err);
int vm_load(struct vm *vm, struct stream *in, struct error *err);

// Interrupts. An irq level is 0 or 1; edge lines are pulsed 1, 0.
int vm_irq_set(struct vm *vm, unsigned gsi, unsigned level);
int vm_irqfd(struct vm *vm, unsigned gsi, int event_fd, int resample_fd, struct error *err);
int vm_irqfd_remove(struct vm *vm, unsigned gsi, int event_fd, struct error *err);
int vm_msi(struct vm *vm, uint64_t address, uint32_t data);
// A write of `len` bytes (0 = any) at addr signals event_fd without an exit to us.
int vm_ioeventfd(struct vm *vm, bool pio, uint64_t addr, unsigned len, int event_fd, bool add,
                 struct error *err);
// The same for a 32-bit write of `value` to memory: one address serves several queues.
int vm_ioeventfd_value(struct vm *vm, uint64_t addr, uint32_t value, int event_fd, bool add,
                       struct error *err);
