# SPDX-License-Identifier: Apache-2.0
"""A Linux guest that works with disk, network and console moves several times and notices nothing.

Two hosts, each a network namespace with a bridge; the bridges are joined, and the guest's tap is on
that of the host where it runs. It writes to a disk, through the page cache and past it, talks to a
server on the first host over one TCP connection, saying its clock in each line, and counts on the
console. What the test asks of it goes to a shell over two more connections, which move as well.
FERRY_LONG=1: ten times as many moves.
"""

import hashlib
import re
import shutil
import subprocess
import unittest

import ferrylab as lab
import test_migrate  # not its classes: their tests would run here once more

MOVES = 30 if lab.LONG else 3
GUEST_ADDRESS, PORT, COMMANDS, ANSWERS = "10.77.0.9", 9000, 9001, 9002

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
# What is typed here goes to one connection, what comes on the other is shown.
TERMINAL = """
import os, socket, threading
servers = [socket.create_server(("{}", port)) for port in ({}, {})]
print("serving", flush=True)
commands, answers = (server.accept()[0] for server in servers)
def pass_on():
    while data := os.read(0, 65536):
        commands.sendall(data)
threading.Thread(target=pass_on, daemon=True).start()
while data := answers.recv(65536):
    os.write(1, data)
"""
# `read` from a pipe into which nobody writes is a pause that starts no process.
TALK = """n=0
while [ ! -e /tmp/end ]; do
read up idle </proc/uptime
echo "$n $up"
n=$((n+1))
read -t 1 x
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
read -t 1 x
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


class Shell:
    """The guest's, over the network: beside its console, which the test compares byte for byte."""

    def __init__(self, lab_, side, vm):
        self.asked = 0
        self.process = lab_.start(lab.Process(
            [*side.enter, "python3", "-c", TERMINAL.format(side.address, COMMANDS, ANSWERS)],
            stdin=subprocess.PIPE))
        self.process.stdout.wait(b"serving\n")
        vm.command(f"sleep 1000000 | nc {side.address} {COMMANDS} | sh 2>&1 | "
                   f"nc {side.address} {ANSWERS} &")

    def close(self):
        self.process.child.stdin.close()

    def command(self, text):
        """What it says to that: a command, or several lines of them."""
        self.asked += 1
        start = self.process.stdout.size()
        self.process.child.stdin.write(f"{text}\necho done {self.asked}\n".encode())
        self.process.child.stdin.flush()
        done = self.process.stdout.wait(b"done %d\n" % self.asked, start)
        return bytes(self.process.stdout.data[start:done.start()]).decode()


class BusyJourney(test_migrate.Journey):
    """Journey, with more to lose."""

    def __init__(self, hosts):
        self.hosts, self.lab = hosts, hosts.lab
        self.host, self.past, self.asked = 0, [], 0
        side = hosts.namespaces.sides[0]
        disk = self.lab.path("disk")
        shutil.copy(lab.guest_file("disk.ext4"), disk)
        self.devices = ("--disk", disk, "--net", "tap=tap0")
        self.server = self.lab.start(lab.Process(
            [*side.enter, "python3", "-c", SERVER.format(side.address, PORT)]))
        self.server.stdout.wait(b"serving\n")
        self.vm = self.lab.linux("--memory", "64M", "--cpus", "2", *self.devices, namespace=side)
        self.vm.prompt()
        self.vm.command(f"ip addr add {GUEST_ADDRESS}/24 dev eth0; ip link set eth0 up")
        self.shell = Shell(self.lab, side, self.vm)
        self.work(side)
        self.vm.command("stty -echo", start=0)
        self.vm.type(f"counter {test_migrate.COUNTER_MS}\n")
        found = self.vm.wait_for(re.compile(rb"counter: pid (\d+)\r\n"))
        self.pid, self.start = found.group(1), found.end()

    def work(self, side):
        self.shell.command(f"""cat >/tmp/talk <<'END'
{TALK}END
cat >/tmp/copy <<'END'
{COPY}END
mkdir -p /mnt; mount /dev/vda /mnt; head -c 65536 /bin/busybox >/mnt/blob
sleep 1000000 | sh /tmp/talk | nc {side.address} {PORT} >/tmp/echoed &
sleep 1000000 | (sh /tmp/copy >/tmp/copied 2>&1; echo $? >/tmp/ended) &""")
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
        """Nothing is lost that was written or said, and nothing more came on the console."""
        j, command = self.journey, self.journey.shell.command
        command("touch /tmp/end")
        j.server.stdout.wait(b"end\nclosed\n")
        said = j.heard()[:-len(b"closed\n")]
        command("until [ -s /tmp/ended ]; do sleep 1; done")
        # The talk and its echo are the same to the byte, at both ends.
        self.assertIn(hashlib.sha256(said).hexdigest(), command("sha256sum /tmp/echoed"))
        # From the disk, not from memory.
        self.assertEqual("", command("sync; umount /mnt; mount /dev/vda /mnt"))
        sums = command("head -c 65536 /bin/busybox | sha256sum; cd /mnt; sha256sum blob copy?")
        copies = int(command("cat /mnt/copies"))
        found = re.findall(r"^([0-9a-f]{64})", sums, re.M)
        self.assertEqual(2 + min(8, copies), len(found), sums)
        self.assertEqual(1, len(set(found)), sums)
        self.assertIn("verify: ok", command("verify read /mnt/blocks 8"))
        self.assertEqual(copies, int(command("grep -c 'wrote 8 blocks' /tmp/copied")),
                         command("grep -v wrote /tmp/copied"))
        self.assertNotRegex(command("dmesg"), "(?i)I/O error|EXT4-fs error|stall|soft lockup")
        j.counts_on()
        self.check_output()
        return copies

    def test_moves_under_load(self):
        hosts = BridgedHosts()
        self.addCleanup(hosts.close)
        self.hosts, self.lab = hosts, hosts.lab
        self.journey = j = BusyJourney(hosts)
        self.addCleanup(j.shell.close)
        for move in range(MOVES):
            j.talks_on()
            self.migrate(test_migrate.MODES[move % len(test_migrate.MODES)], arrival=j.devices)
            j.talks_on()
            self.check_output()
            self.check_talk()
        lines = self.check_talk()
        print(f"{MOVES} moves: {lines} lines by TCP, {self.check_end()} copies, "
              f"{len(j.text().splitlines())} lines on the console")


if __name__ == "__main__":
    unittest.main()
