// SPDX-License-Identifier: Apache-2.0
// Userfaultfd in the small: an fd that sees guest memory's users in the kernel, too (KVM,
// io_uring), and the calls on it with their retries. ioctl_userfaultfd(2).
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"

// Opens one with `features` (UFFD_FEATURE_*). -EPERM: not allowed here; -EOPNOTSUPP: the kernel
// lacks a feature. `who` begins the message.
int uffd_open(int *fd, const char *who, uint64_t features, struct error *err);
// `mode`: UFFDIO_REGISTER_MODE_*; `need`: bits 1 << _UFFDIO_* that must work there (-EOPNOTSUPP).
int uffd_register(int fd, const void *start, uint64_t len, uint64_t mode, uint64_t need,
                  struct error *err);
// Ends that, wakes whoever waits and takes the protection away.
void uffd_unregister(int fd, const void *start, uint64_t len);

int uffd_protect(int fd, const void *start, uint64_t len, struct error *err);
int uffd_unprotect(int fd, const void *start, uint64_t len, struct error *err); // wakes
// Puts `len` bytes where nothing is; where something is already, that stays. Wakes.
int uffd_copy(int fd, void *to, const void *from, uint64_t len, struct error *err);
int uffd_zero(int fd, void *start, uint64_t len, struct error *err);
