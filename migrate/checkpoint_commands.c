// SPDX-License-Identifier: Apache-2.0
#include "migrate/checkpoint_commands.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "migrate/checkpoint.h"
#include "migrate/disks.h"
#include "migrate/snapshot.h"
#include "vmm/vm.h"

struct checkpoint_commands {
    struct control *control;
    struct life *life;
    const struct migrate_hooks *hooks;
    struct vm *vm;
    struct checkpointer *checkpointer;
    struct checkpoint_saver saver;
    struct migration m;          // of the save under way: it can be cancelled
    struct snapshot_track track; // what was written since the last one
    bool log;                    // there will be diffs
    json_t *body;                // what began the checkpoints
};

// --- the body of PUT

static const struct schema_field put_fields[] = {
    {"dir", SCHEMA_STRING, .required = true, .min = 1, .max = PATH_MAX - 64},
    {"interval", SCHEMA_STRING, .min = 1, .max = 32},
    {"mtbf", SCHEMA_STRING, .min = 1, .max = 32},
    {"failure_log", SCHEMA_STRING, .min = 1, .max = PATH_MAX - 1},
    {"restore_time", SCHEMA_STRING, .min = 1, .max = 32},
    {"daly", SCHEMA_BOOL},
    {"keep", SCHEMA_INTEGER, .min = 1, .max = CHECKPOINT_KEEP_MAX},
    {"hourly", SCHEMA_INTEGER, .min = 0, .max = CHECKPOINT_KEEP_MAX},
    {"chain", SCHEMA_INTEGER, .min = 1, .max = CHECKPOINT_CHAIN_MAX},
    {NULL},
};

static int span_take(json_t *body, const char *key, double *seconds, struct error *err)
{
    const char *text = json_string_value(json_object_get(body, key));
    if (text && duration_parse(text, seconds))
        return error_set(err, -EINVAL, "%s '%s': expected a time, e.g. 250ms, 10s, 1h30m, 24h", key,
                         text);
    return 0;
}

static void count_take(json_t *body, const char *key, unsigned *count)
{
    json_t *value = json_object_get(body, key);
    if (json_is_integer(value))
        *count = (unsigned)json_integer_value(value);
}

static int params_take(json_t *body, struct checkpoint_params *p, struct error *err)
{
    struct checkpoint_settings *s = &p->settings;
    checkpoint_settings_default(s);
    p->dir = json_string_value(json_object_get(body, "dir"));
    p->failure_log = json_string_value(json_object_get(body, "failure_log"));
    p->mtbf_given = json_is_string(json_object_get(body, "mtbf"));
    if (json_is_true(json_object_get(body, "daly")))
        s->form = YOUNG_DALY;
    count_take(body, "keep", &s->keep);
    count_take(body, "hourly", &s->hourly);
    count_take(body, "chain", &s->chain);
    if (p->dir[0] != '/' || (p->failure_log && p->failure_log[0] != '/'))
        return error_set(err, -EINVAL,
                         "'%s': expected a path from the root, since this VM's "
                         "working directory is another",
                         p->dir[0] != '/' ? p->dir : p->failure_log);
    if (p->mtbf_given && p->failure_log)
        return error_set(err, -EINVAL, "mtbf and failure_log: one of them");
    int ret = span_take(body, "interval", &s->interval, err);
    if (!ret)
        ret = span_take(body, "mtbf", &s->mtbf, err);
    if (!ret)
        ret = span_take(body, "restore_time", &s->restart, err);
    return ret ? ret : checkpoint_settings_check(s, err);
}

// --- beside the checkpoints

static int policy_path(const char *dir, char path[PATH_MAX], struct error *err)
{
    if ((size_t)snprintf(path, PATH_MAX, "%s/policy.json", dir) >= PATH_MAX)
        return error_set(err, -ENAMETOOLONG, "%.100s...: name too long", dir);
    return 0;
}

static int policy_write(const char *dir, json_t *body, struct error *err)
{
    char path[PATH_MAX], temporary[PATH_MAX + 8];
    int ret = policy_path(dir, path, err);
    if (ret)
        return ret;
    snprintf(temporary, sizeof(temporary), "%s.tmp", path);
    autoclose int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || json_dumpfd(body, fd, JSON_INDENT(2)) || fsync(fd) || rename(temporary, path)) {
        ret = error_errno(err, "%s", path);
        unlink(temporary);
    }
    return ret;
}

int checkpoint_policy_read(const char *dir, json_t **body, struct error *err)
{
    char path[PATH_MAX];
    json_error_t jerr;
    int ret = policy_path(dir, path, err);
    if (ret)
        return ret;
    if (access(path, R_OK))
        return error_errno(err, "%s", path);
    *body = json_load_file(path, JSON_REJECT_DUPLICATES, &jerr);
    if (!json_is_object(*body)) {
        json_decref(*body);
        return error_set(err, -EINVAL, "%s:%d: %s", path, jerr.line, jerr.text);
    }
    // Wherever the directory was when it was written: it is here now.
    json_object_set_new(*body, "dir", json_string(dir));
    ret = schema_check(*body, put_fields, err);
    if (!ret)
        return 0;
    json_decref(*body);
    return error_prefix(err, "%s", path);
}

// --- saving

static int parent_path(const char *path, const char *parent, char *out, struct error *err)
{
    int dir = (int)(strrchr(path, '/') - path);
    if (snprintf(out, PATH_MAX, "%.*s/%s", dir, path, parent) >= PATH_MAX)
        return error_set(err, -ENAMETOOLONG, "%s: name too long", path);
    return 0;
}

static int save(void *context, const char *path, const char *parent,
                struct checkpoint_measure *made, struct error *err)
{
    struct checkpoint_commands *cc = context;
    struct snapshot_report report;
    struct snapshot_params params;
    char before[PATH_MAX];
    snapshot_params_default(&params, path);
    params.track = &cc->track;
    params.log = cc->log;
    params.diff = parent;
    params.disks = cc->hooks->disks;
    if (parent) {
        int ret = parent_path(path, parent, before, err);
        if (ret)
            return ret;
        params.parent = before;
    }
    enum life_state state = life_get(cc->life);
    // A guest that stands still loses nothing; what else is done to it will end.
    if (state != LIFE_RUNNING || life_move(cc->life, LIFE_SNAPSHOTTING, err))
        return error_set(err, -EAGAIN, "VM %s is %s", cc->vm->name, life_name(state));
    int ret = snapshot_save(cc->vm, &params, cc->hooks, &cc->m, &report, err);
    life_return(cc->life);
    *made = (struct checkpoint_measure) {.full = report.kind == SNAPFILE_FULL,
                                         .pause_ns = report.pause_ns,
                                         .fault_ns = report.fault_ns / cc->vm->nr_vcpus,
                                         .total_ns = report.total_ns,
                                         .bytes = report.stored_bytes};
    return ret;
}

static void cancel(void *context)
{
    struct checkpoint_commands *cc = context;
    migration_cancel(&cc->m);
}

static void stop(struct checkpoint_commands *cc)
{
    if (!cc->checkpointer)
        return;
    checkpointer_stop(cc->checkpointer);
    cc->checkpointer = NULL;
    snapshot_track_end(&cc->track, cc->vm);
    migration_free(&cc->m);
    json_decref(cc->body);
    cc->body = NULL;
}

// A guest that goes back must find its disks as they were.
static int disks_are_fit(struct checkpoint_commands *cc, struct error *err)
{
    autofree char *texts = NULL;
    int ret = cc->hooks->disks ? cc->hooks->disks(cc->hooks->context, cc->vm, &texts, err) : 0;
    if (!ret && texts)
        ret = disks_check(texts, err);
    return ret ? error_prefix(err, "checkpoints") : 0;
}

int checkpoint_commands_start(struct checkpoint_commands *cc, json_t *body, struct error *err)
{
    struct checkpoint_params params;
    int ret =
        cc->vm ? params_take(body, &params, err) : error_set(err, -EPERM, "there is no guest yet");
    if (!ret)
        ret = disks_are_fit(cc, err);
    if (ret)
        return ret;
    stop(cc); // it may be the same directory
    ret = migration_init(&cc->m, err);
    if (ret)
        return ret;
    cc->log = params.settings.chain > 1;
    cc->saver = (struct checkpoint_saver) {save, cancel, cc, &cc->vm->log, cc->vm->config.seccomp};
    ret = checkpointer_start(&cc->checkpointer, &params, &cc->saver, err);
    if (ret) {
        migration_free(&cc->m);
        return ret;
    }
    cc->body = json_deep_copy(body);
    ret = policy_write(params.dir, body, err);
    if (ret)
        stop(cc);
    return ret;
}

void checkpoint_commands_stop(struct checkpoint_commands *cc)
{
    stop(cc);
}

json_t *checkpoint_commands_body(const struct checkpoint_commands *cc)
{
    return cc->body;
}

// --- routes

static void put_checkpoint(struct control_request *req, json_t *args, void *context)
{
    struct error err;
    if (checkpoint_commands_start(context, args, &err))
        control_reply_error(req, &err);
    else
        control_reply_ok(req, NULL);
}

static json_t *model_json(const struct checkpoint_status *s)
{
    return json_pack("{s:f, s:b, s:f, s:f, s:f, s:s, s:f, s:f}", "cost_s", s->model.cost,
                     "measured", (int)s->measured, "write_time_s", s->model.latency,
                     "restore_time_s", s->model.restart, "mtbf_s", s->model.mtbf, "form",
                     s->settings.form == YOUNG_DALY ? "daly" : "young", "interval_s", s->interval,
                     "expected_loss", young_loss(&s->model, s->interval));
}

static json_t *status_json(const struct checkpoint_status *s)
{
    json_t *json = json_pack(
        "{s:s, s:o, s:b, s:f, s:I, s:I, s:I, s:I, s:I, s:i, s:i, s:i}", "dir", s->dir, "model",
        model_json(s), "fixed", s->settings.interval > 0, "next_s", s->next, "made",
        (json_int_t)s->made, "failed", (json_int_t)s->failed, "removed", (json_int_t)s->removed,
        "merged", (json_int_t)s->merged, "bytes", (json_int_t)s->bytes, "keep",
        (int)s->settings.keep, "hourly", (int)s->settings.hourly, "chain", (int)s->settings.chain);
    if (s->made)
        json_object_set_new(
            json, "last",
            json_pack("{s:s, s:b, s:I, s:I, s:I, s:I}", "name", s->newest, "full", s->last.full,
                      "pause_us", (json_int_t)(s->last.pause_ns / 1000), "fault_us",
                      (json_int_t)(s->last.fault_ns / 1000), "total_us",
                      (json_int_t)(s->last.total_ns / 1000), "bytes", (json_int_t)s->last.bytes));
    if (s->error.code)
        json_object_set_new(json, "error", json_string(s->error.text));
    return json;
}

static int none(struct checkpoint_commands *cc, struct error *err)
{
    return cc->checkpointer ? 0
                            : error_set(err, -ENOENT,
                                        "no checkpoints are taken of this VM (ferry "
                                        "checkpoint --help)");
}

static void get_checkpoint(struct control_request *req, json_t *args, void *context)
{
    struct checkpoint_commands *cc = context;
    struct checkpoint_status status;
    struct error err;
    if (none(cc, &err)) {
        control_reply_error(req, &err);
        return;
    }
    checkpointer_status(cc->checkpointer, &status);
    control_reply_ok(req, status_json(&status));
}

static void delete_checkpoint(struct control_request *req, json_t *args, void *context)
{
    struct checkpoint_commands *cc = context;
    struct error err;
    if (none(cc, &err)) {
        control_reply_error(req, &err);
        return;
    }
    stop(cc);
    control_reply_ok(req, NULL);
}

#define BUILT                                                                    \
    (LIFE_BIT(LIFE_RUNNING) | LIFE_BIT(LIFE_PAUSED) | LIFE_BIT(LIFE_MIGRATING) | \
     LIFE_BIT(LIFE_SNAPSHOTTING))

static const struct control_route routes[] = {
    {"PUT", "/checkpoint", "save the guest every now and then", BUILT, put_fields, put_checkpoint},
    {"GET", "/checkpoint", "what a checkpoint costs, when the next is due", 0, NULL,
     get_checkpoint},
    {"DELETE", "/checkpoint", "take no more checkpoints", 0, NULL, delete_checkpoint},
};

int checkpoint_commands_create(struct checkpoint_commands **out, struct control *control,
                               struct life *life, const struct migrate_hooks *hooks,
                               struct error *err)
{
    struct checkpoint_commands *cc = calloc(1, sizeof(*cc));
    if (!cc)
        return error_set(err, -ENOMEM, "no memory for the checkpoint commands");
    cc->control = control;
    cc->life = life;
    cc->hooks = hooks;
    int ret = control_add(control, routes, ARRAY_SIZE(routes), cc, err);
    if (ret) {
        free(cc);
        return ret;
    }
    *out = cc;
    return 0;
}

void checkpoint_commands_vm(struct checkpoint_commands *cc, struct vm *vm)
{
    if (!vm)
        stop(cc);
    cc->vm = vm;
}

void checkpoint_commands_destroy(struct checkpoint_commands *cc)
{
    if (!cc)
        return;
    control_remove(cc->control, cc);
    stop(cc);
    free(cc);
}
