// SPDX-License-Identifier: Apache-2.0
// All CPUs start, count, and send each other one IPI.
#include "../rt.h"

#define VECTOR_IPI 0x40

static uint32_t counted;
static uint32_t ipis[CPU_MAX];

static void on_ipi(struct trap_frame *frame)
{
    (void)frame;
    __atomic_fetch_add(&ipis[cpu_self()->index], 1, __ATOMIC_RELEASE);
}

static void exchange(void *arg)
{
    (void)arg;
    struct cpu *self = cpu_self();
    GUEST_ASSERT_EQ(self, &cpus[self->index]);
    uint32_t place = __atomic_add_fetch(&counted, 1, __ATOMIC_ACQ_REL);
    while (__atomic_load_n(&counted, __ATOMIC_ACQUIRE) < cpu_count)
        pause();
    for (unsigned i = 0; i < cpu_count; i++)
        if (i != self->index) {
            ipi_send(cpus[i].apic_id, VECTOR_IPI);
            ipi_wait();
        }
    // Two IPIs of one vector that arrive before the first is taken merge into one.
    while (cpu_count > 1 && !__atomic_load_n(&ipis[self->index], __ATOMIC_ACQUIRE))
        irq_wait();
    guest_value(UCALL_V_CPU_COUNT, place, self->index);
    guest_value(UCALL_V_CPU_APIC_ID, self->apic_id, self->index);
    guest_value(UCALL_V_CPU_IPIS, ipis[self->index], self->index);
}

void guest_main(void)
{
    trap_handler_set(VECTOR_IPI, on_ipi);
    cpus_start(exchange, NULL);
    exchange(NULL);
    cpus_join();
    GUEST_ASSERT_EQ(counted, cpu_count);
    guest_value(UCALL_V_CPUS, cpu_count, 0);
    print("%u cpus\n", cpu_count);
}
