"""Encryption, by libcrypto (see cipher.pxd). Its functions are looked up by name, in the ABI that OpenSSL 3 keeps.

Touches what it is handed, and its contexts. Why a nonce is never used twice with a key: a key belongs to one swap file,
drawn when this process opened it, and only this process writes to that file (a forked child opens its own, with a key
of its own, and reads its parent's). A nonce is the stamp of a seal and the number of a part, and a stamp is taken
from one
counter of the process for each folio that is written, also when it is written again because another device was full.
"""
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from userswap.native.mman cimport (
    MADV_DONTDUMP, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.us cimport us_now, us_pause, us_try, us_untry

cdef extern from *:
    """
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/random.h>
    #if defined(__aarch64__)
    #include <sys/auxv.h>
    static int us_has_aes(void) { return (getauxval(AT_HWCAP) & (1ul << 3)) != 0; }
    #elif defined(__x86_64__)
    static int us_has_aes(void) { __builtin_cpu_init(); return __builtin_cpu_supports("aes") != 0; }
    #else
    static int us_has_aes(void) { return 0; }
    #endif
    """
    bint us_has_aes() nogil

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void* buffer, size_t n, unsigned int flags)

cdef extern from "<sys/mman.h>" nogil:
    int mlock(const void* address, size_t length)

cdef extern from "<string.h>" nogil:
    void explicit_bzero(void* memory, size_t n)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<dlfcn.h>" nogil:
    enum:
        RTLD_NOW
        RTLD_LOCAL
    void* dlopen(const char* path, int flags)
    void* dlsym(void* library, const char* name)

ctypedef void* (*new_fn)() noexcept nogil
ctypedef void* (*fetch_fn)(void* library, const char* name, const char* properties) noexcept nogil
ctypedef int (*init_fn)(void* context, const void* cipher, void* engine, const uint8_t* key, const uint8_t* nonce,
                        int encrypt) noexcept nogil
ctypedef int (*update_fn)(void* context, char* target, int* n, const char* source, int bytes) noexcept nogil
ctypedef int (*final_fn)(void* context, char* target, int* n) noexcept nogil
ctypedef int (*control_fn)(void* context, int what, int n, void* data) noexcept nogil

cdef enum:
    CONTEXTS = 32               # more threads at once wait for one another
    PAGE_BYTES = 4096
    GET_TAG = 0x10              # of EVP_CIPHER_CTX_ctrl
    SET_TAG = 0x11
    LOOKS = 200                 # at all contexts before the processor is given away

cdef init_fn c_init = NULL
cdef update_fn c_update
cdef final_fn c_final
cdef control_fn c_control
cdef struct Context:
    void* evp
    uint32_t taken
cdef Context[CONTEXTS] contexts
cdef const char* chosen = NULL
cdef uint8_t[KEY_BYTES] nothing         # zeros: what a context has between two transfers


cdef bint make_contexts(void* library, const char* name) noexcept nogil:
    cdef new_fn make = <new_fn>dlsym(library, "EVP_CIPHER_CTX_new")
    cdef fetch_fn fetch = <fetch_fn>dlsym(library, "EVP_CIPHER_fetch")
    cdef init_fn init = <init_fn>dlsym(library, "EVP_CipherInit_ex")
    cdef const void* cipher
    cdef int i
    if make == NULL or fetch == NULL or init == NULL:
        return False
    cipher = fetch(NULL, name, NULL)
    if cipher == NULL:
        return False
    for i in range(CONTEXTS):
        contexts[i].evp = make()
        # The cipher is chosen here, once: later calls change key and nonce, and allocate nothing.
        if contexts[i].evp == NULL or init(contexts[i].evp, cipher, NULL, nothing, nothing, 1) != 1:
            return False
    return True


cdef int cipher_load(const char* library) noexcept nogil:
    global c_init, c_update, c_final, c_control, chosen
    cdef void* handle
    cdef const char* first = b"AES-256-GCM" if us_has_aes() else b"ChaCha20-Poly1305"
    if c_init != NULL:
        return 0
    handle = dlopen(library, RTLD_NOW | RTLD_LOCAL)
    if handle == NULL:
        return -1
    c_update = <update_fn>dlsym(handle, "EVP_CipherUpdate")
    c_final = <final_fn>dlsym(handle, "EVP_CipherFinal_ex")
    c_control = <control_fn>dlsym(handle, "EVP_CIPHER_CTX_ctrl")
    if c_update == NULL or c_final == NULL or c_control == NULL or not make_contexts(handle, first):
        return -1
    chosen = first
    c_init = <init_fn>dlsym(handle, "EVP_CipherInit_ex")
    return 0


cdef bint cipher_ready() noexcept nogil:
    return c_init != NULL


cdef char* cipher_page() noexcept nogil:
    cdef char* page = <char*>mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if page == MAP_FAILED:
        return NULL
    madvise(page, PAGE_BYTES, MADV_DONTDUMP)
    cipher_lock_page(page)
    return page


cdef void cipher_lock_page(char* page) noexcept nogil:
    cdef int kept = errno
    mlock(page, PAGE_BYTES)     # more than RLIMIT_MEMLOCK: then the kernel may swap it, that is all
    (&errno)[0] = kept


cdef void cipher_wipe(char* page) noexcept nogil:
    explicit_bzero(page, PAGE_BYTES)
    munmap(page, PAGE_BYTES)


cdef int cipher_key(char* key) noexcept nogil:
    cdef ssize_t n
    cdef size_t done = 0
    while done < KEY_BYTES:
        n = getrandom(key + done, KEY_BYTES - done, 0)
        if n > 0:
            done += <size_t>n
        elif errno != EINTR:
            return -errno
    return 0


cdef Context* take() noexcept nogil:
    # Whoever has one works for some microseconds and waits for nobody.
    cdef int i, looks = 0
    while True:
        for i in range(CONTEXTS):
            if us_try(&contexts[i].taken):
                return &contexts[i]
        looks += 1
        if looks % LOOKS == 0:
            sched_yield()
        us_pause()


cdef bint transfer(bint encrypt, const char* key, uint64_t stamp, uint32_t part, const Piece* pieces, int count,
                   char* tag) noexcept nogil:
    cdef uint8_t[12] nonce
    cdef Context* context = take()
    cdef int i, n = 0
    cdef bint done
    memcpy(nonce, &stamp, 8)
    memcpy(nonce + 8, &part, 4)
    done = c_init(context.evp, NULL, NULL, <const uint8_t*>key, nonce, encrypt) == 1
    for i in range(count):
        done = done and c_update(context.evp, pieces[i].target, &n, pieces[i].source, pieces[i].bytes) == 1
    if not encrypt:
        done = done and c_control(context.evp, SET_TAG, TAG_BYTES, tag) == 1
    done = done and c_final(context.evp, <char*>nonce, &n) == 1
    if encrypt:
        done = done and c_control(context.evp, GET_TAG, TAG_BYTES, tag) == 1
    # What it derived from the key goes: this is memory of malloc, which may be in a core dump.
    c_init(context.evp, NULL, NULL, nothing, nothing, 1)
    us_untry(&context.taken)
    return done


cdef bint cipher_encrypt(const char* key, uint64_t stamp, uint32_t part, const Piece* pieces, int count,
                         char* tag) noexcept nogil:
    return transfer(True, key, stamp, part, pieces, count, tag)


cdef bint cipher_decrypt(const char* key, uint64_t stamp, uint32_t part, const Piece* pieces, int count,
                         const char* tag) noexcept nogil:
    return transfer(False, key, stamp, part, pieces, count, <char*>tag)


def start() -> str | None:
    """Find libcrypto and make contexts; the cipher's name, or None where there is no OpenSSL 3."""
    for library in candidates():
        place = library.encode()
        if cipher_load(place) == 0:
            return chosen.decode()
    return None


def candidates() -> "Iterator[str]":
    yield "libcrypto.so.3"
    # Another place, or another name: what Python itself has loaded.
    try:
        import _hashlib
    except ImportError:
        return
    with open("/proc/self/maps", errors="replace") as maps:
        for line in maps:
            path = line.rpartition(" ")[2].strip()
            if "libcrypto" in path:
                yield path
    if hasattr(_hashlib, "__file__"):
        yield _hashlib.__file__


def encrypt(key: bytes, stamp: int, part: int, data: bytes) -> tuple[bytes, bytes]:
    """What is in the file of `data`, and its tag; for tests."""
    cdef Piece piece
    cdef char[TAG_BYTES] tag
    if len(key) != KEY_BYTES or not cipher_ready():
        raise ValueError("a key has 32 bytes")
    target = bytearray(data)
    cdef char* at = target
    cdef const char* secret = key
    piece.source = at
    piece.target = at
    piece.bytes = <int>len(data)
    if not cipher_encrypt(secret, stamp, part, &piece, 1, tag):
        raise OSError("libcrypto failed")
    return bytes(target), (<char*>tag)[:TAG_BYTES]


def speed(n: int, rounds: int) -> tuple[float, float]:
    """Nanoseconds to encrypt and to decrypt n bytes."""
    cdef Piece piece
    cdef char[TAG_BYTES] tag
    cdef char[KEY_BYTES] key
    cdef int _i, turns = rounds
    room = bytearray(n)
    cdef char* at = room
    piece.source = at
    piece.target = at
    piece.bytes = n
    cipher_key(key)
    started = us_now()
    for _i in range(turns):
        cipher_encrypt(key, _i, 0, &piece, 1, tag)
    middle = us_now()
    for _i in range(turns):
        cipher_decrypt(key, _i, 0, &piece, 1, tag)
    return (middle - started) / turns, (us_now() - middle) / turns
