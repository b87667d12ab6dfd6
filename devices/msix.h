// SPDX-License-Identifier: Apache-2.0
// MSI-X of a PCI function (PCI Local Bus 3.0, 6.8.2): a table of messages in its window, and the
// capability that switches it on. A vector that may be sent costs one write to an eventfd; KVM
// makes the interrupt of it (vmm/msi.h). A masked one is remembered as pending until it is
// unmasked.
//
// The function's lock is held around every call, so that a signal and a mask never race.
#pragma once

#include "devices/pci.h"
#include "vmm/log.h"

enum {
    MSIX_MAX = 64,       // vectors; pending bits are one word
    MSIX_ENTRY_LEN = 16, // bytes of the table
};

struct msix {
    struct vm *vm;
    const struct pci_wiring *wiring;
    struct pci_function *f;
    unsigned cap; // offset of the capability in configuration space
    unsigned gsi; // of vector 0
    unsigned nr;
    int fds[MSIX_MAX];
    uint64_t lost; // vectors whose message goes nowhere, a bit each
    struct log_limit limit;
    uint32_t table[MSIX_MAX * MSIX_ENTRY_LEN / 4];
    uint64_t pending;
    uint32_t saved_nr; // `nr` in saved state
};

// Adds the capability to `f`, with table and pending bits at these offsets of its window. After an
// error msix_destroy has nothing left to do.
int msix_create(struct msix *m, struct vm *vm, const struct pci_wiring *wiring,
                struct pci_function *f, unsigned nr, uint32_t table, uint32_t pending,
                struct error *err);
void msix_destroy(struct msix *m);
void msix_reset(struct msix *m);

void msix_signal(struct msix *m, unsigned vector); // one out of range is ignored

// Accesses to the table and to the pending bits: 4 or 8 bytes, aligned; others read as 0 and change
// nothing.
uint64_t msix_table_read(const struct msix *m, uint64_t offset, unsigned size);
void msix_table_write(struct msix *m, uint64_t offset, unsigned size, uint64_t value);
uint64_t msix_pending_read(const struct msix *m, uint64_t offset, unsigned size);
// config[offset, offset + size) was written.
void msix_config_written(struct msix *m, unsigned offset, unsigned size);

// Saved fields, in a struct T with the msix as member `m`; then, after f->config is good:
#define MSIX_STATE_FIELDS(T, m)                                         \
    STATE_FIELD_INT(T, m.saved_nr, 1), STATE_FIELD_INTS(T, m.table, 1), \
        STATE_FIELD_INT(T, m.pending, 1)
int msix_loaded(struct msix *m, struct error *err);
