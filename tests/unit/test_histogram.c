// SPDX-License-Identifier: Apache-2.0
#include <check.h>
#include <pthread.h>
#include <stdlib.h>

#include "vmm/histogram.h"

static unsigned bucket_of(uint64_t ns)
{
    struct histogram h = {0};
    histogram_add(&h, ns);
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
        if (h.counts[i])
            return i;
    return HISTOGRAM_BUCKETS;
}

START_TEST(bounds_are_inclusive)
{
    ck_assert_uint_eq(histogram_bound_ns(0), 1024);
    ck_assert_uint_eq(histogram_bound_ns(HISTOGRAM_BUCKETS - 2), UINT64_C(1) << 34);
    ck_assert_uint_eq(histogram_bound_ns(HISTOGRAM_BUCKETS - 1), UINT64_MAX);
    ck_assert_uint_eq(bucket_of(0), 0);
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS - 1; i++) {
        ck_assert_uint_eq(bucket_of(histogram_bound_ns(i)), i);
        ck_assert_uint_eq(bucket_of(histogram_bound_ns(i) + 1), i + 1);
    }
    ck_assert_uint_eq(bucket_of(UINT64_MAX), HISTOGRAM_BUCKETS - 1);
}
END_TEST

START_TEST(shows_what_is_not_empty)
{
    struct histogram h = {0};
    char *text;
    json_t *shown = histogram_show(&h);
    ck_assert_str_eq(text = json_dumps(shown, JSON_COMPACT),
                     "{\"count\":0,\"sum_ns\":0,\"le_ns\":{}}");
    free(text);
    json_decref(shown);
    histogram_add(&h, 1000);
    histogram_add(&h, 1024);
    histogram_add(&h, 3000);
    histogram_add(&h, UINT64_C(1) << 40);
    shown = histogram_show(&h);
    ck_assert_str_eq(text = json_dumps(shown, JSON_COMPACT),
                     "{\"count\":4,\"sum_ns\":1099511632800,"
                     "\"le_ns\":{\"1024\":2,\"4096\":1,\"+Inf\":1}}");
    free(text);
    json_decref(shown);
}
END_TEST

enum { THREADS = 4, ROUNDS = 20000 };

static void *adder(void *arg)
{
    for (unsigned i = 0; i < ROUNDS; i++)
        histogram_add(arg, i);
    return NULL;
}

START_TEST(threads_lose_nothing)
{
    struct histogram h = {0};
    pthread_t threads[THREADS];
    for (unsigned i = 0; i < THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, adder, &h), 0);
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    json_t *shown = histogram_show(&h);
    ck_assert_int_eq(json_integer_value(json_object_get(shown, "count")), THREADS * ROUNDS);
    ck_assert_int_eq(json_integer_value(json_object_get(shown, "sum_ns")),
                     (json_int_t)THREADS * ROUNDS * (ROUNDS - 1) / 2);
    json_decref(shown);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("histogram");
    TCase *tc = tcase_create("histogram");
    tcase_add_test(tc, bounds_are_inclusive);
    tcase_add_test(tc, shows_what_is_not_empty);
    tcase_add_test(tc, threads_lose_nothing);
    suite_add_tcase(s, tc);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
