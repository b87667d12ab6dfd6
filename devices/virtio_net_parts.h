// SPDX-License-Identifier: Apache-2.0
// Inside the network device: its parts share one struct. Every function here is called with the
// device's lock held, unless it says otherwise.
//
//   virtio_net.c          the host's side, link, queues, arrival, life, saved state
//   virtio_net_receive.c  frames from the host into the guest's buffers
//   virtio_net_send.c     frames of the guest, their headers judged
//   virtio_net_control.c  the control queue
//   virtio_net_admin.c    show and set
//   virtio_net_option.c   the option's text
#pragma once

#include <jansson.h>

#include "devices/virtio_net.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum {
    QUEUE_SIZE = 256,
    CONTROL_QUEUE_SIZE = 64,
    BATCH = 64,                    // frames a turn of the loop
    ANNOUNCE_ROUNDS = 6,           // after an arrival: at once ...
    ANNOUNCE_FIRST_MS = 50,        // ... after 50 ms more ...
    ANNOUNCE_STEP_MS = 100,        // ... after 150, 250, 350, 450 more: 1.25 s in all
    ATTACH_MS = 20,                // between tries to take what the source still has
    ATTACH_TRIES = 1500,           // 30 s
    MTU_MIN = 68,                  // RFC 791
    SLACK = NET_FRAME_MAX - 65535, // Ethernet and VLAN headers
};

// 5.1.3
#define F_CSUM           (1ull << 0)
#define F_GUEST_CSUM     (1ull << 1)
#define F_GUEST_OFFLOADS (1ull << 2)
#define F_MTU            (1ull << 3)
#define F_MAC            (1ull << 5)
#define F_GUEST_TSO4     (1ull << 7)
#define F_GUEST_TSO6     (1ull << 8)
#define F_GUEST_ECN      (1ull << 9)
#define F_HOST_TSO4      (1ull << 11)
#define F_HOST_TSO6      (1ull << 12)
#define F_HOST_ECN       (1ull << 13)
#define F_MRG_RXBUF      (1ull << 15)
#define F_STATUS         (1ull << 16)
#define F_CTRL_VQ        (1ull << 17)
#define F_CTRL_RX        (1ull << 18)
#define F_CTRL_RX_EXTRA  (1ull << 20)
#define F_GUEST_ANNOUNCE (1ull << 21)
#define F_MQ             (1ull << 22)
#define F_CTRL_MAC       (1ull << 23)
#define GUEST_SEGMENTS   (F_GUEST_TSO4 | F_GUEST_TSO6)
#define GUEST_TAKES      (F_GUEST_CSUM | GUEST_SEGMENTS | F_GUEST_ECN)

enum { HDR_NEEDS_CSUM = 1, HDR_DATA_VALID = 2 };                     // 5.1.6, flags
enum { GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_ECN = 0x80 }; // gso_type
enum { HEADER = sizeof(struct net_header) };
enum { S_LINK_UP = 1, S_ANNOUNCE = 2 }; // 5.1.4, status

struct __attribute__((packed)) net_space { // config space, 5.1.4
    uint8_t mac[6];
    uint16_t status, max_pairs, mtu;
};
_Static_assert(sizeof(struct net_space) == 12, "5.1.4");

// Watches the host's side once for each time it is armed: while we do not want frames, the kernel
// does not tell of them. On the heap, as a virtio_bell is.
struct net_poll {
    struct loop_op op, cancelled;
    struct virtio *v; // NULL once closed
    unsigned queue;   // that runs when `events` show
    uint32_t events;
    bool armed, cancelling;
};

struct net_pair { // of a receive queue (2 * index) and a send queue (2 * index + 1)
    bool enabled;
    struct net_poll *readable, *writable;
    // Receive: buffers taken from the queue and not yet given back, oldest first:
    // chains[(first + i) % (QUEUE_SIZE + 1)]. One element is always free, to look with.
    struct virtqueue_chain *chains;
    unsigned first, nr;
    uint64_t room;     // bytes in them
    unsigned segments; // that they consist of
    // A frame that was read and not yet given to the guest; 0 bytes: none. Its first `placed` bytes
    // lie in the chains (the header apart), the others in `spill`.
    size_t frame, placed;
    bool paid; // its limit
    struct net_header header;
    uint8_t *spill;
    // Send: a chain that was taken and not yet sent.
    struct virtqueue_chain out;
    struct net_header out_header;
    bool out_held, out_paid;
};

struct net_counters {
    uint64_t packets, bytes, dropped;
};

struct virtio_net {
    struct virtio v; // first
    struct virtio_net_config config;
    struct net_backend *backend;
    struct virtio_bell *timer, *limit_timer;
    unsigned nr_pairs;
    struct net_pair pairs[NET_PAIRS_MAX];
    struct net_counters received, sent;
    struct rate_limit receive_limit, send_limit;
    uint64_t bad_headers;
    bool link_wanted;      // by the person outside
    bool open;             // the backend is
    unsigned attach_tries; // left; 0: nobody waits
    bool settled;          // offloads and pairs are as the driver wants them
    bool arrived;          // state was loaded, and the guest did not run since
    bool renamed;          // state was loaded, and `mac` is not the one that the driver knows
    unsigned announces;    // left
    uint8_t mac[6];
    uint16_t mtu, active_pairs;
    uint8_t announcing;   // the guest was asked, and did not answer yet
    uint8_t started;      // guest_takes follows from the features
    uint64_t guest_takes; // of GUEST_TAKES, what the driver wants now (5.1.6.5.6)
    // The same, on their way out or in: only a load that is good changes those above.
    struct net_saved {
        uint8_t mac[6], announcing, started;
        uint16_t mtu, active_pairs;
        uint64_t guest_takes;
    } saved;
};

static inline struct virtio_net *net_of(struct virtio *v)
{
    return container_of(v, struct virtio_net, v);
}

static inline struct virtio_net *net_of_device(struct device *dev)
{
    return container_of(dev, struct virtio_net, v.dev);
}

// 5.1.2: the control queue follows the pairs that the driver knows of.
static inline unsigned control_queue(const struct virtio_net *n)
{
    return n->v.accepted & F_MQ ? 2 * n->nr_pairs : 2;
}

// --- virtio_net.c

void net_poll_arm(struct net_poll *p, int fd);
void net_poll_disarm(struct net_poll *p);
void net_ring_all(struct virtio_net *n);
bool net_link_up(const struct virtio_net *n);
void net_announce(struct virtio_net *n); // where the guest is, to those who look for it
void net_status_show(struct virtio_net *n);
void net_backend_lost(struct virtio_net *n, ssize_t error);
int net_backend_open(struct virtio_net *n, struct error *err);
bool net_limit_take(struct virtio_net *n, struct rate_limit *limit, uint64_t bytes);
void net_frame_forget(struct net_pair *p);

// --- virtio_net_receive.c

bool net_receive(struct virtio_net *n, unsigned pair);
void net_chains_forget(struct net_pair *p);

// --- virtio_net_send.c

bool net_send(struct virtio_net *n, unsigned pair);

// --- virtio_net_control.c

bool net_control(struct virtio_net *n, unsigned queue);
bool net_mac_good(const uint8_t mac[6]);

// --- virtio_net_admin.c

int net_limit_key(struct rate_limit_config *receive, struct rate_limit_config *send,
                  const char *key, const char *value, struct error *err);
void net_show(struct device *dev, json_t *out); // these two take the lock themselves
int net_set(struct device *dev, const char *key, const char *value, struct error *err);
