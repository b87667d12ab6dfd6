// SPDX-License-Identifier: Apache-2.0
// The entropy device (virtio 1.2, 5.4): the host kernel's random numbers, at a bounded rate.
#pragma once

#include "devices/virtio.h"

enum {
    RNG_BYTES = 64 * 1024, // a guest gets at most this much in a period
    RNG_PERIOD_MS = 100,
};

struct virtio_rng_config {
    struct virtio_attach attach;
};

extern const struct device_class virtio_rng_class;
