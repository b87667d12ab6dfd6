// SPDX-License-Identifier: Apache-2.0
#include "sched/vm.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "sched/credit.h"
#include "vmm/util.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

struct sched_tie {
    struct vcpu_turns turns;
    struct vm *vm;
    struct sched_client *client;
    char socket[108];
};

// --- steal time: what KVM's paravirtual interface tells a guest of the time it was kept waiting
// (Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME). KVM counts a thread that is
// runnable and does not run. One that waits for its turn sleeps: that we add.

enum { MSR_STEAL_TIME = 0x4b564d03, STEAL_ENABLED = 1, STEAL_PREEMPTED = 1 };

struct steal_time {
    uint64_t steal;   // ns
    uint32_t version; // odd while it changes
    uint32_t flags;
    uint8_t preempted;
    uint8_t reserved[47];
};
_Static_assert(sizeof(struct steal_time) == 64, "as the guest sees it");

// The guest's structure, or NULL: it has none, or names no memory.
static struct steal_time *steal_find(struct vcpu *vcpu, uint64_t *gpa)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msr = {.head.nmsrs = 1, .entry.index = MSR_STEAL_TIME};
    if (ioctl(vcpu->fd, KVM_GET_MSRS, &msr) != 1 || !(msr.entry.data & STEAL_ENABLED))
        return NULL;
    *gpa = align_down(msr.entry.data, sizeof(struct steal_time));
    return ram_at(&vcpu->vm->ram, *gpa, sizeof(struct steal_time));
}

static void steal_preempted(struct vcpu *vcpu, struct steal_time *st, uint64_t gpa)
{
    // KVM takes it back when the guest is entered.
    __atomic_store_n(&st->preempted, STEAL_PREEMPTED, __ATOMIC_RELEASE);
    ram_mark_dirty(&vcpu->vm->ram, gpa, sizeof(*st));
}

static void steal_add(struct vcpu *vcpu, struct steal_time *st, uint64_t gpa, uint64_t ns)
{
    uint32_t version = __atomic_load_n(&st->version, __ATOMIC_RELAXED) | 1;
    __atomic_store_n(&st->version, version, __ATOMIC_SEQ_CST);
    __atomic_store_n(&st->steal, __atomic_load_n(&st->steal, __ATOMIC_RELAXED) + ns,
                     __ATOMIC_SEQ_CST);
    __atomic_store_n(&st->version, version + 1, __ATOMIC_SEQ_CST);
    ram_mark_dirty(&vcpu->vm->ram, gpa, sizeof(*st));
}

// --- turns

static bool turn_take(struct vcpu_turns *turns, struct vcpu *vcpu)
{
    struct sched_tie *tie = container_of(turns, struct sched_tie, turns);
    if (__builtin_expect(sched_client_may(tie->client, vcpu->index), 1))
        return true;
    uint64_t gpa = 0;
    struct steal_time *st = steal_find(vcpu, &gpa);
    if (st)
        steal_preempted(vcpu, st, gpa);
    // Its first word holds immediate_exit, and nothing else that changes here.
    const uint32_t *look = (const uint32_t *)vcpu->run;
    if (!sched_client_take(tie->client, vcpu->index, look))
        return false;
    uint64_t waited = sched_client_waited(tie->client, vcpu->index);
    if (st && waited)
        steal_add(vcpu, st, gpa, waited);
    return true;
}

static void turn_give(struct vcpu_turns *turns, struct vcpu *vcpu)
{
    sched_client_give(container_of(turns, struct sched_tie, turns)->client, vcpu->index);
}

// --- coming and going

static void changed(void *arg, int code, const char *why)
{
    struct sched_tie *tie = arg;
    if (code)
        log_write(&tie->vm->log, LOG_WARN, "the scheduler is gone (%s): vCPUs run freely", why);
    else
        log_write(&tie->vm->log, LOG_DEBUG, "scheduled by %s", tie->socket);
}

// A vCPU that spins in KVM before it sleeps would be charged for it.
static void halt_poll_off(struct vm *vm)
{
    struct kvm_enable_cap cap = {.cap = KVM_CAP_HALT_POLL};
    if (ioctl(vm->fd, KVM_ENABLE_CAP, &cap))
        log_write(&vm->log, LOG_DEBUG, "KVM_CAP_HALT_POLL: %s", strerror(errno));
}

static int tie_attach(struct sched_tie *tie, bool must, struct error *err)
{
    int ret = sched_client_attach(tie->client, err);
    if (!ret)
        return 0;
    bool absent = ret == -ENOENT || ret == -ECONNREFUSED;
    if (must && !absent)
        return ret;
    log_write(&tie->vm->log, LOG_WARN, "%s: vCPUs run freely", err->text);
    return 0;
}

int sched_tie(struct sched_tie **out, struct vm *vm, const char *socket, int broker,
              const struct sched_share *share, bool must, struct error *err)
{
    pid_t tids[VM_MAX_VCPUS];
    struct sched_tie *tie = calloc(1, sizeof(*tie));
    if (!tie)
        return error_set(err, -ENOMEM, "no memory for the scheduler's tie");
    *tie = (struct sched_tie) {.turns = {.take = turn_take, .give = turn_give}, .vm = vm};
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        while (!(tids[i] = atomic_load(&vm->vcpus[i].tid)))
            sched_yield(); // it has been created and comes
    const struct sched_client_config config = {.socket = socket,
                                               .name = vm->name,
                                               .share = *share,
                                               .nr = vm->nr_vcpus,
                                               .tids = tids,
                                               .signal = vcpu_signal(),
                                               .broker = broker,
                                               .seccomp = vm->config.seccomp,
                                               .changed = changed,
                                               .arg = tie};
    int ret = sched_client_create(&tie->client, &config, err);
    if (ret) {
        free(tie);
        return ret;
    }
    strcpy(tie->socket, socket); // create has seen to its length
    halt_poll_off(vm);
    // Before the daemon knows of them: whom it signals must look.
    atomic_store_explicit(&vm->turns, &tie->turns, memory_order_release);
    ret = tie_attach(tie, must, err);
    if (!ret)
        ret = sched_client_watch(tie->client, err);
    // From an error the VM is dropped by the caller; its threads may still look at the tie.
    *out = tie;
    return ret;
}

void sched_untie(struct sched_tie *tie)
{
    if (!tie)
        return;
    sched_client_destroy(tie->client);
    free(tie);
}

int sched_tie_set(struct sched_tie *tie, const struct sched_share *share, struct error *err)
{
    return sched_client_set(tie->client, share, err);
}

json_t *sched_tie_show(const struct sched_tie *tie)
{
    struct sched_share share;
    char hard[SCHED_TEXT_MAX], soft[SCHED_TEXT_MAX];
    sched_client_share(tie->client, &share);
    return json_pack("{s:s, s:b, s:i, s:i, s:s, s:s}", "socket", tie->socket, "attached",
                     (int)sched_client_attached(tie->client), "weight",
                     share.has & SCHED_HAS_WEIGHT ? (int)share.weight : CREDIT_WEIGHT_DEFAULT,
                     "cap", (int)share.cap, "affinity", sched_mask_text(&share.hard, hard),
                     "soft_affinity", sched_mask_text(&share.soft, soft));
}
