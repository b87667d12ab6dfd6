// SPDX-License-Identifier: Apache-2.0
// Commands over the real socket, with clients that behave and clients that do not. The VM is only a
// name and a loop: the commands here are the test's own.
#include <check.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "vmm/control.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { LINE = 64 * 1024, CONNS = 64 };

struct server {
    struct vm vm;
    struct control *control;
    pthread_t thread;
    char dir[64], path[100];
    pthread_t workers[8]; // of the command "slow"
    _Atomic unsigned nr_workers;
    struct control_request *kept; // by the command "keep"
};

// --- commands

static void cmd_echo(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    control_reply_ok(req, json_pack("{s:O}", "args", args));
}

static void cmd_fail(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct error err;
    const char *text = json_string_value(json_object_get(args, "text"));
    error_set(&err, -EBUSY, "%s", text ? text : "always \xff busy"); // not even UTF-8
    control_reply_error(req, &err);
}

static void cmd_big(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    size_t len = (size_t)json_integer_value(json_object_get(args, "bytes"));
    autofree char *text = malloc(len + 1);
    memset(text, 'x', len);
    control_reply_ok(req, json_pack("{s:s#}", "text", text, (int)len));
}

static void *slow_main(void *arg)
{
    for (int i = 0; i < 3; i++)
        control_event(arg, json_pack("{s:i}", "step", i));
    control_reply_ok(arg, NULL);
    return NULL;
}

static void cmd_slow(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct server *s = context;
    unsigned n = atomic_fetch_add(&s->nr_workers, 1);
    ck_assert_uint_lt(n, ARRAY_SIZE(s->workers));
    ck_assert_int_eq(pthread_create(&s->workers[n], NULL, slow_main, req), 0);
}

static void cmd_keep(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct server *s = context;
    s->kept = req; // answered by the next command "release"
}

static void cmd_release(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct server *s = context;
    control_reply_ok(s->kept, NULL);
    s->kept = NULL;
    control_reply_ok(req, NULL);
}

static const struct control_command commands[] = {
    {"echo", "", cmd_echo, NULL}, {"fail", "", cmd_fail, NULL}, {"big", "", cmd_big, NULL},
    {"slow", "", cmd_slow, NULL}, {"keep", "", cmd_keep, NULL}, {"release", "", cmd_release, NULL},
};

// --- the server

static void *server_main(void *arg)
{
    struct server *s = arg;
    struct error err;
    ck_assert_msg(!loop_run(s->vm.loop, &err), "%s", err.text);
    return NULL;
}

static void server_start(struct server *s)
{
    struct error err;
    memset(s, 0, sizeof(*s));
    snprintf(s->dir, sizeof(s->dir), "/tmp/ferry-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(s->dir));
    snprintf(s->path, sizeof(s->path), "%s/vm.sock", s->dir);
    snprintf(s->vm.name, sizeof(s->vm.name), "test");
    ck_assert_int_eq(loop_create(&s->vm.loop, &err), 0);
    ck_assert_int_eq(control_create(&s->control, &s->vm, &err), 0);
    ck_assert_int_eq(control_add(s->control, commands, 3, s, &err), 0);
    ck_assert_int_eq(control_add(s->control, commands + 3, ARRAY_SIZE(commands) - 3, s, &err), 0);
    ck_assert_msg(!control_listen(s->control, s->path, &err), "%s", err.text);
    ck_assert_int_eq(pthread_create(&s->thread, NULL, server_main, s), 0);
}

static void server_end(struct server *s)
{
    loop_stop(s->vm.loop);
    pthread_join(s->thread, NULL);
    for (unsigned i = 0; i < s->nr_workers; i++)
        pthread_join(s->workers[i], NULL);
    struct error err;
    ck_assert_int_eq(loop_turn(s->vm.loop, false, &err), 0); // late answers
    control_destroy(s->control);
    loop_destroy(s->vm.loop);
    ck_assert_int_eq(access(s->path, F_OK), -1); // the socket is gone
    ck_assert_int_eq(rmdir(s->dir), 0);
}

// --- raw clients

static int dial(struct server *s)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    strcpy(addr.sun_path, s->path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
    return fd;
}

static void say(int fd, const char *text)
{
    ck_assert_int_eq(write_all(fd, text, strlen(text)), 0);
}

// The next line, or "" when the server has closed.
static const char *hear(int fd, char *line, size_t size)
{
    size_t len = 0;
    while (len < size - 1 && read(fd, line + len, 1) == 1)
        if (line[len++] == '\n')
            break;
    line[len] = 0;
    return line;
}

static void expect(int fd, const char *part)
{
    char line[4096];
    hear(fd, line, sizeof(line));
    ck_assert_msg(strstr(line, part) != NULL, "\"%s\" has no \"%s\"", line, part);
}

static int call(struct server *s, const char *cmd, json_t *args, json_t **result, struct error *err)
{
    int ret = control_call(s->path, cmd, args, result, NULL, NULL, err);
    json_decref(args);
    return ret;
}

// It still works after whatever was done to it.
static void works(struct server *s)
{
    struct error err;
    json_t *result;
    ck_assert_msg(!call(s, "echo", json_pack("{s:i}", "n", 7), &result, &err), "%s", err.text);
    ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(result, "args"), "n")), 7);
    json_decref(result);
}

// --- tests

START_TEST(commands_and_errors)
{
    struct server s;
    struct error err;
    json_t *result;
    server_start(&s);
    for (unsigned i = 0; i < 100; i++)
        works(&s);
    ck_assert_int_eq(call(&s, "fail", json_pack("{s:s}", "text", "busy today"), &result, &err),
                     -EBUSY);
    ck_assert_str_eq(err.text, "busy today");
    ck_assert_ptr_null(result);
    ck_assert_int_eq(call(&s, "nonsense", NULL, NULL, &err), -ENOSYS);
    ck_assert_ptr_nonnull(strstr(err.text, "nonsense"));
    struct stat st;
    ck_assert_int_eq(stat(s.path, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0600);
    server_end(&s);
    ck_assert_int_eq(call(&s, "echo", NULL, NULL, &err), -ENOENT);
}
END_TEST

static void count_event(json_t *event, void *arg)
{
    unsigned *count = arg;
    ck_assert_int_eq(json_integer_value(json_object_get(event, "step")), *count);
    ++*count;
}

START_TEST(events_come_before_the_answer)
{
    struct server s;
    struct error err;
    server_start(&s);
    for (unsigned i = 0; i < 8; i++) {
        unsigned events = 0;
        ck_assert_int_eq(control_call(s.path, "slow", NULL, NULL, count_event, &events, &err), 0);
        ck_assert_uint_eq(events, 3);
    }
    server_end(&s);
}
END_TEST

// An error text that is no UTF-8, or was cut inside a character, must still be answered.
START_TEST(any_error_text_is_answered)
{
    struct server s;
    struct error err;
    server_start(&s);
    ck_assert_int_eq(call(&s, "fail", NULL, NULL, &err), -EBUSY);
    ck_assert_ptr_nonnull(strstr(err.text, "busy"));
    for (unsigned shift = 0; shift < 3; shift++) {
        char name[1600] = "";
        memset(name, 'a', shift);
        for (size_t at = shift; at < sizeof(name) - 4; at += 3)
            memcpy(name + at, "\xe2\x82\xac", 4); // the euro sign
        ck_assert_int_eq(call(&s, name, NULL, NULL, &err), -ENOSYS);
    }
    server_end(&s);
}
END_TEST

START_TEST(malformed_lines_are_answered)
{
    static const char *const lines[] = {
        "\n",
        "{\n",
        "[]\n",
        "7\n",
        "null\n",
        "\"echo\"\n",
        "{}\n",
        "{\"cmd\":7}\n",
        "{\"cmd\":null}\n",
        "{\"cmd\":\"echo\",\"args\":[]}\n",
        "{\"cmd\":\"echo\",\"args\":1}\n",
        "{\"cmd\":\"echo\",\"more\":1}\n",
        "{\"cmd\":\"echo\",\"cmd\":\"echo\"}\n",
        "{\"cmd\":\"echo\"} {}\n",
        "{\"cmd\":\"ec\\u0000ho\"}\n",
        "\xff\xfe\n",
        "{\"cmd\":\"\xc3\"}\n",
        "GET / HTTP/1.1\r\n",
    };
    struct server s;
    server_start(&s);
    int fd = dial(&s);
    for (size_t i = 0; i < ARRAY_SIZE(lines); i++) {
        say(fd, lines[i]);
        expect(fd, "\"error\"");
    }
    say(fd, "{\"cmd\":\"echo\"}\n"); // the same connection goes on
    expect(fd, "\"ok\"");
    // Deep nesting is refused, not followed.
    autofree char *deep = malloc(60001);
    memset(deep, '[', 60000);
    deep[59999] = '\n';
    deep[60000] = 0;
    say(fd, deep);
    expect(fd, "\"error\"");
    close(fd);
    works(&s);
    server_end(&s);
}
END_TEST

START_TEST(requests_may_come_in_pieces_and_heaps)
{
    struct server s;
    server_start(&s);
    int fd = dial(&s);
    const char *request = "{\"cmd\":\"echo\",\"args\":{\"n\":1}}\n";
    for (const char *p = request; *p; p++)
        ck_assert_int_eq(write(fd, p, 1), 1);
    expect(fd, "\"n\":1");
    char many[8192] = "";
    for (unsigned i = 0; i < 100; i++)
        sprintf(many + strlen(many), "{\"cmd\":\"echo\",\"args\":{\"n\":%u}}\n", i);
    say(fd, many);
    for (unsigned i = 0; i < 100; i++) { // in order
        char part[32];
        sprintf(part, "\"n\":%u}", i);
        expect(fd, part);
    }
    close(fd);
    server_end(&s);
}
END_TEST

START_TEST(huge_lines_end_the_connection)
{
    struct server s;
    char line[64];
    server_start(&s);
    int fd = dial(&s);
    autofree char *text = malloc(LINE);
    memset(text, ' ', LINE);
    memcpy(text, "{\"cmd\":\"echo\"", 13);
    text[LINE - 2] = '}';
    text[LINE - 1] = '\n'; // just fits
    ck_assert_int_eq(write_all(fd, text, LINE), 0);
    expect(fd, "\"ok\"");
    text[LINE - 1] = ' ';
    ck_assert_int_eq(write_all(fd, text, LINE), 0);
    ck_assert_str_eq(hear(fd, line, sizeof(line)), "");
    close(fd);
    works(&s);
    server_end(&s);
}
END_TEST

START_TEST(clients_that_leave)
{
    struct server s;
    server_start(&s);
    for (unsigned i = 0; i < 50; i++) {
        int fd = dial(&s);
        if (i % 3 == 1)
            say(fd, "{\"cmd\":\"ec"); // in the middle
        else if (i % 3 == 2)
            say(fd, "{\"cmd\":\"echo\"}\n{\"cmd\":\"echo\"}\n"); // without hearing the answer
        close(fd);
    }
    // Gone before a long command answers.
    int fd = dial(&s);
    say(fd, "{\"cmd\":\"keep\"}\n{\"cmd\":\"echo\"}\n");
    expect(fd, "\"ok\"");
    close(fd);
    works(&s);
    struct error err;
    ck_assert_int_eq(call(&s, "release", NULL, NULL, &err), 0);
    works(&s);
    server_end(&s);
}
END_TEST

// `echo ... | nc -N -U`: the client says it has nothing more to say, and waits for its answer.
START_TEST(half_closed_clients_get_their_answer)
{
    struct server s;
    char line[64];
    server_start(&s);
    int fd = dial(&s);
    say(fd, "{\"cmd\":\"keep\"}\n{\"cmd\":\"echo\"}\n");
    ck_assert_int_eq(shutdown(fd, SHUT_WR), 0);
    expect(fd, "\"ok\"");
    struct error err;
    ck_assert_int_eq(call(&s, "release", NULL, NULL, &err), 0);
    expect(fd, "\"ok\"");
    ck_assert_str_eq(hear(fd, line, sizeof(line)), ""); // then it is closed
    close(fd);
    fd = dial(&s);
    ck_assert_int_eq(shutdown(fd, SHUT_WR), 0); // nothing asked: closed at once
    ck_assert_str_eq(hear(fd, line, sizeof(line)), "");
    close(fd);
    server_end(&s);
}
END_TEST

START_TEST(slow_readers_are_dropped)
{
    struct server s;
    server_start(&s);
    int fd = dial(&s);
    // Asks for far more than the socket holds and reads nothing.
    const char *request = "{\"cmd\":\"big\",\"args\":{\"bytes\":60000}}\n";
    for (unsigned i = 0; i < 64; i++)
        if (send(fd, request, strlen(request), MSG_NOSIGNAL) < 0)
            break; // dropped already
    works(&s);     // nobody waits for it
    struct pollfd p = {.fd = fd, .events = POLLRDHUP};
    ck_assert_int_eq(poll(&p, 1, 60000), 1);
    close(fd);
    server_end(&s);
}
END_TEST

START_TEST(too_many_clients)
{
    struct server s;
    char line[64];
    struct error err;
    server_start(&s);
    int fds[CONNS];
    for (unsigned i = 0; i < CONNS; i++) {
        fds[i] = dial(&s);
        say(fds[i], "{\"cmd\":\"echo\"}\n");
        expect(fds[i], "\"ok\"");
    }
    int fd = dial(&s);
    ck_assert_str_eq(hear(fd, line, sizeof(line)), ""); // one too many
    close(fd);
    // An error value for our own client too, not a death by SIGPIPE.
    ck_assert_int_lt(call(&s, "echo", NULL, NULL, &err), 0);
    say(fds[7], "{\"cmd\":\"echo\"}\n");
    expect(fds[7], "\"ok\"");
    for (unsigned i = 0; i < CONNS; i++)
        close(fds[i]);
    server_end(&s);
}
END_TEST

START_TEST(stale_and_foreign_files)
{
    struct server s;
    struct error err;
    struct control *second;
    server_start(&s);
    ck_assert_int_eq(control_create(&second, &s.vm, &err), 0);
    ck_assert_int_eq(control_listen(second, s.path, &err), -EEXIST); // in use
    ck_assert_ptr_nonnull(strstr(err.text, "running"));
    works(&s);
    char path[128];
    snprintf(path, sizeof(path), "%s/file", s.dir);
    fclose(fopen(path, "we"));
    ck_assert_int_eq(control_listen(second, path, &err), -EEXIST); // not ours to delete
    ck_assert_int_eq(access(path, F_OK), 0);
    unlink(path);
    // What a killed VM leaves: a socket nobody listens on.
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/stale", s.dir);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
    close(fd);
    // Its own loop: the server's runs in another thread.
    struct vm vm = {.name = "second"};
    control_destroy(second);
    ck_assert_int_eq(loop_create(&vm.loop, &err), 0);
    ck_assert_int_eq(control_create(&second, &vm, &err), 0);
    ck_assert_msg(!control_listen(second, addr.sun_path, &err), "%s", err.text);
    control_destroy(second);
    ck_assert_int_eq(access(addr.sun_path, F_OK), -1);
    loop_destroy(vm.loop);
    char longer[200];
    memset(longer, 'x', sizeof(longer));
    longer[199] = 0;
    ck_assert_int_eq(control_listen(s.control, longer, &err), -ENAMETOOLONG);
    ck_assert_int_eq(control_call(longer, "echo", NULL, NULL, NULL, NULL, &err), -ENAMETOOLONG);
    server_end(&s);
}
END_TEST

START_TEST(paths)
{
    char dir[] = "/tmp/ferry-test-XXXXXX", path[108], sub[64], expected[108];
    struct error err;
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(sub, sizeof(sub), "%s/run", dir);
    setenv("FERRY_RUN_DIR", sub, 1);
    ck_assert_int_eq(control_path("web-1", path, sizeof(path), &err), 0);
    snprintf(expected, sizeof(expected), "%s/web-1.sock", sub);
    ck_assert_str_eq(path, expected);
    struct stat st;
    ck_assert_int_eq(stat(sub, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0700);
    static const char *const bad[] = {
        "",    "..",          ".hidden",
        "a/b", "/etc/passwd", "0123456789012345678901234567890123456789012345678901234567890123"};
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_int_eq(control_path(bad[i], path, sizeof(path), &err), -EINVAL);
    ck_assert_int_eq(control_path("a", path, 8, &err), -ENAMETOOLONG);
    rmdir(sub);
    rmdir(dir);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("control");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, commands_and_errors);
    tcase_add_test(tc, events_come_before_the_answer);
    tcase_add_test(tc, any_error_text_is_answered);
    tcase_add_test(tc, malformed_lines_are_answered);
    tcase_add_test(tc, requests_may_come_in_pieces_and_heaps);
    tcase_add_test(tc, huge_lines_end_the_connection);
    tcase_add_test(tc, clients_that_leave);
    tcase_add_test(tc, half_closed_clients_get_their_answer);
    tcase_add_test(tc, slow_readers_are_dropped);
    tcase_add_test(tc, too_many_clients);
    tcase_add_test(tc, stale_and_foreign_files);
    tcase_add_test(tc, paths);
    Suite *suite = suite_create("control");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
