// SPDX-License-Identifier: Apache-2.0
// Prints what starting a VM costs step by step, and what an exit costs. Asserts nothing about time.
#include "tests/bare/bare.h"

#include <stdio.h>
#include <stdlib.h>

#include "devices/platform.h"
#include "vmm/util.h"

enum { ROUNDS = 21 };

enum step { LOOP, VM, BOARD, BOOT, START, FIRST, DESTROY, STEPS };
static const char *const step_names[STEPS] = {
    [LOOP] = "loop_create",   [VM] = "vm_create",   [BOARD] = "board_create",
    [BOOT] = "boot_load",     [START] = "vm_start", [FIRST] = "resume to first exit",
    [DESTROY] = "vm_destroy",
};

static double lap(uint64_t *since)
{
    uint64_t now = time_ns(), took = now - *since;
    *since = now;
    return (double)took / 1000;
}

static void start_once(unsigned cpus, uint64_t memory, double us[STEPS])
{
    struct error err;
    struct loop *loop;
    struct vm *vm;
    struct board board;
    struct boot_entry entry;
    const struct mark_config mark = {.fd = -1};
    const struct board_config config = {.mark = &mark};
    const struct vm_config vm_config = {.cpus = cpus, .ram = {.size = memory}};
    char path[512];
    snprintf(path, sizeof(path), "%s/first.elf", getenv("BARE_GUESTS"));

    uint64_t t = time_ns();
    ck_assert(!loop_create(&loop, &err));
    us[LOOP] = lap(&t);
    ck_assert_msg(!vm_create(&vm, &vm_config, loop, &err), "%s", err.text);
    us[VM] = lap(&t);
    ck_assert(!board_create(vm, &config, &board, &err));
    us[BOARD] = lap(&t);
    const struct boot_config boot = {.kernel = path, .cmdline = "", .rsdp = board.rsdp};
    ck_assert_msg(!boot_load(&vm->ram, &boot, &entry, &err), "%s", err.text);
    ck_assert(!vm_set_entry(vm, &entry, &err));
    us[BOOT] = lap(&t);
    ck_assert(!vm_start(vm, &err));
    us[START] = lap(&t);
    vm_resume(vm);
    uint64_t first;
    while (!(first = mark_time_ns(board.mark)))
        usleep(50);
    us[FIRST] = ((double)first - (double)t) / 1000;
    t = time_ns();
    vm_destroy(vm);
    us[DESTROY] = lap(&t);
    loop_destroy(loop);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

START_TEST(start)
{
    static const struct {
        unsigned cpus;
        uint64_t memory;
    } shapes[] = {{1, 128 * MiB}, {8, 128 * MiB}, {64, 128 * MiB}, {1, 64 * GiB}};
    double us[STEPS][ROUNDS], best = 0, median = 0;
    for (unsigned n = 0; n < ROUNDS; n++) {
        double one[STEPS];
        start_once(shapes[_i].cpus, shapes[_i].memory, one);
        for (unsigned s = 0; s < STEPS; s++)
            us[s][n] = one[s];
    }
    printf("start of %u vCPUs, %llu MiB (best, median, worst of %d, us)\n", shapes[_i].cpus,
           (unsigned long long)(shapes[_i].memory / MiB), ROUNDS);
    for (unsigned s = 0; s < STEPS; s++) {
        qsort(us[s], ROUNDS, sizeof(us[s][0]), ascending);
        printf("  %-22s %9.1f %9.1f %9.1f\n", step_names[s], us[s][0], us[s][ROUNDS / 2],
               us[s][ROUNDS - 1]);
        best += s == DESTROY ? 0 : us[s][0];
        median += s == DESTROY ? 0 : us[s][ROUNDS / 2];
    }
    printf("  %-22s %9.1f %9.1f\n", "sum up to first exit", best, median);
}
END_TEST

START_TEST(exits)
{
    for (unsigned ring = 0; ring <= 3; ring += 3)
        for (unsigned write = 0; write <= 1; write++) {
            struct bare b;
            const struct bare_config config = {
                .guest = "exits",
                .params = {{UCALL_P_N, 50000}, {UCALL_P_RING, ring}, {UCALL_P_WRITE, write}},
                .nr_params = 3};
            bare_create(&b, &config);
            bare_run(&b);
            bare_wait_done(&b);
            printf("exit, ring %u, %s: %.2f us\n", ring, write ? "out" : "in",
                   (double)bare_value(&b, UCALL_V_TSC_DELTA, 0) * 1000 /
                       (double)bare_value(&b, UCALL_V_TSC_KHZ, 0) /
                       (double)bare_value(&b, UCALL_V_COUNT, 0));
            bare_end(&b);
        }
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_loop_test(tc, start, 0, 4);
    tcase_add_test(tc, exits);
}

int main(void)
{
    return bare_main("bare_measure", add_tests);
}
