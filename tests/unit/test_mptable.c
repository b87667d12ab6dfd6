// SPDX-License-Identifier: Apache-2.0
// The MP table, read back the way a kernel does: search, checksums, walk.
#include <check.h>
#include <errno.h>
#include <string.h>

#include "devices/mptable.h"
#include "vmm/layout.h"

static void ram_make(struct ram *ram)
{
    struct error err = {0};
    struct ram_config config = {.size = RAM_MIN, .backing = RAM_ANONYMOUS};
    ck_assert_msg(ram_create(ram, &config, &err) == 0, "%s", err.text);
}

static unsigned sum(const uint8_t *p, size_t len)
{
    uint8_t total = 0;
    while (len--)
        total = (uint8_t)(total + *p++);
    return total;
}

static uint32_t get(const uint8_t *p, unsigned bytes)
{
    uint32_t value = 0;
    memcpy(&value, p, bytes);
    return value;
}

START_TEST(walk)
{
    unsigned cpus = (unsigned)_i;
    struct ram ram;
    struct error err = {0};
    ram_make(&ram);
    // Old contents must not shine through.
    memset(ram_at(&ram, LAYOUT_MPTABLE, 0x10000), 0xa5, 0x10000);
    ck_assert_int_eq(mptable_build(&ram, cpus, &err), 0);

    // Kernels look for the signature at 16-byte steps in 0xf0000-0xfffff.
    const uint8_t *f = NULL;
    for (uint64_t gpa = 0xf0000; gpa < 0x100000 && !f; gpa += 16) {
        const uint8_t *p = ram_at(&ram, gpa, 16);
        if (!memcmp(p, "_MP_", 4) && sum(p, 16) == 0)
            f = p;
    }
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(f[9], 4);
    ck_assert_uint_eq(get(f + 11, 4), 0);
    uint64_t gpa = get(f + 4, 4);
    const uint8_t *h = ram_at(&ram, gpa, 44);
    ck_assert_int_eq(memcmp(h, "PCMP", 4), 0);
    size_t length = get(h + 4, 2);
    ck_assert_uint_le(gpa + length, LAYOUT_MPTABLE_END);
    ck_assert_uint_eq(sum(h, length), 0);
    ck_assert_uint_eq(get(h + 36, 4), 0xfee00000);

    unsigned counts[5] = {0}, boot = 0, pins = 0, lints = 0, ioapic_id = 256;
    const uint8_t *p = h + 44;
    for (unsigned i = 0; i < get(h + 34, 2); i++) {
        ck_assert_uint_le(p[0], 4);
        counts[p[0]]++;
        switch (p[0]) {
        case 0:
            ck_assert_uint_eq(p[1], counts[0] - 1);
            ck_assert(p[3] & 1);
            boot += p[3] >> 1 & 1;
            ck_assert(!(p[3] & 2) || p[1] == 0);
            break;
        case 1:
            ck_assert_int_eq(memcmp(p + 2, "ISA   ", 6), 0);
            break;
        case 2:
            ioapic_id = p[1];
            ck_assert_uint_eq(p[3], 1);
            ck_assert_uint_eq(get(p + 4, 4), 0xfec00000);
            break;
        case 3:
            // KVM's default routing is the identity; ISA lines conform, the others say edge, high.
            ck_assert_uint_eq(p[1], 0);
            ck_assert_uint_eq(get(p + 2, 2), p[5] < 16 ? 0 : 5);
            ck_assert_uint_eq(p[5], p[7]);
            ck_assert_uint_eq(p[6], ioapic_id);
            pins |= 1u << p[7];
            break;
        case 4:
            ck_assert_uint_eq(p[1], p[7] == 0 ? 3 : 1);
            ck_assert_uint_eq(p[6], 0xff);
            lints |= 1u << p[7];
            break;
        }
        p += p[0] == 0 ? 20 : 8;
    }
    ck_assert_ptr_eq(p, h + length);
    ck_assert_uint_eq(counts[0], cpus);
    ck_assert_uint_eq(boot, 1);
    ck_assert_uint_eq(counts[1], 1);
    ck_assert_uint_eq(counts[2], 1);
    ck_assert_uint_ge(ioapic_id, cpus);
    ck_assert_uint_lt(ioapic_id, 255);
    ck_assert_uint_eq(pins, 0xffffff & ~4u);
    ck_assert_uint_eq(lints, 3);
    ram_destroy(&ram);
}
END_TEST

START_TEST(limits)
{
    struct ram ram;
    struct error err = {0};
    ram_make(&ram);
    ck_assert_int_eq(mptable_build(&ram, 0, &err), -EINVAL);
    ck_assert_int_eq(mptable_build(&ram, MPTABLE_CPUS_MAX, &err), 0);
    ck_assert_int_eq(mptable_build(&ram, MPTABLE_CPUS_MAX + 1, &err), -EINVAL);
    ck_assert_ptr_nonnull(strstr(err.text, "255 CPUs"));
    struct ram none = {.memfd = -1, .vm_fd = -1};
    ck_assert_int_eq(mptable_build(&none, 1, &err), -EFAULT);
    ram_destroy(&ram);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("mptable");
    tcase_add_loop_test(tc, walk, 1, 65);
    tcase_add_test(tc, limits);
    Suite *suite = suite_create("mptable");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
