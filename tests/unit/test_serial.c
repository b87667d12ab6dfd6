// SPDX-License-Identifier: Apache-2.0
// COM1 as Linux's 8250 driver and hostile guests use it. No KVM: the accesses go through the bus,
// and the interrupt line is a variable.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "devices/console.h"
#include "devices/serial.h"
#include "tests/check_ok.h"
#include "vmm/layout.h"
#include "vmm/vm.h"

enum { DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR, FCR = IIR };

struct rig {
    struct vm vm; // first: irq_set finds the rig by it
    struct device *dev;
    struct console *console;
    struct loop *loop;
    int in, out; // our ends of the console's pipes
    unsigned level, edges;
};

static int irq_set(struct vm *vm, unsigned gsi, unsigned level)
{
    struct rig *rig = (struct rig *)vm;
    ck_assert_uint_eq(gsi, GSI_COM1);
    ck_assert_uint_ne(level, rig->level); // no call without a change
    rig->level = level;
    rig->edges += level;
    return 0;
}

static void vm_init(struct vm *vm)
{
    pthread_mutex_init(&vm->lock, NULL);
    pthread_cond_init(&vm->changed, NULL);
    vm->pio.name = "port";
    vm->log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
}

static void rig_free(struct rig *rig)
{
    rig->dev->class->unrealize(rig->dev);
    pthread_mutex_destroy(&rig->dev->lock);
    free(rig->dev);
    state_registry_free(&rig->vm.state);
    bus_free(&rig->vm.pio);
    loop_destroy(rig->loop);
    console_close(rig->console);
    if (rig->in >= 0)
        close(rig->in);
    if (rig->out >= 0)
        close(rig->out);
    free(rig);
}

static struct rig *rig_add_serial(struct rig *rig)
{
    struct error err = {0};
    vm_init(&rig->vm);
    struct serial_config config = {.console = rig->console, .irq_set = irq_set};
    ck_assert_msg(!device_add(&rig->vm, &serial_class, &config, &rig->dev, &err), "%s", err.text);
    return rig;
}

// Serial line without a console.
static struct rig *rig_bare(void)
{
    struct rig *rig = calloc(1, sizeof(*rig));
    rig->in = rig->out = -1;
    return rig_add_serial(rig);
}

// Serial line with a console on a socket pair. With `with_hold` the serial line has a loop too, and
// so holds its interrupt line (see irq_hold).
static struct rig *rig_console(bool with_hold)
{
    struct rig *rig = calloc(1, sizeof(*rig));
    struct error err = {0};
    int pair[2];
    ck_assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    ck_assert_msg(!loop_create(&rig->loop, &err), "%s", err.text);
    int small = 2048; // so that the console takes output in parts
    ck_assert(!setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)));
    struct console_config config = {.kind = CONSOLE_FD, .fd = pair[1]};
    ck_assert_msg(!console_open(&rig->console, &config, rig->loop, &err), "%s", err.text);
    rig->in = pair[0];
    rig->out = -1;
    rig->vm.loop = with_hold ? rig->loop : NULL;
    return rig_add_serial(rig);
}

static void out(struct rig *rig, unsigned reg, uint8_t value)
{
    HOLDS(bus_write(&rig->vm.pio, PORT_COM1 + reg, 1, value));
}

static uint8_t in(struct rig *rig, unsigned reg)
{
    uint64_t value;
    HOLDS(bus_read(&rig->vm.pio, PORT_COM1 + reg, 1, &value));
    HOLDS(value <= 0xff);
    return (uint8_t)value;
}

static void stop_loop(void *arg)
{
    loop_stop(arg);
}

// Lets the loop do all that is ready now.
static void turn(struct rig *rig)
{
    for (int i = 0; i < 4; i++) {
        struct loop_call call = {.fn = stop_loop, .arg = rig->loop};
        loop_call(rig->loop, &call);
        ck_assert(!loop_run(rig->loop, NULL));
    }
}

static void type(struct rig *rig, const char *text)
{
    ck_assert_int_eq(write(rig->in, text, strlen(text)), (ssize_t)strlen(text));
    turn(rig);
}

static void guest_puts(struct rig *rig, const char *text)
{
    for (; *text; text++)
        out(rig, DATA, (uint8_t)*text);
}

// The console may take its time: the loop runs until all is there, and no more.
static void expect_output(struct rig *rig, const char *text)
{
    char buf[256];
    size_t got = 0;
    while (got < strlen(text)) {
        ssize_t n = recv(rig->in, buf + got, sizeof(buf) - got, MSG_DONTWAIT);
        ck_assert(n > 0 || errno == EAGAIN);
        got += n > 0 ? (size_t)n : 0;
        turn(rig);
    }
    ck_assert_uint_eq(got, strlen(text));
    ck_assert_mem_eq(buf, text, got);
}

START_TEST(probe_like_linux)
{
    struct rig *rig = rig_bare();
    // Is IER there, four bits wide?
    out(rig, IER, 0);
    ck_assert_uint_eq(in(rig, IER), 0);
    out(rig, IER, 0xff);
    ck_assert_uint_eq(in(rig, IER), 0x0f);
    out(rig, IER, 0);
    // Loopback: RTS and OUT2 come back as CTS and DCD.
    out(rig, MCR, 0x1a);
    ck_assert_uint_eq(in(rig, MSR) & 0xf0, 0x90);
    out(rig, MCR, 0x15);
    ck_assert_uint_eq(in(rig, MSR) & 0xf0, 0x60);
    out(rig, MCR, 0);
    ck_assert_uint_eq(in(rig, MSR) & 0xf0, 0xb0);
    // FIFOs as a 16550A has them, and nothing newer.
    out(rig, FCR, 0x01);
    ck_assert_uint_eq(in(rig, IIR), 0xc1);
    out(rig, FCR, 0x21); // 16750's 64-byte FIFO
    ck_assert_uint_eq(in(rig, IIR), 0xc1);
    out(rig, FCR, 0x00);
    ck_assert_uint_eq(in(rig, IIR), 0x01);
    // Scratch, divisor latch apart from data and IER.
    out(rig, SCR, 0x5a);
    out(rig, LCR, 0x83);
    out(rig, DATA, 0x34);
    out(rig, IER, 0x12);
    ck_assert_uint_eq(in(rig, DATA), 0x34);
    ck_assert_uint_eq(in(rig, IER), 0x12);
    out(rig, LCR, 0x03);
    ck_assert_uint_eq(in(rig, IER), 0);
    ck_assert_uint_eq(in(rig, SCR), 0x5a);
    ck_assert_uint_eq(in(rig, LCR), 0x03);
    ck_assert_uint_eq(in(rig, LSR), 0x60);
    rig_free(rig);
}
END_TEST

START_TEST(thre_interrupt)
{
    struct rig *rig = rig_bare();
    // Linux's startup test: enabling it twice must show it twice.
    for (int i = 0; i < 2; i++) {
        out(rig, IER, 0x02);
        ck_assert_uint_eq(rig->level, 1);
        ck_assert_uint_eq(in(rig, IIR), 0x02);
        ck_assert_uint_eq(rig->level, 0);
        ck_assert_uint_eq(in(rig, IIR), 0x01);
        out(rig, IER, 0x00);
    }
    // Writing a byte empties THR again at once: a new edge.
    out(rig, IER, 0x02);
    in(rig, IIR);
    unsigned edges = rig->edges;
    out(rig, DATA, 'x');
    ck_assert_uint_eq(rig->edges, edges + 1);
    out(rig, DATA, 'y'); // still pending: no second edge
    ck_assert_uint_eq(rig->edges, edges + 1);
    out(rig, IER, 0x00);
    ck_assert_uint_eq(rig->level, 0);
    // Enabled without a change does not show it again.
    out(rig, IER, 0x02);
    in(rig, IIR);
    out(rig, IER, 0x02);
    ck_assert_uint_eq(in(rig, IIR), 0x01);
    rig_free(rig);
}
END_TEST

// A driver that reads IIR until it is empty gets one edge per burst.
START_TEST(thre_hold)
{
    struct rig *rig = rig_console(true);
    out(rig, FCR, 0x01);
    out(rig, IER, 0x02);
    ck_assert_uint_eq(rig->edges, 1);
    for (int burst = 0; burst < 3; burst++) {
        ck_assert_uint_eq(in(rig, IIR), 0xc2);
        guest_puts(rig, "0123456789abcdef");
    }
    ck_assert_uint_eq(in(rig, IIR), 0xc2);
    out(rig, IER, 0x00);
    ck_assert_uint_eq(rig->level, 1); // held until the driver looks again
    ck_assert_uint_eq(in(rig, IIR), 0xc1);
    ck_assert_uint_eq(rig->level, 0);
    ck_assert_uint_eq(rig->edges, 1);
    rig_free(rig);
}
END_TEST

// A driver that reads IIR once per interrupt gets its edge a little later.
START_TEST(thre_hold_timeout)
{
    struct rig *rig = rig_console(true);
    out(rig, IER, 0x02);
    ck_assert_uint_eq(in(rig, IIR), 0x02);
    out(rig, DATA, 'x');
    ck_assert_uint_eq(rig->edges, 1);
    while (rig->edges == 1)
        ck_assert(!loop_turn(rig->loop, true, NULL));
    ck_assert_uint_eq(rig->edges, 2);
    ck_assert_uint_eq(rig->level, 1);
    ck_assert_uint_eq(in(rig, IIR), 0x02);
    rig_free(rig);
}
END_TEST

// Input that arrives while the line is held needs an edge of its own.
START_TEST(input_during_hold)
{
    struct rig *rig = rig_console(true);
    out(rig, IER, 0x03);
    ck_assert_uint_eq(in(rig, IIR), 0x02);
    ck_assert_uint_eq(rig->edges, 1);
    type(rig, "k");
    ck_assert_uint_eq(rig->edges, 2);
    ck_assert_uint_eq(in(rig, IIR), 0x04);
    ck_assert_uint_eq(in(rig, DATA), 'k');
    ck_assert_uint_eq(rig->level, 0);
    rig_free(rig);
}
END_TEST

START_TEST(loopback_data)
{
    struct rig *rig = rig_console(false);
    out(rig, MCR, 0x10);
    out(rig, FCR, 0x01);
    for (int i = 0; i < 16; i++)
        out(rig, DATA, (uint8_t)i);
    ck_assert_uint_eq(in(rig, LSR), 0x61);
    out(rig, DATA, 99);
    ck_assert_uint_eq(in(rig, LSR), 0x63); // overrun, shown once
    ck_assert_uint_eq(in(rig, LSR), 0x61);
    for (int i = 0; i < 16; i++)
        ck_assert_uint_eq(in(rig, DATA), i);
    ck_assert_uint_eq(in(rig, LSR), 0x60);
    char c;
    ck_assert_int_eq(recv(rig->in, &c, 1, MSG_DONTWAIT), -1); // nothing left the chip
    // Overrun as an interrupt, ahead of received data.
    out(rig, FCR, 0x00);
    out(rig, IER, 0x05);
    out(rig, DATA, 1);
    out(rig, DATA, 2);
    ck_assert_uint_eq(in(rig, IIR), 0x06);
    in(rig, LSR);
    ck_assert_uint_eq(in(rig, IIR), 0x04);
    out(rig, MCR, 0x00);
    ck_assert_uint_eq(rig->level, 0);
    rig_free(rig);
}
END_TEST

START_TEST(modem_status_changes)
{
    struct rig *rig = rig_bare();
    in(rig, MSR);
    out(rig, MCR, 0x10); // DCD, DSR, CTS drop
    ck_assert_uint_eq(in(rig, MSR), 0x0b);
    ck_assert_uint_eq(in(rig, MSR), 0x00);
    out(rig, MCR, 0x14); // RI appears: not a trailing edge
    ck_assert_uint_eq(in(rig, MSR), 0x40);
    out(rig, IER, 0x08);
    ck_assert_uint_eq(rig->level, 0);
    out(rig, MCR, 0x10);
    ck_assert_uint_eq(rig->level, 1);
    ck_assert_uint_eq(in(rig, IIR), 0x00);
    ck_assert_uint_eq(in(rig, MSR), 0x04);
    ck_assert_uint_eq(rig->level, 0);
    rig_free(rig);
}
END_TEST

START_TEST(receive_by_interrupt)
{
    struct rig *rig = rig_console(false);
    out(rig, FCR, 0xc1); // trigger at 14
    out(rig, IER, 0x01);
    type(rig, "abc");
    ck_assert_uint_eq(rig->level, 1);
    ck_assert_uint_eq(in(rig, IIR), 0xcc); // below the trigger: time-out
    ck_assert_uint_eq(in(rig, LSR), 0x61);
    ck_assert_uint_eq(in(rig, DATA), 'a');
    ck_assert_uint_eq(in(rig, DATA), 'b');
    ck_assert_uint_eq(in(rig, DATA), 'c');
    ck_assert_uint_eq(rig->level, 0);
    ck_assert_uint_eq(in(rig, LSR), 0x60);
    type(rig, "0123456789abcdefGHIJ"); // more than the FIFO: refilled as it is emptied
    ck_assert_uint_eq(in(rig, IIR), 0xc4);
    char got[32];
    unsigned n = 0;
    while (in(rig, LSR) & 1)
        got[n++] = (char)in(rig, DATA);
    ck_assert_uint_eq(n, 20);
    ck_assert_mem_eq(got, "0123456789abcdefGHIJ", 20);
    ck_assert_uint_eq(in(rig, DATA), 0); // empty
    rig_free(rig);
}
END_TEST

// What is typed before the driver opens the port survives its clearing of the FIFO and its reads.
START_TEST(typed_ahead)
{
    struct rig *rig = rig_console(false);
    in(rig, LSR); // the guest runs
    type(rig, "hello");
    out(rig, FCR, 0x07);
    in(rig, LSR);
    in(rig, DATA);
    in(rig, IIR);
    in(rig, MSR);
    out(rig, FCR, 0x01);
    out(rig, IER, 0x01);
    ck_assert_uint_eq(rig->level, 1);
    out(rig, FCR, 0x07); // clears a FIFO that has the bytes already
    char got[8] = "";
    for (unsigned n = 0; in(rig, LSR) & 1; n++)
        got[n] = (char)in(rig, DATA);
    ck_assert_str_eq(got, "hello");
    rig_free(rig);
}
END_TEST

START_TEST(polled_receive)
{
    struct rig *rig = rig_console(false);
    in(rig, LSR);
    type(rig, "ok");
    char got[3] = "";
    for (unsigned n = 0; n < 2; n++) {
        for (int tries = 0; !(in(rig, LSR) & 1); tries++)
            ck_assert_int_lt(tries, 10);
        got[n] = (char)in(rig, DATA);
    }
    ck_assert_str_eq(got, "ok");
    ck_assert_uint_eq(rig->edges, 0);
    rig_free(rig);
}
END_TEST

// Input far beyond every buffer of ours waits on the host side; nothing is lost.
START_TEST(input_back_pressure)
{
    enum { TOTAL = 100000 };
    struct rig *rig = rig_console(false);
    ck_assert(!fcntl(rig->in, F_SETFL, O_NONBLOCK));
    out(rig, FCR, 0x01);
    unsigned sent = 0, got = 0;
    in(rig, LSR);
    while (got < TOTAL) {
        uint8_t c = (uint8_t)(sent * 7 + (sent >> 8));
        while (sent < TOTAL && write(rig->in, &c, 1) == 1) {
            sent++;
            c = (uint8_t)(sent * 7 + (sent >> 8));
        }
        out(rig, IER, 0x00); // throttled: the buffers fill up
        turn(rig);
        out(rig, IER, 0x01);
        while (in(rig, LSR) & 1) {
            HOLDS(in(rig, DATA) == (uint8_t)(got * 7 + (got >> 8)));
            got++;
        }
    }
    ck_assert_uint_eq(sent, TOTAL);
    rig_free(rig);
}
END_TEST

// All input is there before the guest reads: no later arrival wakes anything up.
START_TEST(input_waits)
{
    enum { TOTAL = 3 * (SERIAL_IN_MAX + CONSOLE_INPUT_MAX) };
    struct rig *rig = rig_console(false);
    static char text[TOTAL];
    for (unsigned i = 0; i < TOTAL; i++)
        text[i] = (char)(i * 7 + (i >> 8));
    in(rig, LSR);
    ck_assert(!write_all(rig->in, text, TOTAL));
    out(rig, FCR, 0x01);
    out(rig, IER, 0x01);
    for (unsigned got = 0; got < TOTAL; turn(rig))
        while (in(rig, LSR) & 1)
            HOLDS((char)in(rig, DATA) == text[got++]);
    rig_free(rig);
}
END_TEST

// A reader that does not read: THRE goes away, no call blocks, nothing is lost; it comes back with
// an interrupt when the reader reads.
START_TEST(output_back_pressure)
{
    struct rig *rig = rig_console(false);
    ck_assert(!fcntl(rig->in, F_SETFL, O_NONBLOCK));
    unsigned sent = 0, got = 0;
    out(rig, FCR, 0x01);
    while (in(rig, LSR) & 0x20)
        out(rig, DATA, (uint8_t)(sent++ * 13));
    ck_assert_uint_gt(sent, SERIAL_OUT_HIGH);
    out(rig, IER, 0x02);
    ck_assert_uint_eq(rig->level, 0);
    turn(rig);
    ck_assert_uint_eq(in(rig, LSR), 0x00);
    // A rude guest has the rest of the buffer, then loses bytes, counted.
    for (unsigned i = SERIAL_OUT_HIGH; i < SERIAL_OUT_MAX; i++)
        out(rig, DATA, (uint8_t)(sent++ * 13));
    ck_assert_uint_eq(serial_dropped(rig->dev), 0);
    out(rig, DATA, 0);
    out(rig, DATA, 0);
    ck_assert_uint_eq(serial_dropped(rig->dev), 2);
    while (got < sent) {
        uint8_t buf[4096];
        ssize_t n = read(rig->in, buf, sizeof(buf));
        for (ssize_t i = 0; i < n; i++)
            HOLDS(buf[i] == (uint8_t)(got++ * 13));
        turn(rig);
    }
    ck_assert_uint_eq(got, sent);
    ck_assert_uint_eq(rig->level, 1);
    ck_assert_uint_eq(in(rig, IIR), 0xc2);
    ck_assert_uint_eq(in(rig, LSR), 0x60);
    rig_free(rig);
}
END_TEST

static void save(struct rig *rig, struct stream_mem *mem)
{
    struct error err = {0};
    stream_mem_writer(mem, "test", STATE_BLOB_MAX);
    ck_assert_msg(!state_save(&rig->vm.state, &mem->stream, &err), "%s", err.text);
}

static int load(struct rig *rig, const void *data, size_t len, struct error *err)
{
    struct stream_mem mem;
    stream_mem_reader(&mem, "test", data, len);
    return state_load(&rig->vm.state, &mem.stream, err);
}

static void quiesce(struct rig *rig)
{
    struct error err = {0};
    ck_assert_msg(!serial_class.quiesce(rig->dev, &err), "%s", err.text);
}

// The whole life of a migration: each byte leaves exactly once and arrives exactly once.
START_TEST(state_moves_pending_bytes)
{
    struct rig *a = rig_console(true), *b = rig_console(true);
    struct stream_mem mem;
    struct error err = {0};
    ck_assert(!fcntl(a->in, F_SETFL, O_NONBLOCK));
    out(a, FCR, 0x81);
    out(a, LCR, 0x83);
    out(a, DATA, 1);
    out(a, LCR, 0x03);
    out(a, MCR, 0x0b);
    out(a, SCR, 0x77);
    type(a, "typed in, 24 bytes long.");
    out(a, IER, 0x01);
    ck_assert_uint_eq(in(a, DATA), 't');
    unsigned sent = 0;
    while (in(a, LSR) & 0x20)
        out(a, DATA, (uint8_t)(sent++ * 13));
    ck_assert_int_eq(write(a->in, "later", 5), 5); // the loop has not seen it
    quiesce(a);
    save(a, &mem);

    // What happens on the paused side changes nothing that was saved.
    struct stream_mem again;
    turn(a);
    save(a, &again);
    ck_assert_uint_eq(mem.len, again.len);
    ck_assert_mem_eq(mem.data, again.data, mem.len);

    // The receiving side gets input while it waits: it must not be lost either.
    type(b, "!");
    ck_assert_msg(!load(b, mem.data, mem.len, &err), "%s", err.text);
    ck_assert_uint_eq(b->level, 1);
    serial_class.resume(b->dev);
    ck_assert_uint_eq(in(b, SCR), 0x77);
    ck_assert_uint_eq(in(b, MCR), 0x0b);
    ck_assert_uint_eq(in(b, LCR), 0x03);
    ck_assert_uint_eq(in(b, IER), 0x01);
    char text[32] = "";
    for (unsigned n = 0; in(b, LSR) & 1; n++)
        text[n] = (char)in(b, DATA);
    ck_assert_str_eq(text, "yped in, 24 bytes long.!");

    unsigned got = 0;
    uint8_t buf[4096];
    ssize_t n;
    while ((n = read(a->in, buf, sizeof(buf))) > 0)
        for (ssize_t i = 0; i < n; i++)
            HOLDS(buf[i] == (uint8_t)(got++ * 13));
    turn(a); // the source's console has room now, but the bytes are the destination's
    ck_assert_int_eq(read(a->in, buf, sizeof(buf)), -1);
    while ((n = recv(b->in, buf, sizeof(buf), MSG_DONTWAIT)) > 0)
        for (ssize_t i = 0; i < n; i++)
            HOLDS(buf[i] == (uint8_t)(got++ * 13));
    ck_assert_uint_eq(got, sent);

    stream_mem_free(&mem);
    stream_mem_free(&again);
    rig_free(a);
    ck_assert_int_eq(b->vm.phase, VM_CREATED);
    rig_free(b);
}
END_TEST

// A pause without a move: everything goes on as if nothing had been.
START_TEST(pause_and_resume)
{
    struct rig *rig = rig_console(true);
    out(rig, FCR, 0x01);
    out(rig, IER, 0x01);
    guest_puts(rig, "before ");
    quiesce(rig);
    type(rig, "meanwhile");
    ck_assert_uint_eq(rig->level, 0);
    serial_class.resume(rig->dev);
    ck_assert_uint_eq(rig->level, 1);
    guest_puts(rig, "after");
    expect_output(rig, "before after");
    char text[16] = "";
    for (unsigned n = 0; in(rig, LSR) & 1; n++)
        text[n] = (char)in(rig, DATA);
    ck_assert_str_eq(text, "meanwhile");
    rig_free(rig);
}
END_TEST

// Section body: ier fcr lcr mcr scr overrun deltas thre_pending divisor(2) rx_len(4) ...
START_TEST(hostile_state)
{
    static const struct {
        unsigned offset;
        uint8_t value;
        const char *word;
    } bad[] = {
        {0, 0x10, "ier"},  {1, 0xff, "fcr"},    {1, 0xc0, "fcr"},       {3, 0x20, "mcr"},
        {5, 2, "overrun"}, {6, 0x10, "deltas"}, {7, 9, "thre_pending"},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct rig *rig = rig_bare();
        struct error err = {0};
        uint8_t body[22] = {0};
        body[bad[i].offset] = bad[i].value;
        // Straight into the fields: the blob's own checks are the registry's business.
        const struct state_table *table = serial_class.state;
        uint8_t *at = body;
        for (unsigned f = 0; f < table->nr_fields; f++) {
            const struct state_field *field = &table->fields[f];
            unsigned size = field->type == STATE_VAR ? 4 : field->size;
            unsigned to = field->type == STATE_VAR ? field->len_offset : field->offset;
            memcpy((char *)rig->dev + to, at, size);
            at += size;
        }
        ck_assert_int_eq(table->load(rig->dev, 1, &err), -EINVAL);
        ck_assert_msg(strstr(err.text, bad[i].word) != NULL, "'%s' lacks '%s'", err.text,
                      bad[i].word);
        rig_free(rig);
    }
    // More received bytes than the FIFO mode allows.
    struct rig *rig = rig_bare();
    struct stream_mem mem;
    struct error err = {0};
    out(rig, MCR, 0x10);
    out(rig, FCR, 0x01);
    out(rig, DATA, 1);
    out(rig, DATA, 2);
    save(rig, &mem);
    ck_assert(!load(rig, mem.data, mem.len, &err));
    ck_assert_uint_eq(in(rig, LSR) & 1, 1);
    for (size_t cut = 0; cut < mem.len; cut += 7)
        ck_assert_int_lt(load(rig, mem.data, cut, &err), 0);
    stream_mem_free(&mem);
    rig_free(rig);
}
END_TEST

// Any width at any offset is answered or refused, and later accesses still work.
START_TEST(hostile_accesses)
{
    struct rig *rig = rig_console(false);
    unsigned seed = 1;
    for (unsigned i = 0; i < 200000; i++) {
        seed = seed * 1103515245 + 12345;
        unsigned offset = seed >> 16 & 7, size = 1u << (seed >> 20 & 3);
        uint64_t value = (uint64_t)seed * 0x9e3779b97f4a7c15ull;
        bool fits = offset + size <= 8;
        if (seed >> 24 & 1)
            ck_assert_int_eq(bus_write(&rig->vm.pio, PORT_COM1 + offset, size, value), fits);
        else
            ck_assert_int_eq(bus_read(&rig->vm.pio, PORT_COM1 + offset, size, &value), fits);
        if (i % 1024 == 0) {
            char buf[8192];
            turn(rig);
            while (recv(rig->in, buf, sizeof(buf), MSG_DONTWAIT) > 0)
                continue;
        }
    }
    // Wide accesses are bytes in a row.
    uint64_t value;
    ck_assert(bus_write(&rig->vm.pio, PORT_COM1 + LCR, 1, 0x80));
    ck_assert(bus_write(&rig->vm.pio, PORT_COM1, 2, 0xabcd));
    ck_assert(bus_read(&rig->vm.pio, PORT_COM1, 2, &value));
    ck_assert_uint_eq(value, 0xabcd);
    out(rig, LCR, 0x03);
    out(rig, SCR, 0xa5);
    ck_assert(bus_read(&rig->vm.pio, PORT_COM1, 8, &value));
    ck_assert_uint_eq(value >> 56, 0xa5);
    rig_free(rig);
}
END_TEST

// --- threads: a vCPU that echoes, the loop, and a host that pauses and saves again and again

enum { ECHO_TOTAL = 20000, ECHO_BATCH = 64 };

struct echo {
    struct rig *rig;
    pthread_mutex_t running; // held by the vCPU between its looks at `pause`
    atomic_bool quit;
    atomic_uint pauses;
};

static void *echo_vcpu(void *arg)
{
    struct echo *e = arg;
    pthread_mutex_lock(&e->running);
    out(e->rig, FCR, 0x01);
    out(e->rig, IER, 0x01);
    pthread_mutex_unlock(&e->running);
    while (!atomic_load(&e->quit)) {
        pthread_mutex_lock(&e->running);
        for (unsigned i = 0; i < ECHO_BATCH; i++)
            if ((in(e->rig, LSR) & 0x21) == 0x21)
                out(e->rig, DATA, in(e->rig, DATA));
        pthread_mutex_unlock(&e->running);
        sched_yield();
    }
    return NULL;
}

static void *echo_pauser(void *arg)
{
    struct echo *e = arg;
    while (!atomic_load(&e->quit)) {
        struct stream_mem mem;
        struct error err = {0};
        pthread_mutex_lock(&e->running);
        quiesce(e->rig);
        save(e->rig, &mem);
        // Loading what was saved changes nothing: no byte more, no byte less.
        ck_assert_msg(!load(e->rig, mem.data, mem.len, &err), "%s", err.text);
        serial_class.resume(e->rig->dev);
        pthread_mutex_unlock(&e->running);
        stream_mem_free(&mem);
        atomic_fetch_add(&e->pauses, 1);
        sched_yield();
    }
    return NULL;
}

static void *loop_main(void *arg)
{
    ck_assert(!loop_run(arg, NULL));
    return NULL;
}

static int irq_ignore(struct vm *vm, unsigned gsi, unsigned level)
{
    return 0;
}

static void *echo_typist(void *arg)
{
    const struct rig *rig = arg;
    for (uint32_t i = 0; i < ECHO_TOTAL; i++) {
        uint8_t c = (uint8_t)(i * 31 + (i >> 8));
        ck_assert_int_eq(write(rig->in, &c, 1), 1);
    }
    return NULL;
}

START_TEST(threads)
{
    struct rig *rig = calloc(1, sizeof(*rig));
    struct error err = {0};
    int pair[2];
    ck_assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    ck_assert(!loop_create(&rig->loop, &err));
    struct console_config config = {.kind = CONSOLE_FD, .fd = pair[1]};
    ck_assert_msg(!console_open(&rig->console, &config, rig->loop, &err), "%s", err.text);
    rig->in = pair[0];
    rig->out = -1;
    rig->vm.loop = rig->loop;
    vm_init(&rig->vm);
    struct serial_config serial = {.console = rig->console, .irq_set = irq_ignore};
    ck_assert(!device_add(&rig->vm, &serial_class, &serial, &rig->dev, &err));

    struct echo e = {.rig = rig, .running = PTHREAD_MUTEX_INITIALIZER};
    pthread_t looper, vcpu, pauser, typist;
    ck_assert(!pthread_create(&looper, NULL, loop_main, rig->loop));
    ck_assert(!pthread_create(&vcpu, NULL, echo_vcpu, &e));
    ck_assert(!pthread_create(&pauser, NULL, echo_pauser, &e));
    ck_assert(!pthread_create(&typist, NULL, echo_typist, rig));
    for (uint32_t i = 0; i < ECHO_TOTAL; i++) {
        uint8_t c;
        HOLDS(!read_all(rig->in, &c, 1));
        HOLDS(c == (uint8_t)(i * 31 + (i >> 8)));
    }
    atomic_store(&e.quit, true);
    pthread_join(typist, NULL);
    pthread_join(vcpu, NULL);
    pthread_join(pauser, NULL);
    loop_stop(rig->loop);
    pthread_join(looper, NULL);
    ck_assert_uint_gt(atomic_load(&e.pauses), 10);
    rig_free(rig);
}
END_TEST

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    Suite *suite = suite_create("serial");
    TCase *tc = tcase_create("serial");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, probe_like_linux);
    tcase_add_test(tc, thre_interrupt);
    tcase_add_test(tc, thre_hold);
    tcase_add_test(tc, thre_hold_timeout);
    tcase_add_test(tc, input_during_hold);
    tcase_add_test(tc, loopback_data);
    tcase_add_test(tc, modem_status_changes);
    tcase_add_test(tc, receive_by_interrupt);
    tcase_add_test(tc, typed_ahead);
    tcase_add_test(tc, polled_receive);
    tcase_add_test(tc, input_back_pressure);
    tcase_add_test(tc, input_waits);
    tcase_add_test(tc, output_back_pressure);
    tcase_add_test(tc, state_moves_pending_bytes);
    tcase_add_test(tc, pause_and_resume);
    tcase_add_test(tc, hostile_state);
    tcase_add_test(tc, hostile_accesses);
    tcase_add_test(tc, threads);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
