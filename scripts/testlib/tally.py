# SPDX-License-Identifier: Apache-2.0
"""What passed, failed and was skipped, each printed as it becomes known."""

import sys
import threading


class Tally:
    def __init__(self):
        self.passed = 0
        self.failures = []  # (name, why)
        self.skips = []  # (name, why)
        self._lock = threading.Lock()

    def _print(self, word, name, note):
        print(f"{word:<6} {name}{'  ' + note if note else ''}", flush=True)

    def add_passed(self, name, count=1, note="", quiet=False):
        with self._lock:
            self.passed += count
            if not quiet:
                self._print("ok", name, note)

    def add_failed(self, name, why, detail="", quiet=False):
        with self._lock:
            self.failures.append((name, why))
            if not quiet:
                self._print("FAILED", name, why)
                if detail:
                    print("    " + detail.rstrip().replace("\n", "\n    "), flush=True)

    def add_skipped(self, name, why, quiet=False):
        with self._lock:
            self.skips.append((name, why))
            if not quiet:
                self._print("skip", name, why)

    def close(self):
        """Prints skips, failures and the closing line; the exit status."""
        for title, items in (("skipped", self.skips), ("failed", self.failures)):
            if items:
                print(f"\n{title}:")
                for name, why in items:
                    print(f"  {name}: {why}")
        print(f"\n{self.passed} passed, {len(self.failures)} failed, {len(self.skips)} skipped")
        sys.stdout.flush()
        return 1 if self.failures else 0
