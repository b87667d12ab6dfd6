// SPDX-License-Identifier: Apache-2.0
//
// Dirties memory at a steady rate, one write per page, round and round: the load under which
// benches move machines.
#include "ferryt.h"

#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, PAGES_PER_MIB = 256 };

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

int dirty_main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: dirty SIZE_MIB RATE_MIB_PER_S [SECONDS]  (rate 0: no limit)\n");
        return 2;
    }
    long pages = number_parse("SIZE_MIB", argv[1], 1, 1 << 20) * PAGES_PER_MIB;
    double rate = (double)number_parse("RATE", argv[2], 0, 1 << 20) * PAGES_PER_MIB;
    long seconds = argc > 3 ? number_parse("SECONDS", argv[3], 1, 1 << 20) : 0;

    size_t size = (size_t)pages * PAGE;
    volatile uint64_t *mem =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mem == MAP_FAILED) {
        perror("dirty: mmap");
        return 1;
    }
    // Huge pages: a first touch costs the guest as much for 4 KiB as for a good part of 2 MiB.
    madvise((void *)mem, size, MADV_HUGEPAGE);
    for (long page = 0; page < pages; page++)
        mem[page * (PAGE / 8)] = (uint64_t)page;
    printf("dirty: ready %ld MiB\n", pages / PAGES_PER_MIB);
    fflush(stdout);

    double start = now_s(), now = start;
    long done = 0;
    for (long page = 0; !seconds || now < start + (double)seconds;) {
        // Look at the clock (no system call: the vDSO) every 16 pages only.
        if (done % 16 == 0) {
            now = now_s();
            double ahead = rate > 0 ? (double)done / rate - (now - start) : 0;
            if (ahead > 0.1) {
                struct timespec pause = {.tv_nsec = 50000000};
                nanosleep(&pause, NULL);
                continue;
            }
        }
        mem[page * (PAGE / 8)]++;
        done++;
        page = page + 1 < pages ? page + 1 : 0;
    }
    printf("dirty: wrote %ld pages in %.1f s\n", done, now - start);
    return 0;
}
