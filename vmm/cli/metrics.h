// SPDX-License-Identifier: Apache-2.0
// What `GET /info` tells, in Prometheus' text format: one source of figures, two forms.
#pragma once

#include <jansson.h>

// `info` as session_info makes it. The caller frees the text; NULL: no memory.
char *metrics_text(json_t *info);
// The figures of a device with those of inner objects beside them: {"received": {"bytes": 1}} has
// "received_bytes" too. The caller's reference.
json_t *metrics_flat(json_t *figures);
