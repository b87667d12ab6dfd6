// SPDX-License-Identifier: Apache-2.0
#include "devices/vsock_flow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint32_t smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static void ring_put(struct vsock_flow *f, const uint8_t *data, uint32_t len)
{
    uint32_t at = (uint32_t)(((uint64_t)f->head + flow_buffered(f)) % f->window);
    uint32_t first = smaller(len, f->window - at);
    memcpy(f->data + at, data, first);
    memcpy(f->data, data + first, len - first);
    f->received += len;
}

int flow_append(struct vsock_flow *f, const struct iovec *iov, unsigned n, uint32_t len)
{
    if (!len)
        return 0;
    if (!f->data)
        f->data = malloc(f->window);
    if (!f->data)
        return -ENOMEM;
    for (unsigned i = 0; i < n && len; i++) {
        uint32_t take = iov[i].iov_len < len ? (uint32_t)iov[i].iov_len : len;
        ring_put(f, iov[i].iov_base, take);
        len -= take;
    }
    return 0;
}

unsigned flow_buffer(const struct vsock_flow *f, struct iovec iov[2])
{
    uint32_t used = flow_buffered(f);
    if (!used)
        return 0;
    uint32_t first = smaller(used, f->window - f->head);
    iov[0] = (struct iovec) {f->data + f->head, first};
    iov[1] = (struct iovec) {f->data, used - first};
    return first < used ? 2 : 1;
}

void flow_forward(struct vsock_flow *f, uint32_t len)
{
    if (!len)
        return;
    f->head = (uint32_t)(((uint64_t)f->head + len) % f->window);
    f->forwarded += len;
    if (!flow_buffered(f)) {
        free(f->data);
        f->data = NULL;
        f->head = 0;
    }
}
