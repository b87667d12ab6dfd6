// SPDX-License-Identifier: Apache-2.0
// What carries a network device's frames on the host's side: a tap device, or user networking.
//
// Nothing here blocks. The caller holds the device's lock. A frame travels with the header of
// virtio 1.2, 5.1.6 before it (struct net_header), already judged by the caller; iov[0] is that
// header alone.
#pragma once

#include <net/if.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "vmm/error.h"

enum {
    NET_PAIRS_MAX = 8,          // of queues; 2 * 8 + 1 fit into VIRTIO_QUEUES_MAX
    NET_FRAME_MIN = 14,         // an Ethernet header
    NET_FRAME_MAX = 65535 + 18, // an IP packet in an Ethernet header with one VLAN tag
    NET_IOV_MAX = 1024,         // IOV_MAX of the kernel
    NET_FORWARDS_MAX = 16,
};

struct net_header {
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
_Static_assert(sizeof(struct net_header) == 12, "5.1.6");

// What the guest takes unfinished: checksums, packets to be cut into segments. Bits for `offload`.
enum { NET_TAKES_CSUM = 1, NET_TAKES_TSO4 = 2, NET_TAKES_TSO6 = 4, NET_TAKES_ECN = 8 };

struct net_backend;

struct net_backend_ops {
    const char *name;
    bool offloads; // headers may ask for checksums and segmentation
    bool early;    // can be opened while the source of a migration still uses its own
    // Opens fds[0 .. pairs-1]; only the first pair is enabled. -EBUSY: somebody else has it now.
    int (*open)(struct net_backend *b, struct error *err);
    void (*close)(struct net_backend *b); // fds become -1; may be called again
    void (*free)(struct net_backend *b);  // closed before
    // The bytes taken: all. -EAGAIN: none, until POLLOUT on the fd; -EMSGSIZE, -EINVAL ...: this
    // frame cannot be sent; what net_lost() says of the result: nothing can any more.
    ssize_t (*send)(struct net_backend *b, unsigned pair, const struct iovec *iov, unsigned n);
    // Header and frame into the buffers: bytes, -EAGAIN: none, until POLLIN on the fd. A frame that
    // the buffers cannot hold is cut.
    ssize_t (*receive)(struct net_backend *b, unsigned pair, const struct iovec *iov, unsigned n);
    // POLLOUT came after `blocked`. May be NULL. As for send.
    int (*flush)(struct net_backend *b);
    int (*offload)(struct net_backend *b, unsigned takes); // may be NULL
    // Frames come in by this pair, too, or no longer. May be NULL.
    int (*enable)(struct net_backend *b, unsigned pair, bool on);
};

struct net_backend {
    const struct net_backend_ops *ops;
    unsigned pairs;
    int fds[NET_PAIRS_MAX]; // -1: not open
    uint16_t mtu;           // that it suggests, bytes; 0: none
    uint8_t mac[6];         // the guest's, set before open: for those that speak to it first
    bool blocked;  // the last frame was taken, but the next must wait for POLLOUT and flush
    char why[160]; // what the other side said at its end, if it said something
};

// Whether a result means that the other side is gone for good.
bool net_lost(ssize_t result);

// A tap device by name, which must exist; or, name NULL, one that is open already: `fd` is taken.
int net_tap_new(struct net_backend **out, const char *name, int fd, unsigned pairs,
                struct error *err);

// A socket that keeps the bounds of packets, header first: what a tap does, without a tap. For
// tests; `fds` are taken.
int net_packets_new(struct net_backend **out, const int *fds, unsigned pairs, struct error *err);

struct net_forward { // a port of the host that leads into the guest
    bool udp;
    char address[16]; // of the host, IPv4 as text; "" = 127.0.0.1
    uint16_t host_port, guest_port;
};

struct net_user_config {
    const char *program; // NULL = "passt", by PATH
    bool no_host;        // the guest does not reach servers on the host's own addresses
    uint16_t mtu;        // 0 = NET_USER_MTU
    struct net_forward forwards[NET_FORWARDS_MAX];
    unsigned nr_forwards;
    // Of net_user_starter, the caller's; NULL: the device makes its own, if its process still may.
    struct starter *starter;
};

// The guest's network, the same on each host, so that an address survives a migration.
#define NET_USER_GUEST   "10.0.2.15"
#define NET_USER_GATEWAY "10.0.2.2" // and the host itself
enum { NET_USER_MTU = 65520 }; // frames are not segmented, so large ones are what makes it fast

// Unprivileged networking through passt(1), a process of its own that ends with us.
int net_user_new(struct net_backend **out, const struct net_user_config *config, struct error *err);
// What starts passt for devices with this config, for a process that soon may start nothing. One
// device at a time uses it.
int net_user_starter(const struct net_user_config *config, struct starter **out, struct error *err);
