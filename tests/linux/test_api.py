# SPDX-License-Identifier: Apache-2.0
"""The API from outside: every path with good, missing, mistyped and huge bodies; a VM described piece
by piece, as clients of Firecracker do it; states; the list of VMs."""

import errno
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import unittest

import ferrylab as lab

WRONG = {"string": 7, "integer": "7", "boolean": "true", "object": [], "array": {}}


class Api:
    """Requests to one socket, each on a connection of its own."""

    def __init__(self, path):
        self.path = path

    def connect(self):
        connection = http.client.HTTPConnection("localhost", timeout=lab.LIMIT)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(lab.LIMIT)
        connection.sock.connect(self.path)
        return connection

    def call(self, method, path, body=None):
        connection = self.connect()
        try:
            if body is not None and not isinstance(body, (bytes, str)):
                body = json.dumps(body)
            connection.request(method, path, body)
            answer = connection.getresponse()
            text = answer.read()
            kind = answer.headers.get("Content-Type", "")
            return answer.status, json.loads(text) if text and "json" in kind else text.decode()
        finally:
            connection.close()


class ApiTest(lab.LabTest):
    def waiting(self, *args, **options):
        """A VM that waits for its configuration."""
        path = self.lab.path(self.lab.new_name() + ".api")
        vm = self.lab.vm("run", "--api-sock", path, *args, **options)
        while not os.path.exists(path):
            self.assertIsNone(vm.child.poll(), vm.errors())
        api = Api(path)
        self.assertEqual(200, api.call("GET", "/")[0])
        return vm, api

    def good(self, api, method, path, body=None, status=204):
        got = api.call(method, path, body)
        self.assertEqual(status, got[0], (method, path, body, got))
        return got[1]

    def bad(self, api, method, path, body, says):
        status, answer = api.call(method, path, body)
        self.assertEqual(400, status, (method, path, body, answer))
        self.assertRegex(answer["fault_message"], says, (method, path, body))
        self.assertLess(answer["code"], 0)
        return answer

    def describe(self, api, kernel, **machine):
        self.good(api, "PUT", "/boot-source", {"kernel_image_path": kernel, "boot_args": ""})
        self.good(api, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 32, **machine})

    def start(self, api):
        self.good(api, "PUT", "/actions", {"action_type": "InstanceStart"})


class Examples(ApiTest):
    def example(self, schema, field=None):
        """A value that the schema takes. Bodies of paths name things of this host where they must."""
        kind = schema.get("type")
        if "enum" in schema:
            return schema["enum"][0]
        if kind == "object":
            return {key: self.example(inner, key)
                    for key, inner in schema.get("properties", {}).items()}
        if kind == "string":
            return {"path_on_host": self.disk, "kernel_image_path": self.kernel,
                    "initrd_path": self.kernel, "guest_mac": "06:00:00:00:00:01",
                    "drive_id": "x", "iface_id": "x"}.get(field, "x")
        if kind == "array":
            return []
        return {"integer": schema.get("minimum", 1), "boolean": False, None: 1}[kind]


class Description(Examples):
    def test_openapi_is_what_the_program_says(self):
        script = os.path.join(lab.ROOT, "scripts", "openapi")
        done = subprocess.run([script, lab.FERRY, "--check"], env=self.lab.env, text=True,
                              capture_output=True, timeout=lab.LIMIT)
        self.assertEqual(0, done.returncode, done.stderr)

    def test_every_path(self):
        self.disk, self.kernel = self.lab.path("disk"), lab.bare_guest("halt.elf")
        with open(self.disk, "wb") as f:
            f.truncate(1 << 20)
        vm, api = self.waiting()
        paths = self.good(api, "GET", "/openapi", status=200)["paths"]
        self.assertGreater(len(paths), 25)
        bodies = 0
        for path, methods in paths.items():
            for method, operation in methods.items():
                method, real = method.upper(), re.sub(r"\{.*\}", "x", path)
                if real in ("/events", "/stop", "/actions", "/snapshot/load"):
                    continue  # they follow, or act: below
                with self.subTest(method=method, path=path):
                    status, answer = api.call(method, real, None)
                    self.assertIn(status, (200, 204, 400), answer)
                    self.bad(api, method, real, "{", "not JSON|takes no body")
                    self.bad(api, method, real, "[]", "expected an object|takes no body")
                    self.assertEqual(413, self.huge(api, method, real))
                    if "requestBody" not in operation:
                        continue
                    bodies += 1
                    schema = operation["requestBody"]["content"]["application/json"]["schema"]
                    self.body_is_checked(api, method, real, schema, operation["description"])
        self.assertGreater(bodies, 15)
        self.good(api, "PUT", "/stop", {})
        self.assertEqual(0, vm.wait(), vm.errors())

    def huge(self, api, method, path):
        """A body of 10 MB that is announced; an answer, or closed in the middle of it."""
        connection = api.connect()
        connection.putrequest(method, path)
        connection.putheader("Content-Length", "10000000")
        connection.endheaders()
        status = connection.getresponse().status
        connection.close()
        return status

    def body_is_checked(self, api, method, path, schema, description):
        body = self.example(schema)
        status, answer = api.call(method, path, body)
        if "created" in description or "any state" in description:
            self.assertIn(status, (200, 204), (body, answer))
        else:
            self.assertEqual(400, status)
            self.assertIn("not possible while the VM is created", answer["fault_message"])
        self.bad(api, method, path, {**body, "surplus": 1}, "unknown field 'surplus'")
        for name in schema.get("required", []):
            self.bad(api, method, path, {k: v for k, v in body.items() if k != name},
                     f"'{name}' is missing")
        for name, inner in schema.get("properties", {}).items():
            if inner.get("type"):
                self.bad(api, method, path, {**body, name: WRONG[inner["type"]]}, f"'{name}'")
            if "maximum" in inner and inner["maximum"] < 2**62:
                self.bad(api, method, path, {**body, name: inner["maximum"] + 1}, "expected")
            if "maxLength" in inner:
                self.bad(api, method, path, {**body, name: "x" * (inner["maxLength"] + 1)}, "bytes")


class States(Examples):
    """What a state does not allow is answered with its name, and changes nothing."""

    def picture(self, api):
        info = self.good(api, "GET", "/info", status=200)
        figures = [{k: v for k, v in info.get("devices", {}).get(name, {}).items()
                    if k in ("size", "path", "target_bytes")} for name in ("disk0", "balloon0")]
        return (info["state"], info.get("memory_bytes"), figures,
                self.good(api, "GET", "/vm/config", status=200))

    def refused(self, api, state):
        """Every route that is not for `state`; their number."""
        before, refused = self.picture(api), 0
        self.assertEqual(state, before[0])
        for path, methods in self.paths.items():
            for method, operation in methods.items():
                real = re.sub(r"\{.*\}", "x", path)
                if operation["description"] == "In any state." or \
                        re.search(rf"\b{state}\b", operation["description"]):
                    continue
                body = None
                if "requestBody" in operation:
                    body = self.example(
                        operation["requestBody"]["content"]["application/json"]["schema"])
                answer = self.bad(api, method.upper(), real, body, f"while the VM is {state}")
                self.assertEqual(-errno.EPERM, answer["code"])
                refused += 1
        actions = ["SendCtrlAltDel"] if state != "running" else []
        actions += ["InstanceStart"] if state != "created" else []
        for action in actions:
            self.bad(api, "PUT", "/actions", {"action_type": action}, f"the VM is {state}")
        self.assertEqual(before, self.picture(api))
        return refused

    def test_every_route_in_every_state(self):
        self.disk, self.kernel = self.lab.path("disk"), lab.bare_guest("listen.elf")
        with open(self.disk, "wb") as f:
            f.truncate(1 << 20)
        vm, api = self.waiting()
        self.paths = self.good(api, "GET", "/openapi", status=200)["paths"]
        self.good(api, "PUT", "/boot-source", {"kernel_image_path": self.kernel, "boot_args": "n=0"})
        self.good(api, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 32})
        self.good(api, "PUT", "/drives/x", {"drive_id": "x", "path_on_host": self.disk,
                                            "is_root_device": False})
        self.good(api, "PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": True})
        self.assertGreater(self.refused(api, "created"), 8)
        self.start(api)
        self.assertGreater(self.refused(api, "running"), 12)
        self.good(api, "PATCH", "/vm", {"state": "Paused"})
        self.assertGreater(self.refused(api, "paused"), 10)
        self.bad(api, "PUT", "/stop", {"powerbutton": True}, "the VM is paused")
        self.good(api, "PATCH", "/vm", {"state": "Resumed"})
        self.migrating(api)
        while True:  # until the guest listens
            status, answer = api.call("PUT", "/stop", {"powerbutton": True, "timeout_s": 3600})
            if status == 204:
                break
            self.assertIn("does not listen", answer["fault_message"])
        self.assertGreater(self.refused(api, "stopping"), 15)
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(vm, lab.STOPPED)

    def migrating(self, api):
        """To somebody who accepts, and says nothing."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            to = "tcp:127.0.0.1:%d" % silent.getsockname()[1]
            answers = []
            thread = threading.Thread(target=lambda: answers.append(
                api.call("PUT", "/migration", {"to": to})))
            thread.start()
            held, _ = silent.accept()
            self.assertGreater(self.refused(api, "migrating"), 15)
            held.close()
        thread.join()
        self.assertEqual(400, answers[0][0])
        self.assertEqual("running", self.picture(api)[0])


class Life(ApiTest):
    def test_piece_by_piece(self):
        disk = self.lab.path("disk")
        with open(disk, "wb") as f:
            f.truncate(1 << 20)
        vm, api = self.waiting()
        self.assertEqual((vm.name, "Not started"), tuple(
            self.good(api, "GET", "/", status=200)[key] for key in ("id", "state")))
        self.bad(api, "PUT", "/actions", {"action_type": "InstanceStart"}, "no kernel")
        self.describe(api, lab.bare_guest("incr.elf"), smt=False)
        self.bad(api, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 32, "smt": True},
                 "smt")
        self.good(api, "PUT", "/boot-source", {"kernel_image_path": lab.bare_guest("incr.elf"),
                                               "boot_args": "pages=64"})
        drive = {"drive_id": "d", "path_on_host": disk, "is_root_device": False,
                 "is_read_only": False,
                 "rate_limiter": {"ops": {"size": 1000, "refill_time": 100}}}
        self.good(api, "PUT", "/drives/d", drive)
        self.bad(api, "PUT", "/drives/e", drive, "'d' in the body, 'e' in the path")
        self.bad(api, "PUT", "/drives/d", {**drive, "path_on_host": "/nowhere"}, "/nowhere")
        self.good(api, "PUT", "/drives/r", {**drive, "drive_id": "r", "is_root_device": True,
                                            "is_read_only": True})
        self.bad(api, "PUT", "/drives/q", {**drive, "drive_id": "q", "is_root_device": True},
                 "'r' is the root device")
        self.good(api, "PUT", "/drives/r", {**drive, "drive_id": "r", "path_on_host": disk + "2"}
                  if os.path.exists(disk + "2") else {**drive, "drive_id": "r",
                                                      "path_on_host": self.second(disk)})
        self.good(api, "PUT", "/vsock", {"guest_cid": 3, "uds_path": self.lab.path("v")})
        self.good(api, "PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": True})
        self.good(api, "PUT", "/entropy", {})
        self.good(api, "PUT", "/metrics", {"metrics_path": self.lab.path("metrics")})
        config = self.good(api, "GET", "/vm/config", status=200)
        self.assertEqual(["d", "r"], [d["drive_id"] for d in config["drives"]])
        self.bad(api, "PATCH", "/vm", {"state": "Paused"}, "while the VM is created")
        self.start(api)
        self.bad(api, "PUT", "/actions", {"action_type": "InstanceStart"}, "running")
        self.bad(api, "PUT", "/drives/d", drive, "while the VM is running")
        self.assertEqual("Running", self.good(api, "GET", "/", status=200)["state"])
        self.good(api, "PATCH", "/drives/d", {"drive_id": "d", "rate_limiter": {
            "bandwidth": {"size": 1 << 20, "one_time_burst": 4096, "refill_time": 1000}}})
        self.bad(api, "PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "/other"}, "keeps")
        with open(disk, "ab") as f:
            f.truncate(2 << 20)
        self.good(api, "PATCH", "/drives/d", {"drive_id": "d", "path_on_host": disk})
        devices = self.good(api, "GET", "/info", status=200)["devices"]
        self.assertEqual({"disk0", "disk1", "vsock0", "balloon0", "rng0"}, set(devices))
        self.assertIn(2 << 20, [devices["disk0"]["size"], devices["disk1"]["size"]])
        self.good(api, "PATCH", "/balloon", {"amount_mib": 4})
        self.assertEqual(4, self.good(api, "GET", "/balloon/statistics", status=200)["target_mib"])
        self.assertStatus(vm.ferry("set", "memory=24M", "disk0.bps=50M"), lab.OK)
        self.assertEqual(8, self.good(api, "GET", "/balloon/statistics", status=200)["target_mib"])
        for wrong in ("memory=33M", "memory=0", "memory=x"):
            self.assertIn("up to the VM's 32 MiB",
                          self.assertStatus(vm.ferry("set", wrong), lab.USAGE).stderr)
        self.good(api, "PUT", "/actions", {"action_type": "FlushMetrics"})
        with open(self.lab.path("metrics")) as f:
            self.assertEqual(vm.name, json.loads(f.readline())["name"])
        text = self.good(api, "GET", "/metrics/prometheus", status=200)
        self.assertIn(f'ferry_vm_state{{vm="{vm.name}",state="running"}} 1', text)
        self.assertIn(f'ferry_device_size{{vm="{vm.name}",device="disk0"}}', text)
        self.histograms(text)
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(vm, lab.STOPPED)

    def histograms(self, text):
        """Of each kind at least one; buckets only grow, and the last one is the count."""
        kinds = re.findall(r"(?m)^# TYPE (\S+) histogram$", text)
        self.assertEqual({"ferry_disk_request_seconds", "ferry_vcpu_exit_seconds",
                          "ferry_api_request_seconds"}, set(kinds))
        for kind in kinds:
            series = {}
            for labels, bound, count in re.findall(
                    rf'(?m)^{kind}_bucket{{(.*?),le="(.*?)"}} (\d+)$', text):
                series.setdefault(labels, []).append((float(bound), int(count)))
            self.assertTrue(series)
            for labels, buckets in series.items():
                self.assertEqual(sorted(buckets), buckets, labels)
                self.assertEqual(sorted(c for _, c in buckets), [c for _, c in buckets], labels)
                self.assertEqual(float("inf"), buckets[-1][0])
                self.assertIn(f"{kind}_count{{{labels}}} {buckets[-1][1]}\n", text)
                self.assertRegex(text, rf"(?m)^{kind}_sum{{{re.escape(labels)}}} [\d.e+-]+$")
        self.assertGreater(int(re.search(r"(?m)^ferry_api_request_seconds_count{.*} (\d+)$",
                                         text).group(1)), 10)

    def second(self, disk):
        shutil.copy(disk, disk + "2")
        return disk + "2"

    def test_a_failed_start_can_be_mended(self):
        vm, api = self.waiting()
        broken = self.lab.path("kernel")
        with open(broken, "w") as f:
            f.write("no kernel")
        self.describe(api, broken)
        self.bad(api, "PUT", "/actions", {"action_type": "InstanceStart"}, "kernel")
        self.assertEqual("created", self.good(api, "GET", "/info", status=200)["state"])
        self.describe(api, lab.bare_guest("halt.elf"))
        self.start(api)
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(vm, lab.STOPPED)

    def test_snapshot_and_load(self):
        disk, snap, memory = (self.lab.path(n) for n in ("disk", "snap", "mem"))
        with open(disk, "wb") as f:
            f.truncate(1 << 20)
        vm, api = self.waiting()
        self.good(api, "PUT", "/boot-source", {"kernel_image_path": lab.bare_guest("incr.elf"),
                                               "boot_args": "pages=64"})
        self.good(api, "PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 32})
        self.good(api, "PUT", "/drives/d", {"drive_id": "d", "path_on_host": disk,
                                            "is_root_device": False})
        self.start(api)
        vm.wait_for(b"sync 1")
        paths = {"snapshot_path": snap, "mem_file_path": memory}
        self.bad(api, "PUT", "/snapshot/create", paths, "running")
        self.good(api, "PATCH", "/vm", {"state": "Paused"})
        self.good(api, "PATCH", "/vm", {"state": "Paused"})
        first = {"snapshot_path": snap + ".0", "snapshot_type": "Diff"}  # of nothing yet: all
        self.good(api, "PUT", "/snapshot/create", first)
        self.assertEqual("full", self.assertStatus(self.lab.ferry("snapshot", "verify", snap + ".0",
                                                                  "--json"), lab.OK).json()["kind"])
        self.good(api, "PUT", "/snapshot/create", {**paths, "snapshot_type": "Full"})
        self.assertEqual("Paused", self.good(api, "GET", "/", status=200)["state"])
        with open(memory, "rb") as f:  # the guest, all of it; beside it, what it takes to use it
            self.assertEqual(b"FERRYSNP", f.read(8))
        with open(snap, "rb") as f:
            self.assertEqual(disk, json.load(f)["config"]["drives"][0]["path_on_host"])
        self.good(api, "PATCH", "/vm", {"state": "Resumed"})
        self.bad(api, "PATCH", "/vm", {"state": "Resumed"}, "not paused but running")
        self.good(api, "PATCH", "/vm", {"state": "Paused"})
        diff = {"snapshot_path": snap + ".1", "mem_file_path": memory + ".1", "snapshot_type": "Diff"}
        self.good(api, "PUT", "/snapshot/create", diff)
        self.bad(api, "PUT", "/snapshot/create", {**diff, "mem_file_path": memory}, "mem.1")
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(vm, lab.STOPPED)

        # All of it may be moved.
        there = self.lab.path("there")
        os.mkdir(there)
        for path in (memory, memory + ".1"):
            os.rename(path, os.path.join(there, os.path.basename(path)))
        os.rename(snap + ".1", os.path.join(there, "state"))
        moved = os.path.join(there, "mem.1")
        second, api = self.waiting()
        load = {"snapshot_path": os.path.join(there, "state"), "resume_vm": True,
                "enable_diff_snapshots": True,
                "mem_backend": {"backend_type": "File", "backend_path": moved}}
        self.bad(api, "PUT", "/snapshot/load", {**load, "snapshot_path": "/nowhere"}, "/nowhere")
        self.bad(api, "PUT", "/snapshot/load", {**load, "snapshot_path": snap}, "do not belong together")
        self.bad(api, "PUT", "/snapshot/load", {"snapshot_path": load["snapshot_path"]}, "names the other")
        self.bad(api, "PUT", "/snapshot/load", {**load, "snapshot_path": disk}, "not a ferry snapshot")
        self.assertEqual("Not started", self.good(api, "GET", "/", status=200)["state"])
        self.good(api, "PUT", "/snapshot/load", load)
        while not self.good(api, "GET", "/info", status=200)["vcpus"][0]["cpu_ns"]:
            self.assertIsNone(second.child.poll(), second.errors())  # until it has run
        self.assertEqual("Running", self.good(api, "GET", "/", status=200)["state"])
        self.assertIn("disk0", self.good(api, "GET", "/info", status=200)["devices"])
        self.good(api, "PATCH", "/vm", {"state": "Paused"})
        third = moved.replace(".1", ".2")
        self.good(api, "PUT", "/snapshot/create", {**diff, "mem_file_path": third})

        def kind(path):
            report = self.assertStatus(self.lab.ferry("snapshot", "verify", path, "--json"), lab.OK).json()
            return report["kind"], report["files"]
        self.assertEqual(("diff", 3), kind(third))
        # Over the last one's own file: what needs no other.
        self.good(api, "PUT", "/snapshot/create", {**diff, "mem_file_path": third})
        self.assertEqual(("full", 1), kind(third))
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(second, lab.STOPPED)

    def test_load_with_other_networks(self):
        """Another tap, another address or both; what is refused changes nothing."""
        namespaces = lab.Namespaces()
        self.addCleanup(namespaces.close)
        host = namespaces.sides[0]
        for name in ("tap0", "tap1", "tap2"):
            host.run("ip", "tuntap", "add", name, "mode", "tap")
        snap, memory = self.lab.path("snap"), self.lab.path("mem")
        vm, api = self.waiting(namespace=host)
        self.describe(api, lab.bare_guest("incr.elf"))
        old = {"a": "06:00:00:00:00:0a", "b": "06:00:00:00:00:0b"}
        for name, tap in (("a", "tap0"), ("b", "tap1")):
            self.good(api, "PUT", "/network-interfaces/" + name,
                      {"iface_id": name, "host_dev_name": tap, "guest_mac": old[name]})
        self.start(api)
        vm.wait_for(b"sync 1")
        self.good(api, "PATCH", "/vm", {"state": "Paused"})
        paths = {"snapshot_path": snap, "mem_file_path": memory}
        self.good(api, "PUT", "/snapshot/create", paths)
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(vm, lab.STOPPED)

        there, api = self.waiting(namespace=host)
        before = self.good(api, "GET", "/vm/config", status=200).keys()
        for wrong, says in (({"iface_id": "c"}, r"network_overrides\[1\]: iface_id 'c'"),
                            ({"iface_id": "a", "guest_mac": "x"}, "expected six bytes"),
                            ({"iface_id": "a", "guest_mac": "01:00:00:00:00:01"}, "one station"),
                            ({"iface_id": "a", "guest_mac": "06:00:00:00:00:0c"}, "another device"),
                            ({"iface_id": "a", "host_dev_name": "nosuch0"}, "no such interface"),
                            ({"host_dev_name": "tap0"}, "'iface_id' is missing")):
            first = {"iface_id": "b", "guest_mac": "06:00:00:00:00:0c"}
            self.bad(api, "PUT", "/snapshot/load", {**paths, "network_overrides": [first, wrong]}, says)
            self.assertEqual(before, self.good(api, "GET", "/vm/config", status=200).keys())
        overrides = [{"iface_id": "b", "host_dev_name": "tap2", "guest_mac": "06:00:00:00:00:0c"},
                     {"iface_id": "a", "guest_mac": "auto", "host_dev_name": None}]
        self.good(api, "PUT", "/snapshot/load",
                  {**paths, "network_overrides": overrides, "resume_vm": True})
        nets = [self.good(api, "GET", "/info", status=200)["devices"][name] for name in ("net0", "net1")]
        self.assertEqual(["tap0", "tap2"], [net["tap"] for net in nets])
        self.assertEqual("06:00:00:00:00:0c", nets[1]["mac"])
        self.assertNotEqual(old["a"], nets[0]["mac"])
        shown = self.good(api, "GET", "/vm/config", status=200)["network-interfaces"]
        self.assertEqual([(net["tap"], net["mac"]) for net in nets],
                         [(net["host_dev_name"], net["guest_mac"]) for net in shown])
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(there, lab.STOPPED)

    def test_load_that_does_not_wait(self):
        """Lazily and mapped, under the filters: the same memory, read by a snapshot of the loaded VM, also of
        one that has run; a page that is damaged ends the VM."""
        packed, mapped, out = (self.lab.path(n) for n in ("packed", "mapped", "out"))
        pages = slice(4096, 4096 + (32 << 20))  # docs/formats.md: where a mapped file has its pages

        def memory(api, path):
            self.good(api, "PUT", "/snapshot/file", {"path": path, "layout": "mapped"}, status=200)
            with open(path, "rb") as f:
                return f.read()[pages]

        vm, api = self.waiting()
        self.good(api, "PUT", "/boot-source", {"kernel_image_path": lab.bare_guest("incr.elf"),
                                               "boot_args": "pages=64"})
        self.good(api, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 32})
        self.start(api)
        vm.wait_for(b"sync 1")
        self.good(api, "PATCH", "/vm", {"state": "Paused"})
        self.good(api, "PUT", "/snapshot/create", {"snapshot_path": packed})
        expected = memory(api, mapped)
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(vm, lab.STOPPED)

        for path, how in ((packed, {"lazy": True}), (mapped, {"lazy": True}), (mapped, {"map": True})):
            vm, api = self.waiting("--seccomp", "on")
            load = {"snapshot_path": path, "enable_diff_snapshots": True, **how}
            with self.subTest(path=path, how=how):
                self.bad(api, "PUT", "/snapshot/load", {**load, "lazy": True, "map": True}, "not both")
                if path == packed:
                    wrong = {"snapshot_path": path, "map": True}
                    self.bad(api, "PUT", "/snapshot/load", wrong, "mapped layout")
                self.good(api, "PUT", "/snapshot/load", load)
                self.assertEqual("Paused", self.good(api, "GET", "/", status=200)["state"])
                loaded = memory(api, out)
                other = [i for p in range(0, 32 << 20, 4096) if expected[p:p + 4096] != loaded[p:p + 4096]
                         for i in range(p, p + 4096) if expected[i] != loaded[i]]
                self.assertTrue(other)  # a new VM generation id, which has 16 bytes, and that is all
                self.assertLess(other[-1] - other[0], 16)
                self.good(api, "PATCH", "/vm", {"state": "Resumed"})
                while not self.good(api, "GET", "/info", status=200)["vcpus"][0]["cpu_ns"]:
                    self.assertIsNone(vm.child.poll(), vm.errors())
                self.good(api, "PATCH", "/vm", {"state": "Paused"})
                self.good(api, "PUT", "/snapshot/create",
                          {"snapshot_path": self.lab.path("diff"), "snapshot_type": "Diff"})
                self.assertStatus(self.lab.ferry("snapshot", "verify", self.lab.path("diff")), lab.OK)
                self.good(api, "PUT", "/stop", {})
                self.assertEnds(vm, lab.STOPPED)
                os.unlink(self.lab.path("diff"))

        with open(mapped, "r+b") as f:  # every page that is there, but for the tables below 1 MiB
            data = f.read()
            for page in range(1 << 20, 32 << 20, 4096):
                if any(expected[page:page + 4096]):
                    f.seek(4096 + page)
                    f.write(bytes([data[4096 + page] ^ 1]))
        vm, api = self.waiting()
        eager = {"snapshot_path": mapped, "resume_vm": True}
        self.bad(api, "PUT", "/snapshot/load", eager, "damaged")
        if os.path.exists(mapped + ".ws"):
            os.unlink(mapped + ".ws")  # else they are fetched at once
        self.good(api, "PUT", "/snapshot/load", {"snapshot_path": mapped, "lazy": True})
        try:
            api.call("PATCH", "/vm", {"state": "Resumed"})
        except (ConnectionError, http.client.HTTPException):
            pass  # it has ended meanwhile
        self.assertEnds(vm, lab.FAILED)
        self.assertRegex(vm.errors(), "chunk .* damaged")

    def test_config_file(self):
        path = self.lab.path("vm.json")
        config = {"boot-source": {"kernel_image_path": lab.bare_guest("poweroff.elf"),
                                  "boot_args": ""},
                  "machine-config": {"vcpu_count": 1, "mem_size_mib": 32}, "drives": []}
        with open(path, "w") as f:
            json.dump(config, f)
        vm = self.lab.vm("run", "--config-file", path)
        self.assertEqual(0, vm.wait(), vm.errors())
        for name, broken, says in (("surplus", {**config, "x": 1}, "unknown field 'x'"),
                                   ("type", {**config, "drives": {}}, "drives: expected a list"),
                                   ("none", {}, "boot-source")):
            with self.subTest(name), open(path, "w") as f:
                json.dump(broken, f)
                f.flush()
                result = self.assertStatus(self.lab.ferry("run", "--config-file", path), lab.USAGE)
                self.assertIn(says, result.stderr)

    def test_started_as_microvm_tools_do(self):
        """ferry --api-sock PATH --id NAME, and an end by SIGTERM before anything was started."""
        path = self.lab.path("a.sock")
        process = self.lab.start(lab.Process([lab.FERRY, "--api-sock", path, "--id", "tool"],
                                             env=self.lab.env))
        while not os.path.exists(path):
            self.assertIsNone(process.child.poll(), process.errors())
        os.kill(process.pid, signal.SIGTERM)
        self.assertEqual(0, process.wait(), process.errors())
        self.assertFalse(os.path.exists(path))

    def test_big_slow_and_rude_clients(self):
        """10 MB that are really sent, a byte at a time, a reader that does not read: each is answered or
        closed, and whoever else asks is answered meanwhile."""
        vm, api = self.waiting()
        self.good(api, "PUT", "/boot-source", {"kernel_image_path": lab.bare_guest("incr.elf"),
                                               "boot_args": "pages=64"})
        self.start(api)
        with socket.socket(socket.AF_UNIX) as big:
            big.settimeout(lab.LIMIT)
            big.connect(api.path)
            try:
                big.sendall(b"PUT /vm HTTP/1.1\r\nContent-Length: 10000000\r\n\r\n")
                for _ in range(100):
                    big.sendall(b" " * 100000)
            except OSError as e:  # closed in the middle of it
                self.assertIn(e.errno, (errno.EPIPE, errno.ECONNRESET))
            try:
                self.assertIn(big.recv(64)[:12], (b"", b"HTTP/1.1 413"))
            except ConnectionResetError:
                pass
        with socket.socket(socket.AF_UNIX) as deaf:  # asks without end, and reads nothing
            deaf.setblocking(False)
            deaf.connect(api.path)
            try:
                for _ in range(20000):
                    deaf.send(b"GET /openapi HTTP/1.1\r\n\r\n")
            except OSError as e:
                self.assertIn(e.errno, (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET))
            with socket.socket(socket.AF_UNIX) as slow:
                slow.settimeout(lab.LIMIT)
                slow.connect(api.path)
                for i in range(26):
                    slow.sendall(b"GET /version HTTP/1.1\r\n\r\n  "[i:i + 1])
                    self.assertEqual(200, api.call("GET", "/info")[0])
                self.assertEqual(b"HTTP/1.1 200", slow.recv(64)[:12])
        before = self.good(api, "GET", "/info", status=200)["vcpus"][0]["cpu_ns"]
        while self.good(api, "GET", "/info", status=200)["vcpus"][0]["cpu_ns"] == before:
            self.assertIsNone(vm.child.poll(), vm.errors())
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(vm, lab.STOPPED)

    def test_metrics_on_a_port(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        vm = self.lab.vm("run", "-k", lab.bare_guest("incr.elf"), "-m", "32M", "-a", "pages=64",
                         "--metrics-listen", str(port))
        vm.wait_for(b"sync 1")
        while vm.ferry("info").status:
            self.assertIsNone(vm.child.poll(), vm.errors())
        for method, path, status in (("GET", "/metrics", 200), ("GET", "/metrics/prometheus", 200),
                                     ("GET", "/", 404), ("GET", "/info", 404),
                                     ("PUT", "/metrics", 501), ("PUT", "/stop", 501)):
            with self.subTest(method=method, path=path):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=lab.LIMIT)
                connection.request(method, path)
                answer = connection.getresponse()
                self.assertEqual(status, answer.status)
                if status == 200:
                    self.assertIn(f'ferry_vm_state{{vm="{vm.name}",state="running"}} 1',
                                  answer.read().decode())
                connection.close()
        second = self.lab.ferry("run", "-k", lab.bare_guest("halt.elf"), "--metrics-listen",
                                f"tcp:127.0.0.1:{port}")
        self.assertIn("Address already in use", self.assertStatus(second, lab.FAILED).stderr)
        for wrong in ("localhost:1", "x", "", "1:2:3", "70000"):
            result = self.lab.ferry("run", "-k", lab.bare_guest("halt.elf"), "--metrics-listen", wrong)
            self.assertNotEqual(lab.OK, result.status, wrong)
        self.assertStatus(vm.ferry("stop"), lab.OK)
        self.assertEnds(vm, lab.STOPPED)

    def test_events(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("incr.elf"), "-m", "32M", "-a", "pages=64")
        vm.wait_for(b"sync 1")
        follower = self.lab.start(lab.Process([lab.FERRY, "events", vm.name, "--json"],
                                              env=self.lab.env))
        while b"paused" not in follower.stdout.data:  # until it follows
            self.assertIsNone(follower.child.poll(), follower.errors())
            vm.ferry("pause")
            vm.ferry("resume")
        vm.ferry("snapshot", self.lab.path("snap"))
        vm.ferry("stop")
        self.assertEnds(vm, lab.STOPPED)
        self.assertEqual(0, follower.wait())
        states = [json.loads(line)["to"] for line in follower.stdout.rest().split(b"\n") if line]
        self.assertEqual(["snapshotting", "running", "stopped"], states[-3:])

    def test_many_clients(self):
        """Half of them never finish; the guest goes on, and the others are answered."""
        vm, api = self.waiting()
        self.good(api, "PUT", "/boot-source", {"kernel_image_path": lab.bare_guest("incr.elf"),
                                               "boot_args": "pages=64"})
        self.start(api)
        idle = []
        for i in range(100):
            s = socket.socket(socket.AF_UNIX)
            s.connect(api.path)
            s.sendall(b"PUT /vm HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"[:20 + i % 30])
            idle.append(s)
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(api.call("GET", "/")[0]))
                   for _ in range(100)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual([200] * 100, answers)
        for s in idle:
            s.close()
        self.good(api, "PUT", "/stop", {})
        self.assertEnds(vm, lab.STOPPED)


class Hosts(ApiTest):
    def names(self, *args):
        return {e["name"]: e for e in
                self.assertStatus(self.lab.ferry("ls", "--json", *args), lab.OK).json()}

    @unittest.skipIf(lab.JAIL, "the process outside a jail removes what a dead VM leaves: test_jail")
    def stands_still(self, pid):
        states = []
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/stat") as f:
                states.append(f.read().rsplit(")", 1)[1].split()[0])
        return set(states) == {"T"}

    def test_ls_rm_kill_prune(self):
        self.assertEqual({}, self.names())
        first = self.lab.vm("run", "-k", lab.bare_guest("incr.elf"), "-m", "32M", "-a", "pages=64",
                            "--vsock", f"cid=3,path={self.lab.path('v')}")
        second = self.lab.vm("run", "-k", lab.bare_guest("halt.elf"), "-m", "32M")
        first.wait_for(b"sync 1")
        while second.ferry("info").status:
            self.assertIsNone(second.child.poll(), second.errors())
        listed = self.names()
        self.assertEqual({first.name, second.name}, set(listed))
        self.assertEqual(("running", first.pid), (listed[first.name]["state"],
                                                  listed[first.name]["pid"]))
        self.assertIn("runs", self.assertStatus(first.ferry("rm"), lab.FAILED).stderr)
        os.kill(second.pid, signal.SIGSTOP)  # alive, and silent when its last thread has heard
        while not self.stands_still(second.pid):
            self.assertIsNone(second.child.poll(), second.errors())
        self.assertEqual("silent", self.names()[second.name]["state"])
        self.assertEqual({"name": second.name, "pid": second.pid},
                         self.assertStatus(second.ferry("kill", "--json"), lab.OK).json())
        self.assertEqual(-signal.SIGKILL, second.wait())
        self.assertEqual("dead", self.names()[second.name]["state"])
        self.assertEqual(["zombie"], [f["kind"] for f in self.names("--sprawl").values()])
        self.assertIn("dead already", self.assertStatus(second.ferry("kill"), lab.FAILED).stderr)
        left = self.assertStatus(self.lab.ferry("rm", second.name, "--dry-run", "--json"),
                                 lab.OK).json()["would_remove"]
        self.assertIn(f"{self.lab.run_dir}/{second.name}.sock", [f["path"] for f in left])
        self.assertIn(f"would remove {self.lab.run_dir}/{second.name}.sock",
                      self.assertStatus(self.lab.ferry("prune", "--dry-run"), lab.OK).stdout)
        self.assertStatus(second.ferry("rm"), lab.OK)
        self.assertEqual({first.name}, set(self.names()))
        first.child.kill()
        first.wait()
        self.assertTrue(os.path.exists(self.lab.path("v")))
        self.assertStatus(self.lab.ferry("prune"), lab.OK)
        self.assertEqual([], self.lab.sockets())
        self.assertFalse(os.path.exists(self.lab.path("v")))

    def test_a_record_is_no_leave_to_remove_files(self):
        precious = self.lab.path("precious")
        os.mkdir(self.lab.run_dir)
        with open(precious, "w") as f:
            f.write("mine")
        for name, text in (("evil", json.dumps({"pid": 1, "start_ticks": 1, "files": [precious]})),
                           ("junk", "{"), ("list", "[]"), ("types", '{"pid": "x", "files": 7}')):
            with open(os.path.join(self.lab.run_dir, name + ".json"), "w") as f:
                f.write(text)
        self.assertEqual({"dead"}, {e["state"] for e in self.names().values()})
        self.assertStatus(self.lab.ferry("prune"), lab.OK)
        self.assertTrue(os.path.exists(precious))
        self.assertEqual([], self.lab.sockets())

    def test_top(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("incr.elf"), "-m", "32M", "-a", "pages=64")
        vm.wait_for(b"sync 1")
        one = self.assertStatus(self.lab.ferry("top", "--json", "--count", "1", "--delay", "0.2"),
                                lab.OK).json()
        self.assertEqual("running", one[vm.name]["state"])
        self.assertEqual(32, one[vm.name]["memory_mib"])
        self.assertIn(vm.name, self.lab.ferry("top", "--count", "1", "--delay", "0.1").stdout)
        self.assertStatus(vm.ferry("stop"), lab.OK)
        self.assertEnds(vm, lab.STOPPED)
