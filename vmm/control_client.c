// SPDX-License-Identifier: Apache-2.0
// The client's side of the control socket.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "vmm/control.h"
#include "vmm/util.h"

static int connect_to(const char *path, struct error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr.sun_path))
        return error_set(err, -ENAMETOOLONG, "socket path %s is too long", path);
    strcpy(addr.sun_path, path);
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return error_errno(err, "control socket");
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)))
        return errno == ENOENT || errno == ECONNREFUSED
                   ? error_set(err, -ENOENT, "no running VM has the control socket %s", path)
                   : error_errno(err, "control socket %s", path);
    return take_fd(&fd);
}

static int error_code(json_t *error)
{
    json_int_t code = json_integer_value(json_object_get(error, "code"));
    return code < 0 && code >= -4095 ? (int)code : -EPROTO; // as the kernel's errno values
}

// The VM may close at any moment: an error then, and no SIGPIPE.
static int request_send(int sock, char *text)
{
    size_t len = strlen(text);
    text[len++] = '\n'; // over the terminating zero: sent by length
    while (len) {
        ssize_t n = send(sock, text, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            return -errno;
        text += n > 0 ? n : 0;
        len -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

// 1 = the last answer (in *result or err), 0 = an event, <0 = broken.
static int take_answer(const char *line, json_t **result,
                       void (*on_event)(json_t *event, void *arg), void *arg, struct error *err)
{
    json_error_t jerr;
    json_t *root = json_loads(line, 0, &jerr);
    json_t *ok = json_object_get(root, "ok"), *error = json_object_get(root, "error"),
           *event = json_object_get(root, "event");
    int ret = 1;
    if (ok && result)
        *result = json_incref(ok);
    else if (event && on_event)
        on_event(event, arg);
    if (event)
        ret = 0;
    else if (error)
        ret = error_set(err, error_code(error), "%s",
                        json_string_value(json_object_get(error, "text")) ?: "no reason");
    else if (!ok)
        ret = error_set(err, -EPROTO, "answer is not understood: %.200s", line);
    json_decref(root);
    return ret;
}

int control_call(const char *path, const char *cmd, json_t *args, json_t **result,
                 void (*on_event)(json_t *event, void *arg), void *arg, struct error *err)
{
    if (result)
        *result = NULL;
    autoclose int fd = connect_to(path, err);
    if (fd < 0)
        return fd;
    json_t *request =
        args ? json_pack("{s:s,s:O}", "cmd", cmd, "args", args) : json_pack("{s:s}", "cmd", cmd);
    autofree char *text = json_dumps(request, JSON_COMPACT);
    json_decref(request);
    if (!text)
        return error_set(err, -ENOMEM, "no memory for the request %s", cmd);
    FILE *in = fdopen(fd, "r+");
    if (!in)
        return error_errno(err, "control socket %s", path);
    int sock = take_fd(&fd); // `in` closes it
    int ret = request_send(sock, text);
    if (ret)
        error_set(err, ret, "control socket %s: %s", path, strerror(-ret));

    autofree char *line = NULL;
    size_t cap = 0;
    while (!ret) {
        if (getline(&line, &cap, in) <= 0)
            ret = error_set(err, -ECONNRESET, "the VM ended before it answered '%s'", cmd);
        else
            ret = take_answer(line, result, on_event, arg, err);
    }
    fclose(in);
    return ret < 0 ? ret : 0;
}
