// SPDX-License-Identifier: Apache-2.0
// Guest memory: the one module that knows where a guest-physical address lies in this process
// and which pages changed.
//
// RAM is at most two regions: [0, 3 GiB) and [4 GiB, ...). Seen as one line of pages, page
// index i (0 .. ram->pages-1) counts 4 KiB pages through the regions in order: bitmaps, streams and
// snapshot files use page indexes, so the hole costs nothing.
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "vmm/error.h"
#include "vmm/seccomp.h"
#include "vmm/util.h"

enum ram_backing {
    RAM_ANONYMOUS, // private anonymous memory
    RAM_MEMFD,     // shared memfd: can be handed to another process
    RAM_HUGETLB,   // memfd of 2 MiB huge pages
};

// How KVM says what the guest wrote.
enum ram_log {
    RAM_LOG_BITMAP, // a bit for each page of memory
    RAM_LOG_RING,   // a list for each vCPU (vmm/dirty_ring.h); not every host has it
};

struct ram_config {
    uint64_t size; // bytes, a multiple of 4 KiB, at least RAM_MIN
    enum ram_backing backing;
    enum ram_log log;
    enum seccomp_mode seccomp; // of the thread that reads the rings
    uint32_t ring_entries;     // of RAM_LOG_RING, a power of two; 0 = DIRTY_RING_ENTRIES
    bool thp;                  // ask for transparent huge pages
    const char *numa;          // NULL, or "bind:0,1", "interleave:0-3", "preferred:1"
};

#define RAM_MIN (16 * MiB)
#define RAM_MAX (4096 * GiB) // a KVM memory slot holds less than 2^31 pages

struct ram_region {
    uint64_t gpa, size;  // bytes
    uint64_t first_page; // page index of its first page
    uint8_t *hva;        // 2 MiB aligned
    uint32_t slot;       // KVM memory slot
};

// Who can ask the guest which pages it does not need (a balloon: free page hinting), for migration.
// Any thread. Whatever the guest says, it can only spoil its own memory.
struct ram_hinter {
    // From now on sets bits of `bitmap` (page indexes) of pages whose content nobody needs, unless
    // the dirty log, which must be running, says later that they were written. False: the guest
    // gives no hints now. `bitmap` is written until `end` returns.
    bool (*start)(struct ram_hinter *h, _Atomic uint64_t *bitmap);
    // 0: no more come. Otherwise another number after each hint.
    uint64_t (*progress)(struct ram_hinter *h);
    // Before the next ram_dirty_sync: a hint that is older than a sync must not count after it.
    void (*end)(struct ram_hinter *h);
};

// What a guest says of its memory, in bytes; UINT64_MAX: not said. It may lie.
struct ram_guest_says {
    uint64_t serial;          // another one with each statement; 0: none yet
    uint64_t free, available; // available: free, or can be made so without swapping
    uint64_t swapped_out;     // since it started
    uint64_t major_faults;    // the same: pages read from disk
    uint64_t held;            // by its balloon
    uint64_t wanted;          // by whoever set the balloon's target
};

// Who can make the guest give memory up (a balloon), for migration. Any thread.
struct ram_balloon {
    // False: no driver listens now.
    bool (*look)(struct ram_balloon *b, struct ram_guest_says *says);
    void (*ask)(struct ram_balloon *b); // for a new statement, which comes when the guest likes
    // What the balloon shall hold beyond what it holds anyway; 0: nothing.
    void (*take)(struct ram_balloon *b, uint64_t bytes);
};

// Who still brings pages that are missing.
struct ram_filler {
    // Returns when all are here and guest memory is ordinary memory. Any thread.
    int (*complete)(struct ram_filler *f, struct error *err);
};

struct ram {
    struct ram_region regions[2];
    unsigned nr_regions;
    uint64_t size;  // bytes
    uint64_t pages; // size / 4 KiB
    uint64_t unit;  // bytes: what the host gives and takes, 4 KiB or 2 MiB
    uint8_t *map;   // the whole mapping; regions lie in it
    size_t map_len;
    int memfd; // -1 for anonymous memory
    int vm_fd; // -1 until ram_attach
    enum ram_log log;
    enum seccomp_mode seccomp;
    uint32_t ring_entries;
    bool log_lost;             // rings: pages must be watched again; guarded by dirty_lock
    struct dirty_rings *rings; // NULL: RAM_LOG_BITMAP, or ram_attach was not called
    atomic_bool logging;
    // The VMM's own writes while logging, and what was harvested from dirty rings, one bit per page
    // index. Kept until ram_destroy once allocated, so that ram_mark_dirty needs no lock.
    _Atomic uint64_t *own_dirty;
    pthread_mutex_t discard_lock; // held during a discard; guards discard_blocks
    unsigned discard_blocks;
    pthread_mutex_t dirty_lock;    // guards the users and the switching of the log
    struct ram_dirty *dirty_users; // NULL: the log is off
    atomic_bool missing;           // pages that are not there come when they are touched: not zero
    struct ram_filler *filler;     // NULL: none
    bool file_mapped;            // pages that are not there are a file's, not zero (migrate/lazy.h)
    struct ram_hinter *hinter;   // NULL: none; set before the VM starts
    struct ram_balloon *balloon; // the same
};

#define ram_for_each_region(ram, r) \
    for (struct ram_region *r = (ram)->regions; r < (ram)->regions + (ram)->nr_regions; r++)

int ram_create(struct ram *ram, const struct ram_config *config, struct error *err);
void ram_destroy(struct ram *ram);

// The memory of another process becomes this one's, before the guest has run: `fd` is a memfd of
// ram->size bytes in 4 KiB pages that can never shrink (F_SEAL_SHRINK: else touching it might kill
// this process). Takes fd over when it returns 0.
int ram_adopt(struct ram *ram, int fd, struct error *err);

// Gives the regions to KVM as memory slots; before the VM has vCPUs. -ENOTSUP when KVM has no log
// of the kind asked for.
int ram_attach(struct ram *ram, int vm_fd, struct error *err);
// The slots again, with or without KVM's dirty log (the dirty log's own).
int ram_slots_set(struct ram *ram, bool log, struct error *err);

// The accessor everybody uses. NULL unless [gpa, gpa+len) lies wholly inside one region.
// Whoever writes through the pointer calls ram_mark_dirty afterwards (KVM does not see it).
void *ram_at(const struct ram *ram, uint64_t gpa, uint64_t len);
bool ram_contains(const struct ram *ram, uint64_t gpa, uint64_t len);
// memcpy from or to guest memory that others use at the same time: whoever saves or moves the
// guest, and learns from the dirty log, or is held up by the kernel. TSan would call that a race.
static inline void ram_copy(void *to, const void *from, size_t len)
{
#ifdef __SANITIZE_THREAD__
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(len) : : "memory");
#else
    memcpy(to, from, len);
#endif
}

int ram_read(const struct ram *ram, uint64_t gpa, void *data, uint64_t len);  // 0 or -EFAULT
int ram_write(struct ram *ram, uint64_t gpa, const void *data, uint64_t len); // 0 or -EFAULT
void ram_mark_dirty(struct ram *ram, uint64_t gpa, uint64_t len);

// Page index <-> address. Both are exact inverses for pages that exist.
void *ram_page(const struct ram *ram, uint64_t page); // page < ram->pages
uint64_t ram_page_gpa(const struct ram *ram, uint64_t page);
bool ram_gpa_page(const struct ram *ram, uint64_t gpa, uint64_t *page);
bool ram_hva_page(const struct ram *ram, const void *hva, uint64_t *page);

// How many pages from `page` on lie one behind the other in this process (to the region's end).
uint64_t ram_contiguous(const struct ram *ram, uint64_t page);

// --- giving memory back to the host

// Makes pages [first, first + count) read as zero and gives their memory back, whatever else goes
// on: for those who put content there afterwards. The dirty log is not told.
int ram_drop(struct ram *ram, uint64_t first, uint64_t count, struct error *err);

// The same for whole pages (2 MiB ones of RAM_HUGETLB) within [gpa, gpa+len) that the guest does
// not need, unless discards are blocked. They count as written, so that a snapshot or a migration
// finds them as this side has them. `*given` are the bytes. -EFAULT outside RAM. Costs a system
// call for each call: join neighbours first.
int ram_discard(struct ram *ram, uint64_t gpa, uint64_t len, uint64_t *given, struct error *err);
// While a page that is not there does not mean zero but "elsewhere" (post-copy), ram_discard gives
// nothing back. Waits for a discard under way. Counted; any thread.
void ram_discard_block(struct ram *ram);
void ram_discard_unblock(struct ram *ram);

// --- dirty log: KVM's, merged with the VMM's own writes
static inline size_t ram_bitmap_words(const struct ram *ram)
{
    return (size_t)((ram->pages + 63) / 64);
}

// One who wants to know what was written: a migration, the parent of the next diff. Several can be
// at it: KVM's log is fetched once and merged into each one's own bitmap. All calls: any thread.
struct ram_dirty {
    uint64_t *pending; // NULL: not started. Fetched, and not yet told to this user
    struct ram_dirty *next;
};

// After start every page counts as clean for this user. -EBUSY if it is started already.
int ram_dirty_start(struct ram *ram, struct ram_dirty *user, struct error *err);
// ORs the pages written since this user's last sync (or start) into `bitmap` (ram_bitmap_words
// words) and re-arms them. `*new_pages` (may be NULL) counts bits that were not yet set in
// `bitmap`. After an error nothing is lost: the next sync tells it. -EINVAL: not started.
int ram_dirty_sync(struct ram *ram, struct ram_dirty *user, uint64_t *bitmap, uint64_t *new_pages,
                   struct error *err);
// Harmless for a user that is not started. The last one switches KVM's log off.
int ram_dirty_stop(struct ram *ram, struct ram_dirty *user, struct error *err);
void ram_dirty_free(struct ram_dirty *user); // ram_destroy's

// RAM_LOG_RING only, else they do nothing. A vCPU that was created just now has a ring; one whose
// ring is full (KVM_EXIT_DIRTY_RING_FULL) has it emptied by its thread.
int ram_dirty_vcpu(struct ram *ram, int vcpu_fd, struct error *err);
int ram_dirty_ring_full(struct ram *ram, struct error *err);
