// SPDX-License-Identifier: Apache-2.0
// The host sides of a console: pipes, files, terminals, sockets; blocked, late and vanishing
// readers.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "devices/console.h"
#include "devices/terminal.h"
#include "vmm/util.h"

// --- a client that keeps what it reads and counts calls

struct rig {
    struct loop *loop;
    struct console *console;
    char dir[64];
    bool refuse; // leaves input in the console
    unsigned writable;
    char input[16384];
    size_t input_len;
    unsigned commands[8], nr_commands;
    char opened[16]; // '+' and '-'
    unsigned resized;
    struct console_config extra; // strict, patience_ms and sized of the next rig_open
};

static void on_readable(void *arg)
{
    struct rig *rig = arg;
    if (!rig->refuse)
        rig->input_len += console_read(rig->console, rig->input + rig->input_len,
                                       sizeof(rig->input) - rig->input_len);
}

static void on_writable(void *arg)
{
    ((struct rig *)arg)->writable++;
}

static void on_opened(void *arg, bool open)
{
    struct rig *rig = arg;
    ck_assert(console_connected(rig->console) == open);
    strcat(rig->opened, open ? "+" : "-");
}

static void on_resized(void *arg)
{
    ((struct rig *)arg)->resized++;
}

static void on_command(void *arg, enum console_command command)
{
    struct rig *rig = arg;
    ck_assert_uint_lt(rig->nr_commands, ARRAY_SIZE(rig->commands));
    rig->commands[rig->nr_commands++] = command;
}

static const struct console_client client = {on_readable, on_writable, on_opened, on_resized};

static struct rig *rig_new(void)
{
    struct rig *rig = calloc(1, sizeof(*rig));
    struct error err = {0};
    ck_assert_msg(!loop_create(&rig->loop, &err), "%s", err.text);
    strcpy(rig->dir, "/tmp/ferry-console-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(rig->dir));
    return rig;
}

static void rig_open(struct rig *rig, const char *text)
{
    struct error err = {0};
    struct console_config config;
    ck_assert_msg(!console_parse(text, &config, &err), "%s", err.text);
    config.strict = rig->extra.strict;
    config.patience_ms = rig->extra.patience_ms;
    config.sized = rig->extra.sized;
    ck_assert_msg(!console_open(&rig->console, &config, rig->loop, &err), "%s", err.text);
    console_attach(rig->console, &client, rig);
    console_on_command(rig->console, on_command, rig);
}

static void rig_free(struct rig *rig)
{
    loop_destroy(rig->loop);
    console_close(rig->console);
    ck_assert_msg(!rmdir(rig->dir), "something is left in %s", rig->dir);
    free(rig);
}

static void stop_loop(void *arg)
{
    loop_stop(arg);
}

static void turn(struct rig *rig)
{
    for (int i = 0; i < 4; i++) {
        struct loop_call call = {.fn = stop_loop, .arg = rig->loop};
        loop_call(rig->loop, &call);
        ck_assert(!loop_run(rig->loop, NULL));
    }
}

// Runs the loop until `n` bytes of input have come.
static void await_input(struct rig *rig, const char *text)
{
    while (rig->input_len < strlen(text))
        ck_assert(!loop_turn(rig->loop, true, NULL));
    ck_assert_uint_eq(rig->input_len, strlen(text));
    ck_assert_mem_eq(rig->input, text, rig->input_len);
    rig->input_len = 0;
}

static void put(struct rig *rig, const char *text)
{
    ck_assert_uint_eq(console_write(rig->console, text, strlen(text)), strlen(text));
}

static void send_all(int fd, const char *text)
{
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
}

// Runs the loop until there is something to read.
static void await_output(struct rig *rig, int fd)
{
    struct pollfd p = {fd, POLLIN, 0};
    while (poll(&p, 1, 1) == 0)
        turn(rig);
}

// Waits for exactly this text on a blocking fd.
static void expect(int fd, const char *text)
{
    char buf[512];
    size_t len = strlen(text);
    ck_assert(!read_all(fd, buf, len));
    ck_assert_mem_eq(buf, text, len);
}

static void expect_nothing(int fd)
{
    struct pollfd p = {fd, POLLIN, 0};
    ck_assert_int_eq(poll(&p, 1, 0), 0);
}

// Runs `fn` with fds in place of stdin and stdout.
static void with_stdio(struct rig *rig, int in, int out, const char *text)
{
    int saved_in = dup(0), saved_out = dup(1);
    fflush(stdout);
    dup2(in, 0);
    dup2(out, 1);
    rig_open(rig, text);
    dup2(saved_in, 0);
    dup2(saved_out, 1);
    close(saved_in);
    close(saved_out);
}

// --- the --console word

START_TEST(parse_good)
{
    struct console_config c;
    ck_assert(!console_parse("stdio", &c, NULL));
    ck_assert(c.kind == CONSOLE_STDIO && c.escape == 0x1d);
    ck_assert(!console_parse("stdio,escape=^A", &c, NULL));
    ck_assert_int_eq(c.escape, 1);
    ck_assert(!console_parse("stdio,escape=^a", &c, NULL));
    ck_assert_int_eq(c.escape, 1);
    ck_assert(!console_parse("stdio,escape=~", &c, NULL));
    ck_assert_int_eq(c.escape, '~');
    ck_assert(!console_parse("stdio,escape=none", &c, NULL));
    ck_assert_int_eq(c.escape, -1);
    ck_assert(!console_parse("file:/tmp/a,b", &c, NULL));
    ck_assert(c.kind == CONSOLE_FILE && !c.append);
    ck_assert_str_eq(c.path, "/tmp/a,b");
    ck_assert(!console_parse("file:/tmp/a,append", &c, NULL));
    ck_assert(c.append);
    ck_assert_str_eq(c.path, "/tmp/a");
    ck_assert(!console_parse("pty", &c, NULL));
    ck_assert(c.kind == CONSOLE_PTY && !c.path[0]);
    ck_assert(!console_parse("pty,link=/tmp/x,y", &c, NULL));
    ck_assert_str_eq(c.path, "/tmp/x,y");
    ck_assert(!console_parse("unix:a,b", &c, NULL));
    ck_assert(c.kind == CONSOLE_UNIX);
    ck_assert_str_eq(c.path, "a,b");
    ck_assert(!console_parse("fd:17", &c, NULL));
    ck_assert(c.kind == CONSOLE_FD && c.fd == 17);
    ck_assert(!console_parse("null", &c, NULL));
    ck_assert(c.kind == CONSOLE_NULL);
}
END_TEST

START_TEST(parse_bad)
{
    static const char *const bad[] = {
        "",
        "stdi",
        "stdiox",
        "null:",
        "pty:x",
        "stdio,",
        "stdio,x=1",
        "fd:",
        "fd:x",
        "fd:-1",
        "fd:3,append",
        "fd:3 ",
        "file:",
        "file:,append",
        "unix:",
        "tcp:1",
        ",",
        "stdio,escape=",
        "pty,",
        "pty,link=",
        "null,append",
        "fd:99999999999999999999",
        "stdio,escape=ab",
        "stdio,escape=^1",
        "pty,append",
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct console_config c;
        struct error err = {0};
        ck_assert_msg(console_parse(bad[i], &c, &err) == -EINVAL, "'%s' was taken", bad[i]);
        ck_assert_msg(strlen(err.text) > 10, "'%s': no message", bad[i]);
    }
    char longer[CONSOLE_PATH_MAX + 16] = "file:";
    memset(longer + 5, 'x', CONSOLE_PATH_MAX);
    struct console_config c;
    ck_assert_int_eq(console_parse(longer, &c, NULL), -EINVAL);
}
END_TEST

START_TEST(open_errors)
{
    static const char *const bad[] = {
        "file:/nonexistent/dir/x",
        "unix:/nonexistent/dir/x",
        "fd:1000000",
        "pty,link=/nonexistent/dir/x",
        "file:/",
        "unix:/tmp/" // and a name longer than a socket address
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
        "xxxxxxxx"
        "xxxxxxxxxxxxx",
    };
    struct rig *rig = rig_new();
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct console_config c;
        struct error err = {0};
        ck_assert(!console_parse(bad[i], &c, &err));
        int before = dup(0);
        close(before);
        ck_assert_msg(console_open(&rig->console, &c, rig->loop, &err) < 0, "%s", bad[i]);
        ck_assert(err.code < 0 && strlen(err.text) > 10);
        rig->console = NULL;
        int after = dup(0);
        close(after);
        ck_assert_msg(before == after, "%s leaks an fd", bad[i]);
    }
    rig_free(rig);
}
END_TEST

// --- escape keys

static void filter(struct console_escape *e, const char *in, const char *out, unsigned commands)
{
    uint8_t data[64];
    unsigned got = 0;
    memcpy(data, in, strlen(in));
    size_t n = console_escape_filter(e, data, strlen(in), &got);
    ck_assert_uint_eq(n, strlen(out));
    ck_assert_mem_eq(data, out, n);
    ck_assert_uint_eq(got, commands);
}

START_TEST(escape_filter)
{
    struct console_escape e = {.key = 0x1d};
    filter(&e, "plain", "plain", 0);
    filter(&e, "a\x1dqb", "ab", CONSOLE_QUIT);
    filter(&e, "a\x1d.b", "ab", CONSOLE_QUIT);
    filter(&e, "\x1d\x1d", "\x1d", 0);
    filter(&e, "\x1d\x1dq", "\x1dq", 0);
    filter(&e, "\x1dp\x1d?", "", CONSOLE_POWER | CONSOLE_HELP);
    filter(&e, "\x1dz", "", CONSOLE_HELP); // an unknown key explains itself
    filter(&e, "x\x1d", "x", 0);           // split between two reads
    filter(&e, "qy", "y", CONSOLE_QUIT);
    struct console_escape none = {.key = -1};
    filter(&none, "\x1dq\xff", "\x1dq\xff", 0);
}
END_TEST

// --- pipes and files

START_TEST(stdio_pipes)
{
    struct rig *rig = rig_new();
    int in[2], out[2];
    ck_assert(!pipe(in) && !pipe(out));
    with_stdio(rig, in[0], out[1], "stdio");
    // The standard streams may be shared: they stay as they were.
    ck_assert(!(fcntl(in[0], F_GETFL) & O_NONBLOCK) && !(fcntl(out[1], F_GETFL) & O_NONBLOCK));
    close(in[0]);
    close(out[1]);
    send_all(in[1], "hello\x1dq"); // no terminal: no escape key
    await_input(rig, "hello\x1dq");
    put(rig, "output");
    expect(out[0], "output");
    close(in[1]); // the end of input is no error
    turn(rig);
    put(rig, "more");
    expect(out[0], "more");
    ck_assert_uint_eq(rig->nr_commands, 0);
    close(out[0]); // the end of the reader: discarded, counted, no signal
    put(rig, "lost");
    put(rig, "too");
    ck_assert_uint_eq(console_lost(rig->console), 7);
    rig_free(rig);
}
END_TEST

START_TEST(stdio_files)
{
    struct rig *rig = rig_new();
    FILE *in = tmpfile(), *out = tmpfile();
    for (int i = 0; i < 1000; i++)
        fprintf(in, "line %03d\n", i);
    fflush(in);
    rewind(in);
    rig->refuse = true;
    with_stdio(rig, fileno(in), fileno(out), "stdio");
    put(rig, "kept");
    turn(rig);
    // More than is read ahead: the rest follows as it is taken.
    size_t got = 0;
    char buf[1000], expected[32];
    while (got < 9000) {
        size_t n = console_read(rig->console, buf, sizeof(buf));
        ck_assert_uint_gt(n, 0);
        for (size_t i = 0; i < n; i++, got++) {
            snprintf(expected, sizeof(expected), "line %03zu\n", got / 9);
            ck_assert_int_eq(buf[i], expected[got % 9]);
        }
        turn(rig);
    }
    ck_assert_uint_eq(console_read(rig->console, buf, 1), 0);
    rewind(out);
    ck_assert_str_eq(fgets(buf, sizeof(buf), out), "kept");
    fclose(in);
    fclose(out);
    rig_free(rig);
}
END_TEST

START_TEST(stdio_closed)
{
    struct rig *rig = rig_new();
    int saved_in = dup(0), saved_out = dup(1);
    fflush(stdout);
    close(0);
    close(1);
    rig_open(rig, "stdio");
    put(rig, "nowhere");
    turn(rig);
    dup2(saved_in, 0);
    dup2(saved_out, 1);
    close(saved_in);
    close(saved_out);
    rig_free(rig);
}
END_TEST

START_TEST(output_blocked_pipe)
{
    struct rig *rig = rig_new();
    int pipe_fd[2];
    ck_assert(!pipe(pipe_fd));
    char word[32];
    snprintf(word, sizeof(word), "fd:%d", pipe_fd[1]);
    rig_open(rig, word);
    uint32_t sent = 0, got = 0;
    for (int round = 0; round < 3; round++) {
        unsigned before = rig->writable;
        while (console_write(rig->console, &sent, sizeof(sent)) == sizeof(sent))
            sent++;
        ck_assert_uint_gt(sent, 1000);
        turn(rig);
        ck_assert_uint_eq(rig->writable, before);
        ck_assert_uint_eq(console_write(rig->console, "x", 1), 0); // still full
        uint32_t value;
        for (; got < sent; got++) {
            ck_assert(!read_all(pipe_fd[0], &value, sizeof(value)));
            ck_assert_uint_eq(value, got);
        }
        while (rig->writable == before)
            ck_assert(!loop_turn(rig->loop, true, NULL));
    }
    ck_assert_uint_eq(console_lost(rig->console), 0);
    close(pipe_fd[0]);
    rig_free(rig);
}
END_TEST

static void file_is(const char *path, const char *text)
{
    char buf[64] = "";
    int fd = open(path, O_RDONLY);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(read(fd, buf, sizeof(buf)), (ssize_t)strlen(text));
    ck_assert_str_eq(buf, text);
    close(fd);
}

START_TEST(file_truncates_or_appends)
{
    static const struct {
        const char *option, *text;
    } runs[] = {{"", "one"}, {"", "one"}, {",append", "oneone"}};
    char path[128], word[160];
    for (unsigned i = 0; i < ARRAY_SIZE(runs); i++) {
        struct rig *rig = rig_new();
        if (!i)
            snprintf(path, sizeof(path), "%s.log", rig->dir);
        snprintf(word, sizeof(word), "file:%s%s", path, runs[i].option);
        rig_open(rig, word);
        put(rig, "one");
        turn(rig);
        rig_free(rig);
        file_is(path, runs[i].text);
    }
    unlink(path);
}
END_TEST

START_TEST(full_disk)
{
    struct rig *rig = rig_new();
    rig_open(rig, "file:/dev/full");
    put(rig, "discarded");
    put(rig, "!");
    ck_assert_uint_eq(console_lost(rig->console), 10);
    rig_free(rig);
}
END_TEST

// --- terminals

static int pty_new(char *name, size_t size)
{
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    ck_assert(master >= 0 && !grantpt(master) && !unlockpt(master));
    ck_assert(!ptsname_r(master, name, size));
    return master;
}

static bool is_raw(int fd)
{
    struct termios t;
    ck_assert(!tcgetattr(fd, &t));
    return !(t.c_lflag & (ICANON | ECHO | ISIG));
}

START_TEST(stdio_terminal)
{
    struct rig *rig = rig_new();
    char name[64];
    int master = pty_new(name, sizeof(name));
    int slave = open(name, O_RDWR | O_NOCTTY);
    ck_assert(!is_raw(slave));
    with_stdio(rig, slave, slave, "stdio");
    ck_assert(is_raw(slave));
    send_all(master, "ls\r\x03");
    await_input(rig, "ls\r\x03"); // Ctrl-C goes to the guest, no echo
    expect_nothing(master);
    put(rig, "a\n");
    expect(master, "a\r\n"); // output processing as the user has it
    send_all(master, "x\x1dp\x1dqy");
    await_input(rig, "xy");
    ck_assert_uint_eq(rig->nr_commands, 2);
    ck_assert_uint_eq(rig->commands[0], CONSOLE_POWER);
    ck_assert_uint_eq(rig->commands[1], CONSOLE_QUIT);
    send_all(master, "\x1d?");
    await_output(rig, master);
    expect(master, "\r\r\nCtrl-]"); // the terminal makes \r\n of \n
    rig_free(rig);
    ck_assert(!is_raw(slave));
    close(slave);
    close(master);
}
END_TEST

// Runs `how` in a child whose terminal is raw; says how the child ended.
static int child_status(int slave, void (*how)(void))
{
    fflush(NULL);
    pid_t pid = fork();
    if (!pid) {
        struct terminal *t;
        signal(SIGTERM, SIG_DFL);
        if (terminal_raw(slave, &t, NULL) || !is_raw(slave))
            _exit(99);
        how();
        _exit(98);
    }
    int status;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    return status;
}

static void end_exit(void)
{
    exit(0);
}

static void end_term(void)
{
    raise(SIGTERM);
}

static void end_abort(void)
{
    abort();
}

START_TEST(terminal_restored_however_it_ends)
{
    char name[64];
    int master = pty_new(name, sizeof(name));
    int slave = open(name, O_RDWR | O_NOCTTY);
    int status = child_status(slave, end_exit);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0 && !is_raw(slave));
    status = child_status(slave, end_term);
    ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM && !is_raw(slave));
    status = child_status(slave, end_abort);
    ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && !is_raw(slave));
    close(slave);
    close(master);
}
END_TEST

// A job with its own session and controlling terminal, stopped and continued.
static void job(int slave, int ready)
{
    struct terminal *t;
    close(slave);
    setsid();
    slave = open("/proc/self/fd/9", O_RDWR); // the terminal, now the controlling one
    // A grandchild in a process group that is not orphaned: only such a group can be stopped.
    pid_t pid = fork();
    if (!pid) {
        setpgid(0, 0);
        signal(SIGTTOU, SIG_IGN);
        tcsetpgrp(slave, getpid());
        if (terminal_raw(slave, &t, NULL))
            _exit(99);
        send_all(ready, "r");
        raise(SIGTSTP);
        if (!is_raw(slave))
            _exit(97);
        terminal_restore(t);
        _exit(is_raw(slave) ? 96 : 0);
    }
    int status;
    if (waitpid(pid, &status, WUNTRACED) != pid || !WIFSTOPPED(status) || is_raw(slave))
        _exit(1);
    kill(pid, SIGCONT);
    if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
        _exit(2);
    _exit(WEXITSTATUS(status));
}

START_TEST(terminal_stop_and_continue)
{
    char name[64];
    int master = pty_new(name, sizeof(name));
    int slave = open(name, O_RDWR | O_NOCTTY);
    int ready[2];
    ck_assert(!pipe(ready));
    fflush(NULL);
    pid_t pid = fork();
    if (!pid) {
        dup2(slave, 9);
        job(slave, ready[1]);
    }
    expect(ready[0], "r");
    int status;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status) && !WEXITSTATUS(status), "status %#x", status);
    close(slave);
    close(master);
    close(ready[0]);
    close(ready[1]);
}
END_TEST

START_TEST(pty_late_and_leaving_reader)
{
    struct rig *rig = rig_new();
    char word[128], link[96];
    snprintf(link, sizeof(link), "%s/link", rig->dir);
    snprintf(word, sizeof(word), "pty,link=%s", link);
    ck_assert(!symlink("/stale", link)); // of an earlier run
    rig_open(rig, word);
    put(rig, "early ");
    turn(rig);
    for (int visit = 0; visit < 3; visit++) {
        int reader = open(link, O_RDWR | O_NOCTTY);
        ck_assert_int_ge(reader, 0);
        ck_assert(is_raw(reader));
        await_output(rig, reader);
        expect(reader, visit ? "between" : "early ");
        put(rig, "live");
        expect(reader, "live");
        send_all(reader, "typed");
        await_input(rig, "typed");
        unsigned before = rig->writable;
        close(reader);
        while (rig->writable == before)
            ck_assert(!loop_turn(rig->loop, true, NULL));
        put(rig, "between");
    }
    ck_assert_uint_eq(console_lost(rig->console), 0);
    rig_free(rig);
}
END_TEST

// A pty nobody reads: first its own buffer, then the reader leaves; the writer is let go.
START_TEST(pty_blocked_reader_leaves)
{
    struct rig *rig = rig_new();
    rig_open(rig, "pty");
    int reader = open(console_path(rig->console), O_RDWR | O_NOCTTY);
    put(rig, "x");
    await_output(rig, reader);
    expect(reader, "x");
    while (console_write(rig->console, "0123456789", 10) == 10)
        continue;
    ck_assert_uint_eq(console_write(rig->console, "y", 1), 0);
    unsigned before = rig->writable;
    close(reader);
    while (rig->writable == before)
        ck_assert(!loop_turn(rig->loop, true, NULL));
    put(rig, "z");
    rig_free(rig);
}
END_TEST

// --- sockets

static int dial(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    strcpy(addr.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_msg(!connect(fd, (struct sockaddr *)&addr, sizeof(addr)), "%s", strerror(errno));
    return fd;
}

static struct rig *rig_socket(char path[96])
{
    struct rig *rig = rig_new();
    char word[128];
    snprintf(path, 96, "%s/sock", rig->dir);
    snprintf(word, sizeof(word), "unix:%s", path);
    rig_open(rig, word);
    return rig;
}

START_TEST(socket_one_client_at_a_time)
{
    char path[96];
    struct rig *rig = rig_socket(path);
    struct stat st;
    ck_assert(!stat(path, &st));
    ck_assert_uint_eq(st.st_mode & 0777, 0600);
    put(rig, "before ");
    for (int visit = 0; visit < 3; visit++) {
        int first = dial(path), second = dial(path);
        turn(rig);
        expect(first, "before ");
        expect(second, "ferry: this console has a client already\r\n");
        char c;
        ck_assert_int_eq(read(second, &c, 1), 0);
        close(second);
        put(rig, "now");
        expect(first, "now");
        send_all(first, "input");
        await_input(rig, "input");
        close(first);
        if (visit != 1) // once the write itself meets the end of the connection
            turn(rig);
        put(rig, "before "); // kept for the next one
    }
    rig_free(rig);
}
END_TEST

START_TEST(socket_backlog_is_bounded)
{
    char path[96];
    struct rig *rig = rig_socket(path);
    const uint32_t total = CONSOLE_BACKLOG / 4 + 1000;
    for (uint32_t i = 0; i < total; i++)
        ck_assert_uint_eq(console_write(rig->console, &i, 4), 4);
    ck_assert_uint_eq(console_lost(rig->console), 4000);
    int fd = dial(path);
    turn(rig);
    expect(fd, "\r\n[ferry: 4000 earlier bytes dropped]\r\n");
    for (uint32_t i = 1000, value; i < total; i++) {
        ck_assert(!read_all(fd, &value, 4));
        ck_assert_uint_eq(value, i);
    }
    expect_nothing(fd);
    close(fd);
    rig_free(rig);
}
END_TEST

// A client that does not read, then goes away: what it was not sent waits for the next one.
START_TEST(socket_blocked_client_leaves)
{
    char path[96];
    struct rig *rig = rig_socket(path);
    int fd = dial(path);
    turn(rig);
    uint64_t sent = 0;
    while (console_write(rig->console, "0123456789abcdef", 16) == 16)
        sent += 16;
    ck_assert_uint_gt(sent, 4096);
    turn(rig);
    unsigned before = rig->writable;
    close(fd);
    while (rig->writable == before)
        ck_assert(!loop_turn(rig->loop, true, NULL));
    put(rig, "for the next");
    fd = dial(path);
    turn(rig);
    expect(fd, "for the next");
    close(fd);
    rig_free(rig);
}
END_TEST

START_TEST(socket_stale_and_live)
{
    char path[96];
    struct rig *rig = rig_socket(path);
    struct error err = {0};
    struct console_config config = {.kind = CONSOLE_UNIX};
    struct console *other;
    strcpy(config.path, path);
    ck_assert_int_eq(console_open(&other, &config, rig->loop, &err), -EADDRINUSE);
    ck_assert(!access(path, F_OK)); // still the first one's
    rig_free(rig);

    rig = rig_new();
    char word[128];
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/sock", rig->dir);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert(!bind(fd, (struct sockaddr *)&addr, sizeof(addr)) && !listen(fd, 1));
    close(fd); // killed: the name is left behind
    snprintf(word, sizeof(word), "unix:%s", addr.sun_path);
    rig_open(rig, word);
    rig_free(rig);
}
END_TEST

// --- what virtio ports ask for

START_TEST(strict_takes_nothing_for_nobody)
{
    char path[96], word[128];
    struct rig *rig = rig_new();
    rig->extra.strict = true;
    snprintf(path, sizeof(path), "%s/sock", rig->dir);
    snprintf(word, sizeof(word), "unix:%s", path);
    rig_open(rig, word);
    ck_assert_uint_eq(console_write(rig->console, "x", 1), 0);
    int fd = dial(path);
    turn(rig);
    ck_assert_str_eq(rig->opened, "+");
    put(rig, "now");
    expect(fd, "now");
    close(fd);
    turn(rig);
    ck_assert_str_eq(rig->opened, "+-");
    ck_assert_uint_eq(console_write(rig->console, "x", 1), 0);
    ck_assert_uint_eq(console_lost(rig->console), 0);
    rig_free(rig);
}
END_TEST

// What is held outside is there for somebody else, even after this console has gone.
START_TEST(held_input_stays_outside)
{
    struct rig *rig = rig_new();
    int fd[2];
    char word[32], left[8];
    ck_assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, fd));
    int other = dup(fd[1]);
    snprintf(word, sizeof(word), "fd:%d", fd[1]);
    rig_open(rig, word);
    send_all(fd[0], "taken");
    await_input(rig, "taken");
    console_hold(rig->console, true);
    send_all(fd[0], "held");
    turn(rig);
    ck_assert_uint_eq(rig->input_len + console_pending(rig->console), 0);
    console_hold(rig->console, false);
    await_input(rig, "held");
    console_hold(rig->console, true);
    send_all(fd[0], "left");
    turn(rig);
    rig_free(rig);
    ck_assert_int_eq(read(other, left, sizeof(left)), 4);
    ck_assert_mem_eq(left, "left", 4);
    close(other);
    close(fd[0]);
}
END_TEST

// A reader that stops is given up after its time, one that only is slow is not.
START_TEST(patience)
{
    struct rig *rig = rig_new();
    int fd[2];
    char word[32], data[4096];
    ck_assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, fd));
    snprintf(word, sizeof(word), "fd:%d", fd[1]);
    rig->extra.patience_ms = 50;
    rig_open(rig, word);
    memset(data, 'p', sizeof(data));
    for (unsigned slow = 0; slow < 4; slow++) { // too little for POLLOUT
        while (console_write(rig->console, data, sizeof(data)) == sizeof(data))
            continue;
        ck_assert(!read_all(fd[0], data, sizeof(data)));
        unsigned before = rig->writable;
        while (rig->writable == before)
            ck_assert(!loop_turn(rig->loop, true, NULL));
    }
    ck_assert_uint_eq(console_lost(rig->console), 0);
    size_t n = 0;
    while (n < 2 * CONSOLE_BACKLOG) { // until it is taken for nobody
        size_t taken = console_write(rig->console, data, sizeof(data));
        n = taken < sizeof(data) ? 0 : n + taken;
        unsigned before = rig->writable;
        while (taken < sizeof(data) && rig->writable == before)
            ck_assert(!loop_turn(rig->loop, true, NULL));
    }
    ck_assert_uint_gt(console_lost(rig->console), 0);
    rig_free(rig);
    close(fd[0]);
}
END_TEST

// Let go while the loop lives: everything is given back, without the loop's end.
START_TEST(released_under_a_living_loop)
{
    static const char *const words[] = {"null", "pty", "unix:%s/sock", "file:/dev/null", "fd:%d"};
    struct rig *rig = rig_new();
    for (unsigned visit = 0; visit < 3; visit++) {
        for (unsigned i = 0; i < ARRAY_SIZE(words); i++) {
            char word[128];
            int fd[2], visitor = -1, before = dup(0);
            close(before);
            ck_assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, fd));
            if (i == 2)
                snprintf(word, sizeof(word), words[i], rig->dir);
            else
                snprintf(word, sizeof(word), words[i], fd[1]);
            if (i != 4)
                close(fd[1]);
            rig->extra.patience_ms = visit ? 1000 : 0;
            rig_open(rig, word);
            if (visit)
                turn(rig);
            if (visit && i == 2)
                visitor = dial(word + 5);
            if (visit && i == 1)
                visitor = open(console_path(rig->console), O_RDWR | O_NOCTTY);
            if (visit > 1)
                turn(rig);
            console_release(rig->console);
            turn(rig);
            close(fd[0]);
            if (visitor >= 0)
                close(visitor);
            int after = dup(0);
            close(after);
            ck_assert_msg(before == after, "%s leaks an fd", word);
        }
    }
    rig->console = NULL;
    rig_free(rig);
}
END_TEST

// --- threads

struct writer {
    struct rig *rig;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned writable;
    unsigned sent;
};

enum { WRITER_TOTAL = 300000 };

static void writer_writable(void *arg)
{
    struct writer *w = arg;
    pthread_mutex_lock(&w->lock);
    w->writable++;
    pthread_cond_signal(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

static void writer_readable(void *arg)
{
}

static void *writer_main(void *arg)
{
    struct writer *w = arg;
    while (w->sent < WRITER_TOTAL) {
        uint32_t value = w->sent;
        pthread_mutex_lock(&w->lock);
        unsigned seen = w->writable;
        pthread_mutex_unlock(&w->lock);
        size_t n = console_write(w->rig->console, &value, 4);
        ck_assert(n == 0 || n == 4); // a pipe takes words of a page whole
        w->sent += n == 4;
        pthread_mutex_lock(&w->lock);
        while (!n && w->writable == seen)
            pthread_cond_wait(&w->changed, &w->lock);
        pthread_mutex_unlock(&w->lock);
    }
    return NULL;
}

static void *loop_main(void *arg)
{
    ck_assert(!loop_run(arg, NULL));
    return NULL;
}

// A vCPU thread writes, the loop's thread finishes, a slow reader reads: nothing lost, nothing
// twice, and no wake-up missed.
START_TEST(threads)
{
    struct rig *rig = rig_new();
    int pipe_fd[2];
    ck_assert(!pipe(pipe_fd));
    char word[32];
    snprintf(word, sizeof(word), "fd:%d", pipe_fd[1]);
    rig_open(rig, word);
    struct writer w = {
        .rig = rig, .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    static const struct console_client writer_client = {writer_readable, writer_writable};
    console_attach(rig->console, &writer_client, &w);
    pthread_t writer, looper;
    ck_assert(!pthread_create(&looper, NULL, loop_main, rig->loop));
    ck_assert(!pthread_create(&writer, NULL, writer_main, &w));
    for (uint32_t i = 0, value; i < WRITER_TOTAL; i++) {
        ck_assert(!read_all(pipe_fd[0], &value, 4));
        ck_assert_uint_eq(value, i);
    }
    pthread_join(writer, NULL);
    loop_stop(rig->loop);
    pthread_join(looper, NULL);
    close(pipe_fd[0]);
    rig_free(rig);
}
END_TEST

START_TEST(drain)
{
    struct rig *rig = rig_new();
    int pipe_fd[2];
    ck_assert(!pipe(pipe_fd));
    char word[32];
    snprintf(word, sizeof(word), "fd:%d", pipe_fd[1]);
    rig_open(rig, word);
    static char text[200000]; // more than a pipe holds
    memset(text, 'd', sizeof(text));
    fflush(NULL);
    pid_t pid = fork();
    if (!pid) {
        close(pipe_fd[1]);
        rig = NULL;
        _exit(read_all(pipe_fd[0], text, sizeof(text)) ? 1 : 0);
    }
    close(pipe_fd[0]);
    console_drain(rig->console, text, sizeof(text));
    int status;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_int_eq(status, 0);
    rig_free(rig);
}
END_TEST

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    Suite *suite = suite_create("console");
    TCase *tc = tcase_create("console");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, parse_good);
    tcase_add_test(tc, parse_bad);
    tcase_add_test(tc, open_errors);
    tcase_add_test(tc, escape_filter);
    tcase_add_test(tc, stdio_pipes);
    tcase_add_test(tc, stdio_files);
    tcase_add_test(tc, stdio_closed);
    tcase_add_test(tc, output_blocked_pipe);
    tcase_add_test(tc, file_truncates_or_appends);
    tcase_add_test(tc, full_disk);
    tcase_add_test(tc, stdio_terminal);
    tcase_add_test(tc, terminal_restored_however_it_ends);
    tcase_add_test(tc, terminal_stop_and_continue);
    tcase_add_test(tc, pty_late_and_leaving_reader);
    tcase_add_test(tc, pty_blocked_reader_leaves);
    tcase_add_test(tc, socket_one_client_at_a_time);
    tcase_add_test(tc, socket_backlog_is_bounded);
    tcase_add_test(tc, socket_blocked_client_leaves);
    tcase_add_test(tc, socket_stale_and_live);
    tcase_add_test(tc, strict_takes_nothing_for_nobody);
    tcase_add_test(tc, held_input_stays_outside);
    tcase_add_test(tc, patience);
    tcase_add_test(tc, released_under_a_living_loop);
    tcase_add_test(tc, threads);
    tcase_add_test(tc, drain);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
