// SPDX-License-Identifier: Apache-2.0
// The scheduler of a host: its beginning, its loop, its end.
#include "sched/daemon.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "sched/daemon_internal.h"
#include "vmm/bitmap.h"
#include "vmm/listen.h"
#include "vmm/util.h"

enum {
    EVENTS = 64,
    NS_S = 1000000000,
    NS_MS = 1000000,
    SLICE_NS = 5000000, // docs/scheduler.md has what shares gain and what it costs
};

// --- the loop

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
        conns_accept(d);
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
        conns_sweep(d);
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
    bool all = !bitmap_count(d->config.pcpus.bits, SCHED_PCPUS_MAX);
    unsigned nr = 0;
    for (unsigned cpu = 0; cpu < SCHED_PCPUS_MAX; cpu++) {
        if (!all && !bitmap_test(d->config.pcpus.bits, cpu))
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

// Each vCPU takes six descriptors.
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
    conns_sweep(d);
    if (*d->socket)
        unlink(d->socket);
    const int fds[] = {d->listen_fd, d->stop_fd, d->epoll_fd, d->anchor_fd};
    for (unsigned i = 0; i < ARRAY_SIZE(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
    record_free(&d->trace);
    free(d);
}
