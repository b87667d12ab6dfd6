// SPDX-License-Identifier: Apache-2.0
#include "fpu.h"
#include "internal.h"

#define CR4_OSXSAVE        (1ul << 18)
#define CPUID1_ECX_OSXSAVE (1u << 27)
#define XCR0_SSE_X87       3u
#define XCR0_AVX           4u
#define XCR0_AVX512        0xe0u

_Static_assert(offsetof(struct fpu_image, mxcsr) == 132, "fpu.S");
_Static_assert(offsetof(struct fpu_image, k) == 136, "fpu.S");
_Static_assert(offsetof(struct fpu_image, zmm) == 192, "fpu.S");

static uint64_t user_xcr0(void *arg)
{
    (void)arg;
    return cpuid(1, 0).ecx & CPUID1_ECX_OSXSAVE ? xcr0_read() : 0;
}

uint64_t fpu_enable(void)
{
    // Under KVM-PVM ring 3 always has the host's XCR0, and ring 0 cannot execute the XSAVE family:
    // only where ring 3 does not yet see OSXSAVE is it for us to set.
    uint64_t xcr0 = ring3_run(user_xcr0, NULL);
    if (xcr0)
        return xcr0;
    if (!(cpuid(1, 0).ecx & 1u << 26)) // XSAVE
        return XCR0_SSE_X87;
    uint64_t cr4;
    __asm__ volatile("mov %%cr4, %0" : "=r"(cr4));
    __asm__ volatile("mov %0, %%cr4" : : "r"(cr4 | CR4_OSXSAVE));
    uint32_t offered = cpuid(0xd, 0).eax;
    xcr0 = XCR0_SSE_X87 | (offered & XCR0_AVX);
    if ((offered & XCR0_AVX512) == XCR0_AVX512)
        xcr0 |= XCR0_AVX512;
    __asm__ volatile("xsetbv" : : "c"(0), "a"((uint32_t)xcr0), "d"(0));
    return xcr0;
}
