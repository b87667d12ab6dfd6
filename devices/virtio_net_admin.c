// SPDX-License-Identifier: Apache-2.0
// What the person outside sees and changes.
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "devices/virtio_net_parts.h"

static json_t *counters_show(const struct net_counters *c)
{
    return json_pack("{s:I, s:I, s:I}", "packets", (json_int_t)c->packets, "bytes",
                     (json_int_t)c->bytes, "dropped", (json_int_t)c->dropped);
}

static void limit_show(const struct rate_limit *limit, const char *prefix, json_t *out)
{
    json_t *own = json_object();
    const char *key;
    json_t *value;
    rate_limit_show(&limit->config, own);
    json_object_foreach(own, key, value)
    {
        char name[32];
        snprintf(name, sizeof(name), "%s-%s", prefix, key);
        json_object_set(out, name, value);
    }
    json_decref(own);
}

void net_show(struct device *dev, json_t *out)
{
    struct virtio_net *n = net_of_device(dev);
    char mac[18];
    pthread_mutex_lock(&dev->lock);
    snprintf(mac, sizeof(mac), "%02x:%02x:%02x:%02x:%02x:%02x", n->mac[0], n->mac[1], n->mac[2],
             n->mac[3], n->mac[4], n->mac[5]);
    json_object_set_new(out, "backend", json_string(n->backend->ops->name));
    if (*n->config.tap)
        json_object_set_new(out, "tap", json_string(n->config.tap));
    json_object_set_new(out, "mac", json_string(mac));
    json_object_set_new(out, "mtu", json_integer(n->mtu));
    json_object_set_new(out, "link", json_string(net_link_up(n) ? "up" : "down"));
    json_object_set_new(out, "queues", json_integer(n->active_pairs));
    json_object_set_new(out, "received", counters_show(&n->received));
    json_object_set_new(out, "sent", counters_show(&n->sent));
    limit_show(&n->receive_limit, "rx", out);
    limit_show(&n->send_limit, "tx", out);
    pthread_mutex_unlock(&dev->lock);
}

static int link_set(struct virtio_net *n, const char *value, struct error *err)
{
    bool up = !strcmp(value, "up");
    if (!up && strcmp(value, "down"))
        return error_set(err, -EINVAL, "'%.20s': expected up or down", value);
    if (up && !n->open && !n->attach_tries) {
        int ret = net_backend_open(n, err);
        if (ret)
            return ret;
    }
    n->link_wanted = up;
    for (unsigned i = 0; i < n->nr_pairs && !up; i++) {
        net_poll_disarm(n->pairs[i].readable);
        net_frame_forget(&n->pairs[i]);
    }
    net_status_show(n);
    net_ring_all(n);
    return 0;
}

// "rx-bps", "tx-iops" ..., or without a prefix for both. As rate_limit_key.
int net_limit_key(struct rate_limit_config *receive, struct rate_limit_config *send,
                  const char *key, const char *value, struct error *err)
{
    bool rx = !strncmp(key, "rx-", 3), tx = !strncmp(key, "tx-", 3);
    const char *own = rx || tx ? key + 3 : key;
    int ret = tx ? 0 : rate_limit_key(receive, own, value, err);
    return ret || rx ? ret : rate_limit_key(send, own, value, err);
}

static int limits_set(struct virtio_net *n, const char *key, const char *value, struct error *err)
{
    struct rate_limit_config receive = n->receive_limit.config, send = n->send_limit.config;
    int ret = net_limit_key(&receive, &send, key, value, err);
    if (!ret)
        ret = rate_limit_check(&receive, err);
    if (!ret)
        ret = rate_limit_check(&send, err);
    if (ret)
        return ret;
    uint64_t now = time_ns();
    rate_limit_change(&n->receive_limit, &receive, now);
    rate_limit_change(&n->send_limit, &send, now);
    net_ring_all(n);
    return 0;
}

static int announce_set(struct virtio_net *n, const char *value, struct error *err)
{
    if (strcmp(value, "now"))
        return error_set(err, -EINVAL, "announce '%.20s': expected now", value);
    if (!net_link_up(n))
        return error_set(err, -ENOTCONN, "the link is down: nobody would hear it");
    net_announce(n);
    return 0;
}

int net_set(struct device *dev, const char *key, const char *value, struct error *err)
{
    struct virtio_net *n = net_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    int ret = !strcmp(key, "link")       ? link_set(n, value, err)
              : !strcmp(key, "announce") ? announce_set(n, value, err)
                                         : limits_set(n, key, value, err);
    pthread_mutex_unlock(&dev->lock);
    return ret;
}
