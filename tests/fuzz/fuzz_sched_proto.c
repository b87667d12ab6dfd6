// SPDX-License-Identifier: Apache-2.0
// The scheduler's daemon with clients that say and do anything: its real sockets, handlers and
// turns, on a clock that the input moves, with threads whose doings the input tells (this file
// stands in for sched/watch.c and sched/policy.c). And a VM's side with a daemon that answers
// anything.
//
// After each turn of the daemon: no credit came from nowhere, who holds a pCPU is who was chosen,
// each answer is one, and at the end no descriptor is left.
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "sched/client.h"
#include "sched/daemon_internal.h"
#include "vmm/util.h"

enum { CLIENTS = 8, THREADS = 8, STEPS = 200, ROOT = 0 };

static const struct log quiet = {.name = "sched", .level = LOG_ERROR, .fd = STDERR_FILENO};

struct input {
    const uint8_t *at;
    size_t left;
};

static void check(bool right, const char *what)
{
    if (right)
        return;
    fprintf(stderr, "%s\n", what);
    abort();
}

// Zeroes when there is no more.
static void take(struct input *in, void *to, size_t size)
{
    size_t n = size < in->left ? size : in->left;
    memset(to, 0, size);
    memcpy(to, in->at, n);
    in->at += n;
    in->left -= n;
}

static unsigned take_byte(struct input *in)
{
    uint8_t byte;
    take(in, &byte, 1);
    return byte;
}

// --- the world: clock and threads

static struct world {
    uint64_t now_ns;
    struct {
        pid_t tid; // a real one, that sleeps
        bool on_cpu, gone;
        uint64_t cpu_ns;
    } threads[THREADS];
    _Atomic unsigned ready;
} world;

static uint64_t clock_now(void)
{
    return world.now_ns;
}

static int thread_of(pid_t tid)
{
    for (int i = 0; i < THREADS; i++)
        if (world.threads[i].tid == tid && !world.threads[i].gone)
            return i;
    return -1;
}

static void *thread_main(void *arg)
{
    world.threads[(uintptr_t)arg].tid = (pid_t)syscall(SYS_gettid);
    atomic_fetch_add(&world.ready, 1);
    for (;;)
        pause();
}

static void world_make(void)
{
    for (int sig = SIGRTMIN; sig <= SIGRTMAX; sig++)
        signal(sig, SIG_IGN);
    for (uintptr_t i = 0; i < THREADS; i++) {
        pthread_t thread;
        check(!pthread_create(&thread, NULL, thread_main, (void *)i), "no thread");
    }
    while (atomic_load(&world.ready) < THREADS)
        sched_yield();
}

static void world_reset(void)
{
    world.now_ns = 1000000000;
    for (int i = 0; i < THREADS; i++) {
        world.threads[i].on_cpu = world.threads[i].gone = false;
        world.threads[i].cpu_ns = 0;
    }
}

int sched_watch_open(struct sched_watch *w, pid_t pid, pid_t tid, bool perf, struct error *err)
{
    *w = SCHED_WATCH_NONE;
    w->pid = pid;
    w->tid = tid;
    if (pid != getpid() || thread_of(tid) < 0)
        return error_set(err, -ESRCH, "thread %d of process %d: there is none", (int)tid, (int)pid);
    sched_watch_read(w, world.now_ns);
    return 0;
}

int sched_watch_anchor(void)
{
    return -1;
}

void sched_watch_close(struct sched_watch *w)
{
}

void sched_watch_read(struct sched_watch *w, uint64_t now_ns)
{
    int i = thread_of(w->tid);
    w->on_cpu = i >= 0 && world.threads[i].on_cpu;
    w->asleep = !w->on_cpu;
    if (i >= 0)
        w->base_ns = world.threads[i].cpu_ns;
}

uint64_t sched_watch_cpu(const struct sched_watch *w, uint64_t now_ns)
{
    return w->base_ns;
}

void sched_watch_listen(struct sched_watch *w, enum sched_watch_wakes wakes)
{
    w->wakes = wakes;
}

bool sched_watch_sleeps(const struct sched_watch *w)
{
    int i = thread_of(w->tid);
    return i < 0 || !world.threads[i].on_cpu;
}

int sched_policy_set(pid_t tid, enum sched_policy policy)
{
    return thread_of(tid) < 0 ? -ESRCH : 0;
}

// --- clients

struct client {
    int fd, bell; // -1
    struct sched_page *page;
};

struct rig {
    struct sched_daemon *daemon;
    char socket[64];
    struct client clients[CLIENTS];
};

static void client_open(struct rig *r, struct client *c)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (c->fd >= 0)
        return;
    strcpy(addr.sun_path, r->socket);
    c->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    check(c->fd >= 0, "no socket");
    if (connect(c->fd, (struct sockaddr *)&addr, sizeof(addr))) {
        close(c->fd); // more wait than it accepts in a turn
        c->fd = -1;
    }
}

static void client_close(struct client *c)
{
    if (c->fd >= 0)
        close(c->fd);
    if (c->bell >= 0)
        close(c->bell);
    if (c->page)
        munmap(c->page, SCHED_PAGE_BYTES);
    *c = (struct client) {.fd = -1, .bell = -1};
}

// `user`: 0 as this process is; else in the name of another, which root may. With descriptors
// nobody asked for.
static void client_send(struct client *c, const void *msg, size_t size, unsigned user, unsigned fds)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(3 * sizeof(int))];
    } control = {0};
    struct iovec iov = {(void *)msg, size};
    struct msghdr hdr = {.msg_iov = &iov, .msg_iovlen = 1};
    char *at = control.bytes;
    if (c->fd < 0)
        return;
    if (user && geteuid() == ROOT) {
        const struct ucred cred = {.pid = user & 1 ? getpid() : getppid(), .uid = user / 2 % 4};
        const struct cmsghdr head = {CMSG_LEN(sizeof(cred)), SOL_SOCKET, SCM_CREDENTIALS};
        memcpy(at, &head, sizeof(head));
        memcpy(at + CMSG_LEN(0), &cred, sizeof(cred));
        at += CMSG_SPACE(sizeof(cred));
    }
    if (fds %= 4) {
        const struct cmsghdr head = {CMSG_LEN(fds * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(at, &head, sizeof(head));
        memset(at + CMSG_LEN(0), 0, fds * sizeof(int)); // standard input
        at += CMSG_SPACE(fds * sizeof(int));
    }
    hdr.msg_control = at == control.bytes ? NULL : control.bytes;
    hdr.msg_controllen = (size_t)(at - control.bytes);
    if (sendmsg(c->fd, &hdr, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno == EPIPE)
        client_close(c);
}

static void page_take(struct client *c, int page, int bell)
{
    check(page >= 0 && bell >= 0, "REGISTERED without its descriptors");
    if (c->page)
        munmap(c->page, SCHED_PAGE_BYTES);
    if (c->bell >= 0)
        close(c->bell);
    c->page = mmap(NULL, SCHED_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
    check(c->page != MAP_FAILED, "the page cannot be mapped");
    check(ftruncate(page, 0) != 0, "the page can be made smaller");
    c->bell = bell;
    close(page);
}

static void document_check(int fd)
{
    struct sched_trace_head head;
    check(fd >= 0, "DOCUMENT without one");
    ssize_t n = pread(fd, &head, sizeof(head), 0);
    if (n != (ssize_t)sizeof(head) || head.magic != SCHED_MAGIC) {
        json_t *json = json_loadfd(fd, 0, NULL);
        check(json_is_object(json), "the status is no JSON");
        json_decref(json);
    }
    close(fd);
}

static void answer_check(struct client *c, const union sched_msg *msg, size_t n, int fds[2])
{
    check(n >= sizeof(msg->head) && msg->head.magic == SCHED_MAGIC &&
              n == sched_msg_size(msg->head.type),
          "what the daemon sent is no message");
    switch (msg->head.type) {
    case SCHED_REGISTERED:
        page_take(c, fds[0], fds[1]);
        break;
    case SCHED_DOCUMENT:
        document_check(fds[0]);
        break;
    case SCHED_ERROR:
        check(msg->error.code < 0 && *msg->error.text &&
                  memchr(msg->error.text, 0, sizeof(msg->error.text)),
              "an error without a reason");
        break;
    case SCHED_SET: {
        struct error err;
        check(!sched_share_check(&msg->set.share, &err), "news of a share that cannot be");
        break;
    }
    default:
        check(msg->head.type == SCHED_OK, "an answer that is none");
    }
}

static bool client_receive(struct client *c)
{
    union sched_msg msg;
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
    struct iovec iov = {&msg, sizeof(msg)};
    struct msghdr hdr = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control,
                         .msg_controllen = sizeof(control)};
    int fds[2] = {-1, -1};
    ssize_t n = c->fd < 0 ? -1 : recvmsg(c->fd, &hdr, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return false;
    if (!n) {
        client_close(c);
        return false;
    }
    const struct cmsghdr *head = CMSG_FIRSTHDR(&hdr);
    if (head && head->cmsg_type == SCM_RIGHTS)
        memcpy(fds, CMSG_DATA(head), head->cmsg_len - CMSG_LEN(0));
    answer_check(c, &msg, (size_t)n, fds);
    return true;
}

// --- what the input tells them to do

static void share_take(struct input *in, struct sched_share *share)
{
    *share = (struct sched_share) {.has = take_byte(in)};
    take(in, &share->weight, sizeof(uint16_t) + take_byte(in) % 3);
    take(in, &share->cap, 1 + take_byte(in) % 4);
    share->hard.bits[0] = take_byte(in);
    share->soft.bits[0] = take_byte(in);
    share->hard.bits[take_byte(in) % SCHED_MASK_WORDS] |= take_byte(in) == 255;
}

static void client_register(struct input *in, struct client *c)
{
    struct sched_register reg = {.head = sched_head(SCHED_REGISTER)};
    unsigned user = take_byte(in);
    reg.name[0] = (char)take_byte(in);
    share_take(in, &reg.share);
    reg.nr_vcpus = take_byte(in) % (THREADS + 2);
    reg.signal = 34 + take_byte(in) % 32;
    for (unsigned i = 0; i < reg.nr_vcpus; i++) {
        unsigned t = take_byte(in);
        reg.tids[i] = t < 200 ? world.threads[t % THREADS].tid : (int32_t)t - 220;
    }
    client_send(c, &reg, sizeof(reg), user, 0);
}

static void client_set(struct input *in, struct client *c)
{
    struct sched_set set = {.head = sched_head(SCHED_SET)};
    unsigned user = take_byte(in);
    set.name[0] = (char)take_byte(in);
    share_take(in, &set.share);
    client_send(c, &set, sizeof(set), user, 0);
}

static void client_ask(struct input *in, struct client *c)
{
    static const uint16_t types[] = {SCHED_STATUS, SCHED_TRACE, SCHED_CONFINE};
    unsigned type = types[take_byte(in) % ARRAY_SIZE(types)];
    struct sched_ask ask = {.head = sched_head(type), .last_ms = take_byte(in)};
    client_send(c, &ask, sched_msg_size(type), take_byte(in), 0);
}

static void client_raw(struct input *in, struct client *c)
{
    union sched_msg msg;
    unsigned user = take_byte(in), fds = take_byte(in);
    size_t size = sched_msg_size(take_byte(in) % (SCHED_TYPES + 1));
    if (!size)
        size = take_byte(in);
    take(in, &msg, size);
    if (fds & 128)
        msg.head = sched_head(msg.head.type % (SCHED_TYPES + 1));
    client_send(c, &msg, size, user, fds);
}

static void client_write(struct input *in, struct client *c)
{
    uint32_t word;
    size_t at = take_byte(in) * 4 + take_byte(in) % 4 * 1024;
    take(in, &word, 1 + take_byte(in) % 4);
    if (c->page)
        __atomic_store_n((uint32_t *)c->page + at % (SCHED_PAGE_BYTES / 4), word, __ATOMIC_SEQ_CST);
}

static void client_want(struct input *in, struct client *c)
{
    unsigned slot = take_byte(in) % THREADS;
    if (c->page)
        atomic_store(&c->page->slots[slot].want, take_byte(in) % 4);
}

static void client_ring(struct client *c)
{
    const uint64_t one = 1;
    if (c->bell >= 0 && write(c->bell, &one, sizeof(one)) < 0)
        return;
}

// Time passes, and who is on a CPU had some of it.
static void time_pass(struct input *in)
{
    uint64_t ns = (uint64_t)take_byte(in) << take_byte(in) % 24;
    unsigned part = take_byte(in);
    world.now_ns += ns;
    for (int i = 0; i < THREADS; i++)
        if (world.threads[i].on_cpu && !world.threads[i].gone)
            world.threads[i].cpu_ns += ns / 256 * (part + 1);
}

static void thread_do(struct input *in)
{
    unsigned i = take_byte(in) % THREADS, what = take_byte(in);
    world.threads[i].on_cpu = what & 1;
    world.threads[i].gone |= what == 254;
}

// --- what must hold

static void daemon_check(const struct sched_daemon *d)
{
    int64_t sum = 0;
    unsigned vms = 0, conns = 0;
    for (const struct conn *conn = d->conns; conn; conn = conn->next)
        conns++;
    for (const struct sched_vm *vm = d->vms; vm; vm = vm->next, vms++) {
        const struct credit_vm_config *config = &vm->credit.config;
        check(config->weight && config->weight <= CREDIT_WEIGHT_MAX &&
                  config->cap <= CREDIT_CAP_MAX && config->hard & d->credit.online,
              "a share that cannot be");
        for (unsigned i = 0; i < vm->nr; i++)
            sum += vm->vcpus[i].present ? vm->vcpus[i].credit.credit_ns : 0;
    }
    const struct credit_ledger *ledger = &d->credit.ledger;
    check(sum == ledger->given - ledger->burned - ledger->returned, "credits from nowhere");
    check(vms == d->nr_vms && vms == d->credit.nr_vms && conns == d->nr_conns, "miscounted");
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        const struct credit_vcpu *v = d->credit.pcpus[p].current;
        check(d->holder[p] ? v == &d->holder[p]->credit : !v, "who holds a pCPU was not chosen");
    }
}

static void turn(struct rig *r)
{
    struct error err;
    r->daemon->next_ns = 0; // nothing is waited for
    check(!daemon_turn(r->daemon, &err), "the daemon ended");
    daemon_check(r->daemon);
    for (unsigned i = 0; i < CLIENTS; i++)
        while (client_receive(&r->clients[i]))
            ;
}

static void step(struct rig *r, struct input *in)
{
    unsigned what = take_byte(in);
    struct client *c = &r->clients[what / 16 % CLIENTS];
    switch (what % 16) {
    case 0:
    case 1:
        client_open(r, c);
        break;
    case 2:
        client_close(c);
        break;
    case 3:
    case 4:
        client_register(in, c);
        break;
    case 5:
        client_set(in, c);
        break;
    case 6:
        client_ask(in, c);
        break;
    case 7:
        client_raw(in, c);
        break;
    case 8:
        client_write(in, c);
        break;
    case 9:
        client_want(in, c);
        break;
    case 10:
        client_ring(c);
        break;
    case 11:
        thread_do(in);
        break;
    case 12:
    case 13:
        time_pass(in);
        break;
    default:
        turn(r);
    }
}

static void daemon_fuzz(struct input *in)
{
    static char dir[] = "/tmp/ferry-fuzz-sched-XXXXXX";
    static bool made;
    struct rig r = {0};
    struct error err;
    if (!made)
        check(mkdtemp(dir) != NULL, "no folder");
    made = true;
    world_reset();
    snprintf(r.socket, sizeof(r.socket), "%s/sock", dir);
    unsigned modes = take_byte(in);
    struct sched_daemon_config config = {.socket = r.socket,
                                         .max_vms = 4,
                                         .weight_per_vm = modes & 1,
                                         .no_boost = modes & 2,
                                         .placement =
                                             modes & 4 ? CREDIT_BY_WEIGHT : CREDIT_BY_LENGTH,
                                         .log = &quiet,
                                         .clock = clock_now};
    for (unsigned i = 0; i < CLIENTS; i++)
        r.clients[i] = (struct client) {.fd = -1, .bell = -1};
    if (sched_daemon_create(&r.daemon, &config, &err)) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    for (unsigned i = 0; i < STEPS && in->left; i++)
        step(&r, in);
    turn(&r);
    for (unsigned i = 0; i < CLIENTS; i++)
        client_close(&r.clients[i]);
    // Their ends are events, at most 64 in a turn; some still wait to be accepted.
    for (unsigned i = 0; i < 3; i++)
        turn(&r);
    check(!r.daemon->nr_conns && !r.daemon->nr_vms, "somebody who left is still there");
    sched_daemon_destroy(r.daemon);
    rmdir(dir);
    made = false;
    strcpy(dir + strlen(dir) - 6, "XXXXXX");
}

// --- the other side: a daemon that answers anything

static void say(struct input *in, int fd, unsigned type, int with)
{
    struct client c = {.fd = fd, .bell = -1};
    union sched_msg msg = {0};
    unsigned how = take_byte(in);
    size_t size = how & 1 ? take_byte(in) : sched_msg_size(type);
    if (how & 2)
        take(in, &msg, size);
    if (!(how & 4))
        msg.head = sched_head(type);
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {0};
    struct iovec iov = {&msg, size};
    struct msghdr hdr = {.msg_iov = &iov, .msg_iovlen = 1};
    const int fds[2] = {with, how & 16 ? with : 0};
    if (!(how & 8) && with >= 0) {
        hdr.msg_control = control;
        hdr.msg_controllen = sizeof(control);
        struct cmsghdr *head = CMSG_FIRSTHDR(&hdr);
        *head = (struct cmsghdr) {CMSG_LEN(sizeof(fds)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(head), fds, sizeof(fds));
    }
    if (sendmsg(c.fd, &hdr, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        return;
}

static void pair_make(int pair[2])
{
    check(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), "no socket pair");
}

// The answers lie ready before anything is asked; behind them the connection ends.
static void client_fuzz(struct input *in)
{
    int broker[2], daemon[2];
    struct error err = {0};
    struct sched_client *client;
    const pid_t tid = world.threads[0].tid;
    pair_make(broker);
    pair_make(daemon);
    unsigned seals = take_byte(in);
    int page = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    check(page >= 0 && !ftruncate(page, seals & 1 ? 4096 : SCHED_PAGE_BYTES), "no page");
    if (!(seals & 2))
        fcntl(page, F_ADD_SEALS, F_SEAL_SHRINK);
    say(in, broker[1], SCHED_OK, daemon[0]);
    say(in, daemon[1], SCHED_REGISTERED, page);
    say(in, broker[1], SCHED_OK, daemon[0]);
    say(in, daemon[1], SCHED_OK, -1);
    shutdown(broker[1], SHUT_WR);
    shutdown(daemon[1], SHUT_WR);
    const struct sched_client_config config = {.socket = "/nowhere",
                                               .name = "fuzz",
                                               .nr = 1,
                                               .tids = &tid,
                                               .signal = SIGRTMIN,
                                               .broker = broker[0]};
    check(!sched_client_create(&client, &config, &err), "no client");
    int ret = sched_client_attach(client, &err);
    check(ret <= 0 && (!ret || *err.text), "an error without a reason");
    check(!ret == sched_client_attached(client), "attached or not");
    const struct sched_share share = {.has = SCHED_HAS_WEIGHT, .weight = 7};
    ret = sched_client_set(client, &share, &err);
    check(ret <= 0 && (!ret || *err.text), "an error without a reason");
    sched_client_destroy(client);
    close(page);
    for (unsigned i = 0; i < 2; i++) {
        close(broker[i]);
        close(daemon[i]);
    }
}

static int lowest_fd(void)
{
    int fd = dup(STDERR_FILENO);
    close(fd);
    return fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    if (!atomic_load(&world.ready))
        world_make();
    int before = lowest_fd();
    if (take_byte(&in) == 'C')
        client_fuzz(&in);
    else
        daemon_fuzz(&in);
    check(lowest_fd() == before, "a descriptor is left");
    return 0;
}
