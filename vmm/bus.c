// SPDX-License-Identifier: Apache-2.0
#include "vmm/bus.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

// Index of the first range whose base is above addr.
static unsigned upper_bound(const struct bus *bus, uint64_t addr)
{
    unsigned low = 0, high = bus->nr;
    while (low < high) {
        unsigned mid = low + (high - low) / 2;
        if (bus->ranges[mid].base <= addr)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

const struct bus_range *bus_find(const struct bus *bus, uint64_t addr)
{
    unsigned i = upper_bound(bus, addr);
    if (!i)
        return NULL;
    const struct bus_range *r = &bus->ranges[i - 1];
    return addr - r->base < r->len ? r : NULL;
}

int bus_add(struct bus *bus, const struct bus_range *range, struct error *err)
{
    if (!range->len || range->base > UINT64_MAX - (range->len - 1))
        return error_set(err, -EINVAL, "%s bus: %s at %#llx: length %#llx is empty or wraps",
                         bus->name, range->name, (unsigned long long)range->base,
                         (unsigned long long)range->len);
    unsigned at = upper_bound(bus, range->base);
    const struct bus_range *clash = NULL;
    if (at > 0 && range->base - bus->ranges[at - 1].base < bus->ranges[at - 1].len)
        clash = &bus->ranges[at - 1];
    else if (at < bus->nr && bus->ranges[at].base - range->base < range->len)
        clash = &bus->ranges[at];
    if (clash)
        return error_set(err, -EEXIST, "%s bus: %s at %#llx overlaps %s at %#llx", bus->name,
                         range->name, (unsigned long long)range->base, clash->name,
                         (unsigned long long)clash->base);
    if (bus->nr == bus->cap) {
        unsigned cap = bus->cap ? 2 * bus->cap : 16;
        struct bus_range *grown = realloc(bus->ranges, cap * sizeof(*grown));
        if (!grown)
            return error_set(err, -ENOMEM, "%s bus: no memory for %s", bus->name, range->name);
        bus->ranges = grown;
        bus->cap = cap;
    }
    memmove(&bus->ranges[at + 1], &bus->ranges[at], (bus->nr - at) * sizeof(*bus->ranges));
    bus->ranges[at] = *range;
    bus->nr++;
    return 0;
}

void bus_free(struct bus *bus)
{
    free(bus->ranges);
    bus->ranges = NULL;
    bus->nr = bus->cap = 0;
}

// An access that crosses the end of a range belongs to nobody, nor do the odd sizes that KVM makes
// of accesses across a page's end.
static const struct bus_range *find_access(const struct bus *bus, uint64_t addr, unsigned size)
{
    if (size != 1 && size != 2 && size != 4 && size != 8)
        return NULL;
    const struct bus_range *r = bus_find(bus, addr);
    return r && size <= r->len - (addr - r->base) ? r : NULL;
}

bool bus_read(const struct bus *bus, uint64_t addr, unsigned size, uint64_t *value)
{
    const struct bus_range *r = find_access(bus, addr, size);
    *value = ~0ull;
    if (!r || !r->ops->read)
        return r != NULL;
    if (r->lock)
        pthread_mutex_lock(r->lock);
    *value = r->ops->read(r->dev, addr - r->base, size);
    if (r->lock)
        pthread_mutex_unlock(r->lock);
    return true;
}

bool bus_write(const struct bus *bus, uint64_t addr, unsigned size, uint64_t value)
{
    const struct bus_range *r = find_access(bus, addr, size);
    if (!r || !r->ops->write)
        return r != NULL;
    if (r->lock)
        pthread_mutex_lock(r->lock);
    r->ops->write(r->dev, addr - r->base, size, value);
    if (r->lock)
        pthread_mutex_unlock(r->lock);
    return true;
}
