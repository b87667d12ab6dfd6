// SPDX-License-Identifier: Apache-2.0
// User networking: frames go to passt(1) through a stream socket, each after its length (u32, big
// endian). passt turns them into ordinary sockets of its own, which need no privilege; it drops
// what it has, enters empty namespaces and a seccomp filter, and ends when the socket closes, so
// that it does not outlive us whatever becomes of us. A starter begins and ends it, since our own
// filters let no thread do that.
#include "devices/net_backend.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vmm/starter.h"
#include "vmm/util.h"

#define GATEWAY_MAC "52:55:0a:00:02:02"
enum {
    LENGTH = 4,           // bytes before each frame
    IN_SIZE = 256 * 1024, // several frames in one read
    READY_MS = 10000,     // for passt to start; it takes 15 to 30 ms
    PASST_FD = 3,         // its end of the socket
    ARGS_MAX = 32 + 2 * NET_FORWARDS_MAX,
    WORD_MAX = 40, // "255.255.255.255/65535:65535"
};

struct net_user {
    struct net_backend b; // first
    struct net_user_config config;
    char *program;
    struct starter *starter; // its own, or the config's
    int stderr_fd;           // -1: none
    // What came: in[begin .. end). Frames are found here first, since their bounds are not known
    // before; one read brings many.
    uint8_t *in;
    size_t begin, end;
    // The rest of a frame that went out in part.
    uint8_t *out;
    size_t out_len, out_done;
};

static struct net_user *user_of(struct net_backend *b)
{
    return container_of(b, struct net_user, b);
}

extern char **environ;

// --- frames

static int user_flush(struct net_backend *b)
{
    struct net_user *u = user_of(b);
    while (u->out_done < u->out_len) {
        ssize_t n = send(b->fds[0], u->out + u->out_done, u->out_len - u->out_done,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? -EAGAIN : -errno;
        u->out_done += (size_t)n;
    }
    u->out_len = u->out_done = 0;
    b->blocked = false;
    return 0;
}

// Keeps what is left of [length, frame...] after `sent` bytes of it.
static void rest_keep(struct net_user *u, const struct iovec *iov, unsigned n, size_t sent)
{
    u->out_len = u->out_done = 0;
    for (unsigned i = 0; i < n; i++) {
        size_t skip = sent < iov[i].iov_len ? sent : iov[i].iov_len;
        memcpy(u->out + u->out_len, (uint8_t *)iov[i].iov_base + skip, iov[i].iov_len - skip);
        u->out_len += iov[i].iov_len - skip;
        sent -= skip;
    }
    u->b.blocked = u->out_len;
}

static ssize_t user_send(struct net_backend *b, unsigned pair, const struct iovec *iov, unsigned n)
{
    struct net_user *u = user_of(b);
    struct iovec out[NET_IOV_MAX];
    size_t len = 0;
    if (u->out_len)
        return -EAGAIN;
    for (unsigned i = 1; i < n; i++) {
        out[i] = iov[i];
        len += iov[i].iov_len;
    }
    if (len > NET_FRAME_MAX)
        return -EMSGSIZE;
    uint32_t length = htonl((uint32_t)len); // in the place of the header, which says nothing here
    out[0] = (struct iovec) {&length, LENGTH};
    const struct msghdr message = {.msg_iov = out, .msg_iovlen = n};
    ssize_t sent = sendmsg(b->fds[0], &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0)
        return errno == EINTR ? -EAGAIN : -errno;
    if ((size_t)sent < LENGTH + len)
        rest_keep(u, out, n, (size_t)sent);
    return (ssize_t)(sizeof(struct net_header) + len);
}

// Bytes of the frame at `begin`; -EAGAIN: not all of it is here.
static ssize_t frame_here(const struct net_user *u)
{
    uint32_t length;
    if (u->end - u->begin < LENGTH)
        return -EAGAIN;
    memcpy(&length, u->in + u->begin, LENGTH);
    length = ntohl(length);
    if (length > NET_FRAME_MAX)
        return -ECONNRESET; // it does not keep to the format: there is no next frame to find
    return u->end - u->begin < LENGTH + length ? -EAGAIN : (ssize_t)length;
}

static int more_read(struct net_user *u)
{
    memmove(u->in, u->in + u->begin, u->end - u->begin);
    u->end -= u->begin;
    u->begin = 0;
    ssize_t n = recv(u->b.fds[0], u->in + u->end, IN_SIZE - u->end, MSG_DONTWAIT);
    if (n < 0)
        return errno == EINTR ? -EAGAIN : -errno;
    u->end += (size_t)n;
    return n ? 0 : -EPIPE;
}

static ssize_t user_receive(struct net_backend *b, unsigned pair, const struct iovec *iov,
                            unsigned n)
{
    struct net_user *u = user_of(b);
    ssize_t length = frame_here(u);
    while (length == -EAGAIN) {
        int ret = more_read(u);
        if (ret)
            return ret;
        length = frame_here(u);
    }
    if (length < 0)
        return length;
    memset(iov[0].iov_base, 0, iov[0].iov_len);
    const uint8_t *from = u->in + u->begin + LENGTH;
    size_t left = (size_t)length;
    for (unsigned i = 1; i < n && left; i++) {
        size_t take = iov[i].iov_len < left ? iov[i].iov_len : left;
        memcpy(iov[i].iov_base, from, take);
        from += take;
        left -= take;
    }
    u->begin += LENGTH + (size_t)length;
    return (ssize_t)sizeof(struct net_header) + length;
}

// --- the process

// Its last words, one line, into b.why.
static void stderr_read(struct net_user *u)
{
    char text[1024];
    ssize_t n = u->stderr_fd >= 0 ? read(u->stderr_fd, text, sizeof(text) - 1) : 0;
    if (n <= 0)
        return;
    text[n] = 0;
    char *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        bool noise = strstr(line, "syslog") || strstr(line, "run as root");
        if (*line && !noise)
            snprintf(u->b.why, sizeof(u->b.why), "%s", line);
    }
}

static void user_close(struct net_backend *b)
{
    struct net_user *u = user_of(b);
    if (b->fds[0] >= 0)
        close(b->fds[0]);
    b->fds[0] = -1;
    starter_end(u->starter);
    stderr_read(u);
    if (u->stderr_fd >= 0)
        close(u->stderr_fd);
    u->stderr_fd = -1;
    u->begin = u->end = u->out_len = u->out_done = 0;
    b->blocked = false;
}

static void user_free(struct net_backend *b)
{
    struct net_user *u = user_of(b);
    if (u->starter != u->config.starter)
        starter_destroy(u->starter);
    free(u->program);
    free(u->in);
    free(u->out);
    free(u);
}

struct arguments {
    char *list[ARGS_MAX];
    unsigned nr;
    char words[NET_FORWARDS_MAX + 1][WORD_MAX];
    unsigned nr_words;
};

static void argument(struct arguments *a, const char *word)
{
    if (a->nr < ARGS_MAX - 1)
        a->list[a->nr++] = (char *)word; // posix_spawn does not write to them
}

// passt takes the addresses of an interface, by default the one with the default route. We name the
// addresses, so that any does, when there is no such route.
static bool default_route(void)
{
    char line[256];
    bool found = false;
    FILE *f = fopen("/proc/net/route", "re");
    while (f && !found && fgets(line, sizeof(line), f)) {
        char name[IFNAMSIZ];
        unsigned long destination, gateway;
        found = sscanf(line, "%15s %lx %lx", name, &destination, &gateway) == 3 && !destination;
    }
    if (f)
        fclose(f);
    return found;
}

static const char *host_address(const struct net_forward *f)
{
    return *f->address ? f->address : "127.0.0.1";
}

static void forwards_add(struct arguments *a, const struct net_user_config *c, bool udp)
{
    bool any = false;
    for (unsigned i = 0; i < c->nr_forwards; i++) {
        const struct net_forward *f = &c->forwards[i];
        if (f->udp != udp)
            continue;
        char *word = a->words[a->nr_words++];
        snprintf(word, WORD_MAX, "%s/%u:%u", host_address(f), f->host_port, f->guest_port);
        argument(a, udp ? "-u" : "-t");
        argument(a, word);
        any = true;
    }
    if (!any && udp) { // else the numbers of the TCP ports count for UDP, too
        argument(a, "-u");
        argument(a, "none");
    }
}

static uint16_t mtu_of(const struct net_user_config *c)
{
    return c->mtu ? c->mtu : NET_USER_MTU;
}

static void arguments_make(struct arguments *a, const struct net_user_config *c)
{
    static const char *const words[] = {
        "passt", "--foreground", "--quiet",        "--stderr",     "--fd",
        "3",     "-4",           "--address",      NET_USER_GUEST, "--netmask",
        "24",    "--gateway",    NET_USER_GATEWAY, "--mac-addr",   GATEWAY_MAC};
    a->nr = a->nr_words = 0;
    for (size_t i = 0; i < ARRAY_SIZE(words); i++)
        argument(a, words[i]);
    char *mtu = a->words[a->nr_words++];
    snprintf(mtu, WORD_MAX, "%u", mtu_of(c));
    argument(a, "--mtu");
    argument(a, mtu);
    if (!default_route()) {
        argument(a, "--interface");
        argument(a, "lo");
    }
    if (c->no_host)
        argument(a, "--no-map-gw");
    forwards_add(a, c, false);
    forwards_add(a, c, true);
    a->list[a->nr] = NULL;
}

// In the starter's process. fds: its socket, its stderr.
static int program_start(void *arg, const int fds[2], pid_t *pid, struct error *err)
{
    const struct net_user_config *c = arg;
    struct arguments a;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attr;
    sigset_t none, all;
    arguments_make(&a, c);
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDWR, 0);
    posix_spawn_file_actions_adddup2(&actions, STDIN_FILENO, STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, fds[1], STDERR_FILENO);
    posix_spawn_file_actions_adddup2(&actions, fds[0], PASST_FD);
    posix_spawn_file_actions_addclosefrom_np(&actions, PASST_FD + 1);
    posix_spawnattr_init(&attr);
    posix_spawnattr_setsigmask(&attr, &none);
    posix_spawnattr_setsigdefault(&attr, &all);
    // A group of its own: ^C is ours to handle, and the guest's network stays until we end it.
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF |
                                        POSIX_SPAWN_SETPGROUP);
    const char *program = c->program ? c->program : "passt";
    int ret = posix_spawnp(pid, program, &actions, &attr, a.list, environ);
    posix_spawnattr_destroy(&attr);
    posix_spawn_file_actions_destroy(&actions);
    if (!ret)
        return 0;
    *pid = 0;
    if (ret == ENOENT)
        return error_set(err, -ENOENT,
                         "user networking needs the program %s: install the package passt, or use "
                         "a tap",
                         program);
    return error_set(err, -ret, "%s: %s", program, strerror(ret));
}

// --- ready or not

// 0: the port can be bound, so nobody listens there.
static int port_free(const struct net_forward *f)
{
    autoclose int s = socket(AF_INET, (f->udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(f->host_port)};
    int one = 1;
    inet_pton(AF_INET, host_address(f), &at.sin_addr);
    // Connections that ended a moment ago do not count.
    if (s >= 0 && !f->udp)
        setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    return s < 0 || bind(s, (struct sockaddr *)&at, sizeof(at)) ? -errno : 0;
}

static int ports_check(const struct net_user *u, struct error *err)
{
    for (unsigned i = 0; i < u->config.nr_forwards; i++) {
        const struct net_forward *f = &u->config.forwards[i];
        int ret = port_free(f);
        if (ret == -EADDRINUSE)
            return error_set(err, -EBUSY, "forward: port %u of %s is in use", f->host_port,
                             host_address(f));
        if (ret)
            return error_set(err, ret, "forward: port %u of %s: %s", f->host_port, host_address(f),
                             strerror(-ret));
    }
    return 0;
}

// passt goes on when it could not listen.
static int ports_listening(const struct net_user *u, struct error *err)
{
    for (unsigned i = 0; i < u->config.nr_forwards; i++)
        if (!port_free(&u->config.forwards[i]))
            return error_set(err, -EIO, "forward: passt does not listen on port %u of %s",
                             u->config.forwards[i].host_port, host_address(&u->config.forwards[i]));
    return 0;
}

// A question that it answers as soon as it works: who has the gateway's address? It also learns the
// guest's MAC from it, so that forwarded connections arrive before the guest has sent anything.
struct __attribute__((packed)) arp {
    uint8_t to[6], from[6];
    uint16_t ethertype, hardware, protocol;
    uint8_t hardware_len, protocol_len;
    uint16_t operation;
    uint8_t sender_mac[6];
    uint32_t sender;
    uint8_t target_mac[6];
    uint32_t target;
};

static void question_make(struct arp *q, const uint8_t mac[6])
{
    *q = (struct arp) {.to = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
                       .ethertype = htons(0x0806),
                       .hardware = htons(1),
                       .protocol = htons(0x0800),
                       .hardware_len = 6,
                       .protocol_len = 4,
                       .operation = htons(1)};
    memcpy(q->from, mac, sizeof(q->from));
    memcpy(q->sender_mac, mac, sizeof(q->sender_mac));
    inet_pton(AF_INET, NET_USER_GUEST, &q->sender);
    inet_pton(AF_INET, NET_USER_GATEWAY, &q->target);
}

static int died(struct net_user *u, struct error *err)
{
    user_close(&u->b);
    return error_set(err, -EIO, "passt ended at its start%s%s", *u->b.why ? ": " : "", u->b.why);
}

static int ready_wait(struct net_user *u, struct error *err)
{
    struct arp question;
    struct net_header header = {0};
    uint8_t answer[NET_FRAME_MIN + 64];
    const struct iovec out[] = {{&header, sizeof(header)}, {&question, sizeof(question)}};
    const struct iovec in[] = {{&header, sizeof(header)}, {answer, sizeof(answer)}};
    question_make(&question, u->b.mac);
    if (user_send(&u->b, 0, out, 2) < 0)
        return died(u, err);
    uint64_t deadline = time_ns() + READY_MS * 1000000ull;
    for (;;) {
        ssize_t n = user_receive(&u->b, 0, in, 2);
        if (n >= (ssize_t)(sizeof(header) + NET_FRAME_MIN) && answer[12] == 8 && answer[13] == 6)
            return 0;
        if (n < 0 && n != -EAGAIN)
            return died(u, err);
        uint64_t now = time_ns();
        struct pollfd p = {.fd = u->b.fds[0], .events = POLLIN};
        if (now >= deadline)
            return error_set(err, -ETIMEDOUT, "passt did not start within %d s", READY_MS / 1000);
        if (n < 0 && poll(&p, 1, (int)((deadline - now) / 1000000) + 1) < 0 && errno != EINTR)
            return error_errno(err, "poll");
    }
}

static int process_open(struct net_user *u, struct error *err)
{
    int ends[2], pipe_ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
        return error_errno(err, "socketpair");
    autoclose int theirs = ends[1];
    u->b.fds[0] = ends[0];
    // Neither side waits for the other: what does not fit is lost.
    if (pipe2(pipe_ends, O_CLOEXEC | O_NONBLOCK))
        return error_errno(err, "pipe");
    autoclose int their_stderr = pipe_ends[1];
    u->stderr_fd = pipe_ends[0];
    return starter_start(u->starter, (const int[2]) {theirs, their_stderr}, err);
}

static int user_open(struct net_backend *b, struct error *err)
{
    struct net_user *u = user_of(b);
    *b->why = 0;
    int ret = ports_check(u, err);
    if (!ret)
        ret = process_open(u, err);
    if (!ret)
        ret = ready_wait(u, err);
    if (!ret)
        ret = ports_listening(u, err);
    if (ret)
        user_close(b);
    return ret;
}

static const struct net_backend_ops user_ops = {
    .name = "user",
    .early = true,
    .open = user_open,
    .close = user_close,
    .free = user_free,
    .send = user_send,
    .receive = user_receive,
    .flush = user_flush,
};

int net_user_starter(const struct net_user_config *config, struct starter **out, struct error *err)
{
    return starter_create(out, program_start, (void *)config, err);
}

int net_user_new(struct net_backend **out, const struct net_user_config *config, struct error *err)
{
    struct net_user *u = calloc(1, sizeof(*u));
    if (!u)
        return error_set(err, -ENOMEM, "no memory for user networking");
    u->b.ops = &user_ops;
    u->b.pairs = 1;
    u->b.mtu = mtu_of(config);
    u->config = *config;
    u->starter = config->starter;
    u->stderr_fd = -1;
    for (unsigned i = 0; i < NET_PAIRS_MAX; i++)
        u->b.fds[i] = -1;
    u->program = config->program ? strdup(config->program) : NULL;
    u->in = malloc(IN_SIZE);
    u->out = malloc(LENGTH + NET_FRAME_MAX);
    if (!u->in || !u->out || (config->program && !u->program)) {
        user_free(&u->b);
        return error_set(err, -ENOMEM, "no memory for user networking");
    }
    int ret = u->starter ? 0 : net_user_starter(config, &u->starter, err);
    if (ret) {
        user_free(&u->b);
        return ret;
    }
    *out = &u->b;
    return 0;
}
