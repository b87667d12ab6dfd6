// SPDX-License-Identifier: Apache-2.0
// A byte stream: what state and memory are written to and read from (memory, file, socket).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "vmm/error.h"

struct stream {
    const char *name; // for messages: "snapshot file a.ferry", "migration stream"
    // All of `len` bytes or an error; -ENODATA when the stream ends early.
    int (*read)(struct stream *s, void *data, size_t len, struct error *err);
    int (*write)(struct stream *s, const void *data, size_t len, struct error *err);
};

int stream_read(struct stream *s, void *data, size_t len, struct error *err);
int stream_write(struct stream *s, const void *data, size_t len, struct error *err);

// Little-endian integers.
int stream_put(struct stream *s, uint64_t value, unsigned bytes, struct error *err);
int stream_get(struct stream *s, uint64_t *value, unsigned bytes, struct error *err);

// A growing buffer (write) or a bounded one (read).
struct stream_mem {
    struct stream stream;
    uint8_t *data;
    size_t len; // valid bytes
    size_t cap; // allocated bytes, 0 when the buffer is the caller's
    size_t pos; // next byte to read
    size_t max; // writing beyond this fails with -EFBIG
};

void stream_mem_writer(struct stream_mem *m, const char *name, size_t max);
void stream_mem_reader(struct stream_mem *m, const char *name, const void *data, size_t len);
void stream_mem_free(struct stream_mem *m); // what a writer allocated

// Straight on a file descriptor, unbuffered; the caller keeps the fd.
struct stream_fd {
    struct stream stream;
    int fd;
    uint64_t offset; // bytes so far, for messages
};

void stream_fd_init(struct stream_fd *f, const char *name, int fd);
