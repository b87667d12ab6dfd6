// SPDX-License-Identifier: Apache-2.0
// The walker: both ring formats give the same on the same log of requests; every way to break a
// rule latches the queue; nothing outside RAM is reached. That each guard is what makes its row
// pass was checked by taking it out.
#include <check.h>
#include <errno.h>
#include <stdlib.h>

#include "tests/unit/virtio_driver.h"

enum { RINGS = 0x100000, TABLES = 0x200000, DATA = 0x400000 };

struct rig {
    struct ram ram;
    struct virtqueue vq;
    struct driver d;
    struct virtqueue_chain chain;
};

static struct rig *rig_plain(bool packed, uint16_t size)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct error err = {0};
    struct ram_config config = {.size = 16 * MiB};
    ck_assert_msg(!ram_create(&r->ram, &config, &err), "%s", err.text);
    virtqueue_init(&r->vq, &r->ram, VQ_SIZE_MAX);
    driver_init(&r->d, &r->ram, packed, size, RINGS);
    driver_setup(&r->d, &r->vq);
    return r;
}

static struct rig *rig_new(bool packed, uint16_t size)
{
    struct rig *r = rig_plain(packed, size);
    struct error err = {0};
    r->vq.indirect = r->vq.event_idx = true;
    ck_assert_msg(!virtqueue_enable(&r->vq, &err), "%s", err.text);
    return r;
}

static void rig_free(struct rig *r)
{
    virtqueue_reset(&r->vq);
    ram_destroy(&r->ram);
    free(r);
}

// `says`: what the message of a refusal must contain; NULL: none is expected.
static int next_saying(struct rig *r, const char *says)
{
    struct error err = {0};
    int ret = virtqueue_next(&r->vq, &r->chain, &err);
    ck_assert_msg((ret < 0) == (says != NULL), "%d %s, expected '%s'", ret, err.text, says);
    if (ret < 0) {
        ck_assert_int_eq(ret, -EBADMSG);
        ck_assert_msg(strstr(err.text, says), "'%s', expected '%s'", err.text, says);
        ck_assert(r->vq.broken);
        // Latched: it is empty from now on, whatever the rings say.
        ck_assert_int_eq(virtqueue_next(&r->vq, &r->chain, &err), 0);
        ck_assert(!virtqueue_kicks(&r->vq, true));
    }
    return ret;
}

static int next(struct rig *r)
{
    return next_saying(r, NULL);
}

// --- the same log through both formats

struct trace {
    uint64_t sum;
    unsigned chains, signals;
};

static uint32_t random_next(uint32_t *seed)
{
    *seed = *seed * 1664525 + 1013904223;
    return *seed >> 8;
}

static void mix(struct trace *t, uint64_t value)
{
    t->sum = (t->sum ^ value) * 0x100000001b3ull;
}

// The device of the log: inverts what it reads into what it may write. Completes what it holds in
// an order that the log decides.
static void device_answer(struct rig *r, struct virtqueue_chain *c, struct trace *t)
{
    uint8_t data[512];
    size_t n = chain_read(c, 0, data, sizeof(data));
    for (size_t i = 0; i < n; i++)
        data[i] = (uint8_t)~data[i];
    size_t written = chain_write(&r->ram, c, 0, data, n);
    mix(t, c->nr_out);
    mix(t, c->nr_in);
    mix(t, c->out_len << 32 | c->in_len);
    virtqueue_push(&r->vq, c, (uint32_t)written);
}

static void log_run(bool packed, bool event_idx, uint16_t size, struct trace *t)
{
    enum { HELD = 8, STEPS = 3000 };
    struct rig *r = rig_new(packed, size);
    struct virtqueue_chain *held = calloc(HELD, sizeof(*held)), *order[HELD], *spare[HELD];
    unsigned nr_held = 0, nr_spare = HELD;
    uint32_t seed = 4711, stamps[VQ_SIZE_MAX] = {0}, outstanding = 0;
    r->vq.event_idx = event_idx;
    for (unsigned i = 0; i < HELD; i++)
        spare[i] = &held[i];
    for (uint32_t step = 1; step <= STEPS; step++) {
        struct buffer b[4];
        unsigned n = 2 + random_next(&seed) % 3, outs = 1 + random_next(&seed) % (n - 1);
        bool indirect = random_next(&seed) % 2;
        for (unsigned i = 0; i < n; i++)
            b[i] = (struct buffer) {DATA + 0x1000ull * (step % 512) + 0x200 * i,
                                    1 + random_next(&seed) % 128, i >= outs};
        // At most HELD outstanding, so that ring formats with different room behave alike.
        if (outstanding < HELD) {
            memset(ram_at(&r->ram, b[0].gpa, 0x800), (int)step, 0x800);
            int id = driver_add(&r->d, b, n, indirect ? TABLES + 0x1000ull * (step % 64) : 0);
            ck_assert_int_ge(id, 0);
            stamps[id] = step;
            outstanding++;
        }
        while (nr_spare && virtqueue_next(&r->vq, spare[nr_spare - 1], NULL) == 1)
            order[nr_held++] = spare[--nr_spare];
        ck_assert(!r->vq.broken);
        for (unsigned k = random_next(&seed) % 4; k && nr_held; k--) {
            unsigned pick = random_next(&seed) % nr_held;
            device_answer(r, order[pick], t);
            spare[nr_spare++] = order[pick];
            memmove(&order[pick], &order[pick + 1], (--nr_held - pick) * sizeof(*order));
        }
        t->signals += virtqueue_should_signal(&r->vq);
        unsigned id;
        uint32_t len;
        while (driver_used(&r->d, &id, &len)) {
            uint64_t at = DATA + 0x1000ull * (stamps[id] % 512);
            mix(t, stamps[id]);
            mix(t, len);
            for (unsigned i = 0; i < 0x800; i += 8)
                mix(t, *(uint64_t *)ram_at(&r->ram, at + i, 8));
            t->chains++;
            outstanding--;
        }
    }
    free(held);
    r->vq.first = r->vq.last = NULL;
    rig_free(r);
}

START_TEST(split_and_packed_agree)
{
    static const uint16_t sizes[] = {32, 64, 256};
    for (unsigned i = 0; i < 3; i++)
        for (int event_idx = 0; event_idx < 2; event_idx++) {
            struct trace split = {0}, packed = {0};
            log_run(false, event_idx, sizes[i], &split);
            log_run(true, event_idx, sizes[i], &packed);
            ck_assert_uint_gt(split.chains, 2000);
            ck_assert_uint_eq(split.chains, packed.chains);
            ck_assert_uint_eq(split.sum, packed.sum);
            if (!event_idx)
                ck_assert_uint_eq(split.signals, packed.signals);
        }
}
END_TEST

// --- queue addresses

START_TEST(enable_checks_whole_rings)
{
    const uint64_t end = 16 * MiB;
    const struct {
        bool packed;
        uint16_t size;
        uint64_t desc, avail, used;
        int ret;
    } rows[] = {
        {false, 256, end - 4096, 0x1000, 0x2000, 0},
        {false, 256, end - 4096 + 16, 0x1000, 0x2000, -EFAULT}, // starts inside, ends outside
        {false, 256, 0x3000, end - 518, 0x2000, 0},
        {false, 256, 0x3000, end - 516, 0x2000, -EFAULT},
        {false, 256, 0x3000, 0x1000, end - 2056, 0},
        {false, 256, 0x3000, 0x1000, end - 2052, -EFAULT},
        {false, 256, 0xfffffffffffff000, 0x1000, 0x2000, -EFAULT}, // wraps
        {false, 256, 0x3000, 0xffffffffffffff00, 0x2000, -EFAULT},
        {false, 256, 0x3000, 0x1000, 0xfffffffffffffffc, -EFAULT},
        {false, 256, 0x3008, 0x1000, 0x2000, -EINVAL}, // alignment
        {false, 256, 0x3000, 0x1001, 0x2000, -EINVAL},
        {false, 256, 0x3000, 0x1000, 0x2002, -EINVAL},
        {false, 0, 0x3000, 0x1000, 0x2000, -EINVAL}, // size
        {false, 100, 0x3000, 0x1000, 0x2000, -EINVAL},
        {false, 512, 0x3000, 0x1000, 0x2000, -EINVAL},
        {false, 65535, 0x3000, 0x1000, 0x2000, -EINVAL},
        {true, 100, 0x3000, 0x1000, 0x2000, 0},
        {true, 257, 0x3000, 0x1000, 0x2000, -EINVAL},
        {true, 256, end - 4096, 0x1000, 0x2000, 0},
        {true, 256, end - 4080, 0x1000, 0x2000, -EFAULT},
        {true, 256, 0x3000, end - 4, 0x2000, 0},
        {true, 256, 0x3000, end, 0x2000, -EFAULT},
        {true, 256, 0x3000, 0x1000, end, -EFAULT},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_plain(rows[i].packed, 8);
        struct error err = {0};
        r->vq.size = rows[i].size;
        r->vq.desc_gpa = rows[i].desc;
        r->vq.driver_gpa = rows[i].avail;
        r->vq.device_gpa = rows[i].used;
        ck_assert_msg(virtqueue_enable(&r->vq, &err) == rows[i].ret, "row %u: %s", i, err.text);
        ck_assert(r->vq.enabled == !rows[i].ret);
        ck_assert_int_eq(next(r), 0);
        rig_free(r);
    }
}
END_TEST

// --- hostile chains. Each row writes descriptors by hand.

struct hostile {
    const char *name;
    void (*make)(struct rig *r);
    const char *says; // NULL: a good chain
};

static void split_head(struct rig *r, uint16_t head)
{
    guest16_set(&r->ram, r->d.avail + 4 + 2ull * (r->d.next % r->d.size), head);
    guest16_set(&r->ram, r->d.avail + 2, ++r->d.next);
}

static void d_split(struct rig *r, unsigned i, uint64_t a, uint32_t len, uint16_t flags, uint16_t n)
{
    desc_write(&r->ram, r->d.desc, i, a, len, flags, n);
}

static void d_packed(struct rig *r, unsigned i, uint64_t a, uint32_t len, uint16_t flags)
{
    desc_write(&r->ram, r->d.desc, i, a, len, 0, flags | D_AVAIL);
}

#define SPLIT(name, ...)            \
    static void name(struct rig *r) \
    {                               \
        __VA_ARGS__;                \
        split_head(r, 0);           \
    }
#define PACKED(name, ...)           \
    static void name(struct rig *r) \
    {                               \
        __VA_ARGS__;                \
    }

SPLIT(s_good, d_split(r, 0, DATA, 16, D_NEXT, 1); d_split(r, 1, DATA, 16, D_WRITE, 0))
SPLIT(s_self, d_split(r, 0, DATA, 16, D_NEXT, 0))
SPLIT(s_cycle, d_split(r, 0, DATA, 16, D_NEXT, 1); d_split(r, 1, DATA, 16, D_NEXT, 0))
SPLIT(s_next, d_split(r, 0, DATA, 16, D_NEXT, 512); d_split(r, 512, DATA, 16, 0, 0))
SPLIT(s_zero, d_split(r, 0, DATA, 0, 0, 0))
SPLIT(s_outside, d_split(r, 0, 16 * MiB - 8, 16, 0, 0))
SPLIT(s_wraps, d_split(r, 0, 0xffffffffffffff00, 512, 0, 0))
SPLIT(s_order, d_split(r, 0, DATA, 16, D_WRITE | D_NEXT, 1); d_split(r, 1, DATA, 16, 0, 0))
SPLIT(s_ind_empty, d_split(r, 0, TABLES, 0, D_INDIRECT, 0))
SPLIT(s_ind_odd, d_split(r, 0, TABLES, 24, D_INDIRECT, 0))
SPLIT(s_ind_long, d_split(r, 0, TABLES, 16 * (VQ_SEGMENTS_MAX + 1), D_INDIRECT, 0))
SPLIT(s_ind_end, d_split(r, 0, 16 * MiB - 16, 32, D_INDIRECT, 0))
SPLIT(s_ind_wrap, d_split(r, 0, 0xfffffffffffffff0, 32, D_INDIRECT, 0))
SPLIT(s_ind_chained, d_split(r, 0, TABLES, 16, D_INDIRECT | D_NEXT, 1);
      desc_write(&r->ram, TABLES, 0, DATA, 16, 0, 0); d_split(r, 1, DATA, 16, 0, 0))
SPLIT(s_ind_nested, d_split(r, 0, TABLES, 32, D_INDIRECT, 0);
      desc_write(&r->ram, TABLES, 0, TABLES, 32, D_INDIRECT, 0))
SPLIT(s_ind_cycle, d_split(r, 0, TABLES, 32, D_INDIRECT, 0);
      desc_write(&r->ram, TABLES, 0, DATA, 16, D_NEXT, 1);
      desc_write(&r->ram, TABLES, 1, DATA, 16, D_NEXT, 0))
SPLIT(s_ind_next, d_split(r, 0, TABLES, 32, D_INDIRECT, 0);
      desc_write(&r->ram, TABLES, 0, DATA, 16, D_NEXT, 2);
      desc_write(&r->ram, TABLES, 2, DATA, 16, 0, 0))
SPLIT(s_ind_refused, r->vq.indirect = false; d_split(r, 0, TABLES, 16, D_INDIRECT, 0);
      desc_write(&r->ram, TABLES, 0, DATA, 16, 0, 0))
PACKED(s_head, split_head(r, 8))
PACKED(s_head_far, split_head(r, 0xffff))
PACKED(s_ahead, d_split(r, 0, DATA, 16, 0, 0); guest16_set(&r->ram, r->d.avail + 2, 9))
PACKED(s_ahead_far, d_split(r, 0, DATA, 16, 0, 0); guest16_set(&r->ram, r->d.avail + 2, 0xffff))
PACKED(p_good, d_packed(r, 0, DATA, 16, D_NEXT); d_packed(r, 1, DATA, 16, D_WRITE))
PACKED(p_endless, for (unsigned i = 0; i < 8; i++) d_packed(r, i, DATA, 16, D_NEXT))
PACKED(p_zero, d_packed(r, 0, DATA, 0, 0))
PACKED(p_outside, d_packed(r, 0, 16 * MiB - 8, 16, 0))
PACKED(p_wraps, d_packed(r, 0, 0xffffffffffffff00, 512, 0))
PACKED(p_order, d_packed(r, 0, DATA, 16, D_WRITE | D_NEXT); d_packed(r, 1, DATA, 16, 0))
PACKED(p_ind_empty, d_packed(r, 0, TABLES, 0, D_INDIRECT))
PACKED(p_ind_odd, d_packed(r, 0, TABLES, 24, D_INDIRECT))
PACKED(p_ind_long, d_packed(r, 0, TABLES, 16 * (VQ_SEGMENTS_MAX + 1), D_INDIRECT))
PACKED(p_ind_end, d_packed(r, 0, 16 * MiB - 16, 32, D_INDIRECT))
PACKED(p_ind_chained, d_packed(r, 0, TABLES, 16, D_INDIRECT | D_NEXT);
       desc_write(&r->ram, TABLES, 0, DATA, 16, 0, 0); d_packed(r, 1, DATA, 16, 0))
PACKED(p_ind_nested, d_packed(r, 0, TABLES, 16, D_INDIRECT);
       desc_write(&r->ram, TABLES, 0, TABLES, 16, 0, D_INDIRECT))
PACKED(p_ind_refused, r->vq.indirect = false; d_packed(r, 0, TABLES, 16, D_INDIRECT);
       desc_write(&r->ram, TABLES, 0, DATA, 16, 0, 0))

#define ROW(name, says)   \
    {                     \
#name, name, says \
    }
static const struct hostile hostile[] = {
    ROW(s_good, NULL),
    ROW(s_self, "cycle"),
    ROW(s_cycle, "cycle"),
    ROW(s_next, "descriptor 512 of a table of 8"),
    ROW(s_zero, "no bytes"),
    ROW(s_outside, "buffer at"),
    ROW(s_wraps, "buffer at"),
    ROW(s_order, "readable buffer follows"),
    ROW(s_ind_empty, "table of 0 bytes"),
    ROW(s_ind_odd, "table of 24 bytes"),
    ROW(s_ind_long, "table of 4112 bytes"),
    ROW(s_ind_end, "table at"),
    ROW(s_ind_wrap, "table at"),
    ROW(s_ind_chained, "also chained"),
    ROW(s_ind_nested, "in an indirect table"),
    ROW(s_ind_cycle, "cycle"),
    ROW(s_ind_next, "descriptor 2 of a table of 2"),
    ROW(s_ind_refused, "not negotiated"),
    ROW(s_head, "head 8"),
    ROW(s_head_far, "head 65535"),
    ROW(s_ahead, "9 ahead"),
    ROW(s_ahead_far, "65535 ahead"),
    ROW(p_good, NULL),
    ROW(p_endless, "more than the ring's 8"),
    ROW(p_zero, "no bytes"),
    ROW(p_outside, "buffer at"),
    ROW(p_wraps, "buffer at"),
    ROW(p_order, "readable buffer follows"),
    ROW(p_ind_empty, "table of 0 bytes"),
    ROW(p_ind_odd, "table of 24 bytes"),
    ROW(p_ind_long, "table of 4112 bytes"),
    ROW(p_ind_end, "table at"),
    ROW(p_ind_chained, "also chained"),
    ROW(p_ind_nested, "in an indirect table"),
    ROW(p_ind_refused, "not negotiated"),
};

START_TEST(hostile_chains_latch)
{
    const struct hostile *h = &hostile[_i];
    struct rig *r = rig_new(*h->name == 'p', 8);
    h->make(r);
    ck_assert_msg(next_saying(r, h->says) == (h->says ? -EBADMSG : 1), "%s", h->name);
    virtqueue_reset(&r->vq);
    ck_assert(!r->vq.broken);
    rig_free(r);
}
END_TEST

START_TEST(head_in_flight_twice)
{
    struct rig *r = rig_new(false, 8);
    d_split(r, 0, DATA, 16, 0, 0);
    split_head(r, 0);
    ck_assert_int_eq(next(r), 1);
    split_head(r, 0);
    struct virtqueue_chain other;
    ck_assert_int_eq(virtqueue_next(&r->vq, &other, NULL), -EBADMSG);
    rig_free(r);
}
END_TEST

// A packed driver that makes entries available again before it got them back.
START_TEST(packed_ring_overcommitted)
{
    struct rig *r = rig_new(true, 4);
    struct virtqueue_chain *c = calloc(5, sizeof(*c));
    for (unsigned i = 0; i < 4; i++) {
        d_packed(r, i, DATA, 16, 0);
        ck_assert_int_eq(virtqueue_next(&r->vq, &c[i], NULL), 1);
    }
    desc_write(&r->ram, r->d.desc, 0, DATA, 16, 0, D_USED); // the next round's "available"
    ck_assert_int_eq(virtqueue_next(&r->vq, &c[4], NULL), -EBADMSG);
    r->vq.first = NULL;
    rig_free(r);
    free(c);
}
END_TEST

// What the guest changes after the walk changes nothing.
START_TEST(descriptors_are_copied_once)
{
    for (int packed = 0; packed < 2; packed++) {
        struct rig *r = rig_new(packed, 8);
        const struct buffer b[] = {{DATA, 64, false}, {DATA + 4096, 64, true}};
        ck_assert_int_ge(driver_add(&r->d, b, 2, TABLES), 0);
        ck_assert_int_eq(next(r), 1);
        memset(ram_at(&r->ram, TABLES, 64), 0xff, 64);
        memset(ram_at(&r->ram, r->d.desc, 128), 0xff, 128);
        struct iovec iov[VQ_SEGMENTS_MAX];
        ck_assert_uint_eq(chain_slice(&r->chain, true, 0, 64, iov), 1);
        ck_assert_ptr_eq(iov[0].iov_base, ram_at(&r->ram, DATA + 4096, 64));
        ck_assert_uint_eq(iov[0].iov_len, 64);
        rig_free(r);
    }
}
END_TEST

START_TEST(slices)
{
    struct rig *r = rig_new(false, 8);
    const struct buffer b[] = {{DATA, 10, false},
                               {DATA + 100, 20, false},
                               {DATA + 200, 5, true},
                               {DATA + 300, 1, true},
                               {DATA + 400, 50, true}};
    ck_assert_int_ge(driver_add(&r->d, b, 5, 0), 0);
    ck_assert_int_eq(next(r), 1);
    struct iovec iov[VQ_SEGMENTS_MAX];
    ck_assert_uint_eq(chain_slice(&r->chain, false, 8, 4, iov), 2);
    ck_assert_ptr_eq(iov[0].iov_base, ram_at(&r->ram, DATA + 8, 1));
    ck_assert_uint_eq(iov[0].iov_len, 2);
    ck_assert_ptr_eq(iov[1].iov_base, ram_at(&r->ram, DATA + 100, 1));
    ck_assert_uint_eq(iov[1].iov_len, 2);
    ck_assert_uint_eq(chain_slice(&r->chain, true, 5, 51, iov), 2);
    ck_assert_uint_eq(iov[1].iov_len, 50);
    uint8_t data[100];
    ck_assert_uint_eq(chain_read(&r->chain, 25, data, 100), 5);
    ck_assert_uint_eq(chain_write(&r->ram, &r->chain, 50, data, 100), 6);
    rig_free(r);
}
END_TEST

// --- interrupts and doorbells

static bool answer_one(struct rig *r)
{
    const struct buffer b[] = {{DATA, 16, true}};
    ck_assert_int_ge(driver_add(&r->d, b, 1, 0), 0);
    ck_assert_int_eq(next(r), 1);
    virtqueue_push(&r->vq, &r->chain, 16);
    unsigned id;
    uint32_t len;
    ck_assert(driver_used(&r->d, &id, &len));
    ck_assert_uint_eq(len, 16);
    return virtqueue_should_signal(&r->vq);
}

START_TEST(split_event_index)
{
    struct rig *r = rig_new(false, 8);
    uint64_t used_event = r->d.avail + 4 + 16, avail_event = r->d.used + 4 + 64;
    ck_assert(answer_one(r)); // the first always
    guest16_set(&r->ram, used_event, 3);
    ck_assert(!answer_one(r));
    ck_assert(!answer_one(r));
    ck_assert(answer_one(r)); // used index passes 3
    ck_assert(!answer_one(r));
    ck_assert(!virtqueue_kicks(&r->vq, true));
    ck_assert_uint_eq(guest16(&r->ram, avail_event), 5);
    const struct buffer b[] = {{DATA, 16, true}};
    ck_assert_int_ge(driver_add(&r->d, b, 1, 0), 0);
    ck_assert(virtqueue_kicks(&r->vq, true));
    rig_free(r);
}
END_TEST

START_TEST(packed_event_index)
{
    struct rig *r = rig_new(true, 8);
    ck_assert(answer_one(r));
    guest16_set(&r->ram, r->d.avail, 3 | 1 << 15);
    guest16_set(&r->ram, r->d.avail + 2, 2);
    ck_assert(!answer_one(r));
    ck_assert(!answer_one(r));
    ck_assert(answer_one(r));
    guest16_set(&r->ram, r->d.avail, 1); // in the next round
    for (unsigned i = 0; i < 5; i++)
        ck_assert(!answer_one(r));
    ck_assert(answer_one(r));
    guest16_set(&r->ram, r->d.avail + 2, 1);
    for (unsigned i = 0; i < 20; i++)
        ck_assert(!answer_one(r));
    ck_assert(!virtqueue_kicks(&r->vq, true));
    ck_assert_uint_eq(guest16(&r->ram, r->d.used + 2), 2);
    ck_assert_uint_eq(guest16(&r->ram, r->d.used) & 0x7fff, r->d.next);
    rig_free(r);
}
END_TEST

START_TEST(flags_without_event_index)
{
    struct rig *r = rig_new(false, 8);
    r->vq.event_idx = false;
    ck_assert(answer_one(r));
    guest16_set(&r->ram, r->d.avail, 1);
    ck_assert(!answer_one(r));
    guest16_set(&r->ram, r->d.avail, 0);
    ck_assert(answer_one(r));
    virtqueue_kicks(&r->vq, false);
    ck_assert_uint_eq(guest16(&r->ram, r->d.used), 1);
    virtqueue_kicks(&r->vq, true);
    ck_assert_uint_eq(guest16(&r->ram, r->d.used), 0);
    rig_free(r);
}
END_TEST

// --- saved state

static void save_to(struct rig *r, struct stream_mem *mem)
{
    struct error err = {0};
    stream_mem_writer(mem, "queue", 1 << 20);
    ck_assert_msg(!virtqueue_save(&r->vq, &mem->stream, &err), "%s", err.text);
}

static int load_from(struct rig *r, const struct stream_mem *mem, size_t len)
{
    struct stream_mem in;
    struct error err = {0};
    stream_mem_reader(&in, "queue", mem->data, len);
    return virtqueue_load(&r->vq, &in.stream, &err);
}

// Taken, not completed, saved; comes back once, in order, though a packed ring's descriptors were
// overwritten meanwhile by an answer that came out of order.
START_TEST(in_flight_comes_back_once)
{
    for (int packed = 0; packed < 2; packed++) {
        struct rig *r = rig_new(packed, 8);
        struct virtqueue_chain *c = calloc(3, sizeof(*c));
        for (unsigned i = 0; i < 3; i++) {
            const struct buffer b[] = {{DATA + 4096 * i, 16, false}, {DATA + 8, 100 + i, true}};
            ck_assert_int_ge(driver_add(&r->d, b, 2, 0), 0);
            ck_assert_int_eq(virtqueue_next(&r->vq, &c[i], NULL), 1);
        }
        virtqueue_push(&r->vq, &c[1], 1);
        const struct buffer late[] = {{DATA, 7, true}};
        ck_assert_int_ge(driver_add(&r->d, late, 1, 0), 0); // not taken before the save

        struct stream_mem mem, again;
        save_to(r, &mem);
        ck_assert_int_eq(load_from(r, &mem, mem.len), 0);
        save_to(r, &again); // before anything is taken again
        ck_assert_uint_eq(again.len, mem.len);
        ck_assert_mem_eq(again.data, mem.data, mem.len);

        uint64_t lens[3];
        for (unsigned i = 0; i < 3; i++) {
            ck_assert_int_eq(virtqueue_next(&r->vq, &c[i], NULL), 1);
            lens[i] = c[i].in_len;
        }
        ck_assert_uint_eq(lens[0], 100);
        ck_assert_uint_eq(lens[1], 102);
        ck_assert_uint_eq(lens[2], 7);
        ck_assert_int_eq(next(r), 0);
        for (unsigned i = 0; i < 3; i++)
            virtqueue_push(&r->vq, &c[i], 1);
        ck_assert(virtqueue_should_signal(&r->vq)); // somebody may not have been told
        unsigned id, n = 0;
        uint32_t len;
        while (driver_used(&r->d, &id, &len))
            n++;
        ck_assert_uint_eq(n, 4);
        ck_assert_uint_eq(r->vq.in_flight, 0);
        stream_mem_free(&mem);
        stream_mem_free(&again);
        free(c);
        rig_free(r);
    }
}
END_TEST

// Every byte of a saved queue set to every value: it loads or it does not, and then is harmless.
START_TEST(hostile_saved_queue)
{
    for (int packed = 0; packed < 2; packed++) {
        struct rig *r = rig_new(packed, 8);
        const struct buffer b[] = {{DATA, 16, false}, {DATA + 8, 100, true}};
        ck_assert_int_ge(driver_add(&r->d, b, 2, 0), 0);
        ck_assert_int_eq(next(r), 1);
        struct stream_mem mem;
        save_to(r, &mem);
        unsigned refused = 0;
        for (size_t i = 0; i < mem.len; i++)
            for (unsigned value = 0; value < 256; value++) {
                uint8_t old = mem.data[i];
                mem.data[i] = (uint8_t)value;
                int ret = load_from(r, &mem, mem.len);
                mem.data[i] = old;
                refused += ret != 0;
                ck_assert(!ret || !r->vq.enabled);
                r->vq.packed = packed;
                while (virtqueue_next(&r->vq, &r->chain, NULL) == 1)
                    virtqueue_push(&r->vq, &r->chain, 0);
            }
        ck_assert_uint_gt(refused, 1000);
        // Places in the blob: see virtqueue.c. The chain begins at byte 33.
        enum { SLOTS = 35, GPA = 41, LEN = 49 };
        static const struct {
            size_t at;
            uint8_t value;
        } wrong[] = {{SLOTS, 0},     {SLOTS, 9},   {SLOTS + 1, 1}, {GPA + 3, 1},
                     {GPA + 7, 255}, {LEN + 3, 1}, {LEN, 0}};
        for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
            uint8_t old = mem.data[wrong[i].at];
            mem.data[wrong[i].at] = wrong[i].value;
            ck_assert_msg(load_from(r, &mem, mem.len) == -EBADMSG, "row %zu", i);
            r->vq.packed = packed;
            mem.data[wrong[i].at] = old;
        }
        ck_assert_int_eq(load_from(r, &mem, mem.len), 0);
        for (size_t len = 0; len < mem.len; len++)
            ck_assert_int_ne(load_from(r, &mem, len), 0);
        stream_mem_free(&mem);
        rig_free(r);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("virtqueue");
    TCase *tc = tcase_create("virtqueue");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, split_and_packed_agree);
    tcase_add_test(tc, enable_checks_whole_rings);
    tcase_add_loop_test(tc, hostile_chains_latch, 0, ARRAY_SIZE(hostile));
    tcase_add_test(tc, head_in_flight_twice);
    tcase_add_test(tc, packed_ring_overcommitted);
    tcase_add_test(tc, descriptors_are_copied_once);
    tcase_add_test(tc, slices);
    tcase_add_test(tc, split_event_index);
    tcase_add_test(tc, packed_event_index);
    tcase_add_test(tc, flags_without_event_index);
    tcase_add_test(tc, in_flight_comes_back_once);
    tcase_add_test(tc, hostile_saved_queue);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
