// SPDX-License-Identifier: Apache-2.0
// Pages that land while somebody waits for them, by copying and by showing.
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "migrate/landing.h"
#include "migrate/userfault.h"
#include "tests/check_ok.h"
#include "vmm/bitmap.h"
#include "vmm/util.h"

enum { PAGES = RAM_MIN / PAGE_SIZE, HUGE = HUGE_PAGE / PAGE_SIZE };

// --- which units are complete

START_TEST(units)
{
    uint64_t here[PAGES / 64] = {0};
    const struct landing huge = {.unit = HUGE}, one = {.unit = 1};
    bitmap_fill(here, HUGE - 1, HUGE + 2, true); // all of one, an edge of each neighbour
    for (uint64_t page = 0; page < 4 * HUGE; page++) {
        ck_assert_uint_eq(landing_unit(&huge, page), page / HUGE * HUGE);
        ck_assert(landing_whole(&huge, here, page) == (page / HUGE == 1));
        ck_assert_uint_eq(landing_unit(&one, page), page);
        ck_assert(landing_whole(&one, here, page) == bitmap_test(here, page));
    }
    for (uint64_t page = HUGE; page < 2 * HUGE; page++) {
        bitmap_clear(here, page);
        ck_assert(!landing_whole(&huge, here, HUGE) && !landing_whole(&huge, here, 2 * HUGE - 1));
        bitmap_set(here, page);
    }
    bitmap_fill(here, 0, PAGES, true);
    ck_assert(landing_whole(&huge, here, 0) && landing_whole(&huge, here, PAGES - 1));
}
END_TEST

// --- memory that somebody touches

struct rig {
    struct ram ram;
    struct landing landing;
    uint64_t here[PAGES / 64];
    pthread_t toucher;
    uint64_t page; // touched
    atomic_int seen;
};

static bool rig_init(struct rig *r, enum ram_backing backing)
{
    const struct ram_config config = {.size = RAM_MIN, .backing = backing};
    *r = (struct rig) {.seen = -1};
    if (ram_create(&r->ram, &config, NULL)) {
        ck_assert(backing == RAM_HUGETLB);
        printf("skipped: no huge pages (vm.nr_hugepages)\n");
        return false;
    }
    struct error why;
    int ret = landing_possible(&r->ram, &why);
    if (ret == -EPERM || ret == -ENOSYS || ret == -EOPNOTSUPP) {
        printf("skipped: %s\n", why.text);
        ram_destroy(&r->ram);
        return false;
    }
    ck_assert_msg(!ret, "%s", why.text);
    OK(landing_open(&r->landing, &r->ram, &err));
    ck_assert(!r->landing.second == (backing != RAM_HUGETLB));
    ck_assert_uint_eq(r->landing.unit, backing == RAM_HUGETLB ? HUGE : 1);
    return true;
}

static void rig_end(struct rig *r)
{
    landing_close(&r->landing);
    ram_destroy(&r->ram);
}

static void *touch(void *arg)
{
    struct rig *r = arg;
    atomic_store(&r->seen, *(volatile uint8_t *)ram_page(&r->ram, r->page));
    return NULL;
}

// Somebody touches `page` and waits; the kernel has said so.
static void touch_begin(struct rig *r, uint64_t page)
{
    uint64_t pages[UFFD_BATCH];
    unsigned nr = 0;
    r->page = page;
    atomic_store(&r->seen, -1);
    ck_assert_int_eq(pthread_create(&r->toucher, NULL, touch, r), 0);
    while (!nr) {
        OK(uffd_faults(r->landing.uffd, &r->ram, pages, &nr, &err));
        usleep(100);
    }
    ck_assert_uint_eq(nr, 1);
    ck_assert_uint_eq(landing_unit(&r->landing, pages[0]), landing_unit(&r->landing, page));
    ck_assert_int_eq(atomic_load(&r->seen), -1);
}

static int touch_end(struct rig *r)
{
    pthread_join(r->toucher, NULL);
    return atomic_load(&r->seen);
}

static const enum ram_backing small[] = {RAM_ANONYMOUS, RAM_MEMFD};

// What was there before and is not here goes; what is here stays; each page comes once.
START_TEST(small_pages)
{
    struct rig *r = calloc(1, sizeof(*r));
    uint8_t data[4 * PAGE_SIZE];
    if (!rig_init(r, small[_i])) {
        free(r);
        return;
    }
    memset(r->ram.map, 0xee, 200 * PAGE_SIZE);
    bitmap_fill(r->here, 50, 10, true);
    OK(landing_guard(&r->landing, r->here, &err));
    r->page = 55;
    touch(r);
    ck_assert_int_eq(r->seen, 0xee);

    memset(data, 7, sizeof(data));
    touch_begin(r, 100);
    OK(landing_copy(&r->landing, 99, data, 4, &err));
    ck_assert_int_eq(touch_end(r), 7);

    // One of zeroes.
    touch_begin(r, 120);
    OK(landing_serve(&r->landing, 120, &err));
    ck_assert_int_eq(touch_end(r), 0);

    // Twice: what the guest wrote since stays.
    *(uint8_t *)ram_page(&r->ram, 101) = 9;
    OK(landing_copy(&r->landing, 99, data, 4, &err));
    OK(landing_serve(&r->landing, 101, &err));
    ck_assert_uint_eq(*(uint8_t *)ram_page(&r->ram, 101), 9);
    ck_assert_uint_eq(*(uint8_t *)ram_page(&r->ram, 102), 7);

    touch_begin(r, 150); // the end of the guard lets everybody go
    landing_unguard(&r->landing);
    ck_assert_int_eq(touch_end(r), 0);
    rig_end(r);
    free(r);
}
END_TEST

// A huge page keeps what it has and is seen when the rest has come.
START_TEST(huge_pages)
{
    struct rig *r = calloc(1, sizeof(*r));
    bool shown;
    if (!rig_init(r, RAM_HUGETLB)) {
        free(r);
        return;
    }
    memset(r->ram.map, 0xee, 2 * HUGE_PAGE);
    bitmap_fill(r->here, 0, HUGE, true);        // complete
    bitmap_fill(r->here, HUGE, 100, true);      // in part
    bitmap_fill(r->here, 4 * HUGE, HUGE, true); // complete: zeroes that never were placed
    OK(landing_guard(&r->landing, r->here, &err));
    r->page = 5;
    touch(r);
    ck_assert_int_eq(r->seen, 0xee);

    touch_begin(r, HUGE + 10);
    OK(landing_room(&r->landing, HUGE + 100, HUGE - 100, &err));
    memset(landing_page(&r->landing, HUGE + 100), 7, (HUGE - 100) * PAGE_SIZE);
    usleep(1000);
    ck_assert_int_eq(atomic_load(&r->seen), -1);
    OK(landing_show(&r->landing, 2 * HUGE - 1, &shown, &err));
    ck_assert(shown);
    ck_assert_int_eq(touch_end(r), 0xee);
    ck_assert_uint_eq(*(uint8_t *)ram_page(&r->ram, HUGE + 99), 0xee);
    ck_assert_uint_eq(*(uint8_t *)ram_page(&r->ram, HUGE + 100), 7);
    ck_assert_uint_eq(*(uint8_t *)ram_page(&r->ram, 2 * HUGE - 1), 7);

    touch_begin(r, 2 * HUGE + 511); // never touched before
    OK(landing_room(&r->landing, 2 * HUGE, 1, &err));
    memset(landing_page(&r->landing, 2 * HUGE), 3, HUGE_PAGE);
    OK(landing_show(&r->landing, 2 * HUGE, &shown, &err));
    ck_assert(shown);
    ck_assert_int_eq(touch_end(r), 3);

    // What was there is cleared, what never was stays away until somebody wants it.
    landing_clear(&r->landing, 2 * HUGE + 511, 1);
    ck_assert_uint_eq(*(uint8_t *)ram_page(&r->ram, 2 * HUGE + 511), 0);
    ck_assert_uint_eq(*(uint8_t *)ram_page(&r->ram, 2 * HUGE + 510), 3);
    landing_clear(&r->landing, 4 * HUGE, HUGE);
    OK(landing_show(&r->landing, 4 * HUGE, &shown, &err));
    ck_assert(!shown);
    touch_begin(r, 4 * HUGE + 1);
    OK(landing_serve(&r->landing, 4 * HUGE + 1, &err));
    ck_assert_int_eq(touch_end(r), 0);
    OK(landing_show(&r->landing, 2 * HUGE, &shown, &err)); // twice
    ck_assert(shown);
    rig_end(r);
    free(r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("landing");
    TCase *tc = tcase_create("landing");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, units);
    tcase_add_loop_test(tc, small_pages, 0, ARRAY_SIZE(small));
    tcase_add_test(tc, huge_pages);
    suite_add_tcase(s, tc);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
