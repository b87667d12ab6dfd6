# SPDX-License-Identifier: Apache-2.0
"""The rows of scripts/bench: what is measured, on whom, and what we want to reach.

A row is one experiment. Its `contestants` map a name to a function that runs the experiment once
and returns {metric: value}. The first contestant is Ferry; ratios are Ferry's median over the
peer's. A suite's module registers its rows by calling `add`; __main__.py imports the suites.
"""

from dataclasses import dataclass, field

ROWS = []


class Absent(Exception):
    """A contestant that this machine does not have; the text says how to get it."""


@dataclass
class Metric:
    name: str  # key in what a contestant returns
    title: str
    unit: str
    goal: float = None  # Ferry's median, at most
    goal_least: float = None  # at least
    goal_ratio: tuple = None  # (peer, Ferry's median over the peer's, at most)
    goal_ratio_least: tuple = None  # where more is better


@dataclass
class Row:
    suite: str
    name: str
    what: str  # one sentence for --list
    contestants: dict
    metrics: list
    runs: int
    warmup: int = 1
    samples: dict = field(default_factory=dict)  # contestant -> metric -> [value]
    problems: dict = field(default_factory=dict)  # contestant -> why it has no samples
    absent: dict = field(default_factory=dict)


def add(row):
    ROWS.append(row)


def measure(row, runs, say):
    """Runs a row, contestants in turn, so that drift of the machine meets all alike."""
    present = dict(row.contestants)
    row.samples = {name: {metric.name: [] for metric in row.metrics} for name in present}
    for turn in range(row.warmup + runs):
        order = list(present)
        order = order[turn % len(order):] + order[:turn % len(order)] if order else []
        for name in order:
            say(f"{row.suite} {row.name}: {name}, "
                + (f"run {turn - row.warmup + 1} of {runs}" if turn >= row.warmup else "warm-up"))
            try:
                values = present[name]()
            except Absent as why:
                row.absent[name] = str(why)
                del present[name]
                continue
            except Exception as error:  # one contestant's failure must not hide the others' figures
                row.problems[name] = f"{type(error).__name__}: {error}"
                del present[name]
                continue
            if turn >= row.warmup:
                for metric in row.metrics:
                    if metric.name in values:
                        row.samples[name][metric.name].append(values[metric.name])
