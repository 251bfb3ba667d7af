"""The lab: experiments with the swap layer, and its designs side by side. `userswap lab` is its command."""
