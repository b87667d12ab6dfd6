# SPDX-License-Identifier: Apache-2.0
"""A guest that moved says where it is: a bystander on the bridge hears the device's RARP frames and
the gratuitous ARP of the guest's own driver for each of its addresses, and the bridge learns the new
port. The device of a restored snapshot says nothing, since it may be one of many, until it is told
to."""

import re
import subprocess
import unittest

import ferrylab as lab

ADDRESSES = ("10.78.0.2", "10.78.0.3")
# Prints a line for each RARP frame, for each ARP that is about the sender's own address, and for
# other ARP.
LISTEN = """
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("{}", 0))
print("listening", flush=True)
while True:
    f = s.recv(2000)
    kind, mac = f[12:14].hex(), f[6:12].hex(":")
    if kind == "8035" and f[20:22] == b"\\0\\3" and f[22:28] == f[32:38] == f[6:12]:
        print("rarp", mac, flush=True)
    if kind == "0806":
        own = f[28:32] == f[38:42]
        print("garp" if own else "arp", mac, ".".join(map(str, f[28:32])), flush=True)
"""


class Announce(lab.LabTest):
    def setUp(self):
        super().setUp()
        self.namespaces = lab.Namespaces()
        self.addCleanup(self.namespaces.close)
        self.host = self.namespaces.sides[0]
        self.host.run("ip", "link", "add", "br0", "type", "bridge")
        self.host.run("ip", "link", "set", "br0", "up")
        for tap in ("tap0", "tap1"):
            self.host.run("ip", "tuntap", "add", tap, "mode", "tap")
            self.host.run("ip", "link", "set", tap, "up", "master", "br0")

    def listen(self):
        """A bystander's ear; lines of what it heard come on its stdout."""
        code = LISTEN.format("br0")
        ear = self.lab.start(lab.Process([*self.host.enter, "python3", "-c", code]))
        ear.stdout.wait(b"listening")
        return ear

    def port(self, mac):
        """The bridge's port behind which it believes that address."""
        out = subprocess.run([*self.host.enter, "bridge", "fdb", "show", "br", "br0"], check=True,
                             capture_output=True, text=True).stdout
        found = re.search(rf"^{mac} dev (\S+) .*$", out, re.M)
        return found and found[1]

    def test_after_a_migration_only(self):
        vm = self.lab.linux("--net", "tap=tap0", name="source", namespace=self.host)
        vm.prompt()
        for address in ADDRESSES:
            vm.command(f"ip addr add {address}/24 dev eth0")
        vm.command("ip link set eth0 up; arping -c 1 -I eth0 10.78.0.77")
        mac = vm.command("cat /sys/class/net/eth0/address").strip()
        self.assertEqual("tap0", self.port(mac))
        ear = self.listen()
        address = f"unix:{self.lab.path('move')}"
        there = self.lab.vm("receive", "--listen", address, "--net", "tap=tap1", name="there",
                            namespace=self.host)
        there.stderr.wait(b"waiting")
        self.assertStatus(vm.ferry("migrate", address), lab.OK)
        self.assertEqual(lab.OK, vm.wait(), vm.errors())
        self.heard(ear, mac)
        self.assertEqual("tap1", self.port(mac))
        self.restored_is_silent(there, mac)

    def heard(self, ear, mac):
        """Several times: the first are lost while the bridge learns that its port has a carrier."""
        end = 0
        for _ in range(3):
            end = ear.stdout.wait(f"rarp {mac}\n".encode(), end).end()
        for address in ADDRESSES:
            ear.stdout.wait(f"garp {mac} {address}\n".encode())

    def restored_is_silent(self, vm, mac):
        path = self.lab.path("snapshot")
        self.assertStatus(vm.ferry("snapshot", path), lab.OK)
        self.assertStatus(vm.ferry("stop"), lab.OK)
        vm.wait()
        ear = self.listen()
        again = self.lab.vm("restore", path, "--net", "tap=tap0", name="again",
                            namespace=self.host)
        # What a program there sends is heard, and nothing of the device before it. (The driver may
        # still be answering what it was asked before the snapshot.)
        again.command("arping -c 1 -I eth0 10.78.0.77", 0)
        ear.stdout.wait(re.compile(rb"^arp " + mac.encode(), re.M))
        self.assertNotIn(b"rarp", bytes(ear.stdout.data))
        self.assertStatus(again.ferry("set", "net0.announce=now"), lab.OK)
        self.heard(ear, mac)


if __name__ == "__main__":
    unittest.main()
