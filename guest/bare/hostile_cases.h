// SPDX-License-Identifier: Apache-2.0
#pragma once

// What guest `hostile` tries, and what the test expects (tests/bare/bare_hostile.c).
//
// X(NAME, name, device, rings, lines): virtio id of the device it is for (0: any), bits of the ring
// formats it makes sense for, and how many lines the VMM logs about it: one for each offence
// (HOSTILE_FLOOD: as many as the rate limit lets through).

enum hostile_rings { HOSTILE_SPLIT = 1, HOSTILE_PACKED = 2, HOSTILE_BOTH = 3 };
enum { HOSTILE_FLOOD = -1 };

#define HOSTILE_CASES(X)                                                                           \
    /* chains */                                                                                   \
    X(CYCLE, cycle, 0, HOSTILE_BOTH, 1) /* packed: a chain that never ends */                      \
    X(INDIRECT_CYCLE, indirect_cycle, 0, HOSTILE_SPLIT, 1)                                         \
    X(INDIRECT_LONG, indirect_long, 0, HOSTILE_BOTH, 1) /* more entries than a chain may have */   \
    X(INDIRECT_NESTED, indirect_nested, 0, HOSTILE_BOTH, 1)                                        \
    X(INDIRECT_ODD, indirect_odd, 0, HOSTILE_BOTH, 1) /* a table of one and a half entries */      \
    X(INDIRECT_EMPTY, indirect_empty, 0, HOSTILE_BOTH, 1)                                          \
    X(INDIRECT_CHAINED, indirect_chained, 0, HOSTILE_BOTH, 1)                                      \
    X(INDIRECT_UNASKED, indirect_unasked, 0, HOSTILE_BOTH, 1) /* not negotiated */                 \
    X(INDIRECT_OUTSIDE, indirect_outside, 0, HOSTILE_BOTH,                                         \
      1) /* the table's end is outside of RAM */                                                   \
    X(INDIRECT_NEXT_RANGE, indirect_next_range, 0, HOSTILE_SPLIT, 1)                               \
    X(EMPTY_BUFFER, empty_buffer, 0, HOSTILE_BOTH, 1)                                              \
    X(HEAD_RANGE, head_range, 0, HOSTILE_SPLIT, 1)                                                 \
    X(NEXT_RANGE, next_range, 0, HOSTILE_SPLIT, 1)                                                 \
    X(BUFFER_END, buffer_end, 0, HOSTILE_BOTH, 1)     /* begins in RAM, ends outside */            \
    X(BUFFER_WRAP, buffer_wrap, 0, HOSTILE_BOTH, 1)   /* address + length passes 2^64 */           \
    X(BUFFER_HOLE, buffer_hole, 0, HOSTILE_BOTH, 1)   /* the device's own registers */             \
    X(BUFFER_ORDER, buffer_order, 0, HOSTILE_BOTH, 1) /* readable behind writable */               \
    X(SEGMENTS, segments, 0, HOSTILE_BOTH, 1) /* more buffers than any table has entries */        \
    X(AVAIL_AHEAD, avail_ahead, 0, HOSTILE_SPLIT, 1)                                               \
    X(HEAD_TWICE, head_twice, 2, HOSTILE_SPLIT, 1) /* offered again before it came back */         \
    X(AGAIN, again, 0, HOSTILE_BOTH, 1) /* a broken chain, and doorbell upon doorbell */           \
    X(FLIP_DESCRIPTOR, flip_descriptor, 4, HOSTILE_BOTH,                                           \
      1) /* another CPU changes it all the time */                                                 \
    /* queues */                                                                                   \
    X(DESC_END, desc_end, 0, HOSTILE_BOTH, 1) /* the descriptors end outside of RAM */             \
    X(DRIVER_END, driver_end, 0, HOSTILE_BOTH, 1)                                                  \
    X(DEVICE_END, device_end, 0, HOSTILE_BOTH, 1)                                                  \
    X(DESC_WRAP, desc_wrap, 0, HOSTILE_BOTH, 1)                                                    \
    X(DESC_ODD, desc_odd, 0, HOSTILE_BOTH, 1)  /* an address that is not aligned */                \
    X(SIZE_ODD, size_odd, 0, HOSTILE_SPLIT, 1) /* 3 entries */                                     \
    X(SIZE_BIG, size_big, 0, HOSTILE_BOTH, 1)                                                      \
    X(SIZE_ZERO, size_zero, 0, HOSTILE_BOTH, 1)                                                    \
    X(MOVE_LIVE, move_live, 0, HOSTILE_BOTH, 0)   /* new size and addresses for a running queue */ \
    X(EARLY_KICK, early_kick, 0, HOSTILE_BOTH, 0) /* before DRIVER_OK */                           \
    X(QUEUE_SEL, queue_sel, 0, HOSTILE_BOTH, 0)   /* of queues that do not exist */                \
    X(NOTIFY, notify, 0, HOSTILE_BOTH, 0)         /* the same */                                   \
    /* status, features, config space */                                                           \
    X(STATUS_ORDER, status_order, 0, HOSTILE_BOTH, 4)                                              \
    X(FEATURES, features, 0, HOSTILE_BOTH, 1)         /* those that were not offered */            \
    X(CONFIG_RANGE, config_range, 0, HOSTILE_BOTH, 0) /* beyond its end, of odd widths */          \
    /* resets and floods */                                                                        \
    X(RESET_BUSY, reset_busy, 0, HOSTILE_BOTH, 0) /* with requests under way */                    \
    X(LOG_FLOOD, log_flood, 0, HOSTILE_BOTH,                                                       \
      HOSTILE_FLOOD) /* broken and reset, hundreds of times */                                     \
    /* disks */                                                                                    \
    X(BLK_OVERFLOW, blk_overflow, 2, HOSTILE_BOTH, 0) /* sector * 512 passes 2^64 */               \
    X(BLK_PAST_END, blk_past_end, 2, HOSTILE_BOTH, 0)                                              \
    X(BLK_RANGES, blk_ranges, 2, HOSTILE_BOTH, 0)   /* discards and zeroes past the end */         \
    X(BLK_LENGTHS, blk_lengths, 2, HOSTILE_BOTH, 0) /* no whole sectors, a short serial number */  \
    X(BLK_NO_STATUS, blk_no_status, 2, HOSTILE_BOTH, 1)                                            \
    X(BLK_NO_HEADER, blk_no_header, 2, HOSTILE_BOTH, 1)                                            \
    X(BLK_FORMAT, blk_format, 2, HOSTILE_BOTH, 0) /* writes the header of another image format */  \
    X(BLK_FLIP_HEADER, blk_flip_header, 2, HOSTILE_BOTH, 0)                                        \
    /* entropy, net, console, vsock, balloon */                                                    \
    X(RNG_FLOOD, rng_flood, 4, HOSTILE_BOTH, 0)   /* gigabytes in one request */                   \
    X(NET_FRAMES, net_frames, 1, HOSTILE_BOTH, 1) /* headers that lie, too short, far too long */  \
    X(CONSOLE_CONTROL, console_control, 3, HOSTILE_BOTH,                                           \
      HOSTILE_FLOOD) /* messages for no port, cut short */                                         \
    X(VSOCK_LENGTHS, vsock_lengths, 19, HOSTILE_BOTH,                                              \
      1) /* a length that is not the buffers'; half a header */                                    \
    X(BALLOON_PAGES, balloon_pages, 5, HOSTILE_BOTH,                                               \
      HOSTILE_FLOOD) /* outside of RAM, odd lengths, a lie about its size */

enum hostile_case {
#define HOSTILE_ENUM(NAME, name, device, rings, lines) HOSTILE_##NAME,
    HOSTILE_CASES(HOSTILE_ENUM)
#undef HOSTILE_ENUM
        HOSTILE_COUNT
};

enum {
    HOSTILE_ARENA = 8 << 20, // the guest's rings and buffers; the host fills it with this:
    HOSTILE_CANARY = 0xa5,
    HOSTILE_SECTORS = 2048, // of the disk; byte 0 of sector i is HOSTILE_SECTOR(i)
    HOSTILE_SCRATCH = 64,   // the only sectors that a guest may change are this one and 7 more
};
#define HOSTILE_SECTOR(i) ((uint8_t)((i)*7 + 1))

// Stages of GUEST_SYNC. At the first the attack is over, the device as it left it.
enum { HOSTILE_ATTACKED = 1 };
