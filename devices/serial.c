// SPDX-License-Identifier: Apache-2.0
#include "devices/serial.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "devices/console.h"
#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vm.h"

// Register numbers and bits: National Semiconductor PC16550D data sheet, section 8.
enum { REG_DATA, REG_IER, REG_IIR_FCR, REG_LCR, REG_MCR, REG_LSR, REG_MSR, REG_SCR, REG_COUNT };

enum { IER_RX = 0x01, IER_THRE = 0x02, IER_LINE = 0x04, IER_MODEM = 0x08, IER_MASK = 0x0f };
enum {
    IIR_MODEM = 0x00,
    IIR_NONE = 0x01,
    IIR_THRE = 0x02,
    IIR_RX = 0x04,
    IIR_LINE = 0x06,
    IIR_TIMEOUT = 0x0c,
    IIR_FIFO = 0xc0,
};
enum { FCR_ENABLE = 0x01, FCR_CLEAR_RX = 0x02, FCR_TRIGGER = 0xc0, FCR_KEPT = 0xc9 };
enum { LCR_DLAB = 0x80 };
enum { MCR_DTR = 0x01, MCR_RTS = 0x02, MCR_OUT1 = 0x04, MCR_OUT2 = 0x08, MCR_LOOP = 0x10 };
enum { LSR_DR = 0x01, LSR_OE = 0x02, LSR_THRE = 0x20, LSR_TEMT = 0x40 };
enum { MSR_DELTAS = 0x0f, MSR_TERI = 0x04, MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40 };
enum { MSR_DCD = 0x80 };

// Reads of LSR in a row, without the receive interrupt, that make a guest a polling reader.
enum { POLLS_TO_READ = 4 };

// See irq_hold: how long a driver has to come back to IIR.
enum { HOLD_NS = 2000000 };

// On the heap: the kernel may hold the poll a little longer than the device lives.
struct hold_timer {
    struct loop_watch watch;
    struct serial *serial; // NULL once the device is gone
};

struct serial {
    struct device dev;
    struct console *console;
    int (*irq_set)(struct vm *vm, unsigned gsi, unsigned level);
    struct log_limit limit;
    uint64_t dropped;

    uint8_t ier, fcr, lcr, mcr, scr;
    uint8_t overrun;      // LSR.OE
    uint8_t deltas;       // MSR bits 0-3
    uint8_t thre_pending; // the THRE interrupt, as IIR reports it
    uint16_t divisor;
    uint8_t rx[SERIAL_FIFO];
    uint32_t rx_len;
    uint8_t in[SERIAL_IN_MAX];
    uint32_t in_len;
    uint8_t out[SERIAL_OUT_MAX];
    uint32_t out_len;

    bool active; // the guest runs: the console may be read and written
    uint8_t polls;
    bool line;    // level of the interrupt line
    bool held;    // the line is still high although IIR was read; see irq_hold
    int timer_fd; // ends a hold
    bool timer_set;
    struct hold_timer *timer; // with timer_fd
};

static struct serial *serial_of(void *dev)
{
    return container_of((struct device *)dev, struct serial, dev);
}

// --- interrupts

static uint8_t rx_trigger(const struct serial *s)
{
    static const uint8_t level[4] = {1, 4, 8, 14};
    return s->fcr & FCR_ENABLE ? level[s->fcr >> 6] : 1;
}

// The most urgent pending cause, as IIR bits 0-3.
static uint8_t irq_cause(const struct serial *s)
{
    if (s->ier & IER_LINE && s->overrun)
        return IIR_LINE;
    // No time passes between bytes here: what stays below the trigger has timed out already.
    if (s->ier & IER_RX && s->rx_len)
        return s->rx_len >= rx_trigger(s) ? IIR_RX : IIR_TIMEOUT;
    if (s->ier & IER_THRE && s->thre_pending)
        return IIR_THRE;
    if (s->ier & IER_MODEM && s->deltas)
        return IIR_MODEM;
    return IIR_NONE;
}

static void line_set(struct serial *s, bool level)
{
    if (s->line != level) {
        s->line = level;
        s->irq_set(s->dev.vm, GSI_COM1, level);
    }
}

static void timer_arm(struct serial *s, long ns)
{
    if (s->timer_set == (ns != 0))
        return;
    s->timer_set = ns != 0;
    struct itimerspec when = {.it_value.tv_nsec = ns};
    timerfd_settime(s->timer_fd, 0, &when, NULL);
}

static void hold_end(struct serial *s)
{
    s->held = false;
    timer_arm(s, 0);
}

static void irq_update(struct serial *s)
{
    bool wanted = irq_cause(s) != IIR_NONE;
    if (s->held && !wanted)
        return;
    if (s->held) {
        hold_end(s);
        line_set(s, false); // the line is edge triggered: show a new edge
    }
    line_set(s, wanted);
}

// Transmission takes no time, so each byte a driver sends from its THRE handler makes THRE pending
// again at once. A new edge for it would be latched while the handler runs, and because drivers of
// an edge-triggered UART read IIR until it is empty, it would only cause an interrupt with nothing
// to do. So after IIR reported THRE the line stays up until IIR is read again; a driver that does
// not come back gets its edge after HOLD_NS.
static void irq_hold(struct serial *s)
{
    if (s->timer_fd >= 0 && s->line && irq_cause(s) == IIR_NONE)
        s->held = true;
    else
        irq_update(s);
}

static void hold_timeout(struct loop_watch *watch, uint32_t revents)
{
    struct serial *s = container_of(watch, struct hold_timer, watch)->serial;
    uint64_t ticks;
    if (read(s->timer_fd, &ticks, sizeof(ticks)) != sizeof(ticks))
        return; // taken back meanwhile
    pthread_mutex_lock(&s->dev.lock);
    s->timer_set = false;
    if (s->active)
        irq_update(s);
    pthread_mutex_unlock(&s->dev.lock);
}

// --- output

static bool thr_ready(const struct serial *s)
{
    return s->out_len < SERIAL_OUT_HIGH;
}

static void out_flush(struct serial *s)
{
    if (!s->out_len || !s->active)
        return;
    size_t n = s->console ? console_write(s->console, s->out, s->out_len) : s->out_len;
    if (!n)
        return;
    bool was_ready = thr_ready(s);
    s->out_len -= (uint32_t)n;
    memmove(s->out, s->out + n, s->out_len);
    if (!was_ready && thr_ready(s))
        s->thre_pending = 1;
}

static void out_byte(struct serial *s, uint8_t byte)
{
    if (s->out_len == SERIAL_OUT_MAX) {
        s->dropped++;
        log_limited(&s->dev.vm->log, &s->limit, LOG_WARN,
                    "serial: the console is blocked and the guest does not wait: "
                    "%llu bytes of output dropped so far",
                    (unsigned long long)s->dropped);
        return;
    }
    s->out[s->out_len++] = byte;
    out_flush(s);
}

// --- input

static bool rx_push(struct serial *s, uint8_t byte)
{
    if (s->rx_len == (s->fcr & FCR_ENABLE ? SERIAL_FIFO : 1))
        return false;
    s->rx[s->rx_len++] = byte;
    return true;
}

// Takes what the console has while there is room.
static void in_fill(struct serial *s)
{
    if (s->console && s->active && s->in_len < SERIAL_IN_MAX)
        s->in_len +=
            (uint32_t)console_read(s->console, s->in + s->in_len, SERIAL_IN_MAX - s->in_len);
}

// Moves input into an empty receive FIFO if the guest reads.
static void rx_fill(struct serial *s)
{
    bool reads = s->ier & IER_RX || s->polls >= POLLS_TO_READ;
    if (s->rx_len || !s->in_len || !reads || s->mcr & MCR_LOOP)
        return;
    uint32_t n = s->fcr & FCR_ENABLE ? SERIAL_FIFO : 1;
    if (n > s->in_len)
        n = s->in_len;
    memcpy(s->rx, s->in, n);
    s->rx_len = n;
    bool was_full = s->in_len == SERIAL_IN_MAX;
    s->in_len -= n;
    memmove(s->in, s->in + n, s->in_len);
    if (was_full)
        in_fill(s);
}

// Gives the FIFO's bytes back to `in`: clearing is meant for noise on a line, and there is none.
static void rx_clear(struct serial *s)
{
    if (s->mcr & MCR_LOOP || s->in_len + s->rx_len > SERIAL_IN_MAX) {
        s->rx_len = 0;
        return;
    }
    memmove(s->in + s->rx_len, s->in, s->in_len);
    memcpy(s->in, s->rx, s->rx_len);
    s->in_len += s->rx_len;
    s->rx_len = 0;
}

static uint8_t rx_pop(struct serial *s)
{
    uint8_t byte = s->rx[0];
    if (!s->rx_len)
        return 0;
    s->rx_len--;
    memmove(s->rx, s->rx + 1, s->rx_len);
    rx_fill(s);
    irq_update(s);
    return byte;
}

static void console_readable(void *arg)
{
    struct serial *s = arg;
    pthread_mutex_lock(&s->dev.lock);
    if (s->active) {
        in_fill(s);
        rx_fill(s);
        irq_update(s);
    }
    pthread_mutex_unlock(&s->dev.lock);
}

static void console_writable(void *arg)
{
    struct serial *s = arg;
    pthread_mutex_lock(&s->dev.lock);
    if (s->active) {
        out_flush(s);
        irq_update(s);
    }
    pthread_mutex_unlock(&s->dev.lock);
}

static const struct console_client console_client = {console_readable, console_writable};

// --- registers

static uint8_t modem_lines(const struct serial *s)
{
    if (!(s->mcr & MCR_LOOP))
        return MSR_DCD | MSR_DSR | MSR_CTS;
    return (s->mcr & MCR_RTS ? MSR_CTS : 0) | (s->mcr & MCR_DTR ? MSR_DSR : 0) |
           (s->mcr & MCR_OUT1 ? MSR_RI : 0) | (s->mcr & MCR_OUT2 ? MSR_DCD : 0);
}

static void mcr_write(struct serial *s, uint8_t value)
{
    uint8_t before = modem_lines(s);
    if ((s->mcr ^ value) & MCR_LOOP)
        rx_clear(s); // leaving or entering: what was received belongs to the other mode
    s->mcr = value & 0x1f;
    uint8_t changed = before ^ modem_lines(s);
    s->deltas |= (changed >> 4) & (MSR_DELTAS & ~MSR_TERI);
    if (changed & before & MSR_RI)
        s->deltas |= MSR_TERI; // RI counts only when it goes away
}

static void ier_write(struct serial *s, uint8_t value)
{
    // Enabling the interrupt while THR is empty causes it, again each time.
    if (~s->ier & value & IER_THRE && thr_ready(s))
        s->thre_pending = 1;
    s->ier = value & IER_MASK;
}

static void fcr_write(struct serial *s, uint8_t value)
{
    if ((s->fcr ^ value) & FCR_ENABLE || value & FCR_CLEAR_RX)
        rx_clear(s);
    // The other bits can only be programmed together with the enable bit.
    s->fcr = value & FCR_ENABLE ? value & FCR_KEPT : 0;
}

static void thr_write(struct serial *s, uint8_t value)
{
    if (s->mcr & MCR_LOOP) {
        if (!rx_push(s, value))
            s->overrun = 1;
    } else {
        out_byte(s, value);
    }
    s->thre_pending = thr_ready(s);
    if (s->held && irq_cause(s) == IIR_THRE)
        timer_arm(s, HOLD_NS);
    else
        irq_update(s);
}

static uint8_t iir_read(struct serial *s)
{
    uint8_t cause = irq_cause(s);
    uint8_t value = cause | (s->fcr & FCR_ENABLE ? IIR_FIFO : 0);
    if (s->held)
        hold_end(s); // the line stays up if there is a cause, as the driver sees it now
    if (cause == IIR_THRE) {
        s->thre_pending = 0;
        irq_hold(s);
    } else {
        irq_update(s);
    }
    return value;
}

static uint8_t lsr_read(struct serial *s)
{
    if (!s->rx_len && s->in_len && s->polls < POLLS_TO_READ)
        s->polls++;
    rx_fill(s);
    uint8_t value = (s->rx_len ? LSR_DR : 0) | (s->overrun ? LSR_OE : 0) |
                    (thr_ready(s) ? LSR_THRE | LSR_TEMT : 0);
    s->overrun = 0;
    irq_update(s);
    return value;
}

static uint8_t msr_read(struct serial *s)
{
    uint8_t value = modem_lines(s) | s->deltas;
    s->deltas = 0;
    irq_update(s);
    return value;
}

static uint8_t reg_read(struct serial *s, unsigned reg)
{
    if (reg != REG_LSR && reg != REG_DATA)
        s->polls = 0;
    bool dlab = s->lcr & LCR_DLAB;
    switch (reg) {
    case REG_DATA:
        return dlab ? (uint8_t)s->divisor : rx_pop(s);
    case REG_IER:
        return dlab ? (uint8_t)(s->divisor >> 8) : s->ier;
    case REG_IIR_FCR:
        return iir_read(s);
    case REG_LCR:
        return s->lcr;
    case REG_MCR:
        return s->mcr;
    case REG_LSR:
        return lsr_read(s);
    case REG_MSR:
        return msr_read(s);
    default:
        return s->scr;
    }
}

static void reg_write(struct serial *s, unsigned reg, uint8_t value)
{
    s->polls = 0;
    bool dlab = s->lcr & LCR_DLAB;
    if (reg == REG_DATA && !dlab) {
        thr_write(s, value);
        return;
    }
    switch (reg) {
    case REG_DATA:
        s->divisor = (uint16_t)((s->divisor & 0xff00) | value);
        return;
    case REG_IER:
        if (dlab)
            s->divisor = (uint16_t)((s->divisor & 0x00ff) | value << 8);
        else
            ier_write(s, value);
        break;
    case REG_IIR_FCR:
        fcr_write(s, value);
        break;
    case REG_LCR:
        s->lcr = value;
        return;
    case REG_MCR:
        mcr_write(s, value);
        break;
    case REG_SCR:
        s->scr = value;
        return;
    default: // LSR and MSR are read-only
        return;
    }
    rx_fill(s);
    irq_update(s);
}

// A VM that is going to load saved state must not take input before it has it, so a serial line
// starts inactive.
static void activate(struct serial *s)
{
    s->active = true;
    out_flush(s);
    in_fill(s);
    rx_fill(s);
    irq_update(s);
}

// Wide accesses are what an 8-bit ISA device makes of them: byte accesses to ports in a row.
static uint64_t serial_read(void *dev, uint64_t offset, unsigned size)
{
    struct serial *s = serial_of(dev);
    if (!s->active)
        activate(s);
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++)
        value |= (uint64_t)(offset + i < REG_COUNT ? reg_read(s, (unsigned)offset + i) : 0xff)
                 << 8 * i;
    return value;
}

static void serial_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct serial *s = serial_of(dev);
    if (!s->active)
        activate(s);
    for (unsigned i = 0; i < size && offset + i < REG_COUNT; i++)
        reg_write(s, (unsigned)offset + i, (uint8_t)(value >> 8 * i));
}

static const struct bus_ops serial_ops = {serial_read, serial_write};

// --- saved state

static int load_check(const struct serial *s, struct error *err)
{
    const struct {
        const char *name;
        uint32_t value, max;
    } limits[] = {
        {"ier", s->ier, IER_MASK},
        {"mcr", s->mcr, 0x1f},
        {"overrun", s->overrun, 1},
        {"deltas", s->deltas, MSR_DELTAS},
        {"thre_pending", s->thre_pending, 1},
        {"rx_len", s->rx_len, s->fcr & FCR_ENABLE ? SERIAL_FIFO : 1},
        {"in_len", s->in_len, SERIAL_IN_MAX},
        {"out_len", s->out_len, SERIAL_OUT_MAX},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(limits); i++)
        if (limits[i].value > limits[i].max)
            return error_set(err, -EINVAL, "serial: saved %s is 0x%x, at most 0x%x is possible",
                             limits[i].name, limits[i].value, limits[i].max);
    if (s->fcr & ~FCR_KEPT || (s->fcr && !(s->fcr & FCR_ENABLE)))
        return error_set(err, -EINVAL, "serial: saved fcr 0x%02x is not a value of FCR", s->fcr);
    return 0;
}

static int serial_load(void *object, uint16_t version, struct error *err)
{
    struct serial *s = object;
    int ret = load_check(s, err);
    if (ret) {
        // A device that stays behind after a failed load must still be safe to touch.
        s->rx_len = s->in_len = s->out_len = 0;
        s->fcr = 0;
        return ret;
    }
    // The interrupt controller came with its own state, but KVM does not save line levels. One edge
    // too many is harmless, one too few is not.
    pthread_mutex_lock(&s->dev.lock);
    if (s->held)
        hold_end(s);
    s->polls = 0;
    line_set(s, false);
    irq_update(s);
    pthread_mutex_unlock(&s->dev.lock);
    return 0;
}

static const struct state_field serial_fields[] = {
    STATE_FIELD_INT(struct serial, ier, 1),        STATE_FIELD_INT(struct serial, fcr, 1),
    STATE_FIELD_INT(struct serial, lcr, 1),        STATE_FIELD_INT(struct serial, mcr, 1),
    STATE_FIELD_INT(struct serial, scr, 1),        STATE_FIELD_INT(struct serial, overrun, 1),
    STATE_FIELD_INT(struct serial, deltas, 1),     STATE_FIELD_INT(struct serial, thre_pending, 1),
    STATE_FIELD_INT(struct serial, divisor, 1),    STATE_FIELD_VAR(struct serial, rx, rx_len, 1),
    STATE_FIELD_VAR(struct serial, in, in_len, 1), STATE_FIELD_VAR(struct serial, out, out_len, 1),
};

static const struct state_table serial_state = {
    .name = "serial",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(serial_fields),
    .fields = serial_fields,
    .load = serial_load,
};

// --- life

static void serial_reset(struct device *dev)
{
    struct serial *s = serial_of(dev);
    s->ier = s->fcr = s->lcr = s->mcr = s->scr = 0;
    s->overrun = s->deltas = s->thre_pending = s->polls = 0;
    s->divisor = 12; // 9600 baud; the data sheet leaves it undefined
    s->rx_len = 0;
    if (s->held)
        hold_end(s);
    line_set(s, false);
}

static int serial_quiesce(struct device *dev, struct error *err)
{
    struct serial *s = serial_of(dev);
    pthread_mutex_lock(&dev->lock);
    out_flush(s);
    in_fill(s); // what the console has read already belongs to the guest
    if (s->held)
        hold_end(s);
    irq_update(s);
    s->active = false;
    if (s->out_len)
        log_write(&dev->vm->log, LOG_DEBUG,
                  "serial: %u bytes the console did not take stay with the guest", s->out_len);
    pthread_mutex_unlock(&dev->lock);
    return 0;
}

static void serial_resume(struct device *dev)
{
    struct serial *s = serial_of(dev);
    pthread_mutex_lock(&dev->lock);
    activate(s);
    pthread_mutex_unlock(&dev->lock);
}

static int hold_init(struct serial *s, struct error *err)
{
    s->timer_fd = -1;
    if (!s->dev.vm->loop)
        return 0;
    s->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (s->timer_fd < 0)
        return error_errno(err, "serial: cannot create a timer");
    s->timer = calloc(1, sizeof(*s->timer));
    if (!s->timer)
        return error_set(err, -ENOMEM, "serial: no memory for a timer");
    s->timer->serial = s;
    return loop_watch(s->dev.vm->loop, &s->timer->watch, s->timer_fd, POLLIN, hold_timeout, err);
}

static void hold_closed(struct loop_watch *watch)
{
    free(container_of(watch, struct hold_timer, watch));
}

static void hold_destroy(struct serial *s)
{
    if (s->timer_fd < 0)
        return;
    if (s->timer && s->timer->watch.loop) {
        s->timer->serial = NULL;
        loop_unwatch(&s->timer->watch, hold_closed);
    } else {
        free(s->timer);
    }
    close(s->timer_fd);
    s->timer_fd = -1;
}

// A guest that ended while its console was slow: give the reader a last chance. Not after a pause:
// then the bytes belong to the saved or migrated guest.
static void serial_unrealize(struct device *dev)
{
    struct serial *s = serial_of(dev);
    if (s->console && s->active)
        console_drain(s->console, s->out, s->out_len);
    if (s->console)
        console_attach(s->console, NULL, NULL);
    hold_destroy(s);
}

static int serial_realize(struct device *dev, const void *config, struct error *err)
{
    struct serial *s = serial_of(dev);
    const struct serial_config *c = config;
    s->console = c ? c->console : NULL;
    s->irq_set = c && c->irq_set ? c->irq_set : vm_irq_set;
    int ret = hold_init(s, err);
    struct bus_range range = {PORT_COM1, REG_COUNT, "serial", &serial_ops, dev, &dev->lock};
    if (!ret)
        ret = bus_add(&dev->vm->pio, &range, err);
    if (ret) {
        hold_destroy(s);
        return ret;
    }
    serial_reset(dev);
    if (s->console)
        console_attach(s->console, &console_client, s);
    return 0;
}

const struct device_class serial_class = {
    .name = "serial",
    .size = sizeof(struct serial),
    .realize = serial_realize,
    .reset = serial_reset,
    .quiesce = serial_quiesce,
    .resume = serial_resume,
    .unrealize = serial_unrealize,
    .state = &serial_state,
};

uint64_t serial_dropped(struct device *dev)
{
    struct serial *s = serial_of(dev);
    pthread_mutex_lock(&dev->lock);
    uint64_t dropped = s->dropped;
    pthread_mutex_unlock(&dev->lock);
    return dropped;
}
