// SPDX-License-Identifier: Apache-2.0
// In which order post-copy sends pages that nobody has asked for yet: bubbling pre-paging (Hines,
// Deshpande, Gopalan; VEE'09 and OSR'09). Pure: no clock, no thread, no memory of its own, so that
// the pusher and the simulator in tests/unit/test_prepage.c drive the same code.
//
//   unsent  ........................................................
//   sent         <=====x====>             <==y===========>
//                down  |  up              a pivot where the guest faulted, with two growing edges
//
//   none          nothing: only what is asked for
//   push          upwards once, whatever is asked for
//   forward       upwards from the last fault, round the end
//   bubble        both ways from the last fault, skipping what is sent
//   multi-bubble  both ways from each of the k last faults; an edge stops where pages are sent. One
//                 more edge goes upwards from page 0 and never stops: so everything is sent once.
//
// What multi-bubble learns from the faults:
// - direction: a fault just beyond an edge means the guest outran it. The edge goes on from there,
//   gets twice as much a turn, and the other edge of this pivot gets little.
// - stride: four faults at equal distances, with unsent pages between them, make a pivot that sends
//   every n-th page.
// - k: a fault where a forgotten pivot ended says that k is too small, pivots that were never hit
//   again say it is too large.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"

enum prepage_kind {
    PREPAGE_NONE,
    PREPAGE_PUSH,
    PREPAGE_FORWARD,
    PREPAGE_BUBBLE,
    PREPAGE_MULTI,
    PREPAGE_KINDS,
};

enum {
    PREPAGE_K = 7, // the papers' best
    PREPAGE_K_MIN = 2,
    PREPAGE_K_MAX = 64,
    PREPAGE_HISTORY = 16,
    PREPAGE_BATCH = 8, // pages an edge sends in its turn, at first
    PREPAGE_BATCH_MAX = 64,
};

struct prepage_pivot {
    uint64_t up, down; // the next page upwards is `up`, the next one downwards `down` - 1
    // Not 0: `up` moves by this much, and there is no other edge; `down` is where it began. At the
    // end of memory it begins again one page higher: the next column of a matrix.
    int64_t stride;
    bool up_live, down_live;
    int lean; // > 0: the guest goes upwards here
    unsigned batch, hits;
};

struct prepage {
    enum prepage_kind kind;
    uint64_t pages;  // of the guest
    uint64_t cursor; // of the edge that never stops
    unsigned k, nr;
    struct prepage_pivot pivot[PREPAGE_K_MAX]; // the latest first
    struct prepage_pivot ghost[PREPAGE_K_MAX]; // forgotten ones, a ring
    unsigned ghosts, idle_evictions;
    uint64_t history[PREPAGE_HISTORY]; // the last faults, a ring
    unsigned faults;                   // so far
    unsigned turn, other, left;        // whose turn it is, whose is next, what is left of it
    int lean;                          // what pivots have shown so far
    int64_t stride;                    // the last one seen; 0: none
};

void prepage_init(struct prepage *p, enum prepage_kind kind, uint64_t pages);

// The guest waits for `page`, which was unsent until now; its bit in `unsent` is clear already.
// Faults on pages under way change nothing and are not told.
void prepage_fault(struct prepage *p, const uint64_t *unsent, uint64_t page);

// The next run of at most `max` unsent pages: its length, its first page in `*first`; 0 when none
// is left (or for PREPAGE_NONE). Does not change `unsent`: the caller clears what it sends.
uint64_t prepage_next(struct prepage *p, const uint64_t *unsent, uint64_t max, uint64_t *first);

const char *prepage_name(enum prepage_kind kind);
int prepage_parse(const char *text, enum prepage_kind *kind, struct error *err);
