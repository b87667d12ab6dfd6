// SPDX-License-Identifier: Apache-2.0
#include "migrate/checkpoint_policy.h"

#include <errno.h>
#include <math.h>

#include "vmm/util.h"

// Until one has been made. Too low a guess costs one early checkpoint, which then measures.
static const double guess_cost = 0.05, guess_latency = 1;
// Saving again at once would fail again; later it is as good as the interval.
static const double retry_first = 1;

enum { FULL, DIFF };

void checkpoint_settings_default(struct checkpoint_settings *settings)
{
    *settings = (struct checkpoint_settings) {.form = YOUNG_SQUARE_ROOT,
                                              .mtbf = FAILURES_MTBF,
                                              .restart = 1,
                                              .chain = CHECKPOINT_CHAIN,
                                              .keep = CHECKPOINT_KEEP};
}

int checkpoint_settings_check(const struct checkpoint_settings *s, struct error *err)
{
    if (!(s->interval == 0 || (s->interval >= 0.01 && s->interval <= FAILURES_SPAN_MAX)))
        return error_set(err, -EINVAL, "interval of %g s: expected at least 10 ms", s->interval);
    if (!(s->mtbf >= 1 && s->mtbf <= FAILURES_SPAN_MAX))
        return error_set(err, -EINVAL, "mtbf of %g s: expected 1 s to 300 years", s->mtbf);
    if (!(s->restart >= 0 && s->restart <= s->mtbf))
        return error_set(err, -EINVAL, "restart of %g s: expected 0 to the MTBF, %g s", s->restart,
                         s->mtbf);
    if (!s->chain || s->chain > CHECKPOINT_CHAIN_MAX)
        return error_set(err, -EINVAL, "chain of %u: expected 1 to %d files", s->chain,
                         CHECKPOINT_CHAIN_MAX);
    if (!s->keep || s->keep > CHECKPOINT_KEEP_MAX || s->hourly > CHECKPOINT_KEEP_MAX)
        return error_set(err, -EINVAL, "keep %u, hourly %u: expected 1 (0) to %d", s->keep,
                         s->hourly, CHECKPOINT_KEEP_MAX);
    return 0;
}

void checkpoint_policy_init(struct checkpoint_policy *p, const struct checkpoint_settings *settings)
{
    *p = (struct checkpoint_policy) {.settings = *settings};
}

// The mean over a chain of one full and its diffs; of one kind when only that is known.
static double chain_mean(const struct young_average *of, unsigned chain, double guess)
{
    if (!of[FULL].count && !of[DIFF].count)
        return guess;
    if (!of[FULL].count || (!of[DIFF].count && chain > 1))
        return of[FULL].count ? of[FULL].value : of[DIFF].value;
    return (of[FULL].value + (chain - 1) * of[DIFF].value) / chain;
}

void checkpoint_policy_model(const struct checkpoint_policy *p, struct young_model *model)
{
    model->cost = chain_mean(p->cost, p->settings.chain, guess_cost);
    model->latency = fmax(chain_mean(p->latency, p->settings.chain, guess_latency), model->cost);
    model->restart = p->settings.restart;
    model->mtbf = p->settings.mtbf;
}

double checkpoint_policy_interval(const struct checkpoint_policy *p)
{
    struct young_model model;
    checkpoint_policy_model(p, &model);
    return p->settings.interval > 0 ? fmax(p->settings.interval, model.latency)
                                    : young_choose(&model, p->settings.form);
}

bool checkpoint_policy_full(const struct checkpoint_policy *p)
{
    return !p->chain || p->chain >= p->settings.chain || p->diff_bytes > p->full_bytes;
}

static uint64_t after(uint64_t now, double seconds)
{
    return now + (uint64_t)(seconds * 1e9);
}

uint64_t checkpoint_policy_begin(struct checkpoint_policy *p, uint64_t now)
{
    return after(now, checkpoint_policy_interval(p));
}

uint64_t checkpoint_policy_done(struct checkpoint_policy *p, const struct checkpoint_measure *made,
                                uint64_t start)
{
    unsigned kind = made->full ? FULL : DIFF;
    double lost = (double)(made->pause_ns + made->fault_ns) / 1e9;
    young_average_add(&p->cost[kind], lost);
    young_average_add(&p->latency[kind], (double)made->total_ns / 1e9);
    if (made->full) {
        p->chain = 0;
        p->full_bytes = made->bytes;
        p->diff_bytes = 0;
    } else {
        p->diff_bytes += made->bytes;
    }
    p->chain++;
    p->failed = 0;
    // The interval is work: what the guest lost meanwhile comes on top.
    return after(start, lost + checkpoint_policy_interval(p));
}

uint64_t checkpoint_policy_failed(struct checkpoint_policy *p, uint64_t now)
{
    double wait = retry_first * (double)(1u << (p->failed < 16 ? p->failed : 16));
    p->failed++;
    p->chain = 0; // whatever it was: a full one needs nothing
    return after(now, fmin(wait, fmax(checkpoint_policy_interval(p), retry_first)));
}

void checkpoint_policy_keep(const struct checkpoint_settings *settings,
                            struct checkpoint_item *items, unsigned nr, int64_t now)
{
    int64_t hour = INT64_MAX; // the last one that has its checkpoint
    for (unsigned i = nr; i > 0; i--) {
        struct checkpoint_item *item = &items[i - 1];
        int64_t age = now / 3600 - item->created / 3600;
        item->keep = nr - i < settings->keep;
        if (item->created / 3600 < hour && age < (int64_t)settings->hourly) {
            hour = item->created / 3600;
            item->keep = true;
        }
    }
    for (unsigned i = 0; i < nr; i++)
        items[i].wanted = items[i].keep;
    for (unsigned i = nr; i > 0; i--)
        if (items[i - 1].keep && items[i - 1].parent >= 0)
            items[items[i - 1].parent].keep = true;
}

// Files from `i` down to the full one that nobody wants for themselves; 0: somebody wants one.
static unsigned unwanted_chain(const struct checkpoint_item *items, int32_t i)
{
    unsigned files = 0;
    for (; i >= 0 && !items[i].wanted; i = items[i].parent)
        files++;
    return i < 0 ? files : 0;
}

int32_t checkpoint_policy_merge(const struct checkpoint_settings *settings,
                                const struct checkpoint_item *items, unsigned nr, unsigned *files)
{
    unsigned least = settings->keep > CHECKPOINT_MERGE ? settings->keep : CHECKPOINT_MERGE;
    for (unsigned i = nr; i > 0; i--) {
        *files = items[i - 1].keep ? unwanted_chain(items, (int32_t)i - 1) : 0;
        if (*files >= least)
            return (int32_t)i - 1;
    }
    return -1;
}

void checkpoint_policy_merged(struct checkpoint_policy *p, unsigned files, uint64_t diff_bytes,
                              uint64_t full_bytes)
{
    if (p->chain < files)
        return; // an error has ended that chain meanwhile
    p->chain -= files - 1;
    p->diff_bytes -= diff_bytes < p->diff_bytes ? diff_bytes : p->diff_bytes;
    p->full_bytes = full_bytes;
}
