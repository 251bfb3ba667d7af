# Mapped frames: what frames does where userfaultfd is forbidden. The protection of the mapping itself says what is in
# place (PROT_NONE: nothing), a fault is a SIGSEGV, bytes come through /proc/self/mem. All ranges begin at a folio's
# start and end at a folio's, or region's, end; results are 0 or -errno.
#
# The kernel has a mapping for every run of pages of one protection, and at most vm.max_map_count of them for the whole
# process. What we cause is counted here: `mapped_unit` says how much shall come and go together to keep within bounds,
# and -ENOMEM that the kernel has none left; then nothing is lost, and what leaves gives some back.
from libc.stdint cimport int64_t, uint64_t

cdef int mapped_probe() noexcept nogil              # can this process do it?
# Takes the range, all of which is accessible and untouched. `most`: mappings that we may cause.
cdef int mapped_open(char* start, uint64_t length, int64_t most) noexcept nogil
cdef int mapped_reopen() noexcept nogil             # in a forked child
# Whether this is the process that opened it, or shares its memory: another one would write to its parent's. What that
# can have without writing is shown to it, past the books.
cdef bint mapped_ours() noexcept nogil
cdef int mapped_expose(char* at, uint64_t length) noexcept nogil
cdef int mapped_fill(char* at, const void* data, uint64_t length, bint protect) noexcept nogil
cdef int mapped_fill_zeros(char* at, uint64_t length) noexcept nogil    # of what is missing, so nothing is written
cdef int mapped_protect(char* at, uint64_t length) noexcept nogil
cdef int mapped_unprotect(char* at, uint64_t length) noexcept nogil
cdef int mapped_hide(char* at, uint64_t length) noexcept nogil      # the next touch faults; the bytes are there still
# Of a folio that is in place: whether its pages have the protection that they should have, as far as we know.
cdef bint mapped_right(char* page, bint protect) noexcept nogil
cdef int mapped_mend(char* page, bint protect) noexcept nogil           # sees to it, for one page: 1 or -errno
# How many folios, an aligned power of two of them up to `most`, shall come or go together; and whether something should
# go first.
cdef int mapped_unit(int most) noexcept nogil
cdef bint mapped_full() noexcept nogil
cdef int64_t mapped_count() noexcept nogil
