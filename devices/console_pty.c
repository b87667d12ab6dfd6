// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>

#include "devices/console_internal.h"
#include "vmm/util.h"

enum { PTY_CHECK_NS = 100000000 }; // how often a pty without a reader is looked at
enum { PTY_SIZE_NS = 1000000000 }; // how often the size of one with a reader is

bool console_pty_hung_up(const struct channel *ch)
{
    struct pollfd p = {ch->in_fd, POLLIN, 0};
    return poll(&p, 1, 0) < 0 || p.revents & POLLHUP;
}

void console_pty_closed(struct console *c)
{
    struct channel *ch = c->channel;
    pthread_mutex_lock(&c->lock);
    bool before = c->detached;
    c->detached = true;
    c->blocked = c->stopped = false;
    pthread_mutex_unlock(&c->lock);
    if (before)
        return;
    console_input_unwatch(ch);
    loop_timer_set(&c->timer, PTY_CHECK_NS, PTY_CHECK_NS);
    console_tell_opened(c);
    console_tell_writable(c);
}

static void size_check(struct console *c)
{
    uint16_t columns, rows;
    if (!console_size(c, &columns, &rows) || (columns == c->size[0] && rows == c->size[1]))
        return;
    c->size[0] = columns;
    c->size[1] = rows;
    console_tell_resized(c);
}

static void pty_check(struct loop_timer *timer)
{
    struct console *c = container_of(timer, struct console, timer);
    struct channel *ch = c->channel;
    if (!c->detached)
        size_check(c);
    if (!c->detached || ch->in_on || console_pty_hung_up(ch))
        return;
    loop_timer_set(timer, 0, 0);
    if (c->config.sized) // nobody is told when the other side of a pty is resized
        loop_timer_set(timer, PTY_SIZE_NS, PTY_SIZE_NS);
    pthread_mutex_lock(&c->lock);
    c->detached = false;
    console_backlog_flush(c);
    if (c->want_out)
        console_call_loop(c);
    pthread_mutex_unlock(&c->lock);
    console_tell_opened(c);
    size_check(c);
    console_input_fill(ch);
}

static int pty_pair(struct console *c, int *master, struct error *err)
{
    *master = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (*master < 0)
        return error_errno(err, "console pty: /dev/ptmx");
    if (grantpt(*master) || unlockpt(*master) || ptsname_r(*master, c->path, sizeof(c->path)))
        return error_errno(err, "console pty: no terminal for it");
    // Opened and closed once, the other side reports whether somebody has it open.
    autoclose int slave = open(c->path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    struct termios t;
    if (slave < 0 || tcgetattr(slave, &t))
        return error_errno(err, "console pty: %s", c->path);
    cfmakeraw(&t);
    if (tcsetattr(slave, TCSANOW, &t))
        return error_errno(err, "console pty: %s: cannot set raw mode", c->path);
    return 0;
}

// Replaces a link an earlier run left, but nothing else.
static int pty_link(struct console *c, struct error *err)
{
    const char *link = c->config.path;
    struct stat st;
    if (!link[0])
        return 0;
    if (!lstat(link, &st) && S_ISLNK(st.st_mode))
        unlink(link);
    if (symlink(c->path, link))
        return error_errno(err, "console pty: link %s", link);
    c->made_path = true;
    return 0;
}

int console_pty_open(struct console *c, struct error *err)
{
    autoclose int master = -1;
    int ret = pty_pair(c, &master, err);
    if (!ret)
        ret = pty_link(c, err);
    if (!ret)
        ret = loop_timer_init(c->loop, &c->timer, pty_check, err);
    if (ret)
        return ret;
    c->timer_made = true;
    c->in_loop++;
    if (!console_channel_new(c, master, FD_PLAIN, master, FD_PLAIN))
        return error_set(err, -ENOMEM, "console pty: no memory");
    take_fd(&master);
    console_pty_closed(c);
    log_write(&c->log, LOG_INFO, "console: %s%s%s", c->path, c->made_path ? " = " : "",
              c->made_path ? c->config.path : "");
    return 0;
}
