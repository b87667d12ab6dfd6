// SPDX-License-Identifier: Apache-2.0
#include "devices/terminal.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "vmm/util.h"

struct terminal {
    atomic_bool active;   // the other fields are set and constant
    atomic_int resize_fd; // -1 = none
    bool used;            // guarded by process.lock
    int fd;
    struct termios cooked, raw;
};

// What follows is file-scope, against the rule of the house, because its subject is: signal
// dispositions belong to the process, and a handler gets no argument to find its data by.
enum { TERMINALS_MAX = 4 };

static const int fatal_signals[] = {SIGHUP, SIGINT,  SIGQUIT, SIGILL,  SIGTRAP, SIGABRT, SIGBUS,
                                    SIGFPE, SIGSEGV, SIGTERM, SIGUSR1, SIGALRM, SIGSYS,  SIGXCPU};

static struct {
    pthread_mutex_t lock;
    struct terminal terminals[TERMINALS_MAX];
    unsigned nr;
    bool taken[ARRAY_SIZE(fatal_signals)]; // signals whose handler is ours
    bool stop_taken, resize_taken;
} process = {.lock = PTHREAD_MUTEX_INITIALIZER};

// Only the foreground job may touch the terminal's modes; a terminal that is not our controlling
// one has no such notion.
static bool in_foreground(int fd)
{
    pid_t group = tcgetpgrp(fd);
    return group < 0 || group == getpgrp();
}

// Async-signal-safe. Never waits for output to drain: its reader may be stuck.
static void set_all(bool raw)
{
    for (unsigned i = 0; i < TERMINALS_MAX; i++) {
        struct terminal *t = &process.terminals[i];
        if (atomic_load(&t->active) && in_foreground(t->fd))
            tcsetattr(t->fd, TCSANOW, raw ? &t->raw : &t->cooked);
    }
}

static void on_fatal(int sig)
{
    set_all(false);
    signal(sig, SIG_DFL);
    raise(sig); // delivered when this handler returns
}

static void on_continue(int sig)
{
    int saved = errno;
    set_all(true);
    errno = saved;
}

static void on_resize(int sig)
{
    int saved = errno;
    const uint64_t one = 1;
    for (unsigned i = 0; i < TERMINALS_MAX; i++) {
        struct terminal *t = &process.terminals[i];
        int fd = atomic_load(&t->resize_fd);
        if (atomic_load(&t->active) && fd >= 0 && write(fd, &one, sizeof(one)) < 0)
            continue; // it rings already
    }
    errno = saved;
}

static void on_stop(int sig)
{
    int saved = errno;
    set_all(false);
    struct sigaction action = {.sa_handler = SIG_DFL}, ours;
    sigaction(SIGTSTP, &action, &ours);
    sigset_t set, before;
    sigemptyset(&set);
    sigaddset(&set, SIGTSTP);
    raise(SIGTSTP);
    pthread_sigmask(SIG_UNBLOCK, &set, &before); // the process stops here
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    sigaction(SIGTSTP, &ours, NULL);
    set_all(true);
    errno = saved;
}

static bool is_default(int sig)
{
    struct sigaction now;
    return !sigaction(sig, NULL, &now) && !(now.sa_flags & SA_SIGINFO) && now.sa_handler == SIG_DFL;
}

static void handle(int sig, void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigfillset(&action.sa_mask);
    sigaction(sig, &action, NULL);
}

static void signals_take(void)
{
    for (unsigned i = 0; i < ARRAY_SIZE(fatal_signals); i++) {
        process.taken[i] = is_default(fatal_signals[i]);
        if (process.taken[i])
            handle(fatal_signals[i], on_fatal);
    }
    process.stop_taken = is_default(SIGTSTP) && is_default(SIGCONT);
    if (process.stop_taken) {
        handle(SIGTSTP, on_stop);
        handle(SIGCONT, on_continue);
    }
    process.resize_taken = is_default(SIGWINCH);
    if (process.resize_taken)
        handle(SIGWINCH, on_resize);
}

static void give_back(int sig, void (*handler)(int))
{
    struct sigaction now;
    if (!sigaction(sig, NULL, &now) && now.sa_handler == handler)
        signal(sig, SIG_DFL);
}

static void signals_give_back(void)
{
    for (unsigned i = 0; i < ARRAY_SIZE(fatal_signals); i++)
        if (process.taken[i])
            give_back(fatal_signals[i], on_fatal);
    if (process.stop_taken) {
        give_back(SIGTSTP, on_stop);
        give_back(SIGCONT, on_continue);
    }
    if (process.resize_taken)
        give_back(SIGWINCH, on_resize);
}

static struct terminal *terminal_alloc(void)
{
    for (unsigned i = 0; i < TERMINALS_MAX; i++) {
        if (!process.terminals[i].used) {
            process.terminals[i].used = true;
            if (!process.nr++)
                signals_take();
            return &process.terminals[i];
        }
    }
    return NULL;
}

int terminal_raw(int fd, struct terminal **out, struct error *err)
{
    struct termios cooked;
    if (tcgetattr(fd, &cooked))
        return error_errno(err, "terminal (fd %d)", fd);
    pthread_mutex_lock(&process.lock);
    struct terminal *t = terminal_alloc();
    pthread_mutex_unlock(&process.lock);
    if (!t)
        return error_set(err, -EBUSY, "terminal (fd %d): already %d raw terminals in this process",
                         fd, TERMINALS_MAX);
    t->fd = fd;
    atomic_store(&t->resize_fd, -1);
    t->cooked = t->raw = cooked;
    t->raw.c_iflag &= ~(tcflag_t)(IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | IXON);
    t->raw.c_lflag &= ~(tcflag_t)(ECHO | ECHONL | ICANON | ISIG | IEXTEN);
    t->raw.c_cc[VMIN] = 1;
    t->raw.c_cc[VTIME] = 0;
    atomic_store(&t->active, true);
    if (in_foreground(fd) && tcsetattr(fd, TCSANOW, &t->raw)) {
        error_errno(err, "terminal (fd %d): cannot set raw mode", fd);
        terminal_restore(t);
        return -EIO;
    }
    *out = t;
    return 0;
}

void terminal_on_resize(struct terminal *t, int event_fd)
{
    atomic_store(&t->resize_fd, event_fd);
}

void terminal_restore(struct terminal *t)
{
    if (!t)
        return;
    if (atomic_exchange(&t->active, false) && in_foreground(t->fd))
        tcsetattr(t->fd, TCSANOW, &t->cooked);
    pthread_mutex_lock(&process.lock);
    t->used = false;
    if (!--process.nr)
        signals_give_back();
    pthread_mutex_unlock(&process.lock);
}

__attribute__((destructor)) static void restore_at_exit(void)
{
    set_all(false);
}
