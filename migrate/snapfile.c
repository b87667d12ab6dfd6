// SPDX-License-Identifier: Apache-2.0
// Opening a snapshot file with its parents, and finding and reading pages in them.
#include "migrate/snapfile.h"

#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <stdio.h>
#include <string.h>

#include "migrate/crc32c.h"
#include "migrate/snapfile_level.h"

// --- opening one file

static int read_at(int fd, void *data, size_t len, uint64_t at, const char *path, struct error *err)
{
    char *p = data;
    while (len) {
        ssize_t n = pread(fd, p, len, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_errno(err, "snapshot %s: reading at byte %llu", path,
                               (unsigned long long)at);
        if (!n)
            return error_set(err, -ENODATA, "%s: ends at byte %llu", path, (unsigned long long)at);
        p += n;
        at += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

static const char *section_name(uint32_t type)
{
    static const char *const names[SNAPFILE_SECTIONS] = {NULL, "machine", "state", "disks",
                                                         "index"};
    return names[type];
}

static int section_read(struct snapfile_level *l, const struct snapfile_place *place,
                        struct error *err)
{
    uint8_t *data = malloc(place->len ? place->len : 1);
    if (!data)
        return error_set(err, -ENOMEM, "%s: no memory for a section of %llu bytes", l->path,
                         (unsigned long long)place->len);
    l->sections[place->type] = data;
    l->section_len[place->type] = place->len;
    int ret = read_at(l->fd, data, place->len, place->offset, l->path, err);
    if (!ret && crc32c(0, data, place->len) != place->crc)
        ret = error_set(err, -EBADMSG, "%s: %s section damaged (checksum; bytes %llu to %llu)",
                        l->path, section_name(place->type), (unsigned long long)place->offset,
                        (unsigned long long)(place->offset + place->len - 1));
    return ret;
}

// Packed chunks fill the data from end to end; mapped ones lie where their pages do.
static int check_chunks(const struct snapfile_level *l, uint64_t *pages, struct error *err)
{
    const struct snapfile_header *h = &l->header;
    const bool packed = h->layout == SNAPFILE_PACKED;
    uint64_t at = h->data_offset, end = h->data_offset + h->data_bytes;
    *pages = 0;
    for (uint32_t i = 0; i < h->nr_chunks; i++) {
        const struct snapfile_chunk *c = &l->chunks[i];
        uint64_t raw = c->pages * PAGE_SIZE;
        bool lz4 = c->kind == CHUNK_LZ4 && h->compress == SNAPFILE_LZ4;
        bool place = packed ? c->offset == at : c->offset >= at && c->offset % PAGE_SIZE == 0;
        if (!c->pages || c->pages > SNAPFILE_CHUNK_PAGES || c->reserved || !c->len ||
            !(lz4 ? c->len < raw : c->kind == CHUNK_RAW && c->len == raw) || !place ||
            !range_within(c->offset, c->len, end))
            return error_set(err, -EPROTO,
                             "%s: index: chunk %u (%u pages, kind %u, %u bytes at %llu) cannot be",
                             l->path, i, c->pages, c->kind, c->len, (unsigned long long)c->offset);
        at = c->offset + c->len;
        *pages += c->pages;
    }
    if (packed && at != end)
        return error_set(err, -EPROTO, "%s: index: chunks end at byte %llu of %llu", l->path,
                         (unsigned long long)at, (unsigned long long)end);
    return 0;
}

static bool run_fits(const struct snapfile_level *l, const struct snapfile_run *run,
                     uint64_t *slots)
{
    const struct snapfile_header *h = &l->header;
    if (run->chunk == RUN_ZERO)
        return h->kind == SNAPFILE_DIFF && !run->slot;
    if (run->chunk >= h->nr_chunks)
        return false;
    const struct snapfile_chunk *c = &l->chunks[run->chunk];
    if (!range_within(run->slot, run->count, c->pages))
        return false;
    uint64_t mask = (run->count < 64 ? (1ull << run->count) - 1 : UINT64_MAX) << run->slot;
    if (slots[run->chunk] & mask)
        return false; // two pages in one slot
    slots[run->chunk] |= mask;
    return h->layout == SNAPFILE_PACKED ||
           c->offset + run->slot * PAGE_SIZE == h->data_offset + run->page * PAGE_SIZE;
}

// Runs ascend, lie inside memory, and use each slot of each chunk once.
static int check_runs(const struct snapfile_level *l, uint64_t chunk_pages, struct error *err)
{
    const struct snapfile_header *h = &l->header;
    autofree uint64_t *slots = calloc(h->nr_chunks ? h->nr_chunks : 1, sizeof(*slots));
    uint64_t next = 0, data = 0, zero = 0;
    if (!slots)
        return error_set(err, -ENOMEM, "%s: no memory to check its index", l->path);
    for (uint32_t i = 0; i < h->nr_runs; i++) {
        const struct snapfile_run *run = &l->runs[i];
        if (!run->count || run->page < next || !range_within(run->page, run->count, h->pages) ||
            !run_fits(l, run, slots))
            return error_set(err, -EPROTO,
                             "%s: index: run %u (pages %u + %u, chunk %u, slot %u) cannot be",
                             l->path, i, run->page, run->count, run->chunk, run->slot);
        next = (uint64_t)run->page + run->count;
        *(run->chunk == RUN_ZERO ? &zero : &data) += run->count;
    }
    if (data != chunk_pages || data != h->data_pages || zero != h->zero_pages)
        return error_set(err, -EPROTO,
                         "%s: index: %llu + %llu pages, its chunks have %llu, the header says "
                         "%llu + %llu",
                         l->path, (unsigned long long)data, (unsigned long long)zero,
                         (unsigned long long)chunk_pages, (unsigned long long)h->data_pages,
                         (unsigned long long)h->zero_pages);
    return 0;
}

static int level_read(struct snapfile_level *l, struct error *err)
{
    const struct snapfile_header *h = &l->header;
    uint64_t pages;
    int ret = 0;
    for (uint32_t i = 0; i < h->nr_sections && !ret; i++)
        ret = section_read(l, &h->sections[i], err);
    if (ret)
        return ret;
    l->chunks = l->sections[SNAPFILE_INDEX];
    l->runs = (struct snapfile_run *)(l->chunks + h->nr_chunks);
    ret = check_chunks(l, &pages, err);
    return ret ? ret : check_runs(l, pages, err);
}

static int level_open(struct snapfile_level *l, int dir_fd, const char *name, const char *path,
                      struct error *err)
{
    l->path = strdup(path);
    if (!l->path)
        return error_set(err, -ENOMEM, "no memory for a snapshot");
    l->fd = snapfile_header_read(dir_fd, name, path, &l->header, err);
    if (l->fd < 0)
        return l->fd;
    snapfile_header_info(&l->header, &l->info);
    return level_read(l, err);
}

static void level_close(struct snapfile_level *l)
{
    for (unsigned i = 0; i < SNAPFILE_SECTIONS; i++)
        free(l->sections[i]);
    if (l->fd >= 0)
        close(l->fd);
    free(l->path);
}

// --- the chain

static int check_link(const struct snapfile *f, unsigned n, struct error *err)
{
    const struct snapfile_level *child = &f->levels[n - 1], *parent = &f->levels[n];
    for (unsigned i = 0; i < n; i++)
        if (!memcmp(f->levels[i].header.id, parent->header.id, SNAPFILE_ID_LEN))
            return error_set(err, -ELOOP, "%s: its chain of parents is a circle through %s",
                             f->levels[0].path, parent->path);
    if (memcmp(child->header.parent_id, parent->header.id, SNAPFILE_ID_LEN))
        return error_set(err, -ESTALE, "%s: needs its parent %s as it was; that file is another",
                         child->path, parent->path);
    if (child->header.pages != parent->header.pages)
        return error_set(err, -EPROTO, "%s: of %llu pages, its parent %s of %llu", child->path,
                         (unsigned long long)child->header.pages, parent->path,
                         (unsigned long long)parent->header.pages);
    return 0;
}

static int chain_open(struct snapfile *f, const char *path, struct error *err)
{
    struct snapfile_path place;
    char full[sizeof(place.dir) + SNAPFILE_NAME_MAX + 1];
    int ret = snapfile_path_open(&place, path, err);
    if (ret)
        return ret;
    const char *name = place.name;
    snprintf(full, sizeof(full), "%s", path);
    for (;;) {
        struct snapfile_level *l = &f->levels[f->depth++];
        l->fd = -1;
        ret = level_open(l, place.dir_fd, name, full, err);
        if (ret && f->depth > 1)
            error_prefix(err, "%s needs its parent", f->levels[f->depth - 2].path);
        if (!ret && f->depth > 1)
            ret = check_link(f, f->depth - 1, err);
        if (ret || l->header.kind == SNAPFILE_FULL)
            break;
        if (f->depth == SNAPFILE_DEPTH_MAX) {
            ret = error_set(err, -E2BIG, "%s: its chain is longer than %u files", path,
                            SNAPFILE_DEPTH_MAX);
            break;
        }
        name = l->header.parent;
        snprintf(full, sizeof(full), "%s/%s", place.dir, name);
    }
    snapfile_path_close(&place);
    return ret;
}

int snapfile_open(struct snapfile **out, const char *path, struct error *err)
{
    *out = NULL;
    struct snapfile *f = calloc(1, sizeof(*f));
    if (!f)
        return error_set(err, -ENOMEM, "no memory for a snapshot");
    int ret = chain_open(f, path, err);
    // A parent may just have been merged into its child: the child is another file now.
    for (unsigned again = 0; ret == -ENOENT && f->depth && again < 3; again++) {
        while (f->depth)
            level_close(&f->levels[--f->depth]);
        ret = chain_open(f, path, err);
    }
    if (ret)
        snapfile_close(f);
    else
        *out = f;
    return ret;
}

void snapfile_close(struct snapfile *f)
{
    if (!f)
        return;
    while (f->depth)
        level_close(&f->levels[--f->depth]);
    free(f);
}

const struct snapfile_info *snapfile_info(const struct snapfile *f)
{
    return &f->levels[0].info;
}

unsigned snapfile_depth(const struct snapfile *f)
{
    return f->depth;
}

const struct snapfile_info *snapfile_level(const struct snapfile *f, unsigned n, const char **path)
{
    if (path)
        *path = f->levels[n].path;
    return &f->levels[n].info;
}

const void *snapfile_section(const struct snapfile *f, enum snapfile_section section, size_t *len)
{
    *len = f->levels[0].section_len[section];
    return f->levels[0].sections[section];
}

// --- finding

// The first run that ends behind the page: it has it, or begins later; nr_runs: none.
static uint32_t run_at(const struct snapfile_level *l, uint64_t page)
{
    uint32_t low = 0, high = l->header.nr_runs;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if ((uint64_t)l->runs[middle].page + l->runs[middle].count > page)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static void limit(uint64_t *value, uint64_t most)
{
    *value = *value < most ? *value : most;
}

// Raw data goes on in the next run if that lies behind it in memory and in the file.
static uint64_t raw_count(const struct snapfile_level *l, uint32_t run, uint64_t page,
                          uint64_t offset, uint64_t most)
{
    uint64_t count = 0;
    for (; run < l->header.nr_runs && count < most; run++) {
        const struct snapfile_run *r = &l->runs[run];
        if (r->chunk == RUN_ZERO || l->chunks[r->chunk].kind != CHUNK_RAW)
            break;
        uint64_t at = l->chunks[r->chunk].offset + r->slot * PAGE_SIZE;
        if (count && (r->page != page + count || at != offset + count * PAGE_SIZE))
            break;
        count += count ? r->count : r->page + r->count - page;
    }
    return count < most ? count : most;
}

static void where_fill(const struct snapfile_level *l, uint32_t run, uint64_t page, uint64_t before,
                       uint64_t count, struct snapfile_where *where)
{
    const struct snapfile_run *r = &l->runs[run];
    where->fd = l->fd;
    where->chunk = r->chunk;
    limit(&before, page - r->page);
    where->before = before;
    where->count = count;
    limit(&where->count, r->page + r->count - page);
    if (r->chunk == RUN_ZERO) {
        where->kind = SNAPFILE_ZERO;
        return;
    }
    const struct snapfile_chunk *c = &l->chunks[r->chunk];
    where->slot = r->slot + (uint32_t)(page - r->page);
    where->pages = c->pages;
    where->len = c->len;
    where->offset = c->offset;
    where->kind = SNAPFILE_CHUNK;
    if (c->kind == CHUNK_RAW) {
        where->kind = SNAPFILE_RAW;
        where->offset += where->slot * PAGE_SIZE;
        where->count = raw_count(l, run, page, where->offset, count);
    }
}

void snapfile_find(const struct snapfile *f, uint64_t page, struct snapfile_where *where)
{
    uint64_t before = page, count = f->levels[0].header.pages - page;
    *where = (struct snapfile_where) {.kind = SNAPFILE_ZERO, .fd = -1, .chunk = RUN_ZERO};
    for (unsigned n = 0; n < f->depth; n++) {
        const struct snapfile_level *l = &f->levels[n];
        uint32_t run = run_at(l, page);
        where->level = n;
        if (run < l->header.nr_runs && l->runs[run].page <= page) {
            where_fill(l, run, page, before, count, where);
            return;
        }
        if (run < l->header.nr_runs)
            limit(&count, l->runs[run].page - page);
        if (run)
            limit(&before, page - l->runs[run - 1].page - l->runs[run - 1].count);
    }
    where->before = before;
    where->count = count;
}

// --- reading

int snapfile_chunk_unpack(const struct snapfile_level *l, uint32_t chunk, const void *data,
                          void *dst, struct error *err)
{
    const struct snapfile_chunk *c = &l->chunks[chunk];
    if (snapfile_sum(data, c->len) != c->sum)
        return snapfile_chunk_damaged(l, chunk, "checksum", err);
    if (c->kind == CHUNK_RAW) {
        if (dst != data)
            memcpy(dst, data, c->len);
        return 0;
    }
    int raw = (int)(c->pages * PAGE_SIZE);
    if (LZ4_decompress_safe(data, dst, (int)c->len, raw) != raw)
        return snapfile_chunk_damaged(l, chunk, "LZ4 data", err);
    return 0;
}

int snapfile_chunk_damaged(const struct snapfile_level *l, uint32_t chunk, const char *what,
                           struct error *err)
{
    const struct snapfile_chunk *c = &l->chunks[chunk];
    uint64_t page = 0;
    for (uint32_t i = 0; i < l->header.nr_runs; i++)
        if (l->runs[i].chunk == chunk && !l->runs[i].slot)
            page = l->runs[i].page;
    return error_set(
        err, -EBADMSG, "%s: chunk %u damaged (%s; bytes %llu to %llu, %u pages from page %llu on)",
        l->path, chunk, what, (unsigned long long)c->offset,
        (unsigned long long)(c->offset + c->len - 1), c->pages, (unsigned long long)page);
}

int snapfile_chunk_read(const struct snapfile_level *l, uint32_t chunk, void *scratch, void *dst,
                        struct error *err)
{
    const struct snapfile_chunk *c = &l->chunks[chunk];
    void *to = c->kind == CHUNK_RAW ? dst : scratch;
    int ret = read_at(l->fd, to, c->len, c->offset, l->path, err);
    return ret ? ret : snapfile_chunk_unpack(l, chunk, to, dst, err);
}

int snapfile_chunk(const struct snapfile *f, unsigned level, uint32_t chunk, void *dst,
                   struct error *err)
{
    const struct snapfile_level *l = &f->levels[level];
    autofree void *scratch = malloc(l->chunks[chunk].len);
    if (!scratch)
        return error_set(err, -ENOMEM, "%s: no memory for a chunk", l->path);
    return snapfile_chunk_read(l, chunk, scratch, dst, err);
}

int snapfile_read(const struct snapfile *f, uint64_t first, uint64_t count, void *dst,
                  struct error *err)
{
    autofree uint8_t *pages = NULL, *scratch = NULL;
    uint8_t *to = dst;
    unsigned have_level = UINT32_MAX;
    uint32_t have_chunk = 0;
    if (!range_within(first, count, f->levels[0].header.pages))
        return error_set(err, -ERANGE, "%s: pages %llu + %llu are not in it", f->levels[0].path,
                         (unsigned long long)first, (unsigned long long)count);
    while (count) {
        struct snapfile_where where;
        snapfile_find(f, first, &where);
        uint64_t n = where.count < count ? where.count : count;
        if (where.kind == SNAPFILE_RAW) // one chunk at a time: the sum is the chunk's
            limit(&n, where.pages - where.slot);
        if (where.kind == SNAPFILE_ZERO) {
            memset(to, 0, n * PAGE_SIZE);
        } else {
            if (!pages && (!(pages = malloc(SNAPFILE_CHUNK_PAGES * PAGE_SIZE)) ||
                           !(scratch = malloc(SNAPFILE_CHUNK_PAGES * PAGE_SIZE))))
                return error_set(err, -ENOMEM, "no memory to read a snapshot");
            if (have_level != where.level || have_chunk != where.chunk) {
                int ret =
                    snapfile_chunk_read(&f->levels[where.level], where.chunk, scratch, pages, err);
                if (ret)
                    return ret;
                have_level = where.level;
                have_chunk = where.chunk;
            }
            memcpy(to, pages + where.slot * PAGE_SIZE, n * PAGE_SIZE);
        }
        first += n;
        count -= n;
        to += n * PAGE_SIZE;
    }
    return 0;
}
