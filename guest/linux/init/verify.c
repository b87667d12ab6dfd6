// SPDX-License-Identifier: Apache-2.0
//
// Blocks that say where they belong. Each holds its number, a generation and a checksum, so that
// whoever reads them later, in the guest or on the host, sees a lost, torn, misplaced or old one.
// A line on the console for each flush the device answered: what it promises must be on the disk
// even if the VMM is killed right then.
//
// A block is 512 little-endian words of 64 bits: "FerryBlk", its number, its generation, the
// checksum (of all words, this one taken as 0), then a sequence that follows from number and
// generation.
#define _GNU_SOURCE // O_DIRECT
#include "ferryt.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8, BATCH = 16 };
enum { W_MAGIC, W_NUMBER, W_GENERATION, W_SUM, W_DATA };

static const uint64_t magic = 0x6b6c427972726546; // "FerryBlk"

static uint64_t sum_of(const uint64_t *block)
{
    uint64_t sum = 0xcbf29ce484222325; // FNV-1a, by words
    for (int i = 0; i < WORDS; i++)
        sum = (sum ^ (i == W_SUM ? 0 : block[i])) * 0x100000001b3;
    return sum;
}

static void block_fill(uint64_t *block, uint64_t number, uint64_t generation)
{
    uint64_t x = number * 0x9e3779b97f4a7c15 + generation;
    block[W_MAGIC] = magic;
    block[W_NUMBER] = number;
    block[W_GENERATION] = generation;
    for (int i = W_DATA; i < WORDS; i++)
        block[i] = x = x * 6364136223846793005 + 1442695040888963407;
    block[W_SUM] = sum_of(block);
}

static int file_open(const char *path, int flags, bool cached)
{
    int fd = open(path, flags | O_CLOEXEC | (cached ? 0 : O_DIRECT), 0644);
    if (fd < 0)
        printf("verify: %s: %s\n", path, strerror(errno));
    return fd;
}

static int failed(const char *what, long block)
{
    printf("verify: %s at block %ld: %s\n", what, block, strerror(errno));
    return 1;
}

// Writes blocks [first, end) of one generation, BATCH at a time, and flushes them.
static int blocks_write(int fd, uint64_t (*buf)[WORDS], long first, long end, long generation)
{
    for (long at = first; at < end;) {
        long n = end - at < BATCH ? end - at : BATCH;
        for (long i = 0; i < n; i++)
            block_fill(buf[i], (uint64_t)(at + i), (uint64_t)generation);
        ssize_t done = pwrite(fd, buf, (size_t)(n * BLOCK), at * BLOCK);
        if (done >= 0 && done < n * BLOCK)
            errno = ENOSPC;
        if (done != n * BLOCK)
            return failed("write", at);
        at += n;
    }
    return fdatasync(fd) ? failed("flush", end) : 0;
}

static int write_run(int fd, uint64_t (*buf)[WORDS], int argc, char **argv)
{
    long blocks = number_parse("BLOCKS", argv[0], 1, 1 << 28);
    long rounds = argc > 1 ? number_parse("ROUNDS", argv[1], 1, 1 << 28) : 1;
    long every = argc > 2 ? number_parse("EVERY", argv[2], 1, blocks) : blocks;

    for (long generation = 1; generation <= rounds; generation++) {
        for (long at = 0; at < blocks;) {
            long end = at + every < blocks ? at + every : blocks;
            if (blocks_write(fd, buf, at, end, generation))
                return 1;
            at = end;
            printf("verify: flushed %ld %ld\n", generation, at);
        }
    }
    printf("verify: wrote %ld blocks, generation %ld\n", blocks, rounds);
    return 0;
}

static int block_check(const uint64_t *block, long number, long least)
{
    if (block[W_MAGIC] == magic && block[W_NUMBER] == (uint64_t)number &&
        block[W_SUM] == sum_of(block) && (long)block[W_GENERATION] >= least)
        return 0;
    printf("verify: bad block %ld: magic %s, number %ld, generation %ld (at least %ld expected), "
           "checksum %s\n",
           number, block[W_MAGIC] == magic ? "right" : "wrong", (long)block[W_NUMBER],
           (long)block[W_GENERATION], least, block[W_SUM] == sum_of(block) ? "right" : "wrong");
    return 1;
}

static int read_run(int fd, uint64_t (*buf)[WORDS], int argc, char **argv)
{
    long blocks = number_parse("BLOCKS", argv[0], 1, 1 << 28);
    long least = argc > 1 ? number_parse("GENERATION", argv[1], 0, 1 << 28) : 1;
    long oldest = 1l << 62, newest = 0;

    for (long at = 0; at < blocks;) {
        long n = blocks - at < BATCH ? blocks - at : BATCH;
        ssize_t done = pread(fd, buf, (size_t)(n * BLOCK), at * BLOCK);
        if (done >= 0 && done < n * BLOCK)
            errno = ENODATA;
        if (done != n * BLOCK)
            return failed("read", at);
        for (long i = 0; i < n; i++) {
            long generation = (long)buf[i][W_GENERATION];
            if (block_check(buf[i], at + i, least))
                return 1;
            oldest = generation < oldest ? generation : oldest;
            newest = generation > newest ? generation : newest;
        }
        at += n;
    }
    printf("verify: ok %ld blocks, generations %ld to %ld\n", blocks, oldest, newest);
    return 0;
}

static int range_run(int fd, unsigned long request, const char *what, int argc, char **argv)
{
    long first = number_parse("FIRST", argv[0], 0, 1 << 28);
    long count = number_parse("COUNT", argc > 1 ? argv[1] : "1", 1, 1 << 28);
    uint64_t range[2] = {(uint64_t)first * BLOCK, (uint64_t)count * BLOCK};

    if (ioctl(fd, request, range) || fdatasync(fd))
        return failed(what, first);
    printf("verify: %s %ld blocks from %ld\n", what, count, first);
    return 0;
}

int verify_main(int argc, char **argv)
{
    static uint64_t buf[BATCH][WORDS] __attribute__((aligned(BLOCK)));
    bool cached = argc > 1 && !strcmp(argv[1], "-c");

    argc -= cached;
    argv += cached;
    if (argc < 4) {
        fprintf(stderr, "usage: verify [-c] write PATH BLOCKS [ROUNDS] [EVERY]\n"
                        "       verify [-c] read PATH BLOCKS [GENERATION]\n"
                        "       verify discard|zero DEVICE FIRST [COUNT]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *what = argv[1];
    bool writes = strcmp(what, "read");
    int fd = file_open(argv[2], writes ? O_RDWR | O_CREAT : O_RDONLY, cached);
    if (fd < 0)
        return 1;
    if (!strcmp(what, "write"))
        return write_run(fd, buf, argc - 3, argv + 3);
    if (!writes)
        return read_run(fd, buf, argc - 3, argv + 3);
    if (!strcmp(what, "discard"))
        return range_run(fd, BLKDISCARD, what, argc - 3, argv + 3);
    if (!strcmp(what, "zero"))
        return range_run(fd, BLKZEROOUT, what, argc - 3, argv + 3);
    fprintf(stderr, "verify: '%s': expected write, read, discard or zero\n", what);
    return 2;
}
