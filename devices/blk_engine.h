// SPDX-License-Identifier: Apache-2.0
// What carries out a disk's requests: an io_uring over an image, with or without an overlay on it.
// virtio_blk.c knows the guest's side, this knows the host's.
//
// A request is a sequence of pieces, one under way at a time: what a short transfer left, the runs
// of clusters that the overlay has or has not, the copies before a first write to a part of a
// cluster, the steps of a flush. Aligned pieces go past the page cache (O_DIRECT).
//
// Copies. A write (or zeroes) that covers a cluster of the base in part first copies the rest of
// it. No other change of that cluster is under way then: such requests wait for each other.
//
// Flush. A write that was answered is durable once a flush that came later was answered with
// success. When one has failed, the kernel may have dropped what was not written: every later one
// fails, too. Over an overlay one flush runs at a time, and those that came meanwhile share the
// next.
//
// Threads: none of its own. The device's lock is held around every call, whatever the thread.
#pragma once

#include <liburing.h>
#include <stdbool.h>
#include <stdint.h>

#include "devices/blk_frozen.h"
#include "devices/blk_image.h"
#include "devices/blk_overlay.h"
#include "devices/virtqueue.h"

enum blk_op { BLK_READ, BLK_WRITE, BLK_FLUSH, BLK_DISCARD, BLK_ZERO };

enum {
    BLK_RANGES_MAX = 16,    // of a discard or zeroes
    BLK_ZEROES = 64 * 1024, // bytes of zeroes that writes repeat where holes cannot be punched
    BLK_FILES = 4,
};

struct blk_range {
    uint64_t offset, len; // bytes of the disk
    bool unmap;           // of zeroes: may give the space back
};

struct blk_piece {
    enum { PIECE_READ, PIECE_WRITE, PIECE_SYNC, PIECE_FALLOCATE } kind;
    unsigned file; // FILE_...
    bool direct;
    uint64_t offset, len; // in that file
    uint8_t *buffer;      // NULL: the chain's memory
};

struct blk_request {
    // The device's.
    struct blk_request *next; // the engine uses it from blk_start until `done`
    struct virtqueue_chain chain;
    unsigned queue;
    uint64_t taken_ns; // from its queue
    uint32_t type;     // as the driver named it
    enum blk_op op;
    uint32_t from;      // where the data begins in its part of the chain
    unsigned nr_ranges; // read, write: 1; flush: 0
    struct blk_range ranges[BLK_RANGES_MAX];
    bool fills; // blocks that were missing (devices/blk_absent.h)

    // The engine's.
    struct blk_piece piece;
    unsigned range; // the current one
    uint64_t done;  // bytes of it
    bool cautious;  // no O_DIRECT any more
    bool by_hand;   // zeroes are written
    unsigned flush_step;
    struct blk_request *group;   // flush: those that are answered with it
    struct blk_request *waiters; // for the clusters of this one
    struct blk_request *prev_change, *next_change;
    struct { // parts of clusters to copy from the base
        uint64_t offset;
        uint32_t len;
    } copies[2];
    unsigned nr_copies, copy;
    uint32_t copy_done;
    bool copy_back; // has been read, is being written
    uint8_t *bounce;
    unsigned nr_iov;
    struct iovec iov[VQ_SEGMENTS_MAX];
};

struct blk_engine {
    struct io_uring ring;
    bool ring_up;
    int event_fd;                // the owner's: announces completions
    struct blk_image *top;       // what is written
    struct blk_overlay *overlay; // NULL: `top` is the disk
    uint64_t shift;              // of the disk's byte 0 in `top`
    unsigned in_flight;          // requests between blk_start and `done`
    unsigned unanswered;         // of which the kernel has
    uint8_t flush_failed;        // see above
    bool unflushed;              // something was written since the last flush began
    bool flushing;
    struct blk_request *flush_waits;
    struct blk_request *changes; // under way, where there is an overlay
    unsigned copying;            // of which copy
    struct blk_frozen *frozen;   // is copied as it was: told before each change; or NULL
    void (*done)(struct blk_engine *e, struct blk_request *r, int error); // 0 or -errno
};

// `overlay` may be NULL; `top` is its file if it is not. `depth`: requests at a time. The ring's
// completions are announced at `event_fd`.
int blk_engine_create(struct blk_engine *e, struct blk_image *top, struct blk_overlay *overlay,
                      unsigned depth, int event_fd, struct error *err);
// Whatever the kernel still has is left to it: then an overlay's table must not be freed.
void blk_engine_destroy(struct blk_engine *e);

void blk_start(struct blk_engine *e, struct blk_request *r);
void blk_submit(struct blk_engine *e); // what was started; and takes what is done
void blk_reap(struct blk_engine *e);
// Submits, and waits until nothing is in flight, at most so long. Whether nothing is.
bool blk_wait(struct blk_engine *e, unsigned ms);
// With nothing in flight: what was answered is durable.
int blk_engine_sync(struct blk_engine *e, struct error *err);
