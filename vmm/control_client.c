// SPDX-License-Identifier: Apache-2.0
// The client's side of the control API: one request on a connection of its own. It reads what our
// server sends: a status line, headers, and a body with a length or in chunks.
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "vmm/control.h"
#include "vmm/util.h"

enum {
    ANSWER_MAX = 64 * 1024 * 1024, // bytes of a body or chunk
    LINE_MAX_LEN = 8192,           // of a header, or of a chunk's length
    HEADERS_MAX = 100,
};

struct answer {
    FILE *in;
    int status;
    bool chunked, stream;
    long long length; // -1: not said
};

static int connect_to(const char *path, unsigned timeout_ms, struct error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr.sun_path))
        return error_set(err, -ENAMETOOLONG, "socket path %s is too long", path);
    strcpy(addr.sun_path, path);
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return error_errno(err, "control socket");
    const struct timeval patience = {.tv_sec = timeout_ms / 1000,
                                     .tv_usec = timeout_ms % 1000 * 1000}; // 0: for ever
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)))
        return errno == ENOENT || errno == ECONNREFUSED
                   ? error_set(err, -ENOENT, "no running VM has the control socket %s", path)
                   : error_errno(err, "control socket %s", path);
    return take_fd(&fd);
}

// The VM may close at any moment: an error then, and no SIGPIPE.
static int send_all(int sock, const char *text, struct error *err)
{
    for (size_t len = strlen(text); len;) {
        ssize_t n = send(sock, text, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            return error_errno(err, "control socket");
        text += n > 0 ? n : 0;
        len -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

static int request_send(int sock, const char *method, const char *path, json_t *body, bool stream,
                        struct error *err)
{
    autofree char *json = body ? json_dumps(body, JSON_COMPACT) : NULL;
    autofree char *text = NULL;
    if (asprintf(&text,
                 "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: %s\r\n"
                 "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                 method, path, stream ? "application/x-ndjson" : "application/json",
                 json ? strlen(json) : 0, json ? json : "") < 0)
        return error_set(err, -ENOMEM, "no memory for the request %s", path);
    return send_all(sock, text, err);
}

static int ended(struct error *err)
{
    if (errno == EAGAIN)
        return error_set(err, -ETIMEDOUT, "the VM does not answer");
    if (errno == EMSGSIZE)
        return error_set(err, -EMSGSIZE, "answer has a line above %d bytes", LINE_MAX_LEN - 2);
    return error_set(err, -ECONNRESET, "the VM ended before it answered");
}

// A line without its end. False: none came; errno is EMSGSIZE when it was too long.
static bool line_read(struct answer *a, char line[LINE_MAX_LEN])
{
    errno = 0;
    if (!fgets(line, LINE_MAX_LEN, a->in))
        return false;
    size_t n = strlen(line);
    if (n == LINE_MAX_LEN - 1 && line[n - 1] != '\n') {
        errno = EMSGSIZE;
        return false;
    }
    while (n && (line[n - 1] == '\n' || line[n - 1] == '\r'))
        line[--n] = 0;
    return true;
}

static int header_take(struct answer *a, char *line, struct error *err)
{
    char *value = strchr(line, ':');
    if (!value)
        return error_set(err, -EPROTO, "answer has a bad header: %.100s", line);
    *value++ = 0;
    while (*value == ' ')
        value++;
    if (!strcasecmp(line, "Content-Length"))
        a->length = strtoll(value, NULL, 10);
    else if (!strcasecmp(line, "Transfer-Encoding"))
        a->chunked = !strcasecmp(value, "chunked");
    else if (!strcasecmp(line, "Content-Type"))
        a->stream = !strcasecmp(value, "application/x-ndjson");
    return 0;
}

static int head_read(struct answer *a, struct error *err)
{
    char line[LINE_MAX_LEN];
    if (!line_read(a, line))
        return ended(err);
    if (sscanf(line, "HTTP/1.%*d %3d", &a->status) != 1)
        return error_set(err, -EPROTO, "answer is not HTTP: %.100s", line);
    for (unsigned i = 0; i <= HEADERS_MAX; i++) {
        if (!line_read(a, line))
            return ended(err);
        if (!*line)
            return 0;
        int ret = header_take(a, line, err);
        if (ret)
            return ret;
    }
    return error_set(err, -EMSGSIZE, "answer has more than %d headers", HEADERS_MAX);
}

// One piece of the body; the caller frees it, also after an error. 0: the body has ended, 1: a
// piece, < 0: an error.
static int piece_read(struct answer *a, char **piece, size_t *len, struct error *err)
{
    char line[LINE_MAX_LEN];
    long long want = a->length;
    if (a->chunked) {
        char *end;
        if (!line_read(a, line))
            return ended(err);
        want = strtoll(line, &end, 16);
        if (end == line)
            return error_set(err, -EPROTO, "answer has a bad chunk: %.60s", line);
    }
    a->length = 0;
    if (!want)
        return 0;
    if (want < 0)
        return error_set(err, -EPROTO, "answer says nothing of its length");
    if (want > ANSWER_MAX)
        return error_set(err, -EMSGSIZE, "answer of %lld bytes", want);
    *piece = malloc((size_t)want + 1);
    if (!*piece)
        return error_set(err, -ENOMEM, "no memory for the answer");
    errno = 0;
    *len = fread(*piece, 1, (size_t)want, a->in);
    (*piece)[*len] = 0;
    if (*len < (size_t)want)
        return ended(err);
    if (a->chunked)
        line_read(a, line); // the end of the chunk; where none is, the next piece says so
    return 1;
}

static int error_code(json_t *code)
{
    json_int_t n = json_integer_value(code);
    return n < 0 && n >= -4095 ? (int)n : -EPROTO; // as the kernel's errno values
}

static int failed(json_t *object, const char *text, struct error *err)
{
    const char *why = json_string_value(json_object_get(object, text));
    return error_set(err, error_code(json_object_get(object, "code")), "%s",
                     why && *why ? why : "the VM gives no reason");
}

static int plain_take(struct answer *a, json_t **result, struct error *err)
{
    autofree char *text = NULL;
    size_t len = 0;
    int ret = a->status == 204 ? 0 : piece_read(a, &text, &len, err);
    if (ret < 0)
        return ret;
    json_t *json = ret ? json_loadb(text, len, JSON_DECODE_ANY, NULL) : NULL;
    if (a->status >= 300) {
        ret = json ? failed(json, "fault_message", err)
                   : error_set(err, -EPROTO, "the VM answered with status %d", a->status);
    } else {
        ret = 0;
        if (result && json)
            *result = json_incref(json);
        else if (result && text && *text)
            *result = json_string(text);
    }
    json_decref(json);
    return ret;
}

// 1 = the last line (in *result or err), 0 = an event, < 0 = broken.
static int line_take(const char *line, json_t **result, void (*on_event)(json_t *, void *),
                     void *arg, struct error *err)
{
    if (*line == '\n')
        return 0; // a stream that has begun, and has nothing yet
    json_t *root = json_loads(line, 0, NULL);
    json_t *ok = json_object_get(root, "ok"), *error = json_object_get(root, "error"),
           *event = json_object_get(root, "event");
    int ret = 1;
    if (event) {
        on_event(event, arg);
        ret = 0;
    } else if (error) {
        ret = failed(error, "text", err);
    } else if (!ok) {
        ret = error_set(err, -EPROTO, "answer is not understood: %.200s", line);
    } else if (result) {
        *result = json_incref(ok);
    }
    json_decref(root);
    return ret;
}

// The server sends whole lines as chunks.
static int stream_take(struct answer *a, json_t **result, void (*on_event)(json_t *, void *),
                       void *arg, struct error *err)
{
    for (;;) {
        autofree char *text = NULL;
        size_t len;
        int ret = piece_read(a, &text, &len, err);
        if (ret <= 0)
            return ret ? ret : ended(err);
        ret = line_take(text, result, on_event, arg, err);
        if (ret)
            return ret < 0 ? ret : 0;
    }
}

int control_answer(FILE *in, json_t **result, void (*on_event)(json_t *event, void *arg), void *arg,
                   struct error *err)
{
    struct answer a = {.in = in, .length = -1};
    int ret = head_read(&a, err);
    if (ret)
        return ret;
    return a.stream && on_event ? stream_take(&a, result, on_event, arg, err)
                                : plain_take(&a, result, err);
}

static int call(const char *socket_path, unsigned timeout_ms, const char *method, const char *path,
                json_t *body, json_t **result, void (*on_event)(json_t *event, void *arg),
                void *arg, struct error *err)
{
    if (result)
        *result = NULL;
    errno = 0;
    autoclose int fd = connect_to(socket_path, timeout_ms, err);
    if (fd < 0)
        return fd;
    int ret = request_send(fd, method, path, body, on_event, err);
    if (ret)
        return ret;
    FILE *in = fdopen(fd, "r");
    if (!in)
        return error_errno(err, "control socket %s", socket_path);
    take_fd(&fd); // `in` closes it
    ret = control_answer(in, result, on_event, arg, err);
    fclose(in);
    return ret;
}

int control_call(const char *socket_path, const char *method, const char *path, json_t *body,
                 json_t **result, void (*on_event)(json_t *event, void *arg), void *arg,
                 struct error *err)
{
    return call(socket_path, 0, method, path, body, result, on_event, arg, err);
}

int control_ask(const char *socket_path, const char *path, unsigned timeout_ms, json_t **result,
                struct error *err)
{
    return call(socket_path, timeout_ms, "GET", path, NULL, result, NULL, NULL, err);
}
