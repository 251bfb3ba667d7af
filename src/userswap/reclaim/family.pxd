# Family: the processes that came of one another by fork and have copies of one pool share its budget. A mapping that
# all see (the ledger) has a line for each process of swap/kin: what of the budget it has for itself. Each may have
# what the others leave; at least half of an equal share, and what it can't do without; at most the whole budget.
#
# What a child inherits is the parent's memory, which the kernel copies when one of them writes to it: as long as it
# is known to be still the same, it counts in the parent only (the child's *credit*). Whatever might have made a copy
# of it counts against the credit: what the child brings in, what it stores, each page fault of it, and what the
# parent has let go since, as that is then the child's alone.
#
# A line counts from the first charge after the fork on, and until its process is gone: who only forks and executes,
# or never touches swapped memory, costs nobody anything.
from libc.stdint cimport int64_t, uint64_t

cdef struct Line

cdef struct Family:
    Line* lines                 # shared; NULL: nobody was forked
    bint apart                  # each process has a whole budget for itself
    int64_t allowed             # what may be used, if less than the limit; else the limit
    int64_t others              # bytes that the others use, beside what counts in another of them
    int64_t credit              # bytes that we use and that count in the parent
    int64_t again_at            # ns: these two are found out again then
    int parent                  # of whom we inherited; -1: of nobody
    uint64_t parent_generation
    int64_t pool                # what was inherited: bytes of the compressed pool; and what these had counted then:
    int64_t brought
    int64_t left
    int64_t came
    int64_t went
    int64_t page_faults
    int64_t page_faults_then    # ours, when we forked

# What a process says of itself.
cdef struct Account:
    int64_t limit
    int64_t used                # of it: resident + pool + metadata
    int64_t resident
    int64_t pool
    int64_t metadata
    int64_t brought             # bytes that became resident, ever
    int64_t came                # bytes stored in the pool, ever
    int64_t went                # and freed there, or written over

cdef void family_before_fork(Family* f, const Account* a) noexcept nogil        # with the gate closed
cdef void family_inherit(Family* f, const Account* a, int parent, uint64_t parent_generation) noexcept nogil
cdef void family_delete(Family* f) noexcept nogil
cdef bint family_counts(Family* f) noexcept nogil               # we have used the pool since we were forked
# Is it time to say how much we use and to hear how much we may.
cdef bint family_due(Family* f) noexcept nogil
cdef void family_settle(Family* f, const Account* a) noexcept nogil
cdef void family_pressed(Family* f) noexcept nogil              # we would have more, if we might
