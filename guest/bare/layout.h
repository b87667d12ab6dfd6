// SPDX-License-Identifier: Apache-2.0
#pragma once

// Numbers shared by C and assembly.

#define SEL_CODE64    0x10
#define SEL_DATA      0x18
#define SEL_USER_DATA 0x2b
#define SEL_USER_CODE 0x33
#define SEL_CODE32    0x38
#define SEL_TSS       0x40 // CPU i: SEL_TSS + 16 * i

#define CPU_MAX        64
#define TRAMPOLINE_GPA 0x8000
#define LAPIC_GPA      0xfee00000
#define STACK_BYTES    16384

#define VECTOR_UD       6
#define VECTOR_SPURIOUS 0xff

// Offsets in struct cpu (checked in cpu.c).
#define CPU_SELF      0
#define CPU_RING0_RSP 8
#define CPU_RSP0      16
#define CPU_USER_RSP  24

#define BOOT_LINUX64 1
#define BOOT_PVH     2

#define CR0_BOOT    0x80000033 // PG, NE, ET, MP, PE
#define CR4_BOOT    0x620      // OSXMMEXCPT, OSFXSR, PAE
#define MSR_EFER    0xc0000080
#define EFER_LME    0x100
#define MSR_GS_BASE 0xc0000101
