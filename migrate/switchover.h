// SPDX-License-Identifier: Apache-2.0
// When to stop the guest: the pre-copy switch-over rule as a pure function.
//
//   downtime = stop + (remaining + state) / bandwidth + save + load + rtts + resume
//
// (Clark et al., NSDI'05, with the device-state time counted.) The caller passes the *exact* number
// of dirty bytes, from a dirty-log sync just done; an estimate would stop the guest too early.
//
// What fits the limit may still become less: while it is mostly pages that are waited for, and a
// short round makes them a quarter fewer, another one is worth it.
#pragma once

#include <stdint.h>

struct switchover_input {
    uint64_t remaining; // bytes of dirty pages to send while the guest stands still
    uint64_t state;     // bytes of vCPU and device state
    uint64_t bandwidth; // bytes/s reached so far; 0 = not known yet
    uint64_t stop_ns;   // to park the vCPUs and quiesce the devices
    uint64_t save_ns, load_ns, resume_ns;
    uint64_t rtt_ns;     // one round trip; the switch takes two
    uint64_t limit_ns;   // downtime the user allows
    uint32_t round;      // rounds completed, >= 1
    uint32_t max_rounds; // 0 = as many as it takes
    uint64_t before;     // `remaining` after the round before
    uint32_t within;     // rounds before this one after which it fitted the limit
    uint64_t spare_ns;   // what one more round may take when it fits already; 0 = stop then
};

#define SWITCHOVER_WITHIN_MAX 6 // rounds

enum switchover_verdict {
    SWITCHOVER_CONTINUE, // another round
    SWITCHOVER_STOP,     // stop the guest now: it fits the limit
    SWITCHOVER_STALLED,  // max_rounds done and it still does not fit: the user's policy decides
};

// `*downtime_ns` is the expected downtime if the guest were stopped now (UINT64_MAX: not known).
enum switchover_verdict switchover_decide(const struct switchover_input *in, uint64_t *downtime_ns);

// What share of its time, in percent, a guest that writes too fast should stand still: `dirty_rate`
// (bytes/s) was measured while it stood still for `percent` of it. Aims at half of what the link
// takes, so that each round is half as long as the one before; never less than before, at most 99.
unsigned switchover_throttle(unsigned percent, uint64_t dirty_rate, uint64_t bandwidth);

// bytes / (bytes/s) in ns, rounded up, saturating at UINT64_MAX; bandwidth 0 gives UINT64_MAX
// unless there is nothing to send.
uint64_t switchover_transfer_ns(uint64_t bytes, uint64_t bandwidth);

// Moving estimate of bytes/s: the new sample counts 3/4, since the next round is like the last one.
uint64_t switchover_bandwidth(uint64_t before, uint64_t bytes, uint64_t ns);
