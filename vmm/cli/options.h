// SPDX-License-Identifier: Apache-2.0
// The options of `run`, `receive` and `restore`: one table gives the flags, the help text and the
// keys of --config files. A flag and a key of the same name take the same values.
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>

#include "devices/console.h"
#include "devices/virtio_kinds.h"
#include "sched/proto.h"
#include "vmm/boot/boot.h"
#include "vmm/cli/jail.h"
#include "vmm/error.h"
#include "vmm/vm.h"

// Which command offers an option.
enum { FOR_RUN = 1, FOR_RECEIVE = 2, FOR_RESTORE = 4, FOR_ALL = 7 };

enum { STOP_TIMEOUT_S = 10, STOP_TIMEOUT_MAX_S = 24 * 3600 };

struct device_option {
    const struct virtio_kind *kind;
    char *text;                   // as given; empty for a switch, or for one that the API made
    char *id;                     // the API's name for it, or NULL
    struct virtio_attach *config; // of the kind's class
    bool given;                   // by the command line: stays whatever the API describes
};

struct vm_options {
    struct vm_config vm;
    struct boot_config boot;
    struct console_config console;
    char *name, *cpu, *memory; // as given; memory and cpu also go into the machine description
    char *kernel, *initrd, *append, *numa, *listen, *api_sock, *config_file, *metrics_listen;
    char *checkpoints, *newest, *new_mac;
    char *jail_text;  // as given
    char *bases;      // images that disks may name though they lie outside the jail, a line each
    pid_t supervisor; // vmm/cli/supervise.h; 0: nobody starts this VM again
    char *tls, *tls_ca, *tls_cert, *tls_key, *psk;    // files, of `receive`
    struct device_option devices[VIRTIO_DEVICES_MAX]; // in the order of the kinds
    unsigned nr_devices;
    bool disk_overwrite; // receive: by a disk that comes with the guest
    struct jail_config jail;
    char *sched;              // socket of the scheduler, "auto" or "off"; NULL: auto
    int sched_broker;         // sched/broker.h, of a jail; -1: none
    struct sched_share share; // asked of it
    unsigned stop_timeout_s;  // for a guest that was asked to end; 0: it is not asked
    bool pci;                 // transport of the virtio devices
    bool console_given;       // by an option, not by default
    bool dry_run, mark, ucall, debug_exit, control, vmgenid, reboots, insecure;
    bool disks;     // restore: those of the snapshot
    bool lazy, map; // restore: memory comes when it is touched; is the file's until it is written
};

void options_init(struct vm_options *o);
void options_free(struct vm_options *o);

// Parses argv (argv[0] is the command). Fills `positional` (up to `max`; more is an error).
// Returns 0, or 1 when --help was printed, or a usage error.
int options_parse(struct vm_options *o, unsigned command, int argc, char **argv, const char *usage,
                  char **positional, int max, struct error *err);

// One option by its name, as from a config file.
int options_set(struct vm_options *o, unsigned command, const char *name, const char *value,
                struct error *err);
int options_load(struct vm_options *o, unsigned command, const char *path, struct error *err);

// A device whose config is there already (the API's). Takes `config`, allocated, also on error.
int options_add_device(struct vm_options *o, const struct virtio_kind *kind, const char *text,
                       const char *id, struct virtio_attach *config, struct error *err);
void options_remove_device(struct vm_options *o, unsigned i);

// The machine the guest sees, as JSON text that options_machine takes back on another host.
char *options_describe(const struct vm_options *o);
int options_machine(struct vm_options *o, const char *json, struct error *err);

// Everything as a config file would say it (for --dry-run).
json_t *options_json(const struct vm_options *o);
