// SPDX-License-Identifier: Apache-2.0
#include "migrate/young.h"

#include <math.h>

double young_interval(const struct young_model *m)
{
    return sqrt(2 * m->cost * m->mtbf);
}

double daly_interval(const struct young_model *m)
{
    return fmax(sqrt(2 * m->cost * (m->mtbf + m->restart)) - m->cost, 0);
}

double young_loss(const struct young_model *m, double interval)
{
    if (interval <= 0)
        return 1;
    // Beyond e^700 doubles end; the share is 1 long before.
    double before = (m->restart + m->latency - m->cost) / m->mtbf;
    double attempt = (interval + m->cost) / m->mtbf;
    if (before + attempt > 700)
        return 1;
    return 1 - interval / (m->mtbf * exp(before) * expm1(attempt));
}

// Golden section in log T: the loss falls, then rises.
double young_best(const struct young_model *m)
{
    const double ratio = (sqrt(5) - 1) / 2;
    double low = log(fmin(m->cost, m->mtbf) + 1e-9) - 7, high = log(m->mtbf + m->cost) + 7;
    for (int i = 0; i < 120; i++) {
        double left = high - ratio * (high - low), right = low + ratio * (high - low);
        if (young_loss(m, exp(left)) <= young_loss(m, exp(right)))
            high = right;
        else
            low = left;
    }
    return exp((low + high) / 2);
}

double young_choose(const struct young_model *m, enum young_form form)
{
    double interval = m->cost > m->mtbf * YOUNG_COST_MAX ? young_best(m)
                      : form == YOUNG_DALY               ? daly_interval(m)
                                                         : young_interval(m);
    return fmax(interval, m->latency);
}

void young_average_add(struct young_average *average, double sample)
{
    average->value = average->count ? average->value + (sample - average->value) / 4 : sample;
    if (average->count < UINT32_MAX)
        average->count++;
}
