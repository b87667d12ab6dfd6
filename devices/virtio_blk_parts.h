// SPDX-License-Identifier: Apache-2.0
// What the files of the block device share: virtio_blk.c (requests), virtio_blk_life.c (image,
// life, saved state), virtio_blk_move.c (the image on its way to another host),
// virtio_blk_absent.c (blocks that come after the guest), virtio_blk_admin.c (the person outside).
// The device's lock is held around all of it.
#pragma once

#include "devices/blk_absent.h"
#include "devices/blk_engine.h"
#include "devices/virtio_blk.h"
#include "vmm/disk.h"
#include "vmm/histogram.h"
#include "vmm/util.h"

enum { BLK_QUEUE_SIZE = 256 };

// Sectors of a discard or zeroes segment: what one request of zeroes can write.
enum { BLK_RANGE_SECTORS = BLK_ZEROES / BLK_SECTOR * VQ_SEGMENTS_MAX };

enum { BLK_LATENCY_READ, BLK_LATENCY_WRITE, BLK_LATENCY_FLUSH, BLK_LATENCY_DISCARD, BLK_LATENCIES };

struct virtio_blk {
    struct virtio v; // first
    struct virtio_blk_config config;
    struct blk_image image;
    struct blk_overlay overlay; // where config.overlay names one; then `image` is its base
    struct blk_engine engine;
    uint64_t capacity; // bytes, a multiple of BLK_SECTOR
    struct virtio_bell *completion, *timer;
    struct blk_request *pool, *free;
    size_t fresh; // pool entries never used so far
    struct rate_limit limit;
    struct blk_request *waiting, **waiting_tail; // for tokens, in order; one of a queue at most
    uint32_t waiting_queues;                     // a bit each
    bool lost;                                   // the image belongs to somebody else
    bool gone;                                   // the guest has left it, for another host
    struct blk_absent *absent;                   // blocks that are still elsewhere; or NULL
    struct blk_request *parked;                  // for some of these, in order
    _Atomic uint64_t *written; // blocks that the guest changes (vmm/disk.h); NULL: nobody asks
    _Atomic uint64_t *since;   // blocks changed since it came here by move `since_id`, or NULL
    uint8_t since_id[DISK_ID_LEN];
    uint8_t kept_id[DISK_ID_LEN]; // the image is what left by this move, and is brought up to date
    bool made, filling, kept;     // the image, by us, when the guest's was to come into it
    uint8_t flush_failed;         // the engine's, in saved state
    uint32_t touched;             // queues with answers not yet signalled, a bit each
    uint8_t serial[BLK_SERIAL_MAX];
    struct {
        uint64_t reads, writes, flushes, discards, read_bytes, written_bytes, errors;
    } count;
    struct histogram latency[BLK_LATENCIES]; // from its queue until its answer, by what it was
};

static inline struct virtio_blk *blk_of(struct virtio *v)
{
    return container_of(v, struct virtio_blk, v);
}

static inline struct virtio_blk *blk_of_device(struct device *dev)
{
    return container_of(dev, struct virtio_blk, v.dev);
}

static inline bool has_overlay(const struct virtio_blk *b)
{
    return *b->config.overlay;
}

static inline struct blk_image *written_image(struct virtio_blk *b)
{
    return has_overlay(b) ? &b->overlay.file : &b->image;
}

extern const struct virtio_ops blk_ops;
void blk_request_done(struct blk_engine *e, struct blk_request *r, int error); // of the engine
void blk_completed(struct virtio *v, struct virtio_bell *bell);
void blk_timer_fired(struct virtio *v, struct virtio_bell *bell);
void blk_answer(struct virtio_blk *b);        // submits; signals the queues that have answers
void blk_waiting_clear(struct virtio_blk *b); // of none, at first
void blk_waiting_run(struct virtio_blk *b);   // those that find tokens now
void blk_request_free(struct virtio_blk *b, struct blk_request *r);
void blk_request_skip(struct virtio_blk *b, struct blk_request *r); // answers it: all is well

void blk_written(struct virtio_blk *b, const struct blk_request *r); // notes what it changed
void blk_since_drop(struct virtio_blk *b);

// Blocks that are still elsewhere (virtio_blk_absent.c). admit: whether the request may start now;
// what may not is parked, or answered.
bool blk_absent_admit(struct virtio_blk *b, struct blk_request *r);
void blk_parked_run(struct virtio_blk *b, unsigned queue); // those that may start now
uint64_t blk_absent_left(struct virtio_blk *b);            // blocks

extern const struct disk_ops blk_disk_ops;
// Calls of it that virtio_blk_frozen.c has (vmm/disk.h).
bool blk_is_overlay(struct device *dev, const char *path);
void blk_settle(struct device *dev);
int blk_freeze(struct device *dev, int to, struct blk_frozen **f, struct error *err);
void blk_freeze_end(struct device *dev, struct blk_frozen *f);
// And virtio_blk_absent.c.
int blk_lack(struct device *dev, uint64_t *missing, int wake_fd, struct error *err);
unsigned blk_wanted(struct device *dev, uint64_t *blocks, unsigned max, bool again);
bool blk_fill_begin(struct device *dev, uint64_t block);
void blk_fill_end(struct device *dev, uint64_t block, bool written);
uint64_t blk_missing(struct device *dev, uint64_t *copy);
void blk_lack_end(struct device *dev);

void blk_space_capacity(struct virtio_blk *b); // config space says b->capacity

void blk_show(struct device *dev, json_t *out);
int blk_set(struct device *dev, const char *key, const char *value, struct error *err);
