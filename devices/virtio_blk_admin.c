// SPDX-License-Identifier: Apache-2.0
// `ferry info` and `ferry set` for the block device.
#include <errno.h>
#include <string.h>

#include "devices/virtio_blk_parts.h"

void blk_show(struct device *dev, json_t *out)
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    unsigned waiting = 0;
    for (const struct blk_request *r = b->waiting; r; r = r->next)
        waiting++;
    unsigned parked = 0;
    for (const struct blk_request *r = b->parked; r; r = r->next)
        parked++;
    const struct {
        const char *name;
        uint64_t value;
    } numbers[] = {
        {"size", b->capacity},
        {"queues", b->config.queues},
        {"reads", b->count.reads},
        {"read-bytes", b->count.read_bytes},
        {"writes", b->count.writes},
        {"written-bytes", b->count.written_bytes},
        {"flushes", b->count.flushes},
        {"discards", b->count.discards},
        {"errors", b->count.errors},
        {"in-flight", b->engine.in_flight},
        {"waiting", waiting},
        {"absent-blocks", blk_absent_left(b)},
        {"parked", parked},
    };
    json_object_set_new(out, "path", json_string(b->config.path));
    if (has_overlay(b))
        json_object_set_new(out, "overlay", json_string(b->config.overlay));
    json_object_set_new(out, "read-only", json_boolean(b->config.read_only));
    for (size_t i = 0; i < ARRAY_SIZE(numbers); i++)
        json_object_set_new(out, numbers[i].name, json_integer((json_int_t)numbers[i].value));
    static const char *const kinds[BLK_LATENCIES] = {"read", "write", "flush", "discard"};
    json_t *latency = json_object();
    for (unsigned i = 0; i < BLK_LATENCIES; i++)
        json_object_set_new(latency, kinds[i], histogram_show(&b->latency[i]));
    json_object_set_new(out, "latency", latency);
    rate_limit_show(&b->limit.config, out);
    pthread_mutex_unlock(&dev->lock);
}

static int file_resize(struct virtio_blk *b, uint64_t size, bool shrink, struct error *err)
{
    uint64_t now;
    struct blk_image *i = written_image(b);
    if (b->lost)
        return error_set(err, -EBUSY, "%s: another VM uses it", i->path);
    if (has_overlay(b)) {
        if (i->read_only)
            return error_set(err, -EROFS, "%s: read-only", i->path);
        // The table may move: no flush of it may be under way.
        if (!blk_wait(&b->engine, BLK_PATIENCE_MS))
            return error_set(err, -EBUSY, "%s: %u requests without an answer", i->path,
                             b->engine.in_flight);
        return blk_overlay_grow(&b->overlay, size, err);
    }
    int ret = blk_image_bytes(i, &now, err);
    if (ret || now == size || (now > size && !shrink))
        return ret; // grown outside
    if (i->read_only)
        return error_set(err, -EROFS, "%s: read-only, and has %llu bytes", i->path,
                         (unsigned long long)now);
    return blk_image_truncate(i, size, err);
}

static int size_set(struct virtio_blk *b, const char *value, bool shrink, struct error *err)
{
    uint64_t size;
    if (b->gone || blk_absent_left(b))
        return error_set(err, -EBUSY, "%s: %s: its size is fixed", written_image(b)->path,
                         b->gone ? "the guest has left, and may still need it"
                                 : "blocks of it are still at the host that the guest came from");
    if (b->written)
        return error_set(err, -EBUSY, "%s: a migration moves it: its size is fixed until that ends",
                         written_image(b)->path);
    if (!strcmp(value, "host") && !shrink && !has_overlay(b)) {
        int ret = blk_image_disk_size(&b->image, &size, err);
        if (ret)
            return ret;
    } else if (size_parse(value, 1, &size) || !size || size % BLK_SECTOR || size > INT64_MAX) {
        return error_set(err, -EINVAL, "'%.40s': expected bytes, a multiple of %d, e.g. 2G%s",
                         value, BLK_SECTOR, shrink || has_overlay(b) ? "" : ", or host");
    }
    if (!shrink && size < b->capacity)
        return error_set(err, -EINVAL,
                         "%llu bytes: it has %llu, and what lies behind would be cut off; if you "
                         "mean it: shrink=%llu",
                         (unsigned long long)size, (unsigned long long)b->capacity,
                         (unsigned long long)size);
    if (shrink && size > b->capacity)
        return error_set(err, -EINVAL, "%llu bytes: it has %llu: expected less",
                         (unsigned long long)size, (unsigned long long)b->capacity);
    int ret = file_resize(b, size, shrink, err);
    if (ret || size == b->capacity)
        return ret;
    b->capacity = size;
    blk_since_drop(b); // a map of the old size
    blk_space_capacity(b);
    virtio_config_changed(&b->v); // 5.2.4
    return 0;
}

static int limit_set(struct virtio_blk *b, const char *key, const char *value, struct error *err)
{
    struct rate_limit_config config = b->limit.config;
    int ret = rate_limit_key(&config, key, value, err);
    if (!ret)
        ret = rate_limit_check(&config, err);
    if (!ret) {
        rate_limit_change(&b->limit, &config, time_ns());
        blk_waiting_run(b);
    }
    return ret;
}

int blk_set(struct device *dev, const char *key, const char *value, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    bool size = !strcmp(key, "size"), shrink = !strcmp(key, "shrink");
    pthread_mutex_lock(&dev->lock);
    int ret = size || shrink ? size_set(b, value, shrink, err) : limit_set(b, key, value, err);
    blk_answer(b);
    pthread_mutex_unlock(&dev->lock);
    return ret;
}
