// SPDX-License-Identifier: Apache-2.0
// Between credit.c (queues, decisions) and credit_account.c (who is given how much).
#pragma once

#include "sched/credit.h"
#include "vmm/util.h"

#define list_entry(node, type, member) container_of(node, type, member)

static inline void list_init(struct credit_list *l)
{
    l->next = l->prev = l;
}

static inline bool list_empty(const struct credit_list *l)
{
    return l->next == l;
}

static inline void list_add_tail(struct credit_list *l, struct credit_list *node)
{
    node->prev = l->prev;
    node->next = l;
    l->prev->next = node;
    l->prev = node;
}

static inline void list_remove(struct credit_list *node)
{
    node->prev->next = node->next;
    node->next->prev = node->prev;
    list_init(node);
}

static inline uint64_t pcpu_bit(unsigned pcpu)
{
    return 1ull << pcpu;
}

// Whether a cap is in force for the VM.
static inline bool vm_capped(const struct credit *c, const struct credit_vm *vm)
{
    return vm->config.cap && !c->params.no_caps;
}

// Gives out the credits of the time since the last accounting. Classes and queues are not touched.
void account_give(struct credit *c, uint64_t now);
