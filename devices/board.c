// SPDX-License-Identifier: Apache-2.0
#include "devices/board.h"

#include "devices/console.h"
#include "devices/mptable.h"
#include "devices/pci.h"
#include "devices/platform.h"
#include "devices/serial.h"
#include "devices/ucall.h"
#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vm.h"

static void console_command(void *arg, enum console_command command)
{
    struct device *power = arg;
    if (command == CONSOLE_POWER)
        power_button(power);
    else
        vm_request_stop(power->vm, VM_STOP_HOST, 0, "ended with the escape key of the console");
}

static int firmware_write(struct vm *vm, const struct board_config *config, struct board *board,
                          struct error *err)
{
    const struct acpi_config acpi = {.cpus = vm->config.cpus,
                                     .virtio = config->virtio,
                                     .nr_virtio = config->nr_virtio,
                                     .pci = config->pci,
                                     .vmgenid = config->vmgenid};
    int ret = acpi_build(&vm->ram, &acpi, &board->rsdp, err);
    return ret ? ret : mptable_build(&vm->ram, vm->config.cpus, err);
}

int board_create(struct vm *vm, const struct board_config *config, struct board *board,
                 struct error *err)
{
    const struct serial_config serial = {.console = config->console};
    struct device *pci = NULL;
    *board = (struct board) {0};
    const struct {
        const struct device_class *class;
        bool present;
        const void *config;
        struct device **out;
    } devices[] = {
        {&serial_class, true, &serial, &board->serial},
        {&i8042_class, true, NULL, NULL},
        {&rtc_class, true, config->rtc, NULL},
        {&power_class, true, NULL, &board->power},
        {&pvpanic_class, true, NULL, NULL},
        {&debug_exit_class, config->debug_exit, NULL, NULL},
        {&ucall_class, config->ucall != NULL, config->ucall, &board->ucall},
        {&mark_class, config->mark != NULL, config->mark, &board->mark},
        {&pci_host_class, config->pci, NULL, &pci},
        {&vmgenid_class, config->vmgenid, NULL, &board->vmgenid},
    };
    int ret = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(devices) && !ret; i++)
        if (devices[i].present)
            ret = device_add(vm, devices[i].class, devices[i].config, devices[i].out, err);

    board->pci = pci ? pci_host_of(pci) : NULL;

    if (!ret)
        ret = firmware_write(vm, config, board, err);
    if (!ret && config->console)
        console_on_command(config->console, console_command, board->power);
    return ret;
}

int board_reset(struct vm *vm, const struct board_config *config, struct board *board,
                struct error *err)
{
    uint8_t id[VMGENID_LEN];
    int ret = ram_read(&vm->ram, LAYOUT_VMGENID, id, sizeof(id));
    if (ret)
        return error_set(err, ret, "generation id: no guest RAM at 0x%x", LAYOUT_VMGENID);
    ret = vm_reset(vm, err);
    if (!ret)
        ret = firmware_write(vm, config, board, err);
    if (!ret && config->vmgenid)
        ram_write(&vm->ram, LAYOUT_VMGENID, id, sizeof(id));
    return ret;
}
