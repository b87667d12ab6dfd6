// SPDX-License-Identifier: Apache-2.0
#include "migrate/pages.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "migrate/crc32c.h"
#include "migrate/pack.h"
#include "vmm/bitmap.h"

// pagemap bits (Documentation/admin-guide/mm/pagemap.rst)
#define PAGEMAP_PRESENT (1ull << 63)
#define PAGEMAP_SWAPPED (1ull << 62)

#define TAKE_LOOK_MAX (64 * 1024)

// 16 bytes at a time in whatever vector registers every x86-64 has. The guest may be writing to the
// page; the dirty log then tells.
__attribute__((no_sanitize("thread"))) bool page_is_zero(const void *page)
{
    typedef uint64_t vec __attribute__((vector_size(16)));
    const vec *p = page;
    for (size_t i = 0; i < PAGE_SIZE / sizeof(*p); i += 8) {
        vec all = ((p[i] | p[i + 1]) | (p[i + 2] | p[i + 3])) |
                  ((p[i + 4] | p[i + 5]) | (p[i + 6] | p[i + 7]));
        if (all[0] | all[1])
            return false;
    }
    return true;
}

// --- presence

void page_presence_init(struct page_presence *p)
{
    *p = (struct page_presence) {.pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)};
}

void page_presence_free(struct page_presence *p)
{
    if (p->pagemap_fd >= 0)
        close(p->pagemap_fd);
    p->pagemap_fd = -1;
}

// Right for huge pages as well: they are not swapped, and mapped as long as they are in the file.
static void presence_load_anonymous(struct page_presence *p, const uint8_t *hva)
{
    uint64_t entries[512];
    ssize_t len = (ssize_t)(p->count * 8);
    if (pread(p->pagemap_fd, entries, (size_t)len, (off_t)((uintptr_t)hva / PAGE_SIZE * 8)) != len)
        return;
    for (uint64_t i = 0; i < p->count; i++)
        if (!(entries[i] & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED)))
            bitmap_set(p->absent, i);
}

// A page of a memfd may be in the file without being mapped here, so the file is asked for holes.
static void presence_load_memfd(struct page_presence *p, const struct ram *ram, const uint8_t *hva)
{
    off_t start = hva - ram->map, end = start + (off_t)(p->count * PAGE_SIZE);
    for (off_t at = start; at < end;) {
        off_t data = lseek(ram->memfd, at, SEEK_DATA);
        if (data < 0 && errno != ENXIO)
            return;
        if (data < 0 || data > end)
            data = end;
        bitmap_fill(p->absent, (uint64_t)(at - start) / PAGE_SIZE,
                    (uint64_t)(data - at) / PAGE_SIZE, true);
        if (data >= end)
            return;
        at = lseek(ram->memfd, data, SEEK_HOLE);
        if (at < 0)
            return;
    }
}

// Exact in one direction only, both: what such a page has is needed by nobody. A page touched
// after the question is in the dirty log.
static bool page_hinted(const struct page_presence *p, uint64_t page)
{
    return p->hinted && atomic_load(&p->hinted[page / 64]) >> page % 64 & 1;
}

static bool page_absent(struct page_presence *p, const struct ram *ram, uint64_t page)
{
    if (page < p->first || page - p->first >= p->count) {
        uint64_t n = ram_contiguous(ram, page);
        p->first = page;
        p->count = n < 512 ? n : 512;
        memset(p->absent, 0, sizeof(p->absent));
        if (atomic_load(&ram->missing) || ram->file_mapped)
            return false;
        if (ram->memfd >= 0 && ram->unit == PAGE_SIZE)
            presence_load_memfd(p, ram, ram_page(ram, page));
        else if (p->pagemap_fd >= 0)
            presence_load_anonymous(p, ram_page(ram, page));
    }
    return bitmap_test(p->absent, page - p->first);
}

bool page_known_zero(struct page_presence *p, const struct ram *ram, uint64_t page)
{
    return page_hinted(p, page) || page_absent(p, ram, page) || page_is_zero(ram_page(ram, page));
}

// --- shards

bool page_shard_has(const struct page_shard *s, uint64_t first, uint64_t count)
{
    uint64_t block = first / SHARD_PAGES;
    return !s->count ||
           (block % s->count == s->index && count <= (block + 1) * SHARD_PAGES - first);
}

uint64_t page_shard_find(const struct page_shard *s, const uint64_t *map, uint64_t pages,
                         uint64_t from)
{
    if (!s->count)
        return bitmap_find(map, pages, from, true);
    uint64_t block = from / SHARD_PAGES;
    if (block % s->count != s->index) {
        block += (s->index + s->count - block % s->count) % s->count;
        from = block * SHARD_PAGES;
    }
    for (; from < pages; block += s->count, from = block * SHARD_PAGES) {
        uint64_t end = (block + 1) * SHARD_PAGES;
        end = end < pages ? end : pages;
        uint64_t page = bitmap_find(map, end, from, true);
        if (page < end)
            return page;
    }
    return pages;
}

// --- sending

void page_batch_reset(struct page_batch *b, struct ram *ram)
{
    b->ram = ram;
    b->packer = NULL;
    b->shard = (struct page_shard) {0};
    b->nr_runs = b->nr_data = b->nr_iov = 0;
    b->nr_zero = 0;
}

bool page_batch_add(struct page_batch *b, uint64_t page, bool zero)
{
    uint32_t kind = zero ? WIRE_RUN_ZERO : WIRE_RUN_DATA;
    struct wire_run *last = b->nr_runs ? &b->runs[b->nr_runs - 1] : NULL;
    bool extends =
        last && last->kind == kind && last->first + last->count == page && last->count < UINT32_MAX;
    if ((!extends && b->nr_runs == WIRE_RUNS_MAX) || (!zero && b->nr_data == WIRE_BATCH_PAGES))
        return false;
    if (extends)
        last->count++;
    else
        b->runs[b->nr_runs++] = (struct wire_run) {.first = page, .count = 1, .kind = kind};
    if (zero) {
        b->nr_zero++;
        return true;
    }
    uint8_t *hva = ram_page(b->ram, page);
    struct iovec *iov = b->nr_iov ? &b->iov[b->nr_iov - 1] : NULL;
    b->sums[b->nr_data++] = page_sum(hva);
    if (extends && iov && (uint8_t *)iov->iov_base + iov->iov_len == hva)
        iov->iov_len += PAGE_SIZE;
    else
        b->iov[b->nr_iov++] = (struct iovec) {hva, PAGE_SIZE};
    return true;
}

void page_batch_take(struct page_batch *b, uint64_t *todo, uint64_t *cursor, unsigned max_data,
                     struct page_presence *presence)
{
    struct ram *ram = b->ram;
    struct packer *packer = b->packer;
    for (unsigned looked = 0; looked < TAKE_LOOK_MAX; looked++) {
        if (b->nr_data + (packer ? packer->nr : 0) >= max_data || (packer && packer_full(packer)))
            return;
        uint64_t page = page_shard_find(&b->shard, todo, ram->pages, *cursor);
        *cursor = page;
        if (page == ram->pages)
            return;
        bool unused = presence && page_hinted(presence, page);
        bool zero = unused || (presence && page_absent(presence, ram, page)) ||
                    page_is_zero(ram_page(ram, page));
        bool packed = packer && !zero && packer_take(packer, page);
        if (!packed && !page_batch_add(b, page, zero))
            return;
        if (packer && zero)
            packer_forget(packer, page);
        if (unused)
            presence->nr_free++;
        bitmap_clear(todo, page);
        *cursor = page + 1;
    }
}

int page_batch_put(struct page_batch *b, struct wire *w, unsigned align, struct error *err)
{
    if (!b->nr_runs)
        return 0;
    struct wire_pages head = {.nr_runs = b->nr_runs, .nr_data = b->nr_data};
    size_t runs = b->nr_runs * sizeof(b->runs[0]), sums = b->nr_data * sizeof(b->sums[0]);
    size_t len = sizeof(head) + runs + sums;
    if (align && b->nr_data) {
        uint64_t at = w->out + WIRE_HEADER_LEN + len;
        head.pad = (uint32_t)(align_up(at, align) - at);
    }
    memcpy(b->meta, &head, sizeof(head));
    memcpy(b->meta + sizeof(head), b->runs, runs);
    memcpy(b->meta + sizeof(head) + runs, b->sums, sums);
    memset(b->meta + len, 0, head.pad);
    return wire_put(w, WIRE_PAGES, 0, b->meta, len + head.pad, b->iov, b->nr_iov, err);
}

// --- receiving

int page_intake_init(struct page_intake *in, struct ram *ram, struct error *err)
{
    size_t words = ram_bitmap_words(ram);
    *in = (struct page_intake) {.ram = ram};
    in->seen = calloc(words, 8);
    in->touched = calloc(words, 8);
    in->damaged = calloc(words, 8);
    if (!in->seen || !in->touched || !in->damaged) {
        page_intake_free(in);
        return error_set(err, -ENOMEM, "no memory for the page maps of %llu pages",
                         (unsigned long long)ram->pages);
    }
    // Whatever was placed while the VM was built goes: its memory comes whole from the other side.
    int ret = ram_drop(ram, 0, ram->pages, err);
    if (ret)
        page_intake_free(in);
    return ret;
}

void page_intake_free(struct page_intake *in)
{
    free(in->seen);
    free(in->touched);
    free(in->damaged);
    in->seen = in->touched = in->damaged = NULL;
}

static int mark_seen(struct page_intake *in, const struct wire_run *run, struct error *err)
{
    uint64_t end = run->first + run->count;
    if (!page_shard_has(&in->shard, run->first, run->count))
        return error_set(err, -EPROTO, "pages %llu to %llu are not for this connection",
                         (unsigned long long)run->first, (unsigned long long)end - 1);
    if (in->once) {
        uint64_t twice = bitmap_find(in->seen, end, run->first, true);
        if (twice != end)
            return error_set(err, -EPROTO, "page %llu (address 0x%llx) comes twice",
                             (unsigned long long)twice,
                             (unsigned long long)ram_page_gpa(in->ram, twice));
    }
    for (uint64_t p = run->first; p < end; p++) {
        in->nr_seen += !bitmap_test(in->seen, p);
        bitmap_set(in->seen, p);
    }
    return 0;
}

static void take_zero(struct page_intake *in, const struct wire_run *run)
{
    uint64_t end = run->first + run->count;
    in->nr_zero += run->count;
    for (uint64_t p = run->first; (p = bitmap_find(in->touched, end, p, true)) < end; p++) {
        memset(ram_page(in->ram, p), 0, PAGE_SIZE);
        bitmap_clear(in->touched, p);
        in->nr_damaged -= bitmap_test(in->damaged, p);
        bitmap_clear(in->damaged, p);
    }
}

static int check_data(struct page_intake *in, const struct wire_pages_view *view,
                      const struct wire_run *run, unsigned sum, const struct wire *w,
                      struct error *err)
{
    for (uint64_t i = 0; i < run->count; i++) {
        uint64_t page = run->first + i;
        bool good = page_sum(ram_page(in->ram, page)) == wire_pages_sum(view, sum + (unsigned)i);
        if (!good && in->once)
            return error_set(err, -EBADMSG, "%s: page %llu (address 0x%llx) does not match its sum",
                             w->name, (unsigned long long)page,
                             (unsigned long long)ram_page_gpa(in->ram, page));
        in->nr_damaged += !good;
        in->nr_damaged -= bitmap_test(in->damaged, page);
        if (good)
            bitmap_clear(in->damaged, page);
        else
            bitmap_set(in->damaged, page);
    }
    return 0;
}

static int take_packed(struct page_intake *in, const struct wire_packed_page *e,
                       const uint8_t *data, struct error *err)
{
    struct wire_run run = {.first = e->page, .count = 1, .kind = WIRE_RUN_DATA};
    int ret = mark_seen(in, &run, err);
    if (!ret && e->kind == WIRE_PACKED_DELTA && !bitmap_test(in->touched, e->page))
        ret = error_set(err, -EPROTO, "changes of page %llu, which never came",
                        (unsigned long long)e->page);
    if (!ret)
        ret = pack_unpack(e, data, ram_page(in->ram, e->page), err);
    if (ret)
        return ret;
    bitmap_set(in->touched, e->page);
    in->nr_data++;
    // Packed from a copy: unlike a page sent as it is, it cannot have changed on its way.
    if (page_sum(ram_page(in->ram, e->page)) != e->sum)
        return error_set(err, -EBADMSG, "page %llu does not match its sum",
                         (unsigned long long)e->page);
    in->nr_damaged -= bitmap_test(in->damaged, e->page);
    bitmap_clear(in->damaged, e->page);
    return 0;
}

int page_intake_packed(struct page_intake *in, struct wire *w, const struct wire_record *record,
                       void *buffer, struct error *err)
{
    struct wire_packed_page entries[WIRE_BATCH_PAGES];
    const uint8_t *data = buffer;
    unsigned nr;
    int ret = wire_packed_parse(record, in->ram->pages, entries, &nr, err);
    if (!ret)
        ret = wire_read(w, buffer, record->header.data_len, err);
    for (unsigned i = 0; !ret && i < nr; i++) {
        ret = take_packed(in, &entries[i], data, err);
        data += entries[i].len;
    }
    return ret;
}

int page_intake_record(struct page_intake *in, struct wire *w, const struct wire_record *record,
                       struct error *err)
{
    struct wire_pages_view view;
    struct iovec iov[WIRE_RUNS_MAX + 2]; // a run is cut in two at most once: at the hole
    unsigned n = 0, sum = 0;
    int ret = wire_pages_parse(record, in->ram->pages, &view, err);
    for (unsigned i = 0; !ret && i < view.head.nr_runs; i++) {
        struct wire_run run = wire_pages_run(&view, i);
        ret = mark_seen(in, &run, err);
        if (!ret && run.kind == WIRE_RUN_ZERO)
            take_zero(in, &run);
        for (uint64_t p = 0; !ret && run.kind == WIRE_RUN_DATA && p < run.count;) {
            uint64_t here = ram_contiguous(in->ram, run.first + p);
            here = here < run.count - p ? here : run.count - p;
            iov[n++] = (struct iovec) {ram_page(in->ram, run.first + p), here * PAGE_SIZE};
            bitmap_fill(in->touched, run.first + p, here, true);
            p += here;
        }
    }
    if (!ret && n)
        ret = w->readv(w, iov, n, err);
    for (unsigned i = 0; !ret && i < view.head.nr_runs; i++) {
        struct wire_run run = wire_pages_run(&view, i);
        if (run.kind != WIRE_RUN_DATA)
            continue;
        ret = check_data(in, &view, &run, sum, w, err);
        sum += run.count;
        in->nr_data += run.count;
    }
    return ret;
}
