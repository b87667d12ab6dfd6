// SPDX-License-Identifier: Apache-2.0
// What the files of the console share: console.c (both directions, bookkeeping) and one file for
// each sort of host side.
//
// Threads: vCPUs write and read under c->lock; the loop's thread owns watches, connections and the
// reading of host fds. Lock order: device lock, then c->lock; clients are called without c->lock.
#pragma once

#include <pthread.h>

#include "devices/console.h"
#include "vmm/log.h"

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
    struct loop_timer timer;    // PTY: looks for a reader, and at its size
    struct loop_timer patience; // runs while the reader takes nothing
    int resize_fd;              // rung when the terminal's size changed
    struct loop_watch resize;
    bool timer_made, patience_made, made_path;
    bool released;    // console_release was called
    unsigned in_loop; // watches and timers that the loop may still know
    uint16_t size[2]; // PTY: columns and rows when last looked at

    void (*on_command)(void *arg, enum console_command command);
    void *command_arg;

    pthread_mutex_t lock; // guards what follows
    const struct console_client *client;
    void *client_arg;
    struct channel *channel;  // NULL: nobody there
    struct channel *channels; // all that are not freed yet
    bool detached;            // pty whose other side is closed
    bool broken;
    bool gone;     // FD: the peer has closed both directions
    bool told;     // what the client last heard of console_connected
    bool held;     // input stays outside
    bool blocked;  // the host side was full; POLLOUT will tell
    bool trying;   // the next write tells whether the reader goes on
    bool stopped;  // blocked for longer than config.patience_ms
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

int console_stdio_open(struct console *c, struct error *err);
int console_file_open(struct console *c, struct error *err);
int console_fd_open(struct console *c, struct error *err);
int console_pty_open(struct console *c, struct error *err);
int console_unix_open(struct console *c, struct error *err);

// The rest is for the loop's thread.
struct channel *console_channel_new(struct console *c, int in_fd, enum fd_way in_way, int out_fd,
                                    enum fd_way out_way);
// Takes the channel away from the console and ends it; output goes to the backlog from here on.
void console_channel_end(struct channel *ch);
// Reads all there is and hands it on, until the host side is empty or the client takes no more.
void console_input_fill(struct channel *ch);
void console_input_unwatch(struct channel *ch);
void console_tell_writable(struct console *c);
void console_tell_opened(struct console *c); // if somebody came or left since
void console_tell_resized(struct console *c);
void console_loop_let_go(struct console *c); // of one of those that in_loop counts

// With c->lock held.
void console_call_loop(struct console *c);
bool console_backlog_flush(struct console *c); // true when nothing is left in it

// The other side of the pty is closed: no event tells when it is opened again.
void console_pty_closed(struct console *c);
bool console_pty_hung_up(const struct channel *ch);
