// SPDX-License-Identifier: Apache-2.0
// The overlays that belong to a snapshot: copied as they are at its instant (`FILE.diskN`, a
// reflink where the file system can, else while the guest runs on), and copied once more for each
// guest that is made from it, so that every one writes to a file of its own. Bases are shared and
// never written.
//
// Works on the texts of --disk, in a JSON array: ["FILE,overlay=FILE,...", ...]. A VM whose names
// lead nowhere (in a jail) says {"text": "FILE,...", "fd": N} instead: its overlay, open for
// reading and writing. The section keeps them, too: [{"text": "FILE,overlay=FILE,...", "frozen":
// true}, ...].
#pragma once

#include <stdatomic.h>
#include <stddef.h>

#include "vmm/error.h"

struct vm;

// While the guest runs: has what the host keeps of the overlays in memory written out, so that less
// is left for the pause.
void disks_settle(struct vm *vm, const char *disks);
// Begins copies of the overlays of `disks`, as they are now, to `path`.diskN, N counting the disks.
// Those are good files: the state has been saved just before, with everything durable. -EINVAL: a
// disk that is written without an overlay. `*section` (malloc'd JSON text) is what SNAPFILE_DISKS
// holds; NULL: no disks. `vm` has the overlays; of one that it has not (or without a VM), the copy
// is made at once. After an error nothing is left.
struct disks_copies;
int disks_freeze(struct vm *vm, const char *disks, const char *path, char **section,
                 struct disks_copies **copies, struct error *err);
// Completes and syncs the copies, after the pause and before the snapshot is committed.
// -ECANCELED: `cancelled` (may be NULL) became true.
int disks_complete(struct disks_copies *copies, const char *section, const char *path,
                   const atomic_bool *cancelled, struct error *err);
// Always, and before the VM goes. NULL is fine.
void disks_copies_free(struct disks_copies *copies);
void disks_drop(const char *section, const char *path); // there is no snapshot: removes them
// Whether disks_freeze can do that at all, before anybody is paused.
int disks_check(const char *disks, struct error *err);

// Copies the frozen overlays of snapshot `path` to `path`.diskN.NAME; `*disks` (malloc'd) are the
// texts with those. The section names files of this host: only for a snapshot that the user trusts.
// Still, nothing but the copies will be written: -EBADMSG for a disk that is neither read-only nor
// frozen.
int disks_thaw(const void *section, size_t len, const char *path, const char *name, char **disks,
               struct error *err);

// Frozen overlays that go back into the overlays of a VM that is there. disks_back_open opens both
// sides of each and changes nothing: -EINVAL where `disks` (the VM's texts) are others.
// disks_back_copy: after an error an overlay may be half of each.
struct disks_back;
int disks_back_open(struct disks_back **back, const void *section, size_t len, const char *path,
                    const char *disks, struct error *err);
int disks_back_copy(const struct disks_back *back, struct error *err);
void disks_back_close(struct disks_back *back); // NULL is fine
