// SPDX-License-Identifier: Apache-2.0
#include "vmm/dirty_ring.h"

#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "vmm/ram.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { RESETS_MAX = 10000 }; // ioctls that do nothing, one after the other

struct ring {
    struct kvm_dirty_gfn *entry; // entries of them
    uint32_t next;               // to be harvested; counts on and wraps
};

struct dirty_rings {
    int vm_fd;
    uint32_t entries;
    unsigned nr;
    struct ring ring[VM_MAX_VCPUS]; // the thread's, once it runs

    enum seccomp_mode seccomp;
    const struct ram *ram;
    _Atomic uint64_t *bitmap;
    pthread_t thread;
    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    bool started;
    uint64_t asked, done; // harvests
    bool quit;
    int failure; // of the last one
    struct error err;
};

int dirty_rings_create(struct dirty_rings **out, int vm_fd, uint32_t entries,
                       enum seccomp_mode seccomp, struct error *err)
{
    // Plain rings promise the order of memory accesses only where the processor gives it: x86 does,
    // and kernels before 5.20 know no other name.
    static const unsigned caps[] = {KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING};
    uint64_t bytes = (uint64_t)entries * sizeof(struct kvm_dirty_gfn);
    int most = 0;
    unsigned cap = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(caps) && most <= 0; i++) {
        cap = caps[i];
        most = ioctl(vm_fd, KVM_CHECK_EXTENSION, (unsigned long)cap);
    }
    if (most <= 0)
        return error_set(err, -ENOTSUP,
                         "dirty log: this host's KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING, "
                         "Linux 5.11 or newer on x86): use the bitmap (--dirty-log bitmap)");
    if (bytes > (uint64_t)most)
        return error_set(err, -ENOTSUP, "dirty rings of %u entries: this host's KVM has up to %u",
                         entries, (unsigned)most / (unsigned)sizeof(struct kvm_dirty_gfn));
    struct kvm_enable_cap enable = {.cap = cap, .args = {bytes}};
    if (ioctl(vm_fd, KVM_ENABLE_CAP, &enable))
        return error_errno(err, "dirty rings of %u entries (KVM_CAP_DIRTY_LOG_RING)", entries);
    struct dirty_rings *rings = calloc(1, sizeof(*rings));
    if (!rings)
        return error_set(err, -ENOMEM, "no memory for dirty rings");
    *rings = (struct dirty_rings) {.vm_fd = vm_fd,
                                   .entries = entries,
                                   .seccomp = seccomp,
                                   .lock = PTHREAD_MUTEX_INITIALIZER,
                                   .changed = PTHREAD_COND_INITIALIZER};
    *out = rings;
    return 0;
}

static size_t ring_bytes(const struct dirty_rings *rings)
{
    return rings->entries * sizeof(struct kvm_dirty_gfn);
}

void dirty_rings_free(struct dirty_rings *rings)
{
    if (!rings)
        return;
    pthread_mutex_lock(&rings->lock);
    rings->quit = true;
    pthread_cond_broadcast(&rings->changed);
    pthread_mutex_unlock(&rings->lock);
    if (rings->started)
        pthread_join(rings->thread, NULL);
    for (unsigned i = 0; i < rings->nr; i++)
        munmap(rings->ring[i].entry, ring_bytes(rings));
    free(rings);
}

int dirty_rings_add(struct dirty_rings *rings, int vcpu_fd, struct error *err)
{
    if (rings->nr == VM_MAX_VCPUS)
        return error_set(err, -E2BIG, "dirty rings for more than %d vCPUs", VM_MAX_VCPUS);
    void *entry = mmap(NULL, ring_bytes(rings), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd,
                       (off_t)KVM_DIRTY_LOG_PAGE_OFFSET * (off_t)PAGE_SIZE);
    if (entry == MAP_FAILED)
        return error_errno(err, "mapping a dirty ring of %zu KiB", ring_bytes(rings) / 1024);
    rings->ring[rings->nr++].entry = entry;
    return 0;
}

static struct kvm_dirty_gfn *entry_at(const struct dirty_rings *rings, const struct ring *ring,
                                      uint32_t at)
{
    return &ring->entry[at & (rings->entries - 1)];
}

// Pages of slots that are ours and of their size only: the ring is shared with the kernel, not with
// the guest, yet a bit beyond the bitmap would be ours to regret.
static void note(const struct dirty_rings *rings, const struct kvm_dirty_gfn *entry)
{
    const struct ram *ram = rings->ram;
    uint32_t slot =
        __atomic_load_n(&entry->slot, __ATOMIC_RELAXED) & 0xffff; // above: address space
    uint64_t offset = __atomic_load_n(&entry->offset, __ATOMIC_RELAXED);
    for (const struct ram_region *r = ram->regions; r < ram->regions + ram->nr_regions; r++) {
        if (r->slot != slot || offset >= r->size / PAGE_SIZE)
            continue;
        uint64_t page = r->first_page + offset;
        atomic_fetch_or_explicit(&rings->bitmap[page / 64], 1ull << page % 64,
                                 memory_order_relaxed);
    }
}

static void harvest(const struct dirty_rings *rings, struct ring *ring)
{
    uint32_t from = ring->next;
    // At most once around: with a vCPU that writes as fast as this reads it would never end.
    while (ring->next - from < rings->entries) {
        struct kvm_dirty_gfn *entry = entry_at(rings, ring, ring->next);
        if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
            break;
        note(rings, entry);
        __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        ring->next++;
    }
}

// What the kernel has done shows in the entries; it does not promise to do all at once.
static bool all_reset(const struct dirty_rings *rings)
{
    for (unsigned i = 0; i < rings->nr; i++) {
        const struct ring *ring = &rings->ring[i];
        const struct kvm_dirty_gfn *last = entry_at(rings, ring, ring->next - 1);
        if (__atomic_load_n(&last->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_RESET)
            return false;
    }
    return true;
}

static int reset(const struct dirty_rings *rings, struct error *err)
{
    unsigned idle = 0;
    while (!all_reset(rings)) {
        int n = ioctl(rings->vm_fd, KVM_RESET_DIRTY_RINGS, 0);
        if (n < 0 && errno != EINTR)
            return error_errno(err, "KVM_RESET_DIRTY_RINGS");
        idle = n > 0 ? 0 : idle + 1;
        if (idle == RESETS_MAX)
            return error_set(err, -EIO, "KVM_RESET_DIRTY_RINGS leaves entries as they are");
    }
    return 0;
}

// --- the thread

static void *rings_main(void *arg)
{
    struct dirty_rings *rings = arg;
    pthread_setname_np(pthread_self(), "dirty-rings");
    seccomp_enter_or_abort(SECCOMP_VCPU, rings->seccomp);
    pthread_mutex_lock(&rings->lock);
    while (!rings->quit) {
        uint64_t asked = rings->asked;
        if (rings->done == asked) {
            pthread_cond_wait(&rings->changed, &rings->lock);
            continue;
        }
        pthread_mutex_unlock(&rings->lock);
        struct error err = {0};
        for (unsigned i = 0; i < rings->nr; i++)
            harvest(rings, &rings->ring[i]);
        int ret = reset(rings, &err);
        pthread_mutex_lock(&rings->lock);
        rings->done = asked;
        rings->failure = ret;
        rings->err = err;
        pthread_cond_broadcast(&rings->changed);
    }
    pthread_mutex_unlock(&rings->lock);
    return NULL;
}

int dirty_rings_start(struct dirty_rings *rings, const struct ram *ram, _Atomic uint64_t *bitmap,
                      struct error *err)
{
    sigset_t all, old;
    rings->ram = ram;
    rings->bitmap = bitmap;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_mutex_lock(&rings->lock);
    int ret = pthread_create(&rings->thread, NULL, rings_main, rings);
    rings->started = !ret;
    pthread_mutex_unlock(&rings->lock);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (ret)
        return error_set(err, -ret, "dirty rings: cannot start their thread: %s", strerror(ret));
    return 0;
}

int dirty_rings_harvest(struct dirty_rings *rings, struct error *err)
{
    pthread_mutex_lock(&rings->lock);
    uint64_t mine = rings->started ? ++rings->asked : 0; // not started: nothing is noted
    pthread_cond_broadcast(&rings->changed);
    while (rings->done < mine)
        pthread_cond_wait(&rings->changed, &rings->lock);
    int ret = rings->failure;
    if (ret && err)
        *err = rings->err;
    pthread_mutex_unlock(&rings->lock);
    return ret;
}
