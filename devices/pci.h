// SPDX-License-Identifier: Apache-2.0
// A small PCI host bridge: one bus of up to 32 single functions with 256 bytes of configuration
// space and at most one memory window (BAR 0, 32 bits) each. PCI Local Bus 3.0, chapter 6; PCI
// Firmware 3.3, chapter 4 (ECAM).
//
// Guests reach configuration space by memory (LAYOUT_ECAM; described by the MCFG table) or by the
// ports 0xcf8 and 0xcfc. Windows have their addresses before the guest starts, as if from firmware,
// but decode nothing until the guest sets "memory space". It may move them within
// [LAYOUT_PCI_MMIO, LAYOUT_PCI_END), the only addresses that the bridge forwards: a window anywhere
// else (over RAM, over an APIC, cut off by the end) decodes nothing. Where windows lie over each
// other the function in the lower slot answers.
//
// "Bus master" is not looked at: a function may use guest memory and send messages without it.
// There are no interrupt pins; functions send messages (devices/msix.h).
//
// Threads. A function's lock is held around each of its ops; accesses come from vCPU threads. The
// bridge takes no other lock while it calls them.
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/device.h"
#include "vmm/error.h"

enum {
    PCI_SLOTS = 32, // slot 0 is the bridge itself
    PCI_CONFIG_LEN = 256,
    PCI_WINDOW_MAX = 64 * 1024, // bytes
};

enum { // registers of configuration space, type 0 header
    PCI_VENDOR = 0x00,
    PCI_DEVICE = 0x02,
    PCI_COMMAND = 0x04,
    PCI_STATUS = 0x06,
    PCI_REVISION = 0x08,
    PCI_CLASS = 0x09, // 3 bytes
    PCI_HEADER_TYPE = 0x0e,
    PCI_BAR0 = 0x10,
    PCI_SUBVENDOR = 0x2c,
    PCI_SUBDEVICE = 0x2e,
    PCI_CAPABILITIES = 0x34,
    PCI_HEADER_LEN = 0x40,
};

enum { PCI_COMMAND_MEMORY = 1 << 1, PCI_COMMAND_MASTER = 1 << 2 };
enum { PCI_CAP_VENDOR = 0x09, PCI_CAP_MSIX = 0x11 };

struct pci_function;
struct pci_host;

struct pci_function_ops {
    // An access to the window: size 1, 2, 4 or 8; offset + size lies within it.
    uint64_t (*read)(struct pci_function *f, uint64_t offset, unsigned size);
    void (*write)(struct pci_function *f, uint64_t offset, unsigned size, uint64_t value);
    // The window decodes at f->base now, no longer at `old`; 0 = nowhere. May be NULL.
    void (*moved)(struct pci_function *f, uint64_t old);
    // Before a read of config[offset, offset+size), and after a write to it. May be NULL.
    void (*config_touched)(struct pci_function *f, unsigned offset, unsigned size, bool write);
    void (*reset)(struct pci_function *f); // config space is initial again; may be NULL
};

struct pci_function {
    const struct pci_function_ops *ops;
    pthread_mutex_t *lock;
    struct pci_host *host; // NULL until added
    unsigned slot;
    uint8_t config[PCI_CONFIG_LEN];   // as the guest reads it
    uint8_t writable[PCI_CONFIG_LEN]; // bits that the guest may change
    uint8_t initial[PCI_CONFIG_LEN];  // after reset
    unsigned caps_end;                // first byte after the last capability
    uint32_t window;                  // bytes, a power of two; 0 = none
    uint64_t base;                    // where the window decodes; 0 = nowhere
};

struct pci_identity {
    uint16_t vendor, device, subvendor, subdevice;
    uint32_t class; // 24 bits: base class, subclass, interface
    uint8_t revision;
};

void pci_function_init(struct pci_function *f, const struct pci_function_ops *ops,
                       pthread_mutex_t *lock, const struct pci_identity *id, uint32_t window);
// Appends a capability of `len` bytes, whose first two (id, next) are set here; `writable` may be
// NULL: the guest changes nothing. Returns its offset in configuration space.
unsigned pci_capability_add(struct pci_function *f, uint8_t id, const void *body,
                            const void *writable, unsigned len);

// After the capabilities are there. -EINVAL or -EEXIST: no such slot, or taken.
int pci_function_add(struct pci_host *host, struct pci_function *f, unsigned slot,
                     struct error *err);
// Its window decodes nowhere then. Fine when it was never added, and after the bridge is gone.
void pci_function_remove(struct pci_function *f);

// To values after power-on. With the lock held.
void pci_function_reset(struct pci_function *f);
// f->config was loaded and is hostile: checks that nothing differs but what the guest may change,
// and makes the window decode where it says. With the lock held.
int pci_function_loaded(struct pci_function *f, struct error *err);

struct vm;

// How doorbells and interrupts of functions reach KVM; tests have their own.
struct pci_wiring {
    int (*doorbell)(struct vm *vm, uint64_t addr, int event_fd, bool add, struct error *err);
    int (*irqfd)(struct vm *vm, unsigned gsi, int event_fd, bool add, struct error *err);
    int (*route)(struct vm *vm, unsigned gsi, uint64_t address, uint32_t data, struct error *err);
};

struct pci_host_config {
    const struct pci_wiring *wiring; // NULL = KVM
};

extern const struct device_class pci_host_class; // its config: struct pci_host_config or NULL
struct pci_host *pci_host_of(struct device *dev);
const struct pci_wiring *pci_host_wiring(const struct pci_host *host);
