// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <string.h>
#include <time.h>

#include "devices/platform.h"
#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vm.h"

// Registers: Motorola MC146818 data sheet; memory sizes as PC BIOSes keep them.
enum {
    RTC_SECONDS = 0x00,
    RTC_MINUTES = 0x02,
    RTC_HOURS = 0x04,
    RTC_WEEKDAY = 0x06,
    RTC_DAY = 0x07,
    RTC_MONTH = 0x08,
    RTC_YEAR = 0x09,
    RTC_A = 0x0a,
    RTC_B = 0x0b,
    RTC_C = 0x0c,
    RTC_D = 0x0d,
    RTC_CENTURY = 0x32,
    CMOS_SIZE = 128,
};
enum { A_UPDATE = 0x80, B_SET = 0x80, B_BINARY = 0x04, B_24H = 0x02, D_VALID = 0x80, PM = 0x80 };

enum { MICROS = 1000000, UPDATE_US = 244 }; // the update flag shows this long before each second
enum { NMI_MASK = 0x80 };

// Years that two BCD digits of century can express; what a guest or a stream sets stays within.
#define TIME_MIN INT64_C(-62167219200) // year 0, seconds since 1970
#define TIME_MAX INT64_C(253402300799) // end of year 9999

struct rtc {
    struct device dev;
    int64_t (*now)(void *arg);
    void *arg;
    uint8_t index;
    uint8_t cmos[CMOS_SIZE]; // time registers count only while B_SET is on
    int64_t offset;          // guest's time minus host's UTC, seconds
};

static struct rtc *rtc_of(void *dev)
{
    return container_of((struct device *)dev, struct rtc, dev);
}

static int64_t host_now(void *arg)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * MICROS + t.tv_nsec / 1000;
}

static bool is_time(uint8_t reg)
{
    return reg == RTC_SECONDS || reg == RTC_MINUTES || reg == RTC_HOURS ||
           (reg >= RTC_WEEKDAY && reg <= RTC_YEAR) || reg == RTC_CENTURY;
}

// --- between numbers and what register B says they look like

static uint8_t encode(const struct rtc *r, unsigned value)
{
    return (uint8_t)(r->cmos[RTC_B] & B_BINARY ? value : value / 10 << 4 | value % 10);
}

static unsigned decode(const struct rtc *r, uint8_t value)
{
    return r->cmos[RTC_B] & B_BINARY ? value : (value >> 4) * 10u + (value & 15u);
}

static uint8_t encode_hour(const struct rtc *r, unsigned hour)
{
    if (r->cmos[RTC_B] & B_24H)
        return encode(r, hour);
    return encode(r, hour % 12 ? hour % 12 : 12) | (hour >= 12 ? PM : 0);
}

static unsigned decode_hour(const struct rtc *r, uint8_t value)
{
    if (r->cmos[RTC_B] & B_24H)
        return decode(r, value);
    return decode(r, value & ~PM) % 12 + (value & PM ? 12 : 0);
}

// --- time

static int64_t guest_seconds(const struct rtc *r)
{
    int64_t now = r->now(r->arg);
    int64_t seconds = now / MICROS + r->offset;
    return seconds < TIME_MIN ? TIME_MIN : seconds > TIME_MAX ? TIME_MAX : seconds;
}

static void time_to_cmos(const struct rtc *r, uint8_t *cmos)
{
    time_t seconds = guest_seconds(r);
    struct tm t;
    gmtime_r(&seconds, &t);
    unsigned year = (unsigned)t.tm_year + 1900;
    cmos[RTC_SECONDS] = encode(r, (unsigned)t.tm_sec);
    cmos[RTC_MINUTES] = encode(r, (unsigned)t.tm_min);
    cmos[RTC_HOURS] = encode_hour(r, (unsigned)t.tm_hour);
    cmos[RTC_WEEKDAY] = encode(r, (unsigned)t.tm_wday + 1);
    cmos[RTC_DAY] = encode(r, (unsigned)t.tm_mday);
    cmos[RTC_MONTH] = encode(r, (unsigned)t.tm_mon + 1);
    cmos[RTC_YEAR] = encode(r, year % 100);
    cmos[RTC_CENTURY] = encode(r, year / 100);
}

// Any bytes make some time: timegm normalizes what is out of range.
static void cmos_to_time(struct rtc *r)
{
    const uint8_t *c = r->cmos;
    struct tm t = {
        .tm_sec = (int)decode(r, c[RTC_SECONDS]),
        .tm_min = (int)decode(r, c[RTC_MINUTES]),
        .tm_hour = (int)decode_hour(r, c[RTC_HOURS]),
        .tm_mday = (int)decode(r, c[RTC_DAY]),
        .tm_mon = (int)decode(r, c[RTC_MONTH]) - 1,
        .tm_year = (int)(decode(r, c[RTC_CENTURY]) * 100 + decode(r, c[RTC_YEAR])) - 1900,
    };
    int64_t seconds = timegm(&t);
    if (seconds < TIME_MIN)
        seconds = TIME_MIN;
    if (seconds > TIME_MAX)
        seconds = TIME_MAX;
    r->offset = seconds - r->now(r->arg) / MICROS;
}

// --- registers

static uint8_t reg_read(struct rtc *r, uint8_t reg)
{
    bool set = r->cmos[RTC_B] & B_SET;
    uint8_t cmos[CMOS_SIZE];
    switch (reg) {
    case RTC_A:
        if (!set && r->now(r->arg) % MICROS >= MICROS - UPDATE_US)
            return r->cmos[RTC_A] | A_UPDATE;
        return r->cmos[RTC_A];
    case RTC_C:
        return 0; // no alarm, no periodic interrupt
    case RTC_D:
        return D_VALID;
    default:
        if (!is_time(reg) || set)
            return r->cmos[reg];
        time_to_cmos(r, cmos);
        return cmos[reg];
    }
}

static void control_write(struct rtc *r, uint8_t value)
{
    bool was_set = r->cmos[RTC_B] & B_SET;
    if (!was_set && value & B_SET)
        time_to_cmos(r, r->cmos); // in the old format, as the registers stood
    r->cmos[RTC_B] = value;
    if (was_set && !(value & B_SET))
        cmos_to_time(r);
}

static void reg_write(struct rtc *r, uint8_t reg, uint8_t value)
{
    switch (reg) {
    case RTC_A:
        r->cmos[RTC_A] = value & ~A_UPDATE;
        return;
    case RTC_B:
        control_write(r, value);
        return;
    case RTC_C:
    case RTC_D:
        return;
    default:
        break;
    }
    bool running = is_time(reg) && !(r->cmos[RTC_B] & B_SET);
    if (running)
        time_to_cmos(r, r->cmos);
    r->cmos[reg] = value;
    if (running)
        cmos_to_time(r);
}

static uint64_t rtc_read(void *dev, uint64_t offset, unsigned size)
{
    struct rtc *r = rtc_of(dev);
    if (size != 1 || offset == 0)
        return ~0ull; // the index is write-only on a PC
    return reg_read(r, r->index);
}

static void rtc_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct rtc *r = rtc_of(dev);
    if (offset == 0)
        r->index = (uint8_t)value & (uint8_t)~NMI_MASK;
    // A 16-bit `out` writes index and data at once.
    if (offset == 1 || size == 2)
        reg_write(r, r->index, (uint8_t)(offset == 1 ? value : value >> 8));
}

static const struct bus_ops rtc_ops = {rtc_read, rtc_write};

// --- life

static void put16(uint8_t *at, uint64_t value)
{
    if (value > 0xffff)
        value = 0xffff;
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static void memory_sizes(uint8_t *cmos, const struct ram *ram)
{
    uint64_t low = ram->size < LAYOUT_RAM_LOW_MAX ? ram->size : LAYOUT_RAM_LOW_MAX;
    uint64_t high = (ram->size - low) / (64 * KiB);
    if (high > 0xffffff)
        high = 0xffffff;
    put16(&cmos[0x15], 640);                                                // base, KiB
    put16(&cmos[0x17], low > MiB ? (low - MiB) / KiB : 0);                  // above 1 MiB, KiB
    put16(&cmos[0x30], low > MiB ? (low - MiB) / KiB : 0);                  // again
    put16(&cmos[0x34], low > 16 * MiB ? (low - 16 * MiB) / (64 * KiB) : 0); // above 16 MiB, 64 KiB
    put16(&cmos[0x5b], high & 0xffff);                                      // above 4 GiB, 64 KiB
    cmos[0x5d] = (uint8_t)(high >> 16);
}

static void rtc_reset(struct device *dev)
{
    struct rtc *r = rtc_of(dev);
    r->index = 0;
    memset(r->cmos, 0, sizeof(r->cmos));
    r->cmos[RTC_A] = 0x26; // 32768 Hz time base, 1024 Hz rate: what a BIOS sets
    r->cmos[RTC_B] = B_24H;
    memory_sizes(r->cmos, &dev->vm->ram);
}

static int rtc_realize(struct device *dev, const void *config, struct error *err)
{
    struct rtc *r = rtc_of(dev);
    const struct rtc_config *c = config;
    r->now = c && c->now ? c->now : host_now;
    r->arg = c ? c->arg : NULL;
    rtc_reset(dev);
    struct bus_range range = {PORT_RTC, 2, "rtc", &rtc_ops, dev, &dev->lock};
    return bus_add(&dev->vm->pio, &range, err);
}

static int rtc_load(void *object, uint16_t version, struct error *err)
{
    struct rtc *r = object;
    int64_t limit = TIME_MAX - TIME_MIN;
    int64_t offset = r->offset;
    if (r->index < CMOS_SIZE && offset >= -limit && offset <= limit)
        return 0;
    uint8_t index = r->index;
    r->index = 0;
    r->offset = 0;
    return error_set(err, -EINVAL,
                     "rtc: saved index 0x%02x (at most 0x7f) or clock offset %lld s "
                     "(at most %lld)",
                     index, (long long)offset, (long long)limit);
}

static const struct state_field rtc_fields[] = {
    STATE_FIELD_INT(struct rtc, index, 1),
    STATE_FIELD_BYTES(struct rtc, cmos, 1),
    STATE_FIELD_INT(struct rtc, offset, 1),
};

static const struct state_table rtc_state = {.name = "rtc",
                                             .version = 1,
                                             .oldest = 1,
                                             .nr_fields = ARRAY_SIZE(rtc_fields),
                                             .fields = rtc_fields,
                                             .load = rtc_load};

const struct device_class rtc_class = {.name = "rtc",
                                       .size = sizeof(struct rtc),
                                       .realize = rtc_realize,
                                       .reset = rtc_reset,
                                       .state = &rtc_state};
