// SPDX-License-Identifier: Apache-2.0
//
// Echo over TCP and over vsock: a server, a client that checks what comes back on many connections
// at once, and round trips one after the other with their time.
#include "ferryt.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/vm_sockets.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CONNECTIONS_MAX = 4000, BUF_SIZE = 65536, BACKLOG = 1024 };

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
    struct pollfd polls[1 + CONNECTIONS_MAX]; // the first is the listener
    struct peer peers[1 + CONNECTIONS_MAX];
    nfds_t count;
    long served, last;
    char buf[BUF_SIZE];
};

static void peer_close(struct server *s, nfds_t i)
{
    close(s->polls[i].fd);
    free(s->peers[i].buf);
    s->count--;
    s->polls[i] = s->polls[s->count];
    s->peers[i] = s->peers[s->count];
    s->served++;
}

static bool peer_flush(struct server *s, nfds_t i)
{
    struct peer *peer = &s->peers[i];
    ssize_t n = send(s->polls[i].fd, peer->buf + peer->sent, peer->len - peer->sent,
                     MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    peer->sent += (uint32_t)n;
    if (peer->sent == peer->len) {
        free(peer->buf);
        peer->buf = NULL;
        s->polls[i].events = POLLIN;
    }
    return true;
}

// What cannot be sent at once is kept, and nothing more is read until it is gone.
static bool peer_echo(struct server *s, nfds_t i)
{
    ssize_t n = recv(s->polls[i].fd, s->buf, sizeof(s->buf), MSG_DONTWAIT);
    if (n <= 0)
        return n < 0 && (errno == EAGAIN || errno == EINTR);
    ssize_t sent = send(s->polls[i].fd, s->buf, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent == n)
        return true;
    if (sent < 0 && errno != EAGAIN)
        return false;
    struct peer *peer = &s->peers[i];
    sent = sent < 0 ? 0 : sent;
    *peer = (struct peer) {.len = (uint32_t)(n - sent), .buf = malloc((size_t)(n - sent))};
    if (!peer->buf)
        return false;
    memcpy(peer->buf, s->buf + sent, peer->len);
    s->polls[i].events = POLLOUT;
    return true;
}

static void peer_accept(struct server *s)
{
    int fd = accept(s->polls[0].fd, NULL, NULL);
    if (fd < 0)
        return;
    s->peers[s->count] = (struct peer) {0};
    s->polls[s->count++] = (struct pollfd) {.fd = fd, .events = POLLIN};
}

static int serve(const struct address *address, long last)
{
    static struct server s;

    s.last = last;
    s.count = 1;
    s.polls[0] = (struct pollfd) {.fd = socket_open(address), .events = POLLIN};
    setsockopt(s.polls[0].fd, SOL_SOCKET, SO_REUSEADDR, &(int) {1}, sizeof(int));
    if (bind(s.polls[0].fd, &address->any, address->len) || listen(s.polls[0].fd, BACKLOG))
        return complain("listen", 0);
    printf("sock: listening\n");
    while (!s.last || s.served < s.last) {
        s.polls[0].events = s.count <= CONNECTIONS_MAX ? POLLIN : 0;
        if (poll(s.polls, s.count, -1) < 0)
            continue;
        for (nfds_t i = s.count - 1; i > 0; i--) {
            short seen = s.polls[i].revents;
            if (seen && !(seen & POLLOUT ? peer_flush(&s, i) : peer_echo(&s, i)))
                peer_close(&s, i);
        }
        if (s.polls[0].revents)
            peer_accept(&s);
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
    long sent, received;
};

// One step of one connection: 0, or 1 after a complaint.
static int flow_step(struct pollfd *polled, struct flow *flow, long index, long bytes)
{
    static uint8_t buf[16384];

    if (polled->revents & POLLOUT) {
        long n = bytes - flow->sent < (long)sizeof(buf) ? bytes - flow->sent : (long)sizeof(buf);
        for (long i = 0; i < n; i++)
            buf[i] = pattern(index, flow->sent + i);
        ssize_t done = send(polled->fd, buf, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done < 0 && errno != EAGAIN && errno != EINTR)
            return complain("send", index);
        flow->sent += done > 0 ? done : 0;
        if (flow->sent == bytes)
            polled->events = POLLIN;
    }
    if (!(polled->revents & (POLLIN | POLLHUP | POLLERR)))
        return 0;
    ssize_t n = recv(polled->fd, buf, sizeof(buf), MSG_DONTWAIT);
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
    static struct pollfd polls[CONNECTIONS_MAX];
    static struct flow flows[CONNECTIONS_MAX];

    for (long i = 0; i < count; i++) {
        polls[i] = (struct pollfd) {.fd = socket_connect(address), .events = POLLIN | POLLOUT};
        if (polls[i].fd < 0)
            return complain("connect", i);
    }
    printf("sock: %ld connections open\n", count);
    for (long open = count; open;) {
        if (poll(polls, (nfds_t)count, -1) < 0)
            continue;
        for (long i = 0; i < count; i++) {
            if (polls[i].fd < 0 || !polls[i].revents)
                continue;
            if (flow_step(&polls[i], &flows[i], i, bytes))
                return 1;
            if (flows[i].received == bytes) { // all have been open at once: this one may go
                close(polls[i].fd);
                polls[i].fd = -1;
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
    struct rlimit files = {CONNECTIONS_MAX + 16, CONNECTIONS_MAX + 16};

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
