// SPDX-License-Identifier: Apache-2.0
// How long things took, counted in buckets of powers of two: 1.024 us and below, up to 17.2 s, and
// above. Whoever adds needs no lock; whoever looks meanwhile may see one that is counted and not
// yet summed.
#pragma once

#include <jansson.h>
#include <stdatomic.h>
#include <stdint.h>

enum { HISTOGRAM_FIRST_SHIFT = 10, HISTOGRAM_BUCKETS = 26 }; // the last one has no bound

struct histogram {
    _Atomic uint64_t counts[HISTOGRAM_BUCKETS]; // in this bucket alone
    _Atomic uint64_t sum_ns;
};

void histogram_add(struct histogram *h, uint64_t ns); // any thread
// The bucket's upper bound, inclusive; UINT64_MAX of the last.
uint64_t histogram_bound_ns(unsigned bucket);
// {"count": 3, "sum_ns": 4000, "le_ns": {"1024": 2, "4096": 1}}: buckets that are not empty, each
// for itself; "+Inf" is the last one. The caller's reference.
json_t *histogram_show(const struct histogram *h);
