// SPDX-License-Identifier: Apache-2.0
// The snapshot format without a VM: a small file made in memory, then every truncation, 10,000
// random bit flips, records dropped, doubled and exchanged.
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "migrate/crc32c.h"
#include "migrate/pages.h"
#include "migrate/snapshot.h"

enum { MEMORY = 16 * 1024 * 1024, RECORDS_MAX = 64 };

struct image {
    struct wire wire;
    uint8_t *data;
    size_t len;
    size_t record[RECORDS_MAX]; // where each begins
    unsigned records;
};

static int image_writev(struct wire *w, struct iovec *iov, unsigned nr, struct error *err)
{
    struct image *image = container_of(w, struct image, wire);
    ck_assert_uint_lt(image->records, RECORDS_MAX);
    image->record[image->records++] = image->len;
    for (unsigned i = 0; i < nr; i++) {
        image->data = realloc(image->data, image->len + iov[i].iov_len);
        ck_assert_ptr_nonnull(image->data);
        memcpy(image->data + image->len, iov[i].iov_base, iov[i].iov_len);
        image->len += iov[i].iov_len;
    }
    w->out = image->len;
    return 0;
}

static void write_machine(struct image *image)
{
    struct kvm_cpuid2 cpuid = {.nent = 0};
    struct machine machine = {.ram_size = MEMORY,
                              .cpus = 1,
                              .nr_regions = 1,
                              .cpuid = &cpuid,
                              .json = (char *)(uintptr_t) "{}"};
    machine.regions[0] = (struct wire_region) {0, MEMORY};
    void *meta;
    size_t len;
    ck_assert_int_eq(machine_encode(&machine, &meta, &len, NULL), 0);
    wire_put(&image->wire, WIRE_MACHINE, 0, meta, len, NULL, 0, NULL);
    free(meta);
}

static void write_pages(struct image *image)
{
    struct ram ram;
    const struct ram_config config = {.size = MEMORY};
    struct page_batch *batch = malloc(sizeof(*batch));
    struct wire_end end = {0};
    ck_assert_int_eq(ram_create(&ram, &config, NULL), 0);
    memset(ram_page(&ram, 5), 5, PAGE_SIZE);
    memset(ram_page(&ram, 9), 9, 2 * PAGE_SIZE);
    for (uint64_t page = 0; page < ram.pages;) {
        page_batch_reset(batch, &ram);
        for (; page < ram.pages && batch->nr_data < 2; page++)
            ck_assert(page_batch_add(batch, page, page_is_zero(ram_page(&ram, page))));
        ck_assert_int_eq(page_batch_put(batch, &image->wire, PAGE_SIZE, NULL), 0);
        end.data_pages += batch->nr_data;
        end.zero_pages += batch->nr_zero;
    }
    ck_assert_uint_eq(end.data_pages, 3);
    wire_put(&image->wire, WIRE_END, 0, &end, sizeof(end), NULL, 0, NULL);
    ram_destroy(&ram);
    free(batch);
}

static void image_create(struct image *image)
{
    *image = (struct image) {.wire = {.name = "image", .writev = image_writev}};
    struct snapshot_header header = {
        .version = WIRE_VERSION, .oldest = WIRE_VERSION, .kind = SNAPSHOT_FULL};
    memcpy(header.magic, SNAPSHOT_MAGIC, sizeof(header.magic));
    header.crc = crc32c(0, &header, offsetof(struct snapshot_header, crc));
    struct iovec iov = {&header, sizeof(header)};
    image_writev(&image->wire, &iov, 1, NULL);
    write_machine(image);
    char blob[64] = "state";
    iov = (struct iovec) {blob, sizeof(blob)};
    struct wire_state state = {sizeof(blob), crc32c(0, blob, sizeof(blob))};
    wire_put(&image->wire, WIRE_STATE, 0, &state, sizeof(state), &iov, 1, NULL);
    write_pages(image);
    image->record[image->records] = image->len;
}

static int verify(const uint8_t *data, size_t len, struct error *err)
{
    struct wire_mem mem;
    struct snapshot_report report;
    wire_mem_init(&mem, data, len);
    return snapshot_verify(&mem.wire, &report, err);
}

START_TEST(test_whole)
{
    struct image image;
    struct error err = {0};
    image_create(&image);
    ck_assert_msg(!verify(image.data, image.len, &err), "%s", err.text);
    // Page data lies page-aligned in the file.
    for (unsigned i = 3; i + 1 < image.records; i++) {
        struct wire_header h;
        memcpy(&h, image.data + image.record[i], sizeof(h));
        ck_assert_int_eq(h.type, WIRE_PAGES);
        ck_assert(!h.data_len || (image.record[i] + sizeof(h) + h.meta_len) % PAGE_SIZE == 0);
    }
    free(image.data);
}
END_TEST

START_TEST(test_truncated)
{
    struct image image;
    image_create(&image);
    for (size_t len = 0; len < image.len; len++) {
        struct error err = {0};
        ck_assert_msg(verify(image.data, len, &err) == -ENODATA, "%zu of %zu bytes: %s", len,
                      image.len, err.text);
    }
    free(image.data);
}
END_TEST

START_TEST(test_flipped)
{
    struct image image;
    uint64_t seed = 42;
    image_create(&image);
    for (unsigned i = 0; i < 10000; i++) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        // A third of them outside page data, where there is more to get wrong.
        size_t at = (seed >> 20) % (i % 3 ? image.len : 600);
        uint8_t bit = (uint8_t)(1u << (seed >> 61));
        struct error err = {0};
        image.data[at] ^= bit;
        ck_assert_msg(verify(image.data, image.len, &err) < 0, "bit 0x%x of byte %zu", bit, at);
        ck_assert_uint_gt(strlen(err.text), 10);
        image.data[at] ^= bit;
    }
    free(image.data);
}
END_TEST

// Whole records, each with a right checksum, in a wrong order or number.
START_TEST(test_records_shuffled)
{
    struct image image;
    image_create(&image);
    uint8_t *bad = malloc(2 * image.len);
    for (unsigned i = 1; i < image.records; i++) {
        size_t start = image.record[i], end = image.record[i + 1], tail = image.len - end;
        memcpy(bad, image.data, start); // without it
        memcpy(bad + start, image.data + end, tail);
        ck_assert_msg(verify(bad, image.len - (end - start), NULL) < 0, "record %u dropped", i);
        memcpy(bad, image.data, end); // twice
        memcpy(bad + end, image.data + start, image.len - start);
        ck_assert_msg(verify(bad, image.len + end - start, NULL) < 0, "record %u doubled", i);
        if (i + 1 == image.records)
            break;
        size_t next = image.record[i + 2]; // exchanged with the next
        memcpy(bad, image.data, start);
        memcpy(bad + start, image.data + end, next - end);
        memcpy(bad + start + next - end, image.data + start, end - start);
        memcpy(bad + next, image.data + next, image.len - next);
        ck_assert_msg(verify(bad, image.len, NULL) < 0, "record %u exchanged", i);
    }
    memcpy(bad, image.data, image.len);
    bad[image.len] = 0;
    ck_assert_int_lt(verify(bad, image.len + 1, NULL), 0);
    free(bad);
    free(image.data);
}
END_TEST

// Files of another kind or version say so.
START_TEST(test_foreign)
{
    struct image image;
    struct error err = {0};
    image_create(&image);
    struct snapshot_header *h = (struct snapshot_header *)image.data;
    h->version = h->oldest = WIRE_VERSION + 1;
    h->crc = crc32c(0, h, offsetof(struct snapshot_header, crc));
    ck_assert_int_eq(verify(image.data, image.len, &err), -EPROTONOSUPPORT);
    memcpy(h->magic, "QEVMxxxx", 8);
    ck_assert_int_eq(verify(image.data, image.len, &err), -EINVAL);
    ck_assert_ptr_nonnull(strstr(err.text, "not a ferry snapshot"));
    free(image.data);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("snapshot");
    TCase *tc = tcase_create("snapshot");
    tcase_set_timeout(tc, 100);
    tcase_add_test(tc, test_whole);
    tcase_add_test(tc, test_truncated);
    tcase_add_test(tc, test_flipped);
    tcase_add_test(tc, test_records_shuffled);
    tcase_add_test(tc, test_foreign);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
