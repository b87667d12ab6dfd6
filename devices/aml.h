// SPDX-License-Identifier: Apache-2.0
// A small encoder of ACPI Machine Language (ACPI 6.5, chapter 20). Pure: it appends to a bounded
// buffer. What does not fit sets `overflow` and is dropped; the caller looks once, at the end.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct aml {
    uint8_t *data;
    size_t len, cap; // bytes
    bool overflow;
};

void aml_init(struct aml *aml, void *data, size_t cap);

void aml_bytes(struct aml *aml, const void *data, size_t len);
void aml_byte(struct aml *aml, uint8_t byte);
void aml_int(struct aml *aml, uint64_t value); // shortest form
void aml_string(struct aml *aml, const char *text);
// "COM1", "_SB_.PWRB", "\\_SB_.PWRB": segments of up to four characters, padded with '_'.
void aml_path(struct aml *aml, const char *path);
void aml_eisa_id(struct aml *aml, const char *id); // "PNP0501" as the compressed integer

// Each opens a block and returns its mark for aml_end, which puts the length in front of the body.
size_t aml_scope(struct aml *aml, const char *path);
size_t aml_device(struct aml *aml, const char *name);
size_t aml_method(struct aml *aml, const char *name, unsigned args, bool serialized);
size_t aml_package(struct aml *aml, unsigned elements);
size_t aml_if(struct aml *aml); // the predicate follows
size_t aml_field(struct aml *aml, const char *region, uint8_t flags);
void aml_end(struct aml *aml, size_t mark);

// Name (NAME, ...): the object follows.
void aml_name(struct aml *aml, const char *name);
void aml_name_int(struct aml *aml, const char *name, uint64_t value);
void aml_name_string(struct aml *aml, const char *name, const char *text);
void aml_name_eisa_id(struct aml *aml, const char *name, const char *id);

void aml_region_io(struct aml *aml, const char *name, uint16_t port, uint8_t len);
void aml_field_unit(struct aml *aml, const char *name, unsigned bits);

// Name (_CRS, ResourceTemplate () {...}): resources between the two calls.
size_t aml_resources(struct aml *aml);
void aml_resources_end(struct aml *aml, size_t mark);
void aml_resource_io(struct aml *aml, uint16_t port, uint8_t len);
void aml_resource_memory32(struct aml *aml, uint32_t base, uint32_t len);
// What a bridge forwards: bus numbers first .. last, memory at the same address on both sides.
void aml_resource_bus(struct aml *aml, uint16_t first, uint16_t last);
void aml_resource_window32(struct aml *aml, uint32_t base, uint32_t len);
void aml_resource_irq_edge(struct aml *aml, uint32_t gsi); // active high, exclusive

enum {
    AML_STORE = 0x70,
    AML_AND = 0x7b,
    AML_NOTIFY = 0x86,
    AML_LOCAL0 = 0x60,
    AML_NULL_NAME = 0x00, // "no target"
};
