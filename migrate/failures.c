// SPDX-License-Identifier: Apache-2.0
#include "migrate/failures.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/util.h"

static const struct {
    const char *name;
    double seconds;
} units[] = {{"us", 1e-6}, {"ms", 1e-3}, {"s", 1},      {"m", 60},
             {"h", 3600},  {"d", 86400}, {"w", 604800}, {"y", 31557600}};

// Digits with at most one point: no sign, exponent, hexadecimal or "inf", which strtod would take.
static const char *number_parse(const char *p, double *value)
{
    double scale = 0;
    unsigned digits = 0;
    *value = 0;
    for (; (*p >= '0' && *p <= '9') || (*p == '.' && !scale); p++) {
        if (*p == '.') {
            scale = 1;
            continue;
        }
        if (++digits > 18)
            return NULL;
        scale /= 10;
        *value = scale ? *value + (*p - '0') * scale : *value * 10 + (*p - '0');
    }
    return digits ? p : NULL;
}

static const char *unit_parse(const char *p, double *unit)
{
    size_t len = strspn(p, "abcdefghijklmnopqrstuvwxyz");
    for (size_t i = 0; i < ARRAY_SIZE(units); i++)
        if (strlen(units[i].name) == len && !strncmp(units[i].name, p, len)) {
            *unit = units[i].seconds;
            return p + len;
        }
    return NULL;
}

int duration_parse(const char *text, double *seconds)
{
    double sum = 0, value, unit, before = INFINITY;
    const char *p = number_parse(text, &value);
    if (p && !*p) {
        sum = value;
    } else {
        for (p = text; *p; before = unit) {
            p = number_parse(p, &value);
            if (p)
                p = unit_parse(p, &unit);
            if (!p || unit >= before) // "1h30m", not "30m1h"
                return -EINVAL;
            sum += value * unit;
        }
    }
    if (!(sum > 0) || sum > FAILURES_SPAN_MAX)
        return -EINVAL;
    *seconds = sum;
    return 0;
}

void duration_format(double seconds, char *text)
{
    static const struct {
        const char *name;
        double seconds, from;
    } scale[] = {{"y", 31557600, 31557600},
                 {"d", 86400, 2 * 86400},
                 {"h", 3600, 3600},
                 {"min", 60, 180},
                 {"s", 1, 1},
                 {"ms", 1e-3, 1e-3},
                 {"us", 1e-6, 0}};
    size_t i = 0;
    while (i + 1 < ARRAY_SIZE(scale) && seconds < scale[i].from)
        i++;
    double value = seconds / scale[i].seconds;
    int decimals = value >= 99.95 || fabs(value - round(value)) < 5e-4 * value ? 0
                   : value >= 9.995                                            ? 1
                                                                               : 2;
    snprintf(text, FAILURES_TEXT_MAX, "%.*f %s", decimals, value, scale[i].name);
}

// --- the log

// Days since 1970 of a date of the Gregorian calendar: years begin in March here, so that the
// leap day is their last.
static int64_t days_from_date(int year, int month, int day)
{
    int64_t y = month > 2 ? year : year - 1;
    int64_t in_year = (153 * (month > 2 ? month - 3 : month + 9) + 2) / 5 + day - 1;
    return y * 365 + y / 4 - y / 100 + y / 400 + in_year - 719468;
}

static bool date_is_valid(int year, int month, int day)
{
    static const int days[] = {31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    bool leap = year % 4 == 0 && (year % 100 || year % 400 == 0);
    return year >= 1970 && month >= 1 && month <= 12 && day >= 1 &&
           day <= days[month - 1] - (month == 2 && !leap);
}

// "2026-11-21T15:40:54Z", exactly so.
static bool stamp_parse(const char *word, int64_t *seconds)
{
    static const char shape[] = "dddd-dd-ddTdd:dd:ddZ";
    int field[6] = {0};
    unsigned f = 0;
    if (strlen(word) != sizeof(shape) - 1)
        return false;
    for (size_t i = 0; shape[i]; i++) {
        if (shape[i] == 'd' ? word[i] < '0' || word[i] > '9' : word[i] != shape[i])
            return false;
        if (shape[i] == 'd')
            field[f] = field[f] * 10 + (word[i] - '0');
        else
            f++;
    }
    if (!date_is_valid(field[0], field[1], field[2]) || field[3] > 23 || field[4] > 59 ||
        field[5] > 60)
        return false;
    *seconds = days_from_date(field[0], field[1], field[2]) * 86400 + field[3] * 3600 +
               field[4] * 60 + field[5];
    return true;
}

static bool moment_parse(const char *word, int64_t *seconds)
{
    size_t len = strspn(word, "0123456789");
    if (len >= 9 && len <= 11 && !word[len]) { // fewer digits: a span of seconds
        *seconds = strtoll(word, NULL, 10);
        return true;
    }
    return stamp_parse(word, seconds);
}

struct log_reader {
    struct failures *out;
    int64_t now, last; // last: the moment up to which `watched` counts
    bool any, watching;
};

// One entry; what is wrong with it, or NULL.
static const char *entry_take(struct log_reader *r, const char *first, const char *second)
{
    int64_t at;
    double span;
    bool start = !strcmp(second, "start"), stop = !strcmp(second, "stop");
    if (*second && !start && !stop)
        return "expected start, stop or nothing after the time";
    if (!moment_parse(first, &at)) {
        if (*second || duration_parse(first, &span))
            return "expected a time (2026-11-21T15:40:54Z, or seconds since 1970) or a span (36h)";
        r->out->watched += span;
        r->out->count++;
        return r->out->watched > FAILURES_SPAN_MAX ? "the spans are too long" : NULL;
    }
    if (at > r->now)
        return "lies in the future";
    if (r->any && at < r->last)
        return "is earlier than the line before";
    if (r->watching)
        r->out->watched += (double)(at - r->last);
    // A failure that begins the log says since when it was watched, and nothing about how often.
    if (!start && !stop && r->watching)
        r->out->count++;
    r->any = true;
    r->watching = !stop;
    r->last = at;
    return NULL;
}

static const char *line_take(struct log_reader *r, const char *line, size_t len, char *word)
{
    char rest[FAILURES_LINE_MAX + 1], more;
    char copy[FAILURES_LINE_MAX + 1];
    *word = 0;
    if (len > FAILURES_LINE_MAX)
        return "is too long";
    if (memchr(line, 0, len))
        return "has a zero byte";
    memcpy(copy, line, len);
    copy[len] = 0;
    copy[strcspn(copy, "#")] = 0;
    int n = sscanf(copy, "%120s %120s %c", word, rest, &more);
    if (n <= 0)
        return NULL;
    return n > 2 ? "has more than two words" : entry_take(r, word, n == 2 ? rest : "");
}

int failures_parse(const char *text, size_t len, int64_t now, struct failures *out,
                   struct error *err)
{
    struct log_reader reader = {.out = out, .now = now};
    *out = (struct failures) {0};
    if (len > FAILURES_LOG_MAX)
        return error_set(err, -EFBIG, "%zu bytes of failure log: at most %d", len,
                         FAILURES_LOG_MAX);
    unsigned number = 0;
    for (size_t at = 0; at < len;) {
        char word[FAILURES_LINE_MAX + 1];
        const char *line = text + at, *end = memchr(line, '\n', len - at);
        size_t n = end ? (size_t)(end - line) : len - at;
        const char *wrong = line_take(&reader, line, n, word);
        number++;
        if (wrong)
            return error_set(err, -EINVAL, "line %u, '%.40s': %s", number, word, wrong);
        at += n + 1;
    }
    if (reader.watching)
        out->watched += (double)(now - reader.last);
    return 0;
}

double failures_mtbf(const struct failures *failures)
{
    return (failures->watched + FAILURES_MTBF) / (failures->count + 1);
}
