"""The swap layer: swap id to entry, swap id to count. Knows no addresses."""
