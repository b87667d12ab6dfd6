// SPDX-License-Identifier: Apache-2.0
//
// Do vector registers survive a change of process? Several processes keep patterns of their own
// in them and yield to each other. Always the SSE registers; the AVX halves only when the kernel
// says it saves them. A kernel started with `noxsave` does not, yet on some hosts user code can
// still use AVX, so nothing in this user space may: the second part shows that libc does not.
#define _GNU_SOURCE // cpu_set_t
#include "ferryt.h"

#include <cpuid.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { REGS = 16, PROCESSES_MAX = 64 };

typedef uint8_t xmm_file[REGS][16] __attribute__((aligned(16)));
typedef uint8_t ymm_file[REGS][32] __attribute__((aligned(32)));

#define EACH_REG(X) \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define XMM_LOAD(n)    "movdqa 16*" #n "(%[in]), %%xmm" #n "\n\t"
#define XMM_STORE(n)   "movdqa %%xmm" #n ", 16*" #n "(%[out])\n\t"
#define YMM_LOAD(n)    "vmovdqa 32*" #n "(%[in]), %%ymm" #n "\n\t"
#define YMM_STORE(n)   "vmovdqa %%ymm" #n ", 32*" #n "(%[out])\n\t"
#define XMM_CLOBBER(n) "xmm" #n,

// Load, yield and store stand in one asm: no compiled code between may touch the registers.
static void xmm_yield(const xmm_file *in, xmm_file *out)
{
    long nr = SYS_sched_yield;
    __asm__ volatile(EACH_REG(XMM_LOAD) "syscall\n\t" EACH_REG(XMM_STORE)
                     : "+a"(nr)
                     : [in] "r"(in), [out] "r"(out)
                     : "rcx", "r11", EACH_REG(XMM_CLOBBER) "memory");
}

__attribute__((target("avx"))) static void ymm_yield(const ymm_file *in, ymm_file *out)
{
    long nr = SYS_sched_yield;
    __asm__ volatile(EACH_REG(YMM_LOAD) "syscall\n\t" EACH_REG(YMM_STORE) "vzeroupper"
                     : "+a"(nr)
                     : [in] "r"(in), [out] "r"(out)
                     : "rcx", "r11", EACH_REG(XMM_CLOBBER) "memory");
}

__attribute__((target("avx"))) static void ymm_load(const ymm_file *in)
{
    __asm__ volatile(EACH_REG(YMM_LOAD)::[in] "r"(in) : "memory");
}

__attribute__((target("avx"))) static void ymm_store(ymm_file *out)
{
    __asm__ volatile(EACH_REG(YMM_STORE) "vzeroupper" ::[out] "r"(out) : "memory");
}

// May user code execute AVX here? CPUID as user space sees it, which need not be what the kernel
// sees.
static bool avx_executes(void)
{
    unsigned int a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (bit_OSXSAVE | bit_AVX)) != (bit_OSXSAVE | bit_AVX))
        return false;
    unsigned int low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6;
}

// Does the kernel save AVX state? It drops the flag when it does not.
static bool avx_saved(void)
{
    static char buf[8192];
    if (file_read("/proc/cpuinfo", buf, sizeof(buf)) <= 0)
        return false;
    char *flags = strstr(buf, "\nflags");
    if (!flags)
        return false;
    flags[strcspn(flags + 1, "\n") + 1] = '\0';
    return strstr(flags, " avx ") != NULL;
}

static void pattern_fill(uint8_t *bytes, size_t size, unsigned int seed)
{
    uint32_t x = seed * 2654435761u + 1;
    for (size_t i = 0; i < size; i++) {
        x = x * 1664525u + 1013904223u;
        bytes[i] = (uint8_t)(x >> 24);
    }
}

static int mismatch_report(const char *what, int id, long round, const uint8_t *want,
                           const uint8_t *got, int width)
{
    for (int i = 0; i < REGS * width; i++) {
        if (want[i] != got[i]) {
            printf("vectest: process %d round %ld: %s%d byte %d is %02x, expected %02x\n", id,
                   round, what, i / width, i % width, got[i], want[i]);
            break;
        }
    }
    return 1;
}

static int patterns_hold(int id, long rounds, bool avx)
{
    static xmm_file xmm_in, xmm_out;
    static ymm_file ymm_in, ymm_out;

    for (long round = 0; round < rounds; round++) {
        unsigned int seed = (unsigned int)(id * 1000003 + round);
        pattern_fill(xmm_in[0], sizeof(xmm_in), seed);
        xmm_yield(&xmm_in, &xmm_out);
        if (memcmp(xmm_in, xmm_out, sizeof(xmm_in)))
            return mismatch_report("xmm", id, round, xmm_in[0], xmm_out[0], 16);
        if (!avx)
            continue;
        pattern_fill(ymm_in[0], sizeof(ymm_in), seed);
        ymm_yield(&ymm_in, &ymm_out);
        if (memcmp(ymm_in, ymm_out, sizeof(ymm_in)))
            return mismatch_report("ymm", id, round, ymm_in[0], ymm_out[0], 32);
    }
    return 0;
}

// Calls libc's string functions on a buffer long enough for their widest loops.
static void strings_use(char *a, char *b, size_t size)
{
    volatile size_t sink __attribute__((unused)); // keeps the calls

    memset(a, 'x', size);
    a[size - 1] = '\0';
    memcpy(b, a, size);
    memmove(b + 1, b, size - 2);
    sink = strlen(b) + (size_t)memcmp(a, b, size) + (size_t)strcmp(a, b);
    sink = (size_t)(strchr(a, 'y') != NULL) + (size_t)(memchr(a, 'z', size) != NULL);
    strcpy(b, a);
    strncpy(b, a, size);
    sink = (size_t)(strstr(a, "xxxxy") != NULL) + (size_t)strncmp(a, b, size);
}

// Keeps this process on the CPU it runs on; `all` gets where it could run before.
static int cpu_stay(cpu_set_t *all)
{
    cpu_set_t one;
    int cpu = sched_getcpu();
    if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof(*all), all))
        return -1;
    CPU_ZERO(&one);
    CPU_SET((size_t)cpu, &one);
    return sched_setaffinity(0, sizeof(one), &one);
}

// The upper halves of the YMM registers must be as before after libc worked: no AVX in it. On one
// CPU only: a kernel that does not save these halves does not carry them to another CPU either.
static int strings_check(void)
{
    enum { SIZE = 8192 };
    static char a[SIZE], b[SIZE];
    static ymm_file in, out;

    if (!avx_executes()) {
        printf("vectest: libc: no AVX for user code here, so none used\n");
        return 0;
    }
    cpu_set_t all;
    if (cpu_stay(&all)) {
        perror("vectest: cannot stay on one CPU");
        return 1;
    }
    pattern_fill(in[0], sizeof(in), 7);
    for (int round = 0; round < 20; round++) {
        ymm_load(&in);
        strings_use(a, b, SIZE);
        ymm_store(&out);
        for (int reg = 0; reg < REGS; reg++) {
            if (memcmp(in[reg] + 16, out[reg] + 16, 16)) {
                printf("vectest: libc: upper half of ymm%d changed in round %d: AVX is used\n", reg,
                       round);
                return 1;
            }
        }
    }
    sched_setaffinity(0, sizeof(all), &all);
    printf("vectest: libc: string functions leave AVX alone\n");
    return 0;
}

int vectest_main(int argc, char **argv)
{
    long processes = argc > 1 ? number_parse("PROCESSES", argv[1], 1, PROCESSES_MAX) : 3;
    long rounds = argc > 2 ? number_parse("ROUNDS", argv[2], 1, 100000000) : 200;
    bool avx = avx_saved();
    int failed = strings_check();

    fflush(stdout);
    for (int id = 0; id < processes; id++) {
        pid_t pid = fork();
        if (pid < 0) {
            perror("vectest: fork");
            return 1;
        }
        if (!pid)
            exit(patterns_hold(id, rounds, avx));
    }
    int status;
    while (wait(&status) > 0)
        failed |= !WIFEXITED(status) || WEXITSTATUS(status);
    if (failed)
        return 1;
    printf("vectest: ok %ld rounds, %ld processes, %s\n", rounds, processes,
           avx ? "SSE and AVX" : "SSE (AVX not saved by this kernel)");
    return 0;
}
