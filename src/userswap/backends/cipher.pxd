# Encryption of what goes to swap files: AES-256-GCM (ChaCha20-Poly1305 where the processor has no AES), by OpenSSL's
# libcrypto, as it is on the machine. Contexts are made once: what runs in a fault's handler allocates nothing, and no
# key stays in them, since they are OpenSSL's memory: it is in the caller's page alone, and in a context for
# one transfer.
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    KEY_BYTES = 32
    TAG_BYTES = 16

# What is encrypted under one tag: pieces, each to where it comes from or somewhere else.
cdef struct Piece:
    const char* source
    char* target
    int bytes

# 0, or -1: there is none that could be used. Once.
cdef int cipher_load(const char* library) noexcept nogil
cdef bint cipher_ready() noexcept nogil
# A page of memory that is in no core dump and, if the system lets us, never swapped by the kernel; NULL: no memory. In
# a forked child, again.
cdef char* cipher_page() noexcept nogil
cdef void cipher_lock_page(char* page) noexcept nogil
cdef void cipher_wipe(char* page) noexcept nogil
cdef int cipher_key(char* key) noexcept nogil                   # draws one: 0 or -errno
# A nonce (`stamp`, `part`) may be used once with a key for writing: whoever calls sees to that.
cdef bint cipher_encrypt(const char* key, uint64_t stamp, uint32_t part, const Piece* pieces, int count,
                         char* tag) noexcept nogil
# False: it is not what was encrypted, and what is in the targets is nothing.
cdef bint cipher_decrypt(const char* key, uint64_t stamp, uint32_t part, const Piece* pieces, int count,
                         const char* tag) noexcept nogil
