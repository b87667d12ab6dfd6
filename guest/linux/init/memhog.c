// SPDX-License-Identifier: Apache-2.0
//
// Takes memory, holds it until a line is typed, and gives it back: what a balloon and free page
// reporting are tested with.
#include "ferryt.h"

#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>

enum { PAGE = 4096 };

int memhog_main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: memhog MIB\n");
        return 2;
    }
    long mib = number_parse("MIB", argv[1], 1, 1 << 20);
    size_t size = (size_t)mib << 20;
    volatile uint8_t *mem =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mem == MAP_FAILED) {
        perror("memhog: mmap");
        return 1;
    }
    // Huge pages: a fault costs dearly where ring 0 is emulated. The kernel has them off in
    // machines of less than 512 MiB.
    FILE *huge = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "w");
    if (huge) {
        fputs("madvise", huge);
        fclose(huge);
    }
    madvise((void *)mem, size, MADV_HUGEPAGE);
    for (size_t at = 0; at < size; at += PAGE)
        mem[at] = (uint8_t)(at / PAGE) | 1; // not zero: nobody can share or drop it
    printf("memhog: holds %ld MiB\n", mib);
    fflush(stdout);
    while (getchar() != '\n' && !feof(stdin))
        ;
    munmap((void *)mem, size);
    printf("memhog: freed %ld MiB\n", mib);
    return 0;
}
