# SPDX-License-Identifier: Apache-2.0
"""Runs one test file; prints each result and appends it to a report, one JSON object a line.

usage: unittest_child.py FILE REPORT FILTER

A file of its own per process, so that one that hangs or crashes takes no other along. The report's
last object, {"end": true}, tells a file that ran through from one that died.
"""

import importlib.util
import json
import os
import sys
import time
import traceback
import unittest


class Result(unittest.TestResult):
    def __init__(self, report):
        super().__init__()
        self.report = report
        self.began = 0.0

    def startTest(self, test):
        super().startTest(test)
        self.began = time.monotonic()
        print(f"run    {test.id()}", flush=True)

    def _add(self, test, result, why="", detail=""):
        seconds = time.monotonic() - self.began if self.began else 0.0
        word = {"passed": "ok", "failed": "FAILED", "skipped": "skip"}[result]
        print(f"{word:<6} {test.id()}  {seconds:.1f} s{'  ' + why if why else ''}", flush=True)
        if detail:
            print("    " + detail.rstrip().replace("\n", "\n    "), flush=True)
        json.dump({"name": test.id(), "result": result, "why": why}, self.report)
        self.report.write("\n")
        self.report.flush()

    def _add_failed(self, test, err):
        super().addFailure(test, err)
        text = traceback.format_exception_only(err[0], err[1])[-1].strip().split("\n")[0]
        self._add(test, "failed", text, "".join(traceback.format_exception(*err)))

    def addSuccess(self, test):
        self._add(test, "passed")

    addFailure = addError = _add_failed

    def addSkip(self, test, reason):
        self._add(test, "skipped", reason)

    def addExpectedFailure(self, test, err):
        self._add(test, "passed", "failed as expected")

    def addUnexpectedSuccess(self, test):
        self._add(test, "failed", "passed, but is marked as an expected failure")

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self._add_failed(subtest, err)


def each(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from each(item)
        else:
            yield item


def main():
    path, report_path, text = sys.argv[1:]
    name = os.path.splitext(os.path.basename(path))[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with open(report_path, "w") as report:
        spec.loader.exec_module(module)
        tests = unittest.defaultTestLoader.loadTestsFromModule(module)
        chosen = unittest.TestSuite(test for test in each(tests) if text in test.id())
        chosen.run(Result(report))
        json.dump({"end": True}, report)
        report.write("\n")


if __name__ == "__main__":
    main()
