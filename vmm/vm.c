// SPDX-License-Identifier: Apache-2.0
#include "vmm/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm/exit_status.h"
#include "vmm/host.h"
#include "vmm/layout.h"
#include "vmm/msi.h"
#include "vmm/vcpu.h"
#include "vmm/vm_internal.h"

// --- creation

static int kvm_open(struct vm *vm, const char *path, struct error *err)
{
    vm->kvm_fd = open(path, O_RDWR | O_CLOEXEC);
    if (vm->kvm_fd < 0) {
        int code = -errno;
        const char *remedy =
            code == -EACCES
                ? "you may not open it; add yourself to group kvm: usermod -aG kvm $USER"
            : code == -ENOENT ? "there is no KVM here; load kvm_intel or kvm_amd, or switch on "
                                "virtualization in the firmware"
                              : strerror(-code);
        return error_set(err, -ENODEV, "%s: %s (see `ferry check`)", path, remedy);
    }
    int version = ioctl(vm->kvm_fd, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION)
        return error_set(err, -ENODEV, "%s: KVM API version %d, expected %d", path, version,
                         KVM_API_VERSION);
    int size = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (size < (int)sizeof(struct kvm_run))
        return error_errno(err, "KVM_GET_VCPU_MMAP_SIZE");
    vm->vcpu_mmap_size = (size_t)size;
    return 0;
}

static int kvm_vm_create(struct vm *vm, struct error *err)
{
    // KVM starts a thread of its own there, and gives up with EINTR when a signal or io_uring's
    // completions knock meanwhile.
    do
        vm->fd = ioctl(vm->kvm_fd, KVM_CREATE_VM, 0);
    while (vm->fd < 0 && errno == EINTR);
    if (vm->fd < 0)
        return error_errno(err, "KVM_CREATE_VM");
    // RAM first: the interrupt controllers register devices on KVM's buses, whose clean-up would
    // make the memory slot wait for an RCU grace period (several ms instead of 0.1).
    int ret = ram_attach(&vm->ram, vm->fd, err);
    if (ret)
        return ret;
    // Where VT-x keeps its real-mode helpers; other back ends ignore both.
    uint64_t identity = LAYOUT_IDENTITY_PT;
    if (ioctl(vm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity))
        return error_errno(err, "KVM_SET_IDENTITY_MAP_ADDR");
    if (ioctl(vm->fd, KVM_SET_TSS_ADDR, (unsigned long)LAYOUT_TSS))
        return error_errno(err, "KVM_SET_TSS_ADDR");
    if (ioctl(vm->fd, KVM_CREATE_IRQCHIP, 0))
        return error_errno(err, "KVM_CREATE_IRQCHIP");
    int sync_regs = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS);
    vm->sync_regs = sync_regs > 0 ? (uint64_t)sync_regs : 0;
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    if (ioctl(vm->fd, KVM_CREATE_PIT2, &pit))
        return error_errno(err, "KVM_CREATE_PIT2");
    return 0;
}

static int host_cpuid_read(struct vm *vm, struct error *err)
{
    struct kvm_cpuid2 *cpuid =
        calloc(1, sizeof(*cpuid) + CPUID_MAX_ENTRIES * sizeof(cpuid->entries[0]));
    if (!cpuid)
        return error_set(err, -ENOMEM, "no memory for the host's CPUID");
    vm->host_cpuid = cpuid;
    cpuid->nent = CPUID_MAX_ENTRIES;
    if (ioctl(vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid))
        return error_errno(err, "KVM_GET_SUPPORTED_CPUID");
    return 0;
}

static int vcpus_create(struct vm *vm, struct error *err)
{
    vm->vcpus = calloc(vm->config.cpus, sizeof(*vm->vcpus));
    autofree struct kvm_cpuid2 *cpuid =
        calloc(1, sizeof(*cpuid) + CPUID_MAX_ENTRIES * sizeof(cpuid->entries[0]));
    if (!vm->vcpus || !cpuid)
        return error_set(err, -ENOMEM, "no memory for %u vCPUs", vm->config.cpus);
    bool software = host_is_software_backend();
    bool tsc_deadline = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) > 0;
    for (unsigned i = 0; i < vm->config.cpus; i++) {
        struct cpuid_target target = {.cpus = vm->config.cpus,
                                      .apic_id = i,
                                      .tsc_deadline = tsc_deadline,
                                      .software_backend = software};
        int ret = cpuid_build(vm->host_cpuid, &vm->config.cpu, &target, cpuid, err);
        vm->nr_vcpus++; // vcpu_create leaves what vcpu_destroy can take, even on failure
        if (!ret)
            ret = vcpu_create(&vm->vcpus[i], vm, i, cpuid, err);
        else
            vm->vcpus[i].fd = -1;
        if (ret)
            return ret;
    }
    return 0;
}

static int config_check(const struct vm_config *config, struct error *err)
{
    if (!config->cpus || config->cpus > VM_MAX_VCPUS)
        return error_set(err, -EINVAL, "%u vCPUs: expected 1 to %d", config->cpus, VM_MAX_VCPUS);
    if (config->name && strlen(config->name) >= sizeof(((struct vm *)0)->name))
        return error_set(err, -EINVAL, "VM name '%.80s...': at most %zu characters", config->name,
                         sizeof(((struct vm *)0)->name) - 1);
    return 0;
}

static int vm_build(struct vm *vm, struct error *err)
{
    const struct vm_config *config = &vm->config;
    struct ram_config memory = config->ram;
    memory.seccomp = config->seccomp;
    int ret = ram_create(&vm->ram, &memory, err);
    if (!ret)
        ret = kvm_open(vm, config->kvm_path ? config->kvm_path : "/dev/kvm", err);
    if (!ret)
        ret = kvm_vm_create(vm, err);
    if (!ret)
        ret = host_cpuid_read(vm, err);
    if (!ret)
        ret = vm_kernel_state_create(vm, err);
    if (!ret)
        ret = vcpus_create(vm, err);
    if (!ret && config->trace && !(vm->trace = trace_create(true)))
        ret = error_set(err, -ENOMEM, "no memory for the trace");
    return ret;
}

int vm_create(struct vm **out, const struct vm_config *config, struct loop *loop, struct error *err)
{
    int ret = config_check(config, err);
    if (ret)
        return ret;
    struct vm *vm = calloc(1, sizeof(*vm));
    if (!vm)
        return error_set(err, -ENOMEM, "no memory for a VM");
    vm->config = *config;
    snprintf(vm->name, sizeof(vm->name), "%s", config->name ? config->name : "ferry");
    vm->config.name = vm->name;
    vm->kvm_fd = vm->fd = -1;
    vm->ram.memfd = -1;
    vm->loop = loop;
    vm->log = (struct log) {.name = vm->name,
                            .level = config->log_level,
                            .fd = STDERR_FILENO,
                            .format = config->log_format,
                            .journal = log_is_journal(STDERR_FILENO)};
    vm->pio.name = "port";
    vm->mmio.name = "mmio";
    pthread_mutex_init(&vm->lock, NULL);
    pthread_cond_init(&vm->changed, NULL);
    atomic_store(&vm->pause, true);

    ret = vm_build(vm, err);
    if (ret) {
        vm_destroy(vm);
        return ret;
    }
    *out = vm;
    return 0;
}

// With vm->lock held.
static void stop_all(struct vm *vm)
{
    vm->phase = VM_STOPPED;
    atomic_store(&vm->quit, true);
    pthread_cond_broadcast(&vm->changed);
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        vcpu_kick(&vm->vcpus[i]);
}

void vm_join(struct vm *vm)
{
    // Once stopped, nobody else kicks: a thread that was joined must not be signalled.
    pthread_mutex_lock(&vm->lock);
    stop_all(vm);
    pthread_mutex_unlock(&vm->lock);
    for (unsigned i = 0; i < vm->nr_vcpus; i++) {
        if (!vm->vcpus[i].started)
            continue;
        pthread_join(vm->vcpus[i].thread, NULL);
        pthread_mutex_lock(&vm->lock); // somebody may still want to pause it
        vm->vcpus[i].started = false;
        pthread_mutex_unlock(&vm->lock);
    }
}

static void devices_destroy(struct vm *vm)
{
    while (vm->devices) {
        struct device *dev = vm->devices;
        vm->devices = dev->next;
        if (dev->class->unrealize)
            dev->class->unrealize(dev);
        pthread_mutex_destroy(&dev->lock);
        free(dev);
    }
}

void vm_destroy(struct vm *vm)
{
    if (!vm)
        return;
    vm_join(vm);
    devices_destroy(vm);
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        vcpu_destroy(&vm->vcpus[i]);
    free(vm->vcpus);
    free(vm->kernel_state);
    msi_routes_free(vm->msi);
    free(vm->host_cpuid);
    state_registry_free(&vm->state);
    bus_free(&vm->pio);
    bus_free(&vm->mmio);
    trace_destroy(vm->trace);
    stream_mem_free(&vm->power_on);
    if (vm->fd >= 0)
        close(vm->fd);
    if (vm->kvm_fd >= 0)
        close(vm->kvm_fd);
    ram_destroy(&vm->ram);
    pthread_cond_destroy(&vm->changed);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}

// --- running

int vm_set_entry(struct vm *vm, const struct boot_entry *entry, struct error *err)
{
    return vcpu_set_entry(&vm->vcpus[0], entry, err);
}

// A VM that was stopped stays so: whoever stops it need not wait for others. False then.
static bool phase_set(struct vm *vm, enum vm_phase phase)
{
    pthread_mutex_lock(&vm->lock);
    bool alive = vm->phase != VM_STOPPED;
    if (alive)
        vm->phase = phase;
    pthread_mutex_unlock(&vm->lock);
    return alive;
}

int vm_start(struct vm *vm, struct error *err)
{
    for (unsigned i = 0; i < vm->nr_vcpus; i++) {
        int ret = vcpu_start(&vm->vcpus[i], err);
        if (ret)
            return ret;
    }
    phase_set(vm, VM_PAUSED);
    return 0;
}

static unsigned started_vcpus(const struct vm *vm)
{
    unsigned n = 0;
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        n += vm->vcpus[i].started;
    return n;
}

static void vcpus_park(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    atomic_store(&vm->pause, true);
    if (vm->phase == VM_ACTIVE)
        for (unsigned i = 0; i < vm->nr_vcpus; i++)
            vcpu_kick(&vm->vcpus[i]);
    while (vm->parked < started_vcpus(vm) && !atomic_load(&vm->quit))
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
}

static int devices_quiesce(struct vm *vm, struct error *err)
{
    if (vm->quiesced)
        return 0;
    for (struct device *d = vm->devices; d; d = d->next) {
        int ret = d->class->quiesce ? d->class->quiesce(d, err) : 0;
        if (ret)
            return error_prefix(err, "quiescing %s[%u]", d->class->name, d->instance);
    }
    vm->quiesced = true;
    return 0;
}

int vm_pause(struct vm *vm, struct error *err)
{
    bool paused_before = vm_paused(vm);
    vcpus_park(vm);
    // A guest that did not run since keeps its clock, which may have been loaded.
    if (!paused_before && vm_clock_get(vm, &vm->paused_clock_ns))
        return error_errno(err, "KVM_GET_CLOCK");
    int ret = devices_quiesce(vm, err);
    if (ret)
        return ret;
    if (!phase_set(vm, VM_PAUSED))
        return error_set(err, -ESHUTDOWN, "VM %s has stopped: %s", vm->name,
                         vm_stop_name(vm->stop.kind));
    return 0;
}

void vm_resume(struct vm *vm)
{
    // While a vCPU runs, its ioctls below would wait until it leaves the guest by itself.
    if (!vm_paused(vm))
        return;
    if (vm->paused_clock_ns)
        vm_clock_set(vm, vm->paused_clock_ns);
    vm->paused_clock_ns = 0;
    for (struct device *d = vm->devices; d; d = d->next)
        if (d->class->resume)
            d->class->resume(d);
    vm->quiesced = false;
    // Tells the guest's soft-lockup watchdog that it was paused; EINVAL = it has no kvmclock.
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        ioctl(vm->vcpus[i].fd, KVM_KVMCLOCK_CTRL, 0);
    pthread_mutex_lock(&vm->lock);
    if (vm->phase != VM_STOPPED) {
        vm->phase = VM_ACTIVE;
        atomic_store(&vm->pause, false);
        pthread_cond_broadcast(&vm->changed);
    }
    pthread_mutex_unlock(&vm->lock);
}

void vm_hold(struct vm *vm, bool held)
{
    atomic_store(&vm->hold, held);
    pthread_mutex_lock(&vm->lock);
    for (unsigned i = 0; held && vm->phase == VM_ACTIVE && i < vm->nr_vcpus; i++)
        vcpu_kick(&vm->vcpus[i]);
    pthread_mutex_unlock(&vm->lock);
}

bool vm_paused(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    bool paused = vm->phase == VM_PAUSED;
    pthread_mutex_unlock(&vm->lock);
    return paused;
}

bool vm_stopped(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    bool stopped = vm->phase == VM_STOPPED;
    pthread_mutex_unlock(&vm->lock);
    return stopped;
}

void vm_request_stop(struct vm *vm, enum vm_stop_kind kind, uint32_t value, const char *fmt, ...)
{
    pthread_mutex_lock(&vm->lock);
    bool first = vm->phase != VM_STOPPED;
    if (first && vm->on_reset && (kind == VM_STOP_RESET || kind == VM_STOP_TRIPLE_FAULT)) {
        atomic_store(&vm->resetting, true);
        for (unsigned i = 0; i < vm->nr_vcpus; i++)
            vcpu_kick(&vm->vcpus[i]);
        pthread_mutex_unlock(&vm->lock);
        vm->on_reset(vm, vm->on_stop_arg);
        return;
    }
    if (first) {
        vm->stop.kind = kind;
        vm->stop.value = value;
        va_list args;
        va_start(args, fmt);
        vsnprintf(vm->stop.text, sizeof(vm->stop.text), fmt, args);
        va_end(args);
        stop_all(vm);
    }
    pthread_mutex_unlock(&vm->lock);
    if (first && vm->on_stop)
        vm->on_stop(vm, vm->on_stop_arg);
}

static const struct {
    const char *name;
    int status;
} stops[] = {
    [VM_RUNNING] = {"running", EXIT_FAILED},
    [VM_STOP_POWEROFF] = {"powered off", EXIT_OK},
    [VM_STOP_RESET] = {"rebooted", EXIT_GUEST_REBOOT},
    [VM_STOP_PANIC] = {"panicked", EXIT_GUEST_PANIC},
    [VM_STOP_TRIPLE_FAULT] = {"triple fault", EXIT_GUEST_TRIPLE_FAULT},
    [VM_STOP_DEBUG_EXIT] = {"debug exit", EXIT_OK},
    [VM_STOP_EMULATION] = {"cannot be emulated", EXIT_GUEST_EMULATION},
    [VM_STOP_ERROR] = {"failed", EXIT_FAILED},
    [VM_STOP_HOST] = {"stopped by the host", EXIT_STOPPED},
    [VM_STOP_MIGRATED] = {"migrated", EXIT_OK},
};

const char *vm_stop_name(enum vm_stop_kind kind)
{
    return stops[kind].name;
}

int vm_stop_status(const struct vm_stop *stop)
{
    if (stop->kind == VM_STOP_DEBUG_EXIT && stop->value)
        return EXIT_DEBUG_BASE + (int)(stop->value < EXIT_DEBUG_MAX ? stop->value : EXIT_DEBUG_MAX);
    return stops[stop->kind].status;
}

// --- state

int vm_save(struct vm *vm, struct stream *out, struct error *err)
{
    if (!vm_paused(vm))
        return error_set(err, -EBUSY, "VM %s must be paused to be saved", vm->name);
    if (atomic_load(&vm->resetting))
        return error_set(err, -EBUSY, "VM %s is about to start again: its guest reboots", vm->name);
    return state_save(&vm->state, out, err);
}

int vm_load(struct vm *vm, struct stream *in, struct error *err)
{
    return state_load(&vm->state, in, err);
}

// --- reset

// The sections of vCPUs and interrupt controllers: all that were registered before any device's.
static struct state_registry kernel_sections(const struct vm *vm)
{
    struct state_registry reg = vm->state;
    for (reg.nr = 0; reg.nr < vm->state.nr; reg.nr++) {
        const void *object = vm->state.entries[reg.nr].object;
        bool device = false;
        for (const struct device *d = vm->devices; d && !device; d = d->next)
            device = d == object;
        if (device)
            break;
    }
    return reg;
}

int vm_power_on_keep(struct vm *vm, struct error *err)
{
    const struct state_registry reg = kernel_sections(vm);
    stream_mem_free(&vm->power_on);
    stream_mem_writer(&vm->power_on, "power-on state", STATE_BLOB_MAX);
    return state_save(&reg, &vm->power_on.stream, err);
}

bool vm_power_on_kept(const struct vm *vm)
{
    return vm->power_on.len;
}

int vm_clear(struct vm *vm, struct error *err)
{
    if (!vm_paused(vm))
        return error_set(err, -EBUSY, "VM %s must be paused to be reset", vm->name);
    for (struct device *d = vm->devices; d; d = d->next)
        if (d->class->reset)
            d->class->reset(d);
    int ret = ram_drop(&vm->ram, 0, vm->ram.pages, err);
    ram_for_each_region (&vm->ram, r)
        ram_mark_dirty(&vm->ram, r->gpa, r->size);
    return ret;
}

static int load_again(struct vm *vm, const struct state_registry *reg, struct stream *in,
                      struct error *err)
{
    vm->in_reset = true;
    int ret = state_load(reg, in, err);
    vm->in_reset = false;
    atomic_store(&vm->resetting, false);
    return ret;
}

int vm_load_again(struct vm *vm, struct stream *in, struct error *err)
{
    return load_again(vm, &vm->state, in, err);
}

int vm_reset(struct vm *vm, struct error *err)
{
    const struct state_registry reg = kernel_sections(vm);
    struct stream_mem kept;
    if (!vm_power_on_kept(vm))
        return error_set(err, -EINVAL, "VM %s: its state at power-on was not kept", vm->name);
    int ret = vm_clear(vm, err);
    stream_mem_reader(&kept, "power-on state", vm->power_on.data, vm->power_on.len);
    return ret ? ret : load_again(vm, &reg, &kept.stream, err);
}

// --- interrupts

int vm_irq_set(struct vm *vm, unsigned gsi, unsigned level)
{
    struct kvm_irq_level irq = {.irq = gsi, .level = level};
    return ioctl(vm->fd, KVM_IRQ_LINE, &irq) ? -errno : 0;
}

int vm_irqfd(struct vm *vm, unsigned gsi, int event_fd, int resample_fd, struct error *err)
{
    struct kvm_irqfd irqfd = {.fd = (uint32_t)event_fd, .gsi = gsi};
    if (resample_fd >= 0) {
        irqfd.flags = KVM_IRQFD_FLAG_RESAMPLE;
        irqfd.resamplefd = (uint32_t)resample_fd;
    }
    if (ioctl(vm->fd, KVM_IRQFD, &irqfd))
        return error_errno(err, "KVM_IRQFD on line %u", gsi);
    return 0;
}

int vm_irqfd_remove(struct vm *vm, unsigned gsi, int event_fd, struct error *err)
{
    struct kvm_irqfd irqfd = {
        .fd = (uint32_t)event_fd, .gsi = gsi, .flags = KVM_IRQFD_FLAG_DEASSIGN};
    if (ioctl(vm->fd, KVM_IRQFD, &irqfd))
        return error_errno(err, "KVM_IRQFD off line %u", gsi);
    return 0;
}

int vm_msi(struct vm *vm, uint64_t address, uint32_t data)
{
    struct kvm_msi msi = {
        .address_lo = (uint32_t)address, .address_hi = (uint32_t)(address >> 32), .data = data};
    return ioctl(vm->fd, KVM_SIGNAL_MSI, &msi) < 0 ? -errno : 0;
}

int vm_ioeventfd(struct vm *vm, bool pio, uint64_t addr, unsigned len, int event_fd, bool add,
                 struct error *err)
{
    struct kvm_ioeventfd ioe = {.addr = addr,
                                .len = len,
                                .fd = event_fd,
                                .flags = (pio ? KVM_IOEVENTFD_FLAG_PIO : 0u) |
                                         (add ? 0u : KVM_IOEVENTFD_FLAG_DEASSIGN)};
    if (ioctl(vm->fd, KVM_IOEVENTFD, &ioe))
        return error_errno(err, "KVM_IOEVENTFD at %#llx", (unsigned long long)addr);
    return 0;
}

int vm_ioeventfd_value(struct vm *vm, uint64_t addr, uint32_t value, int event_fd, bool add,
                       struct error *err)
{
    struct kvm_ioeventfd ioe = {.datamatch = value,
                                .addr = addr,
                                .len = sizeof(value),
                                .fd = event_fd,
                                .flags = KVM_IOEVENTFD_FLAG_DATAMATCH |
                                         (add ? 0u : KVM_IOEVENTFD_FLAG_DEASSIGN)};
    if (ioctl(vm->fd, KVM_IOEVENTFD, &ioe))
        return error_errno(err, "KVM_IOEVENTFD at %#llx for %u", (unsigned long long)addr, value);
    return 0;
}
