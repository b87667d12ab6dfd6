// SPDX-License-Identifier: Apache-2.0
#include "vmm/ram.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/memfd.h>
#include <linux/mempolicy.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "vmm/dirty_ring.h"
#include "vmm/layout.h"

enum { NUMA_NODES_MAX = 1024 };

// "0,2-3" -> bits. 0 or -EINVAL.
static int node_list_parse(const char *text, unsigned long *mask)
{
    do {
        char *end;
        if (*text < '0' || *text > '9')
            return -EINVAL;
        unsigned long first = strtoul(text, &end, 10), last = first;
        if (*end == '-') {
            text = end + 1;
            if (*text < '0' || *text > '9')
                return -EINVAL;
            last = strtoul(text, &end, 10);
        }
        if (last < first || last >= NUMA_NODES_MAX)
            return -EINVAL;
        for (unsigned long n = first; n <= last; n++)
            mask[n / 64] |= 1ul << (n % 64);
        text = end;
    } while (*text++ == ',');
    return text[-1] ? -EINVAL : 0;
}

static int numa_apply(const struct ram *ram, const char *policy, struct error *err)
{
    static const struct {
        const char *name;
        int mode;
    } modes[] = {
        {"bind:", MPOL_BIND}, {"interleave:", MPOL_INTERLEAVE}, {"preferred:", MPOL_PREFERRED}};
    unsigned long mask[NUMA_NODES_MAX / 64] = {0};
    for (size_t i = 0; i < ARRAY_SIZE(modes); i++) {
        size_t len = strlen(modes[i].name);
        if (strncmp(policy, modes[i].name, len))
            continue;
        if (node_list_parse(policy + len, mask))
            break;
        const unsigned long most = NUMA_NODES_MAX + 1, flags = 0; // as wide as the kernel reads
        if (syscall(SYS_mbind, ram->map, ram->map_len, modes[i].mode, mask, most, flags))
            return error_errno(err, "NUMA policy %s", policy);
        return 0;
    }
    return error_set(err, -EINVAL,
                     "NUMA policy '%s': expected bind:NODES, interleave:NODES or preferred:NODE, "
                     "e.g. bind:0 or interleave:0-1",
                     policy);
}

static int backing_open(struct ram *ram, enum ram_backing backing, struct error *err)
{
    if (backing == RAM_ANONYMOUS)
        return 0;
    unsigned flags =
        MFD_CLOEXEC | MFD_ALLOW_SEALING | (backing == RAM_HUGETLB ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
    ram->memfd = memfd_create("ferry-ram", flags);
    if (ram->memfd < 0)
        return error_errno(err, "guest memory: memfd_create");
    if (ftruncate(ram->memfd, (off_t)ram->size))
        return error_errno(err, "guest memory: %llu MiB memfd",
                           (unsigned long long)(ram->size / MiB));
    // Whoever it is handed to may rely on it. Not every kernel seals huge pages.
    if (fcntl(ram->memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) && backing != RAM_HUGETLB)
        return error_errno(err, "guest memory: sealing its size");
    return 0;
}

// Reserves address space with room to start at a 2 MiB boundary, then maps RAM over it: KVM can use
// huge pages only where guest and host addresses agree modulo 2 MiB.
static int ram_map(struct ram *ram, const struct ram_config *config, struct error *err)
{
    ram->map_len = align_up(ram->size, HUGE_PAGE);
    size_t span = ram->map_len + HUGE_PAGE;
    uint8_t *area = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED)
        return error_errno(err, "guest memory: %llu MiB of address space",
                           (unsigned long long)(ram->size / MiB));
    uint8_t *start = (uint8_t *)align_up((uintptr_t)area, HUGE_PAGE);
    if (start > area)
        munmap(area, (size_t)(start - area));
    if (area + span > start + ram->map_len)
        munmap(start + ram->map_len, (size_t)(area + span - (start + ram->map_len)));
    ram->map = start;

    // Huge pages are reserved: a lack of them shows now and not as SIGBUS in the middle of a run.
    int flags = MAP_FIXED | (config->backing == RAM_HUGETLB ? 0 : MAP_NORESERVE) |
                (ram->memfd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    if (mmap(start, ram->size, PROT_READ | PROT_WRITE, flags, ram->memfd, 0) == MAP_FAILED)
        return error_errno(err, "guest memory: mapping %llu MiB%s",
                           (unsigned long long)(ram->size / MiB),
                           config->backing == RAM_HUGETLB
                               ? " of huge pages (are there enough in /proc/sys/vm/nr_hugepages?)"
                               : "");
    madvise(start, ram->size, MADV_DONTDUMP);
    if (config->thp && config->backing != RAM_HUGETLB)
        madvise(start, ram->size, MADV_HUGEPAGE); // a wish; not every kernel has THP
    return config->numa ? numa_apply(ram, config->numa, err) : 0;
}

static int config_check(const struct ram_config *config, struct error *err)
{
    uint64_t unit = config->backing == RAM_HUGETLB ? HUGE_PAGE : PAGE_SIZE;
    if (config->size < RAM_MIN || config->size > RAM_MAX)
        return error_set(err, -EINVAL, "memory of %llu bytes: expected %llu MiB to %llu GiB",
                         (unsigned long long)config->size, RAM_MIN / MiB, RAM_MAX / GiB);
    if (config->size % unit)
        return error_set(err, -EINVAL, "memory of %llu bytes: expected a multiple of %llu KiB",
                         (unsigned long long)config->size, (unsigned long long)(unit / KiB));
    return 0;
}

int ram_create(struct ram *ram, const struct ram_config *config, struct error *err)
{
    *ram = (struct ram) {.memfd = -1,
                         .vm_fd = -1,
                         .discard_lock = PTHREAD_MUTEX_INITIALIZER,
                         .dirty_lock = PTHREAD_MUTEX_INITIALIZER};
    int ret = config_check(config, err);
    if (ret)
        return ret;
    ram->size = config->size;
    ram->unit = config->backing == RAM_HUGETLB ? HUGE_PAGE : PAGE_SIZE;
    ram->pages = config->size / PAGE_SIZE;
    ram->log = config->log;
    ram->seccomp = config->seccomp;
    ram->ring_entries = config->ring_entries ? config->ring_entries : DIRTY_RING_ENTRIES;
    ret = backing_open(ram, config->backing, err);
    if (!ret)
        ret = ram_map(ram, config, err);
    if (ret) {
        ram_destroy(ram);
        return ret;
    }

    uint64_t low = ram->size < LAYOUT_RAM_LOW_MAX ? ram->size : LAYOUT_RAM_LOW_MAX;
    ram->regions[ram->nr_regions++] = (struct ram_region) {.size = low, .hva = ram->map};
    if (ram->size > low)
        ram->regions[ram->nr_regions++] = (struct ram_region) {.gpa = LAYOUT_RAM_HIGH,
                                                               .size = ram->size - low,
                                                               .first_page = low / PAGE_SIZE,
                                                               .hva = ram->map + low,
                                                               .slot = 1};
    return 0;
}

int ram_adopt(struct ram *ram, int fd, struct error *err)
{
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    if (fstat(fd, &st))
        return error_errno(err, "guest memory: fstat");
    if ((uint64_t)st.st_size != ram->size || st.st_blksize != PAGE_SIZE || seals < 0 ||
        !(seals & F_SEAL_SHRINK) || ram->unit != PAGE_SIZE)
        return error_set(err, -EINVAL,
                         "memory handed over: %lld bytes in pages of %ld, seals 0x%x; expected a "
                         "memfd of %llu bytes in pages of 4 KiB that cannot shrink",
                         (long long)st.st_size, (long)st.st_blksize, (unsigned)seals,
                         (unsigned long long)ram->size);
    if (mmap(ram->map, ram->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
             fd, 0) == MAP_FAILED)
        return error_errno(err, "guest memory: mmap of what was handed over");
    madvise(ram->map, ram->size, MADV_DONTDUMP);
    if (ram->memfd >= 0)
        close(ram->memfd);
    ram->memfd = fd;
    return 0;
}

void ram_destroy(struct ram *ram)
{
    dirty_rings_free(ram->rings);
    if (ram->map)
        munmap(ram->map, ram->map_len);
    if (ram->memfd >= 0)
        close(ram->memfd);
    while (ram->dirty_users) {
        struct ram_dirty *user = ram->dirty_users;
        ram->dirty_users = user->next;
        ram_dirty_free(user);
    }
    free((void *)ram->own_dirty);
    *ram = (struct ram) {.memfd = -1, .vm_fd = -1};
}

static int slot_set(const struct ram *ram, const struct ram_region *r, uint32_t flags,
                    struct error *err)
{
    struct kvm_userspace_memory_region slot = {.slot = r->slot,
                                               .flags = flags,
                                               .guest_phys_addr = r->gpa,
                                               .memory_size = r->size,
                                               .userspace_addr = (uintptr_t)r->hva};
    if (ioctl(ram->vm_fd, KVM_SET_USER_MEMORY_REGION, &slot))
        return error_errno(err, "KVM memory slot %u: %llu MiB at %#llx", r->slot,
                           (unsigned long long)(r->size / MiB), (unsigned long long)r->gpa);
    return 0;
}

int ram_slots_set(struct ram *ram, bool log, struct error *err)
{
    int ret = 0;
    ram_for_each_region (ram, r) {
        int one = slot_set(ram, r, log ? KVM_MEM_LOG_DIRTY_PAGES : 0, err);
        ret = ret ? ret : one;
    }
    return ret;
}

int ram_attach(struct ram *ram, int vm_fd, struct error *err)
{
    ram->vm_fd = vm_fd;
    int ret = 0;
    if (ram->log == RAM_LOG_RING)
        ret = dirty_rings_create(&ram->rings, vm_fd, ram->ring_entries, ram->seccomp, err);
    return ret ? ret : ram_slots_set(ram, false, err);
}

void *ram_at(const struct ram *ram, uint64_t gpa, uint64_t len)
{
    for (unsigned i = 0; i < ram->nr_regions; i++) {
        const struct ram_region *r = &ram->regions[i];
        if (gpa >= r->gpa && range_within(gpa - r->gpa, len, r->size))
            return r->hva + (gpa - r->gpa);
    }
    return NULL;
}

bool ram_contains(const struct ram *ram, uint64_t gpa, uint64_t len)
{
    return ram_at(ram, gpa, len) != NULL;
}

int ram_read(const struct ram *ram, uint64_t gpa, void *data, uint64_t len)
{
    const void *p = ram_at(ram, gpa, len);
    if (!p)
        return -EFAULT;
    ram_copy(data, p, len);
    return 0;
}

int ram_write(struct ram *ram, uint64_t gpa, const void *data, uint64_t len)
{
    void *p = ram_at(ram, gpa, len);
    if (!p)
        return -EFAULT;
    ram_copy(p, data, len);
    ram_mark_dirty(ram, gpa, len);
    return 0;
}

void ram_mark_dirty(struct ram *ram, uint64_t gpa, uint64_t len)
{
    uint64_t first, last;
    if (!len || !atomic_load_explicit(&ram->logging, memory_order_acquire) ||
        !ram_contains(ram, gpa, len) || !ram_gpa_page(ram, gpa, &first) ||
        !ram_gpa_page(ram, gpa + len - 1, &last))
        return;
    for (uint64_t page = first; page <= last; page++)
        atomic_fetch_or(&ram->own_dirty[page / 64], 1ull << (page % 64));
}

void *ram_page(const struct ram *ram, uint64_t page)
{
    return ram->map + page * PAGE_SIZE; // the regions lie in the mapping back to back
}

uint64_t ram_page_gpa(const struct ram *ram, uint64_t page)
{
    const struct ram_region *r = &ram->regions[ram->nr_regions - 1];
    if (page < r->first_page)
        r = &ram->regions[0];
    return r->gpa + (page - r->first_page) * PAGE_SIZE;
}

bool ram_gpa_page(const struct ram *ram, uint64_t gpa, uint64_t *page)
{
    return ram_hva_page(ram, ram_at(ram, gpa, 1), page);
}

bool ram_hva_page(const struct ram *ram, const void *hva, uint64_t *page)
{
    uint64_t offset = (uintptr_t)hva - (uintptr_t)ram->map;
    if (!hva || offset >= ram->size)
        return false;
    *page = offset / PAGE_SIZE;
    return true;
}

uint64_t ram_contiguous(const struct ram *ram, uint64_t page)
{
    for (unsigned i = 0; i < ram->nr_regions; i++) {
        const struct ram_region *r = &ram->regions[i];
        uint64_t pages = r->size / PAGE_SIZE;
        if (page >= r->first_page && page - r->first_page < pages)
            return pages - (page - r->first_page);
    }
    return 0;
}

static int drop_one(struct ram *ram, uint8_t *hva, uint64_t len)
{
    if (ram->memfd >= 0)
        return fallocate(ram->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, hva - ram->map,
                         (off_t)len);
    if (!ram->file_mapped)
        return madvise(hva, len, MADV_DONTNEED);
    // The file's content would come back.
    return mmap(hva, len, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED
               ? -1
               : 0;
}

int ram_drop(struct ram *ram, uint64_t first, uint64_t count, struct error *err)
{
    while (count) {
        uint64_t n = ram_contiguous(ram, first);
        n = n < count ? n : count;
        uint8_t *hva = ram_page(ram, first);
        if (drop_one(ram, hva, n * PAGE_SIZE))
            return error_errno(err, "giving back %llu pages from page %llu on",
                               (unsigned long long)n, (unsigned long long)first);
        first += n;
        count -= n;
    }
    return 0;
}

int ram_discard(struct ram *ram, uint64_t gpa, uint64_t len, uint64_t *given, struct error *err)
{
    uint64_t first;
    *given = 0;
    if (!ram_contains(ram, gpa, len))
        return error_set(err, -EFAULT, "%llu bytes at 0x%llx: not RAM", (unsigned long long)len,
                         (unsigned long long)gpa);
    // Regions begin at multiples of 2 MiB, in the guest as in the mapping.
    uint64_t start = align_up(gpa, ram->unit), end = align_down(gpa + len, ram->unit);
    if (start >= end || !ram_gpa_page(ram, start, &first))
        return 0;
    pthread_mutex_lock(&ram->discard_lock);
    int ret = 0;
    if (!ram->discard_blocks) {
        ret = ram_drop(ram, first, (end - start) / PAGE_SIZE, err);
        // Afterwards: a sync between the two would find the old content and never look again.
        ram_mark_dirty(ram, start, end - start);
        *given = ret ? 0 : end - start;
    }
    pthread_mutex_unlock(&ram->discard_lock);
    return ret;
}

void ram_discard_block(struct ram *ram)
{
    pthread_mutex_lock(&ram->discard_lock);
    ram->discard_blocks++;
    pthread_mutex_unlock(&ram->discard_lock);
}

void ram_discard_unblock(struct ram *ram)
{
    pthread_mutex_lock(&ram->discard_lock);
    ram->discard_blocks--;
    pthread_mutex_unlock(&ram->discard_lock);
}
