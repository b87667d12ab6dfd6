// SPDX-License-Identifier: Apache-2.0
// An HTTP/1.1 server on a Unix socket, in a thread of its own: clients that are slow, half done or
// many cost the VM's event loop nothing. libevent speaks the protocol; this file is the seam.
//
// Each request becomes a `struct http_exchange`, given to the handler in the server's thread. It is
// answered once, from any thread, now or later: http_reply, or any number of http_chunk and
// then http_end.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "vmm/error.h"
#include "vmm/seccomp.h"

enum {
    HTTP_BODY_MAX = 256 * 1024, // bytes; more is answered with 413
    HTTP_HEADER_MAX = 16 * 1024,
    HTTP_IDLE_S = 60,           // of a connection that neither asks nor is being answered
    HTTP_BACKLOG_MAX = 1 << 20, // bytes that a reader of chunks may lag behind before it is dropped
};

struct http_server;
struct http_exchange;

typedef void (*http_handler)(struct http_exchange *x, void *arg);

// Makes `path` a socket that only its owner can use (0600), over a stale one. -EADDRINUSE: somebody
// listens there.
int http_listen(const char *path, int *fd, struct error *err);
// Several listeners may share one server. Before http_start.
int http_create(struct http_server **server, http_handler fn, void *arg, struct error *err);
int http_add_listener(struct http_server *server, int fd, struct error *err); // takes fd
// The mode of the thread's filter (off unless set). Before http_start.
void http_confine(struct http_server *server, enum seccomp_mode mode);
// A listener whose clients may only look: GET of `path`, which is also called "/metrics" there.
// Takes fd; `path` is borrowed.
int http_add_reader(struct http_server *server, int fd, const char *path, struct error *err);
// "[tcp:][HOST:]PORT", HOST a number, 127.0.0.1 unless given; IPv6 in brackets.
int http_listen_tcp(const char *address, int *fd, struct error *err);
int http_start(struct http_server *server, struct error *err);
// Sends what has been answered (a second at most), then ends the thread. Answers that come later
// vanish. NULL is fine.
void http_destroy(struct http_server *server);

const char *http_method(const struct http_exchange *x); // "GET" ...
const char *http_path(const struct http_exchange *x);   // decoded, without query
const char *http_body(const struct http_exchange *x, size_t *len);
bool http_wants_stream(const struct http_exchange *x); // it accepts application/x-ndjson

// `type` and `body` may be NULL: an answer without content. The exchange is gone afterwards.
void http_reply(struct http_exchange *x, int status, const char *type, const char *body,
                size_t len);
void http_chunk(struct http_exchange *x, const char *data, size_t len); // begins a 200 answer
void http_end(struct http_exchange *x);
bool http_gone(const struct http_exchange *x); // its client has left; still to be ended
