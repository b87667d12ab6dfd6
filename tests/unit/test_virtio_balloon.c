// SPDX-License-Identifier: Apache-2.0
// The balloon driven as a guest does, on both rings, with the loop but without KVM. Whether memory
// is given back is asked of the kernel (mincore). That the tests notice a missing guard was checked
// by taking out one at a time: limits of a turn, the states of hinting, poison, widths and fields
// of config space, tags, targets, what a load checks, what a reset forgets.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "devices/virtio_balloon.h"
#include "devices/virtio_mmio.h"
#include "tests/unit/virtio_driver.h"
#include "vmm/vm.h"

enum { BASE = LAYOUT_VIRTIO_MMIO, RINGS = 0x100000, PFNS = 0x200000, DATA = 0x800000 };
enum { INFLATE, DEFLATE, STATS, HINT, REPORT, QUEUES };
enum { F_STATS = 1 << 1, F_OOM = 1 << 2, F_HINT = 1 << 3, F_POISON = 1 << 4, F_REPORT = 1 << 5 };
enum { SPACE = 0x100 };

struct rig {
    struct vm vm;
    struct device *dev;
    struct driver d[QUEUES]; // by role
    unsigned queue[QUEUES];  // role -> index
    int irq;
};

static int rig_irqfd(struct vm *vm, unsigned gsi, int fd, int resample, struct error *err)
{
    container_of(vm, struct rig, vm)->irq = dup(fd);
    return 0;
}

static int rig_doorbell(struct vm *vm, uint64_t addr, uint32_t value, int fd, struct error *err)
{
    return 0; // kicks come through the register
}

static const struct virtio_mmio_wiring wiring = {rig_irqfd, rig_doorbell};

static struct rig *rig_new(const char *options, enum ram_backing backing)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct error err = {0};
    struct ram_config ram = {.size = 32 * MiB, .backing = backing};
    struct virtio_balloon_config config;
    const struct virtio_mmio_place place = {.base = BASE, .gsi = GSI_VIRTIO, .wiring = &wiring};
    r->irq = -1;
    r->vm.mmio.name = "mmio";
    r->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    ck_assert_msg(!ram_create(&r->vm.ram, &ram, &err), "%s", err.text);
    madvise(r->vm.ram.map, r->vm.ram.size, MADV_NOHUGEPAGE); // so that each page shows alone
    ck_assert_msg(!loop_create(&r->vm.loop, &err), "%s", err.text);
    ck_assert_msg(!virtio_balloon_parse(options, &config, &err), "%s", err.text);
    config.attach.transport = &virtio_mmio_transport;
    config.attach.place = &place;
    config.attach.packed = true;
    ck_assert_msg(!device_add(&r->vm, &virtio_balloon_class, &config, &r->dev, &err), "%s",
                  err.text);
    virtio_balloon_class.resume(r->dev);
    return r;
}

static void rig_free(struct rig *r)
{
    struct error err = {0};
    virtio_balloon_class.unrealize(r->dev);
    free(r->dev);
    for (unsigned i = 0; i < 4; i++) // closed watches are freed by the loop
        loop_turn(r->vm.loop, false, &err);
    loop_destroy(r->vm.loop);
    state_registry_free(&r->vm.state);
    bus_free(&r->vm.mmio);
    ram_destroy(&r->vm.ram);
    close(r->irq);
    free(r);
}

static uint32_t get(struct rig *r, uint64_t offset)
{
    uint64_t value;
    ck_assert(bus_read(&r->vm.mmio, BASE + offset, 4, &value));
    return (uint32_t)value;
}

static void set(struct rig *r, uint64_t offset, uint32_t value)
{
    ck_assert(bus_write(&r->vm.mmio, BASE + offset, 4, value));
}

static uint32_t space(struct rig *r, unsigned field) // target, actual, hint command, poison
{
    return get(r, SPACE + 4 * field);
}

// With some of the device's features; queues with gaps as 5.5.2 numbers them, or without as Linux.
static void start(struct rig *r, bool packed, uint32_t features, bool gaps)
{
    const uint32_t needs[QUEUES] = {0, 0, F_STATS, F_HINT, F_REPORT};
    const uint32_t high = 1u | (packed ? 4u : 0u);
    const uint32_t begin[][2] = {{0x70, 0},        {0x70, 1}, {0x70, 3},    {0x24, 0},
                                 {0x20, features}, {0x24, 1}, {0x20, high}, {0x70, 11}};
    for (unsigned i = 0; i < ARRAY_SIZE(begin); i++)
        set(r, begin[i][0], begin[i][1]);
    ck_assert_uint_eq(get(r, 0x70), 11);
    unsigned index = 0;
    for (unsigned role = 0; role < QUEUES; role++) {
        bool there = !needs[role] || features & needs[role];
        r->queue[role] = gaps ? role : index;
        index += there;
        if (!there)
            continue;
        driver_init(&r->d[role], &r->vm.ram, packed, 64, RINGS + 0x4000 * role);
        const uint32_t queue[][2] = {{0x30, r->queue[role]},
                                     {0x38, 64},
                                     {0x80, (uint32_t)r->d[role].desc},
                                     {0x90, (uint32_t)r->d[role].avail},
                                     {0xa0, (uint32_t)r->d[role].used},
                                     {0x44, 1}};
        for (unsigned i = 0; i < ARRAY_SIZE(queue); i++)
            set(r, queue[i][0], queue[i][1]);
        ck_assert_uint_eq(get(r, 0x44), 1);
    }
    set(r, 0x70, 15);
    ck_assert_uint_eq(get(r, 0x70), 15);
}

static const uint32_t ALL = F_STATS | F_OOM | F_HINT | F_REPORT;

static void turn(struct rig *r, bool wait)
{
    struct error err = {0};
    ck_assert_msg(!loop_turn(r->vm.loop, wait, &err), "%s", err.text);
}

static void settle(struct rig *r) // everything that rang has been served
{
    struct pollfd p = {.fd = r->vm.loop->ring.ring_fd, .events = POLLIN};
    do
        turn(r, false);
    while (poll(&p, 1, 20) > 0);
}

static void kick(struct rig *r, unsigned role)
{
    set(r, 0x50, r->queue[role]);
}

static bool used(struct rig *r, unsigned role)
{
    unsigned id;
    uint32_t len;
    return driver_used(&r->d[role], &id, &len);
}

static void offer(struct rig *r, unsigned role, const struct buffer *b, unsigned n)
{
    ck_assert_int_ge(driver_add(&r->d[role], b, n, 0), 0);
    kick(r, role);
}

// One turn of the device alone; the loop would go on while the device rings for itself.
static void once(struct rig *r, unsigned role)
{
    struct virtio *v = container_of(r->dev, struct virtio, dev);
    v->ops->run(v, r->queue[role]);
}

static void add(struct rig *r, unsigned role, const struct buffer *b, unsigned n)
{
    ck_assert_int_ge(driver_add(&r->d[role], b, n, 0), 0);
}

static void request(struct rig *r, unsigned role, const struct buffer *b, unsigned n)
{
    offer(r, role, b, n);
    while (!used(r, role))
        turn(r, true);
}

static uint8_t *at(struct rig *r, uint64_t gpa)
{
    return ram_at(&r->vm.ram, gpa, 1);
}

static void fill(struct rig *r, uint64_t gpa, uint64_t len)
{
    memset(ram_at(&r->vm.ram, gpa, len), 0x5a, len);
}

// Pages of the range that take memory of the host.
static unsigned resident(struct rig *r, uint64_t gpa, uint64_t len)
{
    static unsigned char map[8192];
    unsigned n = 0;
    ck_assert_int_eq(mincore(at(r, gpa), len, map), 0);
    for (uint64_t i = 0; i < len / PAGE_SIZE; i++)
        n += map[i] & 1;
    return n;
}

static void inflate(struct rig *r, const uint32_t *pfns, unsigned n)
{
    memcpy(at(r, PFNS), pfns, n * sizeof(*pfns));
    const struct buffer b[] = {{PFNS, (uint32_t)(n * sizeof(*pfns)), false}};
    request(r, INFLATE, b, 1);
}

static json_int_t shown(struct rig *r, const char *name)
{
    json_t *all = json_object();
    virtio_balloon_class.show(r->dev, all);
    json_t *value = json_object_get(all, name);
    ck_assert_msg(json_is_integer(value), "%s", name);
    json_int_t n = json_integer_value(value);
    json_decref(all);
    return n;
}

static json_int_t guest_stat(struct rig *r, const char *name) // -1: not known
{
    json_t *all = json_object();
    virtio_balloon_class.show(r->dev, all);
    json_t *value = json_object_get(json_object_get(all, "guest"), name);
    json_int_t n = value ? json_integer_value(value) : -1;
    json_decref(all);
    return n;
}

// --- the balloon

static const enum ram_backing backings[] = {RAM_ANONYMOUS, RAM_MEMFD};

START_TEST(inflated_pages_are_given_back)
{
    struct rig *r = rig_new("", backings[_i / 2]);
    uint32_t pfns[256];
    start(r, _i % 2, ALL, true);
    fill(r, DATA, 2 * MiB);
    ck_assert_uint_eq(resident(r, DATA, 2 * MiB), 512);
    for (unsigned i = 0; i < 256; i++) // downwards, as an allocator hands them out
        pfns[i] = DATA / PAGE_SIZE + 255 - i;
    inflate(r, pfns, 256);
    ck_assert_uint_eq(resident(r, DATA, MiB), 0);
    ck_assert_uint_eq(resident(r, DATA + MiB, MiB), 256);
    ck_assert_int_eq(shown(r, "inflated_bytes"), MiB);
    ck_assert_int_eq(*at(r, DATA + 5000), 0);
    ck_assert_int_eq(*at(r, DATA + MiB), 0x5a);
    const struct buffer b[] = {{PFNS, 1024, false}};
    request(r, DEFLATE, b, 1);
    fill(r, DATA, MiB); // and back in
    ck_assert_uint_eq(resident(r, DATA, MiB), 256);
    rig_free(r);
}
END_TEST

START_TEST(target_and_actual)
{
    struct rig *r = rig_new("target=4M", RAM_ANONYMOUS);
    struct error err = {0};
    uint64_t ticks;
    ck_assert_uint_eq(space(r, 0), 1024);
    start(r, false, ALL, true);
    settle(r);
    ck_assert(read(r->irq, &ticks, 8) == 8 || errno == EAGAIN);
    uint32_t generation = get(r, 0xfc);
    ck_assert_int_eq(virtio_balloon_class.set(r->dev, "target", "8M", &err), 0);
    ck_assert_uint_eq(space(r, 0), 2048);
    ck_assert_uint_ne(get(r, 0xfc), generation);
    ck_assert_int_eq(read(r->irq, &ticks, 8), 8);
    ck_assert(get(r, 0x60) & VIRTIO_ISR_CONFIG);
    set(r, SPACE + 4, 1234);
    ck_assert_int_eq(shown(r, "actual_bytes"), 1234 * 4096);
    ck_assert_int_eq(shown(r, "target_bytes"), 8 * MiB);
    // What the driver may not write, and how it may not.
    set(r, SPACE, 7);
    set(r, SPACE + 8, 7);
    set(r, SPACE + 12, 7); // PAGE_POISON was not accepted
    bus_write(&r->vm.mmio, BASE + SPACE + 4, 1, 0xff);
    bus_write(&r->vm.mmio, BASE + SPACE + 6, 4, 0xffffffff);
    bus_write(&r->vm.mmio, BASE + SPACE + 14, 4, 0xffffffff);
    ck_assert_uint_eq(space(r, 0), 2048);
    ck_assert_uint_eq(space(r, 1), 1234);
    ck_assert_uint_eq(space(r, 2), 0);
    ck_assert_uint_eq(space(r, 3), 0);
    set(r, SPACE + 4, UINT32_MAX); // a lie is shown, and that is all
    ck_assert_int_eq(shown(r, "actual_bytes"), (json_int_t)UINT32_MAX * 4096);
    const struct {
        const char *key, *value;
        int ret;
    } bad[] = {{"target", "33M", -ERANGE},    {"target", "x", -EINVAL},
               {"target", "", -EINVAL},       {"target", "5K", -EINVAL},
               {"target", "-1", -EINVAL},     {"target", "18446744073709547520", -EINVAL},
               {"target", "16384T", -EINVAL}, {"stats", "-1", -EINVAL},
               {"stats", "86401", -EINVAL},   {"stats", "1s", -EINVAL},
               {"stats", "", -EINVAL},        {"size", "1", -ENOENT}};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_msg(virtio_balloon_class.set(r->dev, bad[i].key, bad[i].value, &err) ==
                          bad[i].ret,
                      "row %u", i);
    ck_assert_uint_eq(space(r, 0), 2048);
    rig_free(r);
}
END_TEST

START_TEST(hostile_pfns)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    start(r, _i, ALL, true);
    autoclose int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    r->vm.log.fd = null; // it says so, a few times
    fill(r, DATA, MiB);
    const uint32_t first = DATA / PAGE_SIZE, last = 32 * MiB / PAGE_SIZE - 1;
    // Beyond RAM, around its end, the same again and again, and one that is meant.
    const uint32_t pfns[] = {UINT32_MAX, first, last + 1, first, first,      0xfee00, first,
                             0xc0000,    first, 0x100000, first, UINT32_MAX, 0};
    *at(r, 0) = 1;
    inflate(r, pfns, ARRAY_SIZE(pfns));
    ck_assert_uint_eq(resident(r, DATA, MiB), 255);
    ck_assert_uint_eq(resident(r, 0, PAGE_SIZE), 0);
    ck_assert_int_eq(shown(r, "inflated_bytes"), 2 * PAGE_SIZE);
    // A run that ends outside is refused whole: nothing of it is known to be a balloon's.
    fill(r, last * PAGE_SIZE, PAGE_SIZE);
    const uint32_t edge[] = {last, last + 1};
    inflate(r, edge, 2);
    ck_assert_uint_eq(resident(r, last * PAGE_SIZE, PAGE_SIZE), 1);
    // Half a number, no number, and a chain that only wants to be written.
    const struct buffer odd[] = {{PFNS, 3, false}}, wrong[] = {{PFNS, 4096, true}};
    request(r, INFLATE, odd, 1);
    request(r, INFLATE, wrong, 1);
    ck_assert_uint_eq(get(r, 0x70), 15);
    ck_assert_uint_eq(resident(r, DATA, MiB), 255);
    rig_free(r);
}
END_TEST

// A chain of half a million numbers takes many turns of the loop, each of them short; a reset, a
// pause and a move come in the middle.
START_TEST(gigantic_chain)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    start(r, _i, ALL, true);
    uint32_t *pfns = (uint32_t *)at(r, PFNS);
    for (unsigned i = 0; i < 65536; i++)
        pfns[i] = DATA / PAGE_SIZE + i * 2 % 2048; // no two neighbours
    struct buffer b[16];
    for (unsigned i = 0; i < ARRAY_SIZE(b); i++)
        b[i] = (struct buffer) {PFNS, 65536 * 4, false};
    fill(r, DATA, 8 * MiB);
    unsigned turns = 0;
    add(r, INFLATE, b, ARRAY_SIZE(b));
    for (; !used(r, INFLATE); turns++)
        once(r, INFLATE);
    ck_assert_uint_gt(turns, 1000);
    ck_assert_uint_eq(resident(r, DATA, 8 * MiB), 1024);

    struct error err = {0};
    add(r, INFLATE, b, ARRAY_SIZE(b));
    once(r, INFLATE);
    once(r, INFLATE);
    ck_assert_int_eq(virtio_balloon_class.quiesce(r->dev, &err), 0);
    settle(r);
    ck_assert(!used(r, INFLATE)); // nothing is done while paused
    virtio_balloon_class.resume(r->dev);
    while (!used(r, INFLATE))
        turn(r, true);

    add(r, INFLATE, b, ARRAY_SIZE(b));
    once(r, INFLATE);
    once(r, INFLATE);
    start(r, _i, ALL, true); // resets
    settle(r);
    const uint32_t one = DATA / PAGE_SIZE + 1;
    inflate(r, &one, 1);
    ck_assert_uint_eq(resident(r, DATA + PAGE_SIZE, PAGE_SIZE), 0);
    rig_free(r);
}
END_TEST

// A driver that always has more does not keep the loop.
START_TEST(turns_are_bounded)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    start(r, _i, ALL, true);
    const struct buffer b[] = {{PFNS, 4096, false}};
    for (unsigned i = 0; i < 1024; i++)
        memcpy(at(r, PFNS + 4 * i), &(uint32_t) {DATA / PAGE_SIZE + 2 * i}, 4);
    for (unsigned i = 0; i < 64; i++)
        add(r, INFLATE, b, 1);
    unsigned done = 0, turns = 0;
    for (; done < 64; turns++) {
        unsigned before = done;
        once(r, INFLATE);
        while (used(r, INFLATE))
            done++;
        ck_assert_uint_le(done - before, 1);
    }
    ck_assert_uint_ge(turns, 64);
    rig_free(r);
}
END_TEST

START_TEST(blocked_discards_are_kept)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    start(r, false, ALL, true);
    fill(r, DATA, MiB);
    const uint32_t pfn = DATA / PAGE_SIZE;
    ram_discard_block(&r->vm.ram);
    inflate(r, &pfn, 1);
    ck_assert_uint_eq(resident(r, DATA, MiB), 256);
    ck_assert_int_eq(shown(r, "inflated_bytes"), 0);
    ck_assert_int_eq(shown(r, "kept_bytes"), PAGE_SIZE);
    ram_discard_unblock(&r->vm.ram);
    inflate(r, &pfn, 1);
    ck_assert_uint_eq(resident(r, DATA, MiB), 255);
    rig_free(r);
}
END_TEST

// --- reporting

START_TEST(reported_pages_are_given_back)
{
    struct rig *r = rig_new("", backings[_i / 2]);
    start(r, _i % 2, ALL, true);
    fill(r, DATA, 16 * MiB);
    const struct buffer b[] = {
        {DATA, 2 * MiB, true}, {DATA + 8 * MiB, 4 * MiB, true}, {DATA + 4 * MiB + 100, 8192, true}};
    request(r, REPORT, b, 3);
    ck_assert_uint_eq(resident(r, DATA, 2 * MiB), 0);
    ck_assert_uint_eq(resident(r, DATA + 8 * MiB, 4 * MiB), 0);
    ck_assert_uint_eq(resident(r, DATA + 4 * MiB, MiB), 255); // whole pages only
    ck_assert_int_eq(*at(r, DATA + 4 * MiB + 99), 0x5a);
    ck_assert_int_eq(shown(r, "reported_bytes"), 6 * MiB + PAGE_SIZE);
    // All of memory, many times over, in turns.
    struct buffer all[32];
    for (unsigned i = 0; i < ARRAY_SIZE(all); i++)
        all[i] = (struct buffer) {DATA, 24 * MiB, true};
    unsigned turns = 0;
    add(r, REPORT, all, ARRAY_SIZE(all));
    for (; !used(r, REPORT); turns++)
        once(r, REPORT);
    ck_assert_uint_ge(turns, 32 * 24 / 64);
    ck_assert_uint_eq(resident(r, DATA, 24 * MiB), 0);
    rig_free(r);
}
END_TEST

// A guest that fills free pages with a pattern must find it again.
START_TEST(poisoned_pages_stay)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    start(r, false, ALL | F_POISON, true);
    const struct buffer b[] = {{DATA, 2 * MiB, true}};
    set(r, SPACE + 12, 0x5a5a5a5a);
    ck_assert_uint_eq(space(r, 3), 0x5a5a5a5a);
    fill(r, DATA, 2 * MiB);
    request(r, REPORT, b, 1);
    ck_assert_uint_eq(resident(r, DATA, 2 * MiB), 512);
    _Atomic uint64_t bitmap[128] = {0};
    ck_assert(!r->vm.ram.hinter->start(r->vm.ram.hinter, bitmap));
    set(r, SPACE + 12, 0); // zeroes are what a given page reads as
    request(r, REPORT, b, 1);
    ck_assert_uint_eq(resident(r, DATA, 2 * MiB), 0);
    rig_free(r);
}
END_TEST

// --- which queue is which

START_TEST(queues_without_gaps)
{
    static const uint32_t sets[] = {
        F_REPORT, F_HINT | F_REPORT, F_STATS | F_REPORT, F_STATS | F_HINT, F_HINT, F_STATS, ALL, 0};
    for (unsigned i = 0; i < 2 * ARRAY_SIZE(sets); i++) {
        uint32_t features = sets[i / 2];
        struct rig *r = rig_new("", RAM_ANONYMOUS);
        start(r, false, features, i % 2);
        fill(r, DATA, 2 * MiB);
        const struct buffer b[] = {{DATA, 2 * MiB, true}};
        if (features & F_REPORT) {
            request(r, REPORT, b, 1);
            ck_assert_msg(!resident(r, DATA, 2 * MiB), "row %u", i);
        }
        fill(r, DATA, 2 * MiB);
        if (features & F_STATS) {
            const struct {
                uint16_t tag;
                uint64_t value;
            } __attribute__((packed)) stat = {4, 77};
            memcpy(at(r, PFNS), &stat, sizeof(stat));
            const struct buffer s[] = {{PFNS, sizeof(stat), false}};
            offer(r, STATS, s, 1);
            while (guest_stat(r, "free") < 0)
                turn(r, true);
            ck_assert_int_eq(guest_stat(r, "free"), 77);
        }
        if (features & F_HINT) {
            _Atomic uint64_t bitmap[128] = {0};
            ck_assert(r->vm.ram.hinter->start(r->vm.ram.hinter, bitmap));
            memcpy(at(r, PFNS), &(uint32_t) {space(r, 2)}, 4);
            const struct buffer begin[] = {{PFNS, 4, false}};
            request(r, HINT, begin, 1);
            request(r, HINT, b, 1);
            ck_assert_uint_eq(bitmap[DATA / PAGE_SIZE / 64], UINT64_MAX);
            ck_assert_uint_eq(resident(r, DATA, 2 * MiB), 512); // a hint gives nothing back
            r->vm.ram.hinter->end(r->vm.ram.hinter);
        }
        ck_assert_uint_eq(get(r, 0x70), 15);
        rig_free(r);
    }
}
END_TEST

// A queue that no accepted feature asked for is left alone, and does not keep the loop busy.
START_TEST(queue_without_a_feature)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    start(r, false, 0, false);
    r->queue[REPORT] = 4;
    set(r, 0x70, 0);
    const uint32_t begin[][2] = {{0x70, 1},  {0x70, 3}, {0x24, 1}, {0x20, 1},
                                 {0x70, 11}, {0x30, 4}, {0x38, 64}};
    for (unsigned i = 0; i < ARRAY_SIZE(begin); i++)
        set(r, begin[i][0], begin[i][1]);
    driver_init(&r->d[REPORT], &r->vm.ram, false, 64, RINGS);
    const uint32_t queue[][2] = {{0x80, (uint32_t)r->d[REPORT].desc},
                                 {0x90, (uint32_t)r->d[REPORT].avail},
                                 {0xa0, (uint32_t)r->d[REPORT].used},
                                 {0x44, 1},
                                 {0x70, 15}};
    for (unsigned i = 0; i < ARRAY_SIZE(queue); i++)
        set(r, queue[i][0], queue[i][1]);
    fill(r, DATA, MiB);
    const struct buffer b[] = {{DATA, MiB, true}};
    offer(r, REPORT, b, 1);
    settle(r);
    ck_assert(!used(r, REPORT));
    ck_assert_uint_eq(resident(r, DATA, MiB), 256);
    rig_free(r);
}
END_TEST

// --- statistics

START_TEST(statistics_are_asked_for)
{
    struct rig *r = rig_new("stats=1", RAM_ANONYMOUS);
    start(r, _i, ALL, true);
    struct {
        uint16_t tag;
        uint64_t value;
    } __attribute__((packed))
    stats[] = {{5, 1000}, {4, 1}, {99, 5}, {4, 2}, {65535, 5}, {9, UINT64_MAX}};
    memcpy(at(r, PFNS), stats, sizeof(stats));
    const struct buffer b[] = {{PFNS, sizeof(stats) + 3, false}}; // and half an entry
    offer(r, STATS, b, 1);
    while (!used(r, STATS)) // the timer gives it back: new numbers, please
        turn(r, true);
    ck_assert_int_eq(guest_stat(r, "total"), 1000);
    ck_assert_int_eq(guest_stat(r, "free"), 2); // the last counts
    ck_assert_int_eq(guest_stat(r, "hugetlb_failures"), INT64_MAX);
    ck_assert_int_eq(guest_stat(r, "swap_in"), -1);
    stats[3].value = 3;
    memcpy(at(r, PFNS), stats, sizeof(stats));
    offer(r, STATS, b, 1);
    while (!used(r, STATS))
        turn(r, true);
    ck_assert_int_eq(guest_stat(r, "free"), 3);
    struct error err = {0};
    ck_assert_int_eq(virtio_balloon_class.set(r->dev, "stats", "0", &err), 0);
    // Any length, many buffers at once: all but one come back.
    const struct buffer odd[] = {{PFNS, 1, false}}, big[] = {{DATA, 20 * MiB, false}};
    const struct buffer in[] = {{PFNS, 100, true}};
    offer(r, STATS, odd, 1);
    offer(r, STATS, big, 1);
    offer(r, STATS, in, 1);
    settle(r);
    ck_assert(used(r, STATS) && used(r, STATS) && !used(r, STATS));
    ck_assert_int_eq(guest_stat(r, "free"), -1);
    ck_assert_uint_eq(get(r, 0x70), 15);
    rig_free(r);
}
END_TEST

// --- hints

static void hint_command(struct rig *r, uint32_t command)
{
    memcpy(at(r, PFNS), &command, 4);
    const struct buffer b[] = {{PFNS, 4, false}};
    request(r, HINT, b, 1);
}

static void hint_page(struct rig *r, unsigned page)
{
    const struct buffer b[] = {{DATA + page * PAGE_SIZE, PAGE_SIZE, true}};
    request(r, HINT, b, 1);
}

START_TEST(hints_count_between_begin_and_end)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    struct ram_hinter *h = r->vm.ram.hinter;
    _Atomic uint64_t bitmap[128] = {0}, *bits = &bitmap[DATA / PAGE_SIZE / 64];
    ck_assert(!h->start(h, bitmap)); // no driver
    start(r, _i, ALL & ~(uint32_t)F_HINT, true);
    ck_assert(!h->start(h, bitmap)); // one that cannot
    start(r, _i, ALL, true);
    hint_page(r, 0); // nobody asked
    hint_command(r, 0);
    hint_command(r, 1);
    ck_assert(h->start(h, bitmap));
    ck_assert(!h->start(h, bitmap)); // one at a time
    uint64_t progress = h->progress(h);
    ck_assert_uint_ne(progress, 0);
    uint32_t command = space(r, 2);
    ck_assert_uint_ge(command, 2);
    hint_page(r, 1); // not begun
    hint_command(r, command + 1);
    hint_page(r, 2); // another's
    hint_command(r, 0);
    hint_page(r, 3); // an end before the beginning
    ck_assert_uint_eq(*bits, 0);
    hint_command(r, command);
    ck_assert_uint_ne(h->progress(h), progress);
    hint_page(r, 4);
    progress = h->progress(h);
    hint_page(r, 4);
    ck_assert_uint_ne(h->progress(h), progress);
    hint_page(r, 6);
    ck_assert_uint_eq(*bits, 1 << 4 | 1 << 6);
    const struct buffer part[] = {{DATA + 8 * PAGE_SIZE + 1, 2 * PAGE_SIZE, true}};
    request(r, HINT, part, 1);
    ck_assert_uint_eq(*bits, 1 << 4 | 1 << 6 | 1 << 9);
    ck_assert_int_eq(shown(r, "hinted_bytes"), 4 * PAGE_SIZE);
    hint_command(r, 0);
    ck_assert_uint_eq(h->progress(h), 0);
    hint_page(r, 11); // after its end
    hint_command(r, command);
    hint_page(r, 12); // begun a second time
    h->end(h);
    ck_assert_uint_eq(space(r, 2), 1);
    hint_command(r, command);
    hint_page(r, 13);
    // The next round has another number, and the old one is nothing.
    ck_assert(h->start(h, bitmap));
    ck_assert_uint_ne(space(r, 2), command);
    hint_command(r, command);
    hint_page(r, 14);
    ck_assert_uint_eq(*bits, 1 << 4 | 1 << 6 | 1 << 9);
    hint_command(r, space(r, 2));
    hint_page(r, 15);
    hint_command(r, 77); // anything else ends it
    hint_page(r, 16);
    ck_assert_uint_eq(*bits, 1 << 4 | 1 << 6 | 1 << 9 | 1 << 15);
    h->end(h);
    rig_free(r);
}
END_TEST

// A hint may wait in the queue while the asker stops listening, or the device is reset.
START_TEST(hints_end_at_once)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    struct ram_hinter *h = r->vm.ram.hinter;
    _Atomic uint64_t bitmap[128] = {0}, *bits = &bitmap[DATA / PAGE_SIZE / 64];
    const struct buffer page[] = {{DATA, PAGE_SIZE, true}};
    start(r, _i, ALL, true);
    ck_assert(h->start(h, bitmap));
    hint_command(r, space(r, 2));
    offer(r, HINT, page, 1);
    h->end(h);
    settle(r);
    ck_assert(used(r, HINT));
    ck_assert_uint_eq(*bits, 0);
    ck_assert(h->start(h, bitmap));
    hint_command(r, space(r, 2));
    start(r, _i, ALL, true); // resets
    ck_assert_uint_eq(h->progress(h), 0);
    ck_assert_uint_eq(space(r, 2), 0);
    hint_command(r, 0);
    hint_page(r, 0);
    ck_assert_uint_eq(*bits, 0);
    h->end(h);
    ck_assert_uint_eq(space(r, 2), 0);
    // All of memory as one hint: the bits of all pages, and none beyond.
    _Atomic uint64_t guard[130] = {0};
    ck_assert(h->start(h, guard + 1));
    hint_command(r, space(r, 2));
    const struct buffer all[] = {{0, 32 * MiB, true}};
    request(r, HINT, all, 1);
    ck_assert_uint_eq(guard[0], 0);
    ck_assert_uint_eq(guard[129], 0);
    for (unsigned i = 1; i < 129; i++)
        ck_assert_uint_eq(guard[i], UINT64_MAX);
    h->end(h);
    rig_free(r);
}
END_TEST

// --- saved state

static void move(struct rig *from, struct rig *to)
{
    struct stream_mem mem, in;
    struct error err = {0};
    virtio_balloon_class.quiesce(from->dev, &err);
    memcpy(at(to, 0), at(from, 0), 32 * MiB);
    memcpy(to->d, from->d, sizeof(to->d));
    memcpy(to->queue, from->queue, sizeof(to->queue));
    for (unsigned i = 0; i < QUEUES; i++)
        to->d[i].ram = &to->vm.ram;
    stream_mem_writer(&mem, "state", STATE_BLOB_MAX);
    ck_assert_msg(!state_save(&from->vm.state, &mem.stream, &err), "%s", err.text);
    stream_mem_reader(&in, "state", mem.data, mem.len);
    ck_assert_msg(!state_load(&to->vm.state, &in.stream, &err), "%s", err.text);
    stream_mem_free(&mem);
    virtio_balloon_class.resume(to->dev);
}

// --- what a migration takes

static void statement(struct rig *r, uint64_t available)
{
    struct {
        uint16_t tag;
        uint64_t value;
    } __attribute__((packed)) stat = {6, available};
    memcpy(at(r, PFNS), &stat, sizeof(stat));
    const struct buffer b[] = {{PFNS, sizeof(stat), false}};
    offer(r, STATS, b, 1);
    settle(r);
}

// Asked for by whoever moves the guest; also where nobody asks every so many seconds.
START_TEST(says_what_it_has)
{
    struct rig *r = rig_new("target=4M", RAM_ANONYMOUS);
    struct ram_balloon *balloon = r->vm.ram.balloon;
    struct ram_guest_says says;
    ck_assert(balloon && !balloon->look(balloon, &says)); // no driver
    balloon->ask(balloon);
    settle(r);
    start(r, _i, ALL & ~F_STATS, true);
    ck_assert(!balloon->look(balloon, &says));
    start(r, _i, ALL, true);
    ck_assert(balloon->look(balloon, &says));
    ck_assert(!says.serial && says.available == UINT64_MAX && says.free == UINT64_MAX);
    ck_assert(!says.held && says.wanted == 4 * MiB);
    set(r, SPACE + 4, UINT32_MAX); // actual
    statement(r, 12345);
    ck_assert(balloon->look(balloon, &says));
    ck_assert(says.serial == 1 && says.available == 12345 && says.free == UINT64_MAX);
    ck_assert(says.swapped_out == UINT64_MAX && says.major_faults == UINT64_MAX);
    ck_assert_uint_eq(says.held, UINT32_MAX * PAGE_SIZE);
    ck_assert(!used(r, STATS)); // kept until somebody asks
    balloon->ask(balloon);
    while (!used(r, STATS))
        turn(r, true);
    balloon->ask(balloon); // while it has no buffer: nothing happens
    settle(r);
    statement(r, 7);
    ck_assert(balloon->look(balloon, &says) && says.serial == 2 && says.available == 7);
    ck_assert_uint_eq(get(r, 0x70), 15);
    rig_free(r);
}
END_TEST

// Both that want something get it; what the migration took ends with it, whatever its user set
// meanwhile, and is not saved.
START_TEST(takes_beyond_its_target)
{
    struct rig *r = rig_new("target=4M", RAM_ANONYMOUS), *to = rig_new("", RAM_ANONYMOUS);
    struct ram_balloon *balloon = r->vm.ram.balloon;
    struct error err = {0};
    start(r, _i, ALL, true);
    set(r, 0x64, 3);
    balloon->take(balloon, 8 * MiB);
    ck_assert_uint_eq(space(r, 0), 12 * MiB / PAGE_SIZE);
    ck_assert_uint_eq(get(r, 0x60), 2); // config changed
    ck_assert_int_eq(shown(r, "target_bytes"), 4 * MiB);
    ck_assert_int_eq(shown(r, "migration_bytes"), 8 * MiB);
    set(r, 0x64, 3);
    balloon->take(balloon, 8 * MiB);
    ck_assert_uint_eq(get(r, 0x60), 0); // nothing new
    ck_assert_int_eq(virtio_balloon_class.set(r->dev, "target", "5M", &err), 0);
    ck_assert_uint_eq(space(r, 0), 13 * MiB / PAGE_SIZE);
    balloon->take(balloon, UINT64_MAX); // no more than there is
    ck_assert_uint_eq(space(r, 0), r->vm.ram.size / PAGE_SIZE);
    ck_assert_int_eq(virtio_balloon_class.quiesce(r->dev, &err), 0);
    balloon->take(balloon, 0);
    ck_assert_uint_eq(space(r, 0), 5 * MiB / PAGE_SIZE);
    move(r, to);
    ck_assert_uint_eq(space(to, 0), 5 * MiB / PAGE_SIZE);
    ck_assert_int_eq(shown(to, "migration_bytes"), 0);
    ck_assert_uint_eq(get(to, 0x60) & 2, 2); // its driver hears of it there
    rig_free(to);
    rig_free(r);
}
END_TEST

// In the middle of everything: a chain half done, statistics held, hints under way.
START_TEST(moves_in_the_middle)
{
    struct rig *a = rig_new("target=8M", RAM_ANONYMOUS), *b = rig_new("", RAM_ANONYMOUS);
    struct error err = {0};
    _Atomic uint64_t bitmap[128] = {0};
    start(a, _i, ALL, true);
    struct {
        uint16_t tag;
        uint64_t value;
    } __attribute__((packed)) stat = {4, 5};
    memcpy(at(a, PFNS), &stat, sizeof(stat));
    const struct buffer stats[] = {{PFNS, sizeof(stat), false}};
    offer(a, STATS, stats, 1);
    settle(a);
    set(a, SPACE + 4, 99);
    ck_assert_int_eq(virtio_balloon_class.set(a->dev, "target", "4M", &err), 0);
    ck_assert(a->vm.ram.hinter->start(a->vm.ram.hinter, bitmap));
    uint32_t command = space(a, 2);
    for (unsigned i = 0; i < 65536; i++)
        memcpy(at(a, PFNS + 4096 + 4 * i), &(uint32_t) {DATA / PAGE_SIZE + 2 * i % 4096}, 4);
    const struct buffer big[] = {{PFNS + 4096, 4 * 65536, false}};
    fill(a, DATA, 16 * MiB);
    add(a, INFLATE, big, 1);
    once(a, INFLATE);
    once(a, INFLATE);
    ck_assert(!used(a, INFLATE));
    move(a, b);
    ck_assert_uint_eq(space(b, 0), 1024);
    ck_assert_uint_eq(space(b, 1), 99);
    ck_assert_uint_eq(space(b, 2), 1); // hinting has ended with who asked
    while (!used(b, INFLATE))
        turn(b, true);
    ck_assert(!used(b, INFLATE));
    ck_assert_uint_eq(resident(b, DATA, 16 * MiB), 2048);
    settle(b);
    ck_assert_int_eq(guest_stat(b, "free"), 5);
    ck_assert_int_eq(virtio_balloon_class.set(b->dev, "stats", "1", &err), 0);
    while (!used(b, STATS)) // the buffer that came along is given back
        turn(b, true);
    ck_assert(b->vm.ram.hinter->start(b->vm.ram.hinter, bitmap));
    ck_assert_uint_gt(space(b, 2), command);
    b->vm.ram.hinter->end(b->vm.ram.hinter);
    a->vm.ram.hinter->end(a->vm.ram.hinter);
    rig_free(a);
    rig_free(b);
}
END_TEST

START_TEST(hostile_state)
{
    struct rig *r = rig_new("", RAM_ANONYMOUS);
    const struct state_table *table = virtio_balloon_class.state;
    static const struct {
        const char *field;
        uint64_t value;
    } rows[] = {{"space.num_pages", 8193}, {"space.num_pages", UINT32_MAX},
                {"config.stats", 86401},   {"config.stats", UINT32_MAX},
                {"hint_next", 0},          {"hint_next", 1},
                {"v.accepted", 1},         {"v.status", 4}};
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        start(r, false, ALL, true);
        struct error err = {0};
        unsigned f = 0;
        ck_assert_int_eq(table->save(r->dev, &err), 0);
        while (f < table->nr_fields && strcmp(table->fields[f].name, rows[i].field))
            f++;
        ck_assert_uint_lt(f, table->nr_fields);
        memcpy((uint8_t *)r->dev + table->fields[f].offset, &rows[i].value, table->fields[f].size);
        ck_assert_msg(table->load(r->dev, 1, &err) < 0, "row %u loads", i);
        ck_assert_uint_gt(strlen(err.text), 5);
    }
    start(r, false, ALL, true);
    const uint32_t pfn = DATA / PAGE_SIZE;
    fill(r, DATA, PAGE_SIZE);
    inflate(r, &pfn, 1);
    ck_assert_uint_eq(resident(r, DATA, PAGE_SIZE), 0);
    rig_free(r);
}
END_TEST

// --- the option

START_TEST(option_text)
{
    static const char *const bad[] = {
        "x",           "target",        "target=",         "target=1x",   "target=5K",
        "stats",       "stats=",        "stats=1h",        "stats=86401", "reporting",
        "reporting=1", "hinting=ON",    "deflate-on-oom=", "target=1M,,", ",",
        "target=1M,",  "reporting=on ", "packed=on",       " target=1M",  "stats=1,x"};
    struct virtio_balloon_config c;
    struct error err = {0};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_msg(virtio_balloon_parse(bad[i], &c, &err) == -EINVAL, "'%s'", bad[i]);
    ck_assert_int_eq(virtio_balloon_parse("", &c, &err), 0);
    ck_assert(c.deflate_on_oom && c.reporting && c.hinting && !c.stats && !c.target);
    ck_assert_int_eq(virtio_balloon_parse("target=128M,deflate-on-oom=off,stats=5,reporting=off,"
                                          "hinting=off,packed",
                                          &c, &err),
                     0);
    ck_assert(!c.deflate_on_oom && !c.reporting && !c.hinting && c.attach.packed);
    ck_assert_uint_eq(c.target, 128 * MiB);
    ck_assert_uint_eq(c.stats, 5);
    struct rig *r = rig_new("reporting=off,hinting=off,deflate-on-oom=off", RAM_ANONYMOUS);
    set(r, 0x14, 0);
    ck_assert_uint_eq(get(r, 0x10) & 0x3f, F_STATS);
    rig_free(r);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("virtio_balloon");
    TCase *tc = tcase_create("virtio_balloon");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, inflated_pages_are_given_back, 0, 4);
    tcase_add_test(tc, target_and_actual);
    tcase_add_loop_test(tc, hostile_pfns, 0, 2);
    tcase_add_loop_test(tc, gigantic_chain, 0, 2);
    tcase_add_loop_test(tc, turns_are_bounded, 0, 2);
    tcase_add_test(tc, blocked_discards_are_kept);
    tcase_add_loop_test(tc, reported_pages_are_given_back, 0, 4);
    tcase_add_test(tc, poisoned_pages_stay);
    tcase_add_test(tc, queues_without_gaps);
    tcase_add_test(tc, queue_without_a_feature);
    tcase_add_loop_test(tc, statistics_are_asked_for, 0, 2);
    tcase_add_loop_test(tc, hints_count_between_begin_and_end, 0, 2);
    tcase_add_loop_test(tc, hints_end_at_once, 0, 2);
    tcase_add_loop_test(tc, says_what_it_has, 0, 2);
    tcase_add_loop_test(tc, takes_beyond_its_target, 0, 2);
    tcase_add_loop_test(tc, moves_in_the_middle, 0, 2);
    tcase_add_test(tc, hostile_state);
    tcase_add_test(tc, option_text);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
