# SPDX-License-Identifier: Apache-2.0
"""What scripts/bench runs once everything is built. See scripts/bench --help."""

import argparse
import os
import signal
import sys
import tempfile

import plot
import report
import rows
import suite_api
import suite_boot
import suite_io
import suite_migrate
import suite_sched
import suite_snapshot
from vmms import Ferry, Qemu

SUITES = {"boot": suite_boot, "api": suite_api, "io": suite_io, "migrate": suite_migrate,
          "snapshot": suite_snapshot, "sched": suite_sched}


def versions():
    found = {}
    for vmm in (Ferry, Qemu):
        try:
            found[vmm.name] = report.first_line(vmm.version())
        except rows.Absent as why:
            found[vmm.name] = None
            print(f"{vmm.name} is left out: {why}")
    return found


def say(text):
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=" ".join(SUITES))
    parser.add_argument("--row", default="", metavar="TEXT")
    parser.add_argument("--runs", type=int, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"no suite '{name}'; there are: {' '.join(SUITES)}")
    if options.runs is not None and options.runs < 1:
        parser.error(f"--runs {options.runs}: expected at least 1")

    for name in options.suites or SUITES:
        SUITES[name].register()
    chosen = [row for row in rows.ROWS if options.row in row.name]
    if not chosen:
        parser.error(f"no row has '{options.row}' in its name; see --list")
    if options.list:
        for row in chosen:
            print(f"{row.suite:<8} {row.name:<22} {row.what}; {row.runs} runs")
        return 0

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    facts, found = report.host(), versions()
    print(f"{facts['cpu']}, {facts['cpus']} CPUs, Linux {facts['kernel']}, "
          f"{' '.join(facts['kvm_modules']) or 'KVM built in'}, load {facts['load_at_start']}")
    for name, version in found.items():
        if version:
            print(f"{name}: {version}")
    results = []
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as directory:
        os.environ["FERRY_RUN_DIR"] = directory  # VMs that are killed leave their names there
        for row in chosen:
            rows.measure(row, options.runs or row.runs, say)
            results += report.digest(row)
            say("")
            if not sys.stdout.isatty():
                print(f"done: {row.suite} {row.name}", flush=True)
    print()
    print("\n".join(report.table(results)))
    for row in chosen:
        for name, why in {**row.absent, **row.problems}.items():
            word = "absent" if name in row.absent else "FAILED"
            print(f"{word}: {row.suite} {row.name}, {name}: {why}")
    if options.json:
        report.write_json(options.json, facts, found, chosen, results)
    if options.plot:
        plot.write(options.plot, results)
    return 1 if any(row.problems for row in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
