// SPDX-License-Identifier: Apache-2.0
// Snapshots of a guest that runs on, and VMs that run before their memory is there: the
// byte-increment guest as oracle. FERRY_LONG=1: more of each.
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "migrate/snapshot.h"
#include "tests/bare/oracle.h"

// --- a directory for the test

static char dir[128];

static const char *in_dir(const char *name)
{
    static char paths[4][256];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof(paths[0]), "%s/%s", dir, name);
    return path;
}

static void dir_make(void)
{
    const char *tmp = getenv("TMPDIR") ?: access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    snprintf(dir, sizeof(dir), "%s/ferry-live-XXXXXX", tmp);
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void dir_remove(void)
{
    glob_t found;
    if (!glob(in_dir("*"), 0, NULL, &found))
        for (size_t i = 0; i < found.gl_pathc; i++)
            unlink(found.gl_pathv[i]);
    globfree(&found);
    ck_assert_int_eq(rmdir(dir), 0);
}

// --- saving, restoring

static int save(struct guest *g, const struct snapshot_params *params, struct migration *m,
                struct snapshot_report *report, struct error *err)
{
    struct host host = {.guest = g};
    struct migrate_hooks hooks = hooks_of(&host);
    return snapshot_save(g->bare->vm, params, &hooks, m, report, err);
}

// This host can do it, or the test has nothing to say.
static bool live(const struct snapshot_report *r)
{
    if (!r->live)
        fprintf(stderr, "skipped: no snapshots of running guests on this host\n");
    return r->live;
}

struct copy {
    struct guest guest;
    struct lazy *lazy;
};

static int restore(struct copy *c, const struct guest *g, const char *path, enum lazy_mode mode,
                   struct error *err)
{
    struct host host = {.guest = &c->guest};
    struct migrate_hooks hooks = hooks_of(&host);
    struct snapshot_load_params params = {.path = path, .mode = mode};
    struct snapshot_report report;
    struct vm *vm;
    lazy_params_default(&params.lazy, path);
    params.lazy.record_ms = 50;
    c->guest = *g;
    int ret = snapshot_load_as(&params, &hooks, &vm, &c->lazy, &report, err);
    c->guest.bare = host.bare;
    printf("restore %d: %llu us\n", mode, (unsigned long long)report.total_ns / 1000);
    return ret;
}

static void copy_end(struct copy *c)
{
    vm_pause(c->guest.bare->vm, NULL);
    lazy_free(c->lazy);
    c->lazy = NULL;
    guest_end(&c->guest);
}

static const struct {
    enum snapfile_layout layout;
    enum lazy_mode mode;
} ways[] = {{SNAPFILE_PACKED, LAZY_NONE},
            {SNAPFILE_PACKED, LAZY_FAULT},
            {SNAPFILE_MAPPED, LAZY_FAULT},
            {SNAPFILE_MAPPED, LAZY_MAP}};

static const struct {
    unsigned cpus;
    uint64_t memory, base;
    enum ram_backing backing;
} kinds[] = {{1, 64 * MiB, 0, RAM_ANONYMOUS},
             {4, 64 * MiB, 0, RAM_MEMFD},
             {4, 3 * GiB + 64 * MiB, 0xc0000000 - 4 * MiB, RAM_ANONYMOUS}};

// A full one and a diff of it, of a guest that writes all the while; each is restored in each way,
// the copy goes on, is itself saved while it runs, and that is restored once more.
START_TEST(test_matrix)
{
    dir_make();
    struct guest g = {.backing = kinds[_i].backing};
    struct snapshot_track track = {0};
    struct snapshot_report report;
    guest_boot(&g, kinds[_i].cpus, kinds[_i].memory, 2048, kinds[_i].base, 0);
    guest_touches_all(&g);
    bool goes = true;
    for (unsigned w = 0; goes && w < ARRAY_SIZE(ways); w++) {
        if (_i && w % 2 != (unsigned)_i % 2 && !bare_long())
            continue;
        for (unsigned diff = 0; goes && diff < 2; diff++) {
            struct snapshot_params params;
            struct copy c;
            struct error why = {0};
            snapshot_params_default(&params, in_dir(diff ? "diff" : "full"));
            params.layout = ways[w].layout;
            params.compress = params.layout == SNAPFILE_MAPPED ? SNAPFILE_NONE : SNAPFILE_LZ4;
            params.diff = diff;
            params.log = true;
            params.track = &track;
            unlink(in_dir("diff"));
            OK(save(&g, &params, NULL, &report, &err));
            goes = live(&report);
            printf("save: pause %llu us, total %llu us, %llu pages, %llu aside\n",
                   (unsigned long long)report.pause_ns / 1000,
                   (unsigned long long)report.total_ns / 1000,
                   (unsigned long long)report.data_pages, (unsigned long long)report.aside_pages);
            guest_check(&g);
            int ret = restore(&c, &g, params.path, ways[w].mode, &why);
            if (ret == -EOPNOTSUPP && ways[w].mode == LAZY_MAP && g.backing == RAM_MEMFD)
                continue; // shared memory is not mapped from files
            ck_assert_msg(!ret, "%s", why.text);
            bare_resume(c.guest.bare);
            guest_check(&c.guest);
            if (c.lazy && (w + diff) % 2)
                OK(lazy_complete(c.lazy, &err));
            guest_check(&c.guest);
            snapshot_params_default(&params, in_dir("again"));
            OK(save(&c.guest, &params, NULL, &report, &err));
            guest_check(&c.guest);
            copy_end(&c);
            OK(restore(&c, &g, params.path, LAZY_NONE, &err));
            oracle_check(&c.guest, c.guest.bare->vm);
            copy_end(&c);
        }
    }
    snapshot_track_end(&track, g.bare->vm);
    guest_end(&g);
    dir_remove();
}
END_TEST

// The pages of the first seconds are remembered, and fetched ahead the next time.
START_TEST(test_working_set)
{
    dir_make();
    struct guest g = {0};
    struct snapshot_report report;
    struct snapshot_params params;
    struct lazy_counts first, second;
    struct copy c;
    guest_boot(&g, 1, 64 * MiB, 2048, 0, 0);
    guest_touches_all(&g);
    snapshot_params_default(&params, in_dir("a"));
    OK(save(&g, &params, NULL, &report, &err));
    for (unsigned n = 0; n < 2; n++) {
        OK(restore(&c, &g, params.path, LAZY_FAULT, &err));
        bare_resume(c.guest.bare);
        guest_moves(&c.guest);
        OK(lazy_complete(c.lazy, &err));
        lazy_counts(c.lazy, n ? &second : &first);
        guest_check(&c.guest);
        copy_end(&c);
        ck_assert_int_eq(access(in_dir("a.ws"), R_OK), 0);
    }
    ck_assert_uint_eq(first.recorded, 0);
    ck_assert_uint_gt(first.faults, 0);
    ck_assert_uint_gt(second.recorded, 0);
    ck_assert(first.complete && second.complete);
    printf("faults %llu, then %llu with a set of %llu\n", (unsigned long long)first.faults,
           (unsigned long long)second.faults, (unsigned long long)second.recorded);
    // Damaged, it is none: the guest comes all the same.
    int fd = open(in_dir("a.ws"), O_RDWR);
    ck_assert_int_eq(pwrite(fd, "\xff\xff\xff", 3, 36), 3);
    close(fd);
    OK(restore(&c, &g, params.path, LAZY_FAULT, &err));
    lazy_counts(c.lazy, &second);
    ck_assert_uint_eq(second.recorded, 0);
    bare_resume(c.guest.bare);
    guest_check(&c.guest);
    copy_end(&c);
    guest_end(&g);
    dir_remove();
}
END_TEST

// Damage in the pages is met by a guest that already runs: it is stopped, the place is named.
START_TEST(test_damage)
{
    dir_make();
    struct guest g = {0};
    struct snapshot_report report;
    struct snapshot_params params;
    guest_boot(&g, 1, 32 * MiB, 1024, 0, 0);
    guest_touches_all(&g);
    for (unsigned i = 0; i < (bare_long() ? 40 : 4); i++) {
        snapshot_params_default(&params, in_dir("a"));
        params.layout = i % 2 ? SNAPFILE_MAPPED : SNAPFILE_PACKED;
        params.compress = i % 2 ? SNAPFILE_NONE : SNAPFILE_LZ4;
        OK(save(&g, &params, NULL, &report, &err));
        int fd = open(params.path, O_RDWR);
        off_t at = SNAPFILE_HEADER + (off_t)(i % 2 ? g.range[0].base : report.stored_bytes / 2);
        uint8_t byte;
        do { // a page whose bytes have come round to zero is not in the file
            ck_assert_int_eq(pread(fd, &byte, 1, at), 1);
        } while (i % 2 && !byte && (at += PAGE_SIZE));
        byte ^= (uint8_t)(1u << i % 8);
        ck_assert_int_eq(pwrite(fd, &byte, 1, at), 1);
        close(fd);
        struct copy c;
        struct error err = {0};
        int ret = restore(&c, &g, params.path, LAZY_FAULT, &err);
        if (!ret) { // unless loading the state met it already
            bare_resume(c.guest.bare);
            lazy_complete(c.lazy, &err);
            const struct vm_stop *stop = bare_wait_stop(c.guest.bare);
            ck_assert_int_eq(stop->kind, VM_STOP_ERROR);
            ck_assert_msg(strstr(stop->text, "damaged") && strstr(stop->text, params.path), "%s",
                          stop->text);
            copy_end(&c);
        }
    }
    guest_end(&g);
    dir_remove();
}
END_TEST

struct watcher {
    struct migration *m;
    bool cancel;
    unsigned calls;
};

static void on_progress(const struct migrate_progress *p, void *arg)
{
    struct watcher *w = arg;
    w->calls++;
    ck_assert_uint_le(p->sent_bytes, p->total_bytes);
    if (w->cancel)
        migration_cancel(w->m);
}

// Cancelled, or out of room in the middle: the older file is untouched, the guest runs on.
START_TEST(test_ends)
{
    dir_make();
    struct guest g = {0};
    struct snapshot_report report;
    struct snapshot_params params;
    struct migration m;
    guest_boot(&g, 2, 64 * MiB, 4096, 0, 0);
    guest_touches_all(&g);
    snapshot_params_default(&params, in_dir("a"));
    OK(save(&g, &params, NULL, &report, &err));
    struct stat before, after;
    ck_assert_int_eq(stat(params.path, &before), 0);
    for (unsigned i = 0; i < (bare_long() ? 50 : 4); i++) {
        struct watcher w = {&m, true, 0};
        OK(migration_init(&m, &err));
        m.on_progress = on_progress;
        m.on_progress_arg = &w;
        struct error err = {0};
        ck_assert_int_eq(save(&g, &params, &m, &report, &err), -ECANCELED);
        ck_assert_uint_gt(w.calls, 0);
        migration_free(&m);
        guest_check(&g);
    }
    ck_assert_int_eq(stat(params.path, &after), 0);
    ck_assert_uint_eq(before.st_ino, after.st_ino);
    glob_t found;
    ck_assert_int_eq(glob(in_dir("*"), 0, NULL, &found), 0);
    ck_assert_uint_eq(found.gl_pathc, 1); // no temporary file is left
    globfree(&found);
    guest_end(&g);
    dir_remove();
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_loop_test(tc, test_matrix, 0, ARRAY_SIZE(kinds));
    tcase_add_test(tc, test_working_set);
    tcase_add_test(tc, test_damage);
    tcase_add_test(tc, test_ends);
}

int main(void)
{
    return bare_main("snapshot_live", add_tests);
}
