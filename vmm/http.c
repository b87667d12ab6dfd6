// SPDX-License-Identifier: Apache-2.0
#include "vmm/http.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/http.h>
#include <event2/keyvalq_struct.h>
#include <event2/listener.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "vmm/listen.h"
#include "vmm/util.h"

// An answer on its way to the server's thread.
struct message {
    struct message *next;
    struct http_exchange *x;
    enum { REPLY, CHUNK, END } kind;
    int status;
    const char *type; // a literal
    size_t len;
    bool has_body;
    char body[];
};

// What threads that answer share with the server. It outlives the server while exchanges exist.
struct mailbox {
    pthread_mutex_t lock;
    struct message *first, **tail;
    bool closed;
    int wake_fd;
    _Atomic pthread_t server; // 0 until it runs
    atomic_uint refs;         // the server's and each exchange's
};

struct http_exchange {
    struct mailbox *box;
    struct http_server *server; // server's thread only
    struct evhttp_request *req; // NULL: the client has left. Server's thread only
    atomic_bool gone;
    bool streaming, wants_stream;
    const char *method;
    char *path, *body;
    size_t body_len;
};

struct http_server {
    struct event_base *base;
    struct evhttp *http, *reader; // of clients that may ask anything, or one thing
    const char *reader_path;
    struct event *wake;
    struct mailbox *box;
    http_handler fn;
    void *arg;
    pthread_t thread;
    bool started, stopping;
    enum seccomp_mode seccomp;
    unsigned writing; // answers whose last byte is still to be sent
};

static void box_put(struct mailbox *box)
{
    if (atomic_fetch_sub(&box->refs, 1) > 1)
        return;
    close(box->wake_fd);
    pthread_mutex_destroy(&box->lock);
    free(box);
}

static void exchange_free(struct http_exchange *x)
{
    box_put(x->box);
    free(x->path);
    free(x->body);
    free(x);
}

// --- the server's thread

static void client_left(struct evhttp_connection *conn, void *arg)
{
    struct http_exchange *x = arg;
    // libevent frees a request with its connection, but not one that it has taken off it because
    // the client left in the middle of an answer: that one is ours.
    if (!evhttp_request_get_connection(x->req))
        evhttp_request_free(x->req);
    x->req = NULL;
    atomic_store(&x->gone, true);
}

static void answer_written(struct evhttp_request *req, void *arg)
{
    struct http_server *s = arg;
    s->writing--;
    if (s->stopping && !s->writing)
        event_base_loopbreak(s->base);
}

static void headers_set(struct evhttp_request *req, const char *type)
{
    struct evkeyvalq *headers = evhttp_request_get_output_headers(req);
    evhttp_add_header(headers, "Server", "ferry");
    if (type)
        evhttp_add_header(headers, "Content-Type", type);
}

// A connection that neither asks nor is being answered ends after a while; an answer may take any
// time, and a stream may be silent for as long.
static void idle_limit(struct evhttp_connection *conn, bool on)
{
    const struct timeval idle = {.tv_sec = HTTP_IDLE_S};
    bufferevent_set_timeouts(evhttp_connection_get_bufferevent(conn), on ? &idle : NULL,
                             on ? &idle : NULL);
}

static void exchange_detach(struct http_exchange *x)
{
    struct evhttp_connection *conn = evhttp_request_get_connection(x->req);
    if (!conn)
        return;
    evhttp_connection_set_closecb(conn, NULL, NULL);
    idle_limit(conn, true);
}

static void reply_send(struct http_server *s, struct http_exchange *x, const struct message *m)
{
    struct evbuffer *body = evbuffer_new();
    if (body && m->has_body)
        evbuffer_add(body, m->body, m->len);
    headers_set(x->req, m->type);
    exchange_detach(x);
    s->writing++;
    evhttp_request_set_on_complete_cb(x->req, answer_written, s);
    evhttp_send_reply(x->req, m->status, NULL, body);
    if (body)
        evbuffer_free(body);
}

static size_t backlog(struct http_exchange *x)
{
    struct evhttp_connection *conn = evhttp_request_get_connection(x->req);
    return evbuffer_get_length(bufferevent_get_output(evhttp_connection_get_bufferevent(conn)));
}

static void chunk_send(struct http_exchange *x, const struct message *m)
{
    if (!x->streaming) {
        x->streaming = true;
        headers_set(x->req, "application/x-ndjson");
        evhttp_send_reply_start(x->req, 200, NULL);
    }
    if (backlog(x) > HTTP_BACKLOG_MAX) {                               // it does not read
        evhttp_connection_free(evhttp_request_get_connection(x->req)); // calls client_left
        return;
    }
    struct evbuffer *data = evbuffer_new();
    if (!data)
        return;
    evbuffer_add(data, m->body, m->len);
    evhttp_send_reply_chunk(x->req, data);
    evbuffer_free(data);
}

static void stream_end(struct http_server *s, struct http_exchange *x)
{
    if (!x->streaming) {
        headers_set(x->req, "application/x-ndjson");
        evhttp_send_reply_start(x->req, 200, NULL);
    }
    exchange_detach(x);
    s->writing++;
    evhttp_request_set_on_complete_cb(x->req, answer_written, s);
    evhttp_send_reply_end(x->req);
}

static void message_handle(struct http_server *s, struct message *m)
{
    struct http_exchange *x = m->x;
    if (x->req && m->kind == CHUNK)
        chunk_send(x, m);
    else if (x->req && m->kind == REPLY && !x->streaming)
        reply_send(s, x, m);
    else if (x->req && m->kind != CHUNK)
        stream_end(s, x);
    if (m->kind != CHUNK)
        exchange_free(x);
    free(m);
}

static void drain_time_over(evutil_socket_t fd, short what, void *arg)
{
    event_base_loopbreak(arg);
}

static void mailbox_ready(evutil_socket_t fd, short what, void *arg)
{
    struct http_server *s = arg;
    uint64_t count;
    if (read(fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return;
    pthread_mutex_lock(&s->box->lock);
    struct message *m = s->box->first;
    s->box->first = NULL;
    s->box->tail = &s->box->first;
    s->stopping = s->box->closed;
    pthread_mutex_unlock(&s->box->lock);
    while (m) {
        struct message *next = m->next;
        message_handle(s, m);
        m = next;
    }
    if (!s->stopping)
        return;
    const struct timeval second = {.tv_sec = 1};
    if (!s->writing || event_base_once(s->base, -1, EV_TIMEOUT, drain_time_over, s->base, &second))
        event_base_loopbreak(s->base);
}

static const char *method_name(enum evhttp_cmd_type type)
{
    switch (type) {
    case EVHTTP_REQ_GET:
        return "GET";
    case EVHTTP_REQ_PUT:
        return "PUT";
    case EVHTTP_REQ_PATCH:
        return "PATCH";
    case EVHTTP_REQ_POST:
        return "POST";
    case EVHTTP_REQ_DELETE:
        return "DELETE";
    default:
        return "?";
    }
}

static struct http_exchange *exchange_new(struct http_server *s, struct evhttp_request *req,
                                          const char *path)
{
    struct http_exchange *x = calloc(1, sizeof(*x));
    if (!x)
        return NULL;
    struct evbuffer *in = evhttp_request_get_input_buffer(req);
    const char *accept = evhttp_find_header(evhttp_request_get_input_headers(req), "Accept");
    x->box = s->box;
    atomic_fetch_add(&s->box->refs, 1);
    x->server = s;
    x->req = req;
    x->method = method_name(evhttp_request_get_command(req));
    x->wants_stream = accept && strstr(accept, "application/x-ndjson");
    x->path = evhttp_uridecode(path && *path ? path : "/", 0, NULL);
    x->body_len = evbuffer_get_length(in);
    x->body = malloc(x->body_len + 1);
    if (!x->path || !x->body) {
        exchange_free(x);
        return NULL;
    }
    evbuffer_remove(in, x->body, x->body_len);
    x->body[x->body_len] = 0;
    return x;
}

static void request_take(struct http_server *s, struct evhttp_request *req, const char *path)
{
    struct http_exchange *x = exchange_new(s, req, path);
    if (!x) {
        evhttp_send_error(req, HTTP_SERVUNAVAIL, NULL);
        return;
    }
    evhttp_connection_set_closecb(evhttp_request_get_connection(req), client_left, x);
    idle_limit(evhttp_request_get_connection(req), false);
    s->fn(x, s->arg);
}

static void request_arrived(struct evhttp_request *req, void *arg)
{
    request_take(arg, req, evhttp_uri_get_path(evhttp_request_get_evhttp_uri(req)));
}

static void reader_arrived(struct evhttp_request *req, void *arg)
{
    struct http_server *s = arg;
    const char *path = evhttp_uri_get_path(evhttp_request_get_evhttp_uri(req));
    if (!path || (strcmp(path, "/metrics") && strcmp(path, s->reader_path))) {
        evhttp_send_error(req, HTTP_NOTFOUND, NULL);
        return;
    }
    request_take(s, req, s->reader_path);
}

static void *server_main(void *arg)
{
    struct http_server *s = arg;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    pthread_setname_np(pthread_self(), "http");
    thread_prompt();
    atomic_store(&s->box->server, pthread_self());
    tzset(); // opens files; the first Date header would
    seccomp_enter_or_abort(SECCOMP_HTTP, s->seccomp);
    event_base_loop(s->base, EVLOOP_NO_EXIT_ON_EMPTY);
    atomic_store(&s->box->server, 0); // another thread may get that name
    return NULL;
}

// --- any thread

static void message_post(struct http_exchange *x, int kind, int status, const char *type,
                         const char *body, size_t len)
{
    struct mailbox *box = x->box;
    struct message *m = malloc(sizeof(*m) + len);
    if (!m)
        return; // the client sees its connection end with the VM
    *m = (struct message) {
        .x = x, .kind = kind, .status = status, .type = type, .len = len, .has_body = body};
    if (len)
        memcpy(m->body, body, len);
    if (kind == REPLY && atomic_load(&box->server) == pthread_self()) { // nothing went before it
        message_handle(x->server, m);
        return;
    }
    pthread_mutex_lock(&box->lock);
    bool closed = box->closed;
    if (!closed) {
        *box->tail = m;
        box->tail = &m->next;
        uint64_t one = 1;
        if (write(box->wake_fd, &one, sizeof(one)) < 0)
            closed = false; // the counter is full: it is awake
    }
    pthread_mutex_unlock(&box->lock);
    if (closed) {
        if (kind != CHUNK)
            exchange_free(x);
        free(m);
    }
}

void http_reply(struct http_exchange *x, int status, const char *type, const char *body, size_t len)
{
    message_post(x, REPLY, status, type, body, len);
}

void http_chunk(struct http_exchange *x, const char *data, size_t len)
{
    message_post(x, CHUNK, 0, NULL, data, len);
}

void http_end(struct http_exchange *x)
{
    message_post(x, END, 0, NULL, NULL, 0);
}

bool http_gone(const struct http_exchange *x)
{
    return atomic_load(&x->gone);
}

const char *http_method(const struct http_exchange *x)
{
    return x->method;
}

const char *http_path(const struct http_exchange *x)
{
    return x->path;
}

const char *http_body(const struct http_exchange *x, size_t *len)
{
    *len = x->body_len;
    return x->body;
}

bool http_wants_stream(const struct http_exchange *x)
{
    return x->wants_stream;
}

// --- life

// A socket file nobody listens on is what a killed VM leaves; it must not block the next.
static int remove_stale(const char *path, const struct sockaddr_un *addr, struct error *err)
{
    struct stat st;
    if (lstat(path, &st))
        return 0;
    if (!S_ISSOCK(st.st_mode))
        return error_set(err, -EEXIST, "%s exists and is not a socket", path);
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && !connect(fd, (const struct sockaddr *)addr, sizeof(*addr)))
        return error_set(err, -EADDRINUSE, "%s: somebody listens there already", path);
    if (unlink(path))
        return error_errno(err, "removing stale socket %s", path);
    return 0;
}

int http_listen(const char *path, int *out, struct error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (!*path || strlen(path) >= sizeof(addr.sun_path))
        return error_set(err, -ENAMETOOLONG, "socket path '%s': expected 1 to %zu characters", path,
                         sizeof(addr.sun_path) - 1);
    strcpy(addr.sun_path, path);
    int ret = remove_stale(path, &addr, err);
    if (ret)
        return ret;
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_errno(err, "API socket");
    // fchmod before bind narrows the socket file itself.
    if (fchmod(fd, 0600) || listen_unix(fd, &addr, 128))
        return error_errno(err, "API socket %s", path);
    *out = take_fd(&fd);
    return 0;
}

// Host and port of "[HOST:]PORT".
static int address_split(const char *address, char host[64], const char **port)
{
    const char *colon = strrchr(address, ':'), *begin = address;
    size_t len = colon ? (size_t)(colon - address) : 0;
    *port = colon ? colon + 1 : address;
    if (len > 1 && *begin == '[' && begin[len - 1] == ']') {
        begin++;
        len -= 2;
    }
    if (len >= 64)
        return -EINVAL;
    snprintf(host, 64, "%.*s", colon ? (int)len : 9, colon ? begin : "127.0.0.1");
    unsigned long number = strtoul(*port, NULL, 10); // getaddrinfo takes more than there are
    return *host && strspn(*port, "0123456789") == strlen(*port) && number && number <= 65535
               ? 0
               : -EINVAL;
}

int http_listen_tcp(const char *address, int *out, struct error *err)
{
    const struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV,
                                   .ai_socktype = SOCK_STREAM};
    struct addrinfo *found;
    char host[64];
    const char *port;
    const int one = 1;
    const char *rest = strncmp(address, "tcp:", 4) ? address : address + 4;
    if (address_split(rest, host, &port) || getaddrinfo(host, port, &hints, &found))
        return error_set(err, -EINVAL, "'%s': expected [tcp:][ADDRESS:]PORT, e.g. 9100", address);
    autoclose int fd =
        socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP);
    int ret = fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
                      bind(fd, found->ai_addr, found->ai_addrlen) || listen(fd, 128)
                  ? error_errno(err, "%s", address)
                  : 0;
    freeaddrinfo(found);
    if (!ret)
        *out = take_fd(&fd);
    return ret;
}

static struct mailbox *mailbox_new(void)
{
    struct mailbox *box = calloc(1, sizeof(*box));
    if (!box)
        return NULL;
    pthread_mutex_init(&box->lock, NULL);
    box->tail = &box->first;
    atomic_init(&box->refs, 1);
    box->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return box;
}

static struct event_base *base_new(void)
{
    struct event_config *config = event_config_new();
    if (!config)
        return NULL;
    event_config_set_flag(config, EVENT_BASE_FLAG_NOLOCK);
    struct event_base *base = event_base_new_with_config(config);
    event_config_free(config);
    return base;
}

static void limits_set(struct evhttp *http, ev_uint16_t methods)
{
    evhttp_set_allowed_methods(http, methods);
    evhttp_set_max_body_size(http, HTTP_BODY_MAX);
    evhttp_set_max_headers_size(http, HTTP_HEADER_MAX);
    evhttp_set_timeout(http, HTTP_IDLE_S);
}

int http_create(struct http_server **out, http_handler fn, void *arg, struct error *err)
{
    struct http_server *s = calloc(1, sizeof(*s));
    if (!s || !(s->box = mailbox_new())) {
        free(s);
        return error_set(err, -ENOMEM, "no memory for the HTTP server");
    }
    s->fn = fn;
    s->arg = arg;
    s->base = base_new();
    s->http = s->base ? evhttp_new(s->base) : NULL;
    s->wake = s->http && s->box->wake_fd >= 0
                  ? event_new(s->base, s->box->wake_fd, EV_READ | EV_PERSIST, mailbox_ready, s)
                  : NULL;
    if (!s->wake || event_add(s->wake, NULL)) {
        http_destroy(s);
        return error_set(err, -ENOMEM, "the HTTP server cannot be created");
    }
    limits_set(s->http, EVHTTP_REQ_GET | EVHTTP_REQ_PUT | EVHTTP_REQ_PATCH | EVHTTP_REQ_POST |
                            EVHTTP_REQ_DELETE);
    evhttp_set_gencb(s->http, request_arrived, s);
    *out = s;
    return 0;
}

int http_add_listener(struct http_server *s, int fd, struct error *err)
{
    if (!evhttp_accept_socket(s->http, fd))
        return 0;
    close(fd);
    return error_set(err, -ENOMEM, "the HTTP server cannot listen");
}

int http_add_reader(struct http_server *s, int fd, const char *path, struct error *err)
{
    if (!s->reader) {
        s->reader = evhttp_new(s->base);
        s->reader_path = path;
    }
    if (!s->reader || evhttp_accept_socket(s->reader, fd)) {
        close(fd);
        return error_set(err, -ENOMEM, "the HTTP server cannot listen");
    }
    limits_set(s->reader, EVHTTP_REQ_GET);
    evhttp_set_gencb(s->reader, reader_arrived, s);
    return 0;
}

void http_confine(struct http_server *s, enum seccomp_mode mode)
{
    s->seccomp = mode;
}

int http_start(struct http_server *s, struct error *err)
{
    int ret = pthread_create(&s->thread, NULL, server_main, s);
    s->started = !ret;
    return ret ? error_set(err, -ret, "HTTP thread: %s", strerror(ret)) : 0;
}

void http_destroy(struct http_server *s)
{
    if (!s)
        return;
    uint64_t one = 1;
    pthread_mutex_lock(&s->box->lock);
    s->box->closed = true;
    pthread_mutex_unlock(&s->box->lock);
    if (s->started && write(s->box->wake_fd, &one, sizeof(one)) == sizeof(one))
        pthread_join(s->thread, NULL);
    for (struct message *m = s->box->first, *next; m; m = next) { // never started
        next = m->next;
        message_handle(s, m);
    }
    if (s->http)
        evhttp_free(s->http);
    if (s->reader)
        evhttp_free(s->reader);
    if (s->wake)
        event_free(s->wake);
    if (s->base)
        event_base_free(s->base);
    box_put(s->box);
    free(s);
}
