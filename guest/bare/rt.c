// SPDX-License-Identifier: Apache-2.0
// Boot information, memory, and talking to the host.
#include "rt.h"

#include <stdarg.h>

#include "internal.h"

#define COM1     0x3f8
#define LSR      5
#define LSR_THRE 0x20

bool ucall_present;
struct ram_range ram_ranges[RAM_RANGE_MAX];
unsigned ram_range_count;
unsigned boot_kind;
uint64_t boot_rsdp;
char boot_cmdline[4096];

static bool com1_busy;

extern char image_end[];
extern uint64_t pdpt[512];

static struct ram_range ram_free[2 * RAM_RANGE_MAX];
static unsigned ram_free_count;

void *memcpy(void *to, const void *from, size_t n)
{
    void *d = to;
    size_t words = n / 8;
    // String instructions: one emulated instruction moves it all, 8 bytes a step.
    __asm__ volatile("rep movsq" : "+D"(d), "+S"(from), "+c"(words) : : "memory");
    n &= 7;
    __asm__ volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(n) : : "memory");
    return to;
}

void *memset(void *to, int byte, size_t n)
{
    void *d = to;
    size_t words = n / 8;
    uint64_t pattern = 0x0101010101010101ul * (uint8_t)byte;
    __asm__ volatile("rep stosq" : "+D"(d), "+c"(words) : "a"(pattern) : "memory");
    n &= 7;
    __asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(pattern) : "memory");
    return to;
}

void *memmove(void *to, const void *from, size_t n)
{
    if ((uintptr_t)to - (uintptr_t)from >= n)
        return memcpy(to, from, n);
    volatile char *d = to;
    const char *s = from;
    while (n--)
        d[n] = s[n];
    return to;
}

int memcmp(const void *a, const void *b, size_t n)
{
    const volatile unsigned char *x = a, *y = b;
    for (size_t i = 0; i < n; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

uint64_t ucall(uint64_t nr, uint64_t a0, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4)
{
    if (!ucall_present)
        return UCALL_NONE;
    // On the stack: an interrupt handler may call while the code it interrupted fills its own.
    _Alignas(64) struct ucall call = {.nr = nr, .args = {a0, a1, a2, a3, a4}};
    outl(UCALL_PORT, (uint32_t)(uintptr_t)&call);
    return *(volatile uint64_t *)&call.result;
}

static void text_out(const char *text, size_t length)
{
    if (ucall_present) {
        ucall(UCALL_PRINT, (uintptr_t)text, length, 0, 0, 0);
        return;
    }
    // Keeps lines of several CPUs apart; an interrupt handler on the same CPU must get through all
    // the same.
    for (int tries = 0; tries < 10000 && __atomic_test_and_set(&com1_busy, __ATOMIC_ACQUIRE);
         tries++)
        pause();
    for (size_t i = 0; i < length; i++) {
        for (int tries = 0; tries < 1000 && !(inb(COM1 + LSR) & LSR_THRE); tries++)
            pause();
        outb(COM1, (uint8_t)text[i]);
    }
    __atomic_clear(&com1_busy, __ATOMIC_RELEASE);
}

struct text {
    char bytes[256];
    size_t length;
};

static void text_char(struct text *text, char c)
{
    if (text->length < sizeof(text->bytes) - 1)
        text->bytes[text->length++] = c;
}

static void text_number(struct text *text, uint64_t value, unsigned base, int width, char fill)
{
    char digits[20];
    int n = 0;
    do {
        digits[n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    for (; width > n; width--)
        text_char(text, fill);
    while (n)
        text_char(text, digits[--n]);
}

static void text_integer(struct text *text, char kind, int64_t value, int width, char fill)
{
    if (kind == 'd' && value < 0) {
        text_char(text, '-');
        value = -value;
    }
    text_number(text, (uint64_t)value, kind == 'x' ? 16 : 10, width, fill);
}

void print(const char *format, ...)
{
    struct text text = {.length = 0};
    va_list args;
    va_start(args, format);
    for (const char *p = format; *p; p++) {
        if (*p != '%') {
            text_char(&text, *p);
            continue;
        }
        char fill = *++p == '0' ? '0' : ' ';
        int width = 0;
        for (; *p >= '0' && *p <= '9'; p++)
            width = width * 10 + (*p - '0');
        bool wide = *p == 'l';
        p += wide;
        switch (*p) {
        case 's':
            for (const char *s = va_arg(args, const char *); *s; s++)
                text_char(&text, *s);
            break;
        case 'c':
            text_char(&text, (char)va_arg(args, int));
            break;
        case 'p':
            text_integer(&text, 'x', va_arg(args, int64_t), 0, ' ');
            break;
        case 'd':
            text_integer(&text, 'd', wide ? va_arg(args, int64_t) : va_arg(args, int32_t), width,
                         fill);
            break;
        case 'u':
        case 'x':
            text_integer(&text, *p, wide ? va_arg(args, int64_t) : va_arg(args, uint32_t), width,
                         fill);
            break;
        default:
            text_char(&text, *p);
        }
    }
    va_end(args);
    text_out(text.bytes, text.length);
}

uint64_t guest_sync(uint64_t stage, uint64_t value)
{
    if (ucall_present)
        return ucall(UCALL_SYNC, stage, value, 0, 0, 0);
    print("sync %lu %lu\n", stage, value);
    return 0;
}

static const char *const value_names[] = {
#define VALUE_NAME(suffix, name) #name,
    UCALL_VALUES(VALUE_NAME)
#undef VALUE_NAME
};

static const char *const param_names[] = {
#define PARAM_NAME(suffix, word) #word,
    UCALL_PARAMS(PARAM_NAME)
#undef PARAM_NAME
};

void guest_value(enum ucall_value id, uint64_t value, uint64_t index)
{
    if (ucall_present)
        ucall(UCALL_VALUE, id, value, index, 0, 0);
    else
        print("value %s[%lu] = %lu\n", value_names[id], index, value);
}

static bool number_parse(const char *s, uint64_t *value)
{
    unsigned base = 10;
    if (s[0] == '0' && s[1] == 'x') {
        base = 16;
        s += 2;
    }
    uint64_t n = 0;
    const char *start = s;
    for (;; s++) {
        unsigned lower = (unsigned char)*s | 0x20;
        unsigned digit = *s >= '0' && *s <= '9'         ? (unsigned)(*s - '0')
                         : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10
                                                        : 16;
        if (digit >= base)
            break;
        n = n * base + digit;
    }
    unsigned shift = *s == 'K' ? 10 : *s == 'M' ? 20 : *s == 'G' ? 30 : 0;
    s += shift != 0;
    *value = n << shift;
    return s != start && (*s == 0 || *s == ' ');
}

// Finds the word `name=number`; the last one on the line wins.
static bool cmdline_number(const char *name, uint64_t *value)
{
    bool found = false;
    for (const char *p = boot_cmdline; *p;) {
        const char *n = name;
        while (*n && *p == *n)
            p++, n++;
        if (!*n && *p == '=')
            found |= number_parse(p + 1, value);
        while (*p && *p != ' ')
            p++;
        while (*p == ' ')
            p++;
    }
    return found;
}

uint64_t guest_param(enum ucall_param id, uint64_t fallback)
{
    uint64_t value = ucall(UCALL_GET, id, 0, 0, 0, 0);
    if (value != UCALL_NONE)
        return value;
    return cmdline_number(param_names[id], &value) ? value : fallback;
}

void guest_stop(void)
{
    ucall(UCALL_STOP, 0, 0, 0, 0, 0);
}

void guest_done(uint64_t status)
{
    if (ucall_present)
        ucall(UCALL_DONE, status, 0, 0, 0, 0);
    else
        outl(UCALL_EXIT_PORT, (uint32_t)status);
    cpu_park();
}

void guest_assert_failed(const char *file, unsigned line, const char *expr, uint64_t a, uint64_t b)
{
    if (ucall_present) {
        ucall(UCALL_ASSERT, (uintptr_t)file, line, (uintptr_t)expr, a, b);
    } else {
        print("%s:%u: assertion failed: %s (0x%lx, 0x%lx)\n", file, line, expr, a, b);
        outl(UCALL_EXIT_PORT, 1);
    }
    cpu_park();
}

// --- memory ------------------------------------------------------------------------------

static void ram_add(uint64_t base, uint64_t bytes)
{
    GUEST_ASSERT(ram_range_count < RAM_RANGE_MAX);
    ram_ranges[ram_range_count++] = (struct ram_range) {base, bytes};

    uint64_t end = (base + bytes) & -PAGE_SIZE;
    uint64_t start = (base + PAGE_SIZE - 1) & -PAGE_SIZE;
    // Low memory holds boot data and the trampoline, and the image follows: allocate above.
    if (start < (uintptr_t)image_end)
        start = (uintptr_t)image_end;
    if (end > start)
        ram_free[ram_free_count++] = (struct ram_range) {start, end - start};
}

// The aligned part of free range i inside [from, limit).
static struct ram_range ram_window(unsigned i, uint64_t align, uint64_t from, uint64_t limit)
{
    uint64_t base = ram_free[i].base, end = base + ram_free[i].bytes;
    if (base < from)
        base = from;
    base = (base + align - 1) & -align;
    if (end > limit)
        end = limit;
    return (struct ram_range) {base, end > base ? end - base : 0};
}

// Removes [base, base + bytes), which lies in free range i; what is below becomes a range of its
// own.
static void ram_cut(unsigned i, uint64_t base, uint64_t bytes)
{
    struct ram_range *range = &ram_free[i];
    if (base > range->base) {
        GUEST_ASSERT(ram_free_count < 2 * RAM_RANGE_MAX);
        ram_free[ram_free_count++] = (struct ram_range) {range->base, base - range->base};
    }
    range->bytes -= base + bytes - range->base;
    range->base = base + bytes;
}

void *ram_alloc(uint64_t bytes, uint64_t align, uint64_t from, uint64_t limit)
{
    bytes = (bytes + PAGE_SIZE - 1) & -PAGE_SIZE;
    if (align < PAGE_SIZE)
        align = PAGE_SIZE;
    for (unsigned i = 0; i < ram_free_count; i++) {
        struct ram_range window = ram_window(i, align, from, limit);
        if (window.bytes < bytes)
            continue;
        ram_cut(i, window.base, bytes);
        return (void *)window.base;
    }
    guest_assert_failed(__FILE__, __LINE__, "out of RAM: bytes, from", bytes, from);
}

unsigned ram_take(uint64_t pages, uint64_t from, struct ram_range *out, unsigned max)
{
    unsigned n = 0;
    for (unsigned i = 0; i < ram_free_count && n < max && pages; i++) {
        struct ram_range window = ram_window(i, PAGE_SIZE, from, UINT64_MAX);
        if (!window.bytes)
            continue;
        if (window.bytes > pages * PAGE_SIZE)
            window.bytes = pages * PAGE_SIZE;
        ram_cut(i, window.base, window.bytes);
        pages -= window.bytes / PAGE_SIZE;
        out[n++] = window;
    }
    return n;
}

// The first 4 GiB are mapped by data in start.S; adds the RAM above, 1 GiB of 2 MiB pages at a
// time.
static void ram_map_high(void)
{
    for (unsigned i = 0; i < ram_range_count; i++) {
        uint64_t end = ram_ranges[i].base + ram_ranges[i].bytes;
        GUEST_ASSERT(end <= 512 * GIB);
        for (uint64_t gib = ram_ranges[i].base / GIB; gib * GIB < end; gib++) {
            if (pdpt[gib])
                continue;
            uint64_t *pd = ram_alloc(PAGE_SIZE, PAGE_SIZE, 0, 4 * GIB);
            uint64_t entry = gib * GIB + 0xe7;
            for (unsigned n = 0; n < 512; n++, entry += 2ul << 20)
                pd[n] = entry;
            pdpt[gib] = (uintptr_t)pd + 7;
        }
    }
}

static void cmdline_set(uint64_t gpa)
{
    const char *from = (const char *)gpa;
    for (size_t i = 0; gpa && i < sizeof(boot_cmdline) - 1 && from[i]; i++)
        boot_cmdline[i] = from[i];
}

struct e820_entry {
    uint64_t base;
    uint64_t bytes;
    uint32_t type;
} __attribute__((packed));

static uint32_t le32(uint64_t gpa)
{
    return *(const uint32_t *)gpa;
}

// Linux x86 boot protocol, "zero page".
static void boot_params_read(uint64_t params)
{
    unsigned count = *(const uint8_t *)(params + 0x1e8);
    const struct e820_entry *e820 = (const struct e820_entry *)(params + 0x2d0);
    for (unsigned i = 0; i < count; i++)
        if (e820[i].type == 1)
            ram_add(e820[i].base, e820[i].bytes);
    cmdline_set(le32(params + 0x228) | (uint64_t)le32(params + 0xc8) << 32);
    boot_rsdp = *(const uint64_t *)(params + 0x70);
}

// Xen's hvm_start_info (xen/arch-x86/hvm/start_info.h), version 1.
struct pvh_info {
    uint32_t magic, version, flags, module_count;
    uint64_t modules, cmdline, rsdp, memmap;
    uint32_t memmap_count, reserved;
};

struct pvh_memory {
    uint64_t base, bytes;
    uint32_t type, reserved;
};

static void pvh_read(const struct pvh_info *info)
{
    GUEST_ASSERT_EQ(info->magic, 0x336ec578);
    GUEST_ASSERT(info->version >= 1);
    const struct pvh_memory *map = (const struct pvh_memory *)info->memmap;
    for (unsigned i = 0; i < info->memmap_count; i++)
        if (map[i].type == 1)
            ram_add(map[i].base, map[i].bytes);
    cmdline_set(info->cmdline);
    boot_rsdp = info->rsdp;
}

void boot_main(unsigned kind, uint64_t info)
{
    boot_kind = kind;
    ucall_present = inl(UCALL_PORT) == UCALL_MAGIC;
    cpu_setup_boot();
    if (kind == BOOT_PVH)
        pvh_read((const struct pvh_info *)info);
    else
        boot_params_read(info);
    ram_map_high();
    firmware_tables_read();
    guest_main();
    guest_done(0);
}
