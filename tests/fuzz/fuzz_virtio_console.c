// SPDX-License-Identifier: Apache-2.0
// The console and two named ports: two host sides that are always there, one that comes and goes.
#include "devices/virtio_console.h"

#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/fuzz/fuzz_virtio.h"

static struct { // of the fuzzer's process
    int pair[2], client;
    char path[64];
} hosts[2] = {{.client = -1}, {.client = -1}}; // of each transport's device

static void leave(void)
{
    for (unsigned i = 0; i < 2; i++)
        unlink(hosts[i].path);
}

static void *config(void)
{
    int console[2], port[2];
    char text[160];
    struct virtio_console_config *c = calloc(1, sizeof(*c));
    const int type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
    if (!c || socketpair(AF_UNIX, type, 0, console) || socketpair(AF_UNIX, type, 0, port))
        abort();
    hosts[fuzz_transport].pair[0] = console[0];
    hosts[fuzz_transport].pair[1] = port[0];
    snprintf(hosts[fuzz_transport].path, sizeof(hosts[fuzz_transport].path),
             "/tmp/ferry-fuzz-vconsole-%d-%u", (int)getpid(), fuzz_transport);
    snprintf(text, sizeof(text), "console=fd:%d,port=a=fd:%d,port=b=unix:%s", console[1], port[1],
             hosts[fuzz_transport].path);
    if (virtio_console_parse(text, c, NULL))
        abort();
    atexit(leave);
    return c;
}

static void drain(int fd)
{
    char data[4096];
    while (recv(fd, data, sizeof(data), MSG_DONTWAIT) > 0)
        continue;
}

static void client_come(void)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", hosts[fuzz_transport].path);
    hosts[fuzz_transport].client = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (hosts[fuzz_transport].client >= 0 &&
        connect(hosts[fuzz_transport].client, (struct sockaddr *)&addr, sizeof(addr))) {
        close(hosts[fuzz_transport].client); // the backlog is full
        hosts[fuzz_transport].client = -1;
    }
}

// u8 what: 0 and 1 send to the console and to a, 2 comes to b or sends to it, 3 leaves b, others
// read what is there.
static void outside(const uint8_t *data, size_t size)
{
    if (!size)
        return;
    int fd = *data < 2 ? hosts[fuzz_transport].pair[*data] : hosts[fuzz_transport].client;
    if (*data == 2 && fd < 0) {
        client_come();
    } else if (*data < 3) {
        if (send(fd, data + 1, size - 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            drain(fd);
    } else if (*data == 3 && fd >= 0) {
        close(fd);
        hosts[fuzz_transport].client = -1;
    } else {
        drain(hosts[fuzz_transport].pair[0]);
        drain(hosts[fuzz_transport].pair[1]);
        if (fd >= 0)
            drain(fd);
    }
}

FUZZ_VIRTIO(&virtio_console_class, config, outside)
