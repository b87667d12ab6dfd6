// SPDX-License-Identifier: Apache-2.0
// Each filter in a child of its own: calls that are on its list work, any other ends the child.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/check_ok.h"
#include "vmm/seccomp.h"
#include "vmm/util.h"

enum {
    L = 1 << SECCOMP_LOOP,
    W = 1 << SECCOMP_WORKER,
    V = 1 << SECCOMP_VCPU,
    H = 1 << SECCOMP_HTTP,
    S = 1 << SECCOMP_SETUP,
};
enum { ALL = L | W | V | H };

// The loop's thread before there is a guest may all that it may later.
static bool of_kind(unsigned kinds, unsigned kind)
{
    return kinds & (kind == SECCOMP_SETUP ? L | S : 1u << kind);
}

// One call with arguments that do no harm.
struct attempt {
    const char *name;
    long nr, args[6];
    unsigned allowed; // kinds of thread that may make it
    unsigned refused; // kinds that get `refusal`
    int refusal;
};

static const struct attempt attempts[] = {
    {"write", SYS_write, {-1}, ALL},
    {"read", SYS_read, {-1}, ALL},
    {"futex", SYS_futex, {0, 1, 0}, ALL},
    {"mmap", SYS_mmap, {0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1}, ALL},
    {"mmap with PROT_EXEC",
     SYS_mmap,
     {0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1},
     0,
     L | W,
     EACCES},
    {"mprotect", SYS_mprotect, {0, 0, PROT_READ}, ALL},
    {"mprotect with PROT_EXEC", SYS_mprotect, {0, 0, PROT_READ | PROT_EXEC}, 0},
    {"KVM_RUN", SYS_ioctl, {-1, KVM_RUN}, L | W | V},
    {"KVM_RUN with a bit above 32",
     SYS_ioctl,
     {-1, KVM_RUN | 1l << 40},
     L | W | V}, // the kernel cuts it off
    {"KVM_GET_DIRTY_LOG", SYS_ioctl, {-1, KVM_GET_DIRTY_LOG}, L | W},
    {"KVM_RESET_DIRTY_RINGS", SYS_ioctl, {-1, KVM_RESET_DIRTY_RINGS}, L | W | V},
    {"KVM_CREATE_VM", SYS_ioctl, {-1, KVM_CREATE_VM}, S},
    {"KVM_CREATE_VCPU", SYS_ioctl, {-1, KVM_CREATE_VCPU}, S},
    {"TUNSETIFF", SYS_ioctl, {-1, TUNSETIFF}, L | W},
    {"TUNSETPERSIST", SYS_ioctl, {-1, TUNSETPERSIST}, 0},
    {"TIOCSTI", SYS_ioctl, {-1, 0x5412}, 0},
    {"an ioctl nobody knows", SYS_ioctl, {-1, 0x12345678}, 0},
    {"openat", SYS_openat, {-1, 0, 0}, L | W, V | H, EACCES},
    {"open", SYS_open, {0, 0}, 0},
    {"io_uring_enter", SYS_io_uring_enter, {-1}, L | W | V},
    {"io_uring_setup", SYS_io_uring_setup, {0, 0}, S},
    {"io_uring_register", SYS_io_uring_register, {-1}, S},
    {"epoll_wait", SYS_epoll_wait, {-1}, H},
    {"accept4", SYS_accept4, {-1}, L | W | H},
    {"socket AF_INET", SYS_socket, {AF_INET, -1}, L | W},
    {"socket AF_PACKET", SYS_socket, {AF_PACKET, -1}, 0},
    {"socket AF_ALG", SYS_socket, {AF_ALG, -1}, 0},
    {"clone as fork", SYS_clone, {SIGCHLD}, 0, L | W, EPERM},
    {"clone3", SYS_clone3, {0, 0}, 0, L | W, ENOSYS},
    {"fork", SYS_fork, {0}, 0},
    {"execve", SYS_execve, {0, 0, 0}, 0},
    {"execveat", SYS_execveat, {-1, 0, 0, 0, 0}, 0},
    {"ptrace", SYS_ptrace, {PTRACE_PEEKDATA, 0, 0, 0}, 0},
    {"process_vm_writev", SYS_process_vm_writev, {0, 0, 0, 0, 0, 0}, 0},
    {"kill with SIGTERM", SYS_kill, {0x7fffffff, SIGTERM}, 0},
    {"kill with SIGKILL", SYS_kill, {0x7fffffff, SIGKILL}, 0},
    {"tgkill of another process", SYS_tgkill, {1, 1, 0}, 0},
    {"setuid", SYS_setuid, {0}, 0},
    {"mount", SYS_mount, {0, 0, 0, 0, 0}, 0},
    {"unshare", SYS_unshare, {0}, 0},
    {"bpf", SYS_bpf, {-1, 0, 0}, 0},
    {"prctl PR_SET_DUMPABLE", SYS_prctl, {PR_SET_DUMPABLE, 0}, 0},
    {"a call of the x32 table", 0x40000000 | SYS_write, {-1}, 0},
    {"a call nobody knows", 9999, {0}, 0},
};

static const char *const kinds[] = {"loop", "worker", "vcpu", "http", "setup"};
enum { CHILD_ANSWERED = 1, CHILD_REFUSED = 2, CHILD_NO_FILTER = 3 };

static void child(const struct attempt *a, enum seccomp_thread first, enum seccomp_thread last)
{
    struct error err;
    for (unsigned kind = first; kind <= last; kind++)
        if (seccomp_enter((enum seccomp_thread)kind, SECCOMP_ON, &err))
            _exit(CHILD_NO_FILTER);
    errno = 0;
    long ret =
        syscall(a->nr, a->args[0], a->args[1], a->args[2], a->args[3], a->args[4], a->args[5]);
    _exit(ret < 0 && a->refusal && errno == a->refusal ? CHILD_REFUSED : CHILD_ANSWERED);
}

static int child_status(const struct attempt *a, enum seccomp_thread first,
                        enum seccomp_thread last)
{
    int status;
    pid_t pid = fork();
    if (!pid)
        child(a, first, last);
    ck_assert_int_gt(pid, 0);
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    return status;
}

static void attempt_check(const struct attempt *a, unsigned kind, int status)
{
    if (of_kind(a->allowed, kind))
        ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == CHILD_ANSWERED,
                      "%s: %s: status %#x, expected an answer", kinds[kind], a->name, status);
    else if (of_kind(a->refused, kind))
        ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == CHILD_REFUSED,
                      "%s: %s: status %#x, expected a refusal", kinds[kind], a->name, status);
    else
        ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS,
                      "%s: %s: status %#x, expected SIGSYS", kinds[kind], a->name, status);
}

START_TEST(strangers_end_the_process)
{
    for (unsigned kind = 0; kind < SECCOMP_THREADS; kind++)
        for (const struct attempt *a = attempts; a < attempts + ARRAY_SIZE(attempts); a++)
            attempt_check(a, kind,
                          child_status(a, (enum seccomp_thread)kind, (enum seccomp_thread)kind));
}
END_TEST

// A vCPU thread that a worker creates, which the loop created: it has the filters of all three.
START_TEST(filters_add_up)
{
    for (const struct attempt *a = attempts; a < attempts + ARRAY_SIZE(attempts); a++) {
        ck_assert_msg(!(a->allowed & V) || (a->allowed & W), "%s: a vCPU may, a worker may not",
                      a->name);
        ck_assert_msg(!(a->allowed & W) || (a->allowed & L), "%s: a worker may, the loop may not",
                      a->name);
        attempt_check(a, SECCOMP_VCPU, child_status(a, SECCOMP_LOOP, SECCOMP_VCPU));
    }
}
END_TEST

// What a program answers, by interpretation.
static bool answers(const struct sock_filter *code, unsigned nr, uint32_t call,
                    const uint64_t args[6], uint32_t *action)
{
    struct {
        uint32_t nr, arch;
        uint64_t ip, args[6];
    } data = {.nr = call, .arch = 0xc000003e};
    memcpy(data.args, args, sizeof(data.args));
    uint32_t acc = 0;
    for (unsigned pc = 0; pc < nr; pc++) {
        const struct sock_filter *i = &code[pc];
        if (i->code == (BPF_LD | BPF_W | BPF_ABS)) {
            memcpy(&acc, (const char *)&data + i->k, sizeof(acc));
        } else if (i->code == (BPF_JMP | BPF_JEQ | BPF_K)) {
            pc += acc == i->k ? i->jt : i->jf;
        } else if (i->code == (BPF_JMP | BPF_JSET | BPF_K)) {
            pc += acc & i->k ? i->jt : i->jf;
        } else {
            *action = i->k;
            return i->code == (BPF_RET | BPF_K);
        }
    }
    return false;
}

// The values that a program compares with.
static unsigned values_of(const struct sock_filter *code, unsigned nr, uint32_t *values)
{
    unsigned count = 0;
    for (unsigned pc = 0; pc < nr; pc++) {
        unsigned i = 0;
        while (i < count && values[i] != code[pc].k)
            i++;
        if (BPF_CLASS(code[pc].code) == BPF_JMP && i == count)
            values[count++] = code[pc].k;
    }
    return count;
}

// Whatever a narrower filter lets pass, the wider one must: every call, with every argument value
// that any program compares with.
START_TEST(narrower_is_within_wider)
{
    enum { KINDS = 4 };
    static const enum seccomp_thread each[KINDS] = {SECCOMP_VCPU, SECCOMP_WORKER, SECCOMP_LOOP,
                                                    SECCOMP_SETUP}; // the narrowest first
    static struct sock_filter code[KINDS][SECCOMP_PROGRAM_MAX];
    static uint32_t values[SECCOMP_PROGRAM_MAX];
    unsigned len[KINDS];
    for (unsigned i = 0; i < KINDS; i++)
        len[i] = seccomp_program(each[i], SECCOMP_ON, code[i]);
    unsigned passed = 0, nr_values = values_of(code[2], len[2], values);
    for (uint32_t call = 0; call < 512; call++)
        for (unsigned v = 0; v < nr_values; v++)
            for (unsigned arg = 0; arg < 4; arg++) {
                uint64_t args[6] = {0};
                bool may[KINDS];
                args[arg] = values[v];
                for (unsigned i = 0; i < KINDS; i++) {
                    uint32_t action;
                    HOLDS(answers(code[i], len[i], call, args, &action));
                    may[i] = action == 0x7fff0000;
                    if (i && may[i - 1] && !may[i])
                        ck_abort_msg("call %u: %s may, %s may not", call, kinds[each[i - 1]],
                                     kinds[each[i]]);
                }
                passed += may[0];
            }
    ck_assert_uint_gt(passed, 0);
}
END_TEST

START_TEST(modes)
{
    enum seccomp_mode mode;
    struct error err;
    ck_assert(!seccomp_mode_parse("on", &mode, &err) && mode == SECCOMP_ON);
    ck_assert(!seccomp_mode_parse("off", &mode, &err) && mode == SECCOMP_OFF);
    ck_assert(!seccomp_mode_parse("log", &mode, &err) && mode == SECCOMP_LOG);
    ck_assert_int_eq(seccomp_mode_parse("maybe", &mode, &err), -EINVAL);
    ck_assert_str_eq(err.text, "'maybe': expected on, off or log");
}
END_TEST

// Log mode: the call is made, and its answer is the kernel's.
START_TEST(log_lets_pass)
{
    int said[2], status;
    char text[256] = "";
    ck_assert(!pipe(said));
    pid_t pid = fork();
    if (!pid) {
        struct error err;
        dup2(said[1], STDERR_FILENO);
        if (seccomp_enter(SECCOMP_VCPU, SECCOMP_LOG, &err))
            _exit(CHILD_NO_FILTER);
        errno = 0;
        bool made = getppid() > 0 && syscall(SYS_dup2, -1, 100) < 0 && errno == EBADF;
        _exit(made ? CHILD_ANSWERED : CHILD_REFUSED);
    }
    close(said[1]);
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert(WIFEXITED(status));
    ck_assert_int_eq(WEXITSTATUS(status), CHILD_ANSWERED);
    ck_assert_int_gt(read(said[0], text, sizeof(text) - 1), 0);
    ck_assert_msg(strstr(text, "call 110 "), "%s", text); // getppid
    close(said[0]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("seccomp");
    TCase *tc = tcase_create("seccomp");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, modes);
    tcase_add_test(tc, narrower_is_within_wider);
    // Sanitizers make calls of their own (docs/threat-model.md).
    if (SECCOMP_USABLE) {
        tcase_add_test(tc, strangers_end_the_process);
        tcase_add_test(tc, filters_add_up);
        tcase_add_test(tc, log_lets_pass);
    }
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
