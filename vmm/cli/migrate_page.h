// SPDX-License-Identifier: Apache-2.0
// The report of a migration as one self-contained page: tables and SVG plots, no script, nothing
// loaded.
#pragma once

#include <jansson.h>

#include "vmm/error.h"

// `report` is what PUT /migration answers, with its history.
int migrate_page_write(const char *path, const char *name, json_t *report, struct error *err);
