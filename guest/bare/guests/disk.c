// SPDX-License-Identifier: Apache-2.0
// Reads (or writes) a virtio disk at random, `depth` requests at a time, polling the used ring; and
// rings a doorbell with nothing behind it. Parameters: n (requests), depth, kib (of a request),
// write, ring, packed, doorbells (how many). GUEST_SYNC 1 before and 2 after the requests. Values:
// TSC_DELTA and COUNT: [0] of the requests, [1] of the doorbells that were needed for them, [2] of
// the idle ones.
#include "../virtio.h"

enum { RING = 128, ARENA = 0x2000000, SECTOR = 512, KIB_MAX = 512 };
enum { T_IN = 0, T_OUT = 1, S_OK = 0 };
enum { SLOT = 256, SLOT_STATUS = 32, SLOT_TABLE = 64 }; // header, status, indirect table

struct load {
    struct vring ring;
    uint64_t n, depth, bytes, blocks;
    bool write;
    uint64_t slots, data;
    uint64_t seed;
    uint64_t cycles, rings, ring_cycles, doorbells, idle_cycles;
};

static struct vdev devices[VIRTIO_DEVICES_MAX];
static struct load load;
static uint16_t slot_of[RING]; // by the id a request got

static void add(struct load *l, unsigned slot)
{
    uint64_t at = l->slots + slot * SLOT;
    l->seed ^= l->seed << 13;
    l->seed ^= l->seed >> 7;
    l->seed ^= l->seed << 17;
    uint64_t *header = (uint64_t *)at;
    header[0] = l->write ? T_OUT : T_IN;
    header[1] = l->seed % l->blocks * (l->bytes / SECTOR);
    *(volatile uint8_t *)(at + SLOT_STATUS) = 0xff;
    const struct vbuf bufs[] = {{at, 16, false},
                                {l->data + slot * l->bytes, (uint32_t)l->bytes, !l->write},
                                {at + SLOT_STATUS, 1, true}};
    int id = vring_add(&l->ring, bufs, 3, at + SLOT_TABLE);
    GUEST_ASSERT(id >= 0 && id < RING);
    slot_of[id] = (uint16_t)slot;
}

static void kick(struct load *l)
{
    uint64_t before = rdtsc();
    if (!vring_kick(&l->ring))
        return;
    l->ring_cycles += rdtsc() - before;
    l->rings++;
}

static uint64_t requests(void *arg)
{
    struct load *l = arg;
    uint64_t begun = rdtsc(), started = 0, end = begun + VIRTIO_WAIT_CYCLES;
    for (; started < l->depth && started < l->n; started++)
        add(l, (unsigned)started);
    kick(l);
    for (uint64_t done = 0; done < l->n;) {
        uint32_t id, len;
        bool more = false;
        while (vring_used(&l->ring, &id, &len)) {
            unsigned slot = slot_of[id];
            GUEST_ASSERT_EQ(*(volatile uint8_t *)(l->slots + slot * SLOT + SLOT_STATUS), S_OK);
            done++;
            if (started < l->n) {
                add(l, slot);
                started++;
                more = true;
            }
        }
        if (more)
            kick(l);
        else
            pause();
        GUEST_ASSERT(rdtsc() < end);
    }
    l->cycles = rdtsc() - begun;
    return 0;
}

static uint64_t doorbells(void *arg)
{
    struct load *l = arg;
    uint64_t begun = rdtsc();
    for (uint64_t i = 0; i < l->doorbells; i++)
        vring_doorbell(&l->ring);
    l->idle_cycles = rdtsc() - begun;
    return 0;
}

static void run(uint64_t (*fn)(void *arg))
{
    if (guest_param(UCALL_P_RING, 3) == 3)
        ring3_run(fn, &load);
    else
        fn(&load);
}

void guest_main(void)
{
    struct vdev *dev = virtio_get(devices, virtio_find(devices, VIRTIO_DEVICES_MAX), VIRTIO_BLK, 0);
    uint64_t kib = guest_param(UCALL_P_KIB, 4), khz = tsc_khz();
    load = (struct load) {.n = guest_param(UCALL_P_N, 1000),
                          .depth = guest_param(UCALL_P_DEPTH, 1),
                          .bytes = kib * 1024,
                          .write = guest_param(UCALL_P_WRITE, 0),
                          .doorbells = guest_param(UCALL_P_DOORBELLS, 1000),
                          .seed = guest_param(UCALL_P_SEED, 88172645463325252)};
    uint64_t features = VF_VERSION_1 | VF_INDIRECT | VF_EVENT_IDX;
    if (guest_param(UCALL_P_PACKED, 0))
        features |= VF_PACKED;
    GUEST_ASSERT(kib && kib <= KIB_MAX && load.depth && load.depth <= RING);
    GUEST_ASSERT(virtio_begin(dev, features));
    uint64_t arena =
        (uint64_t)ram_alloc(VRING_BYTES(RING) + load.depth * (SLOT + load.bytes) + 2 * PAGE_SIZE,
                            PAGE_SIZE, ARENA, 1ul << 31);
    load.slots = arena + VRING_BYTES(RING);
    load.data = (load.slots + load.depth * SLOT + PAGE_SIZE - 1) & -PAGE_SIZE;
    memset((void *)load.data, 1, load.depth * load.bytes); // page faults now, not in the loop
    GUEST_ASSERT(vring_setup(&load.ring, dev, 0, RING, arena));
    load.blocks = (mmio_read32(dev->config) | (uint64_t)mmio_read32(dev->config + 4) << 32) /
                  (load.bytes / SECTOR);
    GUEST_ASSERT(load.blocks);
    virtio_go(dev);

    GUEST_SYNC(1);
    run(requests);
    GUEST_SYNC(2);
    guest_value(UCALL_V_TSC_DELTA, load.cycles, 0);
    guest_value(UCALL_V_COUNT, load.n, 0);
    guest_value(UCALL_V_TSC_DELTA, load.ring_cycles, 1);
    guest_value(UCALL_V_COUNT, load.rings, 1);
    run(doorbells);
    guest_value(UCALL_V_TSC_DELTA, load.idle_cycles, 2);
    guest_value(UCALL_V_COUNT, load.doorbells, 2);
    guest_value(UCALL_V_TSC_KHZ, khz, 0);
}
