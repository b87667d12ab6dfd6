// SPDX-License-Identifier: Apache-2.0
// Blocks after the guest: in post-copy its disks (migrate/blockmove.h) need not be there before it
// runs. At the switch the destination hears which blocks it lacks; the source, whose guest stands
// still and whose images nobody writes, pushes them behind the pages, and first those that are
// asked for.
//
//   source                                                   destination
//     | ABSENT ... PREPARE(blocks) -------------------------> | a map in each device
//     | COMMIT ---------------------------------------------> | = guest runs =
//     | <------------------------------------- demand: ASK    | a request waits for a block
//     | demand: LATE ---------------------------------------> | it goes on
//     | LATE, ROUND ... (pushed) ---------------------------> |
//     | END ------------------------------------------------> | all here, synced
//     | <-------------------------------------------- COMPLETE|
//
// A block is sent once: it is claimed in block_disk.todo under the source's lock. What the guest
// has written anew meanwhile is dropped at the destination (vmm/disk.h, fill_begin). When the link
// breaks the destination says what is missing, ABSENT again, and todo is that. Overlays do not take
// part: with one of them everything is sent before the switch.
#pragma once

#include "migrate/blockmove.h"

// --- the source

struct block_claim { // blocks [first, first + nr)
    unsigned disk, nr;
    uint64_t first;
};

// With the guest paused: what is not there, as ABSENT records; *nr blocks, 0: none were written.
int block_post_say(struct block_move *bm, struct wire *w, uint64_t *nr, struct error *err);
// The destination's word about that, into todo.
int block_post_hear(struct block_move *bm, const struct wire_record *record, struct error *err);
// The next of what is left, from the last one that was asked for on; false: nothing is left. These
// two under the caller's lock.
bool block_post_next(struct block_move *bm, unsigned max, struct block_claim *claim);
bool block_post_asked(struct block_move *bm, unsigned disk, uint64_t block); // it is the caller's
// Copies the blocks out (room for WIRE_WANT_MAX): they exist.
int block_post_ask_parse(const struct block_move *bm, const struct wire_record *record,
                         unsigned *disk, uint64_t *blocks, unsigned *nr, struct error *err);
// A LATE record of what was claimed, at most WIRE_LATE_MAX blocks. Any thread; `buffer` has
// WIRE_BLOCKS_DATA bytes and is aligned to DISK_UNIT.
int block_post_put(struct block_move *bm, struct wire *w, const struct block_claim *claim,
                   uint8_t *buffer, struct error *err);

// --- the destination

// An ABSENT record, before the guest is loaded.
int block_late_absent(struct block_intake *in, const struct wire_record *record, struct error *err);
// From here on the devices know what is missing, as ABSENT has said.
int block_late_begin(struct block_intake *in, struct error *err);
// Nobody brings anything any more. Before the VM goes; harmless without begin.
void block_late_end(struct block_intake *in);
// Readable when there is something to ask for, and when nothing is missing any more; -1 without.
int block_late_fd(const struct block_intake *in);
// Asks for what the guest waits for; `again`: also for what the source was asked for before.
int block_late_ask(struct block_intake *in, struct wire *w, bool again, struct error *err);
// A LATE record whose data is unread; `buffer` has WIRE_BLOCKS_DATA bytes. Any thread.
int block_late_take(struct block_intake *in, struct wire *w, const struct wire_record *record,
                    uint8_t *buffer, struct error *err);
// What came is durable. An error stays: the images then are not whole, and missing is not 0.
int block_late_sync(struct block_intake *in, struct error *err);
uint64_t block_late_missing(struct block_intake *in);                           // blocks
int block_late_say(struct block_intake *in, struct wire *w, struct error *err); // as ABSENT records
