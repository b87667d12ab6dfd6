// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <stdio.h>

#include "vmm/cli/cli.h"

uint64_t cli_start_ns;

int cli_fail(const struct error *err)
{
    fprintf(stderr, "ferry: %s\n", err->text);
    switch (err->code) {
    case -EINVAL:
    case -ENOEXEC:
        return EXIT_USAGE;
    default:
        return EXIT_FAILED;
    }
}
