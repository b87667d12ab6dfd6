// SPDX-License-Identifier: Apache-2.0
#include "vmm/seccomp.h"

#include <asm/termbits.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/fs.h>
#include <linux/futex.h>
#include <linux/if_tun.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <linux/sockios.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "vmm/util.h"

enum {
    L = 1 << SECCOMP_LOOP,
    W = 1 << SECCOMP_WORKER,
    V = 1 << SECCOMP_VCPU,
    H = 1 << SECCOMP_HTTP,
    S = 1 << SECCOMP_SETUP, // and all that L may
};
enum { LW = L | W, LWV = L | W | V, ALL = L | W | V | H };

// What pthread_create asks for; a process of its own (fork, exec's half) is not among it.
#define THREAD_FLAGS                                                                    \
    (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SYSVSEM | CLONE_SIGHAND | CLONE_THREAD | \
     CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)

enum check {
    ANY,    // whatever the arguments
    EQUAL,  // the argument is `value`: its lower 32 bits, all that the kernel looks at there
    CLEAR,  // no bit of `value` is set in the argument
    OURSELF // the argument is this process's id
};

struct rule {
    uint16_t nr;
    uint8_t threads;
    uint8_t check;
    uint8_t arg;     // counts from 0
    uint16_t refuse; // an errno instead of leave
    uint32_t value;
};

#define CALL(name, threads)               \
    {                                     \
        SYS_##name, threads, ANY, 0, 0, 0 \
    }
#define CALL_IF(name, arg, value, threads)                    \
    {                                                         \
        SYS_##name, threads, EQUAL, arg, 0, (uint32_t)(value) \
    }
#define IOCTL(request, threads) CALL_IF(ioctl, 1, request, threads)
#define REFUSE(name, error, threads)          \
    {                                         \
        SYS_##name, threads, ANY, 0, error, 0 \
    }

// First come those that cost: KVM_RUN is looked up at every exit (the kernel remembers calls that
// need no look at arguments, and spares them the filter). Rules of one call stand together.
static const struct rule rules[] = {
    IOCTL(KVM_RUN, LWV),
    IOCTL(KVM_IRQ_LINE, LWV),
    IOCTL(KVM_SIGNAL_MSI, LWV),
    // Interrupts and doorbells that a guest moves (PCI), or that come and go with a device's
    // queues.
    IOCTL(KVM_SET_GSI_ROUTING, LWV),
    IOCTL(KVM_IRQFD, LWV),
    IOCTL(KVM_IOEVENTFD, LWV),
    IOCTL(KVM_CHECK_EXTENSION, LWV),
    // A tap's features follow the driver's, in the thread of the vCPU that sets DRIVER_OK.
    IOCTL(TUNSETOFFLOAD, LWV),
    IOCTL(TUNSETQUEUE, LWV),
    IOCTL(TIOCGWINSZ, LWV),
    // vcpu_diagnose
    IOCTL(KVM_GET_REGS, LWV),
    IOCTL(KVM_GET_SREGS, LWV),
    IOCTL(KVM_TRANSLATE, LWV),
    // State, saved and loaded; pause and resume; dirty pages.
    IOCTL(KVM_SET_REGS, LW),
    // A VM is built.
    IOCTL(KVM_GET_API_VERSION, S),
    IOCTL(KVM_CREATE_VM, S),
    IOCTL(KVM_ENABLE_CAP, S),
    IOCTL(KVM_GET_VCPU_MMAP_SIZE, S),
    IOCTL(KVM_SET_TSS_ADDR, S),
    IOCTL(KVM_SET_IDENTITY_MAP_ADDR, S),
    IOCTL(KVM_CREATE_IRQCHIP, S),
    IOCTL(KVM_CREATE_PIT2, S),
    IOCTL(KVM_CREATE_VCPU, S),
    IOCTL(KVM_GET_SUPPORTED_CPUID, S),
    IOCTL(KVM_SET_SREGS, LW),
    IOCTL(KVM_GET_CLOCK, LW),
    IOCTL(KVM_SET_CLOCK, LW),
    IOCTL(KVM_KVMCLOCK_CTRL, LW),
    IOCTL(KVM_GET_DIRTY_LOG, LW),
    IOCTL(KVM_RESET_DIRTY_RINGS, LWV), // a vCPU's: its ring is full
    IOCTL(KVM_SET_USER_MEMORY_REGION, LW),
    IOCTL(KVM_GET_IRQCHIP, LW),
    IOCTL(KVM_SET_IRQCHIP, LW),
    IOCTL(KVM_GET_PIT2, LW),
    IOCTL(KVM_SET_PIT2, LW),
    IOCTL(KVM_GET_MSR_INDEX_LIST, LW),
    IOCTL(KVM_GET_MSRS, LWV), // a vCPU's: where its guest wants its steal time
    IOCTL(KVM_SET_MSRS, LW),
    IOCTL(KVM_SET_CPUID2, LW),
    IOCTL(KVM_GET_LAPIC, LW),
    IOCTL(KVM_SET_LAPIC, LW),
    IOCTL(KVM_GET_MP_STATE, LW),
    IOCTL(KVM_SET_MP_STATE, LW),
    IOCTL(KVM_GET_VCPU_EVENTS, LW),
    IOCTL(KVM_SET_VCPU_EVENTS, LW),
    IOCTL(KVM_GET_DEBUGREGS, LW),
    IOCTL(KVM_SET_DEBUGREGS, LW),
    IOCTL(KVM_GET_XSAVE, LW),
    IOCTL(KVM_GET_XSAVE2, LW),
    IOCTL(KVM_SET_XSAVE, LW),
    IOCTL(KVM_GET_XCRS, LW),
    IOCTL(KVM_SET_XCRS, LW),
    IOCTL(KVM_GET_TSC_KHZ, LW),
    IOCTL(KVM_SET_TSC_KHZ, LW),
    // Post-copy.
    IOCTL(USERFAULTFD_IOC_NEW, LW),
    IOCTL(UFFDIO_API, LW),
    IOCTL(UFFDIO_REGISTER, LW),
    IOCTL(UFFDIO_UNREGISTER, LW),
    IOCTL(UFFDIO_COPY, LW),
    IOCTL(UFFDIO_ZEROPAGE, LW),
    IOCTL(UFFDIO_CONTINUE, LW),
    IOCTL(UFFDIO_WAKE, LW),
    // A snapshot of a running guest; a page of a lazy restore that cannot be had. Numbers of Linux
    // 6.6, not in older headers.
    IOCTL(UFFDIO_WRITEPROTECT, LW),
    IOCTL(0xc020aa08, LW), // UFFDIO_POISON
    IOCTL(0xc0606610, LW), // PAGEMAP_SCAN
    IOCTL(FICLONE, LW),    // an overlay that goes with a snapshot
    // A tap is taken when a guest that arrived runs; a grown disk is looked at again.
    IOCTL(TUNSETIFF, LW),
    IOCTL(TUNGETIFF, LW),
    IOCTL(TUNSETVNETHDRSZ, LW),
    IOCTL(TUNSETVNETLE, LW),
    IOCTL(SIOCGIFMTU, LW),
    IOCTL(SIOCGIFINDEX, LW), // name lookup
    IOCTL(0x80081272, LW),   // BLKGETSIZE64; its header clashes with the C library's
    // The terminal: taken, given back. Another's input (TIOCSTI) is not among it.
    IOCTL(TCGETS, LW),
    IOCTL(TCSETS, LW),
    IOCTL(TCSETSW, LW),
    IOCTL(TCSETSF, LW),
    IOCTL(TIOCGPTN, LW),
    IOCTL(TIOCGPGRP, LW),
    IOCTL(TIOCSPTLCK, LW),
    IOCTL(FIONREAD, LW | H),
    IOCTL(FIONBIO, LW),

    // The C library's heap, locks, threads and clocks.
    CALL(futex, ALL),
    CALL(futex_waitv, V | W | L), // turns: sched/client.c
    CALL(read, ALL),
    CALL(write, ALL),
    CALL(readv, ALL),
    CALL(writev, ALL),
    CALL(close, ALL),
    CALL(brk, ALL),
    CALL(munmap, ALL),
    CALL(mremap, ALL),
    CALL(madvise, ALL),
    {SYS_mmap, ALL, CLEAR, 2, 0, PROT_EXEC},
    // A library that name lookup would load is not there then, and lookup goes on without it.
    REFUSE(mmap, EACCES, LW),
    {SYS_mprotect, ALL, CLEAR, 2, 0, PROT_EXEC},
    CALL(exit, ALL),
    CALL(exit_group, ALL),
    CALL(rt_sigprocmask, ALL),
    CALL(rt_sigreturn, ALL),
    CALL(restart_syscall, ALL),
    CALL(getpid, ALL),
    CALL(gettid, ALL),
    {SYS_tgkill, ALL, OURSELF, 0, 0, 0},
    CALL(sched_yield, ALL),
    CALL(sched_getattr, ALL),
    CALL(sched_setattr, ALL), // thread_prompt
    CALL(sched_getaffinity, ALL),
    CALL(sched_setaffinity, LW), // vCPUs, when their scheduler is gone: sched/client.c
    CALL(clock_gettime, ALL),
    CALL(clock_nanosleep, ALL),
    CALL(gettimeofday, ALL),
    CALL(set_robust_list, ALL),
    CALL(rseq, ALL),
    CALL(getrandom, ALL),
    CALL_IF(prctl, 0, PR_SET_NAME, ALL),
    CALL_IF(prctl, 0, PR_GET_NAME, ALL),
    CALL_IF(prctl, 0, PR_SET_NO_NEW_PRIVS, LW),       // a thread that confines
    CALL_IF(seccomp, 0, SECCOMP_SET_MODE_FILTER, LW), // itself further
    CALL_IF(clone, 0, THREAD_FLAGS, LW),
    REFUSE(clone, EPERM, LW),   // no processes: vmm/starter.h starts programs
    REFUSE(clone3, ENOSYS, LW), // its flags lie in memory: the C library takes clone then

    // The loop and its devices. Which rings there are is settled before; what they may do as well.
    CALL(io_uring_enter, LWV),
    CALL_IF(io_uring_register, 1, IORING_UNREGISTER_FILES, LW),
    CALL(io_uring_register, S), // of rings that are made now: what they may do is settled with it
    CALL(io_uring_setup, S),
    CALL(memfd_create, S), // guest memory
    CALL(mbind, S),
    CALL(timerfd_settime, LWV),
    CALL(poll, LWV | H),
    CALL(ppoll, LWV),
    CALL(sendmsg, LWV),
    CALL(recvmsg, LWV),
    CALL(sendto, LWV),
    CALL(recvfrom, LWV),
    CALL(shutdown, LWV | H),
    CALL(fallocate, LWV),
    CALL(fdatasync, LWV),
    CALL(fsync, LWV),
    CALL(pread64, ALL),
    CALL(pwrite64, LWV),
    CALL(preadv, LWV),
    CALL(pwritev, LWV),
    CALL(lseek, ALL),
    CALL(copy_file_range, LW), // overlays
    CALL(eventfd2, LW),
    CALL(timerfd_create, LW),
    CALL(fcntl, LW | H),
    CALL(fstat, ALL),
    CALL(newfstatat, LW),
    CALL_IF(newfstatat, 3, AT_EMPTY_PATH, V | H), // the C library's fstat
    CALL(statx, LW),
    CALL(openat, LW), // by name; --jail says which names there are
    // The C library asks how many CPUs there are (a heap for each thread), and can do without.
    REFUSE(openat, EACCES, V | H),
    CALL(readlink, LW),
    CALL(access, LW),
    CALL(faccessat, LW),
    CALL(getcwd, LW),
    CALL(ftruncate, LW),
    CALL(fchmod, LW), // a socket that is its owner's only
    CALL(fstatfs, LW),
    CALL(fadvise64, LW),
    CALL(fsetxattr, LW), // a disk that went to another host, and comes back
    CALL(fgetxattr, LW),
    CALL(fremovexattr, LW),
    CALL(getdents64, LW),
    CALL(flock, LW),
    CALL(unlink, LW),
    CALL(unlinkat, LW),
    CALL(mkdir, LW), // where the control sockets are
    CALL(geteuid, LW),
    CALL(rename, LW),
    CALL(renameat, LW),
    CALL(renameat2, LW), // vmm/listen.h
    CALL(link, LW),
    CALL(mincore, LW),
    CALL(msync, LW),
    CALL(pipe2, LW),
    CALL(dup, LW),
    CALL(dup3, LW), // the doorbell: sched/client.c
    CALL(userfaultfd, LW),
    CALL(uname, LW),
    CALL_IF(prlimit64, 2, 0, LW), // read, not set
    CALL(sysinfo, LW),
    CALL(sendmmsg, LW), // name lookup
    CALL_IF(socket, 0, AF_UNIX, LW),
    CALL_IF(socket, 0, AF_INET, LW),
    CALL_IF(socket, 0, AF_INET6, LW),
    CALL_IF(socket, 0, AF_NETLINK, LW), // name lookup asks which families there are
    CALL_IF(socketpair, 0, AF_UNIX, LW),
    CALL(connect, LW),
    CALL(bind, LW),
    CALL(listen, LW),
    CALL(accept4, LW | H),
    CALL(accept, LW),
    CALL(getsockname, LW | H),
    CALL(getpeername, LW | H),
    CALL(getsockopt, LW | H),
    CALL(setsockopt, LW | H),
    CALL(wait4, LW), // for the starter, at the end
    CALL(rt_sigaction, LW),
    CALL(epoll_wait, H),
    CALL(epoll_pwait, H),
    CALL(epoll_ctl, L | H),
};

// --- from the list to a program

static int mode_number(const char *text)
{
    static const char *const names[] = {
        [SECCOMP_OFF] = "off", [SECCOMP_ON] = "on", [SECCOMP_LOG] = "log"};
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (!strcmp(text, names[i]))
            return (int)i;
    return -1;
}

int seccomp_mode_parse(const char *text, enum seccomp_mode *mode, struct error *err)
{
    int number = mode_number(text);
    if (number < 0)
        return error_set(err, -EINVAL, "'%s': expected on, off or log", text);
    *mode = (enum seccomp_mode)number;
    return 0;
}

// The call that the log mode's handler makes for a thread: the filter lets it pass by its address,
// that of the instruction behind it.
long seccomp_pass(long nr, const long args[6]);
extern const char seccomp_passed[];
__asm__(".text\n"
        ".globl seccomp_pass, seccomp_passed\n"
        ".type seccomp_pass, @function\n"
        "seccomp_pass:\n"
        "    mov %rdi, %rax\n"
        "    mov %rsi, %r11\n"
        "    mov (%r11), %rdi\n"
        "    mov 8(%r11), %rsi\n"
        "    mov 16(%r11), %rdx\n"
        "    mov 24(%r11), %r10\n"
        "    mov 32(%r11), %r8\n"
        "    mov 40(%r11), %r9\n"
        "    syscall\n"
        "seccomp_passed:\n"
        "    ret\n"
        ".size seccomp_pass, . - seccomp_pass\n");

struct assembler {
    struct sock_filter *code;
    unsigned nr;
};

static void emit(struct assembler *a, uint16_t code, uint32_t k, uint8_t jt, uint8_t jf)
{
    if (a->nr == SECCOMP_PROGRAM_MAX)
        abort(); // the list has outgrown its room, on every machine alike
    a->code[a->nr++] = (struct sock_filter) {.code = code, .k = k, .jt = jt, .jf = jf};
}

static void emit_load(struct assembler *a, size_t offset)
{
    emit(a, BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset, 0, 0);
}

static void emit_return(struct assembler *a, uint32_t action)
{
    emit(a, BPF_RET | BPF_K, action, 0, 0);
}

static uint32_t stranger_action(enum seccomp_mode mode)
{
    return mode == SECCOMP_LOG ? SECCOMP_RET_TRAP : SECCOMP_RET_KILL_PROCESS;
}

static void emit_start(struct assembler *a, enum seccomp_mode mode)
{
    const uint64_t passed = (uint64_t)(uintptr_t)seccomp_passed;
    emit_load(a, offsetof(struct seccomp_data, arch));
    emit(a, BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    emit_return(a, SECCOMP_RET_KILL_PROCESS);
    if (mode == SECCOMP_LOG) {
        emit_load(a, offsetof(struct seccomp_data, instruction_pointer));
        emit(a, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)passed, 0, 3);
        emit_load(a, offsetof(struct seccomp_data, instruction_pointer) + 4);
        emit(a, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(passed >> 32), 0, 1);
        emit_return(a, SECCOMP_RET_ALLOW);
    }
    emit_load(a, offsetof(struct seccomp_data, nr));
}

static void emit_check(struct assembler *a, const struct rule *rule)
{
    bool clear = rule->check == CLEAR;
    emit(a, BPF_JMP | BPF_K | (clear ? BPF_JSET : BPF_JEQ),
         rule->check == OURSELF ? (uint32_t)getpid() : rule->value, clear, !clear);
}

static bool for_thread(const struct rule *rule, unsigned thread)
{
    unsigned bits = 1u << thread;
    if (thread == SECCOMP_SETUP)
        bits |= L;
    return rule->threads & bits;
}

// The rules of one call, of which this thread has some. Always ends in a return.
static void emit_call(struct assembler *a, const struct rule *rule, const struct rule *end,
                      unsigned thread, uint32_t stranger)
{
    int loaded = -1;
    unsigned head = a->nr;
    bool open = true; // no rule has taken whatever is left
    emit(a, BPF_JMP | BPF_JEQ | BPF_K, rule->nr, 0, 0);
    for (; rule < end; rule++) {
        if (!for_thread(rule, thread))
            continue;
        if (rule->check != ANY && loaded != rule->arg) {
            loaded = rule->arg;
            emit_load(a, offsetof(struct seccomp_data, args) + 8u * rule->arg);
        }
        if (rule->check != ANY)
            emit_check(a, rule);
        else
            open = false;
        emit_return(a, rule->refuse ? SECCOMP_RET_ERRNO | rule->refuse : SECCOMP_RET_ALLOW);
    }
    if (open)
        emit_return(a, stranger);
    unsigned skip = a->nr - head - 1;
    if (skip > UINT8_MAX)
        abort(); // as above
    a->code[head].jf = (uint8_t)skip;
}

unsigned seccomp_program(enum seccomp_thread thread, enum seccomp_mode mode,
                         struct sock_filter program[SECCOMP_PROGRAM_MAX])
{
    struct assembler a = {.code = program};
    emit_start(&a, mode);
    const struct rule *last = rules + ARRAY_SIZE(rules);
    for (const struct rule *rule = rules, *end; rule < last; rule = end) {
        bool any = false;
        for (end = rule; end < last && end->nr == rule->nr; end++)
            any |= for_thread(end, thread);
        if (any)
            emit_call(&a, rule, end, thread, stranger_action(mode));
    }
    emit_return(&a, stranger_action(mode));
    return a.nr;
}

// --- log mode

static void stranger_seen(int signal, siginfo_t *info, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    const long args[6] = {regs[REG_RDI], regs[REG_RSI], regs[REG_RDX],
                          regs[REG_R10], regs[REG_R8],  regs[REG_R9]};
    char name[17] = "", text[160];
    const long name_args[6] = {PR_GET_NAME, (long)name};
    seccomp_pass(SYS_prctl, name_args);
    int len =
        snprintf(text, sizeof(text), "ferry: seccomp: thread %s: call %d (%#lx, %#lx, %#lx)\n",
                 name, info->si_syscall, args[0], args[1], args[2]);
    const long write_args[6] = {STDERR_FILENO, (long)text, len};
    seccomp_pass(SYS_write, write_args);
    regs[REG_RAX] = seccomp_pass(info->si_syscall, args);
}

static int log_prepare(struct error *err)
{
    struct sigaction action = {.sa_sigaction = stranger_seen, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGSYS);
    // A blocked SIGSYS would end the process.
    if (sigaction(SIGSYS, &action, NULL) || pthread_sigmask(SIG_UNBLOCK, &set, NULL))
        return error_errno(err, "seccomp: sigaction");
    return 0;
}

int seccomp_enter(enum seccomp_thread thread, enum seccomp_mode mode, struct error *err)
{
    if (mode == SECCOMP_OFF)
        return 0;
    if (mode == SECCOMP_LOG) {
        int ret = log_prepare(err);
        if (ret)
            return ret;
    }
    struct sock_filter code[SECCOMP_PROGRAM_MAX];
    struct sock_fprog program = {.filter = code};
    program.len = (unsigned short)seccomp_program(thread, mode, code);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return error_errno(err, "no_new_privs");
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program))
        return error_errno(err, "seccomp filter (--seccomp off goes without)");
    return 0;
}

void seccomp_enter_or_abort(enum seccomp_thread thread, enum seccomp_mode mode)
{
    struct error err;
    if (!seccomp_enter(thread, mode, &err))
        return;
    fprintf(stderr, "ferry: %s\n", err.text);
    abort();
}
