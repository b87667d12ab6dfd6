// SPDX-License-Identifier: Apache-2.0
// Sockets of every kind that listen at a path: whoever sees the name is heard.
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "devices/console.h"
#include "migrate/channel.h"
#include "sched/daemon.h"
#include "vmm/http.h"
#include "vmm/listen.h"
#include "vmm/util.h"

enum { ROUNDS = 1000, LONGEST = sizeof(((struct sockaddr_un *)0)->sun_path) - 1 };

static char dir[64];

static void dir_make(void)
{
    strcpy(dir, "/tmp/ferry-listen-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void dir_end(void)
{
    ck_assert_msg(!rmdir(dir), "something is left in %s", dir);
}

static struct sockaddr_un address_of(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    ck_assert_uint_le(strlen(path), LONGEST);
    strcpy(addr.sun_path, path);
    return addr;
}

static int reach(const struct sockaddr_un *addr, int type)
{
    autoclose int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(fd, 0);
    return connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) ? errno : 0;
}

// --- a client that waits for the name, over and over, while sockets come and go

struct waiter {
    struct sockaddr_un addr;
    int type;
    pthread_t thread;
    atomic_uint wanted, heard; // rounds
    atomic_uint refused;
    atomic_bool end;
};

static void *waiter_main(void *arg)
{
    struct waiter *w = arg;
    while (!atomic_load(&w->end)) {
        unsigned round = atomic_load(&w->wanted);
        if (atomic_load(&w->heard) == round)
            continue;
        int error = reach(&w->addr, w->type);
        if (error && error != ENOENT)
            atomic_fetch_add(&w->refused, 1);
        if (error != ENOENT)
            atomic_store(&w->heard, round);
    }
    return NULL;
}

static void waiter_begin(struct waiter *w, const char *path, int type)
{
    *w = (struct waiter) {.addr = address_of(path), .type = type};
    ck_assert(!pthread_create(&w->thread, NULL, waiter_main, w));
}

static void waiter_round(struct waiter *w)
{
    atomic_fetch_add(&w->wanted, 1);
}

static void waiter_await(struct waiter *w)
{
    while (atomic_load(&w->heard) != atomic_load(&w->wanted))
        sched_yield();
}

static void waiter_finish(struct waiter *w)
{
    atomic_store(&w->end, true);
    ck_assert(!pthread_join(w->thread, NULL));
    ck_assert_uint_eq(atomic_load(&w->refused), 0);
}

START_TEST(the_api_is_there_with_its_name)
{
    struct waiter w;
    struct error err = {0};
    char path[100];
    dir_make();
    snprintf(path, sizeof(path), "%s/api.sock", dir);
    waiter_begin(&w, path, SOCK_STREAM);
    for (unsigned i = 0; i < ROUNDS; i++) {
        int fd;
        waiter_round(&w);
        ck_assert_msg(!http_listen(path, &fd, &err), "%s", err.text);
        waiter_await(&w);
        unlink(path); // before it refuses
        close(fd);
    }
    waiter_finish(&w);
    dir_end();
}
END_TEST

START_TEST(a_receiver_is_there_with_its_name)
{
    struct waiter w;
    struct error err = {0};
    char address[100];
    dir_make();
    snprintf(address, sizeof(address), "unix:%s/guest", dir);
    waiter_begin(&w, address + 5, SOCK_STREAM);
    for (unsigned i = 0; i < ROUNDS; i++) {
        int fd;
        waiter_round(&w);
        ck_assert_msg(!channel_listen(address, &fd, NULL, 0, &err), "%s", err.text);
        waiter_await(&w);
        unlink(address + 5);
        close(fd);
    }
    waiter_finish(&w);
    dir_end();
}
END_TEST

START_TEST(a_console_is_there_with_its_name)
{
    struct waiter w;
    struct error err = {0};
    struct console_config config;
    char text[100];
    dir_make();
    snprintf(text, sizeof(text), "unix:%s/console", dir);
    ck_assert(!console_parse(text, &config, &err));
    waiter_begin(&w, text + 5, SOCK_STREAM);
    for (unsigned i = 0; i < ROUNDS; i++) {
        struct loop *loop;
        struct console *console;
        ck_assert_msg(!loop_create(&loop, &err), "%s", err.text);
        waiter_round(&w);
        ck_assert_msg(!console_open(&console, &config, loop, &err), "%s", err.text);
        waiter_await(&w);
        loop_destroy(loop);
        console_close(console);
    }
    waiter_finish(&w);
    dir_end();
}
END_TEST

START_TEST(a_scheduler_is_there_with_its_name)
{
    static const struct log quiet = {.name = "sched", .level = LOG_ERROR, .fd = STDERR_FILENO};
    struct waiter w;
    struct error err = {0};
    char path[100];
    dir_make();
    snprintf(path, sizeof(path), "%s/sched.sock", dir);
    waiter_begin(&w, path, SOCK_SEQPACKET);
    for (unsigned i = 0; i < ROUNDS; i++) {
        const struct sched_daemon_config config = {.socket = path, .log = &quiet};
        struct sched_daemon *d;
        waiter_round(&w);
        ck_assert_msg(!sched_daemon_create(&d, &config, &err), "%s", err.text);
        waiter_await(&w);
        sched_daemon_destroy(d);
    }
    waiter_finish(&w);
    dir_end();
}
END_TEST

// --- names

START_TEST(what_is_there_stays)
{
    struct sockaddr_un addr;
    struct stat before, after;
    char path[100];
    dir_make();
    snprintf(path, sizeof(path), "%s/taken", dir);
    addr = address_of(path);
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM, 0), other = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(listen_unix(fd, &addr, 4), 0);
    ck_assert(!stat(path, &before));
    ck_assert_int_eq(listen_unix(other, &addr, 4), -EADDRINUSE);
    ck_assert_int_eq(errno, EADDRINUSE);
    ck_assert(!stat(path, &after) && before.st_ino == after.st_ino);
    ck_assert_int_eq(reach(&addr, SOCK_STREAM), 0);
    unlink(path);
    ck_assert(!symlink("nowhere", path));
    autoclose int third = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(listen_unix(third, &addr, 4), -EADDRINUSE);
    unlink(path);
    dir_end(); // empty: nothing of the attempts is left
}
END_TEST

START_TEST(failures_say_what)
{
    struct sockaddr_un addr;
    char path[100];
    dir_make();
    snprintf(path, sizeof(path), "%s/none/sock", dir);
    addr = address_of(path);
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(listen_unix(fd, &addr, 4), -ENOENT);
    ck_assert_int_eq(errno, ENOENT);
    dir_end();
}
END_TEST

// A name of the longest size, whose folder leaves much, little or no room for another.
START_TEST(long_names)
{
    static const unsigned bases[] = {60, 9, 8, 7, 6, 2, 1};
    dir_make();
    for (size_t i = 0; i < ARRAY_SIZE(bases); i++) {
        char folder[LONGEST + 1], path[LONGEST + 1];
        size_t len = LONGEST - bases[i] - 1; // of the folder
        memset(folder, 'd', len);
        memcpy(folder, dir, strlen(dir));
        folder[strlen(dir)] = len > strlen(dir) ? '/' : 0;
        folder[len] = 0;
        ck_assert_uint_gt(len, strlen(dir) + 1);
        ck_assert(!mkdir(folder, 0700));
        memset(path, 'n', LONGEST);
        memcpy(path, folder, len);
        path[len] = '/';
        path[LONGEST] = 0;
        struct sockaddr_un addr = address_of(path);
        autoclose int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        ck_assert_int_eq(listen_unix(fd, &addr, 4), 0);
        ck_assert_int_eq(reach(&addr, SOCK_STREAM), 0);
        ck_assert(!unlink(path));
        ck_assert_msg(!rmdir(folder), "something is left in %s", folder);
    }
    dir_end();
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("listen");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, the_api_is_there_with_its_name);
    tcase_add_test(tc, a_receiver_is_there_with_its_name);
    tcase_add_test(tc, a_console_is_there_with_its_name);
    tcase_add_test(tc, a_scheduler_is_there_with_its_name);
    tcase_add_test(tc, what_is_there_stays);
    tcase_add_test(tc, failures_say_what);
    tcase_add_test(tc, long_names);
    Suite *suite = suite_create("listen");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
