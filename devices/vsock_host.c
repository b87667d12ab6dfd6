// SPDX-License-Identifier: Apache-2.0
#include <ctype.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "devices/vsock_internal.h"
#include "vmm/listen.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { BACKLOG = 256, ACCEPTS_A_TURN = 64, LINE_MAX = 32 };

// --- watches

static void watch_ready(struct loop_watch *watch, uint32_t revents)
{
    struct vsock_watch *w = container_of(watch, struct vsock_watch, watch);
    struct virtio_vsock *s = w->s; // only the loop's thread changes it
    if (!s)
        return;
    pthread_mutex_lock(&s->v.dev.lock);
    if (!w->c || w->c->state != VSOCK_DEAD)
        w->fn(s, w->c, revents);
    vsock_settle(s);
    pthread_mutex_unlock(&s->v.dev.lock);
}

struct vsock_watch *vsock_watch_new(struct virtio_vsock *s, struct vsock_connection *c, int fd,
                                    uint32_t events, vsock_watch_fn fn)
{
    struct vsock_watch *w = calloc(1, sizeof(*w));
    if (!w || loop_watch(s->v.dev.vm->loop, &w->watch, fd, events, watch_ready, NULL)) {
        free(w);
        return NULL;
    }
    w->s = s;
    w->c = c;
    w->fn = fn;
    return w;
}

static void watch_closed(struct loop_watch *watch)
{
    free(container_of(watch, struct vsock_watch, watch));
}

void vsock_watch_close(struct vsock_watch *w)
{
    if (!w)
        return;
    w->s = NULL;
    loop_unwatch(&w->watch, watch_closed);
}

// --- data

static uint32_t all(const struct iovec *iov, unsigned n)
{
    uint32_t len = 0;
    for (unsigned i = 0; i < n; i++)
        len += (uint32_t)iov[i].iov_len;
    return len;
}

// The first `len` bytes of the segments are done.
static void skip(struct iovec **iov, unsigned *n, size_t len)
{
    while (*n && len >= (*iov)->iov_len) {
        len -= (*iov)->iov_len;
        ++*iov;
        --*n;
    }
    if (*n) {
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + len;
        (*iov)->iov_len -= len;
    }
}

// Bytes that went, or -errno.
static ssize_t socket_write(int fd, struct iovec *iov, unsigned n)
{
    const struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n};
    ssize_t done;
    do
        done = sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (done < 0 && errno == EINTR);
    return done < 0 ? -errno : done;
}

static void host_ended(struct vsock_connection *c, uint8_t what)
{
    what &= (uint8_t)~c->host_shut;
    if (!what)
        return;
    c->host_shut |= what;
    if (what & VSOCK_NO_RECEIVE)
        flow_forward(&c->flow, flow_buffered(&c->flow));
    if (what & VSOCK_NO_SEND)
        c->readable = false;
    if (c->state == VSOCK_OPEN)
        c->owed |= OWES_SHUTDOWN;
}

static void credit_tell(struct vsock_connection *c)
{
    if (flow_update_due(&c->flow) && c->state == VSOCK_OPEN && !(c->guest_shut & VSOCK_NO_SEND))
        c->owed |= OWES_CREDIT;
}

static void buffer_flush(struct virtio_vsock *s, struct vsock_connection *c)
{
    struct iovec iov[2];
    unsigned n;
    while ((n = flow_buffer(&c->flow, iov))) {
        ssize_t done = socket_write(c->fd, iov, n);
        if (done == -EAGAIN)
            break;
        if (done < 0)
            host_ended(c, VSOCK_NO_RECEIVE); // drops what is buffered
        else
            flow_forward(&c->flow, (uint32_t)done);
    }
    credit_tell(c);
    vsock_advance(s, c);
}

static void outgoing(struct virtio_vsock *s, struct vsock_connection *c, uint32_t revents)
{
    buffer_flush(s, c);
}

// Behind what is buffered already, or what the socket has no room for.
static int buffer_add(struct virtio_vsock *s, struct vsock_connection *c, const struct iovec *iov,
                      unsigned n)
{
    int ret = flow_append(&c->flow, iov, n, all(iov, n));
    if (!ret && !c->out)
        c->out = vsock_watch_new(s, c, c->fd, POLLOUT, outgoing);
    return ret ? ret : c->out ? 0 : -ENOMEM;
}

void vsock_host_write(struct virtio_vsock *s, struct vsock_connection *c, struct iovec *iov,
                      unsigned n, uint32_t len)
{
    s->from_guest += len;
    if (c->host_shut & VSOCK_NO_RECEIVE || c->fd < 0) {
        flow_pass(&c->flow, len); // the guest did not know yet
    } else {
        ssize_t done = flow_buffered(&c->flow) ? 0 : socket_write(c->fd, iov, n);
        if (done < 0 && done != -EAGAIN) {
            host_ended(c, VSOCK_NO_RECEIVE);
            done = len;
        } else if (done < 0) {
            done = 0;
        }
        flow_pass(&c->flow, (uint32_t)done);
        skip(&iov, &n, (size_t)done);
        if (n && buffer_add(s, c, iov, n)) {
            vsock_abort(s, c);
            return;
        }
    }
    credit_tell(c);
    vsock_advance(s, c);
}

uint32_t vsock_host_read(struct virtio_vsock *s, struct vsock_connection *c,
                         const struct iovec *iov, unsigned n)
{
    struct msghdr msg = {.msg_iov = (struct iovec *)iov, .msg_iovlen = n};
    ssize_t got = recvmsg(c->fd, &msg, MSG_DONTWAIT);
    if (got > 0) {
        s->to_guest += (uint64_t)got;
        return (uint32_t)got;
    }
    if (got < 0 && errno == EINTR)
        return 0; // its next turn comes
    if (got < 0 && errno == EAGAIN)
        c->readable = false;
    else // closed, perhaps with bytes of ours unread (ECONNRESET): nothing works any more then
        host_ended(c, got < 0 ? VSOCK_NEITHER : VSOCK_NO_SEND);
    vsock_advance(s, c);
    return 0;
}

// --- from the host: PATH, CONNECT lines

// "CONNECT PORT\n" as the first `len` bytes.
static bool line_parse(const char *line, size_t len, uint32_t *port)
{
    static const char word[] = "CONNECT ";
    if (len && line[len - 1] == '\r')
        len--;
    if (len <= strlen(word) || strncasecmp(line, word, strlen(word)))
        return false;
    uint64_t value = 0;
    for (size_t i = strlen(word); i < len; i++) {
        if (!isdigit((unsigned char)line[i]) || value > UINT32_MAX)
            return false;
        value = value * 10 + (unsigned)(line[i] - '0');
    }
    *port = (uint32_t)value;
    return value < UINT32_MAX; // all ones is "any"
}

static uint32_t port_new(struct virtio_vsock *s, uint32_t guest_port)
{
    uint32_t port;
    do {
        port = s->next_port++;
        if (s->next_port == UINT32_MAX)
            s->next_port = 1u << 30;
    } while (vsock_find(s, port, guest_port));
    return port;
}

// The line alone is taken from the socket: what follows belongs to the guest.
static void hello(struct virtio_vsock *s, struct vsock_connection *c)
{
    char line[LINE_MAX];
    ssize_t n = recv(c->fd, line, sizeof(line), MSG_PEEK | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    const char *end = n > 0 ? memchr(line, '\n', (size_t)n) : NULL;
    if (n > 0 && n < LINE_MAX && !end)
        return; // the rest is to come
    bool good = end && line_parse(line, (size_t)(end - line), &c->guest_port) &&
                s->v.status & VIRTIO_DRIVER_OK;
    size_t len = end ? (size_t)(end - line) + 1 : 0;
    if (!good || recv(c->fd, line, len, MSG_DONTWAIT) != (ssize_t)len) {
        vsock_kill(s, c);
        return;
    }
    c->host_port = port_new(s, c->guest_port);
    vsock_enter(s, c);
    vsock_state_set(s, c, VSOCK_REQUESTED);
    c->readable = true;
    c->owed = OWES_REQUEST;
    vsock_schedule(s, c);
}

static void incoming(struct virtio_vsock *s, struct vsock_connection *c, uint32_t revents)
{
    bool gone = revents & (POLLHUP | POLLERR);
    if (c->state == VSOCK_HELLO) {
        hello(s, c);
    } else if (c->state == VSOCK_REQUESTED) {
        if (gone)
            vsock_abort(s, c);
    } else if (c->fd >= 0) {
        if (gone)
            host_ended(c, VSOCK_NO_RECEIVE);
        c->readable = c->state == VSOCK_OPEN && !(c->host_shut & VSOCK_NO_SEND) &&
                      !(c->guest_shut & VSOCK_NO_RECEIVE);
        vsock_advance(s, c);
    }
}

static bool incoming_watch(struct virtio_vsock *s, struct vsock_connection *c)
{
    c->in = vsock_watch_new(s, c, c->fd, POLLIN | POLLRDHUP, incoming);
    return c->in;
}

static void accept_some(struct virtio_vsock *s)
{
    s->accept_again = false;
    for (unsigned i = 0; s->listen_fd >= 0 && !s->given_up; i++) {
        int fd = i < ACCEPTS_A_TURN
                     ? accept4(s->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
                     : -1;
        if (fd < 0) { // also for want of file descriptors
            s->accept_again = i == ACCEPTS_A_TURN || errno != EAGAIN;
            return;
        }
        struct vsock_connection *c = vsock_new(s, fd, VSOCK_HELLO);
        if (c && !incoming_watch(s, c))
            vsock_kill(s, c);
    }
}

static void listener_ready(struct virtio_vsock *s, struct vsock_connection *none, uint32_t revents)
{
    accept_some(s);
}

void vsock_host_accepted(struct virtio_vsock *s, struct vsock_connection *c)
{
    char text[32];
    int len = snprintf(text, sizeof(text), "OK %u\n", c->host_port);
    if (send(c->fd, text, (size_t)len, MSG_NOSIGNAL | MSG_DONTWAIT) != len) {
        vsock_abort(s, c);
        return;
    }
    vsock_state_set(s, c, VSOCK_OPEN);
}

// --- from the guest: PATH_PORT

void vsock_host_connect(struct virtio_vsock *s, struct vsock_connection *c)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    _Static_assert(VSOCK_PATH_MAX + sizeof("_4294967295") <= sizeof(addr.sun_path), "fits");
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s_%u", s->path, c->host_port);
    if (c->fd < 0)
        c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&addr, sizeof(addr))) {
        if (c->fd < 0 || errno != EAGAIN)
            vsock_abort(s, c);
        else if (c->state != VSOCK_WAITING) // EAGAIN: the backlog is full
            vsock_state_set(s, c, VSOCK_WAITING);
        return;
    }
    vsock_state_set(s, c, VSOCK_OPEN);
    c->owed |= OWES_RESPONSE;
    if (!incoming_watch(s, c))
        vsock_abort(s, c);
    vsock_schedule(s, c);
}

// --- listening

// A socket file that nobody listens on is what a killed process left.
static void stale_remove(const struct sockaddr_un *addr)
{
    struct stat st;
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && !lstat(addr->sun_path, &st) && S_ISSOCK(st.st_mode) &&
        connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) && errno == ECONNREFUSED)
        unlink(addr->sun_path);
}

int vsock_listen(struct virtio_vsock *s, struct error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    struct stat st;
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", s->path);
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    // Linux takes the mode of the file from here; fchmod before bind leaves no gap.
    if (fd < 0 || fchmod(fd, 0600))
        return error_errno(err, "vsock %s: socket", s->path);
    stale_remove(&addr);
    if (listen_unix(fd, &addr, BACKLOG))
        return error_errno(err, "vsock %s", s->path);
    if (lstat(s->path, &st)) {
        int ret = error_errno(err, "vsock %s: listen", s->path);
        unlink(s->path);
        return ret;
    }
    s->listener = vsock_watch_new(s, NULL, fd, POLLIN, listener_ready);
    if (!s->listener) {
        unlink(s->path);
        return error_set(err, -ENOMEM, "vsock %s: cannot be watched", s->path);
    }
    s->listen_dev = st.st_dev;
    s->listen_ino = st.st_ino;
    s->listen_fd = take_fd(&fd);
    return 0;
}

void vsock_give_up(struct virtio_vsock *s)
{
    struct stat st;
    if (s->listen_fd < 0 || s->given_up)
        return;
    if (!lstat(s->path, &st) && st.st_dev == s->listen_dev && st.st_ino == s->listen_ino)
        unlink(s->path);
    shutdown(s->listen_fd, SHUT_RDWR); // refuses from now on
    s->given_up = true;
}

void vsock_unlisten(struct virtio_vsock *s)
{
    vsock_give_up(s);
    vsock_watch_close(s->listener);
    s->listener = NULL;
    if (s->listen_fd >= 0)
        close(s->listen_fd);
    s->listen_fd = -1;
    s->given_up = s->accept_again = false;
}

// --- time

bool vsock_ticking(const struct virtio_vsock *s)
{
    return s->accept_again || !TAILQ_EMPTY(&s->lists[VSOCK_HELLO]) ||
           !TAILQ_EMPTY(&s->lists[VSOCK_REQUESTED]) || !TAILQ_EMPTY(&s->lists[VSOCK_WAITING]);
}

// Deadlines of a list ascend.
static void expire(struct virtio_vsock *s, enum vsock_state state)
{
    struct vsock_connection *c;
    while ((c = TAILQ_FIRST(&s->lists[state])) && c->deadline <= s->ticks) {
        if (state == VSOCK_HELLO)
            vsock_kill(s, c);
        else
            vsock_abort(s, c);
    }
}

void vsock_tick(struct virtio_vsock *s)
{
    s->ticks++;
    expire(s, VSOCK_HELLO);
    expire(s, VSOCK_REQUESTED);
    expire(s, VSOCK_WAITING);
    struct vsock_connection *next;
    for (struct vsock_connection *c = TAILQ_FIRST(&s->lists[VSOCK_WAITING]); c; c = next) {
        next = TAILQ_NEXT(c, by_state);
        vsock_host_connect(s, c);
    }
    if (s->accept_again)
        accept_some(s);
}
