// SPDX-License-Identifier: Apache-2.0
#include <check.h>
#include <errno.h>
#include <string.h>

#include "vmm/bus.h"
#include "vmm/util.h"

struct probe { // remembers the last access
    unsigned reads, writes, size;
    uint64_t offset, value;
};

static uint64_t probe_read(void *dev, uint64_t offset, unsigned size)
{
    struct probe *p = dev;
    p->reads++;
    p->offset = offset;
    p->size = size;
    return 0x1122334455667788;
}

static void probe_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct probe *p = dev;
    p->writes++;
    p->offset = offset;
    p->size = size;
    p->value = value;
}

static const struct bus_ops both = {probe_read, probe_write};
static const struct bus_ops write_only = {NULL, probe_write}, read_only = {probe_read, NULL};

static int add(struct bus *bus, uint64_t base, uint64_t len, void *dev)
{
    struct error err;
    const struct bus_range range = {base, len, "probe", &both, dev, NULL};
    return bus_add(bus, &range, &err);
}

START_TEST(overlaps_are_refused)
{
    struct bus bus = {.name = "test"};
    ck_assert_int_eq(add(&bus, 0x100, 0x10, NULL), 0);
    static const struct {
        uint64_t base, len;
    } clashes[] = {{0x100, 0x10}, {0x0ff, 2},   {0x10f, 1}, {0x108, 0x100},
                   {0, 0x101},    {0x0, ~0ull}, {0x104, 4}};
    for (size_t i = 0; i < ARRAY_SIZE(clashes); i++)
        ck_assert_int_eq(add(&bus, clashes[i].base, clashes[i].len, NULL), -EEXIST);
    ck_assert_int_eq(add(&bus, 0x110, 1, NULL), 0); // right behind
    ck_assert_int_eq(add(&bus, 0x0ff, 1, NULL), 0); // right before
    ck_assert_uint_eq(bus.nr, 3);
    bus_free(&bus);
    ck_assert_uint_eq(bus.nr, 0);
}
END_TEST

START_TEST(overlap_names_both)
{
    struct bus bus = {.name = "port"};
    struct error err;
    const struct bus_range a = {0x3f8, 8, "serial", &both, NULL, NULL};
    const struct bus_range b = {0x3ff, 1, "other", &both, NULL, NULL};
    ck_assert_int_eq(bus_add(&bus, &a, &err), 0);
    ck_assert_int_eq(bus_add(&bus, &b, &err), -EEXIST);
    ck_assert_ptr_nonnull(strstr(err.text, "serial"));
    ck_assert_ptr_nonnull(strstr(err.text, "other"));
    bus_free(&bus);
}
END_TEST

START_TEST(empty_and_wrapping_ranges_are_refused)
{
    struct bus bus = {.name = "test"};
    ck_assert_int_eq(add(&bus, 5, 0, NULL), -EINVAL);
    ck_assert_int_eq(add(&bus, ~0ull, 2, NULL), -EINVAL);
    ck_assert_int_eq(add(&bus, 2, ~0ull, NULL), -EINVAL);
    ck_assert_int_eq(add(&bus, ~0ull, 1, NULL), 0); // the last byte is fine
    struct probe p = {0};
    bus.ranges[0].dev = &p;
    ck_assert(bus_write(&bus, ~0ull, 1, 7));
    ck_assert(!bus_write(&bus, ~0ull, 2, 7));
    ck_assert_uint_eq(p.writes, 1);
    bus_free(&bus);
}
END_TEST

START_TEST(accesses_find_their_device)
{
    struct bus bus = {.name = "test"};
    struct probe probes[40] = {0};
    for (unsigned i = 0; i < 40; i++) { // in an order that is not sorted
        unsigned n = i * 17 % 40;
        ck_assert_int_eq(add(&bus, 0x1000 + 0x20 * n, 0x10, &probes[n]), 0);
    }
    for (unsigned n = 0; n < 40; n++) {
        uint64_t value, base = 0x1000 + 0x20 * n;
        ck_assert(bus_read(&bus, base + 8, 8, &value));
        ck_assert_uint_eq(value, 0x1122334455667788);
        ck_assert(bus_write(&bus, base + 15, 1, n));
        ck_assert_uint_eq(probes[n].offset, 15);
        ck_assert_uint_eq(probes[n].value, n);
        ck_assert(probes[n].reads == 1 && probes[n].writes == 1);
        ck_assert_ptr_null(bus_find(&bus, base + 0x10)); // the gap
        ck_assert_ptr_null(bus_find(&bus, 0xfff));
    }
    bus_free(&bus);
}
END_TEST

START_TEST(crossing_accesses_belong_to_nobody)
{
    struct bus bus = {.name = "test"};
    struct probe p[2] = {0};
    add(&bus, 0x10, 8, &p[0]);
    add(&bus, 0x18, 8, &p[1]);
    uint64_t value = 0;
    ck_assert(!bus_read(&bus, 0x17, 2, &value));
    ck_assert_uint_eq(value, ~0ull);
    ck_assert(!bus_write(&bus, 0x14, 8, 1));
    ck_assert(!bus_read(&bus, 0x0f, 2, &value));
    ck_assert(!bus_read(&bus, 0x1f, 2, &value));
    ck_assert(!p[0].reads && !p[0].writes && !p[1].reads && !p[1].writes);
    bus_free(&bus);
}
END_TEST

// KVM splits accesses at page ends: a guest can make it ask for 3 or 5 bytes. No device has such
// registers, and bus_ops promises they need not look.
START_TEST(odd_sizes_never_reach_a_device)
{
    struct bus bus = {.name = "test"};
    struct probe p = {0};
    add(&bus, 0, 0x1000, &p);
    for (unsigned size = 0; size <= 16; size++) {
        bool plain = size == 1 || size == 2 || size == 4 || size == 8;
        uint64_t value = 0;
        ck_assert(bus_read(&bus, 0x800, size, &value) == plain);
        ck_assert_uint_eq(value, plain ? 0x1122334455667788 : ~0ull);
        ck_assert(bus_write(&bus, 0x800, size, 1) == plain);
    }
    ck_assert_uint_eq(p.reads, 4);
    ck_assert_uint_eq(p.writes, 4);
    bus_free(&bus);
}
END_TEST

START_TEST(one_way_devices)
{
    struct bus bus = {.name = "test"};
    struct error err;
    struct probe p = {0};
    const struct bus_range w = {0, 8, "w", &write_only, &p, NULL},
                           r = {8, 8, "r", &read_only, &p, NULL};
    bus_add(&bus, &w, &err);
    bus_add(&bus, &r, &err);
    uint64_t value;
    ck_assert(bus_read(&bus, 0, 4, &value));
    ck_assert_uint_eq(value, ~0ull);
    ck_assert(bus_write(&bus, 8, 4, 1));
    ck_assert(!p.reads && !p.writes);
    bus_free(&bus);
}
END_TEST

static uint64_t trylock_read(void *dev, uint64_t offset, unsigned size)
{
    return pthread_mutex_trylock(dev) == EBUSY; // held around us
}

START_TEST(lock_is_held_around_calls)
{
    struct bus bus = {.name = "test"};
    struct error err;
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static const struct bus_ops ops = {trylock_read, NULL};
    const struct bus_range range = {0, 8, "locked", &ops, &lock, &lock};
    ck_assert_int_eq(bus_add(&bus, &range, &err), 0);
    uint64_t value;
    ck_assert(bus_read(&bus, 0, 1, &value));
    ck_assert_uint_eq(value, 1);
    ck_assert_int_eq(pthread_mutex_trylock(&lock), 0); // and given back
    pthread_mutex_unlock(&lock);
    bus_free(&bus);
}
END_TEST

START_TEST(empty_bus_answers_nothing)
{
    struct bus bus = {.name = "test"};
    uint64_t value = 0;
    ck_assert(!bus_read(&bus, 0, 1, &value));
    ck_assert_uint_eq(value, ~0ull);
    ck_assert(!bus_write(&bus, ~0ull, 8, 0));
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("bus");
    tcase_add_test(tc, overlaps_are_refused);
    tcase_add_test(tc, overlap_names_both);
    tcase_add_test(tc, empty_and_wrapping_ranges_are_refused);
    tcase_add_test(tc, accesses_find_their_device);
    tcase_add_test(tc, crossing_accesses_belong_to_nobody);
    tcase_add_test(tc, odd_sizes_never_reach_a_device);
    tcase_add_test(tc, one_way_devices);
    tcase_add_test(tc, lock_is_held_around_calls);
    tcase_add_test(tc, empty_bus_answers_nothing);
    Suite *suite = suite_create("bus");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
