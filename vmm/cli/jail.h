// SPDX-License-Identifier: Apache-2.0
// --jail: a VM's process sees one folder, has no rights, and cannot get new ones.
//
// As root: mount, IPC and UTS namespaces of its own (network: on request), DIR as its root, /dev
// with nothing but KVM and tun, another user. As an ordinary user: Landlock around DIR. Both:
// closed fds, no core dumps, no_new_privs. docs/threat-model.md says what that stops.
#pragma once

#include <limits.h>
#include <stdbool.h>
#include <sys/types.h>

#include "vmm/error.h"

struct vm_options;

struct jail_config {
    char dir[4096];    // empty: no jail
    char groups[4096]; // "/PATH" of a control group, "FILE=VALUE" of the last one, ...; then ""
    // A folder that is JAIL_SHARED inside, if it is not in `dir`; empty: none.
    char shared[4096];
    uid_t uid;
    gid_t gid;
    bool have_uid, have_gid, own_net;
};

// "DIR[,uid=N][,gid=N][,net=keep|own][,cgroup=/PATH[,FILE=VALUE]...]...".
int jail_parse(const char *text, struct jail_config *config, struct error *err);

// Can this user have that jail? Makes its control groups, closes what the VM was not given, and
// splits off the process that becomes the VM: returns 0 in it. The process that stays outside waits
// for its end, removes what it left, and returns 1 with the exit status. Before anything is opened,
// and before any thread.
int jail_begin(const struct vm_options *options, int *status, struct error *err);

// The walls. Everything that is named outside has been opened. Before any thread.
int jail_enter(const struct jail_config *config, struct error *err);

#define JAIL_SHARED "/checkpoints"

// What is called `path` outside, and what it is called inside; both from the root. False, and
// `path` itself: it is not in the jail. (Without namespaces, names are the same on both sides.)
bool jail_inside(const struct jail_config *config, const char *path, char inside[PATH_MAX]);
void jail_outside(const struct jail_config *config, const char *path, char outside[PATH_MAX]);
// A new folder "NAME-XXXXXX" for the VM's user, in `where`, a folder of the jail by its name
// outside; its descriptor and its name outside. Safe against whoever writes there.
int jail_folder(const struct jail_config *config, const char *where, const char *name, int *fd,
                char outside[PATH_MAX], struct error *err);
