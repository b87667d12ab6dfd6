// SPDX-License-Identifier: Apache-2.0
// Young's and Daly's intervals against the optimum found by trying, and spans and logs of failures.
#include <check.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "migrate/failures.h"
#include "migrate/young.h"
#include "vmm/util.h"

static double brute_force(const struct young_model *m)
{
    double best = 0, least = 2;
    for (double t = 1e-4; t < 1e9; t *= 1.001) {
        double loss = young_loss(m, t);
        if (loss < least) {
            least = loss;
            best = t;
        }
    }
    return best;
}

START_TEST(the_example_of_the_books)
{
    const struct young_model m = {.cost = 0.1, .latency = 0.1, .restart = 0, .mtbf = 86400};
    ck_assert_double_eq_tol(young_interval(&m), 131.45, 0.01);
    ck_assert_double_eq_tol(young_loss(&m, young_interval(&m)), sqrt(2 * 0.1 / 86400), 2e-5);
    ck_assert_double_eq_tol(daly_interval(&m), 131.35, 0.01);
}
END_TEST

START_TEST(the_choice_is_near_the_best)
{
    static const double shares[] = {1e-9, 1e-7, 1e-6, 1e-4, 1e-3, 0.01, 0.031, 0.032, 0.1, 0.5, 2};
    for (unsigned i = 0; i < ARRAY_SIZE(shares); i++)
        for (double mtbf = 60; mtbf < 1e8; mtbf *= 37)
            for (int form = YOUNG_SQUARE_ROOT; form <= YOUNG_DALY; form++) {
                double cost = shares[i] * mtbf;
                const struct young_model m = {cost, cost * 1.2, mtbf / 50, mtbf};
                double best = brute_force(&m), chosen = young_choose(&m, (enum young_form)form);
                ck_assert_double_eq_tol(young_best(&m), best, best * 0.01);
                if (best < m.latency)
                    ck_assert_double_eq(chosen, m.latency);
                else
                    ck_assert_msg(fabs(chosen - best) <= best * 0.1, "C %g M %g: %g, best %g", cost,
                                  mtbf, chosen, best);
            }
}
END_TEST

START_TEST(the_forms_fail_where_they_are_not_used)
{
    const struct young_model m = {.cost = 400, .latency = 400, .restart = 0, .mtbf = 3600};
    double best = brute_force(&m);
    ck_assert_double_gt(fabs(young_interval(&m) - best), best * 0.1);
    ck_assert_double_eq_tol(young_choose(&m, YOUNG_SQUARE_ROOT), best, best * 0.01);
}
END_TEST

START_TEST(never_shorter_than_writing_takes)
{
    const struct young_model m = {.cost = 0.001, .latency = 30, .restart = 1, .mtbf = 3600};
    ck_assert_double_lt(young_interval(&m), 30);
    ck_assert_double_eq(young_choose(&m, YOUNG_SQUARE_ROOT), 30);
    ck_assert_double_eq(young_choose(&m, YOUNG_DALY), 30);
    const struct young_model nothing = {.mtbf = 3600};
    ck_assert_double_eq(young_choose(&nothing, YOUNG_SQUARE_ROOT), 0);
    ck_assert_double_eq(young_loss(&nothing, 0), 1);
}
END_TEST

START_TEST(loss_is_a_share)
{
    for (double t = 1e-6; t < 1e12; t *= 3)
        for (double cost = 0; cost < 1e6; cost = cost * 10 + 1e-3) {
            const struct young_model m = {cost, cost + 1, 5, 100};
            double loss = young_loss(&m, t);
            ck_assert(loss >= 0 && loss <= 1);
        }
}
END_TEST

START_TEST(average_follows)
{
    struct young_average a = {0};
    young_average_add(&a, 8);
    ck_assert_double_eq(a.value, 8);
    for (int i = 0; i < 40; i++)
        young_average_add(&a, 2);
    ck_assert_double_eq_tol(a.value, 2, 1e-3);
    ck_assert_uint_eq(a.count, 41);
}
END_TEST

START_TEST(spans_are_parsed)
{
    static const struct {
        const char *text;
        double seconds;
    } good[] = {{"30", 30},       {"10s", 10},     {"24h", 86400},    {"1h30m", 5400},
                {"1.5d", 129600}, {"250ms", 0.25}, {"500us", 0.0005}, {"1d12h30m1s", 131401},
                {".5s", 0.5},     {"2w", 1209600}, {"1y", 31557600},  {"0h5m", 300}};
    static const char *const bad[] = {"",       "0",   "0s",   "-1s", "1h30",
                                      "30m1h",  "s",   "1e9s", "inf", "nan",
                                      "0x10s",  "1 s", " 1s",  "1s ", "1.2.3",
                                      "99999y", "10H", ".",    "1hh", "1000000000000000000000s"};
    double value;
    for (unsigned i = 0; i < ARRAY_SIZE(good); i++) {
        ck_assert_msg(!duration_parse(good[i].text, &value), "'%s'", good[i].text);
        ck_assert_double_eq_tol(value, good[i].seconds, 1e-9 * good[i].seconds);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_msg(duration_parse(bad[i], &value) == -EINVAL, "'%s'", bad[i]);
}
END_TEST

START_TEST(spans_are_written)
{
    static const struct {
        double seconds;
        const char *text;
    } cases[] = {{131.45, "131 s"}, {86400, "24 h"},  {0.1, "100 ms"}, {0.0015, "1.50 ms"},
                 {5e-6, "5 us"},    {3600, "1 h"},    {600, "10 min"}, {172800, "2 d"},
                 {1.234, "1.23 s"}, {31557600, "1 y"}};
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        char text[FAILURES_TEXT_MAX];
        duration_format(cases[i].seconds, text);
        ck_assert_str_eq(text, cases[i].text);
    }
}
END_TEST

enum { NOW = 1795276854 }; // 2026-11-21T16:00:54Z

static int log_parse(const char *text, struct failures *f, struct error *err)
{
    return failures_parse(text, strlen(text), NOW, f, err);
}

START_TEST(logs_are_read)
{
    static const struct {
        const char *text;
        double watched;
        unsigned count;
    } cases[] = {
        {"", 0, 0},
        {"# nothing yet\n\n", 0, 0},
        {"36h\n12h # power\n", 48 * 3600.0, 2},
        {"2026-11-21T15:00:54Z start\n", 3600, 0},
        {"2026-11-21T15:00:54Z\n", 3600, 0}, // when it was first seen, no interval before it
        {"1795273254 start\n1795275054\n1795276854", 3600, 2},
        {"1795273254 start\n1795275054\n1795275054 stop\n", 1800, 1},
        {"1795273254 start\n1795273354 stop\n1795275054 start\n1795275154\n1795275254 stop", 300,
         1},
        {"2026-11-21T15:00:54Z start\n10h\n", 36000 + 3600, 1},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        struct failures f;
        struct error err = {0};
        ck_assert_msg(!log_parse(cases[i].text, &f, &err), "%u: %s", i, err.text);
        ck_assert_double_eq_tol(f.watched, cases[i].watched, 1e-6);
        ck_assert_uint_eq(f.count, cases[i].count);
    }
}
END_TEST

START_TEST(bad_logs_are_refused_by_line)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"36h\nyesterday\n", "line 2, 'yesterday'"},
        {"2026-11-21T17:00:54Z\n", "future"},
        {"1795275054\n1795273254\n", "line 2, '1795273254': is earlier"},
        {"2026-02-30T00:00:00Z\n", "expected a time"},
        {"2026-11-21T25:00:54Z\n", "expected a time"},
        {"2026-11-21 15:00:54\n", "after the time"},
        {"36h start\n", "expected a time"},
        {"1795273254 begin\n", "expected start, stop"},
        {"1795273254 start now\n", "more than two words"},
        {"-5\n", "expected a time"},
        {"300y\n300y\n", "too long"},
    };
    struct failures f;
    struct error err;
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        ck_assert_int_eq(log_parse(cases[i].text, &f, &err), -EINVAL);
        ck_assert_msg(strstr(err.text, cases[i].says), "%u: %s", i, err.text);
    }
    ck_assert_int_eq(failures_parse("36h\0\n", 5, NOW, &f, &err), -EINVAL);
    char line[400];
    memset(line, '1', sizeof(line));
    ck_assert_int_eq(failures_parse(line, sizeof(line), NOW, &f, &err), -EINVAL);
    ck_assert_int_eq(failures_parse(line, FAILURES_LOG_MAX + 1ul, NOW, &f, &err), -EFBIG);
}
END_TEST

START_TEST(dates_are_right)
{
    static const struct {
        const char *date;
        int64_t seconds;
    } cases[] = {{"2000-02-29T00:00:00Z", 951782400},
                 {"2026-11-21T15:40:54Z", 1795275654},
                 {"2024-12-31T23:59:59Z", 1735689599},
                 {"1999-03-01T12:00:00Z", 920289600}};
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        char text[64];
        struct failures f;
        snprintf(text, sizeof(text), "%s start", cases[i].date);
        ck_assert_int_eq(log_parse(text, &f, NULL), 0);
        ck_assert_double_eq(f.watched, (double)(NOW - cases[i].seconds));
    }
}
END_TEST

START_TEST(random_bytes_do_no_harm)
{
    static const char words[][12] = {"start", "stop",        "36h", "1795273254", "#",
                                     "\n",    " ",           "\0",  "-",          "9999999999",
                                     "1e308", "2026-11-21T", "Z"};
    uint32_t seed = 1;
    for (int round = 0; round < 20000; round++) {
        char text[200];
        size_t len = 0;
        for (int i = 0; i < 12; i++) {
            seed = seed * 1664525 + 1013904223;
            const char *word = words[(seed >> 16) % ARRAY_SIZE(words)];
            size_t n = *word ? strlen(word) : 1;
            memcpy(text + len, word, n);
            len += n;
        }
        struct failures f;
        struct error err;
        if (!failures_parse(text, len, NOW, &f, &err)) {
            ck_assert(f.watched >= 0 && f.watched <= 2 * FAILURES_SPAN_MAX);
            ck_assert(failures_mtbf(&f) > 0);
        }
    }
}
END_TEST

START_TEST(little_is_known_at_first)
{
    ck_assert_double_eq(failures_mtbf(&(struct failures) {0}), FAILURES_MTBF);
    ck_assert_double_eq(failures_mtbf(&(struct failures) {0, 5}), FAILURES_MTBF / 6);
    const struct failures year = {31557600, 52};
    ck_assert_double_eq_tol(failures_mtbf(&year), 7 * 86400, 0.03 * 7 * 86400);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("young");
    TCase *c = tcase_create("interval");
    tcase_set_timeout(c, 60);
    tcase_add_test(c, the_example_of_the_books);
    tcase_add_test(c, the_choice_is_near_the_best);
    tcase_add_test(c, the_forms_fail_where_they_are_not_used);
    tcase_add_test(c, never_shorter_than_writing_takes);
    tcase_add_test(c, loss_is_a_share);
    tcase_add_test(c, average_follows);
    suite_add_tcase(s, c);
    c = tcase_create("failures");
    tcase_add_test(c, spans_are_parsed);
    tcase_add_test(c, spans_are_written);
    tcase_add_test(c, logs_are_read);
    tcase_add_test(c, bad_logs_are_refused_by_line);
    tcase_add_test(c, dates_are_right);
    tcase_add_test(c, random_bytes_do_no_harm);
    tcase_add_test(c, little_is_known_at_first);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
