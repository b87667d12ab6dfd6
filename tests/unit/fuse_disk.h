// SPDX-License-Identifier: Apache-2.0
// A file whose storage a test controls: a FUSE file system with one file. It can fail, hold
// requests back, answer them in any order, and tell what a power cut would leave. Needs root and
// /dev/fuse; the mount is seen by this process only.
//
// A process of its own serves it, which ends with the test: a test that dies with requests under
// way could not end before they are answered, and would have to answer them itself.
#pragma once

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vmm/loop.h"

enum { DISK_MAX = 16 << 20, DISK_LOG = 64 << 20, DISK_WRITE_MAX = 128 << 10, DISK_QUEUE = 1024 };

struct disk_write { // since the last fsync; `len` bytes follow, then the next
    uint64_t offset;
    uint32_t len, step; // step: from this one to the next
    uint8_t data[];
};

struct fuse_disk { // in memory that both processes have
    char path[64];
    int fd; // the server's
    pid_t server;
    pthread_mutex_t lock; // around what follows
    uint64_t size;
    uint8_t now[DISK_MAX];     // what reads see
    uint8_t durable[DISK_MAX]; // what the last fsync left
    uint64_t log_len;
    uint8_t log[DISK_LOG];
    uint8_t *queue[DISK_QUEUE]; // requests, as they came; the server's memory
    uint32_t opcodes[DISK_QUEUE];
    unsigned nr_queued;
    unsigned seed;
    // Of the test.
    atomic_bool shuffle;                          // answers in any order
    atomic_bool hold_read, hold_write, hold_sync; // does not answer
    atomic_int fail_read, fail_write, fail_sync;  // errno
    atomic_ullong hold_below;                     // as hold_write, for writes at a lower offset
    atomic_bool stop;
};

static inline uint32_t disk_opcode(const uint8_t *request)
{
    return ((const struct fuse_in_header *)request)->opcode;
}

static inline void disk_answer(struct fuse_disk *d, const uint8_t *request, int error,
                               const void *data, size_t len)
{
    const struct fuse_in_header *in = (const void *)request;
    struct fuse_out_header out = {.error = -error, .unique = in->unique};
    struct iovec iov[2] = {{&out, sizeof(out)}, {(void *)data, error ? 0 : len}};
    out.len = (uint32_t)(iov[0].iov_len + iov[1].iov_len);
    if (writev(d->fd, iov, 2) < 0)
        return; // whoever asked is gone
}

static inline void disk_change(struct fuse_disk *d, uint64_t offset, const void *data, uint32_t len)
{
    struct disk_write *w = (void *)(d->log + d->log_len);
    *w = (struct disk_write) {offset, len, (uint32_t)(sizeof(*w) + len + 7) & ~7u};
    if (d->log_len + w->step + sizeof(*w) > DISK_LOG)
        abort(); // a test without a flush for so long
    if (data)
        memcpy(w->data, data, len);
    else
        memset(w->data, 0, len);
    memcpy(d->now + offset, w->data, len);
    d->log_len += w->step;
}

static inline const struct disk_write *disk_log_next(const struct fuse_disk *d, uint64_t *at)
{
    const struct disk_write *w = (const void *)(d->log + *at);
    if (*at >= d->log_len)
        return NULL;
    *at += w->step;
    return w;
}

static inline void disk_sync(struct fuse_disk *d)
{
    uint64_t at = 0;
    for (const struct disk_write *w; (w = disk_log_next(d, &at));)
        memcpy(d->durable + w->offset, w->data, w->len);
    d->log_len = 0;
}

static inline void disk_attr(struct fuse_disk *d, const uint8_t *request)
{
    struct fuse_attr_out out = {
        .attr = {.ino = 1, .size = d->size, .mode = S_IFREG | 0644, .nlink = 1, .blksize = 4096}};
    disk_answer(d, request, 0, &out, sizeof(out));
}

static inline void disk_serve(struct fuse_disk *d, const uint8_t *request)
{
    const void *arg = request + sizeof(struct fuse_in_header);
    const struct fuse_read_in *r = arg;
    const struct fuse_write_in *w = arg;
    const struct fuse_fallocate_in *f = arg;
    const struct fuse_setattr_in *s = arg;
    switch (disk_opcode(request)) {
    case FUSE_INIT: {
        struct fuse_init_out out = {.major = 7,
                                    .minor = 31,
                                    .flags = FUSE_BIG_WRITES,
                                    .max_background = 64,
                                    .max_write = DISK_WRITE_MAX};
        disk_answer(d, request, 0, &out, sizeof(out));
        break;
    }
    case FUSE_GETATTR:
        disk_attr(d, request);
        break;
    case FUSE_SETATTR:
        if (s->valid & FATTR_SIZE)
            d->size = s->size < DISK_MAX ? s->size : DISK_MAX;
        disk_attr(d, request);
        break;
    case FUSE_OPEN: {
        struct fuse_open_out out = {.open_flags = FOPEN_DIRECT_IO | 1 << 6}; // parallel writes
        disk_answer(d, request, 0, &out, sizeof(out));
        break;
    }
    case FUSE_READ: {
        uint64_t left = r->offset < d->size ? d->size - r->offset : 0;
        disk_answer(d, request, atomic_load(&d->fail_read), d->now + r->offset,
                    r->size < left ? r->size : left);
        break;
    }
    case FUSE_WRITE: {
        struct fuse_write_out out = {.size = w->size};
        int error = atomic_load(&d->fail_write);
        if (!error && w->offset + w->size > DISK_MAX)
            error = ENOSPC;
        if (!error) {
            disk_change(d, w->offset, w + 1, w->size);
            if (d->size < w->offset + w->size)
                d->size = w->offset + w->size;
        }
        disk_answer(d, request, error, &out, sizeof(out));
        break;
    }
    case FUSE_FALLOCATE: {
        int error = atomic_load(&d->fail_write);
        if (!error)
            disk_change(d, f->offset, NULL, (uint32_t)f->length);
        disk_answer(d, request, error, NULL, 0);
        break;
    }
    case FUSE_FSYNC: {
        int error = atomic_load(&d->fail_sync);
        if (!error)
            disk_sync(d);
        disk_answer(d, request, error, NULL, 0);
        break;
    }
    case FUSE_RELEASE:
    case FUSE_FLUSH:
        disk_answer(d, request, 0, NULL, 0);
        break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        break;
    default:
        disk_answer(d, request, ENOSYS, NULL, 0);
    }
}

static inline bool disk_held(struct fuse_disk *d, const uint8_t *request)
{
    switch (disk_opcode(request)) {
    case FUSE_READ:
        return atomic_load(&d->hold_read);
    case FUSE_WRITE:
        if (((const struct fuse_write_in *)(request + sizeof(struct fuse_in_header)))->offset <
            atomic_load(&d->hold_below))
            return true;
        return atomic_load(&d->hold_write);
    case FUSE_FALLOCATE:
        return atomic_load(&d->hold_write);
    case FUSE_FSYNC:
        return atomic_load(&d->hold_sync);
    }
    return false;
}

// Serves one that is not held, the first or any.
static inline void disk_serve_one(struct fuse_disk *d)
{
    unsigned first = atomic_load(&d->shuffle) && d->nr_queued ? rand_r(&d->seed) % d->nr_queued : 0;
    pthread_mutex_lock(&d->lock);
    for (unsigned n = 0; n < d->nr_queued; n++) {
        unsigned i = (first + n) % d->nr_queued;
        uint8_t *request = d->queue[i];
        if (disk_held(d, request))
            continue;
        d->nr_queued--;
        memmove(&d->queue[i], &d->queue[i + 1], (d->nr_queued - i) * sizeof(d->queue[0]));
        memmove(&d->opcodes[i], &d->opcodes[i + 1], (d->nr_queued - i) * sizeof(uint32_t));
        disk_serve(d, request);
        free(request);
        break;
    }
    pthread_mutex_unlock(&d->lock);
}

static inline void disk_server(struct fuse_disk *d)
{
    while (!atomic_load(&d->stop)) {
        struct pollfd p = {.fd = d->fd, .events = POLLIN};
        if (poll(&p, 1, d->nr_queued ? 1 : 20) > 0 && d->nr_queued < DISK_QUEUE) {
            size_t max = DISK_WRITE_MAX + 8192;
            uint8_t *request = malloc(max);
            ssize_t n = read(d->fd, request, max);
            if (n > 0) {
                pthread_mutex_lock(&d->lock);
                d->opcodes[d->nr_queued] = disk_opcode(request);
                d->queue[d->nr_queued++] = request;
                pthread_mutex_unlock(&d->lock);
            } else {
                free(request);
                if (errno == ENODEV)
                    break;
            }
            // Shuffled: a few gather first, so that there is something to choose from.
            if (atomic_load(&d->shuffle) && d->nr_queued < 6)
                continue;
        }
        disk_serve_one(d);
    }
}

// NULL: not possible here.
static inline struct fuse_disk *fuse_disk_new(uint64_t size)
{
    struct fuse_disk *d =
        mmap(NULL, sizeof(*d), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t shared;
    char options[80];
    ck_assert_ptr_ne(d, MAP_FAILED);
    d->fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (d->fd < 0 || unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
        munmap(d, sizeof(*d));
        return NULL;
    }
    strcpy(d->path, "/tmp/ferry-fuse-XXXXXX");
    int file = mkstemp(d->path);
    ck_assert_int_ge(file, 0);
    close(file);
    snprintf(options, sizeof(options), "fd=%d,rootmode=100644,user_id=0,group_id=0", d->fd);
    if (mount("ferry-test", d->path, "fuse", 0, options)) {
        unlink(d->path);
        munmap(d, sizeof(*d));
        return NULL;
    }
    d->size = size;
    d->seed = 1;
    pthread_mutexattr_init(&shared);
    pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&d->lock, &shared);
    pid_t parent = getpid();
    pid_t server = fork(); // not to `d` at once: both write there
    ck_assert_int_ge(server, 0);
    if (!server) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() == parent)
            disk_server(d);
        _exit(0);
    }
    d->server = server;
    close(d->fd);
    return d;
}

static inline void fuse_disk_free(struct fuse_disk *d)
{
    umount2(d->path, MNT_DETACH);
    unlink(d->path);
    atomic_store(&d->stop, true);
    waitpid(d->server, NULL, 0);
    munmap(d, sizeof(*d));
}

// Waits until so many requests of that kind are held, and turns the loop meanwhile.
static inline void disk_wait_held(struct fuse_disk *d, struct loop *loop, uint32_t opcode,
                                  unsigned wanted)
{
    struct error err;
    for (unsigned held = 0; held < wanted; usleep(1000)) {
        ck_assert(!loop_turn(loop, false, &err));
        pthread_mutex_lock(&d->lock);
        held = 0;
        for (unsigned i = 0; i < d->nr_queued; i++)
            held += d->opcodes[i] == opcode;
        pthread_mutex_unlock(&d->lock);
    }
}

// What a power cut leaves now: what was synced and, of each later write, what `keeps` says. On the
// heap, DISK_MAX bytes.
static inline uint8_t *disk_power_cut(struct fuse_disk *d, uint64_t *size,
                                      bool (*keeps)(const struct disk_write *w, void *arg),
                                      void *arg)
{
    uint8_t *image = malloc(DISK_MAX);
    pthread_mutex_lock(&d->lock);
    memcpy(image, d->durable, DISK_MAX);
    uint64_t at = 0;
    for (const struct disk_write *w; (w = disk_log_next(d, &at));)
        if (keeps(w, arg))
            memcpy(image + w->offset, w->data, w->len);
    *size = d->size;
    pthread_mutex_unlock(&d->lock);
    return image;
}
