// SPDX-License-Identifier: Apache-2.0
// The console device (virtio 1.2, 5.3): up to VCONSOLE_PORTS_MAX ports, each joined to a host side
// of devices/console.h. Port 0 is the guest's console (Linux: hvc0), the others have names (Linux:
// /dev/vport0p1 ..., by name in /sys/class/virtio-ports).
//
// To the host. A chain stays with its port until the host side has taken all its bytes; nothing is
// copied aside. A named port is strict: while nobody listens the guest is told so (PORT_OPEN) and
// its bytes wait in the ring. The console is not, since a kernel that prints waits for its bytes to
// be taken, with its interrupts off: while nobody listens the newest CONSOLE_BACKLOG bytes are
// kept, and a reader that takes nothing for VCONSOLE_PATIENCE_MS counts as absent.
//
// To the guest. Input stays at the host side until the guest has opened the port and offers
// buffers; the console reads CONSOLE_INPUT_MAX bytes ahead. When the host side closes, the guest is
// told after it has taken what came before.
//
// Saved state holds what the console had read ahead, and how much of the chain that is being sent
// the host side has: each byte arrives once. While the VM is paused nothing more is read. A
// destination must have the same ports under the same names; where they lead is its own affair.
//
// What a hostile driver sends as control messages only sets bits; the answers are made from those
// when it offers buffers, so it cannot make us keep anything.
#pragma once

#include "devices/console.h"
#include "devices/virtio.h"

enum {
    VCONSOLE_PORTS_MAX = (VIRTIO_QUEUES_MAX - 2) / 2,
    VCONSOLE_NAME_MAX = 64, // bytes of a port's name
    VCONSOLE_PATIENCE_MS = 1000,
};

struct virtio_console_port {
    bool present; // ports[0] may be missing: no console
    char name[VCONSOLE_NAME_MAX + 1];
    struct console_config where;
};

struct virtio_console_config {
    struct virtio_attach attach; // first
    unsigned nr_ports;           // ports[0] included, present or not: 1 to VCONSOLE_PORTS_MAX
    struct virtio_console_port ports[VCONSOLE_PORTS_MAX];
};

// "[console=]WHERE[,port=NAME=WHERE]...[,packed]", WHERE as console_parse takes it. A comma only
// ends a WHERE when "console=", "port=" or "packed" follows.
int virtio_console_parse(const char *text, struct virtio_console_config *config, struct error *err);

extern const struct device_class virtio_console_class; // its config: struct virtio_console_config
