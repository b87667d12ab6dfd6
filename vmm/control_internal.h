// SPDX-License-Identifier: Apache-2.0
// Between the command table (control.c) and its transport (control_socket.c).
#pragma once

#include "vmm/control.h"
#include "vmm/loop.h"

struct control {
    struct vm *vm;
    struct control_command *commands;
    unsigned nr_commands;
    int listen_fd;
    char path[108];
    struct loop_watch listen;
    struct control_conn *conns;
};

// Takes one request; answers through `req`, now or later.
void control_dispatch(struct control *c, const char *line, size_t len, struct control_request *req);

// Sends `answer` (reference stolen) to whoever asked; `last` ends the request. Any thread.
void control_answer(struct control_request *req, json_t *answer, bool last);
