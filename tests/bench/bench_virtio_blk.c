// SPDX-License-Identifier: Apache-2.0
// usage: bench_virtio_blk device|bare FILE DEPTH SECONDS [cached] [packed]
//
// Random reads of 4 KiB, DEPTH at a time: through the block device (rings in memory, walker,
// io_uring, answer, interrupt) with a driver in the same thread, or by an io_uring with a
// registered file and registered buffers and nothing else. Prints requests/s and the CPU time of
// one. The device's figure includes the driver's work and the doorbell's system call, which in a VM
// are the guest's and KVM's.
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "devices/virtio_blk.h"
#include "tests/unit/virtio_driver.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { BLOCK = 4096, DEPTH_MAX = 128, RING = 256, T_IN = 0, S_OK = 0 };
// Guest memory: rings, then for each slot header, status and indirect table, then its data.
enum { RINGS = 0x100000, SLOTS = 0x200000, SLOT = 0x100, DATA = 0x400000 };
enum { SLOT_STATUS = 0x20, SLOT_TABLE = 0x40 };

struct options {
    const char *path;
    unsigned depth;
    double seconds;
    bool cached, packed;
    uint64_t blocks;
};

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "bench_virtio_blk: %s: %s\n", what, why);
    exit(1);
}

static uint64_t random_block(const struct options *o)
{
    static uint64_t x = 88172645463325252;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x % o->blocks;
}

struct span {
    uint64_t begun, cpu, end;
};

static uint64_t cpu_ns(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (uint64_t)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000000u +
           (uint64_t)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1000u;
}

static struct span span_begin(const struct options *o)
{
    uint64_t now = time_ns();
    return (struct span) {now, cpu_ns(), now + (uint64_t)(o->seconds * 1e9)};
}

static void span_report(const struct span *s, uint64_t requests)
{
    double took = (double)(time_ns() - s->begun), cpu = (double)(cpu_ns() - s->cpu);
    printf("rate %.0f\ncpu_us %.3f\n", (double)requests * 1e9 / took, cpu / 1e3 / (double)requests);
}

// --- the device, and a driver as Linux has it: indirect tables, event index

struct machine {
    struct vm vm;
    struct device *dev;
    struct virtio *v;
    struct driver d;
    int irq;
    uint16_t kicked; // split: avail index at the last doorbell
    uint64_t kicks, signals;
};

static int attach(struct virtio *v, const void *place, struct error *err)
{
    return 0;
}

static void detach(struct virtio *v)
{
}

static void raise_irq(struct virtio *v, int queue)
{
    struct machine *m = container_of(v->dev.vm, struct machine, vm);
    uint64_t one = 1;
    m->signals++;
    if (write(m->irq, &one, sizeof(one)) < 0)
        fail("eventfd", strerror(errno));
}

static const struct virtio_transport transport = {
    .name = "bench", .attach = attach, .detach = detach, .signal = raise_irq};

static void device_start(struct machine *m, bool packed)
{
    struct virtio *v = m->v;
    uint64_t accept = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT | VIRTIO_F_EVENT_IDX |
                      (packed ? VIRTIO_F_PACKED : 0);
    pthread_mutex_lock(&m->dev->lock);
    virtio_status_write(v, VIRTIO_ACKNOWLEDGE);
    virtio_status_write(v, VIRTIO_ACKNOWLEDGE | VIRTIO_DRIVER);
    for (v->accepted_sel = 0; v->accepted_sel < 2; v->accepted_sel++)
        virtio_features_write(v, (uint32_t)(accept >> 32 * v->accepted_sel));
    virtio_status_write(v, VIRTIO_ACKNOWLEDGE | VIRTIO_DRIVER | VIRTIO_FEATURES_OK);
    v->queue_sel = 0;
    struct virtqueue *vq = virtio_configurable(v);
    if (!vq)
        fail("device", "features not taken");
    driver_init(&m->d, &m->vm.ram, packed, RING, RINGS);
    driver_setup(&m->d, vq);
    virtio_queue_ready(v, true);
    virtio_status_write(v,
                        VIRTIO_ACKNOWLEDGE | VIRTIO_DRIVER | VIRTIO_FEATURES_OK | VIRTIO_DRIVER_OK);
    pthread_mutex_unlock(&m->dev->lock);
}

static void machine_create(struct machine *m, const struct options *o)
{
    struct error err = {0};
    struct ram_config ram = {.size = 16 * MiB};
    struct virtio_blk_config config;
    char text[BLK_PATH_MAX + 16];
    m->vm.mmio.name = "mmio";
    m->vm.log = (struct log) {.level = LOG_WARN, .fd = STDERR_FILENO};
    m->irq = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    snprintf(text, sizeof(text), "%s,ro%s", o->path, o->cached ? ",cached" : "");
    if (ram_create(&m->vm.ram, &ram, &err) || loop_create(&m->vm.loop, &err) ||
        virtio_blk_parse(text, &config, &err))
        fail("machine", err.text);
    config.attach = (struct virtio_attach) {.transport = &transport, .packed = o->packed};
    if (device_add(&m->vm, &virtio_blk_class, &config, &m->dev, &err))
        fail("device", err.text);
    m->v = container_of(m->dev, struct virtio, dev);
    virtio_blk_class.resume(m->dev);
    device_start(m, o->packed);
}

static void slot_add(struct machine *m, unsigned slot, uint64_t block)
{
    uint64_t at = SLOTS + (uint64_t)slot * SLOT;
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header = {T_IN, 0, block * (BLOCK / BLK_SECTOR)};
    const struct buffer buffers[] = {{at, sizeof(header), false},
                                     {DATA + (uint64_t)slot * BLOCK, BLOCK, true},
                                     {at + SLOT_STATUS, 1, true}};
    memcpy(ram_at(&m->vm.ram, at, sizeof(header)), &header, sizeof(header));
    *(uint8_t *)ram_at(&m->vm.ram, at + SLOT_STATUS, 1) = 0xff;
    if (driver_add(&m->d, buffers, 3, at + SLOT_TABLE) != (int)slot)
        fail("driver", "ids do not follow slots");
}

// 2.7.10, 2.8.10: rings only when the device asks to be told.
static void kick(struct machine *m)
{
    struct driver *d = &m->d;
    bool wanted;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (d->packed) {
        uint16_t flags = guest16(d->ram, d->used + 2);
        wanted = flags != 1; // any event at all: one doorbell too many does no harm
    } else {
        uint16_t event = guest16(d->ram, d->used + 4 + 8ull * d->size);
        wanted = (uint16_t)(d->next - event - 1) < (uint16_t)(d->next - m->kicked);
        m->kicked = d->next;
    }
    if (!wanted)
        return;
    uint64_t one = 1;
    m->kicks++;
    if (write(m->v->bells[0]->fd, &one, sizeof(one)) < 0)
        fail("doorbell", strerror(errno));
}

static unsigned collect(struct machine *m)
{
    unsigned n = 0, id;
    uint32_t len;
    while (driver_used(&m->d, &id, &len)) {
        uint8_t status = *(uint8_t *)ram_at(&m->vm.ram, SLOTS + id * SLOT + SLOT_STATUS, 1);
        if (status != S_OK || len != BLOCK + 1)
            fail("device", "a read failed");
        n++;
    }
    if (!m->d.packed) // 2.7.8: tell about the next one
        guest16_set(m->d.ram, m->d.avail + 4 + 2ull * m->d.size, m->d.seen);
    return n;
}

// The driver takes the lowest free id: that of the slot which is free.
static void refill(struct machine *m, const struct options *o)
{
    for (unsigned i = 0; i < o->depth; i++)
        if (!m->d.taken[i])
            slot_add(m, i, random_block(o));
    kick(m);
}

static void device_run(const struct options *o)
{
    struct machine *m = calloc(1, sizeof(*m));
    struct error err = {0};
    uint64_t requests = 0;
    machine_create(m, o);
    struct span span = span_begin(o);
    refill(m, o);
    while (time_ns() < span.end) {
        unsigned n = collect(m);
        if (n)
            refill(m, o);
        else if (loop_turn(m->vm.loop, true, &err))
            fail("loop", err.text);
        requests += n;
    }
    span_report(&span, requests);
    printf("kicks %.3f\nsignals %.3f\n", (double)m->kicks / (double)requests,
           (double)m->signals / (double)requests);
}

// --- nothing but io_uring

static void bare_read(struct io_uring *ring, uint8_t *data, unsigned slot, const struct options *o)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    io_uring_prep_read_fixed(sqe, 0, data + (size_t)slot * BLOCK, BLOCK, random_block(o) * BLOCK,
                             (int)slot);
    sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(sqe, slot);
}

static void bare_create(struct io_uring *ring, uint8_t **data, const struct options *o)
{
    struct iovec iov[DEPTH_MAX];
    int fd = open(o->path, O_RDONLY | O_CLOEXEC | (o->cached ? 0 : O_DIRECT));
    if (fd < 0)
        fail(o->path, strerror(errno));
    if (posix_memalign((void **)data, BLOCK, (size_t)BLOCK * o->depth))
        fail("memory", strerror(ENOMEM));
    for (unsigned i = 0; i < o->depth; i++)
        iov[i] = (struct iovec) {*data + (size_t)i * BLOCK, BLOCK};
    int ret = io_uring_queue_init(RING, ring, 0);
    if (!ret)
        ret = io_uring_register_files(ring, &fd, 1);
    if (!ret)
        ret = io_uring_register_buffers(ring, iov, o->depth);
    if (ret)
        fail("io_uring", strerror(-ret));
}

static void bare_run(const struct options *o)
{
    struct io_uring ring;
    struct io_uring_cqe *cqe;
    uint8_t *data;
    uint64_t requests = 0;
    bare_create(&ring, &data, o);
    for (unsigned i = 0; i < o->depth; i++)
        bare_read(&ring, data, i, o);
    struct span span = span_begin(o);
    while (time_ns() < span.end) {
        io_uring_submit_and_wait(&ring, 1);
        while (!io_uring_peek_cqe(&ring, &cqe)) {
            unsigned slot = (unsigned)cqe->user_data;
            if (cqe->res != BLOCK)
                fail("io_uring", "a read failed");
            io_uring_cqe_seen(&ring, cqe);
            bare_read(&ring, data, slot, o);
            requests++;
        }
    }
    span_report(&span, requests);
}

// Where the disk's interrupts arrive makes more difference than what is compared here: all stay on
// one processor, the last.
static void cpu_choose(void)
{
    cpu_set_t all, one;
    if (sched_getaffinity(0, sizeof(all), &all))
        return;
    for (int cpu = CPU_SETSIZE - 1; cpu >= 0; cpu--) {
        if (!CPU_ISSET(cpu, &all))
            continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        sched_setaffinity(0, sizeof(one), &one);
        return;
    }
}

int main(int argc, char **argv)
{
    struct options o = {0};
    cpu_choose();
    struct stat st;
    if (argc < 5)
        fail("usage", "bench_virtio_blk device|bare FILE DEPTH SECONDS [cached] [packed]");
    o.path = argv[2];
    o.depth = (unsigned)atoi(argv[3]);
    o.seconds = atof(argv[4]);
    for (int i = 5; i < argc; i++) {
        o.cached |= !strcmp(argv[i], "cached");
        o.packed |= !strcmp(argv[i], "packed");
    }
    if (stat(o.path, &st))
        fail(o.path, strerror(errno));
    o.blocks = (uint64_t)st.st_size / BLOCK;
    if (!o.blocks || !o.depth || o.depth > DEPTH_MAX || o.seconds <= 0)
        fail("usage", "a file of at least 4 KiB, a depth from 1 to 128, seconds above 0");
    if (!strcmp(argv[1], "device"))
        device_run(&o);
    else
        bare_run(&o);
    return 0;
}
