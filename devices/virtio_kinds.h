// SPDX-License-Identifier: Apache-2.0
// The kinds of virtio device a VM can have: one row each gives the option, its help, the device's
// name (kind and number: disk0, disk1, net0) and its place. Devices are placed in the order of the
// rows, whatever the order of the options, so that two VMs with the same options are the same
// machine.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "devices/virtio.h"

struct virtio_kind {
    const char *name;
    char brief;      // short form of the option, 0 = none
    const char *arg; // of the option, for its help; NULL: a switch without text
    const char *help;
    // All of it is the guest's: it travels with a migration. Otherwise (a file, a socket of this
    // host) the destination names its own.
    bool machine;
    unsigned max; // devices of this kind
    const struct device_class *class;
    size_t config_size; // of the class's config, which starts with struct virtio_attach
    int (*parse)(const char *text, void *config, struct error *err); // NULL: a switch
};

enum {
    VIRTIO_DEVICES_MAX = 31, // of a VM: slots of a PCI bus beside the bridge
    VIRTIO_KINDS_MAX = 8,
    VIRTIO_CONFIG_SIZE_MAX = 16 * 1024, // of any class's config
};

// NULL: none of that name.
const struct virtio_kind *virtio_kind_find(const char *name);
const struct virtio_kind *virtio_kind_at(unsigned i); // NULL: no more
