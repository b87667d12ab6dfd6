// SPDX-License-Identifier: Apache-2.0
// vmm/util, vmm/error, vmm/log.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/util.h"

START_TEST(sizes_are_parsed)
{
    static const struct {
        const char *text;
        int ret;
        uint64_t bytes;
    } table[] = {
        {"0", 0, 0},
        {"64", 0, 64 * MiB}, // plain numbers count units
        {"1K", 0, 1024},
        {"512M", 0, 512 * MiB},
        {"512m", 0, 512 * MiB},
        {"512MB", 0, 512 * MiB},
        {"512MiB", 0, 512 * MiB},
        {"3G", 0, 3 * GiB},
        {"2T", 0, 2048 * GiB},
        {"16777215T", 0, 16777215ull << 40},
        {"16777216T", -ERANGE, 0},
        {"17592186044415", 0, 17592186044415ull * MiB},
        {"17592186044416", -ERANGE, 0},
        {"18446744073709551616", -ERANGE, 0},
        {"99999999999999999999999G", -ERANGE, 0},
        {"", -EINVAL, 0},
        {" 1", -EINVAL, 0},
        {"+1", -EINVAL, 0},
        {"-1", -EINVAL, 0},
        {"0x10", -EINVAL, 0},
        {"1.5G", -EINVAL, 0},
        {"1 G", -EINVAL, 0},
        {"1P", -EINVAL, 0},
        {"1MM", -EINVAL, 0},
        {"1Mi", -EINVAL, 0},
        {"1MiBx", -EINVAL, 0},
        {"G", -EINVAL, 0},
        {"lots", -EINVAL, 0},
    };
    for (size_t i = 0; i < ARRAY_SIZE(table); i++) {
        uint64_t bytes = 4711;
        int ret = size_parse(table[i].text, MiB, &bytes);
        ck_assert_msg(ret == table[i].ret, "'%s': %d, expected %d", table[i].text, ret,
                      table[i].ret);
        ck_assert_uint_eq(bytes, ret ? 4711 : table[i].bytes);
    }
}
END_TEST

START_TEST(arithmetic)
{
    ck_assert_uint_eq(align_up(0, 4096), 0);
    ck_assert_uint_eq(align_up(1, 4096), 4096);
    ck_assert_uint_eq(align_up(4096, 4096), 4096);
    ck_assert_uint_eq(align_down(4095, 4096), 0);
    ck_assert(range_within(0, 0, 0));
    ck_assert(range_within(5, 5, 10));
    ck_assert(!range_within(5, 6, 10));
    ck_assert(!range_within(11, 0, 10));
    ck_assert(!range_within(UINT64_MAX, 2, 10));
    ck_assert(!range_within(2, UINT64_MAX, 10));
    ck_assert(range_within(0, UINT64_MAX, UINT64_MAX));
}
END_TEST

START_TEST(whole_reads_and_writes)
{
    int fds[2];
    char in[8] = {0};
    ck_assert_int_eq(pipe(fds), 0);
    ck_assert_int_eq(write_all(fds[1], "12345678", 8), 0);
    ck_assert_int_eq(read_all(fds[0], in, 8), 0);
    ck_assert_mem_eq(in, "12345678", 8);
    ck_assert_int_eq(write_all(fds[1], "abc", 3), 0);
    close(fds[1]);
    ck_assert_int_eq(read_all(fds[0], in, 4), -ENODATA);
    ck_assert_int_eq(read_all(fds[0], in, 0), 0);
    close(fds[0]);
    ck_assert_int_eq(read_all(fds[0], in, 1), -EBADF);
    ck_assert_int_eq(write_all(fds[0], in, 1), -EBADF);
}
END_TEST

START_TEST(errors_say_what)
{
    struct error err = {0};
    ck_assert_int_eq(error_set(&err, -EINVAL, "%s %d", "thing", 7), -EINVAL);
    ck_assert_int_eq(err.code, -EINVAL);
    ck_assert_str_eq(err.text, "thing 7");
    ck_assert_int_eq(error_prefix(&err, "while %s", "testing"), -EINVAL);
    ck_assert_str_eq(err.text, "while testing: thing 7");
    errno = ENOENT;
    ck_assert_int_eq(error_errno(&err, "file %s", "x"), -ENOENT);
    ck_assert_str_eq(err.text, "file x: No such file or directory");
    // Without an object, and with more text than fits.
    ck_assert_int_eq(error_set(NULL, -EIO, "nobody listens"), -EIO);
    errno = EPERM;
    ck_assert_int_eq(error_errno(NULL, "nobody"), -EPERM);
    char big[2 * ERROR_TEXT_MAX];
    memset(big, 'x', sizeof(big) - 1);
    big[sizeof(big) - 1] = 0;
    error_set(&err, -EIO, "%s", big);
    ck_assert_uint_eq(strlen(err.text), ERROR_TEXT_MAX - 1);
    ck_assert_int_eq(error_prefix(&err, "%s", big), -EIO);
    ck_assert_uint_eq(strlen(err.text), ERROR_TEXT_MAX - 1);
    ck_assert_int_eq(error_prefix(&err, "short"), -EIO);
    ck_assert_int_eq(strncmp(err.text, "short: xxx", 10), 0);
    errno = EIO;
    error_errno(&err, "%s", big);
    ck_assert_uint_eq(strlen(err.text), ERROR_TEXT_MAX - 1);
}
END_TEST

static size_t log_take(int fd, char *text, size_t size)
{
    ssize_t n = pread(fd, text, size - 1, 0);
    ck_assert_int_ge(n, 0);
    text[n] = 0;
    return (size_t)n;
}

START_TEST(log_lines)
{
    char text[16384], path[] = "/tmp/ferry-test-log-XXXXXX";
    autoclose int fd = mkstemp(path);
    unlink(path);
    const struct log log = {.name = "vm1", .level = LOG_INFO, .fd = fd};
    log_write(&log, LOG_WARN, "disk %d", 3);
    log_write(&log, LOG_DEBUG, "not shown");
    log_write(&log, LOG_INFO, "%08000d", 1); // longer than a line may be
    size_t len = log_take(fd, text, sizeof(text));
    ck_assert_int_eq(strncmp(text, "ferry: vm1: warning: disk 3\nferry: vm1: 000", 42), 0);
    ck_assert_uint_lt(len, 8000);
    ck_assert_int_eq(text[len - 1], '\n');
    ck_assert_ptr_null(strstr(text, "not shown"));
}
END_TEST

START_TEST(log_flood_is_limited)
{
    char text[65536], path[] = "/tmp/ferry-test-log-XXXXXX";
    autoclose int fd = mkstemp(path);
    unlink(path);
    const struct log log = {.level = LOG_INFO, .fd = fd};
    struct log_limit limit = {0};
    uint64_t start = time_ns();
    for (unsigned i = 0; i < 100000; i++)
        log_limited(&log, &limit, LOG_INFO, "again");
    uint64_t seconds = (time_ns() - start) / 1000000000u + 2; // that the flood may have touched
    log_take(fd, text, sizeof(text));
    unsigned lines = 0;
    for (const char *p = text; (p = strstr(p, "again\n")); p++)
        lines++;
    ck_assert_uint_ge(lines, 10);
    ck_assert_uint_le(lines, 10 * seconds);
}
END_TEST

// --- threads that start others

struct started {
    struct thread_attr at_first, ordinary;
};

static void *attr_main(void *arg)
{
    struct started *s = arg;
    ck_assert(!thread_attr_get(0, &s->at_first));
    thread_ordinary();
    ck_assert(!thread_attr_get(0, &s->ordinary));
    return NULL;
}

static struct started start_one(void)
{
    struct started s;
    pthread_t thread;
    ck_assert(!pthread_create(&thread, NULL, attr_main, &s));
    ck_assert(!pthread_join(thread, NULL));
    return s;
}

// Whatever a thread that was prompt starts has its niceness; a vCPU has an ordinary slice.
START_TEST(promptness_is_not_passed_on)
{
    struct thread_attr before, prompt;
    ck_assert(!thread_attr_get(0, &before));
    const int levels[] = {before.nice, 19, -5};
    for (size_t i = 0; i < ARRAY_SIZE(levels); i++) {
        pid_t child = fork(); // a priority cannot be raised again by everybody
        if (!child) {
            if (setpriority(PRIO_PROCESS, 0, levels[i]))
                _exit(errno == EACCES && levels[i] < 0 ? 77 : 1);
            thread_prompt();
            ck_assert(!thread_attr_get(0, &prompt));
            ck_assert_int_eq(prompt.nice, levels[i]);
            struct started s = start_one();
            ck_assert_int_eq(s.at_first.nice, prompt.nice);
            ck_assert_int_eq(s.ordinary.nice, prompt.nice);
            ck_assert_uint_eq(s.ordinary.runtime, before.runtime);
            if (prompt.nice >= 0)
                ck_assert_uint_eq(s.at_first.runtime, before.runtime);
            _exit(0);
        }
        int status;
        ck_assert_int_eq(waitpid(child, &status, 0), child);
        ck_assert(WIFEXITED(status));
        if (WEXITSTATUS(status) == 77)
            printf("niceness %d: not allowed here\n", levels[i]);
        else
            ck_assert_int_eq(WEXITSTATUS(status), 0);
    }
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("util");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, sizes_are_parsed);
    tcase_add_test(tc, arithmetic);
    tcase_add_test(tc, whole_reads_and_writes);
    tcase_add_test(tc, errors_say_what);
    tcase_add_test(tc, log_lines);
    tcase_add_test(tc, log_flood_is_limited);
    tcase_add_test(tc, promptness_is_not_passed_on);
    Suite *suite = suite_create("util");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
