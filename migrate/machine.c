// SPDX-License-Identifier: Apache-2.0
#include "migrate/machine.h"

#include <errno.h>
#include <jansson.h>
#include <string.h>

#include "vmm/cpuid.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

// What the vCPU was told, not what KVM_GET_CPUID2 says: a software back end adds bits of its own
// that KVM_GET_SUPPORTED_CPUID of the same host does not have.
static int cpuid_copy(const struct vm *vm, struct kvm_cpuid2 **out, struct error *err)
{
    const struct kvm_cpuid2 *cpuid = vcpu_cpuid(&vm->vcpus[0]);
    size_t len = sizeof(*cpuid) + cpuid->nent * sizeof(cpuid->entries[0]);
    *out = malloc(len);
    if (!*out)
        return error_set(err, -ENOMEM, "no memory for CPUID");
    memcpy(*out, cpuid, len);
    return 0;
}

int machine_describe(struct vm *vm, const struct migrate_hooks *hooks, struct machine *machine,
                     struct error *err)
{
    *machine = (struct machine) {.ram_size = vm->ram.size, .cpus = vm->config.cpus};
    ram_for_each_region (&vm->ram, r)
        machine->regions[machine->nr_regions++] = (struct wire_region) {r->gpa, r->size};
    int ret = cpuid_copy(vm, &machine->cpuid, err);
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
    return cpuid_compatible(machine->cpuid, vm->host_cpuid, err);
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

static bool cpuid_same(const struct kvm_cpuid2 *a, const struct kvm_cpuid2 *b)
{
    return a->nent == b->nent && !memcmp(a->entries, b->entries, a->nent * sizeof(a->entries[0]));
}

static bool json_same(const char *a, const char *b)
{
    json_t *x = json_loads(a, 0, NULL), *y = json_loads(b, 0, NULL);
    bool same = x && json_equal(x, y);
    json_decref(x);
    json_decref(y);
    return same;
}

int machine_same(const struct machine *machine, struct vm *vm, const struct migrate_hooks *hooks,
                 struct error *err)
{
    struct machine here;
    int ret = machine_check(machine, vm, err);
    if (!ret)
        ret = machine_describe(vm, hooks, &here, err);
    if (ret)
        return ret;
    if (!json_same(machine->json, here.json))
        ret = error_set(err, -EINVAL, "another machine: %.400s, this VM is %.400s", machine->json,
                        here.json);
    else if (!cpuid_same(machine->cpuid, here.cpuid))
        ret = error_set(err, -EINVAL, "the guest saw another processor (CPUID) than this VM has");
    machine_free(&here);
    return ret;
}
