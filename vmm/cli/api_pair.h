// SPDX-License-Identifier: Apache-2.0
// A snapshot in two files, as microVM clients ask for it: guest and memory in one
// (migrate/snapfile.h, at mem_file_path), and a small one (at snapshot_path) that says which
// snapshot that is and how the VM was configured:
//
//   {"ferry-snapshot": 1, "id": "HEX", "config": {the sections of GET /vm/config}}
//
// No path is in it: both may be moved. The small one is written when the other is complete.
#pragma once

#include <jansson.h>

#include "migrate/snapshot.h"

struct api_pair;

// For a snapshot that is about to be taken; `config` is copied.
int api_pair_new(struct api_pair **pair, const char *path, json_t *config, struct error *err);
void api_pair_free(struct api_pair *pair); // NULL is fine
// snapshot_params.taken
int api_pair_write(void *pair, const struct snapshot_report *report, struct error *err);

// The small file at `path`: its configuration, to be freed, once `memory` (may be NULL) is found to
// be the snapshot that it belongs to. *config is NULL where `path` is a snapshot file itself.
int api_pair_read(const char *path, const char *memory, json_t **config, struct error *err);
