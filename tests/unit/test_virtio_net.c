// SPDX-License-Identifier: Apache-2.0
// The network device, driven as a guest does, with the loop but without KVM. The host's side is a
// socket that keeps the bounds of packets, as a tap does; or, for user networking, this program
// itself in the role of passt. That the tests notice a missing guard was checked by taking each
// out.
#include <arpa/inet.h>
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "devices/virtio_mmio.h"
#include "devices/virtio_net.h"
#include "tests/unit/virtio_driver.h"
#include "vmm/vm.h"

enum { BASE = LAYOUT_VIRTIO_MMIO, RINGS = 0x100000, DATA = 0x400000, ROOM = 0x600000 };
enum { HEADER = sizeof(struct net_header), ENTRIES = 64 };
enum { DRIVERS = 5 };
#define F_CSUM       (1ull << 0)
#define F_GUEST_CSUM (1ull << 1)
#define F_GUEST_TSO4 (1ull << 7)
#define F_GUEST_ECN  (1ull << 9)
#define F_HOST_TSO4  (1ull << 11)
#define F_HOST_ECN   (1ull << 13)
#define F_MRG_RXBUF  (1ull << 15)
#define F_ANNOUNCE   (1ull << 21)
#define F_MQ         (1ull << 22)
#define ALL          (~VIRTIO_F_EVENT_IDX)

struct rig {
    struct vm vm;
    struct device *dev;
    struct driver d[DRIVERS]; // of the queues
    int irq, log;             // our copy of the interrupt; what was logged
    int host[2], peer[2];     // the device's ends of the host's side, and the others
    uint8_t new_mac[6];       // of the config
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

static struct rig *rig_bare(void)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct error err = {0};
    int log[2];
    struct ram_config ram = {.size = 16 * MiB};
    ck_assert_msg(!ram_create(&r->vm.ram, &ram, &err), "%s", err.text);
    ck_assert_msg(!loop_create(&r->vm.loop, &err), "%s", err.text);
    ck_assert(!pipe2(log, O_NONBLOCK | O_CLOEXEC));
    r->vm.mmio.name = "mmio";
    r->vm.log = (struct log) {.level = LOG_INFO, .fd = log[1]};
    r->log = log[0];
    r->irq = r->peer[0] = r->peer[1] = -1;
    return r;
}

static int rig_device(struct rig *r, struct virtio_net_config *config, struct error *err)
{
    const struct virtio_mmio_place place = {.base = BASE, .gsi = GSI_VIRTIO, .wiring = &wiring};
    config->attach.transport = &virtio_mmio_transport;
    config->attach.place = &place;
    return device_add(&r->vm, &virtio_net_class, config, &r->dev, err);
}

// `options`: what may follow "tap=NAME".
static void rig_add(struct rig *r, const char *options, bool arrives)
{
    struct virtio_net_config config;
    struct error err = {0};
    char text[200];
    snprintf(text, sizeof(text), "tap=none,mac=02:11:22:33:44:55,mtu=1500%s", options);
    ck_assert_msg(!virtio_net_parse(text, &config, &err), "%s", err.text);
    config.kind = NET_PACKETS;
    *config.tap = 0;
    config.attach.arrives = arrives;
    memcpy(config.new_mac, r->new_mac, sizeof(config.new_mac));
    for (unsigned i = 0; i < config.pairs; i++) {
        int ends[2];
        ck_assert(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends));
        config.fds[i] = r->host[i] = ends[0];
        r->peer[i] = ends[1];
    }
    ck_assert_msg(!rig_device(r, &config, &err), "%s", err.text);
    if (!arrives)
        virtio_net_class.resume(r->dev);
}

static struct rig *rig_new(const char *options)
{
    struct rig *r = rig_bare();
    rig_add(r, options, false);
    return r;
}

static void rig_free(struct rig *r)
{
    struct error err = {0};
    while (r->vm.devices) {
        struct device *dev = r->vm.devices;
        r->vm.devices = dev->next;
        dev->class->unrealize(dev);
        free(dev);
    }
    for (unsigned i = 0; i < 4; i++) // closed watches are freed by the loop
        loop_turn(r->vm.loop, false, &err);
    loop_destroy(r->vm.loop);
    state_registry_free(&r->vm.state);
    bus_free(&r->vm.mmio);
    ram_destroy(&r->vm.ram);
    const int fds[] = {r->irq, r->log, r->vm.log.fd, r->peer[0], r->peer[1]};
    for (unsigned i = 0; i < ARRAY_SIZE(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
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

static uint16_t link_status(struct rig *r)
{
    uint64_t value;
    ck_assert(bus_read(&r->vm.mmio, BASE + 0x106, 2, &value));
    return (uint16_t)value;
}

// The driver's side of a start, with the features of `accept` that are offered.
static void start(struct rig *r, uint64_t accept, bool packed)
{
    const struct virtio *v = container_of(r->dev, struct virtio, dev);
    accept &= v->offered & ~(packed ? 0 : VIRTIO_F_PACKED);
    const uint32_t writes[][2] = {{0x70, 1}, {0x70, 3},
                                  {0x24, 0}, {0x20, (uint32_t)accept},
                                  {0x24, 1}, {0x20, (uint32_t)(accept >> 32)},
                                  {0x70, 11}};
    for (unsigned i = 0; i < ARRAY_SIZE(writes); i++)
        set(r, writes[i][0], writes[i][1]);
    ck_assert_uint_eq(get(r, 0x70), 11);
    for (unsigned q = 0; q < v->nr_queues; q++) {
        driver_init(&r->d[q], &r->vm.ram, packed, ENTRIES, RINGS + q * 0x4000);
        const uint32_t queue[][2] = {{0x30, q},
                                     {0x38, ENTRIES},
                                     {0x80, (uint32_t)r->d[q].desc},
                                     {0x90, (uint32_t)r->d[q].avail},
                                     {0xa0, (uint32_t)r->d[q].used},
                                     {0x44, 1}};
        for (unsigned i = 0; i < ARRAY_SIZE(queue); i++)
            set(r, queue[i][0], queue[i][1]);
    }
    set(r, 0x70, 15);
    ck_assert_uint_eq(get(r, 0x70), 15);
}

static uint8_t *at(struct rig *r, uint64_t gpa)
{
    return ram_at(&r->vm.ram, gpa, 1);
}

static void turns(struct rig *r)
{
    struct error err = {0};
    for (unsigned i = 0; i < 8; i++)
        ck_assert_msg(!loop_turn(r->vm.loop, false, &err), "%s", err.text);
}

static void turn_wait(struct rig *r)
{
    struct error err = {0};
    ck_assert_msg(!loop_turn(r->vm.loop, true, &err), "%s", err.text);
}

// --- frames

static void pattern(uint8_t *p, size_t len, uint8_t seed)
{
    for (size_t i = 0; i < len; i++)
        p[i] = (uint8_t)(seed + i * 7 + (i >> 8));
}

static bool patterned(const uint8_t *p, size_t len, uint8_t seed)
{
    for (size_t i = 0; i < len; i++)
        if (p[i] != (uint8_t)(seed + i * 7 + (i >> 8)))
            return false;
    return true;
}

// The guest sends; the frame in up to three buffers.
static void guest_send(struct rig *r, unsigned queue, const struct net_header *h, uint32_t len,
                       uint8_t seed)
{
    uint64_t gpa = DATA + (uint64_t)r->d[queue].next % ENTRIES * 0x1000;
    memcpy(at(r, gpa), h, HEADER);
    pattern(at(r, gpa + HEADER), len, seed);
    uint32_t cut = len > 20 ? 20 : len;
    const struct buffer b[] = {
        {gpa, HEADER, false}, {gpa + HEADER, cut, false}, {gpa + HEADER + cut, len - cut, false}};
    ck_assert_int_ge(driver_add(&r->d[queue], b, !len ? 1 : len > cut ? 3 : 2, 0), 0);
    set(r, 0x50, queue);
}

static const struct net_header plain;

static ssize_t peer_read(struct rig *r, unsigned pair, uint8_t *data, size_t size)
{
    turns(r);
    return recv(r->peer[pair], data, size, MSG_DONTWAIT);
}

static void sent_expect(struct rig *r, const struct net_header *h, uint32_t len, uint8_t seed)
{
    uint8_t data[70000];
    ssize_t n = peer_read(r, 0, data, sizeof(data));
    ck_assert_int_eq(n, (int)(HEADER + len));
    ck_assert(!memcmp(data, h, HEADER));
    ck_assert(patterned(data + HEADER, len, seed));
}

static void nothing_sent(struct rig *r)
{
    uint8_t data[64];
    ck_assert_int_eq(peer_read(r, 0, data, sizeof(data)), -1);
    ck_assert_int_eq(errno, EAGAIN);
}

static bool used(struct rig *r, unsigned queue, uint32_t *len)
{
    unsigned id;
    return driver_used(&r->d[queue], &id, len);
}

static void host_send(struct rig *r, unsigned pair, const struct net_header *h, size_t len,
                      uint8_t seed)
{
    static uint8_t data[80000]; // contents only, for sendmsg
    struct iovec iov[] = {{(void *)h, HEADER}, {data, len}};
    const struct msghdr m = {.msg_iov = iov, .msg_iovlen = 2};
    pattern(data, len, seed);
    ck_assert_int_eq(sendmsg(r->peer[pair], &m, 0), (int)(HEADER + len));
}

static void room_add(struct rig *r, unsigned queue, uint64_t gpa, uint32_t len)
{
    const struct buffer b[] = {{gpa, len, true}};
    memset(at(r, gpa), 0xee, len);
    ck_assert_int_ge(driver_add(&r->d[queue], b, 1, 0), 0);
}

static void received_expect(struct rig *r, uint64_t gpa, size_t len, uint8_t seed, uint16_t buffers)
{
    struct net_header h;
    uint32_t n;
    turns(r);
    ck_assert(used(r, 0, &n));
    ck_assert_uint_eq(n, HEADER + len);
    memcpy(&h, at(r, gpa), HEADER);
    ck_assert_uint_eq(h.num_buffers, buffers);
    ck_assert(patterned(at(r, gpa + HEADER), len, seed));
}

static uint64_t counter(struct rig *r, const char *direction, const char *what)
{
    json_t *out = json_object();
    virtio_net_class.show(r->dev, out);
    uint64_t value =
        (uint64_t)json_integer_value(json_object_get(json_object_get(out, direction), what));
    json_decref(out);
    return value;
}

static unsigned log_lines(struct rig *r)
{
    char text[4096];
    ssize_t n = read(r->log, text, sizeof(text));
    unsigned lines = 0;
    for (ssize_t i = 0; i < n; i++)
        lines += text[i] == '\n';
    return lines;
}

// --- moving frames

START_TEST(sends_and_receives)
{
    struct rig *r = rig_new(",packed");
    start(r, ALL, _i);
    for (unsigned i = 0; i < 3 * ENTRIES; i++) {
        uint32_t len = 60 + i, n;
        guest_send(r, 1, &plain, len, (uint8_t)i);
        sent_expect(r, &plain, len, (uint8_t)i);
        ck_assert(used(r, 1, &n));
        ck_assert_uint_eq(n, 0);
        room_add(r, 0, ROOM, 2048);
        set(r, 0x50, 0);
        host_send(r, 0, &plain, len, (uint8_t)(i + 1));
        received_expect(r, ROOM, len, (uint8_t)(i + 1), 1);
        ck_assert_uint_eq(*at(r, ROOM + HEADER + len), 0xee);
    }
    ck_assert_uint_eq(counter(r, "sent", "packets"), 3 * ENTRIES);
    ck_assert_uint_eq(counter(r, "received", "packets"), 3 * ENTRIES);
    ck_assert_uint_eq(counter(r, "received", "dropped"), 0);
    rig_free(r);
}
END_TEST

// One frame in several buffers: all of them become visible together, the header says how many.
START_TEST(merges_buffers)
{
    struct rig *r = rig_new(",packed");
    start(r, ALL, _i);
    for (unsigned round = 0; round < 40; round++) { // round the ring
        struct net_header h = {.flags = 2, .gso_type = 1, .gso_size = 1448, .hdr_len = 54}, seen;
        uint8_t whole[3000];
        uint32_t n, got = 0;
        for (unsigned i = 0; i < 6; i++)
            room_add(r, 0, ROOM + 0x1000 * i, 1000);
        set(r, 0x50, 0);
        host_send(r, 0, &h, 2500, (uint8_t)round);
        turns(r);
        for (unsigned i = 0; i < 3; i++) {
            ck_assert(used(r, 0, &n));
            ck_assert_uint_eq(n, i < 2 ? 1000 : HEADER + 2500 - 2000);
            memcpy(whole + got, at(r, ROOM + 0x1000 * i), n);
            got += n;
        }
        ck_assert(!used(r, 0, &n));
        memcpy(&seen, whole, HEADER);
        h.num_buffers = 3;
        ck_assert(!memcmp(&h, &seen, HEADER));
        ck_assert(patterned(whole + HEADER, 2500, (uint8_t)round));
        host_send(r, 0, &plain, 2500, 1); // the other three
        turns(r);
        for (unsigned i = 0; i < 3; i++)
            ck_assert(used(r, 0, &n));
    }
    rig_free(r);
}
END_TEST

START_TEST(writes_are_logged_as_dirty)
{
    struct rig *r = rig_new("");
    start(r, ALL, false);
    r->vm.ram.own_dirty = calloc(ram_bitmap_words(&r->vm.ram), sizeof(uint64_t));
    atomic_store(&r->vm.ram.logging, true);
    room_add(r, 0, ROOM, 4096);
    room_add(r, 0, ROOM + 0x4000, 4096);
    set(r, 0x50, 0);
    host_send(r, 0, &plain, 5000, 1);
    turns(r);
    const uint64_t pages[] = {ROOM >> 12, (ROOM + 0x4000) >> 12, r->d[0].used >> 12};
    for (unsigned i = 0; i < ARRAY_SIZE(pages); i++)
        ck_assert_msg(r->vm.ram.own_dirty[pages[i] / 64] >> pages[i] % 64 & 1, "page %u", i);
    atomic_store(&r->vm.ram.logging, false);
    rig_free(r);
}
END_TEST

// --- a receive queue that is empty, slow or small

START_TEST(waits_for_buffers)
{
    struct rig *r = rig_new("");
    uint32_t n;
    int waiting;
    start(r, ALL, false);
    turns(r);
    for (unsigned i = 0; i < 5; i++)
        host_send(r, 0, &plain, 100 + i, (uint8_t)i);
    turns(r);
    ck_assert(!ioctl(r->peer[0], SIOCOUTQ, &waiting) && waiting > 0); // nobody read them
    ck_assert_uint_eq(counter(r, "received", "packets"), 0);
    for (unsigned i = 0; i < 5; i++) {
        room_add(r, 0, ROOM, 2048);
        set(r, 0x50, 0);
        received_expect(r, ROOM, 100 + i, (uint8_t)i, 1);
        ck_assert(!used(r, 0, &n));
    }
    rig_free(r);
}
END_TEST

// A frame that is larger than what is there now waits for the rest, and is whole then.
START_TEST(waits_for_the_rest_of_the_buffers)
{
    struct rig *r = rig_new("");
    uint32_t n, got = 0;
    static uint8_t whole[64 * 1024];
    start(r, ALL, false);
    room_add(r, 0, ROOM, 2000);
    room_add(r, 0, ROOM + 0x1000, 2000);
    set(r, 0x50, 0);
    host_send(r, 0, &plain, 60000, 9);
    host_send(r, 0, &plain, 80, 10);
    turns(r);
    ck_assert(!used(r, 0, &n));
    for (unsigned i = 2; i < 40; i++)
        room_add(r, 0, ROOM + 0x1000 * i, 2000);
    set(r, 0x50, 0);
    turns(r);
    for (unsigned i = 0; got < HEADER + 60000; i++) {
        ck_assert(used(r, 0, &n));
        memcpy(whole + got, at(r, ROOM + 0x1000 * i), n);
        got += n;
    }
    ck_assert_uint_eq(got, HEADER + 60000);
    ck_assert(patterned(whole + HEADER, 60000, 9));
    ck_assert(used(r, 0, &n));
    ck_assert_uint_eq(n, HEADER + 80);
    rig_free(r);
}
END_TEST

START_TEST(drops_what_can_never_fit)
{
    // Merged: 64 buffers of 200 bytes. Not merged: the first buffer alone.
    const uint64_t features[] = {ALL, ALL & ~F_MRG_RXBUF};
    struct rig *r = rig_new("");
    uint32_t n;
    start(r, features[_i], false);
    for (unsigned i = 0; i < ENTRIES; i++)
        room_add(r, 0, ROOM + 0x1000 * i, 200);
    set(r, 0x50, 0);
    host_send(r, 0, &plain, _i ? 201 : ENTRIES * 200 + 1, 1);
    host_send(r, 0, &plain, 100, 2);
    received_expect(r, ROOM, 100, 2, 1);
    ck_assert(!used(r, 0, &n));
    ck_assert_uint_eq(counter(r, "received", "dropped"), 1);
    rig_free(r);
}
END_TEST

START_TEST(drops_what_the_driver_does_not_take)
{
    struct rig *r = rig_new("");
    start(r, ALL & ~(F_GUEST_CSUM | F_GUEST_TSO4), false);
    for (unsigned i = 0; i < 4; i++)
        room_add(r, 0, ROOM + 0x1000 * i, 2000);
    set(r, 0x50, 0);
    const struct net_header bad[] = {
        {.gso_type = 1, .gso_size = 1000}, {.gso_type = 5}, {.flags = 1}};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        host_send(r, 0, &bad[i], 100, 1);
    ck_assert_int_eq(send(r->peer[0], "x", 1, 0), 1);
    host_send(r, 0, &plain, 13, 1); // less than an Ethernet header
    const struct net_header valid = {.flags = 2};
    host_send(r, 0, &valid, 100, 7);
    received_expect(r, ROOM, 100, 7, 1);
    ck_assert_uint_eq(*at(r, ROOM), 0); // the driver does not know "data valid"
    ck_assert_uint_eq(counter(r, "received", "dropped"), 5);
    rig_free(r);
}
END_TEST

START_TEST(buffers_without_room_break_the_queue)
{
    for (unsigned row = 0; row < 2; row++) {
        struct rig *r = rig_new("");
        start(r, ALL, false);
        const struct buffer b[] = {{ROOM, row ? HEADER : 100, row}};
        ck_assert_int_ge(driver_add(&r->d[0], b, 1, 0), 0);
        set(r, 0x50, 0);
        turns(r);
        ck_assert_uint_eq(get(r, 0x70) & VIRTIO_NEEDS_RESET, VIRTIO_NEEDS_RESET);
        ck_assert_uint_eq(log_lines(r), 1);
        set(r, 0x70, 0);
        start(r, ALL, false);
        guest_send(r, 1, &plain, 60, 3);
        sent_expect(r, &plain, 60, 3);
        rig_free(r);
    }
}
END_TEST

// --- headers of a hostile driver

START_TEST(bad_headers_are_dropped)
{
    enum { LEN = 200 };
    static const struct net_header bad[] = {
        {.flags = 4},
        {.flags = 0x80},
        {.gso_type = 2, .flags = 1, .gso_size = 100},
        {.gso_type = 3, .flags = 1, .gso_size = 100},
        {.gso_type = 0x80},
        {.gso_type = 0x7f, .flags = 1, .gso_size = 100},
        {.gso_type = 1, .gso_size = 100}, // without a checksum
        {.gso_type = 1, .flags = 1},      // segments of no size
        {.gso_type = 1, .flags = 1, .gso_size = 100, .hdr_len = LEN + 1},
        {.gso_type = 1, .flags = 1, .gso_size = 100, .hdr_len = 0xffff},
        {.flags = 1, .csum_start = LEN - 1},
        {.flags = 1, .csum_start = LEN, .csum_offset = 0},
        {.flags = 1, .csum_start = LEN - 10, .csum_offset = 9},
        {.flags = 1, .csum_start = 0xffff, .csum_offset = 0xffff},
        {.flags = 1, .csum_start = 0, .csum_offset = LEN - 1},
    };
    struct rig *r = rig_new("");
    uint32_t n;
    start(r, ALL, false);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        guest_send(r, 1, &bad[i], LEN, 1);
        turns(r);
        ck_assert_msg(used(r, 1, &n), "row %u", i);
        ck_assert_msg(counter(r, "sent", "dropped") == i + 1, "row %u", i);
        nothing_sent(r);
    }
    ck_assert_uint_eq(log_lines(r), 1);
    const struct net_header good[] = {
        {.flags = 1, .csum_start = LEN - 10, .csum_offset = 8},
        {.flags = 1,
         .csum_start = 34,
         .csum_offset = 16,
         .gso_type = 1,
         .gso_size = 1448,
         .hdr_len = 54},
        {.flags = 1,
         .csum_start = 34,
         .csum_offset = 16,
         .gso_type = 0x81,
         .gso_size = 9,
         .hdr_len = LEN},
        {.flags = 1,
         .csum_start = 54,
         .csum_offset = 16,
         .gso_type = 4,
         .gso_size = 1,
         .hdr_len = 74},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(good); i++) {
        guest_send(r, 1, &good[i], LEN, (uint8_t)i);
        sent_expect(r, &good[i], LEN, (uint8_t)i);
    }
    // What says nothing does not reach the kernel.
    const struct net_header loose = {.flags = 2,
                                     .hdr_len = 9999,
                                     .gso_size = 9,
                                     .csum_start = 9999,
                                     .csum_offset = 9,
                                     .num_buffers = 7};
    guest_send(r, 1, &loose, LEN, 5);
    sent_expect(r, &plain, LEN, 5);
    rig_free(r);
}
END_TEST

START_TEST(offloads_need_their_features)
{
    const struct net_header rows[] = {
        {.flags = 1, .csum_start = 34, .csum_offset = 16},
        {.flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 1, .gso_size = 100},
        {.flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 0x81, .gso_size = 100}};
    const uint64_t lacks[] = {F_CSUM, F_HOST_TSO4, F_HOST_ECN};
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_new("");
        start(r, ALL & ~lacks[i], false);
        guest_send(r, 1, &rows[i], 100, 1);
        nothing_sent(r);
        set(r, 0x70, 0);
        start(r, ALL, false);
        guest_send(r, 1, &rows[i], 100, 1);
        sent_expect(r, &rows[i], 100, 1);
        rig_free(r);
    }
    struct rig *r = rig_new(",offload=off");
    start(r, ALL, false);
    guest_send(r, 1, &rows[0], 100, 1);
    nothing_sent(r);
    guest_send(r, 1, &plain, 100, 2);
    sent_expect(r, &plain, 100, 2);
    rig_free(r);
}
END_TEST

START_TEST(frames_have_bounds)
{
    struct rig *r = rig_new("");
    uint32_t n;
    start(r, ALL, false);
    guest_send(r, 1, &plain, 0, 1);
    guest_send(r, 1, &plain, 13, 1);
    const struct buffer header_part[] = {{DATA, HEADER - 1, false}};
    ck_assert_int_ge(driver_add(&r->d[1], header_part, 1, 0), 0);
    memset(at(r, DATA + 0x100000), 0, 0x20000);
    const struct buffer huge[] = {{DATA + 0x100000, HEADER + NET_FRAME_MAX + 1, false}};
    ck_assert_int_ge(driver_add(&r->d[1], huge, 1, 0), 0);
    set(r, 0x50, 1);
    nothing_sent(r);
    for (unsigned i = 0; i < 4; i++)
        ck_assert(used(r, 1, &n));
    ck_assert_uint_eq(counter(r, "sent", "dropped"), 4);
    const struct buffer most[] = {{DATA + 0x100000, HEADER + NET_FRAME_MAX, false}};
    ck_assert_int_ge(driver_add(&r->d[1], most, 1, 0), 0);
    set(r, 0x50, 1);
    static uint8_t data[80000];
    ck_assert_int_eq(peer_read(r, 0, data, sizeof(data)), HEADER + NET_FRAME_MAX);
    guest_send(r, 1, &plain, 14, 1);
    sent_expect(r, &plain, 14, 1);
    rig_free(r);
}
END_TEST

// --- the control queue

static uint8_t command(struct rig *r, unsigned queue, const void *data, uint32_t len)
{
    uint32_t n;
    memcpy(at(r, DATA), data, len);
    *at(r, DATA + 0x200) = 0xee;
    const struct buffer b[] = {{DATA, len, false}, {DATA + 0x200, 1, true}};
    ck_assert_int_ge(driver_add(&r->d[queue], b, 2, 0), 0);
    set(r, 0x50, queue);
    turns(r);
    ck_assert(used(r, queue, &n));
    return *at(r, DATA + 0x200);
}

START_TEST(commands)
{
    static const struct {
        uint8_t data[12];
        uint32_t len;
        uint8_t answer;
    } rows[] = {
        {{0, 0, 1}, 3, 0}, // promiscuous
        {{0, 5, 0}, 3, 0}, // no broadcasts
        {{0, 6, 0}, 3, 1},
        {{0, 0}, 2, 1},
        {{0}, 1, 1},
        {{1, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 10, 0}, // empty tables of addresses
        {{1, 1, 2, 9, 9, 9, 9, 9}, 8, 0},        // address
        {{1, 1, 3, 9, 9, 9, 9, 9}, 8, 1},        // of a group
        {{1, 1, 2, 9, 9, 9, 9}, 7, 1},
        {{1, 2, 2, 9, 9, 9, 9, 9}, 8, 1},
        {{2, 0, 1, 0}, 4, 1}, // VLAN filters: not offered
        {{3, 0}, 2, 0},
        {{3, 1}, 2, 1},
        {{4, 0, 2, 0}, 4, 0}, // pairs
        {{4, 0, 1, 0}, 4, 0},
        {{4, 0, 0, 0}, 4, 1},
        {{4, 0, 3, 0}, 4, 1},
        {{4, 0, 0xff, 0xff}, 4, 1},
        {{4, 1, 1, 0}, 4, 1},
        {{4, 0, 1}, 3, 1},
        {{5, 0, 2}, 10, 0}, // offloads: checksum only
        {{5, 0, 4}, 10, 1},
        {{5, 0, 2}, 9, 1},
        {{9, 0, 1}, 3, 1},
    };
    struct rig *r = rig_new(",queues=2");
    start(r, ALL, false);
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        uint8_t answer = command(r, 4, rows[i].data, rows[i].len);
        ck_assert_msg(answer == rows[i].answer, "row %u: %u", i, answer);
    }
    uint64_t mac;
    ck_assert(bus_read(&r->vm.mmio, BASE + 0x102, 4, &mac));
    ck_assert_uint_eq(mac, 0x09090909);
    const struct buffer b[] = {{DATA, 2, false}};
    ck_assert_int_ge(driver_add(&r->d[4], b, 1, 0), 0);
    set(r, 0x50, 4);
    turns(r);
    ck_assert_uint_eq(get(r, 0x70) & VIRTIO_NEEDS_RESET, VIRTIO_NEEDS_RESET);
    rig_free(r);
}
END_TEST

// Without F_MQ the control queue is the third (5.1.2).
START_TEST(control_queue_follows_the_pairs)
{
    struct rig *r = rig_new(",queues=2");
    start(r, ALL & ~F_MQ, false);
    room_add(r, 4, ROOM, 100); // the queues behind it are nothing: left alone, without end
    room_add(r, 3, ROOM, 100);
    set(r, 0x50, 4);
    set(r, 0x50, 3);
    turns(r);
    const struct virtio *v = container_of(r->dev, struct virtio, dev);
    for (unsigned q = 3; q < 5; q++) {
        struct pollfd rings = {.fd = v->bells[q]->fd, .events = POLLIN};
        ck_assert_int_eq(poll(&rings, 1, 0), 0);
    }
    const uint8_t promiscuous[] = {0, 0, 1}, pairs[] = {4, 0, 2, 0};
    ck_assert_uint_eq(command(r, 2, promiscuous, 3), 0);
    ck_assert_uint_eq(command(r, 2, pairs, 4), 1);
    rig_free(r);
}
END_TEST

START_TEST(pairs_of_queues)
{
    struct rig *r = rig_new(",queues=2");
    uint8_t data[200];
    uint32_t n;
    start(r, ALL, false);
    room_add(r, 2, ROOM, 2000);
    set(r, 0x50, 2);
    host_send(r, 1, &plain, 60, 1);
    turns(r);
    ck_assert(!used(r, 2, &n)); // not asked for yet
    const uint8_t pairs[] = {4, 0, 2, 0};
    ck_assert_uint_eq(command(r, 4, pairs, 4), 0);
    turns(r);
    ck_assert(used(r, 2, &n));
    ck_assert_uint_eq(n, HEADER + 60);
    guest_send(r, 3, &plain, 90, 1);
    ck_assert_int_eq(peer_read(r, 1, data, sizeof(data)), HEADER + 90);
    rig_free(r);
}
END_TEST

// --- the host's side goes, or is switched off

START_TEST(host_side_goes)
{
    struct rig *r = rig_new("");
    struct error err;
    uint32_t n;
    start(r, ALL, false);
    if (_i) // also while frames are expected
        room_add(r, 0, ROOM, 2000);
    set(r, 0x50, 0);
    turns(r);
    ck_assert_uint_eq(link_status(r), 1);
    close(r->peer[0]);
    r->peer[0] = -1;
    if (!_i)
        guest_send(r, 1, &plain, 60, 1);
    turns(r);
    ck_assert_uint_eq(link_status(r), 0);
    ck_assert_uint_eq(get(r, 0x60) & 2, 2);
    for (unsigned i = 0; i < 3; i++) {
        guest_send(r, 1, &plain, 60, 1);
        turns(r);
        ck_assert(used(r, 1, &n)); // dropped, but the driver gets its buffer back
    }
    ck_assert_uint_eq(log_lines(r), 1);
    ck_assert_int_eq(virtio_net_class.set(r->dev, "link", "up", &err), -ENODEV);
    rig_free(r);
}
END_TEST

START_TEST(link_is_set)
{
    struct rig *r = rig_new("");
    struct error err;
    uint32_t n;
    start(r, ALL, false);
    room_add(r, 0, ROOM, 2000);
    room_add(r, 0, ROOM, 2000);
    set(r, 0x50, 0);
    turns(r);
    ck_assert_int_eq(virtio_net_class.set(r->dev, "link", "sideways", &err), -EINVAL);
    ck_assert_int_eq(virtio_net_class.set(r->dev, "link", "down", &err), 0);
    ck_assert_uint_eq(link_status(r), 0);
    guest_send(r, 1, &plain, 60, 1);
    nothing_sent(r);
    host_send(r, 0, &plain, 70, 1);
    turns(r);
    ck_assert(!used(r, 0, &n));
    ck_assert_int_eq(virtio_net_class.set(r->dev, "link", "up", &err), 0);
    ck_assert_uint_eq(link_status(r), 1);
    received_expect(r, ROOM, 70, 1, 1);
    guest_send(r, 1, &plain, 61, 1);
    sent_expect(r, &plain, 61, 1);
    rig_free(r);
}
END_TEST

START_TEST(limits)
{
    struct rig *r = rig_new("");
    struct error err;
    uint32_t n;
    start(r, ALL, false);
    ck_assert_int_eq(virtio_net_class.set(r->dev, "colour", "red", &err), -ENOENT);
    ck_assert_int_eq(virtio_net_class.set(r->dev, "tx-iops", "many", &err), -EINVAL);
    // One byte a second: a frame passes when the bucket is full, the next after an hour.
    ck_assert_int_eq(virtio_net_class.set(r->dev, "bps", "1", &err), 0);
    for (unsigned i = 0; i < 2; i++) {
        guest_send(r, 1, &plain, 3600, (uint8_t)i);
        host_send(r, 0, &plain, 3600, (uint8_t)i);
        room_add(r, 0, ROOM + 0x10000 * i, 4000);
    }
    set(r, 0x50, 0);
    sent_expect(r, &plain, 3600, 0);
    received_expect(r, ROOM, 3600, 0, 1);
    nothing_sent(r);
    ck_assert(!used(r, 0, &n));
    ck_assert_int_eq(virtio_net_class.set(r->dev, "tx-bps", "0", &err), 0);
    sent_expect(r, &plain, 3600, 1);
    ck_assert(!used(r, 0, &n));
    ck_assert_int_eq(virtio_net_class.set(r->dev, "rx-bps", "0", &err), 0);
    received_expect(r, ROOM + 0x10000, 3600, 1, 1);
    // The timer gives the rest: 100 a second, of which the bucket holds as many.
    ck_assert_int_eq(virtio_net_class.set(r->dev, "tx-iops", "100", &err), 0);
    uint8_t data[200];
    for (unsigned sent = 0, seen = 0; seen < 120;) {
        while (sent < 120 && sent < seen + 15) {
            guest_send(r, 1, &plain, 60, 1);
            sent++;
        }
        turn_wait(r);
        while (recv(r->peer[0], data, sizeof(data), MSG_DONTWAIT) > 0)
            seen++;
        while (used(r, 1, &n))
            ;
    }
    rig_free(r);
}
END_TEST

// --- state

static void save_load(struct rig *from, struct rig *to)
{
    struct stream_mem mem, in;
    struct error err = {0};
    stream_mem_writer(&mem, "state", STATE_BLOB_MAX);
    ck_assert_msg(!state_save(&from->vm.state, &mem.stream, &err), "%s", err.text);
    stream_mem_reader(&in, "state", mem.data, mem.len);
    ck_assert_msg(!state_load(&to->vm.state, &in.stream, &err), "%s", err.text);
    stream_mem_free(&mem);
}

static void move_to(struct rig *a, struct rig *b)
{
    struct error err;
    ck_assert_int_eq(virtio_net_class.quiesce(a->dev, &err), 0);
    memcpy(at(b, 0), at(a, 0), 16 * MiB);
    for (unsigned i = 0; i < DRIVERS; i++) {
        b->d[i] = a->d[i];
        b->d[i].ram = &b->vm.ram;
    }
    save_load(a, b);
}

// Frames that the source could not send come out of the destination, each once; buffers that were
// taken are used there; the source, resumed after all, goes on as if nothing had been.
START_TEST(moves_with_frames)
{
    struct rig *a = rig_new(",packed"), *b = rig_bare();
    uint8_t data[4000];
    unsigned source = 0, all = 0;
    uint32_t n;
    rig_add(b, ",packed", true);
    start(a, ALL, _i);
    for (unsigned i = 0; i < 3; i++)
        room_add(a, 0, ROOM + 0x1000 * i, 2000);
    set(a, 0x50, 0);
    turns(a);
    int small = 4096, waiting;
    setsockopt(a->host[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
    for (unsigned i = 0; i < 15; i++) {
        guest_send(a, 1, &plain, 900, (uint8_t)i);
        turns(a);
    }
    for (waiting = 15; used(a, 1, &n); waiting--)
        ;
    ck_assert_int_gt(waiting, 0); // the socket is full
    struct error err;
    ck_assert_int_eq(virtio_net_class.quiesce(a->dev, &err), 0);
    guest_send(a, 1, &plain, 900, 15); // a doorbell nobody serves here any more
    move_to(a, b);
    while (recv(a->peer[0], data, sizeof(data), MSG_DONTWAIT) > 0)
        ck_assert(patterned(data + HEADER, 900, (uint8_t)source++));
    virtio_net_class.resume(b->dev);
    for (all = source; all < 16;) {
        turn_wait(b);
        while ((n = (uint32_t)recv(b->peer[0], data, sizeof(data), MSG_DONTWAIT)) != UINT32_MAX)
            if (n == HEADER + 900) // the others are announcements
                ck_assert(patterned(data + HEADER, 900, (uint8_t)all++));
    }
    unsigned given = 0;
    while (used(b, 1, &n))
        given++;
    ck_assert_uint_eq(given, (unsigned)waiting + 1);
    for (unsigned i = 0; i < 3; i++) {
        host_send(b, 0, &plain, 700 + i, (uint8_t)i);
        received_expect(b, ROOM + 0x1000 * i, 700 + i, (uint8_t)i, 1);
    }
    virtio_net_class.resume(a->dev);
    for (; source < 16;) {
        turn_wait(a);
        while (recv(a->peer[0], data, sizeof(data), MSG_DONTWAIT) > 0)
            ck_assert(patterned(data + HEADER, 900, (uint8_t)source++));
    }
    host_send(a, 0, &plain, 700, 1);
    received_expect(a, ROOM, 700, 1, 1);
    rig_free(b);
    rig_free(a);
}
END_TEST

// A device that had begun forgets what it had taken when state is loaded into it.
START_TEST(loads_its_own_state)
{
    struct rig *r = rig_new("");
    struct error err;
    uint32_t n;
    start(r, ALL, false);
    for (unsigned i = 0; i < 3; i++)
        room_add(r, 0, ROOM + 0x1000 * i, 2000);
    set(r, 0x50, 0);
    turns(r);
    ck_assert_int_eq(virtio_net_class.quiesce(r->dev, &err), 0);
    save_load(r, r);
    virtio_net_class.resume(r->dev);
    for (unsigned i = 0; i < 4; i++)
        host_send(r, 0, &plain, 700 + i, (uint8_t)i);
    for (unsigned i = 0; i < 3; i++)
        received_expect(r, ROOM + 0x1000 * i, 700 + i, (uint8_t)i, 1);
    turns(r);
    ck_assert(!used(r, 0, &n));
    rig_free(r);
}
END_TEST

// The RARP frames that the host's side gets until there are `frames` of them.
static void announced(struct rig *r, unsigned frames)
{
    static const uint8_t expected[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0x11, 0x22, 0x33,
                                       0x44, 0x55, 0x80, 0x35, 0,    1,    8,    0,    6,    4,
                                       0,    3,    0x02, 0x11, 0x22, 0x33, 0x44, 0x55};
    uint8_t data[200];
    for (unsigned seen = 0; seen < frames;) {
        ssize_t n = recv(r->peer[0], data, sizeof(data), MSG_DONTWAIT);
        if (n < 0) {
            turn_wait(r);
            continue;
        }
        ck_assert_int_eq(n, HEADER + 60);
        ck_assert(!memcmp(data, &plain, HEADER));
        ck_assert(!memcmp(data + HEADER, expected, sizeof(expected)));
        seen++;
    }
}

// Each time it has answered, the driver is asked again with the next frame; the sixth is the last.
START_TEST(announces_itself)
{
    static const uint8_t acknowledge[] = {3, 0};
    struct rig *a = rig_new(""), *b = rig_bare();
    rig_add(b, "", true);
    start(a, ALL, false);
    turns(a);
    move_to(a, b);
    b->vm.moved = true;
    virtio_net_class.resume(b->dev);
    for (unsigned i = 0; i < 6; i++) {
        announced(b, 1);
        ck_assert_uint_eq(link_status(b), 3);
        ck_assert_uint_eq(command(b, 2, acknowledge, 2), 0);
        ck_assert_uint_eq(link_status(b), 1);
    }
    const struct virtio *v = container_of(b->dev, struct virtio, dev);
    struct error err;
    nothing_sent(b);
    ck_assert_int_eq(virtio_net_class.quiesce(b->dev, &err), 0);
    virtio_net_class.resume(b->dev); // a pause is no arrival
    turns(b);
    nothing_sent(b);
    ck_assert_uint_eq(link_status(b), 1);
    ck_assert(v->active);
    rig_free(b);
    rig_free(a);
}
END_TEST

// What a driver asks for while it announces, or without having been asked.
START_TEST(announce_commands)
{
    static const struct {
        uint8_t text[3];
        size_t len;
        uint8_t answer;
    } rows[] = {{{3, 0}, 2, 0}, {{3, 1}, 2, 1}, {{3, 255}, 2, 1}, {{3, 0, 9}, 3, 0}, {{3}, 1, 1}};
    struct rig *r = rig_new("");
    start(r, ALL & ~F_ANNOUNCE, false);
    ck_assert_uint_eq(command(r, 2, rows[0].text, 2), 1);
    set(r, 0x70, 0);
    start(r, ALL, false);
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++)
        ck_assert_uint_eq(command(r, 2, rows[i].text, rows[i].len), rows[i].answer);
    ck_assert_uint_eq(link_status(r), 1);
    rig_free(r);
}
END_TEST

// A restored snapshot, perhaps one of many, claims no address unless it is told to; a driver that
// cannot be asked is not, and one that is being asked when the state is saved still is afterwards.
START_TEST(announces_on_request)
{
    static const uint8_t acknowledge[] = {3, 0};
    struct rig *a = rig_new(""), *b = rig_bare();
    struct error err;
    rig_add(b, "", true);
    start(a, ALL & ~F_ANNOUNCE, false);
    turns(a);
    ck_assert_int_eq(virtio_net_class.set(a->dev, "announce", "later", &err), -EINVAL);
    ck_assert_int_eq(virtio_net_class.set(a->dev, "announce", "now", &err), 0);
    announced(a, 2);
    ck_assert_uint_eq(link_status(a), 1);
    set(a, 0x70, 0);
    start(a, ALL, false);
    announced(a, 1);
    ck_assert_uint_eq(link_status(a), 3);
    move_to(a, b);
    virtio_net_class.resume(b->dev);
    turns(b);
    nothing_sent(b);
    ck_assert_uint_eq(link_status(b), 3);
    ck_assert_uint_eq(command(b, 2, acknowledge, 2), 0);
    ck_assert_uint_eq(link_status(b), 1);
    ck_assert_int_eq(virtio_net_class.set(b->dev, "link", "down", &err), 0);
    ck_assert_int_eq(virtio_net_class.set(b->dev, "announce", "now", &err), -ENOTCONN);
    ck_assert_int_eq(virtio_net_class.set(b->dev, "link", "up", &err), 0);
    ck_assert_int_eq(virtio_net_class.set(b->dev, "announce", "now", &err), 0);
    announced(b, 1);
    ck_assert_uint_eq(link_status(b), 3);
    rig_free(b);
    rig_free(a);
}
END_TEST

// The driver reads it when it begins anew; what it announces itself would be the old one's.
START_TEST(new_address)
{
    static const uint8_t new[] = {0x06, 1, 2, 3, 4, 5};
    struct rig *a = rig_new(""), *b = rig_bare();
    uint8_t data[200];
    memcpy(b->new_mac, new, sizeof(new));
    rig_add(b, "", true);
    start(a, ALL, false);
    turns(a);
    uint32_t generation = get(a, 0xfc);
    move_to(a, b);
    ck_assert_uint_eq(get(b, 0x60) & 2, 0);
    virtio_net_class.resume(b->dev);
    ck_assert_uint_eq(get(b, 0x60) & 2, 2); // 4.2.2: the configuration has changed
    ck_assert_uint_ne(get(b, 0xfc), generation);
    ck_assert_uint_eq(get(b, 0x100), 0x03020106);
    ck_assert_uint_eq(get(b, 0x104) & 0xffff, 0x0504);
    for (unsigned frames = 0; frames < 5;) {
        turn_wait(b);
        for (ssize_t n; (n = recv(b->peer[0], data, sizeof(data), MSG_DONTWAIT)) > 0; frames++)
            ck_assert(!memcmp(data + HEADER + 6, new, 6) && !memcmp(data + HEADER + 22, new, 6));
    }
    ck_assert_uint_eq(link_status(b), 1);
    // Later states (the VM goes back to a checkpoint of its own) bring theirs.
    struct error err;
    ck_assert_int_eq(virtio_net_class.quiesce(b->dev, &err), 0);
    const uint8_t change[] = {1, 1, 0x0a, 1, 1, 1, 1, 1};
    virtio_net_class.resume(b->dev);
    ck_assert_uint_eq(command(b, 2, change, sizeof(change)), 0);
    ck_assert_int_eq(virtio_net_class.quiesce(b->dev, &err), 0);
    save_load(b, b);
    ck_assert_uint_eq(get(b, 0x100), 0x0101010a);
    rig_free(b);
    rig_free(a);
}
END_TEST

START_TEST(hostile_state)
{
    struct rig *r = rig_new(",queues=2");
    const struct state_table *table = virtio_net_class.state;
    static const struct {
        const char *field;
        uint64_t value;
    } rows[] = {{"v.offered", 0},          {"v.status", 4},           {"saved.mac", 0},
                {"saved.mac", 1},          {"saved.mtu", 0},          {"saved.mtu", 67},
                {"saved.active_pairs", 0}, {"saved.active_pairs", 3}, {"saved.announcing", 2},
                {"saved.started", 0x80},   {"saved.guest_takes", 1},  {"saved.guest_takes", ~0ull},
                {"v.accepted", 1}};
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct error err = {0};
        start(r, ALL, false);
        room_add(r, 0, ROOM, 2000); // it is taken at once
        set(r, 0x50, 0);
        turns(r);
        ck_assert_int_eq(table->save(r->dev, &err), 0);
        bool found = false;
        for (unsigned f = 0; f < table->nr_fields; f++)
            if (!strcmp(table->fields[f].name, rows[i].field)) {
                found = true;
                memcpy((uint8_t *)r->dev + table->fields[f].offset, &rows[i].value,
                       table->fields[f].size);
            }
        ck_assert(found);
        ck_assert_msg(table->load(r->dev, 1, &err) < 0, "row %u loads", i);
        ck_assert_uint_gt(strlen(err.text), 5);
        const struct virtio *v = container_of(r->dev, struct virtio, dev);
        ck_assert(!v->queues[0].first && !v->queues[0].enabled); // nothing in flight is left
        set(r, 0x70, 0);
    }
    start(r, ALL, false);
    guest_send(r, 1, &plain, 60, 1);
    sent_expect(r, &plain, 60, 1);
    rig_free(r);
}
END_TEST

// --- user networking, with this program as passt

enum { PASST_FD = 3 };

static void pieces_write(const uint8_t *data, size_t len, unsigned seed)
{
    while (len) {
        size_t take = 1 + seed++ * 37 % 5000;
        take = take < len ? take : len;
        if (write(PASST_FD, data, take) != (ssize_t)take)
            _exit(1);
        data += take;
        len -= take;
    }
}

// Answers the question for the gateway, sends each other frame back in pieces. A frame that begins
// with 0xfe ends it, one with 0xfd breaks the format.
static int passt_run(void)
{
    static uint8_t data[4 + NET_FRAME_MAX];
    uint32_t length;
    for (unsigned seed = 0;; seed++) {
        if (read_all(PASST_FD, data, 4))
            return 0;
        memcpy(&length, data, 4);
        length = ntohl(length);
        if (length > NET_FRAME_MAX || read_all(PASST_FD, data + 4, length))
            return 1;
        if (data[4] == 0xfe) {
            fprintf(stderr, "no more networks today\n");
            return 1;
        }
        memset(data, data[4] == 0xfd ? 0xff : data[0], 1);
        pieces_write(data, 4 + length, seed);
    }
}

static struct rig *rig_user(const char *options, const char *program, int expected)
{
    struct rig *r = rig_bare();
    struct virtio_net_config config;
    struct error err = {0};
    char text[200];
    snprintf(text, sizeof(text), "user%s", options);
    ck_assert_msg(!virtio_net_parse(text, &config, &err), "%s", err.text);
    config.user.program = program;
    ck_assert_msg(rig_device(r, &config, &err) == expected, "%s", err.text);
    if (!expected) {
        virtio_net_class.resume(r->dev);
    } else {
        const char *says = expected == -ENOENT ? "install the package passt" : "ended at its start";
        ck_assert_msg(strstr(err.text, says) || expected == -EBUSY, "%s", err.text);
    }
    return r;
}

START_TEST(user_frames)
{
    static const uint32_t lengths[] = {60, 1514, 14, 65000, 9000, 65534, 300};
    struct rig *r = rig_user("", "/proc/self/exe", 0);
    start(r, ALL, false);
    uint64_t mtu;
    ck_assert(bus_read(&r->vm.mmio, BASE + 0x10a, 2, &mtu));
    ck_assert_uint_eq(mtu, NET_USER_MTU);
    for (unsigned i = 0; i < 4 * ARRAY_SIZE(lengths); i++) {
        uint32_t len = lengths[i % ARRAY_SIZE(lengths)], n;
        uint64_t gpa = DATA;
        memset(at(r, gpa), 0, HEADER);
        pattern(at(r, gpa + HEADER), len, (uint8_t)i);
        room_add(r, 0, ROOM, HEADER + 66000);
        const struct buffer b[] = {{gpa, HEADER + len, false}};
        ck_assert_int_ge(driver_add(&r->d[1], b, 1, 0), 0);
        set(r, 0x50, 0);
        set(r, 0x50, 1);
        while (!used(r, 0, &n))
            turn_wait(r);
        ck_assert_uint_eq(n, HEADER + len);
        ck_assert(patterned(at(r, ROOM + HEADER), len, (uint8_t)i));
        while (!used(r, 1, &n))
            turn_wait(r);
    }
    // What asks for offloads cannot be: the device did not offer them.
    const struct net_header h = {.flags = 1, .csum_start = 34, .csum_offset = 16};
    guest_send(r, 1, &h, 100, 1);
    turns(r);
    ck_assert_uint_eq(counter(r, "sent", "dropped"), 1);
    rig_free(r);
}
END_TEST

// Many frames while nothing is taken from the socket: it fills, and none is lost or cut.
START_TEST(user_is_slow)
{
    enum { FRAMES = 60 };
    struct rig *r = rig_user("", "/proc/self/exe", 0);
    uint32_t n;
    start(r, ALL, false);
    for (unsigned i = 0; i < FRAMES; i++) {
        memset(at(r, DATA), 0, HEADER);
        pattern(at(r, DATA + HEADER), 60000, 3);
        const struct buffer b[] = {{DATA, HEADER + 60000, false}};
        ck_assert_int_ge(driver_add(&r->d[1], b, 1, 0), 0);
    }
    set(r, 0x50, 1);
    turns(r);
    for (unsigned i = 0; i < FRAMES; i++) {
        room_add(r, 0, ROOM, HEADER + 66000);
        set(r, 0x50, 0);
        while (!used(r, 0, &n))
            turn_wait(r);
        ck_assert_uint_eq(n, HEADER + 60000);
        ck_assert(patterned(at(r, ROOM + HEADER), 60000, 3));
    }
    for (unsigned i = 0; i < FRAMES; i++)
        ck_assert(used(r, 1, &n));
    rig_free(r);
}
END_TEST

START_TEST(user_ends)
{
    struct rig *r = rig_user("", "/proc/self/exe", 0);
    struct error err;
    char text[500] = "";
    uint32_t n;
    start(r, ALL, false);
    room_add(r, 0, ROOM, 2000);
    set(r, 0x50, 0);
    guest_send(r, 1, &plain, 60, _i ? 0xfe : 0xfd);
    while (link_status(r))
        turn_wait(r);
    ck_assert_int_gt(read(r->log, text, sizeof(text) - 1), 0);
    ck_assert_ptr_nonnull(strstr(text, "the guest's link is down"));
    ck_assert(!_i || strstr(text, "no more networks today"));
    ck_assert_int_eq(virtio_net_class.set(r->dev, "link", "up", &err), 0); // a new one
    ck_assert_uint_eq(link_status(r), 1);
    guest_send(r, 1, &plain, 90, 2);
    while (!used(r, 0, &n))
        turn_wait(r);
    ck_assert_uint_eq(n, HEADER + 90);
    rig_free(r);
}
END_TEST

START_TEST(user_does_not_start)
{
    rig_free(rig_user("", "/nonexistent/passt", -ENOENT));
    rig_free(rig_user("", "/bin/false", -EIO));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t len = sizeof(address);
    int s = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert(!bind(s, (struct sockaddr *)&address, len) && !listen(s, 1) &&
              !getsockname(s, (struct sockaddr *)&address, &len));
    char text[40];
    snprintf(text, sizeof(text), ",forward=tcp:%u:80", ntohs(address.sin_port));
    rig_free(rig_user(text, "/proc/self/exe", -EBUSY));
    close(s);
}
END_TEST

// --- the option

START_TEST(option_text)
{
    static const char *const bad[] = {"",
                                      "tap",
                                      "tap=",
                                      "tap=a/b",
                                      "tap=1234567890123456",
                                      "tap-fd=x",
                                      "tap-fd=1",
                                      "users",
                                      "tap=a,",
                                      "tap=a,mac=1:2:3:4:5:6",
                                      "tap=a,mac=01:00:00:00:00:01",
                                      "tap=a,mac=00:00:00:00:00:00",
                                      "tap=a,mac=02:00:00:00:00:0g",
                                      "tap=a,mtu=67",
                                      "tap=a,mtu=65536",
                                      "tap=a,mtu=-1",
                                      "tap=a,queues=0",
                                      "tap=a,queues=9",
                                      "user,queues=2",
                                      "tap-fd=5,queues=2",
                                      "tap=a,offload=maybe",
                                      "tap=a,forward=tcp:1:2",
                                      "tap=a,host=off",
                                      "user,forward=tcp:1",
                                      "user,forward=tcp:0:1",
                                      "user,forward=tcp:1:65536",
                                      "user,forward=sctp:1:2",
                                      "user,forward=tcp:1.2.3/1:2",
                                      "user,forward=tcp:/1:2",
                                      "user,forward=tcp:1:2:3",
                                      "user,forward=tcp:-1:2",
                                      "tap=a,bps=x",
                                      "tap=a,burst-bytes=5",
                                      "tap=a,rx-burst-ops=5",
                                      "tap=a,fast"};
    struct virtio_net_config c;
    struct error err = {0};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_msg(virtio_net_parse(bad[i], &c, &err) == -EINVAL, "'%s'", bad[i]);
    ck_assert_int_eq(virtio_net_parse("tap=tap0,mac=52:54:00:ab:CD:ef,mtu=9000,queues=8,"
                                      "offload=off,bps=1M,rx-iops=50,packed",
                                      &c, &err),
                     0);
    ck_assert(c.kind == NET_TAP && !strcmp(c.tap, "tap0") && c.mac[5] == 0xef && c.mtu == 9000);
    ck_assert(c.pairs == 8 && c.no_offload && c.attach.packed);
    ck_assert(c.receive.bytes.size == MiB && c.send.bytes.size == MiB);
    ck_assert(c.receive.ops.size == 50 && !c.send.ops.size);
    ck_assert_int_eq(
        virtio_net_parse("user,forward=tcp:8080:80,forward=udp:0.0.0.0/53:5353,host=off", &c, &err),
        0);
    ck_assert(c.kind == NET_USER && c.user.nr_forwards == 2 && c.user.no_host);
    ck_assert(!c.user.forwards[0].udp && c.user.forwards[0].host_port == 8080);
    ck_assert(c.user.forwards[1].udp && !strcmp(c.user.forwards[1].address, "0.0.0.0"));
    ck_assert_int_eq(virtio_net_parse("tap-fd=7", &c, &err), 0);
    ck_assert(c.kind == NET_TAP && !*c.tap && c.fds[0] == 7);
}
END_TEST

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--foreground"))
        return passt_run();
    Suite *suite = suite_create("virtio_net");
    TCase *tc = tcase_create("virtio_net");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, sends_and_receives, 0, 2);
    tcase_add_loop_test(tc, merges_buffers, 0, 2);
    tcase_add_test(tc, writes_are_logged_as_dirty);
    tcase_add_test(tc, waits_for_buffers);
    tcase_add_test(tc, waits_for_the_rest_of_the_buffers);
    tcase_add_loop_test(tc, drops_what_can_never_fit, 0, 2);
    tcase_add_test(tc, drops_what_the_driver_does_not_take);
    tcase_add_test(tc, buffers_without_room_break_the_queue);
    tcase_add_test(tc, bad_headers_are_dropped);
    tcase_add_test(tc, offloads_need_their_features);
    tcase_add_test(tc, frames_have_bounds);
    tcase_add_test(tc, commands);
    tcase_add_test(tc, control_queue_follows_the_pairs);
    tcase_add_test(tc, pairs_of_queues);
    tcase_add_loop_test(tc, host_side_goes, 0, 2);
    tcase_add_test(tc, link_is_set);
    tcase_add_test(tc, limits);
    tcase_add_loop_test(tc, moves_with_frames, 0, 2);
    tcase_add_test(tc, loads_its_own_state);
    tcase_add_test(tc, announces_itself);
    tcase_add_test(tc, announce_commands);
    tcase_add_test(tc, announces_on_request);
    tcase_add_test(tc, new_address);
    tcase_add_test(tc, hostile_state);
    tcase_add_test(tc, user_frames);
    tcase_add_test(tc, user_is_slow);
    tcase_add_loop_test(tc, user_ends, 0, 2);
    tcase_add_test(tc, user_does_not_start);
    tcase_add_test(tc, option_text);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
