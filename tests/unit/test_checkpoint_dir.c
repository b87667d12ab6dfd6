// SPDX-License-Identifier: Apache-2.0
// Directories of checkpoints: names, chains, what may go, and the newest that is whole. And the
// thread that fills them, with a guest that is none.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "migrate/checkpoint.h"
#include "migrate/checkpoint_dir.h"
#include "migrate/snapshot.h"
#include "vmm/util.h"

enum { PAGES = 256 };

static char base[64];

static void base_make(void)
{
    strcpy(base, "/tmp/ferry-checkpoints-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(base));
}

static void base_remove(void)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -rf '%s'", base);
    ck_assert_int_eq(system(command), 0);
}

static const char *file(unsigned number)
{
    static char path[4][PATH_MAX];
    static unsigned next;
    char *p = path[next++ % 4];
    snprintf(p, PATH_MAX, "%s/checkpoint-%06u.snap", base, number);
    return p;
}

static int file_write(const char *path, const char *parent, struct error *err)
{
    struct snapfile_writer *w;
    struct snapfile_report report;
    char page[PAGE_SIZE];
    const struct snapfile_params params = {.layout = SNAPFILE_PACKED,
                                           .compress = SNAPFILE_LZ4,
                                           .parent = parent,
                                           .pages = PAGES,
                                           .workers = 1};
    int ret = snapfile_create(&w, path, &params, err);
    for (unsigned i = 0; i < 5 && !ret; i++) {
        for (unsigned k = 0; k < PAGE_SIZE; k++)
            page[k] = (char)(k * (i + 3) / 7);
        ret = snapfile_add_pages(w, i * 7, 1, page, err);
    }
    ret = ret ? ret : snapfile_set_section(w, SNAPFILE_MACHINE, "m", 1, err);
    ret = ret ? ret : snapfile_set_section(w, SNAPFILE_STATE, "s", 1, err);
    return ret ? ret : snapfile_commit(w, &report, err);
}

static void make(unsigned number, unsigned parent)
{
    struct error err = {0};
    ck_assert_msg(!file_write(file(number), parent ? file(parent) : NULL, &err), "%s", err.text);
}

static void damage(unsigned number, long where)
{
    FILE *f = fopen(file(number), "r+");
    ck_assert_ptr_nonnull(f);
    fseek(f, where, SEEK_SET);
    int byte = getc(f);
    fseek(f, where, SEEK_SET);
    putc(byte ^ 0x10, f);
    fclose(f);
}

static void directory(struct checkpoint_dir *dir)
{
    struct error err = {0};
    ck_assert_msg(!checkpoint_dir_read(dir, base, &err), "%s", err.text);
}

static void other(const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof(path), "%s/%s", base, name);
    fclose(fopen(path, "w"));
}

static bool exists(const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof(path), "%s/%s", base, name);
    return !access(path, F_OK);
}

START_TEST(names_and_numbers)
{
    struct checkpoint_dir dir;
    char path[PATH_MAX];
    directory(&dir);
    ck_assert_uint_eq(dir.nr, 0);
    ck_assert_int_eq(checkpoint_dir_next(&dir, path, NULL), 0);
    ck_assert_str_eq(path, file(1));
    ck_assert_int_eq(checkpoint_dir_find(&dir, "newest", path, NULL), -ENOENT);
    ck_assert_int_eq(checkpoint_dir_newest(&dir, 0, path, NULL, NULL, NULL), -ENOENT);
    checkpoint_dir_free(&dir);
    make(9, 0);
    make(10, 9);
    make(123456, 10);
    static const char *const others[] = {"lock",
                                         "policy.json",
                                         "checkpoint-7.snap",
                                         "checkpoint-0000001.snapx",
                                         "checkpoint-.snap",
                                         "checkpoint-999999999999.snap",
                                         "checkpoint-000011.snap.tmp-123456"};
    for (unsigned i = 0; i < ARRAY_SIZE(others); i++)
        other(others[i]);
    directory(&dir);
    ck_assert_uint_eq(dir.nr, 3);
    ck_assert_uint_eq(dir.files[0].number, 9);
    ck_assert_int_eq(dir.files[1].info.kind, SNAPFILE_DIFF);
    ck_assert_int_eq(checkpoint_dir_next(&dir, path, NULL), 0);
    ck_assert_str_eq(path, file(123457));
    static const char *const words[][2] = {
        {"newest", "123456"}, {"10", "10"}, {"0010", "10"}, {"checkpoint-000009.snap", "9"}};
    for (unsigned i = 0; i < ARRAY_SIZE(words); i++) {
        ck_assert_int_eq(checkpoint_dir_find(&dir, words[i][0], path, NULL), 0);
        ck_assert_str_eq(path, file((unsigned)atoi(words[i][1])));
    }
    ck_assert_int_eq(checkpoint_dir_find(&dir, "11", path, NULL), -ENOENT);
    ck_assert_int_eq(checkpoint_dir_find(&dir, "lock", path, NULL), -ENOENT);
    ck_assert_int_eq(checkpoint_dir_find(&dir, "../x", path, NULL), -ENOENT);
    checkpoint_dir_free(&dir);
    ck_assert_int_eq(checkpoint_dir_read(&dir, "/nonexistent", NULL), -ENOENT);
}
END_TEST

START_TEST(whole_chains_go)
{
    struct checkpoint_settings s;
    struct checkpoint_dir dir;
    checkpoint_settings_default(&s);
    s.keep = 2;
    for (unsigned i = 1; i <= 8; i++)
        make(i, i % 3 == 1 ? 0 : i - 1); // 1-3, 4-6, 7-8
    static const char *const stay[] = {"checkpoint-000008.snap.disk0",
                                       "checkpoint-000001.snap.disk0.vm", "snap.disk0",
                                       "checkpoint-000099.snap.disk"},
                             *const go[] = {"checkpoint-000002.snap.disk3",
                                            "checkpoint-000099.snap.disk0"};
    for (unsigned i = 0; i < ARRAY_SIZE(stay); i++)
        other(stay[i]);
    for (unsigned i = 0; i < ARRAY_SIZE(go); i++)
        other(go[i]);
    directory(&dir);
    ck_assert_uint_eq(checkpoint_dir_prune(&dir, &s, time(NULL)), 6);
    checkpoint_dir_free(&dir);
    for (unsigned i = 0; i < ARRAY_SIZE(stay); i++)
        ck_assert(exists(stay[i]));
    for (unsigned i = 0; i < ARRAY_SIZE(go); i++)
        ck_assert(!exists(go[i]));
    make(9, 8);
    make(10, 0);
    directory(&dir);
    ck_assert_uint_eq(checkpoint_dir_prune(&dir, &s, time(NULL)), 0); // 9 needs 7 and 8
    checkpoint_dir_free(&dir);
    directory(&dir);
    ck_assert_uint_eq(dir.nr, 4);
    checkpoint_dir_free(&dir);
}
END_TEST

// --- merging

// Number `n` has page 3 * n of its own, and page 1, which all have: the last of them has it.
static void stamped(unsigned n, unsigned parent)
{
    struct snapfile_writer *w;
    struct snapfile_report report;
    struct error err = {0};
    char page[PAGE_SIZE];
    const struct snapfile_params params = {.layout = SNAPFILE_PACKED,
                                           .compress = SNAPFILE_LZ4,
                                           .parent = parent ? file(parent) : NULL,
                                           .pages = PAGES,
                                           .workers = 1};
    ck_assert_msg(!snapfile_create(&w, file(n), &params, &err), "%s", err.text);
    memset(page, (int)n, sizeof(page));
    ck_assert_int_eq(snapfile_add_pages(w, 1, 1, page, &err), 0);
    ck_assert_int_eq(snapfile_add_pages(w, 3 * n, 1, page, &err), 0);
    ck_assert_int_eq(snapfile_set_section(w, SNAPFILE_MACHINE, "m", 1, &err), 0);
    ck_assert_int_eq(snapfile_set_section(w, SNAPFILE_STATE, &n, sizeof(n), &err), 0);
    ck_assert_msg(!snapfile_commit(w, &report, &err), "%s", err.text);
}

static void stamps_expect(unsigned n)
{
    struct snapfile *f;
    struct error err = {0};
    char page[PAGE_SIZE], want[PAGE_SIZE];
    size_t len;
    ck_assert_msg(!snapfile_open(&f, file(n), &err), "%s", err.text);
    ck_assert_msg(!snapfile_verify(f, 1, &err), "%s", err.text);
    for (unsigned p = 0; p < 3 * 14; p++) {
        unsigned value = p == 1 ? n : p % 3 || p / 3 > n ? 0 : p / 3;
        memset(want, (int)value, sizeof(want));
        ck_assert_int_eq(snapfile_read(f, p, 1, page, &err), 0);
        ck_assert_msg(!memcmp(page, want, sizeof(want)), "%u: page %u", n, p);
    }
    ck_assert(!memcmp(snapfile_section(f, SNAPFILE_STATE, &len), &n, sizeof(n)));
    snapfile_close(f);
}

static void chain_make(unsigned nr)
{
    for (unsigned n = 1; n <= nr; n++)
        stamped(n, n - 1);
}

static bool merge_find(struct checkpoint_settings *s, struct checkpoint_merge *merge)
{
    struct checkpoint_dir dir;
    directory(&dir);
    bool found = checkpoint_dir_merge(&dir, s, time(NULL), merge);
    checkpoint_dir_free(&dir);
    return found;
}

static unsigned prune_all(struct checkpoint_settings *s)
{
    struct checkpoint_dir dir;
    directory(&dir);
    unsigned removed = checkpoint_dir_prune(&dir, s, time(NULL));
    checkpoint_dir_free(&dir);
    return removed;
}

START_TEST(old_diffs_are_merged)
{
    struct checkpoint_settings s;
    struct checkpoint_merge merge;
    struct snapshot_report report;
    struct snapfile_info before, after;
    struct error err = {0};
    checkpoint_settings_default(&s);
    s.keep = 4;
    chain_make(7);
    ck_assert(!merge_find(&s, &merge));
    stamped(8, 7);
    other("checkpoint-000003.snap.tmp-00abcd");
    ck_assert(merge_find(&s, &merge));
    ck_assert_str_eq(merge.path, file(4));
    ck_assert(merge.files == 4 && merge.current && merge.diff_bytes);
    ck_assert_int_eq(snapfile_peek(file(4), &before, &err), 0);
    atomic_bool cancelled = true;
    ck_assert_int_eq(snapshot_settle(file(4), &cancelled, &report, &err), -ECANCELED);
    stamps_expect(8);
    ck_assert_msg(!snapshot_settle(file(4), NULL, &report, &err), "%s", err.text);
    ck_assert_int_eq(snapfile_peek(file(4), &after, &err), 0);
    ck_assert_int_eq(after.kind, SNAPFILE_FULL);
    ck_assert(!memcmp(before.id, after.id, sizeof(after.id)) &&
              before.created_s == after.created_s);
    ck_assert_uint_eq(prune_all(&s), 3);
    ck_assert(!exists("checkpoint-000003.snap.tmp-00abcd"));
    for (unsigned n = 4; n <= 8; n++)
        stamps_expect(n);
    ck_assert(!merge_find(&s, &merge));
    // A chain whose beginning is lost is not touched.
    for (unsigned n = 9; n <= 12; n++)
        stamped(n, n - 1);
    ck_assert(merge_find(&s, &merge));
    unlink(file(4));
    ck_assert(!merge_find(&s, &merge));
}
END_TEST

static void merge_and_die(struct checkpoint_settings *s, long microseconds)
{
    struct checkpoint_merge merge;
    struct snapshot_report report;
    int status;
    pid_t pid = fork();
    if (!pid) {
        if (merge_find(s, &merge) && !snapshot_settle(merge.path, NULL, &report, NULL))
            prune_all(s);
        _exit(0);
    }
    const struct timespec nap = {0, microseconds * 1000};
    nanosleep(&nap, NULL); // whenever that is: any moment is to be good
    kill(pid, SIGKILL);
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
}

// At whatever moment the process that merges and removes dies: the newest ones are whole, each with
// what it says, and the next one finishes.
START_TEST(merges_are_killed)
{
    struct checkpoint_settings s;
    struct checkpoint_merge merge;
    struct checkpoint_dir dir;
    unsigned trials = getenv("FERRY_LONG") ? 300 : 12, unmerged = 0, unpruned = 0;
    checkpoint_settings_default(&s);
    s.keep = 3;
    for (unsigned trial = 0; trial < trials; trial++) {
        struct snapshot_report report;
        struct error err = {0};
        base_remove();
        ck_assert_int_eq(mkdir(base, 0700), 0);
        chain_make(12);
        merge_and_die(&s, trial * 7919 % 20000);
        for (unsigned n = 10; n <= 12; n++)
            stamps_expect(n);
        bool left = merge_find(&s, &merge);
        unmerged += left;
        if (left)
            ck_assert_msg(!snapshot_settle(merge.path, NULL, &report, &err), "%s", err.text);
        unpruned += prune_all(&s) && !left;
        directory(&dir);
        ck_assert_uint_eq(dir.nr, 4);
        checkpoint_dir_free(&dir);
        for (unsigned n = 9; n <= 12; n++)
            stamps_expect(n);
    }
    if (getenv("FERRY_LONG"))
        printf("merges killed: %u, before the rename: %u, while removing: %u\n", trials, unmerged,
               unpruned);
}
END_TEST

START_TEST(the_damaged_stay_and_count_for_nothing)
{
    struct checkpoint_settings s;
    struct checkpoint_dir dir;
    checkpoint_settings_default(&s);
    s.keep = 1;
    make(1, 0);
    make(2, 0);
    make(3, 0);
    damage(3, 20);
    directory(&dir);
    ck_assert(!dir.files[2].readable);
    ck_assert_uint_eq(checkpoint_dir_prune(&dir, &s, time(NULL)), 1);
    checkpoint_dir_free(&dir);
    directory(&dir);
    ck_assert_uint_eq(dir.nr, 2);
    ck_assert_uint_eq(dir.files[0].number, 2);
    checkpoint_dir_free(&dir);
}
END_TEST

static void passed_over(void *context, const char *name, const struct error *why)
{
    ck_assert_int_ne(why->code, 0);
    strcat(context, name);
}

START_TEST(the_newest_whole_one)
{
    struct checkpoint_dir dir;
    char path[PATH_MAX], passed[256] = "";
    for (unsigned i = 1; i <= 5; i++)
        make(i, i == 1 || i == 4 ? 0 : i - 1); // 1-3, 4-5
    directory(&dir);
    ck_assert_int_eq(checkpoint_dir_newest(&dir, 0, path, passed_over, passed, NULL), 0);
    ck_assert_str_eq(path, file(5));
    ck_assert_str_eq(passed, "");
    damage(4, SNAPFILE_HEADER + 5); // page data, which 5 needs
    ck_assert_int_eq(checkpoint_dir_newest(&dir, 0, path, passed_over, passed, NULL), 0);
    ck_assert_str_eq(path, file(3));
    ck_assert_str_eq(passed, "checkpoint-000005.snapcheckpoint-000004.snap");
    ck_assert_int_eq(checkpoint_dir_newest(&dir, 3, path, NULL, NULL, NULL), -ENOENT);
    unlink(file(1));
    ck_assert_int_eq(checkpoint_dir_newest(&dir, 0, path, NULL, NULL, NULL), -ENOENT);
    checkpoint_dir_free(&dir);
}
END_TEST

// --- the thread

struct guest {
    unsigned saves, fulls, diffs, fail_first;
    int code;
    _Atomic unsigned cancelled;
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

static int guest_save(void *context, const char *path, const char *parent,
                      struct checkpoint_measure *made, struct error *err)
{
    struct guest *g = context;
    int ret = 0;
    pthread_mutex_lock(&g->lock);
    if (g->saves++ < g->fail_first)
        ret = error_set(err, g->code, "no luck");
    pthread_mutex_unlock(&g->lock);
    char before[PATH_MAX];
    snprintf(before, sizeof(before), "%s/%s", base, parent ? parent : "");
    if (!ret)
        ret = file_write(path, parent ? before : NULL, err);
    *made = (struct checkpoint_measure) {.full = !parent,
                                         .pause_ns = 2000000,
                                         .fault_ns = 1000000,
                                         .total_ns = 5000000,
                                         .bytes = parent ? 10 : 1000};
    pthread_mutex_lock(&g->lock);
    if (!ret)
        *(parent ? &g->diffs : &g->fulls) += 1;
    pthread_cond_signal(&g->changed);
    pthread_mutex_unlock(&g->lock);
    return ret;
}

static void guest_cancel(void *context)
{
    struct guest *g = context;
    g->cancelled++;
}

static const struct log quiet = {.name = "test", .level = LOG_ERROR, .fd = -1};

static struct checkpointer *begin(struct guest *g, struct checkpoint_saver *saver, unsigned chain)
{
    struct checkpoint_params params = {.dir = base};
    struct checkpointer *c;
    struct error err = {0};
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    *saver = (struct checkpoint_saver) {guest_save, guest_cancel, g, &quiet};
    checkpoint_settings_default(&params.settings);
    params.settings.interval = 0.02;
    params.settings.chain = chain;
    params.settings.keep = 4;
    ck_assert_msg(!checkpointer_start(&c, &params, saver, &err), "%s", err.text);
    return c;
}

static void wait_for(struct guest *g, unsigned files)
{
    pthread_mutex_lock(&g->lock);
    while (g->fulls + g->diffs < files)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

START_TEST(a_guest_is_saved)
{
    struct guest g = {0};
    struct checkpoint_saver saver;
    struct checkpoint_status status;
    struct checkpointer *c = begin(&g, &saver, 3), *second;
    const struct checkpoint_params same = {
        .dir = base, .settings = {.interval = 1, .mtbf = 60, .chain = 1, .keep = 1}};
    struct error err = {0};
    ck_assert_int_eq(checkpointer_start(&second, &same, &saver, &err), -EBUSY);
    wait_for(&g, 14);
    checkpointer_status(c, &status);
    checkpointer_stop(c);
    ck_assert_uint_eq(g.cancelled, 1);
    ck_assert_uint_ge(g.diffs, g.fulls); // one full, two diffs
    ck_assert_uint_ge(g.fulls, 4);
    ck_assert_str_eq(status.dir, base);
    ck_assert_double_eq_tol(status.model.cost, 0.003, 1e-6);
    ck_assert_uint_ge(status.made, 13);
    ck_assert_uint_gt(status.removed, 0);
    struct checkpoint_dir dir;
    directory(&dir);
    ck_assert_uint_le(dir.nr, 4 + 2 + 1); // kept ones, the beginning of their chain, the last
    char path[PATH_MAX];
    ck_assert_int_eq(checkpoint_dir_newest(&dir, 0, path, NULL, NULL, NULL), 0);
    checkpoint_dir_free(&dir);
}
END_TEST

START_TEST(old_ones_are_merged_meanwhile)
{
    struct guest g = {0};
    struct checkpoint_saver saver;
    struct checkpoint_status status;
    struct checkpoint_dir dir;
    struct checkpointer *c = begin(&g, &saver, 40);
    unsigned files = 0;
    do {
        wait_for(&g, ++files);
        checkpointer_status(c, &status);
    } while (!status.merged || status.removed < 3 || status.made < 30);
    checkpointer_stop(c);
    char path[PATH_MAX];
    directory(&dir);
    ck_assert_uint_lt(dir.nr, 30);
    ck_assert_int_eq(checkpoint_dir_newest(&dir, 0, path, NULL, NULL, NULL), 0);
    ck_assert_str_eq(path, file(dir.files[dir.nr - 1].number));
    checkpoint_dir_free(&dir);
}
END_TEST

START_TEST(a_guest_that_is_not_ready_is_asked_again)
{
    struct guest g = {.fail_first = 2, .code = -EAGAIN};
    struct checkpoint_saver saver;
    struct checkpoint_status status;
    struct checkpointer *c = begin(&g, &saver, 1);
    wait_for(&g, 2);
    checkpointer_status(c, &status);
    checkpointer_stop(c);
    ck_assert_uint_eq(status.failed, 0);
    ck_assert_uint_eq(g.diffs, 0);
}
END_TEST

START_TEST(failures_are_told_until_one_is_made)
{
    struct guest g = {.fail_first = 1, .code = -ENOSPC};
    struct checkpoint_saver saver;
    struct checkpoint_status status;
    struct checkpointer *c = begin(&g, &saver, 4);
    pthread_mutex_lock(&g.lock);
    while (!g.saves)
        pthread_cond_wait(&g.changed, &g.lock);
    pthread_mutex_unlock(&g.lock);
    do // the thread counts it a moment after `save` has failed
        checkpointer_status(c, &status);
    while (!status.failed);
    ck_assert_str_eq(status.error.text, "no luck");
    wait_for(&g, 2);
    checkpointer_status(c, &status);
    checkpointer_stop(c);
    ck_assert_int_eq(status.error.code, 0);
    ck_assert_uint_eq(status.failed, 1);
}
END_TEST

START_TEST(mtbf_is_measured)
{
    struct guest g = {0};
    struct checkpoint_saver saver;
    struct checkpoint_status status;
    struct error err = {0};
    ck_assert_int_eq(checkpoint_failure_note(base, time(NULL), "start", &err), 0);
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(checkpoint_failure_note(base, time(NULL), "", &err), 0);
    struct checkpointer *c = begin(&g, &saver, 4);
    checkpointer_status(c, &status);
    checkpointer_stop(c);
    ck_assert_double_eq_tol(status.model.mtbf, FAILURES_MTBF / 4, 30);
    // A log that was named must be right.
    char log[PATH_MAX];
    snprintf(log, sizeof(log), "%s/bad", base);
    FILE *f = fopen(log, "w");
    fputs("sometimes\n", f);
    fclose(f);
    struct checkpoint_params params = {.dir = base, .failure_log = log};
    checkpoint_settings_default(&params.settings);
    ck_assert_int_eq(checkpointer_start(&c, &params, &saver, &err), -EINVAL);
    ck_assert_ptr_nonnull(strstr(err.text, "line 1, 'sometimes'"));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("checkpoint_dir");
    TCase *c = tcase_create("dir");
    tcase_set_timeout(c, 1200);
    tcase_add_checked_fixture(c, base_make, base_remove);
    tcase_add_test(c, names_and_numbers);
    tcase_add_test(c, whole_chains_go);
    tcase_add_test(c, old_diffs_are_merged);
    tcase_add_test(c, merges_are_killed);
    tcase_add_test(c, the_damaged_stay_and_count_for_nothing);
    tcase_add_test(c, the_newest_whole_one);
    suite_add_tcase(s, c);
    c = tcase_create("thread");
    tcase_set_timeout(c, 60);
    tcase_add_checked_fixture(c, base_make, base_remove);
    tcase_add_test(c, a_guest_is_saved);
    tcase_add_test(c, old_ones_are_merged_meanwhile);
    tcase_add_test(c, a_guest_that_is_not_ready_is_asked_again);
    tcase_add_test(c, failures_are_told_until_one_is_made);
    tcase_add_test(c, mtbf_is_measured);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
