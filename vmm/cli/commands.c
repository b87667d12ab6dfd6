// SPDX-License-Identifier: Apache-2.0
// Routes of the API about the VM as a whole. (Those of migration and snapshots:
// migrate/commands.c.)
#include <errno.h>
#include <string.h>

#include "devices/platform.h"
#include "vmm/cli/metrics.h"
#include "vmm/cli/rollback.h"
#include "vmm/cli/session.h"
#include "vmm/vcpu.h"

static json_t *devices_show(const struct session *s)
{
    json_t *all = json_object();
    char name[DEVICE_NAME_MAX];
    for (unsigned i = 0; i < s->options->nr_devices; i++) {
        struct device *dev = s->devices[i];
        json_t *one = json_object();
        if (dev->class->show)
            dev->class->show(dev, one);
        session_device_name(s, i, name);
        json_object_set_new(all, name, one);
    }
    return all;
}

static struct device *device_find(const struct session *s, const char *wanted, size_t len)
{
    char name[DEVICE_NAME_MAX];
    for (unsigned i = 0; i < s->options->nr_devices; i++) {
        session_device_name(s, i, name);
        if (strlen(name) == len && !memcmp(name, wanted, len))
            return s->devices[i];
    }
    return NULL;
}

// "memory": what the guest shall have, the balloon holds the rest.
static int memory_apply(const struct session *s, json_t *value, struct error *err)
{
    uint64_t bytes, size = s->vm->ram.size;
    const char *text = json_string_value(value);
    char target[32];
    struct device *dev = device_find(s, "balloon0", strlen("balloon0"));
    if (!dev)
        return error_set(err, -ENOENT, "memory: VM %s has no balloon to take the rest",
                         s->vm->name);
    if (!text || size_parse(text, MiB, &bytes) || !bytes || bytes > size || bytes % PAGE_SIZE)
        return error_set(err, -EINVAL, "memory '%.40s': expected a size up to the VM's %llu MiB",
                         text ? text : "", (unsigned long long)(size / MiB));
    snprintf(target, sizeof(target), "%lluK", (unsigned long long)((size - bytes) / KiB));
    return dev->class->set(dev, "target", target, err);
}

static int share_set(const struct session *s, const struct sched_share *share, struct error *err)
{
    if (!s->tie)
        return error_set(err, -ENOTCONN, "VM %s is not scheduled by ferry (ferry run --sched)",
                         s->options->name);
    return sched_tie_set(s->tie, share, err);
}

static bool share_key(const char *key)
{
    return !strcmp(key, "weight") || !strcmp(key, "cap") || !strcmp(key, "affinity");
}

// "disk0.size": what is before the point names a device.
static int setting_apply(const struct session *s, const char *key, json_t *value, struct error *err)
{
    struct sched_share share = {0};
    if (!strcmp(key, "memory"))
        return memory_apply(s, value, err);
    const char *point = strchr(key, '.');
    if (!point && json_is_string(value) && share_key(key)) {
        int set = sched_share_parse(key, json_string_value(value), &share, err);
        return set ? set : share_set(s, &share, err);
    }
    size_t len = point ? (size_t)(point - key) : strlen(key);
    struct device *dev = device_find(s, key, len);
    if (!dev)
        return error_set(err, -ENOENT, "%s: VM %s has no device '%.*s'", key, s->vm->name, (int)len,
                         key);
    if (!json_is_string(value))
        return error_set(err, -EINVAL, "%s: expected a string", key);
    int ret = -ENOENT;
    if (point && dev->class->set)
        ret = dev->class->set(dev, point + 1, json_string_value(value), err);
    if (ret == -ENOENT)
        return error_set(err, ret, "%s: no such setting", key);
    return ret ? error_prefix(err, "%s", key) : 0;
}

static void patch_devices(struct control_request *req, json_t *args, void *context)
{
    struct error err;
    const char *key;
    json_t *value;
    json_object_foreach(json_object_get(args, "settings"), key, value)
    {
        if (setting_apply(context, key, value, &err)) {
            control_reply_error(req, &err);
            return;
        }
    }
    control_reply_ok(req, NULL);
}

json_t *session_info(struct session *s)
{
    struct vm *vm = s->vm;
    json_t *info = json_pack("{s:s, s:s, s:i}", "name", s->options->name, "state",
                             life_name(life_get(&s->life)), "pid", (int)getpid());
    if (vm) {
        json_t *vcpus = json_array();
        for (unsigned i = 0; i < vm->nr_vcpus; i++)
            json_array_append_new(vcpus,
                                  json_pack("{s:i, s:I, s:o}", "index", (int)i, "exits",
                                            (json_int_t)atomic_load(&vm->vcpus[i].exits),
                                            "handling", histogram_show(&vm->vcpus[i].handling)));
        json_object_set_new(info, "memory_bytes", json_integer((json_int_t)vm->ram.size));
        json_object_set_new(info, "vcpus", vcpus);
        json_object_set_new(info, "devices", devices_show(s));
        usage_show(&s->usage, info);
        if (s->tie)
            json_object_set_new(info, "sched", sched_tie_show(s->tie));
    }
    const char *console = s->console ? console_path(s->console) : NULL;
    if (console && *console)
        json_object_set_new(info, "console", json_string(console));
    return info;
}

static void get_info(struct control_request *req, json_t *args, void *context)
{
    control_reply_ok(req, session_info(context));
}

static void get_metrics(struct control_request *req, json_t *args, void *context)
{
    struct session *s = context;
    json_t *info = session_info(s);
    json_object_set_new(info, "api_latency", histogram_show(control_latency(s->control)));
    autofree char *text = metrics_text(info);
    json_decref(info);
    control_reply_text(req, "text/plain; version=0.0.4", text ? text : "");
}

static void pause_vm(struct session *s, struct control_request *req)
{
    struct error err;
    bool already = life_get(&s->life) == LIFE_PAUSED;
    int ret = already ? 0 : life_move(&s->life, LIFE_PAUSED, &err);
    if (!ret && !already) {
        ret = vm_pause(s->vm, &err);
        if (ret) // it goes on, or has ended
            life_move(&s->life, LIFE_RUNNING, NULL);
    }
    if (ret)
        control_reply_error(req, &err);
    else
        control_reply_ok(req, NULL);
}

static void resume_vm(struct session *s, struct control_request *req)
{
    struct error err;
    enum life_state state = life_get(&s->life);
    int ret = state == LIFE_PAUSED ? life_move(&s->life, LIFE_RUNNING, &err)
                                   : error_set(&err, -EALREADY, "VM %s is not paused but %s",
                                               s->options->name, life_name(state));
    if (ret) {
        control_reply_error(req, &err);
        return;
    }
    vm_resume(s->vm);
    control_reply_ok(req, NULL);
}

static void patch_vm(struct control_request *req, json_t *args, void *context)
{
    if (!strcmp(json_string_value(json_object_get(args, "state")), "Paused"))
        pause_vm(context, req);
    else
        resume_vm(context, req);
}

static void get_sched(struct control_request *req, json_t *args, void *context)
{
    const struct session *s = context;
    control_reply_ok(req, s->tie ? sched_tie_show(s->tie) : json_pack("{s:b}", "attached", 0));
}

static void patch_sched(struct control_request *req, json_t *args, void *context)
{
    struct error err;
    struct sched_share share = {0};
    json_t *weight = json_object_get(args, "weight"), *cap = json_object_get(args, "cap");
    const char *affinity = json_string_value(json_object_get(args, "affinity"));
    int ret = affinity ? sched_affinity_parse(affinity, &share, &err) : 0;
    if (weight)
        share.weight = (int32_t)json_integer_value(weight);
    if (cap)
        share.cap = (int32_t)json_integer_value(cap);
    share.has |= (weight ? SCHED_HAS_WEIGHT : 0) | (cap ? SCHED_HAS_CAP : 0);
    if (!ret)
        ret = share_set(context, &share, &err);
    if (ret)
        control_reply_error(req, &err);
    else
        control_reply_ok(req, NULL);
}

static void put_stop(struct control_request *req, json_t *args, void *context)
{
    struct session *s = context;
    struct error err;
    json_t *timeout = json_object_get(args, "timeout_s");
    unsigned timeout_s = json_is_integer(timeout) ? (unsigned)json_integer_value(timeout)
                                                  : s->options->stop_timeout_s;
    bool ask = json_is_true(json_object_get(args, "powerbutton"));
    if (ask && session_ask(s, timeout_s ? timeout_s : STOP_TIMEOUT_S, &err)) {
        control_reply_error(req, &err);
        return;
    }
    control_reply_ok(req, NULL);
    if (ask)
        return;
    if (s->vm)
        vm_request_stop(s->vm, VM_STOP_HOST, 0, "`ferry stop`");
    else
        loop_stop(s->loop);
}

static void put_reset(struct control_request *req, json_t *args, void *context)
{
    struct error err;
    if (session_reset(context, "`ferry reset`", &err))
        control_reply_error(req, &err);
    else
        control_reply_ok(req, NULL);
}

static void get_events(struct control_request *req, json_t *args, void *context)
{
    struct session *s = context;
    control_subscribe(s->control, req);
}

static void put_rollback(struct control_request *req, json_t *args, void *context)
{
    struct error err;
    if (rollback_begin(context, json_string_value(json_object_get(args, "path")), req, &err))
        control_reply_error(req, &err);
}

static const char *const vm_states[] = {"Paused", "Resumed", NULL};
static const struct schema_field vm_fields[] = {
    {"state", SCHEMA_STRING, .required = true, .choices = vm_states}, {NULL}};
static const struct schema_field stop_fields[] = {
    {"powerbutton", SCHEMA_BOOL},
    {"timeout_s", SCHEMA_INTEGER, .min = 1, .max = STOP_TIMEOUT_MAX_S},
    {NULL},
};
static const struct schema_field rollback_fields[] = {
    {"path", SCHEMA_STRING, .required = true, .min = 1}, {NULL}};
static const struct schema_field devices_fields[] = {{"settings", SCHEMA_OBJECT, .required = true},
                                                     {NULL}};

static const struct schema_field sched_fields[] = {
    {"weight", SCHEMA_INTEGER, .min = 1, .max = 65535},
    {"cap", SCHEMA_INTEGER, .max = SCHED_VCPUS_MAX * 100},
    {"affinity", SCHEMA_STRING, .min = 1, .max = SCHED_TEXT_MAX},
    {NULL},
};

enum {
    LIVE = LIFE_BIT(LIFE_RUNNING) | LIFE_BIT(LIFE_PAUSED),
    BUILT = LIVE | LIFE_BIT(LIFE_MIGRATING) | LIFE_BIT(LIFE_SNAPSHOTTING),
};

static const struct control_route routes[] = {
    {"GET", "/info", "name, state, memory, vCPUs, devices", 0, NULL, get_info, .at_once = true},
    {"GET", "/metrics/prometheus", "the same figures as text for Prometheus", 0, NULL, get_metrics,
     .at_once = true},
    {"PATCH", "/devices", "change devices: {\"settings\": {\"disk0.size\": \"2G\", ...}}", BUILT,
     devices_fields, patch_devices},
    {"GET", "/sched", "how the host's scheduler treats the VM: weight, cap, affinity", 0, NULL,
     get_sched},
    {"PATCH", "/sched", "change that, within a slice", BUILT, sched_fields, patch_sched},
    {"PATCH", "/vm", "pause or resume", LIVE, vm_fields, patch_vm},
    {"PUT", "/rollback", "the guest becomes the one in that file",
     LIVE | LIFE_BIT(LIFE_SNAPSHOTTING), rollback_fields, put_rollback},
    {"PUT", "/stop", "end the VM; {\"powerbutton\": true} asks the guest first",
     BUILT | LIFE_BIT(LIFE_CREATED) | LIFE_BIT(LIFE_STOPPING), stop_fields, put_stop},
    {"PUT", "/reset", "start the guest again from its kernel, at once", LIVE, NULL, put_reset},
    {"GET", "/events", "changes of state, a line each, until the VM ends", 0, NULL, get_events},
};

int session_commands_add(struct session *s, struct error *err)
{
    return control_add(s->control, routes, ARRAY_SIZE(routes), s, err);
}
