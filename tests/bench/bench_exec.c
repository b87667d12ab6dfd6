// SPDX-License-Identifier: Apache-2.0
// usage: bench_exec FD PROGRAM [ARGUMENT]...
//
// Writes CLOCK_MONOTONIC in nanoseconds (8 bytes, native order) to FD and becomes PROGRAM: start-up
// is measured from the exec, not from the fork of a Python interpreter.
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

// A session is a scheduling group of its own (sched_autogroup) with a niceness of its own, beside
// which that of its threads only counts among themselves: the bench's goes to the group, and the
// program starts as nice as usual. Without such groups everything stays as it is.
static void nice_to_group(void)
{
    int niceness = getpriority(PRIO_PROCESS, 0);
    FILE *group = niceness ? fopen("/proc/self/autogroup", "we") : NULL;
    if (!group)
        return;
    bool done = fprintf(group, "%d", niceness) > 0;
    if (!fclose(group) && done)
        setpriority(PRIO_PROCESS, 0, 0);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: bench_exec FD PROGRAM [ARGUMENT]...\n");
        return 2;
    }
    int fd = atoi(argv[1]);
    struct timespec now;
    nice_to_group();
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) || clock_gettime(CLOCK_MONOTONIC, &now)) {
        fprintf(stderr, "bench_exec: fd %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    uint64_t ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    if (write(fd, &ns, sizeof(ns)) != sizeof(ns)) {
        fprintf(stderr, "bench_exec: cannot write to fd %d: %s\n", fd, strerror(errno));
        return 1;
    }
    execvp(argv[2], argv + 2);
    fprintf(stderr, "bench_exec: cannot run %s: %s\n", argv[2], strerror(errno));
    return 127;
}
