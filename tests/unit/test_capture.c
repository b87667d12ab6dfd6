// SPDX-License-Identifier: Apache-2.0
// Capture of memory that is written to meanwhile: what comes out is what was there at the freeze.
#include "migrate/capture.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "vmm/bitmap.h"

enum { WRITERS = 2 };

// Writers as a guest's: they go on until they are told to stand still.
struct world {
    struct ram ram;
    pthread_t threads[WRITERS];
    pthread_rwlock_t run; // writers hold it for reading while they write
    atomic_bool end;
    _Atomic uint64_t written; // pages, in all
    uint64_t touched;         // pages that exist before the capture begins
    uint8_t *instant;         // memory as it was
    uint8_t *got;             // what the sink was given
    uint64_t *seen;
    uint64_t nr_data, nr_zero;
    uint64_t sink_fails_after; // pages; 0 = never
    unsigned sink_waits;       // writes of the writers to wait for, now and then
    unsigned sink_calls;
};

// As a guest does: what holds it up at a page is the kernel, which TSan does not see.
__attribute__((no_sanitize("thread"))) static void write_page(struct world *w, uint64_t page,
                                                              uint64_t value)
{
    uint64_t *words = ram_page(&w->ram, page);
    words[page % 512] = value;
    words[(page + 100) % 512] ^= value;
    atomic_fetch_add(&w->written, 1);
}

// Every other write is the kernel's, into memory it is given: a device's read.
static void write_as_kernel(struct world *w, uint64_t page)
{
    uint8_t bytes[64];
    int pipe_fd[2];
    ck_assert_int_eq(pipe(pipe_fd), 0);
    memset(bytes, (int)page, sizeof(bytes));
    ck_assert_int_eq(write(pipe_fd[1], bytes, sizeof(bytes)), sizeof(bytes));
    // Past TSan, for the same reason.
    ck_assert_int_eq(
        syscall(SYS_read, pipe_fd[0], (uint8_t *)ram_page(&w->ram, page) + 128, sizeof(bytes)),
        sizeof(bytes));
    close(pipe_fd[0]);
    close(pipe_fd[1]);
    atomic_fetch_add(&w->written, 1);
}

static void *writer_main(void *arg)
{
    struct world *w = arg;
    uint64_t seed = (uintptr_t)&seed;
    while (!atomic_load(&w->end)) {
        pthread_rwlock_rdlock(&w->run);
        for (unsigned i = 0; i < 16; i++) {
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            uint64_t page = (seed >> 33) % w->ram.pages;
            if (i % 8 == 7)
                write_as_kernel(w, page);
            else
                write_page(w, page, seed);
        }
        pthread_rwlock_unlock(&w->run);
    }
    return NULL;
}

static void writers_start(struct world *w)
{
    for (unsigned i = 0; i < WRITERS; i++)
        ck_assert_int_eq(pthread_create(&w->threads[i], NULL, writer_main, w), 0);
}

static void writers_join(struct world *w)
{
    atomic_store(&w->end, true);
    for (unsigned i = 0; i < WRITERS; i++)
        pthread_join(w->threads[i], NULL);
}

// False: no such memory here.
static bool world_create(struct world *w, uint64_t size, enum ram_backing backing, bool thp)
{
    struct error err;
    const struct ram_config config = {.size = size, .backing = backing, .thp = thp};
    *w = (struct world) {0};
    if (ram_create(&w->ram, &config, &err)) {
        ck_assert_msg(backing == RAM_HUGETLB, "%s", err.text);
        return false;
    }
    pthread_rwlockattr_t attr;
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&w->run, &attr);
    w->instant = malloc(size);
    w->got = malloc(size);
    w->seen = calloc(ram_bitmap_words(&w->ram), 8);
    ck_assert(w->instant && w->got && w->seen);
    // Every third 2 MiB is there from the start, and single pages elsewhere.
    for (uint64_t page = 0; page < w->ram.pages; page++)
        if (page / 512 % 3 == 0 || page % 37 == 0)
            write_page(w, page, page + 1);
    return true;
}

static void world_destroy(struct world *w)
{
    ram_destroy(&w->ram);
    pthread_rwlock_destroy(&w->run);
    free(w->instant);
    free(w->got);
    free(w->seen);
}

static void sink_slow(struct world *w)
{
    uint64_t until = atomic_load(&w->written) + w->sink_waits;
    if (w->sink_calls++ % 64)
        return;
    for (unsigned n = 0; w->sink_waits && atomic_load(&w->written) < until && n < 20; n++)
        usleep(100); // the writers may all be waiting for us
}

static void sink_seen(struct world *w, uint64_t first, uint64_t count)
{
    for (uint64_t p = first; p < first + count; p++) {
        ck_assert_msg(!bitmap_test(w->seen, p), "page %llu twice", (unsigned long long)p);
        bitmap_set(w->seen, p);
    }
}

static int sink_pages(void *context, uint64_t first, uint64_t count, const void *data,
                      struct error *err)
{
    struct world *w = context;
    sink_seen(w, first, count);
    memcpy(w->got + first * PAGE_SIZE, data, count * PAGE_SIZE);
    w->nr_data += count;
    sink_slow(w);
    return w->sink_fails_after && w->nr_data > w->sink_fails_after
               ? error_set(err, -ENOSPC, "the disk is full")
               : 0;
}

static int sink_zero(void *context, uint64_t first, uint64_t count, struct error *err)
{
    struct world *w = context;
    sink_seen(w, first, count);
    memset(w->got + first * PAGE_SIZE, 0, count * PAGE_SIZE);
    w->nr_zero += count;
    return 0;
}

static struct capture_sink sink_of(struct world *w)
{
    return (struct capture_sink) {sink_pages, sink_zero, w};
}

// Arms, lets the writers write, stops them for the instant. False: not possible here.
static bool begin(struct world *w, struct capture **c, const uint64_t *pages)
{
    struct error err;
    int ret = capture_create(c, &w->ram, pages, &err);
    if (ret == -EPERM || ret == -EOPNOTSUPP) {
        fprintf(stderr, "skipped: %s\n", err.text);
        return false;
    }
    ck_assert_msg(!ret, "%s", err.text);
    uint64_t until = atomic_load(&w->written) + 100;
    while (atomic_load(&w->written) < until) // some are bare at the freeze
        usleep(100);
    pthread_rwlock_wrlock(&w->run);
    ck_assert_msg(!capture_freeze(*c, pages, &err), "%s", err.text);
    memcpy(w->instant, w->ram.map, w->ram.size); // makes pages of zeros present, which is as well
    pthread_rwlock_unlock(&w->run);
    return true;
}

static void compare(const struct world *w, const uint64_t *pages)
{
    for (uint64_t p = 0; p < w->ram.pages; p++) {
        bool want = !pages || bitmap_test(pages, p);
        ck_assert_msg(bitmap_test(w->seen, p) == want, "page %llu %s", (unsigned long long)p,
                      want ? "never came" : "came unasked");
        ck_assert_msg(!want ||
                          !memcmp(w->got + p * PAGE_SIZE, w->instant + p * PAGE_SIZE, PAGE_SIZE),
                      "page %llu is not as it was", (unsigned long long)p);
    }
}

static const struct {
    enum ram_backing backing;
    bool thp;
    unsigned sink_waits;
    bool some; // a diff's pages only
} kinds[] = {
    {RAM_ANONYMOUS, false, 0, false}, {RAM_ANONYMOUS, false, 64, false},
    {RAM_ANONYMOUS, true, 16, false}, {RAM_MEMFD, false, 0, false},
    {RAM_MEMFD, false, 64, false},    {RAM_HUGETLB, false, 16, false},
    {RAM_ANONYMOUS, false, 16, true}, {RAM_MEMFD, false, 16, true},
    {RAM_HUGETLB, false, 4, true},
};

START_TEST(the_instant_is_kept)
{
    struct world w;
    struct capture *c;
    struct error err;
    if (!world_create(&w, 24 * MiB, kinds[_i].backing, kinds[_i].thp))
        return;
    w.sink_waits = kinds[_i].sink_waits;
    autofree uint64_t *some = calloc(ram_bitmap_words(&w.ram), 8);
    ck_assert_uint_eq(sizeof(*some), (size_t)getrandom(some, sizeof(*some), 0));
    for (size_t i = 0; i < ram_bitmap_words(&w.ram); i++)
        some[i] = i % 5 == 0 ? ~0ull : i % 3 ? some[0] >> i % 64 : 0;
    const uint64_t *pages = kinds[_i].some ? some : NULL;
    writers_start(&w);
    for (unsigned n = 0; n < (getenv("FERRY_LONG") ? 8 : 1); n++) {
        if (!begin(&w, &c, pages))
            break;
        const struct capture_sink sink = sink_of(&w);
        ck_assert_msg(!capture_drain(c, &sink, NULL, &err), "%s", err.text);
        ck_assert_uint_eq(capture_left(c), 0);
        struct capture_counts counts;
        capture_counts(c, &counts);
        capture_free(c);
        compare(&w, pages);
        if (w.sink_waits)
            ck_assert_uint_gt(counts.aside, 0);
        memset(w.seen, 0, ram_bitmap_words(&w.ram) * 8);
        // The writers go on, without faults.
        uint64_t until = atomic_load(&w.written) + 1000;
        while (atomic_load(&w.written) < until)
            usleep(100);
    }
    writers_join(&w);
    world_destroy(&w);
}
END_TEST

// More pages are written than fit aside: the writers wait for the sink, nothing is lost.
START_TEST(writers_wait_for_room)
{
    struct world w;
    struct capture *c;
    struct error err;
    ck_assert(world_create(&w, 32 * MiB, RAM_ANONYMOUS, false));
    for (uint64_t page = 0; page < w.ram.pages; page++)
        write_page(&w, page, page);
    writers_start(&w);
    if (begin(&w, &c, NULL)) {
        struct capture_counts counts = {0};
        for (unsigned n = 0; n < 6000 && !counts.waits; n++) { // nobody drains
            usleep(10000);
            capture_counts(c, &counts);
        }
        ck_assert_uint_eq(counts.aside, 16 * MiB / PAGE_SIZE);
        const struct capture_sink sink = sink_of(&w);
        ck_assert_msg(!capture_drain(c, &sink, NULL, &err), "%s", err.text);
        capture_free(c);
        compare(&w, NULL);
    }
    writers_join(&w);
    world_destroy(&w);
}
END_TEST

// Whatever ends it, and wherever: nobody is left waiting.
START_TEST(an_end_at_any_point)
{
    struct world w;
    struct error err;
    ck_assert(world_create(&w, 16 * MiB, RAM_ANONYMOUS, false));
    writers_start(&w);
    for (unsigned n = 0; n < 12; n++) {
        struct capture *c;
        if (n % 4 == 0) {
            if (capture_create(&c, &w.ram, NULL, &err))
                break;
        } else if (!begin(&w, &c, NULL)) {
            break;
        }
        const struct capture_sink sink = sink_of(&w);
        _Atomic bool cancelled = n % 4 == 2;
        w.sink_fails_after = n % 4 == 3 ? 100 * n : 0;
        w.nr_data = 0;
        if (n % 4 == 2)
            ck_assert_int_eq(capture_drain(c, &sink, &cancelled, &err), -ECANCELED);
        else if (n % 4 == 3)
            ck_assert_int_eq(capture_drain(c, &sink, &cancelled, &err), -ENOSPC);
        capture_free(c);
        memset(w.seen, 0, ram_bitmap_words(&w.ram) * 8);
        uint64_t until = atomic_load(&w.written) + 1000;
        while (atomic_load(&w.written) < until)
            usleep(100);
    }
    writers_join(&w);
    world_destroy(&w);
}
END_TEST

// A second one at once is refused, and spoils nothing of the first.
START_TEST(one_at_a_time)
{
    struct world w;
    struct capture *c, *other;
    struct error err;
    ck_assert(world_create(&w, 16 * MiB, RAM_ANONYMOUS, false));
    writers_start(&w);
    if (begin(&w, &c, NULL)) {
        ck_assert_int_eq(capture_create(&other, &w.ram, NULL, &err), -EBUSY);
        const struct capture_sink sink = sink_of(&w);
        ck_assert_msg(!capture_drain(c, &sink, NULL, &err), "%s", err.text);
        compare(&w, NULL);
        capture_free(c);
    }
    writers_join(&w);
    world_destroy(&w);
}
END_TEST

// FERRY_LONG: what arming and freezing cost, for docs/snapshots.md.
START_TEST(costs)
{
    if (!getenv("FERRY_LONG"))
        return;
    static const struct {
        const char *name;
        uint64_t size;
        enum ram_backing backing;
        bool thp, touch;
    } cases[] = {{"256 MiB touched", 256 * MiB, RAM_ANONYMOUS, false, true},
                 {"1 GiB touched", 1 * GiB, RAM_ANONYMOUS, false, true},
                 {"1 GiB touched, THP", 1 * GiB, RAM_ANONYMOUS, true, true},
                 {"1 GiB touched, memfd", 1 * GiB, RAM_MEMFD, false, true},
                 {"4 GiB untouched", 4 * GiB, RAM_ANONYMOUS, false, false}};
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        const struct ram_config config = {
            .size = cases[i].size, .backing = cases[i].backing, .thp = cases[i].thp};
        struct ram ram;
        struct capture *c;
        struct error err;
        ck_assert_int_eq(ram_create(&ram, &config, &err), 0);
        if (cases[i].touch)
            memset(ram.map, 1, ram.size);
        if (capture_create(&c, &ram, NULL, &err)) {
            fprintf(stderr, "%s\n", err.text);
            ram_destroy(&ram);
            return;
        }
        for (uint64_t p = 0; p < 1000; p++) // hot ones
            *(uint8_t *)ram_page(&ram, p * 7 % ram.pages) = 2;
        ck_assert_msg(!capture_freeze(c, NULL, &err), "%s", err.text);
        uint64_t start = time_ns();
        for (uint64_t p = 0; p < 1000; p++)
            *(uint8_t *)ram_page(&ram, p * 7 % ram.pages) = 3;
        uint64_t took = time_ns() - start;
        struct capture_counts counts;
        capture_counts(c, &counts);
        fprintf(stderr,
                "%-22s arm %6.2f ms (%llu pages), freeze %6.3f ms (%llu bare), a fault %5.1f us\n",
                cases[i].name, (double)counts.arm_ns / 1e6, (unsigned long long)counts.armed,
                (double)counts.freeze_ns / 1e6, (unsigned long long)counts.bare,
                (double)took / 1e6);
        start = time_ns();
        capture_free(c);
        fprintf(stderr, "%-22s free %6.2f ms\n", "", (double)(time_ns() - start) / 1e6);
        ram_destroy(&ram);
    }
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("capture");
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, the_instant_is_kept, 0, ARRAY_SIZE(kinds));
    tcase_add_test(tc, writers_wait_for_room);
    tcase_add_test(tc, an_end_at_any_point);
    tcase_add_test(tc, one_at_a_time);
    tcase_add_test(tc, costs);
    Suite *suite = suite_create("capture");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
