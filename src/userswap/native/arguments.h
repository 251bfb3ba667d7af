/* Functions of libc that hand memory to the kernel as it is: paths, addresses, structs that it fills in.
 *
 * One wrapper serves them all, since their arguments are words: what of them points into swapped memory is pinned for
 * the call. Words that a function does not have are whatever the registers hold, so at worst a folio is pinned that
 * need not be. Functions with a floating-point argument, or with more than six, can't be here.
 */
#ifndef USERSWAP_NATIVE_ARGUMENTS_H
#define USERSWAP_NATIVE_ARGUMENTS_H

#define US_BY_ADDRESS(X) \
    X(open) X(open64) X(__open_2) X(__open64_2) X(openat) X(openat64) X(creat) X(creat64) X(fopen) X(fopen64) \
    X(freopen) X(freopen64) X(opendir) X(mkstemp) X(mkstemp64) X(mkdtemp) X(shm_open) X(memfd_create) \
    X(stat) X(stat64) X(lstat) X(lstat64) X(fstat) X(fstat64) X(fstatat) X(fstatat64) X(statx) \
    X(__xstat) X(__xstat64) X(__lxstat) X(__lxstat64) X(__fxstat) X(__fxstat64) X(__fxstatat) X(__fxstatat64) \
    X(statfs) X(statfs64) X(fstatfs) X(fstatfs64) X(statvfs) X(statvfs64) X(fstatvfs) X(fstatvfs64) \
    X(access) X(faccessat) X(readlink) X(readlinkat) X(realpath) X(getcwd) X(chdir) X(mkdir) X(mkdirat) X(rmdir) \
    X(unlink) X(unlinkat) X(remove) X(rename) X(renameat) X(renameat2) X(link) X(linkat) X(symlink) X(symlinkat) \
    X(chmod) X(fchmodat) X(chown) X(lchown) X(fchownat) X(truncate) X(truncate64) X(utimes) X(utimensat) X(futimens) \
    X(getxattr) X(lgetxattr) X(fgetxattr) X(setxattr) X(lsetxattr) X(fsetxattr) X(listxattr) X(llistxattr) \
    X(flistxattr) X(removexattr) X(lremovexattr) X(fremovexattr) \
    X(bind) X(connect) X(accept) X(accept4) X(getsockname) X(getpeername) X(getsockopt) X(setsockopt) X(socketpair) \
    X(poll) X(__poll_chk) X(ppoll) X(select) X(pselect) X(epoll_ctl) X(epoll_wait) X(epoll_pwait) \
    X(pipe) X(pipe2) X(ioctl) X(fcntl) X(fcntl64) X(getdents64) X(sendfile) X(sendfile64) X(splice) X(copy_file_range) \
    X(waitpid) X(wait4) X(getrusage) X(getgroups) X(sched_getaffinity) X(sched_setaffinity) X(nanosleep) \
    X(inotify_add_watch) X(timerfd_settime)

typedef long (*us_six_fn)(long, long, long, long, long, long);

/* Given by syscalls.pyx: calls `function` with what is ours among the arguments pinned. */
static long (*us_pinned_call)(us_six_fn function, long *arguments);

#define US_WRAPPER(name) \
    static us_six_fn us_real_##name; \
    static long us_arguments_##name(long a, long b, long c, long d, long e, long f) { \
        return us_pinned_call(us_real_##name, (long[6]){a, b, c, d, e, f}); \
    }
US_BY_ADDRESS(US_WRAPPER)

#define US_ROW(name) {#name, (void *)us_arguments_##name, &us_real_##name},
static struct us_by_address {
    const char *name;
    void *wrapper;
    us_six_fn *real;
} us_by_address[] = {US_BY_ADDRESS(US_ROW)};

enum { US_BY_ADDRESS_COUNT = sizeof us_by_address / sizeof us_by_address[0] };
static void us_use_pinned_call(long (*call)(us_six_fn function, long *arguments)) { us_pinned_call = call; }

#endif
