// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <check.h>

#include "vmm/error.h"

// A call that must succeed, and takes &err for why it did not.
#define OK(call)                                     \
    do {                                             \
        struct error err = {0};                      \
        int ok_ret = (call);                         \
        if (ok_ret)                                  \
            ck_abort_msg("%s: %s", #call, err.text); \
    } while (0)

// ck_assert for what is asked a hundred thousand times: that one tells its parent process, by a
// system call, of each that holds.
#define HOLDS(condition)              \
    do {                              \
        if (!(condition))             \
            ck_abort_msg(#condition); \
    } while (0)
