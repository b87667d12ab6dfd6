// SPDX-License-Identifier: Apache-2.0
#include "devices/msix.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>

#include "vmm/msi.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { CONTROL = 2, CONTROL_LEN = 2 }; // within the capability
enum { CONTROL_MASK = 1 << 14, CONTROL_ENABLE = 1 << 15 };
enum { ADDRESS, ADDRESS_HIGH, DATA, VECTOR_CONTROL, WORDS }; // of an entry
enum { VECTOR_MASKED = 1 };

struct __attribute__((packed)) capability {
    uint8_t id, next;
    uint16_t control;        // vectors - 1, and the bits above
    uint32_t table, pending; // offset; the low three bits name the BAR
};
_Static_assert(sizeof(struct capability) == 12, "6.8.2");

static uint32_t *entry(struct msix *m, unsigned vector)
{
    return &m->table[WORDS * vector];
}

static uint16_t control(const struct msix *m)
{
    uint16_t value;
    memcpy(&value, m->f->config + m->cap + CONTROL, sizeof(value));
    return value;
}

static bool enabled(const struct msix *m)
{
    return control(m) & CONTROL_ENABLE;
}

static bool masked(struct msix *m, unsigned vector)
{
    return control(m) & CONTROL_MASK || entry(m, vector)[VECTOR_CONTROL] & VECTOR_MASKED;
}

static void vector_send(const struct msix *m, unsigned vector)
{
    uint64_t one = 1;
    if (m->lost & 1ull << vector)
        return;
    if (write(m->fds[vector], &one, sizeof(one)) < 0)
        return; // EAGAIN: it is on its way already
}

// The vector may be sent from now on: KVM learns its message, and gets it if it is pending.
static void vector_open(struct msix *m, unsigned vector)
{
    const uint32_t *e = entry(m, vector);
    uint64_t bit = 1ull << vector;
    struct error err;
    if (m->wiring->route(m->vm, m->gsi + vector, e[ADDRESS] | (uint64_t)e[ADDRESS_HIGH] << 32,
                         e[DATA], &err)) {
        m->lost |= bit;
        log_limited(&m->vm->log, &m->limit, LOG_WARN, "PCI slot %u, MSI-X vector %u: %s",
                    m->f->slot, vector, err.text);
    } else {
        m->lost &= ~bit;
    }
    if (m->pending & bit) {
        m->pending &= ~bit;
        vector_send(m, vector);
    }
}

static void vectors_open(struct msix *m)
{
    for (unsigned i = 0; enabled(m) && i < m->nr; i++)
        if (!masked(m, i))
            vector_open(m, i);
}

void msix_signal(struct msix *m, unsigned vector)
{
    if (vector >= m->nr || !enabled(m))
        return;
    if (masked(m, vector))
        m->pending |= 1ull << vector;
    else
        vector_send(m, vector);
}

// --- registers

static bool access_good(uint64_t offset, unsigned size, uint64_t len)
{
    return (size == 4 || size == 8) && offset % size == 0 && range_within(offset, size, len);
}

uint64_t msix_table_read(const struct msix *m, uint64_t offset, unsigned size)
{
    uint64_t value = 0;
    if (access_good(offset, size, m->nr * (uint64_t)MSIX_ENTRY_LEN))
        memcpy(&value, (const uint8_t *)m->table + offset, size);
    return value;
}

void msix_table_write(struct msix *m, uint64_t offset, unsigned size, uint64_t value)
{
    if (!access_good(offset, size, m->nr * (uint64_t)MSIX_ENTRY_LEN))
        return;
    unsigned vector = (unsigned)offset / MSIX_ENTRY_LEN;
    memcpy((uint8_t *)m->table + offset, &value, size);
    entry(m, vector)[VECTOR_CONTROL] &= VECTOR_MASKED; // the rest is reserved
    if (enabled(m) && !masked(m, vector))
        vector_open(m, vector);
}

uint64_t msix_pending_read(const struct msix *m, uint64_t offset, unsigned size)
{
    uint64_t value = 0;
    if (access_good(offset, size, sizeof(m->pending)))
        memcpy(&value, (const uint8_t *)&m->pending + offset, size);
    return value;
}

void msix_config_written(struct msix *m, unsigned offset, unsigned size)
{
    unsigned at = m->cap + CONTROL;
    if (offset >= at + CONTROL_LEN || offset + size <= at)
        return;
    if (!enabled(m))
        m->pending = 0;
    vectors_open(m);
}

// --- life

static int vector_create(struct msix *m, unsigned vector, struct error *err)
{
    m->fds[vector] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (m->fds[vector] < 0)
        return error_errno(err, "eventfd");
    int ret = m->wiring->irqfd(m->vm, m->gsi + vector, m->fds[vector], true, err);
    if (!ret)
        return 0;
    close(m->fds[vector]);
    m->fds[vector] = -1;
    return ret;
}

static void capability_add(struct msix *m, uint32_t table, uint32_t pending)
{
    const struct capability cap = {
        .control = (uint16_t)(m->nr - 1), .table = table, .pending = pending};
    const struct capability writable = {.control = CONTROL_MASK | CONTROL_ENABLE};
    m->cap = pci_capability_add(m->f, PCI_CAP_MSIX, &cap, &writable, sizeof(cap));
}

int msix_create(struct msix *m, struct vm *vm, const struct pci_wiring *wiring,
                struct pci_function *f, unsigned nr, uint32_t table, uint32_t pending,
                struct error *err)
{
    if (!nr || nr > MSIX_MAX)
        return error_set(err, -EINVAL, "%u MSI-X vectors: expected 1 to %d", nr, MSIX_MAX);
    *m = (struct msix) {.vm = vm, .wiring = wiring, .f = f, .nr = nr, .saved_nr = nr};
    for (unsigned i = 0; i < MSIX_MAX; i++)
        m->fds[i] = -1;
    msix_reset(m);
    capability_add(m, table, pending);
    int ret = vm_msi_alloc(vm, nr, &m->gsi, err);
    for (unsigned i = 0; i < nr && !ret; i++)
        ret = vector_create(m, i, err);
    if (ret)
        msix_destroy(m);
    return ret;
}

void msix_destroy(struct msix *m)
{
    if (!m->nr)
        return;
    bool lives_on = !vm_stopped(m->vm); // one that ended takes its irqfds with it at once
    for (unsigned i = 0; i < m->nr; i++) {
        if (m->fds[i] < 0)
            continue;
        if (lives_on)
            m->wiring->irqfd(m->vm, m->gsi + i, m->fds[i], false, NULL);
        close(m->fds[i]);
    }
    m->nr = 0;
}

void msix_reset(struct msix *m)
{
    memset(m->table, 0, sizeof(m->table));
    for (unsigned i = 0; i < MSIX_MAX; i++)
        entry(m, i)[VECTOR_CONTROL] = VECTOR_MASKED;
    m->pending = m->lost = 0;
}

int msix_loaded(struct msix *m, struct error *err)
{
    uint32_t saved = m->saved_nr;
    m->saved_nr = m->nr;
    if (saved != m->nr) {
        msix_reset(m);
        return error_set(err, -EINVAL, "saved with %u MSI-X vectors, here it has %u", saved, m->nr);
    }
    for (unsigned i = 0; i < MSIX_MAX; i++)
        entry(m, i)[VECTOR_CONTROL] &= VECTOR_MASKED;
    if (m->nr < MSIX_MAX)
        m->pending &= (1ull << m->nr) - 1;
    m->lost = 0;
    vectors_open(m);
    return 0;
}
