// SPDX-License-Identifier: Apache-2.0
// A log of failures, and a span of time: text of a file that may hold anything.
#include <stdlib.h>
#include <string.h>

#include "migrate/failures.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct failures failures;
    struct error err;
    double mtbf = 1, seconds = 1;
    char *text = malloc(size + 1); // of this size: reading beyond its end is seen
    if (!text)
        return 0;
    memcpy(text, data, size);
    if (!failures_parse(text, size, 1795276854, &failures, &err))
        mtbf = failures_mtbf(&failures);
    text[size] = 0;
    if (!duration_parse(text, &seconds)) {
        char out[FAILURES_TEXT_MAX];
        duration_format(seconds, out);
    }
    free(text);
    if (!(mtbf > 0) || !(seconds > 0) || seconds > FAILURES_SPAN_MAX)
        abort();
    return 0;
}
