// SPDX-License-Identifier: Apache-2.0
// What every virtio device has (virtio 1.2, sections 2 and 6): status, features, queues, config
// space, doorbells and interrupts, whatever transport shows them to the guest.
//
// A device is one file: a struct that starts with `struct virtio`, a `struct virtio_ops`, and a
// device_class whose hooks call the virtio_* functions of the same name. A transport turns accesses
// into calls of the second half of this header.
//
// Threads. Register accesses come from vCPU threads, doorbells are served in the loop's thread;
// dev.lock is held around both, and around every op. Between virtio_quiesce and virtio_resume
// nothing is taken from a queue. `drain` waits for the outside under the lock, so that reset, pause
// and removal never leave I/O behind that writes into guest memory.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "devices/virtqueue.h"
#include "vmm/device.h"
#include "vmm/log.h"
#include "vmm/loop.h"
#include "vmm/state.h"

enum {
    VIRTIO_QUEUES_MAX = 32,
    VIRTIO_CONFIG_MAX = 256,       // bytes of config space
    VIRTIO_SAVED_MAX = 512 * 1024, // bytes of saved queues
};

enum { // section 5
    VIRTIO_ID_NET = 1,
    VIRTIO_ID_BLK = 2,
    VIRTIO_ID_CONSOLE = 3,
    VIRTIO_ID_RNG = 4,
    VIRTIO_ID_BALLOON = 5,
    VIRTIO_ID_VSOCK = 19,
};

// Device status, 2.1.
enum {
    VIRTIO_ACKNOWLEDGE = 1,
    VIRTIO_DRIVER = 2,
    VIRTIO_DRIVER_OK = 4,
    VIRTIO_FEATURES_OK = 8,
    VIRTIO_NEEDS_RESET = 64,
    VIRTIO_FAILED = 128,
};

// Features of section 6 that this core knows.
#define VIRTIO_F_INDIRECT  (1ull << 28)
#define VIRTIO_F_EVENT_IDX (1ull << 29)
#define VIRTIO_F_VERSION_1 (1ull << 32)
#define VIRTIO_F_PACKED    (1ull << 34)

enum { VIRTIO_ISR_QUEUE = 1, VIRTIO_ISR_CONFIG = 2 };

struct virtio;

struct virtio_ops {
    uint32_t id; // VIRTIO_ID_...
    // Takes what virtio_next gives until it gives nothing: true. False: it can take no more now,
    // and will ring (virtio_ring) when it can.
    bool (*run)(struct virtio *v, unsigned queue);
    // Returns when nothing of the device is under way outside, or after some seconds: then `idle`
    // says no. May be NULL.
    void (*drain)(struct virtio *v);
    // Whether nothing is under way outside, without waiting. A reset by the driver ends when this
    // says so, where the transport's driver waits for that; NULL: reset waits in `drain`.
    bool (*idle)(struct virtio *v);
    // For devices whose answers are worth waiting for awake (virtio_woken): `watch` says whether it
    // is so now; `poll` takes what is done, and whether something was. Both or none.
    bool (*watch)(struct virtio *v, bool on);
    bool (*poll)(struct virtio *v);
    void (*reset)(struct virtio *v); // nothing is under way; may be NULL
    // The driver wrote config[offset .. offset+size), which lies within config space. May be NULL:
    // config space is then read-only.
    void (*config_write)(struct virtio *v, uint32_t offset, unsigned size, uint64_t value);
};

// How a device reaches the guest.
struct virtio_transport {
    const char *name;
    // Connects registers, v->bells[queue]->fd (doorbells) and the interrupt. `place` is the
    // transport's own struct.
    int (*attach)(struct virtio *v, const void *place, struct error *err);
    void (*detach)(struct virtio *v);            // also after a failed attach
    void (*signal)(struct virtio *v, int queue); // raises an interrupt; queue -1: configuration
    // Takes in what the driver has acknowledged of v->isr without an exit. Called before isr is
    // looked at or grows, after what an interrupt is about is in the ring. May be NULL.
    void (*acknowledged)(struct virtio *v);
    void (*reset)(struct virtio *v); // its own registers, with the device's; may be NULL
    // Its drivers read the status until it is 0 before they take a reset as done.
    bool reset_polled;
};

// First member of each device's config.
struct virtio_attach {
    const struct virtio_transport *transport;
    const void *place; // used during realize only
    bool packed;       // offer the packed ring, too
    bool arrives; // saved state will be loaded: what the source may still hold is taken on resume
};

// A file descriptor that the loop watches for a device. On the heap: the kernel may hold the poll
// a little longer than the device lives.
struct virtio_bell {
    struct loop_watch watch;
    struct virtio *v; // NULL once closed
    int fd;
    unsigned queue;
    void (*fn)(struct virtio *v, struct virtio_bell *bell); // with the lock held
};

struct virtio {
    struct device dev; // first
    const struct virtio_ops *ops;
    const struct virtio_transport *transport;
    void *transport_data;
    struct log_limit limit;

    uint64_t features;          // what this device can do; fixed
    uint64_t offered, accepted; // feature bits
    uint8_t status, isr;
    uint32_t generation; // of config space, 2.5
    uint32_t offered_sel, accepted_sel, queue_sel;
    uint32_t config_len;
    uint8_t config[VIRTIO_CONFIG_MAX]; // little endian, as the driver reads it
    unsigned nr_queues;
    struct virtqueue queues[VIRTIO_QUEUES_MAX];
    struct virtio_bell *bells[VIRTIO_QUEUES_MAX];
    bool active; // between resume and quiesce
    // The loop stays awake for a moment after a doorbell (see virtio.c) when the last time it went
    // to sleep it was woken soon after.
    bool awake_pays;
    uint8_t awake_misses, rest_turns;
    uint64_t slept_ns; // CLOCK_MONOTONIC
    bool resetting;    // the driver wrote 0, something is still under way; status stays nonzero

    uint32_t saved_len;
    uint8_t saved[VIRTIO_SAVED_MAX]; // the queues, while state is saved or loaded
};

// --- for devices

struct virtio_setup {
    const struct virtio_ops *ops;
    const struct virtio_attach *attach;
    uint64_t features; // of the device; VERSION_1, INDIRECT, EVENT_IDX (and PACKED) are added
    unsigned nr_queues;
    uint16_t queue_size;
    uint32_t config_len; // v->config is filled by the device
};

int virtio_realize(struct virtio *v, const struct virtio_setup *setup, struct error *err);
void virtio_unrealize(struct virtio *v); // after a failed virtio_realize nothing is left to undo

// Hooks of a device_class.
void virtio_device_reset(struct device *dev);
int virtio_quiesce(struct device *dev, struct error *err);
void virtio_resume(struct device *dev);

// As virtqueue_next, but what a driver broke is logged, once for the queue, and the device asks for
// a reset. True: a chain was taken.
bool virtio_next(struct virtio *v, unsigned queue, struct virtqueue_chain *chain);
void virtio_push(struct virtio *v, unsigned queue, struct virtqueue_chain *chain, uint32_t written);
// Raises the queue's interrupt if the driver wants one for what was pushed.
void virtio_signal(struct virtio *v, unsigned queue);
// Something came for the device from outside, in the loop's thread: `watch` devices tell.
void virtio_woken(struct virtio *v);
// Rings the queue's own doorbell: the loop will call `run`. Any thread.
void virtio_ring(struct virtio *v, unsigned queue);
// A request no device can answer (no room for a status ...): the queue is dead until reset.
void virtio_break(struct virtio *v, unsigned queue, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
void virtio_config_changed(struct virtio *v); // after a change of v->config

// Loop's thread or before loop_run. `fd` is given to the bell, which closes it.
struct virtio_bell *virtio_bell_new(struct virtio *v, int fd, unsigned queue,
                                    void (*fn)(struct virtio *v, struct virtio_bell *bell),
                                    struct error *err);
void virtio_bell_close(struct virtio_bell *bell); // NULL is fine; when or where the loop runs

// Fields of a device's state table, T being its struct with `struct virtio v` in it, and the hooks
// that go with them: virtio_load checks them, and nothing of the device's own.
#define VIRTIO_STATE_FIELDS(T)                                                     \
    STATE_FIELD_INT(T, v.offered, 1), STATE_FIELD_INT(T, v.accepted, 1),           \
        STATE_FIELD_INT(T, v.status, 1), STATE_FIELD_INT(T, v.isr, 1),             \
        STATE_FIELD_INT(T, v.generation, 1), STATE_FIELD_INT(T, v.offered_sel, 1), \
        STATE_FIELD_INT(T, v.accepted_sel, 1), STATE_FIELD_INT(T, v.queue_sel, 1), \
        STATE_FIELD_VAR(T, v.saved, v.saved_len, 1)
int virtio_save(void *v, struct error *err);
int virtio_load(void *v, uint16_t version, struct error *err);

// --- for transports; dev.lock is held

uint32_t virtio_features_read(const struct virtio *v);        // half that offered_sel names
void virtio_features_write(struct virtio *v, uint32_t value); // half that accepted_sel names
uint8_t virtio_status_read(struct virtio *v);                 // ends a reset that may end
void virtio_status_write(struct virtio *v, uint8_t value);    // 0 resets
struct virtqueue *virtio_selected(struct virtio *v);          // NULL: no such queue
// The selected queue while its size and addresses may be written, else NULL.
struct virtqueue *virtio_configurable(struct virtio *v);
void virtio_queue_ready(struct virtio *v, bool ready); // of the selected queue
uint64_t virtio_config_read(const struct virtio *v, uint64_t offset, unsigned size);
void virtio_config_write(struct virtio *v, uint64_t offset, unsigned size, uint64_t value);
