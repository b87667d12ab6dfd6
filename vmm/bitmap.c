// SPDX-License-Identifier: Apache-2.0
#include "vmm/bitmap.h"

uint64_t bitmap_find(const uint64_t *map, uint64_t bits, uint64_t from, bool value)
{
    if (from >= bits)
        return bits;
    uint64_t flip = value ? 0 : ~0ull;
    size_t word = (size_t)(from / 64);
    uint64_t w = (map[word] ^ flip) & (~0ull << (from % 64));
    while (!w) {
        if (++word >= bitmap_words(bits))
            return bits;
        w = map[word] ^ flip;
    }
    uint64_t bit = word * 64ull + (unsigned)__builtin_ctzll(w);
    return bit < bits ? bit : bits;
}

uint64_t bitmap_find_below(const uint64_t *map, uint64_t below)
{
    if (!below)
        return UINT64_MAX;
    size_t word = (size_t)((below - 1) / 64);
    uint64_t w = map[word] & (~0ull >> (63 - (below - 1) % 64));
    while (!w) {
        if (!word--)
            return UINT64_MAX;
        w = map[word];
    }
    return word * 64ull + 63 - (unsigned)__builtin_clzll(w);
}

void bitmap_fill(uint64_t *map, uint64_t first, uint64_t count, bool value)
{
    while (count) {
        unsigned shift = first % 64;
        uint64_t n = 64 - shift < count ? 64 - shift : count;
        uint64_t mask = (n == 64 ? ~0ull : (1ull << n) - 1) << shift;
        if (value)
            map[first / 64] |= mask;
        else
            map[first / 64] &= ~mask;
        first += n;
        count -= n;
    }
}

uint64_t bitmap_count(const uint64_t *map, uint64_t bits)
{
    uint64_t n = 0;
    for (uint64_t word = 0; word < bits / 64; word++)
        n += (unsigned)__builtin_popcountll(map[word]);
    if (bits % 64)
        n += (unsigned)__builtin_popcountll(map[bits / 64] & ((1ull << (bits % 64)) - 1));
    return n;
}
