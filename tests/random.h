// SPDX-License-Identifier: Apache-2.0
// Numbers that look random and are the same in every run.
#pragma once

#include <stdint.h>

// In [0, limit). The low bits of the generator are poor, so they are not used.
static inline uint64_t random_below(uint64_t *seed, uint64_t limit)
{
    *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
    return (*seed >> 20) % limit;
}
