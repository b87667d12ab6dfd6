// SPDX-License-Identifier: Apache-2.0
// Carries control commands on a Unix socket: one JSON object a line, both ways.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "vmm/control_internal.h"
#include "vmm/vm.h"

enum { LINE_MAX_LEN = 64 * 1024, CONNS_MAX = 64 };

// Lives while the socket is open or a request still owes an answer. Loop thread only.
struct control_conn {
    struct control *control;
    struct control_conn *next;
    struct loop_watch watch;
    int fd;            // -1 once closed
    bool ended;        // the client says no more, but may still wait for answers
    unsigned requests; // not answered yet
    unsigned refs;     // the watch's and one a request
    size_t len;
    char line[LINE_MAX_LEN];
};

struct control_request {
    struct control_conn *conn;
    struct loop *loop;
};

static void conn_put(struct control_conn *conn)
{
    if (!--conn->refs)
        free(conn);
}

static void conn_unwatched(struct loop_watch *watch)
{
    conn_put(container_of(watch, struct control_conn, watch));
}

static void conn_close(struct control_conn *conn)
{
    if (conn->fd < 0)
        return;
    struct control_conn **link = &conn->control->conns;
    while (*link != conn)
        link = &(*link)->next;
    *link = conn->next;
    loop_unwatch(&conn->watch, conn_unwatched);
    close(conn->fd);
    conn->fd = -1;
}

// A client that does not read its answers is dropped rather than waited for.
static void conn_send(struct control_conn *conn, json_t *answer)
{
    autofree char *text = json_dumps(answer, JSON_COMPACT);
    if (conn->fd < 0 || !text)
        return;
    size_t len = strlen(text);
    text[len++] = '\n'; // over the terminating zero: sent by length
    if (send(conn->fd, text, len, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)len)
        conn_close(conn);
}

static void conn_close_if_done(struct control_conn *conn)
{
    if (conn->ended && !conn->requests)
        conn_close(conn);
}

struct answer {
    struct loop_call call;
    struct control_conn *conn;
    json_t *json;
    bool last;
};

static void answer_deliver(void *arg)
{
    struct answer *a = arg;
    conn_send(a->conn, a->json);
    json_decref(a->json);
    if (a->last) {
        a->conn->requests--;
        conn_close_if_done(a->conn);
        conn_put(a->conn);
    }
    free(a);
}

void control_answer(struct control_request *req, json_t *json, bool last)
{
    struct answer *a = calloc(1, sizeof(*a));
    if (a) {
        *a = (struct answer) {{answer_deliver, a, NULL}, req->conn, json, last};
        loop_call(req->loop, &a->call);
    } else {
        json_decref(json); // the client sees the connection end with the VM
    }
    if (last)
        free(req);
}

static void take_lines(struct control_conn *conn)
{
    char *end;
    while (conn->fd >= 0 && (end = memchr(conn->line, '\n', conn->len))) {
        size_t len = (size_t)(end - conn->line);
        struct control_request *req = calloc(1, sizeof(*req));
        if (!req) {
            conn_close(conn);
            return;
        }
        *req = (struct control_request) {conn, conn->control->vm->loop};
        conn->refs++;
        conn->requests++;
        control_dispatch(conn->control, conn->line, len, req);
        conn->len -= len + 1;
        memmove(conn->line, end + 1, conn->len);
    }
}

static void conn_ready(struct loop_watch *watch, uint32_t revents)
{
    struct control_conn *conn = container_of(watch, struct control_conn, watch);
    for (;;) {
        if (conn->len == sizeof(conn->line)) { // a line longer than any request
            conn_close(conn);
            return;
        }
        ssize_t n =
            recv(conn->fd, conn->line + conn->len, sizeof(conn->line) - conn->len, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n == 0) {
            conn->ended = true;
            conn_close_if_done(conn);
            return;
        }
        if (n < 0) {
            conn_close(conn);
            return;
        }
        conn->len += (size_t)n;
        conn->refs++;
        take_lines(conn);
        bool gone = conn->fd < 0;
        conn_put(conn);
        if (gone)
            return;
    }
}

static unsigned conn_count(const struct control *c)
{
    unsigned n = 0;
    for (struct control_conn *conn = c->conns; conn; conn = conn->next)
        n++;
    return n;
}

static void listen_ready(struct loop_watch *watch, uint32_t revents)
{
    struct control *c = container_of(watch, struct control, listen);
    for (;;) {
        int fd = accept4(c->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0)
            return;
        struct control_conn *conn = conn_count(c) < CONNS_MAX ? malloc(sizeof(*conn)) : NULL;
        if (!conn) {
            close(fd);
            continue;
        }
        // Not zeroed as a whole: the line buffer is large and need not be touched.
        conn->control = c;
        conn->fd = fd;
        conn->refs = 1;
        conn->ended = false;
        conn->requests = 0;
        conn->len = 0;
        if (loop_watch(c->vm->loop, &conn->watch, fd, POLLIN | POLLRDHUP, conn_ready, NULL)) {
            close(fd);
            free(conn);
            continue;
        }
        conn->next = c->conns;
        c->conns = conn;
    }
}

static int address(const char *path, struct sockaddr_un *addr, struct error *err)
{
    *addr = (struct sockaddr_un) {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr->sun_path))
        return error_set(err, -ENAMETOOLONG, "socket path %s: at most %zu characters", path,
                         sizeof(addr->sun_path) - 1);
    strcpy(addr->sun_path, path);
    return 0;
}

// A socket file nobody listens on is what a killed VM leaves; it must not block the next.
static int remove_stale(const char *path, const struct sockaddr_un *addr, struct error *err)
{
    struct stat st;
    if (lstat(path, &st))
        return 0;
    if (!S_ISSOCK(st.st_mode))
        return error_set(err, -EEXIST, "%s exists and is not a socket", path);
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && !connect(fd, (const struct sockaddr *)addr, sizeof(*addr)))
        return error_set(err, -EEXIST, "%s: a VM of this name is running (choose another --name)",
                         path);
    if (unlink(path))
        return error_errno(err, "removing stale socket %s", path);
    return 0;
}

int control_listen(struct control *c, const char *path, struct error *err)
{
    struct sockaddr_un addr;
    int ret = address(path, &addr, err);
    if (!ret)
        ret = remove_stale(path, &addr, err);
    if (ret)
        return ret;
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_errno(err, "control socket");
    // The directory is 0700 (control_path); fchmod before bind narrows the socket file itself.
    if (fchmod(fd, 0600) || bind(fd, (struct sockaddr *)&addr, sizeof(addr)) || listen(fd, 16))
        return error_errno(err, "control socket %s", path);
    c->listen_fd = take_fd(&fd);
    strcpy(c->path, path);
    return loop_watch(c->vm->loop, &c->listen, c->listen_fd, POLLIN, listen_ready, err);
}

void control_destroy(struct control *c)
{
    if (!c)
        return;
    while (c->conns)
        conn_close(c->conns);
    if (c->listen_fd >= 0) {
        loop_unwatch(&c->listen, NULL);
        unlink(c->path);
        close(c->listen_fd);
        // Lets the cancelled polls come home, so that their connections are freed.
        loop_turn(c->vm->loop, false, NULL);
        loop_turn(c->vm->loop, false, NULL);
    }
    free(c->commands);
    free(c);
}

int control_path(const char *name, char *path, size_t size, struct error *err)
{
    bool plain = *name && *name != '.' && strlen(name) <= 63;
    for (const char *p = name; *p; p++)
        plain &= *p != '/' && (unsigned char)*p >= ' ' && *p != 0x7f;
    if (!plain)
        return error_set(err, -EINVAL,
                         "VM name '%s': expected 1 to 63 characters, no '/', no control "
                         "characters, not starting with '.'",
                         name);
    const char *dir = getenv("FERRY_RUN_DIR"), *user = getenv("XDG_RUNTIME_DIR");
    char base[256];
    if (dir && *dir)
        snprintf(base, sizeof(base), "%s", dir);
    else if (geteuid() == 0 || !user || !*user)
        snprintf(base, sizeof(base), "/run/ferry");
    else
        snprintf(base, sizeof(base), "%s/ferry", user);
    if (mkdir(base, 0700) && errno != EEXIST)
        return error_errno(err, "directory %s for control sockets (FERRY_RUN_DIR sets another)",
                           base);
    if ((size_t)snprintf(path, size, "%s/%s.sock", base, name) >= size)
        return error_set(err, -ENAMETOOLONG, "control socket of VM %s: path too long", name);
    return 0;
}
