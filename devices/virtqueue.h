// SPDX-License-Identifier: Apache-2.0
// The device's side of a virtqueue (virtio 1.2, sections 2.7 split and 2.8 packed ring): one
// interface for both formats.
//
// Everything in the rings is written by a driver that may be hostile. So
//  - ring addresses are checked as whole ranges when the queue is enabled, and never again change;
//  - a descriptor is copied once into private memory, and only the copy is looked at;
//  - a walk is bounded by the size of the table it goes through;
//  - no more chains are in flight than the ring has room for;
//  - the first violation latches `broken`: the queue then reports itself empty until it is reset.
//
// No lock and no thread of its own: the device's lock is held around every call. What the device
// writes (rings, buffers) is reported to ram_mark_dirty.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "vmm/error.h"
#include "vmm/ram.h"
#include "vmm/stream.h"

enum {
    VQ_SIZE_MAX = 256,     // entries of a ring
    VQ_SEGMENTS_MAX = 256, // buffers of a chain, and entries of an indirect table
};

// One buffer of the driver: first the segments that the device reads, then those it writes.
// It belongs to the queue's list of what is in flight from virtqueue_next to virtqueue_push.
struct virtqueue_chain {
    struct virtqueue_chain *next, *prev;
    uint16_t id;              // split: index of the head descriptor; packed: buffer id
    uint16_t slots;           // entries of a packed ring that it takes; 1 in a split ring
    uint16_t nr_out;          // segments that the device reads: iov[0 .. nr_out-1]
    uint16_t nr_in;           // segments that the device writes: iov[nr_out ...]
    uint64_t out_len, in_len; // bytes
    uint64_t gpa[VQ_SEGMENTS_MAX];
    struct iovec iov[VQ_SEGMENTS_MAX];
};

struct virtqueue_replay; // requests that came with saved state

struct virtqueue {
    struct ram *ram;
    uint16_t size_max; // what the device offers; also the size after reset
    // What the driver sets before it enables the queue.
    uint16_t size;                    // entries
    uint64_t desc_gpa;                // descriptor table or descriptor ring
    uint64_t driver_gpa;              // available ring or driver event suppression
    uint64_t device_gpa;              // used ring or device event suppression
    bool packed, event_idx, indirect; // as negotiated
    bool enabled, broken;

    uint8_t *desc, *driver, *device; // host addresses while enabled
    uint16_t next_avail, next_used;  // split: free-running; packed: 0 .. size-1
    bool avail_wrap, used_wrap;      // packed
    uint16_t in_flight;              // ring entries taken and not yet given back
    uint16_t unsignalled;            // ring entries given back since the driver was last told
    bool signal_always; // the next push is told whatever the driver said (fresh, or loaded)
    uint64_t heads[VQ_SIZE_MAX / 64]; // split: heads in flight
    struct virtqueue_chain *first, *last;
    struct virtqueue_replay *replay;
};

void virtqueue_init(struct virtqueue *vq, struct ram *ram, uint16_t size_max);
// Back to what virtqueue_init made. Chains in flight are forgotten: the device has ended them.
void virtqueue_reset(struct virtqueue *vq);

// Checks size and addresses and maps the rings. -EINVAL or -EFAULT: the queue stays disabled.
int virtqueue_enable(struct virtqueue *vq, struct error *err);

// Takes the next chain. 1, 0 when there is none (or the queue is disabled or broken), or -EBADMSG:
// the driver broke a rule, `err` says which, and the queue is broken from now on.
int virtqueue_next(struct virtqueue *vq, struct virtqueue_chain *chain, struct error *err);

// Gives a chain back; the device wrote the first `written` bytes of its writable part.
void virtqueue_push(struct virtqueue *vq, struct virtqueue_chain *chain, uint32_t written);

struct virtqueue_used {
    struct virtqueue_chain *chain;
    uint32_t written;
};

// Gives several back in this order, and the driver sees all of them or none: what one packet took
// (5.1.6.4.1). `nr` is at most the ring's size.
void virtqueue_push_group(struct virtqueue *vq, const struct virtqueue_used *group, unsigned nr);

// Whether the driver wants an interrupt for what was pushed since the last true answer.
bool virtqueue_should_signal(struct virtqueue *vq);

// Asks the driver for doorbells, or to spare them. After turning them on: true when there is
// something to take that no doorbell may announce.
bool virtqueue_kicks(struct virtqueue *vq, bool on);
bool virtqueue_waiting(struct virtqueue *vq); // is there something to take?

// Copies out of the readable, into the writable part; bytes copied, fewer where the part ends.
size_t chain_read(const struct virtqueue_chain *chain, uint64_t from, void *data, size_t len);
size_t chain_write(struct ram *ram, const struct virtqueue_chain *chain, uint64_t from,
                   const void *data, size_t len);
// The segments of [from, from+len) of one part, which must lie within it; returns their number.
unsigned chain_slice(const struct virtqueue_chain *chain, bool in, uint64_t from, uint64_t len,
                     struct iovec iov[VQ_SEGMENTS_MAX]);
// For writers that do not use chain_write: [from, from+len) of the writable part was written.
void chain_mark_dirty(struct ram *ram, const struct virtqueue_chain *chain, uint64_t from,
                      uint64_t len);

// The queue with the chains in flight. After a load virtqueue_next gives those again first, each
// once, from the copies that were saved: the driver may have reused a packed ring's descriptors.
int virtqueue_save(const struct virtqueue *vq, struct stream *out, struct error *err);
// `packed`, `event_idx` and `indirect` are set before; the rest is hostile. On error the queue is
// as after virtqueue_reset.
int virtqueue_load(struct virtqueue *vq, struct stream *in, struct error *err);
