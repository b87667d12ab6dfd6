// SPDX-License-Identifier: Apache-2.0
// The destination's side of a migration.
#pragma once

#include "migrate/migrate.h"
#include "vmm/error.h"

struct receive;

struct receive_params {
    unsigned handshake_ms, idle_ms; // time-outs
    // How long to stay reachable for the source's question after a link that broke at the switch.
    unsigned linger_ms;
    // How long to wait for the source's new connection when post-copy broke off; 0 = for ever.
    unsigned recover_ms;
    uint64_t ram_max; // bytes a guest may have; 0 = no limit
    struct channel_security security;
    bool one_try; // fail on the first connection that is no migration, instead of waiting on
};
void receive_params_default(struct receive_params *params);

struct receive_report {
    uint8_t id[WIRE_ID_LEN];
    bool postcopy;
    enum owner_dest owner;
    uint64_t data_pages, zero_pages, faults, requested;
    uint64_t load_ns, resume_ns;
    uint64_t missing_pages, missing_blocks; // post-copy that broke: what never came
    uint32_t recoveries;
};

// Works on a listening socket of the caller's (channel_listen), which must be non-blocking.
int receive_create(struct receive **r, int listen_fd, const struct migrate_hooks *hooks,
                   const struct receive_params *params, struct error *err);

// Takes in one guest; blocks until all of it is here. hooks->arrived is called when it starts,
// hooks->severed when post-copy broke off and the guest stands still until the source comes back.
//   0: *vm runs here (or is paused, as it was).
//   error, *vm NULL: nothing is left here and nothing ever will run.
//   error, *vm set: post-copy broke off and nobody came back; the guest is ours but lacks pages. It
//   is paused; keep it and `r`.
int receive_run(struct receive *r, struct vm **vm, struct receive_report *report,
                struct error *err);

// Any thread: makes receive_run give up, unless the guest is already ours; then it only ends
// waiting for a source that has gone.
void receive_cancel(struct receive *r);

// After receive_run. A VM that broke in post-copy must have been stopped (vm_request_stop) before,
// and is destroyed after.
void receive_free(struct receive *r);
