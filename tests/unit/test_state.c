// SPDX-License-Identifier: Apache-2.0
// The state registry with tables of its own, and everything hostile that can be done to a blob.
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "vmm/state.h"
#include "vmm/util.h"

struct thing {
    uint8_t byte;
    uint16_t word;
    uint32_t dword;
    uint64_t qword;
    uint16_t words[5];
    uint8_t raw[7];
    uint32_t var_len;
    uint8_t var[32];
    uint32_t added; // since version 2
    // not saved
    unsigned saves, loads;
    uint16_t loaded_version;
    int save_error, load_error;
    unsigned order; // when it was loaded
};

static unsigned load_count;

static int thing_save(void *object, struct error *err)
{
    struct thing *t = object;
    t->saves++;
    return t->save_error ? error_set(err, t->save_error, "save refused") : 0;
}

static int thing_load(void *object, uint16_t version, struct error *err)
{
    struct thing *t = object;
    t->loads++;
    t->order = ++load_count;
    t->loaded_version = version;
    return t->load_error ? error_set(err, t->load_error, "load refused") : 0;
}

static const struct state_field fields[] = {
    STATE_FIELD_INT(struct thing, byte, 1),   STATE_FIELD_INT(struct thing, word, 1),
    STATE_FIELD_INT(struct thing, dword, 1),  STATE_FIELD_INT(struct thing, qword, 1),
    STATE_FIELD_INTS(struct thing, words, 1), STATE_FIELD_BYTES(struct thing, raw, 1),
    STATE_FIELD_INT(struct thing, added, 2),  STATE_FIELD_VAR(struct thing, var, var_len, 1),
};
static const struct state_table v1 = {"thing", 1,          1,         ARRAY_SIZE(fields),
                                      fields,  thing_save, thing_load};
static const struct state_table v2 = {"thing", 2,          1,         ARRAY_SIZE(fields),
                                      fields,  thing_save, thing_load};
static const struct state_table v3 = {"thing", 3,          2,         ARRAY_SIZE(fields),
                                      fields,  thing_save, thing_load};
static const struct state_table other = {"other", 1, 1, 0, NULL, NULL, NULL};

static struct thing example(unsigned n)
{
    struct thing t = {.byte = (uint8_t)(0xa0 + n),
                      .word = 0xbbcc,
                      .dword = 0x12345678,
                      .qword = 0x8877665544332211,
                      .words = {1, 2, 3, 4, 0xffff},
                      .raw = "bytes!",
                      .var_len = 5,
                      .var = {9, 8, 7, 6, 5},
                      .added = 77};
    return t;
}

static void reg_add(struct state_registry *reg, const struct state_table *table, uint32_t instance,
                    struct thing *t)
{
    struct error err;
    ck_assert_msg(!state_register(reg, table, instance, t, &err), "%s", err.text);
}

static void save(struct state_registry *reg, struct stream_mem *blob)
{
    struct error err;
    stream_mem_writer(blob, "blob", STATE_BLOB_MAX);
    ck_assert_msg(!state_save(reg, &blob->stream, &err), "%s", err.text);
}

static int load(const struct state_registry *reg, const void *data, size_t len, struct error *err)
{
    struct stream_mem in;
    err->text[0] = 0;
    stream_mem_reader(&in, "blob", data, len);
    int ret = state_load(reg, &in.stream, err);
    ck_assert(ret <= 0);
    ck_assert_msg(!ret || (err->code == ret && err->text[0]), "an error without text");
    return ret;
}

// After a change: makes length and checksum right, so that what is behind them is tested.
static void reseal(uint8_t *data, size_t len)
{
    uint32_t inner = (uint32_t)(len - 4), crc;
    memcpy(data, &inner, 4);
    crc = (uint32_t)crc32(0, data + 4, (uInt)(len - 8));
    memcpy(data + len - 4, &crc, 4);
}

static void same(const struct thing *a, const struct thing *b)
{
    ck_assert_uint_eq(a->byte, b->byte);
    ck_assert_uint_eq(a->word, b->word);
    ck_assert_uint_eq(a->dword, b->dword);
    ck_assert_uint_eq(a->qword, b->qword);
    ck_assert_mem_eq(a->words, b->words, sizeof(a->words));
    ck_assert_mem_eq(a->raw, b->raw, sizeof(a->raw));
    ck_assert_uint_eq(a->var_len, b->var_len);
    ck_assert_mem_eq(a->var, b->var, a->var_len);
}

START_TEST(round_trip)
{
    struct state_registry out = {0}, in = {0};
    struct thing a[3] = {example(0), example(1), example(2)}, b[3] = {0};
    struct stream_mem blob;
    struct error err;
    for (unsigned i = 0; i < 3; i++)
        reg_add(&out, &v2, i, &a[i]);
    reg_add(&out, &other, 0, NULL);
    // Registered in another order: loaded in that order, whatever the blob has.
    reg_add(&in, &other, 0, NULL);
    for (unsigned i = 3; i-- > 0;)
        reg_add(&in, &v2, i, &b[i]);
    save(&out, &blob);
    load_count = 0;
    ck_assert_msg(!load(&in, blob.data, blob.len, &err), "%s", err.text);
    for (unsigned i = 0; i < 3; i++) {
        same(&a[i], &b[i]);
        ck_assert_uint_eq(b[i].added, 77);
        ck_assert_uint_eq(a[i].saves, 1);
        ck_assert_uint_eq(b[i].loads, 1);
        ck_assert_uint_eq(b[i].order, 3 - i);
        ck_assert_uint_eq(b[i].loaded_version, 2);
    }
    struct stream_mem again;
    save(&out, &again);
    ck_assert_uint_eq(blob.len, again.len);
    ck_assert_mem_eq(blob.data, again.data, blob.len);
    stream_mem_free(&again);
    stream_mem_free(&blob);
    state_registry_free(&out);
    state_registry_free(&in);
}
END_TEST

START_TEST(older_version_leaves_added_fields)
{
    struct state_registry out = {0}, in = {0}, newest = {0};
    struct thing a = example(0), b = {.added = 4711}, c = {.added = 1};
    struct stream_mem blob;
    struct error err;
    reg_add(&out, &v1, 0, &a);
    reg_add(&in, &v2, 0, &b);
    reg_add(&newest, &v3, 0, &c);
    save(&out, &blob);
    // A table of version 1 writes no field of version 2.
    ck_assert_msg(!load(&in, blob.data, blob.len, &err), "%s", err.text);
    same(&a, &b);
    ck_assert_uint_eq(b.added, 4711);
    ck_assert_uint_eq(b.loaded_version, 1);
    ck_assert_int_eq(load(&newest, blob.data, blob.len, &err), -EPROTO); // too old
    ck_assert_ptr_nonnull(strstr(err.text, "expected 2 to 3"));
    stream_mem_free(&blob);
    save(&newest, &blob);
    ck_assert_int_eq(load(&in, blob.data, blob.len, &err), -EPROTO); // too new
    ck_assert_uint_eq(c.loads, 0);
    stream_mem_free(&blob);
    state_registry_free(&out);
    state_registry_free(&in);
    state_registry_free(&newest);
}
END_TEST

START_TEST(sections_must_match_the_machine)
{
    struct state_registry two = {0}, one = {0};
    struct thing a[2] = {example(0), example(1)}, b = {0};
    struct stream_mem blob;
    struct error err;
    reg_add(&two, &v2, 0, &a[0]);
    reg_add(&two, &v2, 1, &a[1]);
    reg_add(&one, &v2, 0, &b);
    save(&two, &blob);
    ck_assert_int_eq(load(&one, blob.data, blob.len, &err), -ENODEV); // unknown
    ck_assert_ptr_nonnull(strstr(err.text, "thing[1]"));
    ck_assert_uint_eq(b.loads, 0);
    stream_mem_free(&blob);
    save(&one, &blob);
    ck_assert_int_eq(load(&two, blob.data, blob.len, &err), -ENODATA); // missing
    ck_assert_ptr_nonnull(strstr(err.text, "thing[1]"));
    ck_assert_uint_eq(a[0].loads, 0); // nothing is applied before all is checked
    ck_assert_int_eq(state_register(&one, &v1, 0, &b, &err), -EEXIST);
    stream_mem_free(&blob);
    state_registry_free(&one);
    state_registry_free(&two);
}
END_TEST

START_TEST(section_twice)
{
    struct state_registry reg = {0};
    struct thing t = example(0);
    struct stream_mem blob;
    struct error err;
    reg_add(&reg, &v2, 0, &t);
    save(&reg, &blob);
    size_t section = blob.len - 12 - 4, len = blob.len + section;
    autofree uint8_t *twice = malloc(len);
    memcpy(twice, blob.data, 12 + section);
    memcpy(twice + 12 + section, blob.data + 12, section);
    twice[8] = 2; // sections
    reseal(twice, len);
    ck_assert_int_eq(load(&reg, twice, len, &err), -EBADMSG);
    ck_assert_ptr_nonnull(strstr(err.text, "twice"));
    stream_mem_free(&blob);
    state_registry_free(&reg);
}
END_TEST

START_TEST(every_truncation_is_refused)
{
    struct state_registry reg = {0};
    struct thing t[2] = {example(0), example(1)};
    struct stream_mem blob;
    struct error err;
    reg_add(&reg, &v2, 0, &t[0]);
    reg_add(&reg, &v2, 1, &t[1]);
    save(&reg, &blob);
    for (size_t len = 0; len < blob.len; len++) {
        // On the heap and exactly as long: a byte too many is seen by ASan.
        autofree uint8_t *cut = malloc(len ? len : 1);
        memcpy(cut, blob.data, len);
        ck_assert_int_lt(load(&reg, cut, len, &err), 0);
        if (len < 12)
            continue;
        reseal(cut, len);
        ck_assert_int_lt(load(&reg, cut, len, &err), 0);
    }
    ck_assert_uint_eq(t[0].loads, 0);
    ck_assert_msg(!load(&reg, blob.data, blob.len, &err), "%s", err.text);
    stream_mem_free(&blob);
    state_registry_free(&reg);
}
END_TEST

START_TEST(every_bit_flip_is_refused)
{
    struct state_registry reg = {0};
    struct thing t = example(0);
    struct stream_mem blob;
    struct error err;
    reg_add(&reg, &v2, 0, &t);
    save(&reg, &blob);
    for (size_t bit = 0; bit < blob.len * 8; bit++) {
        autofree uint8_t *bad = malloc(blob.len);
        memcpy(bad, blob.data, blob.len);
        bad[bit / 8] ^= (uint8_t)(1 << bit % 8);
        ck_assert_int_lt(load(&reg, bad, blob.len, &err), 0);
    }
    ck_assert_uint_eq(t.loads, 0);
    stream_mem_free(&blob);
    state_registry_free(&reg);
}
END_TEST

// With a checksum that fits, each bit and byte either loads as other values or is refused; VAR
// lengths never exceed their field.
START_TEST(resealed_garbage_does_no_harm)
{
    struct state_registry reg = {0};
    struct stream_mem blob;
    struct error err;
    struct thing *t = malloc(sizeof(*t));
    *t = example(0);
    reg_add(&reg, &v2, 0, t);
    save(&reg, &blob);
    unsigned loaded = 0, refused = 0;
    for (size_t at = 4; at < blob.len - 4; at++)
        for (unsigned value = 0; value < 256; value++) {
            autofree uint8_t *bad = malloc(blob.len);
            memcpy(bad, blob.data, blob.len);
            bad[at] = (uint8_t)value;
            reseal(bad, blob.len);
            *t = example(0);
            if (load(&reg, bad, blob.len, &err))
                refused++;
            else
                loaded++;
            ck_assert_uint_le(t->var_len, sizeof(t->var));
        }
    ck_assert(loaded && refused);
    stream_mem_free(&blob);
    state_registry_free(&reg);
    free(t);
}
END_TEST

START_TEST(var_too_long)
{
    struct state_registry reg = {0};
    struct thing t = example(0);
    struct stream_mem blob;
    struct error err;
    reg_add(&reg, &v2, 0, &t);
    t.var_len = sizeof(t.var);
    save(&reg, &blob); // just fits
    ck_assert_int_eq(load(&reg, blob.data, blob.len, &err), 0);
    uint32_t len = sizeof(t.var) + 1;
    memcpy(blob.data + blob.len - 4 - sizeof(t.var) - 4, &len, 4);
    reseal(blob.data, blob.len);
    ck_assert_int_eq(load(&reg, blob.data, blob.len, &err), -EBADMSG);
    ck_assert_ptr_nonnull(strstr(err.text, "var"));
    stream_mem_free(&blob);
    t.var_len = sizeof(t.var) + 1; // ours is wrong: refused too
    stream_mem_writer(&blob, "blob", STATE_BLOB_MAX);
    ck_assert_int_eq(state_save(&reg, &blob.stream, &err), -EOVERFLOW);
    stream_mem_free(&blob);
    state_registry_free(&reg);
}
END_TEST

START_TEST(lengths_and_counts_are_checked)
{
    struct state_registry reg = {0};
    struct thing t = example(0);
    struct stream_mem blob;
    struct error err;
    reg_add(&reg, &v2, 0, &t);
    save(&reg, &blob);
    static const uint32_t lengths[] = {0, 11, STATE_BLOB_MAX + 1, UINT32_MAX, 0x80000000};
    for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
        memcpy(blob.data, &lengths[i], 4);
        ck_assert_int_eq(load(&reg, blob.data, blob.len, &err), -EBADMSG);
    }
    static const uint32_t counts[] = {0, 2, 4096, 4097, UINT32_MAX};
    for (size_t i = 0; i < ARRAY_SIZE(counts); i++) {
        memcpy(blob.data + 8, &counts[i], 4);
        reseal(blob.data, blob.len);
        ck_assert_int_lt(load(&reg, blob.data, blob.len, &err), 0);
    }
    ck_assert_uint_eq(t.loads, 0);
    stream_mem_free(&blob);
    state_registry_free(&reg);
}
END_TEST

START_TEST(refusals_are_passed_on)
{
    struct state_registry reg = {0};
    struct thing t = example(0);
    struct stream_mem blob;
    struct error err;
    reg_add(&reg, &v2, 7, &t);
    save(&reg, &blob);
    t.load_error = -EDOM;
    ck_assert_int_eq(load(&reg, blob.data, blob.len, &err), -EDOM);
    ck_assert_ptr_nonnull(strstr(err.text, "thing[7]: load refused"));
    stream_mem_free(&blob);
    t.save_error = -EIO;
    stream_mem_writer(&blob, "blob", STATE_BLOB_MAX);
    ck_assert_int_eq(state_save(&reg, &blob.stream, &err), -EIO);
    ck_assert_ptr_nonnull(strstr(err.text, "thing[7]: save refused"));
    ck_assert_uint_eq(blob.len, 0); // nothing half-way
    stream_mem_free(&blob);
    state_registry_free(&reg);
}
END_TEST

START_TEST(long_names_are_refused)
{
    struct state_registry reg = {0};
    struct error err;
    const struct state_table good = {
        .name = "a-name-of-thirty-one-characters", .version = 1, .oldest = 1};
    const struct state_table bad = {
        .name = "a-name-of-thirty-two-characters!", .version = 1, .oldest = 1};
    const struct state_table empty = {.name = "", .version = 1, .oldest = 1};
    ck_assert_int_eq(state_register(&reg, &good, 0, NULL, &err), 0);
    ck_assert_int_eq(state_register(&reg, &bad, 0, NULL, &err), -EINVAL);
    ck_assert_int_eq(state_register(&reg, &empty, 0, NULL, &err), -EINVAL);
    struct stream_mem blob;
    save(&reg, &blob);
    ck_assert_int_eq(load(&reg, blob.data, blob.len, &err), 0);
    stream_mem_free(&blob);
    state_registry_free(&reg);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("state");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, round_trip);
    tcase_add_test(tc, older_version_leaves_added_fields);
    tcase_add_test(tc, sections_must_match_the_machine);
    tcase_add_test(tc, section_twice);
    tcase_add_test(tc, every_truncation_is_refused);
    tcase_add_test(tc, every_bit_flip_is_refused);
    tcase_add_test(tc, resealed_garbage_does_no_harm);
    tcase_add_test(tc, var_too_long);
    tcase_add_test(tc, lengths_and_counts_are_checked);
    tcase_add_test(tc, refusals_are_passed_on);
    tcase_add_test(tc, long_names_are_refused);
    Suite *suite = suite_create("state");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
