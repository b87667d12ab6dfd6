// SPDX-License-Identifier: Apache-2.0
#include "migrate/disks.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vmm/device.h"
#include "vmm/disk.h"
#include "vmm/util.h"

// --- copying a sparse file

// Between file systems that cannot do it among themselves.
static ssize_t copy_through(int from, int to, off_t at, size_t len)
{
    char data[64 * KiB];
    ssize_t n = pread(from, data, len < sizeof(data) ? len : sizeof(data), at);
    return n <= 0 ? n : pwrite(to, data, (size_t)n, at);
}

static int copy_extent(int from, int to, off_t at, off_t end, struct error *err)
{
    bool through = false;
    while (at < end) {
        off_t in = at, out = at;
        ssize_t n = through ? copy_through(from, to, at, (size_t)(end - at))
                            : copy_file_range(from, &in, to, &out, (size_t)(end - at), 0);
        if (n < 0 && !through && (errno == EXDEV || errno == EOPNOTSUPP || errno == EINVAL)) {
            through = true;
            continue;
        }
        if (n <= 0)
            return n ? error_errno(err, "copying an overlay")
                     : error_set(err, -EIO, "an overlay got shorter while it was copied");
        at += n;
    }
    return 0;
}

// `to` is empty.
static int copy_sparse(int from, int to, struct error *err)
{
    struct stat st;
    if (fstat(from, &st) || ftruncate(to, st.st_size))
        return error_errno(err, "copying an overlay");
    for (off_t at = 0; at < st.st_size;) {
        off_t data = lseek(from, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return 0;
        off_t hole = data < 0 ? -1 : lseek(from, data, SEEK_HOLE);
        if (hole < 0)
            return error_errno(err, "copying an overlay");
        int ret = copy_extent(from, to, data, hole, err);
        if (ret)
            return ret;
        at = hole;
    }
    return 0;
}

// `opened`: `from`, and stays the caller's; -1: it is opened by its name.
static int copy_open(const char *from, int opened, const char *to, int *in, int *out,
                     struct error *err)
{
    *in = opened < 0 ? open(from, O_RDONLY | O_CLOEXEC) : fcntl(opened, F_DUPFD_CLOEXEC, 0);
    if (*in < 0)
        return error_errno(err, "%s", from);
    *out = open(to, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    return *out < 0 ? error_errno(err, "%s", to) : 0;
}

static int copy(const char *from, int opened, const char *to, struct error *err)
{
    autoclose int in = -1, out = -1;
    int ret = copy_open(from, opened, to, &in, &out, err);
    if (ret)
        return ret;
    ret = ioctl(out, FICLONE, in) ? copy_sparse(in, out, err) : 0;
    if (ret) {
        unlink(to);
        error_prefix(err, "%s to %s", from, to);
    }
    return ret;
}

// --- the texts of disks

// Where the overlay's name begins in "FILE,...,overlay=NAME,..."; *len is its length. NULL: none.
static const char *overlay_of(const char *text, size_t *len)
{
    for (const char *p = strchr(text, ','); p; p = strchr(p + 1, ','))
        if (!strncmp(p + 1, "overlay=", 8)) {
            *len = strcspn(p + 9, ",");
            return p + 9;
        }
    return NULL;
}

static bool is_read_only(const char *text)
{
    for (const char *p = strchr(text, ','); p; p = strchr(p + 1, ','))
        if (!strncmp(p + 1, "ro", 2) && (p[3] == ',' || !p[3]))
            return true;
    return false;
}

static const char *entry_text(const json_t *entry)
{
    return json_string_value(json_is_object(entry) ? json_object_get(entry, "text") : entry);
}

static int entry_fd(const json_t *entry)
{
    const json_t *fd = json_object_get(entry, "fd");
    return json_is_integer(fd) ? (int)json_integer_value(fd) : -1;
}

// The array of texts; to be freed.
static int texts_of(const char *disks, json_t **texts, struct error *err)
{
    size_t i;
    json_t *text;
    bool good = true;
    *texts = json_loads(disks, 0, NULL);
    json_array_foreach(*texts, i, text)
    {
        good = good && entry_text(text);
    }
    if (json_is_array(*texts) && good)
        return 0;
    json_decref(*texts);
    return error_set(err, -EBADMSG, "disks '%.200s': expected an array of texts", disks);
}

int disks_check(const char *disks, struct error *err)
{
    json_t *texts, *disk;
    size_t i, len;
    int ret = texts_of(disks, &texts, err);
    if (ret)
        return ret;
    json_array_foreach(texts, i, disk)
    {
        const char *text = entry_text(disk);
        if (!ret && !overlay_of(text, &len) && !is_read_only(text))
            ret = error_set(err, -EINVAL,
                            "disk%zu (%s) is written in place: only read-only disks and overlays "
                            "can be shared (run with --disk FILE,overlay=FILE)",
                            i, text);
    }
    json_decref(texts);
    return ret;
}

static int name_make(char *name, const char *path, size_t i, const char *guest, struct error *err)
{
    int n = guest ? snprintf(name, PATH_MAX, "%s.disk%zu.%s", path, i, guest)
                  : snprintf(name, PATH_MAX, "%s.disk%zu", path, i);
    return n < PATH_MAX ? 0 : error_set(err, -ENAMETOOLONG, "%s: name too long", path);
}

// --- copies of a guest's that goes on

struct disks_copies {
    unsigned nr;
    struct disk_copy {
        struct device *dev;
        struct blk_frozen *frozen;
        int to;
    } of[];
};

static bool overlay_name(const char *text, char name[PATH_MAX])
{
    size_t len;
    const char *overlay = overlay_of(text, &len);
    if (!overlay || len >= PATH_MAX)
        return false;
    memcpy(name, overlay, len);
    name[len] = 0;
    return true;
}

void disks_settle(struct vm *vm, const char *disks)
{
    json_t *texts, *disk;
    size_t i;
    char name[PATH_MAX];
    if (texts_of(disks, &texts, NULL))
        return;
    json_array_foreach(texts, i, disk)
    {
        struct device *dev =
            overlay_name(entry_text(disk), name) ? disk_of_overlay(vm, name) : NULL;
        if (dev)
            dev->class->disk->settle(dev);
    }
    json_decref(texts);
}

static int copy_begin(struct disks_copies *copies, struct device *dev, const char *from, int opened,
                      const char *to, struct error *err)
{
    autoclose int in = -1, out = -1;
    struct disk_copy *copy = &copies->of[copies->nr];
    int ret = copy_open(from, opened, to, &in, &out, err);
    if (ret || !ioctl(out, FICLONE, in))
        return ret;
    ret = dev->class->disk->freeze(dev, out, &copy->frozen, err);
    if (ret) {
        unlink(to);
        return ret;
    }
    copy->dev = dev;
    copy->to = out;
    out = -1;
    copies->nr++;
    return 0;
}

static int freeze_one(struct vm *vm, const char *text, int fd, size_t i, const char *path,
                      struct disks_copies *copies, json_t *list, struct error *err)
{
    char from[PATH_MAX], to[PATH_MAX];
    bool overlay = overlay_name(text, from);
    int ret = 0;
    if (overlay) {
        struct device *dev = vm ? disk_of_overlay(vm, from) : NULL;
        ret = name_make(to, path, i, NULL, err);
        if (!ret)
            ret = dev ? copy_begin(copies, dev, from, fd, to, err) : copy(from, fd, to, err);
    }
    if (ret)
        return ret;
    // Whoever restores works in another directory.
    autofree char *cwd = text[0] == '/' ? NULL : getcwd(NULL, 0);
    json_t *whole = json_sprintf("%s%s%s", cwd ? cwd : "", cwd ? "/" : "", text);
    json_array_append_new(list, json_pack("{s:o, s:b}", "text", whole, "frozen", overlay));
    return 0;
}

int disks_freeze(struct vm *vm, const char *disks, const char *path, char **section,
                 struct disks_copies **copies, struct error *err)
{
    json_t *texts, *disk, *list;
    size_t i;
    *section = NULL;
    *copies = NULL;
    int ret = disks_check(disks, err);
    if (!ret)
        ret = texts_of(disks, &texts, err);
    if (ret)
        return ret;
    list = json_array();
    *copies = calloc(1, sizeof(**copies) + json_array_size(texts) * sizeof((*copies)->of[0]));
    if (!*copies)
        ret = error_set(err, -ENOMEM, "no memory");
    json_array_foreach(texts, i, disk)
    {
        if (!ret)
            ret = freeze_one(vm, entry_text(disk), entry_fd(disk), i, path, *copies, list, err);
    }
    if (json_array_size(list))
        *section = json_dumps(list, JSON_COMPACT);
    if (ret) {
        disks_drop(*section, path);
        disks_copies_free(*copies);
        free(*section);
        *section = NULL;
        *copies = NULL;
    }
    json_decref(list);
    json_decref(texts);
    return ret;
}

void disks_copies_free(struct disks_copies *copies)
{
    for (unsigned i = 0; copies && i < copies->nr; i++) {
        struct device *dev = copies->of[i].dev;
        dev->class->disk->freeze_end(dev, copies->of[i].frozen);
        close(copies->of[i].to);
    }
    free(copies);
}

static int sync_one(const char *name, struct error *err)
{
    autoclose int fd = open(name, O_RDONLY | O_CLOEXEC);
    return fd < 0 || fsync(fd) ? error_errno(err, "%s", name) : 0;
}

// Ours, hence as it should be.
static int each_copy(const char *section, const char *path,
                     int (*fn)(const char *name, struct error *err), struct error *err)
{
    json_t *list = section ? json_loads(section, 0, NULL) : NULL, *entry;
    char name[PATH_MAX];
    size_t i;
    int ret = 0;
    json_array_foreach(list, i, entry)
    {
        if (ret || !json_is_true(json_object_get(entry, "frozen")))
            continue;
        ret = name_make(name, path, i, NULL, err);
        if (!ret)
            ret = fn(name, err);
    }
    json_decref(list);
    return ret;
}

int disks_complete(struct disks_copies *copies, const char *section, const char *path,
                   const atomic_bool *cancelled, struct error *err)
{
    for (unsigned i = 0; copies && i < copies->nr; i++) {
        int more;
        do {
            if (cancelled && atomic_load(cancelled))
                return error_set(err, -ECANCELED, "snapshot cancelled");
            more = copies->of[i].dev->class->disk->frozen_step(copies->of[i].frozen, err);
        } while (more > 0);
        if (more)
            return more;
    }
    return each_copy(section, path, sync_one, err);
}

static int drop_one(const char *name, struct error *err)
{
    unlink(name);
    return 0;
}

void disks_drop(const char *section, const char *path)
{
    each_copy(section, path, drop_one, NULL);
}

// --- for a guest that is made from it

static int thaw_one(json_t *texts, const char *old, size_t i, const char *path, const char *name,
                    struct error *err)
{
    char from[PATH_MAX], to[PATH_MAX], text[3 * PATH_MAX];
    size_t len;
    const char *overlay = overlay_of(old, &len);
    if (!overlay)
        return error_set(err, -EBADMSG, "%s: disk %zu has no overlay", path, i);
    int ret = name_make(from, path, i, NULL, err);
    if (!ret)
        ret = name_make(to, path, i, name, err);
    if (!ret &&
        (strchr(to, ',') || (size_t)snprintf(text, sizeof(text), "%.*s%s%s", (int)(overlay - old),
                                             old, to, overlay + len) >= sizeof(text)))
        ret = error_set(err, -EINVAL, "%s: not a name for an overlay", to);
    if (!ret)
        ret = copy(from, -1, to, err);
    if (!ret)
        json_array_append_new(texts, json_string(text));
    return ret;
}

int disks_thaw(const void *section, size_t len, const char *path, const char *name, char **disks,
               struct error *err)
{
    json_t *list = json_loadb(section, len, 0, NULL), *entry, *texts = json_array();
    size_t i;
    int ret = json_is_array(list) ? 0 : error_set(err, -EBADMSG, "%s: list of disks", path);
    json_array_foreach(list, i, entry)
    {
        const char *text = json_string_value(json_object_get(entry, "text"));
        bool frozen = json_is_true(json_object_get(entry, "frozen"));
        if (!ret && (!text || (!frozen && !is_read_only(text))))
            ret = error_set(err, -EBADMSG, "%s: list of disks, entry %zu", path, i);
        if (!ret && frozen)
            ret = thaw_one(texts, text, i, path, name, err);
        else if (!ret)
            json_array_append_new(texts, json_string(text));
    }
    *disks = ret ? NULL : json_dumps(texts, JSON_COMPACT);
    if (!ret && !*disks)
        ret = error_set(err, -ENOMEM, "no memory");
    json_decref(list);
    json_decref(texts);
    return ret;
}

// --- for the guest that is there

struct disks_back {
    unsigned nr;
    struct pair {
        int from, to;
    } pairs[]; // -1: a disk that nobody writes to
};

static int back_open_one(struct pair *p, const json_t *disk, bool frozen, size_t i,
                         const char *path, struct error *err)
{
    char from[PATH_MAX], to[PATH_MAX];
    size_t len = 0;
    const char *text = entry_text(disk), *overlay = overlay_of(text, &len);
    int fd = entry_fd(disk);
    if (!frozen)
        return is_read_only(text)
                   ? 0
                   : error_set(err, -EINVAL, "%s: disk%zu was read-only, here it is written to",
                               path, i);
    if (!overlay || len >= sizeof(to))
        return error_set(err, -EINVAL, "%s: disk%zu had an overlay, here it has none", path, i);
    memcpy(to, overlay, len);
    to[len] = 0;
    int ret = name_make(from, path, i, NULL, err);
    if (ret)
        return ret;
    p->from = open(from, O_RDONLY | O_CLOEXEC);
    if (p->from < 0)
        return error_errno(err, "%s", from);
    p->to = fd < 0 ? open(to, O_RDWR | O_CLOEXEC) : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return p->to < 0 ? error_errno(err, "%s", to) : 0;
}

static int back_open(struct disks_back *back, json_t *list, json_t *texts, const char *path,
                     struct error *err)
{
    int ret = 0;
    for (size_t i = 0; !ret && i < json_array_size(list); i++) {
        struct pair *p = &back->pairs[back->nr++];
        *p = (struct pair) {-1, -1};
        bool frozen = json_is_true(json_object_get(json_array_get(list, i), "frozen"));
        ret = back_open_one(p, json_array_get(texts, i), frozen, i, path, err);
    }
    return ret;
}

int disks_back_open(struct disks_back **out, const void *section, size_t len, const char *path,
                    const char *disks, struct error *err)
{
    json_t *texts;
    int ret = texts_of(disks, &texts, err);
    if (ret)
        return ret;
    json_t *list = json_loadb(section, len, 0, NULL);
    size_t nr = json_array_size(list);
    struct disks_back *back = calloc(1, sizeof(*back) + nr * sizeof(back->pairs[0]));
    if (!json_is_array(list))
        ret = error_set(err, -EBADMSG, "%s: list of disks", path);
    else if (nr != json_array_size(texts))
        ret = error_set(err, -EINVAL, "%s: %zu disks, this VM has %zu", path, nr,
                        json_array_size(texts));
    else if (!back)
        ret = error_set(err, -ENOMEM, "no memory");
    else
        ret = back_open(back, list, texts, path, err);
    json_decref(list);
    json_decref(texts);
    if (ret) {
        disks_back_close(back);
        return ret;
    }
    *out = back;
    return 0;
}

int disks_back_copy(const struct disks_back *back, struct error *err)
{
    for (const struct pair *p = back->pairs; p < back->pairs + back->nr; p++) {
        if (p->from < 0)
            continue;
        if (ftruncate(p->to, 0))
            return error_errno(err, "emptying an overlay");
        int ret = ioctl(p->to, FICLONE, p->from) ? copy_sparse(p->from, p->to, err) : 0;
        if (ret)
            return ret;
        if (fsync(p->to))
            return error_errno(err, "an overlay");
    }
    return 0;
}

void disks_back_close(struct disks_back *back)
{
    for (struct pair *p = back ? back->pairs : NULL; back && p < back->pairs + back->nr; p++) {
        if (p->from >= 0)
            close(p->from);
        if (p->to >= 0)
            close(p->to);
    }
    free(back);
}
