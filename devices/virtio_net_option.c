// SPDX-License-Identifier: Apache-2.0
// The text of --net.
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "devices/virtio_net_parts.h"

static int number_parse(const char *key, const char *value, unsigned long min, unsigned long max,
                        unsigned long *out, struct error *err)
{
    char *end;
    *out = strtoul(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || *out < min || *out > max)
        return error_set(err, -EINVAL, "%s=%.40s: expected %lu to %lu", key, value, min, max);
    return 0;
}

static int switch_parse(const char *key, const char *value, bool *on, struct error *err)
{
    *on = !strcmp(value, "on");
    if (!*on && strcmp(value, "off"))
        return error_set(err, -EINVAL, "%s=%.40s: expected on or off", key, value);
    return 0;
}

int virtio_net_parse_mac(const char *value, uint8_t mac[6], struct error *err)
{
    char end;
    int n = sscanf(value, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%c", &mac[0], &mac[1], &mac[2],
                   &mac[3], &mac[4], &mac[5], &end);
    if (n != 6 || strlen(value) != 17 || strspn(value, "0123456789abcdefABCDEF:") != 17)
        return error_set(err, -EINVAL, "mac=%.40s: expected six bytes, e.g. 02:00:00:00:00:01",
                         value);
    if (!net_mac_good(mac))
        return error_set(err, -EINVAL, "mac=%.40s: expected the address of one station", value);
    return 0;
}

// tcp:[ADDRESS/]HOSTPORT:GUESTPORT
static int forward_parse(const char *value, struct virtio_net_config *c, struct error *err)
{
    struct net_user_config *u = &c->user;
    struct net_forward f = {.udp = !strncmp(value, "udp:", 4)};
    if (u->nr_forwards == NET_FORWARDS_MAX)
        return error_set(err, -E2BIG, "forward=%.40s: at most %d", value, NET_FORWARDS_MAX);
    const char *ports = value + 4, *slash = strchr(value, '/');
    struct in_addr address;
    char end;
    unsigned host, guest;
    bool good = f.udp || !strncmp(value, "tcp:", 4);
    if (good && slash) {
        size_t len = (size_t)(slash - ports);
        good = slash > ports && len < sizeof(f.address);
        memcpy(f.address, ports, good ? len : 0);
        good = good && inet_pton(AF_INET, f.address, &address) == 1;
        ports = slash + 1;
    }
    good = good && *ports >= '0' && *ports <= '9' &&
           sscanf(ports, "%5u:%5u%c", &host, &guest, &end) == 2 && host && guest && host <= 65535 &&
           guest <= 65535;
    if (!good)
        return error_set(err, -EINVAL,
                         "forward=%.60s: expected tcp:HOSTPORT:GUESTPORT or "
                         "udp:ADDRESS/HOSTPORT:GUESTPORT",
                         value);
    f.host_port = (uint16_t)host;
    f.guest_port = (uint16_t)guest;
    u->forwards[u->nr_forwards++] = f;
    return 0;
}

static int tap_parse(const char *value, struct virtio_net_config *c, struct error *err)
{
    size_t len = strlen(value);
    if (!len || len >= sizeof(c->tap) || strchr(value, '/') || strchr(value, '%'))
        return error_set(err, -EINVAL, "tap=%.40s: expected the name of an interface", value);
    c->kind = NET_TAP;
    memcpy(c->tap, value, len + 1);
    return 0;
}

static int pair_word_parse(const char *key, const char *value, struct virtio_net_config *c,
                           struct error *err)
{
    unsigned long number;
    bool on;
    int ret;
    if (!strcmp(key, "mac"))
        return virtio_net_parse_mac(value, c->mac, err);
    if (!strcmp(key, "mtu")) {
        ret = number_parse(key, value, MTU_MIN, 65535, &number, err);
        c->mtu = c->user.mtu = (uint16_t)number;
        return ret;
    }
    if (!strcmp(key, "queues")) {
        ret = number_parse(key, value, 1, NET_PAIRS_MAX, &number, err);
        c->pairs = (unsigned)number;
        return ret;
    }
    if (!strcmp(key, "offload")) {
        ret = switch_parse(key, value, &on, err);
        c->no_offload = !on;
        return ret;
    }
    if (!strcmp(key, "host")) {
        ret = switch_parse(key, value, &on, err);
        c->user.no_host = !on;
        return ret;
    }
    if (!strcmp(key, "forward"))
        return forward_parse(value, c, err);
    return net_limit_key(&c->receive, &c->send, key, value, err);
}

static int first_word_parse(char *word, struct virtio_net_config *c, struct error *err)
{
    unsigned long fd;
    if (!strcmp(word, "user")) {
        c->kind = NET_USER;
        return 0;
    }
    if (!strncmp(word, "tap=", 4))
        return tap_parse(word + 4, c, err);
    if (strncmp(word, "tap-fd=", 7))
        return error_set(err, -EINVAL, "'%.40s': expected tap=NAME, tap-fd=N or user first", word);
    int ret = number_parse("tap-fd", word + 7, 3, 65535, &fd, err);
    c->kind = NET_TAP;
    c->fds[0] = (int)fd;
    return ret;
}

static int word_parse(char *word, struct virtio_net_config *c, struct error *err)
{
    char *equals = strchr(word, '=');
    int ret = -ENOENT;
    if (!strcmp(word, "packed")) {
        c->attach.packed = true;
        return 0;
    }
    if (equals) {
        *equals = 0;
        ret = pair_word_parse(word, equals + 1, c, err);
    }
    if (ret != -ENOENT)
        return ret;
    return error_set(err, -EINVAL,
                     "'%.40s': expected mac=, mtu=, queues=, offload=, forward=, host=, bps=, "
                     "iops= (rx-, tx-) or packed",
                     word);
}

static int config_check(const struct virtio_net_config *c, struct error *err)
{
    if (c->pairs > 1 && (c->kind == NET_USER || !*c->tap))
        return error_set(err, -EINVAL, "queues=%u: expected a tap by its name", c->pairs);
    if (c->kind != NET_USER && (c->user.nr_forwards || c->user.no_host))
        return error_set(err, -EINVAL, "forward= and host= are for user networking");
    int ret = rate_limit_check(&c->receive, err);
    return ret ? ret : rate_limit_check(&c->send, err);
}

int virtio_net_parse(const char *text, struct virtio_net_config *c, struct error *err)
{
    *c = (struct virtio_net_config) {.pairs = 1};
    autofree char *words = strdup(text);
    if (!words)
        return error_set(err, -ENOMEM, "no memory");
    int ret = 0;
    bool first = true;
    for (char *rest = words, *word; !ret && (word = strsep(&rest, ",")); first = false)
        ret = first ? first_word_parse(word, c, err) : word_parse(word, c, err);
    return ret ? ret : config_check(c, err);
}
