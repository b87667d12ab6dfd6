// SPDX-License-Identifier: Apache-2.0
#include "tests/bare/moves.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "migrate/channel.h"
#include "tests/check_ok.h"

// --- the destination

struct receive_params arrival_params(void)
{
    struct receive_params params;
    receive_params_default(&params);
    params.one_try = true;
    params.ram_max = 64 * GiB;
    return params;
}

static void *arrival_main(void *arg)
{
    struct arrival *a = arg;
    a->ret = receive_run(a->receive, &a->vm, &a->report, &a->err);
    close(a->listen_fd);
    return NULL;
}

void arrival_start(struct arrival *a, const char *listen, const struct receive_params *params)
{
    OK(channel_listen(listen ? listen : "tcp:127.0.0.1:0", &a->listen_fd, a->address,
                      sizeof(a->address), &err));
    OK(receive_create(&a->receive, a->listen_fd, &a->hooks, params, &err));
    ck_assert_int_eq(pthread_create(&a->thread, NULL, arrival_main, a), 0);
}

void arrival_wait(struct arrival *a)
{
    pthread_join(a->thread, NULL);
}

void arrival_free(struct arrival *a)
{
    receive_free(a->receive);
}

int arrival_join(struct arrival *a)
{
    arrival_wait(a);
    arrival_free(a);
    return a->ret;
}

// --- the link

enum { PAIRS = 512 };

struct pair {
    int fd[2];        // source, destination; -1: closed
    uint64_t gone[2]; // bytes read from it and passed on
    bool silent;
};

static void pair_shut(struct pair *p, unsigned side)
{
    if (p->fd[side] >= 0)
        close(p->fd[side]);
    p->fd[side] = -1;
}

static void pair_drop(struct pair *p)
{
    pair_shut(p, 0);
    pair_shut(p, 1);
}

static void pair_harm(struct pair *p, enum relay_harm harm)
{
    p->silent = true;
    if (harm != RELAY_STALL)
        pair_shut(p, 0);
    if (harm == RELAY_CUT)
        pair_shut(p, 1);
}

static void relay_harm(struct relay *r, struct pair *pairs, unsigned nr)
{
    r->harmed = true;
    for (unsigned i = 0; i < nr; i++)
        if (r->connection == RELAY_ALL || i == r->connection)
            pair_harm(&pairs[i], r->harm);
}

static bool is_counted(const struct relay *r, unsigned index)
{
    return r->connection == RELAY_ALL || index == r->connection;
}

// How many of n bytes that came from this side still get through.
static size_t let_through(const struct relay *r, const struct pair *p, unsigned index,
                          unsigned side, size_t n)
{
    bool all = r->connection == RELAY_ALL;
    if (r->harmed || !is_counted(r, index))
        return n;
    uint64_t limit = side ? r->to_source : r->to_dest;
    uint64_t gone = !all ? p->gone[side] : side ? r->up : r->down;
    if (!side && r->after_answer && (all ? r->up : p->gone[1]) >= r->after_answer)
        return 0;
    return limit - gone < n ? (size_t)(limit - gone) : n;
}

static void flip(struct relay *r, const struct pair *p, unsigned side, char *buffer, size_t n)
{
    uint64_t bit = side ? r->flip_to_source : r->flip_to_dest;
    if (!bit || bit / 8 < p->gone[side] || bit / 8 - p->gone[side] >= n)
        return;
    buffer[bit / 8 - p->gone[side]] ^= (char)(1 << bit % 8);
    r->flips++;
}

// Passes on what is there. False: the pair is over.
static bool pair_forward(struct relay *r, struct pair *pairs, unsigned nr, unsigned index,
                         unsigned side)
{
    char buffer[16384];
    struct pair *p = &pairs[index];
    ssize_t got = read(p->fd[side], buffer, sizeof(buffer));
    if (got <= 0)
        return false;
    size_t n = let_through(r, p, index, side, (size_t)got);
    if (is_counted(r, index))
        flip(r, p, side, buffer, n);
    // It blocks until all is gone.
    bool goes = !n || send(p->fd[!side], buffer, n, MSG_NOSIGNAL) == (ssize_t)n;
    p->gone[side] += n;
    *(side ? &r->up : &r->down) += n;
    if (!side && index < r->nr_keep)
        OK(stream_write(&r->keep[index].stream, buffer, n, &err));
    if (n < (size_t)got)
        relay_harm(r, pairs, nr);
    return goes;
}

static bool pair_open(struct relay *r, struct pair *p)
{
    struct channel in, out;
    struct error err;
    if (channel_accept(&in, r->listen_fd, -1, 1000, 1000, &err))
        return false;
    if ((r->harmed && r->dead_afterwards) || channel_connect(&out, r->target, -1, 1000, &err)) {
        channel_close(&in);
        return false;
    }
    *p = (struct pair) {.fd = {in.fd, out.fd}};
    fcntl(in.fd, F_SETFL, 0);
    fcntl(out.fd, F_SETFL, 0);
    return true;
}

static void pairs_forward(struct relay *r, struct pair *pairs, unsigned nr, const struct pollfd *p)
{
    for (unsigned i = 0; i < 2 * nr; i++) {
        struct pair *pair = &pairs[i / 2];
        if (p[i].revents && !pair->silent && pair->fd[i % 2] >= 0 &&
            !pair_forward(r, pairs, nr, i / 2, i % 2))
            pair_drop(pair);
    }
}

static void *relay_main(void *arg)
{
    struct relay *r = arg;
    struct pair pairs[PAIRS];
    struct pollfd p[2 + 2 * PAIRS];
    unsigned nr = 0;
    for (;;) {
        p[0] = (struct pollfd) {.fd = r->stop_fd, .events = POLLIN};
        p[1] = (struct pollfd) {.fd = nr < PAIRS ? r->listen_fd : -1, .events = POLLIN};
        for (unsigned i = 0; i < 2 * nr; i++) {
            struct pair *pair = &pairs[i / 2];
            p[2 + i] =
                (struct pollfd) {.fd = pair->silent ? -1 : pair->fd[i % 2], .events = POLLIN};
        }
        poll(p, 2 + 2 * nr, -1);
        if (p[0].revents)
            break;
        pairs_forward(r, pairs, nr, p + 2);
        if (p[1].revents && pair_open(r, &pairs[nr]))
            nr++;
    }
    for (unsigned i = 0; i < nr; i++)
        pair_drop(&pairs[i]);
    return NULL;
}

void relay_start(struct relay *r, const char *target)
{
    r->target = target;
    r->stop_fd = eventfd(0, EFD_CLOEXEC);
    OK(channel_listen("tcp:127.0.0.1:0", &r->listen_fd, r->address, sizeof(r->address), &err));
    ck_assert_int_eq(pthread_create(&r->thread, NULL, relay_main, r), 0);
}

void relay_end(struct relay *r)
{
    eventfd_write(r->stop_fd, 1);
    pthread_join(r->thread, NULL);
    close(r->stop_fd);
    close(r->listen_fd);
}
