// SPDX-License-Identifier: Apache-2.0
// Sockets, VMs, and the loop. A message is checked whole before anything of it is used; whoever
// sends another is told why and closed.
#include "sched/daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "sched/client.h"
#include "sched/daemon_internal.h"
#include "sched/threads.h"
#include "vmm/listen.h"
#include "vmm/util.h"

enum {
    VMS_MAX = 1024,
    CONNS_EXTRA = 64, // beside those of VMs: commands ...
    CONNS_IDLE = 16,  // ... of one process
    ACCEPTS = 16,     // a turn of the loop
    EVENTS = 64,
    NS_S = 1000000000,
    NS_MS = 1000000,
    SLICE_NS = 8000000, // shares hold in windows of 0.4 s; docs/scheduler.md has what it costs
};

// --- answers

static void conn_close(struct sched_daemon *d, struct conn *conn)
{
    conn->dead = true;
    d->swept = true;
}

static void send_fds(struct sched_daemon *d, struct conn *conn, const void *msg, size_t size,
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

static struct sched_head head_of(enum sched_msg_type type)
{
    return (struct sched_head) {
        .magic = SCHED_MAGIC, .version = SCHED_VERSION, .type = (uint16_t)type};
}

static void answer_error(struct sched_daemon *d, struct conn *conn, const struct error *err)
{
    struct sched_error msg = {.head = head_of(SCHED_ERROR), .code = err->code};
    snprintf(msg.text, sizeof(msg.text), "%.*s", SCHED_TEXT_MAX - 1, err->text);
    send_fds(d, conn, &msg, sizeof(msg), NULL, 0);
}

static void answer_document(struct sched_daemon *d, struct conn *conn, const struct sched_ask *ask)
{
    struct error err;
    const struct sched_head head = head_of(SCHED_DOCUMENT);
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
        send_fds(d, conn, &head, sizeof(head), &fd, 1);
    }
}

// --- shares

static bool mask_empty(const struct sched_mask *mask)
{
    for (unsigned i = 0; i < SCHED_MASK_WORDS; i++)
        if (mask->bits[i])
            return false;
    return true;
}

static bool mask_has(const struct sched_mask *mask, unsigned cpu)
{
    return mask->bits[cpu / 64] >> cpu % 64 & 1;
}

// Numbers of host CPUs to sched/credit.h's.
static int mask_map(struct sched_daemon *d, const struct sched_mask *mask, uint64_t *out,
                    struct error *err)
{
    char text[SCHED_TEXT_MAX], ours[SCHED_TEXT_MAX];
    struct sched_mask rest = *mask;
    *out = 0;
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        unsigned cpu = (unsigned)d->cpus[p];
        *out |= (uint64_t)mask_has(mask, cpu) << p;
        rest.bits[cpu / 64] &= ~(1ull << cpu % 64);
    }
    if (mask_empty(&rest))
        return 0;
    struct sched_mask all = report_mask(d, d->credit.online);
    return error_set(err, -EINVAL, "affinity: pCPUs %s are not scheduled here, which are %s",
                     sched_mask_text(&rest, text), sched_mask_text(&all, ours));
}

static int share_config(struct sched_daemon *d, const struct sched_share *share,
                        struct credit_vm_config *config, struct error *err)
{
    int ret = sched_share_check(share, err);
    if (!ret)
        ret = mask_map(d, &share->hard, &config->hard, err);
    if (!ret)
        ret = mask_map(d, &share->soft, &config->soft, err);
    if (ret)
        return ret;
    if (!config->hard)
        config->hard = CREDIT_ANY_PCPU;
    config->weight =
        share->has & SCHED_HAS_WEIGHT ? (unsigned)share->weight : CREDIT_WEIGHT_DEFAULT;
    config->cap = share->has & SCHED_HAS_CAP ? (unsigned)share->cap : 0;
    return credit_vm_check(&d->credit, config, err);
}

static bool user_bounded(const struct sched_daemon *d, uid_t uid)
{
    return d->config.user_weight && uid && uid != geteuid();
}

// Who may choose a weight may take the host from others, unless the sum is bounded. `asks` is the
// user who wants `vm` (or one not there yet, NULL) of user `uid` to have `weight`.
static int user_check(const struct sched_daemon *d, uid_t asks, uid_t uid,
                      const struct sched_vm *vm, unsigned weight, unsigned nr, struct error *err)
{
    const bool per_vm = d->config.weight_per_vm;
    uint64_t wanted = (uint64_t)weight * (per_vm ? 1 : nr), others = 0;
    if (!user_bounded(d, asks))
        return 0;
    for (const struct sched_vm *other = d->vms; other; other = other->next)
        if (other->uid == uid && other != vm)
            others += (uint64_t)other->credit.config.weight * (per_vm ? 1 : other->nr);
    if (others + wanted <= d->config.user_weight)
        return 0;
    return error_set(err, -EPERM,
                     "weight %u, %u vCPUs: user %u may have %u in all, of which %llu are taken",
                     weight, nr, (unsigned)uid, d->config.user_weight, (unsigned long long)others);
}

// --- VMs

static void vm_free(struct sched_vm *vm)
{
    for (unsigned i = 0; i < vm->nr; i++)
        sched_watch_close(&vm->vcpus[i].watch);
    if (vm->page)
        munmap(vm->page, SCHED_PAGE_BYTES);
    if (vm->bell >= 0) {
        // The VM has it too: closing ours does not end its events.
        epoll_ctl(vm->daemon->epoll_fd, EPOLL_CTL_DEL, vm->bell, NULL);
        close(vm->bell);
    }
    free(vm);
}

static void vm_remove(struct sched_daemon *d, struct sched_vm *vm)
{
    for (unsigned i = 0; i < vm->nr; i++)
        vcpu_leave(d, &vm->vcpus[i]);
    credit_vm_remove(&d->credit, &vm->credit, now_of(d));
    struct sched_vm **at = &d->vms;
    while (*at != vm)
        at = &(*at)->next;
    *at = vm->next;
    d->nr_vms--;
    log_write(&d->log, LOG_INFO, "VM %s is gone", vm->name);
    vm_free(vm);
}

static struct sched_vm *vm_find(struct sched_daemon *d, const char *name, uid_t uid)
{
    struct sched_vm *found = NULL;
    for (struct sched_vm *vm = d->vms; vm; vm = vm->next)
        if (!strcmp(vm->name, name) && (vm->uid == uid || (!uid && !found)))
            found = vm;
    return found;
}

static bool tid_taken(const struct sched_daemon *d, const struct sched_register *reg, unsigned i)
{
    for (unsigned k = 0; k < i; k++)
        if (reg->tids[k] == reg->tids[i])
            return true;
    for (const struct sched_vm *vm = d->vms; vm; vm = vm->next)
        for (unsigned k = 0; k < vm->nr; k++)
            if ((vm->vcpus[k].present || !vm->begun) && vm->vcpus[k].watch.tid == reg->tids[i])
                return true;
    return false;
}

static int register_check(struct sched_daemon *d, const struct conn *conn,
                          const struct sched_register *reg, struct error *err)
{
    unsigned max = d->config.max_vms ? d->config.max_vms : VMS_MAX;
    if (conn->vm)
        return error_set(err, -EALREADY, "this connection has registered VM %s", conn->vm->name);
    if (d->nr_vms >= max)
        return error_set(err, -EBUSY, "%u VMs are scheduled, which is all that may be", max);
    if (!*reg->name || !memchr(reg->name, 0, sizeof(reg->name)))
        return error_set(err, -EINVAL, "name: expected 1 to %d characters", SCHED_NAME_MAX - 1);
    for (const char *c = reg->name; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127)
            return error_set(err, -EINVAL, "name: it holds a control character");
    struct sched_vm *same = vm_find(d, reg->name, conn->uid);
    if (same && same->uid == conn->uid)
        return error_set(err, -EEXIST, "a VM named %s is scheduled already", reg->name);
    if (!reg->nr_vcpus || reg->nr_vcpus > SCHED_VCPUS_MAX)
        return error_set(err, -EINVAL, "%u vCPUs: expected 1 to %d", reg->nr_vcpus,
                         SCHED_VCPUS_MAX);
    if (reg->signal < 34 || reg->signal > 64)
        return error_set(err, -EINVAL, "signal %u: expected a real-time signal, 34 to 64",
                         reg->signal);
    return 0;
}

static int threads_check(const struct sched_daemon *d, const struct sched_register *reg,
                         struct error *err)
{
    for (unsigned i = 0; i < reg->nr_vcpus; i++)
        if (reg->tids[i] <= 0 || tid_taken(d, reg, i))
            return error_set(err, -EINVAL, "thread %d: no thread's number, or a vCPU already",
                             reg->tids[i]);
    return 0;
}

// Its size can never change under us, and nobody else ever gets it.
static int page_create(struct sched_vm *vm, int *out, struct error *err)
{
    autoclose int fd = memfd_create("ferry-sched-vm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, SCHED_PAGE_BYTES) ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return error_errno(err, "the VM's page");
    void *p = mmap(NULL, SCHED_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return error_errno(err, "mapping the VM's page");
    vm->page = p;
    vm->page->magic = SCHED_MAGIC;
    vm->page->nr_slots = vm->nr;
    vm->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (vm->bell < 0)
        return error_errno(err, "the VM's doorbell");
    *out = take_fd(&fd);
    return 0;
}

static struct sched_vm *vm_new(struct sched_daemon *d, struct conn *conn,
                               const struct sched_register *reg)
{
    struct sched_vm *vm = calloc(1, sizeof(*vm));
    if (!vm)
        return NULL;
    vm->daemon = d;
    vm->conn = conn;
    vm->pid = conn->pid;
    vm->uid = conn->uid;
    vm->signal = (int)reg->signal;
    vm->share = reg->share;
    vm->id = ++d->next_id;
    vm->bell = -1;
    vm->source = (struct source) {SOURCE_BELL, vm};
    strcpy(vm->name, reg->name);
    vm->nr = reg->nr_vcpus;
    for (unsigned i = 0; i < vm->nr; i++) {
        struct sched_vcpu *v = &vm->vcpus[i];
        v->vm = vm;
        v->index = i;
        v->pidfd = -1;
        v->watch =
            (struct sched_watch) {.out_fd = -1, .in_fd = -1, .schedstat_fd = -1, .stat_fd = -1};
    }
    return vm;
}

static void vm_begin(struct sched_daemon *d, struct sched_vm *vm)
{
    vm->next = d->vms;
    d->vms = vm;
    d->nr_vms++;
    vm->conn->vm = vm;
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = &vm->source};
    epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, vm->bell, &ev);
    log_write(&d->log, LOG_INFO, "VM %s: process %d, %u vCPUs, weight %u, cap %u", vm->name,
              (int)vm->pid, vm->nr, vm->credit.config.weight, vm->credit.config.cap);
}

// Threads' numbers in a PID namespace of their own to ours. It takes time that turns need.
static int register_translate(struct sched_daemon *d, const struct conn *conn,
                              struct sched_register *reg, struct error *err)
{
    enum { LOOKS_A_REQUEST = 8 };
    int looks = threads_translate(conn->pid, reg->tids, reg->nr_vcpus, err);
    d->requests += (unsigned)(looks < 0 ? THREADS_LOOKS_MAX : looks) / LOOKS_A_REQUEST;
    return looks < 0 ? looks : 0;
}

static int vm_register(struct sched_daemon *d, struct conn *conn, struct sched_register *reg,
                       struct error *err)
{
    struct credit_vm_config config;
    autoclose int page = -1;
    int ret = register_check(d, conn, reg, err);
    if (!ret)
        ret = register_translate(d, conn, reg, err);
    if (!ret)
        ret = threads_check(d, reg, err);
    if (!ret)
        ret = share_config(d, &reg->share, &config, err);
    if (!ret)
        ret = user_check(d, conn->uid, conn->uid, NULL, config.weight, reg->nr_vcpus, err);
    if (ret)
        return ret;
    struct sched_vm *vm = vm_new(d, conn, reg);
    if (!vm)
        return error_set(err, -ENOMEM, "no memory for VM %s", reg->name);
    ret = page_create(vm, &page, err);
    for (unsigned i = 0; i < vm->nr && !ret; i++)
        ret = vcpu_join(d, &vm->vcpus[i], reg->tids[i], err);
    if (!ret)
        ret = credit_vm_add(&d->credit, &vm->credit, vm->id, &config, err);
    if (ret) {
        for (unsigned i = 0; i < vm->nr; i++)
            vcpu_leave(d, &vm->vcpus[i]);
        vm_free(vm);
        return ret;
    }
    trace_name_set(d, vm);
    const struct sched_registered answer = {.head = head_of(SCHED_REGISTERED),
                                            .slice_us =
                                                (uint32_t)(d->credit.params.slice_ns / 1000)};
    const int fds[2] = {page, vm->bell};
    send_fds(d, conn, &answer, sizeof(answer), fds, 2);
    vm_begin(d, vm);
    return 0;
}

// --- requests

static int vm_set(struct sched_daemon *d, struct conn *conn, const struct sched_set *msg,
                  struct error *err)
{
    if (!memchr(msg->name, 0, sizeof(msg->name)))
        return error_set(err, -EINVAL, "name: expected at most %d characters", SCHED_NAME_MAX - 1);
    struct sched_vm *vm = *msg->name ? vm_find(d, msg->name, conn->uid) : conn->vm;
    if (!vm)
        return error_set(err, -ENOENT, "no VM named '%s' is scheduled here", msg->name);
    if (conn->uid && conn->uid != vm->uid)
        return error_set(err, -EPERM, "VM %s is another user's", vm->name);
    if (conn->confined && conn->pid != vm->pid)
        return error_set(err, -EPERM, "VM %s is another process's", vm->name);
    int ret = sched_share_check(&msg->share, err);
    if (ret)
        return ret;
    struct credit_vm_config config;
    struct sched_share share = vm->share;
    sched_share_merge(&share, &msg->share);
    ret = share_config(d, &share, &config, err);
    if (!ret)
        ret = user_check(d, conn->uid, vm->uid, vm, config.weight, vm->nr, err);
    if (!ret)
        ret = credit_vm_set(&d->credit, &vm->credit, &config, now_of(d), err);
    if (ret)
        return ret;
    vm->share = share;
    // The VM remembers it for the next daemon.
    const struct sched_set news = {.head = head_of(SCHED_SET), .share = share};
    send_fds(d, vm->conn, &news, sizeof(news), NULL, 0);
    return 0;
}

static void request(struct sched_daemon *d, struct conn *conn, union sched_msg *msg)
{
    struct error err;
    const struct sched_head ok = head_of(SCHED_OK);
    int ret = 0;
    switch (msg->head.type) {
    case SCHED_REGISTER:
        ret = vm_register(d, conn, &msg->reg, &err);
        break;
    case SCHED_SET:
        ret = vm_set(d, conn, &msg->set, &err);
        if (!ret)
            send_fds(d, conn, &ok, sizeof(ok), NULL, 0);
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
        send_fds(d, conn, &ok, sizeof(ok), NULL, 0);
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

static void conn_ready(struct sched_daemon *d, struct conn *conn)
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

static void accept_some(struct sched_daemon *d)
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
static void sweep(struct sched_daemon *d)
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

// --- the loop

static void vm_unlisten(struct sched_daemon *d, struct sched_vm *vm)
{
    vm->quiet = true;
    epoll_ctl(d->epoll_fd, EPOLL_CTL_DEL, vm->bell, NULL);
    for (unsigned i = 0; i < vm->nr; i++) {
        if (vm->vcpus[i].watch.out_fd < 0)
            continue;
        epoll_ctl(d->epoll_fd, EPOLL_CTL_DEL, vm->vcpus[i].watch.out_fd, NULL);
        epoll_ctl(d->epoll_fd, EPOLL_CTL_DEL, vm->vcpus[i].watch.in_fd, NULL);
    }
}

static void vm_count(struct sched_daemon *d, struct sched_vm *vm)
{
    if (++vm->events > EVENTS_PER_VCPU * vm->nr && !vm->quiet)
        vm_unlisten(d, vm);
}

// Its first ring says that the page is in place: now a thread that is signalled finds its slot.
static void vm_take_over(struct sched_daemon *d, struct sched_vm *vm, uint64_t now)
{
    vm->begun = true;
    for (unsigned i = 0; i < vm->nr; i++)
        vcpu_begin(d, &vm->vcpus[i], now);
}

static void bell_ready(struct sched_daemon *d, struct sched_vm *vm)
{
    uint64_t count, now = now_of(d);
    if (read(vm->bell, &count, sizeof(count)) < 0)
        return;
    if (!vm->begun)
        vm_take_over(d, vm, now);
    for (unsigned i = 0; i < vm->nr; i++)
        vcpu_look(d, &vm->vcpus[i], now);
    vm_count(d, vm);
}

static void vcpu_ready(struct sched_daemon *d, struct sched_vcpu *v, uint32_t events)
{
    if (!v->present)
        return;
    if (events & (EPOLLHUP | EPOLLERR)) { // the thread has ended
        vcpu_leave(d, v);
        return;
    }
    vcpu_look(d, v, now_of(d));
    vm_count(d, v->vm);
}

static bool event_handle(struct sched_daemon *d, const struct source *source, uint32_t events)
{
    struct conn *conn = source->owner;
    switch (source->kind) {
    case SOURCE_LISTEN:
        accept_some(d);
        return true;
    case SOURCE_STOP:
        return false;
    case SOURCE_CONN:
        if (!conn->dead)
            conn_ready(d, conn);
        return true;
    case SOURCE_BELL:
        bell_ready(d, source->owner);
        return true;
    case SOURCE_VCPU:
        vcpu_ready(d, source->owner, events);
        return true;
    }
    return true;
}

// Until an event or the deadline. One call, not three: a timer would have to be set and read, too.
static int events_wait(struct sched_daemon *d, struct epoll_event *events)
{
    uint64_t now = now_of(d), left = d->next_ns > now ? d->next_ns - now : 0;
    const struct timespec limit = {(time_t)(left / NS_S), (long)(left % NS_S)};
    const bool ever = d->next_ns == CREDIT_NEVER;
    int n =
        (int)syscall(SYS_epoll_pwait2, d->epoll_fd, events, EVENTS, ever ? NULL : &limit, NULL, 0);
    if (n >= 0 || errno != ENOSYS)
        return n;
    // Before Linux 5.11: a millisecond late.
    left = left / NS_MS + 1;
    return epoll_wait(d->epoll_fd, events, EVENTS, ever ? -1 : left > 1000 ? 1000 : (int)left);
}

int daemon_turn(struct sched_daemon *d, struct error *err)
{
    struct epoll_event events[EVENTS];
    int n = events_wait(d, events);
    uint64_t start = now_of(d);
    if (n < 0 && errno != EINTR)
        return error_errno(err, "epoll_wait");
    for (int i = 0; i < n; i++)
        if (!event_handle(d, events[i].data.ptr, events[i].events))
            return 1;
    if (d->swept)
        sweep(d);
    turns_settle(d);
    d->loops++;
    d->busy_ns += now_of(d) - start;
    return 0;
}

int sched_daemon_run(struct sched_daemon *d, struct error *err)
{
    const struct sched_param first = {.sched_priority = 2}; // before SCHED_POLICY_BOOST
    int ret;
    if (sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first)) {
        thread_prompt();
        prctl(PR_SET_TIMERSLACK, 1);
        d->config.no_boost = true; // whoever has it could keep us away
    }
    do
        ret = daemon_turn(d, err);
    while (!ret);
    return ret < 0 ? ret : 0;
}

void sched_daemon_stop(struct sched_daemon *d)
{
    const uint64_t one = 1;
    if (write(d->stop_fd, &one, sizeof(one)) < 0)
        return; // it is asked to stop already
}

// --- creation

static int pcpus_choose(struct sched_daemon *d, struct error *err)
{
    cpu_set_t own;
    if (sched_getaffinity(0, sizeof(own), &own))
        return error_errno(err, "sched_getaffinity");
    bool all = mask_empty(&d->config.pcpus);
    unsigned nr = 0;
    for (unsigned cpu = 0; cpu < SCHED_PCPUS_MAX; cpu++) {
        if (!all && !mask_has(&d->config.pcpus, cpu))
            continue;
        bool usable = cpu < CPU_SETSIZE && CPU_ISSET(cpu, &own);
        if (!all && !usable)
            return error_set(err, -EINVAL, "pCPU %u: this process may not use it", cpu);
        if (usable && nr < CREDIT_PCPUS_MAX)
            d->cpus[nr++] = (int)cpu;
        else if (usable && !all)
            return error_set(err, -EINVAL, "more than %d pCPUs", CREDIT_PCPUS_MAX);
    }
    struct credit_params params = credit_params_default(nr);
    params.slice_ns = d->config.slice_ns ? d->config.slice_ns : SLICE_NS;
    if (d->config.tick_ns)
        params.tick_ns = d->config.tick_ns;
    else if (params.tick_ns > params.slice_ns / 2)
        params.tick_ns = params.slice_ns / 2;
    if (d->config.ratelimit_ns)
        params.ratelimit_ns = d->config.ratelimit_ns;
    params.placement = d->config.placement;
    params.weight_per_vm = d->config.weight_per_vm;
    params.trace = trace_hear;
    params.trace_arg = d;
    return credit_init(&d->credit, &params, now_of(d), err);
}

// A socket that nobody listens at any more is taken over.
static int listen_at(struct sched_daemon *d, const char *path, struct error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr.sun_path))
        return error_set(err, -ENAMETOOLONG, "socket '%s': at most %zu characters", path,
                         sizeof(addr.sun_path) - 1);
    strcpy(addr.sun_path, path);
    autoclose int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_errno(err, "socket");
    if (!connect(fd, (struct sockaddr *)&addr, sizeof(addr)) || errno == EAGAIN)
        return error_set(err, -EADDRINUSE, "%s: another scheduler listens there", path);
    if (errno == ECONNREFUSED)
        unlink(path);
    close(take_fd(&fd));
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t old = umask(0777 & ~(d->config.mode ? d->config.mode : 0600));
    // Connections inherit the option, so that no message comes without.
    int ret = fd < 0 || setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &(int) {1}, sizeof(int)) ||
                      listen_unix(fd, &addr, 128)
                  ? error_errno(err, "socket %s", path)
                  : 0;
    umask(old);
    if (ret)
        return ret;
    strcpy(d->socket, path);
    d->listen_fd = take_fd(&fd);
    return 0;
}

static int add_source(struct sched_daemon *d, int fd, struct source *source, enum source_kind kind,
                      struct error *err)
{
    *source = (struct source) {kind, d};
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = source};
    if (fd < 0 || epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, fd, &ev))
        return error_errno(err, "the scheduler's event sources");
    return 0;
}

// Each vCPU takes five descriptors.
static void files_allow(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur == limit.rlim_max)
        return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int sched_daemon_create(struct sched_daemon **out, const struct sched_daemon_config *config,
                        struct error *err)
{
    struct sched_daemon *d = calloc(1, sizeof(*d));
    if (!d)
        return error_set(err, -ENOMEM, "no memory for the scheduler");
    d->config = *config;
    d->log = *config->log;
    d->start_ns = now_of(d);
    d->poll_at_ns = d->brief_at_ns = d->next_ns = CREDIT_NEVER;
    d->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    d->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d->listen_fd = -1;
    d->anchor_fd = sched_watch_anchor();
    files_allow();
    int ret = record_init(&d->trace, TRACE_EVENTS)
                  ? error_set(err, -ENOMEM, "no memory for the trace")
                  : 0;
    if (!ret)
        ret = pcpus_choose(d, err);
    if (!ret)
        ret = add_source(d, d->stop_fd, &d->stop_source, SOURCE_STOP, err);
    if (!ret)
        ret = listen_at(d, config->socket, err);
    if (!ret)
        ret = add_source(d, d->listen_fd, &d->listen_source, SOURCE_LISTEN, err);
    if (ret)
        sched_daemon_destroy(d);
    else
        *out = d;
    return ret;
}

void sched_daemon_destroy(struct sched_daemon *d)
{
    if (!d)
        return;
    for (struct conn *conn = d->conns; conn; conn = conn->next)
        conn->dead = true;
    sweep(d);
    if (*d->socket)
        unlink(d->socket);
    const int fds[] = {d->listen_fd, d->stop_fd, d->epoll_fd, d->anchor_fd};
    for (unsigned i = 0; i < ARRAY_SIZE(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
    record_free(&d->trace);
    free(d);
}
