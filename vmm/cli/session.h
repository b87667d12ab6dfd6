// SPDX-License-Identifier: Apache-2.0
// A whole machine of this process: event loop, VM, board, control socket; from creation to the
// last word about how it ended.
#pragma once

#include "devices/board.h"
#include "devices/virtio_mmio.h"
#include "migrate/checkpoint_commands.h"
#include "migrate/commands.h"
#include "migrate/lazy.h"
#include "sched/vm.h"
#include "vmm/cli/options.h"
#include "vmm/cli/outside.h"
#include "vmm/cli/usage.h"
#include "vmm/control.h"
#include "vmm/life.h"
#include "vmm/loop.h"
#include "vmm/vm.h"

struct api;
struct rollback;
struct snapshot_report;
struct starter;

struct session {
    struct vm_options *options; // the caller's
    struct loop *loop;
    struct vm *vm;
    struct board board;
    struct acpi_virtio_mmio windows[VIRTIO_DEVICES_MAX]; // of options->devices, in their order
    struct device *devices[VIRTIO_DEVICES_MAX];
    struct console *console; // the board's; outlives the VM, is closed after the loop
    struct life life;
    struct usage usage;
    struct sched_tie *tie; // to the scheduler; NULL: without
    struct control *control;
    bool registered; // vmm/cli/registry.h has a record of this VM
    bool confined;   // session_confine has been
    bool setup;      // so has the wider filter, which can build VMs
    struct api *api;
    struct migrate_commands *migrate;
    struct checkpoint_commands *checkpoints;
    struct rollback *rollback;                    // one that is under way
    struct outside outside;                       // files of a VM in a jail
    struct starter *starters[VIRTIO_DEVICES_MAX]; // of the options' --net user
    unsigned nr_starters;
    const char *from; // a checkpoint in the jail, which the guest is when it starts; NULL: none
    bool restored;    // the guest came from a file, though options->kernel may be set
    struct migrate_hooks hooks;
    struct lazy *lazy;       // a guest that was restored before its memory was there
    struct arrival *arrival; // `ferry receive`: the guest that comes in, NULL otherwise
    struct session_socket {  // of the API, between session_listen and session_serve
        int fd;
        char path[108];
    } sockets[2];
    unsigned nr_sockets;
    int metrics_fd;               // --metrics-listen, until session_serve; -1 otherwise
    struct loop_timer stop_timer; // runs while the guest is asked to end
    unsigned stop_s;
    struct boot_files *boot_files; // what the guest starts from, NULL if it came otherwise
    struct loop_call reset_call;
    struct log_limit reset_limit;
    atomic_bool reset_called; // it is on its way to the loop
    struct loop_watch signals;
    sigset_t waiting; // struct loop
    int signal_fd;    // of their numbers, a byte each
};

// Without --name: ferry-PID.
int session_default_name(struct vm_options *o, struct error *err);
// Loop and signals only; the VM comes by session_build, or from a stream through session_hooks.
int session_init(struct session *s, struct vm_options *options, struct error *err);
// Creates VM and board. With options->kernel set, loads it and sets the boot entry.
int session_build(struct session *s, struct error *err);
// How migrate/ describes, builds and drops this session's VM.
void session_hooks(struct session *s, struct migrate_hooks *hooks);
// A VM in a jail that comes from a stream or a file: console, sockets, and the jail, before it is
// there.
int session_enter(struct session *s, struct error *err);
// Opens the API's sockets: clients can connect, and wait. With or without a VM.
int session_listen(struct session *s, struct error *err);
// Answers them, with every route this program has. Apart, since a guest need not wait for it.
int session_serve(struct session *s, struct error *err);
// A VM that was built by --kernel or the API's configuration: from created to running.
int session_start(struct session *s, struct error *err);
// A VM that has arrived is running or paused now: says so to the life.
void session_arrived(struct session *s);
// From here on the loop's thread makes only the calls of vmm/seccomp.c. After every thread that is
// not a worker's has been created; once more does nothing.
int session_confine(struct session *s, struct error *err);

// --jail, if it is asked for: as jail_begin, with somebody outside who connects to the scheduler.
int session_jail(struct vm_options *o, int *status, struct error *err);
// Asks the guest to end, by its power button: LIFE_STOPPING. One that has not after `timeout_s` is
// ended. -ENOTCONN: it does not listen for the button; -EPERM: it does not run.
int session_ask(struct session *s, unsigned timeout_s, struct error *err);
// The guest starts again from its kernel, at once: devices reset, memory empty. A paused VM stays
// paused. -ENOTSUP: it came from a snapshot or another host, without its kernel.
int session_reset(struct session *s, const char *why, struct error *err);
// Runs the loop until the VM stops; prints how it ended; the exit status.
int session_run(struct session *s);
void session_vm_drop(struct session *s); // the VM alone, before anything works on it
void session_drop(struct session *s);    // the VM and what belongs to it, with the API
void session_destroy(struct session *s);

// Builds the VM that a snapshot file holds; it is paused then. `mode`: its memory is there, or
// comes when it is touched.
int session_load(struct session *s, const char *path, enum lazy_mode mode,
                 struct snapshot_report *report, struct error *err);
// Begins the checkpoints that --checkpoints asks for. `from` (may be NULL): the directory the guest
// came from; what was asked for there last counts then.
int session_checkpoints(struct session *s, const char *from, struct error *err);
// The options' disks, once a snapshot brings the state that they had at its instant.
void session_disks_forget(struct session *s, const struct snapfile *file);
json_t *session_info(struct session *s);                        // what GET /info says
int session_commands_add(struct session *s, struct error *err); // vmm/cli/commands.c

// A virtio device's name is its kind and number: "disk0". `name` has VIRTIO_NAME_MAX bytes.
enum { DEVICE_NAME_MAX = 32 };
void session_device_name(const struct session *s, unsigned i, char name[DEVICE_NAME_MAX]);
