// SPDX-License-Identifier: Apache-2.0
// For scripts/bench api.
//
//   bench_http serve SOCKET             a server that does nothing but answer: the library's floor
//   bench_http ask SOCKET PATH N        N requests, one at a time, on one connection
//   bench_http ready SOCKET PROGRAM...  execs a program; how long until SOCKET can be connected to,
//                                       and until GET / is answered
#include <errno.h>
#include <event2/buffer.h>
#include <event2/event.h>
#include <event2/http.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vmm/http.h"
#include "vmm/util.h"

enum { ANSWER_MAX = 64 * 1024, READY_LIMIT_S = 30 };

static int fail(const char *what)
{
    perror(what);
    return EXIT_FAILURE;
}

static void answer(struct evhttp_request *req, void *arg)
{
    struct evbuffer *body = evbuffer_new();
    evbuffer_add(body, "{}", 2);
    evhttp_send_reply(req, 200, NULL, body);
    evbuffer_free(body);
}

static int serve(const char *path)
{
    struct error err;
    int fd;
    struct event_base *base = event_base_new();
    struct evhttp *http = evhttp_new(base);
    if (http_listen(path, &fd, &err)) {
        fprintf(stderr, "%s\n", err.text);
        return EXIT_FAILURE;
    }
    evhttp_set_gencb(http, answer, NULL);
    evhttp_accept_socket(http, fd);
    event_base_dispatch(base);
    return EXIT_SUCCESS;
}

static int connect_to(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && !connect(fd, (struct sockaddr *)&addr, sizeof(addr)))
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

// One request and its whole answer; the length must be in the head.
static int request(int fd, const char *path)
{
    static char text[ANSWER_MAX];
    int n = snprintf(text, sizeof(text), "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path);
    if (write(fd, text, (size_t)n) != n)
        return -1;
    size_t have = 0, want = SIZE_MAX;
    while (have < want) {
        ssize_t got = read(fd, text + have, sizeof(text) - 1 - have);
        if (got <= 0)
            return -1;
        have += (size_t)got;
        text[have] = 0;
        char *end = strstr(text, "\r\n\r\n"), *length = strstr(text, "Content-Length: ");
        if (end && length)
            want = (size_t)(end + 4 - text) + strtoul(length + 16, NULL, 10);
        if (want >= sizeof(text) && end)
            return -1;
    }
    return strncmp(text, "HTTP/1.1 200", 12) ? -1 : 0;
}

static int by_size(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static int ask(const char *socket_path, const char *path, unsigned n)
{
    uint64_t *ns = calloc(n, sizeof(*ns));
    int fd = connect_to(socket_path);
    if (fd < 0 || !ns || !n)
        return fail(socket_path);
    for (unsigned i = 0; i < n; i++) {
        uint64_t start = time_ns();
        if (request(fd, path))
            return fail(path);
        ns[i] = time_ns() - start;
    }
    qsort(ns, n, sizeof(*ns), by_size);
    printf("p50 %llu\np99 %llu\nmax %llu\n", (unsigned long long)ns[n / 2],
           (unsigned long long)ns[n - 1 - n / 100], (unsigned long long)ns[n - 1]);
    free(ns);
    return EXIT_SUCCESS;
}

static int ready(const char *path, char **argv)
{
    unlink(path);
    uint64_t start = time_ns();
    pid_t pid = fork();
    if (!pid) {
        execvp(argv[0], argv);
        _exit(127);
    }
    int fd = -1, status = EXIT_FAILURE;
    // A short sleep between two tries: one that spins would take the processor from the program.
    while ((fd = connect_to(path)) < 0 && time_ns() - start < READY_LIMIT_S * 1000000000ull)
        usleep(50);
    uint64_t connected = time_ns() - start;
    if (fd >= 0 && !request(fd, "/")) {
        printf("connected %llu\nanswered %llu\n", (unsigned long long)connected,
               (unsigned long long)(time_ns() - start));
        status = EXIT_SUCCESS;
    }
    kill(pid, SIGTERM);
    waitpid(pid, NULL, 0);
    return status;
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    if (argc == 3 && !strcmp(argv[1], "serve"))
        return serve(argv[2]);
    if (argc == 5 && !strcmp(argv[1], "ask"))
        return ask(argv[2], argv[3], (unsigned)strtoul(argv[4], NULL, 10));
    if (argc > 3 && !strcmp(argv[1], "ready"))
        return ready(argv[2], argv + 3);
    fprintf(stderr,
            "usage: bench_http serve SOCKET | ask SOCKET PATH N | ready SOCKET PROGRAM...\n");
    return EXIT_FAILURE;
}
