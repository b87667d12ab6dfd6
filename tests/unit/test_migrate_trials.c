// SPDX-License-Identifier: Apache-2.0
// Migrations that are disturbed at random moments and in every state, in all modes: exactly one
// side has the guest afterwards, whole. FERRY_LONG=1: hundreds of each, thousands of damaged
// streams. FERRY_SEED=N repeats a run.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

#include "migrate/channel.h"
#include "migrate/migrate.h"
#include "migrate/receive.h"
#include "migrate/wire.h"
#include "tests/bare/oracle.h"
#include "tests/random.h"

static const enum migrate_mode modes[] = {MIGRATE_PRECOPY, MIGRATE_POSTCOPY, MIGRATE_HYBRID};

static uint64_t seed_start(const char *test)
{
    const char *text = getenv("FERRY_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 10) : time_ns();
    printf("%s: FERRY_SEED=%" PRIu64 "\n", test, seed);
    return seed;
}

// --- one migration, disturbed

struct trial {
    struct guest *guest;
    struct relay link;
    enum migrate_mode mode;
    unsigned timeout_ms; // of both sides; 0: the usual ones
    unsigned ask_ms;
    uint64_t bandwidth;
    // Cancelled, by one side, so long after this phase.
    bool at_dest;
    enum migrate_phase phase;
    unsigned delay_us;
    int due_fd; // eventfd: the phase has come
    pthread_t canceller;

    struct arrival to;

    struct migration migration;
    struct migrate_report report;
    int sent;
    struct error sent_err;
};

static void trial_begin(struct trial *t)
{
    struct receive_params params = arrival_params();
    t->to = (struct arrival) {.host = {.guest = t->guest}};
    t->to.hooks = hooks_of(&t->to.host);
    if (t->timeout_ms)
        params.handshake_ms = params.idle_ms = t->timeout_ms;
    arrival_start(&t->to, NULL, &params);
}

static void arrival_end(struct trial *t)
{
    receive_cancel(t->to.receive);
    arrival_wait(&t->to);
    if (t->to.vm && t->to.ret)
        vm_request_stop(t->to.vm, VM_STOP_HOST, 0, "test");
    arrival_free(&t->to);
}

static struct migrate_params params_of(struct trial *t, const char *to)
{
    struct migrate_params p;
    migrate_params_default(&p);
    p.to = to;
    p.mode = t->mode;
    p.hooks = &t->to.hooks;
    p.bandwidth = t->bandwidth;
    p.downtime_ns = 3600000000000; // one round is enough
    p.ask_ms = t->ask_ms ? t->ask_ms : p.ask_ms;
    if (t->timeout_ms)
        p.handshake_ms = p.idle_ms = t->timeout_ms;
    return p;
}

// The link breaks but once: the second try gets through. Both sides then agree.
static void recover(struct trial *t)
{
    for (unsigned tries = 0; t->report.owner == SOURCE_SEVERED; tries++) {
        if (tries)
            usleep(100000);
        ck_assert_msg(tries < 600, "recovery: %s | %s", t->sent_err.text, t->to.err.text);
        ck_assert(vm_paused(t->guest->bare->vm)); // it is not this one's to run
        struct migrate_params p = params_of(t, t->to.address);
        t->sent_err = (struct error) {0};
        OK(migration_init(&t->migration, &err));
        t->sent = migrate_recover(t->guest->bare->vm, &p, &t->migration, &t->report, &t->sent_err);
        migration_free(&t->migration);
    }
}

static void trial_run(struct trial *t)
{
    trial_begin(t);
    relay_start(&t->link, t->to.address);
    struct migrate_params p = params_of(t, t->link.address);
    OK(migration_init(&t->migration, &err));
    t->sent = migrate_out(t->guest->bare->vm, &p, &t->migration, &t->report, &t->sent_err);
}

// Exactly one side has the guest, there it is whole and runs. It goes on being the test's.
static bool trial_follow(struct trial *t)
{
    struct guest *g = t->guest;
    bool here = t->report.owner == SOURCE_RUNNING;
    ck_assert_msg(here || t->report.owner == SOURCE_GONE, "owner %s: %s | %s",
                  owner_source_name(t->report.owner), t->sent_err.text, t->to.err.text);
    ck_assert_int_eq(here, !!t->sent);
    ck_assert_msg(here == !t->to.vm, "source: %s | destination: %s", t->sent_err.text,
                  t->to.err.text);
    ck_assert_int_eq(here, t->to.report.owner != DEST_RUNNING);
    ck_assert_int_eq(here, !vm_paused(g->bare->vm));
    ck_assert_int_eq(here, !t->to.host.bare);
    if (!here) {
        ck_assert_uint_eq(t->to.report.missing_pages, 0);
        guest_end(g);
        g->bare = t->to.host.bare;
    }
    guest_check(g);
    return !here;
}

static bool trial_end(struct trial *t)
{
    migration_free(&t->migration);
    recover(t);
    arrival_end(t);
    relay_end(&t->link);
    return trial_follow(t);
}

// --- 1. the memory oracle, back and forth

static const struct {
    uint64_t memory, base;
} places[] = {{64 * MiB, 0}, {3 * GiB + 256 * MiB, 0xc0000000 - 8 * MiB}};

// us for a loop over all pages: none in the time a move takes, some, as fast as it can
static const unsigned periods[] = {50000, 3000, 0};
static const unsigned cpu_counts[] = {1, 2, 4};

START_TEST(test_ping_pong)
{
    unsigned moves = bare_long() ? 12 : 1, count = 0;
    for (unsigned i = 0; i < 18; i += bare_long() ? 1 : 4) {
        struct guest g = {.backing = i % 2 ? RAM_MEMFD : RAM_ANONYMOUS};
        unsigned cpus = cpu_counts[i / 6], place = i / 3 % 2;
        guest_boot(&g, cpus, places[place].memory, 4096, places[place].base, periods[i % 3]);
        for (unsigned k = 0; k < moves; k++) {
            struct trial t = {
                .guest = &g,
                .mode = modes[count++ % ARRAY_SIZE(modes)],
                .link = {.connection = RELAY_ALL, .to_dest = UINT64_MAX, .to_source = UINT64_MAX}};
            trial_run(&t);
            ck_assert_msg(trial_end(&t), "%u CPUs, place %u, period %u: %s", cpus, place,
                          periods[i % 3], t.sent_err.text);
        }
        guest_end(&g);
    }
    printf("ping-pong: %u moves, mixed\n", count);
}
END_TEST

// --- 3. the link

static void outcome_print(const char *what, unsigned times, const unsigned *outcomes)
{
    printf("%s: %u times: %u stayed, %u moved, %u of these by recovery; %u were not met\n", what,
           times, outcomes[0], outcomes[1], outcomes[2], outcomes[3]);
}

START_TEST(test_link_breaks_at_random)
{
    static const char *const names[] = {"cut", "stalled"};
    unsigned outcomes[2][4] = {{0}};
    unsigned times[2] = {bare_long() ? 300 : 24, bare_long() ? 60 : 3};
    uint64_t seed = seed_start("link"), size[ARRAY_SIZE(modes)][2];
    struct guest g = {0};
    guest_boot(&g, 2, 32 * MiB, 512, 0, 0);
    for (unsigned harm = 0; harm < 2; harm++)
        for (unsigned i = 0; i < times[harm] + ARRAY_SIZE(modes); i++) {
            unsigned m = i % ARRAY_SIZE(modes), measured = i < ARRAY_SIZE(modes);
            struct trial t = {
                .guest = &g,
                .mode = modes[m],
                .timeout_ms = harm == RELAY_STALL && !measured ? 1500 : 0,
                .link = {.connection = RELAY_ALL, .to_dest = UINT64_MAX, .to_source = UINT64_MAX}};
            t.link.harm = (enum relay_harm)harm;
            // Half of them where one side says something important.
            if (!measured && random_below(&seed, 2))
                t.link.to_dest = random_below(&seed, size[m][0]);
            else if (!measured)
                t.link.to_source = random_below(&seed, size[m][1]);
            trial_run(&t);
            bool recovered = t.report.owner == SOURCE_SEVERED;
            bool moved = trial_end(&t);
            if (measured) {
                size[m][0] = t.link.down;
                size[m][1] = t.link.up;
                ck_assert(moved);
                continue;
            }
            outcomes[harm][moved]++;
            outcomes[harm][2] += recovered;
            outcomes[harm][3] += !t.link.harmed;
        }
    for (unsigned harm = 0; harm < 2; harm++)
        outcome_print(names[harm], times[harm], outcomes[harm]);
    guest_end(&g);
}
END_TEST

// --- 3. cancel

static void due(const struct migrate_progress *p, void *arg)
{
    struct trial *t = arg;
    if (p->phase >= t->phase)
        eventfd_write(t->due_fd, 1);
}

static void *cancel_main(void *arg)
{
    struct trial *t = arg;
    eventfd_t due;
    eventfd_read(t->due_fd, &due);
    if (t->delay_us)
        usleep(t->delay_us);
    if (t->at_dest)
        receive_cancel(t->to.receive);
    else
        migration_cancel(&t->migration);
    return NULL;
}

static bool trial_cancelled(struct trial *t)
{
    trial_begin(t);
    relay_start(&t->link, t->to.address);
    struct migrate_params p = params_of(t, t->link.address);
    OK(migration_init(&t->migration, &err));
    t->due_fd = eventfd(0, EFD_CLOEXEC);
    t->migration.on_progress = due;
    t->migration.on_progress_arg = t;
    ck_assert_int_eq(pthread_create(&t->canceller, NULL, cancel_main, t), 0);
    t->sent = migrate_out(t->guest->bare->vm, &p, &t->migration, &t->report, &t->sent_err);
    pthread_join(t->canceller, NULL); // every migration ends in DONE or FAILED, at least
    close(t->due_fd);
    if (t->sent && !t->at_dest && t->report.owner == SOURCE_RUNNING)
        ck_assert_int_eq(t->sent, -ECANCELED);
    return trial_end(t);
}

// On either side, at any moment.
START_TEST(test_cancel_at_random)
{
    unsigned times = bare_long() ? 300 : 24, outcomes[2][2] = {{0}};
    uint64_t seed = seed_start("cancel");
    struct guest g = {0};
    guest_boot(&g, 2, 32 * MiB, 512, 0, 0);
    for (unsigned i = 0; i < times; i++) {
        struct trial t = {
            .guest = &g,
            .mode = modes[i % ARRAY_SIZE(modes)],
            .at_dest = i / 3 % 2,
            .phase = (enum migrate_phase)(i / 6 % (MIGRATE_PUSHING + 1)),
            .delay_us = (unsigned)random_below(&seed, 20000),
            .link = {.connection = RELAY_ALL, .to_dest = UINT64_MAX, .to_source = UINT64_MAX}};
        outcomes[t.at_dest][trial_cancelled(&t)]++;
    }
    printf("cancelled %u times: by the source %u stayed and %u moved, by the destination %u and "
           "%u\n",
           times, outcomes[0][0], outcomes[0][1], outcomes[1][0], outcomes[1][1]);
    guest_end(&g);
}
END_TEST

static void at_phase(const struct migrate_progress *p, void *arg)
{
    struct trial *t = arg;
    if (p->phase == t->phase)
        migration_cancel(&t->migration);
}

// The state as the user sees it. From PUSHING on the guest is not ours: a cancel changes nothing.
START_TEST(test_cancel_in_every_state)
{
    struct guest g = {0};
    guest_boot(&g, 2, 32 * MiB, 512, 0, 0);
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++)
        for (enum migrate_phase phase = MIGRATE_CONNECTING; phase <= MIGRATE_PUSHING; phase++) {
            bool meets = phase == MIGRATE_ROUNDS    ? modes[m] != MIGRATE_POSTCOPY
                         : phase == MIGRATE_PUSHING ? modes[m] != MIGRATE_PRECOPY
                         : phase == MIGRATE_DISKS   ? false
                                                    : true;
            struct trial t = {
                .guest = &g,
                .mode = modes[m],
                .phase = phase,
                .link = {.connection = RELAY_ALL, .to_dest = UINT64_MAX, .to_source = UINT64_MAX}};
            trial_begin(&t);
            relay_start(&t.link, t.to.address);
            struct migrate_params p = params_of(&t, t.link.address);
            OK(migration_init(&t.migration, &err));
            t.migration.on_progress = at_phase;
            t.migration.on_progress_arg = &t;
            t.sent = migrate_out(g.bare->vm, &p, &t.migration, &t.report, &t.sent_err);
            bool moved = trial_end(&t), stays = meets && phase < MIGRATE_PUSHING;
            ck_assert_msg(moved == !stays, "%s cancelled in %s: %s", migrate_mode_name(modes[m]),
                          migrate_phase_name(phase), t.sent_err.text);
            if (stays)
                ck_assert_int_eq(t.sent, -ECANCELED);
        }
    // ASKING: the user need not wait for the end of the questions, but nothing runs here for it.
    struct trial t = {.guest = &g,
                      .mode = MIGRATE_PRECOPY,
                      .phase = MIGRATE_ASKING,
                      .ask_ms = 3600 * 1000,
                      .link = {.connection = RELAY_ALL,
                               .to_dest = UINT64_MAX,
                               .to_source = SAID_PREPARED,
                               .dead_afterwards = true}};
    trial_begin(&t);
    relay_start(&t.link, t.to.address);
    struct migrate_params p = params_of(&t, t.link.address);
    p.max_rounds = 1; // or the positions are others
    OK(migration_init(&t.migration, &err));
    t.migration.on_progress = at_phase;
    t.migration.on_progress_arg = &t;
    ck_assert_int_eq(migrate_out(g.bare->vm, &p, &t.migration, &t.report, &t.sent_err),
                     -EOWNERDEAD);
    ck_assert_int_eq(t.report.owner, SOURCE_DOUBT);
    ck_assert(vm_paused(g.bare->vm));
    migration_free(&t.migration);
    arrival_end(&t);
    relay_end(&t.link);
    ck_assert_ptr_nonnull(t.to.vm); // in fact it has moved
    guest_end(&g);
    g.bare = t.to.host.bare;
    guest_check(&g);
    guest_end(&g);
}
END_TEST

// --- 4. damaged streams

struct recorded {
    struct stream_mem streams[2]; // main, demand
    size_t at[512];               // where each record of the first begins, and its end
    unsigned nr;
    unsigned commit; // that record's index
};

// A paused guest: every page comes once, so whatever is damaged is missed.
static void stream_record(struct recorded *r, struct guest *g, enum migrate_mode mode)
{
    *r = (struct recorded) {0};
    for (unsigned i = 0; i < 2; i++)
        stream_mem_writer(&r->streams[i], "stream", 64 * MiB);
    struct trial t = {.guest = g,
                      .mode = mode,
                      .link = {.connection = RELAY_ALL,
                               .to_dest = UINT64_MAX,
                               .to_source = UINT64_MAX,
                               .keep = r->streams,
                               .nr_keep = 2}};
    bare_pause(g->bare);
    trial_run(&t);
    ck_assert_msg(!t.sent, "%s", t.sent_err.text);
    migration_free(&t.migration);
    arrival_end(&t);
    relay_end(&t.link);
    guest_end(g);
    g->bare = t.to.host.bare;
    const uint8_t *data = r->streams[0].data;
    size_t at = 0;
    while (at < r->streams[0].len) {
        struct wire_header h;
        memcpy(&h, data + at, sizeof(h));
        ck_assert_uint_lt(r->nr, ARRAY_SIZE(r->at) - 1);
        if (h.type == WIRE_COMMIT)
            r->commit = r->nr;
        r->at[r->nr++] = at;
        at += sizeof(h) + h.meta_len + h.data_len;
    }
    ck_assert_uint_eq(at, r->streams[0].len);
    r->at[r->nr] = at;
    ck_assert_uint_gt(r->commit, 0);
}

// False: nobody takes it any more.
static bool send_all(int fd, const uint8_t *data, size_t len)
{
    while (len) {
        ssize_t n = send(fd, data, len, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        data += n;
        len -= (size_t)n;
    }
    return true;
}

static bool recv_all(int fd, uint8_t *data, size_t len)
{
    while (len) {
        ssize_t n = recv(fd, data, len, 0);
        if (n <= 0)
            return false;
        data += n;
        len -= (size_t)n;
    }
    return true;
}

// -1: nobody waits there any more.
static int caller(const char *address)
{
    struct channel c;
    struct error err;
    if (channel_connect(&c, address, -1, 10000, &err))
        return -1;
    fcntl(c.fd, F_SETFL, 0);
    return c.fd;
}

// Says all of it. The second connection is let in once the first has been told READY.
static void stream_replay(struct trial *t, const struct recorded *r, const uint8_t *data,
                          size_t len)
{
    int fd = caller(t->to.address), demand = -1;
    size_t first = r->at[2] < len ? r->at[2] : len; // hello, machine
    uint8_t ready[SAID_READY];
    bool goes = send_all(fd, data, first);
    if (goes && len > first && r->streams[1].len) {
        goes = recv_all(fd, ready, sizeof(ready));
        demand = goes ? caller(t->to.address) : -1;
        goes = demand >= 0 && send_all(demand, r->streams[1].data, r->streams[1].len);
    }
    if (goes)
        send_all(fd, data + first, len - first);
    shutdown(fd, SHUT_WR);
    // Closing earlier would lose what it has not read. After pre-copy it would wait for a question.
    struct wire_header h = {0};
    uint8_t meta[4096];
    for (goes = true; (r->streams[1].len || h.type != WIRE_RUNNING) && goes;)
        goes = recv_all(fd, (uint8_t *)&h, sizeof(h)) && h.meta_len <= sizeof(meta) &&
               recv_all(fd, meta, h.meta_len);
    close(fd);
    if (demand >= 0)
        close(demand);
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

static unsigned entries(const char *path)
{
    DIR *dir = opendir(path);
    unsigned n = 0;
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static void damaged_once(struct guest *g, const struct recorded *r, uint64_t *seed, bool truncate,
                         unsigned *outcomes)
{
    size_t len = r->streams[0].len;
    // Any record is as likely, whatever its size: most bytes are page data.
    unsigned record = (unsigned)random_below(seed, r->nr);
    size_t at = r->at[record] + random_below(seed, r->at[record + 1] - r->at[record]);
    if (random_below(seed, 2))
        at = random_below(seed, len);
    unsigned bit = (unsigned)random_below(seed, 8);
    struct trial t = {.guest = g};
    uint8_t *copy = malloc(len);
    memcpy(copy, r->streams[0].data, len);
    copy[at] ^= (uint8_t)(1u << bit);
    trial_begin(&t);
    stream_replay(&t, r, copy, truncate ? at : len);
    arrival_end(&t);
    free(copy);
    bool before = at < r->at[r->commit + 1], whole = t.to.vm && !t.to.ret;
    // A match of LZ4 that lies somewhere else may be the same bytes: then nothing was damaged.
    ck_assert_msg(!before || !whole || !truncate, "cut at byte %zu of %zu: it runs", at, len);
    ck_assert_int_eq(!t.to.vm, !t.to.host.bare);
    if (whole)
        ck_assert_msg(!memcmp(t.to.vm->ram.map, g->bare->vm->ram.map, t.to.vm->ram.size),
                      "byte %zu, bit %u: it runs with other memory", at, bit);
    ck_assert_msg(!before || whole || !t.to.vm, "byte %zu, bit %u: it has the guest", at, bit);
    if (t.to.ret) { // says where
        ck_assert_msg(strstr(t.to.err.text, "byte") || strstr(t.to.err.text, "record") ||
                          strstr(t.to.err.text, "page"),
                      "byte %zu: %s", at, t.to.err.text);
        if (outcomes[0] + outcomes[1] < 12)
            printf("  %s at byte %zu: %s\n", truncate ? "cut" : "flipped", at, t.to.err.text);
    }
    if (!before)
        ck_assert_msg(t.to.vm && (!t.to.ret || t.to.report.missing_pages), "byte %zu: %s", at,
                      t.to.err.text);
    outcomes[before && whole ? 2 : !!t.to.vm]++;
    if (t.to.host.bare) {
        bare_end(t.to.host.bare);
        free(t.to.host.bare);
    }
}

START_TEST(test_damaged_streams)
{
    unsigned times = bare_long() ? 10000 : 200, outcomes[3] = {0};
    uint64_t seed = seed_start("damaged"), memory = 0;
    unsigned fds = 0, threads = 0;
    struct guest g = {0};
    struct recorded recorded[2];
    guest_boot(&g, 1, 16 * MiB, 64, 0, 0);
    stream_record(&recorded[0], &g, MIGRATE_PRECOPY);
    stream_record(&recorded[1], &g, MIGRATE_POSTCOPY);
    for (unsigned i = 0; i < times; i++) {
        if (i == times / 4) {
            memory = resident();
            fds = entries("/proc/self/fd");
            threads = entries("/proc/self/task");
        }
        damaged_once(&g, &recorded[i % 2], &seed, i / 2 % 2, outcomes);
    }
    printf("damaged: %u streams, %u refused, %u after COMMIT, %u the same all the same; resident "
           "%" PRIu64 " -> %" PRIu64 " KiB\n",
           times, outcomes[0], outcomes[1], outcomes[2], memory / 1024, resident() / 1024);
    ck_assert_uint_gt(outcomes[0], times / 4);
    ck_assert_uint_le(outcomes[2], times / 20);
#ifndef __SANITIZE_ADDRESS__ // which keeps what was freed for a while
    ck_assert_uint_lt(resident(), memory + 8 * MiB);
#endif
    ck_assert_uint_eq(entries("/proc/self/fd"), fds);
    ck_assert_uint_eq(entries("/proc/self/task"), threads);
    for (unsigned i = 0; i < 2; i++)
        for (unsigned k = 0; k < 2; k++)
            stream_mem_free(&recorded[i].streams[k]);
    bare_resume(g.bare);
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
    if (bare_long())
        tcase_set_timeout(tc, 3600);
    tcase_add_test(tc, test_ping_pong);
    tcase_add_test(tc, test_link_breaks_at_random);
    tcase_add_test(tc, test_cancel_at_random);
    tcase_add_test(tc, test_cancel_in_every_state);
    tcase_add_test(tc, test_damaged_streams);
}

int main(void)
{
    return bare_main("migrate_trials", add_tests);
}
