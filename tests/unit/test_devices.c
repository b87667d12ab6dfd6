// SPDX-License-Identifier: Apache-2.0
// The small platform devices and the ucall device, through the bus, without KVM.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "devices/acpi.h"
#include "devices/board.h"
#include "devices/platform.h"
#include "devices/ucall.h"
#include "vmm/layout.h"
#include "vmm/vm.h"

struct rig {
    struct vm vm; // first: callbacks find the rig by it
    struct device *dev;
    int64_t now; // microseconds
    char irqs[32];
    struct ucall_message calls[8];
    char text[8][128];
    unsigned nr_calls;
    bool deal; // what the handler answers
};

static struct rig *rig_new(void)
{
    struct rig *rig = calloc(1, sizeof(*rig));
    struct error err = {0};
    struct ram_config ram = {.size = 16 * MiB};
    ck_assert_msg(!ram_create(&rig->vm.ram, &ram, &err), "%s", err.text);
    pthread_mutex_init(&rig->vm.lock, NULL);
    pthread_cond_init(&rig->vm.changed, NULL);
    rig->vm.pio.name = "port";
    rig->vm.config.cpus = 1;
    rig->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    return rig;
}

static void rig_add(struct rig *rig, const struct device_class *class, const void *config)
{
    struct error err = {0};
    ck_assert_msg(!device_add(&rig->vm, class, config, &rig->dev, &err), "%s", err.text);
}

static struct rig *rig_with(const struct device_class *class, const void *config)
{
    struct rig *rig = rig_new();
    rig_add(rig, class, config);
    return rig;
}

static void rig_free(struct rig *rig)
{
    while (rig->vm.devices) {
        struct device *dev = rig->vm.devices;
        rig->vm.devices = dev->next;
        if (dev->class->unrealize)
            dev->class->unrealize(dev);
        free(dev);
    }
    state_registry_free(&rig->vm.state);
    bus_free(&rig->vm.pio);
    ram_destroy(&rig->vm.ram);
    free(rig);
}

static void out(struct rig *rig, unsigned port, unsigned size, uint64_t value)
{
    ck_assert(bus_write(&rig->vm.pio, port, size, value));
}

static uint64_t in(struct rig *rig, unsigned port, unsigned size)
{
    uint64_t value;
    ck_assert(bus_read(&rig->vm.pio, port, size, &value));
    return value;
}

static void expect_stop(struct rig *rig, enum vm_stop_kind kind, uint32_t value)
{
    ck_assert_int_eq(rig->vm.stop.kind, kind);
    ck_assert_uint_eq(rig->vm.stop.value, value);
    if (kind)
        ck_assert_uint_gt(strlen(rig->vm.stop.text), 5);
}

static void save_load(struct rig *from, struct rig *to)
{
    struct stream_mem mem, read;
    struct error err = {0};
    stream_mem_writer(&mem, "test", STATE_BLOB_MAX);
    ck_assert_msg(!state_save(&from->vm.state, &mem.stream, &err), "%s", err.text);
    stream_mem_reader(&read, "test", mem.data, mem.len);
    ck_assert_msg(!state_load(&to->vm.state, &read.stream, &err), "%s", err.text);
    stream_mem_free(&mem);
}

// Loads one field of a device with a hostile value.
static void load_bad(const struct device_class *class, const void *config, const char *field,
                     uint64_t value)
{
    struct rig *rig = rig_with(class, config);
    const struct state_table *table = class->state;
    struct error err = {0};
    bool found = false;
    for (unsigned i = 0; i < table->nr_fields; i++) {
        if (strcmp(table->fields[i].name, field))
            continue;
        found = true;
        memcpy((char *)rig->dev + table->fields[i].offset, &value, table->fields[i].size);
    }
    ck_assert(found);
    ck_assert_int_eq(table->load(rig->dev, 1, &err), -EINVAL);
    ck_assert_uint_gt(strlen(err.text), 10);
    rig_free(rig);
}

// --- i8042

START_TEST(i8042_reset_like_linux)
{
    struct rig *rig = rig_with(&i8042_class, NULL);
    ck_assert_uint_eq(in(rig, PORT_I8042_CMD, 1) & 0x02, 0); // `reboot=k` waits for this
    out(rig, PORT_I8042_CMD, 1, 0xfe);
    expect_stop(rig, VM_STOP_RESET, 0);
    rig_free(rig);
}
END_TEST

START_TEST(i8042_probe)
{
    struct rig *rig = rig_with(&i8042_class, NULL);
    ck_assert_uint_eq(in(rig, PORT_I8042_CMD, 1) & 0x01, 0); // nothing to flush
    out(rig, PORT_I8042_CMD, 1, 0xaa);
    ck_assert_uint_eq(in(rig, PORT_I8042_CMD, 1) & 0x03, 0x01);
    ck_assert_uint_eq(in(rig, PORT_I8042_DATA, 1), 0x55);
    ck_assert_uint_eq(in(rig, PORT_I8042_CMD, 1) & 0x01, 0);
    out(rig, PORT_I8042_CMD, 1, 0x60);
    out(rig, PORT_I8042_DATA, 1, 0x47);
    struct rig *other = rig_with(&i8042_class, NULL);
    out(rig, PORT_I8042_CMD, 1, 0x20);
    save_load(rig, other);
    ck_assert_uint_eq(in(other, PORT_I8042_CMD, 1) & 0x01, 0x01);
    ck_assert_uint_eq(in(other, PORT_I8042_DATA, 1), 0x47);
    out(rig, PORT_I8042_CMD, 1, 0xab);
    ck_assert_uint_ne(in(rig, PORT_I8042_DATA, 1), 0); // no keyboard
    out(rig, PORT_I8042_CMD, 1, 0xd3);
    out(rig, PORT_I8042_DATA, 1, 0x5a);
    ck_assert_uint_ne(in(rig, PORT_I8042_DATA, 1), 0x5a); // no mouse
    expect_stop(rig, VM_RUNNING, 0);
    out(rig, PORT_I8042_CMD, 1, 0xd1);
    out(rig, PORT_I8042_DATA, 1, 0x03); // A20 on, no reset
    expect_stop(rig, VM_RUNNING, 0);
    out(rig, PORT_I8042_CMD, 1, 0xd1);
    out(rig, PORT_I8042_DATA, 1, 0x02);
    expect_stop(rig, VM_STOP_RESET, 0);
    rig_free(other);
    rig_free(rig);
    load_bad(&i8042_class, NULL, "full", 2);
}
END_TEST

// --- RTC

static int64_t rig_now(void *arg)
{
    return ((struct rig *)arg)->now;
}

static struct rig *rig_rtc(int64_t seconds)
{
    struct rig *rig = rig_new();
    rig->now = seconds * 1000000;
    struct rtc_config config = {.now = rig_now, .arg = rig};
    rig_add(rig, &rtc_class, &config);
    return rig;
}

static uint8_t cmos(struct rig *rig, uint8_t reg)
{
    out(rig, PORT_RTC, 1, reg);
    return (uint8_t)in(rig, PORT_RTC + 1, 1);
}

static void cmos_set(struct rig *rig, uint8_t reg, uint8_t value)
{
    out(rig, PORT_RTC, 1, reg);
    out(rig, PORT_RTC + 1, 1, value);
}

static void expect_time(struct rig *rig, const uint8_t expected[8])
{
    static const uint8_t regs[8] = {0x32, 9, 8, 7, 6, 4, 2, 0};
    for (unsigned i = 0; i < 8; i++)
        ck_assert_msg(cmos(rig, regs[i]) == expected[i], "register %#x is %#x, expected %#x",
                      regs[i], cmos(rig, regs[i]), expected[i]);
}

START_TEST(rtc_time)
{
    // Sunday 2026-11-22 23:59:58 UTC
    struct rig *rig = rig_rtc(1795391998);
    ck_assert_uint_eq(cmos(rig, 0x0d), 0x80);
    ck_assert_uint_eq(cmos(rig, 0x0c), 0);
    expect_time(rig, (uint8_t[]) {0x20, 0x26, 0x11, 0x22, 0x01, 0x23, 0x59, 0x58});
    cmos_set(rig, 0x0b, 0x06); // binary, 24 h
    expect_time(rig, (uint8_t[]) {20, 26, 11, 22, 1, 23, 59, 58});
    cmos_set(rig, 0x0b, 0x00); // BCD, 12 h
    ck_assert_uint_eq(cmos(rig, 4), 0x91);
    rig->now += 2000000;
    expect_time(rig, (uint8_t[]) {0x20, 0x26, 0x11, 0x23, 0x02, 0x12, 0x00, 0x00});
    // The update flag shows only just before a second ends.
    ck_assert_uint_eq(cmos(rig, 0x0a), 0x26);
    rig->now += 999800;
    ck_assert_uint_eq(cmos(rig, 0x0a), 0xa6);
    rig->now += 200;
    ck_assert_uint_eq(cmos(rig, 0x0a), 0x26);
    rig_free(rig);
}
END_TEST

START_TEST(rtc_set_and_move)
{
    struct rig *rig = rig_rtc(1795391998);
    cmos_set(rig, 0x0b, 0x82); // the clock is held while it is set
    ck_assert_uint_eq(cmos(rig, 0x00), 0x58);
    cmos_set(rig, 0x07, 0x31);
    cmos_set(rig, 0x08, 0x03); // through 31 February, which must not become 3 March
    cmos_set(rig, 0x09, 0x99);
    cmos_set(rig, 0x32, 0x19);
    rig->now += 5000000;
    ck_assert_uint_eq(cmos(rig, 0x00), 0x58);
    cmos_set(rig, 0x0b, 0x02);
    expect_time(rig, (uint8_t[]) {0x19, 0x99, 0x03, 0x31, 0x04, 0x23, 0x59, 0x58});
    cmos_set(rig, 0x40, 0xee);
    out(rig, PORT_RTC, 1, 0x80 | 0x40); // bit 7 masks NMIs

    // The guest's offset travels, the host's clock does not.
    struct rig *other = rig_rtc(1795391998 + 3600);
    save_load(rig, other);
    ck_assert_uint_eq(in(other, PORT_RTC + 1, 1), 0xee);
    ck_assert_uint_eq(cmos(other, 0x07), 0x01); // 3595 s later, so past midnight
    ck_assert_uint_eq(cmos(other, 0x04), 0x00);
    ck_assert_uint_eq(cmos(other, 0x02), 0x59);
    rig_free(other);
    rig_free(rig);
    load_bad(&rtc_class, NULL, "index", 0x80);
    load_bad(&rtc_class, NULL, "offset", INT64_MAX);
    load_bad(&rtc_class, NULL, "offset", (uint64_t)INT64_MIN);
}
END_TEST

START_TEST(rtc_memory_and_hostile)
{
    struct rig *rig = rig_rtc(1795391998);
    ck_assert_uint_eq(cmos(rig, 0x15) | cmos(rig, 0x16) << 8, 640);
    ck_assert_uint_eq(cmos(rig, 0x17) | cmos(rig, 0x18) << 8, 15 * 1024);
    ck_assert_uint_eq(cmos(rig, 0x34) | cmos(rig, 0x35) << 8, 0);
    rig->vm.ram.size = 5 * GiB;
    rtc_class.reset(rig->dev);
    ck_assert_uint_eq(cmos(rig, 0x30) | cmos(rig, 0x31) << 8, 0xffff);
    ck_assert_uint_eq(cmos(rig, 0x34) | cmos(rig, 0x35) << 8, (3 * GiB - 16 * MiB) >> 16);
    ck_assert_uint_eq(cmos(rig, 0x5b) | cmos(rig, 0x5c) << 8 | cmos(rig, 0x5d) << 16,
                      2 * GiB >> 16);
    // Any bytes in the time registers give some time, in bounds, that can be read back.
    unsigned seed = 7;
    for (unsigned i = 0; i < 20000; i++) {
        seed = seed * 1103515245 + 12345;
        cmos_set(rig, seed >> 16 & 0xff, (uint8_t)(seed >> 24));
        cmos(rig, seed >> 9 & 0xff);
    }
    cmos_set(rig, 0x0b, 0x02);
    for (unsigned reg = 0; reg < 10; reg += 2)
        ck_assert_uint_le(cmos(rig, (uint8_t)reg) & 0x0f, 9);
    uint64_t value;
    ck_assert(bus_read(&rig->vm.pio, PORT_RTC, 2, &value));
    ck_assert(bus_write(&rig->vm.pio, PORT_RTC, 2, 0x5a41)); // index and data at once
    ck_assert_uint_eq(cmos(rig, 0x41), 0x5a);
    rig_free(rig);
}
END_TEST

// --- power

static int irq_note(struct vm *vm, unsigned gsi, unsigned level)
{
    struct rig *rig = (struct rig *)vm;
    ck_assert_uint_eq(gsi, GSI_EVENT);
    strcat(rig->irqs, level ? "1" : "0");
    return 0;
}

START_TEST(power_off)
{
    struct rig *rig = rig_with(&power_class, NULL);
    out(rig, PORT_SLEEP, 1, 0x14); // type without enable
    out(rig, PORT_SLEEP, 1, 0x2c); // S3
    out(rig, PORT_SLEEP_STAT, 1, 0x80);
    out(rig, PORT_SLEEP_STAT, 1, 0x34); // not the control register
    expect_stop(rig, VM_RUNNING, 0);
    ck_assert_uint_eq(in(rig, PORT_SLEEP_STAT, 1), 0);
    out(rig, PORT_SLEEP, 1, ACPI_SLEEP_POWEROFF);
    expect_stop(rig, VM_STOP_POWEROFF, 0);
    rig_free(rig);
}
END_TEST

START_TEST(power_button_event)
{
    struct power_config config = {irq_note};
    struct rig *rig = rig_with(&power_class, &config), *other = rig_with(&power_class, &config);
    ck_assert_uint_eq(in(rig, PORT_EVENT, 1), 0);
    power_button(rig->dev);
    ck_assert_str_eq(rig->irqs, "10");
    save_load(rig, other);
    ck_assert_str_eq(other->irqs, "10"); // not lost on the way
    ck_assert_uint_eq(in(rig, PORT_EVENT, 1), ACPI_EVENT_POWER_BUTTON);
    ck_assert_uint_eq(in(rig, PORT_EVENT, 1), 0);
    ck_assert_uint_eq(in(other, PORT_EVENT, 1), ACPI_EVENT_POWER_BUTTON);
    out(rig, PORT_EVENT, 1, 0xff);
    ck_assert_uint_eq(in(rig, PORT_EVENT, 1), 0);
    rig_free(other);
    rig_free(rig);
    load_bad(&power_class, &config, "events", 0x80);
}
END_TEST

START_TEST(generation_id)
{
    struct power_config config = {irq_note};
    struct error err = {0};
    struct rig *rig = rig_with(&power_class, &config), *other = rig_with(&vmgenid_class, NULL);
    struct device *power = rig->dev;
    uint8_t none[VMGENID_LEN] = {0}, first[VMGENID_LEN], theirs[VMGENID_LEN];
    const uint8_t *id = ram_at(&rig->vm.ram, LAYOUT_VMGENID, VMGENID_LEN);
    rig_add(rig, &vmgenid_class, NULL);
    memcpy(first, id, sizeof(first));
    memcpy(theirs, ram_at(&other->vm.ram, LAYOUT_VMGENID, VMGENID_LEN), sizeof(theirs));
    ck_assert_mem_ne(first, none, sizeof(first));
    ck_assert_mem_ne(first, theirs, sizeof(first));
    ck_assert_uint_eq(in(rig, PORT_EVENT, 1), 0); // nobody has seen another one
    ck_assert_int_eq(vmgenid_renew(rig->dev, power, &err), 0);
    ck_assert_mem_ne(first, id, sizeof(first));
    ck_assert_str_eq(rig->irqs, "10");
    power_button(power); // beside it, not instead
    ck_assert_uint_eq(in(rig, PORT_EVENT, 1), ACPI_EVENT_VMGENID | ACPI_EVENT_POWER_BUTTON);
    ck_assert_uint_eq(in(rig, PORT_EVENT, 1), 0);
    rig_free(other);
    rig_free(rig);
}
END_TEST

// --- pvpanic, debug exit, mark

START_TEST(pvpanic)
{
    struct rig *rig = rig_with(&pvpanic_class, NULL);
    ck_assert_uint_eq(in(rig, PORT_PVPANIC, 1), 0x03);
    out(rig, PORT_PVPANIC, 1, 0x02);
    out(rig, PORT_PVPANIC, 1, 0xfc);
    expect_stop(rig, VM_RUNNING, 0);
    out(rig, PORT_PVPANIC, 1, 0x01);
    expect_stop(rig, VM_STOP_PANIC, 0);
    rig_free(rig);
}
END_TEST

START_TEST(debug_exit)
{
    static const struct {
        unsigned size;
        uint32_t value;
    } writes[] = {{1, 0x78}, {2, 0x5678}, {4, 0x12345678}};
    for (unsigned i = 0; i < ARRAY_SIZE(writes); i++) {
        struct rig *rig = rig_with(&debug_exit_class, NULL);
        out(rig, PORT_DEBUG_EXIT + 1, 1, 5); // not its register
        expect_stop(rig, VM_RUNNING, 0);
        in(rig, PORT_DEBUG_EXIT, 4);
        out(rig, PORT_DEBUG_EXIT, writes[i].size, 0xffffffff12345678);
        expect_stop(rig, VM_STOP_DEBUG_EXIT, writes[i].value);
        rig_free(rig);
    }
}
END_TEST

START_TEST(mark)
{
    int fds[2];
    ck_assert(!pipe2(fds, O_NONBLOCK));
    struct mark_config config = {.start_ns = time_ns(), .fd = fds[1]};
    struct rig *rig = rig_with(&mark_class, &config);
    ck_assert_uint_eq(mark_time_ns(rig->dev), 0);
    out(rig, PORT_MARK, 1, UCALL_FIRST_BYTE);
    uint64_t first = mark_time_ns(rig->dev);
    ck_assert_uint_ge(first, config.start_ns);
    ck_assert_uint_le(first, time_ns());
    out(rig, PORT_MARK, 1, 0);
    ck_assert_uint_eq(mark_time_ns(rig->dev), first); // the first one counts
    char text[200] = "", expected[100];
    snprintf(expected, sizeof(expected), "ferry: first guest instruction after %llu ns\n",
             (unsigned long long)(first - config.start_ns));
    ck_assert_int_gt(read(fds[0], text, sizeof(text) - 1), 0);
    ck_assert_str_eq(text, expected);
    rig_free(rig);
    close(fds[0]);
    close(fds[1]);
}
END_TEST

// --- ucall

enum { CALL_GPA = 0x200000, DATA_GPA = 0x201000 };

static bool handle(void *arg, struct ucall_message *m)
{
    struct rig *rig = arg;
    ck_assert_uint_lt(rig->nr_calls, ARRAY_SIZE(rig->calls));
    snprintf(rig->text[rig->nr_calls], sizeof(rig->text[0]), "%s%s%s", m->text, m->file,
             m->expression);
    rig->calls[rig->nr_calls++] = *m;
    if (rig->deal)
        m->result = 42;
    return rig->deal;
}

static struct rig *rig_ucall(void)
{
    struct rig *rig = rig_new();
    struct ucall_config config = {.handle = handle, .arg = rig, .params_set = 1 << UCALL_P_LOOPS};
    config.params[UCALL_P_LOOPS] = 77;
    rig_add(rig, &ucall_class, &config);
    return rig;
}

static uint64_t call_at(struct rig *rig, uint64_t gpa, uint64_t nr, uint64_t a0, uint64_t a1,
                        uint64_t a2)
{
    struct ucall call = {.nr = nr, .args = {a0, a1, a2}, .result = 0x5555};
    ck_assert(!ram_write(&rig->vm.ram, gpa, &call, sizeof(call)));
    out(rig, PORT_UCALL, 4, gpa);
    ck_assert(!ram_read(&rig->vm.ram, gpa, &call, sizeof(call)));
    return call.result;
}

static uint64_t call(struct rig *rig, uint64_t nr, uint64_t a0, uint64_t a1, uint64_t a2)
{
    return call_at(rig, CALL_GPA, nr, a0, a1, a2);
}

START_TEST(ucall_calls)
{
    struct rig *rig = rig_ucall();
    ck_assert_uint_eq(in(rig, PORT_UCALL, 4), UCALL_MAGIC);
    rig->deal = true;
    ck_assert_uint_eq(call(rig, UCALL_SYNC, 3, 4, 0), 42);
    ck_assert_uint_eq(rig->calls[0].nr, UCALL_SYNC);
    ck_assert_uint_eq(rig->calls[0].args[1], 4);
    ck_assert_uint_eq(rig->calls[0].cpu, UINT_MAX);
    rig->deal = false;
    ck_assert_uint_eq(call(rig, UCALL_SYNC, 3, 4, 0), 0);
    ck_assert_uint_eq(call(rig, UCALL_VALUE, UCALL_V_COUNT, 4, 0), 0);
    ck_assert_uint_eq(call(rig, UCALL_GET, UCALL_P_LOOPS, 0, 0), 77);
    ck_assert_uint_eq(call(rig, UCALL_GET, UCALL_P_N, 0, 0), UCALL_NONE);
    ck_assert_uint_eq(call(rig, UCALL_GET, UINT64_MAX, 0, 0), UCALL_NONE);
    expect_stop(rig, VM_RUNNING, 0);
    ck_assert_uint_eq(call(rig, UCALL_DONE, 5, 0, 0), 0);
    expect_stop(rig, VM_STOP_DEBUG_EXIT, 5);
    ck_assert_str_eq(ucall_value_name(UCALL_V_COUNT), "count");
    ck_assert_ptr_null(ucall_value_name(UINT64_MAX));
    rig_free(rig);
}
END_TEST

START_TEST(ucall_text)
{
    struct rig *rig = rig_ucall();
    ck_assert(!ram_write(&rig->vm.ram, DATA_GPA, "hi\x1b[2J\n\xff", 9));
    ck_assert_uint_eq(call(rig, UCALL_PRINT, DATA_GPA, 8, 0), 0);
    ck_assert_str_eq(rig->text[0], "hi\\x1b[2J\n\\xff");
    ck_assert_uint_eq(call(rig, UCALL_PRINT, DATA_GPA, 0, 0), 0);
    ck_assert_str_eq(rig->text[1], "");
    // Too long, outside RAM, wrapping: refused without reaching the handler.
    unsigned before = rig->nr_calls;
    uint64_t end = rig->vm.ram.size;
    ck_assert_uint_eq(call(rig, UCALL_PRINT, DATA_GPA, UCALL_PRINT_MAX + 1, 0), UCALL_NONE);
    ck_assert_uint_eq(call(rig, UCALL_PRINT, DATA_GPA, UINT64_MAX, 0), UCALL_NONE);
    ck_assert_uint_eq(call(rig, UCALL_PRINT, end - 1, 2, 0), UCALL_NONE);
    ck_assert_uint_eq(call(rig, UCALL_PRINT, UINT64_MAX - 1, 16, 0), UCALL_NONE);
    ck_assert_uint_eq(rig->nr_calls, before);
    ck_assert_uint_eq(call(rig, UCALL_PRINT, end - 1, 1, 0), 0);

    // Strings: ended by RAM, by the limit, outside.
    ck_assert(!ram_write(&rig->vm.ram, end - 3, "a\nb", 3));
    uint8_t longer[UCALL_STRING_MAX + 10];
    memset(longer, 'y', sizeof(longer));
    ck_assert(!ram_write(&rig->vm.ram, DATA_GPA, longer, sizeof(longer)));
    call(rig, UCALL_ASSERT, end - 3, 12, UINT64_MAX);
    ck_assert_str_eq(rig->text[rig->nr_calls - 1], "a\nb");
    expect_stop(rig, VM_STOP_PANIC, 0);
    ck_assert_ptr_nonnull(strstr(rig->vm.stop.text, "a\nb:12:"));
    rig_free(rig);

    rig = rig_ucall();
    ck_assert(!ram_write(&rig->vm.ram, DATA_GPA, longer, sizeof(longer)));
    call(rig, UCALL_ASSERT, DATA_GPA, 1, DATA_GPA);
    const char *first = strchr(rig->vm.stop.text, 'y');
    ck_assert_uint_eq(strspn(first, "y"), UCALL_STRING_MAX);
    rig_free(rig);
}
END_TEST

START_TEST(ucall_hostile)
{
    struct rig *rig = rig_ucall();
    struct ucall call_before = {.nr = UCALL_SYNC, .result = 9}, after;
    ck_assert(!ram_write(&rig->vm.ram, CALL_GPA, &call_before, sizeof(call_before)));
    // Misaligned, outside RAM, wrong width.
    out(rig, PORT_UCALL, 4, CALL_GPA + 8);
    out(rig, PORT_UCALL, 4, rig->vm.ram.size);
    out(rig, PORT_UCALL, 4, 0xffffffc0);
    out(rig, PORT_UCALL, 2, CALL_GPA);
    out(rig, PORT_UCALL, 1, CALL_GPA);
    ck_assert_uint_eq(rig->nr_calls, 0);
    ck_assert_uint_eq(in(rig, PORT_UCALL, 1), UINT64_MAX);
    ck_assert(!ram_read(&rig->vm.ram, CALL_GPA, &after, sizeof(after)));
    ck_assert_mem_eq(&after, &call_before, sizeof(after));
    // The last place that fits.
    ck_assert_uint_eq(call_at(rig, rig->vm.ram.size - 64, UCALL_SYNC, 0, 0, 0), 0);
    static const uint64_t unknown[] = {0, 9, 100, UINT64_MAX};
    for (unsigned i = 0; i < ARRAY_SIZE(unknown); i++)
        ck_assert_uint_eq(call(rig, unknown[i], 1, 2, 3), UCALL_NONE);
    expect_stop(rig, VM_RUNNING, 0);
    rig_free(rig);
}
END_TEST

static void *pause_soon(void *arg)
{
    atomic_store(&((struct vm *)arg)->pause, true);
    return NULL;
}

START_TEST(ucall_stop_waits_for_pause)
{
    struct rig *rig = rig_ucall();
    pthread_t thread;
    ck_assert(!pthread_create(&thread, NULL, pause_soon, &rig->vm));
    ck_assert_uint_eq(call(rig, UCALL_STOP, 0, 0, 0), 0);
    ck_assert(atomic_load(&rig->vm.pause));
    pthread_join(thread, NULL);
    rig_free(rig);
}
END_TEST

// --- all together

START_TEST(board)
{
    struct rig *rig = rig_new();
    struct board b;
    struct error err = {0};
    struct ucall_config ucall = {0};
    struct board_config config = {.debug_exit = true, .ucall = &ucall};
    ck_assert_msg(!board_create(&rig->vm, &config, &b, &err), "%s", err.text);
    ck_assert(b.serial && b.power && b.ucall && !b.mark);
    char signature[8];
    ck_assert(!ram_read(&rig->vm.ram, b.rsdp, signature, 8));
    ck_assert_mem_eq(signature, "RSD PTR ", 8);
    uint64_t value;
    ck_assert(!bus_read(&rig->vm.pio, PORT_MARK, 1, &value)); // not asked for
    // Every width at every port near and in a device: answered or not, never wrong.
    for (unsigned port = 0; port < 0x1000; port++)
        for (unsigned size = 1; size <= 8; size *= 2)
            bus_read(&rig->vm.pio, port, size, &value);
    save_load(rig, rig);
    rig_free(rig);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("devices");
    TCase *tc = tcase_create("devices");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, i8042_reset_like_linux);
    tcase_add_test(tc, i8042_probe);
    tcase_add_test(tc, rtc_time);
    tcase_add_test(tc, rtc_set_and_move);
    tcase_add_test(tc, rtc_memory_and_hostile);
    tcase_add_test(tc, power_off);
    tcase_add_test(tc, power_button_event);
    tcase_add_test(tc, generation_id);
    tcase_add_test(tc, pvpanic);
    tcase_add_test(tc, debug_exit);
    tcase_add_test(tc, mark);
    tcase_add_test(tc, ucall_calls);
    tcase_add_test(tc, ucall_text);
    tcase_add_test(tc, ucall_hostile);
    tcase_add_test(tc, ucall_stop_waits_for_pause);
    tcase_add_test(tc, board);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
