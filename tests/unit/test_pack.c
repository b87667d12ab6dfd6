// SPDX-License-Identifier: Apache-2.0
// Fewer bytes for a page: what is packed comes out again at the other side, whatever the guest
// writes between rounds; what is hostile does not.
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "migrate/pack.h"
#include "migrate/pages.h"
#include "vmm/bitmap.h"

enum { MEMORY = 16 * 1024 * 1024, USED = 600 };

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

static void ram_make(struct ram *ram)
{
    const struct ram_config config = {.size = MEMORY};
    struct error err;
    ck_assert_msg(!ram_create(ram, &config, &err), "%s", err.text);
}

static uint64_t random_next(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
    return *seed >> 33;
}

static void send(struct ram *ram, struct packer *packer, uint64_t *todo, struct recorder *r)
{
    struct page_batch *batch = malloc(sizeof(*batch));
    for (uint64_t cursor = 0; cursor < ram->pages;) {
        page_batch_reset(batch, ram);
        packer_begin(packer, 100000000);
        batch->packer = packer;
        page_batch_take(batch, todo, &cursor, 64, NULL);
        ck_assert_int_eq(page_batch_put(batch, &r->wire, 0, NULL), 0);
        ck_assert_int_eq(packer_put(packer, &r->wire, NULL), 0);
    }
    free(batch);
}

static int receive(struct page_intake *intake, const void *data, size_t len, struct error *err)
{
    struct wire_mem mem;
    struct wire_record record = {0};
    uint8_t *buffer = malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
    int ret = 0;
    wire_mem_init(&mem, data, len);
    while (!ret && mem.wire.in < len) {
        ret = wire_get(&mem.wire, &record, err);
        if (!ret)
            ret = record.header.type == WIRE_PACKED
                      ? page_intake_packed(intake, &mem.wire, &record, buffer, err)
                  : record.header.type == WIRE_PAGES
                      ? page_intake_record(intake, &mem.wire, &record, err)
                      : -EPROTO;
    }
    wire_record_free(&record);
    free(buffer);
    return ret;
}

// A few bytes of a page, a whole page of noise, of text, of zeros.
static void scribble(struct ram *ram, uint64_t page, uint64_t *todo, uint64_t *seed)
{
    uint8_t *p = ram_page(ram, page);
    switch (random_next(seed) % 8) {
    case 0:
        memset(p, 0, PAGE_SIZE);
        break;
    case 1:
        for (unsigned i = 0; i < PAGE_SIZE; i++)
            p[i] = (uint8_t)random_next(seed);
        break;
    case 2:
        memset(p, (int)random_next(seed), PAGE_SIZE);
        break;
    default:
        p[random_next(seed) % PAGE_SIZE]++;
    }
    bitmap_set(todo, page);
}

static void rounds(enum pack_when when, uint64_t cache, struct packer *packer)
{
    struct ram source, dest;
    struct page_intake intake;
    struct error err;
    uint64_t seed = 5;
    ram_make(&source);
    ram_make(&dest);
    ck_assert_int_eq(page_intake_init(&intake, &dest, NULL), 0);
    packer_init(packer, &source, when, cache);
    uint64_t *todo = calloc(ram_bitmap_words(&source), 8);
    for (unsigned round = 0; round < 12; round++) {
        struct recorder r = {.wire = {.name = "recorder", .writev = recorder_writev}};
        for (unsigned i = 0; i < (round ? 300 : 4 * USED); i++)
            scribble(&source, random_next(&seed) % USED, todo, &seed);
        packer->again = round > 0;
        send(&source, packer, todo, &r);
        ck_assert_msg(!receive(&intake, r.data, r.len, &err), "round %u: %s", round, err.text);
        ck_assert_uint_eq(intake.nr_damaged, 0);
        for (unsigned page = 0; page < USED; page++)
            ck_assert_msg(!memcmp(ram_page(&source, page), ram_page(&dest, page), PAGE_SIZE),
                          "round %u: page %u differs", round, page);
        free(r.data);
    }
    free(todo);
    page_intake_free(&intake);
    ram_destroy(&source);
    ram_destroy(&dest);
}

START_TEST(test_rounds)
{
    struct packer p;
    rounds(PACK_ALWAYS, MEMORY, &p);
    ck_assert_uint_gt(p.lz4_pages, 100);
    ck_assert_uint_gt(p.delta_pages, 500);
    ck_assert_uint_lt(p.delta_bytes, p.delta_pages * 400);
    packer_free(&p);
    rounds(PACK_ALWAYS, 100 * PAGE_SIZE, &p); // pages drive each other out
    ck_assert_uint_gt(p.delta_pages, 10);
    packer_free(&p);
    rounds(PACK_ALWAYS, 0, &p);
    ck_assert_uint_eq(p.delta_pages, 0);
    ck_assert_uint_gt(p.lz4_pages, 500);
    packer_free(&p);
    rounds(PACK_AUTO, MEMORY, &p);
    packer_free(&p);
    rounds(PACK_NEVER, MEMORY, &p);
    ck_assert_uint_eq(p.delta_pages + p.lz4_pages + p.cached_pages, 0);
    packer_free(&p);
}
END_TEST

// 1 us for a page of which 2000 bytes are saved: worth it below 2 GB/s.
START_TEST(test_worth)
{
    struct pack_worth w = {0};
    ck_assert(pack_worth_try(&w, 1000000000)); // nothing is known yet
    pack_worth_add(&w, 1000, 1000000, 2000000);
    ck_assert(pack_worth_try(&w, 1900000000));
    ck_assert(pack_worth_try(&w, 0));
    unsigned tried = 0;
    for (unsigned i = 0; i < 640; i++)
        tried += pack_worth_try(&w, 2100000000);
    ck_assert_uint_eq(tried, 10); // now and then, to see
    for (unsigned i = 0; i < 100000; i++)
        pack_worth_add(&w, 10, 10000, 40000); // the guest's memory has become easier
    ck_assert(pack_worth_try(&w, 2100000000));
    for (unsigned i = 0; i < 100000; i++)
        pack_worth_add(&w, 10, 10000, 0); // and cannot be packed at all
    ck_assert(!pack_worth_try(&w, 1000));
}
END_TEST

// Every bit flipped and every length cut: an error, or the flip meant the same (a match in a row of
// equal bytes may begin anywhere in it).
START_TEST(test_hostile)
{
    struct ram source, dest;
    struct page_intake intake;
    struct packer p;
    struct error err;
    struct recorder r = {.wire = {.name = "recorder", .writev = recorder_writev}};
    ram_make(&source);
    ram_make(&dest);
    uint64_t *todo = calloc(ram_bitmap_words(&source), 8);
    packer_init(&p, &source, PACK_ALWAYS, MEMORY);
    for (unsigned i = 0; i < 3; i++) {
        memset(ram_page(&source, i), 'a' + (int)i, PAGE_SIZE / 2);
        bitmap_set(todo, i);
    }
    send(&source, &p, todo, &r);
    for (size_t at = 0; at < r.len; at++)
        for (unsigned bit = 0; bit < 8; bit++) {
            ck_assert_int_eq(page_intake_init(&intake, &dest, NULL), 0);
            r.data[at] ^= (uint8_t)(1u << bit);
            if (!receive(&intake, r.data, r.len, &err))
                for (unsigned i = 0; i < 3; i++)
                    ck_assert_msg(!memcmp(ram_page(&source, i), ram_page(&dest, i), PAGE_SIZE),
                                  "bit %u of byte %zu", bit, at);
            r.data[at] ^= (uint8_t)(1u << bit);
            page_intake_free(&intake);
        }
    for (size_t len = 1; len < r.len; len++) {
        ck_assert_int_eq(page_intake_init(&intake, &dest, NULL), 0);
        ck_assert_int_lt(receive(&intake, r.data, len, &err), 0);
        page_intake_free(&intake);
    }
    // Changes of a page that never came.
    struct wire_packed_page delta = {.page = 9, .kind = WIRE_PACKED_DELTA, .len = 10};
    struct {
        struct wire_packed head;
        struct wire_packed_page page;
    } meta = {.head = {.nr = 1}, .page = delta};
    char bytes[10] = {0};
    struct iovec iov = {bytes, sizeof(bytes)};
    free(r.data);
    r.data = NULL;
    r.len = 0;
    wire_put(&r.wire, WIRE_PACKED, 0, &meta, sizeof(meta), &iov, 1, NULL);
    ck_assert_int_eq(page_intake_init(&intake, &dest, NULL), 0);
    ck_assert_int_eq(receive(&intake, r.data, r.len, &err), -EPROTO);
    ck_assert_ptr_nonnull(strstr(err.text, "never came"));
    page_intake_free(&intake);
    free(r.data);
    packer_free(&p);
    free(todo);
    ram_destroy(&source);
    ram_destroy(&dest);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("pack");
    TCase *tc = tcase_create("pack");
    tcase_set_timeout(tc, 100);
    tcase_add_test(tc, test_rounds);
    tcase_add_test(tc, test_worth);
    tcase_add_test(tc, test_hostile);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
