# SPDX-License-Identifier: Apache-2.0
"""The stages of scripts/test. Each one adds what it found to a Tally."""

import ast
import concurrent.futures
import glob
import json
import os
import re
import shutil
import subprocess
import threading
import time

import proc

# Tests wait for events; these limits only end what hangs. Builds of kernel and tests share two
# CPUs, and a sanitizer makes code several times slower.
MESON_TIMEOUT_FACTOR = {"gcc": 2, "asan": 4, "tsan": 8}
LINUX_FILE_TIMEOUT_S = {False: 20 * 60, True: 90 * 60}
FUZZ_SECONDS = {False: 60, True: 180}

CHECK_LINE = re.compile(r"^\d+%: Checks: (\d+), Failures: (\d+), Errors: (\d+)", re.M)


class Stages:
    def __init__(self, root, build, guest, tally, text, long):
        self.root, self.build, self.guest = root, build, guest
        self.tally, self.text, self.long = tally, text, long
        self.logs = os.path.join(build, "test-logs")
        self.guest_thread = None
        self.guest_error = None

    def environment(self, **more):
        return {
            **os.environ,
            "FERRY_ROOT": self.root,
            "FERRY_BUILD": self.build,
            "FERRY": os.path.join(self.build, "ferry"),
            "FERRY_GUEST": self.guest,
            **({"FERRY_LONG": "1"} if self.long else {}),
            "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            # It goes on after a race, so that all of a test's are seen.
            "TSAN_OPTIONS": f"exitcode=66:suppressions={self.root}/tests/tsan.supp",
            **more,
        }

    def wanted(self, name):
        return self.text in name

    # --- builds

    def directory(self, kind):
        return self.build if kind == "gcc" else os.path.join(self.build, kind)

    def configure(self, kind, options, compiler):
        """meson setup, once. False: it failed, and the tally knows."""
        directory = self.directory(kind)
        os.makedirs(self.logs, exist_ok=True)
        log = os.path.join(self.logs, f"{kind}-build.log")
        open(log, "wb").close()
        if os.path.exists(os.path.join(directory, "build.ninja")):
            return True
        argv = ["meson", "setup", directory, self.root, *options]
        if proc.logged(f"configure {kind}", argv, log, env=self.environment(CC=compiler)):
            self.tally.add_failed(f"build {kind}", f"meson setup failed, see {log}", proc.tail(log))
            return False
        return True

    def compile(self, kind):
        log = os.path.join(self.logs, f"{kind}-build.log")
        begin = time.monotonic()
        if proc.logged(f"build {kind}", ["ninja", "-C", self.directory(kind)], log):
            with open(log, errors="replace") as f:
                said = "".join(line for line in f if not line.startswith("["))  # no progress lines
            self.tally.add_failed(f"build {kind}", f"ninja failed, see {log}", said[-6000:])
            return False
        self.tally.add_passed(f"build {kind}", note=f"{time.monotonic() - begin:.0f} s")
        return True

    def build_and_test(self, kind, options=(), compiler="gcc", needed=False):
        """`needed`: later stages use what is built, whatever the filter."""
        if not self.configure(kind, options, compiler):
            return
        tests = self.meson_tests(kind)
        if self.text and not tests and not needed:
            return
        if self.compile(kind):
            self.run_meson_tests(kind, tests)

    def build_only(self, kind, options=(), compiler="gcc"):
        if self.wanted(f"build {kind}") and self.configure(kind, options, compiler):
            self.compile(kind)

    # --- meson's tests

    def meson_tests(self, kind):
        listing = subprocess.run(["meson", "introspect", "--tests", self.directory(kind)],
                                 capture_output=True, check=True, text=True)
        return [test["name"] for test in json.loads(listing.stdout)
                if self.wanted(f"{kind} {test['name']}")]

    def run_meson_tests(self, kind, tests):
        if not tests:
            return
        directory = self.directory(kind)
        log = os.path.join(self.logs, f"{kind}-test.log")
        results = os.path.join(directory, "meson-logs", "testlog.json")
        for old in (log, results):
            if os.path.exists(old):
                os.remove(old)
        names = tests if self.text else []
        argv = ["meson", "test", "-C", directory, "--no-rebuild", "--print-errorlogs",
                "--timeout-multiplier", str(MESON_TIMEOUT_FACTOR[kind]), *names]
        slow = {"CK_TIMEOUT_MULTIPLIER": "6"} if kind == "tsan" else {}
        proc.logged(f"test {kind}", argv, log, env=self.environment(**slow))
        seen = set()
        if os.path.exists(results):
            with open(results) as f:
                for line in f:
                    test = json.loads(line)
                    seen.add(test["name"].split(" / ")[-1])
                    self.add_meson_result(kind, test)
        for name in sorted(set(tests) - seen):
            self.tally.add_failed(f"{kind} {name}", f"meson did not run it, see {log}")

    def add_meson_result(self, kind, test):
        """One program; a `check` program says how many cases it holds, others count as one."""
        name = f"{kind} {test['name'].split(' / ')[-1]}"
        output = test.get("stdout", "") + test.get("stderr", "")
        lines = [line.strip() for line in output.split("\n") if line.strip()]
        seconds = f"{test['duration']:.1f} s"
        counts = [tuple(map(int, found)) for found in CHECK_LINE.findall(output)]
        if test["result"] in ("SKIP", "IGNORED"):
            self.tally.add_skipped(name, lines[-1] if lines else "gives no reason")
        elif test["result"] in ("OK", "EXPECTEDFAIL"):
            checks = sum(total for total, _, _ in counts) if counts else 1
            self.tally.add_passed(name, checks, f"{checks} cases, {seconds}" if counts else seconds)
        else:
            bad = sum(failures + errors for _, failures, errors in counts)
            good = sum(total for total, _, _ in counts) - bad
            if good > 0:
                self.tally.add_passed(name, good, quiet=True)
            why = f"{test['result'].lower()}, status {test.get('returncode')}, {seconds}"
            self.tally.add_failed(name, why, "\n".join(lines[-60:]))
            for _ in range(bad - 1):
                self.tally.add_failed(name, "a further case", quiet=True)

    # --- guards

    def guards(self):
        """Takes each guard against hostile guests out and expects a test to notice."""
        if not self.wanted("guards"):
            return
        log = os.path.join(self.logs, "guards.log")
        open(log, "wb").close()
        argv = [os.path.join(self.root, "tests", "bare", "guards"),
                os.path.join(self.build, "guards")]
        proc.logged("guards", argv, log, env=self.environment())
        with open(log, errors="replace") as f:
            lines = f.read().splitlines()
        for line in lines:
            if line.startswith("ok "):
                self.tally.add_passed("guard " + line.split()[1].rstrip(":"), quiet=True)
            elif line.startswith("FAIL "):
                self.tally.add_failed("guard " + line.split()[1].rstrip(":"), line)
        if not any(line.startswith(("ok ", "FAIL ")) for line in lines):
            self.tally.add_failed("guards", f"did not run, see {log}", proc.tail(log))

    # --- fuzzers

    def fuzz(self):
        if not shutil.which("clang"):
            self.tally.add_skipped("fuzzers", "no clang; scripts/install --with test")
            return
        options = ["-Dfuzzers=true", "-Dferry_sanitize=address"]
        if not self.configure("fuzz", options, "clang"):
            return
        sources = glob.glob(os.path.join(self.root, "tests", "fuzz", "fuzz_*.c"))
        if not [s for s in sources if self.wanted(os.path.basename(s)[:-2])]:
            return
        if not self.compile("fuzz"):
            return
        directory = os.path.join(self.directory("fuzz"), "tests", "fuzz")
        targets = [path for path in sorted(glob.glob(os.path.join(directory, "fuzz_*")))
                   if os.path.isfile(path) and os.access(path, os.X_OK)
                   and self.wanted(os.path.basename(path))]
        self.make_seeds()
        label = f"{len(targets)} fuzzers, {FUZZ_SECONDS[self.long]} s each"
        # Some more than there are CPUs: all of them within the time that CI has.
        at_once = (os.cpu_count() or 1) * 3 // 2 or 1
        with proc.progress(label, os.devnull), \
                concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self.fuzz_one, targets))

    def make_seeds(self):
        """Programs tests/fuzz/*_seeds write start corpora: DIRECTORY/TARGET/*."""
        directory = os.path.join(self.directory("fuzz"), "seeds")
        for path in sorted(glob.glob(os.path.join(self.root, "tests", "fuzz", "*_seeds"))):
            log = os.path.join(self.logs, f"{os.path.basename(path)}.log")
            open(log, "wb").close()
            os.makedirs(directory, exist_ok=True)
            if proc.logged("make seeds", [path, directory], log, env=self.environment()):
                self.tally.add_failed(os.path.basename(path), f"failed, see {log}", proc.tail(log))

    def fuzz_one(self, target):
        name = os.path.basename(target)
        log = os.path.join(self.logs, f"{name}.log")
        found = os.path.join(self.directory("fuzz"), "findings", name) + os.sep
        corpus = os.path.join(self.directory("fuzz"), "corpus", name)
        os.makedirs(found, exist_ok=True)
        os.makedirs(corpus, exist_ok=True)
        argv = [target, f"-max_total_time={FUZZ_SECONDS[self.long]}", "-timeout=20",
                "-rss_limit_mb=2048", "-print_final_stats=1", f"-artifact_prefix={found}", corpus]
        short = name[len("fuzz_"):]
        argv += [seeds for seeds in (os.path.join(self.directory("fuzz"), "seeds", short),
                                     os.path.join(self.root, "tests", "fuzz", "corpus", short))
                 if os.path.isdir(seeds)]
        with open(log, "wb") as out:
            child = proc.start(argv, stdout=out, stderr=subprocess.STDOUT, env=self.environment(),
                               cwd=self.directory("fuzz"))
            status = proc.finish(child, FUZZ_SECONDS[self.long] + 120)
        with open(log, errors="replace") as f:
            runs = re.search(r"stat::number_of_executed_units: (\d+)", f.read())
        if status == 0 and runs:
            self.tally.add_passed(name, note=f"{runs.group(1)} inputs")
        else:
            how = "did not end" if status is None else f"status {status}"
            self.tally.add_failed(name, f"{how}; input in {found}, log {log}", proc.tail(log))

    # --- the guest and Linux

    def linux_files(self):
        """Files of tests/linux with a test that is wanted, found without running them."""
        found = []
        for path in sorted(glob.glob(os.path.join(self.root, "tests", "linux", "test_*.py"))):
            module = os.path.splitext(os.path.basename(path))[0]
            with open(path) as f:
                classes = [item for item in ast.parse(f.read()).body
                           if isinstance(item, ast.ClassDef)]
            names = [f"{module}.{group.name}.{test.name}" for group in classes
                     for test in group.body if isinstance(test, ast.FunctionDef)]
            if not self.text or any(map(self.wanted, names)):
                found.append(path)
        return found

    def start_guest_build(self):
        """In the background: a kernel takes minutes, and what comes first does not need it."""
        os.makedirs(self.logs, exist_ok=True)
        self.guest_log = os.path.join(self.logs, "guest-build.log")

        def build():
            try:
                with open(self.guest_log, "wb") as out:
                    argv = ["nice", "-n", "5", os.path.join(self.root, "guest", "build"), "all",
                            "tools", "--out", self.guest]
                    status = proc.finish(proc.start(argv, stdout=out, stderr=subprocess.STDOUT))
                if status:
                    self.guest_error = f"guest/build: status {status}, see {self.guest_log}"
            except OSError as error:
                self.guest_error = f"guest/build: {error}"

        self.guest_thread = threading.Thread(target=build, daemon=True)
        self.guest_thread.start()

    def linux(self, files):
        begin = time.monotonic()
        with proc.progress("build guest", self.guest_log):
            self.guest_thread.join()
        if self.guest_error:
            self.tally.add_failed("build guest", self.guest_error, proc.tail(self.guest_log))
            for path in files:
                self.tally.add_skipped(os.path.basename(path), "the guest did not build")
            return
        if self.wanted("build guest"):
            waited = time.monotonic() - begin
            self.tally.add_passed("build guest", note=f"waited {waited:.0f} s for it")
        if not os.path.exists(os.path.join(self.build, "ferry")):
            for path in files:
                self.tally.add_skipped(os.path.basename(path), "ferry did not build")
            return
        # As many at a time as there are CPUs; the longest files first, so that none is left alone.
        files = sorted(files, key=os.path.getsize, reverse=True)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(self.linux_file, files))

    def linux_file(self, path):
        name = os.path.basename(path)
        report = os.path.join(self.logs, f"{name}.jsonl")
        if os.path.exists(report):
            os.remove(report)
        child = proc.start(["python3", os.path.join(os.path.dirname(__file__), "unittest_child.py"),
                            path, report, self.text], env=self.environment())
        limit = LINUX_FILE_TIMEOUT_S[self.long]
        status = proc.finish(child, limit)
        ended = False
        if os.path.exists(report):
            with open(report) as f:
                for item in map(json.loads, f):
                    if "end" in item:
                        ended = True
                    elif item["result"] == "passed":
                        self.tally.add_passed(item["name"], quiet=True)
                    elif item["result"] == "skipped":
                        self.tally.add_skipped(item["name"], item["why"], quiet=True)
                    else:
                        self.tally.add_failed(item["name"], item["why"], quiet=True)
        if not ended:
            why = f"not done after {limit} s" if status is None else f"ended early, status {status}"
            self.tally.add_failed(name, why)
