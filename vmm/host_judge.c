// SPDX-License-Identifier: Apache-2.0
// What a host's facts mean for Ferry. Pure: no system call, so that every verdict can be tested.
#include <errno.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "vmm/host.h"
#include "vmm/util.h"

struct judge {
    struct host_finding *findings;
    size_t nr;
};

// --- one finding

static struct host_finding *add(struct judge *j, const char *group, const char *name,
                                const char *needed_by)
{
    // The list is ours and shorter than HOST_FINDINGS_MAX (tests/unit/test_host.c fills it).
    struct host_finding *f = &j->findings[j->nr < HOST_FINDINGS_MAX ? j->nr++ : j->nr - 1];
    *f = (struct host_finding) {.group = group, .name = name, .needed_by = needed_by};
    return f;
}

__attribute__((format(printf, 2, 3))) static void value(struct host_finding *f, const char *fmt,
                                                        ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(f->value, sizeof(f->value), fmt, args);
    va_end(args);
}

__attribute__((format(printf, 3, 4))) static void lack(struct host_finding *f,
                                                       enum host_status status, const char *fmt,
                                                       ...)
{
    f->status = status;
    va_list args;
    va_start(args, fmt);
    vsnprintf(f->remedy, sizeof(f->remedy), fmt, args);
    va_end(args);
}

static const char *size_text(char *text, size_t size, uint64_t bytes)
{
    if (bytes == UINT64_MAX)
        snprintf(text, size, "unlimited");
    else if (bytes >= 10 * GiB)
        snprintf(text, size, "%llu GiB", (unsigned long long)(bytes / GiB));
    else
        snprintf(text, size, "%llu MiB", (unsigned long long)(bytes / MiB));
    return text;
}

// --- KVM

struct cap_row {
    int number;
    const char *name;
    int least; // the smallest answer that will do
    enum host_status without;
    bool required;
    bool shown; // the answer is a number that says something
    const char *needed_by;
};

static const struct cap_row caps[] = {
    {KVM_CAP_USER_MEMORY, "guest memory", 1, HOST_LACK, true, false, "every guest"},
    {KVM_CAP_NR_MEMSLOTS, "memory slots", 2, HOST_LACK, true, true, "every guest"},
    {KVM_CAP_IRQCHIP, "interrupt controllers", 1, HOST_LACK, true, false, "every guest"},
    {KVM_CAP_PIT2, "timer (PIT)", 1, HOST_LACK, true, false, "every guest"},
    {KVM_CAP_EXT_CPUID, "CPUID", 1, HOST_LACK, true, false, "every guest"},
    {KVM_CAP_IMMEDIATE_EXIT, "immediate exit", 1, HOST_LACK, true, false, "stopping vCPUs"},
    {KVM_CAP_MAX_VCPUS, "vCPUs at most", 1, HOST_LACK, true, true, "every guest"},
    {KVM_CAP_NR_VCPUS, "vCPUs advised", 1, HOST_WARN, false, true, "guests with more vCPUs"},
    {KVM_CAP_SYNC_REGS, "registers in kvm_run", 1, HOST_WARN, false, false, "fast exits"},
    {KVM_CAP_IOEVENTFD, "ioeventfd", 1, HOST_LACK, true, false, "virtio doorbells"},
    {KVM_CAP_IRQFD, "irqfd", 1, HOST_LACK, true, false, "virtio interrupts"},
    {KVM_CAP_SIGNAL_MSI, "MSI", 1, HOST_WARN, false, false, "PCI devices"},
    {KVM_CAP_IRQ_ROUTING, "interrupt routes", 1, HOST_WARN, false, true, "PCI devices"},
    {KVM_CAP_SPLIT_IRQCHIP, "split irqchip", 1, HOST_WARN, false, false,
     "a later I/O APIC of ours"},
    {KVM_CAP_TSC_DEADLINE_TIMER, "TSC-deadline timer", 1, HOST_WARN, false, false,
     "exact guest timers"},
    {KVM_CAP_TSC_CONTROL, "TSC scaling", 1, HOST_WARN, false, false,
     "migration to a host of another TSC rate"},
    {KVM_CAP_ADJUST_CLOCK, "guest clock", 1, HOST_LACK, false, false, "snapshot, migration"},
    {KVM_CAP_KVMCLOCK_CTRL, "pause notice", 1, HOST_WARN, false, false,
     "no false soft-lockup reports after a pause"},
    {KVM_CAP_VCPU_EVENTS, "pending events", 1, HOST_LACK, false, false, "snapshot, migration"},
    {KVM_CAP_MP_STATE, "vCPU run state", 1, HOST_LACK, false, false, "snapshot, migration"},
    {KVM_CAP_XCRS, "XCR registers", 1, HOST_WARN, false, false, "guests that use AVX, when moved"},
    {KVM_CAP_XSAVE2, "large XSAVE", 1, HOST_WARN, false, true, "guests that use AMX, when moved"},
    {KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "dirty log, by hand", 1, HOST_WARN, false, false,
     "short pauses in pre-copy"},
    {KVM_CAP_DIRTY_LOG_RING, "dirty ring", 1, HOST_WARN, false, true, "pre-copy of large guests"},
    {KVM_CAP_BINARY_STATS_FD, "statistics", 1, HOST_WARN, false, false, "ferry info"},
    {KVM_CAP_EXIT_ON_EMULATION_FAILURE, "emulation exits", 1, HOST_WARN, false, false,
     "diagnosis of instructions KVM cannot run"},
    {KVM_CAP_X86_DISABLE_EXITS, "exits to switch off", 1, HOST_WARN, false, true,
     "guests that idle without exits"},
};

_Static_assert(ARRAY_SIZE(caps) <= HOST_CAPS_MAX, "struct host_facts is too small");

int host_cap_number(size_t index)
{
    return index < ARRAY_SIZE(caps) ? caps[index].number : -1;
}

static void kvm_device_lack(struct host_finding *f, const struct host_facts *h)
{
    switch (h->kvm) {
    case HOST_KVM_OK:
        break;
    case HOST_KVM_ABSENT:
        value(f, "%s: %s", h->kvm_path, strerror(h->kvm_errno));
        if (h->cpu_virtualization)
            lack(f, HOST_LACK, "load the module: modprobe kvm_intel (or kvm_amd)");
        else if (h->is_guest)
            lack(f, HOST_LACK,
                 "this host is a VM without nested virtualization: switch it on for this VM, or "
                 "use another host");
        else
            lack(f, HOST_LACK, "switch on VT-x/SVM in the firmware (BIOS) settings");
        break;
    case HOST_KVM_NO_ACCESS:
        value(f, "%s: %s", h->kvm_path, strerror(h->kvm_errno));
        lack(f, HOST_LACK,
             "add yourself to the group kvm: sudo usermod -aG kvm $USER; then log in again");
        break;
    case HOST_KVM_NOT_DEVICE:
        value(f, "%s: %s", h->kvm_path, strerror(h->kvm_errno));
        lack(f, HOST_LACK, "this is not the KVM device (character device 10:232)");
        break;
    case HOST_KVM_BUSY:
        value(f, "%s: no VM can be created: %s", h->kvm_path, strerror(h->kvm_errno));
        if (h->kvm_errno == EBUSY)
            lack(f, HOST_LACK, "another hypervisor holds the CPU's virtualization: stop it");
        else
            lack(f, HOST_LACK, "look for kvm in dmesg");
        break;
    }
}

static void judge_cap(struct judge *j, const struct cap_row *row, int answer)
{
    struct host_finding *f = add(j, "kvm", row->name, row->needed_by);
    f->required = row->required;
    if (answer >= row->least) {
        if (row->shown)
            value(f, "%d", answer);
        else
            value(f, "yes");
        return;
    }
    value(f, "no (KVM capability %d)", row->number);
    if (row->without == HOST_LACK || row->required)
        lack(f, row->without, "a newer host kernel, or one with this part of KVM built in");
    else
        lack(f, row->without, "not on this kernel and CPU; Ferry does without");
}

static void judge_kvm(struct judge *j, const struct host_facts *h)
{
    struct host_finding *f = add(j, "kvm", "device", "every guest");
    f->required = true;
    value(f, "%s", h->kvm_path);
    kvm_device_lack(f, h);
    if (h->kvm == HOST_KVM_ABSENT || h->kvm == HOST_KVM_NO_ACCESS || h->kvm == HOST_KVM_NOT_DEVICE)
        return; // nothing else can be known

    f = add(j, "kvm", "API version", "every guest");
    f->required = true;
    value(f, "%d", h->kvm_api);
    if (h->kvm_api != KVM_API_VERSION)
        lack(f, HOST_LACK, "KVM API version %d is expected", KVM_API_VERSION);

    f = add(j, "kvm", "back end", "speed; unmodified guest kernels");
    value(f, "%s%s%s", h->backend[0] ? h->backend : "unknown", h->nested > 0 ? ", nested" : "",
          h->is_guest ? " (this host is a VM)" : "");
    if (h->software_backend)
        lack(f, HOST_WARN,
             "ring 0 is emulated: slow, and stock kernels stop early; boot guest/'s kernel, or use "
             "a "
             "host with VT-x or SVM");

    for (size_t i = 0; i < ARRAY_SIZE(caps); i++)
        judge_cap(j, &caps[i], h->caps[i]);
}

// --- moving guests

// Bits that the headers of Linux 6.1 do not name yet.
enum { UFFD_WP_ASYNC = 1 << 15 };

static void judge_uffd(struct judge *j, const struct host_facts *h)
{
    struct host_finding *f = add(j, "migration", "userfaultfd", "post-copy, lazy restore");
    if (h->uffd_errno == 0) {
        value(f, "yes, features 0x%llx", (unsigned long long)h->uffd_features);
    } else {
        value(f, "%s%s", strerror(h->uffd_errno),
              h->uffd_user_only ? " (for KVM's own faults)" : "");
        if (h->uffd_errno == ENOSYS)
            lack(f, HOST_LACK, "a host kernel with CONFIG_USERFAULTFD");
        else
            lack(f, HOST_LACK,
                 "sudo sysctl vm.unprivileged_userfaultfd=1, or rights to /dev/userfaultfd");
        return;
    }
    static const struct {
        uint64_t bit;
        const char *name, *needed_by;
    } rows[] = {
        {1 << 5, "userfaultfd: shared memory", "post-copy of memfd guests"},
        {1 << 4, "userfaultfd: huge pages", "post-copy of hugetlb guests"},
        {1 << 9, "userfaultfd: minor faults", "post-copy of hugetlb guests"},
        {1 << 0, "userfaultfd: write-protect", "background snapshots"},
        {1 << 12, "userfaultfd: write-protect, shared", "background snapshots of memfd guests"},
        {UFFD_WP_ASYNC, "userfaultfd: asynchronous", "dirty tracking without KVM's log"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        f = add(j, "migration", rows[i].name, rows[i].needed_by);
        bool there = h->uffd_features & rows[i].bit;
        value(f, "%s", there ? "yes" : "no");
        if (!there)
            lack(f, HOST_WARN, "a newer host kernel");
    }
}

// --- memory

static void judge_huge_pages(struct judge *j, const struct host_facts *h)
{
    struct host_finding *f = add(j, "memory", "transparent huge pages", "--backing thp");
    value(f, "%s", h->thp[0] ? h->thp : "not built in");
    if (!h->thp[0] || !strcmp(h->thp, "never"))
        lack(f, HOST_WARN, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled");

    f = add(j, "memory", "2 MiB pages", "--backing hugetlb");
    if (h->hugetlb_total < 0) {
        value(f, "not built in");
        lack(f, HOST_WARN, "a host kernel with CONFIG_HUGETLBFS");
        return;
    }
    value(f, "%lld free of %lld", (long long)h->hugetlb_free, (long long)h->hugetlb_total);
    if (h->hugetlb_free <= 0)
        lack(f, HOST_WARN, "sudo sysctl vm.nr_hugepages=N, N = guest MiB / 2");
}

static void judge_memory(struct judge *j, const struct host_facts *h)
{
    struct host_finding *f = add(j, "memory", "memory free", "guest RAM");
    char available[32], total[32];
    value(f, "%s of %s", size_text(available, sizeof(available), h->memory_available),
          size_text(total, sizeof(total), h->memory_total));
    if (h->memory_available < 256 * MiB)
        lack(f, HOST_WARN, "little is left for guests: end other programs or add memory");

    judge_huge_pages(j, h);

    f = add(j, "memory", "overcommit", "guests larger than free memory");
    static const char *const modes[] = {"0 (by rule of thumb)", "1 (always)", "2 (never)"};
    if (h->overcommit >= 0 && h->overcommit <= 2)
        value(f, "%s", modes[h->overcommit]);
    else
        value(f, "unknown");
    if (h->overcommit == 2)
        lack(f, HOST_WARN,
             "guest RAM counts in full when it is mapped: sudo sysctl vm.overcommit_memory=0");

    f = add(j, "memory", "locked-memory limit", "registered io_uring buffers");
    char limit[32];
    value(f, "%s", size_text(limit, sizeof(limit), h->memlock));
    if (h->memlock < 8 * MiB)
        lack(f, HOST_WARN, "ulimit -l 65536, or LimitMEMLOCK= in the unit file");
}

// --- the rest

static void judge_devices(struct judge *j, const struct host_facts *h)
{
    struct host_finding *f = add(j, "devices", "io_uring", "the event loop: every guest");
    f->required = true;
    value(f, "%s", h->uring_errno ? strerror(h->uring_errno) : "yes");
    if (h->uring_errno == ENOSYS)
        lack(f, HOST_LACK,
             "a host kernel with CONFIG_IO_URING; in a container: allow io_uring in its seccomp "
             "profile");
    else if (h->uring_errno == EPERM || h->uring_errno == EACCES)
        lack(f, HOST_LACK,
             "sudo sysctl kernel.io_uring_disabled=0; in a container: allow io_uring in its "
             "seccomp profile");
    else if (h->uring_errno)
        lack(f, HOST_LACK, "raise the locked-memory limit: ulimit -l 65536");

    f = add(j, "devices", "/dev/net/tun", "guest network over a tap interface");
    value(f, "%s", h->tun_errno ? strerror(h->tun_errno) : "yes");
    if (h->tun_errno == ENOENT || h->tun_errno == ENODEV)
        lack(f, HOST_WARN, "sudo modprobe tun");
    else if (h->tun_errno)
        lack(f, HOST_WARN, "give your user rights to /dev/net/tun");
}

static void judge_host(struct judge *j, const struct host_facts *h)
{
    struct host_finding *f = add(j, "host", "machine", "every guest");
    f->required = true;
    value(f, "%s, Linux %s", h->machine, h->kernel);
    if (strcmp(h->machine, "x86_64"))
        lack(f, HOST_LACK, "Ferry runs x86-64 guests on x86-64 hosts only");

    f = add(j, "host", "CPU", "");
    value(f, "%s, %d usable", h->cpu_model[0] ? h->cpu_model : "unknown", h->cpus);

    f = add(j, "host", "clock source", "steady guest time");
    value(f, "%s%s", h->clocksource[0] ? h->clocksource : "unknown",
          h->tsc_constant ? ", constant TSC" : "");
    if (!strcmp(h->clocksource, "hpet") || !strcmp(h->clocksource, "acpi_pm"))
        lack(f, HOST_WARN, "the host gave its TSC up as unsteady (see dmesg): guest time is slow");

    f = add(j, "host", "open-files limit", "guests with many devices or vCPUs");
    value(f, "%llu (at most %llu)", (unsigned long long)h->nofile,
          (unsigned long long)h->nofile_max);
    if (h->nofile < 256)
        lack(f, HOST_WARN, "ulimit -n 1024, or LimitNOFILE= in the unit file");
}

size_t host_judge(const struct host_facts *facts, struct host_finding findings[HOST_FINDINGS_MAX])
{
    struct judge j = {.findings = findings};
    judge_host(&j, facts);
    judge_kvm(&j, facts);
    judge_devices(&j, facts);
    judge_memory(&j, facts);
    judge_uffd(&j, facts);
    return j.nr;
}

bool host_can_run(const struct host_finding *findings, size_t nr)
{
    for (size_t i = 0; i < nr; i++) {
        if (findings[i].required && findings[i].status == HOST_LACK)
            return false;
    }
    return true;
}
