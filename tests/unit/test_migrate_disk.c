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

enum { MEMORY = 48 * MiB, BLOCKS = 48, STRIDE_KIB = 64, DISK = 4 * MiB, NAME = 64 };

// --- a guest with a disk

struct place { // where it may be
    struct bare *bare;
    struct virtio_blk_config disk;
    struct bare_device device;
    char image[NAME];
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

static struct migrate_hooks hooks_of(struct place *p)
{
    return (struct migrate_hooks) {
        .context = p, .describe = describe, .create_vm = create_vm, .destroy_vm = destroy_vm};
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

static void add_tests(TCase *tc)
{
    tcase_add_test(tc, test_shared);
    tcase_add_test(tc, test_with_its_disk);
}

int main(void)
{
    return bare_main("migrate_disk", add_tests);
}
