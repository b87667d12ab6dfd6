// SPDX-License-Identifier: Apache-2.0
#pragma once

// A small virtio driver (virtio 1.2) for bare-metal guests: finds devices, negotiates, sets queues
// up, adds chains, rings, waits. It helps bad drivers as well: registers, descriptors and
// publishing are open to write anything. All of it runs in ring 3, too, where loops are fast.
//
// One thread at a time uses a ring or a device. Waits end after VIRTIO_WAIT_CYCLES.

#include "rt.h"

#define VIRTIO_WAIT_CYCLES (240ull << 30) // of the TSC: a minute or more; only bounds a hang
#define VIRTIO_DEVICES_MAX 40

enum { VIRTIO_NET = 1, VIRTIO_BLK = 2, VIRTIO_CONSOLE = 3, VIRTIO_RNG = 4 }; // 5, kinds of device
enum { VIRTIO_BALLOON = 5, VIRTIO_VSOCK = 19 };

enum { // 2.1
    VS_ACKNOWLEDGE = 1,
    VS_DRIVER = 2,
    VS_DRIVER_OK = 4,
    VS_FEATURES_OK = 8,
    VS_NEEDS_RESET = 64,
    VS_FAILED = 128,
};

#define VF_INDIRECT  (1ull << 28)
#define VF_EVENT_IDX (1ull << 29)
#define VF_VERSION_1 (1ull << 32)
#define VF_PACKED    (1ull << 34)

enum { // flags of descriptors; the last two are of packed rings
    VD_NEXT = 1,
    VD_WRITE = 2,
    VD_INDIRECT = 4,
    VD_AVAIL = 1 << 7,
    VD_USED = 1 << 15,
};

// Registers that both transports have.
enum vreg {
    VR_FEATURES_SEL,
    VR_FEATURES,
    VR_ACCEPT_SEL,
    VR_ACCEPT,
    VR_STATUS,
    VR_GENERATION,
    VR_QUEUE_SEL,
    VR_QUEUE_MAX, // pci: the size register, which begins as the largest size
    VR_QUEUE_SIZE,
    VR_READY,
    VR_DESC, // 64 bits, this and the next two
    VR_DRIVER,
    VR_DEVICE,
    VR_COUNT
};

struct vtransport;

struct vdev {
    const struct vtransport *transport;
    uint32_t id;                        // VIRTIO_...
    uint64_t regs, config, notify, isr; // addresses; of pci inside its BARs
    uint32_t notify_step;               // pci: bytes between doorbells
    uint32_t gsi;                       // mmio: its interrupt line
    uint64_t pci;                       // pci: its configuration space
    uint64_t msix;                      // pci: its MSI-X table, 0 = none
    uint64_t accepted;                  // features
};

struct vbuf {
    uint64_t gpa;
    uint32_t len;
    bool in; // the device writes it
};

#define VRING_MAX 256

struct vring {
    struct vdev *dev;
    uint16_t queue, size;
    bool packed, event_idx;
    uint64_t desc, driver, device;
    uint64_t doorbell;
    uint16_t next, seen; // split: free-running indexes; packed: positions
    bool wrap, seen_wrap;
    uint16_t free;             // descriptors
    uint16_t pending;          // descriptors (split: chains) added since the last doorbell
    uint16_t free_head;        // split: list of free descriptors; packed: of free ids
    uint16_t link[VRING_MAX];  // of that list
    uint16_t slots[VRING_MAX]; // by id: descriptors of a chain
};

// --- devices

// All devices of virtio-mmio windows on the command line ("virtio_mmio.device=4K@ADDRESS:LINE") and
// of PCI; returns their number. Not in ring 3.
unsigned virtio_find(struct vdev *out, unsigned max);
// The n-th with that id; fails the guest when there is none.
struct vdev *virtio_get(struct vdev *list, unsigned nr, uint32_t id, unsigned n);

uint64_t vreg_read(const struct vdev *dev, enum vreg reg);
void vreg_write(const struct vdev *dev, enum vreg reg, uint64_t value);
uint32_t virtio_isr(const struct vdev *dev); // reads and acknowledges
uint64_t virtio_offered(const struct vdev *dev);

void virtio_reset(struct vdev *dev);
// From reset to FEATURES_OK with `features` & what is offered. False: the device does not agree.
bool virtio_begin(struct vdev *dev, uint64_t features);
// `base`: VRING_BYTES(size) of memory, 4 KiB aligned, cleared here. False: not enabled.
#define VRING_BYTES(size) (((size)*26 + 12 + 8191) & -4096ul)
bool vring_setup(struct vring *r, struct vdev *dev, unsigned queue, unsigned size, uint64_t base);
void virtio_go(struct vdev *dev); // DRIVER_OK

// --- rings

// Adds a chain, in an indirect table at `table` unless that is 0. Its id, or -1: the ring is full.
int vring_add(struct vring *r, const struct vbuf *bufs, unsigned n, uint64_t table);
// Rings if the device wants to hear of what was added (true: it did), or in any case.
bool vring_kick(struct vring *r);
void vring_doorbell(struct vring *r);
// What the device gave back next.
bool vring_used(struct vring *r, uint32_t *id, uint32_t *len);
bool vring_wait(struct vring *r, uint32_t *id, uint32_t *len);
// Whether interrupts are wanted: for the next entry used, or for none. Off after vring_setup.
void vring_interrupts(struct vring *r, bool on);

// Raw: descriptor `i` of a table of either format. `extra` is a packed one's id, a split one's
// next.
void vdesc_write(bool packed, uint64_t table, unsigned i, uint64_t gpa, uint32_t len,
                 uint16_t flags, uint16_t extra);
// Flags that make a packed descriptor at ring position `next` + ahead available.
uint16_t vring_avail_flags(const struct vring *r, unsigned ahead);
// Split: entry `index` of the available ring and the index itself.
void vring_publish(struct vring *r, uint16_t index, uint16_t head, uint16_t avail_idx);

// --- interrupts; ring 0

// Brings the device's interrupts (mmio: its line; pci: MSI-X message 0, for configuration and all
// queues) to `vector` of this CPU. Call before queues are set up. False: it has none.
bool virtio_irq(struct vdev *dev, unsigned vector);
