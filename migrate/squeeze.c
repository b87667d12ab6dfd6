// SPDX-License-Identifier: Apache-2.0
#include "migrate/squeeze.h"

#include <poll.h>

#include "migrate/outgoing.h"

// How long the first round waits: while the balloon grows, and for a guest that says and does
// nothing.
#define WAIT_NS    30000000000ull
#define SILENCE_NS 2000000000ull
// Between two questions.
#define ASK_NS    250000000ull
#define LOOK_MS   20
#define REPORT_NS 200000000ull

// What the guest said, if it is new, and a new question in time. False: no driver listens.
static bool look(struct outgoing *out)
{
    struct squeeze *s = &out->squeeze;
    struct ram_balloon *balloon = out->vm->ram.balloon;
    struct ram_guest_says says;
    if (!balloon->look(balloon, &says))
        return false;
    uint64_t now = time_ns();
    s->held = says.held > says.wanted ? says.held - says.wanted : 0;
    s->held = s->held < out->vm->ram.size ? s->held : out->vm->ram.size;
    s->most = s->held > s->most ? s->held : s->most;
    if (!s->asked_ns)
        s->serial = says.serial; // older than this migration
    if (says.serial != s->serial) {
        s->serial = says.serial;
        s->statements++;
        if (selfballoon_look(&s->rule, &says))
            balloon->take(balloon, s->rule.taken);
        s->on |= s->rule.taken > 0;
    }
    if (!s->asked_ns || now - s->asked_ns >= ASK_NS) {
        balloon->ask(balloon);
        s->asked_ns = now;
    }
    return true;
}

// The balloon is as large as it was told to be, as near as matters.
static bool settled(const struct squeeze *s)
{
    return s->statements && s->held + SELFBALLOON_STEP >= s->rule.taken;
}

static void grow(struct outgoing *out)
{
    struct squeeze *s = &out->squeeze;
    struct pollfd cancel = {.fd = out->m->cancel_fd, .events = POLLIN};
    uint64_t start = time_ns(), news = start, now, report_at = start;
    uint64_t held = 0;
    bool spoke = false;
    while (look(out) && !settled(s)) {
        now = time_ns();
        if (s->held != held || (s->statements && !spoke))
            news = now;
        held = s->held;
        spoke = s->statements;
        if (now - start >= WAIT_NS || now - news >= SILENCE_NS)
            return;
        if (now >= report_at) {
            outgoing_progress(out, MIGRATE_ROUNDS, out->vm->ram.size - s->held);
            report_at = now + REPORT_NS;
        }
        if (poll(&cancel, 1, LOOK_MS))
            return;
    }
}

void squeeze_begin(struct outgoing *out)
{
    uint64_t start = time_ns();
    selfballoon_init(&out->squeeze.rule, out->vm->ram.size, out->params->balloon);
    if (!out->params->balloon || !out->vm->ram.balloon || vm_paused(out->vm))
        return;
    outgoing_round(out, out->vm->ram.size);
    grow(out);
    out->report->balloon_ns = time_ns() - start;
}

// While the guest gives hints its driver holds what is free: it then seems to have nothing.
void squeeze_look(struct outgoing *out)
{
    if (out->squeeze.asked_ns && !out->hinting)
        look(out);
}

void squeeze_end(struct outgoing *out)
{
    struct squeeze *s = &out->squeeze;
    if (s->on)
        out->vm->ram.balloon->take(out->vm->ram.balloon, 0);
    s->on = false;
    s->asked_ns = s->held = 0;
    if (s->most > out->report->balloon_bytes) // a recovery goes on with the same report
        out->report->balloon_bytes = s->most;
}
