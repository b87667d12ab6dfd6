// SPDX-License-Identifier: Apache-2.0
// Migration of a real guest: two VMs in this process, TCP over loopback, the byte-increment guest
// as oracle.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

#include "migrate/channel.h"
#include "migrate/machine.h"
#include "migrate/migrate.h"
#include "migrate/pages.h"
#include "migrate/receive.h"
#include "migrate/wire.h"
#include "tests/bare/oracle.h"
#include "tests/random.h"
#include "vmm/bitmap.h"

// --- one migration

static void arrival_begin(struct arrival *a, struct guest *g)
{
    struct receive_params params = arrival_params();
    *a = (struct arrival) {.host = {.guest = g}};
    a->hooks = hooks_of(&a->host);
    params.security = g->security;
    if (g->timeout_ms)
        params.handshake_ms = params.idle_ms = params.linger_ms = g->timeout_ms;
    arrival_start(a, g->listen, &params);
}

static struct migrate_params params_for(struct arrival *a, enum migrate_mode mode)
{
    struct migrate_params p;
    migrate_params_default(&p);
    p.to = a->address;
    p.mode = mode;
    p.hooks = &a->hooks;
    p.security = a->host.guest->security;
    p.connections = a->host.guest->connections ? a->host.guest->connections : 1;
    if (a->host.guest->timeout_ms)
        p.handshake_ms = p.idle_ms = a->host.guest->timeout_ms;
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
    arrival_begin(&a, g);
    struct migrate_params p = params_for(&a, mode);
    p.prepaging = g->prepaging;
    p.max_rounds = 10; // a busy machine, or a sanitizer, may never be faster than the guest writes
    p.on_stall = STALL_SWITCH;
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

static struct tls *shared_key(void)
{
    const struct tls_texts texts = {
        .text = {[TLS_PSK] = (char *)"lab:000102030405060708090a0b0c0d0e0f"}};
    struct tls *tls = NULL;
    OK(tls_create(&tls, &texts, NULL, &err));
    return tls;
}

// The demand connection of post-copy is protected as the first one is.
START_TEST(test_ping_pong_tls)
{
    struct tls *tls = shared_key();
    struct guest g = {.backing = RAM_ANONYMOUS, .security = {.tls = tls}};
    struct migrate_report report;
    guest_boot(&g, 2, 64 * MiB, 2048, 0, 0);
    for (unsigned i = 0; i < (bare_long() ? 60u : 3u); i++) {
        guest_move(&g, modes[i % ARRAY_SIZE(modes)], &report);
        guest_check(&g);
    }
    guest_end(&g);
    tls_free(tls);
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

static bool huge_pages(uint64_t bytes)
{
    unsigned long long free_pages = 0;
    FILE *f = fopen("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "r");
    if (f && fscanf(f, "%llu", &free_pages) != 1)
        free_pages = 0;
    if (f)
        fclose(f);
    if (free_pages * HUGE_PAGE < bytes)
        printf("skipped: %llu huge pages free (vm.nr_hugepages), %llu needed\n", free_pages,
               (unsigned long long)(bytes / HUGE_PAGE));
    return free_pages * HUGE_PAGE >= bytes;
}

START_TEST(test_ping_pong_hugetlb)
{
    if (huge_pages(2 * 64 * MiB))
        ping_pong(2, 64 * MiB, 2048, 0, RAM_HUGETLB, bare_long() ? 60 : 3);
}
END_TEST

// With dirty rings that are often full; every other time to a host without.
START_TEST(test_ping_pong_dirty_ring)
{
    struct guest g = {.log = RAM_LOG_RING};
    struct migrate_report report;
    if (!bare_has_log(g.log))
        return;
    guest_boot(&g, 2, 64 * MiB, 2048, 0, 0);
    for (unsigned i = 0; i < (bare_long() ? 60u : 4u); i++) {
        g.log = i % 2 ? RAM_LOG_RING : RAM_LOG_BITMAP;
        guest_move(&g, i % 4 == 3 ? MIGRATE_HYBRID : MIGRATE_PRECOPY, &report);
        guest_check(&g);
    }
    guest_end(&g);
}
END_TEST

// Pages over several connections; with TLS on each every third time.
START_TEST(test_ping_pong_streams)
{
    static const unsigned numbers[] = {2, 16, 3, 5};
    struct tls *tls = shared_key();
    struct guest g = {0};
    struct migrate_report report;
    guest_boot(&g, 2, 64 * MiB, 2048, 0, 0);
    for (unsigned i = 0; i < (bare_long() ? 100u : 8u); i++) {
        g.connections = numbers[i % ARRAY_SIZE(numbers)];
        g.security.tls = i % 3 == 2 ? tls : NULL;
        guest_move(&g, i % 2 ? MIGRATE_HYBRID : MIGRATE_PRECOPY, &report);
        ck_assert_uint_eq(report.connections, g.connections);
        ck_assert_uint_eq(report.data_pages + report.zero_pages >= g.memory / PAGE_SIZE, 1);
        guest_check(&g);
    }
    g.connections = 4; // has no use of them
    guest_move(&g, MIGRATE_POSTCOPY, &report);
    ck_assert_uint_eq(report.connections, 1);
    guest_check(&g);
    guest_end(&g);
    tls_free(tls);
}
END_TEST

// Pages on both sides of the hole below 4 GiB.
START_TEST(test_ping_pong_above_3g)
{
    ping_pong(2, 3 * GiB + 256 * MiB, 4096, 0xc0000000 - 8 * MiB, RAM_ANONYMOUS,
              bare_long() ? 30 : 3);
}
END_TEST

// A sequential sweep over 64 MiB while the guest moves: few of its pages cross the network because
// it had to wait for them (papers: 2-4 %). Every order brings everything.
#ifdef __SANITIZE_THREAD__
enum { SWEEP_SHARE_MAX = 100 }; // the pusher is many times slower then, the guest is not
#else
enum { SWEEP_SHARE_MAX = 4 };
#endif

START_TEST(test_sweep)
{
    enum { PAGES = 16384 };
    struct guest g = {0};
    guest_boot(&g, 1, 160 * MiB, PAGES, 64 * MiB, 0);
    // A busy machine may hold up the pusher for longer than the guest: then once more.
    for (unsigned kind = 0, tries = 0; kind < PREPAGE_KINDS;) {
        struct migrate_report report;
        guest_touches_all(&g);
        g.prepaging = kind;
        guest_move(&g, MIGRATE_POSTCOPY, &report);
        double share = 100.0 * (double)report.demand_pages / PAGES;
        printf("sweep, %-12s %5.2f %% over the network, %llu faults, %llu requests, p50 %llu us, "
               "p99 %llu us\n",
               prepage_name(kind), share, (unsigned long long)report.faults,
               (unsigned long long)report.requests,
               (unsigned long long)wire_latency_percentile(&report.latency, 50),
               (unsigned long long)wire_latency_percentile(&report.latency, 99));
        guest_check(&g);
        bool good = share <= SWEEP_SHARE_MAX || (kind != PREPAGE_BUBBLE && kind != PREPAGE_MULTI);
        ck_assert_msg(good || tries < 3, "%s: %f %% of the pages were faults over the network",
                      prepage_name(kind), share);
        tries = good ? 0 : tries + 1;
        kind += good;
    }
    guest_end(&g);
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

// The same host: the memory is handed over, not copied. Nothing of it goes over the link, whatever
// its size; and when the new place gives up before the switch, the guest goes on at the old one.
START_TEST(test_local)
{
    struct guest g = {.backing = RAM_MEMFD};
    char address[120];
    const char *dir = getenv("TMPDIR");
    uint64_t best = UINT64_MAX;
    snprintf(address, sizeof(address), "unix:%s/ferry-local-%d", dir ? dir : "/tmp", (int)getpid());
    guest_boot(&g, 2, 512 * MiB, 4096, 0, 0);
    g.listen = address;
    for (unsigned i = 0; i < (bare_long() ? 100 : 5); i++) {
        struct migrate_report report;
        guest_move(&g, MIGRATE_LOCAL, &report);
        ck_assert_uint_eq(report.data_pages + report.zero_pages, 0);
        ck_assert_uint_lt(report.wire_bytes, 1 * MiB);
        best = report.downtime.total < best ? report.downtime.total : best;
        unlink(address + 5);
        guest_check(&g);
    }
    printf("local: downtime %llu us at best\n", (unsigned long long)best / 1000);
    ck_assert_uint_le(best, 20000000); // the promise; a busy machine may need more at times
    struct arrival a;
    struct migration m;
    struct migrate_report report;
    arrival_begin(&a, &g);
    struct migrate_params p = params_for(&a, MIGRATE_LOCAL);
    OK(migration_init(&m, &err));
    struct steer steer = {.m = &m, .at = MIGRATE_SWITCHING, .act = act_cancel};
    m.on_progress = steer_progress;
    m.on_progress_arg = &steer;
    ck_assert_int_eq(migrate_out(g.bare->vm, &p, &m, &report, NULL), -ECANCELED);
    migration_free(&m);
    ck_assert_int_lt(arrival_join(&a), 0);
    unlink(address + 5);
    guest_check(&g);
    guest_end(&g);
    // Memory that has no descriptor, and a target that is not on this host.
    for (unsigned i = 0; i < 2; i++) {
        struct error why = {0};
        struct guest other = {.backing = i ? RAM_MEMFD : RAM_ANONYMOUS};
        guest_boot(&other, 1, 32 * MiB, 64, 0, 0);
        p.to = i ? "tcp:127.0.0.1:9" : "unix:/tmp/nobody";
        OK(migration_init(&m, &err));
        ck_assert_int_eq(migrate_out(other.bare->vm, &p, &m, &report, &why), -EINVAL);
        ck_assert_ptr_nonnull(strstr(why.text, i ? "unix:PATH" : "--backing memfd"));
        migration_free(&m);
        guest_check(&other);
        guest_end(&other);
    }
}
END_TEST

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
        arrival_begin(&a, &g);
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

// The guest adds one to a byte of each page: what is sent again is a few bytes of each.
START_TEST(test_deltas)
{
    struct guest g = {0};
    guest_boot(&g, 2, 64 * MiB, 8192, 0, 0);
    guest_touches_all(&g);
    for (unsigned i = 0; i < 3; i++) {
        struct arrival a;
        struct migration m;
        struct migrate_report report;
        g.connections = i == 2 ? 3 : 1;
        arrival_begin(&a, &g);
        struct migrate_params p = params_for(&a, MIGRATE_PRECOPY);
        p.downtime_ns = 0;
        p.max_rounds = 4;
        p.on_stall = STALL_SWITCH;
        p.compress = i ? PACK_ALWAYS : PACK_NEVER;
        OK(migration_init(&m, &err));
        OK(migrate_out(g.bare->vm, &p, &m, &report, &err));
        migration_free(&m);
        ck_assert_int_eq(arrival_join(&a), 0);
        guest_end(&g);
        g.bare = a.host.bare;
        guest_check(&g);
        printf("%s: %llu pages of data, %llu by lz4 in %llu bytes, %llu deltas in %llu bytes, "
               "%llu bytes in all\n",
               i ? "packed" : "plain", (unsigned long long)report.data_pages,
               (unsigned long long)report.lz4_pages, (unsigned long long)report.lz4_bytes,
               (unsigned long long)report.delta_pages, (unsigned long long)report.delta_bytes,
               (unsigned long long)report.wire_bytes);
        ck_assert_int_eq(report.lz4_pages > 8000, i > 0);
        ck_assert_int_eq(report.delta_pages > 1000, i > 0);
        ck_assert_uint_le(report.delta_bytes, report.delta_pages * 100);
        if (i)
            ck_assert_uint_lt(report.wire_bytes, report.data_pages * PAGE_SIZE / 10);
    }
    guest_end(&g);
}
END_TEST

// The limit holds for all connections together: there is a least time for so many bytes.
START_TEST(test_streams_limit)
{
    struct guest g = {.connections = 4};
    struct arrival a;
    struct migration m;
    struct migrate_report report;
    guest_boot(&g, 1, 64 * MiB, 4096, 0, 0);
    guest_touches_all(&g);
    arrival_begin(&a, &g);
    struct migrate_params p = params_for(&a, MIGRATE_PRECOPY);
    p.bandwidth = 40000000;
    p.downtime_ns = 0;
    p.max_rounds = 2;
    p.on_stall = STALL_SWITCH;
    p.compress = PACK_NEVER;
    OK(migration_init(&m, &err));
    OK(migrate_out(g.bare->vm, &p, &m, &report, &err));
    migration_free(&m);
    ck_assert_int_eq(arrival_join(&a), 0);
    uint64_t least_ns = report.wire_bytes * 25; // 40 MB/s
    printf("limited: %llu bytes in %llu us\n", (unsigned long long)report.wire_bytes,
           (unsigned long long)report.total_ns / 1000);
    ck_assert_uint_ge(report.wire_bytes, 16 * MiB);
    ck_assert_uint_ge(report.total_ns, least_ns - least_ns / 4);
    guest_end(&g);
    g.bare = a.host.bare;
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
    arrival_begin(&a, &g);
    struct migrate_params p = params_for(&a, MIGRATE_PRECOPY);
    p.bandwidth = 20000000;
    p.downtime_ns = 500000; // saving and loading take longer
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

// Faster than the link, and a limit that can only be met by slowing it: it is slowed, arrives, and
// is as fast as before.
START_TEST(test_throttle)
{
    struct guest g = {0};
    struct arrival a;
    struct migration m;
    struct migrate_report report;
    guest_boot(&g, 2, 64 * MiB, 4096, 0, 0);
    guest_touches_all(&g);
    arrival_begin(&a, &g);
    struct migrate_params p = params_for(&a, MIGRATE_PRECOPY);
    p.bandwidth = 50000000; // all 16 MiB of it take 330 ms, in which the guest writes all of them
    p.downtime_ns = 100000000;
    p.max_rounds = 2;
    p.on_stall = STALL_THROTTLE;
    p.compress = PACK_NEVER;
    OK(migration_init(&m, &err));
    OK(migrate_out(g.bare->vm, &p, &m, &report, &err));
    migration_free(&m);
    ck_assert_int_eq(arrival_join(&a), 0);
    printf("throttled to %u %% after %u rounds, downtime %llu us\n", report.throttle, report.rounds,
           (unsigned long long)report.downtime.total / 1000);
    ck_assert_uint_ge(report.throttle, 10);
    ck_assert_uint_gt(report.rounds, 2);
    ck_assert(!atomic_load(&g.bare->vm->hold));
    guest_end(&g);
    g.bare = a.host.bare;
    guest_check(&g);
    guest_end(&g);
}
END_TEST

START_TEST(test_stall_policy)
{
    struct guest g = {0};
    guest_boot(&g, 1, 32 * MiB, 512, 0, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(stalls); i++) {
        struct arrival a;
        struct migration m;
        struct migrate_report report;
        struct error why = {0};
        arrival_begin(&a, &g);
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

// --- a link that can be cut

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
    arrival_begin(a, g);
    relay_start(relay, a->address);
    struct migrate_params p = params_for(a, mode);
    p.to = relay->address;
    p.ask_ms = 500;
    p.downtime_ns = 3600000000000; // one round is enough ...
    p.max_rounds = 1;              // ... and no more are made, since tests count bytes
    OK(migration_init(&m, &err));
    result->ret = migrate_out(g->bare->vm, &p, &m, &result->report, &result->err);
    migration_free(&m);
    receive_cancel(a->receive);
    arrival_wait(a);
    relay_end(relay);
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
        if (i % 3)
            relay.to_dest = random_below(&seed, i % 2 ? 8192 : 1200000);
        else
            relay.to_source = random_below(&seed, SAID_RUNNING);
        move_over(&g, MIGRATE_PRECOPY, &relay, &result);
        ck_assert(relay.harmed || !result.ret);
        follow(&g, &result);
        moved += !result.ret;
        arrival_free(&result.arrival);
        guest_check(&g);
    }
    printf("cut anywhere: %u of %u moved all the same\n", moved, times);
    guest_end(&g);
}
END_TEST

// One bit is wrong somewhere, in what either side says: exactly one of them has the guest, whole.
START_TEST(test_flip_anywhere)
{
    struct guest g = {.timeout_ms = 1000};
    uint64_t seed = 3;
    unsigned moved = 0, flipped = 0, times = bare_long() ? 10000 : 24;
    guest_boot(&g, 1, 16 * MiB, 64, 0, 0);
    for (unsigned i = 0; i < times; i++) {
        struct relay relay = {.to_dest = UINT64_MAX, .to_source = UINT64_MAX};
        struct cut_result result = {0};
        // Up to the machine's description, anywhere in the pages, in the answers.
        if (i % 4)
            relay.flip_to_dest = 1 + random_below(&seed, i % 4 == 1 ? 8 * 6000 : 8 * 400000);
        else
            relay.flip_to_source = 1 + random_below(&seed, 8 * SAID_RUNNING);
        move_over(&g, MIGRATE_PRECOPY, &relay, &result);
        follow(&g, &result);
        moved += !result.ret;
        flipped += relay.flips;
        arrival_free(&result.arrival);
        guest_check(&g);
    }
    printf("a bit flipped: %u of %u, %u moved all the same\n", flipped, times, moved);
    ck_assert_uint_gt(flipped, times / 4);
    guest_end(&g);
}
END_TEST

// The same with one of several connections: main, or one that carries pages.
START_TEST(test_streams_cut_anywhere)
{
    struct guest g = {.connections = 3};
    uint64_t seed = 11;
    unsigned moved = 0, broken = 0, times = bare_long() ? 300 : 32;
    guest_boot(&g, 1, 32 * MiB, 256, 0, 0);
    for (unsigned i = 0; i < times; i++) {
        struct relay relay = {.to_dest = UINT64_MAX, .to_source = UINT64_MAX, .connection = i % 4};
        struct cut_result result = {0};
        uint64_t any = random_below(&seed, 1ull << 44), at = any % (i % 4 ? 150000 : 8192);
        if (i % 5 == 4)
            relay.to_source = any % (i % 4 ? REC(struct wire_hello) : SAID_RUNNING);
        else if (i % 3)
            relay.to_dest = at;
        else
            relay.flip_to_dest = 1 + 8 * at + i % 8;
        move_over(&g, i % 8 < 4 ? MIGRATE_PRECOPY : MIGRATE_HYBRID, &relay, &result);
        ck_assert(relay.harmed || relay.flips || !result.ret);
        ck_assert_msg(!result.ret || result.report.owner == SOURCE_RUNNING, "%s", result.err.text);
        follow(&g, &result);
        moved += !result.ret;
        broken += relay.harmed || relay.flips;
        arrival_free(&result.arrival);
        guest_check(&g);
    }
    printf("one of four connections cut or spoilt: %u of %u, %u moved all the same\n", broken,
           times, moved);
    ck_assert_uint_gt(broken, times / 8);
    guest_end(&g);
}
END_TEST

// --- peers that want to do harm

static void say(struct channel *c, enum wire_type type, const void *meta, size_t len)
{
    wire_put(&c->wire, type, 0, meta, len, NULL, 0, NULL); // it may have hung up
}

static void say_machine(struct channel *c, struct guest *g, uint64_t ram_size, unsigned streams)
{
    struct machine machine;
    struct host host = {.guest = g};
    struct migrate_hooks hooks = hooks_of(&host);
    void *meta;
    size_t len;
    OK(machine_describe(g->bare->vm, &hooks, &machine, &err));
    machine.regions[0].size = machine.ram_size = ram_size;
    machine.streams = streams;
    OK(machine_encode(&machine, &meta, &len, &err));
    say(c, WIRE_MACHINE, meta, len);
    machine_free(&machine);
    free(meta);
}

enum harm {
    SAYS_NOTHING,
    STOPS_AFTER_HELLO,
    NOISE,
    MACHINE_HUGE,  // 2^40 pages
    MACHINE_OTHER, // not what its description builds
    MACHINE_LIMIT, // more than the receiver allows
    STOPS_AFTER_MACHINE,
    PAGE_FAR, // page 2^40
    HALF_A_RECORD,
    ZEROS_FOR_EVER, // the same pages, 100,000 times, then nonsense
    PREPARES_TOO_EARLY,
    HARMS,
};

static void do_harm(struct channel *c, struct guest *g, enum harm harm)
{
    struct wire_hello hello;
    const uint8_t id[WIRE_ID_LEN] = "harmful";
    struct {
        struct wire_pages head;
        struct wire_run run;
    } pages = {.head = {.nr_runs = 1}, .run = {.first = 0, .count = 16, .kind = WIRE_RUN_ZERO}};
    if (harm == SAYS_NOTHING)
        return;
    wire_hello_fill(&hello, WIRE_MAIN, id);
    if (harm == NOISE)
        memset(&hello, 0xa5, sizeof(hello));
    say(c, WIRE_HELLO, &hello, sizeof(hello));
    if (harm <= NOISE)
        return;
    say_machine(c, g,
                harm == MACHINE_HUGE    ? PAGE_SIZE << 40
                : harm == MACHINE_OTHER ? 2 * g->memory
                : harm == MACHINE_LIMIT ? 128 * GiB
                                        : g->memory,
                0);
    if (harm <= STOPS_AFTER_MACHINE)
        return;
    if (harm == PAGE_FAR)
        pages.run.first = 1ull << 40;
    if (harm == HALF_A_RECORD) {
        struct wire_header head = {.type = WIRE_PAGES, .meta_len = sizeof(pages)};
        struct iovec iov = {&head, sizeof(head)};
        c->wire.writev(&c->wire, &iov, 1, NULL);
        return;
    }
    struct wire_prepare prepare = {0};
    if (harm == PREPARES_TOO_EARLY)
        say(c, WIRE_PREPARE, &prepare, sizeof(prepare));
    for (unsigned i = 0; i < (harm == ZEROS_FOR_EVER ? 100000 : 1); i++)
        say(c, WIRE_PAGES, &pages, sizeof(pages));
    if (harm == ZEROS_FOR_EVER)
        say(c, WIRE_BYE, NULL, 0);
}

static uint64_t resident(void)
{
    unsigned long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    ck_assert_ptr_nonnull(f);
    ck_assert_int_eq(fscanf(f, "%*u %llu", &pages), 1);
    fclose(f);
    return pages * PAGE_SIZE;
}

// Dropped within the time-out, with nothing left of it.
START_TEST(test_hostile_source)
{
    struct guest g = {.timeout_ms = 300};
    guest_boot(&g, 1, 16 * MiB, 64, 0, 0);
    uint64_t before = 0;
    for (unsigned i = 0; i < 3 * HARMS; i++) {
        struct arrival a;
        struct channel c;
        arrival_begin(&a, &g);
        OK(channel_connect(&c, a.address, -1, 10000, &err));
        do_harm(&c, &g, (enum harm)(i % HARMS));
        ck_assert_msg(arrival_join(&a) < 0, "harm %u", i % HARMS); // by itself: nobody cancels it
        ck_assert_ptr_null(a.vm);
        ck_assert_ptr_null(a.host.bare);
        channel_close(&c);
        if (i < HARMS)
            printf("harm %u: %s\n", i, a.err.text);
        if (i == HARMS)
            before = resident();
    }
    ck_assert_uint_lt(resident(), before + 32 * MiB);
    guest_end(&g);
}
END_TEST

enum stream_harm {
    STREAMS_ONE,  // refused at once, by what MACHINE says
    STREAMS_MANY, // one more than there may be
    STREAMS_NO_LIMIT,
    STREAMS_NEVER_COME,
    STREAM_UNKNOWN, // from here on two are announced; not one of them
    STREAM_TWICE,
    STREAM_OF_ANOTHER,
    STREAM_OTHERS_PAGE, // from here on it is let in: it sends pages of the other one
    STREAM_ACROSS,      // and across the end of its own
    STREAM_CHANGES,     // of a page that never came
    STREAM_PASS,        // ends a pass that has not begun
    STREAM_STATE,
    STREAM_HANGS_UP,
    PAGES_ON_MAIN,
    PREPARES_WITHOUT,
    PASS_NEVER_ENDS,
    STREAM_HARMS,
};

// A page connection. Whether it is let in.
static bool say_stream(struct channel *c, const char *address, const uint8_t *id, unsigned index)
{
    struct wire_hello hello;
    struct wire_record record = {0};
    OK(channel_connect(c, address, -1, 10000, &err));
    wire_hello_fill(&hello, WIRE_STREAM, id);
    hello.stream = (uint16_t)index;
    say(c, WIRE_HELLO, &hello, sizeof(hello));
    bool in = !wire_expect(&c->wire, &record, WIRE_HELLO, NULL);
    wire_record_free(&record);
    return in;
}

static void stream_harms(struct channel *main, struct channel *c, enum stream_harm harm)
{
    struct {
        struct wire_pages head;
        struct wire_run run;
    } pages = {.head = {.nr_runs = 1}, .run = {.first = 0, .count = 16, .kind = WIRE_RUN_ZERO}};
    struct {
        struct wire_packed head;
        struct wire_packed_page page;
    } packed = {.head = {.nr = 1}, .page = {.page = 1, .len = 1, .kind = WIRE_PACKED_DELTA}};
    struct iovec byte = {"x", 1};
    struct wire_round round = {.pass = harm == STREAM_PASS ? 2 : UINT32_MAX};
    struct wire_prepare prepare = {.pass = 1};
    pages.run.first = harm == STREAM_OTHERS_PAGE ? SHARD_PAGES
                      : harm == STREAM_ACROSS    ? SHARD_PAGES - 8
                                                 : 0;
    if (harm == STREAM_OTHERS_PAGE || harm == STREAM_ACROSS)
        say(c, WIRE_PAGES, &pages, sizeof(pages));
    else if (harm == STREAM_CHANGES)
        wire_put(&c->wire, WIRE_PACKED, 0, &packed, sizeof(packed), &byte, 1, NULL);
    else if (harm == STREAM_PASS)
        say(c, WIRE_ROUND, &round, sizeof(round));
    else if (harm == STREAM_STATE)
        say(c, WIRE_READY, NULL, 0);
    else if (harm == STREAM_HANGS_UP)
        channel_shutdown(c);
    else if (harm == PAGES_ON_MAIN)
        say(main, WIRE_PAGES, &pages, sizeof(pages));
    else if (harm == PREPARES_WITHOUT)
        say(main, WIRE_PREPARE, &prepare, sizeof(prepare));
    else if (harm == PASS_NEVER_ENDS)
        say(main, WIRE_ROUND, &round, sizeof(round));
}

START_TEST(test_hostile_streams)
{
    struct guest g = {.timeout_ms = 300};
    static const uint8_t id[WIRE_ID_LEN] = "harmful", other[WIRE_ID_LEN] = "another";
    static const unsigned announced[STREAM_HARMS] = {1, WIRE_STREAMS_MAX + 1, UINT32_MAX};
    guest_boot(&g, 1, 16 * MiB, 64, 0, 0);
    for (enum stream_harm harm = 0; harm < STREAM_HARMS; harm++) {
        struct arrival a;
        struct wire_record record = {0};
        struct wire_hello hello;
        struct channel main, c[3] = {{.fd = -1}, {.fd = -1}, {.fd = -1}};
        arrival_begin(&a, &g);
        OK(channel_connect(&main, a.address, -1, 10000, &err));
        wire_hello_fill(&hello, WIRE_MAIN, id);
        say(&main, WIRE_HELLO, &hello, sizeof(hello));
        OK(wire_expect(&main.wire, &record, WIRE_HELLO, &err));
        say_machine(&main, &g, g.memory, announced[harm] ? announced[harm] : 2);
        int ready = wire_expect(&main.wire, &record, WIRE_READY, NULL);
        ck_assert_int_eq(!ready, harm >= STREAMS_NEVER_COME);
        if (harm == STREAM_UNKNOWN)
            ck_assert(!say_stream(&c[0], a.address, id, 2));
        else if (harm == STREAM_OF_ANOTHER)
            ck_assert(!say_stream(&c[0], a.address, other, 0));
        else if (harm > STREAMS_NEVER_COME)
            ck_assert(say_stream(&c[0], a.address, id, 0));
        if (harm == STREAM_TWICE)
            ck_assert(!say_stream(&c[1], a.address, id, 0));
        stream_harms(&main, &c[0], harm);
        ck_assert_msg(arrival_join(&a) < 0, "harm %u", harm); // by itself: nobody cancels it
        printf("streams, harm %u: %s\n", harm, a.err.text);
        ck_assert_ptr_null(a.vm);
        ck_assert_ptr_null(a.host.bare);
        for (unsigned i = 0; i < ARRAY_SIZE(c); i++)
            channel_close(&c[i]);
        channel_close(&main);
        wire_record_free(&record);
    }
    guest_end(&g);
}
END_TEST

struct mute {
    int listen_fd;
    unsigned words; // 0: accepts only, 1: HELLO, 2: READY as well
    struct channel c;
};

static void *mute_main(void *arg)
{
    struct mute *m = arg;
    struct wire_record record = {0};
    struct wire_hello hello;
    if (channel_accept(&m->c, m->listen_fd, -1, 10000, 10000, NULL))
        return NULL;
    if (m->words >= 1 && !wire_expect(&m->c.wire, &record, WIRE_HELLO, NULL)) {
        wire_fixed(&record, &hello, sizeof(hello));
        hello.oldest = hello.version;
        say(&m->c, WIRE_HELLO, &hello, sizeof(hello));
    }
    if (m->words >= 2 && !wire_expect(&m->c.wire, &record, WIRE_MACHINE, NULL))
        say(&m->c, WIRE_READY, NULL, 0);
    wire_record_free(&record);
    return NULL; // and says nothing more, though the connection stands
}

// The source drops a destination that stalls, and its guest runs on.
START_TEST(test_stalling_destination)
{
    struct guest g = {.timeout_ms = 300};
    guest_boot(&g, 1, 32 * MiB, 256, 0, 0);
    for (unsigned words = 0; words <= 3; words++) {
        struct mute mute = {.words = words, .c = {.fd = -1}};
        struct arrival a = {.host = {.guest = &g}};
        struct migration m;
        struct migrate_report report;
        struct error why = {0};
        pthread_t thread;
        a.hooks = hooks_of(&a.host);
        OK(channel_listen("tcp:127.0.0.1:0", &mute.listen_fd, a.address, sizeof(a.address), &err));
        ck_assert_int_eq(pthread_create(&thread, NULL, mute_main, &mute), 0);
        struct migrate_params p = params_for(&a, MIGRATE_PRECOPY);
        p.connections = words == 3 ? 4 : 1; // for which nobody opens the door
        OK(migration_init(&m, &err));
        ck_assert_int_eq(migrate_out(g.bare->vm, &p, &m, &report, &why), -ETIMEDOUT);
        migration_free(&m);
        ck_assert_int_eq(report.owner, SOURCE_RUNNING);
        ck_assert(!vm_paused(g.bare->vm));
        pthread_join(thread, NULL);
        channel_close(&mute.c);
        close(mute.listen_fd);
        guest_check(&g);
    }
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
        ck_assert(relay.harmed);
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
    ck_assert_ptr_nonnull(strstr(result.err.text, "force-resume"));
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
        // Pushed pages; requests, of which there are a few.
        struct relay relay = {.connection = connection,
                              .to_dest = connection ? UINT64_MAX : 400000,
                              .to_source = connection ? 200 : UINT64_MAX};
        struct cut_result result = {0};
        guest_boot(&g, 1, 32 * MiB, 2048, 0, 0);
        guest_touches_all(&g); // 8 MiB to push: the cut comes long before the end
        move_over(&g, MIGRATE_POSTCOPY, &relay, &result);
        ck_assert(connection || (relay.harmed && result.ret < 0 && result.arrival.ret < 0));
        printf("post-copy broken: %s | %s\n", result.err.text, result.arrival.err.text);
        ck_assert(result.report.owner == SOURCE_SEVERED ||
                  (connection && result.report.owner == SOURCE_GONE));
        ck_assert_ptr_nonnull(result.arrival.vm);
        ck_assert(vm_paused(g.bare->vm));
        if (result.arrival.ret) {
            ck_assert_uint_gt(result.arrival.report.missing_pages, 0);
            // A vCPU that waits for a page in the kernel parks when that has come.
            ck_assert(vm_paused(result.arrival.vm) || atomic_load(&result.arrival.vm->pause));
        }
        vm_request_stop(result.arrival.vm, VM_STOP_HOST, 0, "test");
        arrival_free(&result.arrival);
        bare_end(result.arrival.host.bare);
        free(result.arrival.host.bare);
        guest_end(&g);
    }
}
END_TEST

// The link breaks again and again during post-copy: on the connection with pushed pages, on that
// with demanded ones, before anything has come, or because the user wants it. Each time both sides
// stand still and keep what they have; each time the guest goes on.
static void recover_once(struct guest *g, struct arrival *a, struct migrate_report *report,
                         struct relay *relay, bool last)
{
    struct migration m;
    struct error why = {0};
    relay_start(relay, a->address);
    struct migrate_params p = params_for(a, MIGRATE_POSTCOPY);
    p.to = relay->address;
    OK(migration_init(&m, &err));
    int ret = migrate_recover(g->bare->vm, &p, &m, report, &why);
    migration_free(&m);
    if (!last) // it may still have to pass the good-bye on
        relay_end(relay);
    ck_assert_msg(last == !ret, "recovery %u, cut %u at %llu: %s", report->recoveries,
                  relay->connection, (unsigned long long)relay->to_dest,
                  ret ? why.text : "the cut had no effect");
    ck_assert_int_eq(report->owner, last ? SOURCE_GONE : SOURCE_SEVERED);
    ck_assert(vm_paused(g->bare->vm));
}

static void postcopy_recovery(struct tls *tls, enum ram_backing backing)
{
    enum { CUTS = 10, PAGES = 16384 };
    struct guest g = {.security = {.tls = tls}, .backing = backing};
    struct arrival a;
    struct migration m;
    struct migrate_report report;
    struct error why = {0};
    // What says which pages are missing comes from the destination; what follows goes there.
    struct relay relay = {.to_dest = 2000000, .to_source = UINT64_MAX};
    guest_boot(&g, 2, 96 * MiB, PAGES, 0, 0);
    guest_touches_all(&g);
    arrival_begin(&a, &g);
    relay_start(&relay, a.address);
    struct migrate_params p = params_for(&a, MIGRATE_POSTCOPY);
    p.to = relay.address;
    OK(migration_init(&m, &err));
    int ret = migrate_out(g.bare->vm, &p, &m, &report, &why);
    migration_free(&m);
    relay_end(&relay);
    ck_assert_int_lt(ret, 0);
    ck_assert_msg(report.owner == SOURCE_SEVERED, "%s", why.text);
    ck_assert_ptr_nonnull(strstr(why.text, "ferry migrate recover"));
    for (unsigned cut = 1; cut < CUTS; cut++) {
        relay = (struct relay) {.to_dest = UINT64_MAX, .to_source = UINT64_MAX};
        switch (cut % 4) {
        case 0: // before the list of missing pages is through
            relay.to_source = 60;
            break;
        case 1:
            relay.connection = 1; // demanded pages
            relay.to_dest = 200;
            break;
        default:
            relay.to_dest = 1000 + 600000 * cut;
        }
        recover_once(&g, &a, &report, &relay, false);
    }
    relay = (struct relay) {.to_dest = UINT64_MAX, .to_source = UINT64_MAX};
    recover_once(&g, &a, &report, &relay, true);
    ck_assert_uint_eq(report.recoveries, CUTS);
    ck_assert_int_eq(arrival_join(&a), 0);
    relay_end(&relay);
    ck_assert_int_eq(a.report.owner, DEST_RUNNING);
    ck_assert_uint_eq(a.report.missing_pages, 0);
    printf("cut %u times: pushed %llu demand %llu of %u pages\n", CUTS,
           (unsigned long long)report.pushed_pages, (unsigned long long)report.demand_pages, PAGES);
    guest_end(&g);
    g.bare = a.host.bare;
    guest_check(&g);
    ck_assert_int_eq(migrate_recover(g.bare->vm, &p, &m, &report, NULL), -EPROTO);
    guest_end(&g);
}

START_TEST(test_postcopy_recovery)
{
    postcopy_recovery(NULL, RAM_ANONYMOUS);
}
END_TEST

START_TEST(test_postcopy_recovery_hugetlb)
{
    if (huge_pages(2 * 96 * MiB))
        postcopy_recovery(NULL, RAM_HUGETLB);
}
END_TEST

START_TEST(test_postcopy_recovery_tls)
{
    struct tls *tls = shared_key();
    postcopy_recovery(tls, RAM_MEMFD);
    tls_free(tls);
}
END_TEST

static void *sever_later(void *arg)
{
    struct migration *m = arg;
    while (migration_sever(m, NULL)) // until pages are pushed
        usleep(1000);
    return NULL;
}

// The user pauses the post-copy, and recovers it.
START_TEST(test_postcopy_paused)
{
    struct guest g = {0};
    struct arrival a;
    struct migration m;
    struct migrate_report report;
    struct error why = {0};
    pthread_t thread;
    guest_boot(&g, 1, 64 * MiB, 8192, 0, 0);
    guest_touches_all(&g);
    g.prepaging = PREPAGE_NONE; // takes at least a second
    arrival_begin(&a, &g);
    struct migrate_params p = params_for(&a, MIGRATE_POSTCOPY);
    p.prepaging = PREPAGE_NONE;
    OK(migration_init(&m, &err));
    ck_assert_int_eq(migration_sever(&m, NULL), -EBUSY);
    ck_assert_int_eq(pthread_create(&thread, NULL, sever_later, &m), 0);
    int ret = migrate_out(g.bare->vm, &p, &m, &report, &why);
    pthread_join(thread, NULL);
    migration_free(&m);
    ck_assert_int_lt(ret, 0);
    ck_assert_int_eq(report.owner, SOURCE_SEVERED);
    ck_assert_ptr_nonnull(strstr(why.text, "paused by the user"));
    OK(migration_init(&m, &err));
    OK(migrate_recover(g.bare->vm, &p, &m, &report, &err));
    migration_free(&m);
    ck_assert_int_eq(arrival_join(&a), 0);
    guest_end(&g);
    g.bare = a.host.bare;
    guest_check(&g);
    guest_end(&g);
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
    tcase_add_test(tc, test_ping_pong_tls);
    tcase_add_test(tc, test_ping_pong_2cpu);
    tcase_add_test(tc, test_ping_pong_memfd);
    tcase_add_test(tc, test_ping_pong_hugetlb);
    tcase_add_test(tc, test_ping_pong_dirty_ring);
    tcase_add_test(tc, test_ping_pong_streams);
    tcase_add_test(tc, test_ping_pong_above_3g);
    tcase_add_test(tc, test_sweep);
    tcase_add_test(tc, test_local);
    tcase_add_test(tc, test_paused_guest);
    tcase_add_test(tc, test_abort_before_commit);
    tcase_add_test(tc, test_deltas);
    tcase_add_test(tc, test_streams_limit);
    tcase_add_test(tc, test_not_converging);
    tcase_add_test(tc, test_stall_policy);
    tcase_add_test(tc, test_throttle);
    tcase_add_test(tc, test_cut_anywhere);
    tcase_add_test(tc, test_streams_cut_anywhere);
    tcase_add_test(tc, test_flip_anywhere);
    tcase_add_test(tc, test_hostile_source);
    tcase_add_test(tc, test_hostile_streams);
    tcase_add_test(tc, test_stalling_destination);
    tcase_add_test(tc, test_cut_at_the_switch);
    tcase_add_test(tc, test_doubt);
    tcase_add_test(tc, test_postcopy_broken);
    tcase_add_test(tc, test_postcopy_recovery);
    tcase_add_test(tc, test_postcopy_recovery_tls);
    tcase_add_test(tc, test_postcopy_recovery_hugetlb);
    tcase_add_test(tc, test_postcopy_paused);
}

int main(void)
{
    return bare_main("migrate_vm", add_tests);
}
