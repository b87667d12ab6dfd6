// SPDX-License-Identifier: Apache-2.0
// Who owns the guest: the one place that decides which side may run it. Pure: two small automata
// over plain enums, no clock, no socket. tests/unit/test_owner.c walks every interleaving and loss.
//
//   source                                        destination
//   RUNNING --stop--> STOPPED                     WAITING
//      ^                 | prepared   <---------  --loaded--> PREPARED
//      |                 v                                       |
//      +--lost,cancel-- READY --commit--> COMMITTING  ------>  commit
//      |                                   |  |                  v
//      |                         ack <-----'  |                LACKING   (owner for ever)
//      |                          v           | lost        lost | ^ |
//      |   GONE <--complete--- OWES           |                  v | | whole
//      |                     lost | ^         |     recover: SEVERED v
//      |                          v | recover |                   RUNNING
//      |                      SEVERED         |
//      |                          ^           v
//      +---------- "no" ----------+-"yes"-- DOUBT
//
// After COMMIT the source OWES the pages that post-copy has not sent yet. A link that breaks there
// leaves both sides SEVERED: each keeps what it has, nobody runs the guest, and any number of
// recoveries lead back.
//
// Rules: before COMMIT may have left (state COMMITTING is entered *before* its first byte is sent)
// the source resumes on any failure by itself. From then on it runs again only after the
// destination's explicit "no". A destination that loses its source before COMMIT arrived, or that
// is asked before it, becomes ABORTED and can never run. No answer is no "no": the source stays
// paused until a human decides (force).
#pragma once

#include <stdbool.h>

enum owner_source {
    SOURCE_RUNNING,    // owns the guest; may run it
    SOURCE_STOPPED,    // owns it, paused for the switch
    SOURCE_READY,      // the destination has loaded everything
    SOURCE_COMMITTING, // COMMIT may be under way: neither owner nor not
    SOURCE_DOUBT,      // the link died in COMMITTING: asks
    SOURCE_OWES,       // the destination owns it; pages it lacks are here
    SOURCE_SEVERED,    // so, and the link is broken
    SOURCE_GONE,       // the destination owns it and has all of it; final
    SOURCE_STATES,
};

enum owner_source_event {
    SOURCE_EV_STOP,      // guest paused, the switch begins
    SOURCE_EV_PREPARED,  // destination: everything is loaded
    SOURCE_EV_COMMIT,    // about to send COMMIT
    SOURCE_EV_ACK,       // destination: the guest runs here
    SOURCE_EV_LOST,      // link lost, time-out, malformed data or local failure
    SOURCE_EV_REFUSED,   // destination: aborted, will never run it
    SOURCE_EV_CANCEL,    // the user
    SOURCE_EV_YES,       // answer to the question: it runs there
    SOURCE_EV_NO,        // answer: it does not and never will
    SOURCE_EV_NO_ANSWER, // nobody who knows could be reached
    SOURCE_EV_FORCE,     // a human vouches that it does not run there
    SOURCE_EV_COMPLETE,  // destination: every page is here
    SOURCE_EV_RECOVER,   // a new link to the destination that runs it
    SOURCE_EVENTS,
};

enum owner_dest {
    DEST_WAITING,  // receiving
    DEST_PREPARED, // loaded, may become owner
    DEST_LACKING,  // owner; pages are still at the source
    DEST_SEVERED,  // so, the link is broken, the guest stands still
    DEST_RUNNING,  // owner of all of it; final
    DEST_ABORTED,  // never becomes owner; final
    DEST_STATES,
};

enum owner_dest_event {
    DEST_EV_LOADED,  // about to send PREPARED
    DEST_EV_COMMIT,  // COMMIT received
    DEST_EV_LOST,    // link lost or time-out
    DEST_EV_FAILED,  // malformed data or local failure
    DEST_EV_CANCEL,  // the user, or the source's ABORT
    DEST_EV_QUERY,   // the source asks over a fresh connection
    DEST_EV_WHOLE,   // no page is missing
    DEST_EV_RECOVER, // a new link from the source
    DEST_EVENTS,
};

// What the caller does after the step, exactly once.
enum owner_action {
    OWNER_NONE,
    OWNER_RESUME,  // source: let the guest run again
    OWNER_SEND,    // source: send COMMIT now
    OWNER_ASK,     // source: ask over a fresh connection
    OWNER_HOLD,    // source: stay paused and say so; destination: pause, keep everything
    OWNER_RELEASE, // source: the guest is the destination's; this VM never runs again
    OWNER_END,     // source: nothing is owed any more, this VM may end
    OWNER_RUN,     // destination: run the guest
    OWNER_DISCARD, // destination: destroy what arrived
    OWNER_SAY_YES, // destination: answer the question
    OWNER_SAY_NO,
};

struct owner_rule {
    bool allowed;
    unsigned char next;
    unsigned char action;
};

extern const struct owner_rule owner_source_rules[SOURCE_STATES][SOURCE_EVENTS];
extern const struct owner_rule owner_dest_rules[DEST_STATES][DEST_EVENTS];

// 0, or -EPROTO for an event that has no place in this state (the state stays as it is).
int owner_source_step(enum owner_source *state, enum owner_source_event event,
                      enum owner_action *action);
int owner_dest_step(enum owner_dest *state, enum owner_dest_event event, enum owner_action *action);

const char *owner_source_name(enum owner_source state);
const char *owner_dest_name(enum owner_dest state);
