// SPDX-License-Identifier: Apache-2.0
//
// Echo over TCP and over vsock: a server, a client that checks what comes back on many connections
// at once, and round trips one after the other with their time.
#include "ferryt.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/vm_sockets.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

// epoll, not poll: looking at every connection for each message is slow where ring 0 is emulated.
enum { CONNECTIONS_MAX = 4000, FILES_MAX = CONNECTIONS_MAX + 16, EVENTS = 64 };
enum { BUF_SIZE = 65536, BACKLOG = 1024 };

struct address {
    union {
        struct sockaddr any;
        struct sockaddr_in tcp;
        struct sockaddr_vm vsock;
    };
    socklen_t len;
};

// "tcp:[A.B.C.D:]PORT" or "vsock:[CID:]PORT"; without a host: any when serving, else 127.0.0.1 and
// the host (CID 2).
static void address_parse(const char *text, bool serve, struct address *address)
{
    char host[32] = "";
    const char *colon = strchr(text, ':');
    const char *last = strrchr(text, ':');

    *address = (struct address) {0};
    if (!colon || last - colon > (long)sizeof(host)) {
        fprintf(stderr, "sock: '%s': expected tcp:[HOST:]PORT or vsock:[CID:]PORT\n", text);
        exit(2);
    }
    if (last > colon)
        memcpy(host, colon + 1, (size_t)(last - colon - 1));
    if (!strncmp(text, "vsock:", 6)) {
        unsigned int cid = serve ? VMADDR_CID_ANY : VMADDR_CID_HOST;
        address->len = sizeof(address->vsock);
        address->vsock.svm_family = AF_VSOCK;
        address->vsock.svm_port = (unsigned int)number_parse("PORT", last + 1, 0, 0xffffffffl);
        address->vsock.svm_cid =
            *host ? (unsigned int)number_parse("CID", host, 0, 0xffffffffl) : cid;
        return;
    }
    address->len = sizeof(address->tcp);
    address->tcp.sin_family = AF_INET;
    address->tcp.sin_port = htons((uint16_t)number_parse("PORT", last + 1, 1, 65535));
    address->tcp.sin_addr.s_addr = htonl(serve ? INADDR_ANY : INADDR_LOOPBACK);
    if (*host && !inet_aton(host, &address->tcp.sin_addr)) {
        fprintf(stderr, "sock: '%s': expected an IPv4 address\n", host);
        exit(2);
    }
}

static int complain(const char *what, long connection)
{
    printf("sock: %s, connection %ld: %s\n", what, connection, strerror(errno));
    return 1;
}

static int socket_open(const struct address *address)
{
    int fd = socket(address->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && address->any.sa_family == AF_INET)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int) {1}, sizeof(int));
    // The kernel's own 2 s are short on a busy host that emulates ring 0.
    const struct timeval patience = {.tv_sec = 60};
    if (fd >= 0 && address->any.sa_family == AF_VSOCK)
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof(patience));
    return fd;
}

static int socket_connect(const struct address *address)
{
    int fd = socket_open(address);
    if (fd >= 0 && connect(fd, &address->any, address->len)) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

// --- server

struct peer {
    uint32_t len, sent; // of buf
    char *buf;          // NULL: nothing waits to be sent
};

struct server {
    struct peer peers[FILES_MAX]; // by descriptor
    int epoll, listener;
    long open, served, last;
    char buf[BUF_SIZE];
};

static int watch(int epoll, int change, int fd, uint32_t events, long index)
{
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)index};
    return epoll_ctl(epoll, change, fd, &event);
}

static void peer_close(struct server *s, int fd)
{
    close(fd); // which ends the watch
    free(s->peers[fd].buf);
    s->open--;
    s->served++;
    if (s->open == CONNECTIONS_MAX - 1)
        watch(s->epoll, EPOLL_CTL_MOD, s->listener, EPOLLIN, s->listener);
}

static bool peer_flush(struct server *s, int fd)
{
    struct peer *peer = &s->peers[fd];
    ssize_t n =
        send(fd, peer->buf + peer->sent, peer->len - peer->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    peer->sent += (uint32_t)n;
    if (peer->sent == peer->len) {
        free(peer->buf);
        peer->buf = NULL;
        watch(s->epoll, EPOLL_CTL_MOD, fd, EPOLLIN, fd);
    }
    return true;
}

// What cannot be sent at once is kept, and nothing more is read until it is gone.
static bool peer_echo(struct server *s, int fd)
{
    ssize_t n = recv(fd, s->buf, sizeof(s->buf), MSG_DONTWAIT);
    if (n <= 0)
        return n < 0 && (errno == EAGAIN || errno == EINTR);
    ssize_t sent = send(fd, s->buf, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent == n)
        return true;
    if (sent < 0 && errno != EAGAIN)
        return false;
    struct peer *peer = &s->peers[fd];
    sent = sent < 0 ? 0 : sent;
    *peer = (struct peer) {.len = (uint32_t)(n - sent), .buf = malloc((size_t)(n - sent))};
    if (!peer->buf)
        return false;
    memcpy(peer->buf, s->buf + sent, peer->len);
    return !watch(s->epoll, EPOLL_CTL_MOD, fd, EPOLLOUT, fd);
}

static void peer_accept(struct server *s)
{
    int fd = accept(s->listener, NULL, NULL);
    if (fd < 0)
        return;
    s->peers[fd] = (struct peer) {0};
    s->open++;
    if (watch(s->epoll, EPOLL_CTL_ADD, fd, EPOLLIN, fd))
        peer_close(s, fd);
    else if (s->open == CONNECTIONS_MAX) // the others wait
        watch(s->epoll, EPOLL_CTL_MOD, s->listener, 0, s->listener);
}

static int serve(const struct address *address, long last)
{
    static struct server s;
    struct epoll_event events[EVENTS];

    s.last = last;
    s.epoll = epoll_create1(EPOLL_CLOEXEC);
    s.listener = socket_open(address);
    setsockopt(s.listener, SOL_SOCKET, SO_REUSEADDR, &(int) {1}, sizeof(int));
    if (bind(s.listener, &address->any, address->len) || listen(s.listener, BACKLOG) ||
        watch(s.epoll, EPOLL_CTL_ADD, s.listener, EPOLLIN, s.listener))
        return complain("listen", 0);
    printf("sock: listening\n");
    while (!s.last || s.served < s.last) {
        int n = epoll_wait(s.epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = (int)events[i].data.u64;
            if (fd == s.listener)
                peer_accept(&s);
            else if (!(events[i].events & EPOLLOUT ? peer_flush(&s, fd) : peer_echo(&s, fd)))
                peer_close(&s, fd);
        }
    }
    printf("sock: served %ld connections\n", s.served);
    return 0;
}

// --- clients

static uint8_t pattern(long connection, long at)
{
    return (uint8_t)(connection * 31 + at * 7 + (at >> 8));
}

struct flow {
    int fd;
    long sent, received;
};

// One step of one connection: 0, or 1 after a complaint.
static int flow_step(int epoll, uint32_t seen, struct flow *flow, long index, long bytes)
{
    static uint8_t buf[16384];

    if (seen & EPOLLOUT) {
        long n = bytes - flow->sent < (long)sizeof(buf) ? bytes - flow->sent : (long)sizeof(buf);
        for (long i = 0; i < n; i++)
            buf[i] = pattern(index, flow->sent + i);
        ssize_t done = send(flow->fd, buf, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done < 0 && errno != EAGAIN && errno != EINTR)
            return complain("send", index);
        flow->sent += done > 0 ? done : 0;
        if (flow->sent == bytes)
            watch(epoll, EPOLL_CTL_MOD, flow->fd, EPOLLIN, index);
    }
    if (!(seen & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        return 0;
    ssize_t n = recv(flow->fd, buf, sizeof(buf), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0) {
        errno = n ? errno : ECONNRESET;
        return complain("receive", index);
    }
    for (ssize_t i = 0; i < n; i++) {
        if (buf[i] != pattern(index, flow->received + i)) {
            printf("sock: connection %ld: byte %ld is %02x, expected %02x\n", index,
                   flow->received + i, buf[i], pattern(index, flow->received + i));
            return 1;
        }
    }
    flow->received += n;
    return 0;
}

static int connect_many(const struct address *address, long count, long bytes)
{
    static struct flow flows[CONNECTIONS_MAX];
    struct epoll_event events[EVENTS];
    int epoll = epoll_create1(EPOLL_CLOEXEC);

    for (long i = 0; i < count; i++) {
        flows[i].fd = socket_connect(address);
        if (flows[i].fd < 0)
            return complain("connect", i);
    }
    printf("sock: %ld connections open\n", count);
    for (long i = 0; i < count; i++)
        if (watch(epoll, EPOLL_CTL_ADD, flows[i].fd, EPOLLIN | EPOLLOUT, i))
            return complain("epoll_ctl", i);
    for (long open = count; open;) {
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int k = 0; k < n; k++) {
            long i = (long)events[k].data.u64;
            if (flow_step(epoll, events[k].events, &flows[i], i, bytes))
                return 1;
            if (flows[i].received == bytes) { // all have been open at once: this one may go
                close(flows[i].fd);
                open--;
            }
        }
    }
    printf("sock: ok %ld connections, %ld bytes each\n", count, bytes);
    return 0;
}

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int pingpong(const struct address *address, long rounds, long bytes)
{
    static uint8_t out[BUF_SIZE], in[BUF_SIZE];
    double *took = calloc((size_t)rounds, sizeof(*took));
    int fd = socket_connect(address);

    if (fd < 0 || !took)
        return complain("connect", 0);
    for (long round = 0; round < rounds; round++) {
        double begun = now_us();
        memset(out, (int)round, (size_t)bytes);
        if (send(fd, out, (size_t)bytes, MSG_NOSIGNAL) != bytes)
            return complain("send", 0);
        if (recv(fd, in, (size_t)bytes, MSG_WAITALL) != bytes)
            return complain("receive", 0);
        if (memcmp(in, out, (size_t)bytes)) {
            printf("sock: round %ld came back changed\n", round);
            return 1;
        }
        took[round] = now_us() - begun;
    }
    qsort(took, (size_t)rounds, sizeof(*took), by_value);
    printf("sock: %ld rounds of %ld bytes, median %.1f us, p99 %.1f us\n", rounds, bytes,
           took[rounds / 2], took[rounds * 99 / 100]);
    return 0;
}

int sock_main(int argc, char **argv)
{
    struct address address;
    struct rlimit files = {FILES_MAX, FILES_MAX};

    if (argc < 3) {
        fprintf(stderr, "usage: sock serve ADDRESS [CONNECTIONS]\n"
                        "       sock connect ADDRESS COUNT [BYTES]\n"
                        "       sock pingpong ADDRESS ROUNDS [BYTES]\n"
                        "ADDRESS: tcp:[HOST:]PORT or vsock:[CID:]PORT\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    setrlimit(RLIMIT_NOFILE, &files);
    bool server = !strcmp(argv[1], "serve");
    address_parse(argv[2], server, &address);
    if (server)
        return serve(&address, argc > 3 ? number_parse("CONNECTIONS", argv[3], 1, 1 << 28) : 0);
    const char *number = argc > 3 ? argv[3] : "1", *bytes = argc > 4 ? argv[4] : "1";
    if (!strcmp(argv[1], "connect"))
        return connect_many(&address, number_parse("COUNT", number, 1, CONNECTIONS_MAX),
                            number_parse("BYTES", bytes, 1, 1 << 28));
    if (!strcmp(argv[1], "pingpong"))
        return pingpong(&address, number_parse("ROUNDS", number, 1, 1 << 20),
                        number_parse("BYTES", bytes, 1, BUF_SIZE));
    fprintf(stderr, "sock: '%s': expected serve, connect or pingpong\n", argv[1]);
    return 2;
}
