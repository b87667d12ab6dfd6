// SPDX-License-Identifier: Apache-2.0
// The source's side of one migration, shared by outgoing.c, precopy.c and postcopy_source.c.
#pragma once

#include "migrate/blockmove.h"
#include "migrate/channel.h"
#include "migrate/migrate.h"
#include "migrate/pages.h"
#include "migrate/squeeze.h"
#include "migrate/throttle.h"
#include "vmm/stream.h"
#include "vmm/vm.h"

struct postcopy_source;
struct streams_source;

struct outgoing {
    struct vm *vm;
    const struct migrate_params *params;
    struct migration *m;
    struct migrate_report *report;
    struct channel main, demand; // fd -1 when closed
    struct wire_record record;
    enum owner_source owner;
    bool was_running; // the guest ran before the switch
    bool prepared;    // the destination has been told to load it, and may have
    bool logging;     // `dirty` is started
    bool main_lost;   // was shut down; closed at the end
    struct ram_dirty dirty;
    uint64_t *todo; // pages still to send
    struct page_batch *batch;
    struct packer packer;
    struct throttle throttle;
    uint64_t write_bytes, write_ns; // lately: what writing to the link costs
    struct page_presence presence;
    _Atomic uint64_t *hints; // NULL unless the guest gave some
    bool hinting;            // it may give more
    struct squeeze squeeze;
    unsigned version;   // of the format, agreed on
    uint64_t bandwidth; // estimate, bytes of guest memory/s
    uint64_t rtt_ns;    // the shortest so far
    uint64_t before;    // dirty bytes after the round before the last
    uint32_t within;    // rounds after which the rest fitted the downtime limit
    uint64_t round_start_ns, round_start_bytes; // of the wire; round_bytes are to be sent
    uint64_t round_bytes, round_start_pages, dirty_rate;
    struct stream_mem state;
    struct streams_source *streams; // NULL: pages go over the main connection
    struct page_shard shard;        // one of the streams: what it sends; tells its pages here
    _Atomic uint64_t *taken;
    struct postcopy_source *postcopy; // NULL unless the switch is a post-copy
    struct block_move *disks;         // NULL unless they go with the guest
};

// A round begins: `bytes` of guest memory are to be sent.
void outgoing_round(struct outgoing *out, uint64_t bytes);
void outgoing_progress(struct outgoing *out, enum migrate_phase phase, uint64_t remaining);
// Error -ECANCELED when the user has cancelled.
int outgoing_check_cancel(struct outgoing *out, struct error *err);

// Sends what `todo` has, in one pass upwards. Paces progress reports.
int precopy_pass(struct outgoing *out, struct error *err);
// Waits until the destination has dealt with all that was sent.
int precopy_flush(struct outgoing *out, struct error *err);
// Rounds until the guest may be stopped. `*postcopy` says how the switch is to be done.
int precopy_rounds(struct outgoing *out, bool *postcopy, struct error *err);

// Several page connections (migrate/streams_source.c). How many this migration has: 0, or 2 and
// more.
unsigned outgoing_streams(const struct outgoing *out);
int streams_open(struct outgoing *out, struct error *err);
void streams_close(struct outgoing *out); // harmless when there are none
// precopy_pass over all of them. Nothing of `todo` or of guest memory is touched when it returns.
int streams_pass(struct outgoing *out, struct error *err);
uint32_t streams_passes(const struct outgoing *out); // so far
// What went over the main and the page connections so far.
uint64_t outgoing_bytes(const struct outgoing *out);

// Disks that go with the guest (params->disks); without, these do nothing. disks_first: passes over
// them until little is left. disks_pass: one, after which the guest, if it is paused, has none
// left.
int disks_begin(struct outgoing *out, struct error *err);
int disks_agree(struct outgoing *out, struct error *err); // hears what the destination has
int disks_first(struct outgoing *out, struct error *err);
int disks_pass(struct outgoing *out, struct error *err);
// Whether the guest may run there before its disks are there (migrate/blockpost.h).
bool disks_late(const struct outgoing *out, bool postcopy);
// At such a switch, instead of disks_pass: what is missing there. *any: something is.
int disks_say(struct outgoing *out, bool *any, struct error *err);
// What the destination says, when a broken post-copy goes on.
int disks_hear(struct outgoing *out, struct error *err);
uint64_t disks_left(const struct outgoing *out); // bytes
void disks_gone(struct outgoing *out);           // the guest is the destination's
void disks_end(struct outgoing *out);

// No hints of free pages count any more. Harmless when none were asked for.
void precopy_hints_end(struct outgoing *out);

// Tells the destination that its copies of the pages in `todo` are stale.
int postcopy_discard(struct outgoing *out, struct error *err);
// Starts to serve page requests for what `todo` has.
int postcopy_serve(struct outgoing *out, struct error *err);
// The guest is paused and `todo` has what the destination lacks: says so (DISCARD) and starts to
// serve its page requests.
int postcopy_begin(struct outgoing *out, struct error *err);
// The guest runs there: pushes everything and waits until the destination has it all.
int postcopy_push(struct outgoing *out, struct error *err);
// Stops serving. Harmless when nothing was begun.
void postcopy_end(struct outgoing *out);
