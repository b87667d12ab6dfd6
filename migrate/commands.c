// SPDX-License-Identifier: Apache-2.0
#include "migrate/commands.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "migrate/snapshot.h"
#include "vmm/vm.h"

struct migrate_commands {
    struct vm *vm;
    const struct migrate_hooks *hooks;
    struct migration m;

    pthread_mutex_t lock; // guards what follows
    bool working;         // the thread runs
    bool started;         // the thread must be joined
    pthread_t thread;
    struct control_request *req; // of the long command
    struct migrate_params params;
    char *target; // address or path
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
        {"remaining_bytes", p->remaining_bytes},
        {"dirty_bytes", p->dirty_bytes},
        {"bandwidth", p->bandwidth},
    };
    json_t *object = json_counts(counts, ARRAY_SIZE(counts));
    json_object_set_new(object, "phase", json_string(migrate_phase_name(p->phase)));
    if (p->expected_downtime_ns && p->expected_downtime_ns != UINT64_MAX)
        json_object_set_new(object, "expected_downtime_us",
                            json_count(p->expected_downtime_ns / 1000));
    return object;
}

static json_t *json_report(const struct migrate_report *r)
{
    const struct count counts[] = {
        {"rounds", r->rounds},
        {"data_pages", r->data_pages},
        {"zero_pages", r->zero_pages},
        {"pushed_pages", r->pushed_pages},
        {"demand_pages", r->demand_pages},
        {"discarded_pages", r->discarded_pages},
        {"faults", r->faults},
        {"requests", r->requests},
        {"state_bytes", r->state_bytes},
        {"wire_bytes", r->wire_bytes},
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
                        json_string(r->owner == SOURCE_GONE    ? "destination"
                                    : r->owner == SOURCE_DOUBT ? "in doubt"
                                                               : "source"));
    json_object_set_new(object, "downtime_us", json_counts(parts, ARRAY_SIZE(parts)));
    return object;
}

static json_t *json_snapshot(const char *path, const struct snapshot_report *r)
{
    const struct count counts[] = {
        {"data_pages", r->data_pages},    {"zero_pages", r->zero_pages},
        {"file_bytes", r->file_bytes},    {"state_bytes", r->state_bytes},
        {"pause_us", r->pause_ns / 1000}, {"total_us", r->total_ns / 1000},
    };
    json_t *object = json_counts(counts, ARRAY_SIZE(counts));
    json_object_set_new(object, "path", json_string(path));
    return object;
}

// --- arguments

static int arg_number(json_t *value, const char *key, uint64_t max, uint64_t *out,
                      struct error *err)
{
    json_int_t n = json_integer_value(value);
    if (!json_is_integer(value) || n < 0 || (uint64_t)n > max)
        return error_set(err, -EINVAL, "argument '%s': expected a number from 0 to %llu", key,
                         (unsigned long long)max);
    *out = (uint64_t)n;
    return 0;
}

static int arg_string(json_t *value, const char *key, const char **out, struct error *err)
{
    *out = json_string_value(value);
    return *out && **out ? 0 : error_set(err, -EINVAL, "argument '%s': expected a text", key);
}

static int migrate_arg(struct migrate_params *p, const char *key, json_t *value, struct error *err)
{
    uint64_t n = 0;
    const char *text;
    int ret;
    if (!strcmp(key, "to")) {
        return arg_string(value, key, &p->to, err);
    } else if (!strcmp(key, "mode")) {
        ret = arg_string(value, key, &text, err);
        return ret ? ret : migrate_mode_parse(text, &p->mode, err);
    } else if (!strcmp(key, "on_stall")) {
        ret = arg_string(value, key, &text, err);
        return ret ? ret : migrate_stall_parse(text, &p->on_stall, err);
    } else if (!strcmp(key, "downtime_ms")) {
        ret = arg_number(value, key, 3600 * 1000, &n, err);
        p->downtime_ns = n * 1000000;
    } else if (!strcmp(key, "bandwidth")) {
        ret = arg_number(value, key, INT64_MAX, &n, err);
        p->bandwidth = n;
    } else if (!strcmp(key, "max_rounds")) {
        ret = arg_number(value, key, 1000000, &n, err);
        p->max_rounds = (uint32_t)n;
    } else {
        return error_set(err, -EINVAL, "migrate: argument '%s' is not known", key);
    }
    return ret;
}

static int migrate_args(struct migrate_params *p, json_t *args, struct error *err)
{
    const char *key;
    json_t *value;
    json_object_foreach(args, key, value)
    {
        struct migrate_params tried = *p;
        int ret = migrate_arg(&tried, key, value, err);
        if (ret)
            return ret;
        *p = tried;
    }
    return p->to ? 0 : error_set(err, -EINVAL, "migrate: argument 'to' is missing");
}

// --- the long commands

static void on_progress(const struct migrate_progress *progress, void *arg)
{
    struct migrate_commands *mc = arg;
    // The phases after the last one belong to the reply.
    if (progress->phase != MIGRATE_DONE && progress->phase != MIGRATE_FAILED)
        control_event(mc->req, json_progress(progress));
}

static void finish(struct migrate_commands *mc, int ret, const struct error *err, json_t *result)
{
    struct control_request *req = mc->req;
    pthread_mutex_lock(&mc->lock);
    mc->working = false;
    mc->req = NULL;
    mc->last = *err;
    pthread_mutex_unlock(&mc->lock);
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
    int ret = migrate_out(mc->vm, &mc->params, &mc->m, &report, &err);
    pthread_mutex_lock(&mc->lock);
    mc->report = report;
    mc->have_report = true;
    pthread_mutex_unlock(&mc->lock);
    finish(mc, ret, &err, json_report(&report));
    if (!ret) // after the reply is on its way: this ends the loop
        vm_request_stop(mc->vm, VM_STOP_MIGRATED, 0, "to %s", mc->target);
    return NULL;
}

static void *snapshot_main(void *arg)
{
    struct migrate_commands *mc = arg;
    struct snapshot_report report;
    struct error err = {0};
    int ret = snapshot_save(mc->vm, mc->target, mc->hooks, &mc->m, &report, &err);
    finish(mc, ret, &err, json_snapshot(mc->target, &report));
    return NULL;
}

// Under the lock. The guest is, or may be, another host's.
static bool not_ours(const struct migrate_commands *mc)
{
    return mc->have_report && (mc->report.owner == SOURCE_GONE || mc->report.owner == SOURCE_DOUBT);
}

static int may_start(struct migrate_commands *mc, struct error *err)
{
    if (mc->working)
        return error_set(err, -EBUSY, "VM %s: a migration or snapshot is under way", mc->vm->name);
    if (not_ours(mc))
        return error_set(err, -EBUSY, "VM %s: the guest %s: %s", mc->vm->name,
                         mc->report.owner == SOURCE_GONE ? "belongs to another host"
                                                         : "may run on another host",
                         mc->last.text);
    if (vm_stopped(mc->vm))
        return error_set(err, -ESHUTDOWN, "VM %s has stopped", mc->vm->name);
    return 0;
}

// Starts `fn` in the worker thread; it answers `req`. On error nothing has happened.
static int start(struct migrate_commands *mc, void *(*fn)(void *), const char *target,
                 const struct migrate_params *params, struct control_request *req,
                 struct error *err)
{
    pthread_mutex_lock(&mc->lock);
    int ret = may_start(mc, err);
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
    ret = migration_init(&mc->m, err);
    if (ret)
        return ret;
    mc->m.on_progress = on_progress;
    mc->m.on_progress_arg = mc;
    if (params)
        mc->params = *params;
    mc->params.to = mc->target;
    mc->req = req;
    mc->working = true;
    mc->have_report = false;
    ret = pthread_create(&mc->thread, NULL, fn, mc);
    mc->started = !ret;
    if (ret) {
        mc->working = false;
        return error_set(err, -ret, "cannot start a thread: %s", strerror(ret));
    }
    return 0;
}

static void cmd_migrate(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct migrate_commands *mc = context;
    struct migrate_params params;
    struct error err;
    migrate_params_default(&params);
    params.hooks = mc->hooks;
    int ret = migrate_args(&params, args, &err);
    if (!ret)
        ret = start(mc, migrate_main, params.to, &params, req, &err);
    if (ret)
        control_reply_error(req, &err);
}

static void cmd_snapshot(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct error err;
    const char *path;
    int ret = arg_string(json_object_get(args, "path"), "path", &path, &err);
    if (!ret)
        ret = start(context, snapshot_main, path, NULL, req, &err);
    if (ret)
        control_reply_error(req, &err);
}

// --- the short ones

static void cmd_status(struct vm *vm, json_t *args, struct control_request *req, void *context)
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

static void cmd_cancel(struct vm *vm, json_t *args, struct control_request *req, void *context)
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
    error_set(&err, -ENOENT, "VM %s: no migration or snapshot is under way", vm->name);
    control_reply_error(req, &err);
}

static void cmd_set(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct migrate_commands *mc = context;
    struct error err;
    json_t *downtime = json_object_get(args, "downtime_ms");
    json_t *bandwidth = json_object_get(args, "bandwidth");
    uint64_t ms = 0, rate = 0;
    int ret = downtime || bandwidth
                  ? 0
                  : error_set(&err, -EINVAL, "migrate-set: expected downtime_ms or bandwidth");
    if (!ret && downtime)
        ret = arg_number(downtime, "downtime_ms", 3600 * 1000, &ms, &err);
    if (!ret && bandwidth)
        ret = arg_number(bandwidth, "bandwidth", INT64_MAX, &rate, &err);
    if (ret) {
        control_reply_error(req, &err);
        return;
    }
    if (downtime)
        atomic_store(&mc->m.downtime_ns, ms * 1000000);
    if (bandwidth)
        atomic_store(&mc->m.bandwidth, rate);
    control_reply_ok(req, NULL);
}

static void cmd_force_resume(struct vm *vm, json_t *args, struct control_request *req,
                             void *context)
{
    struct migrate_commands *mc = context;
    struct error err;
    pthread_mutex_lock(&mc->lock);
    int ret = mc->working || !mc->have_report
                  ? error_set(&err, -EPROTO, "VM %s: no migration is in doubt", vm->name)
                  : migrate_force_resume(vm, &mc->report, &err);
    pthread_mutex_unlock(&mc->lock);
    if (ret)
        control_reply_error(req, &err);
    else
        control_reply_ok(req, NULL);
}

static const struct control_command commands[] = {
    {"migrate",
     "move the guest; {to, mode, downtime_ms, bandwidth, max_rounds, on_stall}, progress as events",
     cmd_migrate, NULL},
    {"migrate-status", "phase, progress and the last report", cmd_status, NULL},
    {"migrate-set", "change {downtime_ms, bandwidth} of the migration under way", cmd_set, NULL},
    {"migrate-cancel", "give up the migration or snapshot under way", cmd_cancel, NULL},
    {"migrate-force-resume", "in doubt: let the guest go on here, it does not run elsewhere",
     cmd_force_resume, NULL},
    {"snapshot", "write the guest to {path}", cmd_snapshot, NULL},
};

int migrate_commands_create(struct migrate_commands **out, struct vm *vm, struct control *control,
                            const struct migrate_hooks *hooks, struct error *err)
{
    struct migrate_commands *mc = calloc(1, sizeof(*mc));
    if (!mc)
        return error_set(err, -ENOMEM, "no memory for the migration commands");
    mc->vm = vm;
    mc->hooks = hooks;
    pthread_mutex_init(&mc->lock, NULL);
    int ret = migration_init(&mc->m, err);
    if (!ret)
        ret = control_add(control, commands, ARRAY_SIZE(commands), mc, err);
    if (ret) {
        migrate_commands_destroy(mc);
        return ret;
    }
    *out = mc;
    return 0;
}

void migrate_commands_destroy(struct migrate_commands *mc)
{
    if (!mc)
        return;
    if (mc->started) {
        migration_cancel(&mc->m);
        pthread_join(mc->thread, NULL);
    }
    migration_free(&mc->m);
    free(mc->target);
    pthread_mutex_destroy(&mc->lock);
    free(mc);
}

bool migrate_commands_busy(struct migrate_commands *mc)
{
    pthread_mutex_lock(&mc->lock);
    bool busy = mc->working || not_ours(mc);
    pthread_mutex_unlock(&mc->lock);
    return busy;
}
