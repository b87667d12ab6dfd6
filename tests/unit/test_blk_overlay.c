// SPDX-License-Identifier: Apache-2.0
// Copy-on-write overlays: the disk against a model, crashes and power cuts, hostile files. Power
// cuts and answers in any order come from a FUSE file (fuse_disk.h); without one they are skipped.
#include "devices/blk_overlay.h"
#include "tests/unit/blk_rig.h"
#include "tests/unit/fuse_disk.h"

#include <zlib.h>

enum { SLOTS = 16, SLOT_HEADER = 0x280000, SLOT_DATA = 0x500000, SLOT_BYTES = 0x10000 };
enum { DISK_SECTORS = 2048, DISK_BYTES = DISK_SECTORS * 512 };

// --- several requests at once

struct slot {
    uint32_t type;
    uint64_t sector;
    uint32_t sectors;
    bool active;
};

static uint64_t slot_header(unsigned i)
{
    return SLOT_HEADER + 256 * i;
}

static uint64_t slot_data(unsigned i)
{
    return SLOT_DATA + SLOT_BYTES * i;
}

static void slot_submit(struct rig *r, unsigned i, const struct slot *s)
{
    uint64_t h = slot_header(i);
    memset(at(r, h), 0, 32);
    memcpy(at(r, h), &s->type, 4);
    *at(r, h + 63) = S_NONE;
    struct buffer b[] = {
        {h, 16, false}, {slot_data(i), s->sectors * 512, s->type == T_IN}, {h + 63, 1, true}};
    if (s->type == T_FLUSH) {
        b[1] = b[2];
    } else if (s->type == T_IN || s->type == T_OUT) {
        memcpy(at(r, h + 8), &s->sector, 8);
    } else {
        memcpy(at(r, h + 16), &s->sector, 8);
        memcpy(at(r, h + 24), &s->sectors, 4);
        b[1] = (struct buffer) {h + 16, 16, false};
    }
    ck_assert_int_ge(driver_add(&r->d, b, s->type == T_FLUSH ? 2 : 3, 0), 0);
}

static uint8_t slot_status(struct rig *r, unsigned i)
{
    return *at(r, slot_header(i) + 63);
}

// --- a model of the disk

struct model {
    uint8_t now[DISK_BYTES];
    uint8_t flushed[DISK_BYTES]; // at the last flush that was answered
    uint8_t base[DISK_BYTES];
    bool dirty[DISK_SECTORS]; // changed since
    unsigned seed;
};

static unsigned pick(struct model *m, unsigned n)
{
    return (unsigned)rand_r(&m->seed) % n;
}

// Up to SLOTS requests on sectors of their own (the order of overlapping ones is nobody's to say),
// crowded, so that they share clusters.
static unsigned batch_make(struct model *m, struct slot slots[SLOTS])
{
    bool taken[DISK_SECTORS] = {0};
    unsigned n = 0, around = pick(m, DISK_SECTORS);
    for (unsigned tries = 0; tries < 24 && n < SLOTS; tries++) {
        static const uint32_t types[] = {T_IN, T_OUT, T_OUT, T_OUT, T_IN, T_ZEROES, T_DISCARD};
        struct slot s = {.type = types[pick(m, ARRAY_SIZE(types))], .active = true};
        s.sector = (around + pick(m, 80)) % DISK_SECTORS;
        s.sectors = 1 + pick(m, pick(m, 2) ? 9 : 60);
        if (s.type == T_DISCARD) { // of whole clusters: then all of it reads as zeroes
            s.sector &= ~7ull;
            s.sectors = (s.sectors + 7) & ~7u;
        }
        if (s.sector + s.sectors > DISK_SECTORS)
            continue;
        bool meets = false;
        for (uint32_t i = 0; i < s.sectors; i++)
            meets |= taken[s.sector + i];
        if (meets)
            continue;
        for (uint32_t i = 0; i < s.sectors; i++)
            taken[s.sector + i] = true;
        slots[n++] = s;
    }
    return n;
}

static void batch_apply(struct rig *r, struct model *m, const struct slot *slots, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        const struct slot *s = &slots[i];
        if (slot_status(r, i) != S_OK)
            ck_abort_msg("type %u at %lu+%u: status %u", s->type, s->sector, s->sectors,
                         slot_status(r, i));
        uint8_t *place = m->now + s->sector * 512;
        if (s->type == T_IN) {
            for (uint32_t k = 0; k < s->sectors; k++)
                if (memcmp(at(r, slot_data(i) + 512 * k), place + 512 * k, 512))
                    ck_abort_msg("read of %lu+%u: sector %lu differs", s->sector, s->sectors,
                                 s->sector + k);
            continue;
        }
        if (s->type == T_OUT)
            memcpy(place, at(r, slot_data(i)), s->sectors * 512);
        else
            memset(place, 0, s->sectors * 512);
        for (uint32_t k = 0; k < s->sectors; k++)
            m->dirty[s->sector + k] = true;
    }
}

static void batch_run(struct rig *r, struct model *m, const struct slot *slots, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        if (slots[i].type == T_OUT)
            for (unsigned k = 0; k < slots[i].sectors * 512; k += 4) {
                uint32_t value = (uint32_t)rand_r(&m->seed);
                memcpy(at(r, slot_data(i) + k), &value, 4);
            }
        slot_submit(r, i, &slots[i]);
    }
    set(r, 0x50, 0);
    for (unsigned i = 0; i < n; i++)
        used_wait(r);
    batch_apply(r, m, slots, n);
}

static void flush(struct rig *r, struct model *m)
{
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_OK);
    memcpy(m->flushed, m->now, DISK_BYTES);
    memset(m->dirty, 0, sizeof(m->dirty));
}

static void check_all(struct rig *r, const uint8_t *expected)
{
    for (uint64_t sector = 0; sector < DISK_SECTORS; sector += 64) {
        ck_assert_uint_eq(request(r, T_IN, sector, DATA, 64 * 512), S_OK);
        for (unsigned k = 0; k < 64; k++)
            if (memcmp(at(r, DATA + 512 * k), expected + (sector + k) * 512, 512))
                ck_abort_msg("sector %lu differs", sector + k);
    }
}

struct files {
    char base[64], overlay[64], text[256];
};

static struct model *model_new(struct files *f, unsigned seed)
{
    struct model *m = calloc(1, sizeof(*m));
    m->seed = seed;
    strcpy(f->base, "/tmp/ferry-base-XXXXXX");
    int fd = mkstemp(f->base);
    ck_assert_int_ge(fd, 0);
    for (unsigned i = 0; i < DISK_BYTES; i++)
        m->base[i] = (uint8_t)(i / 512 * 3 + i % 512 + 1);
    memset(m->base + 64 * 512, 0, 64 * 512);
    ck_assert(!write_all(fd, m->base, DISK_BYTES));
    // A hole, where the contents are zero.
    ck_assert(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 64 * 512, 64 * 512));
    close(fd);
    memcpy(m->now, m->base, DISK_BYTES);
    memcpy(m->flushed, m->base, DISK_BYTES);
    snprintf(f->overlay, sizeof(f->overlay), "%s.overlay", f->base);
    return m;
}

static struct rig *files_open(struct files *f, const char *overlay, const char *options)
{
    snprintf(f->text, sizeof(f->text), "%s,overlay=%s%s", f->base, overlay, options);
    return rig_open(f->text);
}

static void files_end(struct files *f, struct model *m)
{
    uint8_t *now = malloc(DISK_BYTES);
    int fd = open(f->base, O_RDONLY);
    ck_assert_int_eq(pread(fd, now, DISK_BYTES, 0), DISK_BYTES);
    ck_assert_msg(!memcmp(now, m->base, DISK_BYTES), "the base was written to");
    close(fd);
    free(now);
    unlink(f->base);
    unlink(f->overlay);
    free(m);
}

// --- the disk

// Ring formats and ways to the file give the same answers to the same requests.
START_TEST(overlay_is_a_disk)
{
    static const char *const options[] = {"", ",cached", ",packed", ",cached,packed"};
    struct files f;
    struct model *m = model_new(&f, 7);
    for (unsigned life = 0; life < 3; life++) {
        struct rig *r = files_open(&f, f.overlay, options[_i]);
        start(r, _i >= 2);
        check_all(r, m->now);
        for (unsigned i = 0; i < 40; i++) {
            struct slot slots[SLOTS];
            batch_run(r, m, slots, batch_make(m, slots));
            if (!pick(m, 8))
                flush(r, m);
        }
        check_all(r, m->now);
        rig_free(r); // without a flush: a clean end keeps what was written all the same
    }
    files_end(&f, m);
}
END_TEST

// A discard zeroes whole clusters, and leaves alone those that it covers in part: of one, of two.
START_TEST(discards_keep_their_edges)
{
    struct files f;
    struct model *m = model_new(&f, 7);
    struct rig *r = files_open(&f, f.overlay, "");
    start(r, false);
    const struct slot rows[] = {{T_DISCARD, 1, 3, true},   {T_DISCARD, 12, 8, true},
                                {T_DISCARD, 33, 30, true}, {T_DISCARD, 201, 7, true},
                                {T_DISCARD, 215, 1, true}, {T_DISCARD, DISK_SECTORS - 9, 9, true}};
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        slot_submit(r, 0, &rows[i]);
        set(r, 0x50, 0);
        used_wait(r);
        ck_assert_uint_eq(slot_status(r, 0), S_OK);
    }
    memset(m->now + 40 * 512, 0, 16 * 512);
    memset(m->now + (DISK_SECTORS - 8) * 512, 0, 8 * 512);
    check_all(r, m->now);
    rig_free(r);
    files_end(&f, m);
}
END_TEST

// The same log through both rings, on a raw image and through an overlay: one image.
START_TEST(one_log_one_image)
{
    uint8_t *images[3];
    for (unsigned way = 0; way < 3; way++) {
        struct files f;
        struct model *m = model_new(&f, 21);
        struct rig *r = way == 2 ? files_open(&f, f.overlay, ",packed") : NULL;
        snprintf(f.text, sizeof(f.text), "%s%s", f.base, way ? ",packed" : "");
        if (!r)
            r = rig_open(f.text);
        start(r, way != 0);
        for (unsigned i = 0; i < 60; i++) {
            struct slot slots[SLOTS];
            batch_run(r, m, slots, batch_make(m, slots));
        }
        check_all(r, m->now);
        images[way] = malloc(DISK_BYTES);
        memcpy(images[way], m->now, DISK_BYTES);
        rig_free(r);
        if (way != 2) { // the file itself
            uint8_t *now = malloc(DISK_BYTES);
            int fd = open(f.base, O_RDONLY);
            ck_assert_int_eq(pread(fd, now, DISK_BYTES, 0), DISK_BYTES);
            ck_assert(!memcmp(now, m->now, DISK_BYTES));
            close(fd);
            free(now);
            memcpy(m->base, m->now, DISK_BYTES);
        }
        files_end(&f, m);
    }
    ck_assert(!memcmp(images[0], images[1], DISK_BYTES));
    ck_assert(!memcmp(images[0], images[2], DISK_BYTES));
    for (unsigned way = 0; way < 3; way++)
        free(images[way]);
}
END_TEST

// Requests that share clusters, answered by the storage in any order. Fails without `conflict`
// (copies overwrite what others wrote), with copies that leave out what is before the write, or
// when a cluster counts as present before its data is there.
START_TEST(any_order_of_answers)
{
    struct fuse_disk *d = fuse_disk_new(0);
    if (!d) {
        printf("no FUSE here: skipped\n");
        return;
    }
    struct files f;
    struct model *m = model_new(&f, (unsigned)_i + 100);
    struct rig *r = files_open(&f, d->path, "");
    start(r, false);
    atomic_store(&d->shuffle, true);
    for (unsigned i = 0; i < 40; i++) {
        struct slot slots[SLOTS];
        batch_run(r, m, slots, batch_make(m, slots));
    }
    atomic_store(&d->shuffle, false);
    check_all(r, m->now);
    rig_free(r);
    fuse_disk_free(d);
    files_end(&f, m);
}
END_TEST

// --- crashes

// Every sector of the overlay in `path` is what was flushed or, where it was written to since,
// something that was written or stood there.
static void check_crashed(struct files *f, struct model *m, const char *path)
{
    struct rig *r = files_open(f, path, "");
    start(r, false);
    for (uint64_t sector = 0; sector < DISK_SECTORS; sector++) {
        if (sector % 64 == 0)
            ck_assert_uint_eq(request(r, T_IN, sector, DATA, 64 * 512), S_OK);
        const uint8_t *p = at(r, DATA + sector % 64 * 512), *old = m->flushed + sector * 512;
        if (!memcmp(p, old, 512))
            continue;
        ck_assert_msg(m->dirty[sector], "sector %lu: a flush was answered", sector);
        ck_assert_msg(!memcmp(p, m->now + sector * 512, 512) ||
                          !memcmp(p, m->base + sector * 512, 512),
                      "sector %lu: nobody wrote that", sector);
    }
    rig_free(r);
}

static void file_write(const char *path, const uint8_t *data, size_t len)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ck_assert_int_ge(fd, 0);
    ck_assert(!write_all(fd, data, len));
    close(fd);
}

// The VMM is killed: what it wrote is there, what it had in memory is not. Fails when a flush does
// not write the table.
START_TEST(killed)
{
    struct files f;
    struct model *m = model_new(&f, 3);
    struct rig *r = files_open(&f, f.overlay, "");
    char copy[80];
    snprintf(copy, sizeof(copy), "%s.copy", f.overlay);
    start(r, false);
    for (unsigned i = 0; i < 30; i++) {
        // One change of a sector between flushes, so that the model knows all it may hold.
        struct slot slots[SLOTS];
        batch_run(r, m, slots, batch_make(m, slots));
        if (pick(m, 2))
            flush(r, m);
        uint8_t *image = malloc(DISK_MAX);
        int fd = open(f.overlay, O_RDONLY | O_CLOEXEC);
        ssize_t n = pread(fd, image, DISK_MAX, 0);
        ck_assert_int_gt(n, DISK_BYTES);
        close(fd);
        file_write(copy, image, (size_t)n);
        free(image);
        check_crashed(&f, m, copy);
        flush(r, m);
    }
    unlink(copy);
    rig_free(r);
    files_end(&f, m);
}
END_TEST

static bool keeps_none(const struct disk_write *w, void *arg)
{
    return false;
}

static bool keeps_table(const struct disk_write *w, void *arg)
{
    return w->offset + w->len <= *(uint64_t *)arg;
}

static bool keeps_some(const struct disk_write *w, void *arg)
{
    return rand() & 1;
}

static void check_power_cut(struct fuse_disk *d, struct files *f, struct model *m,
                            bool (*keeps)(const struct disk_write *, void *), uint64_t data_offset)
{
    uint64_t size;
    char copy[80];
    uint8_t *image = disk_power_cut(d, &size, keeps, &data_offset);
    snprintf(copy, sizeof(copy), "%s.cut", f->overlay);
    file_write(copy, image, size);
    free(image);
    check_crashed(f, m, copy);
    unlink(copy);
}

// The power goes: of what was not synced anything may be there. Fails when the table is written
// before the sync of the data, or when the second sync is missing.
START_TEST(power_cut)
{
    struct fuse_disk *d = fuse_disk_new(0);
    if (!d) {
        printf("no FUSE here: skipped\n");
        return;
    }
    struct files f;
    struct model *m = model_new(&f, 5);
    struct rig *r = files_open(&f, d->path, "");
    uint64_t data_offset = d->size - DISK_BYTES;
    start(r, false);
    for (unsigned i = 0; i < 20; i++) {
        struct slot slots[SLOTS];
        batch_run(r, m, slots, batch_make(m, slots));
        check_power_cut(d, &f, m, keeps_none, data_offset);
        check_power_cut(d, &f, m, keeps_table, data_offset);
        check_power_cut(d, &f, m, keeps_some, data_offset);
        // In the midst of a flush, before each of its syncs.
        atomic_store(&d->hold_sync, true);
        submit(r, T_FLUSH, 0, 0, 0);
        turn(r);
        disk_wait_held(d, r->vm.loop, FUSE_FSYNC, 1);
        check_power_cut(d, &f, m, keeps_table, data_offset);
        check_power_cut(d, &f, m, keeps_some, data_offset);
        unsigned id;
        uint32_t len;
        ck_assert(!driver_used(&r->d, &id, &len));
        atomic_store(&d->hold_sync, false);
        used_wait(r);
        ck_assert_uint_eq(*at(r, STATUS), S_OK);
        memcpy(m->flushed, m->now, DISK_BYTES);
        memset(m->dirty, 0, sizeof(m->dirty));
        check_power_cut(d, &f, m, keeps_none, data_offset);
        check_power_cut(d, &f, m, keeps_some, data_offset);
    }
    rig_free(r);
    fuse_disk_free(d);
    files_end(&f, m);
}
END_TEST

// A flush that arrives while another is running is not answered with that one: what was written
// between them is not yet safe.
START_TEST(flush_during_a_flush)
{
    struct fuse_disk *d = fuse_disk_new(0);
    if (!d) {
        printf("no FUSE here: skipped\n");
        return;
    }
    struct files f;
    struct model *m = model_new(&f, 5);
    struct rig *r = files_open(&f, d->path, "");
    start(r, false);
    const struct slot first = {.type = T_OUT, .sector = 8, .sectors = 8};
    const struct slot second = {.type = T_OUT, .sector = 16, .sectors = 8};
    const struct slot sync = {.type = T_FLUSH};
    batch_run(r, m, &first, 1);
    atomic_store(&d->hold_below, d->size - DISK_BYTES); // the table
    slot_submit(r, 1, &sync);
    set(r, 0x50, 0);
    disk_wait_held(d, r->vm.loop, FUSE_WRITE, 1);
    batch_run(r, m, &second, 1);
    for (unsigned i = 2; i < 6; i++)
        slot_submit(r, i, &sync);
    set(r, 0x50, 0);
    turn(r);
    atomic_store(&d->hold_below, 0);
    for (unsigned i = 0; i < 5; i++)
        used_wait(r);
    for (unsigned i = 1; i < 6; i++)
        ck_assert_uint_eq(slot_status(r, i), S_OK);
    memcpy(m->flushed, m->now, DISK_BYTES);
    memset(m->dirty, 0, sizeof(m->dirty));
    check_power_cut(d, &f, m, keeps_none, 0);
    rig_free(r);
    fuse_disk_free(d);
    files_end(&f, m);
}
END_TEST

// --- the file

static void overlay_refused(struct files *f, int code, const char *text)
{
    struct rig *r = rig_new();
    struct error err = {0};
    snprintf(f->text, sizeof(f->text), "%s,overlay=%s", f->base, f->overlay);
    int ret = rig_try(r, f->text, &err);
    ck_assert_msg(ret == code && strstr(err.text, text), "%d '%s': expected %d '%s'", ret, err.text,
                  code, text);
    rig_free(r);
}

static void overlay_write(struct files *f, uint64_t offset, const void *data, size_t len)
{
    int fd = open(f->overlay, O_RDWR | O_CLOEXEC);
    ck_assert_int_eq(pwrite(fd, data, len, (off_t)offset), (int)len);
    close(fd);
}

// Writes a field and the checksum that goes with it.
static void header_set(struct files *f, unsigned offset, uint64_t value, unsigned size)
{
    uint8_t h[64];
    int fd = open(f->overlay, O_RDWR | O_CLOEXEC);
    ck_assert_int_eq(pread(fd, h, sizeof(h), 0), sizeof(h));
    memcpy(h + offset, &value, size);
    memset(h + 52, 0, 4);
    uint32_t crc = (uint32_t)crc32(0, h, sizeof(h));
    memcpy(h + 52, &crc, 4);
    ck_assert_int_eq(pwrite(fd, h, sizeof(h), 0), sizeof(h));
    close(fd);
}

// Each row expects the words of its own check, so one that is missing is noticed; nine of them were
// taken out to see that.
START_TEST(hostile_header)
{
    const struct {
        unsigned offset, size;
        uint64_t value;
        int code;
        const char *text;
    } rows[] = {
        {0, 8, 0, -EBADMSG, "not an overlay"},
        {8, 4, 2, -EPROTONOSUPPORT, "version 2"},
        {12, 4, 512, -EBADMSG, "clusters of 512"},
        {16, 4, 2, -EBADMSG, "flags 2"},
        {16, 4, 1, -EROFS, "frozen"},
        {24, 8, 0, -EBADMSG, "a disk of 0 bytes"},
        {24, 8, 513, -EBADMSG, "a disk of 513"},
        {24, 8, UINT64_MAX & ~511ull, -EBADMSG, "a disk of"},
        {24, 8, (8ull << 40) + 512, -EBADMSG, "a disk of"},
        {24, 8, 8ull << 40, -EBADMSG, "behind the table"},
        {24, 8, DISK_BYTES + 512, -EBADMSG, "cut off"},
        {24, 8, DISK_BYTES - 512, -EBADMSG, "a disk of"}, // shorter than its base
        {32, 8, DISK_BYTES - 512, -ESTALE, "base was changed"},
        {20, 4, 1, -ESTALE, "base was changed"},
        {40, 8, 1, -ESTALE, "base was changed"},
        {48, 4, 1, -ESTALE, "base was changed"},
        {56, 8, 0, -EBADMSG, "behind the table"},
        {56, 8, 4096, -EBADMSG, "behind the table"},
        {56, 8, 8192 + 512, -EBADMSG, "behind the table"},
        {56, 8, UINT64_MAX & ~4095ull, -EBADMSG, "behind the table"},
        {56, 8, 1ull << 40, -EBADMSG, "cut off"},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct files f;
        struct model *m = model_new(&f, 1);
        rig_free(files_open(&f, f.overlay, ""));
        header_set(&f, rows[i].offset, rows[i].value, rows[i].size);
        overlay_refused(&f, rows[i].code, rows[i].text);
        files_end(&f, m);
    }
    struct files f;
    struct model *m = model_new(&f, 1);
    rig_free(files_open(&f, f.overlay, ""));
    overlay_write(&f, 24, "\1", 1); // without its checksum
    overlay_refused(&f, -EBADMSG, "checksum");
    ck_assert(!truncate(f.overlay, 100));
    overlay_refused(&f, -EBADMSG, "100 bytes: not an overlay");
    // Something else that stands at that name is left alone.
    overlay_write(&f, 0, m->base, 4096);
    overlay_refused(&f, -EBADMSG, "not an overlay");
    files_end(&f, m);
}
END_TEST

// Whatever the table says, the bytes are those of this disk's places.
START_TEST(hostile_table)
{
    struct files f;
    struct model *m = model_new(&f, 9);
    rig_free(files_open(&f, f.overlay, ""));
    uint8_t page[4096];
    memset(page, 0xff, sizeof(page)); // far more bits than the disk has clusters
    overlay_write(&f, 4096, page, sizeof(page));
    struct rig *r = files_open(&f, f.overlay, "");
    start(r, false);
    memset(m->now, 0, DISK_BYTES); // nothing was ever written there
    check_all(r, m->now);
    for (unsigned i = 0; i < 20; i++) {
        struct slot slots[SLOTS];
        batch_run(r, m, slots, batch_make(m, slots));
    }
    check_all(r, m->now);
    rig_free(r);
    files_end(&f, m);
}
END_TEST

START_TEST(changed_base_is_refused)
{
    struct files f;
    struct model *m = model_new(&f, 1);
    rig_free(files_open(&f, f.overlay, ""));
    struct stat st;
    ck_assert(!stat(f.base, &st));
    const struct timespec touched[] = {st.st_atim, {st.st_mtim.tv_sec, st.st_mtim.tv_nsec ^ 1}};
    ck_assert(!utimensat(AT_FDCWD, f.base, touched, 0));
    overlay_refused(&f, -ESTALE, "its base was changed");
    const struct timespec back[] = {st.st_atim, st.st_mtim};
    ck_assert(!utimensat(AT_FDCWD, f.base, back, 0));
    rig_free(files_open(&f, f.overlay, ""));
    ck_assert(!truncate(f.base, DISK_BYTES - 512));
    overlay_refused(&f, -ESTALE, "its base was changed");
    ck_assert(!truncate(f.base, DISK_BYTES));
    int fd = open(f.base, O_WRONLY | O_CLOEXEC);
    ck_assert_int_eq(pwrite(fd, m->base + DISK_BYTES - 512, 512, DISK_BYTES - 512), 512);
    uint8_t other = (uint8_t)~m->base[100];
    ck_assert_int_eq(pwrite(fd, &other, 1, 100), 1);
    close(fd);
    ck_assert(!utimensat(AT_FDCWD, f.base, back, 0)); // somebody hides it
    overlay_refused(&f, -ESTALE, "its base was changed");
    memcpy(m->base + 100, &other, 1);
    files_end(&f, m);
}
END_TEST

// Base shared with readers, overlay with nobody.
START_TEST(locks)
{
    struct files f;
    struct model *m = model_new(&f, 1);
    struct rig *r = files_open(&f, f.overlay, "");
    overlay_refused(&f, -EBUSY, "another VM");
    char second[80];
    snprintf(second, sizeof(second), "%s.2", f.overlay);
    struct rig *r2 = files_open(&f, second, ""); // the same base
    struct rig *r3 = rig_new();
    struct error err = {0};
    ck_assert_int_eq(rig_try(r3, f.base, &err), -EBUSY); // nobody may write it
    rig_free(r3);
    rig_free(r2);
    rig_free(r);
    r = rig_open(f.base); // somebody writes the base
    overlay_refused(&f, -EBUSY, "writes to it");
    rig_free(r);
    unlink(second);
    files_end(&f, m);
}
END_TEST

START_TEST(frozen)
{
    struct files f;
    struct model *m = model_new(&f, 2);
    struct rig *r = files_open(&f, f.overlay, "");
    start(r, false);
    for (unsigned i = 0; i < 10; i++) {
        struct slot slots[SLOTS];
        batch_run(r, m, slots, batch_make(m, slots));
    }
    rig_free(r);
    struct blk_image base;
    struct blk_overlay o;
    struct error err = {0};
    struct blk_image_mode mode = {.read_only = true};
    ck_assert(!blk_image_open(&base, f.base, &mode, &err));
    mode.read_only = false;
    ck_assert(!blk_overlay_open(&o, f.overlay, &mode, &base, false, &err));
    bool present = true;
    uint64_t place = 0; // of a cluster that would be lost if freezing did not sync
    while (blk_overlay_run(&o, place, 4096, &present), present)
        place += 4096;
    blk_overlay_set(&o, place, 4096);
    memset(m->now + place, 0x3c, 4096);
    ck_assert_int_eq(pwrite(o.file.fd, m->now + place, 4096, (off_t)(o.data_offset + place)), 4096);
    ck_assert_msg(!blk_overlay_freeze(&o, &err), "%s", err.text);
    blk_overlay_close(&o);
    blk_image_close(&base);
    overlay_refused(&f, -EROFS, "frozen");
    struct rig *a = files_open(&f, f.overlay, ",ro");
    struct rig *b = files_open(&f, f.overlay, ",ro"); // readers share it
    start(a, false);
    start(b, false);
    check_all(a, m->now);
    check_all(b, m->now);
    ck_assert_uint_eq(request(a, T_OUT, 0, DATA, 512), S_IOERR);
    rig_free(a);
    rig_free(b);
    files_end(&f, m);
}
END_TEST

static void json_is(struct rig *r, const char *key, json_int_t value)
{
    json_t *out = json_object();
    virtio_blk_class.show(r->dev, out);
    json_int_t is = json_integer_value(json_object_get(out, key));
    ck_assert_msg(is == value, "%s: %lld, expected %lld", key, is, value);
    json_decref(out);
}

// Grown, the disk reads as zeroes where there is no base, in the midst of a cluster, too.
START_TEST(grows)
{
    struct files f;
    struct model *m = model_new(&f, 2);
    ck_assert(!truncate(f.base, DISK_BYTES - 512)); // ends within a cluster
    struct rig *r = files_open(&f, f.overlay, "");
    struct error err = {0};
    start(r, false);
    ck_assert_int_eq(virtio_blk_class.set(r->dev, "shrink", "512K", &err), -EINVAL);
    ck_assert_int_eq(virtio_blk_class.set(r->dev, "size", "512K", &err), -EINVAL);
    ck_assert_int_eq(virtio_blk_class.set(r->dev, "size", "100T", &err), -EFBIG);
    ck_assert_int_eq(virtio_blk_class.set(r->dev, "size", "100G", &err), -EFBIG);
    json_is(r, "size", DISK_BYTES - 512);
    memset(at(r, DATA), 0x77, 512);
    ck_assert_uint_eq(request(r, T_OUT, DISK_SECTORS - 2, DATA, 512), S_OK); // its last sector
    for (unsigned i = 0; i < 2; i++) {
        ck_assert_msg(!virtio_blk_class.set(r->dev, "size", i ? "8G" : "1M", &err), "%s", err.text);
        json_is(r, "size", i ? 8ll << 30 : 1 << 20);
        memset(at(r, DATA), 0x55, 2048);
        ck_assert_uint_eq(request(r, T_IN, DISK_SECTORS - 2, DATA, 1024), S_OK);
        ck_assert(filled(r, DATA, 0x77, 512));
        ck_assert(filled(r, DATA + 512, 0, 512));
    }
    uint64_t last = (8ull << 30) / 512 - 1;
    ck_assert_uint_eq(request(r, T_OUT, last, DATA, 512), S_OK);
    ck_assert_uint_eq(request(r, T_FLUSH, 0, 0, 0), S_OK);
    rig_free(r);
    r = files_open(&f, f.overlay, "");
    start(r, false);
    ck_assert_uint_eq(request(r, T_IN, last, DATA, 512), S_OK);
    ck_assert(filled(r, DATA, 0x77, 512));
    ck_assert_uint_eq(request(r, T_IN, last - 1, DATA, 512), S_OK);
    ck_assert(filled(r, DATA, 0, 512));
    ck_assert_uint_eq(request(r, T_IN, DISK_SECTORS - 2, DATA, 512), S_OK);
    ck_assert(filled(r, DATA, 0x77, 512));
    rig_free(r);
    ck_assert(!truncate(f.base, DISK_BYTES));
    int fd = open(f.base, O_WRONLY | O_CLOEXEC);
    ck_assert_int_eq(pwrite(fd, m->base + DISK_BYTES - 512, 512, DISK_BYTES - 512), 512);
    close(fd);
    files_end(&f, m);
}
END_TEST

// An overlay goes to another process with the saved state: its table is in the file then.
START_TEST(moves)
{
    struct files f;
    struct model *m = model_new(&f, 2);
    struct rig *a = files_open(&f, f.overlay, ""), *b = rig_new();
    struct virtio_blk_config config;
    struct stream_mem mem, in;
    struct error err = {0};
    ck_assert(!virtio_blk_parse(f.text, &config, &err));
    config.attach.arrives = true;
    const struct virtio_mmio_place place = {.base = BASE, .wiring = &wiring};
    config.attach.transport = &virtio_mmio_transport;
    config.attach.place = &place;
    ck_assert_msg(!device_add(&b->vm, &virtio_blk_class, &config, &b->dev, &err), "%s", err.text);
    start(a, false);
    for (unsigned i = 0; i < 10; i++) {
        struct slot slots[SLOTS];
        batch_run(a, m, slots, batch_make(m, slots));
    }
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
    check_all(b, m->now);
    a->vm.log.fd = open("/dev/null", O_WRONLY | O_CLOEXEC); // it says so
    virtio_blk_class.resume(a->dev);
    ck_assert_uint_eq(request(a, T_OUT, 0, DATA, 512), S_IOERR);
    close(a->vm.log.fd);
    rig_free(a);
    check_all(b, m->now);
    rig_free(b);
    files_end(&f, m);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("blk_overlay");
    TCase *tc = tcase_create("disk");
    tcase_set_timeout(tc, 100);
    tcase_add_loop_test(tc, overlay_is_a_disk, 0, 4);
    tcase_add_test(tc, discards_keep_their_edges);
    tcase_add_test(tc, one_log_one_image);
    tcase_add_loop_test(tc, any_order_of_answers, 0, 4);
    tcase_add_test(tc, killed);
    tcase_add_test(tc, power_cut);
    tcase_add_test(tc, flush_during_a_flush);
    suite_add_tcase(suite, tc);
    tc = tcase_create("file");
    tcase_set_timeout(tc, 100);
    tcase_add_test(tc, hostile_header);
    tcase_add_test(tc, hostile_table);
    tcase_add_test(tc, changed_base_is_refused);
    tcase_add_test(tc, locks);
    tcase_add_test(tc, frozen);
    tcase_add_test(tc, grows);
    tcase_add_test(tc, moves);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
