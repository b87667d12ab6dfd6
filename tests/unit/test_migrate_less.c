// SPDX-License-Identifier: Apache-2.0
// What a moving guest does not use: hints and a balloon, played by this test, and a destination
// whose thread of devices needs pages that are just being pushed.
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "migrate/channel.h"
#include "migrate/receive.h"
#include "tests/bare/oracle.h"

enum { MEMORY_MIB = 64, PAGES = 512 };
// Free: the guest uses none of it. Kept: in the middle of that, used again after it was named.
#define FREE_AT  (40 * MiB)
#define FREE_LEN (16 * MiB)
#define KEPT_AT  (FREE_AT + 5 * MiB)

static void there_start(struct arrival *t, struct guest *g)
{
    struct receive_params params = arrival_params();
    *t = (struct arrival) {.host = {.guest = g}};
    t->hooks = hooks_of(&t->host);
    arrival_start(t, NULL, &params);
}

static void boot(struct guest *g)
{
    *g = (struct guest) {0};
    guest_boot(g, 1, MEMORY_MIB * MiB, PAGES, 8 * MiB, 0);
    memset(ram_at(&g->bare->vm->ram, FREE_AT, FREE_LEN), 0xee, FREE_LEN);
}

static struct migrate_params params_to(struct arrival *t, enum migrate_mode mode)
{
    struct migrate_params p;
    migrate_params_default(&p);
    p.to = t->address;
    p.mode = mode;
    p.hooks = &t->hooks;
    return p;
}

// Moves the guest; its oracle is looked at there.
static void move(struct guest *g, struct arrival *t, const struct migrate_params *p,
                 struct migrate_report *report)
{
    struct migration m;
    OK(migration_init(&m, &err));
    OK(migrate_out(g->bare->vm, p, &m, report, &err));
    migration_free(&m);
    arrival_join(t);
    ck_assert_msg(!t->ret, "%s", t->err.text);
    g->bare->vm->ram.hinter = NULL;
    g->bare->vm->ram.balloon = NULL;
    guest_end(g);
    g->bare = t->host.bare;
    guest_check(g);
}

static bool all(struct guest *g, uint64_t gpa, uint64_t len, uint8_t value)
{
    const uint8_t *p = ram_at(&g->bare->vm->ram, gpa, len);
    for (uint64_t i = 0; i < len; i++)
        if (p[i] != value)
            return false;
    return true;
}

// --- hints

struct fake_hinter {
    struct ram_hinter hinter;
    struct vm *vm;
    bool endless;     // never says that it has named everything
    uint64_t named;   // progress
    unsigned started; // calls
    unsigned ended;
};

// Names what is free, and uses a page of it again.
static bool fake_start(struct ram_hinter *h, _Atomic uint64_t *bitmap)
{
    struct fake_hinter *f = container_of(h, struct fake_hinter, hinter);
    uint8_t page[PAGE_SIZE];
    f->started++;
    for (uint64_t p = FREE_AT / PAGE_SIZE; p < (FREE_AT + FREE_LEN) / PAGE_SIZE; p++)
        atomic_fetch_or(&bitmap[p / 64], 1ull << p % 64);
    memset(page, 0x77, sizeof(page));
    ck_assert_int_eq(ram_write(&f->vm->ram, KEPT_AT, page, sizeof(page)), 0);
    return true;
}

static uint64_t fake_progress(struct ram_hinter *h)
{
    return container_of(h, struct fake_hinter, hinter)->endless;
}

static void fake_end(struct ram_hinter *h)
{
    struct fake_hinter *f = container_of(h, struct fake_hinter, hinter);
    ck_assert(!vm_paused(f->vm)); // the guest shall have its memory back at once
    f->ended++;
}

// Hints count in the first round, also after they have ended; what is used again arrives.
START_TEST(hints_spare_pages)
{
    static const struct {
        enum migrate_mode mode;
        bool endless;
        unsigned connections;
    } rows[] = {{MIGRATE_PRECOPY, false, 1},
                {MIGRATE_PRECOPY, true, 1},
                {MIGRATE_PRECOPY, false, 3},
                {MIGRATE_HYBRID, false, 1}};
    struct guest g;
    struct arrival t;
    struct migrate_report report;
    boot(&g);
    struct fake_hinter f = {{fake_start, fake_progress, fake_end}, g.bare->vm, rows[_i].endless};
    g.bare->vm->ram.hinter = &f.hinter;
    there_start(&t, &g);
    struct migrate_params p = params_to(&t, rows[_i].mode);
    p.connections = rows[_i].connections;
    move(&g, &t, &p, &report);
    ck_assert_uint_eq(f.started, 1);
    ck_assert_uint_eq(f.ended, 1);
    ck_assert_uint_eq(report.free_pages, FREE_LEN / PAGE_SIZE);
    ck_assert(all(&g, FREE_AT, KEPT_AT - FREE_AT, 0));
    ck_assert(all(&g, KEPT_AT, PAGE_SIZE, 0x77));
    ck_assert(all(&g, KEPT_AT + PAGE_SIZE, FREE_AT + FREE_LEN - KEPT_AT - PAGE_SIZE, 0));
    guest_end(&g);
}
END_TEST

// --- the balloon

struct fake_balloon {
    struct ram_balloon balloon;
    struct vm *vm;
    bool deaf, silent; // no driver; one that says nothing
    uint64_t serial, taken, held, most;
    unsigned asked, given_back; // calls; of take(0)
    bool paused;                // the guest was, at the last of these
};

// Grows by 1 MiB each time somebody looks.
static bool fake_look(struct ram_balloon *balloon, struct ram_guest_says *says)
{
    struct fake_balloon *f = container_of(balloon, struct fake_balloon, balloon);
    uint64_t given;
    if (f->held < f->taken) {
        OK(ram_discard(&f->vm->ram, FREE_AT + f->held, MiB, &given, &err));
        f->held += MiB;
    }
    *says = (struct ram_guest_says) {.serial = f->serial,
                                     .free = UINT64_MAX,
                                     .available = 16 * MiB + FREE_LEN - f->held,
                                     .swapped_out = UINT64_MAX,
                                     .major_faults = UINT64_MAX,
                                     .held = f->held};
    return !f->deaf;
}

static void fake_ask(struct ram_balloon *balloon)
{
    struct fake_balloon *f = container_of(balloon, struct fake_balloon, balloon);
    f->asked++;
    f->serial += !f->silent;
}

static void fake_take(struct ram_balloon *balloon, uint64_t bytes)
{
    struct fake_balloon *f = container_of(balloon, struct fake_balloon, balloon);
    f->taken = bytes;
    f->most = bytes > f->most ? bytes : f->most;
    f->given_back += !bytes;
    f->paused = vm_paused(f->vm);
}

static struct fake_balloon *balloon_new(struct guest *g)
{
    struct fake_balloon *f = calloc(1, sizeof(*f));
    *f = (struct fake_balloon) {.balloon = {fake_look, fake_ask, fake_take}, .vm = g->bare->vm};
    g->bare->vm->ram.balloon = &f->balloon;
    return f;
}

// Taken before the first page goes, and given back between pause and save.
START_TEST(a_balloon_spares_pages)
{
    static const struct {
        enum migrate_mode mode;
        uint64_t most, taken;                      // MiB
    } rows[] = {{MIGRATE_PRECOPY, UINT64_MAX, 15}, // 95 % of 16 MiB
                {MIGRATE_PRECOPY, 9 * MiB, 9},
                {MIGRATE_POSTCOPY, UINT64_MAX, 15},
                {MIGRATE_HYBRID, 9 * MiB, 9}};
    struct guest g;
    struct arrival t;
    struct migrate_report report;
    boot(&g);
    struct fake_balloon *f = balloon_new(&g);
    there_start(&t, &g);
    struct migrate_params p = params_to(&t, rows[_i].mode);
    p.balloon = rows[_i].most;
    move(&g, &t, &p, &report);
    ck_assert_uint_eq(f->most, rows[_i].taken * MiB);
    ck_assert_uint_ge(report.balloon_bytes + MiB, rows[_i].taken * MiB); // "as near as matters"
    ck_assert_uint_gt(report.balloon_ns, 0);
    ck_assert(f->given_back == 1 && f->paused && !f->taken);
    ck_assert_uint_ge(f->asked, 1);
    ck_assert(all(&g, FREE_AT, f->held, 0));
    ck_assert(all(&g, FREE_AT + f->held, FREE_LEN - f->held, 0xee));
    free(f);
    guest_end(&g);
}
END_TEST

// Nobody to ask, nothing said, or nothing wanted: it moves all the same.
START_TEST(a_balloon_that_does_not_answer)
{
    struct guest g;
    struct arrival t;
    struct migrate_report report;
    boot(&g);
    struct fake_balloon *f = balloon_new(&g);
    f->deaf = _i == 0;
    f->silent = _i == 1;
    there_start(&t, &g);
    struct migrate_params p = params_to(&t, MIGRATE_PRECOPY);
    p.balloon = _i == 2 ? 0 : UINT64_MAX;
    move(&g, &t, &p, &report);
    ck_assert(!f->most && !f->given_back && !report.balloon_bytes);
    ck_assert(_i == 1 ? f->asked > 0 : !f->asked);
    ck_assert(all(&g, FREE_AT, FREE_LEN, 0xee));
    free(f);
    guest_end(&g);
}
END_TEST

static void cancel_at_rounds(const struct migrate_progress *progress, void *arg)
{
    if (progress->balloon_bytes >= 4 * MiB)
        migration_cancel(arg);
}

// Given up while the balloon grows: the guest goes on here and has its memory back.
START_TEST(a_balloon_is_let_go)
{
    struct guest g;
    struct arrival t;
    struct migration m;
    struct migrate_report report;
    struct error why;
    boot(&g);
    struct fake_balloon *f = balloon_new(&g);
    there_start(&t, &g);
    struct migrate_params p = params_to(&t, _i ? MIGRATE_POSTCOPY : MIGRATE_PRECOPY);
    p.balloon = UINT64_MAX;
    OK(migration_init(&m, &err));
    m.on_progress = cancel_at_rounds;
    m.on_progress_arg = &m;
    ck_assert_int_eq(migrate_out(g.bare->vm, &p, &m, &report, &why), -ECANCELED);
    ck_assert_int_eq(report.owner, SOURCE_RUNNING);
    migration_free(&m);
    arrival_join(&t);
    ck_assert(f->held >= 4 * MiB && f->given_back == 1 && !f->taken);
    guest_check(&g);
    g.bare->vm->ram.balloon = NULL;
    free(f);
    guest_end(&g);
}
END_TEST

// --- post-copy, and the hook that waits for pages

// As the loop's thread does that the hook waits for: whatever page it touches first may be one that
// is pushed and lies in the receiver's socket.
static void arrived_reads(void *context, struct vm *vm)
{
    static const struct timespec moment = {.tv_nsec = 200000000};
    unsigned sum = 0;
    nanosleep(&moment, NULL); // until the source has pushed what it may; sooner tests less
    for (uint64_t p = 0; p < vm->ram.pages; p++)
        sum += *(const volatile uint8_t *)ram_page(&vm->ram, p);
    ck_assert_uint_gt(sum, 0);
    arrived(context, vm);
}

START_TEST(arrival_may_wait_for_pages)
{
    struct guest g;
    struct arrival t;
    struct migrate_report report;
    boot(&g);
    there_start(&t, &g);
    t.hooks.arrived = arrived_reads;
    struct migrate_params p = params_to(&t, MIGRATE_POSTCOPY);
    move(&g, &t, &p, &report);
    ck_assert_uint_eq(t.host.arrived, 1);
    ck_assert_uint_eq(report.recoveries, 0);
    guest_end(&g);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_loop_test(tc, hints_spare_pages, 0, 4);
    tcase_add_loop_test(tc, a_balloon_spares_pages, 0, 4);
    tcase_add_loop_test(tc, a_balloon_that_does_not_answer, 0, 3);
    tcase_add_loop_test(tc, a_balloon_is_let_go, 0, 2);
    tcase_add_test(tc, arrival_may_wait_for_pages);
}

int main(void)
{
    return bare_main("migrate_less", add_tests);
}
