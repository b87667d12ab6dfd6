// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_blk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include "vmm/util.h"
#include "vmm/vm.h"

enum { QUEUE_SIZE = 256, RING_ENTRIES = 256 };
enum { FILE_CACHED, FILE_DIRECT }; // indexes of the registered files

// 5.2.3, 5.2.6
#define F_SEG_MAX      (1ull << 2)
#define F_RO           (1ull << 5)
#define F_BLK_SIZE     (1ull << 6)
#define F_FLUSH        (1ull << 9)
#define F_MQ           (1ull << 12)
#define F_DISCARD      (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK, S_IOERR, S_UNSUPP };
enum { ZEROES_UNMAP = 1 }; // flag of a discard or write-zeroes segment

struct header { // 5.2.6
    uint32_t type, reserved;
    uint64_t sector;
};

struct range_segment {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct __attribute__((packed)) blk_space { // config space, 5.2.4
    uint64_t capacity;                     // sectors
    uint32_t size_max, seg_max;
    uint16_t cylinders;
    uint8_t heads, sectors;
    uint32_t blk_size;
    uint8_t physical_exp, alignment_offset;
    uint16_t min_io;
    uint32_t opt_io;
    uint8_t writeback, unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors, max_discard_seg, discard_alignment;
    uint32_t max_zeroes_sectors, max_zeroes_seg;
    uint8_t zeroes_may_unmap, unused1[3];
};
_Static_assert(sizeof(struct blk_space) == 60, "5.2.4");

enum {
    ZERO_CHUNK = 64 * 1024, // bytes of zeroes that writes without hole punching repeat
    RANGE_MAX = ZERO_CHUNK / BLK_SECTOR * VQ_SEGMENTS_MAX, // sectors of a discard or write-zeroes
};
static const uint8_t zeroes[ZERO_CHUNK];

struct request {
    struct request *next; // free list
    unsigned queue;
    uint32_t type;
    bool direct, write_zeroes_by_hand;
    uint32_t range_flags;
    uint64_t offset, len; // bytes in the image
    uint64_t done;        // bytes transferred so far
    unsigned nr_iov;
    struct virtqueue_chain chain;
    struct iovec iov[VQ_SEGMENTS_MAX];
};

struct virtio_blk {
    struct virtio v; // first
    struct virtio_blk_config config;
    int fd, direct_fd;     // direct_fd -1: page cache only
    uint32_t memory_align; // of O_DIRECT, bytes
    uint32_t offset_align;
    uint64_t capacity; // bytes, a multiple of BLK_SECTOR
    struct io_uring ring;
    bool ring_up;
    struct virtio_bell *completion;
    struct request *pool, *free;
    size_t fresh; // pool entries never used so far
    unsigned in_flight;
    bool lost;            // the image belongs to somebody else
    uint8_t flush_failed; // see the header
    uint32_t touched;     // queues with completions not yet signalled, a bit each
    uint8_t serial[BLK_SERIAL_MAX];
};

static struct virtio_blk *blk_of(struct virtio *v)
{
    return container_of(v, struct virtio_blk, v);
}

// --- ends of a request

// The device may not know how much of the data arrived before an error; then all of it counts as
// written for the dirty log.
static void request_end(struct virtio_blk *b, struct request *r, uint8_t status)
{
    struct virtqueue_chain *c = &r->chain;
    uint64_t data = c->in_len - 1;
    if (r->type == T_IN && status != S_OK)
        chain_mark_dirty(&b->v.dev.vm->ram, c, 0, data);
    chain_write(&b->v.dev.vm->ram, c, data, &status, 1);
    uint64_t written = (r->type == T_IN || r->type == T_GET_ID) && status == S_OK ? c->in_len : 1;
    if (data && status != S_OK)
        written = 0; // none from the start on, as 2.7.8.2 wants it counted
    virtio_push(&b->v, r->queue, c, written > UINT32_MAX ? UINT32_MAX : (uint32_t)written);
    b->touched |= 1u << r->queue;
    r->next = b->free;
    b->free = r;
}

static void io_error(struct virtio_blk *b, const struct request *r, int error)
{
    log_limited(&b->v.dev.vm->log, &b->v.limit, LOG_WARN,
                "%s[%u]: %s: request type %u at byte %llu: %s", b->v.dev.class->name,
                b->v.dev.instance, b->config.path, r->type, (unsigned long long)r->offset,
                error ? strerror(error) : "the image ends before its size");
}

// --- io_uring

static struct io_uring_sqe *sqe_get(struct virtio_blk *b)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&b->ring);
    while (!sqe) { // as many entries as the kernel takes make room
        io_uring_submit(&b->ring);
        sqe = io_uring_get_sqe(&b->ring);
    }
    return sqe;
}

static void zeroes_iov(struct request *r)
{
    uint64_t left = r->len - r->done;
    for (r->nr_iov = 0; left && r->nr_iov < VQ_SEGMENTS_MAX; r->nr_iov++) {
        size_t take = left < ZERO_CHUNK ? (size_t)left : ZERO_CHUNK;
        r->iov[r->nr_iov] = (struct iovec) {(void *)zeroes, take};
        left -= take;
    }
}

// Punching keeps the size, and reads give zeroes afterwards. Without leave to unmap, the space
// stays.
static int range_mode(const struct request *r)
{
    bool unmap = r->type == T_DISCARD || r->range_flags & ZEROES_UNMAP;
    return FALLOC_FL_KEEP_SIZE | (unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
}

static void request_submit(struct virtio_blk *b, struct request *r)
{
    struct io_uring_sqe *sqe = sqe_get(b);
    int file = r->direct ? FILE_DIRECT : FILE_CACHED;
    if (r->write_zeroes_by_hand) {
        zeroes_iov(r);
        io_uring_prep_writev(sqe, file, r->iov, r->nr_iov, r->offset + r->done);
    } else if (r->type == T_IN || r->type == T_OUT) {
        bool in = r->type == T_IN;
        uint64_t from = r->done + (in ? 0 : sizeof(struct header));
        r->nr_iov = chain_slice(&r->chain, in, from, r->len - r->done, r->iov);
        if (in)
            io_uring_prep_readv(sqe, file, r->iov, r->nr_iov, r->offset + r->done);
        else
            io_uring_prep_writev(sqe, file, r->iov, r->nr_iov, r->offset + r->done);
    } else if (r->type == T_FLUSH) {
        io_uring_prep_fsync(sqe, file, IORING_FSYNC_DATASYNC);
    } else {
        io_uring_prep_fallocate(sqe, file, range_mode(r), (off_t)r->offset, (off_t)r->len);
    }
    sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, r);
}

static bool transfers(const struct request *r)
{
    return r->type == T_IN || r->type == T_OUT || r->write_zeroes_by_hand;
}

// True: what is left of the request was submitted again.
static bool request_again(struct virtio_blk *b, struct request *r, int res)
{
    if (res == -EINTR || res == -EAGAIN) {
        request_submit(b, r);
        return true;
    }
    if (res == -EINVAL && r->direct) { // a stricter alignment than we were told
        r->direct = false;
        request_submit(b, r);
        return true;
    }
    if (res == -EOPNOTSUPP && r->type == T_WRITE_ZEROES && !r->write_zeroes_by_hand) {
        r->write_zeroes_by_hand = true;
        request_submit(b, r);
        return true;
    }
    if (transfers(r) && res > 0 && r->done + (uint64_t)res < r->len) {
        r->done += (uint64_t)res;
        r->direct = false; // the rest may not be aligned
        request_submit(b, r);
        return true;
    }
    return false;
}

static void request_completed(struct virtio_blk *b, struct request *r, int res)
{
    if (request_again(b, r, res))
        return;
    b->in_flight--;
    uint8_t status = S_OK;
    if (r->type == T_FLUSH && res < 0)
        b->flush_failed = true;
    if (r->type == T_DISCARD && res == -EOPNOTSUPP) {
        status = S_UNSUPP;
    } else if (res < 0 || (transfers(r) && !res)) {
        io_error(b, r, -res);
        status = S_IOERR;
    }
    request_end(b, r, status);
}

static void signal_touched(struct virtio_blk *b)
{
    for (unsigned q = 0; b->touched; q++, b->touched >>= 1)
        if (b->touched & 1)
            virtio_signal(&b->v, q);
}

static void reap(struct virtio_blk *b)
{
    struct io_uring_cqe *cqe;
    while (!io_uring_peek_cqe(&b->ring, &cqe)) {
        struct request *r = io_uring_cqe_get_data(cqe);
        int res = cqe->res;
        io_uring_cqe_seen(&b->ring, cqe);
        request_completed(b, r, res);
    }
}

// Submits, and takes what was there at once (the page cache had it). The event that announces
// completions is off meanwhile: it would only wake the loop for what is already done.
static void submit(struct virtio_blk *b)
{
    io_uring_cq_eventfd_toggle(&b->ring, false);
    while (io_uring_sq_ready(&b->ring) && io_uring_submit(&b->ring) > 0)
        reap(b); // which may submit what is left of a request
    io_uring_cq_eventfd_toggle(&b->ring, true);
    reap(b); // what came before the event was on again
    signal_touched(b);
}

static void completed(struct virtio *v, struct virtio_bell *bell)
{
    struct virtio_blk *b = blk_of(v);
    uint64_t count;
    if (read(bell->fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return;
    reap(b);
    submit(b);
}

static void blk_drain(struct virtio *v)
{
    struct virtio_blk *b = blk_of(v);
    while (b->in_flight) {
        io_uring_submit_and_wait(&b->ring, 1);
        reap(b);
    }
    if (b->ring_up)
        signal_touched(b);
}

// --- beginnings of a request

static bool aligned(const struct virtio_blk *b, const struct request *r)
{
    uint32_t memory = b->memory_align - 1, offset = b->offset_align - 1;
    if ((r->offset | r->len) & offset)
        return false;
    bool in = r->type == T_IN;
    const struct virtqueue_chain *c = &r->chain;
    struct iovec iov[VQ_SEGMENTS_MAX];
    unsigned n = chain_slice(c, in, in ? 0 : sizeof(struct header), r->len, iov);
    for (unsigned i = 0; i < n; i++)
        if (((uintptr_t)iov[i].iov_base & memory) || (iov[i].iov_len & offset))
            return false;
    return true;
}

// [sector, sector + sectors) within the disk, whatever they are.
static bool range_set(const struct virtio_blk *b, struct request *r, uint64_t sector,
                      uint64_t sectors)
{
    if (!sectors || !range_within(sector, sectors, b->capacity / BLK_SECTOR))
        return false;
    r->offset = sector * BLK_SECTOR;
    r->len = sectors * BLK_SECTOR;
    return true;
}

enum { STARTED = -1 }; // beside the S_ values: the answer comes later

static int start(struct virtio_blk *b, struct request *r)
{
    b->in_flight++;
    request_submit(b, r);
    return STARTED;
}

static int transfer(struct virtio_blk *b, struct request *r, uint64_t sector)
{
    bool in = r->type == T_IN;
    uint64_t len = in ? r->chain.in_len - 1 : r->chain.out_len - sizeof(struct header);
    if (len % BLK_SECTOR || !range_set(b, r, sector, len / BLK_SECTOR))
        return S_IOERR;
    if (!in && b->config.read_only)
        return S_IOERR;
    r->direct = b->direct_fd >= 0 && aligned(b, r);
    return start(b, r);
}

static int range_request(struct virtio_blk *b, struct request *r)
{
    struct range_segment s;
    if (b->config.read_only)
        return S_IOERR;
    if (r->chain.out_len != sizeof(struct header) + sizeof(s)) // we take one segment
        return S_IOERR;
    chain_read(&r->chain, sizeof(struct header), &s, sizeof(s));
    uint32_t known = r->type == T_WRITE_ZEROES ? ZEROES_UNMAP : 0;
    if (s.flags & ~known)
        return S_UNSUPP; // 5.2.6.2
    if (s.sectors > RANGE_MAX || !range_set(b, r, s.sector, s.sectors))
        return S_IOERR;
    r->range_flags = s.flags;
    return start(b, r);
}

static int id_request(struct virtio_blk *b, struct request *r)
{
    if (r->chain.in_len - 1 != BLK_SERIAL_MAX)
        return S_IOERR;
    chain_write(&b->v.dev.vm->ram, &r->chain, 0, b->serial, BLK_SERIAL_MAX);
    return S_OK;
}

static int request_begin(struct virtio_blk *b, struct request *r, const struct header *h)
{
    if (b->lost)
        return S_IOERR;
    switch (h->type) {
    case T_IN:
    case T_OUT:
        return transfer(b, r, h->sector);
    case T_FLUSH:
        return b->flush_failed ? S_IOERR : start(b, r);
    case T_GET_ID:
        return id_request(b, r);
    case T_DISCARD:
    case T_WRITE_ZEROES:
        return range_request(b, r);
    default:
        return S_UNSUPP;
    }
}

// The walker never has more in flight than the rings' entries, so the pool cannot run dry.
static struct request *request_next_free(struct virtio_blk *b)
{
    if (!b->free)
        b->free = &b->pool[b->fresh++]; // its `next` is NULL
    return b->free;
}

static bool blk_run(struct virtio *v, unsigned queue)
{
    struct virtio_blk *b = blk_of(v);
    while (virtio_next(v, queue, &request_next_free(b)->chain)) {
        struct request *r = b->free;
        b->free = r->next;
        struct header h = {0};
        size_t got = chain_read(&r->chain, 0, &h, sizeof(h));
        r->queue = queue;
        r->type = h.type;
        r->direct = r->write_zeroes_by_hand = false;
        r->done = 0;
        if (got < sizeof(h) || !r->chain.in_len) {
            virtio_push(v, queue, &r->chain, 0);
            r->next = b->free;
            b->free = r;
            virtio_break(v, queue, "request without %s",
                         r->chain.in_len ? "header" : "status byte");
            break;
        }
        int status = request_begin(b, r, &h);
        if (status != STARTED)
            request_end(b, r, (uint8_t)status);
    }
    submit(b);
    return true;
}

static const struct virtio_ops blk_ops = {.id = VIRTIO_ID_BLK, .run = blk_run, .drain = blk_drain};

// --- the image

static struct flock image_lock(const struct virtio_blk *b)
{
    return (struct flock) {.l_type = b->config.read_only ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET};
}

static int image_busy(const struct virtio_blk *b, struct error *err)
{
    return error_set(err, -EBUSY, "%s: another VM uses it%s", b->config.path,
                     b->config.read_only ? " and writes to it" : "");
}

static int image_take(struct virtio_blk *b, struct error *err)
{
    struct flock lock = image_lock(b);
    if (!fcntl(b->fd, F_OFD_SETLK, &lock))
        return 0;
    if (errno == EAGAIN || errno == EACCES)
        return image_busy(b, err);
    return error_errno(err, "%s: cannot be locked", b->config.path);
}

static void image_give_up(struct virtio_blk *b)
{
    struct flock lock = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    fcntl(b->fd, F_OFD_SETLK, &lock);
}

static int image_free(struct virtio_blk *b, struct error *err)
{
    struct flock lock = image_lock(b);
    if (fcntl(b->fd, F_OFD_GETLK, &lock))
        return error_errno(err, "%s: cannot be locked", b->config.path);
    return lock.l_type == F_UNLCK ? 0 : image_busy(b, err);
}

static int image_size(struct virtio_blk *b, const struct stat *st, struct error *err)
{
    uint64_t bytes = (uint64_t)st->st_size;
    if (S_ISBLK(st->st_mode) && ioctl(b->fd, BLKGETSIZE64, &bytes))
        return error_errno(err, "%s: BLKGETSIZE64", b->config.path);
    if (!bytes || bytes % BLK_SECTOR)
        return error_set(err, -EINVAL, "%s: %llu bytes: expected a multiple of %d, not 0",
                         b->config.path, (unsigned long long)bytes, BLK_SECTOR);
    b->capacity = bytes;
    return 0;
}

// Alignment that O_DIRECT asks for; where the kernel does not tell, a page, which suits every disk.
static void direct_open(struct virtio_blk *b, int mode)
{
    struct statx sx;
    b->memory_align = b->offset_align = PAGE_SIZE;
    b->direct_fd = b->config.cached ? -1 : open(b->config.path, mode | O_DIRECT | O_CLOEXEC);
    if (b->direct_fd < 0)
        return;
#ifdef STATX_DIOALIGN
    if (!statx(b->direct_fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) &&
        sx.stx_mask & STATX_DIOALIGN && sx.stx_dio_mem_align && sx.stx_dio_offset_align) {
        b->memory_align = sx.stx_dio_mem_align;
        b->offset_align = sx.stx_dio_offset_align;
    }
#else
    (void)sx;
#endif
}

static int image_open(struct virtio_blk *b, struct error *err)
{
    int mode = b->config.read_only ? O_RDONLY : O_RDWR;
    struct stat st, direct;
    // Never waits, whatever stands at that name.
    b->fd = open(b->config.path, mode | O_CLOEXEC | O_NONBLOCK);
    if (b->fd < 0 || fstat(b->fd, &st))
        return error_errno(err, "%s", b->config.path);
    fcntl(b->fd, F_SETFL, mode); // io_uring would take O_NONBLOCK as a wish for EAGAIN
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return error_set(err, -EINVAL, "%s: expected a file or a block device", b->config.path);
    int ret = image_size(b, &st, err);
    if (!ret && !b->config.attach.arrives)
        ret = image_take(b, err);
    if (ret)
        return ret;
    direct_open(b, mode);
    if (b->direct_fd >= 0 &&
        (fstat(b->direct_fd, &direct) || direct.st_ino != st.st_ino || direct.st_dev != st.st_dev))
        return error_set(err, -EBUSY, "%s: replaced by another file just now", b->config.path);
    return 0;
}

static int ring_create(struct virtio_blk *b, struct error *err)
{
    // Room for the completions of all that can be in flight: they never overflow.
    struct io_uring_params params = {.flags = IORING_SETUP_CQSIZE,
                                     .cq_entries = 2 * RING_ENTRIES * b->config.queues};
    int ret = io_uring_queue_init_params(RING_ENTRIES, &b->ring, &params);
    if (ret)
        return error_set(err, ret, "io_uring_setup: %s", strerror(-ret));
    b->ring_up = true;
    const int files[] = {
        [FILE_CACHED] = b->fd, [FILE_DIRECT] = b->direct_fd >= 0 ? b->direct_fd : b->fd};
    ret = io_uring_register_files(&b->ring, files, ARRAY_SIZE(files));
    if (ret)
        return error_set(err, ret, "io_uring_register_files: %s", strerror(-ret));
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "eventfd");
    b->completion = virtio_bell_new(&b->v, fd, 0, completed, err); // closes fd from here on
    if (!b->completion)
        return -ENOMEM;
    ret = io_uring_register_eventfd(&b->ring, fd);
    return ret ? error_set(err, ret, "io_uring_register_eventfd: %s", strerror(-ret)) : 0;
}

static int pool_create(struct virtio_blk *b, struct error *err)
{
    size_t n = (size_t)b->config.queues * QUEUE_SIZE + 1; // one to look with
    b->pool = calloc(n, sizeof(*b->pool)); // memory is used as far as request_next_free goes
    if (!b->pool)
        return error_set(err, -ENOMEM, "no memory for %zu requests", n);
    return 0;
}

static uint64_t space_fill(struct virtio_blk *b)
{
    struct blk_space s = {.capacity = b->capacity / BLK_SECTOR,
                          .seg_max = VQ_SEGMENTS_MAX / 2,
                          .blk_size = BLK_SECTOR,
                          .num_queues = (uint16_t)b->config.queues};
    uint64_t features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_MQ;
    if (b->config.read_only) {
        features |= F_RO;
    } else {
        features |= F_DISCARD | F_WRITE_ZEROES;
        s.max_discard_sectors = s.max_zeroes_sectors = RANGE_MAX;
        s.max_discard_seg = s.max_zeroes_seg = 1;
        s.discard_alignment = PAGE_SIZE / BLK_SECTOR;
        s.zeroes_may_unmap = 1;
    }
    memcpy(b->v.config, &s, sizeof(s));
    return features;
}

// --- life

static void blk_close(struct virtio_blk *b)
{
    virtio_bell_close(b->completion);
    if (b->ring_up)
        io_uring_queue_exit(&b->ring);
    if (b->fd >= 0)
        close(b->fd);
    if (b->direct_fd >= 0)
        close(b->direct_fd);
    free(b->pool);
}

static int blk_realize(struct device *dev, const void *config, struct error *err)
{
    struct virtio_blk *b = container_of(dev, struct virtio_blk, v.dev);
    b->config = *(const struct virtio_blk_config *)config;
    b->fd = b->direct_fd = -1;
    if (!b->config.queues)
        b->config.queues = 1;
    memcpy(b->serial, b->config.serial, strnlen(b->config.serial, BLK_SERIAL_MAX));
    int ret = image_open(b, err);
    if (!ret)
        ret = pool_create(b, err);
    if (!ret)
        ret = ring_create(b, err);
    const struct virtio_setup setup = {.ops = &blk_ops,
                                       .attach = &b->config.attach,
                                       .features = ret ? 0 : space_fill(b),
                                       .nr_queues = b->config.queues,
                                       .queue_size = QUEUE_SIZE,
                                       .config_len = sizeof(struct blk_space)};
    if (!ret)
        ret = virtio_realize(&b->v, &setup, err);
    if (ret)
        blk_close(b);
    return ret;
}

static void blk_unrealize(struct device *dev)
{
    struct virtio_blk *b = container_of(dev, struct virtio_blk, v.dev);
    virtio_unrealize(&b->v);
    blk_close(b);
}

static void blk_resume(struct device *dev)
{
    struct virtio_blk *b = container_of(dev, struct virtio_blk, v.dev);
    struct error err;
    pthread_mutex_lock(&dev->lock);
    b->lost = image_take(b, &err); // ours already, unless it was given up to save
    if (b->lost)
        log_write(&dev->vm->log, LOG_ERROR, "%s; the guest gets errors from now on", err.text);
    pthread_mutex_unlock(&dev->lock);
    virtio_resume(dev);
}

static const struct state_field blk_fields[] = {
    VIRTIO_STATE_FIELDS(struct virtio_blk),
    STATE_FIELD_INT(struct virtio_blk, capacity, 1),
    STATE_FIELD_BYTES(struct virtio_blk, serial, 1),
    STATE_FIELD_INT(struct virtio_blk, flush_failed, 1),
};

static int blk_save(void *object, struct error *err)
{
    struct virtio_blk *b = object;
    int ret = virtio_save(&b->v, err);
    if (!ret)
        image_give_up(b); // see the header
    return ret;
}

static int blk_load(void *object, uint16_t version, struct error *err)
{
    struct virtio_blk *b = object;
    uint64_t saved = b->capacity;
    struct stat st;
    if (fstat(b->fd, &st))
        return error_errno(err, "%s", b->config.path);
    int ret = image_size(b, &st, err);
    if (!ret && saved != b->capacity)
        ret = error_set(err, -EINVAL, "%s has %llu bytes, the disk that was saved had %llu",
                        b->config.path, (unsigned long long)b->capacity, (unsigned long long)saved);
    if (!ret)
        ret = image_free(b, err); // a migration's source has given it up; it is taken on resume
    return ret ? ret : virtio_load(&b->v, version, err);
}

static const struct state_table blk_state = {
    .name = "virtio-blk",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(blk_fields),
    .fields = blk_fields,
    .save = blk_save,
    .load = blk_load,
};

const struct device_class virtio_blk_class = {
    .name = "virtio-blk",
    .size = sizeof(struct virtio_blk),
    .realize = blk_realize,
    .reset = virtio_device_reset,
    .quiesce = virtio_quiesce,
    .resume = blk_resume,
    .unrealize = blk_unrealize,
    .state = &blk_state,
};

// --- the option's text

static int word_parse(const char *word, size_t len, struct virtio_blk_config *c, struct error *err)
{
    static const char serial[] = "serial=", queues[] = "queues=";
    if (len == 2 && !memcmp(word, "ro", 2)) {
        c->read_only = true;
    } else if (len == 6 && !memcmp(word, "cached", 6)) {
        c->cached = true;
    } else if (len == 6 && !memcmp(word, "packed", 6)) {
        c->attach.packed = true;
    } else if (len >= strlen(serial) && !memcmp(word, serial, strlen(serial))) {
        len -= strlen(serial);
        if (!len || len > BLK_SERIAL_MAX)
            return error_set(err, -EINVAL, "serial of %zu bytes: expected 1 to %d", len,
                             BLK_SERIAL_MAX);
        memcpy(c->serial, word + strlen(serial), len);
        c->serial[len] = 0;
    } else if (len > strlen(queues) && !memcmp(word, queues, strlen(queues))) {
        char *end;
        unsigned long n = strtoul(word + strlen(queues), &end, 10);
        if (end != word + len || word[strlen(queues)] < '0' || word[strlen(queues)] > '9' || !n ||
            n > BLK_QUEUES_MAX)
            return error_set(err, -EINVAL, "'%.*s': expected 1 to %d queues", (int)len, word,
                             BLK_QUEUES_MAX);
        c->queues = (unsigned)n;
    } else {
        return error_set(err, -EINVAL,
                         "'%.*s': expected ro, serial=TEXT, queues=N, cached or packed", (int)len,
                         word);
    }
    return 0;
}

int virtio_blk_parse(const char *text, struct virtio_blk_config *c, struct error *err)
{
    *c = (struct virtio_blk_config) {.queues = 1};
    size_t len = strcspn(text, ",");
    if (!len || len >= sizeof(c->path))
        return error_set(err, -EINVAL, "'%.60s': expected the name of a file, at most %zu bytes",
                         text, sizeof(c->path) - 1);
    memcpy(c->path, text, len);
    int ret = 0;
    for (text += len; *text == ',' && !ret; text += len) {
        text++;
        len = strcspn(text, ",");
        ret = word_parse(text, len, c, err);
    }
    return ret;
}
