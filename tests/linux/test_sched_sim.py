# SPDX-License-Identifier: Apache-2.0
"""`ferry sched sim` as its user meets it. What schedulers do is tests/unit/test_sched_sim.c's."""

import json
import os
import unittest
import xml.etree.ElementTree

import ferrylab as lab
from ferrylab import LabTest

WORKLOADS = os.path.join(lab.ROOT, "sched", "workloads")


def workload(name):
    return os.path.join(WORKLOADS, name + ".json")


class Simulator(LabTest):
    def sim(self, *args, status=lab.OK):
        return self.assertStatus(self.lab.ferry("sched", "sim", *args), status)

    def test_all_workloads_run_under_all_schedulers(self):
        names = sorted(os.listdir(WORKLOADS))
        self.assertGreaterEqual(len(names), 6)
        for name in names:
            with self.subTest(workload=name):
                results = json.loads(self.sim(os.path.join(WORKLOADS, name), "--json").stdout)
                self.assertEqual(["fair", "proportional", "credit", "credit-cap"],
                                 [r["scheduler"] for r in results])
                for result in results:
                    used = sum(vm["share"] for vm in result["vms"]) * result["duration_ms"]
                    self.assertLessEqual(used, result["pcpus"] * result["duration_ms"] * 1.0001)

    def test_table(self):
        text = self.sim(workload("two-to-one"), "-s", "credit").stdout
        self.assertRegex(text, r"credit, placement by length, slice 30 ms: Jain index 1\.0000")
        self.assertRegex(text, r"(?m)^  gold +512 +0 +1 +0\.66")
        self.assertEqual(1, text.count("Jain"))

    def test_options_change_the_run(self):
        for args, key, value in ((("--slice", "5"), "slice_ms", 5), (("--slice", "5ms"), "slice_ms", 5),
                                 (("-p", "weight"), "placement", "weight")):
            result = json.loads(self.sim(workload("placement"), "-s", "credit", "-j", *args).stdout)
            self.assertEqual(value, result[0][key])

    def test_picture(self):
        path = self.lab.path("run.svg")
        self.sim(workload("caps"), "--svg", path, "--window", "100-200")
        root = xml.etree.ElementTree.parse(path).getroot()
        texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
        self.assertIn("pCPU 3", texts)
        self.assertIn("200", texts)
        self.assertTrue(any("credit-cap" in t for t in texts))

    def test_errors_name_what_is_wrong(self):
        bad = self.lab.path("bad.json")
        with open(bad, "w", encoding="utf-8") as f:
            f.write('{"vms": [{"weight": 0}]}')
        good = workload("two-to-one")
        for args, expected in (((), "workload"), ((bad,), r"bad.json: vms\[0\]: weight"),
                               ((self.lab.path("none"),), "none"),
                               ((good, "-s", "lottery"), "lottery"),
                               ((good, "-p", "up"), "placement"), ((good, "--slice", "0"), "slice"),
                               ((good, "--svg", "x", "--window", "9-3"), "window"),
                               ((good, "--nonsense"), "bad option")):
            with self.subTest(args=args):
                self.assertRegex(self.sim(*args, status=lab.USAGE).stderr, expected)
        self.sim(good, "--svg", self.lab.path("no/such/folder.svg"), status=lab.FAILED)
        self.sim(good, "--svg", self.lab.path("x.svg"), "--window", "20000-30000", status=lab.USAGE)


if __name__ == "__main__":
    unittest.main()
