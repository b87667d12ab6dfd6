// SPDX-License-Identifier: Apache-2.0
#include "vmm/control.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "vmm/http.h"
#include "vmm/probe.h"
#include "vmm/util.h"

enum { LISTENERS_MAX = 2, SUBSCRIBERS_MAX = 64 };

struct control {
    struct loop *loop;
    struct life *life;
    struct http_server *server;
    bool closing;         // loop's thread: late requests are refused
    pthread_mutex_t turn; // held while a route runs
    bool loop_only;       // guarded by turn
    struct histogram latency;
    atomic_uint queued;   // requests on their way to the loop's thread
    pthread_mutex_t lock; // guards routes and subscribers
    struct control_route *routes;
    unsigned nr_routes;
    struct control_request *subscribers[SUBSCRIBERS_MAX];
    unsigned nr_subscribers;
    char paths[LISTENERS_MAX][108];
    unsigned nr_paths;
};

struct control_request {
    struct control *control; // until the route is called
    struct http_exchange *x;
    struct loop_call call;
    struct control_wish wish;
    bool stream, silent;
    uint64_t start_ns;
};

// --- answers

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

static void request_free(struct control_request *req)
{
    FERRY_PROBE3(api_end, req, req->wish.route.method, req->wish.route.path);
    json_decref(req->wish.args);
    free(req);
}

static void line_send(struct http_exchange *x, json_t *line)
{
    autofree char *text = json_dumps(line, JSON_COMPACT);
    json_decref(line);
    if (!text)
        return;
    size_t len = strlen(text);
    text[len] = '\n'; // over the terminating zero: sent by length
    http_chunk(x, text, len + 1);
}

static void json_send(struct http_exchange *x, int status, json_t *json)
{
    autofree char *text = json_dumps(json, JSON_COMPACT);
    json_decref(json);
    http_reply(x, status, "application/json", text ? text : "{}", text ? strlen(text) : 2);
}

static void error_send(struct http_exchange *x, const struct error *err)
{
    json_send(x, 400,
              json_pack("{s:o, s:i}", "fault_message", text_value(err->text), "code", err->code));
}

void control_silence(struct control_request *req)
{
    req->silent = true;
}

void control_reply_ok(struct control_request *req, json_t *result)
{
    if (req->silent) {
        json_decref(result);
        result = NULL;
    }
    if (req->stream) {
        line_send(req->x, json_pack("{s:o}", "ok", result ? result : json_object()));
        http_end(req->x);
    } else if (result) {
        json_send(req->x, 200, result);
    } else {
        http_reply(req->x, 204, NULL, NULL, 0);
    }
    request_free(req);
}

void control_reply_error(struct control_request *req, const struct error *err)
{
    if (req->stream) {
        line_send(req->x, json_pack("{s:{s:i, s:o}}", "error", "code", err->code, "text",
                                    text_value(err->text)));
        http_end(req->x);
    } else {
        error_send(req->x, err);
    }
    request_free(req);
}

void control_reply_text(struct control_request *req, const char *type, const char *text)
{
    http_reply(req->x, 200, type, text, strlen(text));
    request_free(req);
}

void control_event(struct control_request *req, json_t *event)
{
    if (req->stream)
        line_send(req->x, json_pack("{s:o}", "event", event));
    else
        json_decref(event);
}

const char *control_id(const struct control_request *req)
{
    return req->wish.id;
}

// --- subscribers

static void subscriber_end(struct control_request *req)
{
    http_end(req->x);
    request_free(req);
}

void control_subscribe(struct control *c, struct control_request *req)
{
    struct error err;
    pthread_mutex_lock(&c->lock);
    bool room = c->nr_subscribers < SUBSCRIBERS_MAX;
    if (room) {
        req->stream = true;
        c->subscribers[c->nr_subscribers++] = req;
        http_chunk(req->x, "\n", 1); // it has begun
    }
    pthread_mutex_unlock(&c->lock);
    if (!room) {
        error_set(&err, -EBUSY, "%d others follow the events already", SUBSCRIBERS_MAX);
        control_reply_error(req, &err);
    }
}

void control_broadcast(struct control *c, json_t *event)
{
    json_t *line = json_pack("{s:o}", "event", event);
    pthread_mutex_lock(&c->lock);
    for (unsigned i = c->nr_subscribers; i > 0; i--) {
        struct control_request *req = c->subscribers[i - 1];
        if (http_gone(req->x)) {
            c->subscribers[i - 1] = c->subscribers[--c->nr_subscribers];
            subscriber_end(req);
        } else {
            line_send(req->x, json_incref(line));
        }
    }
    pthread_mutex_unlock(&c->lock);
    json_decref(line);
}

// --- the loop's thread

static int state_check(const struct control_request *req, struct error *err)
{
    struct life *life = req->control->life;
    const struct control_route *route = &req->wish.route;
    if (!route->states || !life)
        return 0;
    enum life_state state = life_get(life);
    if (route->states & LIFE_BIT(state))
        return 0;
    return error_set(err, -EPERM, "%s %s: not possible while the VM is %s", route->method,
                     route->path, life_name(state));
}

static void route_run(struct control_request *req)
{
    struct error err;
    struct control *c = req->control;
    uint64_t start = req->start_ns; // the route may free the request
    if (state_check(req, &err))
        control_reply_error(req, &err);
    else
        req->wish.route.fn(req, req->wish.args, req->wish.route.context);
    histogram_add(&c->latency, time_ns() - start);
}

static void request_run(void *arg)
{
    struct control_request *req = arg;
    struct control *c = req->control;
    struct error err;
    pthread_mutex_lock(&c->turn);
    if (c->closing) {
        error_set(&err, -ESHUTDOWN, "the VM has ended");
        control_reply_error(req, &err);
    } else {
        route_run(req);
    }
    pthread_mutex_unlock(&c->turn);
    atomic_fetch_sub(&c->queued, 1);
}

// --- the server's thread

// "/drives/{id}" against a path; what stands for {id} goes to `id`.
static bool path_matches(const char *pattern, const char *path, char id[CONTROL_ID_MAX + 1])
{
    *id = 0;
    for (; *pattern; pattern++) {
        if (*pattern != '{') {
            if (*path++ != *pattern)
                return false;
            continue;
        }
        size_t len = strcspn(path, "/");
        if (!len || len > CONTROL_ID_MAX)
            return false;
        memcpy(id, path, len);
        id[len] = 0;
        path += len;
        pattern = strchr(pattern, '}');
    }
    return !*path;
}

static bool route_find(struct control *c, const char *method, const char *path,
                       struct control_wish *wish)
{
    bool found = false;
    pthread_mutex_lock(&c->lock);
    for (unsigned i = 0; i < c->nr_routes && !found; i++) {
        found =
            !strcmp(c->routes[i].method, method) && path_matches(c->routes[i].path, path, wish->id);
        if (found)
            wish->route = c->routes[i];
    }
    pthread_mutex_unlock(&c->lock);
    return found;
}

static int body_take(struct control_wish *wish, const char *body, size_t len, struct error *err)
{
    const struct control_route *route = &wish->route;
    json_error_t jerr;
    if (!route->fields) {
        if (len)
            return error_set(err, -EINVAL, "%s %s takes no body", route->method, route->path);
        wish->args = json_object();
        return 0;
    }
    wish->args = json_loadb(len ? body : "{}", len ? len : 2, JSON_REJECT_DUPLICATES, &jerr);
    if (!wish->args)
        return error_set(err, -EINVAL, "the body is not JSON: line %d, column %d: %s", jerr.line,
                         jerr.column, jerr.text);
    int ret = schema_check(wish->args, route->fields, err);
    return ret ? error_prefix(err, "%s %s", route->method, route->path) : 0;
}

int control_parse(struct control *c, const char *method, const char *path, const char *body,
                  size_t len, struct control_wish *wish, struct error *err)
{
    *wish = (struct control_wish) {0};
    if (!route_find(c, method, path, wish))
        return error_set(err, -ENOSYS, "Invalid request method and/or path: %s %.200s.", method,
                         path);
    int ret = body_take(wish, body, len, err);
    if (ret) {
        json_decref(wish->args);
        wish->args = NULL;
    }
    return ret;
}

static bool ran_at_once(struct control *c, struct control_request *req)
{
    if (!req->wish.route.at_once || pthread_mutex_trylock(&c->turn))
        return false;
    bool now = !c->loop_only;
    if (now)
        route_run(req);
    pthread_mutex_unlock(&c->turn);
    return now;
}

static void request_arrived(struct http_exchange *x, void *arg)
{
    struct control *c = arg;
    struct error err;
    struct control_request *req = calloc(1, sizeof(*req));
    if (!req) {
        http_reply(x, 503, NULL, NULL, 0);
        return;
    }
    req->control = c;
    req->x = x;
    req->start_ns = time_ns();
    FERRY_PROBE3(api_begin, req, http_method(x), http_path(x));
    size_t len;
    const char *body = http_body(x, &len);
    if (control_parse(c, http_method(x), http_path(x), body, len, &req->wish, &err)) {
        error_send(x, &err);
        request_free(req);
        return;
    }
    req->stream = http_wants_stream(x);
    if (ran_at_once(c, req))
        return;
    req->call = (struct loop_call) {request_run, req, NULL};
    atomic_fetch_add(&c->queued, 1);
    loop_call(c->loop, &req->call);
}

static void get_openapi(struct control_request *req, json_t *args, void *context)
{
    struct control *c = context;
    pthread_mutex_lock(&c->lock);
    json_t *document = control_openapi(c->routes, c->nr_routes);
    pthread_mutex_unlock(&c->lock);
    control_reply_ok(req, document);
}

// --- life

int control_create(struct control **out, struct loop *loop, struct life *life, struct error *err)
{
    struct control *c = calloc(1, sizeof(*c));
    if (!c)
        return error_set(err, -ENOMEM, "no memory for the control API");
    c->loop = loop;
    c->life = life;
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->turn, NULL);
    static const struct control_route own = {"GET", "/openapi",  "this description", 0,
                                             NULL,  get_openapi, .at_once = true};
    int ret = control_add(c, &own, 1, c, err);
    if (!ret)
        ret = http_create(&c->server, request_arrived, c, err);
    if (ret) {
        free(c->routes);
        free(c);
        return ret;
    }
    *out = c;
    return 0;
}

int control_add(struct control *c, const struct control_route *routes, unsigned nr, void *context,
                struct error *err)
{
    pthread_mutex_lock(&c->lock);
    struct control_route *grown = realloc(c->routes, (c->nr_routes + nr) * sizeof(*c->routes));
    for (unsigned i = 0; grown && i < nr; i++) {
        grown[c->nr_routes] = routes[i];
        grown[c->nr_routes++].context = context;
    }
    if (grown)
        c->routes = grown;
    pthread_mutex_unlock(&c->lock);
    return grown ? 0 : error_set(err, -ENOMEM, "no memory for the control API");
}

void control_remove(struct control *c, const void *context)
{
    pthread_mutex_lock(&c->lock);
    unsigned kept = 0;
    for (unsigned i = 0; i < c->nr_routes; i++)
        if (c->routes[i].context != context)
            c->routes[kept++] = c->routes[i];
    c->nr_routes = kept;
    pthread_mutex_unlock(&c->lock);
}

int control_listen(struct control *c, const char *path, struct error *err)
{
    int fd;
    int ret = http_listen(path, &fd, err);
    return ret ? ret : control_take(c, fd, path, err);
}

int control_take(struct control *c, int fd, const char *path, struct error *err)
{
    if (c->nr_paths == LISTENERS_MAX) {
        close(fd);
        unlink(path);
        return error_set(err, -E2BIG, "at most %d API sockets", LISTENERS_MAX);
    }
    strcpy(c->paths[c->nr_paths++], path); // http_listen has seen to its length
    return http_add_listener(c->server, fd, err);
}

void control_confine(struct control *c, enum seccomp_mode mode)
{
    http_confine(c->server, mode);
}

int control_take_reader(struct control *c, int fd, const char *path, struct error *err)
{
    return http_add_reader(c->server, fd, path, err);
}

int control_start(struct control *c, struct error *err)
{
    return http_start(c->server, err);
}

const struct histogram *control_latency(const struct control *c)
{
    return &c->latency;
}

void control_loop_only(struct control *c)
{
    pthread_mutex_lock(&c->turn);
    c->loop_only = true;
    pthread_mutex_unlock(&c->turn);
}

void control_destroy(struct control *c)
{
    if (!c)
        return;
    for (unsigned i = 0; i < c->nr_paths; i++)
        unlink(c->paths[i]);
    control_loop_only(c);
    // What has arrived is answered while the server still works.
    c->closing = true;
    while (atomic_load(&c->queued) && !loop_turn(c->loop, true, NULL))
        ;
    for (unsigned i = 0; i < c->nr_subscribers; i++)
        subscriber_end(c->subscribers[i]);
    http_destroy(c->server);
    while (atomic_load(&c->queued) && !loop_turn(c->loop, true, NULL))
        ;
    pthread_mutex_destroy(&c->lock);
    pthread_mutex_destroy(&c->turn);
    free(c->routes);
    free(c);
}

int control_path(const char *name, char *path, size_t size, struct error *err)
{
    bool plain = *name && *name != '.' && strlen(name) <= 63;
    for (const char *p = name; *p; p++)
        plain &= *p != '/' && (unsigned char)*p >= ' ' && *p != 0x7f;
    if (!plain)
        return error_set(err, -EINVAL,
                         "VM name '%s': expected 1 to 63 characters, no '/', no control "
                         "characters, not starting with '.'",
                         name);
    const char *dir = getenv("FERRY_RUN_DIR"), *user = getenv("XDG_RUNTIME_DIR");
    char base[256];
    if (dir && *dir)
        snprintf(base, sizeof(base), "%s", dir);
    else if (geteuid() == 0 || !user || !*user)
        snprintf(base, sizeof(base), "/run/ferry");
    else
        snprintf(base, sizeof(base), "%s/ferry", user);
    if (mkdir(base, 0700) && errno != EEXIST)
        return error_errno(err, "directory %s for control sockets (FERRY_RUN_DIR sets another)",
                           base);
    if ((size_t)snprintf(path, size, "%s/%s.sock", base, name) >= size)
        return error_set(err, -ENAMETOOLONG, "control socket of VM %s: path too long", name);
    return 0;
}
