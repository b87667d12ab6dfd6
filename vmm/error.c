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
    if (n >= 0 && (size_t)n < sizeof(err->text))
        snprintf(err->text + n, sizeof(err->text) - (size_t)n, ": %s",
                 strerror_r(saved, reason, sizeof(reason)));
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
    if (n >= 0 && (size_t)n < sizeof(err->text))
        snprintf(err->text + n, sizeof(err->text) - (size_t)n, ": %s", tail);
    return err->code;
}
