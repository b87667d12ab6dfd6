# SPDX-License-Identifier: Apache-2.0
"""A Linux guest that works with disk, network and console moves several times and notices nothing.

Two hosts, each a network namespace with a bridge; the bridges are joined, and the guest's tap is on
that of the host where it runs. It writes to a disk, through the page cache and past it, talks to a
server on the first host over one TCP connection, saying its clock in each line, and counts on the
console. FERRY_LONG=1: ten times as many moves.
"""

import hashlib
import re
import shutil
import unittest

import ferrylab as lab
import test_migrate  # not its classes: their tests would run here once more

MOVES = 30 if lab.LONG else 3
GUEST_ADDRESS, PORT = "10.77.0.9", 9000

# Echoes, and prints what it heard. Another connection would be a line of its own.
SERVER = """
import socket
server = socket.create_server(("{}", {}))
print("serving", flush=True)
while True:
    s, _ = server.accept()
    print("connected", flush=True)
    while data := s.recv(65536):
        s.sendall(data)
        print(data.decode(), end="", flush=True)
    s.close()
    print("closed", flush=True)
"""
# `read` from a pipe into which nobody writes is a pause that starts no process.
TALK = """n=0
while [ ! -e /tmp/end ]; do
read up idle </proc/uptime
echo "$n $up"
n=$((n+1))
read -t 0.2 x
done
echo end
"""
COPY = """cd /mnt
i=0
while [ ! -e /tmp/end ]; do
i=$((i+1))
cp blob copy$((i%8))
sync
verify write blocks 8 1
read -t 0.5 x
done
echo $i >copies
"""


class BridgedHosts(test_migrate.Hosts):
    def __init__(self):
        super().__init__()
        for side in self.namespaces.sides:
            address = f"{side.address}/24"
            side.run("ip", "link", "add", "br0", "type", "bridge")
            side.run("ip", "tuntap", "add", "tap0", "mode", "tap")
            side.run("ip", "addr", "del", address, "dev", side.link)
            for port in (side.link, "tap0"):
                side.run("ip", "link", "set", port, "up", "master", "br0")
            side.run("ip", "link", "set", "br0", "up")
            side.run("ip", "addr", "add", address, "dev", "br0")


class BusyJourney(test_migrate.Journey):
    """Journey, with more to lose."""

    def __init__(self, hosts):
        self.hosts, self.lab = hosts, hosts.lab
        self.host, self.past, self.asked = 0, [], 0
        side = hosts.namespaces.sides[0]
        disk = self.lab.path("disk")
        shutil.copy(lab.guest_file("disk.ext4"), disk)
        self.server = self.lab.start(lab.Process(
            [*side.enter, "python3", "-c", SERVER.format(side.address, PORT)]))
        self.server.stdout.wait(b"serving\n")
        self.vm = self.lab.linux("--memory", "64M", "--cpus", "2", "--disk", disk, "--net",
                                 "tap=tap0", namespace=side)
        self.vm.prompt()
        self.work(side)
        self.vm.command("stty -echo", start=0)
        self.vm.type(f"counter {test_migrate.COUNTER_MS}\n")
        found = self.vm.wait_for(re.compile(rb"counter: pid (\d+)\r\n"))
        self.pid, self.start = found.group(1), found.end()

    def script(self, name, text):
        for line in text.splitlines():
            quoted = line.replace("'", "'\\''")
            self.vm.command(f"echo '{quoted}' >>/tmp/{name}")

    def work(self, side):
        vm = self.vm
        vm.command(f"ip addr add {GUEST_ADDRESS}/24 dev eth0; ip link set eth0 up")
        vm.command("mkdir -p /mnt; mount /dev/vda /mnt; head -c 65536 /bin/busybox >/mnt/blob")
        self.script("talk", TALK)
        self.script("copy", COPY)
        vm.command(f"sleep 1000000 | sh /tmp/talk | nc {side.address} {PORT} >/tmp/echoed &")
        vm.command("sleep 1000000 | (sh /tmp/copy >/tmp/copied 2>&1; echo $? >/tmp/ended) &")
        self.server.stdout.wait(b"connected\n")

    def heard(self):
        """What the server heard so far."""
        text = bytes(self.server.stdout.data)
        return text[text.index(b"connected\n") + len(b"connected\n"):]

    def talks_on(self):
        self.server.stdout.wait(re.compile(rb"\n\d+ [\d.]+\n"), self.server.stdout.size())


class Load(unittest.TestCase):
    assertStatus, assertEnds = lab.LabTest.assertStatus, lab.LabTest.assertEnds
    check_output, migrate = test_migrate.LinuxMoves.check_output, test_migrate.LinuxMoves.migrate

    def check_talk(self):
        """No line lost, repeated or from the past: one connection, one clock."""
        lines = [line.split() for line in self.journey.heard().split(b"\n")[:-1]]
        self.assertEqual([b"%d" % n for n in range(len(lines))], [line[0] for line in lines])
        clock = [float(line[1]) for line in lines]
        self.assertEqual(sorted(clock), clock)
        return len(lines)

    def check_end(self):
        j = self.journey
        stopped = j.vm.console.size()
        j.vm.type("\x1a")  # Ctrl-Z: the counter stops, and the shell that started it is back
        shell = j.vm.wait_for(lab.PROMPT, stopped)
        j.vm.type("stty echo; touch /tmp/end\n")
        j.vm.wait_for(lab.PROMPT, shell.end())
        j.server.stdout.wait(b"end\nclosed\n")
        said = j.heard()[:-len(b"closed\n")]
        # The talk and its echo are the same to the byte, at both ends.
        j.vm.command("until [ -e /tmp/ended ]; do sleep 1; done")
        self.assertIn(hashlib.sha256(said).hexdigest(), j.vm.command("sha256sum /tmp/echoed"))
        # From the disk, not from memory.
        j.vm.command("sync; umount /mnt; mount /dev/vda /mnt")
        sums = j.vm.command("head -c 65536 /bin/busybox | sha256sum; cd /mnt; sha256sum blob copy?")
        copies = int(j.vm.command("cat /mnt/copies").split()[0])
        found = re.findall(r"^([0-9a-f]{64})", sums, re.M)
        self.assertEqual(2 + min(8, copies), len(found), sums)
        self.assertEqual(1, len(set(found)), sums)
        self.assertIn("verify: ok", j.vm.command("verify read /mnt/blocks 8"))
        written = j.vm.command("grep -c 'wrote 8 blocks' /tmp/copied").split()[0]
        self.assertEqual(copies, int(written), j.vm.command("grep -v wrote /tmp/copied"))
        self.assertNotRegex(j.vm.command("dmesg"), "(?i)I/O error|EXT4-fs error|stall|soft lockup")
        return copies

    def test_moves_under_load(self):
        hosts = BridgedHosts()
        self.addCleanup(hosts.close)
        self.hosts, self.lab = hosts, hosts.lab
        self.journey = j = BusyJourney(hosts)
        for move in range(MOVES):
            mode = test_migrate.MODES[move % len(test_migrate.MODES)]
            with self.subTest(move=move, mode=mode):
                j.talks_on()
                self.migrate(mode)
                j.talks_on()
                self.check_output()
                self.check_talk()
        lines = self.check_talk()
        print(f"{MOVES} moves: {lines} lines by TCP, {self.check_end()} copies, "
              f"{len(j.text().splitlines())} lines on the console")


if __name__ == "__main__":
    unittest.main()
