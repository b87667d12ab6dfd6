// SPDX-License-Identifier: Apache-2.0
#include "migrate/snapshot.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "migrate/bitmap.h"
#include "migrate/crc32c.h"
#include "migrate/machine.h"
#include "migrate/pages.h"
#include "vmm/stream.h"
#include "vmm/vm.h"

_Static_assert(sizeof(struct snapshot_header) == 40, "no padding");

// --- a file as an endpoint

struct wire_file {
    struct wire wire;
    int fd;
};

static int file_readv(struct wire *w, struct iovec *iov, unsigned nr, struct error *err)
{
    struct wire_file *f = container_of(w, struct wire_file, wire);
    while (nr) {
        ssize_t n = readv(f->fd, iov, (int)nr);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_errno(err, "%s: reading at byte %llu", w->name, (unsigned long long)w->in);
        w->in += (uint64_t)n;
        size_t left = (size_t)n;
        while (nr && left >= iov->iov_len) {
            left -= iov->iov_len;
            iov++;
            nr--;
        }
        if (!nr)
            break;
        if (!n)
            return error_set(err, -ENODATA, "%s: ends at byte %llu, inside a record", w->name,
                             (unsigned long long)w->in);
        iov->iov_base = (char *)iov->iov_base + left;
        iov->iov_len -= left;
    }
    return 0;
}

static int file_writev(struct wire *w, struct iovec *iov, unsigned nr, struct error *err)
{
    struct wire_file *f = container_of(w, struct wire_file, wire);
    while (nr) {
        ssize_t n = writev(f->fd, iov, (int)nr);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_errno(err, "%s: writing at byte %llu", w->name,
                               (unsigned long long)w->out);
        w->out += (uint64_t)n;
        while (nr && (size_t)n >= iov->iov_len) {
            n -= (ssize_t)iov->iov_len;
            iov++;
            nr--;
        }
        if (nr) {
            iov->iov_base = (char *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

static void file_init(struct wire_file *f, int fd, const char *path)
{
    *f = (struct wire_file) {.wire = {.name = path, .readv = file_readv, .writev = file_writev},
                             .fd = fd};
}

// --- header

static uint32_t header_crc(const struct snapshot_header *h)
{
    return crc32c(0, h, offsetof(struct snapshot_header, crc));
}

static int header_write(struct wire *w, struct error *err)
{
    struct snapshot_header h = {
        .version = WIRE_VERSION, .oldest = WIRE_VERSION, .kind = SNAPSHOT_FULL};
    memcpy(h.magic, SNAPSHOT_MAGIC, sizeof(h.magic));
    if (getrandom(h.id, sizeof(h.id), 0) != sizeof(h.id))
        return error_errno(err, "getrandom");
    h.crc = header_crc(&h);
    struct iovec iov = {&h, sizeof(h)};
    return w->writev(w, &iov, 1, err);
}

static int header_read(struct wire *w, struct error *err)
{
    struct snapshot_header h;
    unsigned version;
    int ret = wire_read(w, &h, sizeof(h), err);
    if (ret)
        return ret;
    if (memcmp(h.magic, SNAPSHOT_MAGIC, sizeof(h.magic)))
        return error_set(err, -EINVAL, "%s: not a ferry snapshot", w->name);
    if (h.crc != header_crc(&h))
        return error_set(err, -EBADMSG, "%s: header damaged (checksum)", w->name);
    if (h.kind != SNAPSHOT_FULL || h.reserved)
        return error_set(err, -EINVAL, "%s: snapshot kind %u is not known", w->name, h.kind);
    ret = wire_version_choose(WIRE_OLDEST, WIRE_VERSION, h.version, h.version, &version, err);
    return ret ? error_prefix(err, "%s", w->name) : 0;
}

// --- saving

static int write_machine(struct vm *vm, const struct migrate_hooks *hooks, struct wire *w,
                         struct error *err)
{
    struct machine machine;
    autofree void *meta = NULL;
    size_t len;
    int ret = machine_describe(vm, hooks, &machine, err);
    if (ret)
        return ret;
    ret = machine_encode(&machine, &meta, &len, err);
    machine_free(&machine);
    return ret ? ret : wire_put(w, WIRE_MACHINE, 0, meta, len, NULL, 0, err);
}

static int write_state(struct vm *vm, struct wire *w, struct snapshot_report *report,
                       struct error *err)
{
    struct stream_mem blob;
    stream_mem_writer(&blob, "guest state", WIRE_STATE_MAX);
    int ret = vm_save(vm, &blob.stream, err);
    if (!ret) {
        struct iovec iov = {blob.data, blob.len};
        struct wire_state state = {.len = (uint32_t)blob.len,
                                   .crc = crc32c(0, blob.data, blob.len)};
        report->state_bytes = blob.len;
        ret = wire_put(w, WIRE_STATE, 0, &state, sizeof(state), &iov, 1, err);
    }
    stream_mem_free(&blob);
    return ret;
}

static void save_progress(struct migration *m, const struct vm *vm, uint64_t done)
{
    if (!m)
        return;
    struct migrate_progress copy;
    pthread_mutex_lock(&m->lock);
    m->progress = (struct migrate_progress) {.phase = MIGRATE_ROUNDS,
                                             .total_bytes = vm->ram.size,
                                             .sent_bytes = done,
                                             .remaining_bytes = vm->ram.size - done};
    copy = m->progress;
    pthread_mutex_unlock(&m->lock);
    if (m->on_progress)
        m->on_progress(&copy, m->on_progress_arg);
}

static int write_pages(struct vm *vm, struct wire *w, struct migration *m,
                       struct snapshot_report *report, struct error *err)
{
    autofree uint64_t *todo = calloc(ram_bitmap_words(&vm->ram), 8);
    autofree struct page_batch *batch = malloc(sizeof(*batch));
    if (!todo || !batch)
        return error_set(err, -ENOMEM, "no memory for a snapshot");
    struct page_presence presence;
    uint64_t cursor = 0, report_at = time_ns() + 200000000;
    int ret = 0;
    page_presence_init(&presence);
    bitmap_fill(todo, 0, vm->ram.pages, true);
    while (!ret && cursor < vm->ram.pages) {
        if (m && atomic_load(&m->cancelled)) {
            ret = error_set(err, -ECANCELED, "snapshot cancelled");
            break;
        }
        page_batch_reset(batch, &vm->ram);
        page_batch_take(batch, todo, &cursor, WIRE_BATCH_PAGES, &presence);
        ret = page_batch_put(batch, w, PAGE_SIZE, err);
        report->data_pages += batch->nr_data;
        report->zero_pages += batch->nr_zero;
        if (time_ns() >= report_at) {
            save_progress(m, vm, cursor * PAGE_SIZE);
            report_at = time_ns() + 200000000;
        }
    }
    page_presence_free(&presence);
    struct wire_end end = {.data_pages = report->data_pages, .zero_pages = report->zero_pages};
    return ret ? ret : wire_put(w, WIRE_END, 0, &end, sizeof(end), NULL, 0, err);
}

// Pauses, writes, resumes. The guest goes on once its pages are with the kernel; syncing is later.
static int write_guest(struct vm *vm, struct wire *w, const struct migrate_hooks *hooks,
                       struct migration *m, struct snapshot_report *report, struct error *err)
{
    bool was_paused = vm_paused(vm);
    int ret = header_write(w, err);
    if (!ret)
        ret = write_machine(vm, hooks, w, err);
    if (ret)
        return ret;
    uint64_t start = time_ns();
    ret = vm_pause(vm, err);
    if (!ret)
        ret = write_state(vm, w, report, err);
    if (!ret)
        ret = write_pages(vm, w, m, report, err);
    if (!was_paused) {
        vm_resume(vm);
        report->pause_ns = time_ns() - start;
    }
    report->file_bytes = w->out;
    return ret;
}

// The file's name must survive a crash, too.
static int sync_directory(const char *path, struct error *err)
{
    autofree char *copy = strdup(path);
    if (!copy)
        return error_set(err, -ENOMEM, "no memory");
    const char *dir = dirname(copy);
    autoclose int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || (fsync(fd) && errno != EINVAL)) // some file systems cannot sync directories
        return error_errno(err, "syncing directory %s", dir);
    return 0;
}

static int target_check(const char *path, struct error *err)
{
    struct stat st;
    if (stat(path, &st))
        return errno == ENOENT ? 0 : error_errno(err, "snapshot %s", path);
    if (!S_ISREG(st.st_mode))
        return error_set(err, -EINVAL, "snapshot %s: exists and is not a regular file", path);
    return 0;
}

int snapshot_save(struct vm *vm, const char *path, const struct migrate_hooks *hooks,
                  struct migration *m, struct snapshot_report *report, struct error *err)
{
    *report = (struct snapshot_report) {0};
    uint64_t start = time_ns();
    char temp[PATH_MAX];
    if ((size_t)snprintf(temp, sizeof(temp), "%s.tmp-XXXXXX", path) >= sizeof(temp))
        return error_set(err, -ENAMETOOLONG, "snapshot %s: name too long", path);
    int ret = target_check(path, err);
    if (ret)
        return ret;
    autoclose int fd = mkostemp(temp, O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, "snapshot %s: cannot create a file beside it", path);
    struct wire_file file;
    file_init(&file, fd, path);
    ret = write_guest(vm, &file.wire, hooks, m, report, err);
    if (!ret && fsync(fd))
        ret = error_errno(err, "snapshot %s: syncing", path);
    if (!ret && rename(temp, path))
        ret = error_errno(err, "snapshot %s: renaming", path);
    if (ret)
        unlink(temp);
    else
        ret = sync_directory(path, err);
    report->total_ns = time_ns() - start;
    return ret;
}

// --- loading

static int read_state(struct wire *w, struct wire_record *record, uint8_t **state, uint32_t *len,
                      struct error *err)
{
    struct wire_state head;
    int ret = wire_expect(w, record, WIRE_STATE, err);
    if (ret)
        return ret;
    wire_fixed(record, &head, sizeof(head));
    if (head.len != record->header.data_len)
        return error_set(err, -EPROTO, "%s: state of %u bytes, header says %u", w->name, head.len,
                         record->header.data_len);
    *len = head.len;
    *state = malloc(head.len ? head.len : 1);
    if (!*state)
        return error_set(err, -ENOMEM, "no memory for %u bytes of state", head.len);
    ret = wire_read(w, *state, head.len, err);
    if (!ret && crc32c(0, *state, head.len) != head.crc)
        ret = error_set(err, -EBADMSG, "%s: state section damaged (checksum)", w->name);
    return ret;
}

static int check_end(struct wire *w, const struct wire_record *record, uint64_t data, uint64_t zero,
                     uint64_t pages, struct error *err)
{
    struct wire_end end;
    wire_fixed(record, &end, sizeof(end));
    if (end.data_pages != data || end.zero_pages != zero || data + zero != pages)
        return error_set(
            err, -EPROTO, "%s: has %llu + %llu of %llu pages, its end says %llu + %llu", w->name,
            (unsigned long long)data, (unsigned long long)zero, (unsigned long long)pages,
            (unsigned long long)end.data_pages, (unsigned long long)end.zero_pages);
    char more;
    if (wire_read(w, &more, 1, NULL) != -ENODATA)
        return error_set(err, -EPROTO, "%s: bytes after its end at %llu", w->name,
                         (unsigned long long)w->in - 1);
    return 0;
}

static int read_pages(struct wire *w, struct wire_record *record, struct vm *vm,
                      struct snapshot_report *report, struct error *err)
{
    struct page_intake intake;
    int ret = page_intake_init(&intake, &vm->ram, err);
    if (ret)
        return ret;
    intake.once = true;
    for (;;) {
        ret = wire_get(w, record, err);
        if (ret || record->header.type != WIRE_PAGES)
            break;
        ret = page_intake_record(&intake, w, record, err);
        if (ret)
            break;
    }
    if (!ret && record->header.type != WIRE_END)
        ret = wire_unexpected(w, record, "pages or end", err);
    if (!ret)
        ret = check_end(w, record, intake.nr_data, intake.nr_zero, vm->ram.pages, err);
    report->data_pages = intake.nr_data;
    report->zero_pages = intake.nr_zero;
    page_intake_free(&intake);
    return ret;
}

static int read_guest(struct wire *w, struct wire_record *record, struct vm *vm,
                      struct snapshot_report *report, struct error *err)
{
    autofree uint8_t *state = NULL;
    uint32_t len;
    int ret = read_state(w, record, &state, &len, err);
    if (!ret)
        ret = read_pages(w, record, vm, report, err);
    if (ret)
        return ret;
    struct stream_mem blob;
    stream_mem_reader(&blob, "guest state", state, len);
    report->state_bytes = len;
    return vm_load(vm, &blob.stream, err);
}

int snapshot_load(const char *path, const struct migrate_hooks *hooks, struct vm **vm,
                  struct snapshot_report *report, struct error *err)
{
    *report = (struct snapshot_report) {0};
    *vm = NULL;
    uint64_t start = time_ns();
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, "snapshot %s", path);
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    struct wire_file file;
    struct wire_record record = {0};
    struct machine machine = {0};
    file_init(&file, fd, path);
    struct wire *w = &file.wire;
    int ret = header_read(w, err);
    if (!ret)
        ret = wire_expect(w, &record, WIRE_MACHINE, err);
    if (!ret)
        ret = machine_parse(&record, &machine, err);
    if (!ret)
        ret = machine_build(&machine, hooks, vm, err);
    if (!ret) {
        ret = read_guest(w, &record, *vm, report, err);
        if (ret) {
            hooks->destroy_vm(hooks->context, *vm);
            *vm = NULL;
        }
    }
    report->file_bytes = w->in;
    report->total_ns = time_ns() - start;
    machine_free(&machine);
    wire_record_free(&record);
    return ret;
}

// --- verifying

// As page_intake_record in a snapshot, but into nowhere.
static int verify_pages(struct wire *w, const struct wire_record *record, uint64_t pages,
                        uint64_t *next, struct snapshot_report *report, struct error *err)
{
    struct wire_pages_view view;
    uint8_t page[PAGE_SIZE];
    unsigned sum = 0;
    int ret = wire_pages_parse(record, pages, &view, err);
    for (unsigned i = 0; !ret && i < view.head.nr_runs; i++) {
        struct wire_run run = wire_pages_run(&view, i);
        if (run.first != *next)
            return error_set(err, -EPROTO, "%s: page %llu comes where %llu is expected", w->name,
                             (unsigned long long)run.first, (unsigned long long)*next);
        *next += run.count;
        if (run.kind == WIRE_RUN_ZERO) {
            report->zero_pages += run.count;
            continue;
        }
        report->data_pages += run.count;
        for (uint32_t p = 0; !ret && p < run.count; p++) {
            ret = wire_read(w, page, sizeof(page), err);
            if (!ret && page_sum(page) != wire_pages_sum(&view, sum++))
                ret = error_set(err, -EBADMSG, "%s: page %llu does not match its sum", w->name,
                                (unsigned long long)(run.first + p));
        }
    }
    return ret;
}

int snapshot_verify(struct wire *w, struct snapshot_report *report, struct error *err)
{
    struct wire_record record = {0};
    struct machine machine = {0};
    autofree uint8_t *state = NULL;
    uint32_t len;
    *report = (struct snapshot_report) {0};
    int ret = header_read(w, err);
    if (!ret)
        ret = wire_expect(w, &record, WIRE_MACHINE, err);
    if (!ret)
        ret = machine_parse(&record, &machine, err);
    if (!ret)
        ret = read_state(w, &record, &state, &len, err);
    uint64_t pages = machine.ram_size / PAGE_SIZE, next = 0;
    while (!ret) {
        ret = wire_get(w, &record, err);
        if (ret || record.header.type != WIRE_PAGES)
            break;
        ret = verify_pages(w, &record, pages, &next, report, err);
    }
    if (!ret && record.header.type != WIRE_END)
        ret = wire_unexpected(w, &record, "pages or end", err);
    if (!ret)
        ret = check_end(w, &record, report->data_pages, report->zero_pages, pages, err);
    report->file_bytes = w->in;
    machine_free(&machine);
    wire_record_free(&record);
    return ret;
}
