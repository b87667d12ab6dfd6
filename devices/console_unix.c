// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "devices/console_internal.h"
#include "vmm/listen.h"
#include "vmm/util.h"

static void accept_event(struct loop_watch *watch, uint32_t revents)
{
    struct console *c = container_of(watch, struct console, accept);
    static const char busy[] = "ferry: this console has a client already\r\n";
    int fd;
    while ((fd = accept4(c->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
        if (c->channel) {
            send(fd, busy, sizeof(busy) - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
            close(fd);
            continue;
        }
        struct channel *ch = console_channel_new(c, fd, FD_SOCKET, fd, FD_SOCKET);
        if (!ch) {
            close(fd);
            continue;
        }
        pthread_mutex_lock(&c->lock);
        console_backlog_flush(c);
        if (c->want_out || c->hung_up)
            console_call_loop(c);
        pthread_mutex_unlock(&c->lock);
        console_tell_opened(c);
        console_input_fill(ch);
    }
}

// A socket nobody listens on is the remains of a process that was killed.
static bool socket_is_stale(const struct sockaddr_un *addr)
{
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return fd >= 0 && connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) &&
           errno == ECONNREFUSED;
}

int console_unix_open(struct console *c, struct error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    size_t len = strlen(c->config.path);
    if (len >= sizeof(addr.sun_path))
        return error_set(err, -ENAMETOOLONG, "console unix:%s: %zu bytes, at most %zu",
                         c->config.path, len, sizeof(addr.sun_path) - 1);
    memcpy(addr.sun_path, c->config.path, len + 1);
    memcpy(c->path, c->config.path, len + 1);
    c->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->listen_fd < 0)
        return error_errno(err, "console unix:%s: socket", c->path);
    // Whoever may connect is the guest's console user. Linux takes a socket file's mode from here.
    if (fchmod(c->listen_fd, 0600))
        return error_errno(err, "console unix:%s: mode 0600", c->path);
    if (socket_is_stale(&addr))
        unlink(c->path);
    if (listen_unix(c->listen_fd, &addr, 4))
        return error_errno(err, "console unix:%s", c->path);
    c->made_path = true;
    int ret = loop_watch(c->loop, &c->accept, c->listen_fd, POLLIN, accept_event, err);
    c->in_loop += !ret;
    return ret;
}
