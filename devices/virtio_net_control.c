// SPDX-License-Identifier: Apache-2.0
// The control queue, 5.1.6.5.
#include <string.h>

#include "devices/virtio_net_parts.h"

enum { CTRL_RX = 0, CTRL_MAC = 1, CTRL_ANNOUNCE = 3, CTRL_MQ = 4, CTRL_OFFLOADS = 5 };
enum { CTRL_OK, CTRL_ERR };

bool net_mac_good(const uint8_t mac[6])
{
    static const uint8_t none[6];
    return !(mac[0] & 1) && memcmp(mac, none, 6);
}

static uint8_t control_rx(const struct virtio_net *n, uint8_t command, size_t bytes)
{
    // We give the guest all there is; it may filter for itself.
    uint64_t needed = command <= 1 ? F_CTRL_RX : F_CTRL_RX_EXTRA;
    return command <= 5 && bytes == 1 && n->v.accepted & needed ? CTRL_OK : CTRL_ERR;
}

static uint8_t control_mac(struct virtio_net *n, uint8_t command, const uint8_t *data,
                           uint64_t bytes)
{
    if (command == 0) // a table to filter by, which we do not use
        return n->v.accepted & F_CTRL_RX && bytes >= 8 ? CTRL_OK : CTRL_ERR;
    if (command != 1 || bytes != 6 || !(n->v.accepted & F_CTRL_MAC) || !net_mac_good(data))
        return CTRL_ERR;
    memcpy(n->mac, data, 6);
    memcpy(n->v.config, data, 6);
    n->renamed = false;
    n->v.generation++;
    return CTRL_OK;
}

static uint8_t control_pairs(struct virtio_net *n, uint8_t command, const uint8_t *data,
                             uint64_t bytes)
{
    uint16_t pairs = (uint16_t)(data[0] | data[1] << 8);
    if (command != 0 || bytes != 2 || !(n->v.accepted & F_MQ) || !pairs || pairs > n->nr_pairs)
        return CTRL_ERR;
    n->active_pairs = pairs;
    n->settled = false;
    net_ring_all(n);
    return CTRL_OK;
}

static uint8_t control_offloads(struct virtio_net *n, uint8_t command, const uint8_t *data,
                                uint64_t bytes)
{
    uint64_t takes;
    memcpy(&takes, data, sizeof(takes));
    if (command != 0 || bytes != sizeof(takes) || !(n->v.accepted & F_GUEST_OFFLOADS) ||
        takes & ~(n->v.accepted & GUEST_TAKES))
        return CTRL_ERR;
    n->guest_takes = takes;
    n->settled = false;
    return CTRL_OK;
}

static uint8_t control(struct virtio_net *n, const struct virtqueue_chain *c)
{
    uint8_t head[2] = {0xff, 0xff}, data[8] = {0};
    if (chain_read(c, 0, head, 2) < 2)
        return CTRL_ERR;
    chain_read(c, 2, data, sizeof(data));
    uint64_t bytes = c->out_len - 2;
    switch (head[0]) {
    case CTRL_RX:
        return control_rx(n, head[1], bytes);
    case CTRL_MAC:
        return control_mac(n, head[1], data, bytes);
    case CTRL_ANNOUNCE:
        if (head[1] != 0 || !(n->v.accepted & F_GUEST_ANNOUNCE))
            return CTRL_ERR;
        n->announcing = false;
        net_status_show(n);
        return CTRL_OK;
    case CTRL_MQ:
        return control_pairs(n, head[1], data, bytes);
    case CTRL_OFFLOADS:
        return control_offloads(n, head[1], data, bytes);
    default:
        return CTRL_ERR;
    }
}

bool net_control(struct virtio_net *n, unsigned queue)
{
    struct virtqueue_chain c;
    for (unsigned commands = 0; commands < BATCH; commands++) {
        if (!virtio_next(&n->v, queue, &c)) {
            virtio_signal(&n->v, queue);
            return true;
        }
        if (!c.in_len) {
            virtio_push(&n->v, queue, &c, 0);
            virtio_break(&n->v, queue, "command without a byte for its answer");
            return false;
        }
        uint8_t answer = n->v.accepted & F_CTRL_VQ ? control(n, &c) : CTRL_ERR;
        chain_write(&n->v.dev.vm->ram, &c, 0, &answer, 1);
        virtio_push(&n->v, queue, &c, 1);
    }
    virtio_signal(&n->v, queue);
    virtio_ring(&n->v, queue);
    return false;
}
