"""The commands of `qconvert`, by what they are for; each imports what it runs when it runs."""
