// SPDX-License-Identifier: Apache-2.0
// The state registry. Every vCPU and device declares its saved fields in a table; snapshot,
// migration and clone walk the same tables.
//
//   section  := u8 name_len, name, u32 instance, u16 version, u32 body_len, body
//   body     := the fields the table had at `version`, in table order, little endian
//   blob     := u32 length of what follows, u32 magic "FST1", u32 sections, section...,
//               u32 crc32 of everything from the magic on
//
// A field added later carries `since`; loading an older version leaves it at the value
// `defaults` (or the object's reset value) gave it. An unknown or missing section is an error.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/stream.h"

enum state_type {
    STATE_INT,   // `count` integers of `size` bytes each (1, 2, 4, 8), little endian
    STATE_BYTES, // `size` raw bytes
    STATE_VAR,   // u32 length (a uint32_t at len_offset), then as many bytes; at most `size`
};

struct state_field {
    const char *name;
    enum state_type type;
    uint16_t since; // first version that has it; versions count from 1
    uint32_t offset;
    uint32_t size;
    uint32_t count;
    uint32_t len_offset;
};

#define STATE_FIELD_INT(T, m, ver)                                               \
    {                                                                            \
        .name = #m, .type = STATE_INT, .since = (ver), .offset = offsetof(T, m), \
        .size = sizeof(((T *)0)->m), .count = 1                                  \
    }
#define STATE_FIELD_INTS(T, m, ver)                                                           \
    {                                                                                         \
        .name = #m, .type = STATE_INT, .since = (ver), .offset = offsetof(T, m),              \
        .size = sizeof(((T *)0)->m[0]), .count = sizeof(((T *)0)->m) / sizeof(((T *)0)->m[0]) \
    }
#define STATE_FIELD_BYTES(T, m, ver)                                               \
    {                                                                              \
        .name = #m, .type = STATE_BYTES, .since = (ver), .offset = offsetof(T, m), \
        .size = sizeof(((T *)0)->m), .count = 1                                    \
    }
#define STATE_FIELD_VAR(T, m, len_m, ver)                                         \
    {                                                                             \
        .name = #m, .type = STATE_VAR, .since = (ver), .offset = offsetof(T, m),  \
        .size = sizeof(((T *)0)->m), .count = 1, .len_offset = offsetof(T, len_m) \
    }

struct state_table {
    const char *name; // section name, at most 31 bytes
    uint16_t version; // newest; written
    uint16_t oldest;  // oldest that can be loaded
    uint16_t nr_fields;
    const struct state_field *fields;
    // Called with the VM paused. `save` fills the fields from the live object; `load` checks the
    // loaded fields (they are hostile) and applies them. Each may be NULL.
    int (*save)(void *object, struct error *err);
    int (*load)(void *object, uint16_t version, struct error *err);
};

struct state_entry {
    const struct state_table *table;
    uint32_t instance;
    void *object;
};

struct state_registry {
    struct state_entry *entries;
    uint32_t nr, cap;
};

enum { STATE_BLOB_MAX = 16 * 1024 * 1024 };

int state_register(struct state_registry *reg, const struct state_table *table, uint32_t instance,
                   void *object, struct error *err);
void state_registry_free(struct state_registry *reg);

int state_save(const struct state_registry *reg, struct stream *out, struct error *err);

// Reads and checks the whole blob first, then applies the sections in *registration* order (vCPUs
// may need the irqchip before them, whatever order the blob has). On error some sections may have
// been applied: the VM must not be started.
int state_load(const struct state_registry *reg, struct stream *in, struct error *err);
