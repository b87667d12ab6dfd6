// SPDX-License-Identifier: Apache-2.0
// Shared by the parts of the vsock device only: virtio_vsock.c (the guest's side: packets, life),
// vsock_host.c (the host's side: Unix sockets) and vsock_table.c (the connections).
//
// What a connection owes the guest is kept as bits in it, so that no guest and no load makes a
// queue grow; it gets its turn, one packet each, in the order of `ready`. Resets for packets that
// belong to no connection wait in a ring; when that is full nothing is taken from the guest.
//
// Threads: everything runs with the device's lock held. Sockets are only closed, and watches only
// changed, in the loop's thread: a vCPU that resets the device leaves the dead to the loop.
#pragma once

#include <sys/queue.h>

#include "devices/virtio_vsock.h"
#include "devices/vsock_flow.h"

enum { VSOCK_RX, VSOCK_TX, VSOCK_EVENT, VSOCK_QUEUES };

enum vsock_op { // 5.10.6
    VSOCK_OP_INVALID,
    VSOCK_OP_REQUEST,
    VSOCK_OP_RESPONSE,
    VSOCK_OP_RST,
    VSOCK_OP_SHUTDOWN,
    VSOCK_OP_RW,
    VSOCK_OP_CREDIT_UPDATE,
    VSOCK_OP_CREDIT_REQUEST,
};
enum { VSOCK_TYPE_STREAM = 1 };
enum { VSOCK_NO_RECEIVE = 1, VSOCK_NO_SEND = 2, VSOCK_NEITHER = 3 }; // flags of SHUTDOWN

struct __attribute__((packed)) vsock_header { // 5.10.6
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port;
    uint32_t len;
    uint16_t type, op;
    uint32_t flags;
    uint32_t buf_alloc, fwd_cnt;
};
_Static_assert(sizeof(struct vsock_header) == 44, "5.10.6");

enum vsock_state {
    VSOCK_HELLO,     // a host program has connected; its CONNECT line is to come
    VSOCK_REQUESTED, // the guest is to accept
    VSOCK_WAITING,   // the guest asks, and the listener's backlog is full
    VSOCK_OPEN,
    VSOCK_LINGER, // the host's side has ended (no fd); the guest's end is to come
    VSOCK_DRAIN,  // the guest's side has ended; the host program has yet to take what is buffered
    VSOCK_DEAD,   // no longer in the table; its socket is to be closed
    VSOCK_STATES,
};

enum { // what a connection owes the guest
    OWES_REQUEST = 1,
    OWES_RESPONSE = 2,
    OWES_SHUTDOWN = 4,
    OWES_CREDIT = 8,
    OWES_CREDIT_REQUEST = 16,
    OWES_RST = 32, // nothing else matters then
};

struct virtio_vsock;
struct vsock_connection;

typedef void (*vsock_watch_fn)(struct virtio_vsock *s, struct vsock_connection *c,
                               uint32_t revents);

// On the heap: the kernel may hold the poll a little longer than the connection lives.
struct vsock_watch {
    struct loop_watch watch;
    struct virtio_vsock *s; // NULL once closed
    struct vsock_connection *c;
    vsock_watch_fn fn;
};

struct vsock_connection {
    TAILQ_ENTRY(vsock_connection) by_state, by_turn;
    struct vsock_connection *next; // in its hash bucket
    enum vsock_state state;
    uint64_t deadline; // tick; of the states that have a timeout
    uint32_t host_port, guest_port;
    bool in_table, in_ready;
    int fd; // -1 once the host's side has ended
    // Incoming data and the other side's end; room in the socket, from the first time on that it
    // was full.
    struct vsock_watch *in, *out;
    bool readable;      // there may be something to read
    bool credit_asked;  // since the guest's window was last full
    uint8_t owed;       // OWES_...
    uint8_t guest_shut; // what the guest does no more (VSOCK_NO_...)
    uint8_t host_shut;  // and what the host does no more
    struct vsock_flow flow;
};

TAILQ_HEAD(vsock_list, vsock_connection);

struct vsock_reset { // a RST for a packet that belongs to no connection
    uint64_t cid;    // whom the guest wanted
    uint32_t host_port, guest_port;
    uint16_t type;
};

enum { VSOCK_BUCKETS = 1024, VSOCK_RESETS = 256, VSOCK_TICK_NS = 50 * 1000 * 1000 };

struct virtio_vsock {
    struct virtio v; // first
    char path[VSOCK_PATH_MAX + 1];
    uint64_t cid;

    // Connections.
    struct vsock_connection *buckets[VSOCK_BUCKETS];
    struct vsock_list lists[VSOCK_STATES];
    struct vsock_list ready; // what has something for the guest
    unsigned count;          // without the dead
    unsigned entered;        // of those, in the table
    uint64_t promised;       // bytes of their windows
    uint32_t next_port;

    // Towards the guest.
    bool rx_held;    // `rx` was taken and not used yet
    bool rx_waits;   // the driver rings when it has made buffers available
    bool tx_stalled; // `resets` was full
    bool event_due;  // a transport reset event
    struct virtqueue_chain rx, tx;
    struct vsock_reset resets[VSOCK_RESETS];
    unsigned resets_head, resets_nr;

    // Towards the host.
    int listen_fd; // -1: not listening
    uint64_t listen_dev, listen_ino;
    struct vsock_watch *listener;
    bool given_up;             // PATH is no longer ours; the listener is to be closed
    bool listen_due;           // the VM resumed without a listener
    bool accept_again;         // more may wait than one turn took
    struct virtio_bell *timer; // ticks while something may time out; does what other threads leave
    uint64_t ticks, period_ns; // period 0: off

    uint64_t opened, to_guest, from_guest, resets_sent, dropped; // for show
};

// --- vsock_table.c

void vsock_table_init(struct virtio_vsock *s);
// NULL: no memory or too many. It takes the fd in any case.
struct vsock_connection *vsock_new(struct virtio_vsock *s, int fd, enum vsock_state state);
// Makes it findable, with its ports set, and gives it its window.
void vsock_enter(struct virtio_vsock *s, struct vsock_connection *c);
struct vsock_connection *vsock_find(struct virtio_vsock *s, uint32_t host_port,
                                    uint32_t guest_port);
void vsock_state_set(struct virtio_vsock *s, struct vsock_connection *c, enum vsock_state state);
void vsock_kill(struct virtio_vsock *s, struct vsock_connection *c); // frees later: vsock_reap
void vsock_kill_all(struct virtio_vsock *s);
void vsock_reap(struct virtio_vsock *s); // loop's thread, or after the loop
bool vsock_wants(const struct vsock_connection *c);
// Gives it a turn if it has something for the guest.
void vsock_schedule(struct virtio_vsock *s, struct vsock_connection *c);
// Ends the host's side; loop's thread.
void vsock_host_close(struct vsock_connection *c);
// The host's side ends and the guest gets a RST.
void vsock_abort(struct virtio_vsock *s, struct vsock_connection *c);
// Looks what follows from a change of guest_shut, host_shut or the buffer.
void vsock_advance(struct virtio_vsock *s, struct vsock_connection *c);
// A RST for a packet without a connection; when there is no room it is dropped.
void vsock_reset_add(struct virtio_vsock *s, const struct vsock_reset *r);

// --- vsock_host.c

int vsock_listen(struct virtio_vsock *s, struct error *err); // loop's thread or before the loop
void vsock_give_up(struct virtio_vsock *s);                  // any thread; unlinks PATH
void vsock_unlisten(struct virtio_vsock *s);                 // loop's thread or after the loop
struct vsock_watch *vsock_watch_new(struct virtio_vsock *s, struct vsock_connection *c, int fd,
                                    uint32_t events, vsock_watch_fn fn);
void vsock_watch_close(struct vsock_watch *w); // NULL is fine
// The guest wants host_port: opens, waits, or aborts.
void vsock_host_connect(struct virtio_vsock *s, struct vsock_connection *c);
void vsock_host_accepted(struct virtio_vsock *s, struct vsock_connection *c); // by the guest
// Data from the guest, within its credit.
void vsock_host_write(struct virtio_vsock *s, struct vsock_connection *c, struct iovec *iov,
                      unsigned n, uint32_t len);
// Reads into guest memory. 0: nothing there, or the end (host_shut says so).
uint32_t vsock_host_read(struct virtio_vsock *s, struct vsock_connection *c,
                         const struct iovec *iov, unsigned n);
void vsock_tick(struct virtio_vsock *s); // every VSOCK_TICK_NS while vsock_ticking
bool vsock_ticking(const struct virtio_vsock *s);

// --- virtio_vsock.c

// After each event: moves packets to the guest, closes what ended. Loop's thread.
void vsock_settle(struct virtio_vsock *s);
