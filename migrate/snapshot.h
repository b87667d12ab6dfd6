// SPDX-License-Identifier: Apache-2.0
// A guest in a file (migrate/snapfile.h), whole or as what changed since another snapshot.
#pragma once

#include <stdatomic.h>
#include <stdint.h>

#include "migrate/lazy.h"
#include "migrate/migrate.h"
#include "migrate/snapfile.h"
#include "vmm/error.h"
#include "vmm/ram.h"

// What has been written since the last snapshot of a VM, so that a diff need not look at the rest.
// All zero: nothing is known. One snapshot at a time uses it.
struct snapshot_track {
    struct ram_dirty user;
    bool logging;
    uint64_t *dirty; // pages written since `path` was taken, as of the last sync; while logging
    char *path;      // the last snapshot, taken or restored; NULL: none
    uint8_t id[SNAPFILE_ID_LEN];
};

// The guest's memory is that of snapshot `path` now: the VM has been loaded from it and has not run
// yet, say. With `log`, what is written from here on is recorded (a first write to a page then
// costs a fault).
int snapshot_track_base(struct snapshot_track *t, struct vm *vm, const char *path,
                        const uint8_t id[SNAPFILE_ID_LEN], bool log, struct error *err);
// Before the VM goes. Harmless when nothing is tracked.
void snapshot_track_end(struct snapshot_track *t, struct vm *vm);

struct snapshot_report;

struct snapshot_params {
    const char *path;
    enum snapfile_layout layout;
    enum snapfile_compress compress;
    // A diff: what changed since `parent` (NULL: since the last snapshot), which may be any
    // snapshot of this machine in the same directory. If it is the last one and writes have been
    // recorded since, they say which pages are looked at; otherwise all are, and compared with the
    // parent's.
    bool diff;
    const char *parent;
    struct snapshot_track *track; // may be NULL
    bool log;                     // record writes from this instant on, for the next diff
    unsigned workers;             // as in snapfile_params
    // Copies the disks' overlays at the instant, too (migrate/disks.h); refused where a disk is
    // written without one. Otherwise the disks stay as they go on being.
    bool disks;
    // May be NULL: what else belongs to it, once the file is there and safe. An error is told as
    // the snapshot's, which stays.
    int (*taken)(void *context, const struct snapshot_report *report, struct error *err);
    void *taken_context;
};
// Full, packed, LZ4.
void snapshot_params_default(struct snapshot_params *params, const char *path);

struct snapshot_report {
    uint8_t id[SNAPFILE_ID_LEN];
    enum snapfile_kind kind;
    uint64_t data_pages, zero_pages;
    uint64_t file_bytes;   // apparent size of the file, without parents
    uint64_t stored_bytes; // page data in it
    uint64_t state_bytes;
    uint64_t pause_ns;    // the guest stood still (0 when it was paused before)
    bool live;            // it ran while its memory was written
    uint64_t aside_pages; // live: pages it wrote to meanwhile, before they were taken
    uint64_t fault_ns;    // live: what its vCPUs, all together, waited to write
    uint64_t total_ns;
    unsigned depth; // files in the chain
};

// Writes the guest to `params->path`: an older file of that name stays whole until the new one is.
// A running guest is paused for its state and for the write protection of what it has just written
// (migrate/capture.h) and runs while its memory is written; where the host cannot do that (or in a
// guest that is mapped from a file), it is paused until its memory is copied. It goes on whatever
// happens. `m` (may be NULL) gives progress and can cancel.
int snapshot_save(struct vm *vm, const struct snapshot_params *params,
                  const struct migrate_hooks *hooks, struct migration *m,
                  struct snapshot_report *report, struct error *err);

// Builds a VM from a snapshot and its parents; everything has been read and checked when it
// returns, and the guest stands paused: vm_resume lets it go on.
int snapshot_load(const char *path, const struct migrate_hooks *hooks, struct vm **vm,
                  struct snapshot_report *report, struct error *err);

struct snapshot_load_params {
    const char *path;
    enum lazy_mode mode;
    struct lazy_params lazy; // LAZY_FAULT: record_ms, prefetch, fill
    const char *name; // the new VM's, for its own copies of frozen overlays; NULL: the old disks
};

// As snapshot_load, with LAZY_FAULT or LAZY_MAP without its memory: headers, indexes, machine and
// state have been checked, pages are when they are touched (LAZY_MAP: never). LAZY_FAULT gives
// `*lazy`, which the caller frees after the VM's devices have been quiesced and before it destroys
// the VM; a page that cannot be had ends the VM with VM_STOP_ERROR.
int snapshot_load_as(const struct snapshot_load_params *params, const struct migrate_hooks *hooks,
                     struct vm **vm, struct lazy **lazy, struct snapshot_report *report,
                     struct error *err);

// Taking a VM back to a file of its own: the same VM, with nothing opened but that file, its
// parents and overlays. snapshot_back_open checks all that can be known without reading pages, and
// changes nothing: -EINVAL: another machine's file. snapshot_back_load, with the VM paused and
// nobody fetching its memory any more: after an error there is neither guest. snapshot_back_verify,
// in any thread, while the guest runs: reads and checks every page before.
//
// Loading in parts, for who must not stand still meanwhile: snapshot_back_clear, snapshot_back_fill
// (the long one: memory and overlays; in any thread), snapshot_back_state.
struct snapshot_back;
int snapshot_back_open(struct snapshot_back **back, const char *path, struct vm *vm,
                       const struct migrate_hooks *hooks, struct error *err);
int snapshot_back_verify(const struct snapshot_back *back, struct error *err);
int snapshot_back_load(struct snapshot_back *back, struct error *err);
int snapshot_back_clear(struct snapshot_back *back, struct error *err);
int snapshot_back_fill(struct snapshot_back *back, struct error *err);
int snapshot_back_state(struct snapshot_back *back, struct error *err);
void snapshot_back_close(struct snapshot_back *back); // NULL is fine

// Checks all that can be checked without building a VM: every byte of the chain.
int snapshot_verify(const char *path, struct snapshot_report *report, struct error *err);

// As snapfile_remove, with what lies beside the file and is nobody else's: its working set and its
// frozen overlays (where the chain can still be read: its section says which). The copies of those
// that guests were given, FILE.diskN.NAME, are disks of VMs, and stay.
int snapshot_remove(const char *path, struct error *err);

// A diff becomes a full one in its place, with all that it says, and its children go on; its own
// parents are not needed by it any more. At each moment its name has the one or the other, whole.
// `cancelled` (may be NULL): -ECANCELED.
int snapshot_settle(const char *path, const atomic_bool *cancelled, struct snapshot_report *report,
                    struct error *err);

// One full file from a chain. `params->path` may be the chain's newest file.
int snapshot_merge(const char *child, const struct snapshot_params *params,
                   struct snapshot_report *report, struct error *err);
