// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/jail.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/landlock.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vmm/cli/options.h"
#include "vmm/cli/registry.h"
#include "vmm/exit_status.h"
#include "vmm/util.h"

enum { FILES_MAX = 4096 };

// --- the option

static int number_parse(const char *text, uint32_t *value, bool *have, const char *what,
                        struct error *err)
{
    char *end;
    errno = 0;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || n >= UINT32_MAX)
        return error_set(err, -EINVAL, "%s '%s': expected a number", what, text);
    *value = (uint32_t)n;
    *have = true;
    return 0;
}

// "memory.max=512M": a name, no path.
static bool group_file(const char *part)
{
    size_t len = strspn(part, "abcdefghijklmnopqrstuvwxyz0123456789_.");
    return *part != '.' && memchr(part, '.', len) && part[len] == '=';
}

static void word_add(struct jail_config *c, const char *word)
{
    char *end = c->groups;
    while (*end)
        end += strlen(end) + 1;
    strcpy(end, word); // all of them are shorter than the whole, which fits
}

static int part_parse(const char *part, struct jail_config *c, struct error *err)
{
    if (!strncmp(part, "uid=", 4))
        return number_parse(part + 4, &c->uid, &c->have_uid, "uid", err);
    if (!strncmp(part, "gid=", 4))
        return number_parse(part + 4, &c->gid, &c->have_gid, "gid", err);
    if (!strcmp(part, "net=keep") || !strcmp(part, "net=own")) {
        c->own_net = !strcmp(part, "net=own");
        return 0;
    }
    if (!strncmp(part, "cgroup=/", 8)) {
        word_add(c, part + 7);
        return 0;
    }
    if (*c->groups && group_file(part)) {
        word_add(c, part);
        return 0;
    }
    return error_set(
        err, -EINVAL,
        "'%.80s': expected uid=N, gid=N, net=keep, net=own, cgroup=/PATH or, after it, "
        "a file of that group (memory.max=512M)",
        part);
}

int jail_parse(const char *text, struct jail_config *config, struct error *err)
{
    char copy[PATH_MAX], *save = NULL;
    struct jail_config c = {0};
    if (strlen(text) >= sizeof(copy))
        return error_set(err, -ENAMETOOLONG, "longer than %zu characters", sizeof(copy) - 1);
    strcpy(copy, text);
    const char *dir = strtok_r(copy, ",", &save);
    if (!dir || *dir != '/' || *text == ',')
        return error_set(err, -EINVAL, "'%.80s': expected an absolute path first", text);
    size_t len = strlen(dir);
    while (len > 1 && dir[len - 1] == '/')
        len--;
    memcpy(c.dir, dir, len);
    for (char *part; (part = strtok_r(NULL, ",", &save));) {
        int ret = part_parse(part, &c, err);
        if (ret)
            return ret;
    }
    *config = c;
    return 0;
}

// --- names

// No name on the way may be a symbolic link: whoever can place one chooses where we end
// (Firecracker, CVE-2026-1386).
static int open_straight(int at, const char *path, uint64_t flags, int *fd, struct error *err)
{
    struct open_how how = {.flags = flags | O_CLOEXEC,
                           .resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    *fd = (int)syscall(SYS_openat2, at, path, &how, sizeof(how));
    if (*fd < 0 && errno == ELOOP)
        return error_set(err, -ELOOP, "jail: %s: a symbolic link is on the way", path);
    return *fd < 0 ? error_errno(err, "jail: %s", path) : 0;
}

// What follows `dir` in `path`: "" or "/..."; NULL: it is not there.
static const char *name_beneath(const char *dir, const char *path)
{
    size_t len = strcmp(dir, "/") ? strlen(dir) : 0;
    return *dir && !strncmp(dir, path, len) && (!path[len] || path[len] == '/') ? path + len : NULL;
}

bool jail_inside(const struct jail_config *c, const char *path, char inside[PATH_MAX])
{
    const char *rest = name_beneath(c->dir, path), *shared = name_beneath(c->shared, path);
    if (!c->have_uid)
        snprintf(inside, PATH_MAX, "%s", path);
    else if (rest)
        snprintf(inside, PATH_MAX, "%s", *rest ? rest : "/");
    else
        snprintf(inside, PATH_MAX, "%s%s", shared ? JAIL_SHARED : "", shared ? shared : path);
    return rest || shared;
}

void jail_outside(const struct jail_config *c, const char *path, char outside[PATH_MAX])
{
    const char *rest = *c->shared ? name_beneath(JAIL_SHARED, path) : NULL;
    if (!c->have_uid)
        snprintf(outside, PATH_MAX, "%s", path);
    else
        snprintf(outside, PATH_MAX, "%s%s", rest ? c->shared : c->dir, rest ? rest : path);
}

int jail_folder(const struct jail_config *c, const char *where, const char *name, int *fd,
                char outside[PATH_MAX], struct error *err)
{
    autoclose int dir = -1;
    char leaf[64];
    int ret = open_straight(AT_FDCWD, where, O_PATH | O_DIRECTORY, &dir, err);
    if (ret)
        return ret;
    for (unsigned tries = 0;; tries++) {
        uint32_t number = 0;
        if (getrandom(&number, sizeof(number), 0) < 0)
            return error_errno(err, "getrandom");
        snprintf(leaf, sizeof(leaf), "%.40s-%06x", name, number & 0xffffff);
        if (!mkdirat(dir, leaf, 0700))
            break;
        if (errno != EEXIST || tries > 100)
            return error_errno(err, "jail: a folder in %s", where);
    }
    if ((size_t)snprintf(outside, PATH_MAX, "%s/%s", where, leaf) >= PATH_MAX)
        ret = error_set(err, -ENAMETOOLONG, "jail: %s: name too long", where);
    if (!ret)
        ret = open_straight(dir, leaf, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, fd, err);
    if (!ret && c->have_uid && fchown(*fd, c->uid, c->gid))
        ret = error_errno(err, "jail: %s", outside);
    if (ret)
        unlinkat(dir, leaf, AT_REMOVEDIR);
    return ret;
}

// --- control groups

// The folder that holds `path`, and what it is called there.
static int group_parent(const char *path, int *parent, const char **leaf, struct error *err)
{
    autofree char *dir = strdup(path);
    struct statfs fs;
    if (!dir)
        return error_set(err, -ENOMEM, "no memory for a path");
    *leaf = strrchr(path, '/') + 1;
    dir[*leaf - path] = 0;
    int ret = open_straight(AT_FDCWD, dir, O_PATH | O_DIRECTORY, parent, err);
    if (ret)
        return ret;
    if (fstatfs(*parent, &fs))
        return error_errno(err, "jail: %s", dir);
    if (fs.f_type != CGROUP_SUPER_MAGIC && fs.f_type != CGROUP2_SUPER_MAGIC)
        return error_set(err, -EINVAL, "jail: %s: not a folder of control groups", path);
    return 0;
}

static int group_make(const char *path, int *group, bool *made, struct error *err)
{
    const char *leaf = NULL;
    autoclose int parent = -1;
    int ret = group_parent(path, &parent, &leaf, err);
    if (ret)
        return ret;
    *made = !mkdirat(parent, leaf, 0755);
    if (!*made && errno != EEXIST)
        return error_errno(err, "jail: %s", path);
    return open_straight(parent, leaf, O_PATH | O_DIRECTORY, group, err);
}

static int limit_set(int group, const char *word, struct error *err)
{
    char name[64];
    const char *value = strchr(word, '=') + 1;
    snprintf(name, sizeof(name), "%.*s", (int)(value - 1 - word), word);
    autoclose int fd = openat(group, name, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0 && errno == ENOENT)
        return error_set(err, -ENOENT,
                         "jail: %s: the control group has no such file (is its controller in the "
                         "cgroup.subtree_control of its parent?)",
                         name);
    if (fd < 0 || write(fd, value, strlen(value)) < 0)
        return error_errno(err, "jail: %s", word);
    return 0;
}

static void groups_remove(const struct jail_config *c, uint64_t made)
{
    for (const char *word = c->groups; *word; word += strlen(word) + 1)
        if (*word == '/') {
            if (made & 1)
                rmdir(word);
            made >>= 1;
        }
}

// *made: a bit for each group that did not exist.
static int groups_make(const struct jail_config *c, uint64_t *made, struct error *err)
{
    autoclose int group = -1;
    unsigned nr = 0;
    int ret = 0;
    *made = 0;
    for (const char *word = c->groups; *word && !ret; word += strlen(word) + 1) {
        bool new_one = false;
        if (*word == '/') {
            cleanup_close(&group);
            group = -1;
            ret = nr < 64 ? group_make(word, &group, &new_one, err)
                          : error_set(err, -E2BIG, "jail: more than 64 control groups");
            *made |= (uint64_t)new_one << nr++;
        } else {
            ret = limit_set(group, word, err);
        }
    }
    if (ret)
        groups_remove(c, *made);
    return ret;
}

static int group_join(const char *path, struct error *err)
{
    autoclose int dir = -1;
    int ret = open_straight(AT_FDCWD, path, O_PATH | O_DIRECTORY, &dir, err);
    if (ret)
        return ret;
    autoclose int procs = openat(dir, "cgroup.procs", O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (procs < 0 || write(procs, "0", 1) != 1)
        return error_errno(err, "jail: %s/cgroup.procs", path);
    return 0;
}

static int groups_join(const struct jail_config *c, struct error *err)
{
    int ret = 0;
    for (const char *word = c->groups; *word && !ret; word += strlen(word) + 1)
        ret = *word == '/' ? group_join(word, err) : 0;
    return ret;
}

// --- outside: the process that stays

static int user_check(const struct jail_config *c, struct error *err)
{
    bool root = !geteuid();
    if (root && (!c->have_uid || !c->have_gid || !c->uid || !c->gid))
        return error_set(err, -EINVAL,
                         "--jail: uid=N and gid=N other than 0 are needed: root in a jail is root");
    if (!root && (c->have_uid || c->have_gid || c->own_net))
        return error_set(err, -EPERM, "--jail: uid, gid and net=own need root");
    if (!root && syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION) < 1)
        return error_set(err, -ENOTSUP,
                         "--jail without root stands on Landlock, which this kernel does not have "
                         "(CONFIG_SECURITY_LANDLOCK, lsm=landlock): run it as root");
    return 0;
}

// Descriptors that options name are the VM's; others came by accident.
static bool fd_given(const struct vm_options *o, int fd)
{
    if (o->console.kind == CONSOLE_FD && o->console.fd == fd)
        return true;
    for (unsigned i = 0; i < o->nr_devices; i++) {
        const char *at = strstr(o->devices[i].text, "fd=");
        if (!at)
            at = strstr(o->devices[i].text, "fd:");
        if (at && atoi(at + 3) == fd)
            return true;
    }
    return false;
}

static int fds_close(const struct vm_options *o, struct error *err)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit))
        return error_errno(err, "getrlimit");
    int first = STDERR_FILENO + 1, highest = first;
    for (int fd = first; fd < FILES_MAX; fd++)
        if (fd_given(o, fd)) {
            if (fd > first && syscall(SYS_close_range, first, fd - 1, 0))
                return error_errno(err, "close_range");
            first = highest = fd + 1;
        }
    return syscall(SYS_close_range, highest, ~0u, 0) ? error_errno(err, "close_range") : 0;
}

static void leftovers_remove(const struct vm_options *o)
{
    struct registry registry;
    struct stat st;
    if (o->control && !registry_scan(&registry, NULL)) {
        const struct registry_entry *e = registry_find(&registry, o->name);
        if (e && e->fate == REGISTRY_DEAD)
            registry_clean(e);
        registry_free(&registry);
    }
    if (o->api_sock && !lstat(o->api_sock, &st) && S_ISSOCK(st.st_mode))
        unlink(o->api_sock);
    const char *unix_path = o->listen && !strncmp(o->listen, "unix:", 5) ? o->listen + 5 : NULL;
    if (unix_path && !lstat(unix_path, &st) && S_ISSOCK(st.st_mode))
        unlink(unix_path);
}

// Whoever started us sees the end of the VM's process, as without a jail.
static void end_alike(int number)
{
    const struct rlimit none = {0, 0};
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    setrlimit(RLIMIT_CORE, &none); // a core of ours would tell nothing
    signal(number, SIG_DFL);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    raise(number);
}

static int keep(const struct vm_options *o, pid_t vm, uint64_t made, const sigset_t *set)
{
    int status, signal;
    for (;;) {
        if (waitpid(vm, &status, WNOHANG) == vm)
            break;
        if (!sigwait(set, &signal) && signal != SIGCHLD)
            kill(vm, signal);
    }
    leftovers_remove(o);
    groups_remove(&o->jail, made);
    if (!WIFSIGNALED(status))
        return WEXITSTATUS(status);
    fprintf(stderr, "ferry: %s: ended by a signal: %s%s\n", o->name, strsignal(WTERMSIG(status)),
            WTERMSIG(status) == SIGSYS ? " (a system call that its filter does not allow)" : "");
    end_alike(WTERMSIG(status));
    return EXIT_FAILED;
}

int jail_begin(const struct vm_options *options, int *status, struct error *err)
{
    uint64_t made;
    int ret = user_check(&options->jail, err);
    if (!ret)
        ret = fds_close(options, err);
    if (!ret)
        ret = groups_make(&options->jail, &made, err);
    if (ret)
        return ret;
    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, &old);
    pid_t pid = fork();
    if (pid < 0) {
        ret = error_errno(err, "fork");
        groups_remove(&options->jail, made);
        return ret;
    }
    if (!pid) {
        sigprocmask(SIG_SETMASK, &old, NULL);
        return 0;
    }
    *status = keep(options, pid, made, &set);
    return 1;
}

// --- inside: the VM

static int dir_open(const struct jail_config *c, int *fd, struct error *err)
{
    struct stat st;
    int ret = open_straight(AT_FDCWD, c->dir, O_PATH | O_DIRECTORY, fd, err);
    if (ret)
        return ret;
    if (fstat(*fd, &st))
        return error_errno(err, "jail: %s", c->dir);
    if (st.st_mode & (S_IWGRP | S_IWOTH) ||
        (st.st_uid != geteuid() && !(c->have_uid && st.st_uid == c->uid)))
        return error_set(err, -EPERM,
                         "jail: %s: others may write to it (owner %u, mode %o): expected it to be "
                         "the VM's or ours alone",
                         c->dir, st.st_uid, st.st_mode & 07777u);
    return 0;
}

static int limits_set(struct error *err)
{
    // A core dump would hold the guest's memory.
    const struct rlimit none = {0, 0};
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) || setrlimit(RLIMIT_CORE, &none))
        return error_errno(err, "jail: resource limits");
    files.rlim_max = files.rlim_max < FILES_MAX ? files.rlim_max : FILES_MAX;
    files.rlim_cur = files.rlim_max;
    return setrlimit(RLIMIT_NOFILE, &files) ? error_errno(err, "jail: RLIMIT_NOFILE") : 0;
}

// What a VM that is built inside needs. Nodes of our own: those outside may be root's alone.
static int nodes_make(int dev, const struct jail_config *c, struct error *err)
{
    static const struct {
        const char *outside, *inside;
    } nodes[] = {{"/dev/kvm", "kvm"},
                 {"/dev/net/tun", "net/tun"},
                 {"/dev/userfaultfd", "userfaultfd"},
                 {"/dev/urandom", "urandom"},
                 {"/dev/null", "null"}};
    if (mkdirat(dev, "net", 0755))
        return error_errno(err, "jail: /dev/net");
    for (size_t i = 0; i < ARRAY_SIZE(nodes); i++) {
        struct stat st;
        if (stat(nodes[i].outside, &st) || !S_ISCHR(st.st_mode))
            continue; // the host has none
        if (mknodat(dev, nodes[i].inside, S_IFCHR | 0600, st.st_rdev) ||
            fchownat(dev, nodes[i].inside, c->uid, c->gid, AT_SYMLINK_NOFOLLOW))
            return error_errno(err, "jail: /dev/%s", nodes[i].inside);
    }
    return 0;
}

static int mount_at(int mount, int dir, const char *what, struct error *err)
{
    if (syscall(SYS_move_mount, mount, "", dir, "",
                MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH))
        return error_errno(err, "jail: mounting %s", what);
    return 0;
}

// On `root`/dev, which must be a folder and no link.
static int dev_mount(int root, const struct jail_config *c, struct error *err)
{
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS};
    if (mkdirat(root, "dev", 0755) && errno != EEXIST)
        return error_errno(err, "jail: %s/dev", c->dir);
    autoclose int at = (int)syscall(SYS_openat2, root, "dev", &how, sizeof(how));
    if (at < 0)
        return error_errno(err, "jail: %s/dev", c->dir);
    autoclose int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC);
    if (fs < 0 || syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "size", "64k", 0) ||
        syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "mode", "0755", 0) ||
        syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
        return error_errno(err, "jail: a tmpfs for /dev");
    autoclose int dev =
        (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
    if (dev < 0)
        return error_errno(err, "jail: a tmpfs for /dev");
    int ret = nodes_make(dev, c, err);
    return ret ? ret : mount_at(dev, at, "/dev", err);
}

// The folder outside, opened before the root changes, at JAIL_SHARED.
static int shared_mount(int root, int shared, const struct jail_config *c, struct error *err)
{
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS};
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC};
    if (mkdirat(root, &JAIL_SHARED[1], 0755) && errno != EEXIST)
        return error_errno(err, "jail: %s%s", c->dir, JAIL_SHARED);
    autoclose int at = (int)syscall(SYS_openat2, root, &JAIL_SHARED[1], &how, sizeof(how));
    autoclose int tree = (int)syscall(SYS_open_tree, shared, "",
                                      AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (at < 0 || tree < 0 ||
        syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof(attr)))
        return error_errno(err, "jail: %s at %s%s", c->shared, c->dir, JAIL_SHARED);
    return mount_at(tree, at, c->shared, err);
}

// It is made if need be, and the VM's user may write to it if it was.
static int shared_open(const struct jail_config *c, int *fd, struct error *err)
{
    bool made = !mkdir(c->shared, 0700);
    if (!made && errno != EEXIST)
        return error_errno(err, "jail: %s", c->shared);
    int ret = open_straight(AT_FDCWD, c->shared, O_RDONLY | O_DIRECTORY, fd, err);
    if (!ret && made && c->have_uid && fchown(*fd, c->uid, c->gid))
        ret = error_errno(err, "jail: %s", c->shared);
    return ret;
}

// DIR becomes a mount of its own, then the root; the old one is gone from this process.
static int root_change(const struct jail_config *c, struct error *err)
{
    autoclose int dir = -1, shared = -1;
    int ret = dir_open(c, &dir, err);
    if (!ret && *c->shared)
        ret = shared_open(c, &shared, err);
    if (ret)
        return ret;
    autoclose int root =
        (int)syscall(SYS_open_tree, dir, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC};
    if (root < 0 || syscall(SYS_mount_setattr, root, "", AT_EMPTY_PATH, &attr, sizeof(attr)))
        return error_errno(err, "jail: %s as a mount", c->dir);
    ret = mount_at(root, dir, c->dir, err);
    if (!ret)
        ret = dev_mount(root, c, err);
    if (!ret && *c->shared)
        ret = shared_mount(root, shared, c, err);
    if (ret)
        return ret;
    if (fchdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
        return error_errno(err, "jail: pivot_root to %s", c->dir);
    return 0;
}

static int namespaces_enter(const struct jail_config *c, struct error *err)
{
    int flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | (c->own_net ? CLONE_NEWNET : 0);
    if (unshare(flags))
        return error_errno(err, "jail: namespaces");
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        return error_errno(err, "jail: private mounts");
    return root_change(c, err);
}

static int user_drop(const struct jail_config *c, struct error *err)
{
    if (setgroups(0, NULL) || setresgid(c->gid, c->gid, c->gid) ||
        setresuid(c->uid, c->uid, c->uid))
        return error_errno(err, "jail: becoming user %u, group %u", c->uid, c->gid);
    if (!setuid(0)) // cannot be
        return error_set(err, -EPERM, "jail: root's rights could not be given up");
    return 0;
}

// --- Landlock

// Files: as the oldest version has them. From version 6 on, processes outside the jail get no
// signals from it, and their abstract sockets are not reached.
struct landlock_asked {
    uint64_t files, net, scoped;
};
enum { LANDLOCK_SCOPES_SINCE = 6, LANDLOCK_SCOPES = 3 };
#define LANDLOCK_FILES                                                                            \
    (LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_READ_DIR | \
     LANDLOCK_ACCESS_FS_MAKE_REG | LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_MAKE_SOCK |   \
     LANDLOCK_ACCESS_FS_REMOVE_FILE)
#define LANDLOCK_ALL (2 * LANDLOCK_ACCESS_FS_MAKE_SYM - 1)

static int landlock_allow(int rules, const char *path, uint64_t access, bool needed,
                          struct error *err)
{
    autoclose int fd = -1;
    int ret = open_straight(AT_FDCWD, path, O_PATH, &fd, err);
    if (ret)
        return needed ? ret : 0;
    struct landlock_path_beneath_attr rule = {.allowed_access = access, .parent_fd = fd};
    if (syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &rule, 0))
        return error_errno(err, "jail: Landlock rule for %s", path);
    return 0;
}

// Nothing is executed, no device node is made; outside `dir` and these devices nothing is opened.
static int landlock_enter(const char *dir, const char *shared, struct error *err)
{
    static const char *const devices[] = {"/dev/kvm", "/dev/net/tun", "/dev/userfaultfd",
                                          "/dev/urandom", "/dev/null"};
    long version = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
    if (version < 1)
        return 0; // as root the mount namespace does it
    const struct landlock_asked asked = {.files = LANDLOCK_ALL, .scoped = LANDLOCK_SCOPES};
    const size_t size = version < LANDLOCK_SCOPES_SINCE ? sizeof(asked.files) : sizeof(asked);
    autoclose int rules = (int)syscall(SYS_landlock_create_ruleset, &asked, size, 0);
    if (rules < 0)
        return error_errno(err, "jail: Landlock");
    int ret = landlock_allow(rules, dir, LANDLOCK_FILES, true, err);
    if (!ret && *shared)
        ret = landlock_allow(rules, shared, LANDLOCK_FILES, true, err);
    for (size_t i = 0; i < ARRAY_SIZE(devices) && !ret; i++)
        ret = landlock_allow(rules, devices[i],
                             LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE, false,
                             err);
    if (!ret && syscall(SYS_landlock_restrict_self, rules, 0))
        return error_errno(err, "jail: Landlock");
    return ret;
}

int jail_enter(const struct jail_config *c, struct error *err)
{
    bool root = !geteuid();
    autoclose int dir = -1, shared = -1;
    int ret = groups_join(c, err);
    if (!ret)
        ret = limits_set(err);
    if (!ret)
        ret = root ? namespaces_enter(c, err) : dir_open(c, &dir, err);
    if (!ret && !root && *c->shared)
        ret = shared_open(c, &shared, err);
    if (!ret && root)
        ret = user_drop(c, err);
    if (ret)
        return ret;
    // After the change of user, which would clear the wish to die with the process outside.
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_PDEATHSIG, SIGKILL))
        return error_errno(err, "jail: prctl");
    return landlock_enter(root ? "/" : c->dir, root ? "" : c->shared, err);
}
