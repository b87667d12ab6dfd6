// SPDX-License-Identifier: Apache-2.0
// Rate limits of a device: one token bucket for bytes, one for operations.
//
// A bucket holds at most `size` tokens, is filled from empty to full in `refill_ms`, and starts
// full. `one_time_burst` tokens are there beside it once, and are used first. A request takes from
// both buckets or from neither. One that is larger than a bucket passes when that is full, and
// leaves a debt that the refill pays first: so the rate holds whatever the requests' sizes.
//
// Pure: no clock, no thread, no allocation. `now_ns` is any clock that does not go back; a reading
// before an earlier one counts as that. The caller's lock is held around every call.
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmm/error.h"

struct rate_bucket_config {
    uint64_t size; // tokens, at most RATE_TOKENS_MAX; 0: no limit
    uint64_t one_time_burst;
    uint32_t refill_ms; // not 0 unless size is
};

struct rate_limit_config {
    struct rate_bucket_config bytes, ops;
};

#define RATE_TOKENS_MAX (1ull << 48)

struct rate_bucket {
    uint64_t size, refill_ns, burst_left;
    __int128 level; // in parts of a token: refill_ns parts each, `size` of them come each ns
    uint64_t at_ns; // of `level`
};

struct rate_limit {
    struct rate_limit_config config;
    struct rate_bucket bytes, ops;
};

void rate_limit_init(struct rate_limit *r, const struct rate_limit_config *config, uint64_t now_ns);
// New limits for one that is in use. A bucket whose numbers stay goes on as it is; another keeps
// the tokens it has, up to its new size (a debt is forgiven), and one that was without limit starts
// full. A one-time burst is given again when its number changes.
void rate_limit_change(struct rate_limit *r, const struct rate_limit_config *config,
                       uint64_t now_ns);

// All of it or nothing. Amounts above RATE_TOKENS_MAX count as that.
bool rate_limit_take(struct rate_limit *r, uint64_t bytes, uint64_t ops, uint64_t now_ns);
// Nanoseconds until rate_limit_take would succeed if nobody else takes; 0: now.
uint64_t rate_limit_wait(struct rate_limit *r, uint64_t bytes, uint64_t ops, uint64_t now_ns);
bool rate_limited(const struct rate_limit *r); // whether there is a limit at all

// One setting, as in "--disk FILE,bps=100M" or `ferry set VM disk0.bps=100M`:
//   bps=SIZE, iops=N: a bucket of that size, filled within a second; 0: no limit
//   burst-bytes=SIZE, burst-ops=N: its one-time burst
//   bytes-bucket, ops-bucket=SIZE/BURST/MS: a bucket in full; size or time 0: no limit
// -ENOENT (and nothing in `err`): no key of ours. -EINVAL: a bad value.
int rate_limit_key(struct rate_limit_config *config, const char *key, const char *value,
                   struct error *err);
// The same for the `len` bytes "key=value" of an option's text.
int rate_limit_word(struct rate_limit_config *config, const char *word, size_t len,
                    struct error *err);
// After the last word: a burst needs its limit.
int rate_limit_check(const struct rate_limit_config *config, struct error *err);
// Adds the four keys to what `ferry info` shows, those that are set.
void rate_limit_show(const struct rate_limit_config *config, json_t *out);
