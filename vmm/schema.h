// SPDX-License-Identifier: Apache-2.0
// What a JSON object of the API must look like, as a table. Pure.
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"

enum schema_type {
    SCHEMA_STRING,  // min, max: bytes (max 0 = SCHEMA_TEXT_MAX)
    SCHEMA_INTEGER, // min, max: value (both 0 = any that is not negative)
    SCHEMA_BOOL,
    SCHEMA_OBJECT, // `fields`; NULL: any
    SCHEMA_LIST,   // of objects: `fields`; of strings: NULL. max: elements
    SCHEMA_ANY,
};

enum { SCHEMA_TEXT_MAX = 4096, SCHEMA_LIST_MAX = 64, SCHEMA_DEPTH_MAX = 8 };

struct schema_field {
    const char *name; // NULL ends a table
    enum schema_type type;
    bool required;
    int64_t min, max;
    const char *const *choices; // of a string, ends with NULL; NULL = any
    const struct schema_field *fields;
};

// `object` has every required field, no unknown one, and each of its type and within its bounds.
// null counts as left out. The error names the field.
int schema_check(const json_t *object, const struct schema_field *fields, struct error *err);
