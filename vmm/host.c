// SPDX-License-Identifier: Apache-2.0
// Asking the kernel. What the answers mean stands in host_judge.c.
#include "vmm/host.h"

#include <cpuid.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>

#include "vmm/util.h"

bool host_is_software_backend(void)
{
    return access("/sys/module/kvm_pvm", F_OK) == 0;
}

// First line of a small file, without its newline; false when it cannot be read.
static bool file_line(const char *path, char *line, size_t size)
{
    line[0] = 0;
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, line, size - 1);
    if (n < 0)
        n = 0;
    line[n] = 0;
    line[strcspn(line, "\n")] = 0;
    return n > 0;
}

static int64_t file_number(const char *path)
{
    char line[32];
    if (!file_line(path, line, sizeof(line)))
        return -1;
    if (line[0] == 'Y' || line[0] == 'N')
        return line[0] == 'Y';
    return isdigit((unsigned char)line[0]) ? strtoll(line, NULL, 10) : -1;
}

static void probe_cpu(struct host_facts *f)
{
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) {
        f->is_guest = c >> 31 & 1;
        f->cpu_virtualization = c >> 5 & 1;
    }
    if (__get_cpuid(0x80000001, &a, &b, &c, &d))
        f->cpu_virtualization |= c >> 2 & 1;
    if (__get_cpuid(0x80000007, &a, &b, &c, &d))
        f->tsc_constant = d >> 8 & 1;
    uint32_t brand[12];
    for (unsigned i = 0; i < 3; i++) {
        if (!__get_cpuid(0x80000002 + i, &brand[4 * i], &brand[4 * i + 1], &brand[4 * i + 2],
                         &brand[4 * i + 3]))
            return;
    }
    memcpy(f->cpu_model, brand, sizeof(brand));
    f->cpu_model[sizeof(brand)] = 0;
    for (size_t n = strlen(f->cpu_model); n && f->cpu_model[n - 1] == ' '; n--)
        f->cpu_model[n - 1] = 0;
}

static void probe_backend(struct host_facts *f)
{
    static const char *const modules[] = {"kvm_pvm", "kvm_intel", "kvm_amd"};
    f->software_backend = host_is_software_backend();
    f->backend = "";
    f->nested = -1;
    for (unsigned i = 0; i < ARRAY_SIZE(modules) && !f->backend[0]; i++) {
        char path[64];
        snprintf(path, sizeof(path), "/sys/module/%s", modules[i]);
        if (access(path, F_OK))
            continue;
        f->backend = modules[i];
        snprintf(path, sizeof(path), "/sys/module/%s/parameters/nested", modules[i]);
        f->nested = (int)file_number(path);
    }
}

static enum host_kvm kvm_open_result(int error)
{
    switch (error) {
    case ENOENT:
    case ENXIO:
    case ENODEV:
        return HOST_KVM_ABSENT;
    case EACCES:
    case EPERM:
        return HOST_KVM_NO_ACCESS;
    default:
        return HOST_KVM_NOT_DEVICE;
    }
}

static void probe_kvm(struct host_facts *f)
{
    probe_backend(f);
    autoclose int kvm = open(f->kvm_path, O_RDWR | O_CLOEXEC);
    if (kvm < 0) {
        f->kvm_errno = errno;
        f->kvm = kvm_open_result(errno);
        return;
    }
    f->kvm_api = ioctl(kvm, KVM_GET_API_VERSION, 0);
    if (f->kvm_api < 0) {
        f->kvm_errno = errno;
        f->kvm = HOST_KVM_NOT_DEVICE;
        return;
    }
    autoclose int vm = -1;
    do // as vm_create does
        vm = ioctl(kvm, KVM_CREATE_VM, 0);
    while (vm < 0 && errno == EINTR);
    if (vm < 0) {
        f->kvm_errno = errno;
        f->kvm = HOST_KVM_BUSY;
    }
    for (size_t i = 0; host_cap_number(i) >= 0; i++) {
        // A VM's answer is more exact than the system's.
        int value = ioctl(vm >= 0 ? vm : kvm, KVM_CHECK_EXTENSION, host_cap_number(i));
        f->caps[i] = value < 0 ? 0 : value;
    }
}

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xaa, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static int uffd_open(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0 || errno != EPERM)
        return fd;
    autoclose int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (dev >= 0)
        fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        errno = EPERM;
    return fd;
}

static void probe_uffd(struct host_facts *f)
{
    autoclose int fd = uffd_open();
    if (fd < 0) {
        f->uffd_errno = errno;
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
        f->uffd_user_only = fd >= 0;
        return;
    }
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(fd, UFFDIO_API, &api))
        f->uffd_errno = errno;
    f->uffd_features = api.features;
}

static void probe_uring(struct host_facts *f)
{
    struct io_uring ring;
    int ret = io_uring_queue_init(2, &ring, 0);
    f->uring_errno = -ret;
    if (!ret)
        io_uring_queue_exit(&ring);
}

static void probe_thp(struct host_facts *f)
{
    char line[64];
    if (!file_line("/sys/kernel/mm/transparent_hugepage/enabled", line, sizeof(line)))
        return;
    char *open_bracket = strchr(line, '['); // "always [madvise] never"
    char *close_bracket = strchr(line, ']');
    if (open_bracket && close_bracket > open_bracket)
        snprintf(f->thp, sizeof(f->thp), "%.*s", (int)(close_bracket - open_bracket - 1),
                 open_bracket + 1);
}

static void probe_memory(struct host_facts *f)
{
    probe_thp(f);
    f->hugetlb_total = file_number("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
    f->hugetlb_free = file_number("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    f->overcommit = (int)file_number("/proc/sys/vm/overcommit_memory");
    FILE *info = fopen("/proc/meminfo", "re");
    if (!info)
        return;
    char line[128];
    while (fgets(line, sizeof(line), info)) {
        unsigned long long kib;
        if (sscanf(line, "MemTotal: %llu", &kib) == 1)
            f->memory_total = kib * KiB;
        else if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
            f->memory_available = kib * KiB;
    }
    fclose(info);
}

static void probe_limits(struct host_facts *f)
{
    struct rlimit limit;
    if (!getrlimit(RLIMIT_MEMLOCK, &limit))
        f->memlock = limit.rlim_cur == RLIM_INFINITY ? UINT64_MAX : limit.rlim_cur;
    if (!getrlimit(RLIMIT_NOFILE, &limit)) {
        f->nofile = limit.rlim_cur;
        f->nofile_max = limit.rlim_max;
    }
    cpu_set_t set;
    f->cpus = sched_getaffinity(0, sizeof(set), &set) ? -1 : CPU_COUNT(&set);
}

void host_probe(struct host_facts *facts, const char *kvm_path)
{
    *facts = (struct host_facts) {.kvm_path = kvm_path};
    struct utsname name;
    if (!uname(&name)) {
        snprintf(facts->kernel, sizeof(facts->kernel), "%s", name.release);
        snprintf(facts->machine, sizeof(facts->machine), "%s", name.machine);
    }
    probe_cpu(facts);
    probe_kvm(facts);
    probe_uffd(facts);
    probe_uring(facts);
    int tun = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    facts->tun_errno = tun < 0 ? errno : 0;
    cleanup_close(&tun);
    probe_memory(facts);
    probe_limits(facts);
    file_line("/sys/devices/system/clocksource/clocksource0/current_clocksource",
              facts->clocksource, sizeof(facts->clocksource));
}
