// SPDX-License-Identifier: Apache-2.0
// The policy alone, and against thousands of simulated failures.
#include <check.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "migrate/checkpoint_policy.h"
#include "migrate/checkpoint_trial.h"
#include "vmm/util.h"

static const uint64_t ms = 1000000, second = 1000000000;

static void policy(struct checkpoint_policy *p, double interval, unsigned chain)
{
    struct checkpoint_settings s;
    checkpoint_settings_default(&s);
    s.interval = interval;
    s.chain = chain;
    checkpoint_policy_init(p, &s);
}

static struct checkpoint_measure made(const struct checkpoint_policy *p, uint64_t lost,
                                      uint64_t total, uint64_t bytes)
{
    return (struct checkpoint_measure) {.full = checkpoint_policy_full(p),
                                        .pause_ns = lost / 2,
                                        .fault_ns = lost - lost / 2,
                                        .total_ns = total,
                                        .bytes = bytes};
}

START_TEST(cost_is_measured)
{
    struct checkpoint_policy p;
    policy(&p, 0, 4);
    uint64_t start = 0, due = 0;
    for (int i = 0; i < 200; i++) {
        // Fulls cost 400 ms, diffs 50 ms: four of them (400 + 3 * 50) / 4.
        struct checkpoint_measure m =
            made(&p, checkpoint_policy_full(&p) ? 400 * ms : 50 * ms, 600 * ms, 100);
        ck_assert_int_eq(m.full, i % 4 == 0);
        if (!m.full)
            m.bytes = 10;
        due = checkpoint_policy_done(&p, &m, start);
        ck_assert_uint_gt(due, start);
        ck_assert_double_eq_tol((double)(due - start) / 1e9,
                                checkpoint_policy_interval(&p) + (m.full ? 0.4 : 0.05), 1e-6);
        start = due;
    }
    struct young_model model;
    checkpoint_policy_model(&p, &model);
    ck_assert_double_eq_tol(model.cost, 0.1375, 1e-3);
    ck_assert_double_eq_tol(model.latency, 0.6, 1e-3);
    ck_assert_double_eq_tol(checkpoint_policy_interval(&p), sqrt(2 * 0.1375 * FAILURES_MTBF), 0.1);
}
END_TEST

START_TEST(chains_end)
{
    struct checkpoint_policy p;
    policy(&p, 10, 16);
    unsigned fulls = 0;
    for (int i = 0; i < 30; i++) { // each diff is a quarter of the full: five diffs are too much
        struct checkpoint_measure m = made(&p, ms, ms, 1000);
        fulls += m.full;
        if (!m.full)
            m.bytes = 250;
        checkpoint_policy_done(&p, &m, 0);
    }
    ck_assert_uint_eq(fulls, 5);
    policy(&p, 10, 1);
    for (int i = 0; i < 5; i++) {
        struct checkpoint_measure m = made(&p, ms, ms, 1000);
        ck_assert(m.full);
        checkpoint_policy_done(&p, &m, 0);
    }
}
END_TEST

START_TEST(failed_saves_come_again_later_and_later)
{
    struct checkpoint_policy p;
    policy(&p, 60, 16);
    struct checkpoint_measure m = made(&p, ms, ms, 1000);
    checkpoint_policy_done(&p, &m, 0);
    ck_assert(!checkpoint_policy_full(&p));
    uint64_t waits[70];
    for (int i = 0; i < 70; i++)
        waits[i] = checkpoint_policy_failed(&p, 5 * second) - 5 * second;
    ck_assert(checkpoint_policy_full(&p));
    ck_assert_uint_eq(waits[0], second);
    ck_assert_uint_eq(waits[1], 2 * second);
    ck_assert_uint_eq(waits[69], 60 * second); // as rare as the others, never given up
    m = made(&p, ms, ms, 1000);
    checkpoint_policy_done(&p, &m, 0);
    ck_assert_uint_eq(checkpoint_policy_failed(&p, 0), second);
}
END_TEST

START_TEST(no_faster_than_it_is_written)
{
    struct checkpoint_policy p;
    policy(&p, 0.5, 16);
    struct checkpoint_measure m = made(&p, ms, 8 * second, 1000);
    ck_assert_uint_ge(checkpoint_policy_done(&p, &m, 0), 8 * second);
}
END_TEST

START_TEST(settings_are_checked)
{
    struct checkpoint_settings good, s;
    checkpoint_settings_default(&good);
    ck_assert_int_eq(checkpoint_settings_check(&good, NULL), 0);
#define BAD(change) \
    s = good;       \
    s.change;       \
    ck_assert_int_eq(checkpoint_settings_check(&s, NULL), -EINVAL)
    BAD(interval = 0.001);
    BAD(interval = -1);
    BAD(interval = (double)NAN);
    BAD(mtbf = 0);
    BAD(mtbf = (double)NAN);
    BAD(mtbf = (double)INFINITY);
    BAD(restart = good.mtbf * 2);
    BAD(chain = 0);
    BAD(chain = 65);
    BAD(keep = 0);
    BAD(hourly = 100000);
#undef BAD
}
END_TEST

enum { ITEMS = 100 };

// Chains of `chain` files, one each `minutes`.
static void items_make(struct checkpoint_item *items, unsigned nr, unsigned chain, unsigned minutes)
{
    for (unsigned i = 0; i < nr; i++)
        items[i] = (struct checkpoint_item) {.number = i + 1,
                                             .created = 3600 * 1000 + 60 * (int64_t)minutes * i,
                                             .parent = i % chain ? (int32_t)i - 1 : -1};
}

static unsigned kept(const struct checkpoint_item *items, unsigned nr)
{
    unsigned n = 0;
    for (unsigned i = 0; i < nr; i++) {
        n += items[i].keep;
        ck_assert(!items[i].keep || items[i].parent < 0 || items[items[i].parent].keep);
    }
    return n;
}

START_TEST(the_newest_are_kept_with_what_they_need)
{
    struct checkpoint_settings s;
    struct checkpoint_item items[ITEMS];
    checkpoint_settings_default(&s);
    s.keep = 5;
    items_make(items, 22, 10, 10); // 0-9, 10-19, 20, 21
    checkpoint_policy_keep(&s, items, 22, items[21].created);
    for (unsigned i = 0; i < 22; i++)
        ck_assert_int_eq(items[i].keep, i >= 10); // 17, 18, 19 need all before them
    ck_assert_uint_eq(kept(items, 22), 12);
    items_make(items, 25, 10, 10);
    checkpoint_policy_keep(&s, items, 25, items[24].created);
    for (unsigned i = 0; i < 25; i++)
        ck_assert_int_eq(items[i].keep, i >= 20);
    items_make(items, 3, 1, 10);
    checkpoint_policy_keep(&s, items, 3, items[2].created);
    ck_assert_uint_eq(kept(items, 3), 3);
    checkpoint_policy_keep(&s, items, 0, 0);
}
END_TEST

START_TEST(what_only_others_need_is_merged)
{
    struct checkpoint_settings s;
    struct checkpoint_item items[ITEMS];
    unsigned files;
    checkpoint_settings_default(&s);
    s.keep = 5;
    for (unsigned nr = 1; nr <= 16; nr++) { // one chain: 0 ... nr - 1
        items_make(items, nr, 16, 10);
        checkpoint_policy_keep(&s, items, nr, items[nr - 1].created);
        int32_t at = checkpoint_policy_merge(&s, items, nr, &files);
        ck_assert_int_eq(at, nr < 10 ? -1 : (int32_t)nr - 6);
        ck_assert(at < 0 || files == nr - 5);
    }
    // Nothing below one that is wanted: here, of an hour.
    s.hourly = 24;
    items_make(items, 16, 16, 60);
    checkpoint_policy_keep(&s, items, 16, items[15].created);
    ck_assert_int_eq(checkpoint_policy_merge(&s, items, 16, &files), -1);
    s.hourly = 0;
    // Another chain that is whole needs nothing.
    items_make(items, 20, 10, 10); // 0-9, 10-19
    checkpoint_policy_keep(&s, items, 20, items[19].created);
    ck_assert_int_eq(checkpoint_policy_merge(&s, items, 20, &files), 14);
    ck_assert_uint_eq(files, 5);
    struct checkpoint_policy p = {.settings = s, .chain = 10, .full_bytes = 100, .diff_bytes = 90};
    checkpoint_policy_merged(&p, 5, 40, 120);
    ck_assert(p.chain == 6 && p.full_bytes == 120 && p.diff_bytes == 50);
    checkpoint_policy_merged(&p, 7, 40, 120); // of a chain that has ended
    ck_assert(p.chain == 6 && p.diff_bytes == 50);
    checkpoint_policy_merged(&p, 5, 60, 130);
    ck_assert(p.chain == 2 && !p.diff_bytes);
}
END_TEST

START_TEST(one_of_each_hour_is_kept)
{
    struct checkpoint_settings s;
    struct checkpoint_item items[ITEMS];
    checkpoint_settings_default(&s);
    s.keep = 2;
    s.hourly = 4;
    items_make(items, ITEMS, 1, 10); // six an hour
    int64_t now = items[ITEMS - 1].created;
    checkpoint_policy_keep(&s, items, ITEMS, now);
    ck_assert_uint_eq(kept(items, ITEMS),
                      5); // four hours, the newest is one of these; and one more
    ck_assert(items[99].keep && items[98].keep && items[95].keep && items[89].keep &&
              items[83].keep);
    // A clock that was set back makes nothing newer than now.
    checkpoint_policy_keep(&s, items, ITEMS, now - 365 * 86400);
    ck_assert(items[99].keep);
}
END_TEST

// --- against failures

static double mean_loss(const struct young_model *model, enum young_form form, double interval,
                        double scatter)
{
    enum { SEEDS = 4, FAILURES = 1000 };
    double sum = 0;
    for (unsigned seed = 1; seed <= SEEDS; seed++) {
        const struct trial_params params = {*model, form, interval, scatter, FAILURES, seed};
        struct trial_result r;
        ck_assert_int_eq(trial_run(&params, &r, NULL), 0);
        double parts = r.useful + r.checkpoints + r.repeated + r.restarts;
        ck_assert_double_eq_tol(parts, r.wall, r.wall * 1e-6);
        // Each 1,000 failures by themselves.
        ck_assert_double_eq_tol(r.loss, young_loss(model, r.interval),
                                0.05 * young_loss(model, r.interval) + 1e-9);
        sum += r.loss;
    }
    return sum / SEEDS;
}

START_TEST(measured_loss_is_the_least)
{
    static const struct young_model models[] = {
        {0.1, 0.1, 0, 86400}, {0.1, 5, 1, 86400},     {0.02, 1, 0.01, 3600}, {5, 20, 10, 3600},
        {60, 90, 30, 3600},   {1, 1, 100, 7 * 86400}, {0.5, 30, 1, 86400},   {300, 300, 60, 3600},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(models); i++)
        for (int form = YOUNG_SQUARE_ROOT; form <= YOUNG_DALY; form++) {
            const struct young_model *m = &models[i];
            double least = young_loss(m, young_best(m));
            double loss = mean_loss(m, (enum young_form)form, 0, 0.5);
            ck_assert_msg(fabs(loss - least) <= least * 0.05, "model %u: %g, least %g", i, loss,
                          least);
        }
}
END_TEST

START_TEST(other_intervals_lose_more)
{
    const struct young_model m = {1, 2, 1, 86400};
    double least = mean_loss(&m, YOUNG_SQUARE_ROOT, 0, 0);
    ck_assert_double_gt(mean_loss(&m, YOUNG_SQUARE_ROOT, young_best(&m) / 3, 0), 1.4 * least);
    ck_assert_double_gt(mean_loss(&m, YOUNG_SQUARE_ROOT, young_best(&m) * 3, 0), 1.4 * least);
}
END_TEST

START_TEST(the_same_seed_is_the_same_trial)
{
    struct trial_params params = {{1, 2, 1, 3600}, YOUNG_SQUARE_ROOT, 0, 0.5, 100, 7};
    struct trial_result a, b;
    ck_assert_int_eq(trial_run(&params, &a, NULL), 0);
    ck_assert_int_eq(trial_run(&params, &b, NULL), 0);
    ck_assert_mem_eq(&a, &b, sizeof(a));
    params.seed = 8;
    ck_assert_int_eq(trial_run(&params, &b, NULL), 0);
    ck_assert_mem_ne(&a, &b, sizeof(a));
}
END_TEST

START_TEST(endless_trials_are_refused)
{
    const struct trial_params params = {{1e-6, 1e-6, 0, 1e9}, YOUNG_SQUARE_ROOT, 0.01, 0, 1000, 1};
    struct trial_result r;
    struct error err;
    ck_assert_int_eq(trial_run(&params, &r, &err), -E2BIG);
    ck_assert_ptr_nonnull(strstr(err.text, "take fewer"));
}
END_TEST

START_TEST(a_sweep_is_drawn)
{
    const struct trial_params params = {{0.1, 1, 1, 86400}, YOUNG_SQUARE_ROOT, 0, 0.5, 50, 1};
    struct trial_sweep sweep;
    ck_assert_int_eq(trial_sweep(&params, &sweep, NULL), 0);
    ck_assert_double_le(sweep.best_loss, sweep.chosen_loss);
    ck_assert_uint_eq(sweep.nr_points, TRIAL_POINTS);
    for (unsigned i = 0; i < TRIAL_POINTS; i++)
        ck_assert_double_le(sweep.best_loss, sweep.points[i].model + 1e-12);
    char *text = trial_plot(&sweep);
    ck_assert_ptr_nonnull(text);
    unsigned circles = 0;
    for (const char *p = text; (p = strstr(p, "<circle")); p++)
        circles++;
    ck_assert_uint_eq(circles, TRIAL_POINTS + 2 + 3); // points, policy, optimum, the legend's
    ck_assert_ptr_nonnull(strstr(text, "T = 131 s"));
    ck_assert_ptr_null(strstr(text, "nan"));
    free(text);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("checkpoint_policy");
    TCase *c = tcase_create("policy");
    tcase_add_test(c, cost_is_measured);
    tcase_add_test(c, chains_end);
    tcase_add_test(c, failed_saves_come_again_later_and_later);
    tcase_add_test(c, no_faster_than_it_is_written);
    tcase_add_test(c, settings_are_checked);
    tcase_add_test(c, the_newest_are_kept_with_what_they_need);
    tcase_add_test(c, what_only_others_need_is_merged);
    tcase_add_test(c, one_of_each_hour_is_kept);
    suite_add_tcase(s, c);
    c = tcase_create("trial");
    tcase_set_timeout(c, 100);
    tcase_add_test(c, measured_loss_is_the_least);
    tcase_add_test(c, other_intervals_lose_more);
    tcase_add_test(c, the_same_seed_is_the_same_trial);
    tcase_add_test(c, endless_trials_are_refused);
    tcase_add_test(c, a_sweep_is_drawn);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
