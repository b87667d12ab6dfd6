// SPDX-License-Identifier: Apache-2.0
// Entry points, page tables, descriptor table, AP trampoline, exception stubs, ring 3 switch.
#include "layout.h"

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18 // name and descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start_pvh

    .section .text.start, "ax", @progbits
// Linux 64-bit boot protocol: RSI = boot_params.
    .code64
    .globl start64
start64:
    cli
    lgdt gdt_pointer
    mov $pml4, %eax
    mov %rax, %cr3
    mov $CR4_BOOT, %eax
    mov %rax, %cr4
    mov $CR0_BOOT, %eax
    mov %rax, %cr0
    mov $BOOT_LINUX64, %edi
    jmp boot_common

// PVH: 32-bit protected mode, paging off, EBX = hvm_start_info.
    .code32
    .globl start_pvh
start_pvh:
    cli
    lgdt gdt_pointer
    mov $CR4_BOOT, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $MSR_EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov $CR0_BOOT, %eax
    mov %eax, %cr0
    ljmp $SEL_CODE64, $1f
    .code64
1:
    mov %ebx, %esi
    mov $BOOT_PVH, %edi

// EDI = BOOT_*, RSI = boot information.
boot_common:
    mov $boot_stack_top, %esp
    call segments_load
    call boot_main
    ud2

// The entry CS may come from another table: reload all of them from ours.
segments_load:
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $SEL_USER_DATA, %eax // survives the way out to ring 3
    mov %eax, %ds
    mov %eax, %es
    mov $SEL_DATA, %eax
    mov %eax, %ss
    pop %rax
    push $SEL_CODE64
    push %rax
    lretq

// Copied to TRAMPOLINE_GPA: real mode straight to long mode.
    .globl trampoline, trampoline_end
    .code16
trampoline:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl trampoline_gdt - trampoline
    mov $CR4_BOOT, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $MSR_EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov $CR0_BOOT, %eax
    mov %eax, %cr0
    ljmpl $SEL_CODE64, $ap_start64
    .balign 4
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code64
ap_start64:
    mov $LAPIC_GPA, %eax
    mov 0x20(%rax), %eax // APIC id register
    shr $24, %eax
    mov cpu_by_apic_id(, %rax, 8), %rbx
    mov CPU_RSP0(%rbx), %rsp
    call segments_load
    mov %rbx, %rdi
    call ap_main
    ud2

// uint64_t ring3_enter(uint64_t (*fn)(void *), void *arg, uint64_t rflags): the outermost frame of
// ring 0 stays on the stack while ring 3 runs; traps use the stack below it (TSS.rsp0, set by the
// caller of this).
    .text
    .globl ring3_enter
ring3_enter:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, %gs:CPU_RING0_RSP
    push $SEL_USER_DATA
    push %gs:CPU_USER_RSP
    push %rdx
    push $SEL_USER_CODE
    push $1f
    mov %rdi, %rax
    mov %rsi, %rdi
    iretq
1:  call *%rax
    xor %edi, %edi // RING3_RETURN
// Ring 3 calls ring 0 by an undefined instruction at a known address: `int n` is not available on
// every host (it raises #UD under KVM-PVM). RDI = enum ring3_call, RAX = result.
    .globl ring3_call
ring3_call:
    ud2

// void ring3_leave(uint64_t result): called by the trap handler, returns from ring3_enter.
    .globl ring3_leave
ring3_leave:
    mov %rdi, %rax
    mov %gs:CPU_RING0_RSP, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

trap_common:
    push %rax
    push %rcx
    push %rdx
    push %rbx
    push %rbp
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    cld
    mov %rsp, %rdi
    call trap_dispatch
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rbp
    pop %rbx
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

// 16 bytes each. Vectors 8, 10-14, 17, 21, 29, 30 push an error code themselves.
    .balign 16
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .if vector > 31
    push $0
    .elseif !(0x60227d00 >> vector & 1)
    push $0
    .endif
    .byte 0x68 // push imm32: one length for all vectors
    .long vector
    jmp trap_common
    .balign 16
    .set vector, vector + 1
    .endr

    .data
    .balign 8
    .globl gdt, gdt_end, gdt_pointer
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff // 0x10 ring 0 code, 64 bit
    .quad 0x00cf93000000ffff // 0x18 ring 0 data
    .quad 0
    .quad 0x00cff3000000ffff // 0x28 ring 3 data
    .quad 0x00affb000000ffff // 0x30 ring 3 code, 64 bit
    .quad 0x00cf9b000000ffff // 0x38 ring 0 code, 32 bit
    .fill 2 * CPU_MAX, 8, 0  // task state segments
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

// The first 4 GiB as data, so that entry costs no emulated loop: 2 MiB pages, user, writable,
// accessed, dirty.
    .balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
    .globl pdpt
pdpt:
    .quad pd + 7, pd + 4096 + 7, pd + 8192 + 7, pd + 12288 + 7
    .fill 508, 8, 0
pd:
    .set page, 0
    .rept 2048
    .quad page + 0xe7
    .set page, page + 0x200000
    .endr

    .bss
    .balign 64
boot_stack:
    .skip STACK_BYTES
    .globl boot_stack_top
boot_stack_top:

    .section .note.GNU-stack, "", @progbits
