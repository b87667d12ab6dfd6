// SPDX-License-Identifier: Apache-2.0
// USDT probes: places that perf, bpftrace and SystemTap can watch in a running VM (docs/tracing.md
// lists them). Each is one `nop` and a note in the ELF file; without <sys/sdt.h> at build time
// there are none. Arguments are integers and pointers that are at hand anyway.
#pragma once

#if __has_include(<sys/sdt.h>)
#include <sys/sdt.h>
#define FERRY_PROBE2(name, a, b)       STAP_PROBE2(ferry, name, a, b)
#define FERRY_PROBE3(name, a, b, c)    STAP_PROBE3(ferry, name, a, b, c)
#define FERRY_PROBE4(name, a, b, c, d) STAP_PROBE4(ferry, name, a, b, c, d)
#else
#define FERRY_PROBE2(name, a, b)       ((void)(a), (void)(b))
#define FERRY_PROBE3(name, a, b, c)    ((void)(a), (void)(b), (void)(c))
#define FERRY_PROBE4(name, a, b, c, d) ((void)(a), (void)(b), (void)(c), (void)(d))
#endif
