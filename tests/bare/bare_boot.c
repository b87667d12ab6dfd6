// SPDX-License-Identifier: Apache-2.0
// Every boot protocol reaches the guest, with any number of vCPUs and both RAM regions.
#include "tests/bare/bare.h"

#include <string.h>

#include "vmm/layout.h"
#include "vmm/util.h"

enum { GUEST_BOOT_LINUX64 = 1, GUEST_BOOT_PVH = 2 }; // UCALL_V_BOOT

static void hello(enum boot_protocol protocol, unsigned kind, unsigned cpus, uint64_t memory)
{
    struct bare b;
    const struct bare_config config = {.guest = "hello",
                                       .cpus = cpus,
                                       .memory = memory,
                                       .protocol = protocol,
                                       .cmdline = "quick brown=fox"};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_done(&b);
    ck_assert_uint_eq(b.syncs, 3);
    ck_assert_uint_eq(bare_value(&b, UCALL_V_BOOT, 0), kind);
    ck_assert_uint_eq(bare_value(&b, UCALL_V_CPUS, 0), cpus);
    // All but what the firmware tables and the hole at 640 KiB take.
    uint64_t ram = bare_value(&b, UCALL_V_RAM_BYTES, 0);
    ck_assert(ram <= memory && ram >= memory - 1 * MiB);
    ck_assert_ptr_nonnull(strstr(b.output, "cmdline \"quick brown=fox\""));
    bare_end(&b);
}

START_TEST(hello_by_linux64)
{
    hello(BOOT_LINUX64, GUEST_BOOT_LINUX64, 1, 32 * MiB);
}
END_TEST

START_TEST(hello_by_pvh)
{
    hello(BOOT_PVH, GUEST_BOOT_PVH, 2, 32 * MiB);
}
END_TEST

START_TEST(hello_with_least_memory)
{
    hello(BOOT_LINUX64, GUEST_BOOT_LINUX64, 1, RAM_MIN);
}
END_TEST

START_TEST(hello_with_memory_above_the_hole)
{
    hello(BOOT_LINUX64, GUEST_BOOT_LINUX64, 1, LAYOUT_RAM_LOW_MAX + 1 * GiB);
    hello(BOOT_PVH, GUEST_BOOT_PVH, 1, LAYOUT_RAM_LOW_MAX + 2 * MiB);
}
END_TEST

// The other two protocols: text on COM1, then 0 to the debug-exit port.
static void serial_image(const char *guest, enum boot_protocol protocol, const char *expected)
{
    struct bare b;
    const struct bare_config config = {.guest = guest, .protocol = protocol};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_done(&b);
    ck_assert_str_eq(bare_serial(&b), expected);
    bare_end(&b);
}

START_TEST(multiboot)
{
    serial_image("mboot", BOOT_AUTO, "mboot ok\n");
}
END_TEST

START_TEST(real_mode)
{
    serial_image("real", BOOT_REAL, "real ok\n");
}
END_TEST

START_TEST(smp)
{
    static const unsigned counts[] = {1, 2, 8, 64};
    unsigned cpus = counts[_i];
    struct bare b;
    const struct bare_config config = {.guest = "smp", .cpus = cpus, .memory = 64 * MiB};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_done(&b);
    ck_assert_uint_eq(bare_value(&b, UCALL_V_CPUS, 0), cpus);
    uint64_t places = 0, ids = 0;
    for (unsigned i = 0; i < cpus; i++) {
        uint64_t place = bare_value(&b, UCALL_V_CPU_COUNT, i);
        uint64_t id = bare_value(&b, UCALL_V_CPU_APIC_ID, i);
        ck_assert(place >= 1 && place <= cpus && id < cpus);
        places |= 1ull << (place - 1);
        ids |= 1ull << id;
        uint64_t ipis = bare_value(&b, UCALL_V_CPU_IPIS, i);
        ck_assert(ipis < cpus && (cpus == 1 || ipis > 0));
    }
    uint64_t all = cpus == 64 ? ~0ull : (1ull << cpus) - 1;
    ck_assert_uint_eq(places, all);
    ck_assert_uint_eq(ids, all);
    bare_end(&b);
}
END_TEST

START_TEST(timer)
{
    struct bare b;
    const struct bare_config config = {
        .guest = "timer", .params = {{UCALL_P_N, 3}}, .nr_params = 1};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_done(&b);
    ck_assert_uint_ge(bare_value(&b, UCALL_V_TIMER_IRQS, 0), 9);
    ck_assert_uint_ge(bare_value(&b, UCALL_V_PIT_IRQS, 0), 3);
    ck_assert_uint_eq(bare_value(&b, UCALL_V_KVMCLOCK, 0), 1);
    bare_end(&b);
}
END_TEST

START_TEST(two_machines_at_once)
{
    struct bare b[2];
    for (unsigned i = 0; i < 2; i++) {
        const struct bare_config config = {.guest = "smp", .cpus = 2 + i};
        bare_create(&b[i], &config);
    }
    for (unsigned i = 0; i < 2; i++)
        bare_run(&b[i]);
    for (unsigned i = 0; i < 2; i++) {
        bare_wait_done(&b[i]);
        ck_assert_uint_eq(bare_value(&b[i], UCALL_V_CPUS, 0), 2 + i);
    }
    // The first goes while the second still stands.
    bare_end(&b[0]);
    ck_assert(vm_stopped(b[1].vm));
    bare_end(&b[1]);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_test(tc, hello_by_linux64);
    tcase_add_test(tc, hello_by_pvh);
    tcase_add_test(tc, hello_with_least_memory);
    tcase_add_test(tc, hello_with_memory_above_the_hole);
    tcase_add_test(tc, multiboot);
    tcase_add_test(tc, real_mode);
    tcase_add_loop_test(tc, smp, 0, 4);
    tcase_add_test(tc, timer);
    tcase_add_test(tc, two_machines_at_once);
}

int main(void)
{
    return bare_main("bare_boot", add_tests);
}
