// SPDX-License-Identifier: Apache-2.0
#include "vmm/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "vmm/util.h"

enum { LOG_BURST = 10 }; // lines a second for what a guest can provoke

static const char *const names[] = {"error", "warning", "info", "debug"};

bool log_is_journal(int fd)
{
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long dev, inode;
    struct stat st;
    return stream && sscanf(stream, "%llu:%llu", &dev, &inode) == 2 && !fstat(fd, &st) &&
           st.st_dev == dev && st.st_ino == inode;
}

static size_t text_line(const struct log *log, enum log_level level, const char *text, char *line,
                        size_t size)
{
    const char *name = log->name ? log->name : "";
    bool plain = level == LOG_INFO;
    int n = snprintf(line, size, "ferry: %s%s%s%s%s", name, *name ? ": " : "",
                     plain ? "" : names[level], plain ? "" : ": ", text);
    return n < 0 ? 0 : (size_t)n;
}

// As a JSON string's inside. Bytes beyond ASCII may be cut in the middle, so they are not trusted.
static size_t json_escape(const char *text, char *out, size_t size)
{
    size_t n = 0;
    for (; *text && n + 7 < size; text++) {
        unsigned char c = (unsigned char)*text;
        if (c < ' ' || c > '~' || c == '"' || c == '\\')
            n += (size_t)snprintf(out + n, size - n, "\\u%04x", c > '~' ? '?' : c);
        else
            out[n++] = (char)c;
    }
    out[n] = 0;
    return n;
}

static size_t json_line(const struct log *log, enum log_level level, const char *text, char *line,
                        size_t size)
{
    struct timespec now;
    struct tm tm;
    char when[32], name[200];
    clock_gettime(CLOCK_REALTIME, &now);
    strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%S", gmtime_r(&now.tv_sec, &tm));
    json_escape(log->name ? log->name : "", name, sizeof(name));
    size_t n = (size_t)snprintf(
        line, size, "{\"time\": \"%s.%06ldZ\", \"level\": \"%s\", \"vm\": \"%s\", \"text\": \"",
        when, now.tv_nsec / 1000, names[level], name);
    n += json_escape(text, line + n, size - n - 2);
    return n + (size_t)snprintf(line + n, size - n, "\"}");
}

// One write per line, so that lines of several threads do not mix.
static void write_line(const struct log *log, enum log_level level, const char *fmt, va_list args)
{
    static const char priority[] = "3467"; // syslog's err, warning, info, debug
    char text[4096], line[4096 + 512];
    size_t n = 0;
    vsnprintf(text, sizeof(text) - 512, fmt, args);
    if (log->journal)
        n = (size_t)snprintf(line, sizeof(line), "<%c>", priority[level]);
    size_t room = sizeof(line) - n - 1;
    n += log->format == LOG_JSON ? json_line(log, level, text, line + n, room)
                                 : text_line(log, level, text, line + n, room);
    line[n++] = '\n';
    write_all(log->fd, line, n);
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
