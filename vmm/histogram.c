// SPDX-License-Identifier: Apache-2.0
#include "vmm/histogram.h"

#include <inttypes.h>
#include <stdio.h>

uint64_t histogram_bound_ns(unsigned bucket)
{
    return bucket >= HISTOGRAM_BUCKETS - 1 ? UINT64_MAX
                                           : UINT64_C(1) << (HISTOGRAM_FIRST_SHIFT + bucket);
}

// The least b with ns <= 2^(FIRST_SHIFT + b).
static unsigned bucket_of(uint64_t ns)
{
    if (ns <= UINT64_C(1) << HISTOGRAM_FIRST_SHIFT)
        return 0;
    unsigned bits = 64 - (unsigned)__builtin_clzll(ns - 1), bucket = bits - HISTOGRAM_FIRST_SHIFT;
    return bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1;
}

void histogram_add(struct histogram *h, uint64_t ns)
{
    atomic_fetch_add_explicit(&h->counts[bucket_of(ns)], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&h->sum_ns, ns, memory_order_relaxed);
}

static json_int_t shown(uint64_t value)
{
    return value > INT64_MAX ? INT64_MAX : (json_int_t)value;
}

json_t *histogram_show(const struct histogram *h)
{
    uint64_t count = 0;
    json_t *buckets = json_object();
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
        char bound[24] = "+Inf";
        uint64_t n = atomic_load_explicit(&h->counts[i], memory_order_relaxed);
        if (!n)
            continue;
        if (i < HISTOGRAM_BUCKETS - 1)
            snprintf(bound, sizeof(bound), "%" PRIu64, histogram_bound_ns(i));
        json_object_set_new(buckets, bound, json_integer(shown(n)));
        count += n;
    }
    return json_pack("{s:I, s:I, s:o}", "count", shown(count), "sum_ns",
                     shown(atomic_load_explicit(&h->sum_ns, memory_order_relaxed)), "le_ns",
                     buckets);
}
