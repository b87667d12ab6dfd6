// SPDX-License-Identifier: Apache-2.0
// A disk of which blocks are still elsewhere: who waits, who does not, and that nothing old ever
// comes after something new.
#include "devices/blk_absent.h"

#include <poll.h>

#include "devices/blk_engine.h"
#include "tests/unit/blk_rig.h"
#include "vmm/disk.h"

enum { DISK = SECTORS * BLK_SECTOR, BLOCKS = DISK / DISK_BLOCK, PER = DISK_BLOCK / BLK_SECTOR };
enum { OLD = 0x55, NEW = 0xaa, STALE = 0x11 };

// --- the map alone

struct bell {
    unsigned rings[4];
};

static void bell_ring(void *arg, unsigned queue)
{
    ((struct bell *)arg)->rings[queue]++;
}

static struct blk_request change(enum blk_op op, unsigned queue, uint64_t offset, uint64_t len)
{
    return (struct blk_request) {
        .op = op, .queue = queue, .nr_ranges = 1, .ranges[0] = {.offset = offset, .len = len}};
}

// Ten blocks and three sectors: 0, 2, 9 and 10 are missing.
static struct blk_absent *map_new(int fd, struct bell *bell)
{
    uint64_t *missing = calloc(1, 8);
    *missing = 1 | 1 << 2 | 1 << 9 | 1 << 10;
    struct blk_absent *a = blk_absent_create(missing, 10 * DISK_BLOCK + 1536, fd, bell_ring, bell);
    ck_assert_ptr_nonnull(a);
    ck_assert_uint_eq(blk_absent_missing(a, NULL), 4);
    return a;
}

static bool woken(int fd)
{
    eventfd_t count;
    return !eventfd_read(fd, &count);
}

START_TEST(test_map)
{
    const uint64_t b = DISK_BLOCK;
    struct bell bell = {0};
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    struct blk_absent *a = map_new(fd, &bell);
    uint64_t blocks[4], copy = 0;
    const struct {
        enum blk_op op;
        uint64_t offset, len;
        enum blk_absent_verdict verdict;
    } free[] = {{BLK_READ, b, b, BLK_ABSENT_GO},           {BLK_WRITE, b + 512, 512, BLK_ABSENT_GO},
                {BLK_READ, 3 * b, 6 * b, BLK_ABSENT_GO},   {BLK_FLUSH, 0, 0, BLK_ABSENT_GO},
                {BLK_DISCARD, b, b, BLK_ABSENT_GO},        {BLK_DISCARD, 0, b, BLK_ABSENT_SKIP},
                {BLK_DISCARD, b, 512 + b, BLK_ABSENT_SKIP}};
    for (unsigned i = 0; i < ARRAY_SIZE(free); i++) {
        struct blk_request r = change(free[i].op, 0, free[i].offset, free[i].len);
        r.nr_ranges = free[i].op != BLK_FLUSH;
        ck_assert_int_eq(blk_absent_look(a, &r), free[i].verdict);
    }
    ck_assert(!woken(fd));
    // A part of 0: it waits, and is asked for once.
    struct blk_request part = change(BLK_WRITE, 1, 512, b),
                       read = change(BLK_READ, 2, b - 512, 512);
    ck_assert_int_eq(blk_absent_look(a, &part), BLK_ABSENT_PARK);
    ck_assert(woken(fd));
    ck_assert_int_eq(blk_absent_look(a, &read), BLK_ABSENT_PARK);
    ck_assert(!woken(fd));
    ck_assert_uint_eq(blk_absent_wanted(a, blocks, 4), 1);
    ck_assert_uint_eq(blocks[0], 0);
    ck_assert_uint_eq(blk_absent_wanted(a, blocks, 4), 0);
    blk_absent_again(a);
    ck_assert_uint_eq(blk_absent_wanted(a, blocks, 4), 1);
    // All of 0, while somebody waits for what is in it: not now.
    struct blk_request whole = change(BLK_WRITE, 3, 0, 2 * b);
    ck_assert_int_eq(blk_absent_look(a, &whole), BLK_ABSENT_PARK);
    ck_assert(blk_absent_fill_begin(a, 0));
    ck_assert(!blk_absent_fill_begin(a, 0));
    blk_absent_fill_end(a, 0, true);
    ck_assert(!bell.rings[0] && bell.rings[1] == 1 && bell.rings[2] == 1 && bell.rings[3] == 1);
    ck_assert_int_eq(blk_absent_look(a, &part), BLK_ABSENT_GO);
    ck_assert_int_eq(blk_absent_look(a, &read), BLK_ABSENT_GO);
    for (unsigned q = 1; q < 4; q++)
        blk_absent_unpark(a, q);
    ck_assert(!blk_absent_fill_begin(a, 0) && !blk_absent_fill_begin(a, 1));
    ck_assert(!blk_absent_fill_begin(a, 11) && !blk_absent_fill_begin(a, UINT64_MAX));
    // All of 2, and parts of its neighbours: nobody waits, and what comes is dropped.
    struct blk_request over = change(BLK_WRITE, 0, 2 * b - 512, b + 1024), after = over;
    ck_assert_int_eq(blk_absent_look(a, &over), BLK_ABSENT_FILL);
    ck_assert(!blk_absent_fill_begin(a, 2));
    ck_assert_int_eq(blk_absent_look(a, &after), BLK_ABSENT_PARK);
    ck_assert_uint_eq(blk_absent_wanted(a, blocks, 4), 0); // it is on its way
    blk_absent_done(a, &over, false);                      // or not
    ck_assert(woken(fd) && bell.rings[0] == 1);
    ck_assert_uint_eq(blk_absent_wanted(a, blocks, 4), 1);
    ck_assert_uint_eq(blocks[0], 2);
    ck_assert_uint_eq(blk_absent_missing(a, &copy), 3);
    ck_assert_uint_eq(copy, 1 << 2 | 1 << 9 | 1 << 10);
    ck_assert(blk_absent_fill_begin(a, 2));
    blk_absent_fill_end(a, 2, true);
    ck_assert_int_eq(blk_absent_look(a, &after), BLK_ABSENT_GO);
    blk_absent_unpark(a, 0);
    // The last one ends where the disk does.
    struct blk_request less = change(BLK_ZERO, 0, 10 * b, 1024);
    ck_assert_int_eq(blk_absent_look(a, &less), BLK_ABSENT_PARK);
    ck_assert(woken(fd) && blk_absent_fill_begin(a, 10));
    blk_absent_fill_end(a, 10, false);
    ck_assert(woken(fd));
    ck_assert_uint_eq(blk_absent_wanted(a, blocks, 4), 1);
    ck_assert_uint_eq(blk_absent_missing(a, NULL), 2);
    struct blk_request ends = change(BLK_ZERO, 0, 9 * b, b + 1536);
    ck_assert_int_eq(blk_absent_look(a, &ends), BLK_ABSENT_PARK); // behind that one
    ck_assert(woken(fd));
    blk_absent_free(a);
    a = map_new(fd, &bell);
    struct blk_request zeroes = change(BLK_ZERO, 0, 9 * b, b + 1536);
    ck_assert_int_eq(blk_absent_look(a, &zeroes), BLK_ABSENT_FILL);
    ck_assert(!woken(fd));
    blk_absent_done(a, &zeroes, true);
    ck_assert_uint_eq(blk_absent_missing(a, NULL), 2);
    struct blk_request rest = change(BLK_WRITE, 0, 0, 3 * b);
    ck_assert_int_eq(blk_absent_look(a, &rest), BLK_ABSENT_FILL);
    ck_assert(!woken(fd));
    blk_absent_done(a, &rest, true);
    ck_assert(woken(fd)); // nothing is missing any more
    ck_assert_uint_eq(blk_absent_missing(a, NULL), 0);
    blk_absent_free(a);
    close(fd);
}
END_TEST

// --- a disk

struct scene {
    struct rig *r;
    const struct disk_ops *ops;
    int fd;
    uint8_t *source; // what is at the host it came from
};

// All of it is missing; what its file has is nobody's.
static void scene_open(struct scene *s)
{
    struct error err = {0};
    *s = (struct scene) {.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), .source = malloc(DISK)};
    s->r = rig_blk("");
    s->ops = s->r->dev->class->disk;
    for (unsigned i = 0; i < DISK; i++)
        s->source[i] = (uint8_t)(OLD + i / DISK_BLOCK);
    uint64_t *missing = calloc(1, 8);
    *missing = (1 << BLOCKS) - 1;
    ck_assert_msg(!s->ops->lack(s->r->dev, missing, s->fd, &err), "%s", err.text);
    start(s->r, false);
}

static void scene_close(struct scene *s)
{
    rig_free(s->r);
    close(s->fd);
    free(s->source);
}

static bool comes(struct scene *s, uint64_t block)
{
    struct error err = {0};
    if (!s->ops->fill_begin(s->r->dev, block))
        return false;
    ck_assert_msg(!s->ops->write(s->r->dev, block * DISK_BLOCK, s->source + block * DISK_BLOCK,
                                 DISK_BLOCK, &err),
                  "%s", err.text);
    s->ops->fill_end(s->r->dev, block, true);
    return true;
}

static bool answered(struct rig *r)
{
    struct error err = {0};
    for (unsigned i = 0; i < 20; i++)
        ck_assert(!loop_turn(r->vm.loop, false, &err));
    return *at(r, STATUS) != S_NONE;
}

static uint8_t old_of(unsigned block)
{
    return (uint8_t)(OLD + block);
}

START_TEST(test_waits)
{
    struct scene s;
    uint64_t block;
    scene_open(&s);
    submit(s.r, T_IN, 3 * PER + 8, DATA, 4096);
    ck_assert(!answered(s.r));
    ck_assert(woken(s.fd));
    ck_assert_uint_eq(s.ops->wanted(s.r->dev, &block, 1, false), 1);
    ck_assert_uint_eq(block, 3);
    ck_assert(comes(&s, 2)); // another one
    ck_assert(!answered(s.r));
    ck_assert(comes(&s, 3));
    used_wait(s.r);
    ck_assert_uint_eq(*at(s.r, STATUS), S_OK);
    ck_assert(filled(s.r, DATA, old_of(3), 4096));
    // A write to a part of it: what is around it comes, and then the write is there.
    memset(at(s.r, DATA), NEW, 4096);
    submit(s.r, T_OUT, 5 * PER + 8, DATA, 4096);
    ck_assert(!answered(s.r));
    ck_assert(comes(&s, 5));
    used_wait(s.r);
    ck_assert(!comes(&s, 5));
    ck_assert_uint_eq(request(s.r, T_IN, 5 * PER, DATA, DISK_BLOCK), S_OK);
    ck_assert(filled(s.r, DATA, old_of(5), 4096) && filled(s.r, DATA + 4096, NEW, 4096) &&
              filled(s.r, DATA + 8192, old_of(5), DISK_BLOCK - 8192));
    ck_assert_uint_eq(request(s.r, T_FLUSH, 0, 0, 0), S_OK);
    scene_close(&s);
}
END_TEST

// What is written as a whole is here, and what comes of it later is not wanted.
START_TEST(test_written)
{
    struct scene s;
    const struct {
        uint64_t sector;
        uint32_t sectors, flags;
    } range = {7 * PER, PER, 0};
    scene_open(&s);
    memset(at(s.r, DATA), NEW, DISK_BLOCK);
    ck_assert_uint_eq(request(s.r, T_OUT, 6 * PER, DATA, DISK_BLOCK), S_OK);
    ck_assert(!comes(&s, 6));
    memcpy(at(s.r, DATA), &range, sizeof(range));
    ck_assert_uint_eq(request(s.r, T_DISCARD, 0, DATA, sizeof(range)), S_OK); // not followed
    ck_assert_uint_eq(s.ops->missing(s.r->dev, NULL), BLOCKS - 1);
    ck_assert_uint_eq(request(s.r, T_ZEROES, 0, DATA, sizeof(range)), S_OK);
    ck_assert(!comes(&s, 7));
    ck_assert(!woken(s.fd)); // nobody was asked for anything
    ck_assert_uint_eq(request(s.r, T_IN, 6 * PER, DATA, 2 * DISK_BLOCK), S_OK);
    ck_assert(filled(s.r, DATA, NEW, DISK_BLOCK) && filled(s.r, DATA + DISK_BLOCK, 0, DISK_BLOCK));
    scene_close(&s);
}
END_TEST

// A paused guest is not answered, one that resets its disk never; the disk is not saved or resized.
START_TEST(test_paused)
{
    struct scene s;
    struct error err = {0};
    scene_open(&s);
    submit(s.r, T_IN, 0, DATA, 4096);
    ck_assert(!answered(s.r));
    ck_assert(!s.r->dev->class->quiesce(s.r->dev, &err));
    ck_assert_int_eq(s.r->dev->class->state->save(s.r->dev, &err), -EBUSY);
    ck_assert_ptr_nonnull(strstr(err.text, "16 blocks"));
    ck_assert_int_eq(s.r->dev->class->set(s.r->dev, "size", "2M", &err), -EBUSY);
    ck_assert_int_eq(s.ops->watch(s.r->dev, (_Atomic uint64_t *)s.source, &err), -EBUSY);
    ck_assert(comes(&s, 0));
    ck_assert(!answered(s.r));
    s.r->dev->class->resume(s.r->dev);
    used_wait(s.r);
    ck_assert(filled(s.r, DATA, old_of(0), 4096));
    submit(s.r, T_IN, PER, DATA, 4096);
    ck_assert(!answered(s.r));
    set(s.r, 0x70, 0);
    ck_assert_uint_eq(get(s.r, 0x70), 0);
    memset(at(s.r, DATA), STALE, 4096);
    ck_assert(comes(&s, 1));
    ck_assert(!answered(s.r));
    ck_assert(filled(s.r, DATA, STALE, 4096));
    start(s.r, false);
    ck_assert_uint_eq(request(s.r, T_IN, PER, DATA, 4096), S_OK);
    ck_assert(filled(s.r, DATA, old_of(1), 4096));
    for (unsigned block = 2; block < BLOCKS; block++)
        ck_assert(comes(&s, block));
    ck_assert_int_eq(s.r->dev->class->state->save(s.r->dev, &err), 0);
    scene_close(&s);
}
END_TEST

// --- everything at once, compared with a model

enum { ROUNDS = 50, LONG_ROUNDS = 20000, AREA = DATA, MOST = 4 * DISK_BLOCK };

struct feeder {
    struct scene *s;
    atomic_bool stop;
};

// The receiver: what is asked for first, in between something that nobody asked for, again and
// again.
static void *feeder_main(void *arg)
{
    struct feeder *f = arg;
    unsigned seed = 7;
    while (!atomic_load(&f->stop)) {
        uint64_t blocks[4];
        unsigned nr = f->s->ops->wanted(f->s->r->dev, blocks, 4, false);
        for (unsigned i = 0; i < nr; i++)
            comes(f->s, blocks[i]);
        if (!nr && rand_r(&seed) % 4 == 0)
            comes(f->s, (uint64_t)rand_r(&seed) % BLOCKS);
        usleep((useconds_t)rand_r(&seed) % 200);
    }
    return NULL;
}

static void model_round(unsigned seed)
{
    struct scene s;
    struct feeder f = {.s = &s};
    pthread_t thread;
    scene_open(&s);
    autofree uint8_t *model = malloc(DISK);
    memcpy(model, s.source, DISK);
    ck_assert_int_eq(pthread_create(&thread, NULL, feeder_main, &f), 0);
    for (unsigned i = 0; i < 24; i++) {
        unsigned sectors = 1 + (unsigned)rand_r(&seed) % (MOST / BLK_SECTOR),
                 first = (unsigned)rand_r(&seed) % (SECTORS - sectors);
        if (rand_r(&seed) % 2) {
            first = first / PER * PER;
            sectors = (sectors + PER - 1) / PER * PER;
            first = first + sectors > SECTORS ? SECTORS - sectors : first;
        }
        uint8_t *there = model + first * BLK_SECTOR, byte = (uint8_t)rand_r(&seed);
        uint32_t len = sectors * BLK_SECTOR;
        if (rand_r(&seed) % 2) {
            ck_assert_uint_eq(request(s.r, T_IN, first, AREA, len), S_OK);
            ck_assert_msg(!memcmp(at(s.r, AREA), there, len), "seed %u, request %u", seed, i);
        } else {
            memset(at(s.r, AREA), byte, len);
            memset(there, byte, len);
            ck_assert_uint_eq(request(s.r, T_OUT, first, AREA, len), S_OK);
        }
    }
    for (unsigned block = 0; block < BLOCKS; block++) {
        ck_assert_uint_eq(request(s.r, T_IN, block * PER, AREA, DISK_BLOCK), S_OK);
        ck_assert_msg(!memcmp(at(s.r, AREA), model + block * DISK_BLOCK, DISK_BLOCK), "seed %u",
                      seed);
    }
    atomic_store(&f.stop, true);
    pthread_join(thread, NULL);
    ck_assert_uint_eq(s.ops->missing(s.r->dev, NULL), 0);
    scene_close(&s);
}

START_TEST(test_model)
{
    unsigned rounds = getenv("FERRY_LONG") ? LONG_ROUNDS : ROUNDS;
    for (unsigned i = 0; i < rounds; i++)
        model_round(i + 1);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("blk_absent");
    TCase *tc = tcase_create("blk_absent");
    tcase_set_timeout(tc, 600);
    tcase_add_test(tc, test_map);
    tcase_add_test(tc, test_waits);
    tcase_add_test(tc, test_written);
    tcase_add_test(tc, test_paused);
    tcase_add_test(tc, test_model);
    suite_add_tcase(s, tc);
    SRunner *sr = srunner_create(s);
    srunner_run_all(sr, CK_ENV);
    int failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return failed ? 1 : 0;
}
