// SPDX-License-Identifier: Apache-2.0
// A whole machine of this process: event loop, VM, board, control socket; from creation to the
// last word about how it ended.
#pragma once

#include "devices/board.h"
#include "devices/virtio_mmio.h"
#include "migrate/commands.h"
#include "vmm/cli/options.h"
#include "vmm/control.h"
#include "vmm/loop.h"
#include "vmm/vm.h"

struct session {
    struct vm_options *options; // the caller's
    struct loop *loop;
    struct vm *vm;
    struct board board;
    struct acpi_virtio_mmio windows[VIRTIO_DEVICES_MAX]; // of options->devices, in their order
    struct device *devices[VIRTIO_DEVICES_MAX];
    struct console *console; // the board's; outlives the VM, is closed after the loop
    struct control *control;
    struct migrate_commands *migrate;
    struct migrate_hooks hooks;
    struct arrival *arrival; // `ferry receive`: the guest that comes in, NULL otherwise
    struct loop_watch signals;
    int signal_fd;
};

// Without --name: ferry-PID.
int session_default_name(struct vm_options *o, struct error *err);
// Loop and signals only; the VM comes by session_build, or from a stream through session_hooks.
int session_init(struct session *s, struct vm_options *options, struct error *err);
// Creates VM and board. With options->kernel set, loads it and sets the boot entry.
int session_build(struct session *s, struct error *err);
// How migrate/ describes, builds and drops this session's VM.
void session_hooks(struct session *s, struct migrate_hooks *hooks);
// Opens the control socket with every command this program has.
int session_listen(struct session *s, struct error *err);
// Runs the loop until the VM stops; prints how it ended; the exit status.
int session_run(struct session *s);
void session_drop(struct session *s); // the VM and what belongs to it
void session_destroy(struct session *s);

// -EBUSY while a migration or snapshot has the VM's running in hand.
int session_busy(const struct session *s, struct error *err);
int session_commands_add(struct session *s, struct error *err); // vmm/cli/commands.c

// A virtio device's name is its kind and number: "disk0". `name` has VIRTIO_NAME_MAX bytes.
enum { DEVICE_NAME_MAX = 32 };
void session_device_name(const struct session *s, unsigned i, char name[DEVICE_NAME_MAX]);
