"""Faults: every transition of a page-table word, and the signal handler that most of them start from.

Rules that make this safe to run inside a signal handler, without the GIL, in the thread that faulted:
- the signal is synchronous and comes from a load or store into a region; no code of ours touches a region
  while it holds a leaf mutex or an entry's lock, so the handler never finds its own locks held by its thread;
- it takes memory from mmap or from what was made beforehand, never from malloc;
- code that is not the handler blocks asynchronous signals while it is inside the gate, so that a signal handler
  of the program can't touch a region in the middle of a transition.

Deadlock: a thread that owns a BUSY folio waits only for (1) entry locks, whose owners wait only for I/O, and
(2) workers, whose owners wait for entry locks at most. It never waits for another BUSY word: reclaim skips
what is busy. `reclaim_charge` runs before a worker is taken, because eviction takes one of its own.
"""
from libc.errno cimport EAGAIN, EBADMSG, EEXIST, EFAULT, EINVAL, EIO, ENOMEM, ENXIO, ESRCH, ESTALE, EXDEV, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport qsort
from libc.string cimport memcpy, memset, strerror, strlen

from userswap.backends.codec cimport (
    FOLIO_BYTES, FOLIO_SHIFT, PART_BYTES, PART_SHIFT, PARTS, Worker, codec_give, codec_take,
)
from userswap.backends.swapfile cimport SwapFile
from userswap.memory.ahead cimport (
    AHEAD_DEPTH, ROOM, AheadOps, Job, ahead_ask, ahead_await, ahead_close, ahead_end, ahead_fetched, ahead_forget,
    ahead_help, ahead_helped, ahead_open, ahead_renew, ahead_running, ahead_start, ahead_take,
)
from userswap.memory.frames cimport (
    BY_SEGV, BY_SIGNAL, BY_THREAD, frame_expose, frame_fill, frame_fill_zeros, frame_mend, frame_move_in,
    frame_move_out, frame_poison, frame_protect, frame_right, frame_unprotect, frame_vacate, frame_wake,
    frames_can_move, frames_delivery, frames_free_tables, frames_full, frames_mapped, frames_ours, frames_reopen,
    frames_unit,
)
from userswap.memory.pagetable cimport (
    BUSY, CLEAN, DIRTY, EMPTY, FILED, GUARDED, PARTIAL, PIN_MASK, PIN_MAX, PIN_ONE, STAGED, SWAPPED, WAITERS, YOUNG,
    word_id, word_make, word_partial, word_pins, word_resident, word_state, word_with_id,
)
from userswap.memory.regions cimport (
    BUCKETS, PAGE_BYTES, PASSING_MOST, RECENT_MOST, SCATTERED, STREAMS, MemoryPool, Region, Stream, arena_bytes,
    arena_end,
    arena_end_word, arena_first_word, arena_start, folio_bytes, pool_first, pool_fit, pool_next_watched, pool_put,
    region_at, region_folios, region_give_up, region_grow, region_keep, region_may_stay, region_move_window, region_new,
    region_of_word, region_release, region_reuse, region_unlink,
)
from userswap.memory.server cimport ServerOps, server_renew, server_start
from userswap.memory.stage cimport (
    STAGE_SLOTS, stage_give, stage_moved, stage_part_give, stage_part_moved, stage_part_room, stage_renew, stage_room,
    stage_take, stage_take_part, stage_take_window, stage_usable,
)
from userswap.memory.syscalls cimport PinOps, handler_chain, handler_install, siginfo_t, syscalls_install
from userswap.native.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from userswap.native.sum cimport sum_folio, sum_start
from userswap.native.thread cimport threads_renew, threads_used
from userswap.native.us cimport (
    us_add, us_assert, us_cas, us_chaos, us_load, us_lock, us_max, us_mutex, us_now, us_read, us_store, us_store32,
    us_unlock, us_word_release, us_word_spin, us_word_wait, us_write,
)
from userswap.reclaim.reclaim cimport (
    reclaim_background, reclaim_before_fork, reclaim_charge, reclaim_inherit, reclaim_low, reclaim_room,
    reclaim_settle, reclaim_short, reclaim_shrink, reclaim_tend, reclaim_try, reclaim_uncharge, reclaim_untended,
    reclaim_used, reclaim_write,
)
from userswap.swap.holder cimport holder_release
from userswap.swap.kin cimport kin_after_fork, kin_before_fork, kin_generation, kin_me
from userswap.swap.map cimport HolderOps, SwapMap
from userswap.swap.space cimport (
    RUN_FOLIOS, TIER_ZSWAP, Moved, SwapSpace, space_before_fork, space_drain,
    space_drain_some, space_has_device, space_inherit, space_lost, space_lost_at, space_owns, space_packed,
    space_swapoff, space_swapon, swap_better, swap_cached, swap_compact, swap_dup,
    swap_far, swap_fetch, swap_in, swap_in_part, swap_out, swap_out_parts, swap_out_run, swap_promote, swap_put,
    swap_same, swap_shared, swap_uncache, swap_unpack, swap_writeback,
)

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>
    #include <ucontext.h>
    #include "us.h"

    /* How deep this thread is in the gate, and which folios it is reading for swap-out. */
    static __thread int us_depth;
    static __thread sigset_t us_kept_mask;
    static __thread int us_kept_cancel;
    static __thread const char *us_reading, *us_reading_end;
    static __thread int us_reading_guarded;

    static int us_self_depth(void) { return us_depth; }
    static int us_deeper(void) {
        if (us_depth++) return 1;
        /* Our I/O would be a cancellation point in the middle of a transition. */
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &us_kept_cancel);
        return 0;
    }
    static int us_shallower(void) { return --us_depth; }
    static void us_allow_cancel(void) { pthread_setcancelstate(us_kept_cancel, NULL); }
    static int us_self_reading(const char *at) { return at >= us_reading && at < us_reading_end; }
    static int us_self_guarded(void) { return us_reading_guarded; }
    /* The same for others to see, by thread: who serves its fault is another one (BY_THREAD). */
    #define US_READERS 64
    static struct us_reader { uint32_t thread; int guarded; const char *at, *end; } us_readers[US_READERS];
    static int us_readers_wanted;
    static __thread struct us_reader *us_reader;

    static void us_set_reading(const char *at, uint64_t length, int guarded) {
        us_reading = at;
        us_reading_end = at + length;
        us_reading_guarded = guarded;
        if (!us_readers_wanted) return;
        uint32_t thread = (uint32_t)syscall(SYS_gettid);
        for (unsigned i = thread; length && !us_reader; i++) {
            struct us_reader *reader = &us_readers[i % US_READERS];
            if (us_cas32(&reader->thread, 0, UINT32_MAX)) us_reader = reader;
        }
        if (us_reader) {
            us_reader->at = at;
            us_reader->end = at + length;
            us_reader->guarded = guarded;
            us_store32(&us_reader->thread, length ? thread : 0);
            if (!length) us_reader = NULL;
        }
    }
    /* Which regions threads of ours serve faults of (BY_THREAD): the program goes on before they are done with it. */
    #define US_SERVERS 64
    static const void *us_served[US_SERVERS];
    static uint32_t us_servers;
    static __thread int us_server = -1;
    static void us_serve(const void *region) {
        if (us_server < 0) us_server = (int)(__atomic_fetch_add(&us_servers, 1, __ATOMIC_RELAXED) % US_SERVERS);
        __atomic_store_n(&us_served[us_server], region, __ATOMIC_SEQ_CST);
    }
    static int us_is_served(const void *region) {
        for (int i = 0; i < US_SERVERS; i++)
            if (__atomic_load_n(&us_served[i], __ATOMIC_SEQ_CST) == region) return 1;
        return 0;
    }

    static void us_readers_renew(int wanted) {
        memset(us_readers, 0, sizeof us_readers);
        us_readers_wanted = wanted;
        us_reader = NULL;
        memset(us_served, 0, sizeof us_served);
        us_servers = 0;
    }
    /* Whether a thread that faulted here is reading it, and so will be until it is served; is it protected? -1: no. */
    static int us_reads(const char *at, uint32_t thread) {
        for (int i = 0; i < US_READERS; i++) {
            const struct us_reader *reader = &us_readers[i];
            if (us_load32(&reader->thread) == thread && at >= reader->at && at < reader->end) return reader->guarded;
        }
        return -1;
    }

    /* How often in a row this thread faulted at an address where there was nothing to do. In a row: that it has read
     * there in the meantime can't be seen, but takes longer than to come back at once. */
    #define US_AT_ONCE 1000000
    static __thread const void *us_idle_at;
    static __thread int us_idle_times;
    static __thread int64_t us_idle_since;
    static int us_idle(const void *at) {
        int64_t now = us_now();
        us_idle_times = at == us_idle_at && now - us_idle_since < US_AT_ONCE ? us_idle_times + 1 : 1;
        us_idle_at = at;
        us_idle_since = now;
        return us_idle_times;
    }
    static void us_not_idle(void) { us_idle_at = NULL; }

    /* A bus error for the process, which no handler hears of. */
    static void us_die_of_bus_error(void) {
        signal(SIGBUS, SIG_DFL);
        kill(getpid(), SIGBUS);
    }
    /* A bus error for this thread, now: whatever the program does about one. */
    static void us_bus_error(void *at) {
        struct sigaction action;
        siginfo_t info;
        sigset_t bus;
        memset(&info, 0, sizeof info);
        info.si_signo = SIGBUS;
        info.si_code = BUS_ADRERR;
        info.si_addr = at;
        if (sigaction(SIGBUS, NULL, &action) == 0 && action.sa_handler == SIG_IGN) signal(SIGBUS, SIG_DFL);
        sigemptyset(&bus);
        sigaddset(&bus, SIGBUS);
        pthread_sigmask(SIG_UNBLOCK, &bus, NULL);
        syscall(SYS_rt_tgsigqueueinfo, getpid(), (pid_t)syscall(SYS_gettid), SIGBUS, &info);
    }

    /* Was the fault a store? -1 where the processor's context does not say. */
    static int us_fault_writes(void *context) {
    #if defined(__x86_64__)
        return (((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2) != 0;
    #else
        return -1;
    #endif
    }

    /* Blocks what is asynchronous; faults of ours and of others stay deliverable. */
    static void us_block_signals(void) {
        sigset_t all;
        sigfillset(&all);
        sigdelset(&all, SIGBUS);
        sigdelset(&all, SIGSEGV);
        sigdelset(&all, SIGFPE);
        sigdelset(&all, SIGILL);
        sigdelset(&all, SIGTRAP);
        sigdelset(&all, SIGABRT);
        pthread_sigmask(SIG_SETMASK, &all, &us_kept_mask);
    }
    static void us_restore_signals(void) { pthread_sigmask(SIG_SETMASK, &us_kept_mask, NULL); }
    """
    int SIGBUS
    int SIGSEGV
    int BUS_ADRERR              # not BUS_MCEERR_AR: a page of broken memory is not ours to mend
    int SEGV_ACCERR             # not SEGV_MAPERR: all of the arena is mapped
    int us_idle(const void* at) nogil
    void us_not_idle() nogil
    void us_bus_error(void* at) nogil
    void us_die_of_bus_error() nogil
    int us_self_depth() nogil
    int us_deeper() nogil
    int us_shallower() nogil
    void us_allow_cancel() nogil
    bint us_self_reading(const char* at) nogil
    bint us_self_guarded() nogil
    # `guarded`: it is write-protected meanwhile, so what is missing has to be, too
    void us_set_reading(const char* at, uint64_t length, bint guarded) nogil
    void us_readers_renew(bint wanted) nogil
    int us_reads(const char* at, uint32_t thread) nogil
    void us_serve(const void* region) nogil
    bint us_is_served(const void* region) nogil
    int us_fault_writes(void* context) nogil
    void us_block_signals() nogil
    void us_restore_signals() nogil

cdef extern from "shim.h" nogil:
    int us_shim_atfork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                       void (*in_child)() noexcept nogil)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* buffer, size_t length)
    void _exit(int status)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    BATCH = STAGE_SLOTS         # most folios evicted in one go
    TRIES_FOR_MAPPINGS = 8      # batches that leave for a change of protection
    LEAST_BATCH = 8             # and fewest, so that neighbours share system calls and TLB flushes
    TRIES = 64                  # victims that may fail to leave (incompressible, no device) before it gives up
    HOT = 2                     # what comes back before 1/HOT as many have left as zswap has is hot
    FEW_CHANCES = 4             # one in so many times whole folios leave for parts that come back soon
    MANY_CHANCES = 512          # and for others
    PASSING_KEPT = 4            # windows that a scan may be at still
    FAR = 4                     # what comes back after so many times as many left as are in place is beyond hope
    SWEEP = 256                 # folios looked at for copies that are not needed, for each window that leaves
    RECENT_LEAST = 4            # faults at least whose folios stay, and a quarter of what is in place at most
    LEAST_ROOMY = 4 << 20       # bytes of a region; from there on NumPy asks the kernel for huge pages, too
    CHANCES = 32                # one in so many folios that should go back to the file gets a place in zswap
    SPINS = 400                 # looks at a word before sleeping: most are held for a few microseconds
    IDLE = 1                    # what folio_fault says when there was nothing to do
    IDLE_TIMES = 64             # faults in a row with nothing to do: then it is the program's own protection
    STRAYS = 16                 # threads, by number
    STRAY_TIMES = 4             # faults in a row where nothing is: then it is the program's mistake
    GATE_CLOSED = 1
    GATE_WAITERS = 2
    GATE_ONE = 4

cdef uint64_t PART_FILED = <uint64_t>1 << PARTS     # in `sums`: its copy was in the swap file
cdef uint64_t ALL = <uint64_t>-1     # no folio is spared
cdef uint64_t NOWHERE = <uint64_t>-1     # no folio that a stream goes on with

# The gate: how many threads are inside a transition. fork closes it and waits until it is empty, so that a
# child never inherits a BUSY word or a held mutex.
cdef uint64_t gate = 0
cdef bint installed = False
cdef int64_t poisoned = 0           # pages may be (BY_THREAD)


cdef void gate_enter() noexcept nogil:
    cdef uint64_t seen
    if us_deeper() > 0:
        return
    while True:
        seen = us_load(&gate)
        if seen & GATE_CLOSED:
            us_word_wait(&gate, seen, GATE_WAITERS)
        elif us_cas(&gate, seen, seen + GATE_ONE):
            return


cdef void gate_leave() noexcept nogil:
    if us_shallower() == 0:
        us_add(<int64_t*>&gate, -GATE_ONE)
        us_allow_cancel()


cdef void enter() noexcept nogil:
    """Into the gate from ordinary code."""
    if us_self_depth() == 0:
        us_block_signals()
    gate_enter()


cdef void leave() noexcept nogil:
    gate_leave()
    if us_self_depth() == 0:
        us_restore_signals()


# ---- page-table words from the side of storage: what the swap space calls (see map.pxd) ----

cdef uint64_t word_trylock(void* ctx, uint64_t holder, uint64_t id) noexcept nogil:
    """Sets BUSY on a word that has this id (any, if 0), unless somebody has it or a system call has it pinned."""
    cdef uint64_t* at = <uint64_t*>holder
    cdef uint64_t word = us_load(at)
    cdef Region* region
    if word & (BUSY | PIN_MASK) or word_id(word) == 0 or (id and word_id(word) != id):
        return 0
    us_chaos()
    if not us_cas(at, word, word | BUSY):
        return 0
    # With an id it belongs to a live region, which stays while the word is BUSY. Another pool's ids mean nothing here.
    region = region_of_word(at)
    if region == NULL or region.pool != <MemoryPool*>ctx:
        us_word_release(at, word & ~<uint64_t>WAITERS, WAITERS)
        return 0
    return word_id(word)


cdef uint64_t word_next(void* ctx, uint64_t after, uint64_t* id) noexcept nogil:
    """By address, over all words of the arena that were ever in use: regions may come and go meanwhile."""
    cdef uint64_t* at = <uint64_t*>after
    cdef uint64_t* end
    cdef Region* region
    at = arena_first_word() if at == NULL else at + 1
    end = arena_end_word()
    while at < end:
        region = region_of_word(at)
        if region == NULL or region.pool != <MemoryPool*>ctx:
            at += 1
            continue
        id[0] = word_id(us_load(at))
        if id[0]:
            return <uint64_t>at
        at += 1
    return 0


cdef HolderOps holder_ops
holder_ops.trylock = word_trylock
holder_ops.next = word_next


cdef const HolderOps* memory_holders() noexcept nogil:
    return &holder_ops


# ---- swap-in ----

cdef inline char* folio_at(Region* region, uint64_t index) noexcept nogil:
    return region.base + (index << FOLIO_SHIFT)


cdef inline bint by_signal() noexcept nogil:
    """Whether the kernel's own access to what is missing fails. Else the sum of what is GUARDED is known, too."""
    return frames_delivery() == BY_SIGNAL


cdef int fill_from_peer(MemoryPool* pool, uint64_t id, char* target, uint64_t bytes, bint protect,
                        uint64_t* sum) noexcept nogil:
    """Copies a shared folio from another holder that has it clean in place, protected or with `sum`. -ENXIO: there is
    none just now."""
    cdef uint64_t peer = swap_cached(pool.swap, id)
    cdef uint64_t* word = <uint64_t*>peer
    cdef Region* region
    cdef uint64_t index
    cdef Worker* worker
    cdef int error = -ENXIO
    if peer == 0 or word_trylock(pool, peer, id) == 0:
        return -ENXIO
    region = region_of_word(word)
    index = word - region.words
    if us_load(word) & GUARDED and folio_bytes(region, index) >= bytes:
        # It is what the id has, since nobody can write to it. The kernel reads it: if the program threw a page of it
        # away (madvise) that fails, and storage has the bytes.
        if not by_signal():
            # There it reads as zeros instead: looked at, in a copy that stays what it is.
            worker = codec_take()
            us_set_reading(folio_at(region, index), folio_bytes(region, index), True)
            memcpy(worker.folio, folio_at(region, index), folio_bytes(region, index))
            us_set_reading(NULL, 0, False)
            if still_clean(region, index, worker.folio):
                sum[0] = sum_folio(worker.folio, bytes)
                error = frame_fill(target, worker.folio, bytes, protect)
            codec_give(worker)
        else:
            error = frame_fill(target, folio_at(region, index), bytes, protect)
        if error:
            frame_vacate(target, bytes)
        else:
            us_add(&pool.swap.cache_hits, 1)
    holder_release(word, id)
    return error


cdef void tend_files(Region* region) noexcept nogil:
    """Asked at every fault, whatever it follows: a program that goes backwards, or anywhere, has no other that asks. It
    is the thread's, or, where there is none (one processor, frames that can't be moved), ours."""
    if not reclaim_untended(&region.pool.reclaim):
        return
    if ahead_running():
        ahead_ask(region, ROOM)
    else:
        reclaim_tend(&region.pool.reclaim)


cdef bint charge(Region* region, uint64_t bytes, bint needed) noexcept nogil:
    """Before `bytes` of a region come into place: makes room now. False: there is none for what is not `needed`, and it
    is not charged.

    What is not needed belongs to faults in a row: there the thread makes room for who comes next. Not where faults go
    anywhere: many small pieces leave then, and each is a TLB flush that interrupts the program's processor."""
    if needed:
        reclaim_charge(&region.pool.reclaim, <int64_t>bytes, False)
        tend_files(region)
        return True
    if not reclaim_try(&region.pool.reclaim, <int64_t>bytes):
        return False
    if region.scattered < SCATTERED and reclaim_short(&region.pool.reclaim) and ahead_running():
        ahead_ask(region, ROOM)
    return True


cdef void charge_part(Region* region) noexcept nogil:
    """A part makes room by the leaving of parts. Who has whole folios in place without a copy of them elsewhere has a
    part for 8 KiB more than it is packed; as a part of a folio that is packed as a whole, it takes 16."""
    reclaim_charge(&region.pool.reclaim, PART_BYTES, True)
    # What the thread does here is write to the file while the program goes on: no page table changes by that.
    tend_files(region)
    if reclaim_low(&region.pool.reclaim) and ahead_running():
        ahead_ask(region, ROOM)


cdef int place(char* folio, char* frame) noexcept nogil:
    """A frame, with its bytes, into place, where a whole folio is missing. 0 or -errno, and the frame is gone."""
    cdef int error
    us_chaos()
    error = frame_move_in(folio, frame, FOLIO_BYTES)
    if error:
        stage_give(frame, 1, False)
    else:
        stage_moved(frame, 1)
    return error


cdef inline uint64_t without_copy(MemoryPool* pool, uint64_t id) noexcept nogil:
    """The word of a resident folio whose copy is given up."""
    return word_make(DIRTY, 0) | <uint64_t>(FILED if swap_put(pool.swap, id) else 0)


cdef inline int64_t turn_length(Region* region, uint64_t index, uint32_t now) noexcept nogil:
    """How many folios have left since this one did, whole or in parts."""
    return <uint32_t>(now - region.left[index])


cdef bint refault(Region* region, uint64_t index) noexcept nogil:
    """Whether a SWAPPED folio would still be in place with twice the room: since it left, no more has left than is in
    place now. The refault distance of Linux's mm/workingset.c."""
    return (turn_length(region, index, <uint32_t>us_read(&region.pool.left))
            <= us_read(&region.pool.reclaim.resident) >> PART_SHIFT)


cdef bint is_hot(Region* region, uint64_t index, const Worker* worker) noexcept nogil:
    """Whether a SWAPPED folio, whose copy was just loaded from a swap file, has a better claim to zswap, or to a faster
    file, than what is there: then it moves."""
    return (turn_length(region, index, <uint32_t>us_read(&region.pool.left))
            < swap_better(region.pool.swap, worker, region.hint.tiers) // HOT)


cdef int make_resident(Region* region, uint64_t index, uint64_t word, bint writing) noexcept nogil:
    """EMPTY or SWAPPED to resident. The caller has charged the folio, and has set BUSY on `word`, which is released
    here, whatever happens."""
    cdef MemoryPool* pool = region.pool
    cdef uint64_t* at = &region.words[index]
    cdef char* folio = folio_at(region, index)
    cdef uint64_t bytes = folio_bytes(region, index)
    cdef uint64_t id = word_id(word)
    cdef uint64_t next = word_make(DIRTY, 0)
    cdef Worker* worker
    cdef char* frame = NULL
    cdef bint zeros = False
    cdef bint shared = not writing and id != 0 and swap_shared(pool.swap, id)
    cdef bint guarded
    cdef int error = -ENXIO
    region.broken[index // STAGE_SLOTS] = True
    us_chaos()
    # The clean folio of a shared id is guarded, so that other holders can copy it. Guarded from the start means copied.
    if bytes == FOLIO_BYTES and not shared:
        frame = stage_take(&zeros)
    # Where a mapping is what protects, its sum says whether a folio was written to, and neighbours stay one mapping.
    guarded = frame == NULL and not writing and (shared or not frames_mapped())
    if word_state(word) == EMPTY:
        if frame == NULL:
            error = frame_fill_zeros(folio, bytes)
        else:
            if not zeros:
                memset(frame, 0, FOLIO_BYTES)
            error = place(folio, frame)
    else:
        # clean: the swap cache keeps the copy, and the first write to the folio gives it up
        if frame == NULL:
            error = fill_from_peer(pool, id, folio, bytes, guarded, &region.sums[index])
        if error:
            worker = codec_take()
            error = swap_in(pool.swap, worker, id, worker.folio if frame == NULL else frame, <int>bytes,
                            <uint64_t>at if guarded else 0)
            if error == 0 and frame == NULL:
                if not writing and not by_signal():
                    region.sums[index] = sum_folio(worker.folio, bytes)
                error = frame_fill(folio, worker.folio, bytes, guarded)
            if error == 0 and not writing and not guarded and worker.loaded and is_hot(region, index, worker):
                id = swap_promote(pool.swap, worker, id, region.hint.tiers, <uint64_t>at)
                word = word_with_id(word, id)
            codec_give(worker)
            if frame != NULL and error:
                stage_give(frame, 1, False)
            elif frame != NULL:
                if not writing:
                    region.sums[index] = sum_folio(frame, bytes)
                error = place(folio, frame)
        if not writing:
            next = word_make(CLEAN, id) | <uint64_t>(GUARDED if guarded else 0)
    if error:
        frame_vacate(folio, bytes)              # a part of it may have been filled
        reclaim_uncharge(&pool.reclaim, <int64_t>bytes)
        us_word_release(at, word & ~<uint64_t>(BUSY | WAITERS), WAITERS)
        return error
    if word_state(word) == SWAPPED:
        us_add(&pool.swapped_bytes, -<int64_t>bytes)
        if writing:
            next = without_copy(pool, id)
    us_chaos()
    us_word_release(at, next | YOUNG, WAITERS)
    return 0


# ---- parts of folios ----

ctypedef char* Frame
ctypedef const void* Bytes


cdef inline char* part_at(Region* region, uint64_t index, int part) noexcept nogil:
    return folio_at(region, index) + (part << PART_SHIFT)


cdef inline bint part_in_place(Region* region, uint64_t index, int part) noexcept nogil:
    """Of a PARTIAL folio."""
    return (region.sums[index] >> part) & 1


cdef int parts_in_place(Region* region, uint64_t index, uint64_t word) noexcept nogil:
    """0: the folio is not PARTIAL."""
    cdef int part, count = 0
    if word_partial(word):
        for part in range(PARTS):
            count += part_in_place(region, index, part)
    return count


cdef uint64_t bytes_in_place(Region* region, uint64_t index, uint64_t word) noexcept nogil:
    """Of a resident folio."""
    return (<uint64_t>parts_in_place(region, index, word) << PART_SHIFT if word_partial(word)
            else folio_bytes(region, index))


cdef int make_part(Region* region, uint64_t index, uint64_t word, int part, bint writing) noexcept nogil:
    """One part of a folio that is SWAPPED, or PARTIAL without it. The caller has charged it and has set BUSY, which is
    released here, whatever happens."""
    cdef MemoryPool* pool = region.pool
    cdef char* place = part_at(region, index, part)
    cdef char* frame = stage_take_part()
    cdef Worker* worker = codec_take()
    cdef char* bytes = frame if frame != NULL else worker.folio
    cdef uint64_t sum = 0
    # Nobody sees what is read again while it is in place: only what comes back soon is known to be wanted.
    cdef uint64_t young = YOUNG if word_partial(word) or refault(region, index) else 0
    cdef bint soon = turn_length(region, index, <uint32_t>us_read(&pool.left)) <= us_read(&pool.parts)
    cdef uint64_t others = region.sums[index] if word_partial(word) else 0
    cdef int error = swap_in_part(pool.swap, worker, word_id(word), part, bytes)
    cdef bint hot
    region.broken[index // STAGE_SLOTS] = True
    if not word_partial(word):
        us_write(&pool.soon, us_read(&pool.soon) + ((65536 if soon else 0) - us_read(&pool.soon)) // 1024)
    us_chaos()
    if error == 0:
        # What is written to will be stored anew, together with the parts that are not in place; and then maybe back
        # there.
        hot = worker.loaded and is_hot(region, index, worker)
        if hot or (worker.loaded and writing and region.hint.tiers & TIER_ZSWAP):
            others |= 0 if hot else PART_FILED
            word = word_with_id(word, swap_promote(pool.swap, worker, word_id(word), region.hint.tiers,
                                                   <uint64_t>&region.words[index]))
        sum = sum_folio(bytes, PART_BYTES)
        if frame == NULL:
            error = frame_fill(place, bytes, PART_BYTES, False)
    codec_give(worker)
    if error == 0 and frame != NULL:
        error = frame_move_in(place, frame, PART_BYTES)
        if error == 0:
            stage_part_moved(frame)
            frame = NULL
    if frame != NULL:
        stage_part_give(frame)
    us_chaos()
    if error:
        frame_vacate(place, PART_BYTES)
        reclaim_uncharge(&pool.reclaim, PART_BYTES)
        us_word_release(&region.words[index], word & ~<uint64_t>(BUSY | WAITERS), WAITERS)
        return error
    region.part_sums[PARTS * index + part] = sum
    region.sums[index] = others | (<uint64_t>1 << part)
    us_add(&pool.swapped_bytes, -PART_BYTES)
    us_add(&pool.parts, 1)
    us_word_release(&region.words[index], word_make(CLEAN, word_id(word)) | PARTIAL | young, WAITERS)
    return 0


cdef int complete(Region* region, uint64_t index, uint64_t* word) noexcept nogil:
    """PARTIAL to CLEAN: the other parts, too. The caller has set BUSY and keeps it, and has no worker. 0 or -errno, and
    then nothing has changed."""
    cdef MemoryPool* pool = region.pool
    cdef int64_t missing = FOLIO_BYTES - <int64_t>bytes_in_place(region, index, word[0])
    cdef Worker* worker
    cdef int error, part
    charge(region, missing, True)
    worker = codec_take()
    error = swap_in(pool.swap, worker, word_id(word[0]), worker.folio, FOLIO_BYTES, 0)
    us_chaos()
    for part in range(PARTS):
        if error == 0 and not part_in_place(region, index, part):
            error = frame_fill(part_at(region, index, part), worker.folio + (part << PART_SHIFT), PART_BYTES, False)
    if error:
        for part in range(PARTS):
            if not part_in_place(region, index, part):
                frame_vacate(part_at(region, index, part), PART_BYTES)
        reclaim_uncharge(&pool.reclaim, missing)
    else:
        # Of what is stored: a part that was written to makes the folio another one.
        region.sums[index] = sum_folio(worker.folio, FOLIO_BYTES)
        us_add(&pool.swapped_bytes, -missing)
        us_add(&pool.parts, -((FOLIO_BYTES - missing) >> PART_SHIFT))
        word[0] &= ~<uint64_t>PARTIAL
    codec_give(worker)
    return error


cdef int part_fault(Region* region, uint64_t index, uint64_t word, char* page, bint writing) noexcept nogil:
    """A PARTIAL folio, BUSY by the caller, released here: the part with this page; all of it if the program reads on
    and on, if it wants most of it, or if there was no fault (`page` is NULL: pinning)."""
    cdef int part = <int>((page - folio_at(region, index)) >> PART_SHIFT) if page != NULL else 0
    cdef bint in_order = region.sums[index] & ~<uint64_t>PART_FILED == (<uint64_t>1 << part) - 1
    cdef bint most = parts_in_place(region, index, word) >= PARTS // 2
    cdef int error
    if page != NULL and part_in_place(region, index, part):
        # Another thread was faster, or the program threw the page away with madvise.
        error = frame_mend(page, False)
        error = error if error < 0 else 0
    elif page != NULL and not most:
        charge_part(region)
        return make_part(region, index, word, part, writing)
    else:
        error = complete(region, index, &word)
        if error and page != NULL:
            # One by one, then: only who needs the damaged part hears of it.
            charge_part(region)
            return make_part(region, index, word, part, writing)
        if error == 0 and page != NULL and not in_order:
            word = without_copy(region.pool, word_id(word)) | BUSY
    us_word_release(&region.words[index], (word & ~<uint64_t>(BUSY | WAITERS)) | YOUNG, WAITERS)
    return error


# ---- faults in a row ----

cdef inline bint in_reach(uint64_t above, uint64_t below) noexcept nogil:
    return above != NOWHERE and above >= below and above - below <= 2 * STAGE_SLOTS


cdef bint all_resident(Region* region, uint64_t first, uint64_t last) noexcept nogil:
    """What lies between a stream and who may belong to it was there already; none, if `first` is behind `last`."""
    while first <= last and last != NOWHERE and word_resident(us_load(&region.words[first])):
        first += 1
    return first > last or last == NOWHERE


cdef int wanted_run(Region* region, uint64_t index) noexcept nogil:
    """How many folios from this one on shall come together: more each time while faults follow each other, up to the
    end of a window, so that what goes on from there can be a huge page. 0: it does not follow any. Downwards it is -1,
    or -STAGE_SLOTS for the window that this one is the last of: a program that partitions goes both ways."""
    cdef Stream* stream
    cdef int i, most
    for i in range(STREAMS):
        stream = &region.streams[i]
        if stream.run == 0:
            continue
        if in_reach(stream.back, index) and all_resident(region, index + 1, stream.back):
            stream.run = 2 * stream.run if 2 * stream.run < STAGE_SLOTS else STAGE_SLOTS
            stream.next = NOWHERE
            most = STAGE_SLOTS if (stream.run == STAGE_SLOTS <= region.pool.run_most
                                   and index % STAGE_SLOTS == STAGE_SLOTS - 1) else 1
            stream.back = index - <uint64_t>most
            return -most
        if not in_reach(index, stream.next) or not all_resident(region, stream.next, index - 1):
            continue
        stream.back = NOWHERE
        most = 2 * stream.run
        if region.scattered >= SCATTERED:
            most = 2                # in a small region many follow by chance: a few more before it is believed
        if most > region.pool.run_most:
            most = region.pool.run_most
        if <uint64_t>most > STAGE_SLOTS - index % STAGE_SLOTS:
            most = <int>(STAGE_SLOTS - index % STAGE_SLOTS)
        if index + <uint64_t>most > region_folios(region):
            most = <int>(region_folios(region) - index)
        stream.run = 2 * stream.run if 2 * stream.run < STAGE_SLOTS else STAGE_SLOTS
        stream.next = index + <uint64_t>most
        return most
    stream = &region.streams[region.turn % STREAMS]
    region.turn = (region.turn + 1) % STREAMS
    stream.next = index + 1
    stream.back = index - 1 if index else NOWHERE
    stream.run = 1
    return 0


cdef inline bint whole_window(Region* region, uint64_t first) noexcept nogil:
    """Not where the region's last folio is a short one: what lies behind it is not the region's."""
    return first + STAGE_SLOTS <= region.bytes >> FOLIO_SHIFT


cdef bint goes_round(Region* region, uint64_t first) noexcept nogil:
    """Whether a window that comes shall be the first to leave again, because all of what it belongs to is gone over
    again and again. Whatever leaves then is wanted before what came last: so that goes next, and the rest stays. One
    in 32 stays as well, or what is in place and dead would for ever (Qureshi et al., ISCA 2007).

    It seems so if it was among the first to leave of what is not in place. If it comes back sooner than most, it is a
    part of it that the program stays with, and belongs in place; unless that has been tried, and it had to leave before
    it was wanted again. Not where little is in place: one pass more or less of that is nothing."""
    cdef MemoryPool* pool = region.pool
    cdef uint32_t now = <uint32_t>us_read(&pool.left)
    cdef int64_t turn = turn_length(region, first, now)
    cdef uint32_t random = (now + <uint32_t>first) * <uint32_t>2654435761u
    cdef bint late = turn >= us_read(&pool.swapped_bytes) >> (FOLIO_SHIFT + 1)
    cdef bint tried = region.stayed[first // STAGE_SLOTS]
    region.stayed[first // STAGE_SLOTS] = not late
    return ((late or tried) and turn <= FAR * (us_read(&pool.reclaim.resident) >> FOLIO_SHIFT)
            and (random >> 16) % CHANCES != 0)


cdef void is_passing(Region* region, uint64_t first) noexcept nogil:
    """A window that is in place shall leave before others. The oldest of many stays, as if it were any other."""
    cdef MemoryPool* pool = region.pool
    cdef uint32_t at
    us_lock(&pool.list_lock)
    at = (pool.passing_first + pool.passing_count) % PASSING_MOST
    pool.passing[at].region = region
    pool.passing[at].first = first
    if pool.passing_count < PASSING_MOST:
        pool.passing_count += 1
    else:
        pool.passing_first = (pool.passing_first + 1) % PASSING_MOST
    us_unlock(&pool.list_lock)


cdef bint window_in_place(Region* region, uint64_t first, char* frames, uint64_t index, bint writing) noexcept nogil:
    """A window with its bytes into place; every word of it is BUSY by us, and released. False: it can't be, the frames
    and what they were charged are given back, and the words are as they were."""
    cdef MemoryPool* pool = region.pool
    cdef uint64_t* words = &region.words[first]
    cdef char* folios = folio_at(region, first)
    cdef uint64_t seen
    cdef uint64_t i
    cdef bint round = word_state(us_load(words)) == SWAPPED and goes_round(region, first)
    us_chaos()
    if region.broken[first // STAGE_SLOTS] or frames_free_tables():
        # Nothing is there, but maybe a page table, from before or by this fault: this frees it, and the window stays
        # one piece.
        frame_vacate(folios, STAGE_SLOTS * FOLIO_BYTES)
        region.broken[first // STAGE_SLOTS] = False
    if frame_move_in(folios, frames, STAGE_SLOTS * FOLIO_BYTES) != 0:
        region.broken[first // STAGE_SLOTS] = True
        stage_give(frames, STAGE_SLOTS, True)
        frame_vacate(folios, STAGE_SLOTS * FOLIO_BYTES)
        reclaim_uncharge(&pool.reclaim, STAGE_SLOTS * FOLIO_BYTES)
        return False
    stage_moved(frames, STAGE_SLOTS)
    us_chaos()
    for i in range(STAGE_SLOTS):
        seen = us_load(&words[i])
        if word_state(seen) == EMPTY:
            seen = word_make(DIRTY, 0)
        else:
            us_add(&pool.swapped_bytes, -<int64_t>FOLIO_BYTES)
            if writing and first + i == index:
                seen = without_copy(pool, word_id(seen))
            else:
                seen = word_make(CLEAN, word_id(seen))
        us_word_release(&words[i], seen, WAITERS)           # none YOUNG: they leave together, too
    if round:
        is_passing(region, first)
    return True


cdef bint make_window(Region* region, uint64_t first, uint64_t index, bint writing) noexcept nogil:
    """A whole window, every folio of it in the same state and with BUSY set by us: into place as one piece. `index` is
    the one that is wanted. False: it can't be had so."""
    cdef MemoryPool* pool = region.pool
    cdef uint64_t* words = &region.words[first]
    cdef Worker* worker
    cdef char* frames
    cdef bint zeros = False
    cdef uint64_t[STAGE_SLOTS] entries
    cdef int error = 0
    cdef uint64_t i
    if word_state(us_load(words)) == EMPTY and region_move_window(region, first):
        for i in range(STAGE_SLOTS):
            us_word_release(&words[i], word_make(DIRTY, 0), WAITERS)
        return True
    if not charge(region, STAGE_SLOTS * FOLIO_BYTES, False):
        return False
    frames = stage_take_window(&zeros)
    if frames != NULL and word_state(us_load(words)) == EMPTY:
        if not zeros:
            memset(frames, 0, STAGE_SLOTS * FOLIO_BYTES)
    elif frames != NULL:
        worker = codec_take()
        fetch(region, first, frames, worker, entries)
        for i in range(STAGE_SLOTS):
            error = stage_folio(region, first + i, frames + (i << FOLIO_SHIFT), worker, entries[i])
            if error:
                break
        codec_give(worker)
        if error:
            # One by one, then: only who needs the damaged one hears of it.
            stage_give(frames, STAGE_SLOTS, True)
            frames = NULL
    if frames == NULL:
        reclaim_uncharge(&pool.reclaim, STAGE_SLOTS * FOLIO_BYTES)
        return False
    return window_in_place(region, first, frames, index, writing)


cdef bint make_window_below(Region* region, uint64_t index, uint64_t word, bint writing) noexcept nogil:
    """The window that this folio, whose BUSY the caller has set, is the last of. True: all of it is in place, and its
    words are released. False: nothing has changed."""
    cdef uint64_t first = index + 1 - STAGE_SLOTS
    cdef uint64_t at = index
    if not whole_window(region, first):
        return False
    while at > first and hold_like(region, at - 1, word):
        at -= 1
    if at == first and make_window(region, first, index, writing):
        return True
    unbusy(region, at, index - at, ALL, 0)
    return False


cdef bint hold_like(Region* region, uint64_t index, uint64_t word) noexcept nogil:
    """Sets BUSY on a folio that shall come together with one that has this word, if it can."""
    cdef uint64_t* at = &region.words[index]
    cdef uint64_t seen = us_load(at)
    if seen & BUSY or word_state(seen) != word_state(word):
        return False
    if not us_cas(at, seen, (seen | BUSY) & ~<uint64_t>WAITERS):
        return False
    # Not asked before it is held: the id could end.
    if word_id(seen) and swap_shared(region.pool.swap, word_id(seen)):
        us_word_release(at, us_load(at) & ~<uint64_t>(BUSY | WAITERS), WAITERS)
        return False
    return True


# ---- readahead: the jobs of memory/ahead ----

cdef void change_id(uint64_t* at, uint64_t id) noexcept nogil:
    """Of a word that is BUSY by us: others only set WAITERS."""
    cdef uint64_t seen = us_load(at)
    while not us_cas(at, seen, word_with_id(seen, id)):
        seen = us_load(at)


cdef int stage_folio(Region* region, uint64_t index, char* frame, Worker* worker, uint64_t fetched) noexcept nogil:
    """The bytes of a SWAPPED folio, whose word is BUSY, to the stage. `fetched`: what swap_fetch said. 0 or -errno."""
    cdef SwapSpace* swap = region.pool.swap
    cdef int error = -EIO
    if fetched:
        error = swap_unpack(swap, worker, fetched, frame)
    # What did not come whole is asked for by itself: that is looked at twice.
    if error:
        error = swap_in(swap, worker, word_id(us_load(&region.words[index])), frame, FOLIO_BYTES, 0)
    if error == 0:
        if worker.loaded and is_hot(region, index, worker):
            change_id(&region.words[index], swap_promote(swap, worker, word_id(us_load(&region.words[index])),
                                                         region.hint.tiers, <uint64_t>&region.words[index]))
        region.sums[index] = sum_folio(frame, FOLIO_BYTES)
    return error


cdef void fetch(Region* region, uint64_t first, char* frames, Worker* worker, uint64_t* entries) noexcept nogil:
    """What of a window, whose words are BUSY, is in a swap file: to its frames (see swap_fetch)."""
    cdef uint64_t[STAGE_SLOTS] ids
    cdef int i
    for i in range(STAGE_SLOTS):
        ids[i] = word_id(us_load(&region.words[first + <uint64_t>i]))
    swap_fetch(region.pool.swap, ids, STAGE_SLOTS, frames, worker.folio, entries)


cdef void put_in_order(Job* job) noexcept nogil:
    """Helpers do what is near while the thread reads what is far."""
    cdef int i, near = 0, far = STAGE_SLOTS
    for i in range(STAGE_SLOTS):
        if swap_far(job.region.pool.swap, word_id(us_load(&job.region.words[job.first + <uint64_t>i]))):
            far -= 1
            job.order[far] = <uint8_t>i
        else:
            job.order[near] = <uint8_t>i
            near += 1
        job.entries[i] = 0
    job.far = STAGE_SLOTS - near
    us_store32(&job.fetched, job.far == 0)


cdef void do_share(Job* job, bint fetching) noexcept nogil:
    """Folios of an OPEN job, until all are done or with others. `fetching`: this thread reads what is far."""
    cdef Worker* worker = codec_take()
    cdef int64_t turn, i
    cdef int error
    if fetching and job.far:
        fetch(job.region, job.first, job.frames, worker, job.entries)
        ahead_fetched(job)
    while True:
        turn = us_add(&job.next, 1) - 1
        if turn >= STAGE_SLOTS:
            break
        if turn >= STAGE_SLOTS - job.far:
            ahead_await(job)
        i = job.order[turn]
        error = stage_folio(job.region, job.first + <uint64_t>i, job.frames + (i << FOLIO_SHIFT), worker,
                            job.entries[i])
        if error:
            us_write(&job.error, error)
    codec_give(worker)


cdef void unbusy(Region* region, uint64_t first, uint64_t count, uint64_t spared, uint64_t flag) noexcept nogil:
    """Releases words that are BUSY by us as they were, but for `spared`, with `flag`. The first one last: a scan waits
    for that, and then wants all of them at once."""
    cdef uint64_t i = first + count
    while i > first:
        i -= 1
        if i != spared:
            us_word_release(&region.words[i], (us_load(&region.words[i]) & ~<uint64_t>(BUSY | WAITERS | STAGED)) | flag,
                            WAITERS)


cdef void make_ahead(Job* job) noexcept nogil:
    """The thread's part of a job, from its start to its end."""
    cdef Region* region = job.region
    cdef uint64_t first = job.first
    cdef uint64_t word
    cdef uint64_t held = 0
    cdef bint zeros = False
    cdef bint shared = False
    cdef bint ready = False
    if first == ROOM:
        if region.scattered < SCATTERED:
            reclaim_background(&region.pool.reclaim)
        else:
            reclaim_write(&region.pool.reclaim)
        ahead_end(job, False)
        return
    word = us_load(&region.words[first])
    if word & BUSY or word_state(word) != SWAPPED:
        ahead_end(job, False)       # the program was faster
        return
    if not reclaim_try(&region.pool.reclaim, STAGE_SLOTS * FOLIO_BYTES):
        ahead_end(job, False)
        return
    us_chaos()
    while held < STAGE_SLOTS and not shared:
        word = us_load(&region.words[first + held])
        if word & BUSY or word_state(word) != SWAPPED:
            break
        if not us_cas(&region.words[first + held], word, (word | BUSY) & ~<uint64_t>WAITERS):
            break
        held += 1
        shared = swap_shared(region.pool.swap, word_id(word))
    job.frames = stage_take_window(&zeros) if held == STAGE_SLOTS and not shared else NULL
    if job.frames != NULL:
        put_in_order(job)
        ahead_open(job)
        do_share(job, True)
        ahead_close(job)
        ready = us_read(&job.error) == 0
        if not ready:
            stage_give(job.frames, STAGE_SLOTS, True)
    if not ready:
        reclaim_uncharge(&region.pool.reclaim, STAGE_SLOTS * FOLIO_BYTES)
    us_chaos()
    # First READY, then free to be taken: who finds the flag finds the window, or that it was dropped.
    if ready:
        us_add(&region.pool.readahead, 1)
        ahead_end(job, True)
        unbusy(region, first, held, ALL, STAGED)
    else:
        unbusy(region, first, held, ALL, 0)
        ahead_end(job, False)       # memory_free waits for this: only now may the region go


cdef void drop_ahead(Job* job) noexcept nogil:
    if job.frames != NULL:
        stage_give(job.frames, STAGE_SLOTS, True)
    reclaim_uncharge(&job.region.pool.reclaim, STAGE_SLOTS * FOLIO_BYTES)


cdef bint help_ahead(Region* region, uint64_t index) noexcept nogil:
    """This thread waits for a folio that readahead is at: better to help it."""
    cdef Job* job = ahead_help(region, index - index % STAGE_SLOTS)
    if job == NULL:
        return False
    do_share(job, False)
    ahead_helped(job)
    return True


cdef bint take_ahead(Region* region, uint64_t index, bint writing) noexcept nogil:
    """The folio is STAGED, its word BUSY by us. If its window is READY still, and whole: into place, words released."""
    cdef uint64_t first = index - index % STAGE_SLOTS
    cdef uint64_t held = 0
    cdef uint64_t word
    cdef char* frames = ahead_take(region, first)
    if frames == NULL:
        return False
    us_chaos()
    while held < STAGE_SLOTS:
        if first + held != index:
            word = us_load(&region.words[first + held])
            if word & BUSY or not word & STAGED or word_state(word) != SWAPPED:
                break
            if not us_cas(&region.words[first + held], word, (word | BUSY) & ~<uint64_t>WAITERS):
                break
        held += 1
    if held < STAGE_SLOTS:
        stage_give(frames, STAGE_SLOTS, True)
        reclaim_uncharge(&region.pool.reclaim, STAGE_SLOTS * FOLIO_BYTES)
    elif window_in_place(region, first, frames, index, writing):
        us_add(&region.pool.readahead_hits, 1)
        return True
    unbusy(region, first, held, index, 0)
    return False


cdef void ask_ahead(Region* region, uint64_t index) noexcept nogil:
    """A scan has come up to here, the start of a window: what it will want next."""
    cdef int _i
    if region.pool.run_most < STAGE_SLOTS or index % STAGE_SLOTS or not ahead_running():
        return
    for _i in range(1 if region.pool.small else AHEAD_DEPTH):
        if whole_window(region, index) and word_state(us_load(&region.words[index])) == SWAPPED:
            ahead_ask(region, index)
        index += STAGE_SLOTS


cdef AheadOps ahead_ops
ahead_ops.make = make_ahead
ahead_ops.drop = drop_ahead
ahead_ops.enter = enter
ahead_ops.leave = leave


cdef int memory_background() noexcept nogil:
    return ahead_start(&ahead_ops) if stage_usable() else 0


cdef bint anywhere(Region* region, bint follows) noexcept nogil:
    """Learns from a fault on a SWAPPED folio whether it `follows` others; whether the region's faults go anywhere."""
    cdef int scattered = region.scattered
    if follows:
        scattered = scattered - 4 if scattered > 4 else 0
    elif scattered < 2 * SCATTERED:
        scattered += 1
    region.scattered = scattered
    return scattered >= SCATTERED


cdef bint is_roomy(Region* region, uint64_t index) noexcept nogil:
    """Whether a first touch shall bring the whole window that begins here, although nothing says yet that others
    follow: what the kernel does where huge pages are wanted, and spares the five faults that find it out. Not in short
    regions, and not as soon as half of the budget is in use: then memory that may not be wanted is too dear."""
    cdef MemoryPool* pool = region.pool
    return (index % STAGE_SLOTS == 0 and region.bytes >= LEAST_ROOMY and pool.run_most == STAGE_SLOTS
            and whole_window(region, index) and reclaim_used(&pool.reclaim) < us_read(&pool.reclaim.limit) // 2)


cdef int make_unit(Region* region, uint64_t index, uint64_t word, bint writing) noexcept nogil:
    """The folio, and what is missing of the aligned few that it is one of: mappings are getting scarce, and neighbours
    that are all in place take one. As make_run."""
    cdef uint64_t unit = <uint64_t>frames_unit(STAGE_SLOTS)
    cdef uint64_t first = index - index % unit
    cdef uint64_t end = first + unit if first + unit < region_folios(region) else region_folios(region)
    cdef uint64_t i, seen
    cdef int error, tries = 0
    while (frames_full() and tries < TRIES_FOR_MAPPINGS
           and region.pool.reclaim.evict(region.pool, FOLIO_BYTES, False) > 0):
        tries += 1
    charge(region, folio_bytes(region, index), True)
    error = make_resident(region, index, word, writing)
    for i in range(first, end):
        seen = us_load(&region.words[i])
        if error or i == index or seen & BUSY or word_resident(seen):
            continue
        if us_cas(&region.words[i], seen, (seen | BUSY) & ~<uint64_t>WAITERS):
            charge(region, folio_bytes(region, i), True)
            make_resident(region, i, (seen | BUSY) & ~<uint64_t>WAITERS, False)
    return error


cdef int make_run(Region* region, uint64_t index, uint64_t word, bint writing, char* page) noexcept nogil:
    """The folio, whose BUSY the caller has set, and its neighbours if faults come in a row; a part of it if they go
    anywhere. Releases the words."""
    cdef int most = wanted_run(region, index) if stage_usable() or frames_mapped() else 1
    cdef int count = 1, i, error
    cdef bint more
    cdef bint alone = word_state(word) == SWAPPED and stage_usable() and anywhere(region, most != 0) and most == 0
    cdef uint64_t* at
    if most >= 0 and word_state(word) == EMPTY and stage_usable() and is_roomy(region, index):
        most = STAGE_SLOTS
    if word & STAGED and alone:
        # Who comes by chance would make the thread go on from there, over and over.
        ahead_forget(region.pool, region, False)
    elif word & STAGED and take_ahead(region, index, writing):
        ask_ahead(region, index - index % STAGE_SLOTS + STAGE_SLOTS)
        return 0
    if (alone and page != NULL and folio_bytes(region, index) == FOLIO_BYTES
            and not swap_shared(region.pool.swap, word_id(word))):
        charge_part(region)
        return make_part(region, index, word, <int>((page - folio_at(region, index)) >> PART_SHIFT), writing)
    if frames_unit(STAGE_SLOTS) > 1:
        return make_unit(region, index, word, writing)
    if most == -STAGE_SLOTS and make_window_below(region, index, word, writing):
        return 0
    while count < most and hold_like(region, index + <uint64_t>count, word):
        count += 1
    if most > 1:
        ask_ahead(region, index + <uint64_t>most)
    if count == STAGE_SLOTS and whole_window(region, index) and make_window(region, index, index, writing):
        return 0
    charge(region, folio_bytes(region, index), True)
    # The words as they are now: a window that came to nothing may have moved some of its folios to zswap, which changes
    # ids, and the slots that the old ones name are free.
    error = make_resident(region, index, us_load(&region.words[index]) & ~<uint64_t>WAITERS, writing)
    more = error == 0
    for i in range(1, count):
        at = &region.words[index + <uint64_t>i]
        more = more and charge(region, folio_bytes(region, index + <uint64_t>i), False)
        if more:
            make_resident(region, index + <uint64_t>i, us_load(at) & ~<uint64_t>WAITERS, False)
        else:
            us_word_release(at, us_load(at) & ~<uint64_t>(BUSY | WAITERS), WAITERS)
    return error


cdef void unguard_unit(Region* region, uint64_t index) noexcept nogil:
    """The neighbours of a folio whose protection was lifted lose theirs too, so that all take one mapping. They stay
    CLEAN, by their sums, but others can't rely on them any more."""
    cdef uint64_t unit = <uint64_t>frames_unit(STAGE_SLOTS)
    cdef uint64_t first = index - index % unit
    cdef uint64_t end = first + unit if first + unit < region_folios(region) else region_folios(region)
    cdef uint64_t i, word
    for i in range(first, end):
        word = us_load(&region.words[i])
        if (i == index or word & BUSY or word_state(word) != CLEAN or not word & GUARDED
                or not us_cas(&region.words[i], word, (word | BUSY) & ~<uint64_t>WAITERS)):
            continue
        swap_uncache(region.pool.swap, word_id(word), <uint64_t>&region.words[i])
        if frame_unprotect(folio_at(region, i), folio_bytes(region, i)) == 0:
            word &= ~<uint64_t>GUARDED
        us_word_release(&region.words[i], word & ~<uint64_t>(BUSY | WAITERS), WAITERS)


cdef int make_dirty(Region* region, uint64_t index, uint64_t word) noexcept nogil:
    """CLEAN to DIRTY: a write gives up the swapped copy. The caller has set BUSY; released here."""
    cdef int error = 0
    if word & GUARDED:
        error = frame_unprotect(folio_at(region, index), folio_bytes(region, index))
        if error == 0 and frames_unit(STAGE_SLOTS) > 1:
            unguard_unit(region, index)
    us_chaos()
    if error == 0:
        word = without_copy(region.pool, word_id(word)) | (word & PIN_MASK)
    us_word_release(&region.words[index], (word & ~<uint64_t>(BUSY | WAITERS)) | YOUNG, WAITERS)
    return error


cdef int stranger_fault(Region* region, uint64_t index) noexcept nogil:
    """In a process that came of a clone which no handler heard of. It has its parent's memory as it was, but must not
    evict (swap files are its parent's), and what is swapped out it can't have: 0 or -ESRCH."""
    cdef uint64_t word = us_load(&region.words[index])
    if word_state(word) == SWAPPED or (word & BUSY and word_resident(word)):
        return -ESRCH
    if frame_expose(folio_at(region, index), folio_bytes(region, index)) != 0:
        return -ENOMEM
    us_store(&region.words[index], word_make(DIRTY, 0) | (word & PIN_MASK))
    return 0


cdef int folio_fault(Region* region, uint64_t index, int writing, char* page) noexcept nogil:
    """Makes a folio accessible: resident, and DIRTY if `writing` (1; 0 reading, -1 not known). `page`: where the
    fault was, NULL when there was none (pinning). -errno, or 0, which may need another try by the caller; or IDLE:
    there was nothing to do."""
    cdef int tries = 0
    cdef int error
    if not frames_ours():
        return stranger_fault(region, index)
    while True:
        error = try_fault(region, index, writing, page)
        if error != -ENOMEM or not frames_mapped() or tries == TRIES:
            return error
        # The kernel has no mapping left for a change of protection: what leaves gives some back.
        tries += 1
        region.pool.reclaim.evict(region.pool, FOLIO_BYTES, False)


cdef int try_fault(Region* region, uint64_t index, int writing, char* page) noexcept nogil:
    """As folio_fault, which see; -ENOMEM may mean that mappings are short."""
    cdef uint64_t* at = &region.words[index]
    cdef uint64_t word, held
    cdef int state, missing
    cdef bint right
    cdef bint waited = False
    while True:
        word = us_load(at)
        if word & BUSY:
            waited = True
            if page != NULL and us_self_reading(folio_at(region, index)):
                # This thread is swapping this very folio out and found a page of it missing: the program
                # has thrown it away with madvise. It reads as zeros, as the program was promised; protected if
                # the pages beside it are, so that no other thread writes what would not be in the copy, and not
                # otherwise, since nobody would lift it again.
                missing = frame_mend(page, us_self_guarded())
                return missing if missing < 0 else 0
            if not help_ahead(region, index) and not us_word_spin(at, word, SPINS):
                us_word_wait(at, word, WAITERS)
            continue
        state = word_state(word)
        held = (word | BUSY) & ~<uint64_t>WAITERS
        if state == EMPTY or state == SWAPPED:
            if us_cas(at, word, held):
                return make_run(region, index, held, writing == 1, page)
        elif word_partial(word):
            if us_cas(at, word, held):
                return part_fault(region, index, held, page, writing == 1)
        elif state == CLEAN and writing == 1:
            if us_cas(at, word, held):
                return make_dirty(region, index, held)
        elif page == NULL:
            return 0
        elif us_cas(at, word, held):
            # Resident, yet there was a fault: another thread was faster, or (not knowing what kind of access
            # it was) this is a write to a clean folio, or the program threw the page away with madvise.
            right = frame_right(page, word & GUARDED != 0)
            missing = 0 if right else frame_mend(page, frames_mapped() and word & GUARDED != 0)
            if state == CLEAN and (missing == 1 or (missing == 0 and writing < 0)):
                return make_dirty(region, index, held)
            us_word_release(at, held & ~<uint64_t>BUSY, WAITERS)
            return missing if missing < 0 else IDLE if right and not waited else 0


# ---- swap-out ----

cdef struct Victim:
    Region* region
    uint64_t index
    uint64_t word               # with BUSY set by us
    uint64_t next               # what the word shall be

cdef bint enough_parts(MemoryPool* pool) noexcept nogil:
    """Whether whole folios shall stay, as there are parts to leave: more than a 64th of the budget.

    Not always, or what nobody turns to any more would stay for ever; and rarely only while parts are wanted again
    about as soon as they would be by chance: then a whole folio in place, which costs half as much, does as much
    good."""
    cdef int64_t parts = us_read(&pool.parts)
    cdef int64_t missing = us_read(&pool.swapped_bytes) >> FOLIO_SHIFT
    cdef uint32_t random = <uint32_t>us_read(&pool.left) * <uint32_t>2654435761u
    cdef uint32_t chances = FEW_CHANCES if us_read(&pool.soon) * missing * 8 > parts * 11 << 16 else MANY_CHANCES
    return parts << PART_SHIFT > pool.reclaim.limit >> 6 and (random >> 16) % chances != 0


cdef inline bint is_recent(MemoryPool* pool, Region* region, uint64_t index, uint64_t unit,
                           int64_t last) noexcept nogil:
    """Whether one of the last so many faults was at this folio, or at one that it goes together with.

    An instruction may need several folios at once (four, if it copies from one place to another, neither of them
    aligned). If these were the only ones that can leave, it would get each at the price of another, and never go on."""
    cdef uint64_t first = <uint64_t>&region.words[index - index % unit]
    cdef int64_t now = us_read(&pool.recent_count)
    cdef int64_t i
    for i in range(last):
        if <uint64_t>us_read(<int64_t*>&pool.recent[(now - i) & (RECENT_MOST - 1)]) - first < unit * 8:
            return True
    return False


cdef int find_victims(MemoryPool* pool, Victim* victims, int most, bint parts, bint every, Victim* doubtful,
                      int* doubts) noexcept nogil:
    """Moves the clock hand, setting BUSY on what is cold: resident, not pinned, not looked at since the hand came
    by last. Neighbours come out one after the other, so that system calls can take them together.

    `parts`: only what is PARTIAL. `every`: what the last faults were at, too. `doubtful` gets some of those that it
    spares and whose copy may be worthless, BUSY too; where faults go anywhere any that has one."""
    cdef int found = 0
    cdef int64_t folios = 0, looked = 0
    cdef Region* region
    cdef uint64_t index, word
    cdef uint64_t unit = <uint64_t>frames_unit(STAGE_SLOTS)
    cdef uint64_t together = NOWHERE    # up to here all go that can: neighbours take one mapping or none
    cdef int64_t recent = (us_read(&pool.reclaim.resident) >> (FOLIO_SHIFT + 2)) // <int64_t>unit
    recent = 0 if every else RECENT_LEAST if recent < RECENT_LEAST else recent if recent < RECENT_MOST else RECENT_MOST
    if most < <int>unit:
        most = <int>unit
    us_lock(&pool.list_lock)
    folios = us_read(&pool.virtual_bytes) // FOLIO_BYTES + us_read(&pool.region_count)
    region = pool.hand if pool.hand != NULL else pool.regions
    index = pool.hand_index if pool.hand != NULL else 0
    # twice around: the first time may only clear YOUNG bits
    while region != NULL and found < most and looked <= 2 * folios:
        if found and index % STAGE_SLOTS == 0:
            break                       # a batch stays within a window, and so within a region
        if index >= region_folios(region):
            if found:
                break
            region = region.next if region.next != NULL else pool.regions
            index = 0
            together = NOWHERE
            looked += 1
            continue
        if index == together:
            if found:
                break
            together = NOWHERE
        word = us_load(&region.words[index])
        looked += 1
        if word_resident(word) and not (word & BUSY) and word_pins(word) == 0:
            if unit > 1 and together == NOWHERE and not word & YOUNG:
                index -= index % unit
                together = index + unit
                continue
            if parts and not word_partial(word):
                if (word_state(word) == CLEAN and not word & GUARDED and region.scattered >= SCATTERED
                        and doubts[0] < BATCH
                        and us_cas(&region.words[index], word, (word | BUSY) & ~<uint64_t>WAITERS)):
                    doubtful[doubts[0]].region = region
                    doubtful[doubts[0]].index = index
                    doubts[0] += 1
            elif word & YOUNG and together == NOWHERE:
                if word_state(word) != CLEAN or word & (GUARDED | PARTIAL) or doubts[0] == BATCH:
                    us_cas(&region.words[index], word, word & ~<uint64_t>YOUNG)
                elif us_cas(&region.words[index], word, (word | BUSY) & ~<uint64_t>(YOUNG | WAITERS)):
                    doubtful[doubts[0]].region = region
                    doubtful[doubts[0]].index = index
                    doubts[0] += 1
            elif (not is_recent(pool, region, index, unit, recent)
                    and us_cas(&region.words[index], word, (word | BUSY) & ~<uint64_t>WAITERS)):
                victims[found].region = region
                victims[found].index = index
                victims[found].word = word
                found += 1
        index += 1
    pool.hand = region
    pool.hand_index = index
    us_unlock(&pool.list_lock)
    return found


cdef int take_passing(MemoryPool* pool, Victim* victims) noexcept nogil:
    """A window that shall leave before others, as much of it as can be had, BUSY; not one that a scan may be at."""
    cdef int found = 0
    cdef Region* region
    cdef uint64_t index, first, word
    us_lock(&pool.list_lock)
    while found == 0 and pool.passing_count > PASSING_KEPT:
        region = pool.passing[pool.passing_first].region
        first = pool.passing[pool.passing_first].first
        pool.passing_first = (pool.passing_first + 1) % PASSING_MOST
        pool.passing_count -= 1
        # Unlinking takes a region's windows off the ring; who brought one while it went would be in error, and come to
        # nothing here.
        if region == NULL or region.pool != pool or not whole_window(region, first):
            continue
        for index in range(first, first + STAGE_SLOTS):
            word = us_load(&region.words[index])
            if (not word_resident(word) or word & (BUSY | YOUNG) or word_pins(word) or word_partial(word)
                    or not us_cas(&region.words[index], word, (word | BUSY) & ~<uint64_t>WAITERS)):
                break
            victims[found].region = region
            victims[found].index = index
            victims[found].word = word
            found += 1
    us_unlock(&pool.list_lock)
    return found


cdef bint passes(MemoryPool* pool, Region* region, uint64_t index) noexcept nogil:
    """With list_lock."""
    cdef uint32_t i
    for i in range(PASSING_MOST):
        if pool.passing[i].region == region and pool.passing[i].first == index - index % STAGE_SLOTS:
            return True
    return False


cdef void find_copies(MemoryPool* pool, Victim* doubtful, int* doubts) noexcept nogil:
    """Clean folios, BUSY, which are to stay while windows pass: a copy of them takes room that others could be in."""
    cdef Region* region
    cdef uint64_t index, word
    cdef int looked = 0
    us_lock(&pool.list_lock)
    region = pool.copy_hand if pool.copy_hand != NULL else pool.regions
    index = pool.copy_index if pool.copy_hand != NULL else 0
    while region != NULL and doubts[0] < BATCH and looked < SWEEP:
        looked += 1
        if index >= region_folios(region):
            region = region.next if region.next != NULL else pool.regions
            index = 0
            continue
        word = us_load(&region.words[index])
        if (word_state(word) == CLEAN and not word & (BUSY | GUARDED | PARTIAL) and word_pins(word) == 0
                and not passes(pool, region, index)
                and us_cas(&region.words[index], word, (word | BUSY) & ~<uint64_t>WAITERS)):
            doubtful[doubts[0]].region = region
            doubtful[doubts[0]].index = index
            doubts[0] += 1
        index += 1
    pool.copy_hand = region
    pool.copy_index = index
    us_unlock(&pool.list_lock)


cdef bint still_clean(Region* region, uint64_t index, const char* bytes) noexcept nogil:
    """Whether a folio that is CLEAN and not GUARDED is what its id has. Nobody can write to `bytes` any more."""
    return sum_folio(bytes, folio_bytes(region, index)) == region.sums[index]


cdef bint is_cold(Region* region, uint64_t index, uint64_t word, uint32_t now) noexcept nogil:
    """Whether a folio that leaves shall go back to the swap file, if not all fits in zswap.

    It was there, and since it left last more folios left than zswap has: so it would be written back again before it is
    wanted, after others that are wanted earlier. A few stay all the same, since what else is there may be dead."""
    cdef uint32_t random = now * <uint32_t>2654435761u
    return (word_state(word) == DIRTY and word & FILED != 0 and (random >> 16) % CHANCES != 0
            and turn_length(region, index, now) > space_packed(region.pool.swap))


cdef bint put_back(char* folio, char* frame, uint64_t bytes) noexcept nogil:
    """What was moved out and can't leave: nothing else has its bytes. False: the frame is still there."""
    cdef const char* text = b"userswap: a folio can't be put back where it was: the program's mapping is gone.\n"
    if frame_move_in(folio, frame, bytes) == 0:
        return True
    write(2, text, strlen(text))
    return False


cdef int64_t vacate_run(MemoryPool* pool, Worker* worker, Victim* victims, int count) noexcept nogil:
    """Evicts a run of neighbouring folios whose words are BUSY by us; releases the words. Returns the bytes freed.

    They are moved to the stage together and looked at there. What can't be moved (pages shared with a forked child) is
    protected, looked at in place and thrown away. All of them are GUARDED or none: what is GUARDED isn't moved, since
    it would come back without protection if the move failed half way."""
    cdef Region* region = victims[0].region
    cdef char* start = folio_at(region, victims[0].index)
    cdef uint64_t length = (<uint64_t>(count - 1) << FOLIO_SHIFT) + folio_bytes(region, victims[count - 1].index)
    cdef bint guarded = victims[0].word & GUARDED != 0
    cdef char* staged = stage_room(count) if length == <uint64_t>count << FOLIO_SHIFT and not guarded else NULL
    cdef char* bytes = start
    cdef int i, first = 0, last = 0, error = 0, refused = 0
    cdef int64_t freed = 0
    cdef uint64_t gone
    cdef uint64_t[BATCH] ids
    cdef bint whole = count == STAGE_SLOTS and not region.broken[victims[0].index // STAGE_SLOTS]
    cdef uint32_t cold, now = <uint32_t>us_add(&pool.left, count)
    us_chaos()
    if not whole:
        region.broken[victims[0].index // STAGE_SLOTS] = True
    if staged != NULL and frame_move_out(start, staged, length) != 0:
        stage_moved(staged, count)
        staged = NULL
    if staged != NULL:
        bytes = staged
    else:
        if not guarded:
            error = frame_protect(start, length)
        us_set_reading(start, length, True)
    us_chaos()
    for i in range(count):
        # Clean when it came; a program that has written to it since has made the copy worthless.
        # Or, where a page that it threw away is not missing, one that was protected.
        if (error == 0 and word_state(victims[i].word) == CLEAN and (not guarded or frames_mapped())
                and not still_clean(region, victims[i].index, bytes + (<uint64_t>i << FOLIO_SHIFT))):
            victims[i].word = without_copy(pool, word_id(victims[i].word))
    us_chaos()
    while last < count:
        first = last
        victims[first].next = 0
        last += 1
        if word_state(victims[first].word) == CLEAN:
            if error == 0:
                swap_uncache(pool.swap, word_id(victims[first].word), <uint64_t>&region.words[victims[first].index])
                victims[first].next = word_make(SWAPPED, word_id(victims[first].word))
            continue
        cold = is_cold(region, victims[first].index, victims[first].word, now - <uint32_t>first)
        # Dirty neighbours leave as one large folio: their ids are allocated together, raw ones are one write.
        while last < count and last - first < RUN_FOLIOS and word_state(victims[last].word) == DIRTY:
            victims[last].next = 0
            cold |= <uint32_t>is_cold(region, victims[last].index, victims[last].word,
                                      now - <uint32_t>last) << (last - first)
            last += 1
        if error:
            continue
        swap_out_run(pool.swap, worker, bytes + (<uint64_t>first << FOLIO_SHIFT), last - first,
                     <int>folio_bytes(region, victims[last - 1].index), &region.hint,
                     <uint64_t>&region.words[victims[first].index], cold, ids, &refused)
        for i in range(first, last):
            if ids[i - first]:
                victims[i].next = word_make(SWAPPED, ids[i - first])
    us_set_reading(NULL, 0, False)
    us_chaos()
    i = 0
    while i < count:
        if victims[i].next == 0:
            region.broken[victims[i].index // STAGE_SLOTS] = True
            # nowhere to put it: it stays, as it was, and is not looked at again soon
            gone = folio_bytes(region, victims[i].index)
            if staged != NULL:
                bytes = staged + (<uint64_t>i << FOLIO_SHIFT)
                if put_back(folio_at(region, victims[i].index), bytes, gone):
                    stage_moved(bytes, 1)
                else:
                    stage_give(bytes, 1, False)
            elif not guarded or word_state(victims[i].word) == DIRTY:
                frame_unprotect(folio_at(region, victims[i].index), gone)
            us_word_release(&region.words[victims[i].index], (victims[i].word & ~<uint64_t>(BUSY | WAITERS)) | YOUNG,
                            WAITERS)
            i += 1
            continue
        first = i
        gone = 0
        while i < count and victims[i].next != 0:
            gone += folio_bytes(region, victims[i].index)
            i += 1
        if staged != NULL:
            stage_give(staged + (<uint64_t>first << FOLIO_SHIFT), i - first, whole)
        elif frame_vacate(folio_at(region, victims[first].index), gone) != 0:
            # Mappings are short. It is in place still, but a part of it may be hidden: that can't be read by who has it
            # BUSY, and stays until somebody faults there.
            us_assert(frames_mapped(), "vacating a folio that is in place works")
            frame_unprotect(folio_at(region, victims[first].index), gone)
            while first < i:
                us_word_release(&region.words[victims[first].index],
                                without_copy(pool, word_id(victims[first].next)) | YOUNG, WAITERS)
                first += 1
            continue
        freed += <int64_t>gone
        us_add(&pool.swapped_bytes, <int64_t>gone)
        reclaim_uncharge(&pool.reclaim, <int64_t>gone)
        while first < i:
            region.left[victims[first].index] = now
            us_word_release(&region.words[victims[first].index], victims[first].next, WAITERS)
            first += 1
    return freed


cdef uint64_t store_parts(MemoryPool* pool, Worker* worker, Victim* victim, const void* const* dirty,
                          bint* updated) noexcept nogil:
    """The id of a PARTIAL folio of which parts were written to: a new one unless `updated`; 0: it can't be stored."""
    cdef Region* region = victim.region
    cdef uint64_t holder = <uint64_t>&region.words[victim.index]
    cdef uint64_t id = word_id(victim.word)
    cdef bint filed = region.sums[victim.index] & PART_FILED or swap_far(pool.swap, id)
    cdef bint cold = filed and is_cold(region, victim.index, word_make(DIRTY, 0) | FILED,
                                       <uint32_t>us_read(&pool.left))
    cdef uint64_t fresh = swap_out_parts(pool.swap, worker, id, dirty, &region.hint, holder, cold, updated)
    cdef char* frame
    cdef bint zeros = False
    cdef int part, refused = 0
    if fresh:
        return fresh
    frame = stage_take(&zeros)
    if frame == NULL:
        return 0
    if swap_in(pool.swap, worker, id, frame, FOLIO_BYTES, 0) == 0:
        for part in range(PARTS):
            if dirty[part] != NULL:
                memcpy(frame + (part << PART_SHIFT), dirty[part], PART_BYTES)
        swap_out_run(pool.swap, worker, frame, 1, FOLIO_BYTES, &region.hint, holder, cold, &fresh, &refused)
    stage_give(frame, 1, False)
    return fresh


cdef int64_t vacate_parts(MemoryPool* pool, Worker* worker, Victim* victim) noexcept nogil:
    """Evicts a PARTIAL folio whose word is BUSY by us; releases the word. Returns the bytes freed.

    As in vacate_run, parts are moved to the stage to be looked at, or protected where that can't be."""
    cdef Region* region = victim.region
    cdef uint64_t index = victim.index
    cdef uint64_t id = word_id(victim.word)
    cdef uint64_t next = id
    cdef uint64_t gone = bytes_in_place(region, index, victim.word)
    cdef Frame[PARTS] staged
    cdef Bytes[PARTS] dirty
    cdef char* bytes
    cdef bint changed = False
    cdef bint updated = False
    cdef int part, error = 0
    us_chaos()
    for part in range(PARTS):
        staged[part] = stage_part_room() if part_in_place(region, index, part) else NULL
        if staged[part] != NULL and frame_move_out(part_at(region, index, part), staged[part], PART_BYTES) != 0:
            stage_part_moved(staged[part])
            staged[part] = NULL
        if staged[part] == NULL and part_in_place(region, index, part) and error == 0:
            error = frame_protect(part_at(region, index, part), PART_BYTES)
    us_chaos()
    us_set_reading(folio_at(region, index), FOLIO_BYTES, True)
    for part in range(PARTS):
        dirty[part] = NULL
        if error == 0 and part_in_place(region, index, part):
            bytes = staged[part] if staged[part] != NULL else part_at(region, index, part)
            if sum_folio(bytes, PART_BYTES) != region.part_sums[PARTS * index + part]:
                dirty[part] = bytes
                changed = True
    if error:
        next = 0
    elif changed:
        next = store_parts(pool, worker, victim, dirty, &updated)
    us_set_reading(NULL, 0, False)
    us_chaos()
    for part in range(PARTS):
        if not part_in_place(region, index, part):
            continue
        if staged[part] == NULL and next == 0:
            frame_unprotect(part_at(region, index, part), PART_BYTES)
        elif staged[part] == NULL:
            frame_vacate(part_at(region, index, part), PART_BYTES)
        elif next:
            stage_part_give(staged[part])
        elif put_back(part_at(region, index, part), staged[part], PART_BYTES):
            stage_part_moved(staged[part])
        else:
            stage_part_give(staged[part])
    if next == 0:
        us_word_release(&region.words[index], (victim.word & ~<uint64_t>(BUSY | WAITERS)) | YOUNG, WAITERS)
        return 0
    if changed and not updated:
        # A count more, if the program made it what it was meanwhile: then it has the same id.
        swap_put(pool.swap, id)
    us_add(&pool.swapped_bytes, <int64_t>gone)
    region.left[index] = <uint32_t>us_add(&pool.left, 1)
    us_add(&pool.parts, -<int64_t>(gone >> PART_SHIFT))
    reclaim_uncharge(&pool.reclaim, <int64_t>gone)
    us_word_release(&region.words[index], word_make(SWAPPED, next), WAITERS)
    return <int64_t>gone


cdef int64_t give_up_copies(MemoryPool* pool, Victim* doubtful, int count, bint all) noexcept nogil:
    """Of clean folios that stay: a copy of what the program has written over takes memory for nothing. `all`: so does
    any other in RAM, of what shall stay. How many.

    Nothing is protected: another sum means that it was written to, whatever is written meanwhile. The same sum means
    nothing, and it is asked again when the folio leaves."""
    cdef Region* region
    cdef uint64_t index, word
    cdef int64_t given = 0
    cdef int i
    for i in range(count):
        region = doubtful[i].region
        index = doubtful[i].index
        word = us_load(&region.words[index])
        us_set_reading(folio_at(region, index), folio_bytes(region, index), False)
        if all and not swap_far(pool.swap, word_id(word)) or not still_clean(region, index, folio_at(region, index)):
            word = without_copy(pool, word_id(word)) | (word & YOUNG)
            given += 1
        us_set_reading(NULL, 0, False)
        us_chaos()
        us_word_release(&region.words[index], word & ~<uint64_t>(BUSY | WAITERS), WAITERS)
    return given


cdef int64_t evict(void* ctx, int64_t want, bint parts, bint every) noexcept nogil:
    """About `want` bytes, at most a batch; more only while what it picks can't leave. `every`: no folio is spared."""
    cdef MemoryPool* pool = <MemoryPool*>ctx
    cdef Victim[BATCH] victims
    cdef Victim[BATCH] doubtful
    cdef int64_t freed = 0, given = 0
    cdef int count, first, last, doubts, tried = 0
    cdef int most = <int>((want + FOLIO_BYTES - 1) // FOLIO_BYTES) if want < BATCH * FOLIO_BYTES else BATCH
    cdef Worker* worker = codec_take()
    # a window as a whole: a part of it would break its huge page
    most = BATCH if most > LEAST_BATCH else LEAST_BATCH
    parts = parts and enough_parts(pool)
    while freed == 0 and tried < TRIES:
        doubts = 0
        count = take_passing(pool, victims) if most == BATCH and not parts else 0
        if count:
            find_copies(pool, doubtful, &doubts)
            given += give_up_copies(pool, doubtful, doubts, True)
        else:
            count = find_victims(pool, victims, most, parts, every, doubtful, &doubts)
            given += give_up_copies(pool, doubtful, doubts, parts)
        if count == 0 and (given or not parts):
            break
        tried += count
        first = 0
        while first < count:
            last = first + 1
            if word_partial(victims[first].word):
                freed += vacate_parts(pool, worker, &victims[first])
                first = last
                continue
            while (last < count and victims[last].index == victims[last - 1].index + 1
                   and not word_partial(victims[last].word)
                   and (victims[last].word ^ victims[first].word) & GUARDED == 0):
                last += 1
            freed += vacate_run(pool, worker, &victims[first], last - first)
            first = last
        if parts and freed == 0 and given == 0 and (count == 0 or tried >= TRIES):
            # Parts that can be stored nowhere would keep what can leave in place.
            parts = False
            tried = 0
    codec_give(worker)
    if freed == 0 and given == 0:
        freed = ahead_forget(pool, NULL, False) * STAGE_SLOTS * FOLIO_BYTES
    return freed if freed else given        # room in zswap, too, is worth another round


cdef int64_t evict_in_turn(void* ctx, int64_t want, bint parts) noexcept nogil:
    """For reclaim; of a small pool by one thread at a time: until a batch has gone, its copies are there, too."""
    cdef MemoryPool* pool = <MemoryPool*>ctx
    cdef int64_t freed
    if not pool.small:
        return evict(pool, want, parts, False)
    us_lock(&pool.small_lock)
    freed = evict(pool, want, parts, False)
    us_unlock(&pool.small_lock)
    return freed


# ---- the handler ----

cdef int bucket(int64_t ns) noexcept nogil:
    """8 buckets to an octave: 0..15 ns exactly, then by the three bits after the highest (see bucket_ns in _core)."""
    cdef int octave = 1
    if ns < 16:
        return <int>ns if ns > 0 else 0
    while ns >> octave > 15:
        octave += 1
    octave = ((octave + 1) << 3) + <int>((ns >> octave) & 7)
    return octave if octave < BUCKETS else BUCKETS - 1


cdef us_mutex loss_lock
cdef char[768] loss             # what was said last


cdef void explain(Region* region, uint64_t index, int error, bint fatal) noexcept nogil:
    """The data of a folio can't be had: says so in plain words. `fatal`: the caller ends the program as a SIGBUS
    does; else its call fails with EIO."""
    cdef const char* ending = b"The program ends here." if fatal else b"The call fails."
    cdef char[768] text
    cdef char[400] place
    cdef int n
    if error == -ESRCH:
        n = snprintf(text, sizeof(text),
                     "userswap: folio %llu of the region at %p was swapped out when this process was cloned, without "
                     "fork(), and is out of reach. %s\n", <unsigned long long>index, region.base, ending)
    elif error == -ENXIO:
        n = snprintf(text, sizeof(text),
                     "userswap: folio %llu of the region at %p is in a swap file of a process that this one was "
                     "forked from, and is out of reach. %s\n", <unsigned long long>index, region.base, ending)
    elif error == -ENOMEM or error == -EFAULT:
        n = snprintf(text, sizeof(text), "userswap: folio %llu of the region at %p can't be put in place: %s. %s\n",
                     <unsigned long long>index, region.base, strerror(-error), ending)
    else:
        space_lost_at(region.pool.swap, error, place, sizeof(place))
        n = snprintf(text, sizeof(text),
                     "userswap: folio %llu of the region at %p (%llu bytes from %p on) can't be brought back from %s. "
                     "%s\n", <unsigned long long>index, region.base, <unsigned long long>folio_bytes(region, index),
                     folio_at(region, index), place, ending)
    n = n if n < <int>sizeof(text) else <int>sizeof(text) - 1
    us_lock(&loss_lock)
    memcpy(loss, text, n)
    loss[n] = 0
    us_unlock(&loss_lock)
    write(2, text, n)


cdef void memory_loss(char* text, int n) noexcept nogil:
    us_lock(&loss_lock)
    snprintf(text, n, "%s", loss)
    us_unlock(&loss_lock)


cdef inline int told(int error) noexcept nogil:
    """What a caller is told who knows of no seals."""
    return -EIO if error in (-EBADMSG, -ESTALE, -EXDEV) else error


cdef void on_fault(int signal, siginfo_t* info, void* context) noexcept nogil:
    cdef int kept = errno
    cdef char* address = <char*>info.si_addr
    cdef Region* region = region_at(address) if info.si_code == (SEGV_ACCERR if signal == SIGSEGV
                                                                 else BUS_ADRERR) else NULL
    cdef uint64_t index
    cdef int error
    if region == NULL:
        handler_chain(signal, info, context)
        return
    index = <uint64_t>(address - region.base) >> FOLIO_SHIFT
    error = serve(region, index, address, us_fault_writes(context))
    if error < 0:
        explain(region, index, error, True)
        if signal == SIGSEGV:
            us_bus_error(address)       # what it is, however it came
        else:
            handler_chain(signal, info, context)
    elif error == 0:
        us_not_idle()
    elif us_idle(address) == IDLE_TIMES:
        # Not another thread that was faster each time: the program has protected its memory itself.
        us_not_idle()
        handler_chain(signal, info, context)
    (&errno)[0] = kept


cdef struct Stray:
    char* page
    uint32_t thread
    int times

cdef us_mutex stray_lock
cdef Stray[STRAYS] strays


cdef bint is_stray(char* page, uint32_t thread) noexcept nogil:
    """Whether a thread goes on faulting where no region is. Once may be a fault that was served before it was looked at
    by us, and whose region is gone by now."""
    cdef Stray* stray = &strays[thread % STRAYS]
    cdef bint again
    us_lock(&stray_lock)
    again = stray.page == page and stray.thread == thread
    stray.times = stray.times + 1 if again else 1
    stray.page = page
    stray.thread = thread
    again = stray.times == STRAY_TIMES
    if again:
        stray.page = NULL
    us_unlock(&stray_lock)
    return again


cdef void serve_thread(char* address, bint writing, uint32_t thread) noexcept nogil:
    """A fault that the server has read, of whatever thread, from the kernel or the program."""
    cdef Region* region
    cdef char* page = <char*>(<uint64_t>address & ~<uint64_t>(PAGE_BYTES - 1))
    cdef uint64_t index
    cdef int error = 0
    gate_enter()
    region = region_at(address)
    us_serve(region)
    if region == NULL or us_read(&region.leaving) or region_at(address) != region:
        us_serve(NULL)
        gate_leave()
        if is_stray(page, thread):
            error = -EFAULT
    else:
        index = <uint64_t>(address - region.base) >> FOLIO_SHIFT
        error = serve(region, index, address, writing)
        if error < 0:
            explain(region, index, error, True)
        us_serve(NULL)
        gate_leave()
    if error < 0:
        # A bus error for the program, EFAULT or the like for the kernel.
        us_write(&poisoned, 1)
        error = frame_poison(page)
        while error == -EAGAIN:
            sched_yield()
            error = frame_poison(page)
        if error < 0 and error != -EEXIST:
            us_die_of_bus_error()       # Linux before 6.6
    frame_wake(page, PAGE_BYTES)        # who came when it was there already


cdef bint mend_thread(char* address, uint32_t thread) noexcept nogil:
    cdef int guarded = us_reads(address, thread)
    cdef char* page = <char*>(<uint64_t>address & ~<uint64_t>(PAGE_BYTES - 1))
    if guarded < 0:
        return False
    frame_mend(page, guarded)
    frame_wake(page, PAGE_BYTES)
    return True


cdef ServerOps server_ops
server_ops.serve = serve_thread
server_ops.mend = mend_thread


cdef int serve(Region* region, uint64_t index, char* address, int writing) noexcept nogil:
    """A fault, from its beginning to its end: as folio_fault."""
    cdef int64_t started = us_now(), took
    cdef int error
    gate_enter()
    us_write(<int64_t*>&region.pool.recent[us_add(&region.pool.recent_count, 1) & (RECENT_MOST - 1)],
             <int64_t>&region.words[index])
    error = folio_fault(region, index, writing, <char*>(<uint64_t>address & ~<uint64_t>(PAGE_BYTES - 1)))
    took = us_now() - started
    us_add(&region.pool.faults, 1)
    us_add(&region.pool.fault_ns, took)
    us_add(&region.pool.fault_times[bucket(took)], 1)
    gate_leave()
    threads_used()
    return error


# ---- for the rooms above ----

cdef Region* fresh_region(MemoryPool* pool, uint64_t bytes) noexcept nogil:
    cdef Region* region = region_new(pool, bytes)
    if region != NULL and us_read(&poisoned):
        frame_vacate(region.base, region.bytes)     # nobody's until now, and maybe touched
    return region


cdef void* memory_new(MemoryPool* pool, uint64_t bytes, bint zeros) noexcept nogil:
    cdef Region* region
    cdef uint64_t i
    cdef bint used
    enter()
    region = region_reuse(pool, bytes)
    used = region != NULL
    if not used:
        region = fresh_region(pool, bytes)
    elif us_read(&poisoned):
        for i in range(region_folios(region)):
            if word_state(us_load(&region.words[i])) == EMPTY:
                frame_vacate(folio_at(region, i), folio_bytes(region, i))       # as in fresh_region
    if region != NULL:
        region.zeros = zeros
    leave()
    if region == NULL:
        return NULL
    if used and zeros:
        # As the program would, outside the gate: reclaim may have some of it by now. What is EMPTY reads as zeros.
        for i in range(region_folios(region)):
            if word_state(us_load(&region.words[i])) != EMPTY:
                memset(folio_at(region, i), 0, folio_bytes(region, i))
    return region.base


cdef void memory_free(void* start) noexcept nogil:
    cdef Region* region = region_at(start)
    cdef MemoryPool* pool
    cdef uint64_t i, word
    cdef int64_t resident = 0, swapped = 0, parts = 0
    cdef int error = -ENOMEM, tries = 0
    cdef bint stays
    if region == NULL or region.base != <char*>start:
        return
    enter()
    pool = region.pool
    us_add(&region.leaving, 1)          # an exchange: what is read next is read after it
    while us_is_served(region):
        sched_yield()                   # a fault that the program needed, which it has got (BY_THREAD)
    ahead_forget(pool, region, True)
    region_unlink(region)
    stays = region_may_stay(region)
    for i in range(region_folios(region)):
        while stays:
            # That has no copy, and nobody looks at: what a program leaves that fits.
            word = us_load(&region.words[i])
            if word & BUSY:
                us_word_wait(&region.words[i], word, WAITERS)
            else:
                stays = word_state(word) == EMPTY or word_state(word) == DIRTY
                break
    if stays:
        region_keep(region)
        leave()
        return
    for i in range(region_folios(region)):
        while True:
            word = us_load(&region.words[i])
            if word & BUSY:
                us_word_wait(&region.words[i], word, WAITERS)       # reclaim had picked it before the unlink
            elif word == 0 or us_cas(&region.words[i], word, 0):
                break
        if word_state(word) == CLEAN or word_state(word) == SWAPPED:
            swap_put(pool.swap, word_id(word))
        if word_resident(word):
            resident += <int64_t>bytes_in_place(region, i, word)
            swapped += <int64_t>(folio_bytes(region, i) - bytes_in_place(region, i, word))
            parts += parts_in_place(region, i, word)
        elif word_state(word) == SWAPPED:
            swapped += <int64_t>folio_bytes(region, i)
    while resident and error == -ENOMEM and tries < TRIES:
        error = frame_vacate(region.base, region.bytes)
        if error == -ENOMEM:
            tries += 1                  # mappings are short: what leaves gives some back
            pool.reclaim.evict(pool, FOLIO_BYTES, False)
    us_add(&pool.swapped_bytes, -swapped)
    us_add(&pool.parts, -parts)
    reclaim_uncharge(&pool.reclaim, resident)
    reclaim_settle(&pool.reclaim)
    region_release(region, resident == 0 or error == 0)
    leave()


cdef bint discard_folio(Region* region, uint64_t index) noexcept nogil:
    """Makes a folio EMPTY. False: a system call is at it, or it can't leave."""
    cdef uint64_t* at = &region.words[index]
    cdef uint64_t word, in_place = 0
    cdef MemoryPool* pool = region.pool
    while True:
        word = us_load(at)
        if word & BUSY:
            us_word_wait(at, word, WAITERS)
        elif word_state(word) == EMPTY:
            return True
        elif word & PIN_MASK:
            return False
        elif us_cas(at, word, (word | BUSY) & ~<uint64_t>WAITERS):
            break
    region.zeros = True
    if word_resident(word):
        region.broken[index // STAGE_SLOTS] = 1
        if frame_vacate(folio_at(region, index), folio_bytes(region, index)) != 0:
            us_word_release(at, word, WAITERS)
            return False
        in_place = bytes_in_place(region, index, word)
        us_add(&pool.parts, -<int64_t>parts_in_place(region, index, word))
    us_chaos()
    if word_state(word) == CLEAN or word_state(word) == SWAPPED:
        swap_put(pool.swap, word_id(word))
        us_add(&pool.swapped_bytes, <int64_t>in_place - <int64_t>folio_bytes(region, index))
    reclaim_uncharge(&pool.reclaim, <int64_t>in_place)
    us_word_release(at, word_make(EMPTY, 0), WAITERS)
    return True


cdef void memory_discard(void* start, size_t length) noexcept nogil:
    cdef char* address = <char*>start
    cdef char* end = address + length
    cdef Region* region
    cdef uint64_t index, step
    cdef bint gone
    while address < end:
        step = FOLIO_BYTES - (<uint64_t>address & (FOLIO_BYTES - 1))
        region = region_at(address)
        if region != NULL:
            index = <uint64_t>(address - region.base) >> FOLIO_SHIFT
            gone = False
            if address == folio_at(region, index) and <uint64_t>(end - address) >= folio_bytes(region, index):
                enter()
                gone = discard_folio(region, index)
                leave()
            if not gone:
                # As the program would: it faults, and whoever has the folio in hand comes first.
                memset(address, 0, min(step, min(<uint64_t>(end - address),
                                                 <uint64_t>(region.base + region.bytes - address))))
        address += step


cdef int move_run(Region* source, Region* target, uint64_t first, uint64_t count) noexcept nogil:
    """Gives whole resident folios, whose words are BUSY by us, to a fresh region, without a look at their bytes.
    0 or -errno: then they are where they were. Releases the words."""
    cdef MemoryPool* pool = source.pool
    cdef uint64_t i, word
    cdef int error = frame_move_out(folio_at(source, first), folio_at(target, first), count << FOLIO_SHIFT)
    us_chaos()
    for i in range(first, first + count):
        word = us_load(&source.words[i]) & ~<uint64_t>(BUSY | WAITERS)
        if error == 0:
            target.broken[i // STAGE_SLOTS] = target.broken[i // STAGE_SLOTS] or count < STAGE_SLOTS
            # A copy stays its old word's, and the word goes.
            us_store(&target.words[i], word if word_state(word) == DIRTY else without_copy(pool, word_id(word)) | YOUNG)
            word = 0
        us_word_release(&source.words[i], word, WAITERS)
    return error


cdef bint move_swapped(Region* source, Region* target, uint64_t index, uint64_t word) noexcept nogil:
    """The same for a folio that is SWAPPED: the other word gets its id. False: it stays. Releases the word."""
    cdef uint64_t id = word_id(word)
    cdef bint done = swap_dup(source.pool.swap, &id, <uint64_t>&source.words[index]) == 0
    us_chaos()
    if done:
        target.left[index] = source.left[index]
        us_store(&target.words[index], word_make(SWAPPED, id))
        swap_put(source.pool.swap, id)
    us_word_release(&source.words[index], 0 if done else word_make(SWAPPED, id) | (word & YOUNG), WAITERS)
    return done


cdef bint may_move(Region* target, uint64_t index, uint64_t word) noexcept nogil:
    """Whether a folio can go to another region as it is: not what others rely on in place, nor what is in parts."""
    if word & (PIN_MASK | GUARDED) or word_partial(word) or word_state(us_load(&target.words[index])) != EMPTY:
        return False            # not EMPTY: a copy of the one before faulted, and brought more folios of zeros
    return word_state(word) == SWAPPED or frames_can_move()


cdef uint64_t move_some(Region* source, Region* target, uint64_t first, uint64_t end, uint64_t* copied) noexcept nogil:
    """Moves folios to the same place of a fresh region. Returns the first that has to be copied (up to `copied`), or
    `end`."""
    cdef uint64_t index = first, run = 0, word
    while True:
        word = us_load(&source.words[index]) if index < end else 0
        # Neighbours go together, and a window at a time: that is how they may be huge pages.
        if run and (index == end or index % STAGE_SLOTS == 0 or word & BUSY or not word_resident(word)
                    or not may_move(target, index, word)):
            copied[0] = index
            if move_run(source, target, index - run, run) != 0:
                return index - run
            run = 0
        if index == end:
            return end
        if word & BUSY:
            us_word_wait(&source.words[index], word, WAITERS)       # we have none
        elif word_state(word) == EMPTY:
            index += 1
        elif not may_move(target, index, word):
            copied[0] = index + 1
            return index
        elif us_cas(&source.words[index], word, word | BUSY):
            copied[0] = index + 1
            if word_state(word) != SWAPPED:
                run += 1
            elif not move_swapped(source, target, index, word):
                return index
            index += 1


cdef void* memory_resize(void* start, uint64_t bytes) noexcept nogil:
    cdef Region* source = region_at(start)
    cdef Region* target
    cdef uint64_t end, index = 0, copied = 0, length
    cdef bint fits
    if source == NULL or source.base != <char*>start or bytes > arena_bytes():
        return NULL
    if bytes <= source.bytes and bytes >= source.bytes // 2:
        return start
    enter()
    # by whole folios, so that it can grow next time
    bytes = (bytes + FOLIO_BYTES - 1) & ~<uint64_t>(FOLIO_BYTES - 1)
    fits = bytes > source.bytes and region_grow(source, bytes)
    target = NULL if fits else fresh_region(source.pool, bytes)
    if target != NULL:
        target.hint.tiers = source.hint.tiers
        ahead_forget(source.pool, source, True)
    leave()
    if target == NULL:
        return start if fits else NULL
    length = source.bytes if source.bytes < bytes else bytes
    end = length >> FOLIO_SHIFT         # a short last folio is not what the target has there
    length &= FOLIO_BYTES - 1
    while index < end:
        enter()
        index = move_some(source, target, index, end, &copied)
        leave()
        if index < end:
            # by loads and stores, as the program would
            memcpy(folio_at(target, index), folio_at(source, index), (copied - index) << FOLIO_SHIFT)
            index = copied
    if length:
        memcpy(folio_at(target, end), folio_at(source, end), length)
    memory_free(start)
    return target.base


cdef bint memory_inside() noexcept nogil:
    return us_self_depth() != 0


cdef int snapshot_folio(Region* source, Region* target, uint64_t index) noexcept nogil:
    """Gives the target's folio, which is EMPTY, the content of the source's. 0 or -errno."""
    cdef MemoryPool* pool = source.pool
    cdef uint64_t* at = &source.words[index]
    cdef uint64_t bytes = folio_bytes(source, index)
    cdef char* folio = folio_at(source, index)
    cdef uint64_t word, id
    cdef Worker* worker = NULL
    cdef bint protected = False
    cdef int error = 0
    while True:
        word = us_load(at)
        if word & BUSY:
            us_word_wait(at, word, WAITERS)
        elif word_state(word) == EMPTY:
            return 0
        elif us_cas(at, word, (word | BUSY) & ~<uint64_t>WAITERS):
            word = (word | BUSY) & ~<uint64_t>WAITERS
            break
    us_chaos()
    if word_partial(word):
        error = complete(source, index, &word)
        if error:
            us_word_release(at, word & ~<uint64_t>(BUSY | WAITERS), WAITERS)
            return error
    id = word_id(word)
    if word_state(word) == CLEAN and not word & GUARDED:
        # Two holders shall have the id: it must be what the folio is, and stay so.
        protected = frame_protect(folio, bytes) == 0
        us_set_reading(folio, bytes, protected)
        if protected and still_clean(source, index, folio):
            word |= GUARDED
        else:
            word = without_copy(pool, id) | (word & (BUSY | YOUNG | PIN_MASK))
            id = 0
        us_set_reading(NULL, 0, False)
    if id == 0:
        worker = codec_take()           # not before: whoever has a worker may not wait for a BUSY word
    if word_state(word) == DIRTY and word_pins(word) == 0:
        # Stored while it stays in place: from now on it is clean, and its copy is the snapshot's too.
        protected = protected or frame_protect(folio, bytes) == 0
        if protected:
            us_set_reading(folio, bytes, True)
            id = swap_out(pool.swap, worker, folio, <int>bytes, &source.hint, <uint64_t>at, &error)
            if not by_signal():
                source.sums[index] = sum_folio(folio, bytes)
            us_set_reading(NULL, 0, False)
            if id:
                word = word_make(CLEAN, id) | BUSY | GUARDED | (word & YOUNG)
    us_chaos()
    if id and swap_dup(pool.swap, &id, <uint64_t>at) == 0:
        us_store(&target.words[index], word_make(SWAPPED, id))
        us_add(&pool.swapped_bytes, <int64_t>bytes)
        error = 0
    else:
        # A system call is writing into it, or there is no room to store it: a copy, of its own.
        error = 0
        if worker == NULL:
            worker = codec_take()
        if word_state(word) == SWAPPED:
            error = swap_in(pool.swap, worker, id, worker.folio, <int>bytes, 0)
        else:
            us_set_reading(folio, bytes, protected)
            memcpy(worker.folio, folio, bytes)
            us_set_reading(NULL, 0, False)
        if error == 0:
            error = frame_fill(folio_at(target, index), worker.folio, bytes, False)
        if error == 0:
            us_add(&pool.reclaim.resident, <int64_t>bytes)
            us_store(&target.words[index], word_make(DIRTY, 0))
        else:
            frame_vacate(folio_at(target, index), bytes)        # a part of it may have been filled
    if worker != NULL:
        codec_give(worker)
    if protected and id == 0:
        frame_unprotect(folio, bytes)   # only now: nobody wrote while it was copied
    us_chaos()
    us_word_release(at, word_make(word_state(word), id) | (word & (PIN_MASK | YOUNG | GUARDED)), WAITERS)
    return error


cdef int memory_snapshot(MemoryPool* pool, void* start, void* copy) noexcept nogil:
    cdef Region* source = region_at(start)
    cdef Region* target = region_at(copy)
    cdef uint64_t i, word
    cdef int error = 0, tries
    if (source == NULL or target == NULL or source.pool != pool or target.pool != pool or source.bytes != target.bytes
            or source.base != <char*>start or target.base != <char*>copy):
        return -EINVAL
    target.hint.tiers = source.hint.tiers       # what both have can be in one place only
    enter()
    source.zeros = True             # what was never touched in it reads the same in both
    target.zeros = True
    for i in range(region_folios(target)):
        if not discard_folio(target, i):        # what it was made of, if it was memory that was freed
            leave()
            return -EINVAL
    for i in range(region_folios(source)):
        # What is stored makes the pool grow before anything leaves; what is shared, the map, by a few bytes each.
        # Reclaim takes a worker of its own: before ours.
        word = us_load(&source.words[i])
        if (word_resident(word) and not word & GUARDED) or i & 63 == 0:
            reclaim_charge(&pool.reclaim, 0, False)
        error = snapshot_folio(source, target, i)
        tries = 0
        while error == -ENOMEM and frames_mapped() and tries < TRIES:
            # as in folio_fault
            tries += 1
            pool.reclaim.evict(pool, FOLIO_BYTES, False)
            error = snapshot_folio(source, target, i)
        if error:
            explain(source, i, error, False)
            break
    reclaim_charge(&pool.reclaim, 0, False)
    leave()
    return told(error)


cdef int64_t memory_evict(MemoryPool* pool, int64_t want) noexcept nogil:
    cdef int64_t done = 0, freed
    enter()
    ahead_forget(pool, NULL, True)
    done = region_give_up(pool, want)
    while done < want:
        freed = evict(pool, want - done, False, True)
        if freed <= 0:
            break
        done += freed
    leave()
    return done


cdef void memory_fit(MemoryPool* pool, int64_t limit) noexcept nogil:
    enter()
    pool_fit(pool, limit)
    leave()


cdef MemoryPool* memory_next_watched(MemoryPool* pool) noexcept nogil:
    cdef MemoryPool* next
    enter()
    next = pool_next_watched(pool)
    if pool != NULL:
        pool_put(pool)
    leave()
    return next


cdef int64_t memory_family(MemoryPool* pool) noexcept nogil:
    cdef int64_t used
    enter()             # what is in use is asked of swap files, too, which a swapoff may take away
    reclaim_settle(&pool.reclaim)
    used = reclaim_used(&pool.reclaim) + us_read(&pool.reclaim.family.others)
    leave()
    return used


cdef bint memory_shrink(MemoryPool* pool, int64_t most) noexcept nogil:
    cdef bint more
    enter()
    more = reclaim_shrink(&pool.reclaim, most)
    leave()
    return more


cdef int64_t memory_writeback(MemoryPool* pool, int64_t want) noexcept nogil:
    cdef int64_t moved
    enter()
    moved = swap_writeback(pool.swap, want, True)
    leave()
    return moved


cdef void memory_hold() noexcept nogil:
    enter()


cdef void memory_let_go() noexcept nogil:
    leave()


cdef int memory_swapon(MemoryPool* pool, SwapFile* device, uint64_t limit, int priority, uint32_t tier,
                       const char* directory) noexcept nogil:
    cdef int place
    close_gate()
    place = space_swapon(pool.swap, device, limit, priority, tier, directory)
    us_max(&pool.reclaim.peak, reclaim_used(&pool.reclaim))
    open_gate()
    us_write(&pool.reclaim.rest_until, 0)       # what could not leave before, maybe can now
    return place


cdef int memory_drain(MemoryPool* pool, int place, bint on) noexcept nogil:
    cdef int error
    close_gate()
    error = space_drain(pool.swap, place, on)
    open_gate()
    us_write(&pool.reclaim.rest_until, 0)
    return error


cdef bint memory_drain_some(MemoryPool* pool, int place, uint32_t* cluster, uint32_t* at, bint to_zswap,
                            Moved* moved) noexcept nogil:
    cdef int64_t room = 0
    cdef bint more
    enter()
    if to_zswap or not space_has_device(pool.swap):
        room = reclaim_room(&pool.reclaim, pool.swap.bounce_bytes)
    more = space_drain_some(pool.swap, place, cluster, at, room, moved)
    leave()
    return more


cdef int memory_swapoff(MemoryPool* pool, int place) noexcept nogil:
    cdef int error
    close_gate()
    # What readahead has on the stage has its copy in the file still, or it has not; either way it is asked by its id.
    error = space_swapoff(pool.swap, place)
    open_gate()
    return error


cdef int64_t memory_compact(MemoryPool* pool) noexcept nogil:
    cdef int64_t freed
    enter()
    freed = swap_compact(pool.swap, 0, 1 << 62)
    leave()
    return freed


cdef int by_id(const void* one, const void* other) noexcept nogil:
    cdef uint64_t a = (<const uint64_t*>one)[0]
    cdef uint64_t b = (<const uint64_t*>other)[0]
    return (a > b) - (a < b)


cdef int64_t check_counts(MemoryPool* pool, uint64_t* ids, int64_t n, int64_t* different) noexcept nogil:
    """How many ids have another count than there are words with them; and how many ids there are. Sorts the ids."""
    cdef int64_t first = 0, last, wrong = 0, count
    cdef SwapMap* map = pool.swap.map
    qsort(ids, n, 8, by_id)
    while first < n:
        last = first
        while last < n and ids[last] == ids[first]:
            last += 1
        count = map.ops.count(map, ids[first])
        # Where an id is its entry, folios that are filled alike have ids that are alike, and each has count one.
        different[0] += 1
        if count == 1 and swap_same(pool.swap, ids[first]):
            different[0] += last - first - 1
        elif count != last - first:
            wrong += 1
        first = last
    return wrong


cdef int64_t memory_check(MemoryPool* pool, int64_t* states) noexcept nogil:
    cdef Region* region
    cdef uint64_t i, word
    cdef int64_t wrong = 0, held = 0, resident = 0, kept = 0, swapped = 0, parts = 0
    cdef uint64_t length
    cdef uint64_t* ids
    close_gate()
    length = ((<uint64_t>us_read(&pool.virtual_bytes) >> FOLIO_SHIFT) + <uint64_t>us_read(&pool.region_count) + 1) * 8
    ids = <uint64_t*>mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if ids == MAP_FAILED:
        open_gate()
        return -ENOMEM
    ahead_forget(pool, NULL, True)
    region = pool.regions
    while region != NULL:
        for i in range(region_folios(region)):
            word = region.words[i]
            if word & BUSY:
                wrong += 1                      # nobody is in the gate, so nobody owns it
            states[word_state(word)] += 1
            if word_resident(word):
                resident += <int64_t>bytes_in_place(region, i, word)
                swapped += <int64_t>(folio_bytes(region, i) - bytes_in_place(region, i, word))
            elif word_state(word) == SWAPPED:
                swapped += <int64_t>folio_bytes(region, i)
            parts += parts_in_place(region, i, word)
            if word_partial(word):
                states[5] += 1
                if word & (PIN_MASK | GUARDED) or not 0 < region.sums[i] & ~<uint64_t>PART_FILED < 1 << PARTS:
                    wrong += 1
            if (word_id(word) != 0) != (word_state(word) == CLEAN or word_state(word) == SWAPPED):
                wrong += 1
            if word_id(word):
                ids[held] = word_id(word)
                held += 1
                wrong += not space_owns(pool.swap, word_id(word), <uint64_t>&region.words[i])
        region = region.next
    region = pool.kept
    while region != NULL:
        for i in range(region_folios(region)):
            word = region.words[i]
            wrong += word != 0 and word != word_make(DIRTY, 0) | YOUNG
            kept += <int64_t>folio_bytes(region, i) if word else 0
        for i in range(region_folios(region), region.granules):
            wrong += region.words[i] != 0       # what was given up
        region = region.next
    wrong += kept != us_read(&pool.reclaim.kept)
    resident += kept
    wrong += check_counts(pool, ids, held, &states[4])
    wrong += resident != us_read(&pool.reclaim.resident)
    wrong += swapped != us_read(&pool.swapped_bytes)
    wrong += parts != us_read(&pool.parts)
    wrong += space_lost(pool.swap)
    munmap(ids, length)
    open_gate()
    return wrong


cdef bint memory_ours(const void* start, size_t length) noexcept nogil:
    # written so that no sum can overflow: the program passes what it likes
    if <char*>start >= arena_end or length == 0:
        return False
    return <char*>start >= arena_start or length > <size_t>(arena_start - <char*>start)


cdef int64_t memory_pin(void* start, size_t length, bint writing) noexcept nogil:
    cdef char* address = <char*>start
    cdef Region* region
    cdef uint64_t offset, most, done, index, word
    cdef int error
    if address < arena_start:
        return <int64_t>(<size_t>(arena_start - address) if <size_t>(arena_start - address) < length else length)
    if address >= arena_end:
        return <int64_t>length
    region = region_at(address)
    if region == NULL:
        # a hole of the arena: nothing to pin up to the next folio; the system call will say EFAULT
        most = FOLIO_BYTES - (<uint64_t>address & (FOLIO_BYTES - 1))
        return <int64_t>(most if most < length else length)
    offset = <uint64_t>(address - region.base)
    most = region.bytes - offset
    if most > length:
        most = length
    if most > <uint64_t>region.pool.reclaim.limit // 8:
        # a share of the budget, up to a folio's end
        most = (((offset + <uint64_t>region.pool.reclaim.limit // 8) >> FOLIO_SHIFT) << FOLIO_SHIFT) - offset
    done = 0
    enter()
    while done < most:
        index = (offset + done) >> FOLIO_SHIFT
        word = us_load(&region.words[index])
        if (word & BUSY or not word_resident(word) or word_partial(word)
                or (writing and word_state(word) != DIRTY)):
            error = folio_fault(region, index, writing, NULL)
            if error:
                leave()
                if done == 0:
                    explain(region, index, error, False)
                    return told(error)
                return <int64_t>done
        elif word_pins(word) == PIN_MAX:
            # thousands of calls on one folio at once; waiting could deadlock, as the caller may hold some of them
            leave()
            return <int64_t>done if done else -ENOMEM
        elif us_cas(&region.words[index], word, (word + PIN_ONE) | YOUNG):
            done = ((index + 1) << FOLIO_SHIFT) - offset
    leave()
    return <int64_t>(done if done < most else most)


cdef void memory_unpin(void* start, size_t length) noexcept nogil:
    cdef char* address = <char*>start
    cdef Region* region = region_at(address)
    cdef uint64_t offset, end, index, word
    if region == NULL:
        return
    offset = <uint64_t>(address - region.base)
    end = offset + length
    if end > region.bytes:
        end = region.bytes
    for index in range(offset >> FOLIO_SHIFT, (end + FOLIO_BYTES - 1) >> FOLIO_SHIFT):
        while True:
            word = us_load(&region.words[index])
            us_assert(word_pins(word) > 0, "a folio that is unpinned has pins")
            # BUSY may be set by a fault on the resident folio; pins are left alone by whoever set it
            if word & BUSY:
                us_word_wait(&region.words[index], word, WAITERS)
            elif us_cas(&region.words[index], word, word - PIN_ONE):
                break


cdef void memory_pool_close(MemoryPool* pool) noexcept nogil:
    enter()
    pool_put(pool)
    leave()


# ---- fork ----

cdef void close_gate() noexcept nogil:
    cdef uint64_t seen
    us_block_signals()
    while True:
        seen = us_load(&gate)
        if seen & GATE_CLOSED:
            us_word_wait(&gate, seen, GATE_WAITERS)         # another thread forks
        elif us_cas(&gate, seen, seen | GATE_CLOSED):
            break
    while us_load(&gate) & ~<uint64_t>(GATE_CLOSED | GATE_WAITERS):
        sched_yield()


cdef void open_gate() noexcept nogil:
    us_word_release(&gate, 0, GATE_WAITERS)
    us_restore_signals()


cdef void before_fork() noexcept nogil:
    cdef MemoryPool* pool
    close_gate()
    pool = pool_first()
    # A child would only copy what is kept, and a fork less of it.
    while pool != NULL:
        region_give_up(pool, <int64_t>1 << 62)
        pool = pool.next
    pool = pool_first()
    # A child of the family belongs to it also if there is no pool just now: it may make one, and fork.
    if pool != NULL or kin_me() >= 0:
        kin_before_fork()
    while pool != NULL:
        if pool.swap != NULL:           # else another thread is making it
            space_before_fork(pool.swap)
            reclaim_before_fork(&pool.reclaim)
        pool = pool.next


cdef void after_fork_in_parent() noexcept nogil:
    kin_after_fork(False)
    open_gate()


cdef void after_fork_in_child() noexcept nogil:
    """The child's memory is the parent's at the fork, copied on write by the kernel: page tables, zswap pool and
    resident folios alike. Missing are the registration and the write protection; and swap files are the
    parent's, to be read only. Which of their slots we refer to was noted before (space_before_fork)."""
    cdef MemoryPool* pool
    cdef Region* region
    cdef uint64_t i, word
    cdef int error, parent
    cdef uint64_t parent_generation
    cdef const char* text = b"userswap: a forked process can't open what it needs for its page faults, and ends.\n"
    us_store(&gate, 0)
    us_readers_renew(frames_delivery() == BY_THREAD)
    error = frames_reopen()
    if error == 0 and frames_delivery() == BY_THREAD:
        error = server_renew()
    if error:
        write(2, text, strlen(text))
        _exit(70)
    stage_renew()
    threads_renew()
    ahead_renew()
    parent = kin_me()
    parent_generation = kin_generation(parent) if parent >= 0 else 0
    kin_after_fork(True)
    pool = pool_first()
    while pool != NULL:
        us_write(&pool.watched, 0)      # no thread here that looks: the budget stays what it was
        if pool.swap != NULL:
            space_inherit(pool.swap)
            reclaim_inherit(&pool.reclaim, parent, parent_generation)
        region = pool.regions
        while region != NULL:
            region.shared = True
            for i in range(region_folios(region)):
                word = region.words[i]
                # What was known to be clean by its protection is not any more, unless mappings are protected, which
                # are inherited; a sum says the same here as there.
                if word & GUARDED and not frames_mapped():
                    swap_put(pool.swap, word_id(word))
                    word = word_make(DIRTY, 0) | (word & PIN_MASK)
                # pins belong to system calls of threads that are not here
                region.words[i] = word & ~<uint64_t>PIN_MASK
            region = region.next
        pool = pool.next
    us_restore_signals()


cdef PinOps pin_ops
pin_ops.ours = memory_ours
pin_ops.pin = memory_pin
pin_ops.unpin = memory_unpin
pin_ops.discard = memory_discard


cdef int faults_install(int threads) noexcept nogil:
    global installed
    # Every time: somebody (the wrappers' own tests) may have put other operations or another handler in place.
    cdef int error = syscalls_install(&pin_ops)
    if error == 0:
        if frames_delivery() == BY_SIGNAL:
            error = handler_install(SIGBUS, on_fault)
        elif frames_delivery() == BY_SEGV:
            error = handler_install(SIGSEGV, on_fault)
        elif not installed:
            us_readers_renew(True)
            error = server_start(&server_ops, threads)
    if error == 0:
        error = sum_start()
    if error == 0 and not installed:
        error = -us_shim_atfork(before_fork, after_fork_in_parent, after_fork_in_child)
        installed = error == 0
    return error


cdef void pool_bind(MemoryPool* pool, SwapSpace* swap) noexcept nogil:
    pool.swap = swap
    pool.reclaim.swap = swap
    pool.reclaim.evict = evict_in_turn
    pool.reclaim.ctx = pool
