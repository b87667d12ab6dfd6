// SPDX-License-Identifier: Apache-2.0
// The virtio-pci transport (virtio 1.2, 4.1; modern only): one PCI function for each device, an
// address for each queue's doorbell, an MSI-X vector for each queue and one for the configuration.
// There is no interrupt pin: a driver that uses no MSI-X gets no interrupts (it may poll).
#pragma once

#include "devices/pci.h"
#include "devices/virtio.h"

struct virtio_pci_place {
    struct pci_host *host; // board.pci
    unsigned slot;         // 1 to PCI_SLOTS-1; device i of a VM has slot i + 1
};

extern const struct virtio_transport virtio_pci_transport; // its place: struct virtio_pci_place
