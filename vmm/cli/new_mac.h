// SPDX-License-Identifier: Apache-2.0
// restore --new-mac: which network devices of a guest from a file get another address.
#pragma once

#include "vmm/cli/options.h"
#include "vmm/error.h"

// "auto" (one is drawn for each device), or "[DEVICE=]MAC|auto,...": without a device it is net0's.
// For the devices that `o` has by now; -EINVAL: a word that is none of these, no such device, an
// address twice.
int new_mac_apply(struct vm_options *o, const char *text, struct error *err);
