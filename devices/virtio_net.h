// SPDX-License-Identifier: Apache-2.0
// The network device (virtio 1.2, 5.1) over a tap device or user networking (net_backend.h).
//
// Frames move in the loop's thread, a bounded number a turn, straight between the host's file
// descriptor and the guest's buffers. Sending: a chain that cannot be sent yet (limit, full socket)
// stays in flight. Receiving: buffers are taken before a frame is read, since its length is not
// known; a frame that does not fit into what the guest has offered so far waits for more, and
// nothing more is read. A guest without buffers costs nothing: the host's side is not even watched.
//
// Hostile headers. What the guest asks of the host's kernel (checksum, segmentation) is copied once
// and judged against the frame's length and the features in use; a bad frame is dropped and
// counted.
//
// When the host's side goes (tap deleted, passt ended), the guest's link is down, one line is
// logged, and the VM lives on; `ferry set VM net0.link=up` tries to open it again.
//
// Pause, save, load. What was not sent or received lies in the rings, or is in flight and comes
// again after a load, once. A device that arrives takes its tap on resume; on the same host the
// source still has it then, so it tries again until the source has ended. Then, after a migration,
// it announces the guest's address, six times in 1.25 s: a RARP frame for the switches, and the
// guest is asked to announce itself. Not after a restore: a snapshot may be restored, or cloned,
// many times. `ferry set VM net0.announce=now` does it at any time.
//
// A new address (new_mac) is in the config space of a device that was loaded, with an interrupt for
// the change. A driver goes on with the one it knows until it begins anew (Linux reads it in its
// probe) or is told to take it; meanwhile the guest is not asked to announce that one, which
// another VM has.
#pragma once

#include "devices/net_backend.h"
#include "devices/rate_limit.h"
#include "devices/virtio.h"

enum net_kind {
    NET_TAP,
    NET_USER,
    NET_PACKETS, // net_packets_new: for tests
};

struct virtio_net_config {
    struct virtio_attach attach; // first
    enum net_kind kind;
    char tap[IFNAMSIZ];     // name; "": fds[0] is a tap that is open already
    int fds[NET_PAIRS_MAX]; // of NET_PACKETS, or see above; taken by a device that was realized
    uint8_t mac[6];         // all 0: one is drawn
    uint8_t new_mac[6];     // for the first state that is loaded; all 0: the saved one stays
    uint16_t mtu;           // 0: the tap's own, or NET_USER_MTU
    unsigned pairs;         // of queues; 0 = 1
    bool no_offload;        // no checksums or segments are left to the host or guest
    struct rate_limit_config receive, send; // of the guest
    struct net_user_config user;
};

// "tap=NAME[,mac=..][,mtu=N][,queues=N][,offload=on|off][,packed][,LIMIT...]", "tap-fd=N..." or
// "user[,forward=tcp|udp:[ADDRESS/]HOSTPORT:GUESTPORT]...[,host=on|off]...". LIMIT: the words of
// rate_limit.h, for both directions, or for one with rx- or tx- before them.
int virtio_net_parse(const char *text, struct virtio_net_config *config, struct error *err);
// Six bytes in hexadecimal with colons, of one station.
int virtio_net_parse_mac(const char *text, uint8_t mac[6], struct error *err);
// Draws one that is administered locally.
int virtio_net_draw_mac(uint8_t mac[6], struct error *err);

extern const struct device_class virtio_net_class; // its config: struct virtio_net_config
