// SPDX-License-Identifier: Apache-2.0
#include "devices/blk_image.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "vmm/util.h"

enum { PROBE_MAX = 4096 };

uint32_t blk_direct_probe(int direct_fd)
{
    void *buffer;
    uint32_t found = 0;
    if (posix_memalign(&buffer, 2 * PROBE_MAX, 2 * PROBE_MAX))
        return 0;
    for (uint32_t align = BLK_SECTOR; align <= PROBE_MAX && !found; align *= 2)
        // Its address and length are multiples of `align` and of nothing larger.
        if (pread(direct_fd, (uint8_t *)buffer + align, align, 0) > 0)
            found = align;
    free(buffer);
    return found;
}

static void direct_open(struct blk_image *i, int mode)
{
    struct statx sx;
    i->direct_fd = open(i->path, mode | O_DIRECT | O_CLOEXEC | O_NOCTTY);
    if (i->direct_fd < 0)
        return;
#ifdef STATX_DIOALIGN
    if (!statx(i->direct_fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) &&
        sx.stx_mask & STATX_DIOALIGN && sx.stx_dio_mem_align && sx.stx_dio_offset_align) {
        i->memory_align = sx.stx_dio_mem_align;
        i->offset_align = sx.stx_dio_offset_align;
        return;
    }
#else
    (void)sx;
#endif
    i->memory_align = i->offset_align = blk_direct_probe(i->direct_fd);
    if (!i->offset_align) { // an empty file, a file system without it
        close(i->direct_fd);
        i->direct_fd = -1;
    }
}

// FUSE (and who knows which others) accepts I/O that must not wait, and then waits for its server,
// or for others that wait for that.
static bool file_blocks(int fd)
{
    static const uint32_t good[] = {EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC,
                                    TMPFS_MAGIC, F2FS_SUPER_MAGIC};
    struct statfs fs;
    if (fstatfs(fd, &fs))
        return true;
    for (size_t i = 0; i < ARRAY_SIZE(good); i++)
        if ((uint32_t)fs.f_type == good[i])
            return false;
    return true;
}

static int image_open(struct blk_image *i, const struct blk_image_mode *mode, struct error *err)
{
    int how = mode->read_only ? O_RDONLY : O_RDWR;
    struct stat st, direct;
    // Never waits, whatever stands at that name.
    if (mode->fd)
        i->fd = fcntl(mode->fd, F_DUPFD_CLOEXEC, 0);
    else
        i->fd = open(i->path,
                     how | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (mode->create ? O_CREAT : 0), 0644);
    if (i->fd < 0 || fstat(i->fd, &st))
        return error_errno(err, "%s", i->path);
    fcntl(i->fd, F_SETFL, how); // io_uring would take O_NONBLOCK as a wish for EAGAIN
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return error_set(err, -EINVAL, "%s: expected a file or a block device", i->path);
    i->read_only = mode->read_only;
    i->block_device = S_ISBLK(st.st_mode);
    i->blocks = !i->block_device && file_blocks(i->fd);
    i->device = st.st_dev;
    i->inode = st.st_ino;
    if (!mode->cached && !mode->fd)
        direct_open(i, how);
    if (i->direct_fd >= 0 &&
        (fstat(i->direct_fd, &direct) || direct.st_ino != st.st_ino || direct.st_dev != st.st_dev))
        return error_set(err, -EBUSY, "%s: replaced by another file just now", i->path);
    return 0;
}

int blk_image_open(struct blk_image *i, const char *path, const struct blk_image_mode *mode,
                   struct error *err)
{
    *i = (struct blk_image) {.fd = -1, .direct_fd = -1};
    if (strlen(path) >= sizeof(i->path))
        return error_set(err, -ENAMETOOLONG, "'%.60s...': expected at most %zu bytes", path,
                         sizeof(i->path) - 1);
    strcpy(i->path, path);
    int ret = image_open(i, mode, err);
    if (ret)
        blk_image_close(i);
    return ret;
}

void blk_image_close(struct blk_image *i)
{
    if (!*i->path)
        return;
    if (i->fd >= 0)
        close(i->fd);
    if (i->direct_fd >= 0)
        close(i->direct_fd);
    *i = (struct blk_image) {.fd = -1, .direct_fd = -1};
}

// --- lock

// The image has two locks, each on half of all the bytes a file could have: who holds the first may
// use it, who holds the second has a claim to it.
#define LOCK_HALF (1ll << 62)

enum lock_part { LOCK_USE, LOCK_ALL };

static int lock_set(const struct blk_image *i, short type, enum lock_part part)
{
    struct flock lock = {
        .l_type = type, .l_whence = SEEK_SET, .l_len = part == LOCK_USE ? LOCK_HALF : 0};
    return fcntl(i->fd, F_OFD_SETLK, &lock) ? -errno : 0;
}

static int lock_result(const struct blk_image *i, int ret, struct error *err)
{
    if (ret == -EAGAIN || ret == -EACCES)
        return error_set(err, -EBUSY, "%s: another VM uses it%s", i->path,
                         i->read_only ? " and writes to it" : "");
    return ret ? error_set(err, ret, "%s: cannot be locked: %s", i->path, strerror(-ret)) : 0;
}

static short lock_type(const struct blk_image *i)
{
    return i->read_only ? F_RDLCK : F_WRLCK;
}

int blk_image_lock(struct blk_image *i, struct error *err)
{
    return lock_result(i, lock_set(i, lock_type(i), LOCK_ALL), err);
}

int blk_image_lock_lent(struct blk_image *i, struct error *err)
{
    if (!lock_set(i, lock_type(i), LOCK_ALL))
        return 0;
    return lock_result(i, lock_set(i, lock_type(i), LOCK_USE), err);
}

void blk_image_lend(struct blk_image *i)
{
    if (i->read_only)
        return;                     // readers share it as it is
    lock_set(i, F_WRLCK, LOCK_ALL); // whoever lent it to us may be gone by now
    lock_set(i, F_UNLCK, LOCK_USE);
}

void blk_image_unlock(struct blk_image *i)
{
    lock_set(i, F_UNLCK, LOCK_ALL);
}

// --- size

int blk_image_bytes(struct blk_image *i, uint64_t *bytes, struct error *err)
{
    struct stat st;
    if (fstat(i->fd, &st))
        return error_errno(err, "%s", i->path);
    *bytes = (uint64_t)st.st_size;
    if (i->block_device && ioctl(i->fd, BLKGETSIZE64, bytes))
        return error_errno(err, "%s: BLKGETSIZE64", i->path);
    return 0;
}

int blk_image_disk_size(struct blk_image *i, uint64_t *bytes, struct error *err)
{
    int ret = blk_image_bytes(i, bytes, err);
    if (!ret && (!*bytes || *bytes % BLK_SECTOR))
        ret = error_set(err, -EINVAL, "%s: %llu bytes: expected a multiple of %d, not 0", i->path,
                        (unsigned long long)*bytes, BLK_SECTOR);
    return ret;
}

int blk_image_truncate(struct blk_image *i, uint64_t bytes, struct error *err)
{
    if (i->block_device)
        return error_set(err, -EINVAL, "%s: a block device is resized by its owner", i->path);
    if (ftruncate(i->fd, (off_t)bytes))
        return error_errno(err, "%s: %llu bytes", i->path, (unsigned long long)bytes);
    return 0;
}
