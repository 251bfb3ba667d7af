# System calls on swapped memory. The kernel may not fault on our regions (a buffer that is not
# resident gives EFAULT), so libc's I/O functions are wrapped: make resident and pin, call, unpin.
# The wrappers are put in by patching the import tables (GOT) of every loaded library but libc, the
# loader and ourselves; a wrapped dlopen patches what is loaded later. Also wrapped here: sigaction and
# signal (we stay the first SIGBUS handler) and the calls that would block SIGBUS in a thread.
from libc.stdint cimport int64_t

cdef extern from "<signal.h>" nogil:
    ctypedef struct siginfo_t:
        void* si_addr
        int si_code
    ctypedef struct sigset_t:
        pass
    struct sigaction:
        void (*sa_handler)(int) noexcept nogil
        void (*sa_sigaction)(int, siginfo_t*, void*) noexcept nogil
        int sa_flags
        sigset_t sa_mask

# What the rooms beside this one give: is any part of the range ours; make a prefix of the range resident
# and unevictable (returns how many bytes of it, at least one folio's worth and at most a share of the budget,
# or -errno such as -EIO); undo that for exactly the bytes that were pinned. Ranges that are not ours
# (or beyond a part that is) count as pinned at no cost. `writing`: the kernel will write there.
#
# What the wrappers rely on, beyond that:
# - `ours` is asked with whatever the program passed: NULL, length 0, start + length past the end of the
#   address space. It answers 0 for an empty range, and must be cheap: it is all that other memory pays.
# - A prefix that is shorter than the range ends at a folio boundary. A datagram, which may not be split,
#   is pinned prefix after prefix and undone by one unpin over all of them; its sender holds several pins
#   at once (one per part of an iovec), so a pin that cannot be had *while others are held* must fail
#   (-ENOMEM), never wait. Parts of one iovec may pin the same folio twice.
# - errno is whatever it likes: the wrappers keep the one that the program shall see.
cdef struct PinOps:
    bint (*ours)(const void* start, size_t length) noexcept nogil
    int64_t (*pin)(void* start, size_t length, bint writing) noexcept nogil
    void (*unpin)(void* start, size_t length) noexcept nogil
    # Zeros from here on, wherever the memory is; the kernel itself could only throw away what is in place.
    void (*discard)(void* start, size_t length) noexcept nogil

# Patches everything loaded now, and what is loaded from now on. Idempotent (a second call may bring
# other ops). `ops` must stay valid for ever: patched tables are never put back. Call without the GIL:
# it waits for loads that are going on in other threads. 0 or -errno.
cdef int syscalls_install(const PinOps* ops) noexcept nogil
# For `userswap doctor`: loaded objects that call through our wrappers, their slots that do, and slots
# that the system did not let us change (a sealed library). All 0 before install.
cdef void syscalls_patched(int64_t* objects, int64_t* slots, int64_t* refused) noexcept nogil
# Whether a loaded object, by its path, is one of those whose own calls stay what they are: the C library, the loader,
# the compressor, ours. After syscalls_install.
cdef bint left_alone(const char* path) noexcept nogil
# Takes the first place among SIGBUS handlers: what was there, and what anybody installs later
# through sigaction/signal, becomes the chain. Call after syscalls_install. 0 or -errno.
cdef int sigbus_install(void (*handler)(int, siginfo_t*, void*) noexcept nogil) noexcept nogil
# For the handler: this SIGBUS is not ours; do what would have happened without us. May return (the
# fault then repeats under whatever is in force), and may leave by a longjmp of the program's handler:
# hold nothing when calling it.
cdef void sigbus_chain(int signal, siginfo_t* info, void* context) noexcept nogil
