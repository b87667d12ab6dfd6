// SPDX-License-Identifier: Apache-2.0
// The disks of a guest that go with it: which blocks are still to be sent, as records, and back
// into the images of the destination. Whole images, and what an overlay has; disks that are only
// read stay where they are.
//
//   source                                                   destination
//     | MACHINE with WIRE_MACHINE_DISKS, DISKS ---------------> | empty images of that size
//     | <------------------------------------------- KEPT, READY|
//     | BLOCKS ..., ROUND ------------------------------------> | writes; syncs
//     | <------------------------------------------------- ROUND|
//     | the same with what the guest has written meanwhile, until it is little;
//     | then as often as memory is sent, and once more when the guest is paused
//
// A block (DISK_BLOCK bytes) is sent when it is not a hole at first, or was written since it was
// last read. The device sets its bit after the write, before the guest hears of it; here the bit is
// cleared before the block is read: what is read too early comes again. Zeroes cost a few bytes,
// or nothing where the destination has never had anything else.
//
// A disk that came here by a move, and goes back to where it came from, is still there as it was
// then (KEPT): only what has changed since is sent.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "migrate/wire.h"
#include "vmm/disk.h"
#include "vmm/error.h"

struct vm;

struct block_disk {
    struct device *dev;
    const struct disk_ops *ops;
    struct disk_info info;
    uint64_t nr;               // blocks
    _Atomic uint64_t *written; // by the device, from block_move_create on
    uint64_t *todo;            // still to be sent
    uint64_t *sent;            // blocks where the destination may have something
    bool watched;
};

struct block_move {
    struct block_disk disks[WIRE_DISKS_MAX];
    unsigned nr;
    unsigned disk; // of the pass
    uint64_t next; // its block
    uint8_t *buffer;
    uint64_t total_bytes;                    // of all disks
    _Atomic uint64_t data_bytes, zero_bytes; // sent
    unsigned passes;                         // begun
    unsigned kept;                           // disks of which only changes are sent
    bool late; // the guest may run there before all is sent (migrate/blockpost.h)
};

uint64_t block_len(const struct block_disk *d, uint64_t block); // bytes; the last may have fewer
bool block_zero(const uint8_t *data, size_t len);

// From here on what the guest writes is noted. -ENOENT: it has no disk that could move.
int block_move_create(struct block_move **bm, struct vm *vm, struct error *err);
void block_move_free(struct block_move *bm); // NULL is fine
int block_move_describe(struct block_move *bm, struct wire *w, struct error *err);
// The answer to that: what the first pass is to send.
int block_move_start(struct block_move *bm, const struct wire_record *kept, struct error *err);
// The guest runs at the destination.
void block_move_left(struct block_move *bm, const uint8_t id[WIRE_ID_LEN]);

// What the guest has written is to be sent.
void block_move_collect(struct block_move *bm);
// A pass goes once over everything that is to be sent now.
void block_move_pass(struct block_move *bm);
// The next record of the pass, of at most `max` bytes of data, but one block; *more: there may be
// another. Writes none when there was nothing to send.
int block_move_record(struct block_move *bm, struct wire *w, uint64_t max, bool *more,
                      struct error *err);
// Bytes that a pass would begin with now, at most.
uint64_t block_move_todo(const struct block_move *bm);

// --- the destination

struct block_intake {
    struct block_disk disks[WIRE_DISKS_MAX]; // only dev, ops, info and nr; todo: what ABSENT says
    unsigned nr;
    uint8_t *buffer;
    uint64_t unsynced; // bytes
    uint32_t kept;     // a bit for each disk whose image was here
    uint64_t data_bytes, zero_bytes;
    // Blocks that come after the guest (migrate/blockpost.h).
    bool late;
    int wake_fd;                    // while `late`
    uint32_t lacking;               // a bit for each disk that had some missing
    _Atomic uint64_t late_unsynced; // bytes
    atomic_bool late_failed;        // to sync
};

// The DISKS record: the VM's images are empty and as large as those that come.
int block_intake_disks(struct block_intake *in, struct vm *vm, const struct wire_record *record,
                       struct error *err);
// Whether its disks can come after the guest.
bool block_intake_may_lack(const struct block_intake *in);
// Says which images were here already, and that.
int block_intake_kept(const struct block_intake *in, struct wire *w, struct error *err);
// A BLOCKS record, with its data.
int block_intake_record(struct block_intake *in, struct wire *w, const struct wire_record *record,
                        struct error *err);
int block_intake_sync(struct block_intake *in, struct error *err); // all that came is durable
// The guest is about to run here.
void block_intake_arrived(struct block_intake *in, const uint8_t id[WIRE_ID_LEN]);
// The guest will not run here. Also for images that nothing came into.
void block_intake_forget(struct vm *vm);
void block_intake_free(struct block_intake *in);
