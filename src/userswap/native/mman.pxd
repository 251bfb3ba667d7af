# <sys/mman.h>, as much as we use.
cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_POPULATE
        MADV_DONTDUMP
        MADV_DONTNEED
        MADV_NOHUGEPAGE
        MADV_WIPEONFORK
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void* address, size_t length)
    int madvise(void* address, size_t length, int advice)
    int munlock(const void* address, size_t length)
