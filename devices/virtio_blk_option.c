// SPDX-License-Identifier: Apache-2.0
// The text of --disk.
#include <errno.h>
#include <string.h>

#include "devices/virtio_blk.h"
#include "vmm/util.h"

static bool word_is(const char *word, size_t len, const char *name)
{
    return len == strlen(name) && !memcmp(word, name, len);
}

// "name=VALUE": VALUE and its length.
static bool word_value(const char **word, size_t *len, const char *name)
{
    size_t n = strlen(name);
    if (*len < n || memcmp(*word, name, n))
        return false;
    *word += n;
    *len -= n;
    return true;
}

static int text_take(char *to, size_t max, const char *text, size_t len, const char *what,
                     struct error *err)
{
    if (!len || len > max)
        return error_set(err, -EINVAL, "%s of %zu bytes: expected 1 to %zu", what, len, max);
    memcpy(to, text, len);
    to[len] = 0;
    return 0;
}

static int queues_parse(const char *text, size_t len, unsigned *queues, struct error *err)
{
    unsigned n = 0;
    for (size_t i = 0; i < len && n <= BLK_QUEUES_MAX; i++)
        n = text[i] >= '0' && text[i] <= '9' ? n * 10 + (unsigned)(text[i] - '0')
                                             : BLK_QUEUES_MAX + 1;
    if (!n || n > BLK_QUEUES_MAX)
        return error_set(err, -EINVAL, "'%.*s': expected 1 to %d queues", (int)len, text,
                         BLK_QUEUES_MAX);
    *queues = n;
    return 0;
}

static int word_parse(const char *word, size_t len, struct virtio_blk_config *c, struct error *err)
{
    const char *value = word;
    size_t n = len;
    if (word_is(word, len, "ro"))
        c->read_only = true;
    else if (word_is(word, len, "cached"))
        c->cached = true;
    else if (word_is(word, len, "packed"))
        c->attach.packed = true;
    else if (word_value(&value, &n, "serial="))
        return text_take(c->serial, BLK_SERIAL_MAX, value, n, "serial", err);
    else if (word_value(&value, &n, "overlay="))
        return text_take(c->overlay, sizeof(c->overlay) - 1, value, n, "name of the overlay", err);
    else if (word_value(&value, &n, "queues="))
        return queues_parse(value, n, &c->queues, err);
    else {
        int ret = rate_limit_word(&c->limit, word, len, err);
        if (ret != -ENOENT)
            return ret;
        return error_set(
            err, -EINVAL,
            "'%.*s': expected ro, overlay=FILE, serial=TEXT, queues=N, cached, packed, "
            "bps=SIZE, iops=N, burst-bytes=SIZE or burst-ops=N",
            (int)len, word);
    }
    return 0;
}

int virtio_blk_parse(const char *text, struct virtio_blk_config *c, struct error *err)
{
    *c = (struct virtio_blk_config) {.queues = 1};
    size_t len = strcspn(text, ",");
    if (!len || len >= sizeof(c->path))
        return error_set(err, -EINVAL, "'%.60s': expected the name of a file, at most %zu bytes",
                         text, sizeof(c->path) - 1);
    memcpy(c->path, text, len);
    int ret = 0;
    for (text += len; *text == ',' && !ret; text += len) {
        text++;
        len = strcspn(text, ",");
        ret = word_parse(text, len, c, err);
    }
    return ret ? ret : rate_limit_check(&c->limit, err);
}
