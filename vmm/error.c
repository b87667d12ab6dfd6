// SPDX-License-Identifier: Apache-2.0
#include "vmm/error.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

int error_set(struct error *err, int code, const char *fmt, ...)
{
    if (!err)
        return code;
    err->code = code;
    va_list args;
    va_start(args, fmt);
    vsnprintf(err->text, sizeof(err->text), fmt, args);
    va_end(args);
    return code;
}

// ": <tail>" after the first `len` bytes, cut where the text is full.
static void append(struct error *err, size_t len, const char *tail)
{
    if (len + sizeof(": ") > sizeof(err->text))
        return;
    memcpy(err->text + len, ": ", 2);
    len += 2;
    size_t n = strlen(tail), room = sizeof(err->text) - 1 - len;
    n = n < room ? n : room;
    memcpy(err->text + len, tail, n);
    err->text[len + n] = 0;
}

int error_errno(struct error *err, const char *fmt, ...)
{
    int saved = errno;
    if (!err)
        return -saved;
    err->code = -saved;
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(err->text, sizeof(err->text), fmt, args);
    va_end(args);
    char reason[128];
    if (n >= 0)
        append(err, (size_t)n, strerror_r(saved, reason, sizeof(reason)));
    return -saved;
}

int error_prefix(struct error *err, const char *fmt, ...)
{
    if (!err)
        return -EINVAL;
    char tail[ERROR_TEXT_MAX];
    memcpy(tail, err->text, sizeof(tail));
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(err->text, sizeof(err->text), fmt, args);
    va_end(args);
    if (n >= 0)
        append(err, (size_t)n, tail);
    return err->code;
}
