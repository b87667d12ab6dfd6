// SPDX-License-Identifier: Apache-2.0
#pragma once

// Register contents that fpu.S loads and stores. Ring 3 only.

#include <stdint.h>

struct fpu_image {
    uint64_t x87[8][2]; // 80-bit values in 16 bytes, ST(0) first
    uint16_t fcw;
    uint16_t pad0;
    uint32_t mxcsr; // offset 132
    uint16_t k[8];  // offset 136; k0 is not touched
    uint8_t pad1[40];
    uint64_t zmm[32][8]; // offset 192; XMM and YMM are the low parts
};

void fpu_fill(const struct fpu_image *image, uint64_t sets);
void fpu_read(struct fpu_image *image, uint64_t sets);
uint64_t xcr0_read(void);
