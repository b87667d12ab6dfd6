// SPDX-License-Identifier: Apache-2.0
// Log lines on stderr. What a guest can provoke goes through log_limited, so that it cannot flood.
#pragma once

#include <stdatomic.h>
#include <stdint.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

struct log {
    const char *name; // put before each line, e.g. the VM's name
    enum log_level level;
    int fd;
};

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
