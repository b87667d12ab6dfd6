// SPDX-License-Identifier: Apache-2.0
// Bitmaps with one bit per page index, walked by words.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline size_t bitmap_words(uint64_t bits)
{
    return (size_t)((bits + 63) / 64);
}

static inline bool bitmap_test(const uint64_t *map, uint64_t bit)
{
    return map[bit / 64] >> (bit % 64) & 1;
}

static inline void bitmap_set(uint64_t *map, uint64_t bit)
{
    map[bit / 64] |= 1ull << (bit % 64);
}

static inline void bitmap_clear(uint64_t *map, uint64_t bit)
{
    map[bit / 64] &= ~(1ull << (bit % 64));
}

// First bit >= `from` whose value is `value`, or `bits`.
uint64_t bitmap_find(const uint64_t *map, uint64_t bits, uint64_t from, bool value);

// Last one < `below`, or UINT64_MAX.
uint64_t bitmap_find_below(const uint64_t *map, uint64_t below);

// Bits [first, first + count) become `value`.
void bitmap_fill(uint64_t *map, uint64_t first, uint64_t count, bool value);

// Number of ones among the first `bits`.
uint64_t bitmap_count(const uint64_t *map, uint64_t bits);
