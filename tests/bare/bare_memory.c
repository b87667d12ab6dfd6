// SPDX-License-Identifier: Apache-2.0
// Guest memory while the guest works on it: the memory oracle holds whenever it is paused, and what
// changed between two syncs of the dirty log is in the log.
#include "tests/bare/bare.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/layout.h"
#include "vmm/util.h"

// --- the oracle: see guest/bare/guests/incr.c

// Along one CPU's pages the first bytes are equal or drop by one exactly once (mod 256).
static void oracle_check_cpu(struct bare *b, unsigned cpu)
{
    unsigned ranges = (unsigned)bare_value(b, UCALL_V_RANGES, 0), drops = 0, pages = 0;
    int last = -1;
    for (unsigned r = 0; r < ranges; r++) {
        if (bare_value(b, UCALL_V_RANGE_CPU, r) != cpu)
            continue;
        uint64_t base = bare_value(b, UCALL_V_RANGE_BASE, r);
        for (uint64_t n = 0; n < bare_value(b, UCALL_V_RANGE_PAGES, r); n++, pages++) {
            const uint8_t *p = ram_at(&b->vm->ram, base + n * PAGE_SIZE, PAGE_SIZE);
            ck_assert_ptr_nonnull(p);
            if (last >= 0 && *p != last) {
                ck_assert_msg(*p == (uint8_t)(last - 1), "cpu %u, page at %#llx: %u after %d", cpu,
                              (unsigned long long)(base + n * PAGE_SIZE), *p, last);
                drops++;
            }
            last = *p;
        }
    }
    ck_assert_uint_gt(pages, 0);
    ck_assert_uint_le(drops, 1);
}

static void oracle_check(struct bare *b)
{
    for (unsigned cpu = 0; cpu < bare_value(b, UCALL_V_CPUS, 0); cpu++)
        oracle_check_cpu(b, cpu);
}

// --- a copy of memory that follows the dirty log

struct shadow {
    struct ram *ram;
    struct ram_dirty *user;
    uint64_t first, pages; // the page indexes it covers
    uint8_t *copy;
    uint64_t *bitmap;
};

// Reads what the guest and its devices are writing, which TSan calls a race and the dirty log makes
// good: hence not instrumented, and word by word, since TSan watches memcpy too.
__attribute__((no_sanitize("thread"))) static void live_copy(void *to, const void *from, size_t len)
{
    const volatile uint64_t *source = from;
    uint64_t *target = to;
    for (size_t i = 0; i < len / sizeof(*target); i++)
        target[i] = source[i];
}

static void shadow_create(struct shadow *s, struct ram *ram, struct ram_dirty *user, uint64_t first,
                          uint64_t pages)
{
    *s = (struct shadow) {ram,
                          user,
                          first,
                          pages,
                          malloc(pages * PAGE_SIZE),
                          calloc(ram_bitmap_words(ram), sizeof(uint64_t))};
    ck_assert(s->copy && s->bitmap);
    live_copy(s->copy, ram_page(ram, first), pages * PAGE_SIZE);
}

static void shadow_free(struct shadow *s)
{
    free(s->copy);
    free(s->bitmap);
}

static bool bit(const uint64_t *bitmap, uint64_t n)
{
    return bitmap[n / 64] >> (n % 64) & 1;
}

// With the VM paused: every changed page is in the log. Returns how many had changed.
static uint64_t shadow_sync(struct shadow *s)
{
    struct error err;
    uint64_t fresh, counted = 0, changed = 0;
    memset(s->bitmap, 0, ram_bitmap_words(s->ram) * sizeof(uint64_t));
    ck_assert_msg(!ram_dirty_sync(s->ram, s->user, s->bitmap, &fresh, &err), "%s", err.text);
    for (uint64_t n = 0; n < s->ram->pages; n++)
        counted += bit(s->bitmap, n);
    ck_assert_uint_eq(counted, fresh);
    for (uint64_t n = 0; n < s->pages; n++) {
        uint8_t *copy = s->copy + n * PAGE_SIZE;
        const void *now = ram_page(s->ram, s->first + n);
        if (!memcmp(copy, now, PAGE_SIZE))
            continue;
        ck_assert_msg(bit(s->bitmap, s->first + n), "page at %#llx changed and is not in the log",
                      (unsigned long long)ram_page_gpa(s->ram, s->first + n));
        memcpy(copy, now, PAGE_SIZE);
        changed++;
    }
    return changed;
}

struct place {
    unsigned cpus;
    uint64_t memory, base, pages;
    enum ram_backing backing;
    enum ram_log log;
};

// Below and above the hole, across it, and in shared memory; with rings that are never full, and
// with more pages than they have entries.
static const struct place places[] = {
    {1, 32 * MiB, 0, 1024, RAM_ANONYMOUS, RAM_LOG_BITMAP},
    {2, 32 * MiB, 0, 1024, RAM_MEMFD, RAM_LOG_BITMAP},
    {1, LAYOUT_RAM_LOW_MAX + 64 * MiB, LAYOUT_RAM_HIGH, 1024, RAM_ANONYMOUS, RAM_LOG_BITMAP},
    {2, LAYOUT_RAM_LOW_MAX + 64 * MiB, LAYOUT_RAM_LOW_MAX - 2 * MiB, 1024, RAM_MEMFD,
     RAM_LOG_BITMAP},
    {1, 32 * MiB, 0, 256, RAM_ANONYMOUS, RAM_LOG_RING},
    {2, 32 * MiB, 0, 4096, RAM_MEMFD, RAM_LOG_RING},
    {2, LAYOUT_RAM_LOW_MAX + 64 * MiB, LAYOUT_RAM_LOW_MAX - 8 * MiB, 4096, RAM_ANONYMOUS,
     RAM_LOG_RING},
};

static void incr_create(struct bare *b, const struct place *place)
{
    const struct bare_config config = {
        .guest = "incr",
        .cpus = place->cpus,
        .memory = place->memory,
        .backing = place->backing,
        .log = place->log,
        .params = {{UCALL_P_PAGES, place->pages}, {UCALL_P_BASE, place->base}},
        .nr_params = 2};
    bare_create(b, &config);
    bare_run(b);
    bare_wait_syncs(b, 1);
}

// The page indexes that hold all ranges; all RAM where that is small.
static void ranges_span(struct bare *b, uint64_t *first, uint64_t *pages)
{
    uint64_t end = 0;
    *first = 0;
    *pages = b->vm->ram.pages;
    if (b->vm->ram.size <= 64 * MiB)
        return;
    *first = UINT64_MAX;
    for (unsigned r = 0; r < bare_value(b, UCALL_V_RANGES, 0); r++) {
        uint64_t page, count = bare_value(b, UCALL_V_RANGE_PAGES, r);
        ck_assert(ram_gpa_page(&b->vm->ram, bare_value(b, UCALL_V_RANGE_BASE, r), &page));
        *first = page < *first ? page : *first;
        end = page + count > end ? page + count : end;
    }
    *pages = end - *first;
}

START_TEST(dirty_log_covers_every_change)
{
    const struct place *place = &places[_i];
    struct bare b;
    struct ram_dirty user = {0};
    struct error err;
    if (!bare_has_log(place->log))
        return;
    incr_create(&b, place);
    bare_pause(&b);
    uint64_t first, pages;
    ranges_span(&b, &first, &pages);
    ck_assert_msg(!ram_dirty_start(&b.vm->ram, &user, &err), "%s", err.text);
    ck_assert_int_eq(ram_dirty_start(&b.vm->ram, &user, &err), -EBUSY);
    struct shadow s;
    shadow_create(&s, &b.vm->ram, &user, first, pages);
    ck_assert_uint_eq(shadow_sync(&s), 0); // nothing ran since the start
    uint64_t changed = 0;
    for (unsigned n = 0; n < 30; n++) {
        uint64_t beat[2];
        for (unsigned cpu = 0; cpu < place->cpus; cpu++)
            beat[cpu] = bare_u64(&b, bare_value(&b, UCALL_V_HEARTBEAT, cpu));
        bare_resume(&b);
        for (unsigned cpu = 0; cpu < place->cpus; cpu++)
            bare_wait_change(&b, bare_value(&b, UCALL_V_HEARTBEAT, cpu), beat[cpu]);
        bare_pause(&b);
        oracle_check(&b);
        // Our own writes are merged: into a page the guest does not touch.
        uint64_t own = first + pages - 1;
        uint8_t byte = (uint8_t)(n + 1);
        ck_assert(!ram_write(&b.vm->ram, ram_page_gpa(&b.vm->ram, own) + 8, &byte, 1));
        changed += shadow_sync(&s);
        ck_assert(bit(s.bitmap, own));
    }
    ck_assert_uint_ge(changed, 30 * place->pages / 2); // most of a walk each time
    ck_assert_msg(!ram_dirty_stop(&b.vm->ram, &user, &err), "%s", err.text);
    ck_assert_int_eq(ram_dirty_sync(&b.vm->ram, &user, s.bitmap, NULL, &err), -EINVAL);
    shadow_free(&s);
    bare_end(&b);
}
END_TEST

// The log is read while the guest runs, as pre-copy does: rounds of copying what the log names end,
// once the guest is paused, in an exact copy.
START_TEST(copy_by_rounds_is_exact)
{
    const struct place *place = &places[_i];
    struct bare b;
    struct ram_dirty user = {0};
    struct error err;
    if (!bare_has_log(place->log))
        return;
    incr_create(&b, place);
    struct ram *ram = &b.vm->ram;
    uint64_t first, pages;
    ranges_span(&b, &first, &pages);
    ck_assert_msg(!ram_dirty_start(ram, &user, &err), "%s", err.text);
    struct shadow s;
    shadow_create(&s, ram, &user, first, pages); // torn: the guest runs
    for (unsigned n = 0; n < 100; n++) {
        if (n == 99)
            bare_pause(&b);
        memset(s.bitmap, 0, ram_bitmap_words(ram) * sizeof(uint64_t));
        ck_assert_msg(!ram_dirty_sync(ram, &user, s.bitmap, NULL, &err), "%s", err.text);
        for (uint64_t p = 0; p < pages; p++)
            if (bit(s.bitmap, first + p))
                live_copy(s.copy + p * PAGE_SIZE, ram_page(ram, first + p), PAGE_SIZE);
    }
    ck_assert_int_eq(memcmp(s.copy, ram_page(ram, first), pages * PAGE_SIZE), 0);
    oracle_check(&b);
    ck_assert(!ram_dirty_stop(ram, &user, &err));
    shadow_free(&s);
    bare_end(&b);
}
END_TEST

// Off and on again: nothing of the first time is left, nothing of the second is missed.
START_TEST(log_can_be_started_again)
{
    struct bare b;
    struct ram_dirty user = {0};
    struct error err;
    if (!bare_has_log(places[_i].log))
        return;
    incr_create(&b, &places[_i]);
    for (unsigned n = 0; n < 5; n++) {
        uint64_t beat = bare_u64(&b, bare_value(&b, UCALL_V_HEARTBEAT, 0));
        bare_wait_change(&b, bare_value(&b, UCALL_V_HEARTBEAT, 0), beat);
        bare_pause(&b);
        ck_assert_msg(!ram_dirty_start(&b.vm->ram, &user, &err), "%s", err.text);
        struct shadow s;
        shadow_create(&s, &b.vm->ram, &user, 0, b.vm->ram.pages);
        ck_assert_uint_eq(shadow_sync(&s), 0);
        beat = bare_u64(&b, bare_value(&b, UCALL_V_HEARTBEAT, 0));
        bare_resume(&b);
        bare_wait_change(&b, bare_value(&b, UCALL_V_HEARTBEAT, 0), beat);
        bare_pause(&b);
        ck_assert_uint_gt(shadow_sync(&s), 0);
        ck_assert(!ram_dirty_stop(&b.vm->ram, &user, &err));
        shadow_free(&s);
        bare_resume(&b);
    }
    bare_end(&b);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_loop_test(tc, dirty_log_covers_every_change, 0, ARRAY_SIZE(places));
    tcase_add_loop_test(tc, copy_by_rounds_is_exact, 0, ARRAY_SIZE(places));
    tcase_add_loop_test(tc, log_can_be_started_again, 1, 2);
    tcase_add_loop_test(tc, log_can_be_started_again, 5, 6);
}

int main(void)
{
    return bare_main("bare_memory", add_tests);
}
