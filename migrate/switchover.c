// SPDX-License-Identifier: Apache-2.0
#include "migrate/switchover.h"

#include <stdbool.h>

#define NS_PER_S 1000000000ull

static uint64_t add_sat(uint64_t a, uint64_t b)
{
    return a + b < a ? UINT64_MAX : a + b;
}

uint64_t switchover_transfer_ns(uint64_t bytes, uint64_t bandwidth)
{
    if (!bytes)
        return 0;
    if (!bandwidth)
        return UINT64_MAX;
    unsigned __int128 ns = ((unsigned __int128)bytes * NS_PER_S + bandwidth - 1) / bandwidth;
    return ns > UINT64_MAX ? UINT64_MAX : (uint64_t)ns;
}

uint64_t switchover_bandwidth(uint64_t before, uint64_t bytes, uint64_t ns)
{
    if (!ns || !bytes)
        return before;
    unsigned __int128 rate = (unsigned __int128)bytes * NS_PER_S / ns;
    uint64_t now = rate > UINT64_MAX / 4 ? UINT64_MAX / 4 : (uint64_t)rate;
    return before ? before / 4 + now - now / 4 : now;
}

unsigned switchover_throttle(unsigned percent, uint64_t dirty_rate, uint64_t bandwidth)
{
    enum { STEP = 10, MOST = 99 };
    unsigned want = percent + STEP;
    // The rate of an unslowed guest, and what is left to it when that shrinks to bandwidth / 2.
    unsigned __int128 full = (unsigned __int128)dirty_rate * 100 / (100 - percent);
    if (full) {
        unsigned __int128 share = (unsigned __int128)bandwidth * 50 / full;
        unsigned aim = share < 100 ? 100 - (unsigned)share : 0;
        want = aim > want ? aim : want;
    }
    return want < MOST ? want : MOST;
}

static bool worth_another(const struct switchover_input *in, uint64_t fixed_ns)
{
    uint64_t round = switchover_transfer_ns(in->remaining, in->bandwidth);
    if (round > in->spare_ns || round <= fixed_ns / 2 || in->within >= SWITCHOVER_WITHIN_MAX ||
        (in->max_rounds && in->round >= in->max_rounds))
        return false;
    return in->within < 2 || in->remaining <= in->before - in->before / 4;
}

enum switchover_verdict switchover_decide(const struct switchover_input *in, uint64_t *downtime_ns)
{
    uint64_t t = 0;
    const uint64_t fixed[] = {in->stop_ns,   in->save_ns, in->load_ns,
                              in->resume_ns, in->rtt_ns,  in->rtt_ns};
    for (unsigned i = 0; i < sizeof(fixed) / sizeof(fixed[0]); i++)
        t = add_sat(t, fixed[i]);
    uint64_t fixed_ns = t;
    t = add_sat(t, switchover_transfer_ns(add_sat(in->remaining, in->state), in->bandwidth));
    *downtime_ns = t;
    if (t <= in->limit_ns)
        return worth_another(in, fixed_ns) ? SWITCHOVER_CONTINUE : SWITCHOVER_STOP;
    if (in->max_rounds && in->round >= in->max_rounds)
        return SWITCHOVER_STALLED;
    return SWITCHOVER_CONTINUE;
}
