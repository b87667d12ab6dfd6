// SPDX-License-Identifier: Apache-2.0
// A migration connection: a stream socket with a time-out on every wait, a way to interrupt it and
// a bandwidth limit.
//
// Addresses: "tcp:HOST:PORT" (IPv6 as tcp:[::1]:7000), "unix:PATH", "fd:N".
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "migrate/tls.h"
#include "migrate/wire.h"
#include "vmm/error.h"

enum {
    CHANNEL_HANDSHAKE_MS = 30 * 1000, // default time-out until the machine is agreed on
    CHANNEL_IDLE_MS = 60 * 1000,      // default time-out without any byte later
};

// Whom a channel talks to, and how.
struct channel_security {
    const struct tls *tls; // NULL: in clear, which over TCP is for addresses of this host only
    bool insecure;         // in clear to anywhere
};

struct channel {
    struct wire wire;
    int fd;
    struct tls_stream *tls; // NULL: in clear
    int cancel_fd;          // readable = give up with -ECANCELED; -1 = none
    unsigned timeout_ms;    // without any progress
    char name[160];
    // Bandwidth limit in bytes/s, 0 = none; may change while in use. NULL = none.
    const _Atomic uint64_t *limit;
    uint64_t earliest_ns; // when the limit allows the next write
    // For connections that work together; may be NULL. What all of them have read and written,
    // bytes: while it counts on, silence on one is no time-out. And the one limit's `earliest_ns`.
    _Atomic uint64_t *moved, *earliest;
    uint8_t *ahead; // channel_quick: what came beyond what was asked for
    size_t ahead_at, ahead_len;
};

// Takes over fd (made non-blocking, TCP_NODELAY where it is TCP).
void channel_init(struct channel *c, int fd, int cancel_fd, unsigned timeout_ms, const char *name);
void channel_close(struct channel *c); // fd becomes -1; harmless when it is
// `to` becomes what `from` was, which is then closed.
void channel_move(struct channel *to, struct channel *from, int cancel_fd, unsigned timeout_ms);

// For a connection of short records on whose answers somebody waits, without time-out and cancel
// (channel_shutdown ends a wait): a read takes all that has come, and waits in one system call.
// Later reads must be through the channel. Without memory, or over TLS, nothing changes.
void channel_quick(struct channel *c);

// Wakes whoever waits on the channel, in any thread; later calls fail.
void channel_shutdown(struct channel *c);

int channel_connect(struct channel *c, const char *address, int cancel_fd, unsigned timeout_ms,
                    struct error *err);
// As channel_connect, and makes sure who is there. -EPERM: in clear to another host. Closed on
// error.
int channel_connect_secure(struct channel *c, const char *address,
                           const struct channel_security *security, int cancel_fd,
                           unsigned timeout_ms, struct error *err);
// The other end of that, after channel_accept. Closed on error.
int channel_accept_secure(struct channel *c, const struct channel_security *security,
                          struct error *err);
// -EPERM: this listening socket may be reached from other hosts, in clear.
int channel_listen_check(int fd, const char *address, const struct channel_security *security,
                         struct error *err);
// A listening socket. `bound` (may be NULL, else of `size` bytes) gets the address with the real
// port.
int channel_listen(const char *address, int *fd, char *bound, size_t size, struct error *err);
// Waits for a connection; timeout_ms 0 = for ever. -ECANCELED, -ETIMEDOUT.
int channel_accept(struct channel *c, int listen_fd, int cancel_fd, unsigned wait_ms,
                   unsigned timeout_ms, struct error *err);

// A descriptor and the byte that carries it, over a unix socket; the receiver owns its copy.
int channel_send_fd(struct channel *c, int fd, struct error *err);
int channel_recv_fd(struct channel *c, int *fd, struct error *err);

// Sends ABORT with the error's text; best effort, does not wait for long.
void channel_abort(struct channel *c, const struct error *why);
