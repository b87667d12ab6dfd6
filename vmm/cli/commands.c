// SPDX-License-Identifier: Apache-2.0
// Control commands about the VM as a whole. (Those of migration and snapshots: migrate/commands.c.)
#include <errno.h>

#include "devices/platform.h"
#include "vmm/cli/session.h"
#include "vmm/vcpu.h"

static const char *phase_name(struct vm *vm)
{
    if (vm_stopped(vm))
        return "stopped";
    return vm_paused(vm) ? "paused" : "running";
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
    {.name = "pause", .help = "stop the vCPUs", .fn = cmd_pause},
    {.name = "resume", .help = "let them go on", .fn = cmd_resume},
    {.name = "stop", .help = "end the VM; {powerbutton: true} asks the guest", .fn = cmd_stop},
};

int session_commands_add(struct session *s, struct error *err)
{
    return control_add(s->control, commands, ARRAY_SIZE(commands), s, err);
}
