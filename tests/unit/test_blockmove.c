// SPDX-License-Identifier: Apache-2.0
// Blocks of a disk on their way: what is sent, what is sent again, and what a hostile source says.
#include "migrate/blockmove.h"

#include <check.h>
#include <stdio.h>

#include "tests/check_ok.h"
#include "tests/random.h"
#include "tests/unit/fake_disk.h"

enum { SIZE = 40 * DISK_BLOCK + 1536, STREAM_MAX = 16 * MiB };

// --- a link that keeps what is sent

struct link {
    struct wire wire;
    uint8_t *data;
    size_t len;
    struct wire_mem in;
    struct wire_record record;
    unsigned records; // taken
};

static int link_writev(struct wire *w, struct iovec *iov, unsigned nr, struct error *err)
{
    struct link *l = container_of(w, struct link, wire);
    for (unsigned i = 0; i < nr; i++) {
        ck_assert_uint_le(l->len + iov[i].iov_len, STREAM_MAX);
        memcpy(l->data + l->len, iov[i].iov_base, iov[i].iov_len);
        l->len += iov[i].iov_len;
    }
    w->out += l->len;
    return 0;
}

static void link_open(struct link *l)
{
    *l =
        (struct link) {.wire = {.name = "link", .writev = link_writev}, .data = malloc(STREAM_MAX)};
}

static void link_close(struct link *l)
{
    free(l->data);
    wire_record_free(&l->record);
}

// Everything that was sent, into the other disk.
static int link_take(struct link *l, struct block_intake *in, struct fake_disk *to,
                     struct error *err)
{
    wire_mem_init(&l->in, l->data, l->len);
    int ret = 0;
    while (!ret && l->in.wire.in < l->len) {
        ret = wire_get(&l->in.wire, &l->record, err);
        if (!ret && l->record.header.type == WIRE_DISKS)
            ret = block_intake_disks(in, to->vm, &l->record, err);
        else if (!ret)
            ret = block_intake_record(in, &l->in.wire, &l->record, err);
        l->records++;
    }
    l->len = 0;
    return ret;
}

// What the destination answers.
static void agree(struct block_move *bm, struct link *l, struct block_intake *in,
                  struct fake_disk *to)
{
    OK(block_move_describe(bm, &l->wire, &err));
    OK(link_take(l, in, to, &err));
    OK(block_intake_kept(in, &l->wire, &err));
    wire_mem_init(&l->in, l->data, l->len);
    OK(wire_expect(&l->in.wire, &l->record, WIRE_KEPT, &err));
    OK(block_move_start(bm, &l->record, &err));
    l->len = 0;
}

static void pass(struct block_move *bm, struct link *l, uint64_t max)
{
    bool more = true;
    block_move_pass(bm);
    while (more)
        OK(block_move_record(bm, &l->wire, max, &more, &err));
}

static void fill(struct fake_disk *f, uint64_t seed)
{
    for (unsigned i = 0; i < 60; i++) {
        uint64_t at = random_below(&seed, f->size / DISK_UNIT) * DISK_UNIT;
        uint64_t len = 512 + random_below(&seed, f->size - at - 511);
        int value = random_below(&seed, 3) ? (int)random_below(&seed, 255) + 1 : 0;
        fake_guest(f, at, value, len < 100000 ? len : 100000);
    }
}

// --- tests

// The guest writes between the passes and during them; after a pass while it stands still both
// disks are the same.
static void moves(unsigned seed, bool overlay, uint64_t max)
{
    struct fake_disk *a = fake_new(SIZE, overlay), *b = fake_new(SIZE, overlay);
    struct block_intake in = {0};
    struct block_move *bm;
    struct link l;
    link_open(&l);
    if (seed)
        fill(a, seed);
    OK(block_move_create(&bm, a->vm, &err));
    ck_assert_uint_eq(bm->total_bytes, SIZE);
    agree(bm, &l, &in, b);
    for (unsigned i = 0; i < 5; i++) {
        pass(bm, &l, max);
        ck_assert_uint_eq(block_move_todo(bm), 0);
        OK(link_take(&l, &in, b, &err));
        ck_assert(!memcmp(a->bytes, b->bytes, SIZE));
        ck_assert_uint_eq(bm->passes, i + 1);
        fill(a, seed + i + 1);
        ck_assert_uint_gt(block_move_todo(bm), 0);
    }
    ck_assert_uint_eq(bm->data_bytes, in.data_bytes);
    ck_assert_uint_eq(bm->zero_bytes, in.zero_bytes);
    ck_assert_uint_eq(b->synced, 0);
    OK(block_intake_sync(&in, &err));
    OK(block_intake_sync(&in, &err)); // nothing has come since
    ck_assert_uint_eq(b->synced, 1);
    block_move_free(bm);
    ck_assert_ptr_null(a->written);
    block_intake_free(&in);
    link_close(&l);
    fake_free(a);
    fake_free(b);
}

START_TEST(test_moves)
{
    for (unsigned seed = 0; seed < 20; seed++) {
        moves(seed, false, UINT64_MAX);
        moves(seed, true, UINT64_MAX);
        moves(seed, true, 1);
    }
}
END_TEST

// Holes and zeroes cost nothing, and nothing that has not changed comes again.
START_TEST(test_costs)
{
    struct fake_disk *a = fake_new(SIZE, false), *b = fake_new(SIZE, false);
    struct block_intake in = {0};
    struct block_move *bm;
    struct link l;
    link_open(&l);
    fake_guest(a, 3 * DISK_BLOCK + 512, 7, 512);
    fake_guest(a, 10 * DISK_BLOCK, 0, 5 * DISK_BLOCK); // there, and zero
    fake_guest(a, SIZE - 512, 9, 512);
    OK(block_move_create(&bm, a->vm, &err));
    agree(bm, &l, &in, b);
    ck_assert_uint_eq(block_move_todo(bm), 7 * DISK_BLOCK);
    pass(bm, &l, UINT64_MAX);
    ck_assert_uint_eq(bm->data_bytes, DISK_BLOCK + 1536);
    ck_assert_uint_eq(bm->zero_bytes, 0);
    ck_assert_uint_eq(a->read_bytes, 6 * DISK_BLOCK + 1536);
    OK(link_take(&l, &in, b, &err));
    pass(bm, &l, UINT64_MAX);
    ck_assert_uint_eq(l.len, 0);
    fake_guest(a, 3 * DISK_BLOCK, 0, DISK_BLOCK);
    pass(bm, &l, UINT64_MAX);
    OK(link_take(&l, &in, b, &err));
    ck_assert_uint_eq(bm->zero_bytes, DISK_BLOCK);
    ck_assert_uint_lt(l.in.wire.in, 200);
    ck_assert(!memcmp(a->bytes, b->bytes, SIZE));
    block_move_free(bm);
    block_intake_free(&in);
    link_close(&l);
    fake_free(a);
    fake_free(b);
}
END_TEST

// Where it came from it still is, but for what has changed since; zeroes count then.
START_TEST(test_back)
{
    static const uint8_t id[WIRE_ID_LEN] = "a move";
    struct fake_disk *a = fake_new(SIZE, false), *b = fake_new(SIZE, false);
    for (unsigned known = 0; known < 2; known++) {
        struct block_intake in = {0};
        struct block_move *bm;
        struct link l;
        link_open(&l);
        fill(a, 3);
        memcpy(b->bytes, a->bytes, SIZE);
        fake_guest(a, 2 * DISK_BLOCK, 5, DISK_BLOCK);
        fake_guest(a, 20 * DISK_BLOCK, 0, DISK_BLOCK);
        a->changed = 1ull << 2 | 1ull << 20;
        memcpy(a->since, id, sizeof(id));
        if (known)
            memcpy(b->since, id, sizeof(id));
        else
            memset(b->bytes, 0, SIZE);
        OK(block_move_create(&bm, a->vm, &err));
        agree(bm, &l, &in, b);
        ck_assert_uint_eq(bm->kept, known);
        if (known)
            ck_assert_uint_eq(block_move_todo(bm), 2 * DISK_BLOCK);
        fake_guest(a, 30 * DISK_BLOCK, 6, 100); // and it goes on
        pass(bm, &l, UINT64_MAX);
        OK(link_take(&l, &in, b, &err));
        ck_assert(!memcmp(a->bytes, b->bytes, SIZE));
        if (known)
            ck_assert_uint_eq(bm->data_bytes + bm->zero_bytes, 3 * DISK_BLOCK);
        block_intake_arrived(&in, (const uint8_t *)"another one.....");
        ck_assert_uint_eq(b->since[1], 'n');
        block_move_free(bm);
        block_intake_free(&in);
        link_close(&l);
    }
    fake_free(a);
    fake_free(b);
}
END_TEST

static void write_behind(struct fake_disk *f, uint64_t offset)
{
    f->reading = NULL;
    fake_guest(f, offset, 0x55, 512);
}

// What is written while its block is read is in the next pass, whether it was seen or not.
START_TEST(test_race)
{
    struct fake_disk *a = fake_new(SIZE, false), *b = fake_new(SIZE, false);
    struct block_intake in = {0};
    struct block_move *bm;
    struct link l;
    link_open(&l);
    fake_guest(a, 5 * DISK_BLOCK, 1, DISK_BLOCK);
    OK(block_move_create(&bm, a->vm, &err));
    agree(bm, &l, &in, b);
    a->reading = write_behind;
    pass(bm, &l, UINT64_MAX);
    OK(link_take(&l, &in, b, &err));
    ck_assert(memcmp(a->bytes, b->bytes, SIZE));
    ck_assert_uint_eq(block_move_todo(bm), DISK_BLOCK);
    pass(bm, &l, UINT64_MAX);
    OK(link_take(&l, &in, b, &err));
    ck_assert(!memcmp(a->bytes, b->bytes, SIZE));
    block_move_free(bm);
    block_intake_free(&in);
    link_close(&l);
    fake_free(a);
    fake_free(b);
}
END_TEST

START_TEST(test_errors)
{
    struct fake_disk *a = fake_new(SIZE, false);
    struct block_move *bm;
    struct link l;
    struct error why = {0};
    bool more;
    link_open(&l);
    a->read_only = true;
    ck_assert_int_eq(block_move_create(&bm, a->vm, &why), -ENOENT);
    ck_assert_ptr_nonnull(strstr(why.text, "leave --disk out"));
    a->read_only = false;
    a->dev.class = &(const struct device_class) {.name = "serial"};
    ck_assert_int_eq(block_move_create(&bm, a->vm, &why), -ENOENT);
    a->dev.class = &fake_class;
    OK(block_move_create(&bm, a->vm, &err));
    for (unsigned i = 0; i < 2; i++) { // of disks that there are not; of one that nobody knows
        struct wire_kept kept = {.disks = 2u >> i};
        struct wire_record record = {.meta = (uint8_t *)&kept};
        ck_assert_int_eq(block_move_start(bm, &record, &why), -EPROTO);
    }
    fake_guest(a, 0, 1, 4096);
    block_move_pass(bm);
    a->refuse = -EIO;
    ck_assert_int_eq(block_move_record(bm, &l.wire, UINT64_MAX, &more, &why), -EIO);
    block_move_free(bm);
    block_intake_forget(a->vm);
    ck_assert_uint_eq(a->forgotten, 1);
    link_close(&l);
    fake_free(a);
}
END_TEST

// --- hostile

struct hostile {
    struct {
        struct wire_blocks head;
        struct wire_extent extents[WIRE_EXTENTS_MAX];
    } meta;
    size_t meta_len;
    uint32_t data_len;
};

static int hostile_send(const struct hostile *h, struct fake_disk *b, struct block_intake *in,
                        struct error *err)
{
    static uint8_t zeroes[WIRE_BLOCKS_DATA];
    struct link l;
    struct iovec data = {zeroes, h->data_len};
    link_open(&l);
    int ret = wire_put(&l.wire, WIRE_BLOCKS, 0, &h->meta, h->meta_len, &data, !!h->data_len, err);
    if (!ret)
        ret = link_take(&l, in, b, err);
    link_close(&l);
    return ret;
}

static void intake_open(struct block_intake *in, struct fake_disk *b)
{
    struct wire_disk disk = {.size = SIZE};
    struct wire_record record = {.header = {.meta_len = sizeof(disk)}, .meta = (uint8_t *)&disk};
    *in = (struct block_intake) {0};
    OK(block_intake_disks(in, b->vm, &record, &err));
}

START_TEST(test_hostile_blocks)
{
    static const struct {
        struct wire_blocks head;
        struct wire_extent extent;
        uint32_t data_len;
    } rows[] = {
        {{.disk = 1, .nr = 1}, {0, 4096, WIRE_RUN_ZERO}, 0},
        {{.disk = UINT32_MAX, .nr = 1}, {0, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 0}, {0, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 2}, {0, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = UINT32_MAX}, {0, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 1, .reserved = 1}, {0, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 1, .sum = 1}, {0, 4096, WIRE_RUN_DATA}, 4096},
        {{.nr = 1}, {0, 4096, 2}, 0},
        {{.nr = 1}, {0, 0, WIRE_RUN_ZERO}, 0},
        {{.nr = 1}, {512, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 1}, {0, 512, WIRE_RUN_ZERO}, 0},
        {{.nr = 1}, {0, DISK_BLOCK + 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 1}, {SIZE - 1536, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 1}, {SIZE - 1536, 1024, WIRE_RUN_ZERO}, 0},
        {{.nr = 1}, {SIZE + 2560, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 1}, {UINT64_MAX - 4095, 4096, WIRE_RUN_ZERO}, 0},
        {{.nr = 1}, {0, 4096, WIRE_RUN_DATA}, 0},
        {{.nr = 1}, {0, 4096, WIRE_RUN_DATA}, 8192},
        {{.nr = 1}, {0, 4096, WIRE_RUN_ZERO}, 4096},
    };
    struct fake_disk *b = fake_new(SIZE, false);
    struct block_intake in;
    intake_open(&in, b);
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct hostile h = {.meta = {rows[i].head, {rows[i].extent}}, .data_len = rows[i].data_len};
        struct error err = {0};
        h.meta_len = sizeof(struct wire_blocks) + sizeof(struct wire_extent);
        int ret = hostile_send(&h, b, &in, &err);
        ck_assert_msg(ret == -EPROTO || ret == -EBADMSG, "row %u: %d", i, ret);
        ck_assert_uint_gt(strlen(err.text), 10);
    }
    ck_assert_uint_eq(b->write_bytes, 0);
    struct hostile good = {.meta = {{.nr = 1}, {{SIZE - 1536, 1536, WIRE_RUN_ZERO}}}};
    good.meta_len = sizeof(struct wire_blocks) + sizeof(struct wire_extent);
    OK(hostile_send(&good, b, &in, &err));
    ck_assert_uint_eq(b->write_bytes, 1536);
    block_intake_free(&in);
    struct block_intake none = {0}; // blocks before anybody has said of what
    struct error why;
    ck_assert_int_eq(hostile_send(&good, b, &none, &why), -EPROTO);
    fake_free(b);
}
END_TEST

START_TEST(test_hostile_disks)
{
    static const struct wire_disk rows[] = {
        {.size = 0},
        {.size = SIZE + 1},
        {.size = UINT64_MAX / 512 * 512},
        {.size = SIZE, .flags = 2},
        {.size = SIZE, .reserved = 1},
        {.size = SIZE, .instance = 1},
        {.size = SIZE, .base_size = SIZE + 512},
        {.size = SIZE + 512},
        {.size = SIZE, .flags = WIRE_DISK_OVERLAY, .base_size = SIZE},
    };
    struct fake_disk *b = fake_new(SIZE, false);
    struct error err;
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct wire_record record = {.header = {.meta_len = sizeof(rows[i])},
                                     .meta = (uint8_t *)(uintptr_t)&rows[i]};
        struct block_intake in = {0};
        ck_assert_msg(block_intake_disks(&in, b->vm, &record, &err) < 0, "row %u", i);
        block_intake_free(&in);
    }
    const struct wire_disk twice[] = {{.size = SIZE}, {.size = SIZE}};
    struct wire_record record = {.header = {.meta_len = sizeof(twice)},
                                 .meta = (uint8_t *)(uintptr_t)twice};
    struct block_intake in = {0};
    ck_assert_int_eq(block_intake_disks(&in, b->vm, &record, &err), -EPROTO);
    block_intake_free(&in);
    intake_open(&in, b);
    record.header.meta_len = sizeof(twice[0]);
    ck_assert_int_eq(block_intake_disks(&in, b->vm, &record, &err), -EPROTO); // a second record
    block_intake_free(&in);
    fake_free(b);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("blockmove");
    TCase *tc = tcase_create("blocks");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, test_moves);
    tcase_add_test(tc, test_costs);
    tcase_add_test(tc, test_back);
    tcase_add_test(tc, test_race);
    tcase_add_test(tc, test_errors);
    tcase_add_test(tc, test_hostile_blocks);
    tcase_add_test(tc, test_hostile_disks);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
