// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

#include "devices/console_internal.h"
#include "devices/terminal.h"
#include "vmm/util.h"

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
    console_call_loop(c); // for the client
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
            c->stopped |= c->trying && !done;
            c->trying = false;
            c->blocked = c->want_out = true;
            break;
        }
        c->trying = false;
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

bool console_backlog_flush(struct console *c)
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

void console_call_loop(struct console *c)
{
    if (c->called)
        return;
    c->called = true;
    loop_call(c->loop, &c->call);
}

static bool connected(const struct console *c)
{
    if (c->config.kind == CONSOLE_NULL)
        return true;
    return c->channel && !c->detached && !c->hung_up && !c->broken && !c->gone;
}

static bool listens(const struct console *c)
{
    return c->channel && !c->detached && !c->hung_up && !c->stopped;
}

// How many of the bytes nobody reads now are taken anyway.
static size_t write_unread(struct console *c, const void *data, size_t len)
{
    if (c->broken || c->config.kind == CONSOLE_NULL || (c->channel && c->channel->out_fd < 0)) {
        if (c->broken)
            c->lost += len;
        return len;
    }
    if (listens(c) || c->config.strict)
        return 0;
    backlog_push(c, data, len);
    return len;
}

size_t console_write(struct console *c, const void *data, size_t len)
{
    pthread_mutex_lock(&c->lock);
    size_t done = write_unread(c, data, len);
    if (!done && len && listens(c) && !c->blocked && console_backlog_flush(c))
        done = channel_write(c, data, len);
    // The peer may have gone while we wrote.
    if (done < len)
        done += write_unread(c, (const uint8_t *)data + done, len - done);
    if (c->want_out || c->hung_up)
        console_call_loop(c);
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
        console_call_loop(c);
    pthread_mutex_unlock(&c->lock);
    return n;
}

size_t console_pending(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    size_t n = c->in_len;
    pthread_mutex_unlock(&c->lock);
    return n;
}

bool console_connected(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    bool yes = connected(c);
    pthread_mutex_unlock(&c->lock);
    return yes;
}

void console_hold(struct console *c, bool hold)
{
    pthread_mutex_lock(&c->lock);
    // A person at the terminal has escape commands, also while the guest stands still.
    c->held = hold && !c->terminal;
    if (!hold)
        console_call_loop(c);
    pthread_mutex_unlock(&c->lock);
}

bool console_size(struct console *c, uint16_t *columns, uint16_t *rows)
{
    struct winsize w = {0};
    pthread_mutex_lock(&c->lock);
    const struct channel *ch = c->channel;
    bool known = ch && (!ioctl(ch->out_fd, TIOCGWINSZ, &w) || !ioctl(ch->in_fd, TIOCGWINSZ, &w));
    pthread_mutex_unlock(&c->lock);
    *columns = w.ws_col;
    *rows = w.ws_row;
    return known && w.ws_col && w.ws_row;
}

void console_attach(struct console *c, const struct console_client *client, void *arg)
{
    pthread_mutex_lock(&c->lock);
    c->client = client;
    c->client_arg = arg;
    c->told = connected(c);
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

void console_tell_writable(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    const struct console_client *client = c->client;
    void *arg = c->client_arg;
    pthread_mutex_unlock(&c->lock);
    if (client)
        client->writable(arg);
}

void console_tell_opened(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    bool now = connected(c);
    const struct console_client *client = now != c->told ? c->client : NULL;
    void *arg = c->client_arg;
    c->told = now;
    pthread_mutex_unlock(&c->lock);
    if (client && client->opened)
        client->opened(arg, now);
}

void console_tell_resized(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    const struct console_client *client = c->client;
    void *arg = c->client_arg;
    pthread_mutex_unlock(&c->lock);
    if (client && client->resized)
        client->resized(arg);
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
    console_loop_let_go(c);
}

static void in_closed(struct loop_watch *watch)
{
    struct channel *ch = container_of(watch, struct channel, in);
    ch->in_on = false;
    channel_settle(ch);
}

void console_input_unwatch(struct channel *ch)
{
    if (ch->in_on)
        loop_unwatch(&ch->in, in_closed);
}

static void out_closed(struct loop_watch *watch)
{
    struct channel *ch = container_of(watch, struct channel, out);
    ch->out_on = false;
    output_watch(ch);
    channel_settle(ch);
}

void console_channel_end(struct channel *ch)
{
    struct console *c = ch->console;
    pthread_mutex_lock(&c->lock);
    if (c->channel == ch)
        c->channel = NULL;
    c->hung_up = c->blocked = c->stopped = c->want_out = c->stalled = false;
    pthread_mutex_unlock(&c->lock);
    if (c->config.kind == CONSOLE_UNIX) // any other may have more users than us
        shutdown(ch->in_fd, SHUT_RDWR);
    console_input_unwatch(ch);
    if (ch->out_on)
        loop_unwatch(&ch->out, out_closed);
    ch->ended = true;
    console_tell_opened(c);
    console_tell_writable(c);
    channel_settle(ch); // may free both, the console only when it was released
}

struct channel *console_channel_new(struct console *c, int in_fd, enum fd_way in_way, int out_fd,
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
    c->in_loop++;
    return ch;
}

// --- input (loop thread)

static void input_event(struct loop_watch *watch, uint32_t revents);

// Reads one piece into `in`. Returns bytes read (before escapes are taken out), 0 at the end of
// input, -EAGAIN when there is nothing now, -ENOBUFS when there is no room.
static ssize_t input_piece(struct channel *ch, unsigned *commands)
{
    struct console *c = ch->console;
    pthread_mutex_lock(&c->lock);
    size_t room = c->held ? 0 : CONSOLE_INPUT_MAX - c->in_len;
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
        console_channel_end(ch);
    } else if (c->config.kind == CONSOLE_PTY) {
        console_pty_closed(c);
    } else {
        console_input_unwatch(ch); // end of input is no error: output goes on
    }
    if (c->config.kind != CONSOLE_FD)
        return;
    struct pollfd p = {ch->in_fd, 0, 0};
    bool gone = poll(&p, 1, 0) == 1 && p.revents & POLLHUP;
    pthread_mutex_lock(&c->lock);
    c->gone = gone;
    pthread_mutex_unlock(&c->lock);
    console_tell_opened(c);
}

static void input_watch(struct channel *ch)
{
    if (ch->in_on || ch->ended)
        return;
    ch->in_on = !loop_watch(ch->console->loop, &ch->in, ch->in_fd, POLLIN, input_event, NULL);
}

// Watches tell each arrival once, so what is left now is fetched by console_read's call.
void console_input_fill(struct channel *ch)
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
            bool room = !c->held && c->in_len < CONSOLE_INPUT_MAX;
            pthread_mutex_unlock(&c->lock);
            if (!room)
                break;
            n = 1; // go on
        }
    } while (n > 0);
    if (n == -ENOBUFS && c->config.kind == CONSOLE_PTY && console_pty_hung_up(ch))
        n = 0; // cannot be read now, but output must not wait for it
    if (n == -EAGAIN || (n == -ENOBUFS && c->config.kind == CONSOLE_PTY))
        input_watch(ch); // not what never says EAGAIN: a file would be ready for ever
    else if (n != -ENOBUFS)
        input_end(ch);
}

static void input_event(struct loop_watch *watch, uint32_t revents)
{
    console_input_fill(container_of(watch, struct channel, in));
}

// --- output (loop thread)

static void output_event(struct loop_watch *watch, uint32_t revents)
{
    struct channel *ch = container_of(watch, struct channel, out);
    struct console *c = ch->console;
    loop_unwatch(watch, out_closed);
    if (c->patience_made)
        loop_timer_set(&c->patience, 0, 0);
    pthread_mutex_lock(&c->lock);
    c->trying = false;
    bool was_blocked = c->blocked && c->channel == ch;
    if (was_blocked) {
        c->blocked = c->stopped = false;
        console_backlog_flush(c);
        if (c->want_out || c->hung_up)
            console_call_loop(c);
    }
    bool tell = was_blocked && !c->blocked;
    pthread_mutex_unlock(&c->lock);
    if (tell)
        console_tell_writable(c);
}

// Room for a few bytes is no event (a socket's POLLOUT wants most of the buffer free), but it shows
// that the reader goes on. Without any it has stopped, and counts as absent from then on.
static void patience_over(struct loop_timer *timer)
{
    struct console *c = container_of(timer, struct console, patience);
    pthread_mutex_lock(&c->lock);
    c->trying = c->blocked && !c->stopped;
    c->blocked &= !c->trying;
    pthread_mutex_unlock(&c->lock);
    console_tell_writable(c);
}

// Each time anew: arming a watch also looks at the fd as it is now, so no wake-up can be missed.
static void output_watch(struct channel *ch)
{
    struct console *c = ch->console;
    if (ch->ended)
        return;
    pthread_mutex_lock(&c->lock);
    bool wanted = c->blocked && c->channel == ch, waits = wanted && !c->stopped;
    pthread_mutex_unlock(&c->lock);
    if (waits && c->patience_made)
        loop_timer_set(&c->patience, c->config.patience_ms * 1000000ull, 0);
    if (wanted && !ch->out_on)
        ch->out_on = !loop_watch(c->loop, &ch->out, ch->out_fd, POLLOUT, output_event, NULL);
}

// What other threads ask the loop's thread to do.
static void console_settle(struct console *c);

static void console_work(void *arg)
{
    struct console *c = arg;
    pthread_mutex_lock(&c->lock);
    c->called = false;
    struct channel *ch = c->channel;
    bool hung_up = c->hung_up;
    c->want_out = false;
    pthread_mutex_unlock(&c->lock);
    if (c->released) {
        console_settle(c);
        return;
    }
    console_tell_opened(c);
    if (!ch)
        return;
    if (hung_up) {
        console_channel_end(ch);
        return;
    }
    output_watch(ch);
    if (!c->detached)
        console_input_fill(ch);
}

// --- life

static int open_kind(struct console *c, struct error *err)
{
    switch (c->config.kind) {
    case CONSOLE_STDIO:
        return console_stdio_open(c, err);
    case CONSOLE_FILE:
        return console_file_open(c, err);
    case CONSOLE_PTY:
        return console_pty_open(c, err);
    case CONSOLE_UNIX:
        return console_unix_open(c, err);
    case CONSOLE_FD:
        return console_fd_open(c, err);
    case CONSOLE_NULL:
        break;
    }
    return 0;
}

static void resize_event(struct loop_watch *watch, uint32_t revents)
{
    struct console *c = container_of(watch, struct console, resize);
    uint64_t count;
    if (read(c->resize_fd, &count, sizeof(count)) == sizeof(count))
        console_tell_resized(c);
}

static int extras_open(struct console *c, struct error *err)
{
    if (c->config.patience_ms) {
        int ret = loop_timer_init(c->loop, &c->patience, patience_over, err);
        if (ret)
            return ret;
        c->patience_made = true;
        c->in_loop++;
    }
    if (!c->terminal || !c->config.sized)
        return 0;
    c->resize_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->resize_fd < 0)
        return error_errno(err, "eventfd");
    int ret = loop_watch(c->loop, &c->resize, c->resize_fd, POLLIN, resize_event, err);
    if (ret)
        return ret;
    c->in_loop++;
    terminal_on_resize(c->terminal, c->resize_fd);
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
    c->listen_fd = c->resize_fd = -1;
    c->escape.key = -1;
    c->call = (struct loop_call) {.fn = console_work, .arg = c};
    pthread_mutex_init(&c->lock, NULL);
    int ret = open_kind(c, err);
    if (!ret)
        ret = extras_open(c, err);
    if (ret) {
        console_close(c);
        return ret;
    }
    // The first look at the input starts everything; by then the client is attached.
    pthread_mutex_lock(&c->lock);
    if (c->channel && c->channel->in_fd >= 0)
        console_call_loop(c);
    pthread_mutex_unlock(&c->lock);
    *out = c;
    return 0;
}

static void console_free(struct console *c)
{
    free(c->backlog.data);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

// What does not wait for the loop.
static void outside_close(struct console *c)
{
    terminal_restore(c->terminal);
    c->terminal = NULL;
    if (c->made_path)
        unlink(c->config.path);
    c->made_path = false;
}

void console_close(struct console *c)
{
    if (!c)
        return;
    outside_close(c);
    while (c->channels) {
        struct channel *ch = c->channels;
        c->channels = ch->next;
        if (c->config.kind == CONSOLE_UNIX)
            shutdown(ch->in_fd, SHUT_RDWR); // a ring that still polls it would keep it open
        channel_free(ch);
    }
    cleanup_close(&c->listen_fd);
    cleanup_close(&c->resize_fd);
    if (c->timer_made)
        close(c->timer.fd);
    if (c->patience_made)
        close(c->patience.fd);
    console_free(c);
}

static void console_settle(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    bool last = c->released && !c->in_loop && !c->called;
    pthread_mutex_unlock(&c->lock);
    if (last)
        console_free(c);
}

void console_loop_let_go(struct console *c)
{
    c->in_loop--;
    console_settle(c);
}

static void accept_let_go(struct loop_watch *watch)
{
    console_loop_let_go(container_of(watch, struct console, accept));
}

static void resize_let_go(struct loop_watch *watch)
{
    console_loop_let_go(container_of(watch, struct console, resize));
}

static void timer_let_go(struct loop_watch *watch)
{
    console_loop_let_go(container_of(watch, struct console, timer.watch));
}

static void patience_let_go(struct loop_watch *watch)
{
    console_loop_let_go(container_of(watch, struct console, patience.watch));
}

static void watch_end(struct loop_watch *watch, int *fd, void (*let_go)(struct loop_watch *watch))
{
    if (*fd < 0)
        return;
    loop_unwatch(watch, let_go);
    cleanup_close(fd);
    *fd = -1;
}

void console_release(struct console *c)
{
    if (!c)
        return;
    console_attach(c, NULL, NULL);
    outside_close(c);
    c->in_loop++; // until all is under way
    c->released = true;
    if (c->channel)
        console_channel_end(c->channel);
    watch_end(&c->accept, &c->listen_fd, accept_let_go);
    watch_end(&c->resize, &c->resize_fd, resize_let_go);
    if (c->timer_made)
        watch_end(&c->timer.watch, &c->timer.fd, timer_let_go);
    if (c->patience_made)
        watch_end(&c->patience.watch, &c->patience.fd, patience_let_go);
    console_loop_let_go(c);
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
