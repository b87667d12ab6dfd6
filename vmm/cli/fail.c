// SPDX-License-Identifier: Apache-2.0
#include <ctype.h>
#include <errno.h>
#include <stdio.h>

#include "vmm/cli/cli.h"

uint64_t cli_start_ns;

int cli_fail(const struct error *err)
{
    struct error shown = *err;
    // One line, and no escape sequences from a name or a file.
    for (char *p = shown.text; *p; p++)
        if (iscntrl((unsigned char)*p))
            *p = '?';
    fprintf(stderr, "ferry: %s\n", shown.text);
    switch (err->code) {
    case -EINVAL:
    case -ENOEXEC:
    case -E2BIG: // command line, initrd
    case -EFBIG:
    case -ENAMETOOLONG:
        return EXIT_USAGE;
    case -ENODEV: // no usable KVM
        return EXIT_HOST;
    default:
        return EXIT_FAILED;
    }
}
