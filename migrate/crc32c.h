// SPDX-License-Identifier: Apache-2.0
// CRC-32C (Castagnoli, RFC 3720 appendix B.4), by the SSE4.2 instruction where the CPU has it.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Continues `crc` (0 to begin) over `data`.
uint32_t crc32c(uint32_t crc, const void *data, size_t len);

// Checksum of a 4 KiB page: the CRC-32C of the four CRC-32Cs of its quarters (little endian). Four
// independent chains keep the CPU's CRC unit busy, one alone would wait for its own result.
uint32_t page_sum(const void *page);
