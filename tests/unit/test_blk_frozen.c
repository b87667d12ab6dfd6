// SPDX-License-Identifier: Apache-2.0
// A copy of an overlay as it was at one instant, while a guest writes, zeroes and discards all over
// the disk.
#include <pthread.h>
#include <sys/mman.h>

#include "devices/blk_frozen.h"
#include "tests/unit/blk_rig.h"
#include "vmm/disk.h"

enum { DISK = SECTORS * BLK_SECTOR, ROUNDS = 60, LONG_ROUNDS = 2000 };

struct scene {
    struct rig *r;
    char overlay[80], copy[80];
    uint8_t *then; // the disk at the instant
    unsigned seed;
};

static unsigned draw(struct scene *s, unsigned below)
{
    return (unsigned)rand_r(&s->seed) % below;
}

static void disk_read(struct rig *r, uint8_t *out)
{
    for (unsigned at = 0; at < DISK; at += 64 * 1024) {
        ck_assert_uint_eq(request(r, T_IN, at / BLK_SECTOR, DATA, 64 * 1024), S_OK);
        memcpy(out + at, ram_at(&r->vm.ram, DATA, 64 * 1024), 64 * 1024);
    }
}

// Any change that a guest can make; the base has other bytes everywhere.
static void change(struct scene *s)
{
    struct rig *r = s->r;
    unsigned sectors = 1 + draw(s, 3) * draw(s, 60), first = draw(s, SECTORS - sectors);
    if (draw(s, 2)) { // whole clusters
        sectors = (sectors + 7) / 8 * 8;
        first = first / 8 * 8;
        first = first + sectors > SECTORS ? SECTORS - sectors : first;
    }
    unsigned kind = draw(s, 8);
    if (kind < 6) {
        memset(ram_at(&r->vm.ram, DATA, sectors * BLK_SECTOR), (int)draw(s, 256),
               sectors * BLK_SECTOR);
        ck_assert_uint_eq(request(r, T_OUT, first, DATA, sectors * BLK_SECTOR), S_OK);
        return;
    }
    const struct {
        uint64_t sector;
        uint32_t sectors, flags;
    } range = {first, sectors, 0};
    memcpy(at(r, DATA), &range, sizeof(range));
    ck_assert_uint_eq(request(r, kind == 6 ? T_DISCARD : T_ZEROES, 0, DATA, sizeof(range)), S_OK);
}

static void scene_open(struct scene *s, unsigned seed)
{
    char text[256];
    struct error err;
    *s = (struct scene) {.r = rig_new(), .then = malloc(DISK), .seed = seed};
    image_create(s->r);
    snprintf(s->overlay, sizeof(s->overlay), "%s.o", s->r->path);
    snprintf(s->copy, sizeof(s->copy), "%s.c", s->r->path);
    snprintf(text, sizeof(text), "%s,overlay=%s", s->r->path, s->overlay);
    ck_assert_msg(!rig_try(s->r, text, &err), "%s", err.text);
    start(s->r, false);
    for (unsigned i = 0; i < 40; i++)
        change(s);
    disk_read(s->r, s->then);
}

static void scene_close(struct scene *s)
{
    unlink(s->overlay);
    unlink(s->copy);
    rig_free(s->r);
    free(s->then);
}

static void copy_check(struct scene *s)
{
    char text[256];
    autofree uint8_t *got = malloc(DISK);
    snprintf(text, sizeof(text), "%s,ro,overlay=%s", s->r->path, s->copy);
    struct rig *r = rig_open(text);
    start(r, false);
    disk_read(r, got);
    rig_free(r);
    unsigned i = 0;
    while (i < DISK && got[i] == s->then[i])
        i++;
    ck_assert_msg(i == DISK, "byte %u: %02x, expected %02x", i, got[i % DISK], s->then[i % DISK]);
}

static void *steps(void *arg)
{
    struct error err = {0};
    int more;
    while ((more = blk_frozen_step(arg, &err)) > 0)
        ;
    ck_assert_msg(!more, "%s", err.text);
    return NULL;
}

// _i: alternating with the guest's requests; beside them, in another thread.
START_TEST(as_it_was)
{
    struct scene s;
    struct blk_frozen *f, *another;
    struct error err = {0};
    pthread_t thread;
    scene_open(&s, (unsigned)_i + 1);
    int to = open(s.copy, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    struct device *dev = disk_of_overlay(&s.r->vm, s.overlay);
    ck_assert_ptr_eq(dev, s.r->dev);
    ck_assert_ptr_null(disk_of_overlay(&s.r->vm, s.r->path));
    virtio_blk_class.disk->settle(dev);
    ck_assert_msg(!virtio_blk_class.disk->freeze(dev, to, &f, &err), "%s", err.text);
    ck_assert_int_eq(virtio_blk_class.disk->freeze(dev, to, &another, &err), -EBUSY);
    if (_i % 2)
        ck_assert(!pthread_create(&thread, NULL, steps, f));
    unsigned changes = _i < 2 ? 3 : getenv("FERRY_LONG") ? LONG_ROUNDS : ROUNDS;
    for (unsigned i = 0; i < changes; i++) {
        change(&s);
        if (!(_i % 2) && !draw(&s, 8))
            ck_assert_int_ge(blk_frozen_step(f, &err), 0);
    }
    // It grows; what was there is copied all the same.
    ck_assert_msg(!virtio_blk_class.set(dev, "size", "2M", &err), "%s", err.text);
    ck_assert_uint_eq(request(s.r, T_OUT, SECTORS - 8, DATA, 16 * BLK_SECTOR), S_OK);
    if (_i % 2)
        pthread_join(thread, NULL);
    else
        steps(f);
    virtio_blk_class.disk->freeze_end(dev, f);
    close(to);
    copy_check(&s);
    // Afterwards nobody is told any more.
    change(&s);
    copy_check(&s);
    scene_close(&s);
}
END_TEST

// The guest's disk is good, whatever becomes of the copy.
START_TEST(no_room)
{
    struct scene s;
    struct blk_frozen *f;
    struct error err = {0};
    scene_open(&s, 7);
    int to = memfd_create("copy", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert(!fcntl(to, F_ADD_SEALS, F_SEAL_WRITE));
    ck_assert_msg(!virtio_blk_class.disk->freeze(s.r->dev, to, &f, &err), "%s", err.text);
    for (unsigned i = 0; i < 50; i++)
        change(&s);
    ck_assert_int_eq(blk_frozen_step(f, &err), -EPERM);
    ck_assert_ptr_nonnull(strstr(err.text, "copying an overlay"));
    ck_assert_int_eq(blk_frozen_step(f, &err), -EPERM);
    virtio_blk_class.disk->freeze_end(s.r->dev, f);
    close(to);
    change(&s);
    scene_close(&s);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("blk_frozen");
    TCase *tc = tcase_create("blk_frozen");
    tcase_set_timeout(tc, 600);
    tcase_add_loop_test(tc, as_it_was, 0, 6);
    tcase_add_test(tc, no_room);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
