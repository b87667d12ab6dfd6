// SPDX-License-Identifier: Apache-2.0
#include "sched/client.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "sched/policy.h"
#include "vmm/util.h"

enum {
    REPLY_MS = 5000, // a daemon that does not answer by then is none
    RETRY_MS = 200,  // between attempts to find one
};

struct sched_client {
    struct sched_client_config config;
    char socket[108], name[SCHED_NAME_MAX];
    pid_t tids[SCHED_VCPUS_MAX];
    cpu_set_t affinity; // of the threads before any daemon
    // One address for good: zeroes, or over them the page that a daemon gave. Threads never see it
    // move.
    struct sched_page *page;
    uint64_t seen_ns[SCHED_VCPUS_MAX]; // wait_ns, by each thread
    bool wants[SCHED_VCPUS_MAX];       // what each thread said last is not "running"
    // One number for good, too: a daemon's eventfd, or `silent`, which nobody reads. (A thread that
    // is about to ring must not find another file there.)
    int doorbell, silent;
    int fd; // socket, -1; of whoever watches
    atomic_bool attached;
    pthread_mutex_t lock; // guards config.share, the broker, and the change of pages
    pthread_t thread;
    bool watching;
    int stop_fd;
};

static int futex(_Atomic uint32_t *word, int op, uint32_t value)
{
    return (int)syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

// --- socket

static int connect_to(const char *path, struct error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr.sun_path))
        return error_set(err, -ENAMETOOLONG, "socket '%s': at most %zu characters", path,
                         sizeof(addr.sun_path) - 1);
    strcpy(addr.sun_path, path);
    autoclose int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return error_errno(err, "socket");
    struct timeval limit = {.tv_sec = REPLY_MS / 1000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)))
        return error_errno(err, "scheduler at %s", path);
    return take_fd(&fd);
}

static int fds_take(struct msghdr *hdr, int *fds, unsigned max)
{
    unsigned n = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(hdr); c; c = CMSG_NXTHDR(hdr, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (n < max)
                fds[n++] = fd;
            else
                close(fd);
        }
    }
    return (int)n;
}

// One message of a known type and size, and its descriptors (unused ones are -1).
static int msg_receive(int fd, union sched_msg *msg, int fds[2], struct error *err)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
    struct iovec iov = {msg, sizeof(*msg)};
    struct msghdr hdr = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control,
                         .msg_controllen = sizeof(control)};
    fds[0] = fds[1] = -1;
    ssize_t n = recvmsg(fd, &hdr, MSG_CMSG_CLOEXEC);
    if (n < 0)
        return error_errno(err, "the scheduler's answer");
    if (!n)
        return error_set(err, -ECONNRESET, "the scheduler closed the connection");
    fds_take(&hdr, fds, 2);
    if ((size_t)n >= sizeof(msg->head) && msg->head.magic == SCHED_MAGIC &&
        msg->head.version == SCHED_VERSION && (size_t)n == sched_msg_size(msg->head.type))
        return 0;
    for (unsigned i = 0; i < 2; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    fds[0] = fds[1] = -1;
    return error_set(err, -EPROTO, "the scheduler sent %zd bytes that are no message of version %d",
                     n, SCHED_VERSION);
}

static int exchange(int fd, const void *msg, size_t size, enum sched_msg_type type,
                    union sched_msg *answer, int fds[2], struct error *err)
{
    if (send(fd, msg, size, MSG_NOSIGNAL) != (ssize_t)size)
        return error_errno(err, "asking the scheduler");
    int ret = msg_receive(fd, answer, fds, err);
    if (ret || answer->head.type == type)
        return ret;
    for (unsigned i = 0; i < 2; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (answer->head.type != SCHED_ERROR || answer->error.code >= 0)
        return error_set(err, -EPROTO, "the scheduler answered with type %u, expected %u",
                         answer->head.type, type);
    return error_set(err, answer->error.code, "%.*s", SCHED_TEXT_MAX - 1, answer->error.text);
}

// One message and its answer; `fd`: what came with it.
static int call(int s, const void *msg, size_t size, enum sched_msg_type type, int *fd,
                struct error *err)
{
    union sched_msg answer;
    int fds[2];
    int ret = exchange(s, msg, size, type, &answer, fds, err);
    if (ret)
        return ret;
    if (fds[1] >= 0)
        close(fds[1]);
    if (fd)
        *fd = fds[0];
    else if (fds[0] >= 0)
        close(fds[0]);
    if (fd && fds[0] < 0)
        return error_set(err, -EPROTO, "the scheduler's answer came without its descriptor");
    return 0;
}

int sched_call(const char *socket, const void *msg, size_t size, enum sched_msg_type type, int *fd,
               struct error *err)
{
    autoclose int s = connect_to(socket, err);
    return s < 0 ? s : call(s, msg, size, type, fd, err);
}

static const struct sched_head confine = {SCHED_MAGIC, SCHED_VERSION, SCHED_CONFINE};

int sched_connect_confined(const char *socket, struct error *err)
{
    autoclose int s = connect_to(socket, err);
    if (s < 0)
        return s;
    int ret = call(s, &confine, sizeof(confine), SCHED_OK, NULL, err);
    return ret ? ret : take_fd(&s);
}

// A connection to the daemon: the descriptor, or -errno.
static int daemon_connect(struct sched_client *c, struct error *err)
{
    int fd = -1;
    if (c->config.broker < 0)
        return connect_to(c->socket, err);
    pthread_mutex_lock(&c->lock); // one asks at a time
    int ret = call(c->config.broker, &confine, sizeof(confine), SCHED_OK, &fd, err);
    pthread_mutex_unlock(&c->lock);
    return ret ? ret : fd;
}

// --- the page

// Past TSan, which takes a mapping for a write to all of it: threads go on using what is there.
static int page_replace(struct sched_client *c, int flags, int fd)
{
    // The last argument goes over the stack: an int would leave half of it to chance.
    long ret = syscall(SYS_mmap, c->page, (long)SCHED_PAGE_BYTES, (long)(PROT_READ | PROT_WRITE),
                       (long)(flags | MAP_FIXED), (long)fd, 0L);
    return ret == -1 ? -errno : 0;
}

static int page_map(struct sched_client *c, int fd, struct error *err)
{
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    if (fstat(fd, &st) || st.st_size != SCHED_PAGE_BYTES || seals < 0 || !(seals & F_SEAL_SHRINK))
        return error_set(err, -EPROTO, "the scheduler's page is not a sealed file of %d bytes",
                         SCHED_PAGE_BYTES);
    return page_replace(c, MAP_SHARED, fd) ? error_errno(err, "mapping the scheduler's page") : 0;
}

static void freely(struct sched_client *c)
{
    for (unsigned i = 0; i < c->config.nr; i++) {
        sched_setaffinity(c->tids[i], sizeof(c->affinity), &c->affinity);
        sched_policy_set(c->tids[i], SCHED_POLICY_PLAIN);
    }
}

// Whoever sleeps in the old page is woken there, before it is gone, and not before it is a thread
// like others again: one that left its turn has a real-time priority.
static void lost(struct sched_client *c)
{
    pthread_mutex_lock(&c->lock);
    atomic_store(&c->attached, false);
    freely(c);
    for (unsigned i = 0; i < c->config.nr; i++) {
        atomic_store(&c->page->slots[i].grant, GRANT_FREE);
        futex(&c->page->slots[i].grant, FUTEX_WAKE, INT_MAX);
    }
    dup3(c->silent, c->doorbell, O_CLOEXEC);
    page_replace(c, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    pthread_mutex_unlock(&c->lock);
}

static void ring(struct sched_client *c)
{
    const uint64_t one = 1;
    if (write(c->doorbell, &one, sizeof(one)) < 0)
        return; // it rings already
}

int sched_client_attach(struct sched_client *c, struct error *err)
{
    struct sched_register reg = {.head = sched_head(SCHED_REGISTER),
                                 .nr_vcpus = c->config.nr,
                                 .signal = (uint32_t)c->config.signal};
    union sched_msg answer;
    int fds[2];
    sched_client_share(c, &reg.share);
    strcpy(reg.name, c->name);
    for (unsigned i = 0; i < c->config.nr; i++)
        reg.tids[i] = (int32_t)c->tids[i];
    autoclose int fd = daemon_connect(c, err);
    if (fd < 0)
        return fd;
    int ret = exchange(fd, &reg, sizeof(reg), SCHED_REGISTERED, &answer, fds, err);
    if (ret)
        return ret;
    autoclose int memory = fds[0], bell = fds[1];
    if (memory < 0 || bell < 0)
        return error_set(err, -EPROTO, "the scheduler gave no page");
    pthread_mutex_lock(&c->lock);
    // First: from the mapping on, threads ring it.
    ret = dup3(bell, c->doorbell, O_CLOEXEC) < 0 ? error_errno(err, "the scheduler's doorbell")
                                                 : page_map(c, memory, err);
    if (ret) {
        dup3(c->silent, c->doorbell, O_CLOEXEC);
    } else {
        c->fd = take_fd(&fd);
        atomic_store(&c->attached, true);
    }
    pthread_mutex_unlock(&c->lock);
    if (!ret)
        ring(c); // from now on a thread that is signalled finds its slot
    if (!ret && c->config.changed)
        c->config.changed(c->config.arg, 0, "");
    return ret;
}

// --- the thread that watches

// False when the daemon is gone, or does not speak as it should.
static bool listen_to(struct sched_client *c, struct error *err)
{
    union sched_msg msg;
    int fds[2];
    int ret = msg_receive(c->fd, &msg, fds, err);
    for (unsigned i = 0; i < 2; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (ret)
        return false;
    struct error bad;
    if (msg.head.type == SCHED_SET && !sched_share_check(&msg.set.share, &bad)) {
        pthread_mutex_lock(&c->lock); // somebody set it at the daemon: so it stays with the next
        sched_share_merge(&c->config.share, &msg.set.share);
        pthread_mutex_unlock(&c->lock);
    }
    return true;
}

static void *watch_main(void *arg)
{
    struct sched_client *c = arg;
    struct error err;
    pthread_setname_np(pthread_self(), "sched");
    seccomp_enter_or_abort(SECCOMP_WORKER, c->config.seccomp);
    thread_prompt();
    for (;;) {
        bool attached = c->fd >= 0;
        struct pollfd polls[2] = {{.fd = c->stop_fd, .events = POLLIN},
                                  {.fd = c->fd, .events = POLLIN}};
        poll(polls, attached ? 2 : 1, attached ? -1 : RETRY_MS);
        if (polls[0].revents)
            return NULL;
        if (!attached) {
            sched_client_attach(c, &err);
        } else if (polls[1].revents && !listen_to(c, &err)) {
            lost(c);
            if (c->config.changed)
                c->config.changed(c->config.arg, err.code, err.text);
        }
    }
}

int sched_client_watch(struct sched_client *c, struct error *err)
{
    c->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (c->stop_fd < 0)
        return error_errno(err, "eventfd");
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int ret = pthread_create(&c->thread, NULL, watch_main, c);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (ret)
        return error_set(err, -ret, "the scheduler's watcher: %s", strerror(ret));
    c->watching = true;
    return 0;
}

// --- creation

int sched_client_create(struct sched_client **out, const struct sched_client_config *config,
                        struct error *err)
{
    if (!config->nr || config->nr > SCHED_VCPUS_MAX)
        return error_set(err, -EINVAL, "%u threads to schedule: expected 1 to %d", config->nr,
                         SCHED_VCPUS_MAX);
    if (!*config->name || strlen(config->name) >= SCHED_NAME_MAX)
        return error_set(err, -EINVAL, "name '%.80s': expected 1 to %d characters", config->name,
                         SCHED_NAME_MAX - 1);
    if (strlen(config->socket) >= sizeof(((struct sched_client *)0)->socket))
        return error_set(err, -ENAMETOOLONG, "socket '%.120s': too long", config->socket);
    int ret = sched_share_check(&config->share, err);
    if (ret)
        return ret;
    struct sched_client *c = calloc(1, sizeof(*c));
    if (!c)
        return error_set(err, -ENOMEM, "no memory for the scheduler's client");
    c->config = *config;
    strcpy(c->socket, config->socket);
    strcpy(c->name, config->name);
    memcpy(c->tids, config->tids, config->nr * sizeof(c->tids[0]));
    c->fd = c->stop_fd = -1;
    c->silent = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->doorbell = fcntl(c->silent, F_DUPFD_CLOEXEC, 0);
    if (c->doorbell < 0)
        ret = error_errno(err, "eventfd");
    pthread_mutex_init(&c->lock, NULL);
    if (!ret && sched_getaffinity(c->tids[0], sizeof(c->affinity), &c->affinity))
        ret = error_errno(err, "thread %d: its affinity", (int)c->tids[0]);
    c->page =
        mmap(NULL, SCHED_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!ret && c->page == MAP_FAILED)
        ret = error_errno(err, "the scheduler's page");
    if (ret)
        sched_client_destroy(c);
    else
        *out = c;
    return ret;
}

void sched_client_detach(struct sched_client *c)
{
    if (c->watching) {
        uint64_t one = 1;
        while (write(c->stop_fd, &one, sizeof(one)) < 0 && errno == EINTR)
            ;
        pthread_join(c->thread, NULL);
        c->watching = false;
    }
    if (c->fd >= 0)
        lost(c);
}

void sched_client_destroy(struct sched_client *c)
{
    if (!c)
        return;
    sched_client_detach(c);
    const int fds[] = {c->stop_fd, c->doorbell, c->silent};
    for (size_t i = 0; i < ARRAY_SIZE(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (c->page != MAP_FAILED)
        munmap(c->page, SCHED_PAGE_BYTES);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

bool sched_client_attached(const struct sched_client *c)
{
    return atomic_load(&c->attached);
}

// --- turns

static bool must_wait(uint32_t grant)
{
    return grant == GRANT_WAIT || grant == GRANT_QUEUED;
}

// Sleeps while `grant` is `value` and *look is 0; 0, or -1 with errno.
static int turn_wait(_Atomic uint32_t *grant, uint32_t value, const uint32_t *look)
{
    enum { LOOK_NS = 20000000 };
    struct futex_waitv both[2] = {
        {.val = value, .uaddr = (uintptr_t)grant, .flags = FUTEX_32},
        {.val = 0, .uaddr = (uintptr_t)look, .flags = FUTEX_32 | FUTEX_PRIVATE_FLAG}};
    int ret = (int)syscall(SYS_futex_waitv, both, 2, 0, NULL, 0);
    if (ret >= 0 || errno != ENOSYS)
        return ret;
    // Before Linux 5.16: a signal that comes just before the wait is seen a moment later.
    const struct timespec moment = {0, LOOK_NS};
    ret = (int)syscall(SYS_futex, grant, FUTEX_WAIT, value, &moment, NULL, 0);
    if (ret && errno == ETIMEDOUT)
        errno = EINTR;
    return ret;
}

bool sched_client_may(const struct sched_client *c, unsigned i)
{
    return !c->wants[i] && !must_wait(atomic_load(&c->page->slots[i].grant));
}

// The daemon writes `grant` before it reads `want`, we write `want` before we read `grant`: one of
// the two sees what the other did. (Sequentially consistent on both sides.)
bool sched_client_take(struct sched_client *c, unsigned i, const uint32_t *look)
{
    struct sched_slot *slot = &c->page->slots[i];
    if (!c->wants[i] && !must_wait(atomic_load(&slot->grant)))
        return true;
    uint32_t before = atomic_exchange(&slot->want, WANT_TURN);
    c->wants[i] = true;
    uint32_t grant = atomic_load(&slot->grant);
    if (grant == GRANT_WAIT && before != WANT_TURN)
        ring(c);
    if (must_wait(grant))
        turn_wait(&slot->grant, grant, look);
    if (must_wait(atomic_load(&slot->grant)))
        return false;
    atomic_store(&slot->want, WANT_RUNNING);
    c->wants[i] = false;
    // Revoked in between: what is seen now was written before `want` was read.
    return !must_wait(atomic_load(&slot->grant));
}

void sched_client_give(struct sched_client *c, unsigned i)
{
    atomic_store(&c->page->slots[i].want, WANT_NOTHING);
    c->wants[i] = true;
    ring(c);
}

uint64_t sched_client_waited(struct sched_client *c, unsigned i)
{
    uint64_t now = atomic_load(&c->page->slots[i].wait_ns);
    uint64_t before = now >= c->seen_ns[i] ? c->seen_ns[i] : 0; // a new page starts at 0
    c->seen_ns[i] = now;
    return now - before;
}

// --- shares

void sched_client_share(struct sched_client *c, struct sched_share *share)
{
    pthread_mutex_lock(&c->lock);
    *share = c->config.share;
    pthread_mutex_unlock(&c->lock);
}

int sched_client_set(struct sched_client *c, const struct sched_share *share, struct error *err)
{
    int ret = sched_share_check(share, err);
    if (ret)
        return ret;
    struct sched_set set = {.head = sched_head(SCHED_SET), .share = *share};
    strcpy(set.name, c->name);
    if (sched_client_attached(c)) {
        autoclose int fd = daemon_connect(c, err);
        ret = fd < 0 ? fd : call(fd, &set, sizeof(set), SCHED_OK, NULL, err);
    }
    if (ret)
        return ret;
    pthread_mutex_lock(&c->lock);
    sched_share_merge(&c->config.share, share);
    pthread_mutex_unlock(&c->lock);
    return 0;
}
