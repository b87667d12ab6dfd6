// SPDX-License-Identifier: Apache-2.0
// Routes of the API about the VM as a whole. (Those of migration and snapshots:
// migrate/commands.c.)
#include <errno.h>
#include <string.h>

#include "devices/platform.h"
#include "vmm/cli/metrics.h"
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

// "disk0.size": what is before the point names a device.
static int setting_apply(const struct session *s, const char *key, json_t *value, struct error *err)
{
    const char *point = strchr(key, '.');
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

static const char *const vm_states[] = {"Paused", "Resumed", NULL};
static const struct schema_field vm_fields[] = {
    {"state", SCHEMA_STRING, .required = true, .choices = vm_states}, {NULL}};
static const struct schema_field stop_fields[] = {
    {"powerbutton", SCHEMA_BOOL},
    {"timeout_s", SCHEMA_INTEGER, .min = 1, .max = STOP_TIMEOUT_MAX_S},
    {NULL},
};
static const struct schema_field devices_fields[] = {{"settings", SCHEMA_OBJECT, .required = true},
                                                     {NULL}};

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
    {"PATCH", "/vm", "pause or resume", LIVE, vm_fields, patch_vm},
    {"PUT", "/stop", "end the VM; {\"powerbutton\": true} asks the guest first",
     BUILT | LIFE_BIT(LIFE_CREATED) | LIFE_BIT(LIFE_STOPPING), stop_fields, put_stop},
    {"PUT", "/reset", "start the guest again from its kernel, at once", LIVE, NULL, put_reset},
    {"GET", "/events", "changes of state, a line each, until the VM ends", 0, NULL, get_events},
};

int session_commands_add(struct session *s, struct error *err)
{
    return control_add(s->control, routes, ARRAY_SIZE(routes), s, err);
}
