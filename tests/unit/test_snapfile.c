// SPDX-License-Identifier: Apache-2.0
// Snapshot files without a VM: what is written is read back, chains, damage at any bit, full disks,
// writers that are killed. FERRY_LONG=1: 10,000 flips and truncations, 200 kills.
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "migrate/crc32c.h"
#include "migrate/snapfile_format.h"

enum { PAGES = 700 };

static uint64_t seed = 42;

static uint64_t rnd(uint64_t below)
{
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return (seed >> 24) % below;
}

static bool long_run(void)
{
    return getenv("FERRY_LONG") != NULL;
}

// --- a directory of its own for each test

static char dir[128];

static void setup(void)
{
    // In memory: hundreds of files are synced here.
    const char *tmp = getenv("TMPDIR") ?: access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    snprintf(dir, sizeof(dir), "%s/ferry-snapfile-XXXXXX", tmp);
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static unsigned dir_each(bool remove)
{
    DIR *d = opendir(dir);
    unsigned n = 0;
    const struct dirent *e;
    while ((e = readdir(d))) {
        if (e->d_name[0] == '.')
            continue;
        n++;
        if (remove)
            unlinkat(dirfd(d), e->d_name, 0);
    }
    closedir(d);
    return n;
}

static void teardown(void)
{
    dir_each(true);
    rmdir(dir);
}

static const char *in_dir(const char *name)
{
    static char paths[8][256];
    static unsigned next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof(paths[0]), "%s/%s", dir, name);
    return path;
}

// --- memory as it should be

static void page_fill(uint8_t *page)
{
    unsigned kind = (unsigned)rnd(4);
    for (unsigned i = 0; i < PAGE_SIZE; i++)
        page[i] = kind == 0 ? 0 : kind == 1 ? (uint8_t)rnd(256) : (uint8_t)(i / 64 + seed);
    if (kind) // never zero by chance
        page[rnd(PAGE_SIZE)] |= 1;
}

static uint8_t *memory_new(void)
{
    uint8_t *memory = malloc(PAGES * PAGE_SIZE);
    for (unsigned i = 0; i < PAGES; i++)
        page_fill(memory + i * PAGE_SIZE);
    return memory;
}

static const char machine[] = "a machine", state[] = "its state, longer than that";

static void sections_set(struct snapfile_writer *w)
{
    ck_assert_int_eq(snapfile_set_section(w, SNAPFILE_MACHINE, machine, sizeof(machine), NULL), 0);
    ck_assert_int_eq(snapfile_set_section(w, SNAPFILE_STATE, state, sizeof(state), NULL), 0);
}

static struct snapfile_params params(enum snapfile_layout layout, enum snapfile_compress compress,
                                     const char *parent)
{
    return (struct snapfile_params) {.layout = layout,
                                     .compress = compress,
                                     .parent = parent,
                                     .pages = PAGES,
                                     .workers = 1 + (unsigned)rnd(4)};
}

// Writes the pages of `map` (NULL: all), a few at a time, in order or not.
static struct snapfile_report save(const char *path, const struct snapfile_params *p,
                                   const uint8_t *memory, const bool *map, bool shuffled)
{
    struct snapfile_writer *w;
    struct snapfile_report report;
    struct error err = {0};
    unsigned order[PAGES];
    ck_assert_msg(!snapfile_create(&w, path, p, &err), "%s", err.text);
    sections_set(w);
    for (unsigned i = 0; i < PAGES; i++)
        order[i] = i;
    for (unsigned i = 0; shuffled && i < PAGES; i++) {
        unsigned k = (unsigned)rnd(PAGES), t = order[i];
        order[i] = order[k];
        order[k] = t;
    }
    for (unsigned i = 0, n; i < PAGES; i += n) {
        unsigned most = 1 + (unsigned)rnd(100);
        if (map && !map[order[i]]) {
            n = 1;
            continue;
        }
        for (n = 1; i + n < PAGES && n < most && order[i + n] == order[i] + n &&
                    (!map || map[order[i + n]]);)
            n++;
        ck_assert_msg(!snapfile_add_pages(w, order[i], n, memory + order[i] * PAGE_SIZE, &err),
                      "%s", err.text);
    }
    ck_assert_msg(!snapfile_commit(w, &report, &err), "%s", err.text);
    return report;
}

static void *target_at(const struct snapfile_target *target, uint64_t page, uint64_t *count)
{
    // Memory with a seam, as below and above the hole of an x86 guest.
    *count = page < PAGES / 2 ? PAGES / 2 - page : PAGES - page;
    return (uint8_t *)target->context + (page + (page >= PAGES / 2)) * PAGE_SIZE;
}

static int load_memory(const struct snapfile *f, uint8_t *out, struct error *err)
{
    uint8_t *seamed = calloc(PAGES + 1, PAGE_SIZE);
    const struct snapfile_target target = {.at = target_at, .context = seamed};
    int ret = snapfile_load(f, &target, 0, err);
    memcpy(out, seamed, PAGES / 2 * PAGE_SIZE);
    memcpy(out + PAGES / 2 * PAGE_SIZE, seamed + (PAGES / 2 + 1) * PAGE_SIZE,
           (PAGES - PAGES / 2) * PAGE_SIZE);
    free(seamed);
    return ret;
}

// Page by page through snapfile_find, as a lazy restore does it.
static void check_find(const struct snapfile *f, const uint8_t *memory)
{
    static uint8_t chunk[SNAPFILE_CHUNK_PAGES * PAGE_SIZE];
    static const uint8_t zero[PAGE_SIZE];
    for (uint64_t page = 0; page < PAGES; page++) {
        struct snapfile_where w;
        snapfile_find(f, page, &w);
        ck_assert(w.count >= 1 && page + w.count <= PAGES && w.before <= page);
        if (w.kind == SNAPFILE_CHUNK)
            ck_assert_int_eq(snapfile_chunk(f, w.level, w.chunk, chunk, NULL), 0);
        uint64_t first = w.kind == SNAPFILE_RAW ? page : page - w.before;
        uint64_t step = 1 + (page + w.count - first) / 16; // long runs: a sample
        for (uint64_t p = first; p < page + w.count; p += step) {
            const uint8_t *is = zero;
            uint8_t raw[PAGE_SIZE];
            if (w.kind == SNAPFILE_CHUNK) {
                ck_assert_uint_lt(w.slot + p - page, w.pages);
                is = chunk + (w.slot + p - page) * PAGE_SIZE;
            } else if (w.kind == SNAPFILE_RAW) {
                ck_assert_int_eq(
                    pread(w.fd, raw, PAGE_SIZE, (off_t)(w.offset + (p - page) * PAGE_SIZE)),
                    PAGE_SIZE);
                is = raw;
            }
            ck_assert_msg(!memcmp(is, memory + p * PAGE_SIZE, PAGE_SIZE), "page %llu",
                          (unsigned long long)p);
        }
    }
}

static void check_memory(const char *path, const uint8_t *memory, unsigned depth)
{
    struct snapfile *f;
    struct error err = {0};
    size_t len;
    uint8_t *is = malloc(PAGES * PAGE_SIZE);
    ck_assert_msg(!snapfile_open(&f, path, &err), "%s", err.text);
    ck_assert_uint_eq(snapfile_depth(f), depth);
    ck_assert_str_eq(snapfile_section(f, SNAPFILE_MACHINE, &len), machine);
    ck_assert_uint_eq(len, sizeof(machine));
    ck_assert_str_eq(snapfile_section(f, SNAPFILE_STATE, &len), state);
    ck_assert_msg(!load_memory(f, is, &err), "%s", err.text);
    ck_assert(!memcmp(is, memory, PAGES * PAGE_SIZE));
    memset(is, 1, PAGES * PAGE_SIZE);
    for (unsigned i = 0, n; i < PAGES; i += n) {
        n = 1 + (unsigned)rnd(PAGES - i);
        ck_assert_msg(!snapfile_read(f, i, n, is + i * PAGE_SIZE, &err), "%s", err.text);
    }
    ck_assert(!memcmp(is, memory, PAGES * PAGE_SIZE));
    ck_assert_msg(!snapfile_verify(f, 0, &err), "%s", err.text);
    check_find(f, memory);
    snapfile_close(f);
    free(is);
}

static const struct {
    enum snapfile_layout layout;
    enum snapfile_compress compress;
} forms[] = {{SNAPFILE_PACKED, SNAPFILE_LZ4},
             {SNAPFILE_PACKED, SNAPFILE_NONE},
             {SNAPFILE_MAPPED, SNAPFILE_NONE}};

START_TEST(test_full)
{
    for (unsigned i = 0; i < 2 * ARRAY_SIZE(forms); i++) {
        uint8_t *memory = memory_new();
        const char *path = in_dir("full");
        struct snapfile_params p = params(forms[i / 2].layout, forms[i / 2].compress, NULL);
        struct snapfile_report report = save(path, &p, memory, NULL, i % 2);
        struct snapfile_info info;
        struct stat st;
        ck_assert_uint_eq(report.data_pages + report.zero_pages, PAGES);
        ck_assert_uint_gt(report.zero_pages, PAGES / 8);
        ck_assert_int_eq(stat(path, &st), 0);
        ck_assert_uint_eq(report.file_bytes, st.st_size);
        // Zero pages cost nothing; LZ4 pays.
        ck_assert_uint_le(report.stored_bytes, report.data_pages * PAGE_SIZE);
        ck_assert((report.stored_bytes < report.data_pages * PAGE_SIZE / 2) ==
                  (p.compress == SNAPFILE_LZ4));
        ck_assert_uint_le((uint64_t)st.st_blocks * 512,
                          report.stored_bytes + report.chunks * 64 + 64 * KiB);
        ck_assert_int_eq(snapfile_peek(path, &info, NULL), 0);
        ck_assert_int_eq(info.kind, SNAPFILE_FULL);
        ck_assert_uint_eq(info.data_pages, report.data_pages);
        check_memory(path, memory, 1);
        ck_assert_uint_eq(dir_each(false), 1); // no temporary file
        free(memory);
    }
}
END_TEST

// Nothing at all, and all of it zero.
START_TEST(test_empty)
{
    uint8_t *memory = calloc(PAGES, PAGE_SIZE);
    const bool none[PAGES] = {0};
    for (unsigned i = 0; i < ARRAY_SIZE(forms); i++) {
        struct snapfile_params p = params(forms[i].layout, forms[i].compress, NULL);
        ck_assert_uint_eq(save(in_dir("zero"), &p, memory, NULL, false).stored_bytes, 0);
        check_memory(in_dir("zero"), memory, 1);
        p.parent = in_dir("zero");
        ck_assert_uint_eq(save(in_dir("same"), &p, memory, none, false).data_pages, 0);
        check_memory(in_dir("same"), memory, 2);
        ck_assert_int_eq(snapfile_remove(in_dir("same"), NULL), 0);
    }
    free(memory);
}
END_TEST

// A full one and nine diffs of all forms; each restores directly, also after the chain was moved.
START_TEST(test_chain)
{
    uint8_t *memory[10], *now = memory_new();
    char name[2][16] = {"0"}, by[SNAPFILE_NAME_MAX];
    bool map[PAGES];
    struct error err;
    for (unsigned n = 0; n < 10; n++) {
        for (unsigned i = 0; i < PAGES; i++) {
            map[i] = !rnd(4);
            if (n && map[i])
                page_fill(now + i * PAGE_SIZE);
        }
        struct snapfile_params p =
            params(forms[n % 3].layout, forms[n % 3].compress, n ? in_dir(name[(n + 1) % 2]) : 0);
        snprintf(name[n % 2], sizeof(name[0]), "%u", n);
        save(in_dir(name[n % 2]), &p, now, n ? map : NULL, n % 2);
        memory[n] = malloc(PAGES * PAGE_SIZE);
        memcpy(memory[n], now, PAGES * PAGE_SIZE);
    }
    for (unsigned n = 0; n < 10; n++) {
        snprintf(name[0], sizeof(name[0]), "%u", n);
        check_memory(in_dir(name[0]), memory[n], n + 1);
        ck_assert_int_eq(snapfile_needed(in_dir(name[0]), by, &err), n < 9);
        ck_assert(n == 9 || (unsigned)atoi(by) == n + 1);
        ck_assert_int_eq(n < 9 ? snapfile_remove(in_dir(name[0]), &err) : -EBUSY, -EBUSY);
        ck_assert(n == 9 || strstr(err.text, by));
    }
    char moved[sizeof(dir)];
    snprintf(moved, sizeof(moved), "%s", dir);
    strcat(dir, "m");
    ck_assert_int_eq(rename(moved, dir), 0);
    check_memory(in_dir("9"), memory[9], 10);
    for (unsigned n = 10; n-- > 0;) {
        snprintf(name[0], sizeof(name[0]), "%u", n);
        ck_assert_int_eq(snapfile_remove(in_dir(name[0]), &err), 0);
        free(memory[n]);
    }
    free(now);
}
END_TEST

static void create_fails(const char *path, const struct snapfile_params *p, int code,
                         const char *text)
{
    struct snapfile_writer *w;
    struct error err = {0};
    unsigned files = dir_each(false);
    ck_assert_int_eq(snapfile_create(&w, path, p, &err), code);
    ck_assert_msg(strstr(err.text, text) != NULL, "%s", err.text);
    ck_assert_ptr_null(w);
    ck_assert_uint_eq(dir_each(false), files);
}

START_TEST(test_refused)
{
    uint8_t *memory = memory_new();
    struct snapfile_params full = params(SNAPFILE_PACKED, SNAPFILE_LZ4, NULL), diff = full;
    struct snapfile_writer *w;
    struct snapfile *f;
    struct error err;
    diff.parent = "elsewhere";
    save(in_dir("a"), &full, memory, NULL, false);
    diff.parent = in_dir("a");
    save(in_dir("b"), &diff, memory, NULL, false);
    create_fails(in_dir("a"), &full, -EBUSY, "b beside it needs it");
    create_fails(in_dir("b"), &(struct snapfile_params) {.pages = PAGES, .parent = in_dir("b")},
                 -EINVAL, "own parent");
    create_fails(in_dir("c"), &(struct snapfile_params) {.pages = 5, .parent = in_dir("b")},
                 -EINVAL, "of 5 pages");
    create_fails(in_dir("c"), &(struct snapfile_params) {.pages = PAGES, .parent = in_dir("no")},
                 -ENOENT, "no");
    create_fails("/tmp/ferry-test-elsewhere", &diff, -EINVAL, "another directory");
    create_fails("/nonexistent/a", &full, -ENOENT, "/nonexistent");
    create_fails("/dev/null", &full, -EINVAL, "not a regular file");
    create_fails(in_dir(""), &full, -EINVAL, "name of a file");
    create_fails(in_dir("c"),
                 &(struct snapfile_params) {
                     .pages = PAGES, .layout = SNAPFILE_MAPPED, .compress = SNAPFILE_LZ4},
                 -EINVAL, "cannot be compressed");
    // Pages that are not there or come twice; sections that are missing.
    ck_assert_int_eq(snapfile_create(&w, in_dir("c"), &full, &err), 0);
    ck_assert_int_eq(snapfile_add_pages(w, 3, 2, memory, &err), 0);
    ck_assert_int_eq(snapfile_add_pages(w, 4, 1, memory, &err), -EEXIST);
    ck_assert_int_eq(snapfile_add_zero(w, 0, 4, &err), -EEXIST);
    ck_assert_int_eq(snapfile_add_pages(w, PAGES - 1, 2, memory, &err), -ERANGE);
    ck_assert_int_eq(snapfile_add_pages(w, UINT64_MAX, 2, memory, &err), -ERANGE);
    ck_assert_int_eq(snapfile_commit(w, NULL, &err), -EINVAL);
    ck_assert_uint_eq(dir_each(false), 2);
    // Its parent is another file of that name, or gone.
    ck_assert_int_eq(rename(in_dir("a"), in_dir("x")), 0);
    ck_assert_int_eq(snapfile_open(&f, in_dir("b"), &err), -ENOENT);
    ck_assert_ptr_nonnull(strstr(err.text, "needs its parent"));
    save(in_dir("a"), &full, memory, NULL, false);
    ck_assert_int_eq(snapfile_open(&f, in_dir("b"), &err), -ESTALE);
    ck_assert_int_eq(snapfile_remove(in_dir("a"), &err), 0);
    // No snapshots.
    ck_assert_int_eq(snapfile_open(&f, "/dev/zero", &err), -EINVAL);
    ck_assert_int_eq(snapfile_open(&f, dir, &err), -EINVAL);
    ck_assert_int_eq(snapfile_open(&f, "/proc/self/exe", &err), -EINVAL);
    ck_assert_ptr_nonnull(strstr(err.text, "not a ferry snapshot"));
    ck_assert_int_lt(snapfile_remove("/proc/self/exe", &err), 0);
    free(memory);
}
END_TEST

// --- hands on the file

static uint8_t *file_get(const char *path, size_t *len)
{
    struct stat st;
    int fd = open(path, O_RDONLY);
    ck_assert_int_eq(fstat(fd, &st), 0);
    *len = (size_t)st.st_size;
    uint8_t *data = malloc(*len);
    ck_assert_int_eq(read_all(fd, data, *len), 0);
    close(fd);
    return data;
}

static void file_put(const char *path, const void *data, size_t len)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ck_assert_int_eq(write_all(fd, data, len), 0);
    close(fd);
}

static void header_put(const char *path, const struct snapfile_header *in)
{
    struct snapfile_header h = *in;
    int fd = open(path, O_WRONLY);
    h.crc = snapfile_header_crc(&h);
    ck_assert_int_eq(pwrite(fd, &h, sizeof(h), 0), sizeof(h));
    close(fd);
}

START_TEST(test_circle)
{
    static const bool none[PAGES];
    uint8_t *memory = memory_new();
    struct snapfile_params p = params(SNAPFILE_PACKED, SNAPFILE_LZ4, NULL);
    struct snapfile_header h, a;
    struct snapfile *f;
    struct error err;
    save(in_dir("0"), &p, memory, NULL, false);
    p.parent = in_dir("0");
    save(in_dir("a"), &p, memory, none, false);
    p.parent = in_dir("a");
    save(in_dir("b"), &p, memory, none, false);
    int fd = snapfile_header_read(AT_FDCWD, in_dir("b"), "b", &h, &err);
    close(fd);
    fd = snapfile_header_read(AT_FDCWD, in_dir("a"), "a", &a, &err);
    close(fd);
    strcpy(a.parent, "b");
    memcpy(a.parent_id, h.id, sizeof(h.id));
    header_put(in_dir("a"), &a);
    ck_assert_int_eq(snapfile_open(&f, in_dir("b"), &err), -ELOOP);
    ck_assert_ptr_nonnull(strstr(err.text, "circle"));
    create_fails(in_dir("c"), &(struct snapfile_params) {.pages = PAGES, .parent = in_dir("b")},
                 -E2BIG, "longer than");
    strcpy(a.parent, "a");
    memcpy(a.parent_id, a.id, sizeof(a.id));
    header_put(in_dir("a"), &a);
    ck_assert_int_eq(snapfile_open(&f, in_dir("a"), &err), -ELOOP);
    // A parent elsewhere is no name.
    static const char *const names[] = {"../x", "/etc/passwd", "..", ".", ""};
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        memset(a.parent, 0, sizeof(a.parent));
        strcpy(a.parent, names[i]);
        header_put(in_dir("a"), &a);
        ck_assert_int_eq(snapfile_open(&f, in_dir("a"), &err), -EPROTO);
    }
    free(memory);
}
END_TEST

START_TEST(test_depth)
{
    static const bool none[PAGES];
    uint8_t *memory = memory_new();
    struct snapfile_params p = params(SNAPFILE_PACKED, SNAPFILE_LZ4, NULL);
    char name[2][16];
    for (unsigned i = 0; i < SNAPFILE_DEPTH_MAX; i++) {
        snprintf(name[i % 2], sizeof(name[0]), "%u", i);
        p.parent = i ? in_dir(name[(i + 1) % 2]) : NULL;
        save(in_dir(name[i % 2]), &p, memory, i ? none : NULL, false);
    }
    check_memory(in_dir("63"), memory, SNAPFILE_DEPTH_MAX);
    p.parent = in_dir("63");
    create_fails(in_dir("64"), &p, -E2BIG, "longer than 64");
    free(memory);
}
END_TEST

// What a restore and a verify read. 0: nothing wrong was found.
static int read_all_of(const char *path, uint8_t *memory, struct error *err)
{
    struct snapfile *f;
    int ret = snapfile_open(&f, path, err);
    if (ret)
        return ret;
    ret = load_memory(f, memory, err);
    if (!ret)
        ret = snapfile_verify(f, 0, err);
    snapfile_close(f);
    return ret;
}

// Flips and truncations of the file `name`, found when `top` (it or a child) is read.
static void damage(const char *name, const char *top, unsigned times)
{
    size_t len;
    const char *path = in_dir(name);
    uint8_t *data = file_get(path, &len), *memory = malloc(PAGES * PAGE_SIZE);
    for (unsigned i = 0; i < times; i++) {
        struct error err = {0};
        bool cut = i % 8 == 7;
        // A quarter each in the header and behind the data, where there is more to get wrong.
        size_t at = i % 4 == 0 ? rnd(512) : i % 4 == 1 ? len - 1 - rnd(2000) : rnd(len);
        uint8_t bad = data[at] ^ (uint8_t)(1u << rnd(8));
        int fd = open(path, O_WRONLY);
        if (cut)
            ck_assert_int_eq(ftruncate(fd, (off_t)at), 0);
        else
            ck_assert_int_eq(pwrite(fd, &bad, 1, (off_t)at), 1);
        close(fd);
        int ret = read_all_of(in_dir(top), memory, &err);
        ck_assert_msg(ret < 0, "%s: %s at byte %zu was not found", name, cut ? "cut" : "flip", at);
        ck_assert_msg(strstr(err.text, path) != NULL, "byte %zu: %s", at, err.text);
        ck_assert_msg(strstr(err.text, "header") || strstr(err.text, "section") ||
                          strstr(err.text, "chunk") || strstr(err.text, "page") ||
                          strstr(err.text, "bytes") || strstr(err.text, "snapshot"),
                      "%s", err.text);
        if (cut) {
            file_put(path, data, len);
        } else {
            fd = open(path, O_WRONLY);
            ck_assert_int_eq(pwrite(fd, data + at, 1, (off_t)at), 1);
            close(fd);
        }
    }
    struct error err = {0};
    ck_assert_msg(!read_all_of(in_dir(top), memory, &err), "%s", err.text);
    free(data);
    free(memory);
}

START_TEST(test_damage)
{
    static const char *const names[] = {"lz4", "raw", "mapped"};
    unsigned times = long_run() ? 2500 : 60;
    bool map[PAGES];
    uint8_t *memory = memory_new();
    struct snapfile_params p;
    for (unsigned i = 0; i < PAGES; i++)
        map[i] = !rnd(3);
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        p = params(forms[i].layout, forms[i].compress, NULL);
        save(in_dir(names[i]), &p, memory, NULL, i == 1);
        damage(names[i], names[i], times);
    }
    p = params(SNAPFILE_PACKED, SNAPFILE_LZ4, in_dir("mapped"));
    save(in_dir("child"), &p, memory, map, true);
    damage("child", "child", times / 2);
    damage("mapped", "child", times / 2);
    free(memory);
}
END_TEST

// Sums that are right do not make a hostile index right: fields of chunks and runs, one by one.
START_TEST(test_index_lies)
{
    uint8_t *memory = memory_new();
    struct snapfile *f;
    for (unsigned form = 0; form < ARRAY_SIZE(forms); form++) {
        struct snapfile_params p = params(forms[form].layout, forms[form].compress, NULL);
        const char *path = in_dir("lies");
        size_t len, found = 0, same = 0;
        save(path, &p, memory, NULL, true);
        uint8_t *data = file_get(path, &len), *now = malloc(PAGES * PAGE_SIZE);
        struct snapfile_header h;
        memcpy(&h, data, sizeof(h));
        const struct snapfile_place *index = &h.sections[h.nr_sections - 1];
        for (unsigned i = 0; i < 300; i++) {
            size_t at = index->offset + rnd(index->len);
            struct error err = {0};
            uint8_t was = data[at];
            data[at] ^= (uint8_t)(1u << rnd(8));
            struct snapfile_header bad = h;
            bad.sections[h.nr_sections - 1].crc =
                crc32c(0, data + index->offset, (size_t)index->len);
            file_put(path, data, len);
            header_put(path, &bad);
            int ret = read_all_of(path, now, &err);
            data[at] = was;
            // Two runs that change places can be as good as before; nothing else is.
            found += ret < 0;
            same += !ret;
        }
        ck_assert_uint_gt(found, 200);
        ck_assert_uint_lt(same, 100);
        file_put(path, data, len);
        ck_assert_int_eq(snapfile_open(&f, path, NULL), 0);
        snapfile_close(f);
        free(data);
        free(now);
    }
    free(memory);
}
END_TEST

// --- no room, and killed

START_TEST(test_no_room)
{
    uint8_t *memory = memory_new(), *second = memory_new();
    signal(SIGXFSZ, SIG_IGN);
    for (unsigned form = 0; form < ARRAY_SIZE(forms); form++) {
        struct snapfile_params p = params(forms[form].layout, forms[form].compress, NULL);
        struct snapfile_report report = save(in_dir("a"), &p, memory, NULL, false);
        for (unsigned i = 0; i < 12; i++) {
            struct rlimit limit = {report.file_bytes * i / 12, RLIM_INFINITY};
            struct snapfile_writer *w;
            struct error err = {0};
            // check writes a file of its own at each assertion: none while the limit holds.
            int set = setrlimit(RLIMIT_FSIZE, &limit);
            int created = snapfile_create(&w, in_dir("a"), &p, &err), ret = created;
            if (!ret)
                ret = snapfile_set_section(w, SNAPFILE_MACHINE, machine, sizeof(machine), &err);
            if (!ret)
                ret = snapfile_set_section(w, SNAPFILE_STATE, state, sizeof(state), &err);
            for (unsigned page = 0; !ret && page < PAGES; page += 10)
                ret = snapfile_add_pages(w, page, 10, second + page * PAGE_SIZE, &err);
            if (ret && !created)
                snapfile_abort(w);
            else if (!ret)
                ret = snapfile_commit(w, NULL, &err);
            limit.rlim_cur = RLIM_INFINITY;
            ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
            ck_assert_int_eq(set, 0);
            ck_assert_msg(!created, "%s", err.text);
            ck_assert_int_eq(ret, -EFBIG);
            ck_assert_ptr_nonnull(strstr(err.text, "File too large"));
            ck_assert_ptr_nonnull(strstr(err.text, in_dir("a")));
            ck_assert_uint_eq(dir_each(false), 1);
        }
        check_memory(in_dir("a"), memory, 1);
    }
    free(memory);
    free(second);
}
END_TEST

static pid_t writer_child(uint8_t *memory[2], const struct snapfile_params *p)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    for (unsigned i = 0;; i++) {
        struct snapfile_writer *w;
        if (snapfile_create(&w, in_dir("a"), p, NULL))
            _exit(1);
        snapfile_set_section(w, SNAPFILE_MACHINE, machine, sizeof(machine), NULL);
        snapfile_set_section(w, SNAPFILE_STATE, state, sizeof(state), NULL);
        if (snapfile_add_pages(w, 0, PAGES, memory[i % 2], NULL) || snapfile_commit(w, NULL, NULL))
            _exit(1);
    }
}

// Whenever the writer dies, the file is whole: what it was before or what it became.
START_TEST(test_killed)
{
    uint8_t *memory[2] = {memory_new(), memory_new()}, *now = malloc(PAGES * PAGE_SIZE);
    struct snapfile_params p = params(SNAPFILE_PACKED, SNAPFILE_LZ4, NULL);
    unsigned seen[2] = {0}, times = long_run() ? 200 : 25;
    save(in_dir("a"), &p, memory[0], NULL, false);
    for (unsigned i = 0; i < times; i++) {
        struct error err = {0};
        pid_t pid = writer_child(memory, &p);
        int status;
        ck_assert_int_gt(pid, 0);
        usleep((useconds_t)rnd(60000)); // when it dies is the test's only matter of chance
        kill(pid, SIGKILL);
        ck_assert_int_eq(waitpid(pid, &status, 0), pid);
        ck_assert(WIFSIGNALED(status)); // not ended by an error of its own
        ck_assert_msg(!read_all_of(in_dir("a"), now, &err), "%s", err.text);
        bool second = memcmp(now, memory[0], PAGES * PAGE_SIZE) != 0;
        ck_assert(!memcmp(now, memory[second], PAGES * PAGE_SIZE));
        seen[second]++;
    }
    printf("killed %u times: %u old, %u new\n", times, seen[0], seen[1]);
    // What the last one left behind goes with the next; what only looks like it, stays.
    file_put(in_dir("a.tmp-backup"), "x", 1);
    file_put(in_dir("a.tmp-0123456"), "x", 1);
    file_put(in_dir("a.tmp-012345"), "x", 1);
    save(in_dir("a"), &p, memory[0], NULL, false);
    ck_assert_uint_eq(dir_each(false), 3);
    free(memory[0]);
    free(memory[1]);
    free(now);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("snapfile");
    TCase *tc = tcase_create("snapfile");
    tcase_set_timeout(tc, long_run() ? 1800 : 60);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, test_full);
    tcase_add_test(tc, test_empty);
    tcase_add_test(tc, test_chain);
    tcase_add_test(tc, test_refused);
    tcase_add_test(tc, test_circle);
    tcase_add_test(tc, test_depth);
    tcase_add_test(tc, test_damage);
    tcase_add_test(tc, test_index_lies);
    tcase_add_test(tc, test_no_room);
    tcase_add_test(tc, test_killed);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
