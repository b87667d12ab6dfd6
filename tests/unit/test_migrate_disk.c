// SPDX-License-Identifier: Apache-2.0
// A guest that writes to its disk moves between two VMs of this process, over a link that breaks in
// each place of the conversation: the disk is where the guest is, whole, locked for whoever has it
// and for nobody else. The guest (diskwalk) fails when it reads anything but what it wrote last.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include "devices/virtio_blk.h"
#include "migrate/migrate.h"
#include "migrate/receive.h"
#include "tests/bare/moves.h"
#include "tests/check_ok.h"
#include "vmm/stream.h"

enum { MEMORY = 48 * MiB, BLOCKS = 48, STRIDE_KIB = 64, DISK = 12 * MiB + 4096, NAME = 64 };

// --- a guest with a disk

struct place { // where it may be
    struct bare *bare;
    struct virtio_blk_config disk;
    struct bare_device device;
    char image[NAME];
    atomic_uint severed; // times that it has stopped here for want of pages or blocks
};

static void *loop_main(void *arg)
{
    struct bare *b = arg;
    OK(loop_run(b->loop, &err));
    return NULL;
}

static struct bare_config config_of(struct place *p, bool arrives)
{
    p->disk = (struct virtio_blk_config) {.queues = 1, .comes = arrives, .attach.arrives = arrives};
    memcpy(p->disk.path, p->image, sizeof(p->image));
    p->device = (struct bare_device) {&virtio_blk_class, &p->disk.attach};
    return (struct bare_config) {.guest = arrives ? NULL : "diskwalk",
                                 .memory = MEMORY,
                                 .params = {{UCALL_P_PAGES, BLOCKS}, {UCALL_P_KIB, STRIDE_KIB}},
                                 .nr_params = 2,
                                 .devices = &p->device,
                                 .nr_devices = 1};
}

static void place_boot(struct place *p)
{
    struct bare_config config = config_of(p, false);
    int fd = open(p->image, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ck_assert(fd >= 0 && !ftruncate(fd, DISK));
    close(fd);
    p->bare = calloc(1, sizeof(*p->bare));
    bare_create(p->bare, &config);
    bare_run(p->bare);
}

static void place_end(struct place *p)
{
    bare_end(p->bare);
    free(p->bare);
    p->bare = NULL;
}

// Two walks begun and ended here: the second saw what the first wrote, the first what was there.
static void walks(struct place *p)
{
    uint64_t first = 0, limit = time_ns() + BARE_WAIT_SECONDS * 1000000000ull;
    for (;;) {
        bool has = bare_has_value(p->bare, UCALL_V_COUNT, 0);
        uint64_t now = has ? bare_value(p->bare, UCALL_V_COUNT, 0) : 0;
        first = first ? first : now;
        if (first && now >= first + 2)
            return;
        ck_assert_msg(!vm_stopped(p->bare->vm), "%s", p->bare->vm->stop.text);
        ck_assert_uint_lt(time_ns(), limit);
        usleep(2000);
    }
}

static bool locked(const char *path)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    ck_assert(fd >= 0);
    bool busy = fcntl(fd, F_OFD_SETLK, &lock);
    close(fd);
    return busy;
}

static int describe(void *context, struct vm *vm, char **json, struct error *err)
{
    *json = strdup("{}");
    return 0;
}

static int create_vm(void *context, const char *json, struct vm **vm, struct error *err)
{
    struct place *p = context;
    struct bare_config config = config_of(p, true);
    p->bare = calloc(1, sizeof(*p->bare));
    bare_create(p->bare, &config);
    p->bare->loop_runs = true;
    ck_assert_int_eq(pthread_create(&p->bare->loop_thread, NULL, loop_main, p->bare), 0);
    *vm = p->bare->vm;
    return 0;
}

static void destroy_vm(void *context, struct vm *vm)
{
    place_end(context);
}

static void severed(void *context, struct vm *vm, const struct error *why)
{
    struct place *p = context;
    if (why)
        atomic_fetch_add(&p->severed, 1);
}

static struct migrate_hooks hooks_of(struct place *p)
{
    return (struct migrate_hooks) {.context = p,
                                   .describe = describe,
                                   .create_vm = create_vm,
                                   .destroy_vm = destroy_vm,
                                   .severed = severed};
}

// --- a move

// True: the guest is at `to` now. It is in one of the two places, and its disk with it.
static bool move(struct place *from, struct place *to, enum migrate_mode mode, bool disks,
                 struct relay *relay, struct migrate_report *report)
{
    struct arrival a = {.hooks = hooks_of(to)};
    struct migrate_hooks here = hooks_of(from);
    struct receive_params arriving = arrival_params();
    struct migrate_params p;
    struct migration m;
    struct error why = {0};
    arriving.handshake_ms = arriving.idle_ms = 5000;
    arriving.linger_ms = 3000;
    arrival_start(&a, NULL, &arriving);
    relay_start(relay, a.address);
    migrate_params_default(&p);
    p.to = relay->address;
    p.mode = mode;
    p.hooks = &here;
    p.disks = disks;
    p.ask_ms = 2000;
    p.downtime_ns = 3600000000000;
    OK(migration_init(&m, &err));
    int ret = migrate_out(from->bare->vm, &p, &m, report, &why);
    migration_free(&m);
    bool moved = report->owner == SOURCE_GONE;
    ck_assert_msg(moved || report->owner == SOURCE_RUNNING, "owner %s: %s",
                  owner_source_name(report->owner), why.text);
    ck_assert_int_eq(moved, !ret);
    // At once: the guest has its disk again, however long the other side takes to end.
    ck_assert(locked(moved ? to->image : from->image));
    ck_assert_int_eq(vm_paused(from->bare->vm), moved);
    receive_cancel(a.receive);
    arrival_join(&a);
    relay_end(relay);
    ck_assert_int_eq(moved, a.vm != NULL);
    if (moved)
        place_end(from);
    else
        ck_assert_ptr_null(to->bare);
    return moved;
}

// --- tests

// What breaks: the link after so many bytes, `up` the destination's words, or, after `mute` of
// these, the source's end of it only. 0 is never.
static const struct {
    uint64_t up, down, mute;
    bool half; // `up`: only the source learns that the link is gone
    int moves; // -1: either
} breaks[] = {
    {.up = SAID_READY - 1},                  // nothing has been sent
    {.up = SAID_READY},                      // on the way
    {.up = SAID_PREPARED - 1},               // it is loaded, and has the image
    {.up = SAID_PREPARED - 1, .half = true}, // and hears of the end by a connection of its own
    {.mute = SAID_PREPARED},                 // COMMIT does not come through: asked, no
    {.up = SAID_PREPARED, .moves = 1},       // it does: asked, yes
    {.up = SAID_RUNNING - 1, .moves = 1},
    {.down = 3000},                // in the machine's description
    {.down = 100000, .moves = -1}, // among pages, or blocks
    {.down = 500000, .moves = -1},
    {.moves = 1},
};

static void breaking(bool disks)
{
    struct place places[2] = {0};
    unsigned at = 0, moved = 0, times = bare_long() ? 20 : 1;
    struct migrate_report report;
    snprintf(places[0].image, NAME, "/tmp/ferry-moves-%d-a", getpid());
    snprintf(places[1].image, NAME, "/tmp/ferry-moves-%d-%s", getpid(), disks ? "b" : "a");
    place_boot(&places[0]);
    walks(&places[0]);
    for (unsigned i = 0; i < times * ARRAY_SIZE(breaks); i++) {
        unsigned row = i % ARRAY_SIZE(breaks);
        uint64_t kept = disks ? REC(struct wire_kept) + REC(struct wire_round) : 0;
        bool half = breaks[row].half || breaks[row].mute;
        struct relay relay = {.to_source = breaks[row].up ? breaks[row].up + kept : UINT64_MAX,
                              .to_dest = breaks[row].down ? breaks[row].down : UINT64_MAX,
                              .after_answer = breaks[row].mute ? breaks[row].mute + kept : 0,
                              .harm = half ? RELAY_MUTE : RELAY_CUT};
        if (disks && row == 0)
            relay.to_source = breaks[row].up;
        struct place *to = &places[!at];
        bool moves = move(&places[at], to, MIGRATE_PRECOPY, disks, &relay, &report);
        // With disks the number of passes, each with its ROUND, is not known beforehand.
        if (!disks && breaks[row].moves >= 0)
            ck_assert_msg(moves == breaks[row].moves, "row %u: moved %d", row, moves);
        if (!breaks[row].up && !breaks[row].down && !breaks[row].mute)
            ck_assert(moves);
        ck_assert(moves || relay.harmed);
        at = moves ? !at : at;
        moved += moves;
        walks(&places[at]);
        ck_assert(locked(places[at].image));
    }
    printf("%s: %u of %zu moved\n", disks ? "disks of their own" : "one disk", moved,
           times * ARRAY_SIZE(breaks));
    place_end(&places[at]);
    ck_assert(!locked(places[at].image));
    for (unsigned i = 0; i < 2; i++)
        unlink(places[i].image);
}

START_TEST(test_shared)
{
    breaking(false);
}
END_TEST

START_TEST(test_with_its_disk)
{
    breaking(true);
}
END_TEST

// --- the guest before its disk

// Something in every byte: no block is a hole, and the guest writes only 4 KiB of most of them.
static void image_fill(const char *path)
{
    autofree uint8_t *data = malloc(DISK);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    for (size_t i = 0; i < DISK; i++)
        data[i] = (uint8_t)(i * 2654435761u >> 13 | 1);
    ck_assert(fd >= 0 && write(fd, data, DISK) == DISK);
    close(fd);
}

// What the guest never writes is the same in both.
static void images_compare(const char *a, const char *b)
{
    autofree uint8_t *x = malloc(DISK), *y = malloc(DISK);
    int fds[2] = {open(a, O_RDONLY | O_CLOEXEC), open(b, O_RDONLY | O_CLOEXEC)};
    ck_assert(fds[0] >= 0 && fds[1] >= 0);
    ck_assert(read(fds[0], x, DISK) == DISK && read(fds[1], y, DISK) == DISK);
    for (size_t at = 0; at < DISK; at += 4096)
        if (at % (STRIDE_KIB * 1024) || at / (STRIDE_KIB * 1024) >= BLOCKS)
            ck_assert_msg(!memcmp(x + at, y + at, 4096), "byte %zu", at);
    close(fds[0]);
    close(fds[1]);
}

static uint64_t image_sum(const char *path)
{
    autofree uint64_t *data = malloc(DISK);
    uint64_t sum = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ck_assert(fd >= 0 && read(fd, data, DISK) == DISK);
    close(fd);
    for (size_t i = 0; i < DISK / 8; i++)
        sum = sum * 1099511628211u + data[i];
    return sum;
}

struct late {
    struct arrival a;
    struct place *from, *to;
    struct migrate_hooks here;
    struct migrate_params p;
    struct migrate_report report;
};

// Over a link that breaks after `down` bytes to the destination. `out`: migrate_out or
// migrate_recover.
static int late_try(struct late *l, uint64_t down,
                    int (*out)(struct vm *, const struct migrate_params *, struct migration *,
                               struct migrate_report *, struct error *))
{
    struct relay relay = {.to_source = UINT64_MAX, .to_dest = down};
    struct migration m;
    struct error why = {0};
    relay_start(&relay, l->a.address);
    l->p.to = relay.address;
    OK(migration_init(&m, &err));
    int ret = out(l->from->bare->vm, &l->p, &m, &l->report, &why);
    migration_free(&m);
    ck_assert_msg(ret ? down != UINT64_MAX && l->report.owner == SOURCE_SEVERED
                      : l->report.owner == SOURCE_GONE,
                  "%s: %s", owner_source_name(l->report.owner), why.text);
    if (!ret)
        arrival_wait(&l->a); // the good-bye may still be in the relay
    relay_end(&relay);
    return ret;
}

// Both stand still; what is missing there is here, and nobody can have it.
static void late_severed(struct late *l, unsigned times, uint64_t sum)
{
    struct vm *vm = l->to->bare->vm;
    uint64_t limit = time_ns() + BARE_WAIT_SECONDS * 1000000000ull;
    struct stream_mem state;
    struct error err = {0};
    while (atomic_load(&l->to->severed) < times || !vm_paused(vm)) {
        ck_assert_uint_lt(time_ns(), limit);
        usleep(1000);
    }
    ck_assert(vm_paused(l->from->bare->vm));
    ck_assert(locked(l->from->image) && locked(l->to->image));
    ck_assert_uint_eq(image_sum(l->from->image), sum);
    stream_mem_writer(&state, "state", WIRE_STATE_MAX);
    ck_assert_int_eq(vm_save(vm, &state.stream, &err), -EBUSY);
    ck_assert_msg(strstr(err.text, "still at the host"), "%s", err.text);
    stream_mem_free(&state);
}

// `cuts`: where the link breaks, up to a 0.
static void comes_later(enum migrate_mode mode, const uint64_t *cuts)
{
    struct place places[2] = {0};
    struct late l = {.from = &places[0], .to = &places[1]};
    struct receive_params arriving = arrival_params();
    for (unsigned i = 0; i < 2; i++)
        snprintf(places[i].image, NAME, "/tmp/ferry-late-%d-%u", getpid(), i);
    image_fill(places[0].image);
    place_boot(&places[0]);
    walks(&places[0]);
    l.here = hooks_of(l.from);
    l.a.hooks = hooks_of(l.to);
    arrival_start(&l.a, NULL, &arriving);
    migrate_params_default(&l.p);
    l.p.mode = mode;
    l.p.hooks = &l.here;
    l.p.disks = true;
    l.p.bandwidth = 6000000; // so that the guest asks for much of it
    l.p.on_stall = STALL_POSTCOPY;
    l.p.downtime_ns = 0;
    l.p.max_rounds = 1;
    int ret = late_try(&l, *cuts ? *cuts : UINT64_MAX, migrate_out);
    uint64_t sum = image_sum(places[0].image);
    for (unsigned times = 1; ret; times++) {
        late_severed(&l, times, sum);
        cuts++;
        ret = late_try(&l, *cuts ? *cuts : UINT64_MAX, migrate_recover);
    }
    ck_assert_uint_eq(*cuts, 0);
    printf("%s: %llu blocks pushed, %llu demanded, %u recoveries, downtime %llu us\n",
           migrate_mode_name(mode), (unsigned long long)l.report.pushed_blocks,
           (unsigned long long)l.report.demand_blocks, l.report.recoveries,
           (unsigned long long)l.report.downtime.total / 1000);
    ck_assert_int_ne(l.report.mode, MIGRATE_PRECOPY);
    // What a stalled pre-copy leaves is up to the guest.
    ck_assert(mode == MIGRATE_PRECOPY || l.report.pushed_blocks + l.report.demand_blocks);
    ck_assert_int_eq(l.a.ret, 0);
    ck_assert_uint_eq(l.a.report.missing_blocks, 0);
    ck_assert_int_eq(l.a.report.owner, DEST_RUNNING);
    arrival_free(&l.a);
    place_end(&places[0]);
    walks(&places[1]);
    place_end(&places[1]);
    images_compare(places[0].image, places[1].image);
    for (unsigned i = 0; i < 2; i++)
        unlink(places[i].image);
}

START_TEST(test_before_its_disk)
{
    static const uint64_t none[] = {0};
    comes_later(MIGRATE_POSTCOPY, none);
    comes_later(MIGRATE_HYBRID, none);
    comes_later(MIGRATE_PRECOPY, none);
}
END_TEST

// The link breaks while blocks are on the way: nothing is lost, and it goes on.
START_TEST(test_before_its_disk_broken)
{
    static const uint64_t cuts[] = {1200000, 400000, 3000, 500000, 0};
    comes_later(MIGRATE_POSTCOPY, cuts);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_test(tc, test_before_its_disk);
    tcase_add_test(tc, test_before_its_disk_broken);
    tcase_add_test(tc, test_shared);
    tcase_add_test(tc, test_with_its_disk);
}

int main(void)
{
    return bare_main("migrate_disk", add_tests);
}
