"""The lab: experiments with the swap layer, and the designs side by side. `userswap lab` is its command."""
