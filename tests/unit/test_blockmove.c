// SPDX-License-Identifier: Apache-2.0
// Blocks of a disk on their way: what is sent, what is sent again, and what a hostile source says.
#include "migrate/blockmove.h"

#include <check.h>
#include <stdio.h>

#include "devices/blk_engine.h"
#include "migrate/blockpost.h"
#include "tests/check_ok.h"
#include "tests/random.h"
#include "tests/unit/fake_disk.h"
#include "vmm/bitmap.h"

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
        else if (!ret && l->record.header.type == WIRE_ABSENT)
            ret = block_late_absent(in, &l->record, err);
        else if (!ret && l->record.header.type == WIRE_LATE)
            ret = block_late_take(in, &l->in.wire, &l->record, in->buffer, err);
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

// --- blocks after the guest

// The guest there: its request waits for these blocks, or writes them.
static enum blk_absent_verdict asks(struct fake_disk *f, enum blk_op op, uint64_t block,
                                    uint64_t nr)
{
    const struct blk_request r = {
        .op = op, .nr_ranges = 1, .ranges[0] = {block * DISK_BLOCK, nr * DISK_BLOCK, false}};
    enum blk_absent_verdict verdict = blk_absent_look(f->absent, &r);
    if (verdict == BLK_ABSENT_FILL) {
        fake_guest(f, block * DISK_BLOCK, 0xee, nr * DISK_BLOCK);
        blk_absent_done(f->absent, &r, true);
    }
    return verdict;
}

// Takes the ASK that there must be, and answers it; how many blocks that had not been sent.
static unsigned answers(struct block_move *bm, struct link *l, struct block_intake *in, bool again,
                        uint8_t *buffer)
{
    struct block_claim claim = {.nr = 1};
    uint64_t blocks[WIRE_WANT_MAX];
    unsigned nr, sent = 0;
    OK(block_late_ask(in, &l->wire, again, &err));
    wire_mem_init(&l->in, l->data, l->len);
    OK(wire_expect(&l->in.wire, &l->record, WIRE_ASK, &err));
    l->len = 0;
    OK(block_post_ask_parse(bm, &l->record, &claim.disk, blocks, &nr, &err));
    for (unsigned i = 0; i < nr; i++) {
        claim.first = blocks[i];
        if (block_post_asked(bm, claim.disk, blocks[i])) {
            OK(block_post_put(bm, &l->wire, &claim, buffer, &err));
            sent++;
        }
    }
    return sent;
}

static void lates(unsigned seed)
{
    struct fake_disk *a = fake_new(SIZE, false), *b = fake_new(SIZE, false);
    struct block_intake in = {0};
    struct block_move *bm;
    struct block_claim claim;
    struct link l;
    autofree uint8_t *buffer = malloc(WIRE_BLOCKS_DATA);
    uint64_t nr, missing[1] = {0};
    link_open(&l);
    fill(a, seed);
    OK(block_move_create(&bm, a->vm, &err));
    agree(bm, &l, &in, b);
    ck_assert(bm->late);
    pass(bm, &l, UINT64_MAX);
    OK(link_take(&l, &in, b, &err));
    fake_guest(a, 5 * DISK_BLOCK, 0, 4 * DISK_BLOCK); // some of it zeroes
    fake_guest(a, 20 * DISK_BLOCK, 1 + (int)seed, 9 * DISK_BLOCK);
    fake_guest(a, SIZE - 512, 7, 512);
    OK(block_post_say(bm, &l.wire, &nr, &err));
    ck_assert_uint_eq(nr, 14);
    OK(link_take(&l, &in, b, &err));
    OK(block_late_begin(&in, &err));
    ck_assert_uint_eq(block_late_missing(&in), nr);
    // Asked for; written there; the rest pushed from there on.
    ck_assert_int_eq(asks(b, BLK_READ, 24, 2), BLK_ABSENT_PARK);
    ck_assert_uint_eq(answers(bm, &l, &in, false, buffer), 2);
    ck_assert_int_eq(asks(b, BLK_WRITE, 22, 2), BLK_ABSENT_FILL);
    OK(link_take(&l, &in, b, &err));
    ck_assert_uint_eq(block_late_missing(&in), nr - 4);
    ck_assert_int_eq(asks(b, BLK_READ, 22, 4), BLK_ABSENT_GO);
    ck_assert(block_post_next(bm, 4, &claim));
    ck_assert(claim.first == 26 && claim.nr == 3 && !claim.disk);
    OK(block_post_put(bm, &l.wire, &claim, buffer, &err));
    // Asked for what is under way: it is not sent again. The link breaks, and it is lost.
    ck_assert_int_eq(asks(b, BLK_READ, 26, 1), BLK_ABSENT_PARK);
    l.len = 0;
    ck_assert_uint_eq(answers(bm, &l, &in, false, buffer), 0);
    block_move_free(bm);
    OK(block_move_create(&bm, a->vm, &err));
    OK(block_late_say(&in, &l.wire, &err));
    wire_mem_init(&l.in, l.data, l.len);
    OK(wire_expect(&l.in.wire, &l.record, WIRE_ABSENT, &err));
    OK(block_post_hear(bm, &l.record, &err));
    ck_assert_uint_eq(block_move_todo(bm) / DISK_BLOCK, nr - 4);
    l.len = 0;
    ck_assert_uint_eq(answers(bm, &l, &in, true, buffer), 1);
    OK(link_take(&l, &in, b, &err));
    while (block_post_next(bm, 4, &claim))
        OK(block_post_put(bm, &l.wire, &claim, buffer, &err));
    size_t len = l.len;
    OK(link_take(&l, &in, b, &err));
    ck_assert_uint_eq(block_late_missing(&in), 0);
    b->dev.class->disk->missing(&b->dev, missing);
    ck_assert_uint_eq(missing[0], 0);
    b->synced = 0;
    OK(block_late_sync(&in, &err));
    OK(block_late_sync(&in, &err));
    ck_assert_uint_eq(b->synced, 1);
    fake_guest(a, 22 * DISK_BLOCK, 0xee, 2 * DISK_BLOCK); // what was written there
    ck_assert(!memcmp(a->bytes, b->bytes, SIZE));
    // Once more: nothing of it is wanted.
    fake_guest(b, 0, 0xdd, SIZE);
    uint64_t before = b->write_bytes;
    l.len = len;
    OK(link_take(&l, &in, b, &err));
    ck_assert_uint_eq(b->write_bytes, before);
    block_late_end(&in);
    block_move_free(bm);
    block_intake_free(&in);
    link_close(&l);
    fake_free(a);
    fake_free(b);
}

START_TEST(test_late)
{
    for (unsigned seed = 1; seed < 10; seed++)
        lates(seed);
}
END_TEST

// An image that cannot be written is not whole, whatever comes.
START_TEST(test_late_unwritten)
{
    struct fake_disk *a = fake_new(SIZE, false), *b = fake_new(SIZE, false);
    struct block_intake in = {0};
    struct block_move *bm;
    struct block_claim claim;
    struct link l;
    struct error why;
    uint8_t *buffer = malloc(WIRE_BLOCKS_DATA);
    uint64_t nr;
    link_open(&l);
    fake_guest(a, 0, 1, 4 * DISK_BLOCK);
    OK(block_move_create(&bm, a->vm, &err));
    agree(bm, &l, &in, b);
    OK(block_post_say(bm, &l.wire, &nr, &err));
    OK(link_take(&l, &in, b, &err));
    OK(block_late_begin(&in, &err));
    for (unsigned i = 0; i < 2; i++) {
        ck_assert(block_post_next(bm, 2, &claim));
        OK(block_post_put(bm, &l.wire, &claim, buffer, &err));
        b->refuse = i ? 0 : -ENOSPC;
        ck_assert_int_eq(link_take(&l, &in, b, &why), i ? 0 : -ENOSPC);
        ck_assert_uint_eq(block_late_missing(&in), i ? 2 : 4);
    }
    bitmap_fill(bm->disks[0].todo, 0, 2, true);
    ck_assert(block_post_next(bm, 2, &claim));
    OK(block_post_put(bm, &l.wire, &claim, buffer, &err));
    OK(link_take(&l, &in, b, &err));
    ck_assert_uint_eq(block_late_missing(&in), 0);
    b->refuse = -EIO;
    ck_assert_int_eq(block_late_sync(&in, &why), -EIO);
    b->refuse = 0;
    ck_assert_int_eq(block_late_sync(&in, &why), -EIO); // the kernel says it once
    ck_assert_uint_gt(block_late_missing(&in), 0);
    block_late_end(&in);
    block_move_free(bm);
    block_intake_free(&in);
    link_close(&l);
    free(buffer);
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

static int record_send(enum wire_type type, const void *meta, size_t meta_len, uint32_t data_len,
                       struct fake_disk *b, struct block_intake *in, struct error *err)
{
    static uint8_t zeroes[WIRE_BLOCKS_DATA];
    struct link l;
    struct iovec data = {zeroes, data_len};
    link_open(&l);
    int ret = wire_put(&l.wire, type, 0, meta, meta_len, &data, !!data_len, err);
    if (!ret)
        ret = link_take(&l, in, b, err);
    link_close(&l);
    return ret;
}

START_TEST(test_hostile_late)
{
    const uint64_t last = SIZE / DISK_BLOCK; // 1536 bytes of it
    const struct {
        struct wire_absent head;
        uint64_t word;
    } maps[] = {{{.disk = 1, .blocks = 41}, 1},
                {{.disk = 0, .reserved = 1, .blocks = 41}, 1},
                {{.first = 1, .blocks = 40}, 1},
                {{.first = 64, .blocks = 1}, 1},
                {{.blocks = 42}, 1},
                {{.blocks = 0}, 1},
                {{.blocks = UINT64_MAX}, 1},
                {{.blocks = 41}, 1ull << 41}};
    const struct {
        struct wire_late head;
        struct wire_extent extents[2];
        uint32_t data_len;
    } rows[] = {
        {{.disk = 1, .blocks = 1}, {{0}}, 0},
        {{.blocks = 0}, {{0}}, 0},
        {{.blocks = WIRE_LATE_MAX + 1}, {{0}}, 0},
        {{.blocks = 2, .first = last}, {{0}}, 0},
        {{.blocks = 1, .first = UINT64_MAX}, {{0}}, 0},
        {{.blocks = 1, .nr = 2}, {{0, DISK_BLOCK, 0}, {DISK_BLOCK, DISK_BLOCK, 0}}, 0},
        {{.blocks = 2, .nr = UINT32_MAX}, {{0}}, 0},
        {{.blocks = 1, .nr = 1}, {{4096, DISK_BLOCK, 0}}, 0},
        {{.blocks = 1, .nr = 1}, {{0, 4096, 0}}, 0},
        {{.blocks = 1, .nr = 1}, {{DISK_BLOCK, DISK_BLOCK, 0}}, 0},
        {{.blocks = 1, .nr = 1}, {{0, DISK_BLOCK, 2}}, 0},
        {{.blocks = 1, .nr = 1}, {{0, DISK_BLOCK, WIRE_RUN_DATA}}, 512},
        {{.blocks = 1, .nr = 1, .sum = 1}, {{0, DISK_BLOCK, WIRE_RUN_DATA}}, DISK_BLOCK},
        {{.blocks = 2, .nr = 2}, {{DISK_BLOCK, DISK_BLOCK, 0}, {0, DISK_BLOCK, 0}}, 0},
        {{.blocks = 2, .nr = 2}, {{0, DISK_BLOCK, 0}, {0, DISK_BLOCK, 0}}, 0},
        {{.blocks = 1, .nr = 1, .first = last}, {{last * DISK_BLOCK, DISK_BLOCK, 0}}, 0},
    };
    struct fake_disk *b = fake_new(SIZE, false), *o = fake_new(SIZE, true);
    struct block_intake in;
    struct error why;
    intake_open(&in, b);
    for (unsigned i = 0; i < ARRAY_SIZE(maps); i++)
        ck_assert_msg(record_send(WIRE_ABSENT, &maps[i], sizeof(maps[i]), 0, b, &in, &why) ==
                          -EPROTO,
                      "map %u", i);
    struct wire_late early = {.blocks = 1};
    ck_assert_int_eq(record_send(WIRE_LATE, &early, sizeof(early), 0, b, &in, &why), -EPROTO);
    const struct {
        struct wire_absent head;
        uint64_t word;
    } good = {{.blocks = 41}, (1ull << 41) - 1};
    OK(record_send(WIRE_ABSENT, &good, sizeof(good), 0, b, &in, &err));
    OK(block_late_begin(&in, &err));
    ck_assert_int_eq(record_send(WIRE_ABSENT, &good, sizeof(good), 0, b, &in, &why), -EPROTO);
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        uint32_t nr = rows[i].head.nr < 2 ? rows[i].head.nr : 2;
        int ret =
            record_send(WIRE_LATE, &rows[i], sizeof(rows[i].head) + nr * sizeof(rows[i].extents[0]),
                        rows[i].data_len, b, &in, &why);
        ck_assert_msg(ret == -EPROTO || ret == -EBADMSG, "row %u: %d", i, ret);
    }
    ck_assert_uint_eq(b->write_bytes, 0);
    ck_assert_uint_eq(block_late_missing(&in), 41);
    block_late_end(&in);
    block_intake_free(&in);
    // Of an overlay all is to come before the guest.
    const struct wire_disk says = {.size = SIZE, .base_size = SIZE, .flags = WIRE_DISK_OVERLAY};
    in = (struct block_intake) {0};
    OK(record_send(WIRE_DISKS, &says, sizeof(says), 0, o, &in, &err));
    ck_assert(!block_intake_may_lack(&in));
    ck_assert_int_eq(record_send(WIRE_ABSENT, &good, sizeof(good), 0, o, &in, &why), -EPROTO);
    block_intake_free(&in);
    fake_free(b);
    fake_free(o);
}
END_TEST

START_TEST(test_hostile_asks)
{
    struct fake_disk *a = fake_new(SIZE, false);
    struct block_move *bm;
    const struct {
        struct wire_ask head;
        uint64_t block;
    } rows[] = {{{.nr = 0}, 0},          {{.nr = 2}, 0},
                {{.nr = UINT32_MAX}, 0}, {{.nr = 1, .disk = 1}, 0},
                {{.nr = 1}, 41},         {{.nr = 1}, UINT64_MAX}};
    OK(block_move_create(&bm, a->vm, &err));
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct wire_record record = {.header = {.meta_len = sizeof(rows[i])},
                                     .meta = (uint8_t *)(uintptr_t)&rows[i]};
        uint64_t blocks[WIRE_WANT_MAX];
        unsigned disk, nr;
        ck_assert_int_eq(block_post_ask_parse(bm, &record, &disk, blocks, &nr, NULL), -EPROTO);
    }
    block_move_free(bm);
    fake_free(a);
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
    tcase_add_test(tc, test_late);
    tcase_add_test(tc, test_late_unwritten);
    tcase_add_test(tc, test_hostile_late);
    tcase_add_test(tc, test_hostile_asks);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
