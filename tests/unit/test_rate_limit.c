// SPDX-License-Identifier: Apache-2.0
// devices/rate_limit. Each test was run against a limiter with the rule in question taken out
// (debt, all-or-nothing, clamping to full, burst first) and failed.
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "devices/rate_limit.h"
#include "vmm/util.h"

#define MS 1000000ull
#define S  (1000 * MS)

static struct rate_limit limit(uint64_t bytes, uint32_t bytes_ms, uint64_t ops, uint32_t ops_ms)
{
    struct rate_limit r;
    const struct rate_limit_config c = {.bytes = {.size = bytes, .refill_ms = bytes_ms},
                                        .ops = {.size = ops, .refill_ms = ops_ms}};
    rate_limit_init(&r, &c, 5 * S);
    return r;
}

START_TEST(without_limits_all_passes)
{
    struct rate_limit r = limit(0, 0, 0, 0);
    ck_assert(!rate_limited(&r));
    for (int i = 0; i < 1000; i++)
        ck_assert(rate_limit_take(&r, UINT64_MAX, UINT64_MAX, 5 * S));
    ck_assert_uint_eq(rate_limit_wait(&r, UINT64_MAX, 1, 5 * S), 0);
}
END_TEST

START_TEST(bucket_empties_and_fills)
{
    struct rate_limit r = limit(1000, 100, 0, 0);
    ck_assert(rate_limited(&r));
    ck_assert(rate_limit_take(&r, 600, 1, 5 * S));
    ck_assert(rate_limit_take(&r, 400, 1, 5 * S));
    ck_assert(!rate_limit_take(&r, 1, 1, 5 * S));
    ck_assert_uint_eq(rate_limit_wait(&r, 1, 1, 5 * S), MS / 10); // 10 tokens in each ms
    ck_assert_uint_eq(rate_limit_wait(&r, 500, 1, 5 * S), 50 * MS);
    ck_assert(!rate_limit_take(&r, 500, 1, 5 * S + 50 * MS - 1));
    ck_assert(rate_limit_take(&r, 500, 1, 5 * S + 50 * MS));
    struct rate_limit third = limit(3, 1000, 0, 0);
    ck_assert(rate_limit_take(&third, 3, 1, 5 * S));
    ck_assert_uint_eq(rate_limit_wait(&third, 1, 1, 5 * S), 333333334); // rounded up
    // Never more than full, however long it had.
    ck_assert(!rate_limit_take(&r, 1000, 1, 5 * S + 60 * MS));
    ck_assert(rate_limit_take(&r, 1000, 1, 500 * S));
    ck_assert(!rate_limit_take(&r, 1, 1, 500 * S));
}
END_TEST

START_TEST(both_buckets_or_neither)
{
    struct rate_limit r = limit(1000, 1000, 2, 1000);
    ck_assert(rate_limit_take(&r, 10, 1, 5 * S));
    ck_assert(rate_limit_take(&r, 10, 1, 5 * S));
    for (int i = 0; i < 100; i++)
        ck_assert(!rate_limit_take(&r, 10, 1, 5 * S)); // takes no bytes either
    ck_assert(rate_limit_take(&r, 980, 0, 5 * S));
    for (int i = 0; i < 100; i++)
        ck_assert(!rate_limit_take(&r, 990, 1, 5 * S + 600 * MS)); // nor an operation
    ck_assert_uint_eq(rate_limit_wait(&r, 0, 2, 5 * S + 600 * MS), 400 * MS);
    // The longer of the two waits is the answer, and after it the request does pass.
    ck_assert_uint_eq(rate_limit_wait(&r, 990, 2, 5 * S + 600 * MS), 400 * MS);
    ck_assert(rate_limit_take(&r, 990, 2, 5 * S + 1000 * MS));
}
END_TEST

START_TEST(larger_than_the_bucket)
{
    struct rate_limit r = limit(1000, 1000, 0, 0);
    ck_assert(rate_limit_take(&r, 10000, 1, 5 * S)); // it is full
    // The debt of 9000 is paid at the bucket's rate.
    ck_assert_uint_eq(rate_limit_wait(&r, 1, 1, 5 * S), 9001 * MS);
    ck_assert(!rate_limit_take(&r, 1, 1, 14 * S));
    ck_assert(rate_limit_take(&r, 1, 1, 14 * S + MS));
    ck_assert_uint_eq(rate_limit_wait(&r, 5000, 1, 14 * S + MS), S); // full again then
    ck_assert(!rate_limit_take(&r, 5000, 1, 15 * S));
    ck_assert(rate_limit_take(&r, 5000, 1, 15 * S + MS));
}
END_TEST

START_TEST(one_time_burst_comes_first_and_once)
{
    struct rate_limit r;
    const struct rate_limit_config c = {
        .bytes = {.size = 100, .one_time_burst = 1000, .refill_ms = 1000}};
    rate_limit_init(&r, &c, 0);
    ck_assert(rate_limit_take(&r, 900, 1, 0));
    ck_assert(rate_limit_take(&r, 200, 1, 0)); // the last 100 of the burst, and the bucket
    ck_assert(!rate_limit_take(&r, 1, 1, 0));
    ck_assert(rate_limit_take(&r, 100, 1, 1000 * S));
    ck_assert(!rate_limit_take(&r, 1, 1, 1000 * S));
}
END_TEST

START_TEST(time_that_goes_back_gives_nothing)
{
    struct rate_limit r = limit(1000, 1000, 0, 0);
    ck_assert(rate_limit_take(&r, 1000, 1, 5 * S));
    ck_assert(!rate_limit_take(&r, 1, 1, 0));
    ck_assert(!rate_limit_take(&r, 1, 1, 5 * S));
    ck_assert(rate_limit_take(&r, 1, 1, 5 * S + MS));
}
END_TEST

// Over a long time the rate is exact whatever the sizes, and a wait is neither too short nor longer
// than it must be.
START_TEST(the_rate_holds)
{
    srand(1);
    struct rate_limit r = limit(1000003, 1000, 0, 0);
    uint64_t now = 5 * S, taken = 0, most = 0;
    while (now < 1005 * S) {
        uint64_t n = 1 + (uint64_t)rand() % 3000000;
        uint64_t wait = rate_limit_wait(&r, n, 1, now);
        if (wait) {
            struct rate_limit early = r;
            ck_assert(!rate_limit_take(&early, n, 1, now + wait - 1));
        }
        now += wait;
        ck_assert(rate_limit_take(&r, n, 1, now));
        taken += n;
        most = n > most ? n : most;
    }
    // The full bucket at the start, 1000 s of refill, and at most one request of debt.
    uint64_t due = 1000003 + 1000003ull * (now - 5 * S) / S;
    ck_assert_uint_le(taken, due + most);
    ck_assert_uint_ge(taken, due - 1000003 - 1);
}
END_TEST

START_TEST(extremes_do_not_wrap)
{
    struct rate_limit r = limit(RATE_TOKENS_MAX, UINT32_MAX, 1, UINT32_MAX);
    ck_assert(rate_limit_take(&r, UINT64_MAX, UINT64_MAX, UINT64_MAX));
    ck_assert_uint_eq(rate_limit_wait(&r, UINT64_MAX, 1, UINT64_MAX), INT64_MAX);
    ck_assert(!rate_limit_take(&r, 1, 1, UINT64_MAX));
    r = limit(1, UINT32_MAX, 0, 0);
    ck_assert(rate_limit_take(&r, UINT64_MAX, 1, 5 * S));
    ck_assert(!rate_limit_take(&r, 1, 1, UINT64_MAX)); // 2^48 tokens of debt, one in 49 days
}
END_TEST

START_TEST(limits_change_in_use)
{
    struct rate_limit r = limit(1000, 1000, 0, 0);
    struct rate_limit_config c = r.config;
    ck_assert(rate_limit_take(&r, 900, 1, 5 * S));
    rate_limit_change(&r, &c, 5 * S); // the same: no tokens given
    ck_assert(!rate_limit_take(&r, 101, 1, 5 * S));
    c.bytes.size = 50;
    rate_limit_change(&r, &c, 5 * S);
    ck_assert_uint_eq(rate_limit_wait(&r, 50, 1, 5 * S), 0); // had 100, keeps as many as fit
    ck_assert(rate_limit_take(&r, 50, 1, 5 * S));
    ck_assert(!rate_limit_take(&r, 1, 1, 5 * S));
    c.bytes.size = 100000;
    rate_limit_change(&r, &c, 5 * S);
    ck_assert(!rate_limit_take(&r, 1, 1, 5 * S)); // a larger one is not a gift
    ck_assert(rate_limit_take(&r, 100, 1, 5 * S + MS));
    ck_assert(rate_limit_take(&r, 1000000, 1, 6 * S + MS));
    rate_limit_change(&r, &c, 6 * S + MS);
    ck_assert_uint_gt(rate_limit_wait(&r, 1, 1, 6 * S + MS), S); // unchanged: so is the debt
    c.bytes.size = 10;
    rate_limit_change(&r, &c, 6 * S + MS);
    ck_assert_uint_eq(rate_limit_wait(&r, 1, 1, 6 * S + MS), 100 * MS); // the debt is forgiven
    c.bytes.size = 0;
    rate_limit_change(&r, &c, 6 * S + MS);
    ck_assert(rate_limit_take(&r, 1000000, 1, 6 * S + MS));
    c.ops = (struct rate_bucket_config) {.size = 3, .refill_ms = 10, .one_time_burst = 2};
    rate_limit_change(&r, &c, 6 * S + MS);
    ck_assert(rate_limit_take(&r, 1, 5, 6 * S + MS)); // starts full, with its burst
    ck_assert(!rate_limit_take(&r, 1, 1, 6 * S + MS));
}
END_TEST

START_TEST(words_are_parsed)
{
    static const struct {
        const char *word;
        int ret;
    } table[] = {
        {"bps=100M", 0},
        {"bps=0", 0},
        {"iops=1000", 0},
        {"burst-bytes=4K", 0},
        {"burst-ops=7", 0},
        {"bps=", -EINVAL},
        {"bps=-1", -EINVAL},
        {"bps=x", -EINVAL},
        {"iops=1K", -EINVAL},
        {"iops=1.5", -EINVAL},
        {"bps=512T", -EINVAL},
        {"iops=", -EINVAL},
        {"bps=256T", 0},
        {"iops", -ENOENT},
        {"", -ENOENT},
        {"ro", -ENOENT},
        {"burst=1", -ENOENT},
        {"bps =1", -ENOENT},
        {"=1", -ENOENT},
        {"BPS=1", -ENOENT},
        {"iops=281474976710657", -EINVAL},
        {"iops=99999999999999999999", -EINVAL},
    };
    for (size_t i = 0; i < ARRAY_SIZE(table); i++) {
        struct rate_limit_config c = {0};
        struct error err = {0};
        int ret = rate_limit_word(&c, table[i].word, strlen(table[i].word), &err);
        ck_assert_msg(ret == table[i].ret, "'%s': %d", table[i].word, ret);
        ck_assert_msg(!err.code == (ret != -EINVAL), "'%s': '%s'", table[i].word, err.text);
    }
    struct rate_limit_config c = {0};
    ck_assert_int_eq(rate_limit_word(&c, "bps=100M,iops=3", 8, NULL), 0); // len ends it
    ck_assert_int_eq(rate_limit_word(&c, "burst-bytes=1G", 14, NULL), 0);
    ck_assert_uint_eq(c.bytes.size, 100 * MiB);
    ck_assert_uint_eq(c.bytes.refill_ms, 1000);
    ck_assert_uint_eq(c.bytes.one_time_burst, GiB);
    ck_assert_int_eq(rate_limit_check(&c, NULL), 0);
    ck_assert_int_eq(rate_limit_key(&c, "burst-ops", "5", NULL), 0);
    ck_assert_int_eq(rate_limit_check(&c, NULL), -EINVAL);
    ck_assert_int_eq(rate_limit_key(&c, "iops", "50", NULL), 0);
    ck_assert_int_eq(rate_limit_check(&c, NULL), 0);

    json_t *out = json_object();
    rate_limit_show(&c, out);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "bps")), 100 * MiB);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "iops")), 50);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "burst-ops")), 5);
    json_decref(out);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("rate_limit");
    TCase *c = tcase_create("bucket");
    tcase_add_test(c, without_limits_all_passes);
    tcase_add_test(c, bucket_empties_and_fills);
    tcase_add_test(c, both_buckets_or_neither);
    tcase_add_test(c, larger_than_the_bucket);
    tcase_add_test(c, one_time_burst_comes_first_and_once);
    tcase_add_test(c, time_that_goes_back_gives_nothing);
    tcase_add_test(c, the_rate_holds);
    tcase_add_test(c, extremes_do_not_wrap);
    tcase_add_test(c, limits_change_in_use);
    suite_add_tcase(s, c);
    c = tcase_create("words");
    tcase_add_test(c, words_are_parsed);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
