// SPDX-License-Identifier: Apache-2.0
#include "ferryt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUF_SIZE = 65536 };

// Sum over all CPUs of the local timer's interrupts, or -1 when the kernel shows none.
static long ticks_sum(char *buf)
{
    if (file_read("/proc/interrupts", buf, BUF_SIZE) <= 0)
        return -1;
    char *at = strstr(buf, "LOC:");
    if (!at)
        return -1;
    long sum = 0;
    char *end;
    for (at += 4;; at = end) {
        long n = strtol(at, &end, 10);
        if (end == at)
            return sum;
        sum += n;
    }
}

// Prints one line that tests match: CPUs on line, memory in KiB, timer interrupts since boot.
int info_main(int argc, char **argv)
{
    static char buf[BUF_SIZE];
    long mem = -1;

    (void)argc, (void)argv;
    if (file_read("/proc/meminfo", buf, BUF_SIZE) > 0 && !strncmp(buf, "MemTotal:", 9))
        mem = strtol(buf + 9, NULL, 10);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    long ticks = ticks_sum(buf);
    printf("ferry-guest: cpus=%ld mem=%ld ticks=%ld\n", cpus, mem, ticks);
    return cpus < 1 || mem < 0 || ticks < 0;
}
