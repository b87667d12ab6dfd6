// SPDX-License-Identifier: Apache-2.0
// Log lines on stderr. What a guest can provoke goes through log_limited, so that it cannot flood.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

// Text: "ferry: NAME: warning: ...". JSON: an object a line, with time, level, vm and text.
enum log_format { LOG_TEXT, LOG_JSON };

struct log {
    const char *name; // put before each line, e.g. the VM's name
    enum log_level level;
    int fd;
    enum log_format format;
    bool journal; // fd is systemd's journal: each line begins with its priority (sd-daemon(3))
};

// Whether `fd` is the journal's, by $JOURNAL_STREAM.
bool log_is_journal(int fd);

// At most `burst` lines a second pass; the next that passes says how many were dropped.
struct log_limit {
    _Atomic uint64_t second;
    _Atomic uint32_t passed;
    _Atomic uint32_t dropped;
};

void log_write(const struct log *log, enum log_level level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
void log_limited(const struct log *log, struct log_limit *limit, enum log_level level,
                 const char *fmt, ...) __attribute__((format(printf, 4, 5)));
