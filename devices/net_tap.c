// SPDX-License-Identifier: Apache-2.0
// Frames through /dev/net/tun. One read or write moves one frame between the kernel and the guest's
// buffers, with nothing in between.
#include "devices/net_backend.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vmm/util.h"

struct net_tap {
    struct net_backend b; // first
    char name[IFNAMSIZ];  // "": given as an open file, which cannot be opened again
};

static struct net_tap *tap_of(struct net_backend *b)
{
    return container_of(b, struct net_tap, b);
}

bool net_lost(ssize_t result)
{
    // EBADFD: the interface was deleted; EPIPE and its kin: the peer of a socket closed.
    return result == -EBADFD || result == -EBADF || result == -ENODEV || result == -EPIPE ||
           result == -ECONNRESET || result == -ECONNREFUSED || result == -ENOTCONN;
}

static ssize_t tap_send(struct net_backend *b, unsigned pair, const struct iovec *iov, unsigned n)
{
    ssize_t done = writev(b->fds[pair], iov, (int)n);
    return done < 0 ? -errno : done;
}

static ssize_t tap_receive(struct net_backend *b, unsigned pair, const struct iovec *iov,
                           unsigned n)
{
    ssize_t done = readv(b->fds[pair], iov, (int)n);
    if (!done)
        return -EPIPE; // a socket's peer closed
    return done < 0 ? -errno : done;
}

static void tap_close(struct net_backend *b)
{
    for (unsigned i = 0; i < b->pairs; i++) {
        if (b->fds[i] >= 0)
            close(b->fds[i]);
        b->fds[i] = -1;
    }
}

static void tap_free(struct net_backend *b)
{
    free(tap_of(b));
}

static int tap_offload(struct net_backend *b, unsigned takes)
{
    unsigned flags = 0;
    if (takes & NET_TAKES_CSUM) { // segments need checksums
        flags |= TUN_F_CSUM;
        flags |= takes & NET_TAKES_TSO4 ? TUN_F_TSO4 : 0;
        flags |= takes & NET_TAKES_TSO6 ? TUN_F_TSO6 : 0;
        if (takes & NET_TAKES_ECN && takes & (NET_TAKES_TSO4 | NET_TAKES_TSO6))
            flags |= TUN_F_TSO_ECN;
    }
    return ioctl(b->fds[0], TUNSETOFFLOAD, (unsigned long)flags) ? -errno : 0;
}

static int tap_enable(struct net_backend *b, unsigned pair, bool on)
{
    struct ifreq req = {.ifr_flags = on ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE};
    // EINVAL: it is so already.
    return ioctl(b->fds[pair], TUNSETQUEUE, &req) && errno != EINVAL ? -errno : 0;
}

// --- opening

static int header_size_set(int fd, const char *name, struct error *err)
{
    int size = sizeof(struct net_header), little = 1;
    if (ioctl(fd, TUNSETVNETHDRSZ, &size) || ioctl(fd, TUNSETVNETLE, &little) ||
        ioctl(fd, TUNSETOFFLOAD, 0ul))
        return error_errno(err, "tap %s: setting its header", name);
    return 0;
}

static int queue_open(const struct net_tap *t, struct error *err)
{
    autoclose int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "/dev/net/tun");
    struct ifreq req = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    memcpy(req.ifr_name, t->name, sizeof(req.ifr_name));
    if (t->b.pairs > 1)
        req.ifr_flags |= IFF_MULTI_QUEUE;
    int ret = ioctl(fd, TUNSETIFF, &req) ? -errno : 0;
    if (ret == -EINVAL && t->b.pairs == 1) { // made for several queues: it insists on the flag
        req.ifr_flags |= IFF_MULTI_QUEUE;
        ret = ioctl(fd, TUNSETIFF, &req) ? -errno : 0;
    }
    if (ret == -EBUSY)
        return error_set(err, ret, "tap %s: another process uses it", t->name);
    if (ret == -EPERM)
        return error_set(err, ret,
                         "tap %s belongs to somebody else; `ip tuntap add %s mode tap user NAME` "
                         "makes one for NAME",
                         t->name, t->name);
    if (ret == -EINVAL)
        return error_set(err, ret,
                         "tap %s: not a tap device%s; `ip tuntap add NAME mode tap%s` makes one",
                         t->name, t->b.pairs > 1 ? " with several queues" : "",
                         t->b.pairs > 1 ? " multi_queue" : "");
    if (ret)
        return error_set(err, ret, "tap %s: %s", t->name, strerror(-ret));
    ret = header_size_set(fd, t->name, err);
    return ret ? ret : take_fd(&fd);
}

static uint16_t tap_mtu(const char *name)
{
    struct ifreq req = {0};
    autoclose int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    memcpy(req.ifr_name, name, sizeof(req.ifr_name));
    if (s < 0 || ioctl(s, SIOCGIFMTU, &req) || req.ifr_mtu < 68 || req.ifr_mtu > 65535)
        return 0;
    return (uint16_t)req.ifr_mtu;
}

static int tap_open(struct net_backend *b, struct error *err)
{
    struct net_tap *t = tap_of(b);
    if (!*t->name && b->fds[0] >= 0)
        return 0;
    if (!*t->name)
        return error_set(err, -ENODEV, "a tap that was given as an open file is gone for good");
    // TUNSETIFF would make a new one, connected to nothing.
    if (!if_nametoindex(t->name))
        return error_set(err, -ENODEV,
                         "tap %s: no such interface here; `ip tuntap add %s mode tap` makes it",
                         t->name, t->name);
    int ret = 0;
    for (unsigned i = 0; i < b->pairs && ret >= 0; i++) {
        ret = queue_open(t, err);
        b->fds[i] = ret >= 0 ? ret : -1;
    }
    for (unsigned i = 1; i < b->pairs && ret >= 0; i++)
        ret = tap_enable(b, i, false);
    if (ret < 0)
        tap_close(b);
    return ret < 0 ? ret : 0;
}

static const struct net_backend_ops tap_ops = {
    .name = "tap",
    .offloads = true,
    .open = tap_open,
    .close = tap_close,
    .free = tap_free,
    .send = tap_send,
    .receive = tap_receive,
    .offload = tap_offload,
    .enable = tap_enable,
};

static struct net_tap *tap_alloc(const struct net_backend_ops *ops, unsigned pairs,
                                 struct error *err)
{
    struct net_tap *t = calloc(1, sizeof(*t));
    if (!t) {
        error_set(err, -ENOMEM, "no memory for a tap");
        return NULL;
    }
    t->b.ops = ops;
    t->b.pairs = pairs;
    for (unsigned i = 0; i < NET_PAIRS_MAX; i++)
        t->b.fds[i] = -1;
    return t;
}

static int fd_check(int fd, struct error *err)
{
    struct ifreq req = {0};
    if (ioctl(fd, TUNGETIFF, &req))
        return error_errno(err, "tap-fd=%d: not a tap device", fd);
    if ((req.ifr_flags & (IFF_TAP | IFF_VNET_HDR | IFF_NO_PI)) !=
        (IFF_TAP | IFF_VNET_HDR | IFF_NO_PI))
        return error_set(err, -EINVAL,
                         "tap-fd=%d: flags 0x%x, expected IFF_TAP, IFF_NO_PI and IFF_VNET_HDR", fd,
                         (unsigned)req.ifr_flags);
    if (fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC))
        return error_errno(err, "tap-fd=%d", fd);
    return header_size_set(fd, req.ifr_name, err);
}

int net_tap_new(struct net_backend **out, const char *name, int fd, unsigned pairs,
                struct error *err)
{
    struct net_tap *t = tap_alloc(&tap_ops, pairs, err);
    if (!t)
        return -ENOMEM;
    if (name) {
        size_t len = strnlen(name, sizeof(t->name) - 1);
        memcpy(t->name, name, len);
        t->b.mtu = tap_mtu(t->name);
    } else {
        int ret = fd_check(fd, err);
        if (ret) {
            free(t);
            return ret;
        }
        t->b.fds[0] = fd;
    }
    *out = &t->b;
    return 0;
}

static int packets_open(struct net_backend *b, struct error *err)
{
    return b->fds[0] >= 0 ? 0 : error_set(err, -ENODEV, "the socket is closed");
}

static const struct net_backend_ops packets_ops = {
    .name = "packets",
    .offloads = true,
    .open = packets_open,
    .close = tap_close,
    .free = tap_free,
    .send = tap_send,
    .receive = tap_receive,
};

int net_packets_new(struct net_backend **out, const int *fds, unsigned pairs, struct error *err)
{
    struct net_tap *t = tap_alloc(&packets_ops, pairs, err);
    if (!t)
        return -ENOMEM;
    memcpy(t->b.fds, fds, pairs * sizeof(*fds));
    *out = &t->b;
    return 0;
}
