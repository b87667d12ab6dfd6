// SPDX-License-Identifier: Apache-2.0
// What each thread may ask the kernel for. A guest that takes a thread over is left with this list:
// any other call ends the process (SIGSYS).
//
// The list is a table in seccomp.c; the filter is assembled from it, one for each kind of thread.
// A thread inherits the filters of the one that creates it, and the strictest answer counts: so
// setup >= loop >= worker >= vcpu. The HTTP thread is created before the loop is confined.
#pragma once

#include <linux/filter.h>
#include <stdbool.h>

#include "vmm/error.h"

enum seccomp_mode {
    SECCOMP_OFF,
    SECCOMP_ON,
    SECCOMP_LOG, // says what it would have stopped, on stderr, and lets it pass: for finding gaps
};

enum seccomp_thread {
    SECCOMP_LOOP,   // runs the devices; after everything has been set up
    SECCOMP_WORKER, // moves or saves the guest
    SECCOMP_VCPU,
    SECCOMP_HTTP,
    SECCOMP_SETUP, // the loop's thread before there is a guest: it still builds VMs
    SECCOMP_THREADS,
};

// Sanitizers make calls of their own: filters and they do not go together.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SECCOMP_USABLE 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SECCOMP_USABLE 0
#endif
#endif
#ifndef SECCOMP_USABLE
#define SECCOMP_USABLE 1
#endif

#define SECCOMP_DEFAULT (SECCOMP_USABLE ? SECCOMP_ON : SECCOMP_OFF) // without --seccomp

// "on", "off", "log".
int seccomp_mode_parse(const char *text, enum seccomp_mode *mode, struct error *err);

// Confines the calling thread, and those it creates from now on, for ever. Also sets no_new_privs.
int seccomp_enter(enum seccomp_thread thread, enum seccomp_mode mode, struct error *err);
// For a thread's start: there is nobody to tell, and it must not go on unconfined.
void seccomp_enter_or_abort(enum seccomp_thread thread, enum seccomp_mode mode);

// The program itself, for tests. Returns its length, at most SECCOMP_PROGRAM_MAX.
enum { SECCOMP_PROGRAM_MAX = 1024 };
unsigned seccomp_program(enum seccomp_thread thread, enum seccomp_mode mode,
                         struct sock_filter program[SECCOMP_PROGRAM_MAX]);
