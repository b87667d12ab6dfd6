// SPDX-License-Identifier: Apache-2.0
#include "vmm/stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/util.h"

int stream_read(struct stream *s, void *data, size_t len, struct error *err)
{
    return s->read(s, data, len, err);
}

int stream_write(struct stream *s, const void *data, size_t len, struct error *err)
{
    return s->write(s, data, len, err);
}

int stream_put(struct stream *s, uint64_t value, unsigned bytes, struct error *err)
{
    uint8_t raw[8];
    for (unsigned i = 0; i < bytes; i++)
        raw[i] = (uint8_t)(value >> (8 * i));
    return stream_write(s, raw, bytes, err);
}

int stream_get(struct stream *s, uint64_t *value, unsigned bytes, struct error *err)
{
    uint8_t raw[8];
    int ret = stream_read(s, raw, bytes, err);
    if (ret)
        return ret;
    *value = 0;
    for (unsigned i = 0; i < bytes; i++)
        *value |= (uint64_t)raw[i] << (8 * i);
    return 0;
}

static int mem_read(struct stream *s, void *data, size_t len, struct error *err)
{
    struct stream_mem *m = container_of(s, struct stream_mem, stream);
    if (len > m->len - m->pos)
        return error_set(err, -ENODATA, "%s: ends at byte %zu, %zu more wanted", s->name, m->len,
                         len - (m->len - m->pos));
    if (len)
        memcpy(data, m->data + m->pos, len);
    m->pos += len;
    return 0;
}

static int mem_write(struct stream *s, const void *data, size_t len, struct error *err)
{
    struct stream_mem *m = container_of(s, struct stream_mem, stream);
    if (!range_within(m->len, len, m->max))
        return error_set(err, -EFBIG, "%s: more than %zu bytes", s->name, m->max);
    if (m->len + len > m->cap) {
        size_t cap = m->cap ? m->cap : 16384;
        while (cap < m->len + len)
            cap *= 2;
        uint8_t *grown = realloc(m->data, cap);
        if (!grown)
            return error_set(err, -ENOMEM, "%s: no memory for %zu bytes", s->name, cap);
        m->data = grown;
        m->cap = cap;
    }
    if (len)
        memcpy(m->data + m->len, data, len);
    m->len += len;
    return 0;
}

void stream_mem_writer(struct stream_mem *m, const char *name, size_t max)
{
    *m = (struct stream_mem) {.stream = {name, mem_read, mem_write}, .max = max};
}

void stream_mem_reader(struct stream_mem *m, const char *name, const void *data, size_t len)
{
    *m = (struct stream_mem) {.stream = {name, mem_read, mem_write},
                              .data = (uint8_t *)data, // never written: max is 0
                              .len = len};
}

void stream_mem_free(struct stream_mem *m)
{
    if (m->cap)
        free(m->data);
    m->data = NULL;
    m->len = m->cap = m->pos = 0;
}

static int fd_read(struct stream *s, void *data, size_t len, struct error *err)
{
    struct stream_fd *f = container_of(s, struct stream_fd, stream);
    int ret = read_all(f->fd, data, len);
    if (ret)
        return error_set(err, ret, "%s: cannot read %zu bytes at offset %llu: %s", s->name, len,
                         (unsigned long long)f->offset,
                         ret == -ENODATA ? "it ends there" : strerror(-ret));
    f->offset += len;
    return 0;
}

static int fd_write(struct stream *s, const void *data, size_t len, struct error *err)
{
    struct stream_fd *f = container_of(s, struct stream_fd, stream);
    int ret = write_all(f->fd, data, len);
    if (ret)
        return error_set(err, ret, "%s: cannot write %zu bytes at offset %llu: %s", s->name, len,
                         (unsigned long long)f->offset, strerror(-ret));
    f->offset += len;
    return 0;
}

void stream_fd_init(struct stream_fd *f, const char *name, int fd)
{
    *f = (struct stream_fd) {.stream = {name, fd_read, fd_write}, .fd = fd};
}
