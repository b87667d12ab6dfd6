// SPDX-License-Identifier: Apache-2.0
// Walks over a virtio disk for ever: reads each of its 4 KiB blocks, wants what it wrote there the
// last time, and writes what belongs there now, some of it as zeroes. A write that was lost or is
// seen twice fails it one walk later. Parameters: pages (blocks), kib: KiB between two of them
// (default 4), loops (0 = for ever). GUEST_SYNC 1 at first; value COUNT[0]: walks done.
#include "../virtio.h"

enum { RING = 8, ARENA = 0x2000000, SECTOR = 512, BLOCK = 4096, HEADER = 64 };
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_WRITE_ZEROES = 13, S_OK = 0 };
enum { FLUSH_EVERY = 64, ZERO_EVERY = 8, UNMAP = 1 };
#define F_FLUSH        (1ull << 9)
#define F_WRITE_ZEROES (1ull << 14)

struct walk {
    struct vring ring;
    uint64_t blocks, stride, loops;
    uint64_t slot, data, count; // memory; walks done
};

static struct vdev devices[VIRTIO_DEVICES_MAX];
static struct walk walk;

static void request(struct walk *w, uint32_t type, uint64_t block, uint64_t len)
{
    uint64_t *header = (uint64_t *)w->slot;
    volatile uint8_t *status = (volatile uint8_t *)(w->slot + HEADER);
    header[0] = type;
    header[1] = type == T_IN || type == T_OUT ? block * w->stride / SECTOR : 0;
    *status = 0xff;
    const struct vbuf bufs[] = {
        {w->slot, 16, false}, {w->data, (uint32_t)len, type == T_IN}, {w->slot + HEADER, 1, true}};
    const struct vbuf without[] = {bufs[0], bufs[2]};
    uint32_t id, used;
    GUEST_ASSERT(vring_add(&w->ring, len ? bufs : without, len ? 3 : 2, 0) >= 0);
    vring_kick(&w->ring);
    GUEST_ASSERT(vring_wait(&w->ring, &id, &used));
    GUEST_ASSERT_EQ(*status, S_OK);
}

static bool zeroed(uint64_t loop, uint64_t block)
{
    return (loop + block) % ZERO_EVERY == 0;
}

// In the first word of each sector.
static uint64_t content(uint64_t loop, uint64_t block)
{
    return zeroed(loop, block) ? 0 : loop << 32 | block;
}

static void zeroes(struct walk *w, uint64_t block)
{
    uint64_t *segment = (uint64_t *)w->data;
    segment[0] = block * w->stride / SECTOR;
    segment[1] = BLOCK / SECTOR | (uint64_t)UNMAP << 32;
    request(w, T_WRITE_ZEROES, 0, 16);
}

static void visit(struct walk *w, uint64_t block)
{
    uint64_t *data = (uint64_t *)w->data;
    request(w, T_IN, block, BLOCK);
    for (uint64_t i = 0; i < BLOCK / 8; i += SECTOR / 8) {
        if (w->count)
            GUEST_ASSERT_EQ(data[i], content(w->count, block));
        data[i] = content(w->count + 1, block);
    }
    if (zeroed(w->count + 1, block))
        zeroes(w, block);
    else
        request(w, T_OUT, block, BLOCK);
    if (block % FLUSH_EVERY == 0)
        request(w, T_FLUSH, 0, 0);
}

static uint64_t loop(void *arg)
{
    struct walk *w = arg;
    for (uint64_t block = 0; block < w->blocks; block++)
        visit(w, block);
    return 0;
}

void guest_main(void)
{
    struct vdev *dev = virtio_get(devices, virtio_find(devices, VIRTIO_DEVICES_MAX), VIRTIO_BLK, 0);
    walk = (struct walk) {.blocks = guest_param(UCALL_P_PAGES, 256),
                          .stride = guest_param(UCALL_P_KIB, 4) * 1024,
                          .loops = guest_param(UCALL_P_LOOPS, 0)};
    GUEST_ASSERT(virtio_begin(dev, VF_VERSION_1 | F_FLUSH | F_WRITE_ZEROES));
    uint64_t arena =
        (uint64_t)ram_alloc(VRING_BYTES(RING) + 2 * PAGE_SIZE, PAGE_SIZE, ARENA, 1ul << 31);
    walk.slot = arena + VRING_BYTES(RING);
    walk.data = walk.slot + PAGE_SIZE;
    GUEST_ASSERT(vring_setup(&walk.ring, dev, 0, RING, arena));
    uint64_t bytes =
        (mmio_read32(dev->config) | (uint64_t)mmio_read32(dev->config + 4) << 32) * SECTOR;
    GUEST_ASSERT(walk.stride >= BLOCK && walk.blocks && walk.blocks <= bytes / walk.stride);
    virtio_go(dev);
    GUEST_SYNC(1);
    while (!walk.loops || walk.count < walk.loops) {
        ring3_run(loop, &walk);
        walk.count++;
        guest_value(UCALL_V_COUNT, walk.count, 0);
    }
}
