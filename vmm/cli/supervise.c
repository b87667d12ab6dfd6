// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/supervise.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>

#include "migrate/checkpoint.h"
#include "migrate/checkpoint_dir.h"
#include "vmm/exit_status.h"
#include "vmm/util.h"

// --- the option

static int count_parse(json_t *body, const char *key, const char *value, struct error *err)
{
    char *end;
    errno = 0;
    unsigned long n = strtoul(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || errno || n > SUPERVISE_RESTARTS_MAX)
        return error_set(err, -EINVAL, "%s '%.40s': expected a number, 0 to %d", key, value,
                         SUPERVISE_RESTARTS_MAX);
    json_object_set_new(body, key, json_integer((json_int_t)n));
    return 0;
}

static int word_parse(json_t *body, char *word, struct error *err)
{
    static const char *const texts[] = {"mtbf", "interval"};
    static const char *const counts[] = {"keep", "hourly", "chain", "restarts"};
    if (!strcmp(word, "daly"))
        return json_object_set_new(body, word, json_true());
    char *value = strchr(word, '=');
    if (value)
        *value++ = 0;
    for (size_t i = 0; value && i < ARRAY_SIZE(texts); i++)
        if (!strcmp(word, texts[i])) {
            double seconds;
            json_object_set_new(body, word, json_string(value));
            return !duration_parse(value, &seconds)
                       ? 0
                       : error_set(err, -EINVAL, "%s '%.40s': expected a time, e.g. 10s, 24h", word,
                                   value);
        }
    for (size_t i = 0; value && i < ARRAY_SIZE(counts); i++)
        if (!strcmp(word, counts[i]))
            return count_parse(body, word, value, err);
    return error_set(err, -EINVAL,
                     "'%.40s': expected mtbf=, interval=, daly, keep=, hourly=, chain= or "
                     "restarts=",
                     word);
}

static int dir_take(json_t *body, const char *dir, struct error *err)
{
    autofree char *cwd = *dir == '/' ? NULL : getcwd(NULL, 0);
    char path[PATH_MAX];
    int len = snprintf(path, sizeof(path), "%s%s%s", cwd ? cwd : "", cwd ? "/" : "", dir);
    if (!*dir || len >= PATH_MAX)
        return error_set(err, -EINVAL, "'%.40s': a directory is needed first", dir);
    json_object_set_new(body, "dir", json_string(path));
    return 0;
}

int supervise_parse(const char *text, json_t **out, unsigned *restarts, struct error *err)
{
    autofree char *copy = strdup(text);
    json_t *body = json_object();
    char *rest = copy;
    int ret = copy ? dir_take(body, strsep(&rest, ","), err) : error_set(err, -ENOMEM, "no memory");
    for (char *word; !ret && (word = strsep(&rest, ","));)
        ret = word_parse(body, word, err);
    if (ret) {
        json_decref(body);
        return error_prefix(err, "--checkpoints");
    }
    json_t *limit = json_object_get(body, "restarts");
    *restarts = limit ? (unsigned)json_integer_value(limit) : SUPERVISE_RESTARTS;
    json_object_del(body, "restarts");
    *out = body;
    return 0;
}

// --- the parent

struct watch {
    const struct supervise *s;
    sigset_t signals, before;
    bool ending;       // it was told to end
    uint32_t first;    // checkpoints up to this one are of an earlier guest
    uint32_t newest;   // when the child was started
    unsigned in_a_row; // restarts without a new checkpoint
    struct termios terminal;
    bool has_terminal;
};

static uint32_t newest_number(const char *path)
{
    struct checkpoint_dir dir;
    uint32_t number = 0;
    if (checkpoint_dir_read(&dir, path, NULL))
        return 0;
    if (dir.nr)
        number = dir.files[dir.nr - 1].number;
    checkpoint_dir_free(&dir);
    return number;
}

static void say(const struct watch *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(const struct watch *w, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "ferry: %s: ", w->s->name);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
    va_end(args);
}

static void damaged(void *context, const char *name, const struct error *why)
{
    say(context, "%s is passed over: %s", name, why->text);
}

// The newest whole one of this guest, or "": it starts as at first.
static void choose(const struct watch *w, char path[PATH_MAX])
{
    struct checkpoint_dir dir;
    *path = 0;
    if (checkpoint_dir_read(&dir, w->s->dir, NULL))
        return;
    if (checkpoint_dir_newest(&dir, w->first, path, damaged, (void *)(uintptr_t)w, NULL))
        *path = 0;
    checkpoint_dir_free(&dir);
}

static int start(struct watch *w, const char *checkpoint, pid_t *pid, struct error *err)
{
    w->newest = newest_number(w->s->dir);
    *pid = fork();
    if (*pid < 0)
        return error_errno(err, "fork");
    if (*pid)
        return 0;
    sigprocmask(SIG_SETMASK, &w->before, NULL);
    exit(w->s->run(w->s->context, checkpoint && *checkpoint ? checkpoint : NULL));
}

// A terminal sends its signals to both of us; others are sent to us alone.
static void pass_on(struct watch *w, pid_t pid, const siginfo_t *info)
{
    w->ending = true;
    if (pid && info->si_code != SI_KERNEL)
        kill(pid, info->si_signo);
}

static int wait_for(struct watch *w, pid_t pid)
{
    int status;
    while (waitpid(pid, &status, WNOHANG) != pid) {
        siginfo_t info;
        int number = sigwaitinfo(&w->signals, &info);
        if (number > 0 && number != SIGCHLD)
            pass_on(w, pid, &info);
    }
    if (w->has_terminal) // a child that was killed left it as it used it
        tcsetattr(STDIN_FILENO, TCSADRAIN, &w->terminal);
    return status;
}

// Whether it died, and might not the next time. A first start that fails will fail again.
static bool crashed(const struct watch *w, int status)
{
    if (WIFSIGNALED(status))
        return true;
    switch (WEXITSTATUS(status)) {
    case EXIT_GUEST_PANIC:
    case EXIT_GUEST_TRIPLE_FAULT:
        return true;
    case EXIT_FAILED:
        return newest_number(w->s->dir) > w->newest;
    default:
        return false;
    }
}

// Longer each time; a signal ends it.
static void hold_off(struct watch *w)
{
    unsigned shift = w->in_a_row < 6 ? w->in_a_row : 6;
    const struct timespec time = {w->in_a_row > 1 ? (1 << (shift - 2)) : 0, 0};
    siginfo_t info;
    if (time.tv_sec && sigtimedwait(&w->signals, &info, &time) > 0 && info.si_signo != SIGCHLD)
        pass_on(w, 0, &info);
}

static bool again(struct watch *w, int status, char path[PATH_MAX])
{
    struct error err;
    bool died = !w->ending && crashed(w, status);
    if (checkpoint_failure_note(w->s->dir, died ? "" : "stop", &err))
        say(w, "%s", err.text);
    if (!died)
        return false;
    w->in_a_row = newest_number(w->s->dir) > w->newest ? 1 : w->in_a_row + 1;
    if (w->in_a_row > w->s->restarts) {
        say(w, "died %u times without a new checkpoint: not started again", w->in_a_row);
        return false;
    }
    hold_off(w);
    choose(w, path);
    say(w, "%s%s: starts again %s%s",
        WIFSIGNALED(status) ? "killed by signal " : "failed with status ",
        WIFSIGNALED(status) ? strsignal(WTERMSIG(status))
                            : (char[4]) {(char)('0' + WEXITSTATUS(status) / 10),
                                         (char)('0' + WEXITSTATUS(status) % 10), 0},
        *path ? "from " : "as at first", path);
    return !w->ending;
}

int supervise(const struct supervise *s, int *status, struct error *err)
{
    struct watch w = {.s = s, .first = newest_number(s->dir)};
    char path[PATH_MAX] = "";
    pid_t pid;
    int ended = 0, ret;
    w.has_terminal = !tcgetattr(STDIN_FILENO, &w.terminal);
    sigemptyset(&w.signals);
    sigaddset(&w.signals, SIGTERM);
    sigaddset(&w.signals, SIGINT);
    sigaddset(&w.signals, SIGHUP);
    sigaddset(&w.signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &w.signals, &w.before);
    ret = checkpoint_failure_note(s->dir, "start", err);
    if (ret)
        return ret;
    do {
        ret = start(&w, path, &pid, err);
        if (!ret)
            ended = wait_for(&w, pid);
    } while (!ret && again(&w, ended, path));
    *status = WIFSIGNALED(ended) ? 128 + WTERMSIG(ended) : WEXITSTATUS(ended);
    return ret;
}

int supervise_vm(const char *option, const char *name,
                 int (*run)(void *context, const char *checkpoint), void *context, int *status,
                 struct error *err)
{
    json_t *body;
    struct supervise s = {.name = name, .run = run, .context = context};
    int ret = supervise_parse(option, &body, &s.restarts, err);
    if (ret)
        return ret;
    s.dir = json_string_value(json_object_get(body, "dir"));
    ret = s.restarts ? supervise(&s, status, err) : 0;
    if (!s.restarts)
        *status = run(context, NULL);
    json_decref(body);
    return ret;
}
