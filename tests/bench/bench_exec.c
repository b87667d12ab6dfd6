// SPDX-License-Identifier: Apache-2.0
// usage: bench_exec FD PROGRAM [ARGUMENT]...
//
// Writes CLOCK_MONOTONIC in nanoseconds (8 bytes, native order) to FD and becomes PROGRAM: start-up
// is measured from the exec, not from the fork of a Python interpreter.
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: bench_exec FD PROGRAM [ARGUMENT]...\n");
        return 2;
    }
    int fd = atoi(argv[1]);
    struct timespec now;
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
