"""The program's end of the control socket: a thread of ours that waits for messages, and one more for each of them.

The thread never takes the GIL, and never waits for anything but its poll(): so a program that holds the GIL, or is at
a long swapoff, still has its connections taken, and a client that sends half a line, or nothing, keeps nobody busy.
What a message asks for is done by a thread of its own, in Python (`control.answers`), which is imported then. As long
as nobody asks, the program has a sleeping thread and one socket more, and sees neither in Python.

Touches its own connections, descriptors and threads; knows nothing of pools.
"""
import atexit
import os

from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport int64_t
from libc.string cimport memchr, strlen

from userswap.native.descriptors cimport FIRST_FD, descriptor_guard, descriptor_release, descriptor_up
from userswap.native.thread cimport (
    Thread, thread_detached, thread_first_use, thread_may, thread_rest, thread_start,
)
from userswap.native.us cimport us_add, us_load32, us_now, us_read, us_write

from userswap.control import places

cdef extern from *:
    """
    #include <errno.h>
    #include <poll.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/un.h>
    #include <unistd.h>

    /* A socket that listens at `path`, which only its owner may connect to; or -errno. */
    static int us_listen(const char *path) {
        struct sockaddr_un name = {.sun_family = AF_UNIX};
        int error, fd;
        if (strlen(path) >= sizeof name.sun_path) return -ENAMETOOLONG;
        strcpy(name.sun_path, path);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) return -errno;
        /* Linux takes the mode of the file from the socket's. A umask is the whole process's. */
        if (fchmod(fd, 0600) || bind(fd, (struct sockaddr *)&name, sizeof name) || listen(fd, 64)) {
            error = -errno;
            close(fd);
            return error;
        }
        return fd;
    }

    static int us_take(int fd) { return accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK); }

    /* Whether who is at the other end may ask: the same user, or root. */
    static int us_may_ask(int fd) {
        struct ucred who;
        socklen_t length = sizeof who;
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &length)) return 0;
        return who.uid == geteuid() || who.uid == 0;
    }

    static ssize_t us_hear(int fd, char *to, size_t length) { return recv(fd, to, length, MSG_DONTWAIT); }

    static ssize_t us_say(int fd, const char *text, size_t length) {
        return send(fd, text, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    }

    /* Whether the other end has closed, or will say no more. */
    static int us_hung_up(int fd) {
        struct pollfd look = {.fd = fd, .events = POLLRDHUP};
        return poll(&look, 1, 0) > 0;
    }
    """
    int us_listen(const char* path) nogil
    int us_take(int fd) nogil
    bint us_may_ask(int fd) nogil
    ssize_t us_hear(int fd, char* to, size_t length) nogil
    ssize_t us_say(int fd, const char* text, size_t length) nogil
    bint us_hung_up(int fd) nogil
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout) nogil
    short POLLIN
    short POLLOUT
    int getpid() nogil
    int close(int fd) nogil

cdef extern from "Python.h":
    int Py_AddPendingCall(int (*function)(void*) noexcept, void* argument) noexcept nogil

cdef enum:
    MOST = 16                       # connections at once
    LONGEST = 32 << 10              # bytes of a message; as control.places says
    STACK = 8 << 20                 # of a thread that runs Python: what the program's main thread has, mostly
    PATIENCE = 5000                 # ms for a client to send its line
    SEND_PATIENCE = 10000           # ms for a client to take some of what it is sent
    NO_ROOM_PAUSE = 200             # ms, where there is no descriptor for a client
    FORK_PATIENCE = 50              # ms that a fork waits for an answer that is under way
    END_PATIENCE = 5000             # ms that the end of the process does

cdef enum:
    FREE, HEARING, ANSWERING

cdef int64_t MS = 1000000

cdef struct Connection:
    int64_t state
    int fd
    int64_t deadline                # ns
    ssize_t length
    char[LONGEST] text

cdef Connection[MOST] connections
cdef Thread listener
cdef int door = -1                  # the socket that listens
cdef int64_t answering = 0          # threads that carry out a message
cdef int64_t ending = 0             # the process ends

cdef bint opening = False
cdef object where = None            # path, process, device and inode of the socket that is ours
cdef bint hooked = False

cdef const char* OTHER_USER = b'{"error": "This program belongs to another user."}\n'
cdef const char* NO_LINE = b'{"error": "The message ended before its line did: nothing was done."}\n'
cdef const char* TOO_LONG = b'{"error": "The message is longer than 32 KiB: nothing was done."}\n'
cdef const char* TOO_SLOW = b'{"error": "No whole message came within five seconds: nothing was done."}\n'
cdef const char* NO_THREAD = b'{"error": "The program can have no thread more to carry this out: nothing was done."}\n'
cdef const char* AT_ITS_END = b'{"error": "The program is about to end: nothing was done."}\n'
cdef const char* NO_ANSWER = b'{"error": "A part of userswap, or Python\'s json, cannot be loaded in the program."}\n'


# ---- the thread ----

cdef void hang_up(Connection* c) noexcept nogil:
    cdef int fd = c.fd
    c.fd = -1
    us_write(&c.state, FREE)
    descriptor_release(fd)
    close(fd)


cdef void refuse(Connection* c, const char* sentence) noexcept nogil:
    us_say(c.fd, sentence, strlen(sentence))
    hang_up(c)


cdef void* answer(void* argument) noexcept nogil:
    cdef Connection* c = <Connection*>argument
    if us_read(&ending):
        refuse(c, AT_ITS_END)
    else:
        if not carry_out(c):
            us_say(c.fd, NO_ANSWER, strlen(NO_ANSWER))
        hang_up(c)
    us_add(&answering, -1)
    return NULL


cdef void hear(Connection* c) noexcept nogil:
    """What has come of a message; all of it: it is carried out."""
    cdef char* end
    cdef ssize_t got = us_hear(c.fd, c.text + c.length, LONGEST - c.length)
    if got < 0:
        if errno != EAGAIN and errno != EINTR:
            hang_up(c)
        return
    if got == 0:
        if c.length:
            refuse(c, NO_LINE)
        else:
            hang_up(c)
        return
    end = <char*>memchr(c.text + c.length, 10, got)
    c.length += got
    if end != NULL:
        c.length = end - c.text
        us_write(&c.state, ANSWERING)
        us_add(&answering, 1)
        if thread_detached(answer, c, STACK) != 0:
            us_add(&answering, -1)
            refuse(c, NO_THREAD)
    elif c.length == LONGEST:
        refuse(c, TOO_LONG)


cdef Connection* room() noexcept nogil:
    """A connection that is free; else the one that has said nothing for the longest time is ended. NULL: all are being
    answered."""
    cdef Connection* oldest = NULL
    cdef Connection* c
    cdef int i
    for i in range(MOST):
        c = &connections[i]
        if us_read(&c.state) == FREE:
            return c
        if us_read(&c.state) == HEARING and (oldest == NULL or c.deadline < oldest.deadline):
            oldest = c
    if oldest != NULL:
        refuse(oldest, TOO_SLOW)
    return oldest


cdef int take(Connection* c) noexcept nogil:
    """Takes a client into a free connection: 0 or -errno."""
    cdef int fd = us_take(door)
    if fd < 0:
        return -errno
    fd = descriptor_up(fd, FIRST_FD)
    descriptor_guard(fd)
    c.fd = fd
    c.length = 0
    c.deadline = us_now() + PATIENCE * MS
    us_write(&c.state, HEARING)
    if not us_may_ask(fd):
        refuse(c, OTHER_USER)
    return 0


cdef int pause_until(int64_t when, int64_t now) noexcept nogil:
    """ms, at least one."""
    return <int>((when - now) // MS + 1) if when > now else 1


cdef void body(Thread* self) noexcept nogil:
    cdef pollfd[MOST + 2] looks
    cdef (Connection*)[MOST] whose
    cdef Connection* c
    cdef int64_t now, next, no_room_until = 0
    cdef int i, count, error
    while not us_load32(&self.leaving):
        count = 0
        next = 0
        now = us_now()
        for i in range(MOST):
            c = &connections[i]
            if us_read(&c.state) == HEARING:
                if c.deadline <= now:
                    refuse(c, TOO_SLOW)
                    continue
                next = c.deadline if next == 0 or c.deadline < next else next
                looks[count].fd = c.fd
                looks[count].events = POLLIN
                whose[count] = c
                count += 1
        looks[count].fd = self.bell
        looks[count].events = POLLIN
        # A descriptor below zero is one that nobody looks at.
        looks[count + 1].fd = door if now >= no_room_until else -1
        looks[count + 1].events = POLLIN
        looks[count + 1].revents = 0
        if now < no_room_until and (next == 0 or no_room_until < next):
            next = no_room_until
        if poll(looks, count + 2, pause_until(next, now) if next else -1) <= 0:
            continue
        if us_load32(&self.leaving):
            return
        for i in range(count):
            if looks[i].revents:
                hear(whose[i])
        if looks[count + 1].revents:
            c = room()
            error = take(c) if c != NULL else -EAGAIN
            if error == -EMFILE or error == -ENFILE or error == -ENOMEM or error == -ENOBUFS or c == NULL:
                no_room_until = us_now() + NO_ROOM_PAUSE * MS
            elif error and error != -EAGAIN and error != -EINTR and error != -ECONNABORTED:
                return          # the program has closed our socket by a raw system call, or put another in its place


cdef void forked() noexcept nogil:
    """In a child: nobody waits here, and no answer is to come from here."""
    global door
    cdef int i
    if door >= 0:
        descriptor_release(door)
        close(door)
    door = -1
    for i in range(MOST):
        if us_read(&connections[i].state) != FREE and connections[i].fd >= 0:
            hang_up(&connections[i])
        us_write(&connections[i].state, FREE)
    us_write(&answering, 0)


listener.body = body
listener.polls = True
listener.forked = forked


# ---- in Python ----

cdef class Asked:
    """A message, and the line to who has sent it."""
    cdef Connection* connection
    cdef readonly bytes line

    def send(self, bytes line) -> bool:
        """Send a line; whether the client is still there to take it."""
        cdef const char* text = line
        cdef ssize_t left = len(line), done
        cdef pollfd look
        if self.connection == NULL:
            return False
        look.fd = self.connection.fd
        look.events = POLLOUT
        with nogil:
            while left > 0:
                done = us_say(look.fd, text, left)
                if done >= 0:
                    text += done
                    left -= done
                elif errno != EINTR and (errno != EAGAIN or poll(&look, 1, SEND_PATIENCE) <= 0):
                    break
        return left == 0

    def gone(self) -> bool:
        """Whether the client waits no more: it has hung up, or says that it has nothing more to say. Also when the
        process is about to end."""
        return self.connection == NULL or us_read(&ending) != 0 or us_hung_up(self.connection.fd)


cdef bint carry_out(Connection* c) noexcept nogil:
    """Whether there was an answer, or nobody is there for it."""
    with gil:
        try:
            asked = Asked.__new__(Asked)
            (<Asked>asked).connection = c
            (<Asked>asked).line = c.text[:c.length]
            try:
                from userswap.control import answers

                answers.answer(asked)
            finally:
                (<Asked>asked).connection = NULL
            return True
        except BaseException:  # noqa: B902 - there is nobody above to tell
            return False


def path() -> str | None:
    """The socket of this process; None: it has none."""
    return where[0] if where is not None and where[1] == os.getpid() and door >= 0 else None


def listen() -> None:
    """Have a socket, and listen to it; nothing happens if it is so.

    Raises:
        OSError: there is no directory for it that is the user's alone, no descriptor, or no thread.
    """
    global opening, hooked
    if opening or us_read(&ending):
        return
    opening = True
    try:
        if door < 0:
            open_door()
        error = thread_start(&listener)
        if error:
            close_door()
            raise OSError(-error, os.strerror(-error))
        if not hooked:
            hooked = True
            listener.later = listen_later
            thread_first_use(&listener)
            atexit.register(rest)
            os.register_at_fork(before=before_fork, after_in_child=in_child)
    finally:
        opening = False


cdef void open_door() except *:
    global door, where
    place = places.usable_place()
    places.sweep(place)
    number = os.getpid()
    draft, name = places.draft_of(place, number), f"{place}/{number}"
    try:
        os.unlink(draft)
    except FileNotFoundError:
        pass
    cdef int fd = us_listen(os.fsencode(draft))
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd))
    try:
        # Somebody listens to it when it gets its name, so that it is never taken for one that was left behind. What
        # has the name was left by a process that had our number.
        os.rename(draft, name)
        seen = os.lstat(name)
    except OSError:
        close(fd)
        raise
    fd = descriptor_up(fd, FIRST_FD)
    descriptor_guard(fd)
    where = (name, number, seen.st_dev, seen.st_ino)
    door = fd


cdef void close_door() except *:
    global door, where
    if door >= 0:
        descriptor_release(door)
        close(door)
        door = -1
    if where is not None and where[1] == os.getpid():
        try:
            seen = os.lstat(where[0])
            if (seen.st_dev, seen.st_ino) == where[2:]:
                os.unlink(where[0])
        except OSError:
            pass
    where = None


cdef void await_answers(int64_t patience) noexcept nogil:
    cdef int64_t until = us_now() + patience * MS
    while us_read(&answering) and us_now() < until:
        poll(NULL, 0, 1)


def before_fork() -> None:
    """Threads that carry something out end first, if they soon do; a swapoff goes on in the parent alone."""
    if us_read(&answering):
        with nogil:
            await_answers(FORK_PATIENCE)


def in_child() -> None:
    """The child has a socket of its own as soon as it uses swapped memory."""
    global opening, where
    opening = False
    where = None
    thread_may(&listener)


cdef void listen_later() noexcept nogil:
    Py_AddPendingCall(listen_now, NULL)


cdef int listen_now(void* nothing) noexcept:
    try:
        listen()
    except Exception:  # noqa: BLE001 - then it has none, as its parent might have had none
        pass
    return 0


def rest() -> None:
    """The process ends: no message is taken any more, and what is under way ends."""
    cdef int i
    us_write(&ending, 1)
    with nogil:
        thread_rest(&listener)
        for i in range(MOST):
            if us_read(&connections[i].state) == HEARING:
                refuse(&connections[i], AT_ITS_END)
        await_answers(END_PATIENCE)
    close_door()
