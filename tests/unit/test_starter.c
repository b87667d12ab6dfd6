// SPDX-License-Identifier: Apache-2.0
// A process under the loop's filter has a program started and ended by its starter.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vmm/seccomp.h"
#include "vmm/starter.h"

extern char **environ;

enum { ROOM = 100 };

// A shell with fds[0] as its output. It has no other descriptor of ours.
static int shell_start(void *script, const int fds[2], pid_t *pid, struct error *err)
{
    char *const argv[] = {"sh", "-c", script, NULL};
    posix_spawn_file_actions_t actions;
    if (!script)
        return error_set(err, -ENOENT, "no script");
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fds[0], STDOUT_FILENO);
    int ret = posix_spawn(pid, "/bin/sh", &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    return ret ? error_set(err, -ret, "posix_spawn") : 0;
}

struct rig {
    struct starter *starter;
    int out, fds[2]; // the program writes to fds[0]
};

static struct rig rig(char *script)
{
    struct rig r;
    struct error err;
    int ends[2];
    ck_assert_msg(!starter_create(&r.starter, shell_start, script, &err), "%s", err.text);
    ck_assert(!pipe2(ends, O_CLOEXEC));
    r.out = ends[0];
    r.fds[0] = r.fds[1] = ends[1];
    return r;
}

static void rig_end(struct rig *r)
{
    starter_destroy(r->starter);
    close(r->out);
    close(r->fds[0]);
}

static void line_read(int fd, char *text)
{
    size_t n = 0;
    while (n < ROOM - 1 && read(fd, text + n, 1) == 1 && text[n] != '\n')
        n++;
    text[n] = 0;
}

START_TEST(starts_ends_and_starts_again)
{
    struct rig r = rig("echo $$; exec sleep 1000");
    char text[ROOM];
    pid_t last = 0;
    for (unsigned i = 0; i < 3; i++) {
        ck_assert(!starter_start(r.starter, r.fds, NULL));
        line_read(r.out, text);
        pid_t pid = atoi(text);
        ck_assert_int_gt(pid, 1);
        ck_assert_int_eq(kill(pid, 0), 0);
        ck_assert(!last || kill(last, 0)); // the one before has ended
        last = pid;
    }
    starter_end(r.starter);
    ck_assert(kill(last, 0) && errno == ESRCH);
    rig_end(&r);
}
END_TEST

START_TEST(says_what_failed)
{
    struct rig r = rig(NULL);
    struct error err;
    ck_assert_int_eq(starter_start(r.starter, r.fds, &err), -ENOENT);
    ck_assert_str_eq(err.text, "no script");
    starter_end(r.starter); // nothing there: no harm
    rig_end(&r);
}
END_TEST

// Whoever waits for our end of a pipe is not kept waiting by the starter.
START_TEST(keeps_nothing_open)
{
    int ends[2];
    char byte;
    ck_assert(!pipe(ends));
    struct rig r = rig("exec sleep 1000");
    ck_assert(!starter_start(r.starter, r.fds, NULL));
    close(ends[1]);
    ck_assert_int_eq(read(ends[0], &byte, 1), 0);
    close(ends[0]);
    rig_end(&r);
}
END_TEST

// The maker is killed: its starter and the program go with it.
START_TEST(ends_with_its_maker)
{
    int ends[2];
    char text[ROOM];
    ck_assert(!pipe(ends));
    pid_t maker = fork();
    if (!maker) {
        struct starter *s;
        const int fds[2] = {ends[1], ends[1]};
        if (starter_create(&s, shell_start, "echo here; exec sleep 1000", NULL) ||
            starter_start(s, fds, NULL))
            _exit(1);
        close(ends[1]);
        pause();
    }
    close(ends[1]);
    line_read(ends[0], text);
    ck_assert_str_eq(text, "here");
    kill(maker, SIGKILL);
    ck_assert_int_eq(waitpid(maker, NULL, 0), maker);
    ck_assert_int_eq(read(ends[0], text, 1), 0); // the last writer has gone
    close(ends[0]);
}
END_TEST

START_TEST(works_behind_a_filter)
{
    int status;
    pid_t pid = fork();
    if (!pid) {
        struct rig r = rig("echo started");
        struct error err;
        char text[ROOM], *const argv[] = {"sh", NULL};
        pid_t child;
        if (seccomp_enter(SECCOMP_LOOP, SECCOMP_ON, &err))
            _exit(1);
        if (posix_spawn(&child, "/bin/sh", NULL, NULL, argv, environ) != EPERM)
            _exit(2);
        if (starter_start(r.starter, r.fds, &err))
            _exit(3);
        line_read(r.out, text);
        rig_end(&r);
        _exit(strcmp(text, "started") ? 4 : 0);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status) && !WEXITSTATUS(status), "status %#x", status);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("starter");
    TCase *tc = tcase_create("starter");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, starts_ends_and_starts_again);
    tcase_add_test(tc, says_what_failed);
    tcase_add_test(tc, keeps_nothing_open);
    tcase_add_test(tc, ends_with_its_maker);
    if (SECCOMP_USABLE)
        tcase_add_test(tc, works_behind_a_filter);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
