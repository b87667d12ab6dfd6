// SPDX-License-Identifier: Apache-2.0
// The shortest way to a visible instruction: the third one writes UCALL_FIRST_BYTE to
// UCALL_FIRST_PORT. Stands alone, without the runtime. The same bytes serve both entries (32-bit
// PVH and 64-bit).
#include "../ucall_abi_ports.h"

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18 // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start64

    .section .text.start, "ax", @progbits
    .code64
    .globl start64
start64:
    mov $UCALL_FIRST_BYTE, %al
    mov $UCALL_FIRST_PORT, %dx
    outb %al, %dx
1:  hlt
    jmp 1b

    .bss
    .skip 1 // the linker script's data segment needs something

    .section .note.GNU-stack, "", @progbits
