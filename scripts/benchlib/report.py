# SPDX-License-Identifier: Apache-2.0
"""Samples to figures, figures to a table and JSON."""

import json
import os
import platform
import statistics
import subprocess
import time


def figures(samples):
    if not samples:
        return None
    low, _, high = (statistics.quantiles(samples, n=4, method="inclusive")
                    if len(samples) > 1 else samples * 3)
    return {"median": statistics.median(samples), "q1": low, "q3": high,
            "min": min(samples), "max": max(samples), "runs": len(samples), "samples": samples}


def digest(row):
    """One JSON-ready object a metric."""
    for metric in row.metrics:
        result = {"suite": row.suite, "row": row.name, "metric": metric.name, "title": metric.title,
                  "unit": metric.unit, "contestants": {}, "ratios": {}, "goals": []}
        for name in row.contestants:
            stats = figures(row.samples.get(name, {}).get(metric.name, []))
            if stats:
                result["contestants"][name] = stats
        ferry = result["contestants"].get("ferry")
        for name, stats in result["contestants"].items():
            if ferry and name != "ferry" and stats["median"]:
                result["ratios"][name] = ferry["median"] / stats["median"]
        if ferry and metric.goal is not None:
            result["goals"].append({"text": f"<= {metric.goal:g} {metric.unit}",
                                    "met": ferry["median"] <= metric.goal})
        if ferry and metric.goal_least is not None:
            result["goals"].append({"text": f">= {metric.goal_least:g} {metric.unit}",
                                    "met": ferry["median"] >= metric.goal_least})
        if metric.goal_ratio and metric.goal_ratio[0] in result["ratios"]:
            peer, limit = metric.goal_ratio
            result["goals"].append({"text": f"<= {limit:g} x {peer}",
                                    "met": result["ratios"][peer] <= limit})
        if metric.goal_ratio_least and metric.goal_ratio_least[0] in result["ratios"]:
            peer, limit = metric.goal_ratio_least
            result["goals"].append({"text": f">= {limit:g} x {peer}",
                                    "met": result["ratios"][peer] >= limit})
        yield result


def number(value):
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def table(results):
    """Lines of text; one for each metric and contestant."""
    lines = [("row", "contestant", "median", "quartiles", "min .. max", "runs", "ferry/peer",
              "goal")]
    for result in results:
        title = f"{result['title']}, {result['unit']}"
        for name, stats in result["contestants"].items():
            ratio = result["ratios"].get(name)
            goals = [f"{goal['text']}: {'met' if goal['met'] else 'missed'}"
                     for goal in result["goals"] if name == "ferry"]
            lines.append((title, name, number(stats["median"]),
                          f"{number(stats['q1'])} .. {number(stats['q3'])}",
                          f"{number(stats['min'])} .. {number(stats['max'])}", str(stats["runs"]),
                          f"{ratio:.3f}" if ratio is not None else "", "; ".join(goals)))
            title = ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in lines]


def first_line(argv):
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return None
    return (done.stdout or done.stderr).split("\n")[0] or None


def host():
    cpu = None
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    modules = sorted(name for name in os.listdir("/sys/module") if name.startswith("kvm"))
    with open("/proc/loadavg") as f:
        load = f.read().split()[0]
    return {"kernel": platform.release(), "cpu": cpu, "cpus": os.cpu_count(),
            "kvm_modules": modules, "load_at_start": float(load),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def write_json(path, host_facts, versions, rows, results):
    document = {"format": 1, "host": host_facts, "versions": versions, "results": results,
                "absent": {f"{r.suite} {r.name}": r.absent for r in rows if r.absent},
                "problems": {f"{r.suite} {r.name}": r.problems for r in rows if r.problems}}
    with open(path, "w") as f:
        json.dump(document, f, indent=1)
        f.write("\n")
