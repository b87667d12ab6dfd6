// SPDX-License-Identifier: Apache-2.0
#include "migrate/machine.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm/cpuid.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

static int cpuid_get(int fd, unsigned long request, const char *what, struct kvm_cpuid2 **out,
                     struct error *err)
{
    *out = calloc(1, sizeof(**out) + CPUID_MAX_ENTRIES * sizeof((*out)->entries[0]));
    if (!*out)
        return error_set(err, -ENOMEM, "no memory for CPUID");
    (*out)->nent = CPUID_MAX_ENTRIES;
    return ioctl(fd, request, *out) ? error_errno(err, "%s", what) : 0;
}

int machine_describe(struct vm *vm, const struct migrate_hooks *hooks, struct machine *machine,
                     struct error *err)
{
    *machine = (struct machine) {.ram_size = vm->ram.size, .cpus = vm->config.cpus};
    ram_for_each_region (&vm->ram, r)
        machine->regions[machine->nr_regions++] = (struct wire_region) {r->gpa, r->size};
    int ret = cpuid_get(vm->vcpus[0].fd, KVM_GET_CPUID2, "KVM_GET_CPUID2", &machine->cpuid, err);
    if (!ret)
        ret = hooks->describe(hooks->context, vm, &machine->json, err);
    if (ret)
        machine_free(machine);
    return ret;
}

static int machine_check(const struct machine *machine, struct vm *vm, struct error *err)
{
    if (vm->ram.size != machine->ram_size || vm->ram.nr_regions != machine->nr_regions)
        return error_set(err, -EINVAL, "memory: %llu bytes described, %llu expected",
                         (unsigned long long)vm->ram.size, (unsigned long long)machine->ram_size);
    for (uint32_t i = 0; i < machine->nr_regions; i++)
        if (vm->ram.regions[i].gpa != machine->regions[i].gpa ||
            vm->ram.regions[i].size != machine->regions[i].size)
            return error_set(err, -EINVAL, "memory region %u lies at 0x%llx here, at 0x%llx there",
                             i, (unsigned long long)vm->ram.regions[i].gpa,
                             (unsigned long long)machine->regions[i].gpa);
    if (vm->config.cpus != machine->cpus)
        return error_set(err, -EINVAL, "CPUs: %u described, %u expected", vm->config.cpus,
                         machine->cpus);
    autofree struct kvm_cpuid2 *host = NULL;
    int ret = cpuid_get(vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID", &host, err);
    return ret ? ret : cpuid_compatible(machine->cpuid, host, err);
}

int machine_build(const struct machine *machine, const struct migrate_hooks *hooks, struct vm **vm,
                  struct error *err)
{
    *vm = NULL;
    int ret = hooks->create_vm(hooks->context, machine->json, vm, err);
    if (ret) {
        error_prefix(err, "building the VM");
        return ret;
    }
    ret = machine_check(machine, *vm, err);
    if (!ret && (*vm)->phase == VM_CREATED)
        ret = vm_start(*vm, err); // threads now, so that they cost no downtime later
    if (ret) {
        hooks->destroy_vm(hooks->context, *vm);
        *vm = NULL;
    }
    return ret;
}
