"""System calls on swapped memory: wrappers around libc's I/O calls, and the first place for SIGBUS.

What lives here: (1) the wrappers, which pin a buffer while the kernel works on it; (2) the chain of
SIGBUS handlers; (3) dlopen, dlsym and the patching of import tables that puts all of them in place.
Touches the program's memory only as the wrapped call itself would, the import tables of loaded
libraries, and the process's SIGBUS action. Knows regions only through PinOps.

Our own imports are never patched, so a plain ``read`` in this file is libc's (or that of whoever
interposes it by LD_PRELOAD, who thereby stays in force).

Limits, which docs/architecture.md repeats:

- Calls that are not made through an import table are not seen: raw ``syscall()``, io_uring, Go, libraries
  in another namespace (``dlmopen``), and what libc itself does on a buffer it was given by other means
  (``fprintf`` of a huge string), and a function whose address somebody took with ``dlsym`` before we
  were installed. They get EFAULT while the buffer is swapped.
- A chunked transfer is not one system call: other writers of the same file, or readers of it, may come
  between chunks, and a signal that interrupts it between chunks leaves a partial count, as it also may
  without us. SO_RCVTIMEO holds for each chunk.
- Wrappers are as safe in an asynchronous signal handler as the call itself while the buffer is ordinary
  memory. With a swapped buffer the handler must not have interrupted the pinning code. A thread that is
  cancelled inside a wrapped call leaves its buffer pinned.
- An iovec array or msghdr at an invalid address is read by us, so it ends in SIGSEGV, not in EFAULT.
"""
from libc.errno cimport EBADF, EFAULT, EINVAL, EIO, ENOBUFS, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport FILE, snprintf
from libc.string cimport memcpy, memset, strchr, strcmp, strlen, strncmp, strrchr

from typing import NamedTuple

from userswap.native.descriptors cimport DESCRIPTORS, descriptor_guarded
from userswap.native.mman cimport (
    MADV_DONTNEED, MADV_DONTNEED_LOCKED, MADV_FREE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, madvise,
)
from userswap.native.us cimport (
    us_load, us_load_ptr, us_lock, us_mutex, us_now, us_or, us_store, us_store_ptr, us_unlock,
)


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t readv(int, const iovec*, int)
    ssize_t writev(int, const iovec*, int)
    ssize_t preadv64(int, const iovec*, int, int64_t)
    ssize_t pwritev64(int, const iovec*, int, int64_t)
    ssize_t preadv64v2(int, const iovec*, int, int64_t, int)
    ssize_t pwritev64v2(int, const iovec*, int, int64_t, int)

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void*, size_t)
    ssize_t write(int, const void*, size_t)
    ssize_t pread64(int, void*, size_t, int64_t)
    ssize_t pwrite64(int, const void*, size_t, int64_t)
    int access(const char*, int)
    int close(int)
    int execve(const char*, char**, char**)
    int execv(const char*, char**)
    int execvp(const char*, char**)
    int execvpe(const char*, char**, char**)
    int fexecve(int, char**, char**)
    int getpid()
    char** environ
    int getentropy(void*, size_t)
    long syscall(long, ...)
    long sysconf(int)
    enum:
        _SC_PAGESIZE

cdef extern from "<spawn.h>" nogil:
    int posix_spawn(int*, const char*, const void*, const void*, char**, char**)
    int posix_spawnp(int*, const char*, const void*, const void*, char**, char**)

cdef extern from "arguments.h" nogil:
    enum:
        US_BY_ADDRESS_COUNT
    ctypedef long (*us_six_fn)(long, long, long, long, long, long) noexcept nogil
    struct us_by_address_t "us_by_address":
        const char* name
        void* wrapper
        us_six_fn* real
    us_by_address_t* us_by_address
    void use_pinned_call "us_use_pinned_call"(long (*)(us_six_fn, long*) noexcept nogil)

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void*, size_t, unsigned int)

cdef extern from "<sys/stat.h>" nogil:
    struct stat_t "stat":
        unsigned int st_mode
    int fstat(int, stat_t*)
    bint S_ISREG(unsigned int)
    bint S_ISBLK(unsigned int)
    bint S_ISSOCK(unsigned int)

cdef extern from "<stdio.h>" nogil:
    size_t fread(void*, size_t, size_t, FILE*)
    size_t fwrite(const void*, size_t, size_t, FILE*)
    size_t fread_unlocked(void*, size_t, size_t, FILE*)
    size_t fwrite_unlocked(const void*, size_t, size_t, FILE*)
    FILE* stdout
    enum:
        BUFSIZ
        EOF
        _IOFBF
        _IONBF
    int fputs(const char*, FILE*)
    int puts(const char*)
    int setvbuf(FILE*, char*, int, size_t)
    void flockfile(FILE*)
    void funlockfile(FILE*)

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    struct sockaddr_storage:
        pass
    struct msghdr:
        void* msg_name
        socklen_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    enum:
        SOL_SOCKET
        SO_TYPE
        SOCK_STREAM
        MSG_PEEK
        MSG_OOB
        MSG_WAITALL
        MSG_DONTWAIT
        MSG_WAITFORONE
    ssize_t recv(int, void*, size_t, int)
    ssize_t recvfrom(int, void*, size_t, int, void*, socklen_t*)
    ssize_t recvmsg(int, msghdr*, int)
    ssize_t send(int, const void*, size_t, int)
    ssize_t sendto(int, const void*, size_t, int, const void*, socklen_t)
    ssize_t sendmsg(int, const msghdr*, int)
    int recvmmsg(int, mmsghdr*, unsigned int, int, void*)
    int sendmmsg(int, mmsghdr*, unsigned int, int)
    int getsockopt(int, int, int, void*, socklen_t*)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

ctypedef void (*sighandler_t)(int) noexcept nogil

cdef extern from "<signal.h>" nogil:
    enum:
        SIGABRT
        SIGBUS
        SIGFPE
        SIGILL
        SIGSEGV
        SIGTRAP
        SIG_BLOCK
        SIG_SETMASK
        SIG_UNBLOCK
        SA_NODEFER
        SA_RESETHAND
        SA_RESTART
        SA_SIGINFO
        BUS_MCEERR_AO
    ctypedef struct stack_t:
        void* ss_sp
        int ss_flags
        size_t ss_size
    enum:
        SS_DISABLE
    int sigaltstack(const stack_t*, stack_t*)
    sighandler_t SIG_DFL
    sighandler_t SIG_IGN
    sighandler_t SIG_ERR
    int real_sigaction "sigaction"(int, const sigaction*, sigaction*)
    sighandler_t real_signal "signal"(int, sighandler_t)
    sighandler_t __sysv_signal(int, sighandler_t)
    int sigprocmask(int, const sigset_t*, sigset_t*)
    int pthread_sigmask(int, const sigset_t*, sigset_t*)
    int sigemptyset(sigset_t*)
    int sigfillset(sigset_t*)
    int sigaddset(sigset_t*, int)
    int sigdelset(sigset_t*, int)
    int sigismember(const sigset_t*, int)

cdef extern from "<ucontext.h>" nogil:
    ctypedef struct ucontext_t:
        sigset_t uc_sigmask

cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*)() noexcept nogil, void (*)() noexcept nogil, void (*)() noexcept nogil)
    int pthread_attr_setstack(void*, void*, size_t)

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
    int mprotect(void*, size_t, int)

cdef extern from "<dlfcn.h>" nogil:
    ctypedef struct Dl_info:
        const char* dli_fname
    ctypedef struct Dl_serpath:
        char* dls_name
    ctypedef struct Dl_serinfo:
        size_t dls_size
        unsigned int dls_cnt
        Dl_serpath dls_serpath[1]
    enum:
        RTLD_NOLOAD
        RTLD_DL_LINKMAP
        RTLD_DI_SERINFO
        RTLD_DI_SERINFOSIZE
        RTLD_DI_ORIGIN
        LM_ID_BASE
    void* RTLD_DEFAULT
    void* RTLD_NEXT
    void* dlopen(const char*, int)
    void* dlmopen(long, const char*, int)
    void* dlsym(void*, const char*)
    void* dlvsym(void*, const char*, const char*)
    int dladdr(const void*, Dl_info*)
    int dladdr1(const void*, Dl_info*, void**, int)
    int dlinfo(void*, int, void*)

cdef extern from "<link.h>" nogil:
    enum:
        PT_LOAD
        PT_DYNAMIC
        PT_GNU_RELRO
        PF_W
        DT_NULL
        DT_JMPREL
        DT_PLTREL
        DT_PLTRELSZ
        DT_RELA
        DT_RELASZ
        DT_STRTAB
        DT_SYMTAB
    ctypedef struct Phdr "Elf64_Phdr":
        uint32_t p_type
        uint32_t p_flags
        uint64_t p_vaddr
        uint64_t p_memsz
    ctypedef struct DynUnion "__typeof__(((Elf64_Dyn *)0)->d_un)":
        uint64_t d_val
        uint64_t d_ptr
    ctypedef struct Dyn "Elf64_Dyn":
        int64_t d_tag
        DynUnion d_un
    ctypedef struct Rela "Elf64_Rela":
        uint64_t r_offset
        uint64_t r_info
        int64_t r_addend
    ctypedef struct Sym "Elf64_Sym":
        uint32_t st_name
        uint16_t st_shndx
    struct dl_phdr_info:
        uint64_t dlpi_addr
        const char* dlpi_name
        const Phdr* dlpi_phdr
        unsigned short dlpi_phnum
        unsigned long long dlpi_adds
        unsigned long long dlpi_subs
    int dl_iterate_phdr(int (*)(dl_phdr_info*, size_t, void*) noexcept nogil, void*)

cdef extern from * nogil:
    """
    #include <dlfcn.h>
    #include <errno.h>
    #include <limits.h>
    #include <link.h>
    #include <signal.h>
    #include <stdio.h>
    #include <sys/socket.h>

    #if !defined(__GLIBC__)
    #error "userswap patches glibc's import tables; other C libraries are not supported yet"
    #endif
    #if defined(__x86_64__)
    #define US_R_ABS R_X86_64_64
    #define US_R_GOT R_X86_64_GLOB_DAT
    #define US_R_PLT R_X86_64_JUMP_SLOT
    #elif defined(__aarch64__)
    #define US_R_ABS R_AARCH64_ABS64
    #define US_R_GOT R_AARCH64_GLOB_DAT
    #define US_R_PLT R_AARCH64_JUMP_SLOT
    #else
    #error "userswap runs on x86-64 and aarch64"
    #endif
    #ifndef MSG_ZEROCOPY
    #define MSG_ZEROCOPY 0x4000000
    #endif
    #ifndef SYS_close_range
    #define SYS_close_range 436
    #endif
    #ifndef RWF_ATOMIC
    #define RWF_ATOMIC 0x40
    #endif

    /* Cython cannot assign to a macro. */
    static inline void us_set_errno(int value) { errno = value; }

    extern void __chk_fail(void) __attribute__((noreturn));

    /* The error flag of a stream: without it a caller could not tell a pin that failed from the end
       of the file. stdio.h's own macros use this bit. */
    static void us_stream_failed(FILE *stream) { stream->_flags |= 0x0020; }

    /* dlsym must leave by a jump, not a call: glibc looks at its return address to learn who asks
       (RTLD_NEXT, RTLD_DEFAULT), and the answer has to be the program's library, not ours. */
    #if defined(__has_attribute)
    #if __has_attribute(musttail)
    #define US_JUMP __attribute__((musttail))
    #endif
    #endif
    #ifndef US_JUMP
    #define US_JUMP
    #endif
    #if defined(__GNUC__) && !defined(__clang__)
    #define US_JUMPS __attribute__((noinline, optimize("O2")))
    #else
    #define US_JUMPS __attribute__((noinline))
    #endif
    typedef void *(*us_named_fn)(void *library, const char *name);
    static us_named_fn us_named;
    static void us_use_named(us_named_fn function) { us_named = function; }
    US_JUMPS static void *us_dlsym(void *library, const char *name) {
        void *wrapper = us_named(library, name);
        if (wrapper) return wrapper;
        US_JUMP return dlsym(library, name);
    }
    US_JUMPS static void *us_dlvsym(void *library, const char *name, const char *version) {
        void *wrapper = us_named(library, name);
        if (wrapper) return wrapper;
        US_JUMP return dlvsym(library, name, version);
    }
    """
    enum:
        US_R_ABS
        US_R_GOT
        US_R_PLT
        MSG_ZEROCOPY
        RWF_ATOMIC
        IOV_MAX
        PATH_MAX
        SYS_tgkill
        SYS_gettid
        SYS_close_range
    void set_errno "us_set_errno"(int value)
    void __chk_fail()
    void us_stream_failed(FILE* stream)
    ctypedef void* (*us_named_fn)(void* library, const char* name) noexcept nogil
    void use_named "us_use_named"(us_named_fn function)
    void* us_dlsym(void* library, const char* name)
    void* us_dlvsym(void* library, const char* name, const char* version)
    void* return_address "__builtin_return_address"(unsigned int level)


# ---- pins ---------------------------------------------------------------------------------------

cdef bint nothing_is_ours(const void* start, size_t length) noexcept nogil:
    return False

cdef int64_t pin_nothing(void* start, size_t length, bint writing) noexcept nogil:
    return <int64_t>length

cdef void unpin_nothing(void* start, size_t length) noexcept nogil:
    pass

cdef void discard_nothing(void* start, size_t length) noexcept nogil:
    pass

cdef PinOps no_ops
no_ops.ours = nothing_is_ours
no_ops.pin = pin_nothing
no_ops.unpin = unpin_nothing
no_ops.discard = discard_nothing
cdef const PinOps* ops = &no_ops

# Pins all of a range that may not be split, prefix after prefix. 0 or -errno, with nothing pinned.
cdef int pin_whole(void* start, size_t length, bint writing) noexcept nogil:
    cdef size_t have = 0
    cdef int64_t got
    while have < length:
        got = ops.pin(<char*>start + have, length - have, writing)
        if got <= 0:
            if have:
                ops.unpin(start, have)
            return <int>got if got < 0 else -EIO
        have += <size_t>got
    return 0


# ---- the engine: one transfer over parts, in windows of pinned memory --------------------------------

cdef enum:
    K_READ
    K_PREAD
    K_PREAD2
    K_WRITE
    K_PWRITE
    K_PWRITE2
    K_RECV
    K_SEND
    K_RANDOM

cdef enum:
    ONE         # one call; a short count is allowed, waiting for more is not
    ALL         # call after call until everything is done or a call comes back short
    WHOLE       # one call on everything: the buffer is one message

cdef enum:
    CLOSE_RANGE_CLOEXEC = 4
    PARTS = 1024                # the kernel's UIO_MAXIOV: one window always holds every part
    SMALL = 65536               # up to here everything is pinned at once and the plan does not matter
    STREAM_MOST = 1048576       # one chunk to or from a pipe, terminal or stream socket
    FILE_MOST = 8388608         # one chunk of a regular file; more would only hold more memory
    DATAGRAM_MOST = 1048576     # longest datagram that is received whole into a longer swapped buffer
    TRANSFER_MOST = 0x7FFFF000  # the kernel's MAX_RW_COUNT: no call moves more than this

cdef struct Io:
    int kind
    int fd
    int flags
    int64_t offset
    msghdr* message             # K_RECV, K_SEND: a copy that is ours to change
    socklen_t name_length
    size_t control_length

cdef ssize_t issue(Io* io, iovec* window, int parts, bint first, bint last) noexcept nogil:
    cdef int flags = io.flags
    cdef void* base = window[0].iov_base
    cdef size_t length = window[0].iov_len
    if io.kind == K_READ:
        return read(io.fd, base, length) if parts == 1 else readv(io.fd, window, parts)
    if io.kind == K_WRITE:
        return write(io.fd, base, length) if parts == 1 else writev(io.fd, window, parts)
    if io.kind == K_PREAD:
        if parts == 1:
            return pread64(io.fd, base, length, io.offset)
        return preadv64(io.fd, window, parts, io.offset)
    if io.kind == K_PWRITE:
        if parts == 1:
            return pwrite64(io.fd, base, length, io.offset)
        return pwritev64(io.fd, window, parts, io.offset)
    if io.kind == K_PREAD2:
        return preadv64v2(io.fd, window, parts, io.offset, flags)
    if io.kind == K_PWRITE2:
        return pwritev64v2(io.fd, window, parts, io.offset, flags)
    if io.kind == K_RANDOM:
        return getrandom(base, length, <unsigned int>flags)
    io.message.msg_iov = window
    io.message.msg_iovlen = <size_t>parts
    if io.kind == K_RECV:
        io.message.msg_namelen = io.name_length
        io.message.msg_controllen = io.control_length
        return recvmsg(io.fd, io.message, flags)
    if not first:
        # Address and descriptors went with the first bytes.
        io.message.msg_name = NULL
        io.message.msg_namelen = 0
        io.message.msg_control = NULL
        io.message.msg_controllen = 0
    if not last:
        flags &= ~MSG_OOB       # only the very last byte is urgent
    return sendmsg(io.fd, io.message, flags)

cdef bint is_stream(int fd) noexcept nogil:
    cdef int type = 0
    cdef socklen_t length = sizeof(int)
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) != 0 or type == SOCK_STREAM

# How a transfer of more than SMALL bytes may be cut: at least / at most so many bytes a call.
cdef int plan(Io* io, bint writing, size_t total, size_t* least, size_t* most) noexcept nogil:
    cdef stat_t status
    least[0] = SMALL
    most[0] = STREAM_MOST
    if io.kind == K_RANDOM:
        return ALL
    if io.kind == K_RECV:
        if is_stream(io.fd):
            return ALL if io.flags & MSG_WAITALL and not io.flags & MSG_PEEK else ONE
        least[0] = DATAGRAM_MOST
        most[0] = DATAGRAM_MOST
        return ONE
    if io.kind == K_SEND:
        if is_stream(io.fd):
            return ALL
        least[0] = total
        most[0] = total
        return WHOLE
    if fstat(io.fd, &status) != 0:
        return ONE              # the call itself will say what is wrong
    if S_ISREG(status.st_mode) or S_ISBLK(status.st_mode):
        most[0] = FILE_MOST
        least[0] = 0
        if not writing and io.flags & RWF_ATOMIC and io.kind == K_PWRITE2:
            least[0] = total
            most[0] = total
            return WHOLE
        return ALL
    if S_ISSOCK(status.st_mode) and not is_stream(io.fd):
        least[0] = DATAGRAM_MOST if writing else total
        most[0] = least[0]
        return ONE if writing else WHOLE
    # Pipes, terminals, stream sockets, devices: reading returns what has come; a blocking write goes
    # on to the end, and one that does not block stops at EAGAIN with a partial count.
    return ONE if writing else ALL

cdef void release(iovec* window, uint8_t* own, int n) noexcept nogil:
    cdef int kept = errno, i
    for i in range(n):
        if own[i]:
            ops.unpin(window[i].iov_base, window[i].iov_len)
    set_errno(kept)

# Does what `io` says on all parts. `writing`: the kernel writes to the parts. The count, or -1 and errno.
cdef ssize_t transfer(Io* io, const iovec* parts, int count, size_t total, bint writing) noexcept nogil:
    cdef iovec window[PARTS]
    cdef uint8_t own[PARTS]
    cdef size_t left = total if total < TRANSFER_MOST else TRANSFER_MOST
    cdef size_t done = 0, least, most, have, length, ask, at = 0, next_at
    cdef int how, i = 0, next_i, n, error
    cdef char* base
    cdef int64_t got
    cdef ssize_t result
    if left <= SMALL:
        how = WHOLE
        least = left
        most = left
    else:
        how = plan(io, writing, left, &least, &most)
    while True:
        if least > left:
            least = left
        n = 0
        have = 0
        error = 0
        next_i = i
        next_at = at
        window[0].iov_base = NULL
        window[0].iov_len = 0
        while next_i < count and have < left and have < most:
            base = <char*>parts[next_i].iov_base + next_at
            length = parts[next_i].iov_len - next_at
            if length > left - have:
                length = left - have
            if length == 0:
                next_i += 1
                next_at = 0
                continue
            if not ops.ours(base, length):
                window[n].iov_base = base
                window[n].iov_len = length
                own[n] = 0
                n += 1
                have += length
                next_i += 1
                next_at = 0
                continue
            ask = length if length < most - have else most - have
            got = 0
            # One entry a part: a second prefix of the same part lengthens its entry.
            window[n].iov_base = base
            window[n].iov_len = 0
            own[n] = 1
            while window[n].iov_len < ask:
                got = ops.pin(base + window[n].iov_len, ask - window[n].iov_len, writing)
                if got <= 0:
                    error = <int>-got if got < 0 else EIO
                    break
                window[n].iov_len += <size_t>got
                if have + window[n].iov_len >= least:
                    break
            have += window[n].iov_len
            if window[n].iov_len == length:
                next_i += 1
                next_at = 0
                n += 1
                continue
            next_at += window[n].iov_len
            if window[n].iov_len:
                n += 1
            break
        if error and (have == 0 or (have < least and how != ALL)):
            release(window, own, n)
            if done:
                return <ssize_t>done
            set_errno(error)
            return -1
        result = issue(io, window, n if n else 1, done == 0, have == left)
        release(window, own, n)
        if result < 0:
            if done == 0:
                return -1
            if io.kind == K_RECV:
                io.message.msg_controllen = 0
            return <ssize_t>done
        done += <size_t>result
        left -= <size_t>result
        if how != ALL or left == 0 or <size_t>result < have:
            return <ssize_t>done
        if io.kind == K_RECV and io.message.msg_controllen != 0:
            return <ssize_t>done        # the next call would overwrite the control messages
        if io.kind == K_PREAD or io.kind == K_PWRITE or io.offset != -1:
            io.offset += result         # -1 in preadv2: the file's own position
        i = next_i
        at = next_at

cdef ssize_t transfer_one(int kind, int fd, void* buffer, size_t length, int64_t offset, int flags,
                          bint writing) noexcept nogil:
    cdef Io io
    cdef iovec part
    io.kind = kind
    io.fd = fd
    io.flags = flags
    io.offset = offset
    io.message = NULL
    part.iov_base = buffer
    part.iov_len = length
    return transfer(&io, &part, 1, length, writing)

# Whether a vector needs us: 0, or 1 with the sum of its lengths. A vector that the kernel would refuse
# (too many parts, a sum beyond ssize_t) is the kernel's to refuse.
cdef bint vector_ours(const iovec* parts, size_t count, size_t* total) noexcept nogil:
    cdef size_t i, sum = 0
    cdef bint any = False
    total[0] = 0
    if count == 0 or count > PARTS or parts == NULL:
        return False
    any = ops.ours(parts, count * sizeof(iovec))
    for i in range(count):
        if parts[i].iov_len > <size_t>0x7FFFFFFFFFFFFFFF - sum:
            return False
        sum += parts[i].iov_len
        any = any or ops.ours(parts[i].iov_base, parts[i].iov_len)
    total[0] = sum
    return any

cdef ssize_t transfer_vector(int kind, int fd, const iovec* parts, int count, size_t total, int64_t offset,
                             int flags, bint writing) noexcept nogil:
    cdef Io io
    io.kind = kind
    io.fd = fd
    io.flags = flags
    io.offset = offset
    io.message = NULL
    return transfer(&io, parts, count, total, writing)


# ---- wrappers: files ----------------------------------------------------------------------------

cdef ssize_t w_read(int fd, void* buffer, size_t length) noexcept nogil:
    if not ops.ours(buffer, length) or <ssize_t>length < 0:
        return read(fd, buffer, length)
    return transfer_one(K_READ, fd, buffer, length, 0, 0, True)

cdef ssize_t w_write(int fd, const void* buffer, size_t length) noexcept nogil:
    if not ops.ours(buffer, length) or <ssize_t>length < 0:
        return write(fd, buffer, length)
    return transfer_one(K_WRITE, fd, <void*>buffer, length, 0, 0, False)

cdef ssize_t w_pread(int fd, void* buffer, size_t length, int64_t offset) noexcept nogil:
    if not ops.ours(buffer, length) or <ssize_t>length < 0:
        return pread64(fd, buffer, length, offset)
    return transfer_one(K_PREAD, fd, buffer, length, offset, 0, True)

cdef ssize_t w_pwrite(int fd, const void* buffer, size_t length, int64_t offset) noexcept nogil:
    if not ops.ours(buffer, length) or <ssize_t>length < 0:
        return pwrite64(fd, buffer, length, offset)
    return transfer_one(K_PWRITE, fd, <void*>buffer, length, offset, 0, False)

cdef ssize_t w_readv(int fd, const iovec* parts, int count) noexcept nogil:
    cdef size_t total
    if count < 0 or not vector_ours(parts, <size_t>count, &total):
        return readv(fd, parts, count)
    return transfer_vector(K_READ, fd, parts, count, total, 0, 0, True)

cdef ssize_t w_writev(int fd, const iovec* parts, int count) noexcept nogil:
    cdef size_t total
    if count < 0 or not vector_ours(parts, <size_t>count, &total):
        return writev(fd, parts, count)
    return transfer_vector(K_WRITE, fd, parts, count, total, 0, 0, False)

cdef ssize_t w_preadv(int fd, const iovec* parts, int count, int64_t offset) noexcept nogil:
    cdef size_t total
    if count < 0 or not vector_ours(parts, <size_t>count, &total):
        return preadv64(fd, parts, count, offset)
    return transfer_vector(K_PREAD, fd, parts, count, total, offset, 0, True)

cdef ssize_t w_pwritev(int fd, const iovec* parts, int count, int64_t offset) noexcept nogil:
    cdef size_t total
    if count < 0 or not vector_ours(parts, <size_t>count, &total):
        return pwritev64(fd, parts, count, offset)
    return transfer_vector(K_PWRITE, fd, parts, count, total, offset, 0, False)

cdef ssize_t w_preadv2(int fd, const iovec* parts, int count, int64_t offset, int flags) noexcept nogil:
    cdef size_t total
    if count < 0 or not vector_ours(parts, <size_t>count, &total):
        return preadv64v2(fd, parts, count, offset, flags)
    return transfer_vector(K_PREAD2, fd, parts, count, total, offset, flags, True)

cdef ssize_t w_pwritev2(int fd, const iovec* parts, int count, int64_t offset, int flags) noexcept nogil:
    cdef size_t total
    if count < 0 or not vector_ours(parts, <size_t>count, &total):
        return pwritev64v2(fd, parts, count, offset, flags)
    return transfer_vector(K_PWRITE2, fd, parts, count, total, offset, flags, False)

# The fortified variants: what the compiler knows of the buffer's size is checked first, as libc does.
cdef ssize_t w_read_chk(int fd, void* buffer, size_t length, size_t size) noexcept nogil:
    if length > size:
        __chk_fail()
    return w_read(fd, buffer, length)

cdef ssize_t w_pread_chk(int fd, void* buffer, size_t length, int64_t offset, size_t size) noexcept nogil:
    if length > size:
        __chk_fail()
    return w_pread(fd, buffer, length, offset)


# ---- wrappers: streams --------------------------------------------------------------------------

# Bytes of one item times items: 0 when there is nothing to do or no such number (libc then decides).
cdef inline size_t items_bytes(size_t size, size_t count) noexcept nogil:
    if size == 0 or count == 0 or count > (<size_t>0x7FFFFFFFFFFFFFFF) / size:
        return 0
    return size * count

# Bytes moved, in chunks under the stream's lock as it is. A stream keeps its own position by bytes, so
# reading bytes and dividing by the item size gives the same count and position as libc's own loop.
cdef size_t stream_bytes(char* buffer, size_t total, FILE* stream, bint writing) noexcept nogil:
    cdef size_t done = 0, moved
    cdef int64_t got
    cdef int kept
    while done < total:
        got = ops.pin(buffer + done, total - done if total - done < FILE_MOST else FILE_MOST, writing)
        if got <= 0:
            us_stream_failed(stream)
            set_errno(<int>-got if got < 0 else EIO)
            break
        if writing:
            moved = fread_unlocked(buffer + done, 1, <size_t>got, stream)
        else:
            moved = fwrite_unlocked(buffer + done, 1, <size_t>got, stream)
        kept = errno
        ops.unpin(buffer + done, <size_t>got)
        set_errno(kept)
        done += moved
        if moved < <size_t>got:
            break
    return done

cdef size_t w_fread_unlocked(void* buffer, size_t size, size_t count, FILE* stream) noexcept nogil:
    cdef size_t total = items_bytes(size, count), done
    if not ops.ours(buffer, total):
        return fread_unlocked(buffer, size, count, stream)
    done = stream_bytes(<char*>buffer, total, stream, True)
    return count if done == total else done / size

cdef size_t w_fread(void* buffer, size_t size, size_t count, FILE* stream) noexcept nogil:
    cdef size_t total = items_bytes(size, count), done
    if not ops.ours(buffer, total):
        return fread(buffer, size, count, stream)
    flockfile(stream)
    done = stream_bytes(<char*>buffer, total, stream, True)
    funlockfile(stream)
    return count if done == total else done / size

cdef size_t w_fwrite_unlocked(const void* buffer, size_t size, size_t count, FILE* stream) noexcept nogil:
    cdef size_t total = items_bytes(size, count), done
    if not ops.ours(buffer, total):
        return fwrite_unlocked(buffer, size, count, stream)
    done = stream_bytes(<char*>buffer, total, stream, False)
    return count if done == total else done / size

cdef size_t w_fwrite(const void* buffer, size_t size, size_t count, FILE* stream) noexcept nogil:
    cdef size_t total = items_bytes(size, count), done
    if not ops.ours(buffer, total):
        return fwrite(buffer, size, count, stream)
    flockfile(stream)
    done = stream_bytes(<char*>buffer, total, stream, False)
    funlockfile(stream)
    return count if done == total else done / size

cdef size_t w_fread_chk(void* buffer, size_t room, size_t size, size_t count, FILE* stream) noexcept nogil:
    if size != 0 and count > room / size:
        __chk_fail()
    return w_fread(buffer, size, count, stream)

cdef size_t w_fread_unlocked_chk(void* buffer, size_t room, size_t size, size_t count,
                                 FILE* stream) noexcept nogil:
    if size != 0 and count > room / size:
        __chk_fail()
    return w_fread_unlocked(buffer, size, count, stream)


# ---- wrappers: sockets --------------------------------------------------------------------------

# Every swapped socket call goes through sendmsg or recvmsg on a message of ours.
# Addresses are short and copied, so that ordinary loads and stores fault them in; the kernel cuts them at
# the size of sockaddr_storage, and so do we. Control messages may be long and are pinned.
cdef ssize_t send_message(int fd, const msghdr* given, int flags, size_t total) noexcept nogil:
    cdef Io io
    cdef msghdr message = given[0]
    cdef sockaddr_storage name
    cdef void* control = NULL
    cdef size_t control_length = message.msg_controllen
    cdef ssize_t result
    cdef int error, kept
    if flags & MSG_ZEROCOPY:
        # The kernel would go on reading the pages after the pin is gone. ENOBUFS is what a program that
        # asks for zero copies has to expect, and answers by copying.
        set_errno(ENOBUFS)
        return -1
    if message.msg_name != NULL and ops.ours(message.msg_name, message.msg_namelen):
        if message.msg_namelen > sizeof(sockaddr_storage):
            message.msg_namelen = sizeof(sockaddr_storage)
        memcpy(&name, message.msg_name, message.msg_namelen)
        message.msg_name = &name
    if message.msg_control != NULL and ops.ours(message.msg_control, control_length):
        control = message.msg_control
        error = pin_whole(control, control_length, False)
        if error:
            set_errno(-error)
            return -1
    io.kind = K_SEND
    io.fd = fd
    io.flags = flags
    io.offset = 0
    io.message = &message
    result = transfer(&io, given.msg_iov, <int>given.msg_iovlen, total, False)
    if control != NULL:
        kept = errno
        ops.unpin(control, control_length)
        set_errno(kept)
    return result

cdef ssize_t receive_message(int fd, msghdr* given, int flags, size_t total) noexcept nogil:
    cdef Io io
    cdef msghdr message = given[0]
    cdef sockaddr_storage name
    cdef void* control = NULL
    cdef size_t control_length = message.msg_controllen
    cdef socklen_t room = message.msg_namelen
    cdef ssize_t result
    cdef int error, kept
    if message.msg_name != NULL and ops.ours(message.msg_name, room):
        if room > sizeof(sockaddr_storage):
            room = sizeof(sockaddr_storage)
        message.msg_name = &name
    if message.msg_control != NULL and ops.ours(message.msg_control, control_length):
        control = message.msg_control
        error = pin_whole(control, control_length, True)
        if error:
            set_errno(-error)
            return -1
    io.kind = K_RECV
    io.fd = fd
    io.flags = flags
    io.offset = 0
    io.message = &message
    io.name_length = room
    io.control_length = control_length
    result = transfer(&io, given.msg_iov, <int>given.msg_iovlen, total, True)
    kept = errno
    if control != NULL:
        ops.unpin(control, control_length)
    if result >= 0:
        if message.msg_name == &name:
            memcpy(given.msg_name, &name, room if room < message.msg_namelen else message.msg_namelen)
        given.msg_namelen = message.msg_namelen
        given.msg_controllen = message.msg_controllen
        given.msg_flags = message.msg_flags
    set_errno(kept)
    return result

# Whether a message needs us, as vector_ours.
cdef bint message_ours(const msghdr* message, size_t* total) noexcept nogil:
    cdef bint any
    if message == NULL or message.msg_iovlen > PARTS or <int>message.msg_namelen < 0:
        return False
    any = vector_ours(message.msg_iov, message.msg_iovlen, total)
    return (any or ops.ours(message, sizeof(msghdr))
            or ops.ours(message.msg_name, message.msg_namelen)
            or ops.ours(message.msg_control, message.msg_controllen))

cdef void message_make(msghdr* message, iovec* part, void* buffer, size_t length, void* name,
                       socklen_t name_length) noexcept nogil:
    memset(message, 0, sizeof(msghdr))
    part.iov_base = buffer
    part.iov_len = length
    message.msg_iov = part
    message.msg_iovlen = 1
    message.msg_name = name
    message.msg_namelen = name_length

cdef ssize_t w_recv(int fd, void* buffer, size_t length, int flags) noexcept nogil:
    cdef msghdr message
    cdef iovec part
    if not ops.ours(buffer, length) or <ssize_t>length < 0:
        return recv(fd, buffer, length, flags)
    message_make(&message, &part, buffer, length, NULL, 0)
    return receive_message(fd, &message, flags, length)

cdef ssize_t w_recvfrom(int fd, void* buffer, size_t length, int flags, void* name,
                        socklen_t* name_length) noexcept nogil:
    cdef msghdr message
    cdef iovec part
    cdef ssize_t result
    cdef socklen_t room = 0
    if not (ops.ours(buffer, length) or (name_length != NULL and (ops.ours(name_length, sizeof(socklen_t))
            or ops.ours(name, name_length[0])))) or <ssize_t>length < 0:
        return recvfrom(fd, buffer, length, flags, name, name_length)
    if name != NULL:
        if name_length == NULL or <int>name_length[0] < 0:
            set_errno(EFAULT if name_length == NULL else EINVAL)
            return -1
        room = name_length[0]
    message_make(&message, &part, buffer, length, name, room)
    result = receive_message(fd, &message, flags, length)
    if result >= 0 and name != NULL:
        name_length[0] = message.msg_namelen
    return result

cdef ssize_t w_recvmsg(int fd, msghdr* message, int flags) noexcept nogil:
    cdef size_t total
    if not message_ours(message, &total):
        return recvmsg(fd, message, flags)
    return receive_message(fd, message, flags, total)

cdef ssize_t w_send(int fd, const void* buffer, size_t length, int flags) noexcept nogil:
    cdef msghdr message
    cdef iovec part
    if not ops.ours(buffer, length) or <ssize_t>length < 0:
        return send(fd, buffer, length, flags)
    message_make(&message, &part, <void*>buffer, length, NULL, 0)
    return send_message(fd, &message, flags, length)

cdef ssize_t w_sendto(int fd, const void* buffer, size_t length, int flags, const void* name,
                      socklen_t name_length) noexcept nogil:
    cdef msghdr message
    cdef iovec part
    if (not (ops.ours(buffer, length) or ops.ours(name, name_length)) or <ssize_t>length < 0
            or name_length > sizeof(sockaddr_storage)):
        return sendto(fd, buffer, length, flags, name, name_length)
    message_make(&message, &part, <void*>buffer, length, <void*>name, name_length)
    return send_message(fd, &message, flags, length)

cdef ssize_t w_sendmsg(int fd, const msghdr* message, int flags) noexcept nogil:
    cdef size_t total
    if not message_ours(message, &total):
        return sendmsg(fd, message, flags)
    return send_message(fd, message, flags, total)

# Whether any of several messages, or their array, needs us.
cdef bint messages_ours(mmsghdr* messages, unsigned int count) noexcept nogil:
    cdef unsigned int i
    cdef size_t total
    if messages == NULL or count == 0:
        return False
    if count > PARTS:
        count = PARTS           # the kernel stops there too
    if ops.ours(messages, count * sizeof(mmsghdr)):
        return True
    for i in range(count):
        if message_ours(&messages[i].msg_hdr, &total):
            return True
    return False

cdef int w_sendmmsg(int fd, mmsghdr* messages, unsigned int count, int flags) noexcept nogil:
    cdef unsigned int i
    cdef ssize_t result
    if not messages_ours(messages, count):
        return sendmmsg(fd, messages, count, flags)
    if count > PARTS:
        count = PARTS
    for i in range(count):
        result = w_sendmsg(fd, &messages[i].msg_hdr, flags)
        if result < 0:
            return <int>i if i else -1
        messages[i].msg_len = <unsigned int>result
    return <int>count

cdef int w_recvmmsg(int fd, mmsghdr* messages, unsigned int count, int flags,
                    void* timeout) noexcept nogil:
    cdef unsigned int i
    cdef ssize_t result
    cdef timespec* limit = <timespec*>timeout
    cdef int64_t end = 0, left
    if not messages_ours(messages, count) and not ops.ours(timeout, sizeof(timespec)):
        return recvmmsg(fd, messages, count, flags, timeout)
    if count > PARTS:
        count = PARTS
    if limit != NULL:
        if limit.tv_sec < 0 or limit.tv_nsec < 0 or limit.tv_nsec > 999999999:
            set_errno(EINVAL)
            return -1
        left = limit.tv_sec if limit.tv_sec < 1000000000 else 1000000000
        end = us_now() + left * 1000000000 + limit.tv_nsec
    for i in range(count):
        result = w_recvmsg(fd, &messages[i].msg_hdr, flags & ~MSG_WAITFORONE)
        if result < 0:
            return <int>i if i else -1
        messages[i].msg_len = <unsigned int>result
        if flags & MSG_WAITFORONE:
            flags |= MSG_DONTWAIT
        if limit != NULL:
            # As in the kernel, the clock is looked at only after each message.
            left = end - us_now()
            if left < 0:
                left = 0
            limit.tv_sec = left // 1000000000
            limit.tv_nsec = left % 1000000000
            if left == 0:
                return <int>i + 1
    return <int>count

cdef ssize_t w_recv_chk(int fd, void* buffer, size_t length, size_t size, int flags) noexcept nogil:
    if length > size:
        __chk_fail()
    return w_recv(fd, buffer, length, flags)

cdef ssize_t w_recvfrom_chk(int fd, void* buffer, size_t length, size_t size, int flags, void* name,
                            socklen_t* name_length) noexcept nogil:
    if length > size:
        __chk_fail()
    return w_recvfrom(fd, buffer, length, flags, name, name_length)


# ---- wrappers: random bytes ---------------------------------------------------------------------

cdef ssize_t w_getrandom(void* buffer, size_t length, unsigned int flags) noexcept nogil:
    if not ops.ours(buffer, length) or <ssize_t>length < 0:
        return getrandom(buffer, length, flags)
    return transfer_one(K_RANDOM, -1, buffer, length, 0, <int>flags, True)

cdef int w_getentropy(void* buffer, size_t length) noexcept nogil:
    cdef char bytes[256]
    cdef int result
    if length > 256 or not ops.ours(buffer, length):
        return getentropy(buffer, length)
    result = getentropy(bytes, length)      # so few that a copy is cheaper than a pin
    if result == 0:
        memcpy(buffer, bytes, length)
    memset(bytes, 0, sizeof(bytes))
    return result


# ---- wrappers: advice ---------------------------------------------------------------------------

# What a program throws away may be anywhere, not only in place; and populating is a fault in the kernel. Any other
# advice is the kernel's to take.
cdef int w_madvise(void* start, size_t length, int advice) noexcept nogil:
    cdef size_t done = 0
    cdef int64_t got
    if not ops.ours(start, length) or <size_t>start % page_bytes:
        return madvise(start, length, advice)
    if advice == MADV_DONTNEED or advice == MADV_FREE or advice == MADV_DONTNEED_LOCKED:
        ops.discard(start, (length + page_bytes - 1) // page_bytes * page_bytes)
        return 0
    if advice == MADV_POPULATE_READ or advice == MADV_POPULATE_WRITE:
        while done < length:
            got = ops.pin(<char*>start + done, length - done, advice == MADV_POPULATE_WRITE)
            if got <= 0:
                set_errno(EFAULT)
                return -1
            ops.unpin(<char*>start + done, <size_t>got)
            done += <size_t>got
        return 0
    return madvise(start, length, advice)


# ---- descriptors --------------------------------------------------------------------------------

# A program that closes every descriptor (daemons do) would close ours: swapped memory would read as zeros, and
# what is opened next would get the number that we write to. For the program they are not there.
cdef int w_close(int fd) noexcept nogil:
    if descriptor_guarded(<unsigned int>fd):
        set_errno(EBADF)
        return -1
    return close(fd)

cdef int w_close_range(unsigned int first, unsigned int last, int flags) noexcept nogil:
    cdef unsigned int fd = first
    if not flags & CLOSE_RANGE_CLOEXEC:
        while fd <= last and fd < DESCRIPTORS:
            if not descriptor_guarded(fd):
                fd += 1
                continue
            if fd > first and syscall(SYS_close_range, <long>first, <long>(fd - 1), <long>flags) != 0:
                return -1
            fd += 1
            first = fd
        if first > last and descriptor_guarded(last):
            return 0                # nothing is left after ours
    return <int>syscall(SYS_close_range, <long>first, <long>last, <long>flags)

cdef void w_closefrom(int low) noexcept nogil:
    w_close_range(<unsigned int>(low if low > 0 else 0), ~0u, 0)


# ---- SIGBUS -------------------------------------------------------------------------------------

# What the program believes is the SIGBUS action. Two slots and a generation: the low bit of the
# generation says which slot holds; a writer (one at a time, all signals blocked) fills the other one and
# moves on. So a handler can read it at any moment without a lock, and after a fork it is whole.
cdef sigaction chain_slots[2]
cdef uint64_t chain_generation
cdef us_mutex chain_lock
cdef int chain_process          # whose chain it is
cdef bint sigbus_taken

cdef void chain_read(sigaction* out) noexcept nogil:
    cdef uint64_t seen = us_load(&chain_generation)
    while True:
        memcpy(out, &chain_slots[seen & 1], sizeof(sigaction))
        # A read-modify-write: a plain load could be done before the copy has been.
        if us_or(&chain_generation, 0) == seen:
            return
        seen = us_load(&chain_generation)

cdef void chain_change(const sigaction* next, sigaction* before) noexcept nogil:
    cdef sigset_t every, old
    cdef uint64_t generation
    cdef int kept = errno
    # A handler that came while we hold the lock, and itself calls sigaction, would wait for ever.
    sigfillset(&every)
    pthread_sigmask(SIG_SETMASK, &every, &old)
    us_lock(&chain_lock)
    generation = us_load(&chain_generation)
    if before != NULL:
        memcpy(before, &chain_slots[generation & 1], sizeof(sigaction))
    if next != NULL and getpid() == chain_process:
        memcpy(&chain_slots[(generation + 1) & 1], next, sizeof(sigaction))
        us_store(&chain_generation, generation + 1)
    elif next != NULL and next.sa_handler == SIG_IGN:
        # A child of vfork has its own actions but our memory: what it sets may not become the parent's. Of what
        # it sets only this survives its exec.
        real_sigaction(SIGBUS, next, NULL)
    us_unlock(&chain_lock)
    pthread_sigmask(SIG_SETMASK, &old, NULL)
    set_errno(kept)

cdef int sigbus_install(void (*handler)(int, siginfo_t*, void*) noexcept nogil) noexcept nogil:
    global sigbus_taken, chain_process
    cdef sigaction mine, before
    chain_process = getpid()
    cdef sigset_t bus
    memset(&mine, 0, sizeof(mine))
    mine.sa_sigaction = handler
    # NODEFER: the handler may be interrupted by a fault of its own thread's chain. No ONSTACK: a fault
    # is served on the stack of whoever faults, which may be a signal stack already.
    mine.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART
    sigfillset(&mine.sa_mask)
    sigdelset(&mine.sa_mask, SIGSEGV)
    sigdelset(&mine.sa_mask, SIGBUS)
    sigdelset(&mine.sa_mask, SIGFPE)
    sigdelset(&mine.sa_mask, SIGILL)
    sigdelset(&mine.sa_mask, SIGTRAP)
    sigdelset(&mine.sa_mask, SIGABRT)
    if real_sigaction(SIGBUS, NULL, &before) != 0:
        return -errno
    # The chain first: the handler may be needed from the moment it is installed.
    if not sigbus_taken:
        chain_change(&before, NULL)
    if real_sigaction(SIGBUS, &mine, NULL) != 0:
        return -errno
    sigbus_taken = True
    sigemptyset(&bus)
    sigaddset(&bus, SIGBUS)
    pthread_sigmask(SIG_UNBLOCK, &bus, NULL)
    return 0

cdef void die_of(bint repeats) noexcept nogil:
    cdef sigaction plain
    cdef sigset_t bus
    memset(&plain, 0, sizeof(plain))
    plain.sa_handler = SIG_DFL
    real_sigaction(SIGBUS, &plain, NULL)
    if repeats:
        return                  # the same instruction faults again, and a core dump shows it
    sigemptyset(&bus)
    sigaddset(&bus, SIGBUS)
    syscall(SYS_tgkill, <long>getpid(), syscall(SYS_gettid), <long>SIGBUS)
    pthread_sigmask(SIG_UNBLOCK, &bus, NULL)

cdef void sigbus_chain(int signal, siginfo_t* info, void* context) noexcept nogil:
    cdef sigaction action, reset
    cdef sigset_t mask, before
    cdef int number
    # Sent by somebody, or a memory failure found in the background: no instruction will repeat it.
    cdef bint repeats = info.si_code > 0 and info.si_code != BUS_MCEERR_AO
    chain_read(&action)
    if action.sa_handler == SIG_IGN:
        # The kernel does not let a thread ignore its own fault: it dies as by default.
        if repeats:
            die_of(True)
        return
    if action.sa_handler == SIG_DFL:
        die_of(repeats)
        return
    if action.sa_flags & SA_RESETHAND:
        memcpy(&reset, &action, sizeof(action))
        reset.sa_handler = SIG_DFL
        chain_change(&reset, NULL)
    # The mask that the program's handler would have run under, not the one that we run under. Unless
    # it asks otherwise SIGBUS is blocked in it, so that a fault inside it ends the process, as it would
    # without us; such a handler must not touch swapped memory.
    memcpy(&mask, &(<ucontext_t*>context).uc_sigmask, 8)    # the kernel's mask is shorter than libc's
    memset(<char*>&mask + 8, 0, sizeof(mask) - 8)
    for number in range(1, 65):
        if sigismember(&action.sa_mask, number) == 1:
            sigaddset(&mask, number)
    if not action.sa_flags & SA_NODEFER:
        sigaddset(&mask, signal)
    pthread_sigmask(SIG_SETMASK, &mask, &before)
    if action.sa_flags & SA_SIGINFO:
        action.sa_sigaction(signal, info, context)
    else:
        action.sa_handler(signal)
    pthread_sigmask(SIG_SETMASK, &before, NULL)

cdef int w_sigaction(int signal, const sigaction* next, sigaction* before) noexcept nogil:
    # Copies throughout: these structs may be in swapped memory, which the kernel could not read.
    cdef sigaction mine, old
    cdef int result
    if not sigbus_taken:
        return real_sigaction(signal, next, before)
    if next != NULL:
        memcpy(&mine, next, sizeof(sigaction))
    if signal == SIGBUS:
        chain_change(&mine if next != NULL else NULL, &old)
        result = 0
    else:
        if next != NULL:
            sigdelset(&mine.sa_mask, SIGBUS)    # a handler that reads swapped memory must survive it
        result = real_sigaction(signal, &mine if next != NULL else NULL, &old)
    if result == 0 and before != NULL:
        memcpy(before, &old, sizeof(sigaction))
    return result

cdef sighandler_t chain_signal(sighandler_t handler, int flags, bint blocks) noexcept nogil:
    cdef sigaction mine, old
    if handler == SIG_ERR:
        set_errno(EINVAL)
        return SIG_ERR
    memset(&mine, 0, sizeof(mine))
    mine.sa_handler = handler
    mine.sa_flags = flags
    if blocks:
        sigaddset(&mine.sa_mask, SIGBUS)
    chain_change(&mine, &old)
    return old.sa_handler

cdef sighandler_t w_signal(int signal, sighandler_t handler) noexcept nogil:
    if signal != SIGBUS or not sigbus_taken:
        return real_signal(signal, handler)
    return chain_signal(handler, SA_RESTART, True)

cdef sighandler_t w_sysv_signal(int signal, sighandler_t handler) noexcept nogil:
    if signal != SIGBUS or not sigbus_taken:
        return __sysv_signal(signal, handler)
    return chain_signal(handler, SA_RESETHAND | SA_NODEFER, False)

# A thread that blocks SIGBUS dies of its first fault, so a mask is taken over without it. What is
# reported back is what the kernel says: that SIGBUS is not blocked.
cdef bint without_sigbus(int how, const sigset_t* given, sigset_t* mine) noexcept nogil:
    if given == NULL:
        return False
    memcpy(mine, given, sizeof(sigset_t))
    if sigbus_taken and how != SIG_UNBLOCK:
        sigdelset(mine, SIGBUS)
    return True

cdef int w_pthread_sigmask(int how, const sigset_t* given, sigset_t* before) noexcept nogil:
    cdef sigset_t mine, old
    cdef int result
    sigemptyset(&old)
    result = pthread_sigmask(how, &mine if without_sigbus(how, given, &mine) else NULL, &old)
    if result == 0 and before != NULL:
        memcpy(before, &old, sizeof(sigset_t))
    return result

cdef int w_sigprocmask(int how, const sigset_t* given, sigset_t* before) noexcept nogil:
    cdef sigset_t mine, old
    cdef int result
    sigemptyset(&old)
    result = sigprocmask(how, &mine if without_sigbus(how, given, &mine) else NULL, &old)
    if result == 0 and before != NULL:
        memcpy(before, &old, sizeof(sigset_t))
    return result


# ---- wrappers: other memory that the kernel reads or fills ------------------------------------------

# Arguments are small (a path, a struct, the descriptors of a poll); one that is longer is pinned so far.
cdef enum:
    ARGUMENT_MOST = 131072

cdef long pinned_call(us_six_fn function, long* arguments) noexcept nogil:
    cdef int64_t pinned[6]
    cdef bint any = False
    cdef long result
    cdef int i, kept
    for i in range(6):
        pinned[i] = 0
        if ops.ours(<void*>arguments[i], 1):
            pinned[i] = ops.pin(<void*>arguments[i], ARGUMENT_MOST, True)
            any = True
    result = function(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5])
    if any:
        kept = errno
        for i in range(6):
            if pinned[i] > 0:
                ops.unpin(<void*>arguments[i], <size_t>pinned[i])
        set_errno(kept)
    return result

# A stack that faults can't take the signal of its fault: it stays in place until its memory is freed.
cdef int w_sigaltstack(const stack_t* next, stack_t* before) noexcept nogil:
    cdef stack_t mine, old          # copies: these structs may be in swapped memory
    cdef int error, result
    if next != NULL:
        memcpy(&mine, next, sizeof(stack_t))
        if not mine.ss_flags & SS_DISABLE and ops.ours(mine.ss_sp, mine.ss_size):
            error = pin_whole(mine.ss_sp, mine.ss_size, True)
            if error:
                set_errno(-error)
                return -1
    result = sigaltstack(&mine if next != NULL else NULL, &old)
    if result == 0 and before != NULL:
        memcpy(before, &old, sizeof(stack_t))
    return result

cdef int w_pthread_attr_setstack(void* attributes, void* stack, size_t size) noexcept nogil:
    cdef int error = pin_whole(stack, size, True) if ops.ours(stack, size) else 0
    return -error if error else pthread_attr_setstack(attributes, stack, size)

# libc would read and write such a buffer behind our back. Without one it makes its own, as it may.
cdef int w_setvbuf(FILE* stream, char* buffer, int mode, size_t size) noexcept nogil:
    return setvbuf(stream, NULL if ops.ours(buffer, size) else buffer, mode, size)

cdef void w_setbuffer(FILE* stream, char* buffer, size_t size) noexcept nogil:
    if ops.ours(buffer, size):
        setvbuf(stream, NULL, _IOFBF, size)
    else:
        setvbuf(stream, buffer, _IONBF if buffer == NULL else _IOFBF, size)

cdef void w_setbuf(FILE* stream, char* buffer) noexcept nogil:
    w_setbuffer(stream, buffer, BUFSIZ)

cdef int w_fputs(const char* text, FILE* stream) noexcept nogil:
    cdef size_t length
    if not ops.ours(text, 1):
        return fputs(text, stream)
    length = strlen(text)
    return 1 if w_fwrite(text, 1, length, stream) == length else EOF

cdef int w_puts(const char* text) noexcept nogil:
    cdef int result
    if not ops.ours(text, 1):
        return puts(text)
    flockfile(stdout)
    result = w_fputs(text, stdout)
    if result != EOF and fputs("\n", stdout) == EOF:
        result = EOF
    funlockfile(stdout)
    return result

# What a new program gets can't be pinned: nobody would unpin it after an exec, and a child of vfork would leave the
# pins to its parent. So it is touched, and the call made again if some of it left in between: nothing has happened
# then.
cdef enum:
    EXEC_TRIES = 1000
    X_EXECVE
    X_EXECV
    X_EXECVP
    X_EXECVPE
    X_FEXECVE
    X_SPAWN
    X_SPAWNP

cdef struct Exec:
    int kind
    int fd
    const char* path
    char** arguments
    char** environment
    int* child                  # of posix_spawn, and what follows
    const void* actions
    const void* attributes

cdef size_t touch(const char* text) noexcept nogil:
    """How many bytes of a string that is ours, which are in place then."""
    return strlen(text) + 1 if text != NULL and ops.ours(text, 1) else 0

cdef size_t touch_list(char** list) noexcept nogil:
    cdef size_t sum = 0
    cdef int i = 0
    if list == NULL:
        return 0
    while list[i] != NULL:
        sum += touch(list[i]) + <size_t>ops.ours(&list[i], sizeof(char*))
        i += 1
    return sum

# 0 or an errno: only posix_spawn comes back with 0.
cdef int execute_once(Exec* e) noexcept nogil:
    cdef int child = 0, error
    if e.kind == X_SPAWN or e.kind == X_SPAWNP:
        # `child` may be swapped, too; libc writes it by itself, as any program does.
        if e.kind == X_SPAWN:
            error = posix_spawn(&child, e.path, e.actions, e.attributes, e.arguments, e.environment)
        else:
            error = posix_spawnp(&child, e.path, e.actions, e.attributes, e.arguments, e.environment)
        if error == 0 and e.child != NULL:
            e.child[0] = child
        return error
    if e.kind == X_EXECVE:
        execve(e.path, e.arguments, e.environment)
    elif e.kind == X_EXECV:
        execv(e.path, e.arguments)
    elif e.kind == X_EXECVP:
        execvp(e.path, e.arguments)
    elif e.kind == X_EXECVPE:
        execvpe(e.path, e.arguments, e.environment)
    else:
        fexecve(e.fd, e.arguments, e.environment)
    return errno

cdef int execute(Exec* e) noexcept nogil:
    cdef int tries = 0, error
    cdef size_t touched
    while True:
        touched = touch(e.path) + touch_list(e.arguments) + touch_list(e.environment)
        error = execute_once(e)
        tries += 1
        if error != EFAULT or touched == 0 or tries == EXEC_TRIES:
            return error

cdef void exec_make(Exec* e, int kind, const char* path, char** arguments, char** environment) noexcept nogil:
    memset(e, 0, sizeof(Exec))
    e.kind = kind
    e.path = path
    e.arguments = arguments
    e.environment = environment

cdef int w_execve(const char* path, char** arguments, char** environment) noexcept nogil:
    cdef Exec e
    exec_make(&e, X_EXECVE, path, arguments, environment)
    set_errno(execute(&e))
    return -1

cdef int w_execv(const char* path, char** arguments) noexcept nogil:
    cdef Exec e
    exec_make(&e, X_EXECV, path, arguments, environ)
    set_errno(execute(&e))
    return -1

cdef int w_execvp(const char* path, char** arguments) noexcept nogil:
    cdef Exec e
    exec_make(&e, X_EXECVP, path, arguments, environ)
    set_errno(execute(&e))
    return -1

cdef int w_execvpe(const char* path, char** arguments, char** environment) noexcept nogil:
    cdef Exec e
    exec_make(&e, X_EXECVPE, path, arguments, environment)
    set_errno(execute(&e))
    return -1

cdef int w_fexecve(int fd, char** arguments, char** environment) noexcept nogil:
    cdef Exec e
    exec_make(&e, X_FEXECVE, NULL, arguments, environment)
    e.fd = fd
    set_errno(execute(&e))
    return -1

cdef int spawn(int kind, int* child, const char* path, const void* actions, const void* attributes, char** arguments,
               char** environment) noexcept nogil:
    cdef Exec e
    exec_make(&e, kind, path, arguments, environment)
    e.child = child
    e.actions = actions
    e.attributes = attributes
    return execute(&e)

cdef int w_posix_spawn(int* child, const char* path, const void* actions, const void* attributes, char** arguments,
                       char** environment) noexcept nogil:
    return spawn(X_SPAWN, child, path, actions, attributes, arguments, environment)

cdef int w_posix_spawnp(int* child, const char* path, const void* actions, const void* attributes, char** arguments,
                        char** environment) noexcept nogil:
    return spawn(X_SPAWNP, child, path, actions, attributes, arguments, environment)


# ---- names and their wrappers ---------------------------------------------------------------------

cdef enum:
    NAMES = 255                 # an index of one is a byte
    NAME_LONGEST = 24
    NAME_SLOTS = 1024           # power of two, far more than names: most lookups end at an empty slot

cdef struct Name:
    const char* name
    void* wrapper
    void* real                  # where our own import of it leads; NULL: this libc has no such function

cdef Name names[NAMES]
cdef int names_count
cdef uint8_t name_slots[NAME_SLOTS]

# Bounded by the longest of our names, so that a library full of long C++ names costs little.
cdef inline int name_hash(const char* name) noexcept nogil:
    cdef uint32_t h = 2166136261u
    cdef int i = 0
    while name[i] != 0:
        if i == NAME_LONGEST:
            return -1
        h = (h ^ <uint8_t>name[i]) * 16777619u
        i += 1
    return <int>((h ^ (h >> 15)) & (NAME_SLOTS - 1))

cdef Name* name_find(const char* name) noexcept nogil:
    cdef int slot = name_hash(name)
    if slot < 0:
        return NULL
    while name_slots[slot]:
        if strcmp(names[name_slots[slot] - 1].name, name) == 0:
            return &names[name_slots[slot] - 1]
        slot = (slot + 1) & (NAME_SLOTS - 1)
    return NULL

cdef void name_add(const char* name, void* wrapper) noexcept nogil:
    global names_count
    cdef int slot = name_hash(name)
    cdef int n = names_count
    names[n].name = name
    names[n].wrapper = wrapper
    names[n].real = dlsym(RTLD_DEFAULT, name)
    while name_slots[slot]:
        slot = (slot + 1) & (NAME_SLOTS - 1)
    name_slots[slot] = <uint8_t>(n + 1)
    names_count = n + 1

cdef void names_fill() noexcept nogil:
    cdef int i
    use_pinned_call(pinned_call)
    for i in range(US_BY_ADDRESS_COUNT):
        us_by_address[i].real[0] = <us_six_fn>dlsym(RTLD_DEFAULT, us_by_address[i].name)
        if us_by_address[i].real[0] != NULL:        # not in every libc
            name_add(us_by_address[i].name, us_by_address[i].wrapper)
    name_add("sigaltstack", <void*>w_sigaltstack)
    name_add("pthread_attr_setstack", <void*>w_pthread_attr_setstack)
    name_add("setvbuf", <void*>w_setvbuf)
    name_add("setbuffer", <void*>w_setbuffer)
    name_add("setbuf", <void*>w_setbuf)
    name_add("fputs", <void*>w_fputs)
    name_add("puts", <void*>w_puts)
    name_add("execve", <void*>w_execve)
    name_add("execv", <void*>w_execv)
    name_add("execvp", <void*>w_execvp)
    name_add("execvpe", <void*>w_execvpe)
    name_add("fexecve", <void*>w_fexecve)
    name_add("posix_spawn", <void*>w_posix_spawn)
    name_add("posix_spawnp", <void*>w_posix_spawnp)
    name_add("read", <void*>w_read)
    name_add("__read", <void*>w_read)
    name_add("__read_chk", <void*>w_read_chk)
    name_add("write", <void*>w_write)
    name_add("__write", <void*>w_write)
    # off_t and off64_t are one on the machines we run on, so one wrapper serves both names.
    name_add("pread", <void*>w_pread)
    name_add("pread64", <void*>w_pread)
    name_add("__pread64", <void*>w_pread)
    name_add("__pread_chk", <void*>w_pread_chk)
    name_add("__pread64_chk", <void*>w_pread_chk)
    name_add("pwrite", <void*>w_pwrite)
    name_add("pwrite64", <void*>w_pwrite)
    name_add("__pwrite64", <void*>w_pwrite)
    name_add("readv", <void*>w_readv)
    name_add("writev", <void*>w_writev)
    name_add("preadv", <void*>w_preadv)
    name_add("preadv64", <void*>w_preadv)
    name_add("pwritev", <void*>w_pwritev)
    name_add("pwritev64", <void*>w_pwritev)
    name_add("preadv2", <void*>w_preadv2)
    name_add("preadv64v2", <void*>w_preadv2)
    name_add("pwritev2", <void*>w_pwritev2)
    name_add("pwritev64v2", <void*>w_pwritev2)
    name_add("fread", <void*>w_fread)
    name_add("fread_unlocked", <void*>w_fread_unlocked)
    name_add("__fread_chk", <void*>w_fread_chk)
    name_add("__fread_unlocked_chk", <void*>w_fread_unlocked_chk)
    name_add("fwrite", <void*>w_fwrite)
    name_add("fwrite_unlocked", <void*>w_fwrite_unlocked)
    name_add("recv", <void*>w_recv)
    name_add("__recv_chk", <void*>w_recv_chk)
    name_add("recvfrom", <void*>w_recvfrom)
    name_add("__recvfrom_chk", <void*>w_recvfrom_chk)
    name_add("recvmsg", <void*>w_recvmsg)
    name_add("recvmmsg", <void*>w_recvmmsg)
    name_add("send", <void*>w_send)
    name_add("__send", <void*>w_send)
    name_add("sendto", <void*>w_sendto)
    name_add("sendmsg", <void*>w_sendmsg)
    name_add("sendmmsg", <void*>w_sendmmsg)
    name_add("getrandom", <void*>w_getrandom)
    name_add("madvise", <void*>w_madvise)
    name_add("getentropy", <void*>w_getentropy)
    name_add("close", <void*>w_close)
    name_add("__close", <void*>w_close)
    name_add("close_range", <void*>w_close_range)
    name_add("closefrom", <void*>w_closefrom)
    name_add("sigaction", <void*>w_sigaction)
    name_add("__sigaction", <void*>w_sigaction)
    name_add("signal", <void*>w_signal)
    name_add("bsd_signal", <void*>w_signal)
    name_add("ssignal", <void*>w_signal)
    name_add("sysv_signal", <void*>w_sysv_signal)
    name_add("__sysv_signal", <void*>w_sysv_signal)
    name_add("sigprocmask", <void*>w_sigprocmask)
    name_add("pthread_sigmask", <void*>w_pthread_sigmask)
    name_add("dlopen", <void*>w_dlopen)
    name_add("dlmopen", <void*>w_dlmopen)
    name_add("dlsym", <void*>us_dlsym)
    name_add("dlvsym", <void*>us_dlvsym)


# ---- dlopen and dlsym ---------------------------------------------------------------------------

# ctypes, cffi and Rust's standard library ask dlsym for libc's functions; they get the wrapper. Asking
# for the *next* one is what interposers do, to find the real function: they do.
cdef void* named(void* library, const char* name) noexcept nogil:
    cdef Name* known
    cdef void* found
    if library == RTLD_NEXT or name == NULL:
        return NULL
    known = name_find(name)
    if known == NULL or known.real == NULL:
        return NULL
    found = dlsym(library, name)
    return known.wrapper if found == known.real else NULL

# libc finds out who calls dlopen by its return address, and searches that library's RPATH or RUNPATH for
# a bare name, and expands $ORIGIN by it. Called from here it would be ours, which has none. So the
# caller's directories are tried here. What differs from libc's own search: directories for hardware
# capabilities below the caller's RUNPATH are not looked into.
cdef union SearchPath:
    Dl_serinfo info
    char space[16384]

cdef bint search_path(void* library, SearchPath* out) noexcept nogil:
    cdef Dl_serinfo size
    if dlinfo(library, RTLD_DI_SERINFOSIZE, &size) != 0 or size.dls_size > sizeof(SearchPath):
        return False
    out.info.dls_size = size.dls_size
    out.info.dls_cnt = size.dls_cnt
    return dlinfo(library, RTLD_DI_SERINFO, &out.info) == 0

cdef void* open_in_caller_path(void* caller, const char* name, int mode) noexcept nogil:
    cdef SearchPath theirs, mine
    cdef void* self = NULL
    cdef Dl_info info
    cdef char path[PATH_MAX]
    cdef unsigned int i, common = 0, n, m
    cdef void* library
    if not search_path(caller, &theirs):
        return NULL
    if dladdr1(<void*>w_dlopen, &info, &self, RTLD_DL_LINKMAP) == 0 or not search_path(self, &mine):
        return NULL
    # What both lists end with (LD_LIBRARY_PATH, the system's directories) libc searches itself, and in
    # its right place relative to ld.so.cache.
    n = theirs.info.dls_cnt
    m = mine.info.dls_cnt
    while common < n and common < m and strcmp((&theirs.info.dls_serpath[0])[n - 1 - common].dls_name,
                                               (&mine.info.dls_serpath[0])[m - 1 - common].dls_name) == 0:
        common += 1
    for i in range(n - common):
        if snprintf(path, sizeof(path), "%s/%s", (&theirs.info.dls_serpath[0])[i].dls_name,
                    name) >= <int>sizeof(path):
            continue
        if access(path, 0) == 0:
            library = dlopen(path, mode)
            if library != NULL:
                return library
    return NULL

cdef void* open_for(const char* name, int mode, void* asking) noexcept nogil:
    cdef Dl_info info
    cdef void* caller = NULL
    cdef void* library
    cdef const char* rest
    cdef char origin[PATH_MAX]
    cdef char path[PATH_MAX]
    if name == NULL or name[0] == 0:
        return dlopen(name, mode)
    if name[0] != c'$' and strchr(name, c'/') != NULL:
        return dlopen(name, mode)       # an absolute or relative path: the caller does not matter
    if dladdr1(asking, &info, &caller, RTLD_DL_LINKMAP) == 0 or caller == NULL:
        return dlopen(name, mode)
    if name[0] == c'$':
        rest = NULL
        if strncmp(name, "$ORIGIN/", 8) == 0:
            rest = name + 8
        elif strncmp(name, "${ORIGIN}/", 10) == 0:
            rest = name + 10
        if (rest != NULL and dlinfo(caller, RTLD_DI_ORIGIN, origin) == 0
                and snprintf(path, sizeof(path), "%s/%s", origin, rest) < <int>sizeof(path)):
            return dlopen(path, mode)
        return dlopen(name, mode)
    library = dlopen(name, mode | RTLD_NOLOAD)      # a library of that name that is loaded comes first
    if library == NULL:
        library = open_in_caller_path(caller, name, mode)
    if library == NULL:
        library = dlopen(name, mode)
    return library

cdef void* w_dlopen(const char* name, int mode) noexcept nogil:
    cdef void* library = open_for(name, mode, return_address(0))
    if library != NULL:
        patch_new()
    return library

cdef void* w_dlmopen(long namespace, const char* name, int mode) noexcept nogil:
    # A library in another namespace has a libc of its own (another errno, other streams), which our
    # wrappers must not stand in for: it stays as it is.
    if namespace != LM_ID_BASE:
        return dlmopen(namespace, name, mode)
    cdef void* library = open_for(name, mode, return_address(0))
    if library != NULL:
        patch_new()
    return library


# ---- import tables ------------------------------------------------------------------------------

cdef enum:
    KNOWN_SLOTS = 16384         # power of two; objects already looked at
    BATCH = 256

cdef struct Object:
    uint64_t base
    uint64_t dynamic

cdef Object known_objects[KNOWN_SLOTS]
cdef int known_count
cdef us_mutex patch_lock
cdef unsigned long long seen_adds
cdef unsigned long long seen_subs
cdef int64_t patched_objects
cdef int64_t patched_slots
cdef int64_t refused_slots
cdef char package[PATH_MAX]     # our own directory with a slash at its end; the modules in it are left alone
cdef size_t package_length

cdef struct Walk:
    Object batch[BATCH]
    int count
    bint any
    unsigned long long adds
    unsigned long long subs

cdef Object* known_find(uint64_t base, uint64_t dynamic) noexcept nogil:
    cdef size_t slot = <size_t>(((base >> 12) * <uint64_t>0x9E3779B97F4A7C15) >> 40) & (KNOWN_SLOTS - 1)
    while known_objects[slot].dynamic:
        if known_objects[slot].base == base and known_objects[slot].dynamic == dynamic:
            return &known_objects[slot]
        slot = (slot + 1) & (KNOWN_SLOTS - 1)
    return &known_objects[slot]

cdef void known_add(uint64_t base, uint64_t dynamic) noexcept nogil:
    global known_count
    cdef Object* object = known_find(base, dynamic)
    if object.dynamic == 0 and known_count < KNOWN_SLOTS // 2:
        object.base = base
        object.dynamic = dynamic
        known_count += 1

cdef uint64_t dynamic_of(dl_phdr_info* info) noexcept nogil:
    cdef int i
    for i in range(info.dlpi_phnum):
        if info.dlpi_phdr[i].p_type == PT_DYNAMIC:
            return info.dlpi_addr + info.dlpi_phdr[i].p_vaddr
    return 0

# The C library, the loader, the kernel's vDSO (their inner calls are none of a program's buffers' business
# and must stay as they are), the compressor, and our own modules, which call the real functions.
cdef bint left_alone(const char* path) noexcept nogil:
    cdef const char* name
    if package_length and strncmp(path, package, package_length) == 0:
        return True
    name = strrchr(path, c'/')
    name = path if name == NULL else name + 1
    return (strncmp(name, "libc.so", 7) == 0 or strncmp(name, "libc-2.", 7) == 0
            or strncmp(name, "ld-", 3) == 0 or strncmp(name, "ld.so", 5) == 0
            or strncmp(name, "ld64.so", 7) == 0 or strncmp(name, "linux-vdso", 10) == 0
            or strncmp(name, "linux-gate", 10) == 0 or strncmp(name, "libpthread", 10) == 0
            or strncmp(name, "libblosc2", 9) == 0)

cdef struct Span:
    uint64_t low
    uint64_t high

cdef void patch_object(dl_phdr_info* info) noexcept nogil:
    global patched_objects, patched_slots, refused_slots
    cdef uint64_t base = info.dlpi_addr
    cdef Span whole, relro
    cdef const Dyn* dynamic = <const Dyn*>dynamic_of(info)
    cdef const Phdr* segment
    cdef const Rela* tables[2]
    cdef uint64_t sizes[2]
    cdef const Rela* rela
    cdef const Sym* symbols = NULL
    cdef const char* strings = NULL
    cdef const Sym* symbol
    cdef Name* known
    cdef uint64_t address, value, type
    cdef int64_t slots = 0
    cdef size_t n, j
    cdef int i
    cdef bint opened = False, closed_out = False, inside
    whole.low = <uint64_t>-1
    whole.high = 0
    relro.low = 0
    relro.high = 0
    for i in range(info.dlpi_phnum):
        segment = &info.dlpi_phdr[i]
        address = base + segment.p_vaddr
        if segment.p_type == PT_LOAD:
            if address < whole.low:
                whole.low = address
            if address + segment.p_memsz > whole.high:
                whole.high = address + segment.p_memsz
        elif segment.p_type == PT_GNU_RELRO:
            # As the loader rounds it: a page that also holds ordinary data stays writable.
            relro.low = address & ~<uint64_t>(page_bytes - 1)
            relro.high = (address + segment.p_memsz) & ~<uint64_t>(page_bytes - 1)
    tables[0] = NULL
    tables[1] = NULL
    sizes[0] = 0
    sizes[1] = 0
    type = DT_RELA
    while dynamic.d_tag != DT_NULL:
        value = dynamic.d_un.d_val
        # glibc relocates these pointers in place, but not in a table that it may not write to.
        address = value if whole.low <= value < whole.high else base + value
        if dynamic.d_tag == DT_JMPREL:
            tables[0] = <const Rela*>address
        elif dynamic.d_tag == DT_PLTRELSZ:
            sizes[0] = value
        elif dynamic.d_tag == DT_PLTREL:
            type = value
        elif dynamic.d_tag == DT_RELA:
            tables[1] = <const Rela*>address
        elif dynamic.d_tag == DT_RELASZ:
            sizes[1] = value
        elif dynamic.d_tag == DT_SYMTAB:
            symbols = <const Sym*>address
        elif dynamic.d_tag == DT_STRTAB:
            strings = <const char*>address
        dynamic += 1
    if symbols == NULL or strings == NULL:
        return
    if type != DT_RELA:
        tables[0] = NULL        # neither machine's linker makes any other kind
    for i in range(2):
        if tables[i] == NULL:
            continue
        n = sizes[i] // sizeof(Rela)
        for j in range(n):
            rela = &tables[i][j]
            type = rela.r_info & 0xFFFFFFFFu
            if type != US_R_PLT and type != US_R_GOT and type != US_R_ABS:
                continue
            symbol = &symbols[rela.r_info >> 32]
            # Only what is imported: a library that has its own `read` means its own.
            if symbol.st_shndx != 0 or rela.r_addend != 0:
                continue
            known = name_find(strings + symbol.st_name)
            if known == NULL:
                continue
            address = base + rela.r_offset
            if us_load_ptr(<void**>address) == known.wrapper:
                slots += 1
                continue
            # A pointer in the library's data may have been changed since (tables of functions, as
            # SQLite's): only one that still leads to libc is replaced. A word of the GOT cannot be.
            if type == US_R_ABS and us_load_ptr(<void**>address) != known.real:
                continue
            inside = relro.low <= address < relro.high
            if inside and not opened and not closed_out:
                opened = mprotect(<void*>relro.low, relro.high - relro.low, PROT_READ | PROT_WRITE) == 0
                closed_out = not opened
            if inside and not opened or not in_writable(info, address):
                refused_slots += 1
                continue
            us_store_ptr(<void**>address, known.wrapper)
            slots += 1
    if opened:
        mprotect(<void*>relro.low, relro.high - relro.low, PROT_READ)
    if slots:
        patched_objects += 1
        patched_slots += slots

cdef bint in_writable(dl_phdr_info* info, uint64_t address) noexcept nogil:
    cdef const Phdr* segment
    cdef uint64_t start
    cdef int i
    for i in range(info.dlpi_phnum):
        segment = &info.dlpi_phdr[i]
        start = info.dlpi_addr + segment.p_vaddr
        if segment.p_type == PT_LOAD and segment.p_flags & PF_W and start <= address < start + segment.p_memsz:
            return True
    return False

# First walk: which objects are new. The counters of loads and unloads make it end at once when none is.
cdef int find_new(dl_phdr_info* info, size_t size, void* data) noexcept nogil:
    global seen_subs, known_count, patched_objects, patched_slots, refused_slots
    cdef Walk* walk = <Walk*>data
    cdef uint64_t dynamic
    if not walk.any:
        walk.any = True
        walk.adds = info.dlpi_adds
        walk.subs = info.dlpi_subs
        if info.dlpi_adds == seen_adds and info.dlpi_subs == seen_subs:
            return 1
        if info.dlpi_subs != seen_subs:
            # Something was unloaded; another object may be at its address now. Look at all of them
            # again: what is patched already is only counted.
            memset(known_objects, 0, sizeof(known_objects))
            known_count = 0
            patched_objects = 0
            patched_slots = 0
            refused_slots = 0
            seen_subs = info.dlpi_subs
    dynamic = dynamic_of(info)
    if dynamic == 0 or known_find(info.dlpi_addr, dynamic).dynamic:
        return 0
    if left_alone(info.dlpi_name):
        known_add(info.dlpi_addr, dynamic)
        return 0
    if walk.count < BATCH:
        walk.batch[walk.count].base = info.dlpi_addr
        walk.batch[walk.count].dynamic = dynamic
        walk.count += 1
    return 0

# Second walk: patch those that the first one found and that are still there.
cdef int patch_found(dl_phdr_info* info, size_t size, void* data) noexcept nogil:
    cdef Walk* walk = <Walk*>data
    cdef uint64_t dynamic = dynamic_of(info)
    cdef int i
    for i in range(walk.count):
        if walk.batch[i].base == info.dlpi_addr and walk.batch[i].dynamic == dynamic:
            if known_find(info.dlpi_addr, dynamic).dynamic == 0:
                patch_object(info)
                known_add(info.dlpi_addr, dynamic)
            break
    return 0

cdef void patch_new() noexcept nogil:
    global seen_adds
    cdef Walk walk
    cdef Dl_info info
    cdef int kept = errno, _round
    for _round in range(2 * KNOWN_SLOTS // BATCH):
        walk.count = 0
        walk.any = False
        us_lock(&patch_lock)
        dl_iterate_phdr(find_new, &walk)
        if walk.count == 0:
            seen_adds = walk.adds
            us_unlock(&patch_lock)
            break
        us_unlock(&patch_lock)
        # The list also shows objects that another thread is loading and that are not relocated yet:
        # what we wrote there would be overwritten, and our mprotect would break the relocation. dladdr
        # takes the lock that is held throughout a load, so once it returns, all that we found is
        # loaded. The lock above must not be held here: a constructor that calls dlopen holds the
        # loader's lock and comes for ours.
        dladdr(<void*>w_dlopen, &info)
        us_lock(&patch_lock)
        dl_iterate_phdr(patch_found, &walk)
        us_unlock(&patch_lock)
    set_errno(kept)

cdef uint64_t page_bytes = 4096
cdef bint prepared

# In a child of fork: whoever held these locks is not there any more.
cdef void after_fork() noexcept nogil:
    global chain_process
    chain_process = getpid()
    patch_lock.state = 0
    chain_lock.state = 0

cdef int prepare() noexcept nogil:
    global page_bytes, package_length
    cdef Dl_info info
    cdef char* slash
    cdef int _i
    page_bytes = <uint64_t>sysconf(_SC_PAGESIZE)
    if dladdr(<void*>w_dlopen, &info) == 0 or strlen(info.dli_fname) >= sizeof(package):
        return -EINVAL
    memcpy(package, info.dli_fname, strlen(info.dli_fname) + 1)
    for _i in range(2):         # …/userswap/memory/syscalls.so
        slash = strrchr(package, c'/')
        if slash == NULL:
            return -EINVAL
        slash[0] = 0
    slash[0] = c'/'
    slash[1] = 0
    package_length = strlen(package)
    names_fill()
    use_named(named)
    return -pthread_atfork(NULL, NULL, after_fork)

cdef us_mutex install_lock

cdef int syscalls_install(const PinOps* given) noexcept nogil:
    global ops, prepared
    cdef int error = 0
    us_lock(&install_lock)
    if not prepared:
        error = prepare()
        prepared = error == 0
    if error == 0:
        us_store_ptr(<void**>&ops, <void*>given)
        patch_new()
    us_unlock(&install_lock)
    return error

cdef void syscalls_patched(int64_t* objects, int64_t* slots, int64_t* refused) noexcept nogil:
    us_lock(&patch_lock)
    objects[0] = patched_objects
    slots[0] = patched_slots
    refused[0] = refused_slots
    us_unlock(&patch_lock)


# ---- the window for Python ------------------------------------------------------------------------

class Patched(NamedTuple):
    """What ``install`` reached: libraries, their imports, and imports that could not be changed."""

    objects: int
    slots: int
    refused: int


def install() -> None:
    """Patch every loaded library, and those loaded later; idempotent.

    Alone this changes nothing for the program: no memory is ours until a pool is made.
    """
    cdef int error
    with nogil:
        error = syscalls_install(ops)
    if error:
        raise OSError(-error, "cannot patch the import tables of the loaded libraries")


def patched() -> Patched:
    """Say how many loaded libraries call through our wrappers, and by how many imports."""
    cdef int64_t objects, slots, refused
    syscalls_patched(&objects, &slots, &refused)
    return Patched(objects, slots, refused)
