// SPDX-License-Identifier: Apache-2.0
// The guest-physical memory map, I/O ports and interrupt lines: one ordered list.
// docs/memory-map.md is made from this file by scripts/memory-map; keep one constant a line
// with its comment.
#pragma once

// --- RAM below 1 MiB, in order of address
#define LAYOUT_GDT         0x00000500 // boot GDT
#define LAYOUT_PVH_INFO    0x00006000 // hvm_start_info, module list, memory map
#define LAYOUT_ZERO_PAGE   0x00007000 // struct boot_params, Linux boot protocol
#define LAYOUT_REAL_IMAGE  0x00007c00 // raw real-mode image (no zero page then)
#define LAYOUT_PML4        0x00009000 // boot page tables: PML4, PDPT, 4 page directories
#define LAYOUT_PT_END      0x0000f000 // end of the boot page tables
#define LAYOUT_MULTIBOOT   0x00010000 // multiboot information
#define LAYOUT_CMDLINE     0x00020000 // kernel command line, zero-terminated
#define LAYOUT_CMDLINE_MAX 0x00010000 // bytes reserved for it
#define LAYOUT_EBDA        0x0009fc00 // end of usable base memory
#define LAYOUT_ACPI        0x000e0000 // RSDP first, then every ACPI table
#define LAYOUT_ACPI_END    0x000ef000 // end of the ACPI area
#define LAYOUT_VMGENID     0x000ef000 // generation id: 16 bytes, in a page of its own
#define LAYOUT_MPTABLE     0x000f0000 // MP floating pointer, then the MP table
#define LAYOUT_MPTABLE_END 0x00100000 // end of the MP area
#define LAYOUT_KERNEL      0x00100000 // kernels load from here on

// --- the hole below 4 GiB
#define LAYOUT_RAM_LOW_MAX 0xc0000000  // RAM above this many bytes continues at 4 GiB
#define LAYOUT_VIRTIO_MMIO 0xd0000000  // virtio-mmio windows, 4 KiB each
#define LAYOUT_VIRTIO_END  0xd0100000  // end of the virtio-mmio windows
#define LAYOUT_PCI_MMIO    0xd1000000  // memory of PCI functions, 64 KiB each at the start
#define LAYOUT_PCI_END     0xe0000000  // end of the PCI memory
#define LAYOUT_ECAM        0xe0000000  // PCI configuration space (ECAM), 1 MiB a bus
#define LAYOUT_ECAM_END    0xe0100000  // end of ECAM
#define LAYOUT_IOAPIC      0xfec00000  // I/O APIC
#define LAYOUT_LAPIC       0xfee00000  // local APICs; interrupt messages are written here
#define LAYOUT_LAPIC_END   0xfef00000  // end of the addresses of messages
#define LAYOUT_IDENTITY_PT 0xfffbc000  // KVM's identity-map page (VT-x real mode)
#define LAYOUT_TSS         0xfffbd000  // KVM's three TSS pages (VT-x real mode)
#define LAYOUT_RAM_HIGH    0x100000000 // RAM continues here

// --- I/O ports
#define PORT_I8042_DATA 0x060 // keyboard controller: only reset is real
#define PORT_I8042_CMD  0x064 // 0xfe resets the machine
#define PORT_RTC        0x070 // CMOS index, data
#define PORT_DEBUG_EXIT 0x0f4 // 32-bit write ends the VM with that value
#define PORT_COM1       0x3f8 // 16550, 8 ports
#define PORT_PVPANIC    0x505 // the guest kernel's panic notifier
#define PORT_SLEEP      0x604 // ACPI sleep control (hardware-reduced), 8 bit
#define PORT_SLEEP_STAT 0x605 // ACPI sleep status, 8 bit
#define PORT_EVENT      0x608 // generic event device: pending events, read clears, 8 bit
#define PORT_PCI        0xcf8 // PCI configuration address, data (4 bytes each)
#define PORT_UCALL      0xe80 // bare-metal guests' call to the host (guest/bare/ucall_abi.h)
#define PORT_MARK       0xe84 // first-instruction mark of the start-up benchmark

// --- interrupt lines (GSI)
#define GSI_COM1   4  // 16550
#define GSI_EVENT  9  // generic event device: power button
#define GSI_VIRTIO 16 // first virtio-mmio line
#define GSI_MAX    24 // lines of the I/O APIC

_Static_assert(LAYOUT_GDT < LAYOUT_PVH_INFO && LAYOUT_PVH_INFO < LAYOUT_ZERO_PAGE, "order");
_Static_assert(LAYOUT_ZERO_PAGE + 0x1000 <= LAYOUT_PML4, "the zero page is one page");
_Static_assert(LAYOUT_PML4 + 6 * 0x1000 <= LAYOUT_PT_END, "six boot page tables");
_Static_assert(LAYOUT_PT_END <= LAYOUT_MULTIBOOT && LAYOUT_MULTIBOOT < LAYOUT_CMDLINE, "order");
_Static_assert(LAYOUT_CMDLINE + LAYOUT_CMDLINE_MAX <= LAYOUT_EBDA, "order");
_Static_assert(LAYOUT_EBDA < LAYOUT_ACPI && LAYOUT_ACPI_END <= LAYOUT_VMGENID, "order");
_Static_assert(LAYOUT_VMGENID + 0x1000 <= LAYOUT_MPTABLE, "the generation id has a page");
_Static_assert(LAYOUT_MPTABLE_END <= LAYOUT_KERNEL, "order");
_Static_assert(LAYOUT_KERNEL < LAYOUT_RAM_LOW_MAX && LAYOUT_RAM_LOW_MAX <= LAYOUT_VIRTIO_MMIO,
               "order");
_Static_assert(LAYOUT_VIRTIO_END <= LAYOUT_PCI_MMIO && LAYOUT_PCI_END <= LAYOUT_ECAM &&
                   LAYOUT_ECAM_END <= LAYOUT_IOAPIC,
               "order");
_Static_assert(LAYOUT_LAPIC < LAYOUT_IDENTITY_PT && LAYOUT_TSS + 0x3000 <= LAYOUT_RAM_HIGH,
               "order");
