// SPDX-License-Identifier: Apache-2.0
#include "devices/rate_limit.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/util.h"

enum { NS_PER_MS = 1000000, PERIOD_MS = 1000 };

// --- one bucket

static __int128 bucket_full(const struct rate_bucket *b)
{
    return (__int128)b->size * b->refill_ns;
}

static void bucket_refill(struct rate_bucket *b, uint64_t now_ns)
{
    if (now_ns <= b->at_ns)
        return;
    // size < 2^49 and 64 bits of time: far from the ends of 128 bits, as a debt is (2^49 * 2^52).
    b->level += (__int128)b->size * (now_ns - b->at_ns);
    if (b->level > bucket_full(b))
        b->level = bucket_full(b);
    b->at_ns = now_ns;
}

static void bucket_init(struct rate_bucket *b, const struct rate_bucket_config *c, uint64_t now_ns)
{
    *b = (struct rate_bucket) {.size = c->size,
                               .refill_ns = (uint64_t)c->refill_ms * NS_PER_MS,
                               .burst_left = c->one_time_burst,
                               .at_ns = now_ns};
    b->level = bucket_full(b);
}

// What the bucket itself must give for `n` tokens: the burst gives the rest.
static uint64_t bucket_share(const struct rate_bucket *b, uint64_t n)
{
    return n > b->burst_left ? n - b->burst_left : 0;
}

// Parts that are missing before `n` tokens may be taken; <= 0: none.
static __int128 bucket_lack(const struct rate_bucket *b, uint64_t n)
{
    uint64_t share = bucket_share(b, n);
    if (!b->size || !share)
        return 0;
    return (__int128)(share < b->size ? share : b->size) * b->refill_ns - b->level;
}

static void bucket_take(struct rate_bucket *b, uint64_t n)
{
    if (!b->size)
        return;
    uint64_t share = bucket_share(b, n);
    b->burst_left -= n - share;
    b->level -= (__int128)share * b->refill_ns;
}

static uint64_t bucket_wait(const struct rate_bucket *b, uint64_t n)
{
    __int128 lack = bucket_lack(b, n);
    if (lack <= 0)
        return 0;
    __int128 ns = (lack + b->size - 1) / b->size;
    return ns > INT64_MAX ? INT64_MAX : (uint64_t)ns;
}

static bool bucket_same(const struct rate_bucket_config *a, const struct rate_bucket_config *b)
{
    return a->size == b->size && a->one_time_burst == b->one_time_burst &&
           a->refill_ms == b->refill_ms;
}

static void bucket_change(struct rate_bucket *b, const struct rate_bucket_config *from,
                          const struct rate_bucket_config *to, uint64_t now_ns)
{
    if (bucket_same(from, to))
        return;
    struct rate_bucket old = *b;
    bucket_refill(&old, now_ns);
    bucket_init(b, to, now_ns);
    if (from->one_time_burst == to->one_time_burst)
        b->burst_left = old.burst_left;
    if (!old.size)
        return;
    __int128 tokens = old.level > 0 ? old.level / old.refill_ns : 0;
    if (tokens < b->size)
        b->level = tokens * b->refill_ns;
}

// --- both

void rate_limit_init(struct rate_limit *r, const struct rate_limit_config *config, uint64_t now_ns)
{
    r->config = *config;
    bucket_init(&r->bytes, &config->bytes, now_ns);
    bucket_init(&r->ops, &config->ops, now_ns);
}

void rate_limit_change(struct rate_limit *r, const struct rate_limit_config *config,
                       uint64_t now_ns)
{
    bucket_change(&r->bytes, &r->config.bytes, &config->bytes, now_ns);
    bucket_change(&r->ops, &r->config.ops, &config->ops, now_ns);
    r->config = *config;
}

static uint64_t amount(uint64_t n)
{
    return n < RATE_TOKENS_MAX ? n : RATE_TOKENS_MAX;
}

bool rate_limit_take(struct rate_limit *r, uint64_t bytes, uint64_t ops, uint64_t now_ns)
{
    if (rate_limit_wait(r, bytes, ops, now_ns))
        return false;
    bucket_take(&r->bytes, amount(bytes));
    bucket_take(&r->ops, amount(ops));
    return true;
}

uint64_t rate_limit_wait(struct rate_limit *r, uint64_t bytes, uint64_t ops, uint64_t now_ns)
{
    bucket_refill(&r->bytes, now_ns);
    bucket_refill(&r->ops, now_ns);
    uint64_t a = bucket_wait(&r->bytes, amount(bytes)), b = bucket_wait(&r->ops, amount(ops));
    return a > b ? a : b;
}

bool rate_limited(const struct rate_limit *r)
{
    return r->bytes.size || r->ops.size;
}

// --- words

static int tokens_parse(const char *key, const char *value, bool bytes, uint64_t *tokens,
                        struct error *err)
{
    // Operations are counted in plain numbers: nobody should have to wonder whether 1K is 1024.
    bool plain = value[strspn(value, "0123456789")] == 0;
    if ((!bytes && !plain) || size_parse(value, 1, tokens) || *tokens > RATE_TOKENS_MAX)
        return error_set(err, -EINVAL, "%s=%.40s: expected %s, at most 2^48, 0 = none", key, value,
                         bytes ? "bytes, e.g. 100M" : "a number");
    return 0;
}

// "SIZE/BURST/MS": a bucket in full.
static int bucket_parse(const char *key, const char *text, struct rate_bucket_config *bucket,
                        struct error *err)
{
    unsigned long long size, burst, ms;
    char end;
    if (sscanf(text, "%llu/%llu/%llu%c", &size, &burst, &ms, &end) != 3 || strchr(text, '-') ||
        size > RATE_TOKENS_MAX || burst > RATE_TOKENS_MAX || ms > UINT32_MAX)
        return error_set(err, -EINVAL,
                         "%s '%.60s': expected SIZE/BURST/MILLISECONDS, at most %llu tokens", key,
                         text, RATE_TOKENS_MAX);
    *bucket = (struct rate_bucket_config) {0};
    if (size && ms)
        *bucket = (struct rate_bucket_config) {
            .size = size, .one_time_burst = burst, .refill_ms = (uint32_t)ms};
    return 0;
}

int rate_limit_key(struct rate_limit_config *config, const char *key, const char *value,
                   struct error *err)
{
    const struct {
        const char *key;
        struct rate_bucket_config *bucket;
        bool burst;
    } keys[] = {{"bps", &config->bytes, false},
                {"iops", &config->ops, false},
                {"burst-bytes", &config->bytes, true},
                {"burst-ops", &config->ops, true}};
    if (!strcmp(key, "bytes-bucket"))
        return bucket_parse(key, value, &config->bytes, err);
    if (!strcmp(key, "ops-bucket"))
        return bucket_parse(key, value, &config->ops, err);
    for (size_t i = 0; i < ARRAY_SIZE(keys); i++) {
        uint64_t tokens;
        if (strcmp(key, keys[i].key))
            continue;
        struct rate_bucket_config *bucket = keys[i].bucket;
        int ret = tokens_parse(key, value, bucket == &config->bytes, &tokens, err);
        if (ret)
            return ret;
        if (keys[i].burst) {
            bucket->one_time_burst = tokens;
        } else {
            bucket->size = tokens;
            bucket->refill_ms = tokens ? PERIOD_MS : 0;
        }
        return 0;
    }
    return -ENOENT;
}

int rate_limit_word(struct rate_limit_config *config, const char *word, size_t len,
                    struct error *err)
{
    char text[64];
    const char *equals = memchr(word, '=', len);
    if (!equals || len >= sizeof(text))
        return -ENOENT;
    memcpy(text, word, len);
    text[len] = 0;
    text[equals - word] = 0;
    return rate_limit_key(config, text, text + (equals - word) + 1, err);
}

int rate_limit_check(const struct rate_limit_config *config, struct error *err)
{
    if (config->bytes.one_time_burst && !config->bytes.size)
        return error_set(err, -EINVAL, "burst-bytes without a limit: expected bps, too");
    if (config->ops.one_time_burst && !config->ops.size)
        return error_set(err, -EINVAL, "burst-ops without a limit: expected iops, too");
    return 0;
}

void rate_limit_show(const struct rate_limit_config *config, json_t *out)
{
    const struct {
        const char *key;
        uint64_t value;
    } rows[] = {{"bps", config->bytes.size},
                {"iops", config->ops.size},
                {"burst-bytes", config->bytes.one_time_burst},
                {"burst-ops", config->ops.one_time_burst}};
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++)
        if (rows[i].value)
            json_object_set_new(out, rows[i].key, json_integer((json_int_t)rows[i].value));
}
