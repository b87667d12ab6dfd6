// SPDX-License-Identifier: Apache-2.0
#include "vmm/state.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "vmm/util.h"

#define STATE_MAGIC 0x31545346u // "FST1"

enum { NAME_MAX_LEN = 31, SECTIONS_MAX = 4096 };

int state_register(struct state_registry *reg, const struct state_table *table, uint32_t instance,
                   void *object, struct error *err)
{
    if (!*table->name || strlen(table->name) > NAME_MAX_LEN)
        return error_set(err, -EINVAL, "state section name '%s': expected 1 to %d bytes",
                         table->name, NAME_MAX_LEN);
    for (uint32_t i = 0; i < reg->nr; i++)
        if (reg->entries[i].instance == instance &&
            !strcmp(reg->entries[i].table->name, table->name))
            return error_set(err, -EEXIST, "state section %s[%u] is registered twice", table->name,
                             instance);
    if (reg->nr == reg->cap) {
        uint32_t cap = reg->cap ? 2 * reg->cap : 16;
        struct state_entry *grown = realloc(reg->entries, cap * sizeof(*grown));
        if (!grown)
            return error_set(err, -ENOMEM, "no memory for state section %s", table->name);
        reg->entries = grown;
        reg->cap = cap;
    }
    reg->entries[reg->nr++] = (struct state_entry) {table, instance, object};
    return 0;
}

void state_registry_free(struct state_registry *reg)
{
    free(reg->entries);
    *reg = (struct state_registry) {0};
}

static uint64_t int_get(const void *p, unsigned size)
{
    uint64_t value = 0;
    memcpy(&value, p, size); // x86: little endian
    return value;
}

static int field_save(const struct state_field *f, const uint8_t *object, struct stream *out,
                      struct error *err)
{
    const uint8_t *p = object + f->offset;
    if (f->type == STATE_BYTES)
        return stream_write(out, p, f->size, err);
    if (f->type == STATE_VAR) {
        uint32_t len = (uint32_t)int_get(object + f->len_offset, 4);
        if (len > f->size)
            return error_set(err, -EOVERFLOW, "field %s: %u bytes, at most %u", f->name, len,
                             f->size);
        int ret = stream_put(out, len, 4, err);
        return ret ? ret : stream_write(out, p, len, err);
    }
    return stream_write(out, p, (size_t)f->size * f->count, err);
}

static int field_load(const struct state_field *f, uint8_t *object, struct stream *in,
                      struct error *err)
{
    uint8_t *p = object + f->offset;
    if (f->type == STATE_BYTES)
        return stream_read(in, p, f->size, err);
    if (f->type == STATE_VAR) {
        uint64_t len;
        int ret = stream_get(in, &len, 4, err);
        if (ret)
            return ret;
        if (len > f->size)
            return error_set(err, -EBADMSG, "field %s: %llu bytes, at most %u", f->name,
                             (unsigned long long)len, f->size);
        uint32_t len32 = (uint32_t)len;
        memcpy(object + f->len_offset, &len32, 4);
        return stream_read(in, p, len32, err);
    }
    return stream_read(in, p, (size_t)f->size * f->count, err);
}

static int section_save(const struct state_entry *e, struct stream *out, struct error *err)
{
    const struct state_table *t = e->table;
    int ret = t->save ? t->save(e->object, err) : 0;
    if (ret)
        return error_prefix(err, "saving %s[%u]", t->name, e->instance);

    struct stream_mem body;
    stream_mem_writer(&body, t->name, STATE_BLOB_MAX);
    for (unsigned i = 0; i < t->nr_fields && !ret; i++)
        if (t->fields[i].since <= t->version)
            ret = field_save(&t->fields[i], e->object, &body.stream, err);

    size_t name_len = strlen(t->name);
    if (!ret)
        ret = stream_put(out, name_len, 1, err);
    if (!ret)
        ret = stream_write(out, t->name, name_len, err);
    if (!ret)
        ret = stream_put(out, e->instance, 4, err);
    if (!ret)
        ret = stream_put(out, t->version, 2, err);
    if (!ret)
        ret = stream_put(out, body.len, 4, err);
    if (!ret)
        ret = stream_write(out, body.data, body.len, err);
    stream_mem_free(&body);
    return ret;
}

int state_save(const struct state_registry *reg, struct stream *out, struct error *err)
{
    struct stream_mem blob;
    stream_mem_writer(&blob, "state", STATE_BLOB_MAX);
    int ret = stream_put(&blob.stream, STATE_MAGIC, 4, err);
    if (!ret)
        ret = stream_put(&blob.stream, reg->nr, 4, err);
    for (uint32_t i = 0; i < reg->nr && !ret; i++)
        ret = section_save(&reg->entries[i], &blob.stream, err);
    if (!ret)
        ret = stream_put(&blob.stream, crc32(0, blob.data, (uInt)blob.len), 4, err);
    // The blob is framed by its own length, so that a reader can take it whole before loading.
    if (!ret)
        ret = stream_put(out, blob.len, 4, err);
    if (!ret)
        ret = stream_write(out, blob.data, blob.len, err);
    stream_mem_free(&blob);
    return ret;
}

struct section {
    char name[NAME_MAX_LEN + 1];
    uint32_t instance;
    uint16_t version;
    const uint8_t *body;
    uint32_t body_len;
};

static int section_parse(struct stream_mem *in, struct section *s, struct error *err)
{
    uint64_t name_len, instance, version, body_len;
    int ret = stream_get(&in->stream, &name_len, 1, err);
    if (ret)
        return ret;
    if (!name_len || name_len > NAME_MAX_LEN)
        return error_set(err, -EBADMSG, "state section name of %llu bytes, expected 1 to %d",
                         (unsigned long long)name_len, NAME_MAX_LEN);
    ret = stream_read(&in->stream, s->name, name_len, err);
    s->name[name_len] = 0;
    for (unsigned i = 0; !ret && i < name_len; i++)
        if (s->name[i] < '!' || s->name[i] > '~')
            return error_set(err, -EBADMSG, "state section name with byte %#x", s->name[i] & 0xff);
    if (!ret)
        ret = stream_get(&in->stream, &instance, 4, err);
    if (!ret)
        ret = stream_get(&in->stream, &version, 2, err);
    if (!ret)
        ret = stream_get(&in->stream, &body_len, 4, err);
    if (ret)
        return ret;
    if (body_len > in->len - in->pos)
        return error_set(err, -EBADMSG, "state section %s: %llu bytes, only %zu left", s->name,
                         (unsigned long long)body_len, in->len - in->pos);
    s->instance = (uint32_t)instance;
    s->version = (uint16_t)version;
    s->body = in->data + in->pos;
    s->body_len = (uint32_t)body_len;
    in->pos += body_len;
    return 0;
}

static int entry_index(const struct state_registry *reg, const struct section *s)
{
    for (uint32_t i = 0; i < reg->nr; i++)
        if (reg->entries[i].instance == s->instance &&
            !strcmp(reg->entries[i].table->name, s->name))
            return (int)i;
    return -1;
}

static int section_check(const struct state_registry *reg, const struct section *s,
                         struct section *by_entry, struct error *err)
{
    int i = entry_index(reg, s);
    if (i < 0)
        return error_set(err, -ENODEV,
                         "state section %s[%u] is unknown here: this VM has no such device or vCPU",
                         s->name, s->instance);
    const struct state_table *t = reg->entries[i].table;
    if (s->version < t->oldest || s->version > t->version)
        return error_set(err, -EPROTO, "state section %s[%u] has version %u, expected %u to %u",
                         s->name, s->instance, s->version, t->oldest, t->version);
    if (by_entry[i].body)
        return error_set(err, -EBADMSG, "state section %s[%u] comes twice", s->name, s->instance);
    by_entry[i] = *s;
    return 0;
}

static int section_load(const struct state_entry *e, const struct section *s, struct error *err)
{
    struct stream_mem body;
    stream_mem_reader(&body, e->table->name, s->body, s->body_len);
    int ret = 0;
    for (unsigned i = 0; i < e->table->nr_fields && !ret; i++)
        if (e->table->fields[i].since <= s->version)
            ret = field_load(&e->table->fields[i], e->object, &body.stream, err);
    if (!ret && body.pos != body.len)
        ret = error_set(err, -EBADMSG, "%zu bytes too many", body.len - body.pos);
    if (!ret && e->table->load)
        ret = e->table->load(e->object, s->version, err);
    return ret ? error_prefix(err, "loading state section %s[%u]", s->name, s->instance) : 0;
}

static int blob_load(const struct state_registry *reg, struct stream_mem *blob, struct error *err)
{
    uint64_t magic, nr;
    int ret = stream_get(&blob->stream, &magic, 4, err);
    if (!ret)
        ret = stream_get(&blob->stream, &nr, 4, err);
    if (ret)
        return ret;
    if (magic != STATE_MAGIC)
        return error_set(err, -EBADMSG, "state begins with %#llx, expected %#x",
                         (unsigned long long)magic, STATE_MAGIC);
    if (nr > SECTIONS_MAX)
        return error_set(err, -EBADMSG, "state with %llu sections, at most %d",
                         (unsigned long long)nr, SECTIONS_MAX);

    autofree struct section *by_entry = calloc(reg->nr + 1, sizeof(*by_entry));
    if (!by_entry)
        return error_set(err, -ENOMEM, "no memory to load state");
    for (uint64_t i = 0; i < nr && !ret; i++) {
        struct section s = {0};
        ret = section_parse(blob, &s, err);
        if (!ret)
            ret = section_check(reg, &s, by_entry, err);
    }
    if (!ret && blob->pos != blob->len)
        ret = error_set(err, -EBADMSG, "state: %zu bytes after the last section",
                        blob->len - blob->pos);
    for (uint32_t i = 0; i < reg->nr && !ret; i++)
        if (!by_entry[i].body)
            ret = error_set(err, -ENODATA, "state section %s[%u] is missing",
                            reg->entries[i].table->name, reg->entries[i].instance);
    for (uint32_t i = 0; i < reg->nr && !ret; i++)
        ret = section_load(&reg->entries[i], &by_entry[i], err);
    return ret;
}

int state_load(const struct state_registry *reg, struct stream *in, struct error *err)
{
    uint64_t len;
    int ret = stream_get(in, &len, 4, err);
    if (ret)
        return ret;
    if (len < 12 || len > STATE_BLOB_MAX)
        return error_set(err, -EBADMSG, "%s: state of %llu bytes, expected 12 to %d", in->name,
                         (unsigned long long)len, STATE_BLOB_MAX);
    autofree uint8_t *data = malloc(len);
    if (!data)
        return error_set(err, -ENOMEM, "no memory for %llu bytes of state",
                         (unsigned long long)len);
    ret = stream_read(in, data, len, err);
    if (ret)
        return ret;
    size_t body = len - 4;
    uint32_t crc = (uint32_t)int_get(data + body, 4);
    if (crc != crc32(0, data, (uInt)body))
        return error_set(err, -EBADMSG, "%s: state checksum %#x, expected %#lx", in->name, crc,
                         crc32(0, data, (uInt)body));
    struct stream_mem blob;
    stream_mem_reader(&blob, in->name, data, body);
    return blob_load(reg, &blob, err);
}
