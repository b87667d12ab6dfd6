// SPDX-License-Identifier: Apache-2.0
#include "migrate/snapfile_format.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "migrate/crc32c.h"
#include "vmm/ram.h"

uint32_t snapfile_sum(const void *data, size_t len)
{
    return snapfile_sum_more(0, data, len);
}

uint32_t snapfile_sum_more(uint32_t crc, const void *data, size_t len)
{
    const uint8_t *p = data;
    for (; len >= PAGE_SIZE; p += PAGE_SIZE, len -= PAGE_SIZE) {
        uint32_t sum = page_sum(p);
        crc = crc32c(crc, &sum, sizeof(sum));
    }
    return crc32c(crc, p, len);
}

uint32_t snapfile_header_crc(const struct snapfile_header *h)
{
    return crc32c(0, h, offsetof(struct snapfile_header, crc));
}

unsigned snapfile_workers(unsigned wanted)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    if (!wanted)
        wanted = cpus < 1 ? 1 : (unsigned)cpus;
    return wanted < 4 ? wanted : 4;
}

// --- header

static bool all_zero(const void *data, size_t len)
{
    const uint8_t *p = data;
    while (len && !*p)
        p++, len--;
    return !len;
}

static int check_parent(const struct snapfile_header *h, const char *path, struct error *err)
{
    size_t len = strnlen(h->parent, sizeof(h->parent));
    bool clean = len < sizeof(h->parent) && all_zero(h->parent + len, sizeof(h->parent) - len);
    if (h->kind == SNAPFILE_FULL)
        return len || !all_zero(h->parent_id, sizeof(h->parent_id))
                   ? error_set(err, -EPROTO, "%s: header: a full snapshot with a parent", path)
                   : 0;
    if (!len || !clean || memchr(h->parent, '/', len) || !strcmp(h->parent, ".") ||
        !strcmp(h->parent, ".."))
        return error_set(err, -EPROTO,
                         "%s: header: the parent's name is not that of a file in its directory",
                         path);
    return 0;
}

// Sections lie behind the data and one behind the other, to the end of the file.
static int check_places(const struct snapfile_header *h, const char *path, struct error *err)
{
    uint64_t at = h->data_offset + h->data_bytes, types = 0;
    uint32_t last = 0;
    for (uint32_t i = 0; i < h->nr_sections; i++) {
        const struct snapfile_place *s = &h->sections[i];
        uint64_t max = s->type == SNAPFILE_INDEX ? UINT64_MAX : SNAPFILE_SECTION_MAX;
        if (s->type <= last || s->type >= SNAPFILE_SECTIONS || s->len > max || s->offset != at ||
            !range_within(at, s->len, h->file_bytes))
            return error_set(err, -EPROTO,
                             "%s: header: section %u (type %u, %llu bytes at %llu) is out of place",
                             path, i, s->type, (unsigned long long)s->len,
                             (unsigned long long)s->offset);
        at += s->len;
        last = s->type;
        types |= 1ull << s->type;
    }
    const uint64_t needed =
        1ull << SNAPFILE_MACHINE | 1ull << SNAPFILE_STATE | 1ull << SNAPFILE_INDEX;
    if ((types & needed) != needed)
        return error_set(err, -EPROTO, "%s: header: machine, state or index is missing", path);
    if (at != h->file_bytes)
        return error_set(err, -EPROTO, "%s: header: the sections end at byte %llu of %llu", path,
                         (unsigned long long)at, (unsigned long long)h->file_bytes);
    if (h->sections[h->nr_sections - 1].len != snapfile_index_len(h->nr_chunks, h->nr_runs))
        return error_set(err, -EPROTO, "%s: header: the index's length is wrong", path);
    return 0;
}

static int check_fields(const struct snapfile_header *h, const char *path, struct error *err)
{
    if ((h->kind != SNAPFILE_FULL && h->kind != SNAPFILE_DIFF) ||
        (h->layout != SNAPFILE_PACKED && h->layout != SNAPFILE_MAPPED) ||
        h->compress > (h->layout == SNAPFILE_PACKED ? SNAPFILE_LZ4 : SNAPFILE_NONE))
        return error_set(err, -EINVAL, "%s: header: kind %u, layout %u, compression %u not known",
                         path, h->kind, h->layout, h->compress);
    if (h->reserved || h->nr_sections < 1 || h->nr_sections >= SNAPFILE_SECTIONS ||
        !all_zero(h->sections + h->nr_sections,
                  (SNAPFILE_SECTIONS - 1 - h->nr_sections) * sizeof(h->sections[0])) ||
        !all_zero(h->zero, sizeof(h->zero)))
        return error_set(err, -EINVAL, "%s: header: unknown fields are set", path);
    if (!h->pages || h->pages > RAM_MAX / PAGE_SIZE || h->data_pages > h->pages ||
        h->zero_pages > h->pages - h->data_pages || h->nr_chunks > h->data_pages ||
        h->nr_runs > h->data_pages + h->zero_pages)
        return error_set(err, -EPROTO, "%s: header: impossible numbers of pages (%llu: %llu, %llu)",
                         path, (unsigned long long)h->pages, (unsigned long long)h->data_pages,
                         (unsigned long long)h->zero_pages);
    uint64_t most = h->pages * PAGE_SIZE;
    if (h->data_offset != SNAPFILE_HEADER || h->data_bytes > most ||
        (h->layout == SNAPFILE_MAPPED && h->data_bytes != most))
        return error_set(err, -EPROTO, "%s: header: page data of %llu bytes at %llu", path,
                         (unsigned long long)h->data_bytes, (unsigned long long)h->data_offset);
    return 0;
}

int snapfile_header_check(const struct snapfile_header *h, uint64_t file_bytes, const char *path,
                          struct error *err)
{
    if (memcmp(h->magic, SNAPFILE_MAGIC, sizeof(h->magic)))
        return error_set(err, -EINVAL, "%s: not a ferry snapshot", path);
    if (h->version != SNAPFILE_VERSION)
        return error_set(err, -EPROTONOSUPPORT,
                         "%s: snapshot format 0x%x; this ferry reads format %u", path, h->version,
                         SNAPFILE_VERSION);
    if (h->crc != snapfile_header_crc(h))
        return error_set(err, -EBADMSG, "%s: header damaged (checksum)", path);
    if (h->file_bytes != file_bytes)
        return error_set(err, -ENODATA, "%s: has %llu bytes, its header says %llu", path,
                         (unsigned long long)file_bytes, (unsigned long long)h->file_bytes);
    int ret = check_fields(h, path, err);
    if (!ret)
        ret = check_parent(h, path, err);
    return ret ? ret : check_places(h, path, err);
}

void snapfile_header_info(const struct snapfile_header *h, struct snapfile_info *info)
{
    *info = (struct snapfile_info) {.kind = h->kind,
                                    .layout = h->layout,
                                    .compress = h->compress,
                                    .pages = h->pages,
                                    .data_pages = h->data_pages,
                                    .zero_pages = h->zero_pages,
                                    .file_bytes = h->file_bytes,
                                    .created_s = h->created_s};
    memcpy(info->id, h->id, sizeof(info->id));
    memcpy(info->parent_id, h->parent_id, sizeof(info->parent_id));
    memcpy(info->parent, h->parent, sizeof(info->parent));
}

int snapfile_header_read(int dir_fd, const char *name, const char *path, struct snapfile_header *h,
                         struct error *err)
{
    struct stat st;
    // Without O_NONBLOCK a FIFO of that name would wait for its writer.
    autoclose int fd = openat(dir_fd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st))
        return error_errno(err, "snapshot %s", path);
    if (!S_ISREG(st.st_mode))
        return error_set(err, -EINVAL, "%s: not a regular file", path);
    memset(h, 0, sizeof(*h));
    ssize_t n = pread(fd, h, sizeof(*h), 0);
    if (n < 0)
        return error_errno(err, "snapshot %s: reading its header", path);
    if ((size_t)n < sizeof(*h))
        return error_set(err, -ENODATA,
                         memcmp(h->magic, SNAPFILE_MAGIC, sizeof(h->magic))
                             ? "%s: not a ferry snapshot"
                             : "%s: ends inside its header",
                         path);
    int ret = snapfile_header_check(h, (uint64_t)st.st_size, path, err);
    return ret ? ret : take_fd(&fd);
}

int snapfile_peek(const char *path, struct snapfile_info *info, struct error *err)
{
    struct snapfile_header h;
    int fd = snapfile_header_read(AT_FDCWD, path, path, &h, err);
    if (fd < 0)
        return fd;
    close(fd);
    snapfile_header_info(&h, info);
    return 0;
}

// --- directories

int snapfile_path_open(struct snapfile_path *p, const char *path, struct error *err)
{
    const char *slash = strrchr(path, '/');
    p->name = slash ? slash + 1 : path;
    p->dir_fd = -1;
    size_t len = slash ? (size_t)(slash - path) : 0;
    if (len >= sizeof(p->dir) || strlen(p->name) >= SNAPFILE_NAME_MAX)
        return error_set(err, -ENAMETOOLONG, "snapshot %s: name too long", path);
    if (!*p->name)
        return error_set(err, -EINVAL, "snapshot '%s': the name of a file is needed", path);
    snprintf(p->dir, sizeof(p->dir), "%.*s", (int)len, path);
    if (!len)
        strcpy(p->dir, slash ? "/" : ".");
    p->dir_fd = open(p->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return p->dir_fd < 0 ? error_errno(err, "snapshot %s: directory %s", path, p->dir) : 0;
}

void snapfile_path_close(struct snapfile_path *p)
{
    if (p->dir_fd >= 0)
        close(p->dir_fd);
    p->dir_fd = -1;
}

static int find_child(const struct snapfile_path *place, const struct snapfile_header *parent,
                      char by[SNAPFILE_NAME_MAX], struct error *err)
{
    int fd = openat(place->dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) {
        int ret = error_errno(err, "directory %s", place->dir);
        if (fd >= 0)
            close(fd);
        return ret;
    }
    int found = 0;
    const struct dirent *entry;
    while (!found && (entry = readdir(dir))) {
        struct snapfile_header h;
        if (strlen(entry->d_name) >= SNAPFILE_NAME_MAX || !strcmp(entry->d_name, place->name))
            continue;
        int child = snapfile_header_read(place->dir_fd, entry->d_name, entry->d_name, &h, NULL);
        if (child < 0) // something else, or a snapshot that is past help
            continue;
        close(child);
        found = h.kind == SNAPFILE_DIFF && !strcmp(h.parent, place->name) &&
                !memcmp(h.parent_id, parent->id, sizeof(h.parent_id));
        if (found)
            snprintf(by, SNAPFILE_NAME_MAX, "%s", entry->d_name);
    }
    closedir(dir);
    return found;
}

int snapfile_needed(const char *path, char by[SNAPFILE_NAME_MAX], struct error *err)
{
    struct snapfile_path place;
    struct snapfile_header h;
    int ret = snapfile_path_open(&place, path, err);
    int fd = ret ? ret : snapfile_header_read(place.dir_fd, place.name, path, &h, err);
    ret = fd < 0 ? fd : find_child(&place, &h, by, err);
    if (fd >= 0)
        close(fd);
    snapfile_path_close(&place);
    return ret;
}

int snapfile_remove(const char *path, struct error *err)
{
    char by[SNAPFILE_NAME_MAX];
    int ret = snapfile_needed(path, by, err);
    if (ret < 0)
        return ret;
    if (ret)
        return error_set(err, -EBUSY, "snapshot %s: %s beside it needs it as its parent", path, by);
    return unlink(path) ? error_errno(err, "snapshot %s: removing", path) : 0;
}
