// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_kinds.h"

#include <string.h>

#include "devices/virtio_balloon.h"
#include "devices/virtio_blk.h"
#include "devices/virtio_console.h"
#include "devices/virtio_net.h"
#include "devices/virtio_rng.h"
#include "devices/virtio_vsock.h"
#include "vmm/util.h"

// Each device's parser, with its own type of config.
#define PARSER(kind)                                                                  \
    static int kind##_text(const char *text, void *config, struct error *err)         \
    {                                                                                 \
        return virtio_##kind##_parse(text, config, err);                              \
    }                                                                                 \
    _Static_assert(sizeof(struct virtio_##kind##_config) <= VIRTIO_CONFIG_SIZE_MAX && \
                       !offsetof(struct virtio_##kind##_config, attach),              \
                   "a config starts with its attach")
PARSER(balloon);
PARSER(blk);
PARSER(console);
PARSER(net);
PARSER(vsock);
#undef PARSER

static const struct virtio_kind kinds[] = {
    {"disk", 'd', "FILE",
     "block device: FILE[,ro][,overlay=FILE][,serial=TEXT][,queues=N][,cached][,packed][,bps=SIZE]"
     "[,iops=N]",
     false, VIRTIO_DEVICES_MAX, &virtio_blk_class, sizeof(struct virtio_blk_config), blk_text},
    {"net", 0, "HOST",
     "network device: tap=NAME|tap-fd=N|user[,mac=..][,mtu=N][,queues=N][,offload=on|off]"
     "[,forward=tcp:HOSTPORT:GUESTPORT]...[,host=on|off][,bps=N][,iops=N][,packed]",
     false, VIRTIO_DEVICES_MAX, &virtio_net_class, sizeof(struct virtio_net_config), net_text},
    {"vconsole", 0, "WHERE",
     "virtio console (hvc0) and named ports: [WHERE][,port=NAME=WHERE]...[,packed], WHERE as for "
     "--console",
     false, VIRTIO_DEVICES_MAX, &virtio_console_class, sizeof(struct virtio_console_config),
     console_text},
    {"vsock", 0, "OPTIONS", "sockets between guest and host: cid=N,path=FILE[,packed]", false, 1,
     &virtio_vsock_class, sizeof(struct virtio_vsock_config), vsock_text},
    {"balloon", 0, "OPTIONS",
     "memory balloon: [target=SIZE][,deflate-on-oom=on|off][,stats=SECONDS][,reporting=on|off]"
     "[,hinting=on|off][,packed]",
     true, 1, &virtio_balloon_class, sizeof(struct virtio_balloon_config), balloon_text},
    {"rng", 0, NULL, "entropy device", true, 1, &virtio_rng_class, sizeof(struct virtio_rng_config),
     NULL},
};
_Static_assert(ARRAY_SIZE(kinds) <= VIRTIO_KINDS_MAX, "room for each kind");

const struct virtio_kind *virtio_kind_at(unsigned i)
{
    return i < ARRAY_SIZE(kinds) ? &kinds[i] : NULL;
}

const struct virtio_kind *virtio_kind_find(const char *name)
{
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++)
        if (!strcmp(kinds[i].name, name))
            return &kinds[i];
    return NULL;
}
