// SPDX-License-Identifier: Apache-2.0
// Pre-paging: the orders themselves, and a simulator of a guest, a link and the pusher that drives
// migrate/prepage.c unchanged. FERRY_LONG=1 prints its tables (docs/migration.md has them).
//
// Time is counted in slots: what the link needs for one page. A request takes RTT/2 to the source,
// a page RTT/2 back. Demanded pages go before pushed ones. A fault counts as one over the network
// when its request finds the page unsent; one on a page under way only waits.
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "migrate/prepage.h"
#include "tests/check_ok.h"
#include "vmm/bitmap.h"
#include "vmm/util.h"

enum {
    RTT = 29,        // slots: about 1 ms over 1 Gbit/s, as in the papers' time
    CLAIM = 16,      // pages the pusher takes at once
    SLICE = 120,     // slots a process has the CPU: 4 ms
    PROCS_MAX = 128, // of quicksort
    MIB_PAGES = 256,
};

static uint64_t random_next(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
    return *seed >> 33;
}

// --- what processes touch

struct sort_part {
    uint64_t low, high;
};

struct process {
    uint64_t first, pages, touched; // its memory; how many touches it has made
    uint64_t at, step, seed;
    uint64_t low, high, start, end; // quicksort: the two pointers, and the part they work on
    struct sort_part stack[64];
    unsigned depth;
    uint64_t waits_for; // a page, or UINT64_MAX
};

struct pattern {
    const char *name;
    bool (*next)(struct process *p, uint64_t *page); // false: done
    uint64_t step;
    unsigned touches; // pages a process touches in a slot when none is missing
};

static bool next_sequential(struct process *p, uint64_t *page)
{
    *page = p->first + p->touched;
    return p->touched++ < p->pages;
}

static bool next_backward(struct process *p, uint64_t *page)
{
    *page = p->first + p->pages - 1 - p->touched;
    return p->touched++ < p->pages;
}

// Every step-th page, then the same one page on, and so on: the columns of a matrix.
static bool next_stride(struct process *p, uint64_t *page)
{
    uint64_t row = p->pages / p->step;
    *page = p->first + p->touched % row * p->step + p->touched / row;
    return p->touched++ < row * p->step;
}

// Records of `step` pages in random order, each read from its start to its end; half of them.
static bool next_records(struct process *p, uint64_t *page)
{
    if (p->touched % p->step == 0)
        p->at = random_next(&p->seed) % (p->pages / p->step) * p->step;
    *page = p->first + p->at + p->touched % p->step;
    return p->touched++ < p->pages / 2;
}

// Single pages in random order: nothing to be learned.
static bool next_random(struct process *p, uint64_t *page)
{
    *page = p->first + random_next(&p->seed) % p->pages;
    return p->touched++ < p->pages / 2;
}

// Partition from both ends, then the lower and the upper part.
static bool next_quicksort(struct process *p, uint64_t *page)
{
    while (p->low >= p->high) {
        uint64_t size = p->end - p->start, cut = p->start + size / 4;
        if (size > 1) { // the cut is somewhere in the middle half
            cut += random_next(&p->seed) % (size / 2 + 1);
            p->stack[p->depth++] = (struct sort_part) {cut, p->end};
            p->low = p->start;
            p->high = p->end = cut;
        } else if (p->depth) {
            struct sort_part part = p->stack[--p->depth];
            p->low = p->start = part.low;
            p->high = p->end = part.high;
        } else {
            return false;
        }
    }
    *page = random_next(&p->seed) % 2 ? p->low++ : --p->high;
    return true;
}

// --- the simulator

struct sim {
    struct prepage order;
    uint64_t pages;
    uint64_t *unsent;
    uint32_t *arrives; // slot
    uint64_t now;
    struct process proc[PROCS_MAX];
    unsigned procs, running, slice;
    struct {
        uint64_t page, at;
    } request[PROCS_MAX]; // sorted by time
    unsigned requests;
    uint64_t demand[PROCS_MAX];
    unsigned demands;
    uint64_t queue_first, queue_left; // claimed by the pusher, not yet on the link
    uint64_t network, waits, pushed;
};

static bool here(const struct sim *s, uint64_t page)
{
    return !bitmap_test(s->unsent, page) && s->arrives[page] <= s->now;
}

static void sim_requests(struct sim *s)
{
    while (s->requests && s->request[0].at <= s->now) {
        uint64_t page = s->request[0].page;
        memmove(s->request, s->request + 1, --s->requests * sizeof(s->request[0]));
        if (!bitmap_test(s->unsent, page))
            continue;
        bitmap_clear(s->unsent, page);
        s->arrives[page] = UINT32_MAX;
        s->demand[s->demands++] = page;
        s->network++;
        prepage_fault(&s->order, s->unsent, page);
    }
}

static void sim_link(struct sim *s)
{
    uint32_t arrival = (uint32_t)(s->now + 1 + RTT / 2);
    if (s->demands) {
        s->arrives[s->demand[0]] = arrival;
        memmove(s->demand, s->demand + 1, --s->demands * sizeof(s->demand[0]));
        return;
    }
    if (!s->queue_left) {
        s->queue_left = prepage_next(&s->order, s->unsent, CLAIM, &s->queue_first);
        for (uint64_t i = 0; i < s->queue_left; i++) {
            HOLDS(bitmap_test(s->unsent, s->queue_first + i));
            bitmap_clear(s->unsent, s->queue_first + i);
            s->arrives[s->queue_first + i] = UINT32_MAX;
        }
    }
    if (s->queue_left) {
        s->arrives[s->queue_first++] = arrival;
        s->queue_left--;
        s->pushed++;
    }
}

// The guest has one CPU. A process has it for a slice, and while it waits for a page the CPU waits:
// that is what a userfault does to a vCPU. False: it waits.
static bool sim_schedule(struct sim *s, const bool *ended)
{
    bool waits =
        s->proc[s->running].waits_for != UINT64_MAX && !here(s, s->proc[s->running].waits_for);
    if ((!waits && s->slice++ >= SLICE) || ended[s->running]) {
        s->slice = 0;
        do
            s->running = (s->running + 1) % s->procs;
        while (ended[s->running]);
    }
    const struct process *p = &s->proc[s->running];
    return p->waits_for == UINT64_MAX || here(s, p->waits_for);
}

// False when the process has ended.
static bool sim_process(struct sim *s, struct process *p, const struct pattern *pattern)
{
    p->waits_for = UINT64_MAX;
    for (unsigned i = 0; i < pattern->touches; i++) {
        uint64_t page;
        if (!pattern->next(p, &page))
            return false;
        if (here(s, page))
            continue;
        p->waits_for = page;
        s->waits++;
        s->request[s->requests].page = page;
        s->request[s->requests++].at = s->now + RTT / 2;
        return true;
    }
    return true;
}

struct result {
    uint64_t network, waits;
    double seconds; // of 33 us slots
};

// `procs` processes share `pages` pages from `first` on, in a guest of `total` pages.
static struct result simulate(enum prepage_kind kind, const struct pattern *pattern, uint64_t total,
                              uint64_t first, uint64_t pages, unsigned procs)
{
    struct sim *s = calloc(1, sizeof(*s));
    prepage_init(&s->order, kind, total);
    s->pages = total;
    s->procs = procs;
    s->unsent = malloc(bitmap_words(total) * 8);
    s->arrives = calloc(total, sizeof(*s->arrives));
    ck_assert(s->unsent && s->arrives);
    memset(s->unsent, 0xff, bitmap_words(total) * 8);
    uint64_t each = pages / procs, running = procs;
    bool ended[PROCS_MAX] = {0};
    for (unsigned i = 0; i < procs; i++)
        s->proc[i] = (struct process) {.first = first + i * each,
                                       .pages = each,
                                       .step = pattern->step,
                                       .seed = 1 + i,
                                       .low = first + i * each,
                                       .high = first + (i + 1) * each,
                                       .start = first + i * each,
                                       .end = first + (i + 1) * each,
                                       .waits_for = UINT64_MAX};
    for (; running; s->now++) {
        sim_requests(s);
        sim_link(s);
        if (sim_schedule(s, ended) && !sim_process(s, &s->proc[s->running], pattern)) {
            ended[s->running] = true;
            running--;
        }
        if (s->network + s->pushed == total)
            break; // no fault can cross the network any more
    }
    struct result r = {s->network, s->waits, (double)s->now * 33e-6};
    free(s->unsent);
    free(s->arrives);
    free(s);
    return r;
}

static bool talkative(void)
{
    return getenv("FERRY_LONG") != NULL;
}

// VEE'09: a process sweeps a working set of 8 to 512 MiB. Pushing: 9-15 % of its pages cross the
// network as faults, pre-paging 2-4 %. Its memory lies behind that of the rest of the guest, which
// plain pushing sends first.
START_TEST(test_sweep)
{
    static const struct pattern sweeps[] = {{"sequential", next_sequential, 0, 64},
                                            {"backward", next_backward, 0, 64}};
    for (unsigned mib = 8; mib <= (talkative() ? 512 : 32); mib *= 4) {
        uint64_t set = mib * (uint64_t)MIB_PAGES, first = set * 3;
        double share[PREPAGE_KINDS][2];
        for (unsigned kind = PREPAGE_PUSH; kind < PREPAGE_KINDS; kind++)
            for (unsigned back = 0; back < 2; back++) {
                struct result r = simulate(kind, &sweeps[back], first + set, first, set, 1);
                share[kind][back] = 100.0 * (double)r.network / (double)set;
                if (talkative())
                    printf("%4u MiB %-10s %-12s %6.2f %% over the network, %6.2f %% waited\n", mib,
                           sweeps[back].name, prepage_name(kind), share[kind][back],
                           100.0 * (double)r.waits / (double)set);
            }
        ck_assert_msg(share[PREPAGE_PUSH][0] >= 9 && share[PREPAGE_PUSH][0] <= 15, "%u MiB: %f %%",
                      mib, share[PREPAGE_PUSH][0]);
        ck_assert_msg(share[PREPAGE_FORWARD][0] <= 4, "%f %%", share[PREPAGE_FORWARD][0]);
        for (unsigned back = 0; back < 2; back++) {
            ck_assert_msg(share[PREPAGE_BUBBLE][back] <= 4, "%f %%", share[PREPAGE_BUBBLE][back]);
            ck_assert_msg(share[PREPAGE_MULTI][back] <= 4, "%f %%", share[PREPAGE_MULTI][back]);
        }
    }
}
END_TEST

// OSR'09: where the guest has several streams, pivots are worth at least half of the faults.
START_TEST(test_patterns)
{
    static const struct {
        struct pattern pattern;
        unsigned procs;
        uint64_t mib;
        unsigned percent; // of pushing's faults, at most; 0: 50
    } all[] = {
        {{"records of 16 pages", next_records, 16, 64}, 1, 128},
        {{"records of 64 pages", next_records, 64, 64}, 4, 128},
        {{"stride 8", next_stride, 8, 64}, 1, 64},
        {{"stride 64", next_stride, 64, 64}, 1, 64},
        {{"stride 256", next_stride, 256, 64}, 1, 128, 60},
        {{"quicksort, 8 processes", next_quicksort, 0, 1}, 8, 512},
        {{"quicksort, 16 processes", next_quicksort, 0, 1}, 16, 512},
        {{"quicksort, 32 processes", next_quicksort, 0, 1}, 32, 512},
        {{"quicksort, 64 processes", next_quicksort, 0, 1}, 64, 512},
        {{"quicksort, 128 processes", next_quicksort, 0, 1}, 128, 512},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(all); i++) {
        uint64_t pages = all[i].mib * MIB_PAGES, first = pages / 8;
        struct result r[PREPAGE_KINDS];
        for (unsigned kind = PREPAGE_PUSH; kind < PREPAGE_KINDS; kind++) {
            if (!talkative() && kind != PREPAGE_PUSH && kind != PREPAGE_MULTI)
                continue;
            r[kind] = simulate(kind, &all[i].pattern, first + pages, first, pages, all[i].procs);
            if (talkative())
                printf("%-25s %-12s %7llu over the network, %7llu waits, done after %6.2f s\n",
                       all[i].pattern.name, prepage_name(kind), (unsigned long long)r[kind].network,
                       (unsigned long long)r[kind].waits, r[kind].seconds);
        }
        uint64_t most = r[PREPAGE_PUSH].network * (all[i].percent ? all[i].percent : 50) / 100;
        ck_assert_msg(r[PREPAGE_MULTI].network <= most, "%s: multi-bubble %llu, push %llu",
                      all[i].pattern.name, (unsigned long long)r[PREPAGE_MULTI].network,
                      (unsigned long long)r[PREPAGE_PUSH].network);
    }
}
END_TEST

// Where there is nothing to learn, learning costs little.
START_TEST(test_nothing_to_learn)
{
    static const struct pattern pattern = {"single pages", next_random, 0, 64};
    uint64_t pages = 64 * MIB_PAGES;
    struct result push = simulate(PREPAGE_PUSH, &pattern, pages, 0, pages, 1);
    struct result multi = simulate(PREPAGE_MULTI, &pattern, pages, 0, pages, 1);
    if (talkative())
        printf("single random pages: push %llu, multi-bubble %llu\n",
               (unsigned long long)push.network, (unsigned long long)multi.network);
    ck_assert_uint_le(multi.network * 10, push.network * 12);
}
END_TEST

// Whatever the faults and the holes: each page comes exactly once, all of them come.
START_TEST(test_complete)
{
    enum { PAGES = 5000 };
    uint64_t unsent[(PAGES + 63) / 64], seed = 11;
    for (unsigned round = 0; round < 400; round++) {
        struct prepage p;
        enum prepage_kind kind = PREPAGE_PUSH + round % (PREPAGE_KINDS - PREPAGE_PUSH);
        uint64_t pages = 1 + random_next(&seed) % PAGES, left = 0, n, first;
        memset(unsent, 0, sizeof(unsent));
        for (uint64_t i = 0; i < pages; i++)
            if (round % 3 == 0 || random_next(&seed) % (1 + round % 50) == 0) {
                bitmap_set(unsent, i);
                left++;
            }
        prepage_init(&p, kind, pages);
        while ((n = prepage_next(&p, unsent, 1 + random_next(&seed) % 64, &first))) {
            HOLDS(range_within(first, n, pages));
            for (uint64_t i = first; i < first + n; i++) {
                HOLDS(bitmap_test(unsent, i));
                bitmap_clear(unsent, i);
                left--;
            }
            uint64_t fault = random_next(&seed) % pages;
            if (random_next(&seed) % 8 == 0 && bitmap_test(unsent, fault)) {
                bitmap_clear(unsent, fault);
                left--;
                prepage_fault(&p, unsent, fault);
            }
        }
        ck_assert_msg(!left, "%s: %llu of %llu pages left", prepage_name(kind),
                      (unsigned long long)left, (unsigned long long)pages);
    }
}
END_TEST

START_TEST(test_orders)
{
    uint64_t unsent[2] = {~0ull, ~0ull}, first, n;
    struct prepage p;
    prepage_init(&p, PREPAGE_NONE, 128);
    ck_assert_uint_eq(prepage_next(&p, unsent, 8, &first), 0);

    prepage_init(&p, PREPAGE_FORWARD, 128);
    bitmap_clear(unsent, 120);
    prepage_fault(&p, unsent, 120);
    n = prepage_next(&p, unsent, 64, &first);
    ck_assert(first == 121 && n == 7);
    bitmap_fill(unsent, first, n, false);
    n = prepage_next(&p, unsent, 4, &first); // round the end
    ck_assert(first == 0 && n == 4);

    memset(unsent, 0xff, sizeof(unsent));
    prepage_init(&p, PREPAGE_BUBBLE, 128);
    bitmap_clear(unsent, 64);
    prepage_fault(&p, unsent, 64);
    n = prepage_next(&p, unsent, 8, &first);
    ck_assert(first == 65 && n == 8);
    bitmap_fill(unsent, first, n, false);
    n = prepage_next(&p, unsent, 8, &first);
    ck_assert(first == 56 && n == 8);
    bitmap_fill(unsent, first, n, false);
    bitmap_clear(unsent, 73); // outran the upper edge: the lower one gets little now
    prepage_fault(&p, unsent, 73);
    bitmap_clear(unsent, 75);
    prepage_fault(&p, unsent, 75);
    n = prepage_next(&p, unsent, 64, &first);
    ck_assert(first == 76 && n == 52);
    bitmap_fill(unsent, first, n, false);
    n = prepage_next(&p, unsent, 64, &first);
    ck_assert(first == 74 && n == 1);
}
END_TEST

// Four faults at equal distances are followed by the fifth, sixth ... before anything else.
START_TEST(test_stride)
{
    uint64_t unsent[64], first;
    struct prepage p;
    memset(unsent, 0xff, sizeof(unsent));
    prepage_init(&p, PREPAGE_MULTI, 4096);
    for (uint64_t page = 100; page <= 400; page += 100) {
        bitmap_clear(unsent, page);
        prepage_fault(&p, unsent, page);
    }
    for (uint64_t page = 500; page < 4096; page += 100) {
        ck_assert_uint_eq(prepage_next(&p, unsent, 64, &first), 1);
        ck_assert_uint_eq(first, page);
        bitmap_clear(unsent, page);
    }
}
END_TEST

START_TEST(test_names)
{
    for (unsigned kind = 0; kind < PREPAGE_KINDS; kind++) {
        enum prepage_kind parsed;
        ck_assert_int_eq(prepage_parse(prepage_name(kind), &parsed, NULL), 0);
        ck_assert_uint_eq(parsed, kind);
    }
    enum prepage_kind parsed;
    struct error err;
    ck_assert_int_lt(prepage_parse("bubbles", &parsed, &err), 0);
    ck_assert_ptr_nonnull(strstr(err.text, "multi-bubble"));
}
END_TEST

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0); // a failing test is a process of its own
    Suite *suite = suite_create("prepage");
    TCase *tc = tcase_create("prepage");
    tcase_set_timeout(tc, 100);
    tcase_add_test(tc, test_sweep);
    tcase_add_test(tc, test_patterns);
    tcase_add_test(tc, test_nothing_to_learn);
    tcase_add_test(tc, test_complete);
    tcase_add_test(tc, test_orders);
    tcase_add_test(tc, test_stride);
    tcase_add_test(tc, test_names);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
