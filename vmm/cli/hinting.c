// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/hinting.h"

#include <errno.h>
#include <stdlib.h>

#include "vmm/vm.h"

// A look every 10 ms; a guest that names nothing new for so long has other things to do.
#define LOOK_NS     10000000ull
#define PATIENCE_NS 10000000000ull

static void log_end(struct hinting *h)
{
    if (h->vm && ram_dirty_stop(&h->vm->ram, &h->dirty, NULL))
        log_write(&h->vm->log, LOG_WARN, "hinting: the dirty log cannot be stopped");
}

// Runs of pages that were hinted and are clean: neighbours in one call.
static int pages_give(struct hinting *h, const uint64_t *dirty, struct error *err)
{
    struct ram *ram = &h->vm->ram;
    int ret = 0;
    for (uint64_t page = 0; page < ram->pages && !ret;) {
        uint64_t end = page, limit = page + ram_contiguous(ram, page), given;
        while (end < limit && atomic_load(&h->hinted[end / 64]) >> end % 64 & 1 &&
               !(dirty[end / 64] >> end % 64 & 1))
            end++;
        if (end > page)
            ret = ram_discard(ram, ram_page_gpa(ram, page), (end - page) * PAGE_SIZE, &given, err);
        page = end > page ? end : page + 1;
    }
    return ret;
}

// With the vCPUs parked: no page is written between the look at the log and its return.
static int reclaim(struct hinting *h, struct error *err)
{
    struct vm *vm = h->vm;
    bool was_paused = vm_paused(vm);
    autofree uint64_t *dirty = calloc(ram_bitmap_words(&vm->ram), sizeof(*dirty));
    if (!dirty)
        return error_set(err, -ENOMEM, "no memory for a dirty bitmap");
    int ret = vm_pause(vm, err);
    if (!ret)
        ret = ram_dirty_sync(&vm->ram, &h->dirty, dirty, NULL, err);
    if (!ret)
        ret = pages_give(h, dirty, err);
    log_end(h);
    if (!was_paused)
        vm_resume(vm);
    return ret;
}

static void look(struct loop_timer *timer)
{
    struct hinting *h = container_of(timer, struct hinting, timer);
    struct ram_hinter *hinter = h->vm->ram.hinter;
    struct error err;
    uint64_t progress = hinter->progress(hinter), now = time_ns();
    if (progress && progress != h->seen) {
        h->seen = progress;
        h->news_ns = now;
    }
    if (progress && now - h->news_ns < PATIENCE_NS)
        return;
    loop_timer_set(&h->timer, 0, 0);
    if (reclaim(h, &err) && !vm_stopped(h->vm))
        log_write(&h->vm->log, LOG_WARN, "hinting: %s", err.text);
    if (progress || h->acknowledge)
        hinting_stop(h);
}

static int begin(struct hinting *h, struct error *err)
{
    struct ram *ram = &h->vm->ram;
    int ret = ram_dirty_start(ram, &h->dirty, err);
    if (ret)
        return ret;
    h->asks = ram->hinter->start(ram->hinter, h->hinted);
    if (!h->asks) {
        log_end(h);
        return error_set(err, -ENOTCONN,
                         "the guest gives no hints now: its driver does not listen");
    }
    h->seen = 0;
    h->news_ns = time_ns();
    loop_timer_set(&h->timer, LOOK_NS, LOOK_NS);
    return 0;
}

int hinting_start(struct hinting *h, struct vm *vm, bool acknowledge, struct error *err)
{
    if (!vm->ram.hinter)
        return error_set(err, -ENODEV, "the VM has no balloon");
    if (h->asks)
        return error_set(err, -EBUSY, "a hinting is under way: stop it first");
    int ret = h->timer.fn ? 0 : loop_timer_init(vm->loop, &h->timer, look, err);
    if (ret)
        return ret;
    free((void *)h->hinted);
    h->hinted = calloc(ram_bitmap_words(&vm->ram), sizeof(*h->hinted));
    if (!h->hinted)
        return error_set(err, -ENOMEM, "no memory for hints");
    h->vm = vm;
    h->acknowledge = acknowledge;
    return begin(h, err);
}

void hinting_stop(struct hinting *h)
{
    if (!h->asks)
        return;
    loop_timer_set(&h->timer, 0, 0);
    h->vm->ram.hinter->end(h->vm->ram.hinter);
    h->asks = false;
    log_end(h);
}

void hinting_end(struct hinting *h)
{
    hinting_stop(h);
    if (h->timer.fn)
        loop_timer_close(&h->timer);
    h->timer.fn = NULL;
    free((void *)h->hinted);
    h->hinted = NULL;
}
