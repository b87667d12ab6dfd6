// SPDX-License-Identifier: Apache-2.0
//
// Threads: vCPUs write and read under c->lock; the loop's thread owns watches, connections and the
// reading of host fds. Lock order: device lock, then c->lock; clients are called without c->lock.
#include "devices/console.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#include "devices/terminal.h"
#include "vmm/log.h"
#include "vmm/util.h"

enum { PTY_CHECK_NS = 100000000 }; // how often a pty without a reader is looked at

// How to keep a call on an fd from waiting.
enum fd_way {
    FD_PLAIN,  // never waits: regular file, or O_NONBLOCK is set
    FD_SOCKET, // MSG_DONTWAIT
    FD_POLL,   // shared with others and not to be changed: ask first, write single bytes
};

// One conversation: for the console's life, or with one client of the socket.
struct channel {
    struct console *console;
    struct channel *next;
    int in_fd, out_fd; // -1 = none; may be equal
    enum fd_way in_way, out_way;
    struct loop_watch in, out;
    bool in_on, out_on; // watched, or not yet released by the loop
    bool ended;
};

struct backlog { // ring of the newest bytes
    uint8_t *data;
    size_t start, len;
    uint64_t dropped; // since it was last empty
};

struct console {
    struct console_config config;
    struct loop *loop;
    struct log log;
    char path[CONSOLE_PATH_MAX];
    struct terminal *terminal;
    int listen_fd;
    struct loop_watch accept;
    struct loop_timer timer; // PTY: looks for a reader
    bool timer_made, made_path;

    void (*on_command)(void *arg, enum console_command command);
    void *command_arg;

    pthread_mutex_t lock; // guards what follows
    const struct console_client *client;
    void *client_arg;
    struct channel *channel;  // NULL: nobody there
    struct channel *channels; // all that are not freed yet
    bool detached;            // pty whose other side is closed
    bool broken;
    bool blocked;  // the host side was full; POLLOUT will tell
    bool stalled;  // `in` was full when the host side had more
    bool want_out; // loop thread: watch for POLLOUT
    bool hung_up;  // loop thread: the channel's peer is gone
    bool called;   // `call` is queued
    struct loop_call call;
    struct backlog backlog;
    uint64_t lost;
    uint8_t in[CONSOLE_INPUT_MAX];
    size_t in_len;
    struct console_escape escape;
};

// --- fds that never wait

static bool ready_now(int fd, short events)
{
    struct pollfd p = {fd, events, 0};
    return poll(&p, 1, 0) == 1;
}

// As write: bytes, or -errno with -EAGAIN when full.
static ssize_t way_write(int fd, enum fd_way way, const void *data, size_t len)
{
    ssize_t n;
    if (way == FD_POLL) {
        if (!ready_now(fd, POLLOUT))
            return -EAGAIN;
        len = 1;
    }
    do
        n = way == FD_SOCKET ? send(fd, data, len, MSG_DONTWAIT | MSG_NOSIGNAL)
                             : write(fd, data, len);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static ssize_t way_read(int fd, enum fd_way way, void *data, size_t len)
{
    ssize_t n;
    if (way == FD_POLL && !ready_now(fd, POLLIN))
        return -EAGAIN;
    do
        n = way == FD_SOCKET ? recv(fd, data, len, MSG_DONTWAIT) : read(fd, data, len);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

// --- backlog

static void backlog_push(struct console *c, const uint8_t *data, size_t len)
{
    struct backlog *b = &c->backlog;
    if (!b->data)
        b->data = malloc(CONSOLE_BACKLOG);
    if (!b->data) {
        b->dropped += len;
        c->lost += len;
        return;
    }
    for (size_t i = 0; i < len; i++) {
        b->data[(b->start + b->len) % CONSOLE_BACKLOG] = data[i];
        if (b->len < CONSOLE_BACKLOG) {
            b->len++;
            continue;
        }
        b->start = (b->start + 1) % CONSOLE_BACKLOG;
        b->dropped++;
        c->lost++;
    }
}

// What the host side's error means for output: a missing peer keeps it, anything else discards it.
static void out_failed(struct console *c, int ret)
{
    if (c->config.kind == CONSOLE_UNIX) {
        c->hung_up = true;
        return;
    }
    c->broken = true;
    log_write(&c->log, LOG_WARN, "console %s: %s: further output is discarded",
              c->path[0] ? c->path : "output", strerror(-ret));
}

// Writes to the channel; fewer bytes than len when it is full or fails. c->lock is held.
static size_t channel_write(struct console *c, const uint8_t *data, size_t len)
{
    struct channel *ch = c->channel;
    size_t done = 0;
    while (done < len && !c->broken && !c->hung_up) {
        ssize_t n = way_write(ch->out_fd, ch->out_way, data + done, len - done);
        if (n == -EAGAIN) {
            c->blocked = c->want_out = true;
            break;
        }
        if (n < 0)
            out_failed(c, (int)n);
        else
            done += (size_t)n;
    }
    return done;
}

static void backlog_notice(struct console *c)
{
    struct backlog *b = &c->backlog;
    char text[80];
    if (!b->dropped)
        return;
    int len = snprintf(text, sizeof(text), "\r\n[ferry: %llu earlier bytes dropped]\r\n",
                       (unsigned long long)b->dropped);
    // The first bytes on an idle connection: if they do not fit, nothing is lost but the notice.
    channel_write(c, (uint8_t *)text, (size_t)len);
    b->dropped = 0;
}

// True when nothing is left in the backlog.
static bool backlog_flush(struct console *c)
{
    struct backlog *b = &c->backlog;
    if (b->len && !c->blocked)
        backlog_notice(c);
    while (b->len && !c->blocked && !c->broken && !c->hung_up) {
        size_t part = CONSOLE_BACKLOG - b->start;
        if (part > b->len)
            part = b->len;
        size_t n = channel_write(c, b->data + b->start, part);
        b->start = (b->start + n) % CONSOLE_BACKLOG;
        b->len -= n;
    }
    if (b->len)
        return false;
    free(b->data);
    *b = (struct backlog) {0};
    return true;
}

// --- the device's side

static void console_work(void *arg);

// c->lock is held.
static void call_loop(struct console *c)
{
    if (c->called)
        return;
    c->called = true;
    loop_call(c->loop, &c->call);
}

// How many of the bytes nobody reads now are taken anyway.
static size_t write_unread(struct console *c, const void *data, size_t len)
{
    if (c->broken || c->config.kind == CONSOLE_NULL || (c->channel && c->channel->out_fd < 0)) {
        if (c->broken)
            c->lost += len;
        return len;
    }
    if (c->channel && !c->detached && !c->hung_up)
        return 0;
    backlog_push(c, data, len);
    return len;
}

size_t console_write(struct console *c, const void *data, size_t len)
{
    pthread_mutex_lock(&c->lock);
    size_t done = write_unread(c, data, len);
    if (!done && len && !c->blocked && backlog_flush(c))
        done = channel_write(c, data, len);
    // The peer may have gone while we wrote.
    if (done < len)
        done += write_unread(c, (const uint8_t *)data + done, len - done);
    if (c->want_out || c->hung_up)
        call_loop(c);
    pthread_mutex_unlock(&c->lock);
    return done;
}

void console_drain(struct console *c, const void *data, size_t len)
{
    const uint8_t *bytes = data;
    for (size_t done = 0; done < len;) {
        struct pollfd p = {.events = POLLOUT};
        pthread_mutex_lock(&c->lock);
        c->blocked = false;
        p.fd = c->channel ? c->channel->out_fd : -1;
        pthread_mutex_unlock(&c->lock);
        size_t n = console_write(c, bytes + done, len - done);
        done += n;
        if (!n && poll(&p, 1, CONSOLE_DRAIN_MS) != 1)
            return;
    }
}

size_t console_read(struct console *c, void *data, size_t len)
{
    pthread_mutex_lock(&c->lock);
    size_t n = len < c->in_len ? len : c->in_len;
    memcpy(data, c->in, n);
    c->in_len -= n;
    memmove(c->in, c->in + n, c->in_len);
    if (n && c->stalled)
        call_loop(c);
    pthread_mutex_unlock(&c->lock);
    return n;
}

void console_attach(struct console *c, const struct console_client *client, void *arg)
{
    pthread_mutex_lock(&c->lock);
    c->client = client;
    c->client_arg = arg;
    pthread_mutex_unlock(&c->lock);
}

static void tell_readable(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    const struct console_client *client = c->in_len ? c->client : NULL;
    void *arg = c->client_arg;
    pthread_mutex_unlock(&c->lock);
    if (client)
        client->readable(arg);
}

static void tell_writable(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    const struct console_client *client = c->client;
    void *arg = c->client_arg;
    pthread_mutex_unlock(&c->lock);
    if (client)
        client->writable(arg);
}

// --- escape commands

void console_on_command(struct console *c, void (*fn)(void *arg, enum console_command command),
                        void *arg)
{
    c->on_command = fn;
    c->command_arg = arg;
}

size_t console_escape_filter(struct console_escape *e, uint8_t *data, size_t len,
                             unsigned *commands)
{
    size_t out = 0;
    for (size_t i = 0; i < len; i++) {
        uint8_t byte = data[i];
        if (!e->pending && byte != e->key) {
            data[out++] = byte;
            continue;
        }
        if (!e->pending) {
            e->pending = true;
            continue;
        }
        e->pending = false;
        if (byte == e->key)
            data[out++] = byte;
        else if (byte == 'q' || byte == '.')
            *commands |= CONSOLE_QUIT;
        else if (byte == 'p')
            *commands |= CONSOLE_POWER;
        else
            *commands |= CONSOLE_HELP;
    }
    return out;
}

static void key_name(int key, char name[8])
{
    if (key < 0x20)
        snprintf(name, 8, "Ctrl-%c", key + 0x40);
    else
        snprintf(name, 8, "%c", key);
}

static void help_print(struct console *c)
{
    char text[256], key[8];
    key_name(c->config.escape, key);
    int len = snprintf(text, sizeof(text),
                       "\r\n%s then: q or . quit (stops the VM), p power button, ? this help, "
                       "%s sends it\r\n",
                       key, key);
    // For the user, not from the guest: a terminal too full to take it is not waited for.
    pthread_mutex_lock(&c->lock);
    if (c->channel && c->channel->out_fd >= 0)
        way_write(c->channel->out_fd, c->channel->out_way, text, (size_t)len);
    pthread_mutex_unlock(&c->lock);
}

static void commands_run(struct console *c, unsigned commands)
{
    if (commands & CONSOLE_HELP)
        help_print(c);
    if (commands & CONSOLE_POWER && c->on_command)
        c->on_command(c->command_arg, CONSOLE_POWER);
    if (commands & CONSOLE_QUIT && c->on_command)
        c->on_command(c->command_arg, CONSOLE_QUIT);
}

// --- channels (loop thread)

static void output_watch(struct channel *ch);

static void channel_free(struct channel *ch)
{
    if (ch->in_fd >= 0)
        close(ch->in_fd);
    if (ch->out_fd >= 0 && ch->out_fd != ch->in_fd)
        close(ch->out_fd);
    free(ch);
}

static void channel_settle(struct channel *ch)
{
    struct console *c = ch->console;
    if (!ch->ended || ch->in_on || ch->out_on)
        return;
    pthread_mutex_lock(&c->lock);
    for (struct channel **p = &c->channels; *p; p = &(*p)->next) {
        if (*p == ch) {
            *p = ch->next;
            break;
        }
    }
    pthread_mutex_unlock(&c->lock);
    channel_free(ch);
}

static void in_closed(struct loop_watch *watch)
{
    struct channel *ch = container_of(watch, struct channel, in);
    ch->in_on = false;
    channel_settle(ch);
}

static void out_closed(struct loop_watch *watch)
{
    struct channel *ch = container_of(watch, struct channel, out);
    ch->out_on = false;
    output_watch(ch);
    channel_settle(ch);
}

// Takes the channel away from the console and ends it; output goes to the backlog from here on.
static void channel_end(struct channel *ch)
{
    struct console *c = ch->console;
    pthread_mutex_lock(&c->lock);
    if (c->channel == ch)
        c->channel = NULL;
    c->hung_up = c->blocked = c->want_out = c->stalled = false;
    pthread_mutex_unlock(&c->lock);
    shutdown(ch->in_fd, SHUT_RDWR);
    if (ch->in_on)
        loop_unwatch(&ch->in, in_closed);
    if (ch->out_on)
        loop_unwatch(&ch->out, out_closed);
    ch->ended = true;
    channel_settle(ch);
    tell_writable(c);
}

static struct channel *channel_new(struct console *c, int in_fd, enum fd_way in_way, int out_fd,
                                   enum fd_way out_way)
{
    struct channel *ch = calloc(1, sizeof(*ch));
    if (!ch)
        return NULL;
    *ch = (struct channel) {
        .console = c, .in_fd = in_fd, .out_fd = out_fd, .in_way = in_way, .out_way = out_way};
    pthread_mutex_lock(&c->lock);
    ch->next = c->channels;
    c->channels = c->channel = ch;
    pthread_mutex_unlock(&c->lock);
    return ch;
}

// --- input (loop thread)

static void input_event(struct loop_watch *watch, uint32_t revents);
static void pty_wait(struct console *c);

static bool pty_hung_up(const struct channel *ch)
{
    struct pollfd p = {ch->in_fd, POLLIN, 0};
    return poll(&p, 1, 0) < 0 || p.revents & POLLHUP;
}

// Reads one piece into `in`. Returns bytes read (before escapes are taken out), 0 at the end of
// input, -EAGAIN when there is nothing now, -ENOBUFS when there is no room.
static ssize_t input_piece(struct channel *ch, unsigned *commands)
{
    struct console *c = ch->console;
    pthread_mutex_lock(&c->lock);
    size_t room = CONSOLE_INPUT_MAX - c->in_len;
    ssize_t n = -ENOBUFS;
    c->stalled = !room;
    if (room)
        n = way_read(ch->in_fd, ch->in_way, c->in + c->in_len, room);
    if (n > 0)
        c->in_len += console_escape_filter(&c->escape, c->in + c->in_len, (size_t)n, commands);
    pthread_mutex_unlock(&c->lock);
    return n;
}

static void input_end(struct channel *ch)
{
    struct console *c = ch->console;
    if (c->config.kind == CONSOLE_UNIX) {
        channel_end(ch);
    } else if (c->config.kind == CONSOLE_PTY) {
        pty_wait(c);
    } else if (ch->in_on) {
        loop_unwatch(&ch->in, in_closed); // end of input is no error: output goes on
    }
}

static void input_watch(struct channel *ch)
{
    if (ch->in_on || ch->ended)
        return;
    ch->in_on = !loop_watch(ch->console->loop, &ch->in, ch->in_fd, POLLIN, input_event, NULL);
}

// Reads all there is and hands it on, until the host side is empty or the client takes no more.
// Watches tell each arrival once, so what is left now is fetched by console_read's call.
static void input_fill(struct channel *ch)
{
    struct console *c = ch->console;
    ssize_t n;
    if (ch->in_fd < 0)
        return;
    do {
        unsigned commands = 0;
        n = input_piece(ch, &commands);
        if (n > 0) {
            tell_readable(c);
            commands_run(c, commands);
        } else if (n == -ENOBUFS) {
            tell_readable(c);
            pthread_mutex_lock(&c->lock);
            bool room = c->in_len < CONSOLE_INPUT_MAX;
            pthread_mutex_unlock(&c->lock);
            if (!room)
                break;
            n = 1; // go on
        }
    } while (n > 0);
    if (n == -ENOBUFS && c->config.kind == CONSOLE_PTY && pty_hung_up(ch))
        n = 0; // cannot be read now, but output must not wait for it
    if (n == -EAGAIN || (n == -ENOBUFS && c->config.kind == CONSOLE_PTY))
        input_watch(ch); // not what never says EAGAIN: a file would be ready for ever
    else if (n != -ENOBUFS)
        input_end(ch);
}

static void input_event(struct loop_watch *watch, uint32_t revents)
{
    input_fill(container_of(watch, struct channel, in));
}

// --- output (loop thread)

static void output_event(struct loop_watch *watch, uint32_t revents)
{
    struct channel *ch = container_of(watch, struct channel, out);
    struct console *c = ch->console;
    loop_unwatch(watch, out_closed);
    pthread_mutex_lock(&c->lock);
    bool was_blocked = c->blocked && c->channel == ch;
    if (was_blocked) {
        c->blocked = false;
        backlog_flush(c);
        if (c->want_out || c->hung_up)
            call_loop(c);
    }
    bool tell = was_blocked && !c->blocked;
    pthread_mutex_unlock(&c->lock);
    if (tell)
        tell_writable(c);
}

// Each time anew: arming a watch also looks at the fd as it is now, so no wake-up can be missed.
static void output_watch(struct channel *ch)
{
    struct console *c = ch->console;
    if (ch->ended || ch->out_on)
        return;
    pthread_mutex_lock(&c->lock);
    bool wanted = c->blocked && c->channel == ch;
    pthread_mutex_unlock(&c->lock);
    if (wanted)
        ch->out_on = !loop_watch(c->loop, &ch->out, ch->out_fd, POLLOUT, output_event, NULL);
}

// What other threads ask the loop's thread to do.
static void console_work(void *arg)
{
    struct console *c = arg;
    pthread_mutex_lock(&c->lock);
    c->called = false;
    struct channel *ch = c->channel;
    bool hung_up = c->hung_up;
    c->want_out = false;
    pthread_mutex_unlock(&c->lock);
    if (!ch)
        return;
    if (hung_up) {
        channel_end(ch);
        return;
    }
    output_watch(ch);
    if (!c->detached)
        input_fill(ch);
}

// --- pty

static void pty_closed(struct loop_watch *watch)
{
    struct channel *ch = container_of(watch, struct channel, in);
    ch->in_on = false;
}

// The other side of the pty is closed: no event tells when it is opened again.
static void pty_wait(struct console *c)
{
    struct channel *ch = c->channel;
    pthread_mutex_lock(&c->lock);
    bool before = c->detached;
    c->detached = true;
    c->blocked = false;
    pthread_mutex_unlock(&c->lock);
    if (before)
        return;
    if (ch->in_on)
        loop_unwatch(&ch->in, pty_closed);
    loop_timer_set(&c->timer, PTY_CHECK_NS, PTY_CHECK_NS);
    tell_writable(c);
}

static void pty_check(struct loop_timer *timer)
{
    struct console *c = container_of(timer, struct console, timer);
    struct channel *ch = c->channel;
    if (ch->in_on || pty_hung_up(ch))
        return;
    loop_timer_set(timer, 0, 0);
    pthread_mutex_lock(&c->lock);
    c->detached = false;
    backlog_flush(c);
    if (c->want_out)
        call_loop(c);
    pthread_mutex_unlock(&c->lock);
    input_fill(ch);
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

static int open_pty(struct console *c, struct error *err)
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
    if (!channel_new(c, master, FD_PLAIN, master, FD_PLAIN))
        return error_set(err, -ENOMEM, "console pty: no memory");
    take_fd(&master);
    pty_wait(c);
    log_write(&c->log, LOG_INFO, "console: %s%s%s", c->path, c->made_path ? " = " : "",
              c->made_path ? c->config.path : "");
    return 0;
}

// --- Unix socket

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
        struct channel *ch = channel_new(c, fd, FD_SOCKET, fd, FD_SOCKET);
        if (!ch) {
            close(fd);
            continue;
        }
        pthread_mutex_lock(&c->lock);
        backlog_flush(c);
        if (c->want_out || c->hung_up)
            call_loop(c);
        pthread_mutex_unlock(&c->lock);
        input_fill(ch);
    }
}

// A socket nobody listens on is the remains of a process that was killed.
static bool socket_is_stale(const struct sockaddr_un *addr)
{
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return fd >= 0 && connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) &&
           errno == ECONNREFUSED;
}

static int open_unix(struct console *c, struct error *err)
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
    if (bind(c->listen_fd, (struct sockaddr *)&addr, sizeof(addr)))
        return error_errno(err, "console unix:%s", c->path);
    c->made_path = true;
    if (listen(c->listen_fd, 4))
        return error_errno(err, "console unix:%s: listen", c->path);
    return loop_watch(c->loop, &c->accept, c->listen_fd, POLLIN, accept_event, err);
}

// --- stdio, files, fds

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

static int open_stdio(struct console *c, struct error *err)
{
    int in, out, ret = 0;
    enum fd_way in_way = std_fd(STDIN_FILENO, O_RDONLY, &in);
    enum fd_way out_way = std_fd(STDOUT_FILENO, O_WRONLY, &out);
    if (!channel_new(c, in, in_way, out, out_way)) {
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

static int open_file(struct console *c, struct error *err)
{
    memcpy(c->path, c->config.path, sizeof(c->path));
    // O_NONBLOCK matters when the path is a FIFO or a terminal.
    autoclose int fd = open(c->path,
                            O_WRONLY | O_CREAT | O_APPEND | O_NOCTTY | O_CLOEXEC | O_NONBLOCK |
                                (c->config.append ? 0 : O_TRUNC),
                            0644);
    if (fd < 0)
        return error_errno(err, "console file:%s", c->path);
    if (!channel_new(c, -1, FD_PLAIN, fd, FD_PLAIN))
        return error_set(err, -ENOMEM, "console file:%s: no memory", c->path);
    take_fd(&fd);
    return 0;
}

static int open_fd(struct console *c, struct error *err)
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
    if (!channel_new(c, in, way, out, way))
        return error_set(err, -ENOMEM, "console fd:%d: no memory", fd);
    return 0;
}

// --- life

static int open_kind(struct console *c, struct error *err)
{
    switch (c->config.kind) {
    case CONSOLE_STDIO:
        return open_stdio(c, err);
    case CONSOLE_FILE:
        return open_file(c, err);
    case CONSOLE_PTY:
        return open_pty(c, err);
    case CONSOLE_UNIX:
        return open_unix(c, err);
    case CONSOLE_FD:
        return open_fd(c, err);
    case CONSOLE_NULL:
        break;
    }
    return 0;
}

int console_open(struct console **out, const struct console_config *config, struct loop *loop,
                 struct error *err)
{
    struct console *c = calloc(1, sizeof(*c));
    if (!c)
        return error_set(err, -ENOMEM, "console: no memory");
    c->config = *config;
    c->loop = loop;
    c->log = (struct log) {.level = LOG_INFO, .fd = STDERR_FILENO};
    c->listen_fd = -1;
    c->escape.key = -1;
    c->call = (struct loop_call) {.fn = console_work, .arg = c};
    pthread_mutex_init(&c->lock, NULL);
    int ret = open_kind(c, err);
    if (ret) {
        console_close(c);
        return ret;
    }
    // The first look at the input starts everything; by then the client is attached.
    pthread_mutex_lock(&c->lock);
    if (c->channel && c->channel->in_fd >= 0)
        call_loop(c);
    pthread_mutex_unlock(&c->lock);
    *out = c;
    return 0;
}

void console_close(struct console *c)
{
    if (!c)
        return;
    terminal_restore(c->terminal);
    while (c->channels) {
        struct channel *ch = c->channels;
        c->channels = ch->next;
        if (c->config.kind == CONSOLE_UNIX)
            shutdown(ch->in_fd, SHUT_RDWR); // a ring that still polls it would keep it open
        channel_free(ch);
    }
    if (c->listen_fd >= 0)
        close(c->listen_fd);
    if (c->timer_made)
        close(c->timer.fd);
    if (c->made_path)
        unlink(c->config.path);
    free(c->backlog.data);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

const char *console_path(const struct console *c)
{
    return c->path;
}

uint64_t console_lost(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    uint64_t lost = c->lost;
    pthread_mutex_unlock(&c->lock);
    return lost;
}

// --- the --console word

static int key_parse(const char *text, int *key, struct error *err)
{
    if (!strcmp(text, "none"))
        *key = -1;
    else if (text[0] == '^' && text[1] >= 'A' && text[1] <= '_' && !text[2])
        *key = text[1] - 0x40;
    else if (text[0] == '^' && text[1] >= 'a' && text[1] <= 'z' && !text[2])
        *key = text[1] - 0x60;
    else if (text[0] > ' ' && text[0] < 0x7f && !text[1])
        *key = text[0];
    else
        return error_set(err, -EINVAL,
                         "console escape key '%s': expected ^A to ^_, one character, or none",
                         text);
    return 0;
}

static int path_copy(char *path, const char *text, size_t len, const char *kind, struct error *err)
{
    if (!len || len >= CONSOLE_PATH_MAX)
        return error_set(err, -EINVAL, "console %s: path of %zu bytes, expected 1 to %d", kind, len,
                         CONSOLE_PATH_MAX - 1);
    memcpy(path, text, len);
    path[len] = 0;
    return 0;
}

static int option_parse(const char *text, struct console_config *config, struct error *err)
{
    if (config->kind == CONSOLE_STDIO && !strncmp(text, "escape=", 7))
        return key_parse(text + 7, &config->escape, err);
    if (config->kind == CONSOLE_PTY && !strncmp(text, "link=", 5))
        return path_copy(config->path, text + 5, strlen(text + 5), "pty link", err);
    if (config->kind == CONSOLE_FILE && !strcmp(text, "append")) {
        config->append = true;
        return 0;
    }
    return error_set(err, -EINVAL,
                     "console option '%s': expected stdio,escape=KEY, file:PATH,append or "
                     "pty,link=PATH",
                     text);
}

static int fd_parse(const char *text, int *fd, struct error *err)
{
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (errno || end == text || *end || n < 0 || n > 1 << 20)
        return error_set(err, -EINVAL, "console fd '%s': expected the number of an open fd", text);
    *fd = (int)n;
    return 0;
}

int console_parse(const char *text, struct console_config *config, struct error *err)
{
    static const struct {
        const char *word;
        enum console_kind kind;
    } kinds[] = {{"null", CONSOLE_NULL},  {"stdio", CONSOLE_STDIO}, {"pty", CONSOLE_PTY},
                 {"file:", CONSOLE_FILE}, {"unix:", CONSOLE_UNIX},  {"fd:", CONSOLE_FD}};
    *config = (struct console_config) {.fd = -1, .escape = CONSOLE_ESCAPE_DEFAULT};
    // A path may hold commas, but only the last one can begin an option.
    const char *comma = strrchr(text, ',');
    if (comma && !strncmp(text, "file:", 5) && strcmp(comma, ",append"))
        comma = NULL;
    if (comma && (!strncmp(text, "unix:", 5) || !strncmp(text, "fd:", 3)))
        comma = NULL;
    if (!strncmp(text, "pty,", 4) || !strncmp(text, "stdio,", 6))
        comma = strchr(text, ',');
    size_t len = comma ? (size_t)(comma - text) : strlen(text);
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++) {
        size_t n = strlen(kinds[i].word);
        bool takes_value = kinds[i].word[n - 1] == ':';
        if (strncmp(text, kinds[i].word, n) || (!takes_value && len != n))
            continue;
        config->kind = kinds[i].kind;
        int ret = 0;
        if (config->kind == CONSOLE_FD)
            ret = fd_parse(text + n, &config->fd, err);
        else if (takes_value)
            ret = path_copy(config->path, text + n, len - n, kinds[i].word, err);
        return ret || !comma ? ret : option_parse(comma + 1, config, err);
    }
    return error_set(err, -EINVAL,
                     "console '%s': expected stdio, file:PATH, pty, unix:PATH, fd:N or null", text);
}
