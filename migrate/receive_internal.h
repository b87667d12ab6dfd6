// SPDX-License-Identifier: Apache-2.0
// What the files of the destination's side share. receive.c tells the story: arrival, COMMIT, run
// or give up; receive_door.c lets connections in, receive_intake.c takes what comes before the
// switch, receive_settle.c what comes after it.
#pragma once

#include <pthread.h>

#include "migrate/blockmove.h"
#include "migrate/channel.h"
#include "migrate/machine.h"
#include "migrate/pages.h"
#include "migrate/postcopy_dest.h"
#include "migrate/receive.h"
#include "migrate/streams_dest.h"
#include "vmm/util.h"
#include "vmm/vm.h"

struct receive {
    int listen_fd;
    const struct migrate_hooks *hooks;
    struct receive_params params;
    struct receive_report *report;
    int cancel_fd; // eventfd: the user gave up
    int stop_fd;   // eventfd: the door thread is to end
    pthread_t door;
    bool door_started;

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    enum owner_dest owner;
    bool answered; // the source's question has been answered
    bool dropped;  // the guest will not run here, and nothing of it is left
    bool cancelled;
    struct channel demand; // fd -1 until the door let it in
    struct channel again;  // the same: the source came back after post-copy broke off

    struct channel main;
    unsigned version; // of the format, agreed on
    struct wire_record record;
    struct machine machine;
    struct vm *vm;
    struct page_intake intake;
    struct streams_dest *streams; // NULL: pages come over the main connection; set under the lock
    struct block_intake disks;
    uint64_t *stale;
    uint8_t *state; // the whole blob, read before it is loaded
    uint32_t state_len;
    void *buffer; // post-copy: pages before they are placed
    struct postcopy_dest *postcopy;
    bool was_prepared, stay_paused;
    // We paused the guest because pages cannot come, in a thread of its own (pausing: to be
    // joined).
    pthread_t pauser;
    bool pausing;
    bool halted, paused; // under the lock: it is to stay so; it is
    bool leaving;        // under the lock: the thread ends; the guest goes on unless `ending`
    bool ending;
    pthread_t herald; // of post-copy: calls hooks->arrived
    bool heralding;   // to be joined
};

// --- receive.c: ownership and waiting

// Steps under the lock. -EPROTO: the event has no place in this state.
int receive_owner_step(struct receive *r, enum owner_dest_event event, enum owner_action *action);
enum owner_dest receive_owner_now(struct receive *r);
// Until it has happened (looked at under the lock), cancelled, or the time is over. True: it has.
bool receive_wait_for(struct receive *r, bool (*happened)(const struct receive *),
                      unsigned timeout_ms);
bool receive_has_answered(const struct receive *r);
bool receive_came_back(const struct receive *r);
int receive_wait_demand(struct receive *r, struct error *err);
void receive_herald_end(struct receive *r);

// --- receive_door.c

// The main connection of a migration.
int receive_accept(struct receive *r, struct error *err);
// A thread that lets second connections in and answers questions while the first one works.
int receive_door_open(struct receive *r, struct error *err);
void receive_door_close(struct receive *r);

// --- receive_intake.c: in this order

int receive_take_machine(struct receive *r, struct error *err);
int receive_take_memory(struct receive *r, struct error *err);
int receive_prepare(struct receive *r, struct error *err);
int receive_echo_round(struct receive *r, struct error *err);

// --- receive_settle.c

// The guest runs here; `ret` says how the word about it went. Until the source needs us no more.
int receive_settle(struct receive *r, int ret, struct error *err);
void receive_pauser_end(struct receive *r);
