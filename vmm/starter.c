// SPDX-License-Identifier: Apache-2.0
#include "vmm/starter.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vmm/util.h"

struct starter {
    int socket;
    pid_t pid;
};

enum order { ORDER_START = 's', ORDER_END = 'e' };

struct answer {
    int ret;
    char text[ERROR_TEXT_MAX];
};

enum { SOCKET = STDERR_FILENO + 1 }; // in the starter's process

union fds_room {
    struct cmsghdr header;
    char room[CMSG_SPACE(2 * sizeof(int))];
};

// A vCPU's thread is interrupted at any time.
static ssize_t message_send(int fd, const struct msghdr *message)
{
    ssize_t n;
    do
        n = sendmsg(fd, message, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n;
}

static ssize_t message_receive(int fd, struct msghdr *message)
{
    ssize_t n;
    do
        n = recvmsg(fd, message, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    return n;
}

// --- the starter's process

static void program_end(pid_t *pid)
{
    if (!*pid)
        return;
    kill(*pid, SIGKILL); // it has nothing to put in order
    while (waitpid(*pid, NULL, 0) < 0 && errno == EINTR)
        ;
    *pid = 0;
}

// One order, and the descriptors that came with it. False: there is nobody to take orders from.
static bool order_read(char *order, int fds[2])
{
    union fds_room room;
    struct iovec iov = {order, 1};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &room, .msg_controllen = sizeof(room)};
    fds[0] = fds[1] = -1;
    if (message_receive(SOCKET, &message) != 1)
        return false;
    const struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    if (c && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(2 * sizeof(int)))
        memcpy(fds, CMSG_DATA(c), 2 * sizeof(int));
    return true;
}

static void orders_take(starter_fn fn, void *arg)
{
    char order;
    int fds[2];
    pid_t pid = 0;
    while (order_read(&order, fds)) {
        struct answer answer = {0};
        struct error err = {0};
        program_end(&pid);
        if (order == ORDER_START)
            answer.ret = fds[0] < 0 ? error_set(&err, -EBADF, "no descriptors for the program")
                                    : fn(arg, fds, &pid, &err);
        memcpy(answer.text, err.text, sizeof(answer.text));
        for (unsigned i = 0; i < 2; i++)
            if (fds[i] >= 0)
                close(fds[i]);
        if (send(SOCKET, &answer, sizeof(answer), MSG_NOSIGNAL) != sizeof(answer))
            break;
    }
    program_end(&pid);
}

static _Noreturn void starter_main(int socket, starter_fn fn, void *arg)
{
    sigset_t all;
    sigfillset(&all); // ends by its socket; signals to the group are the VM's to handle
    sigprocmask(SIG_SETMASK, &all, NULL);
    prctl(PR_SET_NAME, "ferry-starter");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd < SOCKET && null >= 0; fd++)
        dup2(null, fd);
    if (null >= 0 && (socket == SOCKET || dup2(socket, SOCKET) == SOCKET) &&
        !syscall(SYS_close_range, SOCKET + 1, ~0u, 0) && !fcntl(SOCKET, F_SETFD, FD_CLOEXEC))
        orders_take(fn, arg);
    _exit(0);
}

// --- who asks

int starter_create(struct starter **out, starter_fn fn, void *arg, struct error *err)
{
    int ends[2];
    struct starter *s = malloc(sizeof(*s));
    if (!s)
        return error_set(err, -ENOMEM, "no memory for a process that starts programs");
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
        free(s);
        return error_errno(err, "socketpair");
    }
    s->socket = ends[0];
    s->pid = fork();
    if (!s->pid)
        starter_main(ends[1], fn, arg);
    close(ends[1]);
    *out = s;
    if (s->pid > 0)
        return 0;
    int ret = error_errno(err, "fork");
    close(s->socket);
    free(s);
    return ret;
}

static int ask(struct starter *s, char order, const int fds[2], struct error *err)
{
    union fds_room room = {0};
    struct answer answer;
    struct iovec iov = {&order, 1};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fds) {
        message.msg_control = &room;
        message.msg_controllen = sizeof(room);
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(2 * sizeof(int));
        memcpy(CMSG_DATA(c), fds, 2 * sizeof(int));
    }
    bool sent = message_send(s->socket, &message) == 1;
    iov = (struct iovec) {&answer, sizeof(answer)};
    message = (struct msghdr) {.msg_iov = &iov, .msg_iovlen = 1};
    if (!sent || message_receive(s->socket, &message) != sizeof(answer))
        return error_set(err, -EPIPE, "the process that starts programs has ended");
    return answer.ret < 0 ? error_set(err, answer.ret, "%s", answer.text) : 0;
}

int starter_start(struct starter *s, const int fds[2], struct error *err)
{
    return ask(s, ORDER_START, fds, err);
}

void starter_end(struct starter *s)
{
    ask(s, ORDER_END, NULL, NULL); // had it ended, so would have the program, by its own socket
}

void starter_destroy(struct starter *s)
{
    if (!s)
        return;
    close(s->socket);
    while (waitpid(s->pid, NULL, 0) < 0 && errno == EINTR)
        ;
    free(s);
}
