// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

#include "vmm/util.h"
#include "vmm/vm.h"

// --- bells

static void bell_rang(struct loop_watch *watch, uint32_t revents)
{
    struct virtio_bell *bell = container_of(watch, struct virtio_bell, watch);
    struct virtio *v = bell->v;
    if (!v)
        return;
    pthread_mutex_lock(&v->dev.lock);
    bell->fn(v, bell);
    pthread_mutex_unlock(&v->dev.lock);
}

struct virtio_bell *virtio_bell_new(struct virtio *v, int fd, unsigned queue,
                                    void (*fn)(struct virtio *v, struct virtio_bell *bell),
                                    struct error *err)
{
    struct virtio_bell *bell = calloc(1, sizeof(*bell));
    if (!bell) {
        close(fd);
        error_set(err, -ENOMEM, "no memory for a doorbell");
        return NULL;
    }
    bell->v = v;
    bell->fd = fd;
    bell->queue = queue;
    bell->fn = fn;
    if (loop_watch(v->dev.vm->loop, &bell->watch, fd, POLLIN, bell_rang, err)) {
        close(fd);
        free(bell);
        return NULL;
    }
    return bell;
}

static void bell_closed(struct loop_watch *watch)
{
    free(container_of(watch, struct virtio_bell, watch));
}

void virtio_bell_close(struct virtio_bell *bell)
{
    if (!bell)
        return;
    bell->v = NULL;
    int fd = bell->fd;
    loop_unwatch(&bell->watch, bell_closed);
    close(fd);
}

// --- telling the driver

static void acknowledged(struct virtio *v)
{
    if (v->transport->acknowledged)
        v->transport->acknowledged(v);
}

static void driver_signal(struct virtio *v, int queue)
{
    acknowledged(v);
    v->isr |= queue < 0 ? VIRTIO_ISR_CONFIG : VIRTIO_ISR_QUEUE;
    v->transport->signal(v, queue);
}

void virtio_config_changed(struct virtio *v)
{
    v->generation++;
    if (v->status & VIRTIO_DRIVER_OK)
        driver_signal(v, -1);
}

void virtio_signal(struct virtio *v, unsigned queue)
{
    if (virtqueue_should_signal(&v->queues[queue]))
        driver_signal(v, (int)queue);
}

static void needs_reset(struct virtio *v)
{
    if (v->status & VIRTIO_NEEDS_RESET)
        return;
    v->status |= VIRTIO_NEEDS_RESET;
    if (v->status & VIRTIO_DRIVER_OK)
        driver_signal(v, -1); // 2.1.2
}

static void driver_blame(struct virtio *v, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static void driver_blame(struct virtio *v, const char *fmt, ...)
{
    char text[160];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    log_limited(&v->dev.vm->log, &v->limit, LOG_WARN, "%s[%u]: %s", v->dev.class->name,
                v->dev.instance, text);
}

void virtio_break(struct virtio *v, unsigned queue, const char *fmt, ...)
{
    char text[128];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    v->queues[queue].broken = true;
    driver_blame(v, "queue %u: %s; it needs a reset by its driver", queue, text);
    needs_reset(v);
}

// --- queues

bool virtio_next(struct virtio *v, unsigned queue, struct virtqueue_chain *chain)
{
    struct error err;
    int ret = virtqueue_next(&v->queues[queue], chain, &err);
    if (ret < 0)
        virtio_break(v, queue, "%s", err.text);
    return ret > 0;
}

void virtio_push(struct virtio *v, unsigned queue, struct virtqueue_chain *chain, uint32_t written)
{
    virtqueue_push(&v->queues[queue], chain, written);
}

void virtio_ring(struct virtio *v, unsigned queue)
{
    uint64_t one = 1;
    // EAGAIN: the counter is full, so the bell rings already.
    if (write(v->bells[queue]->fd, &one, sizeof(one)) < 0)
        return;
}

// How long the loop stays awake for the next request or answer: about what a disk takes. Waking a
// thread costs as much again, and a driver that finds the device awake need not ring. After
// MISSES_MAX times for nothing it sleeps at once for the next REST_TURNS.
enum { AWAKE_NS = 50000, WOKEN_SOON_NS = 2 * AWAKE_NS, MISSES_MAX = 2, REST_TURNS = 64 };

void virtio_woken(struct virtio *v)
{
    v->awake_pays = !v->rest_turns && time_ns() - v->slept_ns < WOKEN_SOON_NS;
    v->rest_turns -= v->rest_turns > 0;
}

// With the driver's doorbells off. Ends as soon as anybody else wants something of the loop.
static void stay_awake(struct virtio *v, unsigned queue)
{
    struct virtqueue *vq = &v->queues[queue];
    uint64_t now = time_ns(), end = now + AWAKE_NS;
    bool on = v->ops->watch(v, true);
    for (; on && now < end && !loop_pending(v->dev.vm->loop); now = time_ns()) {
        bool more = virtqueue_waiting(vq);
        if (more && !v->ops->run(v, queue))
            break;
        if (v->ops->poll(v) || more) {
            end = now + AWAKE_NS;
            v->awake_misses = 0;
            on = v->ops->watch(v, true);
        }
        __builtin_ia32_pause();
    }
    v->ops->watch(v, false);
    if (now >= end && ++v->awake_misses >= MISSES_MAX) {
        v->awake_misses = 0;
        v->rest_turns = REST_TURNS;
    }
}

static void doorbell(struct virtio *v, struct virtio_bell *bell)
{
    uint64_t count;
    if (read(bell->fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return;
    struct virtqueue *vq = &v->queues[bell->queue];
    if (!v->active || !(v->status & VIRTIO_DRIVER_OK) || !vq->enabled || vq->broken)
        return;
    virtqueue_kicks(vq, false);
    if (v->ops->watch)
        virtio_woken(v);
    if (!v->ops->run(v, bell->queue))
        return;
    if (v->ops->watch && v->awake_pays)
        stay_awake(v, bell->queue);
    v->slept_ns = v->ops->watch ? time_ns() : 0;
    // A driver that always adds more must not keep the loop from everybody else: one round, then
    // the others' turn.
    if (virtqueue_kicks(vq, true))
        virtio_ring(v, bell->queue);
}

struct virtqueue *virtio_selected(struct virtio *v)
{
    return v->queue_sel < v->nr_queues ? &v->queues[v->queue_sel] : NULL;
}

struct virtqueue *virtio_configurable(struct virtio *v)
{
    struct virtqueue *vq = virtio_selected(v);
    unsigned phase = v->status & (VIRTIO_FEATURES_OK | VIRTIO_DRIVER_OK);
    return vq && phase == VIRTIO_FEATURES_OK && !vq->enabled && !v->resetting ? vq : NULL;
}

void virtio_queue_ready(struct virtio *v, bool ready)
{
    struct error err;
    struct virtqueue *vq = virtio_configurable(v);
    if (!vq || !ready)
        return; // an enabled queue ends with a reset of the device only
    vq->packed = v->accepted & VIRTIO_F_PACKED;
    vq->event_idx = v->accepted & VIRTIO_F_EVENT_IDX;
    vq->indirect = v->accepted & VIRTIO_F_INDIRECT;
    if (virtqueue_enable(vq, &err))
        virtio_break(v, v->queue_sel, "%s", err.text);
}

// --- features and status

uint32_t virtio_features_read(const struct virtio *v)
{
    return v->offered_sel < 2 ? (uint32_t)(v->offered >> 32 * v->offered_sel) : 0;
}

void virtio_features_write(struct virtio *v, uint32_t value)
{
    if (v->accepted_sel >= 2 || v->status & VIRTIO_FEATURES_OK || !(v->status & VIRTIO_DRIVER))
        return;
    unsigned shift = 32 * v->accepted_sel;
    v->accepted = (v->accepted & ~(0xffffffffull << shift)) | (uint64_t)value << shift;
}

// Nothing is under way.
static void reset_end(struct virtio *v)
{
    v->resetting = false;
    if (v->ops->reset)
        v->ops->reset(v);
    for (unsigned i = 0; i < v->nr_queues; i++)
        virtqueue_reset(&v->queues[i]);
    acknowledged(v);
    v->status = v->isr = 0;
    v->accepted = 0;
    v->offered_sel = v->accepted_sel = v->queue_sel = 0;
    if (v->transport->reset)
        v->transport->reset(v);
}

static bool outside_idle(struct virtio *v)
{
    return !v->ops->idle || v->ops->idle(v);
}

// What is under way may still write into guest memory: the status stays nonzero until that ended.
static void reset_or_wait(struct virtio *v)
{
    v->resetting = !outside_idle(v);
    if (v->resetting)
        v->status &= (uint8_t)~VIRTIO_DRIVER_OK; // the rest of it stays, so it is not 0
    else
        reset_end(v);
}

static void device_reset(struct virtio *v)
{
    if (v->ops->drain)
        v->ops->drain(v);
    reset_or_wait(v);
}

// A driver that waits for status 0 (2.4.2) need not wait here, with its vCPU: nothing is taken from
// the queues from now on, and what is under way may still write until the status reads 0.
static void driver_reset(struct virtio *v)
{
    if (v->transport->reset_polled && v->ops->idle)
        reset_or_wait(v);
    else
        device_reset(v);
}

uint8_t virtio_status_read(struct virtio *v)
{
    if (v->resetting && v->ops->idle(v))
        reset_end(v);
    return v->status;
}

static bool features_good(const struct virtio *v)
{
    return v->accepted & VIRTIO_F_VERSION_1 && !(v->accepted & ~v->offered);
}

// Bits in the order in which a driver sets them (3.1.1).
static bool status_order(uint8_t status)
{
    return (!(status & VIRTIO_DRIVER) || status & VIRTIO_ACKNOWLEDGE) &&
           (!(status & VIRTIO_FEATURES_OK) || status & VIRTIO_DRIVER) &&
           (!(status & VIRTIO_DRIVER_OK) || status & VIRTIO_FEATURES_OK);
}

void virtio_status_write(struct virtio *v, uint8_t value)
{
    enum {
        DRIVERS = VIRTIO_ACKNOWLEDGE | VIRTIO_DRIVER | VIRTIO_FEATURES_OK | VIRTIO_DRIVER_OK |
                  VIRTIO_FAILED
    };
    if (!value)
        driver_reset(v);
    if (!value || v->resetting)
        return;
    uint8_t old = v->status & DRIVERS, wanted = value & DRIVERS;
    if (old & ~wanted || !status_order(wanted)) { // bits are only added
        driver_blame(v, "status 0x%02x after 0x%02x: ignored", value, v->status);
        return;
    }
    if (wanted & ~old & VIRTIO_FEATURES_OK && !features_good(v)) {
        driver_blame(v, "features 0x%llx of 0x%llx: not accepted", (unsigned long long)v->accepted,
                     (unsigned long long)v->offered);
        wanted &= (uint8_t) ~(VIRTIO_FEATURES_OK | VIRTIO_DRIVER_OK); // the driver sees it missing
    }
    v->status |= wanted;
    if (!(wanted & ~old & VIRTIO_DRIVER_OK))
        return;
    if (v->status & VIRTIO_NEEDS_RESET)
        driver_signal(v, -1); // broken before anybody could be told
    for (unsigned i = 0; i < v->nr_queues; i++)
        virtio_ring(v, i); // chains may have been made available before
}

// --- config space

uint64_t virtio_config_read(const struct virtio *v, uint64_t offset, unsigned size)
{
    uint64_t value = 0;
    if (size <= sizeof(value) && range_within(offset, size, v->config_len))
        memcpy(&value, v->config + offset, size);
    return value;
}

void virtio_config_write(struct virtio *v, uint64_t offset, unsigned size, uint64_t value)
{
    if (v->ops->config_write && size <= sizeof(value) && range_within(offset, size, v->config_len))
        v->ops->config_write(v, (uint32_t)offset, size, value);
}

// --- life

static int bells_create(struct virtio *v, struct error *err)
{
    for (unsigned i = 0; i < v->nr_queues; i++) {
        int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (fd < 0)
            return error_errno(err, "eventfd");
        v->bells[i] = virtio_bell_new(v, fd, i, doorbell, err);
        if (!v->bells[i])
            return err ? err->code : -ENOMEM;
    }
    return 0;
}

int virtio_realize(struct virtio *v, const struct virtio_setup *s, struct error *err)
{
    v->ops = s->ops;
    v->transport = s->attach->transport;
    v->features = s->features | VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT | VIRTIO_F_EVENT_IDX |
                  (s->attach->packed ? VIRTIO_F_PACKED : 0);
    v->offered = v->features;
    v->nr_queues = s->nr_queues;
    v->config_len = s->config_len;
    for (unsigned i = 0; i < v->nr_queues; i++)
        virtqueue_init(&v->queues[i], &v->dev.vm->ram, s->queue_size);
    int ret = bells_create(v, err);
    if (!ret)
        ret = v->transport->attach(v, s->attach->place, err);
    if (ret)
        virtio_unrealize(v);
    return ret;
}

void virtio_unrealize(struct virtio *v)
{
    if (v->ops->drain)
        v->ops->drain(v);
    v->transport->detach(v);
    for (unsigned i = 0; i < v->nr_queues; i++) {
        virtio_bell_close(v->bells[i]);
        virtqueue_reset(&v->queues[i]);
    }
}

static struct virtio *virtio_of(struct device *dev)
{
    return container_of(dev, struct virtio, dev);
}

void virtio_device_reset(struct device *dev)
{
    pthread_mutex_lock(&dev->lock);
    device_reset(virtio_of(dev));
    pthread_mutex_unlock(&dev->lock);
}

int virtio_quiesce(struct device *dev, struct error *err)
{
    struct virtio *v = virtio_of(dev);
    pthread_mutex_lock(&dev->lock);
    v->active = false;
    if (v->ops->drain)
        v->ops->drain(v);
    if (v->resetting && outside_idle(v))
        reset_end(v);
    pthread_mutex_unlock(&dev->lock);
    return 0;
}

void virtio_resume(struct device *dev)
{
    struct virtio *v = virtio_of(dev);
    pthread_mutex_lock(&dev->lock);
    v->active = true;
    // An interrupt that was on its way into the saved interrupt controller, or a doorbell that
    // nobody served, may have been lost. One too many does no harm.
    acknowledged(v);
    if (v->isr & VIRTIO_ISR_CONFIG)
        v->transport->signal(v, -1);
    for (unsigned i = 0; v->isr & VIRTIO_ISR_QUEUE && i < v->nr_queues; i++)
        v->transport->signal(v, (int)i);
    if (v->status & VIRTIO_DRIVER_OK)
        for (unsigned i = 0; i < v->nr_queues; i++)
            virtio_ring(v, i);
    pthread_mutex_unlock(&dev->lock);
}

// --- saved state

int virtio_save(void *object, struct error *err)
{
    struct virtio *v = object;
    acknowledged(v);
    struct stream_mem mem;
    if (v->resetting)
        return error_set(err, -EBUSY, "its driver resets it, and something is still under way");
    stream_mem_writer(&mem, "queues", sizeof(v->saved));
    int ret = stream_put(&mem.stream, v->nr_queues, 2, err);
    for (unsigned i = 0; i < v->nr_queues && !ret; i++)
        ret = virtqueue_save(&v->queues[i], &mem.stream, err);
    v->saved_len = ret ? 0 : (uint32_t)mem.len;
    if (!ret)
        memcpy(v->saved, mem.data, mem.len);
    stream_mem_free(&mem);
    return ret;
}

static int fields_check(const struct virtio *v, struct error *err)
{
    if (v->offered != v->features)
        return error_set(err, -EINVAL,
                         "the guest was offered features 0x%llx, here they are 0x%llx",
                         (unsigned long long)v->offered, (unsigned long long)v->features);
    bool negotiated = v->status & VIRTIO_FEATURES_OK;
    if (!status_order(v->status) || (negotiated && !features_good(v)))
        return error_set(err, -EBADMSG, "saved status 0x%02x with features 0x%llx", v->status,
                         (unsigned long long)v->accepted);
    if (v->isr & ~(VIRTIO_ISR_QUEUE | VIRTIO_ISR_CONFIG))
        return error_set(err, -EBADMSG, "saved interrupt status 0x%02x", v->isr);
    return 0;
}

static int queues_load(struct virtio *v, struct error *err)
{
    struct stream_mem mem;
    uint64_t nr;
    stream_mem_reader(&mem, "queues", v->saved, v->saved_len);
    int ret = stream_get(&mem.stream, &nr, 2, err);
    if (!ret && nr != v->nr_queues)
        ret = error_set(err, -EINVAL, "saved with %llu queues, here it has %u",
                        (unsigned long long)nr, v->nr_queues);
    for (unsigned i = 0; i < v->nr_queues && !ret; i++) {
        struct virtqueue *vq = &v->queues[i];
        vq->packed = v->accepted & VIRTIO_F_PACKED;
        vq->event_idx = v->accepted & VIRTIO_F_EVENT_IDX;
        vq->indirect = v->accepted & VIRTIO_F_INDIRECT;
        ret = virtqueue_load(vq, &mem.stream, err);
        if (ret)
            error_prefix(err, "queue %u", i);
        else if (vq->enabled && !(v->status & VIRTIO_FEATURES_OK))
            ret = error_set(err, -EBADMSG, "queue %u was saved enabled with status 0x%02x", i,
                            v->status);
    }
    if (!ret && mem.pos != mem.len)
        ret = error_set(err, -EBADMSG, "%zu bytes after the saved queues", mem.len - mem.pos);
    return ret;
}

int virtio_load(void *object, uint16_t version, struct error *err)
{
    struct virtio *v = object;
    pthread_mutex_lock(&v->dev.lock);
    int ret = fields_check(v, err);
    if (!ret)
        ret = queues_load(v, err);
    v->offered = v->features;
    if (ret)
        device_reset(v); // one that stays behind is safe to touch
    pthread_mutex_unlock(&v->dev.lock);
    return ret;
}
