// SPDX-License-Identifier: Apache-2.0
// Writing a snapshot file. Callers fill buffers of 64 pages; workers compress and write them. A
// chunk's number and place are taken together, under the lock, so that chunks lie in their order.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "migrate/crc32c.h"
#include "migrate/pages.h"
#include "migrate/snapfile_format.h"
#include "vmm/bitmap.h"

#define CHUNK_BYTES (SNAPFILE_CHUNK_PAGES * PAGE_SIZE)

struct job {
    struct job *next;
    unsigned nr;
    uint32_t page[SNAPFILE_CHUNK_PAGES];
    uint8_t *data; // CHUNK_BYTES
};

struct snapfile_writer {
    char *path;
    struct snapfile_path place;
    char temp[SNAPFILE_NAME_MAX + 16];
    int fd;
    struct snapfile_header header;
    void *sections[SNAPFILE_SECTIONS];
    size_t section_len[SNAPFILE_SECTIONS];

    pthread_mutex_t lock; // guards all below
    pthread_cond_t work, done;
    struct job *spare, *queue, **queue_end, *fill;
    unsigned busy; // jobs being worked on
    bool stop;
    int ret; // the first error, told in err
    struct error err;
    uint64_t *seen; // pages added
    uint64_t data_end;
    struct snapfile_chunk *chunks;
    struct snapfile_run *runs;
    uint32_t nr_chunks, cap_chunks, nr_runs, cap_runs;
    uint64_t lz4_chunks;

    unsigned nr_threads;
    pthread_t threads[4];
};

// --- the index in the making; all with the lock held

static int grow(void *array, uint32_t *cap, uint32_t needed, size_t size)
{
    void **p = array;
    uint32_t n = *cap ? *cap : 256;
    while (n < needed)
        n *= 2;
    if (n == *cap)
        return 0;
    void *more = realloc(*p, n * size);
    if (!more)
        return -ENOMEM;
    *p = more;
    *cap = n;
    return 0;
}

static int run_add(struct snapfile_writer *w, uint64_t page, uint64_t count, uint32_t chunk,
                   uint32_t slot)
{
    if (grow(&w->runs, &w->cap_runs, w->nr_runs + 1, sizeof(w->runs[0])))
        return -ENOMEM;
    w->runs[w->nr_runs++] = (struct snapfile_run) {(uint32_t)page, (uint32_t)count, chunk, slot};
    return 0;
}

// Takes the next number, and the place behind the chunk before unless it has one already.
static int chunk_take(struct snapfile_writer *w, struct snapfile_chunk *chunk, uint32_t *number)
{
    if (grow(&w->chunks, &w->cap_chunks, w->nr_chunks + 1, sizeof(w->chunks[0])))
        return -ENOMEM;
    if (!chunk->offset) {
        chunk->offset = w->data_end;
        w->data_end += chunk->len;
    }
    *number = w->nr_chunks;
    w->chunks[w->nr_chunks++] = *chunk;
    w->lz4_chunks += chunk->kind == CHUNK_LZ4;
    return 0;
}

// How many pages from slot `first` on follow each other in memory, too.
static unsigned job_run(const struct job *job, unsigned first)
{
    unsigned n = 1;
    while (first + n < job->nr && job->page[first + n] == job->page[first] + n)
        n++;
    return n;
}

// --- workers

static int write_at(int fd, const void *data, size_t len, uint64_t at, struct error *err,
                    const char *path)
{
    const char *p = data;
    while (len) {
        ssize_t n = pwrite(fd, p, len, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            if (!n)
                errno = ENOSPC;
            return error_errno(err, "snapshot %s: writing at byte %llu", path,
                               (unsigned long long)at);
        }
        p += n;
        at += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

static int write_packed(struct snapfile_writer *w, struct job *job, uint8_t *scratch,
                        struct error *err)
{
    const size_t raw = job->nr * PAGE_SIZE;
    const void *data = job->data;
    struct snapfile_chunk chunk = {
        .len = (uint32_t)raw, .pages = (uint16_t)job->nr, .kind = CHUNK_RAW};
    if (w->header.compress == SNAPFILE_LZ4) {
        // No room for more than pays: LZ4 then gives up by itself.
        int len = LZ4_compress_default(data, (char *)scratch, (int)raw, (int)(raw - raw / 16));
        if (len > 0) {
            chunk.kind = CHUNK_LZ4;
            chunk.len = (uint32_t)len;
            data = scratch;
        }
    }
    chunk.sum = snapfile_sum(data, chunk.len);
    uint32_t number = 0;
    pthread_mutex_lock(&w->lock);
    int ret = chunk_take(w, &chunk, &number);
    for (unsigned i = 0, n; !ret && i < job->nr; i += n) {
        n = job_run(job, i);
        ret = run_add(w, job->page[i], n, number, i);
    }
    pthread_mutex_unlock(&w->lock);
    if (ret)
        return error_set(err, ret, "snapshot %s: no memory for its index", w->path);
    return write_at(w->fd, data, chunk.len, chunk.offset, err, w->path);
}

static int write_mapped(struct snapfile_writer *w, struct job *job, struct error *err)
{
    int ret = 0;
    for (unsigned i = 0, n; !ret && i < job->nr; i += n) {
        n = job_run(job, i);
        const uint8_t *data = job->data + i * PAGE_SIZE;
        struct snapfile_chunk chunk = {.offset = SNAPFILE_HEADER + job->page[i] * PAGE_SIZE,
                                       .len = (uint32_t)(n * PAGE_SIZE),
                                       .pages = (uint16_t)n,
                                       .kind = CHUNK_RAW,
                                       .sum = snapfile_sum(data, n * PAGE_SIZE)};
        uint32_t number;
        pthread_mutex_lock(&w->lock);
        ret = chunk_take(w, &chunk, &number);
        if (!ret)
            ret = run_add(w, job->page[i], n, number, 0);
        pthread_mutex_unlock(&w->lock);
        if (ret)
            return error_set(err, ret, "snapshot %s: no memory for its index", w->path);
        ret = write_at(w->fd, data, n * PAGE_SIZE, chunk.offset, err, w->path);
    }
    return ret;
}

static struct job *job_next(struct snapfile_writer *w)
{
    while (!w->queue && !w->stop)
        pthread_cond_wait(&w->work, &w->lock);
    struct job *job = w->queue;
    if (!job)
        return NULL;
    w->queue = job->next;
    if (!w->queue)
        w->queue_end = &w->queue;
    w->busy++;
    return job;
}

static void *worker_main(void *arg)
{
    struct snapfile_writer *w = arg;
    struct error err = {0};
    uint8_t *scratch = malloc(CHUNK_BYTES);
    struct job *job;
    pthread_mutex_lock(&w->lock);
    while ((job = job_next(w))) {
        int ret = w->ret; // after an error, buffers are only given back
        pthread_mutex_unlock(&w->lock);
        if (!ret && !scratch)
            ret = error_set(&err, -ENOMEM, "snapshot %s: no memory to compress", w->path);
        else if (!ret && w->header.layout == SNAPFILE_MAPPED)
            ret = write_mapped(w, job, &err);
        else if (!ret)
            ret = write_packed(w, job, scratch, &err);
        pthread_mutex_lock(&w->lock);
        if (ret && !w->ret) {
            w->ret = ret;
            w->err = err;
        }
        job->nr = 0;
        job->next = w->spare;
        w->spare = job;
        w->busy--;
        pthread_cond_broadcast(&w->done);
    }
    pthread_mutex_unlock(&w->lock);
    free(scratch);
    return NULL;
}

// --- adding pages

static int failed(const struct snapfile_writer *w, struct error *err)
{
    if (w->ret && err)
        *err = w->err;
    return w->ret;
}

static void job_queue(struct snapfile_writer *w)
{
    struct job *job = w->fill;
    w->fill = NULL;
    if (!job)
        return;
    job->next = NULL;
    *w->queue_end = job;
    w->queue_end = &job->next;
    pthread_cond_signal(&w->work);
}

// Lock held, and given away while it waits for a buffer.
static int data_add(struct snapfile_writer *w, uint64_t page, const uint8_t *data,
                    struct error *err)
{
    while (!w->fill) {
        if (w->spare) {
            w->fill = w->spare;
            w->spare = w->spare->next;
        } else if (w->ret) {
            break;
        } else {
            pthread_cond_wait(&w->done, &w->lock);
        }
    }
    if (w->ret)
        return failed(w, err);
    struct job *job = w->fill;
    memcpy(job->data + job->nr * PAGE_SIZE, data, PAGE_SIZE);
    job->page[job->nr++] = (uint32_t)page;
    w->header.data_pages++;
    if (job->nr == SNAPFILE_CHUNK_PAGES)
        job_queue(w);
    return 0;
}

static int zero_add(struct snapfile_writer *w, uint64_t first, uint64_t count, struct error *err)
{
    if (w->header.kind == SNAPFILE_FULL)
        return 0;
    w->header.zero_pages += count;
    struct snapfile_run *last = w->nr_runs ? &w->runs[w->nr_runs - 1] : NULL;
    if (last && last->chunk == RUN_ZERO && last->page + last->count == first) {
        last->count += (uint32_t)count;
        return 0;
    }
    return run_add(w, first, count, RUN_ZERO, 0)
               ? error_set(err, -ENOMEM, "snapshot %s: no memory for its index", w->path)
               : 0;
}

// Lock held.
static int mark_seen(struct snapfile_writer *w, uint64_t first, uint64_t count, struct error *err)
{
    if (!range_within(first, count, w->header.pages))
        return error_set(err, -ERANGE, "snapshot %s: pages %llu + %llu of %llu", w->path,
                         (unsigned long long)first, (unsigned long long)count,
                         (unsigned long long)w->header.pages);
    uint64_t twice = bitmap_find(w->seen, first + count, first, true);
    if (twice != first + count)
        return error_set(err, -EEXIST, "snapshot %s: page %llu comes twice", w->path,
                         (unsigned long long)twice);
    bitmap_fill(w->seen, first, count, true);
    return 0;
}

int snapfile_add_pages(struct snapfile_writer *w, uint64_t first, uint64_t count, const void *data,
                       struct error *err)
{
    const uint8_t *p = data;
    pthread_mutex_lock(&w->lock);
    int ret = failed(w, err);
    if (!ret)
        ret = mark_seen(w, first, count, err);
    for (uint64_t i = 0; !ret && i < count; i++) {
        if (page_is_zero(p + i * PAGE_SIZE))
            ret = zero_add(w, first + i, 1, err);
        else
            ret = data_add(w, first + i, p + i * PAGE_SIZE, err);
    }
    pthread_mutex_unlock(&w->lock);
    return ret;
}

int snapfile_add_zero(struct snapfile_writer *w, uint64_t first, uint64_t count, struct error *err)
{
    pthread_mutex_lock(&w->lock);
    int ret = failed(w, err);
    if (!ret && count)
        ret = mark_seen(w, first, count, err);
    if (!ret && count)
        ret = zero_add(w, first, count, err);
    pthread_mutex_unlock(&w->lock);
    return ret;
}

int snapfile_set_section(struct snapfile_writer *w, enum snapfile_section section, const void *data,
                         size_t len, struct error *err)
{
    if (section < 1 || section >= SNAPFILE_INDEX || len > SNAPFILE_SECTION_MAX)
        return error_set(err, -EINVAL, "snapshot %s: section %u of %zu bytes", w->path, section,
                         len);
    if (w->sections[section])
        return error_set(err, -EEXIST, "snapshot %s: section %u comes twice", w->path, section);
    w->sections[section] = malloc(len ? len : 1);
    if (!w->sections[section])
        return error_set(err, -ENOMEM, "no memory for %zu bytes of a snapshot's section", len);
    memcpy(w->sections[section], data, len);
    w->section_len[section] = len;
    return 0;
}

// --- beginning

static bool temp_name(const char *tail)
{
    return !strncmp(tail, ".tmp-", 5) && strspn(tail + 5, "0123456789abcdef") == 6 && !tail[11];
}

// One that still lives holds a lock on its file.
static void stale_remove(const struct snapfile_path *place)
{
    size_t len = strlen(place->name);
    int dup_fd = openat(place->dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = dup_fd < 0 ? NULL : fdopendir(dup_fd);
    const struct dirent *entry;
    while (dir && (entry = readdir(dir))) {
        if (strncmp(entry->d_name, place->name, len) || !temp_name(entry->d_name + len))
            continue;
        autoclose int fd =
            openat(place->dir_fd, entry->d_name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        if (fd >= 0 && !flock(fd, LOCK_EX | LOCK_NB))
            unlinkat(place->dir_fd, entry->d_name, 0);
    }
    if (dir)
        closedir(dir);
    else if (dup_fd >= 0)
        close(dup_fd);
}

void snapfile_clean(const char *path)
{
    struct snapfile_path place;
    if (snapfile_path_open(&place, path, NULL))
        return;
    stale_remove(&place);
    snapfile_path_close(&place);
}

static int target_check(const struct snapfile_writer *w, const struct snapfile_info *again,
                        struct error *err)
{
    struct stat st;
    char by[SNAPFILE_NAME_MAX];
    struct snapfile_info info;
    if (fstatat(w->place.dir_fd, w->place.name, &st, 0))
        return errno == ENOENT ? 0 : error_errno(err, "snapshot %s", w->path);
    if (!S_ISREG(st.st_mode))
        return error_set(err, -EINVAL, "snapshot %s: exists and is not a regular file", w->path);
    if (snapfile_peek(w->path, &info, NULL)) // not one of ours: the caller wants it replaced
        return 0;
    if (again && !memcmp(again->id, info.id, sizeof(info.id)))
        return 0;
    int ret = snapfile_needed(w->path, by, err);
    return ret > 0 ? error_set(err, -EBUSY, "snapshot %s: %s beside it needs it as its parent",
                               w->path, by)
                   : ret;
}

// The parent must be in the same directory, be another file, fit, and have a chain not too long.
static int parent_take(struct snapfile_writer *w, const char *path, struct error *err)
{
    struct snapfile_path place;
    struct stat mine, theirs;
    struct snapfile_header h;
    char name[SNAPFILE_NAME_MAX];
    int ret = snapfile_path_open(&place, path, err);
    if (!ret && (fstat(w->place.dir_fd, &mine) || fstat(place.dir_fd, &theirs)))
        ret = error_errno(err, "snapshot %s: its directory", path);
    if (!ret && (mine.st_dev != theirs.st_dev || mine.st_ino != theirs.st_ino))
        ret = error_set(err, -EINVAL,
                        "snapshot %s: its parent %s is in another directory; they belong together",
                        w->path, path);
    if (!ret && !strcmp(place.name, w->place.name))
        ret = error_set(err, -EINVAL, "snapshot %s: would replace its own parent", w->path);
    for (unsigned depth = 0; !ret; depth++) {
        snprintf(name, sizeof(name), "%s", depth ? h.parent : place.name);
        int fd = snapfile_header_read(place.dir_fd, name, depth ? name : path, &h, err);
        if (fd < 0) {
            ret = fd;
            break;
        }
        close(fd);
        if (!depth) {
            memcpy(w->header.parent_id, h.id, sizeof(h.id));
            strcpy(w->header.parent, place.name);
        }
        if (h.pages != w->header.pages)
            ret = error_set(err, -EINVAL, "snapshot %s: of %llu pages, its parent %s of %llu",
                            w->path, (unsigned long long)w->header.pages, path,
                            (unsigned long long)h.pages);
        else if (depth + 2 > SNAPFILE_DEPTH_MAX)
            ret = error_set(err, -E2BIG, "snapshot %s: its chain would be longer than %u files",
                            w->path, SNAPFILE_DEPTH_MAX);
        if (h.kind == SNAPFILE_FULL)
            break;
    }
    snapfile_path_close(&place);
    return ret;
}

static int header_begin(struct snapfile_writer *w, const struct snapfile_params *p,
                        struct error *err)
{
    struct snapfile_header *h = &w->header;
    struct timespec now;
    if (!p->pages || p->pages > UINT32_MAX)
        return error_set(err, -EINVAL, "snapshot %s: of %llu pages", w->path,
                         (unsigned long long)p->pages);
    if (p->layout == SNAPFILE_MAPPED && p->compress != SNAPFILE_NONE)
        return error_set(err, -EINVAL,
                         "snapshot %s: what is to be mapped cannot be compressed (layout packed)",
                         w->path);
    clock_gettime(CLOCK_REALTIME, &now);
    memcpy(h->magic, SNAPFILE_MAGIC, sizeof(h->magic));
    h->version = SNAPFILE_VERSION;
    h->kind = p->parent ? SNAPFILE_DIFF : SNAPFILE_FULL;
    h->layout = p->layout;
    h->compress = p->compress;
    h->pages = p->pages;
    h->data_offset = w->data_end = SNAPFILE_HEADER;
    h->created_s = now.tv_sec;
    if (getrandom(h->id, sizeof(h->id), 0) != sizeof(h->id))
        return error_errno(err, "getrandom");
    if (p->again) {
        h->created_s = p->again->created_s;
        memcpy(h->id, p->again->id, sizeof(h->id));
    }
    return p->parent ? parent_take(w, p->parent, err) : 0;
}

static int temp_create(struct snapfile_writer *w, struct error *err)
{
    stale_remove(&w->place);
    for (unsigned attempt = 0; attempt < 100; attempt++) {
        uint32_t random;
        if (getrandom(&random, sizeof(random), 0) != sizeof(random))
            break;
        snprintf(w->temp, sizeof(w->temp), "%s.tmp-%06x", w->place.name, random & 0xffffff);
        w->fd = openat(w->place.dir_fd, w->temp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (w->fd < 0 && errno == EEXIST)
            continue;
        if (w->fd < 0)
            break;
        // The lock says that its writer lives. Another one may have come between and removed it.
        struct stat st;
        bool locked = !flock(w->fd, LOCK_EX | LOCK_NB) || errno != EWOULDBLOCK;
        if (locked && !fstat(w->fd, &st) && st.st_nlink)
            return 0;
        close(w->fd);
        w->fd = -1;
        errno = EBUSY;
    }
    w->temp[0] = 0;
    return error_errno(err, "snapshot %s: cannot create a file beside it", w->path);
}

static int jobs_create(struct snapfile_writer *w, unsigned nr)
{
    for (unsigned i = 0; i < nr; i++) {
        struct job *job = calloc(1, sizeof(*job));
        if (!job)
            return -ENOMEM;
        job->next = w->spare;
        w->spare = job;
        job->data = aligned_alloc(PAGE_SIZE, CHUNK_BYTES);
        if (!job->data)
            return -ENOMEM;
    }
    return 0;
}

static int workers_start(struct snapfile_writer *w, unsigned nr, struct error *err)
{
    w->seen = calloc(bitmap_words(w->header.pages), 8);
    if (!w->seen || jobs_create(w, 2 * nr + 2))
        return error_set(err, -ENOMEM, "no memory for a snapshot");
    for (unsigned i = 0; i < nr; i++) {
        int ret = pthread_create(&w->threads[i], NULL, worker_main, w);
        if (ret)
            return error_set(err, -ret, "cannot start a thread that writes a snapshot");
        w->nr_threads++;
    }
    return 0;
}

int snapfile_create(struct snapfile_writer **out, const char *path, const struct snapfile_params *p,
                    struct error *err)
{
    *out = NULL;
    struct snapfile_writer *w = calloc(1, sizeof(*w));
    if (!w)
        return error_set(err, -ENOMEM, "no memory for a snapshot");
    w->fd = w->place.dir_fd = -1;
    w->queue_end = &w->queue;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->work, NULL);
    pthread_cond_init(&w->done, NULL);
    w->path = strdup(path);
    int ret = w->path ? 0 : error_set(err, -ENOMEM, "no memory for a snapshot");
    if (!ret)
        ret = snapfile_path_open(&w->place, w->path, err);
    if (!ret)
        ret = target_check(w, p->again, err);
    if (!ret)
        ret = header_begin(w, p, err);
    if (!ret)
        ret = temp_create(w, err);
    if (!ret)
        ret = workers_start(w, snapfile_workers(p->workers), err);
    if (ret)
        snapfile_abort(w);
    else
        *out = w;
    return ret;
}

// --- ending

static void workers_join(struct snapfile_writer *w)
{
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_broadcast(&w->work);
    pthread_mutex_unlock(&w->lock);
    while (w->nr_threads)
        pthread_join(w->threads[--w->nr_threads], NULL);
}

static void writer_free(struct snapfile_writer *w)
{
    for (struct job *job = w->spare, *next; job; job = next) {
        next = job->next;
        free(job->data);
        free(job);
    }
    if (w->fill) {
        free(w->fill->data);
        free(w->fill);
    }
    for (unsigned i = 0; i < SNAPFILE_SECTIONS; i++)
        free(w->sections[i]);
    if (w->fd >= 0)
        close(w->fd);
    snapfile_path_close(&w->place);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->work);
    pthread_cond_destroy(&w->done);
    free(w->seen);
    free(w->chunks);
    free(w->runs);
    free(w->path);
    free(w);
}

void snapfile_abort(struct snapfile_writer *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    if (!w->ret)
        w->ret = -ECANCELED; // what is queued need not be written
    pthread_mutex_unlock(&w->lock);
    workers_join(w);
    if (*w->temp)
        unlinkat(w->place.dir_fd, w->temp, 0);
    writer_free(w);
}

static int by_offset(const void *a, const void *b)
{
    const struct snapfile_chunk *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

static int by_page(const void *a, const void *b)
{
    const struct snapfile_run *x = a, *y = b;
    return (x->page > y->page) - (x->page < y->page);
}

// Runs in their order. Neighbours that are one run become one.
static void index_finish(struct snapfile_writer *w)
{
    if (w->nr_runs)
        qsort(w->runs, w->nr_runs, sizeof(w->runs[0]), by_page);
    if (w->header.layout == SNAPFILE_MAPPED && w->nr_chunks) {
        // Each run of data is one chunk: both are in the order of pages now.
        qsort(w->chunks, w->nr_chunks, sizeof(w->chunks[0]), by_offset);
        for (uint32_t i = 0, chunk = 0; i < w->nr_runs; i++)
            if (w->runs[i].chunk != RUN_ZERO)
                w->runs[i].chunk = chunk++;
    }
    uint32_t n = 0;
    for (uint32_t i = 0; i < w->nr_runs; i++) {
        struct snapfile_run *last = n ? &w->runs[n - 1] : NULL, run = w->runs[i];
        if (last && last->page + last->count == run.page && last->chunk == run.chunk &&
            (run.chunk == RUN_ZERO || last->slot + last->count == run.slot))
            last->count += run.count;
        else
            w->runs[n++] = run;
    }
    w->nr_runs = n;
}

static int section_write(struct snapfile_writer *w, uint32_t type, const void *data, size_t len,
                         uint64_t *at, struct error *err)
{
    struct snapfile_place *place = &w->header.sections[w->header.nr_sections++];
    *place = (struct snapfile_place) {type, crc32c(0, data, len), *at, len};
    *at += len;
    return write_at(w->fd, data, len, place->offset, err, w->path);
}

static int index_write(struct snapfile_writer *w, uint64_t *at, struct error *err)
{
    size_t chunks = w->nr_chunks * sizeof(w->chunks[0]), runs = w->nr_runs * sizeof(w->runs[0]);
    autofree uint8_t *index = malloc(chunks + runs + 1);
    if (!index)
        return error_set(err, -ENOMEM, "snapshot %s: no memory for its index", w->path);
    if (chunks)
        memcpy(index, w->chunks, chunks);
    if (runs)
        memcpy(index + chunks, w->runs, runs);
    return section_write(w, SNAPFILE_INDEX, index, chunks + runs, at, err);
}

static int file_finish(struct snapfile_writer *w, struct error *err)
{
    struct snapfile_header *h = &w->header;
    for (unsigned i = SNAPFILE_MACHINE; i <= SNAPFILE_STATE; i++)
        if (!w->sections[i])
            return error_set(err, -EINVAL, "snapshot %s: section %u is missing", w->path, i);
    index_finish(w);
    h->nr_chunks = w->nr_chunks;
    h->nr_runs = w->nr_runs;
    h->data_bytes =
        h->layout == SNAPFILE_MAPPED ? h->pages * PAGE_SIZE : w->data_end - h->data_offset;
    uint64_t at = h->data_offset + h->data_bytes;
    int ret = 0;
    for (unsigned i = 1; !ret && i < SNAPFILE_INDEX; i++)
        if (w->sections[i])
            ret = section_write(w, i, w->sections[i], w->section_len[i], &at, err);
    if (!ret)
        ret = index_write(w, &at, err);
    h->file_bytes = at;
    h->crc = snapfile_header_crc(h);
    return ret ? ret : write_at(w->fd, h, sizeof(*h), 0, err, w->path);
}

static int file_publish(struct snapfile_writer *w, struct error *err)
{
    if (fsync(w->fd))
        return error_errno(err, "snapshot %s: syncing", w->path);
    if (renameat(w->place.dir_fd, w->temp, w->place.dir_fd, w->place.name))
        return error_errno(err, "snapshot %s: renaming", w->path);
    w->temp[0] = 0;
    // Its name must survive a crash, too. Some file systems cannot sync directories.
    if (fsync(w->place.dir_fd) && errno != EINVAL)
        return error_errno(err, "snapshot %s: syncing its directory", w->path);
    return 0;
}

int snapfile_commit(struct snapfile_writer *w, struct snapfile_report *report, struct error *err)
{
    pthread_mutex_lock(&w->lock);
    job_queue(w);
    pthread_mutex_unlock(&w->lock);
    workers_join(w);
    int ret = failed(w, err);
    if (!ret)
        ret = file_finish(w, err);
    if (!ret)
        ret = file_publish(w, err);
    if (!ret && report) {
        const struct snapfile_header *h = &w->header;
        *report = (struct snapfile_report) {
            .data_pages = h->data_pages,
            .zero_pages = h->kind == SNAPFILE_FULL ? h->pages - h->data_pages : h->zero_pages,
            .chunks = h->nr_chunks,
            .lz4_chunks = w->lz4_chunks,
            .file_bytes = h->file_bytes,
            .stored_bytes =
                h->layout == SNAPFILE_MAPPED ? h->data_pages * PAGE_SIZE : h->data_bytes};
        memcpy(report->id, h->id, sizeof(h->id));
    }
    if (ret && *w->temp)
        unlinkat(w->place.dir_fd, w->temp, 0);
    writer_free(w);
    return ret;
}
