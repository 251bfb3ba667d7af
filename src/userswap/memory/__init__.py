"""Memory: regions, page tables, the fault handler, system calls, fork."""
