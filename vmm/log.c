// SPDX-License-Identifier: Apache-2.0
#include "vmm/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "vmm/util.h"

enum { LOG_BURST = 10 }; // lines a second for what a guest can provoke

// One write per line, so that lines of several threads do not mix.
static void write_line(const struct log *log, enum log_level level, const char *fmt, va_list args)
{
    static const char *const prefix[] = {"error: ", "warning: ", "", "debug: "};
    char line[4096];
    int n = snprintf(line, sizeof(line), "ferry: %s%s%s", log->name ? log->name : "",
                     log->name ? ": " : "", prefix[level]);
    int m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, fmt, args);
    size_t len = (size_t)n + (m < 0 ? 0 : (size_t)m);
    if (len > sizeof(line) - 2)
        len = sizeof(line) - 2;
    line[len++] = '\n';
    write_all(log->fd, line, len);
}

void log_write(const struct log *log, enum log_level level, const char *fmt, ...)
{
    if (level > log->level)
        return;
    va_list args;
    va_start(args, fmt);
    write_line(log, level, fmt, args);
    va_end(args);
}

void log_limited(const struct log *log, struct log_limit *limit, enum log_level level,
                 const char *fmt, ...)
{
    if (level > log->level)
        return;
    uint64_t second = time_ns() / 1000000000u;
    uint64_t seen = atomic_load(&limit->second);
    if (seen != second && atomic_compare_exchange_strong(&limit->second, &seen, second)) {
        atomic_store(&limit->passed, 0);
        uint32_t dropped = atomic_exchange(&limit->dropped, 0);
        if (dropped)
            log_write(log, level, "(%u similar lines dropped)", dropped);
    }
    if (atomic_fetch_add(&limit->passed, 1) >= LOG_BURST) {
        atomic_fetch_add(&limit->dropped, 1);
        return;
    }
    va_list args;
    va_start(args, fmt);
    write_line(log, level, fmt, args);
    va_end(args);
}
