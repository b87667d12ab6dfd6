// SPDX-License-Identifier: Apache-2.0
// Spans of time as people write them, and a log of failures that an MTBF is measured from. Pure.
//
// The log is text, one entry a line, oldest first; a `#` begins a comment:
//
//   2026-11-21T15:40:54Z start     from here on it was watched
//   1795276154                     a failure, in seconds since 1970 (or as above)
//   2026-11-23T08:00:00Z stop      not watched any more
//   36h                            it ran for so long, then failed
//
// Without `start` the first moment begins the time that was watched; after the last entry it goes
// on until now, unless that was a `stop`.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "vmm/error.h"

#define FAILURES_SPAN_MAX 1e10    // seconds, 300 years
#define FAILURES_MTBF     86400.0 // what is assumed of a host before it is known better

enum { FAILURES_LOG_MAX = 1024 * 1024, FAILURES_LINE_MAX = 120, FAILURES_TEXT_MAX = 24 };

// "10s", "24h", "1h30m", "250ms", "1.5d", "30" (seconds). Units: us ms s m h d w y. More than 0 and
// at most FAILURES_SPAN_MAX, or -EINVAL.
int duration_parse(const char *text, double *seconds);
// Two significant units or three figures: "131 s", "24 h", "1.5 ms". FAILURES_TEXT_MAX bytes.
void duration_format(double seconds, char *text);

struct failures {
    double watched; // seconds
    unsigned count;
};

// `now`: seconds since 1970. Bytes of a file that may hold anything: the error names the line.
int failures_parse(const char *text, size_t len, int64_t now, struct failures *out,
                   struct error *err);
// The time that was watched, and one day that ended with a failure, which soon weighs nothing:
// so a short log, or none, gives a sane figure.
double failures_mtbf(const struct failures *failures);
