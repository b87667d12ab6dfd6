// SPDX-License-Identifier: Apache-2.0
#include "migrate/userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vmm/util.h"

int uffd_open(int *fd, const char *who, uint64_t features, struct error *err)
{
    autoclose int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    *fd = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK) : -1;
    if (*fd < 0)
        *fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0 && errno == EPERM)
        return error_set(err, -EPERM,
                         "%s needs userfaultfd for kernel accesses: allow access to "
                         "/dev/userfaultfd, or CAP_SYS_PTRACE, or sysctl "
                         "vm.unprivileged_userfaultfd=1",
                         who);
    if (*fd < 0)
        return error_errno(err, "%s: userfaultfd", who);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (!ioctl(*fd, UFFDIO_API, &api))
        return 0;
    int ret = errno == EINVAL ? error_set(err, -EOPNOTSUPP,
                                          "%s: this kernel's userfaultfd lacks a feature of 0x%llx",
                                          who, (unsigned long long)features)
                              : error_errno(err, "%s: UFFDIO_API", who);
    close(*fd);
    *fd = -1;
    return ret;
}

int uffd_register(int fd, const void *start, uint64_t len, uint64_t mode, uint64_t need,
                  struct error *err)
{
    struct uffdio_register reg = {.range = {.start = (uintptr_t)start, .len = len}, .mode = mode};
    if (ioctl(fd, UFFDIO_REGISTER, &reg))
        return errno == EINVAL || errno == EPERM
                   ? error_set(err, -EOPNOTSUPP,
                               "userfaultfd does not support this kind of memory (mode 0x%llx)",
                               (unsigned long long)mode)
                   : error_errno(err, "UFFDIO_REGISTER of %llu MiB of guest memory",
                                 (unsigned long long)(len / MiB));
    if ((reg.ioctls & need) == need)
        return 0;
    uffd_unregister(fd, start, len);
    return error_set(err, -EOPNOTSUPP,
                     "userfaultfd offers 0x%llx for this kind of memory (huge pages?)",
                     (unsigned long long)reg.ioctls);
}

void uffd_unregister(int fd, const void *start, uint64_t len)
{
    struct uffdio_range range = {.start = (uintptr_t)start, .len = len};
    ioctl(fd, UFFDIO_UNREGISTER, &range);
}

int uffd_faults(int fd, const struct ram *ram, uint64_t pages[UFFD_BATCH], unsigned *nr,
                struct error *err)
{
    struct uffd_msg msgs[UFFD_BATCH];
    *nr = 0;
    ssize_t len = read(fd, msgs, sizeof(msgs));
    if (len < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : error_errno(err, "reading userfaultfd");
    for (size_t i = 0; i < (size_t)len / sizeof(msgs[0]); i++) {
        const void *hva = (const void *)(uintptr_t)msgs[i].arg.pagefault.address;
        *nr += msgs[i].event == UFFD_EVENT_PAGEFAULT && ram_hva_page(ram, hva, &pages[*nr]);
    }
    return 0;
}

static int writeprotect(int fd, const void *start, uint64_t len, uint64_t mode, struct error *err)
{
    struct uffdio_writeprotect wp = {.range = {.start = (uintptr_t)start, .len = len},
                                     .mode = mode};
    while (ioctl(fd, UFFDIO_WRITEPROTECT, &wp))
        if (errno != EAGAIN && errno != EINTR)
            return error_errno(err, "UFFDIO_WRITEPROTECT of %llu KiB",
                               (unsigned long long)(len / KiB));
    return 0;
}

int uffd_protect(int fd, const void *start, uint64_t len, struct error *err)
{
    return writeprotect(fd, start, len, UFFDIO_WRITEPROTECT_MODE_WP, err);
}

int uffd_unprotect(int fd, const void *start, uint64_t len, struct error *err)
{
    return writeprotect(fd, start, len, 0, err);
}

static int wake(int fd, const void *start, uint64_t len, struct error *err)
{
    struct uffdio_range range = {.start = (uintptr_t)start, .len = len};
    return ioctl(fd, UFFDIO_WAKE, &range) ? error_errno(err, "UFFDIO_WAKE") : 0;
}

// One call for a part of the range: 0, all of it; else errno, or *done > 0: so many bytes, and the
// next call says why.
typedef int place_part(int fd, uint64_t to, uint64_t from, uint64_t len, int64_t *done);

static int copy_part(int fd, uint64_t to, uint64_t from, uint64_t len, int64_t *done)
{
    struct uffdio_copy copy = {.dst = to, .src = from, .len = len};
    int ret = ioctl(fd, UFFDIO_COPY, &copy);
    *done = copy.copy;
    return ret;
}

static int zero_part(int fd, uint64_t to, uint64_t from, uint64_t len, int64_t *done)
{
    struct uffdio_zeropage zero = {.range = {.start = to, .len = len}};
    int ret = ioctl(fd, UFFDIO_ZEROPAGE, &zero);
    *done = zero.zeropage;
    return ret;
}

static int continue_part(int fd, uint64_t to, uint64_t from, uint64_t len, int64_t *done)
{
    struct uffdio_continue show = {.range = {.start = to, .len = len}};
    int ret = ioctl(fd, UFFDIO_CONTINUE, &show);
    *done = show.mapped;
    return ret;
}

// What is there already is left as it is, and who waits for it is woken.
static int place(int fd, place_part *part, const char *name, void *to, const void *from,
                 uint64_t len, uint64_t unit, struct error *err)
{
    for (uint64_t at = 0; at < len;) {
        int64_t done;
        if (!part(fd, (uintptr_t)to + at, (uintptr_t)from + at, len - at, &done))
            return 0;
        if (done > 0) {
            at += (uint64_t)done;
        } else if (errno == EEXIST) {
            int ret = wake(fd, (uint8_t *)to + at, unit, err);
            if (ret)
                return ret;
            at += unit;
        } else if (errno != EAGAIN && errno != EINTR) {
            return error_errno(err, "%s of %llu bytes", name, (unsigned long long)(len - at));
        }
    }
    return 0;
}

int uffd_copy(int fd, void *to, const void *from, uint64_t len, struct error *err)
{
    return place(fd, copy_part, "UFFDIO_COPY", to, from, len, PAGE_SIZE, err);
}

int uffd_zero(int fd, void *start, uint64_t len, struct error *err)
{
    return place(fd, zero_part, "UFFDIO_ZEROPAGE", start, NULL, len, PAGE_SIZE, err);
}

int uffd_continue(int fd, void *start, uint64_t len, uint64_t unit, struct error *err)
{
    return place(fd, continue_part, "UFFDIO_CONTINUE", start, NULL, len, unit, err);
}
