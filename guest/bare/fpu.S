// SPDX-License-Identifier: Apache-2.0
// Vector registers in assembly: the C of this directory is compiled for general registers only.

#define YMM_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define ZMM_NUMBERS YMM_NUMBERS, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31

    .text
// void fpu_fill(const struct fpu_image *image, uint64_t sets): loads the sets (enum ucall_fpu).
    .globl fpu_fill
fpu_fill:
    test $1, %sil
    jz 1f
    fninit
    .irp n, 7, 6, 5, 4, 3, 2, 1, 0
    fldt 16 * \n(%rdi)
    .endr
    fldcw 128(%rdi)
1:  test $2, %sil
    jz 2f
    ldmxcsr 132(%rdi)
    .irp n, YMM_NUMBERS
    movups 192 + 64 * \n(%rdi), %xmm\n
    .endr
2:  test $4, %sil
    jz 3f
    .irp n, YMM_NUMBERS
    vmovups 192 + 64 * \n(%rdi), %ymm\n
    .endr
3:  test $8, %sil
    jz 4f
    .irp n, ZMM_NUMBERS
    vmovups 192 + 64 * \n(%rdi), %zmm\n
    .endr
    .irp n, 1, 2, 3, 4, 5, 6, 7
    kmovw 136 + 2 * \n(%rdi), %k\n
    .endr
4:  ret

// void fpu_read(struct fpu_image *image, uint64_t sets): the same the other way; x87 registers are
// popped.
    .globl fpu_read
fpu_read:
    test $8, %sil
    jz 1f
    .irp n, ZMM_NUMBERS
    vmovups %zmm\n, 192 + 64 * \n(%rdi)
    .endr
    .irp n, 1, 2, 3, 4, 5, 6, 7
    kmovw %k\n, 136 + 2 * \n(%rdi)
    .endr
1:  test $4, %sil
    jz 2f
    .irp n, YMM_NUMBERS
    vmovups %ymm\n, 192 + 64 * \n(%rdi)
    .endr
2:  test $2, %sil
    jz 3f
    stmxcsr 132(%rdi)
    .irp n, YMM_NUMBERS
    movups %xmm\n, 192 + 64 * \n(%rdi)
    .endr
3:  test $1, %sil
    jz 4f
    fnstcw 128(%rdi)
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7
    fstpt 16 * \n(%rdi)
    .endr
4:  ret

// uint64_t xcr0_read(void)
    .globl xcr0_read
xcr0_read:
    xor %ecx, %ecx
    xgetbv
    shl $32, %rdx
    or %rdx, %rax
    ret

    .section .note.GNU-stack, "", @progbits
