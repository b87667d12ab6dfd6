// SPDX-License-Identifier: Apache-2.0
// The console device, driven as a guest does, with sockets, pipes and terminals as its host sides;
// without KVM. Some twenty guards were taken out, one at a time, to see the tests notice; not
// noticed are the bound of a port's id (the ids tried lie within the array or far outside) and
// guards that stand before another (a message for a port that is not there).
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#include "devices/virtio_console.h"
#include "devices/virtio_mmio.h"
#include "tests/unit/virtio_driver.h"
#include "vmm/vm.h"

enum { BASE = LAYOUT_VIRTIO_MMIO, RINGS = 0x100000, DATA = 0x400000 };
enum { QUEUES = VIRTIO_QUEUES_MAX, SIZE = 16, BUFFER = 0x1000 };
enum { CONTROL_RX = 2, CONTROL_TX = 3 };
enum { READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME };
#define MULTIPORT (1ull << 1)

struct rig {
    struct vm vm;
    struct device *dev;
    struct driver q[QUEUES];
    unsigned nr_queues;
    char dir[64];
};

static int no_irqfd(struct vm *vm, unsigned gsi, int fd, int resample, struct error *err)
{
    return 0;
}

static int no_doorbell(struct vm *vm, uint64_t addr, uint32_t value, int fd, struct error *err)
{
    return 0; // kicks come through the register
}

static const struct virtio_mmio_wiring wiring = {no_irqfd, no_doorbell};

static int rig_add(struct rig *r, const char *text, struct error *err)
{
    const struct virtio_mmio_place place = {.base = BASE, .gsi = GSI_VIRTIO, .wiring = &wiring};
    struct virtio_console_config config;
    ck_assert_msg(!virtio_console_parse(text, &config, err), "%s", err->text);
    config.attach.transport = &virtio_mmio_transport;
    config.attach.place = &place;
    config.attach.packed = true;
    return device_add(&r->vm, &virtio_console_class, &config, &r->dev, err);
}

// The device is there but does nothing yet, as before saved state is loaded.
static struct rig *rig_cold(const char *text)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct error err = {0};
    struct ram_config ram = {.size = 16 * MiB};
    ck_assert_msg(!ram_create(&r->vm.ram, &ram, &err), "%s", err.text);
    ck_assert_msg(!loop_create(&r->vm.loop, &err), "%s", err.text);
    r->vm.mmio.name = "mmio";
    r->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    ck_assert_msg(!rig_add(r, text, &err), "%s", err.text);
    r->nr_queues = container_of(r->dev, struct virtio, dev)->nr_queues;
    return r;
}

static struct rig *rig_new(const char *text)
{
    struct rig *r = rig_cold(text);
    r->dev->class->resume(r->dev);
    return r;
}

static void stop_loop(void *arg)
{
    loop_stop(arg);
}

// Lets everything happen that can, without waiting for what may not come.
static void settle(struct rig *r)
{
    for (int i = 0; i < 4; i++) {
        struct loop_call call = {.fn = stop_loop, .arg = r->vm.loop};
        loop_call(r->vm.loop, &call);
        ck_assert(!loop_run(r->vm.loop, NULL));
    }
}

static void rig_free(struct rig *r)
{
    struct error err = {0};
    r->dev->class->quiesce(r->dev, &err);
    r->dev->class->unrealize(r->dev);
    settle(r); // the loop frees what it held
    free(r->dev);
    loop_destroy(r->vm.loop);
    state_registry_free(&r->vm.state);
    bus_free(&r->vm.mmio);
    ram_destroy(&r->vm.ram);
    if (*r->dir)
        rmdir(r->dir);
    free(r);
}

static uint32_t get(struct rig *r, uint64_t offset)
{
    uint64_t value;
    ck_assert(bus_read(&r->vm.mmio, BASE + offset, 4, &value));
    return (uint32_t)value;
}

static void set(struct rig *r, uint64_t offset, uint32_t value)
{
    ck_assert(bus_write(&r->vm.mmio, BASE + offset, 4, value));
}

static void queue_set(struct rig *r, unsigned queue)
{
    const struct driver *d = &r->q[queue];
    set(r, 0x30, queue);
    set(r, 0x38, SIZE);
    set(r, 0x80, (uint32_t)d->desc);
    set(r, 0x90, (uint32_t)d->avail);
    set(r, 0xa0, (uint32_t)d->used);
    set(r, 0x44, 1);
}

static void start(struct rig *r, bool packed, uint64_t features)
{
    uint64_t accept = VIRTIO_F_VERSION_1 | features | (packed ? VIRTIO_F_PACKED : 0);
    set(r, 0x70, 1);
    set(r, 0x70, 3);
    for (unsigned half = 0; half < 2; half++) {
        set(r, 0x24, half);
        set(r, 0x20, (uint32_t)(accept >> 32 * half));
    }
    set(r, 0x70, 11);
    ck_assert_uint_eq(get(r, 0x70), 11);
    for (unsigned q = 0; q < r->nr_queues; q++) {
        driver_init(&r->q[q], &r->vm.ram, packed, SIZE, RINGS + q * 0x4000);
        queue_set(r, q);
    }
    set(r, 0x70, 15);
    ck_assert_uint_eq(get(r, 0x70), 15);
}

static void turn(struct rig *r)
{
    struct error err = {0};
    ck_assert_msg(!loop_turn(r->vm.loop, true, &err), "%s", err.text);
}

// Each queue has SIZE buffers of its own; a chain of one descriptor has its id's.
static uint64_t buffer_of(unsigned queue, unsigned id)
{
    return DATA + (queue * SIZE + id) * (uint64_t)BUFFER;
}

static uint8_t *at(struct rig *r, uint64_t gpa)
{
    return ram_at(&r->vm.ram, gpa, 1);
}

// The id it will get, or -1 when the ring is full.
static int next_id(const struct driver *d)
{
    for (int i = 0; i < d->size && d->free; i++)
        if (!d->taken[i])
            return i;
    return -1;
}

static bool offer(struct rig *r, unsigned queue, uint32_t len, bool write)
{
    struct driver *d = &r->q[queue];
    int id = next_id(d);
    if (id < 0)
        return false;
    const struct buffer b = {buffer_of(queue, (unsigned)id), len, write};
    ck_assert_int_eq(driver_add(d, &b, 1, 0), id);
    set(r, 0x50, queue);
    return true;
}

// Longer ones in three pieces: a host side takes a piece whole or not, so only a chain of several
// can be sent in part.
static bool put(struct rig *r, unsigned queue, const void *data, uint32_t len)
{
    struct driver *d = &r->q[queue];
    int id = next_id(d);
    if (id < 0 || d->free < 3)
        return false;
    uint64_t gpa = buffer_of(queue, (unsigned)id);
    memcpy(at(r, gpa), data, len);
    if (len < 16)
        return offer(r, queue, len, false);
    const uint32_t part = len / 3;
    const struct buffer b[] = {
        {gpa, part, false}, {gpa + part, part, false}, {gpa + 2 * part, len - 2 * part, false}};
    ck_assert_int_eq(driver_add(d, b, 3, 0), id);
    set(r, 0x50, queue);
    return true;
}

// What the device wrote into the next buffer it gave back, if there is one.
static bool taken(struct rig *r, unsigned queue, uint8_t **data, uint32_t *len)
{
    unsigned id;
    if (!driver_used(&r->q[queue], &id, len))
        return false;
    *data = at(r, buffer_of(queue, id));
    return true;
}

static void await_sent(struct rig *r, unsigned queue)
{
    uint8_t *data;
    uint32_t len;
    while (!taken(r, queue, &data, &len))
        turn(r);
}

// --- control messages

struct control {
    uint32_t id;
    uint16_t event, value;
};

static void say(struct rig *r, uint32_t id, unsigned event, unsigned value)
{
    const struct control c = {id, (uint16_t)event, (uint16_t)value};
    ck_assert(put(r, CONTROL_TX, &c, sizeof(c)));
    await_sent(r, CONTROL_TX);
}

static void expect_more(struct rig *r, uint32_t id, unsigned event, unsigned value,
                        const void *more, uint32_t more_len)
{
    struct control c;
    uint8_t *data;
    uint32_t len;
    offer(r, CONTROL_RX, 256, true);
    while (!taken(r, CONTROL_RX, &data, &len))
        turn(r);
    memcpy(&c, data, sizeof(c));
    ck_assert_msg(c.id == id && c.event == event && c.value == value && len == 8 + more_len,
                  "port %u event %u value %u length %u, expected %u %u %u %u", c.id, c.event,
                  c.value, len, id, event, value, 8 + more_len);
    ck_assert_mem_eq(data + 8, more, more_len);
}

static void expect(struct rig *r, uint32_t id, unsigned event, unsigned value)
{
    expect_more(r, id, event, value, "", 0);
}

static void expect_silence(struct rig *r)
{
    uint8_t *data;
    uint32_t len;
    offer(r, CONTROL_RX, 256, true);
    settle(r);
    ck_assert(!taken(r, CONTROL_RX, &data, &len));
}

// --- host sides

static void pair(int fd[2])
{
    ck_assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd));
}

static int dial(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_msg(!connect(fd, (struct sockaddr *)&addr, sizeof(addr)), "%s", strerror(errno));
    return fd;
}

static void nonblocking(int fd)
{
    ck_assert(!fcntl(fd, F_SETFL, O_NONBLOCK));
}

static void read_is(struct rig *r, int fd, const char *text)
{
    char data[256];
    size_t len = strlen(text), done = 0;
    while (done < len) {
        struct pollfd p = {fd, POLLIN, 0};
        settle(r);
        if (poll(&p, 1, 0) == 1) {
            ssize_t n = read(fd, data + done, len - done);
            ck_assert_int_gt(n, 0);
            done += (size_t)n;
        }
    }
    ck_assert_mem_eq(data, text, len);
}

static void write_text(int fd, const char *text)
{
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
}

static void input_is(struct rig *r, unsigned queue, const char *text)
{
    size_t len = strlen(text), done = 0;
    uint8_t *data;
    uint32_t n;
    while (done < len) {
        offer(r, queue, BUFFER, true);
        while (!taken(r, queue, &data, &n))
            turn(r);
        ck_assert(n && done + n <= len && !memcmp(data, text + done, n));
        done += n;
    }
}

// A device with the console and one named port on socket pairs: [0] is the outside's end.
struct hosts {
    int console[2], port[2];
    char text[96];
};

static void hosts_new(struct hosts *h)
{
    pair(h->console);
    pair(h->port);
    snprintf(h->text, sizeof(h->text), "console=fd:%d,port=org.a=fd:%d", h->console[1], h->port[1]);
    nonblocking(h->console[0]);
    nonblocking(h->port[0]);
}

static void hosts_free(struct hosts *h) // the other ends are the device's
{
    close(h->console[0]);
    close(h->port[0]);
}

static void up(struct rig *r, bool packed)
{
    start(r, packed, MULTIPORT);
    say(r, 0, READY, 1);
    expect(r, 0, ADD, 1);
    expect(r, 1, ADD, 1);
    say(r, 0, PORT_READY, 1);
    expect(r, 0, CONSOLE, 1);
    expect(r, 0, OPEN, 1);
    say(r, 1, PORT_READY, 1);
    expect_more(r, 1, NAME, 1, "org.a", 5);
    expect(r, 1, OPEN, 1);
    say(r, 0, OPEN, 1);
    say(r, 1, OPEN, 1);
}

START_TEST(handshake)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    ck_assert_uint_eq(get(r, 0x104), 2); // max_nr_ports
    for (int i = 0; i < 2; i++) {        // a driver that goes and comes again finds it as new
        up(r, _i);
        expect_silence(r);
        set(r, 0x70, 0);
    }
    rig_free(r);
    hosts_free(&h);
}
END_TEST

// --- bytes

// A stream whose every byte tells its position, both ways at once, in pieces of odd sizes.
static uint8_t byte_at(uint64_t i)
{
    return (uint8_t)(i * 167 + (i >> 8) * 13 + (i >> 16));
}

struct flow {
    uint64_t sent, got, total;
    unsigned seed;
};

static uint32_t piece(struct flow *f, uint32_t max)
{
    f->seed = f->seed * 1103515245u + 12345;
    uint64_t left = f->total - f->sent;
    uint32_t n = 1 + (f->seed >> 16) % max;
    return n < left ? n : (uint32_t)left;
}

static void flow_take(struct flow *f, const uint8_t *data, uint64_t len)
{
    for (uint64_t i = 0; i < len; i++)
        if (data[i] != byte_at(f->got + i)) // an assertion for each byte would be a message each
            ck_abort_msg("byte %llu is %u, expected %u", (unsigned long long)(f->got + i), data[i],
                         byte_at(f->got + i));
    f->got += len;
}

static void bytes_make(uint8_t *data, uint64_t from, uint32_t len)
{
    for (uint32_t i = 0; i < len; i++)
        data[i] = byte_at(from + i);
}

static void guest_sends(struct rig *r, unsigned tx, struct flow *f)
{
    uint8_t data[BUFFER], *used;
    uint32_t len;
    while (taken(r, tx, &used, &len))
        continue;
    while (f->sent < f->total && r->q[tx].free >= 3) {
        uint32_t n = piece(f, BUFFER);
        bytes_make(data, f->sent, n);
        ck_assert(put(r, tx, data, n));
        f->sent += n;
    }
}

static void guest_takes(struct rig *r, unsigned rx, struct flow *f)
{
    uint8_t *data;
    uint32_t len;
    while (taken(r, rx, &data, &len))
        flow_take(f, data, len);
    while (offer(r, rx, 1 + f->got % 777, true))
        continue;
}

static void host_sends(int fd, struct flow *f)
{
    uint8_t data[5000];
    uint32_t n = piece(f, sizeof(data));
    bytes_make(data, f->sent, n);
    ssize_t done = write(fd, data, n);
    f->sent += done > 0 ? (uint64_t)done : 0;
}

static void host_takes(int fd, struct flow *f, size_t max)
{
    uint8_t data[5000];
    ssize_t n = read(fd, data, max < sizeof(data) ? max : sizeof(data));
    if (n > 0)
        flow_take(f, data, (uint64_t)n);
}

START_TEST(both_ways)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    up(r, _i & 1);
    int fd = _i & 2 ? h.port[0] : h.console[0];
    unsigned rx = _i & 2 ? 4 : 0;
    struct flow out = {.total = 200000, .seed = 1}, in = {.total = 200000, .seed = 2};
    while (out.got < out.total || in.got < in.total) {
        guest_sends(r, rx + 1, &out);
        host_sends(fd, &in);
        settle(r);
        host_takes(fd, &out, 5000);
        guest_takes(r, rx, &in);
    }
    rig_free(r);
    hosts_free(&h);
}
END_TEST

START_TEST(closed_port_gets_no_input)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    up(r, false);
    say(r, 1, OPEN, 0);
    write_text(h.port[0], "for whoever opens it");
    offer(r, 4, 64, true);
    settle(r);
    uint8_t *data;
    uint32_t len;
    ck_assert(!taken(r, 4, &data, &len));
    say(r, 1, OPEN, 1);
    input_is(r, 4, "for whoever opens it");
    rig_free(r);
    hosts_free(&h);
}
END_TEST

// A reader that stops: the chain is held, the loop goes on, and nothing is lost when it reads
// again.
START_TEST(slow_reader)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    up(r, _i);
    struct flow out = {.total = 1000000, .seed = 3};
    uint64_t before;
    do { // until nothing moves any more
        before = out.sent;
        guest_sends(r, 5, &out);
        settle(r);
    } while (out.sent > before);
    ck_assert_uint_lt(out.sent, out.total);
    write_text(h.port[0], "the other way is open");
    input_is(r, 4, "the other way is open");
    while (out.got < out.total) {
        host_takes(h.port[0], &out, 1 + out.got % 4000);
        settle(r);
        guest_sends(r, 5, &out);
    }
    rig_free(r);
    hosts_free(&h);
}
END_TEST

// A kernel that prints waits for the console with its interrupts off: not for ever.
START_TEST(console_reader_stops)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    up(r, false);
    struct flow out = {.total = 1000000, .seed = 4};
    while (out.sent < out.total) {
        guest_sends(r, 1, &out);
        turn(r);
    }
    uint8_t data[4096];
    ssize_t n;
    uint64_t got = 0;
    settle(r);
    while ((n = read(h.console[0], data, sizeof(data))) > 0) {
        got += (uint64_t)n;
        settle(r);
    }
    ck_assert_uint_ge(got, CONSOLE_BACKLOG);
    ck_assert_uint_lt(got, out.total);
    guest_sends(r, 1, &out); // which collects what was taken
    ck_assert(put(r, 1, "back", 4));
    read_is(r, h.console[0], "back");
    rig_free(r);
    hosts_free(&h);
}
END_TEST

// --- those who come and go

static struct rig *rig_socket(char path[96], const char *form)
{
    char dir[] = "/tmp/ferry-vconsole-XXXXXX", text[160];
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, 96, "%s/sock", dir);
    snprintf(text, sizeof(text), form, path);
    struct rig *r = rig_new(text);
    memcpy(r->dir, dir, sizeof(dir));
    return r;
}

START_TEST(port_follows_its_client)
{
    char path[96];
    struct rig *r = rig_socket(path, "port=org.b=unix:%s");
    uint8_t *data;
    uint32_t len;
    start(r, _i, MULTIPORT);
    say(r, 0, READY, 1);
    expect(r, 1, ADD, 1); // there is no port 0
    say(r, 1, PORT_READY, 1);
    expect_more(r, 1, NAME, 1, "org.b", 5);
    say(r, 1, OPEN, 1);
    expect_silence(r);
    ck_assert(put(r, 1, "nobody", 6) && offer(r, 0, 64, true)); // queues of no port
    settle(r);
    ck_assert(!taken(r, 1, &data, &len) && !taken(r, 0, &data, &len));
    ck_assert(put(r, 5, "waits", 5)); // not for the wind
    settle(r);
    ck_assert(!taken(r, 5, &data, &len));
    int fd = dial(path);
    expect(r, 1, OPEN, 1);
    read_is(r, fd, "waits");
    await_sent(r, 5);
    write_text(fd, "last words");
    settle(r);
    close(fd);
    expect_silence(r); // they have not been taken yet
    input_is(r, 4, "last words");
    expect(r, 1, OPEN, 0);
    // The next one comes before the guest could be told that this one left.
    fd = dial(path);
    expect(r, 1, OPEN, 1);
    write_text(fd, "one");
    settle(r);
    close(fd);
    settle(r);
    fd = dial(path);
    expect(r, 1, OPEN, 0);
    expect(r, 1, OPEN, 1);
    write_text(fd, "two");
    input_is(r, 4, "onetwo");
    close(fd);
    expect(r, 1, OPEN, 0);
    rig_free(r);
}
END_TEST

START_TEST(console_keeps_what_nobody_reads)
{
    char path[96], text[BUFFER];
    struct rig *r = rig_socket(path, "unix:%s");
    start(r, false, MULTIPORT);
    memset(text, 'x', sizeof(text));
    for (unsigned i = 0; i <= CONSOLE_BACKLOG / sizeof(text); i++) {
        ck_assert(put(r, 1, text, sizeof(text)));
        await_sent(r, 1);
    }
    ck_assert(put(r, 1, "end", 3));
    await_sent(r, 1);
    int fd = dial(path);
    read_is(r, fd, "\r\n[ferry: 4099 earlier bytes dropped]\r\nxxx");
    close(fd);
    rig_free(r);
}
END_TEST

START_TEST(broken_host_side)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    up(r, false);
    close(h.port[0]);
    expect(r, 1, OPEN, 0);
    ck_assert(put(r, 5, "to nobody", 9));
    await_sent(r, 5); // discarded, and said so
    h.port[0] = -1;
    rig_free(r);
    close(h.console[0]);
}
END_TEST

// --- terminals

START_TEST(size_of_a_terminal)
{
    struct rig *r = rig_new("pty");
    start(r, false, _i ? MULTIPORT : 0);
    if (_i) {
        say(r, 0, READY, 1);
        expect(r, 0, ADD, 1);
        say(r, 0, PORT_READY, 1);
        expect(r, 0, CONSOLE, 1);
    }
    json_t *out = json_object();
    r->dev->class->show(r->dev, out);
    json_t *port = json_array_get(json_object_get(out, "ports"), 0);
    int slave = open(json_string_value(json_object_get(port, "path")), O_RDWR | O_NOCTTY);
    ck_assert_int_ge(slave, 0);
    json_decref(out);
    const uint16_t sizes[][2] = {{132, 43}, {80, 25}};
    if (_i)
        expect(r, 0, OPEN, 1);
    for (unsigned i = 0; i < 2; i++) {
        struct winsize w = {.ws_col = sizes[i][0], .ws_row = sizes[i][1]};
        ck_assert(!ioctl(slave, TIOCSWINSZ, &w));
        if (_i)
            expect_more(r, 0, RESIZE, 0, sizes[i], 4);
        while (get(r, 0x100) != (uint32_t)(sizes[i][0] | sizes[i][1] << 16))
            turn(r);
        if (!_i)
            ck_assert_uint_eq(get(r, 0x60) & 2, 2); // configuration changed
        set(r, 0x64, 3);
    }
    close(slave);
    rig_free(r);
}
END_TEST

START_TEST(size_of_stdio_follows_signals)
{
    char name[64];
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    ck_assert(master >= 0 && !grantpt(master) && !unlockpt(master));
    ck_assert(!ptsname_r(master, name, sizeof(name)));
    int slave = open(name, O_RDWR | O_NOCTTY), saved[2] = {dup(0), dup(1)};
    struct winsize w = {.ws_col = 100, .ws_row = 30};
    ck_assert(!ioctl(slave, TIOCSWINSZ, &w));
    fflush(stdout);
    dup2(slave, 0);
    dup2(slave, 1);
    struct rig *r = rig_new("stdio");
    dup2(saved[0], 0);
    dup2(saved[1], 1);
    start(r, false, 0);
    ck_assert_uint_eq(get(r, 0x100), 100 | 30 << 16);
    w.ws_col = 101;
    ck_assert(!ioctl(slave, TIOCSWINSZ, &w));
    raise(SIGWINCH); // it is not our controlling terminal
    while (get(r, 0x100) != (101 | 30 << 16))
        turn(r);
    rig_free(r);
    close(slave);
    close(master);
    close(saved[0]);
    close(saved[1]);
}
END_TEST

// --- drivers of other kinds

START_TEST(without_multiport)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    start(r, _i, 0);
    write_text(h.console[0], "in");
    input_is(r, 0, "in");
    ck_assert(put(r, 1, "out", 3));
    read_is(r, h.console[0], "out");
    // Queues that it must not use: nothing comes of them, and the loop has rest.
    ck_assert(put(r, 5, "no", 2) && put(r, CONTROL_TX, "no", 2));
    uint8_t *data;
    uint32_t len;
    settle(r);
    ck_assert(!taken(r, 5, &data, &len) && !taken(r, CONTROL_TX, &data, &len));
    rig_free(r);
    hosts_free(&h);
}
END_TEST

START_TEST(emergency_write)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text); // no queues, no status
    for (const char *s = "panic"; *s; s++)
        set(r, 0x108, (uint8_t)*s);
    read_is(r, h.console[0], "panic");
    ck_assert_uint_eq(get(r, 0x108), 0);
    rig_free(r);
    hosts_free(&h);
}
END_TEST

START_TEST(hostile_control)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    start(r, _i, MULTIPORT);
    static const struct control bad[] = {
        {0, OPEN, 1},    {2, PORT_READY, 1},    {UINT32_MAX, PORT_READY, 1},
        {7, OPEN, 1},    {1, ADD, 1},           {1, REMOVE, 1},
        {1, CONSOLE, 1}, {1, NAME, 1},          {1, UINT16_MAX, 1},
        {0, RESIZE, 9},  {1, OPEN, UINT16_MAX}, {0, READY, 0},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        say(r, bad[i].id, bad[i].event, bad[i].value);
    const struct control whole = {1, PORT_READY, 1};
    for (uint32_t len = 1; len < 8; len++) { // and shorter than a message
        ck_assert(put(r, CONTROL_TX, &whole, len));
        await_sent(r, CONTROL_TX);
    }
    ck_assert(offer(r, CONTROL_TX, 64, true)); // nothing to read in it at all
    await_sent(r, CONTROL_TX);
    static const uint8_t longer[4096] = {1, 0, 0, 0, OPEN};
    ck_assert(put(r, CONTROL_TX, longer, sizeof(longer)));
    await_sent(r, CONTROL_TX);
    expect_silence(r);
    for (unsigned i = 0; i < 400; i++) { // an endless beginning is one beginning
        say(r, 0, READY, 1);
        say(r, 1, PORT_READY, i & 1);
    }
    expect(r, 0, ADD, 1);
    expect(r, 1, ADD, 1);
    expect_more(r, 1, NAME, 1, "org.a", 5);
    expect(r, 1, OPEN, 1);
    expect_silence(r);
    ck_assert_uint_eq(get(r, 0x70), 15);
    rig_free(r);
    hosts_free(&h);
}
END_TEST

START_TEST(small_control_buffer)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    start(r, _i, MULTIPORT);
    offer(r, CONTROL_RX, 8, true);
    say(r, 0, READY, 1);
    settle(r);
    offer(r, CONTROL_RX, 7, true);
    settle(r);
    ck_assert_uint_eq(get(r, 0x70), 15 | VIRTIO_NEEDS_RESET);
    set(r, 0x70, 0);
    up(r, _i);
    rig_free(r);
    hosts_free(&h);
}
END_TEST

// Chains without a byte in the direction that counts are given back, and cost nobody's bytes.
START_TEST(chains_of_the_wrong_direction)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    up(r, _i);
    uint8_t *data;
    uint32_t len;
    ck_assert(offer(r, 5, 16, true)); // nothing to send
    await_sent(r, 5);
    ck_assert(offer(r, 4, 16, false)); // no room
    write_text(h.port[0], "bytes");
    settle(r);
    ck_assert(taken(r, 4, &data, &len) && !len);
    input_is(r, 4, "bytes");
    rig_free(r);
    hosts_free(&h);
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

static int state_in(struct rig *r, const struct stream_mem *mem, struct error *err)
{
    struct stream_mem back;
    stream_mem_reader(&back, "state", mem->data, mem->len);
    return state_load(&r->vm.state, &back.stream, err);
}

// The guest goes on in another device, with its memory and its driver.
static struct rig *move(struct rig *from, const char *text)
{
    struct stream_mem mem;
    struct error err = {0};
    struct rig *to = rig_cold(text);
    state_out(from, &mem);
    settle(from); // whatever it still does takes nothing from the other
    ck_assert_msg(!state_in(to, &mem, &err), "%s", err.text);
    memcpy(at(to, RINGS), at(from, RINGS), DATA + QUEUES * SIZE * BUFFER - RINGS);
    memcpy(to->q, from->q, sizeof(to->q));
    for (unsigned q = 0; q < QUEUES; q++)
        to->q[q].ram = &to->vm.ram;
    memcpy(to->dir, from->dir, sizeof(to->dir));
    *from->dir = 0;
    stream_mem_free(&mem);
    rig_free(from);
    to->dev->class->resume(to->dev);
    return to;
}

// Many moves in the middle of a stream both ways, with a slow host and a guest that has few
// buffers: each byte once.
START_TEST(moves_in_the_middle)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    up(r, _i & 1);
    int *fds = _i & 2 ? h.port : h.console;
    unsigned rx = _i & 2 ? 4 : 0;
    struct flow out = {.total = 700000, .seed = 5}, in = {.total = 700000, .seed = 6};
    // Full both ways: part of a chain is with the host, input has been read ahead of the guest.
    for (uint64_t before = 1; before != out.sent + in.sent;) {
        before = out.sent + in.sent;
        guest_sends(r, rx + 1, &out);
        host_sends(fds[0], &in);
        settle(r);
    }
    for (unsigned round = 0; out.got < out.total || in.got < in.total; round++) {
        if (round % 16 == 0 && round < 16 * 10) {
            h.console[1] = dup(h.console[1]);
            h.port[1] = dup(h.port[1]);
            snprintf(h.text, sizeof(h.text), "console=fd:%d,port=org.a=fd:%d", h.console[1],
                     h.port[1]);
            r = move(r, h.text);
        }
        guest_sends(r, rx + 1, &out);
        host_sends(fds[0], &in);
        settle(r);
        host_takes(fds[0], &out, 1 + round * 37 % 4999);
        guest_takes(r, rx, &in);
    }
    expect_silence(r); // the same host side: nobody left, nobody came
    rig_free(r);
    hosts_free(&h);
}
END_TEST

// A pause that is no move, twice, with input that the guest has not taken.
START_TEST(pause_and_go_on)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    struct stream_mem mem;
    up(r, false);
    struct flow in = {.total = 100000, .seed = 7};
    for (unsigned i = 0; in.got < in.total; i++) {
        host_sends(h.port[0], &in);
        settle(r);
        state_out(r, &mem);
        stream_mem_free(&mem);
        host_sends(h.port[0], &in); // while it stands still
        settle(r);
        r->dev->class->resume(r->dev);
        settle(r);
        if (i % 3 == 2)
            guest_takes(r, 4, &in);
    }
    rig_free(r);
    hosts_free(&h);
}
END_TEST

// Input that the guest takes only after pauses and a move: nothing is read ahead beyond what is
// saved.
START_TEST(paused_twice_then_moved)
{
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    struct stream_mem mem;
    struct flow in = {.total = 30000, .seed = 8};
    up(r, false);
    while (in.sent < in.total)
        host_sends(h.port[0], &in);
    for (unsigned i = 0; i < 2; i++) {
        settle(r);
        state_out(r, &mem);
        stream_mem_free(&mem);
        r->dev->class->resume(r->dev);
    }
    settle(r);
    h.console[1] = dup(h.console[1]);
    h.port[1] = dup(h.port[1]);
    snprintf(h.text, sizeof(h.text), "console=fd:%d,port=org.a=fd:%d", h.console[1], h.port[1]);
    r = move(r, h.text);
    while (in.got < in.total) {
        guest_takes(r, 4, &in);
        settle(r);
    }
    rig_free(r);
    hosts_free(&h);
}
END_TEST

START_TEST(clients_are_left_behind)
{
    char path[96], text[128];
    struct rig *r = rig_socket(path, "port=org.b=unix:%s");
    start(r, false, MULTIPORT);
    say(r, 0, READY, 1);
    expect(r, 1, ADD, 1);
    int fd = dial(path);
    settle(r);
    say(r, 1, PORT_READY, 1);
    expect_more(r, 1, NAME, 1, "org.b", 5);
    expect(r, 1, OPEN, 1);
    say(r, 1, OPEN, 1);
    write_text(fd, "before the move");
    settle(r);
    snprintf(text, sizeof(text), "port=org.b=unix:%s2", path);
    r = move(r, text);
    char c;
    ck_assert_int_eq(read(fd, &c, 1), 0);
    close(fd);
    strcat(path, "2");
    fd = dial(path);
    expect(r, 1, OPEN, 0); // that it is somebody else, the guest is told
    expect(r, 1, OPEN, 1);
    input_is(r, 4, "before the move");
    ck_assert(put(r, 5, "hello", 5));
    read_is(r, fd, "hello");
    close(fd);
    rig_free(r);
}
END_TEST

START_TEST(other_ports_are_refused)
{
    static const char *const others[] = {"null", "null,port=org.c=null", "port=org.a=null",
                                         "null,port=org.a=null,port=org.b=null"};
    struct hosts h;
    hosts_new(&h);
    struct rig *r = rig_new(h.text);
    struct stream_mem mem;
    struct error err = {0};
    up(r, false);
    state_out(r, &mem);
    for (unsigned i = 0; i < ARRAY_SIZE(others); i++) {
        struct rig *to = rig_cold(others[i]);
        ck_assert_msg(state_in(to, &mem, &err) < 0, "'%s' was taken", others[i]);
        rig_free(to);
    }
    struct rig *to = rig_cold("null,port=org.a=null"); // where they lead does not matter
    ck_assert_msg(!state_in(to, &mem, &err), "%s", err.text);
    rig_free(to);
    stream_mem_free(&mem);
    rig_free(r);
    hosts_free(&h);
}
END_TEST

// --- the option

START_TEST(parse_good)
{
    struct virtio_console_config c;
    ck_assert(!virtio_console_parse("stdio", &c, NULL));
    ck_assert(c.nr_ports == 1 && c.ports[0].present && c.ports[0].where.kind == CONSOLE_STDIO);
    ck_assert(!virtio_console_parse("console=pty,link=/tmp/a,packed", &c, NULL));
    ck_assert(c.attach.packed && c.ports[0].where.kind == CONSOLE_PTY);
    ck_assert_str_eq(c.ports[0].where.path, "/tmp/a");
    ck_assert(
        !virtio_console_parse("port=org.x-y_1=unix:/run/x,1,port=b=file:/tmp/f,append", &c, NULL));
    ck_assert(c.nr_ports == 3 && !c.ports[0].present);
    ck_assert_str_eq(c.ports[1].name, "org.x-y_1");
    ck_assert_str_eq(c.ports[1].where.path, "/run/x,1");
    ck_assert(c.ports[2].where.append);
    ck_assert(!virtio_console_parse("packed,port=a=null,console=fd:3", &c, NULL));
    ck_assert(c.attach.packed && c.ports[0].present && c.nr_ports == 2);
}
END_TEST

START_TEST(parse_bad)
{
    static const char *const bad[] = {
        "",
        "packed",
        "nothing",
        "port=",
        "port=x",
        "port=x=",
        "port==null",
        "port=x/y=null",
        "port=x=tcp:1",
        "console=",
        "null,null",
        "null,console=null",
        "null,",
        "port=a=null,port=a=null",
        "stdio,port=a=stdio",
        "port=a=null,port=b=null,port=c=null,port=d=null,port=e=null,port=f=null,port=g=null,"
        "port=h=null,port=i=null,port=j=null,port=k=null,port=l=null,port=m=null,port=n=null,"
        "port=o=null",
        "port=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa=null",
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct virtio_console_config c;
        struct error err = {0};
        ck_assert_msg(virtio_console_parse(bad[i], &c, &err) == -EINVAL, "'%s' was taken", bad[i]);
        ck_assert_msg(strlen(err.text) > 10, "'%s': no message", bad[i]);
    }
}
END_TEST

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    Suite *suite = suite_create("virtio_console");
    TCase *tc = tcase_create("virtio_console");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, handshake, 0, 2);
    tcase_add_loop_test(tc, both_ways, 0, 4);
    tcase_add_test(tc, closed_port_gets_no_input);
    tcase_add_loop_test(tc, slow_reader, 0, 2);
    tcase_add_test(tc, console_reader_stops);
    tcase_add_loop_test(tc, port_follows_its_client, 0, 2);
    tcase_add_test(tc, console_keeps_what_nobody_reads);
    tcase_add_test(tc, broken_host_side);
    tcase_add_loop_test(tc, size_of_a_terminal, 0, 2);
    tcase_add_test(tc, size_of_stdio_follows_signals);
    tcase_add_loop_test(tc, without_multiport, 0, 2);
    tcase_add_test(tc, emergency_write);
    tcase_add_loop_test(tc, hostile_control, 0, 2);
    tcase_add_loop_test(tc, small_control_buffer, 0, 2);
    tcase_add_loop_test(tc, chains_of_the_wrong_direction, 0, 2);
    tcase_add_loop_test(tc, moves_in_the_middle, 0, 4);
    tcase_add_test(tc, pause_and_go_on);
    tcase_add_test(tc, paused_twice_then_moved);
    tcase_add_test(tc, clients_are_left_behind);
    tcase_add_test(tc, other_ports_are_refused);
    tcase_add_test(tc, parse_good);
    tcase_add_test(tc, parse_bad);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
