// SPDX-License-Identifier: Apache-2.0
// A machine without KVM that has one virtio-mmio device, and a guest's driver for a disk in it: for
// tests.
#pragma once

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include "devices/virtio_blk.h"
#include "devices/virtio_mmio.h"
#include "tests/unit/virtio_driver.h"
#include "vmm/vm.h"

enum { BASE = LAYOUT_VIRTIO_MMIO, RINGS = 0x100000, HEADER = 0x200000, STATUS = 0x201000 };
enum { DATA = 0x400000, SECTORS = 2048 };
enum { T_IN, T_OUT, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_ZEROES = 13 };
enum { S_OK, S_IOERR, S_UNSUPP, S_NONE = 0xee };

struct rig {
    struct vm vm;
    struct device *dev;
    struct driver d;
    int irq; // our copy of the device's interrupt
    int ack; // and of what counts acknowledgements
    char path[64];
};

static inline int rig_irqfd(struct vm *vm, unsigned gsi, int fd, int resample, struct error *err)
{
    container_of(vm, struct rig, vm)->irq = dup(fd);
    return 0;
}

static inline int rig_doorbell(struct vm *vm, uint64_t addr, uint32_t value, int fd,
                               struct error *err)
{
    return 0; // kicks come through the register
}

static inline int rig_ack(struct vm *vm, uint64_t addr, uint32_t value, int fd, struct error *err)
{
    ck_assert_uint_eq(addr, BASE + 0x64);
    ck_assert_uint_eq(value, 1);
    container_of(vm, struct rig, vm)->ack = dup(fd);
    return 0;
}

static const struct virtio_mmio_wiring wiring = {
    .irqfd = rig_irqfd, .doorbell = rig_doorbell, .ack = rig_ack};

static inline struct rig *rig_new(void)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct error err = {0};
    struct ram_config ram = {.size = 16 * MiB};
    ck_assert_msg(!ram_create(&r->vm.ram, &ram, &err), "%s", err.text);
    ck_assert_msg(!loop_create(&r->vm.loop, &err), "%s", err.text);
    r->vm.mmio.name = "mmio";
    r->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    r->irq = r->ack = -1;
    return r;
}

static inline void image_create(struct rig *r)
{
    snprintf(r->path, sizeof(r->path), "/tmp/ferry-blk-XXXXXX");
    int fd = mkstemp(r->path);
    ck_assert_int_ge(fd, 0);
    uint8_t sector[BLK_SECTOR];
    for (unsigned i = 0; i < SECTORS; i++) {
        memset(sector, (int)(i * 7 + 1), sizeof(sector));
        ck_assert(!write_all(fd, sector, sizeof(sector)));
    }
    close(fd);
}

static inline int rig_add(struct rig *r, const struct device_class *class, void *config,
                          struct error *err)
{
    const struct virtio_mmio_place place = {.base = BASE, .gsi = GSI_VIRTIO, .wiring = &wiring};
    struct virtio_attach *attach = config; // first member of each
    attach->transport = &virtio_mmio_transport;
    attach->place = &place;
    int ret = device_add(&r->vm, class, config, &r->dev, err);
    if (!ret)
        class->resume(r->dev);
    return ret;
}

// A disk from the option's text.
static inline int rig_try(struct rig *r, const char *text, struct error *err)
{
    struct virtio_blk_config config;
    int ret = virtio_blk_parse(text, &config, err);
    return ret ? ret : rig_add(r, &virtio_blk_class, &config, err);
}

static inline struct rig *rig_open(const char *text)
{
    struct rig *r = rig_new();
    struct error err = {0};
    ck_assert_msg(!rig_try(r, text, &err), "%s", err.text);
    return r;
}

// A disk of its own.
static inline struct rig *rig_blk(const char *options)
{
    struct rig *r = rig_new();
    struct error err = {0};
    char text[256];
    image_create(r);
    snprintf(text, sizeof(text), "%s%s", r->path, options);
    ck_assert_msg(!rig_try(r, text, &err), "%s", err.text);
    return r;
}

static inline void rig_free(struct rig *r)
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
    if (r->irq >= 0)
        close(r->irq);
    if (r->ack >= 0)
        close(r->ack);
    if (*r->path)
        unlink(r->path);
    free(r);
}

static inline uint32_t get(struct rig *r, uint64_t offset)
{
    uint64_t value;
    ck_assert(bus_read(&r->vm.mmio, BASE + offset, 4, &value));
    return (uint32_t)value;
}

static inline void set(struct rig *r, uint64_t offset, uint32_t value)
{
    ck_assert(bus_write(&r->vm.mmio, BASE + offset, 4, value));
}

static inline uint64_t features(struct rig *r)
{
    set(r, 0x14, 0);
    uint64_t low = get(r, 0x10);
    set(r, 0x14, 1);
    return low | (uint64_t)get(r, 0x10) << 32;
}

static inline void negotiate(struct rig *r, uint64_t accept)
{
    set(r, 0x70, 1);
    set(r, 0x70, 3);
    set(r, 0x24, 0);
    set(r, 0x20, (uint32_t)accept);
    set(r, 0x24, 1);
    set(r, 0x20, (uint32_t)(accept >> 32));
    set(r, 0x70, 11);
}

static inline void queue_set(struct rig *r, unsigned queue, uint16_t size)
{
    set(r, 0x30, queue);
    set(r, 0x38, size);
    set(r, 0x80, (uint32_t)r->d.desc);
    set(r, 0x84, 0);
    set(r, 0x90, (uint32_t)r->d.avail);
    set(r, 0x94, 0);
    set(r, 0xa0, (uint32_t)r->d.used);
    set(r, 0xa4, 0);
    set(r, 0x44, 1);
}

static inline void start(struct rig *r, bool packed)
{
    uint64_t accept = features(r);
    if (!packed)
        accept &= ~VIRTIO_F_PACKED;
    negotiate(r, accept & ~VIRTIO_F_EVENT_IDX);
    ck_assert_uint_eq(get(r, 0x70), 11);
    driver_init(&r->d, &r->vm.ram, packed, 64, RINGS);
    queue_set(r, 0, 64);
    ck_assert_uint_eq(get(r, 0x44), 1);
    set(r, 0x70, 15);
    ck_assert_uint_eq(get(r, 0x70), 15);
}

static inline void turn(struct rig *r)
{
    struct error err = {0};
    ck_assert_msg(!loop_turn(r->vm.loop, true, &err), "%s", err.text);
}

static inline uint32_t used_wait(struct rig *r)
{
    unsigned id;
    uint32_t len;
    while (!driver_used(&r->d, &id, &len))
        turn(r);
    return len;
}

static inline uint8_t *at(struct rig *r, uint64_t gpa)
{
    return ram_at(&r->vm.ram, gpa, 1);
}

static inline void header(struct rig *r, uint32_t type, uint64_t sector)
{
    memset(at(r, HEADER), 0, 16);
    memcpy(at(r, HEADER), &type, 4);
    memcpy(at(r, HEADER + 8), &sector, 8);
    *at(r, STATUS) = S_NONE;
}

static inline void submit(struct rig *r, uint32_t type, uint64_t sector, uint64_t gpa, uint32_t len)
{
    bool write = type == T_IN || type == T_GET_ID;
    const struct buffer b[] = {{HEADER, 16, false}, {gpa, len, write}, {STATUS, 1, true}};
    const struct buffer none[] = {b[0], b[2]};
    header(r, type, sector);
    ck_assert_int_ge(driver_add(&r->d, len ? b : none, len ? 3 : 2, 0), 0);
    set(r, 0x50, 0);
}

static inline uint8_t request(struct rig *r, uint32_t type, uint64_t sector, uint64_t gpa,
                              uint32_t len)
{
    submit(r, type, sector, gpa, len);
    used_wait(r);
    return *at(r, STATUS);
}

static inline bool filled(struct rig *r, uint64_t gpa, uint8_t value, size_t len)
{
    const uint8_t *p = at(r, gpa);
    for (size_t i = 0; i < len; i++)
        if (p[i] != value)
            return false;
    return true;
}

static inline void image_read(struct rig *r, uint64_t offset, void *data, size_t len)
{
    int fd = open(r->path, O_RDONLY);
    ck_assert_int_eq(pread(fd, data, len, (off_t)offset), (int)len);
    close(fd);
}
