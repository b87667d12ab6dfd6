// SPDX-License-Identifier: Apache-2.0
// The block device from its option to its end: image, config space, saved state.
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "devices/virtio_blk_parts.h"
#include "vmm/vm.h"

// 5.2.3
#define F_SEG_MAX      (1ull << 2)
#define F_RO           (1ull << 5)
#define F_BLK_SIZE     (1ull << 6)
#define F_FLUSH        (1ull << 9)
#define F_MQ           (1ull << 12)
#define F_DISCARD      (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)

struct __attribute__((packed)) blk_space { // config space, 5.2.4
    uint64_t capacity;                     // sectors
    uint32_t size_max, seg_max;
    uint16_t cylinders;
    uint8_t heads, sectors;
    uint32_t blk_size;
    uint8_t physical_exp, alignment_offset;
    uint16_t min_io;
    uint32_t opt_io;
    uint8_t writeback, unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors, max_discard_seg, discard_alignment;
    uint32_t max_zeroes_sectors, max_zeroes_seg;
    uint8_t zeroes_may_unmap, unused1[3];
};
_Static_assert(sizeof(struct blk_space) == 60, "5.2.4");

// --- the image

static int image_take(struct virtio_blk *b, struct error *err)
{
    int ret = blk_image_lock(&b->image, err);
    if (!ret && has_overlay(b))
        ret = blk_image_lock(&b->overlay.file, err);
    return ret;
}

static void image_give_up(struct virtio_blk *b)
{
    blk_image_unlock(&b->image);
    if (*b->overlay.file.path)
        blk_image_unlock(&b->overlay.file);
}

static void image_lend(struct virtio_blk *b)
{
    blk_image_lend(&b->image);
    if (has_overlay(b))
        blk_image_lend(&b->overlay.file);
}

// As image_take, when the guest goes on: from a source that has lent it, or here again.
static int image_take_lent(struct virtio_blk *b, struct error *err)
{
    int ret = blk_image_lock_lent(&b->image, err);
    if (!ret && has_overlay(b))
        ret = blk_image_lock_lent(&b->overlay.file, err);
    return ret;
}

// A destination that has just been killed keeps the image until the kernel has torn down its
// memory and its ring.
static int image_take_back(struct virtio_blk *b, struct error *err)
{
    uint64_t end = time_ns() + BLK_TAKE_BACK_MS * 1000000ull;
    int ret;
    while ((ret = image_take_lent(b, err)) == -EBUSY && time_ns() < end)
        usleep(1000);
    return ret;
}

static int image_size(struct virtio_blk *b, struct error *err)
{
    bool none_yet = b->config.comes && b->config.attach.arrives && !b->config.read_only;
    if (!has_overlay(b))
        return none_yet ? blk_image_bytes(&b->image, &b->capacity, err)
                        : blk_image_disk_size(&b->image, &b->capacity, err);
    b->capacity = b->overlay.size;
    return 0;
}

static int image_open(struct virtio_blk *b, struct error *err)
{
    const struct virtio_blk_config *c = &b->config;
    const struct virtio_attach *attach = &c->attach;
    bool comes = c->comes && attach->arrives && !c->read_only;
    struct blk_image_mode mode = {.read_only = c->read_only || has_overlay(b),
                                  .cached = c->cached,
                                  .create = comes && !has_overlay(b),
                                  .fd = c->fd};
    b->made = comes && access(has_overlay(b) ? c->overlay : c->path, F_OK);
    int ret = blk_image_open(&b->image, c->path, &mode, err);
    mode.fd = 0;
    if (!ret && b->made && !c->fd && !has_overlay(b))
        fchmod(b->image.fd, 0600); // it will hold all that the guest has
    // Locked before the overlay looks at it: a base that somebody writes is no base.
    if (!ret && !attach->arrives)
        ret = blk_image_lock(&b->image, err);
    mode.read_only = c->read_only;
    mode.create = !c->read_only && (!attach->arrives || comes);
    if (!ret && has_overlay(b))
        ret = blk_overlay_open(&b->overlay, c->overlay, &mode, &b->image, true, err);
    if (!ret && !attach->arrives)
        ret = image_take(b, err);
    if (!ret && has_overlay(b) && !attach->arrives) // whoever had it has let it go
        ret = blk_overlay_load(&b->overlay, err);
    return ret ? ret : image_size(b, err);
}

static int bells_create(struct virtio_blk *b, struct error *err)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "eventfd");
    b->completion = virtio_bell_new(&b->v, fd, 0, blk_completed, err); // closes fd from here on
    if (!b->completion)
        return -ENOMEM;
    fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "timerfd_create");
    b->timer = virtio_bell_new(&b->v, fd, 0, blk_timer_fired, err);
    return b->timer ? 0 : -ENOMEM;
}

static int pool_create(struct virtio_blk *b, struct error *err)
{
    size_t n = (size_t)b->config.queues * BLK_QUEUE_SIZE + 1; // one to look with
    b->pool = calloc(n, sizeof(*b->pool)); // memory is used as far as request_next_free goes
    if (!b->pool)
        return error_set(err, -ENOMEM, "no memory for %zu requests", n);
    return 0;
}

void blk_space_capacity(struct virtio_blk *b)
{
    uint64_t sectors = b->capacity / BLK_SECTOR;
    memcpy(b->v.config + offsetof(struct blk_space, capacity), &sectors, sizeof(sectors));
}

static uint64_t space_fill(struct virtio_blk *b)
{
    struct blk_space s = {.seg_max = VQ_SEGMENTS_MAX / 2,
                          .blk_size = BLK_SECTOR,
                          .num_queues = (uint16_t)b->config.queues};
    uint64_t features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_MQ;
    if (b->config.read_only) {
        features |= F_RO;
    } else {
        features |= F_DISCARD | F_WRITE_ZEROES;
        s.max_discard_sectors = s.max_zeroes_sectors = BLK_RANGE_SECTORS;
        s.max_discard_seg = s.max_zeroes_seg = BLK_RANGES_MAX;
        s.discard_alignment = PAGE_SIZE / BLK_SECTOR;
        s.zeroes_may_unmap = 1;
    }
    memcpy(b->v.config, &s, sizeof(s));
    blk_space_capacity(b);
    return features;
}

// --- life

static void blk_close(struct virtio_blk *b)
{
    struct error err;
    bool idle = !b->engine.in_flight;
    virtio_bell_close(b->completion);
    virtio_bell_close(b->timer);
    // What was written without a flush is not promised, but an overlay is worth little without its
    // table.
    if (idle && b->engine.ring_up && !b->lost && has_overlay(b) && b->overlay.present &&
        blk_engine_sync(&b->engine, &err))
        log_write(&b->v.dev.vm->log, LOG_WARN, "%s", err.text);
    // The kernel's own references to the files outlive our close. The lock goes at once, unless I/O
    // is still under way: then it stays as long as that.
    if (idle)
        image_give_up(b);
    blk_engine_destroy(&b->engine);
    if (idle)
        blk_overlay_close(&b->overlay);
    else // the kernel may still write from its table: nothing but our end frees that
        blk_image_close(&b->overlay.file);
    blk_image_close(&b->image);
    blk_since_drop(b);
    blk_absent_free(b->absent);
    free(b->pool); // of a request the kernel has a copy (IORING_FEAT_SUBMIT_STABLE)
}

static int blk_realize(struct device *dev, const void *config, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    b->config = *(const struct virtio_blk_config *)config;
    if (!b->config.queues)
        b->config.queues = 1;
    memcpy(b->serial, b->config.serial, strnlen(b->config.serial, BLK_SERIAL_MAX));
    blk_waiting_clear(b);
    rate_limit_init(&b->limit, &b->config.limit, time_ns());
    b->engine.done = blk_request_done;
    int ret = image_open(b, err);
    if (!ret)
        ret = pool_create(b, err);
    if (!ret)
        ret = bells_create(b, err);
    if (!ret)
        ret = blk_engine_create(&b->engine, written_image(b), has_overlay(b) ? &b->overlay : NULL,
                                b->config.queues * BLK_QUEUE_SIZE, b->completion->fd, err);
    const struct virtio_setup setup = {.ops = &blk_ops,
                                       .attach = &b->config.attach,
                                       .features = ret ? 0 : space_fill(b),
                                       .nr_queues = b->config.queues,
                                       .queue_size = BLK_QUEUE_SIZE,
                                       .config_len = sizeof(struct blk_space)};
    if (!ret)
        ret = virtio_realize(&b->v, &setup, err);
    if (ret)
        blk_close(b);
    return ret;
}

static void blk_unrealize(struct device *dev)
{
    struct virtio_blk *b = blk_of_device(dev);
    virtio_unrealize(&b->v);
    blk_close(b);
}

static void blk_resume(struct device *dev)
{
    struct virtio_blk *b = blk_of_device(dev);
    struct error err = {0};
    pthread_mutex_lock(&dev->lock);
    // Ours already, unless it was given up to save.
    b->lost = image_take_back(b, &err) || (has_overlay(b) && !b->overlay.present);
    if (b->lost)
        log_write(&dev->vm->log, LOG_ERROR, "%s; the guest gets errors from now on", err.text);
    pthread_mutex_unlock(&dev->lock);
    virtio_resume(dev);
    pthread_mutex_lock(&dev->lock);
    blk_waiting_run(b);
    pthread_mutex_unlock(&dev->lock);
}

// --- saved state

static const struct state_field blk_fields[] = {
    VIRTIO_STATE_FIELDS(struct virtio_blk),
    STATE_FIELD_INT(struct virtio_blk, capacity, 1),
    STATE_FIELD_BYTES(struct virtio_blk, serial, 1),
    STATE_FIELD_INT(struct virtio_blk, flush_failed, 1),
};

// A destination may be another host, whose flush does not reach what is in the page cache here; and
// the table of an overlay must be in the file.
static int durable(struct virtio_blk *b, struct error *err)
{
    blk_answer(b);
    uint64_t absent = blk_absent_left(b);
    if (absent)
        return error_set(err, -EBUSY,
                         "%s: %llu blocks of it are still at the host that the guest came from: "
                         "it cannot be saved or moved before they are here",
                         b->image.path, (unsigned long long)absent);
    if (b->engine.in_flight)
        return error_set(err, -EBUSY,
                         "%s: %u requests without an answer: a disk that may still read or write "
                         "cannot be saved",
                         written_image(b)->path, b->engine.in_flight);
    b->flush_failed = b->engine.flush_failed;
    return b->flush_failed && !has_overlay(b) ? 0 : blk_engine_sync(&b->engine, err);
}

static int blk_save(void *object, struct error *err)
{
    struct virtio_blk *b = object;
    pthread_mutex_lock(&b->v.dev.lock);
    int ret = durable(b, err);
    pthread_mutex_unlock(&b->v.dev.lock);
    if (!ret)
        ret = virtio_save(&b->v, err);
    if (!ret)
        image_lend(b); // see the header
    return ret;
}

static int image_reload(struct virtio_blk *b, struct error *err)
{
    uint64_t saved = b->capacity;
    int ret = image_take_lent(b, err); // a migration's source has lent it, or nobody has it
    // What a host keeps of a block device does not follow what another host writes to it.
    if (!ret && b->image.block_device)
        posix_fadvise(b->image.fd, 0, 0, POSIX_FADV_DONTNEED);
    if (!ret && has_overlay(b))
        ret = blk_overlay_load(&b->overlay, err); // the source has written its table
    if (!ret)
        ret = image_size(b, err);
    if (!ret && saved != b->capacity)
        ret = error_set(err, -EINVAL, "%s has %llu bytes, the disk that was saved had %llu",
                        written_image(b)->path, (unsigned long long)b->capacity,
                        (unsigned long long)saved);
    if (ret)
        return ret;
    b->engine.shift = has_overlay(b) ? b->overlay.data_offset : 0;
    b->engine.flush_failed = b->flush_failed != 0;
    blk_space_capacity(b);
    return 0;
}

static int blk_load(void *object, uint16_t version, struct error *err)
{
    struct virtio_blk *b = object;
    pthread_mutex_lock(&b->v.dev.lock);
    int ret = image_reload(b, err);
    pthread_mutex_unlock(&b->v.dev.lock);
    return ret ? ret : virtio_load(&b->v, version, err);
}

static const struct state_table blk_state = {
    .name = "virtio-blk",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(blk_fields),
    .fields = blk_fields,
    .save = blk_save,
    .load = blk_load,
};

const struct device_class virtio_blk_class = {
    .name = "virtio-blk",
    .size = sizeof(struct virtio_blk),
    .realize = blk_realize,
    .reset = virtio_device_reset,
    .quiesce = virtio_quiesce,
    .resume = blk_resume,
    .unrealize = blk_unrealize,
    .state = &blk_state,
    .disk = &blk_disk_ops,
    .show = blk_show,
    .set = blk_set,
};
