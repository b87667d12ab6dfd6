// SPDX-License-Identifier: Apache-2.0
// Userfaultfd in the small: an fd that sees guest memory's users in the kernel, too (KVM,
// io_uring), and the calls on it with their retries. ioctl_userfaultfd(2).
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/ram.h"

enum { UFFD_BATCH = 32 }; // faults taken from the kernel at once

// Opens one with `features` (UFFD_FEATURE_*). -EPERM: not allowed here; -EOPNOTSUPP: the kernel
// lacks a feature. `who` begins the message.
int uffd_open(int *fd, const char *who, uint64_t features, struct error *err);
// `mode`: UFFDIO_REGISTER_MODE_*; `need`: bits 1 << _UFFDIO_* that must work there (-EOPNOTSUPP).
int uffd_register(int fd, const void *start, uint64_t len, uint64_t mode, uint64_t need,
                  struct error *err);
// Ends that, wakes whoever waits and takes the protection away.
void uffd_unregister(int fd, const void *start, uint64_t len);

// The pages of guest memory that somebody waits for, those that have come in since the last call:
// `*nr` of them, maybe none.
int uffd_faults(int fd, const struct ram *ram, uint64_t pages[UFFD_BATCH], unsigned *nr,
                struct error *err);

int uffd_protect(int fd, const void *start, uint64_t len, struct error *err);
int uffd_unprotect(int fd, const void *start, uint64_t len, struct error *err); // wakes
// Puts `len` bytes where nothing is; where something is already, that stays. Wakes.
int uffd_copy(int fd, void *to, const void *from, uint64_t len, struct error *err);
int uffd_zero(int fd, void *start, uint64_t len, struct error *err);
// Shows what the file behind shared memory has there, whose pages are of `unit` bytes; where it is
// shown already, fine. Wakes. -EFAULT: the file has nothing there.
int uffd_continue(int fd, void *start, uint64_t len, uint64_t unit, struct error *err);
