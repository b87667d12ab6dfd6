# SPDX-License-Identifier: Apache-2.0
"""The host's view of the blocks that the guest's `verify` writes (guest/linux/init/verify.c)."""

import struct

BLOCK = 4096
WORDS = struct.Struct("<512Q")
MAGIC = 0x6B6C427972726546
SUM_WORD = 3


def generation(block, number):
    """The generation of an intact block that belongs at `number`, else None."""
    words = WORDS.unpack(block)
    total = 0xCBF29CE484222325
    for i, word in enumerate(words):
        total = ((total ^ (0 if i == SUM_WORD else word)) * 0x100000001B3) & (1 << 64) - 1
    whole = words[0] == MAGIC and words[1] == number and words[SUM_WORD] == total
    return words[2] if whole else None


def generations(path, blocks, offset=0):
    """One entry a block: its generation, 0 for a block of zeros, None for anything else."""
    with open(path, "rb") as image:
        image.seek(offset)
        data = [image.read(BLOCK) for _ in range(blocks)]
    return [0 if not any(block) else generation(block, number) if len(block) == BLOCK else None
            for number, block in enumerate(data)]
