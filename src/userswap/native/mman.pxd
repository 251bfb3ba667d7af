# <sys/mman.h>, as much as we use.
cdef extern from *:
    """
    #include <sys/mman.h>
    #ifndef MADV_POPULATE_WRITE         /* Linux 5.14; headers may be older */
    #define MADV_POPULATE_READ 22
    #define MADV_POPULATE_WRITE 23
    #endif
    #ifndef MADV_DONTNEED_LOCKED        /* Linux 5.18 */
    #define MADV_DONTNEED_LOCKED 24
    #endif
    #ifndef MAP_FIXED_NOREPLACE
    #define MAP_FIXED_NOREPLACE 0x100000
    #endif
    """

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_FIXED_NOREPLACE
        MAP_NORESERVE
        MAP_POPULATE
        MADV_DONTDUMP
        MADV_DONTFORK
        MADV_DONTNEED
        MADV_DONTNEED_LOCKED
        MADV_FREE
        MADV_HUGEPAGE
        MADV_NOHUGEPAGE
        MADV_POPULATE_READ
        MADV_POPULATE_WRITE
        MADV_WIPEONFORK
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void* address, size_t length)
    int madvise(void* address, size_t length, int advice)
    int munlock(const void* address, size_t length)
