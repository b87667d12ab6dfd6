// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_console.h"

#include <errno.h>
#include <string.h>

#include "devices/platform.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { QUEUE_SIZE = 64 };
enum { CONTROL_RX = 2, CONTROL_TX = 3 }; // queues, 5.3.2

// What one run of a queue does before the others have their turn.
enum { ROUND_BYTES = 256 * 1024, ROUND_CHAINS = 256 };
enum { DRAIN_BYTES = 64 * 1024 }; // of each port, when the VM ends

// 5.3.3
#define F_SIZE        (1ull << 0)
#define F_MULTIPORT   (1ull << 1)
#define F_EMERG_WRITE (1ull << 2)

struct console_space { // config space, 5.3.4
    uint16_t columns, rows;
    uint32_t max_ports;
    uint32_t emergency;
};
_Static_assert(sizeof(struct console_space) == 12, "5.3.4");

enum { // 5.3.6.2
    M_DEVICE_READY,
    M_PORT_ADD,
    M_PORT_REMOVE,
    M_PORT_READY,
    M_CONSOLE_PORT,
    M_RESIZE,
    M_PORT_OPEN,
    M_PORT_NAME,
};

struct control {
    uint32_t id;
    uint16_t event, value;
};

struct message {
    struct control head;
    uint8_t more[VCONSOLE_NAME_MAX];
    uint32_t len; // of both
};
_Static_assert(sizeof(struct control) == 8, "5.3.6.2");

// Messages a port still owes the driver; what it says of open and size follows from the state.
enum { OWES_ADD = 1, OWES_CONSOLE = 2, OWES_NAME = 4, OWES_ALL = 7, ADDED = 8 };

struct port {
    struct virtio_console *owner;
    struct console *console; // NULL: there is no such port
    const char *name;
    const struct console_config *where;

    bool ready, guest_open; // as the driver said
    bool told_open;         // what the driver heard last
    bool was_closed;        // the host side closed since
    uint8_t owes;
    uint16_t told_columns, told_rows;

    bool sending; // `chain` is ours, and the host side has its first `sent` bytes
    uint64_t sent;
    struct virtqueue_chain chain;

    // What the console had read when the VM was paused. While there is some, the console is held
    // and has nothing itself, so the order of bytes is kept.
    uint32_t in_len;
    uint8_t in[CONSOLE_INPUT_MAX];

    uint64_t to_guest, to_host; // bytes, for the person outside
};

enum { PORT_SAVED_MAX = 32 + VCONSOLE_NAME_MAX + CONSOLE_INPUT_MAX };

struct virtio_console {
    struct virtio v; // first
    struct virtio_console_config config;
    unsigned nr_ports;
    struct port ports[VCONSOLE_PORTS_MAX];
    struct virtqueue_chain chain;

    uint32_t saved_len;
    uint8_t saved[1 + VCONSOLE_PORTS_MAX * PORT_SAVED_MAX]; // ports, while state is saved or loaded
};

static struct virtio_console *vc_of(struct virtio *v)
{
    return container_of(v, struct virtio_console, v);
}

static unsigned port_id(const struct port *p)
{
    return (unsigned)(p - p->owner->ports);
}

static unsigned rx_of(const struct port *p)
{
    unsigned id = port_id(p);
    return id ? 2 * id + 2 : 0;
}

static unsigned tx_of(const struct port *p)
{
    return rx_of(p) + 1;
}

static bool multiport(const struct virtio_console *vc)
{
    return vc->v.accepted & F_MULTIPORT;
}

// --- to the host

// Fewer than `len` bytes when the host side is full.
static uint64_t chain_send(struct port *p, uint64_t len)
{
    struct iovec iov[VQ_SEGMENTS_MAX];
    unsigned n = chain_slice(&p->chain, false, p->sent, len, iov);
    uint64_t done = 0;
    for (unsigned i = 0; i < n; i++) {
        size_t taken = console_write(p->console, iov[i].iov_base, iov[i].iov_len);
        done += taken;
        if (taken < iov[i].iov_len)
            break;
    }
    p->sent += done;
    p->to_host += done;
    return done;
}

static bool chain_take(struct port *p)
{
    if (p->sending)
        return true;
    if (!virtio_next(&p->owner->v, tx_of(p), &p->chain))
        return false;
    p->sending = true;
    if (p->sent > p->chain.out_len) // came with saved state
        p->sent = p->chain.out_len;
    return true;
}

static void chain_end(struct port *p)
{
    virtio_push(&p->owner->v, tx_of(p), &p->chain, 0);
    p->sending = false;
    p->sent = 0;
}

static bool port_output(struct port *p)
{
    struct virtio *v = &p->owner->v;
    uint64_t bytes = ROUND_BYTES;
    for (unsigned chains = ROUND_CHAINS; chains && bytes; chains--) {
        if (!chain_take(p)) {
            virtio_signal(v, tx_of(p));
            return true;
        }
        uint64_t left = p->chain.out_len - p->sent, len = left < bytes ? left : bytes;
        uint64_t done = chain_send(p, len);
        bytes -= done;
        if (done < len) { // `writable` or `opened` goes on
            virtio_signal(v, tx_of(p));
            return false;
        }
        if (done == left)
            chain_end(p);
    }
    virtio_signal(v, tx_of(p));
    virtio_ring(v, tx_of(p));
    return false;
}

// --- to the guest

static size_t input_len(const struct port *p)
{
    return p->in_len ? p->in_len : console_pending(p->console);
}

static size_t input_take(struct port *p, uint8_t *data, size_t len)
{
    if (!p->in_len)
        return console_read(p->console, data, len);
    size_t n = len < p->in_len ? len : p->in_len;
    memcpy(data, p->in, n);
    p->in_len -= (uint32_t)n;
    memmove(p->in, p->in + n, p->in_len);
    if (!p->in_len)
        console_hold(p->console, false);
    return n;
}

static uint32_t chain_fill(struct port *p, struct virtqueue_chain *chain)
{
    uint8_t data[CONSOLE_INPUT_MAX];
    size_t room = chain->in_len < sizeof(data) ? (size_t)chain->in_len : sizeof(data);
    size_t n = input_take(p, data, room);
    chain_write(&p->owner->v.dev.vm->ram, chain, 0, data, n);
    p->to_guest += n;
    return (uint32_t)n;
}

static bool port_input(struct port *p)
{
    struct virtio_console *vc = p->owner;
    struct virtio *v = &vc->v;
    unsigned chains = ROUND_CHAINS;
    bool room = true;
    // A driver discards what comes for a port that it has not opened.
    if (multiport(vc) && !p->guest_open)
        return false;
    while (chains && input_len(p) && (room = virtio_next(v, rx_of(p), &vc->chain))) {
        virtio_push(v, rx_of(p), &vc->chain, chain_fill(p, &vc->chain));
        chains--;
    }
    virtio_signal(v, rx_of(p));
    if (!chains)
        virtio_ring(v, rx_of(p));
    if (!input_len(p) && p->told_open && multiport(vc))
        virtio_ring(v, CONTROL_RX); // it may be time to say that the host side has closed
    return !room;
}

// --- control messages (5.3.6.2)

static void size_of(const struct port *p, uint16_t size[2])
{
    if (!console_size(p->console, &size[0], &size[1]))
        size[0] = size[1] = 0;
}

// Close comes before open when both happened, and after the bytes that came before it.
static bool open_message(struct port *p, struct message *m)
{
    bool now = console_connected(p->console);
    bool close = p->told_open && (now ? p->was_closed : !input_len(p));
    if (!close && (p->told_open || !now))
        return false;
    m->head.event = M_PORT_OPEN;
    m->head.value = !close;
    return true;
}

static bool size_message(struct port *p, struct message *m)
{
    uint16_t size[2];
    size_of(p, size);
    if (!size[0] || (size[0] == p->told_columns && size[1] == p->told_rows))
        return false;
    m->head.event = M_RESIZE;
    memcpy(m->more, size, sizeof(size));
    m->len += (uint32_t)sizeof(size);
    return true;
}

static bool owed_message(const struct port *p, struct message *m)
{
    m->head.value = 1;
    if (p->owes & OWES_ADD) {
        m->head.event = M_PORT_ADD;
    } else if (p->owes & OWES_CONSOLE) {
        m->head.event = M_CONSOLE_PORT;
    } else if (p->owes & OWES_NAME) {
        m->head.event = M_PORT_NAME;
        size_t len = strlen(p->name);
        memcpy(m->more, p->name, len);
        m->len += (uint32_t)len;
    } else {
        return false;
    }
    return true;
}

static bool port_message(struct port *p, struct message *m)
{
    *m = (struct message) {.head.id = port_id(p), .len = sizeof(m->head)};
    if (owed_message(p, m))
        return true;
    m->head.value = 0;
    if (!p->ready)
        return false;
    return (!port_id(p) && size_message(p, m)) || open_message(p, m);
}

static void message_sent(struct port *p, const struct message *m)
{
    switch (m->head.event) {
    case M_PORT_ADD:
        p->owes &= (uint8_t)~OWES_ADD;
        break;
    case M_CONSOLE_PORT:
        p->owes &= (uint8_t)~OWES_CONSOLE;
        break;
    case M_PORT_NAME:
        p->owes &= (uint8_t)~OWES_NAME;
        break;
    case M_RESIZE:
        memcpy(&p->told_columns, m->more, 2);
        memcpy(&p->told_rows, m->more + 2, 2);
        break;
    case M_PORT_OPEN:
        p->told_open = m->head.value;
        p->was_closed = false;
        break;
    }
}

static struct port *next_message(struct virtio_console *vc, struct message *m)
{
    for (struct port *p = vc->ports; p < vc->ports + vc->nr_ports; p++)
        if (p->console && port_message(p, m))
            return p;
    return NULL;
}

static bool control_send(struct virtio_console *vc)
{
    struct virtio *v = &vc->v;
    struct message m;
    struct port *p;
    unsigned left = ROUND_CHAINS;
    while (left && (p = next_message(vc, &m))) {
        if (!virtio_next(v, CONTROL_RX, &vc->chain)) {
            virtio_signal(v, CONTROL_RX);
            return true;
        }
        bool fits = vc->chain.in_len >= m.len;
        if (fits) {
            chain_write(&v->dev.vm->ram, &vc->chain, 0, &m.head, sizeof(m.head));
            chain_write(&v->dev.vm->ram, &vc->chain, sizeof(m.head), m.more,
                        m.len - sizeof(m.head));
            message_sent(p, &m);
        }
        virtio_push(v, CONTROL_RX, &vc->chain, fits ? m.len : 0);
        left--;
        if (!fits) {
            virtio_break(v, CONTROL_RX, "a buffer of %llu bytes for a control message of %u",
                         (unsigned long long)vc->chain.in_len, m.len);
            return false;
        }
    }
    virtio_signal(v, CONTROL_RX);
    if (!left)
        virtio_ring(v, CONTROL_RX);
    return false;
}

static void blame(struct virtio_console *vc, const struct control *c, const char *why)
{
    log_limited(&vc->v.dev.vm->log, &vc->v.limit, LOG_WARN,
                "%s[%u]: control message %u, value %u, for port %u: %s", vc->v.dev.class->name,
                vc->v.dev.instance, c->event, c->value, c->id, why);
}

static void driver_ready(struct virtio_console *vc)
{
    for (struct port *p = vc->ports; p < vc->ports + vc->nr_ports; p++)
        if (p->console && !(p->owes & ADDED))
            p->owes |= OWES_ADD | ADDED;
}

static void port_ready(struct port *p, bool ready)
{
    if (ready && !p->ready)
        p->owes |= port_id(p) ? OWES_NAME : OWES_CONSOLE;
    if (!ready) { // the driver could not make it work
        p->guest_open = p->told_open = p->was_closed = false;
        p->told_columns = p->told_rows = 0;
        p->owes &= OWES_ADD | ADDED;
    }
    p->ready = ready;
}

static void control_message(struct virtio_console *vc, const struct control *c)
{
    if (c->event == M_DEVICE_READY) {
        if (c->value)
            driver_ready(vc);
        return;
    }
    struct port *p = c->id < vc->nr_ports ? &vc->ports[c->id] : NULL;
    if (!p || !p->console) {
        blame(vc, c, "no such port");
    } else if (c->event == M_PORT_READY) {
        port_ready(p, c->value);
    } else if (c->event == M_PORT_OPEN) {
        p->guest_open = c->value;
        if (p->guest_open)
            virtio_ring(&vc->v, rx_of(p));
    } else {
        blame(vc, c, "not for a driver to send");
    }
}

static bool control_receive(struct virtio_console *vc)
{
    struct virtio *v = &vc->v;
    unsigned left = ROUND_CHAINS;
    while (left && virtio_next(v, CONTROL_TX, &vc->chain)) {
        struct control c = {0};
        if (chain_read(&vc->chain, 0, &c, sizeof(c)) == sizeof(c))
            control_message(vc, &c);
        else
            blame(vc, &c, "shorter than 8 bytes");
        virtio_push(v, CONTROL_TX, &vc->chain, 0);
        left--;
    }
    virtio_signal(v, CONTROL_TX);
    virtio_ring(v, CONTROL_RX);
    if (!left)
        virtio_ring(v, CONTROL_TX);
    return left;
}

// --- what the core calls

static bool vc_run(struct virtio *v, unsigned queue)
{
    struct virtio_console *vc = vc_of(v);
    if (queue > 1 && !multiport(vc))
        return false; // not a queue of the driver's
    if (queue == CONTROL_RX)
        return control_send(vc);
    if (queue == CONTROL_TX)
        return control_receive(vc);
    struct port *p = &vc->ports[queue < 2 ? 0 : (queue - 2) / 2];
    if (!p->console)
        return false;
    return queue & 1 ? port_output(p) : port_input(p);
}

static void vc_reset(struct virtio *v)
{
    struct virtio_console *vc = vc_of(v);
    for (struct port *p = vc->ports; p < vc->ports + vc->nr_ports; p++) {
        p->ready = p->guest_open = p->told_open = p->was_closed = p->sending = false;
        p->owes = 0;
        p->told_columns = p->told_rows = 0;
        p->sent = 0;
    }
}

// The only field a driver may write is for bytes in an emergency, without queues (5.3.4).
static void vc_config_write(struct virtio *v, uint32_t offset, unsigned size, uint64_t value)
{
    struct port *p = &vc_of(v)->ports[0];
    uint8_t byte = (uint8_t)value;
    if (offset == offsetof(struct console_space, emergency) && p->console)
        p->to_host += console_write(p->console, &byte, 1);
}

static const struct virtio_ops vc_ops = {
    .id = VIRTIO_ID_CONSOLE, .run = vc_run, .reset = vc_reset, .config_write = vc_config_write};

// --- what the host sides call

static void host_readable(void *arg)
{
    struct port *p = arg;
    virtio_ring(&p->owner->v, rx_of(p));
}

static void host_writable(void *arg)
{
    struct port *p = arg;
    virtio_ring(&p->owner->v, tx_of(p));
}

static void host_opened(void *arg, bool open)
{
    struct port *p = arg;
    struct virtio *v = &p->owner->v;
    pthread_mutex_lock(&v->dev.lock);
    p->was_closed |= !open;
    pthread_mutex_unlock(&v->dev.lock);
    virtio_ring(v, CONTROL_RX);
    if (open)
        virtio_ring(v, tx_of(p));
}

static bool space_size(struct virtio_console *vc)
{
    struct console_space s;
    uint16_t size[2];
    size_of(&vc->ports[0], size);
    memcpy(&s, vc->v.config, sizeof(s));
    if (s.columns == size[0] && s.rows == size[1])
        return false;
    s.columns = size[0];
    s.rows = size[1];
    memcpy(vc->v.config, &s, sizeof(s));
    return true;
}

static void host_resized(void *arg)
{
    struct port *p = arg;
    struct virtio_console *vc = p->owner;
    pthread_mutex_lock(&vc->v.dev.lock);
    if (space_size(vc)) {
        if (multiport(vc))
            vc->v.generation++; // a control message tells
        else
            virtio_config_changed(&vc->v);
    }
    pthread_mutex_unlock(&vc->v.dev.lock);
    virtio_ring(&vc->v, CONTROL_RX);
}

static const struct console_client port_client = {
    .readable = host_readable, .writable = host_writable, .opened = host_opened};
static const struct console_client console_client = {.readable = host_readable,
                                                     .writable = host_writable,
                                                     .opened = host_opened,
                                                     .resized = host_resized};

// Escape commands of a person at stdio.
static void host_command(void *arg, enum console_command command)
{
    struct vm *vm = arg;
    if (command == CONSOLE_QUIT)
        vm_request_stop(vm, VM_STOP_HOST, 0, "ended with the escape key of the console");
    for (struct device *dev = vm->devices; dev && command == CONSOLE_POWER; dev = dev->next)
        if (dev->class == &power_class)
            power_button(dev);
}

// --- life

static int port_open(struct virtio_console *vc, unsigned id, struct error *err)
{
    struct port *p = &vc->ports[id];
    struct virtio_console_port *c = &vc->config.ports[id];
    p->owner = vc;
    p->name = c->name;
    p->where = &c->where;
    if (!c->present)
        return 0;
    c->where.strict = id;
    c->where.sized = !id;
    c->where.patience_ms = id ? 0 : VCONSOLE_PATIENCE_MS;
    int ret = console_open(&p->console, &c->where, vc->v.dev.vm->loop, err);
    if (ret)
        return id ? error_prefix(err, "port %s", c->name) : ret;
    console_hold(p->console, true); // until resume: saved state may come first
    return 0;
}

static void ports_close(struct virtio_console *vc)
{
    for (unsigned i = 0; i < vc->nr_ports; i++)
        console_release(vc->ports[i].console);
}

static int vc_realize(struct device *dev, const void *config, struct error *err)
{
    struct virtio_console *vc = container_of(dev, struct virtio_console, v.dev);
    vc->config = *(const struct virtio_console_config *)config;
    vc->nr_ports = vc->config.nr_ports;
    const struct virtio_setup setup = {.ops = &vc_ops,
                                       .attach = &vc->config.attach,
                                       .features = F_SIZE | F_MULTIPORT | F_EMERG_WRITE,
                                       .nr_queues = 2 * vc->nr_ports + 2,
                                       .queue_size = QUEUE_SIZE,
                                       .config_len = sizeof(struct console_space)};
    const struct console_space space = {.max_ports = vc->nr_ports};
    memcpy(vc->v.config, &space, sizeof(space));
    int ret = 0;
    for (unsigned i = 0; i < vc->nr_ports && !ret; i++)
        ret = port_open(vc, i, err);
    if (!ret && vc->ports[0].console)
        space_size(vc);
    if (!ret)
        ret = virtio_realize(&vc->v, &setup, err);
    if (ret) {
        ports_close(vc);
        return ret;
    }
    for (unsigned i = 0; i < vc->nr_ports; i++) {
        struct console *c = vc->ports[i].console;
        if (c)
            console_attach(c, i ? &port_client : &console_client, &vc->ports[i]);
        if (c && vc->config.ports[i].where.kind == CONSOLE_STDIO)
            console_on_command(c, host_command, dev->vm);
    }
    return 0;
}

// A guest that ended while its host side was slow: gives the reader a last chance.
static void port_drain(struct port *p)
{
    uint64_t left = DRAIN_BYTES;
    struct iovec iov[VQ_SEGMENTS_MAX];
    while (left && console_connected(p->console) && chain_take(p)) {
        uint64_t len = p->chain.out_len - p->sent;
        len = len < left ? len : left;
        unsigned n = chain_slice(&p->chain, false, p->sent, len, iov);
        for (unsigned i = 0; i < n; i++)
            console_drain(p->console, iov[i].iov_base, iov[i].iov_len);
        left -= len ? len : 1;
        chain_end(p);
    }
}

static void vc_unrealize(struct device *dev)
{
    struct virtio_console *vc = container_of(dev, struct virtio_console, v.dev);
    // Not after a pause: then the bytes belong to the saved or migrated guest.
    for (unsigned i = 0; i < vc->nr_ports && vc->v.active; i++)
        if (vc->ports[i].console)
            port_drain(&vc->ports[i]);
    ports_close(vc);
    virtio_unrealize(&vc->v);
}

static int vc_quiesce(struct device *dev, struct error *err)
{
    struct virtio_console *vc = container_of(dev, struct virtio_console, v.dev);
    int ret = virtio_quiesce(dev, err);
    pthread_mutex_lock(&dev->lock);
    for (struct port *p = vc->ports; p < vc->ports + vc->nr_ports; p++) {
        if (!p->console)
            continue;
        console_hold(p->console, true);
        // What was read already belongs to the guest.
        p->in_len +=
            (uint32_t)console_read(p->console, p->in + p->in_len, sizeof(p->in) - p->in_len);
    }
    pthread_mutex_unlock(&dev->lock);
    return ret;
}

static void vc_resume(struct device *dev)
{
    struct virtio_console *vc = container_of(dev, struct virtio_console, v.dev);
    virtio_resume(dev);
    pthread_mutex_lock(&dev->lock);
    for (struct port *p = vc->ports; p < vc->ports + vc->nr_ports; p++)
        if (p->console && !p->in_len)
            console_hold(p->console, false);
    pthread_mutex_unlock(&dev->lock);
}

// --- saved state
//
//   ports := u8 count, port...
//   port  := u8 flags, u8 owes, u16 columns, u16 rows (as told), u64 sent, u8 length, name,
//            u16 length, input

enum { SAVED_PRESENT = 1, SAVED_READY = 2, SAVED_OPEN = 4, SAVED_TOLD = 8, SAVED_CLOSED = 16 };

static int port_save(const struct port *p, struct stream *out, struct error *err)
{
    unsigned flags = (p->console ? SAVED_PRESENT : 0u) | (p->ready ? SAVED_READY : 0u) |
                     (p->guest_open ? SAVED_OPEN : 0u) | (p->told_open ? SAVED_TOLD : 0u) |
                     (p->was_closed ? SAVED_CLOSED : 0u);
    size_t name = strlen(p->name);
    const struct {
        uint64_t value;
        unsigned bytes;
    } n[] = {{flags, 1},        {p->owes, 1}, {p->told_columns, 2},
             {p->told_rows, 2}, {p->sent, 8}, {name, 1}};
    int ret = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(n) && !ret; i++)
        ret = stream_put(out, n[i].value, n[i].bytes, err);
    if (!ret)
        ret = stream_write(out, p->name, name, err);
    if (!ret)
        ret = stream_put(out, p->in_len, 2, err);
    return ret ? ret : stream_write(out, p->in, p->in_len, err);
}

static int vc_save(void *object, struct error *err)
{
    struct virtio_console *vc = object;
    struct stream_mem mem;
    int ret = virtio_save(&vc->v, err);
    if (ret)
        return ret;
    stream_mem_writer(&mem, "ports", sizeof(vc->saved));
    ret = stream_put(&mem.stream, vc->nr_ports, 1, err);
    for (unsigned i = 0; i < vc->nr_ports && !ret; i++)
        ret = port_save(&vc->ports[i], &mem.stream, err);
    vc->saved_len = ret ? 0 : (uint32_t)mem.len;
    if (!ret)
        memcpy(vc->saved, mem.data, mem.len);
    stream_mem_free(&mem);
    return ret;
}

static int name_check(const struct port *p, struct stream *in, struct error *err)
{
    char name[VCONSOLE_NAME_MAX + 1] = "";
    uint64_t len;
    int ret = stream_get(in, &len, 1, err);
    if (!ret && len > VCONSOLE_NAME_MAX)
        ret = error_set(err, -EBADMSG, "port %u: a saved name of %llu bytes, at most %d",
                        port_id(p), (unsigned long long)len, VCONSOLE_NAME_MAX);
    if (!ret)
        ret = stream_read(in, name, len, err);
    if (!ret && strcmp(name, p->name))
        ret = error_set(err, -EINVAL, "port %u was saved as '%.64s', here it is '%s'", port_id(p),
                        name, p->name);
    return ret;
}

static int input_load(struct port *p, struct stream *in, struct error *err)
{
    uint64_t len;
    int ret = stream_get(in, &len, 2, err);
    if (ret)
        return ret;
    if (len > sizeof(p->in) || (len && !p->console))
        return error_set(err, -EBADMSG, "port %u: %llu bytes of saved input, at most %zu",
                         port_id(p), (unsigned long long)len, p->console ? sizeof(p->in) : 0);
    p->in_len = 0;
    ret = stream_read(in, p->in, len, err);
    if (!ret)
        p->in_len = (uint32_t)len;
    return ret;
}

static int port_load(struct port *p, struct stream *in, struct error *err)
{
    uint64_t flags, owes, columns, rows;
    int ret = stream_get(in, &flags, 1, err);
    if (!ret)
        ret = stream_get(in, &owes, 1, err);
    if (!ret)
        ret = stream_get(in, &columns, 2, err);
    if (!ret)
        ret = stream_get(in, &rows, 2, err);
    if (!ret)
        ret = stream_get(in, &p->sent, 8, err);
    if (ret)
        return ret;
    if (flags & ~31ull || owes & ~(uint64_t)(OWES_ALL | ADDED))
        return error_set(err, -EBADMSG, "port %u: saved state 0x%llx, messages 0x%llx", port_id(p),
                         (unsigned long long)flags, (unsigned long long)owes);
    if (!(flags & SAVED_PRESENT) != !p->console)
        return error_set(err, -EINVAL, "port %u was %s, here it is %s", port_id(p),
                         flags & SAVED_PRESENT ? "there" : "missing",
                         p->console ? "there" : "missing");
    p->ready = flags & SAVED_READY;
    p->guest_open = flags & SAVED_OPEN;
    p->told_open = flags & SAVED_TOLD;
    // Whoever had come to a socket or a terminal came to another process's.
    p->was_closed =
        flags & SAVED_CLOSED || p->where->kind == CONSOLE_UNIX || p->where->kind == CONSOLE_PTY;
    p->owes = (uint8_t)owes;
    p->told_columns = (uint16_t)columns;
    p->told_rows = (uint16_t)rows;
    ret = name_check(p, in, err);
    return ret ? ret : input_load(p, in, err);
}

static int ports_load(struct virtio_console *vc, struct error *err)
{
    struct stream_mem mem;
    uint64_t nr;
    stream_mem_reader(&mem, "ports", vc->saved, vc->saved_len);
    int ret = stream_get(&mem.stream, &nr, 1, err);
    if (!ret && nr != vc->nr_ports)
        ret = error_set(err, -EINVAL, "saved with %llu ports, here it has %u",
                        (unsigned long long)nr, vc->nr_ports);
    for (unsigned i = 0; i < vc->nr_ports && !ret; i++)
        ret = port_load(&vc->ports[i], &mem.stream, err);
    if (!ret && mem.pos != mem.len)
        ret = error_set(err, -EBADMSG, "%zu bytes after the saved ports", mem.len - mem.pos);
    return ret;
}

static int vc_load(void *object, uint16_t version, struct error *err)
{
    struct virtio_console *vc = object;
    int ret = virtio_load(&vc->v, version, err);
    if (ret)
        return ret;
    pthread_mutex_lock(&vc->v.dev.lock);
    vc_reset(&vc->v); // chains in hand, if any, are the old queues'
    ret = ports_load(vc, err);
    pthread_mutex_unlock(&vc->v.dev.lock);
    if (ret)
        virtio_device_reset(&vc->v.dev); // one that stays behind is safe to touch
    return ret;
}

static const struct state_field vc_fields[] = {
    VIRTIO_STATE_FIELDS(struct virtio_console),
    STATE_FIELD_VAR(struct virtio_console, saved, saved_len, 1),
};

static const struct state_table vc_state = {
    .name = "virtio-console",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(vc_fields),
    .fields = vc_fields,
    .save = vc_save,
    .load = vc_load,
};

// --- for the person outside

static const char *kind_name(enum console_kind kind)
{
    static const char *const names[] = {
        [CONSOLE_NULL] = "null", [CONSOLE_STDIO] = "stdio", [CONSOLE_FILE] = "file",
        [CONSOLE_PTY] = "pty",   [CONSOLE_UNIX] = "unix",   [CONSOLE_FD] = "fd"};
    return names[kind];
}

static json_t *port_show(const struct port *p)
{
    const char *path = console_path(p->console);
    json_t *out =
        json_pack("{s:i, s:s, s:b, s:b, s:b, s:I, s:I, s:I, s:b}", "port", (int)port_id(p), "host",
                  kind_name(p->where->kind), "host_open", console_connected(p->console), "ready",
                  p->ready, "guest_open", p->guest_open, "bytes_to_guest", (json_int_t)p->to_guest,
                  "bytes_to_host", (json_int_t)p->to_host, "bytes_lost",
                  (json_int_t)console_lost(p->console), "guest_waits", p->sending);
    if (out && *path)
        json_object_set_new(out, "path", json_string(path));
    if (out && *p->name)
        json_object_set_new(out, "name", json_string(p->name));
    return out;
}

static void vc_show(struct device *dev, json_t *out)
{
    struct virtio_console *vc = container_of(dev, struct virtio_console, v.dev);
    json_t *ports = json_array();
    pthread_mutex_lock(&dev->lock);
    for (unsigned i = 0; i < vc->nr_ports; i++)
        if (vc->ports[i].console)
            json_array_append_new(ports, port_show(&vc->ports[i]));
    pthread_mutex_unlock(&dev->lock);
    json_object_set_new(out, "ports", ports);
}

const struct device_class virtio_console_class = {
    .name = "virtio-console",
    .size = sizeof(struct virtio_console),
    .realize = vc_realize,
    .reset = virtio_device_reset,
    .quiesce = vc_quiesce,
    .resume = vc_resume,
    .unrealize = vc_unrealize,
    .state = &vc_state,
    .show = vc_show,
};

// --- the option's text

static bool begins(const char *text, const char *word)
{
    return !strncmp(text, word, strlen(word));
}

static bool is_packed(const char *text)
{
    return begins(text, "packed") && (!text[6] || text[6] == ',');
}

// Length of the item at `text`: up to a comma that begins another one.
static size_t item_len(const char *text)
{
    const char *end = text;
    for (; *end; end++)
        if (*end == ',' &&
            (begins(end + 1, "console=") || begins(end + 1, "port=") || is_packed(end + 1)))
            break;
    return (size_t)(end - text);
}

static int where_parse(const char *text, size_t len, struct virtio_console_port *port,
                       struct error *err)
{
    char where[CONSOLE_PATH_MAX + 32];
    if (len >= sizeof(where))
        return error_set(err, -EINVAL, "'%.60s...' is too long", text);
    memcpy(where, text, len);
    where[len] = 0;
    port->present = true;
    return console_parse(where, &port->where, err);
}

static int port_parse(const char *text, size_t len, struct virtio_console_config *c,
                      struct error *err)
{
    size_t name = strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-");
    if (!name || name >= len || text[name] != '=' || name > VCONSOLE_NAME_MAX)
        return error_set(err, -EINVAL,
                         "port '%.*s': expected NAME=WHERE, the name 1 to %d of A-Z a-z 0-9 . _ -",
                         (int)len, text, VCONSOLE_NAME_MAX);
    if (c->nr_ports == VCONSOLE_PORTS_MAX)
        return error_set(err, -EINVAL, "port '%.*s': at most %d ports", (int)name, text,
                         VCONSOLE_PORTS_MAX - 1);
    struct virtio_console_port *port = &c->ports[c->nr_ports];
    memcpy(port->name, text, name);
    for (unsigned i = 1; i < c->nr_ports; i++)
        if (!strcmp(c->ports[i].name, port->name))
            return error_set(err, -EINVAL, "port '%s': that name is taken", port->name);
    c->nr_ports++;
    return where_parse(text + name + 1, len - name - 1, port, err);
}

static int item_parse(const char *text, size_t len, struct virtio_console_config *c, bool first,
                      struct error *err)
{
    static const char console[] = "console=", port[] = "port=";
    if (is_packed(text) && len == strlen("packed")) {
        c->attach.packed = true;
        return 0;
    }
    if (begins(text, port))
        return port_parse(text + strlen(port), len - strlen(port), c, err);
    size_t key = begins(text, console) ? strlen(console) : 0;
    if ((!key && !first) || c->ports[0].present)
        return error_set(err, -EINVAL, "'%.*s': expected port=NAME=WHERE or packed", (int)len,
                         text);
    return where_parse(text + key, len - key, &c->ports[0], err);
}

int virtio_console_parse(const char *text, struct virtio_console_config *c, struct error *err)
{
    *c = (struct virtio_console_config) {.nr_ports = 1};
    bool first = true;
    for (;; first = false) {
        size_t len = item_len(text);
        int ret = item_parse(text, len, c, first, err);
        if (ret)
            return ret;
        text += len;
        if (!*text)
            break;
        text++;
    }
    unsigned stdios = 0;
    for (unsigned i = 0; i < c->nr_ports; i++)
        stdios += c->ports[i].present && c->ports[i].where.kind == CONSOLE_STDIO;
    if (stdios > 1)
        return error_set(err, -EINVAL, "stdio for %u ports: it can serve one", stdios);
    if (!c->ports[0].present && c->nr_ports == 1)
        return error_set(err, -EINVAL, "expected WHERE or port=NAME=WHERE");
    return 0;
}
