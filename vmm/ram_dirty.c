// SPDX-License-Identifier: Apache-2.0
// The dirty log and its users: what KVM and the VMM wrote goes to all of them.
#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "vmm/dirty_ring.h"
#include "vmm/ram.h"

// Under the lock. One region's KVM log (NULL: it is among the own bits) and the VMM's own bits, to
// every user.
static void region_merge(struct ram *ram, const struct ram_region *r, const uint64_t *log)
{
    size_t first = r->first_page / 64, words = (r->size / PAGE_SIZE + 63) / 64;
    for (size_t i = 0; i < words; i++) {
        uint64_t bits = log ? log[i] : 0;
        _Atomic uint64_t *own = &ram->own_dirty[first + i];
        if (atomic_load_explicit(own, memory_order_relaxed))
            bits |= atomic_exchange(own, 0);
        if (!bits)
            continue;
        for (struct ram_dirty *u = ram->dirty_users; u; u = u->next)
            u->pending[first + i] |= bits;
    }
}

// Under the lock. KVM has forgotten pages, nobody knows which: it watches all of them again, and
// every page counts as written.
static int watch_again(struct ram *ram, struct error *err)
{
    int ret = ram_slots_set(ram, false, err);
    if (!ret)
        ret = ram_slots_set(ram, true, err);
    for (uint64_t page = 0; page < ram->pages; page += 64) {
        uint64_t left = ram->pages - page;
        atomic_fetch_or(&ram->own_dirty[page / 64], left < 64 ? (1ull << left) - 1 : ~0ull);
    }
    return ret;
}

// Under the lock.
static int rings_fetch(struct ram *ram, struct error *err)
{
    int ret = dirty_rings_harvest(ram->rings, err);
    if (!ret && (dirty_rings_lost(ram->rings) || ram->log_lost)) {
        ret = watch_again(ram, err);
        ram->log_lost = ret;
    }
    if (!ret)
        ram_for_each_region (ram, r)
            region_merge(ram, r, NULL);
    return ret;
}

// Under the lock. KVM forgets what it has told, so a region's bits are with the users before the
// next one is asked for.
static int log_fetch(struct ram *ram, struct error *err)
{
    if (ram->rings)
        return rings_fetch(ram, err);
    autofree uint64_t *log = calloc(ram_bitmap_words(ram), sizeof(*log));
    if (!log)
        return error_set(err, -ENOMEM, "no memory to read the dirty log");
    ram_for_each_region (ram, r) {
        struct kvm_dirty_log get = {.slot = r->slot, .dirty_bitmap = log};
        if (ioctl(ram->vm_fd, KVM_GET_DIRTY_LOG, &get))
            return error_errno(err, "KVM_GET_DIRTY_LOG of slot %u", r->slot);
        region_merge(ram, r, log);
    }
    return 0;
}

// Under the lock, nobody has the log yet.
static int own_begin(struct ram *ram, struct error *err)
{
    size_t words = ram_bitmap_words(ram);
    int ret = 0;
    if (!ram->own_dirty) {
        ram->own_dirty = calloc(words, sizeof(*ram->own_dirty));
        if (!ram->own_dirty)
            return error_set(err, -ENOMEM, "no memory for a dirty bitmap of %zu KiB",
                             words * 8 / 1024);
        ret = ram->rings ? dirty_rings_start(ram->rings, ram, ram->own_dirty, err) : 0;
        if (ret) {
            free((void *)ram->own_dirty);
            ram->own_dirty = NULL;
        }
    } else if (ram->rings) { // what was noted up to the moment when the log was switched off
        ret = dirty_rings_harvest(ram->rings, err);
        dirty_rings_lost(ram->rings); // all pages are watched anew
    }
    for (size_t i = 0; !ret && i < words; i++) // somebody may be harvesting what was noted before
        atomic_store_explicit(&ram->own_dirty[i], 0, memory_order_relaxed);
    return ret;
}

static int log_begin(struct ram *ram, struct error *err)
{
    int ret = own_begin(ram, err);
    if (ret)
        return ret;
    atomic_store_explicit(&ram->logging, true, memory_order_release);
    ret = ram_slots_set(ram, true, err);
    if (ret) {
        ram_slots_set(ram, false, NULL);
        atomic_store(&ram->logging, false);
    }
    return ret;
}

int ram_dirty_start(struct ram *ram, struct ram_dirty *user, struct error *err)
{
    if (user->pending)
        return error_set(err, -EBUSY, "the dirty log is in use already");
    uint64_t *pending = calloc(ram_bitmap_words(ram), sizeof(*pending));
    if (!pending)
        return error_set(err, -ENOMEM, "no memory for a dirty bitmap of %zu KiB",
                         ram_bitmap_words(ram) * 8 / 1024);
    pthread_mutex_lock(&ram->dirty_lock);
    // What is older than this user is told to the others first.
    int ret = ram->dirty_users ? log_fetch(ram, err) : log_begin(ram, err);
    if (!ret) {
        user->pending = pending;
        user->next = ram->dirty_users;
        ram->dirty_users = user;
    }
    pthread_mutex_unlock(&ram->dirty_lock);
    if (ret)
        free(pending);
    return ret;
}

// Under the lock.
static uint64_t pending_take(struct ram *ram, struct ram_dirty *user, uint64_t *bitmap)
{
    uint64_t fresh = 0;
    for (size_t i = 0; i < ram_bitmap_words(ram); i++) {
        uint64_t bits = user->pending[i];
        if (!bits)
            continue;
        fresh += (uint64_t)__builtin_popcountll(bits & ~bitmap[i]);
        bitmap[i] |= bits;
        user->pending[i] = 0;
    }
    return fresh;
}

int ram_dirty_sync(struct ram *ram, struct ram_dirty *user, uint64_t *bitmap, uint64_t *new_pages,
                   struct error *err)
{
    if (!user->pending)
        return error_set(err, -EINVAL, "the dirty log is not running");
    pthread_mutex_lock(&ram->dirty_lock);
    int ret = log_fetch(ram, err);
    if (!ret) {
        uint64_t fresh = pending_take(ram, user, bitmap);
        if (new_pages)
            *new_pages = fresh;
    }
    pthread_mutex_unlock(&ram->dirty_lock);
    return ret;
}

void ram_dirty_free(struct ram_dirty *user)
{
    free(user->pending);
    *user = (struct ram_dirty) {0};
}

int ram_dirty_stop(struct ram *ram, struct ram_dirty *user, struct error *err)
{
    if (!user->pending)
        return 0;
    int ret = 0;
    pthread_mutex_lock(&ram->dirty_lock);
    struct ram_dirty **at = &ram->dirty_users;
    while (*at && *at != user)
        at = &(*at)->next;
    if (*at)
        *at = user->next;
    if (!ram->dirty_users) {
        ret = ram_slots_set(ram, false, err);
        atomic_store(&ram->logging, false);
    }
    pthread_mutex_unlock(&ram->dirty_lock);
    ram_dirty_free(user);
    return ret;
}

int ram_dirty_vcpu(struct ram *ram, int vcpu_fd, struct error *err)
{
    return ram->rings ? dirty_rings_add(ram->rings, vcpu_fd, err) : 0;
}

int ram_dirty_ring_full(struct ram *ram, struct error *err)
{
    return ram->rings ? dirty_rings_harvest(ram->rings, err) : 0;
}
