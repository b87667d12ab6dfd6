// SPDX-License-Identifier: Apache-2.0
#include "migrate/channel.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "vmm/listen.h"

enum { TLS_CHUNK = 16 * 1024 }; // what goes into one record
enum { BACKLOG = 16 };

// How far a writer may run ahead of the bandwidth limit after an idle time.
#define BURST_NS 20000000ull

#define AHEAD_BYTES (2 * PAGE_SIZE) // a page that was asked for and what says so

// Waits for `events`; 0, -ECANCELED, -ETIMEDOUT.
static int wait_fd(int fd, short events, int cancel_fd, unsigned timeout_ms, const char *name,
                   struct error *err)
{
    uint64_t end = time_ns() + timeout_ms * 1000000ull;
    for (;;) {
        struct pollfd p[2] = {{.fd = fd, .events = events}, {.fd = cancel_fd, .events = POLLIN}};
        uint64_t now = time_ns();
        int left = !timeout_ms ? -1 : now >= end ? 0 : (int)((end - now + 999999) / 1000000);
        int n = poll(p, 2, left);
        if (n < 0 && errno != EINTR)
            return error_errno(err, "%s: poll", name);
        if (n > 0 && p[1].revents)
            return error_set(err, -ECANCELED, "%s: cancelled", name);
        if (n > 0)
            return 0;
        if (!n && !left)
            return error_set(err, -ETIMEDOUT, "%s: nothing moved for %u ms", name, timeout_ms);
    }
}

// The same for a channel of several: those that move keep this one alive.
static int wait_channel(struct channel *c, short events, struct error *err)
{
    for (;;) {
        uint64_t before = c->moved ? atomic_load(c->moved) : 0;
        int ret = wait_fd(c->fd, events, c->cancel_fd, c->timeout_ms, c->name, err);
        if (ret != -ETIMEDOUT || !c->moved || atomic_load(c->moved) == before)
            return ret;
    }
}

static void has_moved(struct channel *c, size_t n)
{
    if (c->moved)
        atomic_fetch_add_explicit(c->moved, n, memory_order_relaxed);
}

static unsigned iov_advance(struct iovec **iov, unsigned nr, size_t n)
{
    while (nr && n >= (*iov)->iov_len) {
        n -= (*iov)->iov_len;
        (*iov)++;
        nr--;
    }
    if (nr) {
        (*iov)->iov_base = (char *)(*iov)->iov_base + n;
        (*iov)->iov_len -= n;
    }
    return nr;
}

static int closed(struct channel *c, struct error *err)
{
    return error_set(err, -ENODATA, "%s: closed by the other side after %llu bytes", c->name,
                     (unsigned long long)c->wire.in);
}

static int tls_readv(struct channel *c, struct iovec *iov, unsigned nr, struct error *err)
{
    while (nr) {
        size_t n;
        short events;
        int ret = tls_read(c->tls, iov->iov_base, iov->iov_len, &n, &events, err);
        if (ret == -EAGAIN)
            ret = wait_channel(c, events, err);
        else if (ret)
            error_prefix(err, "%s", c->name);
        else if (!n)
            ret = closed(c, err);
        if (ret)
            return ret;
        c->wire.in += n;
        has_moved(c, n);
        nr = iov_advance(&iov, nr, n);
    }
    return 0;
}

// The first bytes are the beginning of a record of TLS (RFC 8446, 5.1): handshake or alert.
static bool looks_like_tls(const struct iovec *iov, size_t n)
{
    const uint8_t *b = iov->iov_base;
    return n >= 3 && iov->iov_len >= 3 && (b[0] == 22 || b[0] == 21) && b[1] == 3 && b[2] <= 4;
}

static unsigned ahead_take(struct channel *c, struct iovec **iov, unsigned nr)
{
    while (nr && c->ahead_at < c->ahead_len) {
        size_t n = c->ahead_len - c->ahead_at;
        n = n < (*iov)->iov_len ? n : (*iov)->iov_len;
        memcpy((*iov)->iov_base, c->ahead + c->ahead_at, n);
        c->ahead_at += n;
        c->wire.in += n;
        nr = iov_advance(iov, nr, n);
    }
    return nr;
}

static int quick_readv(struct channel *c, struct iovec *iov, unsigned nr, struct error *err)
{
    while ((nr = ahead_take(c, &iov, nr))) {
        struct iovec both[2] = {*iov, {c->ahead, AHEAD_BYTES}};
        struct msghdr m = {.msg_iov = both, .msg_iovlen = 2};
        ssize_t n = recvmsg(c->fd, &m, 0);
        if (!n)
            return closed(c, err);
        if (n < 0 && errno != EINTR)
            return error_errno(err, "%s: reading", c->name);
        size_t got = n > 0 ? (size_t)n : 0, here = got < iov->iov_len ? got : iov->iov_len;
        c->ahead_at = 0;
        c->ahead_len = got - here;
        c->wire.in += here;
        nr = iov_advance(&iov, nr, here);
    }
    return 0;
}

static int channel_readv(struct wire *w, struct iovec *iov, unsigned nr, struct error *err)
{
    struct channel *c = container_of(w, struct channel, wire);
    nr = iov_advance(&iov, nr, 0);
    if (c->tls)
        return tls_readv(c, iov, nr, err);
    if (c->ahead)
        return quick_readv(c, iov, nr, err);
    while (nr) {
        struct msghdr m = {.msg_iov = iov, .msg_iovlen = nr};
        ssize_t n = recvmsg(c->fd, &m, MSG_DONTWAIT);
        if (n > 0) {
            if (!w->in && looks_like_tls(iov, (size_t)n))
                return error_set(err, -EPROTO,
                                 "%s: it speaks TLS: give this side --tls DIR or --psk FILE too",
                                 c->name);
            w->in += (uint64_t)n;
            has_moved(c, (size_t)n);
            nr = iov_advance(&iov, nr, (size_t)n);
            continue;
        }
        if (!n)
            return closed(c, err);
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN)
            return error_errno(err, "%s: reading", c->name);
        int ret = wait_channel(c, POLLIN, err);
        if (ret)
            return ret;
    }
    return 0;
}

static uint64_t limit_cost(size_t bytes, uint64_t rate)
{
    return (uint64_t)((unsigned __int128)bytes * 1000000000u / rate);
}

// One bucket of several connections: each write takes its place behind those of the others before
// it waits. When that place begins.
static uint64_t limit_reserve(_Atomic uint64_t *earliest, uint64_t now, size_t bytes, uint64_t rate)
{
    uint64_t old = atomic_load(earliest), start;
    do
        start = old + BURST_NS < now ? now - BURST_NS : old;
    while (!atomic_compare_exchange_weak(earliest, &old, start + limit_cost(bytes, rate)));
    return start;
}

// Leaky bucket: each write moves the moment before which the next one must wait.
static int limit_wait(struct channel *c, size_t bytes, struct error *err)
{
    uint64_t rate = c->limit ? atomic_load_explicit(c->limit, memory_order_relaxed) : 0;
    if (!rate)
        return 0;
    uint64_t now = time_ns(),
             start = c->earliest_ns + BURST_NS < now ? now - BURST_NS : c->earliest_ns;
    if (c->earliest)
        start = limit_reserve(c->earliest, now, bytes, rate);
    while (now < start) {
        uint64_t ms = (start - now + 999999) / 1000000;
        struct pollfd p = {.fd = c->cancel_fd, .events = POLLIN};
        // Short waits, so that a lifted limit takes effect soon.
        if (poll(&p, 1, ms > 100 ? 100 : (int)ms) > 0)
            return error_set(err, -ECANCELED, "%s: cancelled", c->name);
        now = time_ns();
        rate = atomic_load_explicit(c->limit, memory_order_relaxed);
        if (!rate)
            break;
    }
    if (rate)
        c->earliest_ns = start + limit_cost(bytes, rate);
    return 0;
}

// What goes into the next record: one large piece, or small ones together in `chunk`.
static size_t tls_gather(const struct iovec *iov, unsigned nr, uint8_t *chunk, const void **data)
{
    size_t len = 0;
    *data = iov->iov_base;
    if (nr == 1 || iov->iov_len >= TLS_CHUNK)
        return iov->iov_len;
    *data = chunk;
    for (unsigned i = 0; i < nr && len < TLS_CHUNK; i++) {
        size_t n = iov[i].iov_len < TLS_CHUNK - len ? iov[i].iov_len : TLS_CHUNK - len;
        memcpy(chunk + len, iov[i].iov_base, n);
        len += n;
    }
    return len;
}

// Who is refused has been told why before the link broke.
static int tls_write_failed(struct channel *c, int ret, struct error *err)
{
    uint8_t byte;
    size_t n;
    short events;
    struct error why;
    if (tls_read(c->tls, &byte, 1, &n, &events, &why) == -EACCES) {
        ret = -EACCES;
        error_set(err, ret, "%s", why.text);
    }
    error_prefix(err, "%s", c->name);
    return ret;
}

static int tls_writev(struct channel *c, struct iovec *iov, unsigned nr, struct error *err)
{
    uint8_t chunk[TLS_CHUNK];
    int ret = 0;
    for (bool sent = false; !ret && !sent;) {
        size_t n = 0;
        short events;
        const void *data;
        if (nr) {
            size_t len = tls_gather(iov, nr, chunk, &data);
            ret = tls_write(c->tls, data, len, &n, &events, err);
        } else {
            ret = tls_flush(c->tls, &events, err);
            sent = !ret;
        }
        c->wire.out += n;
        has_moved(c, n);
        nr = iov_advance(&iov, nr, n);
        if (ret == -EAGAIN)
            ret = wait_channel(c, events, err);
        else if (ret)
            ret = tls_write_failed(c, ret, err);
    }
    return ret;
}

static int channel_writev(struct wire *w, struct iovec *iov, unsigned nr, struct error *err)
{
    struct channel *c = container_of(w, struct channel, wire);
    size_t bytes = 0;
    for (unsigned i = 0; i < nr; i++)
        bytes += iov[i].iov_len;
    int ret = limit_wait(c, bytes, err);
    nr = iov_advance(&iov, nr, 0);
    if (c->tls)
        return ret ? ret : tls_writev(c, iov, nr, err);
    while (!ret && nr) {
        struct msghdr m = {.msg_iov = iov, .msg_iovlen = nr};
        ssize_t n = sendmsg(c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n >= 0) {
            w->out += (uint64_t)n;
            has_moved(c, (size_t)n);
            nr = iov_advance(&iov, nr, (size_t)n);
        } else if (errno == EAGAIN) {
            ret = wait_channel(c, POLLOUT, err);
        } else if (errno != EINTR) {
            return error_errno(err, "%s: writing", c->name);
        }
    }
    return ret;
}

void channel_init(struct channel *c, int fd, int cancel_fd, unsigned timeout_ms, const char *name)
{
    *c = (struct channel) {.fd = fd, .cancel_fd = cancel_fd, .timeout_ms = timeout_ms};
    snprintf(c->name, sizeof(c->name), "%s", name);
    c->wire = (struct wire) {.name = c->name, .readv = channel_readv, .writev = channel_writev};
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); // fails on unix sockets: no matter
}

void channel_close(struct channel *c)
{
    tls_stream_free(c->tls);
    c->tls = NULL;
    free(c->ahead);
    c->ahead = NULL;
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
}

void channel_quick(struct channel *c)
{
    int flags = fcntl(c->fd, F_GETFL);
    if (c->tls || c->ahead || flags < 0 || fcntl(c->fd, F_SETFL, flags & ~O_NONBLOCK))
        return;
    c->timeout_ms = 0;
    c->ahead = malloc(AHEAD_BYTES);
    c->ahead_at = c->ahead_len = 0;
}

void channel_move(struct channel *to, struct channel *from, int cancel_fd, unsigned timeout_ms)
{
    struct tls_stream *tls = from->tls;
    from->tls = NULL;
    channel_init(to, take_fd(&from->fd), cancel_fd, timeout_ms, from->name);
    to->tls = tls;
}

void channel_shutdown(struct channel *c)
{
    if (c->fd >= 0)
        shutdown(c->fd, SHUT_RDWR);
}

// --- addresses

static int address_bad(const char *address, struct error *err)
{
    return error_set(err, -EINVAL, "address '%s': expected tcp:HOST:PORT, unix:PATH or fd:N",
                     address);
}

static int tcp_split(const char *address, char *host, size_t size, const char **port,
                     struct error *err)
{
    const char *text = address + strlen("tcp:");
    const char *colon = strrchr(text, ':');
    if (!colon || !colon[1] || (size_t)(colon - text) >= size)
        return address_bad(address, err);
    const char *end = colon;
    if (*text == '[' && end > text && end[-1] == ']') {
        text++;
        end--;
    }
    memcpy(host, text, (size_t)(end - text));
    host[end - text] = 0;
    *port = colon + 1;
    return 0;
}

static int tcp_resolve(const char *address, bool passive, struct addrinfo **out, struct error *err)
{
    char host[256];
    const char *port = NULL;
    int ret = tcp_split(address, host, sizeof(host), &port, err);
    if (ret)
        return ret;
    struct addrinfo hints = {.ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = (passive ? AI_PASSIVE : 0) | AI_NUMERICSERV};
    // getaddrinfo would take a larger number modulo 65536.
    if (strspn(port, "0123456789") != strlen(port) || strtoul(port, NULL, 10) > UINT16_MAX)
        return error_set(err, -EINVAL, "address '%s': expected a port from 0 to 65535", address);
    ret = getaddrinfo(*host ? host : NULL, port, &hints, out);
    if (ret)
        return error_set(err, -EHOSTUNREACH, "address '%s': %s", address, gai_strerror(ret));
    return 0;
}

static int unix_address(const char *address, struct sockaddr_un *sun, struct error *err)
{
    const char *path = address + strlen("unix:");
    *sun = (struct sockaddr_un) {.sun_family = AF_UNIX};
    if (!*path || strlen(path) >= sizeof(sun->sun_path))
        return error_set(err, -EINVAL, "address '%s': path empty or longer than %zu bytes", address,
                         sizeof(sun->sun_path) - 1);
    strcpy(sun->sun_path, path);
    return 0;
}

static int fd_address(const char *address, int *fd, struct error *err)
{
    char *end;
    errno = 0;
    long n = strtol(address + strlen("fd:"), &end, 10);
    if (errno || end == address + strlen("fd:") || *end || n < 0 || n > INT32_MAX)
        return address_bad(address, err);
    if (fcntl((int)n, F_GETFD) < 0)
        return error_errno(err, "address '%s'", address);
    *fd = (int)n;
    return 0;
}

static int connect_one(const struct sockaddr *sa, socklen_t len, int cancel_fd, unsigned timeout_ms,
                       const char *address, int *out, struct error *err)
{
    autoclose int fd = socket(sa->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_errno(err, "socket");
    if (connect(fd, sa, len) < 0) {
        if (errno != EINPROGRESS)
            return error_errno(err, "connecting to %s", address);
        int ret = wait_fd(fd, POLLOUT, cancel_fd, timeout_ms, address, err);
        if (ret)
            return ret;
        int failure = 0;
        socklen_t n = sizeof(failure);
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &n);
        if (failure) {
            errno = failure;
            return error_errno(err, "connecting to %s", address);
        }
    }
    *out = take_fd(&fd);
    return 0;
}

static bool is_loopback(const struct sockaddr *sa)
{
    const uint8_t *a = ((const struct sockaddr_in6 *)sa)->sin6_addr.s6_addr;
    const uint8_t *v4 = (const uint8_t *)&((const struct sockaddr_in *)sa)->sin_addr;
    if (sa->sa_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED((const struct in6_addr *)a))
        return a[12] == 127;
    return sa->sa_family == AF_INET6 ? IN6_IS_ADDR_LOOPBACK((const struct in6_addr *)a)
                                     : sa->sa_family == AF_INET && v4[0] == 127;
}

static int refuse_clear(const char *address, struct error *err)
{
    return error_set(err, -EPERM,
                     "%s can be reached from other hosts, and nothing protects the guest's memory "
                     "on the way: give both sides --tls DIR or --psk FILE (or --insecure, where "
                     "the network is yours)",
                     address);
}

static int connect_any(const char *address, bool loopback_only, int cancel_fd, unsigned timeout_ms,
                       int *fd, struct error *err)
{
    if (!strncmp(address, "unix:", 5)) {
        struct sockaddr_un sun;
        int ret = unix_address(address, &sun, err);
        return ret ? ret
                   : connect_one((struct sockaddr *)&sun, sizeof(sun), cancel_fd, timeout_ms,
                                 address, fd, err);
    }
    if (!strncmp(address, "fd:", 3)) {
        int given;
        int ret = fd_address(address, &given, err);
        if (ret)
            return ret;
        *fd = fcntl(given, F_DUPFD_CLOEXEC, 0);
        return *fd < 0 ? error_errno(err, "address '%s'", address) : 0;
    }
    if (strncmp(address, "tcp:", 4))
        return address_bad(address, err);
    struct addrinfo *list;
    int ret = tcp_resolve(address, false, &list, err);
    if (ret)
        return ret;
    ret = -EHOSTUNREACH;
    for (struct addrinfo *a = list; a && ret && ret != -ECANCELED; a = a->ai_next)
        ret = loopback_only && !is_loopback(a->ai_addr)
                  ? refuse_clear(address, err)
                  : connect_one(a->ai_addr, a->ai_addrlen, cancel_fd, timeout_ms, address, fd, err);
    freeaddrinfo(list);
    return ret;
}

static int connect_named(struct channel *c, const char *address, bool loopback_only, int cancel_fd,
                         unsigned timeout_ms, struct error *err)
{
    int fd = -1;
    c->fd = -1;
    c->tls = NULL;
    int ret = connect_any(address, loopback_only, cancel_fd, timeout_ms, &fd, err);
    if (ret)
        return ret;
    char name[sizeof(c->name)];
    snprintf(name, sizeof(name), "connection to %s", address);
    channel_init(c, fd, cancel_fd, timeout_ms, name);
    return 0;
}

int channel_connect(struct channel *c, const char *address, int cancel_fd, unsigned timeout_ms,
                    struct error *err)
{
    return connect_named(c, address, false, cancel_fd, timeout_ms, err);
}

static unsigned ms_until(uint64_t end)
{
    uint64_t now = time_ns();
    return now < end ? (unsigned)((end - now + 999999) / 1000000) : 0;
}

// The time-out is for all of it: a peer that sends a byte now and then gets no further.
static int channel_secure(struct channel *c, const struct tls *tls, bool server, const char *host,
                          struct error *err)
{
    uint64_t end = time_ns() + c->timeout_ms * 1000000ull;
    short events = 0;
    int ret = tls_stream_create(&c->tls, tls, c->fd, server, host, err);
    if (!ret)
        ret = -EAGAIN;
    while (ret == -EAGAIN) {
        ret = tls_handshake(c->tls, &events, err);
        unsigned left = c->timeout_ms ? ms_until(end) : 0;
        if (ret && ret != -EAGAIN)
            error_prefix(err, "%s", c->name);
        else if (ret && c->timeout_ms && !left)
            ret = error_set(err, -ETIMEDOUT, "%s: no TLS handshake within %u ms", c->name,
                            c->timeout_ms);
        else if (ret) {
            ret = wait_fd(c->fd, events, c->cancel_fd, left, c->name, err);
            ret = ret ? ret : -EAGAIN;
        }
    }
    if (ret)
        channel_close(c);
    return ret;
}

int channel_connect_secure(struct channel *c, const char *address,
                           const struct channel_security *security, int cancel_fd,
                           unsigned timeout_ms, struct error *err)
{
    char host[256] = "";
    const char *port;
    bool tcp = !strncmp(address, "tcp:", 4);
    int ret = connect_named(c, address, !security->tls && !security->insecure, cancel_fd,
                            timeout_ms, err);
    if (ret || !security->tls)
        return ret;
    if (tcp)
        tcp_split(address, host, sizeof(host), &port, NULL); // connected: it is well-formed
    return channel_secure(c, security->tls, false, *host ? host : NULL, err);
}

int channel_accept_secure(struct channel *c, const struct channel_security *security,
                          struct error *err)
{
    return security->tls ? channel_secure(c, security->tls, true, NULL, err) : 0;
}

int channel_listen_check(int fd, const char *address, const struct channel_security *security,
                         struct error *err)
{
    struct sockaddr_storage ss;
    socklen_t len = sizeof(ss);
    if (security->tls || security->insecure || strncmp(address, "tcp:", 4))
        return 0;
    if (getsockname(fd, (struct sockaddr *)&ss, &len))
        return error_errno(err, "%s", address);
    return is_loopback((struct sockaddr *)&ss) ? 0 : refuse_clear(address, err);
}

static int listen_one(const struct sockaddr *sa, socklen_t len, const char *address, int *out,
                      struct error *err)
{
    autoclose int fd = socket(sa->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_errno(err, "socket");
    int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(fd, sa, len) < 0)
        return error_errno(err, "listening on %s", address);
    if (listen(fd, BACKLOG) < 0)
        return error_errno(err, "listening on %s", address);
    *out = take_fd(&fd);
    return 0;
}

static int listen_at_path(const char *address, int *out, struct error *err)
{
    struct sockaddr_un sun;
    int ret = unix_address(address, &sun, err);
    if (ret)
        return ret;
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || listen_unix(fd, &sun, BACKLOG))
        return error_errno(err, "listening on %s", address);
    *out = take_fd(&fd);
    return 0;
}

static void bound_address(int fd, const char *address, char *bound, size_t size)
{
    struct sockaddr_storage ss;
    socklen_t len = sizeof(ss);
    char host[128], port[16];
    if (!bound)
        return;
    if (strncmp(address, "tcp:", 4) || getsockname(fd, (struct sockaddr *)&ss, &len) ||
        getnameinfo((struct sockaddr *)&ss, len, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV))
        snprintf(bound, size, "%s", address);
    else
        snprintf(bound, size, ss.ss_family == AF_INET6 ? "tcp:[%s]:%s" : "tcp:%s:%s", host, port);
}

int channel_listen(const char *address, int *fd, char *bound, size_t size, struct error *err)
{
    int ret;
    if (!strncmp(address, "unix:", 5)) {
        ret = listen_at_path(address, fd, err);
    } else if (!strncmp(address, "fd:", 3)) {
        ret = fd_address(address, fd, err);
        if (!ret && fcntl(*fd, F_SETFL, fcntl(*fd, F_GETFL) | O_NONBLOCK) < 0)
            ret = error_errno(err, "address '%s'", address);
    } else if (!strncmp(address, "tcp:", 4)) {
        struct addrinfo *list;
        ret = tcp_resolve(address, true, &list, err);
        if (ret)
            return ret;
        ret = -EADDRNOTAVAIL;
        for (struct addrinfo *a = list; a && ret; a = a->ai_next)
            ret = listen_one(a->ai_addr, a->ai_addrlen, address, fd, err);
        freeaddrinfo(list);
    } else {
        ret = address_bad(address, err);
    }
    if (!ret)
        bound_address(*fd, address, bound, size);
    return ret;
}

int channel_accept(struct channel *c, int listen_fd, int cancel_fd, unsigned wait_ms,
                   unsigned timeout_ms, struct error *err)
{
    c->fd = -1;
    c->tls = NULL;
    for (;;) {
        int ret = wait_fd(listen_fd, POLLIN, cancel_fd, wait_ms, "waiting for a migration", err);
        if (ret)
            return ret;
        struct sockaddr_storage ss;
        socklen_t len = sizeof(ss);
        int fd = accept4(listen_fd, (struct sockaddr *)&ss, &len, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED))
            continue;
        if (fd < 0)
            return error_errno(err, "accepting a connection");
        char host[96], port[16], name[sizeof(c->name)];
        if (ss.ss_family == AF_UNIX ||
            getnameinfo((struct sockaddr *)&ss, len, host, sizeof(host), port, sizeof(port),
                        NI_NUMERICHOST | NI_NUMERICSERV))
            snprintf(name, sizeof(name), "local connection");
        else
            snprintf(name, sizeof(name), "connection from %s port %s", host, port);
        channel_init(c, fd, cancel_fd, timeout_ms, name);
        return 0;
    }
}

int channel_send_fd(struct channel *c, int fd, struct error *err)
{
    char byte = 0;
    struct iovec iov = {&byte, 1};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr m = {.msg_iov = &iov,
                       .msg_iovlen = 1,
                       .msg_control = &control,
                       .msg_controllen = sizeof(control)};
    struct cmsghdr *c_fd = CMSG_FIRSTHDR(&m);
    c_fd->cmsg_level = SOL_SOCKET;
    c_fd->cmsg_type = SCM_RIGHTS;
    c_fd->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c_fd), &fd, sizeof(fd));
    for (;;) {
        if (sendmsg(c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL) == 1) {
            c->wire.out++;
            return 0;
        }
        if (errno != EAGAIN && errno != EINTR)
            return error_errno(err, "%s: handing over memory", c->name);
        int ret = wait_fd(c->fd, POLLOUT, c->cancel_fd, c->timeout_ms, c->name, err);
        if (ret)
            return ret;
    }
}

int channel_recv_fd(struct channel *c, int *fd, struct error *err)
{
    char byte;
    struct iovec iov = {&byte, 1};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    *fd = -1;
    for (;;) {
        struct msghdr m = {.msg_iov = &iov,
                           .msg_iovlen = 1,
                           .msg_control = &control,
                           .msg_controllen = sizeof(control)};
        ssize_t n = recvmsg(c->fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n == 1) {
            struct cmsghdr *c_fd = CMSG_FIRSTHDR(&m);
            c->wire.in++;
            if (c_fd && c_fd->cmsg_level == SOL_SOCKET && c_fd->cmsg_type == SCM_RIGHTS &&
                c_fd->cmsg_len == CMSG_LEN(sizeof(int)))
                memcpy(fd, CMSG_DATA(c_fd), sizeof(*fd));
            return *fd >= 0 ? 0 : error_set(err, -EPROTO, "%s: no descriptor came", c->name);
        }
        if (!n)
            return error_set(err, -ENODATA, "%s: closed by the other side", c->name);
        if (errno != EAGAIN && errno != EINTR)
            return error_errno(err, "%s: taking memory over", c->name);
        int ret = wait_fd(c->fd, POLLIN, c->cancel_fd, c->timeout_ms, c->name, err);
        if (ret)
            return ret;
    }
}

void channel_abort(struct channel *c, const struct error *why)
{
    if (c->fd < 0)
        return;
    size_t len = strnlen(why->text, WIRE_TEXT_MAX);
    c->timeout_ms = 1000;
    c->cancel_fd = -1; // the reason may be a cancel: it must still be said
    c->limit = NULL;
    wire_put(&c->wire, WIRE_ABORT, 0, why->text, len, NULL, 0, NULL);
}
