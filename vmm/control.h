// SPDX-License-Identifier: Apache-2.0
// The control API of a VM: a table of routes, apart from the server that carries them (vmm/http.h).
//
//   PUT /drives/rootfs HTTP/1.1           a route's method and path; {id} in a path is any name
//   {"drive_id": "rootfs", ...}           a JSON object as the route's schema says
//
//   200 with JSON, 204 without            done
//   400 {"fault_message": "..."}          not done, and nothing has changed; "code": -errno. Also
//                                         for a path that does not exist
//   413                                   a body over HTTP_BODY_MAX
//   200 application/x-ndjson              if the client accepts that: {"event": ...} lines, then
//                                         {"ok": ...} or {"error": {"code":, "text":}}
//
// Bodies are parsed and checked in the server's thread, routes run in the loop's thread: one at a
// time. A route that only looks (at_once) runs in the server's thread, unless another one runs just
// then: two wake-ups less, and nothing the guest's I/O keeps waiting.
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>

#include "vmm/error.h"
#include "vmm/histogram.h"
#include "vmm/life.h"
#include "vmm/loop.h"
#include "vmm/schema.h"
#include "vmm/seccomp.h"

struct control_request;

struct control_route {
    const char *method, *path;
    const char *help;
    unsigned states;                   // LIFE_BITs in which it may be called; 0 = all
    const struct schema_field *fields; // of the body; NULL: none is expected, and any is refused
    // Short ones answer before they return; long ones start a thread and answer later, from any
    // thread. Each request gets exactly one control_reply_*. `args` is borrowed.
    void (*fn)(struct control_request *req, json_t *args, void *context);
    void *context; // given back to fn
    bool at_once;  // fn needs no thread of its own, and answers before it returns
};

// What {id} was in the path; "" when the route has none.
const char *control_id(const struct control_request *req);
// Steal the reference of the JSON value. NULL: done, and no more to say.
void control_reply_ok(struct control_request *req, json_t *result);
void control_reply_error(struct control_request *req, const struct error *err);
void control_silence(struct control_request *req); // whatever the result: 204
void control_reply_text(struct control_request *req, const char *type, const char *text);
void control_event(struct control_request *req, json_t *event);

struct control;

// Keeps the request open: it gets every control_broadcast from now on, as {"event": ...} lines.
void control_subscribe(struct control *control, struct control_request *req);
void control_broadcast(struct control *control, json_t *event); // any thread; steals the reference

// `life` may be NULL: no route depends on the state.
int control_create(struct control **control, struct loop *loop, struct life *life,
                   struct error *err);
int control_add(struct control *control, const struct control_route *routes, unsigned nr,
                void *context, struct error *err);
// Takes back every route with this context. Requests under way are not touched.
void control_remove(struct control *control, const void *context);
// A Unix socket for the API; several may be opened. -EADDRINUSE: it is in use.
int control_listen(struct control *control, const char *path, struct error *err);
// The same for a socket that was made before (http_listen); takes fd, also on error.
int control_take(struct control *control, int fd, const char *path, struct error *err);
// The filter of the server's thread (off unless set). Before control_start.
void control_confine(struct control *control, enum seccomp_mode mode);
// A further listener (http_listen_tcp), where there is nothing but GET of `path`. Takes fd.
int control_take_reader(struct control *control, int fd, const char *path, struct error *err);
int control_start(struct control *control, struct error *err);
// How long requests took, from the whole request until their route had answered, or had begun what
// will answer later.
const struct histogram *control_latency(const struct control *control);
// From here on every route runs in the loop's thread: what they look at is about to go.
void control_loop_only(struct control *control);
void control_destroy(struct control *control); // also removes the sockets

// What the server's thread makes of a request before it goes to the loop: the route that takes it,
// what {id} is, and a body that is as the route's schema says. Needs no socket and no loop.
enum { CONTROL_ID_MAX = 64 }; // bytes
struct control_wish {
    struct control_route route;
    char id[CONTROL_ID_MAX + 1];
    json_t *args; // the caller's reference; NULL on error
};
// -ENOSYS: no such method and path. -EINVAL: the body; the text names the field.
int control_parse(struct control *control, const char *method, const char *path, const char *body,
                  size_t len, struct control_wish *wish, struct error *err);

// GET /openapi: the routes as an OpenAPI 3.0 document (vmm/openapi.c). Every control has that
// route.
json_t *control_openapi(const struct control_route *routes, unsigned nr);

// Client side: one request to the VM's socket; waits for the reply. `body` may be NULL. `*result`
// is the caller's reference, or NULL for an answer without content. With `on_event` the answer may
// be a stream.
int control_call(const char *socket_path, const char *method, const char *path, json_t *body,
                 json_t **result, void (*on_event)(json_t *event, void *arg), void *arg,
                 struct error *err);

// The answer to a request, read from `in`: bytes of a peer that may be hostile.
int control_answer(FILE *in, json_t **result, void (*on_event)(json_t *event, void *arg), void *arg,
                   struct error *err);

// GET, for a VM that may not answer: -ETIMEDOUT then.
int control_ask(const char *socket_path, const char *path, unsigned timeout_ms, json_t **result,
                struct error *err);

// /run/ferry (or $XDG_RUNTIME_DIR/ferry) + "/NAME.sock". Creates the directory (0700).
int control_path(const char *name, char *path, size_t size, struct error *err);
