// SPDX-License-Identifier: Apache-2.0
// What tests of migrations within this process share: the destination in a thread of its own, and a
// link between the two that breaks, falls silent, flips a bit or listens in.
#pragma once

#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "migrate/migrate.h"
#include "migrate/receive.h"
#include "migrate/wire.h"
#include "tests/bare/bare.h"
#include "vmm/stream.h"

// Whom the hooks of tests/bare/oracle.h serve.
struct host {
    struct guest *guest;
    struct bare *bare; // made by create_vm
    unsigned destroyed;
    unsigned arrived;
};

// --- the destination

struct arrival {
    struct host host;
    struct migrate_hooks hooks; // the caller's, set before the start
    struct receive *receive;
    pthread_t thread;
    int listen_fd; // closed when receive_run ends, as the end of a process would do
    char address[128];
    // When it is over:
    struct vm *vm;
    struct receive_report report;
    struct error err;
    int ret;
};

// What most tests want: one try, and memory of any size.
struct receive_params arrival_params(void);
// Listens at `listen` (NULL: TCP over loopback) and receives in a thread.
void arrival_start(struct arrival *a, const char *listen, const struct receive_params *params);
void arrival_wait(struct arrival *a);
void arrival_free(struct arrival *a); // after arrival_wait
int arrival_join(struct arrival *a);  // both; what receive_run returned

// --- the link: connections of any number, passed on to a target

enum { RELAY_ALL = UINT_MAX };

enum relay_harm {
    RELAY_CUT,   // closes both ends
    RELAY_STALL, // passes nothing on any more, and keeps both ends open
    RELAY_MUTE,  // closes the source's end only: the destination waits on
};

struct relay {
    // Which connection (counting from 0: main, demand, query ...) is counted and harmed; RELAY_ALL:
    // those that are open then, their bytes counted together. Later ones get through.
    unsigned connection;
    enum relay_harm harm;
    // Harm comes instead of the byte after so many; UINT64_MAX: never.
    uint64_t to_dest, to_source;
    // Harm comes before the first word to the destination that follows so many bytes to the source;
    // 0: never.
    uint64_t after_answer;
    bool dead_afterwards; // no new connection gets through
    // Of that connection: this bit (counting from 0) is the other one; 0: none is.
    uint64_t flip_to_dest, flip_to_source;
    struct stream_mem *keep; // of each connection, what went to the destination
    unsigned nr_keep;

    // What became of it:
    bool harmed;
    unsigned flips;
    uint64_t down, up; // bytes passed on to the destination, to the source

    const char *target;
    char address[64]; // where the source connects
    int listen_fd, stop_fd;
    pthread_t thread;
};

void relay_start(struct relay *r, const char *target);
void relay_end(struct relay *r);

// --- byte positions in what the destination says in a pre-copy of one round without disks

#define REC(T)        (WIRE_HEADER_LEN + sizeof(T))
#define SAID_READY    (REC(struct wire_hello) + WIRE_HEADER_LEN)
#define SAID_ROUND    (SAID_READY + REC(struct wire_round))
#define SAID_PREPARED (SAID_ROUND + REC(struct wire_times))
#define SAID_RUNNING  (SAID_PREPARED + REC(struct wire_times))
