// SPDX-License-Identifier: Apache-2.0
// Executes in ring 0 one instruction that an emulating host (KVM-PVM) may lack. Parameter insn: 0
// popcnt, 1 cmpxchg16b, 2 fwait. GUEST_SYNC(1, address of the instruction) comes first; where the
// host executes it, the result is checked and the guest ends with status 0.
#include "../rt.h"

void badinsn_popcnt(void);
void badinsn_cmpxchg16b(void);
void badinsn_fwait(void);

__asm__(".globl badinsn_popcnt, badinsn_cmpxchg16b, badinsn_fwait\n"
        "badinsn_popcnt: popcnt %rdi, %rax; ret\n"
        "badinsn_cmpxchg16b: cmpxchg16b (%rdi); ret\n"
        "badinsn_fwait: fwait; ret\n");

static void popcnt(void)
{
    uint64_t bits;
    guest_sync(1, (uintptr_t)badinsn_popcnt);
    __asm__ volatile("call badinsn_popcnt" : "=a"(bits) : "D"(0xf0f0) : "cc", "memory");
    GUEST_ASSERT_EQ(bits, 8);
}

static void cmpxchg16b(void)
{
    static _Alignas(16) uint64_t pair[2] = {1, 2};
    guest_sync(1, (uintptr_t)badinsn_cmpxchg16b);
    uint64_t low = 1, high = 2;
    __asm__ volatile("call badinsn_cmpxchg16b"
                     : "+a"(low), "+d"(high)
                     : "b"(3), "c"(4), "D"(pair)
                     : "cc", "memory");
    GUEST_ASSERT_EQ(pair[0], 3);
    GUEST_ASSERT_EQ(pair[1], 4);
}

void guest_main(void)
{
    uint64_t insn = guest_param(UCALL_P_INSN, 0);
    GUEST_ASSERT(insn <= 2);
    if (insn == 0) {
        popcnt();
    } else if (insn == 1) {
        cmpxchg16b();
    } else {
        guest_sync(1, (uintptr_t)badinsn_fwait);
        badinsn_fwait();
    }
}
