// SPDX-License-Identifier: Apache-2.0
// Requests for entropy.
#include "devices/virtio_rng.h"

#include "tests/fuzz/fuzz_virtio.h"

static void *config(void)
{
    return calloc(1, sizeof(struct virtio_rng_config));
}

FUZZ_VIRTIO(&virtio_rng_class, config, NULL)
