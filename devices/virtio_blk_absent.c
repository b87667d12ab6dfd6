// SPDX-License-Identifier: Apache-2.0
// A disk whose guest runs here before all of its blocks do (devices/blk_absent.h): requests that
// need one are parked beside the queues, and start from their queue's doorbell when it is here.
#include <errno.h>
#include <stdlib.h>

#include "devices/virtio_blk_parts.h"
#include "vmm/vm.h"

static bool verdict_obey(struct virtio_blk *b, struct blk_request *r,
                         enum blk_absent_verdict verdict)
{
    if (verdict == BLK_ABSENT_SKIP)
        blk_request_skip(b, r);
    r->fills = verdict == BLK_ABSENT_FILL;
    return verdict != BLK_ABSENT_SKIP;
}

bool blk_absent_admit(struct virtio_blk *b, struct blk_request *r)
{
    enum blk_absent_verdict verdict = blk_absent_look(b->absent, r);
    if (verdict != BLK_ABSENT_PARK)
        return verdict_obey(b, r, verdict);
    struct blk_request **tail = &b->parked;
    while (*tail)
        tail = &(*tail)->next;
    r->next = NULL;
    *tail = r;
    return false;
}

void blk_parked_run(struct virtio_blk *b, unsigned queue)
{
    bool more = false;
    for (struct blk_request **at = &b->parked; *at;) {
        struct blk_request *r = *at;
        enum blk_absent_verdict verdict =
            r->queue == queue ? blk_absent_look(b->absent, r) : BLK_ABSENT_PARK;
        if (verdict == BLK_ABSENT_PARK) {
            more |= r->queue == queue;
            at = &r->next;
            continue;
        }
        *at = r->next;
        if (verdict_obey(b, r, verdict))
            blk_start(&b->engine, r);
    }
    if (!more)
        blk_absent_unpark(b->absent, queue);
}

uint64_t blk_absent_left(struct virtio_blk *b)
{
    return b->absent ? blk_absent_missing(b->absent, NULL) : 0;
}

// --- vmm/disk.h; without the device's lock, which may be held for as long as a page is missing

static void ring(void *arg, unsigned queue)
{
    virtio_ring(arg, queue);
}

int blk_lack(struct device *dev, uint64_t *missing, int wake_fd, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    struct blk_absent *a = has_overlay(b) || b->absent
                               ? NULL
                               : blk_absent_create(missing, b->capacity, wake_fd, ring, &b->v);
    if (!a) {
        free(missing);
        return has_overlay(b) || b->absent
                   ? error_set(err, -EINVAL, "disk%u: an overlay: its blocks cannot come later",
                               dev->instance)
                   : error_set(err, -ENOMEM, "no memory for a map of blocks");
    }
    b->absent = a; // before the guest is loaded: nobody looks
    return 0;
}

unsigned blk_wanted(struct device *dev, uint64_t *blocks, unsigned max, bool again)
{
    struct virtio_blk *b = blk_of_device(dev);
    if (again)
        blk_absent_again(b->absent);
    return blk_absent_wanted(b->absent, blocks, max);
}

bool blk_fill_begin(struct device *dev, uint64_t block)
{
    struct virtio_blk *b = blk_of_device(dev);
    return b->absent && blk_absent_fill_begin(b->absent, block);
}

void blk_fill_end(struct device *dev, uint64_t block, bool written)
{
    blk_absent_fill_end(blk_of_device(dev)->absent, block, written);
}

uint64_t blk_missing(struct device *dev, uint64_t *copy)
{
    struct virtio_blk *b = blk_of_device(dev);
    return b->absent ? blk_absent_missing(b->absent, copy) : 0;
}

// What has come stays as it is; the map goes with the device. Nobody is asked any more.
void blk_lack_end(struct device *dev)
{
    struct virtio_blk *b = blk_of_device(dev);
    if (b->absent)
        blk_absent_wake_fd(b->absent, -1);
}
