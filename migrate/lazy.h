// SPDX-License-Identifier: Apache-2.0
// Memory that comes from a snapshot file when it is touched, so that a guest runs at once.
//
//   LAZY_FAULT  userfaultfd: whoever touches a page waits until the stretch of pages around it has
//               been read, checked against its sum, unpacked and placed (64 pages at most). Any
//               layout, any chain. The pages of the last restore's first seconds (FILE.ws) are
//               fetched ahead, in their order; after those seconds all the rest is, and the file is
//               closed.
//   LAZY_MAP    private mappings of the file: the host's page cache is the guest's memory until it
//               writes, shared by all guests of the file. MAPPED layouts; no sum is checked then
//               (`ferry snapshot verify` does); the file must not be changed while a guest uses it.
//
// A chunk that turns out to be damaged stops the VM: `failed` is called, nobody ever gets its
// bytes, and who waits for them is sent away (vCPUs by the stop, system calls with EFAULT; a thread
// of the VMM with SIGBUS).
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "migrate/snapfile.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/ram.h"
#include "vmm/seccomp.h"

enum lazy_mode { LAZY_NONE, LAZY_FAULT, LAZY_MAP };

struct lazy_params {
    const char *path;      // of the snapshot: FILE.ws lies beside it
    unsigned record_ms;    // first touches are recorded for so long, then the rest is fetched
    bool prefetch;         // use FILE.ws
    bool fill;             // fetch the rest; without it only lazy_complete does
    const struct log *log; // may be NULL
    // A page cannot be had. Called once, in a thread of lazy's; must not wait for vCPUs.
    void (*failed)(void *context, const struct error *err);
    void *context;
    enum seccomp_mode seccomp; // of the threads; SECCOMP_OFF unless set
};
void lazy_params_default(struct lazy_params *params, const char *path);

struct lazy_counts {
    uint64_t faults;   // first touches that waited
    uint64_t by_fault; // pages placed for them
    uint64_t ahead;    // pages placed before anybody asked
    uint64_t recorded; // entries of the working set that was read
    bool complete;
    uint64_t worst_ns; // the longest fault, from its report to its end
};

struct lazy;

// Takes over `ram` (which must not have been touched, or is dropped) and, on success, `f`.
int lazy_create(struct lazy **lz, struct ram *ram, struct snapfile *f,
                const struct lazy_params *params, struct error *err);
// Fetches all that is missing and returns when guest memory is ordinary memory again: for those who
// need it so (a snapshot, a migration). The guest may run. Any thread.
int lazy_complete(struct lazy *lz, struct error *err);
void lazy_counts(struct lazy *lz, struct lazy_counts *counts);
// Nobody may touch guest memory any more, unless the load was complete. NULL is fine. Saves
// FILE.ws.
void lazy_free(struct lazy *lz);

// LAZY_MAP. -EOPNOTSUPP: a packed file, or memory that is shared. The file stays open.
int lazy_map(struct ram *ram, const struct snapfile *f, struct error *err);
