// SPDX-License-Identifier: Apache-2.0
// A hostile snapshot file, opened and verified as a restore does. Its sums are made right first
// (header, sections, chunks), so that the checks behind them are reached; the last byte of the
// input says which are left wrong. A diff finds a parent in the same directory: "p", full, with an
// id of zeros.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "migrate/crc32c.h"
#include "migrate/snapfile_format.h"
#include "migrate/snapshot.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SMALL = 4096 }; // pages: more are not loaded

static void chunks_repair(uint8_t *file, size_t size, const struct snapfile_header *h,
                          const struct snapfile_place *index)
{
    for (uint64_t i = 0; i < h->nr_chunks && (i + 1) * sizeof(struct snapfile_chunk) <= index->len;
         i++) {
        struct snapfile_chunk c;
        uint8_t *at = file + index->offset + i * sizeof(c);
        memcpy(&c, at, sizeof(c));
        if (!range_within(c.offset, c.len, size))
            continue;
        c.sum = snapfile_sum(file + c.offset, c.len);
        memcpy(at, &c, sizeof(c));
    }
}

static void repair(uint8_t *file, size_t size, unsigned leave)
{
    struct snapfile_header h;
    memcpy(&h, file, sizeof(h));
    memcpy(h.magic, SNAPFILE_MAGIC, sizeof(h.magic));
    h.version = SNAPFILE_VERSION;
    h.file_bytes = size;
    for (unsigned i = 0; i < ARRAY_SIZE(h.sections); i++) {
        struct snapfile_place *s = &h.sections[i];
        if (!range_within(s->offset, s->len, size))
            continue;
        if (s->type == SNAPFILE_INDEX && !(leave & 1))
            chunks_repair(file, size, &h, s);
        if (!(leave & 2))
            s->crc = crc32c(0, file + s->offset, s->len);
    }
    if (!(leave & 4))
        h.crc = snapfile_header_crc(&h);
    memcpy(file, &h, sizeof(h));
}

static void *target_at(const struct snapfile_target *target, uint64_t page, uint64_t *count)
{
    *count = SMALL - page;
    return (uint8_t *)target->context + page * PAGE_SIZE;
}

static void use(const char *path)
{
    static uint8_t memory[SMALL * PAGE_SIZE];
    const struct snapfile_target target = {.at = target_at, .context = memory};
    struct snapfile *f;
    struct snapshot_report report;
    struct error err;
    snapshot_verify(path, &report, &err);
    if (snapfile_open(&f, path, &err))
        return;
    uint64_t pages = snapfile_info(f)->pages;
    for (uint64_t page = 0, n = 0; page < pages && n < 1000; n++) {
        struct snapfile_where where;
        snapfile_find(f, page, &where);
        if (!where.count || where.count > pages - page || where.before > page)
            abort();
        page += where.count;
    }
    if (pages <= SMALL) {
        snapfile_load(f, &target, 2, &err);
        snapfile_read(f, 0, pages, memory, &err);
    }
    snapfile_close(f);
}

static void parent_make(const char *path)
{
    const struct snapfile_params params = {.layout = SNAPFILE_PACKED, .pages = SMALL, .workers = 1};
    struct snapfile_writer *w;
    struct snapfile_header h;
    uint8_t *pages = malloc(100 * PAGE_SIZE);
    memset(pages, 1, 100 * PAGE_SIZE);
    if (snapfile_create(&w, path, &params, NULL) || snapfile_add_pages(w, 0, 100, pages, NULL) ||
        snapfile_set_section(w, SNAPFILE_MACHINE, "m", 1, NULL) ||
        snapfile_set_section(w, SNAPFILE_STATE, "s", 1, NULL) || snapfile_commit(w, NULL, NULL))
        abort();
    free(pages);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || pread(fd, &h, sizeof(h), 0) != sizeof(h))
        abort();
    memset(h.id, 0, sizeof(h.id));
    h.crc = snapfile_header_crc(&h);
    if (pwrite(fd, &h, sizeof(h), 0) != sizeof(h))
        abort();
    close(fd);
}

static char dir[] = "/dev/shm/fuzz-snapshot-XXXXXX", path[64], parent[64];

static void leave(void)
{
    unlink(path);
    unlink(parent);
    rmdir(dir);
}

static void directory_make(void)
{
    if (!mkdtemp(dir))
        abort();
    atexit(leave);
    snprintf(parent, sizeof(parent), "%s/p", dir);
    parent_make(parent);
    snprintf(path, sizeof(path), "%s/a", dir);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size <= SNAPFILE_HEADER)
        return 0;
    if (!*path)
        directory_make();
    uint8_t *copy = malloc(size);
    memcpy(copy, data, size);
    repair(copy, size - 1, data[size - 1]);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || write_all(fd, copy, size - 1))
        abort();
    close(fd);
    use(path);
    free(copy);
    return 0;
}
