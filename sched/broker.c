// SPDX-License-Identifier: Apache-2.0
//     VM, in its jail                broker                     daemon
//      | -- CONFINE ------------------> |                          |
//      |                                | -- connect, CONFINE ---> |
//      |                                | <- OK ------------------ |
//      | <- OK + the connection ------- |                          |
//      | -- REGISTER ... ----------------------------------------> |  the kernel says whose it is
#include "sched/broker.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sched/client.h"
#include "vmm/util.h"

static void answer(int fd, int connection, const struct error *err)
{
    struct sched_error bad = {.head = sched_head(SCHED_ERROR)};
    struct sched_head ok = sched_head(SCHED_OK);
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {&ok, sizeof(ok)};
    struct msghdr hdr = {.msg_iov = &iov, .msg_iovlen = 1};
    if (connection < 0) {
        bad.code = err->code;
        snprintf(bad.text, sizeof(bad.text), "%.*s", SCHED_TEXT_MAX - 1, err->text);
        iov = (struct iovec) {&bad, sizeof(bad)};
    } else {
        hdr.msg_control = control;
        hdr.msg_controllen = sizeof(control);
        struct cmsghdr *c = CMSG_FIRSTHDR(&hdr);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &connection, sizeof(int));
    }
    if (sendmsg(fd, &hdr, MSG_NOSIGNAL) < 0)
        _exit(EXIT_SUCCESS); // nobody is left
}

// Only that something was asked matters, not what.
static void serve(int fd, const char *socket)
{
    char any[64];
    struct error err = {0};
    for (;;) {
        ssize_t n = recv(fd, any, sizeof(any), 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            _exit(EXIT_SUCCESS);
        autoclose int connection = sched_connect_confined(socket, &err);
        answer(fd, connection, &err);
    }
}

// It ends when the VM's end of the pair is closed; a terminal's signals are for the VM.
static void become(int fd, const char *socket)
{
    static const int ignored[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE};
    for (size_t i = 0; i < ARRAY_SIZE(ignored); i++)
        signal(ignored[i], SIG_IGN);
    prctl(PR_SET_NAME, "sched-broker");
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (dup2(fd, STDIN_FILENO) < 0 || syscall(SYS_close_range, 1, ~0u, 0))
        _exit(EXIT_FAILURE);
    serve(STDIN_FILENO, socket);
}

int sched_broker_start(const char *socket, int *fd, struct error *err)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return error_errno(err, "socketpair");
    pid_t pid = fork();
    if (!pid)
        become(pair[1], socket);
    close(pair[1]);
    if (pid < 0) {
        int ret = error_errno(err, "fork");
        close(pair[0]);
        return ret;
    }
    *fd = pair[0];
    return 0;
}
