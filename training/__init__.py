"""How it is learned: steps, devices, disks. Knows no GPT and no text."""
