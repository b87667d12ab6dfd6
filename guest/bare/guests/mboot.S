// SPDX-License-Identifier: Apache-2.0
// Multiboot 1 image (ELF32): checks the loader's magic, protected mode without paging, and the
// memory fields of the information structure; prints "mboot ok\n" or "mboot bad\n" on COM1 and
// exits with 0 or 1.
#define HEADER_MAGIC 0x1badb002
#define HEADER_FLAGS 2 // memory information wanted
#define LOADER_MAGIC 0x2badb002

    .code32
    .text
    .balign 4
    .long HEADER_MAGIC, HEADER_FLAGS, -(HEADER_MAGIC + HEADER_FLAGS)

    .globl start
start:
    cli
    cld
    mov $1, %edi
    mov $bad, %esi
    cmp $LOADER_MAGIC, %eax
    jne 1f
    mov %cr0, %eax
    and $0x80000001, %eax
    cmp $1, %eax
    jne 1f
    testb $1, (%ebx) // mem_lower and mem_upper present
    jz 1f
    cmpl $0, 8(%ebx) // mem_upper, KiB above 1 MiB
    je 1f
    xor %edi, %edi
    mov $good, %esi
1:  mov $0x3f8, %dx
2:  lodsb
    test %al, %al
    jz 3f
    outb %al, %dx
    jmp 2b
3:  mov %edi, %eax
    outl %eax, $0xf4
4:  hlt
    jmp 4b
good:
    .asciz "mboot ok\n"
bad:
    .asciz "mboot bad\n"

    .section .note.GNU-stack, "", @progbits
