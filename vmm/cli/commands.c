// SPDX-License-Identifier: Apache-2.0
// Control commands about the VM as a whole. (Those of migration and snapshots: migrate/commands.c.)
#include <errno.h>
#include <string.h>

#include "devices/platform.h"
#include "vmm/cli/session.h"
#include "vmm/vcpu.h"

static const char *phase_name(struct vm *vm)
{
    if (vm_stopped(vm))
        return "stopped";
    return vm_paused(vm) ? "paused" : "running";
}

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

static void cmd_set(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct error err;
    const char *key;
    json_t *value;
    json_object_foreach(args, key, value)
    {
        if (setting_apply(context, key, value, &err)) {
            control_reply_error(req, &err);
            return;
        }
    }
    control_reply_ok(req, NULL);
}

static void cmd_info(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct session *s = context;
    json_t *vcpus = json_array();
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        json_array_append_new(vcpus, json_pack("{s:i, s:I}", "index", (int)i, "exits",
                                               (json_int_t)atomic_load(&vm->vcpus[i].exits)));
    json_t *info =
        json_pack("{s:s, s:s, s:i, s:I, s:o}", "name", vm->name, "state", phase_name(vm), "pid",
                  (int)getpid(), "memory_bytes", (json_int_t)vm->ram.size, "vcpus", vcpus);
    const char *console = console_path(s->console);
    if (console && *console)
        json_object_set_new(info, "console", json_string(console));
    json_object_set_new(info, "devices", devices_show(s));
    control_reply_ok(req, info);
}

static void cmd_pause(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct error err;
    if (session_busy(context, &err) || vm_pause(vm, &err))
        control_reply_error(req, &err);
    else
        control_reply_ok(req, NULL);
}

static void cmd_resume(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct error err;
    if (session_busy(context, &err)) {
        control_reply_error(req, &err);
        return;
    }
    if (!vm_paused(vm)) {
        error_set(&err, -EALREADY, "VM %s is not paused but %s", vm->name, phase_name(vm));
        control_reply_error(req, &err);
        return;
    }
    vm_resume(vm);
    control_reply_ok(req, NULL);
}

static void cmd_stop(struct vm *vm, json_t *args, struct control_request *req, void *context)
{
    struct session *s = context;
    if (json_is_true(json_object_get(args, "powerbutton"))) {
        power_button(s->board.power);
        control_reply_ok(req, NULL);
        return;
    }
    control_reply_ok(req, NULL);
    vm_request_stop(vm, VM_STOP_HOST, 0, "`ferry stop`");
}

static const struct control_command commands[] = {
    {.name = "info", .help = "name, state, memory, vCPUs", .fn = cmd_info},
    {.name = "set", .help = "{\"disk0.size\": \"2G\", ...}: change devices", .fn = cmd_set},
    {.name = "pause", .help = "stop the vCPUs", .fn = cmd_pause},
    {.name = "resume", .help = "let them go on", .fn = cmd_resume},
    {.name = "stop", .help = "end the VM; {powerbutton: true} asks the guest", .fn = cmd_stop},
};

int session_commands_add(struct session *s, struct error *err)
{
    return control_add(s->control, commands, ARRAY_SIZE(commands), s, err);
}
