// SPDX-License-Identifier: Apache-2.0
// Boot sector: real mode at 0:0x7c00. Prints "real ok\n" on COM1, then writes 0 to the debug exit
// port.
    .code16
    .text
    .globl start
start:
    cli
    cld
    xor %ax, %ax
    mov %ax, %ds
    mov $text, %si
    mov $0x3f8, %dx
1:  lodsb
    test %al, %al
    jz 2f
    outb %al, %dx
    jmp 1b
2:  xor %eax, %eax
    outl %eax, $0xf4
3:  hlt
    jmp 3b
text:
    .asciz "real ok\n"
    .org 510
    .word 0xaa55

    .section .note.GNU-stack, "", @progbits
