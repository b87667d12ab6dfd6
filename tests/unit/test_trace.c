// SPDX-License-Identifier: Apache-2.0
#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/trace.h"
#include "vmm/util.h"

// Not inline: gcc 12 takes the stream's buffer for a local variable then.
__attribute__((noinline)) static char *table_text(struct trace *trace)
{
    char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);
    trace_table(trace, out);
    fclose(out);
    return text;
}

START_TEST(counts_per_kind_and_address)
{
    struct trace *trace = trace_create(false);
    for (unsigned i = 0; i < 300; i++)
        trace_exit(trace, 0, 0, TRACE_PIO_OUT, 0x3f8, 1, 'x', "serial");
    for (unsigned i = 0; i < 20; i++)
        trace_exit(trace, 1, 0, TRACE_PIO_IN, 0x3f8, 1, 0, "serial");
    trace_exit(trace, 1, 0, TRACE_MMIO_READ, 0xd0000000, 4, 0, "virtio0");
    char *text = table_text(trace);
    ck_assert_ptr_nonnull(strstr(text, "321 exits"));
    const char *first = strstr(text, " 300 "), *second = strstr(text, " 20 "),
               *third = strstr(text, "virtio0");
    ck_assert(first && second && third && first < second && second < third); // most first
    ck_assert_ptr_nonnull(strstr(text, "pio out"));
    ck_assert_ptr_nonnull(strstr(text, "0xd0000000"));
    free(text);
    trace_destroy(trace);
    trace_destroy(NULL);
}
END_TEST

// A guest that touches every port does not make the table grow; nothing goes uncounted.
START_TEST(too_many_addresses)
{
    struct trace *trace = trace_create(false);
    for (unsigned port = 0; port < 65536; port++)
        trace_exit(trace, 0, 0, TRACE_PIO_IN, port, 1, 0, "(nothing)");
    char *text = table_text(trace);
    ck_assert_ptr_nonnull(strstr(text, "65536 exits"));
    unsigned lines = 0;
    for (const char *p = text; (p = strchr(p, '\n')); p++)
        lines++;
    ck_assert_uint_eq(lines, 2 + 1024 + 1);
    ck_assert_ptr_nonnull(strstr(text, " 64512  ")); // 65536 - 1024
    free(text);
    trace_destroy(trace);
}
END_TEST

static void *exits_main(void *arg)
{
    for (unsigned i = 0; i < 20000; i++)
        trace_exit(arg, 0, 0, TRACE_OTHER, i % 7, 0, 0, "reason");
    return NULL;
}

START_TEST(several_threads)
{
    struct trace *trace = trace_create(false);
    pthread_t threads[4];
    for (unsigned i = 0; i < 4; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, exits_main, trace), 0);
    for (unsigned i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    autofree char *text = table_text(trace);
    ck_assert_ptr_nonnull(strstr(text, "80000 exits"));
    trace_destroy(trace);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("trace");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, counts_per_kind_and_address);
    tcase_add_test(tc, too_many_addresses);
    tcase_add_test(tc, several_threads);
    Suite *suite = suite_create("trace");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
