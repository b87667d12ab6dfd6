// SPDX-License-Identifier: Apache-2.0
// Small helpers used in every room: clean-up by attribute, sizes, arithmetic.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define KiB           (1024ull)
#define MiB           (1024ull * KiB)
#define GiB           (1024ull * MiB)
#define PAGE_SHIFT    12
#define PAGE_SIZE     4096ull
#define HUGE_PAGE     (2 * MiB)

#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))

// `autofree char *p = ...;` frees, `autoclose int fd = ...;` closes when the scope is left.
#define autofree  __attribute__((cleanup(cleanup_free)))
#define autoclose __attribute__((cleanup(cleanup_close)))

static inline void cleanup_free(void *p)
{
    free(*(void **)p);
}

static inline void cleanup_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

// Hands an fd out of an autoclose variable.
static inline int take_fd(int *fd)
{
    int out = *fd;
    *fd = -1;
    return out;
}

static inline uint64_t align_up(uint64_t value, uint64_t power_of_two)
{
    return (value + power_of_two - 1) & ~(power_of_two - 1);
}

static inline uint64_t align_down(uint64_t value, uint64_t power_of_two)
{
    return value & ~(power_of_two - 1);
}

// True when [start, start+len) lies within [0, limit) without wrapping.
static inline bool range_within(uint64_t start, uint64_t len, uint64_t limit)
{
    return len <= limit && start <= limit - len;
}

// Monotonic time in nanoseconds.
uint64_t time_ns(void);

// The monotonic time `ms` from now, for condition variables made with CLOCK_MONOTONIC.
struct timespec time_deadline(unsigned ms);

// sched_setattr(2), which the C library does not have. A tid of 0 is the calling thread. 0 or
// -errno.
struct thread_attr {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period; // ns
};
enum {
    THREAD_RESET_ON_FORK = 1,           // in flags: not for threads that it starts
    THREAD_SHORTEST_SLICE = 100 * 1000, // runtime of an ordinary thread: the least that is taken
};
int thread_attr_get(pid_t tid, struct thread_attr *attr);
int thread_attr_set(pid_t tid, const struct thread_attr *attr);

// The calling thread works in short turns, and somebody waits for each: it gets one soon, even
// beside vCPUs that never sleep. (Linux 6.12 and later; before, nothing changes.) Threads that it
// starts are ordinary ones; but if its niceness is below 0 they inherit that, and this as well.
void thread_prompt(void);
// The calling thread works as long as it may, whoever started it; its niceness stays.
void thread_ordinary(void);

// "512M", "1G", "64" (plain numbers count units of `unit` bytes). 0 or -EINVAL/-ERANGE.
int size_parse(const char *text, uint64_t unit, uint64_t *bytes);

// All of `len` bytes or an error (-errno; -EPIPE... for write, -ENODATA when the file ends early).
int write_all(int fd, const void *data, size_t len);
int read_all(int fd, void *data, size_t len);
