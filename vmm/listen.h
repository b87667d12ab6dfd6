// SPDX-License-Identifier: Apache-2.0
// Unix sockets that have their name from the moment on that somebody listens, and not before: who
// waits for the name to appear may connect at once, and a socket that refuses is always a dead
// one's.
#pragma once

#include <sys/un.h>

// Names the socket and listens. 0 or -errno, which errno says, too; -EADDRINUSE: there is a file of
// that name. The kernel's lists (ss -x) show a name beside it, "PATH.3f01c2": that it had for a
// moment, until it listened.
int listen_unix(int fd, const struct sockaddr_un *addr, int backlog);
