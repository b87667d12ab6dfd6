// SPDX-License-Identifier: Apache-2.0
// Who owns the guest: every interleaving of source, destination, link and user is walked. The model
// around the two automata is more hostile than TCP: a cut link may still deliver any prefix of what
// was under way, either side may die, be cancelled or fail at any moment.
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "migrate/owner.h"
#include "vmm/util.h"

enum message {
    MSG_NONE,
    MSG_PREPARE,
    MSG_COMMIT,
    MSG_ABORT,
    MSG_PREPARED = 1,
    MSG_RUNNING = 2,
    MSG_COMPLETE = 4
};
enum question { Q_NONE, Q_ASKED, Q_YES, Q_NO };
enum { QUEUE = 3, STATES = 1 << 28, SUCCESSORS_MAX = 64 };

struct world {
    unsigned source, dest;
    unsigned link_up, source_alive, dest_alive, started;
    unsigned question;
    unsigned recovering;                       // the source has made a new link and said so
    unsigned to_dest[QUEUE], to_source[QUEUE]; // enum message, head first
};

struct tables {
    struct owner_rule source[SOURCE_STATES][SOURCE_EVENTS];
    struct owner_rule dest[DEST_STATES][DEST_EVENTS];
};

static unsigned world_encode(const struct world *w)
{
    unsigned n = w->source;
    n = n << 3 | w->dest;
    n = n << 1 | w->recovering;
    n = n << 1 | w->link_up;
    n = n << 1 | w->source_alive;
    n = n << 1 | w->dest_alive;
    n = n << 1 | w->started;
    n = n << 2 | w->question;
    for (unsigned i = 0; i < QUEUE; i++)
        n = n << 2 | w->to_dest[i];
    for (unsigned i = 0; i < QUEUE; i++)
        n = n << 3 | w->to_source[i];
    return n;
}

static unsigned take_bits(unsigned *n, unsigned bits)
{
    unsigned value = *n & ((1u << bits) - 1);
    *n >>= bits;
    return value;
}

static struct world world_decode(unsigned n)
{
    struct world w;
    for (unsigned i = QUEUE; i-- > 0;)
        w.to_source[i] = take_bits(&n, 3);
    for (unsigned i = QUEUE; i-- > 0;)
        w.to_dest[i] = take_bits(&n, 2);
    w.question = take_bits(&n, 2);
    w.started = take_bits(&n, 1);
    w.dest_alive = take_bits(&n, 1);
    w.source_alive = take_bits(&n, 1);
    w.link_up = take_bits(&n, 1);
    w.recovering = take_bits(&n, 1);
    w.dest = take_bits(&n, 3);
    w.source = n;
    return w;
}

static void push(const struct world *w, unsigned *queue, unsigned message)
{
    if (!w->link_up || !message)
        return; // sending fails
    for (unsigned i = 0; i < QUEUE; i++)
        if (!queue[i]) {
            queue[i] = message;
            return;
        }
    ck_abort_msg("queue too short for the model");
}

static unsigned pop(unsigned *queue)
{
    unsigned head = queue[0];
    memmove(queue, queue + 1, (QUEUE - 1) * sizeof(*queue));
    queue[QUEUE - 1] = MSG_NONE;
    return head;
}

// What the drivers (outgoing.c, receive.c) do with each action.
static void source_step(const struct tables *t, struct world *w, unsigned event)
{
    const struct owner_rule *rule = &t->source[w->source][event];
    if (!rule->allowed)
        return;
    bool ends = event == SOURCE_EV_LOST || event == SOURCE_EV_CANCEL || event == SOURCE_EV_REFUSED;
    w->source = rule->next;
    if (rule->action == OWNER_SEND)
        push(w, w->to_dest, MSG_COMMIT);
    if (ends && w->source == SOURCE_RUNNING && w->started)
        push(w, w->to_dest, MSG_ABORT);
    if (ends && w->source != SOURCE_COMMITTING && w->source != SOURCE_GONE)
        w->link_up = false; // it closes the connection
    if (rule->action == OWNER_ASK && w->question == Q_NONE)
        w->question = Q_ASKED;
}

static void dest_step(const struct tables *t, struct world *w, unsigned event)
{
    const struct owner_rule *rule = &t->dest[w->dest][event];
    if (!rule->allowed)
        return;
    w->dest = rule->next;
    if (event == DEST_EV_LOADED && w->dest == DEST_PREPARED)
        push(w, w->to_source, MSG_PREPARED);
    if (rule->action == OWNER_RUN)
        push(w, w->to_source, event == DEST_EV_COMMIT ? MSG_RUNNING : MSG_NONE);
    if (event == DEST_EV_WHOLE || (event == DEST_EV_RECOVER && w->dest == DEST_RUNNING))
        push(w, w->to_source, MSG_COMPLETE);
    if (rule->action == OWNER_HOLD) {
        w->link_up = false;
        memset(w->to_source, 0, sizeof(w->to_source)); // nothing of the old link is read any more
        memset(w->to_dest, 0, sizeof(w->to_dest));
    }
    if (rule->action == OWNER_DISCARD) {
        push(w, w->to_source, MSG_ABORT);
        w->link_up = false;
    }
    if (rule->action == OWNER_SAY_YES || rule->action == OWNER_SAY_NO)
        w->question = rule->action == OWNER_SAY_YES ? Q_YES : Q_NO;
}

struct successors {
    const struct tables *tables;
    struct world from;
    struct world list[SUCCESSORS_MAX];
    unsigned nr;
};

static struct world *next(struct successors *s)
{
    ck_assert_uint_lt(s->nr, SUCCESSORS_MAX);
    s->list[s->nr] = s->from;
    return &s->list[s->nr++];
}

static void source_successors(struct successors *s)
{
    static const unsigned any_time[] = {SOURCE_EV_LOST, SOURCE_EV_CANCEL};
    static const unsigned heard[] = {0, SOURCE_EV_PREPARED, SOURCE_EV_ACK, SOURCE_EV_REFUSED,
                                     SOURCE_EV_COMPLETE};
    const struct world *from = &s->from;
    if (!from->started) {
        struct world *w = next(s);
        w->started = true;
        source_step(s->tables, w, SOURCE_EV_STOP);
        push(w, w->to_dest, MSG_PREPARE);
        return;
    }
    for (unsigned i = 0; i < ARRAY_SIZE(any_time); i++)
        source_step(s->tables, next(s), any_time[i]);
    source_step(s->tables, next(s), SOURCE_EV_COMMIT);
    if (from->to_source[0]) {
        struct world *w = next(s);
        source_step(s->tables, w, heard[pop(w->to_source)]);
    }
    if (from->source == SOURCE_SEVERED && !from->recovering) {
        struct world *w = next(s); // a new link: nothing of the old one comes through it
        memset(w->to_source, 0, sizeof(w->to_source));
        memset(w->to_dest, 0, sizeof(w->to_dest));
        w->link_up = w->recovering = true;
        source_step(s->tables, w, SOURCE_EV_RECOVER);
    }
    if (from->source != SOURCE_DOUBT)
        return;
    source_step(s->tables, next(s), SOURCE_EV_NO_ANSWER);
    if (from->question == Q_NONE)
        next(s)->question = Q_ASKED; // asks again
    if (from->question == Q_YES || from->question == Q_NO) {
        struct world *w = next(s);
        source_step(s->tables, w, w->question == Q_YES ? SOURCE_EV_YES : SOURCE_EV_NO);
        w->question = Q_NONE;
    }
}

static void dest_successors(struct successors *s)
{
    static const unsigned any_time[] = {DEST_EV_LOST, DEST_EV_FAILED, DEST_EV_CANCEL};
    static const unsigned heard[] = {0, DEST_EV_LOADED, DEST_EV_COMMIT, DEST_EV_CANCEL};
    for (unsigned i = 0; i < ARRAY_SIZE(any_time); i++)
        dest_step(s->tables, next(s), any_time[i]);
    if (s->from.to_dest[0]) {
        struct world *w = next(s);
        dest_step(s->tables, w, heard[pop(w->to_dest)]);
    }
    if (s->from.question == Q_ASKED)
        dest_step(s->tables, next(s), DEST_EV_QUERY);
    if (s->from.dest == DEST_LACKING && s->from.link_up && !s->from.recovering)
        dest_step(s->tables, next(s), DEST_EV_WHOLE); // pages come over a link
    if (s->from.recovering && s->from.link_up) {
        struct world *w = next(s);
        w->recovering = false;
        if (w->dest == DEST_LACKING) // it had not noticed that the old link was gone
            w->dest = s->tables->dest[DEST_LACKING][DEST_EV_LOST].next;
        dest_step(s->tables, w, DEST_EV_RECOVER);
    }
}

static void world_successors(struct successors *s, bool deaths)
{
    s->nr = 0;
    if (s->from.source_alive)
        source_successors(s);
    if (s->from.dest_alive)
        dest_successors(s);
    next(s)->link_up = false;
    if (s->from.recovering && !s->from.link_up)
        next(s)->recovering = false; // it never heard of the new link
    if (!s->from.link_up) {          // the rest of what was under way is lost
        memset(next(s)->to_dest, 0, sizeof(s->from.to_dest));
        memset(next(s)->to_source, 0, sizeof(s->from.to_source));
    }
    if (s->from.question != Q_NONE)
        next(s)->question = Q_NONE; // question or answer lost
    if (deaths) {
        struct world *w = next(s);
        w->source_alive = w->link_up = false;
        w = next(s);
        w->dest_alive = w->link_up = false;
    }
}

// NULL, or what is wrong with this world.
static const char *world_fault(const struct world *w)
{
    bool source_runs = w->source_alive && w->source == SOURCE_RUNNING;
    bool given = w->dest == DEST_LACKING || w->dest == DEST_SEVERED || w->dest == DEST_RUNNING;
    bool dest_runs = w->dest_alive && given;
    if (source_runs && dest_runs)
        return "both run";
    if (w->source == SOURCE_GONE && w->dest != DEST_RUNNING)
        return "the source let go of a guest that lacks pages, or that was never taken";
    if ((w->source == SOURCE_OWES || w->source == SOURCE_SEVERED) && !given)
        return "the source gave up a guest the destination never took";
    if (w->source < SOURCE_COMMITTING && given)
        return "the destination took a guest that was not given";
    return NULL;
}

struct walk {
    uint8_t *seen;
    unsigned *order, nr;
    const char *fault;
};

static void walk_all(struct walk *walk, const struct tables *tables, bool deaths)
{
    struct successors s = {.tables = tables};
    struct world start = {.link_up = true, .source_alive = true, .dest_alive = true};
    *walk = (struct walk) {.seen = calloc(STATES, 1), .order = calloc(STATES, sizeof(unsigned))};
    ck_assert(walk->seen && walk->order);
    walk->seen[world_encode(&start)] = 1;
    walk->order[walk->nr++] = world_encode(&start);
    for (unsigned i = 0; i < walk->nr && !walk->fault; i++) {
        s.from = world_decode(walk->order[i]);
        ck_assert_uint_eq(world_encode(&s.from), walk->order[i]);
        walk->fault = world_fault(&s.from);
        world_successors(&s, deaths);
        for (unsigned k = 0; k < s.nr; k++) {
            unsigned code = world_encode(&s.list[k]);
            if (walk->seen[code])
                continue;
            walk->seen[code] = 1;
            walk->order[walk->nr++] = code;
        }
    }
}

static void walk_free(struct walk *walk)
{
    free(walk->seen);
    free(walk->order);
}

static struct tables production(void)
{
    struct tables t;
    memcpy(t.source, owner_source_rules, sizeof(t.source));
    memcpy(t.dest, owner_dest_rules, sizeof(t.dest));
    return t;
}

START_TEST(test_never_both)
{
    struct tables t = production();
    struct walk walk;
    walk_all(&walk, &t, true);
    ck_assert_msg(!walk.fault, "%s", walk.fault);
    ck_assert_uint_gt(walk.nr, 200); // it has walked something
    // Every state of both sides was met (DOUBT and GONE included).
    unsigned sources = 0, dests = 0;
    for (unsigned i = 0; i < walk.nr; i++) {
        struct world w = world_decode(walk.order[i]);
        sources |= 1u << w.source;
        dests |= 1u << w.dest;
    }
    ck_assert_uint_eq(sources, (1u << SOURCE_STATES) - 1);
    ck_assert_uint_eq(dests, (1u << DEST_STATES) - 1);
    walk_free(&walk);
}
END_TEST

// The guest is somewhere: alive on exactly one side and settled there.
static bool settled(const struct world *w)
{
    return (w->source == SOURCE_RUNNING &&
            (w->dest == DEST_WAITING || w->dest == DEST_PREPARED || w->dest == DEST_ABORTED)) ||
           (w->source == SOURCE_GONE && w->dest == DEST_RUNNING);
}

// As long as both processes live, every situation has a way to a guest that runs, without force.
START_TEST(test_never_none)
{
    struct tables t = production();
    struct walk walk;
    struct successors s = {.tables = &t};
    walk_all(&walk, &t, false);
    uint8_t *good = calloc(STATES, 1);
    ck_assert_ptr_nonnull(good);
    for (bool changed = true; changed;) {
        changed = false;
        for (unsigned i = walk.nr; i-- > 0;) {
            unsigned code = walk.order[i];
            if (good[code])
                continue;
            s.from = world_decode(code);
            bool reach = settled(&s.from);
            world_successors(&s, false);
            for (unsigned k = 0; k < s.nr && !reach; k++)
                reach = good[world_encode(&s.list[k])];
            good[code] = reach;
            changed |= reach;
        }
    }
    for (unsigned i = 0; i < walk.nr; i++)
        ck_assert_msg(good[walk.order[i]], "stuck: source %s, destination %s",
                      owner_source_name(world_decode(walk.order[i]).source),
                      owner_dest_name(world_decode(walk.order[i]).dest));
    free(good);
    walk_free(&walk);
}
END_TEST

// Before COMMIT may have left, each failure gives the guest back to the source at once.
START_TEST(test_failure_before_commit)
{
    static const enum owner_source before[] = {SOURCE_RUNNING, SOURCE_STOPPED, SOURCE_READY};
    static const enum owner_source_event failures[] = {SOURCE_EV_LOST, SOURCE_EV_REFUSED,
                                                       SOURCE_EV_CANCEL};
    for (unsigned i = 0; i < ARRAY_SIZE(before); i++)
        for (unsigned k = 0; k < ARRAY_SIZE(failures); k++) {
            enum owner_source state = before[i];
            enum owner_action action;
            ck_assert_int_eq(owner_source_step(&state, failures[k], &action), 0);
            ck_assert_int_eq(state, SOURCE_RUNNING);
            ck_assert_int_eq(action, before[i] == SOURCE_RUNNING ? OWNER_NONE : OWNER_RESUME);
        }
}
END_TEST

// After it, no event but an explicit no, a refusal or a human's word lets the source run.
START_TEST(test_only_no_resumes)
{
    static const enum owner_source after[] = {SOURCE_COMMITTING, SOURCE_DOUBT, SOURCE_OWES,
                                              SOURCE_SEVERED, SOURCE_GONE};
    for (unsigned i = 0; i < ARRAY_SIZE(after); i++)
        for (unsigned event = 0; event < SOURCE_EVENTS; event++) {
            enum owner_source state = after[i];
            enum owner_action action;
            int ret = owner_source_step(&state, event, &action);
            bool may =
                (after[i] == SOURCE_DOUBT && (event == SOURCE_EV_NO || event == SOURCE_EV_FORCE)) ||
                (after[i] == SOURCE_COMMITTING && event == SOURCE_EV_REFUSED);
            ck_assert_int_eq(state == SOURCE_RUNNING, may);
            ck_assert_int_eq(action == OWNER_RESUME, may);
            if (ret)
                ck_assert_int_eq(state, after[i]);
        }
}
END_TEST

// Once aborted, nothing makes a destination run; once running, nothing stops it being the owner.
START_TEST(test_dest_final)
{
    for (unsigned event = 0; event < DEST_EVENTS; event++) {
        enum owner_dest state = DEST_ABORTED;
        enum owner_action action;
        owner_dest_step(&state, event, &action);
        ck_assert_int_eq(state, DEST_ABORTED);
        ck_assert_int_ne(action, OWNER_RUN);
        for (state = DEST_LACKING; state <= DEST_RUNNING; state++) {
            enum owner_dest after = state;
            owner_dest_step(&after, event, &action);
            ck_assert_int_ge(after, DEST_LACKING);
            ck_assert_int_le(after, DEST_RUNNING);
            ck_assert(state != DEST_RUNNING || after == DEST_RUNNING);
            ck_assert_int_ne(action, OWNER_SAY_NO);
            ck_assert_int_ne(action, OWNER_DISCARD);
        }
    }
}
END_TEST

// The walk finds what it is there to find: each of these plausible mistakes.
START_TEST(test_walk_finds_mistakes)
{
    for (unsigned mistake = 0; mistake < 9; mistake++) {
        struct tables t = production();
        switch (mistake) {
        case 0: // resume when nobody answers
            t.source[SOURCE_DOUBT][SOURCE_EV_NO_ANSWER].next = SOURCE_RUNNING;
            break;
        case 1: // resume when the link breaks after COMMIT
            t.source[SOURCE_COMMITTING][SOURCE_EV_LOST].next = SOURCE_RUNNING;
            break;
        case 2: // resume when cancelled after COMMIT
            t.source[SOURCE_COMMITTING][SOURCE_EV_CANCEL].next = SOURCE_RUNNING;
            break;
        case 3: // a late COMMIT revives an aborted destination
            t.dest[DEST_ABORTED][DEST_EV_COMMIT] =
                (struct owner_rule) {true, DEST_RUNNING, OWNER_RUN};
            break;
        case 4: // answering no without meaning it
            t.dest[DEST_PREPARED][DEST_EV_QUERY].next = DEST_PREPARED;
            break;
        case 6: // a broken link counts as the end of post-copy
            t.source[SOURCE_OWES][SOURCE_EV_LOST].next = SOURCE_GONE;
            break;
        case 7: // a destination that lacks pages may be told to forget the guest
            t.dest[DEST_SEVERED][DEST_EV_LOST].next = DEST_ABORTED;
            break;
        case 8: // the source takes the guest back when the link breaks in post-copy
            t.source[SOURCE_OWES][SOURCE_EV_LOST].next = SOURCE_RUNNING;
            break;
        case 5: // letting go before the destination has taken over
            t.source[SOURCE_COMMITTING][SOURCE_EV_LOST].next = SOURCE_GONE;
            break;
        }
        struct walk walk;
        walk_all(&walk, &t, true);
        ck_assert_msg(walk.fault, "mistake %u was not found", mistake);
        walk_free(&walk);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("owner");
    TCase *tc = tcase_create("owner");
    tcase_set_timeout(tc, 100);
    tcase_add_test(tc, test_never_both);
    tcase_add_test(tc, test_never_none);
    tcase_add_test(tc, test_failure_before_commit);
    tcase_add_test(tc, test_only_no_resumes);
    tcase_add_test(tc, test_dest_final);
    tcase_add_test(tc, test_walk_finds_mistakes);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
