// SPDX-License-Identifier: Apache-2.0
#include "migrate/commands.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "migrate/snapshot.h"
#include "vmm/vm.h"

struct migrate_commands {
    struct vm *vm;
    struct control *control;
    struct life *life;
    const struct migrate_hooks *hooks;
    struct migration m;

    pthread_mutex_t lock; // guards what follows
    bool working;         // the thread runs
    bool started;         // the thread must be joined
    pthread_t thread;
    struct control_request *req; // of the long command
    struct migrate_params params;
    char *target;    // address or path
    struct tls *tls; // of params
    struct snapshot_params snapshot;
    char *parent; // of the snapshot
    struct snapshot_track track;
    struct migrate_report report;
    bool have_report;
    struct error last; // why the last migration failed
};

// --- JSON

static json_t *json_count(uint64_t value)
{
    return json_integer(value > INT64_MAX ? INT64_MAX : (json_int_t)value);
}

struct count {
    const char *name;
    uint64_t value;
};

static json_t *json_counts(const struct count *counts, size_t nr)
{
    json_t *object = json_object();
    for (size_t i = 0; i < nr; i++)
        json_object_set_new(object, counts[i].name, json_count(counts[i].value));
    return object;
}

static json_t *json_progress(const struct migrate_progress *p)
{
    const struct count counts[] = {
        {"round", p->round},
        {"total_bytes", p->total_bytes},
        {"sent_bytes", p->sent_bytes},
        {"round_bytes", p->round_bytes},
        {"remaining_bytes", p->remaining_bytes},
        {"dirty_bytes", p->dirty_bytes},
        {"dirty_rate", p->dirty_rate},
        {"throttle_percent", p->throttle},
        {"balloon_bytes", p->balloon_bytes},
        {"bandwidth", p->bandwidth},
        {"disk_bytes", p->disk_bytes},
        {"disk_sent_bytes", p->disk_sent_bytes},
    };
    json_t *object = json_counts(counts, ARRAY_SIZE(counts));
    json_object_set_new(object, "phase", json_string(migrate_phase_name(p->phase)));
    if (p->expected_downtime_ns && p->expected_downtime_ns != UINT64_MAX)
        json_object_set_new(object, "expected_downtime_us",
                            json_count(p->expected_downtime_ns / 1000));
    if (p->time_left_ns != UINT64_MAX)
        json_object_set_new(object, "time_left_us", json_count(p->time_left_ns / 1000));
    return object;
}

// How long the guest waited for what it asked for; `histogram` has [from us, count] pairs.
static json_t *json_latency(const struct wire_faults *f)
{
    const struct count counts[] = {
        {"p50", wire_latency_percentile(f, 50)},
        {"p90", wire_latency_percentile(f, 90)},
        {"p99", wire_latency_percentile(f, 99)},
        {"max", f->max_ns / 1000},
    };
    json_t *object = json_counts(counts, ARRAY_SIZE(counts)), *histogram = json_array();
    for (unsigned i = 0; i < WIRE_LATENCY_BUCKETS; i++)
        if (f->count[i])
            json_array_append_new(histogram, json_pack("[I,I]", (json_int_t)wire_latency_us(i),
                                                       (json_int_t)f->count[i]));
    json_object_set_new(object, "histogram", histogram);
    return object;
}

static json_t *json_report(const struct migrate_report *r)
{
    const struct count counts[] = {
        {"rounds", r->rounds},
        {"data_pages", r->data_pages},
        {"zero_pages", r->zero_pages},
        {"free_pages", r->free_pages},
        {"balloon_bytes", r->balloon_bytes},
        {"balloon_us", r->balloon_ns / 1000},
        {"lz4_pages", r->lz4_pages},
        {"lz4_bytes", r->lz4_bytes},
        {"delta_pages", r->delta_pages},
        {"delta_bytes", r->delta_bytes},
        {"pushed_pages", r->pushed_pages},
        {"demand_pages", r->demand_pages},
        {"discarded_pages", r->discarded_pages},
        {"connections", r->connections},
        {"recoveries", r->recoveries},
        {"throttle_percent", r->throttle},
        {"faults", r->faults},
        {"requests", r->requests},
        {"state_bytes", r->state_bytes},
        {"wire_bytes", r->wire_bytes},
        {"disk_bytes", r->disk_bytes},
        {"disk_zero_bytes", r->disk_zero_bytes},
        {"disk_passes", r->disk_passes},
        {"disks_kept", r->disks_kept},
        {"pushed_blocks", r->pushed_blocks},
        {"demand_blocks", r->demand_blocks},
        {"total_us", r->total_ns / 1000},
        {"postcopy_us", r->postcopy_ns / 1000},
    };
    const struct migrate_downtime *d = &r->downtime;
    const struct count parts[] = {
        {"total", d->total / 1000},       {"stop", d->stop / 1000},
        {"save", d->save / 1000},         {"last_pages", d->last_pages / 1000},
        {"transfer", d->transfer / 1000}, {"load", d->load / 1000},
        {"resume", d->resume / 1000},
    };
    char id[2 * WIRE_ID_LEN + 1];
    for (unsigned i = 0; i < WIRE_ID_LEN; i++)
        snprintf(id + 2 * i, 3, "%02x", r->id[i]);
    json_t *object = json_counts(counts, ARRAY_SIZE(counts));
    json_object_set_new(object, "id", json_string(id));
    json_object_set_new(object, "mode", json_string(migrate_mode_name(r->mode)));
    json_object_set_new(object, "owner",
                        json_string(r->owner == SOURCE_GONE      ? "destination"
                                    : r->owner == SOURCE_SEVERED ? "destination, lacking pages"
                                    : r->owner == SOURCE_DOUBT   ? "in doubt"
                                                                 : "source"));
    if (r->requests)
        json_object_set_new(object, "latency_us", json_latency(&r->latency));
    json_object_set_new(object, "downtime_us", json_counts(parts, ARRAY_SIZE(parts)));
    return object;
}

// Lists of numbers, times in us from the beginning: rounds have [time, bytes sent, bytes written by
// the guest meanwhile, us it took], pushes [time, first page, pages], faults [time, page, 1 when
// the page had to be sent].
static json_t *json_history(struct history *h, uint64_t pages)
{
    json_t *lists[] = {json_array(), json_array(), json_array()};
    pthread_mutex_lock(&h->lock);
    for (unsigned i = 0; i < h->nr; i++) {
        const struct history_event *e = &h->events[i];
        bool round = e->kind == HISTORY_ROUND;
        json_t *numbers = json_array();
        json_array_append_new(numbers, json_count(e->ns / 1000));
        json_array_append_new(numbers, json_count(e->a));
        json_array_append_new(numbers, json_count(e->b));
        if (round)
            json_array_append_new(numbers, json_count(e->c / 1000));
        json_array_append_new(lists[e->kind], numbers);
    }
    pthread_mutex_unlock(&h->lock);
    json_t *object = json_object();
    json_object_set_new(object, "rounds", lists[HISTORY_ROUND]);
    json_object_set_new(object, "pushes", lists[HISTORY_PUSH]);
    json_object_set_new(object, "faults", lists[HISTORY_DEMAND]);
    json_object_set_new(object, "pages", json_count(pages));
    json_object_set_new(object, "dropped", json_count(h->dropped));
    return object;
}

// The report of what this thread did, with its history if it was kept.
static json_t *json_result(struct migrate_commands *mc, const struct migrate_report *report)
{
    json_t *object = json_report(report);
    if (mc->m.history.events)
        json_object_set_new(object, "history", json_history(&mc->m.history, mc->vm->ram.pages));
    return object;
}

static json_t *json_snapshot(const char *path, const struct snapshot_report *r)
{
    const struct count counts[] = {
        {"data_pages", r->data_pages},    {"zero_pages", r->zero_pages},
        {"file_bytes", r->file_bytes},    {"stored_bytes", r->stored_bytes},
        {"state_bytes", r->state_bytes},  {"pause_us", r->pause_ns / 1000},
        {"total_us", r->total_ns / 1000},
    };
    json_t *object = json_counts(counts, ARRAY_SIZE(counts));
    json_object_set_new(object, "kind", json_string(r->kind == SNAPFILE_DIFF ? "diff" : "full"));
    json_object_set_new(object, "path", json_string(path));
    return object;
}

// --- arguments

static const char *const modes[] = {"precopy", "postcopy", "hybrid", "local", NULL};
static const char *const prepagings[] = {"none", "push", "forward", "bubble", "multi-bubble", NULL};
static const char *const packings[] = {"auto", "always", "none", NULL};
static const char *const stalls[] = {"continue", "cancel", "switch", "postcopy", "throttle", NULL};
enum { DOWNTIME_MAX_MS = 3600 * 1000, ROUNDS_MAX = 1000 * 1000 };

// Contents, not names of files: this process may not see the files that the caller does. The
// certificates are PEM, the shared key is NAME:HEX DIGITS.
// clang-format off
#define SECURITY_FIELDS                                                                       \
    {"tls_ca", SCHEMA_STRING, .min = 1, .max = TLS_TEXT_MAX},                                 \
    {"tls_cert", SCHEMA_STRING, .min = 1, .max = TLS_TEXT_MAX},                               \
    {"tls_key", SCHEMA_STRING, .min = 1, .max = TLS_TEXT_MAX},                                \
    {"psk", SCHEMA_STRING, .min = 1, .max = TLS_TEXT_MAX},                                    \
    {"tls_name", SCHEMA_STRING, .min = 1}, /* what the other side's certificate must name */  \
    {"insecure", SCHEMA_BOOL}              /* in clear to another host */
// clang-format on

static const struct schema_field migrate_fields[] = {
    {"to", SCHEMA_STRING, .required = true, .min = 1},
    {"mode", SCHEMA_STRING, .choices = modes},
    {"on_stall", SCHEMA_STRING, .choices = stalls},
    {"prepaging", SCHEMA_STRING, .choices = prepagings},
    {"compress", SCHEMA_STRING, .choices = packings},
    {"delta_cache", SCHEMA_INTEGER},                                    // bytes
    {"balloon", SCHEMA_STRING, .min = 1},                               // auto, off, or a size
    {"connections", SCHEMA_INTEGER, .min = 1, .max = WIRE_STREAMS_MAX}, // of pre-copy
    {"disk", SCHEMA_BOOL},    // images of this host go with the guest
    {"history", SCHEMA_BOOL}, // what happened when, in the reply
    {"downtime_ms", SCHEMA_INTEGER, .max = DOWNTIME_MAX_MS},
    {"bandwidth", SCHEMA_INTEGER}, // bytes/s, 0 = as fast as it goes
    {"max_rounds", SCHEMA_INTEGER, .max = ROUNDS_MAX},
    SECURITY_FIELDS,
    {NULL},
};

static const struct schema_field recover_fields[] = {
    {"to", SCHEMA_STRING, .required = true, .min = 1},
    SECURITY_FIELDS,
    {NULL},
};

static const struct schema_field steer_fields[] = {
    {"downtime_ms", SCHEMA_INTEGER, .max = DOWNTIME_MAX_MS},
    {"bandwidth", SCHEMA_INTEGER},
    {NULL},
};

static const char *const layouts[] = {"packed", "mapped", NULL};
static const char *const compressions[] = {"lz4", "none", NULL};

static const struct schema_field snapshot_fields[] = {
    {"path", SCHEMA_STRING, .required = true, .min = 1},
    {"diff", SCHEMA_BOOL},
    {"parent", SCHEMA_STRING, .min = 1}, // a diff of this one; without: of the last snapshot
    {"layout", SCHEMA_STRING, .choices = layouts},
    {"compress", SCHEMA_STRING, .choices = compressions},
    {"disks", SCHEMA_BOOL}, // the disks' overlays as well, as they are at that instant
    {NULL},
};

// Makes p->security.tls if there is something to make it of; else it stays what it was.
static int security_args(struct migrate_params *p, json_t *args, struct error *err)
{
    static const char *const keys[TLS_PARTS] = {"tls_ca", "tls_cert", "tls_key", "psk"};
    struct tls_texts texts = {0}; // borrowed from args
    for (unsigned i = 0; i < TLS_PARTS; i++)
        texts.text[i] = (char *)json_string_value(json_object_get(args, keys[i]));
    json_t *insecure = json_object_get(args, "insecure");
    if (json_is_boolean(insecure))
        p->security.insecure = json_is_true(insecure);
    const char *peer = json_string_value(json_object_get(args, "tls_name"));
    struct tls *tls = NULL;
    if (!tls_texts_given(&texts))
        return peer ? error_set(err, -EINVAL, "tls_name: without certificates there is no name")
                    : 0;
    int ret = tls_create(&tls, &texts, peer, err);
    if (!ret)
        p->security.tls = tls;
    return ret;
}

// `args` are as the schema says.
static int migrate_args(struct migrate_params *p, json_t *args, struct error *err)
{
    json_t *mode = json_object_get(args, "mode"), *stall = json_object_get(args, "on_stall"),
           *downtime = json_object_get(args, "downtime_ms"),
           *bandwidth = json_object_get(args, "bandwidth"),
           *rounds = json_object_get(args, "max_rounds"),
           *prepaging = json_object_get(args, "prepaging"),
           *compress = json_object_get(args, "compress"),
           *balloon = json_object_get(args, "balloon"),
           *delta_cache = json_object_get(args, "delta_cache"),
           *connections = json_object_get(args, "connections");
    p->to = json_string_value(json_object_get(args, "to"));
    if (json_is_integer(downtime))
        p->downtime_ns = (uint64_t)json_integer_value(downtime) * 1000000;
    if (json_is_integer(bandwidth))
        p->bandwidth = (uint64_t)json_integer_value(bandwidth);
    p->disks = json_is_true(json_object_get(args, "disk"));
    p->keep_history = json_is_true(json_object_get(args, "history"));
    if (json_is_integer(delta_cache))
        p->delta_cache = (uint64_t)json_integer_value(delta_cache);
    if (json_is_integer(connections))
        p->connections = (unsigned)json_integer_value(connections);
    if (json_is_integer(rounds))
        p->max_rounds = (uint32_t)json_integer_value(rounds);
    int ret = json_is_string(mode) ? migrate_mode_parse(json_string_value(mode), &p->mode, err) : 0;
    if (!ret && json_is_string(stall))
        ret = migrate_stall_parse(json_string_value(stall), &p->on_stall, err);
    if (!ret && json_is_string(compress))
        ret = pack_when_parse(json_string_value(compress), &p->compress, err);
    if (!ret && json_is_string(balloon))
        ret = migrate_balloon_parse(json_string_value(balloon), &p->balloon, err);
    if (!ret && json_is_string(prepaging))
        ret = prepage_parse(json_string_value(prepaging), &p->prepaging, err);
    return ret ? ret : security_args(p, args, err);
}

// --- the long commands

static void on_progress(const struct migrate_progress *progress, void *arg)
{
    struct migrate_commands *mc = arg;
    // The phases after the last one belong to the reply.
    if (progress->phase != MIGRATE_DONE && progress->phase != MIGRATE_FAILED)
        control_event(mc->req, json_progress(progress));
}

// Under the lock. The guest is, or may be, another host's.
static bool not_ours(const struct migrate_commands *mc)
{
    return mc->have_report && mc->report.owner >= SOURCE_COMMITTING;
}

static void finish(struct migrate_commands *mc, int ret, const struct error *err, json_t *result)
{
    struct control_request *req = mc->req;
    pthread_mutex_lock(&mc->lock);
    mc->working = false;
    mc->req = NULL;
    mc->last = *err;
    bool returns = !not_ours(mc);
    pthread_mutex_unlock(&mc->lock);
    if (returns)
        life_return(mc->life);
    if (ret) {
        json_decref(result);
        control_reply_error(req, err);
    } else {
        control_reply_ok(req, result);
    }
}

static void *migrate_main(void *arg)
{
    struct migrate_commands *mc = arg;
    struct migrate_report report;
    struct error err = {0};
    seccomp_enter_or_abort(SECCOMP_WORKER, mc->vm->config.seccomp);
    int ret = migrate_out(mc->vm, &mc->params, &mc->m, &report, &err);
    pthread_mutex_lock(&mc->lock);
    mc->report = report;
    mc->have_report = true;
    pthread_mutex_unlock(&mc->lock);
    finish(mc, ret, &err, json_result(mc, &report));
    if (!ret) // after the reply is on its way: this ends the loop
        vm_request_stop(mc->vm, VM_STOP_MIGRATED, 0, "to %s", mc->target);
    return NULL;
}

static void *recover_main(void *arg)
{
    struct migrate_commands *mc = arg;
    struct migrate_report report = mc->report; // nobody else writes it while this works
    struct error err = {0};
    seccomp_enter_or_abort(SECCOMP_WORKER, mc->vm->config.seccomp);
    int ret = migrate_recover(mc->vm, &mc->params, &mc->m, &report, &err);
    pthread_mutex_lock(&mc->lock);
    mc->report = report;
    pthread_mutex_unlock(&mc->lock);
    finish(mc, ret, &err, json_result(mc, &report));
    if (!ret)
        vm_request_stop(mc->vm, VM_STOP_MIGRATED, 0, "to %s", mc->target);
    return NULL;
}

static void *snapshot_main(void *arg)
{
    struct migrate_commands *mc = arg;
    struct snapshot_report report;
    struct error err = {0};
    seccomp_enter_or_abort(SECCOMP_WORKER, mc->vm->config.seccomp);
    int ret = snapshot_save(mc->vm, &mc->snapshot, mc->hooks, &mc->m, &report, &err);
    finish(mc, ret, &err, json_snapshot(mc->target, &report));
    return NULL;
}

static int may_start(struct migrate_commands *mc, bool recover, struct error *err)
{
    if (mc->working)
        return error_set(err, -EBUSY, "VM %s: a migration or snapshot is under way", mc->vm->name);
    if (recover)
        return mc->have_report && mc->report.owner == SOURCE_SEVERED
                   ? 0
                   : error_set(err, -EPROTO, "VM %s: no post-copy has broken off", mc->vm->name);
    if (not_ours(mc))
        return error_set(err, -EBUSY, "VM %s: the guest %s: %s", mc->vm->name,
                         mc->report.owner != SOURCE_DOUBT ? "belongs to another host"
                                                          : "may run on another host",
                         mc->last.text);
    if (vm_stopped(mc->vm))
        return error_set(err, -ESHUTDOWN, "VM %s has stopped", mc->vm->name);
    return 0;
}

// For a command that takes long. On error nothing has happened.
static int prepare(struct migrate_commands *mc, const char *target, bool recover, struct error *err)
{
    pthread_mutex_lock(&mc->lock);
    int ret = may_start(mc, recover, err);
    pthread_t old = mc->thread;
    bool join = !ret && mc->started;
    pthread_mutex_unlock(&mc->lock);
    if (ret)
        return ret;
    if (join)
        pthread_join(old, NULL);
    mc->started = false;
    free(mc->target);
    mc->target = strdup(target);
    if (!mc->target)
        return error_set(err, -ENOMEM, "no memory");
    migration_free(&mc->m);
    return migration_init(&mc->m, err);
}

// Before the thread is there.
static void keep_tls(struct migrate_commands *mc, const struct tls *tls)
{
    if (tls == mc->tls)
        return;
    tls_free(mc->tls);
    mc->tls = (struct tls *)tls; // ours from now on
}

// After prepare: starts `fn` in the worker thread; it answers `req`.
static int start(struct migrate_commands *mc, enum life_state state, void *(*fn)(void *),
                 const struct migrate_params *params, struct control_request *req,
                 struct error *err)
{
    bool recover = fn == recover_main; // which is migrating still
    int ret = recover ? 0 : life_move(mc->life, state, err);
    if (ret)
        return ret;
    mc->m.on_progress = on_progress;
    if (params && params->keep_history)
        history_start(&mc->m.history);
    mc->m.on_progress_arg = mc;
    if (params) {
        keep_tls(mc, params->security.tls);
        mc->params = *params;
    }
    mc->params.to = mc->target;
    mc->req = req;
    mc->working = true;
    mc->have_report = recover;
    ret = pthread_create(&mc->thread, NULL, fn, mc);
    mc->started = !ret;
    if (ret) {
        mc->working = false;
        if (!recover)
            life_return(mc->life);
        return error_set(err, -ret, "cannot start a thread: %s", strerror(ret));
    }
    return 0;
}

static void refuse(struct migrate_commands *mc, const struct migrate_params *params,
                   struct control_request *req, const struct error *err)
{
    if (params->security.tls != mc->tls)
        tls_free((struct tls *)params->security.tls);
    control_reply_error(req, err);
}

static void put_migration(struct control_request *req, json_t *args, void *context)
{
    struct migrate_commands *mc = context;
    struct migrate_params params;
    struct error err;
    migrate_params_default(&params);
    params.hooks = mc->hooks;
    int ret = migrate_args(&params, args, &err);
    if (!ret)
        ret = prepare(mc, params.to, false, &err);
    if (!ret)
        ret = start(mc, LIFE_MIGRATING, migrate_main, &params, req, &err);
    if (ret)
        refuse(mc, &params, req, &err);
}

static void put_recover(struct control_request *req, json_t *args, void *context)
{
    struct migrate_commands *mc = context;
    struct migrate_params params = mc->params; // of the migration that broke off
    struct error err;
    params.to = json_string_value(json_object_get(args, "to"));
    int ret = security_args(&params, args, &err);
    if (!ret)
        ret = prepare(mc, params.to, true, &err);
    if (!ret)
        ret = start(mc, LIFE_MIGRATING, recover_main, &params, req, &err);
    if (ret)
        refuse(mc, &params, req, &err);
}

static void put_pause(struct control_request *req, json_t *args, void *context)
{
    struct migrate_commands *mc = context;
    struct error err;
    pthread_mutex_lock(&mc->lock);
    int ret = mc->working ? migration_sever(&mc->m, &err)
                          : error_set(&err, -ENOENT, "no migration is under way");
    pthread_mutex_unlock(&mc->lock);
    if (ret)
        control_reply_error(req, &err);
    else
        control_reply_ok(req, NULL);
}

void migrate_commands_snapshot(struct migrate_commands *mc, const struct snapshot_params *params,
                               struct control_request *req)
{
    struct error err;
    char *parent = params->parent ? strdup(params->parent) : NULL;
    int ret = prepare(mc, params->path, false, &err);
    if (!ret) {
        free(mc->parent);
        mc->parent = parent;
        mc->snapshot = *params;
        mc->snapshot.path = mc->target;
        mc->snapshot.parent = parent;
        mc->snapshot.track = &mc->track;
        ret = start(mc, LIFE_SNAPSHOTTING, snapshot_main, NULL, req, &err);
    } else {
        free(parent);
    }
    if (ret)
        control_reply_error(req, &err);
}

static bool says(json_t *args, const char *key, const char *value)
{
    const char *text = json_string_value(json_object_get(args, key));
    return text && !strcmp(text, value);
}

static void put_snapshot(struct control_request *req, json_t *args, void *context)
{
    struct snapshot_params p;
    snapshot_params_default(&p, json_string_value(json_object_get(args, "path")));
    p.parent = json_string_value(json_object_get(args, "parent"));
    p.diff = p.parent || json_is_true(json_object_get(args, "diff"));
    p.disks = json_is_true(json_object_get(args, "disks"));
    p.log = p.diff; // where there is one diff, there may be more
    p.layout = says(args, "layout", "mapped") ? SNAPFILE_MAPPED : SNAPFILE_PACKED;
    if (p.layout == SNAPFILE_MAPPED && !says(args, "compress", "lz4"))
        p.compress = SNAPFILE_NONE;
    if (says(args, "compress", "none"))
        p.compress = SNAPFILE_NONE;
    migrate_commands_snapshot(context, &p, req);
}

int migrate_commands_base(struct migrate_commands *mc, const char *path,
                          const uint8_t id[SNAPFILE_ID_LEN], bool log, struct error *err)
{
    return snapshot_track_base(&mc->track, mc->vm, path, id, log, err);
}

static bool same_file(const char *a, const char *b)
{
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_ino == y.st_ino && x.st_dev == y.st_dev;
}

bool migrate_commands_based(struct migrate_commands *mc, const char *path)
{
    pthread_mutex_lock(&mc->lock);
    // While one is taken, the next is refused anyway.
    bool based = mc->working || (mc->track.path && !same_file(path, mc->track.path));
    pthread_mutex_unlock(&mc->lock);
    return based;
}

// --- the short ones

static void get_migration(struct control_request *req, json_t *args, void *context)
{
    struct migrate_commands *mc = context;
    struct migrate_progress progress;
    migration_get(&mc->m, &progress);
    json_t *status = json_progress(&progress);
    pthread_mutex_lock(&mc->lock);
    json_object_set_new(status, "working", json_boolean(mc->working));
    if (mc->have_report)
        json_object_set_new(status, "report", json_report(&mc->report));
    if (mc->last.code)
        json_object_set_new(status, "error", json_string(mc->last.text));
    pthread_mutex_unlock(&mc->lock);
    control_reply_ok(req, status);
}

static void delete_migration(struct control_request *req, json_t *args, void *context)
{
    struct migrate_commands *mc = context;
    struct error err;
    pthread_mutex_lock(&mc->lock);
    bool working = mc->working;
    if (working)
        migration_cancel(&mc->m);
    pthread_mutex_unlock(&mc->lock);
    if (working) {
        control_reply_ok(req, NULL);
        return;
    }
    error_set(&err, -ENOENT, "no migration or snapshot is under way");
    control_reply_error(req, &err);
}

static void patch_migration(struct control_request *req, json_t *args, void *context)
{
    struct migrate_commands *mc = context;
    json_t *downtime = json_object_get(args, "downtime_ms");
    json_t *bandwidth = json_object_get(args, "bandwidth");
    if (json_is_integer(downtime))
        atomic_store(&mc->m.downtime_ns, (uint64_t)json_integer_value(downtime) * 1000000);
    if (json_is_integer(bandwidth))
        atomic_store(&mc->m.bandwidth, (uint64_t)json_integer_value(bandwidth));
    control_reply_ok(req, NULL);
}

static void put_force_resume(struct control_request *req, json_t *args, void *context)
{
    struct migrate_commands *mc = context;
    struct error err;
    pthread_mutex_lock(&mc->lock);
    int ret = mc->working || !mc->have_report
                  ? error_set(&err, -EPROTO, "VM %s: no migration is in doubt", mc->vm->name)
                  : migrate_force_resume(mc->vm, &mc->report, &err);
    pthread_mutex_unlock(&mc->lock);
    if (ret) {
        control_reply_error(req, &err);
        return;
    }
    life_return(mc->life);
    control_reply_ok(req, NULL);
}

#define LIVE (LIFE_BIT(LIFE_RUNNING) | LIFE_BIT(LIFE_PAUSED))

static const struct control_route routes[] = {
    {"PUT", "/migration", "move the guest to another host; progress as events", LIVE,
     migrate_fields, put_migration},
    {"GET", "/migration", "phase, progress and the last report", 0, NULL, get_migration},
    {"PATCH", "/migration", "change limits of the migration under way", LIFE_BIT(LIFE_MIGRATING),
     steer_fields, patch_migration},
    {"DELETE", "/migration", "give up the migration or snapshot under way", 0, NULL,
     delete_migration},
    {"PUT", "/migration/pause",
     "break the links of a post-copy: both sides stop and keep everything, until recover",
     LIFE_BIT(LIFE_MIGRATING), NULL, put_pause},
    {"PUT", "/migration/recover", "go on with a post-copy whose links broke; progress as events",
     LIFE_BIT(LIFE_MIGRATING), recover_fields, put_recover},
    {"PUT", "/migration/force-resume",
     "in doubt: let the guest go on here, it does not run elsewhere", LIFE_BIT(LIFE_MIGRATING),
     NULL, put_force_resume},
    {"PUT", "/snapshot/file", "write the guest, or what changed, to a file", LIVE, snapshot_fields,
     put_snapshot},
};

int migrate_commands_create(struct migrate_commands **out, struct control *control,
                            struct life *life, const struct migrate_hooks *hooks, struct error *err)
{
    struct migrate_commands *mc = calloc(1, sizeof(*mc));
    if (!mc)
        return error_set(err, -ENOMEM, "no memory for the migration commands");
    mc->control = control;
    mc->life = life;
    mc->hooks = hooks;
    pthread_mutex_init(&mc->lock, NULL);
    int ret = migration_init(&mc->m, err);
    if (!ret)
        ret = control_add(control, routes, ARRAY_SIZE(routes), mc, err);
    if (ret) {
        migrate_commands_destroy(mc);
        return ret;
    }
    *out = mc;
    return 0;
}

void migrate_commands_vm(struct migrate_commands *mc, struct vm *vm)
{
    if (mc->vm && mc->vm != vm)
        snapshot_track_end(&mc->track, mc->vm);
    mc->vm = vm;
}

void migrate_commands_destroy(struct migrate_commands *mc)
{
    if (!mc)
        return;
    control_remove(mc->control, mc);
    if (mc->started) {
        migration_cancel(&mc->m);
        pthread_join(mc->thread, NULL);
    }
    if (mc->vm)
        snapshot_track_end(&mc->track, mc->vm);
    migration_free(&mc->m);
    tls_free(mc->tls);
    free(mc->target);
    free(mc->parent);
    pthread_mutex_destroy(&mc->lock);
    free(mc);
}
