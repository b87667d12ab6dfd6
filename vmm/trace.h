// SPDX-License-Identifier: Apache-2.0
// `--trace`: exits as they happen, counted per kind and address.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct trace;

enum trace_kind { TRACE_PIO_IN, TRACE_PIO_OUT, TRACE_MMIO_READ, TRACE_MMIO_WRITE, TRACE_OTHER };

// `each`: print each exit, not only the table at the end.
struct trace *trace_create(bool each);
void trace_destroy(struct trace *trace);
// `rip`: of the guest, 0 = not known. `address` is a port, a GPA or an exit reason; `name` the
// device or reason (static storage).
void trace_exit(struct trace *trace, unsigned cpu, uint64_t rip, enum trace_kind kind,
                uint64_t address, unsigned size, uint64_t value, const char *name);
void trace_table(struct trace *trace, FILE *out);
