// SPDX-License-Identifier: Apache-2.0
#include "migrate/owner.h"

#include <errno.h>

#define TO(state, act)                                    \
    {                                                     \
        .allowed = true, .next = (state), .action = (act) \
    }

const struct owner_rule owner_source_rules[SOURCE_STATES][SOURCE_EVENTS] =
    {
        [SOURCE_RUNNING] =
            {
                [SOURCE_EV_STOP] = TO(SOURCE_STOPPED, OWNER_NONE),
                [SOURCE_EV_LOST] = TO(SOURCE_RUNNING, OWNER_NONE),
                [SOURCE_EV_REFUSED] = TO(SOURCE_RUNNING, OWNER_NONE),
                [SOURCE_EV_CANCEL] = TO(SOURCE_RUNNING, OWNER_NONE),
            },
        [SOURCE_STOPPED] =
            {
                [SOURCE_EV_PREPARED] = TO(SOURCE_READY, OWNER_NONE),
                [SOURCE_EV_LOST] = TO(SOURCE_RUNNING, OWNER_RESUME),
                [SOURCE_EV_REFUSED] = TO(SOURCE_RUNNING, OWNER_RESUME),
                [SOURCE_EV_CANCEL] = TO(SOURCE_RUNNING, OWNER_RESUME),
            },
        [SOURCE_READY] =
            {
                [SOURCE_EV_COMMIT] = TO(SOURCE_COMMITTING, OWNER_SEND),
                [SOURCE_EV_LOST] = TO(SOURCE_RUNNING, OWNER_RESUME),
                [SOURCE_EV_REFUSED] = TO(SOURCE_RUNNING, OWNER_RESUME),
                [SOURCE_EV_CANCEL] = TO(SOURCE_RUNNING, OWNER_RESUME),
            },
        [SOURCE_COMMITTING] =
            {
                [SOURCE_EV_ACK] = TO(SOURCE_OWES, OWNER_RELEASE),
                [SOURCE_EV_LOST] = TO(SOURCE_DOUBT, OWNER_ASK),
                [SOURCE_EV_REFUSED] = TO(SOURCE_RUNNING, OWNER_RESUME),
                [SOURCE_EV_CANCEL] = TO(SOURCE_COMMITTING, OWNER_NONE), // too late
            },
        [SOURCE_DOUBT] =
            {
                [SOURCE_EV_YES] = TO(SOURCE_SEVERED, OWNER_RELEASE),
                [SOURCE_EV_NO] = TO(SOURCE_RUNNING, OWNER_RESUME),
                [SOURCE_EV_NO_ANSWER] = TO(SOURCE_DOUBT, OWNER_HOLD),
                [SOURCE_EV_LOST] = TO(SOURCE_DOUBT, OWNER_ASK),
                [SOURCE_EV_CANCEL] = TO(SOURCE_DOUBT, OWNER_HOLD),
                [SOURCE_EV_FORCE] = TO(SOURCE_RUNNING, OWNER_RESUME),
            },
        [SOURCE_OWES] =
            {
                [SOURCE_EV_COMPLETE] = TO(SOURCE_GONE, OWNER_END),
                [SOURCE_EV_LOST] = TO(SOURCE_SEVERED, OWNER_HOLD),
                [SOURCE_EV_REFUSED] = TO(SOURCE_SEVERED, OWNER_HOLD),
                [SOURCE_EV_CANCEL] = TO(SOURCE_OWES, OWNER_NONE), // too late
            },
        [SOURCE_SEVERED] =
            {
                [SOURCE_EV_RECOVER] = TO(SOURCE_OWES, OWNER_NONE),
                [SOURCE_EV_COMPLETE] = TO(SOURCE_GONE, OWNER_END),
                [SOURCE_EV_LOST] = TO(SOURCE_SEVERED, OWNER_HOLD),
                [SOURCE_EV_REFUSED] = TO(SOURCE_SEVERED, OWNER_HOLD),
                [SOURCE_EV_CANCEL] = TO(SOURCE_SEVERED, OWNER_HOLD),
            },
        [SOURCE_GONE] =
            {
                [SOURCE_EV_LOST] = TO(SOURCE_GONE, OWNER_NONE),
                [SOURCE_EV_CANCEL] = TO(SOURCE_GONE, OWNER_NONE),
            },
};

const struct owner_rule owner_dest_rules[DEST_STATES][DEST_EVENTS] =
    {
        [DEST_WAITING] =
            {
                [DEST_EV_LOADED] = TO(DEST_PREPARED, OWNER_NONE),
                [DEST_EV_LOST] = TO(DEST_ABORTED, OWNER_DISCARD),
                [DEST_EV_FAILED] = TO(DEST_ABORTED, OWNER_DISCARD),
                [DEST_EV_CANCEL] = TO(DEST_ABORTED, OWNER_DISCARD),
                [DEST_EV_QUERY] = TO(DEST_ABORTED, OWNER_SAY_NO),
            },
        [DEST_PREPARED] =
            {
                [DEST_EV_COMMIT] = TO(DEST_LACKING, OWNER_RUN),
                [DEST_EV_LOST] = TO(DEST_ABORTED, OWNER_DISCARD),
                [DEST_EV_FAILED] = TO(DEST_ABORTED, OWNER_DISCARD),
                [DEST_EV_CANCEL] = TO(DEST_ABORTED, OWNER_DISCARD),
                [DEST_EV_QUERY] = TO(DEST_ABORTED, OWNER_SAY_NO),
            },
        [DEST_LACKING] =
            {
                [DEST_EV_WHOLE] = TO(DEST_RUNNING, OWNER_NONE),
                [DEST_EV_LOST] = TO(DEST_SEVERED, OWNER_HOLD),
                [DEST_EV_FAILED] = TO(DEST_SEVERED, OWNER_HOLD),
                [DEST_EV_CANCEL] = TO(DEST_LACKING, OWNER_NONE),
                [DEST_EV_QUERY] = TO(DEST_LACKING, OWNER_SAY_YES),
            },
        [DEST_SEVERED] =
            {
                [DEST_EV_RECOVER] = TO(DEST_LACKING, OWNER_RUN),
                [DEST_EV_WHOLE] = TO(DEST_RUNNING, OWNER_RUN),
                [DEST_EV_LOST] = TO(DEST_SEVERED, OWNER_NONE),
                [DEST_EV_FAILED] = TO(DEST_SEVERED, OWNER_NONE),
                [DEST_EV_CANCEL] = TO(DEST_SEVERED, OWNER_NONE),
                [DEST_EV_QUERY] = TO(DEST_SEVERED, OWNER_SAY_YES),
            },
        [DEST_RUNNING] =
            {
                [DEST_EV_WHOLE] = TO(DEST_RUNNING, OWNER_NONE),
                // The source has not heard that it owes nothing any more.
                [DEST_EV_RECOVER] = TO(DEST_RUNNING, OWNER_NONE),
                [DEST_EV_LOST] = TO(DEST_RUNNING, OWNER_NONE),
                [DEST_EV_FAILED] = TO(DEST_RUNNING, OWNER_NONE),
                [DEST_EV_CANCEL] = TO(DEST_RUNNING, OWNER_NONE),
                [DEST_EV_QUERY] = TO(DEST_RUNNING, OWNER_SAY_YES),
            },
        [DEST_ABORTED] =
            {
                // COMMIT may still come in after a question was answered with no: it has no effect.
                [DEST_EV_COMMIT] = TO(DEST_ABORTED, OWNER_NONE),
                [DEST_EV_LOADED] = TO(DEST_ABORTED, OWNER_NONE),
                [DEST_EV_LOST] = TO(DEST_ABORTED, OWNER_NONE),
                [DEST_EV_FAILED] = TO(DEST_ABORTED, OWNER_NONE),
                [DEST_EV_CANCEL] = TO(DEST_ABORTED, OWNER_NONE),
                [DEST_EV_QUERY] = TO(DEST_ABORTED, OWNER_SAY_NO),
            },
};

int owner_source_step(enum owner_source *state, enum owner_source_event event,
                      enum owner_action *action)
{
    const struct owner_rule *rule = &owner_source_rules[*state][event];
    *action = OWNER_NONE;
    if (!rule->allowed)
        return -EPROTO;
    *state = rule->next;
    *action = rule->action;
    return 0;
}

int owner_dest_step(enum owner_dest *state, enum owner_dest_event event, enum owner_action *action)
{
    const struct owner_rule *rule = &owner_dest_rules[*state][event];
    *action = OWNER_NONE;
    if (!rule->allowed)
        return -EPROTO;
    *state = rule->next;
    *action = rule->action;
    return 0;
}

const char *owner_source_name(enum owner_source state)
{
    static const char *const names[SOURCE_STATES] = {"running", "stopped", "ready",   "committing",
                                                     "doubt",   "owes",    "severed", "gone"};
    return names[state];
}

const char *owner_dest_name(enum owner_dest state)
{
    static const char *const names[DEST_STATES] = {"waiting", "prepared", "lacking",
                                                   "severed", "running",  "aborted"};
    return names[state];
}
