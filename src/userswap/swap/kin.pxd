# Kin: the processes that came of one another by fork since the first of them had a pool. What they share is here: who
# of them lives, and which slots of a swap file each of them still refers to.
#
# *Rows.* Each process has a row: a number, and the generation of it, since rows are used again. It lives as long as a
# file lock on the row's byte of a nameless file does. The lock belongs to an open file description, which is locked
# before the fork and of which only the child has a descriptor after it: so the kernel gives it up however the child
# ends, and by close-on-exec when it becomes another program; and no process number is asked that may be another's.
#
# *Tables.* For each swap file that was in use at a fork, a mapping that all share: a bitmap of its slots for each
# row. Only who opened the file (its *owner*) writes to it; to the others it is read-only. They get the bits of the
# slots that their parent refers to, clear those that they free, and who is gone has none. The owner frees no slot of
# which a bit is left; when it is gone, nobody takes slots any more, and who finds that no bit is left punches the
# hole.
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    KIN_MOST = 1024             # processes at once; past these, children are not counted and never known to be gone

cdef struct KinSlots

# ---- rows. Fork handlers run with the gate closed, alone in the process ----
cdef int kin_before_fork() noexcept nogil       # a row for the child: 0, or -errno and it has none
cdef void kin_after_fork(bint child) noexcept nogil
cdef int kin_me() noexcept nogil                # our row; -1: none
cdef int kin_child() noexcept nogil             # of the fork under way
cdef int kin_rows() noexcept nogil              # all that were ever used are below
cdef uint64_t kin_generation(int row) noexcept nogil            # who has it, or had it last
# For certain: a yes is for ever, a no may be 10 ms old.
cdef bint kin_gone(int row, uint64_t generation) noexcept nogil
cdef int64_t kin_deaths() noexcept nogil        # how many are known to be gone; asks about all, now and then

# ---- tables ----
cdef KinSlots* kin_slots_new(uint64_t slots) noexcept nogil     # ours. NULL: no memory
cdef void kin_slots_delete(KinSlots* t) noexcept nogil          # our mapping of it
# In a fork, a table at a time: the child's bitmap, which is all zeros or (for a child without a row) that of all such;
# set what it may read; then show it. Of a file that we don't own: give it what we have, instead.
cdef uint64_t* kin_slots_open(KinSlots* t, uint64_t top) noexcept nogil         # `top`: words that may have a bit
cdef void kin_slots_show(KinSlots* t) noexcept nogil
cdef void kin_slots_pass(KinSlots* t) noexcept nogil
cdef void kin_slots_clear(KinSlots* t, int64_t slot, int n) noexcept nogil      # we don't refer to these any more
# Whether a living process, us not counted, refers to one of these slots, which the caller does not: then none will.
cdef bint kin_slots_held(KinSlots* t, int64_t slot, int n) noexcept nogil
cdef uint64_t kin_slots_word(KinSlots* t, uint64_t word) noexcept nogil         # 64 slots: of anybody who lives
cdef uint64_t kin_slots_top(KinSlots* t) noexcept nogil
cdef bint kin_slots_any(KinSlots* t) noexcept nogil             # somebody lives who may have one
cdef void kin_slots_close(KinSlots* t) noexcept nogil           # the owner has done with its file
cdef bint kin_slots_orphaned(KinSlots* t) noexcept nogil        # it has, or is gone
cdef int64_t kin_slots_bytes(KinSlots* t) noexcept nogil        # of RAM, about
