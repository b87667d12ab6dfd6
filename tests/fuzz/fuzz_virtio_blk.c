// SPDX-License-Identifier: Apache-2.0
// A block device whose registers and memory a guest writes from the input. The first byte chooses:
// bit 0 packed, bit 1 set up a queue first (so that the input gets to requests), bit 2 put the rest
// into memory as it is and kick. Otherwise the rest is a list of (kind, register or page, value).
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "devices/virtio_blk.h"
#include "devices/virtio_mmio.h"
#include "vmm/vm.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { BASE = LAYOUT_VIRTIO_MMIO, AREA = 64 * 1024, DISK = 64 * 1024 };

struct machine { // one for the fuzzer's process; the device is reset before each input
    struct vm vm;
    struct device *dev;
};

static int no_irqfd(struct vm *vm, unsigned gsi, int fd, int resample, struct error *err)
{
    return 0;
}

static int no_doorbell(struct vm *vm, uint64_t addr, uint32_t value, int fd, struct error *err)
{
    return 0;
}

static struct machine *machine(void)
{
    static struct machine *m;
    if (m)
        return m;
    static const struct virtio_mmio_wiring wiring = {no_irqfd, no_doorbell};
    const struct virtio_mmio_place place = {.base = BASE, .wiring = &wiring};
    struct virtio_blk_config config = {
        .attach = {.transport = &virtio_mmio_transport, .place = &place, .packed = true},
        .queues = 2};
    struct ram_config ram = {.size = 16 * MiB};
    int fd = memfd_create("disk", 0);
    m = calloc(1, sizeof(*m));
    if (!m || fd < 0 || ftruncate(fd, DISK))
        abort();
    snprintf(config.path, sizeof(config.path), "/proc/self/fd/%d", fd);
    m->vm.mmio.name = "mmio";
    m->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    if (ram_create(&m->vm.ram, &ram, NULL) || loop_create(&m->vm.loop, NULL) ||
        device_add(&m->vm, &virtio_blk_class, &config, &m->dev, NULL))
        abort();
    virtio_blk_class.resume(m->dev);
    return m;
}

static void set(struct machine *m, uint64_t reg, uint32_t value)
{
    bus_write(&m->vm.mmio, BASE + reg, 4, value);
}

static void turn(struct machine *m)
{
    for (unsigned i = 0; i < 3; i++)
        if (loop_turn(m->vm.loop, false, NULL))
            abort();
}

static void queue_up(struct machine *m, bool packed)
{
    uint32_t high = 1u | (packed ? 4u : 0u);
    const uint32_t writes[][2] = {{0x70, 1},  {0x70, 3},    {0x24, 0},     {0x20, 3u << 28},
                                  {0x24, 1},  {0x20, high}, {0x70, 11},    {0x30, 0},
                                  {0x38, 16}, {0x80, 0},    {0x90, 0x100}, {0xa0, 0x200},
                                  {0x44, 1},  {0x70, 15}};
    for (size_t i = 0; i < ARRAY_SIZE(writes); i++)
        set(m, writes[i][0], writes[i][1]);
}

static void list_run(struct machine *m, const uint8_t *data, size_t size)
{
    for (; size >= 8; data += 8, size -= 8) {
        uint16_t where;
        uint32_t value;
        uint64_t out;
        memcpy(&where, data + 2, 2);
        memcpy(&value, data + 4, 4);
        unsigned width = 1u << (data[1] & 3);
        switch (data[0] % 4) {
        case 0:
            bus_write(&m->vm.mmio, BASE + (where & 0x1ff), width, value);
            break;
        case 1:
            bus_read(&m->vm.mmio, BASE + (where & 0x1ff), width, &out);
            break;
        case 2:
            ram_write(&m->vm.ram, where, &value, width < 4 ? width : 4);
            break;
        default:
            set(m, 0x50, value & 1);
            turn(m);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct machine *m = machine();
    if (size < 2)
        return 0;
    memset(ram_at(&m->vm.ram, 0, AREA), 0, AREA);
    set(m, 0x70, 0);
    uint8_t mode = *data++;
    size--;
    if (mode & 2)
        queue_up(m, mode & 1);
    if (mode & 4) {
        ram_write(&m->vm.ram, 0, data, size < AREA ? size : AREA);
        set(m, 0x50, 0);
    } else {
        list_run(m, data, size);
    }
    turn(m);
    if (mode & 8) { // state in between goes out and comes back, or is refused
        struct error err;
        virtio_blk_class.quiesce(m->dev, &err);
        if (virtio_blk_class.state->save(m->dev, &err) ||
            virtio_blk_class.state->load(m->dev, 1, &err))
            abort();
        virtio_blk_class.resume(m->dev);
        turn(m);
    }
    return 0;
}
