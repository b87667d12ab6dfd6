// SPDX-License-Identifier: Apache-2.0
#include "migrate/landing.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "migrate/userfault.h"
#include "vmm/bitmap.h"

enum { LOOK_PAGES = 4096 }; // asked about at once: 8 huge pages

int landing_open(struct landing *l, struct ram *ram, struct error *err)
{
    *l = (struct landing) {.ram = ram, .uffd = -1, .unit = ram->unit / PAGE_SIZE};
    if (l->unit == 1)
        return uffd_open(&l->uffd, "post-copy", 0, err);
    int ret = uffd_open(&l->uffd, "post-copy",
                        UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS, err);
    if (ret == -EOPNOTSUPP)
        error_set(err, ret,
                  "post-copy into huge pages needs Linux 5.18 (userfaultfd's minor faults): use "
                  "--mode precopy, or receive with --backing memfd");
    if (ret)
        return ret;
    void *second =
        mmap(NULL, ram->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, ram->memfd, 0);
    if (second == MAP_FAILED)
        return error_errno(err, "post-copy: a second mapping of guest memory");
    madvise(second, ram->size, MADV_DONTDUMP);
    l->second = second;
    l->there = calloc(bitmap_words(ram->pages / l->unit), 8);
    return l->there ? 0 : error_set(err, -ENOMEM, "no memory for post-copy");
}

static bool there(const struct landing *l, uint64_t page)
{
    uint64_t unit = page / l->unit;
    return atomic_load(&l->there[unit / 64]) >> unit % 64 & 1;
}

static void there_set(struct landing *l, uint64_t page)
{
    uint64_t unit = page / l->unit;
    atomic_fetch_or(&l->there[unit / 64], 1ull << unit % 64);
}

// A huge page that was ever written to, through the guest's mapping, is mapped there: nothing else
// takes it away.
static void find_there(struct landing *l)
{
    struct ram *ram = l->ram;
    unsigned char mapped[LOOK_PAGES];
    for (uint64_t first = 0, n; first < ram->pages; first += n) {
        n = ram->pages - first < LOOK_PAGES ? ram->pages - first : LOOK_PAGES;
        bool known = !mincore(ram_page(ram, first), n * PAGE_SIZE, mapped);
        for (uint64_t p = 0; p < n; p += l->unit)
            if (!known || mapped[p] & 1)
                there_set(l, first + p);
    }
}

static int watch(struct landing *l, struct error *err)
{
    uint64_t mode = UFFDIO_REGISTER_MODE_MISSING;
    uint64_t need = 1ull << _UFFDIO_COPY | 1ull << _UFFDIO_ZEROPAGE | 1ull << _UFFDIO_WAKE;
    if (l->second) {
        mode |= UFFDIO_REGISTER_MODE_MINOR;
        need = 1ull << _UFFDIO_CONTINUE | 1ull << _UFFDIO_WAKE;
    }
    int ret = uffd_register(l->uffd, l->ram->map, l->ram->size, mode, need, err);
    if (ret)
        error_prefix(err, "post-copy");
    return ret;
}

// Huge pages that have some of their pages keep them: they only become invisible to the guest. The
// others, too: given back, they might be somebody else's when they are needed.
static int hide(struct landing *l, uint64_t first, uint64_t count, struct error *err)
{
    if (!madvise(ram_page(l->ram, first), count * PAGE_SIZE, MADV_DONTNEED))
        return 0;
    return errno == EINVAL
               ? error_set(err, -EOPNOTSUPP,
                           "post-copy into huge pages needs Linux 5.18 (MADV_DONTNEED of them): "
                           "use --mode precopy, or receive with --backing memfd")
               : error_errno(err, "post-copy: MADV_DONTNEED of huge pages");
}

int landing_possible(struct ram *ram, struct error *err)
{
    struct landing l;
    int ret = landing_open(&l, ram, err);
    if (!ret)
        ret = watch(&l, err);
    if (!ret && l.second)
        ret = hide(&l, 0, l.unit, err);
    landing_close(&l);
    return ret;
}

int landing_guard(struct landing *l, const uint64_t *here, struct error *err)
{
    struct ram *ram = l->ram;
    int ret = watch(l, err);
    if (l->second)
        find_there(l);
    // Guarded first, dropped second: nothing can slip in between.
    for (uint64_t end, first = 0; !ret; first = end) {
        first = bitmap_find(here, ram->pages, first, false);
        if (first == ram->pages)
            break;
        end = bitmap_find(here, ram->pages, first, true);
        if (l->second) {
            first = landing_unit(l, first);
            end = align_up(end, l->unit);
            ret = hide(l, first, end - first, err);
        } else {
            ret = ram_drop(ram, first, end - first, err);
        }
    }
    return ret;
}

void landing_unguard(struct landing *l)
{
    uffd_unregister(l->uffd, l->ram->map, l->ram->size);
}

void landing_close(struct landing *l)
{
    if (l->uffd >= 0)
        close(l->uffd); // unregisters, wakes
    if (l->second)
        munmap(l->second, l->ram->size);
    free((void *)l->there);
    l->uffd = -1;
    l->second = NULL;
    l->there = NULL;
}

bool landing_whole(const struct landing *l, const uint64_t *here, uint64_t page)
{
    uint64_t first = landing_unit(l, page);
    return bitmap_find(here, first + l->unit, first, false) == first + l->unit;
}

int landing_copy(struct landing *l, uint64_t first, const void *data, uint64_t count,
                 struct error *err)
{
    for (uint64_t at = 0; at < count;) {
        uint64_t n = ram_contiguous(l->ram, first + at);
        n = n < count - at ? n : count - at;
        int ret = uffd_copy(l->uffd, ram_page(l->ram, first + at),
                            (const uint8_t *)data + at * PAGE_SIZE, n * PAGE_SIZE, err);
        if (ret)
            return ret;
        at += n;
    }
    return 0;
}

int landing_room(struct landing *l, uint64_t first, uint64_t count, struct error *err)
{
    uint64_t start = landing_unit(l, first), end = align_up(first + count, l->unit);
    while (
        fallocate(l->ram->memfd, 0, (off_t)(start * PAGE_SIZE), (off_t)((end - start) * PAGE_SIZE)))
        if (errno != EINTR)
            return error_errno(err,
                               "huge pages for pages %llu to %llu (are there enough in "
                               "/proc/sys/vm/nr_hugepages?)",
                               (unsigned long long)start, (unsigned long long)end - 1);
    for (uint64_t page = start; page < end; page += l->unit)
        there_set(l, page);
    return 0;
}

void landing_clear(struct landing *l, uint64_t first, uint64_t count)
{
    if (there(l, first))
        memset(landing_page(l, first), 0, count * PAGE_SIZE);
}

static int show(struct landing *l, uint64_t page, struct error *err)
{
    return uffd_continue(l->uffd, ram_page(l->ram, landing_unit(l, page)), l->ram->unit,
                         l->ram->unit, err);
}

int landing_show(struct landing *l, uint64_t page, bool *shown, struct error *err)
{
    *shown = there(l, page);
    return *shown ? show(l, page, err) : 0;
}

int landing_serve(struct landing *l, uint64_t page, struct error *err)
{
    // Zero pages are not placed before they are touched. One that was placed meanwhile answers
    // EEXIST, and who waits is woken.
    if (!l->second)
        return uffd_zero(l->uffd, ram_page(l->ram, page), PAGE_SIZE, err);
    int ret = landing_room(l, page, 1, err);
    return ret ? ret : show(l, page, err);
}
