// SPDX-License-Identifier: Apache-2.0
//
// Process 1 of the guest. System calls and first touches of pages are dear where ring 0 is
// emulated, so it does as little as possible, and says that user space lives before all else.
#include "ferryt.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BUTTONS_MAX = 4, CMDLINE_MAX = 4096 };

struct init {
    char cmdline[CMDLINE_MAX];
    char tty[64];      // path of the console's own terminal
    const char *run;   // command of ferry.run=, or NULL for a shell
    sigset_t old_mask; // what a child gets back
    int signals;       // signalfd
    int buttons[BUTTONS_MAX];
    int n_buttons;
};

static void say(const char *text)
{
    // The console may be gone; there is nowhere else to complain.
    if (write(STDOUT_FILENO, text, strlen(text)) < 0)
        return;
}

static void mounts_make(void)
{
    static const struct {
        const char *type, *dir;
    } mounts[] = {{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}};

    for (size_t i = 0; i < sizeof(mounts) / sizeof(mounts[0]); i++) {
        if (mount(mounts[i].type, mounts[i].dir, mounts[i].type, 0, NULL)) {
            char line[128];
            snprintf(line, sizeof(line), "ferry-guest: mount %s: %s\n", mounts[i].dir,
                     strerror(errno));
            say(line);
        }
    }
    mkdir("/dev/pts", 0755);
    mount("devpts", "/dev/pts", "devpts", 0, NULL); // absent without ptys: not an error
}

// Finds `word=` on the kernel command line and returns its value, cut out in place. The kernel
// keeps quotes in /proc/cmdline: "word=a b" or word="a b". Unquoted, '+' stands for a space.
static char *cmdline_value(char *cmdline, const char *word)
{
    size_t len = strlen(word);
    char *at = cmdline;

    while ((at = strstr(at, word))) {
        bool quoted_whole = at > cmdline && at[-1] == '"';
        bool starts = at == cmdline || at[-1] == ' ' || quoted_whole;
        if (starts && at[len] == '=')
            break;
        at += len;
    }
    if (!at)
        return NULL;

    char *value = at + len + 1;
    bool quoted = at > cmdline && at[-1] == '"';
    if (!quoted && *value == '"') {
        quoted = true;
        value++;
    }
    value[strcspn(value, quoted ? "\"\n" : " \n")] = '\0';
    for (char *p = value; !quoted && *p; p++)
        if (*p == '+')
            *p = ' ';
    return value;
}

// ferry.tools=DEVICE: the read-only file system of guest/build tools.
static void tools_mount(const char *cmdline)
{
    char copy[CMDLINE_MAX]; // cmdline_value cuts it up

    if (!strstr(cmdline, "ferry.tools="))
        return;
    strcpy(copy, cmdline);
    const char *device = cmdline_value(copy, "ferry.tools");
    if (device && mount(device, "/tools", "ext4", MS_RDONLY, NULL)) {
        char line[128];
        snprintf(line, sizeof(line), "ferry-guest: mount %.60s: %s\n", device, strerror(errno));
        say(line);
    }
}

static void console_find(struct init *init)
{
    char active[64];

    // The last name is the one /dev/console leads to; /dev/console itself cannot be a
    // controlling terminal.
    if (file_read("/sys/class/tty/console/active", active, sizeof(active)) <= 0)
        strcpy(active, "ttyS0");
    active[strcspn(active, "\n")] = '\0';
    char *last = strrchr(active, ' ');
    snprintf(init->tty, sizeof(init->tty), "/dev/%.50s", last ? last + 1 : active);
}

static void buttons_open(struct init *init)
{
    for (int i = 0; i < BUTTONS_MAX; i++) {
        char path[32];
        snprintf(path, sizeof(path), "/dev/input/event%d", i);
        int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0)
            break;
        init->buttons[init->n_buttons++] = fd;
    }
}

static bool button_pressed(int fd)
{
    struct input_event event;

    while (read(fd, &event, sizeof(event)) == (ssize_t)sizeof(event))
        if (event.type == EV_KEY && event.code == KEY_POWER && event.value)
            return true;
    return false;
}

static pid_t shell_start(const struct init *init)
{
    pid_t pid = fork();
    if (pid)
        return pid;

    setsid();
    int tty = open(init->tty, O_RDWR);
    if (tty >= 0) {
        ioctl(tty, TIOCSCTTY, 0);
        for (int fd = 0; fd < 3; fd++)
            dup2(tty, fd);
        if (tty > 2)
            close(tty);
    }
    sigprocmask(SIG_SETMASK, &init->old_mask, NULL);

    static char *const env[] = {"PATH=/bin:/tools/bin", "HOME=/root",  "TERM=vt100",
                                "COLUMNS=999",          "PS1=ferry# ", NULL};
    if (init->run)
        execle("/bin/sh", "sh", "-c", init->run, (char *)NULL, env);
    else
        execle("/bin/sh", "sh", "-i", (char *)NULL, env);
    say("ferry-guest: cannot run /bin/sh\n");
    _exit(127);
}

// how: RB_POWER_OFF, RB_AUTOBOOT or RB_HALT_SYSTEM. Does not return.
static void __attribute__((noreturn)) machine_end(int how)
{
    kill(-1, SIGTERM);
    sync();
    if (how == RB_POWER_OFF && access("/sys/firmware/acpi", F_OK)) {
        say("ferry-guest: no ACPI, so no power off: resetting\n");
        how = RB_AUTOBOOT;
    }
    reboot(how);
    for (;;)
        pause();
}

// Reaps every dead child. Returns true when `shell` was among them, with its exit status as a
// shell would give it.
static bool children_reap(pid_t shell, int *status)
{
    bool ended = false;
    int wait_status;
    pid_t pid;

    while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0) {
        if (pid != shell)
            continue;
        ended = true;
        *status = WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
    }
    return ended;
}

static void signal_handle(const struct init *init, pid_t shell)
{
    struct signalfd_siginfo info;
    char line[64];
    int status = 0;

    if (read(init->signals, &info, sizeof(info)) != (ssize_t)sizeof(info))
        return;
    switch (info.ssi_signo) {
    case SIGCHLD:
        if (!children_reap(shell, &status))
            return;
        snprintf(line, sizeof(line), "ferry-guest: exit %d\n", status);
        say(line);
        machine_end(RB_POWER_OFF);
    // What busybox's halt, poweroff and reboot send to process 1.
    case SIGUSR1:
        machine_end(RB_HALT_SYSTEM);
    case SIGUSR2:
        machine_end(RB_POWER_OFF);
    case SIGTERM:
        machine_end(RB_AUTOBOOT);
    }
}

static void __attribute__((noreturn)) events_serve(struct init *init, pid_t shell)
{
    struct pollfd polls[1 + BUTTONS_MAX] = {{.fd = init->signals, .events = POLLIN}};

    for (int i = 0; i < init->n_buttons; i++)
        polls[1 + i] = (struct pollfd) {.fd = init->buttons[i], .events = POLLIN};
    for (;;) {
        if (poll(polls, (nfds_t)(1 + init->n_buttons), -1) < 0)
            continue;
        if (polls[0].revents)
            signal_handle(init, shell);
        for (int i = 0; i < init->n_buttons; i++) {
            if (polls[1 + i].revents && button_pressed(init->buttons[i])) {
                say("ferry-guest: power button\n");
                machine_end(RB_POWER_OFF);
            }
        }
    }
}

int init_main(int argc, char **argv)
{
    static struct init init;

    (void)argc, (void)argv;
    say("ferry-guest: userspace\n");
    if (getpid() != 1) {
        say("init: only as process 1\n");
        return 2;
    }

    sigset_t handled;
    sigemptyset(&handled);
    sigaddset(&handled, SIGCHLD);
    sigaddset(&handled, SIGUSR1);
    sigaddset(&handled, SIGUSR2);
    sigaddset(&handled, SIGTERM);
    sigprocmask(SIG_BLOCK, &handled, &init.old_mask);
    init.signals = signalfd(-1, &handled, SFD_CLOEXEC);

    mounts_make();
    if (file_read("/proc/cmdline", init.cmdline, sizeof(init.cmdline)) > 0) {
        tools_mount(init.cmdline);
        init.run = cmdline_value(init.cmdline, "ferry.run");
    }
    console_find(&init);
    pid_t shell = shell_start(&init);
    if (shell < 0) {
        say("ferry-guest: cannot fork\n");
        machine_end(RB_POWER_OFF);
    }
    buttons_open(&init);
    events_serve(&init, shell);
}
