"""The swap space: a SwapMap and the backends behind it (see space.pxd for the interface).

Touches backends and the map only. Locking: an entry's lock is held while the data behind it is read,
moved or freed. `writeback_lock` is taken before entry locks, entry locks before the leaf mutexes of zswap
and of the devices; inside a leaf mutex an entry is only ever try-locked. Which devices, places and tiers there are
changes with the gate of the memory room closed: nobody is in here then, so all others read it without a lock.

What storage remembers of a folio beside its owner is in the same word: which tiers it may not be in, and in a swap file
how many slots it has. So whoever moves it needs neither its region nor its id. Everything that goes to a swap file
goes through run_write, everything that comes from one through run_read (or read_row, for several at once).

Freeing order (see map.pxd): storage first, under the entry's lock, then the entry. So whoever finds an
object in zswap, or a run of slots, under its mutex knows that the owner's id is alive and may try-lock it.
"""
from libc.errno cimport (
    EAGAIN, EALREADY, EBADMSG, EBUSY, EDQUOT, EFAULT, EFBIG, EINTR, EINVAL, EIO, EMFILE, ENFILE, ENODEV, ENOENT, ENOMEM,
    ENOSPC, ENOSYS, ENXIO, ESTALE, EXDEV, errno,
)
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset, strcpy, strerror, strlen

from userswap.backends.cipher cimport (
    KEY_BYTES, cipher_key, cipher_lock_page, cipher_page, cipher_ready, cipher_wipe,
)
from userswap.backends.codec cimport (
    FOLIO_BYTES, PACKED_BYTES, PART_BYTES, PARTS, PackedPart, Worker, codec_choose, codec_compress, codec_decompress,
    codec_give, codec_hash, codec_keep, codec_pack_parts, codec_part, codec_replace, codec_size,
    codec_spread, codec_take, codec_update,
)
from userswap.backends.seal cimport (
    ALL_PARTS, RAW_LENGTH, SEAL_WHOLE, seal_length, seal_look, seal_moved, seal_object, seal_open, seal_open_raw,
    seal_place, seal_raw, seal_run, seal_slots, seal_stamp, seal_sums, seal_total, seal_update,
)
from userswap.backends.swapfile cimport (
    CLUSTER_SLOTS, IO_OPEN, SLOT_BYTES, SwapFile, iovec, swapfile_alloc, swapfile_clusters, swapfile_collect,
    swapfile_copy, swapfile_delete, swapfile_free, swapfile_metadata, swapfile_name, swapfile_new, swapfile_oldest,
    swapfile_owner, swapfile_punch, swapfile_read, swapfile_refused, swapfile_retire, swapfile_retired,
    swapfile_scatter, swapfile_seals, swapfile_set_owner, swapfile_slots, swapfile_take, swapfile_tidy,
    swapfile_used, swapfile_words, swapfile_write,
)
from userswap.backends.zswap cimport (
    zswap_alloc, zswap_bytes, zswap_churn, zswap_cold, zswap_coldest, zswap_compact, zswap_delete, zswap_free,
    zswap_memory,
    zswap_metadata, zswap_new, zswap_objects, zswap_owner, zswap_peek, zswap_resize, zswap_room, zswap_set_owner,
    zswap_set_owner_cold, zswap_stored,
)
from userswap.native.descriptors cimport FIRST_FD, descriptor_up
from userswap.native.mman cimport (
    MADV_DONTDUMP, MADV_DONTNEED, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.sum cimport sum_start
from userswap.native.us cimport (
    us_add, us_chaos, us_load, us_lock, us_now, us_read, us_store, us_trylock, us_unlock, us_write,
)
from userswap.swap.dedupe cimport DEDUPE_WAYS, dedupe_add, dedupe_close, dedupe_find, dedupe_open
from userswap.swap.entry cimport (
    SAME, SLOT, SLOT_RUN, ZSWAP, entry_make, entry_payload, entry_type, same_fits, same_make, same_value, slot_count,
    slot_device, slot_make, slot_offset, slot_raw,
)
from userswap.swap.holder cimport holder_release
from userswap.swap.kin cimport (
    KinSlots, kin_child, kin_deaths, kin_slots_any, kin_slots_bytes, kin_slots_clear, kin_slots_close, kin_slots_delete,
    kin_slots_held, kin_slots_new, kin_slots_open, kin_slots_orphaned, kin_slots_pass, kin_slots_show, kin_slots_top,
    kin_slots_word,
)
from userswap.swap.map cimport HolderOps, SwapMapOptions, swap_map_design

cdef extern from "us.h" nogil:
    """
    #include <fcntl.h>
    """
    enum:
        O_TMPFILE
        O_RDWR
        O_CLOEXEC
        O_DIRECT
    int open(const char* path, int flags, ...)
    int close(int fd)
    ssize_t write(int fd, const void* data, size_t n)

cdef enum:
    MOST_DEFERRED = 1 << 24
    DEFERRED_BYTES = MOST_DEFERRED * 16
    DEFERRED_BATCH = 4096
    DEFERRED_NS = 10000000

cdef enum:
    BOUNCE_LEAST = 131072
    TURN_SLOTS = 256            # slots that go to one file before it is the next one's turn: 1 MiB
    VAIN_BATCHES = 8
    DRAIN_LOOKS = 256           # clusters that one step of a swapoff passes
    TIDY_NS = 200000000         # between two clusters that are given back in part: every 10 ms cost 8 % of an update
    GAP_MOST = 32               # in what is read to be moved, slots
    HIGH_PERCENT = 90           # of a tier that has a slower one below: from there on it is crowded
    LOW_PERCENT = 80
    TAG_SHIFT = 54              # in the word that storage remembers: tiers that it may not be in
    TAG_RAW = 53
    TAG_SLOTS = 48              # and of a run of slots, how many, less one
    SAMPLE_EVERY = 1024         # swap-outs between samples of a region that compresses
    SAMPLE_AGAIN = 64           # and of one that did not
    BATCH = MOVE_RUNS           # most folios in one writeback: of a page each they still make 1 MiB
    RETRY_NS = 100000000        # a device that failed is tried again after this long
    READS = 2                   # times that a folio is read before it is lost
    RAW_SLOTS = FOLIO_BYTES // SLOT_BYTES   # of a raw folio whose seal is in RAM: one that fills them
    GAP_SLOTS = 12              # a request costs about as much as reading so many more

cdef int64_t ANY = <int64_t>1 << 62              # of priorities

cdef extern from *:
    """
    #define US_OWNER (1ull << 63 | 0xFFFFFFFFFFFFull)
    """
    const uint64_t OWNER "US_OWNER"     # what the map knows of a word that storage remembers


cdef SwapSpace* space_new(const char* design, uint64_t address_space, uint64_t slots_bytes, int64_t bounce,
                          const HolderOps* holders, void* ctx) noexcept nogil:
    cdef SwapSpace* s
    cdef SwapMapOptions options
    if swap_map_design(design) == NULL or sum_start() != 0:
        return NULL
    s = <SwapSpace*>calloc(1, sizeof(SwapSpace))
    if s == NULL:
        return NULL
    s.holders = holders
    s.holders_ctx = ctx
    s.bounce_bytes = bounce
    options.holders = holders
    options.ctx = ctx
    options.slots = slots_bytes // FOLIO_BYTES
    options.slot_run = FOLIO_BYTES // SLOT_BYTES
    s.map = swap_map_design(design).new(&options)
    s.zswap = zswap_new(address_space)
    if s.map == NULL or s.zswap == NULL:
        space_delete(s)
        return NULL
    return s


cdef char* buffer_of(SwapSpace* s) noexcept nogil:
    cdef void* p = mmap(NULL, s.bounce_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if p == MAP_FAILED:
        return NULL
    madvise(p, s.bounce_bytes, MADV_DONTDUMP)
    return <char*>p


# ---- places ----

cdef inline uint64_t remembered(SwapSpace* s, uint64_t id, uint64_t holder, uint32_t tiers) noexcept nogil:
    """What zswap shall remember of an object."""
    return (s.map.ops.owner(s.map, id, holder) & OWNER) | (<uint64_t>(~tiers & ALL_TIERS) << TAG_SHIFT)


cdef inline uint64_t tagged(uint64_t owner, int slots, bint raw) noexcept nogil:
    """The same of a run of slots."""
    return ((owner & ~(<uint64_t>63 << TAG_SLOTS)) | (<uint64_t>(slots - 1) << TAG_SLOTS)
            | (<uint64_t>raw << TAG_RAW))


cdef inline uint32_t allowed(uint64_t owner) noexcept nogil:
    """The tiers that it may be in."""
    return <uint32_t>(~(owner >> TAG_SHIFT)) & ALL_TIERS


cdef void set_slot_owner(SwapSpace* s, uint64_t entry, uint64_t owner) noexcept nogil:
    """From here on whoever empties the file can find it. The caller has the entry locked, or its holder."""
    if not s.map.ops.bound and not s.inherited[slot_device(entry)]:
        swapfile_set_owner(s.devices[slot_device(entry)], slot_offset(entry),
                           tagged(owner, slot_count(entry), slot_raw(entry)))


cdef void order_tiers(SwapSpace* s) noexcept nogil:
    """The places by priority; equal ones in the order of their numbers. With the gate closed."""
    cdef Tier* tier = NULL
    cdef int i, best
    cdef int64_t below = ANY
    cdef uint32_t crowded = 0
    for i in range(s.tier_count):
        if us_read(&s.tiers[i].crowded):
            crowded |= s.tiers[i].bit
    s.tier_count = 0
    while True:
        best = -1
        for i in range(MOST_DEVICES):
            if s.places[i].state == PLACE_ON and s.places[i].priority < below and (
                    best < 0 or s.places[i].priority > s.places[best].priority):
                best = i
        if best < 0 or s.tier_count == MOST_TIERS:
            return
        below = s.places[best].priority
        tier = &s.tiers[s.tier_count]
        s.tier_count += 1
        tier.priority = s.places[best].priority
        tier.bit = <uint32_t>1 << s.places[best].tier
        tier.count = 0
        us_write(&tier.turn, 0)
        us_write(&tier.crowded, crowded & tier.bit != 0)
        for i in range(MOST_DEVICES):
            if s.places[i].state == PLACE_ON and s.places[i].priority == tier.priority:
                tier.places[tier.count] = i
                tier.count += 1


cdef int free_number(SwapSpace* s) noexcept nogil:
    """Of a device; -1: all are taken."""
    cdef int i
    for i in range(MOST_DEVICES):
        if s.devices[i] == NULL:
            return i
    return -1


cdef void forget_ancestors(SwapSpace* s) noexcept nogil:
    """Files of ancestors that none of our ids refers to any more: others may have their numbers. With the gate closed,
    or alone."""
    cdef int i
    for i in range(MOST_DEVICES):
        if s.devices[i] != NULL and s.inherited[i] and us_read(&s.referred[i]) == 0:
            delete_device(s, i)


cdef int space_swapon(SwapSpace* s, SwapFile* device, uint64_t limit, int priority, uint32_t tier,
                      const char* directory) noexcept nogil:
    cdef Place* place
    cdef int i, number
    forget_ancestors(s)
    number = free_number(s)
    if s.map.ops.bound and (s.devices[0] != NULL or s.is_child):
        return -EINVAL
    for i in range(MOST_DEVICES):
        if s.places[i].state == PLACE_FREE:
            break
    else:
        return -EMFILE
    if number < 0:
        return -EMFILE
    if s.bounce == NULL:
        s.bounce = buffer_of(s)
    if s.incoming == NULL and not s.map.ops.bound:
        s.incoming = buffer_of(s)
    if s.bounce == NULL or (s.incoming == NULL and not s.map.ops.bound):
        return -ENOMEM
    place = &s.places[i]
    memset(place, 0, sizeof(Place))
    place.state = PLACE_ON
    place.device = number
    place.priority = priority
    place.tier = <int>tier
    place.limit = limit
    if strlen(directory) < DIRECTORY_BYTES:
        strcpy(place.directory, directory)
    take_number(s, number, device)
    order_tiers(s)
    us_write(&s.retry_at, 0)
    return i


cdef int space_encrypt(SwapSpace* s) noexcept nogil:
    if not cipher_ready():
        return -ENOSYS
    if s.keys == NULL:
        s.keys = cipher_page()
        if s.keys == NULL:
            return -ENOMEM
    s.encrypt = True
    return 0


cdef inline const char* key_of(SwapSpace* s, int device) noexcept nogil:
    return s.keys + device * KEY_BYTES if s.encrypted[device] else NULL


cdef void take_number(SwapSpace* s, int number, SwapFile* device) noexcept nogil:
    # Each file has a key of its own, from the moment it is opened: only this process writes to it.
    s.encrypted[number] = s.encrypt
    if s.encrypt and cipher_key(s.keys + number * KEY_BYTES) != 0:
        swapfile_retire(device)         # the system gives no random numbers: nothing is written there
    s.shared[number] = NULL
    s.inherited[number] = False
    us_write(&s.referred[number], 0)
    us_write(&s.kept[number], 0)
    us_write(&s.swept[number], 0)
    us_write(&s.bytes_read[number], 0)
    us_write(&s.bytes_written[number], 0)
    s.devices[number] = device


cdef int space_drain(SwapSpace* s, int place, bint on) noexcept nogil:
    if s.map.ops.bound:
        return -EINVAL
    if s.places[place].state == PLACE_FREE:
        return -ENOENT
    if s.places[place].state != (PLACE_ON if on else PLACE_DRAINING):
        return -EALREADY
    us_write(&s.places[place].state, PLACE_DRAINING if on else PLACE_ON)
    order_tiers(s)
    us_write(&s.retry_at, 0)
    return 0


cdef int64_t space_left(SwapSpace* s, int place) noexcept nogil:
    cdef int64_t device = us_read(&s.places[place].device)
    if s.places[place].state == PLACE_FREE or device < 0:
        return 0
    return (swapfile_used(s.devices[device]) - us_read(&s.kept[device])) * SLOT_BYTES


cdef int space_swapoff(SwapSpace* s, int place) noexcept nogil:
    cdef int device = <int>s.places[place].device
    cdef int64_t i, count
    if s.places[place].state != PLACE_DRAINING:
        return -ENOENT
    if space_left(s, place):
        return -EBUSY
    if device >= 0:
        # What we keep for other processes is theirs: they have the file open, and the last of them punches the holes.
        count = 0
        for i in range(us_read(&s.deferred_count)):
            if s.deferred[i].device != device:
                s.deferred[count] = s.deferred[i]
                count += 1
        us_write(&s.deferred_count, count)
        s.deferred_next = 0
        delete_device(s, device)
    us_write(&s.places[place].state, PLACE_FREE)
    order_tiers(s)
    madvise(s.incoming, s.bounce_bytes, MADV_DONTNEED)
    s.incoming_used = False
    return 0


cdef void sweep_orphan(SwapSpace* s, int device) noexcept nogil:
    """Gives back all blocks of a file whose owner is gone, but for the slots that somebody still refers to."""
    cdef KinSlots* t = s.shared[device]
    cdef SwapFile* f = s.devices[device]
    cdef int64_t hole = 0, at = 0, end = <int64_t>swapfile_slots(f)
    cdef uint64_t word, bits
    cdef int i
    for word in range(kin_slots_top(t)):
        bits = kin_slots_word(t, word)
        if bits == 0:
            continue
        for i in range(64):
            if (bits >> i) & 1:
                at = <int64_t>(word * 64) + i
                if at > hole and hole < end:
                    swapfile_punch(f, hole, (at if at < end else end) - hole)
                hole = at + 1
    if hole < end:
        swapfile_punch(f, hole, end - hole)


cdef void let_go(SwapSpace* s, int device, int64_t slot, int slots) noexcept nogil:
    """Slots of an ancestor's file that we refer to no more. If nobody gives them out any more, who is last punches."""
    cdef KinSlots* t = s.shared[device]
    cdef int64_t deaths
    us_add(&s.referred[device], -slots)     # at none the file may go, but not while anybody is in here
    if t == NULL:
        return
    kin_slots_clear(t, slot, slots)
    us_chaos()
    if not kin_slots_orphaned(t):
        return
    deaths = kin_deaths() + 1
    if us_read(&s.swept[device]) != deaths:
        # What only the dead referred to, nobody else will ever ask about.
        us_write(&s.swept[device], deaths)
        sweep_orphan(s, device)
    elif not kin_slots_held(t, slot, slots):
        swapfile_punch(s.devices[device], slot, slots)


cdef void delete_device(SwapSpace* s, int device) noexcept nogil:
    cdef KinSlots* t = s.shared[device]
    cdef bint discard = not s.inherited[device] and not s.untold
    if t != NULL:
        if not s.inherited[device]:
            kin_slots_close(t)
            discard = discard and not kin_slots_any(t)
        if not discard and not s.untold and kin_slots_orphaned(t):
            sweep_orphan(s, device)
        kin_slots_delete(t)
    swapfile_delete(s.devices[device], discard)
    s.devices[device] = NULL
    s.shared[device] = NULL


cdef void space_delete(SwapSpace* s) noexcept nogil:
    if s.map != NULL:
        s.map.ops.delete(s.map)
    if s.zswap != NULL:
        zswap_delete(s.zswap)
    dedupe_close(&s.dedupe)
    cdef int i
    for i in range(MOST_DEVICES):
        if s.devices[i] != NULL:
            delete_device(s, i)
    if s.deferred != NULL:
        munmap(s.deferred, DEFERRED_BYTES)
    if s.keys != NULL:
        cipher_wipe(s.keys)
    if s.bounce != NULL:
        munmap(s.bounce, s.bounce_bytes)
    if s.spare != NULL:
        munmap(s.spare, s.bounce_bytes)
    if s.incoming != NULL:
        munmap(s.incoming, s.bounce_bytes)
    free(s)


cdef bint same_filled(const uint64_t* words, int count) noexcept nogil:
    cdef uint64_t first = words[0]
    cdef uint64_t differs
    cdef int i = 0
    # most data is told apart by its last or middle word, at the price of two loads
    if words[count - 1] != first or words[count // 2] != first:
        return False
    while i < count:
        differs = ((words[i] ^ first) | (words[i + 1] ^ first) | (words[i + 2] ^ first) | (words[i + 3] ^ first)
                   | (words[i + 4] ^ first) | (words[i + 5] ^ first) | (words[i + 6] ^ first) | (words[i + 7] ^ first))
        if differs:
            return False
        i += 8
    return True


cdef int compress_for(Worker* worker, const void* data, int n, CodecHint* hint) noexcept nogil:
    """Packs data into worker.packed with the region's recipe, sampling again when it is due or went bad."""
    cdef int length, scaled
    if hint.recipe >= 0 and hint.left > 0:
        hint.left -= 1
        length = codec_compress(worker, hint.recipe, data, n)
        scaled = <int>(<int64_t>length * 65536 // n) if length > 0 else 65536
        if hint.expected == 0 or scaled <= hint.expected + hint.expected // 4:
            return length
        if hint.left > SAMPLE_AGAIN and hint.left <= SAMPLE_EVERY - SAMPLE_AGAIN:
            hint.left = 0               # the data changed its nature: sample, at most once in a while
        else:
            return length
    hint.recipe = codec_choose(worker, data, n)
    length = codec_compress(worker, hint.recipe, data, n)
    hint.expected = <int>(<int64_t>length * 65536 // n) if length > 0 else 0
    hint.left = SAMPLE_EVERY if length > 0 else SAMPLE_AGAIN
    return length


cdef inline bint may_write(SwapSpace* s, const Place* place) noexcept nogil:
    # Where ids are slots, those of a forked process are its parent's: a file of its own would be of no use.
    return place.state == PLACE_ON and (us_read(&place.device) >= 0
                                        or (place.directory[0] != 0 and not s.map.ops.bound))


cdef bint space_has_device(SwapSpace* s) noexcept nogil:
    cdef int i
    for i in range(s.tier_count):
        if may_write(s, &s.places[s.tiers[i].places[0]]):
            return True
    return False


cdef void device_retire(SwapSpace* s, int device, int error) noexcept nogil:
    """It failed: what is there stays, nothing more is stored there, and the user is told once."""
    cdef char[512] text
    cdef const char* reason = b"it does not return what was stored"
    cdef int n, kept = errno
    if device < 0 or s.devices[device] == NULL or not swapfile_retire(s.devices[device]):
        return
    if error not in (-EBADMSG, -ESTALE, -EXDEV):
        reason = strerror(-error)
    n = snprintf(text, sizeof(text),
                 "userswap: the swap file %s has failed (%s): nothing more is stored there. What is there is still "
                 "read; what can't be is not taken for data.\n", swapfile_name(s.devices[device]), reason)
    write(2, text, n if n < <int>sizeof(text) else <int>sizeof(text) - 1)
    (&errno)[0] = kept


cdef inline bint passing(int error) noexcept nogil:
    """No failure of the device: there may be room again, or time, or memory."""
    return error in (-ENOSPC, -EDQUOT, -EFBIG, -EINTR, -EAGAIN, -ENOMEM, -EFAULT, -EMFILE, -ENFILE)


cdef void device_failed(SwapSpace* s, Place* place, int error) noexcept nogil:
    """`place`: NULL: there is no room anywhere."""
    us_write(&s.device_error, -error)
    us_write(&place.retry_at if place != NULL else &s.retry_at, us_now() + RETRY_NS)
    if place != NULL and not passing(error):
        device_retire(s, <int>us_read(&place.device), error)


cdef inline bint rests(const int64_t* retry_at) noexcept nogil:
    return us_read(retry_at) != 0 and us_now() < us_read(retry_at)


cdef void open_own(SwapSpace* s, Place* place) noexcept nogil:
    """A forked process gets a nameless swap file of its own, beside its parent's, when it first needs one."""
    cdef SwapFile* device
    cdef int kept = errno
    cdef int fd, number
    us_lock(&s.open_lock)
    number = free_number(s)
    if us_read(&place.device) < 0 and number < 0:
        device_failed(s, place, -EMFILE)
    elif us_read(&place.device) < 0:
        fd = -1
        if not swapfile_refused(IO_OPEN):
            fd = open(place.directory, O_TMPFILE | O_RDWR | O_CLOEXEC | O_DIRECT, 0o600)
        if fd < 0 and errno == EINVAL:
            fd = open(place.directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0o600)
        fd = descriptor_up(fd, FIRST_FD)
        device = swapfile_new(fd, place.limit, place.directory) if fd >= 0 else NULL
        if device == NULL:
            device_failed(s, place, -ENOMEM if fd >= 0 else -errno)
            if fd >= 0:
                close(fd)
        else:
            take_number(s, number, device)
            us_write(&place.device, number)
    us_unlock(&s.open_lock)
    (&errno)[0] = kept


cdef int usable(SwapSpace* s, Place* place) noexcept nogil:
    """The number of the file that can be written to there, just now; -1: none can."""
    if not may_write(s, place) or rests(&place.retry_at):
        return -1
    if us_read(&place.device) < 0:
        open_own(s, place)
    return <int>us_read(&place.device)


cdef void end_slots(SwapSpace* s, int device, int64_t slot, int slots, uint64_t id) noexcept nogil:
    """Storage first: where an id is a slot, whoever gets the id takes the slot at once. id 0: it is gone already."""
    swapfile_free(s.devices[device], slot, slots)
    if not us_read(&s.untidy):
        us_write(&s.untidy, 1)
    us_chaos()
    if id:
        s.map.ops.free(s.map, id)


cdef void free_deferred(SwapSpace* s, bint now) noexcept nogil:
    """Of the slots that we freed while other processes referred to them, and their ids, those that none does any more.

    A batch at a time, and not often unless `now`; more only while it helps."""
    cdef Deferred* d
    cdef KinSlots* t
    cdef int64_t i, count, looked, freed, after = us_read(&s.deferred_count)
    if after == 0 or (not now and us_now() < us_read(&s.deferred_at)):
        return
    while True:
        us_lock(&s.deferred_lock)
        count = us_read(&s.deferred_count)
        i = s.deferred_next
        looked = 0
        freed = 0
        while looked < DEFERRED_BATCH and looked - freed < count and not s.untold:
            looked += 1
            if i >= count:
                i = 0
            d = &s.deferred[i]
            t = s.shared[d.device]
            if t == NULL or kin_slots_held(t, d.slot, d.slots):
                i += 1
                continue
            freed += 1
            count -= 1
            us_add(&s.kept[d.device], -d.slots)
            end_slots(s, d.device, d.slot, d.slots, <uint64_t>d.id)
            s.deferred[i] = s.deferred[count]
        s.deferred_next = i
        us_write(&s.deferred_count, count)
        if count == 0 and freed:
            madvise(s.deferred, DEFERRED_BYTES, MADV_DONTNEED)
        us_write(&s.deferred_at, us_now() + DEFERRED_NS)
        us_unlock(&s.deferred_lock)
        after -= looked
        if count == 0 or looked < DEFERRED_BATCH or (after <= 0 if now else freed < looked // 2):
            return


cdef int64_t alloc_slots(SwapSpace* s, int device, int n) noexcept nogil:
    """As swapfile_alloc; what was kept for others and need not be any more is room too."""
    cdef int64_t slot = swapfile_alloc(s.devices[device], n)
    if slot == -ENOSPC and us_read(&s.kept[device]):
        free_deferred(s, True)
        slot = swapfile_alloc(s.devices[device], n)
    return slot


cdef bint device_usable(SwapSpace* s) noexcept nogil:
    cdef int i, j
    cdef int64_t device
    free_deferred(s, False)     # before there is no room: who only allocates gives nothing back on the way
    if rests(&s.retry_at):
        return False
    for i in range(s.tier_count):
        for j in range(s.tiers[i].count):
            device = us_read(&s.places[s.tiers[i].places[j]].device)
            if device >= 0 and swapfile_retired(s.devices[device]):
                continue
            if may_write(s, &s.places[s.tiers[i].places[j]]):
                return True
    return False


cdef int64_t tier_slots(SwapSpace* s, const Tier* tier) noexcept nogil:
    cdef int64_t slots = 0
    cdef int i
    for i in range(tier.count):
        slots += <int64_t>(s.places[tier.places[i]].limit // SLOT_BYTES)
    return slots


cdef bint above(SwapSpace* s, const Tier* tier, int percent) noexcept nogil:
    """Whether more than this part of a tier is in use."""
    cdef int64_t used = 0, device
    cdef int i
    for i in range(tier.count):
        device = us_read(&s.places[tier.places[i]].device)
        if device >= 0:
            used += swapfile_used(s.devices[device])
    return used > tier_slots(s, tier) // 100 * percent


cdef Tier* faster_tier(SwapSpace* s, int device, uint32_t tiers) noexcept nogil:
    """The fastest of these tiers of swap files that has room, if one is faster than this device; NULL: there is none.
    What is full up to where demotion begins has no room, so nothing goes round."""
    cdef int t, i
    if s.inherited[device]:
        return NULL
    for t in range(s.tier_count):
        for i in range(s.tiers[t].count):
            if us_read(&s.places[s.tiers[t].places[i]].device) == device:
                return NULL
        if tiers & s.tiers[t].bit and not above(s, &s.tiers[t], HIGH_PERCENT):
            return &s.tiers[t]
    return NULL


cdef void close_packed(SwapSpace* s, int device, int64_t slot, char* run, int length,
                       const uint64_t* sums) noexcept nogil:
    """A packed folio at the start of what will be written to these slots."""
    cdef uint64_t stamp = seal_stamp()
    swapfile_seals(s.devices[device], slot)[0] = stamp
    seal_run(run, seal_slots(length), length, sums, seal_place(device, slot), stamp, key_of(s, device))


cdef void close_raw(SwapSpace* s, int device, int64_t slot, char* data, int n) noexcept nogil:
    """The same of a folio that is stored as it is, alone in RAW_SLOTS."""
    seal_raw(data, n, seal_place(device, slot), seal_stamp(), key_of(s, device),
             swapfile_seals(s.devices[device], slot))


cdef inline int raw_slots(int n) noexcept nogil:
    """Short ones have a trailer, as packed ones do: not as many slots, so not as many words in RAM."""
    return seal_slots(n) if seal_slots(n) < RAW_SLOTS else RAW_SLOTS


cdef inline int folio_slots(const Folio* folio) noexcept nogil:
    return raw_slots(folio.length) if folio.raw else seal_slots(folio.length)


cdef void close_run(SwapSpace* s, int device, int64_t slot, char* data, const Folio* folios, int count) noexcept nogil:
    """What is about to be written there, folio after folio."""
    cdef int i, slots
    for i in range(count):
        slots = folio_slots(&folios[i])
        if folios[i].raw and slots == RAW_SLOTS:
            close_raw(s, device, slot, data, folios[i].length)
        else:
            close_packed(s, device, slot, data, folios[i].length, folios[i].sums)
        slot += slots
        data += slots * SLOT_BYTES


cdef int open_raw(SwapSpace* s, uint64_t entry, char* data, int n, int part) noexcept nogil:
    cdef int device = slot_device(entry)
    return seal_open_raw(data, n, part, seal_place(device, slot_offset(entry)), key_of(s, device),
                         swapfile_seals(s.devices[device], slot_offset(entry)))


cdef int open_packed(SwapSpace* s, uint64_t entry, char* run, int parts, int* length, uint64_t* sums) noexcept nogil:
    cdef int device = slot_device(entry)
    return seal_open(run, slot_count(entry), seal_place(device, slot_offset(entry)),
                     swapfile_seals(s.devices[device], slot_offset(entry))[0], key_of(s, device), parts, length, sums)


cdef void open_again(SwapSpace* s, int device, int64_t slot, char* data, const Folio* folios, int count) noexcept nogil:
    """It could not be written: as it was before it was encrypted, for another device. (It was there a moment ago:
    whether that works is not asked, as whoever loads it finds out by the sums.)"""
    cdef uint64_t[PARTS] sums
    cdef uint64_t entry
    cdef int i, slots, length
    for i in range(count):
        slots = folio_slots(&folios[i])
        entry = slot_make(device, slot, slots, folios[i].raw)
        if folios[i].raw and slots == RAW_SLOTS:
            open_raw(s, entry, data, folios[i].length, -1)
        else:
            open_packed(s, entry, data, 0, &length, sums)
        slot += slots
        data += slots * SLOT_BYTES


cdef int write_to(SwapSpace* s, Place* place, char* data, int slots, const Folio* folios, int count,
                  int64_t* slot) noexcept nogil:
    """To one place: the number of its device, or -errno."""
    cdef int device = usable(s, place)
    cdef int error
    if device < 0:
        return -ENOSPC
    slot[0] = alloc_slots(s, device, slots)
    if slot[0] < 0:
        return <int>slot[0]
    us_chaos()
    close_run(s, device, slot[0], data, folios, count)
    error = swapfile_write(s.devices[device], slot[0], slots, data)
    if error == 0:
        us_add(&s.bytes_written[device], <int64_t>slots * SLOT_BYTES)
        us_write(&place.retry_at, 0)
        us_write(&s.retry_at, 0)
        us_write(&s.device_error, 0)
        return device
    if s.encrypted[device]:
        open_again(s, device, slot[0], data, folios, count)
    swapfile_free(s.devices[device], slot[0], slots)
    # A page that the program has just thrown away (EFAULT) is no fault of the device.
    if error != -EFAULT:
        device_failed(s, place, error)
    return error


cdef int run_write(SwapSpace* s, uint32_t tiers, int64_t below, char* data, const Folio* folios, int count, int* device,
                   int64_t* slot) noexcept nogil:
    """Seals folios that are in a row and stores them as one run of slots in a swap file: of these tiers, of a priority
    below this one. Higher priorities first, equal ones by turns; of one that is full, the next. 0, or -errno: -ENODEV
    if none may be used at all. What is behind a packed folio in its last slot is written over."""
    cdef int error = -ENODEV, slots = 0, got, first, i, t
    cdef Tier* tier
    for i in range(count):
        slots += folio_slots(&folios[i])
    for t in range(s.tier_count):
        tier = &s.tiers[t]
        if not tiers & tier.bit or tier.priority >= below:
            continue
        first = <int>((us_add(&tier.turn, slots) - 1) // TURN_SLOTS % tier.count)
        for i in range(tier.count):
            got = write_to(s, &s.places[tier.places[(first + i) % tier.count]], data, slots, folios, count, slot)
            if got >= 0:
                device[0] = got
                # Not at every write: it only has to be seen in time.
                if t + 1 < s.tier_count and not us_read(&tier.crowded) and above(s, tier, HIGH_PERCENT):
                    us_write(&tier.crowded, 1)
                return 0
            if got == -EFAULT:
                return got
            if error == -ENODEV or got != -ENOSPC:
                error = got
    return error


cdef int run_read(SwapSpace* s, uint64_t entry, char* buffer, int n, int part, int* length,
                  uint64_t* sums) noexcept nogil:
    """What a locked entry has in slots, verified, to an aligned buffer; what is not what it was is read once more.

    `part`: the only one that is wanted, or -1. Of a packed folio all is read, and `length` and `sums` say what it has;
    of a raw one the n bytes that are wanted are read. 0 or -errno (see backends/seal)."""
    cdef SwapFile* f = s.devices[slot_device(entry)]
    cdef int slots = slot_count(entry), tries = 0, error = -EIO
    cdef int64_t slot = slot_offset(entry)
    cdef bint in_ram = slot_raw(entry) and slots == RAW_SLOTS
    if f == NULL:
        return -ENXIO
    if in_ram:
        slots = n // SLOT_BYTES
        slot += part * slots if part > 0 else 0
        length[0] = n
    if slots * SLOT_BYTES > PACKED_BYTES:
        return -EIO
    while error and tries < READS:
        if tries:
            us_add(&s.reads_again, 1)
        tries += 1
        us_add(&s.bytes_read[slot_device(entry)], <int64_t>slots * SLOT_BYTES)
        error = swapfile_read(f, slot, slots, buffer)
        us_chaos()
        if error == 0 and in_ram:
            error = open_raw(s, entry, buffer, n, part)
        elif error == 0:
            error = open_packed(s, entry, buffer, 1 << part if part >= 0 else ALL_PARTS, length, sums)
    if error:
        us_add(&s.reads_lost, 1)
        us_store(&s.lost_at, entry)
        if not passing(error):
            device_retire(s, slot_device(entry), error)
    return error


cdef void free_slots(SwapSpace* s, uint64_t id, int device, int64_t slot, int slots) noexcept nogil:
    """Slots that an id had, and the id (0: that lives on). Not at once while another process refers to them; then, soon
    after none does. An id is kept with its slots only where it is a slot."""
    cdef int64_t count
    cdef bint bound = s.map.ops.bound
    if s.inherited[device]:
        let_go(s, device, slot, slots)
        if id:
            s.map.ops.free(s.map, id)
        return
    free_deferred(s, False)
    if not s.untold and (s.shared[device] == NULL or not kin_slots_held(s.shared[device], slot, slots)):
        end_slots(s, device, slot, slots, id)
        return
    if not bound:
        swapfile_set_owner(s.devices[device], slot, 0)      # its id ends, the run does not
    us_lock(&s.deferred_lock)
    us_add(&s.kept[device], slots)
    if s.deferred == NULL:
        s.deferred = <Deferred*>mmap(NULL, DEFERRED_BYTES, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if s.deferred == MAP_FAILED:
            s.deferred = NULL
    if s.deferred != NULL and us_read(&s.deferred_count) < MOST_DEFERRED:
        count = us_read(&s.deferred_count)
        s.deferred[count].slot = slot
        s.deferred[count].slots = <int16_t>slots
        s.deferred[count].device = <int16_t>device
        s.deferred[count].id = <int32_t>id if bound else 0
        us_write(&s.deferred_count, count + 1)
    # else the slots stay taken until the pool ends: space on disk is lost, never data
    us_unlock(&s.deferred_lock)
    if id and not bound:
        s.map.ops.free(s.map, id)


cdef void stored_in_slots(SwapSpace* s, int slots) noexcept nogil:
    us_add(&s.writebacks, 1)
    us_add(&s.slot_stored, <int64_t>slots * SLOT_BYTES)


cdef int write_at_home(SwapSpace* s, uint64_t home, char* data, int n) noexcept nogil:
    """What is at home is not packed, as in Linux. On failure the slots are free again."""
    cdef int error
    swapfile_take(s.devices[0], slot_offset(home), slot_count(home))
    close_raw(s, 0, slot_offset(home), data, n)
    error = swapfile_write(s.devices[0], slot_offset(home), n // SLOT_BYTES, data)
    if error:
        swapfile_free(s.devices[0], slot_offset(home), slot_count(home))
    else:
        us_write(&s.device_error, 0)
        us_write(&s.retry_at, 0)
        us_add(&s.bytes_written[0], n)
        stored_in_slots(s, slot_count(home))
    return error


cdef uint64_t store_at_home(SwapSpace* s, char* data, int n, uint64_t holder, int* error) noexcept nogil:
    """In the slot that the id is, for maps whose ids are slots: the id."""
    cdef uint64_t id
    cdef uint64_t ignored = 0
    if not device_usable(s):
        error[0] = -ENOSPC if space_has_device(s) else -ENODEV
        return 0
    id = s.map.ops.alloc(s.map, slot_make(0, 0, 1, True), holder)
    if id == 0 and us_read(&s.deferred_count):
        free_deferred(s, True)
        id = s.map.ops.alloc(s.map, slot_make(0, 0, 1, True), holder)
    if id == 0:
        error[0] = -ENOSPC
        return 0
    error[0] = write_at_home(s, s.map.ops.home(s.map, id), data, n)
    if error[0] != 0:
        device_failed(s, &s.places[0] if error[0] != -ENOSPC else NULL, error[0])
        s.map.ops.put(s.map, id, 1, &ignored)
        s.map.ops.free(s.map, id)
        return 0
    return id


cdef uint64_t store_in_slots(SwapSpace* s, uint32_t tiers, char* data, int length, const uint64_t* sums, bint raw,
                             int* error) noexcept nogil:
    """In a run of slots of its own, from a buffer that has room for a trailer: the entry."""
    cdef Folio folio
    cdef int device = 0
    cdef int64_t slot = 0
    if not device_usable(s):
        error[0] = -ENOSPC if space_has_device(s) else -ENODEV
        return 0
    folio.length = length
    folio.raw = raw
    memcpy(folio.sums, sums, sizeof(folio.sums))
    if raw:
        memset(data + length, 0, raw_slots(length) * SLOT_BYTES - length)
    error[0] = run_write(s, tiers, ANY, data, &folio, 1, &device, &slot)
    if error[0] == -ENOSPC:
        device_failed(s, NULL, error[0])
    if error[0] != 0:
        return 0
    stored_in_slots(s, folio_slots(&folio))
    return slot_make(device, slot, folio_slots(&folio), raw)


# ---- identical folios ----

cdef int space_dedupe(SwapSpace* s, int64_t limit) noexcept nogil:
    return dedupe_open(&s.dedupe, limit) if codec_hash(s, 8) else 0


cdef uint32_t tiers_of(SwapSpace* s, uint64_t entry) noexcept nogil:
    """Where what a locked entry says may be."""
    if entry_type(entry) == ZSWAP:
        return allowed(zswap_owner(s.zswap, entry_payload(entry)))
    if entry_type(entry) == SLOT and not s.inherited[slot_device(entry)] and not s.map.ops.bound:
        return allowed(swapfile_owner(s.devices[slot_device(entry)], slot_offset(entry)))
    return ALL_TIERS


cdef bint stored_alike(SwapSpace* s, Worker* worker, uint64_t entry, const void* bytes, int length,
                       bint raw, uint32_t tiers) noexcept nogil:
    """Whether a locked entry's storage holds exactly these bytes, packed ones, or a folio as it is; and whoever reads
    it later will get them, as its seal is good; for the same tiers."""
    cdef uint32_t total
    cdef const char* memory
    cdef int n = 0
    cdef uint64_t[PARTS] sums
    if tiers_of(s, entry) != tiers:
        return False
    if entry_type(entry) == ZSWAP and not raw:
        memory = zswap_memory(s.zswap, entry_payload(entry), &total)
        return (total == <uint32_t>seal_total(length) and memcmp(memory, bytes, length) == 0
                and seal_look(memory, total, entry_payload(entry), ALL_PARTS, &n, NULL) == 0)
    if entry_type(entry) == SLOT and slot_raw(entry) == raw:
        # A home is as large as a folio can be, whatever is in it; any other run says how long its folio is.
        if slot_count(entry) != (raw_slots(length) if raw else seal_slots(length)) and not s.map.ops.bound:
            return False
        if slot_count(entry) * SLOT_BYTES > FOLIO_BYTES:
            return False
        # Reading it back is cheaper than writing it once more, and a damaged one is just not alike.
        return (run_read(s, entry, worker.folio, length, -1, &n, sums) == 0 and n == length
                and memcmp(worker.folio, bytes, length) == 0)
    return False


cdef uint64_t share(SwapSpace* s, Worker* worker, uint64_t hash, uint64_t holder, const void* bytes, int length,
                    bint raw, uint32_t tiers) noexcept nogil:
    """An id that holds these bytes already, with a reference more; 0: none is known."""
    cdef uint64_t[DEDUPE_WAYS] candidates
    cdef int i, count = dedupe_find(&s.dedupe, hash, candidates)
    cdef uint64_t id, entry
    cdef bint alike
    for i in range(count):
        # Whoever holds it keeps it while its word is ours; a holder that somebody is at is not waited for.
        id = s.holders.trylock(s.holders_ctx, candidates[i], 0) if candidates[i] != holder else 0
        alike = False
        if id:
            us_chaos()
            entry = s.map.ops.lock(s.map, id)
            alike = stored_alike(s, worker, entry, bytes, length, raw, tiers)
            id = s.map.ops.unlock(s.map, id, entry)
            alike = alike and swap_dup(s, &id, candidates[i]) == 0
            holder_release(<uint64_t*>candidates[i], id)
        if alike:
            us_add(&s.dedupe.shared, 1)
            us_add(&s.dedupe.bytes_saved, length)
            return id
        us_add(&s.dedupe.refused, 1)
    return 0


# ---- swap-out ----

# What one folio needs to be stored, filled in on the way.
cdef struct Leaving:
    uint64_t id                 # of an identical folio, or where the map's slot is the place
    uint64_t entry              # where it is stored now, and has no id yet
    uint64_t hash               # 0: not to be found again
    bint raw                    # does not compress, and is not stored yet
    int packed                  # packed so long, in worker.packed, and is not stored yet
    uint64_t[PARTS] sums        # of that
    int error


cdef void store_packed(SwapSpace* s, const char* packed, int length, const uint64_t* sums,
                       Leaving* leaving) noexcept nogil:
    """In zswap, if that has address space for it."""
    cdef uint32_t ignored
    cdef char* object
    cdef uint64_t handle = zswap_alloc(s.zswap, seal_total(length), 0)
    if handle:
        object = zswap_memory(s.zswap, handle, &ignored)
        memcpy(object, packed, length)
        seal_object(object, length, sums, handle)
        leaving.entry = entry_make(ZSWAP, handle)


cdef void store(SwapSpace* s, Worker* worker, const void* data, int n, CodecHint* hint, uint64_t holder,
                Leaving* leaving) noexcept nogil:
    """Finds a place for a folio's bytes: same-filled, an identical folio's, zswap. What doesn't compress stays raw."""
    cdef const uint64_t* words = <const uint64_t*>data
    cdef const void* stored
    cdef int length, size
    memset(leaving, 0, sizeof(Leaving))
    if same_filled(words, n // 8) and same_fits(words[0]):
        leaving.entry = same_make(words[0])
        us_add(&s.same_filled, 1)
        return
    length = compress_for(worker, data, n, hint)
    leaving.raw = length <= 0
    if s.dedupe.words != NULL:
        stored = data if leaving.raw else worker.packed
        size = n if leaving.raw else length
        leaving.hash = codec_hash(stored, size)
        leaving.id = share(s, worker, leaving.hash, holder, stored, size, leaving.raw, hint.tiers)
        if leaving.id:
            leaving.raw = False
            leaving.hash = 0
            return
    if leaving.raw:
        return
    seal_sums(worker.packed, length, leaving.sums)
    if not hint.tiers & TIER_ZSWAP and not s.map.ops.bound:
        leaving.packed = length         # straight to a file, with its neighbours if they go together
        return
    store_packed(s, worker.packed, length, leaving.sums, leaving)
    if leaving.entry == 0:
        # No address space in the pool.
        leaving.raw = s.map.ops.bound
        if not leaving.raw:
            leaving.entry = store_in_slots(s, hint.tiers, worker.packed, length, leaving.sums, False,
                                           &leaving.error)


cdef void store_raw(SwapSpace* s, Worker* worker, const void* data, int n, uint32_t tiers, uint64_t holder,
                    Leaving* leaving) noexcept nogil:
    """One folio that does not compress. RAM would not be saved by keeping it in zswap."""
    memcpy(worker.packed, data, n)      # aligned for O_DIRECT, and a page that is missing faults here
    if s.map.ops.bound:
        leaving.id = store_at_home(s, worker.packed, n, holder, &leaving.error)
    else:
        if n < FOLIO_BYTES:
            seal_sums(worker.packed, n, leaving.sums)
        leaving.entry = store_in_slots(s, tiers, worker.packed, n, leaving.sums, True, &leaving.error)


cdef char* take_buffer(SwapSpace* s) noexcept nogil:
    """A buffer of `bounce_bytes` to gather in, until it is given back; NULL: none is free, or there was no file yet."""
    if s.bounce == NULL:
        return NULL
    if us_trylock(&s.writeback_lock):
        return s.bounce
    if not us_trylock(&s.spare_lock):
        return NULL
    if s.spare == NULL:
        s.spare = buffer_of(s)
        if s.spare == NULL:
            us_unlock(&s.spare_lock)
            return NULL
        us_write(&s.spare_bytes, s.bounce_bytes)
    return s.spare


cdef void give_buffer(SwapSpace* s, char* buffer) noexcept nogil:
    us_unlock(&s.writeback_lock if buffer == s.bounce else &s.spare_lock)


cdef bint store_raw_run(SwapSpace* s, const void* data, int count, uint32_t tiers, Leaving* leaving) noexcept nogil:
    """Whole folios in a row that do not compress: one write, from where they are. False: they go one by one."""
    cdef Folio[RUN_FOLIOS] folios
    cdef char* buffer
    cdef int64_t slot = 0
    cdef int i, device = 0, error
    if s.map.ops.bound or not device_usable(s):
        return False
    for i in range(count):
        folios[i].raw = True
        folios[i].length = FOLIO_BYTES
    if s.encrypt:
        # Not where the program's memory is, or may be again: in a buffer, if there is one that nobody gathers in now.
        buffer = take_buffer(s) if count * FOLIO_BYTES <= s.bounce_bytes else NULL
        if buffer == NULL:
            return False
        memcpy(buffer, data, count * FOLIO_BYTES)
        error = run_write(s, tiers, ANY, buffer, folios, count, &device, &slot)
        give_buffer(s, buffer)
    else:
        # The kernel can't fault on a page that the program threw away meanwhile: EFAULT, and one by one they are
        # mended.
        error = run_write(s, tiers, ANY, <char*>data, folios, count, &device, &slot)
    if error:
        return False
    for i in range(count):
        leaving[i].entry = slot_make(device, slot + i * RAW_SLOTS, RAW_SLOTS, True)
        stored_in_slots(s, RAW_SLOTS)
    return True


cdef void write_gathered(SwapSpace* s, uint32_t tiers, char* buffer, Leaving* leaving, const int* which,
                         int count) noexcept nogil:
    """Packed folios that are in `buffer`, one behind the other: to one run of slots."""
    cdef Folio[RUN_FOLIOS] folios
    cdef int device = 0, i, error
    cdef int64_t slot = 0
    cdef Leaving* one
    for i in range(count):
        folios[i].raw = False
        folios[i].length = leaving[which[i]].packed
        memcpy(folios[i].sums, leaving[which[i]].sums, sizeof(folios[i].sums))
    error = run_write(s, tiers, ANY, buffer, folios, count, &device, &slot)
    for i in range(count):
        one = &leaving[which[i]]
        if error:
            one.error = error
            continue
        one.entry = slot_make(device, slot, folio_slots(&folios[i]), False)
        slot += slot_count(one.entry)
        stored_in_slots(s, slot_count(one.entry))


cdef int gather(SwapSpace* s, Worker* worker, uint32_t tiers, char* buffer, Leaving* leaving, int i, int* which,
                int count, int64_t* bytes) noexcept nogil:
    """Folio i is in worker.packed and goes to a file: with the others that are gathered in `buffer`, if it has room
    there. How many are gathered now."""
    cdef int64_t needed = seal_slots(leaving[i].packed) * SLOT_BYTES
    if bytes[0] + needed > s.bounce_bytes:
        write_gathered(s, tiers, buffer, leaving, which, count)
        bytes[0] = 0
        count = 0
    memcpy(buffer + bytes[0], worker.packed, leaving[i].packed)
    bytes[0] += needed
    which[count] = i
    return count + 1


cdef void unstore(SwapSpace* s, uint64_t entry) noexcept nogil:
    """There is no id for it: gives the storage back."""
    if entry_type(entry) == ZSWAP:
        zswap_free(s.zswap, entry_payload(entry))
    elif entry_type(entry) == SLOT:
        us_add(&s.slot_stored, -<int64_t>slot_count(entry) * SLOT_BYTES)
        swapfile_free(s.devices[slot_device(entry)], slot_offset(entry), slot_count(entry))


cdef void publish(SwapSpace* s, Leaving* leaving, int count, uint32_t cold, uint32_t tiers, uint64_t holder,
                  uint64_t* ids) noexcept nogil:
    """Ids for `count` stored folios in a row: together if the map can."""
    cdef uint64_t[RUN_FOLIOS] entries
    cdef uint64_t owner
    cdef int i
    for i in range(count):
        entries[i] = leaving[i].entry
    if count > 1 and s.map.ops.alloc_run(s.map, entries, holder, count, ids):
        us_add(&s.runs, 1)
    else:
        for i in range(count):
            ids[i] = s.map.ops.alloc(s.map, entries[i], holder + <uint64_t>i * 8)
    us_chaos()
    for i in range(count):
        if ids[i] == 0:
            leaving[i].error = -ENOSPC if s.map.ops.bound else -ENOMEM
            unstore(s, entries[i])
            continue
        # From here on it may be moved, if the map lets its storage in while the holder is locked.
        owner = remembered(s, ids[i], holder + <uint64_t>i * 8, tiers)
        if entry_type(entries[i]) == SLOT:
            set_slot_owner(s, entries[i], owner)
        elif entry_type(entries[i]) == ZSWAP:
            if (cold >> i) & 1 or s.newest_first:
                zswap_set_owner_cold(s.zswap, entry_payload(entries[i]), owner)
            else:
                zswap_set_owner(s.zswap, entry_payload(entries[i]), owner)


cdef void swap_out_run(SwapSpace* s, Worker* worker, const void* data, int count, int n, CodecHint* hint,
                       uint64_t holder, uint32_t cold, uint64_t* ids, int* error) noexcept nogil:
    cdef Leaving[RUN_FOLIOS] leaving
    cdef int[RUN_FOLIOS] which
    cdef const char* bytes = <const char*>data
    cdef int i, first, last, whole, gathered = 0
    cdef int64_t room = 0
    # Where there is no buffer left each of them is a write of its own.
    cdef char* buffer = NULL
    if not hint.tiers & TIER_ZSWAP and count > 1 and device_usable(s):
        buffer = take_buffer(s)
    for i in range(count):
        store(s, worker, bytes + i * FOLIO_BYTES, n if i == count - 1 else FOLIO_BYTES, hint,
              holder + <uint64_t>i * 8, &leaving[i])
        ids[i] = leaving[i].id
        if leaving[i].packed and buffer != NULL:
            gathered = gather(s, worker, hint.tiers, buffer, leaving, i, which, gathered, &room)
        elif leaving[i].packed:
            leaving[i].entry = store_in_slots(s, hint.tiers, worker.packed, leaving[i].packed, leaving[i].sums,
                                              False, &leaving[i].error)
    if gathered:
        write_gathered(s, hint.tiers, buffer, leaving, which, gathered)
    if buffer != NULL:
        give_buffer(s, buffer)
    last = 0
    while last < count:
        first = last
        while last < count and leaving[last].raw:
            last += 1
        # The last folio may be a short one: that goes alone.
        whole = last - first - (last > first and last == count and n < FOLIO_BYTES)
        if whole > 1 and store_raw_run(s, bytes + first * FOLIO_BYTES, whole, hint.tiers, &leaving[first]):
            first += whole
        for i in range(first, last):
            store_raw(s, worker, bytes + i * FOLIO_BYTES, n if i == count - 1 else FOLIO_BYTES, hint.tiers,
                      holder + <uint64_t>i * 8, &leaving[i])
            ids[i] = leaving[i].id
        last += 1                       # no raw one: it ended the run
    last = 0
    while last < count:
        first = last
        while last < count and leaving[last].entry:
            last += 1
        if last > first:
            publish(s, &leaving[first], last - first, cold >> first, hint.tiers, holder + <uint64_t>first * 8,
                    &ids[first])
        else:
            last += 1
    for i in range(count):
        if ids[i]:
            us_add(&s.swap_outs, 1)
            if leaving[i].hash:
                dedupe_add(&s.dedupe, leaving[i].hash, holder + <uint64_t>i * 8)
        elif leaving[i].error:
            error[0] = leaving[i].error


cdef uint64_t swap_out(SwapSpace* s, Worker* worker, const void* data, int n, CodecHint* hint, uint64_t holder,
                       int* error) noexcept nogil:
    cdef uint64_t id
    error[0] = 0
    swap_out_run(s, worker, data, 1, n, hint, holder, 0, &id, error)
    return id


cdef uint64_t swap_out_parts(SwapSpace* s, Worker* worker, uint64_t id, const void* const* parts, CodecHint* hint,
                             uint64_t holder, bint cold, bint* updated) noexcept nogil:
    cdef Leaving leaving
    cdef PackedPart[PARTS] fresh
    cdef uint64_t entry, stored = 0
    cdef char* packed
    cdef uint32_t total
    cdef uint64_t[PARTS] sums
    cdef int i, before = 0, length = 0, room = 0, kept = ALL_PARTS
    updated[0] = False
    if hint.recipe < 0:
        return 0
    codec_pack_parts(worker, hint.recipe, parts, fresh)
    for i in range(PARTS):
        kept &= ~(<int>(fresh[i].data != NULL) << i)
    entry = s.map.ops.lock(s.map, id)
    if entry_type(entry) == ZSWAP:
        packed = zswap_memory(s.zswap, entry_payload(entry), &total)
        # Nobody else reads an id that has no other holder, nor can it get one while that word is the caller's.
        us_chaos()
        # One sum for all of it would make damage of what is kept good.
        if (s.map.ops.count(s.map, id) == 1
                and seal_look(packed, total, entry_payload(entry), 0 if total >= SEAL_WHOLE + 40 else ALL_PARTS,
                              &before, sums) == 0):
            updated[0] = codec_update(packed, before, fresh)
            if updated[0]:
                seal_update(packed, before, sums, ALL_PARTS & ~kept)
                seal_object(packed, before, sums, entry_payload(entry))
        if not updated[0] and seal_look(packed, total, entry_payload(entry), kept, &before, sums) == 0:
            length = codec_replace(worker, hint.recipe, packed, before, fresh)
        if length > 0:
            room = seal_length(<int>zswap_room(seal_total(length)))
            codec_spread(worker, length, room)
            seal_sums(worker.packed, room, worker.sums)
            us_chaos()
            if s.map.ops.count(s.map, id) == 1 and zswap_resize(s.zswap, entry_payload(entry), seal_total(room)):
                memcpy(packed, worker.packed, room)
                seal_object(packed, room, worker.sums, entry_payload(entry))
                updated[0] = True
        if updated[0] and cold:
            # While it is locked: after that it may be somewhere else, and another object where it was.
            zswap_set_owner_cold(s.zswap, entry_payload(entry), remembered(s, id, holder, hint.tiers))
    s.map.ops.unlock(s.map, id, entry)
    us_chaos()
    if updated[0]:
        stored = id
        us_add(&s.part_updates, 1)
    elif length > 0:
        memset(&leaving, 0, sizeof(leaving))
        store_packed(s, worker.packed, room, worker.sums, &leaving)
        if leaving.entry:
            publish(s, &leaving, 1, cold, hint.tiers, holder, &stored)
    for i in range(PARTS):
        us_add(&s.part_outs, stored != 0 and parts[i] != NULL)
    return stored


cdef int object_good(SwapSpace* s, uint64_t entry, const char* packed, int total, int parts,
                     int* length) noexcept nogil:
    cdef int error = seal_look(packed, total, entry_payload(entry), parts, length, NULL)
    if error:
        us_add(&s.reads_lost, 1)
        us_store(&s.lost_at, entry)
    return error


cdef void space_lost_at(SwapSpace* s, int error, char* text, int n) noexcept nogil:
    cdef uint64_t entry = us_load(&s.lost_at)
    cdef const char* reason = b"what is there is not what was stored, bytes have changed"
    cdef SwapFile* f = NULL
    if error == -ESTALE:
        reason = b"what is there is older than what was stored, a write was lost"
    elif error == -EXDEV:
        reason = b"what is there was stored for another place, a write or this read went astray"
    elif error != -EBADMSG:
        reason = strerror(-error)
    if entry_type(entry) == SLOT:
        f = s.devices[slot_device(entry)]
    if f != NULL:
        snprintf(text, n, "%s: %s (slot %llu)", swapfile_name(f), reason, <unsigned long long>slot_offset(entry))
    else:
        snprintf(text, n, "zswap: %s", reason)


cdef int load_entry(SwapSpace* s, Worker* worker, uint64_t entry, void* data, int n) noexcept nogil:
    """The bytes behind an entry that the caller has locked."""
    cdef int type = entry_type(entry)
    cdef uint32_t total
    cdef const char* packed
    cdef uint64_t value
    cdef uint64_t* words
    cdef int i, error, length = 0
    worker.loaded = 0
    if type == ZSWAP:
        packed = zswap_memory(s.zswap, entry_payload(entry), &total)
        error = object_good(s, entry, packed, total, ALL_PARTS, &length)
        return codec_decompress(worker, packed, length, data, n) if error == 0 else error
    if type == SAME:
        value = same_value(entry)
        words = <uint64_t*>data
        for i in range(n // 8):
            words[i] = value
        return 0
    if type == SLOT:
        # a home is as large as a folio can be; what is in it may be a smaller one
        if slot_raw(entry) and raw_slots(n) != slot_count(entry) and not s.map.ops.bound:
            return -EIO
        error = run_read(s, entry, worker.packed, n, -1, &length, worker.sums)
        if error:
            return error
        if slot_raw(entry) and length != n:
            return -EIO
        worker.loaded = length
        worker.source = entry
        if not slot_raw(entry):
            return codec_decompress(worker, worker.packed, length, data, n)
        memcpy(data, worker.packed, n)
        return 0
    return -EIO


cdef int swap_in(SwapSpace* s, Worker* worker, uint64_t id, void* data, int n, uint64_t folio) noexcept nogil:
    cdef uint64_t entry = s.map.ops.lock(s.map, id)
    cdef int error
    us_chaos()
    error = load_entry(s, worker, entry, data, n)
    if error == 0 and folio and s.map.ops.count(s.map, id) > 1:
        s.map.ops.cache(s.map, id, folio)       # no memory: then it is not in the swap cache, that is all
    s.map.ops.unlock(s.map, id, entry)
    if error == 0:
        us_add(&s.swap_ins, 1)
    return error


cdef int swap_in_part(SwapSpace* s, Worker* worker, uint64_t id, int part, void* data) noexcept nogil:
    cdef uint64_t entry = s.map.ops.lock(s.map, id)
    cdef uint32_t total
    cdef const char* packed
    cdef int error = 0, length = 0
    us_chaos()
    worker.loaded = 0
    if entry_type(entry) == ZSWAP:
        packed = zswap_memory(s.zswap, entry_payload(entry), &total)
        error = object_good(s, entry, packed, total, 1 << part, &length)
        if error == 0:
            error = codec_part(worker, packed, length, part, data)
    elif entry_type(entry) == SAME:
        error = load_entry(s, worker, entry, data, PART_BYTES)
    elif entry_type(entry) != SLOT or (slot_raw(entry) and slot_count(entry) != RAW_SLOTS):
        error = -EIO
    else:
        error = run_read(s, entry, worker.packed, PART_BYTES, part, &length, worker.sums)
        if error == 0 and slot_raw(entry):
            memcpy(data, worker.packed, PART_BYTES)
        elif error == 0:
            worker.loaded = length
            worker.source = entry
            error = codec_part(worker, worker.packed, length, part, data)
    s.map.ops.unlock(s.map, id, entry)
    if error == 0:
        us_add(&s.part_ins, 1)
    return error


cdef uint64_t store_faster(SwapSpace* s, Worker* worker, uint32_t tiers, bint raw) noexcept nogil:
    """What was just loaded, to a faster file than the one that it came from: the entry; 0: it stays where it is, which
    is no failure."""
    cdef Folio folio
    cdef int device = 0, length = worker.loaded
    cdef int64_t slot = 0
    cdef Tier* tier = faster_tier(s, slot_device(worker.source), tiers)
    if tier == NULL or (raw and raw_slots(length) != slot_count(worker.source)):
        return 0
    folio.length = length
    folio.raw = raw
    memcpy(folio.sums, worker.sums, sizeof(folio.sums))
    if raw:
        memset(worker.packed + length, 0, raw_slots(length) * SLOT_BYTES - length)
    if run_write(s, tier.bit, ANY, worker.packed, &folio, 1, &device, &slot) != 0:
        return 0
    us_add(&s.slot_stored, <int64_t>folio_slots(&folio) * SLOT_BYTES)
    return slot_make(device, slot, folio_slots(&folio), raw)


cdef uint64_t swap_promote(SwapSpace* s, Worker* worker, uint64_t id, uint32_t tiers, uint64_t holder) noexcept nogil:
    cdef Leaving leaving
    cdef uint64_t entry
    cdef bint raw = slot_raw(worker.source)
    if worker.loaded == 0 or s.map.ops.bound or s.newest_first:
        return id
    memset(&leaving, 0, sizeof(leaving))
    # With the sums that it had in the file, of which only those are verified that were wanted.
    if tiers & TIER_ZSWAP and not raw:
        store_packed(s, worker.packed, worker.loaded, worker.sums, &leaving)
    else:
        leaving.entry = store_faster(s, worker, tiers, raw)
    worker.loaded = 0           # what was there may be encrypted now
    if leaving.entry == 0:
        return id
    us_chaos()
    entry = s.map.ops.lock(s.map, id)
    # Another holder was faster, or a swapoff or a demotion was at it. (Should it be back in the same slots by now it
    # is the same data: who holds an id holds what it stands for.)
    if entry_type(entry) != SLOT or entry != worker.source:
        s.map.ops.unlock(s.map, id, entry)
        unstore(s, leaving.entry)
        return id
    id = s.map.ops.unlock(s.map, id, leaving.entry)
    us_chaos()
    if entry_type(leaving.entry) == ZSWAP:
        zswap_set_owner(s.zswap, entry_payload(leaving.entry), remembered(s, id, holder, tiers))
    else:
        set_slot_owner(s, leaving.entry, remembered(s, id, holder, tiers))
    us_add(&s.slot_stored, -<int64_t>slot_count(entry) * SLOT_BYTES)
    us_add(&s.promotions, 1)
    free_slots(s, 0, slot_device(entry), slot_offset(entry), slot_count(entry))
    return id


cdef int64_t swap_better(SwapSpace* s, const Worker* worker, uint32_t tiers) noexcept nogil:
    cdef Tier* tier
    if worker.loaded == 0 or s.map.ops.bound or s.newest_first:
        return 0
    if tiers & TIER_ZSWAP and not slot_raw(worker.source):
        return space_packed(s)
    tier = faster_tier(s, slot_device(worker.source), tiers)
    return tier_slots(s, tier) // RAW_SLOTS if tier != NULL else 0


cdef bint swap_far(SwapSpace* s, uint64_t id) noexcept nogil:
    cdef uint64_t entry = s.map.ops.lock(s.map, id)
    s.map.ops.unlock(s.map, id, entry)
    return entry_type(entry) == SLOT


cdef int read_row(SwapSpace* s, const uint64_t* entries, const uint8_t* order, int count, char* frames,
                  char* scrap) noexcept nogil:
    """As many of these locked entries, which are in the order of their slots, as one request should read: how many. The
    sign says whether it did."""
    cdef iovec[2 * FETCH_MOST] parts
    cdef uint64_t entry = entries[order[0]]
    cdef int device = slot_device(entry)
    cdef int64_t start = slot_offset(entry), end = start, gap
    cdef int i, n = 0
    for i in range(count):
        entry = entries[order[i]]
        gap = slot_offset(entry) - end
        if slot_device(entry) != device or gap > GAP_SLOTS:
            count = i
            break
        if gap:
            parts[n].iov_base = scrap
            parts[n].iov_len = gap * SLOT_BYTES
            n += 1
        parts[n].iov_base = frames + <uint64_t>order[i] * FOLIO_BYTES
        parts[n].iov_len = slot_count(entry) * SLOT_BYTES
        end = slot_offset(entry) + slot_count(entry)
        n += 1
    us_chaos()
    us_add(&s.bytes_read[device], (end - start) * SLOT_BYTES)
    return count if swapfile_scatter(s.devices[device], start, parts, n) else -count


cdef void swap_fetch(SwapSpace* s, const uint64_t* ids, int n, char* frames, char* scrap,
                     uint64_t* entries) noexcept nogil:
    cdef uint8_t[FETCH_MOST] order
    cdef uint64_t[FETCH_MOST] locked
    cdef int i, at, taken, count = 0
    cdef uint64_t entry
    for i in range(n):
        entries[i] = 0
        if ids[i] == 0 or swap_shared(s, ids[i]):
            continue
        entry = s.map.ops.lock(s.map, ids[i])
        if (entry_type(entry) != SLOT or s.devices[slot_device(entry)] == NULL
                or slot_count(entry) * SLOT_BYTES > FOLIO_BYTES):
            s.map.ops.unlock(s.map, ids[i], entry)
            continue
        locked[i] = entry
        at = count
        while at and (slot_device(locked[order[at - 1]]) > slot_device(entry)
                      or (slot_device(locked[order[at - 1]]) == slot_device(entry)
                          and slot_offset(locked[order[at - 1]]) > slot_offset(entry))):
            order[at] = order[at - 1]
            at -= 1
        order[at] = <uint8_t>i
        count += 1
    at = 0
    while at < count:
        taken = read_row(s, locked, &order[at], count - at, frames, scrap)
        for i in range(at, at + (taken if taken > 0 else -taken)):
            entries[order[i]] = locked[order[i]] if taken > 0 else 0
        at += taken if taken > 0 else -taken
    for i in range(count):
        s.map.ops.unlock(s.map, ids[order[i]], locked[order[i]])


cdef int swap_unpack(SwapSpace* s, Worker* worker, uint64_t entry, char* frame) noexcept nogil:
    cdef int error, length = 0
    worker.loaded = 0
    if slot_raw(entry):
        error = open_raw(s, entry, frame, FOLIO_BYTES, -1) if slot_count(entry) == RAW_SLOTS else -EIO
    else:
        memcpy(worker.packed, frame, slot_count(entry) * SLOT_BYTES)
        error = open_packed(s, entry, worker.packed, ALL_PARTS, &length, worker.sums)
        if error == 0:
            worker.loaded = length
            worker.source = entry
            error = codec_decompress(worker, worker.packed, length, frame, FOLIO_BYTES)
    if error == 0:
        us_add(&s.swap_ins, 1)
    return error


cdef uint64_t swap_cached(SwapSpace* s, uint64_t id) noexcept nogil:
    return s.map.ops.cached(s.map, id)


cdef void swap_uncache(SwapSpace* s, uint64_t id, uint64_t folio) noexcept nogil:
    cdef uint64_t entry
    if s.map.ops.cached(s.map, id) != folio:
        return
    entry = s.map.ops.lock(s.map, id)
    if s.map.ops.cached(s.map, id) == folio:
        s.map.ops.cache(s.map, id, 0)
    s.map.ops.unlock(s.map, id, entry)


cdef int swap_dup(SwapSpace* s, uint64_t* id, uint64_t holder) noexcept nogil:
    cdef uint64_t before = id[0]
    cdef uint64_t entry = 0
    cdef int error = s.map.ops.dup(s.map, id, 1, &entry)
    # Storage asks the old owner until it is told: that is the holder, whom the caller has locked.
    if id[0] != before and entry_type(entry) == ZSWAP:
        us_chaos()
        zswap_set_owner(s.zswap, entry_payload(entry), remembered(s, id[0], holder, tiers_of(s, entry)))
    elif id[0] != before and entry_type(entry) == SLOT:
        us_chaos()
        set_slot_owner(s, entry, remembered(s, id[0], holder, tiers_of(s, entry)))
    return error


cdef bint swap_shared(SwapSpace* s, uint64_t id) noexcept nogil:
    return s.map.ops.count(s.map, id) > 1


cdef bint swap_same(SwapSpace* s, uint64_t id) noexcept nogil:
    cdef uint64_t entry = s.map.ops.lock(s.map, id)
    s.map.ops.unlock(s.map, id, entry)
    return entry_type(entry) == SAME


cdef bint swap_put(SwapSpace* s, uint64_t id) noexcept nogil:
    cdef uint64_t entry
    if s.map.ops.put(s.map, id, 1, &entry) != 0:
        return False
    us_chaos()
    if entry_type(entry) == SLOT:
        us_add(&s.slot_stored, -<int64_t>slot_count(entry) * SLOT_BYTES)
        free_slots(s, id, slot_device(entry), slot_offset(entry), slot_count(entry))
        return True
    if entry_type(entry) == ZSWAP:
        zswap_free(s.zswap, entry_payload(entry))
    s.map.ops.free(s.map, id)
    return False


cdef bint lock_owner(void* ctx, uint64_t owner, uint64_t handle) noexcept nogil:
    """zswap's callback, under its mutex: is the object still what its owner refers to, and nobody at it?"""
    cdef SwapSpace* s = <SwapSpace*>ctx
    return s.map.ops.try_owner(s.map, owner & OWNER, entry_make(ZSWAP, handle))


cdef void owner_moved(void* ctx, uint64_t owner, uint64_t handle, uint64_t fresh) noexcept nogil:
    cdef SwapSpace* s = <SwapSpace*>ctx
    cdef uint32_t total
    cdef char* object = zswap_peek(s.zswap, fresh, &total)
    seal_moved(object, total, handle, fresh)
    s.map.ops.unlock_owner(s.map, owner & OWNER, entry_make(ZSWAP, fresh))


cdef int64_t swap_compact(SwapSpace* s, int percent, int64_t effort) noexcept nogil:
    return zswap_compact(s.zswap, percent, effort, lock_owner, owner_moved, s)


cdef int write_group(SwapSpace* s, int count, uint32_t tiers, int64_t* moved) noexcept nogil:
    """Writes those of the locked objects that `picked` names to one run of slots and points their owners there. On
    failure everything is as before, and so is an object that is not what it was: it gets no fresh seal in the
    file. -EBADMSG: none is."""
    cdef uint32_t total
    cdef const char* packed
    cdef int64_t at = 0, slot = 0
    cdef uint64_t entry, handle, owner
    cdef Folio* folio
    cdef int i, device = 0, good = 0, error
    for i in range(count):
        handle = s.moving[s.picked[i]]
        packed = zswap_memory(s.zswap, handle, &total)
        folio = &s.closing[good]
        folio.raw = False
        error = seal_look(packed, total, handle, ALL_PARTS, &folio.length, folio.sums)
        # A trailer in the file is longer than the seal in zswap: they may need a slot more than was said.
        if error or at + folio_slots(folio) * SLOT_BYTES > s.bounce_bytes:
            s.map.ops.unlock_owner(s.map, s.owners[s.picked[i]] & OWNER, entry_make(ZSWAP, handle))
            continue
        memcpy(s.bounce + at, packed, folio.length)
        at += folio_slots(folio) * SLOT_BYTES
        s.picked[good] = s.picked[i]
        good += 1
    if good == 0:
        return -EBADMSG
    error = run_write(s, tiers, ANY, s.bounce, s.closing, good, &device, &slot)
    us_chaos()
    for i in range(good):
        handle = s.moving[s.picked[i]]
        owner = s.owners[s.picked[i]]
        if error:
            s.map.ops.unlock_owner(s.map, owner & OWNER, entry_make(ZSWAP, handle))
            continue
        entry = slot_make(device, slot, folio_slots(&s.closing[i]), False)
        zswap_free(s.zswap, handle)
        set_slot_owner(s, entry, owner)
        us_chaos()
        s.map.ops.unlock_owner(s.map, owner & OWNER, entry)
        slot += slot_count(entry)
        moved[0] += s.closing[i].length
        us_add(&s.slot_stored, <int64_t>slot_count(entry) * SLOT_BYTES)
        us_add(&s.writebacks, 1)
    return error


cdef int pick(SwapSpace* s, int count) noexcept nogil:
    """Of what is being moved, all that may be where the first of it may be that is left: how many, in `picked`."""
    cdef uint32_t tiers = 0
    cdef int i, n = 0
    for i in range(count):
        if not s.left[i]:
            continue
        if n == 0:
            tiers = allowed(s.owners[i])
        if allowed(s.owners[i]) == tiers:
            s.left[i] = 0
            s.picked[n] = i
            n += 1
    return n


cdef int write_batch(SwapSpace* s, int count, int64_t* moved) noexcept nogil:
    """Writes locked objects, those together that may be in the same tiers."""
    cdef int n, got, error = 0
    memset(s.left, 1, count)
    while True:
        n = pick(s, count)
        if n == 0:
            return error
        got = write_group(s, n, allowed(s.owners[s.picked[0]]), moved)
        if got:
            error = got


cdef int write_home(SwapSpace* s, Worker* worker, uint64_t handle, uint64_t owner, int64_t* moved) noexcept nogil:
    """The same for one locked object of a map whose ids are slots: unpacked, to the slot that the id is."""
    cdef uint32_t total
    cdef const char* packed = zswap_memory(s.zswap, handle, &total)
    cdef uint64_t home = s.map.ops.home(s.map, owner & OWNER)
    cdef int length = 0, n
    cdef int error = seal_look(packed, total, handle, ALL_PARTS, &length, NULL)
    if error == 0:
        n = codec_size(packed, length)
        error = codec_decompress(worker, packed, length, worker.folio, n) if 0 < n <= FOLIO_BYTES else -EIO
        if error == 0:
            error = write_at_home(s, home, worker.folio, n)
    us_chaos()
    if error:
        s.map.ops.unlock_owner(s.map, owner & OWNER, entry_make(ZSWAP, handle))
        return error
    zswap_free(s.zswap, handle)
    s.map.ops.unlock_owner(s.map, owner & OWNER, home)
    moved[0] += length
    return 0


cdef int64_t swap_writeback(SwapSpace* s, int64_t want, bint rest) noexcept nogil:
    cdef int64_t moved = 0, room, before
    cdef int count, i, error = 0, in_vain = 0
    cdef bint cold
    cdef Worker* worker = NULL
    if not device_usable(s):
        return -ENOSPC if space_has_device(s) else -ENODEV
    us_lock(&s.writeback_lock)
    if s.map.ops.bound:
        worker = codec_take()           # before any entry is locked: workers' owners wait for entries
    room = s.bounce_bytes
    cold = zswap_cold(s.zswap) != 0
    while moved < want and error == 0:
        if moved and cold and not rest and zswap_cold(s.zswap) == 0:
            break
        count = zswap_coldest(s.zswap, BATCH, room, s.moving, s.owners, lock_owner, s)
        if count == 0:
            break
        if worker != NULL:
            for i in range(count):
                if error:
                    s.map.ops.unlock_owner(s.map, s.owners[i] & OWNER, entry_make(ZSWAP, s.moving[i]))
                else:
                    error = write_home(s, worker, s.moving[i], s.owners[i], &moved)
            continue
        before = moved
        error = write_batch(s, count, &moved)
        if moved > before:
            error = 0                   # what may not be where there is room has been passed by
        elif error == -ENODEV and in_vain < VAIN_BATCHES:
            in_vain += 1
            error = 0
        elif error == -ENOSPC and count > 1 and room > PACKED_BYTES:
            error = 0                   # no run that long is left: try shorter ones
            room = room // 2 if room // 2 > PACKED_BYTES else PACKED_BYTES
    if worker != NULL:
        codec_give(worker)
    us_unlock(&s.writeback_lock)
    if error == -EBADMSG:
        error = 0                       # nobody's but the object's, which stays where it is
    elif error == -ENOSPC:
        device_failed(s, NULL, error)
    elif error and s.map.ops.bound:
        device_failed(s, &s.places[0], error)
    return moved if moved else error


# ---- from one file to another ----

cdef struct Mover:
    SwapSpace* s
    int device
    int64_t below               # only to priorities below this
    int64_t zswap               # bytes that may go there
    Worker* worker              # taken before any entry is locked
    Moved* moved


cdef inline uint64_t entry_of(int device, int64_t slot, uint64_t owner) noexcept nogil:
    return slot_make(device, <uint64_t>slot, <int>((owner >> TAG_SLOTS) & 31) + 1, (owner >> TAG_RAW) & 1)


cdef bint lock_run(void* ctx, uint64_t owner, int64_t slot) noexcept nogil:
    """A swap file's callback, under its mutex: is the run still what its owner refers to, and nobody at it?"""
    cdef Mover* m = <Mover*>ctx
    return m.s.map.ops.try_owner(m.s.map, owner & OWNER, entry_of(m.device, slot, owner))


cdef inline int64_t run_bytes(uint64_t owner) noexcept nogil:
    return <int64_t>(((owner >> TAG_SLOTS) & 31) + 1) * SLOT_BYTES


cdef void settle(Mover* m, int i, uint64_t fresh) noexcept nogil:
    """Run i is where `fresh` says now: its owner learns it, and the slots that it had are free."""
    cdef SwapSpace* s = m.s
    cdef uint64_t old = entry_of(m.device, <int64_t>s.moving[i], s.owners[i])
    us_chaos()
    free_slots(s, 0, m.device, slot_offset(old), slot_count(old))
    s.map.ops.unlock_owner(s.map, s.owners[i] & OWNER, fresh)


cdef bint send(Mover* m, int first, int count) noexcept nogil:
    """Some of the picked runs, which are in `incoming`, to a run of slots of another file. False: there is no room."""
    cdef SwapSpace* s = m.s
    cdef int64_t at = 0, slot = 0, length
    cdef uint64_t entry
    cdef int i, j, device = 0
    for j in range(first, first + count):
        i = s.picked[j]
        length = run_bytes(s.owners[i])
        s.closing[j - first] = s.opened[i]
        memcpy(s.bounce + at, s.incoming + (<int64_t>s.moving[i] - <int64_t>s.moving[0]) * SLOT_BYTES, length)
        at += length
    if run_write(s, allowed(s.owners[s.picked[first]]), m.below, s.bounce, s.closing, count, &device, &slot):
        return False
    for j in range(first, first + count):
        i = s.picked[j]
        entry = entry_of(device, slot, s.owners[i])
        set_slot_owner(s, entry, s.owners[i])
        settle(m, i, entry)
        slot += slot_count(entry)
        m.moved.files += <int64_t>slot_count(entry) * SLOT_BYTES
        us_add(&s.demotions, m.below != ANY)
    return True


cdef bint send_to_zswap(Mover* m, int i) noexcept nogil:
    """False: it may not be there, or there is no room."""
    cdef SwapSpace* s = m.s
    cdef const char* data = s.incoming + (<int64_t>s.moving[i] - <int64_t>s.moving[0]) * SLOT_BYTES
    cdef int64_t bytes = run_bytes(s.owners[i])
    cdef bint raw = (s.owners[i] >> TAG_RAW) & 1
    cdef Leaving leaving
    cdef int length
    if not allowed(s.owners[i]) & TIER_ZSWAP or m.zswap < bytes:
        return False
    length = s.opened[i].length
    if raw:
        length = codec_keep(m.worker, data, length)
        data = m.worker.packed
        if length > 0:
            seal_sums(data, length, s.opened[i].sums)
    if length <= 0:
        m.moved.error = -EIO
        return False
    memset(&leaving, 0, sizeof(leaving))
    store_packed(s, data, length, s.opened[i].sums, &leaving)
    if leaving.entry == 0:
        return False
    zswap_set_owner(s.zswap, entry_payload(leaving.entry), s.owners[i] & ~(<uint64_t>63 << TAG_SLOTS))
    us_add(&s.slot_stored, -bytes)
    settle(m, i, leaving.entry)
    m.zswap -= bytes
    m.moved.zswap += bytes
    return True


cdef void send_picked(Mover* m, int count) noexcept nogil:
    """Where there is room for all of them in a row there; else for as many as there is room for; else to zswap."""
    cdef SwapSpace* s = m.s
    cdef int first = 0, n = count, i
    while first < count:
        if n > count - first:
            n = count - first
        if send(m, first, n):
            first += n
        elif n > 1:
            n = n // 2
        else:
            i = s.picked[first]
            if not send_to_zswap(m, i):
                m.moved.stuck += run_bytes(s.owners[i])
                s.map.ops.unlock_owner(s.map, s.owners[i] & OWNER,
                                       entry_of(m.device, <int64_t>s.moving[i], s.owners[i]))
            first += 1


cdef int open_incoming(Mover* m, int i) noexcept nogil:
    """A run that was read is verified, and `opened` says what it is."""
    cdef SwapSpace* s = m.s
    cdef char* data = s.incoming + (<int64_t>s.moving[i] - <int64_t>s.moving[0]) * SLOT_BYTES
    cdef uint64_t entry = entry_of(m.device, <int64_t>s.moving[i], s.owners[i])
    s.opened[i].raw = slot_raw(entry)
    if slot_raw(entry) and slot_count(entry) == RAW_SLOTS:
        s.opened[i].length = <int>swapfile_seals(s.devices[m.device], slot_offset(entry))[RAW_LENGTH]
        return open_raw(s, entry, data, s.opened[i].length, -1)
    return open_packed(s, entry, data, ALL_PARTS, &s.opened[i].length, s.opened[i].sums)


cdef void fetch_runs(Mover* m, int first, int end) noexcept nogil:
    """Reads the runs first .. end - 1, in a row but for small gaps, to their places in `incoming`, and verifies them.
    What can't be had, when it is asked for alone, is unlocked, and not `left`."""
    cdef SwapSpace* s = m.s
    cdef int64_t start = <int64_t>s.moving[first], base = <int64_t>s.moving[0]
    cdef int64_t length = <int64_t>s.moving[end - 1] - start + run_bytes(s.owners[end - 1]) // SLOT_BYTES
    cdef int i, error = 0, tries = 0
    while tries < (READS if end - first == 1 else 1):
        tries += 1
        us_add(&s.bytes_read[m.device], length * SLOT_BYTES)
        error = swapfile_read(s.devices[m.device], start, <int>length, s.incoming + (start - base) * SLOT_BYTES)
        if error == 0 and end - first == 1:
            error = open_incoming(m, first)
        if error == 0:
            break
    if end - first > 1:
        for i in range(first, end):
            if error or open_incoming(m, i):
                fetch_runs(m, i, i + 1)
    elif error:
        us_add(&s.reads_lost, 1)
        us_store(&s.lost_at, entry_of(m.device, start, s.owners[first]))
        if not passing(error):
            device_retire(s, m.device, error)
        m.moved.error = -EIO
        s.left[first] = 0
        s.map.ops.unlock_owner(s.map, s.owners[first] & OWNER, entry_of(m.device, start, s.owners[first]))


cdef bint move_some(Mover* m, uint32_t cluster, uint32_t* at) noexcept nogil:
    """Some of a cluster's runs from `at` on, as many as `incoming` takes. With the writeback lock. Whether there are
    more in it."""
    cdef SwapSpace* s = m.s
    cdef int64_t busy = 0, end
    cdef int i, first, n, count
    n = swapfile_collect(s.devices[m.device], cluster, at, MOVE_RUNS, <int>(s.bounce_bytes // SLOT_BYTES), SLOT_RUN,
                         <int64_t*>s.moving, s.owners, lock_run, m, &busy)
    m.moved.busy += busy
    us_chaos()
    memset(s.left, 1, n)
    s.incoming_used = s.incoming_used or n > 0
    i = 0
    while i < n:
        first = i
        while True:
            end = <int64_t>s.moving[i] + run_bytes(s.owners[i]) // SLOT_BYTES
            i += 1
            if i == n or <int64_t>s.moving[i] - end > GAP_MOST:
                break
        fetch_runs(m, first, i)
    us_chaos()
    while True:
        count = pick(s, n)
        if count == 0:
            return at[0] < CLUSTER_SLOTS
        send_picked(m, count)


cdef bint space_drain_some(SwapSpace* s, int place, uint32_t* cluster, uint32_t* at, int64_t zswap,
                           Moved* moved) noexcept nogil:
    cdef Mover m
    cdef int looks = 0
    cdef int64_t before = moved.files + moved.zswap + moved.stuck
    if s.places[place].state != PLACE_DRAINING or s.places[place].device < 0:
        return False
    m.s = s
    m.device = <int>s.places[place].device
    m.below = ANY
    m.zswap = zswap
    m.moved = moved
    m.worker = codec_take()
    us_lock(&s.writeback_lock)
    if cluster[0] == 0:
        cluster[0] = 1
        at[0] = 0
    # Clusters that hold nothing of ours are passed by.
    while looks < DRAIN_LOOKS and cluster[0] and moved.files + moved.zswap + moved.stuck == before:
        looks += 1
        if not move_some(&m, cluster[0], at):
            cluster[0] = cluster[0] + 1 if cluster[0] < swapfile_clusters(s.devices[m.device]) else 0
            at[0] = 0
    us_unlock(&s.writeback_lock)
    codec_give(m.worker)
    return cluster[0] != 0


cdef bint space_crowded(SwapSpace* s) noexcept nogil:
    cdef int t
    for t in range(s.tier_count - 1):
        if us_read(&s.tiers[t].crowded) and not rests(&s.demote_at):
            return True
    return us_read(&s.untidy) != 0 and not rests(&s.tidy_at)


cdef int64_t demote_from(SwapSpace* s, Tier* tier, int64_t most) noexcept nogil:
    """The oldest clusters of each of its files in turn, until it is no longer too full."""
    cdef Mover m
    cdef Moved moved
    cdef uint32_t cluster, at
    cdef int i = 0, in_vain = 0
    cdef int64_t device, before
    memset(&moved, 0, sizeof(moved))
    m.s = s
    m.below = tier.priority
    m.zswap = 0
    m.moved = &moved
    m.worker = NULL             # nothing goes to zswap
    while moved.files < most and in_vain < VAIN_BATCHES * tier.count and above(s, tier, LOW_PERCENT):
        device = us_read(&s.places[tier.places[i % tier.count]].device)
        i += 1
        before = moved.files
        cluster = swapfile_oldest(s.devices[device]) if device >= 0 else 0
        if cluster:
            m.device = <int>device
            at = 0
            us_lock(&s.writeback_lock)
            while move_some(&m, cluster, &at):
                pass
            us_unlock(&s.writeback_lock)
        if moved.files == before:
            in_vain += 1
    if not above(s, tier, LOW_PERCENT):
        us_write(&tier.crowded, 0)
    elif moved.files < most:
        us_write(&s.demote_at, us_now() + RETRY_NS)     # nothing of it may go, or there is no room below
    return moved.files


cdef int64_t space_demote(SwapSpace* s, int64_t most) noexcept nogil:
    cdef int64_t done = 0
    cdef int t, i
    if s.map.ops.bound:
        return 0
    # The lowest ones first: then there is room for what comes from above.
    for t in range(s.tier_count - 2, -1, -1):
        if us_read(&s.tiers[t].crowded) and not rests(&s.demote_at):
            done += demote_from(s, &s.tiers[t], most)
    if us_read(&s.untidy) and not rests(&s.tidy_at):
        us_write(&s.tidy_at, us_now() + TIDY_NS)
        us_write(&s.untidy, 0)
        for i in range(MOST_DEVICES):
            if s.devices[i] != NULL and not s.inherited[i] and swapfile_tidy(s.devices[i]):
                us_write(&s.untidy, 1)      # there may be more
    return done


# ---- figures ----

cdef int64_t space_pool_bytes(SwapSpace* s) noexcept nogil:
    return zswap_bytes(s.zswap)


cdef int64_t space_churn(SwapSpace* s) noexcept nogil:
    return zswap_churn(s.zswap) + 2 * PART_BYTES * us_read(&s.part_outs)   # some of these were written in place


cdef int64_t space_packed_bytes(SwapSpace* s) noexcept nogil:
    return zswap_stored(s.zswap)


cdef bint space_has_cold(SwapSpace* s) noexcept nogil:
    return zswap_cold(s.zswap) != 0


cdef int64_t space_packed(SwapSpace* s) noexcept nogil:
    return zswap_objects(s.zswap)


cdef int64_t space_stored_bytes(SwapSpace* s) noexcept nogil:
    return zswap_stored(s.zswap) + us_read(&s.slot_stored)


cdef int64_t space_slot_bytes(SwapSpace* s) noexcept nogil:
    cdef int64_t slots = 0
    cdef int i
    for i in range(MOST_DEVICES):
        if s.devices[i] != NULL:
            slots += swapfile_used(s.devices[i])
    return slots * SLOT_BYTES


cdef int64_t space_metadata(SwapSpace* s) noexcept nogil:
    cdef int64_t bytes = (s.map.ops.metadata(s.map) + zswap_metadata(s.zswap) + <int64_t>sizeof(SwapSpace)
                          + s.dedupe.bytes
                          + us_read(&s.deferred_count) * <int64_t>sizeof(Deferred))
    cdef int i
    if s.bounce != NULL:
        bytes += s.bounce_bytes
    bytes += us_read(&s.spare_bytes)
    if s.incoming_used:
        bytes += s.bounce_bytes
    for i in range(MOST_DEVICES):
        if s.devices[i] != NULL:
            bytes += swapfile_metadata(s.devices[i])
            if s.shared[i] != NULL:
                bytes += kin_slots_bytes(s.shared[i])
    return bytes


cdef bint space_owns(SwapSpace* s, uint64_t id, uint64_t holder) noexcept nogil:
    cdef uint64_t entry = s.map.ops.lock(s.map, id)
    cdef uint64_t owner = s.map.ops.owner(s.map, id, holder) & OWNER
    cdef uint64_t known = owner
    s.map.ops.unlock(s.map, id, entry)
    if entry_type(entry) == ZSWAP:
        known = zswap_owner(s.zswap, entry_payload(entry))
    elif entry_type(entry) == SLOT and not s.inherited[slot_device(entry)] and not s.map.ops.bound:
        known = swapfile_owner(s.devices[slot_device(entry)], slot_offset(entry))
        if known == 0 or entry_of(slot_device(entry), <int64_t>slot_offset(entry), known) != entry:
            return False
    # One design's owners of slots say in which group they are, too, from bit 34 on.
    return (known ^ owner) & ((<uint64_t>1 << 34) - 1) == 0


cdef bint count_run(void* ctx, uint64_t owner, int64_t slot) noexcept nogil:
    (<int64_t*>ctx)[0] += run_bytes(owner) // SLOT_BYTES
    return False


cdef int64_t space_lost(SwapSpace* s) noexcept nogil:
    cdef int64_t lost = 0, owned, busy = 0
    cdef uint32_t cluster, at
    cdef int i
    for i in range(MOST_DEVICES):
        if s.devices[i] == NULL or s.inherited[i] or s.map.ops.bound:
            continue
        owned = 0
        for cluster in range(1, swapfile_clusters(s.devices[i]) + 1):
            at = 0
            swapfile_collect(s.devices[i], cluster, &at, 1, 1, 1, NULL, NULL, count_run, &owned, &busy)
        owned -= swapfile_used(s.devices[i]) - us_read(&s.kept[i])
        lost += owned if owned > 0 else -owned
    return lost


# ---- fork; with the gate closed, alone ----

cdef void note_slots(SwapSpace* s, int device) noexcept nogil:
    """Of our own file: the child will refer to what is in use, but for what is kept for others only."""
    cdef uint64_t* bits
    cdef uint64_t top = swapfile_words(s.devices[device])
    cdef int64_t i, slot
    cdef Deferred* d
    if s.shared[device] == NULL:
        s.shared[device] = kin_slots_new(swapfile_slots(s.devices[device]))
    if s.shared[device] == NULL:
        s.untold = True
        return
    bits = kin_slots_open(s.shared[device], top)
    swapfile_copy(s.devices[device], bits)
    for i in range(us_read(&s.deferred_count) if kin_child() >= 0 else 0):
        d = &s.deferred[i]
        for slot in range(d.slot, d.slot + d.slots if d.device == device else d.slot):
            bits[slot >> 6] &= ~(<uint64_t>1 << (slot & 63))
    kin_slots_show(s.shared[device])


cdef void space_before_fork(SwapSpace* s) noexcept nogil:
    cdef int i
    forget_ancestors(s)
    for i in range(MOST_DEVICES):
        if s.devices[i] == NULL:
            continue
        if s.inherited[i]:
            if s.shared[i] != NULL:
                kin_slots_pass(s.shared[i])
        elif s.shared[i] != NULL or swapfile_used(s.devices[i]):
            note_slots(s, i)


cdef void space_inherit(SwapSpace* s) noexcept nogil:
    """In the child: every swap file is an ancestor's from now on, and where there was one of its parent's it may have
    one of its own; but not where a swapoff empties it."""
    cdef Place* place
    cdef int64_t i
    for i in range(us_read(&s.deferred_count)):
        # Kept from being given out while the slot was; this process writes to no slot of its parent's.
        if s.deferred[i].id:
            s.map.ops.free(s.map, <uint64_t>s.deferred[i].id)
    for i in range(MOST_DEVICES):
        if s.devices[i] != NULL and not s.inherited[i]:
            us_write(&s.referred[i], swapfile_used(s.devices[i]) - us_read(&s.kept[i]))
            us_write(&s.kept[i], 0)
            s.inherited[i] = True
        place = &s.places[i]
        us_write(&place.device, -1)
        us_write(&place.retry_at, 0)
        if place.state == PLACE_DRAINING:
            us_write(&place.state, PLACE_FREE)
    s.is_child = True
    us_write(&s.deferred_count, 0)      # the parent's to free
    s.deferred_next = 0
    s.untold = False                    # nor do we give slots of its file out
    forget_ancestors(s)
    order_tiers(s)
    if s.keys != NULL:
        cipher_lock_page(s.keys)        # which a fork does not inherit
