// SPDX-License-Identifier: Apache-2.0
// Packets of a guest with cid 3, and host programs on both kinds of Unix socket: on PATH, and
// listening on PATH_80.
#include "devices/virtio_vsock.h"

#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/fuzz/fuzz_virtio.h"

enum { PROGRAMS = 4, PORT = 80 };

static struct {
    char path[64], port_path[80];
    int listener, programs[PROGRAMS];
} hosts[2]; // of each transport's device

static void leave(void)
{
    for (unsigned i = 0; i < 2; i++) {
        unlink(hosts[i].path);
        unlink(hosts[i].port_path);
    }
}

static int socket_at(const char *path, struct sockaddr_un *addr)
{
    *addr = (struct sockaddr_un) {.sun_family = AF_UNIX};
    snprintf(addr->sun_path, sizeof(addr->sun_path), "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        abort();
    return fd;
}

static void *config(void)
{
    struct virtio_vsock_config *c = calloc(1, sizeof(*c));
    struct sockaddr_un addr;
    unsigned t = fuzz_transport;
    if (!c)
        abort();
    c->cid = 3;
    snprintf(c->path, sizeof(c->path), "/tmp/ferry-fuzz-vsock-%d-%u", (int)getpid(), t);
    snprintf(hosts[t].path, sizeof(hosts[t].path), "%s", c->path);
    snprintf(hosts[t].port_path, sizeof(hosts[t].port_path), "%s_%d", hosts[t].path, PORT);
    hosts[t].listener = socket_at(hosts[t].port_path, &addr);
    unlink(hosts[t].port_path);
    if (bind(hosts[t].listener, (struct sockaddr *)&addr, sizeof(addr)) ||
        listen(hosts[t].listener, PROGRAMS))
        abort();
    for (unsigned i = 0; i < PROGRAMS; i++)
        hosts[t].programs[i] = -1;
    atexit(leave);
    return c;
}

static void program_set(int *program, int fd)
{
    if (*program >= 0)
        close(*program);
    *program = fd;
}

static void say(int fd, const void *data, size_t size)
{
    if (send(fd, data, size, MSG_NOSIGNAL) < 0)
        return; // full, or the device has ended it
}

// The first byte chooses the program, and what it does.
static void outside(const uint8_t *data, size_t size)
{
    static uint8_t much[64 * 1024];
    struct sockaddr_un addr;
    if (!size)
        return;
    int *program = &hosts[fuzz_transport].programs[data[0] % PROGRAMS];
    switch (data[0] / PROGRAMS % 8) {
    case 0: // connects, and says what follows
        program_set(program, socket_at(hosts[fuzz_transport].path, &addr));
        if (!connect(*program, (struct sockaddr *)&addr, sizeof(addr)))
            say(*program, data + 1, size - 1);
        break;
    case 1:
        program_set(program, accept4(hosts[fuzz_transport].listener, NULL, NULL,
                                     SOCK_NONBLOCK | SOCK_CLOEXEC));
        break;
    case 2:
        say(*program, data + 1, size - 1);
        break;
    case 3:
        say(*program, much, sizeof(much));
        break;
    case 4:
        while (recv(*program, much, sizeof(much), 0) > 0)
            ;
        break;
    case 5:
        shutdown(*program, SHUT_WR);
        break;
    case 6:
        shutdown(*program, SHUT_RD);
        break;
    default:
        program_set(program, -1);
    }
}

FUZZ_VIRTIO(&virtio_vsock_class, config, outside)
