"""`make stress`: programs that do everything at once, with settings drawn by a seed, and check every byte."""
