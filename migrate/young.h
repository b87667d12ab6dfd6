// SPDX-License-Identifier: Apache-2.0
// How often to save a guest that may fail at any moment. Pure: no clock, no system calls. All times
// are seconds.
//
// A guest works for T, is saved, works for T ... Saving costs it C; the file is safe `latency`
// after saving began. A failure (a Poisson process, one every M) throws it back to the last safe
// file, which takes R to start. To do T of work it needs, on average,
//
//   E(T) = M * e^((R + latency - C) / M) * (e^((T + C) / M) - 1)
//
// since the first attempt takes T + C, and each one after a failure also R and the work that had
// been done while the file was still being written. 1 - T / E(T) is the share of time lost.
// Young (1974): that is least near T = sqrt(2CM); Daly (2003): sqrt(2C(M + R)) - C.
#pragma once

#include <stdint.h>

struct young_model {
    double cost;    // C: guest time lost to one checkpoint
    double latency; // from its begin until it is safe; at least C
    double restart; // R: from a failure until the guest runs again
    double mtbf;    // M
};

enum young_form { YOUNG_SQUARE_ROOT, YOUNG_DALY };

// Above this share of the MTBF neither form holds: they stand for C that is small beside M, and
// miss the optimum by 2/3 * sqrt(C / 2M), 8 % at M / 32.
#define YOUNG_COST_MAX (1.0 / 32)

double young_interval(const struct young_model *m); // sqrt(2CM)
double daly_interval(const struct young_model *m);  // sqrt(2C(M + R)) - C; 0 when that is negative
double young_loss(const struct young_model *m, double interval); // 0 to 1; 1 for no interval
double young_best(const struct young_model *m);                  // where young_loss is least

// The interval to use: `form`, or young_best where that does not hold, but never less than it
// takes to write one out.
double young_choose(const struct young_model *m, enum young_form form);

// An exponential average of measurements: a new one weighs a quarter.
struct young_average {
    double value;
    unsigned count; // 0: value is not known
};
void young_average_add(struct young_average *average, double sample);
