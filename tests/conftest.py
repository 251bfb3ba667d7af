"""What holds for every test, however the tests were started."""

import signal

# Started in the background of a shell they would ignore Ctrl-C, and so would every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
