// SPDX-License-Identifier: Apache-2.0
// The commands a VM takes from outside, in one table, apart from the transport that carries them
// (vmm/control_socket.c: one JSON object a line on a Unix socket).
//
//   request  {"cmd": "pause", "args": {...}}
//   progress {"event": {...}}               zero or more, while a long command works
//   reply    {"ok": {...}}  or  {"error": {"code": -22, "text": "..."}}
#pragma once

#include <jansson.h>
#include <stdbool.h>

#include "vmm/error.h"

struct vm;
struct control_request;

struct control_command {
    const char *name;
    const char *help;
    // Called in the loop's thread; `args` is a JSON object (borrowed). Short commands answer before
    // they return; long ones start a thread and answer later, from any thread. Each request gets
    // exactly one control_reply_*.
    void (*fn)(struct vm *vm, json_t *args, struct control_request *req, void *context);
    void *context; // given back to fn
};

// Steal the reference of the JSON value.
void control_reply_ok(struct control_request *req, json_t *result);
void control_reply_error(struct control_request *req, const struct error *err);
void control_event(struct control_request *req, json_t *event);

struct control; // a table of commands and, once listening, the socket

int control_create(struct control **control, struct vm *vm, struct error *err);
int control_add(struct control *control, const struct control_command *commands, unsigned nr,
                void *context, struct error *err);
int control_listen(struct control *control, const char *path, struct error *err);
void control_destroy(struct control *control); // also removes the socket

// Client side: sends one command to the VM's socket and waits for the reply. `*result` is the "ok"
// object (caller's reference). `on_event` may be NULL.
int control_call(const char *socket_path, const char *cmd, json_t *args, json_t **result,
                 void (*on_event)(json_t *event, void *arg), void *arg, struct error *err);

// /run/ferry (or $XDG_RUNTIME_DIR/ferry) + "/NAME.sock". Creates the directory (0700).
int control_path(const char *name, char *path, size_t size, struct error *err);
