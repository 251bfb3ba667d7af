"""CPython's tests of multiprocessing, started by forkserver: its own file of this name is not always installed."""

import test._test_multiprocessing

test._test_multiprocessing.install_tests_in_module_dict(globals(), "forkserver")
