// SPDX-License-Identifier: Apache-2.0
// Storage that fails, fills up, is slow or never answers, and limits that change: what the guest is
// told, and that the VM can be paused, saved and ended as far as it may be. Faults come from a FUSE
// file (fuse_disk.h); without one those tests are skipped.
#include "tests/unit/blk_rig.h"
#include "tests/unit/fuse_disk.h"

enum { FUSE_DISK = SECTORS * 512 };

static struct fuse_disk *disk_or_skip(void)
{
    struct fuse_disk *d = fuse_disk_new(FUSE_DISK);
    if (!d)
        printf("no FUSE here: skipped\n");
    return d;
}

static struct rig *fuse_rig(struct fuse_disk *d, const char *options)
{
    char text[128];
    snprintf(text, sizeof(text), "%s%s", d->path, options);
    struct rig *r = rig_open(text);
    r->vm.log.fd = open("/dev/null", O_WRONLY | O_CLOEXEC); // faults are logged
    start(r, false);
    return r;
}

static void fuse_end(struct fuse_disk *d, struct rig *r)
{
    close(r->vm.log.fd);
    rig_free(r);
    fuse_disk_free(d);
}

static uint64_t shown(struct rig *r, const char *key)
{
    json_t *out = json_object();
    virtio_blk_class.show(r->dev, out);
    json_t *value = json_object_get(out, key);
    uint64_t n = (uint64_t)json_integer_value(value);
    ck_assert_msg(value || !strncmp(key, "b", 1) || !strncmp(key, "i", 1), "%s is not shown", key);
    json_decref(out);
    return n;
}

static void setting(struct rig *r, const char *key, const char *value, int code)
{
    struct error err = {0};
    int ret = virtio_blk_class.set(r->dev, key, value, &err);
    ck_assert_msg(ret == code, "%s=%s: %d %s", key, value, ret, err.text);
}

// Request i of several, with a header and a status of its own.
static void ask(struct rig *r, unsigned i, uint32_t type, uint64_t sector, uint64_t gpa,
                uint32_t len)
{
    uint64_t h = 0x280000 + 64 * i;
    const struct buffer b[] = {{h, 16, false}, {gpa, len, type == T_IN}, {h + 32, 1, true}};
    memset(at(r, h), 0, 16);
    memcpy(at(r, h), &type, 4);
    memcpy(at(r, h + 8), &sector, 8);
    *at(r, h + 32) = S_NONE;
    ck_assert_int_ge(driver_add(&r->d, b, 3, 0), 0);
    set(r, 0x50, 0);
}

static void answered(struct rig *r, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        ck_assert_uint_eq(*at(r, 0x280000 + 64 * i + 32), S_OK);
}

// --- errors

START_TEST(io_errors)
{
    struct fuse_disk *d = disk_or_skip();
    if (!d)
        return;
    struct rig *r = fuse_rig(d, "");
    atomic_store(&d->fail_read, EIO);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 4096), S_IOERR);
    atomic_store(&d->fail_read, 0);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 4096), S_OK);
    atomic_store(&d->fail_write, EIO);
    ck_assert_uint_eq(request(r, T_OUT, 0, DATA, 4096), S_IOERR);
    atomic_store(&d->fail_write, ENOSPC);
    ck_assert_uint_eq(request(r, T_OUT, 0, DATA, 4096), S_IOERR);
    atomic_store(&d->fail_write, 0);
    ck_assert_uint_eq(request(r, T_OUT, 0, DATA, 4096), S_OK);
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_OK);
    ck_assert_uint_eq(shown(r, "errors"), 3);
    ck_assert_uint_eq(shown(r, "reads"), 1);
    ck_assert_uint_eq(shown(r, "writes"), 1);
    ck_assert_uint_eq(shown(r, "flushes"), 1);
    fuse_end(d, r);
}
END_TEST

// After a flush that failed none is answered with success, though the disk is well again. Fails
// when flush_failed is not looked at.
START_TEST(failed_flush_is_for_good)
{
    struct fuse_disk *d = disk_or_skip();
    if (!d)
        return;
    struct rig *r = fuse_rig(d, "");
    ck_assert_uint_eq(request(r, T_OUT, 0, DATA, 4096), S_OK);
    atomic_store(&d->fail_sync, EIO);
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_IOERR);
    atomic_store(&d->fail_sync, 0);
    for (int i = 0; i < 3; i++)
        ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_IOERR);
    ck_assert_uint_eq(request(r, T_OUT, 0, DATA, 4096), S_OK);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 4096), S_OK);
    set(r, 0x70, 0); // nor after a reset
    start(r, false);
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_IOERR);
    fuse_end(d, r);
}
END_TEST

// A flush is answered after its sync, not before.
START_TEST(flush_waits_for_the_disk)
{
    struct fuse_disk *d = disk_or_skip();
    if (!d)
        return;
    struct rig *r = fuse_rig(d, "");
    unsigned id;
    uint32_t len;
    ck_assert_uint_eq(request(r, T_OUT, 0, DATA, 4096), S_OK);
    atomic_store(&d->hold_sync, true);
    submit(r, T_FLUSH, 0, 0, 0);
    turn(r);
    disk_wait_held(d, r->vm.loop, FUSE_FSYNC, 1);
    ck_assert(!driver_used(&r->d, &id, &len));
    ck_assert_uint_eq(d->log_len != 0, 1);
    atomic_store(&d->hold_sync, false);
    used_wait(r);
    ck_assert_uint_eq(*at(r, STATUS), S_OK);
    ck_assert_uint_eq(d->log_len, 0);
    fuse_end(d, r);
}
END_TEST

// A real file system that is full: raw and overlay, and what was there before stays readable.
START_TEST(disk_full)
{
    if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("none", "/mnt", "tmpfs", 0, "size=512k")) {
        printf("no mounts here: skipped\n");
        return;
    }
    char text[128] = "/mnt/disk", base[] = "/tmp/ferry-base-XXXXXX";
    int fd = _i ? mkstemp(base) : open(text, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ck_assert(!ftruncate(fd, FUSE_DISK));
    close(fd);
    if (_i)
        snprintf(text, sizeof(text), "%s,overlay=/mnt/overlay", base);
    struct rig *r = rig_open(text);
    r->vm.log.fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
    start(r, false);
    memset(at(r, DATA), 0x11, 64 * 512);
    ck_assert_uint_eq(request(r, T_OUT, 0, DATA, 64 * 512), S_OK);
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_OK);
    unsigned failed = 0;
    for (unsigned sector = 64; sector < SECTORS; sector += 64)
        failed += request(r, T_OUT, sector, DATA, 64 * 512) == S_IOERR;
    ck_assert_uint_gt(failed, 10);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA + 0x10000, 64 * 512), S_OK);
    ck_assert(filled(r, DATA + 0x10000, 0x11, 64 * 512));
    // Room again: it goes on, and an overlay's flush that had no room for its table can succeed
    // now.
    uint8_t status = request(r, T_FLUSH, 0, 0, 0);
    ck_assert(status == S_OK || _i);
    ck_assert(!mount("none", "/mnt", "tmpfs", MS_REMOUNT, "size=8m"));
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_OK);
    for (unsigned sector = 64; sector < SECTORS; sector += 64)
        ck_assert_uint_eq(request(r, T_OUT, sector, DATA, 64 * 512), S_OK);
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_OK);
    close(r->vm.log.fd);
    rig_free(r);
    if (_i)
        unlink(base);
}
END_TEST

// --- slow, and never

// Storage does not answer: the VM can be paused, but not saved; when it answers after all, each
// request is answered once. Fails without the check of `durable`; without the limit of blk_drain
// the first quiesce could not return.
START_TEST(pause_without_answers)
{
    struct fuse_disk *d = disk_or_skip();
    if (!d)
        return;
    struct rig *r = fuse_rig(d, "");
    struct error err = {0};
    struct stream_mem mem;
    atomic_store(&d->hold_read, true);
    atomic_store(&d->hold_write, true);
    for (unsigned i = 0; i < 4; i++)
        ask(r, i, i % 2 ? T_IN : T_OUT, i * 8, DATA + 0x1000 * i, 4096);
    turn(r);
    // The loop and other requests go on meanwhile.
    ck_assert_uint_eq(request(r, T_GET_ID, 0, DATA + 0x8000, 20), S_OK);
    ck_assert_uint_eq(shown(r, "in-flight"), 4);
    ck_assert_int_eq(virtio_blk_class.quiesce(r->dev, &err), 0);
    stream_mem_writer(&mem, "state", STATE_BLOB_MAX);
    ck_assert_int_eq(state_save(&r->vm.state, &mem.stream, &err), -EBUSY);
    ck_assert_ptr_nonnull(strstr(err.text, "4 requests without an answer"));
    stream_mem_free(&mem);
    virtio_blk_class.resume(r->dev);
    atomic_store(&d->hold_read, false);
    atomic_store(&d->hold_write, false);
    unsigned id;
    uint32_t len;
    for (unsigned i = 0; i < 4; i++)
        used_wait(r);
    answered(r, 4);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 4096), S_OK);
    ck_assert(!driver_used(&r->d, &id, &len));
    ck_assert_int_eq(virtio_blk_class.quiesce(r->dev, &err), 0);
    stream_mem_writer(&mem, "state", STATE_BLOB_MAX);
    ck_assert_int_eq(state_save(&r->vm.state, &mem.stream, &err), 0);
    stream_mem_free(&mem);
    ck_assert_uint_eq(d->log_len, 0); // what was answered is durable before the state is saved
    fuse_end(d, r);
}
END_TEST

// A driver that resets such a disk sees its status stay, and the old requests end before it is 0:
// none writes into memory that the driver has back. Fails when reset_or_wait does not ask `idle`.
START_TEST(reset_without_answers)
{
    struct fuse_disk *d = disk_or_skip();
    if (!d)
        return;
    struct rig *r = fuse_rig(d, "");
    memset(d->now, 0x99, FUSE_DISK);
    atomic_store(&d->hold_read, true);
    for (unsigned i = 0; i < 4; i++)
        ask(r, i, T_IN, i * 8, DATA + 0x1000 * i, 4096);
    turn(r);
    set(r, 0x70, 0);
    ck_assert_uint_ne(get(r, 0x70), 0);
    ck_assert(!(get(r, 0x70) & VIRTIO_DRIVER_OK));
    set(r, 0x70, 15);
    ck_assert(!(get(r, 0x70) & VIRTIO_DRIVER_OK));
    atomic_store(&d->hold_read, false);
    while (get(r, 0x70))
        sched_yield();
    memset(at(r, DATA), 0xcc, 0x4000);
    for (unsigned i = 0; i < 50; i++) {
        struct error err = {0};
        loop_turn(r->vm.loop, false, &err);
        usleep(1000);
    }
    ck_assert(filled(r, DATA, 0xcc, 0x4000));
    start(r, false);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 4096), S_OK);
    ck_assert(filled(r, DATA, 0x99, 4096));
    fuse_end(d, r);
}
END_TEST

// The VM can end, and the image stays locked as long as a write may still arrive.
START_TEST(end_without_answers)
{
    struct fuse_disk *d = disk_or_skip();
    if (!d)
        return;
    struct rig *r = fuse_rig(d, ""), *other;
    struct error err = {0};
    atomic_store(&d->hold_write, true);
    submit(r, T_OUT, 0, DATA, 4096);
    turn(r);
    disk_wait_held(d, r->vm.loop, FUSE_WRITE, 1);
    close(r->vm.log.fd);
    r->vm.log.fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
    struct device *dev = r->dev;
    dev->class->unrealize(dev);
    r->vm.devices = NULL;
    other = rig_new();
    ck_assert_int_eq(rig_try(other, d->path, &err), -EBUSY);
    atomic_store(&d->hold_write, false);
    int ret;
    while ((ret = rig_try(other, d->path, &err)) == -EBUSY)
        usleep(1000);
    ck_assert_int_eq(ret, 0);
    rig_free(other);
    close(r->vm.log.fd);
    fuse_disk_free(d);
    rig_free(r);
    free(dev);
}
END_TEST

// --- limits

// Requests wait in order, those of other kinds, too; pause and reset find them; a change frees
// them.
START_TEST(rate_limits)
{
    struct rig *r = rig_blk(",iops=2,packed");
    struct error err = {0};
    unsigned id, n = 0;
    uint32_t len;
    start(r, _i);
    for (unsigned i = 0; i < 8; i++)
        ask(r, i, T_IN, i, DATA + 512 * i, 512);
    while (n < 2) {
        turn(r);
        while (driver_used(&r->d, &id, &len))
            n++;
    }
    ck_assert_uint_eq(n, 2); // two at once; the next in half a second
    ck_assert_uint_eq(shown(r, "waiting"), 1);
    ck_assert_uint_eq(shown(r, "in-flight"), 0);
    ck_assert_uint_eq(shown(r, "iops"), 2);
    used_wait(r); // the timer lets one through
    ck_assert_int_eq(virtio_blk_class.quiesce(r->dev, &err), 0);
    setting(r, "iops", "1000000", 0);
    ck_assert_uint_eq(shown(r, "in-flight"), 0); // paused
    virtio_blk_class.resume(r->dev);
    for (unsigned i = 0; i < 5; i++)
        used_wait(r);
    answered(r, 8);
    for (unsigned i = 0; i < 8; i++)
        ck_assert(filled(r, DATA + 512 * i, (uint8_t)(i * 7 + 1), 512));
    // One larger than the bucket passes; the debt stops the next; a reset forgets it.
    setting(r, "iops", "0", 0);
    setting(r, "bps", "512", 0);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 1 << 20), S_OK);
    submit(r, T_IN, 0, DATA, 512);
    while (!shown(r, "waiting"))
        turn(r);
    setting(r, "bps", "x", -EINVAL);
    setting(r, "burst-ops", "5", -EINVAL);
    setting(r, "colour", "5", -ENOENT);
    ck_assert_uint_eq(shown(r, "waiting"), 1);
    set(r, 0x70, 0);
    ck_assert_uint_eq(shown(r, "waiting"), 0);
    start(r, _i);
    setting(r, "bps", "0", 0);
    ck_assert_uint_eq(request(r, T_IN, 0, DATA, 512), S_OK);
    ck_assert(!driver_used(&r->d, &id, &len));
    rig_free(r);
}
END_TEST

// A request that waits for tokens goes along with the saved state, and is answered once.
START_TEST(waiting_requests_move)
{
    struct rig *a = rig_blk(",iops=1,packed"), *b = rig_new();
    struct virtio_blk_config config = {.attach = {.arrives = true, .packed = true}, .queues = 1};
    struct error err = {0};
    struct stream_mem mem, in;
    snprintf(config.path, sizeof(config.path), "%s", a->path);
    const struct virtio_mmio_place place = {.base = BASE, .wiring = &wiring};
    config.attach.transport = &virtio_mmio_transport;
    config.attach.place = &place;
    ck_assert_msg(!device_add(&b->vm, &virtio_blk_class, &config, &b->dev, &err), "%s", err.text);
    start(a, _i);
    for (unsigned i = 0; i < 4; i++)
        ask(a, i, T_IN, i, DATA + 512 * i, 512);
    while (!shown(a, "waiting"))
        turn(a);
    ck_assert_int_eq(virtio_blk_class.quiesce(a->dev, &err), 0);
    stream_mem_writer(&mem, "state", STATE_BLOB_MAX);
    ck_assert_msg(!state_save(&a->vm.state, &mem.stream, &err), "%s", err.text);
    stream_mem_reader(&in, "state", mem.data, mem.len);
    ck_assert_msg(!state_load(&b->vm.state, &in.stream, &err), "%s", err.text);
    stream_mem_free(&mem);
    memcpy(at(b, 0), at(a, 0), 16 * MiB);
    b->d = a->d;
    b->d.ram = &b->vm.ram;
    virtio_blk_class.resume(b->dev);
    for (unsigned i = 0; i < 4; i++)
        used_wait(b);
    answered(b, 4);
    for (unsigned i = 0; i < 4; i++)
        ck_assert(filled(b, DATA + 512 * i, (uint8_t)(i * 7 + 1), 512));
    unsigned id;
    uint32_t len;
    ck_assert(!driver_used(&b->d, &id, &len));
    rig_free(b);
    rig_free(a);
}
END_TEST

// --- size

START_TEST(resize)
{
    struct rig *r = rig_blk("");
    start(r, false);
    uint64_t ticks;
    ck_assert(read(r->irq, &ticks, 8) == 8 || errno == EAGAIN);
    uint32_t generation = get(r, 0xfc);
    ck_assert_uint_eq(request(r, T_IN, SECTORS, DATA, 512), S_IOERR);
    setting(r, "size", "2M", 0);
    ck_assert_uint_eq(get(r, 0x100), 4096);
    ck_assert_uint_ne(get(r, 0xfc), generation);
    ck_assert(get(r, 0x60) & VIRTIO_ISR_CONFIG);
    ck_assert_uint_eq(request(r, T_OUT, 4095, DATA, 512), S_OK);
    struct stat st;
    ck_assert(!stat(r->path, &st));
    ck_assert_int_eq(st.st_size, 2 << 20);
    // With requests under way.
    for (unsigned i = 0; i < 16; i++)
        ask(r, i, T_IN, i * 64, DATA + 0x8000 * i, 0x8000);
    setting(r, "size", "4M", 0);
    for (unsigned i = 0; i < 16; i++)
        used_wait(r);
    answered(r, 16);
    // Grown outside: taken as it is, in part or whole, never cut off.
    ck_assert(!truncate(r->path, 8 << 20));
    setting(r, "size", "6M", 0);
    ck_assert_uint_eq(shown(r, "size"), 6 << 20);
    ck_assert(!stat(r->path, &st));
    ck_assert_int_eq(st.st_size, 8 << 20);
    setting(r, "size", "host", 0);
    ck_assert_uint_eq(shown(r, "size"), 8 << 20);
    static const char *const bad[] = {"", "0", "513", "x", "-1", "1M", "8388096", "16777215T"};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct error err = {0};
        ck_assert_int_lt(virtio_blk_class.set(r->dev, "size", bad[i], &err), 0);
        ck_assert_uint_eq(shown(r, "size"), 8 << 20);
    }
    setting(r, "shrink", "9M", -EINVAL);
    setting(r, "shrink", "1M", 0);
    ck_assert(!stat(r->path, &st));
    ck_assert_int_eq(st.st_size, 1 << 20);
    ck_assert_uint_eq(request(r, T_IN, 2047, DATA, 512), S_OK);
    ck_assert_uint_eq(request(r, T_IN, 2048, DATA, 512), S_IOERR);
    rig_free(r);

    r = rig_blk(",ro");
    setting(r, "size", "2M", -EROFS);
    setting(r, "shrink", "512K", -EROFS);
    ck_assert(!truncate(r->path, 2 << 20));
    setting(r, "size", "2M", 0);
    ck_assert_uint_eq(shown(r, "size"), 2 << 20);
    rig_free(r);
}
END_TEST

// --- O_DIRECT

// What kernels before 6.1 make us find out is what newer ones tell; half of it does not work.
START_TEST(direct_alignment)
{
    struct rig *r = rig_blk("");
    struct blk_image i;
    struct error err = {0};
    const struct blk_image_mode mode = {.read_only = true};
    rig_free(r);
    r = rig_new();
    image_create(r);
    ck_assert(!blk_image_open(&i, r->path, &mode, &err));
    if (i.direct_fd < 0) {
        printf("no O_DIRECT in /tmp: skipped\n");
    } else {
        uint32_t probed = blk_direct_probe(i.direct_fd);
        uint32_t told = i.offset_align > i.memory_align ? i.offset_align : i.memory_align;
        ck_assert_uint_eq(probed, told < 512 ? 512 : told);
    }
    int pipes[2];
    ck_assert(!pipe(pipes));
    ck_assert_uint_eq(blk_direct_probe(pipes[0]), 0); // pread fails whatever the alignment
    blk_image_close(&i);
    rig_free(r);
}
END_TEST

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    Suite *suite = suite_create("blk_faults");
    TCase *tc = tcase_create("storage");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, io_errors);
    tcase_add_test(tc, failed_flush_is_for_good);
    tcase_add_test(tc, flush_waits_for_the_disk);
    tcase_add_loop_test(tc, disk_full, 0, 2);
    tcase_add_test(tc, pause_without_answers);
    tcase_add_test(tc, reset_without_answers);
    tcase_add_test(tc, end_without_answers);
    suite_add_tcase(suite, tc);
    tc = tcase_create("limits");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, rate_limits, 0, 2);
    tcase_add_loop_test(tc, waiting_requests_move, 0, 2);
    tcase_add_test(tc, resize);
    tcase_add_test(tc, direct_alignment);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
