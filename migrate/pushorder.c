// SPDX-License-Identifier: Apache-2.0
#include "migrate/pushorder.h"

#include "migrate/bitmap.h"

static void plain_fault(struct pushorder *order, uint64_t page)
{
}

static uint64_t plain_next(struct pushorder *order, const uint64_t *unsent, uint64_t max,
                           uint64_t *first)
{
    // Pages are only ever taken out of `unsent`, so one pass upwards meets them all.
    uint64_t start = bitmap_find(unsent, order->pages, order->cursor, true);
    uint64_t end = bitmap_find(unsent, order->pages, start, false);
    if (end - start > max)
        end = start + max;
    order->cursor = end;
    *first = start;
    return end - start;
}

const struct pushorder_ops pushorder_plain = {
    .name = "push",
    .fault = plain_fault,
    .next = plain_next,
};

void pushorder_init(struct pushorder *order, const struct pushorder_ops *ops, uint64_t pages)
{
    *order = (struct pushorder) {.ops = ops, .pages = pages};
}
