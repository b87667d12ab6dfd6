# SPDX-License-Identifier: Apache-2.0
"""Linux uses virtio network devices: through a tap it exchanges files and iperf3 traffic, through
user networking it gets an address, reaches the host and beyond, and is reached through a port
forward. Everything happens in network namespaces of the test."""

import hashlib
import os
import re
import shutil
import socket
import unittest

import ferrylab as lab

FILE = bytes(i * 7 % 256 for i in range(300 * 1000))
DIGEST = hashlib.sha256(FILE).hexdigest()
GET = """
import hashlib, sys, urllib.request
data = urllib.request.urlopen(sys.argv[1], timeout=120).read()
print(hashlib.sha256(data).hexdigest())
"""
WAIT_CARRIER = 'until [ "$(cat /sys/class/net/{}/carrier 2>&1)" = {} ]; do sleep 1; done; echo seen'


class Net(lab.LabTest):
    def setUp(self):
        super().setUp()
        self.namespaces = lab.Namespaces()
        self.addCleanup(self.namespaces.close)
        self.host, self.beyond = self.namespaces.sides
        with open(self.lab.path("file"), "wb") as f:
            f.write(FILE)

    def tap(self, name, *more, address=None, bridge=None):
        self.host.run("ip", "tuntap", "add", name, "mode", "tap", *more)
        self.host.run("ip", "link", "set", name, "up", *(("master", bridge) if bridge else ()))
        if address:
            self.host.run("ip", "addr", "add", address, "dev", name)

    def serve(self, side, port=8000):
        """An HTTP server of that side, with the lab's directory."""
        code = ("import functools, http.server as h, sys; handler = functools.partial("
                "h.SimpleHTTPRequestHandler, directory=sys.argv[2]); "
                "s = h.ThreadingHTTPServer(('', int(sys.argv[1])), handler); "
                "print('serving', file=sys.stderr, flush=True); s.serve_forever()")
        server = self.lab.start(lab.Process([*side.enter, "python3", "-c", code, str(port),
                                             self.lab.dir]))
        server.stderr.wait(b"serving")

    def boot(self, *nets, name="vm", more=()):
        words = [word for net in nets for word in ("--net", net)]
        return self.lab.linux(*words, *more, name=name, namespace=self.host)

    def info(self, vm, device):
        return vm.ferry("info", "--json").json()["devices"][device]

    def download(self, vm, url):
        out = vm.command(f"wget -q -O - {url} | sha256sum")
        self.assertIn(DIGEST, out)

    def power_off(self, vm):
        vm.type("exit 0\n")
        self.assertEqual(lab.OK, vm.wait(), vm.errors())

    def children_of(self, pid):
        path = f"/proc/{pid}/task"
        pids = []
        for task in os.listdir(path):
            with open(f"{path}/{task}/children") as f:
                pids += [int(child) for child in f.read().split()]
        return pids

    def passt_of(self, vm):
        """Pids of what the VM's starters started."""
        return [pid for starter in self.children_of(vm.pid) for pid in self.children_of(starter)]

    # --- one guest, both ways out

    def test_1_tap_and_user(self):
        if not shutil.which("passt"):
            self.skipTest("passt is missing (package passt)")
        self.tap("tap0", address="10.78.0.1/24")
        self.serve(self.host)
        self.serve(self.beyond)
        vm = self.boot("tap=tap0,mac=02:fe:00:00:00:07", "user,forward=tcp:8080:80")
        vm.prompt()
        self.check_tap(vm)
        self.check_user(vm)
        self.check_settings(vm)
        self.check_losses(vm)
        passt = self.passt_of(vm)
        self.assertEqual(1, len(passt))
        self.power_off(vm)
        self.assertFalse(os.path.exists(f"/proc/{passt[0]}"))

    def check_tap(self, vm):
        self.assertEqual("02:fe:00:00:00:07\n", vm.command("cat /sys/class/net/eth0/address"))
        vm.command("ip addr add 10.78.0.2/24 dev eth0; ip link set eth0 up")
        self.download(vm, "http://10.78.0.1:8000/file")
        shown = self.info(vm, "net0")
        self.assertEqual(("tap", "tap0", "up", 1500),
                         tuple(shown[key] for key in ("backend", "tap", "link", "mtu")))
        self.assertGreater(shown["received"]["bytes"], len(FILE))
        # Segments were not cut on the way: what came is larger than the MTU on average.
        self.assertGreater(shown["received"]["bytes"] / shown["received"]["packets"], 1514)

    def check_user(self, vm):
        out = vm.command("ip link set eth1 up && udhcpc -i eth1 -n -q 2>&1; ip addr show dev eth1")
        self.assertIn("inet 10.0.2.15/24", out)
        with open("/etc/resolv.conf") as f:
            found = re.search(r"^nameserver\s+(\d+\.\d+\.\d+\.\d+)", f.read(), re.M)
        if found and not found[1].startswith("127."):
            self.assertIn(found[1], vm.command("cat /etc/resolv.conf"))
        self.download(vm, "http://10.0.2.2:8000/file")  # the host itself
        self.download(vm, f"http://{self.beyond.address}:8000/file")
        vm.command("mkdir /tmp/www; wget -q -O /tmp/www/file http://10.0.2.2:8000/file; "
                   "httpd -p 80 -h /tmp/www")
        self.get("http://127.0.0.1:8080/file")

    def get(self, url):
        client = self.lab.start(lab.Process([*self.host.enter, "python3", "-c", GET, url]))
        self.assertEqual(0, client.wait(), client.errors())
        self.assertEqual(DIGEST, client.stdout.rest().decode().strip())

    def check_settings(self, vm):
        for state, carrier in (("down", "0"), ("up", "1")):
            self.assertStatus(vm.ferry("set", f"net0.link={state}"), lab.OK)
            self.assertIn("seen", vm.command(WAIT_CARRIER.format("eth0", carrier)))
            self.assertEqual(state, self.info(vm, "net0")["link"])
        self.download(vm, "http://10.78.0.1:8000/file")
        self.assertStatus(vm.ferry("set", "net0.tx-bps=1M", "net0.iops=5000"), lab.OK)
        self.assertEqual((1 << 20, 5000),
                         tuple(self.info(vm, "net0")[key] for key in ("tx-bps", "rx-iops")))
        bad = vm.ferry("set", "net0.colour=red")
        self.assertNotEqual(lab.OK, bad.status)
        self.assertIn("no such setting", bad.stderr)
        self.download(vm, "http://10.78.0.1:8000/file")

    def check_losses(self, vm):
        """The tap is deleted, passt is killed: the guest's links go down, and come again."""
        self.host.run("ip", "link", "del", "tap0")
        self.assertIn("seen", vm.command(WAIT_CARRIER.format("eth0", 0)))
        os.kill(self.passt_of(vm)[0], 9)
        self.assertIn("seen", vm.command(WAIT_CARRIER.format("eth1", 0)))
        self.assertEqual(2, vm.errors().count("the guest's link is down"), vm.errors())
        again = vm.ferry("set", "net0.link=up")
        self.assertNotEqual(lab.OK, again.status)
        self.assertIn("no such interface", again.stderr)
        self.tap("tap0", address="10.78.0.1/24")
        self.assertStatus(vm.ferry("set", "net0.link=up", "net1.link=up"), lab.OK)
        self.assertIn("seen", vm.command(WAIT_CARRIER.format("eth0", 1)))
        self.download(vm, "http://10.78.0.1:8000/file")
        self.get("http://127.0.0.1:8080/file")

    # --- two guests

    def bridged(self, offload):
        tools = ["--disk", f"{lab.guest_file('tools.ext4')},ro"]
        mark = offload[:2]
        self.tap(f"{mark}1", "multi_queue", bridge="br0")
        self.tap(f"{mark}2", bridge="br0")
        client = self.boot(f"tap={mark}1,queues=2,packed,offload={offload}", name=f"client-{mark}",
                           more=[*tools, "--cpus", "2", "--transport", "pci"])
        server = self.boot(f"tap={mark}2,offload={offload}", name=f"server-{mark}", more=tools)
        for vm, address in ((client, "10.79.0.1"), (server, "10.79.0.2")):
            vm.prompt()
            vm.command("mkdir -p /tools; mount -o ro /dev/vda /tools")
            vm.command(f"ip addr add {address}/24 dev eth0; ip link set eth0 up")
        server.command("iperf3 -s -1 --forceflush > /tmp/server 2>&1 &")
        server.command("until grep -q listening /tmp/server; do sleep 1; done")
        return client, server

    def check_bridged(self, offload):
        client, server = self.bridged(offload)
        out = client.command("iperf3 -c 10.79.0.2 -n 1M")
        self.assertIn("iperf Done", out)
        self.assertRegex(out, r"[\d.]+ [KM]Bytes .*receiver")
        sent = self.info(client, "net0")["sent"]
        received = self.info(server, "net0")["received"]
        # The client ends when it has handed out 1 MiB; the last of it may still be on their way.
        self.assertGreater(received["bytes"], 512 << 10)
        self.assertEqual(0, sent["dropped"] + received["dropped"])
        average = sent["bytes"] / sent["packets"]
        if offload == "on":
            self.assertGreater(average, 1514)
            self.assertEqual(2, self.info(client, "net0")["queues"])
        else:
            self.assertLessEqual(average, 1514)
        for vm in (client, server):
            self.power_off(vm)

    def test_2_two_guests_on_a_bridge(self):
        self.host.run("ip", "link", "add", "br0", "type", "bridge")
        self.host.run("ip", "link", "set", "br0", "up")
        for offload in ("on", "off"):
            with self.subTest(offload=offload):
                self.check_bridged(offload)

    # --- moving

    def test_3_migrates_with_its_tap(self):
        """Both have the same tap: the destination takes it when the source has ended."""
        self.tap("tap0", address="10.78.0.1/24")
        self.serve(self.host)
        vm = self.boot("tap=tap0", name="source")
        vm.prompt()
        vm.command("ip addr add 10.78.0.2/24 dev eth0; ip link set eth0 up")
        self.download(vm, "http://10.78.0.1:8000/file")
        mac = vm.command("cat /sys/class/net/eth0/address")
        address = f"unix:{self.lab.path('move')}"
        there = self.lab.vm("receive", "--listen", address, "--net", "tap=tap0", name="there",
                            namespace=self.host)
        there.stderr.wait(b"waiting")
        self.assertStatus(vm.ferry("migrate", address), lab.OK)
        self.assertEqual(lab.OK, vm.wait(), vm.errors())
        there.type("\n")
        there.prompt()
        self.download(there, "http://10.78.0.1:8000/file")
        self.assertEqual(mac, there.command("cat /sys/class/net/eth0/address"))
        self.assertEqual(mac.strip(), self.info(there, "net0")["mac"])
        self.power_off(there)

    def test_3_new_addresses(self):
        """Of a restored guest and of clones: the guest has it once its driver begins anew."""
        self.tap("tap0", address="10.78.0.1/24")
        for number in "12":
            self.tap("tap" + number)
        self.serve(self.host)
        vm = self.boot("tap=tap0", name="source")
        vm.prompt()
        self.assertStatus(vm.ferry("snapshot", self.lab.path("file1")), lab.OK)
        old = self.info(vm, "net0")["mac"]
        prefix = self.lab.new_name()
        made = self.lab.ferry("clone", vm.name, "--count", "2", "--name", prefix, "--new-mac", "--",
                              "--net", "tap=tap{}", enter=self.host.enter)
        try:
            self.assertStatus(made, lab.OK)
            addresses = {old}
            for number in "12":
                info = self.lab.ferry("info", prefix + number, "--json").json()
                addresses.add(info["devices"]["net0"]["mac"])
            self.assertEqual(3, len(addresses), addresses)
        finally:
            for number in "12":
                self.lab.ferry("kill", prefix + number)
        self.power_off(vm)
        new = "06:00:0a:4e:00:02"
        there = self.lab.vm("restore", self.lab.path("file1"), "--net", "tap=tap0", "--new-mac",
                            f"net0={new}", name="there", namespace=self.host)
        there.type("\n")
        there.prompt()
        self.assertEqual(new, self.info(there, "net0")["mac"])
        self.assertIn(old, there.command("cat /sys/class/net/eth0/address"))
        there.command("cd /sys/bus/virtio/drivers/virtio_net; for d in virtio*; do "
                      "echo $d >unbind; echo $d >bind; done")
        self.assertIn(new, there.command("cat /sys/class/net/eth0/address"))
        there.command("ip addr add 10.78.0.2/24 dev eth0; ip link set eth0 up")
        self.download(there, "http://10.78.0.1:8000/file")
        self.power_off(there)
        for text, says in (("net1=auto", "no such network device"), ("x", "expected six bytes"),
                           ("01:00:00:00:00:01", "one station")):
            refused = self.lab.ferry("restore", self.lab.path("file1"), "--net", "tap=tap0",
                                     "--new-mac", text, enter=self.host.enter)
            self.assertIn(says, self.assertStatus(refused, lab.USAGE).stderr)

    # --- what cannot be

    def test_4_messages(self):
        def refused(net, text, env=None, enter=self.host.enter):
            result = self.lab.ferry("run", "--kernel", lab.guest_file("vmlinux"), "--console",
                                    "null", "--net", net, enter=enter, env=env)
            self.assertNotEqual(lab.OK, result.status, str(result))
            self.assertIn(text, result.stderr)

        self.tap("tap0")
        refused("tap=nosuch0", "no such interface here; `ip tuntap add nosuch0 mode tap`")
        refused("tap=lo", "not a tap device")
        refused("tap=tap0,queues=2", "multi_queue")
        refused("tap-fd=0", "expected 3 to")
        refused("user", "install the package passt",
                env={**self.lab.env, "PATH": self.lab.path("empty")}, enter=())
        holder = self.boot("tap=tap0")
        holder.prompt()
        refused("tap=tap0", "another process uses it")
        holder.ferry("stop")
        with socket.socket() as s:  # of our namespace; the test's has none there
            s.bind(("127.0.0.1", 0))
            s.listen()
            port = s.getsockname()[1]
            result = self.lab.ferry("run", "--kernel", lab.guest_file("vmlinux"), "--console",
                                    "null", "--net", f"user,forward=tcp:{port}:80")
            self.assertIn(f"port {port} of 127.0.0.1 is in use", result.stderr)


if __name__ == "__main__":
    unittest.main()
