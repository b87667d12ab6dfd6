// SPDX-License-Identifier: Apache-2.0
// The disks of a guest on their way, beside its memory.
#include <errno.h>

#include "migrate/blockpost.h"
#include "migrate/outgoing.h"

enum {
    PASSES_MAX = 10,       // before memory is sent; then one goes with each of its rounds
    LITTLE = 1024 * 1024,  // bytes: not worth another pass of its own
    REPORT_NS = 200000000, // between two reports
};

int disks_begin(struct outgoing *out, struct error *err)
{
    return out->params->disks ? block_move_create(&out->disks, out->vm, err) : 0;
}

int disks_agree(struct outgoing *out, struct error *err)
{
    if (!out->disks)
        return 0;
    int ret = wire_expect(&out->main.wire, &out->record, WIRE_KEPT, err);
    return ret ? ret : block_move_start(out->disks, &out->record, err);
}

void disks_gone(struct outgoing *out)
{
    if (out->disks)
        block_move_left(out->disks, out->report->id);
}

void disks_end(struct outgoing *out)
{
    const struct block_move *bm = out->disks;
    if (bm) {
        out->report->disk_bytes += bm->data_bytes;
        out->report->disk_zero_bytes += bm->zero_bytes;
        out->report->disk_passes += bm->passes;
        out->report->disks_kept += bm->kept;
    }
    block_move_free(out->disks);
    out->disks = NULL;
}

uint64_t disks_left(const struct outgoing *out)
{
    return out->disks ? block_move_todo(out->disks) : 0;
}

// With a low bandwidth limit records get small, so that a write takes about 50 ms at most.
static uint64_t record_bytes(const struct outgoing *out)
{
    uint64_t rate = atomic_load(&out->m->bandwidth);
    return rate && rate / 20 < WIRE_BLOCKS_DATA ? rate / 20 : WIRE_BLOCKS_DATA;
}

int disks_pass(struct outgoing *out, struct error *err)
{
    uint64_t report_at = time_ns() + REPORT_NS;
    bool more = out->disks;
    int ret = 0;
    if (more)
        block_move_pass(out->disks);
    while (more && !ret) {
        ret = outgoing_check_cancel(out, err);
        if (!ret)
            ret = block_move_record(out->disks, &out->main.wire, record_bytes(out), &more, err);
        if (!ret && out->owner == SOURCE_RUNNING && time_ns() >= report_at) {
            outgoing_progress(out, out->report->rounds ? MIGRATE_ROUNDS : MIGRATE_DISKS,
                              disks_left(out));
            report_at = time_ns() + REPORT_NS;
        }
    }
    return ret;
}

bool disks_late(const struct outgoing *out, bool postcopy)
{
    return postcopy && out->disks && out->disks->late;
}

int disks_say(struct outgoing *out, bool *any, struct error *err)
{
    uint64_t blocks;
    int ret = block_post_say(out->disks, &out->main.wire, &blocks, err);
    *any = blocks;
    return ret;
}

int disks_hear(struct outgoing *out, struct error *err)
{
    int ret = out->disks ? 0 : disks_begin(out, err);
    if (!ret && !out->disks)
        ret = wire_unexpected(&out->main.wire, &out->record, "discard or ready", err);
    return ret ? ret : block_post_hear(out->disks, &out->record, err);
}

int disks_first(struct outgoing *out, struct error *err)
{
    uint64_t left = disks_left(out), before;
    if (!out->disks)
        return 0;
    do {
        before = left;
        outgoing_round(out, left);
        outgoing_progress(out, MIGRATE_DISKS, left);
        int ret = disks_pass(out, err);
        if (!ret)
            ret = precopy_flush(out, err);
        if (ret)
            return ret;
        left = disks_left(out);
    } while (left > LITTLE && left < before / 2 && out->disks->passes < PASSES_MAX);
    return 0;
}
