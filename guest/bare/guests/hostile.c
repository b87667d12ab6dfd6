// SPDX-License-Identifier: Apache-2.0
// A driver with bad intentions. Parameters: case (hostile_cases.h), device and queue to attack (the
// case's own, else a disk's), packed, events. Another device, the witness, must go on working, and
// the attacked one again after a reset. Values: AREA_BASE and AREA_BYTES of all memory that devices
// may write to; everything else from HOSTILE_ARENA on must keep its bytes. GUEST_SYNC after the
// attack.
#include "../hostile_cases.h"
#include "../virtio.h"

#define FEATURES (VF_VERSION_1 | VF_INDIRECT)
enum { RING = 16, SECTOR = 512, BUFFER = 4096, GAP = 4096, KICKS = 300 };
enum { T_IN = 0, T_OUT = 1, T_GET_ID = 8, T_DISCARD = 11, T_ZEROES = 13, S_OK = 0, S_IOERR = 1 };

struct blk_header {
    uint32_t type, reserved;
    uint64_t sector;
};

struct kit { // a device and what its requests use
    struct vdev *dev;
    struct vring ring;
    unsigned queue;
    uint64_t features; // wanted
    uint64_t rings, table, header, data, status, page;
};

static struct vdev devices[VIRTIO_DEVICES_MAX];
static unsigned nr_devices;
static uint64_t arena = HOSTILE_ARENA, ram_end;
static unsigned nr_areas;

// --- memory with canaries around it

static uint64_t area_tell(uint64_t at, uint64_t bytes)
{
    guest_value(UCALL_V_AREA_BASE, at, nr_areas);
    guest_value(UCALL_V_AREA_BYTES, bytes, nr_areas++);
    return at;
}

// `odd` bytes behind the beginning of a page.
static uint64_t area(uint64_t bytes, unsigned odd)
{
    uint64_t at = arena + GAP + odd;
    arena = (at + bytes + GAP + GAP - 1) & -(uint64_t)GAP;
    return area_tell(at, bytes);
}

// --- a good driver

static bool kit_queue(struct kit *k)
{
    return vring_setup(&k->ring, k->dev, k->queue, RING, k->rings);
}

static void kit_up(struct kit *k)
{
    GUEST_ASSERT(virtio_begin(k->dev, k->features));
    GUEST_ASSERT(kit_queue(k));
    virtio_go(k->dev);
}

static void kit_init(struct kit *k, uint32_t id, unsigned queue)
{
    *k = (struct kit) {.dev = virtio_get(devices, nr_devices, id, 0), .queue = queue};
    k->features = FEATURES | (guest_param(UCALL_P_PACKED, 0) ? VF_PACKED : 0) |
                  (guest_param(UCALL_P_EVENTS, 0) ? VF_EVENT_IDX : 0);
    k->rings = area(VRING_BYTES(RING), 0);
    k->table = area(BUFFER + 512, 0);
    k->header = area(sizeof(struct blk_header) + 16, 16);
    k->data = area(BUFFER, 8);
    k->status = area(1, 3);
    k->page = area(PAGE_SIZE, 0); // a balloon takes it away
}

static uint64_t used_now(const struct kit *k)
{
    return k->ring.packed ? *(volatile uint16_t *)(k->ring.desc + 14)
                          : *(volatile uint16_t *)(k->ring.device + 2);
}

static void header_set(struct kit *k, uint32_t type, uint64_t sector)
{
    *(volatile struct blk_header *)k->header = (struct blk_header) {type, 0, sector};
}

// One disk request; its status byte.
static uint8_t blk_do(struct kit *k, uint32_t type, uint64_t sector, uint32_t len)
{
    bool in = type == T_IN || type == T_GET_ID;
    const struct vbuf bufs[] = {
        {k->header, sizeof(struct blk_header), false}, {k->data, len, in}, {k->status, 1, true}};
    uint32_t id, written;
    header_set(k, type, sector);
    *(volatile uint8_t *)k->status = 0xee;
    GUEST_ASSERT(vring_add(&k->ring, bufs, 3, 0) >= 0);
    vring_kick(&k->ring);
    GUEST_ASSERT(vring_wait(&k->ring, &id, &written));
    return *(volatile uint8_t *)k->status;
}

static void blk_works(struct kit *k)
{
    memset((void *)k->data, 0, SECTOR);
    GUEST_ASSERT_EQ(blk_do(k, T_IN, 3, SECTOR), S_OK);
    GUEST_ASSERT_EQ(*(volatile uint8_t *)k->data, HOSTILE_SECTOR(3));
}

static void rng_works(struct kit *k)
{
    const struct vbuf buf = {k->data, 64, true};
    uint32_t id, len;
    GUEST_ASSERT(vring_add(&k->ring, &buf, 1, 0) >= 0);
    vring_kick(&k->ring);
    GUEST_ASSERT(vring_wait(&k->ring, &id, &len));
    GUEST_ASSERT(len && len <= 64);
}

// What the device only reads: it comes back.
static void send(struct kit *k, uint32_t bytes)
{
    const struct vbuf buf = {k->data, bytes, false};
    uint32_t id, len;
    GUEST_ASSERT(vring_add(&k->ring, &buf, 1, 0) >= 0);
    vring_kick(&k->ring);
    GUEST_ASSERT(vring_wait(&k->ring, &id, &len));
}

struct __attribute__((packed)) vsock_header { // 5.10.6
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
};

enum { NET_HEADER = 12, VSOCK_STREAM = 1, VSOCK_RST = 3, VSOCK_RW = 5, VSOCK_HOST = 2 };

// A reset, which nobody answers.
static struct vsock_header vsock_header(const struct kit *k)
{
    return (struct vsock_header) {.src_cid = *(volatile uint32_t *)k->dev->config,
                                  .dst_cid = VSOCK_HOST,
                                  .src_port = 1000,
                                  .dst_port = 2000,
                                  .type = VSOCK_STREAM,
                                  .op = VSOCK_RST};
}

static void kit_works(struct kit *k)
{
    memset((void *)k->data, 0, 128);
    switch (k->dev->id) {
    case VIRTIO_BLK:
        blk_works(k);
        break;
    case VIRTIO_RNG:
        rng_works(k);
        break;
    case VIRTIO_NET:
        send(k, NET_HEADER + 60);
        break;
    case VIRTIO_VSOCK:
        *(struct vsock_header *)k->data = vsock_header(k);
        send(k, sizeof(struct vsock_header));
        break;
    case VIRTIO_BALLOON:
        *(uint32_t *)k->data = (uint32_t)(k->page / PAGE_SIZE);
        send(k, 4);
        break;
    default:
        send(k, 4);
    }
    GUEST_ASSERT_EQ(vreg_read(k->dev, VR_STATUS), 15);
}

// --- bad chains

struct bad {
    uint64_t gpa;
    uint32_t len;
    uint16_t flags, next;
};

static void table_write(struct kit *k, uint64_t table, const struct bad *b, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        vdesc_write(k->ring.packed, table, i, b[i].gpa, b[i].len, b[i].flags, b[i].next);
}

// Offers descriptors from ring position `next` on: as they are, nothing is checked.
static void offer(struct kit *k, const struct bad *b, unsigned n)
{
    struct vring *r = &k->ring;
    if (r->packed) {
        for (unsigned i = n; i--;)
            vdesc_write(true, r->desc, (r->next + i) % r->size, b[i].gpa, b[i].len,
                        b[i].flags | vring_avail_flags(r, i), 0);
    } else {
        table_write(k, r->desc, b, n);
        vring_publish(r, r->next, 0, (uint16_t)(r->next + 1));
    }
    vring_doorbell(r);
}

static bool offer_indirect(struct kit *k, const struct bad *b, unsigned n)
{
    table_write(k, k->table, b, n);
    offer(k, &(struct bad) {k->table, 16 * n, VD_INDIRECT, 0}, 1);
    return true;
}

static bool offer_one(struct kit *k, uint64_t gpa, uint32_t len, uint16_t flags)
{
    offer(k, &(struct bad) {gpa, len, flags, 0}, 1);
    return true;
}

static bool cycle(struct kit *k)
{
    struct bad b[RING];
    for (unsigned i = 0; i < RING; i++)
        b[i] = (struct bad) {k->data, 64, VD_NEXT, (uint16_t)(i ^ 1)};
    offer(k, b, RING);
    return true;
}

static bool indirect_cycle(struct kit *k)
{
    const struct bad b[] = {{k->data, 64, VD_NEXT, 1}, {k->data, 64, VD_NEXT, 0}};
    return offer_indirect(k, b, 2);
}

static bool indirect_long(struct kit *k)
{
    struct bad b = {k->data, 8, VD_WRITE | VD_NEXT, 0};
    for (unsigned i = 0; i < 257; i++) {
        b.next = (uint16_t)(i + 1);
        if (i == 256)
            b.flags = VD_WRITE;
        table_write(k, k->table + 16 * i, &b, 1);
    }
    return offer_one(k, k->table, 257 * 16, VD_INDIRECT);
}

static bool indirect_nested(struct kit *k)
{
    const struct bad b[] = {{k->data, 64, VD_NEXT, 1}, {k->table, 32, VD_INDIRECT, 0}};
    return offer_indirect(k, b, 2);
}

static bool indirect_odd(struct kit *k)
{
    const struct bad b = {k->data, 64, VD_WRITE, 0};
    table_write(k, k->table, &b, 1);
    return offer_one(k, k->table, 24, VD_INDIRECT);
}

static bool indirect_empty(struct kit *k)
{
    return offer_one(k, k->table, 0, VD_INDIRECT);
}

static bool indirect_chained(struct kit *k)
{
    const struct bad inner = {k->data, 64, VD_WRITE, 0};
    const struct bad b[] = {{k->table, 16, VD_INDIRECT | VD_NEXT, 1}, {k->data, 64, VD_WRITE, 0}};
    table_write(k, k->table, &inner, 1);
    offer(k, b, 2);
    return true;
}

static bool indirect_unasked(struct kit *k)
{
    const struct bad b = {k->data, 64, VD_WRITE, 0};
    k->features &= ~VF_INDIRECT;
    kit_up(k);
    k->features |= VF_INDIRECT;
    return offer_indirect(k, &b, 1);
}

static bool indirect_outside(struct kit *k)
{
    const struct bad b = {k->data, 64, VD_WRITE | VD_NEXT, 1};
    table_write(k, area_tell(ram_end - 16, 16), &b, 1);
    return offer_one(k, ram_end - 16, 32, VD_INDIRECT);
}

// What lies behind the table is a good descriptor, for a device that looks there.
static bool indirect_next_range(struct kit *k)
{
    const struct bad b = {k->data, 64, VD_NEXT, 200}, behind = {k->data, 64, VD_WRITE, 0};
    table_write(k, k->table + 16 * 200, &behind, 1);
    return offer_indirect(k, &b, 1);
}

static bool empty_buffer(struct kit *k)
{
    return offer_one(k, k->data, 0, VD_WRITE);
}

// Makes the beginning of the available ring, which lies behind the descriptors, a good descriptor:
// 64 bytes to write at some low address. Its entries 5 and on are free for use.
static void behind_ring(struct kit *k)
{
    struct vring *r = &k->ring;
    while (r->next % RING != 5)
        kit_works(k);
    for (unsigned i = 0; i < 5; i++)
        vring_publish(r, (uint16_t)i, i == 2 ? 64 : i == 4 ? VD_WRITE : 0, r->next);
}

static bool head_range(struct kit *k)
{
    behind_ring(k);
    vring_publish(&k->ring, k->ring.next, RING, (uint16_t)(k->ring.next + 1));
    vring_doorbell(&k->ring);
    return true;
}

static bool next_range(struct kit *k)
{
    const struct bad b = {k->data, 64, VD_NEXT, RING};
    behind_ring(k);
    offer(k, &b, 1);
    return true;
}

static bool buffer_end(struct kit *k)
{
    return offer_one(k, ram_end - 256, 512, VD_WRITE);
}

static bool buffer_wrap(struct kit *k)
{
    return offer_one(k, 0xffffffffffffff00, 512, VD_WRITE);
}

static bool buffer_hole(struct kit *k)
{
    return offer_one(k, k->dev->regs, 64, VD_WRITE);
}

static bool buffer_order(struct kit *k)
{
    const struct bad b[] = {{k->data, 64, VD_WRITE | VD_NEXT, 1}, {k->header, 16, 0, 0}};
    offer(k, b, 2);
    return true;
}

static bool segments(struct kit *k)
{
    struct bad b[8], inner = {k->data, 8, VD_WRITE | VD_NEXT, 0};
    for (unsigned i = 0; i < 256; i++) {
        inner.next = (uint16_t)(i + 1);
        inner.flags = i == 255 ? VD_WRITE : VD_WRITE | VD_NEXT;
        table_write(k, k->table + 16 * i, &inner, 1);
    }
    for (unsigned i = 0; i < 8; i++)
        b[i] = (struct bad) {k->data, 64, VD_WRITE | VD_NEXT, (uint16_t)(i + 1)};
    b[7] = (struct bad) {k->table, 256 * 16, VD_INDIRECT, 0};
    offer(k, b, 8);
    return true;
}

static bool avail_ahead(struct kit *k)
{
    const struct bad b = {k->data, 64, VD_WRITE, 0};
    table_write(k, k->ring.desc, &b, 1);
    vring_publish(&k->ring, k->ring.next, 0, (uint16_t)(k->ring.next + RING + 1));
    vring_doorbell(&k->ring);
    return true;
}

static bool head_twice(struct kit *k)
{
    const struct bad b[] = {{k->header, 16, VD_NEXT, 1},
                            {k->data, SECTOR, VD_NEXT | VD_WRITE, 2},
                            {k->status, 1, VD_WRITE, 0}};
    header_set(k, T_IN, 0);
    table_write(k, k->ring.desc, b, 3);
    vring_publish(&k->ring, k->ring.next, 0, k->ring.next);
    vring_publish(&k->ring, (uint16_t)(k->ring.next + 1), 0, (uint16_t)(k->ring.next + 2));
    vring_doorbell(&k->ring);
    return true;
}

static bool again(struct kit *k)
{
    buffer_wrap(k);
    for (unsigned i = 0; i < KICKS; i++) {
        if (!k->ring.packed)
            vring_publish(&k->ring, (uint16_t)(k->ring.next + 1 + i), 0,
                          (uint16_t)(k->ring.next + 2 + i));
        vring_doorbell(&k->ring);
    }
    return true;
}

// --- another CPU that changes what the device looks at

static struct {
    uint64_t at, values[2];
    unsigned bytes;
    uint32_t idle, stop;
} flip;

static uint64_t flipper(void *arg)
{
    (void)arg;
    while (!__atomic_load_n(&flip.stop, __ATOMIC_ACQUIRE)) {
        bool idle = !__atomic_load_n(&flip.at, __ATOMIC_ACQUIRE);
        __atomic_store_n(&flip.idle, idle, __ATOMIC_RELEASE);
        if (idle) {
            pause();
            continue;
        }
        for (unsigned i = 0; i < 2; i++)
            if (flip.bytes == 4)
                *(volatile uint32_t *)flip.at = (uint32_t)flip.values[i];
            else
                *(volatile uint64_t *)flip.at = flip.values[i];
    }
    return 0;
}

static void other_cpu(void *arg)
{
    ring3_run(flipper, arg);
}

static void flip_begin(uint64_t at, unsigned bytes, uint64_t one, uint64_t two)
{
    flip.values[0] = one;
    flip.values[1] = two;
    flip.bytes = bytes;
    flip.idle = 0;
    __atomic_store_n(&flip.at, at, __ATOMIC_RELEASE);
}

static void flip_end(void)
{
    uint64_t end = rdtsc() + VIRTIO_WAIT_CYCLES;
    __atomic_store_n(&flip.at, 0, __ATOMIC_RELEASE);
    do {
        GUEST_ASSERT(rdtsc() < end);
        pause();
    } while (!__atomic_load_n(&flip.idle, __ATOMIC_ACQUIRE));
}

// The length changes between one that fits and one that reaches out of RAM; the queue breaks when
// the device meets the second. If its check and its use read the length twice, it writes outside.
static bool flip_descriptor(struct kit *k)
{
    struct vring *r = &k->ring;
    uint64_t end = rdtsc() + VIRTIO_WAIT_CYCLES, buffer = area_tell(ram_end - 64, 64);
    flip_begin(r->desc + 8, 4, 64, 0xffffff00);
    while (!(vreg_read(k->dev, VR_STATUS) & VS_NEEDS_RESET)) {
        GUEST_ASSERT(rdtsc() < end);
        if (r->packed) { // always the first entry: the flipper knows no other
            kit_up(k);
            vdesc_write(true, r->desc, 0, buffer, 64, VD_WRITE | VD_AVAIL, 0);
        } else {
            vdesc_write(false, r->desc, 0, buffer, 64, VD_WRITE, 0);
            r->next++;
            vring_publish(r, (uint16_t)(r->next - 1), 0, r->next);
        }
        uint64_t before = r->packed ? 0 : (uint16_t)(r->next - 1);
        vring_doorbell(r);
        while (r->packed ? !(used_now(k) & VD_USED) : used_now(k) == before) {
            if (vreg_read(k->dev, VR_STATUS) & VS_NEEDS_RESET)
                break;
            GUEST_ASSERT(rdtsc() < end);
        }
    }
    flip_end();
    return true;
}

// --- queues that cannot be

static bool queue_try(struct kit *k, unsigned size, uint64_t desc, uint64_t driver, uint64_t device)
{
    GUEST_ASSERT(virtio_begin(k->dev, k->features));
    vreg_write(k->dev, VR_QUEUE_SEL, k->queue);
    vreg_write(k->dev, VR_QUEUE_SIZE, size);
    vreg_write(k->dev, VR_DESC, desc);
    vreg_write(k->dev, VR_DRIVER, driver);
    vreg_write(k->dev, VR_DEVICE, device);
    vreg_write(k->dev, VR_READY, 1);
    GUEST_ASSERT_EQ(vreg_read(k->dev, VR_READY), 0);
    virtio_go(k->dev);
    k->ring.queue = (uint16_t)k->queue;
    vring_doorbell(&k->ring);
    return true;
}

static bool desc_end(struct kit *k)
{
    return queue_try(k, RING, ram_end - 16, k->ring.driver, k->ring.device);
}

static bool driver_end(struct kit *k)
{
    return queue_try(k, RING, k->ring.desc, k->ring.packed ? ram_end : ram_end - 4, k->ring.device);
}

static bool device_end(struct kit *k)
{
    return queue_try(k, RING, k->ring.desc, k->ring.driver, k->ring.packed ? ram_end : ram_end - 4);
}

static bool desc_wrap(struct kit *k)
{
    return queue_try(k, RING, -16ul, k->ring.driver, k->ring.device);
}

static bool desc_odd(struct kit *k)
{
    return queue_try(k, RING, k->ring.desc + 8, k->ring.driver, k->ring.device);
}

static bool size_odd(struct kit *k)
{
    return queue_try(k, 3, k->ring.desc, k->ring.driver, k->ring.device);
}

static bool size_big(struct kit *k)
{
    return queue_try(k, 0x4000, k->ring.desc, k->ring.driver, k->ring.device);
}

static bool size_zero(struct kit *k)
{
    return queue_try(k, 0, k->ring.desc, k->ring.driver, k->ring.device);
}

static bool move_live(struct kit *k)
{
    vreg_write(k->dev, VR_QUEUE_SEL, k->queue);
    vreg_write(k->dev, VR_QUEUE_SIZE, 256);
    vreg_write(k->dev, VR_DESC, ram_end - 64);
    vreg_write(k->dev, VR_DRIVER, ram_end - 2);
    vreg_write(k->dev, VR_DEVICE, -4ul);
    vreg_write(k->dev, VR_READY, 1);
    kit_works(k);
    vreg_write(k->dev, VR_READY, 0);
    vreg_write(k->dev, VR_DESC, ram_end - 64);
    vreg_write(k->dev, VR_READY, 1);
    kit_works(k);
    vreg_write(k->dev, VR_ACCEPT_SEL, 0); // other features than those in use
    vreg_write(k->dev, VR_ACCEPT, 0);
    kit_works(k);
    return false;
}

static bool early_kick(struct kit *k)
{
    const struct vbuf buf = {k->data, 64, true};
    GUEST_ASSERT(virtio_begin(k->dev, k->features));
    GUEST_ASSERT(kit_queue(k));
    GUEST_ASSERT(vring_add(&k->ring, &buf, 1, 0) >= 0);
    uint64_t before = used_now(k);
    for (unsigned i = 0; i < KICKS; i++)
        vring_doorbell(&k->ring);
    GUEST_ASSERT_EQ(used_now(k), before);
    return false;
}

static bool queue_sel(struct kit *k)
{
    static const uint32_t queues[] = {16, 17, 255, 256, 0x7fff, 0xffff, 0x10000, 0x80000000, ~0u};
    for (unsigned i = 0; i < sizeof(queues) / sizeof(queues[0]); i++) {
        if (k->dev->transport && queues[i] > 0xffff && k->dev->pci)
            continue; // its register has 16 bits
        vreg_write(k->dev, VR_QUEUE_SEL, queues[i]);
        GUEST_ASSERT_EQ(vreg_read(k->dev, VR_QUEUE_MAX), 0);
        GUEST_ASSERT_EQ(vreg_read(k->dev, VR_READY), 0);
        vreg_write(k->dev, VR_QUEUE_SIZE, 8);
        vreg_write(k->dev, VR_DESC, k->rings);
        vreg_write(k->dev, VR_DRIVER, k->rings);
        vreg_write(k->dev, VR_DEVICE, k->rings);
        vreg_write(k->dev, VR_READY, 1);
        GUEST_ASSERT_EQ(vreg_read(k->dev, VR_READY), 0);
    }
    kit_works(k);
    return false;
}

static bool notify(struct kit *k)
{
    static const uint32_t queues[] = {15, 16, 64, 255, 256, 0x7fff, 0xffff, 0x10000, ~0u};
    struct vring r = k->ring;
    for (unsigned i = 0; i < sizeof(queues) / sizeof(queues[0]); i++) {
        r.queue = (uint16_t)queues[i];
        vring_doorbell(&r);
        if (!k->dev->pci)
            mmio_write32(k->dev->notify, queues[i]);
    }
    kit_works(k);
    return false;
}

// --- status, features, config space

static bool status_order(struct kit *k)
{
    static const uint8_t tries[] = {VS_DRIVER, VS_DRIVER_OK, VS_FEATURES_OK | VS_ACKNOWLEDGE,
                                    VS_ACKNOWLEDGE | VS_DRIVER | VS_DRIVER_OK};
    for (unsigned i = 0; i < sizeof(tries); i++) {
        virtio_reset(k->dev);
        vreg_write(k->dev, VR_STATUS, tries[i]);
        GUEST_ASSERT_EQ(vreg_read(k->dev, VR_STATUS), 0);
    }
    return false;
}

static bool features(struct kit *k)
{
    virtio_reset(k->dev);
    uint64_t offered = virtio_offered(k->dev);
    vreg_write(k->dev, VR_STATUS, VS_ACKNOWLEDGE | VS_DRIVER);
    vreg_write(k->dev, VR_ACCEPT_SEL, 0);
    vreg_write(k->dev, VR_ACCEPT, (uint32_t)~offered);
    vreg_write(k->dev, VR_ACCEPT_SEL, 1);
    vreg_write(k->dev, VR_ACCEPT, 1);
    vreg_write(k->dev, VR_STATUS, 11);
    GUEST_ASSERT_EQ(vreg_read(k->dev, VR_STATUS), 3);
    return false;
}

static bool config_range(struct kit *k)
{
    uint64_t config = k->dev->config, end = config + (k->dev->pci ? 0x100 : 0xf00);
    static const uint16_t ats[] = {0, 1, 2, 3, 5, 7, 59, 60, 61, 63, 64, 127, 254, 255};
    if (!config)
        return false; // pci: a device without config space
    for (unsigned i = 0; i < sizeof(ats) / sizeof(ats[0]); i++) {
        volatile uint8_t *p = (volatile uint8_t *)(config + ats[i]);
        uint64_t sum = p[0] + *(volatile uint16_t *)p;
        sum += *(volatile uint32_t *)p + *(volatile uint64_t *)p;
        if (ats[i] >= 64 && ats[i] < 248)
            GUEST_ASSERT_EQ(sum, 0); // no device of these tests has so much
        p[0] = 0xff;
        *(volatile uint16_t *)p = 0xffff;
        *(volatile uint32_t *)p = 0xffffffff;
        *(volatile uint64_t *)p = ~0ul;
    }
    for (uint64_t at = config + 256; at < config + 2048; at += 8)
        GUEST_ASSERT_EQ(*(volatile uint64_t *)at, 0);
    // The last bytes of the window, and accesses that cross its end.
    for (uint64_t at = end - 8; at < end && !k->dev->pci; at++) {
        (void)*(volatile uint8_t *)at;
        (void)*(volatile uint32_t *)at;
        *(volatile uint64_t *)at = ~0ul;
    }
    kit_works(k);
    return false;
}

// --- resets and floods

// Requests are reset a little later each time; from then on nothing writes to their buffers and
// rings.
static bool reset_busy(struct kit *k)
{
    enum { REQUESTS = 4, ROUNDS = 60, STEP = 40, LATER = 3000 };
    bool blk = k->dev->id == VIRTIO_BLK;
    uint64_t room = area(REQUESTS * BUFFER, 0);
    for (unsigned round = 0; round < ROUNDS; round++) {
        kit_up(k);
        header_set(k, T_IN, 0);
        memset((void *)room, 0, REQUESTS * BUFFER);
        for (unsigned i = 0; i < REQUESTS; i++) {
            const struct vbuf bufs[] = {
                {k->header, 16, false},
                {room + i * BUFFER, BUFFER, blk || k->dev->id == VIRTIO_RNG},
                {k->status, 1, true}};
            GUEST_ASSERT(vring_add(&k->ring, blk ? bufs : bufs + 1, blk ? 3 : 1, 0) >= 0);
        }
        vring_doorbell(&k->ring);
        for (unsigned wait = 0; wait < round * STEP; wait++)
            pause();
        virtio_reset(k->dev);
        memset((void *)room, 0x5c, REQUESTS * BUFFER);
        memset((void *)k->rings, 0x5c, VRING_BYTES(RING));
        for (unsigned wait = 0; wait < LATER; wait++)
            pause();
        for (unsigned i = 0; i < REQUESTS * BUFFER; i += 8)
            GUEST_ASSERT_EQ(*(volatile uint64_t *)(room + i), 0x5c5c5c5c5c5c5c5c);
        for (unsigned i = 0; i < VRING_BYTES(RING); i += 8)
            GUEST_ASSERT_EQ(*(volatile uint64_t *)(k->rings + i), 0x5c5c5c5c5c5c5c5c);
    }
    kit_up(k);
    return false;
}

static bool is_broken(const struct kit *k)
{
    return vreg_read(k->dev, VR_STATUS) & VS_NEEDS_RESET;
}

// A chain that comes back all the same was taken for good, unless the device breaks over it (the
// status is read after that, under the same lock).
static void broken_wait(struct kit *k)
{
    uint64_t end = rdtsc() + VIRTIO_WAIT_CYCLES;
    uint32_t id, len;
    while (!is_broken(k)) {
        GUEST_ASSERT(!vring_used(&k->ring, &id, &len) || is_broken(k));
        GUEST_ASSERT(rdtsc() < end);
        pause();
    }
}

static bool log_flood(struct kit *k)
{
    for (unsigned i = 0; i < KICKS; i++) {
        kit_up(k);
        buffer_wrap(k);
        broken_wait(k);
    }
    return true;
}

// --- disks

static bool blk_overflow(struct kit *k)
{
    static const uint64_t sectors[] = {1ul << 55, ~0ul, ~0ul >> 1, (1ul << 55) - 1, 1ul << 63};
    for (unsigned i = 0; i < sizeof(sectors) / sizeof(sectors[0]); i++) {
        GUEST_ASSERT_EQ(blk_do(k, T_IN, sectors[i], SECTOR), S_IOERR);
        GUEST_ASSERT_EQ(blk_do(k, T_OUT, sectors[i], SECTOR), S_IOERR);
    }
    return false;
}

static bool blk_past_end(struct kit *k)
{
    static const uint64_t sectors[] = {HOSTILE_SECTORS - 1, HOSTILE_SECTORS, HOSTILE_SECTORS + 1};
    for (unsigned i = 0; i < 3; i++) {
        GUEST_ASSERT_EQ(blk_do(k, T_OUT, sectors[i], 2 * SECTOR), S_IOERR);
        GUEST_ASSERT_EQ(blk_do(k, T_IN, sectors[i], 2 * SECTOR), S_IOERR);
    }
    GUEST_ASSERT_EQ(blk_do(k, T_IN, HOSTILE_SECTORS - 1, SECTOR), S_OK);
    return false;
}

static bool blk_ranges(struct kit *k)
{
    static const struct range {
        uint64_t sector;
        uint32_t sectors, flags;
    } ranges[] = {
        {HOSTILE_SECTORS - 1, 2, 0}, {~0ul, 2, 0},     {1ul << 55, 8, 0}, {0, ~0u, 0}, {0, 0, 0},
        {HOSTILE_SECTORS, 1, 0},     {~0ul - 6, 8, 0}, {0, 8, 0xfffe}};
    for (unsigned i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        *(volatile struct range *)k->data = ranges[i];
        GUEST_ASSERT(blk_do(k, T_DISCARD, 0, 16) != S_OK);
        GUEST_ASSERT(blk_do(k, T_ZEROES, 0, 16) != S_OK);
    }
    *(volatile struct range *)k->data = (struct range) {0, 8, 0};
    GUEST_ASSERT(blk_do(k, T_ZEROES, 0, 15) != S_OK);
    GUEST_ASSERT(blk_do(k, T_ZEROES, 0, 17) != S_OK);
    return false;
}

static bool blk_lengths(struct kit *k)
{
    GUEST_ASSERT(blk_do(k, T_IN, 0, 511) != S_OK);
    GUEST_ASSERT(blk_do(k, T_OUT, 0, 513) != S_OK);
    GUEST_ASSERT(blk_do(k, T_OUT, 0, 1) != S_OK);
    GUEST_ASSERT(blk_do(k, T_GET_ID, 0, 19) != S_OK);
    GUEST_ASSERT(blk_do(k, 0xffffffff, 0, SECTOR) != S_OK);
    return false;
}

static bool blk_no_status(struct kit *k)
{
    header_set(k, T_OUT, 0);
    return offer_one(k, k->header, 16, 0);
}

static bool blk_no_header(struct kit *k)
{
    const struct bad b[] = {{k->header, 15, VD_NEXT, 1}, {k->status, 1, VD_WRITE, 0}};
    offer(k, b, 2);
    return true;
}

// A header of a format that names a backing file and another size, in sector HOSTILE_SCRATCH.
static bool blk_format(struct kit *k)
{
    static const char qcow2[] = "QFI\xfb\0\0\0\3\0\0\0\0\0\0\0\x68\0\0\0\x0b\0\0\0\x10\0\0\0\0\xff";
    memset((void *)k->data, 0, SECTOR);
    memcpy((void *)k->data, qcow2, sizeof(qcow2));
    memcpy((void *)(k->data + 0x68), "/etc/passwd", 11);
    GUEST_ASSERT_EQ(blk_do(k, T_OUT, HOSTILE_SCRATCH, SECTOR), S_OK);
    memset((void *)k->data, 0, SECTOR);
    GUEST_ASSERT_EQ(blk_do(k, T_IN, HOSTILE_SCRATCH, SECTOR), S_OK);
    GUEST_ASSERT(!memcmp((void *)k->data, qcow2, sizeof(qcow2)));
    return false;
}

// The sector changes between the scratch one and one far out while the device reads the header:
// it is one or the other, never a check of one and a write of the other.
static bool blk_flip_header(struct kit *k)
{
    unsigned seen[2] = {0};
    memset((void *)k->data, 0, SECTOR);
    *(volatile uint8_t *)k->data = HOSTILE_SECTOR(HOSTILE_SCRATCH);
    header_set(k, T_OUT, HOSTILE_SCRATCH);
    const struct vbuf bufs[] = {
        {k->header, 16, false}, {k->data, SECTOR, false}, {k->status, 1, true}};
    flip_begin(k->header + 8, 8, HOSTILE_SCRATCH, HOSTILE_SECTORS + 5);
    uint64_t end = rdtsc() + VIRTIO_WAIT_CYCLES;
    for (unsigned i = 0; i < KICKS || !seen[0] || !seen[1]; i++) {
        uint32_t id, len;
        GUEST_ASSERT(rdtsc() < end);
        GUEST_ASSERT(vring_add(&k->ring, bufs, 3, 0) >= 0);
        vring_kick(&k->ring);
        GUEST_ASSERT(vring_wait(&k->ring, &id, &len));
        uint8_t status = *(volatile uint8_t *)k->status;
        GUEST_ASSERT(status <= S_IOERR);
        seen[status]++;
    }
    flip_end();
    return false;
}

// --- entropy

static bool rng_flood(struct kit *k)
{
    // 255 times all of a large buffer: far more than RAM.
    uint64_t room = area(1 << 20, 0);
    for (unsigned i = 0; i < 255; i++)
        vdesc_write(k->ring.packed, k->table, i, room, 1 << 20,
                    k->ring.packed || i == 254 ? VD_WRITE : VD_WRITE | VD_NEXT, (uint16_t)(i + 1));
    for (unsigned n = 0; n < 64; n++) {
        uint32_t id, len;
        offer(k, &(struct bad) {k->table, 255 * 16, VD_INDIRECT, 0}, 1);
        k->ring.slots[0] = 1;
        uint16_t link = k->ring.link[0], head = k->ring.free_head;
        if (k->ring.packed) {
            k->ring.wrap = k->ring.wrap != (k->ring.next + 1 >= RING);
            k->ring.next = (uint16_t)((k->ring.next + 1) % RING);
        } else {
            k->ring.next++;
        }
        GUEST_ASSERT(vring_wait(&k->ring, &id, &len));
        k->ring.link[0] = link; // nothing was taken from the list
        k->ring.free_head = head;
        k->ring.free = RING;
        GUEST_ASSERT(len <= 4096); // one request costs little, whatever it asks for
    }
    return false;
}

// --- net, console, vsock, balloon

static bool net_frames(struct kit *k)
{
    // flags, gso, u16 header, gso size, checksum start, offset, buffers
    static const uint16_t lies[][6] = {
        {0x0001, 0, 0, 0xffff, 0xffff, 0},  {0x00fe, 0, 0, 0, 0, 0},
        {0x0100, 100, 1460, 0, 0, 9},       {0x7f00, 0, 0, 0, 0, 0},
        {0x0101, 0xffff, 0xffff, 70, 2, 0}, {0x0301, 0, 0, 34, 16, 0}};
    struct vbuf large[16];
    uint32_t id, len;
    for (uint32_t bytes = 1; bytes <= NET_HEADER + 1; bytes++)
        send(k, bytes);
    for (unsigned i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        memcpy((void *)k->data, lies[i], sizeof(lies[i]));
        send(k, NET_HEADER + 60);
    }
    memset((void *)k->data, 0, NET_HEADER);
    for (unsigned i = 0; i < 16; i++)
        large[i] = (struct vbuf) {HOSTILE_ARENA, 1 << 20, false};
    GUEST_ASSERT(vring_add(&k->ring, large, 16, 0) >= 0);
    vring_kick(&k->ring);
    GUEST_ASSERT(vring_wait(&k->ring, &id, &len));
    return false;
}

static bool console_control(struct kit *k)
{
    enum { MULTIPORT = 2, CONTROL = 3 };
    static const struct message {
        uint32_t port;
        uint16_t event, value;
    } messages[] = {{0, 0, 1},      {~0u, 3, 1},  {31, 3, 1},        {0, 0xffff, 0xffff},
                    {0, 2, 0xffff}, {1, 6, 0xff}, {0x80000000, 0, 1}};
    struct kit control = *k;
    control.queue = CONTROL;
    control.features |= MULTIPORT;
    kit_up(&control);
    for (unsigned n = 0; n < KICKS; n++) {
        *(volatile struct message *)k->data =
            messages[n % (sizeof(messages) / sizeof(messages[0]))];
        send(&control, n % 3 ? sizeof(struct message) : n % 8 + 1);
    }
    kit_up(k);
    return false;
}

static bool vsock_lengths(struct kit *k)
{
    static const uint32_t lengths[] = {1, 85, 4096, 0x7fffffff, 0xffffffd4, 0xffffffff};
    for (unsigned i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        struct vsock_header h = vsock_header(k);
        h.op = VSOCK_RW;
        h.len = lengths[i];
        *(struct vsock_header *)k->data = h;
        send(k, sizeof(h) + (i & 1 ? 40 : 0));
    }
    return offer_one(k, k->data, sizeof(struct vsock_header) - 1, 0);
}

static bool balloon_pages(struct kit *k)
{
    volatile uint32_t *pages = (volatile uint32_t *)k->data;
    const uint32_t tries[] = {~0u, 0x80000000, (uint32_t)(ram_end / PAGE_SIZE),
                              (uint32_t)(LAPIC_GPA / PAGE_SIZE),
                              (uint32_t)(k->dev->regs / PAGE_SIZE)};
    unsigned n = sizeof(tries) / sizeof(tries[0]);
    for (unsigned round = 0; round < KICKS; round++) {
        for (unsigned i = 0; i < n; i++)
            pages[i] = tries[i] + (i < 2 ? 0 : round);
        send(k, 4 * n - round % 4);
    }
    for (unsigned i = 0; i < 4; i++) // what it has is told by the driver
        mmio_write32(k->dev->config + 4, i & 1 ? ~0u : 0x80000000);
    return false;
}

// --- the frame

static bool (*const attacks[])(struct kit *k) = {
#define ATTACK(NAME, name, device, rings, lines) [HOSTILE_##NAME] = name,
    HOSTILE_CASES(ATTACK)
#undef ATTACK
};

static const uint32_t attacked[] = {
#define DEVICE(NAME, name, device, rings, lines) [HOSTILE_##NAME] = device,
    HOSTILE_CASES(DEVICE)
#undef DEVICE
};

static uint64_t run(void *arg)
{
    static struct kit victim, witness;
    uint64_t what = guest_param(UCALL_P_CASE, 0);
    (void)arg;
    GUEST_ASSERT(what < HOSTILE_COUNT);
    uint32_t id =
        (uint32_t)guest_param(UCALL_P_DEVICE, attacked[what] ? attacked[what] : VIRTIO_BLK);
    nr_devices = virtio_find(devices, VIRTIO_DEVICES_MAX);
    kit_init(&victim, id, (unsigned)guest_param(UCALL_P_QUEUE, 0));
    kit_init(&witness, id == VIRTIO_BLK ? VIRTIO_RNG : VIRTIO_BLK, 0);
    kit_up(&witness);
    kit_works(&witness);
    kit_up(&victim);
    kit_works(&victim);

    bool broken = attacks[what](&victim);
    if (broken)
        broken_wait(&victim);
    GUEST_ASSERT_EQ(vreg_read(victim.dev, VR_STATUS) & VS_NEEDS_RESET, broken ? VS_NEEDS_RESET : 0);
    kit_works(&witness);
    GUEST_SYNC(HOSTILE_ATTACKED);
    kit_works(&witness);
    kit_up(&victim);
    kit_works(&victim);
    __atomic_store_n(&flip.stop, 1, __ATOMIC_RELEASE);
    return 0;
}

void guest_main(void)
{
    for (unsigned i = 0; i < ram_range_count; i++)
        if (ram_ranges[i].base < 4 * GIB)
            ram_end = ram_ranges[i].base + ram_ranges[i].bytes;
    if (cpu_count > 1)
        cpus_start(other_cpu, NULL);
    ring3_run(run, NULL);
    cpus_join();
}
