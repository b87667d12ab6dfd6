// SPDX-License-Identifier: Apache-2.0
#include "migrate/workset.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "migrate/crc32c.h"
#include "vmm/util.h"

#define WORKSET_MAGIC "FERRYWS1"

struct workset_header {
    char magic[8];
    uint8_t id[SNAPFILE_ID_LEN];
    uint32_t nr;  // u64 page indexes that follow, little endian
    uint32_t crc; // CRC-32C of the header with 0 here, then of what follows
};
_Static_assert(sizeof(struct workset_header) == 32, "no padding");

void workset_add(struct workset *ws, uint64_t page)
{
    if (ws->nr == WORKSET_MAX)
        return;
    if (ws->nr == ws->cap) {
        uint32_t cap = ws->cap ? 2 * ws->cap : 1024;
        uint64_t *pages = realloc(ws->pages, cap * sizeof(*pages));
        if (!pages)
            return;
        ws->pages = pages;
        ws->cap = cap;
    }
    ws->pages[ws->nr++] = page;
}

void workset_free(struct workset *ws)
{
    free(ws->pages);
    *ws = (struct workset) {0};
}

static uint32_t workset_crc(struct workset_header h, const uint64_t *pages)
{
    h.crc = 0;
    return crc32c(crc32c(0, &h, sizeof(h)), pages, h.nr * sizeof(*pages));
}

static int workset_read(struct workset *ws, int fd, const char *path,
                        const uint8_t id[SNAPFILE_ID_LEN], struct error *err)
{
    struct workset_header h;
    struct stat st;
    if (fstat(fd, &st) || read(fd, &h, sizeof(h)) != sizeof(h) ||
        memcmp(h.magic, WORKSET_MAGIC, sizeof(h.magic)) || h.nr > WORKSET_MAX ||
        (uint64_t)st.st_size != sizeof(h) + h.nr * sizeof(*ws->pages))
        return error_set(err, -EINVAL, "%s: not a working set", path);
    if (memcmp(h.id, id, SNAPFILE_ID_LEN))
        return error_set(err, -EINVAL, "%s: of another snapshot", path);
    ws->pages = malloc(h.nr * sizeof(*ws->pages) + 1);
    if (!ws->pages)
        return error_set(err, -ENOMEM, "no memory for %s", path);
    ws->nr = ws->cap = h.nr;
    ssize_t len = (ssize_t)(h.nr * sizeof(*ws->pages));
    if (read(fd, ws->pages, (size_t)len) != len || workset_crc(h, ws->pages) != h.crc)
        return error_set(err, -EBADMSG, "%s: damaged (checksum)", path);
    return 0;
}

int workset_load(struct workset *ws, const char *path, const uint8_t id[SNAPFILE_ID_LEN],
                 uint64_t pages, struct error *err)
{
    *ws = (struct workset) {0};
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "%s", path);
    int ret = workset_read(ws, fd, path, id, err);
    for (uint32_t i = 0; !ret && i < ws->nr; i++)
        if (ws->pages[i] >= pages)
            ret = error_set(err, -EINVAL, "%s: page %llu of %llu", path,
                            (unsigned long long)ws->pages[i], (unsigned long long)pages);
    if (ret)
        workset_free(ws);
    return ret;
}

int workset_save(const struct workset *ws, const char *path, const uint8_t id[SNAPFILE_ID_LEN],
                 struct error *err)
{
    char temp[PATH_MAX];
    struct workset_header h = {.nr = ws->nr};
    memcpy(h.magic, WORKSET_MAGIC, sizeof(h.magic));
    memcpy(h.id, id, sizeof(h.id));
    h.crc = workset_crc(h, ws->pages);
    if ((size_t)snprintf(temp, sizeof(temp), "%s.tmp-XXXXXX", path) >= sizeof(temp))
        return error_set(err, -ENAMETOOLONG, "%s: name too long", path);
    autoclose int fd = mkostemp(temp, O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, "%s", path);
    // Not synced: lost in a crash, it is recorded again.
    ssize_t len = (ssize_t)(ws->nr * sizeof(*ws->pages));
    int ret = write(fd, &h, sizeof(h)) == sizeof(h) && write(fd, ws->pages, (size_t)len) == len &&
                      !rename(temp, path)
                  ? 0
                  : error_errno(err, "writing %s", path);
    if (ret)
        unlink(temp);
    return ret;
}
