// SPDX-License-Identifier: Apache-2.0
// The host's side of a character device: where guest output goes and input comes from.
//
//   stdio[,escape=KEY]  the terminal, made raw, or pipes; KEY is ^A to ^_, a character, or none
//   file:PATH[,append]  output only; an existing file is emptied unless `append`. Writes always go
//                       to the end (O_APPEND), so several writers or logrotate do no harm
//   pty[,link=PATH]     a pseudo terminal; its name is printed on stderr and kept in the link
//   unix:PATH           listens; one client at a time, others are told so and closed
//   fd:N                an open file descriptor, for both directions; the console owns it
//   null                nothing
//
// Output never waits and never vanishes unseen: console_write takes what the host side takes now.
// Where nobody listens (pty, unix), the newest CONSOLE_BACKLOG bytes are kept for the next reader,
// who is told how many were dropped before them; `strict` refuses output then. When the host side
// breaks (closed pipe, full disk), output is discarded from then on and a message says so. Whoever
// opens a console on a pipe must ignore SIGPIPE.
//
// Escape commands, on a terminal only: the escape key (Ctrl-] unless configured), then q or . to
// quit, p to press the power button, ? for help, the key again to send it.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/loop.h"

enum console_kind {
    CONSOLE_NULL,
    CONSOLE_STDIO,
    CONSOLE_FILE,
    CONSOLE_PTY,
    CONSOLE_UNIX,
    CONSOLE_FD,
};

enum {
    CONSOLE_PATH_MAX = 256,
    CONSOLE_INPUT_MAX = 4096,    // bytes read ahead of the guest
    CONSOLE_BACKLOG = 64 * 1024, // bytes kept for a reader that is not there
    CONSOLE_DRAIN_MS = 1000,
    CONSOLE_ESCAPE_DEFAULT = 0x1d // Ctrl-]
};

struct console_config {
    enum console_kind kind;
    char path[CONSOLE_PATH_MAX]; // FILE, UNIX: path; PTY: link or ""
    int fd;                      // FD
    int escape;                  // STDIO: the key, -1 = none
    bool append;                 // FILE
    // What the text does not say: who opens it chooses.
    bool strict;          // takes no output while nobody listens, instead of keeping the newest
    unsigned patience_ms; // a reader that takes nothing for so long counts as absent; 0: never
    bool sized;           // the client wants to hear of the terminal's size
};

enum console_command { CONSOLE_QUIT = 1, CONSOLE_POWER = 2, CONSOLE_HELP = 4 };

// The device's side. Called in the loop's thread with no lock of the console held.
struct console_client {
    void (*readable)(void *arg); // console_read has something
    void (*writable)(void *arg); // console_write takes bytes again, after it took too few
    // These may be NULL.
    void (*opened)(void *arg, bool open); // somebody came to the host side, or left it
    void (*resized)(void *arg);           // console_size has changed (config.sized)
};

struct console;

// "null" for an empty text is an error; the text is one of the forms above.
int console_parse(const char *text, struct console_config *config, struct error *err);

// Before loop_run or in the loop's thread.
int console_open(struct console **console, const struct console_config *config, struct loop *loop,
                 struct error *err);
// When the loop runs no more (best after loop_destroy). Restores the terminal, removes link and
// socket. NULL is fine.
void console_close(struct console *console);
// The same while the loop lives, in its thread or before loop_run; memory is freed by the loop.
void console_release(struct console *console);

// One client; NULL detaches.
void console_attach(struct console *console, const struct console_client *client, void *arg);

// Escape commands of the user; called in the loop's thread. CONSOLE_HELP is never passed on.
void console_on_command(struct console *console,
                        void (*fn)(void *arg, enum console_command command), void *arg);

// Both: any thread, never block. Bytes taken or given, 0 to len.
size_t console_write(struct console *console, const void *data, size_t len);
size_t console_read(struct console *console, void *data, size_t len);

size_t console_pending(struct console *console); // bytes that console_read would give
bool console_connected(struct console *console); // whether somebody is there; a file always is
// While held, nothing more is read from the host side (but from a person's terminal, for its
// escape commands): what was not read can still be somebody else's.
void console_hold(struct console *console, bool hold);
// Of the terminal at the host side; false: there is none, or it does not know.
bool console_size(struct console *console, uint16_t *columns, uint16_t *rows);

// For the end of a VM, when the loop runs no more: writes all of it, waiting for a slow reader as
// long as it goes on taking bytes (CONSOLE_DRAIN_MS without one byte ends it).
void console_drain(struct console *console, const void *data, size_t len);

const char *console_path(const struct console *console); // PTY: name of the terminal; else path
uint64_t console_lost(struct console *console); // bytes dropped from the backlog or discarded

// Takes escape sequences out of `data` (in place), returns the bytes left and ORs the commands
// found into `*commands`. A sequence may be split between calls.
struct console_escape {
    int key; // -1 = none
    bool pending;
};
size_t console_escape_filter(struct console_escape *escape, uint8_t *data, size_t len,
                             unsigned *commands);
