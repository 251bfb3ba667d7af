"""The codec: Blosc2 through its C API, on contexts made once.

The library is loaded straight from the ``blosc2`` wheel (its Python package is not imported). What a
folio is best compressed with depends on an item size that nobody told us, so a few *recipes* are
tried on a sample and the winner is kept by the caller. Touches nothing but its arguments.
"""
from libc.errno cimport EIO
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memmove, memset

from userswap.native.mman cimport (
    MADV_DONTDUMP, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap,
)
from userswap.native.us cimport (
    us_add, us_futex_wait, us_futex_wake, us_lock, us_mutex, us_now, us_read, us_unlock,
)


cdef extern from "blosc2.h" nogil:
    enum:
        BLOSC_LZ4
        BLOSC2_MAX_FILTERS
        BLOSC_NEVER_SPLIT
        BLOSC_ALWAYS_SPLIT
    ctypedef struct blosc2_cparams:
        uint8_t compcode
        uint8_t clevel
        int32_t typesize
        int16_t nthreads
        int32_t blocksize
        int32_t splitmode
        uint8_t filters[6]
        uint8_t filters_meta[6]
    ctypedef struct blosc2_dparams:
        int16_t nthreads
    ctypedef struct blosc2_context:
        pass


cdef extern from "<dlfcn.h>" nogil:
    enum:
        RTLD_NOW
        RTLD_LOCAL
    void* dlopen(const char* path, int flags)
    void* dlsym(void* library, const char* name)
    char* dlerror()


ctypedef blosc2_cparams (*cparams_fn)() noexcept nogil
ctypedef blosc2_dparams (*dparams_fn)() noexcept nogil
ctypedef void (*init_fn)() noexcept nogil
ctypedef const char* (*version_fn)() noexcept nogil
ctypedef blosc2_context* (*cctx_fn)(blosc2_cparams) noexcept nogil
ctypedef blosc2_context* (*dctx_fn)(blosc2_dparams) noexcept nogil
ctypedef int (*compress_fn)(blosc2_context*, const void*, int32_t, void*, int32_t) noexcept nogil
ctypedef int (*getitem_fn)(blosc2_context*, const void*, int32_t, int, int, void*, int32_t) noexcept nogil
ctypedef uint64_t (*hash_fn)(const void*, size_t, uint64_t) noexcept nogil
ctypedef int (*decompress_fn)(blosc2_context*, const void*, int32_t, void*, int32_t) noexcept nogil


cdef extern from *:
    """
    #ifndef US_BLOSC2_SONAME
    #define US_BLOSC2_SONAME "libblosc2.so"
    #endif
    """
    const char* US_BLOSC2_SONAME            # the ABI that this module was built for

# A Blosc2 chunk: a header, whose format is frozen, where its blocks begin, the blocks (c-blosc2's
# README_CHUNK_FORMAT).
cdef packed struct Chunk:
    uint8_t version
    uint8_t codec_version
    uint8_t flags
    uint8_t item_bytes
    int32_t bytes
    int32_t block_bytes
    int32_t packed_bytes
    uint8_t[14] pipeline
    uint8_t flags2
    uint8_t flags3
    int32_t[PARTS] blocks       # offsets in the chunk; as many as there are

cdef enum:
    HEADER_NBYTES = 4           # offsets of two of these
    HEADER_CBYTES = 12
    HEADER_LENGTH = 32
    CHUNK_VERSION = 5
    CHUNK_MEMCPYED = 2          # of flags: not compressed, no blocks
    CHUNK_EXTENDED = 5          # both bits: the header is of Blosc2, not Blosc

# A folio of which parts were written by themselves is a chunk for each part behind this header. No Blosc2 chunk begins
# with such a byte: that is its format's version. `bytes` is where a chunk has its own.
cdef packed struct Parts:
    uint32_t magic
    int32_t bytes
    uint16_t[PARTS] lengths     # of their rooms, which may be longer than the chunks; PART_BYTES: not compressed

cdef enum:
    PARTS_MAGIC = 0x747270FF
    # A block is a part, so that one can be had without the others, and a chunk of one part takes the same buffers.
    BLOCK_BYTES = PART_BYTES
    SHORT_RECIPE = 2

cdef cctx_fn b_cctx = NULL
cdef dctx_fn b_dctx
cdef cparams_fn b_cparams
cdef dparams_fn b_dparams
cdef compress_fn b_compress
cdef decompress_fn b_decompress
cdef getitem_fn b_getitem
cdef hash_fn b_hash = NULL
cdef version_fn b_version

# Leaf lock for the list of idle workers. Who finds it empty sleeps on `returned`.
cdef us_mutex pool_lock
cdef Worker* idle = NULL
cdef int made = 0
cdef uint32_t returned = 0
cdef int64_t waiting = 0
cdef int64_t worker_bytes = 0


cdef struct Recipe:
    const char* name
    int filter
    int typesize
    bint split                  # each byte (of its 8 bit planes) of an item is compressed by itself
    int level
    int handicap                # per cent that its result counts as longer than it is

# Small integers have bit planes that are all alike: split, they are decompressed in a third of the time. Walks of
# floats need all planes together. LZ4's best level costs bitshuffled data a tenth of the time and gains up to 2 %.
# LZ4 alone takes four times as long to compress numbers and twice to decompress them, planes of items of one and two
# bytes are slow as well: they must be worth it, not win by a hair on the folio that happens to be looked at.
cdef Recipe[RECIPES] recipes
recipes[0] = Recipe(b"lz4", 0, 1, False, 5, 12)
recipes[1] = Recipe(b"lz4 bitshuffle 8 split", 2, 8, True, 9, 0)
recipes[2] = Recipe(b"lz4 bitshuffle 8", 2, 8, False, 9, 2)
recipes[3] = Recipe(b"lz4 bitshuffle 4 split", 2, 4, True, 9, 3)
recipes[4] = Recipe(b"lz4 bitshuffle 4", 2, 4, False, 9, 3)
recipes[5] = Recipe(b"lz4 bitshuffle 2", 2, 2, False, 9, 10)
recipes[6] = Recipe(b"lz4 bitshuffle 1", 2, 1, False, 9, 10)
recipes[7] = Recipe(b"lz4 shuffle 8", 1, 8, True, 5, 3)
recipes[8] = Recipe(b"lz4 shuffle 4", 1, 4, True, 5, 3)


cdef int codec_load(const char* library, char* why, int why_bytes) noexcept nogil:
    global b_cctx, b_dctx, b_cparams, b_dparams, b_compress, b_decompress, b_getitem, b_hash, b_version
    cdef void* handle
    cdef init_fn init
    if b_cctx != NULL:
        return 0
    handle = dlopen(library, RTLD_NOW | RTLD_LOCAL)
    if handle == NULL:
        snprintf(why, why_bytes, "%s", dlerror())
        return -1
    init = <init_fn>dlsym(handle, "blosc2_init")
    b_version = <version_fn>dlsym(handle, "blosc2_get_version_string")
    b_cparams = <cparams_fn>dlsym(handle, "blosc2_get_blosc2_cparams_defaults")
    b_dparams = <dparams_fn>dlsym(handle, "blosc2_get_blosc2_dparams_defaults")
    b_dctx = <dctx_fn>dlsym(handle, "blosc2_create_dctx")
    b_compress = <compress_fn>dlsym(handle, "blosc2_compress_ctx")
    b_decompress = <decompress_fn>dlsym(handle, "blosc2_decompress_ctx")
    b_getitem = <getitem_fn>dlsym(handle, "blosc2_getitem_ctx")
    b_hash = <hash_fn>dlsym(handle, "ZSTD_XXH64")
    if (init == NULL or b_version == NULL or b_cparams == NULL or b_dparams == NULL or b_dctx == NULL
            or b_compress == NULL or b_decompress == NULL or b_getitem == NULL
            or dlsym(handle, "blosc2_create_cctx") == NULL):
        snprintf(why, why_bytes, "it lacks functions of Blosc2")
        return -1
    init()
    b_cctx = <cctx_fn>dlsym(handle, "blosc2_create_cctx")
    return 0


cdef blosc2_context* make_compressor(int recipe) noexcept nogil:
    cdef blosc2_cparams params = b_cparams()
    cdef int i
    params.compcode = BLOSC_LZ4
    params.clevel = recipes[recipe].level
    params.typesize = recipes[recipe].typesize
    params.nthreads = 1
    params.blocksize = BLOCK_BYTES
    params.splitmode = BLOSC_ALWAYS_SPLIT if recipes[recipe].split else BLOSC_NEVER_SPLIT
    for i in range(BLOSC2_MAX_FILTERS):
        params.filters[i] = 0
        params.filters_meta[i] = 0
    params.filters[BLOSC2_MAX_FILTERS - 1] = recipes[recipe].filter
    return b_cctx(params)


cdef Worker* worker_new() noexcept nogil:
    """A worker with every context it will ever use, each run once so that Blosc2 allocates now, not in a fault."""
    cdef size_t size = 4096 + FOLIO_BYTES + PACKED_BYTES
    cdef char* memory = <char*>mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef Worker* worker
    cdef blosc2_dparams dparams
    cdef int i
    if memory == MAP_FAILED:
        return NULL
    madvise(memory, size, MADV_DONTDUMP)
    memset(memory, 0, size)
    worker = <Worker*>memory
    worker.folio = memory + 4096
    worker.packed = memory + 4096 + FOLIO_BYTES
    dparams = b_dparams()
    dparams.nthreads = 1
    worker.decompressor = b_dctx(dparams)
    if worker.decompressor == NULL:
        return NULL
    for i in range(FOLIO_BYTES // 4):
        (<uint32_t*>worker.folio)[i] = i * 40503
    for i in range(RECIPES):
        worker.compressors[i] = make_compressor(i)
        if worker.compressors[i] == NULL:
            return NULL
        if b_compress(<blosc2_context*>worker.compressors[i], worker.folio, FOLIO_BYTES,
                      worker.packed, PACKED_BYTES) <= 0:
            return NULL
        if b_decompress(<blosc2_context*>worker.decompressor, worker.packed, PACKED_BYTES,
                        worker.folio, FOLIO_BYTES) != FOLIO_BYTES:
            return NULL
    worker.short_compressor = make_compressor(SHORT_RECIPE)
    if (worker.short_compressor == NULL
            or b_compress(<blosc2_context*>worker.short_compressor, worker.folio, BLOCK_BYTES - 4096, worker.packed,
                          PACKED_BYTES) <= 0):
        return NULL
    # Blosc2 keeps four blocks a context; the rest is small.
    us_add(&worker_bytes, size + (RECIPES + 2) * (4 * BLOCK_BYTES + 8192))
    return worker


cdef int codec_start(int workers) noexcept nogil:
    global made, idle
    cdef Worker* worker
    while made < workers:
        worker = worker_new()
        if worker == NULL:
            return -12                      # ENOMEM
        us_lock(&pool_lock)
        worker.next = idle
        idle = worker
        made += 1
        us_unlock(&pool_lock)
    return 0


cdef int64_t codec_metadata() noexcept nogil:
    return us_read(&worker_bytes)


cdef Worker* codec_take() noexcept nogil:
    global idle
    cdef Worker* worker
    cdef uint32_t seen
    while True:
        us_lock(&pool_lock)
        worker = idle
        seen = returned
        if worker != NULL:
            idle = worker.next
            us_unlock(&pool_lock)
            return worker
        us_add(&waiting, 1)
        us_unlock(&pool_lock)
        us_futex_wait(&returned, seen)
        us_add(&waiting, -1)


cdef void codec_give(Worker* worker) noexcept nogil:
    global idle, returned
    us_lock(&pool_lock)
    worker.next = idle
    idle = worker
    returned += 1
    us_unlock(&pool_lock)
    if us_read(&waiting):
        us_futex_wake(&returned, 1)


cdef inline blosc2_context* compressor_of(Worker* worker, int recipe, int n) noexcept nogil:
    # A context that was given less than a block makes shorter blocks from then on, for good; those are no parts.
    return <blosc2_context*>(worker.short_compressor if n < BLOCK_BYTES else worker.compressors[recipe])


cdef int codec_compress(Worker* worker, int recipe, const void* data, int n) noexcept nogil:
    # The room given is the most that is worth storing: Blosc2 returns 0 when it does not suffice.
    return b_compress(compressor_of(worker, recipe, n), data, n, worker.packed, n - n // 8)


cdef int codec_keep(Worker* worker, const void* data, int n) noexcept nogil:
    return b_compress(compressor_of(worker, 0, n), data, n, worker.packed, PACKED_BYTES)


cdef int codec_choose(Worker* worker, const void* data, int n) noexcept nogil:
    cdef int best = 0
    cdef int least = 0
    cdef int recipe, length
    for recipe in range(RECIPES):
        length = codec_compress(worker, recipe, data, n) * (100 + recipes[recipe].handicap)
        if length > 0 and (least == 0 or length < least):
            least = length
            best = recipe
    return best


cdef const char* find_part(const void* packed, int length, int part, int* part_length) noexcept nogil:
    """One of the parts that were packed by themselves: NULL if it is not whole."""
    cdef const Parts* header = <const Parts*>packed
    cdef int at = sizeof(Parts)
    cdef int i
    for i in range(part):
        at += header.lengths[i]
    part_length[0] = header.lengths[part]
    # Not longer than a part can be, either: codec_replace has room for four of those.
    return <const char*>packed + at if part_length[0] <= PART_BYTES and at + part_length[0] <= length else NULL


cdef inline bint in_parts(const void* packed, int length) noexcept nogil:
    return (length >= <int>sizeof(Parts) and (<const Parts*>packed).magic == PARTS_MAGIC
            and (<const Parts*>packed).bytes == FOLIO_BYTES)


cdef int unpack(Worker* worker, const char* packed, int length, void* data, int n) noexcept nogil:
    """A Blosc2 chunk of n bytes."""
    if length < HEADER_LENGTH:
        return -EIO
    if (<const int32_t*>(packed + HEADER_NBYTES))[0] != n or (<const int32_t*>(packed + HEADER_CBYTES))[0] > length:
        return -EIO
    return 0 if b_decompress(<blosc2_context*>worker.decompressor, packed, length, data, n) == n else -EIO


cdef int codec_decompress(Worker* worker, const void* packed, int length, void* data, int n) noexcept nogil:
    cdef int part, error
    if not in_parts(packed, length):
        return unpack(worker, <const char*>packed, length, data, n)
    for part in range(PARTS):
        error = codec_part(worker, packed, length, part, <char*>data + part * PART_BYTES) if n == FOLIO_BYTES else -EIO
        if error:
            return error
    return 0


cdef int codec_part(Worker* worker, const void* packed, int length, int part, void* data) noexcept nogil:
    cdef const char* chunk = <const char*>packed
    cdef int item_bytes
    if in_parts(packed, length):
        chunk = find_part(packed, length, part, &length)
        if chunk == NULL:
            return -EIO
        if length == PART_BYTES:
            memcpy(data, chunk, PART_BYTES)
            return 0
        return unpack(worker, chunk, length, data, PART_BYTES)
    if (length < HEADER_LENGTH or (<const int32_t*>(chunk + HEADER_NBYTES))[0] != FOLIO_BYTES
            or (<const int32_t*>(chunk + HEADER_CBYTES))[0] > length):
        return -EIO
    item_bytes = (<const Chunk*>chunk).item_bytes
    if item_bytes == 0 or PART_BYTES % item_bytes:
        return -EIO
    if b_getitem(<blosc2_context*>worker.decompressor, packed, length, part * PART_BYTES // item_bytes,
                 PART_BYTES // item_bytes, data, PART_BYTES) != PART_BYTES:
        return -EIO
    return 0


cdef inline bint has_blocks(const Chunk* chunk, int length) noexcept nogil:
    """Of a whole folio, one to a part, compressed."""
    return (length >= <int>sizeof(Chunk) and chunk.version == CHUNK_VERSION
            and chunk.flags & CHUNK_EXTENDED == CHUNK_EXTENDED and not chunk.flags & CHUNK_MEMCPYED
            and not chunk.flags2 and not chunk.flags3 and chunk.bytes == FOLIO_BYTES
            and chunk.block_bytes == PART_BYTES and chunk.packed_bytes <= length)


cdef int cut_part(const void* packed, int length, int part, char* target) noexcept nogil:
    """One block of a chunk, made a chunk of its own as it is: its length. 0: the chunk has no such blocks."""
    cdef const Chunk* chunk = <const Chunk*>packed
    cdef Chunk* cut = <Chunk*>target
    cdef int start, end
    if not has_blocks(chunk, length):
        return 0
    start = chunk.blocks[part]
    end = chunk.blocks[part + 1] if part + 1 < PARTS else chunk.packed_bytes
    # An end that is not behind the start: blocks in another order, as several threads leave them.
    if start < <int>sizeof(Chunk) or end <= start or end > chunk.packed_bytes or end - start > PART_BYTES // 8 * 7:
        return 0
    memcpy(target, packed, HEADER_LENGTH)
    cut.bytes = PART_BYTES
    cut.packed_bytes = HEADER_LENGTH + 4 + end - start
    cut.blocks[0] = HEADER_LENGTH + 4
    memcpy(target + HEADER_LENGTH + 4, <const char*>packed + start, end - start)
    return cut.packed_bytes


cdef int pack_part(Worker* worker, int recipe, const void* data, char* target) noexcept nogil:
    """To `target`: its length; PART_BYTES, and it is there as it is, if it gets no shorter."""
    cdef int length = b_compress(<blosc2_context*>worker.compressors[recipe], data, PART_BYTES, target, PART_BYTES - 1)
    if length <= 0:
        length = PART_BYTES
        memcpy(target, data, PART_BYTES)
    return length


cdef void codec_pack_parts(Worker* worker, int recipe, const void* const* parts, PackedPart* fresh) noexcept nogil:
    cdef int part
    cdef char* target
    for part in range(PARTS):
        target = worker.folio + part * PART_BYTES
        fresh[part].data = NULL
        if parts[part] != NULL:
            fresh[part].length = pack_part(worker, recipe, parts[part], target)
            fresh[part].data = target


ctypedef const char* Room


cdef bint codec_update(char* packed, int length, const PackedPart* fresh) noexcept nogil:
    cdef int part, room = 0
    cdef Room[PARTS] rooms
    if not in_parts(packed, length):
        return False
    for part in range(PARTS):
        if fresh[part].data == NULL:
            continue
        rooms[part] = find_part(packed, length, part, &room)
        # A room of PART_BYTES is for what is not compressed, and only that.
        if (rooms[part] == NULL or fresh[part].length > room
                or (room == PART_BYTES) != (fresh[part].length == PART_BYTES)):
            return False
    for part in range(PARTS):
        if fresh[part].data != NULL:
            memcpy(<void*>rooms[part], fresh[part].data, fresh[part].length)
    return True


cdef int chunk_length(const char* chunk, int room) noexcept nogil:
    """Of a part in its room; -1: it is not whole."""
    return PART_BYTES if room == PART_BYTES else codec_length(chunk, room)


cdef int codec_replace(Worker* worker, int recipe, const void* packed, int length,
                       const PackedPart* fresh) noexcept nogil:
    cdef Parts* header = <Parts*>worker.packed
    cdef const char* chunk
    cdef char* scrap
    cdef char* target
    cdef int part, stored, at = sizeof(Parts)
    header.magic = PARTS_MAGIC
    header.bytes = FOLIO_BYTES
    for part in range(PARTS):
        target = worker.packed + at
        stored = 0
        if fresh[part].data != NULL:
            stored = fresh[part].length
            memcpy(target, fresh[part].data, stored)
        elif in_parts(packed, length):
            chunk = find_part(packed, length, part, &stored)
            stored = chunk_length(chunk, stored) if chunk != NULL else -1
            if stored < 0:
                return -EIO
            memcpy(target, chunk, stored)
        else:
            stored = cut_part(packed, length, part, target)
        if stored == 0:
            scrap = worker.folio + part * PART_BYTES
            if codec_part(worker, packed, length, part, scrap) != 0:
                return -EIO
            stored = pack_part(worker, recipe, scrap, target)
        header.lengths[part] = <uint16_t>stored
        at += stored
    return at if at <= FOLIO_BYTES - FOLIO_BYTES // 8 else 0


cdef void codec_spread(Worker* worker, int length, int room) noexcept nogil:
    cdef Parts* header = <Parts*>worker.packed
    cdef int[PARTS] more
    cdef int part, stored, end = length, shift = 0
    for part in range(PARTS):
        more[part] = (room - length - shift) // (PARTS - part)
        # Not to a room as long as what is not compressed has, nor of one of these.
        if header.lengths[part] + more[part] >= PART_BYTES:
            more[part] = 0
        shift += more[part]
    # The last one first, so that none is written over.
    for part in reversed(range(PARTS)):
        stored = header.lengths[part]
        end -= stored
        shift -= more[part]
        memmove(worker.packed + end + shift, worker.packed + end, stored)
        memset(worker.packed + end + shift + stored, 0, more[part])
        header.lengths[part] = <uint16_t>(stored + more[part])


cdef bint codec_bounds(const void* packed, int length, int* bounds) noexcept nogil:
    cdef const Chunk* chunk = <const Chunk*>packed
    cdef int part
    if in_parts(packed, length):
        bounds[0] = sizeof(Parts)
        for part in range(PARTS):
            bounds[part + 1] = bounds[part] + (<const Parts*>packed).lengths[part]
        return bounds[PARTS] <= length
    if not has_blocks(chunk, length):
        return False
    for part in range(PARTS):
        bounds[part] = chunk.blocks[part]
    bounds[PARTS] = chunk.packed_bytes
    for part in range(PARTS):
        # In another order, as several threads leave them, or none at all.
        if bounds[part + 1] <= bounds[part]:
            return False
    return bounds[0] >= <int>sizeof(Chunk)


cdef uint64_t codec_hash(const void* data, int n) noexcept nogil:
    return b_hash(data, n, 0) if b_hash != NULL else 0


cdef int codec_size(const void* packed, int length) noexcept nogil:
    if in_parts(packed, length):
        return FOLIO_BYTES
    if length < HEADER_LENGTH:
        return -1
    return (<const int32_t*>(<const char*>packed + HEADER_NBYTES))[0]


cdef int codec_length(const void* packed, int length) noexcept nogil:
    cdef int last
    cdef const char* chunk
    if in_parts(packed, length):
        chunk = find_part(packed, length, PARTS - 1, &last)
        return <int>(chunk + last - <const char*>packed) if chunk != NULL else -1
    if length < HEADER_LENGTH:
        return -1
    last = (<const int32_t*>(<const char*>packed + HEADER_CBYTES))[0]
    return last if HEADER_LENGTH <= last <= length else -1


def soname() -> str:
    """File name of the Blosc2 library that this build can use, such as ``libblosc2.so.9``."""
    return US_BLOSC2_SONAME.decode()


def start(library: str, workers: int) -> None:
    """Load Blosc2 from the file `library` and make contexts for `workers` threads at once.

    Raises:
        OSError: the library can't be used; the text says why.
        MemoryError: no memory for the contexts.
    """
    cdef char[256] why
    cdef bytes path = library.encode()
    cdef const char* name = path
    if codec_load(name, why, sizeof(why)) != 0:
        raise OSError(why.decode(errors="replace"))
    if codec_start(workers) != 0:
        raise MemoryError("no memory for Blosc2's contexts")


def version() -> str:
    """Version of the loaded Blosc2 library."""
    return b_version().decode()


def compress(data: bytes, recipe: int = -1) -> tuple[str, bytes | None]:
    """Compress one folio or less; -1 tries every recipe. The recipe's name, and the packed bytes or None."""
    cdef Worker* worker = codec_take()
    cdef const char* source = data
    cdef int chosen = recipe if 0 <= recipe < RECIPES else codec_choose(worker, source, <int>len(data))
    cdef int length = codec_compress(worker, chosen, source, <int>len(data))
    packed = (<char*>worker.packed)[:length] if length > 0 else None
    codec_give(worker)
    return recipes[chosen].name.decode(), packed


def decompress(packed: bytes, n: int) -> bytes:
    """The `n` bytes of a folio from its packed form.

    Raises:
        OSError: the packed bytes are not whole.
    """
    cdef Worker* worker = codec_take()
    cdef const char* source = packed
    cdef int error = codec_decompress(worker, source, <int>len(packed), worker.folio, n)
    data = (<char*>worker.folio)[:n]
    codec_give(worker)
    if error:
        raise OSError(-error, "the packed folio is damaged")
    return data


def speed(data: bytes, recipe: int, rounds: int) -> tuple[int, float, float]:
    """Packed length of one folio, and GB/s of compressing and decompressing it `rounds` times."""
    cdef Worker* worker = codec_take()
    cdef const char* source = data
    cdef int n = <int>len(data), length = 0, _i, turns = rounds, kind = recipe
    cdef int64_t t0 = us_now(), t1, t2
    for _i in range(turns):
        length = codec_compress(worker, kind, source, n)
    t1 = us_now()
    if length > 0:
        for _i in range(turns):
            codec_decompress(worker, worker.packed, length, worker.folio, n)
    t2 = us_now()
    codec_give(worker)
    return length, <double>n * turns / (t1 - t0), <double>n * turns / (t2 - t1)


def metadata_bytes() -> int:
    """RAM that the contexts and buffers take, bytes."""
    return codec_metadata()


ctypedef const void* Given


def replace(packed: bytes, parts: "list[bytes | None]", recipe: int, room: int = 0) -> tuple[bytes, int]:
    """A packed folio with other parts, as when it leaves in parts; and how many of the others were not packed again.
    `room`: bytes that it shall have, so that parts may grow.

    Raises:
        ValueError: there are not four parts of 16 KiB or None.
        OSError: the packed bytes are not whole, or the result hardly compresses.
    """
    cdef Worker* worker
    cdef const char* source = packed
    cdef const char* data
    cdef Given[PARTS] given
    cdef PackedPart[PARTS] fresh
    cdef int i, length, cut = 0
    if len(parts) != PARTS or any(part is not None and len(part) != PART_BYTES for part in parts):
        raise ValueError("give four parts of 16 KiB, or None")
    worker = codec_take()
    for i in range(PARTS):
        given[i] = NULL
        if parts[i] is not None:
            data = parts[i]
            given[i] = data
        elif in_parts(source, <int>len(packed)) or cut_part(source, <int>len(packed), i, worker.packed):
            cut += 1
    codec_pack_parts(worker, recipe, given, fresh)
    length = codec_replace(worker, recipe, source, <int>len(packed), fresh)
    if 0 < length < room <= PACKED_BYTES:
        codec_spread(worker, length, room)
        length = room
    result = (<char*>worker.packed)[:length] if length > 0 else b""
    codec_give(worker)
    if length <= 0:
        raise OSError(-length, "the packed folio is damaged, or hardly compresses now")
    return result, cut


def update(packed: bytes, parts: "list[bytes | None]", recipe: int) -> "bytes | None":
    """The same in place: None if it has no room for the parts where they are."""
    cdef Worker* worker = codec_take()
    cdef PackedPart[PARTS] fresh
    cdef Given[PARTS] given
    cdef const char* data
    cdef int i
    cdef bint updated
    target = bytearray(packed)
    cdef char* bytes_of = target
    for i in range(PARTS):
        given[i] = NULL
        if parts[i] is not None:
            data = parts[i]
            given[i] = data
    codec_pack_parts(worker, recipe, given, fresh)
    updated = codec_update(bytes_of, <int>len(packed), fresh)
    codec_give(worker)
    return bytes(target) if updated else None


def part(packed: bytes, which: int) -> bytes:
    """One part of a packed folio.

    Raises:
        OSError: the packed bytes are not whole.
    """
    cdef Worker* worker = codec_take()
    cdef const char* source = packed
    cdef int error = codec_part(worker, source, <int>len(packed), which, worker.folio)
    data = (<char*>worker.folio)[:PART_BYTES]
    codec_give(worker)
    if error:
        raise OSError(-error, "the packed folio is damaged")
    return data
