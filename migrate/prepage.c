// SPDX-License-Identifier: Apache-2.0
#include "migrate/prepage.h"

#include <errno.h>
#include <string.h>

#include "vmm/bitmap.h"

enum {
    NEAR = 64,      // pages: a fault this far beyond an edge is the same stream, which outran it
    NEAR_GHOST = 4, // the same for a forgotten pivot: chance must not bring it back
    GAP = 32, // an edge goes on behind so many sent pages: after pre-copy what is left has holes
    LEAN_MAX = 4,
    IDLE_EVICTIONS = 4, // so many pivots forgotten without a hit make k smaller by one
};

static const char *const names[PREPAGE_KINDS] = {"none", "push", "forward", "bubble",
                                                 "multi-bubble"};

const char *prepage_name(enum prepage_kind kind)
{
    return names[kind];
}

int prepage_parse(const char *text, enum prepage_kind *kind, struct error *err)
{
    for (unsigned i = 0; i < PREPAGE_KINDS; i++)
        if (!strcmp(text, names[i])) {
            *kind = (enum prepage_kind)i;
            return 0;
        }
    return error_set(err, -EINVAL,
                     "prepaging '%s': expected none, push, forward, bubble or multi-bubble", text);
}

void prepage_init(struct prepage *p, enum prepage_kind kind, uint64_t pages)
{
    *p = (struct prepage) {.kind = kind, .pages = pages, .k = PREPAGE_K};
    if (kind == PREPAGE_BUBBLE) { // the first pivot is page 0
        p->nr = 1;
        p->pivot[0] = (struct prepage_pivot) {.up_live = true, .batch = PREPAGE_BATCH};
    }
}

// --- runs at an edge

static uint64_t run_up(const uint64_t *unsent, uint64_t from, uint64_t limit, uint64_t pages,
                       uint64_t max, uint64_t *first)
{
    uint64_t start = bitmap_find(unsent, limit, from, true);
    if (start >= limit)
        return 0;
    uint64_t most = start + max < pages ? start + max : pages;
    *first = start;
    return bitmap_find(unsent, most, start, false) - start;
}

static uint64_t run_down(const uint64_t *unsent, uint64_t below, uint64_t limit, uint64_t max,
                         uint64_t *first)
{
    uint64_t last = bitmap_find_below(unsent, below);
    if (last == UINT64_MAX || last < limit)
        return 0;
    uint64_t n = 1;
    while (n < max && n <= last && bitmap_test(unsent, last - n))
        n++;
    *first = last - n + 1;
    return n;
}

// `skip`: how many sent pages the edge passes over.
static uint64_t edge_up(struct prepage *p, struct prepage_pivot *v, const uint64_t *unsent,
                        uint64_t skip, uint64_t max, uint64_t *first)
{
    uint64_t limit = p->pages - v->up < skip ? p->pages : v->up + skip;
    uint64_t n = v->up_live ? run_up(unsent, v->up, limit, p->pages, max, first) : 0;
    v->up_live = n;
    v->up = n ? *first + n : v->up;
    return n;
}

static uint64_t edge_down(struct prepage_pivot *v, const uint64_t *unsent, uint64_t skip,
                          uint64_t max, uint64_t *first)
{
    uint64_t limit = v->down < skip ? 0 : v->down - skip;
    uint64_t n = v->down_live ? run_down(unsent, v->down, limit, max, first) : 0;
    v->down_live = n;
    v->down = n ? *first : v->down;
    return n;
}

static bool step_stride(const struct prepage *p, uint64_t *page, int64_t stride)
{
    uint64_t next = *page + (uint64_t)stride;
    if (stride < 0 ? next > *page : next >= p->pages || next < *page)
        return false;
    *page = next;
    return true;
}

static void stride_begin(const struct prepage *p, struct prepage_pivot *v, uint64_t page)
{
    v->up = v->down = page;
    v->up_live = step_stride(p, &v->up, v->stride);
}

static uint64_t edge_stride(struct prepage *p, struct prepage_pivot *v, const uint64_t *unsent,
                            uint64_t *first)
{
    if (!v->up_live)
        return 0;
    for (unsigned i = 0; i < GAP; i++) {
        uint64_t page = v->up;
        if (!step_stride(p, &v->up, v->stride)) { // the next column of the matrix
            v->up = ++v->down;
            if (v->down >= p->pages)
                break;
        }
        if (bitmap_test(unsent, page)) {
            *first = page;
            return 1;
        }
    }
    v->up_live = false;
    return 0;
}

// --- what a fault teaches

static struct prepage_pivot *to_front(struct prepage *p, unsigned i)
{
    struct prepage_pivot v = p->pivot[i];
    memmove(&p->pivot[1], &p->pivot[0], i * sizeof(v));
    p->pivot[0] = v;
    return &p->pivot[0];
}

// +1 or -1 when the fault is just beyond this edge.
static int beyond(const struct prepage_pivot *v, uint64_t page, uint64_t near)
{
    if (v->stride)
        return 0;
    if (page >= v->up && page - v->up < near)
        return 1;
    return page < v->down && v->down - page <= near ? -1 : 0;
}

static void hit(struct prepage *p, struct prepage_pivot *v, int way, uint64_t page)
{
    v->hits++;
    v->batch = v->batch * 2 < PREPAGE_BATCH_MAX ? v->batch * 2 : PREPAGE_BATCH_MAX;
    if (v->lean * way < LEAN_MAX)
        v->lean += way;
    if (p->lean * way < LEAN_MAX)
        p->lean += way;
    if (way > 0) {
        v->up = page + 1;
        v->up_live = v->up < p->pages;
    } else {
        v->down = page;
        v->down_live = page > 0;
    }
}

static bool was_fault(const struct prepage *p, uint64_t page)
{
    unsigned n = p->faults < PREPAGE_HISTORY ? p->faults : PREPAGE_HISTORY;
    for (unsigned i = 0; i < n; i++)
        if (p->history[i] == page)
            return true;
    return false;
}

static bool all_sent_between(const uint64_t *unsent, uint64_t a, uint64_t b)
{
    uint64_t low = a < b ? a : b, high = a < b ? b : a;
    return high - low <= 1 || bitmap_find(unsent, high, low + 1, true) == high;
}

// The distance when the fault is the second of a series at the last distance seen, or the fourth of
// one at another, with unsent pages in between; else 0. (In a sweep everything behind the fault is
// sent, however equal the distances are.)
static int64_t stride_of(struct prepage *p, const uint64_t *unsent, uint64_t page)
{
    uint64_t known = page - (uint64_t)p->stride;
    if (p->stride && was_fault(p, known) && !all_sent_between(unsent, known, page))
        return p->stride;
    unsigned n = p->faults < PREPAGE_HISTORY ? p->faults : PREPAGE_HISTORY;
    for (unsigned i = 1; i <= n; i++) { // the latest first
        uint64_t d = page - p->history[(p->faults - i) % PREPAGE_HISTORY];
        if (was_fault(p, page - 2 * d) && was_fault(p, page - 3 * d) &&
            !all_sent_between(unsent, page - d, page))
            return p->stride = (int64_t)d;
    }
    return 0;
}

static void forget_last(struct prepage *p)
{
    struct prepage_pivot *v = &p->pivot[--p->nr];
    p->ghost[p->ghosts++ % PREPAGE_K_MAX] = *v;
    if (!v->hits && ++p->idle_evictions % IDLE_EVICTIONS == 0 && p->k > PREPAGE_K_MIN)
        p->k--;
}

// A pivot that was forgotten too early comes back with what it had learned.
static bool recall(struct prepage *p, uint64_t page, struct prepage_pivot *v)
{
    unsigned n = p->ghosts < PREPAGE_K_MAX ? p->ghosts : PREPAGE_K_MAX;
    for (unsigned i = 0; i < n; i++) {
        struct prepage_pivot *g = &p->ghost[i];
        int way = beyond(g, page, NEAR_GHOST);
        if (!way)
            continue;
        *v = *g;
        hit(p, v, way, page);
        p->k += p->k < PREPAGE_K_MAX;
        g->up = UINT64_MAX; // only once
        g->down = 0;
        return true;
    }
    return false;
}

static void pivot_new(struct prepage *p, const struct prepage_pivot *v)
{
    while (p->nr >= p->k)
        forget_last(p);
    if (p->nr && !p->pivot[0].hits && !p->pivot[0].stride)
        p->pivot[0].batch = PREPAGE_BATCH;
    p->pivot[p->nr] = *v;
    to_front(p, p->nr++);
}

// A pivot with a stride that the guest outran goes on from there.
static bool stride_hit(struct prepage *p, uint64_t page)
{
    for (unsigned i = 0; i < p->nr; i++) {
        struct prepage_pivot *v = &p->pivot[i];
        int64_t ahead = (int64_t)(page - v->up);
        if (!v->stride || ahead % v->stride || ahead / v->stride < 0 || ahead / v->stride >= NEAR)
            continue;
        v = to_front(p, i);
        v->hits++;
        stride_begin(p, v, page);
        return true;
    }
    return false;
}

static void multi_fault(struct prepage *p, const uint64_t *unsent, uint64_t page)
{
    struct prepage_pivot v = {.up = page + 1,
                              .down = page,
                              .up_live = page + 1 < p->pages,
                              .down_live = page > 0,
                              .lean = p->lean / 2,
                              .batch = PREPAGE_BATCH};
    if (stride_hit(p, page))
        return;
    int64_t stride = stride_of(p, unsent, page);
    if (stride) {
        v.stride = stride;
        v.down_live = false;
        v.batch = PREPAGE_BATCH_MAX;
        stride_begin(p, &v, page);
        pivot_new(p, &v);
        return;
    }
    for (unsigned i = 0; i < p->nr; i++) {
        int way = beyond(&p->pivot[i], page, NEAR);
        if (way) {
            hit(p, to_front(p, i), way, page);
            return;
        }
    }
    if (!recall(p, page, &v) && v.lean * v.lean < LEAN_MAX)
        v.lean = 0;
    pivot_new(p, &v);
}

static void bubble_fault(struct prepage *p, uint64_t page)
{
    struct prepage_pivot *v = &p->pivot[0];
    int way = beyond(v, page, NEAR);
    if (way) {
        hit(p, v, way, page);
    } else {
        v->lean = 0;
        v->batch = PREPAGE_BATCH;
    }
    v->up = page + 1;
    v->down = page;
    v->up_live = v->up < p->pages;
    v->down_live = page > 0;
}

void prepage_fault(struct prepage *p, const uint64_t *unsent, uint64_t page)
{
    if (p->kind == PREPAGE_FORWARD)
        p->cursor = page + 1;
    else if (p->kind == PREPAGE_BUBBLE)
        bubble_fault(p, page);
    else if (p->kind == PREPAGE_MULTI)
        multi_fault(p, unsent, page);
    p->history[p->faults++ % PREPAGE_HISTORY] = page;
    p->turn = p->left = 0; // the newest pivot first
}

// --- whose turn it is

// Turn 2i and 2i+1 are the edges of pivot i, its better one first; the last turn is the edge that
// never stops.
static unsigned edge_batch(const struct prepage *p, unsigned pivot, bool up)
{
    const struct prepage_pivot *v = &p->pivot[pivot];
    bool unlikely = up ? v->lean < -1 : v->lean > 1;
    // One that was never hit again has probably had what the guest wanted there.
    unsigned old = v->hits || v->stride ? 0 : pivot < 3 ? pivot : 3;
    return unlikely ? v->batch / 8 : v->batch >> old;
}

static bool turn_up(const struct prepage *p, unsigned turn)
{
    return (turn % 2 == 0) == (p->pivot[turn / 2].lean >= 0);
}

// The newest pivot's edges, one of the others, the newest's again, and so on.
static void next_turn(struct prepage *p)
{
    p->left = 0;
    if (p->turn == 0 && p->nr) {
        struct prepage_pivot *v = &p->pivot[0]; // no fault since its last turn: it was right
        v->batch = v->batch * 2 < PREPAGE_BATCH_MAX ? v->batch * 2 : PREPAGE_BATCH_MAX;
        p->turn = 1;
    } else if (p->turn == 1) {
        p->other = p->other < 2 * p->nr && p->other >= 2 ? p->other + 1 : 2;
        p->turn = p->other;
    } else {
        p->turn = 0;
    }
}

static uint64_t sticky_next(struct prepage *p, const uint64_t *unsent, uint64_t max,
                            uint64_t *first)
{
    uint64_t n = run_up(unsent, p->cursor, p->pages, p->pages, max, first);
    p->cursor = n ? *first + n : p->pages;
    return n;
}

static uint64_t turn_take(struct prepage *p, const uint64_t *unsent, uint64_t skip, uint64_t max,
                          uint64_t *first)
{
    if (p->turn >= 2 * p->nr) {
        p->left = p->left ? p->left : PREPAGE_BATCH;
        return sticky_next(p, unsent, max < p->left ? max : p->left, first);
    }
    struct prepage_pivot *v = &p->pivot[p->turn / 2];
    bool up = turn_up(p, p->turn);
    if (!p->left)
        p->left = edge_batch(p, p->turn / 2, up);
    max = max < p->left ? max : p->left;
    if (v->stride)
        return up ? edge_stride(p, v, unsent, first) : 0;
    return up ? edge_up(p, v, unsent, skip, max, first) : edge_down(v, unsent, skip, max, first);
}

// `skip` is for the pivots' edges; `sticky`: whether there is an edge that never stops.
static uint64_t bubbles_next(struct prepage *p, const uint64_t *unsent, uint64_t skip, bool sticky,
                             uint64_t max, uint64_t *first)
{
    for (unsigned tries = 0; tries <= 3 * (2 * p->nr + 1); tries++) {
        if (p->turn == 2 * p->nr && !sticky)
            next_turn(p);
        uint64_t n = turn_take(p, unsent, skip, max, first);
        p->left = n < p->left ? p->left - (unsigned)n : 0;
        if (!n || !p->left)
            next_turn(p);
        if (n)
            return n;
    }
    return 0;
}

uint64_t prepage_next(struct prepage *p, const uint64_t *unsent, uint64_t max, uint64_t *first)
{
    uint64_t n = 0;
    switch (p->kind) {
    case PREPAGE_FORWARD:
        n = sticky_next(p, unsent, max, first);
        if (!n) {
            p->cursor = 0;
            n = sticky_next(p, unsent, max, first);
        }
        break;
    case PREPAGE_PUSH:
        n = sticky_next(p, unsent, max, first);
        break;
    case PREPAGE_BUBBLE:
        n = bubbles_next(p, unsent, p->pages, false, max, first);
        break;
    case PREPAGE_MULTI:
        n = bubbles_next(p, unsent, GAP, true, max, first);
        break;
    default:
        break;
    }
    return n;
}
