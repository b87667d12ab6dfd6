// SPDX-License-Identifier: Apache-2.0
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vmm/stream.h"
#include "vmm/util.h"

START_TEST(memory_round_trip)
{
    struct stream_mem out, in;
    struct error err;
    stream_mem_writer(&out, "out", 1 << 20);
    ck_assert_int_eq(stream_write(&out.stream, NULL, 0, &err), 0); // nothing, before anything
    for (unsigned i = 0; i < 20000; i++)
        ck_assert_int_eq(stream_put(&out.stream, i * 0x0101010101010101ull, 1 + i % 8, &err), 0);
    stream_mem_reader(&in, "in", out.data, out.len);
    for (unsigned i = 0; i < 20000; i++) {
        unsigned bytes = 1 + i % 8;
        uint64_t value, mask = bytes == 8 ? ~0ull : (1ull << 8 * bytes) - 1;
        ck_assert_int_eq(stream_get(&in.stream, &value, bytes, &err), 0);
        ck_assert_uint_eq(value, (i * 0x0101010101010101ull) & mask);
    }
    uint64_t value;
    ck_assert_int_eq(stream_get(&in.stream, &value, 1, &err), -ENODATA);
    ck_assert_int_eq(stream_read(&in.stream, NULL, 0, &err), 0);
    stream_mem_free(&out);
    stream_mem_free(&in); // the caller's buffer: not freed twice
    stream_mem_free(&out);
}
END_TEST

START_TEST(integers_are_little_endian)
{
    struct stream_mem out;
    struct error err;
    stream_mem_writer(&out, "out", 16);
    ck_assert_int_eq(stream_put(&out.stream, 0x1122334455667788, 8, &err), 0);
    ck_assert_mem_eq(out.data, "\x88\x77\x66\x55\x44\x33\x22\x11", 8);
    stream_mem_free(&out);
}
END_TEST

START_TEST(limits)
{
    struct stream_mem m;
    struct error err;
    char data[16] = {0};
    stream_mem_writer(&m, "small", 10);
    ck_assert_int_eq(stream_write(&m.stream, data, 10, &err), 0);
    ck_assert_int_eq(stream_write(&m.stream, data, 1, &err), -EFBIG);
    ck_assert_ptr_nonnull(strstr(err.text, "small"));
    ck_assert_int_eq(stream_write(&m.stream, data, SIZE_MAX, &err), -EFBIG);
    ck_assert_uint_eq(m.len, 10);
    ck_assert_int_eq(stream_read(&m.stream, data, 11, &err), -ENODATA);
    ck_assert_int_eq(stream_read(&m.stream, data, SIZE_MAX, &err), -ENODATA);
    ck_assert_uint_eq(m.pos, 0);                                 // nothing was taken
    ck_assert_int_eq(stream_read(&m.stream, data, 10, &err), 0); // a writer can be read back
    stream_mem_free(&m);
    stream_mem_reader(&m, "fixed", data, sizeof(data));
    ck_assert_int_eq(stream_write(&m.stream, data, 1, &err), -EFBIG); // never the caller's buffer
    stream_mem_free(&m);
}
END_TEST

START_TEST(descriptors)
{
    struct stream_fd s;
    struct error err;
    int fds[2];
    char data[4];
    ck_assert_int_eq(pipe(fds), 0);
    stream_fd_init(&s, "pipe of the test", fds[1]);
    ck_assert_int_eq(stream_put(&s.stream, 0x04030201, 4, &err), 0);
    ck_assert_uint_eq(s.offset, 4);
    close(fds[1]);
    stream_fd_init(&s, "pipe of the test", fds[0]);
    ck_assert_int_eq(stream_read(&s.stream, data, 3, &err), 0);
    ck_assert_int_eq(stream_read(&s.stream, data, 3, &err), -ENODATA);
    ck_assert_ptr_nonnull(strstr(err.text, "pipe of the test"));
    ck_assert_ptr_nonnull(strstr(err.text, "offset 3"));
    close(fds[0]);
    ck_assert_int_eq(stream_write(&s.stream, data, 1, &err), -EBADF);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("stream");
    tcase_add_test(tc, memory_round_trip);
    tcase_add_test(tc, integers_are_little_endian);
    tcase_add_test(tc, limits);
    tcase_add_test(tc, descriptors);
    Suite *suite = suite_create("stream");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
