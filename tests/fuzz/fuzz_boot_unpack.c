// SPDX-License-Identifier: Apache-2.0
// The payload unpackers alone. The size word behind the input is left to the fuzzer.
#include "fuzz_boot.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint64_t limit = 16 * MiB;
    struct unpacked out;
    struct error err = {0};
    int ret = unpack(&out, "fuzz", data, size, limit, &err);
    must(ret || (out.size && out.size <= limit && out.data), "a result has bytes");
    must(!ret || (!out.data && err.code == ret), "an error leaves nothing");
    volatile uint8_t last = ret ? 0 : out.data[out.size - 1];
    (void)last;
    unpack_free(&out);
    return 0;
}
