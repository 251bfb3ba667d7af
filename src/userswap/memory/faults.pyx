"""Faults: every transition of a page-table word, and the SIGBUS handler that most of them start from.

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
from libc.errno cimport EINVAL, ENOMEM, ENXIO, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport qsort
from libc.string cimport memcpy, strerror, strlen

from userswap.backends.codec cimport FOLIO_BYTES, FOLIO_SHIFT, Worker, codec_give, codec_take
from userswap.backends.swapfile cimport swapfile_name
from userswap.memory.frames cimport (
    frame_fill, frame_fill_zeros, frame_mend, frame_protect, frame_unprotect, frame_vacate, frames_reopen,
)
from userswap.memory.pagetable cimport (
    BUSY, CLEAN, DIRTY, EMPTY, PIN_MASK, PIN_MAX, PIN_ONE, SWAPPED, WAITERS, YOUNG, word_id, word_make, word_pins,
    word_resident, word_state,
)
from userswap.memory.regions cimport (
    BUCKETS, PAGE_BYTES, MemoryPool, Region, arena_end, arena_end_word, arena_first_word, arena_start, folio_bytes,
    pool_first, pool_put, region_at, region_folios, region_new, region_of_word, region_release, region_unlink,
)
from userswap.memory.syscalls cimport PinOps, siginfo_t, sigbus_chain, sigbus_install, syscalls_install
from userswap.native.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from userswap.native.us cimport (
    us_add, us_assert, us_cas, us_chaos, us_load, us_lock, us_now, us_read, us_store, us_unlock, us_word_release,
    us_word_wait,
)
from userswap.reclaim.reclaim cimport reclaim_charge, reclaim_uncharge
from userswap.swap.holder cimport holder_release
from userswap.swap.kin cimport kin_after_fork, kin_before_fork
from userswap.swap.map cimport HolderOps, SwapMap
from userswap.swap.space cimport (
    SwapSpace, space_has_slots, space_inherit, swap_cached, swap_compact, swap_dup, swap_in, swap_out, swap_out_run,
    swap_put, swap_same, swap_uncache, swap_writeback,
)

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>
    #include <ucontext.h>

    /* How deep this thread is in the gate, and which folios it is reading for swap-out. */
    static __thread int us_depth;
    static __thread sigset_t us_kept_mask;
    static __thread int us_kept_cancel;
    static __thread const char *us_reading, *us_reading_end;

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
    static void us_set_reading(const char *at, uint64_t length) { us_reading = at; us_reading_end = at + length; }

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
    int BUS_ADRERR              # not BUS_MCEERR_AR: a page of broken memory is not ours to mend
    int us_self_depth() nogil
    int us_deeper() nogil
    int us_shallower() nogil
    void us_allow_cancel() nogil
    bint us_self_reading(const char* at) nogil
    void us_set_reading(const char* at, uint64_t length) nogil
    int us_fault_writes(void* context) nogil
    void us_block_signals() nogil
    void us_restore_signals() nogil
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil) nogil

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* buffer, size_t length)
    void _exit(int status)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    BATCH = 16                  # most folios evicted in one go
    LEAST_BATCH = 8             # and fewest, so that neighbours share system calls and TLB flushes
    TRIES = 64                  # victims that may fail to leave (incompressible, no device) before it gives up
    GATE_CLOSED = 1
    GATE_WAITERS = 2
    GATE_ONE = 4

# The gate: how many threads are inside a transition. fork closes it and waits until it is empty, so that a
# child never inherits a BUSY word or a held mutex.
cdef uint64_t gate = 0
cdef bint installed = False
cdef bint forking_slots = False     # the fork under way: a child will have slots of ours to read


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


cdef int fill_from_peer(MemoryPool* pool, uint64_t id, char* target, uint64_t bytes, bint protect) noexcept nogil:
    """Copies a shared folio from another holder that has it clean in place. -ENXIO: there is none just now."""
    cdef uint64_t peer = swap_cached(pool.swap, id)
    cdef uint64_t* word = <uint64_t*>peer
    cdef Region* region
    cdef uint64_t index
    cdef int error = -ENXIO
    if peer == 0 or word_trylock(pool, peer, id) == 0:
        return -ENXIO
    region = region_of_word(word)
    index = word - region.words
    if word_state(us_load(word)) == CLEAN and folio_bytes(region, index) >= bytes:
        # The kernel reads it: if the program threw a page of it away (madvise) that fails, and storage has the bytes.
        error = frame_fill(target, folio_at(region, index), bytes, protect)
        if error:
            frame_vacate(target, bytes)
        else:
            us_add(&pool.swap.cache_hits, 1)
    holder_release(word, id)
    return error


cdef int make_resident(Region* region, uint64_t index, uint64_t word, bint writing) noexcept nogil:
    """EMPTY or SWAPPED to resident. The caller has set BUSY on `word`; it is released here, whatever happens."""
    cdef MemoryPool* pool = region.pool
    cdef uint64_t* at = &region.words[index]
    cdef uint64_t bytes = folio_bytes(region, index)
    cdef uint64_t id = word_id(word)
    cdef uint64_t next
    cdef Worker* worker
    cdef int error
    reclaim_charge(&pool.reclaim, <int64_t>bytes)
    us_chaos()
    if word_state(word) == EMPTY:
        error = frame_fill_zeros(folio_at(region, index), bytes)
        next = word_make(DIRTY, 0)
    else:
        # clean: the swap cache keeps the copy, and the first write to the folio gives it up
        error = fill_from_peer(pool, id, folio_at(region, index), bytes, not writing)
        if error:
            worker = codec_take()
            error = swap_in(pool.swap, worker, id, worker.folio, <int>bytes, 0 if writing else <uint64_t>at)
            if error == 0:
                error = frame_fill(folio_at(region, index), worker.folio, bytes, not writing)
            codec_give(worker)
        next = word_make(DIRTY, 0) if writing else word_make(CLEAN, id)
    if error:
        frame_vacate(folio_at(region, index), bytes)        # a part of it may have been filled
        reclaim_uncharge(&pool.reclaim, <int64_t>bytes)
        us_word_release(at, word & ~<uint64_t>(BUSY | WAITERS), WAITERS)
        return error
    if word_state(word) == SWAPPED:
        us_add(&pool.swapped_bytes, -<int64_t>bytes)
        if writing:
            swap_put(pool.swap, id)
    us_chaos()
    us_word_release(at, next | YOUNG, WAITERS)
    return 0


cdef int make_dirty(Region* region, uint64_t index, uint64_t word) noexcept nogil:
    """CLEAN to DIRTY: a write gives up the swapped copy. The caller has set BUSY; released here."""
    cdef int error = frame_unprotect(folio_at(region, index), folio_bytes(region, index))
    us_chaos()
    if error == 0:
        swap_put(region.pool.swap, word_id(word))
        word = word_make(DIRTY, 0) | (word & PIN_MASK)
    us_word_release(&region.words[index], (word & ~<uint64_t>(BUSY | WAITERS)) | YOUNG, WAITERS)
    return error


cdef int folio_fault(Region* region, uint64_t index, int writing, char* page) noexcept nogil:
    """Makes a folio accessible: resident, and DIRTY if `writing` (1; 0 reading, -1 not known). `page`: where the
    fault was, NULL when there was none (pinning). 0 or -errno; 0 may need another try by the caller."""
    cdef uint64_t* at = &region.words[index]
    cdef uint64_t word, held
    cdef int state, missing
    while True:
        word = us_load(at)
        if word & BUSY:
            if page != NULL and us_self_reading(folio_at(region, index)):
                # This thread is swapping this very folio out and found a page of it missing: the program
                # has thrown it away with madvise. It reads as zeros, as the program was promised; protected like
                # the pages beside it, so that no other thread writes what would not be in the copy.
                missing = frame_mend(page, True)
                return missing if missing < 0 else 0
            us_word_wait(at, word, WAITERS)
            continue
        state = word_state(word)
        held = (word | BUSY) & ~<uint64_t>WAITERS
        if state == EMPTY or state == SWAPPED:
            if us_cas(at, word, held):
                return make_resident(region, index, held, writing == 1)
        elif state == CLEAN and writing == 1:
            if us_cas(at, word, held):
                return make_dirty(region, index, held)
        elif page == NULL:
            return 0
        elif us_cas(at, word, held):
            # Resident, yet there was a fault: another thread was faster, or (not knowing what kind of access
            # it was) this is a write to a clean folio, or the program threw the page away with madvise.
            missing = frame_mend(page, False)
            if state == CLEAN and (missing == 1 or (missing == 0 and writing < 0)):
                return make_dirty(region, index, held)
            us_word_release(at, held & ~<uint64_t>BUSY, WAITERS)
            return missing if missing < 0 else 0


# ---- swap-out ----

cdef struct Victim:
    Region* region
    uint64_t index
    uint64_t word               # with BUSY set by us
    uint64_t next               # what the word shall be

cdef int find_victims(MemoryPool* pool, Victim* victims, int most) noexcept nogil:
    """Moves the clock hand, setting BUSY on what is cold: resident, not pinned, not looked at since the hand came
    by last. Neighbours come out one after the other, so that system calls can take them together."""
    cdef int found = 0
    cdef int64_t folios = 0, looked = 0
    cdef Region* region
    cdef uint64_t index, word
    us_lock(&pool.list_lock)
    folios = us_read(&pool.virtual_bytes) // FOLIO_BYTES + us_read(&pool.region_count)
    region = pool.hand if pool.hand != NULL else pool.regions
    index = pool.hand_index if pool.hand != NULL else 0
    # twice around: the first time may only clear YOUNG bits
    while region != NULL and found < most and looked <= 2 * folios:
        if index >= region_folios(region):
            if found:
                break                   # a batch stays within a region
            region = region.next if region.next != NULL else pool.regions
            index = 0
            looked += 1
            continue
        word = us_load(&region.words[index])
        looked += 1
        if word_resident(word) and not (word & BUSY) and word_pins(word) == 0:
            if word & YOUNG:
                us_cas(&region.words[index], word, word & ~<uint64_t>YOUNG)
            elif us_cas(&region.words[index], word, (word | BUSY) & ~<uint64_t>WAITERS):
                victims[found].region = region
                victims[found].index = index
                victims[found].word = word
                found += 1
        index += 1
    pool.hand = region
    pool.hand_index = index
    us_unlock(&pool.list_lock)
    return found


cdef int64_t vacate_run(MemoryPool* pool, Worker* worker, Victim* victims, int count) noexcept nogil:
    """Evicts a run of neighbouring folios whose words are BUSY by us; releases the words. Returns the bytes freed."""
    cdef Region* region = victims[0].region
    cdef char* start = folio_at(region, victims[0].index)
    cdef uint64_t length = (<uint64_t>(count - 1) << FOLIO_SHIFT) + folio_bytes(region, victims[count - 1].index)
    cdef int i, first = 0, last = 0, error = 0, refused = 0
    cdef int64_t freed = 0
    cdef uint64_t bytes
    cdef uint64_t[BATCH] ids
    cdef bint protected = False
    for i in range(count):
        if word_state(victims[i].word) == DIRTY:
            protected = True
    if protected:
        error = frame_protect(start, length)
    us_chaos()
    while last < count:
        first = last
        victims[first].next = 0
        last += 1
        if word_state(victims[first].word) == CLEAN:
            swap_uncache(pool.swap, word_id(victims[first].word), <uint64_t>&region.words[victims[first].index])
            victims[first].next = word_make(SWAPPED, word_id(victims[first].word))
            continue
        # Dirty neighbours leave as one large folio: their ids are allocated together, raw ones are one write.
        while last < count and word_state(victims[last].word) == DIRTY:
            victims[last].next = 0
            last += 1
        if error:
            continue
        us_set_reading(folio_at(region, victims[first].index), <uint64_t>(last - first) << FOLIO_SHIFT)
        swap_out_run(pool.swap, worker, folio_at(region, victims[first].index), last - first,
                     <int>folio_bytes(region, victims[last - 1].index), &region.hint,
                     <uint64_t>&region.words[victims[first].index], ids, &refused)
        us_set_reading(NULL, 0)
        for i in range(first, last):
            if ids[i - first]:
                victims[i].next = word_make(SWAPPED, ids[i - first])
    us_chaos()
    i = 0
    while i < count:
        if victims[i].next == 0:
            # nowhere to put it: it stays, as it was, and is not looked at again soon
            frame_unprotect(folio_at(region, victims[i].index), folio_bytes(region, victims[i].index))
            us_word_release(&region.words[victims[i].index], word_make(DIRTY, 0) | YOUNG, WAITERS)
            i += 1
            continue
        first = i
        bytes = 0
        while i < count and victims[i].next != 0:
            bytes += folio_bytes(region, victims[i].index)
            i += 1
        error = frame_vacate(folio_at(region, victims[first].index), bytes)
        us_assert(error == 0, "vacating a folio that is in place works")
        freed += <int64_t>bytes
        us_add(&pool.swapped_bytes, <int64_t>bytes)
        reclaim_uncharge(&pool.reclaim, <int64_t>bytes)
        while first < i:
            us_word_release(&region.words[victims[first].index], victims[first].next, WAITERS)
            first += 1
    return freed


cdef int64_t evict(void* ctx, int64_t want) noexcept nogil:
    """reclaim's callback: about `want` bytes, at most a batch; more only while what it picks can't leave."""
    cdef MemoryPool* pool = <MemoryPool*>ctx
    cdef Victim[BATCH] victims
    cdef int64_t freed = 0
    cdef int count, first, last, tried = 0
    cdef int most = <int>((want + FOLIO_BYTES - 1) // FOLIO_BYTES) if want < BATCH * FOLIO_BYTES else BATCH
    cdef Worker* worker = codec_take()
    while freed == 0 and tried < TRIES:
        count = find_victims(pool, victims, most if most > LEAST_BATCH else LEAST_BATCH)
        if count == 0:
            break
        tried += count
        first = 0
        while first < count:
            last = first + 1
            while last < count and victims[last].index == victims[last - 1].index + 1:
                last += 1
            freed += vacate_run(pool, worker, &victims[first], last - first)
            first = last
    codec_give(worker)
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


cdef void explain(Region* region, uint64_t index, int error, bint fatal) noexcept nogil:
    """The data of a folio can't be had: says so in plain words. `fatal`: the caller ends the program as a SIGBUS
    does; else its system call fails with the same errno."""
    cdef const char* ending = b"The program ends here." if fatal else b"The system call fails."
    cdef char[640] text
    cdef const char* device = b"zswap"
    cdef int n
    if region.pool.swap.devices[0] != NULL:
        device = swapfile_name(region.pool.swap.devices[0])
    if error == -ENXIO:
        n = snprintf(text, sizeof(text),
                     "userswap: folio %llu of the region at %p is in the swap file %s of a process that this one was "
                     "forked from, and is out of reach. %s\n",
                     <unsigned long long>index, region.base, device, ending)
    else:
        n = snprintf(text, sizeof(text),
                     "userswap: folio %llu of the region at %p (%llu bytes) can't be brought back from %s: %s. "
                     "%s\n", <unsigned long long>index, region.base, <unsigned long long>region.bytes, device,
                     strerror(-error), ending)
    write(2, text, n if n < <int>sizeof(text) else <int>sizeof(text) - 1)


cdef void on_sigbus(int signal, siginfo_t* info, void* context) noexcept nogil:
    cdef int kept = errno
    cdef char* address = <char*>info.si_addr
    cdef Region* region = region_at(address) if info.si_code == BUS_ADRERR else NULL
    cdef int64_t started, took
    cdef uint64_t index
    cdef int error
    if region == NULL:
        sigbus_chain(signal, info, context)
        return
    started = us_now()
    index = <uint64_t>(address - region.base) >> FOLIO_SHIFT
    gate_enter()
    error = folio_fault(region, index, us_fault_writes(context),
                        <char*>(<uint64_t>address & ~<uint64_t>(PAGE_BYTES - 1)))
    took = us_now() - started
    us_add(&region.pool.faults, 1)
    us_add(&region.pool.fault_ns, took)
    us_add(&region.pool.fault_times[bucket(took)], 1)
    gate_leave()
    if error:
        explain(region, index, error, True)
        sigbus_chain(signal, info, context)
    (&errno)[0] = kept


# ---- for the rooms above ----

cdef void* memory_new(MemoryPool* pool, uint64_t bytes) noexcept nogil:
    cdef Region* region
    enter()
    region = region_new(pool, bytes)
    leave()
    return region.base if region != NULL else NULL


cdef void memory_free(void* start) noexcept nogil:
    cdef Region* region = region_at(start)
    cdef MemoryPool* pool
    cdef uint64_t i, word
    cdef int64_t resident = 0, swapped = 0
    if region == NULL or region.base != <char*>start:
        return
    enter()
    pool = region.pool
    region_unlink(region)
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
            resident += <int64_t>folio_bytes(region, i)
        elif word_state(word) == SWAPPED:
            swapped += <int64_t>folio_bytes(region, i)
    if resident:
        frame_vacate(region.base, region.bytes)
    us_add(&pool.swapped_bytes, -swapped)
    reclaim_uncharge(&pool.reclaim, resident)
    region_release(region)
    leave()


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
    id = word_id(word)
    if id == 0:
        worker = codec_take()           # not before: whoever has a worker may not wait for a BUSY word
    if word_state(word) == DIRTY and word_pins(word) == 0:
        # Stored while it stays in place: from now on it is clean, and its copy is the snapshot's too.
        protected = frame_protect(folio, bytes) == 0
        if protected:
            us_set_reading(folio, bytes)
            id = swap_out(pool.swap, worker, folio, <int>bytes, &source.hint, <uint64_t>at, &error)
            us_set_reading(NULL, 0)
            if id:
                word = word_make(CLEAN, id) | BUSY | (word & YOUNG)
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
            us_set_reading(folio, bytes)
            memcpy(worker.folio, folio, bytes)
            us_set_reading(NULL, 0)
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
    us_word_release(at, word_make(word_state(word), id) | (word & (PIN_MASK | YOUNG)), WAITERS)
    return error


cdef int memory_snapshot(MemoryPool* pool, void* start, void* copy) noexcept nogil:
    cdef Region* source = region_at(start)
    cdef Region* target = region_at(copy)
    cdef uint64_t i
    cdef int error = 0
    if (source == NULL or target == NULL or source.pool != pool or target.pool != pool or source.bytes != target.bytes
            or source.base != <char*>start or target.base != <char*>copy):
        return -EINVAL
    enter()
    for i in range(region_folios(source)):
        # What is stored makes the pool grow before anything leaves; what is shared, the map, by a few bytes each.
        # Reclaim takes a worker of its own: before ours.
        if word_state(us_load(&source.words[i])) == DIRTY or i & 63 == 0:
            reclaim_charge(&pool.reclaim, 0)
        error = snapshot_folio(source, target, i)
        if error:
            break
    reclaim_charge(&pool.reclaim, 0)
    leave()
    return error


cdef int64_t memory_evict(MemoryPool* pool, int64_t want) noexcept nogil:
    cdef int64_t done = 0, freed
    enter()
    while done < want:
        freed = evict(pool, want - done)
        if freed <= 0:
            break
        done += freed
    leave()
    return done


cdef int64_t memory_writeback(MemoryPool* pool, int64_t want) noexcept nogil:
    cdef int64_t moved
    enter()
    moved = swap_writeback(pool.swap, want)
    leave()
    return moved


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
    cdef int64_t wrong = 0, held = 0
    cdef uint64_t length
    cdef uint64_t* ids
    close_gate()
    length = ((<uint64_t>us_read(&pool.virtual_bytes) >> FOLIO_SHIFT) + <uint64_t>us_read(&pool.region_count) + 1) * 8
    ids = <uint64_t*>mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if ids == MAP_FAILED:
        open_gate()
        return -ENOMEM
    region = pool.regions
    while region != NULL:
        for i in range(region_folios(region)):
            word = region.words[i]
            if word & BUSY:
                wrong += 1                      # nobody is in the gate, so nobody owns it
            states[word_state(word)] += 1
            if (word_id(word) != 0) != (word_state(word) == CLEAN or word_state(word) == SWAPPED):
                wrong += 1
            if word_id(word):
                ids[held] = word_id(word)
                held += 1
        region = region.next
    wrong += check_counts(pool, ids, held, &states[4])
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
        if word & BUSY or not word_resident(word) or (writing and word_state(word) != DIRTY):
            error = folio_fault(region, index, writing, NULL)
            if error:
                leave()
                if done == 0:
                    explain(region, index, error, False)
                    return error
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
    global forking_slots
    cdef MemoryPool* pool
    close_gate()
    pool = pool_first()
    forking_slots = False
    while pool != NULL:
        forking_slots = forking_slots or space_has_slots(pool.swap)
        pool = pool.next
    if forking_slots:
        kin_before_fork()


cdef void after_fork_in_parent() noexcept nogil:
    if forking_slots:
        kin_after_fork(False)
    open_gate()


cdef void after_fork_in_child() noexcept nogil:
    """The child's memory is the parent's at the fork, copied on write by the kernel: page tables, zswap pool and
    resident folios alike. Missing are the registration and the write protection; and swap files are the
    parent's, to be read only."""
    cdef MemoryPool* pool
    cdef Region* region
    cdef uint64_t i, word
    cdef int error
    cdef const char* text = b"userswap: a forked process can't open its own userfaultfd and ends.\n"
    us_store(&gate, 0)
    error = frames_reopen()
    if error:
        write(2, text, strlen(text))
        _exit(70)
    if forking_slots:
        kin_after_fork(True)
    pool = pool_first()
    while pool != NULL:
        space_inherit(pool.swap)
        region = pool.regions
        while region != NULL:
            for i in range(region_folios(region)):
                word = region.words[i]
                if word_state(word) == CLEAN:
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


cdef int faults_install() noexcept nogil:
    global installed
    # Every time: somebody (the wrappers' own tests) may have put other operations or another handler in place.
    cdef int error = syscalls_install(&pin_ops)
    if error == 0:
        error = sigbus_install(on_sigbus)
    if error == 0 and not installed:
        error = -pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child)
        installed = error == 0
    return error


cdef void pool_bind(MemoryPool* pool, SwapSpace* swap) noexcept nogil:
    pool.swap = swap
    pool.reclaim.swap = swap
    pool.reclaim.evict = evict
    pool.reclaim.ctx = pool
