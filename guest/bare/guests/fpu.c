// SPDX-License-Identifier: Apache-2.0
// Every vector register keeps its value across an exit to the host (and whatever the host does
// there: save, load, migrate). Parameters: loops (default 1), seed. Sequence per loop:
// GUEST_SYNC(loop number from 1) in ring 3 with all registers loaded.
#include "../fpu.h"
#include "../rt.h"

static struct fpu_image loaded[CPU_MAX], found[CPU_MAX];
static uint64_t loops, seed;

static uint64_t pattern(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state >> 7 ^ *state << 11;
}

static void image_fill(struct fpu_image *image, uint64_t state)
{
    for (unsigned i = 0; i < 8; i++) {
        image->x87[i][0] =
            pattern(&state) | 1ull << 63; // a normal number: any mantissa, exponent of 1.0
        image->x87[i][1] = 0x3fff;
        image->k[i] = (uint16_t)pattern(&state);
    }
    image->fcw = (uint16_t)(0x37f ^ (state >> 40 & 3) << 10); // all masked, some rounding mode
    image->mxcsr = (uint32_t)(0x1f80 | (state >> 42 & 3) << 13);
    for (unsigned i = 0; i < 32; i++)
        for (unsigned n = 0; n < 8; n++)
            image->zmm[i][n] = pattern(&state);
}

static void image_compare(const struct fpu_image *a, const struct fpu_image *b, uint64_t sets)
{
    if (sets & UCALL_FPU_X87) {
        for (unsigned i = 0; i < 8; i++) {
            GUEST_ASSERT_EQ(a->x87[i][0], b->x87[i][0]);
            GUEST_ASSERT_EQ(a->x87[i][1], b->x87[i][1]);
        }
        GUEST_ASSERT_EQ(a->fcw, b->fcw);
    }
    if (sets & UCALL_FPU_SSE)
        GUEST_ASSERT_EQ(a->mxcsr, b->mxcsr);
    unsigned registers = sets & UCALL_FPU_AVX512 ? 32 : 16;
    unsigned words = sets & UCALL_FPU_AVX512 ? 8 : sets & UCALL_FPU_AVX ? 4 : 2;
    for (unsigned i = 0; i < registers; i++)
        for (unsigned n = 0; n < words; n++)
            GUEST_ASSERT_EQ(a->zmm[i][n], b->zmm[i][n]);
    for (unsigned i = 1; (sets & UCALL_FPU_AVX512) && i < 8; i++)
        GUEST_ASSERT_EQ(a->k[i], b->k[i]);
}

static uint64_t check(void *arg)
{
    uint64_t sets = *(uint64_t *)arg;
    unsigned cpu = cpu_self()->index;
    for (uint64_t loop = 1; !loops || loop <= loops; loop++) {
        image_fill(&loaded[cpu], seed + loop * CPU_MAX + cpu);
        fpu_fill(&loaded[cpu], sets);
        GUEST_SYNC(loop); // general registers only in between
        fpu_read(&found[cpu], sets);
        image_compare(&loaded[cpu], &found[cpu], sets);
    }
    return 0;
}

static void run(void *arg)
{
    (void)arg;
    uint64_t xcr0 = fpu_enable();
    uint64_t sets = UCALL_FPU_X87 | UCALL_FPU_SSE;
    if (xcr0 & 4)
        sets |= UCALL_FPU_AVX;
    if ((xcr0 & 0xe0) == 0xe0)
        sets |= UCALL_FPU_AVX512;
    guest_value(UCALL_V_FPU_SETS, sets, cpu_self()->index);
    ring3_run(check, &sets);
}

void guest_main(void)
{
    loops = guest_param(UCALL_P_LOOPS, 1);
    seed = guest_param(UCALL_P_SEED, 1);
    cpus_start(run, NULL);
    run(NULL);
    cpus_join();
}
