// SPDX-License-Identifier: Apache-2.0
// Harness of the bare-metal tests: a VM in this process that runs one guest of guest/bare, and what
// the guest told by ucalls. Several may live at once.
//
// Failures of the host side end the test (ck_abort). Waits have one generous limit
// (BARE_WAIT_SECONDS); it only bounds a hang, no test measures time by it.
#pragma once

#include <check.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "devices/board.h"
#include "devices/ucall.h"
#include "devices/virtio.h"
#include "vmm/loop.h"
#include "vmm/stream.h"
#include "vmm/vm.h"

enum { BARE_WAIT_SECONDS = 300, BARE_OUTPUT_MAX = 16384, BARE_PARAMS_MAX = 8 };

struct bare_param {
    enum ucall_param id;
    uint64_t value;
};

struct bare_device {
    const struct device_class *class;
    struct virtio_attach *config; // of that class; transport and place are filled in
};

struct bare_config {
    const char *guest; // "hello": the image in the folder $BARE_GUESTS; NULL: load no kernel
    unsigned cpus;     // 0 = 1
    uint64_t memory;   // bytes, 0 = 32 MiB
    enum ram_backing backing;
    enum ram_log log; // RAM_LOG_RING: rings are small, so that they are full now and then
    enum boot_protocol protocol;
    const char *cmdline;                       // NULL = ""
    struct bare_param params[BARE_PARAMS_MAX]; // up to `nr_params`
    unsigned nr_params;
    // Every SYNC keeps its vCPU until the VM is paused: saved there, it goes on behind it.
    bool hold;
    bool quiet_panic;                  // the test expects a guest assertion or exception
    const struct bare_device *devices; // virtio; the guest is told where they are
    unsigned nr_devices;
    bool pci;   // their transport; otherwise virtio-mmio
    int log_fd; // of the VM's log lines; 0 = stderr
};

struct bare_value {
    uint64_t value;
    bool present;
};

struct bare {
    struct bare_config config;
    struct loop *loop; // run, in a thread, between bare_run and bare_end if there are devices
    pthread_t loop_thread;
    bool loop_runs;
    char cmdline[4096];
    struct vm *vm;
    struct board board;
    struct console *console;
    int console_fd; // our end of COM1
    char serial[BARE_OUTPUT_MAX];
    size_t serial_len;

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    struct bare_value values[UCALL_V_COUNT_OF_IDS][VM_MAX_VCPUS];
    char output[BARE_OUTPUT_MAX]; // UCALL_PRINT
    size_t output_len;
    unsigned syncs; // SYNCs so far
    uint64_t stage; // of the newest SYNC: its number, its value, its vCPU
    uint64_t stage_value;
    unsigned stage_cpu;
    bool stopped; // the VM called on_stop
};

// Creates the VM, loads the guest; nothing runs yet and there are no threads.
void bare_create(struct bare *b, const struct bare_config *config);
// vm_start, vm_resume.
void bare_run(struct bare *b);
void bare_end(struct bare *b);
void bare_loop_end(struct bare *b); // devices stand still from now on; bare_end does it, too

void bare_pause(struct bare *b);
void bare_resume(struct bare *b);
void bare_save(struct bare *b, struct stream_mem *blob); // paused; free with stream_mem_free
// Into a VM made by bare_create with guest = NULL: `from`'s memory and the state blob.
void bare_load(struct bare *b, const struct bare *from, const struct stream_mem *blob);

void bare_wait_syncs(struct bare *b, unsigned count); // at least `count` SYNCs have come
const struct vm_stop *bare_wait_stop(struct bare *b);
// The guest ended with status 0.
void bare_wait_done(struct bare *b);

uint64_t bare_value(struct bare *b, enum ucall_value id, unsigned index); // fails if not told
bool bare_has_value(struct bare *b, enum ucall_value id, unsigned index);
// What came out of COM1 so far.
const char *bare_serial(struct bare *b);
// A u64 in guest memory, read as the guest's CPUs write it.
uint64_t bare_u64(struct bare *b, uint64_t gpa);
// Waits until the u64 at `gpa` differs from `old`; returns it.
uint64_t bare_wait_change(struct bare *b, uint64_t gpa, uint64_t old);

// FERRY_LONG=1 asks for the long forms of tests.
bool bare_long(void);

// A kind of dirty log that this host's KVM has.
bool bare_has_log(enum ram_log log);

// main() of a test program: skips (77) where there is no /dev/kvm.
int bare_main(const char *name, void (*add_tests)(TCase *));
