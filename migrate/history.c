// SPDX-License-Identifier: Apache-2.0
#include "migrate/history.h"

#include <stdlib.h>

#include "vmm/util.h"

void history_init(struct history *h)
{
    *h = (struct history) {.start = time_ns()};
    pthread_mutex_init(&h->lock, NULL);
}

void history_start(struct history *h)
{
    h->start = time_ns();
    h->events = h->events ? h->events : calloc(HISTORY_MAX, sizeof(*h->events));
}

void history_add(struct history *h, enum history_kind kind, uint64_t a, uint64_t b, uint64_t c)
{
    if (!h->events)
        return;
    pthread_mutex_lock(&h->lock);
    if (h->nr < HISTORY_MAX)
        h->events[h->nr++] = (struct history_event) {time_ns() - h->start, kind, a, b, c};
    else
        h->dropped++;
    pthread_mutex_unlock(&h->lock);
}

void history_free(struct history *h)
{
    free(h->events);
    h->events = NULL;
    pthread_mutex_destroy(&h->lock);
}
