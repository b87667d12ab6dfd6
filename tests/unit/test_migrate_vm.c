// SPDX-License-Identifier: Apache-2.0
// Migration of a real guest: two VMs in this process, TCP over loopback, the byte-increment guest
// as oracle.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

#include "migrate/bitmap.h"
#include "migrate/channel.h"
#include "migrate/migrate.h"
#include "migrate/receive.h"
#include "migrate/wire.h"
#include "tests/bare/oracle.h"

// --- one migration

struct arrival {
    struct receive *receive;
    pthread_t thread;
    struct host host;
    struct migrate_hooks hooks;
    struct vm *vm;
    struct receive_report report;
    struct error err;
    int ret;
    int listen_fd;
    char address[64];
};

static void *arrival_main(void *arg)
{
    struct arrival *a = arg;
    a->ret = receive_run(a->receive, &a->vm, &a->report, &a->err);
    return NULL;
}

static void arrival_start(struct arrival *a, struct guest *g)
{
    struct receive_params params;
    *a = (struct arrival) {.host = {.guest = g}};
    a->hooks = hooks_of(&a->host);
    OK(channel_listen("tcp:127.0.0.1:0", &a->listen_fd, a->address, sizeof(a->address), &err));
    receive_params_default(&params);
    params.one_try = true;
    OK(receive_create(&a->receive, a->listen_fd, &a->hooks, &params, &err));
    ck_assert_int_eq(pthread_create(&a->thread, NULL, arrival_main, a), 0);
}

static int arrival_join(struct arrival *a)
{
    pthread_join(a->thread, NULL);
    receive_free(a->receive);
    close(a->listen_fd);
    return a->ret;
}

static struct migrate_params params_for(struct arrival *a, enum migrate_mode mode)
{
    struct migrate_params p;
    migrate_params_default(&p);
    p.to = a->address;
    p.mode = mode;
    p.hooks = &a->hooks;
    return p;
}

static void print_report(const struct migrate_report *r)
{
    const struct migrate_downtime *d = &r->downtime;
    printf(
        "%-8s rounds %u data %llu zero %llu pushed %llu demand %llu faults %llu | total %llu us, "
        "down %llu = stop %llu save %llu last %llu transfer %llu load %llu resume %llu\n",
        migrate_mode_name(r->mode), r->rounds, (unsigned long long)r->data_pages,
        (unsigned long long)r->zero_pages, (unsigned long long)r->pushed_pages,
        (unsigned long long)r->demand_pages, (unsigned long long)r->faults,
        (unsigned long long)r->total_ns / 1000, (unsigned long long)d->total / 1000,
        (unsigned long long)d->stop / 1000, (unsigned long long)d->save / 1000,
        (unsigned long long)d->last_pages / 1000, (unsigned long long)d->transfer / 1000,
        (unsigned long long)d->load / 1000, (unsigned long long)d->resume / 1000);
}

// Moves the guest to a new VM; the old one is destroyed.
static void guest_move(struct guest *g, enum migrate_mode mode, struct migrate_report *report)
{
    struct arrival a;
    struct migration m;
    arrival_start(&a, g);
    struct migrate_params p = params_for(&a, mode);
    OK(migration_init(&m, &err));
    struct error why = {0};
    int sent = migrate_out(g->bare->vm, &p, &m, report, &why);
    migration_free(&m);
    receive_cancel(a.receive);
    int ret = arrival_join(&a);
    ck_assert_msg(!sent, "migrate: %s; receive: %s", why.text, a.err.text);
    ck_assert_msg(!ret, "receive: %s", a.err.text);
    ck_assert_int_eq(report->owner, SOURCE_GONE);
    ck_assert_int_eq(a.report.owner, DEST_RUNNING);
    ck_assert_uint_eq(a.host.arrived, 1);
    ck_assert_ptr_eq(a.vm, a.host.bare->vm);
    ck_assert(vm_paused(g->bare->vm));
    print_report(report);
    guest_end(g);
    g->bare = a.host.bare;
}

// --- tests

static const enum migrate_mode modes[] = {MIGRATE_PRECOPY, MIGRATE_POSTCOPY, MIGRATE_HYBRID};

static void ping_pong(unsigned cpus, uint64_t memory, uint64_t pages, uint64_t base,
                      enum ram_backing backing, unsigned times)
{
    struct guest g = {.backing = backing};
    struct migrate_report report;
    guest_boot(&g, cpus, memory, pages, base, 0);
    for (unsigned i = 0; i < times; i++) {
        guest_move(&g, modes[i % ARRAY_SIZE(modes)], &report);
        guest_check(&g);
    }
    guest_end(&g);
}

START_TEST(test_ping_pong_1cpu)
{
    ping_pong(1, 64 * MiB, 2048, 0, RAM_ANONYMOUS, bare_long() ? 60 : 6);
}
END_TEST

START_TEST(test_ping_pong_2cpu)
{
    ping_pong(2, 64 * MiB, 2048, 0, RAM_ANONYMOUS, bare_long() ? 60 : 6);
}
END_TEST

START_TEST(test_ping_pong_memfd)
{
    ping_pong(2, 64 * MiB, 2048, 0, RAM_MEMFD, bare_long() ? 60 : 6);
}
END_TEST

// Pages on both sides of the hole below 4 GiB.
START_TEST(test_ping_pong_above_3g)
{
    ping_pong(2, 3 * GiB + 256 * MiB, 4096, 0xc0000000 - 8 * MiB, RAM_ANONYMOUS,
              bare_long() ? 30 : 3);
}
END_TEST

// A guest that was paused before arrives paused, and goes on when it is resumed there.
START_TEST(test_paused_guest)
{
    struct guest g = {0};
    struct migrate_report report;
    guest_boot(&g, 1, 64 * MiB, 256, 0, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(modes); i++) {
        bare_pause(g.bare);
        uint64_t beat = bare_u64(g.bare, g.heartbeat[0]);
        guest_move(&g, modes[i], &report);
        ck_assert(vm_paused(g.bare->vm));
        oracle_check(&g, g.bare->vm);
        ck_assert_uint_eq(bare_u64(g.bare, g.heartbeat[0]), beat);
        bare_resume(g.bare);
        guest_check(&g);
    }
    guest_end(&g);
}
END_TEST

struct steer {
    struct migration *m;
    struct arrival *arrival;
    enum migrate_phase at;
    uint32_t at_round;
    void (*act)(struct steer *s);
    unsigned acted;
};

static void steer_progress(const struct migrate_progress *p, void *arg)
{
    struct steer *s = arg;
    if (p->phase == s->at && p->round >= s->at_round) {
        s->act(s);
        s->acted++;
        s->at = MIGRATE_IDLE; // once
    }
}

static void act_cancel(struct steer *s)
{
    migration_cancel(s->m);
}

static void act_receiver_gives_up(struct steer *s)
{
    receive_cancel(s->arrival->receive);
}

static void act_release(struct steer *s)
{
    atomic_store(&s->m->bandwidth, 0);
    atomic_store(&s->m->downtime_ns, 300000000);
}

static const struct {
    enum migrate_mode mode;
    enum migrate_phase phase;
    void (*act)(struct steer *);
    int expected;
} aborts[] = {
    {MIGRATE_PRECOPY, MIGRATE_CONNECTING, act_cancel, -ECANCELED},
    {MIGRATE_PRECOPY, MIGRATE_ROUNDS, act_cancel, -ECANCELED},
    {MIGRATE_PRECOPY, MIGRATE_SWITCHING, act_cancel, -ECANCELED},
    {MIGRATE_POSTCOPY, MIGRATE_SWITCHING, act_cancel, -ECANCELED},
    {MIGRATE_HYBRID, MIGRATE_ROUNDS, act_cancel, -ECANCELED},
    {MIGRATE_HYBRID, MIGRATE_SWITCHING, act_cancel, -ECANCELED},
    {MIGRATE_PRECOPY, MIGRATE_ROUNDS, act_receiver_gives_up, 0},
    {MIGRATE_PRECOPY, MIGRATE_SWITCHING, act_receiver_gives_up, 0},
};

// Whatever happens before COMMIT: the guest goes on here, nothing is left there, and it can try
// again.
START_TEST(test_abort_before_commit)
{
    struct guest g = {0};
    guest_boot(&g, 2, 64 * MiB, 1024, 0, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(aborts); i++) {
        struct arrival a;
        struct migration m;
        struct migrate_report report;
        struct error why = {0};
        arrival_start(&a, &g);
        struct migrate_params p = params_for(&a, aborts[i].mode);
        OK(migration_init(&m, &err));
        struct steer steer = {.m = &m, .arrival = &a, .at = aborts[i].phase, .act = aborts[i].act};
        m.on_progress = steer_progress;
        m.on_progress_arg = &steer;
        int ret = migrate_out(g.bare->vm, &p, &m, &report, &why);
        migration_free(&m);
        receive_cancel(a.receive); // a source that never connected
        ck_assert_uint_eq(steer.acted, 1);
        ck_assert_int_lt(ret, 0);
        if (aborts[i].expected)
            ck_assert_int_eq(ret, aborts[i].expected);
        ck_assert_int_eq(report.owner, SOURCE_RUNNING);
        ck_assert_int_lt(arrival_join(&a), 0);
        ck_assert_ptr_null(a.vm);
        ck_assert_ptr_null(a.host.bare);
        ck_assert(!vm_paused(g.bare->vm));
        guest_check(&g);
    }
    struct migrate_report report;
    guest_move(&g, MIGRATE_PRECOPY, &report);
    guest_check(&g);
    guest_end(&g);
}
END_TEST

// A slow link and a limit out of reach: rounds go on until somebody releases them.
START_TEST(test_not_converging)
{
    struct guest g = {0};
    struct arrival a;
    struct migration m;
    struct migrate_report report;
    guest_boot(&g, 1, 32 * MiB, 512, 0, 0);
    arrival_start(&a, &g);
    struct migrate_params p = params_for(&a, MIGRATE_PRECOPY);
    p.bandwidth = 20000000;
    p.downtime_ns = 1000000;
    p.max_rounds = 2;
    OK(migration_init(&m, &err));
    struct steer steer = {.m = &m, .at = MIGRATE_ROUNDS, .at_round = 5, .act = act_release};
    m.on_progress = steer_progress;
    m.on_progress_arg = &steer;
    OK(migrate_out(g.bare->vm, &p, &m, &report, &err));
    migration_free(&m);
    ck_assert_uint_eq(steer.acted, 1);
    ck_assert_uint_ge(report.rounds, 5);
    ck_assert_int_eq(arrival_join(&a), 0);
    guest_end(&g);
    g.bare = a.host.bare;
    guest_check(&g);
    guest_end(&g);
}
END_TEST

static const struct {
    enum migrate_stall policy;
    int expected;
    enum migrate_mode becomes;
} stalls[] = {
    {STALL_CANCEL, -EBUSY, MIGRATE_PRECOPY},
    {STALL_SWITCH, 0, MIGRATE_PRECOPY},
    {STALL_POSTCOPY, 0, MIGRATE_HYBRID},
};

START_TEST(test_stall_policy)
{
    struct guest g = {0};
    guest_boot(&g, 1, 32 * MiB, 512, 0, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(stalls); i++) {
        struct arrival a;
        struct migration m;
        struct migrate_report report;
        struct error why = {0};
        arrival_start(&a, &g);
        struct migrate_params p = params_for(&a, MIGRATE_PRECOPY);
        p.downtime_ns = 0;
        p.max_rounds = 3;
        p.on_stall = stalls[i].policy;
        OK(migration_init(&m, &err));
        int ret = migrate_out(g.bare->vm, &p, &m, &report, &why);
        migration_free(&m);
        ck_assert_msg(ret == stalls[i].expected, "policy %d: %d %s", stalls[i].policy, ret,
                      why.text);
        ck_assert_int_eq(report.mode, stalls[i].becomes);
        ck_assert_uint_eq(report.rounds, 3);
        ck_assert_int_eq(!arrival_join(&a), !ret);
        if (!ret) {
            guest_end(&g);
            g.bare = a.host.bare;
        }
        guest_check(&g);
    }
    guest_end(&g);
}
END_TEST

// --- a link that can be cut: forwards connections, until a byte count is reached

struct relay {
    int listen_fd, stop_fd;
    pthread_t thread;
    char address[64];
    const char *target;
    unsigned connection;         // which one is cut, counting from 0 (main, demand, query ...)
    uint64_t to_dest, to_source; // cut before this byte goes through; UINT64_MAX = never
    bool dead_afterwards;        // no connection gets through after the cut
    bool cut;
};

struct pipe_pair {
    int source, dest;
    uint64_t to_dest, to_source; // bytes gone through
};

// Forwards what is there. False: this pair is finished.
static bool relay_forward(struct relay *r, struct pipe_pair *p, bool counted, bool down)
{
    char buffer[16384];
    uint64_t *gone = down ? &p->to_dest : &p->to_source;
    uint64_t limit = !counted || r->cut ? UINT64_MAX : down ? r->to_dest : r->to_source;
    int from = down ? p->source : p->dest, to = down ? p->dest : p->source;
    ssize_t n = read(from, buffer, sizeof(buffer));
    if (n <= 0)
        return false;
    bool cut = limit - *gone < (uint64_t)n;
    if (cut)
        n = (ssize_t)(limit - *gone);
    *gone += (uint64_t)n;
    if (write_all(to, buffer, (size_t)n))
        return false;
    r->cut |= cut;
    return !cut;
}

static void relay_drop(struct pipe_pair *p)
{
    close(p->source);
    close(p->dest);
    *p = (struct pipe_pair) {-1, -1, 0, 0};
}

static void relay_accept(struct relay *r, struct pipe_pair *p)
{
    struct channel in, out;
    struct error err;
    if (channel_accept(&in, r->listen_fd, -1, 1000, 1000, &err))
        return;
    if ((r->cut && r->dead_afterwards) || channel_connect(&out, r->target, -1, 1000, &err)) {
        channel_close(&in);
        return;
    }
    *p = (struct pipe_pair) {.source = in.fd, .dest = out.fd};
    fcntl(p->source, F_SETFL, 0);
    fcntl(p->dest, F_SETFL, 0);
}

static void *relay_main(void *arg)
{
    struct relay *r = arg;
    enum { PAIRS = 512 };
    struct pipe_pair pairs[PAIRS];
    struct pollfd p[2 + 2 * PAIRS];
    unsigned nr = 0;
    for (;;) {
        p[0] = (struct pollfd) {.fd = r->stop_fd, .events = POLLIN};
        p[1] = (struct pollfd) {.fd = nr < PAIRS ? r->listen_fd : -1, .events = POLLIN};
        for (unsigned i = 0; i < nr; i++) {
            p[2 + 2 * i] = (struct pollfd) {.fd = pairs[i].source, .events = POLLIN};
            p[3 + 2 * i] = (struct pollfd) {.fd = pairs[i].dest, .events = POLLIN};
        }
        poll(p, 2 + 2 * nr, -1);
        if (p[0].revents)
            break;
        for (unsigned i = 0; i < nr; i++)
            for (unsigned down = 0; down < 2; down++)
                if (pairs[i].source >= 0 && p[(down ? 2 : 3) + 2 * i].revents &&
                    !relay_forward(r, &pairs[i], i == r->connection, down))
                    relay_drop(&pairs[i]);
        if (p[1].revents) {
            pairs[nr] = (struct pipe_pair) {-1, -1, 0, 0};
            relay_accept(r, &pairs[nr++]);
        }
    }
    for (unsigned i = 0; i < nr; i++)
        if (pairs[i].source >= 0)
            relay_drop(&pairs[i]);
    return NULL;
}

static void relay_start(struct relay *r, const char *target)
{
    r->target = target;
    r->stop_fd = eventfd(0, 0);
    OK(channel_listen("tcp:127.0.0.1:0", &r->listen_fd, r->address, sizeof(r->address), &err));
    ck_assert_int_eq(pthread_create(&r->thread, NULL, relay_main, r), 0);
}

static void relay_end(struct relay *r)
{
    eventfd_write(r->stop_fd, 1);
    pthread_join(r->thread, NULL);
    close(r->stop_fd);
    close(r->listen_fd);
}

// Byte positions in what the destination says in a pre-copy of one round.
#define REC(T)        (WIRE_HEADER_LEN + sizeof(T))
#define SAID_READY    (REC(struct wire_hello) + WIRE_HEADER_LEN)
#define SAID_ROUND    (SAID_READY + REC(struct wire_round))
#define SAID_PREPARED (SAID_ROUND + REC(struct wire_times))
#define SAID_RUNNING  (SAID_PREPARED + REC(struct wire_times))

struct cut_result {
    int ret;
    struct migrate_report report;
    struct error err;
    struct arrival arrival; // joined, its receiver not yet freed
};

static void move_over(struct guest *g, enum migrate_mode mode, struct relay *relay,
                      struct cut_result *result)
{
    struct arrival *a = &result->arrival;
    struct migration m;
    arrival_start(a, g);
    relay_start(relay, a->address);
    struct migrate_params p = params_for(a, mode);
    p.to = relay->address;
    p.ask_ms = 500;
    p.downtime_ns = 3600000000000; // one round is enough
    OK(migration_init(&m, &err));
    result->ret = migrate_out(g->bare->vm, &p, &m, &result->report, &result->err);
    migration_free(&m);
    receive_cancel(a->receive);
    pthread_join(a->thread, NULL);
    relay_end(relay);
}

static void arrival_free(struct arrival *a)
{
    receive_free(a->receive);
    close(a->listen_fd);
}

// Exactly one side has the guest, and there it is whole. Follows it.
static void follow(struct guest *g, struct cut_result *result)
{
    struct arrival *a = &result->arrival;
    bool here = result->report.owner == SOURCE_RUNNING;
    ck_assert_msg(here || result->report.owner == SOURCE_GONE, "owner %s: %s",
                  owner_source_name(result->report.owner), result->err.text);
    ck_assert_int_eq(here, a->vm == NULL);
    ck_assert_int_eq(here, a->report.owner != DEST_RUNNING);
    ck_assert_int_eq(here, !vm_paused(g->bare->vm));
    if (!here) {
        guest_end(g);
        g->bare = a->host.bare;
    } else {
        ck_assert_int_lt(result->ret, 0);
        ck_assert_ptr_null(a->host.bare);
    }
}

// The link breaks at random places of the stream: the source goes on, or the destination has it
// all.
START_TEST(test_cut_anywhere)
{
    struct guest g = {0};
    uint64_t seed = 7;
    guest_boot(&g, 1, 32 * MiB, 256, 0, 0);
    unsigned moved = 0, times = bare_long() ? 300 : 30;
    for (unsigned i = 0; i < times; i++) {
        struct relay relay = {.to_dest = UINT64_MAX, .to_source = UINT64_MAX};
        struct cut_result result = {0};
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        if (i % 3)
            relay.to_dest = (seed >> 20) % (i % 2 ? 8192 : 1200000);
        else
            relay.to_source = (seed >> 20) % SAID_RUNNING;
        move_over(&g, MIGRATE_PRECOPY, &relay, &result);
        ck_assert(relay.cut || !result.ret);
        follow(&g, &result);
        moved += !result.ret;
        arrival_free(&result.arrival);
        guest_check(&g);
    }
    printf("cut anywhere: %u of %u moved all the same\n", moved, times);
    guest_end(&g);
}
END_TEST

static const struct {
    enum migrate_mode mode;
    uint64_t to_source; // cut after this many bytes of the destination's words
    bool stays;         // at the source
} cuts[] = {
    {MIGRATE_PRECOPY, SAID_READY, true},        {MIGRATE_POSTCOPY, SAID_READY, true},
    {MIGRATE_HYBRID, SAID_READY, true},         {MIGRATE_HYBRID, SAID_ROUND, true},
    {MIGRATE_PRECOPY, SAID_ROUND, true},        {MIGRATE_PRECOPY, SAID_PREPARED - 1, true},
    {MIGRATE_PRECOPY, SAID_PREPARED, false}, // COMMIT came through, RUNNING did not: asked, yes
    {MIGRATE_PRECOPY, SAID_RUNNING - 1, false},
};

START_TEST(test_cut_at_the_switch)
{
    struct guest g = {0};
    guest_boot(&g, 2, 32 * MiB, 256, 0, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(cuts); i++) {
        struct relay relay = {.to_dest = UINT64_MAX, .to_source = cuts[i].to_source};
        struct cut_result result = {0};
        move_over(&g, cuts[i].mode, &relay, &result);
        ck_assert(relay.cut);
        ck_assert_msg((result.report.owner == SOURCE_RUNNING) == cuts[i].stays, "cut %u: owner %s",
                      i, owner_source_name(result.report.owner));
        follow(&g, &result);
        arrival_free(&result.arrival);
        guest_check(&g);
    }
    guest_end(&g);
}
END_TEST

// COMMIT was sent and nobody can be asked any more: the source stays paused and says so, until a
// human decides. Here the guest has in fact moved, so it is the destination's that goes on.
START_TEST(test_doubt)
{
    struct guest g = {0};
    struct relay relay = {
        .to_dest = UINT64_MAX, .to_source = SAID_PREPARED, .dead_afterwards = true};
    struct cut_result result = {0};
    guest_boot(&g, 1, 32 * MiB, 256, 0, 0);
    move_over(&g, MIGRATE_PRECOPY, &relay, &result);
    ck_assert_int_eq(result.report.owner, SOURCE_DOUBT);
    ck_assert_int_eq(result.ret, -EOWNERDEAD);
    ck_assert_ptr_nonnull(strstr(result.err.text, "--force-resume"));
    ck_assert(vm_paused(g.bare->vm));
    ck_assert_ptr_nonnull(result.arrival.vm);
    ck_assert(!vm_paused(result.arrival.vm));
    arrival_free(&result.arrival);
    // The human makes sure that it does not run there, then says so.
    bare_end(result.arrival.host.bare);
    free(result.arrival.host.bare);
    OK(migrate_force_resume(g.bare->vm, &result.report, &err));
    ck_assert_int_lt(migrate_force_resume(g.bare->vm, &result.report, NULL), 0);
    guest_check(&g);
    guest_end(&g);
}
END_TEST

// The link breaks while pages are pushed: the guest is the destination's, both sides stand still
// and keep what they have; the source does not run.
START_TEST(test_postcopy_broken)
{
    struct guest g = {0};
    for (unsigned connection = 0; connection < 2; connection++) {
        struct relay relay = {.connection = connection,
                              .to_dest = connection ? 10000 : 400000,
                              .to_source = UINT64_MAX};
        struct cut_result result = {0};
        guest_boot(&g, 1, 32 * MiB, 2048, 0, 0);
        guest_touches_all(&g); // 8 MiB to push: the cut comes long before the end
        move_over(&g, MIGRATE_POSTCOPY, &relay, &result);
        ck_assert(connection || (relay.cut && result.ret < 0 && result.arrival.ret < 0));
        printf("post-copy broken: %s | %s\n", result.err.text, result.arrival.err.text);
        ck_assert_int_eq(result.report.owner, SOURCE_GONE);
        ck_assert_ptr_nonnull(result.arrival.vm);
        ck_assert(vm_paused(g.bare->vm));
        if (result.arrival.ret) {
            ck_assert_uint_gt(result.arrival.report.missing_pages, 0);
            ck_assert(vm_paused(result.arrival.vm));
        }
        vm_request_stop(result.arrival.vm, VM_STOP_HOST, 0, "test");
        arrival_free(&result.arrival);
        bare_end(result.arrival.host.bare);
        free(result.arrival.host.bare);
        guest_end(&g);
    }
}
END_TEST

#ifdef __SANITIZE_THREAD__
// Guest memory is sent while the guest and its devices write to it: what tore comes again.
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "race:channel_writev\n";
}
#endif

static void add_tests(TCase *tc)
{
    tcase_add_test(tc, test_ping_pong_1cpu);
    tcase_add_test(tc, test_ping_pong_2cpu);
    tcase_add_test(tc, test_ping_pong_memfd);
    tcase_add_test(tc, test_ping_pong_above_3g);
    tcase_add_test(tc, test_paused_guest);
    tcase_add_test(tc, test_abort_before_commit);
    tcase_add_test(tc, test_not_converging);
    tcase_add_test(tc, test_stall_policy);
    tcase_add_test(tc, test_cut_anywhere);
    tcase_add_test(tc, test_cut_at_the_switch);
    tcase_add_test(tc, test_doubt);
    tcase_add_test(tc, test_postcopy_broken);
}

int main(void)
{
    return bare_main("migrate_vm", add_tests);
}
