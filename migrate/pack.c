// SPDX-License-Identifier: Apache-2.0
#include "migrate/pack.h"

#include <errno.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>

#include "migrate/crc32c.h"

#define GOOD      (PAGE_SIZE - PAGE_SIZE / 8) // a packed page is at most this long
#define TRY_AGAIN 64                          // batches
#define WEIGH     (1024 * 1024)               // pages after which what was tried counts half

int pack_when_parse(const char *text, enum pack_when *when, struct error *err)
{
    static const char *const names[] = {"auto", "always", "none"};
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++)
        if (!strcmp(text, names[i])) {
            *when = (enum pack_when)i;
            return 0;
        }
    return error_set(err, -EINVAL, "compress '%s': expected auto, always or none", text);
}

// --- does it pay?

void pack_worth_add(struct pack_worth *w, uint64_t pages, uint64_t ns, uint64_t saved)
{
    // Half each time a few batches are in: the guest's memory is not the same everywhere.
    if (w->pages > WEIGH / PAGE_SIZE * 8) {
        w->pages /= 2;
        w->ns /= 2;
        w->saved /= 2;
    }
    w->pages += pages;
    w->ns += ns;
    w->saved += saved;
}

bool pack_worth_try(struct pack_worth *w, uint64_t bandwidth)
{
    if (!w->pages || !bandwidth || ++w->skipped >= TRY_AGAIN ||
        (unsigned __int128)w->saved * 1000000000u > (unsigned __int128)w->ns * bandwidth) {
        w->skipped = 0;
        return true;
    }
    return false;
}

// --- cache

static uint8_t *cache_slot(struct packer *p, uint64_t page)
{
    return p->copy + page % p->slots * PAGE_SIZE;
}

static bool cached(const struct packer *p, uint64_t page)
{
    return p->slots && p->tag[page % p->slots] == page + 1;
}

void packer_forget(struct packer *p, uint64_t page)
{
    if (cached(p, page))
        p->tag[page % p->slots] = 0;
}

void packer_init(struct packer *p, struct ram *ram, enum pack_when when, uint64_t cache)
{
    *p = (struct packer) {.ram = ram, .when = when, .slots = cache / PAGE_SIZE};
    if (when == PACK_NEVER)
        p->slots = 0;
    if (p->slots > ram->pages)
        p->slots = ram->pages;
    if (p->slots) {
        p->tag = calloc(p->slots, sizeof(*p->tag));
        p->copy = calloc(p->slots, PAGE_SIZE);
    }
    if (!p->tag || !p->copy)
        p->slots = 0;
    p->data = when == PACK_NEVER ? NULL : malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
}

void packer_free(struct packer *p)
{
    free(p->tag);
    free(p->copy);
    free(p->data);
    *p = (struct packer) {.when = PACK_NEVER};
}

// --- a record

void packer_begin(struct packer *p, uint64_t bandwidth)
{
    bool always = p->when == PACK_ALWAYS;
    p->nr = p->len = 0;
    p->lz4 = p->data && (always || pack_worth_try(&p->lz4_worth, bandwidth));
    p->delta =
        p->data && p->slots && p->again && (always || pack_worth_try(&p->delta_worth, bandwidth));
}

bool packer_full(const struct packer *p)
{
    return p->nr == WIRE_BATCH_PAGES;
}

static void take(struct packer *p, uint64_t page, enum wire_packed_kind kind, uint32_t len,
                 uint32_t sum)
{
    p->page[p->nr++] =
        (struct wire_packed_page) {.page = page, .kind = kind, .len = (uint16_t)len, .sum = sum};
    p->len += len;
}

static uint32_t squeeze(struct packer *p, const void *page)
{
    int n = LZ4_compress_default(page, (char *)p->data + p->len, PAGE_SIZE, GOOD);
    return n > 0 ? (uint32_t)n : 0;
}

static uint64_t saved(uint32_t len)
{
    return len ? PAGE_SIZE - len - sizeof(struct wire_packed_page) : 0;
}

// `now` is a copy of the page, `slot` what the destination has. False: no use.
static bool take_delta(struct packer *p, uint64_t page, const uint8_t *now, uint8_t *slot)
{
    uint64_t start = time_ns(), difference[PAGE_SIZE / 8];
    const uint64_t *a = (const uint64_t *)(const void *)now, *b = (const void *)slot;
    for (unsigned i = 0; i < ARRAY_SIZE(difference); i++)
        difference[i] = a[i] ^ b[i];
    uint32_t len = squeeze(p, difference);
    pack_worth_add(&p->delta_worth, 1, time_ns() - start, saved(len));
    if (!len)
        return false;
    take(p, page, WIRE_PACKED_DELTA, len, page_sum(now));
    p->delta_pages++;
    p->delta_bytes += len;
    return true;
}

static bool take_lz4(struct packer *p, uint64_t page, const uint8_t *now)
{
    uint64_t start = time_ns();
    uint32_t len = squeeze(p, now);
    pack_worth_add(&p->lz4_worth, 1, time_ns() - start, saved(len));
    if (!len)
        return false;
    take(p, page, WIRE_PACKED_LZ4, len, page_sum(now));
    p->lz4_pages++;
    p->lz4_bytes += len;
    return true;
}

// The guest may be writing to the page: from here on only the copy counts, and the dirty log tells.
__attribute__((no_sanitize("thread"))) static void copy_page(uint64_t *to, const void *from)
{
    const volatile uint64_t *p = from;
    for (unsigned i = 0; i < PAGE_SIZE / 8; i++)
        to[i] = p[i];
}

bool packer_take(struct packer *p, uint64_t page)
{
    uint64_t copy[PAGE_SIZE / 8];
    const uint8_t *now = (const uint8_t *)copy;
    if (!p->delta) {
        packer_forget(p, page);
        if (!p->lz4)
            return false;
        copy_page(copy, ram_page(p->ram, page));
        return take_lz4(p, page, now);
    }
    bool base = cached(p, page);
    uint8_t *slot = cache_slot(p, page);
    copy_page(copy, ram_page(p->ram, page));
    // From a stack copy the page goes into the cache only when it is surely sent from it.
    bool packed = base ? take_delta(p, page, now, slot) : p->lz4 && take_lz4(p, page, now);
    if (!packed) {
        memcpy(p->data + p->len, now, PAGE_SIZE);
        take(p, page, WIRE_PACKED_RAW, PAGE_SIZE, page_sum(now));
        p->cached_pages++;
    }
    p->tag[page % p->slots] = page + 1;
    memcpy(slot, now, PAGE_SIZE);
    return true;
}

int packer_put(struct packer *p, struct wire *w, struct error *err)
{
    if (!p->nr)
        return 0;
    struct {
        struct wire_packed head;
        struct wire_packed_page page[WIRE_BATCH_PAGES];
    } meta;
    size_t pages = p->nr * sizeof(p->page[0]);
    meta.head = (struct wire_packed) {.nr = p->nr};
    memcpy(meta.page, p->page, pages);
    struct iovec data = {p->data, p->len};
    return wire_put(w, WIRE_PACKED, 0, &meta, sizeof(meta.head) + pages, &data, 1, err);
}

// --- the other side

int pack_unpack(const struct wire_packed_page *entry, const uint8_t *data, void *page,
                struct error *err)
{
    uint64_t out[PAGE_SIZE / 8], *to = page;
    if (entry->kind == WIRE_PACKED_RAW) {
        memcpy(page, data, PAGE_SIZE);
        return 0;
    }
    int n = LZ4_decompress_safe((const char *)data, (char *)out, entry->len, PAGE_SIZE);
    if (n != PAGE_SIZE)
        return error_set(err, -EBADMSG, "page %llu: %u bytes that do not unpack to a page",
                         (unsigned long long)entry->page, entry->len);
    if (entry->kind == WIRE_PACKED_LZ4)
        memcpy(page, out, PAGE_SIZE);
    else
        for (unsigned i = 0; i < ARRAY_SIZE(out); i++)
            to[i] ^= out[i];
    return 0;
}
