# SPDX-License-Identifier: Apache-2.0
"""Linux uses the virtio console and its named ports: a shell on hvc0, streams through a port both
ways with every byte compared, also across pause, snapshot and restore; a port sees its client come
and go."""

import fcntl
import os
import select
import socket
import struct
import termios
import time
import unittest

import ferrylab as lab

MIB = 1024 * 1024
PORT = "org.ferry.test"


def pattern(start, length):
    """Bytes that tell their own position."""
    first = start // 4
    words = struct.pack(f">{length // 4 + 2}I", *range(first, first + length // 4 + 2))
    return words[start % 4:start % 4 + length]


class Pump:
    """Sends `total` bytes through a connected socket and checks what comes back."""

    def __init__(self, sock, total):
        self.sock, self.total = sock, total
        self.sent = self.got = 0

    def run(self, until, limit=lab.LIMIT):
        """Goes on until `until` bytes have come back."""
        deadline = time.monotonic() + limit
        while self.got < until:
            more = self.sent < self.total
            r, w, _ = select.select([self.sock], [self.sock] if more else [], [], 1)
            if r:
                data = self.sock.recv(65536, socket.MSG_DONTWAIT)
                if data != pattern(self.got, len(data)) or not data:
                    raise AssertionError(f"after {self.got} bytes came {data[:40]!r}..., expected "
                                         f"{pattern(self.got, 40)!r}")
                self.got += len(data)
            if w:
                length = min(32768, self.total - self.sent)
                self.sent += self.sock.send(pattern(self.sent, length), socket.MSG_DONTWAIT)
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.got} of {until} bytes came back in {limit} s, "
                                     f"{self.sent} were sent")


def dial(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


class VirtioConsole(unittest.TestCase):
    def setUp(self):
        self.lab = lab.Lab()
        self.addCleanup(self.lab.close)

    def linux(self, console, *args, **options):
        vm = self.lab.linux("--memory", "64M", "--vconsole", console, *args, **options)
        vm.prompt()
        return vm

    def port(self, vm, number=1):
        """What `ferry info` tells of a port."""
        info = self.assertOk(vm.ferry("info", "--json")).json()
        return info["devices"]["vconsole0"]["ports"][number]

    def assertOk(self, result):
        self.assertEqual(lab.OK, result.status, str(result))
        return result

    def echo(self, vm, total):
        vm.type(f"portecho /dev/vport0p1 {total}\n")
        vm.wait_for(b"portecho: open")

    def test_1_port_echo_through_a_socket(self):
        path = self.lab.path("port")
        vm = self.linux(f"null,port={PORT}=unix:{path}", "--transport", "pci")
        self.assertEqual(f"{PORT}\n", vm.command("cat /sys/class/virtio-ports/vport0p1/name"))
        total = 4 * MIB
        self.echo(vm, total)
        sock = dial(path)
        self.addCleanup(sock.close)
        pump = Pump(sock, total)
        pump.run(total)
        vm.wait_for(f"portecho: {total} bytes".encode())
        shown = self.port(vm)
        self.assertEqual((PORT, path, True), (shown["name"], shown["path"], shown["host_open"]))
        self.assertEqual((total, total), (shown["bytes_to_guest"], shown["bytes_to_host"]))

    def test_2_snapshot_and_restore_in_the_middle(self):
        """Both ends of the port's socket pair stay open here, so the bytes that no VM had taken wait
        for the next one: what comes back must be the whole stream, each byte once."""
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        console = f"null,port={PORT}=fd:{theirs.fileno()},packed"
        total = 3 * MIB
        vm = self.linux(console, fds=(theirs.fileno(),))
        self.echo(vm, total)
        pump = Pump(ours, total)
        for part in range(1, 3):
            pump.run(part * MIB)
            self.assertOk(vm.ferry("pause"))
            snapshot = self.lab.path(f"snapshot{part}")
            self.assertOk(vm.ferry("snapshot", snapshot))
            self.assertOk(vm.ferry("stop"))
            self.assertEqual(lab.STOPPED, vm.wait(), vm.errors())
            self.assertLess(pump.got, pump.sent)  # there was something under way
            vm = self.lab.vm("restore", snapshot, "--vconsole", console,
                             fds=(theirs.fileno(),))
        pump.run(total)
        vm.wait_for(f"portecho: {total} bytes".encode())

    def test_3_clients_come_and_go(self):
        path = self.lab.path("port")
        vm = self.linux(f"null,port={PORT}=unix:{path}")
        # A reader sees the end when its client leaves, and a writer waits for the next one.
        vm.type("cat /dev/vport0p1; echo ended; echo to the next > /dev/vport0p1; echo written\n")
        first = dial(path)
        first.sendall(b"from the first\n")
        vm.wait_for(b"from the first\r\n")
        first.close()
        at = vm.wait_for(b"\nended\r\n").end()
        second = dial(path)
        self.addCleanup(second.close)
        self.assertEqual(b"to the next\n", second.recv(100))
        vm.wait_for(b"written\r\n", at)

    def test_4_shell_on_hvc0(self):
        """The kernel's console, and the shell that init starts on it."""
        path = self.lab.path("hvc")
        vm = self.lab.linux("--memory", "64M", "--vconsole", f"unix:{path}",
                            append=lab.guest_cmdline("console=hvc0", drop=("console=",)))
        sock = self.dial_soon(vm, path)
        self.addCleanup(sock.close)
        console = lab.Stream(sock.fileno(), "hvc0")
        console.wait(lab.PROMPT)
        sock.sendall(b"echo $((6 * 7))\n")
        console.wait(b"\r\n42\r\n")
        sock.sendall(b"exit 0\n")
        self.assertEqual(lab.OK, vm.wait(), vm.errors())
        console.rest()

    def dial_soon(self, vm, path):
        deadline = time.monotonic() + lab.LIMIT
        while not os.path.exists(path):
            self.assertIsNone(vm.child.poll(), vm.errors())
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
        return dial(path)

    def test_5_size_of_the_terminal(self):
        link = self.lab.path("tty")
        vm = self.linux(f"pty,link={link}")
        slave = os.open(link, os.O_RDWR | os.O_NOCTTY)
        self.addCleanup(os.close, slave)
        vm.command("exec 3<>/dev/hvc0")  # Linux gives a new size to an open terminal only
        for rows, columns in ((43, 132), (25, 80)):
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            wanted = f"{rows} {columns}\n"
            deadline = time.monotonic() + lab.LIMIT
            while vm.command("env -u COLUMNS stty size <&3") != wanted:
                self.assertLess(time.monotonic(), deadline, f"never {wanted}")


if __name__ == "__main__":
    unittest.main()
