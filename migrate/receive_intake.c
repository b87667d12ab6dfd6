// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <string.h>

#include "migrate/blockpost.h"
#include "migrate/crc32c.h"
#include "migrate/landing.h"
#include "migrate/receive_internal.h"
#include "vmm/bitmap.h"
#include "vmm/stream.h"

static int expect_streams(struct receive *r, struct error *err)
{
    struct streams_dest *streams;
    if (r->version < 2)
        return error_set(err, -EPROTO, "machine record: version 1 has no page connections");
    int ret = streams_dest_create(&streams, r->machine.streams, &r->intake, &r->main,
                                  r->params.idle_ms, err);
    if (ret)
        return ret;
    pthread_mutex_lock(&r->lock);
    r->streams = streams;
    pthread_mutex_unlock(&r->lock);
    return 0;
}

static int take_disks(struct receive *r, struct error *err)
{
    int ret = wire_expect(&r->main.wire, &r->record, WIRE_DISKS, err);
    if (!ret)
        ret = block_intake_disks(&r->disks, r->vm, &r->record, err);
    return ret ? ret : block_intake_kept(&r->disks, &r->main.wire, err);
}

int receive_take_machine(struct receive *r, struct error *err)
{
    struct machine machine;
    int ret = wire_expect(&r->main.wire, &r->record, WIRE_MACHINE, err);
    if (!ret)
        ret = machine_parse(&r->record, &machine, err);
    if (ret)
        return ret;
    pthread_mutex_lock(&r->lock); // the door looks at the flags
    r->machine = machine;
    pthread_mutex_unlock(&r->lock);
    if (r->params.ram_max && machine.ram_size > r->params.ram_max)
        return error_set(err, -E2BIG, "a guest of %llu MiB: this receiver takes at most %llu MiB",
                         (unsigned long long)(machine.ram_size / MiB),
                         (unsigned long long)(r->params.ram_max / MiB));
    ret = machine_build(&r->machine, r->hooks, &r->vm, err);
    if (!ret && machine.flags & WIRE_MACHINE_DISKS)
        ret = take_disks(r, err);
    if (!ret)
        ret = page_intake_init(&r->intake, &r->vm->ram, err);
    if (!ret && machine.flags & WIRE_MACHINE_POSTCOPY) {
        ret = landing_possible(&r->vm->ram, err); // better now than at the switch
        r->stale = calloc(ram_bitmap_words(&r->vm->ram), 8);
        r->buffer = malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
        if (!ret && (!r->stale || !r->buffer))
            ret = error_set(err, -ENOMEM, "no memory for post-copy");
    }
    if (!ret && machine.streams)
        ret = expect_streams(r, err);
    r->main.timeout_ms = r->params.idle_ms;
    return ret ? ret : wire_put(&r->main.wire, WIRE_READY, 0, NULL, 0, NULL, 0, err);
}

static int take_state(struct receive *r, struct error *err)
{
    struct wire_state head;
    wire_fixed(&r->record, &head, sizeof(head));
    if (head.len != r->record.header.data_len || r->state)
        return error_set(err, -EPROTO, "state record: %u bytes, header says %u%s", head.len,
                         r->record.header.data_len, r->state ? "; it comes twice" : "");
    r->state = malloc(head.len ? head.len : 1);
    if (!r->state)
        return error_set(err, -ENOMEM, "no memory for %u bytes of state", head.len);
    r->state_len = head.len;
    int ret = wire_read(&r->main.wire, r->state, head.len, err);
    if (!ret && crc32c(0, r->state, head.len) != head.crc)
        ret = error_set(err, -EBADMSG, "%s at byte %llu: guest state damaged on the way",
                        r->main.wire.name, (unsigned long long)r->record.offset);
    return ret;
}

int receive_echo_round(struct receive *r, struct error *err)
{
    struct wire_round round;
    wire_fixed(&r->record, &round, sizeof(round));
    int ret = r->streams && !r->postcopy ? streams_dest_wait(r->streams, round.pass, err) : 0;
    if (!ret)
        ret = block_intake_sync(&r->disks, err);
    return ret ? ret : wire_put(&r->main.wire, WIRE_ROUND, 0, &round, sizeof(round), NULL, 0, err);
}

// Gives stale pages back at once: that takes long, and the guest may still be running over there.
static int take_discard(struct receive *r, struct error *err)
{
    struct ram *ram = &r->vm->ram;
    if (!r->stale)
        return wire_unexpected(&r->main.wire, &r->record, "pages", err);
    int ret = wire_discard_parse(&r->record, ram->pages, r->stale, err);
    if (r->streams)
        streams_dest_hold(r->streams);
    for (uint64_t first = 0; !ret;) {
        first = bitmap_find(r->stale, ram->pages, first, true);
        if (first == ram->pages)
            break;
        uint64_t end = bitmap_find(r->stale, ram->pages, first, false);
        // Zero pages never were placed.
        first = bitmap_find(r->intake.touched, end, first, true);
        uint64_t stop = bitmap_find(r->intake.touched, end, first, false);
        if (first < stop)
            ret = ram_drop(ram, first, stop - first, err);
        bitmap_fill(r->intake.touched, first, stop - first, false);
        first = stop;
    }
    if (r->streams)
        streams_dest_go_on(r->streams);
    return ret;
}

static int take_packed(struct receive *r, struct error *err)
{
    if (r->version < 2 || r->streams || r->machine.flags & WIRE_MACHINE_SHARED)
        return wire_unexpected(&r->main.wire, &r->record, "pages", err);
    if (!r->buffer)
        r->buffer = malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
    if (!r->buffer)
        return error_set(err, -ENOMEM, "no memory to unpack pages");
    return page_intake_packed(&r->intake, &r->main.wire, &r->record, r->buffer, err);
}

// The same host: the guest's memory itself. It goes on running over there until the switch, so
// nothing here looks at it before.
static int take_handed(struct receive *r, struct error *err)
{
    struct wire_memory memory;
    struct ram *ram = &r->vm->ram;
    wire_fixed(&r->record, &memory, sizeof(memory));
    if (!(r->machine.flags & WIRE_MACHINE_SHARED) || r->intake.nr_seen)
        return wire_unexpected(&r->main.wire, &r->record, "pages", err);
    autoclose int fd = -1;
    int ret = channel_recv_fd(&r->main, &fd, err);
    if (!ret && memory.size != ram->size)
        ret = error_set(err, -EPROTO, "memory record: %llu bytes, the guest has %llu",
                        (unsigned long long)memory.size, (unsigned long long)ram->size);
    if (!ret)
        ret = ram_adopt(ram, fd, err);
    if (ret)
        return ret;
    take_fd(&fd);
    bitmap_fill(r->intake.seen, 0, ram->pages, true);
    r->intake.nr_seen = ram->pages;
    return 0;
}

// Everything up to PREPARE, which is left in r->record.
static int take_records(struct receive *r, struct error *err)
{
    for (;;) {
        int ret = wire_get(&r->main.wire, &r->record, err);
        if (ret)
            return ret;
        switch (r->record.header.type) {
        case WIRE_PAGES:
            if (r->machine.flags & WIRE_MACHINE_SHARED || r->streams)
                return wire_unexpected(&r->main.wire, &r->record, "memory, state or prepare", err);
            ret = page_intake_record(&r->intake, &r->main.wire, &r->record, err);
            break;
        case WIRE_MEMORY:
            ret = take_handed(r, err);
            break;
        case WIRE_PACKED:
            ret = take_packed(r, err);
            break;
        case WIRE_BLOCKS:
            ret = block_intake_record(&r->disks, &r->main.wire, &r->record, err);
            break;
        case WIRE_ABSENT:
            ret = block_late_absent(&r->disks, &r->record, err);
            break;
        case WIRE_ROUND:
            ret = receive_echo_round(r, err);
            break;
        case WIRE_DISCARD:
            ret = take_discard(r, err);
            break;
        case WIRE_STATE:
            ret = take_state(r, err);
            break;
        case WIRE_PREPARE:
            return 0;
        default:
            ret = wire_unexpected(&r->main.wire, &r->record, "pages, state or prepare", err);
        }
        if (ret)
            return ret;
    }
}

int receive_take_memory(struct receive *r, struct error *err)
{
    struct wire_prepare prep;
    int ret = take_records(r, err);
    if (!r->streams)
        return ret;
    if (!ret) {
        wire_fixed(&r->record, &prep, sizeof(prep));
        ret = streams_dest_wait(r->streams, prep.pass, err);
    }
    ret = ret ? streams_dest_cause(r->streams, ret, err) : 0;
    streams_dest_end(r->streams);
    return ret;
}

static int check_precopy(struct receive *r, struct error *err)
{
    uint64_t pages = r->vm->ram.pages;
    if (r->intake.nr_seen != pages)
        return error_set(err, -EPROTO, "%llu of %llu pages never came",
                         (unsigned long long)(pages - r->intake.nr_seen),
                         (unsigned long long)pages);
    if (r->intake.nr_damaged)
        return error_set(err, -EBADMSG, "page %llu was damaged on the way",
                         (unsigned long long)bitmap_find(r->intake.damaged, pages, 0, true));
    return 0;
}

// Pages are valid here when they came and are not stale.
static int begin_postcopy(struct receive *r, uint64_t stale, struct error *err)
{
    uint64_t pages = r->vm->ram.pages;
    if (!r->stale || bitmap_count(r->stale, pages) != stale)
        return error_set(err, -EPROTO, "prepare record: %llu pages stale, the list differs",
                         (unsigned long long)stale);
    for (size_t i = 0; i < bitmap_words(pages); i++) {
        if (r->intake.damaged[i] & ~r->stale[i])
            return error_set(err, -EBADMSG, "a page near %zu was damaged on the way", i * 64);
        r->intake.seen[i] &= ~r->stale[i];
    }
    if (bitmap_count(r->intake.seen, pages) != pages - stale)
        return error_set(err, -EPROTO, "pages neither came nor are to come");
    int ret = receive_wait_demand(r, err);
    if (ret)
        return ret;
    r->demand.cancel_fd = -1; // a cancel is seen on the main connection, while it has effect
    return postcopy_dest_create(&r->postcopy, &r->vm->ram, r->intake.seen, &r->demand, &r->disks,
                                err);
}

int receive_prepare(struct receive *r, struct error *err)
{
    struct wire_prepare prep;
    uint64_t start = time_ns();
    wire_fixed(&r->record, &prep, sizeof(prep));
    const uint32_t late = WIRE_PREPARE_POSTCOPY | WIRE_PREPARE_BLOCKS;
    if (prep.flags & ~(late | WIRE_PREPARE_STAY_PAUSED) ||
        (prep.flags & late) == WIRE_PREPARE_BLOCKS)
        return error_set(err, -EPROTO, "prepare record: flags 0x%x are not known", prep.flags);
    if (!r->state)
        return error_set(err, -EPROTO, "prepare record without state");
    r->stay_paused = prep.flags & WIRE_PREPARE_STAY_PAUSED;
    r->report->postcopy = prep.flags & WIRE_PREPARE_POSTCOPY;
    int ret = prep.flags & WIRE_PREPARE_BLOCKS ? block_late_begin(&r->disks, err) : 0;
    if (!ret)
        ret = r->report->postcopy ? begin_postcopy(r, prep.stale, err) : check_precopy(r, err);
    if (ret)
        return ret;
    ret = block_intake_sync(&r->disks, err);
    if (ret)
        return ret;
    struct stream_mem blob;
    stream_mem_reader(&blob, "guest state", r->state, r->state_len);
    ret = vm_load(r->vm, &blob.stream, err);
    if (r->postcopy) { // why loading failed, if it did: what it read was not the guest's
        struct error why = {0};
        int failed = postcopy_dest_loaded(r->postcopy, &why);
        if (failed) {
            ret = failed;
            *err = why;
        }
    }
    r->vm->moved = true;
    r->report->load_ns = time_ns() - start;
    return ret;
}
