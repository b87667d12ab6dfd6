// SPDX-License-Identifier: Apache-2.0
// Echoes COM1 by interrupt (IRQ 4). After each newline it sends "count=<bytes so far>\n"; byte 0x04
// (Ctrl-D) ends.
#include "../rt.h"

#define COM1        0x3f8
#define IER         1
#define FCR         2
#define LCR         3
#define MCR         4
#define LSR         5
#define LSR_READY   0x01
#define LSR_THRE    0x20
#define VECTOR_COM1 0x60
#define END_OF_TEXT 0x04

static volatile bool ended;
static uint64_t bytes;

static void serial_send(char c)
{
    while (!(inb(COM1 + LSR) & LSR_THRE))
        pause();
    outb(COM1, (uint8_t)c);
}

static void serial_count(uint64_t value)
{
    char digits[20];
    int n = 0;
    for (const char *s = "count="; *s; s++)
        serial_send(*s);
    do
        digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n)
        serial_send(digits[--n]);
    serial_send('\n');
}

static void on_com1(struct trap_frame *frame)
{
    (void)frame;
    while (inb(COM1 + LSR) & LSR_READY) {
        char c = (char)inb(COM1);
        if (c == END_OF_TEXT) {
            ended = true;
            return;
        }
        bytes++;
        serial_send(c);
        if (c == '\n')
            serial_count(bytes);
    }
}

void guest_main(void)
{
    irq_init();
    trap_handler_set(VECTOR_COM1, on_com1);
    ioapic_route(4, VECTOR_COM1, cpu_self()->apic_id);
    outb(COM1 + LCR, 0x03); // 8n1
    outb(COM1 + FCR, 0x01);
    outb(COM1 + MCR, 0x0b); // DTR, RTS, OUT2: interrupt line on
    outb(COM1 + IER, 0x01); // received data
    GUEST_SYNC(1);
    while (!ended)
        irq_wait();
    guest_value(UCALL_V_SERIAL_BYTES, bytes, 0);
}
