// SPDX-License-Identifier: Apache-2.0
// Errors are values: a function that can fail returns 0 or -errno, and says in a
// `struct error` what failed, on which object and with which value.
#pragma once

#include <stdarg.h>

enum { ERROR_TEXT_MAX = 512 };

struct error {
    int code; // -errno, 0 = no error
    char text[ERROR_TEXT_MAX];
};

// Sets `err` (which may be NULL) and returns `code`, so that callers write
// `return error_set(err, -EINVAL, "memory %lu MiB: at least 16", n);`. `code` must be negative.
int error_set(struct error *err, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

// As error_set with code -errno; appends ": <strerror(errno)>". Returns -errno.
int error_errno(struct error *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

// Puts "<context>: " before the text already in `err`; returns err->code.
int error_prefix(struct error *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
