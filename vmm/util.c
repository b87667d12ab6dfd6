// SPDX-License-Identifier: Apache-2.0
#include "vmm/util.h"

#include <ctype.h>
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t time_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

struct timespec time_deadline(unsigned ms)
{
    uint64_t end = time_ns() + ms * 1000000ull;
    return (struct timespec) {(time_t)(end / 1000000000u), (long)(end % 1000000000u)};
}

int thread_attr_get(pid_t tid, struct thread_attr *attr)
{
    *attr = (struct thread_attr) {.size = sizeof(*attr)};
    return syscall(SYS_sched_getattr, tid, attr, (unsigned)sizeof(*attr), 0) ? -errno : 0;
}

int thread_attr_set(pid_t tid, const struct thread_attr *attr)
{
    return syscall(SYS_sched_setattr, tid, attr, 0) ? -errno : 0;
}

void thread_prompt(void)
{
    struct thread_attr attr;
    if (thread_attr_get(0, &attr) || attr.policy)
        return; // somebody gave it another policy
    // The kernel's reset gives new threads the ordinary slice, but takes a niceness below 0, too.
    attr.flags = attr.nice < 0 ? 0 : THREAD_RESET_ON_FORK;
    attr.runtime = THREAD_SHORTEST_SLICE;
    thread_attr_set(0, &attr);
}

void thread_ordinary(void)
{
    struct thread_attr attr;
    if (thread_attr_get(0, &attr) || attr.policy)
        return;
    attr.runtime = 0;
    thread_attr_set(0, &attr);
}

int size_parse(const char *text, uint64_t unit, uint64_t *bytes)
{
    if (!isdigit((unsigned char)text[0]))
        return -EINVAL;
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno)
        return -ERANGE;
    if (*end) {
        static const char units[] = "KMGT";
        const char *u = strchr(units, toupper((unsigned char)*end));
        if (!u)
            return -EINVAL;
        unit = 1024ull << (10 * (u - units));
        end++;
        // "512M", "512MB" and "512MiB" mean the same.
        if (!strcmp(end, "iB") || !strcmp(end, "B"))
            end += strlen(end);
    }
    if (*end)
        return -EINVAL;
    if (value && unit > UINT64_MAX / value)
        return -ERANGE;
    *bytes = value * unit;
    return 0;
}

int write_all(int fd, const void *data, size_t len)
{
    const char *p = data;
    while (len) {
        ssize_t n = write(fd, p, len);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

int read_all(int fd, void *data, size_t len)
{
    char *p = data;
    while (len) {
        ssize_t n = read(fd, p, len);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (n == 0)
            return -ENODATA;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}
