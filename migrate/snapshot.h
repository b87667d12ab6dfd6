// SPDX-License-Identifier: Apache-2.0
// A guest in a file: the records of migrate/wire.h after a short header. docs/formats.md.
//
//   file := header (40 bytes), MACHINE, STATE, PAGES ..., END
//
// Page data starts at multiples of 4 KiB. Every byte is covered by a checksum: header and
// metas by a CRC-32C, the state by one, each page by its sum; each page of memory occurs exactly
// once.
#pragma once

#include <stdint.h>

#include "migrate/migrate.h"
#include "vmm/error.h"

#define SNAPSHOT_MAGIC "FERRYSNP"

struct snapshot_header {
    char magic[8];
    uint16_t version, oldest; // versions of the record format, as in HELLO
    uint32_t kind;            // enum snapshot_kind
    uint8_t id[WIRE_ID_LEN];
    uint32_t reserved;
    uint32_t crc; // CRC-32C of all before
};

enum snapshot_kind { SNAPSHOT_FULL = 1 };

struct snapshot_report {
    uint64_t data_pages, zero_pages;
    uint64_t file_bytes, state_bytes;
    uint64_t pause_ns; // the guest stood still (0 when it was paused before)
    uint64_t total_ns;
};

// Writes the guest to `path`: under a temporary name beside it, synced, then renamed, so that a
// failure or crash at any moment leaves an older file of that name whole. A running guest is paused
// while its memory is written and goes on whatever happens. `m` (may be NULL) gives progress and
// can cancel.
int snapshot_save(struct vm *vm, const char *path, const struct migrate_hooks *hooks,
                  struct migration *m, struct snapshot_report *report, struct error *err);

// Builds a VM from a snapshot; everything has been read and checked when it returns, and the guest
// stands paused: vm_resume lets it go on.
int snapshot_load(const char *path, const struct migrate_hooks *hooks, struct vm **vm,
                  struct snapshot_report *report, struct error *err);

// Checks header and all records against each other without building a VM (fuzzing, `verify`). Page
// contents are checked too.
int snapshot_verify(struct wire *w, struct snapshot_report *report, struct error *err);
