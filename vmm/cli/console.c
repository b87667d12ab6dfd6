// SPDX-License-Identifier: Apache-2.0
// ferry console: the terminal at hand becomes a VM's console, where that is a pty or a socket.
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "devices/console.h"
#include "devices/terminal.h"
#include "vmm/cli/cli.h"
#include "vmm/control.h"
#include "vmm/util.h"

struct attached {
    const char *name;
    char socket[108]; // of the API
    int fd;           // the console
    bool tty;         // our input is a person's
    bool json;        // only say where it is
    struct console_escape escape;
    bool done;
};

static int socket_connect(const char *path, struct error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr.sun_path))
        return error_set(err, -ENAMETOOLONG, "console %s: path too long", path);
    strcpy(addr.sun_path, path);
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&addr, sizeof(addr)))
        return error_errno(err, "console %s", path);
    return take_fd(&fd);
}

static int not_attachable(const struct attached *a, const char *console, struct error *err)
{
    return error_set(err, -EINVAL,
                     "VM %s: its console is %s; one that can be attached is made by --console pty "
                     "or --console unix:PATH",
                     a->name, console);
}

// `console` is a path as the VM's process sees it, or no path at all.
static int console_open_at(const struct attached *a, const char *console, long long pid,
                           struct error *err)
{
    struct stat st;
    char path[512];
    if (*console == '/')
        snprintf(path, sizeof(path), "%s", console);
    else
        snprintf(path, sizeof(path), "/proc/%lld/cwd/%s", pid, console);
    bool there = !stat(path, &st);
    if (there && S_ISSOCK(st.st_mode))
        return socket_connect(path, err);
    if (!there || !S_ISCHR(st.st_mode))
        return not_attachable(a, console, err);
    int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    return fd < 0 ? error_errno(err, "console %s", path) : fd;
}

static int console_find(struct attached *a, struct error *err)
{
    json_t *info = NULL;
    int ret = control_path(a->name, a->socket, sizeof(a->socket), err);
    if (!ret)
        ret = control_call(a->socket, "GET", "/info", NULL, &info, NULL, NULL, err);
    if (ret)
        return ret;
    const char *console = json_string_value(json_object_get(info, "console"));
    a->fd = console
                ? console_open_at(a, console,
                                  (long long)json_integer_value(json_object_get(info, "pid")), err)
                : not_attachable(a, "with the process that runs it", err);
    if (a->fd >= 0 && a->json) {
        json_t *where = json_pack("{s:s, s:s}", "name", a->name, "console", console);
        json_dumpf(where, stdout, JSON_INDENT(2));
        printf("\n");
        json_decref(where);
    }
    json_decref(info);
    return a->fd < 0 ? a->fd : 0;
}

static void commands_run(struct attached *a, unsigned commands)
{
    struct error err;
    if (commands & CONSOLE_HELP)
        fprintf(stderr, "\r\nferry: escape key, then q: leave the console, p: power button\r\n");
    if (commands & CONSOLE_POWER) {
        json_t *body = json_pack("{s:b}", "powerbutton", 1);
        if (control_call(a->socket, "PUT", "/stop", body, NULL, NULL, NULL, &err))
            fprintf(stderr, "\r\nferry: %s\r\n", err.text);
        json_decref(body);
    }
    a->done |= (commands & CONSOLE_QUIT) != 0;
}

// False: the input has ended.
static bool input_pass(struct attached *a)
{
    uint8_t bytes[4096];
    unsigned commands = 0;
    ssize_t n = read(STDIN_FILENO, bytes, sizeof(bytes));
    if (n <= 0)
        return n < 0 && errno == EINTR;
    size_t len = (size_t)n;
    if (a->tty)
        len = console_escape_filter(&a->escape, bytes, len, &commands);
    if (len && write_all(a->fd, bytes, len))
        a->done = true; // the VM has ended
    commands_run(a, commands);
    return true;
}

static void output_pass(struct attached *a)
{
    uint8_t bytes[4096];
    ssize_t n = read(a->fd, bytes, sizeof(bytes));
    if (n < 0 && errno == EINTR)
        return;
    a->done |= n <= 0 || write_all(STDOUT_FILENO, bytes, (size_t)n);
}

static void attached_run(struct attached *a)
{
    struct pollfd fds[] = {{.fd = a->fd, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
    while (!a->done) {
        if (poll(fds, ARRAY_SIZE(fds), -1) < 0 && errno != EINTR)
            return;
        if (fds[0].revents)
            output_pass(a);
        if (fds[1].revents && !input_pass(a)) {
            fds[1].fd = -1; // output goes on
            a->done |= a->tty;
        }
    }
}

static int options_take(int argc, char **argv, struct attached *a, struct error *err)
{
    static const char usage[] =
        "ferry console NAME [--escape KEY] [--json]\n\n"
        "Attaches this terminal to the console of a VM that was started with the console pty or\n"
        "unix:PATH, until the VM ends or the escape key (Ctrl-] unless KEY says another), then q. "
        "Then\n"
        "p presses the power button instead. Input that is no terminal is passed on as it is.\n"
        "  -j, --json     only say where the console is\n"
        "example: ferry console web";
    static const struct option longs[] = {{"escape", required_argument, NULL, 'e'},
                                          {"json", no_argument, NULL, 'j'},
                                          {"help", no_argument, NULL, 'h'},
                                          {0}};
    char text[64] = "stdio";
    struct console_config config;
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, ":e:jh", longs, NULL)) != -1) {
        if (c == 'h') {
            printf("usage: %s\n", usage);
            return 1;
        }
        if (c == 'j') {
            a->json = true;
            continue;
        }
        if (c != 'e')
            return error_set(err, -EINVAL, "unknown option '%s'; usage: %.*s", argv[optind - 1],
                             (int)strcspn(usage, "\n"), usage);
        snprintf(text, sizeof(text), "stdio,escape=%s", optarg);
    }
    if (argc - optind != 1)
        return error_set(err, -EINVAL, "%d arguments, expected 1; usage: %.*s", argc - optind,
                         (int)strcspn(usage, "\n"), usage);
    int ret = console_parse(text, &config, err);
    if (ret)
        return ret;
    a->name = argv[optind];
    a->escape.key = config.escape;
    return 0;
}

int cli_console(int argc, char **argv)
{
    struct attached a = {.fd = -1};
    struct terminal *terminal = NULL;
    struct error err;
    int ret = options_take(argc, argv, &a, &err);
    if (!ret)
        ret = console_find(&a, &err);
    if (!ret && a.json) {
        close(a.fd);
        return EXIT_OK;
    }
    a.tty = isatty(STDIN_FILENO);
    if (!ret && a.tty)
        ret = terminal_raw(STDIN_FILENO, &terminal, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    signal(SIGPIPE, SIG_IGN);
    attached_run(&a);
    terminal_restore(terminal);
    close(a.fd);
    return EXIT_OK;
}
