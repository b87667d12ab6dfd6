// SPDX-License-Identifier: Apache-2.0
#include "migrate/crc32c.h"

#include <string.h>

#include "vmm/util.h"

#define POLY_REFLECTED 0x82f63b78u

// Bit by bit, four bits at a time: only for CPUs without the instruction and for checking it.
static uint32_t crc_soft(uint32_t crc, const uint8_t *p, size_t len)
{
    uint32_t nibble[16];
    for (uint32_t i = 0; i < 16; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 4; bit++)
            c = c & 1 ? (c >> 1) ^ POLY_REFLECTED : c >> 1;
        nibble[i] = c;
    }
    for (; len; len--, p++) {
        crc ^= *p;
        crc = nibble[crc & 15] ^ (crc >> 4);
        crc = nibble[crc & 15] ^ (crc >> 4);
    }
    return crc;
}

__attribute__((target("sse4.2"))) static uint32_t crc_hard(uint32_t crc, const uint8_t *p,
                                                           size_t len)
{
    uint64_t c = crc;
    for (; len >= 8; len -= 8, p += 8) {
        uint64_t v;
        memcpy(&v, p, 8);
        c = __builtin_ia32_crc32di(c, v);
    }
    for (; len; len--, p++)
        c = __builtin_ia32_crc32qi((uint32_t)c, *p);
    return (uint32_t)c;
}

uint32_t crc32c(uint32_t crc, const void *data, size_t len)
{
    crc = __builtin_cpu_supports("sse4.2") ? crc_hard(~crc, data, len) : crc_soft(~crc, data, len);
    return ~crc;
}

#define QUARTER (PAGE_SIZE / 4)

__attribute__((no_sanitize("thread"))) static inline uint64_t word(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof(v));
    return v;
}

// One variable a lane: the instruction takes three cycles, and four of them overlap only when each
// stays in its register (gcc 12 at -O2 keeps an array in memory).
__attribute__((target("sse4.2"), no_sanitize("thread"))) static void quarters_hard(
    const uint8_t *page, uint32_t out[4])
{
    uint64_t a = ~0u, b = ~0u, c = ~0u, d = ~0u;
    for (size_t i = 0; i < QUARTER; i += 8) {
        a = __builtin_ia32_crc32di(a, word(page + i));
        b = __builtin_ia32_crc32di(b, word(page + QUARTER + i));
        c = __builtin_ia32_crc32di(c, word(page + 2 * QUARTER + i));
        d = __builtin_ia32_crc32di(d, word(page + 3 * QUARTER + i));
    }
    out[0] = ~(uint32_t)a;
    out[1] = ~(uint32_t)b;
    out[2] = ~(uint32_t)c;
    out[3] = ~(uint32_t)d;
}

uint32_t page_sum(const void *page)
{
    uint32_t lanes[4];
    if (__builtin_cpu_supports("sse4.2")) {
        quarters_hard(page, lanes);
    } else {
        for (unsigned lane = 0; lane < 4; lane++)
            lanes[lane] = crc32c(0, (const uint8_t *)page + lane * QUARTER, QUARTER);
    }
    return crc32c(0, lanes, sizeof(lanes));
}
