// SPDX-License-Identifier: Apache-2.0
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "devices/vsock_internal.h"

_Static_assert((uint64_t)VSOCK_CONNECTIONS_MAX *VSOCK_WINDOW_SMALL <= VSOCK_BUFFERS_MAX,
               "small windows for all");

void vsock_table_init(struct virtio_vsock *s)
{
    for (unsigned i = 0; i < VSOCK_STATES; i++)
        TAILQ_INIT(&s->lists[i]);
    TAILQ_INIT(&s->ready);
    s->next_port = 1u << 30; // above what programs choose for themselves
    s->listen_fd = -1;
}

static struct vsock_connection **bucket(struct virtio_vsock *s, uint32_t host_port,
                                        uint32_t guest_port)
{
    uint64_t key = (uint64_t)host_port << 32 | guest_port;
    return &s->buckets[(key * 0x9e3779b97f4a7c15ull >> 32) % VSOCK_BUCKETS];
}

struct vsock_connection *vsock_find(struct virtio_vsock *s, uint32_t host_port, uint32_t guest_port)
{
    struct vsock_connection *c = *bucket(s, host_port, guest_port);
    while (c && (c->host_port != host_port || c->guest_port != guest_port))
        c = c->next;
    return c;
}

static void list_add(struct virtio_vsock *s, struct vsock_connection *c, enum vsock_state state)
{
    c->state = state;
    c->deadline = s->ticks + (uint64_t)VSOCK_TIMEOUT_MS * 1000000 / VSOCK_TICK_NS;
    TAILQ_INSERT_TAIL(&s->lists[state], c, by_state);
}

// A connection whose host side has ended only waits for the guest to say so, too.
static bool room_make(struct virtio_vsock *s)
{
    struct vsock_connection *c = TAILQ_FIRST(&s->lists[VSOCK_LINGER]);
    if (!c)
        return false;
    const struct vsock_reset r = {VSOCK_CID_HOST, c->host_port, c->guest_port, VSOCK_TYPE_STREAM};
    vsock_reset_add(s, &r);
    vsock_kill(s, c);
    return true;
}

struct vsock_connection *vsock_new(struct virtio_vsock *s, int fd, enum vsock_state state)
{
    bool room = s->count < VSOCK_CONNECTIONS_MAX || room_make(s);
    struct vsock_connection *c = room ? calloc(1, sizeof(*c)) : NULL;
    if (!c) {
        if (fd >= 0)
            close(fd);
        return NULL;
    }
    c->fd = fd;
    list_add(s, c, state);
    s->count++;
    return c;
}

// Large windows as long as everybody else still gets a small one.
static uint32_t window_choose(const struct virtio_vsock *s)
{
    uint64_t others = (uint64_t)(VSOCK_CONNECTIONS_MAX - s->entered - 1) * VSOCK_WINDOW_SMALL;
    uint64_t used = s->promised + others;
    return used + VSOCK_WINDOW <= VSOCK_BUFFERS_MAX ? VSOCK_WINDOW : VSOCK_WINDOW_SMALL;
}

void vsock_enter(struct virtio_vsock *s, struct vsock_connection *c)
{
    struct vsock_connection **first = bucket(s, c->host_port, c->guest_port);
    c->next = *first;
    *first = c;
    c->in_table = true;
    c->flow.window = window_choose(s);
    s->promised += c->flow.window;
    s->entered++;
    s->opened++;
}

void vsock_state_set(struct virtio_vsock *s, struct vsock_connection *c, enum vsock_state state)
{
    TAILQ_REMOVE(&s->lists[c->state], c, by_state);
    list_add(s, c, state);
}

void vsock_kill(struct virtio_vsock *s, struct vsock_connection *c)
{
    if (c->state == VSOCK_DEAD)
        return;
    if (c->in_table) {
        struct vsock_connection **link = bucket(s, c->host_port, c->guest_port);
        while (*link != c)
            link = &(*link)->next;
        *link = c->next;
        s->promised -= c->flow.window;
        s->entered--;
        flow_forward(&c->flow, flow_buffered(&c->flow));
    }
    if (c->in_ready)
        TAILQ_REMOVE(&s->ready, c, by_turn);
    c->in_table = c->in_ready = false;
    if (c->fd >= 0)
        shutdown(c->fd, SHUT_RDWR); // the host program need not wait for vsock_reap
    vsock_state_set(s, c, VSOCK_DEAD);
    s->count--;
}

void vsock_kill_all(struct virtio_vsock *s)
{
    for (unsigned state = 0; state < VSOCK_DEAD; state++)
        while (!TAILQ_EMPTY(&s->lists[state]))
            vsock_kill(s, TAILQ_FIRST(&s->lists[state]));
}

void vsock_host_close(struct vsock_connection *c)
{
    vsock_watch_close(c->in);
    vsock_watch_close(c->out);
    c->in = c->out = NULL;
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->readable = false;
    flow_forward(&c->flow, flow_buffered(&c->flow));
}

void vsock_reap(struct virtio_vsock *s)
{
    struct vsock_connection *c;
    while ((c = TAILQ_FIRST(&s->lists[VSOCK_DEAD]))) {
        TAILQ_REMOVE(&s->lists[VSOCK_DEAD], c, by_state);
        vsock_host_close(c);
        free(c);
    }
}

bool vsock_wants(const struct vsock_connection *c)
{
    return c->owed || (c->state == VSOCK_OPEN && c->readable && flow_credit(&c->flow));
}

void vsock_schedule(struct virtio_vsock *s, struct vsock_connection *c)
{
    if (c->state == VSOCK_DEAD || c->in_ready)
        return;
    if (flow_credit(&c->flow)) {
        c->credit_asked = false;
    } else if (c->state == VSOCK_OPEN && c->readable && !c->credit_asked) {
        c->credit_asked = true;
        c->owed |= OWES_CREDIT_REQUEST;
    }
    if (!vsock_wants(c))
        return;
    TAILQ_INSERT_TAIL(&s->ready, c, by_turn);
    c->in_ready = true;
}

void vsock_abort(struct virtio_vsock *s, struct vsock_connection *c)
{
    if (c->state == VSOCK_DEAD)
        return;
    vsock_host_close(c);
    if (c->state == VSOCK_DRAIN || c->owed & OWES_REQUEST) { // the guest knows nothing of it
        vsock_kill(s, c);
        return;
    }
    vsock_state_set(s, c, VSOCK_LINGER);
    c->owed = OWES_RST;
    vsock_schedule(s, c);
}

void vsock_advance(struct virtio_vsock *s, struct vsock_connection *c)
{
    bool nothing_buffered = !flow_buffered(&c->flow);
    bool to_host_ended =
        c->host_shut & VSOCK_NO_RECEIVE || (c->guest_shut & VSOCK_NO_SEND && nothing_buffered);
    bool to_guest_ended = c->host_shut & VSOCK_NO_SEND || c->guest_shut & VSOCK_NO_RECEIVE;
    if (c->state == VSOCK_DRAIN && to_host_ended) {
        vsock_kill(s, c);
        return;
    }
    if (c->state == VSOCK_OPEN && to_host_ended && to_guest_ended) {
        vsock_host_close(c);
        vsock_state_set(s, c, VSOCK_LINGER);
    } else if (c->state == VSOCK_OPEN && c->guest_shut & VSOCK_NO_SEND && nothing_buffered) {
        shutdown(c->fd, SHUT_WR);
    }
    // A guest that has said all it had to say waits for this (5.10.6.5). One that may still have
    // unread data does not get it: it would throw them away.
    if (c->state == VSOCK_LINGER && c->guest_shut == VSOCK_NEITHER)
        c->owed = OWES_RST;
    vsock_schedule(s, c);
}

void vsock_reset_add(struct virtio_vsock *s, const struct vsock_reset *r)
{
    if (s->resets_nr == VSOCK_RESETS) {
        s->dropped++;
        return;
    }
    s->resets[(s->resets_head + s->resets_nr++) % VSOCK_RESETS] = *r;
}
