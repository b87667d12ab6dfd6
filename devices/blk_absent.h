// SPDX-License-Identifier: Apache-2.0
// Blocks (DISK_BLOCK bytes) of a disk that are still at the host its guest came from, while the
// guest runs here: which a request waits for, and who brings one.
//
//   missing --fill_begin--> being filled --fill_end(done)--> here, for ever
//      ^                          |
//      +-------fill_end(not)------+
//
// A block is filled by one at a time: by the receiver, with what the source sends, or by a request
// of the guest that writes all of it. What the source sends of a block that is here, or is just
// being filled, is dropped: so nothing old ever comes after something new. Whoever else needs a
// missing block is parked until it is here.
//
// Threads. Any, with a lock of its own, which nobody holds while they touch guest memory: whoever
// takes pages from the link needs it, and a device may hold its lock while it waits for a page.
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct blk_absent;
struct blk_request;

enum blk_absent_verdict {
    BLK_ABSENT_GO,   // it touches nothing that is missing
    BLK_ABSENT_FILL, // it fills what is missing of it: blk_absent_done follows
    BLK_ABSENT_SKIP, // a discard of what is missing: a hint that is not followed
    BLK_ABSENT_PARK, // not now: its queue will be told
};

// `missing`: a bit for each block of a disk of `size` bytes, malloc'd and taken over. An eventfd
// `wake_fd` is written to when there is something to ask the source for, and when nothing is
// missing any more. `ring` is called, without the lock, for a queue whose parked requests may go
// on. NULL: no memory.
struct blk_absent *blk_absent_create(uint64_t *missing, uint64_t size, int wake_fd,
                                     void (*ring)(void *arg, unsigned queue), void *arg);
void blk_absent_free(struct blk_absent *a); // NULL is fine

// A request that is about to start, or to go on; it stays parked in its queue's name until
// blk_absent_unpark.
enum blk_absent_verdict blk_absent_look(struct blk_absent *a, const struct blk_request *r);
void blk_absent_unpark(struct blk_absent *a, unsigned queue); // nobody of it is parked any more
// A request that filled has ended.
void blk_absent_done(struct blk_absent *a, const struct blk_request *r, bool written);

// The receiver's side. fill_begin: whether the block is missing and ours to fill.
bool blk_absent_fill_begin(struct blk_absent *a, uint64_t block);
void blk_absent_fill_end(struct blk_absent *a, uint64_t block, bool written);
// Blocks that are waited for and were not named before, at most `max`.
unsigned blk_absent_wanted(struct blk_absent *a, uint64_t *blocks, unsigned max);
void blk_absent_again(struct blk_absent *a);           // they are to be named once more
void blk_absent_wake_fd(struct blk_absent *a, int fd); // another one; -1: nobody can be asked
// How many are missing; `copy`, if not NULL, gets their bits.
uint64_t blk_absent_missing(struct blk_absent *a, uint64_t *copy);
