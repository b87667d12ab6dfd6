// SPDX-License-Identifier: Apache-2.0
#include "devices/aml.h"

#include <string.h>

enum {
    OP_ZERO = 0x00,
    OP_ONE = 0x01,
    OP_NAME = 0x08,
    OP_BYTE = 0x0a,
    OP_WORD = 0x0b,
    OP_DWORD = 0x0c,
    OP_STRING = 0x0d,
    OP_QWORD = 0x0e,
    OP_SCOPE = 0x10,
    OP_BUFFER = 0x11,
    OP_PACKAGE = 0x12,
    OP_METHOD = 0x14,
    OP_DUAL_NAME = 0x2e,
    OP_MULTI_NAME = 0x2f,
    OP_EXT = 0x5b,
    OP_IF = 0xa0,
    EXT_REGION = 0x80,
    EXT_FIELD = 0x81,
    EXT_DEVICE = 0x82,
};

void aml_init(struct aml *aml, void *data, size_t cap)
{
    *aml = (struct aml) {.data = data, .cap = cap};
}

void aml_bytes(struct aml *aml, const void *data, size_t len)
{
    if (aml->overflow || len > aml->cap - aml->len) {
        aml->overflow = true;
        return;
    }
    memcpy(aml->data + aml->len, data, len);
    aml->len += len;
}

void aml_byte(struct aml *aml, uint8_t byte)
{
    aml_bytes(aml, &byte, 1);
}

// x86 is little endian, and so is AML.
static void aml_insert(struct aml *aml, size_t at, const void *data, size_t len)
{
    if (aml->overflow || len > aml->cap - aml->len) {
        aml->overflow = true;
        return;
    }
    memmove(aml->data + at + len, aml->data + at, aml->len - at);
    memcpy(aml->data + at, data, len);
    aml->len += len;
}

static size_t int_encode(uint64_t value, uint8_t out[9])
{
    if (value <= 1) {
        out[0] = value ? OP_ONE : OP_ZERO;
        return 1;
    }
    size_t bytes = value <= UINT8_MAX ? 1 : value <= UINT16_MAX ? 2 : value <= UINT32_MAX ? 4 : 8;
    out[0] = bytes == 1 ? OP_BYTE : bytes == 2 ? OP_WORD : bytes == 4 ? OP_DWORD : OP_QWORD;
    memcpy(out + 1, &value, bytes);
    return 1 + bytes;
}

void aml_int(struct aml *aml, uint64_t value)
{
    uint8_t code[9];
    aml_bytes(aml, code, int_encode(value, code));
}

void aml_string(struct aml *aml, const char *text)
{
    aml_byte(aml, OP_STRING);
    aml_bytes(aml, text, strlen(text) + 1);
}

void aml_path(struct aml *aml, const char *path)
{
    if (*path == '\\')
        aml_byte(aml, (uint8_t)*path++);
    unsigned segments = 1;
    for (const char *p = path; (p = strchr(p, '.')); p++)
        segments++;
    if (segments == 2)
        aml_byte(aml, OP_DUAL_NAME);
    if (segments > 2) {
        aml_byte(aml, OP_MULTI_NAME);
        aml_byte(aml, (uint8_t)segments);
    }
    while (segments--) {
        char segment[4] = {'_', '_', '_', '_'};
        size_t len = strcspn(path, ".");
        memcpy(segment, path, len < 4 ? len : 4);
        aml_bytes(aml, segment, 4);
        path += len + (path[len] == '.');
    }
}

static unsigned hex_digit(char c)
{
    return (unsigned)(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10) & 0xf;
}

// Three letters in five bits each, then four hexadecimal digits; the bytes in big-endian order.
void aml_eisa_id(struct aml *aml, const char *id)
{
    uint32_t vendor = 0, product = 0;
    for (unsigned i = 0; i < 3; i++)
        vendor = vendor << 5 | ((unsigned)(id[i] - '@') & 0x1f);
    for (unsigned i = 3; i < 7; i++)
        product = product << 4 | hex_digit(id[i]);
    aml_int(aml, __builtin_bswap32(vendor << 16 | product));
}

// --- blocks

size_t aml_scope(struct aml *aml, const char *path)
{
    aml_byte(aml, OP_SCOPE);
    size_t mark = aml->len;
    aml_path(aml, path);
    return mark;
}

static size_t ext_block(struct aml *aml, uint8_t op, const char *name)
{
    aml_byte(aml, OP_EXT);
    aml_byte(aml, op);
    size_t mark = aml->len;
    aml_path(aml, name);
    return mark;
}

size_t aml_device(struct aml *aml, const char *name)
{
    return ext_block(aml, EXT_DEVICE, name);
}

size_t aml_method(struct aml *aml, const char *name, unsigned args, bool serialized)
{
    aml_byte(aml, OP_METHOD);
    size_t mark = aml->len;
    aml_path(aml, name);
    aml_byte(aml, (uint8_t)((args & 7) | (serialized ? 8 : 0)));
    return mark;
}

size_t aml_package(struct aml *aml, unsigned elements)
{
    aml_byte(aml, OP_PACKAGE);
    size_t mark = aml->len;
    aml_byte(aml, (uint8_t)elements);
    return mark;
}

size_t aml_if(struct aml *aml)
{
    aml_byte(aml, OP_IF);
    return aml->len;
}

size_t aml_field(struct aml *aml, const char *region, uint8_t flags)
{
    size_t mark = ext_block(aml, EXT_FIELD, region);
    aml_byte(aml, flags);
    return mark;
}

// PkgLength, 20.2.4: one byte up to 63, else a low nibble and one to three bytes.
static size_t length_encode(size_t len, uint8_t out[4])
{
    if (len < 64) {
        out[0] = (uint8_t)len;
        return 1;
    }
    unsigned more = len < 1u << 12 ? 1 : len < 1u << 20 ? 2 : 3;
    out[0] = (uint8_t)(more << 6 | (len & 0xf));
    for (unsigned i = 0; i < more; i++)
        out[1 + i] = (uint8_t)(len >> (4 + 8 * i));
    return 1 + more;
}

void aml_end(struct aml *aml, size_t mark)
{
    size_t body = aml->len - mark;
    // The length counts its own bytes, so it may need one more of them.
    size_t own = 1;
    uint8_t code[4];
    while (own < 4 && length_encode(body + own, code) > own)
        own++;
    if (body + own >= 1u << 28) {
        aml->overflow = true;
        return;
    }
    length_encode(body + own, code);
    aml_insert(aml, mark, code, own);
}

// --- names

void aml_name(struct aml *aml, const char *name)
{
    aml_byte(aml, OP_NAME);
    aml_path(aml, name);
}

void aml_name_int(struct aml *aml, const char *name, uint64_t value)
{
    aml_name(aml, name);
    aml_int(aml, value);
}

void aml_name_string(struct aml *aml, const char *name, const char *text)
{
    aml_name(aml, name);
    aml_string(aml, text);
}

void aml_name_eisa_id(struct aml *aml, const char *name, const char *id)
{
    aml_name(aml, name);
    aml_eisa_id(aml, id);
}

void aml_region_io(struct aml *aml, const char *name, uint16_t port, uint8_t len)
{
    aml_byte(aml, OP_EXT);
    aml_byte(aml, EXT_REGION);
    aml_path(aml, name);
    aml_byte(aml, 1); // SystemIO
    aml_int(aml, port);
    aml_int(aml, len);
}

void aml_field_unit(struct aml *aml, const char *name, unsigned bits)
{
    aml_path(aml, name);
    uint8_t code[4];
    aml_bytes(aml, code, length_encode(bits, code)); // counts bits, and not itself
}

// --- resources, 6.4

size_t aml_resources(struct aml *aml)
{
    aml_name(aml, "_CRS");
    aml_byte(aml, OP_BUFFER);
    return aml->len;
}

void aml_resources_end(struct aml *aml, size_t mark)
{
    aml_byte(aml, 0x79); // end tag
    aml_byte(aml, 0x00); // checksum: none
    uint8_t size[9];
    size_t len = int_encode(aml->len - mark, size);
    aml_insert(aml, mark, size, len);
    aml_end(aml, mark);
}

void aml_resource_io(struct aml *aml, uint16_t port, uint8_t len)
{
    uint8_t low = (uint8_t)port, high = (uint8_t)(port >> 8);
    // 16-bit decode, minimum = maximum, alignment 1.
    uint8_t code[] = {0x47, 0x01, low, high, low, high, 0x01, len};
    aml_bytes(aml, code, sizeof(code));
}

void aml_resource_memory32(struct aml *aml, uint32_t base, uint32_t len)
{
    uint8_t code[12] = {0x86, 9, 0, 0x01}; // read-write
    memcpy(code + 4, &base, 4);
    memcpy(code + 8, &len, 4);
    aml_bytes(aml, code, sizeof(code));
}

// Address space descriptors, 6.4.3.5. Producer, minimum and maximum fixed, positive decode.
enum { WORD_SPACE = 0x88, DWORD_SPACE = 0x87, SPACE_MEMORY = 0, SPACE_BUS = 2, SPACE_FIXED = 0x0c };

void aml_resource_bus(struct aml *aml, uint16_t first, uint16_t last)
{
    const uint16_t range[] = {0, first, last, 0, (uint16_t)(last - first + 1)};
    const uint8_t head[] = {WORD_SPACE, 13, 0, SPACE_BUS, SPACE_FIXED, 0};
    aml_bytes(aml, head, sizeof(head));
    aml_bytes(aml, range, sizeof(range)); // granularity, minimum, maximum, translation, length
}

void aml_resource_window32(struct aml *aml, uint32_t base, uint32_t len)
{
    const uint32_t range[] = {0, base, base + len - 1, 0, len};
    const uint8_t head[] = {DWORD_SPACE, 23, 0, SPACE_MEMORY, SPACE_FIXED, 0x01}; // read-write
    aml_bytes(aml, head, sizeof(head));
    aml_bytes(aml, range, sizeof(range));
}

void aml_resource_irq_edge(struct aml *aml, uint32_t gsi)
{
    uint8_t code[9] = {0x89, 6, 0, 0x03, 1}; // consumer, edge; one interrupt
    memcpy(code + 5, &gsi, 4);
    aml_bytes(aml, code, sizeof(code));
}
