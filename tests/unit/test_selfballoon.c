// SPDX-License-Identifier: Apache-2.0
// The rule of self-ballooning, against a model of a guest and against guests that say anything.
#include <check.h>
#include <stdlib.h>

#include "migrate/selfballoon.h"

#define UNSAID UINT64_MAX
#define GUEST  (1024 * MiB) // its reserve: 64 MiB

static struct ram_guest_says says(uint64_t available, uint64_t held)
{
    static uint64_t serial;
    return (struct ram_guest_says) {.serial = ++serial,
                                    .free = UNSAID,
                                    .available = available,
                                    .swapped_out = UNSAID,
                                    .major_faults = UNSAID,
                                    .held = held};
}

static uint64_t look(struct selfballoon *s, const struct ram_guest_says *g)
{
    uint64_t before = s->taken;
    ck_assert(selfballoon_look(s, g) == (s->taken != before));
    return s->taken;
}

START_TEST(takes_most_of_what_is_spare)
{
    static const struct {
        uint64_t memory, most, available, held, wanted, taken; // MiB
    } rows[] = {
        {1024, 4096, 764, 0, 0, 665},      // 95 % of 764 - 64
        {1024, 4096, 1024, 0, 0, 912},     // ... of all but the reserve
        {1024, 300, 764, 0, 0, 300},       // at most that
        {1024, 0, 764, 0, 0, 0},           // nothing
        {1024, 4096, 64, 0, 0, 0},         // the reserve is not touched
        {1024, 4096, 65, 0, 0, 0},         // less than a step
        {1024, 4096, 464, 300, 0, 665},    // the same while the balloon grows
        {1024, 4096, 464, 400, 100, 665},  // beside what its user has
        {1024, 4096, 99, 665, 0, 665},     // it is there
        {128, 4096, 100, 0, 0, 79},        // a small guest keeps 16 MiB
        {65536, 99999, 60000, 0, 0, 56027} // a large one 1 GiB
    };
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct selfballoon s;
        struct ram_guest_says g = says(rows[i].available * MiB, rows[i].held * MiB);
        g.wanted = rows[i].wanted * MiB;
        selfballoon_init(&s, rows[i].memory * MiB, rows[i].most * MiB);
        ck_assert_msg(look(&s, &g) == rows[i].taken * MiB, "row %u: %llu MiB", i,
                      (unsigned long long)(s.taken / MiB));
        ck_assert(!s.pressed);
    }
}
END_TEST

START_TEST(needs_to_be_told)
{
    struct selfballoon s;
    selfballoon_init(&s, GUEST, UINT64_MAX);
    struct ram_guest_says g = says(UNSAID, 0);
    ck_assert_uint_eq(look(&s, &g), 0);
    g.free = 164 * MiB; // an older driver says no more
    ck_assert_uint_eq(look(&s, &g), 95 * MiB);
    g.available = 264 * MiB;
    ck_assert_uint_eq(look(&s, &g), 190 * MiB);
    g.available = UNSAID;
    g.free = UNSAID;
    ck_assert_uint_eq(look(&s, &g), 190 * MiB);
}
END_TEST

START_TEST(wants_less_when_the_guest_uses_more)
{
    struct selfballoon s;
    selfballoon_init(&s, GUEST, UINT64_MAX);
    struct ram_guest_says g = says(764 * MiB, 0);
    ck_assert_uint_eq(look(&s, &g), 665 * MiB);
    g = says(264 * MiB, 200 * MiB); // 300 MiB more are in use
    ck_assert_uint_eq(look(&s, &g), 380 * MiB);
    g = says(200 * MiB, 564 * MiB);
    ck_assert_uint_eq(look(&s, &g), 665 * MiB);
    ck_assert(!s.pressed);
}
END_TEST

// Each kind of pressure gives back at once, and ends the taking.
START_TEST(pressure_gives_back)
{
    static const struct {
        uint64_t available, swapped, faults; // the guest's next words, MiB; pages
        uint64_t taken;                      // MiB
        bool pressed;
    } rows[] = {{99, 0, 0, 665, false},   // calm
                {33, 0, 0, 602, false},   // into the reserve, but not deep: the goal sinks
                {31, 0, 0, 498, true},    // a quarter
                {0, 0, 0, 498, true},     // still more than what the reserve lacks
                {99, 1, 0, 498, true},    // it swaps
                {99, 0, 255, 665, false}, // it reads a little
                {99, 0, 256, 498, true},  // it reads back what it had dropped
                {600, 9, 0, 498, true}};
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct selfballoon s;
        selfballoon_init(&s, GUEST, UINT64_MAX);
        struct ram_guest_says g = says(764 * MiB, 0);
        g.swapped_out = 100;
        g.major_faults = 1000;
        ck_assert_uint_eq(look(&s, &g), 665 * MiB);
        g.held = 665 * MiB;
        g.available = rows[i].available * MiB;
        g.swapped_out += rows[i].swapped * MiB;
        g.major_faults += rows[i].faults;
        ck_assert_msg(look(&s, &g) == rows[i].taken * MiB && s.pressed == rows[i].pressed,
                      "row %u: %llu MiB", i, (unsigned long long)(s.taken / MiB));
        g.available = 900 * MiB; // whatever comes
        g.held = 0;
        look(&s, &g);
        ck_assert(rows[i].pressed ? s.taken <= rows[i].taken * MiB : s.taken > 665 * MiB);
    }
}
END_TEST

// What the reserve lacks comes back at once even if it is more than a quarter; then quarter by
// quarter down to nothing.
START_TEST(pressure_gives_everything_back)
{
    struct selfballoon s;
    selfballoon_init(&s, GUEST, 70 * MiB);
    struct ram_guest_says g = says(764 * MiB, 0);
    ck_assert_uint_eq(look(&s, &g), 70 * MiB);
    g = says(4 * MiB, 70 * MiB);
    ck_assert_uint_eq(look(&s, &g), 10 * MiB);
    ck_assert_uint_eq(look(&s, &g), 0);
    ck_assert_uint_eq(look(&s, &g), 0);
}
END_TEST

// Counters of the guest that begin anew, with it, are no pressure.
START_TEST(a_reboot_is_no_pressure)
{
    struct selfballoon s;
    selfballoon_init(&s, GUEST, UINT64_MAX);
    struct ram_guest_says g = says(764 * MiB, 0);
    g.swapped_out = 5 * MiB;
    g.major_faults = 5000;
    look(&s, &g);
    g.swapped_out = g.major_faults = 0;
    look(&s, &g);
    ck_assert(!s.pressed);
    g.swapped_out = g.major_faults = UNSAID;
    look(&s, &g);
    ck_assert(!s.pressed);
}
END_TEST

// A guest that uses `used`, with a balloon that moves `rate` bytes between two looks.
struct model {
    uint64_t used, held, rate;
};

static void model_step(struct model *m, uint64_t target)
{
    uint64_t can = m->used < GUEST ? GUEST - m->used : 0;
    target = target < can ? target : can; // and it deflates rather than kill
    uint64_t most = target > m->held ? target - m->held : m->held - target;
    most = most < m->rate ? most : m->rate;
    m->held = target > m->held ? m->held + most : m->held - most;
    m->held = m->held < can ? m->held : can;
}

START_TEST(settles)
{
    static const uint64_t rates[] = {MiB, 10 * MiB, 100 * MiB, GUEST};
    for (unsigned i = 0; i < ARRAY_SIZE(rates); i++)
        for (uint64_t used = 0; used <= GUEST; used += 32 * MiB) {
            struct model m = {used, 0, rates[i]};
            struct selfballoon s;
            unsigned changes = 0;
            selfballoon_init(&s, GUEST, UINT64_MAX);
            for (unsigned step = 0; step < 2000; step++) {
                struct ram_guest_says g = says(GUEST - m.used - m.held, m.held);
                changes += selfballoon_look(&s, &g);
                model_step(&m, s.taken);
            }
            ck_assert_uint_eq(m.held, s.taken);
            ck_assert_uint_le(changes, 1);
            ck_assert_uint_ge(GUEST - m.used, m.held);
            bool room = GUEST - used > 64 * MiB;
            ck_assert(room ? GUEST - used - m.held >= 64 * MiB : !m.held);
            ck_assert(!room || m.held + MiB >= (GUEST - used - 64 * MiB) / 100 * 95);
        }
}
END_TEST

// One that needs its memory while it moves gets it, and is not asked again.
START_TEST(yields_to_a_guest_that_grows)
{
    struct model m = {100 * MiB, 0, 50 * MiB};
    struct selfballoon s;
    selfballoon_init(&s, GUEST, UINT64_MAX);
    for (unsigned step = 0; step < 100; step++) {
        struct ram_guest_says g = says(GUEST - m.used - m.held, m.held);
        uint64_t before = s.taken;
        selfballoon_look(&s, &g);
        ck_assert(step == 0 || s.taken <= before);
        model_step(&m, s.taken);
        if (step >= 30 && m.used < 900 * MiB)
            m.used += 40 * MiB;
    }
    ck_assert_uint_ge(GUEST - m.used - s.taken, 32 * MiB);
}
END_TEST

START_TEST(bounds_hold_whatever_is_said)
{
    static const uint64_t odd[] = {0,          1,         MiB - 1,   MiB,        64 * MiB,
                                   GUEST - 1,  GUEST,     GUEST + 1, 1ull << 50, UINT64_MAX - 1,
                                   UINT64_MAX, INT64_MAX, 77};
    struct selfballoon s;
    srand(1);
    for (unsigned i = 0; i < 20000; i++) {
        uint64_t word[5];
        for (unsigned w = 0; w < ARRAY_SIZE(word); w++)
            word[w] = odd[(unsigned)rand() % ARRAY_SIZE(odd)] / (1u + (unsigned)rand() % 3);
        uint64_t most = odd[(unsigned)rand() % ARRAY_SIZE(odd)];
        if (i % 10 == 0)
            selfballoon_init(&s, GUEST, most);
        struct ram_guest_says g = {.serial = i,
                                   .free = word[0],
                                   .available = word[1],
                                   .swapped_out = word[2],
                                   .major_faults = word[3],
                                   .held = word[4],
                                   .wanted = odd[(unsigned)rand() % ARRAY_SIZE(odd)]};
        bool pressed = s.pressed;
        uint64_t before = s.taken;
        look(&s, &g);
        ck_assert_uint_le(s.taken, s.most);
        ck_assert_uint_le(s.taken, GUEST - 60 * MiB);
        ck_assert_uint_eq(s.taken % MiB, 0);
        ck_assert(!pressed || (s.pressed && s.taken <= before));
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("selfballoon");
    TCase *tc = tcase_create("selfballoon");
    tcase_add_test(tc, takes_most_of_what_is_spare);
    tcase_add_test(tc, needs_to_be_told);
    tcase_add_test(tc, wants_less_when_the_guest_uses_more);
    tcase_add_test(tc, pressure_gives_back);
    tcase_add_test(tc, pressure_gives_everything_back);
    tcase_add_test(tc, a_reboot_is_no_pressure);
    tcase_add_test(tc, settles);
    tcase_add_test(tc, yields_to_a_guest_that_grows);
    tcase_add_test(tc, bounds_hold_whatever_is_said);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
