"""The lab: swap map designs side by side, measured. Looks at maps only through `userswap.swap.map`."""
