// SPDX-License-Identifier: Apache-2.0
#include "migrate/snapshot.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "migrate/capture.h"
#include "migrate/disks.h"
#include "migrate/machine.h"
#include "migrate/pages.h"
#include "migrate/workset.h"
#include "vmm/bitmap.h"
#include "vmm/stream.h"
#include "vmm/vm.h"

void snapshot_params_default(struct snapshot_params *params, const char *path)
{
    *params = (struct snapshot_params) {
        .path = path, .layout = SNAPFILE_PACKED, .compress = SNAPFILE_LZ4};
}

// --- what was written since the last one

static int track_log(struct snapshot_track *t, struct vm *vm, struct error *err)
{
    if (!t->dirty)
        t->dirty = malloc(ram_bitmap_words(&vm->ram) * 8);
    if (!t->dirty)
        return error_set(err, -ENOMEM, "no memory for the map of written pages");
    memset(t->dirty, 0, ram_bitmap_words(&vm->ram) * 8);
    int ret = t->logging ? 0 : ram_dirty_start(&vm->ram, &t->user, err);
    t->logging = !ret;
    return ret;
}

// Takes `path`.
static void track_name(struct snapshot_track *t, char *path, const uint8_t *id)
{
    free(t->path);
    t->path = path;
    memcpy(t->id, id, sizeof(t->id));
}

int snapshot_track_base(struct snapshot_track *t, struct vm *vm, const char *path,
                        const uint8_t id[SNAPFILE_ID_LEN], bool log, struct error *err)
{
    snapshot_track_end(t, vm);
    char *copy = strdup(path);
    if (!copy)
        return error_set(err, -ENOMEM, "no memory");
    track_name(t, copy, id);
    return log ? track_log(t, vm, err) : 0;
}

void snapshot_track_end(struct snapshot_track *t, struct vm *vm)
{
    if (t->logging)
        ram_dirty_stop(&vm->ram, &t->user, NULL);
    free(t->dirty);
    free(t->path);
    *t = (struct snapshot_track) {0};
}

// --- saving: where pages go

struct save {
    struct vm *vm;
    const struct snapshot_params *params;
    const struct migrate_hooks *hooks;
    struct migration *m;
    struct snapshot_report *report;
    struct snapfile_writer *w;
    struct snapfile *parent; // a diff that compares; else NULL
    bool log_started;        // by this snapshot
    uint64_t *todo;          // pages to look at; NULL: all
    uint8_t *old;            // SNAPFILE_CHUNK_PAGES pages of the parent
    char *json, *disks;      // with params->disks: their texts; the section
    struct disks_copies *copies;
    uint64_t done, report_at; // progress of a running guest's: pages; time
};

// Pages of a guest that stood still when they were taken; `data` may change later.
static int sink_pages(void *context, uint64_t first, uint64_t count, const void *data,
                      struct error *err)
{
    struct save *s = context;
    const uint8_t *now = data;
    if (!s->parent)
        return snapfile_add_pages(s->w, first, count, data, err);
    int ret = 0;
    for (uint64_t n; !ret && count; first += n, count -= n, now += n * PAGE_SIZE) {
        n = count < SNAPFILE_CHUNK_PAGES ? count : SNAPFILE_CHUNK_PAGES;
        ret = snapfile_read(s->parent, first, n, s->old, err);
        for (uint64_t i = 0, run; !ret && i < n; i += run) {
            const uint8_t *a = now + i * PAGE_SIZE, *b = s->old + i * PAGE_SIZE;
            bool same = !memcmp(a, b, PAGE_SIZE);
            for (run = 1; i + run < n &&
                          same == !memcmp(a + run * PAGE_SIZE, b + run * PAGE_SIZE, PAGE_SIZE);)
                run++;
            if (!same)
                ret = snapfile_add_pages(s->w, first + i, run, a, err);
        }
    }
    return ret;
}

static int sink_zero(void *context, uint64_t first, uint64_t count, struct error *err)
{
    struct save *s = context;
    if (!s->parent)
        return snapfile_add_zero(s->w, first, count, err);
    int ret = 0;
    for (uint64_t n; !ret && count; first += n, count -= n) {
        struct snapfile_where where;
        snapfile_find(s->parent, first, &where);
        n = where.count < count ? where.count : count;
        if (where.kind != SNAPFILE_ZERO)
            ret = snapfile_add_zero(s->w, first, n, err);
    }
    return ret;
}

// --- saving: before the pause

static int parent_prepare(struct save *s, const char **parent, struct error *err)
{
    const struct snapshot_track *t = s->params->track;
    struct snapfile_info info;
    *parent = s->params->parent ? s->params->parent : t ? t->path : NULL;
    if (!*parent)
        return error_set(err, -EINVAL,
                         "snapshot %s: a diff of what? This VM has no snapshot yet (name a parent)",
                         s->params->path);
    int ret = snapfile_peek(*parent, &info, err);
    if (ret) {
        error_prefix(err, "snapshot %s: its parent", s->params->path);
        return ret;
    }
    if (t && t->logging && !memcmp(t->id, info.id, sizeof(info.id)))
        return 0;
    s->old = malloc(SNAPFILE_CHUNK_PAGES * PAGE_SIZE);
    return s->old ? snapfile_open(&s->parent, *parent, err)
                  : error_set(err, -ENOMEM, "no memory for a snapshot");
}

static int disks_begin(struct save *s, struct error *err)
{
    if (!s->hooks->disks)
        return error_set(err, -EOPNOTSUPP, "a snapshot with disks: they are not known here");
    int ret = s->hooks->disks(s->hooks->context, s->vm, &s->json, err);
    if (!ret)
        ret = disks_check(s->json, err);
    if (!ret)
        disks_settle(s->vm, s->json);
    return ret;
}

static int machine_section(struct save *s, struct error *err)
{
    struct machine machine;
    autofree void *meta = NULL;
    size_t len;
    int ret = machine_describe(s->vm, s->hooks, &machine, err);
    if (ret)
        return ret;
    ret = machine_encode(&machine, &meta, &len, err);
    if (!ret && s->params->disks)
        ret = disks_begin(s, err);
    machine_free(&machine);
    return ret ? ret : snapfile_set_section(s->w, SNAPFILE_MACHINE, meta, len, err);
}

static int save_begin(struct save *s, struct error *err)
{
    const struct snapshot_params *p = s->params;
    struct snapfile_params file = {.layout = p->layout,
                                   .compress = p->compress,
                                   .pages = s->vm->ram.pages,
                                   .workers = p->workers};
    int ret = p->diff ? parent_prepare(s, &file.parent, err) : 0;
    if (!ret)
        ret = snapfile_create(&s->w, p->path, &file, err);
    return ret ? ret : machine_section(s, err);
}

// --- saving: the instant, with the guest paused

static int state_section(struct save *s, struct error *err)
{
    struct stream_mem blob;
    stream_mem_writer(&blob, "guest state", WIRE_STATE_MAX);
    int ret = vm_save(s->vm, &blob.stream, err);
    if (!ret)
        ret = snapfile_set_section(s->w, SNAPFILE_STATE, blob.data, blob.len, err);
    s->report->state_bytes = blob.len;
    stream_mem_free(&blob);
    return ret;
}

// Which pages the diff is about, and that the next one is about those written from here on.
static int pages_choose(struct save *s, struct error *err)
{
    struct snapshot_track *t = s->params->track;
    struct ram *ram = &s->vm->ram;
    int ret = 0;
    if (t && t->logging) {
        ret = ram_dirty_sync(ram, &t->user, t->dirty, NULL, err);
    } else if (t && s->params->log) {
        ret = track_log(t, s->vm, err);
        s->log_started = !ret;
    }
    if (ret || !s->params->diff || s->parent)
        return ret;
    s->todo = malloc(ram_bitmap_words(ram) * 8);
    if (!s->todo)
        return error_set(err, -ENOMEM, "no memory for a snapshot");
    memcpy(s->todo, t->dirty, ram_bitmap_words(ram) * 8);
    return 0;
}

static int save_instant(struct save *s, struct error *err)
{
    int ret = state_section(s, err);
    if (!ret && s->json) // the state has been saved: overlays are whole, nobody writes to them
        ret = disks_freeze(s->vm, s->json, s->params->path, &s->disks, &s->copies, err);
    return ret ? ret : pages_choose(s, err);
}

// --- saving: the pages

static int save_progress(struct save *s, uint64_t done, struct error *err)
{
    struct migration *m = s->m;
    struct migrate_progress copy;
    if (!m)
        return 0;
    if (atomic_load(&m->cancelled))
        return error_set(err, -ECANCELED, "snapshot cancelled");
    pthread_mutex_lock(&m->lock);
    m->progress = (struct migrate_progress) {.phase = MIGRATE_ROUNDS,
                                             .total_bytes = s->vm->ram.size,
                                             .sent_bytes = done * PAGE_SIZE,
                                             .remaining_bytes = s->vm->ram.size - done * PAGE_SIZE};
    copy = m->progress;
    pthread_mutex_unlock(&m->lock);
    if (m->on_progress)
        m->on_progress(&copy, m->on_progress_arg);
    return 0;
}

// From `page` on, at most a chunk of neighbours that are all zero or all not.
static uint64_t alike(const struct save *s, struct page_presence *presence, uint64_t page,
                      bool *zero)
{
    const struct ram *ram = &s->vm->ram;
    uint64_t most = ram_contiguous(ram, page), n = 1;
    most = most < SNAPFILE_CHUNK_PAGES ? most : SNAPFILE_CHUNK_PAGES;
    if (s->todo) {
        uint64_t end = bitmap_find(s->todo, ram->pages, page, false);
        most = most < end - page ? most : end - page;
    }
    *zero = page_known_zero(presence, ram, page);
    while (n < most && page_known_zero(presence, ram, page + n) == *zero)
        n++;
    return n;
}

static int save_pages(struct save *s, struct error *err)
{
    const struct ram *ram = &s->vm->ram;
    struct page_presence presence;
    uint64_t page = 0, report_at = 0;
    int ret = 0;
    page_presence_init(&presence);
    while (!ret) {
        bool zero;
        page = s->todo ? bitmap_find(s->todo, ram->pages, page, true) : page;
        if (page == ram->pages)
            break;
        uint64_t n = alike(s, &presence, page, &zero);
        ret = zero ? sink_zero(s, page, n, err) : sink_pages(s, page, n, ram_page(ram, page), err);
        page += n;
        if (!ret && time_ns() >= report_at) {
            ret = save_progress(s, page, err);
            report_at = time_ns() + 200000000;
        }
    }
    page_presence_free(&presence);
    return ret;
}

// --- saving: all of it

// The guest stands still until its memory has been copied.
static int save_paused(struct save *s, struct error *err)
{
    bool was_paused = vm_paused(s->vm);
    uint64_t start = time_ns();
    int ret = vm_pause(s->vm, err);
    if (!ret)
        ret = save_instant(s, err);
    if (!ret)
        ret = save_pages(s, err);
    if (!was_paused) {
        vm_resume(s->vm);
        s->report->pause_ns = time_ns() - start;
    }
    return ret;
}

static int live_pages(void *context, uint64_t first, uint64_t count, const void *data,
                      struct error *err)
{
    struct save *s = context;
    s->done += count;
    if (time_ns() >= s->report_at) {
        int ret = save_progress(s, s->done, err);
        if (ret)
            return ret;
        s->report_at = time_ns() + 200000000;
    }
    return sink_pages(context, first, count, data, err);
}

static int live_zero(void *context, uint64_t first, uint64_t count, struct error *err)
{
    struct save *s = context;
    s->done += count;
    return sink_zero(context, first, count, err);
}

// The pages that a diff is about so far, so that few are left to be protected in the pause. NULL:
// all.
static int live_foresee(struct save *s, const uint64_t **pages, struct error *err)
{
    struct snapshot_track *t = s->params->track;
    *pages = NULL;
    if (!s->params->diff || s->parent)
        return 0;
    *pages = t->dirty;
    return ram_dirty_sync(&s->vm->ram, &t->user, t->dirty, NULL, err);
}

// The instant, and the guest goes on.
static int live_instant(struct save *s, struct capture *c, struct error *err)
{
    uint64_t start = time_ns();
    int ret = vm_pause(s->vm, err);
    if (!ret)
        ret = save_instant(s, err);
    if (!ret)
        ret = capture_freeze(c, s->todo, err);
    vm_resume(s->vm);
    s->report->pause_ns = time_ns() - start;
    return ret;
}

// -EOPNOTSUPP, -EPERM, before anything has happened: this host, or this memory, cannot do it;
// -EBUSY: missing pages are still being fetched.
static int save_live(struct save *s, struct error *err)
{
    const struct capture_sink sink = {live_pages, live_zero, s};
    const uint64_t *pages;
    struct capture *c = NULL;
    int ret = live_foresee(s, &pages, err);
    if (!ret)
        ret = capture_create(&c, &s->vm->ram, pages, err);
    if (ret)
        return ret;
    ret = live_instant(s, c, err);
    if (!ret) {
        s->report->live = true;
        ret = capture_drain(c, &sink, s->m ? &s->m->cancelled : NULL, err);
    }
    struct capture_counts counts;
    capture_counts(c, &counts);
    s->report->aside_pages = counts.aside;
    s->report->fault_ns = counts.fault_ns;
    capture_free(c);
    return ret;
}

static int save_guest(struct save *s, struct error *err)
{
    if (vm_paused(s->vm))
        return save_paused(s, err);
    int ret = save_live(s, err);
    if (s->report->live || (ret != -EOPNOTSUPP && ret != -EPERM && ret != -EBUSY))
        return ret;
    log_write(&s->vm->log, LOG_WARN, "%s; the guest is paused while its memory is copied",
              err->text);
    return save_paused(s, err);
}

static int save_end(struct save *s, struct error *err)
{
    struct snapfile_report file;
    struct snapshot_track *t = s->params->track;
    int ret =
        disks_complete(s->copies, s->disks, s->params->path, s->m ? &s->m->cancelled : NULL, err);
    if (!ret && s->disks)
        ret = snapfile_set_section(s->w, SNAPFILE_DISKS, s->disks, strlen(s->disks), err);
    if (ret)
        return ret;
    // Before there is no way back: file and track agree about which is the last one.
    char *name = strdup(s->params->path);
    if (!name)
        return error_set(err, -ENOMEM, "no memory");
    ret = snapfile_commit(s->w, &file, err);
    s->w = NULL;
    if (ret || !t) {
        free(name);
        name = NULL;
    }
    if (ret)
        return ret;
    s->report->data_pages = file.data_pages;
    s->report->zero_pages = file.zero_pages;
    s->report->file_bytes = file.file_bytes;
    s->report->stored_bytes = file.stored_bytes;
    s->report->kind = s->params->diff ? SNAPFILE_DIFF : SNAPFILE_FULL;
    memcpy(s->report->id, file.id, sizeof(file.id));
    if (t && t->logging)
        memset(t->dirty, 0, ram_bitmap_words(&s->vm->ram) * 8);
    if (t)
        track_name(t, name, file.id);
    return 0;
}

int snapshot_save(struct vm *vm, const struct snapshot_params *params,
                  const struct migrate_hooks *hooks, struct migration *m,
                  struct snapshot_report *report, struct error *err)
{
    *report = (struct snapshot_report) {0};
    struct save s = {.vm = vm, .params = params, .hooks = hooks, .m = m, .report = report};
    uint64_t start = time_ns();
    int ret = vm->ram.filler ? vm->ram.filler->complete(vm->ram.filler, err) : 0;
    if (!ret)
        ret = save_begin(&s, err);
    if (!ret)
        ret = save_guest(&s, err);
    if (!ret)
        ret = save_end(&s, err);
    snapfile_abort(s.w);
    disks_copies_free(s.copies);
    if (ret)
        disks_drop(s.disks, params->path);
    free(s.disks);
    free(s.json);
    snapfile_close(s.parent);
    free(s.todo);
    free(s.old);
    bool safe = !ret;
    if (!ret && params->taken)
        ret = params->taken(params->taken_context, report, err);
    if (!safe && s.log_started) { // its instant is no snapshot's
        ram_dirty_stop(&vm->ram, &params->track->user, NULL);
        params->track->logging = false;
    }
    report->total_ns = time_ns() - start;
    return ret;
}

// --- loading

static int machine_take(const struct snapfile *f, const char *path, struct machine *machine,
                        struct error *err)
{
    size_t len;
    const void *meta = snapfile_section(f, SNAPFILE_MACHINE, &len);
    struct wire_record record = {.header = {.type = WIRE_MACHINE, .meta_len = (uint32_t)len},
                                 .meta = (uint8_t *)(uintptr_t)meta};
    int ret = wire_header_check(&record.header, err);
    if (!ret)
        ret = machine_parse(&record, machine, err);
    if (!ret && machine->ram_size / PAGE_SIZE != snapfile_info(f)->pages) {
        ret = error_set(err, -EPROTO, "machine of %llu pages, the file has %llu",
                        (unsigned long long)(machine->ram_size / PAGE_SIZE),
                        (unsigned long long)snapfile_info(f)->pages);
        machine_free(machine);
    }
    if (ret)
        error_prefix(err, "%s", path);
    return ret;
}

static void report_fill(const struct snapfile *f, struct snapshot_report *report)
{
    const struct snapfile_info *info = snapfile_info(f);
    *report = (struct snapshot_report) {.kind = info->kind,
                                        .data_pages = info->data_pages,
                                        .zero_pages = info->kind == SNAPFILE_FULL
                                                          ? info->pages - info->data_pages
                                                          : info->zero_pages,
                                        .file_bytes = info->file_bytes,
                                        .depth = snapfile_depth(f)};
    memcpy(report->id, info->id, sizeof(report->id));
    snapfile_section(f, SNAPFILE_STATE, &report->state_bytes);
}

static void *target_at(const struct snapfile_target *target, uint64_t page, uint64_t *count)
{
    const struct vm *vm = target->context;
    *count = ram_contiguous(&vm->ram, page);
    return ram_page(&vm->ram, page);
}

static int load_state(const struct snapfile *f, struct vm *vm, struct error *err)
{
    struct stream_mem blob;
    size_t len;
    const void *state = snapfile_section(f, SNAPFILE_STATE, &len);
    stream_mem_reader(&blob, "guest state", state, len);
    return vm_load(vm, &blob.stream, err);
}

static int load_memory(const struct snapfile *f, struct vm *vm, struct error *err)
{
    const struct snapfile_target target = {.at = target_at, .context = vm};
    // Whatever was placed while the VM was built goes.
    int ret = ram_drop(&vm->ram, 0, vm->ram.pages, err);
    return ret ? ret : snapfile_load(f, &target, 0, err);
}

static void load_failed(void *context, const struct error *err)
{
    vm_request_stop(context, VM_STOP_ERROR, 0, "%s", err->text);
}

// `*f` is NULL afterwards if it is `*lazy`'s now.
static int load_lazy(struct snapfile **f, struct vm *vm, const struct snapshot_load_params *p,
                     struct lazy **lazy, struct error *err)
{
    if (p->mode == LAZY_MAP)
        return lazy_map(&vm->ram, *f, err);
    struct lazy_params params = p->lazy;
    params.path = p->path;
    params.log = &vm->log;
    params.failed = load_failed;
    params.context = vm;
    params.seccomp = vm->config.seccomp;
    int ret = lazy_create(lazy, &vm->ram, *f, &params, err);
    if (!ret)
        *f = NULL;
    return ret;
}

static int load_guest(struct snapfile *f, struct vm *vm, const struct snapshot_load_params *p,
                      struct lazy **lazy, struct error *err)
{
    struct snapfile *own = f;
    int ret = p->mode == LAZY_NONE ? load_memory(f, vm, err) : load_lazy(&own, vm, p, lazy, err);
    if (!ret)
        ret = load_state(f, vm, err); // may touch memory, which comes by then
    if (own)
        snapfile_close(own);
    return ret;
}

int snapshot_load(const char *path, const struct migrate_hooks *hooks, struct vm **vm,
                  struct snapshot_report *report, struct error *err)
{
    struct lazy *lazy;
    const struct snapshot_load_params params = {.path = path};
    return snapshot_load_as(&params, hooks, vm, &lazy, report, err);
}

static int load_disks(const struct snapfile *f, const struct snapshot_load_params *params,
                      const struct migrate_hooks *hooks, struct error *err)
{
    size_t len;
    autofree char *texts = NULL;
    const void *section = snapfile_section(f, SNAPFILE_DISKS, &len);
    if (!section || !params->name || !hooks->use_disks)
        return 0;
    int ret = disks_thaw(section, len, params->path, params->name, &texts, err);
    return ret ? ret : hooks->use_disks(hooks->context, texts, err);
}

int snapshot_load_as(const struct snapshot_load_params *params, const struct migrate_hooks *hooks,
                     struct vm **vm, struct lazy **lazy, struct snapshot_report *report,
                     struct error *err)
{
    uint64_t start = time_ns();
    struct snapfile *f;
    struct machine machine = {0};
    *report = (struct snapshot_report) {0};
    *vm = NULL;
    *lazy = NULL;
    int ret = snapfile_open(&f, params->path, err);
    if (ret)
        return ret;
    report_fill(f, report);
    ret = machine_take(f, params->path, &machine, err);
    if (!ret)
        ret = load_disks(f, params, hooks, err);
    if (!ret)
        ret = machine_build(&machine, hooks, vm, err);
    if (ret)
        snapfile_close(f);
    else
        ret = load_guest(f, *vm, params, lazy, err);
    if (ret && *vm) {
        lazy_free(*lazy);
        hooks->destroy_vm(hooks->context, *vm);
        *vm = NULL;
        *lazy = NULL;
    }
    machine_free(&machine);
    report->total_ns = time_ns() - start;
    return ret;
}

// --- going back

struct snapshot_back {
    struct vm *vm;
    struct snapfile *f;
    struct disks_back *disks; // NULL: they stay as they are
};

static int back_disks(struct snapshot_back *b, const char *path, const struct migrate_hooks *hooks,
                      struct error *err)
{
    size_t len;
    autofree char *texts = NULL;
    const void *section = snapfile_section(b->f, SNAPFILE_DISKS, &len);
    if (!section || !hooks->disks)
        return 0;
    int ret = hooks->disks(hooks->context, b->vm, &texts, err);
    return ret ? ret : disks_back_open(&b->disks, section, len, path, texts, err);
}

int snapshot_back_open(struct snapshot_back **out, const char *path, struct vm *vm,
                       const struct migrate_hooks *hooks, struct error *err)
{
    struct machine machine;
    struct snapshot_back *b = calloc(1, sizeof(*b));
    if (!b)
        return error_set(err, -ENOMEM, "no memory");
    b->vm = vm;
    int ret = snapfile_open(&b->f, path, err);
    if (!ret)
        ret = machine_take(b->f, path, &machine, err);
    if (!ret) {
        ret = machine_same(&machine, vm, hooks, err);
        machine_free(&machine);
        if (ret)
            error_prefix(err, "%s", path);
    }
    if (!ret)
        ret = back_disks(b, path, hooks, err);
    if (ret) {
        snapshot_back_close(b);
        return ret;
    }
    *out = b;
    return 0;
}

int snapshot_back_verify(const struct snapshot_back *b, struct error *err)
{
    return snapfile_verify(b->f, 0, err);
}

int snapshot_back_clear(struct snapshot_back *b, struct error *err)
{
    return vm_clear(b->vm, err);
}

int snapshot_back_fill(struct snapshot_back *b, struct error *err)
{
    const struct snapfile_target target = {.at = target_at, .context = b->vm};
    int ret = snapfile_load(b->f, &target, 0, err);
    return ret || !b->disks ? ret : disks_back_copy(b->disks, err);
}

int snapshot_back_state(struct snapshot_back *b, struct error *err)
{
    struct stream_mem blob;
    size_t len;
    const void *state = snapfile_section(b->f, SNAPFILE_STATE, &len);
    stream_mem_reader(&blob, "guest state", state, len);
    return vm_load_again(b->vm, &blob.stream, err); // reads the overlays' tables anew
}

int snapshot_back_load(struct snapshot_back *b, struct error *err)
{
    int ret = snapshot_back_clear(b, err);
    if (!ret)
        ret = snapshot_back_fill(b, err);
    return ret ? ret : snapshot_back_state(b, err);
}

void snapshot_back_close(struct snapshot_back *b)
{
    if (!b)
        return;
    disks_back_close(b->disks);
    snapfile_close(b->f);
    free(b);
}

// --- without a VM

int snapshot_verify(const char *path, struct snapshot_report *report, struct error *err)
{
    uint64_t start = time_ns();
    struct snapfile *f;
    struct machine machine = {0};
    int ret = snapfile_open(&f, path, err);
    if (ret)
        return ret;
    report_fill(f, report);
    ret = machine_take(f, path, &machine, err);
    if (!ret)
        ret = snapfile_verify(f, 0, err);
    machine_free(&machine);
    snapfile_close(f);
    report->total_ns = time_ns() - start;
    return ret;
}

static char *disks_section(const char *path)
{
    struct snapfile *f;
    size_t len;
    if (snapfile_open(&f, path, NULL))
        return NULL;
    const void *section = snapfile_section(f, SNAPFILE_DISKS, &len);
    char *text = section ? strndup(section, len) : NULL;
    snapfile_close(f);
    return text;
}

int snapshot_remove(const char *path, struct error *err)
{
    struct snapfile_info info;
    char beside[PATH_MAX];
    int ret = snapfile_peek(path, &info, err);
    if (ret)
        return ret;
    autofree char *disks = disks_section(path);
    ret = snapfile_remove(path, err);
    if (ret)
        return ret;
    disks_drop(disks, path);
    if ((size_t)snprintf(beside, sizeof(beside), "%s.ws", path) < sizeof(beside))
        workset_remove(beside, info.id);
    return 0;
}

static int merge_sections(const struct snapfile *f, struct snapfile_writer *w, struct error *err)
{
    int ret = 0;
    for (enum snapfile_section i = SNAPFILE_MACHINE; !ret && i < SNAPFILE_INDEX; i++) {
        size_t len;
        const void *data = snapfile_section(f, i, &len);
        if (data)
            ret = snapfile_set_section(w, i, data, len, err);
    }
    return ret;
}

static int merge_pages(const struct snapfile *f, struct snapfile_writer *w,
                       const atomic_bool *cancelled, struct error *err)
{
    const uint64_t pages = snapfile_info(f)->pages, most = 4 * SNAPFILE_CHUNK_PAGES;
    autofree uint8_t *data = malloc(most * PAGE_SIZE);
    int ret = data ? 0 : error_set(err, -ENOMEM, "no memory to merge snapshots");
    for (uint64_t page = 0, n; !ret && page < pages; page += n) {
        struct snapfile_where where;
        snapfile_find(f, page, &where);
        n = where.count;
        if (where.kind == SNAPFILE_ZERO)
            continue;
        if (cancelled && atomic_load(cancelled))
            return error_set(err, -ECANCELED, "merging snapshots cancelled");
        n = n < most ? n : most;
        ret = snapfile_read(f, page, n, data, err);
        if (!ret)
            ret = snapfile_add_pages(w, page, n, data, err);
    }
    return ret;
}

static int merge(const struct snapfile *f, const char *path, const struct snapfile_params *p,
                 const atomic_bool *cancelled, struct snapshot_report *report, struct error *err)
{
    uint64_t start = time_ns();
    struct snapfile_writer *w = NULL;
    struct snapfile_report file;
    report_fill(f, report);
    int ret = snapfile_create(&w, path, p, err);
    if (!ret)
        ret = merge_sections(f, w, err);
    if (!ret)
        ret = merge_pages(f, w, cancelled, err);
    if (ret)
        snapfile_abort(w);
    else
        ret = snapfile_commit(w, &file, err);
    if (ret)
        return ret;
    report->kind = SNAPFILE_FULL;
    report->data_pages = file.data_pages;
    report->zero_pages = file.zero_pages;
    report->file_bytes = file.file_bytes;
    report->stored_bytes = file.stored_bytes;
    report->depth = 1;
    memcpy(report->id, file.id, sizeof(file.id));
    report->total_ns = time_ns() - start;
    return 0;
}

int snapshot_merge(const char *child, const struct snapshot_params *params,
                   struct snapshot_report *report, struct error *err)
{
    struct snapfile *f;
    int ret = snapfile_open(&f, child, err);
    if (ret)
        return ret;
    const struct snapfile_params p = {.layout = params->layout,
                                      .compress = params->compress,
                                      .pages = snapfile_info(f)->pages,
                                      .workers = params->workers};
    ret = merge(f, params->path, &p, NULL, report, err);
    snapfile_close(f);
    return ret;
}

int snapshot_settle(const char *path, const atomic_bool *cancelled, struct snapshot_report *report,
                    struct error *err)
{
    struct snapfile *f;
    int ret = snapfile_open(&f, path, err);
    if (ret)
        return ret;
    const struct snapfile_info *info = snapfile_info(f);
    const struct snapfile_params p = {.layout = info->layout,
                                      .compress = info->compress,
                                      .pages = info->pages,
                                      .workers = 1, // nobody waits for it
                                      .again = info};
    ret = merge(f, path, &p, cancelled, report, err);
    snapfile_close(f);
    return ret;
}
