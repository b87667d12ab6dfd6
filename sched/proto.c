// SPDX-License-Identifier: Apache-2.0
// What both sides of sched/proto.h, and the command line, say about shares.
#include "sched/proto.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sched/client.h"
#include "vmm/bitmap.h"
#include "vmm/util.h"

enum { WEIGHT_MAX = 65535, CAP_MAX = SCHED_VCPUS_MAX * 100 };

size_t sched_msg_size(enum sched_msg_type type)
{
    static const size_t sizes[SCHED_TYPES] = {
        [SCHED_REGISTER] = sizeof(struct sched_register),
        [SCHED_REGISTERED] = sizeof(struct sched_registered),
        [SCHED_SET] = sizeof(struct sched_set),
        [SCHED_STATUS] = sizeof(struct sched_ask),
        [SCHED_TRACE] = sizeof(struct sched_ask),
        [SCHED_OK] = sizeof(struct sched_head),
        [SCHED_ERROR] = sizeof(struct sched_error),
        [SCHED_DOCUMENT] = sizeof(struct sched_head),
        [SCHED_CONFINE] = sizeof(struct sched_head),
    };
    return type < SCHED_TYPES ? sizes[type] : 0;
}

static int number_parse(const char *text, long min, long max, const char *what, long *out,
                        struct error *err)
{
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (end == text || *end || errno || n < min || n > max || *text == '+' || *text == ' ')
        return error_set(err, -EINVAL, "%s '%.40s': expected %ld to %ld", what, text, min, max);
    *out = n;
    return 0;
}

int sched_weight_parse(const char *text, struct sched_share *share, struct error *err)
{
    long n;
    int ret = number_parse(text, 1, WEIGHT_MAX, "weight", &n, err);
    if (ret)
        return ret;
    share->weight = (int32_t)n;
    share->has |= SCHED_HAS_WEIGHT;
    return 0;
}

int sched_cap_parse(const char *text, struct sched_share *share, struct error *err)
{
    long n;
    int ret = number_parse(text, 0, CAP_MAX, "cap in percent of one pCPU (0: none)", &n, err);
    if (ret)
        return ret;
    share->cap = (int32_t)n;
    share->has |= SCHED_HAS_CAP;
    return 0;
}

// "0-3,8"; stops before a '/' or the end.
static const char *mask_parse(const char *text, struct sched_mask *mask)
{
    do {
        char *end;
        if (*text < '0' || *text > '9')
            return NULL;
        unsigned long first = strtoul(text, &end, 10), last = first;
        if (*end == '-') {
            text = end + 1;
            if (*text < '0' || *text > '9')
                return NULL;
            last = strtoul(text, &end, 10);
        }
        if (first > last || last >= SCHED_PCPUS_MAX)
            return NULL;
        for (unsigned long i = first; i <= last; i++)
            bitmap_set(mask->bits, i);
        text = end;
    } while (*text == ',' && *++text);
    return *text && *text != '/' ? NULL : text;
}

int sched_affinity_parse(const char *text, struct sched_share *share, struct error *err)
{
    const char *at = text;
    share->hard = share->soft = (struct sched_mask) {0};
    while (at && *at && strcmp(text, "all")) {
        bool soft = !strncmp(at, "soft:", 5);
        at = mask_parse(at + (soft ? 5 : 0), soft ? &share->soft : &share->hard);
        if (at && *at == '/')
            at++;
    }
    if (!at || !*text)
        return error_set(err, -EINVAL,
                         "affinity '%.80s': expected pCPUs like 0-3,8, soft:0-3, both with a '/' "
                         "between them, or all (pCPUs 0 to %d)",
                         text, SCHED_PCPUS_MAX - 1);
    share->has |= SCHED_HAS_AFFINITY;
    return 0;
}

int sched_share_parse(const char *key, const char *text, struct sched_share *share,
                      struct error *err)
{
    if (!strcmp(key, "weight"))
        return sched_weight_parse(text, share, err);
    if (!strcmp(key, "cap"))
        return sched_cap_parse(text, share, err);
    if (!strcmp(key, "affinity"))
        return sched_affinity_parse(text, share, err);
    return error_set(err, -EINVAL, "'%.40s': expected weight, cap or affinity", key);
}

int sched_share_check(const struct sched_share *share, struct error *err)
{
    if (share->has & ~(uint32_t)(SCHED_HAS_WEIGHT | SCHED_HAS_CAP | SCHED_HAS_AFFINITY))
        return error_set(err, -EINVAL, "share: fields %#x, of which only 7 are known", share->has);
    if (share->has & SCHED_HAS_WEIGHT && (share->weight < 1 || share->weight > WEIGHT_MAX))
        return error_set(err, -EINVAL, "weight %d: expected 1 to %d", share->weight, WEIGHT_MAX);
    if (share->has & SCHED_HAS_CAP && (share->cap < 0 || share->cap > CAP_MAX))
        return error_set(err, -EINVAL,
                         "cap %d: expected percent of one pCPU, 1 to %d, or 0 for none", share->cap,
                         CAP_MAX);
    return 0;
}

const char *sched_mask_text(const struct sched_mask *mask, char *text)
{
    size_t len = 0;
    for (unsigned i = 0, last; i < SCHED_PCPUS_MAX && len < SCHED_TEXT_MAX - 16; i = last + 1) {
        last = i;
        if (!bitmap_test(mask->bits, i))
            continue;
        while (last + 1 < SCHED_PCPUS_MAX && bitmap_test(mask->bits, last + 1))
            last++;
        len += (size_t)snprintf(text + len, SCHED_TEXT_MAX - len, i == last ? "%s%u" : "%s%u-%u",
                                len ? "," : "", i, last);
    }
    if (!len)
        snprintf(text, SCHED_TEXT_MAX, "all");
    return text;
}

void sched_share_merge(struct sched_share *into, const struct sched_share *from)
{
    if (from->has & SCHED_HAS_WEIGHT)
        into->weight = from->weight;
    if (from->has & SCHED_HAS_CAP)
        into->cap = from->cap;
    if (from->has & SCHED_HAS_AFFINITY) {
        into->hard = from->hard;
        into->soft = from->soft;
    }
    into->has |= from->has;
}
