// SPDX-License-Identifier: Apache-2.0
// The VMs of a host: what each asks for is checked, and told to sched/credit.h.
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sched/client.h"
#include "sched/daemon_internal.h"
#include "sched/threads.h"
#include "vmm/bitmap.h"
#include "vmm/util.h"

// --- shares

// Numbers of host CPUs to sched/credit.h's.
static int mask_map(struct sched_daemon *d, const struct sched_mask *mask, uint64_t *out,
                    struct error *err)
{
    char text[SCHED_TEXT_MAX], ours[SCHED_TEXT_MAX];
    struct sched_mask rest = *mask;
    *out = 0;
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++) {
        unsigned cpu = (unsigned)d->cpus[p];
        *out |= (uint64_t)bitmap_test(mask->bits, cpu) << p;
        bitmap_clear(rest.bits, cpu);
    }
    if (!bitmap_count(rest.bits, SCHED_PCPUS_MAX))
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

void vm_remove(struct sched_daemon *d, struct sched_vm *vm)
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
        v->watch = SCHED_WATCH_NONE;
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

int vm_register(struct sched_daemon *d, struct conn *conn, struct sched_register *reg,
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
    const struct sched_registered answer = {.head = sched_head(SCHED_REGISTERED),
                                            .slice_us =
                                                (uint32_t)(d->credit.params.slice_ns / 1000)};
    const int fds[2] = {page, vm->bell};
    conn_send(d, conn, &answer, sizeof(answer), fds, 2);
    vm_begin(d, vm);
    return 0;
}

int vm_set(struct sched_daemon *d, struct conn *conn, const struct sched_set *msg,
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
    const struct sched_set news = {.head = sched_head(SCHED_SET), .share = share};
    conn_send(d, vm->conn, &news, sizeof(news), NULL, 0);
    return 0;
}
