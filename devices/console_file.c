// SPDX-License-Identifier: Apache-2.0
// Host sides that are there from the start: standard streams, files, open file descriptors.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "devices/console_internal.h"
#include "devices/terminal.h"
#include "vmm/util.h"

// A standard stream may be shared with the shell and other processes, and O_NONBLOCK would hit them
// too: open it anew where that gives the same object. *own is what to use.
static enum fd_way std_fd(int fd, int flags, int *own)
{
    struct stat st;
    *own = -1;
    if (fstat(fd, &st))
        return FD_PLAIN; // closed: nothing to read, nowhere to write
    if (S_ISFIFO(st.st_mode) || S_ISCHR(st.st_mode)) {
        char path[32];
        int number;
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        if (ioctl(fd, TIOCGPTN, &number)) // reopening a pty master would make another pty
            *own = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
        if (*own >= 0)
            return FD_PLAIN;
    }
    *own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return S_ISSOCK(st.st_mode) ? FD_SOCKET : S_ISREG(st.st_mode) ? FD_PLAIN : FD_POLL;
}

int console_stdio_open(struct console *c, struct error *err)
{
    int in, out, ret = 0;
    enum fd_way in_way = std_fd(STDIN_FILENO, O_RDONLY, &in);
    enum fd_way out_way = std_fd(STDOUT_FILENO, O_WRONLY, &out);
    if (!console_channel_new(c, in, in_way, out, out_way)) {
        cleanup_close(&in);
        cleanup_close(&out);
        return error_set(err, -ENOMEM, "console stdio: no memory");
    }
    if (in >= 0 && isatty(in)) {
        ret = terminal_raw(in, &c->terminal, err);
        c->escape.key = c->config.escape;
    }
    return ret ? error_prefix(err, "console stdio") : 0;
}

int console_file_open(struct console *c, struct error *err)
{
    memcpy(c->path, c->config.path, sizeof(c->path));
    // O_NONBLOCK matters when the path is a FIFO or a terminal.
    autoclose int fd = open(c->path,
                            O_WRONLY | O_CREAT | O_APPEND | O_NOCTTY | O_CLOEXEC | O_NONBLOCK |
                                (c->config.append ? 0 : O_TRUNC),
                            0644);
    if (fd < 0)
        return error_errno(err, "console file:%s", c->path);
    if (!console_channel_new(c, -1, FD_PLAIN, fd, FD_PLAIN))
        return error_set(err, -ENOMEM, "console file:%s: no memory", c->path);
    take_fd(&fd);
    return 0;
}

int console_fd_open(struct console *c, struct error *err)
{
    int fd = c->config.fd;
    struct stat st;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fstat(fd, &st))
        return error_errno(err, "console fd:%d", fd);
    snprintf(c->path, sizeof(c->path), "fd:%d", fd);
    bool socket = S_ISSOCK(st.st_mode);
    if (!socket && fcntl(fd, F_SETFL, flags | O_NONBLOCK))
        return error_errno(err, "console fd:%d: O_NONBLOCK", fd);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC))
        return error_errno(err, "console fd:%d: FD_CLOEXEC", fd);
    enum fd_way way = socket ? FD_SOCKET : FD_PLAIN;
    int mode = flags & O_ACCMODE;
    int in = mode == O_WRONLY ? -1 : fd, out = mode == O_RDONLY ? -1 : fd;
    if (!console_channel_new(c, in, way, out, way))
        return error_set(err, -ENOMEM, "console fd:%d: no memory", fd);
    return 0;
}
