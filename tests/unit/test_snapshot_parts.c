// SPDX-License-Identifier: Apache-2.0
// What lies beside a snapshot: frozen overlays and the working set.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "migrate/disks.h"
#include "migrate/workset.h"
#include "vmm/util.h"

static char dir[64];

static char *in_dir(const char *name)
{
    static char paths[8][128];
    static unsigned next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof(paths[0]), "%s/%s", dir, name);
    return path;
}

static void setup(void)
{
    strcpy(dir, "/tmp/ferry-parts-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void teardown(void)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -r %s", dir);
    ck_assert_int_eq(system(command), 0);
}

// 8 MiB, of which two pieces exist.
static void overlay_make(const char *path, const char *text)
{
    autoclose int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    ssize_t len = (ssize_t)strlen(text);
    ck_assert_int_eq(pwrite(fd, text, (size_t)len, 0), len);
    ck_assert_int_eq(pwrite(fd, text, (size_t)len, 5 * (off_t)MiB), len);
    ck_assert_int_eq(ftruncate(fd, 8 * (off_t)MiB), 0);
}

static bool has(const char *path, const char *text)
{
    char got[64] = "";
    struct stat st;
    autoclose int fd = open(path, O_RDONLY);
    ssize_t len = (ssize_t)strlen(text);
    return fd >= 0 && !fstat(fd, &st) && st.st_size == 8 * (off_t)MiB && st.st_blocks < 2048 &&
           pread(fd, got, (size_t)len, 5 * (off_t)MiB) == len && !strcmp(got, text);
}

START_TEST(overlays_are_copied)
{
    struct error err;
    autofree char *section = NULL, *one = NULL, *two = NULL;
    char texts[512], want[512];
    struct disks_copies *copies;
    overlay_make(in_dir("ov"), "before");
    snprintf(texts, sizeof(texts), "[\"/base,ro\",\"/b2,overlay=%s,cached\"]", in_dir("ov"));
    ck_assert_int_eq(disks_check(texts, &err), 0);
    ck_assert_msg(!disks_freeze(NULL, texts, in_dir("s"), &section, &copies, &err), "%s", err.text);
    overlay_make(in_dir("ov"), "after");
    ck_assert(has(in_dir("s.disk1"), "before"));
    ck_assert_int_ne(access(in_dir("s.disk0"), F_OK), 0);
    ck_assert_int_eq(disks_complete(copies, section, in_dir("s"), NULL, &err), 0);
    ck_assert_msg(!disks_thaw(section, strlen(section), in_dir("s"), "a", &one, &err), "%s",
                  err.text);
    ck_assert_msg(!disks_thaw(section, strlen(section), in_dir("s"), "b", &two, &err), "%s",
                  err.text);
    snprintf(want, sizeof(want), "[\"/base,ro\",\"/b2,overlay=%s,cached\"]", in_dir("s.disk1.a"));
    ck_assert_str_eq(one, want);
    ck_assert(has(in_dir("s.disk1.a"), "before") && has(in_dir("s.disk1.b"), "before"));
    disks_copies_free(copies);
    disks_drop(section, in_dir("s"));
    ck_assert_int_ne(access(in_dir("s.disk1"), F_OK), 0);
}
END_TEST

START_TEST(what_cannot_be_shared)
{
    struct error err;
    char *section;
    struct disks_copies *copies;
    static const char *const bad[] = {"[\"/base\"]", "[\"/a,ro\",\"/base,cached\"]",
                                      "{}",          "[1]",
                                      "nonsense",    "[\"/base,overlay=/nonexistent/o\"]"};
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        ck_assert_int_lt(disks_freeze(NULL, bad[i], in_dir("s"), &section, &copies, &err), 0);
        ck_assert_ptr_null(section);
        ck_assert_int_ne(access(in_dir("s.disk0"), F_OK), 0);
    }
    ck_assert_int_eq(disks_freeze(NULL, "[]", in_dir("s"), &section, &copies, &err), 0);
    ck_assert_ptr_null(section);
    disks_copies_free(copies);
    // Sections are somebody else's words: nothing but a copy may be written.
    static const char *const hostile[] = {"",
                                          "{}",
                                          "[{}]",
                                          "[{\"text\": 1}]",
                                          "[{\"text\": \"/dev/sda\", \"frozen\": false}]",
                                          "[{\"text\": \"/dev/sda\"}]",
                                          "[{\"text\": \"/dev/sda\", \"frozen\": true}]",
                                          "[{\"text\": \"/a,overlay=/b\", \"frozen\": false}]",
                                          "[{\"text\": \"/a,overlay=/b\", \"frozen\": true}]"};
    for (size_t i = 0; i < ARRAY_SIZE(hostile); i++) {
        char *texts;
        ck_assert_int_lt(disks_thaw(hostile[i], strlen(hostile[i]), in_dir("s"), "n", &texts, &err),
                         0);
        ck_assert_ptr_null(texts);
    }
}
END_TEST

START_TEST(working_set)
{
    const uint8_t id[SNAPFILE_ID_LEN] = "snapshot of one", other[SNAPFILE_ID_LEN] = "of another";
    struct workset ws = {0}, back;
    struct error err;
    const char *path = in_dir("s.ws");
    ck_assert_int_eq(workset_load(&back, path, id, 5000, &err), -ENOENT);
    for (uint64_t i = 0; i < 3000; i++)
        workset_add(&ws, i * 7 % 5000);
    ck_assert_msg(!workset_save(&ws, path, id, &err), "%s", err.text);
    ck_assert_msg(!workset_load(&back, path, id, 5000, &err), "%s", err.text);
    ck_assert_uint_eq(back.nr, ws.nr);
    ck_assert_int_eq(memcmp(back.pages, ws.pages, ws.nr * sizeof(*ws.pages)), 0);
    workset_free(&back);
    ck_assert_int_eq(workset_load(&back, path, other, 5000, &err), -EINVAL);
    ck_assert_int_eq(workset_load(&back, path, id, 4999, &err), -EINVAL);
    // Each byte of it counts.
    int fd = open(path, O_RDWR);
    for (off_t at = 0; at < 32 + 3000 * 8; at += at < 64 ? 1 : 97) {
        uint8_t byte, flipped;
        ck_assert_int_eq(pread(fd, &byte, 1, at), 1);
        flipped = byte ^ 4;
        ck_assert_int_eq(pwrite(fd, &flipped, 1, at), 1);
        ck_assert_int_lt(workset_load(&back, path, id, 5000, &err), 0);
        ck_assert_ptr_null(back.pages);
        ck_assert_int_eq(pwrite(fd, &byte, 1, at), 1);
    }
    ck_assert_int_eq(ftruncate(fd, 4000), 0);
    ck_assert_int_eq(workset_load(&back, path, id, 5000, &err), -EINVAL);
    close(fd);
    workset_free(&ws);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("snapshot parts");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, overlays_are_copied);
    tcase_add_test(tc, what_cannot_be_shared);
    tcase_add_test(tc, working_set);
    Suite *suite = suite_create("snapshot_parts");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
