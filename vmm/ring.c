// SPDX-License-Identifier: Apache-2.0
#include "vmm/ring.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { RESTRICTIONS_MAX = 16 };

int ring_create(struct io_uring *ring, unsigned entries, unsigned completions)
{
    struct io_uring_params params = {.flags = IORING_SETUP_CQSIZE | IORING_SETUP_R_DISABLED,
                                     .cq_entries = completions};
    return io_uring_queue_init_params(entries, ring, &params);
}

// The shared library of liburing 2.3 does not export its functions for these two.
static int ring_register(struct io_uring *ring, unsigned opcode, void *arg, unsigned nr)
{
    return syscall(SYS_io_uring_register, ring->ring_fd, opcode, arg, nr) < 0 ? -errno : 0;
}

int ring_open(struct io_uring *ring, const uint8_t *ops, unsigned nr_ops, bool registered_only,
              struct error *err)
{
    struct io_uring_restriction list[RESTRICTIONS_MAX] = {0};
    unsigned nr = 0;
    if (nr_ops > RESTRICTIONS_MAX - 3)
        return error_set(err, -E2BIG, "io_uring: %u operations for one ring", nr_ops);
    for (unsigned i = 0; i < nr_ops; i++)
        list[nr++] =
            (struct io_uring_restriction) {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = ops[i]};
    list[nr++] = (struct io_uring_restriction) {.opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED,
                                                .sqe_flags = IOSQE_ASYNC | IOSQE_FIXED_FILE};
    list[nr++] = (struct io_uring_restriction) {.opcode = IORING_RESTRICTION_REGISTER_OP,
                                                .register_op = IORING_UNREGISTER_FILES};
    if (registered_only)
        list[nr++] = (struct io_uring_restriction) {.opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED,
                                                    .sqe_flags = IOSQE_FIXED_FILE};
    int ret = ring_register(ring, IORING_REGISTER_RESTRICTIONS, list, nr);
    if (!ret)
        ret = ring_register(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
    return ret < 0 ? error_set(err, ret, "io_uring restrictions: %s", strerror(-ret)) : 0;
}
