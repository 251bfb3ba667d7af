"""Designs of the SwapMap, one a file."""
