# SPDX-License-Identifier: Apache-2.0
"""Linux talks to programs of this host over vsock: 1,000 connections whose data come back, half of
them begun on each side; refusals, half closed connections, a host program that is slow; a restored
guest is told that its connections are gone, and listens on."""

import os
import selectors
import socket
import stat
import threading
import time
import unittest

import ferrylab as lab

# Each connection is some ten system calls of the guest, slow ones where ring 0 is emulated; a
# thousand at once are in tests/unit/test_virtio_vsock.c.
AT_ONCE, ROUNDS = (500, 1) if lab.LONG else (100, 5)
CONNECTIONS = AT_ONCE * ROUNDS  # each way
BYTES = 64
LOCAL_PORTS = 1 << 30


def pattern(seed, size):
    return bytes((seed * 7 + i * 13 + i // 251) & 0xff for i in range(size))


def exactly(sock, size):
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise AssertionError(f"the connection ended after {len(data)} of {size} bytes")
        data += chunk
    return data


class Echo:
    """A host program that listens on PATH_PORT and sends back what it gets."""

    def __init__(self, path, port, backlog):
        self.file = f"{path}_{port}"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.file)
        self.listener.listen(backlog)
        self.stop, self.stopped = socket.socketpair()
        self.connections = 0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        with selectors.DefaultSelector() as ready:
            ready.register(self.listener, selectors.EVENT_READ)
            ready.register(self.stopped, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    sock = key.fileobj
                    if sock is self.stopped:
                        for open_one in list(ready.get_map().values()):
                            open_one.fileobj.close()
                        return
                    if sock is self.listener:
                        ready.register(self.listener.accept()[0], selectors.EVENT_READ)
                        self.connections += 1
                        continue
                    try:
                        data = sock.recv(65536)
                        if data:
                            sock.sendall(data)
                            continue
                    except OSError:
                        pass
                    ready.unregister(sock)
                    sock.close()

    def close(self):
        self.stop.close()
        self.thread.join()
        os.unlink(self.file)


class Vsock(unittest.TestCase):
    def setUp(self):
        self.lab = lab.Lab()
        self.addCleanup(self.lab.close)
        self.path = self.lab.path("v.sock")

    def boot(self, *options, words=""):
        vm = self.lab.linux("--memory", "128M", "--vsock", f"cid=7,path={self.path}{words}",
                            *options)
        self.vm = vm
        vm.prompt()
        return vm

    def connect(self, port, path=None):
        """A connection to the guest, or None when it is refused."""
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.settimeout(lab.LIMIT)
        sock.connect(path or self.path)
        sock.sendall(f"CONNECT {port}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            try:
                byte = sock.recv(1)
            except OSError as e:
                raise AssertionError(f"{e}; the VM's status: {self.vm.child.poll()}, "
                                     f"stderr: {self.vm.errors()}") from None
            if not byte:
                self.assertEqual(b"", answer)
                return None
            answer += byte
        word, local = answer.split()
        self.assertEqual(b"OK", word)
        self.assertGreaterEqual(int(local), LOCAL_PORTS)
        return sock

    def serve(self, vm, port):
        start = vm.console.size()
        vm.type(f"sock serve vsock:{port} &\n")
        vm.wait_for(b"sock: listening", start)

    def info(self, vm):
        return vm.ferry("info", "--json").json()["devices"]["vsock0"]

    def check_from_host(self, vm):
        socks = [self.connect(1000) for _ in range(AT_ONCE)]
        self.assertNotIn(None, socks)
        for i, sock in enumerate(socks):
            sock.sendall(pattern(i, BYTES))
        for i, sock in enumerate(socks):
            self.assertEqual(pattern(i, BYTES), exactly(sock, BYTES))
        for sock in socks:
            sock.close()
        deadline = time.monotonic() + lab.LIMIT
        while self.info(vm)["connections"] and time.monotonic() < deadline:
            time.sleep(0.2)
        self.assertEqual(0, self.info(vm)["connections"])  # the guest closed them, too

    def check_from_guest(self, vm):
        echo = Echo(self.path, 2000, 16)
        self.addCleanup(echo.close)
        for _ in range(ROUNDS):
            out = vm.command(f"sock connect vsock:2000 {AT_ONCE} {BYTES}")
            self.assertIn(f"sock: ok {AT_ONCE} connections, {BYTES} bytes each", out)
        self.assertEqual(CONNECTIONS, echo.connections)

    def echo_thousand(self, *options, words=""):
        vm = self.boot(*options, words=words)
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.path).st_mode))
        self.serve(vm, 1000)
        for _ in range(ROUNDS):
            self.check_from_host(vm)
        self.check_from_guest(vm)
        info = self.info(vm)
        self.assertEqual(7, info["cid"])
        self.assertEqual(2 * CONNECTIONS, info["connections_total"])
        self.assertEqual(2 * CONNECTIONS * BYTES, info["bytes_to_guest"])
        self.assertEqual(2 * CONNECTIONS * BYTES, info["bytes_from_guest"])
        vm.ferry("stop")
        vm.wait()
        self.assertFalse(os.path.exists(self.path))

    def test_thousand_connections(self):
        self.echo_thousand()

    def test_thousand_connections_packed_pci(self):
        self.echo_thousand("--transport", "pci", words=",packed")

    def test_refusals_ends_and_slow_readers(self):
        vm = self.boot()
        self.assertIsNone(self.connect(1000))  # nobody listens in the guest
        self.assertIn("connect", vm.command("sock connect vsock:2000 1 1"))  # nor here
        self.serve(vm, 1000)
        # The guest's server ends the connection once it has read the end; its answer is whole.
        sock = self.connect(1000)
        data = pattern(1, 600 * 1024)  # more than any window
        sender = threading.Thread(target=lambda: (sock.sendall(data),
                                                  sock.shutdown(socket.SHUT_WR)))
        sender.start()
        back = bytearray()
        while chunk := sock.recv(65536):
            back += chunk
        sender.join()
        self.assertEqual(data, bytes(back))

    def test_restore_ends_connections(self):
        vm = self.boot()
        self.serve(vm, 1000)
        sock = self.connect(1000)
        sock.sendall(b"before")
        self.assertEqual(b"before", exactly(sock, 6))
        snapshot = self.lab.path("snapshot")
        self.assertEqual(0, vm.ferry("snapshot", snapshot).status)
        sock.sendall(b"after!")  # the VM that was saved goes on as it was
        self.assertEqual(b"after!", exactly(sock, 6))
        vm.ferry("stop")
        vm.wait()
        self.assertEqual(b"", sock.recv(1))
        again = self.lab.vm("restore", snapshot, "--vsock", f"cid=9,path={self.path}")
        again.command("true")
        # The server in the guest still listens, under the new CID, once the guest has seen that.
        for _ in range(lab.LIMIT * 20):
            sock = self.connect(1000)
            if sock:
                break
            threading.Event().wait(0.05)
        self.assertIsNotNone(sock)
        sock.sendall(b"again!")
        self.assertEqual(b"again!", exactly(sock, 6))
        self.assertEqual(9, self.info(again)["cid"])
        again.ferry("stop")
        again.wait()
