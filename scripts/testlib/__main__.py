# SPDX-License-Identifier: Apache-2.0
"""What scripts/test runs once the packages are there. See scripts/test --help."""

import argparse
import os
import shutil
import signal
import sys

import proc
from stages import Stages
from tally import Tally


TSAN = ["-Dferry_sanitize=thread"]


def run(stages, options):
    if options.tsan:
        stages.build_and_test("tsan", TSAN)
        return
    if options.quick:
        stages.build_and_test("gcc")
        for what in ("sanitizers", "clang build", "fuzzers", "Linux guests"):
            stages.tally.add_skipped(what, "--quick")
        return
    linux_files = stages.linux_files()
    guest = bool(linux_files) or stages.wanted("build guest")
    if guest:
        stages.start_guest_build()
    stages.build_and_test("gcc", needed=bool(linux_files))
    stages.build_and_test("asan", ["-Dferry_sanitize=address"])
    if options.long:
        stages.build_and_test("tsan", TSAN)
        stages.guards()
    if shutil.which("clang"):
        stages.build_only("clang", compiler="clang")
    else:
        stages.tally.add_skipped("build clang", "no clang; scripts/install --with test")
    stages.fuzz()
    if guest:
        stages.linux(linux_files)


def main():
    parser = argparse.ArgumentParser(prog="scripts/test", add_help=False)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tsan", action="store_true")
    parser.add_argument("--filter", default="")
    options = parser.parse_args()
    if options.long + options.quick + options.tsan > 1:
        parser.error("--long, --quick and --tsan exclude each other")

    root = os.environ["FERRY_ROOT"]
    tally = Tally()
    stages = Stages(root, os.environ["FERRY_BUILD"], os.environ["FERRY_GUEST"], tally,
                    options.filter, options.long)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(stages, options)
    except KeyboardInterrupt:
        tally.add_failed("scripts/test", "interrupted")
    finally:
        proc.end_all()
    if not (tally.passed or tally.failures or tally.skips):
        tally.add_failed("scripts/test", f"no test has '{options.filter}' in its name")
    sys.exit(tally.close())


if __name__ == "__main__":
    main()
