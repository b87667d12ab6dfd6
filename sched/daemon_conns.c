// SPDX-License-Identifier: Apache-2.0
// Connections, and what is said on them. A message is checked whole before anything of it is used;
// whoever sends another is told why and closed.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "sched/client.h"
#include "sched/daemon_internal.h"
#include "vmm/util.h"

enum {
    CONNS_EXTRA = 64, // beside those of VMs: commands ...
    CONNS_IDLE = 16,  // ... of one process
    ACCEPTS = 16,     // a turn of the loop
    REQUESTS = 64,    // in 10 ms, of all connections
};

// --- answers

static void conn_close(struct sched_daemon *d, struct conn *conn)
{
    conn->dead = true;
    d->swept = true;
}

void conn_send(struct sched_daemon *d, struct conn *conn, const void *msg, size_t size,
               const int *fds, unsigned nr)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {0};
    struct iovec iov = {(void *)msg, size};
    struct msghdr hdr = {.msg_iov = &iov, .msg_iovlen = 1};
    if (nr) {
        hdr.msg_control = control;
        hdr.msg_controllen = CMSG_SPACE(nr * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&hdr);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nr * sizeof(int));
        memcpy(CMSG_DATA(c), fds, nr * sizeof(int));
    }
    // Who does not read its answers is not waited for.
    if (sendmsg(conn->fd, &hdr, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)size)
        conn_close(d, conn);
}

static void answer_error(struct sched_daemon *d, struct conn *conn, const struct error *err)
{
    struct sched_error msg = {.head = sched_head(SCHED_ERROR), .code = err->code};
    snprintf(msg.text, sizeof(msg.text), "%.*s", SCHED_TEXT_MAX - 1, err->text);
    conn_send(d, conn, &msg, sizeof(msg), NULL, 0);
}

static void answer_document(struct sched_daemon *d, struct conn *conn, const struct sched_ask *ask)
{
    struct error err;
    const struct sched_head head = sched_head(SCHED_DOCUMENT);
    autoclose int fd = memfd_create("ferry-sched", MFD_CLOEXEC);
    int ret = fd < 0 ? -errno : 0;
    if (!ret && ask->head.type == SCHED_TRACE) {
        ret = report_trace(d, conn->uid, ask->last_ms, fd);
    } else if (!ret) {
        json_t *json = report_status(d, conn->uid);
        ret = !json || json_dumpfd(json, fd, JSON_COMPACT) ? -ENOMEM : 0;
        json_decref(json);
    }
    if (ret || lseek(fd, 0, SEEK_SET)) {
        error_set(&err, ret ? ret : -EIO, "the document: %s", strerror(-ret));
        answer_error(d, conn, &err);
    } else {
        conn_send(d, conn, &head, sizeof(head), &fd, 1);
    }
}

// --- requests

static void request(struct sched_daemon *d, struct conn *conn, union sched_msg *msg)
{
    struct error err;
    const struct sched_head ok = sched_head(SCHED_OK);
    int ret = 0;
    switch (msg->head.type) {
    case SCHED_REGISTER:
        ret = vm_register(d, conn, &msg->reg, &err);
        break;
    case SCHED_SET:
        ret = vm_set(d, conn, &msg->set, &err);
        if (!ret)
            conn_send(d, conn, &ok, sizeof(ok), NULL, 0);
        break;
    case SCHED_STATUS:
    case SCHED_TRACE:
        if (conn->confined)
            ret = error_set(&err, -EPERM, "this connection is for a VM's own share alone");
        else
            answer_document(d, conn, &msg->ask);
        break;
    case SCHED_CONFINE:
        conn->confined = true;
        conn_send(d, conn, &ok, sizeof(ok), NULL, 0);
        break;
    default:
        ret = error_set(&err, -EBADMSG, "messages of type %u are not for the scheduler",
                        msg->head.type);
    }
    if (ret)
        answer_error(d, conn, &err);
}

static int msg_check(const union sched_msg *msg, ssize_t n, struct error *err)
{
    if ((size_t)n < sizeof(msg->head) || msg->head.magic != SCHED_MAGIC)
        return error_set(err, -EBADMSG, "%zd bytes that are no message to the scheduler", n);
    if (msg->head.version != SCHED_VERSION)
        return error_set(err, -EPROTONOSUPPORT, "protocol version %u: this scheduler speaks %d",
                         msg->head.version, SCHED_VERSION);
    size_t size = sched_msg_size(msg->head.type);
    if ((size_t)n != size)
        return error_set(err, -EBADMSG, "message of type %u with %zd bytes: expected %zu",
                         msg->head.type, n, size);
    return 0;
}

// Requests take time that turns need.
static bool too_many(struct sched_daemon *d)
{
    enum { WINDOW_NS = 10000000 };
    uint64_t now = now_of(d);
    if (now > d->window_ns + WINDOW_NS) {
        d->window_ns = now;
        d->requests = 0;
    }
    return ++d->requests > REQUESTS;
}

// The kernel says who sends. Who connected may be another: a broker, with more rights than the VM
// that it handed the connection to. Somebody's rights do not grow by sending through another's.
static void sender_take(struct conn *conn, const struct ucred *sender)
{
    conn->pid = sender->pid;
    conn->uid = conn->peer_uid ? conn->peer_uid : sender->uid;
}

// Descriptors are never wanted: without room for them the kernel drops them.
static ssize_t msg_receive(struct conn *conn, union sched_msg *msg)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(struct ucred))];
    struct iovec iov = {msg, sizeof(*msg)};
    struct msghdr hdr = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control,
                         .msg_controllen = sizeof(control)};
    ssize_t n = recvmsg(conn->fd, &hdr, MSG_DONTWAIT | MSG_TRUNC | MSG_CMSG_CLOEXEC);
    if (n <= 0)
        return n;
    struct ucred sender;
    const struct cmsghdr *c = CMSG_FIRSTHDR(&hdr);
    if (!c || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_CREDENTIALS ||
        c->cmsg_len != CMSG_LEN(sizeof(sender)))
        return 0; // cannot be: nobody's message ends the connection
    memcpy(&sender, CMSG_DATA(c), sizeof(sender));
    sender_take(conn, &sender);
    return n;
}

void conn_ready(struct sched_daemon *d, struct conn *conn)
{
    union sched_msg msg;
    struct error err;
    ssize_t n = msg_receive(conn, &msg);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        conn_close(d, conn);
        return;
    }
    if (too_many(d)) {
        error_set(&err, -EBUSY, "more than %d requests in 10 ms: try again", REQUESTS);
        answer_error(d, conn, &err);
        return;
    }
    if (msg_check(&msg, n, &err)) {
        answer_error(d, conn, &err);
        conn_close(d, conn);
        return;
    }
    request(d, conn, &msg);
}

// --- connections

static void refuse(struct sched_daemon *d, int fd, const char *why)
{
    struct conn conn = {.fd = fd};
    struct error err;
    error_set(&err, -EBUSY, "%s", why);
    bool swept = d->swept;
    answer_error(d, &conn, &err);
    d->swept = swept;
    close(fd);
}

// Of one process, without a VM.
static unsigned conns_idle(const struct sched_daemon *d, pid_t pid)
{
    unsigned nr = 0;
    for (const struct conn *conn = d->conns; conn; conn = conn->next)
        nr += conn->peer_pid == pid && !conn->vm && !conn->dead;
    return nr;
}

static void accept_one(struct sched_daemon *d, int fd)
{
    unsigned max = (d->config.max_vms ? d->config.max_vms : VMS_MAX) + CONNS_EXTRA;
    struct ucred cred;
    socklen_t len = sizeof(cred);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len)) {
        close(fd);
        return;
    }
    if (d->nr_conns >= max || conns_idle(d, cred.pid) >= CONNS_IDLE) {
        refuse(d, fd, "too many connections to the scheduler");
        return;
    }
    struct conn *conn = calloc(1, sizeof(*conn));
    if (!conn) {
        refuse(d, fd, "no memory for another connection");
        return;
    }
    *conn = (struct conn) {.next = d->conns,
                           .source = {SOURCE_CONN, conn},
                           .fd = fd,
                           .peer_pid = cred.pid,
                           .peer_uid = cred.uid,
                           .pid = cred.pid,
                           .uid = cred.uid};
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = &conn->source};
    if (epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, fd, &ev)) {
        free(conn);
        refuse(d, fd, "no room for another connection");
        return;
    }
    d->conns = conn;
    d->nr_conns++;
}

void conns_accept(struct sched_daemon *d)
{
    for (unsigned i = 0; i < ACCEPTS; i++) {
        int fd = accept4(d->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0)
            return;
        accept_one(d, fd);
    }
}

static void conn_free(struct sched_daemon *d, struct conn *conn)
{
    if (conn->vm)
        vm_remove(d, conn->vm);
    close(conn->fd);
    free(conn);
    d->nr_conns--;
}

// Between two waits, when no event refers to them any more.
void conns_sweep(struct sched_daemon *d)
{
    d->swept = false;
    for (struct conn **at = &d->conns; *at;) {
        struct conn *conn = *at;
        if (!conn->dead) {
            at = &conn->next;
            continue;
        }
        *at = conn->next;
        conn_free(d, conn);
    }
}
