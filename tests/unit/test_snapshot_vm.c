// SPDX-License-Identifier: Apache-2.0
// Snapshots of a real guest and VMs made from them, the byte-increment guest as oracle: full ones
// and chains, all layouts, paused and running, memory above 3 GiB. FERRY_LONG=1: every file of a
// chain is restored, and more damage.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "migrate/snapshot.h"
#include "tests/bare/oracle.h"

static bool long_run(void)
{
    return getenv("FERRY_LONG") != NULL;
}

static const struct {
    enum snapfile_layout layout;
    enum snapfile_compress compress;
} forms[] = {{SNAPFILE_PACKED, SNAPFILE_LZ4},
             {SNAPFILE_PACKED, SNAPFILE_NONE},
             {SNAPFILE_MAPPED, SNAPFILE_NONE}};

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
    // In memory: what is tested here is not the disk.
    const char *tmp = getenv("TMPDIR") ?: access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    snprintf(dir, sizeof(dir), "%s/ferry-snapshot-XXXXXX", tmp);
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void dir_remove(void)
{
    DIR *d = opendir(dir);
    const struct dirent *e;
    while (d && (e = readdir(d)))
        unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
    ck_assert_int_eq(rmdir(dir), 0);
}

// --- saving and restoring

static int save(struct guest *g, const struct snapshot_params *params,
                struct snapshot_report *report, struct error *err)
{
    struct host host = {.guest = g};
    struct migrate_hooks hooks = hooks_of(&host);
    return snapshot_save(g->bare->vm, params, &hooks, NULL, report, err);
}

static void print_report(const char *what, const struct snapshot_report *r)
{
    printf("%s: %llu data, %llu zero pages, %llu KiB stored, pause %llu us, total %llu us\n", what,
           (unsigned long long)r->data_pages, (unsigned long long)r->zero_pages,
           (unsigned long long)r->stored_bytes / 1024, (unsigned long long)r->pause_ns / 1000,
           (unsigned long long)r->total_ns / 1000);
}

// A second VM from the file: its memory is right, and it goes on. Returns it.
static struct bare *restored(struct guest *g, const char *path)
{
    struct host host = {.guest = g};
    struct migrate_hooks hooks = hooks_of(&host);
    struct snapshot_report report;
    struct vm *vm;
    OK(snapshot_load(path, &hooks, &vm, &report, &err));
    print_report("load", &report);
    ck_assert(vm_paused(vm));
    oracle_check(g, vm);
    return host.bare;
}

static void restore_check(const struct guest *g, const char *path)
{
    struct guest copy = *g;
    copy.bare = restored(&copy, path);
    bare_resume(copy.bare);
    guest_check(&copy);
    guest_end(&copy);
}

static void snapshot_once(struct guest *g, bool paused, unsigned form)
{
    struct snapshot_report report;
    struct snapshot_params params;
    snapshot_params_default(&params, in_dir("once"));
    params.layout = forms[form].layout;
    params.compress = forms[form].compress;
    if (paused)
        bare_pause(g->bare);
    OK(save(g, &params, &report, &err));
    print_report("save", &report);
    ck_assert_int_eq(vm_paused(g->bare->vm), paused);
    if (paused)
        bare_resume(g->bare);
    guest_check(g); // the saved guest goes on
    struct bare *bare = restored(g, params.path);
    guest_end(g);
    g->bare = bare;
    bare_resume(g->bare);
    guest_check(g);
}

START_TEST(test_snapshot)
{
    static const struct {
        unsigned cpus;
        uint64_t memory, base;
        enum ram_backing backing;
    } kinds[] = {{1, 64 * MiB, 0, RAM_ANONYMOUS},
                 {4, 64 * MiB, 0, RAM_MEMFD},
                 {2, 3 * GiB + 64 * MiB, 0xc0000000 - 4 * MiB, RAM_ANONYMOUS}};
    dir_make();
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++) {
        struct guest g = {.backing = kinds[i].backing};
        guest_boot(&g, kinds[i].cpus, kinds[i].memory, 2048, kinds[i].base, 0);
        for (unsigned form = 0; form < ARRAY_SIZE(forms); form++)
            snapshot_once(&g, form % 2, form); // of a restored guest, over the older file
        snapshot_once(&g, true, 0);
        guest_end(&g);
    }
    dir_remove();
}
END_TEST

// Ten files, each of another form; some by the log of writes, some by comparing, one of an older
// parent. The guest runs all the while.
static void chain_run(unsigned cpus, uint64_t memory, uint64_t base, enum ram_log log)
{
    struct guest g = {.log = log};
    struct snapshot_track track = {0};
    struct snapshot_report report;
    char name[16];
    dir_make();
    guest_boot(&g, cpus, memory, 1024, base, 0);
    guest_touches_all(&g);
    for (unsigned n = 0; n < 10; n++) {
        struct snapshot_params params;
        snprintf(name, sizeof(name), "%u", n);
        snapshot_params_default(&params, in_dir(name));
        params.layout = forms[n % 3].layout;
        params.compress = forms[n % 3].compress;
        params.diff = n > 0;
        params.log = n > 2;
        params.track = n == 7 ? NULL : &track;
        params.parent = n == 7 ? in_dir("6") : n == 8 ? in_dir("7") : NULL;
        if (n == 5)
            bare_pause(g.bare);
        OK(save(&g, &params, &report, &err));
        print_report(name, &report);
        ck_assert_int_eq(report.kind, n ? SNAPFILE_DIFF : SNAPFILE_FULL);
        ck_assert_int_eq(track.logging, n > 2);
        ck_assert_uint_lt(report.data_pages, g.bare->vm->ram.pages / 2);
        if (n == 5)
            bare_resume(g.bare);
        guest_check(&g);
    }
    snapshot_track_end(&track, g.bare->vm);
    for (unsigned n = 0; n < 10; n += long_run() ? 1 : 3) {
        snprintf(name, sizeof(name), "%u", n);
        restore_check(&g, in_dir(name));
        OK(snapshot_verify(in_dir(name), &report, &err));
        ck_assert_uint_eq(report.depth, n + 1);
    }
    for (unsigned form = 0; form < ARRAY_SIZE(forms); form++) { // merged: one file that needs none
        struct snapshot_params params;
        snapshot_params_default(&params, in_dir("9"));
        params.layout = forms[form].layout;
        params.compress = forms[form].compress;
        OK(snapshot_merge(in_dir("9"), &params, &report, &err));
        ck_assert_uint_eq(report.depth, 1);
        ck_assert_int_eq(snapfile_remove(in_dir("8"), NULL), form ? -ENOENT : 0);
        restore_check(&g, in_dir("9"));
    }
    guest_end(&g);
    dir_remove();
}

START_TEST(test_chain)
{
    chain_run(1, 64 * MiB, 0, RAM_LOG_BITMAP);
}
END_TEST

START_TEST(test_chain_dirty_ring)
{
    if (bare_has_log(RAM_LOG_RING))
        chain_run(2, 64 * MiB, 0, RAM_LOG_RING);
}
END_TEST

START_TEST(test_chain_above_3g)
{
    chain_run(4, 3 * GiB + 64 * MiB, 0xc0000000 - 2 * MiB, RAM_LOG_BITMAP);
}
END_TEST

// What is written between two snapshots is in the diff, and nothing else.
START_TEST(test_diff_is_exact)
{
    struct guest g = {0};
    struct snapshot_track track = {0};
    struct snapshot_report report;
    struct snapshot_params params;
    dir_make();
    guest_boot(&g, 1, 64 * MiB, 512, 0, 0);
    guest_touches_all(&g);
    bare_pause(g.bare);
    uint8_t *far = ram_page(&g.bare->vm->ram, 12000); // nobody else's
    memset(far, 7, 2 * PAGE_SIZE);
    for (unsigned logged = 0; logged < 2; logged++) {
        snapshot_params_default(&params, in_dir("a"));
        params.track = &track;
        params.log = logged;
        OK(save(&g, &params, &report, &err));
        params.diff = true;
        params.path = in_dir("b");
        OK(save(&g, &params, &report, &err));
        ck_assert_uint_eq(report.data_pages + report.zero_pages, 0);
        memset(far, 8, 10);
        memset(far + PAGE_SIZE, 0, PAGE_SIZE);
        ram_mark_dirty(&g.bare->vm->ram, ram_page_gpa(&g.bare->vm->ram, 12000), 2 * PAGE_SIZE);
        params.path = in_dir("c");
        OK(save(&g, &params, &report, &err));
        ck_assert_uint_eq(report.data_pages, 1);
        ck_assert_uint_eq(report.zero_pages, 1);
        struct bare *copy = restored(&g, params.path);
        ck_assert(!memcmp(ram_page(&copy->vm->ram, 12000), far, 2 * PAGE_SIZE));
        bare_end(copy);
        free(copy);
        // What the balloon gives back is zero here, and so in the next diff.
        uint64_t given, gpa = ram_page_gpa(&g.bare->vm->ram, 12000);
        OK(ram_discard(&g.bare->vm->ram, gpa, PAGE_SIZE, &given, &err));
        params.path = in_dir("d");
        params.parent = in_dir("c");
        OK(save(&g, &params, &report, &err));
        ck_assert_uint_eq(report.data_pages, 0);
        ck_assert_uint_eq(report.zero_pages, 1);
        params.parent = NULL;
        copy = restored(&g, params.path);
        ck_assert_uint_eq(*(uint8_t *)ram_page(&copy->vm->ram, 12000), 0);
        bare_end(copy);
        free(copy);
        OK(snapfile_remove(in_dir("d"), &err));
        memset(far, 7, 2 * PAGE_SIZE);
        OK(snapfile_remove(in_dir("c"), &err));
        OK(snapfile_remove(in_dir("b"), &err));
    }
    // A diff of a file that is not there, that failed: the next one misses nothing.
    memset(far, 9, 1);
    ram_mark_dirty(&g.bare->vm->ram, ram_page_gpa(&g.bare->vm->ram, 12000), 1);
    params.path = "/nonexistent/d";
    ck_assert_int_lt(save(&g, &params, &report, NULL), 0);
    params.path = in_dir("a"); // its own parent
    ck_assert_int_lt(save(&g, &params, &report, NULL), 0);
    params.path = in_dir("b");
    params.parent = in_dir("a");
    OK(save(&g, &params, &report, &err));
    ck_assert_uint_ge(report.data_pages, 1);
    struct bare *copy = restored(&g, params.path);
    ck_assert(!memcmp(ram_page(&copy->vm->ram, 12000), far, 2 * PAGE_SIZE));
    bare_end(copy);
    free(copy);
    snapshot_track_end(&track, g.bare->vm);
    bare_resume(g.bare);
    guest_check(&g);
    guest_end(&g);
    dir_remove();
}
END_TEST

// Damage anywhere is found before the guest runs; nothing is left behind.
START_TEST(test_damage)
{
    struct guest g = {0};
    struct host host = {.guest = &g};
    struct migrate_hooks hooks = hooks_of(&host);
    struct snapshot_report report;
    struct snapshot_params params;
    uint64_t seed = 1;
    dir_make();
    guest_boot(&g, 1, 16 * MiB, 64, 0, 0);
    snapshot_params_default(&params, in_dir("a"));
    OK(save(&g, &params, &report, &err));
    uint64_t size = report.file_bytes;
    int fd = open(params.path, O_RDWR);
    ck_assert_int_ge(fd, 0);
    for (unsigned i = 0; i < (long_run() ? 1000 : 40); i++) {
        struct vm *vm;
        struct error err = {0};
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        // A third each in the header and behind the data.
        uint64_t r = seed >> 16;
        off_t at = (off_t)(i % 3 == 0 ? r % 512 : i % 3 == 1 ? size - 1 - r % 4000 : r % size);
        uint8_t byte, bad;
        ck_assert_int_eq(pread(fd, &byte, 1, at), 1);
        bad = byte ^ (uint8_t)(1u << (seed >> 61));
        ck_assert_int_eq(pwrite(fd, &bad, 1, at), 1);
        int ret = snapshot_load(params.path, &hooks, &vm, &report, &err);
        ck_assert_msg(ret < 0, "flip of bit %u of byte %lld was not found", (unsigned)(seed >> 61),
                      (long long)at);
        ck_assert_ptr_null(vm);
        ck_assert_ptr_null(host.bare);
        ck_assert_int_eq(pwrite(fd, &byte, 1, at), 1);
    }
    for (unsigned i = 20; i-- > 0;) {
        struct vm *vm;
        struct error err = {0};
        ck_assert_int_eq(ftruncate(fd, (off_t)(size * i / 20)), 0);
        ck_assert_int_lt(snapshot_load(params.path, &hooks, &vm, &report, &err), 0);
        ck_assert_ptr_null(host.bare);
    }
    close(fd);
    OK(save(&g, &params, &report, &err)); // over the ruin
    restore_check(&g, params.path);
    guest_end(&g);
    dir_remove();
}
END_TEST

// No room, no such folder, not a file: a clear error, no leftovers, the guest goes on.
START_TEST(test_failures)
{
    struct guest g = {0};
    struct snapshot_report report;
    struct snapshot_params params;
    guest_boot(&g, 1, 32 * MiB, 1024, 0, 0);
    static const char *const bad[] = {"/nonexistent/a.snapshot", "/dev/full", "/dev"};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct error err = {0};
        snapshot_params_default(&params, bad[i]);
        ck_assert_int_lt(save(&g, &params, &report, &err), 0);
        ck_assert_ptr_nonnull(strstr(err.text, bad[i]));
        params.diff = true;
        ck_assert_int_eq(save(&g, &params, &report, &err), -EINVAL);
        ck_assert_ptr_nonnull(strstr(err.text, "a diff of what"));
        guest_check(&g);
    }
    guest_end(&g);
}
END_TEST

// The disk fills up at any byte: the older file stays, nothing else does, the guest goes on.
START_TEST(test_no_room)
{
    struct guest g = {0};
    struct snapshot_report report, first;
    struct snapshot_params params;
    dir_make();
    signal(SIGXFSZ, SIG_IGN);
    guest_boot(&g, 1, 32 * MiB, 256, 0, 0);
    guest_touches_all(&g);
    snapshot_params_default(&params, in_dir("a"));
    params.compress = SNAPFILE_NONE;
    OK(save(&g, &params, &first, &err));
    for (unsigned i = 0; i < 8; i++) {
        struct rlimit limit = {first.file_bytes * i / 8, RLIM_INFINITY};
        struct error full = {0};
        // check writes a file of its own at each assertion: none while the limit holds.
        int set = setrlimit(RLIMIT_FSIZE, &limit);
        int ret = save(&g, &params, &report, &full);
        limit.rlim_cur = RLIM_INFINITY;
        ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        ck_assert_int_eq(set, 0);
        ck_assert_int_eq(ret, -EFBIG);
        ck_assert_ptr_nonnull(strstr(full.text, "File too large"));
        guest_check(&g);
    }
    OK(snapshot_verify(params.path, &report, &err));
    ck_assert(!memcmp(report.id, first.id, sizeof(first.id)));
    restore_check(&g, params.path);
    guest_end(&g);
    ck_assert_int_eq(unlink(params.path), 0);
    ck_assert_int_eq(rmdir(dir), 0); // no temporary file
}
END_TEST

// The same file with a machine that shows its guest every feature of a CPUID leaf.
static void rewrite_features(const char *from, const char *to)
{
    struct snapfile *f;
    struct snapfile_writer *w;
    size_t len;
    OK(snapfile_open(&f, from, &err));
    const struct snapfile_params p = {.layout = SNAPFILE_PACKED, .pages = snapfile_info(f)->pages};
    OK(snapfile_create(&w, to, &p, &err));
    const void *state = snapfile_section(f, SNAPFILE_STATE, &len);
    OK(snapfile_set_section(w, SNAPFILE_STATE, state, len, &err));
    const void *old = snapfile_section(f, SNAPFILE_MACHINE, &len);
    uint8_t *meta = malloc(len);
    struct wire_machine head;
    unsigned changed = 0;
    memcpy(meta, old, len);
    memcpy(&head, meta, sizeof(head));
    uint8_t *entries = meta + sizeof(head) + head.nr_regions * sizeof(struct wire_region);
    for (uint32_t i = 0; i < head.nr_cpuid; i++) {
        struct kvm_cpuid_entry2 e;
        memcpy(&e, entries + i * sizeof(e), sizeof(e));
        if (e.function != 7 || e.index)
            continue;
        e.ebx = e.ecx = e.edx = UINT32_MAX;
        memcpy(entries + i * sizeof(e), &e, sizeof(e));
        changed++;
    }
    ck_assert_uint_eq(changed, 1);
    OK(snapfile_set_section(w, SNAPFILE_MACHINE, meta, len, &err));
    OK(snapfile_commit(w, NULL, &err));
    snapfile_close(f);
    free(meta);
}

START_TEST(test_lacking_feature)
{
    struct guest g = {0};
    struct host host = {.guest = &g};
    struct migrate_hooks hooks = hooks_of(&host);
    struct snapshot_report report;
    struct snapshot_params params;
    struct vm *vm;
    struct error why = {0};
    dir_make();
    guest_boot(&g, 1, 16 * MiB, 64, 0, 0);
    snapshot_params_default(&params, in_dir("a"));
    OK(save(&g, &params, &report, &err));
    rewrite_features(in_dir("a"), in_dir("b"));
    ck_assert_int_lt(snapshot_load(in_dir("b"), &hooks, &vm, &report, &why), 0);
    printf("%s\n", why.text);
    ck_assert_msg(strstr(why.text, "CPU") != NULL, "%s", why.text);
    ck_assert_ptr_null(host.bare);
    guest_end(&g);
    dir_remove();
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_test(tc, test_snapshot);
    tcase_add_test(tc, test_chain);
    tcase_add_test(tc, test_chain_dirty_ring);
    tcase_add_test(tc, test_chain_above_3g);
    tcase_add_test(tc, test_diff_is_exact);
    tcase_add_test(tc, test_damage);
    tcase_add_test(tc, test_failures);
    tcase_add_test(tc, test_no_room);
    tcase_add_test(tc, test_lacking_feature);
}

int main(void)
{
    return bare_main("snapshot_vm", add_tests);
}
