// SPDX-License-Identifier: Apache-2.0
// The vsock device between a simulated guest driver and host programs with real Unix sockets, with
// the loop but without KVM. That the tests notice a missing guard was checked by taking each out;
// where a timeout or the kernel stands behind it (a CONNECT line without end, a device without a
// driver, a write to a socket that is known as gone) the second gives the same answer.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "devices/virtio_mmio.h"
#include "devices/vsock_internal.h"
#include "tests/unit/virtio_driver.h"
#include "vmm/vm.h"

enum { BASE = LAYOUT_VIRTIO_MMIO, RINGS = 0x100000, RX_BUFFERS = 0x200000, TX_SLOTS = 0x400000 };
enum { EVENT_BUFFER = 0x700000, HEADER = sizeof(struct vsock_header), PAGE = 4096 };
enum { RX_NR = 64, TX_NR = 16, TX_ROOM = 64 * 1024, SLOT = 0x12000, RX_SLOT = 0x2000 };
enum { CID = 3, WINDOW = 256 * 1024 };

struct packet {
    struct vsock_header h;
    uint8_t data[PAGE];
};

struct rig {
    struct vm vm;
    struct device *dev;
    struct virtio_vsock *s;
    struct driver q[VSOCK_QUEUES];
    unsigned buffer_of[VSOCK_QUEUES][VQ_SIZE_MAX]; // by id
    bool no_event_idx;
    unsigned last; // buffer that guest_poll took
    bool slot_busy[TX_NR];
    char dir[64], path[80];
};

// --- the rig

static int no_irqfd(struct vm *vm, unsigned gsi, int fd, int resample, struct error *err)
{
    return 0;
}

static int no_doorbell(struct vm *vm, uint64_t addr, uint32_t value, int fd, struct error *err)
{
    return 0; // kicks come through the register
}

static const struct virtio_mmio_wiring wiring = {no_irqfd, no_doorbell};

static struct rig *rig_bare(void)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct ram_config ram = {.size = 16 * MiB};
    ck_assert(!ram_create(&r->vm.ram, &ram, NULL) && !loop_create(&r->vm.loop, NULL));
    r->vm.mmio.name = "mmio";
    r->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    snprintf(r->dir, sizeof(r->dir), "/tmp/ferry-vsock-XXXXXX");
    ck_assert(mkdtemp(r->dir));
    snprintf(r->path, sizeof(r->path), "%s/v", r->dir);
    return r;
}

static int rig_add(struct rig *r, uint64_t cid, bool arrives, struct error *err)
{
    const struct virtio_mmio_place place = {.base = BASE, .gsi = GSI_VIRTIO, .wiring = &wiring};
    struct virtio_vsock_config c = {.attach = {.transport = &virtio_mmio_transport,
                                               .place = &place,
                                               .packed = true,
                                               .arrives = arrives},
                                    .cid = cid};
    snprintf(c.path, sizeof(c.path), "%s", r->path);
    int ret = device_add(&r->vm, &virtio_vsock_class, &c, &r->dev, err);
    if (!ret)
        r->s = container_of(r->dev, struct virtio_vsock, v.dev);
    return ret;
}

static void device_remove(struct rig *r)
{
    r->dev->class->unrealize(r->dev);
    r->vm.devices = NULL;
    for (unsigned i = 0; i < 8; i++) // closed watches are freed by the loop
        loop_turn(r->vm.loop, false, NULL);
    free(r->dev);
    state_registry_free(&r->vm.state);
    bus_free(&r->vm.mmio);
    r->vm.mmio = (struct bus) {.name = "mmio"};
    r->dev = NULL;
}

static void rig_free(struct rig *r)
{
    if (r->dev)
        device_remove(r);
    loop_destroy(r->vm.loop);
    ram_destroy(&r->vm.ram);
    ck_assert_msg(!rmdir(r->dir), "%s: something was left in it", r->dir);
    free(r);
}

// At most 10 ms when nothing happens.
static void nap(struct rig *r)
{
    struct pollfd p = {.fd = r->vm.loop->ring.ring_fd, .events = POLLIN};
    poll(&p, 1, 10);
}

#define WAIT(condition)                                                                    \
    do {                                                                                   \
        uint64_t limit = time_ns() + 60 * 1000000000ull;                                   \
        ck_assert(!loop_turn(r->vm.loop, false, NULL));                                    \
        while (!(condition)) {                                                             \
            ck_assert_msg(time_ns() < limit, "line %d: waited for " #condition, __LINE__); \
            nap(r);                                                                        \
            ck_assert(!loop_turn(r->vm.loop, false, NULL));                                \
        }                                                                                  \
    } while (0)

// What is under way in the loop has been done.
static void settle(struct rig *r)
{
    for (unsigned i = 0; i < 10; i++)
        ck_assert(!loop_turn(r->vm.loop, false, NULL));
}

static void set(struct rig *r, uint64_t offset, uint32_t value)
{
    ck_assert(bus_write(&r->vm.mmio, BASE + offset, 4, value));
}

static uint32_t status(struct rig *r)
{
    uint64_t value;
    ck_assert(bus_read(&r->vm.mmio, BASE + 0x70, 4, &value));
    return (uint32_t)value;
}

static void kick(struct rig *r, unsigned queue)
{
    set(r, 0x50, queue);
}

static bool rx_add(struct rig *r, unsigned buffer)
{
    // Header and data apart, as Linux has it; data in two pieces.
    uint64_t gpa = RX_BUFFERS + (uint64_t)buffer * RX_SLOT;
    const struct buffer b[] = {
        {gpa, HEADER, true}, {gpa + 0x100, 1000, true}, {gpa + 0x800, PAGE - 1000, true}};
    int id = driver_add(&r->q[VSOCK_RX], b, 3, 0);
    if (id >= 0)
        r->buffer_of[VSOCK_RX][id] = buffer;
    return id >= 0;
}

static void guest_up(struct rig *r, bool packed, unsigned rx_buffers)
{
    uint64_t accept = VIRTIO_F_VERSION_1 | 1 | (r->no_event_idx ? 0 : VIRTIO_F_EVENT_IDX) |
                      (packed ? VIRTIO_F_PACKED : 0);
    const uint32_t begin[][2] = {{0x70, 0},
                                 {0x70, 1},
                                 {0x70, 3},
                                 {0x24, 0},
                                 {0x20, (uint32_t)accept},
                                 {0x24, 1},
                                 {0x20, (uint32_t)(accept >> 32)},
                                 {0x70, 11}};
    for (size_t i = 0; i < ARRAY_SIZE(begin); i++)
        set(r, begin[i][0], begin[i][1]);
    ck_assert_uint_eq(status(r), 11);
    for (unsigned q = 0; q < VSOCK_QUEUES; q++) {
        driver_init(&r->q[q], &r->vm.ram, packed, 256, RINGS + q * 0x10000);
        const uint32_t queue[][2] = {{0x30, q},
                                     {0x38, 256},
                                     {0x80, (uint32_t)r->q[q].desc},
                                     {0x90, (uint32_t)r->q[q].avail},
                                     {0xa0, (uint32_t)r->q[q].used},
                                     {0x44, 1}};
        for (size_t i = 0; i < ARRAY_SIZE(queue); i++)
            set(r, queue[i][0], queue[i][1]);
    }
    for (unsigned i = 0; i < TX_NR; i++)
        r->slot_busy[i] = false;
    for (unsigned i = 0; i < rx_buffers; i++)
        ck_assert(rx_add(r, i));
    set(r, 0x70, 15);
    ck_assert_uint_eq(status(r), 15);
    settle(r);
}

static struct rig *rig_new(bool packed)
{
    struct rig *r = rig_bare();
    struct error err = {0};
    ck_assert_msg(!rig_add(r, CID, false, &err), "%s", err.text);
    r->dev->class->resume(r->dev);
    guest_up(r, packed, RX_NR);
    return r;
}

// --- the guest

static void tx_reap(struct rig *r)
{
    unsigned id;
    uint32_t len;
    while (driver_used(&r->q[VSOCK_TX], &id, &len))
        r->slot_busy[r->buffer_of[VSOCK_TX][id]] = false;
}

static int tx_slot(struct rig *r)
{
    tx_reap(r);
    for (int i = 0; i < TX_NR; i++)
        if (!r->slot_busy[i])
            return i;
    return -1;
}

// `room` bytes of data follow the header, whatever it says.
static void guest_send_room(struct rig *r, const struct vsock_header *h, const void *data,
                            uint32_t room)
{
    int slot;
    WAIT((slot = tx_slot(r)) >= 0);
    uint64_t gpa = TX_SLOTS + (uint64_t)slot * SLOT;
    ck_assert(!ram_write(&r->vm.ram, gpa, h, sizeof(*h)));
    if (room && data)
        ck_assert(!ram_write(&r->vm.ram, gpa + 0x100, data, room));
    const struct buffer b[] = {{gpa, HEADER, false}, {gpa + 0x100, room, false}};
    int id = driver_add(&r->q[VSOCK_TX], b, room ? 2 : 1, 0);
    ck_assert_int_ge(id, 0);
    r->buffer_of[VSOCK_TX][id] = (unsigned)slot;
    r->slot_busy[slot] = true;
    kick(r, VSOCK_TX);
}

static struct vsock_header header(uint32_t guest_port, uint32_t host_port, uint16_t op)
{
    return (struct vsock_header) {.src_cid = CID,
                                  .dst_cid = 2,
                                  .src_port = guest_port,
                                  .dst_port = host_port,
                                  .type = 1,
                                  .op = op,
                                  .buf_alloc = WINDOW};
}

static void guest_send(struct rig *r, uint32_t guest_port, uint32_t host_port, uint16_t op)
{
    struct vsock_header h = header(guest_port, host_port, op);
    if (op == VSOCK_OP_SHUTDOWN)
        h.flags = VSOCK_NEITHER;
    guest_send_room(r, &h, NULL, 0);
}

static void guest_data(struct rig *r, uint32_t guest_port, uint32_t host_port, const void *data,
                       uint32_t len)
{
    struct vsock_header h = header(guest_port, host_port, VSOCK_OP_RW);
    h.len = len;
    guest_send_room(r, &h, data, len);
}

// The next packet for the guest; its buffer is given back at once unless `keep`.
static bool guest_poll(struct rig *r, struct packet *p, bool keep)
{
    unsigned id;
    uint32_t len;
    if (!driver_used(&r->q[VSOCK_RX], &id, &len))
        return false;
    unsigned buffer = r->buffer_of[VSOCK_RX][id];
    uint64_t gpa = RX_BUFFERS + (uint64_t)buffer * RX_SLOT;
    r->last = buffer;
    ck_assert(!ram_read(&r->vm.ram, gpa, &p->h, sizeof(p->h)));
    ck_assert_uint_le(p->h.len, PAGE);
    ck_assert_uint_eq(len, HEADER + p->h.len);
    ck_assert(!ram_read(&r->vm.ram, gpa + 0x100, p->data, 1000));
    ck_assert(!ram_read(&r->vm.ram, gpa + 0x800, p->data + 1000, PAGE - 1000));
    ck_assert_uint_eq(p->h.dst_cid, r->s->cid);
    if (!keep) {
        ck_assert(rx_add(r, buffer));
        kick(r, VSOCK_RX);
    }
    return true;
}

static struct packet guest_receive(struct rig *r, uint16_t op)
{
    struct packet p;
    WAIT(guest_poll(r, &p, false));
    ck_assert_uint_eq(p.h.op, op);
    if (op != VSOCK_OP_RST)
        ck_assert_uint_eq(p.h.src_cid, 2);
    return p;
}

static void guest_hears_nothing(struct rig *r)
{
    struct packet p;
    settle(r);
    bool heard = guest_poll(r, &p, false);
    ck_assert_msg(!heard, "a packet with operation %u", p.h.op);
}

// --- host programs

static int socket_at(const char *path, uint32_t port, struct sockaddr_un *addr)
{
    *addr = (struct sockaddr_un) {.sun_family = AF_UNIX};
    if (port)
        snprintf(addr->sun_path, sizeof(addr->sun_path), "%s_%u", path, port);
    else
        snprintf(addr->sun_path, sizeof(addr->sun_path), "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(fd, 0);
    return fd;
}

static int host_listen(struct rig *r, uint32_t port, int backlog)
{
    struct sockaddr_un addr;
    int fd = socket_at(r->path, port, &addr);
    ck_assert(!bind(fd, (struct sockaddr *)&addr, sizeof(addr)) && !listen(fd, backlog));
    return fd;
}

static void host_unlisten(struct rig *r, int fd, uint32_t port)
{
    char path[120];
    snprintf(path, sizeof(path), "%s_%u", r->path, port);
    close(fd);
    ck_assert(!unlink(path));
}

static int host_open(struct rig *r)
{
    struct sockaddr_un addr;
    int fd = socket_at(r->path, 0, &addr);
    ck_assert_msg(!connect(fd, (struct sockaddr *)&addr, sizeof(addr)), "%s: %s", r->path,
                  strerror(errno));
    return fd;
}

static void host_say(int fd, const void *data, size_t len)
{
    ck_assert_int_eq(send(fd, data, len, MSG_NOSIGNAL), (ssize_t)len);
}

// Bytes, 0 at the end, -1 nothing there.
static ssize_t host_try(int fd, void *data, size_t len)
{
    ssize_t n = recv(fd, data, len, MSG_DONTWAIT);
    if (n < 0 && errno == ECONNRESET)
        return 0;
    ck_assert(n >= 0 || errno == EAGAIN);
    return n;
}

static void host_hear(struct rig *r, int fd, void *data, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n;
        WAIT((n = host_try(fd, (uint8_t *)data + done, len - done)) >= 0);
        ck_assert_int_gt(n, 0);
        done += (size_t)n;
    }
}

static void host_closed(struct rig *r, int fd)
{
    char c;
    ssize_t n;
    WAIT((n = host_try(fd, &c, 1)) >= 0);
    ck_assert_int_eq(n, 0);
    close(fd);
}

// --- connections

struct ends {
    int fd;
    uint32_t guest, host; // ports
};

static struct ends from_host(struct rig *r, uint32_t guest_port)
{
    char line[32], ok[32];
    struct ends e = {.fd = host_open(r), .guest = guest_port};
    host_say(e.fd, line, (size_t)snprintf(line, sizeof(line), "CONNECT %u\n", guest_port));
    struct packet p = guest_receive(r, VSOCK_OP_REQUEST);
    e.host = p.h.src_port;
    ck_assert_uint_eq(p.h.dst_port, guest_port);
    ck_assert_uint_ge(e.host, 1u << 30);
    ck_assert_uint_eq(p.h.type, 1);
    ck_assert_uint_eq(p.h.len, 0);
    ck_assert_uint_ge(p.h.buf_alloc, VSOCK_WINDOW_SMALL);
    ck_assert_int_eq(host_try(e.fd, ok, 1), -1); // nothing before the guest accepted
    guest_send(r, guest_port, e.host, VSOCK_OP_RESPONSE);
    int len = snprintf(line, sizeof(line), "OK %u\n", e.host);
    host_hear(r, e.fd, ok, (size_t)len);
    ck_assert(!memcmp(ok, line, (size_t)len));
    return e;
}

static struct ends from_guest(struct rig *r, int listener, uint32_t guest_port, uint32_t host_port)
{
    guest_send(r, guest_port, host_port, VSOCK_OP_REQUEST);
    struct packet p = guest_receive(r, VSOCK_OP_RESPONSE);
    ck_assert_uint_eq(p.h.src_port, host_port);
    ck_assert_uint_eq(p.h.dst_port, guest_port);
    ck_assert_uint_ge(p.h.buf_alloc, VSOCK_WINDOW_SMALL);
    struct ends e = {accept(listener, NULL, NULL), guest_port, host_port};
    ck_assert_int_ge(e.fd, 0);
    return e;
}

static struct vsock_connection *connection(struct rig *r, const struct ends *e)
{
    struct vsock_connection *c = vsock_find(r->s, e->host, e->guest);
    ck_assert_ptr_nonnull(c);
    return c;
}

static void fill(uint8_t *data, size_t len, uint32_t seed)
{
    for (size_t i = 0; i < len; i++) {
        seed = seed * 1664525 + 1013904223;
        data[i] = (uint8_t)(seed >> 24);
    }
}

static void guest_closes(struct rig *r, const struct ends *e)
{
    guest_send(r, e->guest, e->host, VSOCK_OP_SHUTDOWN);
    guest_receive(r, VSOCK_OP_RST);
    host_closed(r, e->fd);
}

START_TEST(both_ways)
{
    struct rig *r = rig_new(_i);
    int listener = host_listen(r, 80, 4);
    struct ends ends[] = {from_host(r, 1234), from_guest(r, listener, 50000, 80)};
    for (unsigned i = 0; i < 2; i++) {
        uint8_t out[3000], in[3000];
        const struct ends *e = &ends[i];
        fill(out, sizeof(out), i);
        host_say(e->fd, out, sizeof(out));
        struct packet p = guest_receive(r, VSOCK_OP_RW);
        ck_assert_uint_eq(p.h.len, sizeof(out));
        ck_assert_uint_eq(p.h.src_port, e->host);
        ck_assert_uint_eq(p.h.dst_port, e->guest);
        ck_assert(!memcmp(p.data, out, sizeof(out)));
        fill(out, sizeof(out), i + 10);
        guest_data(r, e->guest, e->host, out, sizeof(out));
        host_hear(r, e->fd, in, sizeof(in));
        ck_assert(!memcmp(in, out, sizeof(out)));
    }
    ck_assert_uint_eq(r->s->count, 2);
    guest_closes(r, &ends[0]);
    // The host program ends first: the guest is told, its RST is the last word.
    close(ends[1].fd);
    struct packet p = guest_receive(r, VSOCK_OP_SHUTDOWN);
    if (p.h.flags != VSOCK_NEITHER)
        p = guest_receive(r, VSOCK_OP_SHUTDOWN);
    ck_assert_uint_eq(p.h.flags, VSOCK_NEITHER);
    guest_send(r, 50000, 80, VSOCK_OP_RST);
    WAIT(!r->s->count);
    guest_hears_nothing(r);
    ck_assert_uint_eq(r->s->to_guest, 6000);
    ck_assert_uint_eq(r->s->from_guest, 6000);
    host_unlisten(r, listener, 80);
    rig_free(r);
}
END_TEST

START_TEST(connect_lines)
{
    static const char *const bad[] = {"\n",
                                      "CONNECT\n",
                                      "CONNECT \n",
                                      "CONNECT x\n",
                                      "CONNECT 12x\n",
                                      "CONNECT -1\n",
                                      "CONNECT 4294967295\n",
                                      "CONNECT 99999999999999\n",
                                      "CONNECT1234\n",
                                      "GET / HTTP/1.1\r\n",
                                      "CONNECT 00000000000000000000000000000000001"};
    struct rig *r = rig_new(false);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        int fd = host_open(r);
        host_say(fd, bad[i], strlen(bad[i]));
        host_closed(r, fd);
    }
    close(host_open(r)); // says nothing
    settle(r);
    guest_hears_nothing(r);
    // In pieces, in small letters, with what follows at once.
    int fd = host_open(r);
    host_say(fd, "conn", 4);
    settle(r);
    host_say(fd, "ect 77", 6);
    settle(r);
    host_say(fd, "\r\nhello", 7);
    struct packet p = guest_receive(r, VSOCK_OP_REQUEST);
    ck_assert_uint_eq(p.h.dst_port, 77);
    guest_hears_nothing(r); // data only after it accepted
    guest_send(r, 77, p.h.src_port, VSOCK_OP_RESPONSE);
    p = guest_receive(r, VSOCK_OP_RW);
    ck_assert_uint_eq(p.h.len, 5);
    ck_assert(!memcmp(p.data, "hello", 5));
    // Refused by the guest: closed without a word.
    int refused = host_open(r);
    host_say(refused, "CONNECT 9\n", 10);
    p = guest_receive(r, VSOCK_OP_REQUEST);
    guest_send(r, 9, p.h.src_port, VSOCK_OP_RST);
    host_closed(r, refused);
    // Without a driver nobody waits.
    set(r, 0x70, 0);
    host_hear(r, fd, (char[32]) {0}, strlen("OK 1073741824\n"));
    host_closed(r, fd);
    fd = host_open(r);
    host_say(fd, "CONNECT 9\n", 10);
    host_closed(r, fd);
    ck_assert_uint_eq(r->s->count, 0);
    rig_free(r);
}
END_TEST

START_TEST(guest_is_refused)
{
    struct rig *r = rig_new(false);
    guest_send(r, 50000, 80, VSOCK_OP_REQUEST);
    struct packet p = guest_receive(r, VSOCK_OP_RST);
    ck_assert_uint_eq(p.h.src_port, 80);
    ck_assert_uint_eq(p.h.dst_port, 50000);
    int listener = host_listen(r, 80, 4);
    close(listener); // its file stays: nobody listens there
    guest_send(r, 50000, 80, VSOCK_OP_REQUEST);
    guest_receive(r, VSOCK_OP_RST);
    ck_assert_uint_eq(r->s->count, 0);
    char path[120];
    snprintf(path, sizeof(path), "%s_80", r->path);
    unlink(path);
    rig_free(r);
}
END_TEST

// A listener that is slow to accept is no listener that refuses.
START_TEST(full_backlog_waits)
{
    struct rig *r = rig_new(false);
    int listener = host_listen(r, 80, 0);
    enum { N = 5 };
    int fds[N];
    for (uint32_t i = 0; i < N; i++)
        guest_send(r, 50000 + i, 80, VSOCK_OP_REQUEST);
    settle(r);
    ck_assert(!TAILQ_EMPTY(&r->s->lists[VSOCK_WAITING]));
    for (unsigned i = 0; i < N; i++) {
        guest_receive(r, VSOCK_OP_RESPONSE);
        fds[i] = accept(listener, NULL, NULL);
    }
    ck_assert(TAILQ_EMPTY(&r->s->lists[VSOCK_WAITING]));
    for (unsigned i = 0; i < N; i++)
        close(fds[i]);
    host_unlisten(r, listener, 80);
    rig_free(r);
}
END_TEST

// --- credit

START_TEST(flow_arithmetic)
{
    for (unsigned wrap = 0; wrap < 3; wrap++) {
        uint32_t base = wrap == 0 ? 0 : wrap == 1 ? UINT32_MAX - 50 : 0x7fffffc0;
        struct vsock_flow f = {.window = 100,
                               .received = base,
                               .forwarded = base,
                               .told = base,
                               .sent = base,
                               .peer_forwarded = base};
        uint8_t data[100], back[100];
        fill(data, sizeof(data), wrap);
        ck_assert_uint_eq(flow_room(&f), 100);
        const struct iovec iov[] = {{data, 30}, {data + 30, 70}};
        ck_assert(!flow_append(&f, iov, 2, 80));
        ck_assert_uint_eq(flow_room(&f), 20);
        ck_assert_uint_eq(flow_buffered(&f), 80);
        flow_forward(&f, 60);
        ck_assert_uint_eq(flow_room(&f), 20); // the guest does not know yet
        ck_assert(flow_update_due(&f));
        f.told = f.forwarded;
        ck_assert(!flow_update_due(&f));
        ck_assert_uint_eq(flow_room(&f), 80);
        ck_assert(!flow_append(&f, iov, 2, 80)); // over the end of the ring
        ck_assert_uint_eq(flow_room(&f), 0);
        struct iovec out[2];
        unsigned n = flow_buffer(&f, out);
        ck_assert_uint_eq(n, 2);
        memcpy(back, out[0].iov_base, out[0].iov_len);
        memcpy(back + out[0].iov_len, out[1].iov_base, out[1].iov_len);
        ck_assert_uint_eq(out[0].iov_len + out[1].iov_len, 100);
        ck_assert(!memcmp(back, data + 60, 20) && !memcmp(back + 20, data, 80));
        flow_forward(&f, 100);
        ck_assert_ptr_null(f.data);
        ck_assert_uint_eq(f.received - base, 160);

        ck_assert_uint_eq(flow_credit(&f), 0); // nothing known of the guest's window
        flow_credit_update(&f, 1000, base);
        ck_assert_uint_eq(flow_credit(&f), 1000);
        f.sent += 600;
        ck_assert_uint_eq(flow_credit(&f), 400);
        flow_credit_update(&f, 500, base); // it shrinks below what is under way
        ck_assert_uint_eq(flow_credit(&f), 0);
        flow_credit_update(&f, 1000, base + 500);
        ck_assert_uint_eq(flow_credit(&f), 900);
        flow_credit_update(&f, 1000, base + 400); // came late
        ck_assert_uint_eq(flow_credit(&f), 900);
        flow_credit_update(&f, 1000, base + 601); // never sent so much
        ck_assert_uint_eq(flow_credit(&f), 900);
        flow_credit_update(&f, UINT32_MAX, base + 600);
        ck_assert_uint_eq(flow_credit(&f), UINT32_MAX);
    }
}
END_TEST

// Moves all counters of an idle connection; both sides agree on that in these tests.
static void counters_set(struct vsock_flow *f, uint32_t base)
{
    f->received = f->forwarded = f->told = f->sent = f->peer_forwarded = base;
}

static const uint32_t bases[] = {0, UINT32_MAX - 1500};

START_TEST(credit_to_guest)
{
    struct rig *r = rig_new(false);
    struct ends e = from_host(r, 5);
    uint8_t data[4500];
    uint32_t base = bases[_i], got = 0, credit = 1000;
    counters_set(&connection(r, &e)->flow, base);
    fill(data, sizeof(data), 1);
    struct vsock_header h = header(5, e.host, VSOCK_OP_CREDIT_UPDATE);
    h.buf_alloc = credit;
    h.fwd_cnt = base;
    guest_send_room(r, &h, NULL, 0);
    settle(r);
    host_say(e.fd, data, sizeof(data));
    for (uint32_t keeps = 0;; keeps = (keeps + 1) % 3) {
        uint32_t left = (uint32_t)sizeof(data) - got;
        struct packet p = guest_receive(r, VSOCK_OP_RW);
        ck_assert_uint_eq(p.h.len, left < credit ? left : credit);
        ck_assert(!memcmp(p.data, data + got, p.h.len));
        got += p.h.len;
        if (got == sizeof(data))
            break;
        guest_receive(r, VSOCK_OP_CREDIT_REQUEST); // asks once, and then waits
        guest_hears_nothing(r);
        h.fwd_cnt = base + got - keeps;
        credit = 1000 - keeps;
        guest_send_room(r, &h, NULL, 0);
    }
    guest_hears_nothing(r);
    close(e.fd);
    rig_free(r);
}
END_TEST

// Sends until the window that the guest was told is full; the host program reads nothing.
static uint32_t guest_fills(struct rig *r, const struct ends *e, uint8_t *sent, uint32_t window)
{
    struct vsock_flow *f = &connection(r, e)->flow;
    uint32_t total = 0;
    struct packet p;
    for (;;) {
        settle(r);
        while (guest_poll(r, &p, false))
            ck_assert_uint_eq(p.h.op, VSOCK_OP_CREDIT_UPDATE);
        uint32_t room = flow_room(f), take = room < TX_ROOM ? room : TX_ROOM;
        if (!room)
            break;
        fill(sent + total, take, total);
        guest_data(r, e->guest, e->host, sent + total, take);
        total += take;
        ck_assert_uint_le(flow_buffered(f), window);
    }
    ck_assert_uint_eq(flow_buffered(f), window);
    return total;
}

START_TEST(credit_from_guest)
{
    struct rig *r = rig_new(_i);
    struct ends e = from_host(r, 5);
    counters_set(&connection(r, &e)->flow, bases[_i]);
    uint8_t *sent = malloc(4 * MiB), *back = malloc(4 * MiB);
    uint32_t total = guest_fills(r, &e, sent, VSOCK_WINDOW);
    ck_assert_uint_gt(total, VSOCK_WINDOW);
    host_hear(r, e.fd, back, total); // the host program takes it all in the end
    ck_assert(!memcmp(back, sent, total));
    struct packet p = guest_receive(r, VSOCK_OP_CREDIT_UPDATE);
    ck_assert_uint_eq(p.h.buf_alloc, VSOCK_WINDOW);
    struct vsock_flow *f = &connection(r, &e)->flow;
    WAIT(!flow_buffered(f));
    guest_send(r, 5, e.host, VSOCK_OP_CREDIT_REQUEST);
    do
        WAIT(guest_poll(r, &p, false));
    while (p.h.fwd_cnt != bases[_i] + total);
    ck_assert_uint_eq(p.h.op, VSOCK_OP_CREDIT_UPDATE);
    // One byte more than it may send ends it.
    total = guest_fills(r, &e, sent, VSOCK_WINDOW);
    guest_data(r, e.guest, e.host, "x", 1);
    guest_receive(r, VSOCK_OP_RST);
    ck_assert_uint_eq(r->s->count, 0);
    ck_assert_uint_eq(r->s->promised, 0);
    close(e.fd);
    free(sent);
    free(back);
    rig_free(r);
}
END_TEST

// --- ends

START_TEST(half_close)
{
    struct rig *r = rig_new(false);
    struct ends e = from_host(r, 5);
    char in[8];
    // The host program has said all it had to say, and hears the answer.
    host_say(e.fd, "question", 8);
    ck_assert(!shutdown(e.fd, SHUT_WR));
    guest_receive(r, VSOCK_OP_RW);
    struct packet p = guest_receive(r, VSOCK_OP_SHUTDOWN);
    ck_assert_uint_eq(p.h.flags, VSOCK_NO_SEND);
    guest_data(r, 5, e.host, "answer", 6);
    host_hear(r, e.fd, in, 6);
    struct vsock_header h = header(5, e.host, VSOCK_OP_SHUTDOWN);
    h.flags = VSOCK_NO_SEND;
    guest_send_room(r, &h, NULL, 0);
    host_closed(r, e.fd);
    guest_hears_nothing(r); // a RST would make it forget what it has not read yet
    guest_send(r, 5, e.host, VSOCK_OP_SHUTDOWN);
    guest_receive(r, VSOCK_OP_RST);
    ck_assert_uint_eq(r->s->count, 0);
    // The other way round.
    e = from_host(r, 6);
    h = header(6, e.host, VSOCK_OP_SHUTDOWN);
    h.flags = VSOCK_NO_SEND;
    guest_data(r, 6, e.host, "question", 8);
    guest_send_room(r, &h, NULL, 0);
    host_hear(r, e.fd, in, 8);
    char c;
    ssize_t n;
    WAIT((n = host_try(e.fd, &c, 1)) >= 0);
    ck_assert_int_eq(n, 0);
    host_say(e.fd, "answer", 6);
    guest_receive(r, VSOCK_OP_RW);
    close(e.fd);
    p = guest_receive(r, VSOCK_OP_SHUTDOWN);
    if (!(p.h.flags & VSOCK_NO_SEND))
        p = guest_receive(r, VSOCK_OP_SHUTDOWN);
    ck_assert(p.h.flags & VSOCK_NO_SEND);
    guest_send(r, 6, e.host, VSOCK_OP_RST);
    WAIT(!r->s->count);
    // A guest that receives no more: the host program cannot write, the guest's data still come.
    e = from_host(r, 7);
    h = header(7, e.host, VSOCK_OP_SHUTDOWN);
    h.flags = VSOCK_NO_RECEIVE;
    guest_send_room(r, &h, NULL, 0);
    settle(r);
    ck_assert_int_eq(send(e.fd, "x", 1, MSG_NOSIGNAL), -1);
    guest_data(r, 7, e.host, "last", 4);
    host_hear(r, e.fd, in, 4);
    guest_closes(r, &e);
    // Data after the guest said there would be none.
    e = from_host(r, 8);
    h = header(8, e.host, VSOCK_OP_SHUTDOWN);
    h.flags = VSOCK_NO_SEND;
    guest_send_room(r, &h, NULL, 0);
    guest_data(r, 8, e.host, "x", 1);
    guest_receive(r, VSOCK_OP_RST);
    host_closed(r, e.fd);
    rig_free(r);
}
END_TEST

// What the guest has sent before it closed arrives although the host program is slow, also when
// the guest has lost its patience and sent RST.
START_TEST(data_outlive_the_guests_end)
{
    struct rig *r = rig_new(false);
    struct ends e = from_host(r, 5);
    uint8_t *sent = malloc(4 * MiB), *back = malloc(4 * MiB);
    uint32_t total = guest_fills(r, &e, sent, VSOCK_WINDOW);
    guest_send(r, 5, e.host, VSOCK_OP_SHUTDOWN);
    guest_hears_nothing(r);
    if (_i) {
        guest_send(r, 5, e.host, VSOCK_OP_RST);
        settle(r);
        ck_assert_int_eq(connection(r, &e)->state, VSOCK_DRAIN);
        guest_data(r, 5, e.host, "x", 1); // it has said good-bye
        guest_receive(r, VSOCK_OP_RST);
    }
    host_hear(r, e.fd, back, total);
    ck_assert(!memcmp(back, sent, total));
    host_closed(r, e.fd);
    if (!_i)
        guest_receive(r, VSOCK_OP_RST);
    WAIT(!r->s->count);
    guest_hears_nothing(r);
    free(sent);
    free(back);
    rig_free(r);
}
END_TEST

// A RST without SHUTDOWN before it ends all at once.
START_TEST(guest_aborts)
{
    struct rig *r = rig_new(false);
    struct ends e = from_host(r, 5);
    uint8_t *sent = malloc(4 * MiB);
    guest_fills(r, &e, sent, VSOCK_WINDOW);
    guest_send(r, 5, e.host, VSOCK_OP_RST);
    WAIT(!r->s->count);
    guest_hears_nothing(r);
    close(e.fd);
    free(sent);
    rig_free(r);
}
END_TEST

// The host program goes away without reading: the guest gets what it had written, and is told.
START_TEST(host_program_dies)
{
    struct rig *r = rig_new(false);
    struct ends e = from_host(r, 5);
    uint8_t *sent = malloc(4 * MiB);
    guest_fills(r, &e, sent, VSOCK_WINDOW);
    host_say(e.fd, "dying", 5);
    close(e.fd);
    struct packet p;
    uint8_t flags = 0;
    bool data = false;
    while (flags != VSOCK_NEITHER) {
        WAIT(guest_poll(r, &p, false));
        data |= p.h.op == VSOCK_OP_RW && p.h.len == 5 && !memcmp(p.data, "dying", 5);
        if (p.h.op == VSOCK_OP_SHUTDOWN)
            flags |= (uint8_t)p.h.flags;
    }
    ck_assert(data);
    guest_data(r, 5, e.host, "x", 1); // did not know yet: thrown away
    guest_hears_nothing(r);
    guest_send(r, 5, e.host, VSOCK_OP_RST);
    WAIT(!r->s->count);
    free(sent);
    rig_free(r);
}
END_TEST

START_TEST(half_open_times_out)
{
    struct rig *r = rig_new(false);
    int listener = host_listen(r, 80, 0), silent = host_open(r), asking = host_open(r);
    host_say(silent, "CONNECT 1", 9);
    host_say(asking, "CONNECT 1\n", 10);
    struct packet p = guest_receive(r, VSOCK_OP_REQUEST);
    uint32_t host_port = p.h.src_port;
    guest_send(r, 50000, 80, VSOCK_OP_REQUEST); // in the backlog
    guest_receive(r, VSOCK_OP_RESPONSE);
    guest_send(r, 50001, 80, VSOCK_OP_REQUEST); // waits, and nobody accepts
    host_closed(r, silent);
    host_closed(r, asking);
    unsigned seen = 0;
    for (unsigned i = 0; i < 2; i++) {
        p = guest_receive(r, VSOCK_OP_RST);
        seen |= p.h.dst_port == 1 && p.h.src_port == host_port ? 1u : 0;
        seen |= p.h.dst_port == 50001 && p.h.src_port == 80 ? 2u : 0;
    }
    ck_assert_uint_eq(seen, 3);
    ck_assert_uint_eq(r->s->count, 1);
    settle(r);
    ck_assert_uint_eq(r->s->period_ns, 0); // the timer rests
    host_unlisten(r, listener, 80);
    rig_free(r);
}
END_TEST

// --- many

enum { MANY = 1000, MESSAGE = 700 };

struct many {
    struct ends e;
    uint32_t sent, back; // bytes, by the side that started
    uint32_t guest_got;
    bool done;
    uint8_t data[MESSAGE];
};

static void files_allow(void)
{
    struct rlimit limit;
    ck_assert(!getrlimit(RLIMIT_NOFILE, &limit));
    limit.rlim_cur = limit.rlim_max < 8192 ? limit.rlim_max : 8192;
    ck_assert(!setrlimit(RLIMIT_NOFILE, &limit));
}

static struct many *many_find(struct many *all, const struct packet *p)
{
    struct many *m = &all[p->h.dst_port - 10000];
    ck_assert_uint_eq(m->e.host, p->h.src_port);
    return m;
}

// Every second connection is the host's; who began sends, the other side sends it back.
START_TEST(a_thousand_echo)
{
    struct rig *r = rig_new(_i);
    struct many *all = calloc(MANY, sizeof(*all));
    files_allow();
    int listener = host_listen(r, 80, 4096);
    for (uint32_t i = 0; i < MANY; i++) {
        all[i].e = i % 2 ? from_host(r, 10000 + i) : from_guest(r, listener, 10000 + i, 80);
        fill(all[i].data, MESSAGE, i);
    }
    ck_assert_uint_eq(r->s->count, MANY);
    ck_assert_uint_le(r->s->promised + (VSOCK_CONNECTIONS_MAX - MANY) * VSOCK_WINDOW_SMALL,
                      VSOCK_BUFFERS_MAX);
    for (uint32_t i = 0; i < MANY; i++) {
        if (i % 2)
            host_say(all[i].e.fd, all[i].data, MESSAGE);
        else
            guest_data(r, 10000 + i, 80, all[i].data, MESSAGE);
    }
    unsigned left = MANY;
    uint64_t limit = time_ns() + 100 * 1000000000ull;
    while (left && time_ns() < limit) {
        struct packet p;
        while (guest_poll(r, &p, false)) {
            if (p.h.op == VSOCK_OP_CREDIT_UPDATE)
                continue;
            ck_assert_uint_eq(p.h.op, VSOCK_OP_RW);
            struct many *m = many_find(all, &p);
            ck_assert_uint_le(m->guest_got + p.h.len, MESSAGE);
            ck_assert(!memcmp(p.data, m->data + m->guest_got, p.h.len));
            m->guest_got += p.h.len;
            if (p.h.dst_port % 2)
                guest_data(r, m->e.guest, m->e.host, p.data, p.h.len);
            else
                left -= m->guest_got == MESSAGE;
        }
        for (uint32_t i = 0; i < MANY; i++) {
            uint8_t data[MESSAGE];
            ssize_t n = all[i].done ? -1 : host_try(all[i].e.fd, data, MESSAGE);
            if (n < 0)
                continue;
            ck_assert_int_gt(n, 0);
            ck_assert(!memcmp(data, all[i].data + all[i].back, (size_t)n));
            all[i].back += (uint32_t)n;
            all[i].done = all[i].back == MESSAGE;
            if (i % 2)
                left -= all[i].done;
            else
                host_say(all[i].e.fd, data, (size_t)n);
        }
        ck_assert(!loop_turn(r->vm.loop, false, NULL));
    }
    ck_assert_uint_eq(left, 0);
    for (uint32_t i = 0; i < MANY; i++)
        guest_closes(r, &all[i].e);
    ck_assert_uint_eq(r->s->count, 0);
    ck_assert_uint_eq(r->s->promised, 0);
    guest_hears_nothing(r);
    host_unlisten(r, listener, 80);
    free(all);
    rig_free(r);
}
END_TEST

// One that always has more does not keep the others waiting.
START_TEST(turns_go_round)
{
    struct rig *r = rig_new(false);
    struct ends greedy = from_host(r, 1), modest = from_host(r, 2);
    uint8_t data[40 * PAGE];
    memset(data, 7, sizeof(data));
    ck_assert_uint_eq(r->q[VSOCK_RX].size, 256);
    r->dev->class->quiesce(r->dev, NULL);
    host_say(_i ? modest.fd : greedy.fd, data, _i ? 1 : sizeof(data));
    settle(r);
    host_say(_i ? greedy.fd : modest.fd, data, _i ? sizeof(data) : 1);
    settle(r);
    guest_hears_nothing(r); // a paused guest's memory is left alone
    r->dev->class->resume(r->dev);
    unsigned before = 0;
    for (struct packet p; (p = guest_receive(r, VSOCK_OP_RW)).h.dst_port == 1; before++)
        ck_assert_uint_eq(p.h.len, PAGE);
    ck_assert_uint_le(before, 2);
    close(greedy.fd);
    close(modest.fd);
    rig_free(r);
}
END_TEST

// The table is full of connections that only the guest has not ended: they make room.
START_TEST(full_table)
{
    struct rig *r = rig_new(false);
    files_allow();
    int listener = host_listen(r, 80, 16);
    for (uint32_t i = 0; i < VSOCK_CONNECTIONS_MAX; i++) {
        struct ends e = from_guest(r, listener, i, 80);
        close(e.fd);
        struct packet p;
        do
            p = guest_receive(r, VSOCK_OP_SHUTDOWN);
        while (p.h.flags != VSOCK_NEITHER);
    }
    ck_assert_uint_eq(r->s->count, VSOCK_CONNECTIONS_MAX);
    ck_assert_uint_le(r->s->promised, VSOCK_BUFFERS_MAX);
    guest_send(r, VSOCK_CONNECTIONS_MAX, 80, VSOCK_OP_REQUEST);
    struct packet p = guest_receive(r, VSOCK_OP_RST); // the oldest
    ck_assert_uint_eq(p.h.dst_port, 0);
    guest_receive(r, VSOCK_OP_RESPONSE);
    ck_assert_uint_eq(r->s->count, VSOCK_CONNECTIONS_MAX);
    close(accept(listener, NULL, NULL));
    guest_receive(r, VSOCK_OP_SHUTDOWN);
    settle(r);
    // None to make room: refused.
    while (!TAILQ_EMPTY(&r->s->lists[VSOCK_LINGER]))
        vsock_state_set(r->s, TAILQ_FIRST(&r->s->lists[VSOCK_LINGER]), VSOCK_DRAIN);
    while (guest_poll(r, &p, false))
        ck_assert_uint_eq(p.h.op, VSOCK_OP_SHUTDOWN);
    guest_send(r, 77777, 80, VSOCK_OP_REQUEST);
    p = guest_receive(r, VSOCK_OP_RST);
    ck_assert_uint_eq(p.h.dst_port, 77777);
    host_closed(r, host_open(r));
    host_unlisten(r, listener, 80);
    rig_free(r);
}
END_TEST

// --- hostile

START_TEST(hostile_headers)
{
    struct rig *r = rig_new(_i);
    struct ends e = from_host(r, 5);
    struct vsock_header h = header(5, e.host, VSOCK_OP_RW);
    h.src_cid = 4; // somebody else's
    guest_send_room(r, &h, NULL, 0);
    guest_hears_nothing(r);
    ck_assert_uint_eq(r->s->dropped, 1);
    h = header(9, 80, VSOCK_OP_REQUEST);
    h.dst_cid = 0x100000002; // the upper half counts
    guest_send_room(r, &h, NULL, 0);
    struct packet p = guest_receive(r, VSOCK_OP_RST);
    ck_assert(p.h.src_cid == 0x100000002 && p.h.src_port == 80 && p.h.dst_port == 9);
    h = header(9, 80, VSOCK_OP_REQUEST);
    h.type = 2; // seqpacket was not negotiated
    guest_send_room(r, &h, NULL, 0);
    p = guest_receive(r, VSOCK_OP_RST);
    ck_assert(p.h.type == 2 && p.h.src_port == 80);
    h = header(5, e.host, VSOCK_OP_RST);
    h.type = 0xffff;
    guest_send_room(r, &h, NULL, 0); // no reply to a RST, and not the connection's
    guest_send(r, 1, 1, VSOCK_OP_RST);
    guest_hears_nothing(r);
    static const uint16_t ops[] = {VSOCK_OP_INVALID,
                                   VSOCK_OP_RESPONSE,
                                   VSOCK_OP_SHUTDOWN,
                                   VSOCK_OP_RW,
                                   VSOCK_OP_CREDIT_UPDATE,
                                   VSOCK_OP_CREDIT_REQUEST,
                                   8,
                                   0xffff};
    for (size_t i = 0; i < ARRAY_SIZE(ops); i++) { // of no connection
        guest_send(r, 1000, 2000, ops[i]);
        p = guest_receive(r, VSOCK_OP_RST);
        ck_assert(p.h.dst_port == 1000 && p.h.src_port == 2000 && p.h.type == 1);
    }
    guest_hears_nothing(r);
    ck_assert_uint_eq(r->s->count, 1);
    guest_data(r, 5, e.host, "fine", 4); // after all that
    host_hear(r, e.fd, (char[4]) {0}, 4);
    guest_closes(r, &e);
    ck_assert_uint_eq(status(r), 15);
    rig_free(r);
}
END_TEST

// What breaks a connection's rules ends that connection with one RST.
START_TEST(hostile_packets)
{
    static const uint16_t ops[] = {VSOCK_OP_INVALID, VSOCK_OP_REQUEST, VSOCK_OP_RESPONSE, 8,
                                   0xffff};
    struct rig *r = rig_new(false);
    int listener = host_listen(r, 80, 4);
    struct ends other = from_host(r, 4);
    for (size_t i = 0; i < 2 * ARRAY_SIZE(ops); i++) {
        struct ends e = i % 2 ? from_host(r, 5) : from_guest(r, listener, 5, 80);
        guest_send(r, 5, e.host, ops[i / 2]);
        guest_receive(r, VSOCK_OP_RST);
        host_closed(r, e.fd);
    }
    // A length that goes beyond the buffers, by one and by all.
    static const uint32_t lengths[] = {101, UINT32_MAX, UINT32_MAX - HEADER + 1};
    for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
        struct ends e = from_host(r, 5);
        struct vsock_header h = header(5, e.host, VSOCK_OP_RW);
        h.len = lengths[i];
        guest_send_room(r, &h, NULL, 100);
        guest_receive(r, VSOCK_OP_RST);
        host_closed(r, e.fd);
    }
    struct ends e = from_host(r, 5); // less than the buffers hold is fine: that much is data
    struct vsock_header h = header(5, e.host, VSOCK_OP_RW);
    char in[4];
    h.len = 3;
    guest_send_room(r, &h, "abcdef", 6);
    host_hear(r, e.fd, in, 3);
    ck_assert(!memcmp(in, "abc", 3));
    guest_closes(r, &e);
    // Data before the guest said yes.
    struct packet p;
    int fd = host_open(r);
    host_say(fd, "CONNECT 5\n", 10);
    p = guest_receive(r, VSOCK_OP_REQUEST);
    guest_data(r, 5, p.h.src_port, "x", 1);
    guest_receive(r, VSOCK_OP_RST);
    host_closed(r, fd);
    guest_send(r, 4, other.host, VSOCK_OP_CREDIT_REQUEST);
    guest_receive(r, VSOCK_OP_CREDIT_UPDATE);
    ck_assert_uint_eq(r->s->count, 1);
    close(other.fd);
    host_unlisten(r, listener, 80);
    rig_free(r);
}
END_TEST

// A guest that provokes resets and gives no buffers for them: bounded, and nothing is lost or stuck
// once it has buffers.
START_TEST(resets_are_bounded)
{
    struct rig *r = rig_bare();
    ck_assert(!rig_add(r, CID, false, NULL));
    r->dev->class->resume(r->dev);
    guest_up(r, _i, 0);
    struct vsock_header h = header(1, 2, VSOCK_OP_RW);
    ck_assert(!ram_write(&r->vm.ram, TX_SLOTS, &h, sizeof(h)));
    const struct buffer b = {TX_SLOTS, HEADER, false};
    unsigned sent = 0, taken = 0, id, got = 0;
    uint32_t len;
    for (unsigned round = 0; round < 10; round++) {
        while (driver_add(&r->q[VSOCK_TX], &b, 1, 0) >= 0)
            sent++;
        kick(r, VSOCK_TX);
        settle(r);
        while (driver_used(&r->q[VSOCK_TX], &id, &len))
            taken++;
    }
    ck_assert_uint_eq(taken, VSOCK_RESETS);
    ck_assert_uint_eq(r->s->resets_nr, VSOCK_RESETS);
    for (unsigned i = 0; i < RX_NR; i++)
        ck_assert(rx_add(r, i));
    kick(r, VSOCK_RX);
    struct packet p;
    while (got < sent) {
        WAIT(guest_poll(r, &p, false));
        ck_assert_uint_eq(p.h.op, VSOCK_OP_RST);
        got++;
    }
    guest_hears_nothing(r);
    rig_free(r);
}
END_TEST

START_TEST(malformed_buffers_break_the_queue)
{
    for (unsigned kind = 0; kind < 3; kind++) {
        struct rig *r = rig_bare();
        ck_assert(!rig_add(r, CID, false, NULL));
        r->vm.log.fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
        r->dev->class->resume(r->dev);
        guest_up(r, false, 0);
        const struct buffer small[] = {{EVENT_BUFFER, HEADER - 1, false},
                                       {EVENT_BUFFER, HEADER, true},
                                       {EVENT_BUFFER, 3, true}};
        static const unsigned queue[] = {VSOCK_TX, VSOCK_RX, VSOCK_EVENT};
        ck_assert_int_ge(driver_add(&r->q[queue[kind]], &small[kind], 1, 0), 0);
        if (kind == 1)
            guest_send(r, 1, 2, VSOCK_OP_RW); // is to be answered
        r->s->event_due = kind == 2;
        kick(r, queue[kind]);
        settle(r);
        ck_assert_uint_eq(status(r), 15 | VIRTIO_NEEDS_RESET);
        // Host programs are let go, the VM lives, a reset makes it new.
        r->s->event_due = false;
        guest_up(r, true, RX_NR);
        struct ends e = from_host(r, 3);
        guest_closes(r, &e);
        close(r->vm.log.fd);
        rig_free(r);
    }
}
END_TEST

// No buffers for a while, then some: nothing stalls.
START_TEST(receive_goes_on)
{
    struct rig *r = rig_bare();
    ck_assert(!rig_add(r, CID, false, NULL));
    r->dev->class->resume(r->dev);
    r->no_event_idx = true;
    guest_up(r, false, 8); // fewer than hold what the host program's socket holds
    struct ends e = from_host(r, 5);
    struct vsock_header h = header(5, e.host, VSOCK_OP_CREDIT_UPDATE);
    h.buf_alloc = 64 * 1024 * 1024;
    guest_send_room(r, &h, NULL, 0);
    uint8_t *data = malloc(MiB);
    fill(data, MiB, 3);
    ck_assert(!fcntl(e.fd, F_SETFL, O_NONBLOCK));
    size_t written = 0, got = 0;
    unsigned held = 0, spent[RX_NR];
    struct packet p;
    while (got < MiB) {
        ssize_t n = written < MiB ? send(e.fd, data + written, MiB - written, MSG_NOSIGNAL) : 0;
        written += n > 0 ? (size_t)n : 0;
        settle(r);
        while (guest_poll(r, &p, true)) { // all buffers are gone in the end
            ck_assert_uint_eq(p.h.op, VSOCK_OP_RW);
            ck_assert(!memcmp(p.data, data + got, p.h.len));
            got += p.h.len;
            spent[held++] = r->last;
            settle(r);
        }
        while (held)
            ck_assert(rx_add(r, spent[--held]));
        if (!(guest16(&r->vm.ram, r->q[VSOCK_RX].used) & 1)) // only when the device asks for it
            kick(r, VSOCK_RX);
    }
    close(e.fd);
    free(data);
    rig_free(r);
}
END_TEST

START_TEST(reset_ends_connections)
{
    struct rig *r = rig_new(false);
    struct ends e = from_host(r, 5);
    int waiting = host_open(r);
    host_say(waiting, "CONNECT 6\n", 10);
    guest_receive(r, VSOCK_OP_REQUEST);
    set(r, 0x70, 0);
    host_closed(r, e.fd);
    host_closed(r, waiting);
    ck_assert_uint_eq(r->s->count, 0);
    WAIT(TAILQ_EMPTY(&r->s->lists[VSOCK_DEAD]));
    guest_up(r, true, RX_NR); // listening goes on
    e = from_host(r, 7);
    guest_closes(r, &e);
    rig_free(r);
}
END_TEST

// --- saved state

static void state_out(struct rig *r, struct stream_mem *mem)
{
    struct error err = {0};
    ck_assert(!r->dev->class->quiesce(r->dev, &err));
    stream_mem_writer(mem, "state", STATE_BLOB_MAX);
    ck_assert_msg(!state_save(&r->vm.state, &mem->stream, &err), "%s", err.text);
}

static bool exists(const char *path)
{
    struct stat st;
    return !lstat(path, &st);
}

START_TEST(source_goes_on_after_a_save)
{
    struct rig *r = rig_new(false);
    struct stream_mem mem;
    struct ends e = from_host(r, 5);
    state_out(r, &mem);
    ck_assert(!exists(r->path)); // free for a destination
    host_say(e.fd, "later", 5);
    guest_hears_nothing(r);
    r->dev->class->resume(r->dev);
    struct packet p = guest_receive(r, VSOCK_OP_RW); // connections are as they were
    ck_assert(!memcmp(p.data, "later", 5));
    WAIT(exists(r->path));
    struct ends new = from_host(r, 6);
    guest_closes(r, &new);
    guest_closes(r, &e);
    stream_mem_free(&mem);
    rig_free(r);
}
END_TEST

static bool event_poll(struct rig *r, uint32_t *event)
{
    unsigned id;
    uint32_t len;
    if (!driver_used(&r->q[VSOCK_EVENT], &id, &len))
        return false;
    ck_assert_uint_eq(len, 4);
    ck_assert(!ram_read(&r->vm.ram, EVENT_BUFFER, event, 4));
    return true;
}

// The destination has the guest's memory and queues; connections end, listening goes on. _i: bit 0
// packed, bit 1 the event buffer comes late, bit 2 another cid.
START_TEST(moves_without_connections)
{
    struct rig *r = rig_new(_i & 1);
    struct error err = {0};
    struct stream_mem out, in;
    const struct buffer b = {EVENT_BUFFER, 4, true};
    uint32_t event = 77;
    ck_assert(!ram_write(&r->vm.ram, EVENT_BUFFER, &event, 4));
    struct ends e = from_host(r, 5);
    uint64_t cid = _i & 4 ? 99 : CID;
    if (!(_i & 2))
        ck_assert_int_ge(driver_add(&r->q[VSOCK_EVENT], &b, 1, 0), 0);
    kick(r, VSOCK_EVENT);
    ck_assert(!event_poll(r, &event));
    state_out(r, &out);
    device_remove(r); // the source has ended
    host_closed(r, e.fd);
    ck_assert_msg(!rig_add(r, cid, true, &err), "%s", err.text);
    ck_assert(!exists(r->path)); // not before it is the owner
    stream_mem_reader(&in, "state", out.data, out.len);
    ck_assert_msg(!state_load(&r->vm.state, &in.stream, &err), "%s", err.text);
    r->dev->class->resume(r->dev);
    if (_i & 2) {
        settle(r);
        ck_assert_int_ge(driver_add(&r->q[VSOCK_EVENT], &b, 1, 0), 0);
        kick(r, VSOCK_EVENT);
    }
    WAIT(event_poll(r, &event));
    ck_assert_uint_eq(event, 0);
    uint64_t low;
    ck_assert(bus_read(&r->vm.mmio, BASE + 0x100, 4, &low));
    ck_assert_uint_eq(low, cid);
    guest_data(r, 5, e.host, "x", 1); // of a connection that is no more
    if (cid == CID) {
        struct packet p = guest_receive(r, VSOCK_OP_RST);
        ck_assert_uint_eq(p.h.src_port, e.host);
        e = from_host(r, 6);
        guest_closes(r, &e);
    } else {
        WAIT(r->s->dropped);
        guest_hears_nothing(r);
    }
    settle(r);
    ck_assert(!event_poll(r, &event)); // once
    stream_mem_free(&out);
    rig_free(r);
}
END_TEST

// --- files

START_TEST(socket_files)
{
    struct rig *r = rig_bare();
    struct error err = {0};
    struct sockaddr_un addr;
    struct stat st;
    int fd = socket_at(r->path, 0, &addr);
    ck_assert(!bind(fd, (struct sockaddr *)&addr, sizeof(addr)) && !listen(fd, 1));
    ck_assert_int_eq(rig_add(r, CID, false, &err), -EADDRINUSE);
    ck_assert_msg(strstr(err.text, r->path), "%s", err.text);
    int waiting[4]; // one that is slow to accept is in use, too
    for (unsigned i = 0; i < 4; i++) {
        waiting[i] = socket_at(r->path, 0, &addr);
        ck_assert(!fcntl(waiting[i], F_SETFL, O_NONBLOCK));
        if (connect(waiting[i], (struct sockaddr *)&addr, sizeof(addr)))
            ck_assert_int_eq(errno, EAGAIN);
        else
            ck_assert_uint_lt(i, 3); // full by now
    }
    ck_assert_int_eq(rig_add(r, CID, false, &err), -EADDRINUSE);
    for (unsigned i = 0; i < 4; i++)
        close(waiting[i]);
    close(fd); // now it is stale
    ck_assert_msg(!rig_add(r, CID, false, &err), "%s", err.text);
    ck_assert(!lstat(r->path, &st));
    ck_assert_uint_eq(st.st_mode, S_IFSOCK | 0600);
    device_remove(r);
    ck_assert(!exists(r->path));
    // A file that is no socket stays, and so does what somebody put in the place of ours.
    fd = open(r->path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    ck_assert_int_eq(rig_add(r, CID, false, &err), -EADDRINUSE);
    ck_assert(exists(r->path));
    ck_assert(!unlink(r->path));
    ck_assert(!rig_add(r, CID, false, &err));
    ck_assert(!unlink(r->path));
    close(fd);
    fd = open(r->path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    device_remove(r);
    ck_assert(exists(r->path));
    close(fd);
    ck_assert(!unlink(r->path));
    rig_free(r);
}
END_TEST

START_TEST(option_text)
{
    struct virtio_vsock_config c;
    struct error err;
    char text[200];
    ck_assert(!virtio_vsock_parse("cid=3,path=/run/x.sock", &c, &err));
    ck_assert_uint_eq(c.cid, 3);
    ck_assert_str_eq(c.path, "/run/x.sock");
    ck_assert(!c.attach.packed);
    ck_assert(!virtio_vsock_parse("packed,path=a,cid=4294967294", &c, &err));
    ck_assert_uint_eq(c.cid, 4294967294);
    ck_assert(c.attach.packed);
    static const char *const bad[] = {"",
                                      "cid=3",
                                      "path=x",
                                      "cid=2,path=x",
                                      "cid=4294967295,path=x",
                                      "cid=,path=x",
                                      "cid=3x,path=x",
                                      "cid=-3,path=x",
                                      "cid=3,path=",
                                      "cid=99999999999999999999,path=x",
                                      "cid=3,path=x,",
                                      "cid=3,path=x,fast",
                                      "cid=0x3,path=x"};
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_msg(virtio_vsock_parse(bad[i], &c, &err) < 0, "'%s' was accepted", bad[i]);
    snprintf(text, sizeof(text), "cid=3,path=%0*d", VSOCK_PATH_MAX, 1);
    ck_assert(!virtio_vsock_parse(text, &c, &err));
    snprintf(text, sizeof(text), "cid=3,path=%0*d", VSOCK_PATH_MAX + 1, 1);
    ck_assert_int_eq(virtio_vsock_parse(text, &c, &err), -ENAMETOOLONG);
}
END_TEST

START_TEST(shows)
{
    struct rig *r = rig_new(false);
    struct ends e = from_host(r, 5);
    guest_data(r, 5, e.host, "four", 4);
    host_hear(r, e.fd, (char[4]) {0}, 4);
    json_t *out = json_object();
    r->dev->class->show(r->dev, out);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "cid")), CID);
    ck_assert_str_eq(json_string_value(json_object_get(out, "path")), r->path);
    ck_assert(json_is_true(json_object_get(out, "listening")));
    ck_assert_int_eq(json_integer_value(json_object_get(out, "connections")), 1);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "bytes_from_guest")), 4);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "bytes_to_guest")), 0);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "resets")), 0);
    json_decref(out);
    guest_closes(r, &e);
    rig_free(r);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("virtio_vsock");
    TCase *tc = tcase_create("virtio_vsock");
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, both_ways, 0, 2);
    tcase_add_test(tc, connect_lines);
    tcase_add_test(tc, guest_is_refused);
    tcase_add_test(tc, full_backlog_waits);
    tcase_add_test(tc, flow_arithmetic);
    tcase_add_loop_test(tc, credit_to_guest, 0, 2);
    tcase_add_loop_test(tc, credit_from_guest, 0, 2);
    tcase_add_test(tc, half_close);
    tcase_add_loop_test(tc, data_outlive_the_guests_end, 0, 2);
    tcase_add_test(tc, guest_aborts);
    tcase_add_test(tc, host_program_dies);
    tcase_add_test(tc, half_open_times_out);
    tcase_add_loop_test(tc, a_thousand_echo, 0, 2);
    tcase_add_loop_test(tc, turns_go_round, 0, 2);
    tcase_add_test(tc, full_table);
    tcase_add_loop_test(tc, hostile_headers, 0, 2);
    tcase_add_test(tc, hostile_packets);
    tcase_add_loop_test(tc, resets_are_bounded, 0, 2);
    tcase_add_test(tc, malformed_buffers_break_the_queue);
    tcase_add_test(tc, receive_goes_on);
    tcase_add_test(tc, reset_ends_connections);
    tcase_add_test(tc, source_goes_on_after_a_save);
    tcase_add_loop_test(tc, moves_without_connections, 0, 8);
    tcase_add_test(tc, socket_files);
    tcase_add_test(tc, option_text);
    tcase_add_test(tc, shows);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
