// SPDX-License-Identifier: Apache-2.0
// The record format: round trips, every truncation and every single-bit flip of a recorded stream,
// claims that lie; and the pure helpers beside it (checksums, bitmaps, switch-over rule, push
// order).
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "migrate/channel.h"
#include "migrate/crc32c.h"
#include "migrate/pages.h"
#include "migrate/switchover.h"
#include "migrate/wire.h"
#include "tests/check_ok.h"
#include "vmm/bitmap.h"

// --- a recorder: an endpoint that keeps what is written

struct recorder {
    struct wire wire;
    uint8_t *data;
    size_t len;
};

static int recorder_writev(struct wire *w, struct iovec *iov, unsigned nr, struct error *err)
{
    struct recorder *r = container_of(w, struct recorder, wire);
    for (unsigned i = 0; i < nr; i++) {
        r->data = realloc(r->data, r->len + iov[i].iov_len);
        ck_assert_ptr_nonnull(r->data);
        memcpy(r->data + r->len, iov[i].iov_base, iov[i].iov_len);
        r->len += iov[i].iov_len;
    }
    w->out = r->len;
    return 0;
}

static void recorder_init(struct recorder *r)
{
    *r = (struct recorder) {.wire = {.name = "recorder", .writev = recorder_writev}};
}

static void memory_create(struct ram *ram, uint64_t size)
{
    const struct ram_config config = {.size = size};
    struct error err;
    ck_assert_msg(!ram_create(ram, &config, &err), "%s", err.text);
}

// --- a whole migration stream, read as a receiver reads it

enum { PAGES = 64, MEMORY = 16 * 1024 * 1024 };

static struct machine test_machine(void)
{
    struct machine m = {.ram_size = MEMORY, .cpus = 2, .nr_regions = 1};
    m.regions[0] = (struct wire_region) {0, MEMORY};
    m.cpuid = calloc(1, sizeof(*m.cpuid) + 2 * sizeof(m.cpuid->entries[0]));
    m.cpuid->nent = 2;
    m.cpuid->entries[1] = (struct kvm_cpuid_entry2) {.function = 7, .ebx = 0x1234};
    m.json = strdup("{\"cpus\": 2}");
    return m;
}

static void record_stream(struct recorder *r, struct ram *ram)
{
    struct machine machine = test_machine();
    struct wire_hello hello;
    uint8_t id[WIRE_ID_LEN] = "0123456789abcdef";
    void *meta;
    size_t len;
    recorder_init(r);
    wire_hello_fill(&hello, WIRE_MAIN, id);
    wire_put(&r->wire, WIRE_HELLO, 0, &hello, sizeof(hello), NULL, 0, NULL);
    ck_assert_int_eq(machine_encode(&machine, &meta, &len, NULL), 0);
    wire_put(&r->wire, WIRE_MACHINE, 0, meta, len, NULL, 0, NULL);
    free(meta);
    machine_free(&machine);

    for (unsigned i = 0; i < PAGES; i += 3)
        memset(ram_page(ram, i), (int)i + 1, PAGE_SIZE);
    uint64_t *todo = calloc(ram_bitmap_words(ram), 8), cursor = 0;
    struct page_batch *batch = malloc(sizeof(*batch));
    bitmap_fill(todo, 0, ram->pages, true);
    while (cursor < ram->pages) {
        page_batch_reset(batch, ram);
        page_batch_take(batch, todo, &cursor, 5, NULL);
        ck_assert_int_eq(page_batch_put(batch, &r->wire, 0, NULL), 0);
    }
    free(batch);
    free(todo);
    char blob[100] = "the state";
    struct iovec iov = {blob, sizeof(blob)};
    struct wire_state state = {sizeof(blob), crc32c(0, blob, sizeof(blob))};
    wire_put(&r->wire, WIRE_STATE, 0, &state, sizeof(state), &iov, 1, NULL);
    struct wire_prepare prepare = {0};
    wire_put(&r->wire, WIRE_PREPARE, 0, &prepare, sizeof(prepare), NULL, 0, NULL);
}

// As receive.c, without a VM. 0 only when everything is right.
static int read_stream(const uint8_t *data, size_t len, struct ram *ram, struct error *err)
{
    struct wire_mem mem;
    struct wire_record record = {0};
    struct wire_hello hello;
    struct machine machine = {0};
    struct page_intake intake;
    char blob[WIRE_TEXT_MAX];
    bool state_seen = false;
    wire_mem_init(&mem, data, len);
    ck_assert_int_eq(page_intake_init(&intake, ram, NULL), 0);
    int ret = wire_expect(&mem.wire, &record, WIRE_HELLO, err);
    if (!ret)
        ret = wire_hello_parse(&record, &hello, err);
    unsigned version;
    if (!ret)
        ret = wire_version_choose(WIRE_OLDEST, WIRE_VERSION, hello.oldest, hello.version, &version,
                                  err);
    if (!ret)
        ret = wire_expect(&mem.wire, &record, WIRE_MACHINE, err);
    if (!ret)
        ret = machine_parse(&record, &machine, err);
    while (!ret) {
        ret = wire_get(&mem.wire, &record, err);
        if (ret || record.header.type == WIRE_PREPARE)
            break;
        if (record.header.type == WIRE_PAGES) {
            ret = page_intake_record(&intake, &mem.wire, &record, err);
        } else if (record.header.type == WIRE_STATE) {
            struct wire_state state;
            wire_fixed(&record, &state, sizeof(state));
            ret = record.header.data_len > sizeof(blob) || record.header.data_len != state.len
                      ? -EPROTO
                      : wire_read(&mem.wire, blob, state.len, err);
            if (!ret && crc32c(0, blob, state.len) != state.crc)
                ret = -EBADMSG;
            state_seen = true;
        } else {
            ret = wire_unexpected(&mem.wire, &record, "pages", err);
        }
    }
    if (!ret && (intake.nr_seen != ram->pages || intake.nr_damaged || !state_seen))
        ret = -EBADMSG;
    if (!ret && mem.wire.in != len)
        ret = -EPROTO;
    page_intake_free(&intake);
    machine_free(&machine);
    wire_record_free(&record);
    return ret;
}

START_TEST(test_stream_round_trip)
{
    struct ram from, to;
    struct recorder r;
    struct error err = {0};
    memory_create(&from, MEMORY);
    memory_create(&to, MEMORY);
    record_stream(&r, &from);
    memset(ram_page(&to, 1), 0xee, 3 * PAGE_SIZE); // leftovers must go
    ck_assert_msg(!read_stream(r.data, r.len, &to, &err), "%s", err.text);
    ck_assert_int_eq(memcmp(from.map, to.map, MEMORY), 0);
    free(r.data);
    ram_destroy(&from);
    ram_destroy(&to);
}
END_TEST

START_TEST(test_stream_truncated)
{
    struct ram from, to;
    struct recorder r;
    memory_create(&from, MEMORY);
    memory_create(&to, MEMORY);
    record_stream(&r, &from);
    // Every length where a header or meta may be cut; inside page data every 97th.
    for (size_t len = 0; len<r.len; len += len % PAGE_SIZE> 600 && len + 97 < r.len ? 97 : 1) {
        struct error err = {0};
        ck_assert_msg(read_stream(r.data, len, &to, &err) == -ENODATA, "%zu of %zu bytes: %s", len,
                      r.len, err.text);
    }
    free(r.data);
    ram_destroy(&from);
    ram_destroy(&to);
}
END_TEST

START_TEST(test_stream_flipped)
{
    struct ram from, to;
    struct recorder r;
    memory_create(&from, MEMORY);
    memory_create(&to, MEMORY);
    record_stream(&r, &from);
    unsigned flips = 0;
    for (size_t at = 0; at<r.len; at += at> 2048 ? 41 : 1)
        for (unsigned bit = at % 2; bit < 8; bit += 2, flips++) {
            r.data[at] ^= (uint8_t)(1u << bit);
            ck_assert_msg(read_stream(r.data, r.len, &to, NULL) < 0,
                          "bit %u of byte %zu of %zu flipped: not found", bit, at, r.len);
            r.data[at] ^= (uint8_t)(1u << bit);
        }
    ck_assert_uint_gt(flips, 10000);
    ck_assert_int_eq(read_stream(r.data, r.len, &to, NULL), 0);
    free(r.data);
    ram_destroy(&from);
    ram_destroy(&to);
}
END_TEST

// --- records that lie with a right checksum

static int parse_pages(const void *meta, uint32_t len, uint32_t data_len, uint64_t ram_pages)
{
    struct wire_record record = {
        .header = {.type = WIRE_PAGES, .meta_len = len, .data_len = data_len},
        .meta = (uint8_t *)(uintptr_t)meta};
    struct wire_pages_view view;
    struct error err;
    int ret = wire_header_check(&record.header, &err);
    return ret ? ret : wire_pages_parse(&record, ram_pages, &view, &err);
}

struct lying_pages {
    struct wire_pages head;
    struct wire_run runs[2];
    uint32_t sums[2];
};

START_TEST(test_pages_lies)
{
    const struct lying_pages good = {
        {2, 2, 0, 0}, {{5, 2, WIRE_RUN_DATA}, {7, 100, WIRE_RUN_ZERO}}, {1, 2}};
    const uint32_t len = sizeof(good), data = 2 * PAGE_SIZE;
    ck_assert_int_eq(parse_pages(&good, len, data, 107), 0);
    ck_assert_int_lt(parse_pages(&good, len, data, 106), 0); // beyond the guest's memory
    ck_assert_int_lt(parse_pages(&good, len - 4, data, 107), 0);
    ck_assert_int_lt(parse_pages(&good, len, data - 1, 107), 0);
    ck_assert_int_lt(parse_pages(&good, len, 0, 107), 0);
    struct lying_pages bad;
#define LIE(change)                                                                    \
    do {                                                                               \
        bad = good;                                                                    \
        bad.change;                                                                    \
        ck_assert_msg(parse_pages(&bad, len, data, 107) < 0, "accepted: %s", #change); \
    } while (0)
    LIE(head.nr_runs = 0);
    LIE(head.nr_runs = 1);
    LIE(head.nr_runs = 3);
    LIE(head.nr_runs = UINT32_MAX);
    LIE(head.nr_data = 1);
    LIE(head.nr_data = UINT32_MAX);
    LIE(head.pad = 4);
    LIE(head.pad = PAGE_SIZE);
    LIE(head.reserved = 1);
    LIE(runs[0].first = UINT64_MAX);
    LIE(runs[0].first = 6); // overlaps the second
    LIE(runs[1].first = 1); // not ascending
    LIE(runs[1].first = 1ull << 40);
    LIE(runs[1].count = UINT32_MAX);
    LIE(runs[1].count = 0);
    LIE(runs[0].count = 0);
    LIE(runs[0].kind = 2);
    LIE(runs[1].kind = WIRE_RUN_DATA);
#undef LIE
}
END_TEST

START_TEST(test_machine_lies)
{
    struct machine machine = test_machine(), parsed;
    void *meta;
    size_t len;
    struct error err = {0};
    ck_assert_int_eq(machine_encode(&machine, &meta, &len, NULL), 0);
    struct wire_record record = {.header = {.type = WIRE_MACHINE, .meta_len = (uint32_t)len},
                                 .meta = meta};
    ck_assert_msg(!machine_parse(&record, &parsed, &err), "%s", err.text);
    ck_assert_str_eq(parsed.json, machine.json);
    ck_assert_uint_eq(parsed.cpus, 2);
    ck_assert_uint_eq(parsed.cpuid->entries[1].ebx, 0x1234);
    machine_free(&parsed);
    struct wire_machine *head = meta, good = *head;
    struct wire_region *region = (struct wire_region *)(head + 1), good_region = *region;
#define LIE(change)                                                                        \
    do {                                                                                   \
        change;                                                                            \
        ck_assert_msg(machine_parse(&record, &parsed, &err) < 0, "accepted: %s", #change); \
        *head = good;                                                                      \
        *region = good_region;                                                             \
    } while (0)
    LIE(head->ram_size = 0);
    LIE(head->ram_size = 1ull << 40);
    LIE(head->cpus = 0);
    LIE(head->cpus = 10000);
    LIE(head->nr_regions = 0);
    LIE(head->nr_regions = 2);
    LIE(head->nr_regions = UINT32_MAX);
    LIE(head->nr_cpuid = 1);
    LIE(head->nr_cpuid = UINT32_MAX);
    LIE(head->json_len++);
    LIE(head->json_len = UINT32_MAX);
    LIE(head->flags = 0x80);
    LIE(head->streams = 1);
    LIE(head->streams = WIRE_STREAMS_MAX + 1);
    LIE((head->streams = 2, head->flags = WIRE_MACHINE_SHARED));
    LIE(region->gpa = 1);
    LIE(region->size = MEMORY + PAGE_SIZE);
    LIE((region->size = head->ram_size = UINT64_MAX & ~0xfffull));
    LIE(region->gpa = UINT64_MAX & ~0xfffull);
    LIE(((char *)meta)[len - 1] = 0);
#undef LIE
    free(meta);
    machine_free(&machine);
}
END_TEST

START_TEST(test_header_lies)
{
    for (unsigned type = 0; type < 70000; type += type < 300 ? 1 : 777) {
        struct wire_header h = {.type = (uint16_t)type, .meta_len = UINT32_MAX};
        ck_assert_int_lt(wire_header_check(&h, NULL), 0);
        h = (struct wire_header) {.type = (uint16_t)type, .data_len = UINT32_MAX};
        ck_assert_int_lt(wire_header_check(&h, NULL), 0);
        h = (struct wire_header) {.type = (uint16_t)type, .flags = 1};
        ck_assert_int_lt(wire_header_check(&h, NULL), 0);
    }
    struct wire_header bye = {.type = WIRE_BYE};
    ck_assert_int_eq(wire_header_check(&bye, NULL), 0);
}
END_TEST

START_TEST(test_want_and_discard_lies)
{
    struct {
        struct wire_want head;
        uint64_t pages[3];
    } want = {{3, 0}, {1, 2, 99}};
    struct wire_record record = {.header = {.type = WIRE_WANT, .meta_len = sizeof(want)},
                                 .meta = (uint8_t *)&want};
    uint64_t pages[WIRE_WANT_MAX], stale[2] = {0};
    unsigned nr;
    ck_assert_int_eq(wire_want_parse(&record, 100, pages, &nr, NULL), 0);
    ck_assert_uint_eq(nr, 3);
    ck_assert_uint_eq(pages[2], 99);
    ck_assert_int_lt(wire_want_parse(&record, 99, pages, &nr, NULL), 0);
    want.head.nr = 4;
    ck_assert_int_lt(wire_want_parse(&record, 100, pages, &nr, NULL), 0);
    want.head.nr = UINT32_MAX;
    ck_assert_int_lt(wire_want_parse(&record, 100, pages, &nr, NULL), 0);

    struct {
        struct wire_discard head;
        uint64_t words[2];
    } discard = {{0, 70}, {5, 0x3f}};
    record = (struct wire_record) {.header = {.type = WIRE_DISCARD, .meta_len = sizeof(discard)},
                                   .meta = (uint8_t *)&discard};
    ck_assert_int_eq(wire_discard_parse(&record, 70, stale, NULL), 0);
    ck_assert_uint_eq(stale[0], 5);
    ck_assert_uint_eq(stale[1], 0x3f);
    ck_assert_int_lt(wire_discard_parse(&record, 69, stale, NULL), 0);
    discard.words[1] = 0x40;
    ck_assert_int_lt(wire_discard_parse(&record, 70, stale, NULL), 0);
    discard.words[1] = 0;
    discard.head.first = 64;
    ck_assert_int_lt(wire_discard_parse(&record, 70, stale, NULL), 0);
    discard.head = (struct wire_discard) {1, 69};
    ck_assert_int_lt(wire_discard_parse(&record, 70, stale, NULL), 0);
    discard.head = (struct wire_discard) {0, UINT64_MAX};
    ck_assert_int_lt(wire_discard_parse(&record, 70, stale, NULL), 0);
}
END_TEST

START_TEST(test_versions)
{
    unsigned v = 0;
    ck_assert_int_eq(wire_version_choose(3, 4, 3, 4, &v, NULL), 0);
    ck_assert_uint_eq(v, 4);
    ck_assert_int_eq(wire_version_choose(3, 4, 2, 3, &v, NULL), 0); // an older peer
    ck_assert_uint_eq(v, 3);
    ck_assert_int_eq(wire_version_choose(3, 4, 4, 5, &v, NULL), 0); // a newer one
    ck_assert_uint_eq(v, 4);
    ck_assert_int_eq(wire_version_choose(3, 4, 1, 2, &v, NULL), -EPROTONOSUPPORT);
    ck_assert_int_eq(wire_version_choose(3, 4, 5, 6, &v, NULL), -EPROTONOSUPPORT);
    ck_assert_int_eq(wire_version_choose(1, 1, 0, 0, &v, NULL), -EPROTONOSUPPORT);
}
END_TEST

// An ABORT's text goes to a terminal.
START_TEST(test_abort_text)
{
    char text[] = "bad\x1b[2Jthing";
    struct recorder r;
    struct wire_mem mem;
    struct wire_record record = {0};
    struct error err = {0};
    recorder_init(&r);
    wire_put(&r.wire, WIRE_ABORT, 0, text, sizeof(text) - 1, NULL, 0, NULL);
    wire_mem_init(&mem, r.data, r.len);
    ck_assert_int_eq(wire_expect(&mem.wire, &record, WIRE_READY, &err), -EREMOTEIO);
    ck_assert_ptr_nonnull(strstr(err.text, "bad?[2Jthing"));
    wire_record_free(&record);
    free(r.data);
}
END_TEST

// --- pages

// A page that was written while it was sent is no error as long as it comes again.
START_TEST(test_torn_page_heals)
{
    struct ram from, to;
    struct recorder r;
    struct wire_mem mem;
    struct wire_record record = {0};
    struct page_intake intake;
    struct page_batch *batch = malloc(sizeof(*batch));
    memory_create(&from, MEMORY);
    memory_create(&to, MEMORY);
    recorder_init(&r);
    for (unsigned round = 0; round < 2; round++) {
        page_batch_reset(batch, &from);
        memset(ram_page(&from, 7), 1 + (int)round, PAGE_SIZE);
        ck_assert(page_batch_add(batch, 7, false));
        if (!round)
            memset(ram_page(&from, 7), 9, 64); // after the sum was taken
        page_batch_put(batch, &r.wire, 0, NULL);
    }
    wire_mem_init(&mem, r.data, r.len);
    ck_assert_int_eq(page_intake_init(&intake, &to, NULL), 0);
    ck_assert_int_eq(wire_expect(&mem.wire, &record, WIRE_PAGES, NULL), 0);
    ck_assert_int_eq(page_intake_record(&intake, &mem.wire, &record, NULL), 0);
    ck_assert_uint_eq(intake.nr_damaged, 1);
    ck_assert_int_eq(wire_expect(&mem.wire, &record, WIRE_PAGES, NULL), 0);
    ck_assert_int_eq(page_intake_record(&intake, &mem.wire, &record, NULL), 0);
    ck_assert_uint_eq(intake.nr_damaged, 0);
    ck_assert_uint_eq(intake.nr_seen, 1);
    page_intake_free(&intake);
    wire_record_free(&record);
    free(batch);
    free(r.data);
    ram_destroy(&from);
    ram_destroy(&to);
}
END_TEST

// Data, zero, data again, zero again: the last one counts.
START_TEST(test_page_becomes_zero)
{
    struct ram from, to;
    struct page_intake intake;
    struct page_batch *batch = malloc(sizeof(*batch));
    memory_create(&from, MEMORY);
    memory_create(&to, MEMORY);
    ck_assert_int_eq(page_intake_init(&intake, &to, NULL), 0);
    for (int fill = 0; fill < 6; fill++) {
        struct recorder r;
        struct wire_mem mem;
        struct wire_record record = {0};
        recorder_init(&r);
        memset(ram_page(&from, 40), fill % 2 ? fill : 0, PAGE_SIZE);
        page_batch_reset(batch, &from);
        ck_assert(page_batch_add(batch, 40, page_is_zero(ram_page(&from, 40))));
        page_batch_put(batch, &r.wire, 0, NULL);
        wire_mem_init(&mem, r.data, r.len);
        ck_assert_int_eq(wire_expect(&mem.wire, &record, WIRE_PAGES, NULL), 0);
        ck_assert_int_eq(page_intake_record(&intake, &mem.wire, &record, NULL), 0);
        ck_assert_int_eq(memcmp(ram_page(&from, 40), ram_page(&to, 40), PAGE_SIZE), 0);
        wire_record_free(&record);
        free(r.data);
    }
    page_intake_free(&intake);
    free(batch);
    ram_destroy(&from);
    ram_destroy(&to);
}
END_TEST

START_TEST(test_zero_page)
{
    uint8_t *page = aligned_alloc(PAGE_SIZE, PAGE_SIZE);
    memset(page, 0, PAGE_SIZE);
    ck_assert(page_is_zero(page));
    for (unsigned i = 0; i < PAGE_SIZE; i++) {
        page[i] = 1;
        ck_assert(!page_is_zero(page));
        page[i] = 0;
    }
    free(page);
}
END_TEST

// Untouched memory is known to be zero without being read; touched memory never is called absent.
START_TEST(test_presence)
{
    static const enum ram_backing backings[] = {RAM_ANONYMOUS, RAM_MEMFD, RAM_HUGETLB};
    for (unsigned i = 0; i < ARRAY_SIZE(backings); i++) {
        const struct ram_config config = {.size = MEMORY, .backing = backings[i]};
        const uint64_t far = MEMORY / PAGE_SIZE - 2;
        struct ram ram;
        struct page_presence presence;
        struct page_batch *batch = malloc(sizeof(*batch));
        int ret = ram_create(&ram, &config, NULL);
        if (ret && backings[i] == RAM_HUGETLB) { // none on this machine
            free(batch);
            continue;
        }
        ck_assert_int_eq(ret, 0);
        memset(ram_page(&ram, 100), 1, PAGE_SIZE);
        memset(ram_page(&ram, 1000), 2, 3 * PAGE_SIZE);
        uint64_t *todo = calloc(ram_bitmap_words(&ram), 8), cursor = 0;
        bitmap_fill(todo, 0, ram.pages, true);
        page_presence_init(&presence);
        page_batch_reset(batch, &ram);
        page_batch_take(batch, todo, &cursor, WIRE_BATCH_PAGES, &presence);
        ck_assert_uint_eq(cursor, ram.pages);
        ck_assert_uint_eq(batch->nr_data, 4);
        ck_assert_uint_eq(batch->nr_zero, ram.pages - 4);
        unsigned char resident[2];
        ck_assert_int_eq(mincore(ram_page(&ram, far), 2 * PAGE_SIZE, resident), 0);
        ck_assert_uint_eq(resident[0] & 1, 0); // looking at it did not allocate it
        page_presence_free(&presence);
        free(todo);
        free(batch);
        ram_destroy(&ram);
    }
}
END_TEST

// Every page belongs to one connection, finds its way there, and words of bitmaps are not shared.
START_TEST(test_shards)
{
    enum { SHARDED = 7 * SHARD_PAGES + 100 };
    uint64_t map[(SHARDED + 63) / 64];
    for (unsigned count = 2; count <= WIRE_STREAMS_MAX; count++) {
        unsigned owner[(SHARDED + 63) / 64] = {0}, seen = 0;
        uint64_t seed = count;
        for (unsigned i = 0; i < ARRAY_SIZE(map); i++)
            map[i] = seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        for (unsigned index = 0; index < count; index++) {
            const struct page_shard s = {index, count};
            uint64_t before = 0;
            for (uint64_t p = 0; (p = page_shard_find(&s, map, SHARDED, p)) < SHARDED; p++) {
                HOLDS(bitmap_test(map, p) && page_shard_has(&s, p, 1));
                HOLDS(!seen || p >= before);
                HOLDS(!owner[p / 64] || owner[p / 64] == index + 1);
                owner[p / 64] = index + 1;
                before = p;
                seen++;
            }
        }
        ck_assert_uint_eq(seen, bitmap_count(map, SHARDED));
    }
    const struct page_shard one = {1, 3}, all = {0, 0};
    ck_assert(page_shard_has(&one, SHARD_PAGES, SHARD_PAGES));
    ck_assert(!page_shard_has(&one, SHARD_PAGES, SHARD_PAGES + 1));
    ck_assert(!page_shard_has(&one, SHARD_PAGES - 1, 1));
    ck_assert(!page_shard_has(&one, 2 * SHARD_PAGES, 1));
    ck_assert(page_shard_has(&one, 4 * SHARD_PAGES + 5, UINT32_MAX) == false);
    ck_assert(page_shard_has(&all, 0, 1ull << 40));
}
END_TEST

// What was looked up before a pass says nothing about the next one: the page has been touched
// since.
START_TEST(test_presence_is_of_one_pass)
{
    const struct ram_config config = {.size = MEMORY};
    struct ram ram;
    struct page_presence presence;
    struct page_batch *batch = malloc(sizeof(*batch));
    ck_assert_int_eq(ram_create(&ram, &config, NULL), 0);
    uint64_t *todo = calloc(ram_bitmap_words(&ram), 8), last = ram.pages - 1;
    page_presence_init(&presence);
    for (unsigned pass = 0; pass < 2; pass++) {
        uint64_t cursor = 0;
        bitmap_set(todo, last);
        page_presence_begin(&presence);
        page_batch_reset(batch, &ram);
        page_batch_take(batch, todo, &cursor, WIRE_BATCH_PAGES, &presence);
        ck_assert_uint_eq(batch->nr_data, pass);
        memset(ram_page(&ram, last), 1, PAGE_SIZE);
    }
    page_presence_free(&presence);
    free(todo);
    free(batch);
    ram_destroy(&ram);
}
END_TEST

// --- checksums, bitmaps

START_TEST(test_crc32c)
{
    uint8_t data[PAGE_SIZE];
    for (unsigned i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)i;
    ck_assert_uint_eq(crc32c(0, "123456789", 9), 0xe3069283); // the usual check value
    memset(data, 0, 32);
    ck_assert_uint_eq(crc32c(0, data, 32), 0x8a9136aa); // RFC 3720 B.4
    memset(data, 0xff, 32);
    ck_assert_uint_eq(crc32c(0, data, 32), 0x62a8ab43);
    for (unsigned i = 0; i < 32; i++)
        data[i] = (uint8_t)i;
    ck_assert_uint_eq(crc32c(0, data, 32), 0x46dd794e);
    for (unsigned cut = 0; cut < 40; cut++)
        ck_assert_uint_eq(crc32c(crc32c(0, data, cut), data + cut, 40 - cut), crc32c(0, data, 40));
    uint32_t lanes[4], sum = page_sum(data);
    for (unsigned i = 0; i < 4; i++)
        lanes[i] = crc32c(0, data + i * 1024, 1024);
    ck_assert_uint_eq(sum, crc32c(0, lanes, sizeof(lanes)));
}
END_TEST

START_TEST(test_bitmap)
{
    uint64_t map[4] = {0};
    bitmap_fill(map, 60, 70, true); // 60..129
    ck_assert_uint_eq(bitmap_count(map, 256), 70);
    ck_assert_uint_eq(bitmap_count(map, 100), 40);
    ck_assert_uint_eq(bitmap_find(map, 256, 0, true), 60);
    ck_assert_uint_eq(bitmap_find(map, 256, 60, false), 130);
    ck_assert_uint_eq(bitmap_find(map, 256, 130, true), 256);
    ck_assert_uint_eq(bitmap_find(map, 100, 60, false), 100);
    ck_assert_uint_eq(bitmap_find(map, 100, 100, true), 100);
    bitmap_fill(map, 64, 64, false);
    ck_assert_uint_eq(bitmap_count(map, 256), 6);
    ck_assert(bitmap_test(map, 63) && !bitmap_test(map, 64) && bitmap_test(map, 128));
}
END_TEST

// --- a channel that reads ahead

struct cutter {
    const struct recorder *from;
    int to;
};

// In pieces of 1 byte to 4 KiB, as a network may bring them.
static void *cutter_main(void *arg)
{
    struct cutter *c = arg;
    uint32_t x = 1;
    for (size_t at = 0; at < c->from->len;) {
        x = x * 1664525 + 1013904223;
        size_t n = 1 + (x >> 20) % (x & 0x80000 ? 16 : 4096);
        n = n < c->from->len - at ? n : c->from->len - at;
        if (send(c->to, c->from->data + at, n, MSG_NOSIGNAL) != (ssize_t)n)
            break;
        at += n;
    }
    close(c->to);
    return NULL;
}

START_TEST(test_quick_channel)
{
    static const uint32_t lengths[] = {1, 4096, 24, 4096, 20000, 8192, 3};
    static uint8_t data[20000], got[20000];
    struct error err;
    struct recorder r;
    recorder_init(&r);
    for (unsigned i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 7 + i / 256);
    for (unsigned i = 0; i < 50 * ARRAY_SIZE(lengths); i++) {
        struct wire_state state = {.len = lengths[i % ARRAY_SIZE(lengths)], .crc = i};
        struct iovec blob = {data, state.len};
        ck_assert_int_eq(wire_put(&r.wire, WIRE_STATE, 0, &state, sizeof(state), &blob, 1, &err),
                         0);
    }
    int fd[2];
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    struct cutter cutter = {&r, fd[0]};
    struct channel c;
    struct wire_record record = {0};
    pthread_t thread;
    channel_init(&c, fd[1], -1, 0, "test");
    channel_quick(&c);
    ck_assert_ptr_nonnull(c.ahead);
    ck_assert_int_eq(pthread_create(&thread, NULL, cutter_main, &cutter), 0);
    for (unsigned i = 0; i < 50 * ARRAY_SIZE(lengths); i++) {
        struct wire_state state;
        ck_assert_int_eq(wire_expect(&c.wire, &record, WIRE_STATE, &err), 0);
        wire_fixed(&record, &state, sizeof(state));
        ck_assert_uint_eq(state.crc, i);
        ck_assert_uint_eq(state.len, lengths[i % ARRAY_SIZE(lengths)]);
        ck_assert_int_eq(wire_read(&c.wire, got, state.len, &err), 0);
        ck_assert_int_eq(memcmp(got, data, state.len), 0);
    }
    ck_assert_uint_eq(c.wire.in, r.len);
    ck_assert_int_eq(wire_get(&c.wire, &record, NULL), -ENODATA);
    pthread_join(thread, NULL);
    channel_close(&c);
    wire_record_free(&record);
    free(r.data);
}
END_TEST

// --- the switch-over rule

static const struct {
    const char *what;
    struct switchover_input in;
    enum switchover_verdict verdict;
    uint64_t downtime_ns;
} rule[] = {
    {"nothing left", {.bandwidth = 1000000000, .limit_ns = 0, .round = 1}, SWITCHOVER_STOP, 0},
    {"fits exactly",
     {.remaining = 1000000, .bandwidth = 1000000000, .limit_ns = 1000000, .round = 1},
     SWITCHOVER_STOP,
     1000000},
    {"one byte too much",
     {.remaining = 1000001, .bandwidth = 1000000000, .limit_ns = 1000000, .round = 1},
     SWITCHOVER_CONTINUE,
     1000001},
    {"state counts",
     {.remaining = 900000,
      .state = 100001,
      .bandwidth = 1000000000,
      .limit_ns = 1000000,
      .round = 1},
     SWITCHOVER_CONTINUE,
     1000001},
    {"every part counts",
     {.remaining = 1000,
      .bandwidth = 1000000000,
      .stop_ns = 1,
      .save_ns = 10,
      .load_ns = 100,
      .resume_ns = 1000,
      .rtt_ns = 10000,
      .limit_ns = 22111,
      .round = 1},
     SWITCHOVER_STOP,
     22111},
    {"bandwidth unknown",
     {.remaining = 1, .limit_ns = 1000, .round = 1},
     SWITCHOVER_CONTINUE,
     UINT64_MAX},
    {"stalled",
     {.remaining = 2000, .bandwidth = 1, .round = 3, .max_rounds = 3},
     SWITCHOVER_STALLED,
     2000000000000},
    {"not yet stalled",
     {.remaining = 2000, .bandwidth = 1, .round = 2, .max_rounds = 3},
     SWITCHOVER_CONTINUE,
     2000000000000},
    {"fits in the last round",
     {.remaining = 1, .bandwidth = 1000000000, .limit_ns = 1, .round = 3, .max_rounds = 3},
     SWITCHOVER_STOP,
     1},
    {"fits, and one round of 1 ms may make it shorter",
     {.remaining = 1000000, .bandwidth = 1000000000, .limit_ns = 1000000, .spare_ns = 1000000},
     SWITCHOVER_CONTINUE,
     1000000},
    {"it would take too long",
     {.remaining = 1000000, .bandwidth = 1000000000, .limit_ns = 1000000, .spare_ns = 999999},
     SWITCHOVER_STOP,
     1000000},
    {"the last one made it a quarter less",
     {.remaining = 750000,
      .before = 1000000,
      .within = 2,
      .bandwidth = 1000000000,
      .limit_ns = 1000000,
      .spare_ns = 1000000},
     SWITCHOVER_CONTINUE,
     750000},
    {"it did not",
     {.remaining = 750001,
      .before = 1000000,
      .within = 2,
      .bandwidth = 1000000000,
      .limit_ns = 1000000,
      .spare_ns = 1000000},
     SWITCHOVER_STOP,
     750001},
    {"enough of that",
     {.remaining = 7500,
      .before = 1000000,
      .within = SWITCHOVER_WITHIN_MAX,
      .bandwidth = 1000000000,
      .limit_ns = 1000000,
      .spare_ns = 1000000},
     SWITCHOVER_STOP,
     7500},
    {"what does not become shorter counts more",
     {.remaining = 1000,
      .bandwidth = 1000000000,
      .save_ns = 4000,
      .limit_ns = 1000000,
      .spare_ns = 1000000},
     SWITCHOVER_STOP,
     5000},
    {"sums saturate",
     {.remaining = UINT64_MAX,
      .state = UINT64_MAX,
      .bandwidth = 1,
      .stop_ns = UINT64_MAX,
      .limit_ns = UINT64_MAX - 1,
      .round = 1},
     SWITCHOVER_CONTINUE,
     UINT64_MAX},
};

START_TEST(test_switchover)
{
    for (unsigned i = 0; i < ARRAY_SIZE(rule); i++) {
        uint64_t ns;
        enum switchover_verdict verdict = switchover_decide(&rule[i].in, &ns);
        ck_assert_msg(verdict == rule[i].verdict, "%s: verdict %d", rule[i].what, verdict);
        ck_assert_msg(ns == rule[i].downtime_ns, "%s: %llu ns", rule[i].what,
                      (unsigned long long)ns);
    }
    ck_assert_uint_eq(switchover_bandwidth(0, 1000, 1000), 1000000000);
    ck_assert_uint_eq(switchover_bandwidth(400, 0, 1000), 400);
    ck_assert_uint_eq(switchover_bandwidth(400, 800, 1000000000), 700); // 1/4 old, 3/4 new
}
END_TEST

START_TEST(test_throttle_share)
{
    // Writes 8 times what the link takes: one sixteenth of its time is left to it, and 6 % of that.
    ck_assert_uint_eq(switchover_throttle(0, 800, 100), 94);
    ck_assert_uint_eq(switchover_throttle(50, 400, 100),
                      94);                                   // measured while held half of the time
    ck_assert_uint_eq(switchover_throttle(30, 10, 100), 40); // always a step
    ck_assert_uint_eq(switchover_throttle(0, 0, 0), 10);
    ck_assert_uint_eq(switchover_throttle(99, UINT64_MAX, 1), 99);
    ck_assert_uint_eq(switchover_throttle(95, 1, 0), 99);
}
END_TEST

START_TEST(test_latency_buckets)
{
    struct wire_faults faults = {0};
    ck_assert_uint_eq(wire_latency_percentile(&faults, 50), 0);
    for (uint64_t us = 0, last = 0; us < 100000; us++) {
        unsigned bucket = wire_latency_bucket(us * 1000);
        HOLDS(bucket < WIRE_LATENCY_BUCKETS && bucket >= last);
        HOLDS(wire_latency_us(bucket) <= us && wire_latency_us(bucket + 1) > us);
        last = bucket;
        faults.count[bucket] += us >= 100 && us < 200;
    }
    ck_assert_uint_eq(wire_latency_bucket(UINT64_MAX), WIRE_LATENCY_BUCKETS - 1);
    // Exact to the width of a bucket: a quarter of an octave at most.
    ck_assert_uint_ge(wire_latency_percentile(&faults, 50), 150);
    ck_assert_uint_le(wire_latency_percentile(&faults, 50), 190);
    ck_assert_uint_ge(wire_latency_percentile(&faults, 100), 200);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("wire");
    TCase *tc = tcase_create("wire");
    tcase_set_timeout(tc, 100);
    tcase_add_test(tc, test_stream_round_trip);
    tcase_add_test(tc, test_stream_truncated);
    tcase_add_test(tc, test_stream_flipped);
    tcase_add_test(tc, test_pages_lies);
    tcase_add_test(tc, test_machine_lies);
    tcase_add_test(tc, test_header_lies);
    tcase_add_test(tc, test_want_and_discard_lies);
    tcase_add_test(tc, test_versions);
    tcase_add_test(tc, test_abort_text);
    tcase_add_test(tc, test_torn_page_heals);
    tcase_add_test(tc, test_page_becomes_zero);
    tcase_add_test(tc, test_zero_page);
    tcase_add_test(tc, test_presence);
    tcase_add_test(tc, test_presence_is_of_one_pass);
    tcase_add_test(tc, test_shards);
    tcase_add_test(tc, test_crc32c);
    tcase_add_test(tc, test_bitmap);
    tcase_add_test(tc, test_quick_channel);
    tcase_add_test(tc, test_switchover);
    tcase_add_test(tc, test_latency_buckets);
    tcase_add_test(tc, test_throttle_share);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
