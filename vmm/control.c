// SPDX-License-Identifier: Apache-2.0
// The table of commands; knows nothing of sockets.
#include "vmm/control.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/control_internal.h"
#include "vmm/vm.h"

int control_create(struct control **out, struct vm *vm, struct error *err)
{
    struct control *c = calloc(1, sizeof(*c));
    if (!c)
        return error_set(err, -ENOMEM, "no memory for the control commands");
    c->vm = vm;
    c->listen_fd = -1;
    *out = c;
    return 0;
}

int control_add(struct control *c, const struct control_command *commands, unsigned nr,
                void *context, struct error *err)
{
    struct control_command *grown =
        realloc(c->commands, (c->nr_commands + nr) * sizeof(*c->commands));
    if (!grown)
        return error_set(err, -ENOMEM, "no memory for the control commands");
    c->commands = grown;
    for (unsigned i = 0; i < nr; i++) {
        grown[c->nr_commands] = commands[i];
        grown[c->nr_commands++].context = context;
    }
    return 0;
}

static void dispatch_error(struct control_request *req, int code, const char *fmt, const char *arg)
{
    struct error err;
    error_set(&err, code, fmt, arg);
    control_reply_error(req, &err);
}

void control_dispatch(struct control *c, const char *line, size_t len, struct control_request *req)
{
    json_error_t jerr;
    json_t *root = json_loadb(line, len, JSON_REJECT_DUPLICATES, &jerr);
    if (!json_is_object(root)) {
        dispatch_error(req, -EINVAL, "request is not a JSON object: %s",
                       root ? "another type" : jerr.text);
        json_decref(root);
        return;
    }
    const char *name = json_string_value(json_object_get(root, "cmd"));
    json_t *args = json_object_get(root, "args");
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value)
    {
        if (strcmp(key, "cmd") && strcmp(key, "args")) {
            dispatch_error(req, -EINVAL, "request has an unknown member '%s'", key);
            json_decref(root);
            return;
        }
    }
    if (!name || (args && !json_is_object(args))) {
        dispatch_error(req, -EINVAL, "request needs \"cmd\": a string%s",
                       args ? ", and \"args\": an object" : "");
        json_decref(root);
        return;
    }
    for (unsigned i = 0; i < c->nr_commands; i++) {
        if (strcmp(c->commands[i].name, name))
            continue;
        json_t *empty = args ? NULL : json_object();
        c->commands[i].fn(c->vm, args ? args : empty, req, c->commands[i].context);
        json_decref(empty);
        json_decref(root);
        return;
    }
    dispatch_error(req, -ENOSYS, "unknown command '%s'", name);
    json_decref(root);
}

void control_reply_ok(struct control_request *req, json_t *result)
{
    control_answer(req, json_pack("{s:o}", "ok", result ? result : json_object()), true);
}

// JSON takes UTF-8 only; error texts name files and requests, and may be cut inside a character.
static json_t *text_value(const char *text)
{
    json_t *value = json_string(text);
    if (value)
        return value;
    char plain[ERROR_TEXT_MAX];
    size_t len = strnlen(text, sizeof(plain));
    for (size_t i = 0; i < len; i++)
        plain[i] = text[i] & 0x80 ? '?' : text[i];
    return json_stringn(plain, len);
}

void control_reply_error(struct control_request *req, const struct error *err)
{
    control_answer(
        req, json_pack("{s:{s:i,s:o}}", "error", "code", err->code, "text", text_value(err->text)),
        true);
}

void control_event(struct control_request *req, json_t *event)
{
    control_answer(req, json_pack("{s:o}", "event", event), false);
}
