// SPDX-License-Identifier: Apache-2.0
// The memory balloon (virtio 1.2, 5.5): the guest gives pages up and the host gets their memory
// back.
//
//  - Balloon: the guest's driver allocates pages until it holds `target` bytes, and names them;
//    their memory is given back at once (ram_discard). With deflate-on-oom it takes some back
//    rather than kill its processes. A page that it uses again is simply touched.
//  - Statistics: what the guest says of its memory, asked for every so many seconds.
//  - Free page reporting: large free pages are named as they become free, unasked, and given back.
//  - What a migration takes (struct ram_balloon): it may want more held than the target while it
//    works, from what the guest says. That is no part of the saved state: the guest has its memory
//    back as soon as it runs again, here or there.
//  - Free page hinting: during the first round of a migration (struct ram_hinter) the guest names
//    free pages, whose content need not be sent.
//
// A guest's claims only ever concern its own memory. `actual` and the statistics are shown and
// decide nothing; a page may be named that the guest goes on using: it reads zeroes.
// A guest that fills free pages with a pattern says so (PAGE_POISON). It would miss the pattern in
// pages that come back as zeroes, so what it reports or hints is then left alone (5.5.6.6).
#pragma once

#include "devices/virtio.h"

struct virtio_balloon_config {
    struct virtio_attach attach; // first
    uint64_t target;             // bytes the balloon shall hold, a multiple of 4 KiB
    uint32_t stats;              // seconds between two statistics, 0 = never ask
    bool deflate_on_oom, reporting, hinting;
};

enum { BALLOON_STATS_MAX = 24 * 3600 }; // seconds

// "[target=SIZE][,deflate-on-oom=on|off][,stats=SECONDS][,reporting=on|off][,hinting=on|off]
// [,packed]"; empty text: all on, no target, no statistics.
int virtio_balloon_parse(const char *text, struct virtio_balloon_config *config, struct error *err);

// Its config: struct virtio_balloon_config. Settings: target=SIZE, stats=SECONDS.
extern const struct device_class virtio_balloon_class;
