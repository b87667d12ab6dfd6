// SPDX-License-Identifier: Apache-2.0
// The device core, the virtio-mmio registers, the block device and the entropy device, driven as a
// guest does, on real files, with the loop but without KVM. That the tests notice a missing guard
// was checked by taking each out; where one stands behind another (an empty transfer, status bits
// taken back, a write to a read-only image) the second still gives the right answer.
#include "devices/blk_engine.h"
#include "devices/virtio_rng.h"
#include "tests/unit/blk_rig.h"

// --- requests

START_TEST(read_and_write)
{
    static const char *const options[] = {"", ",cached", ",packed", ",cached,packed"};
    struct rig *r = rig_blk(options[_i]);
    start(r, _i >= 2);
    ck_assert_uint_eq(request(r, T_IN, 3, DATA, 4096), S_OK);
    for (unsigned i = 0; i < 8; i++)
        ck_assert(filled(r, DATA + 512 * i, (uint8_t)((3 + i) * 7 + 1), 512));
    ck_assert_uint_eq(request(r, T_IN, 8, DATA + 1, 512), S_OK); // not aligned for O_DIRECT
    ck_assert(filled(r, DATA + 1, 57, 512));
    memset(at(r, DATA), 0xa5, 8192);
    ck_assert_uint_eq(request(r, T_OUT, 16, DATA, 8192), S_OK);
    ck_assert_uint_eq(request(r, T_OUT, SECTORS - 1, DATA + 3, 512), S_OK);
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_OK);
    uint8_t data[8192];
    image_read(r, 16 * 512, data, 8192);
    ck_assert(!memcmp(data, at(r, DATA), 8192));
    image_read(r, (SECTORS - 1) * 512, data, 512);
    ck_assert_uint_eq(data[511], 0xa5);
    rig_free(r);
}
END_TEST

// The driver acknowledges by an event, which the device sees when it next looks: what is
// acknowledged is gone, and what came after stays. Fails when the device does not look before a new
// interrupt (the second request's is lost), or when the status is read.
START_TEST(acknowledged_without_exit)
{
    const uint64_t one = 1;
    struct rig *r = rig_blk("");
    start(r, false);
    ck_assert_int_ge(r->ack, 0);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    ck_assert_uint_eq(get(r, 0x60), 1);
    ck_assert_uint_eq(get(r, 0x60), 1); // it stays until it is acknowledged
    ck_assert_int_eq(write(r->ack, &one, sizeof(one)), sizeof(one));
    ck_assert_uint_eq(get(r, 0x60), 0);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    ck_assert_int_eq(write(r->ack, &one, sizeof(one)), sizeof(one)); // nobody looks at it ...
    ck_assert_uint_eq(request(r, T_IN, 1, DATA, 512), S_OK);         // ... but for this one
    ck_assert_uint_eq(get(r, 0x60), 1);
    set(r, 0x64, 1); // an exit does as well
    ck_assert_uint_eq(get(r, 0x60), 0);
    rig_free(r);
}
END_TEST

START_TEST(discard_and_zeroes)
{
    struct rig *r = rig_blk("");
    start(r, false);
    const struct {
        uint32_t type, flags;
        uint64_t sector;
        uint32_t sectors, len;
        uint8_t status;
    } rows[] = {
        {T_ZEROES, 0, 8, 16, 16, S_OK},
        {T_ZEROES, 1, 64, 16, 16, S_OK},
        {T_ZEROES, 2, 0, 8, 16, S_UNSUPP},
        {T_DISCARD, 0, 128, 8, 16, S_OK},
        {T_DISCARD, 1, 0, 8, 16, S_UNSUPP},
        {T_DISCARD, 0, SECTORS, 8, 16, S_IOERR},
        {T_DISCARD, 0, UINT64_MAX, 8, 16, S_IOERR},
        {T_ZEROES, 0, SECTORS - 1, 2, 16, S_IOERR},
        {T_ZEROES, 0, 0, UINT32_MAX, 16, S_IOERR},
        {T_ZEROES, 0, 0, 0, 16, S_IOERR},
        {T_ZEROES, 0, 0, 8, 32, S_IOERR},
        {T_ZEROES, 0, 0, 8, 8, S_IOERR},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        memset(at(r, DATA), 0, 64);
        memcpy(at(r, DATA), &rows[i].sector, 8);
        memcpy(at(r, DATA + 8), &rows[i].sectors, 4);
        memcpy(at(r, DATA + 12), &rows[i].flags, 4);
        uint8_t status = request(r, rows[i].type, 0, DATA, rows[i].len);
        ck_assert_msg(status == rows[i].status, "row %u: status %u", i, status);
    }
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 128 * 512), S_OK);
    ck_assert(filled(r, DATA + 8 * 512, 0, 16 * 512));
    ck_assert(filled(r, DATA + 64 * 512, 0, 16 * 512));
    ck_assert(filled(r, DATA + 7 * 512, 50, 512));
    ck_assert(filled(r, DATA + 24 * 512, 169, 512));
    rig_free(r);
}
END_TEST

// Several segments in one request: all or, when one of them is bad, none.
START_TEST(segments)
{
    struct rig *r = rig_blk("");
    start(r, false);
    struct {
        uint64_t sector;
        uint32_t sectors, flags;
    } s[BLK_RANGES_MAX + 1];
    for (unsigned i = 0; i < BLK_RANGES_MAX + 1; i++) {
        s[i].sector = 16 * i;
        s[i].sectors = 1 + i;
        s[i].flags = i & 1;
    }
    memcpy(at(r, DATA), s, sizeof(s));
    ck_assert_uint_eq(request(r, T_ZEROES, 0, DATA, sizeof(s)), S_IOERR); // one too many
    s[3].flags = 2;
    memcpy(at(r, DATA), s, sizeof(s));
    ck_assert_uint_eq(request(r, T_ZEROES, 0, DATA, sizeof(s) - 16), S_UNSUPP);
    s[3].flags = 0;
    s[7].sector = SECTORS;
    memcpy(at(r, DATA), s, sizeof(s));
    ck_assert_uint_eq(request(r, T_ZEROES, 0, DATA, sizeof(s) - 16), S_IOERR);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA + 4096, 512), S_OK);
    ck_assert(filled(r, DATA + 4096, 1, 512));
    s[7].sector = 16 * 7;
    memcpy(at(r, DATA), s, sizeof(s));
    ck_assert_uint_eq(request(r, T_ZEROES, 0, DATA, sizeof(s) - 16), S_OK);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA + 4096, BLK_RANGES_MAX * 16 * 512), S_OK);
    for (unsigned i = 0; i < BLK_RANGES_MAX * 16; i++) {
        bool zeroed = i % 16 < 1 + i / 16;
        ck_assert(filled(r, DATA + 4096 + 512 * i, zeroed ? 0 : (uint8_t)(i * 7 + 1), 512));
    }
    rig_free(r);
}
END_TEST

START_TEST(bad_requests_get_errors)
{
    struct rig *r = rig_blk(",serial=abc");
    start(r, false);
    const struct {
        uint32_t type;
        uint64_t sector;
        uint32_t len;
        uint8_t status;
    } rows[] = {
        {T_IN, SECTORS - 1, 512, S_OK},
        {T_IN, SECTORS - 1, 1024, S_IOERR},
        {T_IN, SECTORS, 512, S_IOERR},
        {T_IN, UINT64_MAX, 512, S_IOERR},
        {T_IN, UINT64_MAX / 512 + 1, 512, S_IOERR}, // sector * 512 wraps to 0
        {T_OUT, UINT64_MAX / 512 + 1, 512, S_IOERR},
        {T_OUT, SECTORS, 512, S_IOERR},
        {T_IN, 0, 511, S_IOERR},
        {T_OUT, 0, 513, S_IOERR},
        {T_IN, 0, 0, S_IOERR},
        {T_GET_ID, 0, 20, S_OK},
        {T_GET_ID, 0, 19, S_IOERR},
        {99, 0, 512, S_UNSUPP},
        {T_IN, 0, 512, S_OK},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        uint8_t status = request(r, rows[i].type, rows[i].sector, DATA, rows[i].len);
        ck_assert_msg(status == rows[i].status, "row %u: status %u", i, status);
        if (rows[i].type == T_GET_ID && status == S_OK)
            ck_assert(!memcmp(at(r, DATA), "abc\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20));
    }
    ck_assert_uint_eq(get(r, 0x70), 15);
    struct stat st;
    ck_assert(!stat(r->path, &st));
    ck_assert_int_eq(st.st_size, SECTORS * 512);
    rig_free(r);
}
END_TEST

// No place for the status, or no header: nobody can answer that. The device asks for a reset, once,
// and works again after it.
START_TEST(unanswerable_requests_break_the_queue)
{
    struct rig *r = rig_blk("");
    const struct buffer header_only[] = {{HEADER, 16, false}};
    const struct buffer short_header[] = {{HEADER, 15, false}, {STATUS, 1, true}};
    const struct buffer no_header[] = {{STATUS, 1, true}};
    const struct {
        const struct buffer *b;
        unsigned n;
    } rows[] = {{header_only, 1}, {short_header, 2}, {no_header, 1}};
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        start(r, false);
        header(r, T_IN, 0);
        uint64_t ticks;
        ck_assert(read(r->irq, &ticks, 8) == 8 || errno == EAGAIN);
        ck_assert_int_ge(driver_add(&r->d, rows[i].b, rows[i].n, 0), 0);
        set(r, 0x50, 0);
        while (!(get(r, 0x70) & VIRTIO_NEEDS_RESET))
            turn(r);
        ck_assert(get(r, 0x60) & VIRTIO_ISR_CONFIG);
        ck_assert_int_eq(read(r->irq, &ticks, 8), 8);
        set(r, 0x70, 0);
        ck_assert_uint_eq(get(r, 0x70), 0);
        ck_assert_uint_eq(get(r, 0x44), 0);
    }
    start(r, false);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    rig_free(r);
}
END_TEST

START_TEST(read_only)
{
    struct rig *r = rig_blk(",ro");
    ck_assert(features(r) & 1 << 5);
    start(r, false);
    ck_assert_uint_eq(request(r, T_OUT, 0, DATA, 512), S_IOERR);
    ck_assert_uint_eq(request(r, T_DISCARD, 0, DATA, 16), S_IOERR);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_OK);
    rig_free(r);
}
END_TEST

START_TEST(truncated_underneath)
{
    static const char *const options[] = {"", ",cached"};
    struct rig *r = rig_blk(options[_i]);
    start(r, false);
    ck_assert(!truncate(r->path, 8 * 512));
    ck_assert_uint_eq(request(r, T_IN, 16, DATA, 512), S_IOERR);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 16 * 512), S_IOERR);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    rig_free(r);
}
END_TEST

// --- registers

START_TEST(status_order_and_frozen_queues)
{
    struct rig *r = rig_blk(",packed");
    set(r, 0x70, 2); // DRIVER before ACKNOWLEDGE
    ck_assert_uint_eq(get(r, 0x70), 0);
    set(r, 0x70, 4);
    ck_assert_uint_eq(get(r, 0x70), 0);
    negotiate(r, 0); // without VERSION_1
    ck_assert_uint_eq(get(r, 0x70), 3);
    set(r, 0x70, 0);
    negotiate(r, VIRTIO_F_VERSION_1 | 1ull << 60); // never offered
    ck_assert_uint_eq(get(r, 0x70), 3);
    set(r, 0x70, 15);
    ck_assert_uint_eq(get(r, 0x70), 3);
    set(r, 0x70, 0);
    driver_init(&r->d, &r->vm.ram, false, 64, RINGS);
    queue_set(r, 0, 64); // before FEATURES_OK
    ck_assert_uint_eq(get(r, 0x44), 0);
    start(r, false);
    set(r, 0x70, 11); // bits are not taken back
    ck_assert_uint_eq(get(r, 0x70), 15);
    struct virtio *v = container_of(r->dev, struct virtio, dev);
    struct virtqueue before = v->queues[0];
    r->d.desc = r->d.avail = r->d.used = 0x300000;
    queue_set(r, 0, 128);
    set(r, 0x44, 0);
    ck_assert(!memcmp(&before, &v->queues[0], sizeof(before)));
    set(r, 0x24, 0);
    set(r, 0x20, 0); // features after FEATURES_OK
    ck_assert(v->accepted & VIRTIO_F_INDIRECT);
    rig_free(r);
}
END_TEST

START_TEST(indexes_out_of_range)
{
    struct rig *r = rig_blk(",queues=3");
    static const uint32_t wrong[] = {3, 16, 0xffff, 0x10000, 0xffffffff};
    start(r, false);
    for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++) {
        set(r, 0x30, wrong[i]);
        ck_assert_uint_eq(get(r, 0x34), 0);
        ck_assert_uint_eq(get(r, 0x44), 0);
        for (uint64_t reg = 0x38; reg < 0xb0; reg += 4)
            if (reg != 0x70 && reg != 0x50)
                set(r, reg, 1);
        set(r, 0x50, wrong[i]);
        set(r, 0x14, wrong[i]);
        ck_assert_uint_eq(get(r, 0x10), 0);
    }
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    rig_free(r);
}
END_TEST

START_TEST(config_space_has_ends)
{
    struct rig *r = rig_blk(",queues=3");
    uint64_t value;
    ck_assert_uint_eq(get(r, 0x100), SECTORS);
    ck_assert(bus_read(&r->vm.mmio, BASE + 0x100 + 34, 2, &value));
    ck_assert_uint_eq(value, 3);
    static const unsigned sizes[] = {1, 2, 4, 8};
    for (unsigned s = 0; s < 4; s++)
        for (uint64_t offset = 0; offset < 0x1000; offset++) {
            bool inside = offset + sizes[s] <= 0x1000;
            ck_assert(bus_read(&r->vm.mmio, BASE + offset, sizes[s], &value) == inside);
            if (offset >= 0x100 + 60 - sizes[s] + 1 && inside)
                ck_assert_uint_eq(value, 0); // past its end, or across
            if (offset != 0x70)
                bus_write(&r->vm.mmio, BASE + offset, sizes[s], ~0ull);
        }
    ck_assert_uint_eq(get(r, 0x100), SECTORS);
    struct virtio *v = container_of(r->dev, struct virtio, dev);
    for (uint64_t offset = UINT64_MAX - 16; offset; offset++) // wraps
        ck_assert_uint_eq(virtio_config_read(v, offset, 8), 0);
    rig_free(r);
}
END_TEST

START_TEST(bad_rings_ask_for_reset)
{
    struct rig *r = rig_blk("");
    negotiate(r, VIRTIO_F_VERSION_1);
    driver_init(&r->d, &r->vm.ram, false, 256, 16 * MiB - 0x4000);
    r->d.used = 16 * MiB - 1024; // starts inside, ends outside
    queue_set(r, 0, 256);
    ck_assert_uint_eq(get(r, 0x44), 0);
    ck_assert(get(r, 0x70) & VIRTIO_NEEDS_RESET);
    set(r, 0x70, 15);
    ck_assert(get(r, 0x60) & VIRTIO_ISR_CONFIG);
    set(r, 0x50, 0);
    turn(r);
    set(r, 0x70, 0);
    start(r, false);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    rig_free(r);
}
END_TEST

// --- pause, reset, state

// I/O that is in flight when the driver resets the device has ended when the write returns.
START_TEST(reset_waits_for_io)
{
    struct rig *r = rig_blk("");
    for (unsigned round = 0; round < 50; round++) {
        start(r, round % 2 && features(r) & VIRTIO_F_PACKED);
        for (unsigned i = 0; i < 16; i++)
            submit(r, T_IN, i * 64, DATA + 0x10000 * i, 0x8000);
        turn(r);
        set(r, 0x70, 0);
        for (unsigned i = 0; i < 16; i++)
            memset(at(r, DATA + 0x10000 * i), 0xcc, 0x8000);
        for (unsigned i = 0; i < 3; i++) {
            struct error err = {0};
            loop_turn(r->vm.loop, false, &err);
        }
        for (unsigned i = 0; i < 16; i++)
            ck_assert(filled(r, DATA + 0x10000 * i, 0xcc, 0x8000));
    }
    rig_free(r);
}
END_TEST

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

// Requests before, during and after a move to another device on the same image; each is answered
// once.
START_TEST(moves_with_requests)
{
    for (int packed = 0; packed < 2; packed++) {
        struct rig *a = rig_blk(",packed"), *b = rig_new();
        struct virtio_blk_config config = {.attach.arrives = true, .queues = 1};
        struct error err = {0};
        snprintf(config.path, sizeof(config.path), "%s", a->path);
        config.attach.packed = true;
        const struct virtio_mmio_place place = {.base = BASE, .wiring = &wiring};
        config.attach.transport = &virtio_mmio_transport;
        config.attach.place = &place;
        ck_assert_msg(!device_add(&b->vm, &virtio_blk_class, &config, &b->dev, &err), "%s",
                      err.text);
        start(a, packed);
        ck_assert_uint_eq(request(a, T_IN, 1, DATA, 512), S_OK);
        for (unsigned i = 0; i < 4; i++)
            submit(a, T_OUT, 100 + i, DATA, 512);
        ck_assert_int_eq(virtio_blk_class.quiesce(a->dev, &err), 0);
        submit(a, T_OUT, 104, DATA, 512); // the doorbell nobody serves here any more
        memcpy(at(b, 0), at(a, 0), 16 * MiB);
        b->d = a->d;
        b->d.ram = &b->vm.ram;
        save_load(a, b);
        virtio_blk_class.resume(b->dev);
        for (unsigned i = 0; i < 5; i++)
            used_wait(b);
        unsigned id;
        uint32_t len;
        ck_assert(!driver_used(&b->d, &id, &len));
        ck_assert_uint_eq(request(b, T_IN, 104, DATA + 512, 512), S_OK);
        ck_assert(filled(b, DATA + 512, 8, 512));
        // The image belongs to b now: a, resumed by mistake, must not write.
        a->vm.log.fd = open("/dev/null", O_WRONLY | O_CLOEXEC); // it says so
        virtio_blk_class.resume(a->dev);
        while (driver_used(&a->d, &id, &len))
            ;
        header(a, T_OUT, 0);
        used_wait(a);
        ck_assert_uint_eq(*at(a, STATUS), S_IOERR);
        close(a->vm.log.fd);
        rig_free(b);
        rig_free(a);
    }
}
END_TEST

static struct device *disk_arriving(struct rig *r, const char *path)
{
    struct virtio_blk_config config = {.attach.arrives = true, .queues = 1};
    struct error err = {0};
    const struct virtio_mmio_place place = {.base = BASE, .wiring = &wiring};
    snprintf(config.path, sizeof(config.path), "%s", path);
    config.attach.transport = &virtio_mmio_transport;
    config.attach.place = &place;
    ck_assert_msg(!device_add(&r->vm, &virtio_blk_class, &config, &r->dev, &err), "%s", err.text);
    return r->dev;
}

static void disk_saved(struct rig *r, struct stream_mem *mem)
{
    struct error err = {0};
    ck_assert_int_eq(virtio_blk_class.quiesce(r->dev, &err), 0);
    stream_mem_writer(mem, "state", STATE_BLOB_MAX);
    ck_assert_msg(!state_save(&r->vm.state, &mem->stream, &err), "%s", err.text);
}

static int disk_loaded(struct rig *r, const struct stream_mem *mem, struct error *err)
{
    struct stream_mem in;
    stream_mem_reader(&in, "state", mem->data, mem->len);
    return state_load(&r->vm.state, &in.stream, err);
}

// A VM that wants the image for itself, at any moment of a move.
static bool stranger_gets(const char *path)
{
    struct rig *r = rig_new();
    struct error err = {0};
    bool gets = !rig_try(r, path, &err);
    ck_assert(gets || err.code == -EBUSY);
    rig_free(r);
    return gets;
}

static bool writes(struct rig *r)
{
    FILE *quiet = fopen("/dev/null", "we"); // it says that the image was taken
    r->vm.log.fd = fileno(quiet);
    virtio_blk_class.resume(r->dev);
    bool good = request(r, T_OUT, 0, DATA, 512) == S_OK;
    r->vm.log.fd = STDERR_FILENO;
    fclose(quiet);
    return good;
}

// From VM to VM, and at no moment can a third have the image, or two write to it.
START_TEST(image_is_lent)
{
    struct rig *a = rig_blk(""), *hosts[4] = {a};
    char path[64];
    struct stream_mem mem;
    struct error err = {0};
    snprintf(path, sizeof(path), "%s", a->path);
    *a->path = 0; // ours to remove
    start(a, false);
    for (unsigned i = 1; i < ARRAY_SIZE(hosts); i++) {
        struct rig *from = hosts[i - 1], *to = hosts[i] = rig_new();
        disk_arriving(to, path);
        ck_assert(!stranger_gets(path));
        disk_saved(from, &mem);
        ck_assert(!stranger_gets(path));
        ck_assert_msg(!disk_loaded(to, &mem, &err), "%s", err.text);
        stream_mem_free(&mem);
        ck_assert(!stranger_gets(path));
        memcpy(at(to, 0), at(from, 0), 16 * MiB);
        to->d = from->d;
        to->d.ram = &to->vm.ram;
        ck_assert(writes(to));
        if (i == 1) // ends; the others stay, as sources in doubt do
            rig_free(from);
        ck_assert(!stranger_gets(path));
    }
    ck_assert(!writes(hosts[1])); // a source that was told that its guest does not run elsewhere
    ck_assert(writes(hosts[3]));
    for (unsigned i = 3; i > 0; i--) {
        ck_assert(!stranger_gets(path));
        rig_free(hosts[i]);
    }
    ck_assert(stranger_gets(path));
    unlink(path);
}
END_TEST

// Wherever the destination gives up, the source takes the image back and writes.
START_TEST(image_is_taken_back)
{
    struct rig *a = rig_blk("");
    start(a, false);
    for (unsigned where = 0; where < 4; where++) {
        struct rig *b = rig_new(), *c = rig_new();
        struct stream_mem mem;
        struct error err = {0};
        disk_arriving(b, a->path);
        disk_arriving(c, a->path);
        disk_saved(a, &mem);
        if (where == 1) // it came to nothing before
            rig_free(b);
        else
            ck_assert_msg(!disk_loaded(b, &mem, &err), "%s", err.text);
        if (where == 2) { // another copy of the same state
            ck_assert_int_eq(disk_loaded(c, &mem, &err), -EBUSY);
            ck_assert_ptr_nonnull(strstr(err.text, "another VM"));
        }
        if (where == 0 || where == 2)
            rig_free(b);
        bool late = where == 3; // still there: the source must not write
        ck_assert(writes(a) == !late);
        ck_assert(!stranger_gets(a->path));
        if (late) {
            rig_free(b);
            ck_assert(!stranger_gets(a->path));
            ck_assert(writes(a));
        } else { // while the source runs nobody loads what it saved
            ck_assert_int_eq(disk_loaded(c, &mem, &err), -EBUSY);
        }
        stream_mem_free(&mem);
        rig_free(c);
    }
    rig_free(a);
}
END_TEST

START_TEST(image_is_locked)
{
    struct rig *a = rig_blk(""), *b = rig_new();
    struct error err = {0};
    struct virtio_blk_config config;
    for (int ro = 0; ro < 2; ro++) {
        char text[128];
        snprintf(text, sizeof(text), "%s%s", a->path, ro ? ",ro" : "");
        ck_assert_int_eq(virtio_blk_parse(text, &config, &err), 0);
        ck_assert_int_eq(rig_add(b, &virtio_blk_class, &config, &err), -EBUSY);
        ck_assert_ptr_nonnull(strstr(err.text, "another VM"));
    }
    rig_free(b);
    rig_free(a);
}
END_TEST

START_TEST(hostile_state)
{
    struct rig *r = rig_blk("");
    struct virtio *v = container_of(r->dev, struct virtio, dev);
    const struct state_table *table = virtio_blk_class.state;
    static const struct {
        const char *field;
        uint64_t value;
    } rows[] = {{"v.offered", 0},      {"v.offered", ~0ull},    {"v.accepted", 1},
                {"v.accepted", ~0ull}, {"v.status", 4},         {"v.status", 2},
                {"v.isr", 0x80},       {"v.saved_len", 1},      {"v.saved_len", 100},
                {"capacity", 512},     {"capacity", 1ull << 60}};
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        start(r, false);
        struct error err = {0};
        ck_assert_int_eq(table->save(r->dev, &err), 0);
        bool found = !strcmp(rows[i].field, "v.saved_len");
        if (found)
            v->saved_len = (uint32_t)rows[i].value;
        uint8_t *object = (uint8_t *)r->dev, keep[8];
        uint32_t offset = 0, size = 0;
        for (unsigned f = 0; f < table->nr_fields; f++)
            if (!found && !strcmp(table->fields[f].name, rows[i].field)) {
                offset = table->fields[f].offset;
                size = table->fields[f].size;
                memcpy(keep, object + offset, size);
                memcpy(object + offset, &rows[i].value, size);
            }
        ck_assert(found || size);
        ck_assert_msg(table->load(r->dev, 1, &err) < 0, "row %u loads", i);
        ck_assert_uint_gt(strlen(err.text), 5);
        if (!strcmp(rows[i].field, "capacity"))
            memcpy(object + offset, keep, size);
        set(r, 0x70, 0);
    }
    start(r, false);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    rig_free(r);
}
END_TEST

// What the device writes is in the dirty log, which KVM does not see.
START_TEST(device_writes_are_logged)
{
    struct rig *r = rig_blk("");
    start(r, false);
    uint64_t words = ram_bitmap_words(&r->vm.ram);
    r->vm.ram.own_dirty = calloc(words, sizeof(uint64_t));
    atomic_store(&r->vm.ram.logging, true);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA + 0x1000, 0x2000), S_OK);
    const uint64_t pages[] = {(DATA >> 12) + 1, (DATA >> 12) + 2, STATUS >> 12, r->d.used >> 12};
    for (unsigned i = 0; i < ARRAY_SIZE(pages); i++)
        ck_assert_msg(r->vm.ram.own_dirty[pages[i] / 64] >> pages[i] % 64 & 1, "page %u", i);
    ck_assert(!(r->vm.ram.own_dirty[(HEADER >> 12) / 64] >> (HEADER >> 12) % 64 & 1));
    memset((void *)r->vm.ram.own_dirty, 0, words * sizeof(uint64_t));
    ck_assert_uint_eq(request(r, T_IN, SECTORS, DATA, 512), S_IOERR);
    ck_assert(r->vm.ram.own_dirty[(STATUS >> 12) / 64] >> (STATUS >> 12) % 64 & 1);
    atomic_store(&r->vm.ram.logging, false);
    rig_free(r);
}
END_TEST

// --- the option

START_TEST(option_text)
{
    static const char *const bad[] = {
        "",           ",ro",         "a,rw",        "a,serial=",   "a,serial=123456789012345678901",
        "a,queues=0", "a,queues=17", "a,queues=-1", "a,queues=2x", "a,",
        "a,ro,"};
    struct virtio_blk_config config;
    struct error err = {0};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_msg(virtio_blk_parse(bad[i], &config, &err) == -EINVAL, "'%s'", bad[i]);
    ck_assert_int_eq(virtio_blk_parse("/x y,ro,serial=12345678901234567890,queues=16,cached,packed",
                                      &config, &err),
                     0);
    ck_assert_str_eq(config.path, "/x y");
    ck_assert_str_eq(config.serial, "12345678901234567890");
    ck_assert(config.read_only && config.cached && config.attach.packed && config.queues == 16);
}
END_TEST

START_TEST(command_line_text)
{
    char text[2 * VIRTIO_MMIO_TEXT + 1];
    const struct acpi_virtio_mmio w[] = {virtio_mmio_window(0), virtio_mmio_window(9)};
    struct error err = {0};
    ck_assert_int_eq(virtio_mmio_cmdline(w, 2, text, sizeof(text), &err), 0);
    ck_assert_str_eq(text,
                     " virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0009000:17");
    ck_assert_int_eq(virtio_mmio_cmdline(w, 2, text, 60, &err), -ENOSPC);
}
END_TEST

// --- entropy

START_TEST(rng_is_bounded)
{
    struct rig *r = rig_new();
    struct error err = {0};
    struct virtio_rng_config config = {0};
    ck_assert_msg(!rig_add(r, &virtio_rng_class, &config, &err), "%s", err.text);
    start(r, false);
    uint64_t total = 0;
    for (unsigned i = 0; i < 40; i++) { // more than a period's worth, which takes a second one
        const struct buffer b[] = {{DATA, 1 << 20, true}};
        memset(at(r, DATA), 0, 8192);
        ck_assert_int_ge(driver_add(&r->d, b, 1, 0), 0);
        set(r, 0x50, 0);
        uint32_t len = used_wait(r);
        ck_assert_uint_ge(len, 1);
        ck_assert_uint_le(len, 4096);
        if (len > 32)
            ck_assert(!filled(r, DATA, 0, len));
        ck_assert(filled(r, DATA + len, 0, 8192 - len));
        total += len;
    }
    ck_assert_uint_gt(total, RNG_BYTES);
    rig_free(r);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("virtio_blk");
    TCase *tc = tcase_create("virtio_blk");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, read_and_write, 0, 4);
    tcase_add_test(tc, acknowledged_without_exit);
    tcase_add_test(tc, discard_and_zeroes);
    tcase_add_test(tc, segments);
    tcase_add_test(tc, bad_requests_get_errors);
    tcase_add_test(tc, unanswerable_requests_break_the_queue);
    tcase_add_test(tc, read_only);
    tcase_add_loop_test(tc, truncated_underneath, 0, 2);
    tcase_add_test(tc, status_order_and_frozen_queues);
    tcase_add_test(tc, indexes_out_of_range);
    tcase_add_test(tc, config_space_has_ends);
    tcase_add_test(tc, bad_rings_ask_for_reset);
    tcase_add_test(tc, reset_waits_for_io);
    tcase_add_test(tc, moves_with_requests);
    tcase_add_test(tc, image_is_locked);
    tcase_add_test(tc, image_is_lent);
    tcase_add_test(tc, image_is_taken_back);
    tcase_add_test(tc, hostile_state);
    tcase_add_test(tc, device_writes_are_logged);
    tcase_add_test(tc, option_text);
    tcase_add_test(tc, command_line_text);
    tcase_add_test(tc, rng_is_bounded);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
