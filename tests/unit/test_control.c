// SPDX-License-Identifier: Apache-2.0
// Routes over the real socket, with clients that behave and clients that do not. There is no VM:
// the routes here are the test's own.
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
#include "vmm/http.h"
#include "vmm/util.h"

enum { HEARD_MAX = 64 * 1024 };

struct server {
    struct loop *loop;
    struct life life;
    struct control *control;
    pthread_t thread;
    char dir[64], path[100];
    pthread_t workers[16]; // of the route /slow
    _Atomic unsigned nr_workers;
    struct control_request *_Atomic kept; // by /keep
    _Atomic unsigned calls;
};

// --- routes

static void put_echo(struct control_request *req, json_t *args, void *context)
{
    struct server *s = context;
    atomic_fetch_add(&s->calls, 1);
    control_reply_ok(req, json_pack("{s:O, s:s}", "args", args, "id", control_id(req)));
}

static void put_silent(struct control_request *req, json_t *args, void *context)
{
    control_silence(req);
    control_reply_ok(req, json_object());
}

static void put_fail(struct control_request *req, json_t *args, void *context)
{
    struct error err;
    const char *text = json_string_value(json_object_get(args, "text"));
    error_set(&err, -EBUSY, "%s", text ? text : "always \xff busy"); // not even UTF-8
    control_reply_error(req, &err);
}

static void *slow_main(void *arg)
{
    for (int i = 0; i < 3; i++)
        control_event(arg, json_pack("{s:i}", "step", i));
    control_reply_ok(arg, NULL);
    return NULL;
}

static void put_slow(struct control_request *req, json_t *args, void *context)
{
    struct server *s = context;
    unsigned n = atomic_fetch_add(&s->nr_workers, 1);
    ck_assert_uint_lt(n, ARRAY_SIZE(s->workers));
    ck_assert_int_eq(pthread_create(&s->workers[n], NULL, slow_main, req), 0);
}

static void get_thread(struct control_request *req, json_t *args, void *context)
{
    struct server *s = context;
    bool loop = pthread_equal(pthread_self(), s->thread);
    control_reply_ok(req, json_pack("{s:b}", "loop", (int)loop));
}

static void put_keep(struct control_request *req, json_t *args, void *context)
{
    struct server *s = context;
    s->kept = req; // answered by the next /release
}

static void put_release(struct control_request *req, json_t *args, void *context)
{
    struct server *s = context;
    control_reply_ok(s->kept, NULL);
    s->kept = NULL;
    control_reply_ok(req, NULL);
}

static void get_events(struct control_request *req, json_t *args, void *context)
{
    struct server *s = context;
    control_subscribe(s->control, req);
}

static void put_tell(struct control_request *req, json_t *args, void *context)
{
    struct server *s = context;
    control_broadcast(s->control, json_deep_copy(args));
    control_reply_ok(req, NULL);
}

static const char *const colours[] = {"red", "green", NULL};
static const struct schema_field inner[] = {{"deep", SCHEMA_BOOL, .required = true}, {NULL}};
static const struct schema_field echo_fields[] = {
    {"n", SCHEMA_INTEGER, .max = 1000},
    {"text", SCHEMA_STRING, .min = 1, .max = 10},
    {"colour", SCHEMA_STRING, .choices = colours},
    {"inner", SCHEMA_OBJECT, .fields = inner},
    {"list", SCHEMA_LIST, .fields = inner, .max = 2},
    {"words", SCHEMA_LIST},
    {"any", SCHEMA_ANY},
    {NULL},
};
static const struct schema_field fail_fields[] = {{"text", SCHEMA_STRING}, {NULL}};
static const struct schema_field needy_fields[] = {
    {"wanted", SCHEMA_INTEGER, .required = true, .min = -3, .max = -1}, {NULL}};

static const struct control_route routes[] = {
    {"PUT", "/echo", "", 0, echo_fields, put_echo},
    {"PUT", "/things/{id}/echo", "", 0, echo_fields, put_echo},
    {"PUT", "/silent", "", 0, NULL, put_silent},
    {"PUT", "/needy", "", 0, needy_fields, put_echo},
    {"PUT", "/paused", "", LIFE_BIT(LIFE_PAUSED), NULL, put_echo},
    {"PUT", "/fail", "", 0, fail_fields, put_fail},
    {"PUT", "/slow", "", 0, NULL, put_slow},
    {"PUT", "/keep", "", 0, NULL, put_keep},
    {"PUT", "/release", "", 0, NULL, put_release},
    {"GET", "/thread", "", 0, NULL, get_thread},
    {"GET", "/at-once", "", 0, NULL, get_thread, .at_once = true},
    {"GET", "/events", "", 0, NULL, get_events},
    {"PUT", "/tell", "", 0, echo_fields, put_tell},
};

// --- the server

static void *server_main(void *arg)
{
    struct server *s = arg;
    struct error err;
    ck_assert_msg(!loop_run(s->loop, &err), "%s", err.text);
    return NULL;
}

static void server_start(struct server *s)
{
    struct error err;
    memset(s, 0, sizeof(*s));
    snprintf(s->dir, sizeof(s->dir), "/tmp/ferry-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(s->dir));
    snprintf(s->path, sizeof(s->path), "%s/vm.sock", s->dir);
    life_init(&s->life);
    ck_assert_int_eq(loop_create(&s->loop, &err), 0);
    ck_assert_int_eq(control_create(&s->control, s->loop, &s->life, &err), 0);
    ck_assert_int_eq(control_add(s->control, routes, 3, s, &err), 0);
    ck_assert_int_eq(control_add(s->control, routes + 3, ARRAY_SIZE(routes) - 3, s, &err), 0);
    ck_assert_msg(!control_listen(s->control, s->path, &err), "%s", err.text);
    ck_assert_msg(!control_start(s->control, &err), "%s", err.text);
    ck_assert_int_eq(pthread_create(&s->thread, NULL, server_main, s), 0);
}

static void server_end(struct server *s)
{
    loop_stop(s->loop);
    pthread_join(s->thread, NULL);
    for (unsigned i = 0; i < s->nr_workers; i++)
        pthread_join(s->workers[i], NULL);
    control_destroy(s->control);
    if (s->kept) // an answer after the end must do no harm
        control_reply_ok(s->kept, NULL);
    loop_destroy(s->loop);
    life_destroy(&s->life);
    ck_assert_int_eq(access(s->path, F_OK), -1); // the socket is gone
    ck_assert_int_eq(rmdir(s->dir), 0);
}

// --- clients

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

// Everything until the server closes.
static char *hear_all(int fd)
{
    char *text = calloc(1, HEARD_MAX);
    size_t len = 0;
    ssize_t n;
    while (len < HEARD_MAX - 1 && (n = read(fd, text + len, HEARD_MAX - 1 - len)) > 0)
        len += (size_t)n;
    return text;
}

// Reads until `part` has come.
static void hear_until(int fd, const char *part)
{
    autofree char *text = calloc(1, HEARD_MAX);
    size_t len = 0;
    while (!strstr(text, part)) {
        ssize_t n = read(fd, text + len, HEARD_MAX - 1 - len);
        ck_assert_msg(n > 0, "ended without \"%s\" after \"%s\"", part, text);
        len += (size_t)n;
    }
}

static void expect(struct server *s, const char *request, const char *part)
{
    int fd = dial(s);
    say(fd, request);
    ck_assert_int_eq(shutdown(fd, SHUT_WR), 0);
    autofree char *text = hear_all(fd);
    ck_assert_msg(strstr(text, part), "\"%.300s\" has no \"%s\"; asked: %.80s", text, part,
                  request);
    close(fd);
}

static int call(struct server *s, const char *method, const char *path, json_t *body,
                json_t **result, struct error *err)
{
    int ret = control_call(s->path, method, path, body, result, NULL, NULL, err);
    json_decref(body);
    return ret;
}

// It still works after whatever was done to it.
static void works(struct server *s)
{
    struct error err;
    json_t *result;
    ck_assert_msg(!call(s, "PUT", "/echo", json_pack("{s:i}", "n", 7), &result, &err), "%s",
                  err.text);
    ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(result, "args"), "n")), 7);
    json_decref(result);
}

// --- tests

START_TEST(routes_and_errors)
{
    struct server s;
    struct error err;
    json_t *result;
    server_start(&s);
    for (unsigned i = 0; i < 100; i++)
        works(&s);
    ck_assert_int_eq(call(&s, "PUT", "/things/a-1/echo", json_object(), &result, &err), 0);
    ck_assert_str_eq(json_string_value(json_object_get(result, "id")), "a-1");
    json_decref(result);
    ck_assert_int_eq(call(&s, "PUT", "/silent", NULL, &result, &err), 0);
    ck_assert_ptr_null(result);
    ck_assert_int_eq(
        call(&s, "PUT", "/fail", json_pack("{s:s}", "text", "busy today"), &result, &err), -EBUSY);
    ck_assert_str_eq(err.text, "busy today");
    static const char *const unknown[][2] = {{"PUT", "/nonsense"},        {"GET", "/echo"},
                                             {"PUT", "/echo/"},           {"PUT", "/things//echo"},
                                             {"PUT", "/things/a/b/echo"}, {"DELETE", "/"}};
    for (size_t i = 0; i < ARRAY_SIZE(unknown); i++) {
        ck_assert_int_eq(call(&s, unknown[i][0], unknown[i][1], NULL, NULL, &err), -ENOSYS);
        ck_assert_ptr_nonnull(strstr(err.text, unknown[i][1]));
    }
    struct stat st;
    ck_assert_int_eq(stat(s.path, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0600);
    server_end(&s);
    ck_assert_int_eq(call(&s, "PUT", "/echo", NULL, NULL, &err), -ENOENT);
}
END_TEST

START_TEST(a_body_is_as_its_schema_says)
{
    static const char *const bad[][3] = {
        {"/echo", "{\"n\": \"1\"}", "'n': expected an integer, found a string"},
        {"/echo", "{\"n\": 1.5}", "found a fraction"},
        {"/echo", "{\"n\": 1001}", "1001: expected 0 to 1000"},
        {"/echo", "{\"n\": -1}", "-1: expected 0 to 1000"},
        {"/echo", "{\"n\": 1, \"n\": 2}", "not JSON"},
        {"/echo", "{\"text\": \"\"}", "0 bytes: expected 1 to 10"},
        {"/echo", "{\"text\": \"12345678901\"}", "11 bytes"},
        {"/echo", "{\"colour\": \"blue\"}", "'blue': expected one of red, green"},
        {"/echo", "{\"inner\": {}}", "'inner': field 'deep' is missing"},
        {"/echo", "{\"inner\": {\"deep\": 1}}", "expected a boolean"},
        {"/echo", "{\"inner\": []}", "expected an object, found a list"},
        {"/echo", "{\"list\": [{\"deep\": true}, {\"deep\": 0}]}", "'list': [1]: field 'deep'"},
        {"/echo", "{\"list\": [1, 2, 3]}", "3 elements: at most 2"},
        {"/echo", "{\"words\": [\"a\", 1]}", "[1]: expected a string"},
        {"/echo", "{\"more\": 1}", "unknown field 'more'"},
        {"/echo", "[]", "expected an object"},
        {"/echo", "{", "not JSON"},
        {"/echo", "{\"text\": \"a\\u0000b\"}", "not JSON"},
        {"/needy", "{}", "'wanted' is missing"},
        {"/needy", "{\"wanted\": null}", "'wanted' is missing"},
        {"/needy", "{\"wanted\": 0}", "0: expected -3 to -1"},
        {"/silent", "{}", "takes no body"},
    };
    struct server s;
    char request[512];
    server_start(&s);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        snprintf(request, sizeof(request),
                 "PUT %s HTTP/1.1\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s", bad[i][0],
                 strlen(bad[i][1]), bad[i][1]);
        expect(&s, request, bad[i][2]);
        expect(&s, request, "HTTP/1.1 400");
    }
    ck_assert_uint_eq(s.calls, 0); // no route has run
    struct error err;
    json_t *good = json_pack("{s:n, s:{s:b}, s:[{s:b}], s:[s, s], s:{}, s:s}", "n", "inner", "deep",
                             1, "list", "deep", 0, "words", "a", "b", "any", "colour", "red");
    ck_assert_msg(!call(&s, "PUT", "/echo", good, NULL, &err), "%s", err.text);
    server_end(&s);
}
END_TEST

START_TEST(a_route_may_need_a_state)
{
    struct server s;
    struct error err;
    server_start(&s);
    ck_assert_int_eq(call(&s, "PUT", "/paused", NULL, NULL, &err), -EPERM);
    ck_assert_ptr_nonnull(strstr(err.text, "created"));
    ck_assert_int_eq(life_move(&s.life, LIFE_STARTING, &err), 0);
    ck_assert_int_eq(life_move(&s.life, LIFE_PAUSED, &err), 0);
    ck_assert_int_eq(call(&s, "PUT", "/paused", NULL, NULL, &err), 0);
    server_end(&s);
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
        ck_assert_int_eq(
            control_call(s.path, "PUT", "/slow", NULL, NULL, count_event, &events, &err), 0);
        ck_assert_uint_eq(events, 3);
        ck_assert_int_eq(call(&s, "PUT", "/slow", NULL, NULL, &err), 0); // or without them
    }
    server_end(&s);
}
END_TEST

static int answer(const char *text, struct error *err)
{
    json_t *result = NULL;
    unsigned events = 0;
    FILE *in = fmemopen((void *)text, strlen(text), "r");
    ck_assert_ptr_nonnull(in);
    int ret = control_answer(in, &result, count_event, &events, err);
    fclose(in);
    json_decref(result);
    return ret;
}

START_TEST(an_answer_may_be_anything)
{
    struct error err;
    static const char head[] = "HTTP/1.1 200 OK\r\n";
    static const char stream[] = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
                                 "Transfer-Encoding: chunked\r\n\r\n";
    char text[20000];
    ck_assert_int_eq(answer("HTTP/1.1 204 x\r\n\r\n", &err), 0);
    ck_assert_int_eq(answer("SSH-2.0\r\n\r\n", &err), -EPROTO);
    ck_assert_int_eq(answer(head, &err), -ECONNRESET);
    snprintf(text, sizeof(text), "%s\r\n{}", head); // no length
    ck_assert_int_eq(answer(text, &err), -EPROTO);
    snprintf(text, sizeof(text), "%sContent-Length: 9999999999\r\n\r\n{}", head);
    ck_assert_int_eq(answer(text, &err), -EMSGSIZE);
    snprintf(text, sizeof(text), "%sX: %0*d\r\n\r\n", head, 9000, 0); // one long line
    ck_assert_int_eq(answer(text, &err), -EMSGSIZE);
    size_t at = (size_t)snprintf(text, sizeof(text), "%s", head);
    for (unsigned i = 0; i < 1000; i++)
        at += (size_t)snprintf(text + at, sizeof(text) - at, "a: b\r\n");
    ck_assert_int_eq(answer(text, &err), -EMSGSIZE);
    snprintf(text, sizeof(text), "%s-1\r\n", stream);
    ck_assert_int_eq(answer(text, &err), -EPROTO);
    snprintf(text, sizeof(text), "%s40\r\n{\"event\": 1", stream); // ends in a chunk
    ck_assert_int_eq(answer(text, &err), -ECONNRESET);
    snprintf(text, sizeof(text), "%s2\r\n{}\r\n", stream);
    ck_assert_int_eq(answer(text, &err), -EPROTO);
    snprintf(text, sizeof(text), "%sb\r\n{\"ok\": {}}\n\r\n", stream);
    ck_assert_int_eq(answer(text, &err), 0);
}
END_TEST

START_TEST(subscribers_hear_what_is_told)
{
    struct server s;
    struct error err;
    server_start(&s);
    int fds[3];
    for (unsigned i = 0; i < 3; i++) {
        fds[i] = dial(&s);
        say(fds[i], "GET /events HTTP/1.1\r\n\r\n");
        hear_until(fds[i], "\r\n\n\r\n"); // it has begun
    }
    for (int n = 0; n < 10; n++)
        ck_assert_int_eq(call(&s, "PUT", "/tell", json_pack("{s:i}", "n", n), NULL, &err), 0);
    hear_until(fds[0], "\"n\":9");
    close(fds[1]); // one leaves without a word
    for (int n = 0; n < 10; n++)
        ck_assert_int_eq(call(&s, "PUT", "/tell", json_pack("{s:i}", "n", 100 + n), NULL, &err), 0);
    hear_until(fds[2], "\"n\":109");
    works(&s);
    close(fds[0]);
    close(fds[2]);
    server_end(&s);
}
END_TEST

// An error text that is no UTF-8 must still be answered.
START_TEST(any_error_text_is_answered)
{
    struct server s;
    struct error err;
    server_start(&s);
    ck_assert_int_eq(call(&s, "PUT", "/fail", json_object(), NULL, &err), -EBUSY);
    ck_assert_ptr_nonnull(strstr(err.text, "busy"));
    expect(&s, "PUT /%ff%fe%00x HTTP/1.1\r\nConnection: close\r\n\r\n", "HTTP/1.1 400");
    server_end(&s);
}
END_TEST

START_TEST(requests_may_come_in_pieces_and_heaps)
{
    struct server s;
    server_start(&s);
    int fd = dial(&s);
    const char *request = "PUT /echo HTTP/1.1\r\nContent-Length: 7\r\n\r\n{\"n\":1}";
    for (const char *p = request; *p; p++)
        ck_assert_int_eq(write(fd, p, 1), 1);
    hear_until(fd, "\"n\":1}");
    for (unsigned i = 0; i < 50; i++) { // the same connection goes on
        say(fd, request);
        hear_until(fd, "\"n\":1}");
    }
    close(fd);
    server_end(&s);
}
END_TEST

START_TEST(what_is_too_large_or_no_http_is_refused)
{
    struct server s;
    server_start(&s);
    expect(&s, "PUT /echo HTTP/1.1\r\nContent-Length: 10000000\r\n\r\n", "HTTP/1.1 413");
    expect(&s, "PUT /echo HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", "HTTP/1.1 4");
    expect(&s, "PUT /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "HTTP/1.1 4");
    static const char *const noise[] = {"\r\n\r\n",         "{\"cmd\":\"echo\"}\n",
                                        "PUT\r\n\r\n",      "PUT /echo\r\n\r\n",
                                        "\xff\xfe\r\n\r\n", "PUT /echo HTTP/1.1\r\nX"};
    for (size_t i = 0; i < ARRAY_SIZE(noise); i++) {
        int fd = dial(&s);
        say(fd, noise[i]);
        ck_assert_int_eq(shutdown(fd, SHUT_WR), 0);
        autofree char *text = hear_all(fd); // an error, or closed
        ck_assert_ptr_null(strstr(text, "HTTP/1.1 2"));
        close(fd);
    }
    // Endless headers.
    int fd = dial(&s);
    say(fd, "PUT /echo HTTP/1.1\r\n");
    char line[1024];
    memset(line, 'a', sizeof(line));
    memcpy(line + sizeof(line) - 4, ":b\r\n", 4);
    while (send(fd, line, sizeof(line), MSG_NOSIGNAL) > 0)
        ; // until it is closed
    close(fd);
    // Deep nesting is refused, not followed.
    enum { DEEP = 60000 };
    autofree char *deep = malloc(DEEP + 100);
    int head = sprintf(
        deep, "PUT /echo HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", DEEP);
    memset(deep + head, '[', DEEP);
    deep[head + DEEP] = 0;
    expect(&s, deep, "HTTP/1.1 400");
    works(&s);
    server_end(&s);
}
END_TEST

START_TEST(clients_that_leave)
{
    struct server s;
    server_start(&s);
    for (unsigned i = 0; i < 100; i++) {
        int fd = dial(&s);
        if (i % 4 == 1)
            say(fd, "PUT /ec"); // in the middle
        else if (i % 4 == 2)
            say(fd,
                "PUT /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"); // does not hear the answer
        else if (i % 4 == 3)
            say(fd, "PUT /echo HTTP/1.1\r\nContent-Length: 200\r\n\r\n{}");
        close(fd);
    }
    // Gone before a long command answers.
    int fd = dial(&s);
    say(fd, "PUT /keep HTTP/1.1\r\n\r\n");
    struct error err;
    while (call(&s, "PUT", "/echo", json_object(), NULL, &err) || !s.kept)
        ; // until the request has arrived
    close(fd);
    ck_assert_int_eq(call(&s, "PUT", "/release", NULL, NULL, &err), 0);
    works(&s);
    server_end(&s);
}
END_TEST

// The VM ends while somebody waits for an answer.
START_TEST(an_end_with_a_request_under_way)
{
    struct server s;
    struct error err;
    server_start(&s);
    int fd = dial(&s);
    say(fd, "PUT /keep HTTP/1.1\r\n\r\n");
    while (call(&s, "PUT", "/echo", json_object(), NULL, &err) || !s.kept)
        ;
    server_end(&s);
    autofree char *text = hear_all(fd);
    ck_assert_str_eq(text, "");
    close(fd);
}
END_TEST

START_TEST(a_hundred_clients_at_once)
{
    struct server s;
    server_start(&s);
    int fds[100];
    for (unsigned i = 0; i < 100; i++) {
        fds[i] = dial(&s);
        if (i % 2) // half of them never finish
            say(fds[i], "PUT /echo HTTP/1.1\r\nContent-Le");
    }
    for (unsigned i = 0; i < 100; i += 2)
        say(fds[i], "PUT /echo HTTP/1.1\r\nContent-Length: 7\r\n\r\n{\"n\":5}");
    for (unsigned i = 0; i < 100; i += 2)
        hear_until(fds[i], "\"n\":5}");
    works(&s);
    for (unsigned i = 0; i < 100; i++)
        close(fds[i]);
    server_end(&s);
}
END_TEST

START_TEST(sockets)
{
    struct server s;
    struct error err;
    server_start(&s);
    struct control *second;
    struct loop *loop;
    ck_assert_int_eq(loop_create(&loop, &err), 0);
    ck_assert_int_eq(control_create(&second, loop, NULL, &err), 0);
    ck_assert_int_eq(control_listen(second, s.path, &err), -EADDRINUSE);
    char path[200];
    memset(path, 'x', sizeof(path) - 1);
    path[sizeof(path) - 1] = 0;
    ck_assert_int_eq(control_listen(second, path, &err), -ENAMETOOLONG);
    snprintf(path, sizeof(path), "%s/file", s.dir);
    fclose(fopen(path, "w"));
    ck_assert_int_eq(control_listen(second, path, &err), -EEXIST);
    unlink(path);
    control_destroy(second);
    // What a killed VM leaves is no obstacle.
    int fd;
    ck_assert_int_eq(http_listen(path, &fd, &err), 0);
    close(fd);
    ck_assert_int_eq(http_listen(path, &fd, &err), 0);
    close(fd);
    unlink(path);
    loop_destroy(loop);
    works(&s);
    server_end(&s);
}
END_TEST

static bool asked_in_loop(struct server *s, const char *path)
{
    struct error err;
    json_t *result;
    ck_assert_msg(!control_call(s->path, "GET", path, NULL, &result, NULL, NULL, &err), "%s",
                  err.text);
    bool loop = json_is_true(json_object_get(result, "loop"));
    json_decref(result);
    return loop;
}

START_TEST(who_only_looks_does_not_wait_for_the_loop)
{
    struct server s;
    server_start(&s);
    ck_assert(asked_in_loop(&s, "/thread"));
    while (asked_in_loop(&s, "/at-once")) // the loop may still be behind its last answer
        ;
    control_loop_only(s.control);
    ck_assert(asked_in_loop(&s, "/at-once"));
    server_end(&s);
}
END_TEST

START_TEST(life_follows_its_table)
{
    struct life life;
    struct error err;
    life_init(&life);
    ck_assert_int_eq(life_move(&life, LIFE_RUNNING, &err), -EPERM);
    ck_assert_ptr_nonnull(strstr(err.text, "created"));
    ck_assert_ptr_nonnull(strstr(err.text, "running"));
    ck_assert_int_eq(life_move(&life, LIFE_STARTING, &err), 0);
    ck_assert_int_eq(life_move(&life, LIFE_RUNNING, &err), 0);
    ck_assert_int_eq(life_move(&life, LIFE_STARTING, &err), 0); // a reset
    ck_assert_int_eq(life_move(&life, LIFE_RUNNING, &err), 0);
    ck_assert_int_eq(life_move(&life, LIFE_PAUSED, &err), 0);
    ck_assert_int_eq(life_move(&life, LIFE_MIGRATING, &err), 0);
    ck_assert_int_eq(life_move(&life, LIFE_STARTING, &err), -EPERM);
    ck_assert_int_eq(life_move(&life, LIFE_SNAPSHOTTING, &err), -EPERM);
    life_return(&life);
    ck_assert_int_eq(life_get(&life), LIFE_PAUSED);
    ck_assert_int_eq(life_move(&life, LIFE_STOPPED, &err), 0);
    life_return(&life); // nothing to return to
    ck_assert_int_eq(life_get(&life), LIFE_STOPPED);
    for (unsigned to = 0; to < LIFE_STATES; to++) {
        ck_assert(!life_allows(LIFE_STOPPED, to));
        ck_assert(!life_allows(LIFE_FAILED, to));
        ck_assert(!life_allows(to, to));
    }
    life_destroy(&life);
}
END_TEST

START_TEST(names_of_sockets)
{
    struct error err;
    char path[108];
    setenv("FERRY_RUN_DIR", "/tmp", 1);
    ck_assert_int_eq(control_path("web", path, sizeof(path), &err), 0);
    ck_assert_str_eq(path, "/tmp/web.sock");
    static const char *const bad[] = {"", ".", "../x", "a/b", "a\nb", ".hidden"};
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_int_eq(control_path(bad[i], path, sizeof(path), &err), -EINVAL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("control");
    TCase *tc = tcase_create("control");
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, routes_and_errors);
    tcase_add_test(tc, a_body_is_as_its_schema_says);
    tcase_add_test(tc, a_route_may_need_a_state);
    tcase_add_test(tc, events_come_before_the_answer);
    tcase_add_test(tc, an_answer_may_be_anything);
    tcase_add_test(tc, subscribers_hear_what_is_told);
    tcase_add_test(tc, any_error_text_is_answered);
    tcase_add_test(tc, requests_may_come_in_pieces_and_heaps);
    tcase_add_test(tc, what_is_too_large_or_no_http_is_refused);
    tcase_add_test(tc, clients_that_leave);
    tcase_add_test(tc, an_end_with_a_request_under_way);
    tcase_add_test(tc, a_hundred_clients_at_once);
    tcase_add_test(tc, sockets);
    tcase_add_test(tc, who_only_looks_does_not_wait_for_the_loop);
    tcase_add_test(tc, life_follows_its_table);
    tcase_add_test(tc, names_of_sockets);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
