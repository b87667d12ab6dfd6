// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_rng.h"

#include <errno.h>
#include <sys/random.h>
#include <sys/timerfd.h>

#include "vmm/util.h"
#include "vmm/vm.h"

enum { QUEUE_SIZE = 64, CHUNK = 4096 };

struct virtio_rng {
    struct virtio v; // first
    struct virtio_bell *timer;
    uint32_t left;    // bytes in this period
    bool timer_armed; // the next period begins when it fires
    struct virtqueue_chain chain;
};

static struct virtio_rng *rng_of(struct virtio *v)
{
    return container_of(v, struct virtio_rng, v);
}

static void period_begin(struct virtio_rng *r)
{
    struct itimerspec when = {.it_value.tv_nsec = RNG_PERIOD_MS * 1000000l};
    if (!r->timer_armed)
        r->timer_armed = !timerfd_settime(r->timer->fd, 0, &when, NULL);
}

static void period_over(struct virtio *v, struct virtio_bell *bell)
{
    struct virtio_rng *r = rng_of(v);
    uint64_t ticks;
    if (read(bell->fd, &ticks, sizeof(ticks)) != sizeof(ticks))
        return;
    r->timer_armed = false;
    r->left = RNG_BYTES;
    virtio_ring(v, 0);
}

// Fewer bytes than the driver has room for are a good answer (5.4.6), so one request costs at most
// one chunk of work.
static uint32_t fill(struct virtio_rng *r)
{
    uint8_t data[CHUNK];
    size_t len = r->chain.in_len < CHUNK ? (size_t)r->chain.in_len : CHUNK;
    if (len > r->left)
        len = r->left;
    ssize_t n = getrandom(data, len, 0);
    if (n <= 0)
        return 0;
    return (uint32_t)chain_write(&r->v.dev.vm->ram, &r->chain, 0, data, (size_t)n);
}

static bool rng_run(struct virtio *v, unsigned queue)
{
    struct virtio_rng *r = rng_of(v);
    while (r->left && virtio_next(v, queue, &r->chain)) {
        uint32_t n = fill(r);
        r->left -= n;
        // Requests without a byte of room cost, too.
        r->left -= r->left < 64 ? r->left : 64;
        virtio_push(v, queue, &r->chain, n);
        period_begin(r);
    }
    virtio_signal(v, queue);
    return r->left;
}

static const struct virtio_ops rng_ops = {.id = VIRTIO_ID_RNG, .run = rng_run};

static int rng_realize(struct device *dev, const void *config, struct error *err)
{
    struct virtio_rng *r = container_of(dev, struct virtio_rng, v.dev);
    const struct virtio_rng_config *c = config;
    const struct virtio_setup setup = {
        .ops = &rng_ops, .attach = &c->attach, .nr_queues = 1, .queue_size = QUEUE_SIZE};
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "timerfd_create");
    r->left = RNG_BYTES;
    r->timer = virtio_bell_new(&r->v, fd, 0, period_over, err);
    if (!r->timer)
        return err ? err->code : -ENOMEM;
    int ret = virtio_realize(&r->v, &setup, err);
    if (ret)
        virtio_bell_close(r->timer);
    return ret;
}

static void rng_unrealize(struct device *dev)
{
    struct virtio_rng *r = container_of(dev, struct virtio_rng, v.dev);
    virtio_bell_close(r->timer);
    virtio_unrealize(&r->v);
}

static const struct state_field rng_fields[] = {VIRTIO_STATE_FIELDS(struct virtio_rng)};

static const struct state_table rng_state = {
    .name = "virtio-rng",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(rng_fields),
    .fields = rng_fields,
    .save = virtio_save,
    .load = virtio_load,
};

const struct device_class virtio_rng_class = {
    .name = "virtio-rng",
    .size = sizeof(struct virtio_rng),
    .realize = rng_realize,
    .reset = virtio_device_reset,
    .quiesce = virtio_quiesce,
    .resume = virtio_resume,
    .unrealize = rng_unrealize,
    .state = &rng_state,
};
