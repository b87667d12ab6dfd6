// SPDX-License-Identifier: Apache-2.0
#pragma once

// The part of ucall_abi.h that assembly can read as well.

#define UCALL_PORT  0xe80      // 4 bytes wide
#define UCALL_MAGIC 0x46525259 // "FRRY"

// 1 byte: guest `first` writes UCALL_FIRST_BYTE with its third instruction.
#define UCALL_FIRST_PORT 0xe84
#define UCALL_FIRST_BYTE 0x42

// Debug exit: a 4-byte or 1-byte `out` ends the VM; the value is the exit status, 0 good.
#define UCALL_EXIT_PORT 0xf4

// ACPI hardware-reduced sleep control register, 1 byte: SLP_EN (bit 5) | SLP_TYP 5 (bits 2..4).
#define UCALL_SLEEP_PORT 0x604
#define UCALL_SLEEP_S5   0x34

// ACPI events (the power button): pending bits, read clears; the line of the I/O APIC that rings.
#define UCALL_EVENT_PORT 0x608
#define UCALL_EVENT_GSI  9
