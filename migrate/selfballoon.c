// SPDX-License-Identifier: Apache-2.0
#include "migrate/selfballoon.h"

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

void selfballoon_init(struct selfballoon *s, uint64_t memory, uint64_t most)
{
    *s = (struct selfballoon) {.memory = memory, .most = least(most, memory)};
}

static uint64_t reserve(const struct selfballoon *s)
{
    uint64_t bytes = s->memory / SELFBALLOON_RESERVE_PART;
    bytes = bytes > SELFBALLOON_RESERVE_MIN ? bytes : SELFBALLOON_RESERVE_MIN;
    return least(bytes, SELFBALLOON_RESERVE_MAX);
}

// UINT64_MAX is "not said". Counters of the guest begin anew when it reboots.
static bool grown(uint64_t before, uint64_t now, uint64_t by)
{
    return now != UINT64_MAX && before != UINT64_MAX && now > before && now - before >= by;
}

static bool pressure(const struct selfballoon *s, const struct ram_guest_says *says, uint64_t spare)
{
    if (spare < reserve(s) / 2)
        return true;
    return s->known && (grown(s->swapped_out, says->swapped_out, 1) ||
                        grown(s->major_faults, says->major_faults, SELFBALLOON_BURST));
}

// What the guest would have to spare if the balloon held nothing, less the reserve: of that, and
// not of what is left while the balloon grows, a share is taken, so that each look aims at the
// same.
static uint64_t goal(const struct selfballoon *s, uint64_t held, uint64_t spare)
{
    uint64_t all = least(held + spare, s->memory), room = all > reserve(s) ? all - reserve(s) : 0;
    return room - room / SELFBALLOON_LEAVE_PART;
}

static uint64_t relieved(const struct selfballoon *s, uint64_t spare)
{
    uint64_t lacks = spare < reserve(s) ? reserve(s) - spare : 0, part = s->taken / 4;
    uint64_t back = lacks > part ? lacks : part;
    return s->taken > back ? s->taken - back : 0;
}

bool selfballoon_look(struct selfballoon *s, const struct ram_guest_says *says)
{
    uint64_t spare = says->available != UINT64_MAX ? says->available : says->free;
    if (!s->most || spare == UINT64_MAX)
        return false;
    spare = least(spare, s->memory);
    uint64_t held = least(says->held, s->memory);
    held = held > says->wanted ? held - says->wanted : 0;
    bool pressed = pressure(s, says, spare);
    s->known = true;
    s->swapped_out = says->swapped_out;
    s->major_faults = says->major_faults;
    s->pressed |= pressed;
    uint64_t taken =
        pressed ? relieved(s, spare) : least(goal(s, held, spare), s->pressed ? s->taken : s->most);
    taken = align_down(taken, SELFBALLOON_STEP);
    bool changed = taken != s->taken;
    s->taken = taken;
    return changed;
}
