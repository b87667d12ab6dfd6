// SPDX-License-Identifier: Apache-2.0
// Pages that a vCPU will touch first, by its page tables.
#include <check.h>
#include <stdlib.h>

#include "migrate/firsttouch.h"
#include "vmm/util.h"

enum { PRESENT = 1, LARGE = 0x80, TABLE = 0x10000 };

static struct ram ram;
static struct first_touch found;

static void put(uint64_t gpa, uint64_t value)
{
    ck_assert_int_eq(ram_write(&ram, gpa, &value, sizeof(value)), 0);
}

static bool has(uint64_t gpa)
{
    for (unsigned i = 0; i < found.nr; i++)
        if (found.page[i] == gpa / PAGE_SIZE)
            return true;
    return false;
}

// Four or five tables one behind the other, each with entry 1 for the next one.
static struct first_touch_paging tables_make(unsigned levels, uint64_t leaf)
{
    for (unsigned i = 0; i + 1 < levels; i++)
        put(TABLE + i * PAGE_SIZE + 8, TABLE + (i + 1) * PAGE_SIZE + PRESENT);
    put(TABLE + (levels - 1) * PAGE_SIZE + 8, leaf);
    found.nr = 0;
    return (struct first_touch_paging) {
        .on = true, .long_mode = true, .cr3 = TABLE | 0x18, .levels = levels};
}

static uint64_t linear(unsigned levels, uint64_t offset)
{
    uint64_t address = 1ull << 12 | 1ull << 21 | 1ull << 30 | 1ull << 39 | offset;
    return levels == 5 ? address | 1ull << 48 : address;
}

START_TEST(tables_and_page)
{
    for (unsigned levels = 4; levels <= 5; levels++) {
        struct first_touch_paging paging = tables_make(levels, 0x345000 | PRESENT | 1ull << 63);
        first_touch_add(&found, &ram, &paging, linear(levels, 0x123));
        ck_assert_uint_eq(found.nr, levels + 1);
        ck_assert(has(0x345000));
        for (unsigned i = 0; i < levels; i++)
            ck_assert(has(TABLE + i * PAGE_SIZE));
        first_touch_add(&found, &ram, &paging, linear(levels, 0xfff)); // each once
        ck_assert_uint_eq(found.nr, levels + 1);
        first_touch_add(&found, &ram, &paging, linear(levels, 0x2000)); // not present
        ck_assert_uint_eq(found.nr, levels + 1);
        first_touch_add(&found, &ram, &paging, 1ull << 60 | linear(levels, 0)); // not canonical
        ck_assert_uint_eq(found.nr, levels + 1);
    }
}
END_TEST

START_TEST(large_pages)
{
    struct first_touch_paging paging = tables_make(3, 0x200000 | PRESENT | LARGE);
    paging.levels = 4; // the third table's entry maps 2 MiB
    first_touch_add(&found, &ram, &paging, linear(4, 0x6000));
    ck_assert_uint_eq(found.nr, 4);
    ck_assert(has(0x200000 + 0x7000));
    paging = tables_make(2, PRESENT | LARGE); // 1 GiB from address 0
    paging.levels = 4;
    first_touch_add(&found, &ram, &paging, linear(4, 0x8000));
    ck_assert_uint_eq(found.nr, 3);
    ck_assert(has((1 << 21) + 0x9000));
}
END_TEST

// A guest's tables and registers may say anything.
START_TEST(nonsense)
{
    struct first_touch_paging paging = tables_make(4, ~0ull);
    first_touch_add(&found, &ram, &paging, linear(4, 0)); // a page that is no RAM
    ck_assert_uint_eq(found.nr, 4);
    paging.cr3 = ~0ull;
    first_touch_add(&found, &ram, &paging, linear(4, 0));
    put(TABLE + 8, TABLE | PRESENT | LARGE); // the top table leads to itself
    paging.cr3 = TABLE;
    first_touch_add(&found, &ram, &paging, linear(4, 0));
    ck_assert_uint_le(found.nr, 5);
    struct first_touch_paging off = {0}, old = {.on = true, .cr3 = TABLE, .levels = 4};
    found.nr = 0;
    first_touch_add(&found, &ram, &off, 0x5123);
    ck_assert(found.nr == 1 && has(0x5000));
    first_touch_add(&found, &ram, &off, 1ull << 62);
    first_touch_add(&found, &ram, &old, 0x6000); // 32 bit: not walked
    ck_assert_uint_eq(found.nr, 1);
    for (unsigned i = 0; i < 2 * FIRST_TOUCH_MAX; i++)
        first_touch_add(&found, &ram, &off, (uint64_t)i * PAGE_SIZE);
    ck_assert_uint_eq(found.nr, FIRST_TOUCH_MAX);
}
END_TEST

static void setup(void)
{
    const struct ram_config config = {.size = RAM_MIN};
    ck_assert_int_eq(ram_create(&ram, &config, NULL), 0);
    found.nr = 0;
}

static void teardown(void)
{
    ram_destroy(&ram);
}

int main(void)
{
    Suite *s = suite_create("firsttouch");
    TCase *tc = tcase_create("firsttouch");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, tables_and_page);
    tcase_add_test(tc, large_pages);
    tcase_add_test(tc, nonsense);
    suite_add_tcase(s, tc);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
